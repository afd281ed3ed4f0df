"""Random command lines for every script: a Config, or exit code 2 and one line; never a traceback."""

import typing
from dataclasses import fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_help import FILES, module_of

from rlhf.infra import config

NUMBERS = "0 1 -1 2 3 7 16 0.5 -0.5 1e-9 1e9 1e308 1e400 -1e400 nan inf -inf 1_000 0x10 ٣ ½ 2.0 1e3".split()
NUMBERS += [str(2**31), str(2**63), str(10**30), "9" * 5000, " 4", "1,2", "1,", ",", "none", "None"]
TEXTS = [
    "",
    " ",
    "none",
    "true",
    "TRUE",
    "out/lm",
    "nowhere",
    "/dev/null",
    "/dev/zero",
    "file.py:f",
    "a,b,,c",
    "a:0.7,b:0.3",
]
TEXTS += [
    "=",
    "--",
    "--x",
    "a=b",
    "x" * 3000,
    "line\nline",
    "\x1b[31m",
    "\0",
    "\ud800",
    "\u2028",
    "caf\u00e9",
    "..",
    "~",
]
ANYTHING = st.sampled_from(NUMBERS + TEXTS) | st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)


def choices(kind) -> list[str]:
    """Words of a Literal, which random texts would never hit."""
    inner = typing.get_args(kind)
    return [str(x) for x in inner if isinstance(x, str)] + [word for x in inner for word in choices(x)]


def command_lines(Config: type):
    """Some options with values of any type, mostly of their own names, and words that are no options."""
    kinds = typing.get_type_hints(Config)
    named = [
        st.tuples(st.just(field.name), ANYTHING | st.sampled_from([*choices(kinds[field.name]), "8"]))
        for field in fields(Config)
    ]
    option = st.tuples(st.one_of(named), st.sampled_from(["--{}={}", "{}={}", "--{} {}", "--{}"])).map(
        lambda drawn: drawn[1].format(*drawn[0]).split(" ", 1)
    )
    return st.lists(option | ANYTHING.map(lambda word: [word]), max_size=5).map(lambda words: sum(words, []))


def outcome(Config: type, argv: list[str], capsys) -> str:
    """What stands on stderr, after the exit code was checked; "" for a command line that is accepted."""
    try:
        config.run(lambda: config.parse(Config, argv))
    except SystemExit as end:
        said = capsys.readouterr()
        if end.code == 0:
            assert said.out.startswith("usage: ")  # --help
            return ""
        assert end.code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1, (argv, said.err)
        assert said.err[:-1].isprintable() and len(said.err) < 1600, (argv, said.err)
        return said.err
    return ""


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("examples", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_any_command_line(file, examples, capsys):
    Config = module_of(file).Config
    refused = []

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(command_lines(Config))
    def run(argv):
        refused.append(bool(outcome(Config, argv, capsys)))

    run()
    assert any(refused)


@pytest.mark.parametrize("file", FILES)
def test_every_option_alone(file, capsys):
    """Each with values that it cannot have, and with the largest and the least."""
    Config = module_of(file).Config
    for field in fields(Config):
        for value in [*NUMBERS, *TEXTS]:
            outcome(Config, [f"--{field.name}={value}"], capsys)
