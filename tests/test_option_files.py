"""--config=FILE: the Config of the same options typed, one line for every mistake, and presets that say what make does."""

import json
import subprocess
from dataclasses import asdict, dataclass, fields
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_readme import module_of, split
from tiny import ROOT, lines

from rlhf.infra import config, option_files

PLACES = {"init", "data", "out", "reward", "base", "tuned", "seed"}  # where, and what differs from run to run


@dataclass(frozen=True)
class Config:
    data: str = "out/data"  # token files
    domains: tuple[str, ...] = ("films",)  # which ones
    lr: float = 3e-4  # learning rate
    steps: int = 1000  # optimiser steps
    layout: Literal["full", "branch"] = "full"  # what trains
    branch_layers: int = 4  # layers [layout=branch]
    clip: float | None = 0.2  # none = unclipped
    whiten: bool = True  # moments
    init: str | None = None  # a model

    def __post_init__(self):
        config.at_least(self, steps=1)


EXAMPLE = 'lr = 1e-3\nsteps = 7\nlayout = "branch"\nbranch-layers = 2\n'


def parse(tmp_path, text: str, *argv: str, name: str = "mine.toml"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return config.parse(Config, [f"--config={tmp_path / name}", *argv])


VALUES = {
    "data": st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=9),
    "domains": st.lists(st.text("abc _-'\"é", min_size=1).filter(lambda s: s == s.strip()), max_size=3).map(tuple),
    "lr": st.floats(allow_nan=False, allow_infinity=False),
    "steps": st.integers(1, 10**18),
    "clip": st.none() | st.floats(0, 1),
    "whiten": st.booleans(),
}


def toml(value) -> str:
    if value is None:
        return '"none"'
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


@given(values=st.fixed_dictionaries({}, optional=VALUES), typed=st.fixed_dictionaries({}, optional=VALUES))
def test_a_file_is_its_options_typed_and_the_command_line_wins(tmp_path_factory, values, typed):
    tmp_path, wanted = tmp_path_factory.mktemp("options"), Config(**values | typed)
    words = [f"--{name}={config.show(value)}" for name, value in typed.items()]
    rows = "".join(f"{name} = {toml(value)}\n" for name, value in values.items())
    assert parse(tmp_path, rows, *words) == wanted
    assert parse(tmp_path, json.dumps(values), *words, name="mine.json") == wanted
    recorded = asdict(Config(**values)) | {"data_sha256": "0", "init_sha256": None, "overrides": [{"step": 1}]}
    assert parse(tmp_path, json.dumps(recorded), *words, name="run.json") == wanted


def test_what_came_from_where_is_one_line(tmp_path, capsys, monkeypatch):
    file = tmp_path / "mine.toml"
    wanted = Config(lr=1e-4, steps=7, layout="branch", branch_layers=2)
    file.write_text(EXAMPLE)
    assert config.parse(Config, ["--lr=1e-4", "--config", str(file)]) == wanted  # wherever it stands
    assert (
        capsys.readouterr().err
        == f"from {file}: steps=7 layout=branch branch_layers=2; instead of its lr=0.001: lr=0.0001\n"
    )
    assert parse(tmp_path, EXAMPLE, "--layout=full") == Config(lr=1e-3, steps=7)
    assert capsys.readouterr().err.endswith("layout=full; without effect here: branch_layers=2\n")
    monkeypatch.setenv("RANK", "1")
    parse(tmp_path, EXAMPLE)
    assert capsys.readouterr().err == ""


def test_a_recipe_may_have_a_table_for_whatever_has_options(tmp_path):
    places = [*ROOT.glob("*.py"), *ROOT.glob("evaluation/*.py"), *ROOT.glob("rlhf/*/*.py")]
    having = [file for file in places if "parse(Config)\n" in file.read_text(encoding="utf-8")]
    names = {file.parent.name if file.stem == "__main__" else file.stem for file in having}
    assert {"train_ppo", "card", "track", "feedback"} <= names == option_files.commands()
    tables = "".join(f"[{name}]\nzzz = 1\n" for name in sorted(names))
    assert parse(tmp_path, f"[test_option_files]\nsteps = 3\n{tables}").steps == 3


@pytest.mark.parametrize(
    "name, text, argv, message",
    [
        ("x.toml", "stepz = 3", [], "FILE: stepz is no option of test_option_files; did you mean steps?"),
        ("x.json", '{"zzz": 3}', [], "FILE: zzz is no option of test_option_files; there are data, domains, lr, "),
        ("x.toml", "[train_pp0]\nlr = 1", [], "FILE: [train_pp0] is no script; did you mean train_ppo?"),
        ("x.toml", "[train_ppo]\nlr = 1", [], "FILE has options for train_ppo, and none for test_option_files"),
        ("x.toml", "lr = 'fast'", [], "FILE: lr = 'fast' is not valid; expected number"),
        ("x.toml", "lr = nan", [], "FILE: lr = nan is not valid; expected number"),
        ("x.toml", "steps = 1.5", [], "FILE: steps = 1.5 is not valid; expected integer"),
        ("x.toml", "steps = 1979-05-27", [], "FILE: steps = datetime.date(1979, 5, 27) is not valid; expected integer"),
        ("x.toml", "data = ['a', 'b']", [], "FILE: data = ['a', 'b'] is not valid; expected text"),
        ("x.json", '{"data": null}', [], "FILE: data = None is not valid; expected text"),
        ("x.toml", "lr = 1\nlr = 2", [], "FILE is no TOML file: "),
        ("x.toml", "branch_layers = 1\nbranch-layers = 2", [], "FILE: branch-layers stands there twice"),
        ("x.json", '{"lr": 1, "lr": 2}', [], "FILE is no JSON file: lr stands there twice"),
        ("x.json", '{"lr": 1,', [], "FILE is no JSON file: "),
        ("x.json", "[" * 100_000, [], "FILE is no JSON file: "),
        ("x.json", '{"steps": ' + "9" * 5000 + "}", [], "FILE is no JSON file: "),
        ("x.json", "[1]", [], "FILE holds no options: name = value was expected"),
        ("x.yaml", "lr: 1", [], "--config=FILE: give a .toml or a .json file, or one of the presets chat, demo, large"),
        ("x.toml", "branch_layers = 2", [], "FILE: --branch_layers has no effect with --layout=full; use --layout=branch"),
        ("x.toml", "steps = 0", [], "--steps=0 is too small; it must be at least 1 (FILE says steps=0)"),
        ("x.toml", "steps = 0", ["--steps=-1"], "--steps=-1 is too small; it must be at least 1"),
        ("x.toml", "", ["--config=demo"], "--config is given twice"),
        ("x.toml", "", ["--branch_layers=2"], "--branch_layers has no effect with --layout=full; use --layout=branch"),
    ],
)  # fmt: skip
def test_ways_to_get_a_file_wrong(tmp_path, name, text, argv, message):
    with pytest.raises(ValueError) as error:
        parse(tmp_path, text, *argv, name=name)
    said = str(error.value).replace(str(tmp_path / name), "FILE")
    assert said.startswith(message) and "\n" not in config.one_line(error.value)


@given(
    content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), suffix=st.sampled_from([".json", ".toml"])
)
def test_any_bytes_are_options_or_one_line(tmp_path_factory, content, suffix):
    file = tmp_path_factory.mktemp("options") / f"mine{suffix}"
    file.write_bytes(content)
    try:
        config.parse(Config, [f"--config={file}"])
    except ValueError as error:
        assert str(file) in config.one_line(error)


def test_files_that_are_not_there():
    with pytest.raises(ValueError, match="--config=chta: no preset has that name; did you mean chat?"):
        config.parse(Config, ["--config=chta"])
    with pytest.raises(FileNotFoundError):
        config.parse(Config, ["--config=nowhere/mine.toml"])


def test_a_run_from_a_file_is_the_run_of_the_options_typed(world, tmp_path):
    """The same lines and the same run.json, which repeats the run; and each resumes the other."""
    small = dict(word.removeprefix("--").split("=") for word in world.command("train_lm.py", epochs=1, log_every=1)[1:])
    small = {name: value for name, value in small.items() if name not in ("data", "out")}
    (tmp_path / "mine.toml").write_text("[train_lm]\n" + "".join(f"{k} = {v!r}\n" for k, v in small.items()))
    data, runs = f"--data={world.path / 'data'}", {name: tmp_path / name for name in ("typed", "file", "repeated")}
    given = {
        "typed": [f"--{k}={v}" for k, v in small.items()],
        "file": [f"--config={tmp_path / 'mine.toml'}"],
        "repeated": [f"--config={runs['typed'] / 'run.json'}"],
    }
    kept = []
    for name, run in runs.items():
        done = world.start(["train_lm.py", data, f"--out={run}", *given[name]]).wait()
        assert done.code == 0 and (done.err == "" if name == "typed" else done.err.startswith("from ")), done
        kept.append(
            [{k: v for k, v in row.items() if "loss" in k or k == "step"} for row in lines(run / "metrics.jsonl")]
        )
        assert json.loads((run / "run.json").read_text()) | {"out": ""} == json.loads(
            (runs["typed"] / "run.json").read_text()
        ) | {"out": ""}
    assert kept[0] and kept[0] == kept[1] == kept[2]
    again = world.start(["train_lm.py", data, f"--out={runs['file']}", *given["typed"]]).wait()
    assert (again.code, again.err) == (0, ""), again


# ---- presets


def recipe(Config: type, argv: list[str]) -> dict:
    return {name: value for name, value in asdict(config.parse(Config, argv)).items() if name not in PLACES}


def test_every_table_of_a_preset_is_for_a_script_and_is_read_by_it():
    assert option_files.presets() == ["chat", "demo", "large"]
    for preset in option_files.presets():
        tables = option_files.read_toml((option_files.PRESETS / f"{preset}.toml").read_text())
        for script, options in tables.items():
            Config = module_of(f"{script}.py").Config
            init = ["--init=model"] * any(field.name == "init" for field in fields(Config))
            found = asdict(config.parse(Config, [f"--config={preset}", *init]))
            for name, value in options.items():
                assert found[name] == (tuple(value) if isinstance(value, list) else value), (preset, script, name)
            assert not {field.name for field in fields(Config)} & PLACES & set(options)


@pytest.mark.parametrize("preset", ["demo", "chat"])
def test_a_preset_is_what_make_does(preset):
    plan = subprocess.run(["make", "-n", preset], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = [command for line in plan.replace("\\\n", " ").splitlines() for command in split(preset, line)]
    ours = {command.words[1]: command.words[2:] for command in reversed(found)}  # the first of each
    tables = option_files.read_toml((option_files.PRESETS / f"{preset}.toml").read_text())
    for script in tables:
        Config, words = module_of(f"{script}.py").Config, ours.get(f"{script}.py", [])
        where = [word for word in words if word.strip("-").partition("=")[0] in PLACES]
        assert where and recipe(Config, words) == recipe(Config, [f"--config={preset}", *where]), script
