"""Records -> tokens, in one place: a prompt as a policy is given it, and answers apart from it, as a policy writes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data.chat import Chat
from data.examples import Encoded
from data.records import Message, Record
from data.tokenizer import Tokenizer


class Encoder:
    """encode(record) -> its tokens. chat: what renders conversations; None writes them as plain text.

    prompt_tokens: so many first tokens of a text without a prompt become its prompt (texts that are no longer keep none).
    """

    def __init__(self, tokenizer: Tokenizer, chat: Chat | None = None, prompt_tokens: int = 0):
        self.tokenizer, self.chat, self.prompt_tokens = tokenizer, chat, prompt_tokens
        self._start, self._eos = (np.array([i], np.uint32) for i in (tokenizer.start, tokenizer.eos))

    def encode(self, record: Record) -> Encoded:
        """ValueError, with the reason, for a conversation that the template does not take."""
        if self.chat is not None and not isinstance(record.prompt, str):
            return self._conversation(record)
        prompt = record.prompt if isinstance(record.prompt, str) else plain(record.prompt)
        if prompt:
            answers = [self._ended(self.tokenizer.encode_array(answer, "text")) for answer in record.answers]
            return Encoded(np.concatenate([self._start, self.tokenizer.encode_array(prompt)]), answers, None, record)
        texts = [self.tokenizer.encode_array(answer) for answer in record.answers]
        if self.prompt_tokens and len(texts) == 1 and len(texts[0]) > self.prompt_tokens:
            return self._cut(record, texts[0])
        return Encoded(self._start, [self._ended(text) for text in texts], None, record)

    def _ended(self, ids: np.ndarray) -> np.ndarray:
        return np.concatenate([ids, self._eos])

    def _conversation(self, record: Record) -> Encoded:
        if not record.answers:
            rendered = self.chat.encode(record.prompt)
            return Encoded(rendered.prompt, [], rendered.trained, record)
        rendered = self.chat.encode_answers(record.prompt, record.answers)
        prompt = rendered[0].prompt
        return Encoded(prompt, [one.answer for one in rendered], rendered[0].trained[: len(prompt)], record)

    def _cut(self, record: Record, ids: np.ndarray) -> Encoded:
        """A text in two: the record too, if the border is one between characters."""
        first, rest = ids[: self.prompt_tokens], ids[self.prompt_tokens :]
        (text,), prompt = record.answers, self.tokenizer.decode(first)
        if text.startswith(prompt) and len(prompt) < len(text):
            record = replace(record, prompt=prompt, answers=(text[len(prompt) :],))
        return Encoded(np.concatenate([self._start, first]), [self._ended(rest)], None, record)


def plain(messages: list[Message]) -> str:
    """A conversation as plain text: what was said, a blank line after each turn."""
    return "".join(f"{message['content']}\n\n" for message in messages)
