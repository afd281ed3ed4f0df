"""Does everything run on a GPU, is it right, how fast is it, does it fit? One JSON line a step, eight minutes in all.

    python bench/gpu.py --out=gpu.jsonl
    python bench/gpu.py --out=gpu.jsonl --steps=decode,learn --budget=200
    python bench/gpu.py --small                      # the same steps at toy sizes, on a CPU too: it must not rot

Neither network nor weights nor a tokenizer: models have the shapes of SmolLM2-135M and of a Llama of 1B, and random numbers
whose logits reach 35, as a trained model's do (smaller ones make bf16 look harmless). Each line holds what was predicted
before any of this had run on a GPU, and what was measured: medians between events of the device after a call to warm up, or
wall seconds on a CPU. A step that fails says why, one that outlives its share of the time is left out, and so is one that
needs its files; the next one goes on; what a step leaves of its share the later ones get. The exit code is 2 where one failed.
"""

import contextlib
import gc
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import peers  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend  # noqa: E402

from model.generate import Generated, Sampling  # noqa: E402
from model.transformer import ModelConfig, Transformer  # noqa: E402
from rlhf.advantages import gae  # noqa: E402
from rlhf.functional import whiten  # noqa: E402
from rlhf.infra import config, distributed, optim  # noqa: E402
from rlhf.infra.files import read_lines  # noqa: E402
from rlhf.infra.optim import Precision  # noqa: E402
from rlhf.infra.run import Clock, peak_memory_gb, resident_bytes  # noqa: E402
from rlhf.lm.trunks import LoRA  # noqa: E402
from rlhf.ppo import plan  # noqa: E402
from rlhf.ppo import update as ppo  # noqa: E402
from rlhf.ppo.roles import LAYOUTS, Roles  # noqa: E402
from rlhf.ppo.rollout import Experience, Rollout, act, judge, minibatches  # noqa: E402
from rlhf.rewards import shape_rewards  # noqa: E402


@dataclass(frozen=True)
class Config:
    out: str = "out/bench/gpu.jsonl"  # one JSON line a step, as soon as it is done
    small: bool = False  # toy sizes and few variants, and no budget: minutes on a CPU
    steps: tuple[str, ...] = ()  # those whose names begin like one of these; none = all, `--steps=?` lists them
    budget: float = 480  # seconds in all, shared out over the chosen steps

    def __post_init__(self):
        config.at_least(self, budget=1)


@dataclass(frozen=True)
class Shape:
    model: ModelConfig
    prompt: int = 64  # tokens
    response: int = 128  # tokens

    @property
    def width(self) -> int:
        return self.prompt + self.response


SHAPES = {
    "135M": Shape(ModelConfig(49152, 576, 30, 9, kv_heads=3, ffn=1536, context=2048, rope_theta=1e5)),
    "1B": Shape(ModelConfig(128256, 2048, 16, 32, kv_heads=8, ffn=8192, context=2048, rope_theta=5e5)),
}
TOY = Shape(ModelConfig(512, 64, 2, 4, kv_heads=2, ffn=128, context=64), prompt=4, response=10)
LOGITS = 35.0  # the largest
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Place:
    """Where and how large everything is measured, and what the first steps found for the later ones."""

    device: torch.device
    small: bool
    scratch: Path  # of the tiny runs
    bandwidth: float = 4.3e12  # bytes per second, read and written
    rates: dict[str, float] = field(default_factory=lambda: {"bf16": 790e12, "fp32": 67e12})  # FLOP per second

    def shape(self, name: str) -> Shape:
        return TOY if self.small else SHAPES[name]

    def rows(self, count: int) -> int:
        return min(count, 8) if self.small else count


@dataclass(frozen=True)
class Step:
    name: str
    share: float  # seconds of the eight minutes
    run: Callable[[Place], dict]
    predicted: dict = field(default_factory=dict)
    needs: str = ""  # the step whose files it reads


class Overtime(Exception):
    """A step has outlived its share."""


def main() -> None:
    cfg = config.parse(Config)
    if cfg.steps == ("?",):
        print("\n".join(f"{step.share:6.0f} s  {step.name}" for step in STEPS))
        return
    chosen = [step for step in STEPS if not cfg.steps or step.name.startswith(cfg.steps)]
    if not chosen:
        raise ValueError(f"--steps={','.join(cfg.steps)}: no step is called so; --steps=? lists them")
    device, ends = distributed.setup().device, time.perf_counter() + cfg.budget
    signal.signal(signal.SIGALRM, overtime)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    failed, undone = 0, {step.name for step in STEPS if step not in chosen}
    with tempfile.TemporaryDirectory() as scratch, open(cfg.out, "w") as out:
        place = Place(device, cfg.small, Path(scratch))
        for i, step in enumerate(chosen):
            share = step.share / sum(later.share for later in chosen[i:])
            if step.needs in undone:
                line = {"step": step.name, "left_out": f"{step.needs!r} made no files", "measured": {}}
            else:
                line = taken(step, place, None if cfg.small else share * (ends - time.perf_counter()))
            failed += "failed" in line
            if not line["measured"]:
                undone.add(step.name)
            for file in (out, sys.stdout):
                print(json.dumps(line), file=file, flush=True)
    if failed:
        raise ValueError(f"{failed} of {len(chosen)} steps failed; each says why in {cfg.out}")


def taken(step: Step, place: Place, seconds: float | None) -> dict:
    """The line of a step that may take so long; None: as long as it likes."""
    line, start = {"step": step.name}, time.perf_counter()
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
        measured = step.run(place)
    except Overtime:
        measured, line["left_out"] = {}, f"took longer than its {seconds:.0f} s"
    except Exception as error:  # one line instead of what was measured: the next step must have its turn
        measured, line["failed"] = {}, " ".join(f"{type(error).__name__}: {error}".split())[-600:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    gc.collect()
    if place.device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after a fault of the device nothing works, and the next steps say so
            torch.cuda.empty_cache()
    predicted = {} if place.small else step.predicted
    return line | {"seconds": short(time.perf_counter() - start), "predicted": predicted, "measured": measured}


def overtime(number: int, frame) -> None:
    raise Overtime


def short(x: float) -> float:
    """Four digits."""
    return float(f"{x:.4g}")


def ms(place: Place, work: Callable[[], object], repeats: int = 5) -> float:
    """Milliseconds of `work`: the median, after one call to warm up."""
    found = []
    for _ in range(repeats + 1):
        if place.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end))
        else:
            found.append(wall_ms(place, work))
    return statistics.median(found[1:])


def wall_ms(place: Place, work: Callable[[], object]) -> float:
    """Milliseconds of one call until the device is done, the host's planning included."""
    start = time.perf_counter()
    work()
    if place.device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


# ---- the machine


def versions(place: Place) -> dict:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    found = {"torch": torch.__version__, "python": platform.python_version(), "commit": git.stdout.strip()}
    if place.device.type == "cuda":
        card = torch.cuda.get_device_properties(place.device)
        found |= {"card": card.name, "memory_gb": short(card.total_memory / 1e9), "cuda": torch.version.cuda}
        found |= {"cudnn": torch.backends.cudnn.version()}
    return found


def ceilings(place: Place) -> dict:
    """A copy of 4 GB, and products of 8192 x 8192 numbers: no step below can be faster."""
    source = torch.zeros(10**5 if place.small else 10**9, device=place.device)
    target, found = torch.empty_like(source), {}
    place.bandwidth = 2 * source.nbytes / (ms(place, lambda: target.copy_(source)) / 1e3)
    side = 128 if place.small else 8192
    for kind, dtype in DTYPES.items():
        a, b = (torch.randn(side, side, device=place.device).to(dtype) for _ in range(2))
        place.rates[kind] = 2 * side**3 / (ms(place, lambda a=a, b=b: a @ b) / 1e3)
        found[f"tflops_{kind}"] = short(place.rates[kind] / 1e12)
    return {"tb_per_s": short(place.bandwidth / 1e12)} | found


# ---- attention: which kernel, and does it plan every new shape?


@dataclass(frozen=True)
class Call:
    """A call of attention as our models make it: 32 heads of 64 numbers."""

    kind: str
    groups: int  # heads of keys and values
    causal: bool  # training, judging and prefill; else a step of decoding under a mask
    folded: bool = False  # the query heads of a group stand in the query axis


CALLS = {
    "training bf16": (Call("bf16", 8, True), ["FLASH_ATTENTION"]),
    "training fp32": (Call("fp32", 8, True), ["MATH"]),
    "training fp32 without groups": (Call("fp32", 32, True), ["EFFICIENT_ATTENTION"]),
    "decode bf16": (Call("bf16", 8, False), ["MATH"]),
    "decode bf16 folded": (Call("bf16", 8, False, folded=True), ["EFFICIENT_ATTENTION"]),
    "decode fp32 folded": (Call("fp32", 8, False, folded=True), ["EFFICIENT_ATTENTION"]),
}


def attention(place: Place, call: Call) -> dict:
    """The kernel by its name, the first call at a length, which may plan, and a later one; with cuDNN and without."""
    found = {}
    for cudnn in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        try:
            rows = [attention_at(place, call, length) for length in ((5, 9) if place.small else (120, 151, 192))]
        finally:
            distributed.leave_out_cudnn_attention()
        found["with_cudnn" if cudnn else "without"] = {key: [row[key] for row in rows] for key in rows[0]}
    return found


def attention_at(place: Place, call: Call, length: int) -> dict:
    batch, heads, size = place.rows(32 if call.causal else 256), 32, 64
    asks = (heads, length if call.causal else 1) if not call.folded else (call.groups, heads // call.groups)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, size, device=place.device, dtype=DTYPES[call.kind], requires_grad=call.causal)

    q, k, v = draw(*asks), draw(call.groups, length), draw(call.groups, length)
    mask = None
    if not call.causal:
        lengths = torch.randint(1, length + 1, (batch, 1, 1, 1), device=place.device)
        mask = torch.arange(length, device=place.device) < lengths  # (B, 1, 1, S)
        mask = mask.expand(-1, -1, asks[1], -1)
    gqa = asks[0] != call.groups
    kernel = torch._fused_sdp_choice(q, k, v, mask, 0.0, call.causal, enable_gqa=gqa)

    def work() -> None:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=call.causal, enable_gqa=gqa)
        if call.causal:
            y.backward(y.detach())

    first = wall_ms(place, work)
    return {"kernel": SDPBackend(kernel).name, "first_ms": short(first), "later_ms": short(ms(place, work, 3))}


# ---- is it right: tests, and the real scripts on tiny data


def tests(place: Place) -> dict:
    files = ["tests/test_cuda.py"] if place.small else [f"tests/test_{x}.py" for x in ("optim", "generate", "cuda")]
    few = ["-k", "judge and cpu and fp32"] if place.small else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rf", "-p", "no:cacheprovider", *files, *few],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise ValueError("; ".join(line for line in lines if line.startswith(("FAILED", "ERROR"))) or lines[-1])
    return {"summary": lines[-1]}


def together(place: Place, commands: dict[str, list[str]]) -> dict[str, str]:
    """What each command printed; all run at the same time, and ValueError says which failed, and how."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = {
        name: subprocess.Popen(
            [sys.executable, *words], cwd=place.scratch, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for name, words in commands.items()
    }  # fmt: skip
    try:
        printed = {name: process.communicate() for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    bad = [f"{name}: {printed[name][1].strip()[-250:]}" for name, process in running.items() if process.returncode]
    if bad:
        raise ValueError(" | ".join(bad))
    return {name: out for name, (out, _) in printed.items()}


def command(script: str, **options) -> list[str]:
    return [str(ROOT / script), *(f"--{name}={value}" for name, value in options.items())]


WORDS = "a warm funny bright lovely moving film story actor scene dull bad slow empty boring plot end music".split()
GOOD = set(WORDS[1:6])


def data_and_language_model(place: Place) -> dict:
    """Sentences of chance words, rated by how many of them are good; a tokenizer trained on them; a language model."""
    draw = random.Random(0)
    texts = [[draw.choice(WORDS) for _ in range(draw.randint(6, 14))] for _ in range(400)]
    rows = [{"text": " ".join(words), "score": sum(word in GOOD for word in words)} for words in texts]
    (place.scratch / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare = ["-m", "data.prepare", "texts.jsonl", "--vocab_size=300", "--out=data"]
    together(place, {"data.prepare": prepare})
    sizes = {"width": 64, "layers": 3, "heads": 4, "batch": 16, "epochs": 1, "warmup": 2, "lr": 0.01}
    printed = together(place, {"train_lm.py": command("train_lm.py", data="data", out="lm", **sizes)})
    return {"lm": printed["train_lm.py"].strip().splitlines()[-1]}


def reward_models(place: Place) -> dict:
    steps = {"batch": 16, "epochs": 1, "warmup": 2}
    trunks = {"full": steps, "frozen": {"depths": "1,2"}, "adapters": steps | {"lora_rank": 4}}
    if place.small:
        trunks = {"full": steps}
    common = {"init": "lm", "data": "data", "reference_samples": 32, "response_tokens": 8}
    commands = {
        trunk: command("train_rm.py", trunk=trunk, out=f"rm-{trunk}", **common, **options)
        for trunk, options in trunks.items()
    }
    return {name: out.strip().splitlines()[-1] for name, out in together(place, commands).items()}


def ppo_command(layout: str, kind: str, **changes) -> list[str]:
    options = {"init": "lm", "data": "data", "reward": "rm-full", "weak_reward": "true", "out": f"ppo-{layout}-{kind}"}
    options |= {"batch": 16, "minibatches": 2, "micro_batch": 4, "iterations": 2, "response_tokens": 8, "warmup": 0}
    options |= {"layout": layout, "precision": kind, "checkpoint_every": 1} | changes
    return command("train_ppo.py", **options, **{"branch_layers": 1} if layout == "branch" else {})


def policies(place: Place) -> dict:
    """Every layout in both precisions: the check before the first update, the first ratio, sampler against training."""
    cases = [(layout, kind) for layout in LAYOUTS for kind in DTYPES]
    if place.small:
        cases = [("shared", "fp32"), ("branch", "bf16")]
    printed = together(place, {f"{layout} {kind}": ppo_command(layout, kind) for layout, kind in cases})
    return {name: policy_facts(place, name, out) for name, out in printed.items()}


def policy_facts(place: Place, name: str, printed: str) -> dict:
    rows = read_lines(place.scratch / f"ppo-{name.replace(' ', '-')}" / "metrics.jsonl")
    checks = [line.split()[0] for line in printed.splitlines() if line.startswith(("  PASS", "  FAIL"))]
    return {
        "pass": checks.count("PASS"),
        "ratio_first": rows[0]["policy/ratio_first"],
        "logprob_diff_mean": short(max(row["rollout/logprob_diff_mean"] for row in rows)),
        "logprob_diff_max": short(max(row["rollout/logprob_diff_max"] for row in rows)),
        "iterations": len(rows),
    }


def resume(place: Place) -> dict:
    """One iteration more of a run that had ended, in a new process."""
    changes = {"iterations": 3, "override": "iterations"}
    printed = together(place, {"shared fp32": ppo_command("shared", "fp32", **changes)})
    return policy_facts(place, "shared fp32", printed["shared fp32"])


# ---- how fast, and does it fit


def random_model(place: Place, name: str) -> Transformer:
    """Random weights whose logits reach those of a trained model."""
    shape = place.shape(name).model
    with place.device:
        model = Transformer(shape)
        model.init_weights(generator := torch.Generator(place.device).manual_seed(1))
        ids = torch.randint(3, shape.vocab_size, (4, 32))
    with torch.no_grad():
        for x in model.layers.parameters():
            if x.ndim == 2:  # else the input's own embedding outweighs the layers, and the model repeats its last token
                x.normal_(std=x.shape[1] ** -0.5, generator=generator)
        model.norm.weight.mul_(LOGITS / model(ids).abs().max())
    return model.eval()


def cast(place: Place, name: str, layout: str, kind: str) -> tuple[Roles, Precision]:
    """The roles of a run on a random model."""
    precision, model = optim.amp(place.device, kind), random_model(place, name)
    roles = LAYOUTS[layout](model, "shared", 1.0, LoRA(), max(1, model.config.layers // 8))
    return roles.stored_in(precision.dtype), precision


def sampled(
    place: Place, roles: Roles, precision: Precision, shape: Shape, batch: int, tokens: int, stops=()
) -> Generated:
    """A rollout as train_ppo.py makes it, on random prompts."""
    prompts = torch.randint(
        3, shape.model.vocab_size, (batch, shape.prompt), generator=torch.Generator().manual_seed(2)
    )
    lengths, sampling = torch.full((batch,), shape.prompt), Sampling(tokens, stops, 0)
    return act(roles.sampler, sampling, 1, precision, prompts, lengths, torch.arange(batch), 0)


def decode(place: Place, name: str, batch: int, layout: str, kind: str) -> dict:
    """A step of decoding against the bytes it must read; rows that end at random; kernels and waits of the host a step."""
    shape, batch = place.shape(name), place.rows(batch)
    roles, precision = cast(place, name, layout, kind)
    rollout = partial(sampled, place, roles, precision, shape, batch)
    whole, prefill = (ms(place, lambda n=n: rollout(n), repeats=2) for n in (shape.response, 1))
    step = (whole - prefill) / (shape.response - 1)
    bytes_each = DTYPES[kind].itemsize
    per_token = 2 * shape.model.layers * shape.model.kv_heads * shape.model.head_dim
    weights = sum(x.numel() for x in roles.policy.model.parameters())
    read = bytes_each * (weights + batch * per_token * (shape.prompt + shape.response / 2))
    found = {"rollout_ms": short(whole), "prefill_ms": short(prefill), "ms_a_step": short(step)}
    found["share_of_floor"] = short(1e3 * read / place.bandwidth / step)
    stops = list(range(0, shape.model.vocab_size, 32))  # of what is drawn one in 32: a mean of 32 tokens
    found["ragged_rollout_ms"] = short(ms(place, lambda: rollout(shape.response, stops), repeats=1))
    found |= profiled(place, rollout, 8 if shape.response > 9 else 4) | memory(place)
    parts = planned(place, shape, batch, batch, layout, kind) | {"optimiser": 0}  # nothing learns here
    return found | {"planned_gb": short(plan.phases(parts)["act"] / 1e9)}


def profiled(place: Place, rollout: Callable[[int], object], steps: int) -> dict:
    """Kernels and waits of the host in a step: the difference of two rollouts."""
    counts = []
    gpu = place.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * gpu
    for tokens in (1, 1 + steps):
        with torch.profiler.profile(activities=activities) as profile:
            rollout(tokens)
        events = profile.events()
        if gpu:
            device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
            copies = [name for name in device if name.startswith("Mem")]
            counts.append((len(device) - len(copies), sum("DtoH" in name for name in copies)))
        else:  # operations that call no other
            counts.append((sum(not event.cpu_children for event in events), 0))
    kernels, waits = ((b - a) / steps for a, b in zip(*counts))
    return {"kernels_a_step": short(kernels), "waits_a_step": short(waits)}


def memory(place: Place) -> dict:
    """Peak since the step began, GB."""
    found = {"allocated_gb": short(peak_memory_gb(place.device))}
    if place.device.type == "cuda":
        found["reserved_gb"] = short(torch.cuda.max_memory_reserved(place.device) / 1e9)
    return found


def planned(place: Place, shape: Shape, batch: int, micro_batch: int, layout: str, kind: str) -> dict[str, int]:
    """The parts of `train_ppo.py --plan`, bytes."""
    baseline = resident_bytes() if place.device.type == "cpu" else 0
    sizes = plan.Sizes(
        batch, micro_batch, shape.prompt, shape.response, "shared", baseline=baseline, dtype=DTYPES[kind]
    )
    return plan.plan(shape.model, sizes, layout)


def lengths_score(tokens: torch.Tensor, lengths: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A reward that costs nothing."""
    return mask.sum(1).float()


def judged(roles: Roles, precision: Precision, samples: Generated, micro_batch: int) -> Rollout:
    width = samples.tokens.shape[1]
    with precision.autocast():
        return judge(samples, roles.policy, roles.reference, lengths_score, micro_batch, width, roles.features)


def credited(rollout: Rollout) -> Experience:
    rewards = shape_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, 0.05)
    advantages, returns = gae(rewards, rollout.values, rollout.mask, 1.0, 0.95)
    return Experience.of(rollout, rewards, whiten(advantages, rollout.mask), returns)


def random_samples(place: Place, shape: Shape, rows: int) -> Generated:
    """Full rows, as if a policy had written them."""
    tokens = torch.randint(3, shape.model.vocab_size, (rows, shape.width), device=place.device)
    mask = (torch.arange(shape.width, device=place.device) >= shape.prompt).expand(rows, -1)
    length = torch.full((rows,), shape.width, device=place.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=place.device)
    return Generated(tokens, length, length - shape.response, mask, torch.zeros(mask.shape, device=place.device), ended)


def learn(place: Place, name: str, micro_batch: int) -> dict:
    """Judging and learning of one micro-batch in bf16: tokens per second, and the share of the product's rate."""
    shape, micro_batch = place.shape(name), place.rows(micro_batch)
    roles, precision = cast(place, name, "shared", "bf16")
    samples, dist = random_samples(place, shape, micro_batch), distributed.Dist(device=place.device)
    experience = credited(judged(roles, precision, samples, micro_batch))
    optimizer = optim.make_optimizer(roles.policy, 1e-6)
    laps = []
    for _ in range(4):
        clock = Clock()
        judged(roles, precision, samples, micro_batch)
        clock.lap("judge_ms")
        with precision.autocast():
            roles.policy(experience.tokens, experience.mask)
        clock.lap("forward_ms")
        ppo.accumulate_gradient(roles.policy, experience, ppo.Objective(), micro_batch, dist, precision)
        clock.lap("forward_backward_ms")
        optim.step(optimizer, roles.policy, precision.scaler, 1.0)
        clock.lap("step_ms")
        laps.append(clock.laps)
    found = {key: short(1e3 * statistics.median(lap[key] for lap in laps[1:])) for key in laps[0]}
    tokens, weights = micro_batch * shape.width, sum(x.numel() for x in roles.policy.model.parameters())
    seconds = found["forward_backward_ms"] / 1e3
    found |= {"tokens_per_s": short(tokens / seconds), "judged_tokens_per_s": short(1e3 * tokens / found["judge_ms"])}
    return found | {"mfu": short(6 * weights * tokens / seconds / place.rates["bf16"])} | memory(place)


def iteration(place: Place, name: str, batch: int) -> dict:
    """A PPO iteration in layout shared and bf16, one epoch of four minibatches: the synchronised laps of the second one."""
    shape, batch = place.shape(name), place.rows(batch)
    roles, precision = cast(place, name, "shared", "bf16")
    dist, micro_batch = distributed.Dist(device=place.device), batch // 8
    optimizer = optim.make_optimizer(roles.policy, 1e-6)
    for number in range(2):
        clock = Clock()
        samples = sampled(place, roles, precision, shape, batch, shape.response)
        roles.rest()
        clock.lap("rollout_s")
        rollout = judged(roles, precision, samples, micro_batch)
        clock.lap("judge_s")
        experience = credited(rollout)
        clock.lap("credit_s")
        for rows in minibatches(batch, 4, 1, 1, number):
            minibatch = experience[rows.to(place.device)]
            ppo.accumulate_gradient(roles.policy, minibatch, ppo.Objective(), micro_batch, dist, precision)
            optim.step(optimizer, roles.policy, precision.scaler, 1.0)
        clock.lap("learn_s")
    mismatch = (rollout.logprobs - rollout.sampler_logprobs).abs()[rollout.mask]
    found = {key: short(seconds) for key, seconds in clock.laps.items()} | memory(place)
    found |= {"logprob_diff_mean": short(float(mismatch.mean())), "logprob_diff_max": short(float(mismatch.max()))}
    return found | {"planned_gb": short(plan.peak(planned(place, shape, batch, micro_batch, "shared", "bf16")) / 1e9)}


def beside_transformers(place: Place, batch: int) -> dict:
    """Tokens per second of a rollout in bf16, ours and `generate`'s, on models of the same shape."""
    with peers.installed():
        import transformers

    shape, batch = place.shape("135M"), place.rows(batch)
    roles, precision = cast(place, "135M", "shared", "bf16")
    ours = ms(place, lambda: sampled(place, roles, precision, shape, batch, shape.response), repeats=2)
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    with place.device:
        theirs = transformers.LlamaForCausalLM(peers.llama_config(shape.model, **ids)).to(torch.bfloat16).eval()
        prompts = torch.randint(3, shape.model.vocab_size, (batch, shape.prompt))
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": shape.response, "min_new_tokens": shape.response}
    they = partial(theirs.generate, prompts, attention_mask=torch.ones_like(prompts), **options)
    tokens, other = batch * shape.response, ms(place, they, repeats=2)
    found = {"ours_tokens_per_s": 1e3 * tokens / ours, "transformers_tokens_per_s": 1e3 * tokens / other}
    return {key: short(value) for key, value in found.items()} | {"ratio": short(other / ours)}


# A step's ms: with a CUDA graph, and before groups were folded and rows left by halves; what lies between is not predicted.
DECODES = {("135M", 256): [2.1, 9], ("1B", 64): [1.7, 4.5], ("1B", 256): [2.8, 12]}
LEARNS = {
    ("1B", 8): {},
    ("1B", 32): {"mfu": [0.45, 0.55]},
    ("1B", 64): {"mfu": [0.45, 0.55]},
    ("135M", 64): {"mfu": 0.2},
}
STEPS = [
    Step("versions", 1, versions),
    Step("ceilings", 19, ceilings, {"tb_per_s": 4.3, "tflops_bf16": 790, "tflops_fp32": 67}),
    *(
        Step(f"attention {name}", 40 / len(CALLS), partial(attention, call=call), {"kernel without cuDNN": kernel})
        for name, (call, kernel) in CALLS.items()
    ),
    Step("tests", 60, tests, {"failed": 0}),
    Step("scripts data and train_lm", 30, data_and_language_model),
    Step("scripts train_rm", 20, reward_models, needs="scripts data and train_lm"),
    Step(
        "scripts train_ppo", 30, policies, {"ratio_first": 1, "logprob_diff_mean bf16": 0.03}, needs="scripts train_rm"
    ),
    Step("scripts resume", 10, resume, needs="scripts train_ppo"),
    *(
        Step(
            f"decode {name} {batch} {layout} {kind}",
            120 / 9,
            partial(decode, name=name, batch=batch, layout=layout, kind=kind),
            {"ms_a_step": predicted} if kind == "bf16" else {},
        )
        for (name, batch), predicted in DECODES.items()
        for layout, kind in (("shared", "bf16"), ("branch", "bf16"), ("shared", "fp32"))
    ),
    *(
        Step(f"learn {name} {rows}", 90 / len(LEARNS), partial(learn, name=name, micro_batch=rows), predicted)
        for (name, rows), predicted in LEARNS.items()
    ),
    Step(
        "iteration 1B 256", 30, partial(iteration, name="1B", batch=256), {"rollout_s": [0.8, 1.6], "learn_s": [0.8, 1]}
    ),
    Step("transformers 135M 256", 30, partial(beside_transformers, batch=256)),
]


if __name__ == "__main__":
    config.run(main, stopped="stopped")
