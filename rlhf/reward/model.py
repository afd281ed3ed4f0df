"""The reward: a model that reads an answer or a whole text, or any Python function. All are `score(tokens, lengths, mask)`.

A model has a trunk of its own or a frozen one with its own adapter (RewardModel), or is a linear head on a frozen one that
others read too (FrozenReward). Each may have several heads, whose scores are combined into one (Ensemble).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.packed import last_states, text_states
from model.transformer import Transformer
from rlhf.lm.frozen import FrozenStates
from rlhf.lm.language_model import to_columns, token_losses
from rlhf.lm.trunks import LoRA, adapted

Score = Callable[..., Tensor]  # (tokens (B, T), lengths (B,), mask (B, T) of the response[, rows (B,)]) -> (B,)


def response_starts(lengths: Tensor, mask: Tensor) -> Tensor:
    """Where the response of each row begins: (B,), (B, T) -> (B,). A row without response is all prompt."""
    return torch.where(mask.any(1), mask.int().argmax(1), lengths)


# What is pooled: the tokens from `first` up to `end`, of every row


def stretch(
    tokens: Tensor, lengths: Tensor, begins: Tensor | None, stop_ids: Iterable[int] | None
) -> tuple[Tensor, Tensor]:
    """Where what is read begins and ends: tokens (B, T), lengths (B,), begins (B,) of the answers -> (B,), (B,).

    begins None: the whole text. With stop_ids its first token, bos, is left out: its state is the same in every text, and
    many times larger than the others; and a final stop token, also of an answer: whether a response ended or was cut off
    then changes no score, and PPO cannot earn by either (train_ppo.py has eos_penalty for that). Where nothing would be
    left, it is read at its last token. ValueError for a whole text that holds nothing but bos.
    """
    end = lengths
    if stop_ids is not None:
        if begins is None and int(lengths.min()) < 2:
            raise ValueError("a text of one token has nothing after bos that could be scored")
        stops = torch.tensor(sorted(stop_ids), device=tokens.device)
        end = lengths - torch.isin(tokens.gather(1, lengths[:, None] - 1)[:, 0], stops).long()  # (B,)
    first = torch.full_like(lengths, int(stop_ids is not None)) if begins is None else begins
    first = torch.minimum(first, lengths - 1)
    return first, torch.maximum(end, first + 1)


def last_token(hidden: Tensor, end: Tensor, first: Tensor | int = 0) -> Tensor:
    """Hidden state of the last token: (B, T, D), (B,) -> (B, D). By length, never by the id of the padding."""
    return hidden[torch.arange(len(hidden), device=hidden.device), end - 1]


def tokens_between(hidden: Tensor, end: Tensor, first: Tensor | int = 0) -> Tensor:
    """True on the tokens from first up to end: (B, T, D), (B,) -> (B, T)."""
    t, first = torch.arange(hidden.shape[1], device=hidden.device), torch.as_tensor(first, device=hidden.device)
    return (t >= first.view(-1, 1)) & (t < end[:, None])


def mean_token(hidden: Tensor, end: Tensor, first: Tensor | int = 0) -> Tensor:
    """Mean hidden state of these tokens: (B, T, D), (B,) -> (B, D)."""
    read = tokens_between(hidden, end, first)
    return torch.where(read[..., None], hidden, 0).sum(1) / read.sum(1)[:, None]


class AttentionPooling(nn.Module):
    """Weighted mean of the tokens' hidden states, weights softmax_t(q h_t / sqrt(D)) with one learned query q (D,).

    q starts at zero: at first this is the mean.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor, end: Tensor, first: Tensor | int = 0) -> Tensor:
        """(B, T, D), (B,) -> (B, D)"""
        read = tokens_between(hidden, end, first)
        hidden = torch.where(read[..., None], hidden, 0)
        weights = torch.where(read, self.logits(hidden), -torch.inf).softmax(1)
        return (weights[..., None] * hidden).sum(1)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T)"""
        return (hidden * self.query).sum(-1) / hidden.shape[-1] ** 0.5


def running_mean(x: Tensor, first: Tensor, logits: Tensor | None = None) -> Tensor:
    """Mean of every stretch that begins at first: x (B, T, M) -> (B, T, M), column t of first to t; x as it is before first.

    Weighted by the exponentials of logits (B, T), -inf counts nothing; None weighs alike.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # sums of many, weights far apart
    logits = torch.zeros_like(x[..., 0]) if logits is None else logits
    t = torch.arange(x.shape[1], device=x.device)
    logits = torch.where(t >= first[:, None], logits, -torch.inf).to(wide)
    weights = (logits - logits.amax(1, keepdim=True).clamp(min=torch.finfo(wide).min)).exp()[..., None]  # (B, T, 1)
    sums, total = (weights * x.to(wide)).cumsum(1), weights.cumsum(1)
    return torch.where(total > 0, sums / torch.where(total > 0, total, 1), x.to(wide)).to(x.dtype)


POOLING = {"last": last_token, "mean": mean_token}
POOLINGS = (*POOLING, "attention")
READS = ("text", "answer")


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
    P(a beats b) = sigmoid((score_a - score_b) / temperature). reads: what the heads see the states of, the answer (behind
    its prompt) or the whole text.
    """

    def __init__(self, ensemble: Ensemble = ONE_HEAD, reads: str = "text"):
        super().__init__()
        self.ensemble, self.reads = ensemble, reads
        self.register_buffer("member_gain", torch.ones(ensemble.members))  # (M,); with one member 1, and bias 0:
        self.register_buffer("member_bias", torch.zeros(ensemble.members))  # there is nobody to be compared with
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))
        self.register_buffer("temperature", torch.ones(()))

    def score(self, tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Normalised score: tokens (B, T), lengths (B,), mask (B, T) of the response -> (B,)."""
        return self.combined(self(tokens, lengths, self.begins(lengths, mask)))

    def member_scores(self, tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """What every member says, on the scale of `score`, which is their mean or minimum where it is so combined. (B, M)"""
        return self.members_of(self(tokens, lengths, self.begins(lengths, mask)))

    def prefix_scores(self, tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """`score` of the text before each token of the response, from one pass of a causal trunk. (B, T), 0 elsewhere.

        Column t is the score of a text that ends at t - 1; 0, the mean of reference samples, where nothing is read yet: before
        an answer's first token, and behind a bos that is left out.
        """
        first, _ = self.read(tokens, lengths, self.begins(lengths, mask), self.stop_ids)
        t = torch.arange(tokens.shape[1], device=tokens.device)
        scores = self.combined(self.prefixes(tokens, lengths, first).flatten(0, 1)).view(tokens.shape)  # of 0 to t
        if self.stop_ids is not None:  # a final stop token is not read, but as all there is
            stops = torch.isin(tokens, torch.tensor(sorted(self.stop_ids), device=tokens.device)) & (t > first[:, None])
            scores = torch.where(stops, scores.roll(1, 1), scores)
        before = torch.cat((torch.zeros_like(scores[:, :1]), scores[:, :-1]), 1)
        return torch.where(mask & (t > first[:, None]), before, 0)

    def begins(self, lengths: Tensor, mask: Tensor) -> Tensor | None:
        """Where the answers begin, for a model that reads them alone."""
        return response_starts(lengths, mask) if self.reads == "answer" else None

    def read(self, tokens: Tensor, lengths: Tensor, begins: Tensor | None, stop_ids) -> tuple[Tensor, Tensor]:
        """`stretch` of what this model reads; ValueError for an answer of which nobody says where it begins."""
        if self.reads == "answer" and begins is None:
            raise ValueError("this reward model reads answers: say where they begin")
        return stretch(tokens, lengths, begins if self.reads == "answer" else None, stop_ids)

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
    scores = scores.cpu().double()
    mean, deviation = scores.mean(0), scores.std(0, unbiased=False)
    if not bool((deviation > 1e-6).all()):
        raise ValueError(f"the reward model gives all {len(scores)} reference samples the same score: it is untrained")
    gain.copy_((1 / deviation).to(gain.dtype))
    bias.copy_((-mean / deviation).to(bias.dtype))


class RewardModel(Normalised):
    """A trunk, a pooling and linear heads; of the trunk all is trained, or its adapter (see `adapted_trunk`).

    The heads start at N(0, 1/sqrt(width + 1)) (Ziegler et al. 2019, arXiv:1909.08593). What is pooled, and what `stop_ids`
    leave out of it: see `stretch`. `language`: keep what a language-modelling loss beside the reward loss needs.
    """

    def __init__(
        self,
        model: Transformer,
        pooling: str = "mean",
        generator: torch.Generator | None = None,
        ensemble: Ensemble = ONE_HEAD,
        stop_ids: Iterable[int] | None = None,
        language: bool = False,
        reads: str = "text",
    ):
        super().__init__(ensemble, reads)
        self.model = model
        if not language:
            self.model.lm_head = None  # predicts no tokens: an idle parameter would stall DDP
        self.pooling = pooling
        self.pool = AttentionPooling(model.config.width) if pooling == "attention" else POOLING[pooling]
        self.stop_ids = None if stop_ids is None else tuple(stop_ids)
        self.head = nn.Linear(model.config.width, ensemble.members)
        nn.init.normal_(self.head.weight, std=(model.config.width + 1) ** -0.5, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, tokens: Tensor, lengths: Tensor, begins: Tensor | None = None, language: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Raw scores of every text: tokens (B, T) right-padded, lengths (B,), begins (B,) of the answers -> (B, M).

        This is what training sees. language: also the mean negative log-likelihood of what is read, nats per token. (B,)
        """
        first, end = self.read(tokens, lengths, begins, self.stop_ids)
        if self.pooling == "last" and not language:
            pooled = last_states(self.model, tokens, end)  # (B, D)
        else:
            hidden = text_states(self.model, tokens, lengths)  # (B, T, D)
            pooled = self.pool(hidden, end, first)
        with torch.autocast(pooled.device.type, enabled=False):  # half precision would round the ranking away
            raw = self.head(pooled.to(self.head.weight.dtype))
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if not language:
            return raw
        mask = tokens_between(hidden, lengths, first)  # with the token that ends it
        mask[:, 0] = False
        loss = token_losses(self.model, hidden[:, :-1], tokens, mask)  # (N,)
        return raw, to_columns(loss, mask).sum(1) / mask.sum(1).clamp(min=1)

    def prefixes(self, tokens: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
        """Raw scores of the texts from first to every token: tokens (B, T), lengths, first (B,) -> (B, T, M)."""
        hidden = text_states(self.model, tokens, lengths).to(self.head.weight.dtype)  # (B, T, D)
        with torch.autocast(hidden.device.type, enabled=False):  # half precision would round the ranking away
            raw = self.head(hidden)  # (B, T, M): the head of a mean is the mean of heads
            if self.pooling == "last":
                return raw
            if self.pooling == "mean":
                return running_mean(raw, first)
            read = tokens_between(hidden, lengths, first)
            logits = self.pool.logits(torch.where(read[..., None], hidden, 0))
            return running_mean(raw, first, torch.where(read, logits, -torch.inf))


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

    def forward(self, tokens: Tensor, lengths: Tensor, begins: Tensor | None = None) -> Tensor:
        """tokens (B, T) right-padded, lengths (B,) -> (B, 1), wherever answers begin"""
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


Feature = tuple[int, str]  # depth and pooling: (15, "mean") is the mean of what the first 15 layers made of the text


def text_features(states: dict[int, Tensor], features: Iterable[Feature], first: Tensor, end: Tensor) -> Tensor:
    """Pooled hidden states from first to end: (B, T, D) per depth, (B,), (B,) -> (B, features, D). See `stretch`."""
    return torch.stack([POOLING[pooling](states[depth], end, first) for depth, pooling in features], 1)


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
        reads: str = "text",
    ):
        super().__init__(ensemble, reads)
        self.states, self.features, self.stop_ids = states, tuple(features), tuple(stop_ids)
        states.read(depth for depth, _ in self.features)
        self.head = nn.Linear(len(self.features) * states.model.config.width, ensemble.members)
        nn.init.zeros_(self.head.weight)  # until a fit or a checkpoint fills it
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, lengths: Tensor, begins: Tensor | None = None) -> Tensor:
        """Raw scores of every text: tokens (B, T) right-padded, lengths (B,), begins (B,) of the answers -> (B, M)."""
        first, end = self.read(tokens, lengths, begins, self.stop_ids)
        pooled = text_features(self.states(tokens), self.features, first, end)  # (B, F, D)
        # no matmul: under autocast that would round the scores to half precision
        return (pooled.flatten(1).to(self.head.weight.dtype)[:, None] * self.head.weight).sum(-1) + self.head.bias

    def prefixes(self, tokens: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
        """Raw scores of the texts from first to every token: tokens (B, T), lengths, first (B,) -> (B, T, M)."""
        states, weights = self.states(tokens), self.head.weight.chunk(len(self.features), 1)  # (M, D) of each feature
        raw = self.head.bias
        with torch.autocast(raw.device.type, enabled=False):  # half precision would round the ranking away
            for (depth, pooling), weight in zip(self.features, weights):  # the head of a mean is the mean of heads
                said = F.linear(states[depth].to(weight.dtype), weight)  # (B, T, M)
                raw = raw + (said if pooling == "last" else running_mean(said, first))
        return raw
