"""docs/demo.ipynb: twelve cells with the outputs of one run, and the program that runs them without Jupyter."""

import base64
import importlib.util
import json
import sys

import pytest
from conftest import ROOT

SPEC = importlib.util.spec_from_file_location("docs_notebook", ROOT / "docs/notebook.py")
notebook = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(notebook)
CELLS = [x for x in json.loads((ROOT / "docs/demo.ipynb").read_text())["cells"] if x["cell_type"] == "code"]


def test_twelve_cells_with_the_outputs_of_one_run():
    assert [cell["execution_count"] for cell in CELLS] == [*range(1, 13)]
    for cell in CELLS:
        compile("".join(cell["source"]), "cell", "exec")
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    pictures = [x["data"]["image/png"] for x in outputs if x["output_type"] == "display_data"]
    assert len(pictures) >= 6 and all(base64.b64decode(x).startswith(b"\x89PNG") for x in pictures)
    printed = "".join(line for x in outputs if x["output_type"] == "stream" for line in x["text"])
    assert "$ python train_ppo.py" in printed and str(ROOT) not in printed


def test_cells_share_their_names_and_outputs_are_kept(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra plot")
    sources = ["x = 20\nprint('first')", "import matplotlib.pyplot as plt\nplt.plot([x, 22])\nplt.show()"]
    cells = [{"cell_type": "code", "source": [source]} for source in sources]
    file = tmp_path / "two.ipynb"
    file.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": []}, *cells]}))
    monkeypatch.chdir(tmp_path)  # main goes elsewhere, and this comes back
    monkeypatch.setattr("sys.argv", ["notebook.py", f"--file={file}", "--write=true"])
    notebook.main()
    first, second = json.loads(file.read_text())["cells"][1:]
    assert first["outputs"] == [{"output_type": "stream", "name": "stdout", "text": ["first\n"]}]
    assert [x["output_type"] for x in second["outputs"]] == ["display_data"] and second["execution_count"] == 2


def test_the_cell_that_fails_is_named():
    pytest.importorskip("matplotlib", reason="the extra plot")
    with pytest.raises(ValueError, match="cell 3 of the notebook: ZeroDivisionError"):
        notebook.executed("1 / 0", 3, {})
