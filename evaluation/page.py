"""A report as a list of sections, written twice: one HTML page that fetches nothing and runs nothing, and Markdown.

Every text is escaped here and nowhere else: what a model wrote may be markup.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from evaluation.plots import PALETTE
from rlhf.infra.files import write_text
from rlhf.infra.screen import printable

TEMPLATE = Path(__file__).with_name("page.html")
TOKENS = Path(__file__).parent.parent / "rlhf/serve/page/tokens.css"  # the server's page has the same colours


class Block(Protocol):
    """A part of a page, which says itself in both forms."""

    def html(self) -> str: ...

    def markdown(self) -> str: ...


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
    kind: Literal["p", "h3", "command", "note", "small"] = "p"  # note: something is missing

    def html(self) -> str:
        before, after = {
            "p": ("<p>", "</p>"),
            "h3": ("<h3>", "</h3>"),
            "command": ('<p class="command"><code>', "</code></p>"),
            "note": ('<p class="note">', "</p>"),
            "small": ('<p class="head">', "</p>"),
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
        legend = f'<ul class="legend">{chips(self.series)}</ul>' if len(self.series) > 1 else ""
        figures = "\n".join(f"<figure>{svg}</figure>" for svg in self.svgs)
        plots = f'{legend}<div class="plots{" wide" * self.wide}">{figures}</div>'
        return f"<details><summary>{escape(self.folded)}</summary>{plots}</details>" if self.folded else plots

    def markdown(self) -> str:
        return ""  # the numbers stand in the tables beside them


@dataclass(frozen=True)
class Curve:
    """One large curve, its title as text of the page."""

    svg: str
    words: str
    name: str  # of the metric
    last: str  # its newest value
    unit: str
    rule: str  # where a healthy run keeps it
    note: str = ""  # what it means that this one does not


@dataclass(frozen=True)
class Curves:
    curves: Sequence[Curve]
    series: Sequence[str] = ()  # names of the colours

    def html(self) -> str:
        figures = "".join(map(self.one, self.curves))
        band = '<li><span class="chip chip-healthy"></span>where a healthy run stays</li>'
        return f'<ul class="legend">{chips(self.series)}{band}</ul><div class="plots large">{figures}</div>'

    @staticmethod
    def one(x: Curve) -> str:
        state = f'<span class="look">look: {escape(x.note)}</span>' if x.note else ""
        about = f"<b>{escape(x.words)}</b> <b>{escape(x.last)}</b> <span>{escape(x.unit)}</span> "
        about += f"<code>{escape(x.name)}</code><span>healthy: {escape(x.rule)}</span>{state}"
        return f"<figure><figcaption>{about}</figcaption>{x.svg}</figure>"

    def markdown(self) -> str:
        lines = [
            f"- {x.words} ({x.name}) {x.last}, healthy: {x.rule}" + f". Look: {x.note}" * bool(x.note)
            for x in self.curves
        ]
        return "\n".join(map(escape_markdown, lines))


@dataclass(frozen=True)
class Shade:
    """What tokens can be coloured by. The scale is fixed: a colour says the same in every sample, run and report."""

    name: str
    text: str
    scale: float  # |value| of the full colour
    below: str = ""  # what the cold end means
    above: str = ""  # and the warm one

    def legend(self) -> str:
        low, high = (f"{x:+.2g} {words}".strip() for x, words in ((-self.scale, self.below), (self.scale, self.above)))
        ends = f"<span>{escape(low)}</span><i></i><span>{escape(high)}</span>"
        return f'<p class="scale" data-shade="{self.name}"><b>{escape(self.text)}</b> {ends}</p>'


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
            choices.append(
                f'<label><input type="radio" name="shade" id="shade-{shade.name}"{chosen}> {escape(shade.text)}</label>'
            )
            here = f".microscope:has(#shade-{shade.name}:checked)"
            rules.append(f"{here} .t {{ background: var(--{shade.name}); }}")
            rules.append(f'{here} .scale[data-shade="{shade.name}"] {{ display: flex; }}')
            chosen = ""
        legends = "".join(shade.legend() for shade in self.shades)
        fields = f"<fieldset><legend>Colour of the tokens</legend>{''.join(choices)}</fieldset>" if choices else ""
        samples = "\n".join(self.one(sample) for sample in self.samples)
        return f'<style>{" ".join(rules)}</style><div class="microscope">{fields}{legends}{samples}</div>'

    def one(self, sample: Sample) -> str:
        rows = [
            [token or "∅", *(number(sample.values[s.name][i]) for s in self.shades)]
            for i, token in enumerate(sample.tokens)
        ]
        numbers = (
            Table(["token", *(s.text for s in self.shades)], rows, folded="The numbers").html() if self.shades else ""
        )
        spans = tokens(sample.tokens, sample.values, self.shades)
        text = f'<p class="tokens"><b>{escape(sample.prompt)}</b>{spans}</p>'
        return f'<article><p class="head">{escape(sample.head)}</p>{text}{numbers}</article>'

    def markdown(self) -> str:
        lines = (f"{sample.head}: {sample.prompt}{''.join(sample.tokens)}" for sample in self.samples)
        return "\n".join(f"- {escape_markdown(line)}" for line in lines)


@dataclass(frozen=True)
class Beside:
    """What several models say to the same prompts, in columns; tokens are coloured where their numbers are known."""

    names: Sequence[str]
    rows: Sequence[Sequence[Sample]]  # a sample for every name; its values may be empty
    shade: Shade
    more: int = 0  # how many rows the page shows before it folds the rest; 0 = all

    def html(self) -> str:
        known = any(sample.values for row in self.rows for sample in row)
        shown = self.more or len(self.rows)
        rest = "".join(map(self.one, self.rows[shown:]))
        folded = f"<details><summary>{len(self.rows) - shown} more prompts</summary>{rest}</details>" if rest else ""
        legend = self.shade.legend() if known else ""
        return f'<div class="beside">{legend}{"".join(map(self.one, self.rows[:shown]))}{folded}</div>'

    def one(self, row: Sequence[Sample]) -> str:
        columns = "".join(self.column(name, sample) for name, sample in zip(self.names, row))
        prompt = f'<p class="prompt">{escape(row[0].prompt)}</p>' if row[0].prompt else ""
        return f'<article class="pair">{prompt}<div class="columns">{columns}</div></article>'

    def column(self, name: str, sample: Sample) -> str:
        shades = [self.shade] if sample.values else []
        head = f"<b>{escape(name)}</b> <span>{escape(sample.head)}</span>"
        return (
            f'<div><p class="head">{head}</p><p class="tokens">{tokens(sample.tokens, sample.values, shades)}</p></div>'
        )

    def markdown(self) -> str:
        lines = []
        for number, row in enumerate(self.rows, 1):
            lines.append(f"{number}. {escape_markdown(row[0].prompt)}".rstrip())
            for name, sample in zip(self.names, row):
                lines.append(
                    f"   - {escape_markdown(f'{name} {sample.head}'.strip())}: {escape_markdown(''.join(sample.tokens))}"
                )
        return "\n".join(lines)


class Section(NamedTuple):
    blocks: Sequence[Block]
    folded: bool = False  # behind its title


STEPS = 10  # of a colour, to each side


def tokens(texts: Sequence[str], values: dict[str, Sequence[float | None]], shades: Sequence[Shade]) -> str:
    """Spans; a colour is one of the page's variables --w1 to --w10 and --c1 to --c10."""
    spans = []
    for i, token in enumerate(texts):
        style = "; ".join(f"--{s.name}: {colour(values[s.name][i], s.scale)}" for s in shades)
        title = ", ".join(f"{s.text} {number(values[s.name][i])}" for s in shades)
        about = f' style="{style}" title="{escape(title)}"' if shades else ""
        spans.append(f'<span class="t"{about}>{escape(token or "∅")}</span>')
    return "".join(spans)


def colour(x: float | None, scale: float) -> str:
    """Warm above 0, cold below, in STEPS steps that end at `scale`."""
    step = 0 if x is None else round(min(1.0, abs(x) / scale) * STEPS)
    return f"var(--{'w' if x > 0 else 'c'}{step})" if step else "none"


def steps_of_colour() -> str:
    """The variables that `colour` names; the page's own ground shines through."""
    return (
        ":root { "
        + " ".join(
            f"--{letter}{i}: color-mix(in srgb, var(--{name}) {60 * i / STEPS:g}%, transparent);"
            for letter, name in (("c", "cold"), ("w", "warm"))
            for i in range(1, STEPS + 1)
        )
        + " }"
    )


def chips(series: Sequence[str]) -> str:
    if len(series) < 2:
        return ""
    return "".join(f'<li><span class="chip chip-{i % 6 + 1}"></span>{escape(x)}</li>' for i, x in enumerate(series))


def number(x: float | None) -> str:
    return "-" if x is None else f"{x:+.3f}"


def write(title: str, sections: dict[str, Section], file: Path, first: Sequence[Block] = ()) -> Path:
    """The page to `file`, its Markdown beside it (.md); returns the latter. first: what stands above all sections."""
    ids = {name: re.sub(r"\W+", "-", name.lower()).strip("-") for name in sections}
    parts = {
        "title": escape(title),
        "palette": PALETTE + TOKENS.read_text(encoding="utf-8") + steps_of_colour(),
        "contents": contents(ids) if len(ids) > 1 else "",
        "first": "\n".join(block.html() for block in first),
        "body": "\n".join(section_html(ids[name], name, section) for name, section in sections.items()),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], TEMPLATE.read_text(encoding="utf-8"))
    write_text(file, page)
    text = [f"# {escape_markdown(title)}", *filter(None, (block.markdown() for block in first))]
    for name, section in sections.items():
        text += [f"## {escape_markdown(name)}", *filter(None, (block.markdown() for block in section.blocks))]
    beside = file.with_suffix(".md")
    write_text(beside, "\n\n".join(text) + "\n")
    return beside


def contents(ids: dict[str, str]) -> str:
    links = "".join(f'<li><a href="#{id}">{escape(name)}</a></li>' for name, id in ids.items())
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


def section_html(id: str, name: str, section: Section) -> str:
    body, head = "\n".join(block.html() for block in section.blocks), f"<h2>{escape(name)}</h2>"
    if section.folded:
        return f'<section id="{id}" class="folded"><details><summary>{head}</summary>\n{body}\n</details></section>'
    return f'<section id="{id}">{head}\n{body}</section>'
