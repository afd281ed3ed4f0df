"""Masked statistics, whitening and log-probabilities against TRL, verl, OpenRLHF, torchtune, trlX and the n+ details."""

import torch
from golden import FLOAT32, both, load

from rlhf.functional import logprobs_and_entropy, masked_mean, masked_sum, masked_var, whiten


def unshifted(whiten, x, mask):
    """Whitened, and moved back to the mean: what others do with rewards."""
    return torch.where(mask, whiten(x, mask) + masked_mean(x, mask), 0)


def biased_whiten(x, mask):
    """The whitening of OpenAI and its descendants: divided by n where ours divides by n - 1."""
    ratio = (masked_var(x, mask) + 1e-8) / (masked_var(x, mask, unbiased=False) + 1e-8)
    return whiten(x, mask) * ratio.sqrt()


def verl_whiten(x, mask):
    """verl divides every masked mean by n + 1e-8, which is n again where its mask is of integers and n hence float32."""
    n = int(mask.sum())
    shrink = n / (n + 1e-8)
    mean, variance = masked_mean(x, mask), masked_var(x, mask)
    shifted = whiten(x, mask) * (variance + 1e-8).sqrt() + mean * (1 - shrink)
    return torch.where(mask, shifted * (variance * shrink + 1e-8).rsqrt(), 0)


@both
def test_trl_0_11_masked_statistics(golden_dir, precision):
    g = load(golden_dir, "trl0114_masked_stats", precision)
    x, mask = g.inputs["x"], g.inputs["mask"].bool()
    g.close(masked_mean(x, mask), g.outputs["masked_mean"])
    g.close(masked_sum(x, mask, dim=1) / mask.sum(1), g.outputs["masked_mean(axis=1)"])
    g.close(masked_var(x, mask), g.outputs["masked_var(unbiased=True,default)"])
    g.close(masked_var(x, mask, unbiased=False), g.outputs["masked_var(unbiased=False)"])
    # TRL 0.11 leaves garbage on the padding, ours is zero there
    g.close(whiten(x, mask), g.outputs["masked_whiten(shift_mean=True)"], mask)
    g.close(unshifted(whiten, x, mask), g.outputs["masked_whiten(shift_mean=False)"], mask)
    everything = torch.ones_like(mask)
    g.close(whiten(x, everything), g.outputs["whiten(unmasked,shift_mean=True)"])
    g.close(unshifted(whiten, x, everything), g.outputs["whiten(unmasked,shift_mean=False)"])


@both
def test_whitening_elsewhere(golden_dir, precision):
    g = load(golden_dir, "masked_whiten__others", precision)
    x, mask, theirs = g.inputs["x"], g.inputs["mask"].bool(), g.outputs
    everything = torch.ones_like(mask)
    g.close(masked_mean(x, mask), theirs["verl masked_mean"])
    g.close(masked_var(x, mask), theirs["verl masked_var"])
    g.close(whiten(x, mask), theirs["verl masked_whiten(shift_mean=True)"], mask)
    g.close(unshifted(whiten, x, mask), theirs["verl masked_whiten(shift_mean=False)"], mask)
    # torchtune's flag says the opposite of its name, and its default adds the mean back
    g.close(whiten(x, mask), theirs["torchtune whiten(mask, shift_mean=False)"], mask)
    g.close(unshifted(whiten, x, mask), theirs["torchtune whiten(mask, shift_mean=True)"], mask)
    # biased variance
    g.close(biased_whiten(x, mask), theirs["vwxyzjn masked_whiten(shift_mean=True)"], mask)
    g.close(unshifted(biased_whiten, x, mask), theirs["vwxyzjn masked_whiten(shift_mean=False)"], mask)
    g.close(biased_whiten(x, everything), theirs["vwxyzjn(lm-human-preference-details) whiten unmasked"])
    # trlX whitens the padded tensor, so that padding changes its numbers
    g.close(whiten(x, everything), theirs["trlX whiten unmasked single process"])
    # OpenRLHF: each row by itself, biased, and max(var, 1e-8) instead of var + 1e-8
    rows = [biased_whiten(x[i : i + 1], mask[i : i + 1]) for i in range(len(x))]
    variance = torch.stack([masked_var(x[i], mask[i], unbiased=False) for i in range(len(x))])
    guard = ((variance + 1e-8) / variance.clamp(min=1e-8)).sqrt()
    g.close(torch.cat(rows) * guard[:, None], theirs["OpenRLHF masked_normalize(dim=1)"], mask)


def test_trlx_whitening_on_two_ranks(golden_dir):
    g = load(golden_dir, "trlx_whiten_2ranks")
    x = g.inputs["x"]
    everything = torch.ones_like(x, dtype=torch.bool)  # trlX knows no mask here
    alone = whiten(x, everything)
    g.close(alone, g.outputs["1 process"])
    # ours is of the gathered batch, for any number of ranks; theirs turns biased with two:
    g.close(biased_whiten(x, everything), g.outputs["2 ranks concatenated"])


def test_trl_0_11_running_moments(golden_dir):
    """TRL 0.11 keeps running moments of the scores; they are our moments of all scores so far, the variance biased."""
    g = load(golden_dir, "trl0114_running_moments")
    seen = torch.zeros(0, dtype=torch.float64)
    for batch, after in zip(g.inputs["batches"], g.outputs["after_each_batch"]):
        seen = torch.cat([seen, batch])
        everything = torch.ones_like(seen, dtype=torch.bool)
        g.close(masked_mean(seen, everything), after["running_mean"], at_least=FLOAT32)
        g.close(masked_var(seen, everything, unbiased=False), after["running_var"], at_least=FLOAT32)
        g.close(masked_var(seen, everything).sqrt(), after["running_std"], at_least=FLOAT32)


@both
def test_trl_0_11_logprobs_and_entropy(golden_dir, precision):
    g = load(golden_dir, "trl0114_logprobs_entropy", precision)
    logprobs, entropy = logprobs_and_entropy(g.inputs["logits"], g.inputs["labels"])
    g.close(logprobs, g.outputs["logprobs"])
    g.close(entropy, g.outputs["entropy"])


@both
def test_trl_1_16_logprobs_and_entropy(golden_dir, precision):
    g = load(golden_dir, "trl116_logprob_utils", precision)
    logprobs, entropy = logprobs_and_entropy(g.inputs["logits"], g.inputs["index"])
    g.close(logprobs, g.outputs["selective_log_softmax"])
    g.close(entropy, g.outputs["entropy"])
