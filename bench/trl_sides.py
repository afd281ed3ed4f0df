"""TRL's side of against_trl.py: its PPOTrainer, GRPOTrainer and RLOOTrainer on the small models, and their logs."""

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import peers
import small
import torch
from torch import Tensor

from model.generate import row_uniforms, sample_step

QUIET = {
    "bf16": False, "fp16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True, "use_cpu": True, "weight_decay": 0.0, "adam_epsilon": 1e-8, "warmup_steps": 0,
}  # fmt: skip


def models(place: Path, dtype: torch.dtype = torch.float32):
    """Policy, reference, reward and critic of transformers, and the tokenizer; the critic starts as ours does.

    HF's classifiers have no bias: `score` gets one, which for the reward is what export.py wrote into config.json.
    """
    import transformers

    lm, reward = place / "lm_hf", place / "proxy_hf"
    policy, reference = (transformers.AutoModelForCausalLM.from_pretrained(lm, dtype=dtype) for _ in range(2))
    critic, judge = (
        transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, num_labels=1)
        for path in (lm, reward)
    )
    width = policy.config.hidden_size
    trained, judge.score, critic.score = judge.score.weight, *(torch.nn.Linear(width, 1, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        judge.score.weight.copy_(trained)
        judge.score.bias.fill_(judge.config.reward_bias)
        critic.score.weight.zero_()
        critic.score.bias.zero_()
    tokenizer = transformers.AutoTokenizer.from_pretrained(lm)
    tokenizer.padding_side = "left"
    return policy, reference, judge, critic, tokenizer


def no_padding(tokens: Tensor, logits: Tensor, pad: int) -> Tensor:
    """The likeliest token in the place of a drawn padding token, which TRL takes for the end of a response. (B,), (B, V)"""
    return torch.where(tokens == pad, logits.argmax(-1), tokens)


class SharedRandomness:
    """Responses by the uniforms that our sampler draws for (seed, iteration, row), from transformers' logits."""

    def __init__(self, seed: int, eos: int):
        self.seed, self.eos, self.iteration = seed, eos, 0

    def __call__(self, model, queries: Tensor, at_once: int, pad: int, generation_config) -> tuple[Tensor, Tensor]:
        """In place of TRL's `batch_generation`: (B, P) -> (B, P + T), logits (B, T, V)."""
        from trl.experimental.ppo.ppo_trainer import forward

        steps = generation_config.max_new_tokens
        uniforms = row_uniforms(self.seed, self.iteration, range(len(queries)), steps)
        self.iteration += 1
        tokens, ended, logits = queries, torch.zeros(len(queries), dtype=torch.bool), []
        for t in range(steps):
            last = forward(model, tokens, pad).logits[:, -1]
            new = no_padding(sample_step(last, uniforms[:, t])[0], last, pad)
            new = torch.where(ended, pad, new)
            ended |= new == self.eos
            tokens, logits = torch.cat((tokens, new[:, None]), 1), [*logits, last]
        return tokens, torch.stack(logits, 1)


def ppo(cfg, place: Path, seed: int, prompts: Tensor, shared: bool) -> list[dict]:
    """PPOTrainer's log of every iteration; prompts (iterations * batch, P) in this order.

    shared: responses by our random numbers, in float64.
    """
    with peers.installed():
        import datasets
        import transformers
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    policy, reference, reward, critic, tokenizer = models(place, torch.float64 if shared else torch.float32)
    temperature = 1 - 1e-7 if shared else 1.0  # it divides new logits by temperature + 1e-7, and ours not
    with tempfile.TemporaryDirectory() as scratch:
        options = PPOConfig(
            output_dir=scratch, per_device_train_batch_size=cfg.batch, gradient_accumulation_steps=1, seed=seed,
            num_mini_batches=cfg.minibatches, num_ppo_epochs=cfg.epochs, temperature=temperature, learning_rate=cfg.lr,
            total_episodes=len(prompts), response_length=small.RESPONSE, stop_token="eos", lam=cfg.lam, gamma=1.0,
            local_rollout_forward_batch_size=cfg.batch, num_sample_generations=0, lr_scheduler_type="linear",
            missing_eos_penalty=cfg.eos_penalty, kl_coef=cfg.kl_coef, kl_estimator="k1", cliprange=cfg.clip,
            cliprange_value=cfg.value_clip, vf_coef=cfg.value_coef, whiten_rewards=False, logging_steps=1, **QUIET,
        )  # fmt: skip
        rows = datasets.Dataset.from_dict({"input_ids": prompts.tolist()})
        trainer = PPOTrainer(
            args=options, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
            value_model=critic, train_dataset=rows,
        )  # fmt: skip
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.dataloader = torch.utils.data.DataLoader(rows, cfg.batch, collate_fn=trainer.data_collator)
        ours = SharedRandomness(seed, tokenizer.eos_token_id)
        np.random.seed(seed)  # of its minibatches
        with small.replaced(ppo_trainer, batch_generation=ours) if shared else contextlib.nullcontext():
            trainer.train()
    return [row for row in trainer.state.log_history if "objective/kl" in row]


def grouped(cfg, place: Path, seed: int, prompts: Tensor, score, shared: bool) -> list[dict]:
    """The log of GRPOTrainer or RLOOTrainer; prompts (iterations * batch / group, P) in this order, score of ours.

    shared: responses by our random numbers, in float64, and minibatches in the order of the responses.
    """
    with peers.installed():
        import datasets
        import transformers
        import trl
        from trl.trainer import grpo_trainer, rloo_trainer

        trainer_of, config_of = (getattr(trl, f"{cfg.trainer.upper()}{what}") for what in ("Trainer", "Config"))

    class OnTokens(trainer_of):
        """The prompt is a row of numbers, and they are its ids."""

        def _tokenize_prompts(self, prompts):
            return [[int(word) for word in prompt.split()] for prompt in prompts], None, {}

        def _generate_single_turn(self, prompt_ids, *more):
            if not shared:
                return super()._generate_single_turn(prompt_ids, *more)
            queries, eos = torch.tensor(prompt_ids), tokenizer.eos_token_id
            with torch.no_grad():
                tokens, _ = ours(self.model, queries, len(queries), tokenizer.pad_token_id, self.generation_config)
            rows = tokens[:, queries.shape[1] :].tolist()
            ended = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
            return (ended, None) if cfg.trainer == "grpo" else ended  # and the sampler's log-probs, which it may use

        def _calculate_rewards(self, inputs, *answers):
            if not shared:
                return super()._calculate_rewards(inputs, *answers)
            return torch.tensor(reward(*answers), dtype=torch.float64)[:, None]  # TRL rounds them to float32

    def reward(prompts, completions, completion_ids, **_) -> list[float]:
        rows = [[*map(int, prompt.split()), *ids] for prompt, ids in zip(prompts, completion_ids)]
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.full((len(rows), int(lengths.max())), tokenizer.pad_token_id)
        for place, row in zip(tokens, rows):
            place[: len(row)] = torch.tensor(row)
        found = score(tokens, lengths, torch.arange(tokens.shape[1]) < lengths[:, None])
        ended = torch.tensor([ids[-1] == tokenizer.eos_token_id for ids in completion_ids])
        return torch.where(ended, found, found - cfg.eos_penalty).tolist()

    policy, *_, tokenizer = models(place, torch.float64 if shared else torch.float32)
    ours = SharedRandomness(seed, tokenizer.eos_token_id)
    same_order = {"shuffle_sequence_dict": lambda batch: batch} if shared else {}
    same = {"loss_type": "bnpo", "scale_rewards": "group"} if cfg.trainer == "grpo" else {}
    with tempfile.TemporaryDirectory() as scratch:
        options = config_of(
            output_dir=scratch, per_device_train_batch_size=cfg.batch // cfg.minibatches, seed=seed, beta=0.0,
            gradient_accumulation_steps=1, steps_per_generation=cfg.minibatches, num_iterations=cfg.epochs,
            num_generations=cfg.group, max_completion_length=small.RESPONSE, temperature=1.0, top_k=0, top_p=1.0,
            epsilon=cfg.clip, learning_rate=cfg.lr, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1,
            max_steps=cfg.iterations * cfg.epochs * cfg.minibatches, shuffle_dataset=False, **same, **QUIET,
        )  # fmt: skip
        rows = datasets.Dataset.from_dict({"prompt": [" ".join(map(str, row)) for row in prompts.tolist()]})
        trainer = OnTokens(
            model=policy, reward_funcs=reward, args=options, train_dataset=rows, processing_class=tokenizer
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        with small.replaced({"grpo": grpo_trainer, "rloo": rloo_trainer}[cfg.trainer], **same_order):
            trainer.train()
    steps = [row for row in trainer.state.log_history if "entropy" in row]  # only an iteration's first has a reward
    names = {"loss/policy": "loss", "policy/clipfrac": "clip_ratio/region_mean", "policy/entropy": "entropy"}
    found, each = [], cfg.epochs * cfg.minibatches
    for first in range(0, len(steps), each):
        means = {mine: np.mean([row[name] for row in steps[first : first + each]]) for mine, name in names.items()}
        found.append({"objective/scores": steps[first]["reward"]} | means)
    return found
