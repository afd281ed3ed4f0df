"""KL estimators and the coefficient's controllers against OpenRLHF, verl and TRL."""

import torch
from golden import FLOAT32, both, gradient, load

from rlhf.kl import AdaptiveKL, FixedKL, full_kl, k1, k2, k3


@both
def test_estimators(golden_dir, precision):
    g = load(golden_dir, "kl_estimators__openrlhf_verl", precision)
    p, q = g.inputs["logprobs"], g.inputs["ref_logprobs"]
    theirs = g.outputs["per_token"]
    for name, ours in (("k1", k1(p, q)), ("k2", k2(p, q)), ("k3", k3(p, q))):
        g.close(ours, theirs[f"verl kl_penalty_forward({name})"])
        g.close(ours, theirs[f"OpenRLHF compute_approx_kl({name})"], at_least=FLOAT32)  # OpenRLHF casts to float32
    g.close(k1(p, q).abs(), theirs["verl kl_penalty_forward(abs)"])


@both
def test_gradients(golden_dir, precision):
    g = load(golden_dir, "kl_estimators__openrlhf_verl", precision)
    p, q = g.inputs["logprobs"].requires_grad_(), g.inputs["ref_logprobs"]
    for name, estimator in (("k1", k1), ("k2", k2), ("k3", k3)):
        (ours,) = gradient(estimator(p, q).sum(), p)
        g.close(ours, g.outputs["grad_of_sum_wrt_logprobs"][f"verl kl_penalty({name})"])


@both
def test_guards_on_extreme_inputs(golden_dir, precision):
    """Ours are the plain formulas. OpenRLHF clamps every estimator to +-10, verl k3 alone."""
    g = load(golden_dir, "kl_estimators__openrlhf_verl", precision)
    p, q = g.inputs["extreme_logprobs"], g.inputs["extreme_ref_logprobs"]
    theirs = g.outputs["extreme"]
    for name, ours in (("k1", k1(p, q)), ("k2", k2(p, q)), ("k3", k3(p, q))):
        g.close(ours.clamp(-10, 10), theirs[f"OpenRLHF {name}"], at_least=FLOAT32)
        g.close(ours.clamp(-10, 10) if name == "k3" else ours, theirs[f"verl {name}"])
    assert (k3(p, q) > 10).any()  # the clamp is not idle on these inputs


@both
def test_full_kl_of_trl_0_11(golden_dir, precision):
    g = load(golden_dir, "trl0114_kl_penalty_full", precision)
    ours = full_kl(g.inputs["logprobs(full vocab)"], g.inputs["ref_logprobs(full vocab)"])
    g.close(ours, g.outputs["full"])


def trace(controller, kls, n):
    """The coefficient before the first update and after each."""
    coefs = [controller.coef]
    for kl in kls:
        controller.update(kl, n)
        coefs.append(controller.coef)
    return torch.tensor(coefs, dtype=torch.float64)


def test_controllers_of_trl_0_11(golden_dir):
    g = load(golden_dir, "trl0114_kl_controllers")
    kls = g.inputs["current_kl_sequence"].tolist()
    cases = {
        "init=.15,target=6,horizon=10000,n=512": (AdaptiveKL(0.15, 6, 10000), 512),
        "init=.2,target=6,horizon=10000,n=64": (AdaptiveKL(0.2, 6, 10000), 64),
        "init=.05,target=.1,horizon=100,n=8": (AdaptiveKL(0.05, 0.1, 100), 8),
    }
    for name, (controller, n) in cases.items():
        g.close(trace(controller, kls, n), g.outputs[name])
    assert set(trace(FixedKL(0.2), kls, 8).tolist()) == {g.outputs["fixed(.2)"]}


def test_controller_of_verl(golden_dir):
    """The same numbers; but verl feeds it the mean KL per *token*, where ours and TRL's target is per sequence."""
    g = load(golden_dir, "verl_kl_controller")
    i = g.inputs
    controller = AdaptiveKL(i["init"], i["target"], i["horizon"])
    g.close(trace(controller, i["current_kl_sequence"].tolist(), i["n_steps"]), g.outputs["values"])
