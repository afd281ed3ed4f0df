"""Rewards that can be checked: is the answer of the row in the response? `--reward=rewards/verify.py:number`.

A reward function is asked by the names of its parameters: `responses`, `prompts`, `messages`, or any column of the prepared
data. These read the column `answer` (or `pattern`): `python -m data.prepare gsm8k.jsonl` keeps it beside the prompt. Each
returns 1 for right and 0 for wrong, one number a response.
"""

import re
from fractions import Fraction

NUMBER = re.compile(  # 1,234.5  -3  .5  1/3; the sign of 7-5 is none
    r"(?:(?<![\w)])[-+])?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+/\d+|\d+(?:\.\d+)?|\.\d+)"
)
MARKS = (
    re.compile(r"####\s*(.+)"),
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(r"<answer>(.*?)</answer>", re.DOTALL),
)


def exact(responses: list[str], answer: list) -> list[float]:
    """Is the response the answer, case, outer punctuation and runs of spaces aside?"""
    return [float(plain(response) == plain(str(gold))) for response, gold in zip(responses, answer)]


def contains(responses: list[str], answer: list) -> list[float]:
    """Does the response contain the answer as words of its own, case and spaces aside?"""
    return [
        float(
            bool(plain(str(gold)))
            and re.search(rf"(?<!\w){re.escape(plain(str(gold)))}(?!\w)", plain(response)) is not None
        )
        for response, gold in zip(responses, answer)
    ]


def number(responses: list[str], answer: list) -> list[float]:
    """Is the response's final number the answer's? 1,234.0 is 1234, and 0.5 is 1/2; a response without a number is wrong."""
    golds = [final_number(str(gold)) for gold in answer]
    for gold, text in zip(golds, answer):
        if gold is None:
            raise ValueError(f"the answer {str(text)[:60]!r} has no number; use exact or regex")
    return [float(final_number(response) == gold) for response, gold in zip(responses, golds)]


def regex(responses: list[str], pattern: list[str]) -> list[float]:
    """Is the row's `pattern` found in the response?"""
    return [float(re.search(wanted, response) is not None) for response, wanted in zip(responses, pattern)]


def final_number(text: str) -> Fraction | None:
    """The number behind the last "####", in the last \\boxed{} or <answer>, else the last number of the text."""
    for mark in MARKS:
        if found := mark.findall(text):
            text = found[-1]
            break
    numbers = NUMBER.findall(text)
    if not numbers:
        return None
    try:
        return Fraction(numbers[-1].replace(",", ""))
    except ZeroDivisionError:
        return None


def plain(text: str) -> str:
    """Lower case, single spaces, no punctuation at either end."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*()[]")
