"""docs/build.py: the pages as a site has them, what it refuses, and the site itself where its generator is installed."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

SPEC = importlib.util.spec_from_file_location("docs_build", ROOT / "docs/build.py")
build = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)
PLACES = build.pages()
REPOSITORY = "https://example.org/blob/main"


@pytest.mark.parametrize(
    "source, written, alone, at_home",
    [
        ("docs/chat.md", "[d](your-data.md#forms)", "[d](your-data.md#forms)", None),
        ("README.md", "[d](docs/your-data.md)", "[d](your-data.md)", None),
        ("docs/method.md", "[LOG.md](../LOG.md#x)", "[LOG.md](log.md#x)", None),
        ("README.md", "![p](docs/picture.svg)", "![p](picture.svg)", None),
        ("docs/a.md", "[g](../model/generate.py)", "g (`model/generate.py`)", f"[g]({REPOSITORY}/model/generate.py)"),
        ("docs/a.md", "[m](../model)", "m (`model`)", f"[m]({REPOSITORY}/model)"),
        ("docs/a.md", "[p](https://arxiv.org/abs/1) [h](#h)", "[p](https://arxiv.org/abs/1) [h](#h)", None),
        ("docs/a.md", "`a[0](x)` [c](chat.md)", "`a[0](x)` [c](chat.md)", None),
        ("docs/a.md", "```csv mine.csv\n[x](y)\n```", '```csv title="mine.csv"\n[x](y)\n```', None),
    ],
)
def test_links(source, written, alone, at_home):
    assert build.linked(written, source, PLACES, "") == alone
    assert build.linked(written, source, PLACES, REPOSITORY + "/") == (at_home or alone)


@given(st.lists(st.sampled_from(["```sh\n", "```\n", "`", "[a](chat.md)", "[b](../LOG.md)", "\n", "x"]), max_size=12))
def test_what_is_no_link_stays(parts):
    text = "".join(parts)
    linked = build.linked(text, "docs/a.md", PLACES, "")
    assert linked.replace("(log.md)", "(../LOG.md)") == text


def test_all_pages_have_a_place_and_no_link_leaves_the_site():
    build.check_nav((ROOT / "docs/zensical.toml").read_text(), PLACES.values())
    there = {*PLACES.values(), *(file.name for file in (ROOT / "docs").iterdir() if file.suffix in build.FILES)}
    for source in PLACES:
        page = build.linked((ROOT / source).read_text(encoding="utf-8"), source, PLACES, "")
        prose = "".join(build.CODE.split(page)[::2])
        local = [path for _, _, path in build.LINK.findall(prose) if not re.match(r"\w+:|#", path)]
        assert {path.partition("#")[0] for path in local} <= there, source
    with pytest.raises(ValueError, match="a.md"):
        build.check_nav('nav = ["a.md", "b.md"]', ["b.md"])
    with pytest.raises(ValueError, match="b.md"):
        build.check_nav('nav = ["a.md"]', ["a.md", "b.md"])
    with pytest.raises(ValueError, match=r"docs/a.md: there is no gone.md, which \[x\] links"):
        build.linked("[x](gone.md)", "docs/a.md", PLACES, "")


def test_no_row_stands_apart_from_its_table():
    """A blank line above a row makes a paragraph of it."""
    for source in PLACES:
        text = re.sub(r"^```.*?^```", "", (ROOT / source).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        assert re.findall(r"(?<!\|)\n\|.*(?!\n\|[-: |]+\n)(?=\n)", text) == [], source


def test_a_page_that_fetches_something_is_refused(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="https://a">a</a><img src="b.svg"><link rel="canonical" href="https://a">'
    )
    build.check_alone(tmp_path)
    for tag in ('<script src="https://a.js">', "<img src=//a/b.png>", '<link rel="stylesheet" href="https://fonts">'):
        (tmp_path / "b.html").write_text(f"<p>{tag}")
        with pytest.raises(ValueError, match="b.html"):
            build.check_alone(tmp_path)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built by its generator."""
    pytest.importorskip("zensical", reason="the extra docs")
    place = tmp_path_factory.mktemp("site") / "docs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["build.py", f"--out={place}"])
        build.main()
    return place / "site"


@pytest.mark.slow
def test_the_site(site, tmp_path, monkeypatch):
    """Anchors are checked too."""
    page = (site / "formulas.html").read_text()
    assert "delta_t = r_t + gamma V_{t+1} - V_t" in page and "assets/iframe-worker.js" in page
    monkeypatch.setattr("sys.argv", ["build.py", f"--out={tmp_path / 'docs'}"])
    monkeypatch.setattr(build, "linked", lambda *page: "[a](chat.md#nowhere)")
    with pytest.raises(ValueError, match="anchor does not exist"):
        build.main()


@pytest.mark.slow
def test_the_search_works_from_a_disk_and_asks_nobody(site, browser):
    """Where a browser has no Worker: the words stay in the field while results come, and all of them count."""
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / "index.html").as_uri())
    page.keyboard.press("/")
    field = page.get_by_role("combobox")
    field.press_sequentially("whitened advantages")
    page.get_by_role("link", name=re.compile("method", re.IGNORECASE)).first.wait_for()
    assert field.input_value() == "whitened advantages" and {url.partition(":")[0] for url in asked} == {"file"}
    page.close()


def test_a_directory_of_something_else_is_not_made_anew(tmp_path, monkeypatch):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for place in (tmp_path, mine):
        monkeypatch.setattr(sys, "argv", ["build.py", f"--out={place}"])
        with pytest.raises(ValueError, match="holds something else: name another directory"):
            build.main()
    assert mine.read_text() == "mine"
