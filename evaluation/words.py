"""A number and its interval: one type in memory, one form in JSON, one way to say it; and a table and its Markdown."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from rlhf.statistics import Estimate


def as_json(value: float, low: float, high: float, name: str = "mean", **more) -> dict:
    """{name: value, "low": ..., "high": ...}, null for what is not finite: there was nothing to count, or there is no end."""
    numbers = zip((name, "low", "high"), map(float, (value, low, high)))
    return {key: x if math.isfinite(x) else None for key, x in numbers} | more


def estimate_of(found: dict, null: float = math.nan) -> Estimate:
    """`as_json` read again, whatever it called the number; `null`: what null stood for."""
    name = "mean" if "mean" in found else "value"
    return Estimate(*(null if found[key] is None else found[key] for key in (name, "low", "high")))


def show(found: dict | None, form: str = ".3f", null: float = math.nan) -> str:
    """0.412 [0.380, 0.455] of what `as_json` made; - where it is missing, or null stood for nothing to count."""
    return "-" if found is None else format(estimate_of(found, null), form)


def number(x: float | None, form: str = ".3f") -> str:
    """A number without an interval; - for null."""
    return "-" if x is None else f"{x:{form}}"


def brief(x: float, sign: str = "") -> str:
    """.35, -1.29, 12.4: three digits at most, without the 0 before the point."""
    if not math.isfinite(x):
        return "-"
    text = f"{x:{sign}.{2 if abs(x) < 9.995 else 1 if abs(x) < 99.95 else 0}f}"
    return text.replace("0.", ".", 1) if text.lstrip("+-").startswith("0.") else text


class Table(NamedTuple):
    """What Markdown and the report both show, built once by the measurement."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], rule: str = " --- ") -> str:
    """`rule`: a cell of the line below the head, which results.md, rounds.md and overoptimisation.md write without blanks."""
    above, *below = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return "\n".join([above, "|" + f"{rule}|" * len(head), *below])
