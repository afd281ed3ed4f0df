"""Any model of ours, or any that --init= can open, for the rest of the world: an HF directory, a GGUF file, a PEFT adapter.

python export.py --init=out/ppo --out=out/hf                                   # transformers, TRL, vLLM
python export.py --init=out/rm --out=out/hf-reward                             # ... as a sequence classifier
python export.py --init=out/ppo --out=out/model.gguf --format=gguf --dtype=Q8_0    # llama.cpp
python export.py --init=smollm2-135m-instruct --out=out/smollm2/base           # unpacked once, then memory-mapped by all
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from data.tokenizer import Tokenizer, load_tokenizer, write_hf
from model.gguf import save_gguf
from model.hf import reward_head, save_hf
from model.lora import load_adapter, save_peft
from model.transformer import Transformer
from rlhf.actor_critic import PREFIX, STORED, policy_adapter, tuned_model
from rlhf.infra import checkpoint, config
from rlhf.language_model import new_transformer
from rlhf.pretrained import open_base, open_pretrained
from rlhf.reward_model import RewardModel, load_reward_model

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Config:
    init: str = "out/ppo"  # run or checkpoint directory, HF-format directory, GGUF file, or a model's name
    out: str = "out/export"  # directory to write, or file for --format=gguf
    format: Literal["hf", "gguf", "peft"] = "hf"  # peft: the policy's LoRA adapter alone (layout adapters)
    part: Literal["policy", "critic"] = "policy"  # of a PPO run; the critic becomes a sequence classifier
    dtype: Literal["F32", "F16", "BF16", "Q8_0"] = "F32"  # of the matrices; BF16 for hf alone, Q8_0 for gguf alone

    def __post_init__(self):
        possible = {"hf": ("F32", "F16", "BF16"), "gguf": ("F32", "F16", "Q8_0"), "peft": ("F32",)}[self.format]
        if self.dtype not in possible:
            raise ValueError(f"--format={self.format} has no {self.dtype}; choose from {', '.join(possible)}")
        if self.part == "critic" and self.format != "hf":
            raise ValueError(f"a critic is a sequence classifier, which --format={self.format} cannot hold; use hf")


def main() -> None:
    cfg = config.parse(Config)
    torch.set_grad_enabled(False)
    saved = our_checkpoint(cfg.init)
    kind = saved.config.get("kind") if saved else "lm"
    if kind == "reward":
        if cfg.format != "hf" or cfg.part != "policy":
            raise ValueError(f"{cfg.init} is a reward model: only --format=hf can hold it")
        export_reward_model(cfg, saved)
    elif cfg.format == "peft":
        export_adapter(cfg, saved)
    elif cfg.part == "critic":
        export_critic(cfg, saved)
    else:
        export_language_model(cfg)
    print(f"{size_of(cfg.out) / 1e6:,.1f} MB -> {cfg.out}")


def our_checkpoint(spec: str) -> checkpoint.Checkpoint | None:
    """The open checkpoint if `spec` is one of ours."""
    ours = checkpoint.latest(spec) or (Path(spec).is_dir() and checkpoint.read_config(Path(spec)))
    return checkpoint.load(checkpoint.resolve(spec)) if ours else None


def export_language_model(cfg: Config) -> None:
    opened = open_pretrained(cfg.init, dtype=None if cfg.format == "hf" and cfg.dtype != "F32" else torch.float32)
    model, tokenizer = opened.model, opened.tokenizer
    if cfg.format == "gguf":
        save_gguf(cfg.out, model, cfg.dtype, tokenizer.parts())
        return
    with tokenizer_files(tokenizer) as files:
        save_hf(
            cfg.out, model, bos_id=tokenizer.bos, eos_ids=opened.stop_ids, pad_id=tokenizer.pad, files=files.iterdir(),
            dtype=DTYPES[cfg.dtype],
        )  # fmt: skip


def export_reward_model(cfg: Config, saved: checkpoint.Checkpoint) -> None:
    tokenizer = load_tokenizer(saved.path)
    reward_model = load_reward_model(cfg.init, tokenizer.fingerprint, open_base=open_base)
    if not isinstance(reward_model, RewardModel):
        raise ValueError(
            f"{cfg.init} reads hidden states between the layers of {saved.config['base']}; HF's sequence classifiers read "
            "the last token of the last layer alone: train one with --trunk=full --pooling=last to export it"
        )
    score, bias = reward_head(
        reward_model.head, float(reward_model.gain), float(reward_model.bias), reward_model.pooling
    )
    write_classifier(cfg, reward_model.model, score, bias, tokenizer)


def export_critic(cfg: Config, saved: checkpoint.Checkpoint | None) -> None:
    if not saved or not any(name.startswith("value_head.") for name in saved.tensors):
        raise ValueError(f"{cfg.init} has no critic: name a run of train_ppo.py with --estimator=gae")
    score, bias = reward_head(value_head_of(saved))
    write_classifier(cfg, critic_trunk(cfg.init, saved), score, bias, load_tokenizer(saved.path))


def value_head_of(saved: checkpoint.Checkpoint) -> nn.Linear:
    weight = saved.tensors["value_head.weight"]
    head = nn.Linear(weight.shape[1], 1, dtype=weight.dtype)
    head.load_state_dict({"weight": weight, "bias": saved.tensors["value_head.bias"]})
    return head


def critic_trunk(init: str, saved: checkpoint.Checkpoint) -> Transformer:
    """The transformer that the value head reads: the policy's, or the critic's own."""
    prefix = "value_trunk." if any(name.startswith("value_trunk.") for name in saved.tensors) else PREFIX
    tensors = {name.removeprefix(prefix): x for name, x in saved.tensors.items() if name.startswith(prefix)}
    if saved.config.get("layout") in STORED:
        tensors = {PREFIX + name.replace(".critic", ".policy"): x for name, x in tensors.items()}
        return tuned_model(open_base(saved.config, init).model, saved.config, tensors)
    model = new_transformer(saved.config["model"], init)
    model.lm_head = None  # a critic predicts no tokens
    tensors.pop("lm_head.weight", None)
    checkpoint.load_weights(model, tensors, init)
    return model


def write_classifier(cfg: Config, model, score: torch.Tensor, bias: float, tokenizer: Tokenizer) -> None:
    with tokenizer_files(tokenizer) as files:
        save_hf(
            cfg.out, model, score=score, reward_bias=bias, bos_id=tokenizer.bos, eos_ids=[tokenizer.eos],
            pad_id=tokenizer.pad, files=files.iterdir(), dtype=DTYPES[cfg.dtype],
        )  # fmt: skip


def export_adapter(cfg: Config, saved: checkpoint.Checkpoint | None) -> None:
    if not saved or saved.config.get("layout") != "adapters":
        raise ValueError(f"{cfg.init} has no adapter: name a run of train_ppo.py --layout=adapters")
    base = open_base(saved.config, cfg.init)
    tensors = {name.removeprefix(PREFIX): x for name, x in saved.tensors.items() if name.startswith(PREFIX)}
    scale = saved.config["lora_alpha"] / saved.config["lora_rank"]
    load_adapter(base.model, policy_adapter(tensors), scale, "policy")
    save_peft(cfg.out, base.model, "policy", base=str(saved.config["base"]))


class tokenizer_files(tempfile.TemporaryDirectory):
    """The tokenizer's files in HF's form, in a directory that goes away again."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        write_hf(tokenizer, self.name)

    def __enter__(self) -> Path:
        return Path(self.name)


def size_of(path: str) -> int:
    path = Path(path)
    return path.stat().st_size if path.is_file() else sum(x.stat().st_size for x in path.iterdir())


if __name__ == "__main__":
    config.run(main)
