"""The docs as a site: these Markdown files with a way through them and a search, in out/docs/site. It asks no server.

    python docs/build.py                                                      # make docs; needs the extra `docs` (zensical)
    python docs/build.py --repository=https://github.com/somebody/plain-rlhf/blob/main

A link from page to page stays one. A link to another file of the repository leads there, where its address is given; else
the file's name is left. ValueError, and no site, for a page without a place in zensical.toml's nav, for a link that leads
nowhere, and for anything that a browser would fetch from elsewhere.
"""

import posixpath
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rlhf.infra import config  # noqa: E402
from rlhf.infra.files import write_text  # noqa: E402

BESIDE = {  # pages outside of docs/
    "README.md": "first-steps.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LOG.md": "log.md",
}
FILES = (".svg", ".ipynb", ".html")  # of docs/, that pages link
ASSETS = (".js", ".css")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"\A```(\w+) (\S+)$", re.MULTILINE)  # a file with its name, as GitHub lets it stand
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
# what a browser fetches when it opens a page; a link waits for a click
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|link(?![^>]*rel=.?(?:canonical|next|prev)))\b[^>]*(?:src|href)=.?(?:https?:)?//"
)


@dataclass(frozen=True)
class Config:
    out: str = str(ROOT / "out" / "docs")  # made anew: the pages as they are rendered, and the site
    repository: str = ""  # the address under which its files can be seen, .../blob/main; none = their names alone


def main() -> None:
    cfg = config.parse(Config)
    out, places = Path(cfg.out), pages()
    if out.is_file() or out.is_dir() and any(out.iterdir()) and not (out / "pages").is_dir():
        raise ValueError(f"--out={out} would be made anew, and holds something else: name another directory")
    shutil.rmtree(out, ignore_errors=True)
    (out / "pages" / "assets").mkdir(parents=True)
    settings = (ROOT / "docs" / "zensical.toml").read_text(encoding="utf-8")
    check_nav(settings, places.values())
    write_text(out / "zensical.toml", settings)
    for source, place in places.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        write_text(out / "pages" / place, linked(text, source, places, cfg.repository))
    for file in (ROOT / "docs").iterdir():
        if file.suffix in FILES + ASSETS and ".template" not in file.name:
            shutil.copy(file, out / "pages" / ("assets" if file.suffix in ASSETS else "") / file.name)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(command, cwd=out, capture_output=True, text=True)
    if built.returncode:
        raise ValueError(f"zensical found something, or is not there (pip install -e '.[docs]'): {said(built)}")
    check_alone(out / "site")
    print(f"{len(places)} pages -> {out / 'site' / 'index.html'}")


def pages() -> dict[str, str]:
    """{path in the repository: path in the site}"""
    inside = {f"docs/{file.name}": file.name for file in sorted((ROOT / "docs").glob("*.md"))}
    return inside | {name: place for name, place in BESIDE.items() if (ROOT / name).is_file()}


def check_nav(settings: str, places) -> None:
    """ValueError where a page has no place in the nav, or two, or the nav names one that is none."""
    named = re.findall(r'"([\w-]+\.md)"', settings)
    wrong = {name for name in {*named, *places} if named.count(name) != 1 or name not in places}
    if wrong:
        raise ValueError(
            f"docs/zensical.toml: nav must name every page once, and does not so for {', '.join(sorted(wrong))}"
        )


def linked(text: str, source: str, places: dict[str, str], repository: str) -> str:
    """The page at `source` with its links as the site has them. ValueError for one whose file is not there."""

    def link(match: re.Match) -> str:
        picture, words, target = match.groups()
        path, hash, anchor = target.partition("#")
        if not path or re.match(r"\w+:", path):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / file).exists():
            raise ValueError(f"{source}: there is no {path}, which [{words}] links")
        if file in places:
            return f"{picture}[{words}]({places[file]}{hash}{anchor})"
        if posixpath.dirname(file) == "docs" and file.endswith(FILES):
            return f"{picture}[{words}]({posixpath.basename(file)}{hash}{anchor})"
        if repository:
            return f"{picture}[{words}]({repository.rstrip('/')}/{file}{hash}{anchor})"
        return words if file in words else f"{words} (`{file}`)"

    parts = CODE.split(text)  # code stands in the odd places
    return "".join(
        FENCE.sub(r'```\1 title="\2"', part) if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts)
    )


def said(built: subprocess.CompletedProcess) -> str:
    """What zensical found, without its colours and its drawing."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", built.stdout + built.stderr).splitlines()
    found = [line for line in lines if re.search(r"Warning:|Error|\[ .* \]|No module", line)]
    return " ".join(" ".join(found).split()) or "nothing that it says"


def check_alone(site: Path) -> None:
    """ValueError where a page lets a browser fetch something from elsewhere."""
    for file in sorted(site.rglob("*.html")):
        if found := FETCHED.search(file.read_text(encoding="utf-8")):
            raise ValueError(f"{file}: {found[0]} is fetched from elsewhere")


if __name__ == "__main__":
    config.run(main, stopped="stopped")
