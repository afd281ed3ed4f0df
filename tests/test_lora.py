"""Adapters: against PEFT's numbers, against merging, and off means off bit for bit."""

import copy

import pytest
import torch
from golden import both
from golden import load as load_golden
from hypothesis import given
from hypothesis import strategies as st
from reference_model import FAMILIES, random_ids, small_model
from torch import nn

from model.generate import Sampling, generate
from model.hf import load_hf, save_hf
from model.lora import LoRALinear, activate, adapter_names, adapter_scale, add_lora, load_adapter, lora_layers, merge
from model.transformer import ModelConfig, Transformer
from rlhf.infra import checkpoint

every_family = pytest.mark.parametrize("family", FAMILIES)


def of_adapter(model, name="default"):
    """[(path, A, B)] of an adapter."""
    return [(path, layer.lora_A[name], layer.lora_B[name]) for path, layer in lora_layers(model, name).items()]


def parameters(model, name="default"):
    return [x for _, *pair in of_adapter(model, name) for x in pair]


def state_of(model, name="default"):
    """An adapter alone, as load_adapter takes it."""
    return {f"{path}.lora_{which}": x.detach() for path, *AB in of_adapter(model, name) for which, x in zip("AB", AB)}


def trained(model, name="default", seed=0, **kwargs):
    """The model with an adapter that is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    add_lora(model, **{"rank": 3, "alpha": 7, "name": name, "generator": generator, **kwargs})
    with torch.no_grad():
        for parameter in parameters(model, name):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model, name=None, ids=None):
    activate(model, name)
    return model(random_ids(0, 2, 9) if ids is None else ids)


def max_diff(a, b):
    return float((a.detach().double() - b.detach().double()).abs().max())


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
    A, B = parameters(model, "default")
    with torch.no_grad():
        A.copy_(inputs["lora_A"]), B.copy_(inputs["lora_B"])
    golden.close(model(x), expected["y_adapter_disabled"])
    activate(model, "default")
    y = model(x)
    golden.close(y, expected["y"])
    loss_gradients = torch.autograd.grad(y.sum(), [A, B])
    golden.close(loss_gradients[0], expected["grad_A"])
    golden.close(loss_gradients[1], expected["grad_B"])
    golden.close(merge(model, "default")(x), expected["y"])
    golden.close(model[0].weight, expected["merged_weight"])


@pytest.mark.parametrize("kind, close", [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_update_and_its_gradients_are_those_of_the_formula(kind, close):
    """y = x W^T + b + s (x A^T) B^T put together by autograd in float64, of the same rounded numbers."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, kind)
    layer = nn.Linear(24, 40, dtype=torch.float64).requires_grad_(False)
    layer.weight.data, layer.bias.data = layer.weight.to(dtype), layer.bias.to(dtype)
    lora = LoRALinear(layer)
    lora.put("a", torch.randn(3, 24, generator=generator), torch.randn(40, 3, generator=generator), 2.5)
    lora.active = "a"
    x = torch.randn(2, 7, 24, generator=generator).to(dtype).requires_grad_()
    up = torch.randn(2, 7, 40, generator=generator).to(dtype)
    y = lora(x)
    found = [y, *torch.autograd.grad(y, (x, lora.lora_A["a"], lora.lora_B["a"]), up)]
    W, b, *others = (z.detach().double() for z in (layer.weight, layer.bias, x, lora.lora_A["a"], lora.lora_B["a"]))
    X, A, B = (z.requires_grad_() for z in others)
    expected = X @ W.T + b + 2.5 * (X @ A.T) @ B.T
    expected = [expected, *torch.autograd.grad(expected, (X, A, B), up.double())]
    assert [z.dtype for z in found] == [dtype, dtype, *[torch.promote_types(dtype, torch.float32)] * 2]
    for ours, theirs in zip(found, expected):
        assert float((ours.detach() - theirs).norm() / theirs.norm()) < close


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_off_is_the_base_bit_for_bit(family, dtype):
    model = small_model(family, dtype)
    base = logits(model)
    trained(model, "policy"), trained(model, "reward", seed=1)
    assert torch.equal(logits(model, None), base)
    assert not torch.equal(logits(model, "policy"), base)
    assert torch.equal(logits(model, None), base)


@every_family
def test_a_new_adapter_changes_nothing(family):
    model = small_model(family, torch.float32)
    base = logits(model)
    assert torch.equal(logits(add_lora(model, rank=2), "default"), base)


@every_family
def test_an_adapter_equals_its_merge(family):
    model = trained(small_model(family))
    adapted, exact = logits(model, "default"), small_model(family).state_dict()
    for path, A, B in of_adapter(model):
        exact[f"{path}.weight"] = exact[f"{path}.weight"] + 7 / 3 * B @ A
    merge(model, "default")
    assert max_diff(logits(model), adapted) < 1e-10
    assert not any(isinstance(layer, LoRALinear) for layer in model.modules())
    assert model.state_dict().keys() == exact.keys()
    assert all(max_diff(exact[name], x) < 1e-12 for name, x in model.state_dict().items())


def test_merge_in_half_precision_rounds_once():
    """Computed in float32 and rounded once at the end, not added up in bfloat16."""
    model = trained(small_model("llama", torch.bfloat16))
    path, layer = next(iter(lora_layers(model).items()))
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    assert A.dtype == torch.float32
    exact = layer.weight.detach().double() + 7 / 3 * B.detach().double() @ A.detach().double()
    rounded = merge(model, "default").get_submodule(path).weight
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
        return state_of(add_lora(Transformer(config), 16, generator=torch.Generator().manual_seed(seed)), "default")

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
    activate(model, "policy")
    model(random_ids(0, 2, 9)).log_softmax(-1)[..., 0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in parameters(model, "policy"))
    assert all(p.grad is None for p in parameters(model, "critic"))
    assert sum(p.numel() for p in parameters(model, "policy")) == sum(
        3 * sum(layer.weight.shape) for layer in lora_layers(model).values()
    )


@given(st.lists(st.sampled_from([None, "a", "b"]), min_size=1, max_size=6))
def test_any_order_of_activation(names):
    model = trained(trained(small_model("smollm2", torch.float32), "a", targets=["q_proj"]), "b", seed=1)
    expected = {name: logits(model, name) for name in (None, "a", "b")}
    for name in names:
        assert torch.equal(logits(model, name), expected[name])
    with pytest.raises(ValueError, match="'c'.*: a, b"):
        activate(model, "c")
    assert {layer.active for layer in lora_layers(model).values()} == {names[-1]}


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
        lora_layers(small_model("llama"), "a")


def test_generation_with_an_adapter_is_that_of_the_merged_model():
    model = trained(small_model("llama3"))
    prompts, lengths = random_ids(1, 3, 6), torch.tensor([6, 2, 4])
    activate(model, "default")
    ours = generate(model, prompts, lengths, Sampling(8, [0], 0, temperature=0))
    plain = generate(merge(model, "default"), prompts, lengths, Sampling(8, [0], 0, temperature=0))
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
    plain = checkpoint.save(tmp_path / "plain", merge(model, None).state_dict(), {})
    checkpoint.load_weights(Transformer(base.config), checkpoint.load(plain).tensors, plain)


def test_adapter_alone(tmp_path):
    model = trained(small_model("qwen2", torch.float32), "policy", targets=["q_proj", "down_proj"])
    path = checkpoint.save(tmp_path / "adapter", state_of(model, "policy"), {})
    other = trained(small_model("qwen2", torch.float32), "policy", seed=9)
    load_adapter(other, checkpoint.load(path).tensors, adapter_scale(model, "policy"), "mine")
    assert torch.equal(logits(other, "mine"), logits(model, "policy"))
    assert not any(p.requires_grad for name, p in other.named_parameters() if ".lora_" not in name)


def test_adapters_that_do_not_fit():
    model = trained(small_model("llama", torch.float32))
    state = state_of(model, "default")
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


def test_a_model_with_adapters_is_exported_merged(tmp_path):
    model = trained(small_model("gpt2", torch.float32))
    with pytest.raises(ValueError, match="adapters.*merge"):
        save_hf(tmp_path / "hf", model)
    expected = logits(model, "default")
    assert max_diff(logits(load_hf(save_hf(tmp_path / "hf", merge(model, "default")))[0]), expected) < 1e-5


def test_backward_within_autocast_is_the_forwards_type():
    model, x, gradients = (
        trained(nn.Sequential(nn.Linear(5, 3)), targets=["0"]),
        torch.ones(2, 5, requires_grad=True),
        [],
    )
    activate(model, "default")
    for on in (False, True):
        loss = model(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            gradients.append(torch.autograd.grad(loss, [x, *parameters(model)]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_what_would_get_no_gradient_is_refused(which):
    model = trained(nn.Sequential(nn.Linear(5, 3)), targets=["0"])
    activate(model, "default")
    getattr(model[0], which).requires_grad_(True)
    with pytest.raises(ValueError, match="not frozen"):
        model(torch.ones(2, 5))
    with torch.no_grad():
        model(torch.ones(2, 5))
