"""Train the reward model on human ratings or preferences, normalise it, and report what it knows beside its baselines.

python train_rm.py --init=out/lm --data=out/data/vader --out=out/rm
torchrun --nproc_per_node=2 train_rm.py --init=out/lm --data=out/data/vader --out=out/rm
"""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from data.baselines import GAPS, accuracy, baselines
from data.loader import PairLoader, PromptBatch, PromptLoader, RatingLoader, TokenFile, in_order, prompts_from_rows
from data.tokenizer import check_fingerprint, load_tokenizer
from data.vader import load_rules
from model.generate import generate, row_uniforms
from rlhf.infra import checkpoint, config, distributed, optim, run
from rlhf.infra.metrics import Metrics
from rlhf.language_model import load_language_model
from rlhf.losses import preference_loss
from rlhf.reward_model import RewardModel


@dataclass(frozen=True)
class Config:
    init: str = "out/lm"  # language model whose trunk the reward model starts from
    data: str = "out/data/vader"  # directory made by data.prepare
    out: str = "out/rm"  # run directory: checkpoints, metrics.jsonl, report.json
    reset: bool = False  # draw new weights in the shape of init: shows what pretraining is worth
    # model
    objective: Literal["regression", "pairs"] = "regression"  # squared error of ratings, or Bradley-Terry on pairs
    pooling: Literal["last", "mean"] = "mean"  # hidden state that the head reads: last token's, or all tokens' mean
    # optimisation
    epochs: float = 2.0  # passes over the training split
    batch: int = 32  # sentences (or pairs) per optimiser step, over all ranks
    micro_batch: int | None = None  # sentences (or pairs) per forward on one rank; none = all of its share
    lr: float = 1e-3  # peak learning rate
    warmup: int = 50  # steps of linear warm-up
    decay: Literal["linear", "cosine", "constant"] = "cosine"  # learning rate after the warm-up
    weight_decay: float = 0.1  # AdamW, on matrices alone
    grad_clip: float = 1.0  # largest global gradient norm; 0 = unclipped
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast type; bf16 and fp16 need CUDA
    seed: int = 1  # of the head, the order of the data and the reference samples
    # normalisation: continuations by init, whose scores get mean 0 and deviation 1
    reference_samples: int = 512  # texts
    domain: str | None = "film"  # prompts from this domain alone; none = all
    prompt_tokens: int = 4  # text tokens of a prompt, after bos
    response_tokens: int = 24  # longest response, tokens
    # report
    log_every: int = 50  # steps between lines of metrics.jsonl
    eval_every: int = 500  # steps between validation accuracies, a multiple of log_every
    checkpoint_every: int = 500  # steps between checkpoints

    def __post_init__(self):
        config.at_least(self, epochs=0, batch=1, micro_batch=1, lr=0, warmup=0, weight_decay=0, grad_clip=0, seed=0)
        config.at_least(self, reference_samples=2, prompt_tokens=1, response_tokens=1)
        config.at_least(self, log_every=1, eval_every=1, checkpoint_every=1)
        if self.eval_every % self.log_every:
            raise ValueError(f"eval_every {self.eval_every} is not a multiple of log_every {self.log_every}")


def main() -> None:
    cfg = config.parse(Config)
    dist = distributed.setup()
    precision = optim.amp(dist.device, cfg.precision)
    tokenizer = load_tokenizer(cfg.data)
    train, validation, test = (TokenFile(f"{cfg.data}/{split}") for split in ("train", "validation", "test"))
    check_fingerprint(train.fingerprint, tokenizer.fingerprint, train.path)
    starts = prompts_from_rows(train, cfg.prompt_tokens, [cfg.domain] if cfg.domain else ())
    references = PromptLoader(starts, train.pad, cfg.reference_samples, cfg.seed).batch(0)
    base = load_language_model(cfg.init, tokenizer.fingerprint, dist.device)
    reward_model = build_model(cfg, tokenizer).to(dist.device)
    optimizer = optim.make_optimizer(reward_model, cfg.lr, cfg.weight_decay, betas=(0.9, 0.95))

    inputs = {"init_sha256": checkpoint.digest(cfg.init), "data_sha256": train.manifest["sha256"]["tokens.bin"]}
    state = run.resume(cfg.out, asdict(cfg) | inputs, reward_model, optimizer, precision.scaler, dist)
    first, spent = state["done"], state["seconds"]

    learner = dist.wrap(reward_model)
    loader = LOADERS[cfg.objective](train, cfg.batch, cfg.seed, dist.rank, dist.world, base.config.context)
    standard = float(np.mean(train.column("rating"))), float(np.std(train.column("rating")))
    total = int(cfg.epochs * loader.order.steps_per_epoch)
    if total < 1:
        raise ValueError(f"epochs {cfg.epochs} of {loader.order.steps_per_epoch} steps each is less than one step")
    log = Metrics(cfg.out, dist.is_main, first)
    saved_as = {
        "kind": "reward",
        "model": asdict(base.config),
        "pooling": cfg.pooling,
        "tokenizer": tokenizer.fingerprint,
    }

    for step in run.steps(first, total, "rm", dist):
        batch = [x.to(dist.device) for x in loader.batch(step)]
        micro_batch = cfg.micro_batch or len(batch[0])
        loss = 0.0
        for start in range(0, len(batch[0]), micro_batch):
            rows = [x[start : start + micro_batch] for x in batch]
            with dist.grad_sync(learner, on=start + micro_batch >= len(batch[0])):
                with precision.autocast():
                    part = LOSSES[cfg.objective](learner, rows, standard).sum() / cfg.batch
                precision.scaler.scale(part * dist.loss_scale).backward()
            loss = loss + part.detach()
        lr = optim.schedule(step, total, cfg.warmup, cfg.lr, cfg.decay)
        optim.set_lr(optimizer, lr)
        grad_norm = optim.step(optimizer, reward_model, precision.scaler, cfg.grad_clip)

        done = step + 1
        if done % cfg.log_every == 0 or done == total:
            record = {"loss/train": float(dist.sum(loss)), "grad_norm": grad_norm, "lr": lr}
            if done % cfg.eval_every == 0:
                scores = score_rows(reward_model, validation, dist)
                record["validation/accuracy"] = accuracy(scores, validation)["all"]
            log.log(step, record)
        if done == total:
            normalise(reward_model, base, references, tokenizer, cfg, dist)
        if done % cfg.checkpoint_every == 0 or done == total:
            state = {"done": done, "seconds": run.seconds_used(spent)}
            run.save(cfg.out, state, saved_as, reward_model, optimizer, precision.scaler, [tokenizer.path], dist)

    report = {
        "accuracy": accuracy(score_rows(reward_model, test, dist), test),
        "validation": accuracy(score_rows(reward_model, validation, dist), validation),
        "parameters": sum(p.numel() for p in reward_model.parameters()),
    }
    if dist.is_main:
        report["baselines"] = baselines(train, test, load_rules(cfg.data))
        report["seconds"] = run.seconds_used(spent)
        run.write_json(f"{cfg.out}/report.json", report)
        print(accuracy_table({"reward model": report["accuracy"], **report["baselines"]}))
        print(f"{report['seconds']:.0f} s -> {cfg.out}")
    dist.close()


def build_model(cfg: Config, tokenizer) -> RewardModel:
    generator = torch.Generator().manual_seed(cfg.seed)
    model = load_language_model(cfg.init, tokenizer.fingerprint)
    if cfg.reset:
        model.init_weights(generator)
    return RewardModel(model, cfg.pooling, generator)


def regression(learner, batch: list[torch.Tensor], standard: tuple[float, float]) -> torch.Tensor:
    """Half the squared error of every rating, standardised by the training split's mean and deviation: (B,)."""
    tokens, lengths, ratings = batch
    mean, deviation = standard
    return (learner(tokens, lengths) - (ratings - mean) / deviation) ** 2 / 2


def pairs(learner, batch: list[torch.Tensor], standard: tuple[float, float]) -> torch.Tensor:
    """Bradley-Terry loss of every pair (B,); both sides go through one forward."""
    chosen, chosen_lengths, rejected, rejected_lengths, _ = batch
    width = max(chosen.shape[1], rejected.shape[1])
    both = torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (chosen, rejected)])
    scores = learner(both, torch.cat([chosen_lengths, rejected_lengths]))
    return preference_loss(*scores.chunk(2))


LOADERS = {"regression": RatingLoader, "pairs": PairLoader}
LOSSES = {"regression": regression, "pairs": pairs}


@torch.no_grad()
def score_rows(reward_model: RewardModel, data: TokenFile, dist, batch: int = 64) -> np.ndarray:
    """Raw score of every row (N,), shared out over the ranks and added up again."""
    loader = RatingLoader(data, batch, seed=0, context=reward_model.model.config.context)
    scores = torch.zeros(len(data), dtype=torch.float64)
    by_length = data.lengths().argsort(kind="stable")  # rows of equal length share a batch: less padding
    for places in list(in_order(len(data), batch))[dist.rank :: dist.world]:
        rows = by_length[places]
        tokens, lengths, _ = loader.take(rows)
        scores[rows] = reward_model(tokens.to(dist.device), lengths.to(dist.device)).double().cpu()
    return dist.sum(scores).numpy()


def normalise(reward_model, base, references: PromptBatch, tokenizer, cfg: Config, dist) -> None:
    """Put the scores of continuations sampled from the base model at mean 0, deviation 1 (Ziegler et al. 2019)."""
    prompts, lengths, rows = references
    uniforms = row_uniforms(cfg.seed, 0, rows.tolist(), cfg.response_tokens).to(dist.device)
    samples = generate(
        base,
        prompts.to(dist.device),
        lengths.to(dist.device),
        cfg.response_tokens,
        uniforms,
        tokenizer.eos,
        tokenizer.pad,
    )
    with torch.no_grad():
        reward_model.normalise(reward_model(samples.tokens, samples.lengths))


def accuracy_table(rows: dict[str, dict[str, float]]) -> str:
    """Pairwise accuracy on the test split, one line per scorer, one column per rating gap."""
    head = f"{'test accuracy, rating gap':<28}" + "".join(f"{gap:>8}" for gap in GAPS)
    lines = [f"{name:<28}" + "".join(f"{row[gap]:8.3f}" for gap in GAPS) for name, row in rows.items()]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    config.run(main)
