"""What the models say about a response that is already there: its score, and every token's log-prob, KL, value and reward."""

import math
from pathlib import Path

import torch
from torch import Tensor

from model.transformer import Transformer
from rlhf.infra import checkpoint
from rlhf.kl import full_kl
from rlhf.lm.pretrained import critic_trunk
from rlhf.reward.scorer import Scorer as Reward

PART = 256  # positions unembedded at once


class Scorer:
    """Calls of the thread that owns the models. reference, reward and values may be None.

    end: the token that ends a response in the data, and so in the reward's training, in `evaluate.py rm` and in PPO: eos
    after plain text, the template's in a conversation. Some read the score there.
    """

    def __init__(self, model: Transformer, reference: Transformer | None, reward: Reward | None, values):
        self.model, self.reference, self.reward, self.values = model, reference, reward, values
        self.device = model.embed_tokens.weight.device
        contexts = [x.config.context for x in (model, reference) if x is not None]
        if reward is not None:
            contexts.append((reward.context or min(contexts)) - 1)  # the end follows
        self.context = min(contexts)  # tokens of prompt and response

    @torch.no_grad()
    def score(self, prompt: list[int], response: list[int], end: int) -> float:
        """The reward model's score of the response, which ends here."""
        tokens = torch.tensor([[*prompt, *response, end]], device=self.device)  # (1, T)
        lengths = torch.tensor([tokens.shape[1]], device=self.device)
        mask = torch.arange(tokens.shape[1], device=self.device)[None] >= len(prompt)
        return number(float(self.reward.score(tokens, lengths, mask)), "the score")

    @torch.no_grad()
    def tokens(self, prompt: list[int], response: list[int], end: int, top: int = 0) -> list[dict]:
        """{"id", "logprob", "logratio", "kl", "value", "reward"} of each response token, and "top" where it is above 0.

        logratio = log pi(token) - log pi_ref(token), whose mean over what pi samples is the KL; kl is exact, over the whole
        vocabulary. top: so many tokens that pi finds likeliest there, as {"id", "logprob", "ref_logprob"}, the best first.
        """
        tokens, start = torch.tensor([prompt + response], device=self.device), len(prompt) - 1
        hidden = self.model.trunk(tokens[:, :-1])[0, start:]  # (N, D): row t predicts response token t
        other = None if self.reference is None else self.reference.trunk(tokens[:, :-1])[0, start:]
        values = [None] * len(response) if self.values is None else self.values(tokens)[start:].tolist()
        logprobs, ratios, kls, best = [], [], [], []
        for at in range(0, len(response), PART):
            logits, ids = self.model.unembed(hidden[at : at + PART]), torch.tensor(response[at : at + PART])
            logp = chosen(logits, ids.to(self.device))
            logprobs += logp.tolist()
            ref_logits = None if other is None else self.reference.unembed(other[at : at + PART])
            if top:
                best += likeliest(logits, ref_logits, top)
            if other is not None:
                ratios += (logp - chosen(ref_logits, ids.to(self.device))).tolist()
                kls += full_kl(logits, ref_logits).clamp(min=0).tolist()
        for what, some in (("a log-prob", logprobs), ("a log-ratio", ratios), ("a KL", kls), ("a value", values)):
            for value in some:
                number(value, what)
        rewards = [None] * len(response)
        if self.reward is not None and response:
            rewards[-1] = self.score(prompt, response, end)
        none = [None] * len(response)
        names = ("id", "logprob", "logratio", "kl", "value", "reward")
        rows = zip(response, logprobs, ratios or none, kls or none, values, rewards)
        records = [dict(zip(names, row)) for row in rows]
        for record, others in zip(records, best):
            record["top"] = others
        return records

    @torch.no_grad()
    def embed(self, ids: list[int], skip: int) -> list[float]:
        """The mean of the last hidden states (behind the final norm) over all tokens but the first `skip`, made of length 1."""
        hidden = self.model.trunk(torch.tensor([ids], device=self.device))[0, skip:]  # (T, D)
        mean = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).mean(0)
        return [number(x, "an embedding") for x in (mean / mean.norm()).tolist()]


def likeliest(logits: Tensor, ref_logits: Tensor | None, top: int) -> list[list[dict]]:
    """The `top` tokens of every row of logits (N, V), the best first, with what the reference finds of them."""
    values, ids = log_softmax(logits).topk(min(top, logits.shape[-1]), -1)  # (N, top)
    others = torch.full_like(values, math.nan) if ref_logits is None else log_softmax(ref_logits).gather(-1, ids)
    return [
        [
            {"id": i, "logprob": p, "ref_logprob": None if math.isnan(ref) else ref}
            for i, p, ref in zip(*(x.tolist() for x in row))
        ]
        for row in zip(ids, values, others)
    ]


def log_softmax(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def chosen(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of the ids that were chosen: (N, V), (N,) -> (N,), in float32 at least."""
    return log_softmax(logits).gather(-1, ids[:, None])[:, 0]


def number(value: float | None, what: str) -> float | None:
    """ValueError where the models gave none, which JSON could not say either."""
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{what} is {value}: the model has diverged; serve an earlier checkpoint")
    return value


def load_values(path: str | Path, model: Transformer, base: str | None = None):
    """tokens (1, T) -> V before each token after the first, (T-1,), from a policy checkpoint; None where it holds no critic,
    or one that only says what the values of --value_base=reward lack.

    model: the checkpoint's policy, which a shared critic reads. base: where its base lies, see open_pretrained.
    """
    if checkpoint.latest(path) is None and checkpoint.read_config(Path(path)) is None:
        return None  # a model of another format
    saved = checkpoint.load(checkpoint.resolve(path))
    tensors, device = saved.tensors, model.norm.weight.device
    stands_on_zero = saved.config.get("value_base", "zero") == "zero"
    if saved.config.get("kind") != "policy" or "value_head.weight" not in tensors or not stands_on_zero:
        return None
    trunk = model
    if any(name.startswith("value_trunk.") for name in tensors):
        trunk = critic_trunk(saved, path, device, base).requires_grad_(False).eval()
    weight, bias = (tensors[f"value_head.{name}"].to(device) for name in ("weight", "bias"))

    def values(tokens: Tensor) -> Tensor:
        return (trunk.trunk(tokens[:, :-1])[0].to(weight.dtype) @ weight.T + bias)[:, 0]

    return values
