"""docs/slides.html from docs/slides.template.html: plots from run directories, so that they are those of the measured runs.

    python docs/slides.py     # needs out/demo (make demo), and out/study and out/smol_rm_all as LOG.md makes them

The numbers in the text are written by hand; each slide names the command that gives them. A run directory that is not there
is an error: a slide without its plot would say less than it promises.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation import plots, report, sources  # noqa: E402
from rlhf.infra.files import read_json, write_text  # noqa: E402


def read(file: str) -> dict:
    path = ROOT / "out" / file
    if not path.exists():
        raise SystemExit(f"no {path}: make it with the commands of LOG.md")
    return read_json(path)


def training() -> str:
    read("demo/ppo/run.json")
    (source,) = sources.find(ROOT / "out/demo/ppo")
    names = {
        "objective/scores": "mean score",
        "objective/kl": "KL to the base, nats",
        "objective/entropy": "entropy, nats",
    }
    found = sources.series(source.files["metrics.jsonl"], lambda name: name in names)
    alt = "; ".join(f"{names[name]} from {y[0]:.2f} to {y[-1]:.2f}" for name, (_, y) in found.items())
    panels = [plots.lines([found[name]], text, "PPO iteration") for name, text in names.items()]
    return plots.svg("slide training", alt, panels, (10, 3))


def frontier() -> str:
    rows = read("demo/summary.json")["rows"]
    panels, said = zip(
        *(report.frontier_panel(rows, key, text) for key, text in (("judge", "judge"), ("reward", "reward")))
    )
    return plots.svg("slide frontier", "; ".join(said), panels, (10, 3.2))


def reliability() -> str:
    return report.reliability("slide", read("smol_rm_all/card.json")["calibration"])


def overoptimisation() -> str:
    """PPO's checkpoints, by the other half of the raters and by VADER's rules."""
    panels, said = [], []
    for place, title in (("gold", "gold: the other half of the raters"), ("vader", "gold: VADER's rules")):
        rows = [x for x in read(f"study/{place}/overoptimisation.json")["rows"] if x["curve"] != "best_of_n"]
        keys = ("proxy", "gold") if place == "gold" else ("gold",)
        groups = {key: [(x["kl"]["value"], *report.ends(x[key]), "") for x in rows] for key in keys}
        said += [f"{title}: " + ", ".join(f"{x['gold']['value']:.2f} at {x['kl']['value']:.0f} nats" for x in rows)]
        panels.append(plots.points(groups, title, "KL to the base, nats", "reward"))
    return plots.svg("slide overoptimisation", "; ".join(said), panels, (10, 3.4))


PLOTS: dict[str, Callable[[], str]] = {f.__name__: f for f in (training, frontier, reliability, overoptimisation)}


def main() -> None:
    template = (ROOT / "docs/slides.template.html").read_text(encoding="utf-8")
    parts = {"palette": plots.PALETTE, **{name: make() for name, make in PLOTS.items()}}
    page = re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], template)
    write_text(ROOT / "docs/slides.html", page)
    print(f"{page.count('<section')} slides -> docs/slides.html")


if __name__ == "__main__":
    main()
