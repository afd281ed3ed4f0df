"""Can a probability be believed, and how far does a rate that was measured on few items reach?

Report cards for reward models: p = sigmoid(margin) is the predicted probability that the first response of a pair wins,
the label says whether it did (1, 0, or a share of the raters between). Put the pairs in random order first: where the
chosen response always comes first, all labels are 1 and calibration means nothing.
"""

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor


class Bins(NamedTuple):
    count: Tensor  # (bins,) how many predictions fell in here, or their weight
    predicted: Tensor  # (bins,) their mean probability; 0 in an empty bin
    observed: Tensor  # (bins,) their mean label; 0 in an empty bin


def reliability_bins(probs: Tensor, labels: Tensor, bins: int = 10, weights: Tensor | None = None) -> Bins:
    """Predictions in `bins` bins of equal width, [low, high), 1 in the last one. (N,), (N,) -> Bins

    weights (N,) >= 0 count each prediction so often. Raises ValueError for probabilities outside [0, 1].
    """
    _check(probs, labels)
    labels = labels.to(probs.dtype)
    w = torch.ones_like(probs) if weights is None else weights.to(probs.dtype)
    edges = torch.linspace(0, 1, bins + 1, dtype=probs.dtype, device=probs.device)
    index = torch.bucketize(probs, edges[1:-1], right=True)
    count, predicted, observed = (
        torch.zeros(bins, dtype=probs.dtype, device=probs.device).index_add(0, index, x)
        for x in (w, w * probs, w * labels)
    )
    divisor = torch.where(count > 0, count, 1)
    return Bins(count.long() if weights is None else count, predicted / divisor, observed / divisor)


def expected_calibration_error(
    probs: Tensor, labels: Tensor, bins: int = 10, norm: str = "l1", weights: Tensor | None = None
) -> Tensor:
    """Distance between predicted and observed frequency, averaged over bins (arXiv:1706.04599, eq. 3). (N,) -> ()

    l1: sum_b n_b / n |observed_b - predicted_b|;  l2: root of the weighted mean square;  max: the worst bin (eq. 5).
    """
    return binned_error(reliability_bins(probs, labels, bins, weights), norm)


def binned_error(found: Bins, norm: str = "l1") -> Tensor:
    """`expected_calibration_error` of predictions that are in their bins already. Bins -> ()"""
    gap = (found.observed - found.predicted).abs()
    weight = found.count.to(gap.dtype) / found.count.sum()
    errors = {"l1": (weight * gap).sum(), "l2": (weight * gap**2).sum().sqrt(), "max": gap.max()}
    if norm not in errors:
        raise ValueError(f"unknown norm {norm!r}; choose one of {', '.join(errors)}")
    return errors[norm]


def brier_score(probs: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of the probabilities: mean of (p - label)^2; 0 best, 1/4 for always 1/2. (N,) -> ()"""
    _check(probs, labels)
    w = torch.ones_like(probs) if weights is None else weights.to(probs.dtype)
    return (w * (probs - labels) ** 2).sum() / w.sum()


def fit_temperature(margins: Tensor, labels: Tensor) -> float:
    """The T > 0 whose sigmoid(margin / T) has the least cross-entropy (arXiv:1706.04599, eq. 9). (N,) -> float

    The loss is convex in 1 / T, so its slope, mean of margin (sigmoid(margin / T) - label), is bisected, in float64.
    Fit on pairs that neither trained nor test the model. Raises ValueError where no finite T > 0 is best.
    """
    m, y = margins.double(), labels.double()

    def slope(a):
        return (m * (torch.sigmoid(a * m) - y)).mean().item()

    if not slope(0.0) < 0:
        raise ValueError("the margins do not predict the labels better than chance: no temperature helps")
    if not (((m > 0) & (y < 1)) | ((m < 0) & (y > 0))).any():
        raise ValueError("the margins rank every pair right, so the best temperature is 0: use more or harder pairs")
    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def wilson_interval(wins: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a win rate, good also near 0 and 1; a tie is half a win. -> (low, high)

    (w + z^2 / 2 +- z sqrt(w (n - w) / n + z^2 / 4)) / (n + z^2): Wilson, JASA 22 (1927).
    Raises ValueError unless 0 <= wins <= n and n > 0.
    """
    if not (0 <= wins <= n and n > 0):
        raise ValueError(f"a win rate needs 0 <= wins <= n and n > 0, not {wins} of {n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre, half = wins + z**2 / 2, z * (wins * (n - wins) / n + z**2 / 4) ** 0.5
    return max(0.0, (centre - half) / (n + z**2)), min(1.0, (centre + half) / (n + z**2))


def _check(probs: Tensor, labels: Tensor):
    if probs.shape != labels.shape or probs.numel() == 0:
        raise ValueError(f"{tuple(probs.shape)} probabilities against {tuple(labels.shape)} labels")
    if not ((probs >= 0) & (probs <= 1)).all():
        raise ValueError("probabilities must lie in [0, 1]; give sigmoid(margin), not the margin")
