"""Direct preference optimisation: the policy learns from pairs of answers itself, without a reward model or sampling.

python train_dpo.py --init=out/sft --data=out/data/pairs --out=out/dpo
torchrun --nproc_per_node=2 train_dpo.py --init=out/sft --data=out/data/pairs --out=out/dpo --layout=adapters

Rafailov et al. 2023 (arXiv:2305.18290). With log-probs summed over the answer, r = beta log(pi / ref):

    dpo   -p log sigmoid(r_w - r_l) - (1 - p) log sigmoid(r_l - r_w)     losses.dpo_loss; p of the data, 1 for a plain choice
    ipo   ((r_w - r_l) / beta - 1 / (2 beta))^2                          losses.ipo_loss (arXiv:2310.12036)

The reference is the model that training starts from, in every layout; a run without a reference (reference_free in other
trainers) is not DPO and is not offered. The same pairs, layouts and checkpoints as train_rm.py and train_ppo.py, so that
evaluate.py puts all of them on one frontier of reward against KL. On a CPU rows stand one after the other where that
saves enough, without padding, and a long prompt is read once for both answers.
"""

from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from data.loader import PairBatch, PairLoader, in_order, open_data, shard, total_steps
from data.tokenizer import Tokenizer, check_fingerprint, load_tokenizer
from model.transformer import recompute_blocks
from rlhf.infra import config, distributed, offload, optim
from rlhf.infra.brakes import Brakes
from rlhf.infra.distributed import Dist
from rlhf.infra.metrics import Metrics, say
from rlhf.infra.optim import Precision
from rlhf.infra.precision import PrecisionName, settled, stored_dtype
from rlhf.infra.run import Run, write_json
from rlhf.lm.pretrained import Pretrained, open_pretrained, policy_config
from rlhf.lm.trunks import lora_of
from rlhf.losses import dpo_loss, ipo_loss
from rlhf.ppo.roles import LAYOUTS, Roles
from rlhf.replay import dpo as replay
from rlhf.replay.texts import rows_of


@dataclass(frozen=True)
class Config:
    init: str = "out/sft"  # language model to start from; it is also the reference
    data: str = "out/data/pairs"  # directory made by data.prepare with pairs; or several with weights, a:0.7,b:0.3
    out: str = "out/dpo"  # run directory: checkpoints, metrics.jsonl, report.json
    sources: tuple[str, ...] = ()  # only pairs from these sources of the data; none given = all
    context: int | None = None  # longest prompt and answer, tokens; none = what init reads
    # objective
    loss: Literal["dpo", "ipo"] = "dpo"  # the larger the margin the better, or a margin of 1 / (2 beta)
    beta: float = 0.1  # weight of KL(policy || reference), per nat; small = far from the reference
    label_smoothing: float = 0.0  # share of the pairs that may be the wrong way round (cDPO) [loss=dpo]
    # what is trained
    layout: Literal["full", "adapters", "branch"] = "full"  # all weights, LoRA, or copies of the top layers
    lora_rank: int = 16  # of the adapters [layout=adapters]
    lora_alpha: float = 32.0  # their update is scaled by lora_alpha / lora_rank [layout=adapters]
    lora_targets: tuple[str, ...] | None = None  # last names of adapted layers; none = all linear [layout=adapters]
    branch_layers: int = 4  # top layers that are copied and trained [layout=branch]
    # optimisation
    epochs: float = 1.0  # passes over the training pairs
    batch: int = 16  # pairs per optimiser step, over all ranks
    micro_batch: int | None = None  # pairs per forward on one rank; none = all of its share
    micro_batch_tokens: int | None = None  # instead: pairs of like length, so many tokens with their padding
    recompute: bool = False  # compute each block again for the backward pass: less memory, more time
    offload: tuple[Literal["reference"], ...] = ()  # rests in the host's memory, or a file, until asked [layout=full]
    lr: float = 1e-5  # peak learning rate
    warmup: int = 10  # steps of linear warm-up
    decay: Literal["linear", "cosine", "constant"] = "linear"  # learning rate after the warm-up
    weight_decay: float = 0.0  # AdamW, on matrices alone
    grad_clip: float = 1.0  # largest global gradient norm; 0 = unclipped
    max_bad_steps: int = 3  # steps in a row, skipped for a number that is not finite, that end the run
    precision: PrecisionName = "auto"  # of matrix products; auto = bf16 where that is fast, and a run keeps its own
    seed: int = 1  # of the adapters and the order of the pairs
    # several processes
    shard: bool = False  # every rank keeps a part of weights, gradients and moments (FSDP), and not all of them
    replicas: int = 1  # copies of the weights, each over a part of the ranks: one a machine, say [shard=true]
    # report
    log_every: int = 10  # steps between lines of metrics.jsonl
    eval_every: int = 100  # steps between validations, a multiple of log_every
    checkpoint_every: int = 100  # steps between checkpoints
    keep_checkpoints: int | None = 2  # newest checkpoints that stay; none = all, for a frontier of reward and KL
    override: tuple[str, ...] = ()  # options that may differ from those that the run in out was started with

    def __post_init__(self):
        config.at_least(self, context=2, beta=1e-6, label_smoothing=0, lora_rank=1, lora_alpha=0, branch_layers=1)
        config.at_least(self, epochs=0, batch=1, micro_batch=1, lr=0, warmup=0, weight_decay=0, grad_clip=0, seed=0)
        config.at_least(self, log_every=1, eval_every=1, checkpoint_every=1, keep_checkpoints=1)
        config.at_least(self, max_bad_steps=1, micro_batch_tokens=2)
        config.at_most_one(self, "micro_batch", "micro_batch_tokens")
        if self.eval_every % self.log_every:
            raise ValueError(f"eval_every {self.eval_every} is not a multiple of log_every {self.log_every}")
        if self.label_smoothing >= 0.5:
            raise ValueError(f"--label_smoothing={self.label_smoothing} must be below 0.5, where labels say nothing")


def main() -> None:
    cfg = config.parse(Config)
    dist = distributed.setup(cfg.shard, cfg.replicas)
    cfg = settled(cfg, dist)
    precision = optim.amp(dist.device, cfg.precision)
    base = open_pretrained(cfg.init, dist.device)
    tokenizer, loader, held_out = open_pairs(cfg, base)
    roles = LAYOUTS[cfg.layout](base.model.eval(), "none", 1.0, lora_of(cfg), cfg.branch_layers, dist.copied)
    roles.store(stored_dtype(cfg, precision))
    recompute_blocks(roles.policy, cfg.recompute)
    asleep = base.model.parameters if cfg.offload else tuple
    resting = offload.Sleeper(asleep, offload.elsewhere(dist.device, cfg.out), frozen=True)
    roles = replace(roles, reference=resting.awake()(roles.reference))
    total = total_steps(cfg.epochs, loader.order.steps_per_epoch)
    learner = dist.wrap(roles.policy)
    dist.rest(base.model)
    optimizer = optim.make_optimizer(roles.policy, cfg.lr, cfg.weight_decay, betas=(0.9, 0.999))
    inputs = {"init_sha256": base.digest, "data_sha256": loader.data.digest}
    options, files = asdict(cfg) | inputs, [tokenizer.path]
    saved_as = policy_config(base, cfg, base.stop_ids)
    old = config.defaults(Config)  # where a run is older than an option
    run = Run(
        cfg.out, options, roles.policy, optimizer, precision.scaler, dist, saved_as, files, cfg.keep_checkpoints, old
    )
    say(f"training on {loader.summary}; validation on {held_out.summary}", dist.is_main)
    resting.sleep()
    fit(cfg, roles, resting, learner, optimizer, loader, held_out, tokenizer, total, run, precision, dist)
    dist.close()


def fit(
    cfg: Config,
    roles: Roles,
    resting: offload.Sleeper,
    learner,
    optimizer,
    loader,
    held_out,
    tokenizer,
    total: int,
    run: Run,
    precision,
    dist: Dist,
) -> None:
    """The loop: one optimiser step a batch of pairs; validation and a report."""
    log, brakes = Metrics(cfg.out, dist.is_main, run.done, CONSOLE), Brakes(run, optimizer, cfg.max_bad_steps)
    for step in run.steps(total, "dpo"):
        pairs = shard(loader.order.rows(step), dist.rank, dist.world)
        weight = dist.sum(loader.weights(pairs).sum().double())
        parts, sums = loader.forwards(step, dist.world, cfg.micro_batch, cfg.micro_batch_tokens), 0.0
        for part in parts:
            batch = loader.take(pairs[part.numpy()])
            with dist.grad_sync(learner, on=part is parts[-1]):
                with precision.autocast():
                    loss, numbers = pair_losses(learner, roles, batch, cfg, dist.device)
                precision.scaler.scale(loss.sum() / weight * dist.loss_scale).backward()
            sums = sums + numbers.detach().sum(0)
        lr = optim.schedule(step, total, cfg.warmup, cfg.lr, cfg.decay)
        optim.set_lr(optimizer, lr)
        grad_norm = optim.step(optimizer, roles.policy, precision.scaler, cfg.grad_clip)
        if not brakes.took(grad_norm, sums[0], precision.scaler):
            few = cfg.micro_batch or min(map(len, parts))
            skip(brakes, roles, loader.take(loader.order.rows(step)), step, few, cfg, precision, tokenizer)

        done = step + 1
        if done % cfg.log_every == 0 or done == total or brakes.ended:
            means = (dist.sum(sums) / weight).tolist()
            record = dict(zip(NUMBERS, means)) | {"policy/grad_norm": grad_norm, "lr": lr, "bad/steps": brakes.count()}
            if done % cfg.eval_every == 0 and done < total and not brakes.ended:
                record |= validate(roles, resting, held_out, cfg, dist, precision)
            log.log(step, record | {"episode": done * cfg.batch})
        brakes.check()
        if run.due(done, cfg.checkpoint_every, total):
            run.save(done, **brakes.state())

    report = {"steps": total, **validate(roles, resting, held_out, cfg, dist, precision), "seconds": run.seconds}
    if dist.is_main:
        write_json(f"{cfg.out}/report.json", report)
        print(
            f"held-out pairs: accuracy {report['validation/accuracy']:.3f}, margin {report['validation/margin']:.3f}, "
            f"{report['seconds']:.0f} s -> {cfg.out}"
        )


def skip(
    brakes: Brakes, roles: Roles, batch: PairBatch, step: int, micro_batch: int, cfg: Config, precision, tokenizer
) -> None:
    """Count and store a step that cannot be taken; the batch is that of all ranks."""
    device = brakes.run.dist.device
    pairs = {name: getattr(batch, name).to(device) for name in replay.FIELDS}
    brakes.skip(
        f"{step:06d}",
        step,
        replay.step_formulas(roles, pairs, asdict(cfg) | {"micro_batch": micro_batch}, precision),
        lambda: pairs,
        lambda: rows_of(tokenizer, batch.tokens, batch.lengths),
        "the gradient is not finite",
        script="train_dpo.py",
        rows=batch.rows.tolist(),
        micro_batch=micro_batch,
    )


NUMBERS = ("loss/policy", "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy")
NUMBERS += ("logps/chosen", "logps/rejected")
CONSOLE = NUMBERS[:1] + NUMBERS[3:5]


def pair_losses(learner, roles: Roles, batch: PairBatch, cfg: Config, device) -> tuple[Tensor, Tensor]:
    """Loss times weight of each of B pairs, (B,), and NUMBERS times weight, (B, 7): rewards are beta log(pi / ref), nats."""
    tokens, lengths, prompts = (x.to(device) for x in (batch.tokens, batch.lengths, batch.prompt_lengths))
    t = torch.arange(tokens.shape[1], device=device)
    mask = (t >= prompts[:, None]) & (t < lengths[:, None])  # (2B, T) the answers
    with torch.no_grad():
        features = roles.features(tokens, lengths)
        reference = roles.reference(tokens, mask, features).sum(1)  # (2B,)
    policy = learner(tokens, mask, features).logprobs.sum(1)  # (2B,)
    sides = (policy[0::2], policy[1::2], reference[0::2], reference[1::2])  # winner and loser, (B,) each
    p, weight = batch.p.to(device), batch.weight.to(device)
    if cfg.loss == "ipo":
        loss = ipo_loss(*sides, cfg.beta)
    else:
        loss = dpo_loss(*sides, cfg.beta, label=p * (1 - cfg.label_smoothing) + (1 - p) * cfg.label_smoothing)
    chosen, rejected = cfg.beta * (sides[0] - sides[2]), cfg.beta * (sides[1] - sides[3])
    right = (chosen > rejected).to(chosen.dtype)
    numbers = torch.stack([loss, chosen, rejected, chosen - rejected, right, *sides[:2]], 1)
    return loss * weight, (numbers * weight[:, None]).to(torch.float32 if device.type == "mps" else torch.float64)


@torch.no_grad()
def validate(
    roles: Roles, resting: offload.Sleeper, data: PairLoader, cfg: Config, dist: Dist, precision: Precision
) -> dict[str, float]:
    """Loss, margin and accuracy over all held-out pairs, shared out over the ranks."""
    total = torch.zeros(len(NUMBERS) + 1, dtype=torch.float64)
    with resting.awake(), dist.whole(roles.policy, roles.frozen.model), precision.autocast():
        for rows in list(in_order(len(data), data.batch_size))[dist.rank :: dist.world]:
            batch = data.take(rows)
            _, numbers = pair_losses(roles.policy, roles, batch, cfg, dist.device)
            total += torch.cat([numbers.sum(0).cpu(), batch.weight.double().sum()[None]])
    means = dist.sum(total)
    means = dict(zip(NUMBERS, (means[:-1] / means[-1]).tolist()))
    return {
        "validation/loss": means["loss/policy"],
        "validation/margin": means["rewards/margin"],
        "validation/accuracy": means["rewards/accuracy"],
    }


def open_pairs(cfg: Config, base: Pretrained) -> tuple[Tokenizer, PairLoader, PairLoader]:
    """The tokenizer beside the data, which is the model's, and the pairs of training and of validation."""
    train, validation = (open_data(cfg.data, split) for split in ("train", "validation"))
    tokenizer = load_tokenizer(train.paths[0].parent)
    check_fingerprint(train.fingerprint, tokenizer.fingerprint, str(train))
    check_fingerprint(train.fingerprint, base.tokenizer.fingerprint, cfg.init)
    for data in (train, validation):
        if not data.pairs:
            raise ValueError(f"{data} has no pairs of answers, which DPO learns from; prepare preferences")
    longest = base.model.config.context
    if cfg.context is not None and cfg.context > longest:
        raise ValueError(f"--context={cfg.context}: {cfg.init} reads at most {longest} tokens")
    how = dict(context=cfg.context or longest, sources=cfg.sources)
    loader, held_out = PairLoader(train, cfg.batch, cfg.seed, **how), PairLoader(validation, 32, cfg.seed, **how)
    if cfg.batch > len(loader):
        raise ValueError(f"--batch={cfg.batch}: {loader.summary}; use at most {len(loader)}")
    return tokenizer, loader.with_room(cfg.micro_batch_tokens), held_out


if __name__ == "__main__":
    config.run(main)
