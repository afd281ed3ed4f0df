"""What a request asks for beside temperature, top-k and top-p: penalties of tokens that are there already, biases, and masks.

They change the logits of one row before `warp_logits`, by that row's own tokens alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Steering:
    """How the logits of a text are changed; the defaults change nothing."""

    presence: float = 0.0  # see `penalize_counts`
    frequency: float = 0.0
    repetition: float = 1.0  # see `penalize_repetition`
    bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)


def steer(logits: Tensor, how: Steering, prompt: Sequence[int], sampled: Sequence[int]) -> Tensor:
    """Logits (V,) of the token behind these: penalties of repetition, then of counts, then biases. -> the same, changed"""
    if how.repetition != 1:
        logits = penalize_repetition(logits, [*prompt, *sampled], how.repetition)
    if how.presence or how.frequency:
        logits = penalize_counts(logits, sampled, how.presence, how.frequency)
    if how.bias:
        ids, values = (torch.tensor(x, device=logits.device) for x in zip(*how.bias))
        logits = logits.index_add(0, ids, values.to(logits.dtype))
    return logits


def penalize_repetition(logits: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    """CTRL's (arXiv:1909.05858, section 4.1), as HF has it: l / penalty where l > 0, else l penalty, of these tokens.

    (V,) -> (V,)
    """
    ids = torch.tensor(ids, dtype=torch.int64, device=logits.device).unique()
    some = logits[ids]
    return logits.index_copy(0, ids, torch.where(some > 0, some / penalty, some * penalty))


def penalize_counts(logits: Tensor, sampled: Sequence[int], presence: float, frequency: float) -> Tensor:
    """OpenAI's: l_j - c_j frequency - (c_j > 0) presence, where token j was sampled c_j times. (V,) -> (V,)

    platform.openai.com/docs/guides/text-generation (parameter details); tokens of the prompt do not count.
    """
    ids = torch.tensor(sampled, dtype=torch.int64, device=logits.device)
    ids, counts = ids.unique(return_counts=True)
    return logits.index_add(0, ids, -(counts * frequency + presence).to(logits.dtype))
