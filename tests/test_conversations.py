"""Evaluate, sample and the loop of rounds on conversations: template, history and columns of prepared data."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from test_chat import TEMPLATES, tokenizer  # noqa: F401  a fixture
from test_sft import write_chat_model
from tiny import lines

from data import larger, sorting
from evaluation import verifiable
from rewards.verify import exact

REWARDS = """
def odd(prompts, responses, messages, answer):
    assert all(m[-1]["content"] == f"Say {a}" and m[0]["content"] == "Be kind." for m, a in zip(messages, answer))
    return [float(len(r) % 2) for r in responses]

def longer(responses):
    return [float(len(r)) for r in responses]
"""


def numbers(record) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", record.prompt[-1]["content"])]


def sort(*numbers: int) -> str:
    return ", ".join(map(str, sorted(numbers)))


def compare(a: int, b: int) -> str:
    return "yes" if a > b else "no"


@pytest.fixture(scope="module")
def chats(world, tokenizer, tmp_path_factory):  # noqa: F811
    """A tiny chat model `hf`, and `data`: prompts with a system message, a history and the column `answer`."""
    home = tmp_path_factory.mktemp("chats")
    tokenizer.chat_template = TEMPLATES["smollm2"]
    write_chat_model(tokenizer, home / "hf")
    tokenizer.chat_template = None
    (home / "rewards.py").write_text(REWARDS)
    rows = []
    for i in range(150):
        talk = [("user", "Hi"), ("assistant", "Hello")] * (i % 2) + [("user", f"Say {i}")]
        messages = [{"role": role, "content": text} for role, text in talk]
        rows.append({"prompt": messages, "answer": str(i)})
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["data.prepare", str(home / "prompts.jsonl"), f"--tokenizer={home / 'hf'}", "--system=Be kind."]
    done = world.start([*command, f"--out={home / 'data'}"]).wait()
    assert (done.code, done.err) == (0, ""), done
    return home


def test_evaluate_asks_in_the_template_and_counts_right_answers(world, chats, tmp_path):
    """A verifier that sees the row (its assertions hold), no judge, pass@k, greedy answers; the base against itself."""
    options = {"base": chats / "hf", "tuned": chats / "hf", "data": chats / "data", "sources": "", "best_of": 2}
    reward = f"{chats / 'rewards.py'}:odd"
    out = tmp_path / "out"
    said = world.ok("evaluate.py", **options, reward=reward, out=out, samples=4, greedy="true", prompts=12)
    summary = json.loads((out / "summary.json").read_text())
    assert "prompts: 12, of " in said and "| model | right by |" in said
    assert "judge" not in summary["rows"]["tuned"]
    assert summary["rows"]["tuned"]["perplexity_of_human_text"] is None and summary["ppo"]["kl"] == 0
    base, tuned = (summary["verifiable"]["reward"][name] for name in ("base", "tuned"))
    rise = tuned.pop("rise")  # the base against itself
    assert base == tuned and {"accuracy", "greedy", "pass@2", "pass@4", "mixed"} == base.keys()
    assert rise == {"mean": 0, "low": 0, "high": 0}
    assert base["accuracy"]["mean"] <= base["pass@2"]["mean"] <= base["pass@4"]["mean"]
    for row in lines(out / "samples.jsonl"):
        assert row["prompt"].startswith("Say ") and row["before"] == row["after"] and "<|im" not in row["before"]


def test_a_judge_is_needed_where_rewards_are_compared(world, chats, tmp_path):
    rewards = f"{chats / 'rewards.py'}"
    options = {"base": chats / "hf", "tuned": chats / "hf", "data": chats / "data", "sources": "", "best_of": 1}
    done = world.run("evaluate.py", **options, reward=f"{rewards}:odd", other_rewards=f"{rewards}:longer", out=tmp_path)
    assert done.code == 2 and "brings none" in done.err and done.err.count("\n") == 1
    done = world.run("evaluate.py", **options | {"base": "lm"}, reward=f"{rewards}:longer", out=tmp_path)
    assert done.code == 2 and "tokenizer" in done.err


@pytest.mark.parametrize("n, right, k", [(1, 1, 1), (4, 0, 2), (4, 1, 2), (5, 3, 2), (6, 6, 3), (6, 2, 5)])
def test_pass_at_k_is_the_share_of_all_choices_of_k(n, right, k):
    from itertools import combinations

    from rlhf.statistics import pass_at_k

    answers = [True] * right + [False] * (n - right)
    chosen = [any(some) for some in combinations(answers, k)]
    assert pass_at_k(np.array([right]), n, k)[0] == pytest.approx(sum(chosen) / len(chosen))
    with pytest.raises(ValueError, match=f"pass@{n + 1} of {n}"):
        pass_at_k(np.array([right]), n, n + 1)


def test_only_ones_and_zeros_are_verdicts():
    few, more = np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([[1.0, 1.0], [0.0, 1.0]])
    found = verifiable.report({"before": few, "after": more}, {})
    assert "rise" not in found["before"] and found["after"]["rise"] == {"mean": 0.5, "low": 0.5, "high": 0.5}  # paired
    assert verifiable.is_verdict({"a": np.array([[0.0, 1.0]]), "b": np.array([[1.0]])})
    assert not any(verifiable.is_verdict({"a": np.array([x])}) for x in ([0.0, 0.5], [1.0, 1.0], [-1.0, 1.0]))


def test_a_conversation_remembers_its_turns(world, chats, tmp_path):
    """The second answer from the keyboard is that to the whole history, given as messages or as prepared data are."""
    common = {"checkpoint": chats / "hf", "temperature": 0, "json": "true", "tokens": 6}
    talk = world.spawn(world.command("sample.py", **common, chat="true", system="Be kind."), stdin="Hi\nSay 7\n\n")
    assert (talk.code, talk.err) == (0, ""), talk
    first, second = (json.loads(line.removeprefix("> ").removeprefix("> ")) for line in talk.out.splitlines()[:2])
    messages = [("system", "Be kind."), ("user", "Hi"), ("assistant", first["text"]), ("user", "Say 7")]
    row = {"messages": [{"role": role, "content": text} for role, text in messages]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(row) + "\n")
    assert json.loads(world.ok("sample.py", **common, prompts=tmp_path / "talk.jsonl")) == second
    prepared = [json.loads(line) for line in world.ok("sample.py", **common, prompts=chats / "data").splitlines()]
    assert prepared and all("Be kind." in one["prompt"] and "Say " in one["prompt"] for one in prepared)
    alone = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"prompt": alone}) + "\n")
    assert json.loads(world.ok("sample.py", **common, prompts=tmp_path / "talk.jsonl")) == first


@pytest.mark.parametrize(
    "row, said",
    [
        ('{"text": "a"}', "neither a prompt nor messages"),
        ("[1", "a number where an object was expected"),
        ('{"x": 1}', "no known form"),
    ],
)
def test_a_prompt_file_that_holds_none_is_refused(world, chats, tmp_path, row, said):
    (tmp_path / "bad.jsonl").write_text(row + "\n")
    done = world.run("sample.py", checkpoint=chats / "hf", prompts=tmp_path / "bad.jsonl")
    assert done.code == 2 and said in done.err and "bad.jsonl" in done.err and done.err.count("\n") == 1, done.err


@pytest.mark.parametrize("task, rows, right", [(sorting, 3654, sort), (larger, 4851, compare)])
def test_tasks_are_right_and_hold_out_sets(task, rows, right):
    """Every set of numbers once; its split depends on the set alone; the gold answer is what the question asks for."""
    records = [record for _, record in task.read_records()]
    assert len(records) == rows == len({frozenset(numbers(record)) for record in records})
    assert all(record.answers == (record.extra["answer"],) == (right(*numbers(record)),) for record in records)
    shares = Counter(record.split for record in records)
    assert all(0.08 < shares[name] / rows < 0.12 for name in ("validation", "test"))
    assert (
        exact([record.answers[0] for record in records], [record.extra["answer"] for record in records]) == [1.0] * rows
    )


@pytest.mark.slow
def test_a_round_of_the_loop_on_conversations(world, chats, tmp_path):
    """Pairs keep their messages, votes become data of the same template, PPO answers the data's prompts."""
    torch.manual_seed(0)
    rated = tmp_path / "rated.jsonl"
    with rated.open("w") as f:
        for i in range(120):
            messages = [{"role": "user", "content": f"Say {i}"}]
            sides = {
                name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "yes"), ("rejected", "n"))
            }
            f.write(json.dumps({"prompt": messages, **sides}) + "\n")
    done = world.start(["data.prepare", str(rated), f"--tokenizer={chats / 'hf'}", f"--out={tmp_path / 'data'}"]).wait()
    assert (done.code, done.err) == (0, ""), done
    judge = f"{chats / 'rewards.py'}:longer"
    train = "--batch=8 --warmup=1 --checkpoint_every=4"
    options = {
        "init": chats / "hf", "data": tmp_path / "data", "out": tmp_path / "rounds", "rounds": 1, "pairs": 30,
        "response_tokens": 6, "rater": judge, "rater_noise": 0, "judge": judge,
        "rm": f"{train} --reference_samples=16 --eval_every=4 --log_every=2", "refine": "--preference_coef=0.5",
        "ppo": f"{train} --iterations=2 --minibatches=1 --sample_every=2 --weak_reward=true",
        "evaluate": "--prompts=6 --best_of=1",
    }  # fmt: skip
    done = world.spawn(["iterate.py", *(f"--{name}={value}" for name, value in options.items())])
    assert done.code == 0, done.err
    pairs = lines(tmp_path / "rounds/round_1/pairs.jsonl")
    assert len(pairs) and all(pair["prompt"][-1]["content"].startswith("Say ") for pair in pairs)
    votes = json.loads((tmp_path / "rounds/round_1/data/manifest.json").read_text())
    assert votes["template"] == json.loads((tmp_path / "data/manifest.json").read_text())["template"]
    for vote in lines(tmp_path / "rounds/round_1/preferences.jsonl"):
        assert len(vote["chosen"][0]["content"]) >= len(vote["rejected"][0]["content"])


def test_export_measures_the_reward_on_the_prompts_of_the_data(world, chats, tmp_path):
    """The verifier's assertions hold; without answers the receipt is made of the prompts."""
    options = {"init": chats / "hf", "data": chats / "data", "reward": f"{chats / 'rewards.py'}:odd", "format": "int8"}
    command = ["export.py", *(f"--{name}={value}" for name, value in options.items())]
    done = world.start(
        [*command, f"--out={tmp_path / 'int8'}", "--max_kl=9", "--texts=8", "--response_tokens=6"]
    ).wait()
    assert (done.code, done.err) == (0, ""), done
    made = json.loads((tmp_path / "int8" / "receipt.json").read_text())
    assert made["reward"]["prompts"] == 8 and made["tokens"] > 8 * 10
