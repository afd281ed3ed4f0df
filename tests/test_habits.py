"""The files that other programs look for: a citation that a parser reads, a changelog in the usual form, types for users."""

import re
from datetime import date

import pytest
from tiny import ROOT


def project() -> dict[str, str]:
    return dict(
        re.findall(r'^(name|version|description) = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    )


def test_the_citation_has_what_the_schema_asks_for():
    """cff-version 1.2.0: message, title and authors; type, version and date of what is cited."""
    reader = pytest.importorskip("yaml")
    cff = reader.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cff)
    assert set(cff) <= {"cff-version", "message", "title", "abstract", "type", "authors", "version", "date-released",
                        "license", "keywords", "repository-code", "url", "doi", "preferred-citation"}  # fmt: skip
    assert (cff["cff-version"], cff["type"], cff["license"]) == ("1.2.0", "software", "MIT")
    assert all(set(author) <= {"name", "family-names", "given-names", "orcid"} for author in cff["authors"])
    assert (cff["title"], str(cff["version"])) == (project()["name"], project()["version"])
    assert isinstance(cff["date-released"], date) and len(set(cff["keywords"])) == len(cff["keywords"])


def test_the_changelog_has_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", text, re.MULTILINE)
    assert versions[0] == ("Unreleased", "") and versions[1][0] == project()["version"]
    days = [date.fromisoformat(day) for _, day in versions[1:]]
    assert days == sorted(days, reverse=True)
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Comparability"}


def test_every_package_says_that_it_has_types():
    packages = [file.parent.name for file in ROOT.glob("*/__init__.py")]
    assert len(packages) > 3 and all((ROOT / package / "py.typed").is_file() for package in packages)
