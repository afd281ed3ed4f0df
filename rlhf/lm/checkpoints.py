"""Transformers of our own checkpoints: what their config may say, the shape that it describes, and the weights in it."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from model.config import LARGEST_REAL, LARGEST_SIZE, MOST_LAYERS, ModelConfig
from model.hf import empty_model
from model.transformer import Transformer
from rlhf.infra import checkpoint

MOST_NAMES = 1024  # stop ids, targets of adapters, depths
LARGEST_WEIGHT = 1e8  # a thousand times what the gains of norms reach; float32 ends at 3e38


def open_stored(spec: str | Path) -> checkpoint.Checkpoint:
    """The checkpoint that `spec` means, a run or one of its steps, with what its config says of the model checked.

    Raises FileNotFoundError where there is none, ValueError in one line where it is damaged or describes nothing of ours.
    """
    saved = checkpoint.load(spec)
    config, where = saved.config, saved.path
    for name, value in config.items():
        meaning, accepts = FIELDS.get(name, ("anything", lambda _: True))
        if not accepts(value):
            raise ValueError(f"{where}: {name} is {shortened(value)}; {meaning} was expected")
    if missing := [name for name in needed(config) if name not in config]:
        raise ValueError(f"{where}: its config lacks {', '.join(missing)}: it is damaged, or from another version")
    if "model" in config:
        stored_config(config["model"], where)
    return saved


def weights_of(saved: checkpoint.Checkpoint) -> checkpoint.Tensors:
    """Its tensors, each of which is read when it is asked for. ValueError where the config describes more than they hold,
    before a model of that size is built, and where one holds a number that no training leaves: all that is computed from it
    is wrong.
    """
    if "model" in saved.config and on_no_base(saved.config):
        least, held = least_weights(stored_config(saved.config["model"], saved.path)), saved.size("model.safetensors")
        if least > held:
            what = f"its config describes {least:,} weights, model.safetensors has {held:,} bytes"
            raise ValueError(f"{saved.path}: {what}: damaged, or of another architecture")
    tensors = saved.one_by_one("model.safetensors")
    check_numbers(tensors.items(), saved.path / "model.safetensors")
    return tensors


def check_numbers(tensors: Iterable[tuple[str, Tensor]], where: str | Path) -> None:
    """ValueError, naming the tensor, where one holds a number that no training leaves."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            least, most = map(float, tensor.detach().aminmax())  # either is NaN where one number is
            if not -LARGEST_WEIGHT <= least <= most <= LARGEST_WEIGHT:
                found = least if most <= LARGEST_WEIGHT else most
                raise ValueError(f"{where}: {name} holds {found:g}: it is damaged, or its training diverged")


def on_no_base(config: dict) -> bool:
    """Does the checkpoint hold all of the model that its config describes?"""
    return not (config.get("layout") in ("adapters", "branch") or config.get("trunk") in ("adapters", "frozen"))


def needed(config: dict) -> list[str]:
    """Names without which a checkpoint of this kind cannot be put together."""
    kind = config.get("kind")
    if kind not in ("lm", "policy", "reward", "int8"):
        return []
    if on_no_base(config):
        return ["model"]
    adapter = ["lora_rank", "lora_alpha", "lora_targets"]
    if kind in ("policy", "lm"):
        own = adapter if config["layout"] == "adapters" else ["branch_layers"]
    else:
        own = ["stop_ids"] + (["depths", "poolings"] if config["trunk"] == "frozen" else [*adapter, "depth"])
    return ["base", "base_digest", *own]


def least_weights(shape: ModelConfig) -> int:
    """Numbers in the matrices of a model of this shape; what is stored has a byte or more for each."""
    attention = 2 * shape.width * shape.head_dim * (shape.heads + shape.kv_heads)
    return shape.width * shape.vocab_size + shape.layers * (attention + 2 * shape.width * shape.ffn)


# what a field may hold: in words, and as a test


def is_text(value) -> bool:
    return isinstance(value, str)


def is_count(value, least: int = 1, most: int = LARGEST_SIZE) -> bool:
    return type(value) is int and least <= value <= most


def is_real(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= LARGEST_REAL


def each(accepts: Callable) -> Callable:
    return lambda value: isinstance(value, list) and len(value) <= MOST_NAMES and all(map(accepts, value))


def or_none(accepts: Callable) -> Callable:
    return lambda value: value is None or accepts(value)


TEXT = ("a text", is_text)
COUNT = (f"a whole number from 1 to {LARGEST_SIZE}", is_count)
REAL = ("a finite number", is_real)
FIELDS = dict.fromkeys(("kind", "layout", "tokenizer", "base", "base_digest", "trunk", "pooling", "combine"), TEXT)
FIELDS |= dict.fromkeys(("lora_rank", "branch_layers", "members"), COUNT)
FIELDS |= dict.fromkeys(("lora_alpha", "uncertainty_coef"), REAL)
FIELDS |= {
    "model": ("the shape of a model", lambda value: isinstance(value, dict)),
    "stop_ids": ("a list of token ids", each(lambda x: is_count(x, 0))),
    "lora_targets": ("a list of names, or null", or_none(each(is_text))),
    "depth": ("a number of layers, or null", or_none(lambda x: is_count(x, 0, MOST_LAYERS))),
    "depths": ("a list of numbers of layers", each(lambda x: is_count(x, 0, MOST_LAYERS))),
    "poolings": ("a list of names", each(is_text)),
    "language": ("true or false", lambda value: isinstance(value, bool)),
}


def shortened(value, length: int = 60) -> str:
    """A stranger's value in one short line."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def stored_config(config: dict, where: str | Path) -> ModelConfig:
    """The shape that the checkpoint `where` describes; ValueError if that is none of ours, or absurdly large."""
    try:
        return ModelConfig(**config)
    except (
        TypeError,
        ValueError,
    ) as error:  # a field that we do not know; values that are absurd or do not fit together
        raise ValueError(f"{where} is a checkpoint of another architecture: {error}") from None


def new_transformer(config: dict, where: str | Path) -> Transformer:
    """An untrained transformer as the checkpoint `where` describes it."""
    return Transformer(stored_config(config, where))


def language_model_of(saved: checkpoint.Checkpoint, path: str | Path) -> Transformer:
    """The language model of an open checkpoint that holds all of it; ValueError if that is none."""
    kind = saved.config.get("kind")
    if kind not in ("lm", "policy"):
        raise ValueError(
            f"{path} holds a {kind} checkpoint, a language model is needed: use train_lm.py or train_ppo.py"
        )
    tensors = weights_of(saved)
    if kind == "policy":
        prefix = "model."
        tensors = tensors.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)
    model = new_transformer(saved.config["model"], path)
    checkpoint.load_weights(model, tensors, path)
    return model


def count(parameters: Iterable[Tensor]) -> int:
    """Numbers in different parameters."""
    return sum(x.numel() for x in {id(x): x for x in parameters}.values())


def trunk_parameters(config: ModelConfig) -> int:
    """Numbers in a model without an output matrix of its own."""
    return count(empty_model(config).parameters()) - (0 if config.tied else config.vocab_size * config.width)
