"""Conversations -> token ids, through the chat template that a model brings, or ChatML for our own.

A template is a program of a stranger (jinja2, in its sandbox) that writes control tokens and messages into one text.
It is followed as it writes (data/templates.py), so it is known which control tokens come from the template, and only
those become tokens: a user who types "<|im_end|>" has typed ten characters. The text is that of HF's
`apply_chat_template`, and for users who type no control tokens the ids are too.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from data.beside import SPACE_BEFORE, SPACE_BEHIND
from data.templates import Rendered, render
from data.tokenizer import Tokenizer

CHATML = (  # for models without a template; the same as SmolLM2's without its system message
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Segment(NamedTuple):
    """A stretch of a conversation."""

    ids: list[int]
    trainable: bool  # the assistant's words and the token that ends them


class Stretch(NamedTuple):
    """The same in a text: characters from start to stop."""

    start: int
    stop: int
    trainable: bool


class Turn(NamedTuple):
    """A turn of the assistant."""

    asked: Rendered  # the conversation up to where the answer begins
    answered: Rendered  # with the answer
    content: object


class Exchange(NamedTuple):
    """A conversation as tokens: what a policy reads, what it then writes, and which of both are the assistant's."""

    prompt: list[int]  # the history, up to where the answer begins
    answer: list[int]  # what the policy writes, with the token that ends it; empty where no answer was given
    trained: list[bool]  # of prompt and answer together: True where the assistant wrote it, in earlier turns too


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
        if not isinstance(self.source, str):
            raise ValueError(f"the chat template is {self.source!r:.60}; a text was expected")
        render(self.source, [], {}, [], [])  # it compiles
        self._control = tuple(tokenizer.control)
        self.sha256 = hashlib.sha256(self.source.encode()).hexdigest()

    def encode(self, messages: Sequence[dict], answer: str | None = None) -> Exchange:
        """The tokens of a history, [{"role": "user", "content": ...}, ...], and of the answer that follows it.

        The prompt is the history rendered up to where the answer begins, as a policy is given it (`render` with
        add_generation_prompt). The answer is encoded apart, as a policy writes it, and ends with the token at which it
        stops; what the template writes behind that (the newline after <|im_end|>) belongs to neither. Earlier answers
        are encoded apart too, so that the trained tokens of every turn are those that a policy would write.
        ValueError where the template shows the answer otherwise than as a continuation of the prompt.
        """
        if answer is not None:
            return self.encode_answers(messages, [answer])[0]
        prompt = self.segments(messages, add_generation_prompt=True)
        return Exchange(flat(prompt), [], [segment.trainable for segment in prompt for _ in segment.ids])

    def encode_answers(self, messages: Sequence[dict], answers: Sequence[str]) -> list[Exchange]:
        """`encode` of several answers to one history, whose tokens they share."""
        found, prompt = [], None
        for answer in answers:
            _, turns = self._turns([*messages, {"role": "assistant", "content": answer}])
            whole, shown = turns[-1].answered, stretches(turns[-1].answered, turns)
            if prompt is None:
                prompt, cuts = turns[-1].asked, stretches(turns[-1].asked, turns[:-1])
                segments = self._segments(prompt, cuts)
                ids, trained = flat(segments), [segment.trainable for segment in segments for _ in segment.ids]
            last = max((k for k, stretch in enumerate(shown) if stretch.trainable), default=-1)
            same = shown[:last] == cuts and begins(whole, prompt)  # then so are the ids
            if last < 0 or not same and flat(self._segments(whole, shown[:last])) != ids:
                raise ValueError(
                    f"the chat template does not show the answer {answer!r:.60} as what follows its prompt: a policy would "
                    "learn to write what it is never asked for; give another template"
                )
            (own,) = self._segments(whole, shown[last : last + 1])
            found.append(Exchange(ids, own.ids, trained + [True] * len(own.ids)))
        return found

    def render(self, messages: Sequence[dict], add_generation_prompt: bool = False) -> list[int]:
        """Ids of a conversation, [{"role": "user", "content": ...}, ...], with the control tokens of the template.

        add_generation_prompt: end where the assistant's answer begins. bos is in it if the template writes it.
        """
        messages = self._with_system(messages)
        (whole,) = self._rendered(messages, [(len(messages), add_generation_prompt)])
        return self._ids(whole, 0, len(whole.text))

    def begin(self, messages: Sequence[dict], words: str) -> list[int]:
        """Ids of a history and of an answer that is begun with these words, up to where it goes on.

        Spaces around the words are the template's to keep or drop. ValueError where it does not show them.
        """
        whole, turns = self._turns([*messages, {"role": "assistant", "content": words}])
        start, text = len(turns[-1].asked.text), whole.text
        stop = max((first for first, _ in whole.control if first >= start), default=len(text))
        at = text.rfind(words, start, stop)
        words = words if at >= 0 else words.strip()
        at = text.rfind(words, start, stop)
        if at < 0 or not begins(whole, turns[-1].asked):
            raise ValueError(f"the chat template does not show the answer that begins with {words!r:.60}")
        return self._ids(whole, 0, start) + self._ids(whole, start, at + len(words))

    def segments(self, messages: Sequence[dict], add_generation_prompt: bool = False) -> list[Segment]:
        """The conversation in stretches, for a loss on the assistant's words and the tokens that end them alone.

        Each answer is encoded on its own, as it is when a model writes it. An answer that the template shows otherwise
        once the conversation goes on (Qwen3 drops thoughts of earlier turns) is not trained on, unless it is the last.
        """
        whole, turns = self._turns(messages, add_generation_prompt)
        return self._segments(whole, stretches(whole, turns))

    def stop_ids(self) -> set[int]:
        """Ids that end an answer: eos, and the control token that the template writes after one."""
        return {self.tokenizer.eos, self.end}

    @cached_property
    def end(self) -> int:
        """The token that ends an answer in the data: the template's, eos where it writes none."""
        *_, answer = filter(
            lambda segment: segment.trainable,
            self.segments([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]),
        )
        last = answer.ids[-1]
        return last if last in self.tokenizer.control.values() else self.tokenizer.eos

    def _with_system(self, messages: Sequence[dict]) -> Sequence[dict]:
        if self.system is None or messages and messages[0].get("role") == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def _turns(self, messages: Sequence[dict], add_generation_prompt: bool = False) -> tuple[Rendered, list[Turn]]:
        """The whole conversation, and every turn of the assistant in it, each as the template shows it."""
        messages = self._with_system(messages)
        answers = [k for k, message in enumerate(messages) if message.get("role") == "assistant"]
        views = [view for k in answers for view in ((k, True), (k + 1, False))]
        views.append((len(messages), add_generation_prompt))
        different = list(dict.fromkeys(views))
        rendered = dict(zip(different, self._rendered(messages, different)))
        return rendered[views[-1]], [
            Turn(rendered[k, True], rendered[k + 1, False], messages[k]["content"]) for k in answers
        ]

    def _rendered(self, messages: Sequence[dict], views: Sequence[tuple[int, bool]]) -> list[Rendered]:
        for message in messages:
            check_message(message)
        return render(self.source, self._control, self.tokenizer.special, messages, views)

    def _segments(self, whole: Rendered, parts: Sequence[Stretch]) -> list[Segment]:
        return [Segment(self._ids(whole, start, stop), trainable) for start, stop, trainable in parts]

    def _ids(self, rendered: Rendered, start: int, stop: int) -> list[int]:
        """Ids of the characters from start to stop, in which only the template's control tokens are some."""
        text, added = rendered.text, self.tokenizer.added
        ids, after = [], "text" if start else "nothing"
        nearest = max(bisect_left(rendered.control, (start,)) - 1, 0)  # what stands further before touches nothing
        for first, last in rendered.control[nearest:]:
            token = text[first:last]
            eats = added[token] if token in added else None
            if start <= first and last <= stop:
                stretch = text[start:first]
                if eats and eats.lstrip:
                    stretch = stretch[: SPACE_BEFORE.search(stretch).start()]
                ids += self.tokenizer.encode(stretch, after)
                ids.append(self.tokenizer.control[token])
            elif last > start:
                break
            end = SPACE_BEHIND.match(text, last).end() if eats and eats.rstrip else last
            if end >= start:
                start, after = min(end, stop), "token"
        return ids + self.tokenizer.encode(text[start:stop], after)


def flat(segments: Sequence[Segment]) -> list[int]:
    return [i for segment in segments for i in segment.ids]


def stretches(whole: Rendered, turns: Sequence[Turn]) -> list[Stretch]:
    """The text cut at the assistant's words, as far as they are what a policy would write there."""
    found, done = [], 0
    for asked, answered, content in turns:
        begin = len(asked.text)
        if begins(answered, asked) and begins(whole, answered) and begin >= done:
            stop = end_of_answer(answered, begin, content)
            found += [Stretch(done, begin, False), Stretch(begin, stop, True)]
            done = stop
    found.append(Stretch(done, len(whole.text), False))
    return [stretch for stretch in found if stretch.start < stretch.stop]


def begins(whole: Rendered, part: Rendered) -> bool:
    """Does a rendering begin with another, its control tokens too?"""
    return whole.text.startswith(part.text) and whole.control[: len(part.control)] == part.control


def end_of_answer(answered: Rendered, begin: int, content) -> int:
    """Where a policy stops that writes an answer from `begin` on: behind the first control token after its words.

    Where the template begins the answer with other words than its content, behind the last one; without any, at the end.
    """
    shown, words = answered.text[begin:], content.strip() if isinstance(content, str) else "\0"
    told = len(shown) - len(shown.lstrip()) + len(words) if shown.lstrip().startswith(words) else 0
    behind = [last for first, last in answered.control if first >= begin + told]
    return (behind[0] if told else behind[-1]) if behind else len(answered.text)


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


def check_template(tokenizer: Tokenizer, template: str | None, where: str) -> set[int]:
    """The ids that end an answer of data rendered with the template of this sha256; none for plain text.

    ValueError where the model at `where` has another template: it would be asked in a form that it does not know.
    """
    if template is None:
        return set()
    chat = Chat(tokenizer)
    if chat.sha256 != template:
        raise ValueError(
            f"the data were rendered with the chat template {template[:12]}, {where} has {chat.sha256[:12]}: prepare them "
            "again with its tokenizer (--tokenizer), or fine-tune it on them first (train_lm.py --init)"
        )
    return chat.stop_ids()


def check_message(message: dict) -> None:
    """ValueError unless it is {"role": text, "content": text or parts}, and all its texts have bytes."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        raise ValueError(f"message {message!r:.100}: an object with a role and content was expected")
    try:
        if list(message) == ["role", "content"] and isinstance(message["content"], str):
            message["role"].encode(), message["content"].encode()
        else:
            json.dumps(message, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError(f"message {message!r:.100} holds half a surrogate pair, which has no bytes") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a message has no form in JSON: {error!s:.100}") from None
