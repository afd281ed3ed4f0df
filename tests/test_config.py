"""The command line: every way to write an option, every way to get one wrong, what a user sees."""

import os
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Literal

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from rlhf.infra import config


@dataclass(frozen=True)
class Config:
    # where the data lies
    data: str = "out/#1"  # token files
    domains: tuple[str, ...] = ("films", "news")  # which ones
    # optimisation,
    # in one stage
    lr: float = 3e-4  # learning rate
    # that warms up first
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the two moments
    steps: int = 1_000  # optimiser steps
    kl_control: Literal["fixed", "adaptive"] = "fixed"  # how the coefficient moves
    kl_target: float | None = None  # nats per response [kl_control=adaptive]
    sizes: Literal[16, 32] = 16  # choices that are numbers [whiten=true]
    whiten: bool = True  # moment 0 and 1
    verbose: bool = False  # [steps=1|2]
    above: int = 0  # allowed above the target, in [0, 9] [kl_target]
    both: int = 0  # [verbose=true, whiten=true]

    def __post_init__(self):
        # a comment of the code, no help
        if self.steps < 1:  # nor is this
            raise ValueError(f"--steps={self.steps} must be at least 1")


def parse(*argv):
    return config.parse(Config, argv)


def test_no_options_are_the_defaults():
    assert parse() == Config()


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--lr=1e-3"], {"lr": 1e-3}),
        (["--lr", "1e-3"], {"lr": 1e-3}),
        (["lr=1e-3"], {"lr": 1e-3}),
        (["--lr=-1"], {"lr": -1.0}),
        (["--lr", "-1"], {"lr": -1.0}),
        (["--lr=3"], {"lr": 3.0}),
        (["--steps=2_000"], {"steps": 2000}),
        (["--kl-control=adaptive"], {"kl_control": "adaptive"}),
        (["--kl_control=adaptive", "--kl_target=6"], {"kl_control": "adaptive", "kl_target": 6.0}),
        (["--kl_control=adaptive", "kl_target=none"], {"kl_control": "adaptive"}),
        (["--sizes=32"], {"sizes": 32}),
        (["--steps=2", "--verbose"], {"steps": 2, "verbose": True}),
        (["--verbose", "--steps=1"], {"steps": 1, "verbose": True}),
        (["--whiten=false"], {"whiten": False}),
        (["--whiten"], {}),
        (["--data="], {"data": ""}),
        (["--data=a=b --c"], {"data": "a=b --c"}),
        (["--data", "a=b"], {"data": "a=b"}),
        (["--data", "- x"], {"data": "- x"}),
        (["--domains=a, b,c"], {"domains": ("a", "b", "c")}),
        (["--domains="], {"domains": ()}),
        (["--betas=0.8,0.9"], {"betas": (0.8, 0.9)}),
    ],
)
def test_ways_to_write_an_option(argv, expected):
    assert parse(*argv) == Config(**expected)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--kl_contrl=fixed"], "unknown option --kl_contrl; did you mean --kl_control?"),
        (["--kl"], "unknown option --kl; did you mean --kl_control?"),  # no abbreviations
        (["--zzz=1"], "unknown option --zzz; --help lists the options"),
        (["--lr=fast"], "--lr=fast is not valid; expected number"),
        (["--lr=nan"], "--lr=nan is not valid; expected number"),
        (["--lr=inf"], "--lr=inf is not valid; expected number"),
        (["--kl_target=-1e999"], "--kl_target=-1e999 is not valid; expected number"),
        (["--lr="], "--lr= is not valid; expected number"),
        (["--steps=3.5"], "--steps=3.5 is not valid; expected integer"),
        (["--steps=none"], "--steps=none is not valid; expected integer"),
        (["--steps=0"], "--steps=0 must be at least 1"),
        (["--whiten=yep"], "--whiten=yep is not valid; expected true|false"),
        (["--kl_control=adapt"], "--kl_control=adapt is not valid; expected fixed|adaptive"),
        (["--kl_target=x"], "--kl_target=x is not valid; expected number|none"),
        (["--betas=0.9"], "--betas=0.9 is not valid; expected number,number"),
        (["--betas=0.9,x"], "--betas=0.9,x is not valid; expected number,number"),
        (["--lr=1", "--lr=1"], "--lr is given twice"),
        (["--lr=1", "lr=2"], "--lr is given twice"),
        (["--lr"], "--lr has no value; write --lr=number"),
        (["--lr", "--steps=3"], "--lr has no value; write --lr=number"),
        (["3"], "'3' is not an option: write --name=value; --help lists the names"),
        (["-lr", "3"], "'-lr' is not an option: write --name=value; --help lists the names"),
        (["--verbose", "true"], "'true' is not an option: write --name=value; --help lists the names"),
        (["--kl_target=6"], "--kl_target has no effect with --kl_control=fixed; use --kl_control=adaptive, or leave "),
        (
            ["--verbose"],
            "--verbose has no effect with --steps=1000; use --steps=1 or --steps=2, or leave --verbose out",
        ),
        (["--whiten=false", "--sizes=16"], "--sizes has no effect with --whiten=false; use --whiten=true"),
        (
            ["--above=1", "--kl_control=adaptive"],
            "--above has no effect with --kl_target=none; use --kl_target=..., or",
        ),
        (["--both=1"], "--both has no effect with --verbose=false; use --verbose=true, or leave --both out"),
        (
            ["--steps=1", "--verbose", "--both=1", "--whiten=false"],
            "--both has no effect with --whiten=false; use --whiten=true",
        ),
    ],
)
def test_ways_to_get_an_option_wrong(argv, message):
    with pytest.raises(ValueError) as error:
        parse(*argv)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_required_option():
    @dataclass(frozen=True)
    class Required:
        data: str
        steps: int = 3

    assert config.parse(Required, ["--data=x"]) == Required("x")
    assert (
        config.parse(Required, ["x"]) == config.parse(Required, ["--steps", "3", "x"]) == Required("x")
    )  # its name is free
    with pytest.raises(ValueError, match="--data=text is required"):
        config.parse(Required, [])
    for words in (["x", "y"], ["--data=x", "y"]):
        with pytest.raises(ValueError, match="'y' is not an option"):
            config.parse(Required, words)


def test_what_an_option_needs_is_needed_by_those_that_need_it():
    """`deep` needs `middle`, which is as it should be, and works only where `top` is none."""

    @dataclass(frozen=True)
    class Chain:
        top: str | None = None  # switches all off
        middle: Literal["on", "off"] = "on"  # [top=none]
        deep: int = 0  # [middle=on]

    assert config.parse(Chain, ["--deep=1"]).deep == 1
    with pytest.raises(ValueError, match="--deep has no effect with --top=x; use --top=none, or leave --deep out"):
        config.parse(Chain, ["--deep=1", "--top=x"])


def test_a_need_of_nothing_is_a_bug():
    @dataclass(frozen=True)
    class Typo:
        kl_target: int = 1  # nats [kl_controll=adaptive]

    with pytest.raises(TypeError, match="kl_controll"):
        config.parse(Typo, [])


@given(
    data=st.text(),
    domains=st.lists(st.text("abc _-=", min_size=1).filter(lambda s: s == s.strip()), max_size=3).map(tuple),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    steps=st.integers(1, 10**18),
    kl_target=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    whiten=st.booleans(),
    spaced=st.booleans(),
)
def test_show_and_parse_are_inverse(spaced, **values):
    """Any Config can be written down as a command line and comes back equal."""
    wanted = Config(kl_control="adaptive", **values)
    words = []
    for field in fields(Config):
        if field.name not in ("verbose", "sizes", "above", "both"):
            name, text = f"--{field.name}", config.show(getattr(wanted, field.name))
            splits = spaced and field.name != "whiten" and not text.startswith("--")
            words += [name, text] if splits else [f"{name}={text}"]
    assert parse(*words) == wanted


def test_help_shows_every_option_with_default_meaning_and_type(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        parse("--lr=x", "--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "The command line: every way to write an option" in text  # the docstring of the module
    lines = [line.strip() for line in text.splitlines()]
    for line in [
        "where the data lies:",
        "--data=out/#1                   token files [text]",
        "--domains=films,news            which ones [text,...]",
        "optimisation, in one stage:",
        "--lr=0.0003                     learning rate [number]",
        "that warms up first:",
        "--betas=0.9,0.95                decay of the two moments [number,number]",
        "--kl_target=none                nats per response [kl_control=adaptive] [number|none]",
        "--verbose=false                 [steps=1|2] [true|false]",
    ]:
        assert line in lines
    assert "no help" not in text and "nor is this" not in text
    assert all(f"--{field.name}=" in text for field in fields(Config))
    assert max(map(len, lines)) <= 100


def test_help_of_long_names_long_comments_and_inherited_options(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    @dataclass(frozen=True)
    class Long(Config):
        # more
        a_name_that_does_not_fit_into_its_column: int = 1  # a meaning that needs more than one line of this narrow one
        required: str = ""  # "#" in a comment

    text = config.help_text(Long)
    assert "  --a_name_that_does_not_fit_into_its_column=1\n" + " " * 34 + "a meaning" in text
    assert "of this narrow one" in " ".join(text.split()) and '"#" in a comment' in text
    assert "learning rate [number]" in text and text.index("more:") > text.index("--verbose")
    assert max(map(len, text.splitlines())) <= 80 or "python" in text.splitlines()[0]


# ---- what a user sees of a script


def script(tmp_path, body: str, argv=(), env=None, **kwargs):
    """Run a little script whose main() has this body."""
    file = tmp_path / "script.py"
    lines = "\n    ".join(body.splitlines())
    file.write_text(
        f"import os, sys, errno\nfrom rlhf.infra import config\ndef main():\n    {lines}\nconfig.run(main)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run([sys.executable, file, *argv], env=env, capture_output=True, text=True, timeout=300, **kwargs)


@pytest.mark.parametrize(
    "body, line",
    [
        ("raise ValueError('minibatch 5 is\\nno multiple of 2')", "minibatch 5 is no multiple of 2"),
        ("open('/no/such/file')", "No such file or directory: /no/such/file"),
        ("os.mkdir('/proc/x')", "No such file or directory: /proc/x"),
        ("raise PermissionError(errno.EACCES, 'Permission denied', 'out')", "Permission denied: out"),
        ("raise FileNotFoundError('no checkpoint in out')", "no checkpoint in out"),
        (
            "with open('/dev/full', 'w') as file: file.write('x')",
            "No space left on device; free some space and run the same command again",
        ),
        ("raise MemoryError", "out of memory; use smaller micro-batches"),
        (
            "raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')",
            "out of memory; use smaller micro-batches",
        ),
        ("raise ValueError", "ValueError"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, body, line):
    done = script(tmp_path, body)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")


def test_a_bug_keeps_its_traceback(tmp_path):
    for error in ("KeyError('x')", "RuntimeError('shape mismatch')"):
        done = script(tmp_path, f"raise {error}")
        assert done.returncode == 1 and "Traceback" in done.stderr
    done = script(tmp_path, "raise ValueError('x')", env={"PLAIN_RLHF_TRACEBACK": "1"})
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_ctrl_c_is_one_line_and_130(tmp_path):
    listen = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
    done = script(tmp_path, listen + "os.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(9)")
    assert done.returncode == 130 and done.stderr == "stopped; the same command goes on from the last checkpoint\n"


def test_output_into_a_closed_pipe_is_quiet(tmp_path):
    read, write = os.pipe()
    os.close(read)
    for body in ("print('x' * 10)", "print('x' * 10**6)"):
        file = tmp_path / "script.py"
        file.write_text(f"from rlhf.infra import config\nconfig.run(lambda: {body})\n")
        done = subprocess.run(
            [sys.executable, file], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=write, stderr=subprocess.PIPE
        )
        assert (done.returncode, done.stderr) == (141, b"")
    os.close(write)


def test_an_error_of_another_rank_alone_is_told_with_its_rank(tmp_path):
    done = script(tmp_path, "raise ValueError('no space')", env={"RANK": "1"})
    assert (done.returncode, done.stderr) == (2, "[rank 1] error: no space\n")
