"""Best-of-n against all subsets, its KL against published numbers and against an exact one, intervals, ties, n-grams;
rank correlation and ROC by their definitions, weights as repetitions, intervals of pairs that share sentences; logistic
regression against torch's optimiser, Bradley-Terry against the textbook's iteration, calibration by its definition.
"""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.ppo.update import distinct_n
from rlhf.statistics import (
    auc,
    best_of_n,
    best_of_n_kl,
    bootstrap_weights,
    bradley_terry,
    cluster_bootstrap,
    correlation,
    length_controlled_win_rate,
    logistic_regression,
    pair_calibration,
    paired_bootstrap,
    partial_spearman,
    prediction_interval,
    ranks,
    roc,
    spearman,
    student_quantile,
    win_rate,
)

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


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9, 0.975, 0.9999])
def test_student_against_closed_forms_and_tables(p):
    """df = 1, 2 and 4 have quantiles in closed form; the others are from Student's table."""
    q, a = 2 * p - 1, 4 * p * (1 - p)
    fourth = math.sqrt(4 * (math.cos(math.acos(math.sqrt(a)) / 3) / math.sqrt(a) - 1))
    for df, expected in ((1, math.tan(math.pi * q / 2)), (2, q * math.sqrt(2 / a)), (4, fourth)):
        assert student_quantile(p, df) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for df, expected in ((3, 3.182446), (10, 2.228139), (30, 2.042272), (1000, 1.962339)):
        assert student_quantile(0.975, df) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("n", [2, 5])
def test_a_prediction_interval_holds_as_often_as_it_says(n):
    x = RNG(8).normal(3, 2, (4000, n + 1))
    seen = x[:, :n]
    low, high = prediction_interval(seen.mean(1), seen.std(1, ddof=1), n, n - 1, 0.9)
    assert ((low < x[:, n]) & (x[:, n] < high)).mean() == pytest.approx(0.9, abs=0.02)


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


def distinct(rows: list[list[int]], n: int) -> float:
    ids = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    return distinct_n(ids, torch.tensor([len(row) for row in rows], dtype=torch.int64), n)


def test_distinct_n():
    assert distinct([[1, 2, 3], [1, 2]], 1) == 3 / 5
    assert distinct([[1, 2, 3], [1, 2]], 2) == 2 / 3  # (1, 2) twice, (2, 3); none across rows
    assert distinct([[1, 1, 1, 1]], 2) == 1 / 3
    assert distinct([[1], []], 2) == 0 and distinct([], 1) == 0


@given(st.lists(st.lists(st.integers(0, 3) | st.just(10**9), max_size=6), max_size=4), st.integers(1, 4))
def test_distinct_n_by_the_definition(rows, n):
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row)) if i + n <= len(row)]
    expected = sum(1 for i, gram in enumerate(grams) if gram not in grams[:i]) / len(grams) if grams else 0
    assert distinct(rows, n) == expected


def by_lbfgs(x, y, w, penalty: float) -> np.ndarray:
    """Logistic regression by an optimiser that knows nothing of it."""
    x, y, w = (torch.tensor(a, dtype=torch.float64) for a in (x, y, w))
    b = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [b], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(x @ b, y, reduction="none")
        loss = (w * losses).sum() + penalty * (b @ b) / 2
        loss.backward()
        return loss

    optimiser.step(closure)
    return b.detach().numpy()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**20), st.sampled_from([0.01, 1.0]))
def test_logistic_regression_finds_the_maximum(n, seed, penalty):
    """Also where the labels are separated, all the same, or without weight."""
    rng = RNG(seed)
    x, y, w = rng.normal(size=(n, 2)) * 3, rng.integers(0, 3, n) / 2, rng.integers(0, 3, (3, n)).astype(float)
    found = logistic_regression(x, y, w, penalty)
    for b, weights in zip(found, w):
        np.testing.assert_allclose(b, by_lbfgs(x, y, weights, penalty), rtol=1e-4, atol=1e-4)
    w[0, 0] += 1
    rows = np.repeat(np.arange(n), w[0].astype(int))  # a weight is a repetition
    repeated = logistic_regression(x[rows], y[rows], np.ones((1, len(rows))), penalty)
    np.testing.assert_allclose(repeated, logistic_regression(x, y, w[:1], penalty), atol=1e-8)


def test_separated_labels_have_no_maximum():
    with pytest.raises(ValueError, match="2 labels have no best logistic regression on 1 columns; use a penalty"):
        logistic_regression(np.array([[1.0], [2.0]]), np.ones(2), np.ones((1, 2)))


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(0, 2**20))
def test_length_controlled_win_rate_has_two_sides(n, seed):
    """The other side's is one minus it; the unit of length means nothing; equal lengths leave the win rate alone."""
    rng = RNG(seed)
    wins, longer = rng.integers(0, 3, n) / 2, rng.integers(-9, 10, n).astype(float)
    weights = bootstrap_weights(n, 5, seed)
    ours = length_controlled_win_rate(wins, longer, weights)
    np.testing.assert_allclose(length_controlled_win_rate(1 - wins, -longer, weights), 1 - ours, atol=1e-9)
    np.testing.assert_allclose(length_controlled_win_rate(wins, 4 * longer, weights), ours, atol=1e-9)
    order = rng.permutation(n)
    np.testing.assert_allclose(
        length_controlled_win_rate(wins[order], longer[order], weights[:, order]), ours, atol=1e-9
    )
    equal = length_controlled_win_rate(wins, np.zeros(n), np.ones((1, n)))
    if 0.1 < wins.mean() < 0.9:
        assert equal[0] == pytest.approx(wins.mean(), abs=0.02 / n + 1e-3)


def test_length_control_finds_the_rate_that_the_data_were_drawn_with():
    """A judge that pays for length, and a model that writes more: the plain win rate says 0.7, the truth is 0.5."""
    rng = RNG(9)
    longer = rng.normal(8, 10, 20_000)
    scaled = np.tanh(longer / np.sqrt(np.mean(longer**2)))
    for theta in (0.0, 0.8):
        wins = (rng.random(20_000) < 1 / (1 + np.exp(-theta - 2 * scaled))).astype(float)
        (found,) = length_controlled_win_rate(wins, longer, np.ones((1, 20_000)))
        assert found == pytest.approx(1 / (1 + math.exp(-theta)), abs=0.02) and wins.mean() > found + 0.1


def zermelo(first, second, wins, games: float, players: int) -> np.ndarray:
    """The fixed point pi_i = W_i / sum_j n_ij / (pi_i + pi_j) (Hunter 2004, eq. 3), with one tie more in every pairing."""
    pi = np.ones(players)
    for _ in range(20_000):
        won, met = np.zeros(players), np.zeros(players)
        for i, j, w in zip(first, second, wins):
            won[i] += w + 0.5
            won[j] += games - w + 0.5
            for player in (i, j):
                met[player] += (games + 1) / (pi[i] + pi[j])
        before, pi = pi, won / met
        pi /= pi[0]
        if np.abs(np.log(pi / before)).max() < 1e-13:
            break
    return np.log(pi)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 4), st.integers(1, 30), st.integers(0, 2**20))
def test_bradley_terry_is_the_textbooks_fixed_point(players, games, seed):
    first, second = np.array([*itertools.combinations(range(players), 2)]).T
    wins = RNG(seed).integers(0, 2 * games + 1, (2, len(first))) / 2
    found = bradley_terry(first, second, wins, games)
    for s, w in zip(found, wins):
        np.testing.assert_allclose(s, zermelo(first, second, w, games, players), atol=1e-7)
    np.testing.assert_allclose(bradley_terry(second, first, games - wins, games), found, atol=1e-9)


def test_bradley_terry_of_two_is_the_log_odds():
    (s,) = bradley_terry(np.array([1]), np.array([0]), np.array([[99.5]]), 110)
    assert s.tolist() == [0, pytest.approx(math.log(100 / 11))]


def test_bootstrap_weights():
    weights = bootstrap_weights(7, 2000)
    assert weights.shape == (2001, 7) and (weights[0] == 1).all() and (weights.sum(1) == 7).all()
    assert weights[1:].mean() == 1 and weights[1:].var() == pytest.approx(6 / 7, abs=0.05)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**20), st.sampled_from([0.5, 1.0, 3.0]))
def test_calibration_of_pairs_by_the_definition(n, seed, temperature):
    margins = RNG(seed).integers(-4, 5, n) * 0.7
    found = pair_calibration(margins, temperature, np.arange(n)[:, None], bins=5, resamples=30)
    sure = 1 / (1 + np.exp(-np.abs(margins) / temperature))
    right = np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0))
    assert found["brier"][0] == pytest.approx(np.mean((sure - right) ** 2))
    ece = 0.0
    for b in range(5):
        inside = [i for i in range(n) if b / 5 <= sure[i] < (b + 1) / 5 or b == 4 and sure[i] == 1]
        if inside:
            assert found["observed"][b, 0] == pytest.approx(right[inside].mean())
            ece += abs(sure[inside].mean() - right[inside].mean()) * len(inside) / n
        else:
            assert np.isnan(found["observed"][b, 0])
    assert found["ece"][0] == pytest.approx(ece)
    assert found["ece"][1] <= found["ece"][0] and found["brier"][1] <= found["brier"][2]
    scaled = pair_calibration(3 * margins, 3 * temperature, np.arange(n)[:, None], bins=5, resamples=30)
    np.testing.assert_allclose(scaled["ece"], found["ece"], atol=1e-9)  # only the ratio of both means anything
