"""A bad step of a language model's training."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf.infra import checkpoint
from rlhf.infra.brakes import Formula, gradients, weights
from rlhf.infra.optim import Precision
from rlhf.lm.checkpoints import new_transformer
from rlhf.lm.language_model import LanguageModel, to_columns
from rlhf.lm.pretrained import open_base
from rlhf.lm.trunks import LoRA, adapted
from rlhf.replay.texts import parts_of


@torch.no_grad()
def step_formulas(
    model: LanguageModel, tokens: Tensor, lengths: Tensor, mask: Tensor, micro_batch: int, precision: Precision
) -> Iterator[Formula]:
    """Weights, the loss of every token, and the gradients that the model holds: (B, T), (B,), (B, T)."""
    yield from weights(model)
    losses = []
    for rows in parts_of(len(tokens), micro_batch):
        with precision.autocast():
            losses.append(to_columns(model(tokens[rows], mask[rows], lengths[rows]), mask[rows]))
    yield Formula("loss", torch.cat(losses))
    yield from gradients(model)


def formulas(
    record: dict, tensors: dict[str, Tensor], saved: checkpoint.Checkpoint, device: torch.device, precision: Precision
) -> Iterator[Formula]:
    """The step of a file, with the weights that it had."""
    model = model_of(saved, device)
    tokens, lengths, mask = (tensors[name].to(device) for name in ("tokens", "lengths", "mask"))
    for rows in parts_of(len(tokens), record["micro_batch"]):
        with precision.autocast():
            loss = model(tokens[rows], mask[rows], lengths[rows]).sum() / mask.sum()
        loss.backward()
    yield from step_formulas(model, tokens, lengths, mask, record["micro_batch"], precision)


def model_of(saved: checkpoint.Checkpoint, device: torch.device) -> LanguageModel:
    config = saved.config
    if config.get("layout") == "adapters":
        base = open_base(config, saved.path, device).model
        lora = LoRA(config["lora_rank"], config["lora_alpha"], config["lora_targets"])
        model = LanguageModel(adapted(base, "policy", lora))
        checkpoint.load_weights(model, saved.tensors, saved.path)
        return model.to(device)
    model = new_transformer(config["model"], saved.path)
    checkpoint.load_weights(model, saved.tensors, saved.path)
    return LanguageModel(model.requires_grad_(True)).to(device)
