"""CSV and TSV files, by an index of byte offsets."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from datetime import datetime, time

import pyarrow as pa
import pyarrow.compute as pc_compute
import pyarrow.csv as pc

from ddp_stream.sources.base import DataError
from ddp_stream.sources.paths import existing_files
from ddp_stream.sources.selection import search
from ddp_stream.sources.text import OnBadRow, TextSource

_NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
_WHOLE_NUMBER = r"^\s*[-+]?\d{1,18}\s*$"


class Csv(TextSource):
    """Rows of one CSV or TSV file, or of several laid end to end. The first line of each names the columns.

    Fields may be quoted with `"` and then hold separators, line ends and doubled quotes; blank lines are no rows.

    Args:
        paths: the files, in order
        delimiter: what separates fields; by default a tab in `.tsv` files and a comma in others
        fill_null: what stands in for an empty numeric field; None makes it an error
        on_bad_row: with `skip`, a column in which most values are numbers is one of numbers
    """

    quoted = True
    header = True
    blank = b"\r\n"

    def __init__(
        self,
        paths: str | Sequence[str],
        delimiter: str | None = None,
        fill_null: float | None = None,
        on_bad_row: OnBadRow = "raise",
    ) -> None:
        files = existing_files(paths)
        self._chosen = delimiter is not None
        self.delimiter = delimiter or ("\t" if files[0].lower().endswith(".tsv") else ",")
        super().__init__(files, (self.delimiter,), fill_null, on_bad_row)

    def _names(self, path: str, first_line: bytes) -> tuple[str, ...]:
        return _header(path, first_line, self.delimiter, chosen=self._chosen)

    def _common(self, left: pa.Schema, right: pa.Schema, *, one_file: bool) -> pa.Schema | None:
        return _common(left, right, mixed=pa.string() if one_file else None)

    def _types_of_most(self, lines: Sequence[bytes], path: str, names: tuple[str, ...]) -> pa.Schema:
        def parse(rows: Sequence[int]) -> pa.Table:
            return self._parse(b"".join(lines[row] for row in rows), path, names, None, 0)

        bad = search(range(len(lines)), parse)
        good = [row for row in range(len(lines)) if row not in bad]
        if not good:
            return pa.schema([(name, pa.null()) for name in names])
        table = parse(good)
        fields = []
        for field in table.schema:
            column, kind = table.column(field.name), field.type
            if pa.types.is_string(kind):
                numbers = column.filter(pc_compute.match_substring_regex(column, _NUMBER))
                if len(numbers) > len(column) / 2:
                    whole = pc_compute.all(pc_compute.match_substring_regex(numbers, _WHOLE_NUMBER)).as_py()
                    kind = pa.int64() if whole else pa.float64()
            fields.append(pa.field(field.name, kind))
        return pa.schema(fields)

    def _parse(
        self, data: bytes, path: str, names: tuple[str, ...], schema: pa.Schema | None, first_row: int
    ) -> pa.Table:
        convert = pc.ConvertOptions(
            column_types=schema,
            include_columns=list(schema.names) if schema is not None else None,
            strings_can_be_null=False,
        )
        try:
            table = pc.read_csv(
                io.BytesIO(data),
                read_options=pc.ReadOptions(column_names=list(names), use_threads=False, block_size=len(data) + 1),
                parse_options=pc.ParseOptions(delimiter=self.delimiter, newlines_in_values=True),
                convert_options=convert,
            )
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: {_explain(str(error), names, schema, first_row)}") from None
        for name in [field.name for field in table.schema if pa.types.is_binary(field.type)]:  # found so, not asked for
            values = table.column(name).to_pylist()
            row = first_row + next(row for row, value in enumerate(values) if not _is_utf8(value))
            raise DataError(
                f"{path}: column {name!r} is no UTF-8 text in row {row}; convert the file, as with iconv -f latin1 -t utf-8"
            )
        return table


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


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


def _header(path: str, line: bytes, delimiter: str, *, chosen: bool) -> tuple[str, ...]:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the first line does not name columns in UTF-8: {error}") from None
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    names, *more = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    if more:
        raise DataError(
            f"{path}: the first line holds a carriage return, and only a line feed ends a row, so that {len(more)} rows "
            f"would be lost in the header; convert the line ends"
        )
    if text.lstrip().startswith('{"'):
        raise DataError(
            f"{path}: the first line is an object of JSON, and would be lost as a header: name the file .jsonl"
        )
    other = next((mark for mark in ";\t|" if mark in text), None)
    if len(names) == 1 and other is not None and not chosen and '"' not in text:
        raise DataError(
            f"{path}: the header is the one column {names[0]!r}; if {other!r} separates columns, say so with --data.source "
            f"ddp_stream.sources.Csv --data.source.paths {path} --data.source.delimiter {other!r}"
        )
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
