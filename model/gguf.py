"""GGUF files in and out: the one-file format of llama.cpp, with weights, tokenizer and chat template.

    "GGUF", version, counts | metadata: key, type, value | tensors: name, shape, type, offset | data, aligned

Everything is little-endian; shapes stand innermost first. Weights may be stored in blocks of 32 numbers along a row:

    Q4_0   f16 d, 16 bytes          x = d (q - 8)    a byte's low half is value i, its high half value i + 16
    Q4_1   f16 d, f16 m, 16 bytes   x = d q + m
    Q8_0   f16 d, 32 int8           x = d q          d = max|x| / 127

Architecture "llama" stores the rows of q and k so that the two halves of a RoPE pair are neighbours; ours, like HF's,
stand half a head apart (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Gemma's norms are stored as what they
multiply by, 1 + weight.
"""

import errno
import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.config import MOST_LAYERS, ModelConfig, rope_type, show
from model.families import family_of, real, show_names, size
from model.hf import empty_model, flush_to_disk
from model.transformer import Transformer, rope_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "smollm3", "olmo2", "granite", "gemma2", "gemma3")
NEIGHBOURS = ("llama", "smollm3", "granite")  # whose rows of q and k stand so that the halves of a pair are neighbours
SCALARS = dict(zip((*range(8), 10, 11, 12), "<u1 <i1 <u2 <i2 <u4 <i4 <f4 ? <u8 <i8 <f8".split()))  # of metadata
STRING, ARRAY = 8, 9
KINDS = {"F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2)}  # name -> id, numbers in a block, bytes of a block
KINDS |= {"Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q8_0": (8, 32, 34)}
OTHER_KINDS = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}
LARGEST = {"F32": 3.4028235e38, "F16": 65504, "Q8_0": 65504 * 127}
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}
NAMES = {  # our module -> GGUF's
    "embed_tokens": "token_embd",
    "embed_positions": "position_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "attention_output_norm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp_output_norm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # GPT-2's are three thirds of attn_qkv
TOKENIZER = {  # what data/tokenizer.py calls it -> GGUF's key
    "model": "tokenizer.ggml.model",  # gpt2: byte-level BPE, llama: SentencePiece
    "pre": "tokenizer.ggml.pre",
    "tokens": "tokenizer.ggml.tokens",
    "types": "tokenizer.ggml.token_type",
    "merges": "tokenizer.ggml.merges",
    "scores": "tokenizer.ggml.scores",
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "add_bos": "tokenizer.ggml.add_bos_token",
    "add_space_prefix": "tokenizer.ggml.add_space_prefix",
    "chat_template": "tokenizer.chat_template",
    "eot": "tokenizer.ggml.eot_token_id",  # these two end a text too
    "eom": "tokenizer.ggml.eom_token_id",
    "stops": "plain_rlhf.stop_token_ids",  # ours: all that end a text
    "beside": "plain_rlhf.tokenizer",  # ours: what llama.cpp has no key for
}
UNUSED_TOKEN = 5  # its token_type
PLAIN = {  # settings that change what a model computes, and the values that mean what ours computes
    "expert_count": (None, 0),
    "rope.scaling.type": (None, "none", "linear"),
    "rope.scale_linear": (None, 1.0),
}
SCALES = {  # of Granite: GGUF's key -> ours
    "embedding_scale": "embedding_scale",
    "attention.scale": "attention_scale",
    "residual_scale": "residual_scale",
    "logit_scale": "logit_divisor",
}
CAPS = {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logit_softcap"}
GEMMA2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # of a file that does not say
LONGEST_STRING = 2**24  # bytes; a chat template has 10,000
LONGEST_ARRAY = 2**24  # items; merges of a large vocabulary are 2**19
MOST_ENTRIES = 2**16  # metadata and tensors; a model of 100 layers has 1,000
CHUNK = 2**20  # numbers that are converted at once: the memory needed beside the model


# 1. the file


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the file, and how."""

    kind: str  # F32, Q8_0 ...
    shape: tuple[int, ...]  # as in torch
    offset: int  # bytes from the start of the file
    bytes: int


@dataclass(frozen=True)
class GGUF:
    """An open file: its metadata, and its tensors where they lie (memory-mapped)."""

    path: Path
    metadata: dict
    tensors: dict[str, Stored]
    data: mmap.mmap

    def rows(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """The numbers of a tensor as float32, in pieces of at most CHUNK along its first dimension."""
        stored = self.tensors[name]
        _, per_block, block = KINDS[stored.kind]
        width = math.prod(stored.shape[1:])
        step = max(1, CHUNK // width) if len(stored.shape) > 1 else stored.shape[0]
        for start in range(0, stored.shape[0], step):
            stop = min(start + step, stored.shape[0])
            first, last = (stored.offset + i * width // per_block * block for i in (start, stop))
            raw = np.frombuffer(self.data, np.uint8, last - first, first)
            with np.errstate(invalid="ignore", over="ignore"):
                values = dequantise(raw, stored.kind)
            if not np.isfinite(values).all():
                raise ValueError(f"{name} is damaged: its numbers {start} to {stop} of dimension 0 are not all finite")
            yield slice(start, stop), values.reshape(stop - start, *stored.shape[1:])


class Cursor:
    """Reads the header from start to end and never past it."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, n: int, what: str) -> bytes:
        if n > self.left():
            raise ValueError(
                f"{self.path} is cut short or damaged: {what} needs {n} bytes at byte {self.at}, {self.left()} are left"
            )
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, dtype: str, what: str):
        return np.frombuffer(self.take(np.dtype(dtype).itemsize, what), dtype)[0].item()

    def count(self, what: str, most: int, smallest: int, dtype: str = "<u8") -> int:
        """How many of something follow: at most `most`, and no more than fit into the file at `smallest` bytes each."""
        n = self.number(dtype, what)
        if n > most or n * smallest > self.left():
            limit = min(most, self.left() // smallest)
            raise ValueError(f"{self.path} is damaged: it claims {n} {what}, at most {limit} are possible here")
        return n

    def string(self, what: str) -> str:
        raw = self.take(self.count(f"bytes of {what}", LONGEST_STRING, 1), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} is damaged: {what} is no UTF-8: {show(raw)}") from None

    def value(self, what: str):
        kind = self.number("<u4", f"the type of {what}")
        if kind == STRING:
            return self.string(what)
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind != ARRAY:
            raise ValueError(f"{self.path} is damaged: {what} has type {kind}, known are 0 to 12")
        kind = self.number("<u4", f"the type of {what}")
        if kind == STRING:
            return [self.string(what) for _ in range(self.count(f"items of {what}", LONGEST_ARRAY, 8))]
        if kind not in SCALARS:
            raise ValueError(f"{self.path}: {what} is an array of type {kind}; numbers and strings are read")
        dtype = np.dtype(SCALARS[kind])
        n = self.count(f"items of {what}", LONGEST_ARRAY, dtype.itemsize)
        return np.frombuffer(self.take(n * dtype.itemsize, what), dtype).tolist()


def read_gguf(path: str | Path) -> GGUF:
    """Open a GGUF file of version 2 or 3 and check that everything it names lies inside it; no weights are read.

    ValueError in one line for what is damaged, absurd or of an unknown kind. The file must not shrink while it is used.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))  # a pipe or a device would be waited for
    with open(path, "rb") as file:
        start = file.read(4)
        if start != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it starts with {start!r}")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = Cursor(path, data)
    cursor.take(4, "GGUF")
    version = cursor.number("<u4", "the version")
    if version not in (2, 3):
        raise ValueError(f"{path} has GGUF version {version}; 2 and 3 are read, little-endian")
    tensor_count = cursor.count("tensors", MOST_ENTRIES, 32)
    metadata: dict = {}
    for _ in range(cursor.count("metadata entries", MOST_ENTRIES, 13)):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise ValueError(f"{path} is damaged: metadata {show(key)} comes twice")
        metadata[key] = cursor.value(show(key))
    tensors: dict[str, Stored] = {}
    for _ in range(tensor_count):
        name = cursor.string("a tensor's name")
        if name in tensors:
            raise ValueError(f"{path} is damaged: tensor {show(name)} comes twice")
        tensors[name] = read_stored(cursor, show(name))

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
        raise ValueError(f"{path} is damaged: general.alignment is {show(alignment)}, a power of two was expected")
    start = -(-cursor.at // alignment) * alignment
    for name, stored in tensors.items():
        if stored.offset % alignment or start + stored.offset + stored.bytes > len(data):
            raise ValueError(
                f"{path} is cut short or damaged: the {stored.bytes} bytes of {show(name)} at {start} + {stored.offset} "
                f"do not lie in its {len(data)} bytes, aligned to {alignment}"
            )
        tensors[name] = replace(stored, offset=start + stored.offset)
    return GGUF(path, metadata, tensors, data)


def read_stored(cursor: Cursor, name: str) -> Stored:
    dims = cursor.count(f"dimensions of {name}", 4, 8, "<u4")
    shape = tuple(cursor.number("<u8", f"the shape of {name}") for _ in range(dims))[::-1]
    number = cursor.number("<u4", f"the type of {name}")
    offset = cursor.number("<u8", f"the offset of {name}")
    kind = next((kind for kind, (known, *_) in KINDS.items() if known == number), None)
    if kind is None:
        called = f"{OTHER_KINDS[number]} ({number})" if number in OTHER_KINDS else number
        raise ValueError(f"{cursor.path}: {name} has type {called}, which is not supported; known: {', '.join(KINDS)}")
    _, per_block, block = KINDS[kind]
    if not shape or 0 in shape or shape[-1] % per_block:
        raise ValueError(
            f"{cursor.path} is damaged: {name} has shape {shape}, stored as {kind}, {per_block} to a block"
        )
    return Stored(kind, shape, offset, math.prod(shape) // per_block * block)


def dequantise(raw: np.ndarray, kind: str) -> np.ndarray:
    """The numbers of whole blocks. (bytes,) uint8 -> (numbers,) float32, a copy"""
    if kind == "F32":
        return raw.view("<f4").astype(np.float32)
    if kind == "F16":
        return raw.view("<f2").astype(np.float32)
    if kind == "BF16":  # the high half of a float32
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = raw.reshape(-1, KINDS[kind][2])
    d = blocks[:, :2].view("<f2").astype(np.float32)  # (blocks, 1)
    if kind == "Q8_0":
        return (d * blocks[:, 2:].view(np.int8)).ravel()
    q = np.concatenate((blocks[:, -16:] & 15, blocks[:, -16:] >> 4), axis=1).astype(np.float32)  # (blocks, 32)
    if kind == "Q4_0":
        return (d * (q - 8)).ravel()
    return (d * q + blocks[:, 2:4].view("<f2").astype(np.float32)).ravel()


def quantise(values: np.ndarray, kind: str, name: str) -> bytes:
    """Numbers in the layout of `kind`. (...) float32 -> bytes. ValueError for what F16 cannot hold."""
    if not (largest := np.abs(values).max()) <= LARGEST[kind]:
        raise ValueError(f"{name} holds {largest}, which {kind} cannot" + ("; use F32" if kind != "F32" else ""))
    if kind == "F32":
        return values.astype("<f4").tobytes()
    if kind == "F16":
        return values.astype("<f2").tobytes()
    blocks = values.reshape(-1, 32)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * np.divide(1, d, out=np.zeros_like(d), where=d > 1e-30)
    q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)  # halves away from zero
    return np.concatenate((d.astype("<f2").view(np.uint8), q.view(np.uint8)), axis=1).tobytes()


# 2. names and shapes


def gguf_layout(names: Iterator[str], architecture: str) -> dict[str, list[str]]:
    """GGUF tensor -> those of our parameters whose rows, in this order, it is made of."""
    layout: dict[str, list[str]] = {}
    for name in names:  # a state_dict lists q, k and v in this order, which is that of attn_qkv
        module, _, parameter = name.rpartition(".")
        prefix = ""
        if module.startswith("layers."):
            _, layer, module = module.split(".", 2)
            prefix = f"blk.{layer}."
        if module not in NAMES:
            raise ValueError(f"GGUF has no place for {show(name)}: merge adapters first")
        theirs = "attn_qkv" if architecture == "gpt2" and module in FUSED else NAMES[module]
        layout.setdefault(f"{prefix}{theirs}.{parameter}", []).append(name)
    return layout


def neighbours(name: str, config: ModelConfig, architecture: str) -> Tensor | None:
    """Our row of each row of a GGUF tensor; None: the same. Row 2i + j of a head is our row j K/2 + i."""
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name.split(".")[-2])
    if architecture not in NEIGHBOURS or heads is None:
        return None
    rows = torch.arange(heads * config.head_dim).view(heads, 2, config.head_dim // 2)
    return rows.transpose(1, 2).flatten()


def norm_offset(name: str, config: ModelConfig) -> float:
    """What the numbers of a GGUF tensor are larger by than ours."""
    return 1.0 if config.norm == "offset_rms" and name.endswith("norm.weight") else 0.0


def every(n: int, layers: int) -> tuple[int, ...]:
    """Layers n - 1, 2n - 1 ...: llama.cpp has SmolLM3's without RoPE, and Gemma 3's global ones, in its code."""
    return tuple(range(n - 1, layers, n))


def others(chosen: tuple[int, ...], layers: int) -> tuple[int, ...]:
    return tuple(i for i in range(layers) if i not in chosen)


def rounded(value: float) -> float:
    """A float32 as the decimal that was meant: 1e-5 comes back as 9.99999975e-06."""
    return float(f"{value:.7g}")


def own_fields(raw: dict, architecture: str, width: int, layers: int, head_dim: int) -> dict:
    """What an architecture says beside the sizes."""
    if architecture == "gpt2":
        return dict(norm="layer", activation="gelu", positions="learned")
    fields = {"rope_theta": rounded(real(raw, "rope.freq_base", 10000.0))}
    if architecture == "smollm3":
        return fields | {"no_rope": every(4, layers)}
    if architecture == "olmo2":
        return fields | {"norm_place": "after", "qk_norm": True, "qk_norm_over": "width"}
    if architecture == "granite":
        return fields | {ours: rounded(real(raw, key)) for key, ours in SCALES.items() if raw.get(key)}
    if architecture == "qwen3":
        return fields | {"qk_norm": True}
    if architecture == "llama" or architecture == "qwen2":
        return fields
    caps = (GEMMA2_CAPS if architecture == "gemma2" else {}) | raw
    fields |= {ours: rounded(real(caps, key)) for key, ours in CAPS.items() if caps.get(key)}
    fields |= {"norm": "offset_rms", "norm_place": "both", "activation": "geglu"}
    fields |= {"embedding_scale": width**0.5, "attention_scale": head_dim**-0.5}
    if architecture == "gemma2":
        return fields
    local = {"local_rope": others(every(6, layers), layers)}
    local |= {"local_theta": rounded(real(raw, "rope.freq_base_swa", 10000.0))}
    return fields | local | {"qk_norm": True}


def gguf_config(file: GGUF) -> ModelConfig:
    """Our shape of a file's model. ValueError for what is missing or not ours."""
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {show(architecture)} is not supported; known: {', '.join(ARCHITECTURES)}")
    prefix, gpt2 = architecture + ".", architecture == "gpt2"
    raw = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    plain = PLAIN | ({} if architecture == "granite" else dict.fromkeys(SCALES, (None,)))
    plain |= {} if architecture.startswith("gemma") else dict.fromkeys(CAPS, (None,))
    for key, values in plain.items():
        if raw.get(key) not in values:
            raise ValueError(f"{prefix}{key} {show(raw[key])} is not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("there is no matrix token_embd.weight: not the weights of a language model")
    width, heads = size(raw, "embedding_length"), size(raw, "attention.head_count")
    layers, context = size(raw, "block_count", most=MOST_LAYERS), size(raw, "context_length")
    head_dim = size(raw, "attention.key_length", max(1, width // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if not gpt2 and size(raw, key, head_dim) != head_dim:
            raise ValueError(f"{prefix}{key} {raw[key]} is not the head size {head_dim}, which is not supported")
    if raw.get("attention.sliding_window"):  # up to there a window hides nothing
        context = min(context, size(raw, "attention.sliding_window"))
    if layers == {"gemma2": 46, "gemma3": 62}.get(architecture):
        raise ValueError(f"{prefix}block_count {layers}: the 27B models scale their scores in a way of their own")
    config = ModelConfig(
        vocab_size=embedding.shape[0],
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=size(raw, "attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=size(raw, "feed_forward_length"),
        context=context,
        norm_eps=rounded(real(raw, "attention.layer_norm_epsilon" if gpt2 else "attention.layer_norm_rms_epsilon")),
        qkv_bias="blk.0.attn_q.bias" in file.tensors or gpt2,
        out_bias="blk.0.attn_output.bias" in file.tensors or gpt2,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors or gpt2,
        tied=is_tied(file),
        **own_fields(raw, architecture, width, layers, head_dim),
    )
    if raw.get("rope.scaling.type") == "linear":
        scaling = {"rope_type": "linear", "factor": rounded(real(raw, "rope.scaling.factor"))}
        return replace(config, rope_scaling=scaling)
    if "rope_freqs.weight" in file.tensors:
        original = real(raw, "rope.scaling.original_context_length", 8192)
        return replace(config, rope_scaling=llama3_scaling(file, config, original))
    return config


def is_tied(file: GGUF) -> bool:
    """No output matrix, or, in old GPT-2 files, a copy of the embedding."""
    ends = [file.tensors.get(name) for name in ("output.weight", "token_embd.weight")]
    if ends[0] is None or file.metadata["general.architecture"] != "gpt2":
        return ends[0] is None
    return len({file.data[x.offset : x.offset + x.bytes] for x in ends}) == 1


def llama3_scaling(file: GGUF, config: ModelConfig, original: float) -> dict:
    """The scaling whose frequencies the file's divisors make; it holds no more of it. ValueError if there is none."""
    if (shape := file.tensors["rope_freqs.weight"].shape) != (config.head_dim // 2,):
        raise ValueError(f"rope_freqs.weight has shape {shape}, the metadata ask for {(config.head_dim // 2,)}")
    ((_, divisors),) = file.rows("rope_freqs.weight")  # (K/2,)
    scaling = {
        "rope_type": "llama3",
        "factor": rounded(divisors.max()),
        "low_freq_factor": 1.0,  # all published models have 1 and 4
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    expected = rope_divisors(replace(config, rope_scaling=scaling))
    if not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(f"rope_freqs.weight {show(divisors.tolist())} is not Llama 3's scaling, which is all we know")
    return scaling


def rope_divisors(config: ModelConfig) -> np.ndarray:
    """What the scaling divides each frequency by. (K/2,)"""
    plain = replace(config, rope_scaling=None)
    return (rope_frequencies(plain, torch.float32) / rope_frequencies(config, torch.float32)).numpy()


# 3. reading


def load_gguf(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Transformer, dict]:
    """The model of a GGUF file, and the file's metadata (`tokenizer_parts` finds the tokenizer in it).

    The numbers go from the mapped file into the parameters in pieces, so the model is the only copy in memory.
    ValueError, in one line, for damaged files and for anything that is not understood: unknown architectures and
    types, tensors that are missing, left over or of another shape.
    """
    file = read_gguf(path)
    try:
        return build_model(file, dtype), file.metadata
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def build_model(file: GGUF, dtype: torch.dtype) -> Transformer:
    config, architecture = gguf_config(file), file.metadata["general.architecture"]
    model = empty_model(config)
    ours = {name: parameter.shape for name, parameter in model.state_dict().items()}
    layout = gguf_layout(ours, architecture)
    unused = {"rope_freqs.weight"} if rope_type(config.rope_scaling) == "llama3" else set()
    unused |= {"output.weight"} if config.tied else set()
    if missing := layout.keys() - file.tensors.keys():
        raise ValueError(f"{len(missing)} of the model's {len(layout)} tensors are missing: {show_names(missing)}")
    if extra := file.tensors.keys() - layout.keys() - unused:
        raise ValueError(f"it holds {len(extra)} tensors that its model has no place for: {show_names(extra)}")
    for name, parts in layout.items():
        shape = (sum(ours[part][0] for part in parts), *ours[parts[0]][1:])
        if file.tensors[name].shape != shape:
            raise ValueError(f"{name} has shape {file.tensors[name].shape}, the metadata ask for {shape}")
    state = {}
    for name, parts in layout.items():
        whole = torch.empty(file.tensors[name].shape, dtype=dtype)
        order = neighbours(name, config, architecture)
        for rows, values in file.rows(name):
            if shift := norm_offset(name, config):
                values = values - np.float32(shift)
            whole[rows if order is None else order[rows]] = torch.from_numpy(values).to(dtype)
        pieces = whole.split([ours[part][0] for part in parts])
        state |= {part: piece if len(parts) == 1 else piece.clone() for part, piece in zip(parts, pieces)}
    model.load_state_dict(state, assign=True)
    return model


def tokenizer_parts(metadata: dict) -> dict:
    """The tokenizer of a file as `tokenizer_from_parts` of data/tokenizer.py takes it. ValueError if there is none."""
    parts = {ours: metadata[theirs] for ours, theirs in TOKENIZER.items() if theirs in metadata}
    if parts.get("model", "none") == "none":
        raise ValueError("the GGUF file holds no tokenizer: name the directory of one")
    return parts


def stop_ids(metadata: dict) -> tuple[int, ...]:
    """Ids beside eos that end a text, as the file names them. ValueError for what is no id."""
    named = [metadata[TOKENIZER[name]] for name in ("eot", "eom") if TOKENIZER[name] in metadata]
    found = [*named, *metadata.get(TOKENIZER["stops"], ())]
    size = len(metadata.get(TOKENIZER["tokens"], ()))
    for i in found:
        if type(i) is not int or not 0 <= i < size:
            raise ValueError(f"the tokenizer's end of text is {i!r:.60}; an id below {size} was expected")
    return tuple(sorted(set(found)))


# 4. writing


def save_gguf(path: str | Path, model: Transformer, dtype: str = "F16", tokenizer: dict | None = None) -> Path:
    """Write a GGUF file that llama.cpp reads, whole or not at all. dtype: F32 | F16 | Q8_0, of the matrices.

    tokenizer: the parts of a tokenizer (`tokenizer.parts()`). Norms, biases and learned positions stay F32. ValueError
    where GGUF has no such architecture or the tokenizer has more tokens than the model.
    """
    if dtype not in FILE_TYPES:
        raise ValueError(f"GGUF dtype {dtype!r} cannot be written; known: {', '.join(FILE_TYPES)}")
    path, config, state = Path(path), model.config, model.state_dict()
    architecture = gguf_architecture(config)
    layout = gguf_layout(state, architecture)
    stored = {name: stored_as(name, [state[part] for part in parts], dtype) for name, parts in layout.items()}
    if rope_type(config.rope_scaling) == "llama3":
        stored["rope_freqs.weight"] = Stored("F32", (config.head_dim // 2,), 0, config.head_dim * 2)

    header = gguf_header(config, architecture, dtype, path.stem) | tokenizer_header(tokenizer, config)
    blob = [b"GGUF", struct.pack("<IQQ", 3, len(stored), len(header))]
    for key, value in header.items():
        blob += [packed_string(key), packed_value(value)]
    offset = 0
    for key, x in stored.items():
        blob.append(packed_string(key) + struct.pack(f"<I{len(x.shape)}Q", len(x.shape), *x.shape[::-1]))
        blob.append(struct.pack("<IQ", KINDS[x.kind][0], offset))
        offset += padded(x.bytes)

    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write_padded(file, blob)
            for key, x in stored.items():
                if key == "rope_freqs.weight":
                    write_padded(file, [quantise(rope_divisors(config), "F32", key)])
                else:
                    order = neighbours(key, config, architecture)
                    parts = [state[part] for part in layout[key]]
                    parts = (
                        [part.float() + norm_offset(key, config) for part in parts]
                        if norm_offset(key, config)
                        else parts
                    )
                    write_padded(file, packed_rows(parts, order, x.kind, key))
        flush_to_disk(temporary)
        temporary.rename(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}", error.filename) from error
    finally:
        if temporary.exists():  # only after an error
            temporary.unlink()
    return path


def gguf_architecture(config: ModelConfig) -> str:
    """The architecture that computes what the config says; ValueError where llama.cpp's has no place for something."""
    family = family_of(config)
    architecture = "gemma3" if family == "gemma3_text" else family
    scale, layers = config.attention_scale, config.layers
    lacks = {
        "smollm3": {"another RoPE-free layer than every fourth": config.no_rope != every(4, layers)},
        "gemma2": {
            "untied embeddings": not config.tied,
            "a model without both softcaps": not (config.attention_softcap and config.logit_softcap),
        },
        "gemma3": {"other global layers than every sixth": config.local_rope != others(every(6, layers), layers)},
    }.get(architecture, {})
    if architecture in ("smollm3", "olmo2", "granite", "gemma2", "gemma3"):
        lacks["biases"] = config.qkv_bias or config.out_bias or config.mlp_bias
    if architecture in ("gemma2", "gemma3"):
        lacks["another scale of scores than 1 / sqrt(head_dim)"] = scale != config.head_dim**-0.5 or layers in (46, 62)
    if architecture != "llama":
        lacks["llama3 RoPE scaling"] = rope_type(config.rope_scaling) == "llama3"
    if found := [what for what, there in lacks.items() if there]:
        raise ValueError(f"GGUF's architecture {architecture} has no place for {' and '.join(found)}")
    return architecture


def stored_as(name: str, parts: list[Tensor], dtype: str) -> Stored:
    """How a tensor is stored; where it lies is not known yet."""
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    kind = "F32" if len(shape) == 1 or name == "position_embd.weight" else dtype
    kind = "F16" if shape[-1] % KINDS[kind][1] else kind  # rows that are no whole blocks
    _, per_block, block = KINDS[kind]
    return Stored(kind, shape, 0, math.prod(shape) // per_block * block)


def packed_rows(parts: list[Tensor], order: Tensor | None, kind: str, name: str) -> Iterator[bytes]:
    """The bytes of a tensor that is made of the rows of its parts, in pieces."""
    for part in parts:
        step = max(1, CHUNK // (part[0].numel() or 1))
        for start in range(0, len(part), step):
            rows = slice(start, start + step)
            values = part[rows if order is None else order[rows].to(part.device)]
            yield quantise(values.detach().float().cpu().numpy(), kind, name)


def gguf_header(config: ModelConfig, architecture: str, dtype: str, name: str) -> dict:
    norm = "layer_norm_epsilon" if architecture == "gpt2" else "layer_norm_rms_epsilon"
    shape = {
        "context_length": config.context,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.ffn,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        f"attention.{norm}": config.norm_eps,
        "vocab_size": config.vocab_size,
    }
    if architecture != "gpt2":
        shape |= {"rope.freq_base": config.rope_theta, "rope.dimension_count": config.head_dim}
        shape |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if architecture == "granite":
        shape |= {
            key: float(getattr(config, ours)) for key, ours in SCALES.items() if getattr(config, ours) is not None
        }
    if architecture in ("gemma2", "gemma3"):
        shape |= {"attention.sliding_window": config.context}
        shape |= {key: float(getattr(config, ours)) for key, ours in CAPS.items() if getattr(config, ours) is not None}
    if architecture == "gemma3":
        shape["rope.freq_base_swa"] = config.local_theta
    scaling = config.rope_scaling or {}
    if rope_type(scaling) == "linear":
        shape |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    if rope_type(scaling) == "llama3":  # the rest stands in rope_freqs.weight
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if high != 4 * low:
            raise ValueError(
                f"GGUF has no place for llama3 scaling with high/low = {high}/{low}; only 4/1 is read back"
            )
        shape["rope.scaling.original_context_length"] = round(scaling["original_max_position_embeddings"] / low)
    general = {"general.architecture": architecture, "general.type": "model", "general.name": name}
    general |= {"general.file_type": FILE_TYPES[dtype], "general.quantization_version": 2}
    return general | {f"{architecture}.{key}": value for key, value in shape.items()}


def tokenizer_header(tokenizer: dict | None, config: ModelConfig) -> dict:
    """The tokenizer's entries; GGUF wants a token for every row of the embedding."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    parts = {key: value for key, value in tokenizer.items() if value is not None}
    spare = range(len(parts["tokens"]), config.vocab_size)
    if len(parts["tokens"]) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(parts['tokens'])} tokens, the model only {config.vocab_size}")
    parts["tokens"] = [*parts["tokens"], *(f"[PAD{i}]" for i in spare)]
    parts["types"] = [*parts["types"], *(UNUSED_TOKEN for _ in spare)]
    if "scores" in parts:
        parts["scores"] = [*parts["scores"], *(-1000.0 for _ in spare)]
    return {TOKENIZER[key]: value for key, value in parts.items()}


def packed_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def packed_value(value) -> bytes:
    """Type and value of a metadata entry; lists hold texts, ints or floats."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + packed_string(value)
    kind = {int: 5, float: 6}.get(type(value[0]) if value else str, STRING)
    items = map(packed_string, value) if kind == STRING else [np.array(value, SCALARS[kind]).tobytes()]
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(items)


def padded(n: int) -> int:
    return -(-n // 32) * 32


def write_padded(file, pieces) -> None:
    n = sum(file.write(piece) for piece in pieces)
    file.write(bytes(padded(n) - n))
