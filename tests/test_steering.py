"""Penalties and biases against their definitions, one number at a time, and against HF's file."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.steering import Steering, penalize_repetition, steer

V = 9
ids = st.lists(st.integers(0, V - 1), max_size=12)
biases = st.lists(st.tuples(st.integers(0, V - 1), st.integers(-400, 400).map(lambda x: x / 4))).map(tuple)
numbers = st.integers(-16, 16).map(lambda x: x / 4)


def slow_steer(logits, how, prompt, sampled):
    out = []
    for j, x in enumerate(logits):
        if j in prompt or j in sampled:  # CTRL
            x = x / how.repetition if x > 0 else x * how.repetition
        c = sampled.count(j)  # OpenAI
        x -= c * how.frequency + (c > 0) * how.presence
        out.append(x + sum(value for i, value in how.bias if i == j))
    return out


@given(
    st.lists(numbers, min_size=V, max_size=V),
    st.builds(Steering, numbers, numbers, st.sampled_from([1.0, 0.5, 1.25]), biases),
    ids,
    ids,
)  # fmt: skip
def test_steered_logits_are_those_of_the_definitions(logits, how, prompt, sampled):
    row = torch.tensor(logits, dtype=torch.float64)
    found = steer(row, how, prompt, sampled)
    assert found.tolist() == pytest.approx(slow_steer(logits, how, prompt, sampled), abs=1e-12)
    assert row.tolist() == logits  # a copy
    assert how != Steering() or torch.equal(found, row)


def test_repetition_equals_hf(golden_dir):
    golden = json.loads((golden_dir / "hf_logits_warpers.f32.json").read_text())
    expected = torch.tensor(golden["outputs"]["repetition_penalty=1.2"])
    rows = zip(torch.tensor(golden["inputs"]["logits"]), golden["inputs"]["input_ids"])
    assert torch.equal(torch.stack([penalize_repetition(row, some, 1.2) for row, some in rows]), expected)


def test_what_is_impossible_stays_so():
    row = torch.tensor([-torch.inf, 1.0, 2.0])
    how = Steering(1.0, 1.0, 1.3, ((0, 100.0), (2, -1.0)))
    assert steer(row, how, [0], [0, 2]).tolist() == pytest.approx([-torch.inf, 1.0, 2 / 1.3 - 3])
