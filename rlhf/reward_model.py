"""The reward: a model that reads a whole text, or any Python function that does. Both are `score(tokens, lengths, mask)`."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from model.transformer import Transformer
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


class RewardModel(nn.Module):
    """A trunk, a pooling and a linear head; `score` adds the fixed gain and bias that put reference samples at 0 +- 1.

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
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Raw score of every text: tokens (B, T) right-padded, lengths (B,) -> (B,). This is what training sees."""
        hidden = self.model.trunk(tokens)  # (B, T, D)
        score = self.head(POOLING[self.pooling](hidden, lengths)).squeeze(-1)
        return score.to(torch.promote_types(score.dtype, torch.float32))  # half precision would round the ranking away

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


def load_reward_model(path: str, fingerprint: str, device: torch.device | str = "cpu") -> RewardModel:
    """The reward model saved at `path`; raises ValueError if it reads other tokens than `fingerprint`."""
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
    reward_model = RewardModel(new_transformer(saved.config["model"], path), saved.config["pooling"])
    checkpoint.load_weights(reward_model, saved.tensors, path)
    return reward_model.to(device).requires_grad_(False).eval()


def load_reward(spec: str, tokenizer, device: torch.device | str = "cpu") -> Score:
    """The reward named by `spec`, as score(tokens, lengths, mask) -> (B,).

    `spec` is the directory of a reward model, or `file.py:function` with function(prompts, responses) -> scores, lists of
    B texts and B numbers. `tokenizer` decodes for the latter and must have the reward model's fingerprint.
    """
    file, _, name = spec.rpartition(":")
    if spec.endswith(".py"):
        raise ValueError(f"which function of {spec} is the reward? write {spec}:function")
    if file.endswith(".py"):
        return python_reward(file, name, tokenizer)
    reward_model = load_reward_model(spec, tokenizer.fingerprint, device)
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
