"""What a dump may hold, and how it is read: safetensors or JSON, checked before anything is computed."""

from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlhf.infra.files import parse_json

Dump = dict[str, Tensor]


# What a dump may hold: shape and meaning. B responses, T columns (of the response, or of prompt and response), N pairs.
KEYS = {
    "mask": ("BT", "true or 1 on the real tokens of the response, EOS included"),
    "logprobs": ("BT", "log-prob of each token under the policy that sampled it"),
    "ref_logprobs": ("BT", "the same under the reference"),
    "new_logprobs": ("BT", "the same under the policy being trained"),
    "values": ("BT", "value of the state before each token, at sampling time"),
    "new_values": ("BT", "the same from the critic being trained"),
    "scores": ("B", "one score per response"),
    "group": ("B", "which prompt each response answers, an integer"),
    "bootstrap": ("B", "value after a response that the length limit cut, 0 for finished ones; absent: 0 for all"),
    "kl": ("BT", "KL per token, before its coefficient"),
    "mean_kl": ("", "KL of the batch as it is logged; ours is nats per response"),
    "rewards": ("BT", "reward per token: KL penalty and score"),
    "advantages": ("BT", "before whitening"),
    "whitened_advantages": ("BT", "after whitening"),
    "returns": ("BT", "targets of the critic"),
    "rloo_advantages": ("B", "score against the other responses to the same prompt"),
    "grpo_advantages": ("B", "score standardised among the responses to the same prompt"),
    "policy_loss": ("", "the number that is logged or differentiated"),
    "value_loss": ("", "the same for the critic, before its coefficient"),
    "approx_kl": ("", "how far the new policy is from the old one; ours is the mean of (log ratio)^2 / 2"),
    "clip_fraction": ("", "share of tokens whose loss is clipped"),
    "chosen_scores": ("N", "reward model on the preferred response of each pair"),
    "rejected_scores": ("N", "and on the other"),
    "margin": ("N", "margin of each pair; absent: 0"),
    "preference_loss": ("", "loss of the reward model over these pairs"),
    "kl_coef": ("", "weight of the KL in the reward"),
    "gamma": ("", "discount"),
    "lam": ("", "lambda of GAE"),
    "clip": ("", "the ratio may move this far from 1"),
    "clip_high": ("", "upper bound, where it differs from the lower; absent: clip"),
    "dual_clip": ("", "bound of the loss for negative advantages; absent: none"),
    "value_clip": ("", "values may move this far; absent: unclipped"),
    "label_smoothing": ("", "of the preference loss; absent: 0"),
    "world": ("", "number of ranks; absent: every divisor of the rows is tried"),
    "micro_batch": ("", "rows per micro-batch; absent: every divisor of the rows is tried"),
}


def load_dump(path: str | Path) -> Dump:
    """The tensors of a .safetensors or .json file, in float64, mask as bool, group as int64.

    Raises OSError if the file cannot be read, ValueError naming the key that is unknown, misshapen or not finite.
    """
    path = Path(path)
    if path.suffix not in (".json", ".safetensors"):
        raise ValueError(f"{path} must be a .safetensors or .json file")
    raw = read_json(path) if path.suffix == ".json" else read_safetensors(path)
    for key in raw:
        if key not in KEYS:
            close = get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(KEYS)}"
            raise ValueError(f"{path}: unknown key {key!r}; {hint}")
    dump = {key: x.squeeze() if KEYS[key][0] == "" else x for key, x in raw.items()}
    check_shapes(path, dump)
    dump = {key: convert(path, key, x) for key, x in dump.items()}
    check_finite(path, dump)
    return dump


def read_json(path: Path) -> Dump:
    content = parse_json(path.read_bytes(), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object of lists and numbers, not a {type(content).__name__}")
    tensors = {}
    for key, value in content.items():
        try:
            tensors[key] = torch.tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{path}: {key!r} is not a number or a rectangular list of numbers") from None
    return tensors


def read_safetensors(path: Path) -> Dump:
    path.open("rb").close()  # the library's own message for a missing file does not name it
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def check_shapes(path: Path, dump: Dump) -> None:
    """All B, T and N agree; the first key that uses a letter fixes it."""
    size, fixed_by = {}, {}
    for key in KEYS:  # mask first
        if key not in dump:
            continue
        axes, shape = KEYS[key][0], tuple(dump[key].shape)
        if len(shape) != len(axes):
            wanted = f"({', '.join(axes)})" if axes else "a single number"
            raise ValueError(f"{path}: {key} has shape {shape}, expected {wanted}")
        for axis, n in zip(axes, shape):
            if size.setdefault(axis, n) != n:
                raise ValueError(
                    f"{path}: {key} has shape {shape}, but {axis} is {size[axis]} in {fixed_by[axis]}: cut or pad it"
                )
            fixed_by.setdefault(axis, key)
            if n == 0:
                raise ValueError(f"{path}: {key} is empty")
    for key in dump:
        if "T" in KEYS[key][0] and "mask" not in dump:
            raise ValueError(f"{path}: {key} needs a mask (B, T) that says which of its columns are real tokens")
    for key in ("world", "micro_batch"):
        if key in dump and (dump[key] < 1 or size.get("B", 0) % int(dump[key])):
            raise ValueError(f"{path}: {size.get('B', 0)} rows do not divide into {key} = {float(dump[key]):g}")


def convert(path: Path, key: str, x: Tensor) -> Tensor:
    if key == "mask":
        if not ((x == 0) | (x == 1)).all():
            raise ValueError(f"{path}: mask must be boolean or 0 and 1, it holds {odd_ones(x)}")
        return x.bool()
    return x.long() if key == "group" else x.double()


def odd_ones(mask: Tensor) -> str:
    return ", ".join(f"{value:g}" for value in mask[(mask != 0) & (mask != 1)].flatten()[:3].tolist())


def check_finite(path: Path, dump: Dump) -> None:
    """Inside the mask every number is finite; outside it anything may stand."""
    for key, x in dump.items():
        where = dump["mask"] if "T" in KEYS[key][0] else torch.ones_like(x, dtype=torch.bool)
        bad = (where & ~x.isfinite()).nonzero()
        if len(bad):
            at = f" at {tuple(bad[0].tolist())}, inside the mask" if x.dim() == 2 else f" at {bad[0].tolist()}"
            raise ValueError(f"{path}: {key} holds {float(x[tuple(bad[0])])}{at if x.dim() else ''}")
    if "mask" in dump and not dump["mask"].any(1).all():
        row = int((~dump["mask"].any(1)).nonzero()[0])
        raise ValueError(f"{path}: row {row} of the mask has no token; leave empty responses out")
