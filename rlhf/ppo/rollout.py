"""Act and judge: prompts -> Rollout (facts) -> Experience (+ credit) -> minibatches -> micro-batches."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from model.generate import Generated, Sampling, generate, row_uniforms
from model.transformer import Transformer
from rlhf.infra.distributed import Dist
from rlhf.infra.optim import Precision
from rlhf.ppo.roles import ActorCritic, Reference, Roles, no_features
from rlhf.reward.model import Score


@dataclass(frozen=True)
class Rollout:
    """What happened, before anybody is given credit. Rows are contiguous: prompt, response, padding."""

    tokens: Tensor  # (B, T) int64
    lengths: Tensor  # (B,) prompt + response
    mask: Tensor  # (B, T) bool, True on response tokens, EOS included
    finished: Tensor  # (B,) bool, ended with EOS
    logprobs: Tensor  # (B, T) of the policy that acted, by the training forward
    entropy: Tensor  # (B, T)
    ref_logprobs: Tensor  # (B, T)
    values: Tensor  # (B, T)
    base_values: Tensor  # (B, T) what they stand on: V = base + what the critic's head says; 0 without --value_base
    sampler_logprobs: Tensor  # (B, T) as the sampler saw them; their difference from logprobs is a metric
    scores: Tensor  # (B,)
    parts: (
        Tensor  # (B, K) what the terms and components of the reward say, without their weights; K = 0 where it has none
    )
    features: Tensor  # (B, T, D) what the frozen layers made of the tokens; D = 0 where none are shared

    def __post_init__(self):
        rows, width = self.tokens.shape
        for field in fields(self):
            shape = tuple(getattr(self, field.name).shape)
            if field.name == "features" and len(shape) == 3:
                shape = shape[:2]
            if field.name == "parts" and len(shape) == 2:
                shape = shape[:1]
            if shape not in ((rows,), (rows, width)):
                raise ValueError(f"{type(self).__name__}.{field.name} has shape {shape}, tokens have {(rows, width)}")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows):
        """The same type with the chosen rows (slice or index tensor)."""
        return self.map(lambda x: x[rows])

    def map(self, function: Callable[[Tensor], Tensor]):
        """The same type with `function` applied to every field."""
        return replace(self, **{f.name: function(getattr(self, f.name)) for f in fields(self)})

    def map_columns(self, function: Callable[[Tensor], Tensor]):
        """The same type with `function` applied to every field that has a column for every token."""
        per_token = [f.name for f in fields(self) if f.name != "parts" and getattr(self, f.name).dim() > 1]
        return replace(self, **{name: function(getattr(self, name)) for name in per_token})

    def trim(self):
        """Without the columns in which every row is padding."""
        width = int(self.lengths.max())
        return self.map_columns(lambda x: x[:, :width])

    def pad(self, width: int):
        """The same with zeros behind, `width` columns in all."""
        missing = width - self.tokens.shape[1]
        return self.map_columns(lambda x: F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)))

    def split(self, size: int) -> Iterator:
        """Consecutive groups of `size` rows, each trimmed to its own longest row."""
        return (self[i : i + size].trim() for i in range(0, len(self), size))


@dataclass(frozen=True)
class Experience(Rollout):
    """A rollout with credit assigned: what the losses need."""

    rewards: Tensor  # (B, T)
    advantages: Tensor  # (B, T) whitened
    returns: Tensor  # (B, T) targets of the value function

    @classmethod
    def of(cls, rollout: Rollout, rewards: Tensor, advantages: Tensor, returns: Tensor) -> "Experience":
        facts = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
        return cls(**facts, rewards=rewards, advantages=advantages, returns=returns)


Cut = Callable[[Tensor], list[Tensor]]  # lengths (N,) of rows -> which of them share a forward, all of them once


def by_rows(size: int) -> Cut:
    """Neighbours share a forward, `size` of them."""
    return lambda lengths: list(torch.arange(len(lengths)).split(size))


def act(
    sampler: Callable[[], Transformer],
    sampling: Sampling,
    seed: int,
    precision: Precision,
    prompts: Tensor,
    lengths: Tensor,
    ids: Tensor,
    iteration: int,
    depths: Iterable[int] = (),
) -> Generated:
    """Responses to right-padded prompts (B, P) of these lengths (B,) by what `sampler` gives, on its device.

    What a row draws depends on (seed, iteration, its global id) alone: neither batch nor number of ranks changes it.
    depths: whose states are kept, see `generate`.
    """
    model = sampler()
    device = model.embed_tokens.weight.device
    uniforms = row_uniforms(seed, iteration, ids.tolist(), sampling.max_new_tokens)
    with precision.autocast():
        return generate(model, prompts.to(device), lengths.to(device), sampling, uniforms, depths=depths)


class Sampler(Protocol):
    """Where responses come from."""

    precision: str  # that it samples in

    def refresh(self) -> None:
        """It samples by the policy's weights of now, from here on. All ranks call it together."""

    def __call__(self, prompts: Tensor, lengths: Tensor, ids: Tensor, iteration: int) -> Generated:
        """Responses to right-padded prompts (B, P) of these lengths (B,), for rows with these global ids, see `act`."""


@dataclass(frozen=True)
class OwnSampler:
    """The policy itself, in this process."""

    roles: Roles
    sampling: Sampling
    seed: int
    autocast: Precision
    dist: Dist
    precision: str

    def refresh(self) -> None:
        """Nothing: its weights are the policy's."""

    def __call__(self, prompts: Tensor, lengths: Tensor, ids: Tensor, iteration: int) -> Generated:
        how, depths = (self.roles.sampler, self.sampling, self.seed, self.autocast), self.roles.seen()
        with self.dist.whole(self.roles.policy.model):
            drawn = act(*how, prompts, lengths, ids, iteration, depths)
        self.roles.rest()
        return drawn


@torch.no_grad()
def judge(
    samples: Generated,
    policy: ActorCritic,
    reference: Reference,
    score: Score,
    micro_batch: int,
    width: int,
    features: Callable[..., Tensor] = no_features,
    prompts: Tensor | None = None,
    said: Tensor | None = None,
    cut: Cut | None = None,
    value_base: Score | None = None,
) -> Rollout:
    """Policy, reference and value of every token, one score per response; `width` is the T of the result.

    prompts (B,): which of the data's the rows answer, for a score that looks them up; None = nobody does. A score of
    (B, 1 + K) also says what it is the sum of. said (B, 1 + K): what it said already; it is then not asked again.

    The policy's log-probs are computed on the micro-batches of the first learning epoch, so that its first ratio is
    exactly 1: the same rows with the same padding go through the same kernels. `cut` makes them where it is given, in place
    of `micro_batch` neighbours. value_base (tokens, lengths, mask) -> (B, T): what the values stand on, None = 0; the head
    then learns the rest, which is potential-based shaping of the rewards in other words (arXiv:1106.5267).
    """
    blank = torch.zeros_like(samples.logprobs)
    known = blank[:, :1] if said is None else said
    facts = Rollout(
        tokens=samples.tokens,
        mask=samples.mask,
        sampler_logprobs=samples.logprobs,
        lengths=samples.lengths,
        finished=samples.finished,
        logprobs=blank,
        entropy=blank,
        ref_logprobs=blank,
        values=blank,
        base_values=blank,
        scores=known[:, 0],
        parts=known[:, 1:],
        features=blank[..., None][..., :0],
    )
    judged, parts = [], (cut or by_rows(micro_batch))(facts.lengths)
    for part in parts:
        rows, which = facts[part].trim(), () if prompts is None else (prompts[part],)
        seen = {depth: x[part, : rows.tokens.shape[1]] for depth, x in samples.states.items()}
        # (B, T, D), and what the reward model reads of the same trunk is ready too
        frozen = features(rows.tokens, known=seen)
        output = policy(rows.tokens, rows.mask, frozen)
        if said is None:
            told = score(rows.tokens, rows.lengths, rows.mask, *which).reshape(len(rows), -1)  # (B, 1 + K)
            rows = replace(rows, scores=told[:, 0], parts=told[:, 1:])
        base = rows.base_values if value_base is None else value_base(rows.tokens, rows.lengths, rows.mask).to(blank)
        rows = replace(
            rows,
            logprobs=output.logprobs,
            entropy=output.entropy,
            values=base + output.values,
            base_values=base,
            ref_logprobs=reference(rows.tokens, rows.mask, frozen),
            features=frozen,
        )
        judged.append(rows.pad(width))
    return concatenate(judged)[torch.cat(parts).argsort()]


def concatenate(parts: list[Rollout]) -> Rollout:
    """One rollout of all rows; the parts have equal width."""
    return Rollout(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(parts[0])})


def gather(rollout: Rollout, dist: Dist) -> Rollout:
    """The rollout of all ranks in global row order: rank r holds the rows r, r + world, r + 2 world, ...

    A rollout is a few numbers per token, so every rank can hold all of it. Credit and whitening are then global without further
    thought, and a minibatch is the same set of rows for every world size. Features, a hidden state per token, stay with the
    rank that judged their rows, see `share`: all of them together would not fit.
    """
    if dist.world == 1:
        return rollout
    return replace(rollout, features=rollout.features[..., :0]).map(lambda x: interleaved(x, dist))


def share(experience: Experience, features: Tensor, rows: Tensor, dist: Dist) -> Experience:
    """This rank's part of a minibatch of these global rows.

    features (B / world, T, D): of the rows that this rank judged. In the first epoch it learns from them itself; those of
    other rows are sent to whoever learns from them now.
    """
    learners = [rows[rank :: dist.world] for rank in range(dist.world)]  # the rows that each rank learns from
    mine = experience[learners[dist.rank].to(dist.device)]
    if dist.world == 1 or features.shape[-1] == 0:
        return mine
    if all(bool((of % dist.world == rank).all()) for rank, of in enumerate(learners)):
        here = (learners[dist.rank] // dist.world).to(dist.device)
        return replace(mine, features=features[here])
    parts = [features[(of[of % dist.world == dist.rank] // dist.world).to(dist.device)] for of in learners]
    judges = learners[dist.rank] % dist.world  # who sends each of them
    counts = judges.bincount(minlength=dist.world).tolist()
    places = judges.argsort(stable=True).argsort().to(dist.device)  # where each of them comes in
    return replace(mine, features=dist.exchange_rows(parts, counts)[places])


def interleaved(x: Tensor, dist: Dist) -> Tensor:
    """The rows of all ranks in global order: (B, ...) -> (world B, ...)."""
    if dist.world == 1:
        return x
    if x.numel() == 0:  # nothing to send
        return x.new_zeros(dist.world * len(x), *x.shape[1:])
    parts = dist.all_gather_rows(x).reshape(dist.world, *x.shape)  # (world, B, ...)
    return parts.transpose(0, 1).reshape(dist.world * len(x), *x.shape[1:])


def minibatches(rows: int, count: int, epochs: int, seed: int, iteration: int) -> Iterator[Tensor]:
    """Global row ids (rows / count,) of every minibatch of every epoch.

    The first epoch keeps the order in which the rows were judged (prompts come shuffled already), so its micro-batches
    are the judged ones and the first ratio is exactly 1; later epochs shuffle, by (seed, iteration, epoch) alone.
    """
    for epoch in range(epochs):
        order = torch.arange(rows)
        if epoch > 0:
            generator = torch.Generator().manual_seed(hash((seed, iteration, epoch)) % 2**63)
            order = torch.randperm(rows, generator=generator)
        yield from order.reshape(count, -1)
