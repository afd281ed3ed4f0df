"""Sampling against slow versions: warpers against HF, draws against the inverse CDF, text against a loop with no cache."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import FAMILIES, random_ids, small_model

from model import generate as module
from model.generate import Sampling, alike, generate, row_uniforms, sample_step, warp_logits
from model.transformer import Transformer

pytestmark = pytest.mark.bits

V, CONTEXT, PAD = 13, 32, 0  # of small_model
SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.8), (1.3, 6, 0.9)]  # temperature, top_k, top_p
every_setting = pytest.mark.parametrize("how", SETTINGS, ids=str)


def pad_rows(rows, width=None, junk=PAD):
    """Lists of ids -> (B, width) ids and (B,) lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    out = torch.full((len(rows), width or int(lengths.max())), junk)
    for row, ids in enumerate(rows):
        out[row, : len(ids)] = torch.tensor(ids)
    return out, lengths


def random_prompts(seed, batch, longest=9):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (batch,), generator=generator)
    return [random_ids(seed * 100 + i, int(n)).tolist() for i, n in enumerate(lengths)]


def response(out, row):
    return out.tokens[row, out.prompt_lengths[row] : out.lengths[row]].tolist()


# ---- the sampling distribution


def slow_distribution(logits, temperature, top_k, top_p, min_p=0.0):
    """Probabilities of one row, by the definitions: sort, cut, renormalise. Ties at the k-th place stay."""
    z = [x / temperature for x in logits]
    if top_k:
        kth = sorted(z, reverse=True)[min(top_k, len(z)) - 1]
        z = [x if x >= kth else -math.inf for x in z]
    weights = [math.exp(x - max(z)) for x in z]
    probs = [x / sum(weights) for x in weights]
    # the smallest set of most likely tokens that holds at least top_p
    kept, mass = set(), 0.0
    for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if mass < top_p and probs[i] > 0:
            kept.add(i)
            mass += probs[i]
    kept = {i for i in kept if probs[i] >= min_p * max(probs)}
    total = sum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(probs))]


def test_warpers_equal_hf(golden_dir):
    golden = json.loads((golden_dir / "hf_logits_warpers.f32.json").read_text())
    logits, checked = torch.tensor(golden["inputs"]["logits"]), 0
    for name, expected in golden["outputs"].items():
        option, _, value = name.partition("=")
        if option in ("temperature", "top_k", "top_p", "min_p"):
            warped = warp_logits(logits, **{option: float(value) if "." in value else int(value)})
            expected = torch.tensor([[float(x) for x in row] for row in expected])
            assert torch.equal(warped, expected), name
            checked += 1
    assert checked == 5


@settings(max_examples=200)
@given(
    st.lists(st.integers(-64, 64).map(lambda x: x / 8), min_size=2, max_size=12, unique=True),
    st.floats(0.2, 3.0),
    st.integers(0, 14),
    st.floats(0.05, 1.0),
    st.sampled_from([0.0, 1.0]) | st.floats(0.0, 1.0),
)
def test_warped_probabilities_equal_the_definition(logits, temperature, top_k, top_p, min_p):
    row = torch.tensor([logits], dtype=torch.float64)
    probs = warp_logits(row, temperature, top_k, top_p, min_p).softmax(-1)[0]
    expected = torch.tensor(slow_distribution(logits, temperature, top_k, top_p, min_p), dtype=torch.float64)
    if not torch.equal(probs > 0, expected > 0):  # only where the kept mass is top_p, or a ratio min_p, to the last bit
        cut = torch.tensor(slow_distribution(logits, temperature, top_k, 1.0), dtype=torch.float64)
        masses = cut.sort(descending=True).values.cumsum(0)
        assert min(float((masses - top_p).abs().min()), float((cut / cut.max() - min_p).abs().min())) < 1e-12
        return
    assert torch.allclose(probs, expected, atol=1e-12)


def test_warped_logits_keep_shape_and_type():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(warp_logits(logits), logits)
    assert warp_logits(logits.bfloat16(), 0.7, 3, 0.9).dtype == torch.float32
    assert warp_logits(logits.double(), 0.7).dtype == torch.float64
    one_hot = warp_logits(logits, temperature=0.0).softmax(-1)
    assert torch.equal(one_hot.argmax(-1), logits.argmax(-1)) and torch.equal(one_hot.amax(-1), torch.ones(2, 3))
    assert torch.equal(warp_logits(logits, top_k=99), logits)
    assert bool((warp_logits(logits, top_p=1e-9) > -torch.inf).sum(-1).eq(1).all())


@pytest.mark.parametrize("how", [(-0.1, 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 0.0), (1.0, 0, 1.1)])
def test_settings_out_of_range(how):
    with pytest.raises(ValueError, match="temperature"):
        warp_logits(torch.zeros(1, 4), *how)


# ---- one draw


@settings(max_examples=200)
@given(
    st.lists(st.one_of(st.floats(-6, 6), st.just(-math.inf)), min_size=1, max_size=10),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_a_draw_is_the_inverse_cdf(logits, u, dtype):
    if max(logits) == -math.inf:
        logits[0] = 0.0
    tokens, logprobs = sample_step(torch.tensor([logits], dtype=dtype), torch.tensor([u], dtype=torch.float64))
    token, probs = int(tokens), slow_distribution(logits, 1.0, 0, 1.0)
    slack = 1e-6 if dtype == torch.float32 else 1e-12
    assert probs[token] > 0
    assert sum(probs[:token]) - slack <= u <= sum(probs[: token + 1]) + slack
    assert abs(float(logprobs) - math.log(probs[token])) < 10 * slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_unit_interval(dtype):
    """u = 0 and the largest u below 1 land on tokens that have a probability, whatever surrounds them."""
    logits = torch.full((2, 3000), -torch.inf, dtype=dtype)
    logits[:, 1000:2000] = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    tokens, logprobs = sample_step(logits, torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64))
    assert tokens.tolist() == [1000, 1999] and bool(logprobs.isfinite().all())


@pytest.mark.parametrize("how", [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 1, 1.0), (0.7, 3, 0.9), (0.0, 2, 0.5)])
@pytest.mark.parametrize("sick", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused_at_every_temperature(how, sick):
    """One of them in one row is enough; -inf is a probability of zero, unless it is all there is."""
    draws = None if how[0] == 0 else torch.tensor([0.3, 0.3])
    for at in range(8):
        logits = torch.zeros(2, 8)
        logits[1, at] = sick
        with pytest.raises(ValueError, match="not finite"):
            sample_step(logits, draws, *how)
    with pytest.raises(ValueError, match="not finite"):
        sample_step(torch.full((2, 8), -math.inf), draws, *how)
    logits = torch.full((2, 8), -math.inf)
    logits[:, 5] = 1.0
    assert sample_step(logits, draws, *how)[0].tolist() == [5, 5]


@every_setting
def test_frequencies_on_an_even_grid_are_the_probabilities(how):
    """Uniforms (i + 1/2) / N must give every token N p times, give or take one."""
    n = 20000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    tokens, logprobs = sample_step(logits.expand(n, -1), (torch.arange(n) + 0.5) / n, *how)
    probs = torch.tensor(slow_distribution(logits.tolist(), *how), dtype=torch.float64)
    assert float((tokens.bincount(minlength=12) - n * probs).abs().max()) <= 1
    assert torch.allclose(logprobs, probs.log()[tokens], atol=1e-10)


@every_setting
def test_chi_square_of_real_draws(how):
    n = 20000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens, _ = sample_step(logits.expand(n, -1), row_uniforms(0, 0, range(n), 1)[:, 0], *how)
    probs = torch.tensor(slow_distribution(logits.tolist(), *how), dtype=torch.float64)
    counts, expected = tokens.bincount(minlength=12).double(), n * probs
    assert not counts[probs == 0].any()
    chi2 = float((counts - expected).square()[probs > 0].div(expected[probs > 0]).sum())
    freedom = int((probs > 0).sum()) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_a_large_vocabulary_reaches_its_rare_tokens():
    """50,000 tokens, half of the mass on the first: the other half is spread evenly, to the last token."""
    logits = torch.zeros(1, 50001)
    logits[0, 0] = math.log(50000)
    n = 1000
    tokens, logprobs = sample_step(logits.expand(n, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    assert int((tokens == 0).sum()) == n // 2
    expected = 1 + (torch.arange(n // 2) + 0.5) * 100
    assert float((tokens[n // 2 :] - expected).abs().max()) <= 2  # one float32 step of the sum is 0.006 tokens
    assert torch.allclose(logprobs[n // 2 :], torch.tensor(-math.log(100000)), atol=1e-5)


# ---- the uniforms of a row


@settings(max_examples=30)
@given(st.integers(0, 2**62), st.integers(0, 10**6), st.permutations(range(6)))
def test_uniforms_belong_to_the_row(seed, iteration, order):
    together = row_uniforms(seed, iteration, range(6), 5)
    assert together.shape == (6, 5) and together.dtype == torch.float64
    assert torch.equal(row_uniforms(seed, iteration, order, 5), together[list(order)])
    assert torch.equal(row_uniforms(seed, iteration, torch.tensor(order)[:1], 9)[:, :5], together[[order[0]]])
    for other in ((seed + 1, iteration), (seed, iteration + 1)):
        assert not bool((row_uniforms(*other, range(6), 5) == together).any())


def test_uniforms_are_uniform():
    u = row_uniforms(3, 1, range(2000), 10)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert float((u.flatten().histc(20, 0, 1) - 1000).square().sum() / 1000) < 19 + 5 * math.sqrt(38)
    correlation = torch.corrcoef(torch.stack((u[:-1, 0], u[1:, 0], u[:-1, 1])))  # neighbours in rows and in steps
    assert float((correlation - torch.eye(3)).abs().max()) < 0.1
    assert row_uniforms(0, 0, [], 4).shape == (0, 4)


def test_uniforms_do_not_touch_the_global_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    row_uniforms(0, 0, range(3), 4)
    assert torch.equal(state, torch.get_rng_state())


# ---- whole rows


def slow_generate(model, prompt, max_new_tokens, uniforms, eos, how):
    """One row, no cache: the whole text through the model for every token."""
    ids, logprobs = list(prompt), []
    for u in uniforms[:max_new_tokens].tolist():
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1].tolist()
        probs = slow_distribution(logits, *how)
        token = next((i for i in range(len(probs)) if sum(probs[: i + 1]) > u), len(probs) - 1)
        ids.append(token)
        logprobs.append(math.log(probs[token]))
        if token in eos or len(ids) == model.config.context:
            break
    return ids[len(prompt) :], logprobs, ids[-1] in eos


@settings(max_examples=40)
@given(
    st.sampled_from(list(FAMILIES)),
    st.sampled_from(SETTINGS),
    st.sampled_from([set(), {5}, {1, 4, 7}]),
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(0, 10**6),
)
def test_rows_equal_the_loop_without_a_cache(family, how, eos, batch, max_new_tokens, seed):
    model, prompts = small_model(family), random_prompts(seed, batch, longest=26)
    tokens, lengths = pad_rows(prompts, junk=V - 1)
    uniforms = row_uniforms(seed, 0, range(batch), max_new_tokens)
    out = generate(model, tokens, lengths, Sampling(max_new_tokens, eos, PAD, *how), uniforms)
    T = int(out.lengths.max())
    assert out.tokens.shape == out.mask.shape == out.logprobs.shape == (batch, T)
    for row, prompt in enumerate(prompts):
        expected, logprobs, finished = slow_generate(model, prompt, max_new_tokens, uniforms[row], eos, how)
        P, n = len(prompt), len(prompt) + len(expected)
        assert out.tokens[row].tolist() == prompt + expected + [PAD] * (T - n)
        assert (int(out.prompt_lengths[row]), int(out.lengths[row]), bool(out.finished[row])) == (P, n, finished)
        assert out.mask[row].tolist() == [P <= t < n for t in range(T)]
        assert torch.allclose(out.logprobs[row, P:n], torch.tensor(logprobs, dtype=torch.float64), atol=1e-9)
        assert not out.logprobs[row][~out.mask[row]].any()


@every_setting
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_the_full_forward(family, how):
    """The sampler's log-probs are those of one training forward over its own text, in float32 too."""
    tokens, lengths = pad_rows(random_prompts(5, 8))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = small_model(family, dtype)
        out = generate(model, tokens, lengths, Sampling(20, {3}, PAD, *how), row_uniforms(5, 0, range(8), 20))
        with torch.no_grad():
            logprobs = warp_logits(model(out.tokens), *how).log_softmax(-1)
        chosen = logprobs[:, :-1].gather(-1, out.tokens[:, 1:, None])[..., 0]
        assert float((chosen - out.logprobs[:, 1:])[out.mask[:, 1:]].abs().max()) < tolerance


@settings(max_examples=40)
@given(st.sampled_from(list(FAMILIES)), st.permutations(range(6)), st.integers(1, 6), st.integers(0, 10**6))
def test_a_row_does_not_depend_on_its_company(family, order, count, seed):
    """Alone, in any order, beside any rows, with any padding: the same row id gives the same text."""
    model, prompts = small_model(family), random_prompts(seed, 6)
    everybody = generate(model, *pad_rows(prompts), Sampling(10, {2, 6}, PAD), row_uniforms(seed, 1, range(6), 10))
    some = order[:count]
    tokens, lengths = pad_rows([prompts[i] for i in some], width=12, junk=V - 1)
    out = generate(model, tokens, lengths, Sampling(10, {2, 6}, PAD), row_uniforms(seed, 1, some, 10))
    for row, i in enumerate(some):
        assert response(out, row) == response(everybody, i)
        assert out.finished[row] == everybody.finished[i]
        a, b = out.logprobs[row][out.mask[row]], everybody.logprobs[i][everybody.mask[i]]
        assert torch.allclose(a, b, atol=1e-10)


@settings(max_examples=40)
@given(st.data())
def test_rows_that_wait_their_turn_are_the_same_rows(data):
    """Any number of rows at once, any classes of lengths, equal prompts beside each other, ends that are noticed late or at
    once, attention in parts or in one: tokens are those of the loop without a cache, and log-probs to 1e-9.
    """
    family = data.draw(st.sampled_from(list(FAMILIES)))
    model, seed = small_model(family), data.draw(st.integers(0, 10**6))
    prompts = [p for p in random_prompts(seed, 3, longest=26) for _ in range(data.draw(st.integers(1, 3)))]
    samples, n, eos = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 12)), {5, 2}
    uniforms = row_uniforms(seed, 0, range(samples * len(prompts)), n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.PADDING, "cpu", data.draw(st.sampled_from([0, 64])))
        patch.setitem(module.ASKED_EVERY, "cpu", data.draw(st.sampled_from([1, 3, 16])))
        patch.setattr(module, "SAMPLED_AT_ONCE", data.draw(st.integers(1, 4)))
        patch.setattr(module, "alike", lambda lengths, slack: alike(lengths, slack % 3))
        out = generate(
            model, *pad_rows(prompts, junk=V - 1), Sampling(n, eos, PAD), uniforms, data.draw(st.integers(1, 20))
        )
    for row in range(len(uniforms)):
        prompt = prompts[row // samples]
        expected, logprobs, finished = slow_generate(model, prompt, n, uniforms[row], eos, SETTINGS[0])
        assert response(out, row) == expected and bool(out.finished[row]) == finished
        assert out.tokens[row, : len(prompt)].tolist() == prompt
        assert not out.tokens[row, out.lengths[row] :].any() and not out.logprobs[row][~out.mask[row]].any()
        assert torch.allclose(out.logprobs[row][out.mask[row]], torch.tensor(logprobs, dtype=torch.float64), atol=1e-9)


def test_a_prompt_of_several_rows_is_read_once(monkeypatch):
    """Equal neighbours, whatever stands behind them, and samples of one; prompts of a like length in one forward."""
    model, read, trunk = small_model("llama"), [], Transformer.trunk_and_states
    prompts, lengths = pad_rows([[1, 2], [1, 2], [3] * 20, [4] * 19, [1, 2], [1, 2, 3]])
    prompts[1, 2:] = 7
    monkeypatch.setitem(module.PADDING, "cpu", 2)

    def watched(self, ids, depths, cache=None, new_lengths=None):
        if new_lengths is not None:
            read.append(sorted(row[:n].tolist() for row, n in zip(ids, new_lengths)))
        return trunk(self, ids, depths, cache, new_lengths)

    monkeypatch.setattr(Transformer, "trunk_and_states", watched)
    out = generate(model, prompts, lengths, Sampling(3, set(), PAD), row_uniforms(0, 0, range(12), 3))
    assert read == [[[3] * 20, [4] * 19], [[1, 2], [1, 2], [1, 2, 3]]] and len(out.tokens) == 12


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 5),
    samples=st.integers(1, 3),
    at_once=st.integers(1, 8),
    stops=st.sets(st.integers(1, V - 1), max_size=6),
    depths=st.sets(st.integers(0, 2), min_size=1),
)
def test_states_are_those_of_a_full_pass(family, seed, batch, samples, at_once, stops, depths):
    """Of every token, the last one too, whoever left or joined meanwhile; and who keeps them draws nothing else."""
    model = small_model(family, torch.float64)
    prompts, lengths = pad_rows(random_prompts(seed, batch), junk=3)
    uniforms = row_uniforms(seed, 0, range(batch * samples), 6)
    args = (model, prompts, lengths, Sampling(6, stops, PAD), uniforms, at_once)
    plain, out = generate(*args), generate(*args, depths=depths)
    for name, x in plain.tensors().items():
        torch.testing.assert_close(getattr(out, name), x, rtol=0, atol=1e-9, msg=name)
    assert out.states.keys() == depths and plain.states == {}
    for row, n in enumerate(out.lengths.tolist()):
        ids = out.tokens[row : row + 1, :n]
        _, expected = model.trunk_and_states(ids, sorted(depths))
        for depth, states in zip(sorted(depths), expected):
            torch.testing.assert_close(out.states[depth][row, :n], states[0], rtol=0, atol=1e-9)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(0, 100))
def test_parts_of_like_length(lengths, slack):
    parts = alike(lengths, slack)
    assert [row for rows, _ in parts for row in range(rows.start, rows.stop)] == list(range(len(lengths)))
    for rows, longest in parts:
        part = lengths[rows]
        assert longest == max(part) and longest * len(part) - sum(part) <= slack


def test_several_samples_share_a_prefill():
    model, (tokens, lengths) = small_model("llama"), pad_rows(random_prompts(7, 3))
    uniforms = row_uniforms(7, 0, range(12), 8)
    out = generate(model, tokens, lengths, Sampling(8, {4}, PAD), uniforms)
    repeated = generate(
        model, tokens.repeat_interleave(4, 0), lengths.repeat_interleave(4), Sampling(8, {4}, PAD), uniforms
    )
    assert torch.equal(out.tokens, repeated.tokens) and torch.equal(out.mask, repeated.mask)
    assert torch.equal(out.prompt_lengths, lengths.repeat_interleave(4))
    assert torch.allclose(out.logprobs, repeated.logprobs, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_temperature_zero_takes_the_argmax(family):
    model, (tokens, lengths) = small_model(family), pad_rows(random_prompts(8, 4))
    out = generate(model, tokens, lengths, Sampling(12, set(), PAD, temperature=0.0))
    with torch.no_grad():
        best = model(out.tokens).argmax(-1)
    assert torch.equal(best[:, :-1][out.mask[:, 1:]], out.tokens[:, 1:][out.mask[:, 1:]])
    assert not out.logprobs.any() and not out.finished.any() and int(out.mask.sum()) == 48


def test_eos_ends_a_row_and_counts():
    """The first EOS is part of the response; nothing stands behind it; the others go on."""
    model, (tokens, lengths) = small_model("smollm2"), pad_rows(random_prompts(9, 6))
    uniforms = row_uniforms(9, 0, range(6), 15)
    free = generate(model, tokens, lengths, Sampling(15, set(), PAD), uniforms)
    assert not free.finished.any() and free.mask.sum(1).tolist() == [15] * 6
    for eos in range(V):
        out = generate(model, tokens, lengths, Sampling(15, [eos], PAD), uniforms)
        for row in range(6):
            full = response(free, row)
            expected = full[: full.index(eos) + 1] if eos in full else full
            assert response(out, row) == expected and bool(out.finished[row]) == (eos in full)
            assert out.tokens[row, out.lengths[row] :].tolist() == [PAD] * (out.tokens.shape[1] - int(out.lengths[row]))
            # an EOS on the very last slot is an EOS, not a truncation
            if eos in full:
                n = full.index(eos) + 1
                short = generate(model, tokens, lengths, Sampling(n, [eos], PAD), uniforms[:, :n])
                assert bool(short.finished[row]) and response(short, row) == expected
                if n > 1:
                    cut = generate(model, tokens, lengths, Sampling(n - 1, [eos], PAD), uniforms[:, : n - 1])
                    assert not cut.finished[row] and response(cut, row) == expected[:-1]


def test_an_eos_in_the_prompt_ends_nothing():
    model = small_model("llama")
    out = generate(
        model, torch.tensor([[5, 5]]), torch.tensor([2]), Sampling(3, set(), PAD), row_uniforms(0, 0, [0], 3)
    )
    first = response(out, 0)
    again = generate(
        model, torch.tensor([[5, 5]]), torch.tensor([2]), Sampling(3, [5], PAD), row_uniforms(0, 0, [0], 3)
    )
    assert response(again, 0) == (first[: first.index(5) + 1] if 5 in first else first)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_context_ends_a_row(family):
    """The long prompt stops at the end of the context, unfinished; the short one beside it goes on."""
    model = small_model(family)
    tokens, lengths = pad_rows([random_ids(1, CONTEXT - 3).tolist(), [3, 1], random_ids(2, CONTEXT - 1).tolist()])
    out = generate(model, tokens, lengths, Sampling(10, set(), PAD), row_uniforms(1, 0, range(3), 10))
    assert out.lengths.tolist() == [CONTEXT, 12, CONTEXT] and not out.finished.any()
    for row in range(3):
        expected, _, _ = slow_generate(
            model, tokens[row, : lengths[row]].tolist(), 10, row_uniforms(1, 0, [row], 10)[0], set(), SETTINGS[0]
        )
        assert response(out, row) == expected


def test_inputs_stay_and_outputs_can_be_trained_on():
    model, (tokens, lengths) = small_model("gpt2", torch.float32), pad_rows(random_prompts(3, 4), junk=V - 1)
    before = tokens.clone(), lengths.clone()
    out = generate(model, tokens, lengths, Sampling(6, {1}, PAD), row_uniforms(0, 0, range(4), 6))
    assert torch.equal(tokens, before[0]) and torch.equal(lengths, before[1])
    assert not out.logprobs.requires_grad and not out.tokens.is_inference()
    model(out.tokens).sum().backward()
    assert model.embed_tokens.weight.grad is not None


def test_half_precision_and_autocast():
    tokens, lengths = pad_rows(random_prompts(4, 4))
    uniforms = row_uniforms(0, 0, range(4), 6)
    for model, context in (
        (small_model("qwen3", torch.bfloat16), torch.no_grad()),
        (small_model("qwen3", torch.float32), torch.autocast("cpu", torch.bfloat16)),
    ):
        with torch.no_grad(), context:
            out = generate(model, tokens, lengths, Sampling(6, {1}, PAD), uniforms)
            logprobs = model(out.tokens).float().log_softmax(-1)[:, :-1].gather(-1, out.tokens[:, 1:, None])[..., 0]
        assert out.logprobs.dtype == torch.float32
        assert float((logprobs - out.logprobs[:, 1:])[out.mask[:, 1:]].abs().max()) < 0.5


@pytest.mark.parametrize(
    "prompts,uniforms,temperature,words",
    [
        ([[1], []], (2, 4), 1.0, "empty"),
        ([[1] * CONTEXT], (1, 4), 1.0, f"{CONTEXT} tokens.*context of {CONTEXT}"),
        ([[1], [2]], (3, 4), 1.0, r"\(3, 4\).*2 prompts"),
        ([[1], [2]], (2, 3), 1.0, r"\(2, 3\).*4"),
        ([[1], [2]], None, 1.0, "uniforms"),
        ([[1], [2]], (2, 4), -1.0, "temperature"),
    ],
)
def test_one_clear_line(prompts, uniforms, temperature, words):
    model, (tokens, lengths) = small_model("llama"), pad_rows(prompts)
    uniforms = None if uniforms is None else torch.rand(uniforms, dtype=torch.float64)
    with pytest.raises(ValueError, match=words) as error:
        generate(model, tokens, lengths, Sampling(4, {1}, PAD, temperature=temperature), uniforms)
    assert "\n" not in str(error.value)


def test_at_once_is_a_number_of_rows():
    with pytest.raises(ValueError, match="at_once is 0"):
        generate(small_model("llama"), *pad_rows([[1]]), Sampling(4, {1}, PAD), row_uniforms(0, 0, [0], 4), at_once=0)
