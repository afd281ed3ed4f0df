"""A bad step of a reward model's training."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from rlhf.infra import checkpoint
from rlhf.infra.brakes import LARGEST, Formula, gradients, weights
from rlhf.infra.optim import Precision
from rlhf.reward.files import restored
from rlhf.reward.model import RewardModel
from rlhf.reward.objective import Objective, Texts, reward_losses

Part = tuple[Texts, str, Tensor]  # rows of a step, the kind of their loss, and what its sums weigh (3,)


@torch.no_grad()
def step_formulas(
    model: RewardModel, parts: Sequence[Part], objective: Objective, precision: Precision
) -> Iterator[Formula]:
    """Weights, the raw score of every text (the largest of its heads), the loss, and the gradients that the model holds."""
    yield from weights(model)
    with precision.autocast():
        raw = torch.cat([model(texts.tokens, texts.lengths).abs().amax(1) for texts, _, _ in parts])
        yield Formula("raw scores", raw, LARGEST)
        yield Formula("loss", sum((scale * reward_losses(model, x, kind, objective)).sum() for x, kind, scale in parts))
    yield from gradients(model)


def stored(parts: Sequence[Part]) -> dict[str, Tensor]:
    """The parts as named tensors."""
    named = {f"{i}.{name}": x for i, (texts, _, _) in enumerate(parts) for name, x in texts._asdict().items()}
    return named | {f"{i}.scale": scale for i, (*_, scale) in enumerate(parts)}


def facts(parts: Sequence[Part], objective: Objective) -> dict:
    """What else a replay needs."""
    return {"kinds": [kind for _, kind, _ in parts], "objective": asdict(objective)}


def formulas(
    record: dict, tensors: dict[str, Tensor], saved: checkpoint.Checkpoint, device: torch.device, precision: Precision
) -> Iterator[Formula]:
    """The step of a file, with the weights that it had."""
    weights_there = saved.tensors
    model = restored(saved.config, weights_there, str(saved.path), device)
    for name, x in model.named_parameters():
        x.requires_grad_(name in weights_there)
    objective, parts = Objective(**record["objective"]), []
    for i, kind in enumerate(record["kinds"]):
        texts = Texts(*(tensors[f"{i}.{name}"].to(device) for name in Texts._fields))
        parts.append((texts, kind, tensors[f"{i}.scale"].to(device)))
        with precision.autocast():
            loss = (parts[-1][2] * reward_losses(model, texts, kind, objective)).sum()
        loss.backward()
    yield from step_formulas(model, parts, objective, precision)
