"""The reward: a model that reads a whole text, or any Python function that does. All are `score(tokens, lengths, mask)`.

A model has a trunk of its own (RewardModel), or a linear head on a frozen one that others read too (FrozenReward).
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.transformer import Transformer
from rlhf.frozen import FrozenStates
from rlhf.infra import checkpoint
from rlhf.language_model import new_transformer

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def last_token(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Hidden state of the last real token: (B, T, D), (B,) -> (B, D). By length, never by the id of the padding."""
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


def mean_token(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Mean hidden state of the real tokens: (B, T, D), (B,) -> (B, D)."""
    real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # (B, T)
    return torch.where(real[..., None], hidden, 0).sum(1) / lengths[:, None]


POOLING = {"last": last_token, "mean": mean_token}


class Normalised(nn.Module):
    """A reward model whose `score` adds to `forward` the fixed gain and bias that put reference samples at 0 +- 1."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    def score(self, tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Normalised score: tokens (B, T), lengths (B,), mask (B, T) of the response -> (B,)."""
        return self(tokens, lengths) * self.gain + self.bias

    def normalise(self, scores: Tensor) -> None:
        """Fix gain and bias so that `scores` (N,), raw scores of reference samples, get mean 0 and deviation 1."""
        deviation = float(scores.double().std(unbiased=False))
        if not deviation > 1e-6:
            raise ValueError(
                f"the reward model gives all {len(scores)} reference samples the same score: it is untrained"
            )
        self.gain.fill_(1 / deviation)
        self.bias.fill_(-float(scores.double().mean()) / deviation)


class RewardModel(Normalised):
    """A trunk of its own, a pooling and a linear head.

    The head starts at N(0, 1/sqrt(width + 1)) (Ziegler et al. 2019, arXiv:1909.08593).
    """

    def __init__(self, model: Transformer, pooling: str = "mean", generator: torch.Generator | None = None):
        super().__init__()
        self.model = model
        self.model.lm_head = None  # predicts no tokens: an idle parameter would stall DDP
        self.pooling = pooling
        self.head = nn.Linear(model.config.width, 1)
        nn.init.normal_(self.head.weight, std=(model.config.width + 1) ** -0.5, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Raw score of every text: tokens (B, T) right-padded, lengths (B,) -> (B,). This is what training sees."""
        hidden = self.model.trunk(tokens)  # (B, T, D)
        score = self.head(POOLING[self.pooling](hidden, lengths)).squeeze(-1)
        return score.to(torch.promote_types(score.dtype, torch.float32))  # half precision would round the ranking away


# A head on a frozen trunk

Feature = tuple[int, str]  # depth and pooling: (15, "mean") is the mean of what the first 15 layers made of the text


def text_features(
    states: dict[int, Tensor], features: Iterable[Feature], tokens: Tensor, lengths: Tensor, stop_ids: Iterable[int]
) -> Tensor:
    """Pooled hidden states of the text alone: (B, T, D) per depth, tokens (B, T), lengths (B,) -> (B, features, D).

    The first token, bos, is left out: its state is the same in every text, and many times larger than the others. So is
    a final stop token: whether a response ended or was cut off then changes no score, and PPO cannot earn by either
    (train_ppo.py has eos_penalty for that). ValueError for a row that holds nothing but bos.
    """
    if int(lengths.min()) < 2:
        raise ValueError("a text of one token has nothing after bos that could be scored")
    stops = torch.tensor(sorted(stop_ids), device=tokens.device)
    ended = torch.isin(last_token(tokens, lengths), stops)  # (B,)
    text = (lengths - 1 - ended.long()).clamp(min=1)  # (B,) tokens of the text; an empty one is read at its stop token
    return torch.stack([POOLING[pooling](states[depth][:, 1:], text) for depth, pooling in features], 1)


class FrozenReward(Normalised):
    """A linear head on pooled hidden states of a frozen trunk; the trunk is not part of the module, nor of its checkpoint.

    `states` may have other readers: policy and reference of the same rows share its forward pass.
    """

    def __init__(self, states: FrozenStates, features: Sequence[Feature], stop_ids: Iterable[int]):
        super().__init__()
        self.states, self.features, self.stop_ids = states, tuple(features), tuple(stop_ids)
        states.read(depth for depth, _ in self.features)
        self.head = nn.Linear(len(self.features) * states.model.config.width, 1)
        nn.init.zeros_(self.head.weight)  # until a fit or a checkpoint fills it
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Raw score of every text, a standardised rating: tokens (B, T) right-padded, lengths (B,) -> (B,)."""
        pooled = text_features(self.states(tokens), self.features, tokens, lengths, self.stop_ids)  # (B, F, D)
        # no matmul: under autocast that would round the scores to half precision
        return (pooled.flatten(1).to(self.head.weight.dtype) * self.head.weight[0]).sum(1) + self.head.bias


def ridge(gram: Tensor, moment: Tensor, penalty: float) -> Tensor:
    """Ridge regression (Hoerl & Kennard 1970): the w that minimises |X w - y|^2 / N + penalty |w|^2.

    (X'X / N + penalty I) w = X'y / N.   gram = X'X / N (P, P), moment = X'y / N (P,), penalty > 0 -> (P,)
    """
    factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return torch.cholesky_solve(moment[:, None], factor)[:, 0]


@dataclass(frozen=True)
class Fit:
    """A head and how well it does on sentences that it was not fitted to."""

    features: tuple[Feature, ...]
    penalty: float
    weight: Tensor  # (F D,) float64, of the plain features
    constant: float
    predictions: Tensor  # (V,) of the validation sentences, standardised ratings
    error: float  # their mean squared error; always to predict the mean costs about 1


def fit_heads(
    features: Sequence[Feature], train: Tensor, ratings: Tensor, validation: Tensor, truth: Tensor, penalties, most=2
) -> list[Fit]:
    """The best penalty, by validation error, for every set of at most `most` of the features; the best set first.

    train (N, F, D) and ratings (N,) decide the heads, validation (V, F, D) and truth (V,) only which of them is taken.
    Features and ratings are standardised by the N training sentences; all in float64.
    """
    F, D = train.shape[1:]
    flat = train.flatten(1).double()  # (N, F D)
    center, deviation = flat.mean(0), flat.std(0, unbiased=False).clamp(min=1e-6)
    x = (flat - center) / deviation
    unseen = (validation.flatten(1).double() - center) / deviation  # (V, F D)
    mean, spread = ratings.double().mean(), ratings.double().std(unbiased=False)
    y, target = (ratings.double() - mean) / spread, (truth.double() - mean) / spread
    gram, moment = x.T @ x / len(x), x.T @ y / len(x)  # of all features, once

    fits = []
    for chosen in (s for size in range(1, most + 1) for s in itertools.combinations(range(F), size)):
        columns = torch.cat([torch.arange(f * D, (f + 1) * D) for f in chosen])
        tried = []
        for penalty in penalties:
            w = ridge(gram[columns][:, columns], moment[columns], penalty)
            predictions = unseen[:, columns] @ w
            weight = w / deviation[columns]
            error = float(((predictions - target) ** 2).mean())
            constant = -float(weight @ center[columns])
            tried.append(Fit(tuple(features[f] for f in chosen), penalty, weight, constant, predictions, error))
        fits.append(min(tried, key=lambda fit: fit.error))
    return sorted(fits, key=lambda fit: fit.error)


def head_of(fit: Fit, states: FrozenStates, stop_ids: Iterable[int]) -> FrozenReward:
    """The reward model that a fit describes, not yet normalised."""
    reward_model = FrozenReward(states, fit.features, stop_ids).requires_grad_(False)
    reward_model.head.weight.copy_(fit.weight[None])
    reward_model.head.bias.fill_(fit.constant)
    return reward_model


# Files


def load_reward_model(
    path: str, fingerprint: str, device: torch.device | str = "cpu", base=None, frozen=None, open_base=None
) -> RewardModel | FrozenReward:
    """The reward model saved at `path`; raises ValueError if it reads other tokens than `fingerprint`.

    The last three are for a head on a frozen trunk, see `load_reward`.
    """
    saved = checkpoint.load(checkpoint.resolve(path))
    if saved.config.get("kind") != "reward":
        raise ValueError(
            f"{path} holds a {saved.config.get('kind')} checkpoint, a reward model is needed: use train_rm.py"
        )
    if saved.config["tokenizer"] != fingerprint:
        raise ValueError(
            f"{path} was trained with tokenizer {saved.config['tokenizer'][:12]}, the policy uses {fingerprint[:12]}: "
            "train the reward model from the policy's own base"
        )
    if saved.config.get("trunk", "full") == "frozen":
        reward_model = frozen_reward(saved, path, device, base, frozen, open_base)
    else:
        reward_model = RewardModel(new_transformer(saved.config["model"], path), saved.config["pooling"])
    checkpoint.load_weights(reward_model, saved.tensors, path)
    return reward_model.to(device).requires_grad_(False).eval()


def frozen_reward(saved: checkpoint.Checkpoint, path: str, device, base, frozen, open_base) -> FrozenReward:
    """The module of a head on a frozen trunk; ValueError unless the trunk is the one that it was fitted on."""
    config = saved.config
    digest = config["base_digest"]
    if base is None or base.digest != digest:
        if open_base is None:
            given = f"not one with sha256 {base.digest[:12]}" if base else "and none is given"
            raise ValueError(f"{path} is a head on {config['base']} with sha256 {digest[:12]}, {given}")
        base, frozen = open_base(config, path, device), None
        if base.digest != digest:
            raise ValueError(
                f"{path} is a head on {config['base']} with sha256 {digest[:12]}, which is now {base.digest[:12]}"
            )
    if frozen is not None and frozen.model is not base.model:
        raise ValueError("frozen reads another model than base")
    states = FrozenStates(base.model) if frozen is None else frozen
    deepest = base.model.config.layers
    features = list(zip(config["depths"], config["poolings"], strict=True))
    if wrong := [f for f in features if not 0 <= f[0] <= deepest or f[1] not in POOLING]:
        raise ValueError(
            f"{path} reads {wrong[0]} of a trunk of {deepest} layers: it is damaged, or from a newer version"
        )
    return FrozenReward(states, features, config["stop_ids"])


def load_reward(
    spec: str,
    tokenizer,
    device: torch.device | str = "cpu",
    base=None,
    frozen: FrozenStates | None = None,
    open_base: Callable | None = None,
) -> Score:
    """The reward named by `spec`, as score(tokens, lengths, mask) -> (B,).

    `spec` is the directory of a reward model, or `file.py:function` with function(prompts, responses) -> scores, lists of
    B texts and B numbers. `tokenizer` decodes for the latter and must have the reward model's fingerprint.

    A head on a frozen trunk needs that trunk. `base` (with .model on `device`, and .digest) gives it if it is the same
    model, `frozen` then shares a forward pass with the policy; otherwise open_base(config, spec, device) must open it.
    ValueError if nobody can.
    """
    file, _, name = spec.rpartition(":")
    if spec.endswith(".py"):
        raise ValueError(f"which function of {spec} is the reward? write {spec}:function")
    if file.endswith(".py"):
        return python_reward(file, name, tokenizer)
    reward_model = load_reward_model(spec, tokenizer.fingerprint, device, base, frozen, open_base)
    return torch.no_grad()(reward_model.score)


def python_reward(file: str, name: str, tokenizer) -> Score:
    """function(prompts, responses) -> scores of `file`, wrapped to read tokens."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file (reward is a directory, or file.py:function)")
    loader = importlib.util.spec_from_file_location("reward_function", file)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {name!r} (reward is a directory, or file.py:function)")

    def score(tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        starts = mask.int().argmax(1).tolist()  # first response token of each row
        rows = [row[:n].tolist() for row, n in zip(tokens, lengths.tolist())]
        prompts = [tokenizer.decode(row[:s]) for row, s in zip(rows, starts)]
        responses = [tokenizer.decode(row[s:]) for row, s in zip(rows, starts)]
        returned = function(prompts, responses)
        try:
            scores = torch.tensor([float(x) for x in returned], dtype=torch.float32, device=tokens.device)
        except (TypeError, ValueError):  # texts, None
            scores = torch.tensor(torch.nan)
        if scores.shape != lengths.shape or not bool(scores.isfinite().all()):
            raise ValueError(f"{file}:{name} must return {len(lengths)} finite numbers, got {str(returned)[:60]}")
        return scores

    return score
