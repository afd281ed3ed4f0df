"""Our own checkpoints as a stranger might have made or damaged them: one line, at once, and nothing of the size it claims."""

import json
import resource
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_model import small_model
from test_pretrained import tiny_tokenizer

from model.lora import add_lora
from model.transformer import ModelConfig
from rlhf.infra import checkpoint
from rlhf.lm.checkpoints import FIELDS, open_stored
from rlhf.lm.pretrained import config_of, open_pretrained


def language_model(path: Path, seed: int = 0, **changes) -> Path:
    """A tiny language model of ours; `changes` go into its config, after it was built."""
    tokenizer = tiny_tokenizer()
    model = small_model("llama", torch.float32, seed, vocab_size=tokenizer.vocab_size, context=64)
    config = {"kind": "lm", "model": asdict(model.config), "tokenizer": tokenizer.fingerprint, "stop_ids": [2]}
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [tokenizer.save(path.parent / "tokenizer")]
    return checkpoint.save_step(path, 1, model.state_dict(), config | changes, {"done": 1}, files=files)


def adapters(path: Path, base: Path, seed: int = 1, **changes) -> Path:
    """A policy of layout adapters on `base`."""
    opened = open_pretrained(base)
    model = add_lora(opened.model, 2, 4.0, None, "policy", torch.Generator().manual_seed(seed))
    tensors = {f"model.{name}": x for name, x in model.state_dict().items() if name.endswith(".policy")}
    config = {"kind": "policy", "layout": "adapters", "model": asdict(opened.model.config), "stop_ids": [2]}
    config |= {"tokenizer": opened.tokenizer.fingerprint, "base": str(base), "base_digest": opened.digest}
    config |= {"lora_rank": 2, "lora_alpha": 4.0, "lora_targets": None}
    files = [opened.tokenizer.save(path.parent / "tokenizer")]
    return checkpoint.save_step(path, 1, tensors, config | changes, {"done": 1}, files=files)


def rewrite(path: Path, **changes) -> None:
    """Change the config of a checkpoint, as somebody would who knows the format."""
    content = json.loads((path / "config.json").read_text())
    content["config"] |= changes
    content["config"] = {name: value for name, value in content["config"].items() if value is not ...}
    content["sha256"] = checkpoint.own_digest(content)
    (path / "config.json").write_text(json.dumps(content))


def refusal(path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        open_pretrained(path)
    assert "\n" not in str(error.value)
    return str(error.value)


SHAPE = asdict(ModelConfig(vocab_size=264, width=32, layers=2, heads=2, context=64))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": SHAPE | {"layers": 100_000}}, ("layers is 100000", "to 1024")),
        ({"model": SHAPE | {"layers": 10**9}}, ("layers is 1000000000", "to 1024")),
        ({"model": SHAPE | {"layers": 1000}}, ("describes", "weights", "bytes")),
        ({"model": SHAPE | {"width": 10**9}}, ("width is 1000000000", "16777216")),
        ({"model": SHAPE | {"width": 2**24}}, ("describes", "weights")),
        ({"model": SHAPE | {"vocab_size": 2**24}}, ("describes", "weights")),
        ({"model": SHAPE | {"ffn": 10**8}}, ("ffn is 100000000",)),
        ({"model": SHAPE | {"context": 10**9}}, ("context is 1000000000",)),
        ({"model": SHAPE | {"heads": 0}}, ("heads is 0",)),
        ({"model": SHAPE | {"heads": "2"}}, ("heads is '2'",)),
        ({"model": SHAPE | {"heads": True}}, ("heads is True",)),
        ({"model": SHAPE | {"heads": 3}}, ("not a multiple",)),
        ({"model": SHAPE | {"norm_eps": float("nan")}}, ("norm_eps is nan",)),
        ({"model": SHAPE | {"rope_theta": float("inf")}}, ("rope_theta is inf",)),
        ({"model": SHAPE | {"rope_scaling": {"rope_type": "linear", "factor": "2"}}}, ("factor is '2'",)),
        ({"model": SHAPE | {"rope_scaling": [1]}}, ("rope_scaling is [1]",)),
        ({"model": SHAPE | {"experts": 8}}, ("another architecture", "experts")),
        ({"model": SHAPE | {"norm": None}}, ("norm is None",)),
        ({"model": None}, ("model is None",)),
        ({"model": "llama"}, ("model is 'llama'",)),
        ({"model": ...}, ("lacks model",)),
        ({"tokenizer": ...}, ("another tokenizer",)),
        ({"tokenizer": 3}, ("tokenizer is 3",)),
        ({"stop_ids": "text"}, ("stop_ids is 'text'", "list of token ids")),
        ({"stop_ids": [2**70]}, ("stop_ids is", "list of token ids")),
        ({"stop_ids": [-1]}, ("stop_ids is [-1]",)),
        ({"stop_ids": {"a": 1}}, ("stop_ids is",)),
        ({"stop_ids": list(range(2000))}, ("stop_ids is",)),
        ({"kind": 3}, ("kind is 3",)),
        ({"kind": "cake"}, ("cake", "language model is needed")),
        ({"layout": ["branch"]}, ("layout is",)),
        ({"kind": "policy", "layout": "branch"}, ("lacks base, base_digest, branch_layers",)),
    ],
    ids=str,
)
def test_a_config_that_describes_no_model_of_ours(tmp_path, changes, words):
    path = language_model(tmp_path / "run")
    rewrite(path, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = refusal(tmp_path / "run")
    assert str(path.parent) in text and not [word for word in words if word not in text], text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    return language_model(tmp_path_factory.mktemp("stored") / "run")


@given(st.sampled_from([*FIELDS, *(f"model.{name}" for name in SHAPE)]), JSON)
def test_any_value_in_any_field_opens_or_is_one_line(stored, name, value):
    whole = (stored / "config.json").read_text()
    outer, _, inner = name.partition(".")
    try:
        rewrite(stored, **{outer: SHAPE | {inner: value} if inner else value})
        open_pretrained(stored)
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error) and str(stored) in str(error)
    finally:
        (stored / "config.json").write_text(whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e12])
def test_a_weight_that_no_training_leaves_is_refused(tmp_path, value):
    path = language_model(tmp_path / "run")
    saved = checkpoint.load(path)
    tensors = {name: x.clone() for name, x in saved.tensors.items()}
    tensors["layers.1.mlp.up_proj.weight"][3, 5] = value
    checkpoint.save(path, tensors, saved.config, saved.state, files=[tmp_path / "tokenizer" / "bpe.json"])
    text = refusal(tmp_path / "run")
    assert f"layers.1.mlp.up_proj.weight holds {value:g}" in text and "damaged, or its training diverged" in text


def test_a_shape_can_be_asked_for_without_its_weights(stored):
    assert config_of(stored) == ModelConfig(**json.loads((stored / "config.json").read_text())["config"]["model"])


def test_a_checkpoint_of_ours_is_never_taken_for_one_of_another_kind(tmp_path):
    """Its config.json cut or changed: the line says what is damaged, not that some key of HF's is missing."""
    path = language_model(tmp_path / "run")
    whole = (path / "config.json").read_text()
    for text, word in ((whole[:50], "it is not JSON"), (whole.replace('"lm"', '"ln"'), "it was changed after")):
        (path / "config.json").write_text(text)
        assert f"{path}/config.json is damaged ({word}" in refusal(path)


# ---- the base of what was trained on one


def probe(path: Path, **options) -> torch.Tensor:
    return logits(open_pretrained(path, **options).model)


def logits(model) -> torch.Tensor:
    return model.unembed(model.trunk(torch.arange(9)[None]))


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """out/lm and out/ppo on it, by relative paths, as commands name them."""
    monkeypatch.chdir(tmp_path)
    language_model(Path("out/lm"))
    adapters(Path("out/ppo"), Path("out/lm"))
    return tmp_path


@pytest.mark.parametrize(
    "moves, run",
    [
        ([("out", "elsewhere/out")], "elsewhere/out/ppo"),
        ([("out", "other")], "other/ppo"),
        ([("out/lm", "out/ppo/base"), ("out", "other")], "other/ppo"),
        ([("out/lm", "out/language model")], "out/ppo"),
        ([("out/lm", "out/ppo/lm")], "out/ppo/step_000001"),
    ],
    ids=str,
)
def test_a_base_that_moved_with_its_run_is_found(runs, monkeypatch, moves, run):
    wanted = probe("out/ppo")
    for source, target in moves:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(source).rename(target)
    assert torch.equal(probe(run), wanted)
    monkeypatch.chdir("/")  # from anywhere
    assert torch.equal(probe(runs / run), wanted)


def test_another_model_at_the_old_place_is_not_taken(runs):
    """The base is known by its sha256: with another one in its place, the one beside the run is found."""
    wanted = probe("out/ppo")
    Path("out/lm").rename("out/old")
    language_model(Path("out/lm"), seed=5)
    assert torch.equal(probe("out/ppo"), wanted)
    shutil.rmtree("out/old")
    assert "which is now" in refusal(Path("out/ppo")) and "--base=" in refusal(Path("out/ppo"))


def test_a_base_that_is_far_away_can_be_named(runs):
    wanted = probe("out/ppo")
    Path("far/away").mkdir(parents=True)
    Path("out/lm").rename("far/away/lm")
    text = refusal(Path("out/ppo"))
    assert "out/lm" in text and "neither there nor near" in text and "--base=" in text
    assert torch.equal(probe("out/ppo", base="far/away/lm"), wanted)
    language_model(Path("far/other"), seed=7)
    with pytest.raises(ValueError, match="--base=far/other is "):
        open_pretrained("out/ppo", base="far/other")
    with pytest.raises(ValueError, match="has no effect"):
        open_pretrained("far/other", base="far/away/lm")


def test_commands_take_the_place_of_a_base_that_is_far_away(runs, monkeypatch):
    """export.py by --base, as sample.py and serve.py, the comparison by its own base; a whole model has no use for one."""
    import evaluate
    import export

    wanted, tokenizer = probe("out/ppo"), open_pretrained("out/lm").tokenizer
    Path("far/away").mkdir(parents=True)
    Path("out/lm").rename("far/away/lm")

    def exported(*options: str) -> None:
        monkeypatch.setattr("sys.argv", ["export.py", "--init=out/ppo", *options])
        with torch.enable_grad():  # export.py turns it off for good
            export.main()

    with pytest.raises(FileNotFoundError, match="say with --base="):
        exported("--out=hf")
    exported("--out=hf", "--base=far/away/lm")
    assert torch.allclose(probe("hf"), wanted, atol=1e-5)
    exported("--out=adapter", "--format=peft", "--base=far/away/lm")
    assert torch.allclose(probe("adapter"), wanted, atol=1e-5)
    Path("far/away/lm").rename("lm")
    assert torch.allclose(probe("adapter", base="lm"), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="hf is a whole model: --base=lm has no effect"):
        open_pretrained("hf", base="lm")

    cfg = evaluate.Config(base="lm", tuned=("out/ppo",))
    models = evaluate.open_models(cfg, tokenizer, "cpu", torch.float32)
    assert torch.equal(logits(models["tuned"].model), wanted)


def test_a_policy_on_a_policy(runs):
    adapters(Path("out/second"), Path("out/ppo"), seed=2)
    wanted = probe("out/second")
    Path("out").rename("moved")
    assert torch.equal(probe("moved/second"), wanted)


@pytest.mark.parametrize("spelled", ["out/ppo", "out/ppo/step_000001", "out/../out/ppo"])
def test_its_own_base(runs, spelled):
    digest = checkpoint.digest("out/ppo")
    rewrite(Path("out/ppo/step_000001"), base=spelled, base_digest=digest)
    assert "is its own base" in refusal(Path("out/ppo"))


def test_each_others_base(runs):
    adapters(Path("out/second"), Path("out/ppo"), seed=2)
    rewrite(Path("out/ppo/step_000001"), base="out/second", base_digest=checkpoint.digest("out/second"))
    assert "is its own base" in refusal(Path("out/ppo"))
    assert "is its own base" in refusal(Path("out/second"))


def test_a_base_that_is_no_model(runs):
    for base in ("/etc/passwd", "/dev/zero", "/"):
        rewrite(Path("out/ppo/step_000001"), base=base, base_digest="0" * 64)
        assert refusal(Path("out/ppo"))


def test_what_opens_is_what_was_checked(stored):
    assert open_stored(stored).config["kind"] == "lm"
