"""The receipt of an export: against textbook sums, and as export.py makes, stores and obeys it."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from reference_model import random_ids, slow_logits, small_model
from test_export import export, refused, where_the_runs_are  # noqa: F401

from data.tokenizer import load_tokenizer
from evaluation import receipt
from model.generate import Sampling
from model.quantize import Int8Linear
from rlhf.infra import checkpoint
from rlhf.infra.precision import has_fast_bf16
from rlhf.lm.pretrained import digest_of, open_pretrained


def masks(lengths, T):
    t = torch.arange(T)
    return (t >= 1) & (t < torch.tensor(lengths)[:, None])


def test_the_sums_of_the_textbook():
    before, after = (small_model("llama", torch.float64, seed) for seed in (1, 2))
    tokens, lengths = random_ids(3, 3, 6), [6, 2, 4]
    measured = receipt.compare(
        before, after, [(tokens[:2], masks(lengths[:2], 6)), (tokens[2:], masks(lengths[2:], 6))]
    )
    nll, kl, same = [[], []], [], []
    for row, n in zip(tokens.tolist(), lengths):
        p, q = (slow_logits(model, row[: n - 1]).softmax(-1).tolist() for model in (before, after))
        for t in range(n - 1):
            nll[0].append(-math.log(p[t][row[t + 1]]))
            nll[1].append(-math.log(q[t][row[t + 1]]))
            kl.append(sum(a * math.log(a / b) for a, b in zip(p[t], q[t])))
            same.append(np.argmax(p[t]) == np.argmax(q[t]))
    perplexity = measured["perplexity"]
    assert measured["tokens"] == 9 == len(kl) and measured["top1"] == pytest.approx(np.mean(same))
    assert measured["kl"] == pytest.approx(np.mean(kl), abs=1e-9)
    assert perplexity["before"] == pytest.approx(math.exp(np.mean(nll[0])))
    assert perplexity["after"] == pytest.approx(math.exp(np.mean(nll[1])))


def test_a_model_costs_nothing_beside_itself():
    model = small_model("llama", torch.float32)
    measured = receipt.compare(model, copy.deepcopy(model), [(random_ids(1, 2, 8), masks([8, 5], 8))])
    assert measured["kl"] == 0 and measured["top1"] == 1
    assert measured["perplexity"]["before"] == measured["perplexity"]["after"]
    score = lambda tokens, lengths, mask, rows: (tokens * mask).sum(1).float()  # noqa: E731
    prompts = [(random_ids(2, 4, 3), torch.tensor([3, 1, 2, 3]), None), (random_ids(4, 1, 2), torch.tensor([2]), None)]
    change = receipt.reward_change({"before": model, "after": model}, score, prompts, Sampling(5, [0]))
    assert change["change"] == change["low"] == change["high"] == 0 and change["prompts"] == 5
    assert change["before"] == change["after"] > 0


def test_the_change_is_per_prompt():
    """Scores that differ by 1 everywhere have an interval without width."""
    model, calls = small_model("llama", torch.float32), []

    def score(tokens, lengths, mask, rows):
        calls.append(len(tokens))
        return torch.arange(len(tokens)) + float(len(calls) % 2 == 0)  # before, after, before, after

    prompts = [
        (random_ids(2, 4, 3), torch.tensor([3, 1, 2, 3]), None),
        (random_ids(4, 2, 2), torch.tensor([2, 2]), None),
    ]
    change = receipt.reward_change({"before": model, "after": model}, score, prompts, Sampling(2, [0]))
    assert change["change"] == change["low"] == change["high"] == 1 and calls == [4, 4, 2, 2]


@pytest.mark.parametrize("kl", [0.03, math.nan, math.inf])
def test_too_far_is_refused(kl):
    with pytest.raises(ValueError, match="more than --max_kl=0.02: nothing was written"):
        receipt.check({"kl": kl}, 0.02)
    receipt.check({"kl": 0.02}, 0.02)


def read(path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def int8(world, tmp_path_factory):
    """The tiny language model as int8, and what the export printed."""
    done = world.start(
        ["export.py", "--init=lm", "--out=lm-int8", "--format=int8", "--data=data", "--reward=rm", "--texts=16"]
    ).wait()
    assert (done.code, done.err) == (0, ""), done
    return world.path / "lm-int8", done.out


def test_int8_opens_and_samples(world, int8):
    path, printed = int8
    before, after = open_pretrained(world.path / "lm"), open_pretrained(path)
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint and after.stop_ids == before.stop_ids
    assert after.digest == digest_of(path) != before.digest
    assert any(isinstance(module, Int8Linear) for module in after.model.modules())
    measured = read(path / "receipt.json")
    assert 0 < measured["kl"] < 0.02 and 0.9 < measured["top1"] <= 1
    assert measured["bytes"]["before"] == 4 * sum(x.numel() for x in before.model.state_dict().values())
    assert measured["bytes"]["after"] == (path / "model.safetensors").stat().st_size < measured["bytes"]["before"]
    assert measured["reward"]["low"] <= measured["reward"]["change"] <= measured["reward"]["high"]
    speeds = {1: measured["tokens_per_s"], 16: measured["tokens_per_s_16"]}
    bf16 = ["bf16"] if has_fast_bf16(torch.device("cpu")) else []
    assert all(set(speed) == {"before", "after", "threads", *bf16} for speed in speeds.values())
    said = next(line for line in printed.splitlines() if "on this CPU int8 is" in line)
    for batch, speed in speeds.items():
        for name, told in (("before", "float32"), *((x, x) for x in bf16)):
            assert speed[name] > 0
            slower = f"{speed['after'] / speed[name]:.2f} of {told}'s speed at batch {batch}"
            assert (slower in said) == (speed["after"] < speed[name])
    assert f"{measured['kl']:.4f} nats per token" in printed and "-> lm-int8" in printed
    card = (path / "README.md").read_text()
    assert receipt.lines(measured) in card and "library_name: plain-rlhf" in card and "datasets:\n- vader" in card
    texts = {
        p: world.ok("sample.py", checkpoint="lm-int8", prompt="the film is", precision=p) for p in ("int8", "fp32")
    }
    assert all(text.strip() for text in texts.values())


@pytest.mark.slow
def test_int8_is_evaluated_like_any_model(world, int8):
    world.ok("evaluate.py", tuned="lm-int8", out="evaluation-int8", best_of=1)
    assert read(world.path / "evaluation-int8" / "summary.json")["ppo"]["kl"] < 1


def test_int8_cannot_be_trained(world, int8):
    done = world.run("train_lm.py", init="lm-int8", out="lm-trained", width=None, layers=None, heads=None)
    assert done.code == 2 and "int8 weights cannot be trained" in done.err and done.err.count("\n") == 1


@pytest.mark.slow
def test_the_same_command_replaces_it(world, int8):
    path, _ = int8
    before = (path / "model.safetensors").read_bytes()
    export(world, init="lm", out="lm-int8", format="int8", data="data", texts=4)
    assert (path / "model.safetensors").read_bytes() == before and "reward" not in read(path / "receipt.json")


@pytest.mark.slow
@pytest.mark.parametrize("format, dtype, largest", [("hf", "BF16", 1e-3), ("gguf", "Q8_0", 0.01)])
def test_other_formats_have_a_receipt(world, format, dtype, largest):
    name = f"receipt-{dtype}"
    export(world, init="lm", out=name, format=format, dtype=dtype, data="data", texts=8)
    file = (
        world.path / (name if format == "hf" else ".") / ("receipt.json" if format == "hf" else name + ".receipt.json")
    )
    assert abs(read(file)["kl"]) <= largest
    export(world, init="lm", out=name, format=format, dtype=dtype)
    assert not file.exists()  # no receipt of an export that is no longer there


def test_a_text_file_will_do(world):
    (world.path / "texts.txt").write_text("the film is good\n\nthe film is not good at all\n")
    printed = export(world, init="lm", out="of-text", format="int8", embedding="int8", data="texts.txt", max_kl=1)
    assert "tokens of texts.txt" in printed


def test_too_far_leaves_nothing(world):
    for format, out in (("int8", "far"), ("gguf", "far.gguf")):
        dtype = {"gguf": "Q8_0"}.get(format, "F32")
        message = refused(world, init="lm", out=out, format=format, dtype=dtype, data="data", texts=4, max_kl=0)
        assert "more than --max_kl=0: nothing was written" in message
        assert not [file for file in world.path.iterdir() if "far" in file.name]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(init="lm", format="int8"), "give held-out text, --data="),
        (dict(init="rm", format="int8", data="data"), "leave --data out"),
        (dict(init="lm-int8", format="gguf", dtype="F16"), "is int8 already"),
        (dict(init="lm", max_kl=1), "--max_kl has no effect with --data=none"),
        (dict(init="lm", embedding="int8"), "--embedding has no effect with --format=hf"),
        (dict(init="lm", format="int8", data="nowhere"), "nowhere"),
    ],
)
def test_one_clear_line(world, int8, options, message):
    assert message in refused(world, out="refused-int8", **options)
    assert not (world.path / "refused-int8").exists()


def test_int8_of_another_model_is_one_line(world):
    done = world.run("sample.py", checkpoint="lm", prompt="the film is", precision="int8")
    assert done.code == 2 and "lm has no int8 weights" in done.err and done.err.count("\n") == 1


def test_a_damaged_file_is_refused(world, int8, tmp_path):
    saved = checkpoint.load(int8[0])
    tensors = saved.tensors | {"layers.0.mlp.up_proj.scale": saved.tensors["layers.0.mlp.up_proj.scale"].float()}
    tokenizer = load_tokenizer(int8[0])
    checkpoint.save(tmp_path / "damaged", tensors, saved.config, files=[tokenizer.path])
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj.scale is float32 .* there, bfloat16 .* here"):
        open_pretrained(tmp_path / "damaged")
