"""What the README, the docs, the Makefile and CI tell people to type: it exists, it parses, and it runs at a tiny size."""

import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fake_ratings
import pytest
import test_iterate
from test_chat import TEMPLATES, tiny_chat_tokenizer
from test_scripts import PPO_METRICS
from test_sft import write_chat_model
from tiny import ROOT, SMALL, World
from torch.distributed.run import get_args_parser

import plain_rlhf
from rlhf.infra import config
from rlhf.infra.healthy import HEALTHY

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
DOCS = [ROOT / "README.md", ROOT / "AGENTS.md", *PAGES]
ELSEWHERE = {"pip", "git", "cd", "source", "cat", "curl", "export", "ls", "less"}  # programs that are not ours
PLACES = {"data", "out", "init", "reward", "base", "tuned", "checkpoint", "model", "sources"}  # where, not how large


class Command(NamedTuple):
    where: str  # file:line
    words: list[str]
    launcher: tuple[str, ...] = ()  # the options of torchrun, where it starts the command

    def __str__(self) -> str:
        return f"{self.where} {' '.join(self.words)}"


def shell_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Every line of a ```sh block, and every line behind "$ " in any block; a backslash joins the next line."""
    language, joined, start = None, "", 0
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if fence := re.match(r"\s*```(\w*)", line):
            language = None if language is not None else fence[1]
        elif language in ("sh", "bash", "shell") or language is not None and line.startswith("$ "):
            start = start if joined else number
            joined += line.strip().removeprefix("$ ")
            if joined.endswith("\\"):
                joined = joined[:-1]
                continue
            yield start, joined
            joined = ""


def split(where: str, line: str) -> list[Command]:
    """The commands of a line, without environment settings, launchers and redirections."""
    found = []
    for part in re.split(r"&&|;|\|(?!\w)", line):  # "gae|rloo" is no pipe
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        launcher = []
        if words and Path(words[0]).name == "torchrun":
            place = next(i for i, word in enumerate(words) if word.endswith(".py"))
            launcher, words = words[1:place], ["python", *words[place:]]
        if words[:1] == ["plain-rlhf"] and words[1:2] != ["--help"]:  # what lists the commands
            target, _ = plain_rlhf.PROGRAMS[words[1]]
            words = ["python", *(["-m"] if not target.endswith(".py") else []), target, *words[2:]]
        if words and Path(words[0]).name in ("python", "python3"):
            words = ["python", *words[1:]]
        if words:
            found.append(Command(where, [word for word in words if not word.startswith(">")], tuple(launcher)))
    return found


def commands(file: Path) -> list[Command]:
    lines = shell_lines(file)
    return [command for n, line in lines for command in split(f"{file.relative_to(ROOT)}:{n}", line)]


def in_passing(file: Path) -> list[Command]:
    """Commands in the text, between backticks; "..." stands for what the text has just said."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`((?:python|torchrun|make|plain-rlhf) [^`]+)`", text)
    lines = [" ".join(span.replace(" ...", "").split()) for span in spans]
    return [command for line in lines for command in split(file.name, line)]


DOCUMENTED = [command for file in DOCS for command in commands(file) + in_passing(file)]


def script_of(command: Command) -> str | None:
    return command.words[1] if command.words[0] == "python" and command.words[1:2][0:1] != ["-m"] else None


def module_of(script: str):
    """The module of `train_lm.py` or `bench/ppo.py`, imported and not run; a bench may be named as one of our scripts."""
    if "/" not in script:
        return importlib.import_module(script.removesuffix(".py"))
    name = script.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.path.append(str((ROOT / script).parent))  # where python finds the siblings of a script
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def room_of(command: Command):
    """(module, options): the script's, or that of one of its COMMANDS (evaluate.py rm ...)."""
    module, words = module_of(script_of(command)), command.words[2:]
    named = words and getattr(module, "COMMANDS", {}).get(words[0])
    return (named, words[1:]) if named else (module, words)


def parse(command: Command):
    """The Config that the command asks for, by the script's own rules."""
    module, words = room_of(command)
    return config.parse(module.Config, words)


def options_of_module(name: str) -> set[str]:
    """What `python -m name` takes: the fields of its Config, or what it tells argparse."""
    name = {"data.prepare": "data.pipeline"}.get(name, name)  # where its command line is read
    module = importlib.import_module(f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name)
    if hasattr(module, "Config"):
        return {f"--{field.name}" for field in dataclasses.fields(module.Config)} | {"--help"}
    return set(re.findall(r'"(--\w+)"', inspect.getsource(module))) | {"--help"}


def check(command: Command) -> None:
    """The program exists and accepts the options."""
    program, *rest = command.words
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert [word for word in command.launcher if word.partition("=")[0].replace("_", "-") not in known] == [], command
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in rest if not ("=" in word or word == "-n" or word in targets)] == [], command
    elif program == "python" and rest[0] == "-m":
        given = {word.partition("=")[0] for word in rest[2:] if word.startswith("--")}
        assert importlib.util.find_spec(rest[1]), command
        assert rest[1] in ("pip", "pytest") or given <= options_of_module(rest[1]), command
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), command
        if "--help" not in rest and hasattr(module_of(rest[0]), "Config"):
            parse(command)
    elif program != "plain-rlhf":
        assert program in ELSEWHERE, f"{command}: neither ours nor known; if it is right, name it in ELSEWHERE"


def test_there_is_something_to_check():
    words = [command.words for command in DOCUMENTED]
    assert ["make", "demo"] in words and ["make", "test"] in words
    assert {"train_lm.py", "train_rm.py", "train_ppo.py", "sample.py", "evaluate.py"} <= {w[1] for w in words}


@pytest.mark.parametrize("command", DOCUMENTED, ids=str)
def test_documented_command(command):
    check(command)


def test_docstrings_of_the_scripts():
    """Their usage lines are what --help prints first."""
    for script in (name for name in SMALL if name.endswith(".py")):
        text = importlib.import_module(script.removesuffix(".py")).__doc__
        found = [c for line in text.splitlines() if re.match("(python|torchrun) ", line) for c in split(script, line)]
        assert found and all(script_of(command) == script for command in found)
        for command in found:
            check(command)


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize(
    ("target", "first", "last"),
    [
        ("demo", "export.py", ["evaluate.py"]),
        ("smollm2", "export.py", ["evaluate.py"]),
        ("scratch", "train_lm.py", []),
        ("quick", "train_lm.py", ["evaluate.py"]),
    ],
)
def test_what_make_would_run(target, first, last):
    plan = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = plan.replace("\\\n", " ").splitlines()
    found = [command for line in lines for command in split(f"make {target}", line)]
    ours = [command for command in found if command.words[0] == "python" and command.words[1].endswith(".py")]
    assert [command.words[1] for command in ours] == [first, "train_rm.py", "train_ppo.py", "evaluate.py", *last]
    assert ["python", "-m", "data.prepare", "vader"] in [command.words[:4] for command in found]
    for command in ours:
        parse(command)


def test_what_ci_runs():
    text = (ROOT / ".ci/run").read_text().replace("\\\n", " ")
    lines = [re.sub(r"^\$(python|run) ", "python ", line.strip()) for line in text.splitlines()]
    lines = [re.sub(r"^in_venv ", "make ", line).partition(" >")[0] for line in lines]
    found = [c for line in lines if re.match(r"(python|make) ", line) for c in split(".ci/run", line)]
    assert {"train_ppo.py", "evaluate.py", "sample.py"} <= {command.words[1] for command in found}
    for command in found:
        check(command)


LOOP = {name: value for name, value in test_iterate.LOOP.items() if name not in ("rater", "rater_noise")}
SIZES = SMALL | {"iterate.py": LOOP | {"rounds": 1}}
SIZES["train_ppo.py"] = SMALL["train_ppo.py"] | {"weak_reward": "true"}  # a reward model of this size may be one
SIZES["train_dpo.py"] = {"batch": 8, "epochs": 1, "warmup": 1}
WHOLE = (
    "train_lm.py",
    "train_rm.py",
    "train_dpo.py",
    "train_ppo.py",
    "sample.py",
    "evaluate.py",
    "export.py",
    "iterate.py",
)


def small(command: Command) -> list[str]:
    """The same command at the size of a test: the documented options, but for those that say how large."""
    script, (module, given) = script_of(command), room_of(command)
    start = command.words[1 : len(command.words) - len(given)]  # evaluate.py, or evaluate.py rm
    size = {name: value for name, value in SIZES.get(" ".join(start), {}).items() if name not in PLACES}
    if script == "train_lm.py" and any(word.startswith("--init") for word in given):
        size = {name: value for name, value in size.items() if name not in ("width", "layers", "heads")}
    if "--trunk=frozen" in given:
        needs = config.needs_of(module.Config)
        size = {name: x for name, x in size.items() if "frozen" in dict(needs.get(name, ())).get("trunk", ("frozen",))}
    if script == "iterate.py":  # the options for the other scripts: those of the page, and the sizes
        texts = dict(word.strip("-").split("=", 1) for word in given)
        size |= {name: f"{texts[name]} {size[name]}" for name in ("rm", "ppo", "evaluate") if name in texts}
    kept = [word for word in given if word.partition("=")[0].strip("-") not in size]
    return [*start, *kept, *(f"--{name}={value}" for name, value in size.items())]


def runnable(command: Command) -> list[str] | None:
    """What `World` runs in the command's place; None for make, a server, a bench, a browser's or another program's files."""
    module = command.words[2] if command.words[1:2] == ["-m"] else None
    loop = script_of(command) == "iterate.py" or module == "rlhf.feedback"
    if loop and command.where.startswith("docs/iterate.md"):
        return None  # minutes, and what tests/test_iterate.py runs; README's loop is run
    if module == "data.prepare":
        given = any(word.startswith("--tokenizer") for word in command.words)
        return [*command.words[2:], *([] if given else ["--vocab_size=400"])]
    if module == "rlhf.feedback":
        return command.words[2:]
    if module == "rlhf.track" and importlib.util.find_spec("tensorboard"):
        return command.words[2:]
    if command.words[1:3] == ["evaluate.py", "report"] and not importlib.util.find_spec("matplotlib"):
        return None
    if command.words[1:3] == ["evaluate.py", "compare"]:
        return None  # runs of several seeds: tests/test_band.py makes them
    if any(word.startswith("--sampler=") for word in command.words):
        return None  # it asks a server: what tests/test_remote.py runs
    return small(command) if script_of(command) in WHOLE else None


def run_all(documented: list[Command], here: World) -> None:
    """One after the other, one process each (shards need two): what one command leaves, the next one finds. Who is asked
    to vote votes.
    """
    for command in documented:
        words = runnable(command)
        if words is None:
            continue
        if any(word.startswith("--rater=") for word in words) and words[0] == "rlhf.feedback":
            done = here.spawn(["-m", *words], stdin="ab" * 100)
        elif "--shard=true" in words:
            done = here.together(words, 2)
        else:
            done = here.start(words).wait()
        assert done.code == 0, (str(command), done)
        told = any(word.startswith("--config=") for word in words) and done.err.startswith("from ")
        assert done.err == "" or words[0] == "iterate.py" or told, (str(command), done)


def empty_place(world: World, path: Path) -> World:
    for name in ("cache", "pins"):
        (path / name).symlink_to(world.path / name)
    return World(path)


@pytest.mark.slow
def test_the_readme_runs_from_top_to_bottom(world, tmp_path):
    """In an empty directory, at tiny sizes."""
    (tmp_path / "rewards.py").write_text((world.path / "rewards.py").read_text())  # the judge of the small loop
    run_all(commands(ROOT / "README.md"), empty_place(world, tmp_path))


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    run = tmp_path_factory.mktemp("tuned") / "ppo"
    world.ok("train_ppo.py", out=run)
    return run


def chat_files(here: Path) -> None:
    """`chat-model` and `chats.jsonl`, as somebody has them."""
    chat_tokenizer = tiny_chat_tokenizer()
    chat_tokenizer.chat_template = TEMPLATES["smollm2"]
    write_chat_model(chat_tokenizer, here / "chat-model")
    with (here / "chats.jsonl").open("w") as f:
        for i in range(200):
            sides = {"chosen": f"It is {i}.", "rejected": "I do not know at all."}
            row = {"prompt": [{"role": "user", "content": f"What is {i}?"}]}
            row |= {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
            f.write(json.dumps(row) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(map(runnable, commands(page)))], ids=lambda p: p.name)
def test_a_page_runs_from_top_to_bottom(world, tuned, tmp_path, page):
    """With what README's commands leave, unless the page makes it, and with files of the kinds that the page names."""
    here, documented = empty_place(world, tmp_path), commands(page)
    made = {word.partition("=")[2] for command in documented for word in command.words if word.startswith("--out=")}
    finished = {"out/data/vader": world.path / "data", "out/lm": world.path / "lm", "out/rm": world.path / "rm"}
    for name, source in (finished | {"out/ppo": tuned}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name not in made:
            (tmp_path / name).symlink_to(source)
    rows = [text for _, _, text, _ in fake_ratings.sentences("film", 80)]
    (tmp_path / "mine.txt").write_text("\n".join(rows))
    pairs = [{"prompt": row[:20], "responses": [" is good.", " is bad."]} for row in dict.fromkeys(rows)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    choices = [{"prompt": row[:-12], "chosen": " warm.", "rejected": " dull.", "strength": 2} for row in rows]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(choice) + "\n" for choice in choices))
    questions = [{"prompt": f"{row[:20]} {i}", "answer": str(i)} for i, row in enumerate(rows)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    if "chat-model" in page.read_text():
        chat_files(tmp_path)
    (tmp_path / "rewards.py").write_text((world.path / "rewards.py").read_text())
    (tmp_path / "rewards").symlink_to(ROOT / "rewards")
    for name, code in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(code)
    for name, content in re.findall(r"^```\w+ (\S+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(content)
    run_all(documented, here)


# ---- the rest of what a README promises


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_links_and_paths(file):
    text = file.read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in target]
    missing = [target for target in links if not (file.parent / target).exists()]
    assert missing == []


def test_map_names_what_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \|", text[text.index("## Map") : text.index("## Licence")], re.MULTILINE)
    assert len(rows) > 8 and [path for path in rows if not (ROOT / path).exists()] == []


def test_glossary_explains_every_metric():
    text = (ROOT / "docs/curves.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", text[text.index("## Metrics") :], re.MULTILINE)
    explained = set()
    for row in rows:
        names, group = re.findall(r"`([^`]+)`", row), ""
        for name in names:  # "`response/length`, `eos_rate`": the group is named once
            group = name.rpartition("/")[0] or group
            explained.add(name if "/" in name else f"{group}/{name}")
    groups = tuple(name.removesuffix("*") for name in explained if name.endswith("/*"))
    grouped = {name for name in PPO_METRICS if "/" in name and not name.startswith(groups)}
    variants = {f"{name.rpartition('_')[0]}_{end}" for name in explained for end in ("mean", "max")}
    assert sorted(grouped - explained - variants) == []


def test_glossary_has_the_bands_of_the_code():
    """What report, live view and doctor draw and say is what the page says."""
    text = (ROOT / "docs/curves.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text[text.index("## Metrics") :].splitlines() if line.startswith("| `")]
    for name, known in HEALTHY.items():
        group, _, rest = name.rpartition("/")
        cells = next(row for row in rows if f"`{name}`" in row[0] or f"{group}/" in row[0] and f"`{rest}`" in row[0])
        assert known.rule in cells[2], (name, cells)


def test_options_named_in_the_text_exist():
    """`kl_coef`, `--estimator=...`: words in backticks that look like an option of a script are one."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in DOCS)
    files = [*ROOT.glob("*.py"), *(ROOT / "bench").glob("*.py")]
    scripts = [module_of(script.relative_to(ROOT).as_posix()) for script in files]
    modules = [script for script in scripts if hasattr(script, "Config")]
    modules += [module for script in scripts for module in getattr(script, "COMMANDS", {}).values()]
    names = {f"--{field.name}" for module in modules for field in dataclasses.fields(module.Config)}
    names = names.union(
        *map(options_of_module, ("data.prepare", "data.pipeline", "rlhf.feedback", "rlhf.check", "rlhf.track"))
    )
    named = set(re.findall(r"`(--\w+)", text)) - {"--config"}  # of every Config
    assert named and named <= names, named - names
