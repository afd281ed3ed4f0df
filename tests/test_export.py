"""What export.py writes loads elsewhere and computes the same."""

import pytest
import torch
from reference_model import FAMILIES, random_ids
from test_pretrained import hf_directory, same_logits

from data.tokenizer import load_tokenizer
from rlhf.infra import checkpoint
from rlhf.lm.pretrained import open_pretrained
from rlhf.lm.trunks import LoRA
from rlhf.ppo.roles import LAYOUTS
from rlhf.reward.files import load_reward_model


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[compare]'")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


@pytest.fixture(autouse=True)
def where_the_runs_are(world, monkeypatch):
    monkeypatch.chdir(world.path)  # a policy names its base as the command did


def export(world, **options) -> str:
    done = world.start(["export.py", *(f"--{name}={value}" for name, value in options.items())]).wait()
    assert (done.code, done.err) == (0, ""), done
    return done.out


def refused(world, **options) -> str:
    done = world.start(["export.py", *(f"--{name}={value}" for name, value in options.items())]).wait()
    assert done.code == 2 and done.err.count("\n") == 1, done
    return done.err


def test_transformers_computes_the_same(world, transformers):
    assert "-> lm-hf" in export(world, init="lm", out="lm-hf")
    opened = open_pretrained(world.path / "lm")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(world.path / "lm-hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.path / "lm-hf")
    ids = random_ids(1, 2, 12, vocab_size=300)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, opened.model.unembed(opened.model.trunk(ids)), atol=1e-5)
    text = "the film is \u00e9, in 12 words"
    assert tokenizer.encode(text, add_special_tokens=False) == opened.tokenizer.encode(text)
    assert theirs.generation_config.eos_token_id == opened.tokenizer.eos


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_an_hf_directory_comes_back(world, family):
    model, _ = hf_directory(world.path / f"{family}-in", family)
    export(world, init=f"{family}-in", out=f"{family}-out")
    opened = open_pretrained(world.path / f"{family}-out")
    assert same_logits(opened.model, model) and opened.stop_ids == (0, 2)
    assert family in FAMILIES and opened.tokenizer.chat_template


def test_gguf_comes_back(world):
    export(world, init="lm", out="lm.gguf", format="gguf", dtype="F32")
    ours, back = open_pretrained(world.path / "lm"), open_pretrained(world.path / "lm.gguf")
    assert same_logits(ours.model, back.model)
    assert "python train_lm.py" in (world.path / "lm.gguf.README.md").read_text()
    text = "the film is \u00e9"
    assert back.tokenizer.encode(text) == ours.tokenizer.encode(text)


def test_a_reward_model_scores_the_same(world, transformers):
    world.ok("train_rm.py", pooling="last", out="rm-last")
    export(world, init="rm-last", out="rm-hf")
    assert "pipeline_tag: text-classification" in (world.path / "rm-hf" / "README.md").read_text()
    tokenizer = load_tokenizer(checkpoint.resolve(world.path / "rm-last"))
    ours = load_reward_model(str(world.path / "rm-last"), tokenizer.fingerprint)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(world.path / "rm-hf")
    tokens, lengths = random_ids(2, 3, 10, vocab_size=300).clamp(min=4), torch.tensor([10, 4, 7])
    tokens[torch.arange(10) >= lengths[:, None]] = tokenizer.pad
    with torch.no_grad():
        scores = theirs(tokens, attention_mask=(torch.arange(10) < lengths[:, None]).long()).logits[:, 0]
        expected = ours.score(tokens, lengths, None)
    assert torch.allclose(scores + theirs.config.reward_bias, expected, atol=1e-4)


@pytest.fixture(scope="module")
def tuned(world):
    """Runs of train_ppo.py in the layouts that share a trunk."""
    for layout in ("adapters", "branch", "shared"):
        changes = {"branch_layers": 1} if layout == "branch" else {}
        world.ok("train_ppo.py", layout=layout, critic="shared", out=layout, iterations=2, lr=0.05, **changes)
    return world


@pytest.mark.parametrize("layout", ["adapters", "branch", "shared"])
def test_a_policy_is_exported_whole(tuned, layout):
    export(tuned, init=layout, out=f"{layout}-hf")
    ours, back, base = (open_pretrained(tuned.path / name).model for name in (layout, f"{layout}-hf", "lm"))
    assert same_logits(ours, back) and not same_logits(base, back)
    card = (tuned.path / f"{layout}-hf" / "README.md").read_text()
    assert card.index("- ppo") < card.index("python train_lm.py") < card.index("python train_ppo.py --init=lm")
    assert f"--out={layout}-hf" in card and (layout == "shared") == ("--layout=" not in card)


def test_peft_loads_the_adapter(tuned, transformers):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[compare]'")
    export(tuned, init="adapters", out="adapter", format="peft")
    assert "library_name: peft" in (tuned.path / "adapter" / "README.md").read_text()
    export(tuned, init="lm", out="adapter-base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tuned.path / "adapter-base")
    theirs = peft.PeftModel.from_pretrained(base, tuned.path / "adapter").eval()
    ours, ids = open_pretrained(tuned.path / "adapters").model, random_ids(1, 2, 12, vocab_size=300)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours.unembed(ours.trunk(ids)), atol=1e-4)


@pytest.mark.parametrize("layout", ["adapters", "branch", "shared"])
def test_a_critic_reads_the_policys_trunk(tuned, transformers, layout):
    export(tuned, init=layout, part="critic", out=f"{layout}-critic")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tuned.path / f"{layout}-critic")
    saved, model = checkpoint.load(checkpoint.resolve(tuned.path / layout)), open_pretrained(tuned.path / layout).model
    assert not any(name.startswith("value_trunk.") for name in saved.tensors)
    ids = random_ids(4, 3, 8, vocab_size=300).clamp(min=4)
    head = [saved.tensors[f"value_head.{name}"] for name in ("weight", "bias")]
    with torch.no_grad():
        values = torch.nn.functional.linear(model.trunk(ids)[:, -1], *head)  # (B, 1)
        assert torch.allclose(theirs(ids).logits + theirs.config.reward_bias, values, atol=1e-4)


def test_a_critic_with_an_adapter_of_its_own(world, transformers):
    world.ok("train_ppo.py", layout="adapters", out="own", iterations=2, lr=0.05)
    export(world, init="own", part="critic", out="own-critic")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(world.path / "own-critic")
    saved = checkpoint.load(checkpoint.resolve(world.path / "own"))
    lora = LoRA(saved.config["lora_rank"], saved.config["lora_alpha"])
    policy = LAYOUTS["adapters"](open_pretrained(world.path / "lm").model, "separate", 1.0, lora, 1).policy
    assert not policy.load_state_dict(saved.tensors, strict=False).unexpected_keys
    ids = random_ids(4, 3, 9, vocab_size=300).clamp(min=4)
    last = torch.arange(9).expand(3, 9) == 8  # V of the state before the last token reads all the others
    with torch.no_grad():
        values = policy(ids, last).values[:, 8:]  # (B, 1)
        assert torch.allclose(theirs(ids[:, :8]).logits + theirs.config.reward_bias, values, atol=1e-4)
        assert not torch.allclose(values, torch.zeros(()))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(init="rm", format="gguf", dtype="F16"), "only --format=hf"),
        (dict(init="lm", format="peft"), "has no adapter"),
        (dict(init="lm", part="critic"), "has no critic"),
        (dict(init="lm", dtype="Q8_0"), "--format=hf has no Q8_0; choose from F32, F16, BF16"),
        (dict(init="nowhere"), "no checkpoint in nowhere"),
    ],
)
def test_one_clear_line(world, options, message):
    assert message in refused(world, out="refused", **options)
    assert not (world.path / "refused").exists()
