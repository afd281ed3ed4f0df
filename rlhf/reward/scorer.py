"""What gives a text its score: a reward model, any Python function, or the VADER rules that came with the data."""

import hashlib
import importlib.util
import numbers
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from data.vader import load_rules
from rlhf.infra import checkpoint
from rlhf.lm.checkpoints import open_stored, stored_config, trunk_parameters, weights_of
from rlhf.lm.frozen import FrozenStates
from rlhf.lm.pretrained import Pretrained
from rlhf.reward.files import load_reward_model
from rlhf.reward.model import FrozenReward, Score


@dataclass(frozen=True)
class Scorer:
    """A reward or a judge as the user named it. `scorer_of` knows its facts, which are read when they are asked for."""

    spec: str
    kind: Literal["model", "function", "vader"]
    score: Score | None = (
        None  # score(tokens (B, T), lengths (B,), mask (B, T) of the response) -> (B,); by open_scorer
    )
    context: int | None = None  # longest row that a model reads; None: any

    @property
    def is_function(self) -> bool:
        """It may rightly look at its whole batch, and reads texts instead of tokens."""
        return self.kind == "function"

    @cached_property
    def digest(self) -> str | None:
        """sha256 of the weights or of the Python file; None for vader, whose rules are pinned."""
        if self.kind == "vader":
            return None
        if self.kind == "model":
            return checkpoint.digest(self.spec)
        return hashlib.sha256(Path(self.spec.rpartition(":")[0]).read_bytes()).hexdigest()

    @cached_property
    def temperature(self) -> float:
        """At which differences of its scores become probabilities: as train_rm.py fitted it, 1 for what is no model."""
        if self.kind != "model":
            return 1.0
        return float(weights_of(open_stored(self.spec)).get("temperature", 1.0))

    @cached_property
    def parameters(self) -> int:
        """Numbers in the trunk of a model of its own; 0 for what is no model, or stands on a frozen trunk."""
        config = open_stored(self.spec).config if self.kind == "model" else {}
        if self.kind != "model" or config.get("trunk", "full") != "full":
            return 0
        return trunk_parameters(stored_config(config["model"], self.spec))


def scorer_of(spec: str, rules: bool = False) -> Scorer:
    """The directory of a reward model, or `file.py:function`; with `rules` also "vader". Nothing is opened yet."""
    if spec.endswith(".py"):
        raise ValueError(f"which function of {spec} is the reward? write {spec}:function")
    if spec.rpartition(":")[0].endswith(".py"):
        return Scorer(spec, "function")
    if rules and spec == "vader":
        return Scorer(spec, "vader")
    if rules and not Path(spec).exists():
        raise ValueError(f"the judge {spec} is neither vader, a reward model's directory nor file.py:function")
    return Scorer(spec, "model")


def open_scorer(
    spec: str,
    tokenizer: Tokenizer,
    device: torch.device | str = "cpu",
    base: Pretrained | None = None,
    frozen: FrozenStates | None = None,
    data: str | None = None,
) -> Scorer:
    """`scorer_of(spec)`, ready to score. With `data`, a directory of data.prepare, "vader" is the rules in it.

    `tokenizer` decodes for a function and the rules, and must have a reward model's fingerprint. A reward model on a frozen
    trunk reads `base` where that is its own, and shares a forward pass with whoever else reads `frozen`; otherwise its
    base is opened. ValueError or FileNotFoundError for what is none of these, or does not fit.
    """
    scorer = scorer_of(spec, rules=data is not None)
    if scorer.kind == "function":
        return replace(scorer, score=python_reward(spec, tokenizer))
    if scorer.kind == "vader":
        return replace(scorer, score=vader_rules(data, tokenizer))
    model = load_reward_model(spec, tokenizer.fingerprint, device, base, frozen)
    trunk = model.states.model if isinstance(model, FrozenReward) else model.model
    return replace(scorer, score=torch.no_grad()(model.score), context=trunk.config.context)


def vader_rules(data: str, tokenizer: Tokenizer) -> Score:
    """The VADER rules that came with the data, on the whole text: -1 to 1."""
    rules = load_rules(data)
    return lambda tokens, lengths, mask: torch.tensor(
        [rules(tokenizer.decode(row[:n].tolist())) for row, n in zip(tokens, lengths)], device=tokens.device
    )


def python_reward(spec: str, tokenizer: Tokenizer) -> Score:
    """function(prompts, responses) -> scores of `file.py:function`: lists of B texts and B numbers."""
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file (reward is a directory, or file.py:function)")
    loader = importlib.util.spec_from_file_location("reward_function", file)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {name!r} (reward is a directory, or file.py:function)")

    def score(tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        starts = response_starts(lengths, mask).tolist()
        rows = [row[:n].tolist() for row, n in zip(tokens, lengths.tolist())]
        prompts = [tokenizer.decode(row[:s]) for row, s in zip(rows, starts)]
        responses = [tokenizer.decode(row[s:]) for row, s in zip(rows, starts)]
        scores = as_numbers(returned := function(prompts, responses))
        if scores is None or len(scores) != len(rows) or not bool(scores.isfinite().all()):
            what = f"{len(rows)} finite numbers in a list, tuple, array or tensor"
            raise ValueError(f"{spec} must return {what}, got {type(returned).__name__} {str(returned)[:60]}")
        return scores.to(tokens.device)

    return score


def response_starts(lengths: Tensor, mask: Tensor) -> Tensor:
    """Where the response of each row begins: (B,), (B, T) -> (B,). A row without response is all prompt."""
    return torch.where(mask.any(1), mask.int().argmax(1), lengths)


def as_numbers(returned) -> Tensor | None:
    """A list, tuple, array or tensor of numbers, (N,) float32; None for all else: a dict's keys, a text's letters."""
    if isinstance(returned, np.ndarray | Tensor):
        returned = returned.tolist()  # a single number is none
    if not isinstance(returned, list | tuple):
        return None
    returned = [x.item() if isinstance(x, np.generic | Tensor) and x.ndim == 0 else x for x in returned]
    if not all(isinstance(x, numbers.Real) for x in returned):
        return None
    return torch.tensor([float(x) for x in returned], dtype=torch.float32)
