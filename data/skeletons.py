"""What a chat template makes of conversations of one shape, once for all of them: its own words, and where messages stand.

Most templates look at roles and copy contents, perhaps stripped. Rendered with contents that nobody can look into, such a
template shows where each of them stands, whatever it says. A template that looks into one (`in`, `==`, `if`, split,
length ...) has no skeleton, and is rendered for every conversation.
"""

from __future__ import annotations

import datetime
import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

from data.following import LONGEST_TEXT, PRIVATE, ROLES, Alphabet, compiled, following_environment, written

STRIPS = ("", "strip", "lstrip", "rstrip")  # what a template may do to a content
FIRST = 0xF0000  # of the characters that stand for contents, four of each: as it is, and stripped
MOST_MESSAGES = 200
MOST_PARTS = 10_000
TYPES = ("string", "mapping", "sequence", "iterable", "number", "integer", "float", "boolean", "none", "callable")
TYPES += ("defined", "undefined")  # tests that any text passes, or none
WHOLE = (
    "length",
    "count",
    "list",
    "first",
    "last",
    "default",
    "d",
    "string",
)  # filters that show a slot what they do to it


class Rendered(NamedTuple):
    """What a template makes of a conversation."""

    text: str  # HF's
    control: list[tuple[int, int]]  # start and end of each control token in it that the template itself wrote


# --- filled ---


def shape_of(messages: Sequence[dict]) -> tuple[str, ...] | None:
    """The roles of a conversation that is nothing but roles and texts; None for any other."""
    roles = []
    for message in messages:
        if list(message) != ["role", "content"] or message["role"] not in ROLES or type(message["content"]) is not str:
            return None
        roles.append(message["role"])
    return tuple(roles) if len(roles) <= MOST_MESSAGES else None


class Skeletons(NamedTuple):
    """Those of some views of a conversation of one shape."""

    views: list[list]  # of a view: (text, its control tokens), or (message, what is done to its content)
    clock: dict[str, str]  # what the template was told of the time, by the form in which it asked

    def fill(self, messages: Sequence[dict]) -> list[Rendered] | None:
        """What the template makes of these messages. None where it has to be asked: at another time of its clock, for an
        empty content, beside which two halves of a control token could meet, and for a text without end.
        """
        now = datetime.datetime.now() if self.clock else None
        if any(now.strftime(form) != told for form, told in self.clock.items()):
            return None
        contents, found = [message["content"] for message in messages], []
        for parts in self.views:
            pieces, control, at = [], [], 0
            for first, second in parts:
                if isinstance(first, str):
                    control += [(start + at, end + at) for start, end in second]
                    text = first
                else:
                    text = getattr(contents[first], second)() if second else contents[first]
                    if not text:
                        return None
                pieces.append(text)
                at += len(text)
                if at > LONGEST_TEXT:
                    return None
            found.append(Rendered("".join(pieces), control))
        return found


# --- made ---


class LooksInside(BaseException):
    """A template looks into a content. No Exception, so that nothing in jinja2 takes it for a property of the text."""


class Slots(Alphabet):
    """Texts that may be joined, stripped and written, and of which nothing can be known."""

    def __init__(self):
        self.private, self.Held = PRIVATE, slot_type(self)

    def real(self, value):
        raise LooksInside

    held = real

    def both(self, function, args, kwargs, looked_for=None):
        if function is operator.add and all(isinstance(arg, str) for arg in args):
            return self.kept(str.__add__(*args))
        raise LooksInside

    def stripped(self, slot: str, how: str) -> str:
        """A content without the space around it; of several joined texts nobody knows where it ends."""
        if str.__len__(slot) > 1 or (ord(slot) - FIRST) % len(STRIPS):
            raise LooksInside
        return self.Held(chr(ord(slot) + STRIPS.index(how)))


def slot_type(slots: Slots) -> type:
    class Slot(str):
        __slots__ = ()

        def __str__(self):
            return self

    def looks(self, *args, **kwargs):
        raise LooksInside

    def strips(how):
        def method(self, *args):
            return looks(self) if args else slots.stripped(self, how)

        return method

    hidden = (
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "contains",
        "hash",
        "len",
        "bool",
        "iter",
        "getitem",
        "repr",
        "format",
    )
    for name in (*hidden, "add", "radd", "mul", "rmul", "mod", "rmod"):
        setattr(Slot, f"__{name}__", looks)
    for name in set(dir(str)):
        if not name.startswith("_"):
            setattr(Slot, name, strips(name) if name in STRIPS else looks)
    return Slot


@functools.cache
def slots() -> Slots:
    return Slots()


@functools.cache
def tracing_environment() -> type:
    """The class of the environment in which contents are slots."""
    from jinja2 import nodes

    class TracingEnvironment(following_environment()):
        def __init__(self, slots: Slots):
            super().__init__(slots)
            self.clock: dict[str, str] = {}
            self.globals["strftime_now"] = self.tell

        def tell(self, form):
            if type(form) is not str:
                raise LooksInside
            return self.clock.setdefault(form, self.now.strftime(form))

        def _generate(self, source, *args, **kwargs):
            for compare in source.find_all(nodes.Compare):  # a < b in c would look without being seen
                if len(compare.ops) > 1 and any(op.op in ("in", "notin") for op in compare.ops):
                    raise LooksInside
            return super()._generate(source, *args, **kwargs)

        def followed(self, name, function):
            if name in WHOLE:
                return function
            careful = super().followed(name, function)
            if name != "trim":
                return careful

            @functools.wraps(function)
            def trim(value, *args, **kwargs):
                if self.alphabet.holds(value) and not args and not kwargs:
                    return value.strip()
                return careful(value, *args, **kwargs)

            return trim

        def seen(self, name, function):
            careful = super().seen(name, function)
            if name not in TYPES:
                return careful
            return lambda value: function("a text" if type(value) is self.alphabet.Held else value)

    return TracingEnvironment


def trace(source: str, special: dict, roles: Sequence[str], views: Sequence, now: datetime.datetime) -> dict | None:
    """Parts of each view, texts and [message, what is done to its content], and what the template was told of the time.

    None where the template looks into a content, or fails.
    """
    if PRIVATE.search("".join([source, *map(str, special.values())])):
        return None
    found = []
    try:
        template = compiled(source, tracing_environment(), slots())
        template.environment.now, template.environment.clock = now, {}
        Slot = slots().Held
        messages = [{"role": role, "content": Slot(chr(FIRST + len(STRIPS) * k))} for k, role in enumerate(roles)]
        for n, prompt in views:
            variables = special | {"add_generation_prompt": prompt, "tools": None, "documents": None}
            text, parts, done = written(template, variables | {"messages": messages[:n]}, 0), [], 0
            for match in PRIVATE.finditer(text):
                k, how = divmod(ord(match[0]) - FIRST, len(STRIPS))
                parts += [text[done : match.start()]] * (match.start() > done) + [[k, STRIPS[how]]]
                done = match.end()
            parts += [text[done:]] * (done < len(text))
            if len(parts) > MOST_PARTS:
                return None
            found.append(parts)
    except (LooksInside, ValueError):
        return None
    return {"views": found, "clock": template.environment.clock}
