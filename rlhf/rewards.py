"""From one score per response to one reward per token."""

import torch
from torch import Tensor

from rlhf.kl import ESTIMATORS


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float, estimator: str = "k1"
) -> Tensor:
    """Each token pays for its KL to the reference; the last real token also earns the score. (B,), (B, T) -> (B, T)

    r_t = -kl_coef * kl_t + score * [t is the row's last True]; zero outside the mask. A row's rewards add up to
    score - kl_coef * (KL of the row): arXiv:1909.08593, eq. 2, taken apart token by token.
    Raises ValueError if a row has no token that could carry its score, or if the estimator has no such name.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, columns, -1).amax(1)  # (B,)
    if (last < 0).any():
        rows = (last < 0).nonzero().flatten().tolist()
        raise ValueError(f"{len(rows)} of {len(last)} responses are empty (first: row {rows[0]}): nothing to reward")
    kl = ESTIMATORS[estimator](torch.where(mask, logprobs, 0), torch.where(mask, ref_logprobs, 0))
    # on the last token, where OpenAI, OpenRLHF and verl pay; TRL >= 0.12 pays one slot later when there is room
    return -kl_coef * kl + torch.where(columns == last[:, None], scores[:, None], 0)


def missing_eos(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """Subtract `penalty` from responses that the length limit cut before their EOS. (B,), (B,) -> (B,)

    Otherwise the policy may learn never to stop. As in TRL >= 0.12; OpenAI *replaces* the score, by -1.
    """
    return torch.where(finished, scores, scores - penalty)
