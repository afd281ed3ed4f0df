"""What an export cost: the same texts and the same random numbers through the original and through what was written."""

import math
import time
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from model.generate import Sampling, generate, row_uniforms
from model.quantize import decoding_path
from model.transformer import Transformer
from rlhf.lm.language_model import predictions
from rlhf.reward.model import Score
from rlhf.statistics import Estimate, paired_bootstrap


@torch.no_grad()
def compare(original: Transformer, exported: Transformer, batches: Iterable[tuple[Tensor, Tensor]]) -> dict:
    """Perplexities, KL(original || exported) in nats per token and how often both find the same token likeliest.

    batches: tokens (B, T) and the mask (B, T) of the tokens to predict. An int8 model computes as it does when it decodes.
    """
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for tokens, mask in batches:
        logits, targets = predictions(original, original.trunk(tokens[:, :-1]), tokens, mask)
        p = logits.log_softmax(-1)  # (N, V)
        with decoding_path(exported):
            logits, _ = predictions(exported, exported.trunk(tokens[:, :-1]), tokens, mask)
        q = logits.log_softmax(-1)
        before, after = (-x.gather(1, targets[:, None])[:, 0] for x in (p, q))
        kl, same = (p.exp() * (p - q)).sum(1), p.argmax(1) == q.argmax(1)
        sums += torch.stack([x.cpu().double().sum() for x in (before, after, kl, same)])
        count += len(targets)
    before, after, kl, same = (sums / count).tolist()
    return {
        "perplexity": {"before": math.exp(before), "after": math.exp(after)},
        "kl": kl,
        "top1": same,
        "tokens": count,
    }


@torch.no_grad()
def reward_change(
    models: dict[str, Transformer],
    score: Score,
    prompts: list[tuple[Tensor, Tensor, Tensor | None]],
    sampling: Sampling,
    seed: int = 7,
) -> dict:
    """Mean reward of one response per prompt, "before" and "after", drawn with the same random numbers; the mean change
    with its 95% bootstrap interval over prompts. prompts: batches of (B, P) tokens, their lengths (B,), and which of the
    data's they are (B,), None where they are of none.
    """
    scores = {name: [] for name in models}
    for nth, (tokens, lengths, rows) in enumerate(prompts):
        uniforms = row_uniforms(seed, nth, range(len(tokens)), sampling.max_new_tokens)
        for name, model in models.items():
            out = generate(model, tokens, lengths, sampling, uniforms)
            scores[name].append(score(out.tokens, out.lengths, out.mask, rows).cpu().double())
    before, after = (torch.cat(scores[name]).numpy() for name in ("before", "after"))
    change: np.ndarray = after - before
    low, high = paired_bootstrap(change)
    means = {"before": float(before.mean()), "after": float(after.mean()), "change": float(change.mean())}
    return {**means, "low": low, "high": high, "prompts": len(change)}


@torch.no_grad()
def decoding_speed(
    models: dict[str, Transformer], prompt: Tensor, batch: int = 1, tokens: int = 16, rounds: int = 3
) -> dict:
    """Tokens per second of so many texts together, wall clock: the best of some rounds in turns, after one to warm up.

    prompt (P,): what they begin with, the first of them differently.
    """
    best, lengths, prompts = dict.fromkeys(models, 0.0), torch.full((batch,), len(prompt)), prompt.repeat(batch, 1)
    prompts[:, 0] = (prompts[:, 0] + torch.arange(batch)) % next(
        iter(models.values())
    ).config.vocab_size  # else read once
    for nth in range(1 + rounds):
        for name, model in models.items():
            start = time.perf_counter()
            generate(model, prompts, lengths, Sampling(tokens, temperature=0.0))
            if nth:
                best[name] = max(best[name], batch * tokens / (time.perf_counter() - start))
    return {**best, "threads": torch.get_num_threads()}


def check(receipt: dict, max_kl: float) -> None:
    """ValueError if the export is further from the original than allowed."""
    if not receipt["kl"] <= max_kl:  # a NaN is further, too
        raise ValueError(
            f"the export is {receipt['kl']:.4f} nats per token from the original, more than --max_kl={max_kl:g}: "
            "nothing was written; use a finer format, or raise --max_kl"
        )


def beside(speed: dict) -> str:
    return f" (bf16 {speed['bf16']:.1f})" if "bf16" in speed else ""


def lines(receipt: dict) -> str:
    """The receipt as people read it."""
    size, perplexity, speed = (receipt[name] for name in ("bytes", "perplexity", "tokens_per_s"))
    rows = [
        f"size         {size['before'] / 1e6:,.1f} MB as float32 -> {size['after'] / 1e6:,.1f} MB, "
        f"{size['after'] / size['before']:.2f} of it",
        f"perplexity   {perplexity['before']:.2f} -> {perplexity['after']:.2f}, "
        f"{perplexity['after'] / perplexity['before'] - 1:+.2%}",
        f"KL           {receipt['kl']:.4f} nats per token",
        f"top-1        {receipt['top1']:.1%} the same, {receipt['tokens']} tokens of {receipt['text']}",
        f"decoding     {speed['before']:.1f} -> {speed['after']:.1f} tokens/s at batch 1{beside(speed)}, "
        f"{speed['threads']} threads",
    ]
    if many := receipt.get("tokens_per_s_16"):  # of int8
        rows.append(f"             {many['before']:.1f} -> {many['after']:.1f} tokens/s at batch 16{beside(many)}")
        slower = [
            f"{speed['after'] / speed[name]:.2f} of {said}'s speed at batch {batch}"
            for batch, speed in ((1, speed), (16, many))
            for name, said in (("before", "float32"), ("bf16", "bf16"))
            if name in speed and speed["after"] < speed[name]
        ]
        told = f"slower: {', '.join(slower)}" if slower else "the fastest at both"
        rows.append(
            f"             on this CPU int8 is {told}; serve.py and sample.py take what is faster where they run"
        )
    if reward := receipt.get("reward"):
        rows.append(
            f"reward       {reward['before']:.3f} -> {reward['after']:.3f}, change "
            f"{Estimate(reward['change'], reward['low'], reward['high']):+.3f}, {reward['prompts']} prompts"
        )
    return "\n".join(rows)
