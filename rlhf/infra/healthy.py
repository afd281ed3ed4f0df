"""What PPO's metrics are called in words, and the numbers between which a healthy run keeps them.

The one place that knows: the report and the live view draw the band, the doctor names what leaves it, the check before the
first update refuses it, and a test holds the table of docs/curves.md against it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

SLACK = 0.05  # of a band's width: a KL of 0 is estimated as a little below it as often as above
FIRST = 5  # iterations whose mean is the start of a curve, and those whose mean is its end

# nats per token that two forwards of the same weights may differ by: in float32 the largest difference, in half precision,
# where that grows with the number of tokens, the mean (SmolLM2-135M in bf16: mean .032 to .034, largest .18 to .25)
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}


class Healthy(NamedTuple):
    """One metric. A band without numbers has the words alone: no number tells a good score from a bad one."""

    words: str  # a title for who does not know the metric's name
    unit: str = ""
    low: float | None = None  # None: no end on this side
    high: float | None = None
    of_start: bool = False  # low and high are multiples of the curve's start, see FIRST
    rule: str = ""  # the band in words
    outside: str = ""  # what it means to leave it, and what to try


HEALTHY = {
    "objective/scores": Healthy("Reward of the answers", "mean score", rule="rises", outside="flat: raise lr, lower kl_coef"),
    "judge/mean": Healthy(
        "Opinion of the held-out judge", "mean score", rule="rises", outside="falls while the reward rises: over-optimised"
    ),
    "objective/kl": Healthy(
        "Distance from the base", "KL, nats per answer", 0, 10, rule="a few nats, below 10",
        outside="look at samples; raise kl_coef or set max_kl",
    ),
    "objective/entropy": Healthy(
        "Variety of the answers", "entropy, nats per answer", 0.5, 1.25, of_start=True, rule="falls slowly, not to half",
        outside="collapses: repetition; raise kl_coef or entropy_coef",
    ),
    "policy/entropy": Healthy(
        "Variety of the answers", "entropy, nats per token", 0.5, 1.25, of_start=True, rule="falls slowly, not to half",
        outside="collapses: repetition; raise kl_coef or entropy_coef",
    ),
    "policy/ratio_first": Healthy(
        "First ratio of an iteration", "new / old probability", 1, 1, rule="exactly 1", outside="sampler and trainer disagree"
    ),
    "policy/ratio": Healthy(
        "Ratio of the updates", "new / old probability", 0.95, 1.05, rule="0.95 to 1.05", outside="fewer epochs, smaller lr"
    ),
    "policy/approxkl": Healthy(
        "Size of an update", "KL, nats per token", 1e-5, 0.1, rule="1e-5 to 1e-1",
        outside="fewer epochs, smaller lr, or set target_approxkl",
    ),
    "policy/clipfrac": Healthy(
        "Updates that are clipped", "share of the tokens", 0, 0.2, rule="below 0.2", outside="fewer epochs, smaller lr"
    ),
    "value/explained_var": Healthy(
        "Foresight of the critic", "explained variance", 0, 1, rule="rises from 0",
        outside="negative for long: the critic harms; critic=separate, estimator=rloo",
    ),
    "value/clipfrac": Healthy(
        "Values that are clipped", "share of the tokens", 0, 0.3, rule="below 0.3", outside="raise value_clip"
    ),
    "response/length": Healthy(
        "Length of the answers", "tokens", 0.5, 1.5, of_start=True, rule="near its start",
        outside="the reward pays for length; set eos_penalty",
    ),
    "response/distinct_2": Healthy(
        "Different pairs of tokens", "share of all, distinct-2", 0.6, None, of_start=True,
        rule="near its start, not below 0.6 of it", outside="repetition: raise kl_coef",
    ),
    "group/flat": Healthy(
        "Prompts that teach nothing", "share", 0, 0.5, rule="below 0.5", outside="resample_flat, more samples_per_prompt"
    ),
    "bad/steps": Healthy("Skipped updates", "steps", 0, 0, rule="0", outside="a bad number: python -m rlhf.replay"),
}  # fmt: skip
# the four that a reader sees first: of each row the first that the run has, and that moved
LARGE = (
    ("objective/scores",),
    ("objective/kl",),
    ("judge/mean", "value/explained_var", "policy/clipfrac"),
    ("objective/entropy", "policy/entropy", "response/length"),
)


def band(name: str, values: Sequence[float]) -> tuple[float, float] | None:
    """(low, high) of a healthy curve with these values, infinite where there is no end; None where no number tells."""
    known = HEALTHY.get(name)
    if known is None or known.low is None and known.high is None:
        return None
    unit = mean(values[:FIRST]) if known.of_start else 1.0
    if not math.isfinite(unit):
        return None
    low, high = (end if x is None else x * unit for x, end in ((known.low, -math.inf), (known.high, math.inf)))
    return low, high


def is_outside(name: str, values: Sequence[float]) -> bool:
    """Does the end of the curve, the mean of its last values, leave the band by more than noise? Not said of a short run."""
    found, end = band(name, values), mean(values[-FIRST:])
    if found is None or len(values) < 2 * FIRST or not math.isfinite(end):
        return False
    low, high = found
    slack = SLACK * (high - low) if math.isfinite(high - low) else 0.0
    return not low - slack <= end <= high + slack


def mean(values: Sequence[float]) -> float:
    """Of what is finite; NaN where nothing is."""
    finite = [x for x in values if math.isfinite(x)]
    return sum(finite) / len(finite) if finite else math.nan
