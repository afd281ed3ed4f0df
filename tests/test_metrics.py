"""Metric files: strict JSON, exact on resume, whole after a kill; a console that a sampled text cannot disturb."""

import math
import multiprocessing
import os
import re
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from rlhf.infra import metrics
from rlhf.infra.metrics import Metrics
from rlhf.infra.screen import SAMPLE_LINES, Table, fitted, label, sample_table


def log(run, steps, resume=0, **kwargs):
    out = Metrics(run, resume_step=resume, **kwargs)
    for step in steps:
        out.log(step, {"objective/kl": step / 2, "lr": 1e-5})
        out.samples(step, [{"prompt": f"p{step}", "response": "r", "score": 0.5}])
    out.close()


def test_one_object_per_step(tmp_path):
    log(tmp_path / "new" / "run", range(3))
    assert metrics.read_lines(tmp_path / "new" / "run" / "metrics.jsonl") == [
        {"step": step, "objective/kl": step / 2, "lr": 1e-5} for step in range(3)
    ]
    assert metrics.read_lines(tmp_path / "new" / "run" / "samples.jsonl") == [
        {"step": step, "prompt": f"p{step}", "response": "r", "score": 0.5} for step in range(3)
    ]
    assert metrics.read_lines(tmp_path / "nothing") == []


def test_numbers_of_every_kind(tmp_path):
    Metrics(tmp_path).log(
        1, {"a": torch.tensor(0.5), "b": np.float32(0.25), "c": torch.tensor([3]), "d": 7, "e": np.int64(2), "f": True}
    )
    assert metrics.read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "a": 0.5, "b": 0.25, "c": 3, "d": 7, "e": 2, "f": True}
    ]


def test_json_is_strict_and_the_console_tells(tmp_path, capsys):
    Metrics(tmp_path).log(1, {"a": math.nan, "b": torch.tensor(math.inf), "c": -math.inf})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": null}\n'
    assert capsys.readouterr().out.split() == ["step", "1", "a", "nan", "b", "inf", "c", "-inf"]


def test_lists_are_stored_strictly_and_not_printed(tmp_path, capsys):
    Metrics(tmp_path).samples(1, [{"response": "ab", "score": 1.0, "tokens": ["a", "b"], "values": [0.5, math.nan]}])
    (row,) = metrics.read_lines(tmp_path / "samples.jsonl")
    assert row == {"step": 1, "response": "ab", "score": 1.0, "tokens": ["a", "b"], "values": [0.5, None]}
    assert capsys.readouterr().out.split() == ["score", "1", "ab"]


def test_floats_come_back_exactly(tmp_path):
    values = torch.rand(50, dtype=torch.float64).tolist() + [1e-310, 1 / 3, 1e300]
    Metrics(tmp_path).log(0, {str(i): value for i, value in enumerate(values)})
    assert list(metrics.read_lines(tmp_path / "metrics.jsonl")[0].values())[1:] == values


@pytest.mark.parametrize("resume", [0, 2, 3, 9])
def test_resume_drops_what_will_be_made_again(tmp_path, resume):
    log(tmp_path, range(5))
    log(tmp_path, range(resume, 6), resume=resume)
    for name in ("metrics.jsonl", "samples.jsonl"):
        steps = [row["step"] for row in metrics.read_lines(tmp_path / name)]
        assert steps == (list(range(6)) if resume < 6 else list(range(5)))
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "samples.jsonl"]


@pytest.mark.parametrize("cut", [1, 5, 12, 20])
def test_a_last_line_cut_short_is_dropped(tmp_path, cut):
    log(tmp_path, range(3))
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    complete = 2 + (cut == 1)  # only the line end is missing
    assert [row["step"] for row in metrics.read_lines(file)] == list(range(complete))
    log(tmp_path, range(3, 5), resume=3)
    assert [row["step"] for row in metrics.read_lines(file)] == [*range(complete), 3, 4]


def test_a_cut_inside_a_character_is_dropped_too(tmp_path):
    out = Metrics(tmp_path)
    out.samples(0, [{"prompt": "é", "response": "ü" * 9, "score": 1.0}] * 2)
    file = tmp_path / "samples.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: content.rindex("ü".encode()) + 1])
    assert len(metrics.read_lines(file)) == 1


def test_damage_elsewhere_is_told(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\n{"ste\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is not JSON"):
        metrics.read_lines(file)


def test_samples_keep_every_character(tmp_path, capsys):
    text = 'line\nbreak \u2028 \x85 \r "quotes" 😀 \x1b[31mred \0 \u202e'
    Metrics(tmp_path).samples(0, [{"prompt": text, "response": "", "score": -1.0}])
    assert metrics.read_lines(tmp_path / "samples.jsonl")[0]["prompt"] == text
    shown = capsys.readouterr().out
    assert shown.endswith("\n") and shown[:-1].isprintable() and "😀" in shown


def test_samples_show_a_few_rows_within_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    rows = [{"prompt": f"prompt {i}", "response": "word " * 50, "score": torch.tensor(i / 3)} for i in range(9)]
    Metrics(tmp_path).samples(0, rows, show=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(len(line) == 60 for line in lines)
    assert lines[1].startswith("     score   0.3333  prompt 1 | word word")
    assert len(metrics.read_lines(tmp_path / "samples.jsonl")) == 9


def test_the_console_line_is_aligned_and_shows_what_was_asked_for(tmp_path, capsys):
    out = Metrics(tmp_path, show=("objective/kl", "lr", "absent"))
    for step, kl in [(9, 0.5), (10, -12.3456), (100000, 1.234e-7), (7, 123456.0), (8, 0.0)]:
        out.log(step, {"lr": 3e-5, "objective/kl": kl, "hidden": 1})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step      9   kl        0.5   lr   3.00e-05"
    assert len({len(line) for line in lines}) == 1 and len({line.index("lr") for line in lines}) == 1
    assert metrics.read_lines(tmp_path / "metrics.jsonl")[0]["hidden"] == 1


PPO = {
    "objective/scores": -1.5,
    "policy/approxkl": 1.234e-7,
    "value/explained_var": -123456.7,
    "lr": 3e-5,
    "bad/steps": 0,
}


@given(st.integers(17, 200), st.lists(st.sampled_from([*PPO]), min_size=1, unique=True), st.integers(1, 3))
def test_the_table_fits_any_terminal(width, names, seen):
    """No line is longer; every number ends under the end of its name; what is good is said once, with the first column of
    each name; more width takes no column away.
    """
    table, wide, printed = Table(), Table(), []
    for step, some in enumerate([names[:seen], names, names[::-1], names[-1:]]):
        values = {name: PPO[name] for name in some}
        printed += table.lines(step, values, width)
        header, row = table.headed, printed[-1]
        for name in re.findall(r"\S+", header)[1:]:
            end = header.index(f" {name}") + 1 + len(name)
            value = next((x for key, x in values.items() if label(key) == name), None)
            assert row[:end].endswith("" if value is None else fitted(value))
        assert int(row[:6]) == step and len(header) <= len([wide.lines(step, values, width + 20), wide.headed][1])
    assert max(map(len, printed)) <= max(width, 6 + 2 + len("explained_var"))
    said = " ".join(printed)
    assert said.count("rises from 0") == ("value/explained_var" in names)


def test_a_header_comes_again_and_when_columns_do(capsys):
    table = Table()
    printed = [line for step in range(30) for line in table.lines(step, {"lr": 0.1}, 80)]
    assert [i for i, line in enumerate(printed) if line.startswith("  step")] == [0, 21]
    assert printed[0] == "  step         lr" and printed[1] == "     0        0.1"
    assert table.lines(30, {"lr": 0.1, "validation/loss": 2.5}, 80) == [
        "healthy: validation/loss falls",
        "  step         lr  validation/loss",
        "    30        0.1              2.5",
    ]
    assert table.lines(31, {"lr": 0.1}, 30) == ["  step         lr", "    31        0.1"]  # somebody made it narrow


def test_samples_on_a_terminal_are_whole():
    rows = [{"prompt": "Why?", "response": "word " * 20 + "end", "score": 0.5, "tokens": ["a"]}]
    lines = sample_table(rows, 40).splitlines()
    assert lines[0] == "     score      0.5" and all(len(line) <= 40 for line in lines)
    assert "".join(lines[1:]).replace(" ", "") == "Why?|" + "word" * 20 + "end"
    asked = sample_table([{"prompt": "word " * 50 + "Why?", "response": "So."}])
    assert asked.startswith("     ... ") and asked.endswith("word Why? | So.") and len(asked) < 120
    long = sample_table([{"prompt": "p", "response": "word " * 500}], 40).splitlines()
    assert len(long) == 1 + SAMPLE_LINES and long[-1].endswith(" ...")


def test_a_progress_bar_is_not_broken(tmp_path, capsys):
    out = Metrics(tmp_path)
    for step in tqdm(range(3), mininterval=0):
        out.log(step, {"a": step})
    printed = capsys.readouterr()
    assert [line.split() for line in printed.out.splitlines()] == [["step", str(i), "a", str(i)] for i in range(3)]


def test_other_ranks_write_nothing(tmp_path, capsys):
    log(tmp_path / "run", range(3), is_main=False)
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_no_place_to_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="File exists|Not a directory"):
        Metrics(tmp_path / "file")
    with pytest.raises(OSError, match="File exists|Not a directory"):
        Metrics(tmp_path / "file" / "run")


def log_in_a_loop(run, resume):
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared with the parent: a child killed while holding it blocks all
    out = Metrics(run, resume_step=resume)
    for step in range(resume, 10**9):
        out.log(step, {"text": "x" * 3000})


def test_kill_9_loses_no_line_but_the_last(tmp_path):
    steps = []
    for _ in range(8):
        child = multiprocessing.get_context("fork").Process(target=log_in_a_loop, args=(tmp_path, len(steps)))
        child.start()
        time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        rows = metrics.read_lines(tmp_path / "metrics.jsonl")
        before, steps = steps, [row["step"] for row in rows]
        assert steps == list(range(len(steps))) and len(steps) >= len(before)
        assert all(len(row["text"]) == 3000 for row in rows)
    assert len(steps) > 10
