"""One process and two real ones under torchrun: the same numbers, the same weights, no orphans.

The file is its own worker: `torchrun tests/test_distributed.py JOB DIR` runs the job named JOB on every rank.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from rlhf.infra import checkpoint, config, distributed, optim  # noqa: E402

LENGTHS = [3, 9, 1, 5, 8, 2, 7, 4]  # ragged: ranks and micro-batches hold different numbers of tokens


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 20)).double()


def train(ranks: distributed.Dist, micro_batch: int, steps: int = 4) -> tuple[nn.Module, list[float]]:
    """A few steps of a per-token loss on one global batch of ragged rows, cut over ranks and micro-batches."""
    net = make_net()
    wrapped, optimizer, (autocast, scaler, _) = (
        ranks.wrap(net),
        optim.make_optimizer(net, 1e-2, 0.1),
        optim.amp(ranks.device),
    )
    norms = []
    for step in range(steps):
        ids = torch.randint(20, (8, 10), generator=torch.Generator().manual_seed(step))
        mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
        mine = slice(ranks.rank * 8 // ranks.world, (ranks.rank + 1) * 8 // ranks.world)
        rows, counted = ids[mine], mask[mine]
        n_tokens = ranks.sum(counted.sum())
        parts = list(zip(rows.split(micro_batch), counted.split(micro_batch), strict=True))
        for i, (row, count) in enumerate(parts):
            with ranks.grad_sync(wrapped, on=i == len(parts) - 1), autocast():
                loss = nn.functional.cross_entropy(wrapped(row[:, :-1]).transpose(1, 2), row[:, 1:], reduction="none")
                loss = torch.where(count, loss, 0.0).sum() / n_tokens * ranks.loss_scale
                scaler.scale(loss).backward()
        norms.append(optim.step(optimizer, net, scaler, clip=0.5))
    return net, norms


# ---- the jobs, run by every rank


def reductions(ranks: distributed.Dist, out: Path) -> dict:
    r = ranks.rank
    x = torch.tensor([1.0, 10.0]) * (r + 1)
    seen = {
        "who": [ranks.rank, ranks.world, ranks.is_main, ranks.loss_scale, str(ranks.device)],
        "sum": ranks.sum(x).tolist(),
        "untouched": x.tolist() == [1.0 * (r + 1), 10.0 * (r + 1)],
        "sum of counts": ranks.sum(torch.tensor(2**40 + r)).item(),
        "sum of doubles": ranks.sum(torch.tensor(1e-12 * (r + 1), dtype=torch.float64)).item(),
        "rows": ranks.all_gather_rows(torch.tensor([[r, 1], [r, 2]])).tolist(),
        "rows of bools": ranks.all_gather_rows(torch.tensor([r == 0, True])).tolist(),
        "rows of a slice": ranks.all_gather_rows(torch.arange(6).view(2, 3).T[:2] + 10 * r).tolist(),
        "nan": ranks.sum(torch.tensor(float("nan") if r else 1.0)).isnan().item(),
        "threads": torch.get_num_threads(),
    }
    net = make_net()
    almost = torch.ones(5)
    almost[3] += r * torch.finfo(torch.float32).eps
    seen["same"] = [
        ranks.same(net),
        ranks.same(torch.ones(3)),
        ranks.same(torch.tensor(float("nan"))),
        ranks.same(torch.ones(2, dtype=torch.bfloat16)),
        ranks.same(torch.zeros(0)),
    ]
    with torch.no_grad():
        net[3].bias[7] += r * 1e-15
    seen["different"] = [
        ranks.same(net),
        ranks.same(almost),
        ranks.same(torch.tensor(0.0 if r else -0.0)),
        ranks.same(torch.ones(2, 3) if r else torch.ones(3, 2)),
        ranks.same(torch.zeros(1, dtype=torch.int32) if r else torch.zeros(1)),
        ranks.same(nn.Linear(2, 1, bias=bool(r)).requires_grad_(False)),
    ]
    if not ranks.is_main:
        time.sleep(0.5)
        (out / "written").touch()
    ranks.barrier()
    seen["barrier"] = (out / "written").exists()
    return seen


def training(ranks: distributed.Dist, out: Path) -> dict:
    net, norms = train(ranks, micro_batch=2)
    if ranks.is_main:
        checkpoint.save(out / "two", net.state_dict(), {})

    wrapped = ranks.wrap(net)  # gradients stay at home until the last micro-batch
    ids = torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(ranks.rank))
    alone = []
    for last in (False, True):
        with ranks.grad_sync(wrapped, on=last):
            wrapped(ids).square().sum().backward()
        alone.append(not ranks.same(net[1].weight.grad))
    return {
        "norms": norms,
        "trained the same": ranks.same(net),
        "alone": alone,
    }


def everything(ranks: distributed.Dist, out: Path) -> None:
    seen = reductions(ranks, out) | training(ranks, out)
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(seen))


def mistake_of_all(ranks: distributed.Dist, out: Path) -> None:
    raise ValueError("minibatch 5 is not a multiple of world size 2; try 4")


def mistake_of_0(ranks: distributed.Dist, out: Path) -> None:
    if ranks.rank == 0:
        raise ValueError("minibatch 5 is not a multiple of world size 2; try 4")
    ranks.barrier()


def mistake_of_1(ranks: distributed.Dist, out: Path) -> None:
    if ranks.rank == 1:
        raise ValueError("minibatch 5 is not a multiple of world size 2; try 4")
    ranks.barrier()


def sleep(ranks: distributed.Dist, out: Path) -> None:
    (out / f"pid{ranks.rank}").write_text(str(os.getpid()))
    time.sleep(300)


def main() -> None:
    ranks = distributed.setup()
    globals()[sys.argv[1]](ranks, Path(sys.argv[2]))
    ranks.close()


if __name__ == "__main__":
    config.run(main)
    raise SystemExit


# ---- what the tests look at


def torchrun(job: str, out: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        __file__,
        job,
        str(out),
    ]
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        command, cwd=ROOT, env={**clean, "CUDA_VISIBLE_DEVICES": ""}, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict]]:
    """One run of two processes; what each of them saw."""
    out = tmp_path_factory.mktemp("two")
    process = torchrun("everything", out)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_each_knows_who_it_is(two):
    assert [seen["who"] for seen in two[1]] == [[0, 2, True, 2.0, "cpu"], [1, 2, False, 2.0, "cpu"]]
    assert [seen["threads"] for seen in two[1]] == [1, 1]


def test_reductions(two):
    for seen in two[1]:
        assert seen["sum"] == [3.0, 30.0]
        assert seen["sum of counts"] == 2**41 + 1  # counts beyond float32 stay exact
        assert seen["sum of doubles"] == pytest.approx(3e-12, rel=1e-15)
        assert seen["rows"] == [[0, 1], [0, 2], [1, 1], [1, 2]]
        assert seen["rows of bools"] == [True, True, False, True]
        assert seen["rows of a slice"] == [[0, 3], [1, 4], [10, 13], [11, 14]]
        assert seen["untouched"] and seen["nan"] and seen["barrier"]


def test_same_means_every_bit(two):
    for seen in two[1]:
        assert seen["same"] == [True] * 5 and seen["different"] == [False] * 6


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_ranks_and_micro_batches_change_no_gradient(two, micro_batch):
    """Two processes with micro-batches of 2 train the weights that one process trains with any micro-batch."""
    alone, norms = train(distributed.Dist(), micro_batch)
    saved = checkpoint.load(two[0] / "two").tensors
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-10, atol=1e-12)
    for seen in two[1]:
        assert seen["norms"] == pytest.approx(norms, rel=1e-10)


def test_gradients_travel_with_the_last_micro_batch_only(two):
    assert [seen["alone"] for seen in two[1]] == [[True, False]] * 2
    assert all(seen["trained the same"] for seen in two[1])


def test_alone_everything_is_the_identity(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks = distributed.setup()
    x = torch.randn(3, 2)
    assert (ranks.rank, ranks.world, ranks.is_main, ranks.loss_scale) == (0, 1, True, 1.0)
    for call in (ranks.sum, ranks.all_gather_rows):
        assert torch.equal(call(x), x) and call(x).data_ptr() != x.data_ptr()
    net = make_net()
    assert ranks.wrap(net) is net and ranks.same(net) and ranks.same(x)
    assert isinstance(ranks.grad_sync(net, on=False), contextlib.nullcontext)
    ranks.barrier()
    ranks.close()
    assert not torch.distributed.is_initialized()


def test_a_single_process_under_torchrun_needs_no_group(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert distributed.setup().world == 1 and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "world, replicas, use", [(2, 2, "1"), (4, 3, "1 or 2"), (8, 0, "1 or 2 or 4"), (8, -1, "1 or 2 or 4")]
)
def test_replicas_that_do_not_divide(monkeypatch, world, replicas, use):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=f"--replicas={replicas} does not divide {world} processes .*; use {use}$"):
        distributed.setup(shard=True, replicas=replicas)


def test_more_processes_than_gpus_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="torchrun started 2 processes here, but there are 1 GPUs"):
        distributed.setup()


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["all", "0", "1"])
def test_a_mistake_is_told_once(tmp_path, whose):
    """Whoever makes it; the others lose their peer, or make it too, and keep quiet."""
    process = torchrun(f"mistake_of_{whose}", tmp_path)
    _, errors = process.communicate(timeout=300)
    ours = [line for line in errors.splitlines() if "error: " in line or f'{__file__}", line' in line]
    who = "[rank 1] " if whose == "1" else ""
    assert process.returncode != 0
    assert ours == [f"{who}error: minibatch 5 is not a multiple of world size 2; try 4"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_workers_die_with_torchrun(tmp_path):
    """kill -9 of torchrun must not leave workers that write beside the run that resumes."""
    process = torchrun("sleep", tmp_path)
    deadline = time.monotonic() + 150
    while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.1)
    pids = [int(file.read_text()) for file in tmp_path.glob("pid*")]
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    """Does the process run? One that died and waits for its parent (Z) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
