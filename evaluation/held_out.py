"""What a policy is measured on and by: prompts that training never saw, and a judge that PPO never asked."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.loader import TokenFile, in_order, prompts_from_rows
from model.generate import Generated, Sampling, generate, row_uniforms
from model.transformer import Transformer
from rlhf.kl import k1, k3
from rlhf.reward.model import Score


def held_out_prompts(data: str, split: str, prompt_tokens: int, sources: Sequence[str]) -> list[np.ndarray]:
    """Different prompts of the split that no training sentence begins with: short prompts often do.

    bos and `prompt_tokens` text tokens each, of these sources, () for all; ValueError if there is none.
    """
    train, held_out = (
        prompts_from_rows(TokenFile(f"{data}/{name}"), prompt_tokens, sources) for name in ("train", split)
    )
    seen = {tuple(prompt) for prompt in train}
    unseen = {key: prompt for prompt in held_out if (key := tuple(prompt)) not in seen}
    if not unseen:
        raise ValueError(f"all {len(held_out)} prompts of {data}/{split} also begin a training sentence")
    return list(unseen.values())


def sample_groups(
    model: Transformer,
    prompts: Tensor,
    lengths: Tensor,
    n: int,
    sampling: Sampling,
    seed: int,
) -> list[Generated]:
    """n responses per prompt next to each other, in groups of whole prompts; the first of each is the same draw for any n.

    prompts (P, T) right-padded, lengths (P,). What a row draws depends on (seed, its place) alone, so models can be compared.
    """
    groups = []
    at_once = max(1, min(64, 1024 // n))  # prompts: the cache holds all their responses
    for rows in tqdm(list(in_order(len(prompts), at_once)), desc="sample", leave=False, disable=None):
        ids = [int(row) + k * len(prompts) for row in rows for k in range(n)]
        uniforms = row_uniforms(seed, 0, ids, sampling.max_new_tokens).to(prompts.device)
        groups.append(generate(model, prompts[rows], lengths[rows], sampling, uniforms))
    return groups


def nth_of(groups: list[Generated], n: int, k: int = 0) -> list[Generated]:
    """The k-th of every prompt's n responses."""
    return [Generated(**{name: x[k::n] for name, x in vars(group).items()}) for group in groups]


def scores(score: Score, groups: list[Generated], n: int = 1) -> np.ndarray:
    """What the n responses of each of P prompts earn: (P, n).

    The first of all prompts are read together, then the second ...: what shares a batch, and with it the last digit, is
    the same for any n, so that a model against itself is a draw.
    """
    columns = [torch.cat([score(g.tokens, g.lengths, g.mask) for g in nth_of(groups, n, k)]) for k in range(n)]
    return torch.stack(columns, 1).double().cpu().numpy()


def divergence(groups: list[Generated], policy, base) -> dict[str, np.ndarray]:
    """KL(policy || base) of every response in nats, by k1 (its mean over prompts is unbiased) and k3, (rows,) each;
    its negative log-likelihood for the base, nats, and its length, tokens.
    """
    parts = []
    for group in groups:
        theirs = base(group.tokens, group.mask)  # (B, T), zero outside
        ours = theirs if policy is base else policy(group.tokens, group.mask)
        parts.append(torch.stack([k1(ours, theirs).sum(1), k3(ours, theirs).sum(1), -theirs.sum(1), group.mask.sum(1)]))
    kl, kl_k3, nll, length = torch.cat(parts, 1).double().cpu().numpy()
    return {"kl": kl, "kl_k3": kl_k3, "nll": nll, "length": length}
