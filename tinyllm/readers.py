"""Files → rows.  A row is ``(line, value)``; a row that cannot be read is the RowError saying why.

    .jsonl .ndjson   one JSON object a line
    .json            a list of objects (``line`` is the element's number), or one object a line
    .csv .tsv        a header, then one row a record
    .parquet         ``line`` is the row's number

Each may be compressed (.gz .bz2 .xz), parquet excepted.  Files are read piece by piece: memory does
not grow with their size.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tinyllm.errors import UserError
from tinyllm.formats import RowError
from tinyllm.printable import one_line

Row = tuple[int, object]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BOM = b"\xef\xbb\xbf"
WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
# No conversation is longer; more means that line ends or brackets are broken.
MAX_ROW_BYTES = 16 * 2**20
CHUNK_BYTES = 2**20


def kind_of(path: Path) -> tuple[str, str]:
    """``rows.JSONL.gz`` → ``(".jsonl", ".gz")``; the second is empty where nothing is compressed.

    Raises:
        UserError: an ending that is not read here.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    kind = suffixes[-1] if suffixes else ""
    if kind not in SUFFIXES or (kind == ".parquet" and compression):
        shown = f"{kind}{compression}" or "a file without ending"
        raise UserError(
            f"{one_line(path)}: cannot read {shown} files; expected {', '.join(SUFFIXES)}, "
            f"also with {', '.join(COMPRESSED)} behind it (not parquet)"
        )
    return kind, compression


def read_rows(path: Path) -> Iterator[Row]:
    """Yield every row of a file.

    Raises:
        UserError: the file as a whole cannot be read, from some row on or from the start.
    """
    from tinyllm.tables import read_csv, read_parquet

    kind, line = kind_of(path)[0], 0
    readers = {".parquet": read_parquet, ".csv": read_csv, ".tsv": read_csv, ".json": _read_json}
    try:
        if kind != ".parquet":
            _refuse_wide_text(path)
        for line, row in readers.get(kind, read_json_lines)(path):
            yield line, row
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        place = f"{path}, after row {line}" if line else f"{path}"
        raise UserError(f"{one_line(place)}: cannot be read: {one_line(reason)}") from error


def open_bytes(path: Path) -> BinaryIO:
    """Open a file, unpacking it on the way."""
    return COMPRESSED.get(kind_of(path)[1], open)(path, "rb")


def text_lines(path: Path) -> Iterator[tuple[int, bytes | RowError]]:
    """Yield ``(line, bytes)``; of a line beyond MAX_ROW_BYTES only that it is too long."""
    with open_bytes(path) as file:
        number = 0
        while raw := file.readline(MAX_ROW_BYTES):
            number += 1
            if len(raw) < MAX_ROW_BYTES or raw.endswith(b"\n"):
                yield number, raw.removeprefix(BOM)
                continue
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_ROW_BYTES)
            yield (
                number,
                RowError(f"longer than {MAX_ROW_BYTES // 2**20} MB: are line ends missing?"),
            )


def read_json_lines(path: Path) -> Iterator[Row]:
    """Yield one row a line; empty lines are none."""
    for number, raw in text_lines(path):
        if isinstance(raw, RowError):
            yield number, raw
        elif raw.strip():
            yield number, _row_of_line(raw)


def _row_of_line(raw: bytes) -> object:
    try:
        return parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8")
    except RowError as error:
        return error


def parse_json(text: str) -> object:
    """Parse JSON in which no name is given twice.

    Raises:
        RowError: it cannot be parsed.
    """
    try:
        return STRICT_JSON.decode(text)
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise RowError("not JSON that can be read: nested too deeply") from None
    except RowError:
        raise
    except ValueError as error:  # e.g. an integer of more than 4,300 digits
        raise RowError(f"not JSON that can be read: {one_line(error, 100)}") from None


def _object(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in row if names.count(name) > 1)
        raise RowError(f"the name {one_line(twice, 40)!r} is given twice")
    return row


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_object)


def _read_json(path: Path) -> Iterator[Row]:
    """A list of rows, or, as many ``.json`` files really are, one row a line."""
    with open_bytes(path) as file:
        head = file.read(CHUNK_BYTES).removeprefix(BOM).lstrip()
    if head[:1] == b"{":
        first, line_end, _ = head.partition(b"\n")
        cut_off = not line_end and len(head) > CHUNK_BYTES // 2
        if cut_off or not isinstance(_row_of_line(first), RowError):
            yield from read_json_lines(path)
            return
    if head and head[:1] != b"[":
        raise UserError(
            f"{one_line(path)}: expected a list of rows [...], or one complete object a line"
        )
    if head:
        with open_bytes(path) as file:
            yield from JsonList(path, file)


class JsonList:
    """The elements of one long JSON list, without holding the list.

    Attributes:
        buffer: text that has been read and not been used, from ``place`` on.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer, self.place, self.at_end = "", 0, False

    def __iter__(self) -> Iterator[Row]:
        self._skip("[")
        number = 0
        while self._next_character() != "]":
            if number:
                self._skip(",")
            number += 1
            yield number, self._element(number)
        self._skip("]")
        if self._next_character():
            raise self._broken("there is more text after the list")

    def _element(self, number: int) -> object:
        self._next_character()
        while True:
            try:
                row, end = self._decode()
                if end < len(self.buffer) or self.at_end:
                    self.place = end
                    return row
                problem = "is not closed"
            except json.JSONDecodeError as error:
                problem = f"is not JSON: {error.msg}"
            except RecursionError:
                raise self._broken(f"element {number} is nested too deeply") from None
            except ValueError as error:
                raise self._broken(f"element {number}: {one_line(error, 100)}") from None
            if self.at_end or len(self.buffer) - self.place > MAX_ROW_BYTES:
                raise self._broken(f"element {number} {problem}")
            self._read(max(CHUNK_BYTES, len(self.buffer) - self.place))

    def _decode(self) -> tuple[object, int]:
        try:
            return STRICT_JSON.raw_decode(self.buffer, self.place)
        except RowError as reason:  # a name given twice: the element can be passed over
            return reason, json.JSONDecoder().raw_decode(self.buffer, self.place)[1]

    def _next_character(self) -> str:
        """The next character that is no white space, ``""`` at the end of the file."""
        while True:
            rest = len(self.buffer)
            while self.place < rest and self.buffer[self.place] in " \t\r\n":
                self.place += 1
            if self.place < rest or self.at_end:
                return self.buffer[self.place : self.place + 1]
            self._read(CHUNK_BYTES)

    def _skip(self, expected: str) -> None:
        found = self._next_character()
        if found != expected:
            what = repr(found) if found else "the end of the file"
            raise self._broken(f"expected {expected!r}, found {what}")
        self.place += 1

    def _read(self, size: int) -> None:
        raw = self.file.read(size)
        self.at_end = not raw
        try:
            more = self.decoder.decode(raw, final=self.at_end)
        except UnicodeDecodeError:
            raise self._broken("not UTF-8; save the file as UTF-8") from None
        self.buffer, self.place = self.buffer[self.place :] + more, 0

    def _broken(self, what: str) -> UserError:
        return UserError(f"{one_line(self.path)}: the list cannot be read on: {what}")


def _refuse_wide_text(path: Path) -> None:
    with open_bytes(path) as file:
        head = file.read(4)
    if head.startswith(WIDE_BOMS):
        raise UserError(f"{one_line(path)}: the text is UTF-16 or UTF-32; save the file as UTF-8")
