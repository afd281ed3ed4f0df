"""Prepared data -> batches. A batch is a pure function of (seed, step, rank, world): resume needs one integer.

    train = open_data("out/data/mine", "train")  # or a mixture, "out/data/a:0.7,out/data/b:0.3"
    loader = TextLoader(train, batch_size=32, seed=0, rank=0, world=1, context=1024)
    tokens, lengths, mask, rows = loader.batch(step)
    loader.summary  # how many rows there are, and what was left out or cut, and why

Every loader visits units (answers, windows of a long text, pairs, prompts), numbered from 0 to len(loader): `batch(step)` is
this rank's share of the step's units, `take(units)` a batch of given ones (to evaluate: `for units in in_order(len(loader),
64): loader.take(units)`). Rows are prompt, answer, padding; masks come from lengths. Where prompt and answer are longer
than the context, the prompt is cut from the left, behind its start token: an answer is never cut.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.examples import Examples, Pairs, by_shard, flat
from data.records import Record

# --- which rows make up a step ---


@dataclass(frozen=True)
class Permutation:
    """A permutation of 0 ... n - 1 by a key, in the memory of a few numbers: where each place goes, on any machine the same.

    A Feistel network (Luby & Rackoff 1988) over the next even number of bits, followed along its cycle until it is below n
    (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", section 3): less than four rounds of it on average.
    """

    n: int
    key: tuple[int, ...]

    @cached_property
    def _keys(self) -> np.ndarray:
        text = ",".join(str(int(k)) for k in self.key)
        return np.frombuffer(hashlib.sha512(text.encode()).digest(), "<u8")  # (8,), one a round

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """(M,) of 0 ... n - 1 -> (M,) int64."""
        half = np.uint64(max(1, math.ceil((self.n - 1).bit_length() / 2)))
        x = np.array(places, np.uint64)
        walking = np.arange(len(x))
        while len(walking):
            left, right = x[walking] >> half, x[walking] & ((np.uint64(1) << half) - np.uint64(1))
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) >> (np.uint64(64) - half))
            x[walking] = left << half | right
            walking = walking[x[walking] >= self.n]
        return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): every bit of x moves every bit. (M,) uint64"""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, eq=False)  # compared by identity, because _plan remembers by it
class Order:
    """The order in which n rows are visited: every epoch a new permutation, cut into batches; the rest is dropped.

    With lengths (rows (M,) -> (M,)), rows of similar length share a batch: windows of `window` batches are sorted, and their
    batches shuffled. That saves padding, and is still a pure function of (seed, step). Nothing here grows with n.
    """

    n: int
    batch: int
    seed: int
    lengths: Callable[[np.ndarray], np.ndarray] | None = None
    window: int = 32

    def __post_init__(self):
        if not 0 < self.batch <= self.n:
            raise ValueError(f"batch size {self.batch} with {self.n} rows; it must be between 1 and {self.n}")

    @property
    def steps_per_epoch(self) -> int:
        return self.n // self.batch

    def rows(self, step: int) -> np.ndarray:
        """The global batch of a step: (batch,) row numbers, the same on every rank."""
        epoch, step = divmod(step, self.steps_per_epoch)
        return _plan(self, epoch, step // self.window)[step % self.window]

    def plan(self, epoch: int, window: int) -> np.ndarray:
        """All batches of a window: (window, batch), fewer in the last one of an epoch."""
        last = min((window + 1) * self.window, self.steps_per_epoch)
        places = np.arange(window * self.window * self.batch, last * self.batch)
        rows = Permutation(self.n, (self.seed, epoch))(places)
        if self.lengths is None:
            return rows.reshape(-1, self.batch)
        batches = rows[np.argsort(self.lengths(rows), kind="stable")].reshape(-1, self.batch)
        return batches[Permutation(len(batches), (self.seed, epoch, window))(np.arange(len(batches)))]


def total_steps(epochs: float, steps_per_epoch: int) -> int:
    """Of so many passes over the data, which need not be whole. ValueError where they are less than one step."""
    total = int(epochs * steps_per_epoch)
    if total < 1:
        raise ValueError(
            f"epochs {epochs} of {steps_per_epoch} steps each is less than one step: raise it or lower --batch"
        )
    return total


CYCLE = 1000  # slots after which the parts of a mixture come in the same order again: what a weight is rounded to


@dataclass(frozen=True, eq=False)
class MixedOrder:
    """The order of several data together: batches have of each part what its weight says, and every part its own epochs.

    sizes: rows of each part, numbered one part after the other. Over CYCLE slots the parts are spread as evenly as can be
    (smooth weighted round-robin); the k-th slot of a part is the k-th row of its own sequence of permutations, so that
    every row of it comes once before one comes twice. Lengths as in `Order`, within each part.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    batch: int
    seed: int
    lengths: Callable[[np.ndarray], np.ndarray] | None = None
    window: int = 32

    def __post_init__(self):
        for k, (size, most) in enumerate(zip(self.sizes, np.bincount(self.cycle, minlength=len(self.sizes)))):
            if not most:
                raise ValueError(
                    f"the weight of part {k + 1} is {self.weights[k] / sum(self.weights):.2g} of the mixture: "
                    f"less than 1 in {CYCLE} cannot be drawn; leave it out or give it more"
                )
            if (needed := math.ceil(self.batch * most / CYCLE)) > size:
                raise ValueError(
                    f"a batch of {self.batch} takes {needed} rows of part {k + 1}, which has {size}: "
                    "lower its weight or the batch size"
                )

    @property
    def n(self) -> int:
        return sum(self.sizes)

    @property
    def steps_per_epoch(self) -> int:
        """As many steps as all rows together would make; by its weight a part has seen more of itself then, or less."""
        return self.n // self.batch

    @cached_property
    def cycle(self) -> np.ndarray:
        """(CYCLE,): the part of every slot."""
        share = np.array(self.weights) / sum(self.weights) * CYCLE
        counts = np.floor(share).astype(np.int64)
        counts[np.argsort(counts - share, kind="stable")[: CYCLE - counts.sum()]] += 1  # the largest remainders
        credit, cycle = np.zeros(len(counts), np.int64), np.zeros(CYCLE, np.int64)
        for slot in range(CYCLE):
            credit += counts
            cycle[slot] = credit.argmax()
            credit[cycle[slot]] -= CYCLE
        return cycle

    def rows(self, step: int) -> np.ndarray:
        """The global batch of a step: (batch,) row numbers, the same on every rank."""
        return _plan(self, 0, step // self.window)[step % self.window]

    def plan(self, epoch: int, window: int) -> np.ndarray:
        """All batches of a window: (window, batch)."""
        slots = np.arange(window * self.window * self.batch, (window + 1) * self.window * self.batch)
        part = self.cycle[slots % CYCLE]
        rows, first = np.zeros(len(slots), np.int64), 0
        for k, size in enumerate(self.sizes):
            mine, at = self.cycle == k, part == k
            before = np.cumsum(mine) - mine  # slots of this part in the cycle before each slot
            place = slots[at] // CYCLE * mine.sum() + before[slots[at] % CYCLE]
            drawn = np.zeros(len(place), np.int64)
            for e in np.unique(place // size):
                now = place // size == e
                drawn[now] = first + Permutation(size, (self.seed, int(e), k))(place[now] % size)
            # the slots of a part go through the batches in order: sorted, the shortest lie in the first
            rows[at] = drawn if self.lengths is None else drawn[np.argsort(self.lengths(drawn), kind="stable")]
            first += size
        batches = rows.reshape(-1, self.batch)
        if self.lengths is None:
            return batches
        lengths = self.lengths(rows).reshape(batches.shape)
        batches = np.take_along_axis(batches, np.argsort(lengths, 1, kind="stable"), 1)
        return batches[Permutation(len(batches), (self.seed, window))(np.arange(len(batches)))]


@lru_cache(maxsize=16)
def _plan(order: Order | MixedOrder, epoch: int, window: int) -> np.ndarray:
    return order.plan(epoch, window)


def micro_batches(
    lengths: np.ndarray, tokens: int, world: int = 1, packed: bool = False, rows: np.ndarray | int = 1
) -> list[np.ndarray]:
    """A batch cut so that no part has more than `tokens` tokens, padding included: numbers of this rank's units, shortest
    first.

    lengths (B,): of the step's units on all ranks, in the order of `shard`. Every rank gets the same numbers, since a unit
    counts as long as the longest that stands in its place on any rank; so no rank waits for another. packed: units stand
    one after the other, without padding. rows (B,): of each unit, all as long as it. ValueError if a unit alone has more.
    """
    longest = np.asarray(lengths).reshape(-1, world).max(1)  # (B / world,)
    rows = np.broadcast_to(rows, np.shape(lengths)).reshape(-1, world).max(1)
    if len(longest) and (most := (rows * longest).max()) > tokens:
        raise ValueError(f"a row has {most} tokens, a micro-batch may have {tokens}; allow at least as many")
    parts, begin = [], 0
    order = np.argsort(longest, kind="stable")
    total, height = (np.append(0, np.cumsum(x[order])) for x in (rows * longest, rows))
    for end in range(1, len(order) + 1):
        full = end == len(order)
        if not full:
            padded = (height[end + 1] - height[begin]) * longest[order[end]]
            full = (total[end + 1] - total[begin] if packed else padded) > tokens
        if full:
            parts.append(order[begin:end])
            begin = end
    return parts


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


# --- what there is to visit ---


def open_data(spec: str | Path, split: str, verify: bool = False) -> Examples:
    """A split of a directory made by data.prepare; or of several with a weight each, "a:0.7,b:0.3": a mixture.

    ValueError if a weight is missing or no number above 0, or if they were prepared with other tokenizers or templates.
    """
    if Path(spec).is_dir() or not any(sign in str(spec) for sign in ",:"):
        return Examples(Path(spec) / split, verify=verify)
    paths, weights = [], []
    for part in str(spec).split(","):
        path, _, weight = part.strip().rpartition(":")
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        if not path or not 0 < number < math.inf:
            raise ValueError(f"{part.strip()!r} of the data {str(spec)!r} is no directory:weight; write a:0.7,b:0.3")
        paths.append(path)
        weights.append(number)
    if len(set(paths)) < len(paths):
        raise ValueError(f"the data {str(spec)!r} name a directory twice; add up its weights")
    return Examples(*(Path(path) / split for path in paths), weights=weights, verify=verify)


class Units:
    """What a loader visits, numbered from 0 over all shards: of every row as many as `count` says (0 leaves it out).

    starts (shards + 1,): the first row of every shard. count: shard -> how many units each of its rows is, how many rows
    were left out by reason, and how many were cut. Only sums are kept: a shard is counted again when it is needed.
    """

    def __init__(self, starts: np.ndarray, count: Callable[[int], tuple[np.ndarray, dict[str, int], int]]):
        self._first, self._count, self._ends = starts, count, OrderedDict()
        self.left_out, self.cut, totals = Counter(), 0, [0]
        for number in range(len(starts) - 1):
            counts, left_out, cut = count(number)
            totals.append(int(counts.sum()))
            self.left_out.update(left_out)
            self.cut += cut
        self.starts = np.cumsum(totals)  # (shards + 1,)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row of every unit, and which of its row's units it is. (M,) each"""

        def read(number, at):
            ends = self._ends_of(number)
            row = np.searchsorted(ends, at, side="right")
            return np.stack([self._first[number] + row, at - np.where(row, ends[row - 1], 0)], 1)

        units = np.asarray(units, np.int64)
        if len(units) and not 0 <= units.min() <= units.max() < len(self):
            raise IndexError(f"units {units.min()} to {units.max()} of {len(self)}")
        return tuple(by_shard(self.starts, units, read, np.zeros((0, 2), np.int64)).T)

    def _ends_of(self, number: int) -> np.ndarray:
        if number not in self._ends:
            self._ends[number] = np.cumsum(self._count(number)[0])
            if len(self._ends) > 256:
                self._ends.popitem(last=False)
        return self._ends[number]


def sift(reasons: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, int]]:
    """Which rows no reason (N,) speaks against; and how many were left out for each, by the first that does."""
    kept, left_out = True, {}
    for reason, against in reasons.items():
        left_out[reason] = int((kept & against).sum())
        kept = kept & ~against
    return kept, left_out


def cut(prompt: np.ndarray, room: int, start: int) -> np.ndarray:
    """Which places of a prompt stay when there is room for so many: the last ones, behind the start token if it has one."""
    over = max(0, len(prompt) - room)
    places = np.arange(over, len(prompt))
    if over and prompt[0] == start and room > 1:
        places[0] = 0
    return places


def answered(data: Examples, answers: Sequence[int], room: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of these answers, each prompt in its room: tokens (R, T), lengths (R,), prompt lengths (R,)."""
    rows, lengths = [], []
    for (prompt, answer, _), n in zip(data.rows(answers), room):
        kept = prompt[cut(prompt, n, data.bos)]
        rows.append(np.concatenate([kept, answer]))
        lengths.append(len(kept))
    return *pad(rows, data.pad), torch.tensor(lengths)


@dataclass(frozen=True, eq=False)
class _Loader:
    data: Examples
    batch_size: int  # global: over all ranks
    seed: int
    rank: int = 0
    world: int = 1
    context: int = 1 << 30
    bucket: bool = True  # units of similar length share a batch
    sources: Sequence[str] = ()  # only of these; none = all

    what = "answers"  # of which a unit is a row or a part

    def __post_init__(self):
        if self.context < 2:
            raise ValueError(f"context {self.context} is too short: a prompt and an answer need at least 2 tokens")
        self.data.source_ids(self.sources)

    @cached_property
    def units(self) -> Units:
        return Units(self.data.starts[self.what], self.count)

    @cached_property
    def order(self) -> Order | MixedOrder:
        if not len(self):
            raise ValueError(f"{self.data} leaves nothing to visit: {self.summary}")
        lengths = self.alike if self.bucket else None
        if len(self.data.paths) == 1:
            return Order(len(self), self.batch_size, self.seed, lengths)
        ends = np.cumsum(np.bincount(self.parts, minlength=len(self.data.paths)))
        sizes = np.diff(self.units.starts[np.append(0, ends)])
        return MixedOrder(tuple(map(int, sizes)), self.data.weights, self.batch_size, self.seed, lengths)

    def alike(self, units: np.ndarray) -> np.ndarray:
        """Units that are near each other in this share a batch, (M,) -> (M,)."""
        return self.lengths(units)

    @property
    def parts(self) -> np.ndarray:
        """Which part of a mixture each shard of the units is of."""
        return self.data.part

    @property
    def total(self) -> int:
        return int(self.data.starts[self.what][-1])

    @property
    def summary(self) -> str:
        """One line: how many are visited, of how many; what was left out and why, and how many prompts are cut."""
        units, reasons = self.units, [f"{n:,} {reason}" for reason, n in self.units.left_out.items() if n]
        kept = self.total - sum(units.left_out.values())
        windows = f", in {len(units):,} windows" if len(units) != kept else ""
        out = f"; left out: {', '.join(reasons)}" if reasons else ""
        return f"{kept:,} of {self.total:,} {self.what}{windows}{out}" + (
            f"; {units.cut:,} prompts cut from the left to fit" if units.cut else ""
        )

    def __len__(self) -> int:
        return len(self.units)

    def batch(self, step: int):
        return self.take(shard(self.order.rows(step), self.rank, self.world))

    def heights(self, units: np.ndarray) -> np.ndarray:
        """Rows of each of these units, (M,)."""
        return np.ones(len(units), np.int64)

    def with_room(self, tokens: int | None) -> _Loader:
        """The loader; ValueError where a unit of it has more tokens than --micro_batch_tokens allows, None = any."""
        for units in in_order(len(self) if tokens else 0, 1 << 16):
            size = self.heights(units) * self.lengths(units)
            if (most := size.max()) > tokens:
                height = self.heights(units)[size.argmax()]
                what = "the longest row has" if height == 1 else f"{height} rows that belong together have"
                raise ValueError(f"--micro_batch_tokens={tokens}: {what} {most} tokens with padding; allow as many")
        return self

    def forwards(
        self, step: int, world: int, count: int | None, tokens: int | None, packed: bool = False
    ) -> list[Tensor]:
        """Which of a rank's units of a step share a forward: numbers of them, the same on every rank.

        `count` neighbours, or units of like length with at most `tokens` tokens, see `micro_batches`; neither: all.
        """
        units = self.order.rows(step)
        share = len(shard(units, 0, world))
        if tokens is None:
            return list(torch.arange(share).split(count or share))
        parts = micro_batches(self.lengths(units), tokens, world, packed, self.heights(units))
        return [torch.from_numpy(np.sort(part)) for part in parts]

    def _rows(self, number: int) -> np.ndarray:
        starts = self.data.starts[self.what]
        return np.arange(starts[number], starts[number + 1])

    def _elsewhere(self, prompts: np.ndarray) -> np.ndarray:
        """Which prompts are of other sources than asked for."""
        if not self.sources:
            return np.zeros(len(prompts), bool)
        return ~np.isin(self.data.source(prompts), self.data.source_ids(self.sources))

    def _answered(self, answers: np.ndarray, room: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        return answered(self.data, answers, room)


# --- texts ---


class TextBatch(NamedTuple):
    tokens: Tensor  # (B, T)
    lengths: Tensor  # (B,)
    mask: Tensor  # (B, T) bool, True on the tokens to predict
    rows: Tensor  # (B,) int64: the answer


class PackedBatch(NamedTuple):
    """Texts one after the other in a single row, as model/packed.py has them: a text attends to itself alone."""

    tokens: Tensor  # (1, N)
    positions: Tensor  # (1, N) of each token in its text
    mask: Tensor  # (1, N) bool, True on the tokens to predict, never on a text's first
    sizes: list[int]  # tokens of each text, N together


@dataclass(frozen=True, eq=False)
class TextLoader(_Loader):
    """Rows for next-token prediction: language models and supervised fine-tuning. No answer that people rejected is in it.

    Left out is an answer that loses a pair (p > 0.5), one with a lower score than another answer to its prompt, and in data
    whose scores are all 0 or 1 one with 0. loss: "answers" predicts what the assistant wrote (all its turns), "all" every
    token but a row's first. Plain texts (without prompt, behind their start token) that are longer than `context` are cut
    into windows that overlap by one token; of other rows the prompt is cut from the left (long_rows="left") or the row left
    out ("drop", or where the answer alone does not fit).
    """

    loss: Literal["answers", "all"] = "answers"
    long_rows: Literal["left", "drop"] = "left"

    def count(self, number: int) -> tuple[np.ndarray, dict[str, int], int]:
        answers = self._rows(number)
        prompts = self.data.prompt_of(answers)
        before, own = self.data.prompt_lengths(prompts), self.data.answer_lengths(answers)
        plain = before == 1
        long = ~plain & (before + own > self.context)
        kept, left_out = sift(
            {"of other sources": self._elsewhere(prompts)}
            | rejected(self.data, number)
            | {
                f"longer than the context of {self.context}": long
                & (own >= self.context if self.long_rows == "left" else True)
            }
        )
        windows = np.where(plain, np.maximum(1, -(-(before + own - 1) // (self.context - 1))), 1)
        return windows * kept, left_out, int((kept & long).sum())

    def lengths(self, units: np.ndarray) -> np.ndarray:
        """Tokens of these units, (M,) int64."""
        answers, nth = self.units.locate(units)
        return np.minimum(self.data.row_lengths(answers) - nth * (self.context - 1), self.context)

    def take(self, units: np.ndarray) -> TextBatch:
        answers, nth = self.units.locate(units)
        rows, masks = [], []
        for (prompt, own, history), n in zip(self.data.rows(answers), nth):
            row = np.concatenate([prompt, own])
            mask = np.ones(len(row), bool)
            if self.loss == "answers":
                mask[: len(prompt)] = False if history is None else history
            if len(prompt) == 1:  # a plain text
                first = n * (self.context - 1)
                row, mask = row[first : first + self.context], mask[first : first + self.context]
            elif len(row) > self.context:
                places = cut(prompt, self.context - len(own), self.data.bos)
                kept = np.append(places, np.arange(len(prompt), len(row)))
                row, mask = row[kept], mask[kept]
            mask[0] = False  # nothing stands before it
            rows.append(row)
            masks.append(mask)
        tokens, lengths = pad(rows, self.data.pad)
        mask, _ = pad(masks, 0)
        return TextBatch(tokens, lengths, mask.bool(), torch.from_numpy(answers))

    def packed(self, step: int) -> PackedBatch:
        """This rank's share of a step, packed; `bucket` has no use then."""
        return pack(self.batch(step))


def pack(batch: TextBatch) -> PackedBatch:
    t = torch.arange(batch.tokens.shape[1])
    real = t < batch.lengths[:, None]
    rows = (x[real][None] for x in (batch.tokens, t.expand_as(batch.tokens), batch.mask))
    return PackedBatch(*rows, batch.lengths.tolist())


def rejected(data: Examples, number: int) -> dict[str, np.ndarray]:
    """Which answers of a shard people rejected, by how it is known: (answers,) bool each."""
    first, end = data.starts["answers"][number : number + 2]
    answers = np.arange(first, end)
    pairs = data.pair(np.arange(*data.starts["pairs"][number : number + 2]))
    lost = np.zeros(len(answers), bool)
    lost[pairs.loser[pairs.p > 0.5] - first] = True
    if not data.has("score"):
        return {"lost a pair": lost}
    score = data.column("score", answers)
    prompts = data.prompt_of(answers) - data.starts["prompts"][number]
    best = np.full(prompts.max(initial=-1) + 1, -np.inf)
    np.fmax.at(best, prompts, score)
    return {
        "lost a pair": lost,
        "below the best score of their prompt": score < best[prompts],
        "labelled 0": (score == 0) & data.labels[data.part[number]],
    }


# --- scores and pairs ---


class ScoredBatch(NamedTuple):
    tokens: Tensor  # (B, T)
    lengths: Tensor  # (B,)
    prompt_lengths: Tensor  # (B,)
    scores: Tensor  # (B,) float32
    rows: Tensor  # (B,) int64: the answer


@dataclass(frozen=True, eq=False)
class ScoredLoader(_Loader):
    """Answers with a score, or with a number in another column. Left out is an answer that alone does not fit the context."""

    column: str = "score"

    def count(self, number: int) -> tuple[np.ndarray, dict[str, int], int]:
        answers = self._rows(number)
        prompts, own = self.data.prompt_of(answers), self.data.answer_lengths(answers)
        kept, left_out = sift(
            {
                "of other sources": self._elsewhere(prompts),
                f"without {self.column}": np.isnan(self.data.column(self.column, answers)),
                f"longer than the context of {self.context}": own >= self.context,
            }
        )
        long = self.data.prompt_lengths(prompts) + own > self.context
        return kept.astype(np.int64), left_out, int((kept & long).sum())

    def lengths(self, units: np.ndarray) -> np.ndarray:
        """Tokens of these units, (M,) int64."""
        return np.minimum(self.data.row_lengths(self.units.locate(units)[0]), self.context)

    def take(self, units: np.ndarray) -> ScoredBatch:
        answers, _ = self.units.locate(units)
        scores = torch.from_numpy(self.data.column(self.column, answers).astype(np.float32))
        rows = self._answered(answers, self.context - self.data.answer_lengths(answers))
        return ScoredBatch(*rows, scores, torch.from_numpy(answers))


class PairBatch(NamedTuple):
    """Rows 2 i and 2 i + 1 are the winner and the loser of pair i, behind the same prompt."""

    tokens: Tensor  # (2 B, T)
    lengths: Tensor  # (2 B,)
    prompt_lengths: Tensor  # (2 B,)
    scores: Tensor  # (B, 2) float32, NaN where there are none
    p: Tensor  # (B,) float32: probability that a rater prefers the winner
    gap: Tensor  # (B,) float32, in points
    weight: Tensor  # (B,) float32
    rows: Tensor  # (B,) int64: the pair


@dataclass(frozen=True, eq=False)
class PairLoader(_Loader):
    """Pairs of answers, of the data or `made` of scores (data.pairs.made_pairs). Too long, the prompt of both is cut alike.

    Left out is a pair of which an answer alone does not fit the context, and one whose sides would be the same tokens.
    """

    made: Pairs | None = None
    column: str = "score"  # what `scores` are

    what = "pairs"

    def _pairs(self, pairs: np.ndarray) -> Pairs:
        return self.data.pair(pairs) if self.made is None else Pairs(*(column[pairs] for column in self.made))

    @cached_property
    def units(self) -> Units:
        return Units(self.data.starts["pairs"] if self.made is None else self._made_starts, self.count)

    @cached_property
    def _made_starts(self) -> np.ndarray:
        """(parts + 1,): made pairs have no shards, but are of one part of a mixture after the other."""
        ends = np.cumsum(np.bincount(self.data.part, minlength=len(self.data.paths)))  # shards
        return np.append(0, np.searchsorted(np.maximum.accumulate(self.made.winner), self.data.starts["answers"][ends]))

    @property
    def parts(self) -> np.ndarray:
        return self.data.part if self.made is None else np.arange(len(self.data.paths))

    @property
    def total(self) -> int:
        return self.data.pairs if self.made is None else len(self.made.winner)

    def count(self, number: int) -> tuple[np.ndarray, dict[str, int], int]:
        pairs = np.arange(*(self.data.starts["pairs"] if self.made is None else self._made_starts)[number : number + 2])
        sides = self._pairs(pairs)[:2]
        prompts = [self.data.prompt_of(side) for side in sides]
        before = [self.data.prompt_lengths(p) for p in prompts]
        own = [self.data.answer_lengths(side) for side in sides]
        room = self.context - np.maximum(*own)
        long = np.maximum(*before) > room
        # one prompt before two answers that differ leaves them different; two prompts may have differed in what is cut
        same = np.zeros(len(pairs), bool)
        for i in np.flatnonzero(long & (room > 0) & (prompts[0] != prompts[1]) & (own[0] == own[1])):
            tokens, lengths, _ = self._answered(np.array([side[i] for side in sides]), [room[i]] * 2)
            same[i] = torch.equal(*tokens) and lengths[0] == lengths[1]
        kept, left_out = sift(
            {
                "of other sources": self._elsewhere(prompts[0]) | self._elsewhere(prompts[1]),
                f"with an answer longer than the context of {self.context}": room <= 0,
                "alike in what fits the context": same,
            }
        )
        return kept.astype(np.int64), left_out, int((kept & long).sum())

    def lengths(self, units: np.ndarray) -> np.ndarray:
        """Tokens of the longer side of these units, (M,) int64."""
        winner, loser = self._pairs(self.units.locate(units)[0])[:2]
        return np.minimum(np.maximum(self.data.row_lengths(winner), self.data.row_lengths(loser)), self.context)

    def heights(self, units: np.ndarray) -> np.ndarray:
        return np.full(len(units), 2)

    def weights(self, units: np.ndarray) -> Tensor:
        """Weights of these units, (M,): no answer is read."""
        return torch.from_numpy(self._pairs(self.units.locate(units)[0]).weight.astype(np.float32))

    def take(self, units: np.ndarray) -> PairBatch:
        rows, _ = self.units.locate(units)
        pairs = self._pairs(rows)
        sides = np.stack(pairs[:2], 1)  # (B, 2)
        longest = self.data.answer_lengths(sides.ravel()).reshape(-1, 2).max(1)
        answered = self._answered(sides.ravel(), np.repeat(self.context - longest, 2))
        has = self.data.has(self.column)
        scores = self.data.column(self.column, sides.ravel()) if has else np.full(sides.size, np.nan)
        facts = (scores.reshape(-1, 2), pairs.p, pairs.gap, pairs.weight)
        return PairBatch(*answered, *(torch.from_numpy(x.astype(np.float32)) for x in facts), torch.from_numpy(rows))


class GroupBatch(NamedTuple):
    """All answers of some prompts, those of a prompt behind one another: R rows, M pairs among them."""

    tokens: Tensor  # (R, T)
    lengths: Tensor  # (R,)
    prompt_lengths: Tensor  # (R,)
    group: Tensor  # (R,) int64: which prompt of the batch
    scores: Tensor  # (R,) float32, NaN where there are none
    winner: Tensor  # (M,) int64: a row of this batch
    loser: Tensor  # (M,)
    p: Tensor  # (M,) float32: probability that a rater prefers the winner
    gap: Tensor  # (M,) float32, in points
    weight: Tensor  # (M,) float32
    rows: Tensor  # (R,) int64: the answer


@dataclass(frozen=True, eq=False)
class GroupLoader(_Loader):
    """Prompts with all their answers, scores and pairs, so that each answer is read once however many pairs it is in.

    A unit is a prompt; left out is one whose answers nobody judged, and one of which an answer does not fit the context.
    """

    what = "prompts"

    def count(self, number: int) -> tuple[np.ndarray, dict[str, int], int]:
        prompts = self._rows(number)
        answers, pairs = self.data.answers_of(prompts), self.data.pairs_of(prompts)
        judged = np.diff(pairs)[:, 0] > 0
        if self.data.has("score"):
            score = self.data.column("score", np.arange(*self.data.starts["answers"][number : number + 2]))
            judged |= np.diff(self._sums(~np.isnan(score), answers))[:, 0] > 0
        longest = self._longest(prompts)
        kept, left_out = sift(
            {
                "of other sources": self._elsewhere(prompts),
                "without a judged answer": ~judged,
                f"with an answer longer than the context of {self.context}": longest >= self.context,
            }
        )
        long = self.data.prompt_lengths(prompts) + longest > self.context
        return kept.astype(np.int64), left_out, int((kept & long).sum())

    def tokens(self) -> tuple[int, int]:
        """Tokens of all units with the prompt once, and with the prompt before every answer."""
        prompts, _ = self.units.locate(np.arange(len(self)))
        ranges, longest = self.data.answers_of(prompts), self._longest(prompts)
        before = np.minimum(self.data.prompt_lengths(prompts), self.context - longest)
        own = int(self.data.answer_lengths(flat(ranges)).sum())
        return own + int(before.sum()), own + int((before * np.diff(ranges)[:, 0]).sum())

    def _sums(self, values: np.ndarray, ranges: np.ndarray) -> np.ndarray:
        """Of a shard's values: sums up to the beginning and the end of each range, (N, 2)."""
        return np.append(0, np.cumsum(values))[ranges - (ranges[0, 0] if len(ranges) else 0)]

    def _longest(self, prompts: np.ndarray) -> np.ndarray:
        """Tokens of the longest answer to each prompt, 0 without one. (N,)"""
        ranges = self.data.answers_of(prompts)
        counts = np.diff(ranges)[:, 0]
        lengths = self.data.answer_lengths(flat(ranges))
        longest = np.zeros(len(prompts), np.int64)
        np.maximum.at(longest, np.repeat(np.arange(len(prompts)), counts), lengths)
        return longest

    def lengths(self, units: np.ndarray) -> np.ndarray:
        """Tokens of the longest row of these units, (M,) int64."""
        prompts, _ = self.units.locate(units)
        return np.minimum(self.data.prompt_lengths(prompts) + self._longest(prompts), self.context)

    def heights(self, units: np.ndarray) -> np.ndarray:
        return np.diff(self.data.answers_of(self.units.locate(units)[0]))[:, 0]

    def take(self, units: np.ndarray) -> GroupBatch:
        prompts, _ = self.units.locate(units)
        ranges, pair_ranges = self.data.answers_of(prompts), self.data.pairs_of(prompts)
        answers, counts = flat(ranges), np.diff(ranges)[:, 0]
        group = np.repeat(np.arange(len(prompts)), counts)
        room = self.context - self._longest(prompts)
        pairs = self.data.pair(flat(pair_ranges))
        shift = np.repeat(np.cumsum(counts) - counts - ranges[:, 0], np.diff(pair_ranges)[:, 0])  # answer -> row
        scores = self.data.column("score", answers) if self.data.has("score") else np.full(len(answers), np.nan)
        return GroupBatch(
            *self._answered(answers, room[group]),
            torch.from_numpy(group),
            torch.from_numpy(scores.astype(np.float32)),
            torch.from_numpy(pairs.winner + shift),
            torch.from_numpy(pairs.loser + shift),
            *(torch.from_numpy(x.astype(np.float32)) for x in pairs[2:]),
            torch.from_numpy(answers),
        )


# --- prompts ---


class PromptBatch(NamedTuple):
    prompts: Tensor  # (B, P)
    prompt_lengths: Tensor  # (B,)
    rows: Tensor  # (B,) int64: which prompt this is, for its randomness and for looking it up


LENGTH_CLASS = 16  # tokens; prompts of one class share a batch


@dataclass(frozen=True, eq=False)
class PromptLoader(_Loader):
    """Prompts of any length up to `max_prompt` (none = what leaves room for the response); answers do not matter.

    Longer ones are left out (long_prompts="drop") or cut from the left. ValueError before the first batch where a prompt
    of that length and a response do not fit the context.
    """

    response_tokens: int = 0
    max_prompt: int | None = None
    long_prompts: Literal["drop", "left"] = "drop"

    what = "prompts"

    def __post_init__(self):
        super().__post_init__()
        room = self.context - self.response_tokens
        if room < 1:
            raise ValueError(
                f"a response of {self.response_tokens} tokens leaves no room for a prompt in a context of {self.context}; "
                f"use at most {self.context - 1}"
            )
        if self.max_prompt is not None and not 1 <= self.max_prompt <= room:
            raise ValueError(
                f"a prompt of {self.max_prompt} tokens and a response of {self.response_tokens} do not fit a context of "
                f"{self.context}: use prompts of 1 to {room} tokens, or shorter responses"
            )

    @property
    def limit(self) -> int:
        """The longest a prompt may be, in tokens."""
        return self.context - self.response_tokens if self.max_prompt is None else self.max_prompt

    def count(self, number: int) -> tuple[np.ndarray, dict[str, int], int]:
        prompts = self._rows(number)
        lengths = self.data.prompt_lengths(prompts)
        long = lengths > self.limit
        kept, left_out = sift(
            {
                "of other sources": self._elsewhere(prompts),
                "empty": lengths < 2,
                f"longer than {self.limit} tokens": long & (self.long_prompts == "drop"),
            }
        )
        return kept.astype(np.int64), left_out, int((kept & long).sum())

    def lengths(self, units: np.ndarray) -> np.ndarray:
        """Tokens of these prompts, (M,) int64."""
        return np.minimum(self.data.prompt_lengths(self.units.locate(units)[0]), self.limit)

    def alike(self, units: np.ndarray) -> np.ndarray:
        """Within a class of lengths prompts stand in any order: sorted to the token, a batch would be all easy or all hard."""
        return self.lengths(units) // LENGTH_CLASS

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt that is visited."""
        return max((int(self.lengths(units).max()) for units in in_order(len(self), 1 << 16)), default=0)

    def width(self, step: int) -> int:
        """Columns of a step: the longest prompt of its global batch and a response, the same on every rank."""
        return int(self.lengths(self.order.rows(step)).max()) + self.response_tokens

    def take(self, units: np.ndarray) -> PromptBatch:
        prompts, _ = self.units.locate(units)
        rows = map(self.data.prompt, prompts)
        tokens, lengths = pad([row[cut(row, self.limit, self.data.bos)] for row in rows], self.data.pad)
        return PromptBatch(tokens, lengths, torch.from_numpy(prompts))

    def records(self, rows: Tensor | Sequence[int]) -> list[Record]:
        """What was read for these rows of a batch: messages, and the extra columns that a reward asks for."""
        return [self.data.record(int(row)) for row in rows]


@dataclass(frozen=True, eq=False)
class StartLoader(PromptLoader):
    """For texts, which have no prompts: the first `starts` tokens of every one that is longer, behind its start token."""

    starts: int = 4

    what = "answers"

    def __post_init__(self):
        super().__post_init__()
        if (needed := 1 + self.starts + self.response_tokens) > self.context:
            raise ValueError(
                f"prompts of {self.starts} tokens, the start token and a response of {self.response_tokens} are {needed}, more "
                f"than the context of {self.context}: use shorter ones"
            )

    def count(self, number: int) -> tuple[np.ndarray, dict[str, int], int]:
        rows = self._rows(number)
        kept, left_out = sift(
            {
                "of other sources": self._elsewhere(self.data.prompt_of(rows)),
                f"not longer than {self.starts} tokens": self.data.row_lengths(rows) - 2 <= self.starts,
            }
        )
        return kept.astype(np.int64), left_out, 0

    def lengths(self, units: np.ndarray) -> np.ndarray:
        return np.full(len(units), 1 + self.starts)

    def take(self, units: np.ndarray) -> PromptBatch:
        rows, _ = self.units.locate(units)
        tokens, lengths = pad([self.data.row(int(i))[: 1 + self.starts] for i in rows], self.data.pad)
        return PromptBatch(tokens, lengths, torch.from_numpy(rows))

    def records(self, rows: Tensor | Sequence[int]) -> list[Record]:
        return [self.data.record(int(i)) for i in self.data.prompt_of(np.asarray(rows, np.int64))]


def prompts_of(data: Examples, batch: int, seed: int, starts: int | None = None, **how) -> PromptLoader:
    """The prompts of the data; or with `starts`, and where there are none (4 then), the beginnings of its texts."""
    if starts is None and bool((data.prompt_lengths() > 1).any()):
        return PromptLoader(data, batch, seed, **how)
    unused = {"max_prompt", "long_prompts"}
    return StartLoader(data, batch, seed, **{k: v for k, v in how.items() if k not in unused}, starts=starts or 4)


def unseen(held_out: PromptLoader, training: PromptLoader | None = None) -> np.ndarray:
    """The units of one loader with different prompts that are none of the other's: short ones often stand in both splits.

    ValueError if there is none.
    """

    def first_units(loader: PromptLoader) -> dict[bytes, int]:
        found = {}
        for units in in_order(len(loader), 1024):
            prompts, lengths, _ = loader.take(units)
            for unit, row, n in zip(units.tolist(), prompts, lengths.tolist()):
                found.setdefault(row[:n].numpy().tobytes(), unit)
        return found

    seen = first_units(training).keys() if training else ()
    units = [unit for key, unit in first_units(held_out).items() if key not in seen]
    if not units:
        raise ValueError(f"all {len(held_out)} prompts of {held_out.data} stand in {training.data} too")
    return np.array(units)


def drawn(loader: PromptLoader, units: np.ndarray, count: int, seed: int, turn: int = 0) -> PromptBatch:
    """`count` of these units, at most all of them, in an order of `seed`; the next ones at the next turn."""
    return loader.take(units[Order(len(units), min(count, len(units)), seed).rows(turn)])
