"""Linear heads in closed form or by Newton's method: on scores, labels, and pairs of answers, of pooled frozen states.

With w the weights of a head and x the standardised features of an answer, whatever people said of it:

    loss(w) = [ mean (x w + b - y)^2 / 2 ]  +  [ - mean log sigmoid(+- (x w + b)) ]  +  [ - mean p log sigmoid(d w) ... ]
              scores (ridge regression)        labels 0 and 1                          pairs, d = x_winner - x_loser
              + penalty |w|^2 / 2

Convex in every combination.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.lm.frozen import FrozenStates
from rlhf.reward.model import ONE_HEAD, Ensemble, Feature, FrozenReward


class Judged(NamedTuple):
    """Answers as features, and what people thought of them."""

    features: Tensor  # (N, F, D)
    scores: Tensor  # (N,) NaN where nobody said
    winner: Tensor  # (P,) which answer
    loser: Tensor  # (P,)
    p: Tensor  # (P,) probability that a rater prefers the winner
    weight: Tensor  # (P,)

    def of(self, columns: Sequence[int]) -> "Judged":
        """The same with some of the features."""
        return self._replace(features=self.features[:, list(columns)])


@dataclass(frozen=True)
class Fit:
    """A head (or M of them) and how well it does on answers that it was not fitted to."""

    features: tuple[Feature, ...]
    penalty: float
    weight: Tensor  # (M, F D) float64, of the plain features
    constant: Tensor  # (M,) float64
    predictions: Tensor  # (V, M) of the validation answers: standardised scores, or logits
    error: float  # their loss without the penalty; of scores the squared error, to predict the mean costs about 1


class Scale(NamedTuple):
    """What the training answers are standardised by."""

    center: Tensor  # (F D,)
    deviation: Tensor  # (F D,)
    mean: float  # of the scores
    spread: float

    def standard(self, features: Tensor) -> Tensor:
        """(N, F, D) -> (N, F D) float64"""
        return (features.flatten(1).double() - self.center) / self.deviation


def ridge(gram: Tensor, moment: Tensor, penalty: float) -> Tensor:
    """Ridge regression (Hoerl & Kennard 1970): the w that minimises |X w - y|^2 / N + penalty |w|^2.

    (X'X / N + penalty I) w = X'y / N.   gram = X'X / N (P, P), moment = X'y / N (P,), penalty > 0 -> (P,)
    """
    factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return torch.cholesky_solve(moment[:, None], factor)[:, 0]


class Problem(NamedTuple):
    """What a head minimises but for its penalty: w'gram w / 2 - moment'w - sum_j weight_j log sigmoid(d_j w)."""

    gram: Tensor  # (K, K)
    moment: Tensor  # (K,)
    d: Tensor  # (J, K)
    weight: Tensor  # (J,)
    middle: Tensor  # (K,) and level: the constant is level - middle w, where it is no column
    level: float
    constant: bool  # the last column is the constant, which is not penalised

    def of(self, columns: Tensor) -> "Problem":
        """The same with some of the columns, and the constant where it is one."""
        if self.constant:
            columns = torch.cat([columns, torch.tensor([len(self.moment) - 1])])
        gram = self.gram[columns][:, columns]
        return self._replace(gram=gram, moment=self.moment[columns], d=self.d[:, columns], middle=self.middle[columns])

    def solved(self, penalty: float, start: Tensor | None = None) -> Tensor:
        """The weights of least loss and their constant, (K + 1,). start: such a guess."""
        diagonal = torch.full_like(self.moment, penalty)
        if self.constant:
            diagonal[-1] = 0.0
        w = torch.zeros_like(self.moment) if start is None else start[: len(self.moment)]
        if self.moment.any():  # there are scores
            w = ridge(self.gram, self.moment, penalty)
        if len(self.d):
            w = newton(w, self.gram + torch.diag(diagonal), self.moment, self.d, self.weight)
        return w if self.constant else torch.cat([w, (self.level - self.middle @ w)[None]])


def newton(w: Tensor, quadratic: Tensor, moment: Tensor, d: Tensor, weight: Tensor) -> Tensor:
    """Newton's method from w (K,) for  w'quadratic w / 2 - moment'w - sum_j weight_j log sigmoid(d_j w).

    d (J, K), weight (J,). A step is halved until it lowers the loss enough (Armijo), so it ends at the minimum.
    """

    def loss(w: Tensor) -> Tensor:
        return w @ quadratic @ w / 2 - moment @ w - weight @ logsigmoid(d @ w)

    for _ in range(50):
        p = torch.sigmoid(-(d @ w))  # how unlikely what people said was
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


def scale_of(judged: Judged) -> Scale:
    x = judged.features.flatten(1).double()
    scores = judged.scores[~judged.scores.isnan()].double()
    mean, spread = (scores.mean(), scores.std(unbiased=False)) if len(scores) else (torch.zeros(()), torch.ones(()))
    return Scale(x.mean(0), x.std(0, unbiased=False).clamp(min=1e-6), float(mean), float(spread) or 1.0)


def problem_of(
    judged: Judged,
    scale: Scale,
    kind: str,
    joint_coef: float = 1.0,
    rows: Tensor | None = None,
    pairs: Tensor | None = None,
) -> Problem:
    """The problem of some answers. kind: regression, labels, pairs or joint; rows (N,), pairs (P,): how often each counts."""
    x = scale.standard(judged.features)
    K, scored = x.shape[1], ~judged.scores.isnan()
    count = (torch.ones(len(x)).double() if rows is None else rows)[scored]
    gram, moment, middle, level = x.new_zeros(K, K), x.new_zeros(K), x.new_zeros(K), 0.0
    d, weight, constant = x[:0], x.new_zeros(0), kind == "labels"
    if kind in ("regression", "joint"):
        y = (judged.scores[scored].double() - scale.mean) / scale.spread
        coef, n = 1.0 if kind == "regression" else joint_coef, len(y)
        middle, level = count @ x[scored] / n, float(count @ y / n)
        scaled = (x[scored] - middle) * count.sqrt()[:, None]
        gram, moment = coef * scaled.T @ scaled / n, coef * scaled.T @ ((y - level) * count.sqrt()) / n
    if kind in ("pairs", "joint"):
        d, weight = choices(x, judged, pairs)
        weight = weight / judged.weight.double().sum()
    if constant:
        sign = torch.where(judged.scores[scored] > 0.5, 1.0, -1.0).double()[:, None]
        d = torch.cat([x[scored], x.new_ones(int(scored.sum()), 1)], 1) * sign
        weight = count / len(d)
        gram, moment, middle = x.new_zeros(K + 1, K + 1), x.new_zeros(K + 1), x.new_zeros(K + 1)
    return Problem(gram, moment, d, weight, middle, level, constant)


def choices(x: Tensor, judged: Judged, pairs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Differences (J, K) of which people chose each with a weight (J,): a soft label is a choice of either side."""
    d, p = x[judged.winner] - x[judged.loser], judged.p.double()
    weight = judged.weight.double() * (torch.ones(len(p)).double() if pairs is None else pairs)
    unsure = p < 1
    return torch.cat([d, -d[unsure]]), torch.cat([weight * p, (weight * (1 - p))[unsure]])


def beside_votes(problem: Problem, votes: Judged, scale: Scale, coef: float, n: int, pairs: Tensor | None) -> Problem:
    """The problem with other pairs beside: one weighs coef / n, as much as `coef` of its n answers or pairs."""
    d, weight = choices(scale.standard(votes.features), votes, pairs)
    if problem.constant:
        d = torch.cat([d, d.new_zeros(len(d), 1)], 1)
    return problem._replace(d=torch.cat([problem.d, d]), weight=torch.cat([problem.weight, coef * weight / n]))


def error_of(judged: Judged, predictions: Tensor, scale: Scale, kind: str, joint_coef: float) -> float:
    """The loss of predictions (V,) without a penalty; of scores the squared error. NaN where there is nothing to compare."""
    scored, raw = ~judged.scores.isnan(), predictions.double()
    scores = judged.scores[scored].double()
    d, weight = choices(raw[:, None], judged)
    pairs = float(-(weight @ logsigmoid(d[:, 0])) / judged.weight.double().sum()) if len(d) else math.nan
    if kind == "pairs":
        return pairs
    if kind == "labels":
        return float(-logsigmoid(torch.where(scores > 0.5, raw[scored], -raw[scored])).mean())
    squared = float(((raw[scored] - (scores - scale.mean) / scale.spread) ** 2).mean())
    return squared if kind == "regression" else pairs + joint_coef * squared / 2


def fit_heads(
    features: Sequence[Feature],
    train: Judged,
    validation: Judged,
    penalties: Sequence[float],
    most: int = 2,
    kind: str = "regression",
    joint_coef: float = 1.0,
) -> list[Fit]:
    """The best penalty, by validation error, for every set of at most `most` of the features; the best set first.

    train decides the heads, validation only which of them is taken. Features and scores are standardised by the training
    answers; all in float64. ValueError where validation has nothing that could decide.
    """
    F, D = train.features.shape[1:]
    scale = scale_of(train)
    whole, unseen = problem_of(train, scale, kind, joint_coef), scale.standard(validation.features)
    fits = []
    for chosen in (s for size in range(1, most + 1) for s in itertools.combinations(range(F), size)):
        columns = torch.cat([torch.arange(f * D, (f + 1) * D) for f in chosen])
        problem, names, tried, found = whole.of(columns), tuple(features[f] for f in chosen), [], None
        for penalty in sorted(penalties, reverse=True):  # the next minimum is near
            found = problem.solved(penalty, found)
            w, constant = found[:-1], found[-1]
            predictions = unseen[:, columns] @ w + constant
            error = error_of(validation, predictions, scale, kind, joint_coef)
            weight = w / scale.deviation[columns]
            plain = constant - weight @ scale.center[columns]
            tried.append(Fit(names, penalty, weight[None], plain[None], predictions[:, None], error))
        fits.append(min(tried, key=lambda fit: fit.error))
    if math.isnan(fits[0].error) and len(fits) * len(penalties) > 1:
        raise ValueError(
            f"the validation split has nothing to choose by ({len(validation.scores)} answers, {len(validation.winner)} "
            "pairs): give one of --depths, --poolings and --ridge, or more data"
        )
    return sorted(fits, key=lambda fit: fit.error)


def refitted(
    fit: Fit,
    train: Judged,
    members: int,
    seed: int,
    votes: Judged | None = None,
    vote_coef: float = 1.0,
    kind: str = "regression",
    joint_coef: float = 1.0,
) -> Fit:
    """The fit's head again, `members` times, and where given beside votes on pairs of other prompts.

    A vote weighs vote_coef as much as an answer with a score, or a pair where there are pairs alone, however many there
    are. With several members each has its own sample of answers and pairs, drawn with replacement (bagging, Breiman 1996).
    train and votes have the features that the fit reads, in its order. What the fit says of validation stays.
    """
    scale, rng, weights, constants = scale_of(train), np.random.default_rng(seed), [], []
    for _ in range(members):
        rows, pairs = (drawn(rng, n, members) for n in (len(train.scores), len(train.winner) * (kind != "regression")))
        problem = problem_of(train, scale, kind, joint_coef, rows, pairs if len(pairs) else None)
        if votes is not None:
            n = len(train.winner) if kind == "pairs" else int((~train.scores.isnan()).sum())
            problem = beside_votes(problem, votes, scale, vote_coef, n, drawn(rng, len(votes.winner), members))
        found = problem.solved(fit.penalty)
        w, constant = found[:-1], found[-1]
        weights.append(w / scale.deviation)
        constants.append(constant - weights[-1] @ scale.center)
    return dataclasses.replace(fit, weight=torch.stack(weights), constant=torch.stack(constants))


def drawn(rng: np.random.Generator, n: int, members: int) -> Tensor:
    """How often each of n rows counts for one of the members, (n,): once for a single one, else by a bootstrap sample."""
    if members == 1 or n == 0:
        return torch.ones(n, dtype=torch.float64)
    return torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n))).double()


def head_of(
    fit: Fit, states: FrozenStates, stop_ids: Iterable[int], ensemble: Ensemble = ONE_HEAD, reads: str = "text"
) -> FrozenReward:
    """The reward model that a fit describes, not yet normalised."""
    reward_model = FrozenReward(states, fit.features, stop_ids, ensemble, reads).requires_grad_(False)
    reward_model.head.weight.copy_(fit.weight)
    reward_model.head.bias.copy_(fit.constant)
    return reward_model
