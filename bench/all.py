"""All that this repository says of its speed, met again in half an hour: one table, and report.json.

    python bench/all.py                                   # needs the extra "compare", and nothing else running
    python bench/all.py --only=sampler,reward --minutes=5

Every bench once, one after the other, each with its sides in turns within it; then all of them again while another pass
fits into the time. So a ratio's rounds lie minutes apart, and its [least, most] holds what a machine's drift does to it. A
bench that fails or for which no time was left says so in the table, and the exit code is 2.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import figures  # noqa: E402
import torch  # noqa: E402

from rlhf.infra import config  # noqa: E402
from rlhf.infra.files import write_json  # noqa: E402
from rlhf.infra.precision import has_fast_bf16  # noqa: E402

BENCHES = (  # most wanted first
    "ppo.py --shape=smollm2 --rounds=1 --iterations=1",
    "ppo.py --shape=small --rounds=1 --iterations=1",
    "sampler.py --shape=smollm2 --rounds=1",
    "sampler.py --shape=smollm2 --batch=64 --rounds=1",
    "sampler.py --shape=smollm2 --precision=auto --rounds=1",
    "sampler.py --shape=smollm2 --precision=auto --batch=64 --rounds=1",
    "sampler.py --ragged --rounds=2",
    "reward.py --shape=small --rounds=1 --steps=5",
    "sft.py --shape=small --rounds=1 --steps=5",
    "learning.py --rounds=1",
    "int8.py --rounds=2",
    "int8.py --batch=16 --rounds=2",
)
IN_BF16 = (  # where this CPU is fast at it
    "ppo.py --shape=smollm2 --rounds=1 --iterations=1 --precision=bf16",
    "ppo.py --shape=small --rounds=1 --iterations=1 --precision=bf16 --sides=trl,shared,branch",
    "reward.py --shape=small --rounds=1 --steps=5 --precision=bf16",
    "sft.py --shape=small --rounds=1 --steps=5 --precision=bf16",
    "learning.py --rounds=1 --precision=bf16",
)


@dataclass(frozen=True)
class Config:
    out: str = "out/bench/report.json"  # every ratio, with its command, the CPU and the versions
    minutes: float = 30  # in all; what has not begun or ended by then is left out
    only: tuple[str, ...] = ()  # benches whose commands hold one of these words; none = all

    def __post_init__(self):
        config.at_least(self, minutes=0.1)


def main() -> None:
    cfg = config.parse(Config)
    benches = BENCHES + IN_BF16 * has_fast_bf16(torch.device("cpu"))
    chosen = [words for words in benches if not cfg.only or any(word in words for word in cfg.only)]
    if not chosen:
        raise ValueError(f"--only={','.join(cfg.only)}: no bench is called so; there are\n" + "\n".join(benches))
    found = {words: {"command": f"python bench/{words}", "seconds": [], "ratios": {}} for words in chosen}
    facts = figures.machine()
    ends, took = time.perf_counter() + 60 * cfg.minutes, 0.0
    while took == 0 or time.perf_counter() + took < ends:
        start = time.perf_counter()
        for words, bench in found.items():
            if "failed" not in bench:
                take(words, bench, ends - time.perf_counter())
                write_json(cfg.out, {**facts, "benches": list(map(summary, found.values()))})
        took = time.perf_counter() - start
        if all("failed" in bench for bench in found.values()):
            break
    print(table(found))
    print(f"{facts} -> {cfg.out}")
    if failed := [bench["command"] for bench in found.values() if "failed" in bench]:
        raise ValueError(f"{len(failed)} of {len(found)} benches have no figures, or not all: {'; '.join(failed)}")


def take(words: str, bench: dict, seconds: float) -> None:
    """Run the bench once more, and add its ratios to those that it has, or say why there are none."""
    print(f"{bench['command']} ...", flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "figures.jsonl")
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / words.split()[0]), *words.split()[1:]],
            env=os.environ | {figures.COLLECTED: str(file), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            _, error = process.communicate(timeout=max(seconds, 0.1))
            if process.returncode:
                bench["failed"] = (error.strip().splitlines() or ["no word on stderr"])[-1]
        except subprocess.TimeoutExpired:
            bench["failed"] = "no time was left"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the sides of a bench are processes of their own
                process.wait()
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not rows:
        bench.setdefault("failed", "it left no ratio, see figures.ratio")
    for row in rows:
        bench["ratios"].setdefault((row["what"], row["of"]), []).extend(row["ratios"])
    bench["seconds"].append(round(time.perf_counter() - start, 1))


def summary(bench: dict) -> dict:
    """A bench as report.json has it."""
    ratios = [{"what": what, "of": of, "ratios": ratios} for (what, of), ratios in bench["ratios"].items()]
    return bench | {"ratios": [row | {"said": figures.in_words(row["ratios"])} for row in ratios]}


def table(found: dict[str, dict]) -> str:
    lines = [f"\n{'':<46}{'of':<30}median [least, most]"]
    for bench in found.values():
        lines.append(f"{bench['command']}  ({len(bench['seconds'])} x {max(bench['seconds'], default=0):.0f} s)")
        lines += [f"    failed: {bench['failed']}"] if "failed" in bench else []
        for (what, of), ratios in bench["ratios"].items():
            lines.append(f"    {what:<42}{of:<30}{figures.in_words(ratios)}")
    return "\n".join(lines)


if __name__ == "__main__":
    config.run(main, stopped="stopped; what was met until then is in --out")
