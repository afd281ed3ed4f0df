"""--help of every command: one option, one line, one meaning; and no heading that is the half of a comment."""

import ast
import importlib
import importlib.util
import re
import sys
import typing
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT

from rlhf.infra import config

FILES = [  # whose Config is a command line
    file.relative_to(ROOT).as_posix()
    for folder in (".", "bench", "evaluation", "rlhf/feedback", "rlhf/track")
    for file in sorted((ROOT / folder).glob("*.py"))
    if "config.parse(Config)" in file.read_text()
]


def module_of(file: str):
    if not file.startswith("bench/"):
        return importlib.import_module(file.removesuffix(".py").replace("/", "."))
    spec = importlib.util.spec_from_file_location(file.removesuffix(".py").replace("/", "_"), ROOT / file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.append(str(ROOT / "bench"))  # where python finds the siblings of a script
    spec.loader.exec_module(module)
    return module


def options_in_source(module) -> dict[str, str]:
    """{option: the comment on its line}; fails where an option takes several lines, or a line between them is no heading."""
    source = Path(module.__file__).read_text()
    config_class = next(x for x in ast.parse(source).body if isinstance(x, ast.ClassDef) and x.name == "Config")
    options = {x.lineno: x for x in config_class.body if isinstance(x, ast.AnnAssign)}
    assert all(x.lineno == x.end_lineno for x in options.values()), "an option takes several lines"
    lines, meanings = source.splitlines(), {}
    for number in range(min(options), max(options) + 1):
        line = lines[number - 1]
        if number in options:
            meanings[options[number].target.id] = line.partition("  # ")[2]
        elif line:  # a heading, directly above its first option
            assert number + 1 in options and re.fullmatch(r"    # \w.*[^ .:;,]", line), line
    return meanings


def options_in_help(text: str) -> dict[str, str]:
    """{option: what --help says of it}; fails on a line that is neither option, nor its continuation, nor heading."""
    said: dict[str, str] = {}
    for line in text.splitlines():
        if match := re.match(r"  --(\w+)=(\S*)( \(required\))?( .*)?$", line):
            name = match[1]
            assert name not in said, f"--{name} stands twice"
            said[name] = (match[4] or "").strip()
        elif line.startswith(" " * 34):
            said[name] = f"{said[name]} {line.strip()}".strip()
        else:
            assert not line or re.fullmatch(r"\w.*[^ .:;,]:", line), line
    return said


@pytest.mark.parametrize("file", FILES)
def test_help_says_of_every_option_what_stands_on_its_line(file, monkeypatch, capsys):
    module = module_of(file)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(sys, "argv", [file, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    text = capsys.readouterr().out
    head = f"usage: python {Path(file).name} [--config=FILE] [--name=value ...]\n\n{module.__doc__.strip()}\n\n"
    assert end.value.code == 0 and text.startswith(head)

    meanings, kinds = options_in_source(module), typing.get_type_hints(module.Config)
    assert list(meanings) == [field.name for field in fields(module.Config)]
    assert module.Config.__dataclass_params__.frozen
    for name, meaning in meanings.items():
        assert re.search(r"[^ :;,]$", meaning), f"--{name} has no meaning, or half of one: {meaning!r}"
    expected = {name: f"{meaning} [{config.kind_name(kinds[name])}]" for name, meaning in meanings.items()}
    assert options_in_help(text[len(head) :]) == expected
    assert config.needs_of(module.Config) is not None  # every need names an option, and values of it


def test_every_command_is_among_them():
    commands = {
        f"evaluation/{module.__name__.rpartition('.')[2]}.py" for module in module_of("evaluate.py").COMMANDS.values()
    }
    scripts = {file.name for file in ROOT.glob("*.py") if "config.run(" in file.read_text()}
    assert commands | scripts <= set(FILES)
