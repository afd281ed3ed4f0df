"""Preference and DPO losses with their gradients against TRL, OpenRLHF and DeepSpeed-Chat."""

import pytest
import torch
from golden import FLOAT32, both, gradient, load

from rlhf.functional import masked_sum
from rlhf.losses import dpo_loss, preference_loss

OTHER_LOSSES = ("hinge", "ipo")  # of the same margin; no function here computes them


@both
def test_trl_1_16_reward_loss(golden_dir, precision):
    g = load(golden_dir, "trl116_reward_loss", precision)
    i = g.inputs
    chosen, rejected = (i[f"rewards_{side}(n,1)"].requires_grad_() for side in ("chosen", "rejected"))
    c, r, margin = chosen.squeeze(-1), rejected.squeeze(-1), i["margin(n,)"]
    centred = ((c + r) ** 2).mean()  # their regulariser; added to the mean of ours
    cases = {
        "plain": preference_loss(c, r).mean(),
        "margin": preference_loss(c, r, margin).mean(),
        "center=0.01": preference_loss(c, r).mean() + 0.01 * centred,
        "margin+center=0.1": preference_loss(c, r, margin).mean() + 0.1 * centred,
    }
    assert set(cases) == set(g.outputs)
    for name, loss in cases.items():
        theirs = g.outputs[name]
        g.close(loss, theirs["loss"])
        grads = gradient(loss, chosen, rejected)
        g.close(grads[0], theirs["grad_chosen"])
        g.close(grads[1], theirs["grad_rejected"])


@both
def test_trl_0_11_reward_loss(golden_dir, precision):
    g = load(golden_dir, "trl0114_reward_loss", precision)
    i = g.inputs
    chosen, rejected = (i[f"rewards_{side}(n,1)"].requires_grad_() for side in ("chosen", "rejected"))
    c, r, margin = chosen.squeeze(-1), rejected.squeeze(-1), i["margin(n,)"]
    n = len(c)
    centred = ((c + r) ** 2).mean()
    # the bug before TRL 0.24: (n, 1) scores minus an (n,) margin; every pair meets every margin
    every_margin = preference_loss(*(x[:, None].expand(n, n) for x in (c, r)), margin.expand(n, n)).mean()
    cases = {
        "plain": preference_loss(c, r).mean(),
        "center=0.01": preference_loss(c, r).mean() + 0.01 * centred,
        "margin": every_margin,
        "margin+center=0.1": every_margin + 0.1 * centred,
        "margin given as (n,1)": preference_loss(c, r, margin).mean(),
    }
    assert set(cases) == set(g.outputs)
    for name, loss in cases.items():
        theirs = g.outputs[name]
        g.close(loss, theirs["loss"])
        grads = gradient(loss, chosen, rejected)
        g.close(grads[0], theirs["grad_chosen"])
        g.close(grads[1], theirs["grad_rejected"])
    with pytest.raises(ValueError, match=r"shapes differ: .*\(5, 1\).*\(5,\)"):
        preference_loss(chosen, rejected, margin)


@both
def test_openrlhf_reward_loss(golden_dir, precision):
    g = load(golden_dir, "openrlhf_pairwise_loss", precision)
    i = g.inputs
    chosen, rejected = i["chosen"].requires_grad_(), i["rejected"].requires_grad_()
    plain = preference_loss(chosen, rejected).mean()
    cases = {
        "PairWiseLoss": plain,
        "PairWiseLoss(margin)": preference_loss(chosen, rejected, i["margin"]).mean(),
        "LogExpLoss": plain,
        "LogExpLoss(margin is ignored)": plain,
    }
    for name, loss in cases.items():
        theirs = g.outputs[name]
        g.close(loss, theirs["loss"])
        grads = gradient(loss, chosen, rejected)
        g.close(grads[0], theirs["grad_chosen"])
        g.close(grads[1], theirs["grad_rejected"])
    far = torch.tensor([-100.0], dtype=g.dtype)
    # log(1 + exp(200)) overflows in float32; logsigmoid does not
    assert g.outputs["LogExpLoss overflow at diff=-200"] == {torch.float32: "inf", torch.float64: "200.0"}[g.dtype]
    g.close(preference_loss(far, -far), torch.tensor([float(g.outputs["PairWiseLoss at diff=-200"])]))


def test_deepspeed_chat_reward_loss(golden_dir):
    """A reward per token: our loss on every position from the first differing token to the end of the longer text."""
    g = load(golden_dir, "deepspeedchat_rm_loss")
    i = g.inputs
    rewards = i["per_token_rewards(chosen rows then rejected rows)"]
    ids = torch.cat([i["chosen_ids"], i["rejected_ids"]])
    n, width = len(ids) // 2, ids.shape[1]
    lengths = (ids != i["pad"]).sum(1)
    first = (ids[:n] != ids[n:]).int().argmax(1)
    columns = torch.arange(width)
    mask = (columns >= first[:, None]) & (columns < torch.maximum(lengths[:n], lengths[n:])[:, None])
    losses = preference_loss(rewards[:n], rewards[n:])
    g.close((masked_sum(losses, mask, dim=1) / mask.sum(1)).mean(), g.outputs["loss"], at_least=FLOAT32)
    last = rewards[torch.arange(2 * n), lengths - 1]
    g.close(last[:n], g.outputs["chosen_mean_scores"], at_least=FLOAT32)
    g.close(last[n:], g.outputs["rejected_mean_scores"], at_least=FLOAT32)


def robust(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, noise):
    """rDPO: the loss of the given label and of the flipped one, weighted so that flipped labels cancel on average."""
    given = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    flipped = dpo_loss(policy_rejected, policy_chosen, ref_rejected, ref_chosen, beta)
    return ((1 - noise) * given - noise * flipped) / (1 - 2 * noise)


@both
@pytest.mark.parametrize("file", ["trl0114_dpo_loss", "openrlhf_dpo_loss"])
def test_dpo_on_summed_logprobs(golden_dir, precision, file):
    g = load(golden_dir, file, precision)
    i = g.inputs
    chosen, rejected = (i[f"policy_{side}_logps"].requires_grad_() for side in ("chosen", "rejected"))
    ref = i["ref_chosen_logps"], i["ref_rejected_logps"]
    for name, theirs in g.outputs.items():
        kind, _, smoothing = name.partition(",label_smoothing=")
        if kind in OTHER_LOSSES:
            continue
        loss = {"sigmoid": dpo_loss, "robust": robust}[kind](chosen, rejected, *ref, 0.1, float(smoothing or 0))
        if "losses" in theirs:
            g.close(loss, theirs["losses"])
        else:
            g.close(loss.mean(), theirs["loss"])
        grads = gradient(loss.mean(), chosen, rejected)
        g.close(grads[0], theirs["grad_policy_chosen"])
        g.close(grads[1], theirs["grad_policy_rejected"])


@both
def test_trl_1_16_dpo(golden_dir, precision):
    g = load(golden_dir, "trl116_dpo_loss", precision)
    i = g.inputs
    policy = i["policy_per_token_logps(rows 0-3 chosen, 4-7 rejected)"].requires_grad_()
    mask = i["completion_mask(unshifted)"].bool()[:, 1:]  # column t of their log-probs is about token t + 1
    sums = [masked_sum(x, mask, dim=1) for x in (policy, i["ref_per_token_logps"])]
    means = [x / mask.sum(1) for x in sums]

    def pairs(x):
        (policy, ref), n = x, len(mask) // 2
        return policy[:n], policy[n:], ref[:n], ref[n:]

    plain = dpo_loss(*pairs(sums), i["beta"]).mean()
    cases = {
        "sigmoid,label_smoothing=0.0": plain,
        "sigmoid,label_smoothing=0.1": plain,  # TRL >= 0.29 ignores the smoothing of this loss
        "robust,label_smoothing=0.0": robust(*pairs(sums), i["beta"], 0.0).mean(),
        "robust,label_smoothing=0.1": robust(*pairs(sums), i["beta"], 0.1).mean(),
        "sigmoid_norm,label_smoothing=0.0": dpo_loss(*pairs(means), i["beta"]).mean(),
    }
    assert set(g.outputs) - set(cases) == {f"{kind},label_smoothing=0.0" for kind in OTHER_LOSSES}
    for name, loss in cases.items():
        g.close(loss, g.outputs[name]["loss"])
        g.close(gradient(loss, policy)[0], g.outputs[name]["grad_per_token_logps"], mask)  # theirs reaches the padding
    smoothed = dpo_loss(*pairs(sums), i["beta"], label_smoothing=0.1).mean()
    assert (smoothed - plain).abs() > 1e-3
