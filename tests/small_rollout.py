"""A tiny policy that really acts: ragged prompts, ragged responses, some ended by EOS and some cut short; and its judges.

Id 1 is EOS. Id 12 is padding, and an ordinary token that the policy likes: only lengths may tell them apart.
"""

import copy

import torch
from reference_model import SMALL, random_ids, small_model
from torch import Tensor, nn

from model.generate import Generated, Sampling, generate, row_uniforms
from model.transformer import Transformer
from rlhf.ppo.roles import ActorCritic, Reference, logprobs_of
from rlhf.reward.model import RewardModel

PAD, EOS, TEMPERATURE = 12, 1, 0.8
PROMPT, RESPONSE = 5, 6  # longest, tokens
WIDTH = PROMPT + RESPONSE


def actor_critic(critic: str = "shared", family: str = "llama", dtype=torch.float64, **changes) -> ActorCritic:
    """A policy whose critic has an opinion: the value head starts at random, not at zero."""
    policy = ActorCritic(small_model(family, dtype, seed=15, **changes), critic, TEMPERATURE).to(dtype)
    if policy.value_head is not None:
        noise = torch.randn(SMALL["width"] + 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        with torch.no_grad():
            policy.value_head.weight.copy_(0.2 * noise[:-1])
            policy.value_head.bias.copy_(noise[-1])
    return policy


def moved(module: nn.Module, by: float, seed: int = 3) -> nn.Module:
    """The same module after every weight has moved a little, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((by * noise).to(parameter.dtype))
    return module


def base_model(family: str = "llama", dtype=torch.float64) -> Transformer:
    """Where the policy came from: near it, and not equal to it."""
    return moved(small_model(family, dtype, seed=15), 0.03)


def frozen_reference(model: Transformer, temperature: float = 1.0) -> Reference:
    """The log-probs of the model as it is now, which will be trained on."""
    return logprobs_of(copy.deepcopy(model).requires_grad_(False).eval(), temperature)


def reference(family: str = "llama", dtype=torch.float64):
    return frozen_reference(base_model(family, dtype), TEMPERATURE)


def reward_model(dtype=torch.float64, pooling: str = "mean") -> RewardModel:
    return RewardModel(small_model("qwen2", dtype, seed=4), pooling, torch.Generator().manual_seed(5)).to(dtype)


def prompts(count: int, iteration: int = 0) -> tuple[Tensor, Tensor]:
    """Right-padded prompts (count, PROMPT) of 1 to PROMPT tokens, and their lengths."""
    lengths = (3 * torch.arange(count) + iteration) % PROMPT + 1
    ids = random_ids(10 + iteration, count, PROMPT)
    return torch.where(torch.arange(PROMPT) < lengths[:, None], ids, PAD), lengths


def act(policy: ActorCritic, rows: Tensor, samples: int = 2, iteration: int = 0, temperature=TEMPERATURE) -> Generated:
    """The responses with the global ids `rows`; neighbours share a prompt, `samples` of them."""
    ids, lengths = (x[rows // samples] for x in prompts(int(rows.max()) // samples + 1, iteration))
    uniforms = row_uniforms(1, iteration, rows.tolist(), RESPONSE)
    return generate(policy.model, ids, lengths, Sampling(RESPONSE, [EOS], PAD, temperature), uniforms)
