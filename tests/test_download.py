"""The ratings' download: pip is real, the index is a directory; what fails is one line and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import fake_ratings
import pytest

from data import fetch as fetching
from data import vader
from data.fetch import fetch, sha256

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "data.prepare", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def refused(result: subprocess.CompletedProcess) -> str:
    """The one line of a command that ended as bad input has to end."""
    assert result.returncode == 2, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture
def index(index):
    """The fake source distribution, in the only directory that pip sees."""
    return fake_ratings.fake_sdist(index / vader.SDIST, rows=5)


def test_download_verify_cache_and_no_setup_py(index, tmp_path):
    for unused in ("PIP_REQUIRE_HASHES", "PIP_ONLY_BINARY"):  # habits that an ordinary pip configuration may have
        os.environ[unused] = {"PIP_REQUIRE_HASHES": "1", "PIP_ONLY_BINARY": ":all:"}[unused]
    try:
        kept = fetch(vader.PACKAGE, vader.VERSION, vader.SDIST, sha256(index))  # setup.py would end the process
    finally:
        del os.environ["PIP_REQUIRE_HASHES"], os.environ["PIP_ONLY_BINARY"]
    assert kept.read_bytes() == index.read_bytes() and list(kept.parent.iterdir()) == [kept]
    digest = sha256(index)
    index.unlink()
    assert fetch(vader.PACKAGE, vader.VERSION, vader.SDIST, digest) == kept  # offline the second time


def test_a_damaged_cache_is_downloaded_again(index):
    kept = fetching.cache_dir() / vader.SDIST
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half a file")
    assert fetch(vader.PACKAGE, vader.VERSION, vader.SDIST, sha256(index)).read_bytes() == index.read_bytes()


def test_another_file_than_the_pinned_one_is_refused(index):
    with pytest.raises(ValueError, match=f"{vader.SDIST} has sha256 {sha256(index)}, expected {vader.SDIST_SHA256}"):
        fetch(vader.PACKAGE, vader.VERSION, vader.SDIST, vader.SDIST_SHA256)
    assert not list(fetching.cache_dir().iterdir())


def test_no_index_is_one_line_and_exit_code_2(tmp_path):
    quiet = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"}
    quiet |= {"PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": "", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    message = refused(command("vader", f"--out={tmp_path / 'out'}", **quiet))
    assert "pip could not download vaderSentiment==3.3.2" in message and vader.SDIST in message
    message = refused(command("vader", f"--out={tmp_path / 'out'}", **quiet | {"PIP_NO_INDEX": "1"}))
    assert "No matching distribution" in message
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    quiet["XDG_CACHE_HOME"] = str(tmp_path / "file")
    assert "set XDG_CACHE_HOME" in refused(command("vader", f"--out={tmp_path / 'out'}", **quiet))


def test_the_reason_in_what_pip_says():
    broken = "WARNING: Retrying after connection broken by 'x'\nERROR: No matching distribution found for y"
    assert fetching._reason(broken) == "no package index can be reached"
    assert fetching._reason("/usr/bin/python: No module named pip\n") == "/usr/bin/python: No module named pip"
    assert fetching._reason("Collecting x\nERROR: Could not install: No space left on device\n").startswith("Could not")
    assert fetching._reason("") == "it said nothing"
