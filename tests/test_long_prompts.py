"""PPO as people want it: word problems of 40 to 400 tokens with an `answer` column, two rewards with components, flat groups
sampled again, micro-batches by tokens. Two ranks are one; kill -9 changes no bit; what cannot be is refused in one line."""

import json

import pytest
from test_bad_input import refused
from test_resume import assert_equal_runs, killed_after
from tiny import ROOT, lines

from data.loader import open_data, prompts_of

pytestmark = pytest.mark.slow
CONTEXT, RESPONSE = 512, 12
GRADED = """
def graded(responses, answer, messages):
    assert all(len(m[-1]["content"]) > 40 for m in messages)
    said = [a.rpartition("####")[2].strip()[-1] in r for r, a in zip(responses, answer)]
    return {"digit": [float(x) for x in said], "length": [len(r) / 20 for r in responses]}

def one(responses):
    return [1.0] * len(responses)

def fails(responses, answer):
    return [1 / (len(r) > 10**6) for r in responses]
"""
PPO = {
    "batch": 16, "minibatches": 2, "samples_per_prompt": 2, "response_tokens": RESPONSE, "iterations": 6, "checkpoint_every": 2,
    "micro_batch_tokens": 900, "resample_flat": "true", "resample_tries": 2, "sources": "", "kl_coef": 0.05, "lr": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(world, tmp_path_factory):
    """A language model with a context of 512, and the questions in its tokens."""
    home = tmp_path_factory.mktemp("long")
    world.ok("train_lm.py", out=home / "lm", context=CONTEXT, epochs=1, batch=8, layers=1, log_every=50, eval_every=50)
    rows = []
    for i in range(80):
        story = " ".join(f"Ann has {(i * k) % 9} apples and {k} pears." for k in range(2, 3 + i % 14))
        rows.append({"prompt": f"{story} How many are there?", "answer": f"Add them all up.\n#### {i * 7 % 100}"})
    (home / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "r.py").write_text(GRADED)
    prepare = ["data.prepare", str(home / "questions.jsonl"), "--tokenizer=data", f"--out={home / 'data'}"]
    done = world.start(prepare).wait()
    assert (done.code, done.err) == (0, ""), done
    lengths = open_data(home / "data", "train").prompt_lengths()
    assert lengths.min() >= 40 and 250 < lengths.max() <= 400, (lengths.min(), lengths.max())
    return home


def options(home, **changes) -> dict:
    reward = f"{ROOT / 'rewards' / 'verify.py'}:number:2,{home / 'r.py'}:graded:0.5:length=-0.1"
    return PPO | {"init": home / "lm", "data": home / "data", "reward": reward} | changes


def test_one_rank_is_two(world, home, tmp_path):
    for name, ranks in (("one", 0), ("two", 2)):
        done = world.together(world.command("train_ppo.py", out=tmp_path / name, **options(home, iterations=4)), ranks)
        assert done.code == 0, done
    one, two = (lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    assert (
        sum(row["group/resampled"] for row in one) > 0
        and {"reward/number", "reward/digit", "reward/length"} <= one[0].keys()
    )
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in a.keys() - {x for x in a if x.startswith(("time/", "perf/"))}:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-4), (a["step"], name)
        assert a["policy/ratio_first"] == pytest.approx(1, abs=1e-6)


def test_kill_9_and_the_same_command_again(world, home, tmp_path):
    world.ok("train_ppo.py", out=tmp_path / "undisturbed", **options(home))
    command = world.command("train_ppo.py", out=tmp_path / "killed", **options(home))
    assert killed_after(world, tmp_path / "killed", 3, command)
    world.ok("train_ppo.py", out=tmp_path / "killed", **options(home))
    assert_equal_runs(tmp_path / "killed", tmp_path / "undisturbed")


def test_micro_batches_by_tokens_are_those_by_rows(world, home, tmp_path):
    """Also where each of two ranks has a part of the weights, so that both need the same number of forwards."""
    plain = {"micro_batch_tokens": None, "micro_batch": 2}
    for name, changes, ranks in (("rows", plain, 0), ("tokens", {}, 0), ("shards", {"shard": "true"}, 2)):
        command = world.command("train_ppo.py", out=tmp_path / name, **options(home, iterations=2, **changes))
        assert world.together(command, ranks).code == 0
    first, *others = (lines(tmp_path / name / "metrics.jsonl") for name in ("rows", "tokens", "shards"))
    for other in others:
        for a, b in zip(first, other, strict=True):
            for name in a.keys() - {x for x in a if x.startswith(("time/", "perf/", "rollout/"))}:
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
            assert b["policy/ratio_first"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"response_tokens": 512}, ("response of 512", "context of 512")),
        ({"max_prompt": 501}, ("prompt of 501", "12", "512")),
        ({"max_prompt": 10}, ("leaves nothing to visit", "longer than 10 tokens")),
        ({"micro_batch_tokens": 200}, ("--micro_batch_tokens allows a micro-batch 200 tokens", "--max_prompt=188")),
        ({"micro_batch": 2}, ("give one",)),
        ({"prompt_tokens": 4}, ("--prompt_tokens=4", "prompts of its own")),
        ({"batch": 400}, ("200", "rows")),
        ({"data": "questions.jsonl"}, ("is a file", "python -m data.prepare", "--tokenizer=")),
        ({"reward": "r.py:fails"}, ("ZeroDivisionError", "on row", "prompt 'Ann has", "response '")),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(world, home, tmp_path, changes, said):
    for name in ("data", "reward"):
        if name in changes:
            changes = changes | {name: f"{home}/{changes[name]}"}
    refused(world.run("train_ppo.py", out=tmp_path / "ppo", **options(home, **changes)), *said)
    if "reward" not in changes:
        assert not (tmp_path / "ppo" / "metrics.jsonl").exists()


def test_who_cannot_read_the_longest_answer_is_refused_first(world, home, tmp_path):
    """The reward model, PPO's judge and evaluate.py's: a context of 256 with prompts of up to 400 tokens."""
    rm, said = world.path / "rm", ("reads 256 tokens", f"a response up to {RESPONSE}", f"--max_prompt={256 - RESPONSE}")
    for how in ({"reward": rm, "weak_reward": "true"}, {"judge": rm, "judge_prompts": 8}):
        out = tmp_path / next(iter(how))
        refused(world.run("train_ppo.py", out=out, **options(home, **how)), next(iter(how)), *said)
        assert not (out / "metrics.jsonl").exists()
    asked = {"base": home / "lm", "tuned": home / "lm", "data": home / "data", "sources": "", "reward": rm}
    done = world.run("evaluate.py", out=tmp_path / "evaluation", response_tokens=RESPONSE, split="validation", **asked)
    refused(done, "the reward model", *said)


def test_long_prompts_are_dropped_or_cut_and_counted(world, home, tmp_path):
    data = open_data(home / "data", "train")
    long = int((data.prompt_lengths() > 150).sum())
    for how, said in (
        ("drop", f"left out: {long} longer than 150 tokens"),
        ("left", f"{long} prompts cut from the left"),
    ):
        more = {"max_prompt": 150, "long_prompts": how, "iterations": 1, "batch": 8}
        assert said in world.ok("train_ppo.py", out=tmp_path / how, **options(home, **more))
    loader = prompts_of(data, 4, 1, context=CONTEXT, response_tokens=RESPONSE, max_prompt=150, long_prompts="left")
    assert max(int(loader.batch(step).prompt_lengths.max()) for step in range(8)) == 150 == loader.longest


def test_responses_of_one_token_and_groups_that_are_all_equal(world, home, tmp_path):
    """A response of nothing but its end is an empty text, and earns what the reward says of that."""
    world.ok("train_ppo.py", out=tmp_path / "one", **options(home, response_tokens=1, iterations=2))
    assert all(row["response/length"] == 1 for row in lines(tmp_path / "one" / "metrics.jsonl"))
    flat = options(home, reward=f"{home / 'r.py'}:one", estimator="grpo", iterations=2)
    world.ok("train_ppo.py", out=tmp_path / "flat", **flat)
    for row in lines(tmp_path / "flat" / "metrics.jsonl"):
        assert (row["group/flat"], row["group/resampled"], row["objective/scores"]) == (1, 16, 1)
