"""Agreement statistics against scikit-learn's and statsmodels' numbers, and against their definitions written slowly."""

import json
import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.feedback.raters import (
    VERDICTS,
    Judgement,
    cohen_kappa,
    describe,
    fleiss_kappa,
    pairwise_agreement,
    position_bias,
    self_consistency,
)

labels = st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("xyz")), min_size=1, max_size=12)
tables = st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=8)


def test_golden(golden_dir):
    golden = json.loads((golden_dir / "inter_rater.json").read_text())
    ratings = np.array(golden["inputs"]["ratings(10 items x 3 raters)"])
    expected = golden["outputs"]
    counts = np.stack([(ratings == 0).sum(1), (ratings == 1).sum(1)], 1)
    assert cohen_kappa(ratings[:, 0], ratings[:, 1]) == pytest.approx(expected["cohen_kappa(r0,r1)"], abs=1e-12)
    assert cohen_kappa(ratings[:, 0], ratings[:, 2]) == pytest.approx(expected["cohen_kappa(r0,r2)"], abs=1e-12)
    assert fleiss_kappa(counts) == pytest.approx(expected["fleiss_kappa"], abs=1e-12)
    assert pairwise_agreement(counts) == pytest.approx(expected["raw pairwise agreement"], abs=1e-12)


@given(labels)
def test_cohen_by_hand(pairs):
    one, two = zip(*pairs)
    n = len(pairs)
    observed = Fraction(sum(a == b for a, b in pairs), n)
    chance = sum(Fraction(one.count(c), n) * Fraction(two.count(c), n) for c in "xyz")
    ours = cohen_kappa(one, two)
    if chance == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(float((observed - chance) / (1 - chance)), abs=1e-12)
        assert ours == cohen_kappa(two, one)


@given(tables)
def test_fleiss_by_hand(rows):
    """Every rater's label written out, every two of them compared."""
    items = [[k for k, n in enumerate(row) for _ in range(n)] for row in rows]
    items = [item for item in items if len(item) > 1]
    counts = np.array(rows)
    if not items:
        assert math.isnan(pairwise_agreement(counts)) and math.isnan(fleiss_kappa(counts))
        return
    agree = [[a == b for a, b in combinations(item, 2)] for item in items]
    observed = sum(Fraction(sum(x), len(x)) for x in agree) / len(agree)
    everything = [label for item in items for label in item]
    chance = sum(Fraction(everything.count(k), len(everything)) ** 2 for k in range(3))
    assert pairwise_agreement(counts) == pytest.approx(float(observed), abs=1e-12)
    if chance == 1:
        assert math.isnan(fleiss_kappa(counts))
    else:
        assert fleiss_kappa(counts) == pytest.approx(float((observed - chance) / (1 - chance)), abs=1e-12)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 labels against 1"):
        cohen_kappa("ab", "a")


def test_a_rater_who_always_presses_left():
    """All of it shows: the share of left is 1, and no swapped repetition has the same verdict."""
    votes = [Judgement(i, "ana", i % 2 == 0, "left", 1.0, False) for i in range(20)]
    votes += [Judgement(i, "ana", i % 2 == 1, "left", 1.0, True) for i in range(10)]
    bias, consistency = position_bias(votes), self_consistency(votes)
    assert bias["share"] == 1 and bias["low"] > 0.5 and bias["n"] == 30
    assert consistency["share"] == 0 and consistency["n"] == 10


@given(st.data())
def test_swapping_all_sides_changes_only_the_position(data):
    """a and b keep their verdicts, so agreement stays; the share of left becomes its complement."""
    votes = []
    for pair in range(data.draw(st.integers(1, 5))):
        for rater in "uvw":
            for repeat in (False, True):
                choice = data.draw(st.sampled_from(["left", "right", "tie", "both_bad", "skip"]))
                votes.append(Judgement(pair, rater, data.draw(st.booleans()), choice, 2.0, repeat))
    other = {"left": "right", "right": "left"}
    swapped = [v._replace(a_left=not v.a_left, choice=other.get(v.choice, v.choice)) for v in votes]
    ours, theirs = describe(votes), describe(swapped)
    for name in ("agreement", "fleiss_kappa", "cohen_kappa", "self_consistency", "pairs", "votes", "median_seconds"):
        assert ours[name] == theirs[name]
    if ours["left"]["n"]:
        assert ours["left"]["share"] == pytest.approx(1 - theirs["left"]["share"])
    assert json.loads(json.dumps(ours, allow_nan=False)) == ours
    assert {v.verdict for v in votes} <= {*VERDICTS, "skip"}


def test_nothing_yet():
    empty = describe([])
    assert empty["votes"] == empty["raters"] == 0 and empty["agreement"] is None and empty["left"]["share"] is None
