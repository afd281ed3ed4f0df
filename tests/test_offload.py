"""--offload: what sleeps between phases is gone from the device's memory, comes back bit for bit, and changes no number."""

import copy
import resource
import shutil
from functools import partial

import pytest
import torch
from reference_model import SMALL, random_ids, small_model
from test_layouts import build
from test_resume import assert_equal_runs, numbers
from torch.multiprocessing.reductions import StorageWeakRef

from model.transformer import ModelConfig, Transformer
from rlhf.infra import checkpoint, optim
from rlhf.infra.offload import File, Rest, Sleeper, moments
from rlhf.ppo.plan import Sizes, phases, plan

PLACES = {"file": File, "memory": lambda directory: lambda x: Rest(x.clone(), lambda: None)}
every_place = pytest.mark.parametrize("place", PLACES)
ALL = "reference,reward,optimizer"
PPO = {
    "iterations": 4,
    "checkpoint_every": 2,
    "minibatches": 2,
    "batch": 32,
    "judge": "data",
    "judge_every": 3,
    "judge_prompts": 1,
}


@every_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_asleep_they_hold_no_memory_and_awake_the_same_bits(tmp_path, place, dtype):
    tensors = [torch.arange(7, dtype=dtype), torch.ones(3, 2000, dtype=dtype), torch.empty(0, 4, dtype=dtype)]
    before = copy.deepcopy(tensors)
    sleeper = Sleeper(lambda: [*tensors, tensors[1]], PLACES[place](tmp_path))
    for change in (0, 5):
        for x, was in zip(tensors, before):
            was.add_(change)
            x.add_(change)
        storages = [StorageWeakRef(x.untyped_storage()) for x in tensors[:2]]
        sleeper.sleep()
        assert all(storage.expired() for storage in storages)
        assert all(torch.equal(x, was) for x, was in zip(tensors, before))  # a checkpoint may read them
        sleeper.sleep()  # it sleeps already
        with sleeper.awake():
            assert all(torch.equal(x, was) and x.shape == was.shape for x, was in zip(tensors, before))
        sleeper.wake()
    assert not list(tmp_path.iterdir())  # the file has no name


def test_a_file_keeps_one_descriptor_for_all(tmp_path):
    """Where a process may open fewer files than there are tensors; and what sleeps there fills no memory."""
    limits, tensors = resource.getrlimit(resource.RLIMIT_NOFILE), [torch.full((3, 2000), float(i)) for i in range(300)]
    sleeper = Sleeper(lambda: tensors, File(tmp_path))
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        for _ in range(2):
            sleeper.sleep()
            assert all(bool((x == i).all()) for i, x in enumerate(tensors))
            sleeper.wake()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(bool((x == i).all()) for i, x in enumerate(tensors))


@every_place
def test_what_is_frozen_sleeps_in_every_module_and_is_put_away_once(tmp_path, place):
    base, asked = small_model("llama", torch.float32, seed=1, layers=3), []
    roles, ids = build("shared", base=base), random_ids(1, 2, 6)
    mask = (torch.arange(6) > 2).expand(2, 6)
    before = roles.reference(ids, mask)
    put = PLACES[place](tmp_path)
    sleeper = Sleeper(base.parameters, lambda x: asked.append(x.shape) or put(x), frozen=True)
    for _ in range(2):
        sleeper.sleep()
        with sleeper.awake():
            assert torch.equal(roles.reference(ids, mask), before)
    assert len(asked) == len([*base.parameters()])


def test_moments_sleep_while_they_are_needed_least(tmp_path):
    """AdamW's steps are the same, and the first one makes what then sleeps."""
    nets, seen = [torch.nn.Linear(5, 3) for _ in range(2)], []
    nets[1].load_state_dict(nets[0].state_dict())
    for net, offloaded in zip(nets, (False, True)):
        optimizer = optim.make_optimizer(net, lr=0.1)
        sleeper = Sleeper(partial(moments, optimizer) if offloaded else tuple, File(tmp_path))
        for step in sleeper.during(range(3)):
            net(torch.full((2, 5), 1.0 + step)).square().sum().backward()
            optimizer.step()
            seen.append(len(sleeper.asleep))
        assert len(sleeper.asleep) == 4 * offloaded
    assert not any(seen)
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets)))


@pytest.mark.parametrize(
    "layout, offload",
    [
        ("full", ALL),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in (("shared", "optimizer"), ("branch", "reward"))),
    ],
)
def test_a_run_is_the_same_and_its_checkpoints_hold_what_sleeps(world, tmp_path, layout, offload):
    """The second half is run again from the checkpoint in the middle, which may be read with another --offload."""
    options = PPO | {"layout": layout} | ({"branch_layers": 1} if layout == "branch" else {})
    world.ok("train_ppo.py", out=tmp_path / "plain", **options)
    world.ok("train_ppo.py", out=tmp_path / "asleep", offload=offload, **options)
    assert_equal_runs(tmp_path / "asleep", tmp_path / "plain")
    shutil.rmtree(tmp_path / "asleep/step_000004")
    world.ok("train_ppo.py", out=tmp_path / "asleep", **options)
    assert_equal_runs(tmp_path / "asleep", tmp_path / "plain")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"offload": "reference", "layout": "adapters"}, "it is the frozen trunk, which the policy computes with"),
        ({"offload": "optimizer,reference", "layout": "branch"}, "with --layout=branch it is the frozen trunk"),
        ({"offload": "reward", "reward": "rewards.py:shorter"}, "rewards.py:shorter has no trunk of its own"),
        (
            {"offload": "reward", "resample_flat": "true", "samples_per_prompt": 2},
            "--resample_flat=true asks the reward while it acts",
        ),
        ({"offload": "moments"}, "expected reference|reward|optimizer,..."),
    ],
)
def test_what_would_never_sleep_is_refused(world, tmp_path, options, reason):
    done = world.run("train_ppo.py", out=tmp_path / "out", **options)
    assert done.code == 2 and done.err.startswith("error: --offload=") and reason in done.err
    assert done.err.count("\n") == 1 and not (tmp_path / "out").exists()


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))


def test_no_space_for_what_sleeps_is_one_line(world, tmp_path):
    done = world.run("train_ppo.py", out=tmp_path / "out", before=limit_files, offload="reference")
    assert done.code == 2 and done.err == f"error: File too large: {tmp_path / 'out'}\n"


def test_the_plan_leaves_out_what_sleeps(world, tmp_path):
    sizes = Sizes(batch=8, micro_batch=4, prompt=5, response=6, reward=10**6)
    parts = plan(ModelConfig(**SMALL), sizes, "shared")
    model = sum(x.numel() for x in Transformer(ModelConfig(**SMALL)).parameters())
    assert (parts["reference"], parts["reward"]) == (4 * model, 4 * 10**6)
    plain, asleep = phases(parts), phases(parts, ALL.split(","))
    frozen = parts["reference"] + parts["reward"]
    gone = {"act": frozen + parts["optimiser"], "judge": parts["optimiser"], "learn": frozen}
    assert {phase: plain[phase] - asleep[phase] for phase in plain} == gone
    assert plan(ModelConfig(**SMALL), sizes, "branch")["reference"] == 0  # the policy computes with it
    said = world.ok("train_ppo.py", out=tmp_path, plan="true", offload=ALL, layout="full").splitlines()[0]
    assert said.endswith("asleep between its phases: reference, reward, optimizer")


@pytest.mark.slow
def test_shards_sleep_too(world, tmp_path):
    for out, more in (("plain", {}), ("asleep", {"offload": ALL})):
        options = PPO | {"layout": "full", "shard": "true", "judge": None, "judge_every": None, "judge_prompts": None}
        done = world.together(world.command("train_ppo.py", out=tmp_path / out, **options, **more), 2)
        assert done.code == 0, done.err
    assert len(numbers(tmp_path / "plain")) == 4
    assert numbers(tmp_path / "asleep") == numbers(tmp_path / "plain")
    plain, asleep = (checkpoint.load(tmp_path / out) for out in ("plain", "asleep"))
    for part in ("tensors", "optimizer"):
        ours, theirs = getattr(asleep, part), getattr(plain, part)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
