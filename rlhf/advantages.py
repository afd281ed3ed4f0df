"""Credit assignment: from rewards per token, or one score per response, to advantages. Nothing here is whitened but
REINFORCE++, which is defined by its whitening.

`group` (B,) int64 says which rows answer the same prompt: any ids, in any order, all rows of a prompt in one call.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.functional import masked_sum, whiten


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16). (B, T) -> advantages (B, T), returns (B, T)

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  R_t = A_t + V_t.
    t + 1 is the row's next *counted* token: holes in the mask are bridged, neither discounted nor read, as in verl.
    After the last one comes `bootstrap` (B,): the value of the state where the length limit cut the row, 0 for
    finished rows; None is 0 for all.
    """
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    next_value = values.new_zeros(len(values)) if bootstrap is None else bootstrap  # (B,)
    advantage = values.new_zeros(len(values))  # (B,)
    advantages = torch.zeros_like(values)
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0)
    return advantages, advantages + values


def rloo(scores: Tensor, group: Tensor) -> Tensor:
    """REINFORCE with the prompt's *other* responses as baseline (arXiv:2402.14740, section 2.3). (B,) -> (B,)

    A_i = s_i - (mean of s_j over j != i) = n / (n - 1) (s_i - mean). A response alone in its group gets 0: there is
    nothing to compare it with.
    """
    n, deviation = _from_group_mean(scores, group)
    return deviation * n / (n - 1).clamp(min=1)


def grpo(scores: Tensor, group: Tensor, eps: float = 1e-6) -> Tensor:
    """Scores standardised within their group (arXiv:2402.03300, section 4.1.2). (B,) -> (B,)

    A_i = (s_i - mean) / (std + eps); unbiased std, verl's eps (TRL 1e-4, OpenRLHF 1e-9). A response alone in its
    group gets 0, as in TRL; verl keeps its raw score.
    """
    n, deviation = _from_group_mean(scores, group)
    variance = masked_sum(deviation**2, group[:, None] == group, dim=1) / (n - 1).clamp(min=1)
    std = torch.where(variance > 0, variance, 1).sqrt()  # without variance the deviations are 0 and stay 0
    return deviation / (std + eps)


def dr_grpo(scores: Tensor, group: Tensor) -> Tensor:
    """GRPO without the division, which favours prompts nearly solved or nearly hopeless (arXiv:2503.20783). (B,) -> (B,)

    A_i = s_i - mean.
    """
    return _from_group_mean(scores, group)[1]


def _from_group_mean(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Size of each row's group, and the row's distance from its group's mean."""
    same = group[:, None] == group  # (B, B); unlike index_add on CUDA, its sums are the same in every run
    n = same.sum(1)
    # measured from the group's best: equal scores then differ from their mean by 0, and not by a rounding error
    # that grpo would divide by a std of the same size
    scores = scores - torch.where(same, scores, -torch.inf).amax(1)
    return n, scores - masked_sum(scores, same, dim=1) / n


def reinforce_plus_plus(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """Reward to go, whitened over the tokens of the whole batch (arXiv:2501.03262v9, eq. 4 and 5). -> (B, T), (B, T)

    R_t = r_t + gamma R_{t+1};  A = (R - mean) / std. R is GAE with V = 0 and lam = 1; the paper has gamma = 1.
    """
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)
    return whiten(returns, mask), returns


class Estimator(NamedTuple):
    """A choice of the training loop: its function, and what the loop has to know of it.

    estimate(rewards, values, mask, gamma, lam, group) -> advantages (B, T), returns (B, T); rewards, values and mask are
    (B, T), group (B,). Each ignores what it has no use for.
    """

    estimate: Callable[..., tuple[Tensor, Tensor]]
    needs_values: bool = False  # reads a critic; without one there is none to train
    needs_group: bool = False  # compares responses to one prompt
    whiten: bool = False  # its advantages have no scale of their own


# Those that judge whole responses take the sum of a row's rewards, KL included: arXiv:2402.14740 does so, while GRPO's
# paper puts the KL in the loss. All tokens of a response get its advantage.


def _gae(rewards, values, mask, gamma, lam, group):
    return gae(rewards, values, mask, gamma, lam)


def _reinforce_plus_plus(rewards, values, mask, gamma, lam, group):
    return reinforce_plus_plus(rewards, mask, gamma)


def _per_response(advantage):
    def estimate(rewards, values, mask, gamma, lam, group):
        returns = masked_sum(rewards, mask, dim=1)  # (B,)
        return tuple(torch.where(mask, x[:, None], 0) for x in (advantage(returns, group), returns))

    return estimate


ESTIMATORS = {
    "gae": Estimator(_gae, needs_values=True, whiten=True),
    "rloo": Estimator(_per_response(rloo), needs_group=True),
    "grpo": Estimator(_per_response(grpo), needs_group=True),
    "dr_grpo": Estimator(_per_response(dr_grpo), needs_group=True),
    "reinforce++": Estimator(_reinforce_plus_plus),
}
