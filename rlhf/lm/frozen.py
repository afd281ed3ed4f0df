"""The frozen part of a trunk that several roles read: its hidden states are computed once per batch of tokens."""

from collections.abc import Iterable

import torch
from torch import Tensor

from model.packed import states_between
from model.transformer import Transformer


class FrozenStates:
    """Hidden states between the layers of a frozen trunk: states(tokens)[n] is what layers 0 to n - 1 made of them.

    Policy, reference and reward of one micro-batch ask with the same tensor: the answer to the last question is kept. Equal
    numbers in another tensor are another question, since under shards every rank has to run the trunk as often as the others.
    `read` says which depths somebody wants; the trunk runs once, as deep as the deepest. The final norm is not applied.
    beside: depths that are kept as well as soon as somebody wants any.
    """

    def __init__(self, model: Transformer, beside: Iterable[int] = ()):
        self.model, self.beside = model, set(beside)
        self.depths: set[int] = set()
        self._tokens: Tensor | None = None
        self._states: dict[int, Tensor] = {}

    def read(self, depths: Iterable[int]) -> "FrozenStates":
        """Keep the states of these depths, 0 (the embedding) to the number of layers, as well."""
        self.depths |= {*depths, *self.beside}
        self._tokens = None
        return self

    @torch.no_grad()
    def __call__(
        self, tokens: Tensor, lengths: Tensor | None = None, known: dict[int, Tensor] | None = None
    ) -> dict[int, Tensor]:
        """tokens (B, T) int64 -> {depth: (B, T, D)}; column t is about the tokens up to t.

        With lengths (B,) rows stand one after the other on a CPU, and what neighbours begin with in common is read once;
        anything may stand on padding then. Nothing is kept of it. known: those that somebody has seen already, up to some
        depth; the trunk runs from there.
        """
        if lengths is not None and tokens.is_cpu:
            return states_between(self.model, tokens, lengths, self.depths)
        if self._tokens is not tokens:
            span, states = self.model.span(tokens), dict(known or {})
            done = max(states, default=0)
            hidden = states[done] if states else self.model.embed(tokens, span)
            for depth in sorted(self.depths - states.keys()):
                hidden = self.model.blocks(hidden, span, done, depth)
                states[depth], done = hidden, depth
            self._tokens, self._states = tokens, states
        return self._states
