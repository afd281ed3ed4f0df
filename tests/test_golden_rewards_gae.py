"""Rewards, advantages and returns of six PPO implementations, out of ours.

Nearly every difference is one of two: where the score lands, and what happens to the padding. Frameworks that pay the
score on the slot *after* the response treat that slot as one more token of the episode, without KL but with a value.
That is our formula on a longer mask.
"""

import torch
from golden import FLOAT32, FLOAT32_RATIO, both, load
from test_golden_statistics import biased_whiten, verl_whiten

from rlhf.advantages import gae
from rlhf.functional import masked_mean, masked_var, whiten
from rlhf.rewards import missing_eos, shape_rewards


def unshifted(x, mask):
    """Whitened, and moved back to the mean."""
    return torch.where(mask, whiten(x, mask) + masked_mean(x, mask), 0)


def with_slot_after(mask):
    """The mask with the slot after each response, where the tensor has room for it."""
    return mask | torch.nn.functional.pad(mask, (1, 0))[:, :-1]


@both
def test_trl_1_12(golden_dir, precision):
    g = load(golden_dir, "trl112_ppo_rewards_gae", precision)
    i, common = g.inputs, g.outputs["common(gamma=1,lam=.95,k1,kl_coef=.05)"]
    mask = i["mask"].bool()
    episode = with_slot_after(mask)
    g.close(~common["padding_mask"], mask)
    g.close(~common["padding_mask_p1"], episode)
    values = common["values_masked"]
    # both log-probs are 1.0 on padding, so the slot after the response has no KL
    logprobs, ref_logprobs = (torch.where(mask, i[name], 1) for name in ("old_logprobs", "ref_logprobs"))
    for name, case in i["cases"].items():
        theirs, at_least = g.outputs[name], 0.0
        scores = i["scores"]
        if case["missing_eos_penalty"] is not None:
            scores = missing_eos(scores, common["contain_eos_token"], case["missing_eos_penalty"])
            g.close(scores, theirs["scores"])
        rewards = shape_rewards(scores, logprobs, ref_logprobs, episode, case["kl_coef"], case["kl_estimator"])
        if case["whiten_rewards"]:
            rewards = unshifted(rewards, episode)
            at_least = FLOAT32_RATIO
        g.close(rewards, theirs.get("rewards", common["rewards"]), at_least=at_least)
        advantages, returns = gae(rewards, values, episode, case["gamma"], case["lam"])
        g.close(returns, theirs["returns"], at_least=at_least)
        g.close(whiten(advantages, mask), theirs["advantages"], at_least=at_least)


@both
def test_trl_0_11(golden_dir, precision):
    g = load(golden_dir, "trl0114_ppo_rewards_gae", precision)
    i = g.inputs
    mask, p, q = i["mask"].bool(), i["old_logprobs"], i["ref_logprobs"]
    estimator = {"kl": "k1", "mse": "k2", "abs": "k1"}
    for name, case in i["cases"].items():
        theirs = g.outputs[name]
        rewards = shape_rewards(i["scores"], p, q, mask, case["kl_coef"], estimator[case["kl_penalty"]])
        if case["kl_penalty"] == "abs":  # |k1| costs where k1 < 0 pays
            rewards = rewards - torch.where(mask, case["kl_coef"] * ((p - q).abs() - (p - q)), 0)
        values, episode = torch.where(mask, i["values"], 0), mask
        if "rewards" in theirs:
            g.close(rewards, theirs["rewards"], mask)  # theirs keeps the KL of padding, until it multiplies by the mask
            g.close(values, theirs["values_masked"])
        if case["whiten_rewards"]:
            # the bug: whitened padding is (0 - mean) / std + mean, nobody zeroes it, and GAE walks over all columns
            mean, variance = masked_mean(rewards, mask), masked_var(rewards, mask)
            leak = -mean * (variance + 1e-8).rsqrt() + mean
            rewards = torch.where(mask, unshifted(rewards, mask), leak)
            episode = torch.ones_like(mask)
        advantages, returns = gae(rewards, values, episode, case["gamma"], case["lam"])
        g.close(returns, theirs["returns"])
        g.close(whiten(advantages, mask), theirs["advantages"], mask)


@both
def test_openrlhf(golden_dir, precision):
    g = load(golden_dir, "openrlhf_rewards_gae", precision)
    i, mask = g.inputs, g.inputs["mask"].bool()
    kl, zero = i["kl(masked)"], torch.zeros_like(i["kl(masked)"])
    rewards = shape_rewards(i["scores"], kl, zero, mask, i["kl_coef"])  # their estimator ran before: k1(kl, 0) = kl
    g.close(rewards, g.outputs["rewards"])
    clipped = shape_rewards(i["scores"].clamp(-1, 1), kl, zero, mask, i["kl_coef"])
    g.close(clipped, g.outputs["rewards(reward_clip_range=(-1,1))"])
    for name, case in i["cases"].items():
        advantages, returns = gae(rewards, i["values"], mask, case["gamma"], case["lam"])
        g.close(advantages, g.outputs[name]["advantages"])
        g.close(returns, g.outputs[name]["returns"])
    advantages, returns = gae(rewards, i["values"], mask, 1.0, 0.95)
    whitened = g.outputs["gae + global advantage normalisation (compute_advantages_and_returns, gamma=1,lam=.95)"]
    g.close(returns, whitened["returns"])
    # their guard is max(var, 1e-8), ours var + 1e-8; they whiten in float32
    variance = masked_var(advantages, mask, unbiased=False)
    guard = ((variance + 1e-8) / variance).sqrt()
    g.close(biased_whiten(advantages, mask) * guard, whitened["advantages"], mask, at_least=FLOAT32)
    centred = g.outputs["gae + mean-only normalisation (no_std_norm)"]
    g.close(advantages - masked_mean(advantages, mask), centred["advantages"], mask, at_least=FLOAT32)


@both
def test_verl(golden_dir, precision):
    g = load(golden_dir, "verl_rewards_gae", precision)
    i, mask = g.inputs, g.inputs["mask"].bool()
    p, q, scores = i["old_logprobs"], i["ref_logprobs"], i["token_level_scores"].sum(1)
    rewards = shape_rewards(scores, p, q, mask, i["kl_coef"])
    g.close(rewards, g.outputs["token_level_rewards as ray_trainer.apply_kl_penalty (KL masked)"])
    unmasked = rewards - torch.where(mask, 0, i["kl_coef"] * (p - q))  # compute_rewards also charges padding for its KL
    g.close(unmasked, g.outputs["core_algos.compute_rewards (KL not masked)"])
    cases = {name: (case["gamma"], case["lam"], mask) for name, case in i["cases"].items()}
    hole = "gamma=1.0,lam=0.95 with a hole in the mask of row 0 (positions 2,3)"
    cases[hole] = (1.0, 0.95, g.outputs[hole]["mask"].bool())
    assert not cases[hole][2].equal(mask)
    for name, (gamma, lam, mask) in cases.items():
        advantages, returns = gae(rewards, i["values"], mask, gamma, lam)  # holes are bridged there as here
        g.close(returns, g.outputs[name]["returns"], mask)
        g.close(verl_whiten(advantages, mask), g.outputs[name]["advantages"], mask)


@both
def test_torchtune(golden_dir, precision):
    g = load(golden_dir, "torchtune_rewards_gae", precision)
    i, mask = g.inputs, g.inputs["mask"].bool()
    logprobs, ref_logprobs = (torch.where(mask, i[name], 1) for name in ("old_logprobs", "ref_logprobs"))
    for theirs in g.outputs.values():
        # the recipe pays after the response, except where that is the second or the last column
        episode = mask | torch.nn.functional.one_hot(theirs["valid_score_idxs"], mask.shape[1]).bool()
        rewards = shape_rewards(i["scores"], logprobs, ref_logprobs, episode, i["kl_coef"])
        g.close(rewards, theirs["rewards"])
        g.close(torch.where(mask, i["old_logprobs"] - i["ref_logprobs"], 0), theirs["kl"])
        for gamma in (1.0, 0.99):
            advantages, returns = gae(rewards, i["values"], episode, gamma, 0.95)
            case = theirs[f"gamma={gamma},lam=0.95"]
            g.close(returns, case["returns"], mask)
            # the inverted flag: their "whitened" advantages keep their mean
            g.close(unshifted(advantages, mask), case["advantages"], mask)


@both
def test_deepspeed_chat(golden_dir, precision):
    g = load(golden_dir, "deepspeedchat_ppo", precision)
    i, mask = g.inputs, g.inputs["mask(response)"].bool()
    episode = with_slot_after(mask)
    scores = i["scores"].clamp(-i["clip_reward"], i["clip_reward"])
    # nothing masks the log-probs, so the slot after the response pays for the KL of a padding token
    rewards = shape_rewards(scores, i["old_logprobs"], i["ref_logprobs"], episode, i["kl_coef"])
    g.close(rewards, g.outputs["rewards"], episode)
    g.close(torch.where(episode, i["values"], 0), g.outputs["values_masked"], episode)
    advantages, returns = gae(rewards, i["values"], episode, i["gamma"], i["lam"])  # never whitened
    g.close(advantages, g.outputs["advantages"], episode)
    g.close(returns, g.outputs["returns"], episode)


@both
def test_trlx(golden_dir, precision):
    g = load(golden_dir, "trlx_ppo", precision)
    i, mask = g.inputs, g.inputs["mask"].bool()
    advantages, returns = gae(i["rewards"], i["old_values(masked)"], mask, i["gamma"], i["lam"])
    g.close(returns, g.outputs["returns"])
    g.close(whiten(advantages, torch.ones_like(mask)), g.outputs["advantages"])  # whitened together with the padding
