"""The files that training and measuring leave in a run directory, read for a report or a comparison."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rlhf.infra.files import read_json, read_lines
from rlhf.infra.metrics import is_number

DEPTH = 3  # levels of directories below --run
JSON = ("run.json", "report.json", "card.json", "summary.json", "overoptimisation.json", "rounds.json")
LINES = ("metrics.jsonl", "samples.jsonl", "tokens.jsonl")


@dataclass(frozen=True)
class Source:
    """A directory with files that we know."""

    name: str  # relative to --run
    files: dict[str, dict | list]  # name -> content
    damaged: list[str] = field(default_factory=list)  # why a file of it is left out
    path: Path = Path()  # where it lies: names are not unique, the directory's own may be that of one below it

    @property
    def kind(self) -> str:
        """What run.json's options belong to."""
        options = self.files.get("run.json", {})
        return next((kind for kind, (_, option) in KINDS.items() if option in options), "other")


KINDS = {  # kind -> its script, and an option that no other script has
    "PPO": ("train_ppo.py", "kl_coef"),
    "reward model": ("train_rm.py", "pooling"),
    "language model": ("train_lm.py", "width"),
    "rounds": ("iterate.py", "rater_noise"),
}


def find(run: Path, option: str = "run") -> list[Source]:
    """The directories up to DEPTH levels below `run` that hold files of ours, by name; ValueError where there is none,
    which names the option.
    """
    if not run.is_dir():
        raise ValueError(f"--{option}={run} is not a directory")
    sources = []
    for place, below, files in os.walk(run):
        path = Path(place)
        depth = len(path.relative_to(run).parts)
        # checkpoints are part of their run; prepared data has a manifest
        below[:] = sorted(x for x in below if not re.match(r"step_\d+$|best$|\.", x)) if depth < DEPTH else []
        if "manifest.json" in files:
            below[:] = []
        elif {*files} & {*JSON, *LINES}:
            sources.append(read(path, str(path.relative_to(run)) if depth else run.resolve().name))
    if not sources:
        raise ValueError(
            f"--{option}={run} holds no run: none of {', '.join(JSON + LINES)} in it or up to {DEPTH} levels below; "
            "name what was --out of train_*.py, evaluate.py or iterate.py"
        )
    return sources


def read(path: Path, name: str) -> Source:
    found, damaged = {}, []
    for file in (x for x in JSON + LINES if (path / x).is_file()):
        try:
            if content := (read_lines if file in LINES else read_json)(path / file):
                found[file] = content
        except (ValueError, OSError) as error:
            damaged.append(f"Left out, {name}/{file}: {error}")
    return Source(name, found, damaged, path)


def series(rows: Sequence[dict], wanted: Callable[[str], bool]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of every metric that has finite ones."""
    columns: dict[str, list] = {}
    for row in rows:
        for name, x in row.items():
            if (
                name not in ("step", "iteration", "episode")
                and wanted(name)
                and is_number(x)
                and is_number(row.get("step"))
            ):
                columns.setdefault(name, []).append((row["step"], x))
    return {name: tuple(np.array(x, float).T) for name, x in columns.items()}
