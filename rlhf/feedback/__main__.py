"""Votes in the terminal, and the store's files in and out.

python -m rlhf.feedback --store=out/feedback.sqlite --action=import --file=pairs.jsonl --raters=2
python -m rlhf.feedback --store=out/feedback.sqlite --rater=ana
python -m rlhf.feedback --store=out/feedback.sqlite --action=statistics
python -m rlhf.feedback --store=out/feedback.sqlite --action=export --file=preferences.jsonl
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.feedback.raters import rate
from rlhf.feedback.store import Comparison, FeedbackStore
from rlhf.infra import config

Order = Literal["given", "random", "active"]
Form = Literal["preference", "votes", "ratings"]


@dataclass(frozen=True)
class Config:
    store: str  # SQLite file; import makes it
    action: Literal["vote", "import", "export", "statistics"] = "vote"  # what to do with it
    rater: str = ""  # who votes; with import, whose votes chosen and rejected are [action=vote|import]
    file: str = ""  # JSON lines to read or to write [action=import|export]
    # import
    raters: int = 1  # people who judge each new pair [action=import]
    order: Order = "given"  # which pairs first; active: where reward models disagree [action=import]
    seed: int | None = None  # of a new store: sides, repetitions, and the order where it is random [action=import]
    repeats: float | None = None  # of a new store: share of comparisons that repeat one, swapped [action=import]
    # export
    form: Form = "preference"  # preference: TRL's prompt, chosen, rejected [action=export]

    def __post_init__(self):
        config.at_least(self, raters=1, seed=0)
        if self.action == "vote" and not self.rater:
            raise ValueError("--rater=NAME is required: whose votes are these?")
        if self.action == "vote" and sys.stdin is None:
            raise ValueError("standard input is closed, and votes are typed there")
        if self.action in ("import", "export") and not self.file:
            raise ValueError(f"--file=PATH is required to {self.action}: JSON lines")
        if self.action != "import" and not Path(self.store).is_file():
            raise ValueError(f"there is no store {self.store}; make it with --action=import")


KEYS = {"a": "left", "b": "right", "t": "tie", "x": "both_bad", "s": "skip"}


NOTHING = "nothing is left to compare   u: undo   q: quit"
HELP = "a, b: better (A, B: much better)   t: tie   x: both bad   s: skip   u: undo   q: quit"


def main() -> None:
    cfg = config.parse(Config)
    store = FeedbackStore(cfg.store, cfg.seed, cfg.repeats)
    try:
        ACTIONS[cfg.action](cfg, store)
    finally:
        store.close()


def ask(cfg: Config, store: FeedbackStore) -> None:
    """Show pair after pair and store what is typed; every vote is on disk before the next pair is shown."""
    votes, said, started = 0, "", time.perf_counter()
    with keyboard() as read_key:
        while True:
            shown = store.next_comparison(cfg.rater)
            done, total = store.progress(cfg.rater)
            clear()
            print(page(shown, f"{done + 1} of {total}", said) if shown else f"{said}\n{NOTHING}".lstrip(), flush=True)
            before = time.perf_counter()
            allowed = ("u", "q", "", *((*KEYS, "A", "B") if shown else ()))
            while (key := read_key()) not in allowed:
                print(HELP, flush=True)
            if key in ("q", ""):
                break
            if key == "u":
                if last := store.last_vote(cfg.rater):
                    store.undo(last.id, cfg.rater)
                    votes -= 1
                said = f"undone: {last.choice.replace('_', ' ')}" if last else "there is nothing to undo"
                continue
            choice, strength = KEYS[key.lower()], 3 if key in "AB" else None
            store.vote(shown.id, cfg.rater, choice, strength, time.perf_counter() - before, secrets.token_hex(16))
            votes += 1
            said = f"your last: {choice.replace('_', ' ')}"
    print(f"{votes} votes in {time.perf_counter() - started:.0f} s -> {cfg.store}")


def clear() -> None:
    """A terminal begins a new page."""
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        print("\x1b[H\x1b[2J", end="")


def page(shown: Comparison, place: str = "", said: str = "") -> str:
    """A comparison for a terminal, and over it which one it is and what was last done; what is no printable character is
    spelled, so no text can send control sequences.
    """
    width = min(100, shutil.get_terminal_size((80, 24)).columns)
    parts = [f"{place}   {said}".strip(), "=" * width]
    for head, text in (("", shown.prompt), ("A", shown.left), ("B", shown.right)):
        lines = [wrapped for line in text.split("\n") for wrapped in textwrap.wrap(spelled(line), width - 4) or [""]]
        parts += [f"--- {head} ".ljust(width, "-")] if head else []
        parts += ["    " * bool(head) + line for line in lines]
    return "\n".join([*parts, HELP])


def spelled(text: str) -> str:
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


@contextmanager
def keyboard() -> Iterator[Callable[[], str]]:
    """A function that waits for a key, without Enter where the input is a terminal; "" at the end of the input."""
    if not sys.stdin.isatty():

        def next_character() -> str:
            while (key := sys.stdin.read(1)).isspace():
                pass
            return key

        yield next_character
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def next_key() -> str:
        key = os.read(terminal, 32).decode(errors="replace")
        return {"\x1b[D": "a", "\x1b[C": "b", "\x04": ""}.get(key, key[:1])  # the arrows point at the sides

    try:
        tty.setcbreak(terminal)
        yield next_key
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def read_file(cfg: Config, store: FeedbackStore) -> None:
    print(
        json.dumps(store.import_jsonl(cfg.file, cfg.rater or "import", cfg.raters, cfg.order, cfg.seed or 0)),
        f"-> {cfg.store}",
    )


def write_file(cfg: Config, store: FeedbackStore) -> None:
    print(json.dumps(store.export_jsonl(cfg.file, cfg.form)), f"-> {cfg.file}")


def print_statistics(cfg: Config, store: FeedbackStore) -> None:
    from rlhf.statistics import Estimate  # brings torch, and seconds; who only votes needs neither

    statistics = store.statistics()
    print(f"{'rater':<20}{'votes':>7}{'left, 95% interval':>21}{'same again':>11}{'of':>5}{'seconds':>9}")
    for name, row in [*statistics["by_rater"].items(), ("all", statistics)]:
        left, again = row["left"], row["self_consistency"]
        side = f"{Estimate(left['share'], left['low'], left['high']):.2f}" if left["n"] else "-"
        cells = [f"{row['votes']:>7}", f"{side:>21}", cell(again["share"], 11)]
        print(f"{name:<20}" + "".join(cells) + f"{again['n']:>5}" + cell(row["median_seconds"], 9))
    two = statistics["pairs_with_two_raters"]
    print(f"\n{two} of {statistics['queued_pairs']} pairs have two raters or more; agreement", end=" ")
    print(cell(statistics["agreement"]), f"(Fleiss' kappa {cell(statistics['fleiss_kappa'])})")
    for row in statistics["cohen_kappa"]:
        print(f"Cohen's kappa of {' and '.join(row['raters'])}: {cell(row['kappa'])} on {row['pairs']} pairs")
    for row in store.wins():
        won = rate(row["wins"], row["of"])
        share = f"{Estimate(won['share'], won['low'], won['high']):.2f}"
        print(f"{spelled(row['model'])} against {spelled(row['against'])}: {share} of {row['of']} votes for a side")


def cell(x: float | None, width: int = 0) -> str:
    return ("-" if x is None else f"{x:.2f}").rjust(width)


ACTIONS = {"vote": ask, "import": read_file, "export": write_file, "statistics": print_statistics}


if __name__ == "__main__":
    config.run(main, stopped="stopped; every vote so far is stored")
