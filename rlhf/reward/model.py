"""The reward: a model that reads a whole text, or any Python function that does. All are `score(tokens, lengths, mask)`.

A model has a trunk of its own or a frozen one with its own adapter (RewardModel), or is a linear head on a frozen one that
others read too (FrozenReward). Each may have several heads, whose scores are combined into one (Ensemble).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.packed import last_states, text_states
from model.transformer import Transformer
from rlhf.lm.frozen import FrozenStates
from rlhf.lm.language_model import predictions, to_columns
from rlhf.lm.trunks import LoRA, adapted
from rlhf.losses import next_token_loss

Score = Callable[..., Tensor]  # (tokens (B, T), lengths (B,), mask (B, T) of the response[, rows (B,)]) -> (B,)


def last_token(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Hidden state of the last real token: (B, T, D), (B,) -> (B, D). By length, never by the id of the padding."""
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


def real_tokens(hidden: Tensor, lengths: Tensor) -> Tensor:
    """True on real tokens: (B, T, D), (B,) -> (B, T)."""
    return torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]


def mean_token(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Mean hidden state of the real tokens: (B, T, D), (B,) -> (B, D)."""
    return torch.where(real_tokens(hidden, lengths)[..., None], hidden, 0).sum(1) / lengths[:, None]


class AttentionPooling(nn.Module):
    """Weighted mean of the real tokens' hidden states, weights softmax_t(q h_t / sqrt(D)) with one learned query q (D,).

    q starts at zero: at first this is the mean.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D), (B,) -> (B, D)"""
        real = real_tokens(hidden, lengths)
        hidden = torch.where(real[..., None], hidden, 0)
        logits = (hidden * self.query).sum(-1) / hidden.shape[-1] ** 0.5  # (B, T)
        weights = torch.where(real, logits, -torch.inf).softmax(1)
        return (weights[..., None] * hidden).sum(1)


POOLING = {"last": last_token, "mean": mean_token}
POOLINGS = (*POOLING, "attention")


# Several heads, one score


COMBINE = {  # (B, M) -> (B,)
    "mean": lambda members, coef: members.mean(-1),
    "min": lambda members, coef: members.amin(-1),
    "uncertainty": lambda members, coef: members.mean(-1) - coef * members.var(-1, unbiased=False),
}


@dataclass(frozen=True)
class Ensemble:
    """How many heads there are and how their scores become one (Coste et al. 2023, arXiv:2310.02743, section 3).

    mean: mean_m s_m;  min: worst case, min_m s_m;  uncertainty: mean_m s_m - coef var_m s_m, the population variance.
    """

    members: int = 1
    combine: str = "mean"
    uncertainty_coef: float = 0.5


ONE_HEAD = Ensemble()


class Normalised(nn.Module):
    """A reward model: `forward` gives the raw scores of its M heads (B, M), `score` one number per text.

    Every member is put at mean 0 and deviation 1 on reference samples, so that their scores can be compared; they are
    combined; and gain and bias put the combination there too. All of it is stored, and so is `temperature`:
    P(a beats b) = sigmoid((score_a - score_b) / temperature).
    """

    def __init__(self, ensemble: Ensemble = ONE_HEAD):
        super().__init__()
        self.ensemble = ensemble
        self.register_buffer("member_gain", torch.ones(ensemble.members))  # (M,); with one member 1, and bias 0:
        self.register_buffer("member_bias", torch.zeros(ensemble.members))  # there is nobody to be compared with
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))
        self.register_buffer("temperature", torch.ones(()))

    def score(self, tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Normalised score: tokens (B, T), lengths (B,), mask (B, T) of the response -> (B,)."""
        return self.combined(self(tokens, lengths))

    def member_scores(self, tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """What every member says, on the scale of `score`, which is their mean or minimum where it is so combined. (B, M)"""
        return self.members_of(self(tokens, lengths))

    def members_of(self, raw: Tensor) -> Tensor:
        """`member_scores` of raw scores: (N, M) -> (N, M)."""
        return (raw * self.member_gain + self.member_bias) * self.gain + self.bias

    def combined(self, raw: Tensor) -> Tensor:
        """`score` of raw scores: (N, M) -> (N,)."""
        members = raw * self.member_gain + self.member_bias
        return COMBINE[self.ensemble.combine](members, self.ensemble.uncertainty_coef) * self.gain + self.bias

    def normalise(self, raw: Tensor) -> None:
        """Fix gains and biases so that the scores of reference samples, raw (N, M), get mean 0 and deviation 1."""
        if self.ensemble.members > 1:
            to_standard(raw, self.member_gain, self.member_bias)
        self.gain.fill_(1.0)
        self.bias.fill_(0.0)
        to_standard(self.combined(raw), self.gain, self.bias)


def to_standard(scores: Tensor, gain: Tensor, bias: Tensor) -> None:
    """Fill gain and bias (...) so that scores (N, ...) * gain + bias has mean 0 and deviation 1 over N."""
    scores = scores.double()
    mean, deviation = scores.mean(0), scores.std(0, unbiased=False)
    if not bool((deviation > 1e-6).all()):
        raise ValueError(f"the reward model gives all {len(scores)} reference samples the same score: it is untrained")
    gain.copy_(1 / deviation)
    bias.copy_(-mean / deviation)


class RewardModel(Normalised):
    """A trunk, a pooling and linear heads; of the trunk all is trained, or its adapter (see `adapted_trunk`).

    The heads start at N(0, 1/sqrt(width + 1)) (Ziegler et al. 2019, arXiv:1909.08593). With `stop_ids` the pooling reads
    the text alone, see `text_lengths`. `language`: keep what a language-modelling loss beside the reward loss needs.
    """

    def __init__(
        self,
        model: Transformer,
        pooling: str = "mean",
        generator: torch.Generator | None = None,
        ensemble: Ensemble = ONE_HEAD,
        stop_ids: Iterable[int] | None = None,
        language: bool = False,
    ):
        super().__init__(ensemble)
        self.model = model
        if not language:
            self.model.lm_head = None  # predicts no tokens: an idle parameter would stall DDP
        self.pooling = pooling
        self.pool = AttentionPooling(model.config.width) if pooling == "attention" else POOLING[pooling]
        self.stop_ids = None if stop_ids is None else tuple(stop_ids)
        self.head = nn.Linear(model.config.width, ensemble.members)
        nn.init.normal_(self.head.weight, std=(model.config.width + 1) ** -0.5, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, lengths: Tensor, language: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Raw scores of every text: tokens (B, T) right-padded, lengths (B,) -> (B, M). This is what training sees.

        language: also the mean negative log-likelihood of each text's tokens, nats per token. (B,)
        """
        text = None if self.stop_ids is None else text_lengths(tokens, lengths, self.stop_ids)
        if self.pooling == "last" and not language:
            pooled = last_states(self.model, tokens, lengths if text is None else 1 + text)  # (B, D)
        else:
            hidden = text_states(self.model, tokens, lengths)  # (B, T, D)
            pooled = self.pool(hidden, lengths) if text is None else self.pool(hidden[:, 1:], text)
        with torch.autocast(pooled.device.type, enabled=False):  # half precision would round the ranking away
            raw = self.head(pooled.to(self.head.weight.dtype))
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if not language:
            return raw
        mask = real_tokens(hidden, lengths)
        mask[:, 0] = False
        loss = next_token_loss(*predictions(self.model, hidden[:, :-1], tokens, mask))  # (N,)
        return raw, to_columns(loss, mask).sum(1) / (lengths - 1).clamp(min=1)


class Classifier(RewardModel):
    """HF's sequence classifier of one label: score . h + bias at the last token that is not pad_id, as its class reads it.

    ours: export.py wrote it, so it knows texts with their start and end; the bias is then what its head lacks, else 0.
    """

    def __init__(self, model: Transformer, score: Tensor, bias: float, pad_id: int | None, ours: bool):
        super().__init__(model, "last")
        self.pad_id, self.ours = pad_id, ours
        with torch.no_grad():
            self.head.weight.copy_(score)
            self.head.bias.fill_(bias)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B, T) right-padded, lengths (B,) -> (B, 1)"""
        if self.pad_id is not None:
            places = torch.arange(tokens.shape[1], device=tokens.device)
            read = (tokens != self.pad_id) & (places < lengths[:, None])
            lengths = 1 + torch.where(read, places, 0).amax(1)
        return super().forward(tokens, lengths)


def adapted_trunk(base: Transformer, lora: LoRA, depth: int | None = None) -> Transformer:
    """The frozen base with a new adapter; depth: it ends above so many layers, where FrozenStates reads, without the norm."""
    model = adapted(base, "reward", lora)
    if depth is not None:
        model.layers, model.norm = model.layers[:depth], nn.Identity()
    return model


# A head on a frozen trunk


def text_lengths(tokens: Tensor, lengths: Tensor, stop_ids: Iterable[int]) -> Tensor:
    """How many tokens after the first are text: tokens (B, T), lengths (B,) -> (B,).

    The first token, bos, is left out: its state is the same in every text, and many times larger than the others. So is
    a final stop token: whether a response ended or was cut off then changes no score, and PPO cannot earn by either
    (train_ppo.py has eos_penalty for that). ValueError for a row that holds nothing but bos.
    """
    if int(lengths.min()) < 2:
        raise ValueError("a text of one token has nothing after bos that could be scored")
    stops = torch.tensor(sorted(stop_ids), device=tokens.device)
    ended = torch.isin(last_token(tokens, lengths), stops)  # (B,)
    return (lengths - 1 - ended.long()).clamp(min=1)  # an empty text is read at its stop token


Feature = tuple[int, str]  # depth and pooling: (15, "mean") is the mean of what the first 15 layers made of the text


def text_features(
    states: dict[int, Tensor], features: Iterable[Feature], tokens: Tensor, lengths: Tensor, stop_ids: Iterable[int]
) -> Tensor:
    """Pooled hidden states of the text alone: (B, T, D) per depth, tokens (B, T), lengths (B,) -> (B, features, D).

    See `text_lengths` for what belongs to the text.
    """
    text = text_lengths(tokens, lengths, stop_ids)
    return torch.stack([POOLING[pooling](states[depth][:, 1:], text) for depth, pooling in features], 1)


class FrozenReward(Normalised):
    """A linear head on pooled hidden states of a frozen trunk; the trunk is not part of the module, nor of its checkpoint.

    `states` may have other readers: policy and reference of the same rows share its forward pass.
    """

    def __init__(
        self,
        states: FrozenStates,
        features: Sequence[Feature],
        stop_ids: Iterable[int],
        ensemble: Ensemble = ONE_HEAD,
    ):
        super().__init__(ensemble)
        self.states, self.features, self.stop_ids = states, tuple(features), tuple(stop_ids)
        states.read(depth for depth, _ in self.features)
        self.head = nn.Linear(len(self.features) * states.model.config.width, ensemble.members)
        nn.init.zeros_(self.head.weight)  # until a fit or a checkpoint fills it
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Raw scores of every text, standardised ratings: tokens (B, T) right-padded, lengths (B,) -> (B, M)."""
        pooled = text_features(self.states(tokens), self.features, tokens, lengths, self.stop_ids)  # (B, F, D)
        # no matmul: under autocast that would round the scores to half precision
        return (pooled.flatten(1).to(self.head.weight.dtype)[:, None] * self.head.weight).sum(-1) + self.head.bias


# Files
