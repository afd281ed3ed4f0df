"""python -m rlhf.check DUMP: recompute the numbers of any framework, and name the convention behind a difference."""

from dataclasses import dataclass

from rlhf.check.dump import load_dump
from rlhf.check.recompute import QUANTITIES, check, table
from rlhf.infra.config import parse, run


@dataclass(frozen=True)
class Config:
    dump: str  # .safetensors or .json file; the word "--dump" may be left out
    tolerance: float = 1e-5  # relative to the largest number of a tensor; 1e-2 for bfloat16
    most: int = 2  # conventions that are combined to explain one difference; 3 takes longer


def main() -> None:
    config = parse(Config)
    dump = load_dump(config.dump)
    findings = check(dump, config.tolerance, config.most)
    if all(f.missing for f in findings):
        why = "; ".join(f"{f.quantity} needs {', '.join(f.missing).replace('|', ' or ')}" for f in findings)
        raise ValueError(f"{config.dump}: nothing to check; {why or 'it holds none of ' + ', '.join(QUANTITIES)}")
    if "mask" in dump:
        (rows, columns), tokens = dump["mask"].shape, int(dump["mask"].sum())
        print(f"{config.dump}: {rows} rows, {columns} columns, {tokens} tokens; tolerance {config.tolerance:g}")
    print(table(findings))
    if not all(f.equal or f.missing for f in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
