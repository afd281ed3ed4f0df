"""A checkpoint is a directory of safetensors and JSON that is either complete or not there, and knows its own bytes.

    model.safetensors      the weights
    optimizer.safetensors  AdamW's moments by parameter name (only where training can go on)
    state.json             step, KL controller, loss scaler ... what else the loop must remember
    config.json            {"format": 2, "config": ..., "files": {name: {"bytes", "sha256"}}, "sha256": of all that}
    ...                    files that belong to it, e.g. the tokenizer

A sharded run writes model-00001-of-00004.safetensors in place of model.safetensors, one a rank, and the same of the
optimizer: the rows that this rank keeps, and in the header where they begin (torch.distributed.checkpoint's format for HF,
which has no pickle). Whoever reads gets whole tensors, on any number of ranks.

It is written under a temporary name beside its place, flushed to the disk and renamed, so a kill or a full disk at any
moment leaves the last complete one. Whoever reads a file compares it with its sha256 (format 1 knew sizes alone). There is
no pickle: opening a checkpoint from a stranger runs none of their code, follows no path out of it and reads no device.
"""

import contextlib
import copy
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.infra.adamw import AdamW
from rlhf.infra.files import check_regular, parse_json

FORMAT = 2
LARGEST_JSON = 16 * 2**20  # bytes of a config.json or state.json; ours have a few thousand
SHARD = re.compile(r"(model|optimizer)-\d{5}-of-\d{5}\.safetensors")
BROKEN = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)  # of a checkpoint, not of permissions


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; `tensors` and `optimizer` read their file each time, and compare it once with its sha256."""

    path: Path
    config: dict
    state: dict
    files: dict[str, dict]  # name -> {"bytes": size, "sha256": hex}; format 1 has no sha256
    checked: dict[str, tuple] = field(default_factory=dict)  # name -> identity of the file whose bytes were compared

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.read("model.safetensors")

    @property
    def optimizer(self) -> dict[str, Tensor]:
        return self.read("optimizer.safetensors")

    @property
    def digest(self) -> str:
        """sha256 of the weights, hex; where they are sharded, of the shards' own."""
        parts = self.parts("model.safetensors")
        for part in parts:
            self.check(part)
        if len(parts) == 1:
            return self.files[parts[0]].get("sha256") or sha256(self.path / parts[0])
        return hashlib.sha256("".join(self.files[part]["sha256"] for part in parts).encode()).hexdigest()

    def size(self, name: str) -> int:
        return sum(self.files.get(part, {}).get("bytes", 0) for part in self.parts(name))

    def parts(self, name: str) -> list[str]:
        """The files of model.safetensors or optimizer.safetensors: that one, or the shards, in the order of the ranks."""
        shards = [SHARD.fullmatch(file) for file in sorted(self.files)]
        return [shard[0] for shard in shards if shard and f"{shard[1]}.safetensors" == name] or [name]

    def read(self, name: str) -> dict[str, Tensor]:
        parts = self.parts(name)
        if parts == [name]:
            self.check(name)
            return read_tensors(self.path / name)
        return dict(self.one_by_one(name))

    def one_by_one(self, name: str) -> "Tensors":
        """As `read`, but a tensor is read, and put together of shards, each time when somebody asks for it."""
        parts = self.parts(name)
        for part in parts:
            self.check(part)
        return (Tensors if parts == [name] else Shards)([self.path / part for part in parts], self.checked)

    def check(self, name: str) -> None:
        """ValueError unless the file holds the bytes that were written; FileNotFoundError where there is none."""
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, "this checkpoint has no such file", str(self.path / name))
        wanted = self.files[name].get("sha256")
        if wanted is None or name in self.checked:
            return
        file = identity(self.path / name)
        if (found := sha256(self.path / name)) != wanted:
            what = f"its sha256 is {found[:12]}, {wanted[:12]} was written"
            raise ValueError(f"{self.path / name} is damaged ({what}); use another checkpoint")
        self.checked[name] = file


class Tensors(Mapping):
    """The tensors of a file by name, each read when it is asked for, through a mapping of its own: it leaves the memory with
    it. ValueError where the file is damaged, or another by then: a run renames a new one into the place of its best.
    """

    def __init__(self, files: list[Path], checked: Mapping[str, tuple] = MappingProxyType({})):
        self.chunks: dict[str, list[tuple[int, int, Path, str]]] = {}  # name -> [(first row, rows, file, name there)]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.identities = {file: checked.get(file.name) or identity(file) for file in files}
        for file in files:
            with self.open(file) as tensors:
                self.find(tensors, file)

    @contextlib.contextmanager
    def open(self, file: Path) -> Iterator[safe_open]:
        """`opened`, and it is the file that was there at first."""
        with opened(file) as tensors:
            if same := identity(file) == self.identities[file]:  # since it was open already
                yield tensors
        if not same:
            raise ValueError(f"{file} was replaced while it was read; run the same command again")

    def find(self, tensors: safe_open, file: Path) -> None:
        for name in tensors.keys():
            self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
            self.chunks[name] = [(0, 0, file, name)]

    def renamed(self, name_of: Callable[[str], str | None]) -> "Tensors":
        """The same under other names; without those that get none."""
        found = copy.copy(self)
        for part in ("chunks", "shapes"):
            named = {name_of(name): x for name, x in getattr(self, part).items()}
            setattr(found, part, {name: x for name, x in named.items() if name is not None})
        return found

    def __getitem__(self, name: str) -> Tensor:
        chunks, whole = self.chunks[name], None
        for first, count, file, there in chunks:
            with self.open(file) as tensors:
                rows = tensors.get_tensor(there)
            if len(chunks) == 1:
                return rows
            if whole is None:
                whole = torch.empty(self.shapes[name], dtype=rows.dtype)
            whole[first : first + count] = rows
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)


class Shards(Tensors):
    """The same of a file in shards, put together from the rows in them. ValueError where they do not make up whole tensors."""

    def __init__(self, files: list[Path], checked: Mapping[str, tuple] = MappingProxyType({})):
        self.widths: dict[str, tuple] = {}  # name -> what all its shards have in common
        super().__init__(files, checked)
        for name, chunks in self.chunks.items():
            chunks.sort(key=lambda chunk: chunk[:2])
            rows, file = 0, chunks[0][2]
            for first, count, file, _ in chunks:
                if first != rows and count:
                    raise ValueError(f"{file} is damaged ({name} has no row {rows}); use another checkpoint")
                rows += count
            if self.shapes[name]:
                self.shapes[name] = (rows, *self.shapes[name][1:])
            del chunks[len(chunks) if self.shapes[name] else 1 :]  # numbers that are no rows are the same in all

    def find(self, tensors: safe_open, file: Path) -> None:
        begins = parse_json((tensors.metadata() or {})[OFFSETS].encode(), str(file))
        for name in tensors.keys():
            part = tensors.get_slice(name)
            shape, offsets = part.get_shape(), begins[name]["saved_offsets"]
            first, width = offsets[0] if shape else 0, (*shape[1:], part.get_dtype())
            if width != self.widths.setdefault(name, width):
                raise ValueError(f"{name} is {width} here and {self.widths[name]} in another")
            if len(offsets) != len(shape) or any(offsets[1:]) or type(first) is not int:
                raise ValueError(f"{name} begins at {offsets}")
            self.chunks.setdefault(name, []).append((first, shape[0] if shape else 0, file, name))
            self.shapes[name] = tuple(shape)


OFFSETS = "DCP_SHARDING_INFO"  # torch.distributed.checkpoint's name for where the rows of a shard begin


def identity(file: Path) -> tuple[int, int, int]:
    """Of the file of this name: another has another, and so has a changed one."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """A file of tensors, mapped into memory. ValueError in one line for whatever it says that makes no sense."""
    with damage_told(file):
        check_regular(file)
        open(file, "rb").close()  # safetensors says "no such file" where only the permission is missing
        with safe_open(file, "pt") as tensors:
            yield tensors


@contextlib.contextmanager
def damage_told(file: Path) -> Iterator[None]:
    """One line for whatever a file says that is no shard."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise ValueError(f"{file} is damaged ({reason}); use another checkpoint") from None


class Together(Protocol):
    """How the ranks of a sharded run write a checkpoint: see rlhf.infra.shards."""

    is_main: bool

    def write(self, place: Path, tensors: dict[str, Tensor], optimizer: dict[str, Tensor] | None) -> dict[str, dict]:
        """Rank 0's part, in this directory: its rows; -> facts of the files of all ranks, which are then there."""

    def help(self, path: Path, tensors: dict[str, Tensor], optimizer: dict[str, Tensor] | None) -> Path:
        """The part of another rank, where rank 0 says; -> path."""


def save(
    path: str | Path,
    tensors: dict[str, Tensor],
    config: dict,
    state: dict | None = None,
    optimizer: dict[str, Tensor] | None = None,
    files: Iterable[str | Path] = (),
    together: "Together | None" = None,
) -> Path:
    """Write a checkpoint, replacing an older one only when the new one is complete; dtypes are kept.

    With `together` every rank calls it and writes its rows of the sharded tensors; rank 0 does the rest.
    `config` and `state` are plain JSON. Tensors that share memory are refused: a tied weight has one name.
    Raises OSError with the path when there is no space or no permission, ValueError where other files would be lost;
    what was there before is then untouched.
    """
    path, files = Path(path), [*files]
    if together and not together.is_main:
        return together.help(path, tensors, optimizer)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, not a checkpoint: choose another place, or delete it")
    if foreign := strangers(path, files):
        raise ValueError(f"{path} holds {short(foreign)}, not part of a checkpoint: choose another place, or delete it")
    temporary, aside = (path.with_name(f".{path.name}.{what}-{os.getpid()}") for what in ("tmp", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(leftovers(path, "tmp"))
        temporary.mkdir()
        written = together.write(temporary, tensors, optimizer) if together else {}
        if not together:
            write_tensors(temporary / "model.safetensors", tensors)
            if optimizer is not None:
                write_tensors(temporary / "optimizer.safetensors", optimizer)
        if state is not None:
            (temporary / "state.json").write_text(json.dumps(state, indent=1))
        for file in files:
            shutil.copyfile(file, temporary / Path(file).name)
        for file in listed(temporary):
            written[file.name] = written.get(file.name) or facts(file)
        content = {"format": FORMAT, "config": config, "files": written}
        content["sha256"] = own_digest(content)
        (temporary / "config.json").write_text(json.dumps(content, indent=1))
        for file in [*temporary.iterdir(), temporary]:
            if file.suffix == ".safetensors":
                shutil.copymode(temporary / "config.json", file)  # safetensors writes 0600, whatever the umask
            flush_to_disk(file)
        if os.path.lexists(path):  # a directory cannot be renamed over another; until then resolve() finds `aside`
            remove([aside])
            path.rename(aside)
        temporary.rename(path)
        flush_to_disk(path.parent)
        remove(leftovers(path, "old"))
    except OSError as error:
        what = f"cannot write the checkpoint {path}: {error.strerror or error}"
        raise OSError(error.errno, what, error.filename2 or error.filename) from error  # of a copy, the target
    finally:
        remove([temporary])  # still there only after an error
    return path


def facts(file: Path) -> dict:
    """What a checkpoint knows of a file."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def listed(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def own_digest(content: dict) -> str:
    """sha256 over what config.json says, whatever its layout."""
    rest = json.loads(json.dumps({name: value for name, value in content.items() if name != "sha256"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load(path: str | Path) -> Checkpoint:
    """Open a checkpoint, or the latest one of a run directory; its tensors are compared with their sha256 when read.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of a newer format.
    """
    saved = outline(resolve(path))
    for name in saved.files:
        if not name.endswith(".safetensors"):
            saved.check(name)
    if "state.json" in saved.files:
        state = read_json(saved.path / "state.json")
        if not isinstance(state, dict):
            raise ValueError(f"{saved.path / 'state.json'} holds no JSON object: damaged; use another checkpoint")
        saved.state.update(state)
    return saved


def verify(path: str | Path) -> Checkpoint:
    """load(), with every byte compared, and the number of a step_000123 with the "done" of its state.

    Raises FileNotFoundError or ValueError, naming the file.
    """
    saved = load(path)
    for name in saved.files:
        saved.check(name)
    number, done = step_number(saved.path), saved.state.get("done")
    if number is not None and (type(done) is not int or done != number):
        raise ValueError(f"{saved.path / 'state.json'} says done = {done}: damaged, or of another step")
    return saved


def outline(path: Path) -> Checkpoint:
    """The checkpoint in this directory, with config.json read and the sizes of its files compared; no state yet."""
    content = read_content(path)
    for name, written in content["files"].items():
        file = path / name
        if file.exists():
            check_regular(file)
        if (found := file.stat().st_size if file.exists() else 0) != written["bytes"]:
            raise ValueError(
                f"{file} has {found} bytes, {written['bytes']} were written: damaged; use another checkpoint"
            )
    return Checkpoint(path, content["config"], {}, content["files"])


def read_content(path: Path) -> dict:
    """What config.json says, with {"bytes", "sha256"} of every file; ValueError where it is not ours, or damaged."""
    file = path / "config.json"
    content = read_json(file)
    if not (isinstance(content, dict) and {"format", "config", "files"} <= content.keys()):
        raise ValueError(f"{file} is not the config of a checkpoint of ours")
    version, files = content["format"], content["files"]
    if type(version) is int and version > FORMAT:
        newer = f"{path} has checkpoint format {version}, this version reads {FORMAT}"
        raise ValueError(f"{newer}; use a newer version of this code")
    if version == 1 and isinstance(files, dict):
        files = {name: {"bytes": size} for name, size in files.items()}
    sound = type(version) is int and version >= 1 and isinstance(content["config"], dict) and isinstance(files, dict)
    if not sound or not files or not all(plain(*item, version) for item in files.items()):
        raise ValueError(f"{file} is damaged (format, config or files make no sense); use another checkpoint")
    if version > 1 and content.get("sha256") != own_digest(content):
        raise ValueError(f"{file} is damaged (it was changed after it was written); use another checkpoint")
    return content | {"files": files}


def plain(name: str, written, version: int) -> bool:
    """Is this the entry of a file inside of the directory, with a size and from format 2 on a sha256?"""
    inside = Path(name).name == name and name.isprintable() and not name.startswith(".")
    if not inside or not isinstance(written, dict):
        return False
    size, known = written.get("bytes"), version == 1 or re.fullmatch("[0-9a-f]{64}", str(written.get("sha256")))
    return type(size) is int and size >= 0 and bool(known)


def read_config(path: Path) -> dict | None:
    """The content of config.json where it is one of ours and whole, else None."""
    try:
        return read_content(path)
    except (OSError, ValueError):
        return None


def is_ours(path: Path) -> bool:
    """Is this, whole or damaged, a directory that save() wrote? HF-format directories have a config.json too."""
    try:
        content = read_json(path / "config.json")
    except (OSError, ValueError):  # cut short, perhaps: then the files beside it tell
        return any((path / name).exists() for name in ("state.json", "optimizer.safetensors"))
    return isinstance(content, dict) and {"format", "config", "files"} <= content.keys()


def read_json(file: Path):
    """The JSON value in a file; ValueError in one line that names it where it is no JSON, no file, or absurdly large."""
    check_regular(file)
    if (size := file.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{file} has {size} bytes; at most {LARGEST_JSON} are read")
    try:
        return parse_json(file.read_bytes(), str(file))
    except ValueError as error:
        reason = " ".join(str(error).removeprefix(str(file)).split())[:100]
        raise ValueError(f"{file} is damaged (it {reason}); use another checkpoint") from None


def sha256(file: Path) -> str:
    """Of a file's bytes, hex."""
    check_regular(file)
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(path: str | Path) -> str:
    """sha256 of a checkpoint's weights."""
    return load(path).digest


def is_complete(path: Path) -> bool:
    """Is config.json whole, and has every file the size that it names? Contents are not read."""
    try:
        return bool(outline(path))
    except (OSError, ValueError):
        return False


def resolve(path: str | Path) -> Path:
    """The checkpoint directory that `path` means: itself, or the latest one of a run directory.

    A newer one that is damaged is passed over, and that is said on stderr.
    """
    path = Path(path)
    if found := latest(path):
        for newer in damaged_after(path, found):
            tell(f"{newer} is damaged ({defect(newer)}): {found.name} is used instead")
        return found
    asides = path.parent.glob(f".{path.name}.old-*")
    for candidate in [path] if path.exists() else asides:  # missing when save() was killed between its two renames
        if (candidate / "config.json").exists():
            return candidate
    if damaged := [f"{step.name} is damaged ({defect(step)})" for step in candidates(path)[:1]]:
        raise ValueError(f"no whole checkpoint in {path}: {damaged[0]}")
    raise FileNotFoundError(f"no checkpoint in {path}: a config.json or step_* directories were expected there")


@functools.cache  # a checkpoint is opened several times, for its config, its digest and its tensors
def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def step_number(path: Path) -> int | None:
    """123 for step_000123, or for what a killed save() left of it; None for another name."""
    match = re.fullmatch(r"step_(\d{1,18})|\.step_(\d{1,18})\.old-\d+", path.name)
    return int(match[1] or match[2]) if match else None


def is_aside(path: Path) -> bool:
    return path.name.startswith(".")


def candidates(run_dir: str | Path) -> list[Path]:
    """Whatever is named as a step of a run, newest first; an old version that a killed save() left behind comes last."""
    found = [path for path in Path(run_dir).glob("*step_*") if step_number(path) is not None]
    return sorted(found, key=lambda path: (-step_number(path), is_aside(path), path.name))


def damaged_after(run_dir: Path, found: Path) -> list[Path]:
    newer = [path for path in candidates(run_dir) if not is_aside(path) and step_number(path) > step_number(found)]
    return [path for path in newer if defect(path)]


def defect(path: Path, every_byte: bool = False) -> str | None:
    """What is wrong with the checkpoint in this directory, or None; OSError where it may not be read."""
    try:
        verify(path) if every_byte else outline(path)
    except ValueError as error:
        return str(error).removeprefix(f"{path}/").removesuffix("; use another checkpoint")
    except OSError as error:
        if error.errno not in (*BROKEN, None):
            raise
        return f"{Path(error.filename).name}: {error.strerror}" if error.filename else str(error)
    return None


def newest_intact(run_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that verify() passes, if any, and a line on every newer one.

    Those are renamed to .damaged-step_000123, so that the run can go on and somebody can look at them.
    """
    lines = []
    for path in candidates(run_dir):
        if (reason := defect(path, every_byte=True)) is None:
            return path, lines
        place = path.with_name(f".damaged-{path.name.lstrip('.')}")
        remove([place])
        path.rename(place)
        lines.append(f"{path} is damaged ({reason}): set aside as {place.name}")
    return None, lines


def save_step(run_dir: str | Path, step: int, *args, keep: int | None = 2, **kwargs) -> Path:
    """save() to run_dir/step_000123, then remove all but the newest `keep`; None keeps all."""
    path, together = save(Path(run_dir) / f"step_{step:06d}", *args, **kwargs), kwargs.get("together")
    if together is None or together.is_main:
        prune(run_dir, keep)
    return path


def prune(run_dir: str | Path, keep: int | None, also: Iterable[Path] = ()) -> None:
    """Remove all but the newest `keep` checkpoints of a run, None keeps all, and those in `also`."""
    remove(also)
    kept = steps(run_dir)[-(keep or 0) :]  # [-0:] is all of them
    remove(old for old in candidates(run_dir) if not is_aside(old) and old not in kept)


def steps(run_dir: str | Path) -> list[Path]:
    """The complete step_000123 checkpoints of a run, oldest first."""
    found = {}
    for path in candidates(run_dir):
        if step_number(path) not in found and is_complete(path):  # an aside counts only where the step is missing
            found[step_number(path)] = path
    return [found[number] for number in sorted(found)]


def latest(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run; None for a run that has none yet."""
    return next((path for path in candidates(run_dir) if is_complete(path)), None)


def leftovers(path: Path, what: str) -> list[Path]:
    """What a killed save() left: "tmp" or "old" directories of this checkpoint or, if it is a step, of any step."""
    name = "step_*" if path.name.startswith("step_") else path.name
    return [*path.parent.glob(f".{name}.{what}-*")]


def strangers(path: Path, files: list[str | Path]) -> list[str]:
    """Names in `path` that no save() with these `files` wrote: replacing the directory would lose them."""
    content = read_config(path)
    ours = {"config.json", "model.safetensors", "optimizer.safetensors", "state.json"}
    ours |= {name for name in os.listdir(path) if SHARD.fullmatch(name)} if path.is_dir() else set()
    ours |= {*(content["files"] if content else ()), *(Path(file).name for file in files)}
    return sorted(set(os.listdir(path)) - ours) if path.is_dir() else []


def remove(directories: Iterable[Path]) -> None:
    for directory in directories:
        if directory.is_dir() and not directory.is_symlink():
            shutil.rmtree(directory, ignore_errors=True)
        else:  # a file or a link of that name
            with contextlib.suppress(OSError):
                directory.unlink()


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file, metadata)
    except SafetensorError as error:  # hides the OSError: "... (os error 28)"
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from None
        raise


def read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        check_regular(file)
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


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy `tensors`, which came from `where`, into the module; ValueError unless names and shapes are its own.

    Frozen parameters stay as they are, see `trained_state`.
    """
    own, shapes = trained_state(module), getattr(tensors, "shapes", None)
    shapes = shapes or {name: tuple(x.shape) for name, x in tensors.items()}
    missing, extra = [n for n in own if n not in tensors], [n for n in tensors if n not in own]
    wrong = [
        f"{name} is {shapes[name]} there and {tuple(own[name].shape)} here"
        for name in own
        if name in tensors and shapes[name] != tuple(own[name].shape)
    ]
    differences = [("it lacks ", missing), ("it adds ", extra), ("", wrong)]
    if any(names for _, names in differences):
        details = "; ".join(what + short(names) for what, names in differences if names)
        raise ValueError(f"{where} is a checkpoint of another architecture: {details}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(cut_as(tensor, tensors[name]))


def cut_as(x: Tensor, rows: Tensor) -> Tensor:
    """This rank's share of a whole tensor where x is sharded; else, and if it is sharded already, the tensor itself."""
    if not is_sharded(x) or is_sharded(rows):
        return rows
    from torch.distributed.tensor import distribute_tensor  # takes half a second

    rows = rows.to(x.device, x.dtype)
    return distribute_tensor(rows, x.device_mesh, x.placements, src_data_rank=None)  # no rank sends anything


def is_sharded(x: Tensor) -> bool:
    """Does every rank keep some rows of it (a DTensor)?"""
    return hasattr(x, "full_tensor")


def gathered(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All rows of every tensor, one after the other; every rank has to call it, those that do not `keep` get nothing."""
    found = {}
    for name, tensor in tensors.items():
        rows = whole(tensor)
        if keep:
            found[name] = rows
    return found


def whole(x: Tensor) -> Tensor:
    """All rows of a tensor; where it is sharded every rank has to ask."""
    return x.full_tensor() if is_sharded(x) else x


def short(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def optimizer_tensors(optimizer: AdamW, module: nn.Module) -> dict[str, Tensor]:
    """AdamW's exp_avg, exp_avg_sq and step as {"parameter name:key": tensor}, of parameters that have taken a step: the order
    of parameters is free.
    """
    named = ((name, optimizer.state.get(parameter)) for name, parameter in module.named_parameters())
    return {
        f"{name}:{key}": tensor for name, state in named if state and state["step"] for key, tensor in state.items()
    }


def load_optimizer(optimizer: AdamW, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of optimizer_tensors: training goes on bit for bit. ValueError where the tensors fit no parameter."""
    named = dict(module.named_parameters())
    for label, tensor in tensors.items():
        name, _, key = label.rpartition(":")
        known = name in named and named[name] in optimizer.state
        if not known or key != "step" and tensor.shape != named[name].shape:
            here = tuple(named[name].shape) if known else "frozen" if name in named else "no such parameter"
            raise ValueError(f"optimizer state of another model: {label} is {tuple(tensor.shape)} there, {here} here")
        tensor = tensor.to(named[name].device, copy=True)
        optimizer.state[named[name]][key] = tensor if key == "step" else cut_as(named[name], tensor)
