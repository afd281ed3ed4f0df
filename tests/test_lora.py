"""Adapters: against PEFT's numbers and program, against merging, and off means off bit for bit."""

import copy
import json
import shutil

import pytest
import torch
from golden import both
from golden import load as load_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import FAMILIES, random_ids, small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from model.generate import generate
from model.hf import load_hf, reward_head, save_hf
from model.lora import (
    LoRALinear,
    activate,
    adapter_names,
    adapter_parameters,
    adapter_scale,
    adapter_state,
    add_lora,
    fuse,
    load_adapter,
    load_peft,
    lora_layers,
    merge,
    merged_state,
    save_peft,
    target_modules,
    using,
)
from model.transformer import ModelConfig, Transformer
from rlhf.infra import checkpoint
from rlhf.reward.model import RewardModel

every_family = pytest.mark.parametrize("family", FAMILIES)


def trained(model, name="default", seed=0, **kwargs):
    """The model with an adapter that is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    add_lora(model, **{"rank": 3, "alpha": 7, "name": name, "generator": generator, **kwargs})
    with torch.no_grad():
        for parameter in adapter_parameters(model, name):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model, name=None, ids=None):
    with using(model, name):
        return model(random_ids(0, 2, 9) if ids is None else ids)


def max_diff(a, b):
    return float((a.double() - b.double()).abs().max())


# The formula


@both
@pytest.mark.parametrize("case", ["alpha=16", "alpha=4", "alpha=16,use_rslora"])
def test_golden_peft(golden_dir, precision, case):
    """Forward, both gradients, off, and merged, as PEFT 0.21 computes them."""
    golden = load_golden(golden_dir, "peft_lora_linear", precision)
    x, inputs, expected = golden.inputs["x"], golden.inputs, golden.outputs[case]
    linear = nn.Linear(5, 3).to(golden.dtype)
    linear.load_state_dict({"weight": inputs["weight"], "bias": inputs["bias"]})
    model = nn.Sequential(linear)
    alpha = 4 if case == "alpha=4" else 16
    add_lora(model, rank=2, alpha=alpha, targets=["0"], rslora="rslora" in case)
    golden.close(adapter_scale(model, "default"), expected["scaling"])
    A, B = adapter_parameters(model, "default")
    with torch.no_grad():
        A.copy_(inputs["lora_A"]), B.copy_(inputs["lora_B"])
    golden.close(model(x), expected["y_adapter_disabled"])
    with using(model, "default"):
        y = model(x)
    golden.close(y, expected["y"])
    loss_gradients = torch.autograd.grad(y.sum(), [A, B])
    golden.close(loss_gradients[0], expected["grad_A"])
    golden.close(loss_gradients[1], expected["grad_B"])
    golden.close(merged_state(model, "default")["0.weight"], expected["merged_weight"])
    golden.close(merge(model, "default")(x), expected["y"])


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_off_is_the_base_bit_for_bit(family, dtype):
    model = small_model(family, dtype)
    base = logits(model)
    trained(model, "policy"), trained(model, "reward", seed=1)
    assert torch.equal(logits(model, None), base)
    assert not torch.equal(logits(model, "policy"), base)
    with using(model, "policy"), using(model, None):
        assert torch.equal(model(random_ids(0, 2, 9)), base)


@every_family
def test_a_new_adapter_changes_nothing(family):
    model = small_model(family, torch.float32)
    base = logits(model)
    assert torch.equal(logits(add_lora(model, rank=2), "default"), base)


@every_family
def test_an_adapter_equals_its_merge(family):
    model = trained(small_model(family))
    adapted = logits(model, "default")
    plain = Transformer(model.config).double()
    plain.load_state_dict(merged_state(model, "default"))
    assert max_diff(logits(plain), adapted) < 1e-10
    merge(model, "default")
    assert torch.equal(logits(model), logits(plain))
    assert not any(isinstance(layer, LoRALinear) for layer in model.modules())
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_merge_in_half_precision_rounds_once():
    """Computed in float32 and rounded once at the end, not added up in bfloat16."""
    model = trained(small_model("llama", torch.bfloat16))
    path, layer = next(iter(lora_layers(model).items()))
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    assert A.dtype == torch.float32
    exact = layer.weight.detach().double() + 7 / 3 * B.detach().double() @ A.detach().double()
    rounded = merged_state(model, "default")[f"{path}.weight"]
    assert rounded.dtype == torch.bfloat16 and max_diff(rounded, exact.bfloat16()) < 1e-2
    assert float((rounded == exact.bfloat16()).float().mean()) > 0.99


def test_merging_none_restores_the_base():
    model = small_model("qwen3", torch.float32)
    before = copy.deepcopy(model.state_dict())
    merge(trained(model), None)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()


def test_start(family="llama"):
    """A uniform in +-1/sqrt(in), from the generator alone; B zero."""
    config = ModelConfig(vocab_size=64, width=256, layers=2, heads=4, ffn=512)

    def fresh(global_seed, seed):
        torch.manual_seed(global_seed)
        return adapter_state(
            add_lora(Transformer(config), 16, generator=torch.Generator().manual_seed(seed)), "default"
        )

    a, b, c = fresh(0, 5), fresh(1, 5), fresh(0, 6)
    assert all(torch.equal(a[key], b[key]) for key in a) and len(a) == 2 * 7 * 2
    assert not torch.equal(a["layers.0.self_attn.q_proj.lora_A"], c["layers.0.self_attn.q_proj.lora_A"])
    for key, x in a.items():
        if key.endswith("lora_B"):
            assert not x.any()
        else:
            bound = x.shape[1] ** -0.5
            assert x.abs().max() <= bound and abs(float(x.std()) / (bound / 3**0.5) - 1) < 0.03


# Several adapters, and who is trained


def test_only_the_active_adapter_learns():
    model = trained(trained(small_model("qwen2"), "policy"), "critic", seed=1, rank=2)
    assert adapter_names(model) == ["critic", "policy"]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".lora_" in name}
    with using(model, "policy"):
        model(random_ids(0, 2, 9)).log_softmax(-1)[..., 0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model, "policy"))
    assert all(p.grad is None for p in adapter_parameters(model, "critic"))
    assert sum(p.numel() for p in adapter_parameters(model, "policy")) == sum(
        3 * sum(layer.weight.shape) for layer in lora_layers(model).values()
    )


@settings(max_examples=40)
@given(st.lists(st.sampled_from([None, "a", "b"]), min_size=1, max_size=6))
def test_using_nests(names):
    model = trained(trained(small_model("smollm2", torch.float32), "a", targets=["q_proj"]), "b", seed=1)
    expected = {name: logits(model, name) for name in (None, "a", "b")}

    def nest(names, outer):
        if names:
            with using(model, names[0]):
                nest(names[1:], names[0])
                assert torch.equal(model(random_ids(0, 2, 9)), expected[names[0]])
        assert {layer.active for layer in lora_layers(model).values()} == {outer}

    with torch.no_grad():
        nest(names, None)


def test_using_comes_back_after_an_error():
    model = trained(small_model("llama", torch.float32), "a")
    activate(model, "a")
    with pytest.raises(RuntimeError), using(model, None):
        raise RuntimeError
    assert torch.equal(model(random_ids(0, 2, 9)), logits(model, "a"))
    with pytest.raises(ValueError, match="'b'.*: a"), using(model, "b"):
        pass


def test_targets():
    model = add_lora(small_model("llama"), targets=["q_proj", "lm_head"], name="a")
    assert sorted(lora_layers(model)) == ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "lm_head"]
    add_lora(model, targets=["q_proj", "up_proj"], name="b")
    assert len(lora_layers(model)) == 5 and len(lora_layers(model, "b")) == 4
    assert len(lora_layers(add_lora(small_model("llama")))) == 14, "the blocks, not the output matrix"
    for bad, word in (
        (dict(targets=["query"]), "query"),
        (dict(targets=["gate_proj", "wq"]), "wq"),
        (dict(rank=0), "rank 0"),
        (dict(name="a"), "'a' already"),
        (dict(name="x.y"), "x.y"),
        (dict(name="values"), "values"),
    ):
        before = model.state_dict().keys()
        with pytest.raises(ValueError, match=word):
            add_lora(model, **bad)
        assert model.state_dict().keys() == before
    with pytest.raises(ValueError, match="none"):
        adapter_state(small_model("llama"), "a")


def test_generation_with_an_adapter_is_that_of_the_merged_model():
    model = trained(small_model("llama3"))
    prompts, lengths = random_ids(1, 3, 6), torch.tensor([6, 2, 4])
    with using(model, "default"):
        ours = generate(model, prompts, lengths, 8, None, 0, 0, temperature=0)
    plain = generate(merge(model, "default"), prompts, lengths, 8, None, 0, 0, temperature=0)
    assert torch.equal(ours.tokens, plain.tokens)


def test_under_autocast():
    model = trained(small_model("qwen3", torch.float32))
    exact = logits(model, "default")
    with torch.autocast("cpu", torch.bfloat16):
        assert max_diff(logits(model, "default").log_softmax(-1), exact.log_softmax(-1)) < 0.5


# Saved alone


def test_a_plain_checkpoint_loads_before_adapters_and_a_full_one_after(tmp_path):
    base = small_model("llama", torch.float32)
    path = checkpoint.save(tmp_path / "base", base.state_dict(), {})
    model = Transformer(base.config)
    checkpoint.load_weights(model, checkpoint.load(path).tensors, path)
    trained(model, "policy")
    assert base.state_dict().keys() < model.state_dict().keys(), "the base keeps its names"
    full = checkpoint.save(tmp_path / "full", model.state_dict(), {})
    again = add_lora(Transformer(base.config), rank=3, alpha=7, name="policy")
    again.load_state_dict(checkpoint.load(full).tensors)  # load_weights is for what was trained alone
    assert torch.equal(logits(again, "policy"), logits(model, "policy"))
    with pytest.raises(ValueError, match="lora_A"):
        checkpoint.load_weights(Transformer(base.config), checkpoint.load(full).tensors, full)
    plain = checkpoint.save(tmp_path / "plain", merged_state(model, None), {})
    checkpoint.load_weights(Transformer(base.config), checkpoint.load(plain).tensors, plain)


def test_adapter_alone(tmp_path):
    model = trained(small_model("qwen2", torch.float32), "policy", targets=["q_proj", "down_proj"])
    path = checkpoint.save(tmp_path / "adapter", adapter_state(model, "policy"), {})
    other = trained(small_model("qwen2", torch.float32), "policy", seed=9)
    load_adapter(other, checkpoint.load(path).tensors, adapter_scale(model, "policy"), "mine")
    assert torch.equal(logits(other, "mine"), logits(model, "policy"))
    assert not any(p.requires_grad for name, p in other.named_parameters() if ".lora_" not in name)


def test_adapters_that_do_not_fit():
    model = trained(small_model("llama", torch.float32))
    state = adapter_state(model, "default")
    name = "layers.0.self_attn.q_proj.lora_A"

    def refused(word, **changes):
        tensors = {key: x for key, x in {**state, **changes}.items() if x is not None}
        plain = small_model("llama", torch.float32)
        with pytest.raises(ValueError, match=word):
            load_adapter(plain, tensors, 1.0)
        assert not lora_layers(plain)

    refused("do not match.*q_proj.lora_A", **{name: None})
    refused("7.*24", **{name: torch.zeros(3, 7)})
    refused(r"\(2, 24\).*\(3, 24\)", **{name.replace("layers.0", "layers.1"): torch.zeros(2, 24)})
    refused("layers.2.mlp.up_proj", **{"layers.2.mlp.up_proj.lora_A": torch.zeros(3, 24)})
    with pytest.raises(ValueError, match="empty"):
        load_adapter(small_model("llama"), {}, 1.0)


# PEFT's format


@given(st.integers(0, 2**20), st.booleans(), st.lists(st.booleans(), min_size=3, max_size=3).filter(any))
def test_fused_adapters_are_exact(seed, shared, present):
    """The one adapter of c_attn is the three adapters of its thirds, row for row."""
    g = torch.Generator().manual_seed(seed)
    ranks = [2] * 3 if shared else [1, 2, 3]
    A = torch.randn(2, 5, generator=g, dtype=torch.float64)
    parts = [
        (A if shared else torch.randn(r, 5, generator=g, dtype=torch.float64), torch.randn(4, r, generator=g).double())
        if here
        else 4
        for r, here in zip(ranks, present)
    ]
    A, B = fuse(parts)
    rows = [torch.zeros(4, 5).double() if part == 4 else part[1] @ part[0] for part in parts]
    torch.testing.assert_close(B @ A, torch.cat(rows), rtol=0, atol=1e-12)
    assert len(A) == (2 if shared else sum(r for r, here in zip(ranks, present) if here))


TARGETS = {
    "all": None,
    "q and v": ["q_proj", "v_proj"],
    "q and outputs": ["q_proj", "o_proj", "down_proj"],
    "mlp": ["up_proj", "down_proj"],
}


@every_family
@pytest.mark.parametrize("targets", TARGETS)
def test_peft_round_trip(family, targets, tmp_path):
    model = trained(small_model(family), targets=TARGETS[targets], rslora=targets == "mlp")
    directory = save_peft(tmp_path / "adapter", model)
    other = small_model(family)
    info = load_peft(directory, other, "mine")
    assert max_diff(logits(other, "mine"), logits(model, "default")) < 1e-10
    assert info.score is None and info.raw["task_type"] == "CAUSAL_LM"
    rank = {"all": 9, "q and v": 6, "q and outputs": 3, "mlp": 3}[targets] if family == "gpt2" else 3
    assert info.raw["r"] == rank and all("lora_" in key for key in load_file(directory / "adapter_model.safetensors"))
    again = save_peft(tmp_path / "again", other, "mine")
    assert json.loads((again / "adapter_config.json").read_text())["r"] == rank, "the rank does not grow on the way"
    if targets != "mlp":  # square roots
        assert (again / "adapter_config.json").read_bytes() == (directory / "adapter_config.json").read_bytes()


def test_target_modules_mean_what_they_say():
    modules = [f"transformer.h.{i}.{m}" for i in range(2) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    assert target_modules(modules, modules) == ["attn.c_proj", "c_attn", "mlp.c_proj"]
    assert target_modules(modules[:1], modules) == modules[:1], "one layer of two"
    assert target_modules(["lm_head"], [*modules, "lm_head"]) == ["lm_head"]


def test_peft_reward_head(tmp_path):
    reward = RewardModel(trained(small_model("llama", torch.float32)), "last", torch.Generator().manual_seed(0))
    score, bias = reward_head(reward.head, 0.5, -1.5)
    directory = save_peft(tmp_path / "adapter", reward.model, score=score, reward_bias=bias)
    raw = json.loads((directory / "adapter_config.json").read_text())
    assert raw["task_type"] == "SEQ_CLS" and raw["modules_to_save"] == ["score"]
    info = load_peft(directory, small_model("llama", torch.float32))
    assert torch.equal(info.score, score) and info.reward_bias == -1.5


@pytest.fixture
def adapter(tmp_path):
    return save_peft(tmp_path / "adapter", trained(small_model("llama", torch.float32)))


def edit(directory, **changes):
    file = directory / "adapter_config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def refusal(directory, error=ValueError):
    model = small_model("llama", torch.float32)
    with pytest.raises(error) as caught:
        load_peft(directory, model)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value) and not lora_layers(model)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        dict(use_dora=True),
        dict(rank_pattern={"q_proj": 4}),
        dict(alpha_pattern={"q_proj": 4}),
        dict(bias="lora_only"),
        dict(trainable_token_indices=[1]),
        dict(layer_replication=[[0, 1]]),
        dict(lora_bias=True),
        dict(target_parameters=["x"]),
        dict(init_lora_weights="pissa"),
        dict(init_lora_weights=["pissa"]),
        dict(modules_to_save=["lm_head"]),
        dict(peft_type="LOHA"),
        dict(something_new={"x": 1}),
        dict(r=0),
        dict(r=4),
        dict(r="3"),
        dict(lora_alpha="7"),
        dict(use_rslora="yes"),
    ],
)
def test_peft_configs_that_are_not_understood(adapter, changes):
    edit(adapter, **changes)
    message, key = refusal(adapter), next(iter(changes))
    assert key in message or key == "r" and "shape" in message


def test_peft_files_that_do_not_fit(adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert key in tensors

    def message(**changes):
        save_file({k: x for k, x in {**tensors, **changes}.items() if x is not None}, file)
        return refusal(adapter)

    assert "(3, 7)" in (found := message(**{key: torch.zeros(3, 7)})) and "(3, 24)" in found
    assert "q_proj" in message(**{key: None})
    for odd in (
        "x",
        "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight",
        key.replace("_A", "_embedding_A"),
    ):
        assert odd[:40] in message(**{odd: torch.zeros(3, 24)})
    assert "lora_magnitude_vector" in message(**{key.replace("lora_A", "lora_magnitude_vector"): torch.zeros(24)})
    assert "I64" in message(**{key: torch.zeros(3, 24, dtype=torch.int64)})
    assert "(1, 7)" in message(**{"base_model.model.score.weight": torch.zeros(1, 7)})
    save_file({}, file)
    assert "empty" in refusal(adapter)
    file.write_bytes(b"\xff" * 100)
    assert "header" in refusal(adapter)
    file.unlink()
    refusal(adapter, FileNotFoundError)
    shutil.rmtree(adapter)
    refusal(adapter, FileNotFoundError)


def test_a_model_with_adapters_is_exported_merged(tmp_path):
    model = trained(small_model("gpt2", torch.float32))
    with pytest.raises(ValueError, match="adapters.*merge"):
        save_hf(tmp_path / "hf", model)
    loaded, _ = load_hf(save_hf(tmp_path / "hf", model, state=merged_state(model, "default")))
    assert max_diff(logits(loaded), logits(model, "default")) < 1e-5
    assert torch.equal(
        logits(load_hf(save_hf(tmp_path / "base", model, state=merged_state(model, None)))[0]), logits(model)
    )


# Against PEFT


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install -e '.[compare]'"
    ).logging.set_verbosity_error()
    return pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[compare]'")


# In float64, where rounding hides nothing; transformers computes RoPE's tables in float32 all the same, and weights half
# as large as small_model's keep what that costs below 1e-5.


def soft_model(family):
    model = small_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim == 2 else 1)
    return model


def their_base(directory, kind="CausalLM"):
    import transformers

    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(directory, dtype=torch.float64).eval()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("targets", TARGETS)
def test_peft_loads_ours(peft, family, targets, tmp_path):
    model = trained(soft_model(family), targets=TARGETS[targets])
    base = save_hf(tmp_path / "base", model, state=merged_state(model, None))
    theirs = peft.PeftModel.from_pretrained(their_base(base), save_peft(tmp_path / "adapter", model, base=str(base)))
    ids = random_ids(3, 2, 11)
    with torch.no_grad():
        assert max_diff(theirs(ids).logits, logits(model, "default", ids)) < 1e-5
        with theirs.disable_adapter():
            assert max_diff(theirs(ids).logits, logits(model, None, ids)) < 1e-5
        assert max_diff(theirs.merge_and_unload()(ids).logits, logits(model, "default", ids)) < 1e-5


THEIR_TARGETS = {
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "gate_proj"],
    "qwen2": "all-linear",
    "qwen3": ["k_proj", "o_proj"],
}


@pytest.mark.parametrize("family", THEIR_TARGETS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"layers_to_transform": [1]}])
def test_we_load_what_peft_makes(peft, family, options, tmp_path):
    if family == "qwen2" and "layers_to_transform" in options:
        options = {"lora_dropout": 0.5}
    base = save_hf(tmp_path / "base", soft_model(family))
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=THEIR_TARGETS[family], task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(their_base(base), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "adapter")
    model, _ = load_hf(base)
    load_peft(tmp_path / "adapter", model)
    ids = random_ids(3, 2, 11)
    with torch.no_grad():
        assert max_diff(theirs(ids).logits, logits(model, "default", ids)) < 1e-5
        assert not torch.equal(logits(model, None, ids), logits(model, "default", ids))
    back = peft.PeftModel.from_pretrained(their_base(base), save_peft(tmp_path / "back", model)).eval()
    with torch.no_grad():
        assert max_diff(theirs(ids).logits, back(ids).logits) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_reward_adapter_scores_the_same_in_peft(peft, family, tmp_path):
    """Adapter and head on the classifier of the base, a padded batch."""
    model = trained(soft_model(family), "reward")
    reward = RewardModel(model, "last", torch.Generator().manual_seed(0)).double()
    score, bias = reward_head(reward.head)
    base = save_hf(
        tmp_path / "base", model, state=merged_state(model, None), pad_id=0, score=torch.zeros(1, 24).double()
    )
    directory = save_peft(tmp_path / "adapter", model, "reward", str(base), score, bias)
    theirs = peft.PeftModel.from_pretrained(their_base(base, "SequenceClassification"), directory).eval()
    lengths = torch.tensor([9, 4])
    real = torch.arange(9) < lengths[:, None]
    tokens = torch.where(real, 1 + random_ids(0, 2, 9, vocab_size=12), 0)
    with torch.no_grad(), using(model, "reward"):
        ours = reward.score(tokens, lengths, real)
        assert max_diff(theirs(tokens, attention_mask=real.long()).logits.squeeze(-1) + bias, ours) < 1e-5
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
