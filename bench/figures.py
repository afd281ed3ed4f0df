"""Ratios as every bench says them, median [least, most], and as bench/all.py collects them; and what they were met on."""

import json
import os
import statistics
import subprocess
from pathlib import Path

import torch

COLLECTED = "PLAIN_RLHF_FIGURES"  # in the environment: the file that gets every ratio, as a JSON line
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")  # as /proc/cpuinfo spells them


def machine() -> dict[str, str]:
    """What a figure was met on, and at which commit, "-dirty" where the files are not its own."""
    root = Path(__file__).resolve().parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    kernels = torch.backends.cpu.get_cpu_capability()
    return {"cpu": cpu(), "kernels": kernels, "torch": torch.__version__, "commit": git.stdout.strip()}


def ratio(what: str, of: str, ratios: list[float]) -> str:
    """One ratio a round -> "1.60 [1.45, 1.81]": `what` has so many times the speed of `of`, or of what it says itself."""
    if file := os.environ.get(COLLECTED):
        with open(file, "a") as lines:
            lines.write(json.dumps({"what": what, "of": of, "ratios": ratios}) + "\n")
    return in_words(ratios)


def in_words(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def cpu() -> str:
    """Name, cores and those of FLAGS that it has."""
    lines = dict(line.split("\t: ", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if "\t: " in line)
    lines = {name.strip(): value for name, value in lines.items()}
    flags = [flag for flag in FLAGS if flag in lines.get("flags", "").split()]
    return f"{lines.get('model name', 'unknown')}, {os.cpu_count()} cores, {', '.join(flags) or 'none of ' + ', '.join(FLAGS)}"
