"""Train a language model on prepared data: pretraining on texts, or supervised fine-tuning on answers and conversations.

python train_lm.py --data=out/data/vader --out=out/lm
torchrun --nproc_per_node=2 train_lm.py --data=out/data/vader --out=out/lm
python train_lm.py --init=smollm2-135m-instruct --data=out/data/chats --out=out/sft --epochs=1 --lr=1e-4
python train_lm.py --init=smollm2-135m-instruct --data=out/data/chats --out=out/sft --layout=adapters --lr=5e-4

The loss is the mean over the tokens to predict of -log p(token | tokens before it): of the answers alone (each with the token
that ends it, in every turn of the assistant) where the data has prompts, else of every token. What people rejected is never
trained on. On a CPU the rows of a step stand one after the other, each attending to itself alone, without padding.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data.chat import Chat
from data.examples import Examples
from data.loader import TextBatch, TextLoader, cut, in_order, open_data, pad, total_steps
from data.tokenizer import Tokenizer, check_fingerprint, load_tokenizer
from model.generate import Sampling, generate, row_uniforms
from model.half import store
from model.transformer import ModelConfig, Transformer, recompute_blocks
from rlhf.infra import config, distributed, optim
from rlhf.infra.brakes import Brakes
from rlhf.infra.distributed import Dist
from rlhf.infra.metrics import Metrics, say
from rlhf.infra.optim import Precision
from rlhf.infra.precision import PrecisionName, settled, stored_dtype
from rlhf.infra.run import Run, write_json
from rlhf.lm.language_model import LanguageModel
from rlhf.lm.pretrained import Pretrained, open_pretrained
from rlhf.lm.trunks import adapted, lora_of, stored_of
from rlhf.replay import lm as replay
from rlhf.replay.texts import rows_of

SAMPLES = 4  # texts that are written at every evaluation, of at most so many tokens:
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Config:
    data: str = "out/data/vader"  # directory made by data.prepare; or several with their weights, a:0.7,b:0.3
    out: str = "out/lm"  # run directory: checkpoints, metrics.jsonl, samples.jsonl, report.json
    init: str | None = None  # run, HF directory, GGUF file or model's name to start from; none = random, as below
    sources: tuple[str, ...] = ()  # only rows from these sources of the data; none given = all
    loss: Literal["answers", "all"] | None = None  # tokens to predict; none = answers where there are prompts, else all
    long_rows: Literal["left", "drop"] = "left"  # above the context: cut the prompt from the left, or leave the row out
    # what is trained
    layout: Literal["full", "adapters"] = "full"  # all weights, or LoRA on those of init, which stay as they are
    lora_rank: int = 16  # of the adapters [layout=adapters]
    lora_alpha: float = 32.0  # their update is scaled by lora_alpha / lora_rank [layout=adapters]
    lora_targets: tuple[str, ...] | None = None  # last names of adapted layers; none = all linear [layout=adapters]
    # shape of a new model
    width: int = 128  # size of the hidden states [init=none]
    layers: int = 4  # transformer blocks [init=none]
    heads: int = 4  # query heads [init=none]
    kv_heads: int | None = None  # key and value heads; none = as many as heads [init=none]
    ffn: int | None = None  # width of the MLP; none = 8/3 of width [init=none]
    context: int | None = None  # longest sequence, tokens; none = 256, or what init reads
    # optimisation
    epochs: float = 4.0  # passes over the training split
    batch: int = 32  # rows per optimiser step, over all ranks
    micro_batch: int | None = None  # rows per forward on one rank; none = all of its share
    micro_batch_tokens: int | None = None  # instead: rows of like length, so many tokens with padding, if there is any
    recompute: bool = False  # compute each block again for the backward pass: less memory, more time
    lr: float = 3e-3  # peak learning rate
    warmup: int = 50  # steps of linear warm-up
    decay: Literal["linear", "cosine", "constant"] = "cosine"  # learning rate after the warm-up
    weight_decay: float = 0.1  # AdamW, on matrices alone
    grad_clip: float = 1.0  # largest global gradient norm
    max_bad_steps: int = 3  # steps in a row, skipped for a number that is not finite, that end the run
    precision: PrecisionName = "auto"  # of matrix products; auto = bf16 where that is fast, and a run keeps its own
    seed: int = 1  # of the weights, the order of the data, and the samples
    # several processes
    shard: bool = False  # every rank keeps a part of weights, gradients and moments (FSDP), and not all of them
    replicas: int = 1  # copies of the weights, each over a part of the ranks: one a machine, say [shard=true]
    # report
    log_every: int = 50  # steps between lines of metrics.jsonl
    eval_every: int = 500  # steps between validation losses and samples, a multiple of log_every
    checkpoint_every: int = 250  # steps between checkpoints
    override: tuple[str, ...] = ()  # options that may differ from those that the run in out was started with

    def __post_init__(self):
        config.at_least(self, width=1, layers=1, heads=1, kv_heads=1, ffn=1, context=2, batch=1, micro_batch=1, seed=0)
        config.at_least(self, epochs=0, lr=0, warmup=0, weight_decay=0, grad_clip=0, lora_rank=1, lora_alpha=0)
        config.at_least(self, log_every=1, eval_every=1, checkpoint_every=1, max_bad_steps=1, micro_batch_tokens=2)
        config.at_most_one(self, "micro_batch", "micro_batch_tokens")
        if self.eval_every % self.log_every:
            raise ValueError(f"eval_every {self.eval_every} is not a multiple of log_every {self.log_every}")
        if self.layout == "adapters" and not self.init:
            raise ValueError("--layout=adapters needs --init: a model to put them on")


def main() -> None:
    cfg = config.parse(Config)
    dist = distributed.setup(cfg.shard, cfg.replicas)
    cfg = settled(cfg, dist)
    precision = optim.amp(dist.device, cfg.precision)
    tokenizer, train, validation = open_splits(cfg)
    base = open_init(cfg, tokenizer)
    language_model = LanguageModel(store(start(cfg, base, tokenizer).to(dist.device), stored_dtype(cfg, precision)))
    recompute_blocks(language_model, cfg.recompute)
    loaders = loaders_of(cfg, train, validation, language_model.model.config.context, dist)
    loaders[0].with_room(cfg.micro_batch_tokens)
    total = total_steps(cfg.epochs, loaders[0].order.steps_per_epoch)
    learner = dist.wrap(language_model)
    optimizer = optim.make_optimizer(language_model, cfg.lr, cfg.weight_decay, betas=(0.9, 0.95))
    inputs = {"data_sha256": train.digest} | ({"init_sha256": base.digest} if base else {})
    saved_as = description(cfg, language_model.model, base, tokenizer, train)
    # an adapter's checkpoint names its parts as a policy's does
    module = language_model if cfg.layout == "adapters" else language_model.model
    options, files = asdict(cfg) | inputs, [tokenizer.path]
    run = Run(
        cfg.out, options, module, optimizer, precision.scaler, dist, saved_as, files, defaults=config.defaults(Config)
    )
    announce(language_model, loaders, total, cfg, dist)
    fit(cfg, language_model, learner, optimizer, loaders, tokenizer, saved_as["stop_ids"], total, run, precision, dist)
    dist.close()


def fit(
    cfg, language_model, learner, optimizer, loaders, tokenizer, stop_ids, total: int, run: Run, precision, dist: Dist
) -> None:
    """The loop: one optimiser step a batch; validation, samples and a report."""
    loader, held_out = loaders
    log, brakes = Metrics(cfg.out, dist.is_main, run.done), Brakes(run, optimizer, cfg.max_bad_steps)
    for step in run.steps(total, "lm"):
        packed = dist.device.type == "cpu"  # see model/packed.py
        parts = loader.forwards(step, dist.world, cfg.micro_batch, cfg.micro_batch_tokens, packed)
        nll = accumulate_gradient(learner, loader.batch(step), parts, dist, precision)
        lr = optim.schedule(step, total, cfg.warmup, cfg.lr, cfg.decay)
        optim.set_lr(optimizer, lr)
        grad_norm = optim.step(optimizer, language_model, precision.scaler, cfg.grad_clip)
        if not brakes.took(grad_norm, nll, precision.scaler):
            skip(brakes, language_model, loader, step, cfg.micro_batch or min(map(len, parts)), precision, tokenizer)

        done = step + 1
        if done % cfg.log_every == 0 or done == total or brakes.ended:
            record = {"loss/train": float(dist.sum(nll)), "grad_norm": grad_norm, "lr": lr, "bad/steps": brakes.count()}
            if done % cfg.eval_every == 0 and done < total and not brakes.ended:
                record |= validate(language_model, held_out, tokenizer, dist, precision)
            log.log(step, record)
        brakes.check()
        if done % cfg.eval_every == 0 or done == total:  # before the checkpoint: a kill after it must lose nothing
            with dist.whole(language_model), precision.autocast():
                log.samples(step, samples(language_model.model, held_out, tokenizer, stop_ids, cfg.seed))
        if run.due(done, cfg.checkpoint_every, total):
            run.save(done, **brakes.state())

    report = {"steps": total, **validate(language_model, held_out, tokenizer, dist, precision), "seconds": run.seconds}
    if dist.is_main:
        write_json(f"{cfg.out}/report.json", report)
        print(
            f"validation perplexity {report['validation/perplexity']:.1f}, "
            f"{report['validation/bits_per_byte']:.3f} bits per byte, {report['seconds']:.0f} s -> {cfg.out}"
        )


def accumulate_gradient(learner, batch: TextBatch, parts: list[Tensor], dist: Dist, precision: Precision) -> Tensor:
    """Add the gradient of the mean loss over the step's tokens, those of all ranks, a part of the rows at a time; -> this
    rank's share of that mean.
    """
    tokens, lengths, mask = (x.to(dist.device) for x in batch[:3])
    count, nll = dist.sum(mask.sum()), 0.0
    for part in parts:
        rows, width = part.to(dist.device), int(batch.lengths[part].max())
        with dist.grad_sync(learner, on=part is parts[-1]):
            with precision.autocast():
                loss = learner(tokens[rows, :width], mask[rows, :width], lengths[rows]).sum() / count
            precision.scaler.scale(loss * dist.loss_scale).backward()
        nll = nll + loss.detach()
    return nll


def skip(
    brakes: Brakes, language_model, loader: TextLoader, step: int, micro_batch: int, precision, tokenizer: Tokenizer
) -> None:
    """Count and store a step that cannot be taken; the batch is that of all ranks."""
    batch = loader.take(loader.order.rows(step))
    device = next(language_model.parameters()).device
    tokens, lengths, mask = (x.to(device) for x in batch[:3])
    brakes.skip(
        f"{step:06d}",
        step,
        replay.step_formulas(language_model, tokens, lengths, mask, micro_batch, precision),
        lambda: {"tokens": tokens, "lengths": lengths, "mask": mask},
        lambda: rows_of(tokenizer, batch.tokens, batch.lengths),
        "the gradient is not finite",
        script="train_lm.py",
        rows=batch.rows.tolist(),
        micro_batch=micro_batch,
    )


def open_splits(cfg: Config) -> tuple[Tokenizer, Examples, Examples]:
    """The tokenizer, the training and the validation split; ValueError where there is nothing to measure the model on."""
    train, validation = (open_data(cfg.data, split) for split in ("train", "validation"))
    tokenizer = load_tokenizer(train.paths[0].parent)
    check_fingerprint(train.fingerprint, tokenizer.fingerprint, str(train))
    if not validation.answers:
        raise ValueError(f"{validation} has 0 rows: there is nothing to measure the model on; prepare more text")
    return tokenizer, train, validation


def open_init(cfg: Config, tokenizer: Tokenizer) -> Pretrained | None:
    """The model to start from, whose tokenizer the data must have."""
    if not cfg.init:
        return None
    base = open_pretrained(cfg.init)
    check_fingerprint(tokenizer.fingerprint, base.tokenizer.fingerprint, cfg.init)
    if cfg.context is not None and cfg.context > base.model.config.context:
        raise ValueError(f"--context={cfg.context}: {cfg.init} reads at most {base.model.config.context} tokens")
    return base


def start(cfg: Config, base: Pretrained | None, tokenizer: Tokenizer) -> Transformer:
    """The model that training starts from."""
    if base and cfg.layout == "adapters":
        return adapted(base.model, "policy", lora_of(cfg))
    if base:
        return base.model.requires_grad_(True)
    names = ("width", "layers", "heads", "kv_heads", "ffn")
    shape = {name: getattr(cfg, name) for name in names} | {"context": cfg.context or 256}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **shape))
    model.init_weights(torch.Generator().manual_seed(cfg.seed))
    return model


def loaders_of(
    cfg: Config, train: Examples, validation: Examples, longest: int, dist: Dist
) -> tuple[TextLoader, TextLoader]:
    """Of training and of validation, with the same rules: which rows, which tokens of them, how long."""
    loss = cfg.loss or ("answers" if has_prompts(train) else "all")
    how = dict(context=cfg.context or longest, sources=cfg.sources, loss=loss, long_rows=cfg.long_rows)
    return (
        TextLoader(train, cfg.batch, cfg.seed, dist.rank, dist.world, **how),
        TextLoader(validation, 64, cfg.seed, **how),
    )


def has_prompts(data: Examples) -> bool:
    """Is there any prompt that is more than the start token?"""
    return bool((data.prompt_lengths() > 1).any())


def description(cfg: Config, model: Transformer, base: Pretrained | None, tokenizer: Tokenizer, data: Examples) -> dict:
    """The config of the checkpoints: the model, what ends its texts, and the template of its conversations."""
    stops = {tokenizer.eos, *(base.stop_ids if base else ())}
    if data.template:
        chat = Chat(tokenizer)
        if chat.sha256 != data.template:
            raise ValueError(
                f"{data} was rendered with template {data.template[:12]}, its tokenizer has {chat.sha256[:12]}; prepare again"
            )
        stops |= chat.stop_ids()
    saved = {
        "kind": "lm",
        "model": model.config.stored(),
        "tokenizer": tokenizer.fingerprint,
        "stop_ids": sorted(stops),
    }
    saved |= {"template": data.template} | (stored_of(cfg, base.digest) if base else {})
    return saved


def announce(language_model: LanguageModel, loaders: tuple, total: int, cfg: Config, dist: Dist) -> None:
    trained = sum(p.numel() for p in language_model.parameters() if p.requires_grad)
    train, validation = loaders
    say(f"training on {train.summary}; validation on {validation.summary}", dist.is_main)
    what = "answers" if train.loss == "answers" else "all tokens"
    say(
        f"{trained:,} parameters, loss on {what}, {total:,} steps of {cfg.batch}, {dist.world} process(es)",
        dist.is_main,
    )


@torch.no_grad()
def validate(
    language_model: LanguageModel, data: TextLoader, tokenizer: Tokenizer, dist: Dist, precision: Precision
) -> dict[str, float]:
    """Loss in nats per predicted token, perplexity and bits per byte over all of `data`, shared out over the ranks."""
    sizes = torch.tensor([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    total = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    with dist.whole(language_model), precision.autocast():
        for rows in list(in_order(len(data), data.batch_size))[dist.rank :: dist.world]:
            tokens, lengths, mask = (x.to(dist.device) for x in data.take(rows)[:3])
            nll = language_model(tokens, mask, lengths)
            numbers = [nll.cpu().double().sum(), torch.tensor(float(len(nll))), sizes[tokens[mask].cpu()].sum()]
            total += torch.stack(numbers)
    nats, count, size = dist.sum(total).tolist()
    bits = nats / math.log(2) / size if size else math.nan
    return {
        "validation/loss": nats / count,
        "validation/perplexity": math.exp(nats / count) if nats / count < 700 else math.inf,
        "validation/bits_per_byte": bits,
    }


def samples(model: Transformer, data: TextLoader, tokenizer: Tokenizer, stop_ids: list[int], seed: int) -> list[dict]:
    """What the model writes behind the first held-out prompts, greedily; where there are none, texts of its own."""
    batch = data.take(range(min(SAMPLES, len(data))))
    prompts = list(prompts_of(data.data, batch.rows, max(1, data.context - SAMPLE_TOKENS)))
    tokens, lengths = pad(prompts, tokenizer.pad)
    room = min(SAMPLE_TOKENS, model.config.context - int(lengths.max()))
    if room < 1:
        return []
    device = model.norm.weight.device
    uniforms = row_uniforms(seed, 0, range(len(prompts)), room)
    temperature = 0.0 if int(lengths.max()) > 1 else 1.0  # greedily, all texts of its own would be the same
    sampling = Sampling(room, stop_ids, tokenizer.pad, temperature)
    g = generate(model, tokens.to(device), lengths.to(device), sampling, uniforms)
    rows = []
    for k, answer in enumerate(batch.rows.tolist()):
        begin, end = int(g.prompt_lengths[k]), int(g.lengths[k])
        response = tokenizer.decode(g.tokens[k, begin:end].tolist())
        prompt, gold = tokenizer.decode(prompts[k].tolist()), tokenizer.decode(data.data.answer(answer).tolist())
        rows.append({"prompt": prompt, "response": response, "data": gold})
    return rows


def prompts_of(data: Examples, answers: Tensor, room: int) -> Iterator[np.ndarray]:
    """The prompts of these answers, cut from the left to so many tokens."""
    for number in data.prompt_of(answers.numpy()):
        prompt = data.prompt(number)
        yield prompt[cut(prompt, room, data.bos)]


if __name__ == "__main__":
    config.run(main)
