"""PPO from human preferences: act, judge, assign credit, learn, report (Ziegler et al. 2019, arXiv:1909.08593).

python train_ppo.py --init=out/lm --reward=out/rm --data=out/data/vader --out=out/ppo
torchrun --nproc_per_node=2 train_ppo.py --init=out/lm --reward=out/rm --data=out/data/vader --out=out/ppo

One iteration, in the order of the loop; t counts response tokens, T is the last, s the score of the response:

    reward     r_t = s [t = T] - kl_coef (log pi_old(t) - log ref(t))                            rlhf/rewards.py
    values     V_t of the critic's head; with --value_base=reward it learns what s of the text before t lacks
    advantage  A_t = sum_k (gamma lam)^k (r_t+k + gamma V_t+k+1 - V_t+k),  R_t = A_t + V_t       rlhf/advantages.py
               A is then whitened: mean 0, deviation 1 over the response tokens of all ranks     rlhf/functional.py
    policy     max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)),  ratio = pi / pi_old          rlhf/losses.py
    value      max((V - R)^2, (clamp(V, V_old - value_clip, V_old + value_clip) - R)^2) / 2      rlhf/losses.py

The loss is policy + value_coef value - entropy_coef entropy, each the mean over the tokens of the minibatch.

What it does not do, and why: the value after a response that was cut off is 0 and not bootstrapped, because the reward
model has judged the text as it stands; advantages are whitened once an iteration and not per minibatch, so that a
minibatch is the same for any number of ranks; old log-probs come from the training forward and not from the sampler, so
the first ratio is exactly 1; the KL is paid for in the reward, as in the paper, and not in the loss; nothing is learned
from responses of earlier policies.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data.examples import Examples
from data.loader import PromptLoader, drawn, micro_batches, open_data, prompts_of, unseen
from data.tokenizer import Detokenizer, Tokenizer, check_fingerprint, load_tokenizer
from evaluation.card import beats_length
from model.generate import SAMPLED_AT_ONCE, Sampling
from model.transformer import recompute_blocks
from rlhf import kl
from rlhf.advantages import ESTIMATORS
from rlhf.doctor.diagnosis import diagnose, in_words, stops_of
from rlhf.functional import whiten
from rlhf.infra import checkpoint, config, distributed, offload, optim
from rlhf.infra.brakes import Brakes
from rlhf.infra.distributed import Dist
from rlhf.infra.files import read_json, read_lines, write_json
from rlhf.infra.metrics import Metrics, say
from rlhf.infra.optim import Precision
from rlhf.infra.precision import PrecisionName, settled, stored_dtype
from rlhf.infra.run import Clock, Run, peak_memory_gb, resident_bytes
from rlhf.lm.pretrained import Pretrained, config_of, open_pretrained, policy_config
from rlhf.lm.trunks import lora_of
from rlhf.overoptimisation import best_place
from rlhf.ppo import update as ppo
from rlhf.ppo.acting import Acted, Acting, Resampling, group_metrics
from rlhf.ppo.early_stop import HeldOutJudge, KLBound, NoBound, NoJudge
from rlhf.ppo.guard import Guard, Limits
from rlhf.ppo.plan import Sizes, gpus, peak, plan, table
from rlhf.ppo.remote import Room, Servers
from rlhf.ppo.roles import CRITICS, LAYOUTS, Roles
from rlhf.ppo.rollout import Cut, Experience, OwnSampler, Sampler, gather, judge, minibatches, share
from rlhf.ppo.self_check import check_once
from rlhf.reward.files import check_form
from rlhf.reward.function import load_function
from rlhf.reward.model import Score
from rlhf.reward.scorer import Scorer, check_room, open_scorer, response_starts, scorer_of
from rlhf.rewards import missing_eos, shape_rewards

Layout = Literal["full", "shared", "adapters", "branch"]
Critic = Literal["shared", "separate"] | None
Names = tuple[str, ...] | None
Sleeping = tuple[Literal["reference", "reward", "optimizer"], ...]


@dataclass(frozen=True)
class Config:
    init: str = "out/lm"  # language model to start from; it is also the reference
    reward: str = "out/rm"  # reward model, file.py:function, or a sum: out/rm:1,file.py:function:0.1 (docs/rewards.md)
    data: str = "out/data/vader"  # directory made by data.prepare; its training sentences give the prompts
    out: str = "out/ppo"  # run directory: checkpoints, metrics.jsonl, samples.jsonl, report.json
    weak_reward: bool = False  # accept a reward model that does not beat length alone, by its card or its report
    plan: bool = False  # print the memory that each layout needs, and stop
    gpu_gb: float | None = None  # of a GPU: how many of them does each layout need? [plan=true]
    # roles
    layout: Layout = "shared"  # full: models apart; shared: critic on the policy; adapters, branch: on one frozen trunk
    critic: Critic = None  # value head on the policy's trunk or on its own; none = as the layout has it [estimator=gae]
    lora_rank: int = 16  # of the adapters [layout=adapters]
    lora_alpha: float = 32.0  # their update is scaled by lora_alpha / lora_rank [layout=adapters]
    lora_targets: Names = None  # last names of linear layers that get one; none = all in the blocks [layout=adapters]
    branch_layers: int = 4  # top layers that are copied and trained [layout=branch]
    # act
    sources: tuple[str, ...] = ()  # prompts from these sources of the data alone; none given = all
    prompt_tokens: int | None = None  # first tokens of a text as its prompt; none = the data's prompts, or 4 of a text
    max_prompt: int | None = None  # longest prompt of the data, tokens; none = what leaves room for the response
    long_prompts: Literal["drop", "left"] = "drop"  # leave longer ones out, or cut them from the left
    response_tokens: int = 24  # longest response, tokens
    batch: int = 64  # responses per iteration, over all ranks
    samples_per_prompt: int = 1  # responses to the same prompt, in neighbouring rows
    sampler: Names = None  # URLs of servers that give the responses (docs/your-cluster.md); none = the policy here
    sampler_dir: str | None = None  # where weights are laid for them; none = OUT/sampler [sampler]
    sampler_push: str | None = None  # file.py:function(url, directory) that gives it to other servers, vLLM [sampler]
    sampler_timeout: float = 300.0  # seconds that they may take for a response, all tries together [sampler]
    temperature: float = 1.0  # of sampling, and of every log-prob
    resample_flat: bool = False  # sample groups whose scores are all equal again, of further prompts (DAPO)
    resample_tries: int = 3  # at most so often in an iteration [resample_flat=true]
    # credit
    kl_coef: float = 0.3  # weight of KL(policy || reference) in the reward, per nat
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # of the KL penalty per token
    kl_control: Literal["fixed", "adaptive"] = "fixed"  # adaptive moves kl_coef towards kl_target
    kl_target: float = 6.0  # nats per response [kl_control=adaptive]
    kl_horizon: int = 10_000  # responses over which the adaptive coefficient reacts [kl_control=adaptive]
    eos_penalty: float = 0.0  # subtracted from the score of a response that did not end by itself
    estimator: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce++"] = "gae"  # of the advantages
    value_base: Literal["zero", "reward"] = "zero"  # reward: V starts at its score of the text so far [estimator=gae]
    gamma: float = 1.0  # discount per token [estimator=gae|reinforce++]
    lam: float = 0.95  # lambda of GAE [estimator=gae]
    # learn
    iterations: int = 100  # rounds of act, judge, credit, learn
    epochs: int = 2  # passes over the responses of one iteration
    minibatches: int = 4  # optimiser steps per epoch
    micro_batch: int | None = None  # responses per forward on one rank; none = all of its share of a minibatch
    micro_batch_tokens: int | None = None  # instead: rows of like length together, so many tokens with their padding
    recompute: bool = False  # compute each block again for the backward pass: less memory, more time
    offload: Sleeping = ()  # what leaves the device between its phases, for the host's memory (a GPU) or a file in out
    policy_loss: Literal["ppo", "gspo", "cispo"] = "ppo"  # gspo: a ratio per response; cispo: clipped weights
    clip: float = 0.2  # ratio may move this far from 1; for gspo some 3e-4
    clip_high: float | None = None  # upper bound instead of clip, for ratios above 1
    dual_clip: float | None = None  # bound for negative advantages, > 1 [policy_loss=ppo]
    value_coef: float = 0.5  # weight of the value loss [estimator=gae]
    value_clip: float | None = 0.2  # values may move this far from the old ones; none = unclipped [estimator=gae]
    entropy_coef: float = 0.0  # weight of the entropy bonus
    importance_cap: float | None = None  # largest weight of a token where pi_old is not what sampled (TIS); none = off
    target_approxkl: float | None = None  # end an iteration's updates when KL(old, new) per token passes it
    max_kl: float | None = None  # end the run at the last policy whose KL to the reference keeps it, nats per response
    max_kl_window: int = 1  # iterations over which that KL is averaged; one of few responses is noisy [max_kl]
    max_ratio: float | None = 10.0  # a step whose mean ratio passes it is skipped; none = any finite one
    max_value_loss: float | None = 1e6  # the same for the mean value loss [estimator=gae]
    max_bad_steps: int = 3  # steps in a row, skipped for these or for a number that is not finite, that end the run
    lr: float = 3e-4  # peak learning rate
    warmup: int = 5  # iterations of linear warm-up
    decay: Literal["linear", "cosine", "constant"] = "linear"  # learning rate after the warm-up
    weight_decay: float = 0.0  # AdamW, on matrices alone
    adam_eps: float = 1e-5  # AdamW; RLHF gradients are small, 1e-8 would blow up their noise
    grad_clip: float = 1.0  # largest global gradient norm; 0 = unclipped
    precision: PrecisionName = "auto"  # of matrix products; auto = bf16 where that is fast, and a run keeps its own
    seed: int = 1  # of prompts, samples and minibatches
    # several processes
    shard: bool = False  # every rank keeps a part of weights, gradients and moments (FSDP), and not all of them
    replicas: int = 1  # copies of the weights, each over a part of the ranks: one a machine, say [shard=true]
    # report
    sample_every: int = 10  # iterations between tables of sample texts
    checkpoint_every: int = 10  # iterations between checkpoints
    keep_checkpoints: int | None = 2  # newest checkpoints that stay; none = all, to measure over-optimisation
    override: tuple[str, ...] = ()  # options that may differ from those that the run in out was started with
    # stop early
    judge: str | None = None  # held-out judge: a reward model, data (what they bring), or file.py:function
    judge_every: int = 10  # iterations between its judgements; the policy it likes best is kept in out/best [judge]
    judge_patience: int = 3  # judgements in a row without a new best that end the run [judge]
    judge_prompts: int = 128  # prompts from validation sentences, always the same with the same random numbers [judge]

    def __post_init__(self):
        config.at_least(
            self, prompt_tokens=1, max_prompt=1, response_tokens=1, batch=1, samples_per_prompt=1, temperature=1e-3
        )
        config.at_least(self, kl_coef=0, kl_target=0, kl_horizon=1, gamma=0, lam=0, value_coef=0, entropy_coef=0)
        config.at_least(self, iterations=1, epochs=1, minibatches=1, micro_batch=1, sample_every=1, checkpoint_every=1)
        config.at_least(self, micro_batch_tokens=2)
        config.at_least(self, clip=0, clip_high=0, dual_clip=1, value_clip=0, target_approxkl=0, max_kl=0)
        config.at_least(self, max_ratio=1, max_value_loss=0, max_bad_steps=1, resample_tries=1)
        config.at_least(self, lr=0, warmup=0, weight_decay=0, adam_eps=0, grad_clip=0, seed=0)
        config.at_least(self, keep_checkpoints=1, judge_every=1, judge_patience=1, judge_prompts=1)
        config.at_least(self, lora_rank=1, lora_alpha=0, branch_layers=1, importance_cap=1, sampler_timeout=0.1)
        config.at_least(self, gpu_gb=0.001)
        config.at_most(self, gamma=1, lam=1, temperature=10)  # hotter, any model draws all tokens alike
        if self.layout == "full" and self.critic == "shared":
            raise ValueError("--layout=full has a critic of its own; use --layout=shared, or leave --critic=shared out")
        if self.kl_control == "adaptive" and self.kl_coef == 0:
            raise ValueError(
                "--kl_control=adaptive multiplies kl_coef, which would stay 0; start from a positive --kl_coef"
            )
        if self.batch % self.samples_per_prompt:
            raise ValueError(f"batch {self.batch} is not a multiple of samples_per_prompt {self.samples_per_prompt}")
        if Path(self.data).is_file():
            raise ValueError(
                f"--data={self.data} is a file: prepare it first, python -m data.prepare {self.data} --tokenizer={self.init} "
                f"--out=out/data/{Path(self.data).stem}, and give that directory"
            )
        config.at_most_one(self, "micro_batch", "micro_batch_tokens")
        if self.sampler == ():
            raise ValueError("--sampler= names no server: give URLs, or leave it out")
        if "reference" in self.offload and self.layout in ("adapters", "branch"):
            raise ValueError(
                f"--offload=reference: with --layout={self.layout} it is the frozen trunk, which the policy computes with in "
                "every phase; leave it out"
            )
        if "reward" in self.offload and self.resample_flat:
            raise ValueError(
                "--offload=reward: --resample_flat=true asks the reward while it acts; leave one of them out"
            )
        if self.resample_flat and self.samples_per_prompt < 2:
            raise ValueError("--resample_flat compares responses to one prompt; set --samples_per_prompt to 2 or more")
        if ESTIMATORS[self.estimator].needs_group and self.samples_per_prompt < 2:
            raise ValueError(
                f"estimator {self.estimator} compares responses to one prompt; set samples_per_prompt >= 2"
            )


CONSOLE = tuple(
    "objective/scores objective/kl policy/approxkl policy/clipfrac value/explained_var response/length".split()
)


@dataclass(frozen=True)
class Cast:
    """Who plays in a run, opened by `open_cast`."""

    roles: Roles
    learner: torch.nn.Module  # the policy as `dist.wrap` makes it
    reward: Scorer
    act: Callable[[int], Acted]  # of an iteration
    cut: Cut | None  # of a minibatch's rows on this rank, by tokens; None: by rows
    cut_rollout: Cut | None  # the same of all rows of this rank
    held_out: HeldOutJudge | NoJudge
    judges: offload.Sleeper  # those of --offload that are needed to judge alone
    check_once: Callable[..., None]  # (rollout, fresh=), see self_check.check_once
    value_base: Score | None  # of --value_base
    tokenizer: Tokenizer
    inputs: dict[str, str | None]  # checksums of what came in, for run.json
    saved_as: dict  # config of the checkpoints


def main() -> None:
    cfg = config.parse(Config)
    dist = distributed.setup(cfg.shard, cfg.replicas)
    cfg, micro_batch = settled(cfg, dist), row_counts(cfg, dist.world)
    precision = optim.amp(dist.device, cfg.precision)
    check_offload(cfg)
    planned = memory_plan(cfg, dist, micro_batch)
    if cfg.plan:
        return
    for model in scorer_of(cfg.reward).models if not cfg.weak_reward else ():
        beats_length(model)
    cast = open_cast(cfg, dist, precision)
    train(cfg, cast, dist, precision, micro_batch)
    if dist.is_main:
        write_report(cfg.out, cfg.judge_every)
        peak = peak_memory_gb(dist.device)
        print(f"peak memory {peak:.2f} GB, planned {planned:.2f} GB ({peak / planned - 1:+.0%}) in layout {cfg.layout}")
    dist.close()


def train(cfg: Config, cast: Cast, dist: Dist, precision: Precision, micro_batch: int) -> None:
    """The loop: `iterations` times act, judge, assign credit, learn and report, or until there is a reason to stop."""
    policy, reference, held_out = cast.roles.policy, cast.roles.reference, cast.held_out
    learner = cast.learner
    optimizer = optim.make_optimizer(policy, cfg.lr, cfg.weight_decay, betas=(0.9, 0.999), eps=cfg.adam_eps)
    objective = objective_of(cfg)
    estimator = ESTIMATORS[cfg.estimator]
    normalise = whiten if estimator.whiten else lambda advantages, mask: advantages
    run, kl_control = open_run(cfg, cast, optimizer, dist, precision)
    last = run.done if run.state.get("stopped") and not run.changed else cfg.iterations
    log = Metrics(cfg.out, dist.is_main, run.done if run.done < last else cfg.iterations + 1, CONSOLE)
    group = torch.arange(cfg.batch, device=dist.device) // cfg.samples_per_prompt
    bound = NoBound(run) if cfg.max_kl is None else KLBound(run, cfg.max_kl, cfg.max_kl_window)
    guard = guard_of(cfg, cast, run, optimizer, objective, kl_control, micro_batch, precision)
    moments = sleeping_moments(cfg, cast, run)
    state = partial(state_of, kl_control, held_out, guard.brakes)
    broken = stalled = ""

    for iteration in run.steps(last + bound.extra * (run.done < last), "ppo"):
        if (stalled := held_out.stalled()) and not bound.extra:
            break
        clock = Clock()
        # 1. act: sample responses to a batch of prompts with the current policy
        acted = cast.act(iteration)
        clock.lap("time/rollout")

        # 2. judge: policy, reference and value of every token; one score per response
        with precision.autocast(), cast.judges.awake():
            asked, shared = (cast.reward.detailed, micro_batch, acted.width), cast.roles.features
            known = acted.rows, acted.said, cast.cut_rollout, cast.value_base
            judged = judge(acted.samples, policy, reference, *asked, shared, *known)
            if iteration == run.done:
                cast.check_once(judged[:micro_batch].trim(), fresh=run.done == 0)
        rollout = gather(judged, dist)
        clock.lap("time/judge")
        broken = bound.passed(ppo.mean_kl(rollout), iteration, state())
        if not broken and (stalled or iteration == last):
            break

        # 3. credit: score + KL penalty -> rewards -> advantages, returns; whitened over all ranks
        scores = missing_eos(rollout.scores, rollout.finished, cfg.eos_penalty)
        rewards = shape_rewards(
            scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, kl_control.coef, cfg.kl_estimator
        )
        advantages, returns = estimator.estimate(rewards, rollout.values, rollout.mask, cfg.gamma, cfg.lam, group)
        experience = Experience.of(rollout, rewards, normalise(advantages, rollout.mask), returns)

        # 4. learn: epochs x minibatches x micro-batches; stop early when the policy has moved far enough
        optim.set_lr(optimizer, lr := optim.schedule(iteration, cfg.iterations, cfg.warmup, cfg.lr, cfg.decay))
        updates, order = [], minibatches(cfg.batch, cfg.minibatches, cfg.epochs, cfg.seed, iteration)
        for rows in moments.during(guard.admitted(order, experience, iteration, acted.prompts) if not broken else ()):
            minibatch = share(experience, judged.features, rows, dist)
            update = ppo.accumulate_gradient(learner, minibatch, objective, micro_batch, dist, precision, cast.cut)
            updates += guard.step(update, experience, rows, iteration, len(updates))
        clock.lap("time/learn")

        # 5. report: adapt the KL coefficient, metrics, held-out judge, samples, checkpoint
        record = ppo.metrics(experience, advantages, updates, kl_control.coef, cfg.minibatches)
        record |= cast.reward.means(rollout.parts) | group_metrics(scores, cfg.samples_per_prompt) | acted.counts
        record |= clock.times(record["response/length"] * cfg.batch, dist.device)
        done = iteration + 1
        record |= {} if broken or guard.brakes.ended else held_out.ask(done, bound)
        record |= {"lr": lr, "episode": done * cfg.batch, "iteration": iteration, "bad/steps": guard.brakes.count()}
        log.log(iteration, record)
        guard.brakes.check()
        if broken:
            break
        kl_control.update(record["objective/kl"], cfg.batch)
        if done % cfg.sample_every == 0 or done == last:
            log.samples(iteration, texts(experience, cast.tokenizer))
        if run.due(done, cfg.checkpoint_every, last):
            bound.save(done, stopped=False, **state())

    if why := broken or stalled:
        bound.stop(iteration, stopped=True, **state())
        say(f"stopped after {iteration} iterations: {why}", dist.is_main)


def open_run(
    cfg: Config, cast: Cast, optimizer: optim.AdamW, dist: Dist, precision: Precision
) -> tuple[Run, kl.FixedKL | kl.AdaptiveKL]:
    """The run in `out`, and what weighs the KL, where they stood; the held-out judge gets its verdicts back."""
    options, files, policy = asdict(cfg) | cast.inputs, [cast.tokenizer.path], cast.roles.policy
    old = config.defaults(Config)  # where a run is older than an option
    run = Run(
        cfg.out, options, policy, optimizer, precision.scaler, dist, cast.saved_as, files, cfg.keep_checkpoints, old
    )
    kl_control = kl_control_of(cfg)
    kl_control.load_state_dict(run.state.get("kl_control", kl_control.state_dict()))
    cast.held_out.verdicts = run.state.get("verdicts", [])
    return run, kl_control


def sleeping_moments(cfg: Config, cast: Cast, run: Run) -> offload.Sleeper:
    """AdamW's, where --offload names it; they fall asleep, and so does what only judges. A checkpoint wakes them."""
    moments = partial(offload.moments, run.optimizer) if "optimizer" in cfg.offload else tuple
    sleeper = offload.Sleeper(moments, cast.judges.place)
    for each in (cast.judges, sleeper):
        each.sleep()
    run.awake = sleeper.awake
    return sleeper


def state_of(kl_control: kl.FixedKL | kl.AdaptiveKL, held_out: HeldOutJudge | NoJudge, brakes: Brakes) -> dict:
    """What a checkpoint remembers beside weights and optimiser."""
    return {"kl_control": kl_control.state_dict(), "verdicts": [*held_out.verdicts], **brakes.state()}


def guard_of(
    cfg: Config, cast: Cast, run: Run, optimizer, objective, kl_control, micro_batch: int, precision: Precision
) -> Guard:
    """The brakes, and how the rows of a minibatch are shown."""
    trained = ESTIMATORS[cfg.estimator].needs_values and cfg.value_coef  # else the value loss moves nothing
    limits = Limits(cfg.max_ratio, cfg.max_value_loss if trained else None, cfg.target_approxkl)
    rows = partial(texts, tokenizer=cast.tokenizer, most=cfg.batch)
    brakes, how = Brakes(run, optimizer, cfg.max_bad_steps), (micro_batch, precision, cfg.grad_clip, kl_control)
    return Guard(brakes, cast.roles.policy, objective, limits, *how, rows)


def objective_of(cfg: Config) -> ppo.Objective:
    """The options of the loss, by their names."""
    return ppo.Objective(**{field.name: getattr(cfg, field.name) for field in fields(ppo.Objective)})


def kl_control_of(cfg: Config) -> kl.FixedKL | kl.AdaptiveKL:
    """What weighs the KL, and how that moves."""
    if cfg.kl_control == "adaptive":
        return kl.AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    return kl.FixedKL(cfg.kl_coef)


def open_cast(cfg: Config, dist: Dist, precision: Precision) -> Cast:
    """Open what the options name; ValueError or FileNotFoundError for what does not fit together."""
    train = open_data(cfg.data, "train")
    tokenizer = load_tokenizer(train.paths[0].parent)
    check_fingerprint(train.fingerprint, tokenizer.fingerprint, str(train))
    base = open_pretrained(cfg.init, dist.device)
    check_fingerprint(tokenizer.fingerprint, base.tokenizer.fingerprint, cfg.init)
    stop_ids = base.ends_of(train.template)
    prompts = open_prompts(cfg, train, base)
    say(f"prompts: {prompts.summary}", dist.is_main)
    model, lora = base.model.eval(), lora_of(cfg)
    roles = LAYOUTS[cfg.layout](model, critic_of(cfg), cfg.temperature, lora, cfg.branch_layers, dist.copied)
    stored = stored_dtype(cfg, precision)
    roles = roles.stored_in(stored, sampler=cfg.sampler is None, alone=dist.world == 1 and not cfg.shard)
    recompute_blocks(roles.policy, cfg.recompute)
    learner = dist.wrap(roles.policy)
    dist.rest(model)  # before another model is opened
    asked = {"records": prompts.records, "template": train.template}
    reward = open_scorer(cfg.reward, tokenizer, dist.device, base, roles.frozen, **asked, dtype=stored)
    dist.rest(*reward.modules)
    for path in reward.own_models:
        check_form(path, train)
    sampling = Sampling(cfg.response_tokens, stop_ids, tokenizer.pad, cfg.temperature)
    saved_as = policy_config(base, cfg, stop_ids) | {"value_base": cfg.value_base}
    sampler = sampler_of(cfg, roles, sampling, dist, precision, prompts.longest, saved_as, [tokenizer.path])
    held_out = open_judge(cfg, dist, tokenizer, base, sampler, prompts, stored)
    judges = judges_of(cfg, dist, model, roles, reward, held_out)
    whole = reward.is_function or reward.by_row  # a function may rightly look at its whole batch
    alone = None if whole else reward.score
    precisions = {"precision": cfg.precision, "sampled_in": sampler.precision}
    check = partial(check_once, roles.policy, score=alone, eos=stop_ids, dist=dist, **precisions)
    inputs = {"init_sha256": base.digest, "data_sha256": train.digest}
    inputs |= {"reward_sha256": reward.digest, "judge_sha256": cfg.judge and scorer_of(cfg.judge, rules=True).digest}
    acting = acting_of(cfg, sampler, prompts, reward, dist, precision)
    check_room(
        prompts.longest, cfg.response_tokens, cfg.micro_batch_tokens, "--micro_batch_tokens allows a micro-batch"
    )
    reward.check_room(prompts.longest, cfg.response_tokens)
    cuts = cuts_of(cfg, dist)
    value_base = value_base_of(cfg, reward)
    return Cast(roles, learner, reward, acting, *cuts, held_out, judges, check, value_base, tokenizer, inputs, saved_as)


def sampler_of(
    cfg: Config,
    roles: Roles,
    sampling: Sampling,
    dist: Dist,
    precision: Precision,
    longest: int,
    saved_as: dict,
    files: list[Path],
) -> Sampler:
    """The policy itself, or the servers that hold its weights."""
    if cfg.sampler is None:
        return OwnSampler(roles, sampling, cfg.seed, precision, dist, cfg.precision)
    stored = {"kind": "lm"} | {name: saved_as[name] for name in ("model", "tokenizer", "stop_ids")}
    room = Room(cfg.sampler_dir or f"{cfg.out}/sampler", stored, files, hf=cfg.sampler_push is not None)
    push = load_function(cfg.sampler_push, "--sampler_push") if cfg.sampler_push else None
    if dist.world > 1 and cfg.sampler_timeout >= distributed.patience():
        raise ValueError(
            f"--sampler_timeout={cfg.sampler_timeout:g} is not below PLAIN_RLHF_TIMEOUT={distributed.patience():g}, the "
            "seconds that the other ranks wait: lower the first, or raise the second"
        )
    how = (room, longest, cfg.sampler_timeout, dist, push, cfg.samples_per_prompt)
    return Servers(cfg.sampler, roles.policy.model, sampling, cfg.seed, *how)


def check_offload(cfg: Config) -> None:
    """ValueError where --offload names a reward that has nothing to put away."""
    if "reward" in cfg.offload and not any(scorer_of(path).parameters for path in scorer_of(cfg.reward).own_models):
        raise ValueError(
            f"--offload=reward: {cfg.reward} has no trunk of its own that could sleep (a function, a head on the frozen trunk, "
            "or an HF classifier); leave it out"
        )


def judges_of(cfg: Config, dist: Dist, model, roles: Roles, reward: Scorer, held_out) -> offload.Sleeper:
    """The frozen weights that --offload names and nobody but the judging phase computes with."""
    modules = [model] * ("reference" in cfg.offload) + reward.modules * ("reward" in cfg.offload)
    others = [roles.policy, *(held_out.modules if isinstance(held_out, HeldOutJudge) else ())]
    theirs = {id(x) for module in others for x in module.parameters()}
    tensors = {id(x): x for module in modules for x in module.parameters()}
    if len(tensors.keys() - theirs) < len(tensors) and "reference" in cfg.offload:
        raise ValueError(
            f"--offload=reference: the held-out judge {cfg.judge} reads the reference's trunk; leave it out"
        )
    mine = [x for key, x in tensors.items() if key not in theirs]
    return offload.Sleeper(lambda: mine, offload.elsewhere(dist.device, cfg.out), frozen=True)


def acting_of(
    cfg: Config, sampler: Sampler, prompts: PromptLoader, reward: Scorer, dist: Dist, precision: Precision
) -> Acting | Resampling:
    """How an iteration gets its responses."""
    how = (sampler, prompts, cfg.samples_per_prompt, dist)
    if not cfg.resample_flat:
        return Acting(*how)
    further, at_once = replace(prompts, seed=cfg.seed + 1), row_counts(cfg, dist.world)
    return Resampling(*how, further, reward.detailed, cfg.resample_tries, cfg.eos_penalty, at_once, precision)


def open_prompts(cfg: Config, train: Examples, base: Pretrained) -> PromptLoader:
    """The prompts of the run. ValueError where too few are left, and for cutting up those that the data bring."""
    prompts = prompts_of(train, cfg.batch // cfg.samples_per_prompt, cfg.seed, **prompt_options(cfg, base))
    if cfg.prompt_tokens and int(train.prompt_lengths().max(initial=0)) > 1:
        raise ValueError(
            f"--prompt_tokens={cfg.prompt_tokens} cuts prompts out of texts, and {cfg.data} brings prompts of its own: leave "
            "it out (--max_prompt bounds their length)"
        )
    prompts.batch(0)  # where nothing is left, or less than a batch, it says so
    return prompts


def cuts_of(cfg: Config, dist: Dist) -> tuple[Cut | None, Cut | None]:
    """Micro-batches of a minibatch by --micro_batch_tokens; and of all rows of a rank, minibatch by minibatch.

    Every rank cuts alike, for the longest row in each place: under shards all need the same number of forwards.
    """
    if cfg.micro_batch_tokens is None:
        return None, None
    share = cfg.batch // (cfg.minibatches * dist.world)

    def cut(lengths: Tensor) -> list[Tensor]:
        longest = dist.max(lengths).cpu().numpy()
        return [torch.from_numpy(rows) for rows in micro_batches(longest, cfg.micro_batch_tokens)]

    def cut_rollout(lengths: Tensor) -> list[Tensor]:
        shares = enumerate(lengths.split(share))
        return [i * share + rows for i, minibatch in shares for rows in cut(minibatch)]

    return cut, cut_rollout


def value_base_of(cfg: Config, reward: Scorer) -> Score | None:
    """What the values stand on. ValueError where no part of the reward can score a text that is not ended."""
    if cfg.value_base == "zero":
        return None
    if not reward.scores_prefixes:
        raise ValueError(
            f"--value_base=reward: {cfg.reward} holds no reward model of train_rm.py, which alone scores a text that is not "
            "ended: use one, or leave --value_base out"
        )
    return reward.prefix_scores


def prompt_options(cfg: Config, base: Pretrained) -> dict:
    """Which prompts, and how long they may be."""
    return dict(
        starts=cfg.prompt_tokens,
        context=base.model.config.context,
        response_tokens=cfg.response_tokens,
        max_prompt=cfg.max_prompt,
        long_prompts=cfg.long_prompts,
        sources=cfg.sources,
    )


def critic_of(cfg: Config) -> str:
    return (cfg.critic or CRITICS[cfg.layout]) if ESTIMATORS[cfg.estimator].needs_values else "none"


def open_judge(
    cfg: Config,
    dist: Dist,
    tokenizer: Tokenizer,
    base: Pretrained,
    sampler: Sampler,
    prompts: PromptLoader,
    dtype: torch.dtype,
) -> HeldOutJudge | NoJudge:
    """The held-out judge and its prompts: of the validation split, none of which is a training prompt."""
    if cfg.judge is None:
        return NoJudge()
    validation = open_data(cfg.data, "validation")
    loader = prompts_of(validation, 1, cfg.seed, **prompt_options(cfg, base))
    units = unseen(loader, prompts)
    if cfg.judge_prompts > len(units):
        raise ValueError(
            f"--judge_prompts={cfg.judge_prompts}: the validation split has {len(units)}; use at most those"
        )
    batch = drawn(loader, units, cfg.judge_prompts, cfg.seed)
    asked = {"records": loader.records, "template": validation.template}
    opened = open_scorer(cfg.judge, tokenizer, dist.device, base, data=cfg.data, **asked, dtype=dtype)
    opened.check_room(int(batch[1].max()), cfg.response_tokens, "the judge")
    for path in opened.own_models:
        check_form(path, validation)
    return HeldOutJudge(
        opened.score, opened.modules, sampler, *batch, cfg.judge_every, cfg.judge_patience, cfg.batch, dist
    )


def memory_plan(cfg: Config, dist: Dist, micro_batch: int) -> float:
    """GB that this layout should need at its peak; with --plan, the table of all layouts is printed."""
    model, critic, precision = config_of(cfg.init), critic_of(cfg), optim.amp(dist.device, cfg.precision)
    sizes = Sizes(
        batch=cfg.batch // dist.world,
        micro_batch=micro_batch,
        prompt=longest_prompt(cfg, model.context),
        response=cfg.response_tokens,
        critic=cfg.critic if critic != "none" else critic,
        lora=lora_of(cfg),
        branch_layers=cfg.branch_layers,
        recompute=cfg.recompute,
        drawn=SAMPLED_AT_ONCE if dist.device.type == "cpu" else None,
        ranks=dist.world // cfg.replicas if cfg.shard else 1,
        reward=scorer_of(cfg.reward).parameters,
        depths=scorer_of(cfg.reward).depths,
        sampler=cfg.sampler is None,
        baseline=resident_bytes(dist.world > 1 or cfg.recompute) if dist.device.type == "cpu" else 0,
        dtype=stored_dtype(cfg, precision),
        product=precision.dtype,
        offload=cfg.offload,
        bounded=cfg.max_kl is not None,
        on_cpu=dist.device.type == "cpu",
        alone=dist.world == 1 and not cfg.shard,
    )
    if cfg.plan and dist.is_main:
        print(table(model, sizes, cfg.layout))
    if cfg.gpu_gb and dist.is_main:
        print(gpus(model, partial(sizes_on_gpus, cfg, sizes), cfg.layout, cfg.gpu_gb))
    return peak(plan(model, sizes, cfg.layout), cfg.offload) / 1e9


def sizes_on_gpus(cfg: Config, sizes: Sizes, ranks: int) -> Sizes:
    """The sizes of the run on so many GPUs, which have shards and their part of the batch."""
    share = max(1, cfg.batch // (cfg.minibatches * ranks))
    here = {"batch": max(1, cfg.batch // ranks), "micro_batch": min(sizes.micro_batch, share), "ranks": ranks}
    return replace(sizes, **here, dtype=sizes.dtype if ranks == 1 else torch.float32, drawn=None, baseline=0)


def longest_prompt(cfg: Config, context: int) -> int:
    """Tokens of the longest prompt; where the data are not there yet, --plan takes what the options say."""
    if cfg.prompt_tokens is None and Path(cfg.data, "train").is_dir():
        longest = int(open_data(cfg.data, "train").prompt_lengths().max(initial=0))
        if longest > 1:
            return min(longest, cfg.max_prompt or context - cfg.response_tokens)
    return cfg.max_prompt or 1 + (cfg.prompt_tokens or 4)


def row_counts(cfg: Config, world: int) -> int:
    """Responses per forward on one rank, after checking that everything divides."""
    share, rest = divmod(cfg.batch, cfg.minibatches * world)
    if rest:
        unit = cfg.minibatches * world
        raise ValueError(
            f"batch {cfg.batch} does not divide into {cfg.minibatches} minibatches on {world} ranks; "
            f"try {max(unit, cfg.batch // unit * unit)}"
        )
    if cfg.micro_batch_tokens:  # what fits for certain
        longest = longest_prompt(cfg, config_of(cfg.init).context) + cfg.response_tokens
        return max(1, min(share, cfg.micro_batch_tokens // longest))
    micro_batch = cfg.micro_batch or share
    if share % micro_batch:
        raise ValueError(
            f"a rank's share of a minibatch, {share} responses, is not a multiple of micro_batch {micro_batch}; "
            f"try {max(n for n in range(1, micro_batch + 1) if share % n == 0)}"
        )
    return micro_batch


def texts(experience: Experience, tokenizer: Tokenizer, most: int = 8) -> list[dict]:
    """The first responses of an iteration as rows for people to read, with what PPO knew about every token."""
    rows = []
    for row in (experience[i : i + 1] for i in range(min(most, len(experience)))):
        n, start = int(row.lengths), int(response_starts(row.lengths, row.mask))
        kl = float((row.logprobs - row.ref_logprobs).sum())
        ids = row.tokens[0, start:n].tolist()
        pieces = Detokenizer(tokenizer)
        tokens = [pieces.push(i) for i in ids]
        tokens[-1] += pieces.flush()
        texts = {"prompt": tokenizer.decode(row.tokens[0, :start].tolist()), "response": tokenizer.decode(ids)}
        numbers = {name: [round(x, 4) for x in getattr(row, name)[0, start:n].tolist()] for name in PER_TOKEN}
        rows.append({"score": float(row.scores), "kl": kl, **texts, "tokens": tokens, **numbers})
    return rows


PER_TOKEN = ("logprobs", "ref_logprobs", "values", "rewards", "advantages")  # for the microscope of the report


def write_report(out: str, judge_every: int) -> None:
    """report.json: the means of the last five iterations, the held-out judge's best, the seconds used; and the doctor."""
    all_rows, state = read_lines(f"{out}/metrics.jsonl"), checkpoint.load(out).state
    rows = [row for row in all_rows if row["step"] <= state["done"]][-5:]  # not of a policy that max_kl took back
    names = ("objective/scores", "objective/kl", "response/length", "response/distinct_2", "time/total")
    finite = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    report = {name: sum(numbers) / len(numbers) if numbers else math.nan for name, numbers in finite.items()}
    report |= {"iterations": state["done"], "stopped": state["stopped"], "seconds": state["seconds"]}
    report |= {"brake": state["brake"]} if "brake" in state else {}
    if verdicts := state["verdicts"]:
        done, mean = (best_place(verdicts) + 1) * judge_every, max(verdicts)
        report["best"] = {"iterations": done, "judge/mean": mean}
        print(f"the held-out judge likes the policy after {done} iterations best, {mean:.3f} -> {out}/best")
    write_json(f"{out}/report.json", report)
    print(
        f"score {report['objective/scores']:.2f} at {report['objective/kl']:.1f} nats, {report['seconds']:.0f} s -> {out}"
    )
    options, samples = read_json(f"{out}/run.json"), read_lines(f"{out}/samples.jsonl")
    print(in_words(diagnose(all_rows, options, samples, stops_of(out)), len(all_rows)))


if __name__ == "__main__":
    config.run(main)
