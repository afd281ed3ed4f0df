"""The policy with its value function, on one trunk or two, and the reference that it is held near."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.transformer import Transformer
from rlhf.language_model import to_columns, token_logprobs


@dataclass(frozen=True)
class PolicyOutput:
    """What one forward says about every token; all (B, T), zero outside the mask."""

    logprobs: Tensor  # log pi(token t | tokens before t), at the sampling temperature
    entropy: Tensor  # of the distribution that token t was drawn from, nats
    values: Tensor  # V of the state before token t is chosen


class ActorCritic(nn.Module):
    """A policy with a value head on its own trunk (`shared`), on a copy of it (`separate`), or with none.

    The value head starts at zero (Ziegler et al. 2019, arXiv:1909.08593), so the first advantages are the plain
    returns. `forward` is what DDP hooks into; acting goes through `self.model` directly.
    """

    def __init__(self, model: Transformer, critic: str = "shared", temperature: float = 1.0):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.value_trunk = copy.deepcopy(model) if critic == "separate" else None
        if self.value_trunk is not None and not model.config.tied:
            self.value_trunk.lm_head = None  # the critic predicts no tokens: an idle parameter would stall DDP
        self.value_head = None if critic == "none" else nn.Linear(model.config.width, 1)
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(self, tokens: Tensor, mask: Tensor) -> PolicyOutput:
        """tokens (B, T) int64, mask (B, T) bool -> PolicyOutput of (B, T) each."""
        hidden = self.model.trunk(tokens[:, :-1])  # (B, T-1, D)
        logprobs, entropy = token_logprobs(self.model, hidden, tokens, mask, self.temperature)
        if self.value_head is None:
            return PolicyOutput(logprobs, entropy, torch.zeros_like(logprobs))
        if self.value_trunk is not None:
            hidden = self.value_trunk.trunk(tokens[:, :-1])
        values = self.value_head(hidden[mask[:, 1:]]).squeeze(-1)  # (N,)
        return PolicyOutput(logprobs, entropy, to_columns(values.to(logprobs.dtype), mask))


def frozen_reference(model: Transformer, temperature: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A frozen copy of `model` as a function (tokens, mask) -> logprobs (B, T)."""
    frozen = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def reference(tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = frozen.trunk(tokens[:, :-1])
        return token_logprobs(frozen, hidden, tokens, mask, temperature)[0]

    return reference
