"""How far people can be trusted as a measuring instrument: agreement, self-consistency, position bias, speed."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import NamedTuple

import numpy as np

VERDICTS = ("a", "b", "tie", "both_bad")  # the nominal categories of every kappa; a skip is no verdict


class Judgement(NamedTuple):
    """One vote that counts. The sides are where a and b stood; the verdict is about a and b wherever they stood."""

    pair: int
    rater: str
    a_left: bool
    choice: str  # left, right, tie, both_bad, skip: as shown
    seconds: float | None
    repeat: bool  # an earlier pair of this rater again, swapped

    @property
    def verdict(self) -> str:
        """a, b, tie, both_bad or skip."""
        return {"left": "ab"[not self.a_left], "right": "ab"[self.a_left]}.get(self.choice, self.choice)


def cohen_kappa(one: Sequence, two: Sequence) -> float:
    """(p_o - p_e) / (1 - p_e): agreement of two raters beyond chance (Cohen 1960). one (N,), two (N,) nominal labels.

    NaN where both always give the same one label, or N is 0: then chance explains everything. ValueError if N differs.
    """
    if len(one) != len(two):
        raise ValueError(f"{len(one)} labels against {len(two)}: both raters must have judged the same items")
    if len(one) == 0:
        return math.nan
    observed = sum(a == b for a, b in zip(one, two)) / len(one)
    first, second = Counter(one), Counter(two)
    chance = sum(first[label] * second[label] for label in first) / len(one) ** 2
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


def pairwise_agreement(counts: np.ndarray) -> float:
    """How often two raters of an item agree: mean over items of sum_k n_k (n_k - 1) / (n (n - 1)).

    counts (N, K): how many raters put item i into category k. Items with fewer than two raters say nothing; NaN if no
    item has two.
    """
    raters = counts.sum(1)
    counts, raters = counts[raters > 1].astype(float), raters[raters > 1]
    per_item = ((counts**2).sum(1) - raters) / (raters * (raters - 1))
    return float(per_item.mean()) if len(counts) else math.nan


def fleiss_kappa(counts: np.ndarray) -> float:
    """(P - P_e) / (1 - P_e): agreement of many raters beyond chance (Fleiss 1971). counts (N, K), as above.

    P is `pairwise_agreement`, P_e = sum_k p_k^2 with p_k the share of all labels that are k. The number of raters may
    differ between items (the paper's is constant); those with fewer than two are left out. NaN where P_e = 1.
    """
    counts = counts[counts.sum(1) > 1]
    if len(counts) == 0:
        return math.nan
    shares = counts.sum(0) / counts.sum()
    chance = float((shares**2).sum())
    return (pairwise_agreement(counts) - chance) / (1 - chance) if chance < 1 else math.nan


def table(judgements: Sequence[Judgement]) -> np.ndarray:
    """Verdicts per pair, (pairs, 4) in the order of VERDICTS: first votes alone, no repetitions and no skips."""
    rows: dict[int, Counter] = {}
    for j in judgements:
        if not j.repeat and j.verdict in VERDICTS:
            rows.setdefault(j.pair, Counter())[j.verdict] += 1
    return np.array([[row[verdict] for verdict in VERDICTS] for row in rows.values()], np.int64).reshape(-1, 4)


def rate(part: int, whole: int) -> dict:
    """A share with its 95% interval (Wilson), for JSON: null where there is nothing to count."""
    from rlhf.calibration import wilson_interval  # brings torch, and seconds; who only votes needs neither

    if not whole:
        return {"n": 0, "share": None, "low": None, "high": None}
    low, high = wilson_interval(part, whole)
    return {"n": whole, "share": part / whole, "low": low, "high": high}


def position_bias(judgements: Sequence[Judgement]) -> dict:
    """Share of left among the votes for a side; the sides are drawn evenly, so an unbiased rater's is one half."""
    sides = [j.choice for j in judgements if j.choice in ("left", "right")]
    return rate(sides.count("left"), len(sides))


def self_consistency(judgements: Sequence[Judgement]) -> dict:
    """Share of swapped repetitions with the same verdict as the first time; pairs skipped at either time are left out."""
    first = {(j.pair, j.rater): j.verdict for j in judgements if not j.repeat and j.verdict != "skip"}
    again = [j for j in judgements if j.repeat and j.verdict != "skip" and (j.pair, j.rater) in first]
    return rate(sum(first[j.pair, j.rater] == j.verdict for j in again), len(again))


def describe(judgements: Sequence[Judgement]) -> dict:
    """All statistics as one JSON object: overall, `by_rater`, and Cohen's kappa of every two raters with common pairs.

    Agreement is of verdicts on first votes; what is undefined is null.
    """
    counts = table(judgements)
    by_rater = {name: [j for j in judgements if j.rater == name] for name in sorted({j.rater for j in judgements})}
    first = {
        name: {j.pair: j.verdict for j in js if not j.repeat and j.verdict in VERDICTS} for name, js in by_rater.items()
    }
    cohen = []
    for one, two in combinations(first, 2):
        if common := sorted(first[one].keys() & first[two].keys()):
            kappa = cohen_kappa([first[one][p] for p in common], [first[two][p] for p in common])
            cohen.append({"raters": [one, two], "pairs": len(common), "kappa": _or_none(kappa)})
    return {
        **_one(judgements),
        "raters": len(by_rater),
        "pairs": len(counts),
        "pairs_with_two_raters": int((counts.sum(1) > 1).sum()),
        "agreement": _or_none(pairwise_agreement(counts)),
        "fleiss_kappa": _or_none(fleiss_kappa(counts)),
        "cohen_kappa": cohen,
        "by_rater": {name: _one(js) for name, js in by_rater.items()},
    }


def _one(judgements: Sequence[Judgement]) -> dict:
    seconds = [j.seconds for j in judgements if j.seconds is not None]
    return {
        "votes": len(judgements),
        "choices": dict(Counter(j.choice for j in judgements).most_common()),
        "left": position_bias(judgements),
        "self_consistency": self_consistency(judgements),
        "median_seconds": median(seconds) if seconds else None,
    }


def _or_none(x: float) -> float | None:
    return None if math.isnan(x) else x
