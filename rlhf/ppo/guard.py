"""The brakes of PPO: what is computed in an iteration, in its order, and which numbers keep a step from being taken."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.functional import masked_mean
from rlhf.infra import optim
from rlhf.infra.brakes import LARGEST, Brakes, Formula, first_bad, gradients, weights
from rlhf.infra.optim import Precision
from rlhf.kl import AdaptiveKL, FixedKL
from rlhf.losses import value_loss
from rlhf.ppo.roles import ActorCritic
from rlhf.ppo.rollout import Experience
from rlhf.ppo.update import Objective, weighted_policy_loss


class Limits(NamedTuple):
    """Of a minibatch's means; None = any finite number."""

    ratio: float | None = None
    value_loss: float | None = None
    approxkl: float | None = None  # the only one that is no fault: a step that would go further ends the iteration


FACTS = ("scores", "logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")


def facts(experience: Experience) -> Iterator[Formula]:
    """What is known before the first update."""
    yield from (Formula(name, getattr(experience, name), LARGEST) for name in FACTS)


@torch.no_grad()
def step_formulas(
    policy: ActorCritic, batch: Experience, objective: Objective, limits: Limits, micro_batch: int, precision: Precision
) -> Iterator[Formula]:
    """What a step computes, from the weights to the gradients that the policy holds; `micro_batch` rows at a time."""
    yield from facts(batch)
    yield from weights(policy)
    width, parts = batch.tokens.shape[1], []
    for rows in batch.split(micro_batch):
        with precision.autocast():
            output = policy(rows.tokens, rows.mask, rows.features)
        missing = width - rows.tokens.shape[1]
        parts.append([torch.nn.functional.pad(x, (0, missing)) for x in vars(output).values()])
    logprobs, entropy, values = (torch.cat(part) for part in zip(*parts))  # (B, T) each
    yield Formula("new logprobs", logprobs, LARGEST)
    yield Formula("new values", values := batch.base_values + values, LARGEST)
    mask, o = batch.mask, objective
    ratio = torch.where(mask, (logprobs - batch.logprobs).exp(), 0)
    yield Formula("ratio", ratio)
    if limits.ratio is not None:
        yield Formula("mean ratio", masked_mean(ratio, mask), limits.ratio, ratio)
    loss = weighted_policy_loss(logprobs, batch, o)
    yield Formula("policy loss", torch.where(mask, loss, 0))
    loss = torch.where(mask, value_loss(values, batch.values, batch.returns, o.value_clip), 0)
    yield Formula("value loss", loss)
    if limits.value_loss is not None:
        yield Formula("mean value loss", masked_mean(loss, mask), limits.value_loss, loss)
    yield Formula("entropy", entropy)
    yield from gradients(policy)


@dataclass
class Guard:
    """Stands between the numbers of an iteration and the policy."""

    brakes: Brakes
    policy: ActorCritic
    objective: Objective
    limits: Limits
    micro_batch: int
    precision: Precision
    grad_clip: float
    kl_control: FixedKL | AdaptiveKL
    texts: Callable[[Experience], list[dict]]  # of every row, see Brakes.skip
    far: bool = False  # has this iteration come as far as it may?

    def admitted(
        self, order: Iterable[Tensor], experience: Experience, iteration: int, prompts: Tensor
    ) -> Iterator[Tensor]:
        """The minibatches that the policy may learn from: none of a bad experience, none after the step that ends the run or
        would have gone too far. prompts (B,): which of the data's the rows answer, for a replay.
        """
        self.far = False
        if first_bad(facts(experience)):
            self.skip(
                f"{iteration:06d}", iteration, experience, torch.arange(len(experience)), prompts, "a number of it"
            )
            return
        for rows in order:
            yield rows
            if self.brakes.ended or self.far:
                return

    def step(
        self, update: dict[str, float], experience: Experience, rows: Tensor, iteration: int, nth: int
    ) -> list[dict[str, float]]:
        """The optimiser's step on the gradient of these global rows, unless a number of the `nth` update is bad; [the
        update], or [] where it would go too far and is left undone.
        """
        self.far = self.limits.approxkl is not None and self.limits.approxkl < update["policy/approxkl"] < math.inf
        if self.far:
            self.brakes.optimizer.zero_grad()
            return []
        seen = self.seen(update)
        norm = math.nan if seen else self.take()
        fp16 = self.precision.scaler.is_enabled()  # a skipped step is its way to find the loss scale
        if bad := bool(seen) or not (math.isfinite(norm) or fp16):
            seen = seen or f"the gradient is {norm}"
            self.skip(f"{iteration:06d}-{nth:02d}", iteration, experience[rows], rows, None, seen)
        elif math.isfinite(norm):
            self.brakes.passed()
        return [update | {"policy/grad_norm": norm, "bad/steps": float(bad)}]

    def take(self) -> float:
        return optim.step(self.brakes.optimizer, self.policy, self.precision.scaler, self.grad_clip)

    def seen(self, update: dict[str, float]) -> str:
        """What of an update, which is the same on all ranks, is bad; "" where nothing is."""
        limits = {"policy/ratio": self.limits.ratio, "loss/value": self.limits.value_loss}
        for name, value in update.items():
            limit = limits.get(name)
            if not math.isfinite(value) or limit is not None and value > limit:
                return f"{name} is {value:.4g}"
        return ""

    def skip(
        self, name: str, iteration: int, batch: Experience, rows: Tensor, prompts: Tensor | None, seen: str
    ) -> None:
        """Count, store and say it. `prompts` are given where a whole iteration is bad."""
        how = (self.objective, self.limits, self.micro_batch, self.precision)
        formulas = facts(batch) if prompts is not None else step_formulas(self.policy, batch, *how)
        self.brakes.skip(
            name,
            iteration,
            formulas,
            lambda: vars(batch) | ({} if prompts is None else {"prompts": prompts}),
            lambda: [
                text | {"start": int(n) - len(text["tokens"])} for text, n in zip(self.texts(batch), batch.lengths)
            ],
            seen,
            script="train_ppo.py",
            objective=asdict(self.objective),
            limits=self.limits._asdict(),
            micro_batch=self.micro_batch,
            kl_coef=self.kl_control.coef,
            rows=rows.tolist(),
        )
