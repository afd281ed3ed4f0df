"""What reward.py and sft.py share: the shapes, the turns of their sides, the table, and a trainer of TRL's with a clock."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import figures
import numpy as np
import peers
import torch

from model.transformer import ModelConfig
from rlhf.infra import config, run

SHAPES = {
    "small": ModelConfig(8192, 256, 4, 4, tied=False, context=256),
    "smollm2": ModelConfig(49152, 576, 30, 9, kv_heads=3, ffn=1536, context=2048, rope_theta=1e5),
}
SHORTEST, LONGEST, BATCH, LR = 20, 200, 16, 1e-4  # tokens, tokens, texts or pairs per step
WINDOW = 50  # steps that transformers' sampler, which TRL takes, sorts at a time


def check(cfg) -> None:
    """ValueError for rounds or steps that cannot be."""
    config.at_least(cfg, rounds=1, steps=1)
    if cfg.steps >= WINDOW:
        raise ValueError(f"--steps={cfg.steps}: at most {WINDOW - 1}, all but one of what TRL sorts at a time")


def alone(measure: Callable[[], tuple[list[float], list[int]]]) -> None:
    """One side in this process: its JSON, from CPU seconds and real tokens of every step, the first to warm up."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seconds, tokens = measure()
    found = {"tokens_per_second": sum(tokens[1:]) / sum(seconds[1:]), "tokens": sum(tokens[1:])}
    print(json.dumps(found | {"peak_memory_gb": run.peak_memory_gb(torch.device("cpu"))}))


def in_turns(file: str, cfg, sides: Sequence[str], options: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """What every side of a bench prints in every round, each in a process of its own with these options of cfg."""
    found = {side: [] for side in sides}
    given = [f"--{name}={getattr(cfg, name)}" for name in options]
    for _ in range(cfg.rounds):
        for side, rows in found.items():
            command = [sys.executable, file, f"--side={side}", *given]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ValueError(f"{side}: {done.stderr.strip().splitlines()[-1]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(side, rows[-1], flush=True)
    return found


def report(cfg, found: dict[str, list[dict[str, float]]], what: str) -> None:
    print(f"\n{cfg}: medians, and the ratio to TRL in the same round [least, most]")
    print(f"{'':<10}{'real tokens/s':>14}{'to TRL':>22}{'to TRL grouped':>22}{'peak GB':>10}")
    for side, rows in found.items():
        speeds = [row["tokens_per_second"] for row in rows]
        line = f"{side:<10}{statistics.median(speeds):14.0f}"
        for other in ("trl", "grouped"):
            ratios = [speed / theirs["tokens_per_second"] for speed, theirs in zip(speeds, found[other])]
            name = f"{what}, {cfg.shape}, {cfg.precision}, {side}"
            said = figures.in_words(ratios) if side in ("trl", "grouped") else figures.ratio(name, other, ratios)
            line += f"{said:>22}"
        print(f"{line}{statistics.median(row['peak_memory_gb'] for row in rows):10.2f}")


def they(
    cfg, rows: list[dict], lengths: list[int], names: tuple[str, str, str], real: Callable[[dict], int], **options
) -> tuple[list[float], list[int]]:
    """CPU seconds and real tokens of every step of one of TRL's trainers.

    rows: its data, with what it sorts them by when cfg.side is "grouped". names: of TRL's trainer and its configuration, and
    of transformers' model. real: the tokens of a collated batch that are not padding.
    """
    with peers.installed():
        import datasets
        import tokenizers
        import transformers
        import trl

        trainer_of, config_of = (getattr(trl, name) for name in names[:2])
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
        grouped = list(transformers.trainer_pt_utils.LengthGroupedSampler(BATCH, lengths=lengths, generator=generator))
        spread = (np.arange(cfg.steps) + 0.5) * WINDOW / cfg.steps
        rows = [rows[i] for i in np.array(grouped).reshape(WINDOW, BATCH)[[0, *spread.astype(int)]].ravel()]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(
            args=config_of(
                output_dir=scratch, per_device_train_batch_size=BATCH, learning_rate=LR, max_length=LONGEST,
                bf16=cfg.precision == "bf16", fp16=False, gradient_checkpointing=False, use_cpu=True,
                save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10**9, seed=0,
                dataloader_num_workers=0, dataloader_pin_memory=False, max_steps=cfg.steps + 1,
                train_sampling_strategy="sequential", **options,
            ),
            model=getattr(transformers, names[2])(llama).float(), processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(rows), callbacks=[Clock()],
        )  # fmt: skip
        collate = trainer.data_collator

        def counted(examples):
            batch = collate(examples)
            counts.append(real(batch))
            return batch

        trainer.data_collator = counted
        trainer.train()
    return seconds, counts[: len(seconds)]
