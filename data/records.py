"""The one form of a row of data: a prompt, some answers, what people thought of them. Readers make it (data/formats.py)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from data.text import SPLITS, key

Message = dict[str, str]  # {"role": "system", "user", "assistant" ..., "content": a text}


@dataclass(frozen=True)
class Pair:
    """Two answers of a record, of which people preferred the first."""

    winner: int  # index into answers
    loser: int
    p: float = 1.0  # probability that a rater prefers the winner, 0.5 (a tie) ... 1
    gap: float = 1.0  # how much better, in the points of the data; 0 for a tie
    weight: float = 1.0  # in a loss; 1, or the share of a pair that stands more than once


@dataclass(frozen=True)
class Record:
    """A row of data, whatever it came as. ValueError where its parts do not fit.

    A text is one answer to the empty prompt; a row for fine-tuning has one answer, a comparison two and a pair, a rated
    answer a score, a prompt for reinforcement learning no answer.
    """

    prompt: str | list[Message]  # "" = none; messages end before the answer, earlier turns of the assistant lie in here
    answers: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None  # one per answer
    pairs: tuple[Pair, ...] = ()
    extra: dict = field(default_factory=dict)  # every other column of the row, JSON values
    source: str = ""  # the file's stem, or what the row says of its domain
    # records of a group share a split: 16 hex digits, by default of the prompt (of the text without one)
    group: str = field(default_factory=str)

    def __post_init__(self):
        if self.scores is not None and len(self.scores) != len(self.answers):
            raise ValueError(f"{len(self.scores)} scores for {len(self.answers)} answers")
        if not all(map(math.isfinite, self.scores or ())):
            raise ValueError(f"a score is no finite number: {list(self.scores)}")
        for pair in self.pairs:
            if pair.winner == pair.loser or not all(0 <= i < len(self.answers) for i in (pair.winner, pair.loser)):
                raise ValueError(f"a pair of answers {pair.winner} and {pair.loser} of {len(self.answers)}")
            if not (0.5 <= pair.p <= 1 and 0 <= pair.gap < math.inf and 0 < pair.weight < math.inf):
                raise ValueError(
                    f"a pair with p {pair.p}, gap {pair.gap}, weight {pair.weight}: not 0.5 ... 1, >= 0, > 0"
                )
        if not self.group:
            object.__delattr__(self, "group")  # made when someone asks

    def __getattr__(self, name: str):
        if name != "group":
            raise AttributeError(name)
        first = self.answers[0] if self.answers else ""
        object.__setattr__(self, "group", group_of(asked(self.prompt) or first))
        return self.group

    @property
    def split(self) -> str:
        """train, validation or test, 80/10/10, by the group."""
        return SPLITS[max(0, int(self.group, 16) % 10 - 7)]

    def to_json(self) -> dict:
        """JSON values of all of it; what is at its default stays out."""
        row = {"prompt": self.prompt, "answers": list(self.answers), "scores": self.scores and list(self.scores)}
        row |= {"pairs": [vars(pair) for pair in self.pairs]}
        row |= {"extra": self.extra, "source": self.source, "group": self.group}
        return {name: value for name, value in row.items() if name == "prompt" or value not in ([], {}, "", None)}

    @classmethod
    def from_json(cls, row: dict) -> Record:
        pairs = tuple(Pair(**pair) for pair in row.get("pairs", ()))
        scores = None if row.get("scores") is None else tuple(row["scores"])
        return cls(**{**row, "answers": tuple(row.get("answers", ())), "scores": scores, "pairs": pairs})


def prompt_text(prompt: str | list[Message]) -> str:
    """A prompt as one text, to compare and to show: messages with their roles, a blank line between them."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def asked(prompt: str | list[Message]) -> str:
    """What a prompt says, whether it is a text or messages: all but the system message."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(message["content"] for message in prompt if message["role"] != "system")


def group_of(text: str) -> str:
    """The group of a prompt or a text, 16 hex digits: the same for all that `data.text.key` calls the same."""
    return hashlib.sha256(key(text).encode()).hexdigest()[:16]


def pairs_by_score(answers: Sequence[str | bytes], scores: Sequence[float], most: int = 10) -> tuple[Pair, ...]:
    """Pairs of different answers whose scores differ, the widest gaps first, at most `most`."""
    pairs = [
        Pair(i, j, gap=a - b)
        for i, a in enumerate(scores)
        for j, b in enumerate(scores)
        if a > b and answers[i] != answers[j]
    ]
    return tuple(sorted(pairs, key=lambda pair: -pair.gap)[:most])
