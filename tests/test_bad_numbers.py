"""Bad numbers, by real runs: the step is skipped, counted, stored and computed again; several in a row end the run."""

import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_bad_input import refused
from test_resume import assert_equal_runs, killed_after, numbers, wait_for
from tiny import Done, lines

from rlhf.infra import checkpoint, config
from rlhf.infra.brakes import LARGEST, Finding, Formula, first_bad, in_words
from rlhf.lm.pretrained import open_pretrained
from rlhf.replay.__main__ import FORMULAS, precision_of

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

def nan(prompts, responses):
    return [float("nan") if i == 3 else 1.0 for i, _ in enumerate(responses)]

def inf(prompts, responses):
    return [float("inf")] * len(responses)

def text(prompts, responses):
    return responses

def too_few(prompts, responses):
    return [1.0]

def leaves(prompts, responses):
    raise SystemExit(0)

def raises(prompts, responses, calls=[0]):
    calls[0] += 1
    if calls[0] == 3:
        raise KeyError("gone")
    return [-float(len(response)) for response in responses]

def constant(prompts, responses):
    return [1.0] * len(responses)

def nan_on_the_second_rank(prompts, responses):
    return [float("nan") if os.environ.get("RANK") == "1" else 1.0 for _ in responses]

def second_rank(prompts, responses, calls=[0]):
    calls[0] += 1
    bad = os.environ.get("RANK") == "1" and calls[0] == 2
    return [3e30 if bad and i == 3 else -float(len(r)) for i, r in enumerate(responses)]
"""


@pytest.fixture
def run(world, tmp_path):
    """train_ppo.py with one of REWARDS; -> how it ended, and its directory."""
    (tmp_path / "bad.py").write_text(REWARDS)

    def go(
        name: str = "ppo", reward: str | None = None, ranks: int = 0, torchrun=False, **options
    ) -> tuple[Done, Path]:
        options |= {"reward": f"{tmp_path}/bad.py:{reward}"} if reward else {}
        command = world.command("train_ppo.py", out=tmp_path / name, **options)
        return (world.spawn if torchrun else world.together)(command, ranks), tmp_path / name

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


def test_a_run_in_half_precision_is_replayed_to_the_bit(world, run, monkeypatch):
    """Also what the frozen layers below a branch made of the texts: the ratio before the first update is 1."""
    branch = {"layout": "branch", "branch_layers": 1, "precision": "bf16", "iterations": 1, "epochs": 1}
    done, out = run(max_value_loss=0, max_bad_steps=99, **branch)  # no step is taken
    assert done.code == 0, done.err
    monkeypatch.chdir(world.path)  # the base is named from there
    file, cpu = min(out.glob("bad/*.safetensors")), torch.device("cpu")
    record = json.loads(file.with_suffix(".json").read_text())
    saved, precision = checkpoint.load(file.parent / record["model"]), precision_of(record["options"], cpu)
    tensors = load_file(file)
    found = {x.name: x.x for x in FORMULAS[record["script"]](record, {**tensors}, saved, cpu, precision)}
    assert torch.equal(found["ratio"], tensors["mask"].to(found["ratio"].dtype))


# ---- max_kl


JUMPS = {
    "max_kl": 2.0, "max_kl_window": 2, "lr": 4e-4, "kl_coef": 0.0, "iterations": 40,
    "checkpoint_every": 3, "sample_every": 5,
}  # fmt: skip


@pytest.mark.slow
def test_max_kl_brings_back_the_weights_of_the_last_policy_that_kept_it(world, run):
    """Bit for bit those of a run without a bound at that iteration."""
    done, out = run("bounded", **JUMPS)
    kept = json.loads((out / "report.json").read_text())["brake"]["restored"]
    assert done.code == 0 and checkpoint.resolve(out).name == f"step_{kept:06d}" and kept > 0
    kls = [row["objective/kl"] for row in lines(out / "metrics.jsonl")]
    means = [(kls[max(0, i - 1)] + kl) / 2 for i, kl in enumerate(kls)]
    assert max(means[:-1]) <= 2.0 < means[-1] == json.loads((out / "report.json").read_text())["brake"]["objective/kl"]
    free = {name: x for name, x in JUMPS.items() if "max_kl" not in name}
    free |= {"checkpoint_every": 1, "keep_checkpoints": "none"}
    process = world.start(world.command("train_ppo.py", out=out.parent / "free", **free))
    assert wait_for(lambda: (out.parent / f"free/step_{kept + 1:06d}/config.json").exists(), process.process.is_alive)
    process.process.kill()
    process.wait()
    ours, theirs = (load_file(path / "model.safetensors") for path in (
        checkpoint.resolve(out), out.parent / f"free/step_{kept:06d}"))  # fmt: skip
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert numbers(out)[:kept] == numbers(out.parent / "free")[:kept]


@pytest.mark.slow
@pytest.mark.bits
def test_a_bounded_run_resumes_exactly(world, tmp_path):
    """Killed, and stopped by a signal, which waits until the policy has shown its KL: the bound breaks at the same place."""
    world.ok("train_ppo.py", out=tmp_path / "undisturbed", **JUMPS)
    total = len(lines(tmp_path / "undisturbed/metrics.jsonl"))
    command = world.command("train_ppo.py", out=tmp_path / "killed", **JUMPS)
    assert total > 5
    killed = [killed_after(world, tmp_path / "killed", at_least, command) for at_least in (2, total // 2, total - 1)]
    assert any(killed)
    assert world.start(command).wait().code == 0
    assert_equal_runs(tmp_path / "killed", tmp_path / "undisturbed")

    command = world.command("train_ppo.py", out=tmp_path / "stopped", **JUMPS)
    running = world.start(command)
    wait_for(lambda: len(lines(tmp_path / "stopped/metrics.jsonl")) >= 2, running.process.is_alive)
    os.kill(running.process.pid, signal.SIGTERM)
    done = running.wait()
    assert done.code in (128 + signal.SIGTERM, 0), done
    assert checkpoint.latest(tmp_path / "stopped")
    assert world.start(command).wait().code == 0
    assert_equal_runs(tmp_path / "stopped", tmp_path / "undisturbed")


def test_max_kl_of_a_run_with_one_iteration(run):
    """Its only update is judged as well: the policy acts once more."""
    done, out = run(lr=0.03, max_kl=0.5, iterations=1)
    assert done.code == 0 and "the one after 0, which kept it, is restored" in done.out
    assert [row["objective/kl"] > 0.5 for row in lines(out / "metrics.jsonl")] == [False, True]
    assert re.search(r"doctor: max_kl reached: the policy after 1 iterations was \d+\.\d\d nats", done.out), done.out


@pytest.mark.slow
def test_the_best_policy_kept_the_bound(run, tmp_path):
    """A judge that likes every policy more than the one before; the last of them went too far."""
    judge = tmp_path / "judge.py"
    judge.write_text(
        "calls = 0\ndef later(responses):\n    global calls\n    calls += 1\n    return [float(calls)] * len(responses)\n"
    )
    more = {"judge": f"{judge}:later", "judge_every": 1, "judge_prompts": 1}
    done, out = run(**JUMPS | more)
    assert done.code == 0, done
    report = json.loads((out / "report.json").read_text())
    assert 0 < report["brake"]["restored"] and "is restored" in done.out
    assert checkpoint.load(out / "best").state["done"] == report["best"]["iterations"] == report["brake"]["restored"]


# ---- resuming, ranks, the doctor


@pytest.mark.slow
@pytest.mark.bits
def test_skipped_steps_survive_a_kill(world, tmp_path):
    """The count in a row is in the checkpoint, and the files of bad steps are written again with the same bytes."""
    (tmp_path / "bad.py").write_text(REWARDS)
    options = {"reward": f"{tmp_path}/bad.py:funny", "iterations": 12, "checkpoint_every": 1, "max_bad_steps": 99}
    world.ok("train_ppo.py", out=tmp_path / "undisturbed", **options)
    assert 0 < sum(row["bad/steps"] for row in lines(tmp_path / "undisturbed/metrics.jsonl"))
    command = world.command("train_ppo.py", out=tmp_path / "killed", **options)
    for at_least in (3, 7):
        killed_after(world, tmp_path / "killed", at_least, command)
    assert world.start(command).wait().code == 0
    assert_equal_runs(tmp_path / "killed", tmp_path / "undisturbed")
    ours, theirs = (
        {file.name: file.read_bytes() for file in (tmp_path / name / "bad").glob("*.*")}
        for name in ("killed", "undisturbed")
    )
    differing = [name for name in theirs if name.endswith(".safetensors") and ours.get(name) != theirs[name]]
    assert ours.keys() == theirs.keys() and not differing


@pytest.mark.slow
def test_a_bad_number_on_the_second_rank_alone(world, run):
    """Both skip, count and go on together, with the same weights as one process that meets it."""
    done, out = run("two", ranks=2, reward="second_rank")
    assert done.code == 0 and "step 1: skipped, scores = 3e+30" in done.out, done.err
    assert [row["bad/steps"] for row in lines(out / "metrics.jsonl")] == [0, 1, 0, 0]
    done, _ = run("dead", ranks=2, torchrun=True, reward="huge")
    assert done.code == 1 and done.err.count("error: 3 steps in a row were skipped") == 1
    assert done.err.index("scores = -1e+38") < done.err.index("ChildFailedError")


def test_the_doctor_names_skipped_steps(world, run):
    _, out = run(reward="huge")
    done = world.start(["rlhf.doctor", str(out)]).wait()
    assert done.code == 1 and done.out.startswith("doctor: bad numbers: 3 skipped steps are stored, 3 for scores")
    assert f"Try python -m rlhf.replay {out}/bad/000002.safetensors" in done.out


# ---- bad input


@pytest.mark.parametrize("option", ["lr", "kl_coef", "value_coef", "eos_penalty", "temperature", "max_ratio", "clip"])
@pytest.mark.parametrize("value", ["inf", "nan", "-inf", "1e999"])
def test_options_refuse_what_is_not_finite(option, value):
    import train_ppo

    with pytest.raises(ValueError, match=f"--{option}={value} is not valid"):
        config.parse(train_ppo.Config, [f"--{option}={value}"])


@pytest.mark.parametrize("value", [11, 1e9])
def test_a_temperature_at_which_every_token_is_alike(value):
    import train_ppo

    with pytest.raises(ValueError, match="temperature=.* is too large; it must be at most 10"):
        config.parse(train_ppo.Config, [f"--temperature={value}"])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("kind", ["hf", "ours"])
def test_a_damaged_init_is_refused_by_its_tensor(world, tmp_path, kind, value):
    if kind == "hf":
        done = world.start(["export.py", "--init=lm", f"--out={tmp_path}/init", "--format=hf"]).wait()
        assert done.code == 0, done.err
        path, name = tmp_path / "init/model.safetensors", "model.layers.1.mlp.up_proj.weight"
        tensors = {key: x.clone() for key, x in load_file(path).items()}
        tensors[name][3, 5] = value
        save_file(tensors, path)
        name = name.removeprefix("model.")
    else:
        saved = checkpoint.load(world.path / "lm")
        name, tensors = "layers.1.mlp.up_proj.weight", {key: x.clone() for key, x in saved.tensors.items()}
        tensors[name][3, 5] = value
        files = [saved.path / file for file in saved.files if file.startswith(("bpe", "tokenizer"))]
        checkpoint.save(tmp_path / "init", tensors, saved.config, saved.state, files=files)
    with pytest.raises(ValueError, match=f"{name}'? holds {re.escape(f'{value:g}')}") as error:
        open_pretrained(tmp_path / "init")
    assert "damaged" in str(error.value) and "\n" not in str(error.value)


# ---- every row of the table of bad numbers that were once provoked by hand, with its verdict now

DIED = "3 steps in a row were skipped"
ROWS = {  # what is provoked: (script, options, exit code, words of the one line or, where it ends well, of the output)
    "reward nan": ("train_ppo.py", {"reward": "bad.py:nan"}, 2, ("bad.py:nan", "nan", "response")),
    "reward inf": ("train_ppo.py", {"reward": "bad.py:inf"}, 2, ("bad.py:inf", "inf", "response")),
    "reward text": ("train_ppo.py", {"reward": "bad.py:text"}, 2, ("bad.py:text",)),
    "reward too few": ("train_ppo.py", {"reward": "bad.py:too_few"}, 2, ("bad.py:too_few", "16")),
    "reward calls SystemExit(0)": ("train_ppo.py", {"reward": "bad.py:leaves"}, 2, ("bad.py:leaves",)),
    "reward raises in its 3rd call": ("train_ppo.py", {"reward": "bad.py:raises"}, 2, ("bad.py:raises", "gone")),
    "reward constant, gae": (
        "train_ppo.py", {"reward": "bad.py:constant", "iterations": 6}, 0, ("doctor: constant reward",)),
    "reward constant, rloo, kl_coef 0": (
        "train_ppo.py",
        {"reward": "bad.py:constant", "iterations": 6, "kl_coef": 0, "estimator": "rloo", "samples_per_prompt": 2},
        0, ("doctor: constant reward",)),
    "rewards of 1e38": ("train_ppo.py", {"reward": "bad.py:huge"}, 2, (DIED, "scores", "--reward")),
    "rewards of 1e6 a character": ("train_ppo.py", {"reward": "bad.py:million"}, 2, (DIED, "value loss", "--reward")),
    **{f"ppo, lr {lr}": ("train_ppo.py", {"lr": lr}, 2, (DIED, "--lr")) for lr in (1e6, 1e30)},
    **{f"lm, lr {lr}": ("train_lm.py", {"lr": lr}, 2, (DIED, "--lr")) for lr in (1e6, 1e30)},
    "rm, lr 1e30": ("train_rm.py", {"lr": 1e30}, 2, (DIED, "--lr")),
    "lr 1e6, one step an iteration": (
        "train_ppo.py", {"lr": 1e6, "epochs": 1, "iterations": 8}, 2, (DIED, "value loss", "--lr")),
    **{f"{name} inf": ("train_ppo.py", {name: "inf"}, 2, (f"--{name}=inf is not valid",))
       for name in ("lr", "kl_coef", "value_coef", "eos_penalty", "temperature")},
    "temperature 1e9": ("train_ppo.py", {"temperature": 1e9}, 2, ("temperature", "at most 10")),
    **{f"{value} in a weight of --init, {script}": (script, {"init": f"init-{value}"}, 2, ("up_proj.weight holds",))
       for value in ("nan", "inf", "1e+30") for script in ("train_ppo.py", "train_lm.py", "train_rm.py")},
    "nan in the reward model": ("train_ppo.py", {"reward": "rm-nan"}, 2, ("rm-nan", "holds nan")),
    "max_kl passed after the first iteration": (
        "train_ppo.py", {"lr": 3e-2, "max_kl": 0.5, "iterations": 3}, 0, ("max_kl reached", "is restored")),
}  # fmt: skip


@pytest.fixture(scope="module")
def damaged(world, votes):
    """Models with one bad weight, beside the whole ones; and the rewards."""
    (world.path / "bad.py").write_text(REWARDS)
    for run, out, value, name in [
        *(("lm", f"init-{x:g}", x, "layers.1.mlp.up_proj.weight") for x in (math.nan, math.inf, 1e30)),
        ("rm", "rm-nan", math.nan, "model.layers.1.mlp.up_proj.weight"),
    ]:
        saved = checkpoint.load(world.path / run)
        tensors = {key: x.clone() for key, x in saved.tensors.items()}
        tensors[name][3, 5] = value
        files = [saved.path / file for file in saved.files if file.startswith(("bpe", "tokenizer"))]
        checkpoint.save(world.path / out, tensors, saved.config, saved.state, files=files)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_what_was_provoked_by_hand(world, damaged, tmp_path, name):
    script, options, code, words = ROWS[name]
    shape = dict.fromkeys(("width", "layers", "heads")) if script == "train_lm.py" and "init" in options else {}
    done = world.run(script, out=tmp_path / "run", **options, **shape)
    if code:
        refused(done, *words)
    else:
        assert (done.code, done.err) == (0, "") and not [word for word in words if word not in done.out], done
    if DIED in words:
        assert lines(tmp_path / "run/metrics.jsonl")[-1]["bad/steps"] >= 1 and stored(tmp_path / "run")


@pytest.mark.slow
def test_nan_of_a_reward_on_the_second_rank_alone(run):
    """The reward function's own line, once, before torchrun's."""
    done, _ = run(ranks=2, torchrun=True, reward="nan_on_the_second_rank")
    assert done.code == 1 and done.err.count("error: ") == 1 and "nan_on_the_second_rank" in done.err.splitlines()[0]
