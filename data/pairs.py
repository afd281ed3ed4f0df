"""Which two answers are compared: pairs drawn by rating, how likely a rater prefers one, and some rows of a file with pairs."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from data.examples import Examples, Pairs, flat
from data.records import prompt_text


def make_pairs(ratings: np.ndarray, domains: np.ndarray, count: int, seed: int) -> dict[str, np.ndarray]:
    """Up to `count` different pairs: a row at random, another of its domain at random, and their ratings differ.

    So a domain's share of the pairs is its share of the rows. (Uniform over all pairs it would be the square of that.)
    ratings (N,), domains (N,) -> pair_chosen (M,) int32, pair_rejected (M,) int32, pair_gap (M,) float32 > 0, in points
    """
    by_domain = np.argsort(domains, kind="stable")
    place = np.argsort(by_domain)  # row i is by_domain[place[i]]
    sizes = np.bincount(domains, minlength=1)
    starts = np.cumsum(sizes) - sizes
    rng = np.random.default_rng(seed)
    a = rng.integers(max(1, len(domains)), size=2 * count if len(domains) else 0)  # twice: ties, repetitions fall out
    a = a[sizes[domains[a]] > 1]
    start, size = starts[domains[a]], sizes[domains[a]]
    b = by_domain[start + (place[a] - start + rng.integers(1, size)) % size]  # 1 ... size - 1 places further: never a
    _, first = np.unique(np.minimum(a, b) * len(domains) + np.maximum(a, b), return_index=True)
    pairs = np.stack([a, b], axis=1)[np.sort(first)].astype(np.int32)
    gap = ratings[pairs[:, 0]] - ratings[pairs[:, 1]]
    pairs, gap = pairs[gap != 0][:count], gap[gap != 0][:count]
    pairs[gap < 0] = pairs[gap < 0, ::-1]
    return {"pair_chosen": pairs[:, 0], "pair_rejected": pairs[:, 1], "pair_gap": np.abs(gap).astype(np.float32)}


def thurstone(a: np.ndarray, b: np.ndarray, spread_a: np.ndarray | float, spread_b: np.ndarray | float) -> np.ndarray:
    """How likely a rater puts the first text above the second, from mean ratings and deviations of single raters. (B,)

    Phi((a - b) / sqrt(spread_a^2 + spread_b^2)): Thurstone 1927, "A law of comparative judgment", case III. Where all
    raters agree (spread 0) it is certain.
    """
    spread = np.hypot(np.float64(spread_a), np.float64(spread_b))
    return torch.special.ndtr(torch.from_numpy((np.float64(a) - b) / np.maximum(spread, 1e-6))).numpy()


def spread_rows(file, count: int | None, seed: int) -> np.ndarray:
    """At most `count` rows at random (None: all), every domain with its share; fewer are the beginning of more. (count,)"""
    return spread(file.column("domain"), count, seed)


def spread(domain: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """At most `count` rows at random (None: all), every domain with its share; fewer are the beginning of more. (count,)"""
    order = np.random.default_rng(seed).permutation(len(domain))
    place = np.zeros(len(domain))  # each row's quantile among the rows of its domain
    for d in np.unique(domain):
        rows = order[domain[order] == d]
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.argsort(place, kind="stable")[:count]


class SomeRows:
    """Some rows of a token file, numbered from 0, for `data.baselines`; pairs among them are drawn as data.prepare does.

    Of the file's own pairs hardly any has both texts among a few rows: 8,000 pairs of 2,345 rows leave 360 to 500 rows.
    ValueError for a file of preferences: its ratings compare the two answers of a pair, and no others.
    """

    def __init__(self, file, rows: np.ndarray, pairs_per_row: int = 10):
        if file.has_single_pairs:
            raise ValueError(
                f"{file.path} holds preferences: {len(rows)} of its {len(file)} rows cannot be paired anew; use all "
                "(train_rm.py --eval_sentences=none, evaluate.py rm without --sentences)"
            )
        self.file, self.rows = file, rows
        count = min(pairs_per_row * len(rows), len(file.column("pair_gap")))
        self._pairs = make_pairs(self.column("rating"), self.column("domain"), count, seed=0)
        self.texts = [file.texts[i] for i in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> np.ndarray:
        return self.file.lengths()[self.rows]

    def has(self, *names: str) -> bool:
        return self.file.has(*names)

    def column(self, name: str) -> np.ndarray:
        return self._pairs[name] if name.startswith("pair_") else self.file.column(name)[self.rows]


# --- of prepared data (data/examples.py) ---


def made_pairs(data: Examples, count: int, seed: int = 0, column: str = "score", deviation: str | None = None) -> Pairs:
    """Up to `count` pairs of answers of one source whose scores differ, see `make_pairs`, for data that bring scores alone.

    They compare answers to different prompts, which only scores of the whole text allow. deviation: the column of single
    raters' standard deviations, for p by `thurstone`; without one p is 1. Of a mixture, the pairs of one part after the other.
    """
    score = data.column(column).astype(np.float32)
    source = data.source(data.prompt_of())
    found = []
    ends = np.cumsum(np.bincount(data.part, minlength=len(data.paths)))  # shards
    for first, end in zip(data.starts["answers"][np.append(0, ends[:-1])], data.starts["answers"][ends]):
        rows = first + np.flatnonzero(~np.isnan(score[first:end]))
        share = round(count * (end - first) / max(1, data.answers))
        pairs = make_pairs(score[rows], source[rows], share, seed)
        sides = [rows[pairs[f"pair_{side}"]] for side in ("chosen", "rejected")]
        spreads = [data.column(deviation, side) for side in sides] if deviation else (0.0, 0.0)
        p = thurstone(*(score[side] for side in sides), *spreads)
        found.append(Pairs(*sides, p, pairs["pair_gap"].astype(np.float64), np.ones(len(p))))
    return Pairs(*map(np.concatenate, zip(*found)))


class SomeAnswers:
    """Some answers of prepared data, numbered from 0, with their texts, ratings and the pairs among them: what the baselines
    and the report card read.

    prompts: whose answers, e.g. `spread(data.source(), 500, seed=1)`; None = all. The pairs are those of the data, or where
    it has scores alone, at most `most_pairs` that are made of the scores. A rating is the score, or where there is none
    half the gap of the answer's pairs, above or below 0: points within a prompt, not between prompts. column: another
    column instead of the score, e.g. half of the raters; pairs are then made of it.
    """

    def __init__(
        self, data: Examples, prompts: np.ndarray | None = None, most_pairs: int = 8000, column: str = "score"
    ):
        self.data, self.made = data, not data.pairs or column != "score"
        self.answers = flat(data.answers_of(prompts))
        self.domains = data.sources
        if self.made:
            rating = data.column(column, self.answers).astype(np.float32)
            self.answers, rating = self.answers[~np.isnan(rating)], rating[~np.isnan(rating)]
            self._columns = {"rating": rating} | make_pairs(rating, self.column("domain"), most_pairs, seed=0)
            return
        pairs = data.pair(flat(data.pairs_of(prompts)))
        place = np.zeros(data.answers, np.int64)
        place[self.answers] = np.arange(len(self))
        chosen, rejected = place[pairs.winner], place[pairs.loser]
        self._columns = {"pair_chosen": chosen, "pair_rejected": rejected, "pair_gap": pairs.gap.astype(np.float32)}
        if data.has("score"):
            self._columns["rating"] = data.column("score", self.answers).astype(np.float32)
        else:
            times = np.bincount(np.append(chosen, rejected), minlength=len(self))
            sums = np.bincount(chosen, pairs.gap, len(self)) - np.bincount(rejected, pairs.gap, len(self))
            self._columns["rating"] = (sums / np.maximum(times, 1) / 2).astype(np.float32)

    def __len__(self) -> int:
        return len(self.answers)

    @cached_property
    def texts(self) -> list[str]:
        """The answers; behind their prompts where pairs compare answers to different ones."""
        prompts = self.data.prompt_of(self.answers)
        first = self.data.answers_of(prompts)[:, 0]
        texts, last = [], -1
        for prompt, nth in zip(prompts, self.answers - first):
            if prompt != last:  # the answers of a prompt stand together
                record, last = self.data.record(prompt), prompt
            texts.append((prompt_text(record.prompt) if self.made else "") + record.answers[nth])
        return texts

    def lengths(self) -> np.ndarray:
        return self.data.row_lengths(self.answers)  # (rows,), prompts included

    def has(self, *names: str) -> bool:
        return all(name in self._columns or self.data.has(name) for name in names)

    def column(self, name: str) -> np.ndarray:
        """Per answer rating, domain (which of `domains`) or an extra column; per pair pair_chosen, pair_rejected, pair_gap."""
        if name == "domain":
            return self.data.source(self.data.prompt_of(self.answers))
        return self._columns[name] if name in self._columns else self.data.column(name, self.answers)
