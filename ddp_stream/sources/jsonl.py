"""JSON Lines files, one object a line, by an index of byte offsets."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

from ddp_stream.sources.base import DataError
from ddp_stream.sources.text import OnBadRow, TextSource


class JsonLines(TextSource):
    """Rows of one JSON Lines file, or of several laid end to end. The keys of the objects are the columns.

    A key that a row lacks is null there. Strings that all look like timestamps become whole numbers, seconds since 1970.

    Args:
        paths: the files, in order
        fill_null: what stands in for a null number; None makes it an error
        on_bad_row: with `skip`, the type of a column is that of most of its values
    """

    quoted = False  # a line end inside a string is written \\n
    header = False
    blank = b" \t\r\n"

    def __init__(
        self, paths: str | Sequence[str], fill_null: float | None = None, on_bad_row: OnBadRow = "raise"
    ) -> None:
        super().__init__(paths, (), fill_null, on_bad_row)

    def _names(self, path: str, first_line: bytes) -> tuple[str, ...]:
        return ()

    def _common(self, left: pa.Schema, right: pa.Schema, *, one_file: bool) -> pa.Schema | None:
        names = [*left.names, *(name for name in right.names if name not in left.names)]
        fields = []
        for name in names:
            kinds = [schema.field(name).type for schema in (left, right) if name in schema.names]
            kind = _wider(*kinds) if len(kinds) == 2 else kinds[0]
            if kind is None:
                return None
            fields.append(pa.field(name, kind))
        return pa.schema(fields)

    def _types_of_most(self, lines: Sequence[bytes], path: str, names: tuple[str, ...]) -> pa.Schema:
        try:
            return self._parse(b"".join(lines), path, names, None, 0).schema
        except DataError:
            pass
        seen: dict[str, Counter[pa.DataType]] = {}
        for line in lines:
            try:
                found = _read(line, pj.ParseOptions()).schema
            except (pa.ArrowException, UnicodeDecodeError):
                continue
            for field in found:
                seen.setdefault(field.name, Counter())[field.type] += 1
        fields = []
        for name, kinds in seen.items():
            kind = pa.null()
            for other, _ in kinds.most_common():
                kind = _wider(kind, other) or kind
            fields.append(pa.field(name, kind))
        return pa.schema(fields)

    def _parse(
        self, data: bytes, path: str, names: tuple[str, ...], schema: pa.Schema | None, first_row: int
    ) -> pa.Table:
        some = schema is not None and len(schema.names) < len(names)
        options = pj.ParseOptions(
            explicit_schema=schema,
            unexpected_field_behavior="infer" if schema is None else "ignore" if some else "error",
        )
        try:
            return _read(data, options)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            message = str(error)
        if message.startswith("JSON parse error: Column() changed"):
            message = "there is no object, and a row is an object of JSON on one line,"
        if "in row" in message:
            message = re.sub(r"in row (\d+)", lambda match: f"in row {first_row + int(match[1])}", message)
        else:
            message = f"{message} in row {first_row + self._first_bad(data, path, options)}"
        if schema is not None:
            message += (
                "; keys and types were found on rows elsewhere in the data: correct this row, or leave the column out with "
                "--data.columns"
            )
        raise DataError(f"{path}: {message}")

    def _first_bad(self, data: bytes, path: str, options: Any) -> int:
        row = 0
        for starts, ends in self._lines(data, path):
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                try:
                    _read(data[start:end], options)
                except (pa.ArrowException, UnicodeDecodeError):
                    return row
                row += 1
        return 0


def _read(data: bytes, options: Any) -> pa.Table:
    read_options = pj.ReadOptions(use_threads=False, block_size=len(data) + 1)
    return pj.read_json(io.BytesIO(data), read_options=read_options, parse_options=options)


def _wider(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both, as the reader itself would have found it on all rows."""
    if left == right or pa.types.is_null(right):
        return left
    if pa.types.is_null(left):
        return right
    if {left, right} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if {left, right} == {pa.timestamp("s"), pa.string()}:
        return pa.string()
    if pa.types.is_list(left) and pa.types.is_list(right):
        inner = _wider(left.value_type, right.value_type)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(left) and pa.types.is_struct(right):
        fields = {field.name: field.type for field in left}
        for field in right:
            kind = _wider(fields.get(field.name, pa.null()), field.type)
            if kind is None:
                return None
            fields[field.name] = kind
        return pa.struct(list(fields.items()))
    return None
