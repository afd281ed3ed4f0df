"""Plots as inline SVG (matplotlib, the extra plot) whose colours are CSS variables, so that a page can be light or dark.

The same numbers give the same bytes: no date, ids from a salt, texts as texts and none of them read as mathematics.
"""

import html
import importlib.util
import io
import re
from collections.abc import Callable, Sequence

import numpy as np

# what matplotlib is told -> what the page decides
COLOURS = {"#010101": "ink", "#010102": "line", "#010103": "healthy"}
COLOURS |= {f"#0101{i:02x}": f"series-{i - 15}" for i in range(16, 22)}
INK, LINE, HEALTHY, *SERIES = COLOURS
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "none",
}
PALETTE = """
:root { --bg: #fff; --ink: #1b1e23; --line: #c4cad3; --healthy: #18774a; --series-1: #0b57c2; --series-2: #b04a0c;
  --series-3: #18774a; --series-4: #7b3fb5; --series-5: #b3246b; --series-6: #59616d; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --ink: #e9ecf0; --line: #3f4854; --healthy: #6fd39a;
  --series-1: #8ab8ff; --series-2: #ffab73; --series-3: #6fd39a; --series-4: #c9a2ff; --series-5: #ff9ac8;
  --series-6: #a9b2bd; } }
"""


def check_installed() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the report draws with matplotlib, which is not installed: pip install -e '.[plot]'")


def svg(name: str, alt: str, panels: Sequence[Callable], size: tuple[float, float] = (3.6, 2.2)) -> str:
    """One figure, its panels side by side, each drawn by panel(axes); `name`: its own on the page; `alt`: what it shows."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        for ax, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
            panel(ax)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # every figure numbers its parts from 1
    text = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", text, count=2)  # as wide as the page lets it
    for colour, variable in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)


def lines(series: Sequence[tuple], title: str, xlabel: str = "") -> Callable:
    """A panel: (x, y) for every series, in the page's order of colours."""

    def panel(ax) -> None:
        for (x, y), colour in zip(series, SERIES * (1 + len(series) // len(SERIES))):
            ax.plot(x, y, color=colour, marker="o" if len(x) == 1 else None)
        ax.set_title(title, loc="left")
        ax.set_xlabel(xlabel)
        whole_ticks(ax, [v for x, _ in series for v in x])

    return panel


def healthy(series: Sequence[tuple], inside: tuple[float, float] | None, title: str, xlabel: str = "") -> Callable:
    """The panel of `lines` in front of the band in which a healthy run stays; None: there is none. An end that is further
    away than the curve is high is left out of sight.
    """

    def panel(ax) -> None:
        lines(series, title, xlabel)(ax)
        values = np.concatenate([np.asarray(y, float) for _, y in series])
        low, high = float(values.min()), float(values.max())
        room = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-12)
        ends = [end for end in inside or () if low - room <= end <= high + room]
        ax.set_ylim(min(low, *ends, high) - 0.06 * room, max(high, *ends, low) + 0.06 * room)
        if inside:
            seen = np.clip(inside, *ax.get_ylim())
            ax.axhspan(*seen, color=HEALTHY, alpha=0.12, linewidth=0, zorder=0.5)
            for end in ends:
                ax.axhline(end, color=HEALTHY, linewidth=0.8, linestyle=(0, (4, 3)))

    return panel


def band(x: np.ndarray, run: np.ndarray, seeds: np.ndarray, low: np.ndarray, high: np.ndarray, title: str) -> Callable:
    """A panel: the run (B,) on top of the seeds (S, B), and the band (B,) that one more of them would stay in."""

    def panel(ax) -> None:
        ax.fill_between(x, low, high, color=SERIES[1], alpha=0.15, linewidth=0)
        ax.plot(x, seeds.T, color=SERIES[1], linewidth=0.8)
        ax.plot(x, run, color=SERIES[0], marker="o", markersize=3)
        ax.set_title(title, loc="left")
        ax.set_xlabel("iteration")
        inside = np.concatenate([low, high, seeds.ravel()])  # what is far out ends at the edge
        room = inside.max() - inside.min()
        seen = np.clip(run[np.isfinite(run)], inside.min() - room, inside.max() + room)
        bottom, top = (f(inside.min(), inside.max(), *seen) for f in (min, max))
        if bottom < top:  # else all are one number, as the KL of a first iteration is
            ax.set_ylim(bottom, top)

    return panel


def whole_ticks(ax, x: Sequence[float]) -> None:
    """Iterations and rounds have no halves."""
    if all(float(v).is_integer() for v in x):
        ax.xaxis.get_major_locator().set_params(integer=True)


def points(
    groups: dict[str, Sequence[tuple]], title: str, xlabel: str, ylabel: str, curves: dict | None = None
) -> Callable:
    """A panel: groups of (x, value, low, high, label) with their intervals, and curves {group: (x, y)} in their colours."""

    def panel(ax) -> None:
        sides = (("right", -6), ("left", 6)) * 3  # labels of neighbouring groups do not cover each other
        for (name, rows), colour, (side, place) in zip(groups.items(), SERIES, sides):
            x, y, low, high = (np.array([row[i] for row in rows], float) for i in range(4))
            errors = np.nan_to_num(np.stack([y - low, high - y]).clip(min=0))
            ax.errorbar(x, y, errors, fmt="o", color=colour, capsize=2, elinewidth=1, label=name)
            for row in rows:
                if row[4]:
                    ax.annotate(row[4], row[:2], (place, 4), textcoords="offset points", fontsize=8, ha=side)
            if curves and name in curves:
                ax.plot(*curves[name], color=colour, linewidth=1)
        ax.set_title(title, loc="left")
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.margins(x=0.12, y=0.1)
        whole_ticks(ax, [row[0] for row in next(iter(groups.values()))])
        if len(groups) > 1:
            ax.legend(fontsize=8)

    return panel


def diagonal(panel: Callable, low: float, high: float) -> Callable:
    """The panel with the line on which both axes agree."""

    def both(ax) -> None:
        ax.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle=":")
        panel(ax)

    return both
