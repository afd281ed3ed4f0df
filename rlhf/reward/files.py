"""Reward models on disk: opened, checked against their base, averaged."""

import dataclasses
from collections import ChainMap
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data.examples import Examples
from model.half import store
from model.hf import load_hf
from rlhf.infra import checkpoint
from rlhf.lm.checkpoints import check_numbers, new_transformer, open_stored, weights_of
from rlhf.lm.frozen import FrozenStates
from rlhf.lm.pretrained import Pretrained, open_base
from rlhf.lm.trunks import LoRA
from rlhf.reward.model import (
    COMBINE,
    POOLING,
    POOLINGS,
    READS,
    Classifier,
    Ensemble,
    FrozenReward,
    RewardModel,
    adapted_trunk,
)

OLDER = {"member_gain": torch.ones(1), "member_bias": torch.zeros(1), "temperature": torch.ones(())}  # knew one head


def load_reward_model(
    path: str,
    fingerprint: str,
    device: torch.device | str = "cpu",
    base: Pretrained | None = None,
    frozen: FrozenStates | None = None,
    dtype: torch.dtype = torch.float32,
) -> RewardModel | FrozenReward:
    """The reward model saved at `path`; raises ValueError if it reads other tokens than `fingerprint`.

    What stands on a frozen trunk reads `base` if that is its own, in one pass with whoever else reads `frozen`; otherwise its
    base is opened. dtype: of its matrices, see model/half.py; its head stays float32.
    """
    saved = open_stored(path)
    check_kind(saved, path)
    if (own := saved.config.get("tokenizer")) != fingerprint:
        raise ValueError(
            f"{path} was trained with tokenizer {str(own)[:12]}, the policy uses {fingerprint[:12]}: "
            "train the reward model from the policy's own base"
        )
    return in_half(restored(saved.config, weights_of(saved), path, device, base, frozen), dtype)


def in_half(model: RewardModel | FrozenReward, dtype: torch.dtype) -> RewardModel | FrozenReward:
    """The same with the matrices of its trunk in `dtype`, see model/half.py."""
    store(model.states.model.requires_grad_(False) if isinstance(model, FrozenReward) else model.model, dtype)
    return model


def template_of(path: str) -> str | None:
    """sha256 of the chat template that the reward model at `path` was trained through; None for plain texts."""
    return open_stored(path).config.get("template")


def check_form(path: str, data: Examples) -> None:
    """ValueError where data are rendered otherwise than those that the reward model at `path` was trained on."""
    if data.template != (template := template_of(path)):
        known, theirs = (f"the chat template {x[:12]}" if x else "plain texts" for x in (template, data.template))
        raise ValueError(
            f"{path} was trained on {known}, {data} has {theirs}: prepare the data again with the model's tokenizer "
            "(--tokenizer), or train the reward model on such data"
        )


def load_classifier(path: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Classifier:
    """HF's sequence classifier at `path`, which has one label. ValueError for a language model, and for several labels."""
    model, info = load_hf(path, torch.float32, device)
    if info.kind != "classifier":
        raise ValueError(f"{path} is a language model; a reward model is a sequence classifier with one label")
    if len(info.score) != 1:
        raise ValueError(f"{path} has {len(info.score)} labels; a reward model is a sequence classifier with one")
    check_numbers([*model.named_parameters(), ("score.weight", info.score)], path)
    classifier = Classifier(model, info.score, info.reward_bias, info.pad_id, info.ours)
    return in_half(classifier.to(device).requires_grad_(False).eval(), dtype)


def check_kind(saved: checkpoint.Checkpoint, path: str) -> None:
    if saved.config.get("kind") != "reward":
        raise ValueError(
            f"{path} holds a {saved.config.get('kind')} checkpoint, a reward model is needed: use train_rm.py"
        )


def restored(
    config: dict,
    tensors: Mapping[str, Tensor],
    path: str,
    device: torch.device | str,
    base: Pretrained | None = None,
    frozen: FrozenStates | None = None,
) -> RewardModel | FrozenReward:
    """The reward model of a checkpoint's config and tensors."""
    ensemble = Ensemble(*(config.get(field.name, field.default) for field in dataclasses.fields(Ensemble)))
    trunk, pooling = config.get("trunk", "full"), config.get("pooling", "mean")
    reads = config.get("reads", "text")
    choices = ((trunk, TRUNKS), (pooling, POOLINGS), (ensemble.combine, COMBINE), (reads, READS))
    unknown = [x for x, known in choices if x not in known]
    if unknown:
        raise ValueError(f"{path} has {unknown[0]!r}, which is unknown here: it is damaged, or from a newer version")
    if trunk == "full":
        model, stop_ids = new_transformer(config["model"], path), None
    else:
        base, frozen = trunk_of(config, path, device, base, frozen)
    if trunk == "adapters":
        lora = LoRA(config["lora_rank"], config["lora_alpha"], config["lora_targets"])
        model, stop_ids = adapted_trunk(base.model, lora, config["depth"]), config["stop_ids"]
    if trunk == "frozen":
        reward_model = frozen_reward(config, path, base, frozen, ensemble, reads)
    else:
        language = config.get("language", False)
        reward_model = RewardModel(model, pooling, None, ensemble, stop_ids, language, reads)
    checkpoint.load_weights(reward_model, ChainMap(tensors, OLDER), path)
    return reward_model.to(device).requires_grad_(False).eval()


TRUNKS = ("full", "frozen", "adapters")


def trunk_of(
    config: dict, path: str, device: torch.device | str, base: Pretrained | None, frozen: FrozenStates | None
) -> tuple[Pretrained, FrozenStates]:
    """The frozen trunk that the reward model at `path` was trained on, and who else reads it."""
    if base is None or base.digest != config["base_digest"]:
        base, frozen = open_base(config, path, device), None
    if frozen is not None and frozen.model is not base.model:
        raise ValueError("frozen reads another model than base")
    return base, FrozenStates(base.model) if frozen is None else frozen


def frozen_reward(
    config: dict, path: str, base: Pretrained, frozen: FrozenStates, ensemble: Ensemble, reads: str
) -> FrozenReward:
    deepest = base.model.config.layers
    features = list(zip(config["depths"], config["poolings"], strict=True))
    if wrong := [f for f in features if not 0 <= f[0] <= deepest or f[1] not in POOLING]:
        raise ValueError(
            f"{path} reads {wrong[0]} of a trunk of {deepest} layers: it is damaged, or from a newer version"
        )
    return FrozenReward(frozen, features, config["stop_ids"], ensemble, reads)


NORMALISATION = ("gain", "bias", "member_gain", "member_bias", "temperature")


def average(paths: Sequence[str]) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors of the reward model whose weights are the mean of those at `paths` (WARM, arXiv:2401.12187).

    The mean is taken in float64. Of adapters it is the mean of what they add, (1/K) sum_k B_k A_k, exactly: the ranks
    add up. ValueError unless all are of one shape, base and tokenizer. It has to be normalised anew.
    """
    saved = [open_stored(path) for path in paths]
    for one, path in zip(saved, paths):
        check_kind(one, path)
    shapes = [{name: value for name, value in one.config.items() if name != "base"} for one in saved]
    for shape, path in zip(shapes[1:], paths[1:]):
        for name in sorted(shape.keys() | shapes[0].keys()):
            if shape.get(name) != shapes[0].get(name):
                both = f"{name} is {shapes[0].get(name)} in {paths[0]} and {shape.get(name)} in {path}"
                raise ValueError(f"only reward models of one kind can be averaged: {both}")
    config, tensors = dict(saved[0].config), [weights_of(one) for one in saved]
    mean = {}
    for name, first in tensors[0].items():
        if name in NORMALISATION:
            mean[name] = first
        elif ".lora_A." in name:
            mean[name] = torch.cat([x[name] for x in tensors])
        elif ".lora_B." in name:
            mean[name] = torch.cat([(x[name].double() / len(tensors)).to(first.dtype) for x in tensors], 1)
        else:
            mean[name] = (sum(x[name].double() for x in tensors) / len(tensors)).to(first.dtype)
    if config.get("trunk") == "adapters":
        config |= {name: config[name] * len(tensors) for name in ("lora_rank", "lora_alpha")}
    return config, mean
