"""A reward in Python: found in its file, asked by the names of its parameters, held to what it must return. What goes wrong
in it is told in one line that names the row, its texts and the line of the file; PLAIN_RLHF_TRACEBACK=1 shows all of it."""

import hashlib
import importlib.util
import inspect
import numbers
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.records import Record, prompt_text
from data.tokenizer import Tokenizer
from rlhf.infra.metrics import say
from rlhf.reward.model import response_starts

TEXTS = ("prompts", "responses", "messages")  # what a parameter can ask for beside the columns of the data
PATIENCE = 60.0  # seconds after which a function that has not answered is named
SHOWN = 100  # characters of a text in a message
Components = Callable[..., dict[str, Tensor]]  # (tokens, lengths, mask, rows) -> {name: (B,)}; "" where it names none


def components_of(
    spec: str, tokenizer: Tokenizer, records: Callable[[Tensor], list[Record]] | None = None
) -> Components:
    """The function of `file.py:function`, which is asked by the names of its parameters: lists of B, one a response.

    prompts, responses: texts; messages: the history as the data has it; any other name: that column of the data, e.g.
    answer; **kwargs: all that there is. A parameter with a default is the function's own. It returns B numbers, or
    {name: B numbers}. ValueError where the data have no such column, before the first response is sampled.
    """
    function = load_function(spec)
    wanted, everything = parameters_of(function, spec)
    columns = [one for one in wanted.values() if one not in TEXTS]
    looks_up = bool(columns) or "messages" in wanted.values()
    if records is None and looks_up:
        raise ValueError(f"{spec} asks for {(columns or ['messages'])[0]!r}, which only prompts of prepared data have")
    if records is not None and columns:
        columns_of(records(torch.zeros(1, dtype=torch.int64)), columns, spec)

    def components(tokens: Tensor, lengths: Tensor, mask: Tensor, rows: Tensor | None = None) -> dict[str, Tensor]:
        starts, ends = response_starts(lengths, mask).tolist(), lengths.tolist()
        ids = tokens.tolist()
        given = {"prompts": [tokenizer.decode(row[:s]) for row, s in zip(ids, starts)]}
        given["responses"] = [tokenizer.decode(row[s:n]) for row, s, n in zip(ids, starts, ends)]
        if looks_up and rows is None:
            raise ValueError(f"{spec} asks for {(columns or ['messages'])[0]!r}, and these prompts are of no data")
        if looks_up or everything and records is not None and rows is not None:
            found = records(rows)
            given["messages"] = [messages_of(record) for record in found]
            known = dict.fromkeys(name for record in found for name in record.extra) if everything else ()
            given |= {name: [record.extra.get(name) for record in found] for name in known if name not in TEXTS}
            given |= columns_of(found, columns, spec)
        asked = Asked(spec, given["prompts"], given["responses"], None if rows is None else rows.tolist())
        chosen = given if everything else {name: given[what] for name, what in wanted.items()}
        returned = asked.answer_of(function, chosen)
        return {name: x.to(tokens.device) for name, x in asked.numbers_in(returned).items()}

    return components


def load_function(spec: str, what: str = "reward") -> Callable:
    """The function that `file.py:function` names. FileNotFoundError, or ValueError where the file cannot be imported.

    what: the option that names it.
    """
    directory = "a directory, or " if what == "reward" else ""
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file ({what} is {directory}file.py:function)")
    place = Path(file).resolve()
    module_name = f"reward_{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    loader = importlib.util.spec_from_file_location(module_name, place)
    module = importlib.util.module_from_spec(loader)
    sys.modules[module_name] = module  # dataclasses and pickle look there for the module of a class
    try:
        loader.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"the {what} {file} cannot be imported: {told(error, place)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {name!r} ({what} is {directory}file.py:function)")
    return function


def parameters_of(function: Callable, spec: str) -> tuple[dict[str, str], bool]:
    """What each parameter of a reward function asks for, and whether it takes all that there is (**kwargs).

    Two that do not say what they are get prompts and responses.
    """
    parameters = inspect.signature(function).parameters.values()
    if unnamed := [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL)]:
        raise ValueError(f"{spec} takes {unnamed[0]!r} by its place: a reward is given its parameters by their names")
    names = [one.name for one in parameters if one.default is one.empty and one.kind != one.VAR_KEYWORD]
    everything = any(one.kind == one.VAR_KEYWORD for one in parameters)
    if len(names) == 2 and not {*names} & {*TEXTS} and not everything:
        return dict(zip(names, TEXTS)), False
    return dict(zip(names, names)), everything


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


# What it says, and what goes wrong


class Asked(NamedTuple):
    """A batch that a reward was asked about, to be named when something is wrong with its answer."""

    spec: str
    prompts: list[str]
    responses: list[str]
    rows: list[int] | None  # of the data

    def row(self, i: int) -> str:
        """The i-th row for a message: where it stands, and its texts."""
        where = f"response {i + 1} of {len(self.prompts)}" if self.rows is None else f"row {self.rows[i]} of the data"
        return f"{where}, prompt {short(self.prompts[i])}, response {short(self.responses[i])}"

    def answer_of(self, function: Callable, given: dict[str, list]):
        """What it returns; ValueError where it raises, or would end the process. A slow one is named once."""
        try:
            with patience(f"{self.spec} has not answered for {PATIENCE:g} s; it was asked about {self.row(0)}, and on"):
                return function(**given)
        except (Exception, SystemExit) as error:
            i = self.culprit(function, given, error)
            whose = f"on {self.row(i)}" if i is not None else f"in a batch that begins with {self.row(0)}"
            what = told(error, Path(self.spec.rpartition(":")[0]).resolve())
            raise ValueError(f"{self.spec} raised {what}, {whose}") from error

    def culprit(self, function: Callable, given: dict[str, list], error: BaseException) -> int | None:
        """The first row on which it raises the same error alone; None where it needs company, or somebody is away."""
        if isinstance(error, OSError | SystemExit):  # each would be waited for
            return None
        for i in range(len(self.prompts)):
            try:
                function(**{name: column[i : i + 1] for name, column in given.items()})
            except type(error):
                return i
            except (Exception, SystemExit):
                continue
        return None

    def numbers_in(self, returned) -> dict[str, Tensor]:
        """{name: (B,) float32} of a dict of columns, {"": (B,)} of a column; ValueError for all else, with the row."""
        if not isinstance(returned, dict):
            return {"": self.column(returned, "")}
        if not returned or not all(isinstance(name, str) and name for name in returned):
            raise self.broken(f"{short(returned)}; a dict has names, and {len(self.prompts)} numbers for each")
        return {name: self.column(x, f" for {name!r}") for name, x in returned.items()}

    def column(self, returned, of: str) -> Tensor:
        """A list, tuple, array or tensor of B numbers; not a dict's keys, nor a text's letters."""
        found = returned.tolist() if isinstance(returned, np.ndarray | Tensor) else returned
        if not isinstance(found, list | tuple):
            raise self.broken(f"{type(returned).__name__} {short(returned)}{of}")
        if len(found) != len(self.prompts):
            raise self.broken(f"{len(found)} in {type(returned).__name__} {short(returned)}{of}")
        found = [x.item() if isinstance(x, np.generic | Tensor) and x.ndim == 0 else x for x in found]
        for i, x in enumerate(found):
            if not isinstance(x, numbers.Real) or not as_float32(x).isfinite():
                raise self.broken(f"{type(x).__name__} {short(x)}{of}", i)
        return torch.stack([as_float32(x) for x in found])

    def broken(self, got: str, i: int | None = None) -> ValueError:
        promised = f"{len(self.prompts)} finite numbers in a list, tuple, array or tensor, or a dict of such by name"
        whose = f"on {self.row(i)}" if i is not None else f"the first is {self.row(0)}"
        return ValueError(f"{self.spec} must return {promised}, got {got}: {whose}")


def as_float32(x: numbers.Real) -> Tensor:
    """The number as a scalar; infinite where it has no place in float32."""
    try:
        return torch.tensor(float(x), dtype=torch.float32)
    except OverflowError:
        return torch.tensor(torch.inf)


def told(error: BaseException, file: Path) -> str:
    """Its kind and words, and the last line of `file` that it went through."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    at = f" in line {lines[-1].lineno} of {file.name}, {lines[-1].line}" if lines else ""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' * bool(words)}{words[: 3 * SHOWN]}{at} (PLAIN_RLHF_TRACEBACK=1 shows more)"


def short(value) -> str:
    """A value on one line, cut."""
    text = value if isinstance(value, str) else repr(value)
    cut = text[:SHOWN] + "..." * (len(text) > SHOWN)
    return repr(cut) if isinstance(value, str) else " ".join(cut.split())


@contextmanager
def patience(words: str) -> Iterator[None]:
    """Say these words once, where what is inside takes longer than PATIENCE."""
    timer = threading.Timer(PATIENCE, say, [words])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
