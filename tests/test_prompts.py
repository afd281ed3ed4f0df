"""PPO on the prompts of prepared data: any length, and a reward that sees the row."""

import json
import re

import numpy as np
import pytest
from tiny import lines

from data.loader import LENGTH_CLASS, open_data, prompts_of

REWARD = """
def right(prompts, responses, answer, messages):
    assert all(m[-1]["content"].startswith("The film") for m in messages)
    assert all(a == str(len(m[-1]["content"])) for a, m in zip(answer, messages))
    assert all(p == m[-1]["content"] for p, m in zip(prompts, messages))
    return [float(a in r) - len(r) / 100 for a, r in zip(answer, responses)]

def graded(responses, answer):
    return {"right": [float(a in r) for a, r in zip(answer, responses)], "words": [len(r.split()) for r in responses]}

def fails(responses, answer):
    return [1 / (len(a) - 2) for a in answer]

def lacks(responses, gold):
    return [0.0] * len(responses)
"""


@pytest.fixture(scope="module")
def asked(world, tmp_path_factory):
    """Prompts of 3 to 60 tokens with the column `answer`, in the tokens of the world's model."""
    home = tmp_path_factory.mktemp("asked")
    rows = []
    for i in range(120):
        prompt = "The film " + " ".join(["was", "warm", "dull"][k % 3] for k in range(i % 17)) + f" {i}"
        rows.append({"prompt": prompt, "answer": str(len(prompt))})
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "reward.py").write_text(REWARD)
    done = world.start(
        ["data.prepare", str(home / "prompts.jsonl"), "--tokenizer=data", f"--out={home / 'data'}"]
    ).wait()
    assert (done.code, done.err) == (0, ""), done
    return home


def test_a_reward_sees_the_row_that_was_answered(world, asked, tmp_path):
    """Its assertions hold for prompts of all lengths; a step is as wide as its own longest prompt needs."""
    options = {"data": asked / "data", "reward": f"{asked / 'reward.py'}:right", "sources": "", "samples_per_prompt": 2}
    out = world.ok("train_ppo.py", out=tmp_path / "ppo", iterations=2, **options)
    assert "prompts: " in out and json.loads((tmp_path / "ppo" / "report.json").read_text())["iterations"] == 2
    loader = prompts_of(open_data(asked / "data", "train"), 8, 1, context=256, response_tokens=8)
    for step in range(4):
        batch = loader.batch(step)
        assert loader.width(step) == int(batch.prompt_lengths.max()) + 8
        records = loader.records(batch.rows)
        assert [len(record.prompt) for record in records] == [int(record.extra["answer"]) for record in records]


def test_several_rewards_with_components(world, asked, tmp_path):
    """The score is their weighted sum in every iteration; the mean of each is a metric."""
    spec = f"{asked / 'reward.py'}:graded:words=-0.05,rm:0.5,{asked / 'reward.py'}:right:2"
    options = {"data": asked / "data", "reward": spec, "sources": "", "weak_reward": "true"}
    world.ok("train_ppo.py", out=tmp_path / "ppo", iterations=2, **options)
    for row in lines(tmp_path / "ppo" / "metrics.jsonl"):
        one = {name.removeprefix("reward/"): x for name, x in row.items() if name.startswith("reward/")}
        assert one.keys() == {"graded", "graded.right", "words", "rm", "right"}
        assert one["graded"] == pytest.approx(one["graded.right"] - 0.05 * one["words"], abs=1e-5)
        assert row["objective/scores"] == pytest.approx(one["graded"] + 0.5 * one["rm"] + 2 * one["right"], abs=1e-5)
    with pytest.raises(AssertionError, match=r"--override=reward"):
        world.ok("train_ppo.py", out=tmp_path / "ppo", iterations=2, **options | {"reward": spec.replace("0.5", "0.6")})


def test_a_reward_that_raises_ends_the_run_with_its_row(world, asked, tmp_path):
    options = {"data": asked / "data", "reward": f"{asked / 'reward.py'}:fails", "sources": ""}
    done = world.run("train_ppo.py", out=tmp_path / "ppo", **options)
    assert done.code == 2 and done.err.count("\n") == 1 and "ZeroDivisionError: division by zero in line" in done.err
    assert re.search(r"error: \S*reward.py:fails raised .* on row \d+ of the data, prompt 'The film ", done.err), (
        done.err
    )
    shown = world.run("train_ppo.py", out=tmp_path / "ppo", env={"PLAIN_RLHF_TRACEBACK": "1"}, **options)
    assert shown.code == 1 and "return [1 / (len(a) - 2) for a in answer]" in shown.err and "Traceback" in shown.err


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"reward": "lacks"}, ("asks for 'gold'", "answer")),
        ({"max_prompt": 249}, ("249", "8", "256")),
        ({"response_tokens": 256}, ("256",)),
        ({"max_prompt": 1}, ("leaves nothing to visit", "longer than 1 tokens")),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_rollout(world, asked, tmp_path, changes, said):
    reward = f"{asked / 'reward.py'}:{changes.get('reward', 'right')}"
    done = world.run(
        "train_ppo.py", out=tmp_path / "ppo", data=asked / "data", sources="", **changes | {"reward": reward}
    )
    assert done.code == 2 and done.err.count("\n") == 1 and all(word in done.err for word in said), done.err


def test_prompts_of_like_length_are_not_sorted_by_it(asked):
    """Sorted to the token, a batch would be all easy or all hard, and its mean reward would say which."""
    loader = prompts_of(open_data(asked / "data", "train"), 8, 1, context=256, response_tokens=8)
    lengths = loader.lengths(np.arange(len(loader)))
    means, widths = [], []
    for step in range(loader.order.steps_per_epoch):
        batch = loader.lengths(loader.order.rows(step))
        classes = np.unique(batch // LENGTH_CLASS)
        alike = lengths[np.isin(lengths // LENGTH_CLASS, classes)]
        means.append((batch.mean() - alike.mean()) / alike.std())  # of batches at random: 8 ** -0.5 apart
        widths.append(len(classes))
    assert np.std(means) < 0.6 and np.mean(widths) < 1.2
