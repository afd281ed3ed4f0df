"""What the models say about a response that is already there: its score, and every token's log-prob, KL, value and reward."""

from pathlib import Path

import torch
from torch import Tensor

from model.transformer import Transformer
from rlhf.infra import checkpoint
from rlhf.kl import full_kl
from rlhf.lm.pretrained import critic_trunk
from rlhf.reward.model import Score

PART = 256  # positions unembedded at once


class Scorer:
    """Calls of the thread that owns the models. reference, reward and values may be None."""

    def __init__(self, model: Transformer, reference: Transformer | None, reward: Score | None, values):
        self.model, self.reference, self.reward, self.values = model, reference, reward, values
        self.device = model.embed_tokens.weight.device

    @torch.no_grad()
    def score(self, prompt: list[int], response: list[int]) -> float:
        """The reward model's score of the response."""
        tokens = torch.tensor([prompt + response], device=self.device)  # (1, T)
        lengths = torch.tensor([tokens.shape[1]], device=self.device)
        mask = torch.arange(tokens.shape[1], device=self.device)[None] >= len(prompt)
        return float(self.reward(tokens, lengths, mask))

    @torch.no_grad()
    def tokens(self, prompt: list[int], response: list[int]) -> list[dict]:
        """{"id", "logprob", "kl", "value", "reward"} of each response token; kl is exact, over the whole vocabulary."""
        tokens, start = torch.tensor([prompt + response], device=self.device), len(prompt) - 1
        hidden = self.model.trunk(tokens[:, :-1])[0, start:]  # (N, D): row t predicts response token t
        other = None if self.reference is None else self.reference.trunk(tokens[:, :-1])[0, start:]
        values = [None] * len(response) if self.values is None else self.values(tokens)[start:].tolist()
        logprobs, kls = [], []
        for at in range(0, len(response), PART):
            logits, ids = self.model.unembed(hidden[at : at + PART]), response[at : at + PART]
            logp = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            logprobs += logp.gather(-1, torch.tensor(ids, device=self.device)[:, None])[:, 0].tolist()
            if other is not None:
                kls += full_kl(logits, self.reference.unembed(other[at : at + PART])).clamp(min=0).tolist()
        rewards = [None] * len(response)
        if self.reward is not None and response:
            rewards[-1] = self.score(prompt, response)
        return [
            {"id": i, "logprob": p, "kl": kl, "value": value, "reward": reward}
            for i, p, kl, value, reward in zip(response, logprobs, kls or [None] * len(response), values, rewards)
        ]


def load_values(path: str | Path, model: Transformer):
    """tokens (1, T) -> V before each token after the first, (T-1,), from a policy checkpoint; None where it holds no critic.

    model: the checkpoint's policy, which a shared critic reads.
    """
    if checkpoint.latest(path) is None and checkpoint.read_config(Path(path)) is None:
        return None  # a model of another format
    saved = checkpoint.load(checkpoint.resolve(path))
    tensors, device = saved.tensors, model.norm.weight.device
    if saved.config.get("kind") != "policy" or "value_head.weight" not in tensors:
        return None
    trunk = model
    if any(name.startswith("value_trunk.") for name in tensors):
        trunk = critic_trunk(saved, path, device).requires_grad_(False).eval()
    weight, bias = (tensors[f"value_head.{name}"].to(device) for name in ("weight", "bias"))

    def values(tokens: Tensor) -> Tensor:
        return (trunk.trunk(tokens[:, :-1])[0].to(weight.dtype) @ weight.T + bias)[:, 0]

    return values
