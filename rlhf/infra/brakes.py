"""Bad numbers: a step that one makes impossible is skipped, counted and stored in OUT/bad; several in a row end the run.

    OUT/bad/000004-02.safetensors    the minibatch: step 4, its second update
    OUT/bad/000004-02.json           options, rows, their texts, the first formula that failed, and where
    OUT/bad/000004-02-model          the weights before the step, as a checkpoint; the next bad steps in a row have the same

`python -m rlhf.replay FILE` computes it again. Every rank calls `skip`, having seen the same sum or gradient; rank 0 alone
looks for the culprit and writes.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf.infra import checkpoint
from rlhf.infra.adamw import AdamW
from rlhf.infra.files import write_json
from rlhf.infra.metrics import say
from rlhf.infra.run import Run
from rlhf.infra.screen import printable

LARGEST = 1e18  # the square of more is infinite in float32
MOST_STORED, MOST_MODELS = 20, 3  # of a run: minibatches; weights


class Formula(NamedTuple):
    """One thing that is computed, for `first_bad`."""

    name: str
    x: Tensor  # (B, T), (B,), (), or a parameter's shape
    limit: float = math.inf  # larger magnitudes are as bad as what is not finite
    worst: Tensor | None = None  # (B, T) or (B,): what the scalar x is the mean of


class Finding(NamedTuple):
    """The first formula that failed."""

    formula: str
    value: float
    limit: float | None = None  # that it passed; None: it is not finite
    row: int | None = None  # of the minibatch
    column: int | None = None  # the token


def first_bad(formulas: Iterable[Formula]) -> Finding | None:
    """The first of the formulas with a number that is not finite or above its limit; None where all are well."""
    for name, x, limit, worst in formulas:
        x = checkpoint.whole(x.detach())
        if bool((x.abs() <= limit).all()) and bool(x.isfinite().all()):
            continue
        place = place_of(x)
        passed = None if not math.isfinite(value := float(x[place])) else limit
        if worst is not None:
            place = place_of(worst)
        if x.dim() > 2 or name.startswith(PARAMETERS):
            place = ()
        return Finding(name, value, passed, *place)
    return None


PARAMETERS = ("weight ", "gradient of ")  # how the names of formulas begin whose numbers belong to no row


def place_of(x: Tensor) -> tuple[int, ...]:
    """Where the first number is that is not finite, or the largest."""
    wrong = ~x.isfinite()
    flat = wrong.flatten().int().argmax() if bool(wrong.any()) else x.abs().flatten().argmax()
    return tuple(int(i) for i in torch.unravel_index(flat, x.shape)) if x.dim() else ()


def weights(module: nn.Module) -> Iterator[Formula]:
    """The trained parameters of a model."""
    yield from (Formula(f"weight {name}", x, LARGEST) for name, x in module.named_parameters() if x.requires_grad)


def gradients(module: nn.Module) -> Iterator[Formula]:
    """Those that its parameters hold, from the last layer down, as they are computed."""
    held = ((name, x.grad) for name, x in reversed([*module.named_parameters()]) if x.grad is not None)
    yield from (Formula(f"gradient of {name}", x, LARGEST) for name, x in held)


class Brakes:
    """Counts bad steps. `most` in a row end the run: then `ended` says why, and `check` raises it."""

    def __init__(self, run: Run, optimizer: AdamW, most: int):
        self.run, self.optimizer, self.most = run, optimizer, most
        self.in_a_row, self.counted, self.ended = run.state.get("bad_in_a_row", 0), run.state.get("bad_counted", 0), ""

    def state(self) -> dict[str, int]:
        """For the checkpoint: what a resumed run has to know."""
        return {"bad_in_a_row": self.in_a_row, "bad_counted": self.counted}

    def count(self) -> int:
        """Bad steps since the last call, for the row of the metrics."""
        counted, self.counted = self.counted, 0
        return counted

    def passed(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def took(self, norm: float, loss: Tensor, scaler: torch.amp.GradScaler) -> bool:
        """Is this gradient norm that of a step taken, or of fp16 on its way to a loss scale? False: a number is bad.

        Every rank has to ask; `loss` is its share of the step's.
        """
        if math.isfinite(norm):
            self.passed()
            return True
        return scaler.is_enabled() and math.isfinite(float(self.run.dist.sum(loss.detach())))

    def skip(
        self,
        name: str,
        step: int,
        formulas: Iterable[Formula],
        tensors: Callable[[], dict[str, Tensor]],
        texts: Callable[[], Sequence[dict]],
        seen: str,
        **facts,
    ) -> None:
        """This step is not taken; its gradient goes. `name` of the file and its `step`; the formulas in their order.

        tensors: the minibatch of all ranks; texts: of each of its rows, {"prompt", "response"} or {"text"}, and "tokens",
        those that columns from "start" on hold; seen: what this rank knows, where no formula of rank 0 fails.
        """
        self.in_a_row, self.counted = self.in_a_row + 1, self.counted + 1
        main, sharded = self.run.dist.is_main, self.run.dist.mesh is not None
        found = first_bad(formulas) if main or sharded else None  # with shards nobody computes alone
        weights = checkpoint.gathered(checkpoint.trained_state(self.run.module), main) if main or sharded else {}
        if main:
            finding = found or Finding(f"{seen} (every row alone is finite on rank 0)", math.nan)
            rows = texts()
            words = {"words": in_words(finding, rows), "cause": cause(finding, rows)}
            line = ". ".join(words.values())
            where = self.store(name, step, finding._asdict() | words, tensors(), weights, rows, facts)
            say(f"step {step}: skipped, {line}{where and f' ({where})'}")
            if self.in_a_row >= self.most:
                self.ended = f"{self.in_a_row} steps in a row were skipped, the last at step {step}: {line}"
                self.ended += where and f". Look at it with: python -m rlhf.replay {where}"
        elif self.in_a_row >= self.most:
            self.ended = f"{self.in_a_row} steps in a row were skipped, the last at step {step}: rank 0 says why"
        self.optimizer.zero_grad()
        self.run.dist.barrier()

    def check(self) -> None:
        """ValueError where the run has ended; rank 0, which knows the culprit, is the first to say it."""
        if self.ended:
            raise ValueError(self.ended)

    def store(
        self,
        name: str,
        step: int,
        culprit: dict,
        tensors: dict[str, Tensor],
        weights: dict[str, Tensor],
        texts: Sequence[dict],
        facts: dict,
    ) -> str:
        """Write the minibatch, what is known about it, and the weights if they are new; -> the file, "" if there are many."""
        room = Path(self.run.out) / "bad"
        room.mkdir(parents=True, exist_ok=True)
        file = room / f"{name}.safetensors"
        if not file.exists() and len([*room.glob("*.safetensors")]) >= MOST_STORED:
            return ""
        if self.in_a_row == 1 or not (model := newest_model(room)):
            model = f"{name}-model"
            run = self.run
            checkpoint.save(room / model, weights, run.config, files=run.files)
            checkpoint.remove(sorted(room.glob("*-model"))[:-MOST_MODELS])
        beside = file.with_name(f".{file.name}.tmp-{os.getpid()}")
        checkpoint.write_tensors(beside, {key: x.contiguous().cpu() for key, x in tensors.items()})
        os.replace(beside, file)
        culprit = culprit | {"value": str(culprit["value"])}
        record = {"name": name, "step": step, "model": model, "options": self.run.options, "culprit": culprit, **facts}
        write_json(file.with_suffix(".json"), record | {"texts": [*texts]})
        return str(file)


def newest_model(room: Path) -> str:
    return max((path.name for path in room.glob("*-model")), default="")


def in_words(finding: Finding, texts: Sequence[dict] = ()) -> str:
    """`mean value loss = 1.9e+14, above 1e+06, row 5, token 7 ' good', of 'The film' | ' was good'`."""
    line = f"{finding.formula} = {finding.value:.4g}" + (f", above {finding.limit:.4g}" if finding.limit else "")
    if finding.row is None:
        return line
    line += f", row {finding.row}"
    if finding.row < len(texts):
        text = texts[finding.row]
        if finding.column is not None:
            nth = finding.column - text.get("start", 0)
            known = text.get("tokens", ())
            line += f", token {finding.column}" + (f" {printable(known[nth])!r}" if 0 <= nth < len(known) else "")
        words = [printable(text[key])[:120] for key in ("prompt", "response", "text") if key in text]
        line += f", of {' | '.join(map(repr, words))}"
    return line


def cause(finding: Finding, texts: Sequence[dict]) -> str:
    """What is likely behind it, and what to do."""
    name = finding.formula
    score = texts[finding.row].get("score") if finding.row is not None and finding.row < len(texts) else None
    blamed = score is not None and not abs(score) <= 1e3
    if name == "scores" or blamed and name in ("rewards", "advantages", "returns", "value loss", "mean value loss"):
        return f"The reward gave this row {score:.4g}: look at --reward, and bring its scores to a scale of about 1"
    if name.startswith("ref"):
        return "The reference, which is --init, computes it: its weights or its type cannot hold this text"
    return "The model has diverged: use a smaller --lr, and go on from an earlier checkpoint"
