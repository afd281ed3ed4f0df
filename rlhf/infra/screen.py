"""What a run shows of its metrics and samples: a line an iteration in a file, a table that fits on a terminal."""

import shutil
import textwrap
from collections.abc import Sequence

from rlhf.infra.healthy import HEALTHY

# which way is good, in words
GOOD = {name: known.rule for name, known in HEALTHY.items() if known.rule} | {
    "loss/train": "falls",
    "loss/policy": "falls",
    "rewards/margin": "rises",
    "rewards/accuracy": "rises",
    "validation/loss": "falls",
    "validation/perplexity": "falls",
    "validation/bits_per_byte": "falls",
    "validation/margin": "rises",
    "validation/accuracy": "rises",
}
KNOWN_GROUPS = ("objective", "policy", "value", "response", "rewards")  # whose metrics need no surname in the table
NUMBER = 9  # characters of a number in the table, at least
REPEAT = 20  # rows under a header
SAMPLE_LINES = 4  # of a sample on a terminal, at most


def console_line(step: int, values: dict) -> str:
    """`step    12   scores  0.3121   kl   3.204`: fixed widths, so that the eye can run down a column."""
    parts = [f"{name.rpartition('/')[2]} {number(value):>10}" for name, value in values.items()]
    return "   ".join([f"step {step:>6}", *parts])


class Table:
    """The rows of a run on a terminal: as many columns as fit, a header that comes again, and once what is good."""

    def __init__(self):
        self.names: list[str] = []  # of all columns so far, those that do not fit too
        self.headed, self.rows = "", 0  # the header above, and the rows under it

    def lines(self, step: int, values: dict, width: int) -> list[str]:
        """What comes below the rows before: a row, perhaps under a new header. None is longer than `width`, while one column
        fits.
        """
        new = [name for name in values if name not in self.names]
        self.names += new
        columns, room = [], width - 6
        for name in self.names:
            cell = max(NUMBER, len(label(name))) + 2
            if cell > room and columns:
                break
            columns, room = [*columns, (name, cell)], room - cell
        header = "  step" + "".join(f"{label(name):>{cell}}" for name, cell in columns)
        row = f"{step:>6}" + "".join(
            f"{fitted(values[name]) if name in values else '':>{cell}}" for name, cell in columns
        )
        lines = words(new, width)
        if lines or header != self.headed or self.rows == REPEAT:
            lines, self.headed, self.rows = [*lines, header], header, 0
        self.rows += 1
        return [*lines, row]


def label(name: str) -> str:
    group, _, last = name.rpartition("/")
    return last if group in KNOWN_GROUPS else name


def words(names: Sequence[str], width: int) -> list[str]:
    """What is good of these metrics."""
    known = "; ".join(f"{label(name)} {GOOD[name]}" for name in names if name in GOOD)
    return textwrap.wrap(f"healthy: {known}", width) if known else []


def number(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"
    return str(value)


def fitted(value) -> str:
    """The number in at most NUMBER characters, where it is no longer than they can say."""
    text = number(value)
    return text if len(text) <= NUMBER else f"{value:.2e}"


def sample_table(rows: Sequence[dict], width: int | None = None) -> str:
    """Samples, numbers first, then prompt | response: a line each, cut at the terminal's width; or with a `width` whole, in
    several lines of it. Of a long prompt the end is shown.
    """
    cut, lines = width or shutil.get_terminal_size((120, 24)).columns, []
    for row in rows:
        numbers = [f"{name} {number(value):>8}" for name, value in row.items() if not isinstance(value, str | list)]
        texts = {name: printable(value) for name, value in row.items() if isinstance(value, str)}
        room = width or cut // 2
        if len(prompt := texts.get("prompt", "")) > room:
            texts["prompt"] = f"... {prompt[-room:]}"
        text = " | ".join(texts.values())
        if width is None:
            lines.append("  ".join(["   ", *numbers, text])[:cut])
            continue
        lines.append("  ".join(["   ", *numbers])[:cut])
        indent, shape = " " * 6, dict(max_lines=SAMPLE_LINES, placeholder=" ...")
        lines += textwrap.wrap(text, max(20, cut), initial_indent=indent, subsequent_indent=indent, **shape)
    return "\n".join(lines)


def printable(text: str) -> str:
    """One line without control characters: a sampled text must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
