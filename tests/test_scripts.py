"""The real scripts on a tiny world: they end well, leave the files and numbers that they promise, and explain themselves."""

import dataclasses
import importlib
import json
import math
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, lines

from rlhf.infra import checkpoint
from rlhf.infra.config import show

SCRIPTS = ("train_lm", "train_rm", "train_ppo", "sample", "evaluate")
PPO_METRICS = set(
    """
    objective/scores objective/kl objective/kl_coef objective/entropy objective/rlhf_reward objective/non_score_reward
    policy/approxkl policy/clipfrac policy/ratio policy/ratio_first policy/grad_norm policy/epochs_run policy/entropy
    value/clipfrac value/explained_var value/mean loss/policy loss/value
    returns/mean returns/std advantages/mean advantages/std
    response/length response/eos_rate response/truncated_rate response/distinct_2
    rollout/logprob_diff_mean rollout/logprob_diff_max
    time/rollout time/judge time/learn time/total perf/tokens_per_s perf/peak_memory_gb
    lr episode iteration step bad/steps
    """.split()
)


def ppo(world, out, **options) -> list[dict]:
    """The metrics of a PPO run that ended well."""
    world.ok("train_ppo.py", out=out, **options)
    rows = lines(out / "metrics.jsonl")
    groups = {"group/flat"} if options.get("samples_per_prompt", 1) > 1 else set()
    for row in rows:
        assert row.keys() == PPO_METRICS | groups
        assert all(isinstance(x, int | float) for x in row.values()), row  # null: it was not finite
        assert row["policy/ratio_first"] == pytest.approx(1, abs=1e-6)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)  # the policy is still the reference
    return rows


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.resolve(run) / "model.safetensors")


# ---- the pipeline


def test_language_model(world):
    rows = lines(world.path / "lm/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(3, 48, 4))
    assert rows[-1]["loss/train"] < rows[0]["loss/train"] - 1
    assert all(row.keys() >= {"loss/train", "grad_norm", "lr"} for row in rows)
    validation = {"validation/loss", "validation/perplexity", "validation/bits_per_byte"}
    assert [row["step"] for row in rows if row.keys() >= validation] == [11, 23, 35]  # the end is in the report
    report = json.loads((world.path / "lm/report.json").read_text())
    assert report["validation/perplexity"] == pytest.approx(math.exp(report["validation/loss"]))
    assert report["validation/perplexity"] < 400 and report["seconds"] > 0
    assert json.loads((world.path / "lm/run.json").read_text())["width"] == 32


def test_reward_model(world):
    rows = lines(world.path / "rm/metrics.jsonl")
    assert {"loss/train", "grad_norm", "lr", "validation/accuracy"} <= rows[1].keys()
    report = json.loads((world.path / "rm/report.json").read_text())
    gaps = {"all", "0.5", "1", "2"}
    assert report["accuracy"].keys() == report["validation"].keys() == gaps
    assert {"rules", "bow", "length", "human"} <= report["baselines"].keys()
    assert all(row.keys() == gaps for row in report["baselines"].values())
    assert (float(weights(world.path / "rm")["gain"]), float(weights(world.path / "rm")["bias"])) != (1, 0)


def test_ppo_then_evaluation(world, tmp_path):
    """The end of the pipeline, as a user starts it; summary.json has what the demo promises."""
    run, out = tmp_path / "ppo", tmp_path / "evaluation"
    done = world.spawn(world.command("train_ppo.py", out=run))
    assert (done.code, done.err) == (0, "") and done.out.count("PASS") == 6 and "FAIL" not in done.out
    rows = lines(run / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3] and rows[-1]["episode"] == 64
    assert all(row.keys() == PPO_METRICS for row in rows)
    assert [row["objective/kl"] > 0 for row in rows] == [False, True, True, True]
    samples = lines(run / "samples.jsonl")
    assert [row["step"] for row in samples] == [1] * 8 + [3] * 8
    assert {"score", "kl", "prompt", "response"} <= samples[0].keys()
    for row in samples:
        columns = [row[name] for name in ("tokens", "logprobs", "ref_logprobs", "values", "rewards", "advantages")]
        assert len({len(column) for column in columns}) == 1
        assert "".join(row["tokens"]).strip() == row["response"].strip()
        assert abs(sum(row["logprobs"]) - sum(row["ref_logprobs"]) - row["kl"]) < 1e-4 * 2 * len(row["tokens"])
    assert json.loads((run / "report.json").read_text())["iterations"] == 4

    done = world.run("evaluate.py", tuned=run, out=out, sources="", prompt_tokens=8)
    assert (done.code, done.err) == (0, "")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rm"].keys() >= {"accuracy", "accuracy_gap1"}
    for name in ("rules", "bow", "length"):
        assert summary["rm"]["baselines"][name].keys() >= {"accuracy", "accuracy_gap1"}
    report = json.loads((world.path / "rm/report.json").read_text())
    assert (summary["rm"]["accuracy"], summary["rm"]["accuracy_gap1"]) == (
        report["accuracy"]["all"],
        report["accuracy"]["1"],
    )
    promised = "judge_before judge_after reward_before reward_after kl distinct3_before distinct3_after".split()
    assert all(math.isfinite(summary["ppo"][name]) for name in promised)
    assert summary["seconds"].keys() >= {"lm", "rm", "ppo", "evaluate", "total"}
    stages = [x for name, x in summary["seconds"].items() if name != "total"]
    assert all(x > 0 for x in stages) and summary["seconds"]["total"] == pytest.approx(sum(stages))
    assert list(summary["rows"]) == ["base", "tuned", "best of 4"] and summary["rows"]["base"]["kl"] == 0
    pairs = lines(out / "samples.jsonl")
    assert len(pairs) == summary["prompts"] == 5 and pairs[0].keys() == {"before", "after"}
    for pair, row in zip(pairs, lines(out / "tokens.jsonl"), strict=True):
        for when in ("before", "after"):
            answer = row[when]
            assert pair[when] == row["prompt"] + "".join(answer["tokens"])
            log_ratio = np.subtract(answer["logprobs"], answer["ref_logprobs"])
            assert len(log_ratio) == len(answer["tokens"]) and np.all(np.array(answer["logprobs"]) <= 0)
            if when == "after":
                assert log_ratio.sum() == pytest.approx(answer["kl"], abs=1e-2)
    assert (out / "results.md").read_text().strip() in done.out
    assert done.out.count("before:") == 5


def test_evaluating_a_model_against_itself_is_a_draw(world, tmp_path):
    """Both draw with the same random numbers, so nothing may differ; and any Python function can judge."""
    world.ok("evaluate.py", out=tmp_path, judge="rewards.py:shorter", sources="", prompts=16)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rows"]["base"] == summary["rows"]["tuned"]
    assert summary["ppo"]["win_rate_judge"]["mean"] == 0.5 and summary["ppo"]["judge_gain"]["mean"] == 0


@pytest.mark.slow
def test_pairs_and_random_weights(world, tmp_path):
    world.ok(
        "train_rm.py", out=tmp_path / "rm", objective="pairs", pooling="last", reset="true", micro_batch=4, epochs=0.1
    )
    rows = lines(tmp_path / "rm/metrics.jsonl")
    assert rows[0]["loss/train"] == pytest.approx(math.log(2), abs=0.5)  # Bradley-Terry of two equal scores
    assert rows[-1]["loss/train"] < 2 * math.log(2)


# ---- every choice of train_ppo.py


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_critic(world, tmp_path, critic):
    rows = ppo(world, tmp_path / "ppo", critic=critic, minibatches=2, epochs=3)
    assert rows[0]["value/mean"] == 0 and rows[1]["value/mean"] != 0  # the head starts at zero, and learns
    assert [row["policy/epochs_run"] for row in rows] == [3] * 4
    names = weights(tmp_path / "ppo")
    assert any(name.startswith("value_trunk") for name in names) == (critic == "separate")


def test_values_on_the_reward_models_score_of_the_text_so_far(world, tmp_path):
    """It says something before the critic has learned; a function cannot, and of a sum the reward model does."""
    rows = ppo(world, tmp_path / "ppo", value_base="reward")
    assert rows[0]["value/mean"] != 0 and rows[0]["value/explained_var"] > 0.1
    first = rows[0]  # no reward is changed:
    assert first["objective/rlhf_reward"] == pytest.approx(first["objective/scores"], abs=1e-5)
    both = "rewards.py:shorter:0.1,rm"
    world.ok("train_ppo.py", out=tmp_path / "sum", value_base="reward", reward=both, iterations=1)
    assert lines(tmp_path / "sum/metrics.jsonl")[0]["value/mean"] == pytest.approx(rows[0]["value/mean"], rel=1e-5)
    wrong = world.run("train_ppo.py", out=tmp_path / "no", value_base="reward", reward="rewards.py:shorter")
    assert wrong.code == 2
    assert "holds no reward model of train_rm.py, which alone scores a text that is not ended" in wrong.err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce++"])
def test_estimators_without_a_critic(world, tmp_path, estimator):
    rows = ppo(world, tmp_path / "ppo", estimator=estimator, samples_per_prompt=4)
    assert all(row["value/mean"] == row["value/explained_var"] == 0 for row in rows)
    assert not any(name.startswith("value") for name in weights(tmp_path / "ppo"))
    assert any(row["objective/kl"] != 0 for row in rows)
    samples = lines(tmp_path / "ppo/samples.jsonl")
    assert len({row["prompt"] for row in samples[:4]}) == 1  # a group answers the same prompt


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(world, tmp_path, estimator):
    ppo(world, tmp_path / "ppo", kl_estimator=estimator, kl_coef=0.5, iterations=3, eos_penalty=1.0)


def test_adaptive_kl_moves_towards_its_target(world, tmp_path):
    options = {"kl_control": "adaptive", "kl_horizon": 100, "iterations": 5}
    low = ppo(world, tmp_path / "low", kl_target=1e-3, **options)
    high = ppo(world, tmp_path / "high", kl_target=100.0, **options)
    assert low[-1]["objective/kl_coef"] > 0.1 > high[-1]["objective/kl_coef"]
    assert low[0]["objective/kl_coef"] == high[0]["objective/kl_coef"] == 0.1


def test_target_approxkl_ends_an_iteration(world, tmp_path):
    rows = ppo(world, tmp_path / "ppo", target_approxkl=1e-7, epochs=4, lr=1e-2, decay="constant")
    assert all(row["policy/epochs_run"] < 4 for row in rows)


def test_max_kl_ends_the_run_for_good(world, tmp_path):
    """At the last policy that kept it: the one that did not is taken back, and its KL is in metrics and report."""
    options = {"max_kl": 2.0, "lr": 1e-3, "iterations": 40, "checkpoint_every": 10, "kl_coef": 0.0}
    world.ok("train_ppo.py", out=tmp_path / "ppo", **options)
    rows = lines(tmp_path / "ppo/metrics.jsonl")
    kls = [row["objective/kl"] for row in rows]
    assert 2 < len(rows) < 40 and max(kls[:-1]) <= 2.0 < kls[-1] and all(row.keys() == PPO_METRICS for row in rows)
    report = json.loads((tmp_path / "ppo/report.json").read_text())
    kept = len(rows) - 2  # iterations behind the policy of the row before the last
    assert report["stopped"] and report["iterations"] == kept and report["objective/kl"] <= 2.0
    assert report["brake"] == {
        "name": "max_kl", "limit": 2.0, "objective/kl": kls[-1], "mean_of": 1, "iteration": kept + 1, "restored": kept
    }  # fmt: skip
    before = weights(tmp_path / "ppo")
    world.ok("train_ppo.py", out=tmp_path / "ppo", **options)  # the same command again: nothing left to do
    assert lines(tmp_path / "ppo/metrics.jsonl") == rows
    assert all(torch.equal(x, before[name]) for name, x in weights(tmp_path / "ppo").items())


def test_a_python_function_as_the_reward(world, tmp_path):
    """No reward model is needed; shorter responses score better, and the policy finds out."""
    rows = ppo(
        world, tmp_path / "ppo", reward="rewards.py:shorter", sources="", prompt_tokens=2, batch=32,
        iterations=12, lr=1e-2, kl_coef=0.0, checkpoint_every=12,
    )  # fmt: skip
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 3


def test_other_knobs(world, tmp_path):
    ppo(
        world, tmp_path / "ppo", clip=0.1, clip_high=0.3, dual_clip=3.0, value_clip="none", entropy_coef=0.01, gamma=0.99,
        lam=1.0, temperature=0.7, grad_clip=0, weight_decay=0.1, decay="cosine", minibatches=2, micro_batch=4,
    )  # fmt: skip


@pytest.mark.slow
def test_the_policy_of_one_run_starts_another(world, tmp_path):
    """A policy checkpoint is a language model: PPO goes on from it, and it is the new reference."""
    ppo(world, tmp_path / "one", critic="separate")
    ppo(world, tmp_path / "two", init=tmp_path / "one")
    world.ok("train_lm.py", init=tmp_path / "two", width=None, layers=None, heads=None, out=tmp_path / "lm", epochs=1)


def test_micro_batches_change_memory_and_nothing_else(world, tmp_path):
    whole = ppo(world, tmp_path / "whole")
    parts = ppo(world, tmp_path / "parts", micro_batch=4)
    assert_same(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["joint", "regression"])
def test_micro_batches_by_tokens_change_no_reward_model(world, tmp_path, objective):
    rows = []
    for name, cut in (("whole", {}), ("tokens", {"micro_batch_tokens": 120})):
        world.ok("train_rm.py", out=tmp_path / name, objective=objective, epochs=0.2, log_every=1, eval_every=50, **cut)
        rows.append(lines(tmp_path / name / "metrics.jsonl"))
    assert_same(*rows, iterations=20)


# ---- one process and two (the exactness promise of data-parallel training)

# Not compared: seconds, throughput and memory; and how far float32 rounding puts the sampler's log-probs from those of the
# training forward, which is noise of 1e-7 in itself.
NOISE = ("time/", "perf/", "rollout/logprob_diff")


def assert_same(one: list[dict], two: list[dict], iterations: int = 3) -> None:
    """Equal to 1e-4 relative; 1e-6 absolute, because a KL of exactly 0 has no relative error."""
    assert len(one) == len(two) and one[0].keys() == two[0].keys()
    for a, b in zip(one[:iterations], two[:iterations]):
        for name in a:
            if not name.startswith(NOISE):
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), (a["step"], name)


GROUPS = pytest.param({"estimator": "grpo", "samples_per_prompt": 2}, marks=pytest.mark.slow)
BASE = pytest.param({"value_base": "reward", "minibatches": 2}, marks=pytest.mark.slow)


@pytest.mark.parametrize("options", [{"minibatches": 2}, GROUPS, BASE], ids=str)
def test_one_process_and_two_report_the_same(world, tmp_path, options):
    one = ppo(world, tmp_path / "one", **options)
    done = world.together(world.command("train_ppo.py", out=tmp_path / "two", **options), 2)
    assert done.code == 0, done.err
    assert done.out.count("PASS") == 6  # one rank prints
    two = lines(tmp_path / "two/metrics.jsonl")
    assert_same(one, two, iterations=4)
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(x, theirs[name], rtol=1e-3, atol=1e-5) for name, x in ours.items())


@pytest.mark.slow
def test_one_process_and_two_pretrain_and_judge_the_same(world, tmp_path):
    for script, run in (("train_lm.py", "lm"), ("train_rm.py", "rm")):
        done = world.together(world.command(script, out=tmp_path / run), 2)
        assert done.code == 0, done.err
        assert_same(lines(world.path / run / "metrics.jsonl"), lines(tmp_path / run / "metrics.jsonl"), iterations=6)


# ---- sample.py


def test_one_shot(world):
    out = world.ok("sample.py", prompt="The film is")
    assert out.startswith("The film is") and out.count("\n") >= 1
    assert world.ok("sample.py", prompt="The film is") == out  # the same seed, the same text
    assert world.ok("sample.py", prompt="The film is", seed=2) != out
    greedy = {world.ok("sample.py", prompt="The film is", temperature=0, seed=seed) for seed in (1, 2)}
    assert len(greedy) == 1


def test_json_and_samples(world):
    rows = [
        json.loads(line) for line in world.ok("sample.py", prompt="The", samples=5, json="true", top_k=20).splitlines()
    ]
    assert len(rows) == 5 and len({row["text"] for row in rows}) > 1
    assert all(row["prompt"] == "The" and row["text"].startswith("The") for row in rows)
    assert all(row["logprob"] < 0 and 1 <= row["tokens"] <= 8 for row in rows)


def test_a_file_of_prompts(world, tmp_path):
    prompts = [f"The {word} film" for word in ("dull", "sharp", "caf\u00e9")] * 30  # 90: more than one group of 64
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts), encoding="utf-8")
    out = world.ok("sample.py", prompts=tmp_path / "prompts.txt", json="true")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == prompts


def test_interactive(world):
    """Line by line until an empty one; the end of the input is as good."""
    command = world.command("sample.py", temperature=0)
    done = world.spawn(command, stdin="The film\nThe plot\n\nnever asked\n")
    assert (done.code, done.err) == (0, "")
    assert "The film" in done.out and "The plot" in done.out and "never" not in done.out
    assert world.spawn(command, stdin="The film").code == 0


def test_a_terminal_has_arrow_keys(world):
    """The arrow up brings the line before back; Ctrl-D ends it (Ctrl-C: tests/test_terminal.py)."""
    pytest.importorskip("readline")
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "sample.py"), *world.command("sample.py", temperature=0, json=True)[1:]]
    process = subprocess.Popen(
        command, cwd=world.path, env=world.environment(TERM="dumb"), stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    os.close(theirs)

    seen = ""

    def until(text: str) -> str:
        """What it shows up to and with this text."""
        nonlocal seen
        while text not in seen:
            seen += os.read(ours, 1024).decode(errors="replace")
        shown, found, seen = seen.partition(text)
        return shown + found

    until("> ")
    os.write(ours, b"The film\n")
    first = until('"tokens"')
    until("> ")
    os.write(ours, b"\x1b[A\n")  # the arrow up
    again = until('"tokens"')
    prompt = '"prompt": "The film"'
    assert prompt in first and prompt in again
    until("> ")
    os.write(ours, b"\x04")
    assert process.wait(timeout=300) == 0
    assert process.stderr.read() == "Ctrl-C stops an answer; Ctrl-D or an empty line ends\n"
    os.close(ours)


# ---- --help


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_option(world, script):
    done = world.start([f"{script}.py", "--help"]).wait()
    assert (done.code, done.err) == (0, "")
    for field in dataclasses.fields(importlib.import_module(script).Config):
        entry = re.search(rf"^  --{field.name}=(\S*)\s+(.*(?:\n {{30,}}.*)*)", done.out, re.MULTILINE)
        assert entry, f"{script}.py --help does not mention {field.name}"
        default, text = entry.groups()
        assert default == show(field.default)
        meaning, kind = re.fullmatch(r"(.*)\[(.*)\]", " ".join(text.split())).groups()
        assert len(meaning) > 4 and kind, f"{script}.py: {field.name} has no comment"


@pytest.mark.parametrize("job", [[], ["vader"]])
def test_help_of_data_prepare(world, job):
    done = world.start(["data.prepare", *job, "--help"]).wait()
    assert (done.code, done.err) == (0, "") and "usage" in done.out
    if job:
        assert "--out" in done.out and "--vocab_size" in done.out
