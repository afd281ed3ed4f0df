"""Texts in one packed row: the same states, scores and gradients as padded rows, whatever shares the row or its beginning."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import small_model
from test_step_invariance import assert_differs, assert_same
from torch import Tensor

from model import packed
from model.packed import common_beginnings, last_states, text_states
from rlhf.losses import preference_loss
from rlhf.reward.model import POOLING, RewardModel, last_token

pytestmark = pytest.mark.bits

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "smollm3", "olmo2", "granite", "gemma2", "gemma3_text")
VOCABULARY = small_model("llama").config.vocab_size
text = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=14)
# a prompt of any length, which a side may begin with or not; nothing, one token or more after it
sides = st.tuples(text, st.lists(st.integers(0, VOCABULARY - 1), max_size=9), st.booleans())
pairs = st.lists(st.tuples(text, sides, sides), min_size=1, max_size=4)


@pytest.fixture(autouse=True)
def share_early(monkeypatch):
    """Beginnings of three tokens are shared already, so that short texts show what long ones do."""
    monkeypatch.setattr(packed, "LEAST_SHARED", 3)


def rows_of(made) -> list[list[int]]:
    """[(prompt, side, side)] -> chosen, rejected, chosen, rejected ..."""
    return [(prompt + tail if joined else alone) for prompt, *both in made for alone, tail, joined in both]


def padded(rows: list[list[int]], junk: int = 5, extra: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens with `extra` columns of padding behind the longest, which is an id like any other; lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max()) + extra
    return torch.tensor([row + [junk] * (width - len(row)) for row in rows]), lengths


def one_by_one(model, rows: list[list[int]]) -> list[Tensor]:
    """Hidden states (T_i, D) of each text, alone in its forward."""
    return [model.trunk(torch.tensor([row]))[0] for row in rows]


def gradient(module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None)
@given(made=pairs, odd=st.booleans(), extra=st.integers(0, 3))
def test_states_and_gradients_are_those_of_each_text_alone(family, made, odd, extra):
    model, rows = small_model(family), rows_of(made)
    rows = rows[: len(rows) - odd]
    tokens, lengths = padded(rows, extra=extra)
    alone, hidden = one_by_one(model, rows), text_states(model, tokens, lengths)
    assert hidden.shape == (*tokens.shape, model.config.width)
    weigh = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ours, expected, n in zip(hidden, alone, lengths):
        torch.testing.assert_close(ours[:n], expected, rtol=1e-9, atol=1e-9)
    expected = gradient(model, sum((h * w[: len(h)]).sum() for h, w in zip(alone, weigh)))
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    assert_same(gradient(model, (hidden * weigh)[real].sum()), expected, 1e-8)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None)
@given(made=pairs)
def test_last_states_and_their_gradients(family, made):
    model, rows = small_model(family), rows_of(made)
    expected, ours = torch.stack([h[-1] for h in one_by_one(model, rows)]), last_states(model, *padded(rows))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    weigh = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_same(gradient(model, (ours * weigh).sum()), gradient(model, (expected * weigh).sum()), 1e-8)


def slowly_shared(rows: list[list[int]]) -> list[int]:
    """By the definition, one token at a time; the last token of a row is its own."""

    def alike(a: list[int], b: list[int]) -> int:
        same = 0
        while same < min(len(a), len(b)) - 1 and a[same] == b[same]:
            same += 1
        return same

    found, first = [], rows[0]
    for i, row in enumerate(rows):
        same = alike(first, row) if i else 0
        after = alike(row, rows[i + 1]) if i + 1 < len(rows) else 0
        found.append(same if same >= 3 and same >= after else 0)
        first = row if found[-1] == 0 else first
    return found


@given(made=pairs)
def test_a_beginning_is_shared_with_the_first_of_a_group(made):
    rows = rows_of(made)
    assert common_beginnings(*padded(rows)).tolist() == slowly_shared(rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@settings(max_examples=8, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(text, st.lists(text.map(lambda ids: ids[:7]), min_size=1, max_size=5)), min_size=1, max_size=3
    ),
    system=st.lists(st.integers(0, VOCABULARY - 1), max_size=6),
)
def test_any_number_of_answers_to_a_prompt(family, prompts, system):
    """A common system prompt is shared between prompts, a longer prompt between its answers."""
    model = small_model(family)
    rows = [system + prompt + answer for prompt, answers in prompts for answer in answers]
    tokens, lengths = padded(rows)
    hidden, last = text_states(model, tokens, lengths), last_states(model, tokens, lengths)
    for ours, end, expected, n in zip(hidden, last, one_by_one(model, rows), lengths):
        torch.testing.assert_close(ours[:n], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(end, expected[-1], rtol=1e-9, atol=1e-9)
    weigh = torch.randn(last.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([h[-1] for h in one_by_one(model, rows)])
    assert_same(gradient(model, (last * weigh).sum()), gradient(model, (expected * weigh).sum()), 1e-8)


def test_answers_that_stand_together_read_their_prompt_once():
    prompt, answers = list(range(1, 11)), [[1, 2], [3], [4, 5, 6]]
    other = [9, 8, 7, 6, 5]
    rows = [prompt + answer for answer in answers] + [other + [1], other + [2]]
    assert common_beginnings(*padded(rows)).tolist() == [0, 10, 10, 0, 5]


def pair_gradient(model: RewardModel, tokens, lengths, micro_batch: int, forward=None) -> dict[str, Tensor]:
    """Of the mean Bradley-Terry loss, centred; chosen and rejected rows alternate, micro_batch counts pairs.

    The centring term gives two equal texts a gradient too; without it there would be nothing but rounding to compare.
    """
    model.zero_grad()
    for start in range(0, len(tokens), 2 * micro_batch):
        part = slice(start, start + 2 * micro_batch)
        chosen, rejected = (forward or model)(tokens[part], lengths[part]).view(-1, 2).unbind(1)
        loss = preference_loss(chosen, rejected) + (chosen + rejected - 1) ** 2
        (loss.sum() / (len(tokens) / 2)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("pooling", POOLING)
@settings(max_examples=8, deadline=None)
@given(made=pairs, micro_batch=st.integers(1, 4), order=st.randoms(use_true_random=False))
def test_micro_batches_ranks_and_order_change_no_gradient(pooling, made, micro_batch, order):
    model = RewardModel(small_model("llama"), pooling, torch.Generator().manual_seed(3)).double()
    tokens, lengths = padded(rows_of(made))

    def plain(tokens, lengths):
        return model.head(POOLING[pooling](model.model.trunk(tokens), lengths))

    expected = pair_gradient(model, tokens, lengths, len(tokens), plain)
    assert_same(pair_gradient(model, tokens, lengths, micro_batch), expected, 1e-8)
    shuffled = order.sample(range(len(made)), len(made))
    rows = torch.tensor([2 * i + side for i in shuffled for side in (0, 1)])
    assert_same(pair_gradient(model, tokens[rows], lengths[rows], micro_batch), expected, 1e-8)
    if len(made) % 2 == 0:  # two ranks take every other pair; each divides by all pairs
        of_ranks = [torch.arange(len(tokens)).view(-1, 2)[rank::2].flatten() for rank in (0, 1)]
        parts = [pair_gradient(model, tokens[rows], lengths[rows], micro_batch) for rows in of_ranks]
        assert_same({name: (parts[0][name] + parts[1][name]) / 2 for name in expected}, expected, 1e-8)


def test_in_single_precision_to_1e_5():
    generator = torch.Generator().manual_seed(0)
    model = RewardModel(small_model("llama").float(), "last", generator)
    tokens, lengths = torch.randint(VOCABULARY, (12, 30), generator=generator), torch.arange(7, 31, 2)
    tokens[1::2, :20] = tokens[::2, :20]
    assert common_beginnings(tokens, lengths).count_nonzero() == 6
    plain = model.head(last_token(model.model.trunk(tokens), lengths))
    torch.testing.assert_close(model(tokens, lengths).flatten(), plain.flatten(), rtol=1e-5, atol=1e-5)
    expected = pair_gradient(model, tokens, lengths, 12, lambda t, n: model.head(last_token(model.model.trunk(t), n)))
    assert_same(pair_gradient(model, tokens, lengths, 4), expected, 1e-3)  # of each number; 1e-5 of the largest


def test_one_shared_token_too_many_would_be_noticed(monkeypatch):
    model, rows = small_model("llama"), [[1, 2, 3, 4, 5], [1, 2, 6, 7]]
    right = gradient(model, last_states(model, *padded(rows)).sum())
    monkeypatch.setattr(packed, "common_beginnings", lambda tokens, lengths: torch.tensor([0, 3]))
    assert_differs(gradient(model, last_states(model, *padded(rows)).sum()), right)


def test_a_text_beyond_the_context_is_refused_and_many_short_ones_are_not():
    model = small_model("llama")
    context = model.config.context
    text_states(model, *padded([[3] * context] * 4, extra=0))
    with pytest.raises(ValueError, match=f"sequence of {context + 1} tokens exceeds the model's context of {context}"):
        text_states(model, *padded([[3] * (context + 1)]))
