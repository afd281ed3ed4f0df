"""Answers that are JSON: which tokens may follow, so that a text becomes what a schema asks for. llguidance (extra "schema")
knows it; here is what it is told of our tokenizers, and how a text goes through its grammar.
"""

import json
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import Tokenizer

INSTALL = "needs the extra schema: pip install -e '.[schema]'"
STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}  # json.dumps': one way to write it
MOST_PROPERTIES = 2000  # of all objects of a schema together: 0.3 s to compile, and the time grows with their square


class Grammar:
    """What a schema allows of a tokenizer's texts; ValueError, in one line, for a schema that llguidance does not take."""

    def __init__(self, schema: dict | bool, tokenizer: Tokenizer):
        llguidance = library()
        if (count := properties(schema)) > MOST_PROPERTIES:
            raise ValueError(f"has {count} properties; at most {MOST_PROPERTIES} are taken")
        # its own 2000 items end a text, with an error, in an object of 500 properties that may be left out
        limits = llguidance.LLParserLimits(max_items_in_row=50 * MOST_PROPERTIES, step_max_items=250 * MOST_PROPERTIES)
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=STYLE)
        self.matcher = llguidance.LLMatcher(vocabulary(tokenizer), grammar, log_level=0, limits=limits)
        first = self.matcher.deep_copy()  # some schemas show only then that they lead nowhere, or into too much
        first.compute_bitmask()
        if first.is_error():
            raise ValueError(said(first))

    def start(self) -> "Guide":
        return Guide(self.matcher.deep_copy())


def properties(schema) -> int:
    """How many properties the objects of a schema have, those within others included."""
    count, left = 0, [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            given = value.get("properties")
            count += len(given) if isinstance(given, dict) else 0
            left += value.values()
        elif isinstance(value, list):
            left += value
    return count


class Guide:
    """One text on its way through a grammar."""

    def __init__(self, matcher):
        self.matcher = matcher

    def allowed(self, size: int, stop_ids: Iterable[int]) -> Tensor:
        """Which tokens may follow, of a model with `size` of them: (size,) bool. The stop ids where the text is complete.

        ValueError where llguidance gives up: a text or schema beyond its limits.
        """
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        if self.matcher.is_error():
            raise ValueError(f"the schema leads no further: {said(self.matcher)}")
        some = torch.from_numpy(np.unpackbits(bits, bitorder="little")[:size]).bool()
        allowed = torch.zeros(size, dtype=torch.bool)  # a model may have rows for no token
        allowed[: len(some)] = some
        allowed[list(stop_ids)] = self.matcher.is_accepting()
        return allowed

    def push(self, token: int) -> None:
        self.matcher.consume_token(token)  # what goes wrong is said by the next `allowed`


class Words:
    """A tokenizer, as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, control = tokenizer, set(tokenizer.control.values())
        self.eos_token_id, self.bos_token_id, self.special_token_ids = tokenizer.eos, tokenizer.start, sorted(control)
        self.tokens = [b"" if i in control else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.ids = {data: i for i, data in enumerate(self.tokens) if data}

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that is forced, as the model would write it."""
        if not isinstance(text, str):
            raise TypeError("a text")  # so llguidance asks for no ids of bytes
        ids = self.tokenizer.encode(text, "text")
        if b"".join(self.tokens[i] for i in ids) != text.encode():  # a tokenizer that changes texts, to lower case say
            ids = self.spelled(text.encode())
        return ids

    def spelled(self, data: bytes) -> list[int]:
        """The longest token first; what no token begins is left out."""
        ids, longest = [], max(map(len, self.ids))
        while data:
            found = next((n for n in range(min(longest, len(data)), 0, -1) if data[:n] in self.ids), 0)
            ids += [self.ids[data[:found]]] if found else []
            data = data[found or 1 :]
        return ids


@lru_cache(maxsize=2)
def vocabulary(tokenizer: Tokenizer):
    llguidance = library()
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Words(tokenizer)))


def library():
    try:
        import llguidance
    except ImportError:
        raise ValueError(INSTALL) from None
    return llguidance


def said(matcher) -> str:
    """An error of llguidance in one line, without the state that it shows behind it."""
    return " ".join(matcher.get_error().partition("<state>")[0].split())[:300]
