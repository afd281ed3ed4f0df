"""bench/gpu.py beside a clock that is too short for it."""

import json
import os
import subprocess
import sys

from tiny import ROOT


def test_a_step_whose_files_are_missing_is_left_out_and_does_not_fail(tmp_path):
    """No run of train_lm.py fits into a third of a second, and the three steps after it read its model."""
    words = ["--steps=scripts", "--budget=1", f"--out={tmp_path}/gpu.jsonl"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, ROOT / "bench" / "gpu.py", *words], env=environment, check=True, cwd=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["measured"] for line in lines] == [{}] * 4
    first, *later = [line["left_out"] for line in lines]
    assert first.startswith("took longer than")
    names = [line["step"] for line in lines]
    assert later == [f"{needed!r} made no files" for needed in names[:-1]]


def test_a_step_is_left_out_too_where_nobody_chose_the_one_that_it_needs(tmp_path):
    words = ["--steps=scripts resume", "--small=true", f"--out={tmp_path}/gpu.jsonl"]
    subprocess.run([sys.executable, ROOT / "bench" / "gpu.py", *words], check=True, cwd=tmp_path)
    (line,) = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert line["left_out"] == "'scripts train_ppo' made no files"
