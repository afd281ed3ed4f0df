"""Best-of-n against all subsets, its KL against published numbers and against an exact one, intervals, ties, n-grams."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.evaluation import best_of_n, best_of_n_kl, paired_bootstrap, win_rate
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
