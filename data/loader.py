"""Token files -> batches. A batch is a pure function of (seed, step, rank, world): resume needs one integer.

    train = TokenFile("out/data/vader/train")
    loader = SentenceLoader(train, batch_size=32, seed=0, rank=0, world=1)
    tokens, lengths, mask = loader.batch(step)

Every loader has `batch(step)`, this rank's share of the step's rows, and `take(rows)`, a batch of given rows (to
evaluate: `for rows in in_order(len(loader), 64): loader.take(rows)`). Rows are right-padded; masks come from lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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


def batch_rows(step: int, n: int, batch: int, seed: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """The rows of a step, from nothing else: (batch,). An `Order` remembers the epoch's plan, this does not."""
    return Order(n, batch, seed, lengths).rows(step)


def shard(rows: np.ndarray, rank: int, world: int) -> np.ndarray:
    """This rank's share of a global batch: every world-th row, so that lengths spread evenly. (B,) -> (B / world,)"""
    if len(rows) % world:
        fits = [n for n in (len(rows) // world * world, len(rows) // world * world + world) if n]
        hint = " or ".join(map(str, fits))
        raise ValueError(f"batch size {len(rows)} is not a multiple of {world} processes; try {hint}")
    return rows[rank::world]


def in_order(n: int, batch: int) -> Iterator[np.ndarray]:
    """All rows once, in order, the last batch smaller: for evaluation."""
    for start in range(0, n, batch):
        yield np.arange(start, min(start + batch, n))


def pad(rows: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded: list of (T_i,) -> tokens (B, T) int64, lengths (B,) int64."""
    lengths = torch.tensor([len(r) for r in rows])
    tokens = torch.full((len(rows), int(lengths.max())), pad_id, dtype=torch.int64)
    for out, row in zip(tokens, rows):
        out[: len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
    return tokens, lengths


def shorten(row: np.ndarray, context: int) -> np.ndarray:
    """At most `context` tokens: the beginning of the row and its last token, the eos that a score is read at."""
    return row if len(row) <= context else np.append(row[: context - 1], row[-1])


# --- batches ---


class SentenceBatch(NamedTuple):
    tokens: Tensor  # (B, T)
    lengths: Tensor  # (B,)
    mask: Tensor  # (B, T) bool, True on the tokens to predict: all real ones but the first


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


class PromptBatch(NamedTuple):
    prompts: Tensor  # (B, P)
    prompt_lengths: Tensor  # (B,)
    rows: Tensor  # (B,) int64: which prompt this is, for its randomness and for looking it up


@dataclass(frozen=True, eq=False)
class SentenceLoader:
    """Rows for next-token prediction; rows longer than `context` are cut into windows that overlap by one token."""

    file: TokenFile
    batch_size: int  # global: over all ranks
    seed: int
    rank: int = 0
    world: int = 1
    context: int = 1 << 30
    bucket: bool = True  # rows of similar length share a batch

    @cached_property
    def windows(self) -> np.ndarray:
        """(n, 2): first and last + 1 token of every window; every token but the row's first is predicted once."""
        starts, ends = self.file.offsets[:-1], self.file.offsets[1:]
        stride = self.context - 1
        if stride < 1:
            raise ValueError(f"context {self.context} is too short: the loader needs at least 2 tokens to predict one")
        counts = np.maximum(1, -(-(ends - starts - 1) // stride))  # windows of each row
        row = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = starts[row] + nth * stride
        return np.stack([first, np.minimum(first + self.context, ends[row])], axis=1)

    @cached_property
    def order(self) -> Order:
        lengths = np.diff(self.windows)[:, 0] if self.bucket else None
        return Order(len(self), self.batch_size, self.seed, lengths)

    def __len__(self) -> int:
        return len(self.windows)

    def take(self, rows: np.ndarray) -> SentenceBatch:
        tokens, lengths = pad([self.file.tokens[a:b] for a, b in self.windows[rows]], self.file.pad)
        t = torch.arange(tokens.shape[1])
        return SentenceBatch(tokens, lengths, (t >= 1) & (t < lengths[:, None]))

    def batch(self, step: int) -> SentenceBatch:
        return self.take(shard(self.order.rows(step), self.rank, self.world))


@dataclass(frozen=True, eq=False)
class RatingLoader:
    """Whole rows and what people thought of them; longer ones than `context` keep their beginning and their eos."""

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
        return RatingBatch(*pad([shorten(self.file[i], self.context) for i in rows], self.file.pad), ratings)

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
        chosen, rejected = (pad([shorten(self.file[i], self.context) for i in side], self.file.pad) for side in sides)
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
