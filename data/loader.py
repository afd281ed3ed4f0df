"""Token files -> batches. A batch is a pure function of (seed, step, rank, world): resume needs one integer.

    train = TokenFile("out/data/vader/train")
    loader = RatingLoader(train, batch_size=32, seed=0, rank=0, world=1)
    tokens, lengths, ratings = loader.batch(step)

Every loader has `batch(step)`, this rank's share of the step's rows, and `take(rows)`, a batch of given rows (to
evaluate: `for rows in in_order(len(loader), 64): loader.take(rows)`). Rows are right-padded; masks come from lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batches import PromptBatch, in_order, pad, shard  # noqa: F401  in_order: for evaluation
from data.pairs import thurstone
from data.tokens import TokenFile

# --- which rows make up a step ---


@dataclass(frozen=True, eq=False)  # compared by identity, because epoch_plan remembers by it
class Order:
    """The order in which n rows are visited: every epoch a new permutation, cut into batches; the rest is dropped.

    With lengths (n,), rows of similar length share a batch: shuffle, sort inside windows of `window` batches, shuffle
    the batches. That saves padding, and is still a pure function of (seed, step).
    """

    n: int
    batch: int
    seed: int
    lengths: np.ndarray | None = None
    window: int = 32

    def __post_init__(self):
        if not 0 < self.batch <= self.n:
            raise ValueError(f"batch size {self.batch} with {self.n} rows; it must be between 1 and {self.n}")

    @property
    def steps_per_epoch(self) -> int:
        return self.n // self.batch

    def rows(self, step: int) -> np.ndarray:
        """The global batch of a step: (batch,) row numbers, the same on every rank."""
        return epoch_plan(self, step // self.steps_per_epoch)[step % self.steps_per_epoch]


@lru_cache(maxsize=16)
def epoch_plan(order: Order, epoch: int) -> np.ndarray:
    """All batches of an epoch: (steps, batch) row numbers, no row twice."""
    rng = np.random.default_rng([order.seed, epoch])
    rows = rng.permutation(order.n)[: order.steps_per_epoch * order.batch]
    if order.lengths is not None:
        for start in range(0, len(rows), order.window * order.batch):
            window = rows[start : start + order.window * order.batch]
            rows[start : start + len(window)] = window[np.argsort(order.lengths[window], kind="stable")]
        rows = rng.permutation(rows.reshape(-1, order.batch))
    return rows.reshape(-1, order.batch)


# --- batches ---


class RatingBatch(NamedTuple):
    tokens: Tensor  # (B, T)
    lengths: Tensor  # (B,)
    ratings: Tensor  # (B,) float32


class PairBatch(NamedTuple):
    chosen: Tensor  # (B, T)
    chosen_lengths: Tensor  # (B,)
    rejected: Tensor  # (B, T')
    rejected_lengths: Tensor  # (B,)
    gap: Tensor  # (B,) float32 > 0
    ratings: Tensor  # (B, 2) float32, chosen and rejected
    preference: Tensor  # (B,) float32: probability that a rater prefers chosen, see `thurstone`; 1 unless it is soft


@dataclass(frozen=True, eq=False)
class RatingLoader:
    """Whole rows and what people thought of them; of longer ones than `context` the prompt is cut from the left."""

    file: TokenFile
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    context: int = 1 << 30
    bucket: bool = True

    @cached_property
    def order(self) -> Order:
        return Order(len(self), self.batch_size, self.seed, self.file.lengths() if self.bucket else None)

    def __len__(self) -> int:
        return len(self.file)

    def take(self, rows: np.ndarray) -> RatingBatch:
        ratings = torch.from_numpy(self.file.column("rating")[rows].astype(np.float32))
        return RatingBatch(*pad([self.file.row(i, self.context) for i in rows], self.file.pad), ratings)

    def batch(self, step: int) -> RatingBatch:
        return self.take(shard(self.order.rows(step), self.rank, self.world))


@dataclass(frozen=True, eq=False)
class PairLoader:
    """Pairs of rows of one domain, the better rated first; a "row" of this loader is a pair."""

    file: TokenFile
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    context: int = 1 << 30
    bucket: bool = True
    soft: bool = False

    @cached_property
    def order(self) -> Order:
        lengths = self.file.lengths()
        longer = np.maximum(lengths[self.file.column("pair_chosen")], lengths[self.file.column("pair_rejected")])
        return Order(len(self), self.batch_size, self.seed, longer if self.bucket else None)

    def __len__(self) -> int:
        return len(self.file.column("pair_gap"))

    def take(self, rows: np.ndarray) -> PairBatch:
        sides = [self.file.column(name)[rows] for name in ("pair_chosen", "pair_rejected")]
        chosen, rejected = (pad([self.file.row(i, self.context) for i in side], self.file.pad) for side in sides)
        gap, ratings = self.file.column("pair_gap")[rows], [self.file.column("rating")[side] for side in sides]
        spread = [self.file.column("rating_std")[side] for side in sides] if self.soft else (0.0, 0.0)
        preference = thurstone(*ratings, *spread)
        facts = (gap, np.stack(ratings, 1), preference)
        return PairBatch(*chosen, *rejected, *(torch.from_numpy(x.astype(np.float32)) for x in facts))

    def batch(self, step: int) -> PairBatch:
        return self.take(shard(self.order.rows(step), self.rank, self.world))


@dataclass(frozen=True, eq=False)
class PromptLoader:
    """Prompts, one per row; make the list with `prompts_from_rows` or `prompts_from_text`."""

    prompts: Sequence[np.ndarray]
    pad: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    @cached_property
    def order(self) -> Order:
        return Order(len(self), self.batch_size, self.seed)

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: np.ndarray) -> PromptBatch:
        row_ids = torch.from_numpy(np.array(rows, np.int64))
        return PromptBatch(*pad([self.prompts[i] for i in rows], self.pad), row_ids)

    def batch(self, step: int) -> PromptBatch:
        return self.take(shard(self.order.rows(step), self.rank, self.world))


def prompts_from_rows(file: TokenFile, prompt_tokens: int, domains: Sequence[str] = ()) -> list[np.ndarray]:
    """bos and the first `prompt_tokens` text tokens of every row of these domains (default all) that is longer."""
    wanted = np.isin(file.column("domain"), file.domain_ids(domains)) if domains else np.ones(len(file), bool)
    rows = np.flatnonzero(wanted & (file.lengths() - 2 > prompt_tokens))  # without bos and eos
    if not len(rows):
        where = f"{file.path} ({', '.join(domains) or 'all domains'})"
        raise ValueError(f"no text of {where} is longer than {prompt_tokens} tokens; use shorter prompts")
    return [np.array(file[i][: 1 + prompt_tokens]) for i in rows]


def prompts_from_text(path: str | Path, tokenizer) -> list[np.ndarray]:
    """bos and the tokens of every line of a text file that is not blank. ValueError if there is none."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"prompt file {path} is not UTF-8 (byte {e.start}); convert it first") from None
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"prompt file {path} is empty: 0 prompts in {len(text)} characters; write one prompt a line")
    return [np.array([tokenizer.start, *tokenizer.encode(line)], np.int64) for line in lines]
