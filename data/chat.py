"""Conversations -> token ids, through the chat template that a model brings, or ChatML for our own.

A template is a program of a stranger (jinja2, in its sandbox) that writes control tokens and messages into one text.
Here the messages pass through it as `Held` texts: its code sees them, its output gets an unguessable mark for each. So
it is known which characters come from the template, and only those can become control tokens: a user who types
"<|im_end|>" has typed ten characters. For everyone else the ids are those of HF's `apply_chat_template`.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.tokenizer import Tokenizer

CHATML = (  # for models without a template; the same as SmolLM2's without its system message
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MOST_PIECES, LONGEST_PIECE = 2**20, 2**24  # of what a template writes; a long conversation has some thousand pieces


class Segment(NamedTuple):
    """A stretch of a conversation."""

    ids: list[int]
    trainable: bool  # the assistant's words and the token that ends them


class Encoded(NamedTuple):
    """A conversation as tokens: what a policy reads, what it then writes, and which of both are the assistant's."""

    prompt: list[int]  # the history, up to where the answer begins
    answer: list[int]  # what the policy writes, with the token that ends it; empty where no answer was given
    trained: list[bool]  # of prompt and answer together: True where the assistant wrote it, in earlier turns too


class Held(str):
    """Someone's text on its way through a template: to the template's code it is `_text`, in its output it is a mark."""

    def __new__(cls, text: str, mark: str, held: list[str]):
        self = super().__new__(cls, f"{mark}{len(held)};")
        self._text, self._mark, self._held = text, mark, held
        held.append(text)
        return self

    def __str__(self) -> str:
        return self

    def __iter__(self):
        return iter(self._hold(list(self._text)))

    def _hold(self, value):
        if isinstance(value, (list, tuple)):
            return [self._hold(item) for item in value]
        return Held(value, self._mark, self._held) if isinstance(value, str) else value


def _seen(name: str):
    def method(self: Held, *args, **kwargs):
        args = [arg._text if isinstance(arg, Held) else arg for arg in args]
        return self._hold(getattr(self._text, name)(*args, **kwargs))

    return method


# everything that looks into a text or takes it apart works on the text; what builds a longer one works on the mark
for _name in "eq ne lt le gt ge hash len contains getitem".split():
    setattr(Held, f"__{_name}__", _seen(f"__{_name}__"))
for _name in set(dir(str)) - {"encode", "format", "format_map", "join", "maketrans"}:
    if not _name.startswith("_"):
        setattr(Held, _name, _seen(_name))


class Chat:
    """The template of a tokenizer. ValueError, in one line, for templates that do not compile, render or fit.

    system: the system message of every conversation that brings none; refused where the template does not show it.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, system: str | None = None):
        self.tokenizer, self.source, self.system = tokenizer, template or tokenizer.chat_template or CHATML, system
        lacking = [token for token in ("<|im_start|>", "<|im_end|>") if token not in tokenizer.control]
        if self.source == CHATML and lacking:
            raise ValueError(
                f"the tokenizer has no control token {lacking[0]}, which ChatML needs: a user could forge it; "
                "give a chat template, or train a tokenizer with control=['<|im_start|>', '<|im_end|>']"
            )
        self._template = compile_template(self.source)
        self.sha256 = hashlib.sha256(self.source.encode()).hexdigest()

    def encode(self, messages: Sequence[dict], answer: str | None = None) -> Encoded:
        """The tokens of a history, [{"role": "user", "content": ...}, ...], and of the answer that follows it.

        The prompt is the history rendered up to where the answer begins, as a policy is given it (`render` with
        add_generation_prompt). The answer is encoded apart, as a policy writes it, and ends with the token at which it
        stops; what the template writes behind that (the newline after <|im_end|>) belongs to neither. Earlier answers
        are encoded apart too, so that the trained tokens of every turn are those that a policy would write.
        ValueError where the template shows the answer otherwise than as a continuation of the prompt.
        """
        if answer is None:
            prompt = self.segments(messages, add_generation_prompt=True)
            ids = [i for segment in prompt for i in segment.ids]
            return Encoded(ids, [], [segment.trainable for segment in prompt for _ in segment.ids])
        segments = self.segments([*messages, {"role": "assistant", "content": answer}])
        last = max((k for k, segment in enumerate(segments) if segment.trainable), default=-1)
        prompt = self.encode(messages)
        if [i for segment in segments[: max(last, 0)] for i in segment.ids] != prompt.prompt:
            raise ValueError(
                f"the chat template does not show the answer {answer!r:.60} as what follows its prompt: a policy would "
                "learn to write what it is never asked for; give another template"
            )
        return Encoded(prompt.prompt, segments[last].ids, prompt.trained + [True] * len(segments[last].ids))

    def render(self, messages: Sequence[dict], add_generation_prompt: bool = False) -> list[int]:
        """Ids of a conversation, [{"role": "user", "content": ...}, ...], with the control tokens of the template.

        add_generation_prompt: end where the assistant's answer begins. bos is in it if the template writes it.
        """
        mark = new_mark()
        return self._ids(self._text(self._with_system(messages), add_generation_prompt, mark), mark)

    def segments(self, messages: Sequence[dict], add_generation_prompt: bool = False) -> list[Segment]:
        """The conversation in stretches, for a loss on the assistant's words and the tokens that end them alone.

        Each answer is encoded on its own, as it is when a model writes it. An answer that the template shows otherwise
        once the conversation goes on (Qwen3 drops thoughts of earlier turns) is not trained on, unless it is the last.
        """
        mark = new_mark()
        messages = self._with_system(messages)
        whole, stretches, done = self._text(messages, add_generation_prompt, mark), [], 0
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, answered = self._text(messages[:k], True, mark), self._text(messages[: k + 1], False, mark)
            if answered.startswith(prompt) and whole.startswith(answered) and len(prompt) >= done:
                last = answered.rfind(mark, len(prompt))  # what ends the answer; not the newline after <|im_end|>
                stop = answered.index(";", last) + 1 if last >= 0 else len(answered)
                stretches += [(whole[done : len(prompt)], False), (whole[len(prompt) : stop], True)]
                done = stop
        stretches.append((whole[done:], False))
        return [Segment(self._ids(text, mark), trainable) for text, trainable in stretches if text]

    def stop_ids(self) -> set[int]:
        """Ids that end an answer: eos, and the control token that the template writes after one."""
        *_, answer = filter(
            lambda segment: segment.trainable,
            self.segments([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]),
        )
        return {self.tokenizer.eos} | ({answer.ids[-1]} & set(self.tokenizer.control.values()))

    def _with_system(self, messages: Sequence[dict]) -> Sequence[dict]:
        if self.system is None or messages and messages[0].get("role") == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def _text(self, messages: Sequence[dict], add_generation_prompt: bool, mark: str) -> str:
        """The conversation as text, with a mark for each control token of the template."""
        held: list[str] = []
        names = {i: token for token, i in self.tokenizer.control.items()}
        special = {f"{name}_token": names.get(getattr(self.tokenizer, name), "") for name in ("bos", "eos", "pad")}
        held_messages = [hold_message(message, mark, held) for message in messages]
        try:
            pieces = []
            for piece in self._template.generate(
                messages=held_messages, add_generation_prompt=add_generation_prompt, tools=None, **special
            ):
                pieces.append(piece)
                if len(pieces) > MOST_PIECES or len(piece) > LONGEST_PIECE:
                    raise ValueError("it writes without end")
        except Exception as error:  # whatever a stranger's program does wrong
            what = restore(f"{type(error).__name__}: {error}", mark, held)
            raise ValueError(f"the chat template fails: {what:.300}") from None
        control = self.tokenizer.control
        spelled = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")
        return restore("".join(pieces), mark, held, lambda text: spelled.sub(lambda x: f"{mark}{control[x[0]]};", text))

    def _ids(self, text: str, mark: str) -> list[int]:
        ids = []
        for i, part in enumerate(re.split(mark + r"(\d+);", text)):
            ids += [int(part)] if i % 2 else self.tokenizer.encode(part)
        return ids


def open_chat(tokenizer: Tokenizer, template: str = "auto", system: str | None = None) -> Chat | None:
    """What --template= means: auto, the tokenizer's own template (or ChatML where it has its tokens); none; or a file.

    None for "none". ValueError for a system message that the template does not show, and for what Chat refuses.
    """
    if template == "none":
        return None
    source = None
    if template != "auto":
        try:
            source = Path(template).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--template={template} is neither auto, none nor a readable file: {error}") from None
    chat = Chat(tokenizer, source, system)
    if system:
        probe = [{"role": "user", "content": "?"}]
        if tokenizer.decode(chat.render(probe)).find(system.strip()) < 0:
            raise ValueError(f"the chat template does not show the system message {system!r:.60}; leave it out")
    return chat


def new_mark() -> str:
    """A character of the private use area and 128 random bits: no message contains it."""
    return f"\ue000{secrets.token_hex(16)}:"


def restore(text: str, mark: str, held: list[str], between=str) -> str:
    """A template's output with the held texts in the place of their marks, and `between` applied to everything else."""
    parts = re.split(mark + r"(\d+);", text)
    if any(mark[1:9] in part for part in parts):
        raise ValueError("the chat template takes messages apart in a way that is not supported")
    return "".join(held[int(part)] if i % 2 else between(part) for i, part in enumerate(parts))


def hold_message(message: dict, mark: str, held: list[str]) -> dict:
    """The message with every text in it held. ValueError unless it is {"role": text, "content": text or parts}."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        raise ValueError(f"message {message!r:.100}: an object with a role and content was expected")

    def hold(value):
        if isinstance(value, dict):
            return {key: hold(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [hold(item) for item in value]
        return Held(value, mark, held) if isinstance(value, str) else value

    return hold(message)


def compile_template(source: str):
    """A jinja2 template with what HF's environment offers. ValueError where it does not compile."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    if tuple(map(int, jinja2.__version__.split(".")[:3])) < (3, 1, 6):
        raise ValueError(f"jinja2 {jinja2.__version__} lets templates out of their sandbox; install 3.1.6 or newer")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    if not isinstance(source, str):
        raise ValueError(f"the chat template is {source!r:.60}; a text was expected")
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ValueError(f"the chat template does not compile: {error!s:.200}") from None
