"""The curves of a report: four large ones in front of the band of a healthy run, and every metric folded below them."""

from collections.abc import Callable, Sequence

import numpy as np

from evaluation import plots
from evaluation.page import Block, Curve, Curves, Plots, Table, Text, plain
from evaluation.sources import Source, series
from evaluation.words import brief
from rlhf.infra.healthy import HEALTHY, LARGE, band, is_outside

FIRST = ("objective/scores", "objective/kl", "judge/mean", "loss/train", "validation/")  # what a reader looks for
GROUPS = ("objective/", "policy/", "loss/", "value/", "response/")
FOLDED = ("returns/", "advantages/", "rollout/", "perf/", "time/")


def large(sources: Sequence[Source]) -> list[Block]:
    """The four that tell most about runs of PPO, each in words, with its band."""
    runs = [source for source in sources if source.kind == "PPO" and source.files.get("metrics.jsonl")]
    found = {source.name: series(source.files["metrics.jsonl"], HEALTHY.__contains__) for source in runs}
    found = {name: x for name, x in found.items() if x}
    curves = []
    for row in LARGE:
        moved = [name for name in row if any(name in x and np.ptp(x[name][1]) > 0 for x in found.values())]
        if moved:
            curves.append(curve(moved[0], {name: x[moved[0]] for name, x in found.items() if moved[0] in x}, [*found]))
    return [Curves(curves, [*found])] if curves else []


def curve(metric: str, runs: dict[str, tuple], names: Sequence[str]) -> Curve:
    """One metric of runs {name: (steps, values)}; the band is that of the first, whose start it may be measured by."""
    about, inside = HEALTHY[metric], band(metric, next(iter(runs.values()))[1])
    outside = [name for name, (_, y) in runs.items() if is_outside(metric, y)]
    ends = (f"{name} from {y[0]:.3g} to {y[-1]:.3g} over {len(y)} iterations" for name, (_, y) in runs.items())
    alt = f"{about.words}, {about.unit}: {'; '.join(ends)}. Healthy: {about.rule}"
    lines = [runs.get(name, ([], [])) for name in names]
    drawing = plots.svg(f"large {metric}", plain(alt), [plots.healthy(lines, inside, "", "iteration")], (4.2, 2.3))
    note = f"{', '.join(outside)}: {about.outside}" if outside and len(names) > 1 else about.outside * bool(outside)
    last = " / ".join(brief(y[-1]) for _, y in runs.values())
    return Curve(drawing, about.words, metric, last, about.unit, about.rule, note)


def drawn(sources: Sequence[Source], wanted: Callable[[str], bool]) -> list[Block]:
    """Small multiples of every metric that is wanted, runs of one kind together, and their numbers as a table."""
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
            lines, inside = [having.get(name, ([], [])) for name in found], band(metric, next(iter(having.values()))[1])
            drawing = plots.svg(f"{kind} {metric}", plain(alt), [plots.healthy(lines, inside, metric)])
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
