"""The samples of a report: base beside tuned on held-out prompts, and what a run of PPO kept while it learned."""

from collections.abc import Iterator, Sequence

from evaluation.page import Beside, Block, Microscope, Sample, Shade, Text
from evaluation.sources import Source
from evaluation.words import brief
from rlhf.infra.metrics import is_number

PROMPTS = 10  # of an evaluation that are shown, and of these
OPEN = 3  # before the rest is folded
SHADES = {  # the colours of the tokens; the server's page has the same names and scales
    "logratio": Shade("logratio", "log-ratio, nats", 3.0, "likelier in the base", "likelier in the tuned model"),
    "logprobs": Shade("logprobs", "log-prob, nats", 6.0, "a surprise", ""),
    "values": Shade("values", "value", 2.0, "the critic expects less", "more"),
    "rewards": Shade("rewards", "reward", 2.0, "costs", "earns"),
    "advantages": Shade("advantages", "advantage", 2.0, "worse than expected", "better"),
}


def base_beside_tuned(source: Source) -> list[Block]:
    """The first held-out prompts: what evaluate.py wrote token by token, or the texts alone where it is older than that, and
    of several tuned models.
    """
    texts, rows = source.files.get("samples.jsonl", []), source.files.get("tokens.jsonl") or []
    names = [name for name in texts[0] if name != "prompt"] if texts else ["before", "after"]
    made, rows = (token_by_token, rows) if rows and names == ["before", "after"] else (in_one_piece, texts)
    shown = [row for row in rows if {*names} <= row.keys() and "before" in row][:PROMPTS]
    if not shown:
        return []
    pairs = [[made(row, row[name]) for name in names] for row in shown]
    told = f"The first {len(pairs)} of {len(texts)} held-out prompts, in the file's order; all draw the same random numbers."
    return [Text(told), Beside([TITLES.get(name, name) for name in names], pairs, SHADES["logratio"], OPEN)]


TITLES = {"before": "base", "after": "tuned"}


def token_by_token(row: dict, x: dict) -> Sample:
    """One model's answer of a row of tokens.jsonl."""
    scores = [f"{name} {brief(x[name])}" for name in ("judge", "reward") if is_number(x.get(name))]
    return Sample(
        str(row.get("prompt", "")), x["tokens"], ", ".join(scores), {"logratio": log_ratio(x, len(x["tokens"]))}
    )


def in_one_piece(row: dict, text: str) -> Sample:
    return Sample(str(row.get("prompt", "")), [str(text)], "", {})


def log_ratio(x: dict, count: int) -> list[float | None]:
    """log-prob minus the reference's, of each of `count` tokens; None where it is not known."""
    columns = [x.get("logprobs"), x.get("ref_logprobs")]
    if not all(isinstance(column, list) and len(column) == count for column in columns):
        return [None] * count
    return [a - b if is_number(a) and is_number(b) else None for a, b in zip(*columns)]


def while_it_learned(sources: Sequence[Source]) -> list[Block]:
    """The first and the last responses that each PPO run kept; one microscope, as its colours are chosen once."""
    chosen = []
    for source in sources:
        rows = [x for x in source.files.get("samples.jsonl", []) if isinstance(x.get("response"), str)]
        steps = sorted({x["step"] for x in rows if is_number(x.get("step"))})
        for step in dict.fromkeys(steps[:1] + steps[-1:]):
            chosen += [(source.name, x) for x in rows if x.get("step") == step][:6]
    if not chosen:
        return []
    made = list(looked_at(chosen))
    known = {name for x in made for name, column in x.values.items() if any(column)}
    shades = [shade for name, shade in SHADES.items() if name in known]
    made = [
        Sample(x.prompt, x.tokens, x.head, {s.name: x.values.get(s.name, [None] * len(x.tokens)) for s in shades})
        for x in made
    ]
    told = "∅ ends a response." if shades else "No numbers per token: this samples.jsonl is older than they are."
    return [Text(f"The first and the last responses kept, the prompt in bold. {told}"), Microscope(made, shades)]


def looked_at(chosen: Sequence[tuple[str, dict]]) -> Iterator[Sample]:
    for name, x in chosen:
        numbers = [f"{key} {x[key]:.2f}" for key in ("score", "kl") if is_number(x.get(key))]
        head = f"{name}, step {x['step']}: {', '.join(numbers)}"
        tokens = x.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            yield Sample(str(x.get("prompt", "")), [f" → {x['response']}"], head, {})
            continue
        values = {
            key: [v if is_number(v) else None for v in column]
            for key in SHADES
            if isinstance(column := x.get(key), list) and len(column) == len(tokens)
        }
        values["logratio"] = log_ratio(x, len(tokens))
        yield Sample(str(x.get("prompt", "")), tokens, head, values)
