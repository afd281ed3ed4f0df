"""Train the reward model on human ratings or preferences, normalise and calibrate it, and report what it knows.

python train_rm.py --init=out/lm --data=out/data/vader --out=out/rm
torchrun --nproc_per_node=2 train_rm.py --init=out/lm --data=out/data/vader --out=out/rm
torchrun --nproc_per_node=2 train_rm.py --init=smollm2-135m-instruct --trunk=frozen --data=out/data/smollm2 --out=out/rm
torchrun --nproc_per_node=2 train_rm.py --init=smollm2-135m-instruct --trunk=adapters --depth=15 --data=out/data/smollm2
python train_rm.py --average=out/rm-a,out/rm-b --init=out/lm --data=out/data/vader --out=out/rm-mean
python train_rm.py --preferences=out/data/votes --init=out/lm --data=out/data/vader --out=out/rm-votes
"""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from data.baselines import accuracy
from data.examples import Examples
from data.loader import (
    GroupBatch,
    GroupLoader,
    PairBatch,
    PairLoader,
    ScoredBatch,
    ScoredLoader,
    open_data,
    shard,
    total_steps,
)
from data.pairs import MOST_PAIRS, MOST_TRAINING_PAIRS, SomeAnswers, made_pairs, some_prompts
from data.text import SPLITS
from data.tokenizer import Tokenizer, check_fingerprint, load_tokenizer
from model.half import store, store_all
from model.transformer import recompute_blocks
from rlhf.infra import checkpoint, config, distributed, optim
from rlhf.infra.brakes import Brakes
from rlhf.infra.distributed import Dist
from rlhf.infra.files import read_json, write_json
from rlhf.infra.metrics import Metrics, say
from rlhf.infra.precision import PrecisionName, settled, stored_dtype
from rlhf.infra.run import Run, begin, seconds_used, steps
from rlhf.lm.frozen import FrozenStates
from rlhf.lm.pretrained import Pretrained, open_pretrained
from rlhf.lm.trunks import lora_of
from rlhf.replay import rm as replay
from rlhf.replay.rm import Part
from rlhf.replay.texts import rows_of
from rlhf.reward.files import NORMALISATION, average, in_half, restored
from rlhf.reward.finish import (
    References,
    accuracy_table,
    agreement,
    batches_of,
    in_words,
    normalise_and_calibrate,
    raw_scores,
    read,
    references_from,
    report_of,
)
from rlhf.reward.model import Ensemble, Feature, Normalised, RewardModel, adapted_trunk, stretch, text_features
from rlhf.reward.objective import Objective, Texts, coefficients, reward_losses
from rlhf.reward.ridge import Fit, Judged, fit_heads, head_of, refitted

Trunk = Literal["full", "frozen", "adapters"]
Pooling = Literal["last", "mean", "attention"]
Poolings = tuple[Literal["last", "mean"], ...]
Combine = Literal["mean", "min", "uncertainty"]
Objectives = Literal["regression", "labels", "pairs", "joint"] | None
Names = tuple[str, ...] | None
Depths = tuple[int, ...] | None


@dataclass(frozen=True)
class Config:
    init: str = "out/lm"  # language model whose trunk the reward model starts from, or reads
    data: str = "out/data/vader"  # directory made by data.prepare
    out: str = "out/rm"  # run directory: checkpoints, metrics.jsonl, report.json
    labels: Literal["rating", "half_a", "half_b"] = "rating"  # mean of all raters, or of one half; all splits
    preferences: str | None = None  # directory of data.prepare preferences: pairs beside the ratings [average=none]
    preference_coef: float = 1.0  # weight of one of these pairs (Bradley-Terry) beside one row of data [preferences]
    preference_batch: int = 8  # of these pairs per optimiser step, over all ranks [preferences, trunk=full|adapters]
    average: tuple[str, ...] | None = None  # train nothing: the mean of these runs' weights (WARM), on init's samples
    # model
    trunk: Trunk = "full"  # train all of it, a head on init alone, or LoRA and a head [average=none]
    reads: Literal["text", "answer"] | None = None  # what is pooled; none = the answers of data that have prompts
    reset: bool = False  # draw new weights in the shape of init: shows what pretraining is worth [trunk=full]
    pooling: Pooling = "mean"  # last token's state, mean of all, or weighted by a query [trunk=full|adapters]
    lora_rank: int = 16  # of the adapter [trunk=adapters]
    lora_alpha: float = 32.0  # the adapter is scaled by alpha / rank [trunk=adapters]
    lora_targets: Names = None  # last names of the linear layers to adapt; none = all in the blocks [trunk=adapters]
    depth: int | None = None  # read the state above so many layers, run no others; none = all, normed [trunk=adapters]
    start: str | None = None  # run of --trunk=frozen at --depth whose head is the start; none = zero [trunk=adapters]
    # ensemble of heads on one trunk
    members: int = 1  # each with its own bootstrap sample of the rows; and start, but with --depth [average=none]
    combine: Combine = "mean"  # one score from theirs; mean - uncertainty_coef variance [average=none]
    uncertainty_coef: float = 0.5  # price of the members' variance [combine=uncertainty]
    # objective
    objective: Objectives = None  # squared error of scores, labels of 0 and 1, pairs, both; none = as the data
    joint_coef: float = 1.0  # weight of the squared error beside Bradley-Terry [average=none]
    soft_labels: bool = False  # pairs of ratings: how often raters prefer one (Thurstone) [trunk=full|adapters]
    label_smoothing: float = 0.0  # the label of a pair is 1 minus this [trunk=full|adapters]
    margin: float = 0.0  # by how much chosen must win, per point of gap [trunk=full|adapters]
    center_coef: float = 0.0  # weight of (chosen + rejected)^2 [trunk=full|adapters]
    lm_coef: float = 0.0  # weight of the next-token loss on the same texts, nats per token [trunk=full|adapters]
    # frozen trunk: ridge regression of the ratings, what to read chosen by the validation split
    sentences: int | None = 1600  # most training prompts, or texts, every source its share; none = all [trunk=frozen]
    eval_sentences: int | None = 500  # most of the validation and of the test split, each; none = all [trunk=frozen]
    depths: Depths = None  # candidates: states above so many layers; none = 2/5 and 1/2 of them [trunk=frozen]
    poolings: Poolings = ("mean",)  # candidates; last suffers when a text is cut off [trunk=frozen]
    features: int = 2  # at most so many of the depths x poolings are read together [trunk=frozen]
    ridge: tuple[float, ...] = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)  # weights of the head's norm to try [trunk=frozen]
    # optimisation
    epochs: float = 2.0  # passes over the training split [trunk=full|adapters]
    batch: int = 32  # texts, pairs, or prompts with all answers per step, over all ranks [trunk=full|adapters]
    micro_batch: int | None = None  # of these per forward on a rank; none = its share [trunk=full|adapters]
    micro_batch_tokens: int | None = None  # instead: of like length, so many tokens in all [trunk=full|adapters]
    recompute: bool = False  # compute blocks again for the backward pass: less memory, more time [trunk=full|adapters]
    lr: float = 1e-3  # peak learning rate [trunk=full|adapters]
    warmup: int = 50  # steps of linear warm-up [trunk=full|adapters]
    decay: Literal["linear", "cosine", "constant"] = "cosine"  # learning rate after the warm-up [trunk=full|adapters]
    weight_decay: float = 0.1  # AdamW, on matrices alone [trunk=full|adapters]
    grad_clip: float = 1.0  # largest global gradient norm; 0 = unclipped [trunk=full|adapters]
    max_bad_steps: int = 3  # steps in a row, skipped for a number that is not finite, that end it [trunk=full|adapters]
    precision: PrecisionName = "auto"  # of matrix products; auto = bf16 where that is fast, and a run keeps its own
    seed: int = 1  # of the heads, the adapter, the order of the data, the bootstrap and the reference samples
    # normalisation: continuations by init, whose scores get mean 0 and deviation 1
    reference_samples: int | None = None  # texts; none = 512, with a frozen trunk or adapters 64
    sources: tuple[str, ...] = ()  # prompts from these sources of the data alone; none given = all
    prompt_tokens: int | None = None  # first tokens of a text as its prompt; none = the data's prompts, or 4 of a text
    response_tokens: int = 24  # longest response, tokens
    # several processes
    shard: bool = False  # a rank keeps a part of weights and moments (FSDP) [trunk=full|adapters, average=none]
    replicas: int = 1  # copies of the weights, each over a part of the ranks: one a machine, say [shard=true]
    # report
    log_every: int = 50  # steps between lines of metrics.jsonl [trunk=full|adapters]
    eval_every: int = 500  # steps between validation accuracies, a multiple of log_every [trunk=full|adapters]
    checkpoint_every: int = 500  # steps between checkpoints [trunk=full|adapters]
    override: tuple[str, ...] = ()  # options that may differ from those that the run in out was started with

    def __post_init__(self):
        config.at_least(self, epochs=0, batch=1, micro_batch=1, lr=0, warmup=0, weight_decay=0, grad_clip=0, seed=0)
        config.at_least(self, reference_samples=2, prompt_tokens=1, response_tokens=1)
        config.at_least(self, log_every=1, eval_every=1, checkpoint_every=1, max_bad_steps=1)
        config.at_least(self, sentences=2, eval_sentences=2, features=1, members=1, depth=1, lora_rank=1)
        config.at_least(self, preference_coef=0, preference_batch=1, micro_batch_tokens=2)
        config.at_most_one(self, "micro_batch", "micro_batch_tokens")
        config.at_least(self, uncertainty_coef=0, joint_coef=0, margin=0, center_coef=0, lm_coef=0, label_smoothing=0)
        for name in ("depths", "poolings", "ridge", "lora_targets", "average"):
            if getattr(self, name) == ():
                raise ValueError(f"--{name} is empty: name at least one candidate")
        if min(self.ridge) <= 0:
            raise ValueError(f"--ridge={min(self.ridge)} must be above 0: there may be more features than sentences")
        if self.eval_every % self.log_every:
            raise ValueError(f"eval_every {self.eval_every} is not a multiple of log_every {self.log_every}")
        if self.members == 1 and self.combine != "mean":
            raise ValueError(f"--combine={self.combine} has no effect with --members=1; use more members")
        if self.label_smoothing >= 0.5:
            raise ValueError(f"--label_smoothing={self.label_smoothing} must be below 0.5, where labels say nothing")
        if self.label_smoothing and self.soft_labels:
            raise ValueError("--label_smoothing with --soft_labels would smooth twice; use one")
        if self.soft_labels and self.labels != "rating":
            raise ValueError(f"--soft_labels reads the spread of all raters, --labels={self.labels} only half of them")
        if self.lm_coef and self.depth is not None:
            raise ValueError(f"--lm_coef needs the last layer, --depth={self.depth} leaves it out")
        if self.start and self.depth is None:
            raise ValueError("--start needs the --depth that the other run reads")
        if self.average and len(self.average) < 2:
            raise ValueError("--average needs two runs or more")


def main() -> None:
    cfg = config.parse(Config)
    dist = distributed.setup(cfg.shard, cfg.replicas)
    cfg = settled(cfg, dist)
    job = average_runs if cfg.average else JOBS[cfg.trunk]
    job(cfg, dist)
    dist.close()


class Inputs(NamedTuple):
    """What every way to train begins with."""

    base: Pretrained
    tokenizer: Tokenizer
    splits: list[SomeAnswers]  # train, validation, test, in the tokens of the base
    stop_ids: tuple[int, ...]  # that end an answer
    kind: str  # of the objective
    reads: str  # answers, or whole texts
    checksums: dict[str, str]  # for run.json


def open_inputs(cfg: Config, dist: Dist) -> Inputs:
    base = open_pretrained(cfg.init, dist.device)
    base.model.requires_grad_(False)
    data = [open_data(cfg.data, split) for split in SPLITS]
    tokenizer = load_tokenizer(data[0].paths[0].parent)
    check_fingerprint(data[0].fingerprint, tokenizer.fingerprint, str(data[0]))
    check_fingerprint(data[0].fingerprint, base.tokenizer.fingerprint, f"{cfg.data}, with --init={cfg.init}")
    stop_ids = base.ends_of(data[0].template)
    inputs = {"init_sha256": base.digest, "data_sha256": data[0].digest}
    splits = [some_answers(cfg, split, base.model.config.context) for split in data]
    for split in splits:
        if split.left_out:
            say(f"{split.data}: {split.left_out} answers alone are longer than the context", dist.is_main)
    if cfg.preferences:
        votes = preference_splits(cfg, base)[0].data
        check_fingerprint(votes.fingerprint, tokenizer.fingerprint, str(votes))
        inputs["preferences_sha256"] = votes.digest
    reads = cfg.reads or ("answer" if bool((data[0].prompt_lengths() > 1).any()) else "text")
    kind = objective_for(cfg, splits[0])
    say(f"objective: {kind}, read: {'answers' if reads == 'answer' else 'whole texts'}", dist.is_main)
    return Inputs(base, tokenizer, splits, stop_ids, kind, reads, inputs)


def some_answers(cfg: Config, data: Examples, context: int, prompts: np.ndarray | None = None) -> SomeAnswers:
    most = MOST_TRAINING_PAIRS if data.paths[0].name == "train" else MOST_PAIRS
    return SomeAnswers(data, prompts, most, column_of(cfg), context)


def column_of(cfg: Config) -> str:
    return "score" if cfg.labels == "rating" else cfg.labels


def preference_splits(cfg: Config, base: Pretrained) -> list[SomeAnswers]:
    """The pairs to learn from, and those held out from it."""
    context = base.model.config.context
    return [SomeAnswers(open_data(cfg.preferences, split), context=context) for split in ("train", "test")]


def references_of(cfg: Config, base: Pretrained, train: SomeAnswers, trunk: str) -> References:
    count = cfg.reference_samples or (512 if trunk == "full" else 64)
    how = {"context": base.model.config.context, "sources": cfg.sources}
    return references_from(train.data, count, cfg.seed, cfg.prompt_tokens, cfg.response_tokens, **how)


def agreed(cfg: Config, reward_model: Normalised, base: Pretrained, dist: Dist) -> dict:
    """Part of the report: `agreement` with the held-out pairs of --preferences, where there are any."""
    return (
        {"preferences": agreement(reward_model, base, *preference_splits(cfg, base), dist)} if cfg.preferences else {}
    )


def write_report(cfg: Config, report: dict, seconds: float) -> None:
    """report.json, and the same in words."""
    write_json(f"{cfg.out}/report.json", report | {"seconds": seconds})
    print(in_words(report, cfg.preferences))
    print(f"{seconds:.0f} s -> {cfg.out}")


# by gradient descent: the whole trunk, or an adapter on it


def train(cfg: Config, dist: Dist) -> None:
    precision = optim.amp(dist.device, cfg.precision)
    base, tokenizer, splits, stop_ids, kind, reads, checksums = inputs = open_inputs(cfg, dist)
    objective = objective_of(cfg, splits[0])
    references = references_of(cfg, base, splits[0], cfg.trunk)
    reward_model = BUILDERS[cfg.trunk](cfg, base, stop_ids, reads).to(dist.device)
    store_all((base.model, reward_model.model), stored_dtype(cfg, precision))
    recompute_blocks(reward_model, cfg.recompute)
    if cfg.start:
        checksums["start_sha256"] = start_at(cfg, base, reward_model)
    dist.rest(base.model)
    learner = dist.wrap(reward_model)
    optimizer = optim.make_optimizer(reward_model, cfg.lr, cfg.weight_decay, betas=(0.9, 0.95))

    options, saved_as = asdict(cfg) | checksums, description(cfg, inputs)
    old = config.defaults(Config)  # where a run is older than an option
    run = Run(
        cfg.out, options, reward_model, optimizer, precision.scaler, dist, saved_as, [tokenizer.path], defaults=old
    )

    loader = loader_for(cfg, kind, splits[0], base.model.config.context).with_room(cfg.micro_batch_tokens)
    say(f"training on {loader.summary}{reading(loader)}", dist.is_main)
    votes, counts = votes_of(cfg, base), bootstrap_counts(len(loader), cfg)
    total = total_steps(cfg.epochs, loader.order.steps_per_epoch)
    log, brakes = Metrics(cfg.out, dist.is_main, run.done), Brakes(run, optimizer, cfg.max_bad_steps)
    vote_counts, share = bootstrap_counts(len(votes), cfg), len(votes) / len(loader)  # so that a pair weighs as a row

    def parts_of(step: int, dist: Dist) -> list[Part]:
        parts = step_parts(cfg, loader, counts, step, kind, coefficients(kind, objective), dist)
        if votes:
            scale = cfg.preference_coef * share * coefficients("pairs", objective)
            parts += step_parts(cfg, votes, vote_counts, step, "pairs", scale, dist)
        return parts

    for step in run.steps(total, "rm"):
        parts = parts_of(step, dist)
        loss = 0.0
        for part, kind_of_part, scale in parts:
            with dist.grad_sync(learner, on=part is parts[-1][0]):
                with precision.autocast():
                    part_loss = (scale * reward_losses(learner, part, kind_of_part, objective)).sum()
                precision.scaler.scale(part_loss * dist.loss_scale).backward()
            loss = loss + part_loss.detach()
        lr = optim.schedule(step, total, cfg.warmup, cfg.lr, cfg.decay)
        optim.set_lr(optimizer, lr)
        grad_norm = optim.step(optimizer, reward_model, precision.scaler, cfg.grad_clip)
        if not brakes.took(grad_norm, loss, precision.scaler):
            skip(brakes, reward_model, parts_of(step, Dist(device=dist.device)), step, objective, precision, tokenizer)

        done = step + 1
        if done % cfg.log_every == 0 or done == total or brakes.ended:
            record = {
                "loss/train": float(dist.sum(loss)),
                "grad_norm": grad_norm,
                "lr": lr,
                "bad/steps": brakes.count(),
            }
            if done % cfg.eval_every == 0 and not brakes.ended:
                with dist.whole(reward_model), precision.autocast():
                    scores = reward_model.combined(raw_scores(reward_model, base, splits[1], dist))
                record["validation/accuracy"] = accuracy(scores.cpu().numpy(), splits[1])["all"]
            log.log(step, record)
        brakes.check()
        if run.due(done, cfg.checkpoint_every, total) and (done < total or run.wanted):
            run.save(done, **brakes.state())

    with dist.whole(reward_model, base.model), precision.autocast():  # it is measured and normalised as it will be used
        raw = [raw_scores(reward_model, base, split, dist) for split in splits[1:]]
        problem = normalise_and_calibrate(reward_model, base, references, raw[0], splits[1], dist)
    run.save(total, **brakes.state())
    extra = {"parameters": sum(x.numel() for x in reward_model.parameters() if x.requires_grad)}
    with dist.whole(reward_model), precision.autocast():
        extra |= agreed(cfg, reward_model, base, dist)
    if dist.is_main:
        write_report(cfg, report_of(reward_model, raw, splits, cfg.data, problem) | extra, run.seconds)


def skip(
    brakes: Brakes, reward_model, parts: list[Part], step: int, objective: Objective, precision, tokenizer: Tokenizer
) -> None:
    """Count and store a step that cannot be taken; the parts are those of all ranks."""
    brakes.skip(
        f"{step:06d}",
        step,
        replay.step_formulas(reward_model, parts, objective, precision),
        lambda: replay.stored(parts),
        lambda: [row for texts, *_ in parts for row in rows_of(tokenizer, texts.tokens, texts.lengths)],
        "the gradient is not finite",
        script="train_rm.py",
        **replay.facts(parts, objective),
    )


def step_parts(
    cfg: Config, loader, counts: torch.Tensor, step: int, kind: str, scale: torch.Tensor, dist: Dist
) -> list[Part]:
    """This rank's share of a step, cut into what shares a forward: each with the kind of its loss, and what its sums weigh."""
    rows = shard(loader.order.rows(step), dist.rank, dist.world)
    texts = texts_of(loader.take(rows), counts[rows])
    scale = scale / dist.sum(texts.totals()).clamp(min=1e-9)  # by what all ranks have of it
    packed = dist.device.type == "cpu"  # see model/packed.py
    parts = loader.forwards(step, dist.world, cfg.micro_batch, cfg.micro_batch_tokens, packed)
    parts = [texts.part(units) for units in parts]
    return [(Texts(*(x.to(dist.device) for x in part)), kind, scale.float().to(dist.device)) for part in parts]


def whole_model(cfg: Config, base: Pretrained, stop_ids: tuple[int, ...], reads: str) -> RewardModel:
    generator = torch.Generator().manual_seed(cfg.seed)
    model = copy.deepcopy(base.model).requires_grad_(True)  # whose own weights may be mapped from a file
    if cfg.reset:
        model.init_weights(generator)
    return RewardModel(model, cfg.pooling, generator, ensemble_of(cfg), language=cfg.lm_coef > 0, reads=reads)


def adapted_model(cfg: Config, base: Pretrained, stop_ids: tuple[int, ...], reads: str) -> RewardModel:
    if cfg.depth is not None and cfg.depth > base.model.config.layers:
        raise ValueError(f"--depth={cfg.depth}: {cfg.init} has {base.model.config.layers} layers")
    generator = torch.Generator().manual_seed(cfg.seed)
    trunk = adapted_trunk(base.model, lora_of(cfg), cfg.depth)
    reward_model = RewardModel(trunk, cfg.pooling, generator, ensemble_of(cfg), stop_ids, cfg.lm_coef > 0, reads)
    if cfg.depth is not None:  # no norm there: random heads would begin with a squared error of 23 on SmolLM2, not of 1
        torch.nn.init.zeros_(reward_model.head.weight)
    return reward_model


BUILDERS = {"full": whole_model, "adapters": adapted_model}


def ensemble_of(cfg: Config) -> Ensemble:
    return Ensemble(cfg.members, cfg.combine, cfg.uncertainty_coef)


def description(cfg: Config, inputs: Inputs) -> dict:
    """The config of a checkpoint: all that is needed to build the module that its tensors fill."""
    base, template = inputs.base, inputs.splits[0].data.template
    saved_as = {"kind": "reward", "trunk": cfg.trunk, "tokenizer": inputs.tokenizer.fingerprint}
    saved_as |= {"reads": inputs.reads, "template": template, "objective": inputs.kind} | asdict(ensemble_of(cfg))
    if cfg.trunk == "full":
        return saved_as | {"model": base.model.config.stored(), "pooling": cfg.pooling, "language": cfg.lm_coef > 0}
    saved_as |= {"base": cfg.init, "base_digest": base.digest, "stop_ids": inputs.stop_ids}
    if cfg.trunk == "adapters":
        names = ("pooling", "lora_rank", "lora_alpha", "lora_targets", "depth")
        saved_as |= {name: getattr(cfg, name) for name in names} | {"language": cfg.lm_coef > 0}
    return saved_as


@torch.no_grad()
def start_at(cfg: Config, base: Pretrained, reward_model: RewardModel) -> str:
    """Start the head where a run on the frozen trunk has ended, since the adapter starts as no change; -> its checksum."""
    saved = checkpoint.load(cfg.start)
    pooling = "last" if cfg.pooling == "last" else "mean"  # attention starts as the mean
    wanted = {"base_digest": base.digest, "depths": [cfg.depth], "poolings": [pooling], "reads": reward_model.reads}
    for name, value in wanted.items():
        if saved.config.get(name) != value:
            raise ValueError(f"--start={cfg.start} has {name} {saved.config.get(name)}; {value} is needed")
    weight, bias = saved.tensors["head.weight"], saved.tensors["head.bias"]
    if len(bias) != cfg.members:
        raise ValueError(f"--start={cfg.start} has {len(bias)} members, this run {cfg.members}")
    reward_model.head.weight.copy_(weight)
    reward_model.head.bias.copy_(bias)
    return checkpoint.digest(cfg.start)


def objective_for(cfg: Config, train: SomeAnswers) -> str:
    """--objective, or what the data have: only scores of 0 and 1 are labels, other scores are regressed, pairs compared, or
    both. ValueError for what they do not have, and for options of pairs where there are none.
    """
    data, binary = train.data, train.column_name == "score" and all(train.data.labels)
    rated = data.has(train.column_name)
    follows = "pairs" if not rated else "labels" if binary else "regression" if train.made else "joint"
    kind = cfg.objective or follows
    if kind != "pairs" and not rated or kind == "labels" and not binary:
        lacking = "no scores" if not rated else "other scores than 0 and 1"
        raise ValueError(f"--objective={kind}: {data} has {lacking}; use --objective={follows}")
    unused = ("soft_labels", "label_smoothing", "margin", "center_coef") if kind in ("regression", "labels") else ()
    for name in unused + (("joint_coef",) if kind != "joint" else ()):
        if getattr(cfg, name) != getattr(Config, name):
            raise ValueError(f"--{name} has no effect: the objective is {kind}; leave it out, or choose --objective")
    return kind


def loader_for(cfg: Config, kind: str, train: SomeAnswers, context: int) -> ScoredLoader | PairLoader | GroupLoader:
    """Units of a step: prompts with all their answers; of scores alone answers, or pairs that are made of the scores."""
    how, data, column = {"context": context}, train.data, train.column_name
    if not train.made:
        return GroupLoader(data, cfg.batch, cfg.seed, **how)
    if kind in ("regression", "labels"):
        return ScoredLoader(data, cfg.batch, cfg.seed, column=column, **how)
    deviation = "rating_std" if cfg.soft_labels else None
    made = made_pairs(data, MOST_TRAINING_PAIRS, column=column, deviation=deviation)
    return PairLoader(data, cfg.batch, cfg.seed, made=made, column=column, **how)


def votes_of(cfg: Config, base: Pretrained) -> GroupLoader | tuple[()]:
    """The pairs of --preferences to learn from."""
    if not cfg.preferences:
        return ()
    data, context = preference_splits(cfg, base)[0].data, base.model.config.context
    return GroupLoader(data, cfg.preference_batch, cfg.seed, context=context).with_room(cfg.micro_batch_tokens)


def texts_of(batch: ScoredBatch | PairBatch | GroupBatch, counts: torch.Tensor) -> Texts:
    scores, rows, none = batch.scores.flatten(), torch.arange(len(batch.tokens)), torch.zeros(0)
    texts = batch.tokens, batch.lengths, batch.prompt_lengths
    if isinstance(batch, ScoredBatch):
        return Texts(*texts, rows, scores, none.long(), none.long(), none, none, none, counts)
    facts = (batch.p, batch.gap, batch.weight)
    if isinstance(batch, PairBatch):
        return Texts(*texts, rows // 2, scores, rows[0::2], rows[1::2], *facts, counts)
    return Texts(*texts, batch.group, scores, batch.winner, batch.loser, *facts, counts)


def reading(loader: ScoredLoader | PairLoader | GroupLoader) -> str:
    """How many tokens an epoch reads, where prompts are read once for all their answers."""
    if not isinstance(loader, GroupLoader):
        return ""
    once, apart = loader.tokens()
    return f"; {once:,} tokens, prompts once for all their answers ({apart:,} with each answer)"


def objective_of(cfg: Config, train: SomeAnswers) -> Objective:
    ratings = train.column("rating")
    return Objective(
        float(np.nanmean(ratings)), float(np.nanstd(ratings)) or 1.0, cfg.label_smoothing, cfg.margin, cfg.center_coef,
        cfg.joint_coef, cfg.lm_coef,
    )  # fmt: skip


def bootstrap_counts(rows: int, cfg: Config) -> torch.Tensor:
    """How often every row counts for every head, (rows, M): Poisson(1), a bootstrap sample drawn row by row (Oza &
    Russell 2001); a single head sees all rows once.
    """
    if cfg.members == 1:
        return torch.ones(rows, 1)
    return torch.from_numpy(np.random.default_rng([cfg.seed, rows]).poisson(1.0, (rows, cfg.members))).float()


# a head on the frozen trunk, in closed form


def fit_frozen(cfg: Config, dist: Dist) -> None:
    """Nothing is written before the head is complete: what is interrupted starts again."""
    inputs = open_inputs(cfg, dist)
    base, tokenizer, splits, stop_ids, kind, reads, checksums = inputs
    candidates = [(depth, pooling) for depth in depths_of(cfg, base) for pooling in dict.fromkeys(cfg.poolings)]
    references = references_of(cfg, base, splits[0], cfg.trunk)
    begin(cfg.out, asdict(cfg) | checksums, dist, config.defaults(Config))
    if already_finished(cfg, dist):
        return

    # 1. read: pooled hidden states of some answers of every split, at all candidate depths
    store(base.model, optim.amp(dist.device, cfg.precision).dtype)
    states = FrozenStates(base.model).read(depth for depth, _ in candidates)
    counts, context = (cfg.sentences, cfg.eval_sentences, cfg.eval_sentences), base.model.config.context
    some = [
        some_answers(cfg, split.data, context, some_prompts(split.data, n, cfg.seed))
        for split, n in zip(splits, counts)
    ]
    judged = [judged_of(answers, read_features(states, candidates, answers, inputs, dist)) for answers in some]

    # 2. fit: one head per set of at most --features features; the validation split decides which set
    fits = fit_heads(candidates, *judged[:2], cfg.ridge, cfg.features, kind, cfg.joint_coef)
    best, columns = fits[0], [candidates.index(feature) for feature in fits[0].features]
    if cfg.members > 1 or cfg.preferences:
        votes = read_votes(cfg, states, best.features, inputs, dist) if cfg.preferences else None
        best = refitted(
            best, judged[0].of(columns), cfg.members, cfg.seed, votes, cfg.preference_coef, kind, cfg.joint_coef
        )
    reward_model = head_of(best, states, stop_ids, ensemble_of(cfg), reads).to(dist.device)

    # 3. normalise and calibrate
    raw = [head_predictions(best, x.of(columns).features).to(dist.device) for x in judged[1:]]
    problem = normalise_and_calibrate(reward_model, base, references, raw[0], some[1], dist)

    # 4. save and report
    extra = agreed(cfg, reward_model, base, dist)
    if dist.is_main:
        depths, poolings = zip(*best.features)
        saved_as = description(cfg, inputs) | {"depths": depths, "poolings": poolings}
        state = {"done": 1, "seconds": seconds_used()}
        checkpoint.save_step(cfg.out, 1, reward_model.state_dict(), saved_as, state, files=[tokenizer.path])
        table = [describe(fit, some[1]) for fit in fits]
        print(f"{'validation, best first':<28}{'ridge':>8}{'error':>8}{'gap 1':>8}")
        for row in table[:8]:
            print(f"{row['features']:<28}{row['ridge']:8g}{row['error']:8.3f}{row['accuracy']['1']:8.3f}")
        print(f"{len(some[2])} test answers; head fitted to {len(some[0])} answers")
        extra |= {"parameters": sum(p.numel() for p in reward_model.parameters()), "chosen": table[0]}
        extra |= {"candidates": table, "sentences": dict(zip(SPLITS, map(len, some)))}
        report = report_of(reward_model, raw, [splits[0], *some[1:]], cfg.data, problem)
        write_report(cfg, report | extra, seconds_used())


def already_finished(cfg: Config, dist: Dist) -> bool:
    """A finished run stays as it is, and prints its table again."""
    report = Path(cfg.out, "report.json")
    if not (checkpoint.latest(cfg.out) and report.exists()):
        return False
    say(accuracy_table(read_json(report)), dist.is_main)
    return True


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
def read_features(
    states: FrozenStates, candidates: list[Feature], data: SomeAnswers, inputs: Inputs, dist: Dist, batch: int = 16
) -> torch.Tensor:
    """Features of all rows (rows, F, D) in their order; the batches are shared out over the ranks.

    Which rows share a batch depends on their prompts and lengths alone, so the features are the same for any number of
    ranks. A prompt is read once for its answers in a batch.
    """
    model = states.model.config
    features = torch.zeros(len(data), len(candidates), model.width)
    together = data.data.answers > data.data.prompts
    batches = batches_of(data, batch)[dist.rank :: dist.world]
    for i in steps(0, len(batches), f"states of {data.data.paths[0].name}", dist):
        tokens, lengths, begins = (x.to(dist.device) for x in read(data, batches[i], model.context))
        first, end = stretch(tokens, lengths, begins if inputs.reads == "answer" else None, inputs.stop_ids)
        pooled = text_features(states(tokens, lengths if together else None), candidates, first, end)
        features[batches[i]] = pooled.float().cpu()
    return dist.sum(features)


def judged_of(data: SomeAnswers, features: torch.Tensor) -> Judged:
    """These answers with what people thought of them: scores where there are some, and pairs."""
    scores = data.column("rating") if data.data.has(data.column_name) else np.full(len(data), np.nan)
    facts = (torch.from_numpy(data.column(f"pair_{name}")) for name in ("chosen", "rejected", "p", "weight"))
    chosen, rejected, p, weight = facts
    return Judged(features, torch.from_numpy(scores), chosen.long(), rejected.long(), p, weight)


def read_votes(cfg: Config, states: FrozenStates, features: list[Feature], inputs: Inputs, dist: Dist) -> Judged:
    """The training pairs of --preferences."""
    votes = preference_splits(cfg, inputs.base)[0]
    return judged_of(votes, read_features(states, features, votes, inputs, dist))


def head_predictions(fit: Fit, features: torch.Tensor) -> torch.Tensor:
    """Raw scores (N, M) of features (N, F, D) that were read already."""
    return (features.flatten(1).double() @ fit.weight.T + fit.constant).float()


def describe(fit: Fit, validation: SomeAnswers) -> dict:
    names = " + ".join(f"layer {depth} {pooling}" for depth, pooling in fit.features)
    scores = accuracy(fit.predictions[:, 0].numpy(), validation)
    return {"features": names, "ridge": fit.penalty, "error": fit.error, "accuracy": scores}


# the mean of finished runs


def average_runs(cfg: Config, dist: Dist) -> None:
    inputs = open_inputs(cfg, dist)
    base, tokenizer, splits, stop_ids, kind, reads, checksums = inputs
    saved_as, tensors = average(cfg.average)
    check_fingerprint(splits[0].data.fingerprint, saved_as["tokenizer"], cfg.average[0])
    references = references_of(cfg, base, splits[0], saved_as.get("trunk", "full"))
    checksums["average_sha256"] = [checkpoint.digest(path) for path in cfg.average]
    begin(cfg.out, asdict(cfg) | checksums, dist, config.defaults(Config))
    if already_finished(cfg, dist):
        return
    dtype = optim.amp(dist.device, cfg.precision).dtype
    reward_model = in_half(restored(saved_as, tensors, cfg.average[0], dist.device, base), dtype)
    store(base.model, dtype)
    raw = [raw_scores(reward_model, base, split, dist) for split in splits[1:]]
    problem = normalise_and_calibrate(reward_model, base, references, raw[0], splits[1], dist)
    if dist.is_main:
        tensors |= {name: reward_model.get_buffer(name).cpu() for name in NORMALISATION}
        state = {"done": 1, "seconds": seconds_used()}
        checkpoint.save_step(cfg.out, 1, tensors, saved_as, state, files=[tokenizer.path])
        report = report_of(reward_model, raw, splits, cfg.data, problem) | {"averaged": list(cfg.average)}
        write_report(cfg, report, seconds_used())


JOBS = {"full": train, "adapters": train, "frozen": fit_frozen}


if __name__ == "__main__":
    config.run(main)
