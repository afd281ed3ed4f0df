"""HF-format directories: against transformers where it is installed, against ourselves and by refusal everywhere."""

import copy
import gc
import json
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from golden import load as load_golden
from reference_model import FAMILIES, random_ids, small_model
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.families import family_of
from model.gguf import read_gguf
from model.half import store
from model.hf import complete_directory, load_hf, read_config, reward_head, save_hf
from rlhf.infra import checkpoint
from rlhf.reward.model import RewardModel

every_family = pytest.mark.parametrize("family", FAMILIES)
LENGTHS = torch.tensor([14, 3, 9])


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[compare]'")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


def edit(directory, **changes):
    """config.json with other values; ... removes a key."""
    file = directory / "config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return directory


def edit_tensors(directory, change):
    """model.safetensors after change(tensors)."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def split_into_shards(directory, shards=3):
    """model.safetensors as an index and shards; returns the index's content."""
    tensors = load_file(directory / "model.safetensors")
    weight_map = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))
    }
    for shard in set(weight_map.values()):
        save_file({name: x for name, x in tensors.items() if weight_map[name] == shard}, directory / shard)
    (directory / "model.safetensors").unlink()
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(directory, error=ValueError, **kwargs) -> str:
    with pytest.raises(error) as caught:
        load_hf(directory, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


@pytest.fixture
def llama(tmp_path):
    return save_hf(tmp_path / "llama", small_model("llama", torch.float32))


@pytest.fixture
def gpt2(tmp_path):
    return save_hf(tmp_path / "gpt2", small_model("gpt2", torch.float32))


# Ours -> HF -> ours


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_round_trip(family, dtype, tmp_path):
    model = small_model(family, dtype)
    loaded, info = load_hf(save_hf(tmp_path / "hf", model, bos_id=3, eos_ids=[1, 2], pad_id=0))
    assert same_weights(model, loaded) and loaded.embed_tokens.weight.dtype == dtype
    assert (info.kind, info.bos_id, info.eos_ids, info.pad_id) == ("causal", 3, (1, 2), 0)
    named = "llama" if family in ("smollm2", "llama_linear", "llama3") else family
    assert info.family == family_of(model.config) == named
    again = save_hf(tmp_path / "again", loaded, bos_id=3, eos_ids=[1, 2], pad_id=0)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert loaded.config == load_hf(again)[0].config
    if "rope_scaling" not in FAMILIES[family]:  # there the old spelling of rope_type becomes the new one
        assert loaded.config == model.config


@pytest.mark.parametrize(
    "changes, family",
    [
        (dict(qkv_bias=True, out_bias=True), "llama"),
        (dict(mlp_bias=True), "llama"),
        (dict(qkv_bias=True, out_bias=True, qk_norm=True), "qwen3"),
        (dict(qkv_bias=True, tied=False), "qwen2"),
        (dict(head_dim=14, kv_heads=1), "llama"),
        ({**FAMILIES["gpt2"], "tied": False, "ffn": 96}, "gpt2"),
    ],
)
def test_round_trip_of_other_shapes(changes, family, tmp_path):
    model = small_model("smollm2", torch.float32, **{"kv_heads": None, "rope_theta": 1e4, "norm_eps": 1e-5, **changes})
    loaded, info = load_hf(save_hf(tmp_path / "hf", model))
    assert info.family == family and loaded.config == model.config and same_weights(model, loaded)


@pytest.mark.parametrize(
    "changes",
    [
        dict(positions="learned"),
        dict(norm_place="both"),
        dict(norm_place="after", qk_norm=True),
        dict(qk_norm=True, qk_norm_over="width"),
        dict(residual_scale=0.5, no_rope=(0,)),
        dict(logit_softcap=3.0),
        dict(local_rope=(0,)),
        {**FAMILIES["gemma2"], "attention_scale": 0.3},
        {**FAMILIES["gemma2"], "embedding_scale": 1.0},
        {**FAMILIES["gemma3_text"], "attention_softcap": 3.0},
        dict(norm="layer"),
        dict(activation="gelu"),
        dict(qk_norm=True, mlp_bias=True),
        dict(qkv_bias=True, mlp_bias=True),
        dict(out_bias=True),
        dict(qkv_bias=True, head_dim=10),
        dict(width=20, heads=3, head_dim=8),
        {**FAMILIES["gpt2"], "out_bias": False},
        {**FAMILIES["gpt2"], "kv_heads": 2},
        {**FAMILIES["gpt2"], "qk_norm": True},
    ],
)
def test_what_no_family_has_is_not_written(changes, tmp_path):
    model = small_model("smollm2", **{"kv_heads": None, **changes})
    with pytest.raises(ValueError, match="no HF family"):
        save_hf(tmp_path / "hf", model)
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_model_is_a_model_like_any_other(gpt2, tmp_path):
    """It can be trained without touching its file, copied and saved in our own format."""
    model, _ = load_hf(gpt2)
    before = (gpt2 / "model.safetensors").read_bytes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(random_ids(0, 2, 8)).log_softmax(-1)[..., 0].sum().backward()
    optimizer.step()
    assert (gpt2 / "model.safetensors").read_bytes() == before
    trained = copy.deepcopy(model)
    assert same_weights(trained, model) and not same_weights(model, load_hf(gpt2)[0])
    path = checkpoint.save(tmp_path / "ours", model.state_dict(), {})
    checkpoint.load_weights(trained, checkpoint.load(path).tensors, path)
    save_hf(gpt2, model)  # in place of the files that it is mapped from
    assert same_weights(trained, model) and same_weights(trained, load_hf(gpt2)[0])


def mapped_bytes(file: Path) -> int:
    """Of this process's address space that lie in a file."""
    rows = [row.split()[0].split("-") for row in Path("/proc/self/maps").read_text().splitlines() if str(file) in row]
    return sum(int(end, 16) - int(begin, 16) for begin, end in rows)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not tell what a process maps")
def test_what_is_stored_in_half_leaves_the_memory(tmp_path):
    """Each tensor is mapped for itself: alone its own pages, which go with it. None keeps a file descriptor."""
    directory = save_hf(tmp_path / "hf", small_model("llama", torch.float32, width=64, ffn=512, layers=3))
    file, descriptors = directory / "model.safetensors", len(os.listdir("/proc/self/fd"))
    model, _ = load_hf(directory)
    size, parameters = file.stat().st_size, len(list(model.parameters()))
    assert size <= mapped_bytes(file) + 2**14 and mapped_bytes(file) < size + 2 * mmap.PAGESIZE * parameters
    assert len(os.listdir("/proc/self/fd")) == descriptors
    store(model.requires_grad_(False), torch.bfloat16)
    gc.collect()
    assert 0 < mapped_bytes(file) <= 2 * mmap.PAGESIZE * sum(x.ndim == 1 for x in model.parameters())
    del model
    gc.collect()
    assert mapped_bytes(file) == 0


def test_types(llama, tmp_path):
    assert load_hf(llama, dtype=torch.bfloat16)[0].norm.weight.dtype == torch.bfloat16
    half = save_hf(tmp_path / "half", load_hf(llama)[0], dtype=torch.bfloat16)
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_hf(half)[0].norm.weight.dtype == torch.bfloat16

    def widen(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    model, _ = load_hf(edit_tensors(half, widen))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_one_copy_in_memory(tmp_path, dtype):
    """Peak resident memory of loading, every weight read, is near the model's own size: as stored, and converted."""
    model = small_model("llama", torch.float32, width=512, heads=8, ffn=2048, layers=6, vocab_size=4096)
    size = sum(p.numel() for p in model.parameters()) * (4 if dtype == "float32" else 8)
    save_hf(tmp_path / "hf", model)
    program = f"""if True:
        import resource, sys, torch
        from model.hf import load_hf
        torch.zeros(1).sum()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model, _ = load_hf(sys.argv[1], dtype=torch.{dtype})
        checksum = sum(float(p.detach().abs().sum()) for p in model.parameters())
        print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
    """
    out = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "hf"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert int(out) < 1.25 * size, f"{int(out) / size:.2f} copies"


# Files as others write them


@pytest.mark.parametrize("family", ["llama", "llama3", "llama_linear", "qwen3"])
def test_both_dialects_and_the_old_type_key(family, tmp_path):
    directory = save_hf(tmp_path / "hf", small_model(family, torch.float32))
    config, raw = read_config(directory).model, json.loads((directory / "config.json").read_text())
    scaling = raw["rope_scaling"] or {}
    new = {"rope_type": "default", "rope_theta": raw["rope_theta"], **scaling}
    edit(directory, rope_theta=..., rope_scaling=..., rope_parameters=new, torch_dtype=..., dtype="float32")
    assert read_config(directory).model == config
    old = {"type": scaling["rope_type"], **{k: v for k, v in scaling.items() if k != "rope_type"}} if scaling else None
    edit(directory, rope_theta=raw["rope_theta"], rope_scaling=old, rope_parameters=...)
    assert read_config(directory).model == config


def test_missing_keys_take_the_defaults_of_their_class(llama, gpt2, tmp_path):
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias"):
        edit(llama, **{key: ...})
    config = read_config(edit(llama, tie_word_embeddings=..., rms_norm_eps=...)).model
    assert (config.kv_heads, config.head_dim, config.rope_theta, config.norm_eps) == (4, 6, 1e4, 1e-6)
    assert not (config.tied or config.qkv_bias or config.out_bias or config.mlp_bias)
    config = read_config(edit(gpt2, tie_word_embeddings=..., layer_norm_epsilon=..., n_inner=...)).model
    assert (config.tied, config.norm_eps, config.ffn) == (True, 1e-5, 96)
    qwen3 = save_hf(tmp_path / "qwen3", small_model("qwen3"))
    assert read_config(edit(qwen3, head_dim=...)).model.head_dim == 128


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_shards(family, tmp_path):
    model = small_model(family, torch.float32)
    directory = save_hf(tmp_path / "hf", model)
    split_into_shards(directory)
    assert same_weights(model, load_hf(directory)[0])
    assert same_weights(model.double(), load_hf(directory, dtype=torch.float64)[0])


def test_the_original_gpt2_file(gpt2):
    """No prefix, and the causal masks as buffers."""
    model, _ = load_hf(gpt2)

    def age(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    assert same_weights(model, load_hf(edit_tensors(gpt2, age))[0])
    with_both = lambda tensors: tensors.update({"transformer.wte.weight": tensors["wte.weight"].clone()})  # noqa: E731
    assert "twice" in refusal(edit_tensors(gpt2, with_both))


@pytest.mark.parametrize("family", ["smollm2", "gpt2", "smollm3", "gemma2"])
def test_what_is_stored_beside_the_tied_flag(family, tmp_path):
    """The flag says tied. A copy of the embedding is dropped; another matrix is used; it alone is both; none is both too."""
    model = small_model(family, torch.float32)
    directory, ids = save_hf(tmp_path / "tied", model), random_ids(0, 2, 9)
    embedding = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    weight = model.embed_tokens.weight.detach().clone()
    edit_tensors(directory, lambda tensors: tensors.update({"lm_head.weight": weight}))
    for key in ({}, {"tie_word_embeddings": ...}):  # the classes of these tie where no flag says otherwise
        if family != "smollm2" or not key:
            loaded, info = load_hf(edit(directory, **key))
            assert info.model.tied and loaded.lm_head is None and same_weights(model, loaded)
    edit(directory, tie_word_embeddings=True)

    edit_tensors(directory, lambda tensors: tensors.update({"lm_head.weight": 2 * weight}))
    loaded, info = load_hf(directory)
    assert not info.model.tied and not loaded.config.tied and torch.equal(loaded.lm_head.weight, 2 * weight)
    undone = small_model(family, torch.float32, logit_softcap=None)
    logits = [x(ids) for x in (loaded, undone)]
    cap = loaded.config.logit_softcap
    expected = 2 * logits[1] if cap is None else cap * torch.tanh(2 * logits[1] / cap)
    assert torch.allclose(logits[0], expected, rtol=1e-4, atol=1e-4)
    again = load_hf(save_hf(tmp_path / "again", loaded))[0]
    assert same_weights(again, loaded) and not again.config.tied

    edit_tensors(
        directory, lambda tensors: tensors.update({"lm_head.weight": weight, embedding: tensors[embedding] + 1})
    )
    edit_tensors(directory, lambda tensors: tensors.pop(embedding))
    assert same_weights(model, load_hf(directory)[0])
    edit_tensors(directory, lambda tensors: tensors.pop("lm_head.weight"))
    assert f"{embedding!r}" in refusal(directory)


def test_an_output_matrix_that_differs_in_its_type(tmp_path):
    """The same numbers in another type are another matrix, as nobody can say which was meant; the widest type holds both."""
    model = small_model("smollm2", torch.float32)
    directory = save_hf(tmp_path / "hf", model)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].bfloat16()}))
    loaded, _ = load_hf(directory)
    assert torch.equal(loaded.lm_head.weight, model.embed_tokens.weight.bfloat16().float())


def test_untied_heads(tmp_path):
    directory = save_hf(tmp_path / "hf", small_model("llama", torch.float32))
    edit(directory, tie_word_embeddings=...)  # Llama's class does not tie
    assert load_hf(directory)[0].lm_head.weight.shape == (13, 24)
    edit_tensors(directory, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lacks 1 of the" in (message := refusal(directory)) and "lm_head.weight" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_damaged_weight_is_named(dtype, wrong, tmp_path):
    directory = save_hf(tmp_path / "hf", small_model("gpt2", dtype))
    edit_tensors(
        directory,
        lambda tensors: tensors["transformer.h.1.mlp.c_fc.weight"].index_put_(
            (torch.tensor(3), torch.tensor(5)), torch.tensor(wrong, dtype=dtype)
        ),
    )
    for as_dtype in (None, torch.float32):
        message = refusal(directory, dtype=as_dtype)
        assert "transformer.h.1.mlp.c_fc.weight" in message and f"holds {wrong} at [3, 5]" in message


def test_the_largest_finite_weights_are_no_damage(tmp_path):
    """Their sum is infinite."""
    directory = save_hf(tmp_path / "hf", small_model("llama", torch.float32))
    edit_tensors(directory, lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    load_hf(directory)


def test_frequencies_of_old_llamas_are_ignored(llama):
    old = lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})  # noqa: E731
    load_hf(edit_tensors(llama, old))


def test_mistral_is_a_llama(llama):
    edit(llama, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    model, info = load_hf(llama)
    assert info.family == "mistral" and family_of(model.config) == "llama" and model.config.context == 32


NO_KEY, SLIDES, FULL = {"sliding_window": ...}, "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    "family, changes, context",
    [
        ("mistral", dict(sliding_window=7), 7),
        ("mistral", NO_KEY | dict(max_position_embeddings=9000), 4096),  # its class has one unless it says null
        ("mistral", dict(sliding_window=700), 32),
        ("phi3", dict(sliding_window=7), 7),
        ("phi3", NO_KEY, 32),
        ("qwen2", dict(use_sliding_window=False, sliding_window=7), 32),
        ("qwen2", dict(use_sliding_window=True, sliding_window=None, layer_types=None), "has no sliding_window"),
        ("qwen2", dict(use_sliding_window=True, sliding_window=7), 32),  # from layer 28 on, and there are two
        ("qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=1), 7),
        ("qwen2", dict(use_sliding_window=True, sliding_window=7, layer_types=[SLIDES, FULL]), 7),
        ("qwen2", dict(use_sliding_window=True, sliding_window=7, layer_types=[FULL, FULL]), 32),
        ("qwen2", dict(use_sliding_window=False, sliding_window=7, layer_types=[SLIDES, FULL]), "without use_sliding"),
        ("qwen3", dict(use_sliding_window=True, sliding_window=7, max_window_layers=1), 7),
        ("qwen3", dict(use_sliding_window=True, sliding_window=7, layer_types=[SLIDES]), "layer_types has 1 entries"),
        ("qwen3", dict(use_sliding_window=True, sliding_window=0, layer_types=[SLIDES, FULL]), "sliding_window is 0"),
        ("qwen3", dict(layer_types=["chunked_attention", FULL]), "layer_types are"),
        ("qwen3", dict(layer_types="full_attention"), "layer_types are"),
        ("smollm3", dict(use_sliding_window=True, sliding_window=7), 7),  # the layer without RoPE
        ("smollm3", dict(use_sliding_window=True, sliding_window=7, no_rope_layers=[1, 1]), 32),
        ("gemma2", dict(sliding_window=7), 7),
        ("gemma2", dict(sliding_window=7, layer_types=[FULL, FULL]), 32),
        ("gemma2", dict(sliding_window=None), "sliding_window is missing"),
        ("gemma3_text", dict(sliding_window=7), 7),
        ("llama", dict(sliding_window=7), 32),  # its class knows no such key
        ("llama", dict(use_sliding_window=True, sliding_window=7), "llama has no sliding_window"),
        ("olmo2", dict(layer_types=[SLIDES, FULL]), "layer_types are"),
    ],
)
def test_the_context_ends_where_a_window_would_hide(family, changes, context, tmp_path):
    written = {"mistral": "llama", "phi3": "llama"}.get(family, family)
    directory = save_hf(tmp_path / "hf", small_model(written, torch.float32))
    name = {"mistral": "Mistral", "phi3": "Phi3"}.get(family)
    edit(directory, **({"model_type": family, "architectures": [f"{name}ForCausalLM"]} if name else {}), **changes)
    if isinstance(context, str):
        with pytest.raises(ValueError, match=context):
            read_config(directory)
    else:
        assert read_config(directory).model.context == context


@pytest.mark.parametrize(
    "family, places", [("smollm3", (3, 7)), ("gemma2", ()), ("gemma3_text", (0, 1, 2, 3, 4, 6, 7))]
)
def test_patterns_of_layers_that_no_list_spells_out(family, places, tmp_path):
    directory = save_hf(
        tmp_path / "hf",
        small_model(family, torch.float32, layers=8, no_rope=(0,) * (family == "smollm3"), local_rope=()),
    )
    config = read_config(edit(directory, no_rope_layers=..., layer_types=..., model_type=family)).model
    assert (config.local_rope if family == "gemma3_text" else config.no_rope) == places


def test_ids_of_generation_config_come_first(llama):
    edit(llama, eos_token_id=5, pad_token_id=-1, bos_token_id=4)
    info = read_config(llama)
    assert (info.bos_id, info.eos_ids, info.pad_id) == (4, (5,), None)
    (llama / "generation_config.json").write_text('{"eos_token_id": [7, 8], "temperature": 0.6}')
    info = read_config(llama)
    assert (info.eos_ids, info.bos_id) == ((7, 8), 4)
    (llama / "generation_config.json").unlink()
    assert read_config(llama).eos_ids == (5,)


# Refusals


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="gemma"), ["gemma", "llama", "qwen3"]),
        (dict(model_type=...), ["model_type"]),
        (dict(model_type=["llama"]), ["llama"]),
        (dict(architectures=["LlamaForTokenClassification"]), ["LlamaForTokenClassification"]),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ["yarn", "llama3"]),
        (dict(rope_scaling={"type": "dynamic", "factor": 4.0}), ["dynamic"]),
        (dict(rope_scaling={"rope_type": "linear"}), ["factor", "missing"]),
        (dict(rope_scaling={"rope_type": "linear", "factor": 0}), ["factor", "0"]),
        (dict(rope_scaling={"rope_type": "linear", "factor": "4"}), ["factor", "'4'"]),
        (dict(rope_scaling={"full_attention": {"rope_type": "default"}}), ["full_attention", "all layers"]),
        (dict(rope_theta=float("inf")), ["rope_theta"]),
        (dict(rope_theta=10**400), ["rope_theta"]),
        (dict(use_sliding_window=True), ["use_sliding_window", "llama has no"]),
        (dict(layer_types=["full_attention", "sliding_attention"]), ["layer_types"]),
        (dict(no_rope_layers=[1, 0]), ["no_rope_layers"]),
        (dict(model_type="gemma3"), ["gemma3", "gemma3_text"]),
        (dict(model_type="qwen3_moe"), ["qwen3_moe"]),
        (dict(quantization_config={"quant_method": "gptq"}), ["quantization_config", "gptq"]),
        (dict(hidden_act="gelu"), ["hidden_act", "gelu", "silu"]),
        (dict(partial_rotary_factor=0.5), ["partial_rotary_factor", "0.5"]),
        (dict(hidden_size=24.0), ["hidden_size", "24.0"]),
        (dict(hidden_size=10**12), ["hidden_size", "1000000000000"]),
        (dict(num_hidden_layers=10**6), ["num_hidden_layers", "1000000", "1024"]),
        (dict(num_hidden_layers=True), ["num_hidden_layers", "True"]),
        (dict(vocab_size=...), ["vocab_size", "missing"]),
        (dict(num_key_value_heads=3), ["4", "3"]),
        (dict(tie_word_embeddings="no"), ["tie_word_embeddings", "no"]),
        (dict(eos_token_id="</s>"), ["eos_token_id", "</s>"]),
        (dict(rms_norm_eps=-1), ["rms_norm_eps", "-1"]),
    ],
)
def test_a_config_that_is_not_understood(llama, changes, words):
    message = refusal(edit(llama, **changes))
    assert all(word in message for word in [*words, str(llama)])


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(scale_attn_weights=False), "scale_attn_weights"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (dict(add_cross_attention=True), "add_cross_attention"),
        (dict(activation_function="relu"), "activation_function"),
        (dict(n_head=5), "heads 5"),
        (dict(architectures=["GPT2DoubleHeadsModel"]), "GPT2DoubleHeadsModel"),
    ],
)
def test_a_gpt2_that_is_not_understood(gpt2, changes, word):
    assert word in refusal(edit(gpt2, **changes))


def test_tensors_that_do_not_fit(llama):
    original = shutil.copytree(llama, llama.parent / "original")

    def message(change):
        shutil.copy(original / "model.safetensors", llama)
        return refusal(edit_tensors(llama, change))

    assert "lacks 2 of the 21 tensors" in message(
        lambda t: (t.pop("model.norm.weight"), t.pop("model.layers.1.mlp.up_proj.weight"))
    )
    found = message(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(24)}))
    assert "1 tensors" in found and "q_proj.bias" in found
    assert "model.layers.2.x" in message(lambda t: t.update({"layers.2.x": torch.zeros(1)}))
    assert "score.weight" in message(lambda t: t.update({"score.weight": torch.zeros(1, 24)}))
    found = message(lambda t: t.update({"model.norm.weight": torch.ones(23)}))
    assert "(23,)" in found and "(24,)" in found and "model.norm.weight" in found
    assert "I8" in message(lambda t: t.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)}))
    shutil.copy(original / "model.safetensors", llama)
    assert "model.layers.2" in refusal(edit(llama, num_hidden_layers=3))
    assert "model.layers.1" in refusal(edit(llama, num_hidden_layers=1))
    found = refusal(edit(llama, num_hidden_layers=2, hidden_size=48, head_dim=6))
    assert "(13, 24)" in found and "(13, 48)" in found
    refusal(edit(llama, hidden_size=2**24, vocab_size=2**24, intermediate_size=2**24))


def test_directories_that_are_none(llama, tmp_path):
    assert "config.json" in refusal(tmp_path / "nothing", FileNotFoundError)
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(llama, FileNotFoundError)
    for content in ("", "[]", "{", "\xff", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"):
        (llama / "config.json").write_bytes(content.encode("latin-1"))
        assert "config.json" in refusal(llama)
    ours = checkpoint.save(tmp_path / "ours", {}, {"model": {}})
    assert "model_type" in refusal(ours)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "/x.safetensors", "a/b.safetensors", "..", "", 7, None]
)
def test_an_index_that_points_elsewhere(llama, name):
    index = split_into_shards(llama)
    index["weight_map"]["model.norm.weight"] = name
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "file beside it" in refusal(llama)


def test_shards_that_do_not_fit(llama):
    index = split_into_shards(llama)
    shard = sorted(set(index["weight_map"].values()))[1]
    tensors = load_file(llama / shard)
    name = sorted(tensors)[0]
    save_file({key: x for key, x in tensors.items() if key != name}, llama / shard)
    assert f"lacks what the index promises: {name!r}" in refusal(llama)
    save_file({**tensors, sorted(index["weight_map"])[0]: torch.zeros(1)}, llama / shard)
    assert "repeats" in refusal(llama)
    (llama / shard).unlink()
    assert "lacks 1 of 3 shards" in (message := refusal(llama)) and shard in message
    for weight_map in ({}, None, [], "x"):
        (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert "weight_map" in refusal(llama)


def test_links(llama, tmp_path):
    """A link out of the directory is refused, except into the blobs of the hub's own cache."""
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for file in llama.iterdir():
        shutil.copy(file, blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    assert same_weights(load_hf(snapshot)[0], load_hf(llama)[0])
    (tmp_path / "link").symlink_to(llama)
    load_hf(tmp_path / "link")
    outside = shutil.copy(llama / "model.safetensors", tmp_path / "secret.safetensors")
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors").symlink_to(outside)
    assert "link to" in refusal(llama)


def test_what_is_no_file_is_not_waited_for(llama, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("config.json", "model.safetensors"):
        content = (llama / name).read_bytes()
        for other in (tmp_path / "fifo", Path("/dev/zero")):
            (llama / name).unlink()
            if other.name == "fifo":
                os.mkfifo(llama / name)
            else:
                (llama / name).symlink_to(other)
            assert name.partition(".")[0] in refusal(llama, (FileNotFoundError, ValueError))
        (llama / name).unlink()
        (llama / name).write_bytes(content)
        load_hf(llama)
    for path in (tmp_path / "fifo", "/dev/zero", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_gguf(path)


@pytest.mark.parametrize("depth", [200, 700, 900, 990])
def test_values_that_are_nested_deeply(llama, depth):
    """As deep as json reads, which is deeper than Python can write them again."""
    for key in ("hidden_size", "rope_scaling", "layer_types", "quantization_config", "eos_token_id", "model_type"):
        content = json.loads((llama / "config.json").read_text())
        text = json.dumps(content | {key: 0}).replace(f'"{key}": 0', f'"{key}": ' + "[" * depth + "]" * depth)
        (llama / "config.json").write_text(text)
        refusal(llama)
        (llama / "config.json").write_text(json.dumps(content))


def test_headers_that_lie(llama):
    file = llama / "model.safetensors"
    good = file.read_bytes()
    length = int.from_bytes(good[:8], "little")
    for claim in (length - 1, length + 8, len(good), 2**31, 2**63, 2**64 - 1, 0):
        file.write_bytes(claim.to_bytes(8, "little") + good[8:])
        assert "model.safetensors" in refusal(llama)
    for cut in (0, 7, 8, length, length + 8, len(good) - 1):
        file.write_bytes(good[:cut])
        assert "model.safetensors" in refusal(llama)
    header = json.loads(good[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [2**62, 4]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + good[8 + length :])
    assert "model.safetensors" in refusal(llama)


# Writing


def test_nothing_of_value_is_replaced(llama, tmp_path):
    model = load_hf(llama)[0]
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.tex").write_text("x")
    with pytest.raises(OSError, match="thesis"):
        save_hf(precious, model)
    (precious / "config.json").write_text("{}")
    (precious / "figures").mkdir()
    with pytest.raises(OSError, match="thesis"):
        save_hf(precious, model)
    assert (precious / "chapter1.tex").exists()
    with pytest.raises(OSError, match="file"):
        (tmp_path / "file").write_text("x")
        save_hf(tmp_path / "file", model)
    (tmp_path / "empty").mkdir()
    save_hf(tmp_path / "empty", model)
    save_hf(llama, model, dtype=torch.bfloat16)
    assert load_hf(llama)[0].norm.weight.dtype == torch.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "llama", "thesis"]


def test_a_failed_export_leaves_what_was_there(llama, tmp_path):
    before = {file.name: file.read_bytes() for file in llama.iterdir()}
    model = load_hf(llama)[0]
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        save_hf(llama, model, files=[tmp_path / "tokenizer.json"])
    with pytest.raises(KeyboardInterrupt), complete_directory(llama, "config.json") as temporary:
        (temporary / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert before == {file.name: file.read_bytes() for file in llama.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_files_and_settings_beside_the_weights(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    model = small_model("llama", torch.float32)
    directory = save_hf(
        tmp_path / "a" / "b",
        model,
        eos_ids=[1],
        files=[tmp_path / "tokenizer.json"],
    )
    assert sorted(f.name for f in directory.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    raw, generation = (json.loads((directory / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert raw["vocab_size"] == 13 and raw["eos_token_id"] == 1
    assert generation == {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    assert "rope_parameters" not in raw and raw["rope_theta"] == 1e4 and raw["rope_scaling"] is None
    modes = {file.stat().st_mode & 0o777 for file in directory.iterdir() if file.name != "tokenizer.json"}
    assert len(modes) == 1, "all files as the umask says"


# Reward models


def reward_model(family, seed=0):
    """Gain, bias and every weight matter."""
    generator = torch.Generator().manual_seed(seed)
    reward = RewardModel(soft_model(family), "last", generator)
    with torch.no_grad():
        reward.head.weight.normal_(generator=generator)
        reward.head.bias.fill_(0.7)
        reward.gain.fill_(0.37)
        reward.bias.fill_(-1.9)
    return reward


def padded(seed=0, pad=0):
    """Right-padded rows whose text has no padding id, with their lengths."""
    ids = 1 + random_ids(seed, 3, 14, vocab_size=12)
    return torch.where(torch.arange(14) < LENGTHS[:, None], ids, pad), LENGTHS


def without_granite(family):
    if family == "granite":
        pytest.skip("HF has no such classifier")


def save_reward(directory, reward, **kwargs):
    weight, bias = reward_head(reward.head, float(reward.gain), float(reward.bias), reward.pooling)
    return save_hf(directory, reward.model, score=weight, reward_bias=bias, **{"pad_id": 0, "eos_ids": [1], **kwargs})


@every_family
def test_reward_model_round_trip(family, tmp_path):
    without_granite(family)
    reward = reward_model(family)
    directory = save_reward(tmp_path / "rm", reward)
    model, info = load_hf(directory)
    tokens, lengths = padded()
    with torch.no_grad():
        hidden = model.trunk(tokens)[torch.arange(3), lengths - 1]
        scores = (hidden @ info.score.T).squeeze(-1) + info.reward_bias
        expected = reward.score(tokens, lengths, tokens > 0)
    assert (info.kind, info.num_labels, info.pad_id) == ("classifier", 1, 0)
    assert float((scores - expected).abs().max()) < 1e-5
    raw, names = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    assert raw["id2label"] == {"0": "LABEL_0"} and raw["label2id"] == {"LABEL_0": 0} and raw["num_labels"] == 1
    assert raw["architectures"][0].endswith("ForSequenceClassification") and raw["pad_token_id"] == 0
    assert "lm_head.weight" not in names and names["score.weight"].shape == (1, 24)


def test_what_a_classifier_cannot_express(tmp_path):
    reward = reward_model("gpt2")
    reward.pooling = "mean"
    with pytest.raises(ValueError, match="mean"):
        save_reward(tmp_path / "rm", reward)
    reward.pooling = "last"
    for pad, eos in ((None, [1]), (1, [1]), (13, [1]), (-1, [])):
        with pytest.raises(ValueError, match="pad_id"):
            save_reward(tmp_path / "rm", reward, pad_id=pad, eos_ids=eos)
    with pytest.raises(ValueError, match="no sequence classifier of the granite family"):
        save_reward(tmp_path / "rm", reward_model("granite"))
    assert list(tmp_path.iterdir()) == []


def test_heads_that_do_not_fit(tmp_path):
    directory = save_reward(tmp_path / "rm", reward_model("llama"))
    assert "(1, 24)" in (message := refusal(edit(directory, num_labels=2))) and "(2, 24)" in message
    assert load_hf(edit(directory, num_labels=...))[1].num_labels == 1
    assert load_hf(edit(directory, id2label=...))[1].score.shape == (1, 24)
    for shape in ((), (0, 24), (24,)):
        head = {"score.weight": torch.zeros(shape)}
        assert f"score.weight has shape {shape}" in refusal(
            edit_tensors(directory, lambda t, head=head: t.update(head))
        )
    edit_tensors(directory, lambda tensors: tensors.pop("score.weight"))
    assert "score.weight" in refusal(directory)


# Against transformers


def hf_logits(model, tokens, lengths):
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        return model.eval()(input_ids=tokens, attention_mask=mask).logits


def close(ours, theirs, tolerance=1e-5):
    difference = float((ours.detach() - theirs.detach()).abs().max())
    assert difference < tolerance, difference


def agree(model, theirs, seed=0):
    """Same logits on every real position of a padded batch: in float32, and in float64, where rounding hides nothing.

    There GPT-2 agrees to 1e-10; the others to 1e-5, as transformers computes RoPE's tables in float32 all the same.
    """
    tokens, lengths = padded(seed)
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    close(model(tokens)[real], hf_logits(theirs, tokens, lengths)[real])
    exact = 1e-10 if model.config.positions == "learned" else 1e-5
    model, theirs = (copy.deepcopy(x).double() for x in (model, theirs))
    close(model(tokens)[real], hf_logits(theirs, tokens, lengths)[real], exact)


def soft_model(family):
    """Weights half as large as small_model's, so that float32 itself is good to 1e-5."""
    model = small_model(family, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim == 2 else 1)
    return model


@every_family
def test_transformers_reads_ours(transformers, family, tmp_path):
    model = soft_model(family)
    directory = save_hf(tmp_path / "hf", model, bos_id=3, eos_ids=[1, 2], pad_id=0)
    theirs, notes = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.model_type == family_of(model.config)
    assert (theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id) == ([1, 2], 0)
    for seed in range(3):
        agree(model, theirs, seed)


LLAMA3 = FAMILIES["llama3"]["rope_scaling"]
SIZES = dict(
    vocab_size=13, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20
)  # and max_position_embeddings=64, beyond Llama 3's 40
THEIRS = {
    "gpt2": ("GPT2", dict()),
    "gpt2 narrow, untied": ("GPT2", dict(n_inner=20, tie_word_embeddings=False, layer_norm_epsilon=1e-3)),
    "llama": ("Llama", dict(num_key_value_heads=2)),
    "llama tied, biases": ("Llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama head_dim": ("Llama", dict(head_dim=10, num_key_value_heads=1, rms_norm_eps=1e-3)),
    "llama3": ("Llama", dict(rope_parameters={"rope_theta": 50.0, **LLAMA3}, num_key_value_heads=2)),
    "llama linear": ("Llama", dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0})),
    "mistral": ("Mistral", dict(num_key_value_heads=2, sliding_window=None)),
    "mistral window": ("Mistral", dict(num_key_value_heads=2, sliding_window=14)),
    "qwen2 window": (
        "Qwen2",
        dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=14, max_window_layers=1),
    ),
    "phi3": ("Phi3", dict(num_key_value_heads=2, pad_token_id=0, sliding_window=20)),
    "smollm3": ("SmolLM3", dict(num_key_value_heads=2, no_rope_layers=[1, 0], pad_token_id=0)),
    "smollm3 of the class": ("SmolLM3", dict(num_hidden_layers=5, attention_bias=True, mlp_bias=True, pad_token_id=0)),
    "olmo2": ("Olmo2", dict(num_key_value_heads=2, pad_token_id=0)),
    "olmo2 tied, biases": ("Olmo2", dict(attention_bias=True, tie_word_embeddings=True, pad_token_id=0)),
    "granite": (
        "Granite",
        dict(embedding_multiplier=6.0, attention_multiplier=0.3, residual_multiplier=0.22, logits_scaling=4.0)
        | dict(num_key_value_heads=2, tie_word_embeddings=True, mlp_bias=True),
    ),
    "granite plain": ("Granite", dict(attention_bias=True)),
    "gemma2": (
        "Gemma2",
        dict(
            head_dim=10,
            query_pre_attn_scalar=7,
            num_key_value_heads=2,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma2 without caps": (
        "Gemma2",
        dict(head_dim=6, attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=14),
    ),
    "gemma3_text": (
        "Gemma3Text",
        dict(head_dim=10, query_pre_attn_scalar=7, num_key_value_heads=1, num_hidden_layers=7, sliding_window=14)
        | dict(rope_parameters={"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0}}),
    ),
    "gemma3_text capped": (
        "Gemma3Text",
        dict(head_dim=6, final_logit_softcapping=2.0, tie_word_embeddings=False, layer_types=[FULL, SLIDES])
        | dict(rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 9.0}}),
    ),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen2 tied": ("Qwen2", dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=10)),
    "qwen3 tied, biases": (
        "Qwen3",
        dict(num_key_value_heads=1, attention_bias=True, tie_word_embeddings=True, head_dim=8),
    ),
}


def their_model(transformers, kind, head="CausalLM", **extra):
    """A model of theirs in which every parameter matters."""
    name, changes = THEIRS[kind]
    if name == "GPT2":
        sizes, head = (
            dict(vocab_size=13, n_embd=24, n_layer=2, n_head=4, n_positions=64),
            head.replace("CausalLM", "LMHeadModel"),
        )
    else:
        sizes = {**SIZES, "max_position_embeddings": 64}
    config = getattr(transformers, f"{name}Config")(
        **{**sizes, "bos_token_id": 1, "eos_token_id": 2, **changes, **extra}
    )
    name = name.removesuffix("Text") if head == "CausalLM" else name
    model = getattr(transformers, name + (head if head.startswith("LMHead") else f"For{head}"))(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            norm = key.endswith("weight") and ("norm" in key or ".ln_" in key)
            one = norm and not name.startswith("Gemma")  # whose norms multiply by 1 + weight
            parameter.copy_(one + (0.3 if norm else 0.2) * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", THEIRS)
def test_we_read_what_transformers_writes(transformers, kind, tmp_path):
    theirs = their_model(transformers, kind)
    theirs.save_pretrained(tmp_path / "one")
    model, info = load_hf(tmp_path / "one")
    assert info.eos_ids == (2,) and info.family == theirs.config.model_type
    agree(model, theirs)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert same_weights(model, load_hf(tmp_path / "sharded")[0])
    again = save_hf(tmp_path / "again", model, bos_id=1, eos_ids=[2])
    if info.family not in ("mistral", "phi3"):  # which go on as llamas
        assert sorted(load_file(again / "model.safetensors")) == sorted(
            load_file(tmp_path / "one" / "model.safetensors")
        )
        assert read_config(again).family == info.family
    agree(model, transformers.AutoModelForCausalLM.from_pretrained(again))


def test_the_old_dialect_means_the_same_to_transformers(transformers, tmp_path):
    """rope_theta beside rope_scaling, as transformers 4 wrote it, in both programs."""
    theirs = their_model(transformers, "llama3")
    theirs.save_pretrained(tmp_path / "hf")
    edit(tmp_path / "hf", rope_parameters=..., rope_theta=50.0, rope_scaling=LLAMA3, dtype=..., torch_dtype="float32")
    model, _ = load_hf(tmp_path / "hf")
    assert model.config.rope_scaling["rope_type"] == "llama3" and model.config.rope_theta == 50
    agree(model, theirs)
    agree(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_cached_decoding_equals_transformers_generate(transformers, kind, tmp_path):
    from model.generate import Sampling, generate

    theirs = their_model(transformers, kind)
    theirs.save_pretrained(tmp_path / "hf")
    model, info = load_hf(tmp_path / "hf")
    tokens, lengths = padded()
    ours = generate(model, tokens, lengths, Sampling(12, info.eos_ids, 0, temperature=0))
    for row, length in enumerate(lengths.tolist()):
        expected = theirs.generate(tokens[row : row + 1, :length], max_new_tokens=12, do_sample=False, pad_token_id=0)[
            0
        ]
        assert ours.tokens[row, : ours.lengths[row]].tolist() == expected.tolist()


@every_family
def test_transformers_scores_as_our_reward_model(transformers, family, tmp_path):
    without_granite(family)
    reward = reward_model(family)
    directory = save_reward(tmp_path / "rm", reward)
    theirs, notes = transformers.AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, lengths = padded()
    scores = hf_logits(theirs, tokens, lengths).squeeze(-1) + theirs.config.reward_bias
    with torch.no_grad():
        close(reward.score(tokens, lengths, tokens > 0), scores)
        close(reward.score(tokens, lengths, tokens > 0).diff(), hf_logits(theirs, tokens, lengths).squeeze(-1).diff())


SCORED = ["gpt2", "llama", "qwen2", "qwen3 tied, biases", "smollm3", "olmo2", "phi3", "gemma2", "gemma3_text"]


@pytest.mark.parametrize("kind", SCORED)
def test_we_score_as_a_classifier_of_transformers(transformers, kind, tmp_path):
    theirs = their_model(transformers, kind, "SequenceClassification", num_labels=1, pad_token_id=0)
    theirs.save_pretrained(tmp_path / "rm")
    model, info = load_hf(tmp_path / "rm")
    assert (info.kind, info.num_labels, info.pad_id, info.reward_bias) == ("classifier", 1, 0, 0.0)
    tokens, lengths = padded()
    hidden = model.trunk(tokens)[torch.arange(3), lengths - 1]
    close(hidden @ info.score.T, hf_logits(theirs, tokens, lengths))


def test_where_transformers_reads_the_score(golden_dir):
    """The golden rows: with a pad id of its own every right-padded row is read at its last token, as ours by length.

    With pad = eos, row 0 would be read one token before its end: what `save_hf` refuses to write.
    """
    golden = load_golden(golden_dir, "hf_seqcls_pooling_index")
    tokens = golden.inputs["input_ids"]
    separate = golden.outputs["LlamaForSequenceClassification, pad=0,eos=1 (separate)"]
    joined = golden.outputs["LlamaForSequenceClassification, pad=eos=1"]
    for row in (0, 2, 5):  # right-padded, or full
        length = int((tokens[row] != 0).sum())
        assert int(separate[row]) == length - 1
    assert int(joined[5]) == 1, "the EOS that ends the text is taken for padding"


def test_config_of_smollm2(tmp_path):
    """Its published config.json, word for word where it matters, is our preset and comes back the same."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 49152,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    info = read_config(tmp_path)
    assert info.model == ModelConfig(49152, 576, 30, 9, 3, ffn=1536, context=8192, rope_theta=1e5)
    assert (info.eos_ids, info.pad_id, info.bos_id) == ((2,), 2, 1)


def test_loading_needs_no_compiler(llama):
    """Importing torch._dynamo takes longer than everything else that loading does."""
    program = (
        "import sys; from model.hf import load_hf; load_hf(sys.argv[1]); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, llama], cwd=ROOT, check=True)
