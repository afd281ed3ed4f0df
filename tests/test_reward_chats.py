"""Reward models on conversations: every form of judgement trains one, and a sampled answer scores as its text does as data."""

import json
import random
import re

import numpy as np
import pytest
import torch
from test_bad_input import refused
from test_chat import tokenizer  # noqa: F401  a fixture
from test_sft import write_chat_model

from data.chat import Chat
from data.examples import Examples
from data.loader import GroupLoader
from data.pairs import SomeAnswers
from model.generate import Sampling, generate, row_uniforms
from rlhf.infra import checkpoint
from rlhf.lm.pretrained import open_pretrained
from rlhf.reward.files import load_reward_model
from rlhf.reward.finish import batches_of, read
from rlhf.reward.scorer import open_scorer

WORDS = "what is the film about and who was in it please tell me more of that story again why how long when".split()
GOOD, BAD = (
    ("A warm film.", "It is a lovely story.", "I like it a lot."),
    ("Dull.", "I do not know.", "It is bad, go away."),
)


def asked(i: int) -> list[dict]:
    rng = random.Random(i)
    talk = [{"role": "user", "content": " ".join(rng.choices(WORDS, k=3 + i % 9)) + f" {i}"}]
    if i % 3 == 0:  # several turns
        talk += [{"role": "assistant", "content": rng.choice(GOOD)}, {"role": "user", "content": "and then?"}]
    return talk


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def pair(i: int) -> dict:
    return {"prompt": asked(i), "chosen": said(f"{GOOD[i % 3]} {i}"), "rejected": said(f"{BAD[i % 3]} {i}")}


FORMS = {  # of 90 prompts: what a row is, and the objective that follows
    "pairs": (pair, "pairs"),
    "thumbs": (lambda i: {"prompt": asked(i), "completion": said((GOOD, BAD)[i % 2][i % 3]), "label": i % 2 == 0}, "labels"),
    "n answers": (
        lambda i: {"prompt": asked(i), "responses": [GOOD[i % 3], BAD[i % 3], f"So so {i}."], "scores": [3, 0, 1 + i % 2]},
        "joint",
    ),
}  # fmt: skip
FROZEN = dict.fromkeys(("batch", "epochs", "warmup", "log_every", "eval_every", "checkpoint_every"))
TRUNKS = {"full": {}, "adapters": {"trunk": "adapters"}, "frozen": FROZEN | {"trunk": "frozen", "depths": "1,2"}}


@pytest.fixture(scope="module")
def chats(world, tokenizer, tmp_path_factory):  # noqa: F811
    """A chat model, and the same prompts judged in every form."""
    home = tmp_path_factory.mktemp("chats")
    write_chat_model(tokenizer, home / "base")
    for name, (row, _) in FORMS.items():
        file = home / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row(i)) + "\n" for i in range(90)))
        command = ["data.prepare", str(file), f"--tokenizer={home / 'base'}", f"--out={home / name}"]
        done = world.start(command).wait()
        assert (done.code, done.err) == (0, ""), done
    tuned = {"init": home / "base", "data": home / "pairs", "out": home / "sft", "epochs": 15, "warmup": 5}
    tuned |= {"log_every": 50, "eval_every": 50, "checkpoint_every": 100}
    shape = dict.fromkeys(("width", "layers", "heads"))
    world.ok("train_lm.py", **tuned | shape)
    return home


def train(world, chats, form: str, trunk: str, **changes) -> str:
    out = chats / f"rm {form} {trunk} {len(changes)}"
    options = {"init": chats / "base", "data": chats / form, "out": out, "sources": ""} | TRUNKS[trunk]
    return world.ok("train_rm.py", **options | changes), out


@pytest.mark.parametrize("trunk", ["full", "frozen", pytest.param("adapters", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_the_objective_follows_the_data(world, chats, form, trunk):
    out, run = train(world, chats, form, trunk)
    assert f"objective: {FORMS[form][1]}, read: answers" in out
    report, config = json.loads((run / "report.json").read_text()), checkpoint.load(run).config
    assert config["objective"] == FORMS[form][1] and config["reads"] == "answer"
    assert config["template"] == Examples(chats / form / "train").template != None  # noqa: E711
    assert "validation pairs" in report["calibration"]["problem"] and report["calibration"]["temperature"] == 1
    found = report["accuracy_all"]
    assert found["low"] <= found["value"] == report["accuracy"]["all"] <= found["high"] and found["n"] > 0
    assert report["over_length"]["value"] == pytest.approx(found["value"] - report["baselines"]["length"]["all"])
    if trunk == "full" and form != "thumbs":
        said = re.search(r"([\d,]+) tokens, prompts once for all their answers \(([\d,]+) with", out)
        once, apart = (int(number.replace(",", "")) for number in said.groups())
        loader = GroupLoader(Examples(chats / form / "train"), 4, 0, context=256)
        rows = [loader.take(np.arange(i, i + 1)) for i in range(len(loader))]
        assert apart == sum(int(batch.lengths.sum()) for batch in rows)
        assert once == sum(int(b.lengths.sum() - b.prompt_lengths[1:].sum()) for b in rows) < 0.7 * apart


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_sampled_answer_scores_as_its_text_does_as_data(world, chats, tokenizer, trunk, tmp_path):  # noqa: F811
    """Sampled by the policy, decoded, prepared as data in two shards of its own, and read back: 1e-5, in any batch."""
    _, run = train(world, chats, "pairs", trunk)
    base, policy, chat = open_pretrained(chats / "base"), open_pretrained(chats / "sft"), Chat(tokenizer)
    prompts = [chat.encode(asked(i)).prompt for i in range(200, 248)]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.tensor([prompt + [0] * (int(lengths.max()) - len(prompt)) for prompt in prompts])
    sampling = Sampling(24, tuple(sorted({*base.stop_ids, *chat.stop_ids()})), tokenizer.pad)
    drawn = generate(policy.model, tokens, lengths, sampling, row_uniforms(1, 0, range(48), 24))
    scorer = open_scorer(str(run), tokenizer, base=base)
    scores = scorer.score(drawn.tokens, drawn.lengths, drawn.mask)

    rows, kept = [], []
    for i, prompt in enumerate(prompts):
        answer = drawn.tokens[i, len(prompt) : drawn.lengths[i]].tolist()
        words = answer[:-1] if answer[-1] in sampling.stop_ids else answer
        text = tokenizer.decode(words)
        ended = [*words, chat.encode(asked(0), "x").answer[-1]]
        if (
            text.strip()
            and chat.encode(asked(200 + i), text).answer == ended
            and not trunk_reads_the_end(trunk, answer, ended)
        ):
            rows.append({"prompt": asked(200 + i), "chosen": said(text), "rejected": said("no")})
            kept.append(i)
    assert len(kept) >= 8  # the others spell their text in other tokens than the tokenizer does
    (tmp_path / "sampled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(chats / "pairs.jsonl"), f"--tokenizer={chats / 'base'}", f"--out={tmp_path / 'data'}"]
    done = world.start(["data.prepare", *command, f"--test={tmp_path / 'sampled.jsonl'}"]).wait()
    assert done.code == 0, done
    model = load_reward_model(str(run), tokenizer.fingerprint, base=base)
    data = Examples(tmp_path / "data" / "test")
    some = SomeAnswers(data)
    found = {}
    for batch in batches_of(some, 5):
        with torch.no_grad():
            raw = model.combined(model(*read(some, batch, 256)))
        found |= {tuple(data.row(int(some.answers[j])).tolist()): float(x) for j, x in zip(batch, raw)}
    for i in kept:
        row = drawn.tokens[i, : drawn.lengths[i]].tolist()
        ended = row if row[-1] in sampling.stop_ids else [*row, chat.encode(asked(0), "x").answer[-1]]
        assert found[tuple(ended)] == pytest.approx(float(scores[i]), abs=1e-5)


def trunk_reads_the_end(trunk: str, answer: list[int], ended: list[int]) -> bool:
    """A trunk that is trained as a whole reads the stop token too, which an answer that was cut off does not have."""
    return trunk == "full" and answer != ended


def test_long_prompts_leave_no_two_sides_alike(world, tokenizer, chats, tmp_path):  # noqa: F811
    """Prompts beyond the context are cut from the left, as much for both; training sees no pair of equal tokens."""
    rows = [pair(i) for i in range(60)]
    for i, row in enumerate(rows):
        row["prompt"][0]["content"] *= 1 + i % 40
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(tmp_path / "long.jsonl"), f"--tokenizer={chats / 'base'}", f"--out={tmp_path / 'data'}"]
    assert world.start(["data.prepare", *command]).wait().code == 0
    out, _ = train(world, chats, "pairs", "full", data=tmp_path / "data")
    assert "prompts cut from the left to fit" in out
    loader = GroupLoader(Examples(tmp_path / "data/train"), 4, 0, context=256)
    for i in range(len(loader)):
        batch = loader.take(np.array([i]))
        one, two = (row[:n].tolist() for row, n in zip(batch.tokens, batch.lengths))
        assert one != two and max(len(one), len(two)) <= 256 and (batch.prompt_lengths[0] == batch.prompt_lengths[1])


@pytest.mark.slow
def test_data_of_another_form_are_refused(world, chats, tmp_path):
    _, run = train(world, chats, "pairs", "full")
    file = chats / "pairs.jsonl"
    command = [str(file), f"--tokenizer={chats / 'base'}", f"--out={tmp_path / 'plain'}", "--template=none"]
    assert world.start(["data.prepare", *command]).wait().code == 0
    ppo = {"init": chats / "base", "reward": run, "data": tmp_path / "plain", "sources": "", "weak_reward": "true"}
    refused(world.run("train_ppo.py", out=tmp_path / "ppo", **ppo), str(run), "chat template", "plain texts")
    asked = ppo | {"reward": f"{world.path / 'rewards.py'}:shorter", "judge": run, "judge_prompts": 4}
    refused(world.run("train_ppo.py", out=tmp_path / "ppo", **asked), str(run), "chat template", "plain texts")
    asked = {"base": chats / "base", "tuned": chats / "base", "reward": run, "data": tmp_path / "plain", "sources": ""}
    refused(world.run("evaluate.py", out=tmp_path / "evaluation", **asked), str(run), "chat template", "plain texts")
    done = world.start(["evaluate.py", "rm", f"--model={run}", f"--data={tmp_path / 'plain'}"]).wait()
    refused(done, str(run), "chat template", "plain texts")
    card = ["evaluate.py", "rm", f"--model={run}", f"--out={tmp_path}", "--plots=false", "--probe_texts=4"]
    done = world.start([*card, f"--data={chats / 'pairs'}"]).wait()
    assert done.code == 0, done
    found = json.loads((tmp_path / "card.json").read_text())
    report = json.loads((run / "report.json").read_text())
    assert found["accuracy"]["all"]["value"] == report["accuracy"]["all"]
    assert any(probe["name"] == "answer behind another prompt" for probe in found["probes"])
    done = world.start([*card, f"--data={file}"]).wait()  # the file itself, in the model's template
    assert done.code == 0 and json.loads((tmp_path / "card.json").read_text())["pairs"] == 90
