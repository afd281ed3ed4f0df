"""python -m rlhf.replay out/ppo/bad/000004-02.safetensors     compute a skipped step again, formula by formula.

The rows are those of the file, the weights those that the step had, the models and the reward those that the run's options
name: start it where the run was started. It names the first formula with a number that is not finite, or above its limit,
with row, token and text. Exit code 1 where the failure is there again, 0 where every number is well, 2 for a file that
cannot be read.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from rlhf.infra import checkpoint, config, distributed, optim
from rlhf.infra.brakes import PARAMETERS, Finding, Formula, first_bad, in_words
from rlhf.infra.files import read_json
from rlhf.infra.metrics import say
from rlhf.infra.optim import Precision
from rlhf.replay import dpo, lm, ppo, rm

FORMULAS = {
    "train_ppo.py": ppo.formulas,
    "train_lm.py": lm.formulas,
    "train_rm.py": rm.formulas,
    "train_dpo.py": dpo.formulas,
}


def replay(file: Path) -> tuple[dict, Finding | None]:
    """What the file says, and what is found now; a line is printed for every formula. ValueError for a damaged file."""
    record, tensors = read_json(file.with_suffix(".json")), checkpoint.read_tensors(file.with_suffix(".safetensors"))
    if record.get("script") not in FORMULAS or not isinstance(record.get("model"), str):
        raise ValueError(f"{file.with_suffix('.json')} was not written by a run of ours that skipped a step")
    try:
        return record, found_again(file, record, tensors)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} or its .json is damaged, or from another version ({error!r})") from None


def found_again(file: Path, record: dict, tensors: dict[str, Tensor]) -> Finding | None:
    device = distributed.setup().device
    saved, precision = checkpoint.load(file.parent / record["model"]), precision_of(record["options"], device)
    for formula in FORMULAS[record["script"]](record, tensors, saved, device, precision):
        found = first_bad([formula])
        if found or not formula.name.startswith(PARAMETERS):
            print(line_of(formula, found))
        if found:
            return found
    return None


def precision_of(options: dict, device: torch.device) -> Precision:
    """As it was; in float32 where this machine has no other. Without a loss scale, which changes no number."""
    kind = options["precision"]
    if kind == "fp16" and device.type != "cuda" or kind == "bf16" and device.type == "mps":
        say(f"this machine has no {kind}: computed in fp32")
        kind = "fp32"
    return optim.amp(device, kind)._replace(scaler=torch.amp.GradScaler(device.type, enabled=False))


def line_of(formula: Formula, found: Finding | None) -> str:
    largest = float(formula.x.detach().abs().max()) if formula.x.numel() else 0.0
    return f"  {'BAD' if found else 'ok ':<5}{formula.name:<40} largest magnitude {largest:.4g}"


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    file = Path(sys.argv[1])
    record, found = replay(file)
    told = record["culprit"]["words"]
    if found is None:
        print(
            f"not reproduced: every number is well when it is computed here. The run said: {told}. What gave that number is "
            "random, remembers earlier calls, or was another machine's"
        )
        return
    same = found.formula == record["culprit"]["formula"]
    print(
        f"{'reproduced' if same else f'otherwise than the run, which said {told!r}'}: {in_words(found, record['texts'])}"
    )
    sys.stdout.flush()
    raise SystemExit(1)


if __name__ == "__main__":
    config.run(main)
