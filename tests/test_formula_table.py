"""The table of docs/formulas.md: it names every formula, and what it names exists."""

import ast
import importlib
import inspect
import re

import pytest
from conftest import ROOT

DOC = (ROOT / "docs" / "formulas.md").read_text()
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOC.splitlines() if line.startswith("| ")][1:]
MODULES = ("functional", "kl", "rewards", "advantages", "losses", "calibration", "statistics", "overoptimisation")


def formulas(module):
    """Public functions, and the classes with behaviour, that are defined in rlhf/<module>.py."""
    tree = ast.parse((ROOT / "rlhf" / f"{module}.py").read_text())
    named = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    classes = [node for node in named if isinstance(node, ast.ClassDef)]
    data = [node.name for node in classes if node.bases or node.decorator_list]  # NamedTuple, dataclass: no formula
    return [node.name for node in named if not node.name.startswith("_") and node.name not in data]


@pytest.mark.parametrize("module", MODULES)
def test_every_formula_has_a_row(module):
    listed = {function for _, _, function, _ in ROWS}
    missing = [name for name in formulas(module) if f"`{module}.{name}`" not in listed]
    assert not missing, f"docs/formulas.md lacks {', '.join(missing)} of rlhf.{module}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2].strip("`") + ": " + row[0][:40])
def test_a_row_is_true(row):
    formula, source, function, tests = row
    module, _, name = function.strip("`").rpartition(".")
    docstring = inspect.getdoc(getattr(importlib.import_module(f"rlhf.{module}"), name))
    assert formula and docstring
    for arxiv in re.findall(r"arXiv:\d{4}\.\d{5}", source):
        assert arxiv in docstring, f"{function} does not cite {arxiv}"
    if "/" in source and "arXiv" not in source:  # a repository or a page
        assert source in docstring + importlib.import_module(f"rlhf.{module}").__doc__
    assert named_tests_exist(tests)


def test_a_citation_of_the_code_is_in_the_table():
    for module in MODULES:
        for name in formulas(module):
            docstring = inspect.getdoc(getattr(importlib.import_module(f"rlhf.{module}"), name))
            sources = " ".join(source for _, source, function, _ in ROWS if function == f"`{module}.{name}`")
            for arxiv in re.findall(r"arXiv:\d{4}\.\d{5}", docstring):
                assert arxiv in sources, f"docs/formulas.md: {module}.{name} also cites {arxiv}"


def test_the_tests_named_below_the_table_exist():
    assert named_tests_exist(DOC.split("What changes nothing")[1])


def named_tests_exist(text):
    """Whether `file.py::test` names a test, for all in the text; there must be one."""
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"no {test} in tests/{file}"
    return bool(named)
