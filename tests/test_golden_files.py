"""Every golden file is compared with something of ours, or this table says why not (yet)."""

from pathlib import Path

NOT_USED = {
    "inter_rater": "agreement between raters belongs to the report on human labels, which does not exist yet",
    "smollm2_logits": "needs the weights of SmolLM2, which are not part of the checkout",
    "smollm2_tokenizer": "its byte-level tokenizer comes with the import of models",
    "logprob_mismatch_demo": "orders of magnitude, not numbers to match; the sampler's own tests bound the mismatch",
    "trl112_ppo_minibatch_steps": "counts the optimiser steps of TRL's loop; ours are epochs x minibatches",
    "trl116_padding_utils": "flushes left padding, which does not exist here",
}


def stems(golden_dir):
    return {path.name.split(".")[0] for path in golden_dir.glob("*.json")}


def test_every_file_is_used_or_excused(golden_dir):
    here = Path(__file__)
    tests = "".join(path.read_text() for path in sorted(here.parent.glob("test_*.py")) if path != here)
    used = {name for name in stems(golden_dir) if f'"{name}' in tests}
    forgotten = stems(golden_dir) - used - set(NOT_USED)
    assert not forgotten, f"no test reads {sorted(forgotten)}: compare it with ours, or say why not in NOT_USED"
    assert set(NOT_USED) <= stems(golden_dir), "an excuse for a file that does not exist"
    assert len(list(golden_dir.glob("*.json"))) >= 81
