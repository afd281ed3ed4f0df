"""How far a proxy reward can be followed: the curves of Gao et al. 2022 (arXiv:2210.10760), and when a run should stop.

d = sqrt(KL(policy || base)), the KL in nats per response and averaged before the root; R(d) is how much more gold reward
the policy earns than the base, so R(0) = 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """R(d) = d (alpha - beta g(d)): alpha is what a little optimisation earns per unit of d, beta what much of it costs.

    g(d) = d for best-of-n, log d for PPO (arXiv:2210.10760, section 3.1); see CURVES.
    """

    g: Callable[[np.ndarray], np.ndarray]  # positive d -> g(d)
    peak: Callable[[np.ndarray, np.ndarray], np.ndarray]  # alpha and positive beta -> the d of the largest R

    def gain(self, d: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
        """R(d); 0 at d = 0, where d log d has its limit."""
        return alpha * d - beta * self.product(d)

    def product(self, d: np.ndarray) -> np.ndarray:
        """d g(d), 0 at d = 0."""
        return np.where(d > 0, d * self.g(np.where(d > 0, d, 1.0)), 0.0)

    def fit(self, d: np.ndarray, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The alpha and beta that minimise the squared error of R(d), by its normal equations; points at d = 0 say nothing.

        d, gain (..., K), one fit for every leading index -> alpha, beta (...). NaN where fewer than two positive d differ:
        through one point goes a curve of every beta.
        """
        x, y = d, -self.product(d)  # R = alpha x + beta y
        xx, xy, yy = (x * x).sum(-1), (x * y).sum(-1), (y * y).sum(-1)
        xr, yr = (x * gain).sum(-1), (y * gain).sum(-1)
        different = np.where(d > 0, d, np.inf).min(-1) < d.max(-1)  # the determinant would be rounding alone
        determinant = np.where(different, xx * yy - xy**2, np.nan)
        return (yy * xr - xy * yr) / determinant, (xx * yr - xy * xr) / determinant

    def peak_of(self, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
        """The d beyond which R falls, inf where it never does (beta <= 0). (...), (...) -> (...)"""
        with np.errstate(over="ignore"):
            return np.where(beta > 0, self.peak(alpha, np.where(beta > 0, beta, 1.0)), np.inf)


CURVES = {
    "best_of_n": Curve(lambda d: d, lambda alpha, beta: np.maximum(alpha, 0) / (2 * beta)),
    "ppo": Curve(np.log, lambda alpha, beta: np.exp(alpha / beta - 1)),
}


def resampled_means(x: np.ndarray, resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """Means over prompts of `resamples` bootstrap samples of the prompts (Efron 1979): (K, P) -> (resamples, K).

    All K rows meet the same samples, so what is computed from several of them keeps their correlation.
    """
    prompts = x.shape[1]
    counts = np.random.default_rng(seed).multinomial(
        prompts, np.full(prompts, 1 / prompts), resamples
    )  # (resamples, P)
    return counts @ x.T / prompts


def best_place(scores: Sequence[float]) -> int:
    """Place of the largest score, the first of equals."""
    return scores.index(max(scores))


def has_stalled(scores: Sequence[float], patience: int) -> bool:
    """Have the last `patience` scores all failed to beat the best one before them? patience >= 1; False for no scores."""
    return len(scores) > patience and best_place(scores) < len(scores) - patience
