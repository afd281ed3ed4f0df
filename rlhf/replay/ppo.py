"""A bad step of PPO, or a bad iteration, from its file."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.loader import open_data, prompts_of
from data.tokenizer import load_tokenizer
from rlhf.advantages import ESTIMATORS
from rlhf.functional import whiten
from rlhf.infra import checkpoint
from rlhf.infra.brakes import LARGEST, Formula
from rlhf.infra.distributed import Dist
from rlhf.infra.metrics import say
from rlhf.infra.optim import Precision
from rlhf.lm.pretrained import Pretrained, open_base
from rlhf.lm.trunks import LoRA
from rlhf.ppo.guard import Limits, step_formulas
from rlhf.ppo.roles import LAYOUTS, Roles
from rlhf.ppo.rollout import Experience
from rlhf.ppo.update import Objective, accumulate_gradient
from rlhf.reward.scorer import open_scorer
from rlhf.rewards import missing_eos, shape_rewards


def formulas(
    record: dict, tensors: dict[str, Tensor], saved: checkpoint.Checkpoint, device: torch.device, precision: Precision
) -> Iterator[Formula]:
    """What the iteration or the step computed, in its order, with the weights that it had."""
    options, prompts = record["options"], tensors.pop("prompts", None)
    base = base_of(record, saved.path, device)
    roles = roles_of(options, base, saved)
    tensors = {name: x.to(device) for name, x in tensors.items()}
    if "features" not in tensors or not tensors["features"].numel():  # of several ranks: none is stored
        with precision.autocast():
            tensors["features"] = roles.features(tensors["tokens"])
    batch = Experience(**tensors)
    if prompts is not None:
        with precision.autocast():
            yield from iteration_formulas(record, batch, prompts, roles, base, saved)
        return
    objective = Objective(**record["objective"])
    accumulate_gradient(roles.policy, batch, objective, record["micro_batch"], Dist(device=device), precision)
    limits = Limits(**record["limits"])
    yield from step_formulas(roles.policy, batch, objective, limits, record["micro_batch"], precision)


def base_of(record: dict, where: Path, device: torch.device) -> Pretrained:
    """The model that --init named, known by its sha256 wherever it lies now."""
    options = record["options"]
    return open_base({"base": options["init"], "base_digest": options["init_sha256"]}, where, device)


def roles_of(options: dict, base: Pretrained, saved: checkpoint.Checkpoint) -> Roles:
    """Policy, critic and reference, with the stored weights; they are not looked at, because they may be what is bad."""
    tensors = saved.tensors
    critic = "shared" if "value_head.weight" in tensors else "none"
    critic = "separate" if any(name.startswith("value_trunk.") for name in tensors) else critic
    lora = LoRA(*(options.get(name, 0) for name in ("lora_rank", "lora_alpha", "lora_targets")))
    build = LAYOUTS[options["layout"]]
    roles = build(base.model.eval(), critic, options.get("temperature", 1.0), lora, options["branch_layers"])
    checkpoint.load_weights(roles.policy, tensors, saved.path)
    return roles


@torch.no_grad()
def iteration_formulas(
    record: dict, batch: Experience, prompts: Tensor, roles: Roles, base: Pretrained, saved: checkpoint.Checkpoint
) -> Iterator[Formula]:
    """From the scores to the returns, all computed again."""
    options, device = record["options"], batch.tokens.device
    score = partial(score_again, options, roles, base, saved.path)
    yield Formula("scores", scores := score(batch, prompts), LARGEST)
    output = roles.policy(batch.tokens, batch.mask, batch.features)
    yield Formula("logprobs", output.logprobs, LARGEST)
    yield Formula("ref_logprobs", ref := roles.reference(batch.tokens, batch.mask, batch.features), LARGEST)
    yield Formula("values", values := batch.base_values + output.values, LARGEST)
    scores = missing_eos(scores, batch.finished, options["eos_penalty"])
    how = (record["kl_coef"], options["kl_estimator"])
    yield Formula("rewards", rewards := shape_rewards(scores, output.logprobs, ref, batch.mask, *how), LARGEST)
    group = torch.arange(len(batch), device=device) // options["samples_per_prompt"]
    estimator = ESTIMATORS[options["estimator"]]
    credit = estimator.estimate(rewards, values, batch.mask, options["gamma"], options["lam"], group)
    yield Formula("advantages", whiten(credit[0], batch.mask) if estimator.whiten else credit[0], LARGEST)
    yield Formula("returns", credit[1], LARGEST)


def score_again(
    options: dict, roles: Roles, base: Pretrained, where: Path, batch: Experience, prompts: Tensor
) -> Tensor:
    """By the reward of the run; the stored scores where it is not there any more."""
    tokenizer = load_tokenizer(where)
    try:
        data = open_data(options["data"], "train")
        records = prompts_of(
            data, 1, 0, starts=options["prompt_tokens"], context=base.model.config.context,
            response_tokens=options["response_tokens"],
        ).records  # fmt: skip
        asked = {"records": records, "template": data.template}
        reward = open_scorer(options["reward"], tokenizer, batch.tokens.device, base, roles.frozen, **asked)
        each = torch.arange(len(batch)) // options["samples_per_prompt"]
        return reward.score(batch.tokens, batch.lengths, batch.mask, prompts[each])
    except (OSError, ValueError) as error:
        say(f"scores are those of the file: {' '.join(str(error).split())}")
        return batch.scores
