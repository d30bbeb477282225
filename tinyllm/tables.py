"""Tables → rows: CSV by Python's own reader, parquet by pyarrow, memory-mapped and in batches."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from tinyllm.errors import UserError
from tinyllm.formats import LIST_COLUMNS, RowError
from tinyllm.printable import one_line
from tinyllm.readers import MAX_ROW_BYTES, Row, kind_of, parse_json, text_lines

PARQUET_BATCH_ROWS = 1000


def read_csv(path: Path) -> Iterator[Row]:
    """Yield one row a record, its cells by the header's names; ``line`` is where it starts.

    Raises:
        UserError: there is no usable header, or a line of more than MAX_ROW_BYTES.
    """
    # the module's own limit of 131,072 characters is less than a long answer
    csv.field_size_limit(MAX_ROW_BYTES)
    delimiter = "\t" if kind_of(path)[0] == ".tsv" else ","
    records = csv.reader(_csv_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = records.line_num + 1
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise UserError(f"{one_line(path)}:{line}: no usable header: {error}") from None
            yield line, RowError(_csv_reason(str(error)))
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _checked_header(path, line, cells, delimiter)
        else:
            yield line, _row_of_cells(header, cells)


def _csv_lines(path: Path) -> Iterator[str]:
    """Lines as text; bytes that are not UTF-8 stay recognisable, so that only their row is lost."""
    for number, raw in text_lines(path):
        if isinstance(raw, RowError):
            raise UserError(f"{one_line(path)}:{number}: {raw}")
        yield raw.decode("utf-8", errors="surrogateescape")


def _csv_reason(error: str) -> str:
    if "unexpected end of data" in error:
        return "not CSV: a quote opened here is never closed, so the rest of the file is one cell"
    return f"not CSV: {error}"


def _checked_header(path: Path, line: int, names: list[str], delimiter: str) -> list[str]:
    names = [name.strip() for name in names]
    place = f"{one_line(path)}:{line}"
    if any(_not_utf8(name) for name in names):
        raise UserError(f"{place}: the header is not UTF-8; save the file as 'CSV UTF-8'")
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise UserError(f"{place}: the header names {one_line(twice[0], 40)!r} twice")
    if len(names) == 1 and any(other in names[0] for other in ";\t,|" if other != delimiter):
        raise UserError(
            f"{place}: the header is a single name, {one_line(names[0], 60)!r}; "
            f"expected cells separated by {'tabs' if delimiter == chr(9) else 'commas'}"
        )
    return names


def _row_of_cells(header: list[str], cells: list[str]) -> object:
    """Cells by name; a cell that must be a list (messages, ...) is JSON."""
    if len(cells) != len(header):
        return RowError(f"{len(cells)} cells, but the header has {len(header)} names")
    if any(_not_utf8(cell) for cell in cells):
        return RowError("not UTF-8; save the file as 'CSV UTF-8'")
    row: dict[str, object] = {name: cell for name, cell in zip(header, cells, strict=True) if name}
    try:
        for name in LIST_COLUMNS & row.keys():
            if str(row[name]).lstrip().startswith("["):
                row[name] = parse_json(str(row[name]))
    except RowError as error:
        return RowError(f"column {name}: {error}")
    return row


def _not_utf8(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield one row a record, without loading the file.

    Raises:
        UserError: it is no parquet file, or a damaged one.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, use_threads=False):
                for row in _rows_of_batch(batch):
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, ValueError, TypeError, KeyError) as error:
        place = f"{path}, after row {number}" if number else f"{path}"
        raise UserError(f"{one_line(place)}: cannot be read: {one_line(error, 200)}") from error


def _rows_of_batch(batch) -> list[object]:
    try:
        return batch.to_pylist()
    except (UnicodeDecodeError, ValueError):
        return [_row_of_record(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _row_of_record(record) -> object:
    try:
        return record.to_pylist()[0]
    except UnicodeDecodeError:
        return RowError("not UTF-8")
    except ValueError as error:  # e.g. a date out of Python's range
        return RowError(f"cannot be read: {one_line(error, 100)}")
