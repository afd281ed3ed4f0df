"""Preferences as JSON lines: from votes to rows that TRL and data.prepare read, back, and which pairs to ask about first."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rlhf.feedback.raters import Judgement
from rlhf.infra import files

KEYS = (("prompt", "chosen", "rejected"), ("prompt", "responses"))  # of the rows that can be imported


def is_conversation(messages) -> bool:
    """[{"role": text, "content": text}, ...], at least one."""
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(m, dict) and {*m} == {"role", "content"} for m in messages)
        and all(isinstance(text, str) for m in messages for text in m.values())
    )


def as_text(prompt: str | list[dict]) -> str:
    """A prompt for the eye: a text as it is, one message as its content, more of them with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def answer_text(answer: str | list[dict]) -> str:
    """The text of an answer, which may be written as one message of the assistant. ValueError for anything else."""
    if isinstance(answer, str):
        return answer
    if is_conversation(answer) and len(answer) == 1 and answer[0]["role"] == "assistant":
        return answer[0]["content"]
    raise ValueError(f"an answer is a text or one message of the assistant, not {str(answer)[:80]}")


def majority(verdicts: Sequence[str]) -> str:
    """What most raters say, skips aside; "split" where two verdicts share the first place, "skip" if all skipped."""
    ranked = Counter(verdict for verdict in verdicts if verdict != "skip").most_common(2)
    if not ranked:
        return "skip"
    return "split" if len(ranked) == 2 and ranked[0][1] == ranked[1][1] else ranked[0][0]


# export


def preference_rows(votes: Sequence[dict]) -> tuple[list[dict], dict[str, int]]:
    """One row a pair that most raters decided, by their first votes, and how many pairs were left out, by reason."""
    by_pair: dict[int, list[dict]] = {}
    for vote in votes:
        if not vote["repeat"]:
            verdict = Judgement(vote["pair"], vote["rater"], vote["a_left"], vote["choice"], None, False).verdict
            by_pair.setdefault(vote["pair"], []).append(vote | {"verdict": verdict})
    rows, left_out = [], dict.fromkeys(("tie", "both_bad", "skip", "split"), 0)
    for given in by_pair.values():
        verdict = majority([vote["verdict"] for vote in given])
        if verdict in left_out:
            left_out[verdict] += 1
            continue
        given = [vote for vote in given if vote["verdict"] != "skip"]
        agree = [vote for vote in given if vote["verdict"] == verdict]
        one = agree[0]
        chosen, rejected = ("left", "right") if one["choice"] == "left" else ("right", "left")
        if not (one["left"].strip() and one["right"].strip()):
            left_out["blank"] = left_out.get("blank", 0) + 1
            continue
        prompt = json.loads(one["prompt"])
        texts = [
            one[side] if isinstance(prompt, str) else [{"role": "assistant", "content": one[side]}]
            for side in (chosen, rejected)
        ]
        strengths = [vote["strength"] for vote in agree if vote["strength"] is not None]
        rows.append(
            {
                "prompt": prompt,
                "chosen": texts[0],
                "rejected": texts[1],
                "strength": sum(strengths) / len(strengths) if strengths else None,
                "votes": len(given),
                "agreement": len(agree) / len(given),
                "rater_kinds": sorted({vote["kind"] for vote in given}),
                "chosen_model": one[f"{chosen}_model"],
                "rejected_model": one[f"{rejected}_model"],
            }
        )
    return rows, left_out


def all_rows(records: Sequence[dict]) -> tuple[list[dict], dict[str, int]]:
    """Every vote or rating as it is."""
    return [record | {"prompt": json.loads(record["prompt"])} for record in records], {}


FORMS = {"preference": preference_rows, "votes": all_rows, "ratings": all_rows}


# import


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(where, row) of every line that is not blank. ValueError names the line that has none of the known forms."""
    for where, row in files.read_rows(path):
        keys = {*row} if isinstance(row, dict) else set()
        if not any({*known} <= keys for known in KEYS):
            has = ", ".join(sorted(keys)) or "none"
            raise ValueError(f"{where} has the keys {has}; known rows have {' or '.join(map(', '.join, KEYS))}")
        yield where, row


# which pairs first: scores of both sides by every member of an ensemble -> priorities


def disagreement(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Variance over the M members of an ensemble of P(one beats two) = sigmoid(s_1 - s_2): (P, M), (P, M) -> (P,).

    Where it is large, a label teaches most (Christiano et al. 2017, arXiv:1706.03741, section 2.2.4). Normalised scores.
    ValueError with fewer than two members: one alone never disagrees.
    """
    if one.shape != two.shape or one.ndim != 2 or one.shape[1] < 2:
        raise ValueError(f"scores {one.shape} and {two.shape}: need (pairs, members) twice, with at least 2 members")
    return (1 / (1 + np.exp(two - one))).var(axis=1)


def as_given(pairs: Sequence, seed: int) -> list[float]:
    return [0.0] * len(pairs)


def at_random(pairs: Sequence, seed: int) -> list[float]:
    return np.random.default_rng(seed).random(len(pairs)).tolist()


def by_disagreement(pairs: Sequence, seed: int) -> list[float]:
    if any(scores is None for pair in pairs for scores in pair):
        raise ValueError("order active needs scores of every response: one number per member of a reward ensemble")
    one, two = (np.array([pair[side] for pair in pairs], float) for side in (0, 1))
    return disagreement(one, two).tolist()


ORDERS = {"given": as_given, "random": at_random, "active": by_disagreement}
