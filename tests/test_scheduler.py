"""Continuous batching against the plain sampler: the same texts in any company, and every row comes back."""

import copy

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reference_model import FAMILIES, random_ids, small_model
from small_rollout import moved
from test_steering import slow_steer

from data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from model import generate as sampler
from model.generate import generate, row_uniforms
from model.quantize import FBGEMM, FEW_ROWS, decoding_path, quantize
from model.steering import Steering
from rlhf.serve.scheduler import Full, Request, Sampling, Scheduler, TextStream, Token, Turns, overlap

pytestmark = pytest.mark.bits

V, CONTEXT = 16, 32
SHAPE = dict(vocab_size=V, width=32, ffn=64)  # as real ones: multiples of 32, the floats that a CPU works on at once


class Letters:
    """A tokenizer of 16 letters, one of them two bytes long over two tokens."""

    control, vocab_size = {}, V
    pieces = [b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h", b"i", b"j", b"k", b"\xc3", b"\xa9", b"l", b"m", b"n"]

    def token_bytes(self, i):
        return self.pieces[i]

    def decode(self, ids):
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")


class Log(dict):
    """What was delivered: request -> its text, tokens and how it ended."""

    def __call__(self, events):
        for event in events:
            text, tokens, ends = self.setdefault(event.request, ("", [], []))
            assert not ends, "an event after the last"
            self[event.request] = (text + event.text, tokens + event.tokens, ends)
            if event.finish or event.error:
                ends.append(event.finish or event.error)

    def end(self, request):
        return (self[request][2] or [None])[0] if request in self else None

    def ids(self, request):
        return [token.id for token in self[request][1]]


def scheduler(model, rows=6, width=CONTEXT, queue=100, stop_ids=()):
    log = Log()
    return Scheduler(model, Letters(), stop_ids, rows, width, queue, log), log


def run(s):
    for _ in range(10_000):
        if s.idle:
            return
        s.step()
    raise AssertionError("it does not come to an end")


def nothing_leaked(s):
    assert (s.active, s.next, s.reading, list(s.waiting)) == ([], [], None, [])


requests = st.builds(
    lambda prompt, n, temperature, top_k, top_p, seed, row, min_p, steering: Request(
        prompt,
        Sampling(
            min(n, CONTEXT - len(prompt)), temperature, top_k, top_p, (), seed, row, min_p=min_p, steering=steering
        ),
    ),
    st.lists(st.integers(0, V - 1), min_size=1, max_size=20),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.7, 1.0]),
    st.sampled_from([0, 4]),
    st.sampled_from([1.0, 0.8]),
    st.integers(0, 3),
    st.integers(0, 2),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([None, Steering(1.0, -0.5, 1.2, ((3, 2.0),))]),
)


def copy_of(request):
    return Request(request.prompt, request.sampling)


MODELS = {family: small_model(family, torch.float32, head_dim=8, **SHAPE) for family in ("gpt2", "smollm2", "qwen3")}


@pytest.mark.parametrize("family", MODELS)
def test_a_text_is_that_of_generate(family):
    model = MODELS[family].double()
    s, log = scheduler(model, stop_ids={3})
    for seed in range(5):
        prompt = random_ids(seed, 1 + seed).tolist()
        request = Request(prompt, Sampling(9, 0.9, 6, 0.9, (), seed, row=seed % 3))
        s.submit([request])
        run(s)
        uniforms = row_uniforms(seed, 0, [seed % 3], 9)
        out = generate(
            model,
            torch.tensor([prompt]),
            torch.tensor([len(prompt)]),
            sampler.Sampling(9, [3], 0, 0.9, 6, 0.9),
            uniforms,
        )
        expected = out.tokens[0, len(prompt) : out.lengths[0]].tolist()
        ended = expected[-1] == 3
        assert log.ids(request) == (expected[:-1] if ended else expected)
        assert log.end(request) == ("stop" if ended else "length")
    nothing_leaked(s)
    MODELS[family].float()


@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=4, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.data())
def test_company_changes_nothing_and_no_row_is_lost(family, data):
    """Arrivals and cancellations between any two steps; what was not cancelled has the tokens and log-probs it has alone."""
    s, log = scheduler(MODELS[family], rows=5)
    sent, cancelled = [], set()
    for _ in range(data.draw(st.integers(1, 12))):
        for request in data.draw(st.lists(requests, max_size=4)):
            request = Request(request.prompt, Sampling(**{**vars(request.sampling), "logprobs": 2}))
            sent.append(request)
            s.submit([request])
        if sent and data.draw(st.booleans()):
            cancelled.add(request := data.draw(st.sampled_from(sent)))
            s.cancel(request)
        for _ in range(data.draw(st.integers(0, 3))):
            s.step()
            assert len(s.active) == len(s.next) <= s.rows
    run(s)
    nothing_leaked(s)
    for request in sent:
        if request not in cancelled:
            alone = copy_of(request)
            s.submit([alone])
            run(s)
            assert log[alone] == log[request]  # bit by bit, the log-probs too


def test_the_shape_that_is_exact_is_found():
    s, _ = scheduler(MODELS["smollm2"], rows=16)
    rows, columns = s.shape
    assert s.exact and 1 <= rows <= 16 and columns in (1, s.width)
    assert scheduler(MODELS["smollm2"], rows=1)[0].shape == (1, 1)


@pytest.mark.parametrize("family, ffn", [("gpt2", 43), ("smollm2", 43), ("smollm2", 48), ("qwen3", 40), ("qwen3", 96)])
def test_where_a_rows_place_decides_texts_are_equal_and_logprobs_to_1e_5(family, ffn):
    """43 leaves a rest behind the blocks of any CPU, 48 behind those of AVX-512. The scheduler finds it, and says how much."""
    model = small_model(family, torch.float32, head_dim=8, **SHAPE | {"ffn": ffn})
    s, log = scheduler(model, rows=5)
    ids = random_ids(0, 200, 1, 5, vocab_size=V)
    with torch.no_grad():
        places = [model(row.expand(5, 5).contiguous())[:, -1] for row in ids]
    alike = all(torch.equal(x, x[:1].expand_as(x)) for x in places)
    assert s.exact == alike and s.rounding < 3e-6 and not (alike and s.rounding)
    sent = [Request([1 + k % 5] * (1 + k % 9), Sampling(12, 1.0, seed=k, logprobs=2)) for k in range(40)]
    s.submit(sent)
    run(s)
    for request in sent:
        alone = copy_of(request)
        s.submit([alone])
        run(s)
        assert log[alone][::2] == log[request][::2] and log.ids(alone) == log.ids(request)
        pairs = list(zip(log[alone][1], log[request][1]))
        assert all(a.logprob == pytest.approx(b.logprob, abs=1e-5) for a, b in pairs)
        assert not alike or log[alone] == log[request]


def test_long_prompts_are_read_in_chunks_while_others_decode(monkeypatch):
    monkeypatch.setattr("rlhf.serve.scheduler.CHUNK", 8)
    model = MODELS["smollm2"].double()
    s, log = scheduler(model)
    short, long = Request([1, 2], Sampling(20, 0.0)), Request(random_ids(1, 25).tolist(), Sampling(3, 0.0, logprobs=0))
    s.submit([short])
    s.step()
    s.submit([long])
    counts = []
    while not log.end(long):
        before = short.count
        s.step()
        counts.append(short.count - before)
    assert counts[:4] == [1, 1, 1, 1]  # nobody waited for the 25 tokens
    out = generate(model, torch.tensor([long.prompt]), torch.tensor([25]), sampler.Sampling(3, temperature=0))
    assert log.ids(long) == out.tokens[0, 25:].tolist()
    MODELS["smollm2"].float()


@pytest.mark.parametrize("chunk", [4, 256])
def test_logprobs_are_those_of_the_forward(chunk, monkeypatch):
    monkeypatch.setattr("rlhf.serve.scheduler.CHUNK", chunk)
    model = MODELS["gpt2"].double()
    s, log = scheduler(model)
    request = Request(random_ids(5, 11).tolist(), Sampling(5, 0.5, 3, seed=1, logprobs=4, prompt_logprobs=True))
    s.submit([request])
    run(s)
    ids = request.prompt + log.ids(request)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0].log_softmax(-1)
    tokens = request.prompt_tokens + log[request][1]
    assert [token.id for token in tokens] == ids and tokens[0] == Token(ids[0], None, [])
    for t, token in enumerate(tokens[1:]):
        assert token.logprob == pytest.approx(float(expected[t, ids[t + 1]]), abs=1e-9)
        best = expected[t].topk(4)
        assert [i for i, _ in token.top] == best.indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(best.values.tolist(), abs=1e-9)
    MODELS["gpt2"].float()


def test_more_choices_of_one_prompt_read_it_once():
    s, log = scheduler(MODELS["smollm2"])
    prompt = random_ids(2, 9).tolist()
    choices = [Request(prompt, Sampling(6, seed=5, row=row)) for row in range(4)]
    s.submit(choices)
    run(s)
    assert s.counts["prompt_tokens"] == 9
    alone = copy_of(choices[3])
    s.submit([Request([1], Sampling(1, 0.0)), alone])
    run(s)
    assert log[alone] == log[choices[3]]


def expected_ids(model, request, stop_ids=()) -> list[int]:
    """What the plain sampler makes of it."""
    set_, n = request.sampling, len(request.prompt)
    how = sampler.Sampling(set_.max_tokens, stop_ids, 0, set_.temperature)
    uniforms = row_uniforms(set_.seed, set_.iteration, [set_.row], set_.max_tokens)
    out = generate(model, torch.tensor([request.prompt]), torch.tensor([n]), how, uniforms)
    return out.tokens[0, n : out.lengths[0]].tolist()


def test_other_weights_wait_for_texts_under_way_and_begin_the_next(monkeypatch):
    """One decodes and one is being read when they come; two wait, one with the prompt that lies in the cache."""
    monkeypatch.setattr("rlhf.serve.scheduler.CHUNK", 4)
    model = small_model("smollm2", torch.float64, head_dim=8, **SHAPE)
    before, after = copy.deepcopy(model), moved(copy.deepcopy(model), 0.3)
    s, log = scheduler(model)
    s.weights = "old"
    first, second, third, fourth = (
        Request(random_ids(k, n).tolist(), Sampling(9, 1.0, seed=3, row=k, iteration=4, logprobs=0))
        for k, n in enumerate((3, 11, 11, 3))
    )
    third.prompt[:] = second.prompt
    s.submit([first, second])
    s.step()
    s.step()
    assert s.active == [first] and s.reading is second

    def other() -> str:
        assert not s.active and s.reading is None
        model.load_state_dict(after.state_dict())
        return "new"

    change = s.change(other)
    s.submit([third, fourth])
    job = s.call(lambda: s.weights)
    s.step()
    assert job.result() == "old" and not change.done()  # jobs do not wait
    run(s)
    change.result()
    for request, of, named in (
        (first, before, "old"),
        (second, before, "old"),
        (third, after, "new"),
        (fourth, after, "new"),
    ):
        assert log.ids(request) == expected_ids(of, request) and request.weights == named
    assert [token.id for token in first.sampled] == log.ids(first)
    nothing_leaked(s)

    def fails() -> str:
        raise ValueError("no weights")

    failing = s.change(fails)
    s.submit([again := copy_of(third)])
    run(s)
    assert "no weights" in str(failing.exception()) and again.weights == s.weights == "new"
    assert log[again] == log[third]


@pytest.mark.parametrize(
    "ignore_eos, extra, ends", [(False, (), {3}), (False, (5,), {3, 5}), (True, (5,), {5}), (True, (), ())]
)
def test_what_ends_a_text_and_what_is_said_of_its_tokens(ignore_eos, extra, ends):
    """All sampled tokens are kept, the one that ends a text too; processed log-probs are the sampler's own."""
    model = MODELS["smollm2"].double()
    s, log = scheduler(model, stop_ids={3})
    for seed in range(6):
        prompt = random_ids(seed, 5).tolist()
        how = dict(stop_ids=extra, ignore_eos=ignore_eos, processed=True, logprobs=0)
        s.submit([request := Request(prompt, Sampling(20, 0.6, 5, 0.9, seed=seed, **how))])
        run(s)
        drawn = sampler.Sampling(20, ends, 0, 0.6, 5, 0.9)
        out = generate(model, torch.tensor([prompt]), torch.tensor([5]), drawn, row_uniforms(seed, 0, [0], 20))
        assert [token.id for token in request.sampled] == out.tokens[0][out.mask[0]].tolist()
        assert [token.logprob for token in request.sampled] == pytest.approx(
            out.logprobs[0][out.mask[0]].tolist(), abs=1e-9
        )
        assert log.end(request) == ("stop" if out.finished[0] else "length")
    MODELS["smollm2"].float()


def test_a_steered_text_is_that_of_its_own_logits():
    """Step by step, as the definitions of test_steering.py say it, beside others that are not steered."""
    model = MODELS["smollm2"].double()
    s, log = scheduler(model)
    how = Steering(0.7, 0.4, 1.2, ((2, 3.0), (5, -100.0)))
    sent = [
        Request([1, 2, 3 + k], Sampling(12, 0.8, 6, 0.9, seed=k, min_p=0.02, steering=how if k % 2 else None))
        for k in range(6)
    ]
    s.submit(sent)
    run(s)
    for request in sent[1::2]:
        ids, uniforms = list(request.prompt), row_uniforms(request.sampling.seed, 0, [0], 12)[0]
        for u in uniforms:
            with torch.no_grad():
                logits = model(torch.tensor([ids]))[0, -1].tolist()
            row = torch.tensor([slow_steer(logits, how, request.prompt, ids[3:])], dtype=torch.float64)
            ids.append(int(sampler.sample_step(row, u[None], 0.8, 6, 0.9, 0.02)[0]))
        assert log.ids(request) == ids[3:] and 5 not in ids[3:]
    for request in sent[::2]:
        plain = copy_of(request)
        s.submit([plain])
        run(s)
        assert log[plain] == log[request]
    logits = torch.zeros(3, V)
    assert s._steer(logits, sent[::2])[0] is logits  # it costs nothing where nobody asks
    MODELS["smollm2"].float()


def test_bounds():
    s, log = scheduler(MODELS["smollm2"], rows=2, queue=3)
    with pytest.raises(ValueError, match="30 tokens of prompt and 3 of answer exceed the 32"):
        s.submit([Request([1] * 30, Sampling(3))])
    with pytest.raises(ValueError, match="empty"):
        s.submit([Request([], Sampling(3))])
    many = [Request([1], Sampling(4)) for _ in range(6)]
    with pytest.raises(Full):
        s.submit(many)  # all or nothing
    assert s.idle and s.counts["rejected"] == 6
    s.submit(many[:5])
    with pytest.raises(Full):
        s.submit(many[5:])
    run(s)
    s.submit(many[5:])
    run(s)
    nothing_leaked(s)
    assert all(log.end(request) == "length" for request in many)
    assert [future.result() for future in [s.call(lambda x: x + 1, 1)] if not run(s)] == [2]


def test_what_takes_too_long_is_cut_off():
    s, log = scheduler(MODELS["smollm2"], rows=1)
    late, waits = Request([1], Sampling(20), deadline=0.0), Request([1], Sampling(20), deadline=0.0)
    s.submit([late])
    s._read(events := [])  # its first token; it runs already when its time is over
    s.deliver(events)
    s.submit([waits])
    run(s)
    assert log.end(late) == "length" and log.end(waits) == "it waited too long"
    nothing_leaked(s)


def test_a_model_that_has_diverged_fails_its_requests_alone():
    model = small_model("smollm2", torch.float32)
    s, log = scheduler(model)
    model.norm.weight.data.fill_(torch.nan)
    s.submit([request := Request([1, 2], Sampling(3))])
    run(s)
    assert "not finite" in log.end(request)
    nothing_leaked(s)


def test_a_step_that_fails_leaves_nobody_waiting(caplog):
    """Who decodes or is read is told; an answer that ended in the same step arrives; and the next request is served."""
    s, log = scheduler(MODELS["smollm2"])
    ends, decodes = Request([1], Sampling(2, 0.0)), Request([2], Sampling(9, 0.0))
    s.submit([ends, decodes])
    s.step()
    s.submit([broken := Request([3], Sampling(9, 0.0, stop=(None,)))])  # a bug: fails with its first token
    s.attempt()
    assert [log.end(request) for request in (ends, decodes, broken)] == ["length"] + 2 * ["the server failed"]
    assert "TypeError" in caplog.text
    nothing_leaked(s)
    s.submit([after := Request([1], Sampling(2, 0.0))])
    run(s)
    assert log[after] == log[ends]


def test_int8_texts_are_those_they_get_alone():
    """Integers give a row the same in any company. Without FBGEMM the kernel depends on the number of rows, so seeded
    requests are decoded by one of the two kernels, whoever else is there."""
    model = quantize(small_model("smollm2", torch.float32, head_dim=8, **SHAPE))
    s, log = scheduler(model, rows=20)
    assert s.exact and (s.shape[0] == 1 if FBGEMM else s.shape[0] > FEW_ROWS)
    many = [Request([1 + k % 5] * (1 + k), Sampling(8, 1.0, seed=k, logprobs=1)) for k in range(20)]
    s.submit(many)
    run(s)
    for request in many[::6]:
        alone = copy_of(request)
        s.submit([alone, Request([7], Sampling(8))])
        run(s)
        assert log[alone] == log[request]
    with decoding_path(model), torch.no_grad():
        logprobs = model(torch.tensor([many[0].prompt + log.ids(many[0])]))[0].log_softmax(-1)
    expected = [float(logprobs[t, i]) for t, i in enumerate(log.ids(many[0]))]
    assert [token.logprob for token in log[many[0]][1]] == pytest.approx(expected, abs=0.1)
    nothing_leaked(s)


def test_the_thread_stops_and_tells_who_waits():
    s, log = scheduler(MODELS["smollm2"], rows=1, width=32)
    turns = Turns(s)
    turns.start()
    s.submit([first := Request([1], Sampling(3))])
    future = s.call(lambda: 7)
    assert future.result(60) == 7
    turns.stop()
    assert log.end(first) in ("length", "the server stops")
    with pytest.raises(Full):
        s.submit([Request([1], Sampling(3))])


def test_two_models_take_turns():
    """One thread, a step each: both have tokens while neither has ended, and each text is that of its own model."""
    log, models = Log(), (MODELS["smollm2"], MODELS["gpt2"])
    both = [Scheduler(model, Letters(), (), 3, CONTEXT, 9, log) for model in models]
    turns = Turns(*both)
    sent = [[Request([1, 2, k], Sampling(12, 1.0, seed=k)) for k in range(5)] for _ in both]
    order = []
    for s, some in zip(both, sent):
        s.submit(some)
        s.call(lambda s=s: order.append(s))
    deliver = [s.deliver for s in both]
    for s, to in zip(both, deliver):
        s.deliver = lambda events, s=s, to=to: (order.append(s), to(events))
    turns.start()
    for s in both:
        while not s.idle:
            s.call(lambda: None).result(60)
    turns.stop()
    steps = [order.index(s) for s in both], [len(order) - 1 - order[::-1].index(s) for s in both]
    assert max(steps[0]) < min(steps[1])
    for model, some in zip(models, sent):
        assert [log.ids(request) for request in some] == [expected_ids(model, request) for request in some]


# ---- text


def test_overlap():
    assert [overlap(text, "abab") for text in ("", "a", "xab", "aba", "abab", "b")] == [0, 1, 2, 3, 2, 0]


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, 3) | st.integers(11, 12), max_size=20),
    st.lists(st.text("abcdé", min_size=1, max_size=4), max_size=3),
)
def test_pieces_are_the_text_up_to_the_first_stop(ids, stops):
    """Never half a character, never the beginning of a stop string that comes, never a token after it."""
    stream, text, tokens = TextStream(Letters(), tuple(stops)), "", []
    for i in ids:
        piece, some = stream.push(Token(i, 0.0, []))
        text, tokens = text + piece, tokens + some
        if stream.stopped:
            break
    rest, some = stream.flush()
    text, tokens = text + rest, tokens + some
    whole = Letters().decode(ids)
    cuts = [whole.find(stop) for stop in stops if stop in whole]
    if stream.stopped:
        assert text == whole[: len(text)] and not any(stop in text for stop in stops)
        assert any(whole[len(text) :].startswith(stop) for stop in stops)
    else:
        assert cuts == [] and text == whole
        assert [token.id for token in tokens] == ids
    assert [token.id for token in tokens] == ids[: len(tokens)]


def test_a_stop_string_over_tokens_ends_the_answer_and_its_tokens():
    stream = TextStream(Letters(), ("cd",))
    assert stream.push(Token(0, 0.0, [])) == ("a", [Token(0, 0.0, [])])
    assert stream.push(Token(2, 0.0, [])) == ("", [])  # might be the beginning
    assert stream.push(Token(2, 0.0, [])) == ("c", [Token(2, 0.0, [])])
    assert stream.push(Token(3, 0.0, [])) == ("", []) and stream.stopped
    assert stream.flush() == ("", [])


def test_sentencepiece_answers_start_without_its_space(tmp_path):
    tokenizer = train_sentencepiece(["a good film", "a bad film", "good or bad"] * 20, tmp_path / "m", 280)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    ids = tokenizer.encode("good film")
    for strip, expected in ((True, "good film"), (False, " good film")):
        stream = TextStream(tokenizer, strip=strip)
        text = "".join(stream.push(Token(i, 0.0, []))[0] for i in ids) + stream.flush()[0]
        assert text == expected


def test_families_are_real():
    assert set(MODELS) <= set(FAMILIES)
