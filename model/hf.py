"""HF-format directories in and out: config.json, generation_config.json and safetensors, in one file or in shards.

Which config.json means which model, and what its tensors are called, is in model/families.py. A reward model is HF's sequence
classifier: the same trunk, no output matrix, and `score.weight`. What is not understood is refused by name: a model that
loads computes what its authors' code computes.
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

from model.config import LARGEST_REAL, ModelConfig, show
from model.families import (
    CONV1D,
    FAMILIES,
    family_of,
    hf_config,
    hf_layout,
    hf_prefix,
    hf_shape,
    model_config,
    model_kind,
    real,
    show_names,
    size,
)
from model.mapped import mapped
from model.transformer import Transformer

BUFFERS = re.compile(r"(h\.\d+\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")  # of old files: masks, frequencies
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NO_CLASSIFIER = ("granite",)  # transformers has no such class
OUTPUT = "lm_head.weight"
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
    num_labels: int | None = None  # of a classifier; None: as many as score.weight has rows
    reward_bias: float = 0.0  # a key of ours: HF's head has no bias, so the constant part of a reward stands here
    ours: bool = False  # `save_hf` wrote this classifier: it has that key
    score: Tensor | None = None  # (labels, D), the head of a classifier, once the weights are loaded


# 1. config.json


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


def ids(raw: dict, key: str) -> tuple[int, ...]:
    """Token ids: one, a list of them, or none; old files say -1 for none."""
    value = raw.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in values):
        raise ValueError(f"{key} is {show(value)}; token ids were expected")
    return tuple(i for i in values if i >= 0)


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
            num_labels=size({"num_labels": labels}, "num_labels", 1) if kind == "classifier" and labels else None,
            reward_bias=float(real(raw, "reward_bias", 0.0, least=-LARGEST_REAL)),
            ours="reward_bias" in raw,
        )
    except ValueError as error:
        raise ValueError(f"the config of {directory} is not supported: {error}") from None


# 2. reading


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
    begin: int  # in bytes

    def read(self) -> Tensor:
        """The tensor, mapped into memory: what was read leaves the memory with it. ValueError for a dtype that is unknown."""
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.file}: {show(self.name, 100)} is stored as {self.dtype}; known: {', '.join(DTYPES)}"
            )
        return mapped(self.file, self.begin, DTYPES[self.dtype], self.shape)


def stored_tensors(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds. ValueError where it is damaged: the header is checked against the file's size."""
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(file))  # a pipe or a device would be waited for
    with open(file, "rb") as start:
        length = int.from_bytes(start.read(8), "little")
        if length > LARGEST_JSON:
            raise ValueError(f"{file} claims a header of {length} bytes; at most {LARGEST_JSON} are read")
        header = start.read(length)
    try:
        with safe_open(file, framework="pt") as tensors:
            names = [*tensors.keys()]
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {show(str(error), 150)}") from None
    entries = json.loads(header)
    data = {name: (entries[name], 8 + length + entries[name]["data_offsets"][0]) for name in names}
    return {name: Stored(file, name, tuple(x["shape"]), x["dtype"], begin) for name, (x, begin) in data.items()}


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
    """The same tensors under their full names, without the masks of old files."""
    prefix = hf_prefix(info.family)
    named: dict[str, Stored] = {}
    for name, stored in found.items():
        if BUFFERS.search(name) or name == OUTPUT and info.kind == "classifier":
            continue
        # files of a bare trunk, such as the first GPT-2's, lack the prefix
        full = name if name in (OUTPUT, "score.weight") or name.startswith(prefix) else prefix + name
        if full in named:
            raise ValueError(f"{where} holds {show(full)} twice, with and without its prefix")
        named[full] = stored
    return named


def settle_output(info: HFInfo, found: dict[str, Stored]) -> tuple[HFInfo, dict[str, Stored]]:
    """What of embedding and output matrix a model that calls them tied uses, as transformers 5 decides it.

    Only one stored: it is both. Both, and they differ: the flag is wrong, and each is used.
    """
    embedding, output = f"{hf_prefix(info.family)}{'wte' if info.family == 'gpt2' else 'embed_tokens'}.weight", OUTPUT
    if not info.model.tied or output not in found:
        return info, found
    if embedding not in found:
        return info, {embedding if name == output else name: stored for name, stored in found.items()}
    pair = found[embedding], found[output]
    same = len({(x.shape, x.dtype) for x in pair}) == 1 and torch.equal(*(x.read() for x in pair))
    if same:
        return info, {name: stored for name, stored in found.items() if name != output}
    return replace(info, model=replace(info.model, tied=False)), found


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
    files' tensors one by one: on the CPU and unconverted they stay memory-mapped, private to this process, so no second
    copy exists. Each is read once, to see that its numbers are finite. A file that is overwritten in place while it is used
    takes the process down; `save_hf` replaces directories whole, which is safe. ValueError and OSError say what does not fit.
    """
    directory = Path(directory)
    info = read_config(directory)
    info, found = settle_output(info, hf_names(find_tensors(directory), info, directory))
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
    state = {}
    for name, parts in layout.items():
        tensor = fetch(found[name], dtype, device, transposed=name.endswith(CONV1D))
        rows = tensor.split([ours[part][0] for part in parts])
        state |= {part: x.contiguous() for part, x in zip(parts, rows)}
    model.load_state_dict(state, assign=True)
    if info.kind == "classifier":
        info = replace(info, score=fetch(found["score.weight"], dtype, device))
    return model, info


def fetch(stored: Stored, dtype: torch.dtype, device: torch.device | str, transposed: bool = False) -> Tensor:
    """One tensor from its file: mapped into memory, or a copy where it must change."""
    tensor = check_finite(stored.read(), stored).to(device=device, dtype=dtype)
    return tensor.T.contiguous() if transposed else tensor


def check_finite(tensor: Tensor, stored: Stored) -> Tensor:
    """The tensor; ValueError where a number of it is infinite or none. One pass over it, which fills no memory."""
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    if not total.isfinite() and not tensor.isfinite().all():  # a sum of finite numbers may overflow
        where = (~tensor.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"{stored.file} is damaged: {show(stored.name, 100)} holds {float(tensor[tuple(where)])} at {where}, a finite "
            "number was expected"
        )
    return tensor


# 3. writing


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
    name = FAMILIES[family].name + ("LMHeadModel" if family == "gpt2" else "ForCausalLM")
    if not causal:
        if family in NO_CLASSIFIER:
            raise ValueError(
                f"HF has no sequence classifier of the {family} family: such a reward model stays in our format"
            )
        name = FAMILIES[family].name + ("Text" if family == "gemma3_text" else "") + "ForSequenceClassification"
    special = {"bos_token_id": bos_id, "eos_token_id": eos[0] if len(eos) == 1 else eos or None, "pad_token_id": pad_id}
    tensors = hf_tensors(state, family, dtype)
    if not causal:
        if pad_id is None or pad_id in eos or not 0 <= pad_id < config.vocab_size:
            raise ValueError(
                f"a reward model needs a pad_id inside its vocabulary of {config.vocab_size} that is no eos id, not "
                f"{pad_id} with eos {eos}: HF reads the score at the last token that is not padding"
            )
        tensors.pop(OUTPUT, None)
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
