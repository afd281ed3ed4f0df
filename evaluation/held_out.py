"""What a policy is measured on and by: prompts that training never saw, and a judge that PPO never asked."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.chat import check_template
from data.loader import StartLoader, drawn, open_data, prompts_of, unseen
from data.records import Record
from data.tokenizer import Detokenizer, Tokenizer
from model.generate import Generated, Sampling, generate, row_uniforms
from model.transformer import Transformer
from rlhf.kl import k1, k3
from rlhf.ppo.roles import Reference
from rlhf.reward.model import Score


@dataclass(frozen=True)
class HeldOut:
    """Different prompts of a split that are no training prompts."""

    prompts: Tensor  # (P, T) right-padded
    lengths: Tensor  # (P,)
    rows: Tensor  # (P,) which of the data's they are
    records: Callable[[Tensor], list[Record]]  # rows -> what was read for them
    stop_ids: tuple[int, ...]  # that end an answer in the data's template; none for plain text
    are_starts: bool  # the beginnings of texts, which have no prompts of their own
    summary: str
    template: str | None = None  # sha256 of the data's chat template


def held_out_prompts(
    data: str, split: str, count: int, seed: int, tokenizer: Tokenizer, prompt_tokens: int | None, **how
) -> HeldOut:
    """`count` prompts of the split, at most all that no training row has too: short ones often stand in both.

    prompt_tokens: the beginnings of the texts instead, None = where the data have no prompts; how: see `prompts_of`.
    ValueError if there is none, and for data in another chat template than the tokenizer's.
    """
    splits = {name: open_data(data, name) for name in ("train", split)}
    train, held_out = (prompts_of(x, 1, seed, prompt_tokens, **how) for x in splits.values())
    stop_ids = check_template(tokenizer, splits[split].template, "the base")
    batch = drawn(held_out, unseen(held_out, train), count, seed)
    starts = isinstance(held_out, StartLoader)
    facts = (tuple(sorted(stop_ids)), starts, held_out.summary, splits[split].template)
    return HeldOut(*batch, held_out.records, *facts)


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
    size = n * max(1, min(64, 1024 // n))  # responses of a group; so many decode together, as others end
    ids = [row + k * len(prompts) for row in range(len(prompts)) for k in range(n)]
    uniforms = row_uniforms(seed, 0, ids, sampling.max_new_tokens) if sampling.temperature else None
    with tqdm(total=len(ids), desc="sample", leave=False, disable=None) as bar:
        whole = generate(model, prompts, lengths, sampling, uniforms, size, bar.update)
    return [trimmed(whole, slice(first, first + size)) for first in range(0, len(ids), size)]


def trimmed(whole: Generated, rows: slice) -> Generated:
    """Some rows, without the columns in which all of them are padding."""
    longest = int(whole.lengths[rows].max())
    return whole.map(lambda x: x[rows, :longest] if x.dim() > 1 else x[rows])


def nth_of(groups: list[Generated], n: int, k: int = 0) -> list[Generated]:
    """The k-th of every prompt's n responses."""
    return [group.map(lambda x: x[k::n]) for group in groups]


def measured(
    groups: list[Generated],
    scores: dict[str, Score],
    rows: Tensor | None,
    n: int = 1,
    logprobs: tuple[Reference, Reference] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What the n responses of each of P prompts earn, {score: (P, n)}; and of the first of each, {what: (P,)}: its KL to the
    base in nats, by k1 (its mean over prompts is unbiased) and k3, its negative log-likelihood for the base, nats, and its
    length, tokens. rows (P,): which of the data's prompts were answered; None where they are not of the data. logprobs: the
    policy's and the base's; None: nobody asks for the second.

    The first of all prompts are read together, then the second ...: what shares a batch, and with it the last digit, is
    the same for any n, so that a model against itself is a draw. All read a group before the next one, so that those who
    read the same frozen trunk do it in one pass.
    """
    sizes = [len(group.tokens) // n for group in groups]
    asked = [None] * len(sizes) if rows is None else rows.split(sizes)
    earned, moved = {what: [] for what in scores}, []
    for k in range(n):
        for group, which in zip(nth_of(groups, n, k), asked):
            for what, score in scores.items():
                earned[what].append(score(group.tokens, group.lengths, group.mask, which))
            if logprobs and k == 0:
                moved.append(divergence(group, *logprobs))
    earned = {what: torch.cat(parts).reshape(n, -1).T.cpu().double().numpy() for what, parts in earned.items()}
    return earned, dict(zip(DIVERGENCE, torch.cat(moved, 1).cpu().double().numpy())) if moved else {}


DIVERGENCE = ("kl", "kl_k3", "nll", "length")


def divergence(group: Generated, policy: Reference, base: Reference) -> Tensor:
    """Those of every response: (4, B)."""
    theirs = base(group.tokens, group.mask)  # (B, T), zero outside
    ours = theirs if policy is base else policy(group.tokens, group.mask)
    return torch.stack([k1(ours, theirs).sum(1), k3(ours, theirs).sum(1), -theirs.sum(1), group.mask.sum(1)])


def token_by_token(first: Generated, policy, base, tokenizer: Tokenizer) -> list[dict]:
    """Every response as the report colours it: its tokens' texts, and their log-probs under the tuned policy and the base."""
    ours, theirs = (logprobs(first.tokens, first.mask).cpu() for logprobs in (policy, base))  # (B, T), zero outside
    rows = []
    for ids, mask, a, b in zip(first.tokens.cpu(), first.mask.cpu(), ours, theirs):
        pieces = Detokenizer(tokenizer)
        texts = [pieces.push(i) for i in ids[mask].tolist()]
        texts[-1:] = [text + pieces.flush() for text in texts[-1:]]
        numbers = {
            name: [round(x, 4) for x in row[mask].tolist()] for name, row in (("logprobs", a), ("ref_logprobs", b))
        }
        rows.append({"tokens": texts, **numbers})
    return rows
