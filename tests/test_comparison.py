"""Several models side by side: rankings of a model's own samples by hand, and `evaluate.py` with several models."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import small_model
from test_card import written
from tiny import lines

import evaluate
from evaluation import comparison
from evaluation.held_out import sample_groups
from model.generate import Sampling, generate, row_uniforms
from rlhf.infra import checkpoint
from rlhf.reward.scorer import scorer_of

RNG = np.random.default_rng


@pytest.mark.parametrize("n, temperature", [(1, 1.0), (1, 0.0), (3, 1.0)])
def test_groups_are_those_that_are_sampled_apart(n, temperature):
    """A group's rows begin as others of any group end; tokens, ends and widths are those of the group alone."""
    model, rng = small_model("llama", torch.float32), RNG(0)
    lengths = torch.from_numpy(rng.integers(1, 9, 150))
    prompts, sampling = (
        torch.from_numpy(rng.integers(0, model.config.vocab_size, (150, 8))),
        Sampling(10, [1, 2], 0, temperature),
    )
    groups = sample_groups(model, prompts, lengths, n, sampling, 5)
    assert [len(group.tokens) for group in groups] == [64 * n, 64 * n, 22 * n]
    for group, first in zip(groups, (0, 64, 128)):
        rows = slice(first, first + 64)
        ids = [row + k * 150 for row in range(150)[rows] for k in range(n)]
        draws = row_uniforms(5, 0, ids, 10) if temperature else None
        alone = generate(model, prompts[rows], lengths[rows], sampling, draws)
        for name, x in vars(alone).items():
            torch.testing.assert_close(getattr(group, name), x, rtol=0, atol=1e-5 * (name == "logprobs"))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(2, 4), st.integers(0, 2**20))
def test_rankings_pair_by_pair(prompts, n, seed):
    """Against a loop over all pairs of samples; scores with ties, a judge with more of them."""
    rng = RNG(seed)
    judge = rng.integers(0, 3, (prompts, n)).astype(float)
    rewards = {name: rng.integers(-2, 3, (prompts, n)) / 2 for name in ("ours", "theirs")}
    found = comparison.ranking_of_own_samples(rewards, {"ours": 2.0, "theirs": 1.0}, judge, resamples=20)
    accuracy = {}
    for name, x in rewards.items():
        right, brier = [], []
        for p in range(prompts):
            for i in range(n):
                for j in range(i + 1, n):
                    if judge[p, i] != judge[p, j]:
                        margin = (x[p, i] - x[p, j]) * (1 if judge[p, i] > judge[p, j] else -1)
                        right.append(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
                        sure = 1 / (1 + math.exp(-abs(margin) / {"ours": 2.0, "theirs": 1.0}[name]))
                        brier.append((sure - right[-1]) ** 2)
        assert found[name]["pairs"] == len(right)
        if right:
            accuracy[name] = np.mean(right)
            assert found[name]["accuracy"]["mean"] == pytest.approx(np.mean(right))
            assert found[name]["brier"]["mean"] == pytest.approx(np.mean(brier))
        else:
            assert found[name]["accuracy"] == {"mean": None, "low": None, "high": None}
    gain = found["gain"]["theirs"]["mean"]
    assert gain == (pytest.approx(accuracy["ours"] - accuracy["theirs"]) if accuracy else None)
    assert list(found["gain"]) == ["theirs"]


def test_a_reward_that_is_the_judge_is_always_right():
    judge, noise = RNG(0).normal(size=(40, 2)), RNG(1).normal(size=(40, 2))
    temperatures = {"it": 1.0, "noise": 1.0}
    found = comparison.ranking_of_own_samples({"it": judge, "noise": noise}, temperatures, judge, 100)
    assert found["it"]["accuracy"] == {"mean": 1.0, "low": 1.0, "high": 1.0} and found["gain"]["noise"]["low"] > 0.2
    swapped = comparison.ranking_of_own_samples({"it": judge[:, ::-1]}, temperatures, judge[:, ::-1], 100)
    assert swapped["it"] == found["it"]  # which sample comes first means nothing


def test_every_pair_once_and_both_ways():
    rng = RNG(2)
    results = {name: {k: rng.normal(size=30) for k in ("judge", "reward", "length")} for name in ("base", "one", "two")}
    found = {(x["a"], x["b"]): x for x in comparison.pairwise(results)}
    assert list(found) == [("one", "base"), ("two", "base"), ("two", "one")]
    back = comparison.compare(results["base"], results["two"])
    assert back["judge_gain"]["mean"] == pytest.approx(-found["two", "base"]["judge_gain"]["mean"])
    assert back["win_rate_judge"]["mean"] == pytest.approx(1 - found["two", "base"]["win_rate_judge"]["mean"])
    controlled = "win_rate_judge_length_controlled"
    assert back[controlled]["mean"] == pytest.approx(1 - found["two", "base"][controlled]["mean"])
    three = [found[pair]["judge_gain"]["mean"] for pair in (("one", "base"), ("two", "one"), ("two", "base"))]
    assert three[0] + three[1] == pytest.approx(three[2])  # paired: gains add up


def test_elo_is_relative_to_the_base():
    rng = RNG(3)
    results = {name: {"judge": rng.normal(mean, 1, 200)} for name, mean in (("base", 0), ("one", 1), ("two", 2))}
    found = comparison.elo(results)
    assert found["base"] == {"value": 0, "low": 0, "high": 0}
    assert 0 < found["one"]["low"] < found["one"]["value"] < found["one"]["high"] < found["two"]["low"]
    among_others = comparison.elo({name: results[name] for name in ("base", "two", "one")})
    assert among_others["two"]["value"] == pytest.approx(found["two"]["value"])
    same = comparison.elo({"base": results["base"], "again": results["base"], "more": results["base"]})
    assert [x["value"] for x in same.values()] == [0, 0, 0]


def test_temperature_of_a_reward(tmp_path):
    for name, tensors, expected in (
        ("new", {"temperature": torch.tensor(2.5)}, 2.5),
        ("old", {"gain": torch.ones(())}, 1),
    ):
        checkpoint.save(tmp_path / name, tensors, {}, {})
        assert scorer_of(str(tmp_path / name)).temperature == expected
    assert scorer_of("rewards.py:shorter").temperature == scorer_of("data", rules=True).temperature == 1


# ---- evaluate.py


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    """PPO that learns to write less, with its checkpoints."""
    path = tmp_path_factory.mktemp("tuned") / "ppo"
    options = {"reward": "rewards.py:shorter", "sources": "", "prompt_tokens": 8, "lr": 0.01, "kl_coef": 0.01}
    world.ok("train_ppo.py", out=path, **options)
    return path


COMMON = {"sources": "", "prompt_tokens": 8, "best_of": 1, "judge": "rewards.py:shorter", "prompts": 12}


def test_several_models_and_rewards(world, tuned, tmp_path):
    early, late = f"{tuned}/step_000002", str(tuned)
    files = {
        "minimal_pairs": [{"sentence_good": "The plot was broken.", "sentence_bad": "broken plot The was."}],
        "safety_prompts": [{"prompt": "The plot of the film"}, {"prompt": "I"}, {"prompt": "The news was"}],
    }
    options = {name: written(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
    options |= {"other_rewards": "rewards.py:shorter", "safety_tokens": 5}
    out = world.ok("evaluate.py", **COMMON, tuned=f"{early},{late}", out=tmp_path, **options)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["rows"]) == ["base", early, late] and summary["rows"][late]["kl"] > 0
    assert [(x["a"], x["b"]) for x in summary["pairwise"]] == [(early, "base"), (late, "base"), (late, early)]
    assert summary["ppo"]["judge_gain"] == summary["pairwise"][1]["judge_gain"]
    assert summary["ppo"]["judge_after"] == summary["rows"][late]["judge"]["mean"]
    for found in summary["new_distribution"].values():
        assert found.keys() == {"rm", "rewards.py:shorter", "gain"}
        assert found["rewards.py:shorter"]["accuracy"]["mean"] == 1  # it is the judge
        assert found["gain"]["rewards.py:shorter"]["mean"] == pytest.approx(found["rm"]["accuracy"]["mean"] - 1)
    for name in ("base", early, late):
        assert summary["minimal_pairs"][name]["accuracy"]["mean"] in (0, 1)
        assert summary["safety"][name]["prompts"] == 3 and summary["safety"][name]["refusals"]["mean"] == 0
    assert summary["safety"]["base"]["kl"]["mean"] == 0 < summary["safety"][late]["kl"]["mean"]
    answers = lines(tmp_path / "safety.jsonl")
    assert [row["prompt"] for row in answers] == [row["prompt"] for row in files["safety_prompts"]]
    assert all(list(row["answers"]) == list(row["refused"]) == ["base", early, late] for row in answers)
    assert "Minimal pairs" in out and "a crude measure" in out
    points = summary["elo"]
    assert (
        list(points) == ["base", early, late] and points[late]["low"] <= points[late]["value"] <= points[late]["high"]
    )
    rows = lines(tmp_path / "samples.jsonl")
    assert len(rows) == summary["prompts"] and list(rows[0]) == ["before", early, late]
    assert "as the judge" in out and f"| {late} | {early} |" in out

    alone = tmp_path / "alone"
    world.ok("evaluate.py", **COMMON, tuned=late, out=alone)
    single = json.loads((alone / "summary.json").read_text())
    assert single["rows"] == {
        "base": summary["rows"]["base"],
        "tuned": summary["rows"][late],
    }  # company changes nothing
    assert not {"new_distribution", "elo", "minimal_pairs", "safety"} & single.keys()
    assert lines(alone / "samples.jsonl")[0].keys() == {"before", "after"}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"tuned": ""}, ("--tuned is empty",)),
        ({"tuned": "lm,lm"}, ("--tuned", "lm", "name it once")),
        ({"tuned": "base,lm"}, ("--tuned", "./base")),
        ({"other_rewards": "rm"}, ("--other_rewards", "rm", "name it once")),
        ({"other_rewards": "rm2", "samples": 1}, ("--other_rewards has no effect", "--samples=1")),
        ({"safety_tokens": 4}, ("--safety_tokens has no effect", "--safety_prompts")),
        ({"minimal_pairs": "nowhere"}, ("nowhere",)),
        ({"samples": 0}, ("--samples=0", "at least 1")),
    ],
)
def test_what_it_refuses(world, options, words):
    done = world.run("evaluate.py", **options)
    assert (done.code, done.err.count("\n")) == (2, 1) and all(word in done.err for word in words), done


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ((0.1, 0.3), "likes the tuned model better than the base"),
        ((-0.1, 0.3), "cannot tell the tuned model from the base"),
        ((-0.3, -0.1), "likes the tuned model less than the base"),
        ((math.nan, math.nan), "cannot tell the tuned model from the base"),
    ],
)
def test_the_verdict_in_one_sentence(ends, told):
    """It claims what the interval shows; the judge speaks where there is one, else the reward; several models get a table."""
    low, high = ends
    gain, rate = {"mean": (low + high) / 2, "low": low, "high": high}, {"mean": 0.625}
    ppo = {"kl": 5.04, "distinct3_before": 0.98, "distinct3_after": 0.96}
    for what in ("judge", "reward"):
        ppo |= {f"{what}_before": 0.2, f"{what}_after": 0.4, f"{what}_gain": gain, f"win_rate_{what}": rate}
    rows = {"base": {"judge": {"mean": 0.2}, "reward": {"mean": 0.0}}, "tuned": {}}
    summary = {"ppo": ppo, "rows": rows, "pairwise": [{}], "prompts": 128}
    text = evaluate.verdict(summary)
    assert text.startswith(f"The judge {told}: 0.200 -> 0.400, ") and "\n" not in text
    assert "it wins 62% of 128 held-out prompts, 5.0 nats from the base; distinct-3 0.980 -> 0.960." in text
    rows["best of 4"] = {"judge": {"mean": 0.25}, "reward": {"mean": 0.9}}
    assert evaluate.verdict(summary).endswith("the best of 4 samples of the base, chosen by the reward, gains +0.050.")
    assert evaluate.verdict(summary | {"pairwise": [{}, {}]}) == ""
    del ppo["judge_gain"]
    assert evaluate.verdict(summary).startswith(f"The reward {told}: ")
