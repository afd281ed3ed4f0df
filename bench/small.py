"""The small setting of against_trl.py, ablations.py and reproductions.py: its models, and runs of train_ppo.py in this process.

A language model of 0.24 M parameters learns the rated sentences; two reward models of it know disjoint halves of the raters:
`proxy`, which PPO maximises (also written as HF's classifier, `proxy_hf`), and `gold`, which says what that was worth.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

import iterate  # noqa: E402
import train_ppo  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from evaluation.held_out import HeldOut, held_out_prompts, measured, sample_groups  # noqa: E402
from model.generate import Sampling  # noqa: E402
from rlhf.infra import distributed, optim  # noqa: E402
from rlhf.infra.files import read_json, read_lines, write_json  # noqa: E402
from rlhf.lm.pretrained import open_pretrained  # noqa: E402
from rlhf.ppo.roles import logprobs_of  # noqa: E402
from rlhf.reward.scorer import open_scorer  # noqa: E402

RESPONSE = 24  # tokens
ALL = {"precision": "fp32", "weak_reward": True, "checkpoint_every": 10**6, "sample_every": 10**6}


def prepare(place: Path, gold: bool = True) -> None:
    """Data and models in `place`, by our own scripts; what is finished is kept. Some two minutes of one core."""
    data, lm, same = place / "data", place / "lm", {"precision": "fp32"}
    iterate.stage("data", data, [sys.executable, "-m", "data.prepare", "vader", f"--out={data}"])
    shape = {"width": 64, "layers": 2, "heads": 4, "context": 64}
    iterate.stage("lm", lm, iterate.script("train_lm.py", {"data": data, "out": lm, **shape, **same}))
    rewards = {"proxy": ("half_a", "last", 2), "gold": ("half_b", "mean", 1)}
    for seed, (name, (labels, pooling, epochs)) in enumerate(rewards.items(), 1):
        options = {"init": lm, "data": data, "out": place / name, "labels": labels, "pooling": pooling}
        options |= {"epochs": epochs, "seed": seed}
        if name == "proxy" or gold:
            iterate.stage(name, place / name, iterate.script("train_rm.py", options | same))
    for name in ("lm", "proxy"):
        if not (place / f"{name}_hf" / "config.json").exists():
            options = {"init": place / name, "out": place / f"{name}_hf"}
            subprocess.run(iterate.script("export.py", options), check=True, stdout=subprocess.DEVNULL)


def settle(out: Path, options: dict, free: Sequence[str]) -> None:
    """Keep the options of a study in `out`; ValueError where it holds one of others, `free` ones apart."""
    options = {name: x for name, x in options.items() if name not in free}
    if (out / "study.json").exists() and (old := read_json(out / "study.json")) != options:
        name = next(name for name in {**options, **old} if old.get(name) != options.get(name))
        told = f"{name}={old.get(name)}, this is {options.get(name)}"
        raise ValueError(f"{out} has a study with {told}: choose another --out")
    write_json(out / "study.json", options)


@contextlib.contextmanager
def replaced(module, **new) -> Iterator[None]:
    """Within, these names of a module are others."""
    old = {name: getattr(module, name) for name in new}
    vars(module).update(new)
    try:
        yield
    finally:
        vars(module).update(old)


def config_of(place: Path, out: Path, options: dict) -> train_ppo.Config:
    """Options of a run on the small models."""
    paths = {"init": str(place / "lm"), "data": str(place / "data"), "out": str(out)}
    return train_ppo.Config(**{**ALL, **paths, "reward": str(place / "proxy"), "response_tokens": RESPONSE, **options})


def ppo(place: Path, out: Path, options: dict, changed=None) -> list[dict]:
    """The rows of metrics.jsonl of a run of train_ppo.py, which is not run again where it is finished.

    changed: (Cast) -> Cast, what plays in the run beside its options.
    """
    cfg, dist = config_of(place, out, options), distributed.setup()
    precision, micro_batch = optim.amp(dist.device, cfg.precision), train_ppo.row_counts(cfg, 1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        cast = train_ppo.open_cast(cfg, dist, precision)
        train_ppo.train(cfg, changed(cast) if changed else cast, dist, precision, micro_batch)
    return read_lines(out / "metrics.jsonl")


class Judges:
    """What every policy of a study is asked: the same held-out prompts, with the same random numbers."""

    def __init__(self, place: Path, prompts: int, seed: int = 7):
        self.tokenizer, self.seed = load_tokenizer(place / "data"), seed
        self.opened = open_pretrained(place / "lm", "cpu")
        self.base = self.opened.model.eval().requires_grad_(False)
        how = {"sources": (), "prompt_tokens": None, "max_prompt": None, "long_prompts": "drop"}
        how |= {"response_tokens": RESPONSE, "context": self.base.config.context}
        self.asked: HeldOut = held_out_prompts(
            str(place / "data"), "test", prompts, seed, self.tokenizer, how.pop("prompt_tokens"), **how
        )
        opening = {"tokenizer": self.tokenizer, "device": "cpu", "base": self.opened, "data": str(place / "data")}
        specs = {"proxy": str(place / "proxy"), "gold": str(place / "gold"), "judge": "data"}
        self.scores = {name: open_scorer(spec, **opening).score for name, spec in specs.items()}

    @torch.no_grad()
    def measure(self, policy: Path) -> dict[str, np.ndarray]:
        """proxy, gold, judge, kl (nats) and length (tokens) of the policy's answers, (P,) each; kept in measured.json."""
        file = policy / f"measured_{len(self.asked.rows)}.json"
        if not file.exists():
            model = open_pretrained(policy, "cpu").model.eval().requires_grad_(False)
            sampling = Sampling(RESPONSE, self.opened.stop_ids, self.tokenizer.pad)
            groups = sample_groups(model, self.asked.prompts, self.asked.lengths, 1, sampling, self.seed)
            logprobs = logprobs_of(model), logprobs_of(self.base)
            earned, moved = measured(groups, self.scores, self.asked.rows, logprobs=logprobs)
            found = {name: x[:, 0] for name, x in earned.items()} | {name: moved[name] for name in ("kl", "length")}
            write_json(file, {name: x.tolist() for name, x in found.items()})
        return {name: np.array(x) for name, x in read_json(file).items()}
