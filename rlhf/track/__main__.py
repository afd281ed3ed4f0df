"""The metrics of a run in TensorBoard, Weights & Biases or Trackio, while it trains or afterwards.

python -m rlhf.track out/ppo --to=tensorboard     # then: tensorboard --logdir=out
python -m rlhf.track out/ppo --to=wandb --follow  # until the run has ended; WANDB_MODE=offline needs no network
"""

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.infra import config
from rlhf.infra.files import read_json
from rlhf.infra.metrics import read_rows
from rlhf.infra.run import hold
from rlhf.track.journal import Journal
from rlhf.track.trackers import TRACKERS


@dataclass(frozen=True)
class Config:
    run: str  # run directory of a train script; the word "--run" may be left out
    to: Literal["tensorboard", "wandb", "trackio"]  # who shows it; each is installed by pip under that name
    out: str | None = None  # where event files or offline runs go, with a note of what was sent; none = RUN/TO
    project: str = "plain-rlhf"  # where runs are kept [to=wandb|trackio]
    name: str | None = None  # of the run there; none = the directory's [to=wandb|trackio]
    follow: bool = False  # go on until the run has ended
    every: float = 5.0  # seconds between two looks at the run [follow=true]

    def __post_init__(self):
        config.at_least(self, every=0.01)


def main() -> None:
    cfg = config.parse(Config)
    run = Path(cfg.run)
    if not (run / "run.json").exists():
        raise FileNotFoundError(f"{run} has no run.json: the directory of a train script was expected")
    check_installed(cfg.to)
    place = Path(cfg.out or run / cfg.to)
    place.mkdir(parents=True, exist_ok=True)
    hold(place)
    journal = Journal(place, cfg.to)
    name, options = cfg.name or run.resolve().name, read_json(run / "run.json")
    tracker = TRACKERS[cfg.to](place, cfg.project, name, journal.head["id"], options, journal.last + 1)
    sent, over = 0, False
    try:
        while not over:
            over = not cfg.follow or ended(run)  # before what it wrote is read
            sent += send(read_rows(run / "metrics.jsonl"), journal, tracker, cfg.to)
            if not over:
                time.sleep(cfg.every)
    finally:
        tracker.close()
    print(f"{sent} lines of {run}/metrics.jsonl -> {cfg.to}, {place}")


def check_installed(to: str) -> None:
    """ValueError where the tracker's package is missing; a mere directory of that name, as it leaves behind, is no package."""
    found = importlib.util.find_spec(to)
    if found is None or found.origin is None:
        raise ValueError(f"--to={to} needs {to}: pip install {to}")


def ended(run: Path) -> bool:
    """Has the run written its report since its last line?"""
    report, metrics = run / "report.json", run / "metrics.jsonl"
    return report.exists() and metrics.exists() and report.stat().st_mtime_ns >= metrics.stat().st_mtime_ns


def send(rows: list[dict], journal: Journal, tracker, to: str) -> int:
    """Send what was not sent yet; -> how many lines. What a resumed run made again replaces what the tracker has, if it can."""
    news, again = journal.news(rows)
    if not news:
        return 0
    rewound = again is not None and tracker.rewind(again)
    if again is not None and not rewound:
        last = journal.last
        print(f"steps {again} to {last} were made again: {to} keeps what it had of them", flush=True)
        news = [row for row in news if row["step"] > last]
    for row in news:
        tracker.send(row["step"], numbers(row))
    tracker.flush()
    journal.write(rows, forget=rewound)
    return len(news)


def numbers(row: dict) -> dict[str, float]:
    """The metrics of a line; null, a number that was not finite, is left out."""
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}


if __name__ == "__main__":
    config.run(main, stopped="stopped; the same command goes on from here")
