"""A run directory, or a directory of runs, as one HTML page that fetches nothing, with a Markdown summary beside it.

python evaluate.py report --run=out/demo
python evaluate.py report --run=out/demo --picture=docs/picture.svg
python evaluate.py report --run=out/quick --reference=results/quick  # with its curves beside those of our seeds

Only files are read: what train_*.py, evaluate.py and iterate.py left. What is missing is named at the end of the page.
"""

import ast
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation import plots, verifiable, words
from evaluation.band import compare
from evaluation.card import accuracy_table, calibration_table, coverage_table, groups_table, probes_table
from evaluation.comparison import GATE, pairs_table, results_table, rounds_table
from evaluation.overoptimisation import fits_table, points_table
from evaluation.page import Block, Microscope, Plots, Sample, Shade, Table, Text, plain, write
from evaluation.sources import KINDS, Source, find, is_number, series
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
    picture: str | None = None  # also an SVG file with learning curve and frontier alone, for a page about the run

    def __post_init__(self):
        for name, ending in (("out", ".html"), ("picture", ".svg")):
            path = getattr(self, name)
            if path is not None and not path.endswith(ending):
                raise ValueError(f"--{name}={path} must end in {ending}")


def main() -> None:
    cfg = config.parse(Config)
    plots.check_installed()
    sources = find(Path(cfg.run))
    drawing = picture(sources, cfg.run) if cfg.picture else ""
    file = Path(cfg.out) if cfg.out else Path(cfg.run) / "report.html"
    title = f"Report: {Path(cfg.run).resolve().name}"
    sections, missing = build(sources)
    if cfg.reference:
        found = compare(cfg.run, cfg.reference)
        sections = {"Beside the reference runs": found.blocks(), **sections}
        print(found.verdict())
    beside = write(title, sections, file)
    files = [str(file), str(beside)]
    if cfg.picture:
        write_text(cfg.picture, drawing)
        files.append(cfg.picture)
    absent = f" ({len(missing)} more have nothing to show, the page's end says why)" * bool(missing)
    print(f"The report of {len(sources)} directories, {len(sections)} sections{absent}: {', '.join(files)}")


# --- what it says ---


def build(sources: list[Source]) -> tuple[dict[str, list[Block]], list[str]]:
    """The sections that have something to say, and a line about each that has not."""
    sections, missing = {}, [line for source in sources for line in source.damaged]
    for title, (make, files) in SECTIONS.items():
        if blocks := make(sources):
            sections[title] = blocks
        else:
            missing.append(f"No section {title!r}: {files}")
    if missing:
        sections["What is missing"] = [Text(line, "note") for line in missing]
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
    blocks = [Table(*results_table(summary["rows"]), caption)]
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
        blocks.append(Table(["comparison", "mean and 95% interval"], found))
    if pairs := summary.get("pairwise"):
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
    def table(source: Source) -> list[Block]:
        rows = [row for row in source.files["samples.jsonl"] if "before" in row]  # and one text for every other model
        caption = (
            f"The first {min(10, len(rows))} of {len(rows)} held-out prompts; all models draw the same random numbers"
        )
        return (
            [Table(list(rows[0]), [[row[name] for name in rows[0]] for row in rows[:10]], caption, texts=True)]
            if rows
            else []
        )

    return each([x for x in sources if "summary.json" in x.files], "samples.jsonl", table)


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


# --- doctor ---


def findings(sources: list[Source]) -> list[Block]:
    """What is wrong with each PPO run, in the doctor's words."""

    def of_run(source: Source) -> list[Block]:
        rows = [row for row in source.files["metrics.jsonl"] if "objective/kl" in row]
        found = diagnose(rows, source.files.get("run.json", {}), source.files.get("samples.jsonl", []))
        return [Text(line) for line in in_words(found, len(rows)).split("\n")]

    return each([source for source in sources if source.kind == "PPO"], "metrics.jsonl", of_run)


# --- curves ---

FIRST = ("objective/scores", "objective/kl", "judge/mean", "loss/train", "validation/")  # what a reader looks for
GROUPS = ("objective/", "policy/", "loss/", "value/", "response/")
FOLDED = ("returns/", "advantages/", "rollout/", "perf/", "time/")


def curves(sources: list[Source]) -> list[Block]:
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


def drawn(sources: list[Source], wanted: Callable[[str], bool]) -> list[Block]:
    blocks, kinds = [], {}
    for source in sources:
        if source.files.get("metrics.jsonl"):
            kinds.setdefault(source.kind, []).append(source)
    for kind, group in kinds.items():
        found = {source.name: series(source.files["metrics.jsonl"], wanted) for source in group}
        found = {name: x for name, x in found.items() if x}
        metrics = sorted({metric for x in found.values() for metric in x}, key=order)
        if not metrics:
            continue
        still, first, more, rows = [], [], [], []
        for metric in metrics:
            having = {name: x[metric] for name, x in found.items() if metric in x}
            values = np.concatenate([y for _, y in having.values()])
            for name, (_, y) in having.items():
                cells = (f"{v:.4g}" for v in (y[0], y[-1], y.min(), y.max()))
                rows.append([metric, *[name] * (len(found) > 1), *cells, str(len(y))])
            if len(values) > 1 and values.min() == values.max():
                still.append(f"{metric} {values[0]:.4g}")
                continue
            alt = f"{metric}: " + "; ".join(
                f"{name} from {y[0]:.3g} to {y[-1]:.3g} over {len(y)} points" for name, (_, y) in having.items()
            )
            lines = [having.get(name, ([], [])) for name in found]
            drawing = plots.svg(f"{kind} {metric}", plain(alt), [plots.lines(lines, metric)])
            (more if metric.startswith(FOLDED) else first).append(drawing)
        if len(kinds) > 1:
            blocks.append(Text(kind, "h3"))
        head = ["metric", *["run"] * (len(found) > 1), "first", "last", "smallest", "largest", "points"]
        blocks += [Plots(first, list(found))] * bool(first)
        blocks += [Plots(more, list(found), folded="More curves: returns, advantages, rollout, speed")] * bool(more)
        blocks += [Text(f"Constant: {', '.join(still)}.")] * bool(still)
        blocks.append(Table(head, rows, folded="The numbers of the curves"))
    return blocks


def order(metric: str) -> tuple:
    return (*(not metric.startswith(start) for start in FIRST + GROUPS), metric)


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


# --- samples ---

SHADES = {  # what a token can be coloured by -> its meaning
    "kl": "log-prob minus reference",
    "logprobs": "log-prob",
    "values": "value",
    "rewards": "reward",
    "advantages": "advantage",
}


def samples(sources: list[Source]) -> list[Block]:
    """The first and the last responses that each PPO run kept; one microscope, as its colours are chosen once."""
    chosen = []
    for source in sources:
        rows = [x for x in source.files.get("samples.jsonl", []) if isinstance(x.get("response"), str)]
        steps = sorted({x["step"] for x in rows if is_number(x.get("step"))})
        for step in dict.fromkeys(steps[:1] + steps[-1:]):
            chosen += [(source.name, x) for x in rows if x.get("step") == step][:6]
    if not chosen:
        return []
    made = list(looked_at(chosen))
    shades = []
    for name, text in SHADES.items():
        known = [abs(v) for sample in made for v in sample.values.get(name, ()) if v is not None]
        if known and max(known) > 0:
            shades.append(Shade(name, text, float(np.quantile(known, 0.95)) or max(known)))
    made = [
        Sample(x.prompt, x.tokens, x.head, {s.name: x.values.get(s.name, [None] * len(x.tokens)) for s in shades})
        for x in made
    ]
    told = "∅ ends a response." if shades else "No numbers per token: this samples.jsonl is older than they are."
    return [Text(f"The first and the last responses kept, the prompt in bold. {told}"), Microscope(made, shades)]


def looked_at(chosen: list[tuple[str, dict]]) -> Iterator[Sample]:
    for name, x in chosen:
        numbers = [f"{key} {x[key]:.2f}" for key in ("score", "kl") if is_number(x.get(key))]
        head = f"{name}, step {x['step']}: {', '.join(numbers)}"
        tokens = x.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            yield Sample(str(x.get("prompt", "")), [f" → {x['response']}"], head, {})
            continue
        columns = {key: x.get(key) for key in ("logprobs", "ref_logprobs", "values", "rewards", "advantages")}
        values = {
            key: [v if is_number(v) else None for v in column]
            for key, column in columns.items()
            if isinstance(column, list) and len(column) == len(tokens)
        }
        if {"logprobs", "ref_logprobs"} <= values.keys():
            pairs = zip(values["logprobs"], values.pop("ref_logprobs"))
            values["kl"] = [None if a is None or b is None else a - b for a, b in pairs]
        yield Sample(str(x.get("prompt", "")), tokens, head, values)


# --- the picture ---


def picture(sources: list[Source], run: str) -> str:
    """Score, KL and the frontier beside each other: of the first PPO run, and of the first evaluation."""
    trained = next((x for x in sources if x.kind == "PPO" and x.files.get("metrics.jsonl")), None)
    judged = next((x for x in sources if "rows" in x.files.get("summary.json", {})), None)
    if not (trained and judged):
        what = "metrics.jsonl of train_ppo.py" if not trained else "summary.json of evaluate.py"
        raise ValueError(f"--picture shows a PPO run and its evaluation: {run} has no {what}")
    found = series(trained.files["metrics.jsonl"], lambda name: name in ("objective/scores", "objective/kl"))
    try:
        score, kl = found["objective/scores"], found["objective/kl"]
        panel, alt = frontier_panel(judged.files["summary.json"]["rows"], "judge", "independent judge")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--picture: unexpected content in {trained.name} or {judged.name} of {run}: {error}"
        ) from None
    panels = [
        plots.lines([score], "mean score of the responses", "PPO iteration"),
        plots.lines([kl], "KL to the base, nats per response", "PPO iteration"),
        panel,
    ]
    said = f"Score from {score[1][0]:.2f} to {score[1][-1]:.2f}, KL from {kl[1][0]:.1f} to {kl[1][-1]:.1f} nats. {alt}"
    return plots.standalone(plots.svg("picture", said, panels, (10, 2.9)))


SECTIONS: dict[str, tuple[Callable[[list[Source]], list[Block]], str]] = {  # title -> its blocks, and what they need
    "Results": (results, "summary.json, by evaluate.py"),
    "What was run": (runs, "run.json, by train_*.py"),
    "Rounds": (rounds, "rounds.json, by iterate.py"),
    "What the doctor says": (findings, "metrics.jsonl, by train_ppo.py"),
    "Learning curves": (curves, "metrics.jsonl, by train_*.py"),
    "KL and reward": (frontier, "summary.json, by evaluate.py"),
    "Over-optimisation": (overoptimisation, "overoptimisation.json, by evaluate.py overoptimisation"),
    "Length": (lengths, "metrics.jsonl, by train_ppo.py, or summary.json"),
    "Reward models": (reward_models, "report.json, by train_rm.py, or card.json, by evaluate.py rm"),
    "Samples": (samples, "samples.jsonl, by train_ppo.py"),
    "Before and after": (before_after, "summary.json and samples.jsonl, by evaluate.py"),
}
