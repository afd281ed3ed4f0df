"""Bad input: one clear line on stderr, exit code 2, no traceback, and nothing that was there before is lost."""

import ctypes
import errno
import functools
import importlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import assert_equal_runs
from tiny import ROOT, SMALL, Done, lines

from rlhf.infra import checkpoint

TRAINING = ("train_lm.py", "train_rm.py", "train_ppo.py")
LATEST = "step_000048"  # of the language model


def files(*directories: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for d in directories for file in d.rglob("*") if file.is_file()}


def refused(done: Done, *words: str) -> str:
    """The one line of an error, which must contain these words."""
    assert done.code == 2, done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and done.err.endswith("\n"), done.err
    missing = [word for word in words if word not in done.err]
    assert not missing, f"{missing} not in: {done.err}"
    assert "Traceback" not in done.out + done.err
    return done.err


@pytest.fixture
def bad(world, tmp_path):
    """Run a script that must refuse, and leave its inputs and the place of its output as they were."""

    def run(script: str, *words: str, **options) -> str:
        out = tmp_path / "new" / "out"
        before = files(world.path / "data", world.path / "lm", world.path / "rm", tmp_path)
        changes = {k: v for k, v in options.items() if k not in ("env", "before")}
        if "out" in SMALL[script]:
            changes = {"out": out, **changes}
        done = world.run(script, env=options.get("env"), before=options.get("before"), **changes)
        line = refused(done, *words)
        left = [file.name for file in out.rglob("*") if file.name not in ("run.json", "metrics.jsonl", "samples.jsonl")]
        assert left == [], "a run that did not begin leaves no results"
        assert not any(lines(file) for file in out.glob("*.jsonl"))
        after = files(world.path / "data", world.path / "lm", world.path / "rm", tmp_path)
        assert {f: b for f, b in after.items() if not f.is_relative_to(tmp_path / "new")} == before
        return line

    return run


@pytest.fixture
def copy(world, tmp_path):
    """A copy of a part of the world to be damaged."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(world.path / name, tmp_path / name))

    return make


# ---- the command line


def spoil(script: str, **options):
    return pytest.param(script, options, id=" ".join([script, *(f"{k}={v}" for k, v in options.items())]))


@pytest.mark.parametrize(
    "script, wrong, meant",
    [
        ("train_lm.py", "layer", "layers"),
        ("train_rm.py", "objectve", "objective"),
        ("train_ppo.py", "kl_coeff", "kl_coef"),
        ("sample.py", "temprature", "temperature"),
        ("evaluate.py", "bestof", "best_of"),
    ],
)
def test_unknown_option(bad, script, wrong, meant):
    bad(script, f"--{wrong}", f"did you mean --{meant}?", **{wrong: 1})


@pytest.mark.parametrize(
    "script, options, words",
    [
        ("train_ppo.py", {"kl_target": 6.0}, ("--kl_target has no effect", "--kl_control=adaptive")),
        ("train_ppo.py", {"kl_horizon": 100}, ("--kl_horizon has no effect", "--kl_control=adaptive")),
        ("train_ppo.py", {"judge_every": 5}, ("--judge_every has no effect with --judge=none", "--judge=...")),
        ("train_ppo.py", {"lam": 0.9, "estimator": "rloo", "samples_per_prompt": 2}, ("--lam", "--estimator=gae")),
        ("train_ppo.py", {"critic": "shared", "estimator": "grpo", "samples_per_prompt": 2}, ("--critic", "gae")),
        ("train_ppo.py", {"estimator": "rloo", "samples_per_prompt": 1}, ("rloo", "samples_per_prompt >= 2")),
        ("train_lm.py", {"init": "lm", "layers": None, "heads": None}, ("--width", "--init")),
        ("sample.py", {"prompt": "a", "prompts": "b"}, ("--prompt", "--prompts", "not both")),
        ("sample.py", {"prompt": "a", "temperature": 0, "top_k": 5}, ("temperature 0", "no effect")),
        ("sample.py", {"prompts": "data", "chat": "true"}, ("--prompts=data", "--chat", "no effect")),
        ("sample.py", {"prompts": "rewards.py", "split": "train"}, ("--split has no effect", "rewards.py")),
        ("train_lm.py", {"decay": "cosin"}, ("--decay=cosin", "linear|cosine|constant")),
        ("train_lm.py", {"lr": "fast"}, ("--lr=fast", "number")),
        ("train_lm.py", {"batch": 1.5}, ("--batch=1.5", "integer")),
    ],
    ids=str,
)
def test_ineffective_or_impossible_option(bad, script, options, words):
    bad(script, *words, **options)


@pytest.mark.parametrize(
    "script, name, value",
    [
        *(("train_lm.py", name, 0) for name in ("width", "layers", "heads", "context", "batch", "micro_batch")),
        *(("train_lm.py", name, 0) for name in ("epochs", "log_every", "eval_every", "checkpoint_every")),
        *(("train_lm.py", name, -1) for name in ("lr", "warmup", "weight_decay", "grad_clip", "seed", "epochs")),
        *(("train_rm.py", name, 0) for name in ("batch", "micro_batch", "epochs", "log_every", "checkpoint_every")),
        *((script, "micro_batch_tokens", 1) for script in ("train_lm.py", "train_rm.py", "train_ppo.py")),
        *(("train_rm.py", name, 0) for name in ("reference_samples", "prompt_tokens", "response_tokens")),
        *(
            ("train_ppo.py", name, 0)
            for name in ("batch", "samples_per_prompt", "minibatches", "micro_batch", "epochs")
        ),
        *(("train_ppo.py", name, 0) for name in ("iterations", "response_tokens", "temperature", "sample_every")),
        *(
            ("train_ppo.py", name, -1)
            for name in ("lr", "clip", "kl_coef", "prompt_tokens", "warmup", "target_approxkl")
        ),
        ("train_ppo.py", "gamma", 1.5),
        ("train_ppo.py", "lam", 1.5),
        ("train_ppo.py", "dual_clip", 0.5),
        ("train_ppo.py", "checkpoint_every", 0),
        ("train_ppo.py", "prompt_tokens", 500),
        ("train_ppo.py", "sources", "poems"),
        ("train_rm.py", "sources", "poems"),
        ("train_ppo.py", "batch", 4096),
        ("train_lm.py", "batch", 4096),
        ("train_lm.py", "heads", 5),
        *(("sample.py", name, 0) for name in ("samples", "tokens", "top_p")),
        *(("sample.py", name, -1) for name in ("temperature", "top_k")),
        *(
            ("evaluate.py", name, 0)
            for name in ("prompts", "prompt_tokens", "response_tokens", "temperature", "best_of")
        ),
    ],
)
def test_value_out_of_range(bad, script, name, value):
    """The line names the option or its value."""
    line = bad(script, **{"prompt": "The film"} if script == "sample.py" else {}, **{name: value})
    assert name in line.replace(" ", "_") or str(value) in line


@pytest.mark.parametrize("script", TRAINING)
def test_fp16_needs_a_gpu(bad, script):
    bad(script, "fp16", "cpu", "fp32", precision="fp16")


def test_batch_that_does_not_divide(bad, world, tmp_path):
    bad("train_ppo.py", "batch 16", "3 minibatches", "try 15", minibatches=3)
    bad("train_ppo.py", "8 responses", "micro_batch 3", "try 2", minibatches=2, micro_batch=3)
    bad("train_ppo.py", "batch 16", "samples_per_prompt 3", samples_per_prompt=3)


@pytest.mark.parametrize("script", TRAINING)
def test_batch_that_does_not_divide_by_the_ranks(world, tmp_path, script):
    """Every rank meets the error, and rank 0 says it first; under torchrun once: tests/test_distributed.py."""
    done = world.together(world.command(script, batch=15, out=tmp_path / "out"), 2)
    assert done.code == 2
    line = done.err.splitlines()[0]
    assert line.startswith("error: batch") and "15" in line and "try 14" in line, done.err
    assert not lines(tmp_path / "out/metrics.jsonl")


# ---- the data


@pytest.mark.parametrize("script", [*TRAINING, "evaluate.py"])
def test_no_data(bad, tmp_path, script):
    bad(script, "nowhere", "data.prepare", data=tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "manifest", "split"])
@pytest.mark.parametrize("script", [*TRAINING, "evaluate.py"])
def test_damaged_token_file(bad, copy, script, damage):
    data = copy("data")
    split = data / ("test" if script == "evaluate.py" else "train")
    tokens = split / "00000" / "answers.bin"
    size = tokens.stat().st_size
    match damage:
        case "missing":
            tokens.unlink()
            words = (str(tokens), "missing")
        case "truncated":
            os.truncate(tokens, size - 2)
            words = (str(tokens), str(size), str(size - 2))
        case "longer":
            tokens.write_bytes(tokens.read_bytes() + b"\0\0")
            words = (str(tokens), str(size), str(size + 2))
        case "manifest":
            os.truncate(split / "manifest.json", 100)
            words = (str(split), "JSON")
        case "split":
            shutil.rmtree(split)
            words = (str(split), "manifest.json", "data.prepare")
    bad(script, *words, data=data)


@pytest.fixture(scope="module")
def other(world, tmp_path_factory):
    """The same sentences under another tokenizer, and the fingerprints of both."""
    data = tmp_path_factory.mktemp("other") / "data"
    world.ok("data.prepare", vocab_size=390, out=data)
    prints = [json.loads((d / "manifest.json").read_text())["tokenizer"][:12] for d in (world.path / "data", data)]
    return data, prints


@pytest.mark.parametrize(
    "script, options",
    [
        ("train_lm.py", {"init": "lm", "width": None, "layers": None, "heads": None}),
        ("train_rm.py", {}),
        ("train_ppo.py", {}),
        ("evaluate.py", {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_data_of_another_tokenizer(bad, other, script, options):
    data, prints = other
    bad(script, *prints, "tokenizer", data=data, **options)


@pytest.mark.parametrize("script", [*TRAINING, "evaluate.py"])
def test_tokenizer_was_exchanged_beside_the_token_files(bad, copy, other, script):
    """The ids in the files mean other pieces than the tokenizer says: nothing would crash, everything would be wrong."""
    data = copy("data")
    shutil.copyfile(other[0] / "tokenizer/tokenizer.model", data / "tokenizer/tokenizer.model")
    options = {"width": 32} if script == "train_lm.py" else {}
    bad(script, "tokenizer", other[1][1], data=data, **options)


def test_tokenizer_was_exchanged_in_a_checkpoint(bad, copy, other):
    lm = copy("lm")
    shutil.copyfile(other[0] / "tokenizer/tokenizer.model", lm / LATEST / "tokenizer.model")
    bad("sample.py", str(lm / LATEST), "tokenizer", checkpoint=lm / LATEST, prompt="a")


def test_reward_model_of_another_tokenizer(bad, copy, other):
    rm = copy("rm")
    change_config(rm, lambda config: config | {"tokenizer": other[0].name.ljust(64, "0")})
    bad("train_ppo.py", str(rm), "tokenizer", reward=rm)


# ---- checkpoints


def change_config(run: Path, change) -> None:
    for file in run.glob("step_*/config.json"):
        content = json.loads(file.read_text())
        content |= {"config": change(content["config"])}
        file.write_text(json.dumps(content | {"sha256": checkpoint.own_digest(content)}))


SHAPES = {"width": 64, "layers": 3, "ffn": 192, "vocab_size": 500, "qkv_bias": True, "tied": False}


@pytest.mark.parametrize("name", SHAPES)
def test_checkpoint_of_another_architecture(bad, copy, name):
    """config.json says one thing, the weights another."""
    lm = copy("lm")
    change_config(lm, lambda config: config | {"model": config["model"] | {name: SHAPES[name]}})
    bad("train_ppo.py", str(lm), "another architecture", init=lm)


@pytest.mark.parametrize("script, option", [("train_ppo.py", "reward"), ("evaluate.py", "reward")])
def test_reward_model_of_another_architecture(bad, copy, script, option):
    rm = copy("rm")
    change_config(rm, lambda config: config | {"model": config["model"] | {"layers": 3}})
    bad(script, str(rm), "another architecture", **{option: rm})


@pytest.mark.parametrize(
    "name, value, words", [("experts", 8, ("experts",)), ("norm", "batch", ("'batch'", "rms, layer"))]
)
def test_unknown_field_or_value_in_the_model_config(bad, copy, name, value, words):
    """Written by a newer version, or by hand."""
    lm = copy("lm")
    change_config(lm, lambda config: config | {"model": config["model"] | {name: value}})
    bad("train_ppo.py", *words, init=lm)


@pytest.mark.parametrize(
    "script, options, words",
    [
        ("train_ppo.py", {"init": "rm"}, ("rm", "reward checkpoint", "language model is needed")),
        ("train_rm.py", {"init": "rm"}, ("rm", "reward checkpoint", "language model is needed")),
        ("sample.py", {"checkpoint": "rm", "prompt": "a"}, ("rm", "reward checkpoint", "language model is needed")),
        ("evaluate.py", {"tuned": "rm"}, ("rm", "reward checkpoint", "language model is needed")),
        ("train_ppo.py", {"reward": "lm"}, ("lm", "lm checkpoint", "reward model is needed")),
        ("train_ppo.py", {"init": "nowhere"}, ("nowhere", "no checkpoint")),
        ("train_ppo.py", {"reward": "nowhere"}, ("nowhere", "no checkpoint")),
        ("train_rm.py", {"init": "data"}, ("data", "no checkpoint")),
        ("sample.py", {"checkpoint": "nowhere", "prompt": "a"}, ("nowhere", "no checkpoint")),
        ("evaluate.py", {"base": "nowhere"}, ("nowhere", "no checkpoint")),
    ],
    ids=str,
)
def test_not_the_checkpoint_that_is_needed(bad, script, options, words):
    bad(script, *words, **options)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty config", "no tokenizer"])
def test_damaged_checkpoint(bad, copy, damage):
    step = copy("lm") / LATEST
    model = step / "model.safetensors"
    words = (str(step),)
    match damage:
        case "truncated":
            os.truncate(model, model.stat().st_size // 2)
            words = (str(model), "damaged")
        case "flipped":
            model.write_bytes(b"\xff" * 16 + model.read_bytes()[16:])
            words = (str(model), "damaged")
        case "empty config":
            (step / "config.json").write_text("{}")
        case "no tokenizer":
            (step / "tokenizer.model").unlink()
    bad("sample.py", *words, checkpoint=step, prompt="a")


def test_damaged_checkpoint_of_a_run_that_resumes(world, tmp_path):
    """The newest is cut short: the one before it is complete, and the run ends as it would have."""
    world.ok("train_ppo.py", out=tmp_path / "whole", checkpoint_every=1)
    run = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", run)
    os.truncate(run / "step_000004/model.safetensors", 1000)
    world.ok("train_ppo.py", out=run, checkpoint_every=1)
    assert_equal_runs(run, tmp_path / "whole")


# ---- prompts and rewards


@pytest.mark.parametrize(
    "content, words",
    [(b"", ("empty", "0 prompts")), (b"\n \n\t\n", ("empty", "0 prompts")), (b"caf\xe9\n", ("UTF-8", "byte 3"))],
    ids=["empty", "blank", "latin-1"],
)
def test_prompt_file(bad, tmp_path, content, words):
    (tmp_path / "prompts.txt").write_bytes(content)
    bad("sample.py", str(tmp_path / "prompts.txt"), *words, prompts=tmp_path / "prompts.txt")


def test_no_prompt_file(bad):
    bad("sample.py", "nowhere.txt", prompts="nowhere.txt")


def test_prompt_longer_than_the_context(bad):
    bad("sample.py", "context", "256", prompt="film " * 300)


@pytest.mark.parametrize(
    "reward, words",
    [
        ("rewards.py:nan", ("rewards.py:nan", "16 finite numbers", "nan")),
        ("rewards.py:too_few", ("rewards.py:too_few", "16 finite numbers")),
        ("rewards.py:absent", ("rewards.py", "absent")),
        ("rewards.py", ("write rewards.py:function",)),
        ("nowhere.py:f", ("nowhere.py", "no such file")),
        ("rewards.py:words", ("rewards.py:words", "16 finite numbers")),
        ("rewards.py:nothing", ("rewards.py:nothing", "16 finite numbers")),
    ],
)
def test_reward_function(bad, reward, words):
    bad("train_ppo.py", *words, reward=reward)


@pytest.mark.slow
def test_judge_function(bad):
    bad("evaluate.py", "rewards.py:nan", "finite", judge="rewards.py:nan")
    bad("evaluate.py", "poems", judge="poems")
    bad("train_ppo.py", "poems", judge="poems", judge_prompts=1)
    bad("train_ppo.py", "--judge_prompts=50", "the validation split has", judge="data", judge_prompts=50)


# ---- no space, no permission, no network


def drop_privileges() -> None:
    """Root may write everywhere; without its capabilities it is an ordinary user that owns its files."""
    if os.geteuid() == 0:
        version_3, everything_off = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(version_3, everything_off) == 0


@pytest.mark.skipif(sys.platform != "linux" and os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("script", [*TRAINING, "evaluate.py", "data.prepare"])
def test_no_permission_to_write(world, tmp_path, script):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    done = world.run(script, out=closed / "out", before=drop_privileges)
    refused(done, str(closed), "ermission denied")
    assert list(closed.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux" and os.geteuid() == 0, reason="root may read everywhere")
def test_no_permission_to_read(world, copy):
    lm = copy("lm")
    (lm / LATEST / "model.safetensors").chmod(0)
    done = world.run("sample.py", checkpoint=lm / LATEST, prompt="a", before=drop_privileges)
    refused(done, str(lm), "ermission denied")


@pytest.mark.parametrize("script", TRAINING)
def test_a_file_where_the_run_should_be(world, tmp_path, script):
    (tmp_path / "out").write_text("mine")
    refused(world.run(script, out=tmp_path / "out"), str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def others_slowly(script: str, *more):
    """Parameters of a test of every trainer that the fast suite makes of PPO alone."""
    return pytest.param(script, *more, marks=[pytest.mark.slow] * (script != "train_ppo.py"))


def limit_files(size: int) -> None:
    """As a quota would: no file of this process grows beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
@pytest.mark.parametrize("script, size", [*(others_slowly(s, 60_000) for s in TRAINING), ("train_ppo.py", 1_500)])
def test_files_may_not_grow(world, tmp_path, script, size):
    """The checkpoint is too large, or (1,500 bytes) already the metrics; a run without the limit then ends well."""
    out = tmp_path / "out"
    refused(world.run(script, out=out, before=functools.partial(limit_files, size)), "too large")
    assert not list(out.glob("step_*")) and not list(out.glob(".step*"))
    world.ok(script, out=out)
    assert_equal_runs(out, undisturbed(world, script))


@functools.cache
def undisturbed(world, script: str) -> Path:
    name = {"train_lm.py": "lm", "train_rm.py": "rm", "train_ppo.py": "undisturbed"}[script]
    if not (world.path / name).exists():
        world.ok(script, out=name)
    return world.path / name


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a given size; only root can make one."""
    place = tmp_path / "disk"
    place.mkdir()

    def make(kilobytes: int) -> Path:
        options = f"size={kilobytes}k" + (",remount" if os.path.ismount(place) else "")
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("cannot mount a small file system: not root, or in a container without the right")
        return place

    yield make
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("script", map(others_slowly, TRAINING))
def test_disk_full_then_space_again(world, small_disk, script):
    """Half of the second checkpoint fits: the first stays, the line says what to do, and doing it works."""
    reference = undisturbed(world, script)
    step = next(iter(sorted(reference.glob("step_*"))))
    size = sum(file.stat().st_size for file in step.iterdir()) // 1024
    out = small_disk(size * 3 // 2) / "out"
    done = world.run(script, out=out)
    refused(done, os.strerror(errno.ENOSPC), "free some space")
    assert len(list(out.glob("step_*"))) == 1 and not list(out.glob(".step*"))
    small_disk(10 * size)
    world.ok(script, out=out)
    assert_equal_runs(out, reference)


@pytest.mark.parametrize("script", ["evaluate.py", "data.prepare"])
def test_disk_full(world, small_disk, script):
    out = small_disk(8) / "out"
    refused(world.run(script, out=out), os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_full_standard_output(world, unbuffered):
    """`sample.py > /dev/full`: what could not be printed must not look like success, in Python's own words neither."""
    command = [sys.executable, str(ROOT / "sample.py"), *world.command("sample.py", prompt="The film")[1:]]
    env = world.environment(PYTHONUNBUFFERED=unbuffered)
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=world.path, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and re.fullmatch(r"error: .*\n", done.stderr), done


def test_no_package_index(world, tmp_path):
    """pip cannot reach an index and nothing is cached."""
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "1"}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": "", "PIP_NO_INDEX": ""}
    done = world.run("data.prepare", out=tmp_path / "data", env=env)
    refused(done, "pip could not download vaderSentiment==3.3.2", "no package index", "pip config list")
    assert not (tmp_path / "data").exists() and not list((tmp_path / "cache").rglob("*.gz"))


def test_prepare_does_not_replace_other_directories(world, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    refused(world.run("data.prepare", out=tmp_path / "mine"), str(tmp_path / "mine"), "not prepared data")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_nothing_is_special_about_where_a_script_is_started(world, tmp_path):
    """From another directory, by a path: imports still work, and the error is still one line."""
    command = [sys.executable, str(ROOT / "sample.py"), "--checkpoint=nowhere"]
    environment = {k: v for k, v in world.environment().items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    refused(Done(done.returncode, done.stdout, done.stderr), "nowhere")


@pytest.mark.parametrize(
    "module, words", [("sample", ["--tokens=3"]), ("rlhf.feedback.__main__", ["--store=x", "--rater=a"])]
)
def test_a_closed_input_is_one_line(monkeypatch, module, words):
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        importlib.import_module(module).main()
