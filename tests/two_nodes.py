"""Two machines, played by two network namespaces on this one: `torchrun --nnodes=2`, a lost node, and a restart.

    sudo python tests/two_nodes.py [DIR]      # DIR: where the tiny data and models lie, or are made; Linux, root, ip(8)

Each node has its own network, host name and process ids; a pair of virtual cards joins them. It runs train_ppo.py with
--shard=true (one rank a node) and compares its metrics with those of one process; then again, and kills a node with -9;
then the same command, which goes on. Exit code 0: as it should be.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NODES = {"plain0": "10.77.31.1", "plain1": "10.77.31.2"}
LONGEST = 900  # seconds of a run
OPTIONS = {"precision": "fp32", "iterations": 6, "minibatches": 2, "micro_batch": 2, "checkpoint_every": 2}


def sh(*command: str) -> None:
    subprocess.run(command, check=True)


def build_network() -> None:
    tear_down()
    for node in NODES:
        sh("ip", "netns", "add", node)
        Path("/etc/netns", node).mkdir(parents=True)  # ip netns exec puts these files into /etc: names must resolve
        Path("/etc/netns", node, "hosts").write_text("".join(f"{place} {name}\n" for name, place in NODES.items()))
    sh("ip", "link", "add", "plain0v", "netns", "plain0", "type", "veth", "peer", "name", "plain1v", "netns", "plain1")
    for node, address in NODES.items():
        sh("ip", "-n", node, "address", "add", f"{address}/24", "dev", f"{node}v")
        for card in ("lo", f"{node}v"):
            sh("ip", "-n", node, "link", "set", card, "up")


def tear_down() -> None:
    for node in NODES:
        subprocess.run(["ip", "netns", "delete", node], stderr=subprocess.DEVNULL)
        shutil.rmtree(f"/etc/netns/{node}", ignore_errors=True)


RUNNING: list[subprocess.Popen] = []


def torchrun(world, command: list[str], port: int) -> list[subprocess.Popen]:
    """The command on both nodes."""
    first, started = next(iter(NODES.values())), []
    for node, address in NODES.items():
        inside = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        inside += ["--rdzv_backend=c10d", f"--rdzv_endpoint={first}:{port}", "--rdzv_id=two_nodes"]
        inside += [f"--local_addr={address}", str(ROOT / command[0]), *command[1:]]
        apart = ["ip", "netns", "exec", node, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
        shell = ["sh", "-c", f'hostname {node}; exec "$@"', "sh"]
        env = world.environment(GLOO_SOCKET_IFNAME=f"{node}v", OMP_NUM_THREADS="1", PLAIN_RLHF_TIMEOUT="120")
        log = open(world.path / f"{node}.log", "w")
        how = {"cwd": world.path, "env": env, "stdout": log, "stderr": log, "preexec_fn": die_with_parent}
        started.append(subprocess.Popen([*apart, *shell, *inside], **how))
    RUNNING.extend(started)
    return started


def die_with_parent() -> None:
    """A killed script takes its nodes along; a node its processes, by the namespace that they have."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def end_nodes() -> None:
    for node in RUNNING:
        node.kill()
        node.wait()


def wait(world, nodes: list[subprocess.Popen]) -> list[int]:
    return [node.wait(LONGEST) for node in nodes]


def rows(out: Path) -> list[dict]:
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def worst(ours: list[dict], theirs: list[dict]) -> tuple[float, str]:
    """The largest difference of a metric, relative to its size or to 1."""
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    found = []
    for a, b in zip(ours, theirs):
        for name in a.keys() - {name for name in a if name.startswith(("time/", "perf/"))}:
            if a[name] is not None:
                found.append((abs(a[name] - b[name]) / max(1, abs(a[name])), name))
    return max(found)


def told(world) -> list[str]:
    """The lines of ours in what the nodes said."""
    text = "".join((world.path / f"{node}.log").read_text() for node in NODES)
    return [line for line in text.splitlines() if line.startswith("error: ") or "lost another rank" in line]


def main() -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    sys.path.insert(0, str(ROOT))
    import tiny

    place = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()).resolve()
    place.mkdir(parents=True, exist_ok=True)
    world = tiny.World(place) if (place / "rm").is_dir() else tiny.build(place)
    for name in ("one", "two", "killed"):
        shutil.rmtree(place / name, ignore_errors=True)
    done = world.spawn(world.command("train_ppo.py", out="one", **OPTIONS))
    assert done.code == 0, done.err
    try:
        build_network()

        command = world.command("train_ppo.py", out="two", shard="true", **OPTIONS)
        codes = wait(world, torchrun(world, command, 29501))
        assert codes == [0, 0], (codes, told(world))
        difference, name = worst(rows(place / "one"), rows(place / "two"))
        how_many = f"{len(rows(place / 'two'))} iterations"
        print(f"two nodes against one process: {how_many}, largest difference {difference:.1e} ({name})")
        assert difference < 1e-4

        command = world.command("train_ppo.py", out="killed", shard="true", **OPTIONS)
        nodes = torchrun(world, command, 29502)
        while len(rows(place / "killed")) < 3 and nodes[1].poll() is None:
            time.sleep(0.05)
        nodes[1].send_signal(signal.SIGKILL)  # with its process namespace: everything on that machine
        began = time.monotonic()
        codes = wait(world, nodes)
        print(f"a node killed after {len(rows(place / 'killed'))} iterations: the other ends with {codes[0]}, "
              f"{time.monotonic() - began:.0f} s later, and says")  # fmt: skip
        lines = told(world)
        print("\n".join(f"    {line}" for line in lines))
        assert codes[0] != 0 and len(lines) == 1, (codes, lines)

        codes = wait(world, torchrun(world, command, 29503))
        assert codes == [0, 0], (codes, told(world))
        difference, name = worst(rows(place / "one"), rows(place / "killed"))
        print(
            f"the same command again: {len(rows(place / 'killed'))} iterations, largest difference {difference:.1e} ({name})"
        )
        assert difference < 1e-4
    finally:
        end_nodes()
        tear_down()
    return 0


if __name__ == "__main__":
    if os.geteuid() != 0 or not shutil.which("ip"):
        raise SystemExit("two_nodes.py makes network namespaces: run it as root, where ip (iproute2) is installed")
    raise SystemExit(main())
