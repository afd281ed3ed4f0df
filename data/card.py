"""The data card: what prepared data holds, for people (card.md) and programs (card.json)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from data.examples import Encoded
from data.records import Record, prompt_text
from data.text import SPLITS

SAMPLES, LONGEST_SAMPLE = 3, 400  # of a split; characters of a text
MOST_KINDS = 1000  # of reasons, of different scores
COUNTERS = ("sources", "prompt_tokens", "answer_tokens", "longer", "labels", "agreement")


def kind_of(reason: str) -> str:
    """A reason without what differs from row to row."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+(\.\d+)?", "...", reason)[:100]


class SplitCard:
    """What a split, or a part of it, holds."""

    def __init__(self):
        self.totals = Counter()
        self.counters = {name: Counter() for name in COUNTERS}
        self.samples: list[dict] = []

    def add(self, encoded: Encoded) -> None:
        record, answers = encoded.record, encoded.answers
        lengths = [len(answer) for answer in answers]
        count, totals = self.counters, self.totals
        totals["answers"] += len(answers)
        totals["pairs"] += len(record.pairs)
        totals["tokens"] += len(encoded.prompt) * max(1, len(answers)) + sum(lengths)
        count["sources"][record.source] += 1
        count["prompt_tokens"][len(encoded.prompt)] += 1
        for length in lengths:
            count["answer_tokens"][length] += 1
        for score in record.scores or ():
            name = round(score, 1)
            count["labels"][name if name in count["labels"] or len(count["labels"]) < MOST_KINDS else "more"] += 1
            totals["scores"] += 1
            totals["score_sum"] += score
            totals["score_squares"] += score * score
        for pair in record.pairs:
            count["longer"][lengths[pair.winner] - lengths[pair.loser]] += 1
            count["agreement"][round(pair.p, 2)] += 1
            totals["ties"] += pair.p == 0.5
        if len(self.samples) < SAMPLES:
            self.samples.append(sample(record))

    def to_json(self) -> dict:
        counters = {name: {str(k): n for k, n in counter.items()} for name, counter in self.counters.items()}
        return {"totals": dict(self.totals), "counters": counters, "samples": self.samples}

    def update(self, content: dict) -> None:
        self.totals.update(content["totals"])
        for name, counter in self.counters.items():
            counter.update(content["counters"][name])
        self.samples += content["samples"][: SAMPLES - len(self.samples)]

    def summary(self) -> dict:
        """Numbers that say what is in there; lengths in tokens."""
        totals, numbers = self.totals, {}
        for name in ("prompt_tokens", "answer_tokens", "longer"):
            numbers[name] = quantiles(self.counters[name])
        pairs, scores = totals["pairs"], totals["scores"]
        longer = {int(k): n for k, n in self.counters["longer"].items()}
        numbers["chosen_is_longer"] = sum(n for k, n in longer.items() if k > 0) / pairs if pairs else None
        mean_p = sum(float(p) * n for p, n in self.counters["agreement"].items()) / pairs if pairs else None
        mean = totals["score_sum"] / scores if scores else None
        deviation = max(0.0, totals["score_squares"] / scores - mean * mean) ** 0.5 if scores else None
        return {
            **{name: int(totals[name]) for name in ("answers", "pairs", "ties", "scores", "tokens")},
            **numbers,
            "agreement": mean_p,
            "score_mean": mean,
            "score_deviation": deviation,
            "labels": dict(self.counters["labels"].most_common(20)),
            "sources": dict(self.counters["sources"].most_common(50)),
            "samples": self.samples,
        }


def sample(record: Record) -> dict:
    def shorten(text: str) -> str:
        return text if len(text) <= LONGEST_SAMPLE else text[:LONGEST_SAMPLE] + " ..."

    shown = {"prompt": shorten(prompt_text(record.prompt)), "answers": [shorten(a) for a in record.answers[:4]]}
    return shown | ({"scores": list(record.scores[:4])} if record.scores else {})


def quantiles(counts: Counter) -> dict | None:
    """mean, and the values below which 5, 50, 95 and 100 of 100 lie."""
    if not counts:
        return None
    values = sorted((int(value), n) for value, n in counts.items())
    total, found, seen = sum(n for _, n in values), {}, 0
    wanted = [(share, share * total / 100) for share in (5, 50, 95, 100)]
    for value, n in values:
        seen += n
        while wanted and seen >= wanted[0][1]:
            found[str(wanted.pop(0)[0])] = value
    return {"mean": sum(value * n for value, n in values) / total, **found}


class Card:
    """What was read, and what became of it."""

    def __init__(self):
        self.rows = Counter(dict.fromkeys(("read", "kept", "rejected", "duplicates"), 0))
        self.kept, self.forms, self.reasons, self.notes = Counter(), Counter(), Counter(), Counter()
        self.splits = {split: SplitCard() for split in SPLITS}

    def read(self, form: str) -> None:
        self.rows["read"] += 1
        if form:
            self.forms[form] += 1

    def duplicate(self, kind: str) -> None:
        self.rows["duplicates"] += 1
        self.notes[kind] += 1

    def reject(self, reason: str) -> None:
        self.rows["rejected"] += 1
        kind = kind_of(reason)
        self.reasons[kind if kind in self.reasons or len(self.reasons) < MOST_KINDS else "other reasons"] += 1

    def keep(self, split: str) -> None:
        self.rows["kept"] += 1
        self.kept[split] += 1

    def add(self, split: str, encoded: Encoded) -> None:
        self.splits[split].add(encoded)

    def to_json(self) -> dict:
        counters = {name: dict(getattr(self, name)) for name in ("rows", "kept", "forms", "reasons", "notes")}
        return {**counters, "splits": {name: split.to_json() for name, split in self.splits.items()}}

    def update(self, content: dict) -> None:
        """Adds another card's to_json."""
        for name in ("rows", "kept", "forms", "reasons", "notes"):
            getattr(self, name).update(content[name])
        for name, split in self.splits.items():
            split.update(content["splits"][name])

    def summary(self, prompts: dict[str, int]) -> dict:
        """prompts: how many different ones there are in each split."""
        assert self.rows["read"] == self.rows["kept"] + self.rows["rejected"] + self.rows["duplicates"], self.rows
        splits = {
            name: {"rows": self.kept[name], "prompts": prompts[name], **split.summary()}
            for name, split in self.splits.items()
        }
        return {
            "rows": dict(self.rows),
            "duplicates": dict(self.notes),
            "forms": dict(self.forms.most_common()),
            "rejected": dict(self.reasons.most_common()),
            "splits": splits,
        }


# --- Markdown ---


def table(heads: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cell(value) for value in line)} |\n" for line in lines) + "\n"


def cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")


def spread(values: dict | None) -> str:
    return "-" if values is None else " / ".join(cell(values[share]) for share in ("5", "50", "95", "100"))


def describe(name: str, summary: dict, inputs: Sequence[dict]) -> str:
    """The card in Markdown."""
    rows, splits = summary["rows"], summary["splits"]
    text = f"# Data card of {name}\n\n"
    text += "".join(f"- {one['file']} ({one['kind']})\n" for one in inputs) + "\n"
    text += f"{rows['read']:,} rows read = {rows['kept']:,} kept + {rows['rejected']:,} rejected + "
    text += f"{rows['duplicates']:,} duplicates.\n\n"
    text += table(("form", "rows"), summary["forms"].items())
    if summary["rejected"]:
        text += table(("rejected because", "rows"), summary["rejected"].items())
    facts = ("rows", "prompts", "answers", "pairs", "ties", "scores", "tokens")
    text += table(("", *facts), ((split, *(found[fact] for fact in facts)) for split, found in splits.items()))
    text += "Tokens, of which 5, 50, 95 and 100 in 100 have at most so many:\n\n"
    text += table(
        ("", "prompt", "answer", "chosen minus rejected", "chosen is longer", "agreement", "score", "deviation"),
        (
            (
                split,
                *(spread(found[fact]) for fact in ("prompt_tokens", "answer_tokens", "longer")),
                *(found[fact] for fact in ("chosen_is_longer", "agreement", "score_mean", "score_deviation")),
            )
            for split, found in splits.items()
        ),
    )
    if splits["train"]["labels"]:
        text += "Scores in train, rounded:\n\n" + table(("score", "answers"), splits["train"]["labels"].items())
    if len(splits["train"]["sources"]) > 1:
        text += table(("source", "records in train"), splits["train"]["sources"].items())
    text += "Samples from train:\n\n"
    for one in splits["train"]["samples"]:
        text += "".join(f"    {line}\n" for line in one["prompt"].split("\n")) + "\n"
        for i, answer in enumerate(one["answers"]):
            score = f" ({one['scores'][i]:g})" if "scores" in one else ""
            text += f"answer {i + 1}{score}:\n\n" + "".join(f"    {line}\n" for line in answer.split("\n")) + "\n"
    return text
