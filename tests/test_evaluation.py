"""Best-of-n against all subsets, its KL against published numbers and against an exact one, intervals, ties, n-grams;
rank correlation and ROC by their definitions, weights as repetitions, intervals of pairs that share sentences.
"""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.evaluation import (
    auc,
    best_of_n,
    best_of_n_kl,
    cluster_bootstrap,
    correlation,
    paired_bootstrap,
    partial_spearman,
    ranks,
    roc,
    spearman,
    win_rate,
)
from rlhf.ppo import distinct_n

RNG = np.random.default_rng


def brute_force(proxy, other, n: int) -> float:
    """The mean over all subsets of n of what the judge says about the proxy's favourite; the later one wins a tie."""
    subsets = list(itertools.combinations(range(len(proxy)), n))
    return sum(other[max(subset, key=lambda i: (proxy[i], i))] for subset in subsets) / len(subsets)


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(0, 2**20), st.booleans())
def test_best_of_n_is_the_mean_over_all_subsets(pool, seed, ties):
    rng = RNG(seed)
    proxy = rng.integers(0, 3, (2, pool)).astype(float) if ties else rng.normal(size=(2, pool))
    other = rng.normal(size=(2, pool))
    for n in range(1, pool + 1):
        expected = [brute_force(p, o, n) for p, o in zip(proxy, other)]
        np.testing.assert_allclose(best_of_n(proxy, other, n), expected, rtol=1e-12, atol=1e-12)


def test_best_of_n_at_its_ends():
    rng = RNG(0)
    proxy, other = rng.normal(size=(5, 8)), rng.normal(size=(5, 8))
    np.testing.assert_allclose(best_of_n(proxy, other, 1), other.mean(1))
    np.testing.assert_allclose(best_of_n(proxy, other, 8), other[np.arange(5), proxy.argmax(1)])
    best = [best_of_n(proxy, proxy, n) for n in range(1, 9)]
    assert all((b >= a).all() for a, b in itertools.pairwise(best))  # the proxy always gains by more choice
    order = rng.permutation(8)
    np.testing.assert_allclose(best_of_n(proxy[:, order], other[:, order], 3), best_of_n(proxy, other, 3))


@pytest.mark.parametrize("n, expected", [(2, 0.564), (4, 1.029), (8, 1.424), (16, 1.766)])
def test_best_of_n_of_a_normal_score(n, expected):
    """E[max of n] of N(0, 1), from pools of 32: one pool serves every n."""
    scores = RNG(1).normal(size=(20_000, 32))
    assert best_of_n(scores, scores, n).mean() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("n", [0, 5, -1])
def test_best_of_n_needs_enough_samples(n):
    with pytest.raises(ValueError, match=f"best of {n} needs between 1 and 4 samples per prompt"):
        best_of_n(np.zeros((2, 4)), np.zeros((2, 4)), n)


@pytest.mark.parametrize("n, expected", [(1, 0), (2, 0.193), (4, 0.636), (8, 1.204), (16, 1.835), (64, 3.175)])
def test_best_of_n_kl_as_published(n, expected):
    assert best_of_n_kl(n) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_best_of_n_kl_bounds_the_exact_one(n):
    """m equally likely answers without ties: the k-th best is chosen with probability (k^n - (k-1)^n) / m^n."""
    gaps = []
    for m in (10, 100, 1000):
        p = np.array([(k / m) ** n - ((k - 1) / m) ** n for k in range(1, m + 1)])
        gaps.append(best_of_n_kl(n) - float(np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300) * m), 0))))
    assert gaps[0] > gaps[1] > gaps[2] > 0 and gaps[2] < 0.01  # an upper bound, and tight for many answers


def test_win_rate_halves_ties():
    ours, theirs = np.array([1.0, 2.0, 3.0, 0.0]), np.array([1.0, 3.0, 2.0, 0.0])
    assert win_rate(ours, theirs).tolist() == [0.5, 0, 1, 0.5]
    np.testing.assert_array_equal(win_rate(ours, theirs) + win_rate(theirs, ours), 1)


def test_bootstrap_interval_of_a_normal_mean():
    """Near mean +- 1.96 s / sqrt(n); the same numbers every time; shifting and scaling go through."""
    x = RNG(2).normal(0.3, 2.0, size=400)
    low, high = paired_bootstrap(x, resamples=4000)
    half = 1.96 * x.std() / 20
    assert low == pytest.approx(x.mean() - half, abs=0.1 * half) and high == pytest.approx(
        x.mean() + half, abs=0.1 * half
    )
    assert (low, high) == paired_bootstrap(x, resamples=4000)
    assert (low, high) != paired_bootstrap(x, resamples=4000, seed=1)
    np.testing.assert_allclose(paired_bootstrap(3 * x - 1, resamples=4000), (3 * low - 1, 3 * high - 1))
    assert paired_bootstrap(np.full(10, 0.25), resamples=50) == (0.25, 0.25)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng, inside = RNG(3), 0
    for trial in range(200):
        low, high = paired_bootstrap(rng.normal(size=60), resamples=200, seed=trial)
        inside += low <= 0 <= high
    assert 0.88 < inside / 200 < 0.99


@st.composite
def tied(draw, columns: int):
    """(N, columns) of few different values, and whole weights of which some are 0."""
    n = draw(st.integers(3, 12))
    rng = RNG(draw(st.integers(0, 2**20)))
    return rng.integers(0, draw(st.integers(1, 6)), (n, columns)).astype(float), rng.integers(0, 4, n)


@given(tied(1))
def test_ranks_by_the_definition(x):
    values, weights = x[0][:, 0], x[1]
    expected = [sum(w * ((y < v) + 0.5 * (y == v)) for y, w in zip(values, weights)) for v in values]
    assert ranks(values, weights).tolist() == expected


@settings(max_examples=60)
@given(tied(3))
def test_a_weight_is_a_repetition(x):
    """And AUC is the share of all pairs of a positive and a negative that are in order."""
    (a, b, c), weights = x[0].T, x[1]
    repeated = np.repeat(np.arange(len(a)), weights)
    labels = b > 1
    for weighted, plain in (
        (
            (spearman(a, b, weights), spearman(a[repeated], b[repeated]) if len(repeated) else math.nan),
            (auc(a, labels, weights), auc(a[repeated], labels[repeated])),
            (partial_spearman(a, b, c, weights), partial_spearman(*(y[repeated] for y in (a, b, c)))),
        )
        if weights.sum()
        else ()
    ):
        assert weighted == pytest.approx(plain, abs=1e-9, nan_ok=True)
    order = [(p > n) + 0.5 * (p == n) for p in a[labels] for n in a[~labels]]
    assert auc(a, labels) == pytest.approx(np.mean(order) if order else math.nan, nan_ok=True)
    if order:
        false, true = roc(a, labels)
        area = float(np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2))
        assert area == pytest.approx(auc(a, labels)) and (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)


def test_against_scipy(golden_dir):
    golden = json.loads((golden_dir / "correlations.json").read_text())
    a, b = (np.array(golden["inputs"][name]) for name in "ab")
    assert correlation(a, b) == pytest.approx(golden["outputs"]["pearson"], abs=1e-12)
    assert spearman(a, b) == pytest.approx(golden["outputs"]["spearman"], abs=1e-12)


def test_rank_correlation_sees_order_alone():
    rng = RNG(5)
    a = rng.normal(size=50)
    assert spearman(a, np.exp(a)) == pytest.approx(1) and spearman(a, -(a**3)) == pytest.approx(-1)
    assert math.isnan(spearman(a, np.ones(50)))
    given = rng.normal(size=4000)
    x, y = given + rng.normal(size=4000), given + rng.normal(size=4000)
    assert spearman(x, y) > 0.4 and abs(partial_spearman(x, y, given)) < 0.05  # only `given` connects them


def test_pairs_that_share_sentences_are_fewer_than_they_look():
    """200 pairs of 20 sentences: drawn by sentence, the interval of the mean covers the truth; drawn by pair, it does not."""
    rng, inside = RNG(6), {"sentence": 0, "pair": 0}
    for trial in range(30):
        effect = rng.normal(size=20)
        pairs = np.stack([rng.permutation(20)[:2] for _ in range(200)])
        x = effect[pairs].sum(1)  # mean 0 over sentences
        for unit, clusters in (("sentence", pairs), ("pair", np.arange(200)[:, None])):
            ((low, high),) = cluster_bootstrap(lambda w, x=x: w @ x / w.sum(), clusters, 100, trial)
            inside[unit] += low <= 0 <= high
    assert inside["sentence"] >= 26 and inside["pair"] <= 18


def test_without_shared_things_it_is_the_bootstrap():
    x = RNG(7).normal(0.3, 2.0, size=400)
    (low, high), (count, _) = cluster_bootstrap(lambda w: np.array([w @ x / 400, w.sum()]), np.arange(400)[:, None])
    assert count == 400 and (low, high) == pytest.approx(paired_bootstrap(x), abs=0.03)
    assert np.isnan(cluster_bootstrap(lambda w: math.nan, np.arange(4)[:, None], 10)).all()
    interval = cluster_bootstrap(lambda w: np.array([math.nan, 1.0]), np.arange(4)[:, None], 10)
    assert np.isnan(interval[0]).all() and interval[1].tolist() == [1, 1]


def test_pairing_by_prompt_is_what_makes_the_interval_narrow():
    """Hard prompts are hard for both systems: their differences vary less than their scores."""
    rng = RNG(4)
    difficulty = rng.normal(0, 3, 200)
    ours, theirs = difficulty + 0.2 + rng.normal(0, 0.1, 200), difficulty + rng.normal(0, 0.1, 200)
    low, high = paired_bootstrap(ours - theirs, resamples=2000)
    assert 0.15 < low < 0.2 < high < 0.25


def test_distinct_n():
    assert distinct_n([[1, 2, 3], [1, 2]], 1) == 3 / 5
    assert distinct_n([[1, 2, 3], [1, 2]], 2) == 2 / 3  # (1, 2) twice, (2, 3); none across rows
    assert distinct_n([[1, 1, 1, 1]], 2) == 1 / 3
    assert distinct_n([[1], []], 2) == 0 and distinct_n([], 1) == 0


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=4), st.integers(1, 3))
def test_distinct_n_by_the_definition(rows, n):
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row)) if i + n <= len(row)]
    expected = sum(1 for i, gram in enumerate(grams) if gram not in grams[:i]) / len(grams) if grams else 0
    assert distinct_n(rows, n) == expected
