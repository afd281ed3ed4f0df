"""PEFT's directories: there and back, refusals, against PEFT's own program, and as the model of every script."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_model import FAMILIES, random_ids, small_model
from safetensors.torch import load_file, save_file
from test_lora import logits, max_diff, trained

from model.hf import load_hf, save_hf
from model.lora import lora_layers
from model.peft import fuse, load_peft, save_peft, target_modules

every_family = pytest.mark.parametrize("family", FAMILIES)


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
    load_peft(directory, other, "mine")
    assert max_diff(logits(other, "mine"), logits(model, "default")) < 1e-10
    raw = json.loads((directory / "adapter_config.json").read_text())
    rank = {"all": 9, "q and v": 6, "q and outputs": 3, "mlp": 3}[targets] if family == "gpt2" else 3
    assert raw["r"] == rank and all("lora_" in key for key in load_file(directory / "adapter_model.safetensors"))
    again = save_peft(tmp_path / "again", other, "mine")
    assert json.loads((again / "adapter_config.json").read_text())["r"] == rank, "the rank does not grow on the way"
    if targets != "mlp":  # square roots
        assert (again / "adapter_config.json").read_bytes() == (directory / "adapter_config.json").read_bytes()


def test_target_modules_mean_what_they_say():
    modules = [f"transformer.h.{i}.{m}" for i in range(2) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    assert target_modules(modules, modules) == ["attn.c_proj", "c_attn", "mlp.c_proj"]
    assert target_modules(modules[:1], modules) == modules[:1], "one layer of two"
    assert target_modules(["lm_head"], [*modules, "lm_head"]) == ["lm_head"]


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
        dict(modules_to_save=["score"]),
        dict(base_model_name_or_path=["x"]),
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
    assert "score.weight" in message(**{"base_model.model.score.weight": torch.zeros(1, 24)})
    for wrong in (torch.nan, -torch.inf):
        broken = tensors[key].clone()
        broken[1, 2] = wrong
        assert "not finite" in (found := message(**{key: broken})) and key[:60] in found
    save_file({}, file)
    assert "empty" in refusal(adapter)
    file.write_bytes(b"\xff" * 100)
    assert "header" in refusal(adapter)
    file.unlink()
    refusal(adapter, FileNotFoundError)
    shutil.rmtree(adapter)
    refusal(adapter, FileNotFoundError)


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


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "qwen2", "qwen3", "smollm3", "olmo2", "granite", "gemma2", "gemma3_text"]
)
@pytest.mark.parametrize("targets", TARGETS)
def test_peft_loads_ours(peft, family, targets, tmp_path):
    model = trained(soft_model(family), targets=TARGETS[targets])
    base = save_hf(tmp_path / "base", soft_model(family))
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
    "gemma2": ["q_proj", "down_proj"],
    "olmo2": ["q_proj", "up_proj"],
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


@pytest.mark.parametrize("targets", [None, ["q_proj", "up_proj"], ["o_proj"]])
def test_phi3_keeps_its_fused_names_in_adapters(peft, targets, tmp_path):
    """Its q, k, v and gate, up are one matrix each in the base that the adapter belongs to."""
    import transformers

    sizes = dict(vocab_size=13, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20)
    config = transformers.Phi3Config(**sizes, num_key_value_heads=2, pad_token_id=0, max_position_embeddings=64)
    torch.manual_seed(0)
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path / "base")
    model, info = load_hf(tmp_path / "base", torch.float64)
    directory = save_peft(
        tmp_path / "adapter", trained(model, targets=targets), base=str(tmp_path / "base"), family="phi3"
    )
    ids = random_ids(3, 2, 11)
    theirs = peft.PeftModel.from_pretrained(their_base(tmp_path / "base"), directory)
    with torch.no_grad():
        assert info.family == "phi3" and max_diff(theirs(ids).logits, logits(model, "default", ids)) < 1e-5
    other = load_peft(directory, load_hf(tmp_path / "base", torch.float64)[0], family="phi3")
    assert max_diff(logits(other, "default", ids), logits(model, "default", ids)) < 1e-10
