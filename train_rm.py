"""Train the reward model on human ratings or preferences, normalise it, and report what it knows beside its baselines.

python train_rm.py --init=out/lm --data=out/data/vader --out=out/rm
torchrun --nproc_per_node=2 train_rm.py --init=out/lm --data=out/data/vader --out=out/rm
torchrun --nproc_per_node=2 train_rm.py --init=smollm2-135m-instruct --trunk=frozen --data=out/data/smollm2 --out=out/rm
"""

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.baselines import GAPS, accuracy, baselines
from data.loader import (
    PairLoader,
    PromptBatch,
    PromptLoader,
    RatingLoader,
    SomeRows,
    TokenFile,
    in_order,
    prompts_from_rows,
    spread_rows,
)
from data.tokenizer import check_fingerprint, load_tokenizer
from data.vader import load_rules
from model.generate import generate, row_uniforms
from rlhf.frozen import FrozenStates
from rlhf.infra import checkpoint, config, distributed, optim, run
from rlhf.infra.metrics import Metrics, say
from rlhf.losses import preference_loss
from rlhf.pretrained import Pretrained, open_pretrained
from rlhf.reward_model import Fit, RewardModel, fit_heads, head_of, text_features


@dataclass(frozen=True)
class Config:
    init: str = "out/lm"  # language model whose trunk the reward model starts from, or reads
    data: str = "out/data/vader"  # directory made by data.prepare
    out: str = "out/rm"  # run directory: checkpoints, metrics.jsonl, report.json
    reset: bool = False  # draw new weights in the shape of init: shows what pretraining is worth
    # model
    trunk: Literal["full", "frozen"] = "full"  # train all of it, or fit a linear head on hidden states of init
    objective: Literal["regression", "pairs"] = "regression"  # squared error of ratings, or Bradley-Terry on pairs
    pooling: Literal["last", "mean"] = "mean"  # hidden state that the head reads: last token's, or all tokens' mean
    # frozen trunk: ridge regression of the ratings, what to read chosen by the validation split
    sentences: int | None = 1600  # at most so many training sentences, every domain with its share; none = all
    eval_sentences: int | None = 500  # at most so many of the validation and of the test split, each; none = all
    depths: tuple[int, ...] | None = None  # candidates: states above so many layers; none = 2/5 and 1/2 of them
    poolings: tuple[Literal["last", "mean"], ...] = ("mean",)  # candidates; last suffers when a text is cut off
    ridge: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)  # candidates: weight of the head's squared norm
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
    reference_samples: int | None = None  # texts; none = 512, with a frozen trunk 64
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
        config.at_least(self, sentences=2, eval_sentences=2)
        for name in ("depths", "poolings", "ridge"):
            if getattr(self, name) == ():
                raise ValueError(f"--{name} is empty: name at least one candidate")
        if min(self.ridge) <= 0:
            raise ValueError(f"--ridge={min(self.ridge)} must be above 0: there may be more features than sentences")
        if self.eval_every % self.log_every:
            raise ValueError(f"eval_every {self.eval_every} is not a multiple of log_every {self.log_every}")


FULL = "reset objective pooling epochs batch micro_batch lr warmup decay weight_decay grad_clip precision log_every eval_every"
FROZEN = ("sentences", "eval_sentences", "depths", "poolings", "ridge")
NEEDS = dict.fromkeys([*FULL.split(), "checkpoint_every"], ("trunk", "full"))
NEEDS |= dict.fromkeys(FROZEN, ("trunk", "frozen"))


def main() -> None:
    cfg = config.parse(Config, needs=NEEDS)
    dist = distributed.setup()
    TRUNKS[cfg.trunk](cfg, dist)
    dist.close()


def open_inputs(cfg: Config, device):
    """The language model, the tokenizer, the three splits in its tokens, and the checksums of model and data."""
    tokenizer = load_tokenizer(cfg.data)
    files = [TokenFile(f"{cfg.data}/{split}") for split in ("train", "validation", "test")]
    check_fingerprint(files[0].fingerprint, tokenizer.fingerprint, files[0].path)
    base = open_pretrained(cfg.init, device)
    check_fingerprint(files[0].fingerprint, base.tokenizer.fingerprint, f"{cfg.data}, with --init={cfg.init}")
    return (
        base,
        tokenizer,
        files,
        {"init_sha256": base.digest, "data_sha256": files[0].manifest["sha256"]["tokens.bin"]},
    )


# the whole trunk, by gradient descent


def train_full(cfg: Config, dist) -> None:
    precision = optim.amp(dist.device, cfg.precision)
    base, tokenizer, (train, validation, test), inputs = open_inputs(cfg, dist.device)
    references = reference_prompts(cfg, train, 512)
    reward_model = build_model(cfg, base).to(dist.device)
    optimizer = optim.make_optimizer(reward_model, cfg.lr, cfg.weight_decay, betas=(0.9, 0.95))

    state = run.resume(cfg.out, asdict(cfg) | inputs, reward_model, optimizer, precision.scaler, dist)
    first, spent = state["done"], state["seconds"]

    learner = dist.wrap(reward_model)
    loader = LOADERS[cfg.objective](train, cfg.batch, cfg.seed, dist.rank, dist.world, base.model.config.context)
    standard = float(np.mean(train.column("rating"))), float(np.std(train.column("rating")))
    total = int(cfg.epochs * loader.order.steps_per_epoch)
    if total < 1:
        raise ValueError(f"epochs {cfg.epochs} of {loader.order.steps_per_epoch} steps each is less than one step")
    log = Metrics(cfg.out, dist.is_main, first)
    saved_as = {
        "kind": "reward",
        "model": asdict(base.model.config),
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
            reward_model.normalise(reference_scores(reward_model, base, references, cfg))
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
        print(accuracy_table(rows_of(report)))
        print(f"{report['seconds']:.0f} s -> {cfg.out}")


def build_model(cfg: Config, base: Pretrained) -> RewardModel:
    generator = torch.Generator().manual_seed(cfg.seed)
    model = copy.deepcopy(base.model).requires_grad_(True)  # whose own weights may be mapped from a file
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


# a head on the frozen trunk, in closed form


def fit_frozen(cfg: Config, dist) -> None:
    """Nothing is written before the head is complete: what is interrupted starts again."""
    base, tokenizer, files, inputs = open_inputs(cfg, dist.device)
    candidates = [(depth, pooling) for depth in depths_of(cfg, base) for pooling in dict.fromkeys(cfg.poolings)]
    references = reference_prompts(cfg, files[0], 64)
    run.begin(cfg.out, asdict(cfg) | inputs, dist)
    if checkpoint.latest(cfg.out) and Path(cfg.out, "report.json").exists():
        say(accuracy_table(rows_of(json.loads(Path(cfg.out, "report.json").read_text()))), dist.is_main)
        return

    # 1. read: pooled hidden states of some sentences of every split, at all candidate depths
    states = FrozenStates(base.model).read(depth for depth, _ in candidates)
    counts = (cfg.sentences, cfg.eval_sentences, cfg.eval_sentences)
    chosen = [spread_rows(file, count, cfg.seed) for file, count in zip(files, counts)]
    features = [read_rows(states, candidates, f, rows, base.stop_ids, dist) for f, rows in zip(files, chosen)]

    # 2. fit: one head per set of at most two features; the validation split decides
    ratings = [torch.from_numpy(np.array(file.column("rating")[rows])) for file, rows in zip(files, chosen)]
    fits = fit_heads(candidates, features[0], ratings[0], features[1], ratings[1], cfg.ridge)
    reward_model = head_of(fits[0], states, base.stop_ids).to(dist.device)

    # 3. normalise, with continuations shared out over the ranks
    scores = torch.zeros(len(references.rows))
    mine = slice(dist.rank, None, dist.world)
    if len(references.rows[mine]):
        few = PromptBatch(*(x[mine] for x in references))
        scores[mine] = reference_scores(reward_model, base, few, cfg).cpu()
    reward_model.normalise(dist.sum(scores))

    # 4. save and report
    train, validation, test = [
        file if len(rows) == len(file) else SomeRows(file, rows) for file, rows in zip(files, chosen)
    ]
    if dist.is_main:
        depths, poolings = zip(*fits[0].features)
        saved_as = {
            "kind": "reward",
            "trunk": "frozen",
            "base": cfg.init,
            "base_digest": base.digest,
            "depths": depths,
            "poolings": poolings,
            "stop_ids": base.stop_ids,
            "tokenizer": tokenizer.fingerprint,
        }
        state = {"done": 1, "seconds": run.seconds_used()}
        tensors = reward_model.state_dict()
        checkpoint.save_step(cfg.out, 1, tensors, saved_as, state, files=[tokenizer.path])
        predicted = head_predictions(fits[0], candidates, features[2])
        report = {
            "accuracy": accuracy(predicted, test),
            "validation": accuracy(fits[0].predictions.numpy(), validation),
            "parameters": sum(p.numel() for p in reward_model.parameters()),
            "chosen": describe(fits[0], validation),
            "candidates": [describe(fit, validation) for fit in fits],
            "sentences": {"train": len(train), "validation": len(validation), "test": len(test)},
            "pairs": {"validation": len(validation.column("pair_gap")), "test": len(test.column("pair_gap"))},
            "reference_samples": len(scores),
            "baselines": baselines(files[0], test, load_rules(cfg.data)),
            "seconds": run.seconds_used(),
        }
        run.write_json(f"{cfg.out}/report.json", report)
        print(f"{'validation, best first':<28}{'ridge':>8}{'error':>8}{'gap 1':>8}")
        for row in report["candidates"][:8]:
            print(f"{row['features']:<28}{row['ridge']:8g}{row['error']:8.3f}{row['accuracy']['1']:8.3f}")
        print(accuracy_table(rows_of(report)))
        print(f"{len(test)} test sentences, {report['pairs']['test']} pairs; head fitted to {len(train)} sentences")
        print(f"{report['seconds']:.0f} s -> {cfg.out}")


def depths_of(cfg: Config, base: Pretrained) -> list[int]:
    """The candidate depths, each once; ValueError for one that the trunk does not have."""
    layers = base.model.config.layers
    depths = [max(1, round(layers * part)) for part in (0.4, 0.5)] if cfg.depths is None else cfg.depths
    if wrong := [depth for depth in depths if not 0 <= depth <= layers]:
        raise ValueError(
            f"--depths={config.show(tuple(wrong))}: {cfg.init} has {layers} layers, so depths 0 to {layers}"
        )
    return list(dict.fromkeys(depths))


@torch.no_grad()
def read_rows(states, candidates, data: TokenFile, rows: np.ndarray, stop_ids, dist, batch: int = 16) -> torch.Tensor:
    """Features of these rows (rows, F, D) in their order; the batches are shared out over the ranks.

    Which rows share a batch depends on their lengths alone, so the features are the same for any number of ranks.
    """
    model = states.model.config
    loader = RatingLoader(data, batch, seed=0, context=model.context)
    features = torch.zeros(len(rows), len(candidates), model.width)
    by_length = data.lengths()[rows].argsort(kind="stable")
    batches = list(in_order(len(rows), batch))[dist.rank :: dist.world]
    for i in run.steps(0, len(batches), f"states of {data.path.name}", dist):
        places = by_length[batches[i]]
        tokens, lengths, _ = (x.to(dist.device) for x in loader.take(rows[places]))
        pooled = text_features(states(tokens), candidates, tokens, lengths, stop_ids)
        features[places] = pooled.float().cpu()
    return dist.sum(features)


def head_predictions(fit: Fit, candidates: list, features: torch.Tensor) -> np.ndarray:
    """Raw scores (N,) of features (N, F, D) that were read already."""
    columns = [candidates.index(feature) for feature in fit.features]
    return (features[:, columns].flatten(1).double() @ fit.weight + fit.constant).numpy()


def describe(fit: Fit, validation) -> dict:
    names = " + ".join(f"layer {depth} {pooling}" for depth, pooling in fit.features)
    scores = accuracy(fit.predictions.numpy(), validation)
    return {"features": names, "ridge": fit.penalty, "error": fit.error, "accuracy": scores}


TRUNKS = {"full": train_full, "frozen": fit_frozen}


# normalisation and report


def reference_prompts(cfg: Config, train: TokenFile, count: int) -> PromptBatch:
    """Prompts of the samples whose scores get mean 0 and deviation 1 (Ziegler et al. 2019)."""
    starts = prompts_from_rows(train, cfg.prompt_tokens, [cfg.domain] if cfg.domain else ())
    return PromptLoader(starts, train.pad, cfg.reference_samples or count, cfg.seed).batch(0)


@torch.no_grad()
def reference_scores(reward_model, base: Pretrained, references: PromptBatch, cfg: Config) -> torch.Tensor:
    """Raw scores of continuations sampled from the base model: (N,)."""
    prompts, lengths, rows = references
    device = base.model.embed_tokens.weight.device
    uniforms = row_uniforms(cfg.seed, 0, rows.tolist(), cfg.response_tokens).to(device)
    samples = generate(
        base.model,
        prompts.to(device),
        lengths.to(device),
        cfg.response_tokens,
        uniforms,
        base.stop_ids,
        base.tokenizer.pad,
    )
    return reward_model(samples.tokens, samples.lengths)


def rows_of(report: dict) -> dict[str, dict[str, float]]:
    return {"reward model": report["accuracy"], **report["baselines"]}


def accuracy_table(rows: dict[str, dict[str, float]]) -> str:
    """Pairwise accuracy on the test split, one line per scorer, one column per rating gap."""
    head = f"{'test accuracy, rating gap':<28}" + "".join(f"{gap:>8}" for gap in GAPS)
    lines = [f"{name:<28}" + "".join(f"{row[gap]:8.3f}" for gap in GAPS) for name, row in rows.items()]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    config.run(main)
