"""Reward-model training beside TRL's RewardTrainer: real tokens per second and peak memory, taken in turns.

    python bench/reward.py --shape=small               # needs the extra "compare"
    python bench/reward.py --shape=smollm2 --rounds=2 --steps=3
    python bench/reward.py --prompt=150 --rounds=2     # both sides of a pair begin with the same 150 tokens

Every measurement is a process of its own: random weights of the same shape, the same pairs of random tokens (both sides
20 to 200 tokens, drawn apart and uniformly), 16 pairs a step, Bradley-Terry loss, AdamW, float32, one thread. CPU seconds of
whole steps after one to warm up; padding does not count as tokens. TRL pads all 32 texts of a step to the longest; `grouped`
takes its own group-by-length, by the longer side: 50 steps sorted at a time, of which as many are timed as of the others,
evenly spread. Ours takes the pairs as they come. The score is read at the last token, as in TRL; `mean` is ours reading all
tokens, which must run the last layer for all of them.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import figures  # noqa: E402
import numpy as np  # noqa: E402
import peers  # noqa: E402
import torch  # noqa: E402

from data.loader import Order, pad  # noqa: E402
from model.transformer import ModelConfig, Transformer  # noqa: E402
from rlhf.infra import config, optim, run  # noqa: E402
from rlhf.losses import preference_loss  # noqa: E402
from rlhf.reward.model import RewardModel  # noqa: E402

SHAPES = {
    "small": ModelConfig(8192, 256, 4, 4, tied=False, context=256),
    "smollm2": ModelConfig(49152, 576, 30, 9, kv_heads=3, ffn=1536, context=2048, rope_theta=1e5),
}
SHORTEST, LONGEST, BATCH, LR = 20, 200, 16, 1e-4  # tokens, tokens, pairs per step
WINDOW = 50  # steps that TRL's sampler sorts at a time
Pairs = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Config:
    shape: Literal["small", "smollm2"] = "small"  # 5.3M parameters, or those of SmolLM2-135M
    rounds: int = 3  # every side once per round
    steps: int = 8  # timed in each measurement, after one to warm up
    prompt: int = 0  # tokens that both sides of every pair begin with
    micro_batch: int = BATCH  # pairs per forward of ours; TRL takes all at once
    side: Literal["all", "trl", "grouped", "ours", "mean"] = "all"  # one alone prints JSON

    def __post_init__(self):
        config.at_least(self, rounds=1, steps=1, prompt=0, micro_batch=1)
        if self.steps >= WINDOW:
            raise ValueError(f"--steps={self.steps}: at most {WINDOW - 1}, all but one of what TRL sorts at a time")
        if self.prompt >= LONGEST:
            raise ValueError(f"--prompt={self.prompt}: a text has at most {LONGEST} tokens")


def main() -> None:
    cfg = config.parse(Config)
    if cfg.side != "all":
        torch.set_num_threads(1)
        torch.manual_seed(0)
        seconds, tokens = (we if cfg.side in ("ours", "mean") else they)(cfg, draw(cfg))
        found = {"tokens_per_second": sum(tokens[1:]) / sum(seconds[1:]), "tokens": sum(tokens[1:])}
        print(json.dumps(found | {"peak_memory_gb": run.peak_memory_gb(torch.device("cpu"))}))
        return
    found = {side: [] for side in ("trl", "grouped", "ours", "mean")}
    for _ in range(cfg.rounds):
        for side, rows in found.items():
            options = [f"--{name}={getattr(cfg, name)}" for name in ("shape", "steps", "prompt", "micro_batch")]
            command = [sys.executable, __file__, f"--side={side}", *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ValueError(f"{side}: {done.stderr.strip().splitlines()[-1]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(side, rows[-1], flush=True)
    report(cfg, found)


def report(cfg: Config, found: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n{cfg}: medians, and the ratio to TRL in the same round [least, most]")
    print(f"{'':<10}{'real tokens/s':>14}{'to TRL':>22}{'to TRL grouped':>22}{'peak GB':>10}")
    for side, rows in found.items():
        speeds = [row["tokens_per_second"] for row in rows]
        line = f"{side:<10}{statistics.median(speeds):14.0f}"
        for other in ("trl", "grouped"):
            ratios = [speed / theirs["tokens_per_second"] for speed, theirs in zip(speeds, found[other])]
            what = f"reward training, {cfg.shape}, {side}"
            said = figures.ratio(what, other, ratios) if side in ("ours", "mean") else figures.in_words(ratios)
            line += f"{said:>22}"
        print(f"{line}{statistics.median(row['peak_memory_gb'] for row in rows):10.2f}")


def draw(cfg: Config) -> Pairs:
    """The pairs of 50 steps, the same for every side."""
    rng, vocabulary = np.random.default_rng(0), SHAPES[cfg.shape].vocab_size
    pairs = []
    for _ in range(BATCH * WINDOW):
        prompt = rng.integers(3, vocabulary, cfg.prompt)
        sizes = rng.integers(max(SHORTEST, cfg.prompt + 1), LONGEST + 1, 2) - cfg.prompt
        chosen, rejected = (np.append(prompt, rng.integers(3, vocabulary, size)) for size in sizes)
        pairs.append((chosen, rejected))
    return pairs


def we(cfg: Config, pairs: Pairs) -> tuple[list[float], list[int]]:
    """CPU seconds and real tokens of every step of ours, in the steps of train_rm.py."""
    generator = torch.Generator().manual_seed(1)
    model = Transformer(SHAPES[cfg.shape])
    model.init_weights(generator)
    reward_model = RewardModel(model, {"ours": "last", "mean": "mean"}[cfg.side], generator)
    optimizer, scaler = optim.make_optimizer(reward_model, LR), optim.amp(torch.device("cpu")).scaler
    order, seconds, counts = Order(len(pairs), BATCH, seed=0), [], []
    for step in range(cfg.steps + 1):
        start = time.process_time()
        sides = [side for row in order.rows(step) for side in pairs[row]]  # chosen, rejected, chosen, ...
        tokens, lengths = pad(sides, 0)
        for part in torch.arange(len(sides)).split(2 * cfg.micro_batch):
            scores = reward_model(tokens[part], lengths[part])
            (preference_loss(*scores.view(-1, 2).unbind(1)).sum() / BATCH).backward()
        optim.step(optimizer, reward_model, scaler, 1.0)
        seconds.append(time.process_time() - start)
        counts.append(int(lengths.sum()))
    return seconds, counts


def they(cfg: Config, pairs: Pairs) -> tuple[list[float], list[int]]:
    """CPU seconds and real tokens of every step of TRL's RewardTrainer."""
    with peers.installed():
        import datasets
        import tokenizers
        import transformers
        from trl import RewardConfig, RewardTrainer

    model = SHAPES[cfg.shape]
    llama = peers.llama_config(model, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(model.vocab_size)}, unk_token="t1")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="t0", unk_token="t1", eos_token="t2"
    )
    seconds: list[float] = []
    counts: list[int] = []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.start = time.process_time()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.process_time() - self.start)
            self.start = time.process_time()

    if cfg.side == "grouped":
        longer = [max(map(len, sides)) for sides in pairs]
        generator = torch.Generator().manual_seed(0)
        grouped = list(transformers.trainer_pt_utils.LengthGroupedSampler(BATCH, lengths=longer, generator=generator))
        spread = (np.arange(cfg.steps) + 0.5) * WINDOW / cfg.steps
        pairs = [pairs[i] for i in np.array(grouped).reshape(WINDOW, BATCH)[[0, *spread.astype(int)]].ravel()]
    rows = [{"chosen_ids": chosen.tolist(), "rejected_ids": rejected.tolist()} for chosen, rejected in pairs]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RewardTrainer(
            args=RewardConfig(
                output_dir=scratch, per_device_train_batch_size=BATCH, learning_rate=LR,
                max_length=LONGEST, bf16=False, fp16=False, gradient_checkpointing=False, use_cpu=True,
                save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10**9, seed=0,
                dataloader_num_workers=0, dataloader_pin_memory=False, max_steps=cfg.steps + 1,
                train_sampling_strategy="sequential",
            ),
            model=transformers.LlamaForSequenceClassification(llama).float(), processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(rows), callbacks=[Clock()],
        )  # fmt: skip
        collate = trainer.data_collator

        def counted(examples):
            batch = collate(examples)
            counts.append(int(batch["attention_mask"].sum()))
            return batch

        trainer.data_collator = counted
        trainer.train()
    return seconds, counts[: len(seconds)]


if __name__ == "__main__":
    config.run(main, stopped="stopped")
