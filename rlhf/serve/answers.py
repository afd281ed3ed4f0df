"""OpenAI's answers, whole or in pieces: of chats and of completions. /v1/responses has its own in responses.py.

A writer is what http.Stream and Service.collect fill: `opening`, then of each text `begin`, `piece` and `end`, then `closing`
and LAST; or `whole`. All are dicts that become JSON.
"""

import time

from data.tokenizer import Detokenizer, Tokenizer
from rlhf.serve.protocol import ApiError, Call, token_texts
from rlhf.serve.scheduler import Token


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999."""
    return max(logprob, -9999.0)


class Writer:
    """One call's answer, whole or in pieces."""

    LAST = b"data: [DONE]\n\n"

    def __init__(self, call: Call, tokenizer: Tokenizer, name: str, identity: str):
        self.call, self.tokenizer = call, tokenizer
        self.control = {i: name for name, i in tokenizer.control.items()}
        prefix, self.kind = ("chatcmpl-", "chat.completion") if call.chat else ("cmpl-", "text_completion")
        self.identity, self.name, self.created = prefix + identity, name, int(time.time())
        self.offsets = [0] * len(call.requests)  # characters of each text so far
        self.sampled = [Detokenizer(tokenizer) for _ in call.requests]  # half a character adds none

    def head(self, kind: str) -> dict:
        """What every body of the answer begins with. Weights may have been exchanged since the request came: the fingerprint
        is of those that sampled, and null where its texts are of several.
        """
        begun = {request.weights for request in self.call.requests if request.weights is not None}
        fingerprint = begun.pop()[:16] if len(begun) == 1 else None
        head = {"id": self.identity, "object": kind, "created": self.created, "model": self.name}
        return head | {"system_fingerprint": fingerprint}

    def names(self, i: int) -> str:
        return self.control.get(i) or self.tokenizer.token_bytes(i).decode("utf-8", "replace")

    def usage(self) -> dict:
        prompt = sum(len(ids) - self.call.skip for ids in self.call.prompts)
        completion = sum(request.count for request in self.call.requests)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def logprobs(self, index: int, tokens: list[Token], prompt: bool = False) -> dict | None:
        if not self.call.logprobs:
            return None
        if self.call.chat:
            return {"content": [self.chat_logprob(token) for token in tokens], "refusal": None}
        wanted, names = self.call.requests[index].sampling.logprobs, [self.names(token.id) for token in tokens]
        ids = [token.id for token in tokens]
        pieces = token_texts(self.tokenizer, ids) if prompt else map(self.sampled[index].push, ids)
        offsets = []
        for piece in pieces:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(piece)
        top = []
        for token in tokens:
            if token.logprob is None or not wanted:
                top.append(None)
                continue
            found = {}
            for i, logprob in [*token.top, (token.id, token.logprob)]:
                found.setdefault(self.names(i), finite(logprob))  # the likeliest of those that are written alike
            top.append(found)
        return {
            "tokens": names,
            "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
            "top_logprobs": top if wanted else None,
            "text_offset": offsets,
        }

    def chat_logprob(self, token: Token) -> dict:
        def one(i: int, logprob: float) -> dict:
            data = self.tokenizer.token_bytes(i)
            return {"token": self.names(i), "logprob": finite(logprob), "bytes": list(data) or None}

        return one(token.id, token.logprob) | {"top_logprobs": [one(*pair) for pair in token.top]}

    def prompt(self, index: int) -> tuple[str, list[Token]]:
        """With echo: the prompt's text and tokens, without what we put before it."""
        if self.call.echo is None:
            return "", []
        return self.call.echo[index // self.call.n], self.call.requests[index].prompt_tokens[self.call.skip :]

    def whole(self, texts: list[str], tokens: list[list[Token]], finishes: list[str]) -> dict:
        choices = []
        for index, (text, some, finish) in enumerate(zip(texts, tokens, finishes)):
            choice = {"index": index, "finish_reason": finish}
            if self.call.token_ids:
                some = self.call.requests[index].sampled
                choice["token_ids"] = [token.id for token in some]
            if self.call.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
                choice["logprobs"] = self.logprobs(index, some)
            else:
                before, own = self.prompt(index)
                choice["text"] = before + text
                choice["logprobs"] = joined(self.logprobs(index, own, prompt=True), self.logprobs(index, some))
            choices.append(choice)
        return self.head(self.kind) | {"choices": choices, "usage": self.usage()}

    def opening(self) -> list[dict]:
        return []

    def begin(self, index: int) -> list[dict]:
        """A chat's choice opens with its role, a completion's with what it echoes."""
        text, tokens = self.prompt(index)
        return [self.chunk(index, text, tokens, None, first=True)] if self.call.chat or text or tokens else []

    def piece(self, index: int, text: str, tokens: list[Token]) -> list[dict]:
        return [self.chunk(index, text, tokens, None)]

    def end(self, index: int, finish: str) -> list[dict]:
        return [self.chunk(index, "", [], finish)]

    def closing(self) -> list[dict]:
        """With include_usage, the chunk after all choices."""
        kind = "chat.completion.chunk" if self.call.chat else "text_completion"
        return [self.head(kind) | {"choices": [], "usage": self.usage()}] if self.call.include_usage else []

    def failed(self, error: ApiError) -> dict:
        return error.body()

    def chunk(self, index: int, text: str, tokens: list[Token], finish: str | None, first: bool = False) -> dict:
        """A piece of a stream. first: the one that opens a choice."""
        choice = {"index": index, "finish_reason": finish}
        if self.call.chat:
            choice["delta"] = {"role": "assistant", "content": ""} if first else {"content": text} if text else {}
            choice["logprobs"] = self.logprobs(index, tokens) if tokens else None
        else:
            choice["text"] = text
            choice["logprobs"] = self.logprobs(index, tokens, prompt=first) if tokens or first else None
        kind = "chat.completion.chunk" if self.call.chat else "text_completion"
        usage = {"usage": None} if self.call.include_usage else {}
        return self.head(kind) | {"choices": [choice]} | usage


def joined(a: dict | None, b: dict | None) -> dict | None:
    if a is None or b is None:
        return a or b
    return {name: None if a[name] is None else a[name] + b[name] for name in a}
