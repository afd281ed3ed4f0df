"""One process or many under torchrun: the same calls, and alone every one of them is the identity."""

import contextlib
import ctypes
import hashlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlhf.infra import config, peers

TIMEOUT = 900.0  # seconds that a rank waits for the others: rank 0 writes checkpoints, a reward may ask a server
LONGEST = 30 * 86400.0  # torch counts in nanoseconds


@dataclass(frozen=True)
class Dist:
    """Who this process is among its peers, and what it says to them. Tensors handed in are never changed."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    mesh: "dist.DeviceMesh | None" = None  # of --shard=true: (shard,), or (replicate, shard)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def loss_scale(self) -> float:
        """DDP and FSDP average gradients over the ranks: a loss divided by the *global* token count must be scaled back up."""
        return float(self.world)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose backward averages gradients over the ranks; call its forward, not its parts.

        Under shards its parameters become others: an optimiser comes after.
        """
        if self.world == 1:
            return module
        if self.mesh:
            return fsdp().shard(module, self.mesh)
        # what is frozen came from the same file everywhere, which may be mapped into memory: DDP must not write into it
        frozen = [name for name, x in module.named_parameters(remove_duplicate=False) if not x.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
        with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers, older ones know no other name
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            return DistributedDataParallel(
                module,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    @property
    def copied(self) -> Callable[[Tensor], Tensor]:
        """How the copy of a parameter that trains gets its numbers. Under shards it borrows the original's, out of which
        `wrap` cuts its rows, since a rank may have no room for several whole models.
        """
        return (lambda x: x) if self.mesh else torch.clone

    def rest(self, *modules: nn.Module) -> None:
        """Under shards every rank keeps a part of what is frozen in these modules, and gathers a layer when it computes."""
        for module in modules if self.mesh else ():
            fsdp().rest(module, self.mesh)

    @contextlib.contextmanager
    def whole(self, *modules: nn.Module) -> Iterator[None]:
        """Around passes without gradients that sample, or that differ between ranks: all weights are on every rank."""
        with fsdp().whole(*modules) if self.mesh else contextlib.nullcontext():
            yield

    @property
    def together(self):  # -> shards.Ranks | None
        """How the ranks write a checkpoint of what is sharded; None: rank 0 does it alone."""
        return fsdp().Ranks(self.rank, self.world, self.all_gather_rows) if self.mesh else None

    def grad_sync(self, module: nn.Module, on: bool) -> contextlib.AbstractContextManager:
        """Around forward *and* backward of a micro-batch: gradients travel only with the last one of a step.

        Under shards a rank has no room for a whole gradient: every micro-batch is reduced to the rows that each rank keeps,
        and only what travels between replicas waits for the last.
        """
        if self.mesh:
            module.set_is_last_backward(on)
            module.set_requires_all_reduce(on)
        return contextlib.nullcontext() if on or self.world == 1 or self.mesh else module.no_sync()

    def sum(self, x: Tensor) -> Tensor:
        """Over the ranks; what they count differently (a mean, say) is a sum divided by a sum."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, op) -> Tensor:
        if self.world == 1:
            return x.clone()
        total = x.detach().to(self.device, copy=True)
        dist.all_reduce(total, op)
        return total.to(x.device)

    def all_gather_rows(self, x: Tensor) -> Tensor:
        """The rows of every rank below each other, in rank order: (n, ...) -> (world * n, ...); shapes must agree."""
        if self.world == 1:
            return x.clone()
        mine = x.detach().to(self.device).contiguous()
        rows = mine.new_empty(self.world, *mine.shape)
        dist.all_gather([*rows], mine)
        return rows.flatten(0, 1).to(x.device)

    def exchange_rows(self, parts: list[Tensor], counts: list[int]) -> Tensor:
        """parts[r] goes to rank r; -> what they send here, counts[r] rows of rank r, below each other in rank order."""
        if self.world == 1:
            return parts[0].clone()
        mine = torch.cat(parts).detach().to(self.device)
        rows = mine.new_empty(sum(counts), *mine.shape[1:])
        dist.all_to_all_single(rows, mine, counts, [len(part) for part in parts])
        return rows.to(parts[0].device)

    def same(self, x: Tensor | nn.Module) -> bool:
        """Do all ranks hold the same names, shapes and bits? Every rank gets the same answer.

        Of what is sharded names and shapes alone: its bits are there once.
        """
        if self.world == 1:
            return True
        tensors = x.state_dict() if isinstance(x, nn.Module) else {"": x}
        digest = hashlib.sha256()
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            if not self.mesh or not fsdp().is_part(tensor):
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        rows = self.all_gather_rows(torch.tensor([[*digest.digest()]], dtype=torch.uint8))  # (world, 32)
        return bool((rows == rows[0]).all())

    def barrier(self) -> None:
        """Wait for everybody, e.g. until rank 0 has written what all will read."""
        if self.world > 1:
            self.sum(torch.zeros(1)).item()

    def close(self, code: int = 0) -> None:
        """Leave the group, and the process with this exit code: the last call of a script.

        With gloo (torch 2.13) the interpreter's own shutdown now and then dies with "terminate called without an active
        exception" when all work is done, and torchrun then reports a failure that was none.
        """
        if self.world > 1:
            peers.PIDS.clear()  # from here on they may end
            self.barrier()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if code:
            raise SystemExit(code)


def setup(shard: bool = False, replicas: int = 1) -> Dist:
    """Join the group that torchrun started (nccl on GPUs, gloo on CPUs), or be alone.

    shard: every rank keeps a part of the weights; replicas: so many copies of them, each over a part of the ranks.
    A rank that has not answered for PLAIN_RLHF_TIMEOUT seconds (900) ends the others.

    Raises ValueError for a device that these processes cannot have, see `device_of`, and for shards or replicas that they
    cannot make.
    """
    world, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if shard and world == 1:
        raise ValueError(
            "--shard=true cuts the weights over several processes, and this is one: start it with torchrun"
        )
    if replicas != 1 and (replicas < 1 or world % replicas or replicas == world):
        raise ValueError(
            f"--replicas={replicas} does not divide {world} processes into groups of two or more; "
            f"use {' or '.join(str(n) for n in range(1, world) if world % n == 0)}"
        )
    asked, ranks = os.environ.get("PLAIN_RLHF_DEVICE", "auto"), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = device_of(asked, local_rank, ranks, *accelerators())
    if device.type == "cuda":
        torch.cuda.set_device(device)
        leave_out_cudnn_attention()
    if world == 1:
        return Dist(device=device)
    if sys.platform == "linux":
        # When torchrun is killed with -9 its workers would train on, and write beside the run that resumes.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
        if device.type == "cpu" and os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: no need that its host name resolves
    rank, timeout = int(os.environ["RANK"]), timedelta(seconds=patience())
    place = dict(store=store, rank=rank, world_size=world) if (store := store_of_attempt(world, timeout)) else {}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout, **place)
    joined = Dist(rank, world, device, fsdp().mesh_of(world, replicas, device) if shard else None)
    know_peers(joined)
    return joined


def accelerators() -> tuple[int, bool]:
    """How many GPUs torch finds on this machine, and whether it finds Apple's (mps)."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available()


def device_of(asked: str, rank: int, ranks: int, gpus: int, apple: bool) -> torch.device:
    """Where process `rank` of `ranks` on this machine computes: what is asked for, or with "auto" its GPU, else the CPU.

    Apple's GPU has to be asked for: nothing here was ever run on one. ValueError for what is not there, or not for so many.
    """
    if asked not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"there is no device {asked!r}; it is auto, cpu, cuda or mps")
    if asked == "cpu" or asked == "auto" and not gpus:
        return torch.device("cpu")
    if asked == "mps":
        if not apple:
            raise ValueError("torch finds no GPU of Apple's (mps) here; use cpu, or auto")
        if ranks > 1:
            raise ValueError(f"{ranks} processes would share Apple's GPU (mps), which is for one; use cpu, or auto")
        return torch.device("mps")
    if not gpus:
        raise ValueError("torch finds no CUDA GPU here; use cpu, or auto")
    if rank >= gpus:
        raise ValueError(
            f"torchrun started {ranks} processes here, but there are {gpus} GPUs; start one per GPU, or set "
            "PLAIN_RLHF_DEVICE=cpu"
        )
    return torch.device("cuda", rank)


def fsdp() -> ModuleType:
    """What --shard=true needs; torch takes half a second to import it."""
    from rlhf.infra import shards

    return shards


def leave_out_cudnn_attention() -> None:
    """cuDNN plans every new shape, for half a second (FunASR, issue 3704), and decoding has one per step."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def store_of_attempt(world: int, timeout: timedelta) -> dist.Store | None:
    """torchrun's store, under a name of this attempt. With --max-restarts a new rank may otherwise read where one of the
    attempt before listened, and wait for it (torch 2.13).

    None, as torch does it, without torchrun, and on several machines, which may count their attempts differently.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or os.environ.get("LOCAL_WORLD_SIZE") != str(world):
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, False, timeout)
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def patience() -> float:
    """Seconds that a rank waits for the others."""
    text = os.environ.get("PLAIN_RLHF_TIMEOUT", str(TIMEOUT))
    try:
        if 0 < (seconds := float(text)) <= LONGEST:
            return seconds
    except ValueError:
        pass
    raise ValueError(f"PLAIN_RLHF_TIMEOUT={text} is not a number of seconds from 0 to {LONGEST:.0f}")


def know_peers(joined: Dist) -> None:
    """Tell the others on this machine which process this is, and watch theirs: who is killed cannot say so itself."""
    machine = hashlib.sha256(f"{os.uname().nodename} {boot()}".encode()).digest()
    rows = joined.all_gather_rows(torch.tensor([[os.getpid(), int.from_bytes(machine[:7])]]))  # (world, 2)
    here = rows[joined.rank, 1]
    peers.PIDS |= {rank: int(pid) for rank, (pid, place) in enumerate(rows) if place == here and rank != joined.rank}
    peers.watch(end_with_them)


def boot() -> str:
    """What two machines of the same name do not share."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def end_with_them(lost: str) -> None:
    """Without one rank the others train on nothing: say which, and end."""
    config.complain(f"{config.LOST}{lost}{config.GO_ON}")
    os._exit(2)
