"""Records -> tokens, in one place: a prompt as a policy is given it, and answers apart from it, as a policy writes them."""

from __future__ import annotations

from dataclasses import replace

from data.chat import Chat
from data.examples import Encoded
from data.records import Message, Record
from data.tokenizer import Tokenizer

ANCHOR = "\x01"  # a token by itself: no piece of a vocabulary joins it with what follows


class Encoder:
    """encode(record) -> its tokens. chat: what renders conversations; None writes them as plain text.

    prompt_tokens: so many first tokens of a text without a prompt become its prompt (texts that are no longer keep none).
    """

    def __init__(self, tokenizer: Tokenizer, chat: Chat | None = None, prompt_tokens: int = 0):
        self.tokenizer, self.chat, self.prompt_tokens = tokenizer, chat, prompt_tokens

    def encode(self, record: Record) -> Encoded:
        """ValueError, with the reason, for a conversation that the template does not take."""
        if self.chat is not None and not isinstance(record.prompt, str):
            return self._conversation(record)
        prompt = record.prompt if isinstance(record.prompt, str) else plain(record.prompt)
        start, eos = self.tokenizer.start, self.tokenizer.eos
        if prompt:
            answers = [[*continued(self.tokenizer, answer), eos] for answer in record.answers]
            return Encoded([start, *self.tokenizer.encode(prompt)], answers, None, record)
        texts = [self.tokenizer.encode(answer) for answer in record.answers]
        if self.prompt_tokens and len(texts) == 1 and len(texts[0]) > self.prompt_tokens:
            return self._cut(record, texts[0])
        return Encoded([start], [[*text, eos] for text in texts], None, record)

    def _conversation(self, record: Record) -> Encoded:
        if not record.answers:
            rendered = self.chat.encode(record.prompt)
            return Encoded(rendered.prompt, [], rendered.trained, record)
        rendered = self.chat.encode_answers(record.prompt, record.answers)
        prompt = rendered[0].prompt
        return Encoded(prompt, [one.answer for one in rendered], rendered[0].trained[: len(prompt)], record)

    def _cut(self, record: Record, ids: list[int]) -> Encoded:
        """A text in two: the record too, if the border is one between characters."""
        first, rest = ids[: self.prompt_tokens], ids[self.prompt_tokens :]
        (text,), prompt = record.answers, self.tokenizer.decode(first)
        if text.startswith(prompt) and len(prompt) < len(text):
            record = replace(record, prompt=prompt, answers=(text[len(prompt) :],))
        return Encoded([self.tokenizer.start, *first], [[*rest, self.tokenizer.eos]], None, record)


def continued(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids that add exactly `text` to a text that has begun: sentencepiece puts a space before what stands alone."""
    ids = tokenizer.encode(text)
    if b"".join(map(tokenizer.token_bytes, ids)) == text.encode():
        return ids
    before = len(tokenizer.encode(ANCHOR))
    return tokenizer.encode(ANCHOR + text)[before:]


def plain(messages: list[Message]) -> str:
    """A conversation as plain text: what was said, a blank line after each turn."""
    return "".join(f"{message['content']}\n\n" for message in messages)
