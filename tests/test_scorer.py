"""What /v1/tokens says, against whole forwards of the models of a real PPO run."""

import pytest
import torch
from torch.nn.functional import kl_div

from evaluation.card import Text, encoder, score_rows
from rlhf.infra import checkpoint
from rlhf.lm.checkpoints import new_transformer
from rlhf.lm.pretrained import open_pretrained
from rlhf.lm.trunks import LoRA
from rlhf.ppo.roles import LAYOUTS, ActorCritic
from rlhf.reward.files import load_reward_model
from rlhf.reward.scorer import open_scorer
from rlhf.serve.protocol import continuation, prompt_of
from rlhf.serve.scorer import Scorer, load_values

pytestmark = pytest.mark.slow
PROMPT, RESPONSE = [1, 7, 9, 30], [11, 300, 5, 2]


@pytest.mark.parametrize("layout, critic", [("shared", "shared"), ("shared", "separate"), ("full", "separate")])
def test_values_kl_and_logprobs_of_a_ppo_run(world, layout, critic):
    out = f"scored-{layout}-{critic}"
    options = {} if layout == "full" else {"critic": critic}
    assert world.run("train_ppo.py", out=out, layout=layout, weak_reward="true", **options).code == 0
    saved = checkpoint.load(checkpoint.resolve(world.path / out))
    policy = ActorCritic(new_transformer(saved.config["model"], out), critic)
    policy.load_state_dict(saved.tensors)
    opened, reference = (open_pretrained(world.path / name) for name in (out, "lm"))
    model = opened.model.eval()
    scorer = Scorer(model, reference.model.eval(), None, load_values(world.path / out, model))
    found = scorer.tokens(PROMPT, RESPONSE, 2)

    tokens, response = torch.tensor([PROMPT + RESPONSE]), slice(len(PROMPT), None)
    mask = torch.arange(tokens.shape[1])[None] >= len(PROMPT)
    with torch.no_grad():
        expected = policy(tokens, mask)
        ours, theirs = (x(tokens)[0, len(PROMPT) - 1 : -1].log_softmax(-1) for x in (policy.model, reference.model))
    assert [token["id"] for token in found] == RESPONSE
    assert [token["value"] for token in found] == pytest.approx(expected.values[0, response].tolist(), abs=1e-5)
    assert any(abs(token["value"]) > 1e-4 for token in found)  # the head starts at zero, and was trained
    assert [token["logprob"] for token in found] == pytest.approx(expected.logprobs[0, response].tolist(), abs=1e-5)
    kl = kl_div(theirs, ours, reduction="none", log_target=True).sum(-1).tolist()  # KL(ours || theirs)
    assert [token["kl"] for token in found] == pytest.approx(kl, abs=1e-5)


@pytest.mark.parametrize("layout", ["adapters", "branch"])
def test_values_of_a_separate_critic_on_the_base(world, layout, monkeypatch):
    """Only what was trained is stored: the critic is put together from it and the base."""
    monkeypatch.chdir(world.path)  # the base is named from there
    out = f"scored-{layout}"
    options = {"branch_layers": 1} if layout == "branch" else {}
    done = world.run("train_ppo.py", out=out, layout=layout, critic="separate", weak_reward="true", **options)
    assert done.code == 0, done.err
    saved = checkpoint.load(checkpoint.resolve(world.path / out))
    base = open_pretrained(world.path / "lm").model
    roles = LAYOUTS[layout](base, "separate", 1.0, LoRA(saved.config.get("lora_rank", 1), saved.config.get("lora_alpha", 1)),
                            saved.config.get("branch_layers", 1))  # fmt: skip
    missing = roles.policy.load_state_dict(saved.tensors, strict=False)
    assert not missing.unexpected_keys
    tokens = torch.tensor([PROMPT + RESPONSE])
    mask = torch.arange(tokens.shape[1])[None] >= len(PROMPT)
    with torch.no_grad():
        expected = roles.policy.eval()(tokens, mask).values[0, len(PROMPT) :].tolist()
    model = open_pretrained(world.path / out).model.eval()
    found = Scorer(model, None, None, load_values(world.path / out, model)).tokens(PROMPT, RESPONSE, 2)
    assert [token["value"] for token in found] == pytest.approx(expected, abs=1e-5)
    assert any(abs(token["value"]) > 1e-4 for token in found)


def test_half_of_a_value_is_none(world, tmp_path):
    """The head of --value_base=reward says what the reward model's score lacks: alone it is no value."""
    world.ok("train_ppo.py", out=tmp_path, iterations=1, value_base="reward")
    assert load_values(tmp_path, open_pretrained(tmp_path).model) is None


def test_a_model_without_a_critic_has_no_values(world):
    model = open_pretrained(world.path / "lm").model
    assert load_values(world.path / "lm", model) is None


@pytest.mark.parametrize("pooling", ["last", "mean", "attention"])
def test_a_score_is_that_of_training_and_of_the_report_card(world, pooling):
    """With eos behind the answer; a model that pools the last token reads something else at the last word."""
    out = f"rm-{pooling}"
    world.ok("train_rm.py", out=out, pooling=pooling)
    opened = open_pretrained(world.path / "lm")
    tokenizer = opened.tokenizer
    model = load_reward_model(str(world.path / out), tokenizer.fingerprint)
    scorer = Scorer(opened.model, None, open_scorer(str(world.path / out), tokenizer), None)
    encode, rows, ours, at_the_word = encoder(tokenizer, None, opened.model.config.context), [], [], []
    for prompt, answer in (
        ("the film is", " a joy"),
        ("the film", " is a mess that nobody likes"),
        ("a", " good story."),
    ):
        asked = {"prompt": prompt, "response": answer}
        ids = prompt_of(asked, tokenizer, None), continuation(asked, tokenizer)
        rows.append(encode(Text(prompt, answer), answer))
        assert rows[-1].tokens.tolist() == [*ids[0], *ids[1], tokenizer.eos]
        ours.append(scorer.score(*ids, tokenizer.eos))
        cut = torch.tensor([[*ids[0], *ids[1]]])
        at_the_word.append(
            float(model.score(cut, torch.tensor([cut.shape[1]]), torch.ones_like(cut, dtype=torch.bool)))
        )
    theirs = score_rows(model, rows, tokenizer.pad, "cpu")[0].tolist()
    assert ours == pytest.approx(theirs, abs=1e-5) and ours != pytest.approx(at_the_word, abs=1e-3)
    assert scorer.context == opened.model.config.context - 1
