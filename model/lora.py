"""Low-rank adapters (LoRA, arXiv:2106.09685) on a frozen trunk: several named ones, on and off, merged, alone in a file.

A transform after build: the model file knows nothing of it. Parameters of the base keep their names, so a plain
checkpoint loads before or after; an adapter's are `<module>.lora_A.<adapter>` and `<module>.lora_B.<adapter>`.

    model = add_lora(model, rank=8, alpha=16, targets=("q_proj", "v_proj"), name="policy", generator=generator)
    with using(model, "policy"):        # or None: the base, bit for bit
        hidden = model.trunk(ids)
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.hf import (
    DTYPES,
    LARGEST_REAL,
    NoInit,
    complete_directory,
    family_of,
    flag,
    hf_module,
    inside,
    open_tensors,
    read_json,
    real,
    show,
    show_names,
    size,
    stored_tensors,
    write_tensors,
)
from model.transformer import Transformer


class LoRALinear(nn.Linear):
    """A linear layer with named low-rank updates, of which one or none is active.

    y = W x + b + scale B A x (eq. 3 there), scale = alpha / rank; A (r, in), B (out, r). W and b are those of the
    layer that it replaces, not copies.
    """

    def __init__(self, base: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scale: dict[str, float] = {}
        self.active: str | None = None

    def put(self, name: str, A: Tensor, B: Tensor, scale: float) -> None:
        """A and B stay float32 (float64 on a float64 base) on a half-precision base: their updates are small."""
        to = {"device": self.weight.device, "dtype": torch.promote_types(self.weight.dtype, torch.float32)}
        self.lora_A[name], self.lora_B[name] = (nn.Parameter(x.detach().to(**to, copy=True)) for x in (A, B))
        self.scale[name] = scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        y = F.linear(x, self.weight, self.bias)
        if self.active not in self.lora_A:  # off, or an adapter that leaves this layer alone
            return y
        A, B = self.lora_A[self.active], self.lora_B[self.active]
        down = F.linear(x.to(A.dtype), A)  # (..., r)
        if y.dtype != B.dtype or torch.is_autocast_enabled(y.device.type):
            return y + F.linear(down * self.scale[self.active], B).to(y.dtype)
        update = torch.addmm(y.flatten(0, -2), down.flatten(0, -2), B.t(), alpha=self.scale[self.active])
        return update.view_as(y)

    def merged(self, name: str) -> Tensor:
        """W + scale B A, computed in float32 at least, as W's type. (out, in)"""
        A, B = self.lora_A[name].detach(), self.lora_B[name].detach()
        return (self.weight.detach().to(A.dtype) + self.scale[name] * (B @ A)).to(self.weight.dtype)


# 1. adding, choosing, merging


def lora_layers(model: nn.Module, name: str | None = None) -> dict[str, LoRALinear]:
    """Path -> layer of all layers with adapters, or of those that `name` changes; ValueError where it changes none."""
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    if name is None:
        return layers
    chosen = {path: layer for path, layer in layers.items() if name in layer.lora_A}
    if not chosen:
        raise ValueError(f"there is no adapter {name!r}; there are: {', '.join(adapter_names(model)) or 'none'}")
    return chosen


def adapter_names(model: nn.Module) -> list[str]:
    return sorted({name for layer in lora_layers(model).values() for name in layer.lora_A})


def check_free(model: nn.Module, name: str) -> None:
    if not name.isidentifier() or hasattr(nn.ParameterDict, name):
        raise ValueError(f"{name!r} cannot name an adapter; use a word such as 'policy'")
    if name in adapter_names(model):
        raise ValueError(f"there is an adapter {name!r} already")


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def as_lora_layer(model: nn.Module, path: str) -> LoRALinear:
    """The layer at `path`, replaced in place unless it carries adapters already."""
    layer = model.get_submodule(path)
    if not isinstance(layer, LoRALinear):
        layer = LoRALinear(layer)
        replace_module(model, path, layer)
    return layer


def freeze_base(model: nn.Module) -> None:
    for path, parameter in model.named_parameters():
        if ".lora_" not in path:
            parameter.requires_grad_(False)


@torch.no_grad()
def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Iterable[str] | None = None,
    name: str = "default",
    generator: torch.Generator | None = None,
    rslora: bool = False,
) -> nn.Module:
    """Put an adapter on every linear layer whose last name is in `targets` (None: all in the blocks); -> the model.

    Scale alpha / rank, or alpha / sqrt(rank) with `rslora` (arXiv:2312.03732). A is uniform in +-1/sqrt(in), which is
    Kaiming's with a = sqrt(5), and B zero: the adapter starts as no change. All other parameters of `model` are frozen.
    It starts inactive, see `using` and `activate`. ValueError for a target that no layer has, or a name that is taken.
    """
    check_free(model, name)
    if rank < 1:
        raise ValueError(f"rank {rank} must be at least 1")
    linear = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    known = {path.rpartition(".")[2] for path in linear}
    if unknown := sorted(set(targets or ()) - known):
        raise ValueError(f"no linear layer is called {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    for path in linear:
        if path.rpartition(".")[2] in targets if targets is not None else "layers." in path:
            layer = as_lora_layer(model, path)
            shape = (rank, layer.in_features)
            device = generator.device if generator is not None else None  # every device starts from the same numbers
            A = (2 * torch.rand(shape, generator=generator, device=device) - 1) / math.sqrt(layer.in_features)
            scale = alpha / math.sqrt(rank) if rslora else alpha / rank
            layer.put(name, A, torch.zeros(layer.out_features, rank), scale)
    freeze_base(model)
    return model


def activate(model: nn.Module, name: str | None) -> None:
    """From now on the model computes with this adapter; None: as the base, bit for bit. ValueError if there is none."""
    if name is not None:
        lora_layers(model, name)
    for layer in lora_layers(model).values():
        layer.active = name


@contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[nn.Module]:
    """`activate` for the length of a with block; what was active before comes back, also after an error."""
    before = [(layer, layer.active) for layer in lora_layers(model).values()]
    activate(model, name)
    try:
        yield model
    finally:
        for layer, active in before:
            layer.active = active


def merged_state(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    """The state_dict of the plain model that computes what this one does with the adapter; None: of the base."""
    state = {path: tensor for path, tensor in model.state_dict().items() if ".lora_" not in path}
    if name is not None:
        state |= {f"{path}.weight": layer.merged(name) for path, layer in lora_layers(model, name).items()}
    return state


@torch.no_grad()
def merge(model: nn.Module, name: str | None) -> nn.Module:
    """Add the adapter to the weights and make plain linear layers again, in place; all adapters are gone; -> the model.

    None: the base as it was. Parameters stay frozen or trainable as they were; the base's tensors are not written to.
    """
    changed = lora_layers(model, name) if name is not None else {}
    for path, layer in lora_layers(model).items():
        with NoInit():
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        if path in changed:  # a new tensor: the old one may be another model's too, or a file's
            plain.weight = nn.Parameter(layer.merged(name), layer.weight.requires_grad)
        replace_module(model, path, plain)
    return model


# 2. adapters alone


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """What an optimiser of this adapter trains."""
    return [x for layer in lora_layers(model, name).values() for x in (layer.lora_A[name], layer.lora_B[name])]


def adapter_scale(model: nn.Module, name: str) -> float:
    """alpha / rank of an adapter."""
    return next(iter(lora_layers(model, name).values())).scale[name]


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter alone: {"layers.0.self_attn.q_proj.lora_A": (r, in), "... .lora_B": (out, r)}, without its name."""
    state = {}
    for path, layer in lora_layers(model, name).items():
        state[f"{path}.lora_A"], state[f"{path}.lora_B"] = layer.lora_A[name].detach(), layer.lora_B[name].detach()
    return state


def load_adapter(model: nn.Module, tensors: dict[str, Tensor], scale: float, name: str = "default") -> nn.Module:
    """Put an adapter of `adapter_state` on the model, as `add_lora` does; -> the model.

    ValueError where it names a layer that is not there, in other shapes, with several ranks or one of A and B alone.
    """
    check_free(model, name)
    linear = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if not tensors:
        raise ValueError("the adapter is empty")
    paths = list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
    expected = {f"{path}.{which}" for path in paths for which in ("lora_A", "lora_B")}
    if unknown := [path for path in paths if path not in linear]:
        raise ValueError(f"the adapter changes {len(unknown)} layers that this model has not: {show_names(unknown)}")
    if odd := expected ^ tensors.keys():
        raise ValueError(f"the adapter's A and B do not match: {show_names(odd)}")
    rank = len(tensors[f"{paths[0]}.lora_A"])
    for path in paths:
        layer = linear[path]
        for which, shape in (("lora_A", (rank, layer.in_features)), ("lora_B", (layer.out_features, rank))):
            found = tuple(tensors[f"{path}.{which}"].shape)
            if found != shape:
                raise ValueError(f"the adapter's {path}.{which} has shape {found}; {shape} was expected")
    for path in paths:
        as_lora_layer(model, path).put(name, tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"], scale)
    freeze_base(model)
    return model


# 3. the format of PEFT: adapter_config.json and adapter_model.safetensors

PREFIX = "base_model.model."
# keys of adapter_config.json that do not change what a loaded adapter computes; any other must be null, false or empty
HARMLESS = (
    "auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode layers_pattern "
    "layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save peft_type peft_version "
    "qalora_group_size r revision runtime_config target_modules task_type use_rslora eva_config ensure_weight_tying"
).split()
PLAIN_INIT = (None, True, False, "gaussian", "orthogonal", "eva")  # the others (PiSSA, OLoRA ...) change the base too


@dataclass(frozen=True)
class PeftInfo:
    """What a PEFT directory holds beside the adapter."""

    raw: dict  # adapter_config.json
    score: Tensor | None  # (labels, D), the head of a reward model
    reward_bias: float  # ours, from the file's metadata: what HF's head has no place for


def fuse(parts: list[tuple[Tensor, Tensor] | int]) -> tuple[Tensor, Tensor]:
    """One adapter of a matrix from those of its row blocks, exactly; an int is a block of so many rows without one.

    [B1 A1; B2 A2; B3 A3] = diag(B1, B2, B3) [A1; A2; A3]: the ranks add up. Where all A are the same, as after an
    import, [B1; B2; B3] A needs no more rank.
    """
    As = [part[0] for part in parts if not isinstance(part, int)]
    if all(torch.equal(A, As[0]) for A in As):
        rank = len(As[0])
        return As[0], torch.cat([As[0].new_zeros(part, rank) if isinstance(part, int) else part[1] for part in parts])
    Bs = [As[0].new_zeros(part, 0) if isinstance(part, int) else part[1] for part in parts]
    return torch.cat(As), torch.block_diag(*Bs)


def save_peft(
    directory: str | Path,
    model: Transformer,
    name: str = "default",
    base: str = "",
    score: Tensor | None = None,
    reward_bias: float = 0.0,
) -> Path:
    """Write the adapter as PEFT loads it on top of the HF model `base`, whole or not at all; returns the directory.

    score: the head of a reward model, see reward_head in model/hf.py. GPT-2's q, k and v are one matrix there: their
    adapters become one of the sum of their ranks (see `fuse`), and the others are filled up with zeros to that rank,
    since PEFT has one rank per adapter; nothing is approximated.
    """
    family, linear = family_of(model.config), [p for p, x in model.named_modules() if isinstance(x, nn.Linear)]
    chosen, scale = lora_layers(model, name), adapter_scale(model, name)
    groups: dict[str, list[str]] = {}
    for path in linear:
        groups.setdefault(hf_module(path, family), []).append(path)
    pairs = {}
    for module, paths in groups.items():
        if any(path in chosen for path in paths):
            layers = [model.get_submodule(path) for path in paths]
            pairs[module] = fuse(
                [
                    (layer.lora_A[name].detach(), layer.lora_B[name].detach()) if path in chosen else layer.out_features
                    for path, layer in zip(paths, layers)
                ]
            )
    rank = max(len(A) for A, _ in pairs.values())
    tensors = {}
    for module, (A, B) in pairs.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = F.pad(A, (0, 0, 0, rank - len(A))).cpu().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = F.pad(B, (0, rank - len(A))).cpu().contiguous()
    if score is not None:
        tensors[f"{PREFIX}score.weight"] = score.detach().cpu().contiguous()
    alpha = round(scale * rank, 9)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if score is None else "SEQ_CLS",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else scale * rank,
        "lora_dropout": 0.0,
        "use_rslora": False,  # the scale is in alpha
        "bias": "none",
        "fan_in_fan_out": family == "gpt2",
        "target_modules": target_modules(list(pairs), list(groups)),
        "modules_to_save": None if score is None else ["score"],
        "inference_mode": True,
    }
    with complete_directory(directory, "adapter_config.json") as temporary:
        write_tensors(temporary / "adapter_model.safetensors", tensors, {"reward_bias": repr(float(reward_bias))})
        (temporary / "adapter_config.json").write_text(json.dumps(content, indent=2))
    return Path(directory)


def target_modules(chosen: list[str], modules: list[str]) -> list[str]:
    """Short names (q_proj; attn.c_proj, as GPT-2 has two) if they mean exactly the chosen modules, else full paths."""
    # model.layers.0.self_attn.q_proj -> q_proj; transformer.h.0.attn.c_proj -> attn.c_proj
    parts = {".".join(path.split(".")[-2 if "c_proj" in path else -1 :]) for path in chosen}
    meant = [path for path in modules if any(path == part or path.endswith("." + part) for part in parts)]
    return sorted(parts) if sorted(meant) == sorted(chosen) else sorted(chosen)


def read_peft_config(file: Path) -> tuple[dict, int, float]:
    """(adapter_config.json, rank, scale); ValueError for what changes an adapter in ways that are not ours."""
    raw = read_json(file)
    try:
        if raw.get("peft_type") != "LORA":
            raise ValueError(f"peft_type {show(raw.get('peft_type'))} is not supported; only LORA is")
        if raw.get("bias", "none") != "none":
            raise ValueError(f"bias {show(raw['bias'])} is not supported; only none is")
        if raw.get("init_lora_weights") not in PLAIN_INIT:
            raise ValueError(
                f"init_lora_weights {show(raw['init_lora_weights'])} is not supported: it changes the base"
            )
        if raw.get("modules_to_save") not in (None, [], ["score"]):
            raise ValueError(f"modules_to_save {show(raw['modules_to_save'])} is not supported; only score is")
        for key, value in raw.items():
            if key not in HARMLESS and key not in ("bias", "init_lora_weights") and value:
                raise ValueError(f"{show(key)} is {show(value)}; it is not supported")
        rank, alpha = size(raw, "r"), real(raw, "lora_alpha")
        return raw, rank, alpha / (math.sqrt(rank) if flag(raw, "use_rslora", False) else rank)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def load_peft(directory: str | Path, model: Transformer, name: str = "default") -> PeftInfo:
    """Put the adapter of a PEFT directory on the model under this name, inactive; returns what else it holds.

    An adapter of GPT-2's c_attn becomes one each of q, k and v: the same A, its rows of B. FileNotFoundError, or
    ValueError for what is not plain LoRA (DoRA, rank patterns, trained biases ...) or does not fit the model.
    """
    directory = Path(directory)
    raw, rank, scale = read_peft_config(directory / "adapter_config.json")
    file = inside(directory, directory / "adapter_model.safetensors")
    stored = stored_tensors(file)
    if odd := [f"{key} ({x.dtype})" for key, x in stored.items() if x.dtype not in DTYPES]:
        raise ValueError(f"{file} holds no floating-point numbers in {show_names(odd)}")
    family = family_of(model.config)
    groups: dict[str, list[str]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            groups.setdefault(hf_module(path, family), []).append(path)

    tensors, score = {}, None
    with open_tensors(file) as opened:
        metadata = opened.metadata() or {}
        for key, entry in stored.items():
            module, _, which = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            if key == f"{PREFIX}score.weight":
                if entry.shape[1:] != (model.config.width,):
                    raise ValueError(
                        f"{file}: the head has shape {entry.shape}; (labels, {model.config.width}) was expected"
                    )
                score = opened.get_tensor(key).clone()
                continue
            if not key.startswith(PREFIX) or module not in groups or which not in ("lora_A", "lora_B"):
                raise ValueError(f"{file} holds {show(key, 100)}, which this model has no place for")
            paths = groups[module]
            rows = [model.get_submodule(path).out_features for path in paths]
            shape = (rank, model.get_submodule(paths[0]).in_features) if which == "lora_A" else (sum(rows), rank)
            if entry.shape != shape:
                raise ValueError(f"{file}: {show(key, 100)} has shape {entry.shape}; {shape} was expected")
            tensor = opened.get_tensor(key)
            pieces = [tensor] * len(paths) if which == "lora_A" else tensor.split(rows)
            tensors |= {f"{path}.{which}": piece for path, piece in zip(paths, pieces)}
    try:
        bias = real({"reward_bias": float(metadata.get("reward_bias", 0.0))}, "reward_bias", least=-LARGEST_REAL)
        load_adapter(model, tensors, scale, name)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return PeftInfo(raw, score, bias)
