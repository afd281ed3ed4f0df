"""What a reward model is trained for: ratings, pairs, or both; per row and head, so that whoever knows the batch divides."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.losses import centring_loss, preference_loss


@dataclass(frozen=True)
class Objective:
    """Its weights and switches; ratings are standardised by the training split's mean and deviation."""

    mean: float = 0.0
    deviation: float = 1.0
    soft: bool = False  # the label of a pair is the probability that a rater prefers chosen, not 1
    label_smoothing: float = 0.0
    margin: float = 0.0  # per point of rating gap
    center_coef: float = 0.0
    joint_coef: float = 1.0
    lm_coef: float = 0.0


class Texts(NamedTuple):
    """Rows (or pairs) and what people thought of them; a micro-batch is a slice of every field."""

    tokens: Tensor  # (B, S, T): S = 1 text a row, or the chosen and the rejected one of a pair
    lengths: Tensor  # (B, S)
    ratings: Tensor  # (B, S)
    preference: Tensor  # (B,) probability that a rater prefers the first; 1 where there is one text
    weights: Tensor  # (B, M) how often row b counts for head m


def side_by_side(sides: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """[(B, T1), (B,)], [(B, T2), (B,)] -> tokens (B, 2, T), lengths (B, 2)."""
    width = max(tokens.shape[1] for tokens, _ in sides)
    padded = [F.pad(tokens, (0, width - tokens.shape[1])) for tokens, _ in sides]
    return torch.stack(padded, 1), torch.stack([lengths for _, lengths in sides], 1)


def reward_loss(learner: nn.Module, texts: Texts, kind: str, o: Objective) -> Tensor:
    """The loss of every row, the mean over its heads: (B,). All its texts go through one forward.

    regression: half the squared error of the rating;  pairs: preference_loss + center_coef (r_c + r_r)^2;
    joint: pairs + joint_coef times the regression of both texts. lm_coef adds the texts' nats per token.
    """
    language = o.lm_coef > 0
    tokens, lengths = texts.tokens.flatten(0, 1), texts.lengths.flatten()  # (B S, T), (B S,)
    scores, nats = learner(tokens, lengths, True) if language else (learner(tokens, lengths), None)
    scores = scores.unflatten(0, texts.lengths.shape)  # (B, S, M)
    loss = (LOSSES[kind](scores, texts, o) * texts.weights).mean(-1)  # (B,)
    return loss + o.lm_coef * nats.view(texts.lengths.shape).mean(-1) if language else loss


def regression(scores: Tensor, texts: Texts, o: Objective) -> Tensor:
    ratings = (texts.ratings - o.mean) / o.deviation
    return ((scores - ratings[..., None]) ** 2 / 2).mean(1)


def pairs(scores: Tensor, texts: Texts, o: Objective) -> Tensor:
    chosen, rejected = scores.unbind(1)  # (B, M) each
    gap = (texts.ratings[:, 0] - texts.ratings[:, 1])[:, None].expand_as(chosen)
    label = texts.preference[:, None].expand_as(chosen) if o.soft else None
    loss = preference_loss(chosen, rejected, o.margin * gap if o.margin else None, o.label_smoothing, label)
    return loss + o.center_coef * centring_loss(chosen, rejected)


def joint(scores: Tensor, texts: Texts, o: Objective) -> Tensor:
    return pairs(scores, texts, o) + o.joint_coef * regression(scores, texts, o)


LOSSES = {"regression": regression, "pairs": pairs, "joint": joint}
