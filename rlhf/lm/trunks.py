"""Trunks on a base: which parameters are copies that train, which are the base's own; and a tuned model put together again."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.lora import activate, add_lora, load_adapter, merge
from model.transformer import Transformer

PREFIX = "model."  # of the language model's tensors in the checkpoint of a policy


@dataclass(frozen=True)
class LoRA:
    """Size and place of the adapters."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | None = None  # last names of linear layers; None: all in the blocks
    seed: int = 0  # of the start


STORED = {  # layouts whose checkpoints hold what was trained, and name the base; and what else they have to say
    "adapters": ("lora_rank", "lora_alpha", "lora_targets"),
    "branch": ("branch_layers",),
}


def lora_of(cfg) -> LoRA:
    """What the options of a script say of its adapters."""
    return LoRA(cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.seed)


def stored_of(cfg, base_digest: str) -> dict:
    """What a checkpoint of these options says beside its tensors, so that `tuned_model` finds what was not trained.

    cfg: layout, init and the options of the layout. Nothing for a layout whose checkpoints hold a whole model.
    """
    if cfg.layout not in STORED:
        return {}
    known = {"layout": cfg.layout, "base": cfg.init, "base_digest": base_digest}
    return known | {name: getattr(cfg, name) for name in STORED[cfg.layout]}


Copied = Callable[[Tensor], Tensor]  # the numbers of a parameter -> those of its copy, see Dist.copied


def shared_copy(base: Transformer, own: Iterable[nn.Parameter] = (), copied: Copied = torch.clone) -> Transformer:
    """A model with modules of its own and the base's frozen parameters, but for trainable copies of those in `own`."""
    base.requires_grad_(False)
    own = {id(x) for x in own}
    known = {id(x): nn.Parameter(copied(x.detach())) if id(x) in own else x for x in base.parameters()}
    model = copy.deepcopy(base, known)
    for mine, theirs in zip(model.parameters(), base.parameters()):
        mine.requires_grad_(mine is not theirs)
    return model


def adapted(base: Transformer, name: str, lora: LoRA) -> Transformer:
    """The base with a new adapter of this name, active."""
    generator = torch.Generator().manual_seed(lora.seed)
    model = add_lora(shared_copy(base), lora.rank, lora.alpha, lora.targets, name, generator)
    activate(model, name)
    return model


def branched(base: Transformer, layers: int, copied: Copied = torch.clone) -> Transformer:
    """The base with copies of its top `layers` and of the final norm; the rest is the base's, frozen."""
    if not 0 < layers <= base.config.layers:
        raise ValueError(f"branch_layers {layers} is not between 1 and the model's {base.config.layers} layers")
    return shared_copy(base, [*base.layers[-layers:].parameters(), *base.norm.parameters()], copied)


def tuned_model(base: Transformer, config: dict, tensors: dict[str, Tensor]) -> Transformer:
    """The language model of a policy checkpoint of the layouts that store what was trained alone; the base stays as it is.

    `config` and `tensors` are the checkpoint's. Adapters come merged, layers of a branch in their places; what is not
    trained shares the base's memory. ValueError where the tensors do not fit the base.
    """
    kind, layout = config.get("kind"), config.get("layout")
    if kind not in ("policy", "lm") or layout not in STORED:
        raise ValueError(f"a {kind} checkpoint of layout {layout} holds no part of a tuned model")
    tensors = {name.removeprefix(PREFIX): x for name, x in tensors.items() if name.startswith(PREFIX)}
    if layout == "adapters":
        model = load_adapter(
            shared_copy(base), policy_adapter(tensors), config["lora_alpha"] / config["lora_rank"], "policy"
        )
        return merge(model, "policy")
    model = branched(base, config["branch_layers"])
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    wrong = [name for name, x in trained.items() if name not in tensors or tensors[name].shape != x.shape]
    if wrong or len(tensors) != len(trained):
        raise ValueError(
            f"the checkpoint's branch does not fit its base: {wrong or sorted(tensors.keys() - trained.keys())}"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    return model.requires_grad_(False)


def policy_adapter(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The policy's adapter in a checkpoint of layout adapters, named as `load_adapter` wants them."""
    suffix = ".policy"
    names = {name: name.removeprefix(PREFIX).removesuffix(suffix) for name in tensors if name.endswith(suffix)}
    return {short: tensors[name] for name, short in names.items() if ".lora_" in short}
