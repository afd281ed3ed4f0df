"""The reward: a model that reads a whole text, or any Python function that does. All are `score(tokens, lengths, mask)`.

A model has a trunk of its own or a frozen one with its own adapter (RewardModel), or is a linear head on a frozen one that
others read too (FrozenReward). Each may have several heads, whose scores are combined into one (Ensemble).
"""

import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from model.packed import last_states, text_states
from model.transformer import Transformer
from rlhf.actor_critic import LoRA, adapted
from rlhf.frozen import FrozenStates
from rlhf.infra import checkpoint
from rlhf.language_model import new_transformer, predictions, to_columns
from rlhf.losses import next_token_loss

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


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


class Normalised(nn.Module):
    """A reward model: `forward` gives the raw scores of its M heads (B, M), `score` one number per text.

    Every member is put at mean 0 and deviation 1 on reference samples, so that their scores can be compared; they are
    combined; and gain and bias put the combination there too. All of it is stored, and so is `temperature`:
    P(a beats b) = sigmoid((score_a - score_b) / temperature).
    """

    def __init__(self, ensemble: Ensemble = Ensemble()):
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
        ensemble: Ensemble = Ensemble(),
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
        ensemble: Ensemble = Ensemble(),
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


def ridge(gram: Tensor, moment: Tensor, penalty: float) -> Tensor:
    """Ridge regression (Hoerl & Kennard 1970): the w that minimises |X w - y|^2 / N + penalty |w|^2.

    (X'X / N + penalty I) w = X'y / N.   gram = X'X / N (P, P), moment = X'y / N (P,), penalty > 0 -> (P,)
    """
    factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return torch.cholesky_solve(moment[:, None], factor)[:, 0]


@dataclass(frozen=True)
class Fit:
    """A head (or M of them) and how well it does on sentences that it was not fitted to."""

    features: tuple[Feature, ...]
    penalty: float
    weight: Tensor  # (M, F D) float64, of the plain features
    constant: Tensor  # (M,) float64
    predictions: Tensor  # (V, M) of the validation sentences, standardised ratings
    error: float  # their mean squared error; always to predict the mean costs about 1


def fit_heads(
    features: Sequence[Feature], train: Tensor, ratings: Tensor, validation: Tensor, truth: Tensor, penalties, most=2
) -> list[Fit]:
    """The best penalty, by validation error, for every set of at most `most` of the features; the best set first.

    train (N, F, D) and ratings (N,) decide the heads, validation (V, F, D) and truth (V,) only which of them is taken.
    Features and ratings are standardised by the N training sentences; all in float64.
    """
    F, D = train.shape[1:]
    x, center, deviation = standardised(train)  # (N, F D)
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
            constant = -weight @ center[columns]
            names = tuple(features[f] for f in chosen)
            tried.append(Fit(names, penalty, weight[None], constant[None], predictions[:, None], error))
        fits.append(min(tried, key=lambda fit: fit.error))
    return sorted(fits, key=lambda fit: fit.error)


def standardised(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, F, D) -> float64 (N, F D) with mean 0 and deviation 1, and the means and deviations (F D,) before."""
    x = features.flatten(1).to(torch.float64, copy=True)
    center, deviation = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-6)
    return x.sub_(center).div_(deviation), center, deviation


def refitted(
    fit: Fit,
    train: Tensor,
    ratings: Tensor,
    members: int,
    seed: int,
    votes: Tensor | None = None,
    vote_coef: float = 1.0,
) -> Fit:
    """The fit's head again, `members` times, to ratings and, where given, to votes on pairs.

    The w that minimises  |X w - y|^2 / 2N + penalty |w|^2 / 2 - vote_coef / N sum_j log sigmoid(d_j w):  ridge regression
    of the N ratings beside Bradley-Terry on the P differences d = chosen - rejected; a vote weighs vote_coef as much as a
    rating, however many there are. Convex; by Newton's method. With several members each has its own N sentences and P
    pairs, drawn with replacement (bagging, Breiman 1996). train (N, F, D) and votes (P, F, D) are the features that the
    fit reads, in its order. What the fit says of validation stays.
    """
    x, center, deviation = standardised(train)
    y = ratings.double()
    y = (y - y.mean()) / y.std(unbiased=False)
    d = x[:0] if votes is None else votes.flatten(1).double() / deviation
    rng, weights, constants = np.random.default_rng(seed), [], []
    for _ in range(members):
        count, votes_count = (drawn(rng, len(rows), members) for rows in (x, d))
        middle, level = count @ x / len(x), count @ y / len(x)
        scaled = (x - middle) * count.sqrt()[:, None]
        gram, moment = scaled.T @ scaled / len(x), scaled.T @ ((y - level) * count.sqrt()) / len(x)
        w = ridge(gram, moment, fit.penalty)
        if len(d):
            w = add_votes(w, gram, moment, fit.penalty, d, vote_coef * votes_count / len(x))
        weights.append(w / deviation)
        constants.append(level - middle @ w - weights[-1] @ center)
    return dataclasses.replace(fit, weight=torch.stack(weights), constant=torch.stack(constants))


def drawn(rng: np.random.Generator, n: int, members: int) -> Tensor:
    """How often each of n rows counts for one of the members, (n,): once for a single one, else by a bootstrap sample."""
    if members == 1 or n == 0:
        return torch.ones(n, dtype=torch.float64)
    return torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n))).double()


def add_votes(w: Tensor, gram: Tensor, moment: Tensor, penalty: float, d: Tensor, weight: Tensor) -> Tensor:
    """Newton's method from w (D,) for  w'(gram + penalty I)w / 2 - moment'w - sum_j weight_j log sigmoid(d_j w).

    d (P, D), weight (P,). A step is halved until it lowers the loss enough (Armijo), so it ends at the minimum.
    """
    quadratic = gram + penalty * torch.eye(len(w), dtype=w.dtype)

    def loss(w: Tensor) -> Tensor:
        return w @ quadratic @ w / 2 - moment @ w - weight @ logsigmoid(d @ w)

    for _ in range(50):
        p = torch.sigmoid(-(d @ w))  # how unlikely the vote was
        gradient = quadratic @ w - moment - d.T @ (weight * p)
        hessian = quadratic + d.T @ (d * (weight * p * (1 - p))[:, None])
        step = torch.linalg.solve(hessian, gradient)
        if gradient @ step < 1e-14:
            break
        size = 1.0
        while loss(w - size * step) > loss(w) - 1e-4 * size * gradient @ step and size > 1e-6:
            size /= 2
        w = w - size * step
    return w


def head_of(fit: Fit, states: FrozenStates, stop_ids: Iterable[int], ensemble: Ensemble = Ensemble()) -> FrozenReward:
    """The reward model that a fit describes, not yet normalised."""
    reward_model = FrozenReward(states, fit.features, stop_ids, ensemble).requires_grad_(False)
    reward_model.head.weight.copy_(fit.weight)
    reward_model.head.bias.copy_(fit.constant)
    return reward_model


# Files

OLDER = {"member_gain": torch.ones(1), "member_bias": torch.zeros(1), "temperature": torch.ones(())}  # knew one head


def load_reward_model(
    path: str, fingerprint: str, device: torch.device | str = "cpu", base=None, frozen=None, open_base=None
) -> RewardModel | FrozenReward:
    """The reward model saved at `path`; raises ValueError if it reads other tokens than `fingerprint`.

    The last three are for what was trained on a frozen trunk, see `load_reward`.
    """
    saved = checkpoint.load(checkpoint.resolve(path))
    check_kind(saved, path)
    if saved.config["tokenizer"] != fingerprint:
        raise ValueError(
            f"{path} was trained with tokenizer {saved.config['tokenizer'][:12]}, the policy uses {fingerprint[:12]}: "
            "train the reward model from the policy's own base"
        )
    return restored(saved.config, saved.tensors, path, device, base, frozen, open_base)


def check_kind(saved: checkpoint.Checkpoint, path: str) -> None:
    if saved.config.get("kind") != "reward":
        raise ValueError(
            f"{path} holds a {saved.config.get('kind')} checkpoint, a reward model is needed: use train_rm.py"
        )


def restored(
    config: dict, tensors: dict[str, Tensor], path: str, device, base=None, frozen=None, open_base=None
) -> RewardModel | FrozenReward:
    """The reward model of a checkpoint's config and tensors."""
    ensemble = Ensemble(*(config.get(field.name, field.default) for field in dataclasses.fields(Ensemble)))
    trunk, pooling = config.get("trunk", "full"), config.get("pooling", "mean")
    unknown = [x for x, known in ((trunk, TRUNKS), (pooling, POOLINGS), (ensemble.combine, COMBINE)) if x not in known]
    if unknown:
        raise ValueError(f"{path} has {unknown[0]!r}, which is unknown here: it is damaged, or from a newer version")
    if trunk == "full":
        model, stop_ids = new_transformer(config["model"], path), None
    else:
        base, frozen = trunk_of(config, path, device, base, frozen, open_base)
    if trunk == "adapters":
        lora = LoRA(config["lora_rank"], config["lora_alpha"], config["lora_targets"])
        model, stop_ids = adapted_trunk(base.model, lora, config["depth"]), config["stop_ids"]
    if trunk == "frozen":
        reward_model = frozen_reward(config, path, base, frozen, ensemble)
    else:
        language = config.get("language", False)
        reward_model = RewardModel(model, pooling, None, ensemble, stop_ids, language)
    checkpoint.load_weights(reward_model, OLDER | tensors, path)
    return reward_model.to(device).requires_grad_(False).eval()


TRUNKS = ("full", "frozen", "adapters")


def trunk_of(config: dict, path: str, device, base, frozen, open_base) -> tuple:
    """The frozen trunk that the reward model at `path` was trained on, and who else reads it; ValueError for another."""
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
    return base, FrozenStates(base.model) if frozen is None else frozen


def frozen_reward(config: dict, path: str, base, frozen: FrozenStates, ensemble: Ensemble) -> FrozenReward:
    deepest = base.model.config.layers
    features = list(zip(config["depths"], config["poolings"], strict=True))
    if wrong := [f for f in features if not 0 <= f[0] <= deepest or f[1] not in POOLING]:
        raise ValueError(
            f"{path} reads {wrong[0]} of a trunk of {deepest} layers: it is damaged, or from a newer version"
        )
    return FrozenReward(frozen, features, config["stop_ids"], ensemble)


NORMALISATION = ("gain", "bias", "member_gain", "member_bias", "temperature")


def average(paths: Sequence[str]) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors of the reward model whose weights are the mean of those at `paths` (WARM, arXiv:2401.12187).

    The mean is taken in float64. Of adapters it is the mean of what they add, (1/K) sum_k B_k A_k, exactly: the ranks
    add up. ValueError unless all are of one shape, base and tokenizer. It has to be normalised anew.
    """
    saved = [checkpoint.load(checkpoint.resolve(path)) for path in paths]
    for one, path in zip(saved, paths):
        check_kind(one, path)
    shapes = [{name: value for name, value in one.config.items() if name != "base"} for one in saved]
    for shape, path in zip(shapes[1:], paths[1:]):
        for name in sorted(shape.keys() | shapes[0].keys()):
            if shape.get(name) != shapes[0].get(name):
                both = f"{name} is {shapes[0].get(name)} in {paths[0]} and {shape.get(name)} in {path}"
                raise ValueError(f"only reward models of one kind can be averaged: {both}")
    config, tensors = dict(saved[0].config), [one.tensors for one in saved]
    mean = {}
    for name, first in tensors[0].items():
        if name in NORMALISATION:
            mean[name] = first
        elif ".lora_A." in name:
            mean[name] = torch.cat([x[name] for x in tensors])
        elif ".lora_B." in name:
            mean[name] = torch.cat([(x[name].double() / len(tensors)).to(first.dtype) for x in tensors], 1)
        else:
            mean[name] = (sum(x[name].double() for x in tensors) / len(tensors)).to(first.dtype)
    if config.get("trunk") == "adapters":
        config |= {name: config[name] * len(tensors) for name in ("lora_rank", "lora_alpha")}
    return config, mean


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
