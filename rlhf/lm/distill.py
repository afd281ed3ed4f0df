"""Smaller by whole layers: leave out those that turn the hidden states least, then learn the policy's distribution again."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from model.config import PER_LAYER
from model.transformer import Transformer
from rlhf.infra import optim
from rlhf.lm.language_model import predictions


@torch.no_grad()
def layer_distances(model: Transformer, count: int, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """How far `count` neighbouring layers turn the hidden states, for every first layer. -> (L - count + 1,), 0 to 1

    d(l, n) = mean of arccos(x_l . x_(l+n) / |x_l| |x_(l+n)|) / pi, where x_l enters layer l (arXiv:2403.17887, eq. 7);
    over all tokens of `batches`, tokens (B, T) and masks (B, T), where the paper takes the last token of each text.
    """
    starts = model.config.layers - count + 1
    total, tokens_seen = torch.zeros(starts, dtype=torch.float64), 0
    for tokens, mask in batches:
        span = model.span(tokens)
        states = [model.embed(tokens, span)]  # (B, T, D) before every layer, and after the last
        for layer in range(model.config.layers):
            states.append(model.blocks(states[-1], span, layer, layer + 1))
        states = [x[mask] for x in states]  # (N, D)
        for first in range(starts):
            cosine = torch.cosine_similarity(states[first], states[first + count], dim=1).double()
            total[first] += cosine.clamp(-1, 1).arccos().sum() / math.pi
        tokens_seen += int(mask.sum())
    return total / tokens_seen


def drop_layers(model: Transformer, first: int, count: int) -> Transformer:
    """A copy of the model without layers first to first + count - 1. ValueError where no layer would be left."""
    layers = model.config.layers
    if not (0 < count < layers and 0 <= first <= layers - count):
        raise ValueError(
            f"layers {first} to {first + count - 1} of {layers} cannot be left out: one at least must stay"
        )

    def renumbered(name: str) -> str | None:
        match = re.match(r"layers\.(\d+)\.", name)
        if not match or int(match[1]) < first:
            return name
        left = int(match[1]) - count
        return None if left < first else f"layers.{left}.{name[match.end() :]}"

    kept = [*range(first), *range(first + count, layers)]
    places = {name: tuple(kept.index(i) for i in getattr(model.config, name) if i in kept) for name in PER_LAYER}
    smaller = Transformer(replace(model.config, layers=len(kept), **places)).to(model.norm.weight.dtype)
    names = {name: renumbered(name) for name in model.state_dict()}
    smaller.load_state_dict({names[n]: x for n, x in model.state_dict().items() if names[n]})
    return smaller


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student), nats: sum_v p_v (log p_v - log q_v) (arXiv:1503.02531 at temperature 1). (N, V) -> (N,)"""
    p, q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def distill(
    student: Transformer,
    teacher: Transformer,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    warmup: int = 20,
    grad_clip: float = 1.0,
) -> list[float]:
    """Train the student towards the teacher's distribution of every next token; returns the loss of every step.

    batch(step) gives tokens (B, T) and the mask (B, T) of the tokens to predict: held-in text, or the teacher's own.
    """
    student.requires_grad_(True).train()
    optimizer, precision = optim.make_optimizer(student, lr), optim.amp(torch.device("cpu"))
    losses = []
    for step in tqdm(range(steps), desc="distill", leave=False, disable=None):
        tokens, mask = batch(step)
        with torch.no_grad():
            target, _ = predictions(teacher, teacher.trunk(tokens[:, :-1]), tokens, mask)  # (N, V)
        with torch.enable_grad():
            logits, _ = predictions(student, student.trunk(tokens[:, :-1]), tokens, mask)
            loss = distillation_loss(logits, target).mean()
        loss.backward()
        optim.set_lr(optimizer, optim.schedule(step, steps, min(warmup, steps // 2), lr))
        if not math.isfinite(norm := optim.step(optimizer, student, precision.scaler, grad_clip)):
            raise ValueError(f"the gradient of step {step} is {norm}: the student has diverged; use a smaller rate")
        losses.append(float(loss.detach()))
    student.requires_grad_(False).eval()
    return losses
