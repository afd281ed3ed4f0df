"""What a policy is measured on and by: prompts that training never saw, and a judge that PPO never asked."""

from pathlib import Path

import numpy as np
import torch

from data.loader import TokenFile, prompts_from_rows
from data.vader import load_rules
from rlhf.pretrained import open_base
from rlhf.reward_model import Score, load_reward


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
