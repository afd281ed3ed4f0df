"""Reward-model training beside TRL's RewardTrainer: real tokens per second and peak memory, taken in turns.

    python bench/reward.py --shape=small               # needs the extra "compare"
    python bench/reward.py --shape=smollm2 --rounds=2 --steps=3
    python bench/reward.py --prompt=150 --rounds=2     # both sides of a pair begin with the same 150 tokens

Every measurement is a process of its own: random weights of the same shape, the same pairs of random tokens (both sides
20 to 200 tokens, drawn apart and uniformly), 16 pairs a step, Bradley-Terry loss, AdamW, one thread. CPU seconds of
whole steps after one to warm up; padding does not count as tokens. TRL pads all 32 texts of a step to the longest; `grouped`
takes its own group-by-length, by the longer side: 50 steps sorted at a time, of which as many are timed as of the others,
evenly spread. Ours takes the pairs as they come. The score is read at the last token, as in TRL; `mean` is ours reading all
tokens, which must run the last layer for all of them.
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
from rlhf.losses import preference_loss  # noqa: E402
from rlhf.reward.model import RewardModel  # noqa: E402

Pairs = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Config:
    shape: Literal["small", "smollm2"] = "small"  # 5.3M parameters, or those of SmolLM2-135M
    precision: Literal["fp32", "bf16"] = "fp32"  # of all sides; bf16 is autocast in all of them
    rounds: int = 3  # every side once per round
    steps: int = 8  # timed in each measurement, after one to warm up
    prompt: int = 0  # tokens that both sides of every pair begin with
    micro_batch: int = BATCH  # pairs per forward of ours; TRL takes all at once
    side: Literal["all", "trl", "grouped", "ours", "mean"] = "all"  # one alone prints JSON

    def __post_init__(self):
        training.check(self)
        config.at_least(self, prompt=0, micro_batch=1)
        if self.prompt >= LONGEST:
            raise ValueError(f"--prompt={self.prompt}: a text has at most {LONGEST} tokens")


def main() -> None:
    cfg = config.parse(Config)
    if cfg.side != "all":
        training.alone(lambda: (we if cfg.side in ("ours", "mean") else they)(cfg, draw(cfg)))
        return
    found = training.in_turns(
        __file__, cfg, ("trl", "grouped", "ours", "mean"), ("shape", "precision", "steps", "prompt", "micro_batch")
    )
    training.report(cfg, found, "reward training")


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
    optimizer, precision = optim.make_optimizer(reward_model, LR), optim.amp(torch.device("cpu"), cfg.precision)
    order, seconds, counts = Order(len(pairs), BATCH, seed=0), [], []
    for step in range(cfg.steps + 1):
        start = time.process_time()
        sides = [side for row in order.rows(step) for side in pairs[row]]  # chosen, rejected, chosen, ...
        tokens, lengths = pad(sides, 0)
        for part in torch.arange(len(sides)).split(2 * cfg.micro_batch):
            with precision.autocast():
                scores = reward_model(tokens[part], lengths[part])
            (preference_loss(*scores.view(-1, 2).unbind(1)).sum() / BATCH).backward()
        optim.step(optimizer, reward_model, precision.scaler, 1.0)
        seconds.append(time.process_time() - start)
        counts.append(int(lengths.sum()))
    return seconds, counts


def they(cfg: Config, pairs: Pairs) -> tuple[list[float], list[int]]:
    """CPU seconds and real tokens of every step of TRL's RewardTrainer."""
    rows = [{"chosen_ids": chosen.tolist(), "rejected_ids": rejected.tolist()} for chosen, rejected in pairs]
    names, longer = (
        ("RewardTrainer", "RewardConfig", "LlamaForSequenceClassification"),
        [max(map(len, sides)) for sides in pairs],
    )
    return training.they(cfg, rows, longer, names, lambda batch: int(batch["attention_mask"].sum()))


if __name__ == "__main__":
    config.run(main, stopped="stopped")
