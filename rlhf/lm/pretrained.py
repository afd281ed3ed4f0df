"""Where --init= leads: a run of ours, an HF-format directory, a GGUF file, a PEFT adapter on one of these, or a model of the
package index, with its tokenizer.

The one room in which a tokenizer of data/ meets a model of model/.
"""

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.chat import check_template
from data.fetch import MODELS, fetch_model, sha256
from data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_parts
from model.config import show
from model.gguf import gguf_config, load_gguf, read_gguf, tokenizer_parts
from model.gguf import stop_ids as gguf_stop_ids
from model.hf import find_tensors, load_hf, read_config
from model.lora import merge
from model.peft import load_peft, read_peft_config
from model.quantize import load_quantized
from model.transformer import ModelConfig, Transformer
from rlhf.infra import checkpoint
from rlhf.lm.checkpoints import (
    check_numbers,
    language_model_of,
    new_transformer,
    open_stored,
    stored_config,
    weights_of,
)
from rlhf.lm.trunks import PREFIX, STORED, stored_of, tuned_model


@dataclass(frozen=True)
class Pretrained:
    """A language model that can be trained, sampled and measured."""

    model: Transformer
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]  # each of them ends a text
    digest: str  # sha256 of the weights; of a tuned model, of what was trained
    spec: str  # what it was opened as
    family: str | None = None  # the model_type of an HF-format directory, whose names an adapter's file uses

    def ends_of(self, template: str | None) -> tuple[int, ...]:
        """What ends an answer in data of this chat template (its sha256; None: plain text): stop_ids, and the template's.

        ValueError where the model has another template.
        """
        return tuple(sorted({*self.stop_ids, *check_template(self.tokenizer, template, self.spec)}))


def policy_config(base: Pretrained, cfg, stop_ids: tuple[int, ...]) -> dict:
    """The config of a policy's checkpoint: all that is needed to build the model that its tensors fill."""
    facts = {"kind": "policy", "layout": cfg.layout, "model": base.model.config.stored()}
    return facts | {"tokenizer": base.tokenizer.fingerprint, "stop_ids": stop_ids} | stored_of(cfg, base.digest)


def open_pretrained(
    spec: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    base: str | None = None,
    near: Sequence[str] = (),
) -> Pretrained:
    """The model that `spec` means: the name of one of data.fetch.MODELS, a GGUF file, an HF-format directory, a PEFT
    adapter, which comes merged into its base, a run or checkpoint directory of train_lm.py or train_ppo.py, or an int8
    directory of export.py.

    dtype: of the weights; None keeps what an HF directory stores. On the CPU, weights that need no conversion stay
    memory-mapped: never write into them in place. base: where the model lies that a run of layout adapters or branch, or a
    PEFT adapter, was trained on; None looks for it, first among `near`, see `find_base`. FileNotFoundError, or ValueError in
    one line for what is none of these.
    """
    spec, family = str(spec), None
    path = locate(spec)
    if base is not None and (path.is_file() or is_hf(path) and not is_peft(path)):
        raise ValueError(f"{spec} is a whole model: --base={base} has no effect")
    if path.is_file():
        model, metadata = load_gguf(path, dtype or torch.float32)
        tokenizer, stop_ids, digest = (
            tokenizer_from_parts(tokenizer_parts(metadata)),
            gguf_stop_ids(metadata),
            sha256(path),
        )
    elif is_peft(path):
        model, tokenizer, stop_ids, digest = open_adapter(path, device, dtype, base)
    elif is_hf(path):
        model, info = load_hf(path, dtype, device)
        if info.kind != "causal":
            raise ValueError(f"{spec} is a sequence classifier; a language model is needed")
        tokenizer, stop_ids, digest = load_tokenizer(path), info.eos_ids, hf_digest(path)
        family = info.family
    else:
        model, tokenizer, stop_ids, digest = open_checkpoint(path, device, base, near)
    if path.is_file() or is_peft(path) or is_hf(path):  # a checkpoint of ours is looked at as it is read
        check_numbers(model.named_parameters(), spec)
    ends = tuple(sorted({tokenizer.eos, *stop_ids}))
    if (model.config.vocab_size or 0) < tokenizer.vocab_size:
        raise ValueError(
            f"{spec}: the tokenizer has {tokenizer.vocab_size} tokens, the model rows for {model.config.vocab_size}"
        )
    return Pretrained(model.to(device), tokenizer, ends, digest, spec, family)


def open_adapter(
    path: Path, device: torch.device | str, dtype: torch.dtype | None, base: str | None = None
) -> tuple[Transformer, Tokenizer, tuple[int, ...], str]:
    """Model, tokenizer, stop ids and digest of a PEFT directory: its base with the adapter merged in."""
    on = open_pretrained(base or adapter_base(path), device, dtype)
    model = merge(load_peft(path, on.model, "peft", on.family), "peft").requires_grad_(True)
    own = [name for name in ("tokenizer.json", "tokenizer.model") if (path / name).exists()]
    tokenizer = load_tokenizer(path) if own else on.tokenizer
    return model, tokenizer, on.stop_ids, adapter_digest(path, on.digest)


def adapter_base(path: Path) -> str:
    """What the adapter's config names as its base: a path from the adapter or from here, or a model's name."""
    named, *_ = read_peft_config(path)
    found = next((str(place) for place in (path / named, Path(named)) if named and place.exists()), named)
    if not named or not Path(found).exists() and named not in MODELS:
        raise FileNotFoundError(
            f"the adapter {path} belongs to the base model {show(named, 200)}, which is no path from there or from here: "
            "put its place into base_model_name_or_path of adapter_config.json"
        )
    if is_peft(Path(found)):
        raise ValueError(f"the base model {found} of the adapter {path} is an adapter itself; merge that one first")
    return found


def adapter_digest(path: Path, base: str) -> str:
    """sha256 over what the base is, the adapter's weights and their scale."""
    files = (path / "adapter_model.safetensors", path / "adapter_config.json")
    return hashlib.sha256("".join([base, *map(sha256, files)]).encode()).hexdigest()


def open_checkpoint(
    path: Path, device: torch.device | str, base: str | None = None, near: Sequence[str] = ()
) -> tuple[Transformer, Tokenizer, tuple[int, ...], str]:
    """Model, tokenizer, stop ids and digest of a checkpoint of ours, on its base where it holds only what was trained."""
    saved = open_stored(path)
    tokenizer = load_tokenizer(saved.path)
    if saved.config.get("tokenizer") != tokenizer.fingerprint:
        raise ValueError(f"{saved.path} was trained with another tokenizer than the one that lies in it")
    on_a_base = saved.config.get("layout") in STORED
    if base is not None and not on_a_base:
        raise ValueError(f"{path} is a whole model: --base={base} has no effect")
    if on_a_base:
        on = open_base(saved.config, saved.path, device, base, near)
        model = tuned_model(on.model, saved.config, weights_of(saved))
    elif saved.config.get("kind") == "int8":
        weights_of(saved)  # looks at every number
        model = load_quantized(stored_config(saved.config["model"], path), saved.tensors, path, device)
    else:
        model = language_model_of(saved, path)
    # a pretrained base may end its texts with several ids, of which the tokenizer knows one
    return model, tokenizer, tuple(saved.config.get("stop_ids", ())), saved.digest


def open_base(
    config: dict,
    where: str | Path,
    device: torch.device | str = "cpu",
    base: str | None = None,
    near: Sequence[str] = (),
) -> Pretrained:
    """The base model of the checkpoint `where`: at `base`, or where its config names it, or else where `find_base` finds it.

    Raises FileNotFoundError where there is none, ValueError where it is another one: it is known by its sha256.
    """
    named, digest, there = config["base"], config["base_digest"], ""
    if base is not None or named in MODELS or Path(named).exists():
        check_chain(base or named, Path(where))
        opened = open_pretrained(base or named, device, near=near)
        if opened.digest == digest:
            return opened
        there = opened.digest
    if base is None and (place := find_base(config, where, near)):
        check_chain(place, Path(where))
        return open_pretrained(place, device, near=near)
    belongs = f"{where} belongs to the base model {named} with sha256 {digest[:12]}"
    if base is not None:
        raise ValueError(f"{belongs}; --base={base} is {there[:12]}")
    if there:
        raise ValueError(f"{belongs}, which is now {there[:12]}: put the old one back, or say with --base= where it is")
    raise FileNotFoundError(f"{belongs}, which is neither there nor near the checkpoint: say with --base= where it is")


def find_base(config: dict, where: str | Path, near: Sequence[str] = ()) -> str | None:
    """Where the base of a checkpoint lies that was moved or copied: in one of `near`, at the path that it had, or the end of
    that path, from any directory above the checkpoint, or in a run beside it. It is known by its sha256; None where it is
    nowhere.
    """
    here, parts = Path(where).resolve(), Path(config["base"]).parts
    ends = [Path(*parts[i:]) for i in range(Path(config["base"]).is_absolute(), len(parts))]
    above = [place / end for place in here.parents for end in ends]
    beside = [place for room in here.parents[:2] for place in sorted(room.glob("*/")) if checkpoint.latest(place)]
    for place in dict.fromkeys([*near, *above, *beside]):
        known = place in near or place.exists() and place not in (here, *here.parents)  # near may be a model's name
        if known:
            try:
                if digest_of(place) == config["base_digest"]:
                    return str(place)
            except (OSError, ValueError):  # what lies there is no model, or a damaged one
                continue
    return None


def check_chain(spec: str, where: Path) -> None:
    """ValueError where a base stands, over whatever bases of its own, on the checkpoint `where`: opening it would not end."""
    seen = [where.resolve(), checkpoint.resolve(where).resolve()] if where.exists() else []
    while (path := locate(spec)).is_dir() and not is_hf(path) and not is_peft(path):
        saved = open_stored(path)
        if saved.path.resolve() in seen:
            raise ValueError(f"{saved.path} is its own base: its config.json is damaged, or made to mislead")
        if saved.config.get("layout") not in STORED:
            return
        seen.append(saved.path.resolve())
        named = saved.config["base"]
        if not (Path(named).exists() or (named := find_base(saved.config, saved.path))):
            return
        spec = named


def critic_trunk(
    saved: checkpoint.Checkpoint, where: str | Path, device: torch.device | str = "cpu", base: str | None = None
) -> Transformer:
    """The transformer that the value head of the policy checkpoint `where` reads: the policy's, or the critic's own.

    base: where its base lies, see open_pretrained.
    """
    stored = weights_of(saved)
    prefix = "value_trunk." if any(name.startswith("value_trunk.") for name in stored) else PREFIX
    output = prefix + "lm_head.weight"  # a critic predicts no tokens
    tensors = stored.renamed(
        lambda name: name.removeprefix(prefix) if name.startswith(prefix) and name != output else None
    )
    if saved.config.get("layout") in STORED:
        tensors = {PREFIX + name.replace(".critic", ".policy"): x for name, x in tensors.items()}
        return tuned_model(open_base(saved.config, where, device, base).model, saved.config, tensors)
    model = new_transformer(saved.config["model"], where)
    model.lm_head = None
    checkpoint.load_weights(model, tensors, where)
    return model.to(device)


def locate(spec: str) -> Path:
    """The file or directory that `spec` means; a named model is downloaded once. FileNotFoundError if there is none."""
    if Path(spec).exists() or checkpoint.latest(spec):
        return Path(spec)
    if spec in MODELS:
        return fetch_model(spec)
    try:
        return checkpoint.resolve(spec)
    except FileNotFoundError:
        close = difflib.get_close_matches(spec, MODELS, 1)
        hint = f"did you mean {close[0]}?" if close else f"models by name: {', '.join(MODELS)}"
        raise FileNotFoundError(
            f"no checkpoint in {spec}: a run directory, an HF-format directory or a GGUF file was expected; {hint}"
        ) from None


def is_hf(path: Path) -> bool:
    """An HF-format directory: it has a config.json that is not one of our checkpoints'."""
    return (path / "config.json").is_file() and not checkpoint.is_ours(path) and not checkpoint.latest(path)


def is_peft(path: Path) -> bool:
    """A PEFT directory. It may hold its base's config.json beside the adapter's."""
    return (path / "adapter_config.json").is_file() and not checkpoint.is_ours(path) and not checkpoint.latest(path)


def hf_digest(path: Path) -> str:
    """sha256 over the sha256 of every file with weights, in order of their names."""
    files = sorted({stored.file for stored in find_tensors(path).values()})
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()


def digest_of(spec: str | Path) -> str:
    """`Pretrained.digest` of a model without opening it."""
    path = locate(str(spec))
    if path.is_file():
        return sha256(path)
    if is_peft(path):
        return adapter_digest(path, digest_of(adapter_base(path)))
    return hf_digest(path) if is_hf(path) else checkpoint.digest(path)


def config_of(spec: str | Path) -> ModelConfig:
    """The shape of the model that `spec` names (see open_pretrained), read from its config or header alone."""
    path = locate(str(spec))
    if path.is_file():
        return gguf_config(read_gguf(path))
    if is_peft(path):
        return config_of(adapter_base(path))
    if is_hf(path):
        return read_config(path).model
    saved = open_stored(path)
    if "model" not in saved.config:
        raise ValueError(f"{path} holds a {saved.config.get('kind')} checkpoint, a language model is needed")
    return stored_config(saved.config["model"], path)
