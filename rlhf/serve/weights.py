"""New weights for a server that runs: a checkpoint in --weights_dir takes the place of what is served, in all workers.

Texts that are under way end with the weights that they began with; those that wait begin with the new ones. Nothing is
exchanged before everything was checked: the directory, the sha256 of every file, the tokenizer, the architecture, each name,
shape and number.
"""

import contextlib
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.transformer import Transformer
from rlhf.infra import checkpoint
from rlhf.lm.checkpoints import on_no_base, open_stored, stored_config, weights_of
from rlhf.serve.scheduler import Scheduler


def own(model: Transformer) -> None:
    """From here on the weights lie in this process' memory, not in a file that is mapped: they may be written to."""
    if not isinstance(model.embed_tokens, nn.Embedding):
        raise ValueError(
            "--weights_dir exchanges weights in fp32, bf16 or fp16; serve another directory than an int8 one"
        )
    for x in model.parameters():
        x.data = x.data.clone()


@dataclass(frozen=True)
class Weights:
    """What a worker samples by, and how it gets others. The model is the scheduler's, see `own`."""

    scheduler: Scheduler
    fingerprint: str  # of the tokenizer
    precision: str
    directory: Path  # where others may come from

    def place(self, path: str) -> Path:
        """The directory that `path` means, from --weights_dir where it is not absolute; ValueError where it leads out of it."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # a circle of links; a zero byte
            found, room = (self.directory / path).resolve(), self.directory.resolve()
            if found.is_relative_to(room) and found != room:
                return found
        raise ValueError("the path is not inside of the directory that the server takes weights from")

    def read(self, path: str, sha256: str | None) -> tuple[dict[str, Tensor], str]:
        """Tensors of the checkpoint by name, and the sha256 of them. ValueError where they are not the served model's, or not
        of this sha256.
        """
        try:
            saved = open_stored(self.place(path))
        except OSError:
            raise ValueError(f"no checkpoint at {path}") from None
        where, shape = saved.path, asdict(self.scheduler.model.config)
        if saved.config.get("kind") not in ("lm", "policy") or not on_no_base(saved.config):
            raise ValueError(f"{where} is no checkpoint of a whole language model")
        theirs = asdict(stored_config(saved.config.get("model", {}), where))
        if different := [f"{name} is {theirs[name]}, not {x}" for name, x in shape.items() if theirs[name] != x]:
            raise ValueError(f"{where} is of another architecture: {', '.join(different)}")
        if saved.config.get("tokenizer") != self.fingerprint:
            raise ValueError(f"{where} reads other tokens than the model that is served")
        if sha256 is not None and saved.digest != sha256:
            raise ValueError(f"{where} has weights of sha256 {saved.digest[:12]}, {sha256[:12]} were asked for")
        prefix = "model." if saved.config["kind"] == "policy" else ""
        tensors = {name.removeprefix(prefix): x for name, x in weights_of(saved).items() if name.startswith(prefix)}
        self.compare(tensors, where)
        return tensors, saved.digest

    def compare(self, tensors: dict[str, Tensor], where: Path) -> None:
        mine = {name: tuple(x.shape) for name, x in self.scheduler.model.state_dict().items()}
        other = {name: tuple(x.shape) for name, x in tensors.items()}
        if wrong := sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name)):
            shapes = f"{other.get(wrong[0], 'missing')} there and {mine.get(wrong[0], 'unknown')} here"
            raise ValueError(f"{where} is of another architecture: {checkpoint.short(wrong)}, {shapes}")

    def load(self, path: str, sha256: str | None) -> str:
        """Read and take; -> the sha256 of what is served now."""
        tensors, digest = self.read(path, sha256)
        with torch.no_grad():
            for name, x in self.scheduler.model.state_dict().items():
                x.copy_(tensors[name])
        return digest

    def exchange(self, path: str, sha256: str | None) -> Future:
        """`load`, when no text is under way."""
        return self.scheduler.change(self.load, path, sha256)

    def about(self) -> dict:
        """What tells a client whether this is its model, and how it is sampled."""
        s = self.scheduler
        facts = {"sha256": s.weights, "model": s.model.config.stored(), "tokenizer": self.fingerprint}
        return facts | {"precision": self.precision, "max_batch": s.rows, "max_choices": s.rows + s.queue}
