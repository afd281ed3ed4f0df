"""JSON in and out: what is read is checked, with the file and the line in every complaint; what is written is whole.

A writer puts a file beside the old one and renames it, so a reader sees the old content or the new, never half. JSON is
strict: a value that is not finite is written as null, which every reader understands.
"""

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path


def parse_json(text: str | bytes, where: str):
    """The value of a JSON text; ValueError, which begins with `where`, for a text that is none."""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not JSON: byte {error.start} is not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error})") from None


def read_json(file: str | Path) -> dict:
    """The object of a .json file. FileNotFoundError, or ValueError where it holds anything else."""
    check_regular(file)
    return as_object(parse_json(Path(file).read_bytes(), str(file)), str(file))


def check_regular(file: str | Path) -> None:
    """ValueError for a pipe, a device or a directory, of which some can be read for ever; OSError where there is nothing."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError(f"{file} is not a regular file")


def as_object(value, where: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {str(value)[:40]!r}; an object of names and values was expected")
    return value


def lines_of(file: str | Path) -> Iterator[tuple[str, bytes]]:
    """(where, line) of every line that is not blank; lines end at \\n alone, and bring it."""
    check_regular(file)
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{file}, line {number}", line


def read_rows(file: str | Path) -> Iterator[tuple[str, object]]:
    """(where, value) of every line of somebody's .jsonl file; ValueError for one that is not JSON or could not be stored."""
    for where, line in lines_of(file):
        value = parse_json(line, where)
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where} has half a surrogate pair (\\ud800 to \\udfff), which is no character") from None
        yield where, value


def read_lines(file: str | Path) -> list[dict]:
    """The objects of a .jsonl file that a run appends to; [] where there is none.

    A last line that a kill cut short is left out; ValueError for any other line that is no JSON object.
    """
    rows = []
    for where, line in lines_of(file) if Path(file).exists() else ():
        try:
            rows.append(as_object(parse_json(line, where), where))
        except ValueError:
            if line.endswith(b"\n"):
                raise
    return rows


def write_text(file: str | Path, text: str) -> None:
    """The text to a file, which is replaced as a whole."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)  # still there only after an error


def write_json(file: str | Path, record: dict) -> None:
    write_text(file, json.dumps(strict(record), indent=1, allow_nan=False) + "\n")


def write_lines(file: str | Path, rows: Iterable[dict]) -> None:
    """One object a line."""
    write_text(file, "".join(map(json_line, rows)))


def json_line(row: dict) -> str:
    """A row of a .jsonl file, with its end."""
    return json.dumps(strict(row), ensure_ascii=False, allow_nan=False) + "\n"


def strict(value):
    """The value with null for every number in it that is not finite."""
    if isinstance(value, dict):
        return {name: strict(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [strict(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
