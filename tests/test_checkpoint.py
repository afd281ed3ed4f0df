"""Checkpoints: exact, complete or not there, and clear about what is wrong with one.

The tests that kill use real processes: a child saves in a loop, the parent kills it with SIGKILL at a random moment.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlhf.infra import checkpoint, optim

CONFIG = {"model": {"width": 8}, "tokenizer": "abc"}


def make_net(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 1))


def train(net, optimizer, steps):
    for i in steps:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
        net(x).square().mean().backward()
        optim.set_lr(optimizer, optim.schedule(i, 20, 3, 1e-2))
        optim.step(optimizer, net, optim.amp(torch.device("cpu")).scaler, 1.0)


def equal(a: dict, b: dict) -> bool:
    same_kind = a.keys() == b.keys() and all(a[name].dtype == b[name].dtype for name in a)
    return same_kind and all(torch.equal(a[name], b[name]) for name in a)


def hidden(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if file.name.startswith(".")]


# ---- what goes in comes out


def test_everything_comes_back_as_it_was(tmp_path):
    tensors = {
        "fp32": torch.randn(3, 4),
        "bf16": torch.randn(3).bfloat16(),
        "fp16": torch.randn(3).half(),
        "fp64": torch.randn(3).double(),
        "int64": torch.arange(5),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(3, 4).T,
        "strided": torch.randn(8, 4)[::2],
        "special": torch.tensor([torch.nan, torch.inf, -0.0]),
        "a.parameter": nn.Parameter(torch.ones(2)),
    }
    state = {"step": 12, "kl": {"coef": 0.1 + 0.2}, "best": float("inf"), "seed": 2**63}
    (tmp_path / "tokenizer.model").write_bytes(b"\0pieces")
    moments = {"w:step": torch.tensor(3.0)}
    path = checkpoint.save(tmp_path / "a" / "b", tensors, CONFIG, state, moments, [tmp_path / "tokenizer.model"])

    back = checkpoint.load(path)
    assert (back.path, back.config, back.state) == (tmp_path / "a" / "b", CONFIG, state)
    assert back.tensors.keys() == tensors.keys() and equal(back.optimizer, moments)
    for name, tensor in back.tensors.items():
        assert tensor.dtype == tensors[name].dtype
        torch.testing.assert_close(tensor, tensors[name].detach(), rtol=0, atol=0, equal_nan=True)
    assert (path / "tokenizer.model").read_bytes() == b"\0pieces"
    content = json.loads((path / "config.json").read_text())
    tokenizer = {"bytes": 7, "sha256": hashlib.sha256(b"\0pieces").hexdigest()}
    assert content["format"] == 2 and content["files"]["tokenizer.model"] == tokenizer
    assert back.digest == hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert hidden(path.parent) == []


def test_only_weights_and_config_are_needed(tmp_path):
    path = checkpoint.save(tmp_path / "final", {"w": torch.ones(2)}, CONFIG)
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    assert checkpoint.load(path).state == {}
    with pytest.raises(FileNotFoundError, match="optimizer.safetensors"):
        _ = checkpoint.load(path).optimizer


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = checkpoint.save(tmp_path / "final", {"w": torch.ones(2)}, CONFIG)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


def test_tied_weights_have_one_name(tmp_path):
    w = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        checkpoint.save(tmp_path / "final", {"a": w, "b": w[:2], "c": torch.ones(1)}, CONFIG)
    assert list(tmp_path.iterdir()) == []
    path = checkpoint.save(tmp_path / "final", {"a": w[:2].clone(), "b": w.clone()}, CONFIG)
    assert equal(checkpoint.load(path).tensors, {"a": w[:2], "b": w})


def test_a_view_stores_its_own_part_only(tmp_path):
    big = torch.randn(1000, 8)
    path = checkpoint.save(tmp_path / "final", {"a": big[3]}, CONFIG)
    assert torch.equal(checkpoint.load(path).tensors["a"], big[3])
    assert (path / "model.safetensors").stat().st_size < 500


# ---- training goes on bit for bit


@pytest.mark.parametrize("k", [1, 5])
def test_k_steps_saved_and_k_more_are_2k_steps(tmp_path, k):
    whole = make_net()
    optimizer = optim.make_optimizer(whole, 1e-2, 0.1)
    train(whole, optimizer, range(2 * k))

    first = make_net()
    first_optimizer = optim.make_optimizer(first, 1e-2, 0.1)
    train(first, first_optimizer, range(k))
    moments = checkpoint.optimizer_tensors(first_optimizer, first)
    assert len(moments) == 3 * 6 and "0.weight:exp_avg_sq" in moments
    checkpoint.save_step(tmp_path, k, first.state_dict(), CONFIG, {"step": k}, moments)

    second = make_net(seed=1)  # other weights, to be replaced
    second_optimizer = optim.make_optimizer(second, 1e-2, 0.1)
    saved = checkpoint.load(tmp_path)
    checkpoint.load_weights(second, saved.tensors, saved.path)
    checkpoint.load_optimizer(second_optimizer, second, saved.optimizer)
    train(second, second_optimizer, range(saved.state["step"], 2 * k))
    assert equal(second.state_dict(), whole.state_dict())
    assert equal(*(checkpoint.optimizer_tensors(o, n) for o, n in ((optimizer, whole), (second_optimizer, second))))


def test_without_the_moments_it_would_not_be_exact():
    """The test above can fail: weights alone do not continue the run."""
    whole, part = make_net(), make_net()
    train(whole, optim.make_optimizer(whole, 1e-2, 0.1), range(4))
    train(part, optim.make_optimizer(part, 1e-2, 0.1), range(2))
    train(part, optim.make_optimizer(part, 1e-2, 0.1), range(2, 4))
    assert not equal(whole.state_dict(), part.state_dict())


def test_parameters_that_never_had_a_gradient_have_no_moments():
    net = make_net()
    net[0].requires_grad_(False)
    optimizer = optim.make_optimizer(net, 1e-2)
    assert checkpoint.optimizer_tensors(optimizer, net) == {}
    train(net, optimizer, range(2))
    moments = checkpoint.optimizer_tensors(optimizer, net)
    assert {label.rpartition(":")[0] for label in moments} == {"1.weight", "1.bias", "2.weight", "2.bias"}
    again = optim.make_optimizer(net, 1e-2)
    checkpoint.load_optimizer(again, net, moments)
    assert equal(checkpoint.optimizer_tensors(again, net), moments)


# ---- another architecture


def refusal(load, *args) -> str:
    with pytest.raises(ValueError) as error:
        load(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_of_another_architecture_are_refused():
    net, tensors = make_net(), make_net(1).state_dict()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    text = refusal(checkpoint.load_weights, net, make_net(width=4).state_dict(), "out/x")
    assert text.startswith(
        "out/x is a checkpoint of another architecture: 0.weight is (4, 4) there and (8, 8) here and "
    )
    text = refusal(checkpoint.load_weights, net, {n: t for n, t in tensors.items() if n != "1.bias"}, "out/x")
    assert text.endswith(": it lacks 1.bias")
    text = refusal(checkpoint.load_weights, net, tensors | {"x": torch.ones(1), "y": torch.ones(1)}, "out/x")
    assert text.endswith(": it adds x and 1 more")
    text = refusal(checkpoint.load_weights, net, {"x": torch.ones(1)}, "out/x")
    assert text.endswith(": it lacks 0.weight and 5 more; it adds x")
    assert equal(net.state_dict(), before)  # nothing was half loaded
    checkpoint.load_weights(net, tensors, "out/x")
    assert equal(net.state_dict(), tensors)


def test_weights_keep_the_dtype_of_the_module():
    net = make_net()
    checkpoint.load_weights(net, {name: t.bfloat16() for name, t in make_net(1).state_dict().items()}, "x")
    assert net[0].weight.dtype == torch.float32
    assert torch.equal(net[0].weight, make_net(1)[0].weight.bfloat16().float())


def test_optimizer_state_of_another_model_is_refused():
    net = make_net()
    optimizer = optim.make_optimizer(net, 1e-2)
    text = refusal(checkpoint.load_optimizer, optimizer, net, {"0.weight:exp_avg": torch.ones(4, 4)})
    assert text == "optimizer state of another model: 0.weight:exp_avg is (4, 4) there, (8, 8) here"
    text = refusal(checkpoint.load_optimizer, optimizer, net, {"9.weight:exp_avg": torch.ones(4, 4)})
    assert text == "optimizer state of another model: 9.weight:exp_avg is (4, 4) there, no such parameter here"
    net[0].requires_grad_(False)
    optimizer = optim.make_optimizer(net, 1e-2)
    text = refusal(checkpoint.load_optimizer, optimizer, net, {"0.weight:exp_avg": torch.ones(8, 8)})
    assert text == "optimizer state of another model: 0.weight:exp_avg is (8, 8) there, frozen here"


# ---- runs of many checkpoints


def test_the_newest_two_are_kept(tmp_path):
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "nothing") is None
    for step in (1, 9, 10, 999_999, 1_000_000):  # numbers decide, not names: step_1000000 sorts before step_999999
        checkpoint.save_step(tmp_path, step, {"w": torch.tensor(float(step))}, CONFIG, {"step": step})
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step_999999", "step_1000000"]
    assert checkpoint.latest(tmp_path).name == "step_1000000"
    assert checkpoint.load(tmp_path).state == {"step": 1_000_000}
    assert checkpoint.load(tmp_path / "step_999999").state == {"step": 999_999}
    checkpoint.save_step(tmp_path, 1_000_001, {"w": torch.ones(1)}, CONFIG, keep=1)
    assert os.listdir(tmp_path) == ["step_1000001"]


def test_a_step_is_saved_again_after_a_resume(tmp_path):
    for value in (1.0, 2.0):
        checkpoint.save_step(tmp_path, 5, {"w": torch.tensor(value)}, CONFIG)
    assert os.listdir(tmp_path) == ["step_000005"]
    assert checkpoint.load(tmp_path).tensors["w"] == 2.0


def damage(path: Path, how: str) -> None:
    if how == "config lost":
        (path / "config.json").unlink()
    elif how == "config cut":
        (path / "config.json").write_bytes((path / "config.json").read_bytes()[:20])
    elif how == "weights lost":
        (path / "model.safetensors").unlink()
    elif how == "weights cut":
        os.truncate(path / "model.safetensors", 60)
    elif how == "state lost":
        (path / "state.json").unlink()


@pytest.mark.parametrize("how", ["config lost", "config cut", "weights lost", "weights cut", "state lost"])
def test_latest_passes_over_what_is_incomplete(tmp_path, how):
    for step in (1, 2):
        checkpoint.save_step(tmp_path, step, {"w": torch.ones(8)}, CONFIG, {"step": step})
    damage(tmp_path / "step_000002", how)
    (tmp_path / "step_x").mkdir()
    (tmp_path / "step_000007").mkdir()
    (tmp_path / "step_000008").write_text("a file")
    assert checkpoint.latest(tmp_path).name == "step_000001"
    assert checkpoint.load(tmp_path).state == {"step": 1}
    text = refusal_or_missing(checkpoint.load, tmp_path / "step_000002")
    assert "step_000002" in text and "\n" not in text
    checkpoint.save_step(tmp_path, 2, {"w": torch.ones(8)}, CONFIG, {"step": 2})  # the run goes on and repairs it
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step_000001", "step_000002"]


def refusal_or_missing(load, *args) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(*args)
    return str(error.value)


# ---- what is no checkpoint


def test_no_checkpoint_there(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint in {path}"):
            checkpoint.load(path)


def test_damage_is_named(tmp_path):
    path = checkpoint.save(tmp_path / "final", {"w": torch.ones(8)}, CONFIG)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    size = len(whole)
    text = refusal(checkpoint.load, path)
    assert text == f"{file} has {size - 4} bytes, {size} were written: damaged; use another checkpoint"
    file.write_bytes(b"\xff" * size)  # right size, wrong bytes: found when the file is read
    assert refusal(lambda: checkpoint.load(path).tensors).startswith(f"{file} is damaged (")


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "[]", "3", "null", '"x"'])
def test_a_config_of_something_else(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert refusal(checkpoint.load, tmp_path) == f"{tmp_path}/config.json is not the config of a checkpoint of ours"


def test_a_newer_format_is_refused(tmp_path):
    path = checkpoint.save(tmp_path / "final", {"w": torch.ones(8)}, CONFIG)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | {"format": 3, "files": "elsewhere"}))
    text = f"{path} has checkpoint format 3, this version reads 2; use a newer version of this code"
    assert refusal(checkpoint.load, path) == text


def test_format_1_still_opens(tmp_path):
    """It knew the sizes of its files and nothing of their bytes."""
    path = checkpoint.save(
        tmp_path / "step_000004", {"w": torch.ones(8)}, CONFIG, {"done": 4}, {"w:step": torch.ones(1)}
    )
    content = json.loads((path / "config.json").read_text())
    old = {"format": 1, "config": CONFIG, "files": {name: x["bytes"] for name, x in content["files"].items()}}
    (path / "config.json").write_text(json.dumps(old, indent=1))
    back = checkpoint.verify(path)
    assert back.state == {"done": 4} and torch.equal(back.tensors["w"], torch.ones(8)) and len(back.optimizer) == 1
    assert back.digest == content["files"]["model.safetensors"]["sha256"] and checkpoint.latest(tmp_path) == path
    (path / "config.json").write_text(json.dumps(old | {"files": old["files"] | {"state.json": 3}}))
    assert "state.json has 14 bytes, 3 were written" in refusal(checkpoint.load, path)


# ---- damage of every kind: it is named, and what is behind it is used


def one_checkpoint(folder: Path, step: int = 4) -> Path:
    (folder / "tokenizer.model").write_bytes(b"pieces of text")
    tensors, moments = {"w": torch.arange(8.0) + step}, {"w:exp_avg": torch.ones(8) * step}
    files = [folder / "tokenizer.model"]
    return checkpoint.save_step(folder / "run", step, tensors, CONFIG, {"done": step, "best": 0.5}, moments, files)


def content_of(path: Path) -> tuple:
    saved = checkpoint.verify(path)
    tensors = [{name: x.tolist() for name, x in part.items()} for part in (saved.tensors, saved.optimizer)]
    return saved.config, saved.state, *tensors, (path / "tokenizer.model").read_bytes()


FILES = ("config.json", "state.json", "model.safetensors", "optimizer.safetensors", "tokenizer.model")


@settings(max_examples=100)
@given(
    st.sampled_from(FILES),
    st.integers(0, 10_000),
    st.integers(0, 7),
    st.sampled_from(["flip", "cut", "insert", "zero"]),
)
def test_no_damage_goes_unseen(file, place, bit, how):
    """Whatever happens to a byte of any file: the same content as before, or one line that names file and damage."""
    with tempfile.TemporaryDirectory() as folder:
        path = one_checkpoint(Path(folder))
        whole, before = (path / file).read_bytes(), content_of(path)
        place %= len(whole)
        changed = {
            "flip": whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :],
            "cut": whole[:place],
            "insert": whole[:place] + b"0" + whole[place:],
            "zero": b"\0" * len(whole),
        }[how]
        (path / file).write_bytes(changed)
        try:
            assert content_of(path) == before  # a space in config.json
        except (ValueError, FileNotFoundError) as error:
            assert file in str(error) and "\n" not in str(error)
        else:
            assert file == "config.json" and json.loads(changed) == json.loads(whole)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"files": []}, "make no sense"),
        ({"files": {}}, "make no sense"),
        ({"format": "2"}, "make no sense"),
        ({"format": True}, "make no sense"),
        ({"format": -1}, "make no sense"),
        ({"config": None}, "make no sense"),
        ({"files": {"../../lm/report.json": {"bytes": 4, "sha256": "0" * 64}}}, "make no sense"),
        ({"files": {"/etc/passwd": {"bytes": 4, "sha256": "0" * 64}}}, "make no sense"),
        ({"files": {"model.safetensors": {"bytes": 4, "sha256": 5}}}, "make no sense"),
        ({"files": {"model.safetensors": {"bytes": 2.5, "sha256": "0" * 64}}}, "make no sense"),
        ({"files": {"a\0b": {"bytes": 4, "sha256": "0" * 64}}}, "make no sense"),
        ({"format": 1, "files": {"..": 4096}}, "make no sense"),
        ({"format": 1, "files": {"model.safetensors": "4"}}, "make no sense"),
        ({"config": {"model": {"width": 16}}}, "changed after it was written"),
        ({"sha256": None}, "changed after it was written"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense(tmp_path, change, words):
    path = one_checkpoint(tmp_path)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | change))
    text = refusal(checkpoint.load, path)
    assert text.startswith(f"{path}/config.json is damaged") and words in text
    assert checkpoint.latest(tmp_path / "run") is None


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\x00", "\xff", " " * 17_000_000])
def test_json_that_is_none(tmp_path, text):
    path = one_checkpoint(tmp_path)
    (path / "config.json").write_text(text, encoding="latin-1")
    assert str(path / "config.json") in refusal(checkpoint.load, path)


@pytest.mark.parametrize("file", FILES)
def test_pipes_and_devices_are_not_read(tmp_path, file):
    """Opening a pipe would wait for ever, reading /dev/zero never ends."""
    path = one_checkpoint(tmp_path)
    for make in (os.mkfifo, functools.partial(os.symlink, "/dev/zero")):
        (path / file).unlink()
        make(path / file)
        assert refusal(checkpoint.verify, path) == f"{path / file} is not a regular file"
        assert checkpoint.latest(tmp_path / "run") is None


def spoil(path: Path, how: str) -> None:
    other = path.with_name("step_000002")
    match how:
        case "config cut":
            os.truncate(path / "config.json", 30)
        case "config gone":
            (path / "config.json").unlink()
        case "bit":
            blob = bytearray((path / "optimizer.safetensors").read_bytes())
            blob[-1] ^= 1
            (path / "optimizer.safetensors").write_bytes(blob)
        case "weights of another step":
            shutil.copyfile(other / "model.safetensors", path / "model.safetensors")
        case "link to another step's weights":
            (path / "model.safetensors").unlink()
            (path / "model.safetensors").symlink_to(other / "model.safetensors")
        case "a copy of another step":
            shutil.rmtree(path)
            shutil.copytree(other, path)
        case "empty":
            shutil.rmtree(path)
            path.mkdir()
        case "a file":
            shutil.rmtree(path)
            path.write_text("mine")
        case "a link to nothing":
            shutil.rmtree(path)
            path.symlink_to("nowhere")
        case "a link to itself":
            shutil.rmtree(path)
            path.symlink_to(path.name)
        case "a pipe inside":
            (path / "state.json").unlink()
            os.mkfifo(path / "state.json")


SPOILED = [
    "config cut", "config gone", "bit", "weights of another step", "link to another step's weights",
    "a copy of another step", "empty", "a file", "a link to nothing", "a link to itself", "a pipe inside",
]  # fmt: skip


@pytest.mark.parametrize("how", SPOILED)
def test_what_is_damaged_is_set_aside_and_the_one_before_is_used(tmp_path, how):
    for step in (2, 4):
        one_checkpoint(tmp_path, step)
    run, newest = tmp_path / "run", tmp_path / "run/step_000004"
    spoil(newest, how)
    found, lines = checkpoint.newest_intact(run)
    assert found == run / "step_000002" and len(lines) == 1, lines
    assert lines[0].startswith(f"{newest} is damaged (") and lines[0].endswith("): set aside as .damaged-step_000004")
    assert not os.path.lexists(newest) and os.path.lexists(run / ".damaged-step_000004")
    assert checkpoint.newest_intact(run) == (found, [])
    one_checkpoint(tmp_path, 4)  # the run trains on, and saves that step again
    assert checkpoint.newest_intact(run) == (newest, [])
    spoil(newest, how)  # and once more: the place of the damaged one is taken
    assert checkpoint.newest_intact(run)[0] == found
    assert sorted(os.listdir(run)) == [".damaged-step_000004", "step_000002"]


def test_all_are_damaged(tmp_path):
    for step in (2, 4):
        spoil(one_checkpoint(tmp_path, step), "bit")
    found, lines = checkpoint.newest_intact(tmp_path / "run")
    assert found is None and [line.partition(" is damaged")[0][-1] for line in lines] == ["4", "2"]


def test_what_may_not_be_read_is_not_damaged(tmp_path):
    """Somebody else's files: that is an error of permissions, and nothing is renamed."""
    one_checkpoint(tmp_path, 2)
    path = one_checkpoint(tmp_path, 4)
    (path / "config.json").chmod(0)

    def look():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setuid(65534)
        try:
            checkpoint.newest_intact(tmp_path / "run")
        except PermissionError:
            os._exit(0)
        os._exit(1)

    tmp_path.parent.chmod(0o755)
    for folder in (tmp_path, tmp_path / "run", path):
        folder.chmod(0o755)
    child = in_child(look)
    child.join()
    assert child.exitcode == 0 and path.exists()


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(tmp_path, capfd):
    for step in (2, 4):
        one_checkpoint(tmp_path, step)
    spoil(tmp_path / "run/step_000004", "config cut")
    for _ in range(3):
        assert checkpoint.load(tmp_path / "run").state["done"] == 2
    said = capfd.readouterr().err
    assert said.startswith(f"{tmp_path}/run/step_000004 is damaged (config.json") and said.count("\n") == 1
    assert said.endswith("): step_000002 is used instead\n")


def test_a_damaged_checkpoint_can_be_replaced(tmp_path):
    """out/best has no older one behind it: a cut config.json must not end the run at its next best policy."""
    (tmp_path / "tokenizer.model").write_text("pieces")
    for _ in range(2):
        path = checkpoint.save(tmp_path / "best", {"w": torch.ones(2)}, CONFIG, files=[tmp_path / "tokenizer.model"])
        spoil(path, "config cut")
    os.truncate(path / "model.safetensors", 3)
    (path / "notes.txt").write_text("mine")
    text = refusal(checkpoint.save, path, {"w": torch.ones(2)}, CONFIG, None, None, [tmp_path / "tokenizer.model"])
    assert "holds notes.txt, not part of a checkpoint" in text


def test_a_file_of_that_name_is_not_replaced(tmp_path):
    (tmp_path / "best").write_text("mine")
    assert "is a file, not a checkpoint" in refusal(checkpoint.save, tmp_path / "best", {"w": torch.ones(2)}, CONFIG)
    assert (tmp_path / "best").read_text() == "mine"


# ---- disks that refuse, processes that die


def test_no_place_to_write_is_told_with_the_path(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(
        OSError, match=f"cannot write the checkpoint {tmp_path}/file/final: File exists: '{tmp_path}/file'"
    ):
        checkpoint.save(tmp_path / "file" / "final", {"w": torch.ones(8)}, CONFIG)


def in_child(work, *args) -> multiprocessing.Process:
    """`work` in a forked process: nothing to import, so it starts at once and can be killed at any moment."""
    child = multiprocessing.get_context("fork").Process(target=work, args=args)
    child.start()
    return child


def save_without_permission(folder: Path):
    os.chdir(folder)
    if os.geteuid() == 0:
        os.setuid(65534)  # root may write everywhere, nobody may not
    try:
        checkpoint.save("final", {"w": torch.ones(8)}, CONFIG)
    except PermissionError as error:
        os._exit(0 if "cannot write the checkpoint final: Permission denied" in str(error) else 1)
    os._exit(2)


def test_no_permission(tmp_path):
    tmp_path.chmod(0o555)
    child = in_child(save_without_permission, tmp_path)
    child.join()
    assert child.exitcode == 0 and os.listdir(tmp_path) == []


def save_on_a_full_disk(path: Path, big: str):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # every write beyond 4000 bytes fails, as on a full disk
    tensors = {"w": torch.ones(2000 if big == "model" else 8)}
    moments = {"w:step": torch.ones(2000 if big == "optimizer" else 8)}
    extra = [path.parent / "tokenizer.model"] if big == "files" else []
    state = {"text": "x" * 5000} if big == "state" else {}
    try:
        checkpoint.save(path, tensors, CONFIG, state, moments, extra)
    except OSError as error:
        os._exit(0 if f"cannot write the checkpoint {path}: File too large" in str(error) else 1)
    os._exit(2)


@pytest.mark.parametrize("big", ["model", "optimizer", "state", "files"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, big):
    path = checkpoint.save(tmp_path / "final", {"w": torch.zeros(8)}, CONFIG, {"step": 1})
    (tmp_path / "tokenizer.model").write_bytes(b"x" * 5000)
    child = in_child(save_on_a_full_disk, path, big)
    child.join()
    assert child.exitcode == 0
    assert hidden(tmp_path) == []
    back = checkpoint.load(path)
    assert back.state == {"step": 1} and torch.equal(back.tensors["w"], torch.zeros(8))


def save_in_a_loop(run: Path):
    step = checkpoint.load(run).state["step"] if checkpoint.latest(run) else 0
    while True:
        step += 1
        tensors = {f"w{i}": torch.full((20_000,), float(step)) for i in range(4)}
        moments = {f"w{i}:exp_avg": torch.full((20_000,), float(step)) for i in range(4)}
        checkpoint.save_step(run, step, tensors, CONFIG, {"step": step}, moments)
        checkpoint.save(run / "final", tensors, CONFIG, {"step": step}, moments)


def check_whole(saved: checkpoint.Checkpoint) -> int:
    """Every tensor of a checkpoint is of the same step."""
    step = saved.state["step"]
    assert len(saved.tensors) == len(saved.optimizer) == 4
    assert all(bool((t == step).all()) for t in [*saved.tensors.values(), *saved.optimizer.values()])
    return step


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """25 times: save in a loop, kill -9, look. What latest() and the path of the final model name is always whole."""
    rng, last, last_final, at_work = random.Random(0), 0, 0, 0
    start = time.perf_counter()
    checkpoint.save(tmp_path / "warm", {"w": torch.ones(100_000)}, CONFIG)
    one_save = time.perf_counter() - start  # a slow disk gets more time
    for _ in range(25):
        child = in_child(save_in_a_loop, tmp_path)
        time.sleep(rng.uniform(0.02, 0.05 + 10 * one_save))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        at_work += bool(hidden(tmp_path))  # it died between the first byte and the last rename
        if checkpoint.latest(tmp_path):
            before, last = last, check_whole(checkpoint.load(tmp_path))
            assert last >= before
        if last > 1:
            before, last_final = last_final, check_whole(checkpoint.load(tmp_path / "final"))
            assert last_final >= before
    assert last > 5 and at_work > 2  # the loop got somewhere, and the kills hit it while it was writing
    checkpoint.save_step(tmp_path, last + 1, {"w": torch.ones(1)}, CONFIG)
    checkpoint.save(tmp_path / "final", {"w": torch.ones(1)}, CONFIG)
    assert hidden(tmp_path) == []  # the next save clears away what the dead ones left
    assert len(checkpoint.steps(tmp_path)) == 2


@pytest.mark.parametrize("name", ["final", "step_000007"])
def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, monkeypatch, name):
    """Replacing takes two renames. In between the old checkpoint has a hidden name, and load() still finds it."""
    path = checkpoint.save(tmp_path / name, {"w": torch.zeros(2)}, CONFIG, {"step": 1})
    for value in (2, 3):  # killed twice in a row
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", rename_then_die)
            checkpoint.save(path, {"w": torch.ones(2)}, CONFIG, {"step": value})
        assert not path.exists() and len(hidden(tmp_path)) == 1
        assert checkpoint.load(path).state == {"step": 1}
        if name != "final":
            assert checkpoint.load(tmp_path).state == {"step": 1}
        checkpoint.resolve(path).rename(path)  # so that the next round replaces it again
    checkpoint.save(path, {"w": torch.ones(2)}, CONFIG, {"step": 4})
    assert checkpoint.load(path).state == {"step": 4} and os.listdir(tmp_path) == [name]


def rename_then_die(self, target):
    os.rename(self, target)
    raise KeyboardInterrupt


def test_a_directory_with_other_files_is_not_replaced(tmp_path):
    """save() replaces the whole directory: a run directory or a home given by mistake must survive that."""
    (tmp_path / "out").mkdir()
    checkpoint.save(tmp_path / "out", {"w": torch.ones(2)}, CONFIG)  # an empty directory is fine
    (tmp_path / "tokenizer.model").write_text("x")
    checkpoint.save(tmp_path / "out", {"w": torch.ones(2)}, CONFIG, files=[tmp_path / "tokenizer.model"])
    checkpoint.save(tmp_path / "out", {"w": torch.ones(2)}, CONFIG)  # so are the files of a checkpoint
    (tmp_path / "out" / "metrics.jsonl").write_text("{}")
    text = refusal(checkpoint.save, tmp_path / "out", {"w": torch.ones(2)}, CONFIG)
    assert text.startswith(f"{tmp_path}/out holds metrics.jsonl, not part of a checkpoint")
    assert (tmp_path / "out" / "metrics.jsonl").exists() and hidden(tmp_path) == []


@pytest.mark.parametrize("when", ["between the check and the list", "between two tensors"])
def test_a_reader_mixes_no_two_checkpoints(tmp_path, when):
    """A run renames a new one into the place of the one that is being read, tensor by tensor."""
    tensors = {"a": torch.zeros(3), "b": torch.zeros(3)}
    saved = checkpoint.load(checkpoint.save(tmp_path / "best", tensors, {"kind": "test"}))
    saved.check("model.safetensors")
    opened = saved.one_by_one("model.safetensors")
    assert torch.equal(opened["a"], tensors["a"])
    checkpoint.save(tmp_path / "best", {name: x + 1 for name, x in tensors.items()}, {"kind": "test"})
    with pytest.raises(
        ValueError, match=r"model.safetensors was replaced while it was read; run the same command again$"
    ):
        opened["b"] if when == "between two tensors" else saved.one_by_one("model.safetensors")
