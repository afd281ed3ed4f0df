"""Adapters in the format of PEFT: a directory of adapter_config.json and adapter_model.safetensors.

An adapter is stored under the names of the HF model that it belongs to: where that keeps several of our matrices in one
(GPT-2's q, k and v), their adapters become one of the sum of their ranks, and come apart again.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import show
from model.families import family_of, flag, hf_module, real, show_names, size
from model.hf import DTYPES, complete_directory, inside, read_json, stored_tensors, write_tensors
from model.lora import adapter_scale, load_adapter, lora_layers
from model.transformer import Transformer

PREFIX = "base_model.model."
# keys of adapter_config.json that do not change what a loaded adapter computes; any other must be null, false or empty
HARMLESS = (
    "auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode layers_pattern "
    "layers_to_transform lora_alpha lora_dropout megatron_core peft_type peft_version qalora_group_size r revision "
    "runtime_config target_modules task_type use_rslora eva_config ensure_weight_tying"
).split()
PLAIN_INIT = (None, True, False, "gaussian", "orthogonal", "eva")  # the others (PiSSA, OLoRA ...) change the base too


def modules_of(model: Transformer, family: str) -> dict[str, list[str]]:
    """HF module -> our linear layers whose rows, in this order, it is made of."""
    groups: dict[str, list[str]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            groups.setdefault(hf_module(path, family), []).append(path)
    return groups


# 1. writing


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
    directory: str | Path, model: Transformer, name: str = "default", base: str = "", family: str | None = None
) -> Path:
    """Write the adapter as PEFT loads it on top of the HF model `base`, whole or not at all; returns the directory.

    family: the model_type of `base`, where it is not the one that its shape suggests. Adapters of matrices that are one
    there are fused, and the others are filled up with zeros to the same rank, since PEFT has one rank per adapter;
    nothing is approximated.
    """
    family = family or family_of(model.config)
    chosen, scale, groups = lora_layers(model, name), adapter_scale(model, name), modules_of(model, family)
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
    alpha = round(scale * rank, 9)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else scale * rank,
        "lora_dropout": 0.0,
        "use_rslora": False,  # the scale is in alpha
        "bias": "none",
        "fan_in_fan_out": family == "gpt2",
        "target_modules": target_modules(list(pairs), list(groups)),
        "modules_to_save": None,
        "inference_mode": True,
    }
    with complete_directory(directory, "adapter_config.json") as temporary:
        write_tensors(temporary / "adapter_model.safetensors", tensors)
        (temporary / "adapter_config.json").write_text(json.dumps(content, indent=2))
    return Path(directory)


def target_modules(chosen: list[str], modules: list[str]) -> list[str]:
    """Short names (q_proj; attn.c_proj, as GPT-2 has two) if they mean exactly the chosen modules, else full paths."""
    # model.layers.0.self_attn.q_proj -> q_proj; transformer.h.0.attn.c_proj -> attn.c_proj
    parts = {".".join(path.split(".")[-2 if "c_proj" in path else -1 :]) for path in chosen}
    meant = [path for path in modules if any(path == part or path.endswith("." + part) for part in parts)]
    return sorted(parts) if sorted(meant) == sorted(chosen) else sorted(chosen)


# 2. reading


def read_peft_config(directory: str | Path) -> tuple[str, int, float]:
    """(name or path of the base model, rank, scale); ValueError for what changes an adapter in ways that are not ours."""
    file = Path(directory) / "adapter_config.json"
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
        if raw.get("modules_to_save"):
            raise ValueError(
                f"modules_to_save {show(raw['modules_to_save'])} is not supported: an adapter of a language model was "
                "expected, of low-rank matrices alone"
            )
        for key, value in raw.items():
            if key not in HARMLESS and key not in ("bias", "init_lora_weights") and value:
                raise ValueError(f"{show(key)} is {show(value)}; it is not supported")
        base, rank, alpha = raw.get("base_model_name_or_path"), size(raw, "r"), real(raw, "lora_alpha")
        if base is not None and not isinstance(base, str):
            raise ValueError(f"base_model_name_or_path is {show(base)}; a name or path was expected")
        return base or "", rank, alpha / (math.sqrt(rank) if flag(raw, "use_rslora", False) else rank)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def load_peft(
    directory: str | Path, model: Transformer, name: str = "default", family: str | None = None
) -> Transformer:
    """Put the adapter of a PEFT directory on the model under this name, inactive; -> the model.

    family: the model_type of its base, as in `save_peft`. An adapter of a matrix that is several of ours becomes one
    each: the same A, its rows of B. FileNotFoundError, or ValueError for what is not plain LoRA (DoRA, rank patterns,
    trained biases ...), does not fit the model or holds numbers that are not finite.
    """
    directory = Path(directory)
    _, rank, scale = read_peft_config(directory)
    file = inside(directory, directory / "adapter_model.safetensors")
    if not file.exists() and (directory / "adapter_model.bin").exists():
        raise ValueError(f"{directory}/adapter_model.bin is a pickle, which is not opened: save it as safetensors")
    stored, groups = stored_tensors(file), modules_of(model, family or family_of(model.config))
    if odd := [f"{key} ({x.dtype})" for key, x in stored.items() if x.dtype not in DTYPES]:
        raise ValueError(f"{file} holds no floating-point numbers in {show_names(odd)}")

    tensors = {}
    for key, entry in stored.items():
        module, _, which = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not key.startswith(PREFIX) or module not in groups or which not in ("lora_A", "lora_B"):
            raise ValueError(f"{file} holds {show(key, 100)}, which this model has no place for")
        paths = groups[module]
        rows = [model.get_submodule(path).out_features for path in paths]
        shape = (rank, model.get_submodule(paths[0]).in_features) if which == "lora_A" else (sum(rows), rank)
        if entry.shape != shape:
            raise ValueError(f"{file}: {show(key, 100)} has shape {entry.shape}; {shape} was expected")
        tensor = entry.read()
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file} is damaged: {show(key, 100)} holds numbers that are not finite")
        pieces = [tensor] * len(paths) if which == "lora_A" else tensor.split(rows)
        tensors |= {f"{path}.{which}": piece for path, piece in zip(paths, pieces)}
    try:
        return load_adapter(model, tensors, scale, name)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
