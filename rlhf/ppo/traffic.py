"""What the ranks of train_ppo.py send each other in an iteration, call by call, before anything runs.

The models are built without memory (torch's meta device), and the calls of the loop are written down one by one: the same
collectives with the same bytes that rlhf/infra/collectives.py counts in a float32 run whose reward is a function.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed
from torch import nn

from model.config import ModelConfig
from model.hf import NoInit, empty_model
from model.panels import output_of
from rlhf.infra.shards import layers, owners
from rlhf.lm.trunks import LoRA
from rlhf.ppo.roles import CRITICS, LAYOUTS, Roles

FLOAT, LONG = 4, 8  # bytes
BUCKETS = (torch.distributed._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20)  # of DDP: the first, and all others
PURPOSES = ("sample", "rollout", "judge", "learn", "gradients", "numbers")


class Call(NamedTuple):
    """A collective: why, which, the bytes of all ranks together (or of the sum), and how many ranks take part."""

    purpose: str
    kind: str
    bytes: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that leave a rank in a ring."""
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class Plan:
    """A run of train_ppo.py, on all ranks."""

    model: ModelConfig
    layout: str
    ranks: int
    rows: int  # responses on a rank
    micro_batch: int
    minibatches: int
    epochs: int
    tokens: int  # columns of a rollout
    critic: str | None = None  # None: as the layout has it
    parts: int = 0  # numbers that the reward says beside its score
    lora: LoRA = LoRA()
    branch_layers: int = 4
    recompute: bool = False
    shards: int = 1  # ranks over which a copy of the weights is cut; 1: DDP

    @property
    def roles(self) -> Roles:
        critic = self.critic or CRITICS[self.layout]
        with NoInit():
            return LAYOUTS[self.layout](empty_model(self.model), critic, 1.0, self.lora, self.branch_layers)


def calls(p: Plan) -> Counter:
    """The collectives of an iteration after the first, as {Call: how often}, without checkpoints."""
    if p.ranks == 1:
        return Counter()
    found, roles = Counter(numbers(p)), p.roles
    found.update(rollout(p))
    found.update(features(p))
    if p.shards > 1:
        found.update(sharded(p, roles))
    else:
        trained = [x for x in roles.policy.parameters() if x.requires_grad]
        for _ in range(p.epochs * p.minibatches):
            found.update(Call("gradients", "all-reduce", size, p.ranks) for size in buckets(trained))
    return found


def numbers(p: Plan) -> Iterator[Call]:
    """Of every update its tokens and what is logged (7 means); and once, whether a signal came to some rank."""
    for _ in range(p.epochs * p.minibatches):
        yield Call("numbers", "all-reduce", LONG, p.ranks)
        yield Call("numbers", "all-reduce", 7 * FLOAT, p.ranks)
    yield Call("numbers", "all-reduce", LONG, p.ranks)


def rollout(p: Plan) -> Iterator[Call]:
    """rollout.gather: every field of every row, to all ranks."""
    rows = p.ranks * p.rows
    per_row = [LONG, 1, FLOAT] + [FLOAT * p.parts] * (p.parts > 0)  # length, finished, score, parts
    per_token = [LONG, 1] + 6 * [FLOAT]  # id, mask; log-probs (policy, reference, sampler), entropy, value, its base
    for size in per_row + [p.tokens * x for x in per_token]:
        yield Call("rollout", "all-gather", rows * size, p.ranks)


def features(p: Plan) -> Iterator[Call]:
    """rollout.share: what the frozen layers made of a row, for whoever learns from it in a later epoch."""
    size = p.rows // p.minibatches * p.tokens * FLOAT * p.model.width
    for _ in range((p.epochs - 1) * p.minibatches * (p.layout == "branch")):
        yield Call("rollout", "all-to-all", size, p.ranks)


def buckets(trained: list[nn.Parameter]) -> list[int]:
    """Bytes of the parts in which DDP sends a gradient; in the order of the backward pass, roughly."""
    tensors = trained[::-1]
    parts, _ = torch.distributed._compute_bucket_assignment_by_size(tensors, [*BUCKETS], [False] * len(tensors))
    return [sum(FLOAT * tensors[i].numel() for i in part) for part in parts]


def sharded(p: Plan, roles: Roles) -> Iterator[Call]:
    """What FSDP gathers and reduces, and our units of frozen matrices."""
    trunks = [x for x in (roles.policy.model, roles.policy.value_trunk) if x is not None]
    whole = Parts(p, roles)
    forwards = p.rows // p.micro_batch
    gathered = [("sample", 1, whole.to_sample()), ("judge", forwards, whole.to_judge(trunks))]
    gathered += [("learn", p.epochs * forwards, whole.to_learn(trunks))]
    for purpose, times, sizes in gathered:
        for size in times * [*sizes]:
            yield Call(purpose, "all-gather", size, p.shards)
    groups = [*whole.outer, *(x for trunk in trunks for x in whole.layers_of(trunk))]
    for size in p.epochs * forwards * groups:
        yield Call("gradients", "reduce-scatter", size, p.shards)
    replicas, steps = p.ranks // p.shards, p.epochs * p.minibatches
    for size in steps * groups if replicas > 1 else ():
        yield Call("gradients", "all-reduce", size // p.shards, replicas)
    norms = FLOAT * sum(x.requires_grad for x in roles.policy.parameters())
    for _ in range(steps):
        yield Call("numbers", "all-reduce", norms, p.shards)


class Parts:
    """What is gathered together: trained parameters by FSDP, a layer at a time and what is left; frozen matrices by units."""

    def __init__(self, p: Plan, roles: Roles):
        self.p, self.roles = p, roles
        inside = {id(x) for part in layers(roles.policy) for x in part.parameters()}
        outside = self.trained(x for x in roles.policy.parameters() if id(x) not in inside)
        self.outer = [outside] if outside else []

    def trained(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of those that train: every rank has as many rows of each, the last ones padded."""
        n = self.p.shards
        return sum(FLOAT * n * -(-len(x) // n) * x[:1].numel() for x in parameters if x.requires_grad)

    def layers_of(self, trunk: nn.Module) -> list[int]:
        return [size for layer in trunk.layers if (size := self.trained(layer.parameters()))]

    def frozen(self, part: nn.Module | None) -> list[int]:
        """Bytes of a part's unit, if it has frozen matrices."""
        mine = [] if part is None else [x for x in part.parameters() if not x.requires_grad and x.dim() > 1]
        n = self.p.shards
        return [FLOAT * n * -(-sum(x.numel() for x in mine) // n)] if mine else []

    def embedding(self, trunk: nn.Module) -> list[int]:
        return self.frozen(trunk.embed_tokens)

    def output(self, trunk: nn.Module) -> list[int]:
        return self.frozen(output_of(trunk))

    def units(self, trunk: nn.Module, first: int = 0, last: int | None = None) -> list[int]:
        """Of the frozen matrices in these layers."""
        return [size for layer in trunk.layers[first:last] for size in self.frozen(layer)]

    def to_sample(self) -> list[int]:
        """All weights of the policy's trunk, and with it whatever is outside of layers."""
        trunk = self.roles.policy.model
        frozen = [size for part in owners(trunk) for size in self.frozen(part)] + self.units(trunk)
        return frozen + self.outer + self.layers_of(trunk)

    def to_judge(self, trunks: list[nn.Module]) -> list[int]:
        """Of a micro-batch: the policy (and its critic's trunk), and the reference; of a branch above the frozen layers."""
        base, depth, found = self.roles.frozen.model, self.roles.policy.depth, self.outer + self.output(trunks[0])
        for trunk in trunks:
            found += self.layers_of(trunk) + self.units(trunk, depth)
        for model in (*trunks, base) if self.p.layout != "branch" else ():
            found += self.embedding(model)
        return found + self.units(base, depth) + self.output(base)

    def to_learn(self, trunks: list[nn.Module]) -> list[int]:
        """Of a micro-batch: layers for the forward and again for the backward pass, what is outside of them once."""
        depth, layout = self.roles.policy.depth, self.p.layout
        found = self.outer + (3 if self.p.recompute else 2) * self.output(trunks[0])
        for trunk in trunks:
            found += 2 * self.layers_of(trunk) + 2 * self.units(trunk, depth)
            found += self.embedding(trunk) if layout != "branch" else []
        # the first layer stays until the end of the backward pass, and the critic's is the policy's
        for size in self.units(trunks[0], depth)[:1] * (len(trunks) - 1):
            found.remove(size)
        return found
