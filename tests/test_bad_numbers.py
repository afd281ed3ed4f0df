"""Bad numbers, by real runs: the step is skipped, counted, stored and computed again; several in a row end the run."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_bad_input import refused
from tiny import Done, lines

from rlhf.infra import checkpoint
from rlhf.infra.brakes import LARGEST, Finding, Formula, first_bad, in_words

REWARDS = """
import os

def huge(prompts, responses):
    return [1e38 if i % 2 else -1e38 for i in range(len(responses))]

def million(prompts, responses):
    return [1e6 * len(response) for response in responses]

def once(prompts, responses, calls=[0]):
    calls[0] += 1
    return [3e30 if calls[0] == 2 and i == 3 else -float(len(r)) for i, r in enumerate(responses)]

def funny(prompts, responses):  # a function of the text alone, and rarely absurd
    return [3e30 if "weak" in response else -float(len(response)) for response in responses]

def second_rank(prompts, responses, calls=[0]):
    calls[0] += 1
    bad = os.environ.get("RANK") == "1" and calls[0] == 2
    return [3e30 if bad and i == 3 else -float(len(r)) for i, r in enumerate(responses)]
"""


@pytest.fixture
def run(world, tmp_path):
    """train_ppo.py with one of REWARDS; -> how it ended, and its directory."""
    (tmp_path / "bad.py").write_text(REWARDS)

    def go(name: str = "ppo", reward: str | None = None, ranks: int = 0, **options) -> tuple[Done, Path]:
        options |= {"reward": f"{tmp_path}/bad.py:{reward}"} if reward else {}
        command = world.command("train_ppo.py", out=tmp_path / name, **options)
        return world.spawn(command, ranks) if ranks else world.start(command).wait(), tmp_path / name

    return go


def replay(world, file: Path) -> Done:
    return world.start(["rlhf.replay", str(file)]).wait()


def stored(out: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(out.glob("bad/*.json"))]


# ---- what is bad


def slow_first_bad(tensors: list[list[float]], limit: float) -> tuple[int, int] | None:
    for i, row in enumerate(tensors):
        broken = [j for j, x in enumerate(row) if not math.isfinite(x)]
        large = [j for j, x in enumerate(row) if abs(x) > limit]
        if broken or large:
            return i, broken[0] if broken else max(large, key=lambda j: abs(row[j]))
    return None


NUMBER = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([math.nan, math.inf, -math.inf, 1e20, -3e30]))


@given(st.lists(st.lists(NUMBER, min_size=1, max_size=5), max_size=4))
def test_the_first_bad_number_is_found(tensors):
    found = first_bad(Formula(f"f{i}", torch.tensor(x), LARGEST) for i, x in enumerate(tensors))
    expected = slow_first_bad(tensors, LARGEST)
    assert (found and (int(found.formula[1:]), found.row)) == expected


def test_a_mean_blames_its_largest_token():
    x = torch.tensor([[1.0, 2.0], [90.0, 3.0]])
    found = first_bad([Formula("loss", x), Formula("mean loss", x.mean(), 10.0, x)])
    assert found == Finding("mean loss", 24.0, 10.0, row=1, column=0)
    text = {"prompt": "The film", "response": " was\nodd", "tokens": [" was", "\n", "odd"], "start": 0}
    said = in_words(found, [text, text])
    assert said == "mean loss = 24, above 10, row 1, token 0 ' was', of 'The film' | ' was odd'"
    weight = first_bad([Formula("weight head", torch.tensor([[math.inf]]), LARGEST)])
    assert weight == Finding("weight head", math.inf)


# ---- a bad reward


def test_absurd_rewards_end_the_run_and_are_blamed(world, run):
    done, out = run(reward="huge")
    line = refused(
        done, "3 steps in a row were skipped", "step 2", "scores = -1e+38", "row 0", "--reward", "rlhf.replay"
    )
    assert "--lr" not in line
    rows = lines(out / "metrics.jsonl")
    assert [row["bad/steps"] for row in rows] == [1, 1, 1]  # the row of the iteration that died, too
    assert [record["step"] for record in stored(out)] == [0, 1, 2]
    first = stored(out)[0]
    assert first["culprit"]["formula"] == "scores" and first["rows"] == list(range(16)) and len(first["texts"]) == 16
    tensors = load_file(out / "bad/000000.safetensors")
    assert tensors["scores"].abs().min() > 9e37 and tensors["tokens"].shape == tensors["advantages"].shape
    weights = checkpoint.load(out / "bad" / first["model"]).tensors  # no step was taken
    policy = load_file(checkpoint.resolve(world.path / "lm") / "model.safetensors")
    assert all(torch.equal(weights[f"model.{name}"], x) for name, x in policy.items())

    again = replay(world, out / "bad/000001.safetensors")
    assert again.code == 1 and "BAD  scores" in again.out and again.out.count("BAD") == 1
    assert "reproduced: scores = -1e+38, above 1e+18, row 0, of " in again.out
    assert replay(world, out / "bad/000009.safetensors").code == 2


def test_one_bad_iteration_is_skipped_and_the_run_goes_on(world, run):
    done, out = run(reward="once", iterations=4, checkpoint_every=1)
    assert (done.code, done.err) == (0, "") and "step 1: skipped, scores = 3e+30, above 1e+18, row 3" in done.out
    rows = lines(out / "metrics.jsonl")
    assert [row["bad/steps"] for row in rows] == [0, 1, 0, 0]
    assert [row["policy/epochs_run"] for row in rows] == [2, 0, 2, 2]
    again = replay(world, out / "bad/000001.json")  # a reward that counts its calls says something else now
    assert again.code == 0 and "not reproduced" in again.out and "3e+30" in again.out


# ---- an absurd learning rate


ABSURD = {
    "ppo": ("train_ppo.py", {"lr": 1e6}),
    "ppo, one step": ("train_ppo.py", {"lr": 1e6, "epochs": 1, "iterations": 8}),
    "ppo 1e30": ("train_ppo.py", {"lr": 1e30}),
    "ppo full": ("train_ppo.py", {"lr": 1e6, "layout": "full", "epochs": 1, "iterations": 8}),
    "ppo adapters": ("train_ppo.py", {"lr": 1e6, "layout": "adapters", "lora_rank": 4, "epochs": 1, "iterations": 8}),
    "ppo branch": ("train_ppo.py", {"lr": 1e6, "layout": "branch", "branch_layers": 1, "epochs": 1, "iterations": 8}),
    "ppo rloo": ("train_ppo.py", {"lr": 1e6, "estimator": "rloo", "samples_per_prompt": 2, "epochs": 1, "iterations": 8}),
    "lm": ("train_lm.py", {"lr": 1e6, "epochs": 0.5}),
    "lm adapters": (
        "train_lm.py",
        {"lr": 1e30, "epochs": 0.5, "init": "lm", "layout": "adapters", "width": None, "layers": None, "heads": None},
    ),
    "rm": ("train_rm.py", {"lr": 1e30}),
    "rm pairs": ("train_rm.py", {"lr": 1e30, "objective": "pairs", "preferences": "votes"}),
    "rm adapters": ("train_rm.py", {"lr": 1e30, "trunk": "adapters", "depth": 1, "members": 2}),
    "dpo": ("train_dpo.py", {"init": "lm", "data": "votes", "lr": 1e30, "batch": 8, "warmup": 0}),
    "dpo ipo": ("train_dpo.py", {"init": "lm", "data": "votes", "lr": 1e30, "batch": 8, "warmup": 0, "loss": "ipo"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def votes(world):
    """Pairs of answers for train_dpo.py, in the world's tokens."""
    rows = [{"prompt": f"The film {i}", "chosen": f" was lovely {i}.", "rejected": " was dull."} for i in range(60)]
    (world.path / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = world.start(["data.prepare", "votes.jsonl", "--tokenizer=data", "--out=votes"]).wait()
    assert done.code == 0, done.err


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("ppo", "lm"))) for n in ABSURD])
def test_an_absurd_learning_rate_ends_every_trainer(world, votes, tmp_path, name):
    """One line that names the culprit, a row of the metrics for the step that died, files that give the same again."""
    script, options = ABSURD[name]
    options |= {"sources": None, "weak_reward": "true"} if script == "train_ppo.py" else {}
    command = world.command(script, out=tmp_path / "run", **options) if script != "train_dpo.py" else [
        script, f"--out={tmp_path}/run", *(f"--{key}={value}" for key, value in options.items())
    ]  # fmt: skip
    done = world.start(command).wait()
    refused(done, "3 steps in a row were skipped", "use a smaller --lr", "python -m rlhf.replay")
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert rows and rows[-1]["bad/steps"] >= 1 and sum(row["bad/steps"] for row in rows) == 3
    records = stored(tmp_path / "run")
    assert len(records) == 3 and len({record["model"] for record in records}) == 1
    for record in records:
        file = tmp_path / "run/bad" / f"{record['name']}.safetensors"
        again = replay(world, file)
        assert again.code == 1 and "\nreproduced: " in again.out, again
        assert f"BAD  {record['culprit']['formula']}" in again.out


def test_without_a_critic_the_value_loss_is_no_brake(world, run):
    options = {"estimator": "rloo", "samples_per_prompt": 2, "iterations": 2}
    done, out = run(reward="million", **options)
    assert (done.code, done.err) == (0, "") and [row["bad/steps"] for row in lines(out / "metrics.jsonl")] == [0, 0]


def test_rewards_on_a_scale_that_no_critic_can_learn(world, run):
    done, out = run(reward="million")
    refused(done, "mean value loss", "above 1e+06", "--reward", "scale of about 1")
    assert lines(out / "metrics.jsonl")[-1]["loss/value"] > 1e12
    done, out = run("unbounded", reward="million", max_value_loss="none")
    assert done.code == 0 and lines(out / "metrics.jsonl")[0]["bad/steps"] == 0


def test_a_ratio_out_of_bounds_skips_the_step(world, run):
    """The weights stay, so every later update of the same rows is skipped as well; the limit is the lowest that there is."""
    done, out = run(lr=0.03, max_ratio=1, iterations=1, epochs=8, max_bad_steps=99)
    assert done.code == 0 and "skipped, mean ratio = 1." in done.out and ", above 1, row " in done.out
    (row,) = lines(out / "metrics.jsonl")
    assert row["bad/steps"] >= 1 and row["policy/epochs_run"] + row["bad/steps"] == 8
    file = max(out.glob("bad/*.safetensors"))
    assert "\nreproduced: mean ratio" in replay(world, file).out
