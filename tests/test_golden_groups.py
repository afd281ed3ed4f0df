"""Estimators that compare the responses to one prompt (RLOO, GRPO and relatives) against TRL, verl and OpenRLHF."""

import torch
from golden import FLOAT32, FLOAT32_RATIO, both, gradient, load
from test_golden_statistics import biased_whiten, verl_whiten

from rlhf.advantages import dr_grpo, gae, grpo, reinforce_plus_plus, rloo
from rlhf.functional import masked_mean, masked_sum, masked_var, whiten
from rlhf.kl import k1
from rlhf.losses import policy_loss
from rlhf.rewards import shape_rewards

TWO_PROMPTS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def reward_to_go(rewards, mask):
    return gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)[0]


@both
def test_openrlhf(golden_dir, precision):
    """The group's baseline acts on the score alone; the KL of each token is subtracted afterwards, as reward to go."""
    g = load(golden_dir, "openrlhf_group_advantages", precision)
    i, mask = g.inputs, g.inputs["mask"].bool()
    kl, zero = i["kl(masked)"], torch.zeros_like(i["kl(masked)"])
    baselines = {
        "rloo": lambda s: rloo(s, TWO_PROMPTS),
        "reinforce_baseline": lambda s: dr_grpo(s, TWO_PROMPTS),
        "group_norm": lambda s: grpo(s, TWO_PROMPTS, eps=1e-9),
        "dr_grpo": lambda s: dr_grpo(s, TWO_PROMPTS),
        "reinforce": lambda s: s,
    }
    for name, baseline in baselines.items():
        theirs = g.outputs[name]
        returns = reward_to_go(shape_rewards(baseline(i["scores"]), kl, zero, mask, i["kl_coef"]), mask)
        g.close(returns, theirs["returns"])
        if name in ("reinforce", "reinforce_baseline"):  # these two whiten over all tokens, in float32
            g.close(biased_whiten(returns, mask), theirs["advantages"], mask, at_least=FLOAT32)
        else:
            g.close(returns, theirs["advantages"])


@both
def test_verl(golden_dir, precision):
    g = load(golden_dir, "verl_group_advantages", precision)
    i, mask = g.inputs, g.inputs["mask"].bool()
    scores = i["token_level_scores"].sum(1)

    def spread(advantages):  # verl writes a response's advantage on each of its tokens
        return torch.where(mask, advantages[:, None], 0)

    for name in ("groups 4+4", "groups 3+3+2", "groups 5+2+1(single)"):
        theirs = g.outputs[name]
        group = theirs["index"]
        alone = (group[:, None] == group).sum(1) == 1
        # a response alone in its group: 0 here, its raw score in verl; GRPO there divides it by a float32 1 + eps
        kept = torch.where(alone, scores, 0)
        g.close(spread(rloo(scores, group) + kept), theirs["rloo"])
        g.close(spread(grpo(scores, group) + kept / float(torch.tensor(1.0) + 1e-6)), theirs["grpo"])
        baseline = spread(dr_grpo(scores, group) + kept)
        g.close(baseline, theirs["grpo(no std = Dr.GRPO)"])
        g.close(verl_whiten(baseline, mask), theirs["reinforce++_baseline"])
        # OPO has no function here: its baseline is the mean over the group's *tokens* of their response's score
        per_token = spread(scores)
        means = [masked_mean(per_token, mask & (group == k)[:, None]) for k in group]
        g.close(spread(scores - torch.stack(means) * ~alone), theirs["opo"])

    rewards = i["token_level_rewards(with KL, for reinforce++ and remax)"]
    theirs = g.outputs["reinforce++ (gamma=1, kl in reward)"]
    _, returns = reinforce_plus_plus(rewards, mask)
    g.close(returns, theirs["returns"])
    g.close(verl_whiten(returns, mask), theirs["advantages"])
    theirs = g.outputs["remax"]  # not among our estimators: reward to go minus the greedy response's score
    g.close(returns, theirs["returns"])
    g.close(returns - spread(theirs["reward_baselines"]), theirs["advantages"])


def scored(estimator, scores, group):
    """TRL leaves responses without a score (NaN) out of their group and gives them 0."""
    known = ~scores.isnan()
    return torch.zeros_like(scores).masked_scatter(known, estimator(scores[known], group[known]))


@both
def test_trl_1_16_grpo(golden_dir, precision):
    g = load(golden_dir, "trl116_grpo_advantages", precision)
    rewards, n = g.inputs["rewards"], len(TWO_PROMPTS)
    unscorable = torch.where(torch.arange(n) == g.inputs["nan_row"], torch.nan, rewards)
    cases = {
        "": rewards,
        ",row2 unscorable (NaN reward)": unscorable,
        ",group0 all rewards equal 1.5": g.inputs["rewards_equal_case"],
    }
    for suffix, scores in cases.items():
        ours = scored(lambda s, group: grpo(s, group, eps=1e-4), scores, TWO_PROMPTS)
        g.close(ours, g.outputs["scale_rewards=group" + suffix], at_least=FLOAT32_RATIO)
        ours = scored(dr_grpo, scores, TWO_PROMPTS)
        g.close(ours, g.outputs["scale_rewards=none" + suffix])
        # scale_rewards=batch: the deviation of all scores instead of the group's
        known = ~scores.isnan()
        deviation = masked_var(scores, known).sqrt()
        g.close(ours / (deviation + 1e-4), g.outputs["scale_rewards=batch" + suffix], at_least=FLOAT32_RATIO)


@both
def test_trl_1_16_rloo(golden_dir, precision):
    """The KL of the whole response is part of its score, before the baseline; one ratio per response."""
    g = load(golden_dir, "trl116_rloo", precision)
    i, mask = g.inputs, g.inputs["mask"].bool()
    rewards, old = i["rewards"], i["old_logprobs"]
    kl = masked_sum(k1(old, i["ref_logprobs"]), mask, dim=1)
    ours = {
        "beta=0": rloo(rewards, TWO_PROMPTS),
        "beta=0.05": rloo(rewards - 0.05 * kl, TWO_PROMPTS),
        "beta=0,reward_clip_range=(-1,1)": rloo(rewards.clamp(-1, 1), TWO_PROMPTS),
        "beta=0,row2 unscorable (NaN)": scored(
            rloo, torch.where(torch.arange(len(rewards)) == 2, torch.nan, rewards), TWO_PROMPTS
        ),
    }
    for name, advantages in ours.items():
        g.close(advantages, g.outputs[name]["advantages"])
    g.close(masked_sum(old, mask, dim=1), g.outputs["beta=0"]["old_logps"])
    # normalize_advantages: whitened over the batch, with std + 1e-4 in place of sqrt(var + 1e-8)
    everything = torch.ones(len(rewards), dtype=torch.bool)
    deviation = masked_var(ours["beta=0"], everything).sqrt()
    whitened = whiten(ours["beta=0"], everything) * (deviation**2 + 1e-8).sqrt() / (deviation + 1e-4)
    g.close(whitened, g.outputs["beta=0,normalize"]["advantages"], at_least=FLOAT32_RATIO)

    theirs = g.outputs["loss(with beta=0.05 advantages, sequence-level ratio)"]
    new = i["new_logprobs"].requires_grad_()
    log_probs = (masked_sum(new, mask, dim=1), masked_sum(old, mask, dim=1))
    loss = policy_loss(*log_probs, ours["beta=0.05"], i["epsilon"]).mean()
    g.close(loss, theirs["loss"])
    g.close(gradient(loss, new)[0], theirs["grad_new_logprobs"])
