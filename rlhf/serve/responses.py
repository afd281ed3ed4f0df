"""POST /v1/responses, thin: text in, text out. A request becomes that of a chat; its answer is written in the form of this
endpoint, whole or as the events that OpenAI's clients read (platform.openai.com/docs/api-reference/responses).

Nothing is stored: what refers to an earlier response, or to a conversation on the server, is refused by name.
"""

import time

from data.chat import Chat
from data.tokenizer import Tokenizer
from rlhf.serve.answers import Writer
from rlhf.serve.protocol import ApiError, Call, Limits, check_unsupported, parse_chat, take, text
from rlhf.serve.scheduler import Token

LOGPROBS = "message.output_text.logprobs"  # of `include`
OURS = ("input", "instructions", "text", "max_output_tokens", "include", "stream_options", "metadata", "truncation")
UNTAKEN = {  # and at what values they change nothing
    **dict.fromkeys(("previous_response_id", "conversation", "messages", "max_tokens", "max_completion_tokens"), ()),
    **dict.fromkeys(("background", "logprobs"), (False,)),
    "prompt": ({},),
    "truncation": ("disabled",),
    "response_format": (),  # it is text.format here
    "n": (1,),
}
PARAMETERS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
}  # a chat's name


def parse_responses(body: dict, tokenizer: Tokenizer, chat: Chat | None, limits: Limits) -> Call:
    """The one request of a body. ApiError for what is not supported, in the names of this endpoint."""
    check_unsupported(body, UNTAKEN)
    take(body, "max_output_tokens", int, None, 1, limits.max_tokens)
    include, form = body.get("include") or [], take(body, "text", dict, {})
    for key, value in take(body, "metadata", dict, {}).items():  # the answer repeats it
        for what, name in ((key, "a name of metadata"), (value, f"metadata.{key:.40}")):
            text(what, name, "metadata")
    if not isinstance(include, list):
        raise ApiError(400, "include must be a list", "include")
    if body.get("top_logprobs") and LOGPROBS not in include:
        raise ApiError(400, f"top_logprobs has no effect without {LOGPROBS} in include", "top_logprobs")
    as_chat = {name: value for name, value in body.items() if name not in OURS}
    as_chat |= {"messages": messages_of(body), "max_completion_tokens": body.get("max_output_tokens")}
    as_chat |= {"logprobs": LOGPROBS in include, "response_format": format_of(form), "verbosity": form.get("verbosity")}
    try:
        return parse_chat(as_chat, tokenizer, chat, limits)
    except ApiError as error:
        error.param = PARAMETERS.get(error.param, error.param)
        raise


def format_of(form: dict) -> dict | None:
    """text.format, as a chat has it in response_format."""
    given = take(form, "format", dict)
    if given is None or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


def messages_of(body: dict) -> list[dict]:
    """Instructions and input as a chat's messages; "developer" is what "system" is called here."""
    given, messages = body.get("input"), []
    if (instructions := take(body, "instructions", str)) is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ApiError(400, "input must be a text, or a list of at least one message", "input")
    for at, item in enumerate(given):
        where = f"input[{at}]"
        if not isinstance(item, dict) or item.get("type", "message") != "message":
            raise ApiError(
                400, f"{where} must be a message with role and content; other items are not supported", "input"
            )
        role, content = text(item.get("role"), f"{where}.role", "input"), item.get("content")
        if isinstance(content, list):
            kinds = ("input_text", "output_text", "text")
            if not all(isinstance(part, dict) and part.get("type") in kinds for part in content):
                raise ApiError(400, f"{where}.content has parts other than text, which are not supported", "input")
            content = "".join(text(part.get("text"), f"{where}.content", "input") for part in content)
        content = text(content, f"{where}.content", "input")
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    return messages


class ResponsesWriter:
    """A call's answer, as `Writer` is of chats; there is one text."""

    LAST = b""

    def __init__(self, call: Call, tokenizer: Tokenizer, name: str, identity: str, body: dict):
        self.inner, self.body, self.created = Writer(call, tokenizer, name, identity), body, time.time()
        self.identity, self.item, self.name = f"resp_{identity}", f"msg_{identity}", name
        self.text, self.tokens, self.sent = "", [], 0

    def logprobs(self, tokens: list[Token]) -> list[dict]:
        if not self.inner.call.logprobs:
            return []
        return [listed(self.inner.chat_logprob(token)) for token in tokens]

    def part(self) -> dict:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs(self.tokens)}

    def message(self, status: str) -> dict:
        content = [] if status == "in_progress" else [self.part()]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def response(self, status: str) -> dict:
        sampling, body = self.inner.call.requests[0].sampling, self.body
        going, cut = status == "in_progress", status == "incomplete"
        usage = self.inner.usage()
        counts = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        return {
            "id": self.identity, "object": "response", "created_at": self.created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.get("instructions"), "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") or {}, "model": self.name, "output": [] if going else [self.message(status)],
            "parallel_tool_calls": True, "previous_response_id": None, "store": False,
            "temperature": sampling.temperature, "text": {"format": {"type": "text"}} | (body.get("text") or {}),
            "tool_choice": "none", "tools": [], "top_p": sampling.top_p, "truncation": "disabled",
            "usage": None if going else counts,
        }  # fmt: skip

    def event(self, kind: str, **fields) -> dict:
        self.sent += 1
        return {"type": f"response.{kind}", "sequence_number": self.sent - 1} | fields

    def within(self, kind: str, **fields) -> dict:
        """An event of the one part of the one message."""
        return self.event(kind, item_id=self.item, output_index=0, content_index=0, **fields)

    def opening(self) -> list[dict]:
        return [self.event(kind, response=self.response("in_progress")) for kind in ("created", "in_progress")]

    def begin(self, index: int) -> list[dict]:
        item = self.event("output_item.added", output_index=0, item=self.message("in_progress"))
        return [item, self.within("content_part.added", part=self.part())]

    def piece(self, index: int, text: str, tokens: list[Token]) -> list[dict]:
        self.text, self.tokens = self.text + text, self.tokens + tokens
        return [self.within("output_text.delta", delta=text, logprobs=self.logprobs(tokens))]

    def end(self, index: int, finish: str) -> list[dict]:
        status = "incomplete" if finish == "length" else "completed"
        return [
            self.within("output_text.done", text=self.text, logprobs=self.logprobs(self.tokens)),
            self.within("content_part.done", part=self.part()),
            self.event("output_item.done", output_index=0, item=self.message(status)),
            self.event(status, response=self.response(status)),
        ]

    def closing(self) -> list[dict]:
        return []

    def failed(self, error: ApiError) -> dict:
        about = {"code": error.code or "server_error", "message": error.message, "param": error.param}
        return self.event("error", **about) | {"type": "error"}

    def whole(self, texts: list[str], tokens: list[list[Token]], finishes: list[str]) -> dict:
        (self.text,), (self.tokens,) = texts, tokens
        return self.response("incomplete" if finishes[0] == "length" else "completed")


def listed(logprob: dict) -> dict:
    """A token's entry; this endpoint has no null for bytes."""
    top = [listed(one) for one in logprob.get("top_logprobs", ())]
    return logprob | {"bytes": logprob["bytes"] or []} | ({"top_logprobs": top} if "top_logprobs" in logprob else {})
