"""Preference files: one JSON object a line with prompt, chosen, rejected and perhaps subset, as RewardBench has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.text import parse_json


@dataclass(frozen=True)
class Preference:
    prompt: str
    chosen: str
    rejected: str
    subset: str  # "" where the file names none
    strength: float = 1.0  # how much better, as the file says; 1 where it does not


def read_preferences(path: str | Path) -> tuple[list[Preference], int]:
    """All comparisons of a file, and how many lines were dropped because both answers are the same text.

    ValueError, naming the line, for one that is no such object or has an empty answer, and for a file without any.
    """
    found, same = [], 0
    for where, row in text_rows(path, ("prompt", "chosen", "rejected")):
        preference = preference_of(row, where)
        if preference.chosen == preference.rejected:
            same += 1
        else:
            found.append(preference)
    if not found:
        raise ValueError(f"{path} holds no comparison of two different answers ({same} lines have the same one twice)")
    return found, same


def preference_of(row: dict, where: str) -> Preference:
    for name in ("chosen", "rejected"):
        if not row[name].strip():
            raise ValueError(f"{where}: {name} is empty, which no reward model can read; remove the line")
    strength = 1.0 if row.get("strength") is None else row["strength"]
    if not isinstance(strength, int | float) or not 0 < strength < 1e6:
        raise ValueError(f"{where}: strength {strength!r} is no number above 0")
    return Preference(row["prompt"], row["chosen"], row["rejected"], str(row.get("subset") or ""), float(strength))


def text_rows(path: str | Path, names: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """(where, row) of every line that is not blank: JSON objects with these texts, and whatever else.

    ValueError, naming the line, for any other, and for a file that is not UTF-8.
    """
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 (byte {e.start}); convert it first") from None
    expected = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {line.strip()[:40]!r}; an object with {expected} was expected")
        for name in names:
            if not isinstance(row.get(name), str):
                raise ValueError(f"{where} has no text {name!r}; it has {', '.join(row) or 'nothing'}")
        yield where, row
