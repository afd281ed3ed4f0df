"""bench/reproductions.py: what lies in --out stays with the options that made it."""

from dataclasses import asdict
from pathlib import Path

import pytest


def test_other_options_over_an_older_out_are_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    import reproductions
    import small

    place, out = tmp_path / "tiny", tmp_path / "out"
    free = ("only", "out", "seeds", "labels")
    small.settle(out, asdict(reproductions.Config(place=str(place), out=str(out))), free)
    small.settle(out, asdict(reproductions.Config(place=str(place), out=str(out), seeds=(9,), only=("kl",))), free)
    monkeypatch.setattr("sys.argv", ["reproductions.py", f"--place={place}", f"--out={out}", "--proxy_lr=0.01"])
    with pytest.raises(ValueError, match=r"out has a study with proxy_lr=0.001, this is 0.01: choose another --out"):
        reproductions.main()
    assert not place.exists()  # before two minutes of models
