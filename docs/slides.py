"""The talk as one HTML file that fetches nothing: docs/slides.template.html with what one run of `make demo` found.

python docs/slides.py                                 # out/demo -> out/slides.html
python docs/slides.py --run=out/chat --prompt=3

Sentences and curves about the demo come from the run's files, so that they are those of one measured run; the other figures
stand in the template, each with the command that gives it. Needs the extra plot.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation import plots, report  # noqa: E402
from evaluation.page import escape  # noqa: E402
from evaluation.picture import new_words  # noqa: E402
from evaluation.sources import Source, find, series  # noqa: E402
from evaluation.verdict import verdict  # noqa: E402
from rlhf.infra import config  # noqa: E402
from rlhf.infra.files import write_text  # noqa: E402
from rlhf.infra.healthy import HEALTHY, LARGE, band  # noqa: E402

TEMPLATE = ROOT / "docs/slides.template.html"


@dataclass(frozen=True)
class Config:
    run: str = "out/demo"  # directory of make demo: a PPO run and its evaluation
    prompt: int = 1  # held-out prompt whose answers are quoted, from 1
    out: str = "out/slides.html"  # the file

    def __post_init__(self):
        config.at_least(self, prompt=1)


def main() -> None:
    cfg = config.parse(Config)
    plots.check_installed()
    page = slides(find(Path(cfg.run)), cfg.run, cfg.prompt)
    write_text(cfg.out, page)
    print(f"{page.count('<section')} slides -> {cfg.out}")


def slides(sources: Sequence[Source], run: str, prompt: int = 1) -> str:
    """ValueError for a run that lacks what a slide shows."""
    trained = next((x for x in sources if x.kind == "PPO" and x.files.get("metrics.jsonl")), None)
    judged = next((x for x in sources if {"summary.json", "samples.jsonl"} <= x.files.keys()), None)
    if not (trained and judged) or prompt > len(judged.files["samples.jsonl"]):
        what = "PPO run" if not trained else "evaluation" if not judged else f"held-out prompt {prompt}"
        raise ValueError(f"--run={run} has no {what}; the slides are those of a run of make demo")
    made: dict[str, Callable[[], str]] = {
        "palette": lambda: plots.PALETTE,
        "verdict": lambda: verdict([judged]).html(),
        "curves": lambda: curves(trained),
        "words": lambda: words(judged.files["samples.jsonl"][prompt - 1]),
        "frontier": lambda: frontier(judged.files["summary.json"]["rows"]),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda m: made[m[1]](), TEMPLATE.read_text(encoding="utf-8"))


def curves(run: Source) -> str:
    """The four of the report beside each other."""
    found = series(run.files["metrics.jsonl"], HEALTHY.__contains__)
    names = [name for row in LARGE if (name := next((x for x in row if x in found), None))]
    panels = [plots.healthy([found[x]], band(x, found[x][1]), HEALTHY[x].words, "PPO iteration") for x in names]
    alt = "; ".join(f"{HEALTHY[x].words} from {found[x][1][0]:.2f} to {found[x][1][-1]:.2f}" for x in names)
    return plots.svg("slide curves", alt, panels, (12.5, 3.2))


def frontier(rows: dict) -> str:
    measures = [what for what in ("judge", "reward") if any(what in row for row in rows.values())]
    panels, said = zip(*(report.frontier_panel(rows, what, what) for what in measures))
    return plots.svg("slide frontier", "; ".join(said), panels, (10, 3.2))


def words(row: dict) -> str:
    before, after = (" ".join(str(row[when]).split()) for when in ("before", "after"))
    new = new_words(before, after)
    marked = " ".join(f"<b>{escape(x)}</b>" if i in new else escape(x) for i, x in enumerate(after.split()))
    return f"<blockquote><p>{escape(before)}</p></blockquote>\n<blockquote><p>{marked}</p></blockquote>"


if __name__ == "__main__":
    config.run(main)
