"""Which device a process gets, and what Apple's GPU is spared or refused; no test here needs one."""

import ast

import pytest
import torch
from tiny import ROOT

from model import generate
from model.generate import drawn_on
from rlhf.infra import offload, optim
from rlhf.infra.distributed import device_of

APPLE = torch.device("mps")


@pytest.mark.parametrize(
    "asked, rank, ranks, gpus, apple, got",
    [
        ("auto", 0, 1, 0, False, "cpu"),
        ("auto", 1, 2, 0, True, "cpu"),  # Apple's has to be asked for
        ("auto", 1, 2, 4, False, "cuda:1"),
        ("cpu", 5, 8, 4, True, "cpu"),
        ("cuda", 0, 1, 1, False, "cuda:0"),
        ("mps", 0, 1, 0, True, "mps"),
        ("cuda", 0, 1, 0, True, "torch finds no CUDA GPU here"),
        ("mps", 0, 1, 1, False, "torch finds no GPU of Apple's"),
        ("mps", 0, 2, 0, True, "2 processes would share Apple's GPU"),
        ("auto", 2, 4, 2, False, "started 4 processes here, but there are 2 GPUs"),
        ("gpu", 0, 1, 1, False, "there is no device 'gpu'; it is auto, cpu, cuda or mps"),
        ("cuda:1", 0, 1, 2, False, "there is no device 'cuda:1'"),
    ],
)
def test_the_choice(asked, rank, ranks, gpus, apple, got):
    if " " not in got:
        assert device_of(asked, rank, ranks, gpus, apple) == torch.device(got)
        return
    with pytest.raises(ValueError, match=got):
        device_of(asked, rank, ranks, gpus, apple)


@pytest.mark.parametrize("script", ["sample.py", "train_lm.py", "evaluate.py"])
def test_a_device_that_is_not_there_is_one_line(world, script):
    done = world.run(script, env={"PLAIN_RLHF_DEVICE": "mps"}, out=None if script == "sample.py" else "nowhere")
    assert (done.code, done.err) == (2, "error: torch finds no GPU of Apple's (mps) here; use cpu, or auto\n")


def test_the_server_chooses_by_the_same_rule(world):
    pytest.importorskip("uvicorn", reason="the server needs the extra serve")
    done = world.start(["serve.py", "--init=lm", "--device=cuda", "--port=0"]).wait()
    assert (done.code, done.err) == (2, "error: torch finds no CUDA GPU here; use cpu, or auto\n")


def test_what_apples_gpu_is_refused():
    for precision in ("bf16", "fp16"):
        with pytest.raises(ValueError, match="mps"):
            optim.amp(APPLE, precision)
    assert optim.amp(APPLE, "fp32").dtype == torch.float32
    place = offload.elsewhere(APPLE, "nowhere")
    with offload.Sleeper(lambda: [], place).awake():
        pass  # nothing was to be put away
    with pytest.raises(ValueError, match="--offload"):
        offload.Sleeper(lambda: [torch.ones(2)], place).sleep()


ON_THE_HOST = {  # files and expressions whose tensors are the host's
    "rlhf/calibration.py", "rlhf/statistics.py", "rlhf/reward/ridge.py", "rlhf/lm/distill.py", "rlhf/reward/files.py",
    "model/quantize.py", "model/hf.py", "rlhf/check/dump.py", "rlhf/check/conventions.py", "rlhf/reward/objective.py",
    "train_rm.py", "iterate.py", "loader.weights(pairs).sum()", "batch.weight", "margins > 0", "margins == 0",
}  # fmt: skip


def test_what_becomes_float64_is_on_the_host():
    """`x.cpu().double()`, not the other way round; and tokens, whose uniforms are float64, are drawn there."""
    assert drawn_on(torch.device("mps", 0)) == torch.device("cpu") and drawn_on(torch.device("cuda", 1)).index == 1
    rooms = [ROOT.glob("*.py"), *((ROOT / room).rglob("*.py") for room in ("model", "rlhf", "evaluation"))]
    wrong = []
    for file in [file for room in rooms for file in room]:
        name = file.relative_to(ROOT).as_posix()
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        wide = [ast.unparse(f.value) for f in calls if isinstance(f, ast.Attribute) and f.attr == "double"]
        wrong += [f"{name}: {x}" for x in wide if ".cpu()" not in x and not {name, x} & ON_THE_HOST]
    assert wrong == []


def test_the_host_draws_with_every_setting(monkeypatch):
    """A device that is not where it draws: what the host draws there is what it draws for itself."""
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(1)) * 3
    uniforms = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    settings = [(1.0, 0, 1.0, 0.3), (0.7, 3, 1.0, 0.0), (1.3, 0, 0.5, 0.0)]
    here = [generate.draw(logits, uniforms, *how) for how in settings]
    for how, expected in zip(settings, here):
        asked = iter([APPLE])  # then the host
        monkeypatch.setattr(generate, "drawn_on", lambda device, asked=asked: next(asked, device))
        for x, y in zip(generate.draw(logits, uniforms, *how), expected):
            assert torch.equal(x, y)
