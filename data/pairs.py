"""Which two answers are compared: pairs drawn by rating, how likely a rater prefers one, and some rows of a file with pairs."""

from __future__ import annotations

import numpy as np
import torch

from data.tokens import TokenFile


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


def spread_rows(file: TokenFile, count: int | None, seed: int) -> np.ndarray:
    """At most `count` rows at random (None: all), every domain with its share; fewer are the beginning of more. (count,)"""
    domain, order = file.column("domain"), np.random.default_rng(seed).permutation(len(file))
    place = np.zeros(len(file))  # each row's quantile among the rows of its domain
    for d in np.unique(domain):
        rows = order[domain[order] == d]
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.argsort(place, kind="stable")[:count]


class SomeRows:
    """Some rows of a token file, numbered from 0, for `data.baselines`; pairs among them are drawn as data.prepare does.

    Of the file's own pairs hardly any has both texts among a few rows: 8,000 pairs of 2,345 rows leave 360 to 500 rows.
    ValueError for a file of preferences: its ratings compare the two answers of a pair, and no others.
    """

    def __init__(self, file: TokenFile, rows: np.ndarray, pairs_per_row: int = 10):
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
