"""Rewards of form: how long, how repetitive, in the format that was asked for? To be added to another with a small weight:

    --reward=out/rm:1,rewards/style.py:brief:0.1,rewards/style.py:repetition:0.5

Penalties are negative, 0 at best; one number a response.
"""

import re

WORDS = 60  # a response of so many words is not yet long
GRAM = 3  # words of a repeated phrase
REASONED = re.compile(r"\s*<think>.+?</think>\s*<answer>.+?</answer>\s*", re.DOTALL)  # arXiv:2501.12948, section 2.2.2


def brief(responses: list[str]) -> list[float]:
    """Minus the words above WORDS, as a share of WORDS, at most 1: -min(1, max(0, n - WORDS) / WORDS)."""
    return [-min(1.0, max(0, len(response.split()) - WORDS) / WORDS) for response in responses]


def repetition(responses: list[str]) -> list[float]:
    """Minus the share of phrases of GRAM words that were there before: different / all phrases - 1 (arXiv:2502.03373)."""
    penalties = []
    for response in responses:
        words = response.casefold().split()
        phrases = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
        penalties.append(len(set(phrases)) / len(phrases) - 1 if phrases else 0.0)
    return penalties


def reasoned(responses: list[str]) -> list[float]:
    """1 for <think>...</think> <answer>...</answer> and nothing else, each tag once; else 0."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    return [
        float(REASONED.fullmatch(response) is not None and all(response.count(tag) == 1 for tag in tags))
        for response in responses
    ]
