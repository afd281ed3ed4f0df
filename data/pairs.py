"""Which two answers are compared: pairs drawn by rating, how likely a rater prefers one, and the answers of some prompts."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from data.examples import Examples, Pairs, flat
from data.records import prompt_text

MOST_PAIRS, MOST_TRAINING_PAIRS = 8_000, 40_000  # that are made of scores, of a split
PAIRS_PER_ANSWER = 10  # at most, so that a few answers are not compared again and again


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


def spread(domain: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """At most `count` rows at random (None: all), every domain with its share; fewer are the beginning of more. (count,)"""
    order = np.random.default_rng(seed).permutation(len(domain))
    place = np.zeros(len(domain))  # each row's quantile among the rows of its domain
    for d in np.unique(domain):
        rows = order[domain[order] == d]
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.argsort(place, kind="stable")[:count]


# --- of prepared data (data/examples.py) ---


def some_prompts(data: Examples, count: int | None, seed: int) -> np.ndarray | None:
    """At most `count` prompts at random, every source with its share; None for all of them, in their own order."""
    return None if count is None or count >= data.prompts else spread(data.source(), count, seed)


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

    prompts: whose answers, e.g. `some_prompts(data, 500, seed=1)`; None = all. The pairs are those of the data, or where it
    has scores alone, such as are made of the scores: at most `most_pairs`, and 10 for every answer. A rating is the score,
    or where there is none half the gap of the answer's pairs, above or below 0: points within a prompt, not between
    prompts. column: another column instead of the score, e.g. half of the raters; pairs are then made of it. context:
    leave out the answers that alone do not fit it, with their pairs; `left_out` counts them.
    """

    def __init__(
        self,
        data: Examples,
        prompts: np.ndarray | None = None,
        most_pairs: int = MOST_PAIRS,
        column: str = "score",
        context: int | None = None,
    ):
        self.data, self.column_name = data, column
        self.made = bool(data.answers) and not data.pairs or column != "score"  # an empty split has neither
        answers = flat(data.answers_of(prompts))
        self.answers = answers if context is None else answers[data.answer_lengths(answers) < context]
        self.left_out = len(answers) - len(self.answers)
        self.domains = data.sources
        if self.made:
            rating = data.column(column, self.answers).astype(np.float32)
            self.answers, rating = self.answers[~np.isnan(rating)], rating[~np.isnan(rating)]
            count = min(most_pairs, PAIRS_PER_ANSWER * len(self))
            self._columns = {"rating": rating} | make_pairs(rating, self.column("domain"), count, seed=0)
            self._columns |= {name: np.ones(self.pairs, np.float32) for name in ("pair_p", "pair_weight")}
            return
        pairs = data.pair(flat(data.pairs_of(prompts)))
        place = np.full(data.answers, -1, np.int64)
        place[self.answers] = np.arange(len(self))
        chosen, rejected = place[pairs.winner], place[pairs.loser]
        there = (chosen >= 0) & (rejected >= 0)
        chosen, rejected, gap = chosen[there], rejected[there], pairs.gap[there]
        facts = {"gap": gap, "p": pairs.p[there], "weight": pairs.weight[there]}
        self._columns = {f"pair_{name}": x.astype(np.float32) for name, x in facts.items()}
        self._columns |= {"pair_chosen": chosen, "pair_rejected": rejected}
        if data.has("score"):
            self._columns["rating"] = data.column("score", self.answers).astype(np.float32)
        else:
            times = np.bincount(np.append(chosen, rejected), minlength=len(self))
            sums = np.bincount(chosen, gap, len(self)) - np.bincount(rejected, gap, len(self))
            self._columns["rating"] = (sums / np.maximum(times, 1) / 2).astype(np.float32)

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def pairs(self) -> int:
        return len(self._columns["pair_gap"])

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

    def answer_lengths(self) -> np.ndarray:
        return self.data.answer_lengths(self.answers)  # (rows,)

    def has(self, *names: str) -> bool:
        return all(name in self._columns or self.data.has(name) for name in names)

    def column(self, name: str) -> np.ndarray:
        """Per answer rating, domain (which of `domains`) or an extra column; per pair pair_chosen, pair_rejected,
        pair_gap, pair_p, pair_weight.
        """
        if name == "domain":
            return self.data.source(self.data.prompt_of(self.answers))
        return self._columns[name] if name in self._columns else self.data.column(name, self.answers)
