"""Half precision: it stays near float32, stores what it says, resumes bit by bit, and is chosen by what the device can do."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import random_ids, small_model
from small_rollout import EOS, PAD, TEMPERATURE, reward_model
from test_resume import assert_equal_runs
from tiny import lines

from model.generate import Sampling, generate, row_uniforms
from model.half import Half, HalfLinear, product, to_sample_with
from model.lora import LoRALinear
from model.panels import can_pack, packed, packed_linear
from rlhf.functional import logprobs_and_entropy
from rlhf.infra import optim
from rlhf.infra.distributed import Dist
from rlhf.infra.healthy import TOLERANCE
from rlhf.infra.precision import has_fast_bf16, stored_precision
from rlhf.lm.trunks import LoRA
from rlhf.ppo.roles import LAYOUTS, Roles
from rlhf.ppo.rollout import judge
from rlhf.ppo.self_check import self_check

BF16 = optim.amp(torch.device("cpu"), "bf16")
needs_panels = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="oneDNN has no bf16 for this CPU")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_family = pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "olmo2", "gemma2"])


def roles_in(dtype: torch.dtype, layout: str, family: str) -> Roles:
    base = small_model(family, torch.float32, seed=15)
    critic = "separate" if layout == "full" else "shared"
    return LAYOUTS[layout](base, critic, TEMPERATURE, LoRA(2), 1).stored_in(dtype)


@pytest.fixture(params=["plain", pytest.param("packed", marks=needs_panels)])
def copies(request, monkeypatch):
    """Whether copies that sample keep panels, where the CPU has some."""
    if request.param == "plain":
        monkeypatch.setattr("model.half.LARGEST", -1)


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[:, :3] = False
    return random_ids(1, 4, 12), mask


@torch.no_grad()
def train_a_little(roles: Roles) -> None:
    generator = torch.Generator().manual_seed(5)
    for x in roles.policy.parameters():
        if x.requires_grad:
            x += 0.02 * torch.randn(x.shape, generator=generator)


# ---- what is computed


@every_layout
@every_family
def test_policy_and_reference_start_as_the_same_bits(layout, family):
    """Weights that autocast rounds and weights that are stored rounded give the same product."""
    roles, (tokens, mask) = roles_in(torch.bfloat16, layout, family), texts()
    with BF16.autocast():
        ours = roles.policy(tokens, mask, roles.features(tokens)).logprobs
        theirs = roles.reference(tokens, mask, roles.features(tokens))
    assert torch.equal(ours, theirs)
    assert torch.equal(theirs, roles.reference(tokens, mask, roles.features(tokens)))  # which needs no autocast


@every_layout
@every_family
def test_log_probs_and_gradients_stay_near_float32(layout, family):
    found = []
    for precision in (optim.amp(torch.device("cpu")), BF16):
        roles, (tokens, mask) = roles_in(precision.dtype, layout, family), texts()
        torch.nn.init.constant_(roles.policy.value_head.weight, 0.1)
        for name, x in roles.policy.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.constant_(x, 0.01)
        with precision.autocast():
            output = roles.policy(tokens, mask, roles.features(tokens))
        assert {x.dtype for x in vars(output).values()} == {torch.float32}
        sum(x.sum() for x in vars(output).values()).backward()
        gradient = torch.cat([x.grad.flatten() for x in roles.policy.parameters() if x.grad is not None])
        found.append((output, gradient))
    (exact, exact_gradient), (half, gradient) = found
    difference = (half.logprobs - exact.logprobs)[mask]
    # nats, of logits up to 20 where a step of bf16 is 1/8; found: .015 to .053, -.004 to .017, .003 to .095 and .01 to .09
    assert difference.abs().mean() < TOLERANCE["bf16"] and difference.mean().abs() < 0.03
    assert (half.values - exact.values).abs().max() < 0.2
    assert (gradient - exact_gradient).norm() / exact_gradient.norm() < 0.15


def test_entropy_is_that_of_float32_under_autocast():
    """torch.linalg.vecdot is on autocast's list of half-precision products."""
    logits, tokens = 4 * torch.randn(6, 50, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.arange(6)
    alone = logprobs_and_entropy(logits, tokens, 0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = logprobs_and_entropy(logits, tokens, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(alone, under))
    p = (logits.double() / 0.7).softmax(-1)
    torch.testing.assert_close(under[1].double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-5)


def test_values_pass_no_half_precision_product():
    roles, (tokens, mask) = roles_in(torch.bfloat16, "shared", "llama"), texts()
    head, hidden = roles.policy.value_head, []
    torch.nn.init.normal_(head.weight, std=5.0, generator=torch.Generator().manual_seed(1))
    head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    with BF16.autocast():
        values = roles.policy(tokens, mask).values[mask]
    torch.testing.assert_close(
        values.double(), (hidden[0].double() @ head.weight.double().T)[:, 0], rtol=1e-5, atol=1e-5
    )


# ---- the copy that samples


@pytest.mark.usefixtures("copies")
@every_layout
@every_family
def test_the_sampler_is_the_policy_of_now(layout, family):
    roles = roles_in(torch.bfloat16, layout, family)
    roles.sampler()
    roles.rest()
    train_a_little(roles)
    model, policy = roles.sampler(), roles.policy.model
    for name, layer in model.named_modules():
        if isinstance(layer, HalfLinear) and not layer.weight.is_meta:  # else its panels alone are there
            own = policy.get_submodule(name)
            weight = own.merged("policy") if isinstance(own, LoRALinear) else own.weight
            assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, weight.bfloat16()), name
            assert own.bias is None or torch.equal(layer.bias, own.bias.bfloat16())
    assert torch.equal(model.embed_tokens.weight, policy.embed_tokens.weight.bfloat16())
    for name, x in model.named_parameters():
        assert "norm" not in name and "positions" not in name or x is policy.get_parameter(name)  # float32, and its own

    ids = random_ids(3, 2, 9)
    with torch.no_grad():
        with BF16.autocast():
            expected = policy(ids).float()
        found = model(ids).float()  # products of joined matrices, without autocast
        torch.testing.assert_close(found, expected, rtol=0, atol=0.5 if layout == "adapters" else 0.1)
        assert (found - expected).abs().mean() < 0.05


@every_layout
def test_frozen_weights_are_kept_once_and_in_half(layout):
    roles = roles_in(torch.bfloat16, layout, "llama")
    policy, sampler = roles.policy.model, roles.sampler()
    frozen = {name: x for name, x in policy.named_parameters() if not x.requires_grad and x.ndim == 2}
    assert bool(frozen) == (layout in ("adapters", "branch"))
    for name, x in frozen.items():
        assert x.dtype == torch.bfloat16, name
        if layout == "branch":
            assert sampler.get_parameter(name).data_ptr() == x.data_ptr(), name
    kept = [x.dtype for x in roles.frozen.model.parameters() if x.ndim == 2]  # the reference
    assert set(kept) == {torch.bfloat16}
    assert all(x.dtype == torch.float32 for x in roles.policy.parameters() if x.requires_grad)


def test_float32_is_left_alone():
    roles = roles_in(torch.float32, "branch", "llama")
    assert roles.sampler() is roles.policy.model and not any(isinstance(x, HalfLinear) for x in roles.policy.modules())


@pytest.mark.usefixtures("copies")
@every_layout
def test_the_self_check_passes_and_finds_a_stale_sampler(layout):
    roles = roles_in(torch.bfloat16, layout, "llama")
    score = reward_model(torch.float32).score
    ids, lengths = random_ids(7, 8, 4), torch.full((8,), 4)
    drawing = Sampling(8, [EOS], PAD, TEMPERATURE), row_uniforms(1, 0, range(8), 8)

    def failed(samples) -> list[str]:
        with torch.no_grad(), BF16.autocast():
            how = (4, samples.tokens.shape[1], roles.features)
            rollout = judge(samples, roles.policy, roles.reference, score, *how)
            checks = self_check(roles.policy, rollout, score, EOS, Dist(), precision="bf16")
        assert all(check.largest >= check.value for check in checks if check.largest is not None)
        return [check.name.split(":")[0] for check in checks if not check.passed]

    samples = generate(roles.sampler(), ids, lengths, *drawing)
    assert failed(samples) == []
    with torch.no_grad():
        for x in roles.policy.parameters():
            if x.requires_grad:
                x += 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    assert "sampler" in failed(samples)  # of the weights before


@needs_panels
def test_panels_follow_weights_that_are_exchanged():
    """As a server's are: in place, through the state dict, and by other memory."""
    model, other = (small_model("llama", torch.bfloat16, seed=n).requires_grad_(False) for n in (15, 16))
    ids, half = random_ids(1, 2, 5), to_sample_with(model, torch.bfloat16)
    before, expected = half(ids), to_sample_with(other, torch.bfloat16)(ids)
    assert torch.equal(half(ids), before) and not torch.equal(before, expected)
    for name, x in half.state_dict().items():
        x.copy_(other.state_dict()[name])
    assert torch.equal(half(ids), expected)
    for x in half.parameters():
        x.data = x.data.clone().zero_()
    assert not half(ids).any()


def test_a_quantized_or_merged_copy_is_not_asked_for_twice():
    """Half of a model whose weights are in half already shares them."""
    model = small_model("llama", torch.float32, seed=15).requires_grad_(False)
    first = Half(model, torch.bfloat16).model
    weight = first.layers[0].self_attn.k_proj.weight
    assert weight.data_ptr() == model.layers[0].self_attn.k_proj.weight.data_ptr()
    assert torch.equal(first(random_ids(1, 2, 5)), model(random_ids(1, 2, 5)))


# ---- which one


@dataclass(frozen=True)
class Options:
    out: str
    precision: str = "auto"


def test_a_cpu_without_fast_bf16_computes_in_float32(tmp_path):
    """... and leaves a run in bf16 to another machine, unless it is told to go on."""
    (tmp_path / "run.json").write_text(json.dumps({"precision": "bf16"}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
from test_precision import *
from rlhf.infra.precision import settled
print(has_fast_bf16(torch.device("cpu")), settled(Options({str(tmp_path / "new")!r}), Dist()).precision)
print(settled(Options({str(tmp_path)!r}, "bf16"), Dist()).precision)
try:
    settled(Options({str(tmp_path)!r}), Dist())
except ValueError as error:
    print(error)
"""
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said, found, explicit, refused = done.stdout.splitlines()
    assert (said, found, explicit) == ("precision: fp32, the fastest here", "False fp32", "bf16")
    assert str(tmp_path) in refused and "bf16" in refused and "--precision=bf16" in refused


def test_a_run_keeps_its_precision(world, tmp_path):
    """run.json says what was chosen; the same command, and the chosen name, go on; another is refused."""
    out = world.ok("train_lm.py", out=tmp_path, precision="auto", epochs=1)
    chosen = json.loads((tmp_path / "run.json").read_text())["precision"]
    assert chosen == ("bf16" if has_fast_bf16(torch.device("cpu")) else "fp32")
    assert f"precision: {chosen}, the fastest here" in out
    assert f"precision: {chosen}, as the run began" in world.ok("train_lm.py", out=tmp_path, precision="auto", epochs=1)
    assert stored_precision(str(tmp_path)) == chosen
    world.ok("train_lm.py", out=tmp_path, precision=chosen, epochs=1)
    done = world.run("train_lm.py", out=tmp_path, precision="fp32" if chosen == "bf16" else "bf16", epochs=1)
    assert done.code == 2 and "precision=fp32" in done.err and "precision=bf16" in done.err


def test_an_older_run_goes_on_in_float32(world, tmp_path):
    world.ok("train_lm.py", out=tmp_path, epochs=1)
    assert "precision: fp32, as the run began" in world.ok("train_lm.py", out=tmp_path, precision="auto", epochs=1)


# ---- runs


@pytest.mark.parametrize(
    "layout",
    ["shared", pytest.param("adapters", marks=pytest.mark.slow), pytest.param("branch", marks=pytest.mark.slow)],
)
def test_a_run_in_bf16_resumes_bit_by_bit(world, tmp_path, layout):
    """As after a kill behind the first checkpoint: the second is gone, and what the metrics say of its steps."""
    options = {"precision": "bf16", "layout": layout, "minibatches": 2, "kl_control": "adaptive", "kl_horizon": 300}
    options |= {"branch_layers": 1} if layout == "branch" else {}
    options |= {"lora_rank": 2} if layout == "adapters" else {}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    world.ok("train_ppo.py", out=whole, **options)
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "step_000004")
    (killed / "report.json").unlink()
    world.ok("train_ppo.py", out=killed, **options)
    assert_equal_runs(killed, whole)
    first = lines(whole / "metrics.jsonl")[0]
    assert first["objective/kl"] == 0 and first["policy/ratio_first"] == 1
    assert 0 < first["rollout/logprob_diff_mean"] < 0.05


@pytest.mark.parametrize(
    "script, file, options",
    [
        ("evaluate.py", "summary.json", {"prompts": 2, "best_of": 1, "human_texts": 4}),
        ("evaluate.py rm", "card.json", {}),
    ],
)
def test_an_evaluation_says_what_it_computed_in(world, tmp_path, script, file, options):
    printed = world.ok(script, out=tmp_path, precision="auto", **options)
    found = json.loads((tmp_path / file).read_text())["options"]["precision"]
    assert found == ("bf16" if has_fast_bf16(torch.device("cpu")) else "fp32")
    assert f"precision: {found}, the fastest here" in printed


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["full", "frozen", "adapters"])
def test_every_trainer_and_reader_in_bf16(world, tmp_path, trunk):
    """A reward model is trained, measured, used and evaluated in bf16; its card is near that in float32."""
    none = (
        dict.fromkeys("batch epochs warmup log_every eval_every checkpoint_every".split()) if trunk == "frozen" else {}
    )
    more = {"depths": "1"} if trunk == "frozen" else {"lora_rank": 2} if trunk == "adapters" else {}
    world.ok("train_rm.py", out=tmp_path / "rm", precision="bf16", trunk=trunk, **more, **none)
    world.ok(
        "train_ppo.py", out=tmp_path / "ppo", precision="bf16", reward=tmp_path / "rm", iterations=1, weak_reward=True
    )
    accuracy = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / f"card-{precision}"
        world.ok("evaluate.py rm", out=out, precision=precision, model=tmp_path / "rm")
        card = json.loads((out / "card.json").read_text())
        accuracy[precision] = card["accuracy"]["all"] if isinstance(card.get("accuracy"), dict) else 0
    assert accuracy["bf16"] == pytest.approx(accuracy["fp32"], abs=0.05)
    if trunk != "full":
        return
    shared = {"tuned": tmp_path / "ppo", "reward": tmp_path / "rm", "prompts": 4, "best_of": 1}
    for precision in ("fp32", "bf16"):
        world.ok("evaluate.py", out=tmp_path / precision, precision=precision, **shared)
    rows = [json.loads((tmp_path / name / "summary.json").read_text())["rows"]["tuned"] for name in ("fp32", "bf16")]
    assert rows[1]["perplexity_of_human_text"] == pytest.approx(rows[0]["perplexity_of_human_text"], rel=0.02)
    world.ok("sample.py", checkpoint=tmp_path / "ppo", prompt="The film", precision="bf16")


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 40), st.booleans(), st.integers(0, 10**6))
def test_a_product_of_few_rows_in_half_precision(rows, K, N, bias, seed):
    """That of the rounded numbers in float64, to a step of bfloat16, and in F.linear's shape."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((rows, 2, K), (N, K)))
    weight, b = weight.bfloat16(), torch.randn(N, generator=generator).bfloat16() if bias else None
    expected = x.bfloat16().double() @ weight.double().T + (0 if b is None else b.double())
    plain = torch.nn.functional.linear(x.bfloat16(), weight, b)
    size = x.abs().double() @ weight.abs().double().T + 1
    found = [product(x.bfloat16(), weight, b)]
    if can_pack(torch.bfloat16):
        found.append(packed_linear(x.bfloat16(), packed(weight), b))
    for y in found:
        assert y.shape == plain.shape and y.dtype == plain.dtype
        assert float(((y.double() - expected).abs() / size).max()) < 2**-7
