"""Sampling: ragged prompts in, contiguous rows of prompt and response out, with the log-prob of every sampled token."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.transformer import KVCache, Transformer


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


def warp_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits of the distribution that is sampled: temperature, then top-k, then top-p (HF's order). (..., V) -> same

    top-k keeps every logit equal to the k-th largest; top-p drops, from the least likely up, while the dropped mass is
    at most 1 - top_p, and never the most likely. Dropped tokens are -inf. temperature 0 keeps the argmax alone.
    Float32 (float64 stays). ValueError for temperature < 0, top_k < 0 or top_p outside (0, 1].
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: the first two must be >= 0, top_p in (0, 1]"
        )
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
    return logits


def check_finite(numbers: Tensor) -> None:
    """ValueError where a number that came of logits is none."""
    if not bool(numbers.isfinite().all()):
        raise ValueError(
            "the model's logits are not finite: it has diverged; use an earlier checkpoint or a smaller lr"
        )


def sample_step(
    logits: Tensor, uniforms: Tensor | None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF: the first whose cumulative probability exceeds the row's uniform.

    logits (B, V), uniforms (B,) in [0, 1), or None at temperature 0 -> tokens (B,), logprobs (B,) under the sampling
    distribution, which at temperature 0 is certain: 0. ValueError for logits that give no distribution: a NaN or an
    infinity among them (-inf alone is a probability of zero).
    """
    if temperature == 0:
        check_finite(logits.amax(dim=-1))  # a NaN is the largest; the warped ones hold none
    logits = warp_logits(logits, temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1), logits.new_zeros(len(logits))
    probs = logits.softmax(dim=-1)  # (B, V)
    # a CPU adds up in float64 by itself; on a GPU a float32 scan could step onto a token of probability zero
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64 if probs.is_cuda else probs.dtype)
    total = cumulative[:, -1]
    check_finite(total)
    # strictly below the total, so that rounding never reaches past the last token with a probability
    target = torch.minimum((uniforms * total).to(total.dtype), total.nextafter(torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target[:, None], right=True)  # (B, 1)
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].log()


def row_uniforms(seed: int, iteration: int, row_ids: Iterable[int], n: int) -> Tensor:
    """Uniforms in [0, 1) that depend on (seed, iteration, row id) alone, never on the batch. (rows, n) float64"""
    rows = []
    for row in row_ids:
        digest = hashlib.blake2b(f"{seed}/{iteration}/{int(row)}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        rows.append(torch.rand(n, generator=generator, dtype=torch.float64))
    return torch.stack(rows) if rows else torch.zeros(0, n, dtype=torch.float64)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Tensor,
    prompt_lengths: Tensor,
    sampling: Sampling,
    uniforms: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
) -> Generated:
    """Continues right-padded prompts (B, P) until EOS, max_new_tokens or the end of the context; -> Generated.

    uniforms (B, max_new_tokens) decide every draw (`row_uniforms`), so a row's text does not depend on its batch;
    (B n, max_new_tokens) draws n samples per prompt, next to each other, from one prefill. temperature 0 needs none.
    progress, if given, is called with 1 after every step. ValueError when a prompt is empty or leaves no room.
    """
    device, context = prompts.device, model.config.context
    max_new_tokens, temperature = sampling.max_new_tokens, sampling.temperature
    shortest, longest = int(prompt_lengths.min()), int(prompt_lengths.max())
    if shortest < 1:
        raise ValueError("a prompt is empty; give it at least one token, such as bos")
    if longest >= context:
        raise ValueError(f"a prompt of {longest} tokens leaves no room in the model's context of {context}")
    samples = 1 if uniforms is None else len(uniforms) // len(prompts)
    if uniforms is None and temperature != 0:
        raise ValueError(f"temperature {temperature} needs uniforms")
    if uniforms is not None and uniforms.shape != (samples * len(prompts), max_new_tokens):
        raise ValueError(
            f"uniforms are {tuple(uniforms.shape)}; {len(prompts)} prompts need (a multiple of it, {max_new_tokens})"
        )

    uniforms = None if uniforms is None else uniforms.to(device)

    # 1. prefill: all prompts at once; only each row's last position is unembedded
    width = min(longest + max_new_tokens, context)
    dtype = model.norm.weight.dtype  # of the hidden states; the embedding may be stored smaller
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    cache = KVCache(model.config, len(prompts), width, dtype, device)
    prompts = prompts[:, :longest]
    hidden = model.trunk(prompts, cache, prompt_lengths)  # (B, P, D)
    hidden = hidden[torch.arange(len(prompts), device=device), prompt_lengths - 1]  # (B, D)
    if samples > 1:
        rows = torch.arange(len(prompts), device=device).repeat_interleave(samples)
        cache.keep(rows)
        hidden, prompts, prompt_lengths = hidden[rows], prompts[rows], prompt_lengths[rows]

    # 2. decode: finished rows leave the batch
    columns = torch.arange(width, device=device)
    tokens = torch.full((len(prompts), width), sampling.pad, dtype=torch.int64, device=device)
    tokens[:, :longest] = torch.where(columns[:longest] < prompt_lengths[:, None], prompts, sampling.pad)
    logprobs = torch.zeros(tokens.shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
    lengths, finished = prompt_lengths.clone(), torch.zeros(len(prompts), dtype=torch.bool, device=device)
    stop_ids = torch.tensor(sorted(sampling.stop_ids), dtype=torch.int64, device=device)
    alive = torch.arange(len(prompts), device=device)  # the row of `tokens` that each row of the cache belongs to
    for step in range(max_new_tokens):
        draws = None if uniforms is None else uniforms[alive, step]
        logits = model.unembed(hidden)  # (alive, V)
        chosen, logprob = sample_step(logits, draws, temperature, sampling.top_k, sampling.top_p)  # (alive,)
        at = lengths[alive]
        tokens[alive, at], logprobs[alive, at] = chosen, logprob.to(logprobs.dtype)
        lengths[alive] = at + 1
        finished[alive] = ended = torch.isin(chosen, stop_ids)
        going = torch.nonzero(~ended & (at + 1 < context)).flatten()
        if progress is not None:
            progress(1)
        if len(going) == 0 or step + 1 == max_new_tokens:
            break
        if len(going) < len(alive):
            alive, chosen = alive[going], chosen[going]
            cache.keep(going)
        hidden = model.trunk(chosen[:, None], cache)[:, 0]  # (alive, D)

    T = int(lengths.max())
    mask = (columns >= prompt_lengths[:, None]) & (columns < lengths[:, None])
    return Generated(tokens[:, :T], lengths, prompt_lengths, mask[:, :T], logprobs[:, :T], finished)
