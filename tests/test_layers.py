"""The floor plan, kept by parsing every import: who may know whom, and what nobody may use."""

import ast
import io
import sys
import tokenize
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

FORMULAS = {f"rlhf.{file.stem}" for file in (ROOT / "rlhf").glob("*.py") if file.stem != "__init__"}  # rlhf/ itself
FOLDERS = ("infra", "lm", "reward", "ppo", "feedback", "check", "doctor", "replay", "serve", "track")
PACKAGES = ("model", "data", "evaluation", "rewards", "rlhf", *(f"rlhf.{folder}" for folder in FOLDERS))
ALWAYS = {"torch", "numpy", "sentencepiece", "tiktoken", "regex", "safetensors", "tqdm", "pytest", "hypothesis"}
INSIDE_FUNCTIONS = {
    "matplotlib",
    "starlette",
    "uvicorn",
    "openai",
    "trl",
    "transformers",
    "tokenizers",
    "peft",
    "datasets",
    "accelerate",
    "jinja2",
    "llguidance",
    "pydantic",
    "litellm",
    "langchain_openai",
    "cyllama",
    "pyarrow",
    "datasketch",
    "tomllib",
    "tomli",
    "wandb",
    "trackio",
    "tensorboard",
}
OPEN = (
    "rlhf.lm.pretrained",
    "rlhf.reward.bridge",
    "rlhf.reward.files",
    "rlhf.reward.finish",
    "rlhf.reward.function",
    "rlhf.reward.scorer",
)  # where data meets models
SOURCES = sorted(ROOT.glob("*.py")) + sorted(
    file
    for room in ("model", "data", "rlhf", "evaluation", "rewards", "tests", "bench", "docs")
    for file in (ROOT / room).rglob("*.py")
)


def module_name(path: str) -> str:
    """rlhf/infra/optim.py -> rlhf.infra.optim; rlhf/__init__.py -> rlhf"""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def room(module: str) -> str:
    """The room of the floor plan that a module of ours lives in."""
    if module in FORMULAS:
        return "formula"
    if module in OPEN:
        return "open"
    for prefix in (
        *(f"rlhf.{folder}" for folder in FOLDERS),
        "model",
        "data",
        "evaluation",
        "rewards",
        "tests",
        "bench",
        "docs",
    ):
        if module == prefix or module.startswith(prefix + "."):
            return prefix
    return "rlhf" if module == "rlhf" else "script"


BELOW = {"model", "formula", "rlhf.infra"}
MAY_IMPORT = {  # room -> the rooms of ours that it may import
    "model": {"model"},
    "data": {"data"},
    "rewards": set(),  # files that people copy
    "rlhf": set(),  # the package's own __init__
    "rlhf.infra": {"rlhf.infra"},
    "formula": {"formula"},
    "rlhf.check": {"formula", "rlhf.infra", "rlhf.check"},
    "rlhf.doctor": {"rlhf.infra", "rlhf.doctor"},
    "rlhf.feedback": {"formula", "rlhf.infra", "rlhf.feedback"},
    "rlhf.track": {"rlhf.infra", "rlhf.track"},
    "rlhf.lm": BELOW | {"rlhf.lm"},
    "rlhf.reward": BELOW | {"rlhf.lm", "rlhf.reward"},
    "rlhf.ppo": BELOW | {"rlhf.lm", "rlhf.reward", "rlhf.ppo"},
    "open": BELOW
    | {"data", "rlhf.lm", "rlhf.reward", "open"},  # where a tokenizer meets a model, by a spec of the user's
}
JOINS = BELOW | {"data", "open", "rlhf.lm", "rlhf.reward", "rlhf.ppo", "rlhf.feedback"}
MAY_IMPORT |= {
    "rlhf.serve": JOINS | {"rlhf.serve", "rlhf.doctor"},
    "rlhf.replay": JOINS | {"rlhf.replay"},
    "evaluation": JOINS | {"evaluation", "rlhf.doctor"},
    "script": JOINS | {"rlhf.check", "rlhf.doctor", "rlhf.replay", "evaluation", "script"},
}
MAY_IMPORT |= dict.fromkeys(
    ("tests", "bench", "docs"), MAY_IMPORT["script"] | {"tests", "rlhf.serve", "rlhf.track", "rewards"}
)


def imports(tree: ast.AST, path: str):
    """(imported module, is it inside a function) for every import; relative ones made absolute."""
    inside = {
        id(node)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.removesuffix(".py").split("/")[: -node.level] if node.level else []
            base = ".".join(package + [node.module] * bool(node.module))
            for alias in node.names:  # `from rlhf import losses` imports rlhf.losses
                yield (f"{base}.{alias.name}" if base in PACKAGES else base), id(node) in inside


def violations(source: str, path: str, ours: set[str]) -> list[str]:
    """What the file at `path` does against the rules; `ours` are the names of our top-level modules and packages."""
    tree, here, found = ast.parse(source), module_name(path), []
    if path.rpartition("/")[2] in ("utils.py", "common.py", "helpers.py"):
        found.append(f"{path}: a module is named after what it holds")
    for target, in_function in imports(tree, path):
        top = target.partition(".")[0]
        if top in ("pickle", "shelve", "marshal"):
            found.append(f"{path}: {top} runs code from files")
        elif top in ours:
            known = room(target)
            if known not in MAY_IMPORT[room(here)] and not (here == "serve" and known == "rlhf.serve"):
                found.append(f"{path}: {room(here)} may not import {target} ({known})")
        elif (
            top in sys.stdlib_module_names
            or room(here) in ("tests", "bench")
            and (ROOT / room(here) / f"{top}.py").exists()
        ):
            pass
        elif room(here) == "formula" and top not in ("torch", "numpy"):
            found.append(f"{path}: a formula needs torch alone, not {top}")
        elif not (top in ALWAYS or top in INSIDE_FUNCTIONS and in_function):
            what = "only inside a function" if top in INSIDE_FUNCTIONS else "not a dependency"
            found.append(f"{path}: imports {top}, {what}")
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, keywords = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name == "torch.save" or name == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"{path}:{call.lineno}: {name} pickles; use safetensors, or weights_only=True to read")
        if keywords.get("allow_pickle", "False") != "False":
            found.append(f"{path}:{call.lineno}: {name} with allow_pickle")
    return found


OURS = {"model", "data", "rlhf", "evaluation", "rewards"} | {file.stem for file in ROOT.glob("*.py")}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_layers(file: Path):
    assert violations(file.read_text(), file.relative_to(ROOT).as_posix(), OURS) == []


@pytest.mark.parametrize(
    "path, source",
    [
        ("model/transformer.py", "import rlhf.losses"),
        ("model/transformer.py", "from data.tokenizer import load_tokenizer"),
        ("data/loader.py", "from model import transformer"),
        ("data/loader.py", "from rlhf.infra import distributed"),
        ("rlhf/infra/optim.py", "from rlhf.losses import ppo_loss"),
        ("rlhf/infra/optim.py", "from .. import losses"),
        ("rlhf/losses.py", "from rlhf.infra import optim"),
        ("rlhf/losses.py", "from rlhf.ppo.rollout import Rollout"),
        ("rlhf/losses.py", "from model.transformer import Transformer"),
        ("rlhf/losses.py", "from tqdm import tqdm"),
        ("rlhf/ppo/rollout.py", "from data.loader import PromptBatch"),
        ("rlhf/ppo/rollout.py", "def f():\n    import data.loader"),
        ("rlhf/ppo/rollout.py", "import train_ppo"),
        ("rlhf/ppo/rollout.py", "from rlhf import serve"),
        ("rlhf/check/recompute.py", "from model import transformer"),
        ("rlhf/track/trackers.py", "import wandb"),
        ("rlhf/infra/metrics.py", "from rlhf.track import journal"),
        ("train_ppo.py", "from rlhf.serve import api"),
        ("rlhf/ppo/rollout.py", "from evaluation import held_out"),
        ("evaluation/held_out.py", "import train_ppo"),
        ("train_ppo.py", "import pandas"),
        ("evaluate.py", "import matplotlib.pyplot as plt"),
        ("data/loader.py", "import pickle"),
        ("data/loader.py", "from pickle import loads"),
        ("data/loader.py", "import torch\ntorch.load('x')"),
        ("data/loader.py", "import torch\ntorch.load('x', weights_only=False)"),
        ("data/loader.py", "import torch\ntorch.save({}, 'x')"),
        ("data/loader.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        ("rlhf/utils.py", ""),
        ("model/common.py", ""),
    ],
)
def test_a_violation_is_caught(path, source):
    assert len(violations(source, path, OURS | {"train_ppo"})) == 1


@pytest.mark.parametrize(
    "path, source",
    [
        ("model/generate.py", "from model.transformer import KVCache\nimport torch, math"),
        ("rlhf/losses.py", "from rlhf.functional import masked_mean\nfrom . import kl"),
        ("rlhf/ppo/rollout.py", "from model import generate\nfrom rlhf import losses\nfrom rlhf.infra import optim"),
        ("rlhf/check/recompute.py", "from rlhf import losses\nfrom rlhf.infra import config"),
        ("serve.py", "from rlhf.serve import api\nfrom data.tokenizer import load_tokenizer"),
        ("evaluate.py", "def plot():\n    import matplotlib.pyplot as plt"),
        ("data/loader.py", "import torch\ntorch.load('x', weights_only=True)"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert violations(source, path, OURS) == []


# --- the size and the shape of the house ---


def edges(files: dict[str, str], path: str) -> set[str]:
    """Modules of `files` {path: source} that the one at `path` imports: `from rlhf.lm import frozen` is rlhf.lm.frozen."""
    known = {module_name(other) for other in files}
    inner = {name for node in ast.walk(ast.parse(files[path])) for name in joined(node, path)}
    return (inner | {target for target, _ in imports(ast.parse(files[path]), path)}) & known - {module_name(path)}


def joined(node: ast.AST, path: str):
    """a.b.c of `from a.b import c`, which may be a module."""
    if isinstance(node, ast.ImportFrom):
        package = path.removesuffix(".py").split("/")[: -node.level] if node.level else []
        yield from (".".join([*package, *[node.module] * bool(node.module), alias.name]) for alias in node.names)


def order(files: dict[str, str]) -> list[str]:
    """The modules so that each comes after all that it imports; CycleError where there is no such order."""
    return [*TopologicalSorter({module_name(path): edges(files, path) for path in files}).static_order()]


def test_no_module_of_rlhf_imports_itself_through_others():
    files = {file.relative_to(ROOT).as_posix(): file.read_text() for file in (ROOT / "rlhf").rglob("*.py")}
    assert len(order(files)) == len(files)
    assert "rlhf.functional" in edges(files, "rlhf/losses.py")  # the edges are seen


def test_a_circle_is_caught():
    with pytest.raises(CycleError):
        order({"rlhf/lm/a.py": "from rlhf.lm import b", "rlhf/lm/b.py": "def f():\n    from . import a"})


def test_rlhf_has_few_rooms_and_every_one_has_its_rule():
    rooms = {folder.parent.name for folder in (ROOT / "rlhf").glob("*/__init__.py")}
    assert rooms == set(FOLDERS) and len(rooms) <= 10


def functions(file: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(file.read_text())
    return [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("room", ["scripts", "rlhf", "data", "model", "evaluation", "rewards"])
def test_a_function_fits_on_a_screen(room):
    files = ROOT.glob("*.py") if room == "scripts" else (ROOT / room).rglob("*.py")
    found = [(lines(f), f"{file.relative_to(ROOT)}: {f.name}") for file in files for f in functions(file)]
    assert found and max(found)[0] <= 80, sorted(found)[-5:]


def lines_of_code(source: str) -> int:
    """Lines that hold more than blanks and comments."""
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found = [x for x in tokenize.generate_tokens(io.StringIO(source).readline) if x.type not in empty]
    return len({line for x in found for line in range(x.start[0], x.end[0] + 1)})


def test_the_loop_of_ppo_is_read_at_one_sitting():
    source = ROOT / "train_ppo.py"
    main, train = (next(f for f in functions(source) if f.name == name) for name in ("main", "train"))
    (loop,) = (node for node in train.body if isinstance(node, ast.For))
    first, last = loop.body[0].lineno, loop.body[-1].end_lineno
    body = "\n".join(["if True:", *source.read_text().splitlines()[first - 1 : last]])
    assert lines(main) <= 30
    assert lines_of_code(body) - 1 <= 45
    assert lines_of_code('x = """a\n\nb"""  # c\n\n# d\ny = (\n    1\n)\n') == 6
