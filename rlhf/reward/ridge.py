"""Linear heads in closed form: ridge regression of ratings on pooled states, beside votes by Newton's method."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.lm.frozen import FrozenStates
from rlhf.reward.model import ONE_HEAD, Ensemble, Feature, FrozenReward


def ridge(gram: Tensor, moment: Tensor, penalty: float) -> Tensor:
    """Ridge regression (Hoerl & Kennard 1970): the w that minimises |X w - y|^2 / N + penalty |w|^2.

    (X'X / N + penalty I) w = X'y / N.   gram = X'X / N (P, P), moment = X'y / N (P,), penalty > 0 -> (P,)
    """
    factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return torch.cholesky_solve(moment[:, None], factor)[:, 0]


@dataclass(frozen=True)
class Fit:
    """A head (or M of them) and how well it does on sentences that it was not fitted to."""

    features: tuple[Feature, ...]
    penalty: float
    weight: Tensor  # (M, F D) float64, of the plain features
    constant: Tensor  # (M,) float64
    predictions: Tensor  # (V, M) of the validation sentences, standardised ratings
    error: float  # their mean squared error; always to predict the mean costs about 1


def fit_heads(
    features: Sequence[Feature], train: Tensor, ratings: Tensor, validation: Tensor, truth: Tensor, penalties, most=2
) -> list[Fit]:
    """The best penalty, by validation error, for every set of at most `most` of the features; the best set first.

    train (N, F, D) and ratings (N,) decide the heads, validation (V, F, D) and truth (V,) only which of them is taken.
    Features and ratings are standardised by the N training sentences; all in float64.
    """
    F, D = train.shape[1:]
    x, center, deviation = standardised(train)  # (N, F D)
    unseen = (validation.flatten(1).double() - center) / deviation  # (V, F D)
    mean, spread = ratings.double().mean(), ratings.double().std(unbiased=False)
    y, target = (ratings.double() - mean) / spread, (truth.double() - mean) / spread
    gram, moment = x.T @ x / len(x), x.T @ y / len(x)  # of all features, once

    fits = []
    for chosen in (s for size in range(1, most + 1) for s in itertools.combinations(range(F), size)):
        columns = torch.cat([torch.arange(f * D, (f + 1) * D) for f in chosen])
        tried = []
        for penalty in penalties:
            w = ridge(gram[columns][:, columns], moment[columns], penalty)
            predictions = unseen[:, columns] @ w
            weight = w / deviation[columns]
            error = float(((predictions - target) ** 2).mean())
            constant = -weight @ center[columns]
            names = tuple(features[f] for f in chosen)
            tried.append(Fit(names, penalty, weight[None], constant[None], predictions[:, None], error))
        fits.append(min(tried, key=lambda fit: fit.error))
    return sorted(fits, key=lambda fit: fit.error)


def standardised(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, F, D) -> float64 (N, F D) with mean 0 and deviation 1, and the means and deviations (F D,) before."""
    x = features.flatten(1).to(torch.float64, copy=True)
    center, deviation = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-6)
    return x.sub_(center).div_(deviation), center, deviation


def refitted(
    fit: Fit,
    train: Tensor,
    ratings: Tensor,
    members: int,
    seed: int,
    votes: Tensor | None = None,
    vote_coef: float = 1.0,
) -> Fit:
    """The fit's head again, `members` times, to ratings and, where given, to votes on pairs.

    The w that minimises  |X w - y|^2 / 2N + penalty |w|^2 / 2 - vote_coef / N sum_j log sigmoid(d_j w):  ridge regression
    of the N ratings beside Bradley-Terry on the P differences d = chosen - rejected; a vote weighs vote_coef as much as a
    rating, however many there are. Convex; by Newton's method. With several members each has its own N sentences and P
    pairs, drawn with replacement (bagging, Breiman 1996). train (N, F, D) and votes (P, F, D) are the features that the
    fit reads, in its order. What the fit says of validation stays.
    """
    x, center, deviation = standardised(train)
    y = ratings.double()
    y = (y - y.mean()) / y.std(unbiased=False)
    d = x[:0] if votes is None else votes.flatten(1).double() / deviation
    rng, weights, constants = np.random.default_rng(seed), [], []
    for _ in range(members):
        count, votes_count = (drawn(rng, len(rows), members) for rows in (x, d))
        middle, level = count @ x / len(x), count @ y / len(x)
        scaled = (x - middle) * count.sqrt()[:, None]
        gram, moment = scaled.T @ scaled / len(x), scaled.T @ ((y - level) * count.sqrt()) / len(x)
        w = ridge(gram, moment, fit.penalty)
        if len(d):
            w = add_votes(w, gram, moment, fit.penalty, d, vote_coef * votes_count / len(x))
        weights.append(w / deviation)
        constants.append(level - middle @ w - weights[-1] @ center)
    return dataclasses.replace(fit, weight=torch.stack(weights), constant=torch.stack(constants))


def drawn(rng: np.random.Generator, n: int, members: int) -> Tensor:
    """How often each of n rows counts for one of the members, (n,): once for a single one, else by a bootstrap sample."""
    if members == 1 or n == 0:
        return torch.ones(n, dtype=torch.float64)
    return torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n))).double()


def add_votes(w: Tensor, gram: Tensor, moment: Tensor, penalty: float, d: Tensor, weight: Tensor) -> Tensor:
    """Newton's method from w (D,) for  w'(gram + penalty I)w / 2 - moment'w - sum_j weight_j log sigmoid(d_j w).

    d (P, D), weight (P,). A step is halved until it lowers the loss enough (Armijo), so it ends at the minimum.
    """
    quadratic = gram + penalty * torch.eye(len(w), dtype=w.dtype)

    def loss(w: Tensor) -> Tensor:
        return w @ quadratic @ w / 2 - moment @ w - weight @ logsigmoid(d @ w)

    for _ in range(50):
        p = torch.sigmoid(-(d @ w))  # how unlikely the vote was
        gradient = quadratic @ w - moment - d.T @ (weight * p)
        hessian = quadratic + d.T @ (d * (weight * p * (1 - p))[:, None])
        step = torch.linalg.solve(hessian, gradient)
        if gradient @ step < 1e-14:
            break
        size = 1.0
        while loss(w - size * step) > loss(w) - 1e-4 * size * gradient @ step and size > 1e-6:
            size /= 2
        w = w - size * step
    return w


def head_of(fit: Fit, states: FrozenStates, stop_ids: Iterable[int], ensemble: Ensemble = ONE_HEAD) -> FrozenReward:
    """The reward model that a fit describes, not yet normalised."""
    reward_model = FrozenReward(states, fit.features, stop_ids, ensemble).requires_grad_(False)
    reward_model.head.weight.copy_(fit.weight)
    reward_model.head.bias.copy_(fit.constant)
    return reward_model
