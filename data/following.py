"""Templates in the environment of HF's `apply_chat_template`, and in one that follows messages through whatever it does.

Where a template looks into a message (`in`, split, title, tojson ...) it is shown the text itself, and its result is put into
the private alphabet again: see data/templates.py.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import types

LONGEST_TEXT = 2**24  # characters of a rendering beside what the messages hold
LOOKING = {"split", "rsplit", "partition", "rpartition", "strip", "lstrip", "rstrip", "removeprefix", "removesuffix"}
LOOKING |= {"replace"}  # methods that search their first argument
ROLES = {"system", "user", "assistant", "tool", "developer", "function", "ipython", "observation", "model", "critic"}
PRIVATE = re.compile("[\U000f0000-\U0010ffff]")  # planes 15 and 16: for private use, and hardly ever used


def written(template, variables: dict, size: int) -> str:
    """What the template writes of messages of that size. ValueError for whatever a stranger's program does wrong."""
    room, pieces = LONGEST_TEXT + 16 * size, []
    try:
        for piece in template.generate(**variables):
            pieces.append(piece)
            room -= str.__len__(piece) + 16  # an empty piece needs room too
            if room < 0:
                raise ValueError("it writes without end")
    except MemoryError:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the chat template fails: {what:.300}") from None
    return "".join(pieces)


@functools.lru_cache(16)
def compiled(source: str, kind: type, *settings):
    """A jinja2 template in an environment of that kind. ValueError where it does not compile."""
    import jinja2

    if tuple(map(int, jinja2.__version__.split(".")[:3])) < (3, 1, 6):
        raise ValueError(f"jinja2 {jinja2.__version__} lets templates out of their sandbox; install 3.1.6 or newer")
    try:
        return kind(*settings).from_string(source)
    except (jinja2.TemplateError, RecursionError, SyntaxError, OverflowError) as error:
        raise ValueError(f"the chat template does not compile: {' '.join(str(error).split()):.200}") from None


def compile_template(source: str, now: datetime.datetime | None = None):
    """A template in the environment that HF renders with, except that nothing in it is random."""
    template = compiled(source, hf_environment())
    template.environment.now = now or datetime.datetime.now()
    return template


def follow(source: str, now: datetime.datetime, alphabet: Alphabet):
    """The template in an environment that keeps messages in the private alphabet."""
    template = compiled(source, following_environment(), alphabet)
    template.environment.now = now
    return template


@functools.cache
def hf_environment() -> type:
    """The class of the environment that transformers 5 renders chat templates in."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks the assistant's words; what stands between is written as it is."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("words"), [], [], body).set_lineno(line)

        def words(self, caller):
            return caller()

    class PublicNamespace(Namespace):
        def __init__(*args, **kwargs):
            self, values = args[0], dict(*args[1:], **kwargs)
            for name in values:
                private(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name, value):
            private(name)
            Namespace.__setitem__(self, name, value)

    def private(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no place for {name!r}")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class HFEnvironment(ImmutableSandboxedEnvironment):
        now: datetime.datetime

        def __init__(self):
            super().__init__(
                trim_blocks=True,
                lstrip_blocks=True,
                extensions=[Generation, loopcontrols],
                optimized=False,  # nothing is computed before there is a conversation: 'x' * 10**9 is not a constant
            )
            self.filters["tojson"] = tojson
            self.globals |= {"raise_exception": raise_exception, "namespace": PublicNamespace}
            self.globals["strftime_now"] = lambda form: self.now.strftime(form)
            del self.filters["random"], self.globals["lipsum"]  # the same conversation is the same text

    return HFEnvironment


# --- followed ---


class Alphabet:
    """Private characters in the place of those that control tokens are spelled with."""

    def __init__(self, letters: tuple[str, ...], base: int, spelled: str):
        self.forth = {ord(letter): base + i for i, letter in enumerate(letters)}
        self.back = {private: letter for letter, private in self.forth.items()}
        self.private = re.compile(f"[{chr(base)}-{chr(base + len(letters))}]")
        self.spelled = re.compile(spelled)
        self.Held = held_type(self)

    @staticmethod
    def apart(control: tuple[str, ...], text: str) -> Alphabet:
        """One of which the text, all that is known beforehand, has no character."""
        letters = tuple(sorted({letter for token in control for letter in token if not letter.isspace()}))
        taken = {ord(character) for character in PRIVATE.findall(text)}
        room = range(0xF0000, 0x110000 - len(letters) - 1, len(letters) + 1)
        for base in room:
            if not taken or taken.isdisjoint(range(base, base + len(letters) + 1)):
                return Alphabet.of(letters, base, "|".join(map(re.escape, control)) or "(?!)")
        raise ValueError("the messages hold every character for private use: one of them is needed")

    @staticmethod
    @functools.lru_cache(8)
    def of(letters: tuple[str, ...], base: int, spelled: str) -> Alphabet:
        return Alphabet(letters, base, spelled)

    def messages(self, messages: list[dict]) -> list[dict]:
        """The messages with every text in them held, but for the names of fields and the roles that everybody knows."""
        return [
            {
                key if key.isidentifier() else self.held(key): value
                if key == "role" and isinstance(value, str) and value in ROLES
                else self.held(value)
                for key, value in message.items()
            }
            for message in messages
        ]

    def held(self, value):
        """Every text in a value, translated."""
        if isinstance(value, str):
            return self.Held(value.translate(self.forth))
        if type(value) in (list, tuple):
            return type(value)(self.held(item) for item in value)
        if isinstance(value, dict):
            return {self.held(key): self.held(item) for key, item in value.items()}
        return value

    def kept(self, value):
        """A value that was made of held ones: texts with private characters are held."""
        if isinstance(value, str):
            return self.Held(value) if type(value) is not self.Held and self.private.search(value) else value
        if type(value) in (list, tuple):
            return type(value)(self.kept(item) for item in value)
        return value

    def real(self, value):
        """Every text in a value, translated back."""
        if type(value) is self.Held or type(value) is str:
            return str.translate(value, self.back)
        if type(value) in (list, tuple):
            return type(value)(self.real(item) for item in value)
        if type(value) is dict:
            return {self.real(key): self.real(item) for key, item in value.items()}
        return value

    def holds(self, value) -> bool:
        """Is anything in it held?"""
        if type(value) in (list, tuple):
            return any(map(self.holds, value))
        if type(value) is dict:
            return any(map(self.holds, value)) or any(map(self.holds, value.values()))
        return type(value) is self.Held

    def both(self, function, args: tuple, kwargs: dict, looked_for: int | None = None):
        """function(*args, **kwargs) as the real texts give it, with what is known of where its characters are from.

        What the function makes of the private characters is the answer if it reads the same. Otherwise the whole result
        is taken for a message's. looked_for: which argument is searched for in the first one, and not written.
        """
        pattern = [self.held(arg) if i == looked_for else arg for i, arg in enumerate(args)]
        found = [self.attempt(function, tried, kwargs) for tried in (args, pattern)[: 1 if looked_for is None else 2]]
        if isinstance(found[0], types.GeneratorType):
            return found[0]  # of a filter that goes through a sequence: its items are followed one by one
        right = function(*self.real(args), **self.real(kwargs))
        if isinstance(right, types.GeneratorType):
            right = list(right)
        if not isinstance(right, (str, list, tuple, dict)):
            return right
        for value in map(self.kept, found):
            if self.real(value) == right:
                return value
        if self.writes([arg for i, arg in enumerate(args) if i != looked_for]) or self.writes(kwargs):
            raise ValueError("a control token is made in a way that cannot be followed")
        return self.held(right)

    @staticmethod
    def attempt(function, args, kwargs):
        try:
            return function(*args, **kwargs)
        except Exception:  # of private characters it can make nothing
            return None

    def writes(self, value) -> bool:
        """Does a value hold control tokens that the template wrote?"""
        if isinstance(value, str):
            return bool(self.spelled.search(value))
        values = (*value, *value.values()) if isinstance(value, dict) else value
        return any(map(self.writes, values)) if isinstance(value, (list, tuple, dict)) else False


def held_type(alphabet: Alphabet) -> type:
    """The class of texts in the alphabet: what looks into one sees the text that it stands for."""

    class Held(str):
        __slots__ = ()

        def __str__(self):
            return self

        def __repr__(self):
            return alphabet.held(repr(alphabet.real(self)))

        def __hash__(self):
            return hash(alphabet.real(self))

        def __iter__(self):
            return map(alphabet.kept, str.__iter__(self))

        def __getitem__(self, index):
            return alphabet.kept(str.__getitem__(self, index))

    def sees(name):
        def method(self, *args):
            return getattr(alphabet.real(self), name)(*alphabet.real(args))

        return method

    def follows(name):
        def method(self, *args, **kwargs):
            return alphabet.both(getattr(str, name), (self, *args), kwargs, 1 if name in LOOKING else None)

        return method

    for name in ("eq", "ne", "lt", "le", "gt", "ge", "contains"):
        setattr(Held, f"__{name}__", sees(f"__{name}__"))
    for name in set(dir(str)) - {"encode", "format", "format_map", "maketrans"}:
        if not name.startswith("_"):
            setattr(Held, name, follows(name))
    return Held


@functools.cache
def following_environment() -> type:
    """The class of the environment that follows messages through operators, filters, tests and methods."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Intercept(NodeTransformer):
        """Makes calls of the two operators that the sandbox lets through."""

        def visit_Concat(self, node):
            self.generic_visit(node)
            function = nodes.EnvironmentAttribute("tilde")
            return nodes.Call(function, node.nodes, [], None, None).set_lineno(node.lineno)

        def visit_Compare(self, node):
            self.generic_visit(node)
            if len(node.ops) > 1 or node.ops[0].op not in ("in", "notin"):
                return node
            test = nodes.Test(node.expr, "in", [node.ops[0].expr], [], None, None).set_lineno(node.lineno)
            return test if node.ops[0].op == "in" else nodes.Not(test).set_lineno(node.lineno)

    class FollowingEnvironment(hf_environment()):
        intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

        def __init__(self, alphabet: Alphabet):
            super().__init__()
            self.alphabet = alphabet
            self.filters = {name: self.followed(name, function) for name, function in self.filters.items()}
            self.tests = {name: self.seen(name, function) for name, function in self.tests.items()}

        def _generate(self, source, *args, **kwargs):
            return super()._generate(Intercept().visit(source), *args, **kwargs)

        def concat(self, pieces):
            return self.alphabet.kept("".join(pieces))

        def tilde(self, *items):
            return self.concat(map(str, items))

        def call_binop(self, context, operator, left, right):
            function = self.binop_table[operator]
            if self.alphabet.holds([left, right]):
                return self.alphabet.both(function, (left, right), {})
            return function(left, right)

        def call(self, context, obj, *args, **kwargs):
            if isinstance(obj, types.BuiltinMethodType) and type(obj.__self__) is str:
                kwargs = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
                if self.alphabet.holds([*args, kwargs]):
                    return self.alphabet.both(obj, args, kwargs)
            return self.alphabet.kept(super().call(context, obj, *args, **kwargs))

        def followed(self, name, function):
            first = 1 if hasattr(function, "jinja_pass_arg") else 0

            @functools.wraps(function)
            def wrapper(*args, **kwargs):
                own, args = (
                    args[:first],
                    tuple(list(arg) if isinstance(arg, types.GeneratorType) else arg for arg in args[first:]),
                )
                if not self.alphabet.holds([args, kwargs]):
                    return function(*own, *args, **kwargs)
                return self.alphabet.both(functools.partial(function, *own), args, kwargs)

            return wrapper

        def seen(self, name, function):
            first = 1 if hasattr(function, "jinja_pass_arg") else 0

            @functools.wraps(function)
            def wrapper(*args, **kwargs):
                if name == "sameas" or not self.alphabet.holds([args, kwargs]):
                    return function(*args, **kwargs)
                return function(*args[:first], *self.alphabet.real(args[first:]), **self.alphabet.real(kwargs))

            return wrapper

    return FollowingEnvironment
