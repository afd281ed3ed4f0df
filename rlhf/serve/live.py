"""A run of training while it goes on, for the page: its curves with the bands of a healthy run, and its last samples.

Only files below the run's directory are read, and only those that a trainer of ours writes there.
"""

import hashlib
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path

from rlhf.doctor.diagnosis import diagnose, in_words, stops_of
from rlhf.infra.files import read_json, read_lines
from rlhf.infra.healthy import HEALTHY, LARGE, Healthy, band, is_outside
from rlhf.infra.metrics import is_number

FILES = ("metrics.jsonl", "samples.jsonl", "run.json", "report.json")
POINTS = 400  # of a curve that are sent
SAMPLES = 8
MOST = 2**26  # bytes of a file that are read
PER_TOKEN = {"logprobs": "logprob", "values": "value", "advantages": "advantage"}  # of samples.jsonl -> for the page


class Watched:
    """The directory of one run. ValueError where it is none; a run that has not begun yet is one that is waited for."""

    def __init__(self, directory: str):
        self.path = Path(directory).resolve()
        if not self.path.is_dir():
            raise ValueError(f"--run={directory} is not a directory; name what is --out of train_ppo.py")
        below = sorted(file.parent.name for file in self.path.glob("*/metrics.jsonl"))
        if below and not (self.path / "metrics.jsonl").exists():
            raise ValueError(f"--run={directory} is no run but holds {', '.join(below)}: --run={directory}/{below[0]}")
        self.lock, self.tag, self.content = threading.Lock(), "", b""

    @property
    def name(self) -> str:
        return self.path.name

    def seen(self) -> tuple[str, bytes]:
        """(a tag that changes with the files, what there is to see as JSON); waits for the disk."""
        with self.lock:
            tag = self.tag_now()
            if tag != self.tag:
                try:
                    content = strict(self.state())
                except (
                    ValueError,
                    TypeError,
                    KeyError,
                    AttributeError,
                    ArithmeticError,
                    OSError,
                ) as error:  # not our file
                    content = strict({"name": self.name, "problem": f"this run cannot be read: {error}"})
                self.tag, self.content = tag, content
            return self.tag, self.content

    def tag_now(self) -> str:
        facts = []
        for name in (*FILES, "bad"):
            try:
                x = (self.path / name).stat()
                facts.append((name, x.st_ino, x.st_size, x.st_mtime_ns))
            except OSError:
                facts.append((name,))
        return f'"{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}"'

    def file(self, name: str) -> Path | None:
        """A file of the run, None where it has none; a link that leads out of the directory is none of its files."""
        path = self.path / name
        if not path.exists() or not path.resolve().is_relative_to(self.path):
            return None
        if path.is_file() and path.stat().st_size > MOST:
            raise ValueError(f"{name} has more than {MOST >> 20} MiB")
        return path

    def written(self, name: str) -> float:
        """When, in seconds since 1970; 0 for never."""
        path = self.file(name)
        return path.stat().st_mtime if path else 0.0

    def is_over(self, report: dict, rows: int) -> bool:
        """Is the report that of these rows, and not of a part of the run that went on since?"""
        done = report.get("iterations")
        if type(done) is int:
            return rows <= done + 1  # max_kl takes the policy of the last row back
        return bool(report) and self.written("report.json") >= self.written("metrics.jsonl")

    def lines(self, name: str) -> list[dict]:
        path = self.file(name)
        return read_lines(path) if path else []

    def object(self, name: str) -> dict:
        path = self.file(name)
        return read_json(path) if path else {}

    def state(self) -> dict:
        options, report = self.object("run.json"), self.object("report.json")
        rows = [row for row in self.lines("metrics.jsonl") if type(row.get("step")) is int]
        samples, written = self.lines("samples.jsonl"), self.written("metrics.jsonl")
        is_ppo = any("objective/kl" in row for row in rows)
        columns = dict(sorted(series(rows).items()))
        return {
            "name": self.name,
            "problem": None,
            "done": len(rows),
            "total": options.get("iterations") if is_ppo and type(options.get("iterations")) is int else None,
            "finished": self.is_over(report, len(rows)),
            "modified": written if rows else None,
            "curves": [curve(name, *columns[name]) for name in chosen(columns, is_ppo)],
            "table": [[name, *(short(x) for x in (y[0], y[-1], min(y), max(y)))] for name, (_, y) in columns.items()],
            "findings": self.findings(rows, options, samples) if is_ppo else [],
            "samples": last_samples(samples),
        }

    def findings(self, rows: list[dict], options: dict, samples: list[dict]) -> list[str]:
        """The doctor's lines."""
        own = all(self.file(f"bad/{file.name}") for file in (self.path / "bad").glob("*.json"))
        rows = [row for row in rows if "objective/kl" in row]
        found = diagnose(rows, options, samples, stops_of(self.path) if own else ())
        return in_words(found, len(rows)).split("\n")


def strict(found: dict) -> bytes:
    """As JSON; ValueError for a number that is none."""
    return json.dumps(found, allow_nan=False, separators=(",", ":")).encode()


def series(rows: list[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """{metric: (steps, values)} of what is finite."""
    found: dict[str, tuple[list, list]] = {}
    for row in rows:
        for name, x in row.items():
            if name not in ("step", "iteration", "episode") and is_number(x):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(x)
    return found


def chosen(columns: dict[str, tuple], is_ppo: bool) -> Iterator[str]:
    """The four that tell most: of PPO those of the report, of another trainer its losses, and what else moves."""
    moved = [name for name, (_, y) in columns.items() if min(y) < max(y)]
    if not is_ppo:
        losses = [x for x in moved if x.startswith(("loss/", "validation/"))]
        return iter([*losses, *(x for x in moved if x not in losses and not x.startswith(("time/", "perf/")))][:4])
    early = max(len(steps) for steps, _ in columns.values()) < 2  # nothing has moved yet
    usable = [next((x for x in row if x in (columns if early else moved)), None) for row in LARGE]
    return filter(None, usable)


def curve(name: str, steps: list[int], values: list[float]) -> dict:
    about, inside = HEALTHY.get(name, Healthy(name)), band(name, values)
    every = -(-len(values) // POINTS)
    kept = sorted({*range(0, len(values), every), len(values) - 1})
    return {
        "name": name,
        "words": about.words,
        "unit": about.unit,
        "rule": about.rule,
        "look": about.outside if is_outside(name, values) else "",
        "band": inside and [x if math.isfinite(x) else None for x in inside],
        "steps": [steps[i] for i in kept],
        "values": [short(values[i]) for i in kept],
    }


def short(x: float) -> float:
    """Five digits."""
    return float(f"{x:.5g}")


def last_samples(rows: list[dict]) -> dict | None:
    """The newest iteration whose responses were kept, as the page colours them."""
    rows = [row for row in rows if type(row.get("step")) is int and isinstance(row.get("response"), str)]
    if not rows:
        return None
    step = max(row["step"] for row in rows)
    return {"step": step, "rows": [sample(row) for row in rows if row["step"] == step][:SAMPLES]}


def sample(row: dict) -> dict:
    texts = row.get("tokens")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        texts = [row["response"]]
    columns = {ours: column(row.get(name), len(texts)) for name, ours in PER_TOKEN.items()}
    pairs = zip(columns["logprob"], column(row.get("ref_logprobs"), len(texts)))
    columns["logratio"] = [None if a is None or b is None else short(a - b) for a, b in pairs]
    tokens = [{"text": text} | {name: x[i] for name, x in columns.items()} for i, text in enumerate(texts)]
    numbers = {name: short(row[name]) if is_number(row.get(name)) else None for name in ("score", "kl")}
    return {"prompt": str(row.get("prompt", "")), "tokens": tokens} | numbers


def column(values, count: int) -> list[float | None]:
    """A number for each of `count` tokens; None where it is not known."""
    if not isinstance(values, list) or len(values) != count:
        return [None] * count
    return [short(x) if is_number(x) else None for x in values]


def endpoint(run: Watched):
    """GET /v1/run: 304 where the client's tag is still right, so that asking every two seconds costs nothing."""
    import asyncio

    from starlette.responses import Response

    async def now(request):
        tag, content = await asyncio.to_thread(run.seen)
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type="application/json")

    return now
