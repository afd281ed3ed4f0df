"""What a run leaves to read: metrics.jsonl, samples.jsonl, and one line per iteration on the console (screen.py).

JSON is strict: a value that is not finite is written as null, which every reader understands; the console shows it.
"""

import math
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from rlhf.infra.files import json_line, read_lines, write_lines
from rlhf.infra.screen import Table, console_line, sample_table


def read_rows(file: str | Path) -> list[dict]:
    """The lines of metrics.jsonl or samples.jsonl; ValueError where one is none, as in a damaged file."""
    rows = read_lines(file)
    for number, row in enumerate(rows, 1):
        if type(row.get("step")) is not int:
            raise ValueError(f"{file}, line {number} has no step: delete that line")
    return rows


class Metrics:
    """Appends to the files of a run directory, on rank 0 alone; elsewhere every call does nothing.

    On resume, lines of `resume_step` and later are dropped: they are about to be made again.
    """

    def __init__(self, run_dir: str | Path, is_main: bool = True, resume_step: int = 0, show: tuple[str, ...] = ()):
        self.is_main, self.show, self.table = is_main, show, Table()  # `show`: the metrics of the console; () = all
        if not is_main:
            return
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        self.metrics_file = open_at(Path(run_dir) / "metrics.jsonl", resume_step)
        self.samples_file = open_at(Path(run_dir) / "samples.jsonl", resume_step)

    def log(self, step: int, values: dict) -> None:
        """One object {"step": step, name: number ...} to metrics.jsonl, and its line to the console."""
        if not self.is_main:
            return
        values = {name: plain(value) for name, value in values.items()}
        write_line(self.metrics_file, {"step": step, **values})
        shown = {name: values[name] for name in self.show or values if name in values}
        width = terminal_width()
        say(console_line(step, shown) if width is None else "\n".join(self.table.lines(step, shown, width)))

    def samples(self, step: int, rows: list[dict], show: int = 3) -> None:
        """Rows {"prompt": text, "response": text, "score": number} to samples.jsonl, the first `show` also printed.

        Lists, such as a number for every token, are stored and not printed.
        """
        if not self.is_main:
            return
        rows = [{name: plain(value) for name, value in row.items()} for row in rows]
        for row in rows:
            write_line(self.samples_file, {"step": step, **row})
        say(sample_table(rows[:show], terminal_width()))

    def close(self) -> None:
        if self.is_main:
            self.metrics_file.close()
            self.samples_file.close()


def open_at(file: Path, step: int):
    """The file opened to append, without its lines of `step` and later."""
    write_lines(file, [row for row in read_rows(file) if row["step"] < step])
    return open(file, "a", encoding="utf-8")


def write_line(file, row: dict) -> None:
    file.write(json_line(row))
    file.flush()  # a killed run keeps every line but perhaps the last


def is_number(x) -> bool:
    """Is this value of a line that somebody may have written by hand a finite number?"""
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def plain(value):
    """A tensor or numpy scalar as a Python number."""
    return value.item() if hasattr(value, "item") else value


def terminal_width() -> int | None:
    """Columns of the terminal that reads along; None where standard output goes elsewhere."""
    return shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else None


def say(text: str, is_main: bool = True) -> None:
    if not is_main:
        return
    tqdm.write(text)  # does not break a progress bar that is being drawn
    sys.stdout.flush()
