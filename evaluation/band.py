"""A run beside runs of ours of several seeds: inside the band that they span, or which metric leaves it, and where.

python evaluate.py compare out/quick results/quick
python evaluate.py compare --run=out/ppo --reference=out/seeds   # any directory that holds two PPO runs or more

Curves are compared in blocks of iterations, evaluations by what summary.json says of the last model. A band is Student's
prediction interval for one more seed, so a healthy run leaves any of them in 5% of the cases. Exit code 1 where this one does.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation import plots
from evaluation.card import can_draw
from evaluation.page import Block, Plots, Section, Table, Text, plain, write
from evaluation.sources import Source, find
from evaluation.verdict import Verdict
from evaluation.words import markdown_table
from rlhf.infra import config
from rlhf.infra.metrics import is_number
from rlhf.infra.run import FREE
from rlhf.statistics import prediction_interval


@dataclass(frozen=True)
class Config:
    run: str  # a PPO run, or a directory with one run and its evaluation; the word "--run" may be left out
    reference: str  # directory of PPO runs of several seeds; the word "--reference" may be left out
    out: str | None = None  # the HTML page, its Markdown goes beside it; none = compare.html in the run
    plots: bool | None = None  # draw the curves, which needs matplotlib; none = if it is installed

    def __post_init__(self):
        if self.out is not None and not self.out.endswith(".html"):
            raise ValueError(f"--out={self.out} must end in .html")


def main() -> None:
    cfg = config.parse(Config)
    found = compare(cfg.run, cfg.reference)
    drawn = can_draw(cfg.plots)
    file = Path(cfg.out) if cfg.out else Path(cfg.run) / "compare.html"
    first, *rest = found.blocks(drawn)
    title = f"{plain(cfg.run)} beside {plain(cfg.reference)}"
    beside = write(title, {"Curves and numbers": Section(rest)}, file, [Verdict(first.text)])
    print(markdown_table(*found.table()))
    for line in found.notes:
        print(line)
    print(f"{found.verdict()}\n-> {file}, {beside}")
    sys.stdout.flush()
    raise SystemExit(1 if found.outside else 0)


CURVES = (  # of metrics.jsonl
    "objective/scores",
    "objective/kl",
    "policy/entropy",
    "policy/approxkl",
    "policy/clipfrac",
    "value/explained_var",
    "response/length",
    "response/distinct_2",
)
NUMBERS = {  # of the evaluation: the key in summary.json's "ppo" -> its name
    "judge_gain": "gain of the judge",
    "reward_gain": "gain of the reward",
    "kl": "KL to the base, nats",
    "distinct3_after": "distinct-3",
}
BLOCKS = 8  # of a whole reference run
MISSED = 0.025  # a healthy run leaves one of the curves' bands so often, and one of the evaluation's
FINEST = 0.01  # no deviation is taken for smaller than this part of what is measured: rounding differs between CPUs


@dataclass(frozen=True)
class Row:
    """One metric: the means over B blocks of iterations, of the run and of S seeds, and the band for one more seed."""

    name: str
    blocks: list[tuple[int, int]]  # first and last iteration of each; of a number of the evaluation one, of nothing
    run: np.ndarray  # (B,); NaN where the run has no number
    seeds: np.ndarray  # (S, B)
    low: np.ndarray  # (B,)
    high: np.ndarray  # (B,)

    @property
    def outside(self) -> np.ndarray:
        """Which blocks leave the band, (B,) bool; what is no number does."""
        return ~((self.run >= self.low) & (self.run <= self.high))

    @property
    def worst(self) -> int:
        """The block that is furthest out, in half widths of its band."""
        half = np.maximum(self.high - self.low, 1e-12) / 2
        return int(np.nan_to_num(np.abs(self.run - (self.high + self.low) / 2) / half, nan=math.inf).argmax())

    @property
    def is_curve(self) -> bool:
        return self.blocks[0][1] >= 0

    def band(self, i: int) -> str:
        return f"{self.low[i]:.3g} to {self.high[i]:.3g}"

    def place(self, i: int) -> str:
        """`5 to 9`, of the iterations."""
        return span(self.blocks[i], self.blocks[i]) if self.is_curve else "the evaluation"

    def where(self) -> str:
        """`iterations 5 to 14, 20 to 24`: neighbouring blocks outside are said together."""
        spans: list[list[int]] = []
        for i in np.flatnonzero(self.outside):
            if spans and spans[-1][1] == i - 1:
                spans[-1][1] = i
            else:
                spans.append([i, i])
        told = ", ".join(span(self.blocks[first], self.blocks[last]) for first, last in spans)
        return f"iterations {told}" if self.is_curve else "the evaluation"


def span(first: tuple[int, int], last: tuple[int, int]) -> str:
    return to(first[0], last[1])


def to(first: int, last: int) -> str:
    return f"{first} to {last}" if last > first else str(first)


def row(
    name: str,
    blocks: list[tuple[int, int]],
    run: np.ndarray,
    seeds: np.ndarray,
    tests: int,
    together: int = 1,
    error: float = 0.0,
) -> Row:
    """The band of seeds (S, B) for one more, in all `tests` blocks at once (Bonferroni), and as wide as the seeds are;
    `error`: the standard error that each of them states itself, below which no deviation between them is believed.

    Few seeds know their deviation badly, so that of a block is pooled with its neighbours', `together` of them; what is
    alike in neighbours is not known any better, so each of them counts half.
    """
    count, width = len(seeds), seeds.shape[1]
    variance = seeds.var(0, ddof=1)
    near = [variance[max(0, i - together // 2) : i + together // 2 + 1] for i in range(width)]
    mean, level = seeds.mean(0), 1 - MISSED / tests
    deviation = np.maximum(np.sqrt([x.mean() for x in near]), max(FINEST * np.abs(mean).max(), error))
    freedom = [(count - 1) * (1 + len(x)) / 2 for x in near]
    ends = [prediction_interval(mean[i], deviation[i], count, freedom[i], level) for i in range(width)]
    low, high = np.array(ends).T
    return Row(name, blocks, run, seeds, np.minimum(low, seeds.min(0)), np.maximum(high, seeds.max(0)))


def curve(name: str, run: dict[int, float], seeds: Sequence[dict[int, float]], metrics: int) -> Row | None:
    """A metric by iteration, of the run and of the seeds; None where they have no iteration in common.

    The last block of a run that ended early is met with the same iterations of the seeds.
    """
    steps = shared(seeds)
    size = math.ceil(len(steps) / BLOCKS) or 1
    cut = [steps[i : i + size] for i in range(0, len(steps), size)]
    blocks = [met for block in cut if (met := [step for step in block if step in run])]
    if not blocks:
        return None
    means = np.array([[np.mean([x[step] for step in block]) for block in blocks] for x in (run, *seeds)])
    return row(name, [(b[0], b[-1]) for b in blocks], means[0], means[1:], metrics * len(cut), together=3)


def shared(seeds: Sequence[dict[int, float]]) -> list[int]:
    """The iterations in which every seed has a finite number."""
    return sorted(set.intersection(*({step for step, x in seed.items() if math.isfinite(x)} for seed in seeds)))


@dataclass(frozen=True)
class Found:
    """A comparison."""

    reference: str
    seeds: int
    rows: list[Row]
    notes: list[str]
    done: int  # of the iterations that all seeds have, those that the run has
    whole: int  # iterations that all seeds have

    @property
    def outside(self) -> list[Row]:
        return [row for row in self.rows if row.outside.any()]

    def verdict(self) -> str:
        """One sentence, and one more for every metric that leaves its band."""
        of = f"the band of {self.seeds} seeds of {self.reference}"
        so_far = f" so far, {self.done} of {self.whole} iterations" * (self.done < self.whole)
        curves, last = sum(row.is_curve for row in self.rows), max(row.blocks[-1][1] for row in self.rows)
        if not self.outside:
            numbers = len(self.rows) - curves
            told = [f"{curves} curves to iteration {last}"] * bool(curves)
            told += [f"{numbers} numbers of the evaluation"] * bool(numbers)
            return f"Inside {of}{so_far}: {' and '.join(told)}."
        lines = [f"Outside {of} in {len(self.outside)} of {len(self.rows)}{so_far}:"]
        for x in self.outside:
            i = x.worst
            lines.append(f"  {x.name} in {x.where()}: {said(x.run[i])} in {x.place(i)}, band {x.band(i)}")
        return "\n".join(lines)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Every metric where it is furthest out."""
        rows = [
            [x.name, x.place(i), said(x.run[i]), f"{x.seeds[:, i].mean():.3g}", x.band(i),
             f"leaves it in {x.where()}" if x.outside.any() else "inside"]
            for x in self.rows for i in [x.worst]
        ]  # fmt: skip
        return ["metric", "furthest out in iterations", "this run", "mean of the seeds", "band", "verdict"], rows

    def blocks(self, drawn: bool = True) -> list[Block]:
        """The page: verdict, table, and the run's curves on top of the seeds'."""
        lines = self.verdict().split("\n")
        curves = [x for x in self.rows if x.is_curve]
        svgs = [
            plots.svg(f"band {x.name}", f"{x.name}: {said(x.run[-1])} in {x.place(-1)}", [plots.band(*drawing_of(x))])
            for x in (curves if drawn else ())
        ]
        legend = ["this run", f"{self.seeds} runs of {self.reference}, and the band of one more"]
        caption = f"Means over blocks of iterations; all bands together hold {1 - 2 * MISSED:.0%} of healthy runs"
        shown = [Plots(svgs, legend)] * bool(svgs)
        return [*map(Text, lines), *map(Text, self.notes), *shown, Table(*self.table(), caption)]


def drawing_of(x: Row) -> tuple:
    middles = np.array([(first + last) / 2 for first, last in x.blocks])
    return middles, x.run, x.seeds, x.low, x.high, x.name


def said(x: float) -> str:
    return f"{x:.3g}" if math.isfinite(x) else "no number"


# --- what is compared ---


def compare(run: str, reference: str) -> Found:
    """The run in `run` beside those in `reference`; what cannot be compared is left out, with a note. ValueError where that
    is all, where one holds no PPO run, or the other fewer than two.
    """
    (source, summary), theirs = run_of(run), [*runs_of(reference, "reference")]
    if len(theirs) < 2:
        raise ValueError(f"--reference={reference} holds one PPO run: a band needs the runs of two seeds or more")
    theirs, notes = alike(source, theirs, reference)
    ours, *seeds = (by_metric(x.files["metrics.jsonl"]) for x in (source, *(x for x, _ in theirs)))
    had, *has = ({step for x in found.values() for step in x} for found in (ours, *seeds))
    common, lengths = set.intersection(*has), sorted(map(len, has))
    rows, more = curves(ours, seeds, had & common)
    notes += more
    evaluated = [x for _, x in theirs if x]
    if summary and len(evaluated) > 1:
        found, more = numbers(summary, evaluated)
        rows, notes = rows + found, notes + more
    else:
        lacks = f"only {len(evaluated)} of {len(theirs)} runs of {reference} have a" if summary else f"{run} has no"
        notes.append(f"The evaluation is not compared: {lacks} summary.json.")
    if not rows:
        raise ValueError(f"--run={run} has nothing to compare with --reference={reference}: {notes[0]}")
    for x in rows:
        if len(x.seeds) < len(theirs):
            notes.append(
                f"The band of {x.name} is of {len(x.seeds)} of the {len(theirs)} seeds, the others do not say it."
            )
    if len(had) != len(common) or lengths[0] != lengths[-1]:
        compared = f": {len(had & common)} are compared" * (lengths[-1] != len(common))
        notes.append(f"This run has {len(had)} iterations, theirs {to(lengths[0], lengths[-1])}{compared}.")
    if differing := differences(source.files.get("run.json", {}), theirs[0][0].files.get("run.json", {})):
        notes.append(f"Other options than theirs: {', '.join(differing)}.")
    return Found(reference, len(theirs), rows, notes, len(had & common), len(common))


def alike(
    source: Source, theirs: list[tuple[Source, dict]], reference: str
) -> tuple[list[tuple[Source, dict]], list[str]]:
    """Those of them in this run's precision, where they are two or more, and a line that says so; else all.

    Half precision is noise in a ratio: its approxkl never falls below that, and a float32 run's does.
    """
    mine = source.files.get("run.json", {}).get("precision")
    same = [x for x in theirs if x[0].files.get("run.json", {}).get("precision") == mine]
    if mine is None or not 2 <= len(same) < len(theirs):
        return theirs, []
    return same, [
        f"Of the {len(theirs)} runs of {reference}, the {len(same)} in {mine}, which is this one's precision."
    ]


def curves(ours: dict, seeds: Sequence[dict], steps: set[int]) -> tuple[list[Row], list[str]]:
    """The rows of what the run and every seed have, and a line for what is left out of the iterations `steps` of all."""
    rows, notes = [], []
    known = [name for name in CURVES if all(name in seed for seed in seeds)]
    for name in CURVES:
        if name not in known:
            if any(name in seed for seed in seeds):
                notes.append(f"Not compared, not every reference run has {name}.")
        elif name not in ours:
            notes.append(f"Not compared, this run has no {name}.")
        elif found := curve(name, ours[name], [seed[name] for seed in seeds], len(known)):
            rows.append(found)
            met = len({*shared([seed[name] for seed in seeds])} & {*ours[name]})
            if met < len(steps):
                notes.append(
                    f"{name} is compared in {met} of {len(steps)} iterations: not all have a number in the others."
                )
        else:
            notes.append(
                f"Not compared, the run and the reference runs have no iteration in common with a number for {name}."
            )
    return rows, notes


def run_of(directory: str) -> tuple[Source, dict]:
    """The one PPO run of runs_of: that of `directory` itself, or the only one below it. ValueError where there are more."""
    found = [*runs_of(directory, "run")]
    found = [x for x in found if x[0].path == Path(directory)] or found
    if len(found) > 1:
        names = ", ".join(source.name for source, _ in found)
        raise ValueError(f"--run={directory} holds {len(found)} PPO runs ({names}): name one of them")
    return found[0]


def learned(source: Source) -> list[dict]:
    """Its metrics without the row of a policy that max_kl took back: it acted, and nothing was learned from that."""
    brake, rows = source.files.get("report.json", {}).get("brake"), source.files["metrics.jsonl"]
    last = brake.get("iteration") if isinstance(brake, dict) and brake.get("name") == "max_kl" else None
    return [row for row in rows if last is None or row.get("step") != last]


def runs_of(directory: str, option: str) -> Iterator[tuple[Source, dict]]:
    """The PPO runs below `directory` with metrics, each with the evaluation that lies with it or above it, {} without."""
    path = Path(directory)
    if option == "reference" and not path.is_dir():
        ours = ", ".join(f"results/{x.name}" for x in sorted(Path("results").glob("*/"))) or "none here"
        raise ValueError(f"--reference={directory} is not a directory; runs of ours: {ours}")
    sources = {source.path: source for source in find(path, option)}
    if damaged := [line for source in sources.values() for line in source.damaged]:
        raise ValueError(damaged[0])
    found = False
    for place, source in sources.items():
        if source.kind == "PPO" and any("objective/kl" in row for row in source.files.get("metrics.jsonl", [])):
            near = [sources[x] for x in (place, place.parent) if x in sources]
            summaries = [x.files["summary.json"] for x in near if "ppo" in x.files.get("summary.json", {})]
            source.files["metrics.jsonl"] = learned(source)
            yield source, summaries[0] if summaries else {}
            found = True
    if not found:
        raise ValueError(
            f"--{option}={directory} holds no PPO run with metrics.jsonl; name what was --out of train_ppo.py"
        )


def by_metric(rows: Sequence[dict]) -> dict[str, dict[int, float]]:
    """{metric: {iteration: value}} of what is compared; NaN for null, which a run writes for what is not finite."""
    found: dict[str, dict[int, float]] = {}
    for line in rows:
        for name in CURVES:
            if name in line and is_number(line.get("step")):
                found.setdefault(name, {})[int(line["step"])] = line[name] if is_number(line[name]) else math.nan
    return found


def numbers(ours: dict, theirs: Sequence[dict]) -> tuple[list[Row], list[str]]:
    """What both evaluations say of the last model, of the seeds that say it, and a line for what fewer than two of them do."""

    def value(summary: dict, name: str) -> float:
        found = summary["ppo"].get(name)
        x = found.get("mean") if isinstance(found, dict) else found
        return x if is_number(x) else math.nan

    said_by = {name: [x for x in theirs if math.isfinite(value(x, name))] for name in NUMBERS if name in ours["ppo"]}
    known, rows, notes = [name for name, seeds in said_by.items() if len(seeds) > 1], [], []
    for name in NUMBERS:
        if name in known:
            seeds = said_by[name]
            error = float(np.mean([standard_error(x, name) for x in seeds]))
            values = np.array([[value(x, name)] for x in (ours, *seeds)])
            rows.append(row(NUMBERS[name], [(-1, -1)], values[0], values[1:], len(known), error=error))
        elif name in said_by:
            notes.append(f"Not compared, fewer than two reference runs have a number for the {NUMBERS[name]}.")
        elif any(name in x["ppo"] for x in theirs):
            notes.append(f"Not compared, this run's evaluation has no {NUMBERS[name]}.")
    return rows, notes


def standard_error(summary: dict, name: str) -> float:
    """Of a number of the evaluation, from its 95% interval over prompts; 0 where it has none."""
    found, rows = summary["ppo"].get(name), [x for x in summary.get("rows", {}).values() if "kl_interval" in x]
    ends = (found.get("low"), found.get("high")) if isinstance(found, dict) else (0.0, 0.0)
    if name == "kl" and rows:
        ends = rows[-1]["kl_interval"]  # the last model's: best-of-n has none
    return (ends[1] - ends[0]) / (2 * 1.96) if all(map(is_number, ends)) else 0.0


UNLIKE = {*FREE, "init", "reward", "data", "judge", "seed", "overrides"}  # these differ, or say where things lie


def differences(ours: dict, theirs: dict) -> list[str]:
    """`--lr=0.03 (0.0003)` for every option that is not as in their runs; inputs by their sha256."""
    same = {"init_sha256": "another init", "data_sha256": "other data"}
    told = [text for name, text in same.items() if name in ours and name in theirs and ours[name] != theirs[name]]
    names = [x for x in ours if x in theirs and x not in UNLIKE and not x.endswith("_sha256") and ours[x] != theirs[x]]

    def shown(x) -> str:
        return config.show(tuple(x) if isinstance(x, list) else x)

    return [*told, *(f"--{name}={shown(ours[name])} ({shown(theirs[name])})" for name in names)]
