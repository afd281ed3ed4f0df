"""Reward models of others: HF's sequence classifiers, asked in the tokens and the form that they were trained with.

A classifier that shares the policy's tokenizer (and its chat template, where the data are rendered with one) reads the
policy's tokens as they are. Another one is asked across a bridge: the response is decoded, put behind its prompt in the
classifier's own chat template, and encoded with the classifier's own tokenizer, as HF's pipeline would read that text.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.chat import Chat
from data.encoding import plain
from data.loader import cut, pad
from data.records import Record
from data.tokenizer import Tokenizer, load_tokenizer
from rlhf.infra.metrics import say
from rlhf.reward.files import load_classifier
from rlhf.reward.function import response_starts
from rlhf.reward.model import Classifier, Score


@dataclass(frozen=True)
class Reader:
    """How a classifier is given texts: its tokenizer, its chat template (None: conversations as plain text), its context."""

    model: Classifier
    tokenizer: Tokenizer
    chat: Chat | None

    @property
    def context(self) -> int:
        return self.model.model.config.context

    def text(self, text: str, ended: bool = True) -> list[int]:
        """Ids of a plain text, as HF's tokenizer makes them; of those that we exported, as they were trained.

        ended: it stops by itself, and was not cut off.
        """
        t = self.tokenizer
        if self.model.ours:
            return [t.start, *t.encode(text), *[t.eos] * ended]
        return [*[t.bos] * bool(t.add_bos), *t.encode(text)] or [t.start]

    def conversation(self, messages: list[dict], answer: str, ended: bool = True) -> list[int]:
        """Ids of a history and its answer, as `apply_chat_template` makes them of all of it."""
        if self.chat is None:
            return self.text(plain(messages) + answer, ended)
        if (
            self.model.ours
        ):  # trained on answers as a policy writes them, which stops before what the template writes behind
            encoded = self.chat.encode(messages, answer)
            return encoded.prompt + encoded.answer
        return self.chat.render([*messages, {"role": "assistant", "content": answer}])

    def fitted(self, ids: list[int]) -> np.ndarray:
        """What the context has room for: the end, behind the start token."""
        row = np.array(ids, np.int64)
        return row[cut(row, self.context, self.tokenizer.start)]


def open_reader(spec: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Reader:
    """The classifier at `spec`, with the tokenizer and the template that lie beside it."""
    model = load_classifier(spec, device, dtype)
    tokenizer = load_tokenizer(Path(spec))
    if (rows := model.model.config.vocab_size) < tokenizer.vocab_size:
        raise ValueError(f"{spec}: the tokenizer has {tokenizer.vocab_size} tokens, the model rows for {rows}")
    return Reader(model, tokenizer, Chat(tokenizer) if tokenizer.chat_template else None)


def score_of(
    spec: str,
    tokenizer: Tokenizer,
    template: str | None = None,
    device: torch.device | str = "cpu",
    records: Callable[[Tensor], list[Record]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Score, int | None]:
    """The classifier's score of the policy's tokens, and the longest row that it reads (None: any, the bridge cuts).

    tokenizer: of the policy; template: sha256 of the one that the data were rendered with; records: see `open_scorer`.
    Crossing the bridge is said in one line. ValueError where it leads nowhere: conversations of which only tokens are known.
    """
    reader = open_reader(spec, device, dtype)
    same_tokens = reader.tokenizer.fingerprint == tokenizer.fingerprint
    same_form = template is None or reader.chat is not None and reader.chat.sha256 == template
    if same_tokens and same_form:
        return lambda tokens, lengths, mask, rows=None: reader.model.score(tokens, lengths, mask), reader.context
    if template is not None and records is None:
        raise ValueError(
            f"{spec} has another tokenizer or chat template than the data: only their prompts can be told to it"
        )
    other = " and ".join(["another tokenizer"] * (not same_tokens) + ["another chat template"] * (not same_form))
    form = (
        "" if template is None else " in its chat template" if reader.chat else " as plain text, for it has no template"
    )
    say(
        f"{spec} has {other}: responses are decoded and encoded again{form}, cut from the left to its context of "
        f"{reader.context}",
        os.environ.get("RANK", "0") == "0",
    )
    return across(reader, tokenizer, template is not None, records), None


def across(
    reader: Reader, tokenizer: Tokenizer, chats: bool, records: Callable[[Tensor], list[Record]] | None
) -> Score:
    """The bridge: from the policy's tokens to texts, and from these to the classifier's tokens. chats: rows may be some."""

    def score(tokens: Tensor, lengths: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
        if chats and rows is None:
            raise ValueError("a reward model with another chat template was asked about prompts that are of no data")
        found = records(rows) if chats else [None] * len(tokens)
        ids = []
        for row, start, n, record in zip(
            tokens.tolist(), response_starts(lengths, mask).tolist(), lengths.tolist(), found
        ):
            ended = start < n and tokenizer.token_bytes(row[n - 1]) == b""  # a control token
            if record is None or isinstance(record.prompt, str):
                ids.append(reader.text(tokenizer.decode(row[:n]), ended))
            else:
                ids.append(reader.conversation(record.prompt, tokenizer.decode(row[start:n]), ended))
        theirs, their_lengths = (
            x.to(tokens.device) for x in pad([reader.fitted(x) for x in ids], reader.tokenizer.pad)
        )
        return reader.model.score(theirs, their_lengths, torch.ones_like(theirs, dtype=torch.bool))

    return score
