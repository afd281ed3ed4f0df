"""Run docs/demo.ipynb without Jupyter: its code cells in order, in one namespace.

    python docs/notebook.py                               # three minutes of one core; into out/notebook, which is kept
    SMALL=1 OUT=out/notebook-small python docs/notebook.py    # at the size of a test, as CI does
    python docs/notebook.py --write=true                  # and keep in the file what the cells print and draw

ValueError, which names the cell, where one fails.
"""

import base64
import contextlib
import io
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rlhf.infra import config  # noqa: E402
from rlhf.infra.files import parse_json, write_text  # noqa: E402


@dataclass(frozen=True)
class Config:
    file: str = str(ROOT / "docs" / "demo.ipynb")  # the notebook
    write: bool = False  # replace its outputs


def main() -> None:
    cfg = config.parse(Config)
    notebook = parse_json(Path(cfg.file).read_bytes(), cfg.file)
    os.chdir(ROOT)
    names, number = {"__name__": "__main__"}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        number, start = number + 1, time.perf_counter()
        outputs = executed("".join(cell["source"]), number, names)
        print(f"cell {number}: {time.perf_counter() - start:.1f} s, {len(outputs)} outputs", flush=True)
        cell |= {"execution_count": number, "outputs": outputs}
    if cfg.write:
        write_text(cfg.file, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def executed(source: str, number: int, names: dict) -> list[dict]:
    """What a cell prints, and the figures that it draws, as nbformat 4 keeps them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(source, f"cell {number}", "exec"), names)
        except Exception as error:
            raise ValueError(f"cell {number} of the notebook: {type(error).__name__}: {error}") from error
    text = printed.getvalue().splitlines(keepends=True)
    outputs = [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
    for figure in map(pyplot.figure, pyplot.get_fignums()):
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=72, metadata={"Software": None})
        data = {"image/png": base64.b64encode(png.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    pyplot.close("all")
    return outputs


if __name__ == "__main__":
    config.run(main)
