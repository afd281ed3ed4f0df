"""Files -> rows: JSON lines, JSON arrays, comma- or tab-separated tables, plain text, parquet, each also gzipped.

The content decides what a file is; its ending helps only where the content leaves it open. What cannot be read becomes a
`Bad` row with a reason, and the next row is read all the same. Memory holds a few rows, never a file.

    for where, row in rows(["mine.jsonl", "more/*.csv.gz"]):
        ...  # row is a dict, or a Bad with its reason
"""

from __future__ import annotations

import codecs
import csv
import datetime
import glob
import gzip
import io
import json
import math
import re
import shutil
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

LONGEST_ROW = 64 << 20  # bytes; a longer one is a file without line ends
LONGEST_TABLE_ROW = 16 << 20  # bytes; beyond, a quotation mark was never closed
DEEPEST = 100  # levels of JSON in a row
HEAD = 1 << 20  # bytes that are looked at to recognise a file
BLOCK = 1 << 20
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")
JSON_ENDINGS, TABLE_ENDINGS = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv")
NOT_DATA = re.compile(r"(readme|licen[cs]e|copying|notice|requirements|dataset_\w+|state|config)\.", re.IGNORECASE)
REFUSED = {  # first bytes of what people also have, and what to do with it
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it with `zstd -d` first",
    b"\xfd7zXZ\x00": "compressed with xz; unpack it with `xz -d` first",
    b"BZh": "compressed with bzip2; unpack it with `bzip2 -d` first",
    b"ARROW1": "an arrow file; write it as parquet first",
    b"\xff\xff\xff\xff": "an arrow stream; write it as parquet first",
    b"SQLite format 3": "a SQLite file; export its rows as JSON lines first",
}
MARKS = {  # byte order marks, the longer ones first
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
csv.field_size_limit(LONGEST_ROW)  # 128 kB otherwise


class Border(NamedTuple):
    """Where a row ends."""

    offset: int  # bytes of the (unzipped) file
    line: int  # number of the line there


class Bad(NamedTuple):
    """A row that cannot be read."""

    reason: str


class Duplicate(NamedTuple):
    """A row that its reader calls the same as an earlier one."""


@dataclass(frozen=True)
class Container:
    """What a file is."""

    path: Path
    kind: str  # jsonl, json, objects, csv, text, parquet
    zipped: bool = False
    encoding: str = ""  # what its byte order mark says: utf-16 or utf-32; "" = UTF-8
    returns: bool = False  # its lines end at \r
    delimiter: str = ","  # of a table
    quoting: int = csv.QUOTE_MINIMAL  # of a table
    columns: tuple[str, ...] = ()  # of a table: its first row
    unit: str = "paragraph"  # of a text: what one row is, paragraph or line
    name: str = ""  # as the user gave it, where `path` is a copy

    def __str__(self) -> str:
        tables = {",": "comma-separated", "\t": "tab-separated", ";": "semicolon-separated"}
        names = {"jsonl": "JSON lines", "json": "JSON array", "objects": "JSON objects", "text": f"{self.unit}s"}
        shown = (names | {"csv": tables[self.delimiter]}).get(self.kind, self.kind)
        return shown + f", {self.encoding.upper()}" * bool(self.encoding) + ", gzipped" * self.zipped

    @property
    def plain(self) -> bool:
        """Are its bytes what is read, so that it can be cut?"""
        return not (self.zipped or self.encoding or self.returns)

    @property
    def shown(self) -> str:
        return self.name or str(self.path)


@dataclass(frozen=True)
class Piece:
    """Some rows of a file, one after another: a whole file, or what lies between two borders of rows."""

    container: Container
    start: int = 0  # bytes of the (unzipped) file; row groups of parquet
    stop: int | None = None
    first: int = 1  # number of its first line, of its first row in parquet


def rows(names: Iterable[str | Path], known: Collection[str] = ()) -> Iterator[tuple[str, dict | Bad]]:
    """(where, row) of every row of all files. ValueError for a file that is no container, OSError where none can be read."""
    for path in find_files(names):
        container = sniff(path, known)
        for number, row in read(Piece(container)):
            yield place(container, number), row


def rows_with(path: str | Path, names: Collection[str]) -> Iterator[tuple[str, dict]]:
    """(where, row) of every row of a file, each with these texts and whatever else. ValueError names the row that has not."""
    for where, row in rows([path], names):
        if isinstance(row, Bad):
            raise ValueError(f"{where}: {row.reason}")
        for name in names:
            if not isinstance(row.get(name), str):
                raise ValueError(f"{where} has no text {name!r}; it has {', '.join(row) or 'nothing'}")
        yield where, row


def place(container: Container, number: int) -> str:
    return f"{container.shown}, {'row' if container.kind == 'parquet' else 'line'} {number}"


# --- which files ---


def find_files(names: Iterable[str | Path]) -> list[Path]:
    """The files that names, directories and globs stand for, in order, each once. ValueError where there is none.

    Of a directory those with the endings of data, and no README, licence or configuration.
    """
    found: dict[Path, Path] = {}
    for name in map(str, names):
        path = Path(name)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and is_data(file.relative_to(path)))
            if not inside:
                raise ValueError(f"the directory {name} holds no data; its files end in {', '.join(ENDINGS)}")
        elif path.exists() or name == "-":
            inside = [path]
        else:
            inside = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]
            if not inside:
                raise ValueError(f"no file matches {name}" if glob.has_magic(name) else f"there is no file {name}")
        for file in inside:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def is_data(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return ending(file.name) in ENDINGS and not hidden and not NOT_DATA.match(file.name)


def ending(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


# --- what a file is ---


def sniff(path: Path, known: Collection[str] = (), unit: str = "paragraph", name: str = "") -> Container:
    """What a file is, by its content. ValueError, in one line, for what is not read here.

    known: names of columns, by which the heading of a table is recognised. name: what to call the file.
    """
    container = Container(path, "text", unit=unit, name=name)
    with open(path, "rb") as file:
        container = replace(container, zipped=file.read(2) == b"\x1f\x8b")
    with opened(container) as stream:
        begins = stream.read(4)
    encoding = next((encoding for mark, encoding in MARKS.items() if begins.startswith(mark)), "")
    container = replace(container, encoding=encoding)
    with opened(container) as stream:
        head = stream.read(HEAD)
        cut_off = len(head) == HEAD
        returns = head.count(b"\r") - head.count(b"\r\n") > head.count(b"\n")
        if not returns:
            head += stream.readline(LONGEST_ROW) if cut_off else b""
    for magic, what in REFUSED.items():
        if head.startswith(magic):
            raise ValueError(f"{container.shown} is {what}")
    if head.startswith(b"PAR1"):
        return replace(container, kind="parquet")
    if (zeros := head[:4096].count(0)) * 100 > len(head[:4096]):  # a few are a bad line
        if zeros * 8 > len(head[:4096]):
            what = "UTF-16 or UTF-32 without a byte order mark; convert it with `iconv -f UTF-16LE -t UTF-8`"
        else:
            what = f"binary; what is read here are {', '.join(ENDINGS)} files, gzipped or not"
        raise ValueError(f"{container.shown} is {what}")
    if returns:
        container, head = replace(container, returns=True), head.replace(b"\r", b"\n")
        head = head[: head.rfind(b"\n") + 1] if cut_off else head
    check_utf8(head, container)
    text = head.decode("utf-8-sig", "replace")
    if kind := json_kind(text, ending(container.shown)):
        return replace(container, kind=kind)
    if table := table_kind(text, ending(container.shown), known):
        return replace(container, kind="csv", **table)
    # lines without any JSON in a file that says they are JSON are bad lines, not a text
    return replace(container, kind="jsonl") if ending(container.shown) in JSON_ENDINGS else container


def check_utf8(head: bytes, container: Container) -> None:
    """ValueError where most lines are in some other encoding; a few that are not UTF-8 are bad lines."""
    lines = [line for line in head.splitlines() if line.strip()]
    wrong = [line for line in lines if not line.isascii() and "\ufffd" in line.decode("utf-8", "replace")]
    if len(wrong) >= 3 and len(wrong) * 2 > len(lines):
        try:
            head.decode("utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(
                f"{container.shown} is not UTF-8, first at byte {e.start:,} ({head[e.start]:#x}), nor are {len(wrong)} of "
                f"its first {len(lines)} lines; convert it, e.g. with `iconv -f WINDOWS-1252 -t UTF-8`"
            ) from None


def json_kind(text: str, ending: str) -> str:
    """jsonl, json (an array), objects (over several lines each), or "" for what is none of them."""
    lines = [line.strip().removeprefix("\ufeff") for line in text.split("\n") if line.strip()][:200]
    parsed = [parse(line) if line[0] in "{[" else Bad("") for line in lines]
    objects = sum(isinstance(row, dict) for row in parsed)
    begins = text.lstrip("\ufeff \t\r\n")
    # an array begins with its bracket and goes on over lines; a line that is a list by itself among lines of objects does not
    if re.match(r"\[\s*[\[{\"\d\]]", begins) and not (objects and len(lines) > 1 and is_value(lines[0])):
        return "json"
    if objects and (objects * 10 >= len(lines) or ending in JSON_ENDINGS):
        return "jsonl"
    if re.match(r"\{\s*[\"}]", begins):  # an object over several lines, or a bad line
        return "objects" if is_value(begins, whole=False) else "jsonl"
    return ""


def is_value(text: str, whole: bool = True) -> bool:
    try:
        end = DECODER.raw_decode(text)[1]
    except (ValueError, RecursionError):
        return False
    return not whole or end == len(text)


def table_kind(text: str, ending: str, known: Collection[str]) -> dict:
    """delimiter, quoting and columns of a table, or {} for what is none: the way to read it that makes most sense."""
    best, choice, columns = (0, 0.0, 0), {}, ()
    for delimiter, quoting in (
        (",", csv.QUOTE_MINIMAL),
        ("\t", csv.QUOTE_MINIMAL),
        (";", csv.QUOTE_MINIMAL),
        ("\t", csv.QUOTE_NONE),
    ):
        widths = []
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        while len(widths) < 200:
            try:
                row = next(reader, None)
            except csv.Error:
                row = [""]
            if row is None:
                break
            if row:
                columns = columns if widths else tuple(cell.strip() for cell in row)
                widths.append(len(row))
        if not widths or not all(columns) or len({*columns}) < len(columns):
            continue
        names, by_name = len({*columns} & {*known}), ending in TABLE_ENDINGS
        fits = widths.count(len(columns)) / len(widths)
        alone = len(columns) == 1 and '\n"' not in text[: len(columns[0]) + 5]  # a first line of one word, of a text
        if by_name or not alone and (names > 1 or names and fits == 1 and len(widths) > 1):
            score = (names, fits, len(columns))
            if score > best:
                best, choice = score, {"delimiter": delimiter, "quoting": quoting, "columns": columns}
    return choice


# --- opening ---


@contextmanager
def opened(container: Container, start: int = 0) -> Iterator[BinaryIO]:
    """The bytes of a file, unzipped, in UTF-8, from `start`. ValueError, in one line, where the archive is damaged."""
    try:
        with open(container.path, "rb") as file:
            stream = io.BufferedReader(gzip.GzipFile(fileobj=file), BLOCK) if container.zipped else file
            if container.encoding or container.returns:
                stream = io.BufferedReader(Recoded(stream, container.encoding or None, container.returns), BLOCK)
                while start:
                    start -= len(stream.read(min(start, BLOCK)))
            else:
                stream.seek(start)
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f"{container.shown} is a damaged gzip file ({e}); get it again") from None


class Recoded(io.RawIOBase):
    """The bytes of another stream in UTF-8, and with \\n where its lines end at \\r. What is no text there is none here."""

    def __init__(self, stream: BinaryIO, encoding: str | None, returns: bool):
        self.stream, self.returns, self.waiting, self.ended = stream, returns, b"", False
        self.decoder = codecs.getincrementaldecoder(encoding)("surrogatepass") if encoding else None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.waiting and not self.ended:
            block = self.stream.read(BLOCK)
            self.ended = not block
            self.waiting = self.decoded(block).replace(b"\r", b"\n") if self.returns else self.decoded(block)
        size = min(len(buffer), len(self.waiting))
        buffer[:size], self.waiting = self.waiting[:size], self.waiting[size:]
        return size

    def decoded(self, block: bytes) -> bytes:
        if self.decoder is None:
            return block
        try:
            return self.decoder.decode(block, self.ended).encode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # half a character at the end, or a number beyond all characters
            self.decoder.reset()
            self.ended = True
            return b"\xff"


def unzip(container: Container, target: Path) -> Container:
    """The same file without gzip and in UTF-8, written to `target`."""
    with opened(container) as stream, open(target, "wb") as file:
        shutil.copyfileobj(stream, file, BLOCK)
    return replace(container, path=target, zipped=False, encoding="", returns=False, name=container.shown)


def save_stdin(target: Path) -> Path:
    with open(target, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, BLOCK)
    return target


# --- reading ---


def read(piece: Piece) -> Iterator[tuple[int, dict | Bad]]:
    """(number, row) of a piece: the number of the line where the row begins, of the row itself in parquet."""
    if piece.container.kind == "parquet":
        yield from parquet_rows(piece)
        return
    with opened(piece.container, piece.start) as stream:
        for number, row, _ in READERS[piece.container.kind](stream, piece):
            yield number, row


def cut(container: Container, size: int) -> list[Piece]:
    """The file in pieces of about `size` bytes, cut between rows: one pass over it, in order."""
    if container.kind == "parquet":
        return cut_parquet(container, size)
    with opened(container) as stream:
        ends = line_borders(stream, size) if container.kind == "jsonl" else row_borders(stream, container, size)
        pieces, start, first = [], 0, 1
        for end, line in ends:
            pieces.append(Piece(container, start, end, first))
            start, first = end, line
    if pieces:  # what is missing at the end is seen by who reads on to there
        pieces[-1] = replace(pieces[-1], stop=None)
    return pieces


def line_borders(stream: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """(offset, number of the line that begins there) of borders between lines, and of the end."""
    offset, line = 0, 1
    while block := stream.read(size):
        offset, line = offset + len(block), line + block.count(b"\n")
        while block and not block.endswith(b"\n"):
            block = stream.readline(BLOCK)
            offset, line = offset + len(block), line + block.count(b"\n")
        yield offset, line


def row_borders(stream: BinaryIO, container: Container, size: int) -> Iterator[tuple[int, int]]:
    """The same where a row may have several lines."""
    start, end, line = 0, 0, 1
    for _, _, (end, line) in READERS[container.kind](stream, Piece(container)):
        if end - start >= size:
            yield end, line
            start = end
    if end > start:
        yield end, line


def lines_of(stream: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes | Bad, Border]]:
    """(number, line, its end) of a piece. Lines end at \\n alone: U+2028 and its like do not end one."""
    number, offset = piece.first - 1, piece.start
    while piece.stop is None or offset < piece.stop:
        line = stream.readline(LONGEST_ROW)
        if not line:
            return
        number, offset = number + 1, offset + len(line)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) == LONGEST_ROW and not line.endswith(b"\n"):
            while (more := stream.readline(BLOCK)) and not more.endswith(b"\n"):
                offset += len(more)
            offset += len(more)
            yield number, Bad(f"the line is longer than {LONGEST_ROW >> 20} MB"), Border(offset, number + 1)
        else:
            yield number, line, Border(offset, number + 1)


def jsonl_rows(stream: BinaryIO, piece: Piece) -> Iterator[tuple[int, dict | Bad, Border]]:
    for number, line, end in lines_of(stream, piece):
        if isinstance(line, bytes):
            line = line.strip().removeprefix(codecs.BOM_UTF8)  # of a second file that was appended
            if not line:
                continue
            try:
                row = parse(line.decode())
            except UnicodeDecodeError as e:
                row = Bad(f"the line is not UTF-8 (its byte {e.start})")
        else:
            row = line
        yield number, row, end


def text_rows(stream: BinaryIO, piece: Piece) -> Iterator[tuple[int, dict | Bad, Border]]:
    """Every line, or every paragraph (between blank lines), as {"text": ...}."""
    held, begins, size, end = [], 0, 0, None
    by_line = piece.container.unit == "line"
    for number, line, after in lines_of(stream, piece):
        blank = isinstance(line, bytes) and not line.strip()
        if held and (blank or size > LONGEST_ROW):
            yield begins, paragraph(held), end
            held, size = [], 0
        if not blank:
            if by_line or isinstance(line, Bad):
                yield number, paragraph([line]), after
            else:
                begins = begins if held else number
                held.append(line)
                size += len(line)
        end = after
    if held:
        yield begins, paragraph(held), end


def paragraph(lines: list[bytes | Bad]) -> dict | Bad:
    if isinstance(lines[0], Bad):
        return lines[0]
    try:
        return {"text": "\n".join(line.decode().rstrip("\r\n") for line in lines)}
    except UnicodeDecodeError as e:
        return Bad(f"the text is not UTF-8 (byte {e.start} of a line)")


# --- tables ---


class TableLines:
    """Lines for csv.reader, which asks for as many as a row has; all but the first can be given back."""

    def __init__(self, lines: Iterator[tuple[int, bytes | Bad, Border]]):
        self.lines, self.back, self.taken, self.size = lines, [], [], 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line, end = self.back.pop() if self.back else next(self.lines)
        self.taken.append((number, line, end))
        if isinstance(line, Bad):
            raise csv.Error(line.reason)
        self.size = len(line) + (self.size if len(self.taken) > 1 else 0)
        if self.size > LONGEST_TABLE_ROW:
            raise csv.Error("a quotation mark is not closed")
        return line.decode("utf-8", "surrogateescape")  # what is no UTF-8 is found in its cell

    def give_back(self) -> None:
        self.back += reversed(self.taken[1:])
        del self.taken[1:]


def table_rows(stream: BinaryIO, piece: Piece) -> Iterator[tuple[int, dict | Bad, Border]]:
    """A row that does not fit gives its further lines back: a quotation mark too many spoils one line, not the file."""
    table, heading, lines = piece.container, piece.start == 0, TableLines(lines_of(stream, piece))
    reader = csv.reader(lines, delimiter=table.delimiter, quoting=table.quoting, strict=True)
    while True:
        lines.taken = []
        try:
            cells = next(reader, None)
            if cells is None:
                return
            row = table_row(cells, table.columns)
        except csv.Error as e:
            cells, row = None, Bad(f"no row of a table: {e}")
        if isinstance(row, Bad):
            lines.give_back()
        if not heading and cells != []:  # csv.reader's word for a blank line
            yield lines.taken[0][0], row, lines.taken[-1][2]
        heading = False


def table_row(cells: list[str], columns: tuple[str, ...]) -> dict | Bad:
    if len(cells) != len(columns):
        return Bad(f"{len(cells)} cells where the table has {len(columns)} columns ({', '.join(columns):.100})")
    for column, cell in zip(columns, cells):
        if not cell.isascii() and not is_utf8(cell):
            return Bad(f"{column} is not UTF-8")
    return dict(zip(columns, cells))


def is_utf8(text: str) -> bool:
    """Does a text have no half of a surrogate pair, as surrogateescape writes bytes that are no UTF-8?"""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- JSON ---


def unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.60} stands twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(text: str) -> dict | Bad:
    """The object that a text spells; Bad, with a reason, for any other."""
    try:
        return checked(DECODER.decode(text), text)
    except json.JSONDecodeError as e:
        return Bad(f"no JSON: {e.msg} at character {e.pos + 1}")
    except ValueError as e:  # a key twice, a number of thousands of digits
        return Bad(f"no JSON: {e}")
    except RecursionError:
        return Bad(f"JSON of more than {DEEPEST} levels")


def checked(value, text: str) -> dict | Bad:
    """The object, or what is wrong with it. text: where it was read from."""
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
        return Bad(f"{kind} where an object was expected: {text.strip()[:40]}")
    if text.count("{") + text.count("[") > DEEPEST and depth(value) > DEEPEST:
        return Bad(f"JSON of more than {DEEPEST} levels")
    if SURROGATE.search(text) and not is_utf8(json.dumps(value, ensure_ascii=False)):
        return Bad("half a surrogate pair (\\ud800 ... \\udfff), which is no character")
    return value


def depth(value) -> int:
    """Levels of lists and objects in a JSON value, without recursion."""
    levels, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        levels += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return levels


SPACE = re.compile(r"[\s,\ufeff]*")
BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


class JSONText:
    """The text of a JSON array, read bit by bit: text[at:] is what was not used yet."""

    def __init__(self, stream: BinaryIO, piece: Piece):
        self.stream, self.left = stream, None if piece.stop is None else piece.stop - piece.start
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.ended = "", 0, False
        self.line, self.offset = piece.first, piece.start  # of text[at]

    def more(self) -> bool:
        """Reads on, as much again as there is; False at the end."""
        size = max(BLOCK, len(self.text) - self.at)
        block = self.stream.read(size if self.left is None else min(size, self.left))
        self.left = None if self.left is None else self.left - len(block)
        self.ended = not block
        self.text, self.at = self.text[self.at :] + self.decoder.decode(block, final=self.ended), 0
        return not self.ended

    def use(self, end: int) -> None:
        used = self.text[self.at : end]
        self.line += used.count("\n")
        self.offset += len(used) if used.isascii() else len(used.encode("utf-8", "surrogateescape"))
        self.at = end

    def next_character(self) -> str:
        """The next one that is no space and no comma, "" at the end."""
        while True:
            self.use(SPACE.match(self.text, self.at).end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self) -> dict | Bad:
        """The value that begins at `at`, which is moved behind it: also behind what is broken."""
        while True:
            broken = None  # where it breaks, if that is no matter of reading on
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end == len(self.text) and not self.ended and self.more():
                    continue  # a number may go on
                text = self.text[self.at : end]
                self.use(end)
                return checked(value, text) if text.isascii() or is_utf8(text) else Bad("the row is not UTF-8")
            except json.JSONDecodeError as e:
                problem = f"no JSON: {e.msg}, {e.pos - self.at + 1} characters into the row"
                if e.pos < len(self.text) - 8 and not e.msg.startswith(("Unterminated", "Invalid")):
                    broken = e.pos
            except ValueError as e:
                problem = f"no JSON: {e}"
            except RecursionError:
                problem = f"JSON of more than {DEEPEST} levels"
            end = self.end_of_value(broken)
            if end is None and len(self.text) - self.at < LONGEST_ROW and self.more():
                continue
            self.use(len(self.text) if end is None else end)
            return Bad(problem)

    def end_of_value(self, broken: int | None) -> int | None:
        """Where a value ends that cannot be read: before the next one that begins like it, or at its last bracket.

        broken: where its JSON breaks. Then a quotation mark may be missing, and brackets alone would mislead.
        """
        indent = re.search(r"\n([ \t]*)$", self.text[max(0, self.at - 200) : self.at])
        first_key = re.compile(r'\{\s*("[^"\\\n]{,100}"\s*:)').match(self.text, self.at)
        if indent:
            next_one = re.compile(rf"\n{indent[1]}(?=[\[{{])").search(self.text, self.at)
        elif broken is not None and first_key:
            next_one = re.compile(rf"\}}\s*,\s*(?=\{{\s*{re.escape(first_key[1])})").search(self.text, broken)
        else:
            next_one = None
        if next_one:
            return next_one.end()
        level = 0
        for token in BRACKET.finditer(self.text, self.at):
            level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
            if level <= 0:
                return token.end() if level == 0 else max(token.start(), self.at + 1)
        return None


def json_rows(stream: BinaryIO, piece: Piece) -> Iterator[tuple[int, dict | Bad, Border]]:
    """The elements of a JSON array, or objects one after another."""
    source, array = JSONText(stream, piece), piece.container.kind == "json"
    inside = array and piece.start > 0
    while begins := source.next_character():
        if array and (begins == "]" or begins == "[" and not inside):
            inside = begins == "["
            source.use(source.at + 1)
            continue
        line, row = source.line, source.value()
        yield line, row, Border(source.offset, source.line)
    if inside and piece.stop is None:
        yield (
            source.line,
            Bad("the file ends before its array does: it was cut off"),
            Border(source.offset, source.line),
        )


READERS = {"jsonl": jsonl_rows, "json": json_rows, "objects": json_rows, "csv": table_rows, "text": text_rows}


# --- parquet ---


@contextmanager
def opened_parquet(container: Container):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{container.shown} is parquet, which needs pyarrow: pip install pyarrow") from None
    try:
        with open(container.path, "rb") as file:
            yield parquet.ParquetFile(file, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"{container.shown} cannot be read as parquet ({' '.join(str(e).split()):.200})") from None


def parquet_rows(piece: Piece) -> Iterator[tuple[int, dict | Bad]]:
    number = piece.first - 1
    with opened_parquet(piece.container) as file:
        groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
        for batch in file.iter_batches(batch_size=256, row_groups=groups, use_threads=False):
            for row in batch.to_pylist(maps_as_pydicts="lossy"):
                number += 1
                row = {name: json_value(value) for name, value in row.items()}
                yield number, row if depth(row) <= DEEPEST else Bad(f"more than {DEEPEST} levels")


def cut_parquet(container: Container, size: int) -> list[Piece]:
    pieces, start, first, number, held = [], 0, 1, 1, 0
    with opened_parquet(container) as file:
        for i in range(file.num_row_groups):
            group = file.metadata.row_group(i)
            number, held = number + group.num_rows, held + group.total_byte_size
            if held >= size or i == file.num_row_groups - 1:
                pieces.append(Piece(container, start, i + 1, first))
                start, first, held = i + 1, number, 0
    return pieces


def json_value(value):
    """A value of a parquet file as JSON has it: dates and decimals as texts, bytes as UTF-8, what is no number as null."""
    if isinstance(value, str | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): json_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner) for inner in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)
