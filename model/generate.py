"""Sampling: ragged prompts in, contiguous rows of prompt and response out, with the log-prob of every sampled token."""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.panels import Panels
from model.transformer import KVCache, Parts, Transformer

BLOCK = 64  # neighbouring tokens of the vocabulary whose probabilities are added up first
SAMPLED_AT_ONCE = 16  # rows: more of a large vocabulary leave a CPU's caches, and the memory that it keeps for reuse
PREFILLED_AT_ONCE = 8192  # tokens
PADDING = {"cpu": 64, "cuda": 4096, "mps": 4096}  # tokens that a forward may pad prompts with, or an eighth of theirs
# steps after which the device is asked who has ended: the host waits for the answer
ASKED_EVERY = {"cpu": 1, "cuda": 16, "mps": 1}


@dataclass(frozen=True)
class Sampling:
    """How a text is continued: what is drawn from, and where it ends."""

    max_new_tokens: int
    stop_ids: Iterable[int] = ()  # tokens that end a row, and are part of it
    pad: int = 0  # what fills the rows behind their end
    temperature: float = 1.0  # 0 = always the likeliest token
    top_k: int = 0  # see `warp_logits`
    top_p: float = 1.0


@dataclass(frozen=True)
class Generated:
    tokens: Tensor  # (B, T) int64: prompt, response, padding
    lengths: Tensor  # (B,) prompt and response together
    prompt_lengths: Tensor  # (B,)
    mask: Tensor  # (B, T) bool, True on response tokens, EOS included
    logprobs: Tensor  # (B, T) log-prob of each sampled token under the sampling distribution, 0 elsewhere
    finished: Tensor  # (B,) bool, True when the row ended with EOS
    states: dict[int, Tensor] = field(default_factory=dict)  # {depth: (B, T, D)}, see `generate`; anything on padding

    def tensors(self) -> dict[str, Tensor]:
        """All but the states, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "states"}

    def map(self, function: Callable[[Tensor], Tensor]) -> "Generated":
        """The same with `function` applied to every tensor, without the states."""
        return Generated(**{name: function(x) for name, x in self.tensors().items()})


def check_settings(temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> None:
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: the first two must be >= 0, top_p in (0, 1]"
        )
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p {min_p} must be in [0, 1]")


def warp_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Logits of the distribution that is sampled: temperature, top-k, top-p, min-p (HF's order). (..., V) -> same

    top-k keeps every logit equal to the k-th largest; top-p drops, from the least likely up, while the dropped mass is
    at most 1 - top_p, and never the most likely; min-p (arXiv:2407.01082) drops what is less likely than min_p times the
    most likely. Dropped tokens are -inf. temperature 0 keeps the argmax alone. Float32 (float64 stays).
    ValueError for temperature < 0, top_k < 0, top_p outside (0, 1] or min_p outside [0, 1].
    """
    check_settings(temperature, top_k, top_p, min_p)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        drop[..., -1] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    if min_p > 0:
        probs = logits.softmax(dim=-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -torch.inf)
    return logits


def check_finite(numbers: Tensor) -> None:
    """ValueError where a number that came of logits is none."""
    if not bool(numbers.isfinite().all()):
        raise ValueError(
            "the model's logits are not finite: it has diverged; use an earlier checkpoint or a smaller lr"
        )


def sample_step(
    logits: Tensor, uniforms: Tensor | None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token per row by inverse CDF: the first whose cumulative probability exceeds the row's uniform.

    logits (B, V), uniforms (B,) in [0, 1), or None at temperature 0 -> tokens (B,), logprobs (B,) under the sampling
    distribution, which at temperature 0 is certain: 0. ValueError for logits that give no distribution: a NaN or an
    infinity among them (-inf alone is a probability of zero).
    """
    tokens, logprobs, witness = draw(logits, uniforms, temperature, top_k, top_p, min_p)
    check_finite(witness)
    return tokens, logprobs


def drawn_on(device: torch.device) -> torch.device:
    """Where tokens are drawn, and their uniforms lie: on the host for Apple's GPU, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def draw(
    logits: Tensor, uniforms: Tensor | None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`sample_step` that raises nothing, so that nobody waits for a GPU: tokens, logprobs and a number (B,) that is finite
    where the row's logits gave a distribution.
    """
    if drawn_on(logits.device) != logits.device:
        return tuple(x.to(logits.device) for x in draw(logits.cpu(), uniforms, temperature, top_k, top_p, min_p))
    if len(logits) > SAMPLED_AT_ONCE and logits.is_cpu:
        parts = zip(
            logits.split(SAMPLED_AT_ONCE),
            [None] * len(logits) if uniforms is None else uniforms.split(SAMPLED_AT_ONCE),
        )
        return tuple(map(torch.cat, zip(*(draw(*part, temperature, top_k, top_p, min_p) for part in parts))))
    check_settings(temperature, top_k, top_p, min_p)
    if temperature == 0:
        highest, token = logits.max(dim=-1)  # a NaN is the largest
        zero = torch.zeros(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        return token, zero, highest
    probs = warp_logits(logits, temperature, top_k, top_p, min_p).softmax(dim=-1)  # (B, V)
    token, total = inverse_cdf(probs, uniforms)
    return token, probs.gather(-1, token[:, None])[:, 0].log(), total


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative probability exceeds the row's uniform, never one of probability zero, and what the
    row adds up to: (B, V), (B,) -> (B,) twice. Where that is no number, the token means nothing.

    Two sums: of blocks of the vocabulary, in float64, then within the block that the uniform falls into. One sum over a
    whole vocabulary takes a CPU as long as its softmax, as every number waits for the one before it.
    """
    V = probs.shape[-1]
    whole = probs[:, : V // BLOCK * BLOCK].unflatten(-1, (-1, BLOCK)).sum(-1)  # (B, V / 64)
    rest = probs[:, V // BLOCK * BLOCK :].sum(-1, keepdim=True)  # (B, 1)
    cumulative = torch.cat((whole, rest), -1).cumsum(-1, dtype=torch.float64)
    target, total = below(uniforms * cumulative[:, -1], cumulative[:, -1]), cumulative[:, -1]
    block = torch.searchsorted(cumulative, target[:, None], right=True).clamp(max=cumulative.shape[-1] - 1)  # (B, 1)
    before = torch.where(block > 0, cumulative.gather(-1, (block - 1).clamp(min=0)), 0)  # (B, 1)
    tokens = block * BLOCK + torch.arange(BLOCK, device=probs.device)  # (B, 64)
    inside = torch.where(tokens < V, probs.gather(-1, tokens.clamp(max=V - 1)), 0).cumsum(-1, dtype=torch.float64)
    target = below(target - before[:, 0], inside[:, -1])
    at = torch.searchsorted(inside, target[:, None], right=True)  # (B, 1)
    return (block * BLOCK + at).clamp(max=V - 1)[:, 0], total


def below(target: Tensor, total: Tensor) -> Tensor:
    """`target`, but less than `total`, so that rounding never reaches past the last token with a probability."""
    return torch.minimum(target, total.nextafter(torch.zeros_like(total)))


def row_uniforms(seed: int, iteration: int, row_ids: Iterable[int], n: int) -> Tensor:
    """Uniforms in [0, 1) that depend on (seed, iteration, row id) alone, never on the batch. (rows, n) float64"""
    rows = []
    for row in row_ids:
        digest = hashlib.blake2b(f"{seed}/{iteration}/{int(row)}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        rows.append(torch.rand(n, generator=generator, dtype=torch.float64))
    return torch.stack(rows) if rows else torch.zeros(0, n, dtype=torch.float64)


class Prompt(NamedTuple):
    """Neighbouring rows of the result that answer the same prompt, to be read once."""

    at: int  # of the prompts
    length: int
    first: int  # of the rows
    count: int


def shared(prompts: Tensor, lengths: list[int], samples: int) -> list[Prompt]:
    """Right-padded prompts (B, P), of each `samples` rows; equal neighbours are one, behind their ends they may differ."""
    columns = torch.arange(prompts.shape[1], device=prompts.device)
    real = columns < torch.tensor(lengths, device=prompts.device)[:, None]  # (B, P)
    same = ((prompts[1:] == prompts[:-1]) & real[1:] | ~(real[1:] | real[:-1])).all(1).tolist()  # as the one before
    firsts = [0, *(i + 1 for i in range(len(same)) if not same[i]), len(prompts)]
    return [Prompt(i, lengths[i], i * samples, (j - i) * samples) for i, j in zip(firsts, firsts[1:])]


def next_prompts(queue: list[Prompt], free: int, slack: int) -> list[Prompt]:
    """Takes from the end of the queue what is read together: prompts of like lengths for at most `free` rows.

    Padding adds `slack` tokens at most, or an eighth. A prompt with more rows than are free is read for some of them now.
    """
    taken, longest, total = [], 0, 0
    while queue and free:
        prompt = queue[-1]
        size = (len(taken) + 1) * max(longest, prompt.length)
        if taken and (size > PREFILLED_AT_ONCE or size - total - prompt.length > max(slack, total // 8)):
            break
        longest, total = max(longest, prompt.length), total + prompt.length
        queue.pop()
        if (more := prompt.count - free) > 0:
            queue.append(prompt._replace(first=prompt.first + free, count=more))
            prompt = prompt._replace(count=free)
        taken.append(prompt)
        free -= prompt.count
    return taken


class Decoding:
    """Rows that decode together, each with its own length; any may leave or join between two steps (Orca, Yu et al. 2022).

    They are the first rows of a cache, without gaps: where one leaves, the last one moves in. So a step reads no row that
    has ended, and a row that leaves costs a copy of one other. depths, ascending: `states` are those above so many layers.
    """

    def __init__(self, model: Transformer, rows: int, width: int, depths: Iterable[int] = ()):
        device, dtype = model.embed_tokens.weight.device, model.cache_dtype
        self.model, self.device, self.dtype = model, device, dtype
        self.cache = KVCache(model.config, rows, width, dtype, device)
        self.lengths: list[int] = []  # tokens in the cache of each row that decodes
        self.depths, self.states = tuple(depths), []  # a (n, T, D) each, of what was last read or stepped
        # so much more is read in one part rather than that a second one begins: a call of attention costs about 50 us
        self.slack = 100_000 // (model.config.kv_heads * model.config.head_dim) if device.type == "cpu" else 1 << 60

    def step(self, ids: Tensor, rows: int = 0, columns: int | None = None) -> Tensor:
        """Hidden states (n, D) after one more token in each row: ids (n,).

        columns, where given: every row attends to so many, at least; else to as many as rows of its length need. rows: so
        many are computed at least, and the rest of them comes behind.
        """
        blank = max(0, rows - len(ids))  # rows that nobody reads
        lengths, longest = self.lengths + [0] * blank, max(self.lengths)
        parts = None
        if columns is None:
            parts = alike([n + 1 for n in lengths], self.slack)
            parts = parts if len(parts) > 1 else None
        view = self.cache.view(slice(0, len(lengths)), lengths, max(longest, (columns or 0) - 1), parts)
        ids = torch.cat((ids, ids.new_zeros(blank)))[:, None]
        hidden, self.states = self.model.trunk_and_states(ids, self.depths, view)
        self.lengths = [n + 1 for n in self.lengths]
        return hidden[:, 0]

    def read(self, prompts: Tensor, taken: list[Prompt]) -> Tensor:
        """Some of right-padded prompts (B, P) go into the next rows, so often as they say; -> last hidden states (n, D)."""
        first, n, device = len(self.lengths), len(taken), self.device
        at, lengths, counts = (torch.tensor(x, device=device) for x in zip(*((p.at, p.length, p.count) for p in taken)))
        longest = max(prompt.length for prompt in taken)
        view = self.cache.view(slice(first, first + n), [0] * n, 0)
        ids = prompts[at, :longest]  # (n, T)
        hidden, self.states = self.model.trunk_and_states(ids, self.depths, view, lengths)  # (n, T, D)
        places = torch.arange(n, device=device)
        hidden = hidden[places, lengths - 1].repeat_interleave(counts, 0)
        self.lengths += (prompt.length for prompt in taken for _ in range(prompt.count))
        if len(hidden) > n:
            rows = torch.arange(first, first + len(hidden), device=device)
            self.cache.copy_rows(first + places.repeat_interleave(counts), rows, longest)
        return hidden

    def leave(self, rows: set[int]) -> list[int]:
        """These rows end. -> for each of those that stay, which it was."""
        now = list(range(len(self.lengths) - len(rows)))
        last = [row for row in range(len(now), len(self.lengths)) if row not in rows]
        holes = [row for row in now if row in rows]
        if holes:
            length = max(self.lengths[row] for row in last)
            self.cache.copy_rows(*(torch.tensor(x, device=self.device) for x in (last, holes)), length)
        for source, target in zip(last, holes):
            now[target] = source
        self.lengths = [self.lengths[row] for row in now]
        return now


def alike(lengths: list[int], slack: int) -> Parts:
    """Neighbours of like lengths together, so that padding each part to its longest adds at most `slack` in it."""
    parts, first, longest, total = [], 0, 0, 0
    for row, n in enumerate(lengths):
        if (row + 1 - first) * max(longest, n) - total - n > slack:
            parts.append((slice(first, row), longest))
            first, longest, total = row, 0, 0
        longest, total = max(longest, n), total + n
    return [*parts, (slice(first, len(lengths)), longest)]


def checked(model: Transformer, lengths: list[int], sampling: Sampling, uniforms: Tensor | None, at_once: int) -> int:
    """How many samples each of the prompts gets. ValueError for what cannot be continued like that."""
    context = model.config.context
    if min(lengths) < 1:
        raise ValueError("a prompt is empty; give it at least one token, such as bos")
    if max(lengths) >= context:
        raise ValueError(f"a prompt of {max(lengths)} tokens leaves no room in the model's context of {context}")
    if uniforms is None and sampling.temperature != 0:
        raise ValueError(f"temperature {sampling.temperature} needs uniforms")
    samples = 1 if uniforms is None else len(uniforms) // len(lengths)
    if uniforms is not None and uniforms.shape != (samples * len(lengths), sampling.max_new_tokens):
        need = f"{len(lengths)} prompts need (a multiple of it, {sampling.max_new_tokens})"
        raise ValueError(f"uniforms are {tuple(uniforms.shape)}; {need}")
    if at_once < 1:
        raise ValueError(f"at_once is {at_once}; at least one row must decode")
    return samples


def panels_of(model: Transformer, rows: int, steps: int) -> Panels | None:
    """The panels of a model that keeps some, for so many rows and at most so many steps."""
    panels = None if torch.is_autocast_enabled("cpu") else getattr(model, "panels", None)
    if panels is not None:
        panels.lay(rows, steps)
    return panels


def next_states(decoding: Decoding, ids: Tensor, panels: Panels | None) -> Tensor:
    """One more token in each row. (n,) -> (n, D)"""
    if panels is None:
        return decoding.step(ids)
    with panels:
        return decoding.step(ids, panels.filled(len(ids)))[: len(ids)]


def logits_of(model: Transformer, hidden: Tensor, panels: Panels | None) -> Tensor:
    """(n, D) -> (n, V)"""
    with panels or contextlib.nullcontext():
        return model.unembed(hidden)


def with_room(prompts: Tensor, lengths: Tensor, width: int, pad: int) -> Tensor:
    """Right-padded prompts (B, P) of these lengths, `width` columns wide, padded with `pad`. (B, width)"""
    there = torch.arange(prompts.shape[1], device=prompts.device) < lengths[:, None]
    return F.pad(torch.where(there, prompts, pad), (0, width - prompts.shape[1]), value=pad)


def without(gone: set[int], decoding: Decoding, alive: list[int], x: Tensor) -> tuple[list[int], Tensor]:
    """The rows that stay when these places end, and of x (n, ...) what belongs to them."""
    if not gone:
        return alive, x
    stay = decoding.leave(gone)
    return [alive[place] for place in stay], x[torch.tensor(stay, dtype=torch.int64, device=x.device)]


class Kept:
    """States of the tokens of all rows of a result, while these decode: {depth: (rows, width, D)}."""

    def __init__(self, decoding: Decoding, rows: int, width: int):
        model, self.decoding = decoding.model, decoding
        shape, how = (rows, width, model.config.width), {"dtype": model.dtype, "device": decoding.device}
        self.states = {depth: torch.zeros(shape, **how) for depth in decoding.depths}

    def read(self, taken: list[Prompt]) -> None:
        """Those of prompts that were read just now."""
        for kept, states in zip(self.states.values(), self.decoding.states):
            for prompt, x in zip(taken, states):
                kept[prompt.first : prompt.first + prompt.count, : prompt.length] = x[: prompt.length]

    def step(self, rows: Tensor, columns: Tensor) -> None:
        """Those of a token of each of these rows, in these columns."""
        for kept, states in zip(self.states.values(), self.decoding.states):
            kept[rows, columns] = states[: len(rows), 0]

    def up_to(self, width: int) -> dict[int, Tensor]:
        return {depth: x[:, :width] for depth, x in self.states.items()}


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Tensor,
    prompt_lengths: Tensor,
    sampling: Sampling,
    uniforms: Tensor | None = None,
    at_once: int = 1 << 30,
    progress: Callable[[int], object] = lambda rows: None,
    on_token: Callable[[int, int], object] | None = None,
    depths: Iterable[int] = (),
) -> Generated:
    """Continues right-padded prompts (B, P) until EOS, max_new_tokens or the end of the context; -> Generated.

    uniforms (B, max_new_tokens) decide every draw (`row_uniforms`), so a row's text does not depend on its batch;
    (B n, max_new_tokens) draws n samples per prompt, next to each other. temperature 0 needs none. Equal neighbours among
    the prompts are read once. at_once: so many rows decode together, which bounds memory; the others wait until some have
    ended. progress is told how many have ended, on_token every token that is drawn, as (row of the result, id). depths: the
    states above so many layers are kept, a last token's by one more step. ValueError when a prompt is empty or leaves no room.
    """
    device, where, wanted = prompts.device, drawn_on(prompts.device), prompt_lengths.tolist()
    how = sampling.temperature, sampling.top_k, sampling.top_p
    samples = checked(model, wanted, sampling, uniforms, at_once)
    uniforms = None if uniforms is None else uniforms.to(where)
    rows, longest = samples * len(prompts), max(wanted)
    width, at_once = min(longest + sampling.max_new_tokens, model.config.context), min(at_once, rows)
    decoding = Decoding(model, at_once, width, sorted(depths))
    panels, kept = panels_of(model, at_once, sampling.max_new_tokens), Kept(decoding, rows, width + 1)

    # 1. the result: prompts, and room behind them; one column more, for what rows write that have ended
    begin, prompts = prompt_lengths.repeat_interleave(samples), prompts[:, :longest]  # (rows,)
    columns = torch.arange(width + 1, device=device)
    tokens = with_room(prompts.repeat_interleave(samples, 0), begin, width + 1, sampling.pad)
    dtype = torch.promote_types(decoding.dtype, torch.float32)
    logprobs = torch.zeros(tokens.shape, dtype=dtype, device=device)
    lengths, finished = begin.clone(), torch.zeros_like(begin, dtype=torch.bool)
    stop_ids = torch.tensor(sorted(sampling.stop_ids), dtype=torch.int64, device=device)
    ends = [min(n + sampling.max_new_tokens, width) for n in wanted for _ in range(samples)]  # at the latest

    # 2. who waits takes the places of those who have ended; then a token each
    queue = sorted(shared(prompts, wanted, samples), key=lambda prompt: (prompt.length, -prompt.first))
    alive: list[int] = []  # the row of the result that each row of the cache belongs to
    hidden, witnesses = torch.zeros(0, model.config.width, dtype=decoding.dtype, device=device), []
    for step in itertools.count(1):
        if queue and 4 * (at_once - len(alive)) >= at_once:  # not one by one: several are read in the time of one
            while taken := next_prompts(queue, at_once - len(alive), PADDING[device.type]):
                last = decoding.read(prompts, taken)
                kept.read(taken)
                hidden = torch.cat((hidden.to(last.dtype), last))
                alive += (prompt.first + k for prompt in taken for k in range(prompt.count))
        index = torch.tensor(alive, device=device)
        at, going = lengths[index], ~finished[index]  # one that has ended may not have been asked since
        draws = None if uniforms is None else uniforms[index.to(where), (at - begin[index]).to(where)]
        chosen, logprob, witness = draw(logits_of(model, hidden, panels), draws, *how)
        tokens[index, at] = torch.where(going, chosen, sampling.pad)
        logprobs[index, at] = torch.where(going, logprob, 0).to(dtype)
        lengths[index] = at + going
        finished[index] |= torch.isin(chosen, stop_ids)
        witnesses.append(witness)

        gone = {place for place, n in enumerate(decoding.lengths) if n + 1 == ends[alive[place]]}
        if step % ASKED_EVERY[device.type] == 0 or len(gone) == len(alive):
            check_finite(torch.cat(witnesses))
            witnesses.clear()
            gone |= {place for place, ended in enumerate(finished[index].tolist()) if ended}
        for place in going.nonzero()[:, 0].tolist() if on_token else ():
            on_token(alive[place], int(chosen[place]))
        if gone:
            progress(len(gone))
        if not kept.states:
            alive, chosen = without(gone, decoding, alive, chosen)
        hidden = next_states(decoding, chosen, panels) if alive else hidden[:0]
        if kept.states:
            kept.step(index, torch.where(going, at, width))
            alive, hidden = without(gone, decoding, alive, hidden)
        if not (alive or queue):
            break

    T = int(lengths.max())
    mask = (columns >= begin[:, None]) & (columns < lengths[:, None])
    return Generated(tokens[:, :T], lengths, begin, mask[:, :T], logprobs[:, :T], finished, kept.up_to(T))
