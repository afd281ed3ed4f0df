"""The model card says what the runs wrote down, and nothing else; the Hub's own reader gets the same words back."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from data.fetch import MODELS
from evaluation.model_card import flow, head_in, model_card, named, origin_of, yaml
from rlhf.infra import checkpoint
from rlhf.infra.files import write_json
from rlhf.lm.pretrained import digest_of

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ODD = (
    "no|null|~|- a|a: b|#x|'|\"|`|1e3|0x10|2026-11-30|größe|\u2028|\x85|\x07|\U0001f600|{a}|%a|&a|*a|!a|@a|? a|,".split(
        "|"
    )
)
VALUES = st.recursive(
    WORDS | st.sampled_from(ODD) | st.integers() | st.floats(-1e9, 1e9).map(lambda x: float(f"{x:.6g}")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.sampled_from(ODD), inner, max_size=3),
    max_leaves=8,
)


@given(values=st.lists(VALUES, max_size=4))
def test_a_head_is_read_as_it_was_written(values):
    reader = pytest.importorskip("yaml")
    head = {f"key{i}": value for i, value in enumerate(values)}
    assert (reader.safe_load(yaml(head)) or {}) == head


def test_small_numbers_are_numbers():
    reader = pytest.importorskip("yaml")
    assert reader.safe_load(f"x: {flow(1e-7)}") == {"x": 1e-7}


@given(text=WORDS | st.sampled_from(ODD))
def test_a_licence_is_read_back_from_a_head(text):
    if text.isprintable() and text:
        assert head_in(yaml({"tags": ["a"], "license": text, "base_model": "x/y"})) == {
            "tags": "a",
            "license": text,
            "base_model": "x/y",
        }


@pytest.mark.parametrize("text", ["apache-2.0", "mit", "yes", "1.0", "a: b", "it's", "- x"])
def test_a_licence_is_read_from_a_head_that_another_library_wrote(text):
    reader = pytest.importorskip("yaml")
    assert head_in(reader.safe_dump({"license": text, "language": ["en", "de"]})) == {"license": text, "language": "en"}
    assert head_in(reader.safe_dump({"license": None, "a": {"b": text}})).get("license") == "null"


def test_a_comment_is_no_licence():
    assert head_in("license: mit  # as LICENSE says\nname: 'a #b'") == {"license": "mit", "name": "a #b"}


# ---- cards of runs


def weights(place: Path, seed: int) -> None:
    place.mkdir(parents=True)
    save_file({"w": np.full((2,), seed, np.float32)}, place / "model.safetensors")


def write_run(place: Path, init, **options) -> Path:
    """A run directory with one checkpoint of HF's form: what a card looks at is run.json and digests."""
    weights(place, len(options))
    write_json(place / "config.json", {"architectures": ["LlamaForCausalLM"]})
    digest = digest_of(init) if init is not None else None
    write_json(place / "run.json", {"init": init, "out": str(place), "init_sha256": digest, **options})
    return place


@pytest.fixture
def base(tmp_path, monkeypatch) -> str:
    """An HF directory as the Hub gives it."""
    monkeypatch.chdir(tmp_path)
    weights(tmp_path / "base", 7)
    write_json(tmp_path / "base" / "config.json", {"_name_or_path": "Some-One/A.Model", "model_type": "llama"})
    (tmp_path / "base" / "README.md").write_text("---\nlanguage:\n- en\nlicense: apache-2.0\n---\n# A Model\n")
    return "base"


def card_of(spec, form: str = "hf", name: str = "mine", measured=None):
    """The text, and what huggingface_hub makes of it."""
    hub = pytest.importorskip("huggingface_hub")
    text = model_card(name, str(spec), ["python", "export.py", f"--init={spec}"], form, measured)
    return text, hub.ModelCard(text).data


SUMMARY = {
    "rows": {
        "base": {"reward": {"mean": 0.022, "low": -0.1, "high": 0.1}, "kl": 0.0, "distinct_3": 0.97},
        "tuned": {"reward": {"mean": 1.286, "low": 1.2, "high": 1.4}, "kl": 6.96, "distinct_3": float("nan")},
        "best of 4": {"reward": {"mean": 0.4, "low": 0.3, "high": 0.5}, "kl": 0.6},
    },
    "options": {"tuned": ["ppo"], "data": 'out/"data": x', "split": "test"},
    "prompts": 256,
}


def test_a_card_of_two_runs_on_a_model_of_the_hub(base, tmp_path):
    write_run(tmp_path / "sft", base, width=256, lr=1e-4, data='out/"data": x')
    write_run(tmp_path / "ppo", "sft", kl_coef=0.11, layout="branch", data='out/"data": x')
    write_json(tmp_path / "summary.json", SUMMARY)
    text, data = card_of("ppo", name='größe: "a" #1')
    assert (data.base_model, data.license, data.library_name) == ("Some-One/A.Model", "apache-2.0", "transformers")
    assert data.to_dict()["base_model_relation"] == "finetune" and data.pipeline_tag == "text-generation"
    assert data.tags == ["plain-rlhf", "ppo"] and data.datasets is None  # the data are not there any more
    assert data.model_name == 'größe: "a" #1'
    assert {(x.metric_type, x.metric_value) for x in data.eval_results} == {("reward", 1.286), ("kl", 6.96)}
    assert data.eval_results[0].dataset_name == 'out/"data": x, test, 256 prompts'
    order = [
        text.index(word) for word in ("python train_lm.py --init=base", "python train_ppo.py --init=sft", "export.py")
    ]
    assert order == sorted(order) and "--kl_coef=0.11" in text and "--layout=branch" in text and "--clip=" not in text
    assert "| base | 0.022 [-0.100, 0.100]" in text and "| tuned | 1.286 [1.200, 1.400]" in text
    assert "best of 4" not in text and digest_of(base) in text and digest_of("sft") in text
    _, of_base = card_of(base, form="int8")
    assert (of_base.base_model, of_base.to_dict()["base_model_relation"]) == ("Some-One/A.Model", "quantized")
    assert of_base.model_name is None
    assert "base_model_relation" not in card_of(base)[1].to_dict()  # the same model in other files


def test_an_evaluation_is_of_the_weights_that_are_exported(base, tmp_path):
    run = write_run(tmp_path / "ppo", base, kl_coef=0.11)
    for name in ("config.json", "model.safetensors"):
        (run / name).unlink()
    for step in (10, 20):
        checkpoint.save_step(run, step, {"w": torch.full((2,), float(step))}, {"kind": "lm"}, {"done": step})
    size, speed = {"before": 8, "after": 4}, {"before": 8.0, "after": 4.0, "threads": 1}
    receipt = {
        "bytes": size,
        "perplexity": size,
        "tokens_per_s": speed,
        "kl": 0.1,
        "top1": 1.0,
        "tokens": 9,
        "text": "x",
    }
    write_json(tmp_path / "summary.json", SUMMARY)  # of the run: of step 20
    for spec in ("ppo", "ppo/step_000020"):
        assert card_of(spec)[1].eval_results is not None
    assert card_of("ppo/step_000010")[1].eval_results is None
    assert "## Evaluation" in card_of("ppo", measured=receipt)[0]
    text, data = card_of("ppo", measured=receipt | {"dropped": {"first": 1, "layers": 1}})
    assert data.eval_results is None and "## Evaluation" not in text  # fewer layers: another model


def test_what_is_unknown_is_left_out(base, tmp_path):
    write_run(tmp_path / "scratch", None, width=256)
    write_run(tmp_path / "tuned", "scratch", kl_coef=0.1)
    _, data = card_of("tuned")
    assert set(data.to_dict()) == {"library_name", "pipeline_tag", "tags"}  # from scratch: no base, no licence

    write_run(tmp_path / "ppo", base, kl_coef=0.1, data_sha256=["abc"] * 9000)
    assert "and of 8997 more shards" in card_of("ppo")[0]
    write_json(tmp_path / "summary.json", SUMMARY | {"options": SUMMARY["options"] | {"tuned": ["other"]}})
    assert card_of("ppo")[1].eval_results is None  # of another model
    for damage in (
        {"rows": {"tuned": {"reward": {"mean": 1.0}}}},
        {"rows": {"tuned": 3}},
        {"options": {"tuned": ["ppo"]}},
    ):
        write_json(tmp_path / "summary.json", {name: x for name, x in (SUMMARY | damage).items() if name != "prompts"})
        assert card_of("ppo")[1].eval_results is None
        write_json(tmp_path / "summary.json", SUMMARY | damage)
        assert card_of("ppo")[1].eval_results is None
    write_json(tmp_path / "summary.json", SUMMARY)
    os.utime(tmp_path / "summary.json", (1, 1))
    assert card_of("ppo")[1].eval_results is None  # of the model as it was
    assert card_of("ppo")[1].license == "apache-2.0"
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "base" / "model.safetensors")
    text, data = card_of("ppo")  # the base is another one by now
    assert data.base_model is None and data.license is None and "from `base`" not in text
    (tmp_path / "ppo" / "run.json").write_text("{")
    assert card_of("ppo")[1].to_dict().keys() == {"library_name", "pipeline_tag", "tags"}


def test_a_path_is_no_name_on_the_hub(base, tmp_path):
    write_json(tmp_path / "base" / "config.json", {"_name_or_path": "/home/me/model"})
    assert named(base) == (None, "apache-2.0")
    (tmp_path / "out").mkdir()
    weights(tmp_path / "out" / "lm", 1)
    write_json(tmp_path / "base" / "config.json", {"_name_or_path": "out/lm"})
    assert named(base) == (None, "apache-2.0")


def test_a_model_of_the_package_index_has_its_name_and_licence_without_a_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, known = next(iter(MODELS.items()))
    weights(tmp_path / "ppo", 1)
    write_json(tmp_path / "ppo" / "run.json", {"init": name, "init_sha256": known.sha256, "kl_coef": 0.1})
    origin = origin_of("ppo")
    assert (origin.base, origin.hub, origin.licence) == (name, known.hub, known.licence.lower())
    assert json.dumps(known.hub) and "/" in known.hub
