"""The picture of README: what the model said before and after, beside the curves of the run between the two, as one SVG.

It is written by hand, line by line, and has a ground of its own: a few kilobytes that are readable on light and dark pages.
"""

import textwrap
from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np

from evaluation.page import escape
from evaluation.plots import PALETTE
from evaluation.sources import Source, series
from evaluation.words import brief, estimate_of
from rlhf.infra.healthy import HEALTHY, band

WIDTH, LEFT, RIGHT = 880, 500, 528  # of the picture; where its words end, and where its curves begin
LINE, LETTERS = 24, 48  # pixels between two lines of a quotation, and letters in one
STYLE = f"""{PALETTE} text {{ font: 15px system-ui, sans-serif; fill: var(--ink); }}
.soft {{ fill: var(--series-6); font-size: 13px; }} .big {{ font-size: 21px; font-weight: 700; }} .new {{ font-weight: 700; }}
.quote {{ font-size: 16.5px; }} .title {{ font-weight: 600; font-size: 14px; }}
.curve {{ fill: none; stroke: var(--series-1); stroke-width: 2.2; stroke-linejoin: round; }}
.band {{ fill: var(--healthy); fill-opacity: .13; }} .axis {{ stroke: var(--line); }}
.card {{ fill: var(--ink); fill-opacity: .05; }} .after {{ fill: var(--series-1); fill-opacity: .11; }}"""


def picture(sources: Sequence[Source], run: str, prompt: int = 1) -> str:
    """Of the first PPO run and the first evaluation with samples; prompt: whose answers it quotes, from 1."""
    trained = next((x for x in sources if x.kind == "PPO" and x.files.get("metrics.jsonl")), None)
    judged = next(
        (x for x in sources if "rows" in x.files.get("summary.json", {}) and "samples.jsonl" in x.files), None
    )
    if not (trained and judged):
        what = "metrics.jsonl of train_ppo.py" if not trained else "summary.json and samples.jsonl of evaluate.py"
        raise ValueError(f"--picture shows a PPO run and its evaluation: {run} has no {what}")
    summary, texts = judged.files["summary.json"], judged.files["samples.jsonl"]
    if prompt > len(texts):
        raise ValueError(f"--picture_prompt={prompt}: {run} has answers to {len(texts)} prompts")
    found = series(trained.files["metrics.jsonl"], lambda name: name in ("objective/scores", "objective/kl"))
    try:
        before, after = (" ".join(texts[prompt - 1][when].split()) for when in ("before", "after"))
        outcome, score, kl = outcomes(summary), found["objective/scores"], found["objective/kl"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--picture: unexpected content in {trained.name} or {judged.name} of {run}: {error}"
        ) from None
    done = trained.files.get("report.json", {}).get("iterations", len(score[0]))  # not those that max_kl took back
    return drawing(before, after, done, outcome, score, kl)


def outcomes(summary: dict) -> list[tuple[str, str]]:
    """(number, words) of the evaluation, at most three."""
    ppo = summary["ppo"]
    what = "judge" if "judge_gain" in ppo else "reward"
    gain = estimate_of(ppo[f"{what}_gain"])
    change = f"{brief(ppo[f'{what}_before'])} → {brief(ppo[f'{what}_after'])}"
    who = "says a judge that training never saw" if what == "judge" else "says the reward"
    return [
        (f"{ppo[f'win_rate_{what}']['mean']:.0%}", f"of {summary['prompts']} answers are better, {who}"),
        (change, f"its mean mark: {brief(gain.value, '+')} [{brief(gain.low)}, {brief(gain.high)}]"),
    ]


def drawing(before: str, after: str, done: int, outcome: Sequence[tuple[str, str]], score: tuple, kl: tuple) -> str:
    parts, y = [], 34
    for title, text, kind, new in (
        ("Before", before, "card", set()),
        (f"After {done} iterations of PPO", after, "card after", new_words(before, after)),
    ):
        lines = wrapped(text, new)
        height = LINE * len(lines) + 50
        parts.append(f'<rect class="{kind}" x="24" y="{y - 10}" width="{LEFT - 24}" height="{height}" rx="12"/>')
        parts.append(f'<text class="soft" x="44" y="{y + 15}">{escape(title)}</text>')
        parts += [f'<text class="quote" x="44" y="{y + 41 + LINE * i}">{line}</text>' for i, line in enumerate(lines)]
        y += height + 14
    for number, words in outcome:
        parts.append(f'<text class="big" x="44" y="{y + 20}">{escape(number)}</text>')
        parts.append(f'<text class="soft" x="44" y="{y + 40}">{escape(words)}</text>')
        y += 58
    height = max(y + 8, 400)
    each = (height - 20) / 2
    about = [("objective/scores", "Reward of its answers", score)]
    about += [("objective/kl", "Distance from the base, nats", kl)]
    for i, (name, title, (steps, values)) in enumerate(about):
        parts += chart(name, title, steps, values, 24 + i * each, each - 20)
    said = f"Before: {before} After: {after} {'; '.join(f'{a} {b}' for a, b in outcome)}. "
    said += f"Score from {score[1][0]:.2f} to {score[1][-1]:.2f}, KL from {kl[1][0]:.1f} to {kl[1][-1]:.1f} nats."
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(said)}">'
    ground = f'<rect width="{WIDTH}" height="{height:g}" rx="14" style="fill: var(--bg)"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", ground, *parts, "</svg>"]) + "\n"


def chart(name: str, title: str, steps: np.ndarray, values: np.ndarray, top: float, height: float) -> list[str]:
    """A curve in front of its band, with the first and the last value written at its ends."""
    inside = band(name, values)
    low, high = min(values.min(), 0.0), max([values.max(), *(x for x in inside or () if x <= 2 * values.max())])
    left, right, bottom, up = RIGHT, WIDTH - 76, top + height - 18, top + 34

    def x(step: float) -> float:
        return left + (right - left) * (step - steps[0]) / max(1e-9, steps[-1] - steps[0])

    def y(value: float) -> float:
        return bottom - (bottom - up) * (value - low) / max(1e-9, high - low)

    parts = [f'<text class="title" x="{left}" y="{top + 18:.0f}">{escape(title)}</text>']
    if inside:
        first, last = (y(float(np.clip(end, low, high))) for end in inside)
        parts.append(
            f'<rect class="band" x="{left}" y="{last:.1f}" width="{right - left}" height="{first - last:.1f}"/>'
        )
        words = HEALTHY[name].rule.rpartition(", ")[2]
        parts.append(f'<text class="soft" x="{left + 8}" y="{last + 18:.1f}">healthy: {escape(words)}</text>')
    points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(steps, values))
    parts.append(f'<line class="axis" x1="{left}" y1="{y(max(low, 0)):.1f}" x2="{right}" y2="{y(max(low, 0)):.1f}"/>')
    parts.append(f'<polyline class="curve" points="{points}"/>')
    parts.append(f'<text class="big" x="{right + 8}" y="{y(values[-1]) + 7:.1f}">{escape(brief(values[-1]))}</text>')
    parts.append(f'<text class="soft" x="{left}" y="{bottom + 17:.1f}">iteration {steps[0]:.0f}</text>')
    parts.append(f'<text class="soft" x="{right}" y="{bottom + 17:.1f}" text-anchor="end">{steps[-1]:.0f}</text>')
    return parts


def new_words(before: str, after: str) -> set[int]:
    """Places of the words of `after` that `before` does not have there."""
    ours, theirs = after.split(), before.split()
    same = {
        b + i for _, b, n in SequenceMatcher(None, theirs, ours, False).get_matching_blocks() if n > 1 for i in range(n)
    }
    return {*range(len(ours))} - same


def wrapped(text: str, new: set[int]) -> list[str]:
    """The lines of a quotation as SVG, the new words in bold."""
    lines, place = [], 0
    for line in textwrap.wrap(text, LETTERS) or [""]:
        words = []
        for word in line.split():
            words.append(f'<tspan class="new">{escape(word)}</tspan>' if place in new else escape(word))
            place += 1
        lines.append(" ".join(words).replace('</tspan> <tspan class="new">', " "))
    return lines
