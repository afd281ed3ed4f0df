"""Texts without padding: one after the other in a single row, each attending to itself alone.

    hidden = text_states(model, tokens, lengths)  # (B, T, D), as model.trunk(tokens) where tokens are real
    last = last_states(model, tokens, lengths)  # (B, D), of the last real token alone

Linear layers and norms then see real tokens only, and what neighbouring rows (the sides of a pair, all answers to a prompt)
begin with in common is computed once. On a GPU many small attentions cost more than padding does: there the rows stay padded.
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from model.transformer import Span, Transformer, attend

LEAST_SHARED = 16  # tokens of a common beginning from which on it pays
MOST_LEFT = 0.8  # of the tokens of padded rows, up to which packing them pays


def text_states(
    model: Transformer, tokens: Tensor, lengths: Tensor, states: Tensor | None = None, depth: int = 0
) -> Tensor:
    """Hidden states after the final norm: tokens (B, T) right-padded, lengths (B,) -> (B, T, D), anything on padding.

    states (B, T, D), where given: what the layers below `depth` made of the tokens.
    """
    if not tokens.is_cpu:
        return model.trunk(tokens) if states is None else model.norm(model.blocks(states, model.span(tokens), depth))
    packed = pack(model, tokens, lengths)
    hidden = model.embed(packed.ids, packed.span) if states is None else states[packed.own][None]  # (1, N, D)
    hidden = model.norm(model.blocks(hidden, packed.span, depth))[0]  # (N, D)
    return hidden.index_select(0, packed.columns.flatten()).view(*tokens.shape, -1)


def saves(tokens: Tensor, lengths: Tensor) -> bool:
    """Does it pay to put these texts (B, T) of these lengths (B,) one after the other? On a CPU, where few enough are left
    of the tokens without padding and what neighbours begin with in common: many small attentions cost something, too.
    """
    if not tokens.is_cpu:
        return False
    common = alike(tokens[:-1], tokens[1:], lengths[:-1], lengths[1:])
    left = lengths.sum() - torch.where(common >= LEAST_SHARED, common, 0).sum()
    return int(left) <= MOST_LEFT * tokens.numel()


def states_between(model: Transformer, tokens: Tensor, lengths: Tensor, depths: Iterable[int]) -> dict[int, Tensor]:
    """Hidden states above so many layers, without the final norm: (B, T, D) each, anything on padding. On a CPU."""
    packed = pack(model, tokens, lengths)
    hidden, states, done = model.embed(packed.ids, packed.span), {}, 0
    for depth in sorted(depths):
        hidden, done = model.blocks(hidden, packed.span, done, depth), depth
        states[depth] = hidden[0].index_select(0, packed.columns.flatten()).view(*tokens.shape, -1)
    return states


def last_states(model: Transformer, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Hidden state of the last real token: tokens (B, T) right-padded, lengths (B,) -> (B, D).

    Nobody reads what the last layer would make of the other tokens: it gives keys and values for them, and no more.
    """
    if not tokens.is_cpu:
        return model.trunk(tokens)[torch.arange(len(tokens), device=tokens.device), lengths - 1]
    packed = pack(model, tokens, lengths)
    hidden = model.embed(packed.ids, packed.span)
    hidden = model.blocks(hidden, packed.span, 0, len(model.layers) - 1)  # (1, N, D)
    return model.norm(model.layers[-1](hidden, packed.span, packed.ends))[0]


def attend_apart(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: None,
    scale: float | None,
    softcap: float | None,
    sizes: list[int],
    shared: list[int],
    last: bool = False,
) -> Tensor:
    """`attend` of every text to itself: k and v (1, G, N, K), q (1, H, N, K), or (1, H, B, K) of the last tokens.

    sizes: tokens of every text that stand in the row; shared: those that come before them, and stand at the beginning of
    the last text before that shares nothing.
    """
    out, first = [], None
    texts = zip(q.split(1 if last else sizes, 2), k.split(sizes, 2), v.split(sizes, 2))
    for (own_q, own_k, own_v), size, common in zip(texts, sizes, shared):
        mask, keys, values = None, own_k, own_v
        if common:
            keys, values = (torch.cat((x[:, :, :common], y), 2) for x, y in zip(first, (own_k, own_v)))
            if not last:
                mask = torch.ones(size, common + size, dtype=torch.bool, device=q.device).tril(common)
        else:
            first = own_k, own_v
        out.append(attend(own_q, keys, values, mask, scale, softcap, causal=not last))
    return torch.cat(out, 2)


class Packed(NamedTuple):
    """Texts (B, T) one after the other."""

    ids: Tensor  # (1, N)
    span: Span
    own: Tensor  # (B, T) bool: the N tokens that stand in it, not padding, and not what is there for another row
    columns: Tensor  # (B, T) where every token stands, 0 for padding
    ends: Tensor  # (B,) where the last of each text does


def pack(model: Transformer, tokens: Tensor, lengths: Tensor) -> Packed:
    if int(lengths.max()) > model.config.context:
        raise ValueError(
            f"a sequence of {int(lengths.max())} tokens exceeds the model's context of {model.config.context}"
        )
    shared = common_beginnings(tokens, lengths)
    t = torch.arange(tokens.shape[1])
    own = (t >= shared[:, None]) & (t < lengths[:, None])  # (B, T) what is computed for this row
    sizes = lengths - shared
    start = sizes.cumsum(0) - lengths  # (B,) column of a row's first token, were it not shared
    columns = torch.where(t < shared[:, None], start[first_of(shared)][:, None], start[:, None]) + t  # (B, T)
    columns = torch.where(t < lengths[:, None], columns, 0)
    positions = t.expand_as(tokens)[own][None]  # (1, N)
    apart = partial(attend_apart, sizes=sizes.tolist(), shared=shared.tolist())
    span = Span(positions, model.rotations(positions), attend=apart)
    return Packed(tokens[own][None], span, own, columns, sizes.cumsum(0) - 1)


def common_beginnings(tokens: Tensor, lengths: Tensor) -> Tensor:
    """How many tokens every row begins with that the last row before it that shares nothing begins with too. (B,)

    0 where that does not pay, and for a row that the next one shares more with than itself with that one.
    """
    shared, first = torch.zeros_like(lengths), 0
    if len(tokens) > 1:
        after = [*alike(tokens[:-1], tokens[1:], lengths[:-1], lengths[1:]).tolist(), 0]  # with the next row
    for i in range(1, len(tokens)):
        same = int(alike(tokens[first], tokens[i], lengths[first], lengths[i]))
        if same >= LEAST_SHARED and same >= after[i]:
            shared[i] = same
        else:
            first = i
    return shared


def alike(a: Tensor, b: Tensor, a_lengths: Tensor, b_lengths: Tensor) -> Tensor:
    """How many tokens two texts begin with in common, the last of either aside, which is its own. (., T) -> (.)"""
    return torch.minimum((a == b).long().cumprod(-1).sum(-1), torch.minimum(a_lengths, b_lengths) - 1)


def first_of(shared: Tensor) -> Tensor:
    """Which row each shares its beginning with: itself, or the last before it that shares nothing. (B,) -> (B,)"""
    rows = torch.arange(len(shared))
    return torch.where(shared == 0, rows, 0).cummax(0).values
