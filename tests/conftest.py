"""Where the shared reference material lies, and one thread per test process so that results do not depend on the machine."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "plain", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("plain")

ROOT = Path(__file__).resolve().parent.parent


def shared(name: str) -> Path:
    """The directory of reference material: $PLAIN_RLHF_SHARED, or `shared` inside or beside the checkout."""
    candidates = [os.environ.get("PLAIN_RLHF_SHARED"), ROOT / "shared", ROOT.parent / "shared"]
    for base in filter(None, candidates):
        if (Path(base) / name).is_dir():
            return Path(base) / name
    pytest.skip(f"no {name} directory: set PLAIN_RLHF_SHARED to the folder that holds it")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return shared("golden")


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    return shared("data")


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """The only directory that pip sees; the cache of what was fetched is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Tiny data, a language model and a reward model, made by the real scripts in about ten seconds."""
    import tiny

    return tiny.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def browser():
    """Chromium, once for a module: while it is open an event loop runs in this thread, and asyncio.run() refuses."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no browser: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=program, args=["--no-sandbox"]
        )  # root in a container has no sandbox
        yield browser
        browser.close()
