"""The policy with its value function and the reference that it is held near: who owns which weights, in four layouts.

    full      policy, a critic of its own, reference: separate models, as in the frameworks (the reward is the fourth)
    shared    the critic is a value head on the policy's trunk; the reference is a second model
    adapters  one frozen trunk; policy (and a separate critic) are adapters on it, the reference is the trunk without
              them (Santacroce et al. 2023, arXiv:2309.00754)
    branch    one frozen trunk; policy (and a separate critic) own copies of its top layers, the reference is the
              original top; what the frozen layers make of a rollout is computed once

The model that came in is never written to: its files may be mapped into memory, and the other roles read it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model.half import Half, half_copy, store_all
from model.lora import beside
from model.packed import saves, text_states
from model.panels import keep_panels, matrices_of
from model.transformer import Transformer
from rlhf.lm.frozen import FrozenStates
from rlhf.lm.language_model import to_columns, token_logprobs
from rlhf.lm.trunks import Copied, LoRA, adapted, branched, shared_copy

Reference = Callable[..., Tensor]  # (tokens (B, T), mask (B, T)[, features (B, T, D)]) -> logprobs (B, T)


@dataclass(frozen=True)
class PolicyOutput:
    """What one forward says about every token; all (B, T), zero outside the mask."""

    logprobs: Tensor  # log pi(token t | tokens before t), at the sampling temperature
    entropy: Tensor  # of the distribution that token t was drawn from, nats
    values: Tensor  # V of the state before token t is chosen


class ActorCritic(nn.Module):
    """A policy with a value head on its own trunk (`shared`), on a copy of it (`separate`), or with none.

    The value head starts at zero (Ziegler et al. 2019, arXiv:1909.08593), so the first advantages are the plain
    returns. `forward` is what DDP hooks into; acting goes through `self.model` directly. The layers below `depth` are
    frozen and the critic's too: features (B, T, D) are what they made of the tokens. `another` makes the trunk of a
    separate critic from the policy's; `on_one_trunk` says that both are adapters on the same frozen one.
    """

    def __init__(
        self,
        model: Transformer,
        critic: str = "shared",
        temperature: float = 1.0,
        depth: int = 0,
        another: Callable[[Transformer], Transformer] = copy.deepcopy,
        on_one_trunk: bool = False,
    ):
        super().__init__()
        self.model = model
        self.on_one_trunk = on_one_trunk
        self.temperature = temperature
        self.depth = depth
        self.value_trunk = another(model) if critic == "separate" else None
        if self.value_trunk is not None and not model.config.tied:
            self.value_trunk.lm_head = None  # the critic predicts no tokens: an idle parameter would stall DDP
        self.value_head = None
        if critic != "none":
            weight = model.norm.weight  # for its device
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.value_head = nn.Linear(model.config.width, 1, device=weight.device, dtype=dtype)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(self, tokens: Tensor, mask: Tensor, features: Tensor | None = None) -> PolicyOutput:
        """tokens (B, T) int64, mask (B, T) bool, features (B, T, D or 0) or None -> PolicyOutput of (B, T) each."""
        hidden, for_values = self.hidden_states(tokens, mask, features)  # (B, T-1, D)
        logprobs, entropy = token_logprobs(self.model, hidden, tokens, mask, self.temperature)
        if self.value_head is None:
            return PolicyOutput(logprobs, entropy, torch.zeros_like(logprobs))
        with torch.autocast(hidden.device.type, enabled=False):  # half precision would round what is added up
            values = self.value_head(for_values[mask[:, 1:]].to(self.value_head.weight.dtype)).squeeze(-1)  # (N,)
        return PolicyOutput(logprobs, entropy, to_columns(values.to(logprobs.dtype), mask))

    def hidden_states(self, tokens: Tensor, mask: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the log-probs and the values are read from, (B, T-1, D) each, see `hidden_states`.

        Two adapters on one trunk take one pass, which reads every frozen matrix once, where each row stands alone and the
        adapters lie whole on this rank; not where blocks are computed again, which comes after the pass.
        """
        trunk, inputs = self.value_trunk, tokens[:, :-1]
        apart = trunk is None or not self.on_one_trunk or self.model.recompute
        if apart or saves(inputs, read_lengths(mask)) or any(hasattr(x, "device_mesh") for x in trunk.parameters()):
            hidden = hidden_states(self.model, tokens, mask, features, self.depth)
            return hidden, hidden if trunk is None else hidden_states(trunk, tokens, mask, features, self.depth)
        with beside(self.model, trunk):
            return self.model.trunk(torch.cat((inputs, inputs))).chunk(2)


def hidden_states(
    model: Transformer, tokens: Tensor, mask: Tensor, features: Tensor | None = None, depth: int = 0
) -> Tensor:
    """The trunk's output for the tokens before masked ones, (B, T), (B, T) -> (B, T-1, D); elsewhere anything.

    features (B, T, D): the states before layer `depth`, where the work of the layers below is already done; None or
    D = 0: nothing is. Nobody reads what stands behind the last masked token of a row: where that saves enough, rows stand
    one after the other without it, which depends on tokens and mask alone, see model/packed.py.
    """
    inputs, states = tokens[:, :-1], None
    if features is not None and features.shape[-1]:
        states = features[:, :-1]
    depth = 0 if states is None else depth
    lengths = read_lengths(mask)
    if depth < model.config.layers and saves(inputs, lengths):
        return text_states(model, inputs, lengths, states, depth)
    if states is None:
        return model.trunk(inputs)
    return model.norm(model.blocks(states, model.span(inputs), depth))


def read_lengths(mask: Tensor) -> Tensor:
    """(B,) how many of a row's inputs, the tokens before the last, somebody reads. mask (B, T)"""
    return 1 + (torch.arange(mask.shape[1] - 1, device=mask.device) * mask[:, 1:]).amax(1)


def no_features(tokens: Tensor, lengths: Tensor | None = None, known: dict[int, Tensor] | None = None) -> Tensor:
    """What layouts without shared frozen layers keep of a rollout: (B, T) -> (B, T, 0)."""
    return torch.zeros(*tokens.shape, 0, device=tokens.device)


def logprobs_of(model: Transformer, temperature: float = 1.0, depth: int = 0) -> Reference:
    """`model` as a `Reference`, without gradients; it is not copied."""

    @torch.no_grad()
    def logprobs(tokens: Tensor, mask: Tensor, features: Tensor | None = None) -> Tensor:
        hidden = hidden_states(model, tokens, mask, features, depth)
        return token_logprobs(model, hidden, tokens, mask, temperature)[0]

    return logprobs


# The layouts


@dataclass(frozen=True)
class Roles:
    """Who plays what; the loop asks for no more."""

    policy: ActorCritic
    reference: Reference
    frozen: FrozenStates  # the trunk that came in, for a reward model that reads it too
    features: Callable[..., Tensor] = no_features  # tokens (B, T)[, as FrozenStates] -> (B, T, D) to keep for learning
    half: Half | None = None  # the policy in half precision, see `stored_in`

    def sampler(self) -> Transformer:
        """The policy as it is now, to sample with."""
        return self.half.refresh() if self.half else self.policy.model

    def seen(self) -> list[int]:
        """Above so many layers whoever samples sees states that the judges read: where it is the frozen trunk that he runs."""
        if self.features is no_features:
            return []
        return sorted(depth for depth in self.frozen.depths if depth <= self.policy.depth)

    def rest(self) -> None:
        """Nobody samples until `sampler` is asked again: the copy in half precision, or panels, give their memory back."""
        if asleep := self.half or getattr(self.policy.model, "panels", None):
            asleep.sleep()

    def stored_in(self, dtype: torch.dtype, sampler: bool = True, alone: bool = True) -> "Roles":
        """The same with frozen weights stored in `dtype`, in place, and a copy in it that samples. float32: as it is, and a
        policy of which every matrix trains samples with panels, which are as large as the gradients that nobody has then.

        sampler: without it there is neither, because somebody else samples. alone: no other rank learns too; with others
        gradients never go (DDP keeps them in its buckets), or weights come and go (shards), and there are no panels.
        """
        self.store(dtype)  # which frees memory that the copy takes
        model, half = self.policy.model, None
        if sampler and dtype != torch.float32:
            half = half_copy(model, dtype)
        elif sampler and alone and trains(model):
            keep_panels(model, trains=True)
        return replace(self, half=half)

    def store(self, dtype: torch.dtype) -> None:
        """Frozen weights in `dtype` from here on."""
        store_all(filter(None, (self.policy.model, self.policy.value_trunk, self.frozen.model)), dtype)


def trains(model: Transformer) -> bool:
    """Every matrix of it?"""
    return all(x.weight.requires_grad for x in matrices_of(model))


def reference_on(base: Transformer, temperature: float) -> tuple[Reference, FrozenStates]:
    """The base as the reference, and as the trunk that a reward model reads: in one pass, where there is such a one."""
    top = base.config.layers
    frozen, alone, above = FrozenStates(base, beside=[top]), *(logprobs_of(base, temperature, n) for n in (0, top))

    def reference(tokens: Tensor, mask: Tensor, features: Tensor | None = None) -> Tensor:
        return above(tokens, mask, frozen(tokens)[top]) if frozen.depths else alone(tokens, mask)

    return reference, frozen


def models(
    base: Transformer, critic: str, temperature: float, lora: LoRA, branch_layers: int, copied: Copied = torch.clone
) -> Roles:
    """full and shared, which differ in the critic alone: the policy is a copy, the base itself is the reference."""

    def another(_=None) -> Transformer:
        return shared_copy(base, base.parameters(), copied)

    policy = ActorCritic(another(), critic, temperature, another=another)
    return Roles(policy, *reference_on(base, temperature))


def adapters(
    base: Transformer, critic: str, temperature: float, lora: LoRA, branch_layers: int, copied: Copied = torch.clone
) -> Roles:
    def another(_) -> Transformer:
        return adapted(base, "critic", lora)

    policy = ActorCritic(adapted(base, "policy", lora), critic, temperature, another=another, on_one_trunk=True)
    return Roles(policy, *reference_on(base, temperature))  # the trunk without adapters


def branch(
    base: Transformer, critic: str, temperature: float, lora: LoRA, branch_layers: int, copied: Copied = torch.clone
) -> Roles:
    def another(_=None) -> Transformer:
        return branched(base, branch_layers, copied)

    depth = base.config.layers - branch_layers
    policy = ActorCritic(another(), critic, temperature, depth, another)
    frozen = FrozenStates(base).read([depth])

    def features(tokens: Tensor, lengths: Tensor | None = None, known: dict[int, Tensor] | None = None) -> Tensor:
        return frozen(tokens, lengths, known)[depth]

    return Roles(policy, logprobs_of(base, temperature, depth), frozen, features)


LAYOUTS = {"full": models, "shared": models, "adapters": adapters, "branch": branch}
# where nobody chose; an adapter of its own lets the policy gain more per nat than the value head on the policy's (LOG.md)
CRITICS = {"full": "separate", "shared": "shared", "adapters": "separate", "branch": "shared"}


# A tuned model from its base and a checkpoint
