"""A run directory: who may write there, with which options, and what happens to it when somebody wants the run to end.

The file is its own worker: `python tests/test_run.py OUT [option=value ...]`, or under torchrun, trains a small net.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tiny import World  # noqa: E402

from rlhf.infra import checkpoint, config, distributed, optim, run  # noqa: E402
from rlhf.infra.metrics import Metrics  # noqa: E402
from rlhf.infra.peers import fate  # noqa: E402
from rlhf.infra.signals import NUMBERS  # noqa: E402

OPTIONS = {"lr": 0.01, "steps": 12, "every": 4, "pause": 0.0, "override": []}


def train(out: str, options: dict) -> None:
    dist = distributed.setup()
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    optimizer, scaler = optim.make_optimizer(net, options["lr"]), optim.amp(dist.device).scaler
    free = {name: value for name, value in options.items() if name not in ("pause", "every")}
    this = run.Run(
        out, free | {"checkpoint_every": options["every"]}, net, optimizer, scaler, dist, {"kind": "net"}, []
    )
    learner, log = dist.wrap(net), Metrics(out, dist.is_main, this.done)
    for step in this.steps(options["steps"], "test"):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        learner(x).square().mean().backward()
        log.log(step, {"norm": optim.step(optimizer, net, scaler, 1.0)})
        time.sleep(options["pause"])  # stands for a long step, in which the signal comes
        if this.due(step + 1, options["every"], options["steps"]):
            this.save(step + 1)
    if dist.is_main:
        print("finished", flush=True)
    dist.close()


def main() -> None:
    words = dict(word.split("=") for word in sys.argv[2:])
    train(sys.argv[1], OPTIONS | {name: json.loads(value) for name, value in words.items()})


if __name__ == "__main__":
    config.run(main)
    raise SystemExit


@dataclass(frozen=True)
class Child:
    """A process that trains, forked: torch is imported already."""

    process: multiprocessing.Process
    said: Path
    errors: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def ends(self, seconds: float = 300) -> tuple[int, str, str]:
        self.process.join(seconds)
        return self.process.exitcode, self.said.read_text(), self.errors.read_text()


def child(out: Path, options: dict, said: Path, errors: Path, ignored: tuple) -> None:
    for number, file in ((1, said), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    config.run(lambda: train(str(out), OPTIONS | options))


def start(out: Path, ignored: tuple = (), **options) -> Child:
    said, errors = (out.with_name(f"{out.name}.{time.perf_counter_ns()}.{what}") for what in ("out", "err"))
    process = multiprocessing.get_context("fork").Process(target=child, args=(out, options, said, errors, ignored))
    process.start()
    return Child(process, said, errors)


def torchrun(out: Path, restarts: int = 0, patience: str = "300", look: float = 0.1, **options) -> subprocess.Popen:
    """look: seconds between torchrun's looks at its ranks."""
    words = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
    launcher += [f"--monitor-interval={look}"]
    return subprocess.Popen(
        [sys.executable, *launcher, __file__, str(out), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, start_new_session=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PLAIN_RLHF_TIMEOUT": patience},
    )  # fmt: skip


def ranks_of(process: subprocess.Popen) -> dict[int, int]:
    """{rank: process} of what torchrun has started."""
    found = {}
    for pid in map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                found[int(entry[5:])] = pid
    return found


def lines(out: Path) -> list[dict]:
    file = out / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_for(out: Path, count: int, alive) -> None:
    end = time.monotonic() + 300
    while len(lines(out)) < count:
        assert alive() and time.monotonic() < end
        time.sleep(0.005)


def whole(out: Path, **options) -> tuple:
    """All that an undisturbed run leaves, without clocks and paths."""
    code, _, errors = start(out, **options).ends()
    assert (code, errors) == (0, "")
    return left(out)


def left(out: Path) -> tuple:
    found = []
    for path in checkpoint.steps(out):
        saved = checkpoint.verify(path)
        state = {name: value for name, value in saved.state.items() if name != "seconds"}
        tensors = [{name: x.tolist() for name, x in part.items()} for part in (saved.tensors, saved.optimizer)]
        found.append((path.name, state, *tensors))
    return lines(out), found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple:
    return whole(tmp_path_factory.mktemp("undisturbed") / "out")


@pytest.fixture(scope="module")
def undisturbed_two(tmp_path_factory) -> tuple:
    """What two ranks leave."""
    out = tmp_path_factory.mktemp("two") / "out"
    done = World(out.parent).together([__file__, str(out)], 2)
    assert done.code == 0, done
    return left(out)


# ---- signals


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_the_run_after_its_step(tmp_path, undisturbed, number):
    """... with a checkpoint where it stands, and 128 + n; the same command goes on, and ends as if nothing had been."""
    out = tmp_path / "out"
    running = start(out, pause=0.2)
    wait_for(out, 6, running.process.is_alive)
    os.kill(running.pid, number)
    code, said, errors = running.ends()
    assert code == 128 + number, errors
    done = checkpoint.verify(checkpoint.latest(out)).state["done"]
    assert done == len(lines(out)) and 6 <= done < 12
    name = signal.Signals(number).name
    assert f"stopped by {name} after step {done}: the same command goes on from there" in said
    assert errors == f"{name}: this step is finished and saved first; once more ends at once\n"
    assert whole(out) == undisturbed


def test_a_second_signal_ends_at_once(tmp_path):
    out = tmp_path / "out"
    running = start(out, pause=1000)
    wait_for(out, 1, running.process.is_alive)
    os.kill(running.pid, signal.SIGTERM)
    while "once more" not in running.errors.read_text():
        time.sleep(0.01)
    time.sleep(0.5)  # a person, not torchrun that passes on the same signal
    os.kill(running.pid, signal.SIGTERM)
    code, _, errors = running.ends(60)
    assert code == 143 and "SIGTERM again: ended at once" in errors and checkpoint.latest(out) is None


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_outside_of_the_loop_ends_at_once(number, capsys):
    """While models are opened nothing can be saved: one line, 128 + n."""
    before = signal.signal(number, signal.SIG_DFL)  # a job in the background ignores SIGINT
    try:
        with pytest.raises(SystemExit) as end:
            config.run(lambda: os.kill(os.getpid(), number))
    finally:
        signal.signal(number, before)
    assert end.value.code == 128 + number
    assert capsys.readouterr().err.endswith("stopped; the same command goes on from the last checkpoint\n")


def test_what_is_ignored_stays_ignored(tmp_path):
    """nohup: the terminal closes, the run goes on."""
    out = tmp_path / "out"
    running = start(out, ignored=(signal.SIGHUP,), pause=0.1)
    wait_for(out, 3, running.process.is_alive)
    os.kill(running.pid, signal.SIGHUP)
    assert running.ends()[0] == 0 and len(lines(out)) == 12


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["rank 1", "the group", "torchrun"])
def test_all_ranks_end_after_the_same_step(tmp_path, undisturbed_two, whom):
    out = tmp_path / "out"
    process = torchrun(out, pause=0.2)
    wait_for(out, 5, lambda: process.poll() is None)
    if whom == "rank 1":
        os.kill(ranks_of(process)[1], signal.SIGTERM)
    elif whom == "the group":  # Ctrl-C in a terminal; torchrun passes it on once more
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=300)
    assert process.returncode != 0  # torchrun's own word for it is 1
    done = checkpoint.verify(checkpoint.latest(out)).state["done"]
    assert done == len(lines(out)) and 5 <= done < 12 and f"after step {done}" in said
    done = World(tmp_path).together([__file__, str(out)], 2)
    assert done.code == 0 and left(out) == undisturbed_two, done


# ---- a lost rank


def ours(errors: str) -> list[str]:
    """What stands on stderr without torchrun's own log and traceback."""
    return [line for line in errors.splitlines() if line.startswith(("[rank", "error: ", "lost"))]


@pytest.mark.slow
@pytest.mark.parametrize("rank, pause", [(0, 0.2), (1, 1000)])
def test_a_killed_rank_is_named(tmp_path, rank, pause):
    """By one line of the other, before torchrun's pages; also where the other computes for long and meets nobody."""
    out = tmp_path / "out"
    process = torchrun(out, look=3, pause=pause)  # on a busy machine it would be the first to look
    wait_for(out, 1, lambda: process.poll() is None)
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    (line,) = ours(errors)
    assert line.startswith(f"[rank {1 - rank}] lost another rank of this run: rank {rank} was killed by SIGKILL"), (
        errors
    )
    assert line.endswith("the same command goes on from the last checkpoint")
    assert errors.index(line) < errors.index("Traceback") and errors.index(line) < errors.index("exitcode")


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_in_time(tmp_path):
    out, rank = tmp_path / "out", 0
    process = torchrun(out, patience="10", pause=0.1)
    wait_for(out, 2, lambda: process.poll() is None)
    pids = ranks_of(process)
    os.kill(pids[rank], signal.SIGSTOP)
    began = time.monotonic()
    try:
        while fate(pids[1 - rank]) == "" and time.monotonic() - began < 200:
            time.sleep(0.05)
        assert fate(pids[1 - rank]) != ""
    finally:
        os.kill(pids[rank], signal.SIGKILL)  # torchrun would wait 30 s for it to heed SIGTERM
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    (line,) = ours(errors)
    assert line.startswith(f"[rank {1 - rank}] lost another rank of this run: rank {rank} was stopped"), errors
    assert errors.index(line) < errors.index("Traceback")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_a_lost_rank_again_and_the_run_is_the_same(tmp_path, undisturbed_two, rank):
    out = tmp_path / "out"
    process = torchrun(out, restarts=1, pause=0.1)
    wait_for(out, 6, lambda: process.poll() is None)
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and left(out) == undisturbed_two and len(ours(errors)) == 1, errors


@pytest.mark.parametrize("patience", ["", "soon", "0", "-1", "nan", "inf", "1e99"])
def test_the_patience_with_other_ranks_is_a_number_of_seconds(monkeypatch, patience):
    monkeypatch.setenv("PLAIN_RLHF_TIMEOUT", patience)
    with pytest.raises(ValueError, match=rf"PLAIN_RLHF_TIMEOUT={patience} is not a number of seconds"):
        distributed.patience()


def test_the_fate_of_a_process():
    """As the kernel tells it, while nobody has waited for it."""
    for code, words in (("0", "has ended with 0"), ("3", "has ended with 3"), ("-9", "was killed by SIGKILL")):
        script = f"import os; n = {code}; os.kill(os.getpid(), -n) if n < 0 else os._exit(n)"
        process = subprocess.Popen([sys.executable, "-c", script])
        while not (found := fate(process.pid)):
            time.sleep(0.01)
        assert found.startswith(words)
        process.wait()
        assert fate(process.pid) == "has ended"
    assert fate(os.getpid()) == ""


# ---- one run at a time, with its own options


@pytest.mark.slow
def test_two_at_once(tmp_path, undisturbed):
    out = tmp_path / "out"
    first = start(out, pause=1.0)
    wait_for(out, 1, first.process.is_alive)
    code, _, errors = start(out).ends()
    assert code == 2 and errors.startswith(f"error: {out} is held: ") and errors.count("\n") == 1
    assert first.ends()[0] == 0 and left(out) == undisturbed


@pytest.fixture
def begin(tmp_path):
    """begin() as each of several processes would call it; what one held is let go."""

    def call(options: dict, out: Path = tmp_path / "out", defaults: dict | None = None) -> dict:
        try:
            return run.begin(str(out), options, distributed.Dist(), defaults)
        finally:
            for place in run.HELD:
                os.close(place)
            run.HELD.clear()

    return call


OLD = {"lr": 0.1, "layers": 2, "init": "lm", "init_sha256": "a" * 64, "reward": "r.py:good", "reward_sha256": "b" * 64}
OLD |= {"micro_batch": None, "sample_every": 2, "out": "out", "domains": ["film"], "override": []}


def begun(tmp_path: Path, options: dict = OLD, step: int = 4) -> Path:
    """A run with a checkpoint."""
    out = tmp_path / "out"
    state = {"done": step, "options": {name: value for name, value in options.items() if name not in run.FREE}}
    checkpoint.save_step(out, step, {"w": torch.ones(2)}, {}, state)
    run.write_json(out / "run.json", options)
    return out


def test_all_differences_are_told_at_once(tmp_path, begin):
    out = begun(tmp_path)
    before = (out / "run.json").read_text()
    with pytest.raises(ValueError) as error:
        begin(OLD | {"lr": 0.2, "layers": 3, "new": True})
    text = str(error.value)
    assert text.startswith(
        f"{out} holds a run started with layers=2, lr=0.1, new=None; this command says layers=3, lr=0.2"
    )
    assert "--override=layers,lr,new" in text and "\n" not in text and (out / "run.json").read_text() == before


def test_what_changes_no_number_may_change(tmp_path, begin):
    out = begun(tmp_path)
    ours = OLD | {"micro_batch": 4, "sample_every": 5, "out": "elsewhere", "init": "moved/lm", "reward": "/r.py:good"}
    assert begin(ours) == {}
    assert json.loads((out / "run.json").read_text()) == ours
    with pytest.raises(ValueError, match="reward=r.py:other"):  # the same file, another function
        begin(OLD | {"reward": "r.py:other"})
    with pytest.raises(ValueError, match="init=lm2, init_sha256=cc"):
        begin(OLD | {"init": "lm2", "init_sha256": "c" * 64})


def test_an_option_that_did_not_exist_then_was_at_its_default(tmp_path, begin):
    """A newer version goes on with the runs of an older one, again and again, unless one asks for something else."""
    out, defaults = begun(tmp_path), {"new": 7, "names": (), "lr": 3.0}
    newer = OLD | {"new": 7, "names": ()}
    with pytest.raises(ValueError, match="started with new=7; this command says new=8"):
        begin(newer | {"new": 8}, defaults=defaults)
    assert begin(newer, defaults=defaults) == {}
    assert begin(newer, defaults=defaults) == {}  # run.json knows the option now, the checkpoint does not
    (out / "run.json").unlink()
    assert begin(newer, defaults=defaults) == {}
    with pytest.raises(ValueError, match="lr=0.1; this command says lr=3.0"):  # what the run does say is no default
        begin(newer | {"lr": 3.0}, defaults=defaults)


def test_an_override_is_recorded(tmp_path, begin):
    out = begun(tmp_path)
    with pytest.raises(ValueError, match="--override=lr"):
        begin(OLD | {"lr": 0.2, "layers": 3, "override": ["layers"]})
    ours = OLD | {"lr": 0.2, "init": "lm2", "init_sha256": "c" * 64, "override": ["lr", "init"]}
    changed = {"init": ["lm", "lm2"], "init_sha256": ["a" * 64, "c" * 64], "lr": [0.1, 0.2]}
    assert begin(ours) == changed
    assert json.loads((out / "run.json").read_text()) == ours | {"overrides": [{"step": 4, "changed": changed}]}
    assert begin(ours) == {}  # the same command goes on, before the next checkpoint and after it
    state = {"done": 6, "options": {name: value for name, value in ours.items() if name not in run.FREE}}
    checkpoint.save_step(out, 6, {"w": torch.ones(2)}, {}, state)
    assert begin(ours | {"override": []}) == {}
    assert begin(ours | {"lr": 0.3})["lr"] == [0.2, 0.3]
    assert [record["step"] for record in json.loads((out / "run.json").read_text())["overrides"]] == [4, 6]
    with pytest.raises(ValueError, match="lr=0.3; this command says lr=0.1"):
        begin(OLD | {"init": "lm2", "init_sha256": "c" * 64, "override": []})


@pytest.mark.parametrize("damage", ["gone", "cut", "a list", "deep", "a pipe"])
def test_run_json_is_damaged(tmp_path, begin, damage):
    """The options are in the checkpoint too: the right command goes on, another one is refused."""
    out = begun(tmp_path)
    file = out / "run.json"
    file.unlink()
    if damage == "a pipe":
        os.mkfifo(file)
    elif damage != "gone":
        file.write_text({"cut": '{"lr": 0.', "a list": "[]", "deep": "[" * 100_000}[damage])
    with pytest.raises(ValueError, match="lr=0.1; this command says lr=0.2"):
        begin(OLD | {"lr": 0.2})
    if damage == "a pipe":
        file.unlink()
    assert begin(OLD) == {}
    assert json.loads(file.read_text()) == OLD


def test_run_json_of_another_run(tmp_path, begin):
    out = begun(tmp_path)
    run.write_json(out / "run.json", OLD | {"lr": 0.5})
    with pytest.raises(ValueError, match="run.json says lr=0.5, step_000004 was made with lr=0.1"):
        begin(OLD | {"lr": 0.5})


def test_a_checkpoint_that_does_not_say_its_options(tmp_path, begin):
    """Of format 1: run.json alone knows them."""
    out = begun(tmp_path)
    checkpoint.save_step(out, 4, {"w": torch.ones(2)}, {}, {"done": 4})
    assert begin(OLD) == {}
    (out / "run.json").unlink()
    with pytest.raises(ValueError, match="does not say its options"):
        begin(OLD)


def test_a_run_that_never_began_is_forgotten(tmp_path, begin):
    begin(OLD)
    assert begin(OLD | {"lr": 0.2}) == {}
    assert json.loads((tmp_path / "out/run.json").read_text())["lr"] == 0.2


def test_what_a_kill_left_is_removed(tmp_path, begin):
    out = begun(tmp_path)
    for name in (".run.json.tmp-12", ".report.json.tmp-7", ".metrics.jsonl.tmp"):
        (out / name).write_text("half")
    for name in (".step_000006.tmp-5", ".step_000004.old-5", ".best.old-5"):  # there is no other best
        shutil.copytree(out / "step_000004", out / name)
    shutil.copytree(out / "step_000004", out / "bad/.000004-02-model.tmp-5")
    (out / "bad/.000004-02.safetensors.tmp-5").write_text("half")
    begin(OLD)
    shutil.rmtree(out / ".best.old-5")
    assert not list((out / "bad").iterdir())
    assert sorted(path.name for path in out.glob(".*")) == [".metrics.jsonl.tmp"]  # which Metrics writes anew


# ---- damage is told


@pytest.mark.parametrize("how", ["bit", "config"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(tmp_path, undisturbed, how):
    out = tmp_path / "out"
    whole(out)
    newest = out / "step_000012"
    file = newest / {"bit": "model.safetensors", "config": "config.json"}[how]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    code, said, _ = start(out).ends()
    assert code == 0 and f"{newest} is damaged ({file.name}" in said
    assert f"going on from {out}/step_000008" in said and left(out) == undisturbed
    assert "damaged" not in start(out).ends()[1]


def test_nothing_whole_is_left(tmp_path, undisturbed):
    out = tmp_path / "out"
    whole(out)
    for path in checkpoint.steps(out):
        os.truncate(path / "model.safetensors", 10)
    _, said, _ = start(out).ends()
    assert "it starts again, at step 0" in said and said.count("is damaged") == 2 and left(out) == undisturbed


@pytest.mark.parametrize("kept", [0, 2])
def test_lines_that_were_lost_are_told(tmp_path, kept):
    out = tmp_path / "out"
    whole(out, steps=8)
    rows = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(rows[:kept]))
    _, said, _ = start(out, steps=8).ends()
    assert f"metrics.jsonl has lost {8 - kept} of 8 lines" in said


@pytest.mark.parametrize("line", ["3", "[]", '{"norm": 2}', '{"step": "2"}', '{"step": true}', "[" * 100_000])
def test_a_line_that_is_none(tmp_path, line):
    out = tmp_path / "out"
    whole(out, steps=8)
    rows = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([*rows[:2], line, *rows[3:]]) + "\n")
    code, _, errors = start(out, steps=8).ends()
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert f"{out}/metrics.jsonl, line 3 " in errors


@pytest.mark.parametrize(
    "state", [{"done": 12}, {"done": 12, "seconds": "long", "scaler": {}}, {"done": 12, "seconds": 1.0}]
)
def test_a_state_that_makes_no_sense(tmp_path, state):
    out = tmp_path / "out"
    whole(out)
    saved = checkpoint.load(out)
    options = saved.state["options"]
    checkpoint.save_step(out, 12, saved.tensors, saved.config, state | {"options": options}, saved.optimizer)
    code, _, errors = start(out).ends()
    assert code == 2 and errors.startswith("error: ") and "state.json is damaged" in errors


def test_a_copied_run_goes_on(tmp_path, undisturbed):
    out = tmp_path / "out"
    whole(out)
    shutil.rmtree(out / "step_000012")
    shutil.copytree(out, tmp_path / "copy")
    assert whole(tmp_path / "copy") == undisturbed
