"""A run in a tracker is its metrics.jsonl: every line once, resumed or not, read back with the trackers' own readers."""

import contextlib
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROOT, lines

from rlhf.infra.files import write_lines
from rlhf.infra.metrics import Metrics
from rlhf.infra.run import HELD
from rlhf.track.__main__ import main, send
from rlhf.track.journal import FILE, Journal
from rlhf.track.trackers import TRACKERS


def write_run(run, rows: list[tuple[int, dict]], resume_step: int = 0) -> None:
    """What a train script does: the lines of `resume_step` and later are dropped, then these are written."""
    log = Metrics(run, resume_step=resume_step)
    for step, values in rows:
        log.log(step, values)
    log.close()
    (run / "run.json").write_text(json.dumps({"lr": 3e-4, "out": "a|b", "sources": ["film"]}))


def track(monkeypatch, run, to: str, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["track", str(run), f"--to={to}", *more])
    held = len(HELD)
    main()
    os.close(HELD.pop(held))  # as the end of the process would


# ---- what is sent, whatever the tracker


class Paper:
    """The textbook tracker: a list of what was sent."""

    def __init__(self, rewinds: bool):
        self.rewinds, self.rows = rewinds, []

    def send(self, step: int, values: dict) -> None:
        self.rows.append((step, values))

    def rewind(self, step: int) -> bool:
        if self.rewinds:
            self.rows = [row for row in self.rows if row[0] < step]
        return self.rewinds

    def flush(self) -> None:
        pass


sessions = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.booleans(), st.booleans()), max_size=6)


@given(sessions=sessions, rewinds=st.booleans())
def test_every_line_is_sent_once_however_often_a_run_is_resumed(tmp_path_factory, sessions, rewinds):
    """Sessions: so many steps back to the last checkpoint, then so many steps more, the same numbers or others; and was
    the tracker looked at between the two? It is another process each time.
    """
    place, paper, rows, made = tmp_path_factory.mktemp("track"), Paper(rewinds), [], set()
    for nth, (back, steps, same, looked) in enumerate(sessions):
        rows = rows[: max(0, len(rows) - back)]
        if looked:
            send(rows, Journal(place, "paper"), paper, "paper")
        for step in range(len(rows), len(rows) + steps):
            rows.append({"step": step, "loss": float(step), "time": 0.0 if same else float(nth), "bad": None})
            made.add(step)
        send(rows, Journal(place, "paper"), paper, "paper")
    assert send(rows, Journal(place, "paper"), paper, "paper") == 0
    sent = [step for step, _ in paper.rows]
    assert all("bad" not in values and "step" not in values for _, values in paper.rows)
    if rewinds and (
        not sessions or sessions[-1][1]
    ):  # lines that were dropped and not made again stay for the time being
        assert paper.rows == [(row["step"], {"loss": row["loss"], "time": row["time"]}) for row in rows]
    else:
        assert sent == sorted(set(sent)) and (rewinds or set(sent) == made)


def test_several_lines_of_a_step_are_sent(tmp_path):
    rows, paper = [{"step": 3, "loss": 1.0}, {"step": 3, "validation": 2.0}], Paper(False)
    for n in (1, 2):
        send(rows[:n], Journal(tmp_path, "paper"), paper, "paper")
    assert paper.rows == [(3, {"loss": 1.0}), (3, {"validation": 2.0})]


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    write_run(tmp_path / "run", [(0, {"loss": 1.0})])
    with pytest.raises(FileNotFoundError, match="nowhere has no run.json"):
        track(monkeypatch, "nowhere", "tensorboard")
    for option in ("project", "name"):
        with pytest.raises(ValueError, match=f"--{option} has no effect with --to=tensorboard"):
            track(monkeypatch, tmp_path / "run", "tensorboard", f"--{option}=mine")
    (tmp_path / "wandb").mkdir()  # as an offline run leaves it in the directory that Python looks into first
    monkeypatch.syspath_prepend(tmp_path)
    for to in TRACKERS:
        if importlib.util.find_spec(to) is None or importlib.util.find_spec(to).origin is None:
            with pytest.raises(ValueError, match=f"--to={to} needs {to}: pip install {to}"):
                track(monkeypatch, tmp_path / "run", to)
            assert not (tmp_path / "run" / to).exists()
    write_lines(tmp_path / FILE, [{"to": "wandb", "id": "0"}])
    with pytest.raises(ValueError, match="holds what went to wandb: choose another --out for tensorboard"):
        Journal(tmp_path, "tensorboard")
    write_lines(tmp_path / FILE, [{"step": 1}])
    with pytest.raises(ValueError, match="sent.jsonl is damaged"):
        Journal(tmp_path, "tensorboard")


# ---- TensorBoard

VALUES = [(i, {"objective/kl": i * 0.37, "loss/all": 1 / (i + 1), "bad": float("nan")}) for i in range(6)]


def scalars(place) -> dict[str, list[tuple[int, float]]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected(run) -> dict[str, list[tuple[int, float]]]:
    columns = {}
    for row in lines(run / "metrics.jsonl"):
        for name, value in row.items():
            if name != "step" and value is not None:
                columns.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    return columns


def test_tensorboard_reads_a_run_afterwards_and_after_it_was_resumed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    run = tmp_path / "out" / "ppo"
    write_run(run, VALUES[:4])
    track(monkeypatch, run, "tensorboard")
    assert "4 lines of" in capsys.readouterr().out
    assert scalars(run / "tensorboard") == expected(run) and len(expected(run)["loss/all"]) == 4
    track(monkeypatch, run, "tensorboard")
    assert "0 lines of" in capsys.readouterr().out
    again = [(step, values | {"loss/all": -values["loss/all"]}) for step, values in VALUES[2:]]
    write_run(run, again, resume_step=2)
    track(monkeypatch, run, "tensorboard")
    assert "4 lines of" in capsys.readouterr().out
    assert scalars(run / "tensorboard") == expected(run) and len(expected(run)["loss/all"]) == 6


@pytest.mark.slow
def test_tensorboard_follows_a_run_until_it_has_ended(tmp_path):
    pytest.importorskip("tensorboard")
    run, place = tmp_path / "ppo", tmp_path / "board"
    write_run(run, VALUES[:1])
    command = [
        sys.executable,
        "-m",
        "rlhf.track",
        run,
        "--to=tensorboard",
        "--follow",
        "--every=0.05",
        f"--out={place}",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (place / FILE).exists():  # until the first line was sent
            with contextlib.suppress(subprocess.TimeoutExpired):
                pytest.fail(f"ended early: {process.wait(0.05)}")
        write_run(run, VALUES[1:], resume_step=1)
        (run / "report.json").write_text("{}")
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (0, f"6 lines of {run}/metrics.jsonl -> tensorboard, {place}\n"), err
    assert scalars(place) == expected(run)


# ---- the others, where they are installed


def offline_records(file) -> list:
    """Records of a .wandb file: chunks of a LevelDB log (crc, length, type) in blocks of 32 KB behind a header."""
    from wandb.proto import wandb_internal_pb2 as wire

    blob, place, held, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(blob):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(blob[place + 4 : place + 6], "little"), blob[place + 6]
        held += blob[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            found.append(wire.Record.FromString(held))
            held = b""
    return found


def track_apart(run, *options: str, **env: str) -> None:
    """In a process of its own, as a user does it: wandb names what it writes by the second."""
    command = [sys.executable, "-m", "rlhf.track", str(run), *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(command, env=env, cwd=run.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    run = tmp_path / "ppo"
    for first, end in ((0, 4), (2, 6)):  # killed after step 3, resumed from the checkpoint after step 1
        write_run(run, [(i, values | {"time": float(end)}) for i, values in VALUES[first:end]], resume_step=first)
        track_apart(run, "--to=wandb", WANDB_MODE="offline")
    files = sorted((run / "wandb").glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)
    records = [record for file in files for record in offline_records(file)]
    assert {record.run.run_id for record in records if record.HasField("run")} == {
        Journal(run / "wandb", "wandb").head["id"]
    }
    rows = [record.history for record in records if record.HasField("history")]
    said = [{"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in row.item} for row in rows]
    assert [row.step.num for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["objective/kl"] for row in said] == [values["objective/kl"] for _, values in VALUES]
    assert all("bad" not in row for row in said)


@pytest.mark.slow
def test_trackio(tmp_path):
    pytest.importorskip("trackio")
    run = tmp_path / "ppo"
    for first, end in ((0, 4), (2, 6)):
        write_run(run, [(i, values | {"time": float(end)}) for i, values in VALUES[first:end]], resume_step=first)
        track_apart(run, "--to=trackio", "--project=mine", TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "mine.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert [step for _, step, _ in rows] == [0, 1, 2, 3, 4, 5] and len({name for name, _, _ in rows}) == 1
    assert [json.loads(text)["loss/all"] for _, _, text in rows] == [values["loss/all"] for _, values in VALUES]
