"""bench/reproductions.py: what lies in --out stays with the options that made it."""

import json
import subprocess
import sys
from pathlib import Path


def test_other_options_over_an_older_out_are_refused(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"proxy_lr": 0.01}))
    script = Path(__file__).parent.parent / "bench/reproductions.py"
    done = subprocess.run(
        [sys.executable, script, f"--place={tmp_path / 'tiny'}", f"--out={tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "has a study with" in done.stderr and "choose another --out" in done.stderr
    assert not (tmp_path / "tiny").exists()  # before two minutes of models
