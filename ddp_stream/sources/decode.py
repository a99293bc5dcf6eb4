"""From Arrow columns to arrays and lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ddp_stream.sources.base import DataError
from ddp_stream.texts import TEXT_TYPES, Texts, end_to_end

_PLAIN = {
    kind.id
    for kind in (
        *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
        *(pa.float16(), pa.float32(), pa.float64()),
    )
}
"""Types whose values lie in a column as they do in an array."""


def decode_column(
    column: pa.ChunkedArray, name: str, path: str, first_row: int, fill_null: float | None
) -> NDArray[Any] | Texts | list[Any]:
    """An Arrow column as an array (numbers, booleans, lists of one length), Texts (strings, bytes) or a list (other lists).

    Timestamps, dates, times and durations become whole numbers in the unit of the file, decimals float64, lists of
    lists of one length arrays of more dimensions, and a pair of `bytes` and `path`, as Hugging Face keeps an image,
    its bytes. Other structs are dicts, maps lists of pairs. A null among strings, bytes, structs or inside lists of them is
    None.

    Args:
        column: the values of one block
        name: the column's name, for errors
        path: the block's file, for errors
        first_row: the row of that file at which the block begins, for errors
        fill_null: stands in for a null number; None makes it an error

    Raises:
        DataError: a null number with no `fill_null`, or a type that no tensor can hold.
    """
    kind = column.type
    if kind.id in _PLAIN and not column.null_count:
        return np.ascontiguousarray(column.to_numpy())
    if isinstance(kind, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type)
        kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        column = pc.struct_field(column, "bytes")
        kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            row, error = next((row, error) for row, value in enumerate(column) if (error := _no_utf8(value)))
            raise DataError(f"{path}: column {name!r} is no UTF-8 text in row {first_row + row} ({error})") from None
        return _texts(column, pa.large_string())
    if _is_binary(kind):
        return _texts(column, pa.large_binary())
    if pa.types.is_struct(kind) or pa.types.is_map(kind):
        return list(column.to_pylist())
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        column = column.cast(pa.large_list(kind.value_type))
        kind = column.type
    if pa.types.is_null(kind):
        column, kind = column.cast(pa.float32()), pa.float32()
    column = _numbers(column)
    kind = column.type
    if column.null_count:
        row = first_row + int(pc.index(column.is_null(), pa.scalar(True)).as_py())
        nested = pa.types.is_nested(kind)
        if fill_null is None or nested:
            fill = "" if nested else ", or choose a value for all nulls with --data.fill_null"
            raise DataError(
                f"{path}: column {name!r} is null in row {row} ({column.null_count} nulls in the {len(column)} rows from "
                f"row {first_row}): a tensor has no null; fill it in the file, leave the column out{fill}"
            )
        try:
            value = pa.scalar(bool(fill_null) if pa.types.is_boolean(kind) else fill_null).cast(kind)
        except pa.ArrowException:
            raise DataError(
                f"{path}: column {name!r} is null in row {row}, and is of type {kind}, which cannot hold the value "
                f"{fill_null} that was chosen for nulls"
            ) from None
        column = column.fill_null(value)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return np.ascontiguousarray(column.to_numpy())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _decode_lists(column, name, path, first_row)
    raise DataError(
        f"{path}: column {name!r} is of type {kind}, which no tensor holds; leave it out with --data.columns, or convert "
        f"it to numbers or strings"
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _numbers(values: Any) -> Any:
    """Decimals, dates and times as plain numbers; other values as they are."""
    kind = values.type
    if pa.types.is_decimal(kind):
        return values.cast(pa.float64())
    if pa.types.is_date32(kind) or pa.types.is_time32(kind):
        return values.cast(pa.int32())
    if pa.types.is_temporal(kind) and not pa.types.is_interval(kind):
        return values.cast(pa.int64())
    return values


def _texts(column: pa.ChunkedArray, large: pa.DataType) -> Texts | list[Any]:
    """A column of strings or bytes; `large` is what its type is kept as if it is one that Texts does not take."""
    if column.type not in TEXT_TYPES:
        column = column.cast(large)
    return end_to_end([Texts(chunk) for chunk in column.chunks or [pa.array([], column.type)]])


def _no_utf8(value: pa.Scalar) -> UnicodeDecodeError | None:
    try:
        value.as_py()
    except UnicodeDecodeError as error:
        return error
    return None


def _decode_lists(column: pa.ChunkedArray, name: str, path: str, first_row: int) -> NDArray[Any] | list[Any]:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no chunk, or too much for one
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    values = _list_values(array, name, path, first_row)
    return list(array.to_pylist()) if values is None else values


def _list_values(array: pa.Array, name: str, path: str, first_row: int) -> NDArray[Any] | list[Any] | None:
    """The lists as one array, if they are of one length, or as a list of arrays; None if they must be Python lists."""
    flat = _numbers(array.flatten())
    kind = flat.type
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)) and len(flat):
        values = None if flat.null_count else _list_values(flat, name, path, first_row)
        if not isinstance(values, np.ndarray):
            return None
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        if flat.null_count:
            raise DataError(f"{path}: column {name!r} has null inside a list, in the rows from row {first_row}")
        values = flat.to_numpy(zero_copy_only=False)
    else:
        return None
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    if len(lengths) and (lengths == lengths[0]).all():
        return np.ascontiguousarray(values.reshape(len(lengths), int(lengths[0]), *values.shape[1:]))
    if values.ndim > 1:
        return None
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
