"""Transformers of our own checkpoints: the shape that a config describes, and the weights in it."""

from pathlib import Path

from model.transformer import ModelConfig, Transformer
from rlhf.infra import checkpoint


def language_model_of(saved: checkpoint.Checkpoint, path: str | Path) -> Transformer:
    """The language model of an open checkpoint that holds all of it; ValueError if that is none."""
    kind, tensors = saved.config.get("kind"), dict(saved.tensors)
    if kind not in ("lm", "policy"):
        raise ValueError(
            f"{path} holds a {kind} checkpoint, a language model is needed: use train_lm.py or train_ppo.py"
        )
    if kind == "policy":
        prefix = "model."
        tensors = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    model = new_transformer(saved.config["model"], path)
    checkpoint.load_weights(model, tensors, path)
    return model


def stored_config(config: dict, where: str | Path) -> ModelConfig:
    """The shape that the checkpoint `where` describes; ValueError if that is none of ours."""
    try:
        return ModelConfig(**config)
    except TypeError as error:  # a field that we do not know, or of another type
        raise ValueError(f"{where} is a checkpoint of another architecture: {error}") from None


def new_transformer(config: dict, where: str | Path) -> Transformer:
    """An untrained transformer as the checkpoint `where` describes it."""
    return Transformer(stored_config(config, where))
