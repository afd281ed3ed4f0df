"""The command line of every script is one frozen dataclass.

Each option is one line of the script's Config: `name: type = default  # meaning, unit [what it needs]`. The comment is the
--help text, a comment line above a group of options is its heading. [kl_control=adaptive] says that the option works only
where kl_control is that; [trunk=full|adapters, votes] that trunk is one of two and votes is not none. What the other option
needs is needed too. A misspelt, repeated or ineffective option is an error. Options without a default may be given without
their names, in their order. --config=FILE or --config=PRESET gives several at once (rlhf/infra/option_files.py).
"""

import builtins
import dataclasses
import difflib
import errno
import functools
import inspect
import io
import math
import os
import re
import shutil
import sys
import textwrap
import time
import tokenize
import types
import typing
from pathlib import Path

from rlhf.infra import option_files, peers, signals


def parse(Config: type, argv: list[str] | None = None):
    """The frozen Config that the command line asks for: --name=value, --name value, name=value, or a bare --flag; a word
    alone is the next required option. --config=FILE gives options too, and the command line wins.

    Every mistake is a ValueError with one line, an option without effect too. --help prints and exits.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(Config), flush=True)
        raise SystemExit(0)
    typed = options_typed(Config, argv)
    file, from_file = options_of_file(Config, typed.pop("config")) if "config" in typed else ("", {})
    kinds = typing.get_type_hints(Config)
    if missing := [name for name in required_by(Config) if name not in from_file | typed]:
        raise ValueError(f"--{missing[0]}={kind_name(kinds[missing[0]])} is required; --help lists the options")
    config, idle = settle(Config, file, from_file, typed)
    if file and os.environ.get("RANK", "0") == "0":
        print(told(file, from_file, typed, idle), file=sys.stderr, flush=True)  # sample.py's output is texts alone
    return config


def options_typed(Config: type, argv: list[str]) -> dict:
    """{option: value} of the command line, --config among them."""
    kinds = typing.get_type_hints(Config) | {"config": str}
    names, required = [field.name for field in dataclasses.fields(Config)], required_by(Config)
    given, words = {}, iter(argv)
    for word in words:
        name, equals, text = word.partition("=")
        if not word.startswith("-") and not equals and (missing := [x for x in required if x not in given]):
            name, equals, text = missing[0], "=", word
        if not name.startswith("--") and not equals:
            raise ValueError(f"{word!r} is not an option: write --name=value; --help lists the names")
        name = name.removeprefix("--").replace("-", "_")
        if name not in (known := [*names, "config"]):
            close = difflib.get_close_matches(name, known, n=1) or [full for full in known if full.startswith(name)]
            hint = f"did you mean --{close[0]}?" if close else "--help lists the options"
            raise ValueError(f"unknown option --{name}; {hint}")
        if name in given:
            raise ValueError(f"--{name} is given twice")
        if not equals:
            text = "true" if kinds[name] is bool else next(words, "--")
            if text.startswith("--"):
                raise ValueError(f"--{name} has no value; write --{name}={kind_name(kinds[name])}")
        try:
            given[name] = convert(text, kinds[name])
        except (ValueError, KeyError):
            raise ValueError(f"--{name}={text} is not valid; expected {kind_name(kinds[name])}") from None
    return given


def required_by(Config: type) -> list[str]:
    """The options that have no default, in their order."""
    return [x.name for x in dataclasses.fields(Config) if x.default is x.default_factory is dataclasses.MISSING]


def options_of_file(Config: type, spec: str) -> tuple[str, dict]:
    """(the file, {option: value} of it), without what is the default anyhow."""
    kinds = typing.get_type_hints(Config)
    names = [field.name for field in dataclasses.fields(Config)]
    file, values = option_files.read_options(spec, command_of(Config), names)
    given = {}
    for name, value in values.items():
        kind = kinds[name]
        try:
            if isinstance(value, list) and typing.get_origin(not_none(kind)) is not tuple:
                raise ValueError
            if value is None and kind is not_none(kind):
                raise ValueError
            given[name] = convert(option_files.spelled(value), kind)
        except (ValueError, KeyError):
            raise ValueError(f"{file}: {name} = {value!r} is not valid; expected {kind_name(kind)}") from None
    usual = defaults(Config)
    return file, {name: value for name, value in given.items() if name not in usual or value != usual[name]}


def command_of(Config: type) -> str:
    """What the tables of a file call it: train_ppo for train_ppo.py, feedback for rlhf/feedback/__main__.py."""
    file = Path(inspect.getfile(Config))
    return file.parent.name if file.stem == "__main__" else file.stem


def not_none(kind):
    """X of X | None."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) in (types.UnionType, typing.Union) else kind


def settle(Config: type, file: str, from_file: dict, typed: dict) -> tuple[typing.Any, list[str]]:
    """The Config, and the options of the file that what was typed leaves without effect: they stay at their defaults.

    ValueError for any other option without effect.
    """
    needs, idle = needs_of(Config), []
    while True:
        given = {name: value for name, value in (from_file | typed).items() if name not in idle}
        try:
            config = Config(**given)
        except ValueError as error:
            theirs = [name for name in from_file if name not in typed and re.search(rf"\b{name}\b", str(error))]
            said = ", ".join(f"{name}={show(from_file[name])}" for name in theirs)
            raise ValueError(f"{error} ({file} says {said})" if theirs else str(error)) from None
        unmet = ((name, found) for name in given if (found := unmet_need(config, name, needs)))
        name, (other, wanted) = next(unmet, ("", ("", ())))
        if not name:
            return config, idle
        if name in typed or other not in typed:
            choices = " or ".join(f"--{other}={show(value)}" for value in wanted)
            has, where = f"--{other}={show(getattr(config, other))}", "" if name in typed else f"{file}: "
            raise ValueError(f"{where}--{name} has no effect with {has}; use {choices}, or leave --{name} out")
        idle.append(name)


def told(file: str, from_file: dict, typed: dict, idle: list[str]) -> str:
    """One line: what a file said, and what the command line changed of it."""

    def options(names, values: dict) -> str:
        return " ".join(f"{name}={show(values[name])}" for name in names) or "nothing that is not the default"

    won = [name for name in typed if name in from_file]
    kept = [name for name in from_file if name not in (*won, *idle)]
    parts = [f"from {file}: {options(kept, from_file)}"]
    parts += [f"instead of its {options(won, from_file)}: {options(won, typed)}"] if won else []
    parts += [f"without effect here: {options(idle, from_file)}"] if idle else []
    return "".join(c if c.isprintable() else "?" for c in "; ".join(parts))


NEED = re.compile(r"\[([^\[\]]+)\]$")  # at the end of an option's comment


def needs_of(Config: type) -> dict[str, list[tuple[str, tuple]]]:
    """{option: [(another, the values of it with which the option works), ...]}; (...,) is any value but none.

    TypeError where a comment asks for what the Config does not have.
    """
    kinds, found = typing.get_type_hints(Config), {}
    for name, (comment, _) in comments(Config).items():
        for need in match[1].split(", ") if (match := NEED.search(comment)) else ():
            other, equals, values = need.partition("=")
            if other not in kinds:
                raise TypeError(f"{Config.__name__}.{name} needs {other}, which is no option")
            wanted = tuple(convert(value, kinds[other]) for value in values.split("|")) if equals else (...,)
            found.setdefault(name, []).append((other, wanted))
    return found


def unmet_need(config, name: str, needs: dict[str, list[tuple[str, tuple]]]) -> tuple[str, tuple] | None:
    """The first of the option's needs, or of what those need, that this Config does not meet."""
    for other, wanted in needs.get(name, ()):
        value = getattr(config, other)
        if value not in wanted and (value is None or ... not in wanted):
            return other, wanted
        if deeper := unmet_need(config, other, needs):
            return deeper
    return None


def convert(text: str, kind):
    """The value of type `kind` that `text` spells; ValueError or KeyError where it spells none."""
    inner = typing.get_args(kind)
    match typing.get_origin(kind) or kind:
        case types.UnionType | typing.Union:  # X | None
            return None if text == "none" else convert(text, inner[0])
        case typing.Literal:
            return {str(choice): choice for choice in inner}[text]
        case builtins.tuple:  # tuple[X, ...] or tuple[X, Y]
            parts = text.split(",") if text else []
            inner = inner[:1] * len(parts) if inner[-1] is ... else inner
            return tuple(convert(part.strip(), one) for part, one in zip(parts, inner, strict=True))
        case builtins.bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        case builtins.float:
            if not math.isfinite(value := float(text)):  # NaN would pass every check; what is unbounded is called none
                raise ValueError
            return value
        case builtins.int:
            if not -(2**63) <= (value := int(text)) < 2**63:  # no tensor and no generator holds a larger one
                raise ValueError
            return value
        case builtins.str:
            return text
    raise TypeError(f"an option cannot be of type {kind}")


def defaults(Config: type) -> dict:
    """{option: what it is where nobody names it}, of those that have a default."""
    fields = [field for field in dataclasses.fields(Config) if field.default is not dataclasses.MISSING]
    return {field.name: field.default for field in fields}


def at_least(config, **least: float) -> None:
    """ValueError unless every named option is at least so large; `none` passes. For a Config's __post_init__."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:
            raise ValueError(f"--{name}={show(value)} is too small; it must be at least {show(bound)}")


def at_most(config, **most: float) -> None:
    """The same for upper bounds."""
    for name, bound in most.items():
        value = getattr(config, name)
        if value is not None and not value <= bound:
            raise ValueError(f"--{name}={show(value)} is too large; it must be at most {show(bound)}")


def at_most_one(config, *names: str) -> None:
    """ValueError where several of these options are given: they say the same in different ways."""
    given = [f"--{name}={show(getattr(config, name))}" for name in names if getattr(config, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} say the same in different ways; give one")


def kind_name(kind) -> str:
    """How the --help text and the errors name the type of an option."""
    inner = typing.get_args(kind)
    match typing.get_origin(kind) or kind:
        case types.UnionType | typing.Union:
            return f"{kind_name(inner[0])}|none"
        case typing.Literal:
            return "|".join(map(str, inner))
        case builtins.tuple:
            return ",".join("..." if one is ... else kind_name(one) for one in inner)
    return {bool: "true|false", int: "integer", float: "number", str: "text"}[kind]


def show(value) -> str:
    """A value as one would write it on the command line: parse(show(value)) == value."""
    if isinstance(value, tuple):
        return ",".join(map(show, value))
    if value is ...:  # any value
        return "..."
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


@functools.cache
def comments(Config: type) -> dict[str, tuple[str, str]]:
    """{option: (its comment, its heading)}, read from the source of the class and of the classes that it extends."""
    found = {}
    for cls in [base for base in reversed(Config.__mro__) if dataclasses.is_dataclass(base)]:
        source = io.StringIO(textwrap.dedent(inspect.getsource(cls)))
        name, heading, after_heading, at_start = None, "", False, True
        for token in tokenize.generate_tokens(source.readline):  # it knows a comment from a "#" in a string
            column, text = token.start[1], token.string
            if token.type == tokenize.COMMENT:
                text = text.lstrip("# ").rstrip()
                if at_start and column == 4:  # on a line of its own: a heading, perhaps its second line
                    heading = f"{heading} {text}" if after_heading else text
                    after_heading = True
                elif name and not at_start:  # behind an option
                    found[name] = (text, found[name][1])
            elif token.type == tokenize.NEWLINE:
                at_start = True
            elif at_start and token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):  # a statement begins
                at_start = after_heading = False
                if column <= 4:
                    name = text if text in cls.__annotations__ else None
                    found |= {name: ("", heading)} if name else {}
    return found


def help_text(Config: type) -> str:
    """What --help prints: the script's docstring, then every option with its default, meaning and type."""
    kinds, notes = typing.get_type_hints(Config), comments(Config)
    script = inspect.getmodule(Config)
    lines = [f"usage: python {os.path.basename(sys.argv[0])} [--config=FILE] [--name=value ...]", ""]
    if script and script.__doc__:
        lines += [*inspect.cleandoc(script.__doc__).splitlines(), ""]
    width, last_heading = max(60, min(140, shutil.get_terminal_size((120, 24)).columns)), ""
    for field in dataclasses.fields(Config):
        meaning, heading = notes[field.name]
        if heading != last_heading:
            lines += [""] * bool(lines[-1]) + [f"{heading}:"]
            last_heading = heading
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        left = f"  --{field.name}" + (f"={show(default)}" if default is not dataclasses.MISSING else "=... (required)")
        right = textwrap.wrap(f"{meaning} [{kind_name(kinds[field.name])}]".strip(), width - 34)
        if len(left) > 32:  # too long for its column: the meaning starts on the next line
            lines.append(left)
            left = ""
        lines += [f"{left:<34}{right[0]}"] + [" " * 34 + more for more in right[1:]]
    return "\n".join(lines)


def run(main, stopped: str = "stopped; the same command goes on from the last checkpoint") -> None:
    """Call `main`; a ValueError or OSError becomes one line `error: ...` on stderr and exit code 2.

    Bugs keep their traceback, and PLAIN_RLHF_TRACEBACK=1 shows it for every error. Signal n says `stopped`, and exits with
    128 + n.
    """
    try:
        with signals.handled(signals.raise_interrupted):
            main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output (head, less) has gone: nobody is left to tell
        forget_output()
        raise SystemExit(141) from None
    except KeyboardInterrupt as stop:  # ours knows its signal; another library may have set Python's own handler
        number = getattr(stop, "number", signals.SIGINT)
        complain(stopped if number == signals.SIGINT else f"{signals.name_of(number)}: {stopped}")
        raise SystemExit(128 + number) from None
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        line = one_line(error)
        if os.environ.get("PLAIN_RLHF_TRACEBACK") == "1" or not line:
            raise
        complain(f"error: {line}")
        forget_output()
        raise SystemExit(2) from None


def forget_output() -> None:
    """What standard output could not take is dropped: Python would try again at its exit, and end with code 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(error: Exception) -> str | None:
    """What went wrong outside of the code, on one line; None for a bug, which needs its traceback."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "out of memory; use smaller micro-batches"
    if isinstance(error, RuntimeError):
        return lost_rank(error) if "RANK" in os.environ else None
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        if error.errno == errno.ENOSPC:
            text += "; free some space and run the same command again"
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))  # it must not steer the terminal
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE // 2]} ... {text[-LONGEST_LINE // 2 :]}"
    return text or type(error).__name__


LONGEST_LINE = 1500  # characters: somebody's value may have thousands
LOST = "lost another rank of this run: "  # how the line of one begins that only noticed
GO_ON = "; the same command goes on from the last checkpoint"
CONNECTION = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Connection refused",
    "failed to recv",
    "unhandled system error",
)


def lost_rank(error: RuntimeError) -> str | None:
    """The line of a process whose peer is gone or silent; None for another error. gloo and nccl say it in many words."""
    text = str(error)
    late = "imed out" in text or "imeout" in text and type(error).__name__.startswith("Dist")
    if not late and not any(words in text for words in CONNECTION):
        return None
    end = time.monotonic() + 0.3  # a connection closes a moment before its process is seen to have ended
    while not (found := peers.fates()) and not late and time.monotonic() < end:
        time.sleep(0.02)
    known = " and ".join(f"rank {rank} {word}" for rank, word in found.items())
    unknown = "it has not answered in time: it hangs, or its machine is gone" if late else "it has ended"
    return f"{LOST}{known or unknown}{GO_ON}"


def complain(line: str) -> None:
    """Print to stderr, once for all ranks: most meet the same error, or lose the one that met it.

    Rank 0 speaks for an error that all meet, so the others wait for it a moment. Who only lost another rank speaks at once,
    before torchrun ends it, unless the error itself was told.
    """
    rank = os.environ.get("RANK", "0")
    noticed = line.removeprefix("error: ").startswith(LOST)
    end = time.monotonic() + (0 if rank == "0" or noticed else 1)
    while time.monotonic() < end and not was_told():
        time.sleep(0.05)
    if "RANK" in os.environ and not claim():
        return
    prefix = f"[rank {rank}] " if rank != "0" or noticed else ""
    print(f"{prefix}{line.removeprefix('error: ') if noticed else line}", file=sys.stderr, flush=True)
    if noticed:
        time.sleep(0.5)  # torchrun looks every 0.1 s, and calls the first that it finds the root cause


def told_file() -> Path | None:
    """A file that the ranks on this machine share, in a directory that torchrun makes for each attempt and removes."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent.parent / "told" if error_file else None


def was_told() -> bool:
    file = told_file()
    return file is not None and file.exists()


def claim() -> bool:
    """Is this process the first on its machine to say why the run ends?"""
    file = told_file()
    if file is None:
        return True
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the directory has gone already
        return True
    return True
