"""bench/against_trl.py: TRL's PPOTrainer and our loop with its conventions compute the same numbers from the same responses."""

import subprocess
import sys

import pytest
from conftest import ROOT
from tiny import lines

pytest.importorskip("trl", reason="trl is not installed: pip install -e '.[compare]'")


@pytest.mark.slow
def test_ppo_is_trls_step_by_step(world, tmp_path):
    """Four iterations of 16 responses, two epochs of two minibatches: scores, KL, both losses, the clip."""
    world.ok("train_rm.py", out=tmp_path / "proxy", pooling="last", sources=None)
    for name, place in (("data", "data"), ("lm", "lm"), ("gold", "rm")):
        (tmp_path / name).symlink_to(world.path / place)
    command = [sys.executable, ROOT / "bench/against_trl.py", f"--place={tmp_path}", f"--out={tmp_path / 'out'}"]
    command += ["--seeds=1", "--iterations=4", "--batch=16", "--minibatches=2", "--epochs=2", "--lr=1e-3"]
    done = subprocess.run(command, capture_output=True, text=True, env=world.environment())
    assert done.returncode == 0, done.stderr
    ours, theirs, plain = (
        lines(tmp_path / "out" / side / "curve.jsonl") for side in ("ours_patched_1", "trl_our_numbers_1", "ours_1")
    )
    assert 0 < sum(row["response/eos_rate"] for row in ours) < 4  # some have a slot after EOS, some have not
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in other.items():
            assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert abs(plain[0]["loss/value"] - ours[0]["loss/value"]) > 1e-3  # and without them it computes others
    assert "the bands" in done.stdout or "apart in" in done.stdout
