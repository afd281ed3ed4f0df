"""Policy and value losses, their gradients and their metrics, against TRL, OpenRLHF, verl, torchtune, trlX and others.

All share our loss per token. They differ in the ratio (per token or per response), in extra bounds, and above all in
what they divide by.
"""

import math

import torch
from golden import FLOAT32, both, gradient, load

from rlhf.functional import masked_mean, masked_sum, masked_var
from rlhf.kl import k1, k2, k3
from rlhf.losses import approx_kl, clip_fraction, policy_loss, value_clip_fraction, value_loss


def token_mean(x, mask):
    return masked_sum(x, mask) / mask.sum()


def mean_of_means(x, mask, eps=0.0):
    """Mean over responses of the mean over each one's tokens: short responses weigh as much as long ones."""
    return (masked_sum(x, mask, dim=1) / (mask.sum(1).to(x.dtype) + eps)).mean()


def one_ratio_per_response(new, old, mask):
    """New log-probs whose ratio is the same on all tokens of a response: exp of the mean log-ratio (GSPO)."""
    return old + (masked_sum(new - old, mask, dim=1) / mask.sum(1))[:, None]


@both
def test_trl_1_12(golden_dir, precision):
    g = load(golden_dir, "trl112_ppo_loss", precision)
    i = g.inputs
    mask, episode = ~i["padding_mask(True=ignore)"], ~i["padding_mask_p1(True=ignore)"]
    old = i["old_logprobs(masked_fill 1.0)"]
    new, vpred = i["new_logprobs"].requires_grad_(), i["vpred"].requires_grad_()
    advantages, returns = i["advantages(whitened)"], i["returns"]
    filled, predicted = torch.where(mask, new, 1), torch.where(episode, vpred, 0)
    for name, case in i["cases"].items():
        theirs, clip, value_clip = g.outputs[name], case["cliprange"], case["cliprange_value"]
        policy = token_mean(policy_loss(filled, old, advantages, clip), mask)
        # the value is also trained on the slot after the response
        value = token_mean(value_loss(predicted, i["old_values(masked)"], returns, value_clip), episode)
        loss = policy + case["vf_coef"] * value
        g.close(policy, theirs["pg_loss"])
        g.close(value, theirs["vf_loss"])
        g.close(loss, theirs["loss"])
        new_gradient, value_gradient = gradient(loss, new, vpred)
        g.close(new_gradient, theirs["grad_new_logprobs"])
        g.close(value_gradient, theirs["grad_vpred"])
        clipped = clip_fraction(filled, old, advantages, clip)
        g.close(token_mean(clipped, mask), theirs["pg_clipfrac"], at_least=FLOAT32)
        clipped = value_clip_fraction(predicted, i["old_values(masked)"], returns, value_clip)
        g.close(token_mean(clipped, episode), theirs["vf_clipfrac"], at_least=FLOAT32)
        # these two are means over the padded tensor, where both log-probs are 1.0: diluted
        g.close(approx_kl(filled, old).mean(), theirs["approxkl"], at_least=FLOAT32)
        g.close((filled - old).exp().mean(), theirs["ratio_mean_unmasked"], at_least=FLOAT32)


@both
def test_trl_1_12_gradient_depends_on_the_micro_batch(golden_dir, precision):
    """The mean of the micro-batches' means is not the mean over the tokens; ours divides by the tokens of the step."""
    g = load(golden_dir, "trl112_ppo_microbatch", precision)
    i = load(golden_dir, "trl112_ppo_loss", precision).inputs
    mask, episode = ~i["padding_mask(True=ignore)"], ~i["padding_mask_p1(True=ignore)"]
    new, vpred = i["new_logprobs"].requires_grad_(), i["vpred"].requires_grad_()
    policy = policy_loss(torch.where(mask, new, 1), i["old_logprobs(masked_fill 1.0)"], i["advantages(whitened)"], 0.2)
    value = value_loss(torch.where(episode, vpred, 0), i["old_values(masked)"], i["returns"], 0.2)
    grads = []
    for rows, name in ((8, "per_device=8,accum=1"), (2, "per_device=2,accum=4"), (1, "per_device=1,accum=8")):
        theirs = g.outputs[name]
        order = torch.arange(len(policy)).split(rows)
        micro_policy = torch.stack([token_mean(policy[r], mask[r]) for r in order])
        micro_value = torch.stack([token_mean(value[r], episode[r]) for r in order])
        g.close(micro_policy, theirs["micro_pg_loss"])
        g.close(micro_value, theirs["micro_vf_loss"])
        g.close(micro_policy.mean(), theirs["logged_policy_loss"], at_least=FLOAT32)
        theirs_new, theirs_value = theirs["accumulated_grad_new_logprobs"], theirs["accumulated_grad_vpred"]
        ours_new, ours_value = torch.autograd.grad(
            (micro_policy + 0.1 * micro_value).mean(), (new, vpred), retain_graph=True
        )
        g.close(ours_new, theirs_new)
        g.close(ours_value, theirs_value)
        grads.append(theirs_new)
        # what the step should have been, whatever the micro-batch: each one's sum over the tokens of the step
        step = sum(masked_sum(policy[r], mask[r]) for r in order) / mask.sum()
        (right,) = torch.autograd.grad(step, new, retain_graph=True)
        g.close(right, grads[0])
    assert (grads[0] - grads[2]).abs().max() > 0.1


@both
def test_trl_0_11(golden_dir, precision):
    g = load(golden_dir, "trl0114_ppo_loss", precision)
    i, mask = g.inputs, g.inputs["mask"].bool()
    old, values, advantages, returns = (i[k] for k in ("old_logprobs", "old_values(masked)", "advantages", "returns"))
    new, vpred = i["new_logprobs"].requires_grad_(), i["vpred"].requires_grad_()
    for name, case in i["cases"].items():
        theirs, clip, value_clip = g.outputs[name], case["cliprange"], case["cliprange_value"]
        policy = token_mean(policy_loss(new, old, advantages, clip), mask)
        value = token_mean(value_loss(vpred, values, returns, value_clip), mask)
        # a batch whose mean ratio is too large counts for nothing
        keep = float(token_mean((new - old).exp(), mask) <= case["ratio_threshold"])
        stats = theirs["stats"]
        g.close(keep * policy, theirs["returned_pg_loss"])
        g.close(keep * case["vf_coef"] * value, theirs["returned_vf_coef*vf_loss"])
        g.close(keep * policy, stats["loss/policy"])
        g.close(keep * value, stats["loss/value"])
        g.close(keep * (policy + case["vf_coef"] * value), stats["loss/total"])
        grads = gradient(keep * (policy + case["vf_coef"] * value), new, vpred)
        g.close(grads[0], theirs["grad_new_logprobs"])
        g.close(grads[1], theirs["grad_vpred"])
        g.close(token_mean(approx_kl(new, old), mask), stats["policy/approxkl"])
        g.close(token_mean(k1(old, new), mask), stats["policy/policykl"])
        g.close(token_mean(clip_fraction(new, old, advantages, clip), mask), stats["policy/clipfrac"], at_least=FLOAT32)
        clipped = value_clip_fraction(vpred, values, returns, value_clip)
        g.close(token_mean(clipped, mask), stats["val/clipfrac"], at_least=FLOAT32)
        for ours, key in ((returns, "returns"), (values, "val")):
            g.close(masked_mean(ours, mask), stats[f"{key}/mean"])
            g.close(masked_var(ours, mask), stats[f"{key}/var"])
        g.close(masked_mean(vpred, mask), stats["val/vpred"])
        g.close(2 * masked_mean(value_loss(vpred, values, returns), mask), stats["val/error"])


@both
def test_openrlhf(golden_dir, precision):
    g = load(golden_dir, "ppo_losses__openrlhf_verl_torchtune", precision)
    i, mask = g.inputs, g.inputs["mask"].bool()
    old, advantages = i["old_logprobs"], i["advantages"]
    new = i["new_logprobs"].requires_grad_()
    gspo = one_ratio_per_response(new, old, mask)
    cases = {
        "OpenRLHF PolicyLoss(token_level)": token_mean(policy_loss(new, old, advantages, 0.2), mask),
        "OpenRLHF PolicyLoss(token_level_loss=False)": mean_of_means(policy_loss(new, old, advantages, 0.2), mask),
        "OpenRLHF PolicyLoss(clip .2/.28)": token_mean(policy_loss(new, old, advantages, 0.2, clip_high=0.28), mask),
        "OpenRLHF PolicyLoss(dual_clip=3)": token_mean(policy_loss(new, old, advantages, 0.2, dual_clip=3), mask),
        "OpenRLHF PolicyLoss(gspo)": mean_of_means(policy_loss(gspo, old, advantages, 0.2), mask),
        # dp_size 2 and 66 tokens on both ranks together: the sum of this rank's loss / 66 * 2
        "OpenRLHF PolicyLoss(token_level, dp_size=2, batch_num_tokens=66)": masked_sum(
            policy_loss(new, old, advantages, 0.2), mask
        )
        / 66
        * 2,
    }
    for name, loss in cases.items():
        theirs = g.outputs[name]
        g.close(loss, theirs["loss"])
        g.close(torch.autograd.grad(loss, new, retain_graph=True)[0], theirs["grad_new_logprobs"])
        if "ppo_kl" in theirs:
            g.close(token_mean(k1(old, new), mask), theirs["ppo_kl"])
            used = gspo if "gspo" in name else new
            clipped = clip_fraction(used, old, advantages, 0.2, 0.28 if ".28" in name else None)
            g.close(token_mean(clipped, mask), theirs["clip_ratio"], at_least=FLOAT32)


@both
def test_verl(golden_dir, precision):
    g = load(golden_dir, "ppo_losses__openrlhf_verl_torchtune", precision)
    i, mask = g.inputs, g.inputs["mask"].bool()
    old, advantages = i["old_logprobs"], i["advantages"]
    new = i["new_logprobs"].requires_grad_()
    plain = policy_loss(new, old, advantages, 0.2)
    dual = policy_loss(new, old, advantages, 0.2, dual_clip=3)  # verl's default
    rows = masked_sum(dual, mask, dim=1)
    cases = {
        "verl compute_policy_loss(dual clip c=3)": token_mean(dual, mask),
        "verl compute_policy_loss(c=1e9)": token_mean(plain, mask),
        "verl compute_policy_loss(clip-higher .2/.28)": token_mean(
            policy_loss(new, old, advantages, 0.2, clip_high=0.28, dual_clip=3), mask
        ),
        "verl seq-mean-token-sum": rows.mean(),
        "verl seq-mean-token-mean": mean_of_means(dual, mask, eps=1e-8),
        "verl seq-mean-token-sum-norm": rows.sum() / mask.shape[1],  # a sum over responses, whatever its name says
    }
    for name, loss in cases.items():
        theirs = g.outputs[name]
        g.close(loss, theirs["loss"])
        g.close(torch.autograd.grad(loss, new, retain_graph=True)[0], theirs["grad_new_logprobs"])
        n = int(mask.sum()) + 1e-8  # as every masked mean of verl
        g.close(masked_sum(k1(old, new), mask) / n, theirs["ppo_kl"])
        clipped = clip_fraction(new, old, advantages, 0.2, 0.28 if ".28" in name else None)
        g.close(masked_sum(clipped, mask) / n, theirs["pg_clipfrac"])
        lower = (dual < plain).to(plain.dtype)  # dual clip decides
        g.close(masked_sum(lower, mask) / n * ("1e9" not in name), theirs["pg_clipfrac_lower"])


@both
def test_value_losses_and_torchtune(golden_dir, precision):
    g = load(golden_dir, "ppo_losses__openrlhf_verl_torchtune", precision)
    i, mask = g.inputs, g.inputs["mask"].bool()
    values, returns = i["old_values(masked)"], i["returns"]
    vpred, new = i["vpred"].requires_grad_(), i["new_logprobs"].requires_grad_()
    clipped, plain = value_loss(vpred, values, returns, 0.2), value_loss(vpred, values, returns)
    cases = {
        "OpenRLHF ValueLoss(clip=.2)": token_mean(clipped, mask),
        "OpenRLHF ValueLoss(no clip)": token_mean(plain, mask),
        "OpenRLHF ValueLoss(clip=.2,seq-mean)": mean_of_means(clipped, mask),
        "verl compute_value_loss(clip=.2)": token_mean(clipped, mask),
    }
    for name, loss in cases.items():
        g.close(loss, g.outputs[name]["loss"])
        g.close(torch.autograd.grad(loss, vpred, retain_graph=True)[0], g.outputs[name]["grad_vpred"])
    fraction = value_clip_fraction(vpred, values, returns, 0.2)
    verl = g.outputs["verl compute_value_loss(clip=.2)"]
    g.close(masked_sum(fraction, mask) / (int(mask.sum()) + 1e-8), verl["vf_clipfrac"])

    theirs = g.outputs["torchtune PPOLoss(eps=.2, vclip=.2, vcoef=.1)"]
    policy = token_mean(policy_loss(new, i["old_logprobs"], i["advantages"], 0.2), mask)
    loss = policy + 0.1 * token_mean(clipped, mask)
    g.close(policy, theirs["policy_loss"])
    g.close(token_mean(clipped, mask), theirs["value_loss"])
    g.close(loss, theirs["loss"])
    grads = gradient(loss, new, vpred)
    g.close(grads[0], theirs["grad_new_logprobs"])
    g.close(grads[1], theirs["grad_vpred"])
    g.close((new - i["old_logprobs"]).exp().mean(), theirs["ratios_mean_unmasked"])  # padding included
    fraction = clip_fraction(new, i["old_logprobs"], i["advantages"], 0.2)
    g.close(token_mean(fraction, mask), theirs["clipfrac"], at_least=FLOAT32)


@both
def test_deepspeed_chat(golden_dir, precision):
    """Advantages and returns are its own (one slot longer than the response); the losses count the response alone."""
    g = load(golden_dir, "deepspeedchat_ppo", precision)
    i, mask = g.inputs, g.inputs["mask(response)"].bool()
    new, vpred = i["new_logprobs"].requires_grad_(), i["vpred"].requires_grad_()
    actor = token_mean(policy_loss(new, i["old_logprobs"], g.outputs["advantages"], i["cliprange"]), mask)
    critic = value_loss(vpred, g.outputs["values_masked"], g.outputs["returns"], i["cliprange"])
    critic = token_mean(critic, mask)
    g.close(actor, g.outputs["actor_loss"])
    g.close(gradient(actor, new)[0], g.outputs["grad_new_logprobs"])
    g.close(critic, g.outputs["critic_loss"])
    g.close(gradient(critic, vpred)[0], g.outputs["grad_vpred"])


@both
def test_trlx(golden_dir, precision):
    g = load(golden_dir, "trlx_ppo", precision)
    i, mask = g.inputs, g.inputs["mask"].bool()
    new, vpred = i["new_logprobs"].requires_grad_(), i["vpred"].requires_grad_()
    old, advantages, returns = i["old_logprobs"], g.outputs["advantages"], g.outputs["returns"]
    policy = token_mean(policy_loss(new, old, advantages, 0.2), mask)
    value = token_mean(value_loss(vpred, i["old_values(masked)"], returns, 0.2), mask)
    loss = policy + i["vf_coef"] * value
    g.close(policy, g.outputs["policy_loss"])
    g.close(value, g.outputs["value_loss"])
    g.close(loss, g.outputs["loss"])
    grads = gradient(loss, new, vpred)
    g.close(grads[0], g.outputs["grad_new_logprobs"])
    g.close(grads[1], g.outputs["grad_vpred"])
    # the log-ratio is zero on padding but the mean counts it
    ratio = torch.where(mask, new - old, 0)
    g.close(k3(torch.zeros_like(ratio), ratio).mean(), g.outputs["approx_kl(k3, unmasked mean)"])
    fraction = clip_fraction(new, old, advantages, 0.2)
    g.close(token_mean(fraction, mask), g.outputs["pg_clipfrac"], at_least=FLOAT32)
    fraction = value_clip_fraction(vpred, i["old_values(masked)"], returns, 0.2)
    g.close(token_mean(fraction, mask), g.outputs["vf_clipfrac"], at_least=FLOAT32)


@both
def test_trl_1_16_grpo(golden_dir, precision):
    g = load(golden_dir, "trl116_grpo_loss", precision)
    i, mask = g.inputs, g.inputs["mask"].bool()
    old, ref, eps = i["old_logprobs"], i["ref_logprobs"], i["epsilon"]
    new = i["new_logprobs"].requires_grad_()
    advantages = i["advantages"][:, None].expand_as(new)
    plain = policy_loss(new, old, advantages, eps)
    gspo = one_ratio_per_response(new, old, mask)
    # two-sided: the unclipped ratio is capped at delta; policy_loss with clip=inf is -A ratio
    capped = torch.minimum(new, old + math.log(3.0))
    clipped = torch.minimum(torch.maximum(new, old + math.log(1 - eps)), old + math.log(1 + eps))
    two_sided = torch.maximum(*(policy_loss(x, old, advantages, math.inf) for x in (capped, clipped)))
    cases = {
        "grpo": mean_of_means(plain, mask),
        "bnpo": token_mean(plain, mask),
        "dr_grpo": masked_sum(plain, mask) / (len(mask) * i["max_completion_length"]),
        "dapo": token_mean(plain, mask),
        # k3 times the importance ratio: its samples are the old policy's
        "grpo,beta=0.04": mean_of_means(plain + 0.04 * (new - old).exp() * k3(new, ref), mask),
        "grpo,sequence-level IS (GSPO)": mean_of_means(policy_loss(gspo, old, advantages, eps), mask),
        "grpo,epsilon_high=0.28": mean_of_means(policy_loss(new, old, advantages, eps, clip_high=0.28), mask),
        "grpo,delta=3.0 (two-sided)": mean_of_means(two_sided, mask),
        "grpo,on-policy (old logps absent)": mean_of_means(policy_loss(new, new.detach(), advantages, eps), mask),
    }
    assert set(cases) == set(g.outputs)
    for name, loss in cases.items():
        theirs = g.outputs[name]
        g.close(loss, theirs["loss"])
        g.close(torch.autograd.grad(loss, new, retain_graph=True)[0], theirs["grad_new_logprobs"])
        if name in ("grpo", "bnpo", "dr_grpo", "dapo"):
            clipped = clip_fraction(new, old, advantages, eps)
            g.close(token_mean(clipped, mask), theirs["metrics"]["clip_ratio/region_mean"], at_least=FLOAT32)
    g.close(token_mean((new - old).exp() * k3(new, ref), mask), g.outputs["grpo,beta=0.04"]["metrics"]["kl"])


def test_verl_aggregation_over_two_ranks(golden_dir):
    g = load(golden_dir, "verl_agg_loss_dp")
    loss, mask = g.inputs["loss_mat"], g.inputs["mask"].bool()
    ranks = [(loss[:4], mask[:4]), (loss[4:], mask[4:])]
    tokens = mask.sum()
    g.close(token_mean(loss, mask), g.outputs["1 rank token-mean"])
    wrong = torch.stack([token_mean(*rank) for rank in ranks]).mean()
    g.close(wrong, g.outputs["2 ranks, local token-mean, averaged (DDP default) -> WRONG"])
    # ours: the sum over this rank, over the tokens of all ranks, times the number of ranks that DDP will divide by
    right = torch.stack([masked_sum(*rank) / tokens * len(ranks) for rank in ranks]).mean()
    g.close(right, g.outputs["2 ranks, global batch_num_tokens and dp_size=2, averaged -> equals 1 rank"])
    g.close(mean_of_means(loss, mask, eps=1e-8), g.outputs["1 rank seq-mean-token-mean"])
    halves = torch.stack([mean_of_means(*rank, eps=1e-8) for rank in ranks]).mean()  # as many responses on each rank
    name = "2 ranks seq-mean-token-mean with global_batch_size=8, dp_size=2, averaged"
    g.close(halves, g.outputs[name])


def test_approx_kl_is_k2_between_new_and_old_policy():
    new, old = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.equal(approx_kl(new, old), k2(new, old))
