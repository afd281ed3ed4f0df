"""The doctor names what eight runs suffer from, which are really broken here (slow), and is silent about healthy ones."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROOT, lines

from rlhf.doctor.diagnosis import diagnose, in_words

N = 25
OPTIONS = {"lr": 3e-4, "kl_coef": 0.1, "clip": 0.2, "value_coef": 0.5, "estimator": "gae", "precision": "fp32"}


def curve(first: float, last: float, noise: float = 0.0, seed: int = 0) -> list[float]:
    return (np.linspace(first, last, N) + noise * np.random.default_rng(seed).standard_normal(N)).tolist()


HEALTHY = {  # as the tiny model's own run at its default options
    "objective/scores": curve(0.4, 1.3, 0.2), "objective/kl": curve(0.0, 1.6), "objective/kl_coef": [0.1] * N,
    "objective/entropy": curve(29.8, 22), "response/length": curve(7.5, 5.6), "response/distinct_2": curve(0.93, 0.95),
    "policy/approxkl": curve(1.4e-3, 1e-5), "policy/clipfrac": curve(5e-3, 0.0), "policy/grad_norm": curve(1.3, 2.4),
    "value/explained_var": curve(0.003, 0.036), "value/mean": curve(0.005, 0.056), "lr": curve(3e-4, 1e-5),
    "rollout/logprob_diff_max": [3e-6] * N, "rollout/logprob_diff_mean": [2e-7] * N,
}  # fmt: skip


def rows(**changes) -> list[dict]:
    """Metrics of a healthy run with other columns: objective__kl=[...]."""
    columns = HEALTHY | {name.replace("__", "/"): values for name, values in changes.items()}
    return [{"step": i, **{name: values[i] for name, values in columns.items()}} for i in range(N)]


def samples(score=lambda text, i: float(np.sin(len(text) * 7 + i)), count: int = 40) -> list[dict]:
    texts = ["word " * (1 + i * 7 % 11) for i in range(count)]
    return [{"prompt": f"p{i}", "response": text, "score": score(text, i)} for i, text in enumerate(texts)]


def names(*args) -> list[str]:
    return [finding.name for finding in diagnose(*args)]


def test_a_healthy_run_gives_no_finding():
    assert names(rows(), OPTIONS, samples()) == []


@pytest.mark.parametrize(
    "name, changes, options, score",
    [
        ("constant reward", {"objective__scores": [1.0] * N}, {}, lambda text, i: 1.0),
        ("lr 0", {"policy__approxkl": [0.0] * N, "objective__kl": [0.0] * N, "lr": [0.0] * N}, {"lr": 0.0}, None),
        ("clip 0", {"policy__clipfrac": [0.47] * N}, {"clip": 0.0}, None),
        ("value_coef 0", {"value__mean": [0.0] * N, "value__explained_var": [0.0] * N}, {"value_coef": 0.0}, None),
        ("kl 0", {"objective__kl_coef": [0.0] * N, "objective__kl": curve(0, 25)}, {"kl_coef": 0.0}, None),
        ("lr too large", {"policy__approxkl": curve(1.9, 1e-5), "objective__kl": curve(0, 30)}, {"lr": 3e-2}, None),
        ("length reward", {"objective__scores": curve(20, 33)}, {}, lambda text, i: float(len(text))),
        ("random reward", {"objective__scores": curve(0, 0, 1.0), "value__explained_var": curve(0, -0.1)}, {}, None),
        ("kl_coef too small", {"objective__kl": curve(0, 60), "response__distinct_2": curve(0.93, 0.1)}, {}, None),
        ("sampler and trainer disagree", {"rollout__logprob_diff_max": [0.5] * N}, {}, None),
        ("sampler and trainer disagree", {"rollout__logprob_diff_mean": [0.3] * N}, {"precision": "bf16"}, None),
    ],
)
def test_each_is_named_first(name, changes, options, score):
    found = diagnose(rows(**changes), OPTIONS | options, samples(score) if score else samples())
    assert found[0].name == name and all(found[0]) and "--" in found[0].option
    assert in_words(found, N).startswith(f"doctor: {name}: ")


def test_a_text_with_two_scores_shows_noise():
    twice = [{"prompt": "a", "response": "b", "score": x} for x in (0.5, -1.0)]
    assert names(rows(), OPTIONS, [*samples(), *twice]) == ["random reward"]


def test_estimators_without_a_critic_have_no_critic_to_blame():
    still = {"value__mean": [0.0] * N, "value__explained_var": [0.0] * N}
    assert names(rows(**still), OPTIONS | {"estimator": "rloo"}, samples()) == []


def test_a_rare_token_that_bf16_rounds_by_nats_is_no_bug():
    """Numbers of a healthy run of SmolLM2 on a CPU with AMX."""
    mean, largest = [0.037] * N, [0.25] * (N - 1) + [2.49]
    columns = {"rollout__logprob_diff_mean": mean, "rollout__logprob_diff_max": largest}
    assert names(rows(**columns), OPTIONS | {"precision": "bf16"}, samples()) == []
    assert names(rows(**columns), OPTIONS, samples()) == ["sampler and trainer disagree"]


def test_short_runs_are_not_judged():
    assert diagnose(rows()[:4], OPTIONS) == [] and "too short" in in_words([], 4)
    assert "nothing is wrong" in in_words([], N)


NUMBER = st.none() | st.floats(allow_nan=False)


@given(st.lists(st.dictionaries(st.sampled_from([*HEALTHY, "other"]), NUMBER), max_size=12))
def test_nothing_that_a_file_can_hold_breaks_it(found):
    diagnose(found, {}, [{"score": None}, {"score": math.inf, "response": 3}, {}])


def test_the_command(tmp_path):
    def doctor(*argv: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "rlhf.doctor", *argv], cwd=ROOT, capture_output=True, text=True)

    for changes, code, word in (({}, 0, "nothing is wrong"), ({"objective__kl_coef": [0.0] * N}, 1, "doctor: kl 0:")):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(**changes)))
        (tmp_path / "run.json").write_text(json.dumps(OPTIONS))
        done = doctor(str(tmp_path))
        assert (done.returncode, done.stderr) == (code, "") and word in done.stdout
    done = doctor(str(tmp_path / "nowhere"))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


REWARDS = """
import random

def length(prompts, responses):
    return [float(len(response)) for response in responses]

def constant(prompts, responses):
    return [1.0] * len(responses)

def noise(prompts, responses, calls=[0]):
    calls[0] += 1
    draw = random.Random(calls[0])
    return [draw.gauss(0, 1) for _ in responses]
"""
BROKEN = {
    "lr too large": {"lr": 0.03}, "length reward": {"reward": "doctor.py:length"}, "lr 0": {"lr": 0}, "kl 0": {"kl_coef": 0},
    "constant reward": {"reward": "doctor.py:constant"}, "random reward": {"reward": "doctor.py:noise"},
    "value_coef 0": {"value_coef": 0}, "clip 0": {"clip": 0},
}  # fmt: skip
SOUND = [
    {}, {"seed": 2}, {"seed": 3}, {"seed": 4}, {"layout": "full"}, {"layout": "branch", "branch_layers": 1},
    {"layout": "adapters", "lora_rank": 4}, {"estimator": "rloo", "samples_per_prompt": 2}, {"estimator": "reinforce++"},
    {"estimator": "grpo", "samples_per_prompt": 4}, {"kl_control": "adaptive", "critic": "separate"},
    {"minibatches": 2, "batch": 32}, {"lr": 1e-3, "kl_coef": 0.2},
]  # fmt: skip


def verdict(world, out, options: dict) -> list[str]:
    told = world.ok("train_ppo.py", out=out, **{"iterations": 25, "checkpoint_every": 25} | options)
    found = diagnose(
        lines(out / "metrics.jsonl"), json.loads((out / "run.json").read_text()), lines(out / "samples.jsonl")
    )
    assert told.splitlines()[-2].startswith("doctor: ") or told.splitlines()[-1].startswith("doctor: ") or not found
    return [finding.name for finding in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_run_that_is_really_broken(world, tmp_path, name):
    (world.path / "doctor.py").write_text(REWARDS)
    assert verdict(world, tmp_path / "out", BROKEN[name])[:1] == [name]


@pytest.mark.slow
@pytest.mark.parametrize("options", SOUND, ids=str)
def test_a_run_that_is_really_healthy(world, tmp_path, options):
    assert verdict(world, tmp_path / "out", options) == []
