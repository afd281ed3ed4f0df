"""One PPO iteration of every layout beside one of TRL's PPOTrainer: samples per second and peak memory, taken in turns.

    python bench/ppo.py --shape=small                        # needs the extra "compare" (trl 1.12, its last with PPO)
    python bench/ppo.py --shape=smollm2 --rounds=2
    python bench/ppo.py --shape=smollm2 --precision=bf16 --sides=trl,shared,branch
    python bench/ppo.py --shape=smollm2_long --precision=fp32,bf16 --sides=shared,branch  # ours against our own float32
    python bench/ppo.py --shape=small --count=true           # the products that an iteration needs, and nothing is run

Every measurement is a process of its own: random weights of the same shape, prompts and responses of a fixed length without
EOS, one thread, the same precision on both sides (bf16: TRL's is autocast), AdamW, 4 epochs of 4 minibatches. CPU seconds of
an iteration (act, judge, credit, learn) after one to warm up; what counts are the ratios within a round. TRL holds policy,
value, reference and reward: four models. So does `full`; `shared` has no second trunk for the value; `adapters` (rank 16 on
every linear layer) and `branch` (the top layers) hold one trunk, and their reward is a head that reads it at half and three
quarters of its depth, as train_rm.py makes it. `adapters` has an adapter of its own for the critic, `adapters_joint` the
value head on the policy's.
"""

import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import figures  # noqa: E402
import peers  # noqa: E402
import torch  # noqa: E402

from model.generate import SAMPLED_AT_ONCE, Sampling, generate, row_uniforms  # noqa: E402
from model.half import store  # noqa: E402
from model.hf import empty_model  # noqa: E402
from model.transformer import ModelConfig, Transformer  # noqa: E402
from rlhf.advantages import gae  # noqa: E402
from rlhf.functional import whiten  # noqa: E402
from rlhf.infra import config, distributed, optim, run  # noqa: E402
from rlhf.lm.checkpoints import trunk_parameters  # noqa: E402
from rlhf.lm.trunks import LoRA  # noqa: E402
from rlhf.ppo import plan  # noqa: E402
from rlhf.ppo import update as ppo  # noqa: E402
from rlhf.ppo.roles import LAYOUTS  # noqa: E402
from rlhf.ppo.rollout import Experience, judge, minibatches  # noqa: E402
from rlhf.reward.model import FrozenReward, RewardModel  # noqa: E402
from rlhf.rewards import shape_rewards  # noqa: E402


@dataclass(frozen=True)
class Sizes:
    model: ModelConfig
    batch: int  # responses per iteration
    prompt: int  # tokens
    response: int  # tokens
    branch_layers: int
    epochs: int = 4
    minibatches: int = 4


SHAPES = {
    "small": Sizes(ModelConfig(8192, 256, 4, 4, tied=False, context=256), 64, 16, 48, branch_layers=2),
    "smollm2": Sizes(
        ModelConfig(49152, 576, 30, 9, kv_heads=3, ffn=1536, context=2048, rope_theta=1e5), 8, 16, 32, branch_layers=4
    ),
}
SHAPES["smollm2_long"] = replace(SHAPES["smollm2"], batch=32, prompt=32, response=64)


SIDES = {  # layout and critic
    "full": ("full", "separate"),
    "shared": ("shared", "shared"),
    "adapters": ("adapters", "separate"),
    "adapters_joint": ("adapters", "shared"),
    "branch": ("branch", "shared"),
}
ON_THE_TRUNK = ("adapters", "branch")  # the layouts whose reward is a head on the trunk


Shape, Kind = Literal["small", "smollm2", "smollm2_long"], Literal["fp32", "bf16"]
Side = Literal["trl", "full", "shared", "adapters", "adapters_joint", "branch"]


@dataclass(frozen=True)
class Config:
    shape: Shape = "small"  # 7.4M parameters, 64 x (16 + 48) tokens; SmolLM2-135M, 8 x (16 + 32), or 32 x (32 + 64)
    precision: tuple[Kind, ...] = ("fp32",)  # of all sides; with two, every side in both
    sides: tuple[Side, ...] = ("trl", *SIDES)  # the first is what the others are compared with
    rounds: int = 3  # every side once per round
    iterations: int = 2  # timed in each measurement, after one to warm up
    count: bool = False  # print the operations of every side's products, and stop
    alone: bool = False  # measure one side in this process, and print JSON

    def __post_init__(self):
        config.at_least(self, rounds=1, iterations=1)


def main() -> None:
    cfg = config.parse(Config)
    if cfg.alone:
        print(json.dumps(measured(cfg, cfg.sides[0], cfg.precision[0])))
        return
    if cfg.count:
        print(counted(SHAPES[cfg.shape], cfg.sides))
        return
    sides = [(side, precision) for side in cfg.sides for precision in cfg.precision]
    found = {f"{side} {precision}": [] for side, precision in sides}
    for _ in range(cfg.rounds):
        for side, precision in sides:
            command = [sys.executable, __file__, "--alone", f"--sides={side}", f"--precision={precision}"]
            command += [f"--shape={cfg.shape}", f"--iterations={cfg.iterations}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ValueError(f"{side}: {done.stderr.strip().splitlines()[-1]}")
            name = f"{side} {precision}"
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, found[name][-1], flush=True)
    report(cfg, found)


def measured(cfg: Config, side: str, precision: str) -> dict[str, float]:
    """CPU seconds of an iteration (median) and GB of this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes, measure = SHAPES[cfg.shape], they if side == "trl" else we
    found = {} if side == "trl" else {"planned_memory_gb": planned_memory(sizes, side, precision)}
    found["cpu_seconds"] = statistics.median(measure(sizes, cfg.iterations + 1, side, precision)[1:])
    return found | {"peak_memory_gb": run.peak_memory_gb(torch.device("cpu"))}


def report(cfg: Config, found: dict[str, list[dict[str, float]]]) -> None:
    first = next(iter(found))
    print(f"\n{cfg.shape}, {cfg.rounds} rounds: medians, and times as fast as {first} in the same round [least, most]")
    print(f"{'':<20}{'samples/s':>12}{'ratio':>22}{'peak GB':>10}{'of it':>8}{'planned GB':>12}")
    for side, rows in found.items():
        seconds = [row["cpu_seconds"] for row in rows]
        ratios = [theirs["cpu_seconds"] / ours for theirs, ours in zip(found[first], seconds)]
        memory = statistics.median(row["peak_memory_gb"] for row in rows)
        share = memory / statistics.median(row["peak_memory_gb"] for row in found[first])
        ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        speed = SHAPES[cfg.shape].batch / statistics.median(seconds)
        if side != first:
            figures.ratio(f"PPO iteration, {cfg.shape}, {side}", first, ratios)
            figures.ratio(f"its peak memory, {cfg.shape}, {side}", first, [share])
        planned = f"{rows[0]['planned_memory_gb']:12.2f}" if "planned_memory_gb" in rows[0] else ""
        print(f"{side:<20}{speed:12.3f}{ratio:>22}{memory:10.2f}{share:8.2f}{planned}")


def counted(sizes: Sizes, sides: tuple[str, ...]) -> str:
    """Operations of an iteration's products, every side, and how many times fewer than the first side's."""
    counts = {side: operations(sizes, side) for side in sides}
    first, most = next(iter(counts.items()))
    return "\n".join(
        f"{side:<16}{n / 1e9:8.0f} GFLOP{most / n:8.2f} times fewer than {first}" for side, n in counts.items()
    )


def operations(sizes: Sizes, side: str) -> int:
    """2 for each number of a matrix and token that passes it, and again for each gradient; attention and LoRA left out.

    TRL passes every token of a row through four models to judge, and through two to learn; ours needs log-probs of the
    response alone, and of frozen matrices no gradient.
    """
    model, rows = sizes.model, sizes.batch
    trunk = sum(x.numel() for x in empty_model(model).layers.parameters() if x.dim() == 2)
    vocabulary = model.vocab_size * model.width
    everything, inputs = rows * (sizes.prompt + sizes.response), rows * (sizes.prompt + sizes.response - 1)
    spoken, epochs = rows * sizes.response, sizes.epochs
    sampled = 2 * (everything * trunk + spoken * vocabulary)
    whole, values = 2 * everything * (trunk + vocabulary), 2 * everything * trunk
    if side == "trl":  # policy and reference; value and reward
        return sampled + 2 * whole + 2 * values + 3 * epochs * (whole + values)
    layout, critic = SIDES[side]
    words, passed = 2 * spoken * vocabulary, 2 * inputs * trunk
    second = passed * (critic == "separate")
    if layout == "branch":
        top = passed * sizes.branch_layers // model.layers
        return sampled + 2 * (top + words) + epochs * (3 * top + 2 * words)
    if layout == "adapters":  # reference and reward in one pass
        return sampled + 2 * (passed + words) + second + 2 * epochs * (passed + words + second)
    return sampled + 2 * (passed + words) + second + values + 3 * epochs * (passed + words + second)


def planned_memory(sizes: Sizes, side: str, precision: str) -> float:
    """GB that `train_ppo.py --plan` would say."""
    layout, critic = SIDES[side]
    model, own_reward = sizes.model, layout not in ON_THE_TRUNK
    planned = plan.Sizes(
        sizes.batch,
        sizes.batch // sizes.minibatches,
        sizes.prompt,
        sizes.response,
        critic=critic,
        branch_layers=sizes.branch_layers,
        reward=trunk_parameters(model) if own_reward else 0,
        baseline=run.resident_bytes(),
        drawn=SAMPLED_AT_ONCE,
        dtype=optim.DTYPES[precision],
        on_cpu=True,
    )
    return plan.peak(plan.plan(model, planned, layout)) / 1e9


def we(sizes: Sizes, rounds: int, side: str, kind: str) -> list[float]:
    """CPU seconds of every iteration of ours, in the steps of train_ppo.py."""
    layout, critic = SIDES[side]
    dist, precision = distributed.setup(), optim.amp(torch.device("cpu"), kind)
    generator = torch.Generator().manual_seed(1)
    base = Transformer(sizes.model)
    base.init_weights(generator)
    roles = LAYOUTS[layout](base, critic, 1.0, LoRA(), sizes.branch_layers).stored_in(precision.dtype)
    if layout in ON_THE_TRUNK:
        depths = (sizes.model.layers // 2, sizes.model.layers * 3 // 4)
        reward = FrozenReward(roles.frozen, list(zip(depths, ("mean", "last"))), ()).requires_grad_(False)
    else:
        second = Transformer(sizes.model)
        second.init_weights(generator)
        reward = RewardModel(second, "last").requires_grad_(False).eval()
        store(second, precision.dtype)
    score: Callable = torch.no_grad()(reward.score)
    optimizer = optim.make_optimizer(roles.policy, 3e-6, 0.0, betas=(0.9, 0.999), eps=1e-5)
    micro_batch, width = sizes.batch // sizes.minibatches, sizes.prompt + sizes.response
    lengths, objective, seconds = torch.full((sizes.batch,), sizes.prompt), ppo.Objective(), []
    for iteration in range(rounds):
        prompts = torch.randint(3, sizes.model.vocab_size, (sizes.batch, sizes.prompt), generator=generator)
        start = time.process_time()
        uniforms = row_uniforms(1, iteration, range(sizes.batch), sizes.response)
        how = Sampling(sizes.response, [], 0)
        samples = generate(roles.sampler(), prompts, lengths, how, uniforms, depths=roles.seen())
        roles.rest()
        with precision.autocast():
            rollout = judge(samples, roles.policy, roles.reference, score, micro_batch, width, roles.features)
        rewards = shape_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, 0.05)
        advantages, returns = gae(rewards, rollout.values, rollout.mask, 1.0, 0.95)
        experience = Experience.of(rollout, rewards, whiten(advantages, rollout.mask), returns)
        updates = []
        for rows in minibatches(sizes.batch, sizes.minibatches, sizes.epochs, 1, iteration):
            update = ppo.accumulate_gradient(roles.policy, experience[rows], objective, micro_batch, dist, precision)
            norm = optim.step(optimizer, roles.policy, precision.scaler, 1.0)
            updates.append(update | {"policy/grad_norm": norm, "bad/steps": 0.0})
        ppo.metrics(experience, advantages, updates, 0.05, sizes.minibatches)
        seconds.append(time.process_time() - start)
    return seconds


def they(sizes: Sizes, rounds: int, side: str, kind: str) -> list[float]:
    """CPU seconds of every iteration of TRL's PPOTrainer."""
    with peers.installed():
        import datasets
        import tokenizers
        import transformers
        from trl.experimental.ppo import PPOConfig, PPOTrainer

    model = sizes.model
    llama = peers.llama_config(model, bos_token_id=1, eos_token_id=None, pad_token_id=None)
    policy, reference = (transformers.LlamaForCausalLM(llama).float() for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    value, reward = (transformers.LlamaForSequenceClassification(llama).float() for _ in range(2))
    pad = model.vocab_size  # an id that no model can sample: every response has its full length
    words = tokenizers.models.WordLevel({**{f"t{i}": i for i in range(pad)}, "[PAD]": pad}, unk_token="t0")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="[PAD]", unk_token="t0", eos_token="t2"
    )
    tokenizer.padding_side = "left"
    prompts = torch.randint(3, model.vocab_size, (max(rounds, 2) * sizes.batch, sizes.prompt))
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.start = time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.process_time() - self.start)
            self.start, control.should_save = time.process_time(), False

    with tempfile.TemporaryDirectory() as scratch:
        options = {
            "output_dir": scratch, "per_device_train_batch_size": sizes.batch, "gradient_accumulation_steps": 1,
            "num_mini_batches": sizes.minibatches, "num_ppo_epochs": sizes.epochs, "temperature": 1.0,
            "total_episodes": sizes.batch * rounds, "response_length": sizes.response, "stop_token": None,
            "local_rollout_forward_batch_size": sizes.batch, "num_sample_generations": 0, "learning_rate": 3e-6,
            "bf16": kind == "bf16", "fp16": False, "gradient_checkpointing": False, "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "logging_steps": 10**9, "use_cpu": True, "seed": 0,
        }  # fmt: skip
        if unknown := sorted(options.keys() - inspect.signature(PPOConfig).parameters.keys()):
            raise ValueError(f"this release of trl has no option {', '.join(unknown)}; install trl==1.12.0")
        trainer = PPOTrainer(
            args=PPOConfig(**options), processing_class=tokenizer, model=policy, ref_model=reference,
            reward_model=reward, value_model=value, callbacks=[Clock()],
            train_dataset=datasets.Dataset.from_dict({"input_ids": prompts.tolist()}),
        )  # fmt: skip
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
    return seconds


if __name__ == "__main__":
    config.run(main, stopped="stopped")
