"""The real server process, driven by the unmodified openai client and by plain HTTP."""

import asyncio
import concurrent.futures
import http.client
import itertools
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from types import SimpleNamespace
from typing import Literal

import pytest
import tiny_server
import torch
from tiny_server import ROOT, serving

import serve
from data.chat import Chat
from data.tokenizer import load_tokenizer
from model.generate import Sampling, generate, row_uniforms
from rlhf.feedback.store import FeedbackStore
from rlhf.lm.pretrained import open_pretrained
from rlhf.serve.answers import Writer
from rlhf.serve.api import Service, policy
from rlhf.serve.http import Bounded, parse_origins
from rlhf.serve.protocol import ApiError, Limits, parse_completion, token_texts
from rlhf.serve.scheduler import Token

pytestmark = pytest.mark.bits

HELLO = [{"role": "user", "content": "a good film"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`lm`, and `before/lm`, other weights that read the same tokens."""
    home = tmp_path_factory.mktemp("served")
    (home / "before").mkdir()
    tiny_server.build(home / "before", seed=2)
    return tiny_server.build(home)


@pytest.fixture(scope="module")
def server(home):
    store = FeedbackStore(home / "feedback.sqlite", repeats=0.0)
    prompt = store.add_prompt("A good film is")
    a, b = (store.add_completion(prompt, store.add_model(name), text) for name, text in (("x", "long"), ("y", "short")))
    store.make_comparisons([(a, b)])
    options = "--max_batch=8 --cache_tokens=1024 --queue=60 --reward=reward.py:length --reference=before/lm"
    options += " --feedback=feedback.sqlite --origins=https://a.example,HTTP://localhost:3000/"
    with serving(home, *options.split()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


# ---- the openai client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["lm", "lm:reference"]
    for name in ("lm", "lm:reference"):
        model = client.models.retrieve(name)
        assert model.id == name and abs(model.created - time.time()) < 3600


@pytest.mark.parametrize("chat", [True, False])
def test_the_reference_streams_beside_the_model(server, client, home, chat):
    """Both at once, with one seed: each what its own weights give alone, and the facts of each."""
    alone = open_pretrained(home / "before" / "lm"), open_pretrained(home / "lm")
    asked = {"messages": HELLO} if chat else {"prompt": "a good film"}
    create = client.chat.completions.create if chat else client.completions.create
    options = dict(**asked, max_tokens=12, seed=4, stream=True)
    names, texts = ("lm:reference", "lm"), ["", ""]
    streams = [iter(create(model=name, **options)) for name in names]
    for chunks in itertools.zip_longest(*streams):
        for which, chunk in enumerate(chunks):
            for choice in chunk.choices if chunk else ():
                texts[which] += (choice.delta.content if chat else choice.text) or ""
            assert chunk is None or chunk.model == names[which]
    tokenizer, template = alone[0].tokenizer, Chat(alone[0].tokenizer)
    prompt = template.render(HELLO, True) if chat else [tokenizer.start, *tokenizer.encode("a good film")]
    for opened, text in zip(alone, texts):
        sampling = Sampling(12, template.stop_ids(), tokenizer.pad)
        drawn = row_uniforms(4, 0, [0], 12)
        out = generate(opened.model, torch.tensor([prompt]), torch.tensor([len(prompt)]), sampling, drawn)
        said = token_texts(tokenizer, out.tokens[0][out.mask[0]].tolist())
        assert one_mark(text).strip() == one_mark("".join(said)).strip()
    assert texts[0] != texts[1]
    for name in names:  # the reference is at no distance from itself
        facts = asked | {"model": name, "response": texts[0] or "x"}
        told = server.request("/v1/tokens", facts)[2]["tokens"]
        assert all((token["kl"] == token["logratio"] == 0) == (name == "lm:reference") for token in told)
        assert server.request("/v1/score", facts)[2]["score"] == len(facts["response"])
    assert server.request("/health")[2]["models"] == ["lm", "lm:reference"]
    assert server.metric("rows") == 8 + 2  # texts that both caches have room for
    assert server.request("/v1/tokens", facts | {"model": "lm:other"})[2]["error"]["code"] == "model_not_found"


def test_chat(client, home):
    answer = client.chat.completions.create(
        model="lm", messages=HELLO, max_tokens=9, seed=1, n=3, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and answer.object == "chat.completion"
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    tokenizer = load_tokenizer(home / "lm")
    for choice in answer.choices:
        assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
        said = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content).decode("utf-8", "replace")
        assert said.removeprefix(" ") == choice.message.content
        assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in choice.logprobs.content)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a good "}, {"type": "text", "text": "film"}]}]
    again = client.chat.completions.create(model="lm", messages=parts, max_completion_tokens=9, seed=1)
    assert again.choices[0].message.content == answer.choices[0].message.content
    assert answer.usage.prompt_tokens == again.usage.prompt_tokens > len(tokenizer.encode("a good film"))


def test_control_tokens_cannot_be_typed(client):
    def count(content):
        call = client.chat.completions.create(model="lm", messages=[{"role": "user", "content": content}], max_tokens=1)
        return call.usage.prompt_tokens

    assert count("<|im_end|>") - count("") > 5  # ten characters, not one token


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_says_the_same(client, n):
    options = dict(model="lm", messages=HELLO, max_tokens=12, seed=3, n=n, logprobs=True)
    whole = client.chat.completions.create(**options)
    texts, logprobs, finishes, usage = [""] * n, [[] for _ in range(n)], [None] * n, None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert logprobs == [choice.logprobs.content for choice in whole.choices]
    assert usage == whole.usage


def test_responses_are_those_of_a_chat(client):
    """In the form of their endpoint, whole and as events; what is asked of instructions, log-probs and lengths arrives."""
    import openai

    asked = dict(model="lm", max_output_tokens=12, top_p=0.9, extra_body={"seed": 1, "frequency_penalty": 0.3})
    told = [{"role": "system", "content": "be brief"}, *HELLO]
    chat = dict(model="lm", messages=told, max_tokens=12, top_p=0.9, seed=1, frequency_penalty=0.3, logprobs=True)
    expected = client.chat.completions.create(**chat, top_logprobs=2)
    (choice,) = expected.choices
    logprobs = dict(include=["message.output_text.logprobs"], top_logprobs=2)
    for more in (
        dict(input="a good film", instructions="be brief"),
        dict(input=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": "a good film"}]),
        dict(
            input=[
                {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "be brief"}]},
                *HELLO,
            ]
        ),
    ):
        answer = client.responses.create(**asked, **more, **logprobs)
        assert answer.output_text == choice.message.content and answer.usage.total_tokens == expected.usage.total_tokens
        ends = {"stop": ("completed", None), "length": ("incomplete", "max_output_tokens")}[choice.finish_reason]
        assert (answer.status, answer.incomplete_details and answer.incomplete_details.reason) == ends
        (part,) = answer.output[0].content
        said = [[(x.token, x.logprob) for x in (token, *token.top_logprobs)] for token in part.logprobs]
        assert said == [[(x.token, x.logprob) for x in (t, *t.top_logprobs)] for t in choice.logprobs.content]
    events = list(client.responses.create(**asked, **more, **logprobs, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", answer.status]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == events[-4].text == answer.output_text
    assert events[-1].response.output[0].content == answer.output[0].content
    for wrong, param in (
        (dict(previous_response_id="resp_1"), "previous_response_id"),
        (dict(background=True), "background"),
        (dict(truncation="auto"), "truncation"),
        (dict(tools=[{"type": "web_search"}]), "tools"),
        (dict(max_output_tokens=10_000), "max_output_tokens"),
        (dict(input=[{"type": "reasoning", "summary": []}]), "input"),
        (dict(input="a " * 200), "input"),
        (dict(input=[]), "input"),
        (dict(top_logprobs=2), "top_logprobs"),
        (dict(model="gpt"), "model"),
    ):
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
            client.responses.create(**dict(model="lm", input="a") | wrong)
        assert caught.value.body["param"] == param


def test_embeddings_are_means_of_the_trunks_states(client, server, home):
    import openai

    texts = ["a good film", "a bad film that nobody likes"]
    for name, directory in (("lm", home / "lm"), ("lm:reference", home / "before" / "lm")):
        opened, means = open_pretrained(directory), []
        for words in texts:
            ids = [opened.tokenizer.start, *opened.tokenizer.encode(words)]
            states = opened.model.trunk(torch.tensor([ids]))[0].tolist()[1:]
            mean = [sum(column) / len(states) for column in zip(*states)]
            means.append([x / sum(x * x for x in mean) ** 0.5 for x in mean])
        answer = client.embeddings.create(model=name, input=texts)  # as base64
        assert [one.index for one in answer.data] == [0, 1] and answer.usage.prompt_tokens > 0
        for one, mean in zip(answer.data, means):
            assert one.embedding == pytest.approx(mean, abs=1e-5)
        ids = [opened.tokenizer.start, *opened.tokenizer.encode(texts[1])]
        alone = server.request("/v1/embeddings", {"model": name, "input": [ids, ids]})[2]
        assert alone["usage"]["total_tokens"] == 2 * len(ids) and alone["data"][0]["embedding"] != means[1]
        whole = server.request("/v1/embeddings", {"model": name, "input": texts[1], "dimensions": len(mean)})[2]
        assert whole["data"][0]["embedding"] == pytest.approx(answer.data[1].embedding, abs=1e-7)
    for wrong, param in (
        (dict(input=""), "input"),
        (dict(input=[]), "input"),
        (dict(input="a " * 200), "input"),
        (dict(dimensions=8), "dimensions"),
        (dict(encoding_format="int8"), "encoding_format"),
        (dict(input=[[5000]]), "input"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(**dict(model="lm", input="a") | wrong)
        assert caught.value.body["param"] == param


def test_structured_answers_of_the_client(client):
    """`parse` of chats and responses, a stream, several choices; one that is cut off says so."""
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra schema)")
    import openai
    from pydantic import BaseModel

    class Answer(BaseModel):
        good: bool
        kind: Literal["film", "story"]

    for seed in range(3):
        asked = dict(model="lm", messages=HELLO, seed=seed, max_tokens=60, temperature=2.0)
        answer = client.chat.completions.parse(**asked, n=2, response_format=Answer)
        assert all(
            isinstance(choice.message.parsed, Answer) and choice.finish_reason == "stop" for choice in answer.choices
        )
        with client.chat.completions.stream(**asked, response_format=Answer) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed
        more = dict(model="lm", input=HELLO, max_output_tokens=60, temperature=2.0, extra_body={"seed": seed})
        assert client.responses.parse(**more, text_format=Answer).output_parsed == answer.choices[0].message.parsed
        with client.responses.stream(**more, text_format=Answer) as stream:  # the client adds the events up
            assert stream.get_final_response().output_parsed == answer.choices[0].message.parsed
        anything = client.chat.completions.create(**asked, response_format={"type": "json_object"}).choices[0]
        assert anything.message.content[0] == "{" and (
            anything.finish_reason == "length" or isinstance(json.loads(anything.message.content), dict)
        )
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**asked | {"max_tokens": 3}, response_format=Answer)


def test_completions_are_those_of_the_sampler(client, home):
    """The i-th choice of a seed is the i-th sample of `sample.py` with it."""
    opened = open_pretrained(home / "lm")
    ids = [opened.tokenizer.start, *opened.tokenizer.encode("a good")]
    answer = client.completions.create(
        model="lm", prompt="a good", max_tokens=8, seed=5, n=4, temperature=0.8, top_p=0.9, extra_body={"top_k": 20}
    )
    sampling = Sampling(8, opened.stop_ids, opened.tokenizer.pad, 0.8, 20, 0.9)
    out = generate(
        opened.model, torch.tensor([ids]), torch.tensor([len(ids)]), sampling, row_uniforms(5, 0, range(4), 8)
    )
    for row, length, choice in zip(out.tokens, out.lengths, answer.choices):
        expected = opened.tokenizer.decode(row[:length].tolist())
        assert one_mark("a good" + choice.text) == one_mark(expected)


def one_mark(text: str) -> str:
    """How many U+FFFD broken bytes become differs between decoders."""
    return re.sub("\ufffd+", "\ufffd", text)


def test_echo_and_logprobs_as_an_evaluation_harness_asks(client, home):
    """Token ids in, their log-probs out, and one more token, which the harness drops; several prompts at once."""
    opened, prompts = open_pretrained(home / "lm"), [[7, 8, 9, 300, 11], [1, 301, 20]]
    options = dict(model="lm", prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234)
    for choice, ids in zip(client.completions.create(**options).choices, prompts):
        logprobs = opened.model(torch.tensor([ids]))[0].log_softmax(-1).detach()
        says = choice.logprobs
        assert len(says.tokens) == len(says.token_logprobs) == len(says.top_logprobs) in (len(ids), len(ids) + 1)
        assert says.token_logprobs[0] is None and says.top_logprobs[0] is None
        expected = [float(logprobs[t, i]) for t, i in enumerate(ids[1:])]
        assert says.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
        best = [float(row.max()) for row in logprobs[:-1]]
        assert [max(top.values()) for top in says.top_logprobs[1 : len(ids)]] == pytest.approx(best, abs=1e-4)
        assert one_mark(choice.text).startswith(one_mark(opened.tokenizer.decode(ids)))
    text = client.completions.create(model="lm", prompt="a good film", echo=True, logprobs=0, max_tokens=0).choices[0]
    assert text.text == "a good film" and text.finish_reason == "length"
    assert [text.text[a:b] for a, b in zip(text.logprobs.text_offset, text.logprobs.text_offset[1:] + [None])] == [
        token.removeprefix(" ") if k == 0 else token for k, token in enumerate(text.logprobs.tokens)
    ]
    streamed = client.completions.create(**options | {"prompt": prompts[0]}, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed).startswith(opened.tokenizer.decode(prompts[0]))


def test_offsets_are_of_characters(home):
    """Of which several tokens may make one."""
    tokenizer = load_tokenizer(home / "lm")
    asked = {"prompt": "a", "max_tokens": 9, "echo": True, "logprobs": 0}
    call = parse_completion(asked, tokenizer, Limits(64, 64, 1))
    writer = Writer(call, tokenizer, "lm", "")
    ids = tokenizer.encode("a film\u20ac bad")
    call.requests[0].prompt_tokens += [Token(i, None, []) for i in call.prompts[0]]
    (choice,) = writer.whole([" film\u20ac bad"], [[Token(i, -1.0, []) for i in ids[1:]]], ["stop"])["choices"]
    says, pieces = choice["logprobs"], token_texts(tokenizer, ids)
    assert "" in pieces and says["tokens"].count("\ufffd") > 1
    ends = [*says["text_offset"][1:], len(choice["text"])]
    assert [choice["text"][a:b] for a, b in zip(says["text_offset"], ends)] == pieces


def test_logprobs_of_one_request_are_bounded(home):
    tokenizer, asked = load_tokenizer(home / "lm"), {"prompt": ["a"], "logprobs": 20, "max_tokens": 1000}
    limits = Limits(1024, 1024, 100)
    assert len(parse_completion(asked | {"n": 40}, tokenizer, limits).requests) == 40
    for more in (
        {"n": 60},
        {"n": 30, "prompt": ["a"] * 2},
        {"n": 60, "max_tokens": 1, "echo": True, "prompt": [7] * 900},
    ):
        with pytest.raises(ApiError, match="log-probs asked for"):
            parse_completion(asked | more, tokenizer, limits)
    assert len(parse_completion(asked | {"n": 60, "logprobs": None}, tokenizer, limits).requests) == 60


def test_a_bias_of_the_client_bans_or_chooses_a_token(client):
    options = dict(model="lm", prompt="a good film", max_tokens=8, temperature=0, extra_body={"return_token_ids": True})
    first = client.completions.create(**options).choices[0].token_ids[0]
    banned = client.completions.create(**options, logit_bias={str(first): -100}).choices[0].token_ids
    assert first not in banned
    for chosen in client.completions.create(**options, logit_bias={"20": 100, "21": 99}).choices:
        assert chosen.token_ids == [20] * 8 and chosen.finish_reason == "length"


def test_stop_strings(client):
    options = dict(model="lm", prompt="a good film", max_tokens=40, seed=2)
    text = client.completions.create(**options).choices[0].text
    stop = text[len(text) // 2 :][:3]
    ended = client.completions.create(**options, stop=[stop, "\x00"]).choices[0]
    assert (ended.text, ended.finish_reason) == (text[: text.find(stop)], "stop")
    chunks = list(client.completions.create(**options, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == ended.text


def test_errors_are_those_of_the_client(client, server):
    import openai

    good = dict(model="lm", prompt="a", max_tokens=1)
    cases = [
        (openai.NotFoundError, dict(model="gpt"), "model"),
        (openai.BadRequestError, dict(prompt="a " * 200), "prompt"),
        (openai.BadRequestError, dict(max_tokens=10_000), "max_tokens"),
        (openai.BadRequestError, dict(temperature=-1), "temperature"),
        (openai.BadRequestError, dict(top_p=1.1), "top_p"),
        (openai.BadRequestError, dict(n=1000), "n"),
        (openai.BadRequestError, dict(stop=[""]), "stop"),
        (openai.BadRequestError, dict(prompt=[5000]), "prompt"),
        (openai.BadRequestError, dict(prompt=[]), "prompt"),
        (openai.BadRequestError, dict(logprobs=21), "logprobs"),
        (openai.BadRequestError, dict(frequency_penalty=2.1), "frequency_penalty"),
        (openai.BadRequestError, dict(suffix="x"), "suffix"),
        (openai.BadRequestError, dict(seed="x"), "seed"),
    ]
    for kind, changes, param in cases:
        with pytest.raises(kind) as caught:
            client.completions.create(**good | changes)
        assert caught.value.body["param"] == param and caught.value.body["type"] == "invalid_request_error"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="lm", messages=[])
    status, _, body = server.request("/v1/completions", raw=b"{" + b" " * 300_000)
    assert (status, body["error"]["type"]) == (413, "invalid_request_error")
    for raw in (b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}', b'{"prompt": "a", "top_p": NaN}'):
        assert server.request("/v1/completions", raw=raw)[0] == 400
    strange = ('"metadata": 5', '"metadata": {"a": 1}', '"metadata": {"a": NaN}', '"text": {"a": 1e999}')
    for more in itertools.product(("", '"stream": true, '), strange):  # which /v1/responses would repeat
        raw = f'{{"input": "a", "max_output_tokens": 1, {"".join(more)}}}'.encode()
        assert server.request("/v1/responses", raw=raw)[0] == 400
    assert server.request("/v1/completions")[0] == 405 and server.request("/v1/nothing")[0] == 404
    client.completions.create(**good, extra_body={"nobody_knows": 1, "frequency_penalty": 0})


def test_who_leaves_early_frees_the_row(client, server):
    import openai

    before = server.metric("cancelled_total")
    stream = client.completions.create(model="lm", prompt="a", max_tokens=120, n=8, temperature=2.0, stream=True)
    next(iter(stream))
    stream.close()
    server.metric_becomes("running", 0)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.02).completions.create(
            model="lm", prompt="a", max_tokens=120, n=60, temperature=2.0
        )
    server.metric_becomes("running", 0)
    server.metric_becomes("waiting", 0)
    assert server.metric("cancelled_total") > before


# ---- company


def mixed(seed: int, longest: int) -> dict:
    rng = random.Random(seed)
    return {
        "prompt": " ".join(rng.choices("a good bad film story that nobody likes".split(), k=rng.randint(1, 20))),
        "max_tokens": rng.randint(1, longest),
        "temperature": rng.choice([0, 0.7, 1.0, 1.5]),
        "top_p": rng.choice([1.0, 0.9]),
        "top_k": rng.choice([0, 30]),
        "seed": rng.randrange(5),
        "logprobs": rng.choice([None, 2]),
        "echo": rng.random() < 0.3,
        "stop": rng.choice([None, ["o"], ["film", "st"]]),
        "presence_penalty": rng.choice([0, 0, 1.5]),
        "frequency_penalty": rng.choice([0, 0, -0.5]),
        "repetition_penalty": rng.choice([1, 1, 1.3]),
        "logit_bias": rng.choice([None, None, {"20": 3, "300": -100}]),
        "min_p": rng.choice([0, 0.05]),
    }


@pytest.mark.parametrize("longest", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_64_mixed_requests_get_what_they_get_alone(server, longest):
    """To the bit: the log-probs too."""
    assert (
        "the same text and log-probs for a seed" in server.first_line and server.request("/health")[2]["exact"] is True
    )

    def ask(body):
        status, _, answer = server.request("/v1/completions", body)
        assert status == 200, answer
        return answer["choices"], answer["usage"]

    bodies = [mixed(seed, longest) for seed in range(64)]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, bodies))
    assert together == [ask(body) for body in bodies]
    assert (server.metric("running"), server.metric("waiting")) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("ffn", [43, 48])
def test_what_is_promised_of_a_model_whose_width_fits_no_block(tmp_path, ffn):
    """A row's place decides the last bits: equal texts, log-probs to 1e-5; and where it does not, as always."""
    with serving(tiny_server.build(tmp_path, ffn=ffn), "--max_batch=8", "--cache_tokens=1024") as server:
        exact = server.request("/health")[2]["exact"]
        says = " alone or in company)" if exact else " alone or in company, and its log-probs to 1e-5)"
        assert server.first_line.endswith(says + "\n") and (ffn != 43 or not exact)
        bodies = [mixed(seed, 40) | {"logprobs": 2} for seed in range(24)]
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            together = list(pool.map(lambda body: server.request("/v1/completions", body)[2], bodies))
        for body, answer in zip(bodies, together):
            alone = server.request("/v1/completions", body)[2]
            assert alone["usage"] == answer["usage"]
            (a,), (b,) = alone["choices"], answer["choices"]
            assert (a["text"], a["logprobs"]["tokens"]) == (b["text"], b["logprobs"]["tokens"])
            for one, other in zip(a["logprobs"]["token_logprobs"], b["logprobs"]["token_logprobs"]):
                assert one == (other if exact or other is None else pytest.approx(other, abs=1e-5))


def test_more_requests_than_a_server_reads_are_turned_away():
    """Before their bodies are read, in OpenAI's form; /health answers, and places become free again."""
    pytest.importorskip("starlette", reason="starlette is not installed (extra serve)")

    async def scenario():
        release, reached = asyncio.Event(), []

        async def app(scope, receive, send):
            reached.append(scope["path"])
            if scope["path"] != "/health":
                await release.wait()
                raise OSError("the client has left")

        async def ask(path):
            sent = []

            async def send(message):
                sent.append(message)

            await bounded({"type": "http", "path": path, "method": "POST", "headers": []}, None, send)
            return sent

        bounded = Bounded(app, 2)
        held = [asyncio.ensure_future(ask("/v1/completions")) for _ in range(2)]
        await asyncio.sleep(0)
        start, body = await ask("/v1/completions")
        assert start["status"] == 503 and (b"retry-after", b"1") in start["headers"]
        assert json.loads(body["body"])["error"]["code"] == "overloaded"
        await ask("/health")
        assert reached == ["/v1/completions"] * 2 + ["/health"]
        release.set()
        assert all(isinstance(e, OSError) for e in await asyncio.gather(*held, return_exceptions=True))
        assert bounded.open == 0

    asyncio.run(scenario())


def test_overload_is_503_and_passes(server):
    def ask(_):
        return server.request("/v1/completions", {"prompt": "a", "max_tokens": 12, "n": 20, "temperature": 2.0})

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    busy = [answer for answer in answers if answer[0] == 503]
    assert {answer[0] for answer in answers} == {200, 503}
    assert all(headers["Retry-After"] and body["error"]["code"] == "overloaded" for _, headers, body in busy)
    assert ask(0)[0] == 200 and server.metric("running") == server.metric("waiting") == 0


# ---- ours


def test_score_and_tokens(server, home):
    asked = {"prompt": "a good", "response": " film"}
    assert server.request("/v1/score", asked)[::2] == (200, {"score": 4.0})
    _, _, answer = server.request("/v1/tokens", asked)
    opened = open_pretrained(home / "lm")
    prompt = [opened.tokenizer.start, *opened.tokenizer.encode("a good")]
    response = opened.tokenizer.encode("film")
    models = opened.model, open_pretrained(home / "before" / "lm").model
    new, old = (model(torch.tensor([prompt + response]))[0].log_softmax(-1).detach() for model in models)
    for t, (i, token) in enumerate(zip(response, answer["tokens"]), len(prompt) - 1):
        kl = sum(float(p.exp() * (p - q)) for p, q in zip(new[t], old[t]))
        expected = (float(new[t, i]), float(new[t, i] - old[t, i]), kl)
        assert (token["logprob"], token["logratio"], token["kl"]) == pytest.approx(expected, abs=1e-4)
    assert "".join(token["text"] for token in answer["tokens"]) == "film"
    for t, token in enumerate(server.request("/v1/tokens", asked | {"top": 3})[2]["tokens"], len(prompt) - 1):
        best = sorted(range(len(new[t])), key=lambda i: -new[t, i])[:3]
        expected = [(float(new[t, i]), float(old[t, i])) for i in best]
        found = [(other["logprob"], other["ref_logprob"]) for other in token["top"]]
        assert sum(found, ()) == pytest.approx(sum(expected, ()), abs=1e-4)
        assert [other["chosen"] for other in token["top"]] == [i == response[t - len(prompt) + 1] for i in best]
    assert all(token["value"] is None for token in answer["tokens"])
    assert [token["reward"] for token in answer["tokens"]] == [None] * (len(response) - 1) + [4.0]
    chat = {"messages": HELLO, "response": "film"}
    assert server.request("/v1/score", chat)[0] == 200
    for wrong in (
        {},
        {"response": "x"},
        {"prompt": "a", "messages": HELLO, "response": "x"},
        {"prompt": "a", "response": 3},
    ):
        assert server.request("/v1/score", wrong)[0] == 400
    assert server.request("/v1/score", {"prompt": "a", "response": ""})[0] == 400
    assert server.request("/v1/tokens", {"prompt": "a", "response": ""})[2] == {"tokens": []}
    assert server.request("/v1/tokens", {"prompt": "a " * 200, "response": "x"})[0] == 400


def test_votes(server):
    status, _, shown = server.request("/v1/comparison?rater=ana")
    assert status == 200 and {shown["left"]["text"], shown["right"]["text"]} == {"long", "short"}
    assert set(shown) == {"id", "prompt", "messages", "left", "right", "progress"}  # blind
    assert shown["progress"] == {"done": 0, "of": 1} and shown["messages"] is None
    vote = {"rater": "ana", "choice": "left", "strength": 2, "seconds": 1.5, "nonce": "0123456789"}
    path = f"/v1/comparison/{shown['id']}/vote"
    first, again = server.request(path, vote), server.request(path, vote)
    assert first[::2] == again[::2] and first[0] == 200
    assert server.request("/v1/comparison?rater=ana")[0] == 204
    assert server.request("/v1/feedback/statistics")[0] == 200
    undo = f"/v1/votes/{first[2]['vote']}/undo"
    assert server.request(undo, {"rater": "ana"})[::2] == (200, {"undone": True})
    assert server.request("/v1/comparison?rater=ana")[2]["id"] == shown["id"]
    for where, body, status in (
        (path, vote | {"nonce": "another-nonce", "choice": "both"}, 400),
        (path, {}, 400),
        ("/v1/comparison/999/vote", vote | {"nonce": "another-nonce"}, 404),
        ("/v1/comparison/x/vote", vote, 404),
        ("/v1/votes/999/undo", {"rater": "ana"}, 404),
    ):
        assert server.request(where, body)[0] == status, (where, body)
    assert server.request("/v1/comparison")[0] == 400


def test_a_store_that_cannot_be_written_is_503_and_names_no_path(tmp_path, caplog):
    """The page sends a vote again after a 503; after a 4xx it would give it up."""
    store = FeedbackStore(tmp_path / "full.sqlite")
    store._db.execute("PRAGMA max_page_count = 1")  # no page more: a full disk
    with pytest.raises(ApiError) as caught:
        asyncio.run(Service.ask(store.add_prompt, "long " * 10_000))
    assert caught.value.status == 503 and "Retry-After" in caught.value.headers
    assert "full" not in caught.value.message and "full.sqlite: database or disk is full" in caplog.text


def test_a_body_that_does_not_come_is_408():
    async def receive():
        await asyncio.Event().wait()

    async def body():
        service = SimpleNamespace(patience=0.01, max_body=100)
        service.read = Service.read.__get__(service)
        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        await Service.body(service, request)

    Request = pytest.importorskip("starlette.requests", reason="starlette is not installed (extra serve)").Request
    with pytest.raises(ApiError, match="in time") as caught:
        asyncio.run(body())
    assert caught.value.status == 408


def test_health_metrics_and_page(server):
    status, _, health = server.request("/health")
    assert status == 200 and health["has"] == ["reward", "reference", "chat", "feedback"]
    status, headers, text = server.request("/metrics")
    assert headers["Content-Type"].startswith("text/plain") and "# TYPE plain_rlhf_requests_total counter" in text
    status, headers, text = server.request("/")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert headers["Content-Security-Policy"] == policy(text) and "'none'" in policy("")


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"),
    reason="torch 2.13's bf16 attention needs AVX-512 on a CPU that has it, whatever ATEN_CPU_CAPABILITY says (pack_vnni2)",
)
def test_a_model_in_half_precision_is_at_no_distance_from_itself(tmp_path):
    """Wide enough for products that read weights where they lie to differ from F.linear's in their last bits."""
    home = tiny_server.build(tmp_path, width=576, heads=9)
    with serving(home, "--reference=lm", "--reward=reward.py:length", "--precision=bf16", "--max_batch=2") as server:
        asked = {"prompt": "a good film", "response": "that nobody likes " * 8}
        assert {token["kl"] for token in server.request("/v1/tokens", asked)[2]["tokens"]} == {0.0}


HOSTILE = {  # what a template does once a conversation has three messages
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "power": "{{ (messages|length * 3) ** (10 ** 8) }}",
    "two lines": "{{ raise_exception('a\nb') }}",
    "nothing": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_is_400_and_holds_nobody_up(tmp_path, kind):
    every = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    template = "{% if messages|length == 3 %}" + (HOSTILE[kind] or "") + "{% else %}" + every + "{% endif %}"
    home = tiny_server.build(tmp_path, template=template)
    with serving(home, "--max_batch=4", "--cache_tokens=512", "--reward=reward.py:length") as server:
        three = {"messages": HELLO * 3, "max_tokens": 3, "response": "x"}
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            paths = ("/v1/chat/completions", "/v1/score")
            answers = [pool.submit(server.request, path, three) for path in paths]
            assert server.request("/health")[0] == 200
            assert server.request("/v1/completions", {"prompt": "a", "max_tokens": 3})[0] == 200
            assert kind not in ("loops",) or not any(answer.done() for answer in answers)
        for status, _, body in (answer.result() for answer in answers):
            assert status == 400 and body["error"]["param"] == "messages" and "\n" not in body["error"]["message"], body
        assert server.request("/v1/chat/completions", three | {"messages": HELLO})[0] == 200


def test_other_origins_and_names_are_refused(server):
    host = urllib.parse.urlparse(server.url).netloc
    body = {"prompt": "a", "max_tokens": 1}
    for origin in (f"http://{host}", f"HTTP://{host.upper()}"):
        assert server.request("/v1/completions", body, Origin=origin)[0] == 200
    for origin in ("http://evil.example", "null", f"http://{host}.evil.example", "http://127.0.0.1:1"):
        assert server.request("/v1/completions", body, Origin=origin)[0] == 403
    # a name of a stranger that points to 127.0.0.1: its pages would be of "our" origin
    assert server.request("/v1/models", Host="evil.example:80")[0] == 403
    assert server.request("/v1/completions", body, Origin="http://evil.example", Host="evil.example")[0] == 403
    for host in ("[", "[::1", "x@127.0.0.1", "127.0.0.1:x", "127.0.0.1.evil.example"):
        assert server.request("/v1/models", Host=host)[0] in (400, 403), host
    for host in ("LOCALHOST:1", "[::1]:8000", "127.0.0.2"):
        assert server.request("/v1/models", Host=host)[0] == 200, host
    # a page elsewhere can send a GET without Origin, and this one opens a comparison
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        assert server.request("/v1/feedback/statistics", Sec_Fetch_Site=site)[0] == status
    assert server.request("/v1/comparison?rater=eve", Sec_Fetch_Site="cross-site")[0] == 403


def test_pages_of_named_origins_may_use_it(server):
    """As a browser asks: OPTIONS first, then the request; also an error and a stream can be read; others as before."""
    asks = {
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "authorization,x-stainless-os",
    }
    body = {"prompt": "a", "max_tokens": 1}
    for origin in ("https://a.example", "http://localhost:3000"):
        status, headers, _ = server.request("/v1/completions", method="OPTIONS", Origin=origin, **asks)
        assert (status, headers["Access-Control-Allow-Origin"], headers["Vary"]) == (204, origin, "Origin")
        assert headers["Access-Control-Allow-Headers"] == asks["Access_Control_Request_Headers"]
        assert "POST" in headers["Access-Control-Allow-Methods"]
        for more, expected in (({}, 200), ({"stream": True}, 200), ({"n": 0}, 400)):
            sent = server.request("/v1/completions", body | more, Origin=origin, Sec_Fetch_Site="cross-site")
            assert sent[0] == expected and sent[1]["Access-Control-Allow-Origin"] == origin
        assert server.request("/v1/models", Origin=origin, Sec_Fetch_Site="cross-site")[0] == 200
    for origin in ("https://b.example", "https://a.example.evil", "http://a.example", "null", "*"):
        status, headers, _ = server.request("/v1/completions", method="OPTIONS", Origin=origin, **asks)
        assert status == 405 and "Access-Control-Allow-Origin" not in headers
        status, headers, _ = server.request("/v1/completions", body, Origin=origin)
        assert status == 403 and "Access-Control-Allow-Origin" not in headers
    assert server.request("/v1/models", Sec_Fetch_Site="cross-site")[0] == 403


def test_origins_are_checked_before_anything_begins():
    assert parse_origins("https://A.example/, http://[::1]:3000,", None) == {"https://a.example", "http://[::1]:3000"}
    assert parse_origins(None, None) == frozenset() and parse_origins("*", "key") == {"*"}
    for wrong in ("a.example", "https://a.example/path", "https://*.example", "null", "ftp://a", "https://a b", "*"):
        with pytest.raises(ValueError, match="--origins"):
            parse_origins(wrong, None)
    with pytest.raises(ValueError, match="stands alone"):
        parse_origins("*,https://a.example", "key")


# ---- start and end


def test_a_key_is_needed_to_be_reached_by_others(monkeypatch):
    def main(*options):
        monkeypatch.setattr(sys, "argv", ["serve.py", "--init=nothing", *options])
        serve.main()

    monkeypatch.delenv(serve.KEY, raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ValueError, match="give a key"):
            main(f"--host={host}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="try another --port"):
            main(f"--port={taken.getsockname()[1]}")
    with pytest.raises(ValueError, match="less than 8 tokens"):
        main("--cache_tokens=100")


@pytest.mark.slow
def test_a_key_and_workers(home):
    import openai

    with serving(home, "--host=0.0.0.0", "--workers=2", "--max_batch=4", env={"PLAIN_RLHF_KEY": "secret"}) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert server.request("/health")[0] == server.request("/")[0] == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            assert server.request("/v1/models", **headers)[0] == 401
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()
        client = server.client(api_key="secret")
        options = dict(model="lm", prompt="a good", max_tokens=20, seed=4)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda _: client.completions.create(**options).choices[0].text, range(24)))
        assert len(set(texts)) == 1  # whichever worker


@pytest.mark.slow
def test_an_int8_directory(home):
    """Written by export.py, served beside the model that it was made of: the same texts alone and in company."""
    (home / "texts.txt").write_text("a good film\na bad film that nobody likes\n")
    options = "--init=lm --out=int8 --format=int8 --data=texts.txt --max_kl=9 --prompt_tokens=1 --response_tokens=4"
    subprocess.run([sys.executable, ROOT / "export.py", *options.split()], cwd=home, check=True, capture_output=True)
    options = ("--reference=lm", "--max_batch=20", "--name=small", "--precision=int8")
    with serving(home, *options, init="int8") as server:
        assert server.request("/health")[2]["exact"] is True
        bodies = [mixed(seed, 20) for seed in range(24)]
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            together = list(pool.map(lambda body: server.request("/v1/completions", body)[::2], bodies))
        assert [status for status, _ in together] == [200] * 24
        for body, (_, answer) in list(zip(bodies, together))[::4]:
            alone = server.request("/v1/completions", body)[2]
            assert (alone["choices"], alone["usage"]) == (answer["choices"], answer["usage"])
        chat = server.request("/v1/chat/completions", {"messages": HELLO, "max_tokens": 5})
        assert chat[0] == 200 and chat[2]["model"] == "small"
        asked = {"prompt": "a good film", "response": "that nobody likes"}
        assert all(0 < token["kl"] < 1 for token in server.request("/v1/tokens", asked)[2]["tokens"])


@pytest.mark.slow
def test_running_requests_finish_when_the_server_is_told_to_stop(home):
    with serving(home, "--max_batch=4") as server:
        host = urllib.parse.urlparse(server.url)
        connection = http.client.HTTPConnection(host.hostname, host.port, timeout=120)
        body = {"prompt": "a", "max_tokens": 100, "stream": True, "temperature": 0, "seed": 1}
        connection.request("POST", "/v1/completions", json.dumps(body))
        answer = connection.getresponse()
        answer.readline()
        server.process.send_signal(signal.SIGINT)
        events = answer.read().decode().strip().split("\n\n")
        assert events[-1] == "data: [DONE]" and '"finish_reason":' in events[-2]
