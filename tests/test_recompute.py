"""Blocks computed again for the backward pass: the same gradients to the bit, and what is kept of a forward is less."""

from collections.abc import Callable

import pytest
import torch
from reference_model import random_ids
from small_rollout import base_model
from torch import nn

from model.transformer import recompute_blocks
from rlhf.infra import checkpoint
from rlhf.lm import language_model as language_models
from rlhf.lm.language_model import LanguageModel
from rlhf.lm.trunks import LoRA
from rlhf.ppo.plan import Sizes, plan
from rlhf.ppo.roles import LAYOUTS
from rlhf.reward.model import RewardModel

TOKENS, LENGTHS = random_ids(0, 4, 12), torch.tensor([12, 7, 12, 3])
COLUMNS = torch.arange(12)
MASK = (COLUMNS >= 2) & (COLUMNS < LENGTHS[:, None])


def language_model() -> tuple[nn.Module, Callable]:
    module = LanguageModel(base_model())
    return module, lambda: module(TOKENS, MASK, LENGTHS).sum()


def reward_model() -> tuple[nn.Module, Callable]:
    module = RewardModel(base_model("qwen2"), "last", torch.Generator().manual_seed(5)).double()
    return module, lambda: module.score(TOKENS, LENGTHS, MASK).square().sum()


def policy(layout: str, critic: str) -> tuple[nn.Module, Callable]:
    roles = LAYOUTS[layout](base_model(), critic, 1.0, LoRA(rank=3), 1)
    nn.init.ones_(roles.policy.value_head.weight)

    def loss():
        output = roles.policy(TOKENS, MASK, roles.features(TOKENS))
        return (output.logprobs + output.values.square()).sum()

    return roles.policy, loss


MODULES = {
    "language model, packed": language_model,
    "reward model, packed, its last layer at the last tokens": reward_model,
    "full": lambda: policy("full", "separate"),
    "shared": lambda: policy("shared", "shared"),
    "adapters": lambda: policy("adapters", "separate"),
    "branch": lambda: policy("branch", "shared"),
}


def kept_by(loss: Callable, parameters: set[int]) -> tuple[torch.Tensor, int]:
    """The loss, and bytes of what its forward keeps beside the parameters."""
    kept: dict[int, int] = {}

    def keep(x):
        if x.data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        return loss(), sum(kept.values())


@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
def test_the_gradients_are_the_same_bits_and_less_is_kept(build):
    module, loss = build()
    gradients, sizes = [], []
    for on in (False, True):
        recompute_blocks(module, on)
        module.zero_grad()
        value, size = kept_by(loss, {x.data_ptr() for x in module.parameters()})
        value.backward()
        gradients.append({name: x.grad for name, x in module.named_parameters() if x.grad is not None})
        sizes.append(size)
    plain, again = gradients
    assert plain and plain.keys() == again.keys() and all(torch.equal(x, again[name]) for name, x in plain.items())
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("build", [language_model, MODULES["shared"]], ids=["language model", "shared"])
def test_logits_of_a_few_rows_at_a_time(build, monkeypatch):
    """Losses and gradients are those of all logits at once, but for the order in which a sum is taken."""
    module, loss = build()
    model, found = module.model, []
    for at_once in (None, 3 * module.model.config.vocab_size):
        if at_once:
            recompute_blocks(module)
            monkeypatch.setattr(language_models, "LOGITS_AT_ONCE", at_once)
        module.zero_grad()
        calls = []
        monkeypatch.setattr(
            model, "unembed", lambda x, calls=calls: calls.append(len(x)) or type(model).unembed(model, x)
        )
        value = loss()
        value.backward()
        found.append([value.detach(), *(x.grad for x in module.parameters() if x.grad is not None)])
    assert max(calls) == 3 and sum(calls) == 2 * int(MASK.sum())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_lm.py", "train_rm.py", "train_ppo.py"])
def test_a_run_with_it_is_the_same_run(world, tmp_path, script):
    for name, options in {"plain": {}, "again": {"recompute": "true"}}.items():
        world.ok(script, out=tmp_path / name, **options)
    plain, again = (checkpoint.load(tmp_path / name).tensors for name in ("plain", "again"))
    assert plain.keys() == again.keys() and all(torch.equal(x, again[name]) for name, x in plain.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_counts_it(layout):
    config = base_model().config
    how = dict(batch=8, micro_batch=4, prompt=5, response=6, branch_layers=2)
    plans = [plan(config, Sizes(**how, recompute=on), layout) for on in (False, True)]
    assert plans[1]["activations"] < plans[0]["activations"]
    assert all(plans[0][name] == plans[1][name] for name in plans[0] if name != "activations")
