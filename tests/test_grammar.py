"""Answers in JSON: whatever a random model draws, a text that ends is what its schema asks for."""

import json
import sys
from types import SimpleNamespace

import hf_tokenizers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import Log, run

from data.tokenizer import load_tokenizer, train_sentencepiece
from model.steering import Steering
from model.transformer import ModelConfig, Transformer
from rlhf.serve import grammar
from rlhf.serve.protocol import ApiError, Limits, parse_chat, parse_completion
from rlhf.serve.scheduler import Request, Sampling, Scheduler

WIDTH = 256


def library():
    return pytest.importorskip("llguidance", reason="llguidance is not installed: pip install -e '.[schema]'")


def valid(value, schema: dict) -> bool:
    """The part of JSON Schema that `schemas` makes, by its definition."""
    if "enum" in schema:
        return any(value == x and type(value) is type(x) for x in schema["enum"])
    if "anyOf" in schema:
        return any(valid(value, x) for x in schema["anyOf"])
    kind = schema["type"]
    if kind == "object":
        own = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= value.keys() <= own.keys()
            and all(valid(x, own[name]) for name, x in value.items())
        )
    if kind == "array":
        fits = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return fits and all(valid(x, schema["items"]) for x in value)
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return value is None if kind == "null" else type(value) is bool


words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=5)
leaves = (
    st.sampled_from([{"type": "null"}, {"type": "boolean"}])
    | st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 3))
    | st.builds(
        lambda a, n: {"type": "integer", "minimum": a, "maximum": a + n}, st.integers(-999, 999), st.integers(0, 99)
    )
    | st.builds(lambda xs: {"enum": xs}, st.lists(words | st.integers(-99, 99) | st.booleans(), min_size=1, max_size=3))
)


def objects(inner):
    def of(properties: dict, some: int) -> dict:
        required = [name for k, name in enumerate(properties) if some >> k & 1]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(of, st.dictionaries(words, inner, max_size=3), st.integers(0, 7))


def arrays(inner):
    def of(items: dict, least: int, more: int) -> dict:
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + more}

    return st.builds(of, inner, st.integers(0, 1), st.integers(0, 1))


def any_of(inner):
    return st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=2))


schemas = st.recursive(leaves, lambda inner: objects(inner) | arrays(inner) | any_of(inner), max_leaves=5)


@pytest.fixture(scope="module", params=["sentencepiece", "gpt-2", "llama-3", "stripped"])
def tokenizer(request, tmp_path_factory):
    home = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        return train_sentencepiece(
            ["a good film", '{"a": [true, 1]}', "user assistant"] * 20, home / "tokenizer.model", 300
        )
    hf_tokenizers.write(home / "hf", hf_tokenizers.byte_level(request.param, added=True), eos_token="<|eos|>")
    return load_tokenizer(home / "hf")


@pytest.fixture(scope="module")
def served(tokenizer):
    """A scheduler on a random model, with rows for no token, and what it delivers."""
    model = Transformer(ModelConfig(tokenizer.vocab_size + 5, width=32, ffn=64, layers=1, heads=2, context=WIDTH))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.embed_tokens.weight.mul_(20)
    log = Log()
    return Scheduler(model, tokenizer, [tokenizer.eos], 4, WIDTH, 99, log), log


@settings(max_examples=5)
@given(st.data())
def test_what_ends_is_what_the_schema_asks_for(tokenizer, served, data):
    """Greedy and drawn, two at once beside one that is free; alone each is the same; what does not end was cut off."""
    library()
    scheduler, log = served
    schema = data.draw(schemas)
    compiled = grammar.Grammar(schema, tokenizer)
    steering = Steering(frequency=2.0)  # a greedy random model says one thing for ever
    sent = [
        Request([tokenizer.start, 5], Sampling(200, temperature, seed=k, steering=steering, grammar=how))
        for k, (temperature, how) in enumerate([(0.0, compiled), (1.0, compiled), (1.0, None)])
    ]
    scheduler.submit(sent)
    run(scheduler)
    for request in sent[:2]:
        text = log[request][0]
        assert log.end(request) in ("stop", "length")
        if log.end(request) == "stop":
            value = json.loads(text)
            assert valid(value, schema), (schema, text)
        else:
            assert request.count == 200
        alone = Request(request.prompt, request.sampling)
        scheduler.submit([alone])
        run(scheduler)
        assert log[alone] == log[request]


def test_any_object(tokenizer, served):
    library()
    scheduler, log = served
    sent = [
        Request(
            [tokenizer.start, k], Sampling(240, 1.0, seed=k, grammar=grammar.Grammar({"type": "object"}, tokenizer))
        )
        for k in range(4, 10)
    ]
    scheduler.submit(sent)
    run(scheduler)
    texts = [log[request][0] for request in sent if log.end(request) == "stop"]
    assert texts and all(isinstance(json.loads(text), dict) for text in texts)


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    path = tmp_path_factory.mktemp("asked") / "tokenizer.model"
    tokenizer = train_sentencepiece(["a good film"] * 20, path, 270)
    return lambda **more: parse_completion({"prompt": "a"} | more, tokenizer, Limits(128, 100, 40))


def form(schema, **more) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema} | more}


@pytest.mark.parametrize(
    "given, says",
    [
        (form({"type": "nope"}), "Invalid type: nope"),
        (form({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (form({"$ref": "http://example.org/x"}), "does not fetch resources"),
        (form({"not": {}}), "Unimplemented keys"),
        (form({"enum": []}), "Unsatisfiable"),
        (form({"$ref": "#"}), "NoExtension"),
        (form(json.loads('{"items":' * 300 + "{}" + "}" * 300)), "recursion limit"),
        (form({"allOf": [{"anyOf": [{"required": [f"{i}{k}"]} for k in range(10)]} for i in range(6)]}), "too large"),
        (form({"items": {"properties": {f"k{i}": {} for i in range(2001)}}}), "2001 properties; at most 2000"),
        (form("x"), "an object with a schema"),
        (form({}, strict="yes"), "strict must be true or false"),
        ({"type": "json_schema"}, "an object with a schema"),
        ({"type": "grammar"}, "text, json_object or json_schema"),
        ("json", "response_format must be an object"),
    ],
)
def test_what_is_no_schema_is_400_with_the_reason(ask, given, says):
    library()
    with pytest.raises(ApiError, match=says) as caught:
        ask(response_format=given)
    assert caught.value.status == 400 and "\n" not in caught.value.message


@pytest.mark.parametrize("objects, each", [(1, 1500), (4, 400)])
def test_many_properties_that_may_be_left_out_can_be_written(tokenizer, objects, each):
    """The last of them, or none."""
    library()
    every = [{f"{k}x{i}": i for i in range(each)} for k in range(objects)]
    schema = {
        "anyOf": [
            {"type": "object", "properties": dict.fromkeys(one, {"type": "integer"}), "additionalProperties": False}
            for one in every
        ]
    }
    compiled = grammar.Grammar(schema, tokenizer)
    words, eos = grammar.Words(tokenizer).tokens, tokenizer.eos
    for value in ({}, {f"{objects - 1}x{each - 1}": 7}):
        guide, left = compiled.start(), json.dumps(value).encode()
        while left:
            allowed = guide.allowed(tokenizer.vocab_size, [eos]).nonzero()[:, 0].tolist()
            i = max((i for i in allowed if words[i] and left.startswith(words[i])), key=lambda i: len(words[i]))
            guide.push(i)
            left = left[len(words[i]) :]
        assert guide.allowed(tokenizer.vocab_size, [eos])[eos]


def test_an_answer_that_is_begun_has_no_schema(ask):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "{"}]
    with pytest.raises(ApiError, match="leave out the assistant's last message"):
        parse_chat({"messages": messages, "response_format": {"type": "json_object"}}, None, None, Limits(128, 100, 40))


def test_schemas_are_taken(ask):
    library()
    tree = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}
    taken = [form({}), form({"type": "object"}, strict=True), form({"const": 1}, strict=False), form(tree)]
    for asked in ({"type": "json_object"}, *taken):
        assert ask(response_format=asked, n=2).requests[1].sampling.grammar is not None
    assert ask(response_format={"type": "text"}).requests[0].sampling.grammar is None
    with pytest.raises(ApiError, match="ignore_eos is not supported with response_format"):
        ask(response_format={"type": "json_object"}, ignore_eos=True)


def test_without_the_library_one_line_says_what_to_install(ask, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ApiError, match=r"pip install -e '.\[schema\]'"):
        ask(response_format={"type": "json_object"})


def test_a_schema_that_leads_nowhere_fails_its_text_alone(tokenizer, served):
    scheduler, log = served

    def fails(size, stop_ids):
        raise ValueError("the schema leads no further: too complex")

    guide = SimpleNamespace(allowed=fails)
    lost = Request([tokenizer.start, 5], Sampling(5, seed=1, grammar=SimpleNamespace(start=lambda: guide)))
    other = Request([tokenizer.start, 5], Sampling(5, seed=1))
    scheduler.submit([lost, other])
    run(scheduler)
    assert "too complex" in log.end(lost) and log.end(other) in ("stop", "length")
