"""Options from a file: --config=FILE takes run.json of another run, a few lines of JSON or TOML, or the name of a preset.

A file holds options as the command line spells them. A table, `[train_ppo]` in TOML, belongs to that script alone, so one
file can hold a whole recipe. What run.json records beside its options (checksums, overrides) is passed over.
"""

import difflib
import json
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # where the scripts lie
PRESETS = ROOT / "presets"


def read_options(spec: str, script: str, names: Collection[str]) -> tuple[str, dict]:
    """(the file that `spec` names, {option: value} of it for `script`, such as train_ppo, which knows the options `names`).

    ValueError that names the file, and the key or the place, for what cannot be read or is no option.
    """
    file = find(spec)
    read = READERS.get(file.suffix)
    if read is None:
        raise ValueError(f"--config={spec}: give a .toml or a .json file, or one of the presets {', '.join(presets())}")
    try:
        found = read(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad text, bad syntax, or nested without end
        raise ValueError(f"{file} is no {file.suffix[1:].upper()} file: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no options: name = value was expected")
    options = {name: value for name, value in found.items() if not isinstance(value, dict)}
    tables = {name: value for name, value in found.items() if isinstance(value, dict)}
    for table in tables:
        if table not in (known := {script, *commands()}):
            raise ValueError(f"{file}: [{table}] is no script; {nearest(table, sorted(known))}")
    if tables and script not in tables and not options:
        raise ValueError(f"{file} has options for {', '.join(tables)}, and none for {script}")
    chosen = {}
    for name, value in [*options.items(), *tables.get(script, {}).items()]:
        option = name.replace("-", "_")
        if option == "overrides" or option.removesuffix("_sha256") in names and option not in names:
            continue  # of run.json
        if option not in names:
            raise ValueError(f"{file}: {name} is no option of {script}; {nearest(option, names)}")
        if option in chosen:
            raise ValueError(f"{file}: {name} stands there twice")
        chosen[option] = value
    return str(file), chosen


def find(spec: str) -> Path:
    """The file; a word without a suffix is the name of a preset."""
    file = Path(spec)
    if file.suffix or len(file.parts) != 1:
        return file
    if spec not in presets():
        raise ValueError(f"--config={spec}: no preset has that name; {nearest(spec, presets())}")
    return PRESETS / f"{spec}.toml"


def presets() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def commands() -> set[str]:
    """What has options, by the names that tables give it: the scripts, `python -m rlhf.track`, and what evaluate.py does."""
    modules = {file: file.stem for file in (*ROOT.glob("*.py"), *ROOT.glob("evaluation/*.py"))}
    modules |= {file: file.parent.name for file in ROOT.glob("rlhf/*/__main__.py")}
    return {name for file, name in modules.items() if "\nclass Config:\n" in file.read_text(encoding="utf-8")}


def nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def read_json_options(text: str) -> dict:
    def unique(pairs: list[tuple]) -> dict:
        names = [name for name, _ in pairs]
        if again := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{again[0]} stands there twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def read_toml(text: str) -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


READERS: dict[str, Callable[[str], dict]] = {".json": read_json_options, ".toml": read_toml}


def spelled(value) -> str:
    """A value of a file as the command line would have it; ValueError for what no option can be."""
    if isinstance(value, list):
        return ",".join(map(spelled, value))
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    if not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is no value of an option")
    return str(value)
