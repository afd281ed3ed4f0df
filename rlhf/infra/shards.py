"""One model over several ranks (ZeRO-3, arXiv:1910.02054): what trains by FSDP2, frozen matrices by units of our own.

    shard(policy, mesh)    every rank keeps its rows of each parameter, of its gradient and of its moments (DTensor)
    rest(base, mesh)       every rank keeps its part of each frozen matrix; a unit wakes while its layer computes
    with whole(policy):    all of its weights, on every rank: to sample, or for passes that differ between ranks

FSDP2 shards by module. Our roles share frozen parameters between modules: a policy's lower layers are the reference's, and
so are the critic's. So a frozen matrix belongs to a unit, whichever module computes with it, and is kept once. Frozen
vectors (norms, biases) stay whole.
"""

import contextlib
import errno
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.checkpoint import HuggingFaceStorageWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.futures import Future

from rlhf.infra import checkpoint, optim

GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 has the new name
METHODS = ("embed", "project")  # of a model, that read the embedding without its module: as rows, as output matrix


def mesh_of(world: int, replicas: int, device: torch.device) -> DeviceMesh:
    """(replicas, world / replicas): weights are cut over the ranks of a row, and every row has a copy."""
    optim.return_freed_memory()
    if replicas == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


# what trains


def shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The same module, of whose trained parameters every rank keeps its rows; its forward gathers a layer at a time.

    Every element of a ModuleList is gathered for itself, what is left with the outermost module. Optimisers come after.
    """
    rest(module, mesh)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # nobody writes into it
    frozen = {x for x in module.parameters() if not x.requires_grad}
    for part in layers(module):
        if any(x.requires_grad for x in part.parameters()):
            fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
    fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    # who runs forward first is taken for the outermost otherwise, and that may be a layer (torch 2.13)
    module._get_fsdp_state()._lazy_init()
    module.register_forward_hook(reshard_without_gradient)
    OUTERMOST.update(dict.fromkeys(module.modules(), module))
    return module


def reshard_without_gradient(module: FSDPModule, args: tuple, output: object) -> None:
    """The outermost part stays whole for the backward, which reshards it; where none comes, nobody else does."""
    if not torch.is_grad_enabled() and not HELD.get(module):
        module.reshard()


HELD: dict[nn.Module, int] = {}  # how many `whole` hold a part
OUTERMOST: dict[nn.Module, FSDPModule] = {}  # module -> with which part its own parameters are gathered


def layers(module: nn.Module) -> list[nn.Module]:
    return [layer for part in module.modules() if isinstance(part, nn.ModuleList) for layer in part]


def is_part(x: Tensor) -> bool:
    """Are some rows of it on other ranks?"""
    return isinstance(x, DTensor) or x.numel() > 0 == x.untyped_storage().nbytes()


# what is frozen


class Unit:
    """Frozen matrices that are gathered together: one flat tensor, whose memory comes and goes.

    The parameters stay what they are, views of it, in every module that has them.
    """

    def __init__(self, parameters: list[nn.Parameter], mesh: DeviceMesh):
        self.group = mesh.get_group("shard")
        ranks, mine = dist.get_world_size(self.group), dist.get_rank(self.group)
        first = parameters[0]
        self.size = -(-sum(x.numel() for x in parameters) // ranks)  # of a rank's part
        self.flat = torch.empty(self.size * ranks, dtype=first.dtype, device=mesh.device_type)
        offset = 0
        for x in parameters:
            place = self.flat[offset : offset + x.numel()].view(x.shape)
            x.data = place.copy_(x.data)
            x.unit = self
            offset += x.numel()
        self.part = self.flat[mine * self.size : (mine + 1) * self.size].clone()
        self.bytes = self.flat.untyped_storage().nbytes()
        self.users = 0
        self.sleep()

    def wake(self) -> None:
        self.users += 1
        storage = self.flat.untyped_storage()
        if storage.nbytes() == 0:
            storage.resize_(self.bytes)
            GATHER(self.flat, self.part, group=self.group)

    def rest(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.sleep()

    def sleep(self) -> None:
        self.flat.untyped_storage().resize_(0)


def rest(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The same module, of whose frozen matrices every rank keeps a part; each wakes while something computes with it."""
    for part in [*layers(module), *owners(module)]:
        attach(part, units(part, mesh))
    for part in module.modules():
        for name in METHODS:
            if hasattr(part, name) and name not in vars(part) and (needed := units_of(matrix_of(part, name))):
                setattr(part, name, awake(getattr(part, name), needed))
        if hasattr(part, "logits_in_parts") and units_of(part.lm_head or part.embed_tokens):
            part.logits_in_parts = False  # ranks have different numbers of rows, and gather for every part
    return module


def matrix_of(model: nn.Module, method: str) -> nn.Module:
    """What one of METHODS computes with."""
    return model.lm_head or model.embed_tokens if method == "project" else model.embed_tokens


def owners(module: nn.Module) -> Iterator[nn.Module]:
    """Modules outside of layers with parameters of their own: embeddings, output matrices."""
    inside = {id(part) for layer in layers(module) for part in layer.modules()}
    for part in module.modules():
        if id(part) not in inside and any(True for _ in part.parameters(recurse=False)):
            yield part


def units(part: nn.Module, mesh: DeviceMesh) -> list[Unit]:
    """Those of the frozen matrices in a part of a model: one a type, where they have none yet."""
    alone = [x for x in part.parameters() if not x.requires_grad and x.dim() > 1 and not hasattr(x, "unit")]
    for x in part.parameters():
        if not x.requires_grad and x.dim() < 2:
            x.data = x.data.clone()  # the file that it may be mapped from is let go
    for dtype in dict.fromkeys(x.dtype for x in alone):
        Unit([x for x in alone if x.dtype == dtype], mesh)
    return units_of(part)


def units_of(part: nn.Module) -> list[Unit]:
    return list(dict.fromkeys(x.unit for x in part.parameters() if hasattr(x, "unit")))


def attach(part: nn.Module, units: list[Unit]) -> None:
    """Wake the units before this part's forward and before its backward."""
    if not units or hasattr(part, "rests"):
        return
    part.rests = True
    part.register_forward_pre_hook(lambda _, args: wake(units), prepend=True)
    # also where it is left early, as a block is that has computed again all that the backward pass needs of it
    part.register_forward_hook(lambda _, args, output: leave(units, args, output), always_call=True)


def awake(method: Callable[..., Tensor], units: list[Unit]) -> Callable[..., Tensor]:
    @functools.wraps(method)
    def waking(*args) -> Tensor:
        wake(units)
        output = None
        try:
            output = method(*args)
            return output
        finally:
            leave(units, args, output)

    return waking


def wake(units: list[Unit]) -> None:
    for unit in units:
        unit.wake()


def let_rest(units: list[Unit]) -> None:
    for unit in units:
        unit.rest()


def leave(units: list[Unit], args: tuple, output: Tensor | None) -> None:
    """After a forward: let them rest until the backward needs them, which is between two gradients. None: it was cut short.

    Where it is computed again for a checkpoint of activations, the backward has woken them already.
    """
    in_backward = torch._C._current_graph_task_id() != -1
    if torch.is_grad_enabled() and not in_backward and output is not None and output.requires_grad:
        x = args[0]

        def before(grad: Tensor) -> None:
            wake(units)
            if not x.requires_grad:  # nobody asks for its gradient: at the end of the backward, then
                Variable._execution_engine.queue_callback(lambda: let_rest(units))

        output.register_hook(before)
        if x.requires_grad:
            x.register_hook(lambda grad: let_rest(units))
    let_rest(units)


# whole for a while


@contextlib.contextmanager
def whole(*modules: nn.Module) -> Iterator[None]:
    """All weights of these modules on every rank, for passes without gradients that may differ between ranks."""
    parts = [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]
    # the outermost first: it is the largest, and gathering takes as much again
    parts = list(dict.fromkeys([OUTERMOST[module] for module in modules if module in OUTERMOST] + parts))
    frozen = list(dict.fromkeys(unit for module in modules for unit in units_of(module)))
    wake(frozen)
    for part in parts:
        hold(part, +1)
    try:
        yield
    finally:
        for part in parts:
            hold(part, -1)
        let_rest(frozen)


def hold(part: FSDPModule, more: int) -> None:
    HELD[part] = HELD.get(part, 0) + more
    outermost = part._get_fsdp_state()._is_root
    part.set_reshard_after_forward(not HELD[part] and not outermost, recurse=False)
    if HELD[part]:
        part.unshard()
    else:
        part.reshard()


# checkpoints


class Ranks:
    """Every rank writes its rows to the same directory, which all of them see (a shared file system, on several machines)."""

    def __init__(self, rank: int, world: int, gather_rows: Callable[[Tensor], Tensor]):
        self.is_main, self.rank, self.world, self.gather_rows = rank == 0, rank, world, gather_rows

    def write(self, place: Path, tensors: dict[str, Tensor], optimizer: dict[str, Tensor] | None) -> dict[str, dict]:
        self.tell(place.name)
        files = self.rows_to(place, tensors, optimizer)
        found = self.facts_of_all(files)
        if missing := [name for name, fact in found.items() if not has_size(place / name, fact["bytes"])]:
            unseen = f"rank 0 does not see what other ranks wrote ({missing[0]})"
            raise OSError(errno.ENOENT, f"{unseen}: put --out on a file system that all machines share", str(place))
        return found

    def help(self, path: Path, tensors: dict[str, Tensor], optimizer: dict[str, Tensor] | None) -> Path:
        place = path.with_name(self.tell(""))
        try:
            place.mkdir(parents=True)
        except FileExistsError:  # rank 0 made it, on a file system that both see
            self.facts_of_all(self.rows_to(place, tensors, optimizer))
            return path
        try:  # rank 0 will miss what is written here, and end the run; nobody would remove it
            self.facts_of_all(self.rows_to(place, tensors, optimizer))
        finally:
            checkpoint.remove([place])
        return path

    def tell(self, name: str) -> str:
        """What rank 0 says; the others hear it."""
        said = torch.zeros(256, dtype=torch.uint8)
        said[: len(name.encode())] = torch.tensor([*name.encode()], dtype=torch.uint8)
        return bytes(self.gather_rows(said[None])[0].tolist()).rstrip(b"\0").decode()

    def rows_to(self, place: Path, tensors: dict[str, Tensor], optimizer: dict[str, Tensor] | None) -> list[Path]:
        """This rank's files, on the disk: what is not sharded is in one rank's alone."""
        kinds = dict.fromkeys(tensors, "model") | dict.fromkeys(optimizer or {}, "optimizer")
        files = {kind: place / f"{kind}-{self.rank + 1:05d}-of-{self.world:05d}.safetensors" for kind in kinds.values()}
        rows = {name: x.detach() for name, x in {**tensors, **(optimizer or {})}.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch deprecates in its own code
            try:
                torch.distributed.checkpoint.save(rows, storage_writer=Writer(files, kinds))
            except CheckpointException as failed:  # on all ranks, whoever could not write; it is no Exception
                raise next(error for error, _ in failed.failures.values()) from None
        return [file for file in files.values() if file.exists()]

    def facts_of_all(self, files: list[Path]) -> dict[str, dict]:
        """Size and sha256 of the files of all ranks, each having read its own."""
        mine = torch.zeros(2, 40, dtype=torch.uint8)
        for file in files:
            fact = checkpoint.facts(file)
            row = fact["bytes"].to_bytes(8, "little") + bytes.fromhex(fact["sha256"])
            mine[0 if file.name.startswith("model") else 1] = torch.tensor([*row], dtype=torch.uint8)
        found = {}
        for i, row in enumerate(self.gather_rows(mine).tolist()):
            name = f"{('model', 'optimizer')[i % 2]}-{i // 2 + 1:05d}-of-{self.world:05d}.safetensors"
            if size := int.from_bytes(bytes(row[:8]), "little"):
                found[name] = {"bytes": size, "sha256": bytes(row[8:]).hex()}
        return found


class Writer(HuggingFaceStorageWriter):
    """Torch's format for HF, written from where the tensors lie: its own writer collects a file in memory, and copies it."""

    def __init__(self, files: dict[str, Path], kinds: dict[str, str]):
        super().__init__(str(next(iter(files.values())).parent), save_distributed=True)
        self.files, self.kinds = files, kinds  # kind -> this rank's file; name of a tensor -> kind

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        for kind, file in self.files.items():
            items = [item for item in plan.items if self.kinds[item.index.fqn] == kind]
            begins = {item.index.fqn: {"saved_offsets": [*item.tensor_data.chunk.offsets]} for item in items}
            tensors = {item.index.fqn: planner.resolve_data(item).detach().cpu() for item in items}
            if tensors:
                checkpoint.write_tensors(file, tensors, {checkpoint.OFFSETS: json.dumps(begins), "format": "pt"})
                checkpoint.flush_to_disk(file)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done


def has_size(file: Path, size: int) -> bool:
    return file.exists() and file.stat().st_size == size
