"""A report as a list of sections, written twice: one HTML page that fetches nothing and runs nothing, and Markdown.

Every text is escaped here and nowhere else: what a model wrote may be markup.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evaluation.plots import PALETTE
from rlhf.infra.files import write_text
from rlhf.infra.metrics import printable

TEMPLATE = Path(__file__).with_name("page.html")


def plain(text) -> str:
    """One line without control characters and without halves of characters, which no file could hold."""
    return printable(str(text).replace("\n", "↵"))


def escape(text) -> str:
    return html.escape(plain(text))


def escape_markdown(text) -> str:
    return re.sub(r"([\\`*|]|(?<!\w)_|_(?!\w)|(?<=\])\()", r"\\\1", html.escape(plain(text), quote=False))


@dataclass(frozen=True)
class Text:
    text: str
    kind: Literal["p", "h3", "command", "note"] = "p"  # note: something is missing

    def html(self) -> str:
        before, after = {
            "p": ("<p>", "</p>"),
            "h3": ("<h3>", "</h3>"),
            "command": ('<p class="command"><code>', "</code></p>"),
            "note": ('<p class="note">', "</p>"),
        }[self.kind]
        if self.kind == "command":  # lines break between the options, not at their dashes
            return before + " ".join(f"<span>{escape(word)}</span>" for word in self.text.split(" ")) + after
        return before + escape(self.text) + after

    def markdown(self) -> str:
        if self.kind == "command":
            return "    " + plain(self.text)  # four spaces: as it is
        return "### " * (self.kind == "h3") + escape_markdown(self.text)


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: str = ""  # the line behind which the page hides it
    texts: bool = False  # cells are sentences: they wrap, and stand to the left

    def html(self) -> str:
        head = "".join(f'<th scope="col">{escape(x)}</th>' for x in self.head)
        rows = [
            f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(x)}</td>" for x in row[1:]) + "</tr>"
            for row in self.rows
        ]
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        label = escape(self.caption or self.folded or f"Table: {', '.join(filter(None, self.head))}")
        table = (
            f'<div class="scroll" tabindex="0" role="group" aria-label="{label}"><table{" class=texts" * self.texts}>'
            f"{caption}<thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
        )
        return f"<details><summary>{escape(self.folded)}</summary>{table}</details>" if self.folded else table

    def markdown(self) -> str:
        rows = [self.head, ["---"] * len(self.head), *self.rows]
        lines = ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in rows]
        title = self.caption or self.folded
        return "\n".join([escape_markdown(title), ""] * bool(title) + lines)


@dataclass(frozen=True)
class Plots:
    """Figures that stand beside each other where there is room."""

    svgs: Sequence[str]  # made by evaluation.plots, which escapes
    series: Sequence[str] = ()  # names of the colours
    wide: bool = False
    folded: str = ""

    def html(self) -> str:
        names = "".join(
            f'<li><span class="chip chip-{i % 6 + 1}"></span>{escape(x)}</li>' for i, x in enumerate(self.series)
        )
        legend = f'<ul class="legend">{names}</ul>' if len(self.series) > 1 else ""
        figures = "\n".join(f"<figure>{svg}</figure>" for svg in self.svgs)
        plots = f'{legend}<div class="plots{" wide" * self.wide}">{figures}</div>'
        return f"<details><summary>{escape(self.folded)}</summary>{plots}</details>" if self.folded else plots

    def markdown(self) -> str:
        return ""  # the numbers stand in the tables beside them


@dataclass(frozen=True)
class Shade:
    """What the tokens can be coloured by."""

    name: str
    text: str
    scale: float  # |value| of the full colour


@dataclass(frozen=True)
class Sample:
    prompt: str
    tokens: Sequence[str]
    head: str  # score, KL
    values: dict[str, Sequence[float | None]]  # by Shade.name, one for every token


@dataclass(frozen=True)
class Microscope:
    """Sample responses, token by token; the reader chooses the colour, by CSS alone."""

    samples: Sequence[Sample]
    shades: Sequence[Shade]

    def html(self) -> str:
        chosen = " checked"
        choices, rules = [], []
        for shade in self.shades:
            scale = f"full colour at {shade.scale:.2g}"
            choices.append(
                f'<label><input type="radio" name="shade" id="shade-{shade.name}"{chosen}> {escape(shade.text)} '
                f"<small>({scale})</small></label>"
            )
            rules.append(f"#samples:has(#shade-{shade.name}:checked) .t {{ background: var(--{shade.name}); }}")
            chosen = ""
        fields = f"<fieldset><legend>Colour of the tokens</legend>{''.join(choices)}</fieldset>" if choices else ""
        return f"<style>{' '.join(rules)}</style>{fields}" + "\n".join(self.one(sample) for sample in self.samples)

    def one(self, sample: Sample) -> str:
        spans = []
        for i, token in enumerate(sample.tokens):
            colours = "; ".join(f"--{s.name}: {colour(sample.values[s.name][i], s.scale)}" for s in self.shades)
            title = ", ".join(f"{s.text} {number(sample.values[s.name][i])}" for s in self.shades)
            spans.append(f'<span class="t" style="{colours}" title="{escape(title)}">{escape(token or "∅")}</span>')
        rows = [
            [token or "∅", *(number(sample.values[s.name][i]) for s in self.shades)]
            for i, token in enumerate(sample.tokens)
        ]
        numbers = (
            Table(["token", *(s.text for s in self.shades)], rows, folded="The numbers").html() if self.shades else ""
        )
        text = f'<p class="tokens"><b>{escape(sample.prompt)}</b>{"".join(spans)}</p>'
        return f'<article><p class="head">{escape(sample.head)}</p>{text}{numbers}</article>'

    def markdown(self) -> str:
        lines = (f"{sample.head}: {sample.prompt}{''.join(sample.tokens)}" for sample in self.samples)
        return "\n".join(f"- {escape_markdown(line)}" for line in lines)


Block = Text | Table | Plots | Microscope


def colour(x: float | None, scale: float) -> str:
    """Warm above 0, cold below; the page's own ground shines through."""
    part = 0 if x is None else min(1.0, abs(x) / scale) * 0.55
    return f"rgb({'224 102 47' if (x or 0) > 0 else '47 127 224'} / {part:.2f})"


def number(x: float | None) -> str:
    return "-" if x is None else f"{x:+.3f}"


def write(title: str, sections: dict[str, Sequence[Block]], file: Path) -> Path:
    """The page to `file`, its Markdown beside it (.md); returns the latter."""
    ids = {name: re.sub(r"\W+", "-", name.lower()).strip("-") for name in sections}
    parts = {
        "title": escape(title),
        "palette": PALETTE,
        "contents": "".join(f'<li><a href="#{ids[name]}">{escape(name)}</a></li>' for name in sections),
        "body": "\n".join(
            f'<section id="{ids[name]}"><h2>{escape(name)}</h2>\n'
            + "\n".join(b.html() for b in blocks)
            + "\n</section>"
            for name, blocks in sections.items()
        ),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], TEMPLATE.read_text(encoding="utf-8"))
    write_text(file, page)
    text = [f"# {escape_markdown(title)}"]
    for name, blocks in sections.items():
        text += [f"## {escape_markdown(name)}", *filter(None, (b.markdown() for b in blocks))]
    beside = file.with_suffix(".md")
    write_text(beside, "\n\n".join(text) + "\n")
    return beside
