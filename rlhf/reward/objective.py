"""What a reward model is trained for: scores, labels, pairs; as sums, so that whoever knows the batch divides."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.losses import centring_loss, preference_loss


@dataclass(frozen=True)
class Objective:
    """Its weights and switches; scores are standardised by the training split's mean and deviation."""

    mean: float = 0.0
    deviation: float = 1.0
    label_smoothing: float = 0.0
    margin: float = 0.0  # per point of a pair's gap
    center_coef: float = 0.0
    joint_coef: float = 1.0
    lm_coef: float = 0.0


class Texts(NamedTuple):
    """G units (answers, pairs, prompts with all their answers): R texts, those of a unit behind one another, and P pairs."""

    tokens: Tensor  # (R, T)
    lengths: Tensor  # (R,)
    begins: Tensor  # (R,) where the answer begins
    group: Tensor  # (R,) which unit, 0 ... G - 1
    scores: Tensor  # (R,) what people thought of it; NaN where nobody said
    winner: Tensor  # (P,) which text
    loser: Tensor  # (P,)
    p: Tensor  # (P,) probability that a rater prefers the winner
    gap: Tensor  # (P,) by how many points
    weight: Tensor  # (P,)
    counts: Tensor  # (G, M) how often a unit counts for head m

    def part(self, units: Tensor) -> "Texts":
        """These units (U,), in ascending order, for themselves."""
        rows = torch.isin(self.group, units)
        pairs, at = rows[self.winner], rows.cumsum(0) - 1  # (P,), (R,) where each row goes
        width = int(self.lengths[rows].max())
        return Texts(
            self.tokens[rows, :width],
            *(x[rows] for x in (self.lengths, self.begins, torch.searchsorted(units, self.group), self.scores)),
            *(at[x[pairs]] for x in (self.winner, self.loser)),
            *(x[pairs] for x in (self.p, self.gap, self.weight)),
            self.counts[units],
        )

    def totals(self) -> Tensor:
        """What `reward_losses` are divided by: scored texts, the weight of the pairs, texts. (3,) float64"""
        return torch.stack([(~self.scores.isnan()).sum().double(), self.weight.double().sum(), len(self.group) * ONE])


ONE = torch.ones((), dtype=torch.float64)


def coefficients(kind: str, o: Objective) -> Tensor:
    """What each of the three `reward_losses` weighs in an objective. (3,)"""
    scores, pairs = {"regression": (1, 0), "labels": (1, 0), "pairs": (0, 1), "joint": (o.joint_coef, 1)}[kind]
    return torch.tensor([scores, pairs, o.lm_coef], dtype=torch.float64)


def reward_losses(learner: nn.Module, texts: Texts, kind: str, o: Objective) -> Tensor:
    """Sums over the batch, each the mean over its heads: of the scored texts' loss, the pairs', and nats per token. (3,)

    regression, joint: half the squared error of the standardised score;  labels: of scores 0 and 1 the cross-entropy of
    sigmoid(r) (Ethayarajh et al. 2024, arXiv:2402.01306, have such thumbs up and down);  pairs: preference_loss +
    center_coef (r_w + r_l)^2, of soft labels p where the data have them. All texts go through one forward.
    """
    language = o.lm_coef > 0
    read = texts.tokens, texts.lengths, texts.begins
    raw, nats = learner(*read, True) if language else (learner(*read), None)
    rows, pairs = texts.counts[texts.group], texts.counts[texts.group[texts.winner]]  # (R, M), (P, M)
    scored = ~texts.scores.isnan()
    loss = SCORE_LOSSES[kind](raw[scored], texts.scores[scored][:, None].expand_as(raw[scored]), o)
    losses = [(loss * rows[scored]).mean(-1).sum()]
    loss = pair_loss(raw[texts.winner], raw[texts.loser], texts, o)  # (P, M)
    losses.append((loss * pairs * texts.weight[:, None]).mean(-1).sum())
    losses.append(nats.sum() if language else losses[0].new_zeros(()))
    return torch.stack(losses)


def squared_error(raw: Tensor, scores: Tensor, o: Objective) -> Tensor:
    return (raw - (scores - o.mean) / o.deviation) ** 2 / 2


def cross_entropy(raw: Tensor, labels: Tensor, o: Objective) -> Tensor:
    return F.binary_cross_entropy_with_logits(raw, labels, reduction="none")


SCORE_LOSSES = {"regression": squared_error, "joint": squared_error, "labels": cross_entropy, "pairs": squared_error}


def pair_loss(winner: Tensor, loser: Tensor, texts: Texts, o: Objective) -> Tensor:
    """(P, M)"""
    p, gap = (x[:, None].expand_as(winner) for x in (texts.p, texts.gap))
    label = p * (1 - o.label_smoothing) + (1 - p) * o.label_smoothing
    loss = preference_loss(winner, loser, o.margin * gap if o.margin else None, label=label)
    return loss + o.center_coef * centring_loss(winner, loser)
