"""Statistics of a comparison: intervals, win rates, best-of-n with its analytic KL."""

import math

import numpy as np


def paired_bootstrap(difference: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `difference` (N,), one entry per prompt (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Per prompt 1 where ours scores higher, 0 where lower, one half for a tie: (N,), (N,) -> (N,)."""
    return (ours > theirs) + 0.5 * (ours == theirs)


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
