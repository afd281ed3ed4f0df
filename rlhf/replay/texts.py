"""Rows of tokens for people to read."""

from collections.abc import Iterable

from torch import Tensor

from data.tokenizer import Tokenizer


def rows_of(tokenizer: Tokenizer, tokens: Tensor, lengths: Tensor) -> list[dict]:
    """{"text", "tokens"} of every row: tokens (B, T), lengths (B,)."""
    rows = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist())]
    return [{"text": tokenizer.decode(row), "tokens": [tokenizer.decode([i]) for i in row]} for row in rows]


def parts_of(count: int, size: int) -> Iterable[slice]:
    """Slices of at most `size` out of `count` rows."""
    return (slice(first, first + size) for first in range(0, count, size))
