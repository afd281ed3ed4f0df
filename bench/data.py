"""Preparing data beside `datasets` and `tokenizers`: the same generated file, tokenizer and number of processes, in turns.

    python bench/data.py --tokenizer=out/demo/base                                        # needs the extra "compare"
    python bench/data.py --tokenizer=out/demo/base --sizes=1000,2000 --kinds=texts --sides=ours --rounds=1

Sentences of the ratings, put together by chance, become texts (1 to 19 sentences a row) or conversations (1 to 3 turns). We
run `python -m data.prepare`: every row checked, duplicates dropped, rows split, answers marked, checksums written. The other
side runs load_dataset("json") and map(num_proc=...) with the same tokenizer (tokenizers' encode_batch; transformers'
apply_chat_template without a mask for conversations), which writes arrow. CPU seconds are those of all processes of a side;
peak memory is VmHWM of its first process and of its largest worker, read from /proc while they run. What counts is the
ratio within a round.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import figures  # noqa: E402
import numpy as np  # noqa: E402
import peers  # noqa: E402

from data import vader  # noqa: E402
from data.tokenizer import load_tokenizer, write_hf  # noqa: E402
from rlhf.infra import config  # noqa: E402
from rlhf.infra.files import write_json  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Config:
    tokenizer: str = "out/demo/base"  # directory with the tokenizer, and its chat template
    kinds: tuple[str, ...] = ("texts", "chats")  # what is generated: texts, chats
    sizes: tuple[int, ...] = (100,)  # of the generated files, MB (10^6 bytes)
    sides: tuple[str, ...] = ("ours", "datasets")  # who runs: ours, datasets
    rounds: int = 3  # every side once per round
    workers: int = 2  # processes of each side
    out: str = "out/bench-data"  # generated files, and report.json; what the sides write is removed
    file: str | None = None  # a generated file that datasets alone prepares, to be timed from outside
    kind: Literal["texts", "chats"] = "texts"  # what is in it [file]

    def __post_init__(self):
        config.at_least(self, rounds=1, workers=1)
        for name, known in (("kinds", ("texts", "chats")), ("sides", ("ours", "datasets"))):
            if wrong := {*getattr(self, name)} - {*known}:
                raise ValueError(f"--{name}={','.join(wrong)}: known are {', '.join(known)}")


def main() -> None:
    cfg = config.parse(Config)
    if cfg.file:
        they(cfg)
        return
    print(f"CPU: {figures.cpu()}")
    found = []
    for kind in cfg.kinds:
        for size in cfg.sizes:
            file = generated(Path(cfg.out), kind, size)
            for number in range(cfg.rounds):
                for side in cfg.sides:
                    row = {"kind": kind, "mb": size, "round": number, "side": side, **measured(cfg, side, kind, file)}
                    found.append(row)
                    print(json.dumps(row), flush=True)
            file.unlink()
    write_json(Path(cfg.out) / "report.json", {"cpu": figures.cpu(), "options": asdict(cfg), "runs": found})
    report(found)


def report(found: list[dict]) -> None:
    print(f"\n{'':<26}{'MB/CPU s':>10}{'ratio':>22}{'first, worker MB':>20}")
    for kind, size in dict.fromkeys((row["kind"], row["mb"]) for row in found):
        rows = [row for row in found if (row["kind"], row["mb"]) == (kind, size)]
        theirs = {row["round"]: row["cpu_seconds"] for row in rows if row["side"] == "datasets"}
        for side in dict.fromkeys(row["side"] for row in rows):
            mine = [row for row in rows if row["side"] == side]
            ratios = [theirs[row["round"]] / row["cpu_seconds"] for row in mine if row["round"] in theirs]
            ratio = figures.ratio(f"preparing {kind}, {size} MB, {side}", "datasets", ratios) if ratios else ""
            speed = statistics.median(size / row["cpu_seconds"] for row in mine)
            memory = [f"{max(row[name] for row in mine):.0f}" for name in ("first_mb", "worker_mb")]
            print(f"{f'{kind}, {size} MB, {side}':<26}{speed:10.2f}{ratio:>22}{', '.join(memory):>20}")


# --- what is prepared ---


def generated(out: Path, kind: str, size: int) -> Path:
    """A file of JSON lines; the same size gives the same bytes, and the larger one begins with the smaller."""
    out.mkdir(parents=True, exist_ok=True)
    rng, left = np.random.default_rng(1), size * 10**6
    sentences = [record.answers[0] for _, record in vader.read_records() if hasattr(record, "answers")]

    def some(most: int) -> str:
        return " ".join(sentences[i] for i in rng.integers(len(sentences), size=rng.integers(1, most + 1)))

    file = out / f"{kind}-{size}.jsonl"
    with open(file, "w", encoding="utf-8") as f:
        while left > 0:
            if kind == "texts":
                row = {"text": some(19), "id": left}
            else:
                turns = [(("user", 4), ("assistant", 8)) for _ in range(rng.integers(1, 4))]
                row = {"messages": [{"role": role, "content": some(most)} for turn in turns for role, most in turn]}
            line = json.dumps(row, ensure_ascii=False) + "\n"
            f.write(line)
            left -= len(line.encode())
    return file


# --- the sides ---


def measured(cfg: Config, side: str, kind: str, file: Path) -> dict[str, float]:
    """CPU seconds of all processes, wall seconds, and the peak memory of the first process and of the largest other one."""
    with tempfile.TemporaryDirectory(dir=cfg.out) as work:
        environment = os.environ | {"HF_DATASETS_CACHE": f"{work}/cache", "TMPDIR": work}
        if side == "ours":
            command = ["-m", "data.prepare", file.resolve(), f"--tokenizer={Path(cfg.tokenizer).resolve()}"]
            command += [f"--out={Path(work).resolve()}/out", f"--workers={cfg.workers}"]
        else:
            write_hf(load_tokenizer(cfg.tokenizer), f"{work}/tokenizer")
            command = [
                Path(__file__).resolve(),
                f"--file={file.resolve()}",
                f"--kind={kind}",
                f"--workers={cfg.workers}",
            ]
            command += [f"--tokenizer={Path(work).resolve()}/tokenizer"]
        begin = time.monotonic()
        with open(f"{work}/output", "w+b") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            seconds, peaks = watch(process)
            first = peaks.pop(process.pid, 0)
            output.seek(0)
            said = output.read().decode().strip().splitlines()
        if process.returncode:
            raise ValueError(f"{side}: {said[-1] if said else process.returncode}")
        facts = {"cpu_seconds": seconds, "wall_seconds": time.monotonic() - begin}
        return facts | {"first_mb": first / 1e6, "worker_mb": max(peaks.values(), default=0) / 1e6}


def watch(process: subprocess.Popen) -> tuple[float, dict[int, int]]:
    """CPU seconds and VmHWM, bytes, of the processes of a session until its leader ends.

    Not ru_maxrss of children: a forked child has its parent's, and keeps it when it becomes another program.
    """
    used, peaks = {}, {}
    while process.poll() is None:
        for pid, seconds, peak in session(process.pid):
            used[pid] = max(seconds, used.get(pid, 0.0))
            peaks[pid] = max(peak, peaks.get(pid, 0))
        time.sleep(0.1)
    return sum(used.values()), peaks


def session(leader: int) -> Iterator[tuple[int, float, int]]:
    """(pid, CPU seconds, VmHWM) of every process of the session."""
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal():
            continue
        try:
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != leader:
                continue
            status = (directory / "status").read_text()
        except OSError:  # it has ended
            continue
        peak = next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)
        yield int(directory.name), (int(fields[11]) + int(fields[12])) / TICK, peak


def they(cfg: Config) -> None:
    """datasets and tokenizers."""
    with peers.installed():
        import datasets
        import tokenizers
        import transformers
    rows = datasets.load_dataset("json", data_files=cfg.file, split="train")
    if cfg.kind == "texts":
        tokenizer = tokenizers.Tokenizer.from_file(f"{cfg.tokenizer}/tokenizer.json")

        def encode(batch):
            return {"input_ids": [one.ids for one in tokenizer.encode_batch(batch["text"])]}
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.tokenizer)

        def encode(batch):
            return {"input_ids": tokenizer.apply_chat_template(batch["messages"], return_dict=False)}

    rows = rows.map(encode, batched=True, num_proc=cfg.workers, remove_columns=rows.column_names)
    print(f"{len(rows):,} rows")


if __name__ == "__main__":
    config.run(main, stopped="stopped")
