"""Side by side with the real thing: trl, transformers and peft themselves, where they are installed.

The golden files hold what frameworks computed once; here they compute again, on random input, in this process. TRL 1.12 is
the last version with PPO. The extra `compare` installs all of them; without it everything here is skipped.
"""

import os
import re
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.check.dump import load_dump
from rlhf.check.recompute import check
from rlhf.functional import logprobs_and_entropy, masked_mean, masked_sum, masked_var, whiten
from rlhf.losses import dpo_loss, preference_loss

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="trl is not installed: pip install -e '.[compare]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[compare]'")
ppo = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="this trl has no PPO; 1.12.0 is the last that has")


def ragged(seed, rows=6, columns=7):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, columns + 1, (rows,), generator=generator)
    lengths[0] = columns
    return x, torch.arange(columns) < lengths[:, None]


def close(ours, theirs, tolerance=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_trl_masked_statistics(seed):
    x, mask = ragged(seed)
    close(masked_mean(x, mask), ppo.masked_mean(x, mask))
    close(masked_var(x, mask, unbiased=False), ppo.masked_var(x, mask, unbiased=False))
    close(masked_var(x, mask), ppo.masked_var(x, mask), 1e-7)  # their n / (n - 1) is a float32
    close(whiten(x, mask)[mask], ppo.masked_whiten(x, mask)[mask], 1e-7)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]))
def test_trl_log_probabilities_and_entropy(seed, dtype):
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(3, 4, 11, generator=generator, dtype=dtype)
    tokens = torch.randint(11, (3, 4), generator=generator)
    logprobs, entropy = logprobs_and_entropy(logits, tokens)
    tolerance = {torch.float32: 3e-6, torch.float64: 1e-12}[dtype]
    close(logprobs, selective_log_softmax(logits, tokens), tolerance)
    close(entropy, entropy_from_logits(logits), tolerance)


@pytest.mark.parametrize("with_margin", [False, True])
def test_trl_reward_loss(with_margin):
    """RewardTrainer.compute_loss itself; its model returns chosen and rejected scores one below the other."""
    from trl import RewardTrainer

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(10, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = {"attention_mask": torch.ones(10, 3)}
    if with_margin:
        inputs["margin"] = torch.rand(5, generator=generator, dtype=torch.float64)
    trainer = MagicMock()
    trainer.args.center_rewards_coefficient = None
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores), dict(inputs))
    ours = preference_loss(*scores[:, 0].chunk(2), inputs.get("margin")).mean()
    close(ours, theirs)
    close(*(torch.autograd.grad(loss, scores)[0] for loss in (ours, theirs)))


def test_trl_dpo_loss():
    """DPOTrainer._compute_loss itself, from logits to the loss and its gradient."""
    from trl import DPOTrainer

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 8, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(11, (6, 8), generator=generator)
    ref = torch.randn(6, generator=generator, dtype=torch.float64) - 12
    completion = torch.arange(8) >= torch.tensor([2, 3, 4, 2, 3, 4])[:, None]
    completion &= torch.arange(8) < torch.tensor([8, 5, 6, 3, 8, 7])[:, None]
    options = {"beta": 0.3, "loss_types": ["sigmoid"], "loss_weights": [1.0], "ld_alpha": None}
    options |= {"f_divergence_type": "reverse_kl", "precompute_ref_logps": True, "label_smoothing": 0.0}
    trainer = MagicMock(**options, aux_loss_enabled=False, use_weighting=False)
    trainer.accelerator.gather_for_metrics = lambda x: x
    chosen, rejected = ref.chunk(2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion.long()}
    model = Mock(return_value=SimpleNamespace(logits=logits))
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    theirs = DPOTrainer._compute_loss(trainer, model, inputs, False)
    logprobs, _ = logprobs_and_entropy(logits[:, :-1], ids[:, 1:])
    sums = masked_sum(logprobs, completion[:, 1:], dim=1)
    ours = dpo_loss(*sums.chunk(2), chosen, rejected, beta=0.3).mean()
    close(ours, theirs)
    close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


def tiny_models(vocabulary):
    """A policy, another as its reference, a reward model and a critic: random Llamas of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        num_labels=1,
        initializer_range=0.3,  # far from uniform, so that the KL is not zero
    )
    kinds = (LlamaForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForSequenceClassification)
    return [kind(config) for kind in kinds]


def word_tokenizer(vocabulary):
    from transformers import PreTrainedTokenizerFast

    tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w2")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="w0", eos_token="w1", padding_side="left"
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"kl_estimator": "k3", "lam": 0.5, "missing_eos_penalty": 1.0}], ids=str)
def test_the_real_trl_ppo_trainer(tmp_path, options):
    """PPOTrainer.train on tiny Llamas, dumped by the snippet of docs/check.md: every number is ours or is explained."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    vocabulary = 20
    policy, reference, reward_model, critic = tiny_models(vocabulary)
    prompts = [{"input_ids": [3 + (7 * row + column) % 17 for column in range(3 + row % 3)]} for row in range(24)]
    arguments = PPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=12,
        gradient_accumulation_steps=1,
        total_episodes=12,
        num_ppo_epochs=1,
        response_length=10,
        stop_token="eos",
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        num_sample_generations=0,
        disable_tqdm=True,
        seed=1,
        **options,
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=word_tokenizer(vocabulary),
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=critic,
        train_dataset=Dataset.from_list(prompts),
    )
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", text(), re.S) if "dump_first_step" in code)
    names = {}
    exec(snippet, names)
    names["dump_first_step"](trainer, tmp_path / "trl.safetensors")
    trainer.train()

    dump = load_dump(tmp_path / "trl.safetensors")
    room = ~dump["mask"][:, -1]
    assert room.any() and not room.all()  # rows with and without padding
    findings = {f.quantity: f for f in check(dump, tolerance=2e-5)}
    equal = {name for name, f in findings.items() if f.equal}
    assert equal >= {"whitened_advantages", "policy_loss"} | ({"kl"} if not options else set())
    if options:
        assert findings["kl"].explanations == ("KL estimator k3",)
    assert "score on the slot after EOS (TRL >= 0.12)" in findings["rewards"].explanations
    slot = "the slot after EOS is part of the episode (TRL >= 0.12, DeepSpeed-Chat)"
    assert slot in findings["returns"].explanations
    assert findings["value_loss"].explanations == ("the slot after EOS is trained too (TRL >= 0.12, torchtune)",)


def text():
    return (ROOT / "docs" / "check.md").read_text()
