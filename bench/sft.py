"""Fine-tuning beside TRL's SFTTrainer: real tokens per CPU second and peak memory, taken in turns.

    python bench/sft.py --shape=small               # needs the extra "compare"
    python bench/sft.py --shape=smollm2 --rounds=2 --steps=2

Every measurement is a process of its own: random weights of the same shape, the same texts of random tokens (20 to 200,
uniformly), 16 texts a step, next-token loss on all of them, AdamW, gradients clipped to norm 1, one thread. CPU
seconds of whole steps after one to warm up; padding does not count as tokens. TRL pads the texts of a step to the longest;
`grouped` takes transformers' group-by-length: 50 steps sorted at a time, of which as many are timed as of the others, evenly
spread. Ours takes the texts as they come and puts them one after the other.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402
from training import BATCH, LONGEST, LR, SHAPES, SHORTEST, WINDOW  # noqa: E402

from data.loader import Order, pad  # noqa: E402
from model.transformer import Transformer  # noqa: E402
from rlhf.infra import config, optim  # noqa: E402
from rlhf.lm.language_model import LanguageModel  # noqa: E402


@dataclass(frozen=True)
class Config:
    shape: Literal["small", "smollm2"] = "small"  # 7.4M parameters, or those of SmolLM2-135M
    precision: Literal["fp32", "bf16"] = "fp32"  # of all sides; bf16 is autocast in all of them
    rounds: int = 3  # every side once per round
    steps: int = 8  # timed in each measurement, after one to warm up
    side: Literal["all", "trl", "grouped", "ours"] = "all"  # one alone prints JSON

    def __post_init__(self):
        training.check(self)


def main() -> None:
    cfg = config.parse(Config)
    if cfg.side != "all":
        training.alone(lambda: (we if cfg.side == "ours" else they)(cfg, draw(cfg)))
        return
    found = training.in_turns(__file__, cfg, ("trl", "grouped", "ours"), ("shape", "precision", "steps"))
    training.report(cfg, found, "fine-tuning")


def draw(cfg: Config) -> list[np.ndarray]:
    """The texts of 50 steps, the same for every side."""
    rng, vocabulary = np.random.default_rng(0), SHAPES[cfg.shape].vocab_size
    return [rng.integers(3, vocabulary, size) for size in rng.integers(SHORTEST, LONGEST + 1, BATCH * WINDOW)]


def we(cfg: Config, texts: list[np.ndarray]) -> tuple[list[float], list[int]]:
    """CPU seconds and real tokens of every step of ours, in the steps of train_lm.py."""
    model = Transformer(SHAPES[cfg.shape])
    model.init_weights(torch.Generator().manual_seed(1))
    language_model = LanguageModel(model)
    optimizer, precision = optim.make_optimizer(language_model, LR), optim.amp(torch.device("cpu"), cfg.precision)
    order, seconds, counts = Order(len(texts), BATCH, seed=0), [], []
    for step in range(cfg.steps + 1):
        start = time.process_time()
        tokens, lengths = pad([texts[row] for row in order.rows(step)], 0)
        t = torch.arange(tokens.shape[1])
        mask = (t >= 1) & (t < lengths[:, None])
        with precision.autocast():
            loss = language_model(tokens, mask, lengths).sum() / mask.sum()
        loss.backward()
        optim.step(optimizer, language_model, precision.scaler, 1.0)
        seconds.append(time.process_time() - start)
        counts.append(int(lengths.sum()))
    return seconds, counts


def they(cfg: Config, texts: list[np.ndarray]) -> tuple[list[float], list[int]]:
    """CPU seconds and real tokens of every step of TRL's SFTTrainer."""
    rows, names = [{"input_ids": text.tolist()} for text in texts], ("SFTTrainer", "SFTConfig", "LlamaForCausalLM")
    lengths = [len(text) for text in texts]
    return training.they(cfg, rows, lengths, names, lambda batch: int((batch["labels"] != -100).sum()), packing=False)


if __name__ == "__main__":
    config.run(main, stopped="stopped")
