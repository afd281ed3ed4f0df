"""Numbers with their intervals: the same from memory and from JSON, and said in one way."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.words import as_json, estimate_of, markdown_table, number, show
from rlhf.statistics import Estimate

FINITE = st.floats(-1e6, 1e6)


@given(FINITE, FINITE, FINITE, st.sampled_from(["mean", "value"]), st.sampled_from([".3f", "+.3f", ".0f", "+.2f"]))
def test_memory_and_json_say_the_same(value, low, high, name, form):
    found = json.loads(json.dumps(as_json(value, low, high, name, n=3), allow_nan=False))
    assert found == {name: value, "low": low, "high": high, "n": 3} and estimate_of(found) == Estimate(value, low, high)
    middle, left, right = (format(x, form) for x in (value, low, high))
    expected = f"{middle} [{left}, {right}]"
    assert show(found, form) == format(Estimate(value, low, high), form) == expected


def test_what_is_not_there():
    nothing = as_json(math.nan, math.nan, math.nan)
    assert nothing == {"mean": None, "low": None, "high": None}
    assert show(None) == show(nothing) == f"{Estimate(math.nan)}" == number(None) == "-"
    assert f"{Estimate(0.5)}" == show({"value": 0.5, "low": None, "high": None}) == number(0.5) == "0.500"
    endless = as_json(math.inf, 1.0, math.inf, "value")
    assert endless == {"value": None, "low": 1.0, "high": None} and show(endless, null=math.inf) == "inf [1.000, inf]"


@pytest.mark.parametrize("damaged", [{}, {"mean": 1.0}, {"mean": "high", "low": 0, "high": 1}, 3, [1], "x"])
def test_what_is_no_estimate_is_an_error_that_the_report_knows(damaged):
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError, IndexError)):
        show(damaged)


def test_a_table():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
