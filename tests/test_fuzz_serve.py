"""Random and malformed bodies: an answer always comes, never a 5xx but 503, and no row is lost."""

import http.client
import json
import urllib.parse

import pytest
import tiny_server
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rlhf.serve.protocol import UNSUPPORTED

pytestmark = pytest.mark.slow
PATHS = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/score",
    "/v1/tokens",
    "/v1/comparison",
    "/v1/comparison/1/vote",
    "/v1/votes/1/undo",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tiny_server.build(tmp_path_factory.mktemp("fuzzed"))
    options = (
        "--max_batch=4 --cache_tokens=256 --queue=20 --max_body=20000 --reward=reward.py:length --feedback=votes.sqlite"
    )
    with tiny_server.serving(home, *options.split()) as server:
        yield server


texts = st.text(max_size=20) | st.sampled_from(["<|im_end|>", "\x00", "\ud800", "�", "a" * 3000, "\u2581"])
numbers = st.integers(-3, 40) | st.integers() | st.floats() | st.just(2**70)
leaves = st.none() | st.booleans() | numbers | texts
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "<|im_start|>"]), "content": texts})
    | anything,
    max_size=4,
)
known = {  # to other servers: refused by name, or harmless
    name: st.sampled_from([None, 0, 1, -1, False, True, "", [], {}, "x", [3], {"a": 1}])
    for name in (*UNSUPPORTED, "guided_json", "guided_choice", "add_special_tokens", "user", "metadata")
}
plausible = {
    "model": st.just("lm"),
    "prompt": texts | st.lists(texts, max_size=3) | st.lists(st.integers(-1, 400), max_size=70) | anything,
    "messages": messages,
    "input": texts | messages | st.lists(texts, max_size=3) | st.lists(st.integers(-1, 400), max_size=70),
    "instructions": texts,
    "max_output_tokens": st.integers(0, 12),
    "include": st.lists(st.sampled_from(["message.output_text.logprobs", "x"]), max_size=2),
    "text": st.fixed_dictionaries(
        {"format": st.sampled_from([{"type": "text"}, {"type": "json_schema", "schema": {}}, {}, 3])}
    ),
    "encoding_format": st.sampled_from(["float", "base64", "x"]),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}])
    | st.builds(
        lambda schema: {"type": "json_schema", "json_schema": {"schema": schema}}, st.deferred(lambda: odd_schemas)
    ),
    "response": texts,
    "max_tokens": st.integers(0, 12),
    "n": st.integers(1, 4),
    "temperature": st.sampled_from([0, 0.01, 0.5, 1.0, 100.0]),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-2, 400),
    "min_p": st.floats(0, 1.1),
    "presence_penalty": st.floats(-2, 2.1),
    "frequency_penalty": st.floats(-2, 2.1),
    "repetition_penalty": st.floats(0, 3),
    "logit_bias": st.dictionaries(st.integers(-1, 330).map(str), st.integers(-101, 101), max_size=4),
    "add_special_tokens": st.booleans(),
    "stop": texts | st.lists(texts, max_size=5),
    "seed": st.integers(-(2**63), 2**63),
    "logprobs": st.booleans() | st.integers(0, 20),
    "top_logprobs": st.integers(0, 20),
    "echo": st.booleans(),
    "stream": st.booleans(),
    "stop_token_ids": st.lists(st.integers(-1, 400), max_size=3),
    "ignore_eos": st.booleans(),
    "return_token_ids": st.booleans(),
    "logprobs_mode": st.sampled_from(["raw_logprobs", "processed_logprobs", "x"]),
    "uniforms": st.fixed_dictionaries(
        {"rows": st.lists(st.integers(), min_size=1, max_size=2)}, optional={"seed": numbers}
    ),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "rater": texts,
    "choice": st.sampled_from(["left", "right", "tie", "up"]),
    "strength": st.integers(0, 4),
    "seconds": st.floats(),
    "nonce": texts,
    "left": st.fixed_dictionaries({"text": texts}) | anything,
    "right": st.fixed_dictionaries({"text": texts}) | anything,
    "top": st.integers(-1, 400),
}
OF = {  # fields that make an answer likely
    "/v1/completions": ["prompt"], "/v1/chat/completions": ["messages"], "/v1/score": ["prompt", "response"],
    "/v1/tokens": ["messages", "response"], "/v1/comparison/1/vote": ["rater", "choice", "nonce"],
    "/v1/votes/1/undo": ["rater"], "/v1/responses": ["input"], "/v1/embeddings": ["input"],
    "/v1/comparison": ["rater", "prompt", "left", "right"],
}  # fmt: skip
odd_schemas = (
    st.dictionaries(
        st.sampled_from(
            ["type", "properties", "items", "enum", "pattern", "required", "anyOf", "$ref", "minimum", "x"]
        ),
        st.sampled_from(
            ["object", "string", "array", "nope", "(", [], {}, {"a": {"type": "null"}}, 3, None, ["a"], "#", [{}]]
        ),
        max_size=4,
    )
    | st.booleans()
)
ROLLOUTS = {"return_token_ids", "logprobs_mode", "uniforms"}
STEERING = {"min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"}
RESPONSES = {"input", "instructions", "max_output_tokens", "include", "text", "encoding_format"}
READ = (
    {"stop_token_ids", "ignore_eos", "response_format"} | ROLLOUTS | STEERING
)  # without effect on a text that is there
FOREIGN = {
    "/v1/completions": {"messages", "top_logprobs"} | RESPONSES,
    "/v1/chat/completions": {"prompt", "echo", "add_special_tokens"} | ROLLOUTS | RESPONSES,
    "/v1/responses": {
        "prompt",
        "messages",
        "echo",
        "add_special_tokens",
        "max_tokens",
        "logprobs",
        "response_format",
        "n",
    }
    | ROLLOUTS,
    "/v1/embeddings": READ | {"prompt", "messages"},
    **dict.fromkeys(("/v1/score", "/v1/tokens"), READ | RESPONSES),
}


def bodies_of(path: str):
    """Mostly plausible ones, then fields of any kind, then fields that other servers know."""
    own = {name: one for name, one in plausible.items() if name not in FOREIGN.get(path, ())}
    needed = {name: own.pop(name) for name in OF[path]}
    return (
        st.fixed_dictionaries(needed, optional=own)
        | st.fixed_dictionaries({}, optional={name: one | anything for name, one in (own | needed).items()})
        | st.builds(
            dict.__or__,
            st.fixed_dictionaries(needed),
            st.dictionaries(st.sampled_from(list(known)), anything, max_size=2),
        )
        | st.builds(dict.__or__, st.fixed_dictionaries(needed), st.fixed_dictionaries({}, optional=known))
    )


bodies = st.sampled_from(PATHS).flatmap(bodies_of)


def surrogates_kept(value) -> bytes:
    return json.dumps(value).encode()  # NaN, Infinity and "\ud800" go out as they are


raw_bodies = (
    st.binary(max_size=50)
    | st.builds(lambda body, cut: surrogates_kept(body)[:cut], bodies, st.integers(0, 60))
    | st.sampled_from(
        [b"[" * 10_000, b"9" * 5000, b'{"prompt":' * 2000, b"x" * 30_000, b"x" * 3_000_000, b'{"n": 1e999}']
    )
    | st.builds(  # deep and long values where a text or a number belongs
        lambda name, value: b'{"%s": %s, "prompt": "a", "response": "b"}' % (name.encode(), value),
        st.sampled_from([*plausible, "nobody_knows"]),
        st.sampled_from(
            [b"[" * 900 + b"]" * 900, b'{"a":' * 900 + b"1" + b"}" * 900, b"9" * 4000, b"-1e400", b"1e-400", b"NaN"]
        )
        | st.builds(lambda c, n: json.dumps(c * n).encode(), st.characters(), st.integers(100, 1500)),
    )
)


def send(server, method: str, path: str, raw: bytes, headers: dict):
    """Status and all bytes of the answer."""
    url = urllib.parse.urlparse(server.url)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=300)  # a hang fails
    try:
        connection.request(method, path, raw, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def check(server, method, path, raw, headers=()):
    status, content = send(server, method, path, raw, dict(headers))
    assert status < 500 or status == 503, (path, raw, status, content)
    if status == 200 and content.startswith(b"data: "):
        *events, last = content.decode().strip().split("\n\n")
        assert last == "data: [DONE]" and all("error" not in json.loads(event[6:]) for event in events)
    elif status == 200 and content.startswith(b"event: "):
        kinds = [json.loads(event.split("data: ", 1)[1])["type"] for event in content.decode().strip().split("\n\n")]
        assert kinds[-1] in ("response.completed", "response.incomplete") and "error" not in kinds
    elif content:
        assert "error" in json.loads(content) if status >= 400 else json.loads(content)


def fuzz(examples):
    return settings(max_examples=examples, phases=[Phase.explicit, Phase.reuse, Phase.generate])


def idle(server):
    """Nothing runs and nothing waits, and the server answers as if nothing had been."""
    server.metric_becomes("running", 0)
    server.metric_becomes("waiting", 0)
    body = {"prompt": "a good film", "max_tokens": 5, "n": 4, "seed": 1}
    assert server.request("/v1/completions", body)[0] == 200


def test_bodies(server):
    @fuzz(300)
    @given(st.data(), st.sampled_from(PATHS[:2] * 3 + PATHS))
    def attack(data, path):
        check(server, "POST", path, data.draw(bodies_of(path).map(surrogates_kept) | raw_bodies))

    attack()
    idle(server)


def test_methods_paths_and_headers(server):
    words = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12)

    @fuzz(100)
    @given(
        st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]),
        st.sampled_from([*PATHS, "/", "/health", "/metrics", "/v1/models", "/v1/comparison", "/v1/feedback/statistics"])
        | words.map(lambda word: "/v1/" + word),
        st.dictionaries(st.sampled_from(["Origin", "Authorization", "Content-Type", "X-A"]), words, max_size=2),
    )
    def attack(method, path, headers):
        status, content = send(server, method, path, b"{}" if method != "GET" else b"", headers)
        assert status < 500, (method, path, headers, status, content)

    attack()
    idle(server)


def test_half_a_body_and_a_client_that_leaves(server):
    """Cut off in the middle of the headers, of the body, of the answer."""
    url = urllib.parse.urlparse(server.url)
    body = json.dumps({"prompt": "a", "max_tokens": 50, "n": 4, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    for sent in (head[:20], head, head + body[:10], head + body):
        for read in (0, 1):
            connection = http.client.HTTPConnection(url.hostname, url.port, timeout=300)
            connection.connect()
            connection.sock.sendall(sent)
            if read and sent == head + body:
                connection.sock.recv(read)
            connection.close()
    idle(server)
