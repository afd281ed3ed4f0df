"""Statistics of a comparison: intervals, rank correlation, ROC, win rates, best-of-n with its analytic KL."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from rlhf.calibration import binned_error, brier_score, reliability_bins


class Estimate(NamedTuple):
    """A number and its 95% interval; NaN where there is nothing to count. f"{x}" is 0.412 [0.380, 0.455]."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __format__(self, form: str) -> str:
        form = form or ".3f"
        if math.isnan(self.value):
            return "-"
        return f"{self.value:{form}}" + ("" if math.isnan(self.low) else f" [{self.low:{form}}, {self.high:{form}}]")


def paired_bootstrap(difference: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `difference` (N,), one entry per prompt (Efron 1979)."""
    rng = np.random.default_rng(seed)
    n = len(difference)
    at_once = max(1, 2**20 // n)  # resamples, to bound memory
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    means = [difference[rng.integers(0, n, (size, n))].mean(1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


@functools.cache
def student_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p, 0.5 <= p < 1, for T of Student's distribution with df >= 1 degrees of freedom (Gosset 1908).

    T = sqrt(df) tan(theta), and theta has a density in proportion to cos(theta)^(df - 1) on (-pi/2, pi/2).
    """
    theta = np.linspace(0, math.pi / 2, 2**14 + 1)
    density = np.cos(theta[:-1] + theta[1] / 2) ** (df - 1)  # in the middle of every step
    below = np.concatenate([[0.0], np.cumsum(density)]) / density.sum()
    return math.sqrt(df) * math.tan(np.interp(2 * p - 1, below, theta))


def prediction_interval(
    mean: np.ndarray, deviation: np.ndarray, n: int, df: float, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where one more observation falls with probability `level`, after n of the mean, from a normal distribution:

        mean -+ t sqrt(1 + 1/n) deviation,  t the (1 + level) / 2 quantile of Student's distribution with df degrees of freedom

    (Student's prediction interval; df = n - 1 where the deviation is that of the n). Any shape -> its low and high ends.
    """
    half = student_quantile((1 + level) / 2, df) * math.sqrt(1 + 1 / n) * deviation
    return mean - half, mean + half


def cluster_bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], clusters: np.ndarray, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """95% percentile intervals of statistic(weights (N,)) -> (S,) where observations share what was sampled: (S, 2).

    clusters (N, K) >= 0: the numbers of the K things that observation i rests on (both sentences of a pair, or one prompt).
    They are drawn with replacement, and observation i weighs the product of their counts (the pigeonhole bootstrap, Owen
    2007, arXiv:0712.1111). Pairs that share sentences are no independent sample: drawn alone, their interval is too narrow.
    A statistic that is NaN in some resamples (an empty group) gets the interval of the others.
    """
    rng = np.random.default_rng(seed)
    sampled, index = np.unique(clusters, return_inverse=True)
    index = index.reshape(clusters.shape)  # (N, K)
    values = []
    for _ in range(resamples):
        counts = np.bincount(rng.integers(0, len(sampled), len(sampled)), minlength=len(sampled))
        values.append(np.atleast_1d(statistic(counts[index].prod(1).astype(float))))
    values = np.array(values)  # (R, S)
    known = ~np.isnan(values).all(0)
    interval = np.full((values.shape[1], 2), np.nan)
    if known.any():
        interval[known] = np.nanquantile(values[:, known], [0.025, 0.975], axis=0).T
    return interval


def pair_calibration(
    margins: np.ndarray, temperature: float, clusters: np.ndarray, bins: int = 10, resamples: int = 1000
) -> dict[str, np.ndarray]:
    """Can sigmoid(|margin| / temperature), how sure a reward is of the side that it prefers, be believed?

    margins (N,): score of the better text minus that of the other, so that the reward is right above 0, and half right at
    0. -> {"ece": (3,), "brier": (3,), "observed": (bins, 3)}: value, low and high end of its 95% interval by
    `cluster_bootstrap`; observed, the share that is right, is NaN in an empty bin. In the form of arXiv:1706.04599.
    Resampling adds noise, which an ECE counts as error: its interval leans upwards, and is made to reach down to the value.
    """
    m = torch.from_numpy(np.asarray(margins, np.float64))
    probs, right = torch.sigmoid(m.abs() / temperature), (m > 0).double() + 0.5 * (m == 0)

    def measures(w: np.ndarray) -> np.ndarray:
        weights = torch.from_numpy(w)
        found = reliability_bins(probs, right, bins, weights)
        observed = torch.where(found.count > 0, found.observed, torch.nan)
        return torch.stack([binned_error(found), brier_score(probs, right, weights), *observed]).numpy()

    values, intervals = measures(np.ones(len(m))), cluster_bootstrap(measures, clusters, resamples)
    intervals[0, 0] = min(intervals[0, 0], values[0])
    found = np.concatenate([values[:, None], intervals], 1)  # (2 + bins, 3)
    return {"ece": found[0], "brier": found[1], "observed": found[2:]}


def ranks(x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """How much weight lies below each value, plus half of what lies on it: (N,) -> (N,). Without weights, rank - 1/2."""
    _, group = np.unique(x, return_inverse=True)
    weight = np.bincount(group, weights)  # (values,)
    return (np.cumsum(weight) - weight / 2)[group]


def correlation(a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Pearson's: (N,), (N,) -> -1 ... 1; NaN where one of them does not vary."""
    w = np.ones(len(a)) if weights is None else weights
    a, b = a - np.average(a, weights=w), b - np.average(b, weights=w)
    size = math.sqrt(float(w @ a**2) * float(w @ b**2))
    return float(w @ (a * b)) / size if size > 0 else math.nan


def spearman(a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Spearman's rank correlation, ties with their average rank: (N,), (N,) -> -1 ... 1."""
    return correlation(ranks(a, weights), ranks(b, weights), weights)


def partial_spearman(a: np.ndarray, b: np.ndarray, given: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Rank correlation of a and b at equal `given`: (r_ab - r_ag r_bg) / sqrt((1 - r_ag^2)(1 - r_bg^2)). (N,) x 3."""
    ab, ag, bg = (spearman(x, y, weights) for x, y in ((a, b), (a, given), (b, given)))
    rest = (1 - ag**2) * (1 - bg**2)
    return (ab - ag * bg) / math.sqrt(rest) if rest > 0 else math.nan


def auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """P(a positive scores higher than a negative), ties one half: the area under the ROC curve (Mann & Whitney 1947).

    scores (N,), labels (N,) bool, weights (N,) -> 0 ... 1; NaN where one class is missing.
    """
    w = np.ones(len(scores)) if weights is None else weights
    positive, negative = float(w @ labels), float(w @ ~labels)
    if not (positive > 0 and negative > 0):
        return math.nan
    below = float((w * labels) @ ranks(scores, w)) - positive**2 / 2  # without the positives below each other
    return below / (positive * negative)


def roc(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ROC curve: false and true positive rate for every threshold, highest first, from (0, 0) to (1, 1)."""
    values, group = np.unique(-scores, return_inverse=True)
    counts = (np.bincount(group, which, minlength=len(values)) for which in (~labels, labels))
    return tuple(np.concatenate([[0.0], np.cumsum(n) / max(n.sum(), 1)]) for n in counts)


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Per prompt 1 where ours scores higher, 0 where lower, one half for a tie: (N,), (N,) -> (N,)."""
    return (ours > theirs) + 0.5 * (ours == theirs)


def bootstrap_weights(n: int, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each of n prompts is drawn, for all resamples at once; the first row is the sample itself. (1 + B, n)"""
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)
    return np.concatenate([np.ones((1, n)), drawn])


def logistic_regression(x: np.ndarray, y: np.ndarray, weights: np.ndarray, penalty: float = 0.0) -> np.ndarray:
    """The b that maximises sum_n w_n [y_n log p_n + (1 - y_n) log(1 - p_n)] - penalty |b|^2 / 2, p_n = sigmoid(x_n b).

    x (N, D), labels y in [0, 1] (N,) or (B, N), weights (B, N) >= 0 -> (B, D). Newton's steps, each shortened by
    log(1 + d) / d, d = max_n |x_n step|, which converges from anywhere (Sun & Tran-Dinh 2019, arXiv:1703.04599, for a
    generalised self-concordant loss with nu = 2). ValueError where there is no maximum: labels that x separates need a penalty.
    """
    b = np.zeros((len(weights), x.shape[1]))
    for _ in range(200):
        p = 0.5 * (1 + np.tanh(b @ x.T / 2))  # (B, N); no overflow
        slope = (weights * (y - p)) @ x - penalty * b
        curvature = np.einsum("bn,ni,nj->bij", weights * p * (1 - p), x, x) + penalty * np.eye(x.shape[1])
        try:
            step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        except np.linalg.LinAlgError:
            break
        d = np.abs(step @ x.T).max(1, keepdims=True)  # (B, 1)
        b += step * np.where(d > 0, np.log1p(d) / np.where(d > 0, d, 1), 1)
        if d.max() < 1e-9:
            return b
    raise ValueError(f"{len(x)} labels have no best logistic regression on {x.shape[1]} columns; use a penalty")


def length_controlled_win_rate(wins: np.ndarray, difference: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The win rate of one model against another if both wrote equally long: wins (N,) in {0, 1/2, 1}, see `win_rate`;
    difference (N,) of the lengths, ours minus theirs; weights (B, N) -> (B,).

    sigmoid(theta) of the logistic regression P(win) = sigmoid(theta + phi tanh(difference / deviation)), deviation about 0
    over the N prompts (Dubois et al. 2024, arXiv:2404.04475, eq. 2). Theirs has a third term, how hard each prompt is,
    estimated over many models; here there is one pair, so it is left out. The weak prior N(0, 10^2) on theta and phi keeps
    them finite where every prompt is won, or where length alone decides.
    """
    deviation = math.sqrt(float(np.mean(difference**2))) or 1.0  # all equally long: nothing to control
    x = np.stack([np.ones(len(wins)), np.tanh(difference / deviation)], 1)
    theta = logistic_regression(x, wins, weights, penalty=0.01)[:, 0]
    return 0.5 * (1 + np.tanh(theta / 2))


ELO = 400 / math.log(10)  # points per nat of log-odds: 400 points more are ten wins to one


def bradley_terry(first: np.ndarray, second: np.ndarray, wins: np.ndarray, games: float) -> np.ndarray:
    """Strengths s with P(i beats j) = sigmoid(s_i - s_j), s_0 = 0, by maximum likelihood (Bradley & Terry 1952).

    wins (B, E): how many of its `games` player first[e] won against second[e], (E,) each; ties count half. -> (B, players)
    One tie is added to every pairing, so that whoever always wins stays finite. Every player must be linked to player 0.
    """
    x = np.zeros((len(first), 1 + max(first.max(), second.max())))
    x[np.arange(len(first)), first] += 1
    x[np.arange(len(first)), second] -= 1
    share = (wins + 0.5) / (games + 1)
    strengths = logistic_regression(x[:, 1:], share, np.full(share.shape, games + 1.0))
    return np.concatenate([np.zeros((len(strengths), 1)), strengths], 1)


def best_of_n_kl(n: int) -> float:
    """log n - (n-1)/n nats: upper bound of KL(best-of-n || base) (Beirami et al. 2024, arXiv:2401.01879, theorem 1)."""
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: np.ndarray, other: np.ndarray, n: int) -> np.ndarray:
    """Expected `other` of the sample that `proxy` likes best among n of the N given: (P, N), (P, N) -> (P,).

    The unbiased estimator sum_{i=n..N} C(i-1, n-1) / C(N, n) * other_(i), samples sorted by proxy (Nakano et al. 2021,
    arXiv:2112.09332, appendix I); every subset of n counts once, so one pool serves every n <= N.
    """
    pool = proxy.shape[1]
    if not 1 <= n <= pool:
        raise ValueError(f"best of {n} needs between 1 and {pool} samples per prompt: draw at least {n}")
    weights = np.array([math.comb(i - 1, n - 1) / math.comb(pool, n) for i in range(1, pool + 1)])
    ranked = np.take_along_axis(other, proxy.argsort(1, kind="stable"), 1)
    return ranked @ weights


def pass_at_k(right: np.ndarray, n: int, k: int) -> np.ndarray:
    """Probability that one of k samples is right, of prompts with `right` (P,) right ones among n: without bias

        1 - C(n - right, k) / C(n, k)

    (Chen et al. 2021, arXiv:2107.03374, equation 1). (P,) float64; ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples: k must be between 1 and {n}")
    return np.array([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in right])
