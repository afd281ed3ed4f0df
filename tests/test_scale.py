"""rlhf/ppo/traffic.py: the collectives of an iteration, worked out, are those counted in real runs, with the same bytes.

The file is its own worker: `test_scale.py JOB` counts on every rank, and rank 0 writes it down. Or one process
takes itself for rank 0 of many, whose peers all say what it says (torch's fake backend).
"""

import contextlib
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

import train_ppo
from rlhf.infra import config, distributed, optim
from rlhf.infra.collectives import Sent, counted
from rlhf.lm.pretrained import config_of
from rlhf.ppo.traffic import Plan, calls

ITERATION = 1  # the first has the self-check, and DDP's parts are not yet settled


class Enough(Exception):
    """All that was to be counted has happened."""


class Pretended(distributed.Dist):
    def wrap(self, module):
        """DDP waits for what the fake backend does not give: its own sum, then, by the same collective."""
        wrapped = super().wrap(module)

        def sum_of_all(_, bucket):
            torch.distributed.all_reduce(bucket.buffer())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        if self.world > 1 and not self.mesh:
            wrapped.register_comm_hook(None, sum_of_all)
        return wrapped


def joined(ranks: int, pretend: bool) -> distributed.Dist:
    if not pretend:
        return distributed.setup()
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    return Pretended(0, ranks, torch.device("cpu"))


def iteration_of(dist: distributed.Dist, options: list[str]) -> list[Sent]:
    """What one iteration of train_ppo.py sends."""
    cfg, iterations = config.parse(train_ppo.Config, options), {}
    if cfg.shard:
        dist = replace(dist, mesh=distributed.fsdp().mesh_of(dist.world, cfg.replicas, dist.device))
    micro_batch, precision = train_ppo.row_counts(cfg, dist.world), optim.amp(dist.device, cfg.precision)
    cast = train_ppo.open_cast(cfg, dist, precision)

    def act(iteration: int):
        iterations[iteration] = len(sent)  # where it begins
        if iteration > ITERATION:
            raise Enough
        return cast.act(iteration)

    # ranks that only pretend hold other weights than the reference, which the self-check would say
    cast_now = replace(cast, act=act, check_once=lambda *x, **y: None)
    with counted() as sent, contextlib.suppress(Enough):
        train_ppo.train(cfg, cast_now, dist, precision, micro_batch)
    return sent[iterations[ITERATION] : iterations[ITERATION + 1]]


def worker(out: Path) -> None:
    job, found, dist = json.loads(out.read_text()), [], None
    for ranks, options in job["cases"]:
        if dist is None or job["pretend"]:
            dist = joined(ranks, job["pretend"])
        found.append(iteration_of(dist, options))
        if job["pretend"]:
            torch.distributed.destroy_process_group()
    if dist.is_main:
        out.with_name("counted.json").write_text(json.dumps(found))
    if not job["pretend"]:
        dist.close()


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
    raise SystemExit


def purpose(sent: Sent) -> str:
    by = set(sent.callers)
    for name, found in (("whole", "sample"), ("gather", "rollout"), ("share", "rollout"), ("judge", "judge")):
        if name in by:
            return found
    if by & {"_reduce", "take"}:
        return "numbers"
    return "learn" if sent.kind == "all-gather" else "gradients"


OPTIONS = {"minibatches": 2, "epochs": 2, "iterations": 4, "checkpoint_every": 10, "sample_every": 10, "micro_batch": 2}
OPTIONS |= {"reward": "rewards.py:shorter"}


def options_of(text: str) -> dict:
    return dict(word.split("=") for word in text.split())


def planned(model, ranks: int, rows: int, o: dict) -> Counter:
    how = {name: int(o[name]) for name in ("micro_batch", "minibatches", "epochs", "branch_layers") if name in o}
    how |= {"critic": o.get("critic"), "recompute": o.get("recompute") == "true", "tokens": 5 + 8}
    shards = ranks // int(o.get("replicas", 1)) if "shard" in o else 1
    found = Counter()
    for call, n in calls(Plan(model, o["layout"], ranks, rows, shards=shards, **how)).items():
        found[call[:3]] += n
    return found


def check(world, place: Path, cases: list[tuple[int, str]], pretend: bool) -> None:
    """Is what is counted what was planned, in runs of so many ranks with these options?"""
    job = []
    for i, (ranks, text) in enumerate(cases):
        rows = {"batch": 4 * ranks, "samples_per_prompt": max(1, ranks // 8), "out": place / str(i)}
        job.append((ranks, world.command("train_ppo.py", **OPTIONS, **rows, **options_of(text))[1:]))
    (place / "job.json").write_text(json.dumps({"cases": job, "pretend": pretend}))
    done = world.together([__file__, str(place / "job.json")], 0 if pretend else cases[0][0])
    assert done.code == 0, done.err[-3000:]
    model = config_of(world.path / "lm")
    for (ranks, text), sent in zip(cases, json.loads((place / "counted.json").read_text()), strict=True):
        ours = Counter((purpose(x), x.kind, x.bytes) for x in (Sent(*x) for x in sent))
        theirs = planned(model, ranks, 4, OPTIONS | options_of(text))
        assert ours == theirs, (ranks, text, ours - theirs, theirs - ours)


WAYS = ("", "shard=true", "shard=true recompute=true")
LAYOUTS = ("layout=full", "layout=shared", "layout=adapters", "layout=adapters critic=shared")
LAYOUTS += ("layout=branch branch_layers=1", "layout=branch branch_layers=1 critic=separate")
CASES = [f"{layout} {way}" for layout in LAYOUTS for way in WAYS]


def test_an_iteration_of_one_rank_among_many(world, tmp_path):
    few = ((512, CASES[3]), (8, CASES[8]), (64, f"{CASES[13]} replicas=8"), (1, CASES[0]))
    check(world, tmp_path, few, pretend=True)


@pytest.mark.slow
def test_recomputation_of_one_rank_among_eight(world, tmp_path):
    check(world, tmp_path, [(8, case) for case in CASES[2::3]], pretend=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, cases", [(2, [*CASES[0::3], *CASES[1::3]]), (4, [*CASES[:2], f"{CASES[4]} replicas=2"])]
)
def test_an_iteration_of_real_processes(world, tmp_path, ranks, cases):
    check(world, tmp_path, [(ranks, case) for case in cases], pretend=False)
