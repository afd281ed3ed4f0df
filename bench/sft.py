"""Fine-tuning beside TRL's SFTTrainer: real tokens per CPU second and peak memory, taken in turns.

    python bench/sft.py --shape=small               # needs the extra "compare"
    python bench/sft.py --shape=smollm2 --rounds=2 --steps=2

Every measurement is a process of its own: random weights of the same shape, the same texts of random tokens (20 to 200,
uniformly), 16 texts a step, next-token loss on all of them, AdamW, gradients clipped to norm 1, float32, one thread. CPU
seconds of whole steps after one to warm up; padding does not count as tokens. TRL pads the texts of a step to the longest;
`grouped` takes transformers' group-by-length: 50 steps sorted at a time, of which as many are timed as of the others, evenly
spread. Ours takes the texts as they come and puts them one after the other.
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
from rlhf.lm.language_model import LanguageModel  # noqa: E402

SHAPES = {
    "small": ModelConfig(8192, 256, 4, 4, tied=False, context=256),
    "smollm2": ModelConfig(49152, 576, 30, 9, kv_heads=3, ffn=1536, context=2048, rope_theta=1e5),
}
SHORTEST, LONGEST, BATCH, LR = 20, 200, 16, 1e-4  # tokens, tokens, texts per step
WINDOW = 50  # steps that transformers' sampler sorts at a time


@dataclass(frozen=True)
class Config:
    shape: Literal["small", "smollm2"] = "small"  # 7.4M parameters, or those of SmolLM2-135M
    rounds: int = 3  # every side once per round
    steps: int = 8  # timed in each measurement, after one to warm up
    side: Literal["all", "trl", "grouped", "ours"] = "all"  # one alone prints JSON

    def __post_init__(self):
        config.at_least(self, rounds=1, steps=1)
        if self.steps >= WINDOW:
            raise ValueError(f"--steps={self.steps}: at most {WINDOW - 1}, all but one of what is sorted at a time")


def main() -> None:
    cfg = config.parse(Config)
    if cfg.side != "all":
        torch.set_num_threads(1)
        torch.manual_seed(0)
        seconds, tokens = (we if cfg.side == "ours" else they)(cfg, draw(cfg))
        found = {"tokens_per_second": sum(tokens[1:]) / sum(seconds[1:]), "tokens": sum(tokens[1:])}
        print(json.dumps(found | {"peak_memory_gb": run.peak_memory_gb(torch.device("cpu"))}))
        return
    found = {side: [] for side in ("trl", "grouped", "ours")}
    for _ in range(cfg.rounds):
        for side, rows in found.items():
            command = [sys.executable, __file__, f"--side={side}", f"--shape={cfg.shape}", f"--steps={cfg.steps}"]
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
            what = f"fine-tuning, {cfg.shape}, {side}"
            line += f"{figures.ratio(what, other, ratios) if side == 'ours' else figures.in_words(ratios):>22}"
        print(f"{line}{statistics.median(row['peak_memory_gb'] for row in rows):10.2f}")


def draw(cfg: Config) -> list[np.ndarray]:
    """The texts of 50 steps, the same for every side."""
    rng, vocabulary = np.random.default_rng(0), SHAPES[cfg.shape].vocab_size
    return [rng.integers(3, vocabulary, size) for size in rng.integers(SHORTEST, LONGEST + 1, BATCH * WINDOW)]


def we(cfg: Config, texts: list[np.ndarray]) -> tuple[list[float], list[int]]:
    """CPU seconds and real tokens of every step of ours, in the steps of train_lm.py."""
    model = Transformer(SHAPES[cfg.shape])
    model.init_weights(torch.Generator().manual_seed(1))
    language_model = LanguageModel(model)
    optimizer, scaler = optim.make_optimizer(language_model, LR), optim.amp(torch.device("cpu")).scaler
    order, seconds, counts = Order(len(texts), BATCH, seed=0), [], []
    for step in range(cfg.steps + 1):
        start = time.process_time()
        tokens, lengths = pad([texts[row] for row in order.rows(step)], 0)
        t = torch.arange(tokens.shape[1])
        mask = (t >= 1) & (t < lengths[:, None])
        (language_model(tokens, mask, lengths).sum() / mask.sum()).backward()
        optim.step(optimizer, language_model, scaler, 1.0)
        seconds.append(time.process_time() - start)
        counts.append(int(lengths.sum()))
    return seconds, counts


def they(cfg: Config, texts: list[np.ndarray]) -> tuple[list[float], list[int]]:
    """CPU seconds and real tokens of every step of TRL's SFTTrainer."""
    with peers.installed():
        import datasets
        import tokenizers
        import transformers
        from trl import SFTConfig, SFTTrainer

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
        generator = torch.Generator().manual_seed(0)
        lengths = [len(text) for text in texts]
        grouped = list(transformers.trainer_pt_utils.LengthGroupedSampler(BATCH, lengths=lengths, generator=generator))
        spread = (np.arange(cfg.steps) + 0.5) * WINDOW / cfg.steps
        texts = [texts[i] for i in np.array(grouped).reshape(WINDOW, BATCH)[[0, *spread.astype(int)]].ravel()]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            args=SFTConfig(
                output_dir=scratch, per_device_train_batch_size=BATCH, learning_rate=LR, max_length=LONGEST,
                packing=False, bf16=False, fp16=False, gradient_checkpointing=False, use_cpu=True,
                save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10**9, seed=0,
                dataloader_num_workers=0, dataloader_pin_memory=False, max_steps=cfg.steps + 1,
                train_sampling_strategy="sequential",
            ),
            model=transformers.LlamaForCausalLM(llama).float(), processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list([{"input_ids": text.tolist()} for text in texts]),
            callbacks=[Clock()],
        )  # fmt: skip
        collate = trainer.data_collator

        def counted(examples):
            batch = collate(examples)
            counts.append(int((batch["labels"] != -100).sum()))
            return batch

        trainer.data_collator = counted
        trainer.train()
    return seconds, counts[: len(seconds)]


if __name__ == "__main__":
    config.run(main, stopped="stopped")
