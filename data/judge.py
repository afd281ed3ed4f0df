"""A judge that comes with the data: a Python file in its directory, written by the reader of the data."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

JUDGE = "judge.py"  # function judge(prompts, responses) -> scores, as a reward is


def own_judge(data: str | Path) -> Callable[[str], float] | None:
    """The judge of prepared data as text -> score; None where there is none, and for data in several places."""
    file = Path(data) / JUDGE
    if not file.is_file():
        return None
    spec = importlib.util.spec_from_file_location("judge_of_the_data", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda text: module.judge([""], [text])[0]
