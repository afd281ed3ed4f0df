"""What gives a text its score: a reward model, any Python function, the judge that came with the data, or a sum of these.

out/rm                                      a reward model: a run of train_rm.py, or an HF sequence classifier
rewards/verify.py:number                    a function of the file
rewards/mine.py:graded:right=1:polite=0.2   ... that names components, with their weights (1 where none is given)
out/rm:1,rewards/style.py:brief:0.1         a sum: each with its weight
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from data.judge import own_judge
from data.records import Record
from data.tokenizer import Tokenizer
from model.hf import read_config
from rlhf.infra import checkpoint
from rlhf.lm.checkpoints import open_stored, stored_config, trunk_parameters, weights_of
from rlhf.lm.frozen import FrozenStates
from rlhf.lm.pretrained import Pretrained, hf_digest, is_hf
from rlhf.reward import bridge
from rlhf.reward.files import load_reward_model
from rlhf.reward.function import Components, components_of, response_starts  # noqa: F401  response_starts: for readers
from rlhf.reward.model import FrozenReward, Score


@dataclass(frozen=True)
class Scorer:
    """A reward or a judge as the user named it. `scorer_of` knows its facts, which are read when they are asked for."""

    spec: str
    kind: Literal["model", "function", "data", "sum"]
    weight: float = 1.0  # in the sum that it is a term of
    weights: tuple[tuple[str, float], ...] = ()  # of its own components; 1 for those that are not named
    terms: tuple["Scorer", ...] = ()  # of a sum
    components: Components | None = None  # by open_scorer; what its components say, {name: (B,)}
    context: int | None = None  # longest row that a model reads; None: any
    module: nn.Module | None = field(default=None, compare=False)  # by open_scorer; a model's weights
    by_row: bool = False  # it looks up what the rows answer: tokens alone are not enough
    prefixes: Score | None = field(default=None, compare=False)  # by open_scorer; of a reward model of train_rm.py
    asked: list[list[str]] = field(default_factory=list, compare=False)  # its `names`, once it was asked

    @property
    def is_function(self) -> bool:
        """It may rightly look at its whole batch, and reads texts instead of tokens."""
        return self.kind == "function" or any(term.is_function for term in self.terms)

    @property
    def scores_prefixes(self) -> bool:
        """Once it is open: there is a reward model of train_rm.py in it, which can score a text that is not ended."""
        return any(term.prefixes for term in self.terms or (self,))

    @property
    def names(self) -> list[str]:
        """Of the columns of `detailed` after the score, by the first answer."""
        return self.asked[0] if self.asked else []

    @property
    def name(self) -> str:
        """Short, for metrics: of the function, or of the directory."""
        if self.kind == "function":
            return self.spec.rpartition(":")[2]
        return next((part for part in reversed(Path(self.spec).parts) if not part.startswith("step_")), self.spec)

    @cached_property
    def digest(self) -> str | None:
        """sha256 of the weights or of the Python file; None for the judge of the data, which belongs to them."""
        if self.kind == "sum":  # the same files under other weights are another reward
            facts = [[x.digest, x.spec.rpartition(".py:")[2], x.weight, x.weights] for x in self.terms]
            return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        if self.kind == "data":
            return None
        if self.kind == "model":
            return digest_of_model(self.spec)
        return hashlib.sha256(Path(self.spec.rpartition(":")[0]).read_bytes()).hexdigest()

    @cached_property
    def temperature(self) -> float:
        """At which differences of its scores become probabilities: as train_rm.py fitted it, 1 for what is no model."""
        if self.kind != "model" or is_hf(Path(self.spec)):
            return 1.0
        return float(weights_of(open_stored(self.spec)).get("temperature", 1.0))

    @cached_property
    def parameters(self) -> int:
        """Numbers in the trunk of a model of its own; 0 for what is no model, or stands on a frozen trunk."""
        if self.kind != "model":
            return sum(term.parameters for term in self.terms)
        if is_hf(Path(self.spec)):
            return trunk_parameters(read_config(self.spec).model)
        config = open_stored(self.spec).config
        if config.get("trunk", "full") != "full":
            return 0
        return trunk_parameters(stored_config(config["model"], self.spec))

    @cached_property
    def depths(self) -> frozenset[int]:
        """Above so many layers of a frozen trunk the models in it read states, which are heads there."""
        if self.kind != "model":
            return frozenset().union(*(term.depths for term in self.terms))
        return frozenset(() if is_hf(Path(self.spec)) else open_stored(self.spec).config.get("depths", ()))

    @property
    def models(self) -> list[str]:
        """The directories of the reward models in it."""
        return [self.spec] if self.kind == "model" else [spec for term in self.terms for spec in term.models]

    @property
    def own_models(self) -> list[str]:
        """Those of train_rm.py, which know the chat template of their data."""
        return [path for path in self.models if not is_hf(Path(path))]

    def check_room(self, prompt: int, response: int, what: str = "the reward model") -> None:
        """ValueError where prompts of so many tokens and responses of so many are more than it reads."""
        check_room(prompt, response, self.context, f"{what} {self.spec} reads")

    @property
    def modules(self) -> list[nn.Module]:
        """The weights of the reward models in it, those aside that a text bridge asks."""
        return [term.module for term in self.terms or (self,) if term.module is not None]

    def score(self, tokens: Tensor, lengths: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
        """One number a response: tokens (B, T), lengths (B,), mask (B, T) of the response, rows (B,) of the data -> (B,)"""
        return self.detailed(tokens, lengths, mask, rows)[:, 0]

    def detailed(self, tokens: Tensor, lengths: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
        """The score, and what `names` say of it: its terms and their components, as they are, without weights. (B, 1 + K)

        The score is sum_i w_i r_i over the terms, r_i the number that a reward gives, or sum_k w_ik c_ik of its components.
        """
        said: list[tuple[str, str, Tensor]] = []  # term, component or "", (B,)
        terms, total = self.terms or (self,), 0
        short = Counter(term.name for term in terms)
        for term in terms:
            owner = term.name if short[term.name] == 1 else term.spec
            parts = term.components(tokens, lengths, mask, rows)
            weights = dict(term.weights)
            if unknown := weights.keys() - parts.keys():
                known = ", ".join(sorted(parts)) if "" not in parts else "no components"
                raise ValueError(f"the reward {term.spec} has {known}, and a weight for {min(unknown)!r}")
            reward = sum(weights.get(name, 1.0) * x for name, x in sorted(parts.items()))
            total = total + term.weight * reward if self.terms else reward
            said += [(owner, "", reward)] * bool(self.terms)
            said += [(owner, name, x) for name, x in sorted(parts.items()) if name]
        self.remember([(owner, name) for owner, name, _ in said])
        return torch.stack([total, *(x for *_, x in said)], 1)

    def remember(self, said: list[tuple[str, str]]) -> None:
        """`names` by the first answer; ValueError where a later one has other components."""
        count = Counter(name or owner for owner, name in said)
        names = [f"{owner}.{name}" if count[name or owner] > 1 and name else name or owner for owner, name in said]
        if self.asked and self.names != names:
            ours, theirs = (", ".join(x) or "nothing" for x in (names, self.names))
            raise ValueError(
                f"the reward {self.spec} now has the components {ours}; before, {theirs}: name the same ones"
            )
        self.asked[:] = [names]

    def prefix_scores(self, tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """What the reward models of train_rm.py in it say of the text before each response token, weighted as in the score.

        (B, T), 0 outside the mask; see `Normalised.prefix_scores`.
        """
        terms = [term for term in self.terms or (self,) if term.prefixes]
        return sum(term.weight * term.prefixes(tokens, lengths, mask) for term in terms)

    def means(self, parts: Tensor) -> dict[str, float]:
        """Metrics of what `detailed` says beside the score: parts (B, K)."""
        return {f"reward/{name}": x for name, x in zip(self.names, parts.cpu().double().mean(0).tolist())}


def check_room(prompt: int, response: int, most: int | None, what: str) -> None:
    """ValueError where a prompt and a response of so many tokens are more than the `most` that `what` says, None = any."""
    if most is not None and prompt + response > most:
        shorter = f"--max_prompt={most - response} or " if most > response else ""
        raise ValueError(
            f"{what} {most} tokens; the longest prompt has {prompt} and a response up to {response}: "
            f"allow {prompt + response}, or use {shorter}shorter responses"
        )


# What the user wrote


def scorer_of(spec: str, rules: bool = False) -> Scorer:
    """What `spec` names, see the top of this file; with `rules` also "data". Nothing is opened yet.

    ValueError where it names nothing: a file without function, a weight that is no number, a term that stands twice or is
    empty.
    """
    if not all(text.strip() for text in spec.split(",")):
        raise ValueError(
            f"a reward without a name in {spec!r}; write a directory, or file.py:function, between its commas"
        )
    if Path(spec).is_dir() and not (rules and spec == "data"):
        return Scorer(spec, "model")
    terms = tuple(term_of(text.strip(), rules) for text in spec.split(","))
    if len(terms) == 1 and terms[0].weight == 1.0 and terms[0].spec == spec:
        return terms[0]
    if again := [one for one, n in Counter(term.spec for term in terms).items() if n > 1]:
        raise ValueError(f"the sum {spec} has {again[0]} twice; add up its weights")
    return Scorer(spec, "sum", terms=terms)


def term_of(text: str, rules: bool) -> Scorer:
    """One reward with its weights: place[:function][:weight][:component=weight ...]."""
    words = text.split(":")
    code = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if code is not None and len(words) == code + 1:
        raise ValueError(f"which function of {text} is the reward? write {text}:function")
    known = 1 if code is None else code + 2  # words that say what it is
    if Path(text).is_dir():  # a colon of its name is no weight
        known = len(words)
    weight, weights = None, {}
    for word in words[known:]:
        name, equals, number = word.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or equals and (not name or name in weights) or not equals and weight is not None:
            place = ":".join(words[:known])
            raise ValueError(f"{word!r} of the reward {text} is no weight; write {place}:0.5, or {place}:component=0.5")
        if equals:
            weights[name] = value
        else:
            weight = value
    spec = ":".join(words[:known])
    more = {"weight": 1.0 if weight is None else weight, "weights": tuple(sorted(weights.items()))}
    if code is not None:
        return Scorer(spec, "function", **more)
    if weights:
        raise ValueError(f"{text}: only a function has components; write {spec}:0.5")
    if rules and spec == "data":
        return Scorer(spec, "data", **more)
    if rules and not Path(spec).exists():
        raise ValueError(f"the judge {spec} is neither data, a reward model's directory nor file.py:function")
    return Scorer(spec, "model", **more)


# ... and opened


def open_scorer(
    spec: str,
    tokenizer: Tokenizer,
    device: torch.device | str = "cpu",
    base: Pretrained | None = None,
    frozen: FrozenStates | None = None,
    data: str | None = None,
    records: Callable[[Tensor], list[Record]] | None = None,
    template: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Scorer:
    """`scorer_of(spec)`, ready to score. With `data`, a directory of data.prepare, "data" is the judge in it.

    `tokenizer` decodes for a function and the rules, and must have a reward model's fingerprint. A reward model on a frozen
    trunk reads `base` where that is its own, and shares a forward pass with whoever else reads `frozen`; otherwise its
    base is opened. ValueError or FileNotFoundError for what is none of these, or does not fit.

    records: rows (B,) -> the records of the data that these are, for a function that asks for messages or columns, and for
    a classifier with another chat template than `template`, the sha256 of that of the data. dtype: see model/half.py.
    """

    def opened(scorer: Scorer) -> Scorer:
        if scorer.kind == "sum":
            terms = tuple(map(opened, scorer.terms))
            bounds = [term.context for term in terms if term.context is not None]
            by_row = any(term.by_row for term in terms)
            return replace(scorer, terms=terms, context=min(bounds, default=None), by_row=by_row)
        if scorer.kind == "function":
            return replace(scorer, components=components_of(scorer.spec, tokenizer, records))
        if scorer.kind == "data":
            return replace(scorer, components=unnamed(judge_of(data, tokenizer)))
        if is_hf(Path(scorer.spec)):
            score, context = bridge.score_of(scorer.spec, tokenizer, template, device, records, dtype)
            by_row = context is None and template is not None
            return replace(scorer, components=unnamed(score), context=context, by_row=by_row)
        model = load_reward_model(scorer.spec, tokenizer.fingerprint, device, base, frozen, dtype)
        trunk = model.states.model if isinstance(model, FrozenReward) else model.model
        module = trunk if isinstance(model, FrozenReward) else model
        own = unnamed(lambda tokens, lengths, mask, rows: model.score(tokens, lengths, mask))
        facts = {"context": trunk.config.context, "module": module, "prefixes": model.prefix_scores}
        return replace(scorer, components=own, **facts)

    return opened(scorer_of(spec, rules=data is not None))


def digest_of_model(spec: str) -> str:
    """sha256 of a reward model's weights, whoever trained it."""
    return hf_digest(Path(spec)) if is_hf(Path(spec)) else checkpoint.digest(spec)


def unnamed(score: Score) -> Components:
    """A score without components."""

    @torch.no_grad()
    def components(tokens: Tensor, lengths: Tensor, mask: Tensor, rows: Tensor | None = None) -> dict[str, Tensor]:
        return {"": score(tokens, lengths, mask, rows)}

    return components


def judge_of(data: str, tokenizer: Tokenizer) -> Score:
    """The judge that came with the data, on the whole text."""
    judge = own_judge(data)
    if judge is None:
        raise ValueError(f"{data} brings no judge of its own: name one, a reward model's directory or file.py:function")
    return lambda tokens, lengths, mask, rows: torch.tensor(
        [judge(tokenizer.decode(row[:n].tolist())) for row, n in zip(tokens, lengths)], device=tokens.device
    )


def python_reward(spec: str, tokenizer: Tokenizer, records: Callable[[Tensor], list[Record]] | None = None) -> Score:
    """`components_of` a function, as one number a response."""
    return replace(scorer_of(spec), components=components_of(spec, tokenizer, records)).score
