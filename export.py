"""Any model of ours, or any that --init= can open, for the rest of the world or smaller: HF, GGUF, PEFT, int8.

With --data= the export is opened again, measured beside the original on held-out text, and refused if it is too far from
it; the receipt is printed and stored beside the export. int8 is never written without one. A model card, README.md, says
where the model comes from, as far as its runs wrote that down.

python export.py --init=out/ppo --out=out/hf                                   # transformers, TRL, vLLM
python export.py --init=out/rm --out=out/hf-reward                             # ... as a sequence classifier
python export.py --init=out/ppo --out=out/model.gguf --format=gguf --dtype=Q8_0    # llama.cpp
python export.py --init=smollm2-135m-instruct --out=out/smollm2/base           # unpacked once, then memory-mapped by all
python export.py --init=out/ppo --out=out/int8 --format=int8 --data=out/data/vader --reward=out/rm    # sample.py, serve.py
"""

import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from data.loader import TextLoader, in_order, open_data, pad, prompts_of
from data.text import prompt_lines
from data.tokenizer import Tokenizer, check_fingerprint, gguf_parts, load_tokenizer, write_hf
from evaluation import receipt
from evaluation.model_card import model_card
from model.generate import Sampling, generate, row_uniforms
from model.gguf import save_gguf
from model.hf import complete_directory, reward_head, save_hf
from model.lora import load_adapter
from model.peft import save_peft
from model.quantize import quantize, stored_tensors
from rlhf.infra import checkpoint, config
from rlhf.infra.files import write_json, write_text
from rlhf.infra.precision import has_fast_bf16
from rlhf.lm.distill import distill, drop_layers, layer_distances
from rlhf.lm.int8 import to_compute_with
from rlhf.lm.pretrained import Pretrained, critic_trunk, open_base, open_pretrained
from rlhf.lm.trunks import PREFIX, policy_adapter
from rlhf.reward.files import load_reward_model
from rlhf.reward.model import RewardModel
from rlhf.reward.scorer import open_scorer

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Config:
    init: str = "out/ppo"  # run or checkpoint directory, HF-format directory, GGUF file, or a model's name
    base: str | None = None  # the model that a run of layout adapters or branch was trained on, where it has moved
    out: str = "out/export"  # directory to write, or file for --format=gguf
    format: Literal["hf", "gguf", "peft", "int8"] = "hf"  # peft: a LoRA policy alone; int8: of our own
    part: Literal["policy", "critic"] = "policy"  # of a PPO run; the critic becomes a sequence classifier
    dtype: Literal["F32", "F16", "BF16", "Q8_0"] = "F32"  # of the matrices; BF16 for hf alone, Q8_0 for gguf alone
    embedding: Literal["bf16", "int8"] = "bf16"  # of the embedding; a tied output matrix is int8 in both [format=int8]

    # the receipt: what the export costs on held-out text
    data: str | None = None  # directory made by data.prepare, or a text file with one text per line; int8 needs it
    texts: int = 128  # texts, spread over the held-out split [data]
    reward: str | None = None  # a reward whose change is measured: a directory, or file.py:function [data]
    prompt_tokens: int | None = None  # first tokens of a text as its prompt; none = the data's, or 4 of a text [data]
    response_tokens: int = 24  # longest response, tokens [data]
    max_kl: float = 0.02  # largest KL(original || export) that is written, nats per token [data]

    # structured pruning, before any of hf, gguf and int8: the neighbouring layers that turn the hidden states least
    drop_layers: int | None = None  # layers to leave out; what is left learns the original's distribution again [data]
    distill_steps: int = 200  # steps of that, in turns on the data's texts and the original's; 0 = none [drop_layers]
    distill_batch: int = 32  # texts per step [drop_layers]
    distill_lr: float = 3e-4  # peak learning rate; warm-up, then linearly down to 0 [drop_layers]

    def __post_init__(self):
        config.at_least(self, texts=1, prompt_tokens=1, response_tokens=1, max_kl=0)
        config.at_least(self, drop_layers=1, distill_steps=0, distill_batch=1, distill_lr=0)
        if self.drop_layers and (self.data is None or not Path(self.data).is_dir()):
            raise ValueError(
                "--drop_layers learns from a training split: give --data=, a directory made by data.prepare"
            )
        possible = {"hf": ("F32", "F16", "BF16"), "gguf": ("F32", "F16", "Q8_0")}.get(self.format, ("F32",))
        if self.dtype not in possible:
            raise ValueError(f"--format={self.format} has no {self.dtype}; choose from {', '.join(possible)}")
        if self.part == "critic" and self.format != "hf":
            raise ValueError(f"a critic is a sequence classifier, which --format={self.format} cannot hold; use hf")
        if self.format == "int8" and self.data is None:
            raise ValueError(
                "--format=int8 measures what it costs: give held-out text, --data=out/data/vader or --data=texts.txt"
            )
        if self.data is not None and (self.part == "critic" or self.format == "peft"):
            raise ValueError("a receipt is made of language models: --data has no effect on a critic or an adapter")


def main() -> None:
    cfg = config.parse(Config)
    torch.set_grad_enabled(False)
    saved = our_checkpoint(cfg.init)
    kind = saved.config.get("kind") if saved else "lm"
    if kind == "int8":
        raise ValueError(
            f"{cfg.init} is int8 already, and its weights were rounded: export the model that it was made of"
        )
    if kind == "reward":
        if cfg.data is not None:
            raise ValueError(f"{cfg.init} is a reward model: a receipt is made of language models, leave --data out")
        if cfg.base is not None:
            raise ValueError(
                f"{cfg.init} is a reward model: only one of a whole model is exported, --base has no effect"
            )
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
    plain = cfg.data is None and cfg.format == "hf" and cfg.dtype != "F32"
    original = open_pretrained(cfg.init, dtype=None if plain else torch.float32, base=cfg.base)
    rows = held_out_rows(cfg, original) if cfg.data else []  # before anything is written
    with new_place(cfg) as place:
        pruned, about = prune(cfg, original) if cfg.drop_layers else (original, {})
        WRITERS[cfg.format](place, pruned, cfg)
        measured = None
        if rows:
            measured = about | measure(cfg, original, place, rows)
            print(receipt.lines(measured))
            receipt.check(measured, cfg.max_kl)
            write_json(beside(place, "receipt.json"), measured)
        write_card(place, cfg, cfg.format, measured)


def prune(cfg: Config, original: Pretrained) -> tuple[Pretrained, dict]:
    """The model without --drop_layers layers, distilled; and what the receipt says of that."""
    tokenizer, teacher, train = original.tokenizer, original.model.eval(), open_data(cfg.data, "train")
    check_fingerprint(train.fingerprint, tokenizer.fingerprint, str(train))
    if cfg.drop_layers >= teacher.config.layers:
        raise ValueError(f"--drop_layers={cfg.drop_layers} leaves none of the model's {teacher.config.layers} layers")
    size, context = min(cfg.distill_batch, train.answers), teacher.config.context
    texts = TextLoader(train, size, seed=1, context=context, loss="all")
    how = {"starts": cfg.prompt_tokens, "context": context, "response_tokens": cfg.response_tokens}
    prompts = prompts_of(train, size, 1, **how)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step % 2 == 0:
            return texts.batch(step // 2)[:3:2]  # tokens and mask
        starts, lengths, rows = prompts.batch(step // 2)
        uniforms = row_uniforms(1, step, rows, cfg.response_tokens)
        own = generate(
            teacher, starts, lengths, Sampling(cfg.response_tokens, original.stop_ids, tokenizer.pad), uniforms
        )
        return own.tokens, own.mask

    distances = layer_distances(teacher, cfg.drop_layers, [texts.batch(step)[:3:2] for step in range(4)])
    first = int(distances.argmin())
    student = drop_layers(teacher, first, cfg.drop_layers)
    print(f"without layers {first} to {first + cfg.drop_layers - 1}, which turn the hidden states least")
    losses = distill(student, teacher, batch, cfg.distill_steps, cfg.distill_lr)
    about = {"first": first, "layers": cfg.drop_layers, "distances": distances.tolist(), "losses": losses}
    return replace(original, model=student), {"dropped": about}


@contextmanager
def new_place(cfg: Config) -> Iterator[Path]:
    """Where to write first: it takes the place of --out, with its receipt, unless something raises."""
    out = Path(cfg.out).resolve()
    if cfg.format == "gguf":
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
            yield Path(place) / out.name
            os.replace(Path(place) / out.name, out)
            for file in ("receipt.json", "README.md"):
                beside(out, file).unlink(missing_ok=True)  # an older one
                if (made := beside(Path(place) / out.name, file)).exists():
                    os.replace(made, beside(out, file))
        return
    with complete_directory(out, "config.json") as place:
        yield place / "export"
        for file in (place / "export").iterdir():
            file.rename(place / file.name)
        (place / "export").rmdir()


def beside(export: Path, file: str) -> Path:
    """Where the receipt and the card of an export lie: in its directory, or as model.gguf.receipt.json."""
    return export / file if export.is_dir() else export.with_name(f"{export.name}.{file}")


def write_card(export: Path, cfg: Config, form: str, measured: dict | None = None) -> None:
    usual = config.defaults(Config)
    given = (f"--{name}={config.show(x)}" for name, x in asdict(cfg).items() if x != usual[name])
    command = ["python", "export.py", *given]
    write_text(beside(export, "README.md"), model_card(Path(cfg.out).name, cfg.init, command, form, measured))


def write_hf_model(place: Path, original: Pretrained, cfg: Config) -> None:
    tokenizer = original.tokenizer
    with tokenizer_files(tokenizer) as files:
        save_hf(
            place, original.model, bos_id=tokenizer.bos, eos_ids=original.stop_ids, pad_id=tokenizer.pad,
            files=files.iterdir(), dtype=DTYPES[cfg.dtype],
        )  # fmt: skip


def write_gguf(place: Path, original: Pretrained, cfg: Config) -> None:
    save_gguf(place, original.model, cfg.dtype, gguf_parts(original.tokenizer, original.stop_ids))


def write_int8(place: Path, original: Pretrained, cfg: Config) -> None:
    model = quantize(copy.deepcopy(original.model), cfg.embedding)
    about = {"kind": "int8", "model": model.config.stored(), "tokenizer": original.tokenizer.fingerprint}
    about |= {"stop_ids": original.stop_ids, "of": original.digest}
    with tempfile.TemporaryDirectory() as files:
        checkpoint.save(place, stored_tensors(model), about, files=[original.tokenizer.save(files)])


WRITERS = {"hf": write_hf_model, "gguf": write_gguf, "int8": write_int8}


def held_out_rows(cfg: Config, original: Pretrained) -> list[np.ndarray]:
    """At most --texts texts as token ids, spread over the held-out split (prompts where nobody answered them) or the text
    file, neighbours of similar length.
    """
    tokenizer = original.tokenizer
    if Path(cfg.data).is_file():
        rows = [np.array([tokenizer.start, *tokenizer.encode(line)]) for line in prompt_lines(cfg.data)]
        lengths, row = np.array(list(map(len, rows))), rows.__getitem__
    else:
        test = open_data(cfg.data, "test")
        check_fingerprint(test.fingerprint, tokenizer.fingerprint, str(test))
        lengths, row = (test.row_lengths(), test.row) if test.answers else (test.prompt_lengths(), test.prompt)
    places = np.flatnonzero(lengths > 1)
    if not len(places):
        raise ValueError(f"{cfg.data} has no text that is longer than one token")
    chosen = places[np.linspace(0, len(places) - 1, min(cfg.texts, len(places))).astype(np.int64)]
    chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
    return [row(int(i))[: original.model.config.context] for i in chosen]


def held_out_prompts(cfg: Config, original: Pretrained, rows: list[np.ndarray]) -> tuple[list[tuple], dict]:
    """Prompts for the reward in batches of 64: tokens (B, P), lengths (B,), which of the data's (B,); and how to look them
    up. Those of the held-out split, or the beginnings of the texts.
    """
    if Path(cfg.data).is_file():
        n = cfg.prompt_tokens or 4
        starts = [row[: 1 + n] for row in rows if len(row) > 1 + n]
        if not starts:
            raise ValueError(f"no text of {cfg.data} is longer than {n} tokens; use shorter prompts")
        batches = in_order(len(starts), 64)
        return [(*pad([starts[i] for i in batch], original.tokenizer.pad), None) for batch in batches], {}
    how = {"context": original.model.config.context, "response_tokens": cfg.response_tokens}
    loader = prompts_of(open_data(cfg.data, "test"), 1, 1, starts=cfg.prompt_tokens, **how)
    if not len(loader):
        raise ValueError(f"no prompt of {cfg.data}/test can be used: {loader.summary}")
    units = np.linspace(0, len(loader) - 1, min(cfg.texts, len(loader))).astype(np.int64)
    units = units[np.argsort(loader.lengths(units), kind="stable")]
    return [tuple(loader.take(units[batch])) for batch in in_order(len(units), 64)], {"records": loader.records}


def measure(cfg: Config, original: Pretrained, place: Path, rows: list[np.ndarray]) -> dict:
    """The receipt of what was written at `place`, opened again."""
    tokenizer, exported = original.tokenizer, open_pretrained(place)
    models = {"before": original.model.eval(), "after": exported.model.eval()}

    def batches(rows: list[np.ndarray], size: int):
        return (pad([rows[i] for i in batch], tokenizer.pad) for batch in in_order(len(rows), size))

    texts = ((x, (t := torch.arange(x.shape[1])).gt(0) & (t < n[:, None])) for x, n in batches(rows, 8))
    measured = {"original": cfg.init, "format": cfg.format, "dtype": cfg.dtype, "text": cfg.data}
    weights = [place] if place.is_file() else list(place.glob("*.safetensors"))
    parameters = sum(x.numel() for x in original.model.state_dict().values())
    measured["bytes"] = {"before": 4 * parameters, "after": sum(file.stat().st_size for file in weights)}
    measured |= receipt.compare(models["before"], models["after"], texts)
    if cfg.reward:
        prompts, opening = held_out_prompts(cfg, original, rows)
        score = open_scorer(cfg.reward, tokenizer, base=original, **opening).score
        template = None if Path(cfg.data).is_file() else open_data(cfg.data, "test").template
        sampling = Sampling(cfg.response_tokens, original.ends_of(template), tokenizer.pad)
        measured["reward"] = receipt.reward_change(models, score, prompts, sampling)
    prompt = torch.from_numpy(rows[0][:8].astype(np.int64))
    if cfg.format == "int8":  # beside what serve.py would make of it
        if has_fast_bf16(torch.device("cpu")):
            models["bf16"] = to_compute_with(copy.deepcopy(exported.model), False, torch.bfloat16)
        measured["tokens_per_s_16"] = receipt.decoding_speed(models, prompt, batch=16)
    return measured | {"tokens_per_s": receipt.decoding_speed(models, prompt)}


def export_reward_model(cfg: Config, saved: checkpoint.Checkpoint) -> None:
    tokenizer = load_tokenizer(saved.path)
    reward_model = load_reward_model(cfg.init, tokenizer.fingerprint)
    if not isinstance(reward_model, RewardModel) or reward_model.stop_ids is not None:
        raise ValueError(
            f"{cfg.init} reads {saved.config['base']} between its layers, or without the start and the end of a text; HF's "
            "sequence classifiers read the last token of the last layer: train one with --trunk=full --pooling=last"
        )
    if reward_model.ensemble.members > 1:
        raise ValueError(f"{cfg.init} has {reward_model.ensemble.members} heads; HF's classifiers have no ensembles")
    reward_model.model.lm_head = None  # of a language-modelling loss beside the reward loss
    score, bias = reward_head(
        reward_model.head, float(reward_model.gain), float(reward_model.bias), reward_model.pooling
    )
    write_classifier(cfg, reward_model.model, score, bias, tokenizer)


def export_critic(cfg: Config, saved: checkpoint.Checkpoint | None) -> None:
    if not saved or not any(name.startswith("value_head.") for name in saved.tensors):
        raise ValueError(f"{cfg.init} has no critic: name a run of train_ppo.py with --estimator=gae")
    score, bias = reward_head(value_head_of(saved))
    write_classifier(cfg, critic_trunk(saved, cfg.init, base=cfg.base), score, bias, load_tokenizer(saved.path))


def value_head_of(saved: checkpoint.Checkpoint) -> nn.Linear:
    weight = saved.tensors["value_head.weight"]
    head = nn.Linear(weight.shape[1], 1, dtype=weight.dtype)
    head.load_state_dict({"weight": weight, "bias": saved.tensors["value_head.bias"]})
    return head


def write_classifier(cfg: Config, model, score: torch.Tensor, bias: float, tokenizer: Tokenizer) -> None:
    with tokenizer_files(tokenizer) as files:
        save_hf(
            cfg.out, model, score=score, reward_bias=bias, bos_id=tokenizer.bos, eos_ids=[tokenizer.eos],
            pad_id=tokenizer.pad, files=files.iterdir(), dtype=DTYPES[cfg.dtype],
        )  # fmt: skip
    write_card(Path(cfg.out), cfg, "classifier")


def export_adapter(cfg: Config, saved: checkpoint.Checkpoint | None) -> None:
    if not saved or saved.config.get("layout") != "adapters":
        raise ValueError(f"{cfg.init} has no adapter: name a run of train_ppo.py --layout=adapters")
    base = open_base(saved.config, cfg.init, base=cfg.base)
    tensors = {name.removeprefix(PREFIX): x for name, x in saved.tensors.items() if name.startswith(PREFIX)}
    scale = saved.config["lora_alpha"] / saved.config["lora_rank"]
    load_adapter(base.model, policy_adapter(tensors), scale, "policy")
    save_peft(cfg.out, base.model, "policy", base.spec, base.family)
    write_card(Path(cfg.out), cfg, "peft")


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
    config.run(main, stopped="stopped")
