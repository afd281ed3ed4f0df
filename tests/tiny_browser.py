"""What page tests share beside the browser itself, which is a fixture of conftest.py."""

import pytest


def accessible(page) -> list:
    """What axe-core finds wrong; skips where it is not installed."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    return [(v["id"], [n["html"] for n in v["nodes"]]) for v in axe.Axe().run(page).response["violations"]]
