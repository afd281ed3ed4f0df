"""Texts without padding: one after the other in a single row, each attending to itself alone.

    hidden = text_states(model, tokens, lengths)  # (B, T, D), as model.trunk(tokens) where tokens are real
    last = last_states(model, tokens, lengths)  # (B, D), of the last real token alone

Linear layers and norms then see real tokens only, and what rows 2i and 2i + 1 (the sides of a pair) begin with in common is
computed once. On a GPU many small attentions cost more than padding does: there the rows stay padded.
"""

import torch
from torch import Tensor

from model.transformer import Packed, Span, Transformer

LEAST_SHARED = 16  # tokens of a common beginning from which on it pays


def text_states(model: Transformer, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Hidden states after the final norm: tokens (B, T) right-padded, lengths (B,) -> (B, T, D), anything on padding."""
    if not tokens.is_cpu:
        return model.trunk(tokens)
    ids, span, columns = pack(model, tokens, lengths)
    hidden = model.norm(model.blocks(model.embed(ids, span), span))[0]  # (N, D)
    return hidden.index_select(0, columns.flatten()).view(*tokens.shape, -1)


def last_states(model: Transformer, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Hidden state of the last real token: tokens (B, T) right-padded, lengths (B,) -> (B, D).

    Nobody reads what the last layer would make of the other tokens: it gives keys and values for them, and no more.
    """
    if not tokens.is_cpu:
        return model.trunk(tokens)[torch.arange(len(tokens), device=tokens.device), lengths - 1]
    ids, span, _ = pack(model, tokens, lengths)
    hidden = model.blocks(model.embed(ids, span), span, 0, len(model.layers) - 1)  # (1, N, D)
    span.packed.ends = torch.tensor(span.packed.sizes).cumsum(0) - 1
    return model.norm(model.blocks(hidden, span, len(model.layers) - 1))[0]


def pack(model: Transformer, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Span, Tensor]:
    """ids (1, N) of all texts, their span, and the column (B, T) of every token in it; column 0 for padding."""
    if int(lengths.max()) > model.config.context:
        raise ValueError(
            f"a sequence of {int(lengths.max())} tokens exceeds the model's context of {model.config.context}"
        )
    shared = common_beginnings(tokens, lengths)
    t = torch.arange(tokens.shape[1])
    own = (t >= shared[:, None]) & (t < lengths[:, None])  # (B, T) what is computed for this row
    sizes = lengths - shared
    start = sizes.cumsum(0) - lengths  # (B,) column of a row's first token, were it not shared
    columns = torch.where(t < shared[:, None], start.roll(1)[:, None], start[:, None]) + t  # (B, T)
    columns = torch.where(t < lengths[:, None], columns, 0)
    packed = Packed(sizes.tolist(), shared.tolist())
    positions = t.expand_as(tokens)[own][None]  # (1, N)
    return tokens[own][None], Span(positions, model.rotations(positions), packed=packed), columns


def common_beginnings(tokens: Tensor, lengths: Tensor) -> Tensor:
    """How many tokens row 2i + 1 begins with that row 2i begins with too; 0 for row 2i and where it does not pay. (B,)"""
    even = slice(0, len(tokens) // 2 * 2, 2)
    same = (tokens[even] == tokens[1::2]).long().cumprod(1).sum(1)
    same = torch.minimum(same, torch.minimum(lengths[even], lengths[1::2]) - 1)  # the last token is a row's own
    shared = torch.zeros_like(lengths)
    shared[1::2] = torch.where(same >= LEAST_SHARED, same, 0)
    return shared
