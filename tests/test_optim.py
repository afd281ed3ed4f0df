"""The optimiser step against AdamW's paper, PyTorch's own trajectory, HF's schedules, and by what must never change."""

import ctypes
import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rlhf.infra import optim

CPU = torch.device("cpu")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class OneNumber(nn.Module):
    """A module with one weight, to feed the gradients of a recorded trajectory."""

    def __init__(self, value: float, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=dtype))


def make_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 11))


def backward(net: nn.Module, seed: int, scale: float = 1.0) -> None:
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(seed))
    (scale * nn.functional.cross_entropy(net(ids).flatten(0, 1), ids.flatten())).backward()


def train(net, optimizer, steps, scaler=None, clip=1.0):
    scaler = scaler or optim.amp(CPU).scaler
    for i in steps:
        backward(net, seed=i)
        optim.step(optimizer, net, scaler, clip)


def bits(net: nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in net.parameters()]


# ---- AdamW


def slow_adamw(weight, gradients, lr, decay, beta1, beta2, eps):
    """arXiv:1711.05101, algorithm 2, one number at a time; PyTorch's reading: decay is multiplied by the learning rate."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        weight = weight - lr * decay * weight - lr * m_hat / (math.sqrt(v_hat) + eps)
    return weight


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=6),
    st.floats(1e-5, 1e-1),
    st.floats(0, 0.5),
    st.floats(0, 0.99),
    st.floats(0.5, 0.999),
    st.booleans(),
)
def test_adamw_is_the_papers(gradients, lr, decay, beta1, beta2, matrix):
    module = OneNumber(1.5)
    if matrix:
        module.weight = nn.Parameter(module.weight.detach()[None])
    optimizer = optim.make_optimizer(module, lr, decay, (beta1, beta2), eps=1e-6)
    for g in gradients:
        module.weight.grad = torch.full_like(module.weight, g)
        optim.step(optimizer, module, optim.amp(CPU).scaler, clip=0.0)
    expected = slow_adamw(1.5, gradients, lr, decay if matrix else 0.0, beta1, beta2, 1e-6)
    assert module.weight.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("eps", ["1e-5", "1e-8"])
def test_adamw_follows_the_recorded_trajectory(golden_dir, eps):
    golden = json.loads((golden_dir / "adam_tf_vs_pytorch.json").read_text())
    inputs, expected = golden["inputs"], golden["outputs"][f"torch(eps={eps})"]
    module = OneNumber(inputs["init"])
    optimizer = optim.make_optimizer(module, inputs["lr"], betas=tuple(inputs["betas"]), eps=float(eps))
    for g, after in zip(inputs["grads"], expected, strict=True):
        module.weight.grad = torch.tensor([g], dtype=torch.float64)
        optim.step(optimizer, module, optim.amp(CPU).scaler, clip=0.0)
        assert module.weight.item() == pytest.approx(after, rel=1e-13)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_adamw_is_torchs_to_the_bit(clip):
    """Of parameters of two types, one of which has no gradient at times."""
    ours, theirs = make_net(), make_net()
    for net in (ours, theirs):
        net[4].double()
    optimizer = optim.make_optimizer(ours, 1e-2, 0.1)
    groups = [{"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1}]
    groups += [{"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    other = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        for mine, its in zip(ours.parameters(), theirs.parameters()):
            mine.grad = torch.randn(mine.shape, generator=generator).to(mine.dtype)
            its.grad = mine.grad.clone()
        if step % 2:
            ours[1].weight.grad = theirs[1].weight.grad = None
        norm = optim.step(optimizer, ours, optim.amp(CPU).scaler, clip)
        other.grad_scale = torch.tensor(norm + 1e-6).div(clip).clamp(min=1) if clip else None
        other.step()
        for mine, its in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(mine, its, rtol=1e-5 if clip else 0, atol=1e-9 if clip else 0)
            for name, x in other.state.get(its, {}).items():
                torch.testing.assert_close(
                    optimizer.state[mine][name], x, rtol=1e-5 if clip else 0, atol=1e-9 if clip else 0
                )


def test_a_trainer_of_one_process_never_loads_torchs_compiler():
    """A second and 74 MB in every process."""
    code = """
import sys, torch
from rlhf.infra import optim
net = torch.nn.Linear(2, 2)
optimizer = optim.make_optimizer(net, 0.1)
net(torch.ones(2)).sum().backward()
optim.step(optimizer, net, optim.amp(torch.device("cpu")).scaler, 1.0)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_matrices_decay_and_nothing_else_does():
    net = make_net()
    optimizer = optim.make_optimizer(net, 1e-3, weight_decay=0.1)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in net.named_parameters()} == {
        "0.weight": 0.1,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.1,
        "2.bias": 0.0,
        "4.weight": 0.1,
        "4.bias": 0.0,
    }


def test_frozen_weights_are_left_alone():
    net = make_net()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    optimizer = optim.make_optimizer(net, 1e-2, weight_decay=0.5)
    train(net, optimizer, range(3))
    assert torch.equal(net[0].weight, before) and net[0].weight not in optimizer.state
    assert len(optimizer.state) == 6


def test_the_same_run_twice_has_the_same_bits():
    runs = []
    for _ in range(2):
        net = make_net()
        train(net, optim.make_optimizer(net, 1e-2, 0.1), range(5))
        runs.append(bits(net))
    assert runs[0] == runs[1] != bits(make_net())


# ---- the learning rate


def test_schedule_is_the_one_of_hf(golden_dir):
    """HF's first warm-up step has learning rate zero and is wasted; ours rises from 1/(warmup+1). After it they agree."""
    golden = json.loads((golden_dir / "hf_lr_schedules.json").read_text())["outputs"]
    for name, kind, warmup in [
        ("linear,warmup=2,total=10", "linear", 2),
        ("cosine,warmup=2,total=10", "cosine", 2),
        ("constant_with_warmup,2", "constant", 2),
        ("linear,warmup=0,total=10", "linear", 0),
    ]:
        ours = [optim.schedule(i, 10, warmup, 1.0, kind) for i in range(11)]
        assert ours[warmup:] == pytest.approx(golden[name][warmup:], abs=1e-15)
        assert ours[:warmup] == pytest.approx([(i + 1) / (warmup + 1) for i in range(warmup)])


@given(st.integers(1, 200), st.integers(0, 50), st.sampled_from(["linear", "cosine", "constant"]))
def test_schedule_rises_then_falls_and_never_wastes_a_step(total, warmup, kind):
    rates = [optim.schedule(i, total, warmup, 3e-4, kind) for i in range(total)]
    assert all(0 < rate <= 3e-4 for rate in rates)
    up, down = rates[: warmup + 1], rates[warmup:]
    assert up == sorted(up) and down == sorted(down, reverse=True)
    if warmup < total:
        assert rates[warmup] == 3e-4


def test_set_lr():
    net = make_net()
    optimizer = optim.make_optimizer(net, 1e-3, 0.1)
    optim.set_lr(optimizer, 5e-5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-5}


# ---- the step


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e9])
def test_step_returns_the_global_norm_and_clips_it(clip):
    """The step is the one on gradients that torch clipped before; what passes has the same bits."""
    net, plain, seen = make_net(), make_net(), {}
    for module in (net, plain):
        backward(module, seed=0)
    norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in net.parameters()))
    optimizer = optim.make_optimizer(net, 1e-3)
    zero_grad = optimizer.zero_grad
    optimizer.zero_grad = lambda: (seen.update({n: p.grad.clone() for n, p in net.named_parameters()}), zero_grad())
    assert optim.step(optimizer, net, optim.amp(CPU).scaler, clip) == pytest.approx(norm, rel=1e-6)
    used = math.sqrt(sum(float((g.double() ** 2).sum()) for g in seen.values()))
    assert used == pytest.approx(min(norm, clip or norm), rel=1e-4)
    assert all(p.grad is None for p in net.parameters())
    nn.utils.clip_grad_norm_(plain.parameters(), clip or math.inf)
    optim.make_optimizer(plain, 1e-3).step()
    assert clip == 0.05 or bits(net) == bits(plain)
    for a, b in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_taken_again_without_page_faults():
    """64 MiB taken, written and freed again and again: after a few times none of its 16,384 pages is faulted in."""
    code = """
import resource, torch
from rlhf.infra.optim import make_optimizer
make_optimizer(torch.nn.Linear(1, 1), 1.0)
for _ in range(10):  # glibc finds up to four places for it, by where the heap happens to begin
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**14


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_scaled_step_that_is_not_finite_is_skipped_and_says_so(poison, clip):
    net = make_net()
    optimizer = optim.make_optimizer(net, 1e-2, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    backward(net, 0, scaler.scale(torch.tensor(1.0)).item())
    optim.step(optimizer, net, scaler, clip)
    weights, moments = bits(net), [t.clone() for s in optimizer.state.values() for t in s.values()]

    backward(net, 1, scaler.scale(torch.tensor(1.0)).item())
    net[2].weight.grad[0, 0] = poison
    assert not math.isfinite(optim.step(optimizer, net, scaler, clip))
    assert bits(net) == weights
    assert all(torch.equal(a, b) for a, b in zip(moments, [t for s in optimizer.state.values() for t in s.values()]))
    assert scaler.get_scale() == 2.0  # the scaler backs off

    backward(net, 2, scaler.scale(torch.tensor(1.0)).item())
    assert math.isfinite(optim.step(optimizer, net, scaler, clip))  # and the run goes on
    assert bits(net) != weights


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_without_a_loss_scale_a_step_that_is_not_finite_is_left_to_the_caller(poison, clip):
    """Not taken, and the gradients stay as they are: they show which parameter it was."""
    net = make_net()
    optimizer, scaler = optim.make_optimizer(net, 1e-2), torch.amp.GradScaler("cpu", enabled=False)
    backward(net, 0, 1.0)
    net[2].weight.grad[0, 0] = poison
    weights, held = bits(net), [p.grad.clone() for p in net.parameters()]
    assert not math.isfinite(optim.step(optimizer, net, scaler, clip))
    assert bits(net) == weights and not any(x.any() for state in optimizer.state.values() for x in state.values())
    assert all(torch.equal(a.nan_to_num(), p.grad.nan_to_num()) for a, p in zip(held, net.parameters()))


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_a_loss_scale_changes_nothing(clip):
    """Scaled by a power of two and unscaled again, the step has the same bits: clipping sees the true norm."""
    results = []
    for scaler in (optim.amp(CPU).scaler, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        net = make_net()
        optimizer = optim.make_optimizer(net, 1e-2, 0.1)
        for i in range(3):
            ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(i))
            loss = nn.functional.cross_entropy(net(ids).flatten(0, 1), ids.flatten())
            scaler.scale(loss).backward()
            norm = optim.step(optimizer, net, scaler, clip)
        results.append((norm, bits(net)))
    assert results[0] == results[1]


def test_micro_batches_add_up():
    """Losses divided by the whole batch's count: four micro-batches make the same step as one batch."""
    inputs = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    weights = []
    for size in (8, 2):
        net = nn.Linear(8, 1).double()
        nn.init.ones_(net.weight), nn.init.zeros_(net.bias)
        optimizer = optim.make_optimizer(net, 1e-2)
        for rows in inputs.double().split(size):
            (net(rows).square().sum() / len(inputs)).backward()
        optim.step(optimizer, net, optim.amp(CPU).scaler, 1.0)
        weights.append(net.weight.detach().clone())
    torch.testing.assert_close(*weights, rtol=1e-12, atol=0)


# ---- precision


def test_fp32_is_a_null_object():
    autocast, scaler, dtype = optim.amp(CPU)
    with autocast(), autocast():  # can be entered again and again
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    loss = torch.tensor(3.0)
    assert scaler.scale(loss) is loss and not scaler.is_enabled()
    assert json.loads(json.dumps(scaler.state_dict())) == {} and dtype == torch.float32


def test_fp16_on_a_cpu_is_an_error():
    with pytest.raises(ValueError, match="fp16 needs a CUDA device and this run is on cpu; use fp32, or bf16"):
        optim.amp(CPU, "fp16")


@pytest.mark.parametrize(
    "device, dtype", [("cpu", "bf16"), *(pytest.param("cuda", x, marks=cuda) for x in ("bf16", "fp16"))]
)
def test_mixed_precision_learns_what_fp32_learns(device, dtype):
    device, kind = torch.device(device, 0), optim.DTYPES[dtype]
    losses = {}
    for name in ("fp32", dtype):
        net = make_net().to(device)
        optimizer = optim.make_optimizer(net, 1e-2)
        autocast, scaler, _ = optim.amp(device, name)
        for i in range(30):
            ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(i)).to(device)
            with autocast():
                logits = net(ids)
                loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
            assert logits.dtype == (torch.float32 if name == "fp32" else kind)
            scaler.scale(loss).backward()
            optim.step(optimizer, net, scaler, 1.0)
        assert all(p.dtype == torch.float32 for p in net.parameters())
        assert scaler.is_enabled() == (name == "fp16") and json.dumps(scaler.state_dict())
        losses[name] = loss.item()
    assert losses[dtype] == pytest.approx(losses["fp32"], abs=0.05)
