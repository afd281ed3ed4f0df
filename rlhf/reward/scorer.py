"""The reward that PPO asks: a reward model's directory or a Python function, as score(tokens, lengths, mask) -> (B,)."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rlhf.lm.frozen import FrozenStates
from rlhf.reward.files import load_reward_model
from rlhf.reward.model import Score


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
