"""The model card of an export: README.md with a YAML head, from what the runs wrote down and from nothing else.

What nobody wrote down is left out: a base model without a name on the Hub, a licence that its directory does not state, data
that lie elsewhere or are others by now (checksums tell), an evaluation that is older than the weights.
"""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from data.fetch import MODELS
from data.loader import open_data
from evaluation import receipt
from evaluation.comparison import results_table
from evaluation.report import defaults
from evaluation.sources import KINDS
from evaluation.words import estimate_of, markdown_table, show
from rlhf.infra import checkpoint, config
from rlhf.infra.files import read_json
from rlhf.infra.screen import printable
from rlhf.lm.pretrained import digest_of

SCRIPTS = KINDS | {"DPO": ("train_dpo.py", "label_smoothing")}
TAGS = {"PPO": "ppo", "DPO": "dpo", "reward model": "reward-model"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name: all that the Hub takes as a base model


@dataclass(frozen=True)
class Stage:
    """One run of a train script."""

    kind: str  # of SCRIPTS
    run: Path
    options: dict  # of its run.json


@dataclass(frozen=True)
class Origin:
    """Where a model comes from."""

    stages: Sequence[Stage]  # the first to be run first
    base: str | None  # what that one began with, as its option says; None: from scratch, or it is not there any more
    hub: str | None = None  # the base's name on the Hub
    licence: str | None = None  # of the base


def origin_of(spec: str) -> Origin:
    """The runs behind a model, back to where the first began, as long as what they began with is still there."""
    stages: list[Stage] = []
    base: str | None = spec
    while base is not None and (stage := stage_of(base)) and stage.run not in [later.run for later in stages]:
        stages.insert(0, stage)
        base = stage.options.get("init")
        if not isinstance(base, str) or not is_still(base, stage.options.get("init_sha256")):
            base = None
    return Origin(stages, base, *(named(base) if base is not None else (None, None)))


def stage_of(spec: str) -> Stage | None:
    """The run that a model is of; None for another model, and where run.json is damaged."""
    run = run_of(spec)
    try:
        options = read_json(run / "run.json") if run else {}
    except (OSError, ValueError):
        return None
    kind = next((kind for kind, (_, option) in SCRIPTS.items() if option in options), None)
    return Stage(kind, run, options) if run and kind else None


def run_of(spec: str) -> Path | None:
    """The run directory that a model is of: the directory itself, or that of a checkpoint."""
    path = Path(spec)
    inside = checkpoint.step_number(path) is not None or path.name == "best"
    places = [path, path.parent] if inside else [path]
    return next((place for place in places if (place / "run.json").is_file()), None)


def is_still(spec: str, sha256: str | None) -> bool:
    """Is what lies there what the run began with?"""
    if spec in MODELS and not Path(spec).exists():  # without a download
        return MODELS[spec].sha256 == sha256
    try:
        return sha256 is not None and digest_of(spec) == sha256
    except (OSError, ValueError):
        return False


def named(base: str) -> tuple[str | None, str | None]:
    """(name on the Hub, licence) of a model that is no run of ours, where it says them itself."""
    path = Path(base)
    if base in MODELS and not path.exists():
        return MODELS[base].hub, MODELS[base].licence.lower()
    if not path.is_dir():
        return None, None
    said = head_of(path / "README.md")
    names = [said.get("base_model")]
    for file, key in (("config.json", "_name_or_path"), ("adapter_config.json", "base_model_name_or_path")):
        names += [text_of(path / file, key)]
    said = {key: value for key, value in said.items() if value not in ("null", "~")}
    hub = (name for name in names if name and HUB_NAME.fullmatch(name) and not Path(name).exists())
    return next(hub, None), said.get("license")


def text_of(file: Path, key: str) -> str | None:
    """What config.json says under `key`; None where it says nothing."""
    try:
        value = read_json(file).get(key)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, str) else None


def head_of(file: Path) -> dict[str, str]:
    """What the head of a README.md says, see head_in; {} where there is none."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    return head_in(head[1]) if head else {}


def head_in(yaml: str) -> dict[str, str]:
    """{key: text} of the lines `key: text`, and of `key:` with `- text` below it, of which it takes the first."""
    found = re.findall(r"^(\w+):[ \t]*(?:\n\s*- )?(\S.*?)[ \t]*$", yaml, re.MULTILINE)
    return {key: unquoted(value) for key, value in found}


def unquoted(text: str) -> str:
    """What a scalar of YAML says, without its quotes, or without the comment behind it."""
    if text.startswith('"'):
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    if text.startswith("'") and text.endswith("'"):
        return text[1:-1].replace("''", "'")
    return re.sub(r"\s+#.*", "", text)


# --- what the run was taught with, and what was measured ---


def data_of(options: dict) -> list[str]:
    """Names of the files behind a run's data, where these are still the data that it read."""
    spec, names = options.get("data"), []
    try:
        if spec is None or open_data(spec, "train").digest != options.get("data_sha256"):
            return []
        for place in [spec] if Path(spec).is_dir() else [part.rpartition(":")[0] for part in spec.split(",")]:
            manifest = read_json(Path(place.strip()) / "manifest.json")
            names += [Path(str(one["file"])).name for one in manifest["made"]["inputs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return list(dict.fromkeys(names))


def evaluation_of(spec: str) -> tuple[dict, str] | None:
    """(summary.json of evaluate.py, the name of the model's row in it): of the run, or beside it, of these weights and not
    older than they are.
    """
    run = run_of(spec) or Path(spec)
    for place in (run, run / "evaluation", run.parent, run.parent / "evaluation"):
        file = place / "summary.json"
        if not file.is_file() or file.stat().st_mtime < written(spec):
            continue
        try:
            summary = read_json(file)
            tuned, rows = summary["options"]["tuned"], summary["rows"]
        except (KeyError, TypeError, ValueError):
            continue
        for one in tuned:
            row = "tuned" if len(tuned) == 1 else one
            if weights_of(one) == weights_of(spec) and row in rows:
                return summary, row
    return None


def weights_of(spec: str) -> Path:
    """Where a model's weights lie: of a run the newest checkpoint, which is neither an earlier one nor `best`."""
    try:
        return checkpoint.resolve(spec).resolve()
    except (OSError, ValueError):  # a file, or a name
        return Path(spec).resolve()


def written(spec: str) -> float:
    """When the weights were."""
    try:
        return max(file.stat().st_mtime for file in checkpoint.resolve(spec).glob("*.safetensors"))
    except (OSError, ValueError):
        return 0.0


METRICS = {
    "reward": "reward",
    "judge": "held-out judge",
    "kl": "KL from the base, nats per answer",
    "distinct_3": "distinct-3",
}


def model_index(name: str, summary: dict, row: str, data: Sequence[str]) -> list[dict]:
    """The row of the results in the Hub's form."""
    options, found, metrics = summary["options"], summary["rows"][row], []
    for key, words in METRICS.items():
        value = found.get(key)
        if value is None:
            continue
        estimate = estimate_of(value) if isinstance(value, dict) else value
        number, interval = (estimate.value, f" {show(value)}") if isinstance(value, dict) else (estimate, "")
        if number == number:
            metrics.append({"type": key, "value": float(number), "name": f"{words}{interval}"})
    where = {"type": data[0] if data else Path(options["data"]).name, "name": f"{options['data']}, {options['split']}"}
    where["name"] += f", {summary['prompts']} prompts"
    return [{"name": name, "results": [{"task": {"type": "text-generation"}, "dataset": where, "metrics": metrics}]}]


def evaluation(name: str, summary: dict, row: str, data: Sequence[str]) -> tuple[list[dict], str] | None:
    """What the head and the text say of it; None where summary.json is not as evaluate.py writes it."""
    try:
        rows = {key: summary["rows"][key] for key in ("base", row) if key in summary["rows"]}
        said = f"Before the export: {summary['prompts']} held-out prompts, 95% intervals over prompts."
        return model_index(name, summary, row, data), f"{said}\n\n{markdown_table(*results_table(rows))}"
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


# --- the card ---


def model_card(name: str, spec: str, command: list[str], form: str, measured: dict | None = None) -> str:
    """README.md of an export called `name` of the model `spec`, written by `command`.

    form: hf, int8, gguf, peft, or classifier; measured: its receipt, see evaluation/receipt.py.
    """
    origin, measured = origin_of(spec), measured or {}
    data = list(dict.fromkeys(file for stage in origin.stages for file in data_of(stage.options)))
    head: dict = {}
    if origin.hub:
        head["base_model"] = origin.hub
        head |= {"base_model_relation": how} if (how := relation(origin, form)) else {}
    head |= {"license": origin.licence} if origin.licence else {}
    head |= {"library_name": LIBRARIES[form]} if form in LIBRARIES else {}
    head["pipeline_tag"] = "text-classification" if form == "classifier" else "text-generation"
    head["tags"] = ["plain-rlhf", *dict.fromkeys(TAGS[stage.kind] for stage in origin.stages if stage.kind in TAGS)]
    head |= {"datasets": data} if data else {}
    # a critic, and a model without some of its layers, are not what was evaluated
    found = evaluation_of(spec) if form != "classifier" and "dropped" not in measured else None
    if evaluated := found and evaluation(name, *found, data):
        head["model-index"] = evaluated[0]
    parts = [f"---\n{yaml(head)}---", f"# {markdown(name)}", opening(origin), use(form)]
    commands = [command_of(stage) for stage in origin.stages] + [command]
    parts += ["## How it was made", fenced("sh", "\n".join(printable(shlex.join(one)) for one in commands))]
    parts += [checksums(origin)] if origin.stages else []
    if evaluated:
        parts += ["## Evaluation", evaluated[1]]
    if measured:
        parts += ["## What the export cost", fenced("", receipt.lines(measured))]
    return "\n\n".join(parts) + "\n"


LIBRARIES = {"hf": "transformers", "classifier": "transformers", "peft": "peft", "int8": "plain-rlhf"}
USE = {
    "hf": "AutoModelForCausalLM.from_pretrained(PATH)",
    "classifier": "AutoModelForSequenceClassification.from_pretrained(PATH)  # its config's reward_bias is to be added",
}


def relation(origin: Origin, form: str) -> str | None:
    """In the Hub's words; None for the base itself in other files."""
    if form == "peft":
        return "adapter"
    return "finetune" if origin.stages else "quantized" if form == "int8" else None


def opening(origin: Origin) -> str:
    began = f" from `{printable(origin.base)}`" if origin.base is not None else ""
    stages = ", then ".join(f"{stage.kind} ({SCRIPTS[stage.kind][0]})" for stage in origin.stages)
    licence = " The licence is the base model's." if origin.licence and origin.stages else ""
    return f"Written by plain-rlhf{began}{f': {stages}' if stages else ''}.{licence}"


def use(form: str) -> str:
    if form in USE:
        return fenced("python", f"from transformers import {USE[form].partition('.')[0]}\n\nmodel = {USE[form]}")
    if form == "peft":
        return fenced("python", "from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(BASE, PATH)")
    return fenced(
        "sh", "python sample.py --checkpoint=PATH --prompt=TEXT    # of plain-rlhf; also serve.py --init=PATH"
    )


def command_of(stage: Stage) -> list[str]:
    """The command of a run, without the options that are their defaults."""
    script = SCRIPTS[stage.kind][0]
    usual = defaults(script)
    changed = {k: x for k, x in stage.options.items() if k in usual and json.dumps(x) != json.dumps(usual[k])}
    said = {name: config.show(tuple(x) if isinstance(x, list) else x) for name, x in changed.items()}
    return ["python", script, *(f"--{name}={text}" for name, text in said.items())]


def checksums(origin: Origin) -> str:
    rows = [
        [markdown(str(stage.options.get("out", stage.run))), name.removesuffix("_sha256"), markdown(str(digest))]
        for stage in origin.stages
        for name, x in stage.options.items()
        if name.endswith("_sha256")
        for digest in shortened(x if isinstance(x, list) else [x] if x else [])
    ]
    return markdown_table(["run", "input", "sha256"], rows)


def shortened(digests: list) -> list:
    """Those of the data's first shards: there may be thousands."""
    return digests if len(digests) <= 4 else [*digests[:3], f"and of {len(digests) - 3} more shards, see run.json"]


def fenced(language: str, text: str) -> str:
    return f"~~~~{language}\n{text}\n~~~~"


def markdown(text: str) -> str:
    """One line that a table or a heading can hold."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", printable(text))


# --- YAML ---


def yaml(head: dict) -> str:
    """A line for every key, lists of words below it; every value is written as JSON, which is YAML too."""
    lines = []
    for key, value in head.items():
        if value and isinstance(value, list) and all(isinstance(x, str) for x in value):
            lines += [f"{key}:", *(f"- {flow(x)}" for x in value)]
        else:
            lines.append(f"{key}: {flow(value)}")
    return "".join(f"{line}\n" for line in lines)


PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")  # what YAML reads as text without quotes
WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}  # but for these


def flow(value) -> str:
    """A value on one line. Text with anything unusual in it is quoted, and what YAML does not take as it is, escaped."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(key)}: {flow(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, int | float):
        return str(value) if isinstance(value, int) else format(Decimal(f"{value:.6g}"), "f")  # 1e-05 would be a text
    if PLAIN.fullmatch(value) and value.lower() not in WORDS:
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else escaped(c) for c in quoted)


def escaped(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
