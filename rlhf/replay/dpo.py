"""A bad step of direct preference optimisation."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf.infra import checkpoint
from rlhf.infra.brakes import LARGEST, Formula, gradients, weights
from rlhf.infra.optim import Precision
from rlhf.losses import dpo_loss, ipo_loss
from rlhf.ppo.roles import Roles
from rlhf.replay.ppo import base_of, roles_of
from rlhf.replay.texts import parts_of

FIELDS = ("tokens", "lengths", "prompt_lengths", "p", "weight")  # of a PairBatch: what is stored


def step_formulas(roles: Roles, pairs: dict[str, Tensor], options: dict, precision: Precision) -> Iterator[Formula]:
    """Weights, log-probs of policy and reference, the loss of every pair, beside both sides of it; held gradients."""
    yield from weights(roles.policy)
    with torch.no_grad(), precision.autocast():
        policy, reference = (torch.cat(x) for x in zip(*log_probs(roles, pairs, options["micro_batch"])))  # (2B, T)
    yield Formula("ref_logprobs", reference, LARGEST)
    yield Formula("logprobs", policy, LARGEST)
    yield Formula("loss", losses(policy, reference, pairs, options).repeat_interleave(2))
    yield from gradients(roles.policy)


def log_probs(roles: Roles, pairs: dict[str, Tensor], micro_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of the answers' tokens by policy and reference, (2 micro_batch, T) each."""
    tokens, lengths, prompts = (pairs[name] for name in FIELDS[:3])
    t = torch.arange(tokens.shape[1], device=tokens.device)
    mask = (t >= prompts[:, None]) & (t < lengths[:, None])
    for rows in parts_of(len(tokens), 2 * micro_batch):
        with torch.no_grad():
            features = roles.features(tokens[rows], lengths[rows])
            reference = roles.reference(tokens[rows], mask[rows], features)
        yield roles.policy(tokens[rows], mask[rows], features).logprobs, reference


def losses(policy: Tensor, reference: Tensor, pairs: dict[str, Tensor], options: dict) -> Tensor:
    """Of every pair, (B,)."""
    sides = [x.sum(1)[side::2] for x in (policy, reference) for side in (0, 1)]
    if options["loss"] == "ipo":
        return ipo_loss(*sides, options["beta"])
    p, smoothing = pairs["p"], options["label_smoothing"]
    return dpo_loss(*sides, options["beta"], label=p * (1 - smoothing) + (1 - p) * smoothing)


def formulas(
    record: dict, tensors: dict[str, Tensor], saved: checkpoint.Checkpoint, device: torch.device, precision: Precision
) -> Iterator[Formula]:
    """The step of a file, with the weights that it had."""
    options = record["options"] | {"micro_batch": record["micro_batch"]}
    roles = roles_of(options, base_of(record, saved.path, device), saved)
    pairs = {name: x.to(device) for name, x in tensors.items()}
    with precision.autocast():
        policy, reference = (torch.cat(x) for x in zip(*log_probs(roles, pairs, options["micro_batch"])))
        loss = (losses(policy, reference, pairs, options) * pairs["weight"]).sum() / pairs["weight"].sum()
    loss.backward()
    yield from step_formulas(roles, pairs, options, precision)
