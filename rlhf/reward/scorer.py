"""What gives a text its score: a reward model, any Python function, or the judge that came with the data."""

import hashlib
import importlib.util
import inspect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data.judge import own_judge
from data.records import Record, prompt_text
from data.tokenizer import Tokenizer
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
    kind: Literal["model", "function", "data"]
    score: Score | None = None  # by open_scorer; rows say which prompts of the data were answered
    context: int | None = None  # longest row that a model reads; None: any

    @property
    def is_function(self) -> bool:
        """It may rightly look at its whole batch, and reads texts instead of tokens."""
        return self.kind == "function"

    @cached_property
    def digest(self) -> str | None:
        """sha256 of the weights or of the Python file; None for the judge of the data, which belongs to them."""
        if self.kind == "data":
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
    """The directory of a reward model, or `file.py:function`; with `rules` also "data". Nothing is opened yet."""
    if spec.endswith(".py"):
        raise ValueError(f"which function of {spec} is the reward? write {spec}:function")
    if spec.rpartition(":")[0].endswith(".py"):
        return Scorer(spec, "function")
    if rules and spec == "data":
        return Scorer(spec, "data")
    if rules and not Path(spec).exists():
        raise ValueError(f"the judge {spec} is neither data, a reward model's directory nor file.py:function")
    return Scorer(spec, "model")


def open_scorer(
    spec: str,
    tokenizer: Tokenizer,
    device: torch.device | str = "cpu",
    base: Pretrained | None = None,
    frozen: FrozenStates | None = None,
    data: str | None = None,
    records: Callable[[Tensor], list[Record]] | None = None,
) -> Scorer:
    """`scorer_of(spec)`, ready to score. With `data`, a directory of data.prepare, "data" is the judge in it.

    `tokenizer` decodes for a function and the rules, and must have a reward model's fingerprint. A reward model on a frozen
    trunk reads `base` where that is its own, and shares a forward pass with whoever else reads `frozen`; otherwise its
    base is opened. ValueError or FileNotFoundError for what is none of these, or does not fit.

    records: rows (B,) -> the records of the data that these are, for a function that asks for messages or columns.
    """
    scorer = scorer_of(spec, rules=data is not None)
    if scorer.kind == "function":
        return replace(scorer, score=python_reward(spec, tokenizer, records))
    if scorer.kind == "data":
        return replace(scorer, score=judge_of(data, tokenizer))
    model = load_reward_model(spec, tokenizer.fingerprint, device, base, frozen)
    trunk = model.states.model if isinstance(model, FrozenReward) else model.model

    @torch.no_grad()
    def score(tokens: Tensor, lengths: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
        return model.score(tokens, lengths, mask)

    return replace(scorer, score=score, context=trunk.config.context)


def judge_of(data: str, tokenizer: Tokenizer) -> Score:
    """The judge that came with the data, on the whole text."""
    judge = own_judge(data)
    if judge is None:
        raise ValueError(f"{data} brings no judge of its own: name one, a reward model's directory or file.py:function")
    return lambda tokens, lengths, mask, rows=None: torch.tensor(
        [judge(tokenizer.decode(row[:n].tolist())) for row, n in zip(tokens, lengths)], device=tokens.device
    )


def python_reward(spec: str, tokenizer: Tokenizer, records: Callable[[Tensor], list[Record]] | None = None) -> Score:
    """A function of `file.py:function`, which is asked by the names of its parameters: lists of B, one a response.

    prompts, responses: texts; messages: the history as the data has it; any other name: that column of the data, e.g.
    answer. It returns B numbers. ValueError where the data have no such column, before the first response is sampled.
    """
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file (reward is a directory, or file.py:function)")
    loader = importlib.util.spec_from_file_location("reward_function", file)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {name!r} (reward is a directory, or file.py:function)")
    wanted = parameters_of(function)
    columns = [one for one in wanted if one not in ("prompts", "responses", "messages")]
    if records is None and (columns or "messages" in wanted):
        raise ValueError(f"{spec} asks for {(columns or ['messages'])[0]!r}, which only prompts of prepared data have")
    if records is not None and columns:
        columns_of(records(torch.zeros(1, dtype=torch.int64)), columns, spec)

    def score(tokens: Tensor, lengths: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
        starts = response_starts(lengths, mask).tolist()
        texts = [row[:n].tolist() for row, n in zip(tokens, lengths.tolist())]
        given = {"prompts": [tokenizer.decode(row[:s]) for row, s in zip(texts, starts)]}
        given["responses"] = [tokenizer.decode(row[s:]) for row, s in zip(texts, starts)]
        if columns or "messages" in wanted:
            if rows is None:
                raise ValueError(f"{spec} asks for {(columns or ['messages'])[0]!r}, and these prompts are of no data")
            asked = records(rows)
            given["messages"] = [messages_of(record) for record in asked]
            given |= columns_of(asked, columns, spec)
        scores = as_numbers(returned := function(**{one: given[one] for one in wanted}))
        if scores is None or len(scores) != len(texts) or not bool(scores.isfinite().all()):
            what = f"{len(texts)} finite numbers in a list, tuple, array or tensor"
            raise ValueError(f"{spec} must return {what}, got {type(returned).__name__} {str(returned)[:60]}")
        return scores.to(tokens.device)

    return score


def parameters_of(function: Callable) -> list[str]:
    """What a reward function asks for. Its first two may have other names, as long as nothing else says what they are."""
    names = [one.name for one in inspect.signature(function).parameters.values() if one.default is one.empty]
    return (
        ["prompts", "responses"] if len(names) == 2 and not {*names} & {"prompts", "responses", "messages"} else names
    )


def columns_of(records: Sequence[Record], columns: Sequence[str], spec: str) -> dict[str, list]:
    """These columns of the records; ValueError, naming the row, where one has none of that name."""
    for record in records:
        for column in columns:
            if column not in record.extra:
                has = ", ".join(record.extra) or "no further column"
                raise ValueError(
                    f"{spec} asks for {column!r}, and the row of {prompt_text(record.prompt)[:60]!r} has {has}"
                )
    return {column: [record.extra[column] for record in records] for column in columns}


def messages_of(record: Record) -> list[dict]:
    """The history of a record; a plain prompt is one message of the user."""
    return [{"role": "user", "content": record.prompt}] if isinstance(record.prompt, str) else record.prompt


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
