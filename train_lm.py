"""Pretrain a language model on token files: next-token loss over every real token.

python train_lm.py --data=out/data/vader --out=out/lm
torchrun --nproc_per_node=2 train_lm.py --data=out/data/vader --out=out/lm
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from data.loader import SentenceLoader, TokenFile, in_order
from data.tokenizer import check_fingerprint, load_tokenizer
from model.transformer import ModelConfig, Transformer
from rlhf.infra import config, distributed, optim
from rlhf.infra.files import write_json
from rlhf.infra.metrics import Metrics
from rlhf.infra.run import Run
from rlhf.lm.language_model import LanguageModel
from rlhf.lm.pretrained import digest_of, open_pretrained


@dataclass(frozen=True)
class Config:
    data: str = "out/data/vader"  # directory made by data.prepare
    out: str = "out/lm"  # run directory: checkpoints, metrics.jsonl, report.json
    init: str | None = None  # run, HF directory, GGUF file or model's name to start from; none = random, as below
    # shape of a new model
    width: int = 128  # size of the hidden states [init=none]
    layers: int = 4  # transformer blocks [init=none]
    heads: int = 4  # query heads [init=none]
    kv_heads: int | None = None  # key and value heads; none = as many as heads [init=none]
    ffn: int | None = None  # width of the MLP; none = 8/3 of width [init=none]
    context: int = 256  # longest sequence, tokens [init=none]
    # optimisation
    epochs: float = 4.0  # passes over the training split
    batch: int = 32  # sentences per optimiser step, over all ranks
    micro_batch: int | None = None  # sentences per forward on one rank; none = all of its share
    lr: float = 3e-3  # peak learning rate
    warmup: int = 50  # steps of linear warm-up
    decay: Literal["linear", "cosine", "constant"] = "cosine"  # learning rate after the warm-up
    weight_decay: float = 0.1  # AdamW, on matrices alone
    grad_clip: float = 1.0  # largest global gradient norm
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast type; bf16 and fp16 need CUDA
    seed: int = 1  # of the weights and of the order of the data
    # report
    log_every: int = 50  # steps between lines of metrics.jsonl
    eval_every: int = 500  # steps between validation losses, a multiple of log_every
    checkpoint_every: int = 250  # steps between checkpoints
    override: tuple[str, ...] = ()  # options that may differ from those that the run in out was started with

    def __post_init__(self):
        config.at_least(self, width=1, layers=1, heads=1, kv_heads=1, ffn=1, context=2, batch=1, micro_batch=1, seed=0)
        config.at_least(self, epochs=0, lr=0, warmup=0, weight_decay=0, grad_clip=0)
        config.at_least(self, log_every=1, eval_every=1, checkpoint_every=1)
        if self.eval_every % self.log_every:
            raise ValueError(f"eval_every {self.eval_every} is not a multiple of log_every {self.log_every}")


def main() -> None:
    cfg = config.parse(Config)
    dist = distributed.setup()
    precision = optim.amp(dist.device, cfg.precision)
    tokenizer = load_tokenizer(cfg.data)
    train, validation = (TokenFile(f"{cfg.data}/{split}") for split in ("train", "validation"))
    check_fingerprint(train.fingerprint, tokenizer.fingerprint, train.path)
    if not len(validation):
        raise ValueError(f"{validation.path} has 0 rows: there is nothing to measure the model on; prepare more text")
    model, stop_ids = build_model(cfg, tokenizer)
    model = model.to(dist.device)
    optimizer = optim.make_optimizer(model, cfg.lr, cfg.weight_decay, betas=(0.9, 0.95))

    inputs = {"data_sha256": train.manifest["sha256"]["tokens.bin"]}
    inputs |= {"init_sha256": digest_of(cfg.init)} if cfg.init else {}
    saved_as = {"kind": "lm", "model": model.config.stored(), "tokenizer": tokenizer.fingerprint, "stop_ids": stop_ids}
    options, files = asdict(cfg) | inputs, [tokenizer.path]
    run = Run(cfg.out, options, model, optimizer, precision.scaler, dist, saved_as, files)

    language_model = LanguageModel(model)
    learner = dist.wrap(language_model)
    context = model.config.context
    loader = SentenceLoader(train, cfg.batch, cfg.seed, dist.rank, dist.world, context)
    held_out = SentenceLoader(validation, 64, cfg.seed, context=context)
    total = int(cfg.epochs * loader.order.steps_per_epoch)
    if total < 1:
        raise ValueError(f"epochs {cfg.epochs} of {loader.order.steps_per_epoch} steps each is less than one step")
    log = Metrics(cfg.out, dist.is_main, run.done)
    if dist.is_main:
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{parameters:,} parameters, {len(train):,} sentences, {total:,} steps of {cfg.batch}, {dist.world} process(es)"
        )

    for step in run.steps(total, "lm"):
        batch = loader.batch(step)
        tokens, mask = batch.tokens.to(dist.device), batch.mask.to(dist.device)
        count, nll = dist.sum(mask.sum()), 0.0
        micro_batch = cfg.micro_batch or len(tokens)
        for start in range(0, len(tokens), micro_batch):
            rows = slice(start, start + micro_batch)
            with dist.grad_sync(learner, on=start + micro_batch >= len(tokens)):
                with precision.autocast():
                    loss = learner(tokens[rows], mask[rows]).sum() / count
                precision.scaler.scale(loss * dist.loss_scale).backward()
            nll = nll + loss.detach()
        lr = optim.schedule(step, total, cfg.warmup, cfg.lr, cfg.decay)
        optim.set_lr(optimizer, lr)
        grad_norm = optim.step(optimizer, model, precision.scaler, cfg.grad_clip)

        done = step + 1
        if done % cfg.log_every == 0 or done == total:
            record = {"loss/train": float(dist.sum(nll)), "grad_norm": grad_norm, "lr": lr}
            if done % cfg.eval_every == 0 and done < total:
                record |= validate(language_model, held_out, dist)
            log.log(step, record)
        if run.due(done, cfg.checkpoint_every, total):
            run.save(done)

    report = {"steps": total, **validate(language_model, held_out, dist), "seconds": run.seconds}
    if dist.is_main:
        write_json(f"{cfg.out}/report.json", report)
        print(
            f"validation perplexity {report['validation/perplexity']:.1f}, "
            f"{report['validation/bits_per_byte']:.3f} bits per byte, {report['seconds']:.0f} s -> {cfg.out}"
        )
    dist.close()


def build_model(cfg: Config, tokenizer) -> tuple[Transformer, tuple[int, ...]]:
    """The model that training starts from, and the ids that end its texts."""
    if cfg.init:
        base = open_pretrained(cfg.init)
        check_fingerprint(tokenizer.fingerprint, base.tokenizer.fingerprint, cfg.init)
        return base.model.requires_grad_(True), base.stop_ids
    names = ("width", "layers", "heads", "kv_heads", "ffn", "context")
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **{n: getattr(cfg, n) for n in names}))
    model.init_weights(torch.Generator().manual_seed(cfg.seed))
    return model, (tokenizer.eos,)


@torch.no_grad()
def validate(language_model: LanguageModel, data: SentenceLoader, dist) -> dict[str, float]:
    """Loss in nats per token, perplexity and bits per byte over all of `data`, shared out over the ranks."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for rows in list(in_order(len(data), data.batch_size))[dist.rank :: dist.world]:
        batch = data.take(rows)
        nll = language_model(batch.tokens.to(dist.device), batch.mask.to(dist.device))
        total, count = total + nll.double().sum().cpu(), count + len(nll)
    total, count = dist.sum(total), dist.sum(torch.tensor(count))
    nll = float(total / count)
    bits = float(total) / math.log(2) / sum(len(text.encode()) for text in data.file.texts)
    return {"validation/loss": nll, "validation/perplexity": math.exp(nll), "validation/bits_per_byte": bits}


if __name__ == "__main__":
    config.run(main)
