"""A score belongs to its text: not to the batch it came in, the padding behind it, or the file it was loaded from."""

import hashlib
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import random_ids, small_model
from small_rollout import reward_model

from rlhf.infra import checkpoint
from rlhf.reward.files import load_reward_model
from rlhf.reward.model import POOLINGS, RewardModel, last_token, mean_token
from rlhf.reward.scorer import open_scorer, response_starts, scorer_of

pytestmark = pytest.mark.bits

ROWS, LONGEST = 8, 9
LENGTHS = torch.tensor([1, 9, 4, 2, 7, 3, 9, 5])
TEXTS = [row[:n].tolist() for row, n in zip(random_ids(3, ROWS, LONGEST), LENGTHS)]
both = pytest.mark.parametrize("pooling", POOLINGS)


def batch(texts, width: int, junk=lambda n: torch.full((n,), 7)):
    """Ids right-padded with `junk`, lengths, and a mask that scores must ignore: they read the whole text."""
    tokens = torch.stack([torch.cat([torch.tensor(t), junk(width - len(t))]) for t in texts])
    lengths = torch.tensor([len(t) for t in texts])
    return tokens, lengths, torch.arange(width) == lengths[:, None] - 1


def trained(pooling: str = "mean", dtype=torch.float32) -> RewardModel:
    """With a gain, a bias and a query that are not one and zero."""
    model = reward_model(dtype, pooling)
    model.normalise(torch.tensor([[3.0], [-1.0], [2.5]]))
    if pooling == "attention":
        torch.nn.init.normal_(model.pool.query, generator=torch.Generator().manual_seed(6), std=3.0)
    return model.requires_grad_(False)


# ---- one text, one score


@both
@settings(max_examples=25)
@given(
    rows=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=6),
    extra=st.integers(0, 6),
    seed=st.integers(0, 2**20),
)
def test_company_and_padding_change_no_score(pooling, rows, extra, seed):
    """Alone, in any batch, with any number of columns of junk ids behind: 1e-5 in float32."""
    model, generator = trained(pooling), torch.Generator().manual_seed(seed)
    texts = [TEXTS[row] for row in rows]
    alone = [model.score(*batch([text], len(text))) for text in texts]
    width = max(map(len, texts)) + extra
    together = model.score(*batch(texts, width, lambda n: torch.randint(13, (n,), generator=generator)))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@both
def test_score_by_the_definition(pooling):
    """The head on the last hidden state or on a mean of all of them, then gain and bias; one text at a time."""
    model = trained(pooling, torch.float64)
    for text in TEXTS:
        hidden = model.model.trunk(torch.tensor([text]))[0]  # (T, D)
        pooled = hidden[-1] if pooling == "last" else sum(hidden) / len(text)
        if pooling == "attention":
            weights = [math.exp(float(h @ model.pool.query) / math.sqrt(24)) for h in hidden]
            pooled = sum(w * h for w, h in zip(weights, hidden)) / sum(weights)
        raw = sum(w * h for w, h in zip(model.head.weight[0], pooled)) + model.head.bias[0]
        tokens, lengths, mask = batch([text], LONGEST)
        assert float(model(tokens, lengths)) == pytest.approx(float(raw), abs=1e-12)
        expected = float(raw) * float(model.gain) + float(model.bias)
        assert float(model.score(tokens, lengths, mask)) == pytest.approx(expected, abs=1e-12)


def test_pooling_reads_lengths_and_no_ids():
    hidden = torch.arange(24.0).reshape(2, 4, 3)
    hidden[1, 2:] = torch.nan  # what padding may hold
    lengths = torch.tensor([4, 2])
    assert last_token(hidden, lengths).tolist() == [[9, 10, 11], [15, 16, 17]]
    assert mean_token(hidden, lengths).tolist() == [[4.5, 5.5, 6.5], [13.5, 14.5, 15.5]]


@both
def test_padding_gets_no_gradient(pooling):
    model = reward_model(torch.float64, pooling)
    tokens, lengths, _ = batch([TEXTS[2], TEXTS[3]], LONGEST, lambda n: torch.full((n,), 6))
    assert 6 not in TEXTS[2] + TEXTS[3]
    model(tokens, lengths).sum().backward()
    assert (model.model.embed_tokens.weight.grad[6] == 0).all()


@pytest.mark.parametrize("tied", [True, False])
def test_no_parameter_is_idle(tied):
    """DDP would wait for its gradient for ever; the output matrix has nothing to do here."""
    model = RewardModel(small_model("llama", tied=tied)).double()
    model(*batch(TEXTS, LONGEST)[:2]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_head_starts_small_and_repeats():
    """N(0, 1 / sqrt(width + 1)), from the generator alone."""
    heads = [RewardModel(small_model("llama"), generator=torch.Generator().manual_seed(s)).head for s in (0, 0, 1)]
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    weights = torch.cat([RewardModel(small_model("llama")).head.weight.flatten() for _ in range(40)])
    assert float(weights.detach().std()) == pytest.approx(25**-0.5, rel=0.1) and (heads[0].bias == 0).all()


# ---- normalisation


@both
def test_normalised_scores_have_mean_0_and_deviation_1(pooling):
    model, reference = reward_model(torch.float64, pooling), batch(TEXTS, LONGEST)
    raw = model(*reference[:2]).detach()  # (ROWS, 1)
    model.normalise(raw)
    scores = model.score(*reference).detach()
    assert float(scores.mean()) == pytest.approx(0, abs=1e-6)
    assert float(scores.std(unbiased=False)) == pytest.approx(1, abs=1e-6)
    assert torch.equal(scores.argsort(), raw[:, 0].argsort())  # nobody changes places
    model.normalise(raw)  # from raw scores, so doing it again changes nothing
    assert torch.equal(model.score(*reference).detach(), scores)
    assert torch.equal(model(*reference[:2]).detach(), raw)  # and training sees no gain


@pytest.mark.parametrize("scores", [[2.0, 2.0, 2.0], [1.0], [float("nan"), 1.0]], ids=str)
def test_normalising_needs_scores_that_differ(scores):
    with pytest.raises(ValueError, match=f"all {len(scores)} reference samples the same score"):
        reward_model(torch.float32).normalise(torch.tensor(scores)[:, None])


# ---- files


class Words:
    """A tokenizer for the wrapper: an id is a word."""

    fingerprint = "words"

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)


def saved(reward_model: RewardModel, path, **changes) -> str:
    shape = {
        "model": asdict(reward_model.model.config),
        "pooling": reward_model.pooling,
        **asdict(reward_model.ensemble),
    }
    checkpoint.save(path, reward_model.state_dict(), {"kind": "reward", **shape, "tokenizer": "words", **changes})
    return str(path)


@both
def test_what_is_saved_scores_the_same_when_loaded(pooling, tmp_path):
    model, texts = trained(pooling), batch(TEXTS, LONGEST, lambda n: torch.full((n,), 5))
    path = saved(model, tmp_path / "rm")
    loaded = load_reward_model(path, "words")
    assert torch.equal(loaded.score(*texts), model.score(*texts))
    assert loaded.pooling == pooling and not any(p.requires_grad for p in loaded.parameters())
    score = open_scorer(path, Words()).score
    assert torch.equal(score(*texts), model.score(*texts)) and not score(*texts).requires_grad


def test_a_checkpoint_that_does_not_fit(tmp_path):
    model = trained()
    with pytest.raises(ValueError, match="holds a lm checkpoint, a reward model is needed: use train_rm.py"):
        load_reward_model(saved(model, tmp_path / "lm", kind="lm"), "words")
    with pytest.raises(ValueError, match="trained with tokenizer words, the policy uses letters"):
        load_reward_model(saved(model, tmp_path / "rm"), "letters")
    wider = asdict(small_model("qwen2", width=48).config)
    with pytest.raises(ValueError, match="another architecture"):
        load_reward_model(saved(model, tmp_path / "wide", model=wider), "words")
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        open_scorer(str(tmp_path / "nothing"), Words())


# ---- any Python function


FUNCTIONS = """
def count(prompts, responses):
    return [len(response.split()) for response in responses]

def short(prompts, responses):
    return [0.0] * (len(responses) - 1)

def nan(prompts, responses):
    return [float("nan")] * len(responses)

def text(prompts, responses):
    return ["good"] * len(responses)

number = 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    return str(tmp_path / "rewards.py")


def ragged():
    """Prompts of 1 and 3 tokens, responses of 3 and 1, and padding that must not be read."""
    tokens = torch.tensor([[4, 5, 6, 7, 9, 9], [1, 2, 3, 8, 9, 9]])
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    return tokens, torch.tensor([4, 4]), mask


def test_a_function_reads_prompts_and_responses(file):
    score = open_scorer(f"{file}:count", Words()).score
    scores = score(*ragged())
    assert scores.tolist() == [3, 1] and scores.dtype == torch.float32
    assert score(*(x[1:] for x in ragged())).tolist() == [1]


def test_the_text_is_cut_where_the_response_starts(tmp_path):
    """Tokens are decoded apart, so a response is what was sampled, and padding is in neither."""
    log = tmp_path / "seen.txt"
    (tmp_path / "log.py").write_text(
        f"def score(prompts, responses):\n    open({str(log)!r}, 'w').write(repr((prompts, responses)))\n    return [0, 0]\n"
    )
    open_scorer(f"{tmp_path / 'log.py'}:score", Words()).score(*ragged())
    assert log.read_text() == repr((["w4", "w1 w2 w3"], ["w5 w6 w7", "w8"]))


def test_a_row_without_response_is_all_prompt(file):
    tokens, lengths, mask = ragged()
    mask[0] = False
    assert response_starts(lengths, mask).tolist() == [4, 3]
    assert open_scorer(f"{file}:count", Words()).score(tokens, lengths, mask).tolist() == [0, 1]


NUMBERS = {  # what a function may return for two responses: (1.5, 2)
    "list": "[1.5, 2]",
    "tuple": "(1.5, 2)",
    "array": "numpy.array([1.5, 2])",
    "of whole numbers": "[fractions.Fraction(3, 2), 2]",
    "objects": "numpy.array([1.5, 2], dtype=object)",
    "tensor": "torch.tensor([1.5, 2.0], dtype=torch.bfloat16, requires_grad=True)",
    "of tensors": "[torch.tensor(1.5), numpy.float32(2)]",
}
NO_NUMBERS = {
    "dict": "{1.5: 0, 2.0: 1}",
    "values of a dict": "{'a': 1.5, 'b': 2.0}.values()",
    "set": "{1.5, 2.0}",
    "text": "'12'",
    "bytes": "b'12'",
    "texts of numbers": "['1.5', '2']",
    "array of texts": "numpy.array(['1.5', '2'])",
    "generator": "(x for x in (1.5, 2))",
    "range": "range(2)",
    "column": "torch.ones(2, 1)",
    "lists": "[[1.5], [2]]",
    "none among them": "[1.5, None]",
    "complex": "[1.5, 2j]",
    "number": "1.5",
    "scalar": "torch.tensor(1.5)",
    "infinite": "[1.5, float('inf')]",
    "three": "[1.5, 2, 3]",
}


@pytest.mark.parametrize("kind", [*NUMBERS, *NO_NUMBERS])
def test_a_function_returns_numbers_and_nothing_that_merely_looks_like_them(tmp_path, kind):
    """What is iterated over a dict are its keys, over a text its letters: neither may become a reward."""
    file = tmp_path / "returns.py"
    imports = "import fractions, numpy, torch\n"
    file.write_text(f"{imports}def score(prompts, responses):\n    return {(NUMBERS | NO_NUMBERS)[kind]}\n")
    score = open_scorer(f"{file}:score", Words()).score
    if kind in NUMBERS:
        assert score(*ragged()).tolist() == [1.5, 2] and score(*ragged()).dtype == torch.float32
    else:
        with pytest.raises(
            ValueError, match="returns.py:score must return 2 finite numbers in a list, tuple, array or"
        ):
            score(*ragged())


def test_a_spec_is_read_in_one_place(file, tmp_path):
    """What kind it is, and the facts that go with it; nothing is opened for them."""
    with pytest.raises(ValueError, match=f"which function of {file} is the reward"):
        scorer_of(file)
    function = scorer_of(f"{file}:count")
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    assert (function.is_function, function.parameters, function.temperature) == (True, 0, 1)
    assert function.digest == digest and scorer_of(f"{file}:count", rules=True) == function
    rules = scorer_of("data", rules=True)
    assert (rules.kind, rules.digest, rules.parameters, rules.is_function) == ("data", None, 0, False)
    assert scorer_of("data").kind == "model"  # a reward is not the rules of the data
    with pytest.raises(ValueError, match="neither data, a reward model's directory nor file.py:function"):
        scorer_of(str(tmp_path / "nothing"), rules=True)
    model = trained()
    own = scorer_of(saved(model, tmp_path / "rm"))
    trunk = sum(x.numel() for name, x in model.model.named_parameters() if "lm_head" not in name)
    assert (own.kind, own.parameters, own.temperature) == ("model", trunk, float(model.temperature))


def test_functions_that_cannot_be_used(file, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nothing.py: no such file \(reward is a directory, or file.py:function"
    ):
        open_scorer(f"{tmp_path}/nothing.py:count", Words())
    for name in ("missing", "number"):
        with pytest.raises(ValueError, match=f"rewards.py has no function '{name}'"):
            open_scorer(f"{file}:{name}", Words())
    for name in ("short", "nan"):
        with pytest.raises(ValueError, match=f"rewards.py:{name} must return 2 finite numbers"):
            open_scorer(f"{file}:{name}", Words()).score(*ragged())
    with pytest.raises(ValueError):
        open_scorer(f"{file}:text", Words()).score(*ragged())
