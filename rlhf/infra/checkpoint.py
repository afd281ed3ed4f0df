"""A checkpoint is a directory of safetensors and JSON that is either complete or not there.

    model.safetensors      the weights
    optimizer.safetensors  AdamW's moments by parameter name (only where training can go on)
    state.json             step, KL controller, loss scaler ... what else the loop must remember
    config.json            {"format": 1, "config": ..., "files": {name: bytes}}
    ...                    files that belong to it, e.g. the tokenizer

It is written under a temporary name beside its place, flushed to the disk and renamed, so a kill or a full disk at any
moment leaves the last complete one. There is no pickle: opening a checkpoint from a stranger runs none of their code.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; `tensors` and `optimizer` read their file each time they are asked for."""

    path: Path
    config: dict
    state: dict

    @property
    def tensors(self) -> dict[str, Tensor]:
        return read_tensors(self.path / "model.safetensors")

    @property
    def optimizer(self) -> dict[str, Tensor]:
        return read_tensors(self.path / "optimizer.safetensors")


def save(
    path: str | Path,
    tensors: dict[str, Tensor],
    config: dict,
    state: dict | None = None,
    optimizer: dict[str, Tensor] | None = None,
    files: Iterable[str | Path] = (),
) -> Path:
    """Write a checkpoint, replacing an older one only when the new one is complete; dtypes are kept.

    `config` and `state` are plain JSON. Tensors that share memory are refused: a tied weight has one name.
    Raises OSError with the path when there is no space or no permission, ValueError where other files would be lost;
    what was there before is then untouched.
    """
    path = Path(path)
    if foreign := strangers(path):
        raise ValueError(f"{path} holds {short(foreign)}, not part of a checkpoint: choose another place, or delete it")
    temporary, aside = (path.with_name(f".{path.name}.{what}-{os.getpid()}") for what in ("tmp", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(leftovers(path, "tmp"))
        temporary.mkdir()
        write_tensors(temporary / "model.safetensors", tensors)
        if optimizer is not None:
            write_tensors(temporary / "optimizer.safetensors", optimizer)
        if state is not None:
            (temporary / "state.json").write_text(json.dumps(state, indent=1))
        for file in files:
            shutil.copyfile(file, temporary / Path(file).name)
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        content = {"format": FORMAT, "config": config, "files": sizes}
        (temporary / "config.json").write_text(json.dumps(content, indent=1))
        for file in [*temporary.iterdir(), temporary]:
            if file.suffix == ".safetensors":
                shutil.copymode(temporary / "config.json", file)  # safetensors writes 0600, whatever the umask
            flush_to_disk(file)
        if path.exists():  # a directory cannot be renamed over another; between the two renames resolve() finds `aside`
            remove([aside])
            path.rename(aside)
        temporary.rename(path)
        flush_to_disk(path.parent)
        remove(leftovers(path, "old"))
    except OSError as error:
        what = f"cannot write the checkpoint {path}: {error.strerror or error}"
        raise OSError(error.errno, what, error.filename) from error
    finally:
        remove([temporary])  # still there only after an error
    return path


def load(path: str | Path) -> Checkpoint:
    """Open a checkpoint, or the latest one of a run directory.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of a newer format.
    """
    path = resolve(path)
    content = read_config(path)
    if content is None:
        raise ValueError(f"{path}/config.json is not the config of a checkpoint of ours")
    if content["format"] > FORMAT:
        newer = f"{path} has checkpoint format {content['format']}, this version reads {FORMAT}"
        raise ValueError(f"{newer}; use a newer version of this code")
    for name, size in content["files"].items():
        found = (path / name).stat().st_size if (path / name).exists() else 0
        if found != size:
            raise ValueError(f"{path / name} has {found} bytes, {size} were written: damaged; use another checkpoint")
    state = json.loads((path / "state.json").read_text()) if "state.json" in content["files"] else {}
    return Checkpoint(path, content["config"], state)


def read_config(path: Path) -> dict | None:
    """The content of config.json where it is one of ours and not cut short."""
    try:
        content = json.loads((path / "config.json").read_text())
        return content if isinstance(content, dict) and {"format", "config", "files"} <= content.keys() else None
    except (OSError, ValueError):
        return None


def digest(path: str | Path) -> str:
    """sha256 of a checkpoint's weights."""
    return hashlib.sha256((resolve(path) / "model.safetensors").read_bytes()).hexdigest()


def is_complete(path: Path) -> bool:
    content = read_config(path)
    sizes = content["files"] if content else {}
    files = [path / name for name in sizes]
    return bool(files) and all(file.is_file() and file.stat().st_size == sizes[file.name] for file in files)


def resolve(path: str | Path) -> Path:
    """The checkpoint directory that `path` means: itself, or the latest one of a run directory."""
    path = Path(path)
    if found := latest(path):
        return found
    asides = path.parent.glob(f".{path.name}.old-*")
    for candidate in [path] if path.exists() else asides:  # missing when save() was killed between its two renames
        if (candidate / "config.json").exists():
            return candidate
    raise FileNotFoundError(f"no checkpoint in {path}: a config.json or step_* directories were expected there")


def save_step(run_dir: str | Path, step: int, *args, keep: int | None = 2, **kwargs) -> Path:
    """save() to run_dir/step_000123, then remove all but the newest `keep`; None keeps all."""
    path = save(Path(run_dir) / f"step_{step:06d}", *args, **kwargs)
    kept = [*steps(run_dir)[-(keep or 0) :], path]  # [-0:] is all of them
    remove(old for old in Path(run_dir).glob("step_*") if old.is_dir() and old not in kept)
    return path


def steps(run_dir: str | Path) -> list[Path]:
    """The complete step_000123 checkpoints of a run, oldest first."""
    found = {}
    for path in Path(run_dir).glob("*step_*"):
        if match := re.fullmatch(r"\.?step_(\d+)(\.old-\d+)?", path.name):
            number, aside = int(match[1]), match[2]
            if is_complete(path) and not (aside and number in found):  # an aside counts only where the step is missing
                found[number] = path
    return [found[number] for number in sorted(found)]


def latest(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, where it resumes; None for a run that has none yet."""
    return next(reversed(steps(run_dir)), None)


def leftovers(path: Path, what: str) -> list[Path]:
    """What a killed save() left: "tmp" or "old" directories of this checkpoint or, if it is a step, of any step."""
    name = "step_*" if path.name.startswith("step_") else path.name
    return [*path.parent.glob(f".{name}.{what}-*")]


def strangers(path: Path) -> list[str]:
    """Names in `path` that no save() wrote: replacing the directory would lose them."""
    content = read_config(path)
    ours = {
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        *(content["files"] if content else ()),
    }
    return sorted(set(os.listdir(path)) - ours) if path.is_dir() else []


def remove(directories: Iterable[Path]) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    except SafetensorError as error:  # hides the OSError: "... (os error 28)"
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from None
        raise


def read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise FileNotFoundError(errno.ENOENT, "this checkpoint has no such file", str(file))
    try:
        open(file, "rb").close()  # safetensors says "no such file" where only the permission is missing
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); use another checkpoint") from None


def flush_to_disk(path: Path) -> None:
    """fsync a file or directory: without it a rename can reach the disk before the bytes do."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The state_dict without its frozen parameters: those lie in the base model that the checkpoint's config names."""
    frozen = {name for name, x in module.named_parameters(remove_duplicate=False) if not x.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def load_weights(module: nn.Module, tensors: dict[str, Tensor], where: str | Path) -> None:
    """Copy `tensors`, which came from `where`, into the module; ValueError unless names and shapes are its own.

    Frozen parameters stay as they are, see `trained_state`.
    """
    own = trained_state(module)
    missing, extra = [n for n in own if n not in tensors], [n for n in tensors if n not in own]
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    differences = [("it lacks ", missing), ("it adds ", extra), ("", wrong)]
    if any(names for _, names in differences):
        details = "; ".join(what + short(names) for what, names in differences if names)
        raise ValueError(f"{where} is a checkpoint of another architecture: {details}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def short(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """AdamW's exp_avg, exp_avg_sq and step as {"parameter name:key": tensor}: the order of parameters is free."""
    named = ((name, optimizer.state.get(parameter, {})) for name, parameter in module.named_parameters())
    return {f"{name}:{key}": tensor for name, state in named for key, tensor in state.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The reverse of optimizer_tensors: training goes on bit for bit. ValueError where the tensors fit no parameter."""
    named = dict(module.named_parameters())
    for label, tensor in tensors.items():
        name, _, key = label.rpartition(":")
        if name not in named or key != "step" and tensor.shape != named[name].shape:
            here = tuple(named[name].shape) if name in named else "no such parameter"
            raise ValueError(f"optimizer state of another model: {label} is {tuple(tensor.shape)} there, {here} here")
        optimizer.state[named[name]][key] = tensor.to(named[name].device, copy=True)
