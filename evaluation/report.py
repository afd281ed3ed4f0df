"""A run directory, or a directory of runs, as one HTML page that fetches nothing, with a Markdown summary beside it.

python evaluate.py report --run=out/demo
python evaluate.py report --run=out/demo --picture=docs/picture.svg
python evaluate.py report --run=out/quick --reference=results/quick  # with its curves beside those of our seeds

Only files are read: what train_*.py, evaluate.py and iterate.py left. What is missing is named at the end of the page.
"""

import ast
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation import plots, verifiable, words
from evaluation.band import compare
from evaluation.card import accuracy_table, calibration_table, coverage_table, groups_table, probes_table
from evaluation.comparison import GATE, LEGEND, pairs_table, results_table, rounds_table
from evaluation.curves import drawn, large
from evaluation.overoptimisation import fits_table, points_table
from evaluation.page import Block, Plots, Section, Table, Text, plain, write
from evaluation.picture import picture
from evaluation.samples import base_beside_tuned, while_it_learned
from evaluation.sources import KINDS, Source, find
from evaluation.verdict import verdict
from evaluation.words import number, show
from rlhf.doctor.diagnosis import diagnose, in_words
from rlhf.infra import config
from rlhf.infra.files import write_text
from rlhf.overoptimisation import CURVES


@dataclass(frozen=True)
class Config:
    run: str = "out/demo"  # directory of a run (of train_*.py, evaluate.py, iterate.py), or of several
    out: str | None = None  # the HTML file, report.md goes beside it; none = report.html in the run
    reference: str | None = None  # directory of PPO runs of several seeds, as results/quick: is this one like them?
    picture: str | None = None  # also an SVG file for README: the words before and after beside the curves
    picture_prompt: int = 1  # which held-out prompt's answers the picture quotes [picture]

    def __post_init__(self):
        config.at_least(self, picture_prompt=1)
        for name, ending in (("out", ".html"), ("picture", ".svg")):
            path = getattr(self, name)
            if path is not None and not path.endswith(ending):
                raise ValueError(f"--{name}={path} must end in {ending}")


def main() -> None:
    cfg = config.parse(Config)
    plots.check_installed()
    sources = find(Path(cfg.run))
    drawing = picture(sources, cfg.run, cfg.picture_prompt) if cfg.picture else ""
    file = Path(cfg.out) if cfg.out else Path(cfg.run) / "report.html"
    title = f"Report: {Path(cfg.run).resolve().name}"
    sections, missing = build(sources)
    if cfg.reference:
        found = compare(cfg.run, cfg.reference)
        sections = {"Beside the reference runs": Section(found.blocks()), **sections}
        print(found.verdict())
    first = [*filter(None, [verdict(sources)])]
    beside = write(title, sections, file, first)
    files = [str(file), str(beside)]
    if cfg.picture:
        write_text(cfg.picture, drawing)
        files.append(cfg.picture)
    for said in first:
        print(said.sentence)
    absent = f" ({len(missing)} more have nothing to show, the page's end says why)" * bool(missing)
    print(f"The report of {len(sources)} directories, {len(sections)} sections{absent}: {', '.join(files)}")


# --- what it says ---


def build(sources: list[Source]) -> tuple[dict[str, Section], list[str]]:
    """The sections that have something to say, and a line about each that has not."""
    sections, missing = {}, [line for source in sources for line in source.damaged]
    for title, (make, files, folded) in SECTIONS.items():
        if blocks := make(sources):
            sections[title] = Section(blocks, folded)
        else:
            missing.append(f"No section {title!r}: {files}")
    if missing:
        sections["What is missing"] = Section([Text(line, "note") for line in missing], folded=True)
    return sections, missing


def each(sources: list[Source], file: str, make: Callable[[Source], list[Block]], titles: bool = True) -> list[Block]:
    """The blocks of every source that has `file`, each under its name; one line instead where it is not what we write."""
    blocks, having = [], [source for source in sources if file in source.files]
    for source in having:
        try:
            made = make(source)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:  # somebody else's file, or old
            made = [
                Text(f"Left out, {source.name}/{file}: unexpected content ({type(error).__name__} {error})", "note")
            ]
        if made and titles and len(having) > 1:
            blocks.append(Text(source.name, "h3"))
        blocks += made
    return blocks


def short(x) -> str:
    """A metric, an option."""
    if isinstance(x, float):
        return f"{x:.4g}"
    return config.show(tuple(x) if isinstance(x, list) else x)


# --- what was run ---


def runs(sources: list[Source]) -> list[Block]:
    blocks = each(sources, "run.json", options_of, titles=False)
    rows = []
    for source in sources:
        rows += [
            [source.name, name.removesuffix("_sha256"), str(x)]
            for name, x in source.files.get("run.json", {}).items()
            if name.endswith("_sha256") and x
        ]
    if rows:
        blocks.append(Table(["run", "input", "sha256"], rows, folded="Inputs and their sha256"))
    return blocks + each(sources, "summary.json", seconds)


def options_of(source: Source) -> list[Block]:
    """What the run was, whether it ended, and the options that differ from the script's defaults of today."""
    options, report = source.files["run.json"], source.files.get("report.json", {})
    done = len(source.files.get("metrics.jsonl", []))
    state = f"{report['seconds']:.0f} s" if "seconds" in report else f"not finished, {done} lines of metrics"
    if source.kind == "rounds":
        state = f"{len(source.files.get('rounds.json', {}).get('rounds', []))} finished"
    title = Text(f"{source.name}: {source.kind}, {state}", "h3")
    if source.kind not in KINDS:
        return [title]
    script, usual = KINDS[source.kind][0], defaults(KINDS[source.kind][0])
    known = {name: x for name, x in options.items() if name in usual}
    changed = [f"--{name}={short(x)}" for name, x in known.items() if json.dumps(x) != json.dumps(usual[name])]
    return [title, Text(shlex.join([script, *changed]), "command")]


def defaults(script: str) -> dict:
    """The defaults of a script's options, read from its source: nobody imports the scripts."""
    tree = ast.parse((Path(__file__).parent.parent / script).read_text(encoding="utf-8"))
    (config_class,) = (x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "Config")
    fields = (x for x in config_class.body if isinstance(x, ast.AnnAssign) and x.value is not None)
    return {x.target.id: ast.literal_eval(x.value) for x in fields}


def seconds(source: Source) -> list[Block]:
    used = source.files["summary.json"].get("seconds") or {}
    parts = [f"{name} {x:.0f}" for name, x in used.items() if x]
    return [Text(f"Seconds of {source.name}: {', '.join(parts)}")] if parts else []


# --- before and after ---


def results(sources: list[Source]) -> list[Block]:
    return each(sources, "summary.json", lambda source: summary_tables(source.files["summary.json"]))


def summary_tables(summary: dict) -> list[Block]:
    caption = f"{summary['prompts']} held-out prompts, 95% bootstrap intervals over prompts"
    blocks = [
        Table(*results_table(summary["rows"]), caption),
        Text(LEGEND.partition("; ")[2].replace("\n", " "), "small"),
    ]
    gains = {
        "judge, tuned - base": "judge_gain",
        "reward, tuned - base": "reward_gain",
        "tuned wins against base, by the judge": "win_rate_judge",
        "tuned wins against base, by the judge, at equal length": "win_rate_judge_length_controlled",
        "tuned wins against base, by the reward": "win_rate_reward",
    }
    ppo = summary.get("ppo", {})
    found = [[text, show(ppo[key])] for text, key in gains.items() if key in ppo]
    if found:
        blocks.append(Table(["comparison", "mean and 95% interval"], found, folded="What the tuned model gains"))
    if len(pairs := summary.get("pairwise") or []) > 1:
        head, rows = pairs_table(pairs)
        blocks.append(Table(["a / b", *head[2:]], [[f"{a} / {b}", *cells] for a, b, *cells in rows]))
    if found := summary.get("verifiable"):
        blocks.append(Table(*verifiable.table(found), "Answers that are right or wrong"))
    if elo := summary.get("elo"):
        rows = [[name, show(x, ".0f")] for name, x in elo.items()]
        blocks.append(Table(["model", "Elo by the judge, base = 0"], rows))
    if found := summary.get("minimal_pairs"):
        rows = [[name, show(x["accuracy"]), str(x["pairs"])] for name, x in found.items()]
        blocks.append(Table(["model", "minimal pairs right", "pairs"], rows))
    for name, x in (summary.get("safety") or {}).items():
        blocks.append(Text(f"Safety prompts, {name}: {flat(x)}"))
    return blocks


def flat(x) -> str:
    """Nested numbers on one line."""
    if isinstance(x, dict) and {"mean", "low", "high"} <= x.keys():
        return show(x)
    if isinstance(x, dict):
        return ", ".join(f"{name} {flat(value)}" for name, value in x.items())
    return f"{len(x)} of them" if isinstance(x, list) else short(x)


def before_after(sources: list[Source]) -> list[Block]:
    return each([x for x in sources if "summary.json" in x.files], "samples.jsonl", base_beside_tuned)


# --- rounds of iterate.py ---


def rounds(sources: list[Source]) -> list[Block]:
    return each(sources, "rounds.json", lambda source: rounds_of(source.name, source.files["rounds.json"]))


def rounds_of(name: str, content: dict) -> list[Block]:
    """The rounds' table, and two plots: the judge, and what the reward models know about the policies' own samples."""
    found = content["rounds"]
    blocks = [Text(f"Votes by: {content['rater']}. Judge: {content['judge']}."), Table(*rounds_table(found))]
    if found:
        judged = {"judge": [(0, *ends(found[0]["judge_base"]), "base")]}
        judged["judge"] += [(x["round"], *ends(x["judge"]), GATE[x["promoted"]]) for x in found]
        known = {  # beside each other, so that both intervals are seen
            title: [(x["round"] + shift, *ends(x["rm"][key]["accuracy"]), "") for x in found]
            for key, title, shift in (("on_own_samples", "refined", 0), ("on_own_samples_round_0", "round 0's", 0.06))
        }
        alts = [
            "Judge by round: " + ", ".join(f"{row[4]} {row[1]:.3f} in round {row[0]}" for row in judged["judge"]),
            "Accuracy on own samples: "
            + "; ".join(f"{title} {', '.join(f'{row[1]:.3f}' for row in rows)}" for title, rows in known.items()),
        ]
        panels = [
            plots.points(judged, "judge by round", "round", "judge"),
            plots.points(known, "reward model on the policy's own samples", "round", "accuracy"),
        ]
        svgs = [plots.svg(f"rounds {name} {i}", alts[i], [panels[i]], (4.6, 2.8)) for i in range(2)]
        blocks.append(Plots(svgs, wide=True))
    return blocks


def ends(x: dict) -> tuple[float, float, float]:
    return tuple(x[key] for key in ("mean" if "mean" in x else "value", "low", "high"))


# --- curves ---


def learned(sources: list[Source]) -> list[Block]:
    """The four large curves of the PPO runs, and what is wrong with each, in the doctor's words."""

    def of_run(source: Source) -> list[Block]:
        rows = [row for row in source.files["metrics.jsonl"] if "objective/kl" in row]
        found = diagnose(rows, source.files.get("run.json", {}), source.files.get("samples.jsonl", []))
        return [Text(line) for line in in_words(found, len(rows)).split("\n")]

    return large(sources) + each([source for source in sources if source.kind == "PPO"], "metrics.jsonl", of_run)


def all_curves(sources: list[Source]) -> list[Block]:
    """Small multiples of every metric, runs of one kind together; lengths have a section of their own."""
    return drawn(
        sources, lambda name: not name.startswith(("response/length", "response/eos", "response/trunc", "time/"))
    )


def lengths(sources: list[Source]) -> list[Block]:
    blocks = drawn(sources, lambda name: name in ("response/length", "response/eos_rate", "response/truncated_rate"))

    def measured(source: Source) -> list[Block]:
        rows = {name: x for name, x in source.files["summary.json"]["rows"].items() if "length" in x}
        cells = [[name, f"{x['length']:.1f}", f"{x['eos_rate']:.2f}"] for name, x in rows.items()]
        return [Table(["held-out prompts", "length, tokens", "share that ends by itself"], cells)] * bool(cells)

    return blocks + each(sources, "summary.json", measured)


# --- frontier and over-optimisation ---


def frontier(sources: list[Source]) -> list[Block]:
    """Reward and judge against the KL that they cost: models, and best-of-n of the base."""

    def of_summary(source: Source) -> list[Block]:
        rows = source.files["summary.json"]["rows"]
        measured = {what: what for what in ("judge", "reward") if any(what in row for row in rows.values())}
        return frontier_plots(source.name, rows, measured)

    def of_study(source: Source) -> list[Block]:
        rows = {x["name"]: x | {"kl": x["kl"]["value"]} for x in source.files["overoptimisation.json"]["rows"]}
        return frontier_plots(source.name, rows, {"gold": "gold reward", "proxy": "proxy reward"})

    return each(sources, "summary.json", of_summary) + each(sources, "overoptimisation.json", of_study)


def frontier_plots(name: str, rows: dict[str, dict], measures: dict[str, str]) -> list[Block]:
    svgs = []
    for key, title in measures.items():
        panel, alt = frontier_panel(rows, key, title)
        svgs.append(plots.svg(f"frontier {name} {key}", alt, [panel], (4.6, 3.0)))
    return [Plots(svgs, wide=True), Text("Bars: 95% intervals. The KL of best-of-n is its analytic upper bound.")]


def frontier_panel(rows: dict[str, dict], key: str, title: str) -> tuple[Callable, str]:
    groups: dict[str, list] = {"models": [], "best of n of the base": []}
    crowded = len(rows) > 8
    for name, x in rows.items():
        best = name.startswith("best of")
        label = "" if crowded and name != "base" else plain("/".join(Path(name).parts[-2:]))
        groups["best of n of the base" if best else "models"].append((x["kl"], *ends(x[key]), label))
    alt = f"{title} against KL: " + ", ".join(
        f"{plain(name)} {ends(x[key])[0]:.3f} at {x['kl']:.2f} nats" for name, x in rows.items()
    )
    panel = plots.points({k: v for k, v in groups.items() if v}, f"{title} against KL", "KL to the base, nats", title)
    return panel, alt


def overoptimisation(sources: list[Source]) -> list[Block]:
    return each(sources, "overoptimisation.json", lambda x: study(x.name, x.files["overoptimisation.json"]))


def study(name: str, result: dict) -> list[Block]:
    """Proxy and gold gain against sqrt(KL) with the fitted curves, and the tables."""
    svgs = []
    for curve, title in (("best_of_n", "best of n"), ("ppo", "PPO")):
        rows, fit = [x for x in result["rows"] if x["curve"] == curve], result["fits"][curve]
        gains = {k: [(x["d"], *ends(x[f"{k}_gain"]), "") for x in rows] for k in ("gold", "proxy")}
        fitted = {}
        if fit:
            d = np.linspace(0, fit["largest_d"], 100)
            fitted["gold"] = d, CURVES[curve].gain(d, fit["alpha"]["value"], fit["beta"]["value"])
        alt = f"{title}, gain over the base against the root of KL: " + ", ".join(
            f"{x['name']} proxy {x['proxy_gain']['value']:.2f} gold {x['gold_gain']['value']:.2f}" for x in rows
        )
        panel = plots.points(gains, f"{title}: gain over the base", "sqrt(KL), KL in nats", "gain", fitted)
        svgs.append(plots.svg(f"study {name} {curve}", plain(alt), [panel], (4.6, 3.0)))
    options = result["options"]
    return [
        Text(
            f"Proxy {options['proxy']}, gold {options['gold']}, {result['prompts']} prompts; lines: fits of the gold gain."
        ),
        Plots(svgs, wide=True),
        Table(*fits_table(result["fits"])),
        Table(*points_table(result["rows"]), folded="The numbers"),
    ]


# --- reward models ---


def reward_models(sources: list[Source]) -> list[Block]:
    rows = each(sources, "report.json", lambda source: trained(source.files["report.json"]))
    return rows + each(sources, "card.json", card_blocks) + each(sources, "summary.json", new_distribution)


def trained(report: dict) -> list[Block]:
    """What train_rm.py found on the test split; nothing in the reports of other scripts."""
    if not isinstance(report.get("accuracy"), dict) or "baselines" not in report:
        return []
    return [Table(*bare(accuracy_table(report, number)), "On the test split, after training")]


def card_blocks(source: Source) -> list[Block]:
    """The report card: accuracy, reliability before and after calibration, doubt, probes."""
    card = source.files["card.json"]
    calibration, legend = card["calibration"], ["without temperature", "with the fitted temperature"]
    blocks = [
        Text(f"Report card of {card['model']} on {card['texts']} texts, {card['pairs']} pairs of {card['data']}."),
        Text(f"Accuracy beside length alone: {show(card['over_length'], '+.3f')}."),
        Table(*bare(accuracy_table(card))),
        Plots([reliability(source.name, calibration)], legend, wide=True),
        Table(*calibration_table(calibration)),
        Table(*coverage_table(card["uncertainty"]["coverage"])),
    ]
    if card.get("groups"):
        blocks.append(Table(*groups_table(card["groups"])))
    failed = [probe["name"] for probe in card["probes"] if probe["passed"] is False]
    caption = f"{len(card['probes'])} probes, failed: {', '.join(failed) or 'none'}"
    return [*blocks, Table(*bare(probes_table(card["probes"])), caption)]


def bare(table: words.Table) -> words.Table:
    """Without Markdown's stars."""
    return words.Table(table.head, [[cell.strip("*") for cell in row] for row in table.rows])


def reliability(name: str, calibration: dict) -> str:
    groups, said = {}, []
    for when, title in (("before", "without temperature"), ("after", "with the fitted temperature")):
        rows = [(x["predicted"], *ends(x["observed"]), "") for x in calibration[when]["reliability"]]
        groups[title] = rows
        said += [f"{title}: " + ", ".join(f"{row[0]:.2f} said, {row[1]:.2f} true" for row in rows)]
    panel = plots.points(groups, "reliability", "probability of the side it prefers", "share where people do")
    return plots.svg(f"reliability {name}", "; ".join(said), [plots.diagonal(panel, 0.5, 1)], (4.6, 3.0))


def new_distribution(source: Source) -> list[Block]:
    """How far each reward can be believed on the models' own samples."""
    rows = []
    for model, rewards in (source.files["summary.json"].get("new_distribution") or {}).items():
        for reward, x in rewards.items():
            if reward != "gain":
                rows.append([f"{reward} on samples of {model}", show(x["accuracy"]), show(x["ece"]), str(x["pairs"])])
        for other, x in (rewards.get("gain") or {}).items():
            rows.append([f"gain over {other} on samples of {model}", show(x, "+.3f"), "-", "-"])
    head = ["held against the judge on the models' own samples", "accuracy", "ECE", "pairs"]
    return [Table(head, rows)] * bool(rows)


SECTIONS: dict[
    str, tuple[Callable[[list[Source]], list[Block]], str, bool]
] = {  # title -> its blocks, what they need, folded
    "How it learned": (learned, "metrics.jsonl, by train_ppo.py", False),
    "Before and after": (before_after, "summary.json and samples.jsonl, by evaluate.py", False),
    "Results": (results, "summary.json, by evaluate.py", False),
    "Rounds": (rounds, "rounds.json, by iterate.py", False),
    "KL and reward": (frontier, "summary.json, by evaluate.py", True),
    "Over-optimisation": (overoptimisation, "overoptimisation.json, by evaluate.py overoptimisation", True),
    "Reward models": (reward_models, "report.json, by train_rm.py, or card.json, by evaluate.py rm", True),
    "All curves": (all_curves, "metrics.jsonl, by train_*.py", True),
    "Length": (lengths, "metrics.jsonl, by train_ppo.py, or summary.json", True),
    "Samples while it learned": (while_it_learned, "samples.jsonl, by train_ppo.py", True),
    "What was run": (runs, "run.json, by train_*.py", True),
}
