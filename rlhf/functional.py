"""Statistics under a mask, and log-probabilities. One mask everywhere: bool, True counts.

Masked slots are replaced by zero *before* any arithmetic: a `where` on the result alone would keep NaN out of the value
but not out of the gradient, because the backward pass multiplies the zero gradient by the NaN.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the counted entries, over everything or along `dim`; zero where nothing counts. (B, T) -> () or (B,)"""
    return torch.where(mask, x, 0).sum(dim)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the counted entries; zero if there are none. (B, T) -> ()"""
    return masked_sum(x, mask) / mask.sum().to(x.dtype).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of the counted entries, divided by n - 1 (or n); zero for fewer than two. (B, T) -> ()

    Unbiased as in TRL and verl; OpenAI's tf.nn.moments and OpenRLHF divide by n.
    """
    n = mask.sum().to(x.dtype)
    deviation = torch.where(mask, x, 0) - masked_mean(x, mask)  # second pass: no E[x^2] - E[x]^2 cancellation
    return masked_sum(deviation**2, mask) / (n - 1 if unbiased else n).clamp(min=1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Scale the counted entries to variance 1 and shift them to mean 0; zero elsewhere. (B, T) -> (B, T)

    y = (x - mean) / sqrt(var + 1e-8); the variance is the unbiased one. Of the whole batch: a rank that holds a part of it
    gathers the rest first. Source: openai/lm-human-preferences, lm_human_preferences/utils/core.py `whiten` (there with the
    biased variance, and a flag that leaves the mean).
    """
    y = (torch.where(mask, x, 0) - masked_mean(x, mask)) * (masked_var(x, mask) + 1e-8).rsqrt()
    return torch.where(mask, y, 0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """How much of the returns' variance the critic explains: 1 perfect, 0 useless, negative harmful. (B, T) -> ()

    1 - Var[R - V] / Var[R], the form of CleanRL, which forgives V a constant offset. Zero if the returns do not vary.
    """
    unexplained, variance = (masked_var(x, mask) for x in (returns - values, returns))
    return torch.where(variance > 0, 1 - unexplained / torch.where(variance > 0, variance, 1), 0)


def logprobs_and_entropy(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of its distribution, nats. (..., V), (...) -> (...), (...)

    With z = logits / temperature:  log p(token) = z[token] - logsumexp(z),  H = -sum_v p_v log p_v.
    Half precision is computed in float32, float64 stays. Logits of -inf (top-k, top-p) have probability 0.
    """
    return _LogprobsAndEntropy.apply(logits, tokens, temperature)


CHUNK = {"cpu": 2**18, "cuda": 2**26}  # logits worked on at once: what fits the cache; few launches


class _LogprobsAndEntropy(torch.autograd.Function):
    # The vocabulary is the widest axis there is. Plain autograd would keep three (..., V) tensors for backward;
    # this keeps the logits, which exist anyway, and computes the probabilities again. Some rows at a time, in buffers
    # that are used again, so that the only other (..., V) tensor that ever exists is the gradient.

    @staticmethod
    def forward(ctx, logits, tokens, temperature):
        rows, ids = logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1, 1)  # (N, V), (N, 1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        logprobs, entropy, logsumexp = (torch.empty(len(rows), 1, dtype=wide, device=rows.device) for _ in range(3))
        buffers = _buffers(rows, wide)
        for part in _chunks(rows):
            z, p = (x[: part.stop - part.start] for x in buffers)
            highest = rows[part].amax(-1, keepdim=True).to(wide)
            _tempered(rows[part], highest, temperature, z)
            logprobs[part] = z.gather(-1, ids[part])
            torch.exp(z, out=p)
            total = p.sum(-1, keepdim=True)
            # H = log sum_v e^z_v - sum_v p_v z_v; the clamp is for z = -inf, where p z must be 0
            with torch.autocast(rows.device.type, enabled=False):  # it would make a half-precision product of this sum
                weighted = torch.linalg.vecdot(p, z.clamp_(min=torch.finfo(wide).min)).unsqueeze(-1)
            logsum = total.log()
            logprobs[part] -= logsum
            entropy[part] = logsum - weighted / total
            logsumexp[part] = logsum * temperature + highest  # of the logits as they are
        logprobs, entropy = logprobs.view(tokens.shape), entropy.view(tokens.shape)
        ctx.save_for_backward(logits, tokens, logsumexp, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        logits, tokens, logsumexp, entropy = ctx.saved_tensors
        rows, ids = logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1, 1)
        grad = torch.empty_like(rows)
        buffers = _buffers(rows, logsumexp.dtype)
        for part in _chunks(rows):
            p, out = (x[: part.stop - part.start] for x in buffers)
            out = grad[part] if grad.dtype == out.dtype else out
            _tempered(rows[part], logsumexp[part], ctx.temperature, p).exp_()
            if grad_logprobs is None:
                out.zero_()
            else:  # d log p(token) / dz_v = [v = token] - p_v
                up = grad_logprobs.reshape(-1, 1)[part]
                torch.mul(p, -up, out=out).scatter_add_(-1, ids[part], up)
            if grad_entropy is not None:  # dH / dz_v = -p_v (log p_v + H) = entr(p_v) - H p_v
                up = grad_entropy.reshape(-1, 1)[part]
                out.addcmul_(p, up * entropy.reshape(-1, 1)[part], value=-1)
                out.addcmul_(torch.special.entr(p, out=p), up)
            if ctx.temperature != 1:
                out.div_(ctx.temperature)
            if out.dtype != grad.dtype:
                grad[part] = out
        return grad.view_as(logits), None, None


def _buffers(rows: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Room for the working of one chunk of (N, V) rows, twice."""
    shape = (min(_chunk_rows(rows), len(rows)), rows.shape[-1])
    return [torch.empty(shape, dtype=dtype, device=rows.device) for _ in range(2)]


def _chunk_rows(rows: Tensor) -> int:
    return max(1, CHUNK.get(rows.device.type, CHUNK["cuda"]) // rows.shape[-1])


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Slices of (N, V) rows, a few at a time."""
    size = _chunk_rows(rows)
    return (slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size))


def _tempered(logits: Tensor, less: Tensor, temperature: float, out: Tensor) -> Tensor:
    """(logits - less) / temperature, (n, V) and (n, 1), into `out`."""
    torch.sub(logits, less, out=out)
    return out if temperature == 1 else out.div_(temperature)
