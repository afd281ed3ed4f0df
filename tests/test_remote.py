"""The other side of the sampler's wall: real serve.py processes give the rollouts that the policy itself would give."""

import concurrent.futures
import contextlib
import copy
import http.client
import http.server
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_server
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_rollout import moved
from test_resume import wait_for
from tiny import TIMEOUT, lines
from tiny_server import serving

import serve
import train_ppo
from model.generate import Sampling, generate
from model.half import to_sample_with
from rlhf.infra import checkpoint, optim
from rlhf.infra.client import Lines, Lost, Refused, Server
from rlhf.infra.distributed import Dist
from rlhf.lm.pretrained import open_pretrained
from rlhf.lm.trunks import LoRA
from rlhf.ppo.remote import KEY, Room, Servers, answers, questions
from rlhf.ppo.roles import CRITICS, LAYOUTS, Roles
from rlhf.ppo.rollout import OwnSampler
from rlhf.serve.scheduler import Scheduler
from rlhf.serve.weights import Weights, own

pytestmark = pytest.mark.bits

SECRET, RESPONSE, TEMPERATURE = "secret", 30, 0.7
AUTH = {"Authorization": f"Bearer {SECRET}"}
OPTIONS = ("--max_batch=8", "--cache_tokens=1024", "--weights_dir=room")


@pytest.fixture(scope="module", autouse=True)
def key():
    before = os.environ.get(KEY)
    os.environ[KEY] = SECRET
    yield
    os.environ.pop(KEY) if before is None else os.environ.update({KEY: before})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny_server.build(tmp_path_factory.mktemp("remote"))


@pytest.fixture(scope="module")
def server(home):
    with serving(home, "--workers=2", *OPTIONS, env={KEY: SECRET}) as server:
        yield server


def workers_of(server) -> list[int]:
    return [int(x) for x in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()]


def roles_of(home, layout: str, dtype=torch.float32, sampler=True) -> Roles:
    """A policy that is no longer its reference."""
    base = open_pretrained(home / "lm").model.eval()
    roles = LAYOUTS[layout](base, CRITICS[layout], TEMPERATURE, LoRA(3, 6.0), 1).stored_in(dtype, sampler)
    return roles


def move(roles: Roles, by: float = 0.02) -> None:
    moved(torch.nn.ParameterList(x for x in roles.policy.parameters() if x.requires_grad), by)


def sampling_of(home) -> Sampling:
    opened = open_pretrained(home / "lm")
    return Sampling(RESPONSE, opened.stop_ids, opened.tokenizer.pad, TEMPERATURE)


def servers_of(home, urls, model, room="room", longest=6, patience=60.0, push=None, **changes) -> Servers:
    opened = open_pretrained(home / "lm")
    config = {"kind": "lm", "model": opened.model.config.stored(), "tokenizer": opened.tokenizer.fingerprint} | changes
    config |= {"stop_ids": opened.stop_ids}
    place = Room(home / room, config, [opened.tokenizer.path], hf=push is not None)
    return Servers(urls, model, sampling_of(home), 5, place, longest, patience, Dist(), push, group=2)


def asked(rows: int = 20):
    """Ragged prompts, of which neighbours may be the same, and ids as rank 1 of 2 has them."""
    generator = torch.Generator().manual_seed(rows)
    prompts = torch.randint(3, 300, (rows, 6), generator=generator)
    prompts[1::4] = prompts[::4]
    lengths = torch.arange(rows) // 2 % 6 + 1
    return prompts, lengths, 2 * torch.arange(rows) + 1


def assert_same_rollouts(ours, theirs) -> None:
    for name in ("tokens", "lengths", "prompt_lengths", "mask", "finished"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert float((ours.logprobs - theirs.logprobs).abs().max()) < 2e-5 and ours.logprobs.dtype == theirs.logprobs.dtype


# ---- what arrives


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_that_arrive_are_those_of_the_built_in_copy(home, tmp_path, layout, dtype, monkeypatch):
    """To the bit, where a rollout in half precision merges adapters and rounds; float32 samples by unmerged ones."""
    monkeypatch.setattr("model.half.LARGEST", -1)  # without panels, whose numbers nobody can read
    roles, remote = roles_of(home, layout, dtype), roles_of(home, layout, dtype, sampler=False)
    assert remote.half is None
    opened = open_pretrained(home / "lm")
    own(opened.model)
    model = to_sample_with(opened.model, dtype)
    scheduler = Scheduler(model, opened.tokenizer, opened.stop_ids, 2, 32, 4, lambda events: None)
    weights = Weights(scheduler, opened.tokenizer.fingerprint, "", tmp_path)
    config = {"kind": "lm", "model": model.config.stored(), "tokenizer": opened.tokenizer.fingerprint}
    room = Room(tmp_path, config, [opened.tokenizer.path])
    for number in (1, 2):
        for one in (roles, remote):
            move(one)
        found, sha256 = room.lay(remote.policy.model)
        assert found == number and weights.load(str(room.place(number)), sha256) == sha256
        mine = roles.sampler()
        for name, x in model.state_dict().items():
            y = dict(mine.named_parameters(remove_duplicate=False))[name]
            if layout == "adapters" and dtype == torch.float32 and name.removesuffix(".weight") in lora_names(mine):
                y = mine.get_submodule(name.removesuffix(".weight")).merged("policy")
            assert x.dtype == y.dtype and torch.equal(x, y), name
    assert sorted(x.name for x in tmp_path.iterdir()) == ["weights_000001", "weights_000002"]
    room.keep(2)
    assert [x.name for x in tmp_path.iterdir()] == ["weights_000002"]
    assert not torch.equal(model.embed_tokens.weight, open_pretrained(home / "lm").model.lm_head.weight)


def lora_names(model) -> set[str]:
    return {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


def test_a_servers_file_is_never_written_to(home):
    opened = open_pretrained(home / "lm")
    before = checkpoint.load(home / "lm").digest
    own(opened.model)
    moved(opened.model, 1.0)
    assert checkpoint.verify(home / "lm").digest == before


def test_a_reward_on_the_served_trunk_keeps_it_when_others_are_served(home):
    device, opened = torch.device("cpu"), open_pretrained(home / "lm")
    init = str(home / "lm")
    assert serve.under_reward(serve.Config(init), device, opened) is opened
    under = serve.under_reward(serve.Config(init, weights_dir="room"), device, opened)
    before = copy.deepcopy(under.model.state_dict())
    own(opened.model)
    moved(opened.model, 1.0)
    assert all(torch.equal(x, before[name]) for name, x in under.model.state_dict().items())


# ---- the same rollouts


@pytest.mark.parametrize("layout", ["shared", "adapters", "branch"])
def test_rollouts_are_those_of_the_policy_itself(home, server, layout):
    """Over three updates, for rows that share prompts; and one of the two workers is killed while they answer."""
    roles = roles_of(home, layout)
    ours = OwnSampler(roles, sampling_of(home), 5, optim.amp(torch.device("cpu")), Dist(), "fp32")
    theirs = servers_of(home, (server.url, server.url + "/v1"), roles.policy.model)
    assert theirs.precision == "fp32" and theirs.threads == 16  # 32 texts, of which two have the same prompt
    seen = []
    for iteration in (0, 1, -1):
        move(roles)
        theirs.refresh()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(theirs, *asked(), iteration)
            if iteration == 1:
                while not server.request("/health")[2]["running"] and not future.done():
                    pass
                os.kill(workers_of(server)[0], signal.SIGKILL)
            found = future.result()
        assert_same_rollouts(ours(*asked(), iteration), found)
        seen.append(found.tokens)
    assert not any(torch.equal(a, b) for a, b in zip(seen, seen[1:]))
    assert len(list((home / "room").iterdir())) == 1  # what was before is gone
    assert len(workers_of(server)) == 2


def test_other_weights_are_noticed_and_the_right_ones_given_again(home, server):
    """Somebody else gives the server others; it was started again; its worker comes up late: all show in the answer."""
    roles = roles_of(home, "shared")
    ours = OwnSampler(roles, sampling_of(home), 5, optim.amp(torch.device("cpu")), Dist(), "fp32")
    theirs = servers_of(home, (server.url,), roles.policy.model)
    move(roles, 0.03)
    theirs.refresh()
    moved_lm = open_pretrained(home / "lm")
    config = {"kind": "lm", "model": moved_lm.model.config.stored(), "tokenizer": moved_lm.tokenizer.fingerprint}
    tensors = moved(copy.deepcopy(moved_lm.model), 0.5).state_dict()
    checkpoint.save(home / "room" / "strange", tensors, config, files=[moved_lm.tokenizer.path])
    status, _, told = server.request("/v1/weights", {"path": "strange"}, **AUTH)
    assert status == 200 and told == {"sha256": checkpoint.load(home / "room" / "strange").digest, "workers": 2}
    assert server.request("/v1/weights", **AUTH)[2]["sha256"] == told["sha256"] != theirs.sha256
    assert_same_rollouts(ours(*asked(), 2), theirs(*asked(), 2))
    assert server.request("/v1/weights", **AUTH)[2]["sha256"] == theirs.sha256
    checkpoint.remove([home / "room" / "strange"])


def test_workers_that_come_later_begin_with_the_newest_weights(home, server):
    """All that are there have been killed; nobody gives the weights again."""
    theirs = servers_of(home, (server.url,), moved(open_pretrained(home / "lm").model, 0.1))
    theirs.refresh()
    first = workers_of(server)
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    seen, body = set(), {"prompt": [5, 6], "max_tokens": 2}
    while len(seen) < 20:
        with contextlib.suppress(OSError, http.client.HTTPException):  # those that were connected to one that died
            status, _, told = server.request("/v1/completions", body, **AUTH)
            assert status == 200 and told["system_fingerprint"] == theirs.sha256[:16]
            seen.add(told["id"])
    assert len(workers_of(server)) == 2 and not {*first} & {*workers_of(server)}


# ---- POST /v1/weights


def test_what_is_no_weight_of_this_model_changes_nothing(home, server, tmp_path):
    before = server.request("/v1/weights", **AUTH)[2]["sha256"]
    opened = open_pretrained(home / "lm")
    tensors = opened.model.state_dict()
    good = {"kind": "lm", "model": opened.model.config.stored(), "tokenizer": opened.tokenizer.fingerprint}

    def lay(name: str, tensors=tensors, **config) -> dict:
        checkpoint.save(home / "room" / name, tensors, good | config, files=[opened.tokenizer.path])
        return {"path": name}

    damaged = lay("damaged")
    with open(home / "room" / "damaged" / "model.safetensors", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\1\2\3\4")
    (home / "room" / "out").symlink_to(home / "lm")
    (home / "room" / "circle").symlink_to(home / "room" / "circle")
    wrong = {name: torch.full_like(x, torch.nan) if name == "norm.weight" else x for name, x in tensors.items()}
    fewer = {name: x for name, x in tensors.items() if name != "norm.weight"}
    for body, why in (
        (damaged, "damaged"),
        (lay("nan", wrong), "norm.weight holds nan"),
        (lay("fewer", fewer), "norm.weight, missing there"),
        (lay("eps", model=good["model"] | {"norm_eps": 1e-3}), "norm_eps is 0.001, not 1e-05"),
        (lay("wider", model=good["model"] | {"layers": 3}), "layers is 3, not 2"),
        (lay("tokens", tokenizer="0" * 64), "other tokens"),
        (lay("kind", kind="reward"), "no checkpoint of a whole language model"),
        (lay("right") | {"sha256": "0" * 64}, "000000000000 were asked for"),
        ({"path": "out"}, "not inside"),
        ({"path": str(home / "lm")}, "not inside"),
        ({"path": "../lm"}, "not inside"),
        ({"path": "circle"}, "not inside"),
        ({"path": "."}, "not inside"),
        ({"path": "\0"}, "not inside"),
        ({"path": "nowhere"}, "no checkpoint at nowhere"),
        ({"path": ""}, "path must be"),
        ({"path": 7}, "path must be"),
        ({}, "path must be"),
    ):
        status, _, told = server.request("/v1/weights", body, **AUTH)
        assert status == 400 and why in told["error"]["message"] and "\n" not in told["error"]["message"], (body, told)
        assert server.request("/v1/weights", **AUTH)[2]["sha256"] == before
    for body, headers in (({"path": "right"}, {}), ({"path": "right"}, {"Authorization": "Bearer x"}), (None, {})):
        assert server.request("/v1/weights", body, **headers)[0] == 401
    for name in ("damaged", "nan", "fewer", "eps", "wider", "tokens", "kind", "right", "out", "circle"):
        checkpoint.remove([home / "room" / name])


@pytest.mark.slow
def test_without_a_key_or_a_directory_no_weights_are_taken(home):
    process = tiny_server.start("--init=lm", "--port=0", "--weights_dir=room", cwd=home)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2 and err.count("\n") == 1 and "give a key with --key" in err
    with serving(home, "--max_batch=2", "--cache_tokens=512", env={KEY: SECRET}) as plain:
        for body in ({"path": "x"}, None):
            status, _, told = plain.request("/v1/weights", body, **AUTH)
            assert status == 403 and "--weights_dir" in told["error"]["message"]
        with pytest.raises(ValueError, match=f"--sampler: {plain.url}/v1/weights answers 403.*--weights_dir"):
            servers_of(home, (plain.url,), open_pretrained(home / "lm").model)


# ---- who is asked, and what they may say


class Stranger(http.server.BaseHTTPRequestHandler):
    """Another server: it knows no /v1/weights."""

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *args):
        pass


def test_the_wrong_server_is_refused_before_the_first_rollout(home, server, tmp_path):
    model = open_pretrained(home / "lm").model
    stranger = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=stranger.serve_forever, daemon=True).start()
    other = tiny_server.build(tmp_path, seed=3, layers=1)
    with serving(other, *OPTIONS, env={KEY: SECRET}) as wrong:
        for urls, changes, why in (
            (("http://127.0.0.1:9",), {}, "http://127.0.0.1:9 does not answer .ConnectionRefused"),
            ((server.url, "http://127.0.0.1:9"), {}, "http://127.0.0.1:9 does not answer"),
            ((f"http://127.0.0.1:{stranger.server_port}",), {}, "answers 404.*it is no serve.py"),
            ((wrong.url,), {}, "another model than --init: layers 1 for 2"),
            ((server.url,), {"tokenizer": "0" * 64}, "another tokenizer"),
            ((server.url,), {"room": "elsewhere"}, "takes weights from .*/room.*--weights_dir=.*/elsewhere"),
            ((server.url,), {"longest": 99}, "room for 128 tokens and answers of 128; this run needs 129 and 30"),
            (("ftp://x",), {}, "not of the form"),
            (("http://a:b@x",), {}, "--sampler: http://a:b@x is not of the form"),
            (("http://:b@x",), {}, "not of the form"),
            (("http://a machine:80",), {}, "not of the form"),
            (("http://x\x7f",), {}, "not of the form"),
            (("http://x/#here",), {}, "not of the form"),
            (("http://x:y",), {}, "is no URL"),
        ):
            with pytest.raises(ValueError, match=why) as caught:
                servers_of(home, urls, model, **changes)
            assert "\n" not in str(caught.value)
    stranger.shutdown()
    os.environ[KEY] = "another"
    with pytest.raises(ValueError, match="answers 401.*a key is needed"):
        servers_of(home, (server.url,), model)
    os.environ[KEY] = SECRET


class Other(http.server.BaseHTTPRequestHandler):
    """A server of another house, in vLLM's dialect: its own random numbers, no fingerprint, weights by a way of its own."""

    home: Path
    opened = None
    seeds: list[int]

    def answer(self, told: dict, status: int = 200) -> None:
        content = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        models = {"object": "list", "data": [{"id": "other", "max_model_len": 128}, {"id": "other:reference"}]}
        self.answer(models if self.path == "/v1/models" else {}, 200 if self.path == "/v1/models" else 404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/reload":
            type(self).opened = open_pretrained(body["path"])
            return self.answer({})
        assert body["model"] == "other" and body["ignore_eos"] and not {"uniforms", "logprobs_mode"} & body.keys()
        # what vLLM takes from generation_config.json where it is not given
        off = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
        assert off.items() <= body.items() and {"temperature", "top_p"} <= body.keys()
        self.seeds.append(body["seed"])
        n, prompt = body["n"], torch.tensor([body["prompt"]])
        sampling = Sampling(body["max_tokens"], body["stop_token_ids"], 0, body["temperature"], top_p=body["top_p"])
        uniforms = torch.rand(n, body["max_tokens"], generator=torch.Generator().manual_seed(body["seed"])).double()
        out = generate(self.opened.model, prompt, torch.tensor([len(body["prompt"])]), sampling, uniforms)
        choices = [
            {"index": i, "finish_reason": "stop" if out.finished[i] else "length", "text": "", "stop_reason": None}
            | {"token_ids": out.tokens[i][out.mask[i]].tolist()}
            | {"logprobs": {"token_logprobs": out.logprobs[i][out.mask[i]].tolist()}}
            for i in range(n)
        ]
        self.answer({"choices": choices, "system_fingerprint": None})

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_servers_of_others_are_given_weights_by_a_function(home):
    """Tokens differ from the built-in sampler's, and no two questions have the same seed; but what is said of every token is
    what the policy says."""
    Other.home, Other.seeds = home, []
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    url, pushed = f"http://127.0.0.1:{other.server_port}", []

    def push(where: str, directory: str) -> None:
        pushed.append((where, directory))
        Server(where, None).ask("POST", "/reload", {"path": directory}, time.monotonic() + 300, Lines())

    roles = roles_of(home, "adapters")
    servers = servers_of(home, (url,), roles.policy.model, room="others", push=push)
    assert servers.precision == "bf16"
    for iteration in range(2):
        move(roles)
        servers.refresh()
        found = servers(*asked(), iteration)
        with torch.no_grad():
            said = roles.policy(found.tokens, found.mask).logprobs
        assert float((said - found.logprobs).abs().max()) < 1e-4
    assert [where for where, _ in pushed] == [url] * 2 and len(set(Other.seeds)) == len(Other.seeds) == 2 * 15
    assert (home / "others").is_dir() and len(list((home / "others").iterdir())) == 1

    def wrong(where: str, directory: str) -> None:
        raise KeyError("weights")

    broken = servers_of(home, (url,), roles.policy.model, room="others", push=wrong)
    with pytest.raises(ValueError, match=f"--sampler_push failed for {url} .KeyError: 'weights'"):
        broken.refresh()
    with pytest.raises(ValueError, match="room for 128 tokens; this run needs 130"):
        servers_of(home, (url,), roles.policy.model, longest=100, push=push)
    other.shutdown()


GOOD = {"index": 0, "finish_reason": "length", "token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0, 0.0]}}


@pytest.mark.parametrize(
    "change, why",
    [
        ({}, None),
        ({"finish_reason": "stop", "token_ids": [5, 2]}, None),
        ({"finish_reason": "length", "token_ids": [5, 2]}, None),
        ({"finish_reason": "stop", "token_ids": [2], "logprobs": {"token_logprobs": [-3]}}, None),
        ({"index": 1}, "1 choices, not the 1 asked for in order"),
        ({"token_ids": None}, "without token_ids"),
        ({"logprobs": None}, "without token_ids or token_logprobs"),
        ({"token_ids": []}, "no 1 to 2 token ids below 9"),
        ({"token_ids": [5, 6, 7]}, "no 1 to 2 token ids"),
        ({"token_ids": [5, 9]}, "no 1 to 2 token ids below 9"),
        ({"token_ids": [5, -1]}, "no 1 to 2 token ids below 9"),
        ({"token_ids": [5, True]}, "no 1 to 2 token ids below 9"),
        ({"logprobs": {"token_logprobs": [-1.0]}}, "for 2 tokens"),
        ({"logprobs": {"token_logprobs": [-1.0, None]}}, "log-probs"),
        ({"logprobs": {"token_logprobs": [-1.0, float("nan")]}}, "log-probs"),
        ({"logprobs": {"token_logprobs": [-1.0, float("-inf")]}}, "log-probs"),
        ({"logprobs": {"token_logprobs": [-1.0, 0.5]}}, "log-probs"),
        ({"token_ids": [2, 5]}, "after one that ends"),
        ({"token_ids": [2], "logprobs": {"token_logprobs": [-3]}}, "finish_reason 'length' after token 2"),
        ({"finish_reason": "stop"}, "finish_reason 'stop' after token 6"),
    ],
)
def test_an_answer_is_checked(change, why):
    told = {"choices": [GOOD | change]}
    if why is None:
        (answer,) = answers(told, 1, 2, 9, [2], "http://x")
        assert answer.ids == told["choices"][0]["token_ids"] and answer.finished == (answer.ids[-1] == 2)
        return
    with pytest.raises(ValueError, match=f"--sampler=http://x gave .*{why}"):
        answers(told, 1, 2, 9, [2], "http://x")
    with pytest.raises(Lost, match="http://x gave 2 of 3 tokens: .*--timeout") as caught:
        answers({"choices": [GOOD]}, 1, 3, 9, [2], "http://x")
    assert caught.value.failed
    for broken in ({}, {"choices": 5}, {"choices": [5]}, {"choices": []}):
        with pytest.raises(ValueError, match="choices"):
            answers(broken, 1, 2, 9, [2], "http://x")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, "token_logprobs"]), inner),
    max_leaves=6,
)
choices = st.fixed_dictionaries(
    {},
    optional={
        "index": st.sampled_from([0, 0, 1]) | anything,
        "finish_reason": st.sampled_from(["stop", "length"]) | anything,
        "token_ids": st.lists(st.integers(0, 9), max_size=3) | anything,
        "logprobs": st.fixed_dictionaries({"token_logprobs": st.lists(st.floats(-9, 0), max_size=3)}) | anything,
    },
)


@given(st.fixed_dictionaries({"choices": st.lists(choices | anything, min_size=1, max_size=2) | anything}))
def test_whatever_a_server_says_is_a_response_or_refused(told):
    try:
        (answer,) = answers(told, 1, 2, 9, [2], "http://x")
    except (ValueError, Lost) as error:
        assert "http://x gave " in str(error) and len(str(error)) < 300
        return
    assert 1 <= len(answer.ids) == len(answer.logprobs) <= 2 and {*answer.ids} <= {*range(9)}
    assert answer.finished == (2 in answer.ids) == (answer.ids[-1] == 2) and (answer.finished or len(answer.ids) == 2)


def test_neighbours_with_one_prompt_are_one_question():
    prompts = torch.tensor([[3, 4, 9], [3, 4, 8], [3, 4, 8], [5, 0, 0], [3, 4, 0]])
    found = questions(prompts, torch.tensor([2, 2, 3, 1, 2]), torch.tensor([0, 2, 4, 6, 8]), most=9)
    assert [(q.first, q.prompt, q.ids) for q in found] == [
        (0, [3, 4], [0, 2]),
        (2, [3, 4, 8], [4]),
        (3, [5], [6]),
        (4, [3, 4], [8]),
    ]
    assert [q.ids for q in questions(prompts[:2], torch.tensor([2, 2]), torch.tensor([0, 1]), most=1)] == [[0], [1]]


class Broken(http.server.BaseHTTPRequestHandler):
    """What a server may do to a client; the path says which."""

    def do_GET(self):
        kind = self.path.strip("/")
        if kind == "reset":
            self.connection.shutdown(2)
            return
        content = {"no_json": b"{", "a_list": b"[]"}.get(kind, b"{}")
        self.send_response({"full": 503, "failed": 500, "bad": 400}.get(kind, 200))
        self.send_header("Content-Length", str(len(content) + 5 * (kind == "short")))
        self.end_headers()
        self.wfile.write(content)
        if kind == "slow":
            self.wfile.flush()
        self.close_connection = True

    def log_message(self, *args):
        pass


def test_every_way_not_to_answer_is_lost_and_may_be_tried_again():
    broken = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    broken.handle_error = lambda *request: None  # a client that has left
    threading.Thread(target=broken.serve_forever, daemon=True).start()
    server = Server(f"http://127.0.0.1:{broken.server_port}/", None)

    def ask(kind: str):
        return server.ask("GET", f"/{kind}", None, time.monotonic() + 300, Lines())

    assert ask("good") == {}
    for kind in ("reset", "no_json", "a_list", "full", "failed", "short"):
        with pytest.raises(Lost) as caught:
            ask(kind)
        assert caught.value.failed == (kind == "failed"), kind
    with pytest.raises(Refused, match="answers 400"):
        ask("bad")
    with pytest.raises(Lost, match="TimeoutError|timed out"):
        server.ask("GET", "/good", None, time.monotonic() - 1, Lines())
    ended = Lines()
    ended.end()
    with pytest.raises(Lost, match="ended"):
        server.ask("GET", "/good", None, time.monotonic() + 300, ended)
    broken.shutdown()


def test_ranks_wait_longer_for_each_other_than_for_the_servers(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAIN_RLHF_TIMEOUT", "50")
    cfg = train_ppo.Config("lm", "rm", str(tmp_path), sampler=("http://x",), sampler_timeout=50.0)
    stored = {"model": {}, "tokenizer": "", "stop_ids": []}
    with pytest.raises(ValueError, match="sampler_timeout=50 is not below PLAIN_RLHF_TIMEOUT=50"):
        train_ppo.sampler_of(cfg, None, None, SimpleNamespace(world=2), None, 6, stored, [])


@pytest.mark.parametrize("key", ["se\r", "se\ncret", "sécret", "se\0"])
def test_a_key_that_no_header_holds_is_not_shown(key):
    with pytest.raises(ValueError, match="the key for http://x has a character") as caught:
        Server("http://x", key)
    assert "se\x00" not in str(caught.value) and "cret" not in str(caught.value) and "\n" not in str(caught.value)


class Hangs(http.server.BaseHTTPRequestHandler):
    """Says what another server says, and then never answers."""

    told: bytes
    over: threading.Event

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.told)))
        self.end_headers()
        self.wfile.write(self.told)

    def do_POST(self):
        self.over.wait()

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_one_server_that_hangs_leaves_time_for_the_others(home, server):
    Hangs.told, Hangs.over = json.dumps(server.request("/v1/weights", **AUTH)[2]).encode(), threading.Event()
    hanging = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hangs)
    threading.Thread(target=hanging.serve_forever, daemon=True).start()
    roles = roles_of(home, "shared")
    ours = OwnSampler(roles, sampling_of(home), 5, optim.amp(torch.device("cpu")), Dist(), "fp32")
    urls = (f"http://127.0.0.1:{hanging.server_port}", server.url)
    theirs = servers_of(home, urls, roles.policy.model, patience=16.0)
    move(roles)
    theirs.refresh()
    assert_same_rollouts(ours(*asked(), 0), theirs(*asked(), 0))
    Hangs.over.set()
    hanging.shutdown()


# ---- whole runs


def numbers(run: Path) -> list[dict]:
    """metrics.jsonl without the clock, and without the last bits of the sampler's own log-probs."""
    rows = lines(run / "metrics.jsonl")
    assert all(row["rollout/logprob_diff_max"] < 1e-4 for row in rows)
    left_out = ("time/", "perf/", "rollout/")
    return [{name: x for name, x in row.items() if not name.startswith(left_out)} for row in rows]


RUN = {
    "iterations": 6,
    "samples_per_prompt": 2,
    "judge": "rm",
    "judge_every": 2,
    "judge_prompts": 5,
    "prompt_tokens": 12,
    "sources": "",
    "minibatches": 2,
}
SERVE = ("--workers=2", "--max_batch=4", "--cache_tokens=512")


def remote(world, server, out, **changes):
    options = RUN | {"out": out, "sampler": server.url, "sampler_timeout": 60} | changes
    return world.command("train_ppo.py", **options)


@pytest.fixture(scope="module")
def plain(world) -> Path:
    """The run that needs no server."""
    world.ok("train_ppo.py", out="plain", **RUN)
    return world.path / "plain"


@pytest.mark.slow
def test_ppo_by_servers_is_ppo(world, plain):
    """The same tokens over all iterations and judgements, so the same metrics and weights; a worker is killed in the middle."""
    with serving(
        world.path, *SERVE, f"--weights_dir={world.path / 'away' / 'sampler'}", env={KEY: SECRET}, says="no chat"
    ) as server:
        running = world.start(remote(world, server, "away"), {KEY: SECRET})
        metrics = world.path / "away" / "metrics.jsonl"
        wait_for(lambda: len(lines(metrics)) >= 2, running.process.is_alive)
        os.kill(workers_of(server)[1], signal.SIGKILL)
        done = running.wait()
        assert (done.code, done.err) == (0, ""), done
        assert numbers(world.path / "away") == numbers(plain)
        theirs, ours = (checkpoint.load(run).tensors for run in (world.path / "away", plain))
        assert all(torch.equal(theirs[name], x) for name, x in ours.items())
        assert server.request("/v1/weights", **AUTH)[2]["sha256"] != checkpoint.load(world.path / "lm").digest

        # two ranks, each for its own rows; and with shards
        for out, more in (("two", {}), ("cut", {"shard": "true"})):
            room = world.path / "away" / "sampler" / out
            done = world.together(remote(world, server, out, sampler_dir=room, **more), 2, {KEY: SECRET})
            assert done.code == 0, done
            for ours, theirs in zip(numbers(plain), numbers(world.path / out), strict=True):
                for name, x in ours.items():
                    assert theirs[name] == pytest.approx(x, rel=1e-3, abs=1e-4, nan_ok=True), name


@pytest.mark.slow
def test_a_run_whose_server_ends_says_so_and_goes_on_with_another(world, plain):
    options = (*SERVE, f"--weights_dir={world.path / 'gone' / 'sampler'}")
    process = tiny_server.start("--init=lm", "--port=0", *options, cwd=world.path, env={KEY: SECRET})
    url = "http://" + process.stdout.readline().partition("http://")[2].split()[0]
    first = SimpleNamespace(url=url, process=process)
    running = world.start(remote(world, first, "gone", sampler_timeout=1), {KEY: SECRET})
    metrics = world.path / "gone" / "metrics.jsonl"
    wait_for(lambda: len(lines(metrics)) >= 3, running.process.is_alive)
    process.send_signal(signal.SIGTERM)
    done = running.wait()
    process.communicate(timeout=TIMEOUT)
    assert done.code == 2 and done.err.count("\n") == 1 and "--sampler" in done.err and url in done.err, done

    # the same command: absent at the start, it is refused in one line
    done = world.start(remote(world, first, "gone"), {KEY: SECRET}).wait()
    assert done.code == 2 and done.err.count("\n") == 1 and f"{url} does not answer" in done.err
    with serving(world.path, *options, env={KEY: SECRET}, says="no chat") as second:
        done = world.start(remote(world, second, "gone"), {KEY: SECRET}).wait()
        assert (done.code, done.err) == (0, ""), done
    assert numbers(world.path / "gone") == numbers(plain)
    json.loads((world.path / "gone" / "run.json").read_text())
