"""--shard=true: ranks that keep a part of the weights train what one process trains, in every layout.

The file is its own worker: `torchrun tests/test_shard.py DIR WAY` trains every layout on every rank.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from reference_model import small_model
from safetensors.torch import load_file, save_file
from small_rollout import EOS, PAD, RESPONSE, TEMPERATURE, WIDTH, prompts, reward_model
from test_layouts import CASES, LAYERS, OBJECTIVE, ROWS, build, experience_of

from model.generate import Sampling, generate, row_uniforms
from rlhf.infra import checkpoint, distributed, optim
from rlhf.ppo import update as ppo
from rlhf.ppo.rollout import gather, judge, minibatches

FAMILIES = ("llama", "qwen2")  # an output matrix of its own, and a tied one
TENSORS = ("gradients", "state", "moments")
WAYS = {"ddp": {}, "fsdp": {"shard": True}, "hsdp": {"shard": True, "replicas": 2}}


def train(layout: str, critic: str, family: str, dist: distributed.Dist, micro_batch: int = 2) -> dict:
    """Two iterations of act, judge and learn, with accumulation and clipping; what came of it."""
    base = small_model(family, torch.float64, seed=1, layers=LAYERS)
    roles, reward = build(layout, critic, base), reward_model(torch.float64).requires_grad_(False)
    dist.rest(base, reward)
    policy, precision = roles.policy, optim.amp(dist.device)
    learner = dist.wrap(policy)
    optimizer = optim.make_optimizer(policy, lr=1e-2, eps=1e-5)
    mine, seen = torch.arange(dist.rank, ROWS, dist.world), []
    kept = {id(x): x for module in (base, policy, reward) for x in module.parameters()}.values()
    numbers = sum(kept_here(x) for x in kept)
    for iteration in range(2):
        ids, lengths = (x[mine] for x in prompts(ROWS, iteration))
        uniforms = row_uniforms(1, iteration, mine.tolist(), RESPONSE)
        with dist.whole(policy.model):
            samples = generate(policy.model, ids, lengths, Sampling(RESPONSE, [EOS], PAD, TEMPERATURE), uniforms)
        judged = judge(samples, policy, roles.reference, reward.score, micro_batch, WIDTH, roles.features)
        rollout = gather(judged, dist)
        experience = experience_of(rollout)
        for rows in minibatches(ROWS, 2, 2, 1, iteration):
            part = experience[rows[dist.rank :: dist.world]]
            update = ppo.accumulate_gradient(learner, part, OBJECTIVE, micro_batch, dist, precision)
            gradients = {n: x.grad for n, x in policy.named_parameters() if x.grad is not None}
            if not seen:
                first = checkpoint.gathered({n: x.clone() for n, x in gradients.items()}, True)
            norm = optim.step(optimizer, policy, precision.scaler, clip=0.05)
            seen.append({**update, "norm": norm, "ids": (rollout.tokens * rollout.mask).sum().item()})
    state = checkpoint.gathered(checkpoint.trained_state(policy), True)
    moments = checkpoint.gathered(checkpoint.optimizer_tensors(optimizer, policy), True)
    return {"seen": seen, "gradients": first, "state": state, "moments": moments, "numbers": numbers}


def cases(way: str) -> list[tuple[str, str, str]]:
    """Family, layout and critic: every layout once, or, where there is time, in both families."""
    both = [(family, *case) for family in FAMILIES for case in CASES]
    return both[::2] if way == "fsdp" else both


def kept_here(x: torch.Tensor) -> int:
    """Numbers of a parameter that this rank holds."""
    if checkpoint.is_sharded(x):
        return x.to_local().numel()
    return len(x.unit.part) * x.numel() // x.unit.flat.numel() if hasattr(x, "unit") else x.numel()


def worker(out: Path, way: str) -> None:
    dist = distributed.setup(**WAYS[way])
    for family, layout, critic in cases(way):
        found = train(layout, critic, family, dist)
        if dist.is_main:
            name = f"{family}-{layout}-{critic}"
            save_file(
                {f"{part} {key}": x for part in TENSORS for key, x in found[part].items()}, out / f"{name}.tensors"
            )
            (out / f"{name}.json").write_text(json.dumps({part: found[part] for part in ("seen", "numbers")}))
    dist.close()


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2])


def torchrun(ranks: int, *command) -> None:
    """Run this many processes to their end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone():
    """What one process trains."""
    return functools.cache(lambda family, *case: train(*case, family, distributed.Dist(), micro_batch=4))


def check_same(alone, out: Path) -> dict:
    """Is what the ranks trained what one process trained? -> the numbers that rank 0 kept, by case."""
    found = {tuple(file.stem.split("-")): json.loads(file.read_text()) for file in out.glob("*.json")}
    for case, theirs in found.items():
        ours, tensors = alone(*case), load_file(out / f"{'-'.join(case)}.tensors")
        expected = {f"{part} {key}": x for part in TENSORS for key, x in ours[part].items()}
        assert tensors.keys() == expected.keys(), case
        for key, x in expected.items():
            torch.testing.assert_close(tensors[key], x, rtol=1e-6, atol=1e-9, msg=f"{case} {key}")
        for a, b in zip(theirs["seen"], ours["seen"], strict=True):
            assert a == pytest.approx(b, rel=1e-8, abs=1e-10), case
    return {case: theirs["numbers"] for case, theirs in found.items()}


def test_two_shards_train_what_one_process_trains(alone, tmp_path):
    """Gradients, clipped steps, moments, samples and log-probs; and each rank keeps half of all matrices."""
    torchrun(2, __file__, tmp_path, "fsdp")
    numbers = check_same(alone, tmp_path)
    assert numbers.keys() == {*cases("fsdp")}
    for case, kept in numbers.items():
        assert kept < 0.53 * alone(*case)["numbers"], case


@pytest.mark.slow
@pytest.mark.parametrize("ranks, way", [(2, "ddp"), (4, "fsdp"), (4, "hsdp")])
def test_more_ranks_and_replicas(alone, tmp_path, ranks, way):
    torchrun(ranks, __file__, tmp_path, way)
    numbers = check_same(alone, tmp_path)
    share = {"ddp": 1.001, "fsdp": 0.29, "hsdp": 0.53}[way]
    assert all(kept < share * alone(*case)["numbers"] for case, kept in numbers.items()), numbers
