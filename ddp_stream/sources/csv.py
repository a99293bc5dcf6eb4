"""CSV and TSV files, by an index of byte offsets: any row can be read without the ones before it.

    one pass over the bytes -> where every 4,096th row begins -> a block is parsed when its rows are asked for

The types of the columns are found on up to 16 blocks spread over each file, and hold for all of them.
"""

from __future__ import annotations

import csv
import io
import mmap
import re
from collections.abc import Sequence
from datetime import datetime, time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
from numpy.typing import NDArray

from ddp_stream.sources.base import DataError, Ints
from ddp_stream.sources.files import BlockSource, check_distinct, existing_files, schema_difference

BLOCK_ROWS = 4096
_SCAN_BYTES = 4 << 20
_SAMPLED_BLOCKS = 16
_NEWLINE, _RETURN, _QUOTE = b'\n\r"'


class Csv(BlockSource):
    """Rows of one CSV or TSV file, or of several laid end to end. The first line of each names the columns.

    Fields may be quoted with `"` and then hold separators, line ends and doubled quotes; blank lines are no rows.

    Args:
        paths: the files, in order
        delimiter: what separates fields; by default a tab in `.tsv` files and a comma in others
        fill_null: what stands in for an empty numeric field; None makes it an error
    """

    def __init__(
        self, paths: str | Sequence[str], delimiter: str | None = None, fill_null: float | None = None
    ) -> None:
        files = existing_files(paths)
        self.delimiter = delimiter or ("\t" if files[0].lower().endswith(".tsv") else ",")
        sizes: list[Ints] = []
        block_file: list[Ints] = []
        byte_ranges: list[NDArray[np.int64]] = []
        schema: pa.Schema | None = None
        for index, path in enumerate(files):
            starts, rows, names = _index(path, self.delimiter)
            if len(rows) == 0:
                raise DataError(f"{path} has a header but no rows: there is nothing to train on")
            check_distinct(path, names)
            found = self._infer(path, starts, names)
            common = found if schema is None else _common(schema, found, mixed=None)
            if common is None:
                assert schema is not None
                raise DataError(schema_difference(path, found, files[0], schema))
            schema = common
            sizes.append(rows)
            block_file.append(np.full(len(rows), index))
            byte_ranges.append(np.stack([starts[:-1], starts[1:]], axis=1))
        assert schema is not None
        self._byte_ranges = np.concatenate(byte_ranges)
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        self._names = tuple(schema.names)
        super().__init__(files, offsets, np.concatenate(block_file), schema, fill_null)

    def _open(self, path: str) -> Any:
        return _map(path)

    def _read_block(self, handle: Any, block: int) -> pa.Table:
        start, end = self._byte_ranges[block].tolist()
        path = self.paths[self._block_file[block]]
        return self._parse(handle[start:end], path, self._names, self._schema, self._row_in_file(block))

    def _infer(self, path: str, starts: Ints, names: tuple[str, ...]) -> pa.Schema:
        """The types that hold on blocks spread over the file."""
        blocks = np.unique(np.linspace(0, len(starts) - 2, _SAMPLED_BLOCKS).astype(np.int64)).tolist()
        data = _map(path)
        schema: pa.Schema | None = None
        for block in blocks:
            found = self._parse(data[starts[block] : starts[block + 1]], path, names, None, block * BLOCK_ROWS).schema
            schema = found if schema is None else _common(schema, found, mixed=pa.string())
        assert schema is not None
        return schema

    def _parse(
        self, data: bytes, path: str, names: tuple[str, ...], schema: pa.Schema | None, first_row: int
    ) -> pa.Table:
        convert = pc.ConvertOptions(
            column_types=schema,
            include_columns=list(schema.names) if schema is not None else None,
            strings_can_be_null=False,
        )
        try:
            return pc.read_csv(
                io.BytesIO(data),
                read_options=pc.ReadOptions(column_names=list(names), use_threads=False, block_size=len(data) + 1),
                parse_options=pc.ParseOptions(delimiter=self.delimiter, newlines_in_values=True),
                convert_options=convert,
            )
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: {_explain(str(error), names, schema, first_row)}") from None


def _explain(message: str, names: tuple[str, ...], schema: pa.Schema | None, first_row: int) -> str:
    """Arrow's message with the column by name and the row counted from the start of the file."""

    def row(match: re.Match[str]) -> str:
        return f"row {first_row + int(match[1]) - 1}"

    def column(match: re.Match[str]) -> str:
        return f"column {names[int(match[1])]!r}"

    message = re.sub(r"Row #(\d+)", row, re.sub(r"In CSV column #(\d+)", column, message))
    if "conversion error" in message:
        message += (
            "; the type was found on rows elsewhere in the file: correct this value, or leave the column out with "
            "--data.columns"
        )
    return message


def _common(left: pa.Schema, right: pa.Schema, mixed: pa.DataType | None) -> pa.Schema | None:
    """The schema that holds the values of both; None if there is none.

    Integers and floats make floats, a column without values follows the other side, and whatever else differs is
    `mixed`.
    """
    if left.names != right.names:
        return None
    fields = []
    for a, b in zip(left, right, strict=True):
        if a.type == b.type or pa.types.is_null(b.type):
            kind = a.type
        elif pa.types.is_null(a.type):
            kind = b.type
        elif {a.type, b.type} == {pa.int64(), pa.float64()}:
            kind = pa.float64()
        elif mixed is not None:
            kind = mixed
        else:
            return None
        fields.append(pa.field(a.name, kind))
    return pa.schema(fields)


def _map(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _index(path: str, delimiter: str) -> tuple[Ints, Ints, tuple[str, ...]]:
    """Byte offsets where blocks begin `[blocks + 1]`, rows in each `[blocks]`, and the names in the first line."""
    data = _map(path)
    bom = 3 if data[:3] == b"\xef\xbb\xbf" else 0
    starts: list[int] = []
    rows: list[int] = []
    names: tuple[str, ...] | None = None
    in_block = BLOCK_ROWS
    line_start = bom
    quotes = 0
    for begin in range(bom, len(data), _SCAN_BYTES):
        chunk = np.frombuffer(data, np.uint8, min(_SCAN_BYTES, len(data) - begin), begin)
        ends = np.flatnonzero(chunk == _NEWLINE)
        quote_at = np.flatnonzero(chunk == _QUOTE)
        if quotes or len(quote_at):
            ends = ends[(quotes + np.searchsorted(quote_at, ends)) % 2 == 0]
            quotes = (quotes + len(quote_at)) % 2
        del chunk
        line_ends = ends + begin + 1
        if begin + _SCAN_BYTES >= len(data) and (len(line_ends) == 0 or line_ends[-1] != len(data)):
            line_ends = np.append(line_ends, len(data))  # the last line may lack its line end
        line_starts = np.concatenate([[line_start], line_ends[:-1]]) if len(line_ends) else line_ends
        if len(line_ends) == 0:
            continue
        line_start = int(line_ends[-1])
        blank = _blank(data, line_starts, line_ends)
        line_starts, full_ends = line_starts[~blank], line_ends[~blank]
        if names is None and len(line_starts):
            names = _header(path, bytes(data[line_starts[0] : full_ends[0]]), delimiter)
            line_starts = line_starts[1:]
        while len(line_starts):
            if in_block == BLOCK_ROWS:
                starts.append(int(line_starts[0]))
                rows.append(0)
                in_block = 0
            count = min(BLOCK_ROWS - in_block, len(line_starts))
            rows[-1] += count
            in_block += count
            line_starts = line_starts[count:]
    if quotes:
        raise DataError(f"{path}: a quoted field is never closed, so the rows after it cannot be told apart")
    if names is None:
        raise DataError(f"{path} has blank lines only: there is nothing to train on")
    return np.array([*starts, len(data)], np.int64), np.array(rows, np.int64), names


def _blank(data: mmap.mmap, starts: Ints, ends: Ints) -> NDArray[np.bool_]:
    """Lines with nothing but their line end."""
    length = ends - starts
    blank = np.zeros(len(starts), np.bool_)
    for index in np.flatnonzero(length <= 2).tolist():
        blank[index] = not data[starts[index] : ends[index]].strip(b"\r\n")
    return blank


def _header(path: str, line: bytes, delimiter: str) -> tuple[str, ...]:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the first line does not name columns in UTF-8: {error}") from None
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    names = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    if all(_is_value(name) for name in names):
        raise DataError(
            f"{path}: the first line ({line[:80].decode(errors='replace').strip()!r}) looks like data, not like names of "
            f"columns, and would be lost as a header; write a header line into the file"
        )
    # pandas leaves the name of an index column empty.
    return tuple(name or f"unnamed_{index}" for index, name in enumerate(names))


def _is_value(text: str) -> bool:
    """Whether a field is empty, a number, a truth value, a date or a time: hardly the name of a column."""
    if text.strip().lower() in ("", "true", "false"):
        return True
    for parse in (float, datetime.fromisoformat, time.fromisoformat):
        try:
            parse(text.strip())
        except ValueError:
            continue
        return True
    return False
