"""The unmodified lm-evaluation-harness scores a made-up task on the server, and finds the model's own log-likelihoods."""

import json
import os
import shutil
import subprocess

import pytest
import tiny_server
import torch

from data.tokenizer import write_hf
from rlhf.lm.pretrained import open_pretrained

pytestmark = pytest.mark.slow
LM_EVAL = os.environ.get("LM_EVAL") or shutil.which("lm_eval")  # the command; it may live in an environment of its own
ITEMS = [
    {"question": "a good", "choices": [" film", " film that nobody likes", " or bad"], "label": 0},
    {"question": "the story is", "choices": [" good", " user", " or bad film"], "label": 0},
]
TASK = """
task: made_up
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.mark.skipif(LM_EVAL is None, reason='lm_eval is not installed: pip install "lm_eval[api]" transformers')
def test_the_harness_finds_the_models_own_numbers(tmp_path):
    tiny_server.build(tmp_path)
    opened = open_pretrained(tmp_path / "lm")
    (tmp_path / "tokenizer").mkdir()
    write_hf(opened.tokenizer, tmp_path / "tokenizer")
    (tmp_path / "task").mkdir()
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (tmp_path / "task" / "made_up.yaml").write_text(TASK.replace("FILE", str(tmp_path / "items.jsonl")))
    with tiny_server.serving(tmp_path) as server:
        arguments = {
            "model": "lm", "base_url": f"{server.url}/v1/completions", "tokenizer": tmp_path / "tokenizer",
            "tokenizer_backend": "huggingface", "tokenized_requests": False, "num_concurrent": 1,
        }  # fmt: skip
        command = [
            LM_EVAL, "--model", "local-completions", "--tasks", "made_up", "--include_path", tmp_path / "task",
            "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()), "--log_samples",
            "--output_path", tmp_path / "results",
        ]  # fmt: skip
        offline = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        done = subprocess.run(command, env=os.environ | offline, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    lines = next((tmp_path / "results").rglob("samples_*.jsonl")).read_text().splitlines()
    scored = {line["doc"]["question"]: line["resps"] for line in map(json.loads, lines)}

    tokenizer, model = opened.tokenizer, opened.model.eval()
    for item in ITEMS:
        first = 1 + len(tokenizer.encode(item["question"]))
        for choice, found in zip(item["choices"], scored[item["question"]], strict=True):
            ids = [tokenizer.start, *tokenizer.encode(item["question"] + choice)]
            with torch.no_grad():
                logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
            expected = sum(float(logprobs[t - 1, ids[t]]) for t in range(first, len(ids)))
            assert float(found[0][0]) == pytest.approx(expected, abs=1e-4)
