"""python -m rlhf.doctor out/ppo     what is wrong with a PPO run, the likeliest first; exit code 1 where something is."""

import sys
from pathlib import Path

from rlhf.doctor.diagnosis import diagnose, in_words, stops_of
from rlhf.infra import config
from rlhf.infra.files import read_json, read_lines


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    run = Path(sys.argv[1])
    if not (run / "metrics.jsonl").exists():
        raise FileNotFoundError(f"{run} has no metrics.jsonl: the directory of a PPO run was expected")
    rows = [row for row in read_lines(run / "metrics.jsonl") if "objective/kl" in row]
    options = read_json(run / "run.json") if (run / "run.json").exists() else {}
    found = diagnose(rows, options, read_lines(run / "samples.jsonl"), stops_of(run))
    print(in_words(found, len(rows)))
    sys.stdout.flush()
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    config.run(main)
