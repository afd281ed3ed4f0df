"""HF-format directories in and out: config.json, generation_config.json and safetensors, in one file or in shards.

Our parameters already carry the names of HF's Llama, so for Llama, Mistral and Qwen import is a prefix. GPT-2 has names
of its own, keeps q, k and v in one matrix and stores its linear layers transposed ("Conv1D", [in, out]). A reward model
is HF's sequence classifier: the same trunk, no output matrix, and `score.weight`. What is not understood is refused by
name: a model that loads computes what its authors' code computes.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.transformer import ROPE_KEYS, ModelConfig, Transformer, rope_type

CLASSES = {"gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
HEADS = {"LMHeadModel": "causal", "ForCausalLM": "causal", "Model": "causal", "ForSequenceClassification": "classifier"}
GPT2 = {  # our module -> GPT-2's
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "norm": "ln_f",
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.c_attn",  # three thirds of one matrix
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BUFFERS = re.compile(r"(h\.\d+\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")  # of old files: masks, frequencies
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PLAIN = {  # settings that change what a model computes, and the values that mean what ours computes
    "quantization_config": (None,),
    "hidden_act": (None, "silu", "swish"),
    "activation_function": (None, "gelu_new", "gelu_pytorch_tanh"),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1),
    "no_rope_layers": (None, []),
    "pruned_heads": (None, {}),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "add_cross_attention": (None, False),
}
LARGEST_SIZE = 2**24  # of anything that config.json counts; a vocabulary has 2**18, the longest contexts 10 million
LARGEST_REAL = 1e30
MOST_LAYERS = 1024  # the deepest published models have 130; a module is built for each before any tensor is looked for
LARGEST_JSON = 32 * 2**20  # bytes; the index of a model with 100,000 tensors has 8 MB


@dataclass(frozen=True)
class HFInfo:
    """What an HF directory says beside its weights."""

    model: ModelConfig
    family: str  # its model_type
    kind: str  # causal | classifier
    bos_id: int | None
    eos_ids: tuple[int, ...]  # each of them ends a text
    pad_id: int | None
    generation: dict  # generation_config.json
    raw: dict  # config.json
    num_labels: int | None = None  # of a classifier; None: as many as score.weight has rows
    reward_bias: float = 0.0  # a key of ours: HF's head has no bias, so the constant part of a reward stands here
    score: Tensor | None = None  # (labels, D), the head of a classifier, once the weights are loaded


# 1. config.json


def show(value, length: int = 60) -> str:
    """A stranger's value in one short line."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def show_names(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return show(first, 100) + (f" and {len(others)} more" if others else "")


def read_json(file: Path) -> dict:
    """A JSON object. FileNotFoundError, or ValueError where it is none or absurdly large."""
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file; an HF-format directory was expected", str(file))
    if file.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{file} has {file.stat().st_size} bytes; at most {LARGEST_JSON} are read")
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {show(str(error), 100)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {show(content)}; a JSON object was expected")
    return content


def size(raw: dict, key: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
    value = default if raw.get(key) is None else raw[key]
    if value is None:
        raise ValueError(f"{key} is missing")
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{key} is {show(value)}; a whole number from 1 to {most} was expected")
    return value


def real(raw: dict, key: str, default: float | None = None, least: float = 0.0) -> float:
    value = default if raw.get(key) is None else raw[key]
    if value is None:
        raise ValueError(f"{key} is missing")
    if type(value) not in (int, float) or not least < value < LARGEST_REAL:
        raise ValueError(f"{key} is {show(value)}; a number above {least} was expected")
    return value


def flag(raw: dict, key: str, default: bool) -> bool:
    value = default if raw.get(key) is None else raw[key]
    if type(value) is not bool:
        raise ValueError(f"{key} is {show(value)}; true or false was expected")
    return value


def ids(raw: dict, key: str) -> tuple[int, ...]:
    """Token ids: one, a list of them, or none; old files say -1 for none."""
    value = raw.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in values):
        raise ValueError(f"{key} is {show(value)}; token ids were expected")
    return tuple(i for i in values if i >= 0)


def rope(raw: dict) -> dict:
    """rope_theta and rope_scaling of both dialects: `rope_parameters` holds both (transformers 5), or each has a key."""
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise ValueError(f"the rope parameters are {show(scaling)}; one set for all layers was expected")
    kind = rope_type(scaling)
    if kind not in list(ROPE_KEYS):
        raise ValueError(f"rope_type {show(kind)} is not one of {', '.join(ROPE_KEYS)}")
    if scaling.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"partial_rotary_factor is {show(scaling['partial_rotary_factor'])}; only 1 is understood")
    values = {key: real(scaling, key) for key in ROPE_KEYS[kind]}
    if kind == "llama3" and not values["high_freq_factor"] > values["low_freq_factor"]:
        raise ValueError(f"high_freq_factor {values['high_freq_factor']} must exceed low_freq_factor")
    theta = float(real(scaling, "rope_theta", real(raw, "rope_theta", 10000.0)))
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **values} if values else None}


def model_config(raw: dict) -> ModelConfig:
    """Our shape of a config.json; a missing key has the default of its model_type. ValueError for what is not ours."""
    family = raw.get("model_type")
    if family is None:
        raise ValueError("there is no model_type: not the config.json of an HF-format model")
    if family not in list(CLASSES):
        raise ValueError(f"model_type {show(family)} is not one of {', '.join(CLASSES)}")
    for key, plain in PLAIN.items():
        if raw.get(key) not in plain:
            raise ValueError(f"{key} is {show(raw[key])}; only {' or '.join(map(repr, plain))} is understood")
    layer_types = raw.get("layer_types") or []
    if layer_types != ["full_attention"] * len(layer_types):
        raise ValueError(f"layer_types are {show(layer_types)}; only full_attention is understood")
    window = raw.get("sliding_window", 4096) if family == "mistral" else None  # its class has one unless it says null
    if window is not None:
        raise ValueError(f"sliding_window is {show(window)}; only null is understood")

    if family == "gpt2":
        width = size(raw, "n_embd")
        return ModelConfig(
            vocab_size=size(raw, "vocab_size"),
            width=width,
            layers=size(raw, "n_layer", most=MOST_LAYERS),
            heads=size(raw, "n_head"),
            ffn=size(raw, "n_inner", 4 * width),
            context=size(raw, "n_positions"),
            norm="layer",
            norm_eps=real(raw, "layer_norm_epsilon", 1e-5),
            activation="gelu",
            positions="learned",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            tied=flag(raw, "tie_word_embeddings", True),
        )
    heads = size(raw, "num_attention_heads")
    bias = flag(raw, "attention_bias", False) if family in ("llama", "qwen3") else False
    head_dim = raw.get("head_dim", 128 if family == "qwen3" else None)
    return ModelConfig(
        vocab_size=size(raw, "vocab_size"),
        width=size(raw, "hidden_size"),
        layers=size(raw, "num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        kv_heads=size(raw, "num_key_value_heads", heads),
        head_dim=None if head_dim is None else size(raw, "head_dim", 128),
        ffn=size(raw, "intermediate_size"),
        context=size(raw, "max_position_embeddings"),
        norm_eps=real(raw, "rms_norm_eps", 1e-6),
        qkv_bias=bias or family == "qwen2",  # Qwen2's q, k and v always have one, and no key says so
        out_bias=bias,
        mlp_bias=flag(raw, "mlp_bias", False) if family == "llama" else False,
        qk_norm=family == "qwen3",
        tied=flag(raw, "tie_word_embeddings", False),
        **rope(raw),
    )


def model_kind(raw: dict) -> str:
    """causal | classifier, by the class that the directory was saved from."""
    named = raw.get("architectures") or [CLASSES[raw["model_type"]] + "Model"]
    suffix = str(named[0]).removeprefix(CLASSES[raw["model_type"]]) if isinstance(named, list) else ""
    if suffix not in HEADS:
        raise ValueError(f"architectures is {show(named)}; a causal LM or a sequence classifier was expected")
    return HEADS[suffix]


def read_config(directory: str | Path) -> HFInfo:
    """What config.json and generation_config.json say, checked; no weights are read.

    FileNotFoundError where there is no config.json; ValueError, with the key, for everything that is not understood.
    """
    file = Path(directory) / "config.json"
    raw = read_json(file)
    generation = file.with_name("generation_config.json")
    generation = read_json(generation) if generation.exists() else {}
    try:
        config, kind = model_config(raw), model_kind(raw)
        labels = raw.get("num_labels")
        if labels is None and isinstance(raw.get("id2label"), dict):
            labels = len(raw["id2label"])
        special = {
            key: ids(generation, key) or ids(raw, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        return HFInfo(
            model=replace(config, tied=True) if kind == "classifier" else config,  # it has no output matrix
            family=raw["model_type"],
            kind=kind,
            bos_id=next(iter(special["bos_token_id"]), None),
            eos_ids=special["eos_token_id"],
            pad_id=next(iter(special["pad_token_id"]), None),
            generation=generation,
            raw=raw,
            num_labels=size({"num_labels": labels}, "num_labels", 1) if kind == "classifier" and labels else None,
            reward_bias=float(real(raw, "reward_bias", 0.0, least=-LARGEST_REAL)),
        )
    except ValueError as error:
        raise ValueError(f"the config of {directory} is not supported: {error}") from None


# 2. names


def family_of(config: ModelConfig) -> str:
    """The model_type that computes what `config` does; ValueError where no family of HF does."""
    rms = config.norm == "rms" and config.activation == "silu" and config.positions == "rope"
    whole = config.heads * config.head_dim == config.width
    biases = (config.qkv_bias, config.out_bias, config.mlp_bias)
    if (config.norm, config.activation, config.positions) == ("layer", "gelu", "learned"):
        if all(biases) and whole and config.kv_heads == config.heads and not config.qk_norm:
            return "gpt2"
    elif rms and config.qk_norm and config.qkv_bias == config.out_bias and not config.mlp_bias:
        return "qwen3"
    elif rms and not config.qk_norm and biases == (True, False, False) and whole:
        return "qwen2"
    elif rms and not config.qk_norm and config.qkv_bias == config.out_bias and config.width % config.heads == 0:
        return "llama"
    raise ValueError(
        f"no HF family ({', '.join(name for name in CLASSES if name != 'mistral')}) has norm={config.norm}, "
        f"activation={config.activation}, positions={config.positions}, heads={config.heads}/{config.kv_heads} of "
        f"{config.head_dim} in width {config.width}, qk_norm={config.qk_norm}, biases qkv, out, mlp={biases}"
    )


def hf_module(module: str, family: str) -> str:
    """The HF path of one of our modules: layers.0.self_attn.q_proj -> model.layers.0... or transformer.h.0.attn.c_attn"""
    if module == "lm_head":
        return module
    if family != "gpt2":
        return f"model.{module}"
    if module.startswith("layers."):
        _, layer, part = module.split(".", 2)
        return f"transformer.h.{layer}.{GPT2[part]}"
    return f"transformer.{GPT2[module]}"


def hf_layout(names: Iterable[str], family: str) -> dict[str, list[str]]:
    """HF tensor -> those of our parameters whose rows, in this order, it is made of."""
    layout: dict[str, list[str]] = {}
    for name in names:  # a state_dict lists q, k and v in this order, which is that of c_attn
        module, _, parameter = name.rpartition(".")
        layout.setdefault(f"{hf_module(module, family)}.{parameter}", []).append(name)
    return layout


def hf_shape(name: str, parts: list[torch.Size]) -> tuple[int, ...]:
    """Shape in the file of the tensor that is made of these parts."""
    shape = (sum(part[0] for part in parts), *parts[0][1:])
    return shape[::-1] if name.endswith(CONV1D) else shape


# 3. reading


class NoInit(TorchFunctionMode):
    """Modules that are built inside keep the memory that they get: on the meta device the first random number would
    load torch's compiler, 1.2 s and 60 MB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def empty_model(config: ModelConfig) -> Transformer:
    """A model without memory, to be filled by load_state_dict(tensors, assign=True)."""
    with torch.device("meta"), NoInit():
        return Transformer(config)


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    name: str  # in that file
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, BF16 ...


def open_tensors(file: Path) -> safe_open:
    """A memory-mapped safetensors file. ValueError where it is damaged: the header is checked against the file's size."""
    with open(file, "rb") as start:
        header = int.from_bytes(start.read(8), "little")
    if header > LARGEST_JSON:
        raise ValueError(f"{file} claims a header of {header} bytes; at most {LARGEST_JSON} are read")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {show(str(error), 150)}") from None


def stored_tensors(file: Path) -> dict[str, Stored]:
    with open_tensors(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}
        return {name: Stored(file, name, tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}


def shard_files(directory: Path, index: Path) -> dict[str, set[str]]:
    """Shard -> the tensors that the index promises there. ValueError for a missing shard or one that lies elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is {show(weight_map)}; tensor names with their files were expected")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]{1,200}\.safetensors", shard):
            raise ValueError(f"{index}: {show(name)} lies in {show(shard)}; the name of a file beside it was expected")
        shards.setdefault(shard, set()).add(name)
    if missing := [shard for shard in shards if not (directory / shard).is_file()]:
        raise ValueError(f"{directory} lacks {len(missing)} of {len(shards)} shards: {show_names(missing)}")
    return shards


def inside(directory: Path, file: Path) -> Path:
    """`file`, unless it is a link out of the directory; the hub's cache links snapshots/x/file to blobs/hash."""
    home, target = directory.resolve(), file.resolve()
    if home not in target.parents and home.parent.parent / "blobs" != target.parent:
        raise ValueError(
            f"{file} is a link to {show(str(target), 200)}, outside of the directory; copy the file instead"
        )
    return file


def find_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of model.safetensors, or of the shards that its index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return stored_tensors(inside(directory, single))
    if not index.exists():
        others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.gguf") for path in directory.glob(pattern))
        hint = f"; {show(others[0])} is of another format" if others else ""
        raise FileNotFoundError(errno.ENOENT, f"neither model.safetensors nor its index{hint}", str(directory))
    found: dict[str, Stored] = {}
    for shard, promised in shard_files(directory, inside(directory, index)).items():
        tensors = stored_tensors(inside(directory, directory / shard))
        if lacking := promised - tensors.keys():
            raise ValueError(f"{directory / shard} lacks what the index promises: {show_names(lacking)}")
        if double := found.keys() & tensors.keys():
            raise ValueError(f"{directory / shard} repeats a tensor of another shard: {show_names(double)}")
        found |= tensors
    return found


def hf_names(found: dict[str, Stored], info: HFInfo, where: Path) -> dict[str, Stored]:
    """The same tensors under their full names, without the masks of old files and the output matrix that is not used."""
    prefix = "transformer." if info.family == "gpt2" else "model."
    named: dict[str, Stored] = {}
    for name, stored in found.items():
        if BUFFERS.search(name) or name == "lm_head.weight" and info.model.tied:
            continue
        # files of a bare trunk, such as the first GPT-2's, lack the prefix
        full = name if name in ("lm_head.weight", "score.weight") or name.startswith(prefix) else prefix + name
        if full in named:
            raise ValueError(f"{where} holds {show(full)} twice, with and without its prefix")
        named[full] = stored
    return named


def check_shapes(shapes: dict[str, tuple[int, ...]], found: dict[str, Stored], where: Path, what: str) -> None:
    """ValueError unless exactly these tensors were found, in these shapes and as floating-point numbers."""
    if missing := shapes.keys() - found.keys():
        raise ValueError(f"{where} lacks {len(missing)} of the {len(shapes)} tensors of {what}: {show_names(missing)}")
    if extra := found.keys() - shapes.keys():
        raise ValueError(f"{where} holds {len(extra)} tensors that {what} has no place for: {show_names(extra)}")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise ValueError(f"{where}: {name} has shape {found[name].shape}, config.json asks for {shape}")
        if found[name].dtype not in DTYPES:
            raise ValueError(f"{where}: {name} is stored as {found[name].dtype}; known: {', '.join(DTYPES)}")


def load_hf(
    directory: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Transformer, HFInfo]:
    """The model of an HF directory and what the directory says about it; `info.score` is the head of a classifier.

    dtype None keeps what is stored (the widest, where several are). The model is built without memory, then takes the
    files' tensors one by one: on the CPU and unconverted they stay memory-mapped, private to this process, so nothing
    is read before it is used and no second copy exists. A file that is overwritten in place while it is used takes the
    process down; `save_hf` replaces directories whole, which is safe. ValueError and OSError say what does not fit.
    """
    directory = Path(directory)
    info = read_config(directory)
    found = hf_names(find_tensors(directory), info, directory)
    model = empty_model(info.model)
    ours = {name: parameter.shape for name, parameter in model.state_dict().items()}
    layout = hf_layout(ours, info.family)
    shapes = {name: hf_shape(name, [ours[part] for part in parts]) for name, parts in layout.items()}
    if info.kind == "classifier" and "score.weight" in found:
        labels = info.num_labels or next(iter(found["score.weight"].shape), 0) or 1
        shapes["score.weight"] = (labels, info.model.width)
    elif info.kind == "classifier":
        raise ValueError(f"{directory} is a sequence classifier without its head, score.weight")
    check_shapes(shapes, found, directory, f"this {info.family} {info.kind} model")

    dtype = dtype or reduce(torch.promote_types, (DTYPES[found[name].dtype] for name in shapes))
    mapped: dict[Path, safe_open] = {}
    state = {}
    for name, parts in layout.items():
        tensor = fetch(found[name], dtype, device, mapped, transposed=name.endswith(CONV1D))
        rows = tensor.split([ours[part][0] for part in parts])
        state |= {part: x.contiguous() for part, x in zip(parts, rows)}
    model.load_state_dict(state, assign=True)
    if info.kind == "classifier":
        info = replace(info, score=fetch(found["score.weight"], dtype, device, mapped))
    return model, info


def fetch(
    stored: Stored, dtype: torch.dtype, device: torch.device | str, mapped: dict[Path, safe_open], transposed=False
) -> Tensor:
    """One tensor from its file: a view of the mapped file, or a copy where it must change."""
    if DTYPES[stored.dtype] == dtype and torch.device(device).type == "cpu" and not transposed:
        if stored.file not in mapped:
            mapped[stored.file] = open_tensors(stored.file)
        return mapped[stored.file].get_tensor(stored.name)
    # a mapping for this tensor alone: what was read through it leaves the memory once it is copied
    with open_tensors(stored.file) as tensors:
        tensor = tensors.get_tensor(stored.name).to(device=device, dtype=dtype)
        return tensor.T.contiguous() if transposed else tensor


# 4. writing


@contextmanager
def complete_directory(directory: str | Path, marker: str) -> Iterator[Path]:
    """A temporary directory that takes the place of `directory` once everything in it has reached the disk.

    An older one is replaced if it holds the file `marker` and no directories, so a slip of --out costs no data.
    OSError with the path when that is not so, and when the disk is full; what was there before is then untouched.
    """
    directory = Path(directory).resolve()
    temporary, aside = (directory.with_name(f".{directory.name}.{what}-{os.getpid()}") for what in ("tmp", "old"))
    if directory.exists():
        content = list(directory.iterdir()) if directory.is_dir() else None
        if (
            content is None
            or content
            and (marker not in [file.name for file in content] or any(file.is_dir() for file in content))
        ):
            raise OSError(errno.EEXIST, f"exists and is no export to replace (no {marker} alone)", str(directory))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in [*temporary.iterdir(), temporary]:
            if file.suffix == ".safetensors":
                shutil.copymode(temporary / marker, file)  # safetensors writes 0600, whatever the umask
            flush_to_disk(file)
        if directory.exists():
            directory.rename(aside)
        temporary.rename(directory)
        flush_to_disk(directory.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {directory}: {error.strerror or error}", error.filename) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # still there only after an error


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    try:  # transformers 4 refuses files that do not say whose they are
        save_file(tensors, file, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # hides the OSError: "... (os error 28)"
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from None
        raise


def hf_tensors(state: dict[str, Tensor], family: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Our weights under HF's names and in HF's shapes."""
    tensors = {}
    for name, parts in hf_layout(state, family).items():
        tensor = state[parts[0]] if len(parts) == 1 else torch.cat([state[part] for part in parts])
        tensor = tensor.T if name.endswith(CONV1D) else tensor
        tensors[name] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    return tensors


def hf_config(config: ModelConfig) -> dict:
    """config.json in the dialect that transformers 4 and 5, vLLM and llama.cpp read: rope_theta beside rope_scaling."""
    family = family_of(config)
    if family == "gpt2":
        return {
            "model_type": family,
            "vocab_size": config.vocab_size,
            "n_embd": config.width,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_inner": None if config.ffn == 4 * config.width else config.ffn,
            "n_positions": config.context,
            "n_ctx": config.context,  # llama.cpp reads this one
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": "gelu_new",
            "tie_word_embeddings": config.tied,
            "attn_pdrop": 0.0,  # the class would say 0.1: nobody trained with dropout here
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    scaling = config.rope_scaling and {"rope_type": rope_type(config.rope_scaling)}
    scaling = scaling and {**scaling, **{key: config.rope_scaling[key] for key in ROPE_KEYS[scaling["rope_type"]]}}
    content = {
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tied,
    }
    own = {
        "llama": {"head_dim": config.head_dim, "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias},
        "qwen2": {"use_sliding_window": False, "sliding_window": None},
        "qwen3": {
            "head_dim": config.head_dim,
            "attention_bias": config.qkv_bias,
            "use_sliding_window": False,
            "sliding_window": None,
        },
    }
    return content | own[family]


def reward_head(head: nn.Linear, gain: float = 1.0, bias: float = 0.0, pooling: str = "last") -> tuple[Tensor, float]:
    """gain (W h + b) + bias as HF's head knows it: score.weight = gain W, (1, D), and the constant gain b + bias.

    HF's head has no bias, so the constant stands in config.json as `reward_bias`: scores there are lower by it, and
    differences between texts, which is what preferences and advantages see, are the same. ValueError for any pooling
    but "last": HF's classifiers read the last token.
    """
    if pooling != "last":
        raise ValueError(
            f"pooling {pooling!r} cannot be expressed in HF's sequence classifiers, which read the last token alone: "
            "train the reward model with pooling 'last' to export it"
        )
    weight, gain = head.weight.detach().double(), float(gain)
    constant = gain * float(head.bias.detach().double()) if head.bias is not None else 0.0
    return (gain * weight).to(head.weight.dtype), constant + float(bias)


def save_hf(
    directory: str | Path,
    model: Transformer,
    *,
    score: Tensor | None = None,
    reward_bias: float = 0.0,
    bos_id: int | None = None,
    eos_ids: Iterable[int] = (),
    pad_id: int | None = None,
    files: Iterable[str | Path] = (),
    dtype: torch.dtype | None = None,
) -> Path:
    """Write an HF directory: a causal LM, or with `score` (labels, D), see `reward_head`, a sequence classifier.

    files: copied beside it (tokenizer.json, tokenizer_config.json ...). dtype: None keeps the weights' own.
    Written whole or not at all. ValueError where HF has no such architecture, and for a classifier whose pad_id is
    missing or ends a text: HF scores the last token that is not pad_id, so every score would be read too early.
    """
    config, eos = model.config, sorted(set(eos_ids))
    family, state = family_of(config), model.state_dict()
    if lora := [name for name in state if ".lora_" in name]:
        raise ValueError(f"the model carries adapters ({show(lora[0])}): merge one first")
    causal = score is None
    name = CLASSES[family] + (
        "ForSequenceClassification" if not causal else "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    )
    special = {"bos_token_id": bos_id, "eos_token_id": eos[0] if len(eos) == 1 else eos or None, "pad_token_id": pad_id}
    tensors = hf_tensors(state, family, dtype)
    if not causal:
        if pad_id is None or pad_id in eos or not 0 <= pad_id < config.vocab_size:
            raise ValueError(
                f"a reward model needs a pad_id inside its vocabulary of {config.vocab_size} that is no eos id, not "
                f"{pad_id} with eos {eos}: HF reads the score at the last token that is not padding"
            )
        tensors.pop("lm_head.weight", None)
        tensors["score.weight"] = score.detach().to("cpu", dtype or score.dtype).contiguous()
    content = {"architectures": [name], **hf_config(config), **special}
    content["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    if not causal:
        labels = {str(i): f"LABEL_{i}" for i in range(len(score))}
        content |= {"num_labels": len(score), "id2label": labels, "label2id": {x: int(i) for i, x in labels.items()}}
        content["reward_bias"] = reward_bias
    with complete_directory(directory, "config.json") as temporary:
        write_tensors(temporary / "model.safetensors", tensors)
        for file in files:
            shutil.copyfile(file, temporary / Path(file).name)
        (temporary / "config.json").write_text(json.dumps(content, indent=2))
        if causal:
            (temporary / "generation_config.json").write_text(json.dumps(special, indent=2))
    return Path(directory)
