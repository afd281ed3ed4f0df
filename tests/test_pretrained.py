"""Every form in which --init= takes a model opens to the same weights and tokens, and the scripts run on them."""

import json

import fake_gguf
import pytest
import torch
from reference_model import FAMILIES, random_ids, small_model

from data.tokenizer import tokenizer_from_parts, write_hf
from model.gguf import save_gguf
from model.hf import save_hf
from model.lora import activate, add_lora
from model.peft import save_peft
from rlhf.infra import checkpoint
from rlhf.lm.pretrained import config_of, digest_of, open_pretrained

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(bos=1):
    parts = {"model": "gpt2", "tokens": fake_gguf.TOKENS, "types": fake_gguf.TYPES, "merges": fake_gguf.MERGES}
    return tokenizer_from_parts(parts | {"pre": "smollm", "bos": bos, "eos": 2, "pad": 2, "chat_template": TEMPLATE})


def hf_directory(path, family="llama", seed=0, **changes):
    """A random model and the tiny byte-level BPE as an HF directory."""
    tokenizer = tiny_tokenizer()
    files = write_hf(tokenizer, path.with_name(path.name + "-tokenizer"))
    model = small_model(family, torch.float32, seed, vocab_size=tokenizer.vocab_size, context=64, **changes)
    save_hf(path, model, bos_id=1, eos_ids=[2, 0], pad_id=tokenizer.pad, files=files)
    return model, tokenizer


def same_logits(ours, model, seed=3) -> bool:
    ids = random_ids(seed, 2, 9, vocab_size=250)
    with torch.no_grad():
        return torch.equal(ours.unembed(ours.trunk(ids)), model.unembed(model.trunk(ids)))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_hf_directory_opens(family, tmp_path):
    model, tokenizer = hf_directory(tmp_path / "hf", family)
    opened = open_pretrained(tmp_path / "hf")
    assert same_logits(opened.model, model)
    assert opened.tokenizer.fingerprint == tokenizer.fingerprint
    assert (opened.stop_ids, opened.digest) == ((0, 2), digest_of(tmp_path / "hf"))  # of generation_config.json


def test_a_gguf_file_opens(tmp_path):
    model, tokenizer = hf_directory(tmp_path / "hf")
    file = tmp_path / "model.gguf"
    save_gguf(file, model, "F32", tokenizer.parts())
    opened = open_pretrained(file)
    assert same_logits(opened.model, model) and opened.stop_ids == (2,)
    assert opened.tokenizer.fingerprint == tokenizer.fingerprint and opened.digest == digest_of(file)


def test_a_gguf_file_of_another_hand(tmp_path):
    file = tmp_path / "other.gguf"
    file.write_bytes(fake_gguf.build(fake_gguf.LLAMA + fake_gguf.TOKENIZER, fake_gguf.tensors()))
    opened = open_pretrained(file)
    assert opened.model.config.vocab_size == opened.tokenizer.vocab_size == len(fake_gguf.TOKENS)


def adapter_directory(path, model, base, seed=0, family=None, **changes):
    """A PEFT directory for the model, whose adapter is active and no longer zero; its base is named `base`."""
    add_lora(model, rank=2, alpha=6, name=f"adapter{seed}", **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith(f"adapter{seed}"):
                x.copy_(0.2 * torch.randn(x.shape, generator=generator))
    activate(model, f"adapter{seed}")
    return save_peft(path, model, f"adapter{seed}", str(base), family)


def near(ours, model) -> bool:
    ids = random_ids(3, 2, 9, vocab_size=250)
    with torch.no_grad():
        return float((ours(ids) - model(ids)).abs().max()) < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("named", ["absolute", "beside", "here"])
def test_a_peft_adapter_opens_on_its_base(family, named, tmp_path, monkeypatch):
    """Merged; found from the adapter's directory or from the working directory."""
    model, tokenizer = hf_directory(tmp_path / "here" / "base", family)
    named = {"absolute": tmp_path / "here" / "base", "beside": "../here/base", "here": "base"}[named]
    monkeypatch.chdir(tmp_path / "here")
    adapter = adapter_directory(tmp_path / "adapter", model, named)
    opened = open_pretrained(adapter)
    assert near(opened.model, model) and not near(opened.model, open_pretrained("base").model)
    assert opened.tokenizer.fingerprint == tokenizer.fingerprint and opened.stop_ids == (0, 2)
    assert all(x.requires_grad for x in opened.model.parameters()) and not opened.model.state_dict().keys() ^ (
        open_pretrained("base").model.state_dict().keys()
    )
    assert config_of(adapter) == opened.model.config and opened.digest == digest_of(adapter) != digest_of("base")
    edit_config(adapter, lora_alpha=7)
    assert digest_of(adapter) != opened.digest and not near(open_pretrained(adapter).model, model)


def edit_config(adapter, **changes):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_peft_adapter_with_files_of_its_base(tmp_path):
    """As some programs write it: with the base's config.json, and a tokenizer of its own, which then holds."""
    model, tokenizer = hf_directory(tmp_path / "base")
    adapter = adapter_directory(tmp_path / "adapter", model, tmp_path / "base")
    (adapter / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    write_hf(tiny_tokenizer(bos=2), adapter)
    opened = open_pretrained(adapter)
    assert near(opened.model, model) and (opened.tokenizer.bos, tokenizer.bos) == (2, 1)


def test_a_peft_adapter_without_its_base(tmp_path):
    model, _ = hf_directory(tmp_path / "base")
    adapter = adapter_directory(tmp_path / "adapter", model, "someone/model-1b")
    for named in ("someone/model-1b", "", None):
        edit_config(adapter, base_model_name_or_path=named)
        with pytest.raises(
            FileNotFoundError, match=f"adapter belongs to the base model '{named or ''}'.*adapter_config"
        ):
            open_pretrained(adapter)
    edit_config(adapter, base_model_name_or_path=str(adapter))
    with pytest.raises(ValueError, match="is an adapter itself"):
        open_pretrained(adapter)
    edit_config(adapter, base_model_name_or_path=str(tmp_path / "base"), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="modules_to_save .'lm_head'. is not supported"):
        open_pretrained(adapter)
    edit_config(adapter, modules_to_save=None)
    hf_directory(tmp_path / "base", "qwen3")
    with pytest.raises(ValueError, match=r"_proj.* has shape"):
        open_pretrained(adapter)


def test_the_digest_is_that_of_the_weights(tmp_path):
    hf_directory(tmp_path / "a")
    hf_directory(tmp_path / "b")
    hf_directory(tmp_path / "c", seed=1)
    a, b, c = (digest_of(tmp_path / name) for name in "abc")
    assert a == b != c


def test_a_policy_on_a_base_that_has_changed(tmp_path):
    _, tokenizer = hf_directory(tmp_path / "base")
    config = {"kind": "policy", "layout": "adapters", "tokenizer": tokenizer.fingerprint}
    config |= {"base": str(tmp_path / "base"), "base_digest": "0" * 64}
    config |= {"lora_rank": 1, "lora_alpha": 1.0, "lora_targets": None}
    checkpoint.save(tmp_path / "policy", {}, config, files=[tokenizer.save(tmp_path / "tokenizer")])
    found = digest_of(tmp_path / "base")[:12]
    with pytest.raises(ValueError, match=f"sha256 000000000000, which is now {found}: put the old one back"):
        open_pretrained(tmp_path / "policy")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("smollm2-135m-instuct", "did you mean smollm2-135m-instruct?"),
        ("nowhere", "models by name: smollm2-135m-instruct"),
        ("rm", "holds a reward checkpoint"),
        ("rewards.py", "is not a GGUF file"),
        ("logs", "no checkpoint in logs"),
    ],
)
@pytest.mark.parametrize("script, option", [("sample.py", "checkpoint"), ("train_lm.py", "init")])
def test_anything_else_is_one_clear_line(world, script, option, spec, message):
    (world.path / "logs").mkdir(exist_ok=True)
    shape = dict.fromkeys(("width", "layers", "heads")) if script == "train_lm.py" else {"prompt": "a"}
    done = world.run(script, **{option: spec, "out": "bad"} | shape if option == "init" else {option: spec} | shape)
    assert done.code == 2 and done.err.count("\n") == 1 and message in done.err, done


def test_shape_has_no_effect_on_a_given_model(world):
    done = world.run("train_lm.py", init="lm", out="bad")
    assert done.code == 2 and "has no effect with --init=lm" in done.err


@pytest.fixture(scope="module")
def pretrained_world(world):
    """The tiny ratings in the tokens of an HF directory, `hf`."""
    hf_directory(world.path / "hf")
    world.ok("data.prepare", tokenizer="hf", vocab_size=None, out="hf-data")
    return world


def test_sample_from_anything(pretrained_world):
    world = pretrained_world
    model, tokenizer = hf_directory(world.path / "again")
    save_gguf(world.path / "model.gguf", model, "F32", tokenizer.parts())
    texts = {spec: world.ok("sample.py", checkpoint=spec, prompt="the in") for spec in ("hf", "again", "model.gguf")}
    assert texts["hf"] == texts["again"] and all(text.startswith("the in") for text in texts.values())


def test_every_script_takes_a_peft_adapter(pretrained_world):
    world = pretrained_world
    model, _ = hf_directory(world.path / "adapted" / "base")
    adapter_directory(world.path / "adapted" / "adapter", model, "../base")
    text = world.ok("sample.py", checkpoint="adapted/adapter", prompt="the in", temperature=0)
    assert text != world.ok("sample.py", checkpoint="adapted/base", prompt="the in", temperature=0)
    world.ok(
        "train_ppo.py", init=world.path / "adapted" / "adapter", data="hf-data", reward="rewards.py:shorter", out="on-adapter",
        layout="adapters", iterations=1,
    )  # fmt: skip
    before, after = (open_pretrained(world.path / name) for name in ("adapted/adapter", "on-adapter"))
    assert near(before.model, model) and not same_logits(before.model, after.model)
    assert json.loads((world.path / "on-adapter" / "run.json").read_text())["init_sha256"] == before.digest


def test_chat_prints_the_answer_alone(pretrained_world):
    record = json.loads(pretrained_world.ok("sample.py", checkpoint="hf", prompt="<|im_end|>", chat=True, json=True))
    assert record["prompt"] == "user\n<|im_end|>\nassistant\n" and not record["text"].startswith("user")


def test_training_goes_on_from_an_hf_directory(pretrained_world):
    world, shape = pretrained_world, dict.fromkeys(("width", "layers", "heads"))
    world.ok("train_lm.py", init="hf", data="hf-data", out="tuned", epochs=0.2, **shape)
    before, after = open_pretrained(world.path / "hf"), open_pretrained(world.path / "tuned")
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint and not same_logits(before.model, after.model)
    assert after.stop_ids == before.stop_ids == (0, 2)  # of which the tokenizer knows one
    options = json.loads((world.path / "tuned" / "run.json").read_text())
    assert options["init_sha256"] == before.digest == digest_of(world.path / "hf")  # the base itself did not move

    world.ok(
        "evaluate.py", base="hf", tuned="tuned", data="hf-data", reward="rewards.py:shorter", out="small", prompts=3,
        human_texts=4, best_of=1, sources="", prompt_tokens=20,
    )  # fmt: skip
    summary = json.loads((world.path / "small" / "summary.json").read_text())
    assert list(summary["rows"]) == ["base", "tuned"] and "rm" not in summary
    assert summary["rows"]["base"]["kl"] == 0 < summary["rows"]["tuned"]["perplexity_of_human_text"]


def test_another_tokenizers_model_is_refused(pretrained_world):
    done = pretrained_world.run(
        "train_lm.py", init="hf", data="data", out="bad", **dict.fromkeys(("width", "layers", "heads"))
    )
    assert done.code == 2 and "wrong tokenizer for hf" in done.err
