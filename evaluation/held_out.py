"""What a policy is measured on and by: prompts that training never saw, and a judge that PPO never asked."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.loader import TokenFile, in_order, prompts_from_rows
from data.vader import load_rules
from model.generate import Generated, generate, row_uniforms
from model.transformer import Transformer
from rlhf.infra import checkpoint
from rlhf.kl import k1, k3
from rlhf.lm.pretrained import open_base
from rlhf.reward.model import Score
from rlhf.reward.scorer import load_reward


def held_out_prompts(data: str, split: str, prompt_tokens: int, domain: str | None) -> list[np.ndarray]:
    """Different prompts of the split that no training sentence begins with: short prompts often do.

    bos and `prompt_tokens` text tokens each, of one domain, or None for all; ValueError if there is none.
    """
    domains = [domain] if domain else ()
    train, held_out = (
        prompts_from_rows(TokenFile(f"{data}/{name}"), prompt_tokens, domains) for name in ("train", split)
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
    seed: int,
    response_tokens: int,
    stop_ids: Iterable[int],
    pad: int,
    temperature: float,
) -> list[Generated]:
    """n responses per prompt next to each other, in groups of whole prompts; the first of each is the same draw for any n.

    prompts (P, T) right-padded, lengths (P,). What a row draws depends on (seed, its place) alone, so models can be compared.
    """
    groups = []
    at_once = max(1, min(64, 1024 // n))  # prompts: the cache holds all their responses
    for rows in tqdm(list(in_order(len(prompts), at_once)), desc="sample", leave=False, disable=None):
        ids = [int(row) + k * len(prompts) for row in rows for k in range(n)]
        uniforms = row_uniforms(seed, 0, ids, response_tokens).to(prompts.device)
        chosen = (prompts[rows], lengths[rows])
        groups.append(generate(model, *chosen, response_tokens, uniforms, stop_ids, pad, temperature))
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


def vader_judge(data: str, tokenizer) -> Score:
    """The VADER rules that came with the data, on the whole text: -1 to 1."""
    rules = load_rules(data)
    return lambda tokens, lengths, mask: torch.tensor(
        [rules(tokenizer.decode(row[:n].tolist())) for row, n in zip(tokens, lengths)], device=tokens.device
    )


def load_judge(spec: str, data: str, tokenizer, device: torch.device | str = "cpu", base=None) -> Score:
    """The judge named by `spec` as score(tokens, lengths, mask) -> (B,); it reads the whole text.

    "vader" (the rules in `data`), a reward model's directory, or file.py:function; `base` as in `load_reward`.
    ValueError or FileNotFoundError for what is none of these.
    """
    if spec == "vader":
        return vader_judge(data, tokenizer)
    if not Path(spec).exists() and not spec.rpartition(":")[0].endswith(".py"):
        raise ValueError(f"the judge {spec} is neither vader, a reward model's directory nor file.py:function")
    return load_reward(spec, tokenizer, device, base, open_base=open_base)


def score_digest(spec: str | None) -> str | None:
    """sha256 of the weights of a reward or judge, or of its Python file; None for vader, whose rules are pinned, or nobody."""
    if spec in (None, "vader"):
        return None
    file = spec.rpartition(":")[0]
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file.endswith(".py") else checkpoint.digest(spec)


def temperature_of(spec: str) -> float:
    """At which differences of this reward's scores become probabilities: as train_rm.py fitted it, 1 for a function."""
    if spec.rpartition(":")[0].endswith(".py"):
        return 1.0
    return float(checkpoint.load(checkpoint.resolve(spec)).tensors.get("temperature", 1.0))
