"""A tiny model with a chat template, and `python serve.py` on it, on a free port of loopback."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from data.bpe import CONTROL, LETTERS, NORMAL, BPETokenizer
from data.tokenizer import train_sentencepiece
from model.transformer import ModelConfig, Transformer
from rlhf.infra import checkpoint

ROOT = Path(__file__).resolve().parent.parent
REWARD = "def length(prompts, responses):\n    return [float(len(response)) for response in responses]\n"


def build(path: Path, control=("<|im_start|>", "<|im_end|>"), seed: int = 1, template=None, **shape) -> Path:
    """A directory with `lm`, a checkpoint of random weights, and `reward.py`. template: of chats, on a tokenizer of bytes."""
    texts = ["a good film", "a bad film that nobody likes", "user assistant system", "the story is good or bad"] * 20
    if template is None:
        tokenizer = train_sentencepiece(texts, path / "tokenizer.model", 320, control)
    else:
        tokens, types = [*map(LETTERS.get, range(256)), "<|endoftext|>"], [NORMAL] * 256 + [CONTROL]
        tokenizer = BPETokenizer(tokens, types, [], "gpt-2", eos=256, chat_template=template)
        tokenizer.save(path)
    shape = {"width": 32, "layers": 2, "heads": 2} | shape
    model = Transformer(ModelConfig(320, context=128, tied=False, **shape))
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.embed_tokens.weight.mul_(30)
        model.lm_head.weight.mul_(15)  # far from uniform
    config = {"kind": "lm", "model": asdict(model.config), "tokenizer": tokenizer.fingerprint}
    checkpoint.save(path / "lm", model.state_dict(), config, files=[tokenizer.path])
    (path / "reward.py").write_text(REWARD)
    return path


@dataclass
class Server:
    process: subprocess.Popen
    url: str
    first_line: str

    def request(self, path: str, body=None, raw: bytes | None = None, method: str | None = None, **headers: str):
        """(status, headers, the body as JSON where it is JSON)"""
        data = raw if raw is not None or body is None else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            answer = urllib.request.urlopen(request, timeout=120)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            content = answer.read()
        try:
            content = json.loads(content)
        except ValueError:
            content = content.decode()
        return answer.status, answer.headers, content

    def metric(self, name: str) -> float:
        return float(re.search(rf"^plain_rlhf_{name} (\S+)$", self.request("/metrics")[2], re.MULTILINE)[1])

    def metric_becomes(self, name: str, value: float) -> None:
        for _ in range(2000):  # each asks the server, which works meanwhile
            if self.metric(name) == value:
                return
        raise AssertionError(f"{name} is {self.metric(name)}, not {value}")

    def client(self, **changes):
        openai = pytest.importorskip("openai", reason="the openai client is not installed (extra compare)")
        return openai.OpenAI(
            **{"base_url": self.url + "/v1", "api_key": "none", "max_retries": 0, "timeout": 120} | changes
        )


def start(*options: str, cwd: Path, env: dict | None = None, preexec_fn=None) -> subprocess.Popen:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PLAIN_RLHF_KEY": "",
        **(env or {}),
    }
    precision = () if any(option.startswith("--precision=") for option in options) else ("--precision=fp32",)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "serve.py"), *precision, *options], cwd=cwd, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=preexec_fn,
    )  # fmt: skip


@contextlib.contextmanager
def serving(path: Path, *options: str, init: str | None = "lm", env: dict | None = None, says: str = ""):
    """A server that has begun to answer; afterwards it must end in order, having complained about nothing but `says`."""
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")
    pytest.importorskip("starlette", reason="starlette is not installed (extra serve)")
    process = start(*([f"--init={init}"] if init else []), "--port=0", *options, cwd=path, env=env)
    try:
        found, line = None, ""
        while not found:  # what it says of int8 comes first
            said = process.stdout.readline()
            assert said, line + process.stderr.read()  # it has ended
            line += said
            found = re.search(r"http://\S+:\d+", said)
        yield Server(process, found[0], line)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and err.startswith(says) and err.count("\n") == bool(says), err
    finally:
        process.kill()
        process.wait()
