"""Fields that other servers know are honoured or refused, never ignored; what is refused is named; and numbers are numbers."""

import json
import math

import pytest
import tiny_server
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.chat import Chat
from data.tokenizer import load_tokenizer
from model.generate import warp_logits
from model.steering import Steering
from rlhf.serve import protocol
from rlhf.serve.protocol import ApiError, Limits, messages_of, parse_chat, parse_completion, prompt_of, take

LIMITS = Limits(128, 100, 40)
HELLO = [{"role": "user", "content": "a good film"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny_server.build(tmp_path_factory.mktemp("protocol")) / "lm")


@pytest.fixture(scope="module")
def calls(tokenizer):
    """name -> a call of the endpoint with these fields added to a good body."""
    chat = Chat(tokenizer)
    return {
        "chat": lambda **more: parse_chat({"messages": HELLO} | more, tokenizer, chat, LIMITS),
        "completions": lambda **more: parse_completion({"prompt": "a good"} | more, tokenizer, LIMITS),
        "score": lambda **more: prompt_of({"prompt": "a good"} | more, tokenizer, chat),
    }


# ---- known fields

OTHER_SERVERS = {
    "min_tokens": 5, "return_tokens_as_token_ids": True, "guided_json": {"type": "object"}, "guided_regex": "a+",
    "guided_choice": ["a", "b"], "guided_grammar": "root ::= 'a'", "guided_decoding_backend": "outlines",
    "structured_outputs": {"regex": "a"}, "tools": [{"type": "function"}],
    "tool_choice": "required", "functions": [{"name": "f"}], "function_call": {"name": "f"}, "length_penalty": 0.5,
    "use_beam_search": True, "bad_words": ["x"], "allowed_token_ids": [1], "truncate_prompt_tokens": 4, "prompt_logprobs": 1,
    "skip_special_tokens": False, "include_stop_str_in_output": True, "continue_final_message": True, "suffix": "x",
    "add_generation_prompt": False, "chat_template": "{{ x }}", "chat_template_kwargs": {"thinking": True}, "documents": [{}],
    "reasoning_effort": "high", "modalities": ["text", "audio"], "audio": {"voice": "x"}, "verbosity": "low", "mirostat": 2,
    "repeat_penalty": 1.1, "typical_p": 0.9, "grammar": "root ::= 'a'", "json_schema": {"type": "object"}, "n_predict": 5,
    "regex": "a+", "no_repeat_ngram_size": 3, "lora_path": "x", "max_new_tokens": 5, "do_sample": False, "num_beams": 2,
}  # fmt: skip
HARMLESS = {
    "stop_token_ids": [], "min_tokens": 0, "ignore_eos": False, "guided_json": None, "repetition_penalty": 1.0, "min_p": 0.0,
    "presence_penalty": 0, "logit_bias": {}, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"},
    "skip_special_tokens": True, "modalities": ["text"], "user": "me", "metadata": {"a": "b"}, "store": False, "top_k": -1,
    "service_tier": "auto", "parallel_tool_calls": True, "nobody_knows": 3, "do_sample": True, "num_beams": 1,
}  # fmt: skip


@pytest.mark.parametrize("endpoint", ["chat", "completions", "score"])
def test_known_fields_are_refused_by_name_unless_they_change_nothing(calls, endpoint):
    for name, value in OTHER_SERVERS.items():
        with pytest.raises(ApiError, match="not supported") as caught:
            calls[endpoint](**{name: value})
        assert (caught.value.status, caught.value.param) == (400, name) and name in caught.value.message
        calls[endpoint](**{name: None})
    for name, value in HARMLESS.items():
        calls[endpoint](**{name: value})


def test_fields_of_the_other_endpoint_are_refused(calls):
    for endpoint, name, value in (
        ("completions", "max_completion_tokens", 5),
        ("completions", "top_logprobs", 2),
        ("chat", "echo", True),
        ("chat", "best_of", 2),
        ("chat", "add_special_tokens", True),
        ("chat", "return_token_ids", True),
        ("chat", "logprobs_mode", "processed_logprobs"),
        ("chat", "uniforms", {"seed": 1, "rows": [0]}),
        ("score", "add_special_tokens", False),
        ("score", "stop_token_ids", [2]),
        ("score", "ignore_eos", True),
        ("score", "uniforms", {}),
    ):
        with pytest.raises(ApiError, match=name):
            calls[endpoint](**{name: value})
    for endpoint in ("chat", "completions"):
        with pytest.raises(ApiError, match="without stream"):
            calls[endpoint](stream_options={"include_usage": True})
        assert calls[endpoint](stream_options={"include_usage": True}, stream=True).include_usage
    with pytest.raises(ApiError, match="without logprobs"):
        calls["chat"](top_logprobs=2)


def test_the_start_token_can_be_left_out(calls, tokenizer):
    """Greedy then continues what transformers' tokenizer gives for the text."""
    ids = tokenizer.encode("a good")
    whole, bare = (calls["completions"](add_special_tokens=given, echo=True) for given in (True, False))
    assert whole.prompts == [[tokenizer.start, *ids]] and bare.prompts == [ids] and (whole.skip, bare.skip) == (1, 0)
    assert whole.echo == bare.echo == ["a good"]
    with pytest.raises(ApiError, match="no tokens"):
        calls["completions"](prompt="", add_special_tokens=False)
    assert calls["completions"](prompt=[7, 8], add_special_tokens=False).prompts == [[7, 8]]


def test_uniforms_are_those_of_an_iteration_and_its_rows(calls):
    """What `seed` alone means is the case of iteration 0 and rows 0, 1, ..."""
    ask = calls["completions"]
    for fields, drawn in (
        ({"seed": 5, "n": 2}, [(5, 0, 0), (5, 0, 1)]),
        ({"uniforms": {"seed": 5, "iteration": -1, "rows": [7, 3]}, "n": 2}, [(5, -1, 7), (5, -1, 3)]),
        ({"uniforms": {"rows": [2**62]}}, [(0, 0, 2**62)]),
        ({"uniforms": None, "seed": 1}, [(1, 0, 0)]),
    ):
        settings = [request.sampling for request in ask(**fields).requests]
        assert [(s.seed, s.iteration, s.row) for s in settings] == drawn
    for fields, why in (
        ({"uniforms": {"rows": [1]}, "seed": 1}, "seed has no effect beside uniforms"),
        ({"uniforms": {"rows": [1], "row": 1}}, "no 'row'"),
        ({"uniforms": {"rows": [1, 2]}}, "n = 1 integers"),
        ({"uniforms": {"rows": [True]}}, "integers"),
        ({"uniforms": {"rows": [1], "iteration": "2"}}, "iteration must be an integer"),
        ({"uniforms": [1]}, "must be an object"),
    ):
        with pytest.raises(ApiError, match=why):
            ask(**fields)


def test_what_a_rollout_asks_for_is_taken_or_refused_by_name(calls):
    ask = calls["completions"]
    s = ask(stop_token_ids=[2, 3], ignore_eos=True, logprobs=0, logprobs_mode="processed_logprobs").requests[0].sampling
    assert (s.stop_ids, s.ignore_eos, s.processed) == ((2, 3), True, True)
    assert ask(return_token_ids=True).token_ids and not ask(logprobs=1, logprobs_mode="raw_logprobs").token_ids
    for fields, why in (
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": 2}, "stop_token_ids"),
        ({"stop_token_ids": [0] * 2000}, "at most 1024"),
        ({"logprobs_mode": "raw_logits", "logprobs": 0}, "raw_logprobs, processed_logprobs, not 'raw_logits'"),
        ({"logprobs_mode": "processed_logprobs"}, "use logprobs 0"),
        ({"logprobs_mode": "processed_logprobs", "logprobs": 2}, "use logprobs 0"),
        ({"logprobs_mode": "processed_logprobs", "logprobs": 0, "echo": True}, "no echo"),
        ({"return_token_ids": True, "stream": True}, "not supported with stream"),
    ):
        with pytest.raises(ApiError, match=why):
            ask(**fields)


def test_steering_is_taken_or_refused_by_name(calls):
    for endpoint in ("chat", "completions"):
        ask = calls[endpoint]
        s = ask(
            presence_penalty=-2,
            frequency_penalty=0.5,
            repetition_penalty=1.2,
            min_p=0.1,
            logit_bias={"7": 100, "9": -1.5},
        )
        s = s.requests[0].sampling
        assert (s.steering, s.min_p) == (Steering(-2.0, 0.5, 1.2, ((7, 100.0), (9, -1.5))), 0.1)
        nothing = dict(presence_penalty=0, frequency_penalty=None, repetition_penalty=1, min_p=0, logit_bias={})
        s = ask(**nothing).requests[0].sampling
        assert s.steering is None and s.min_p == 0
        for name, values in (
            ("presence_penalty", (2.1, -3, "x")),
            ("frequency_penalty", (-2.5,)),
            ("repetition_penalty", (0, -1)),
            ("min_p", (-0.1, 1.1)),
            (
                "logit_bias",
                ({"x": 1}, {"-1": 1}, {"320": 1}, {"7": 101}, {"7": "a"}, {"7": True}, {" 7": 1}, [1], {"9" * 30: 1}),
            ),
        ):
            for value in values:
                with pytest.raises(ApiError) as caught:
                    ask(**{name: value})
                assert (caught.value.status, caught.value.param) == (400, name) and name in caught.value.message
    with pytest.raises(ApiError, match="at most 1024"):
        ask(logit_bias={str(i): 1 for i in range(1025)})
    steered = {"presence_penalty": 1, "repetition_penalty": 2, "min_p": 0.1, "logit_bias": {"7": 1}}
    for name, value in (steered | {"response_format": {"type": "json_object"}}).items():
        with pytest.raises(ApiError, match=f"{name} is not supported"):
            calls["score"](**{name: value})


def test_temperature_and_top_p_as_openai_takes_them(calls):
    """Colder than any number is the likeliest token; top_p 0 is it alone."""
    for asked, taken in ((0, 0.0), (1e-3, 1e-3), (1e-300, 1e-30), (2, 2.0)):
        assert calls["chat"](temperature=asked).requests[0].sampling.temperature == taken
    logits = torch.tensor([[3.0, 1e3, -1e4, 999.0]])
    for how in ({"temperature": 1e-3}, {"temperature": 1e-300}, {"top_p": 0}):
        s = calls["chat"](**how).requests[0].sampling
        assert warp_logits(logits, s.temperature, s.top_k, s.top_p).softmax(-1).tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_tools_that_the_model_is_told_not_to_use_pass(calls):
    tools, functions = [{"type": "function", "function": {"name": "f"}}], [{"name": "f"}]
    for more in ({"tools": tools, "tool_choice": "none"}, {"functions": functions, "function_call": "none"}):
        assert calls["chat"](**more).requests
    for more in (
        {"tools": tools},
        {"tools": tools, "tool_choice": "auto"},
        {"functions": functions, "function_call": None},
    ):
        with pytest.raises(ApiError, match='leave them out, or send .* "none"'):
            calls["chat"](**more)


# ---- numbers


def test_minus_one_turns_top_k_off_as_zero_does(calls):
    for endpoint in ("chat", "completions"):
        assert [calls[endpoint](top_k=k).requests[0].sampling.top_k for k in (-1, 0, 5, None)] == [0, 0, 5, 0]
        with pytest.raises(ApiError, match="top_k must be at least -1, not -2"):
            calls[endpoint](top_k=-2)


@given(
    st.sampled_from([int, float]),
    st.none() | st.integers(-5, 5),
    st.none() | st.integers(6, 9),
    st.integers() | st.floats() | st.booleans() | st.text(max_size=3) | st.lists(st.none(), max_size=1),
)
def test_a_number_is_taken_or_the_message_says_why_not(kind, low, high, value):
    """Never the word None, always both numbers; true is no number, and an integer may stand for a float."""
    fits = type(value) is kind or kind is float and type(value) is int and abs(value) < 2**63
    if fits and math.isfinite(value) and (low is None or low <= value) and (high is None or value <= high):
        assert take({"x": value}, "x", kind, None, low, high) == value
        return
    with pytest.raises(ApiError) as caught:
        take({"x": value}, "x", kind, None, low, high)
    assert (
        caught.value.status == 400
        and "None" not in caught.value.message
        and caught.value.message.startswith("x must be")
    )
    if fits and math.isfinite(value):
        assert str(low if low is not None and value < low else high) in caught.value.message


# ---- messages


@pytest.mark.parametrize(
    "message, says",
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tool_calls.*content must be a text"),
        ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, "function_call"),
        ({"role": "tool", "content": "4", "tool_call_id": "1"}, "tool_call_id"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "audio"),
        ({"role": "user", "content": None}, r"messages\[1\].content must be a text"),
        ({"role": "user"}, r"messages\[1\].content must be a text"),
        ({"role": "assistant", "content": 3}, r"messages\[1\].content must be a text"),
        ({"role": "user", "content": {"text": "x"}}, r"messages\[1\].content must be a text"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            r"messages\[1\].content has parts",
        ),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, r"messages\[1\].content must be a text"),
        ({"role": "user", "content": ["x"]}, r"messages\[1\].content has parts"),
        ({"role": "user", "content": "\ud83d"}, r"messages\[1\].content holds half a surrogate pair"),
        ({"role": None, "content": "x"}, r"messages\[1\].role must be a text"),
        ({"content": "x"}, r"messages\[1\].role must be a text"),
        ("x", r"messages\[1\] must be an object"),
    ],
)
def test_the_message_at_fault_is_named(message, says):
    with pytest.raises(ApiError, match=says) as caught:
        messages_of({"messages": [*HELLO, message]})
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_null_fields_of_a_message_are_none():
    nothing = {
        "role": "assistant",
        "content": "x",
        "tool_calls": None,
        "function_call": None,
        "refusal": None,
        "audio": None,
    }
    assert (
        messages_of({"messages": [nothing, nothing | {"tool_calls": []}]})
        == [{"role": "assistant", "content": "x"}] * 2
    )


def test_an_assistants_turn_without_words_is_empty():
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        assert messages_of({"messages": [message]}) == [{"role": "assistant", "content": ""}]


def test_an_answer_that_is_begun_is_continued(calls, tokenizer):
    """Its tokens stand behind the template's opening, as a policy would have written them; spaces around it may stay."""
    opening = calls["chat"]().prompts[0]
    for words in ("The film is", "good", "a\n b "):
        (request,) = calls["chat"](messages=[*HELLO, {"role": "assistant", "content": words}]).requests
        assert request.prompt == opening + tokenizer.encode(words, "text") and not request.sampling.strip
    for nothing in ("", None, " "):  # there is nothing to continue
        (request,) = calls["chat"](messages=[*HELLO, {"role": "assistant", "content": nothing}]).requests
        assert request.prompt == opening and request.sampling.strip
    begins = [*HELLO, {"role": "assistant", "content": "The"}]
    for name, value in (("continue_final_message", True), ("add_generation_prompt", False)):  # vLLM's
        assert calls["chat"](messages=begins, **{name: value}).prompts[0] == opening + tokenizer.encode("The", "text")
    for more in ({"messages": begins}, {"messages": begins, "response": " film"}):  # of /v1/score and /v1/tokens
        assert prompt_of(more, tokenizer, Chat(tokenizer)) == opening + tokenizer.encode("The", "text")
    trimming = "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content|trim + '<|im_end|>' }}{% endfor %}"
    trimming += "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
    chat = Chat(tokenizer, trimming)
    assert chat.begin(HELLO, " The film ") == chat.render(HELLO, True) + tokenizer.encode("The film", "text")
    hiding = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(ValueError, match="does not show"):
        Chat(tokenizer, hiding).begin(HELLO, "The film")


# ---- bodies


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 250_000, b'{"a":' * 40_000, b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"9" * 250_000,
        b'{"seed": ' + b"9" * 10_000 + b"}", b"\xff\xfe", b'{"a": 1', b"null", b'"x"', b"", b"{}}",
    ],
)  # fmt: skip
def test_a_body_that_is_no_object_is_400(raw):
    with pytest.raises(ApiError, match="JSON") as caught:
        protocol.parse_body(raw)
    assert caught.value.status == 400


def test_deep_and_huge_values_inside_a_body_are_refused_by_name(calls):
    deep = json.loads("[" * 900 + "]" * 900)
    for name, value in (
        ("seed", 2**70), ("max_tokens", 10**300), ("temperature", 10**300), ("n", 2**64), ("top_k", -(10**40)), ("stop", deep),
        ("temperature", math.inf), ("logprobs", 10**30),
    ):  # fmt: skip
        with pytest.raises(ApiError, match=name):
            calls["completions"](**{name: value})
    for prompt in (deep, [[deep]], [10**300], [[1, -(2**70)]], [[1.0]], [True], [None], {}, 3, [[]], []):
        with pytest.raises(ApiError, match="prompt|token ids"):
            calls["completions"](prompt=prompt)
