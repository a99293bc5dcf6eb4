"""What the file formats share: paths, identities, and rows that are decoded a block at a time."""

from __future__ import annotations

import glob
import hashlib
import os
from abc import abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ddp_stream.sources.base import Columns, DataError, Ints, Source, check_columns, fingerprint_of

CACHE_BYTES = 64 << 20
"""Decoded blocks that a process keeps beyond the ones that its current rows need."""

CODECS = {".gz": "gzip", ".zst": "zstd"}
"""Suffixes of compressed text, and the names of their codecs in Arrow."""
_IDENTITY_BYTES = 64 << 10

Block = dict[str, "NDArray[Any] | list[Any]"]


def existing_files(paths: str | Sequence[str]) -> list[str]:
    """`paths` as a list; raises DataError for one that is not a file, or is empty."""
    files = [paths] if isinstance(paths, str) else list(paths)
    for path in files:
        if not Path(path).is_file():
            raise DataError(f"{path} is not there, or is no file")
        if Path(path).stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes): there is nothing to train on; remove it, or write it again")
    if not files:
        raise DataError("no file was named")
    return files


def suffix_of(path: str | Path) -> str:
    """`.csv`, or `.csv.gz` where it is compressed."""
    path = Path(path)
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() + suffix if suffix in CODECS else suffix


def expand(path: str, suffixes: Sequence[str]) -> list[str]:
    """The files that `path` stands for: itself, those of a directory that have one of `suffixes`, or those of a glob.

    Raises:
        DataError: there is none.
    """
    if Path(path).is_dir():
        inside = sorted(entry for entry in Path(path).iterdir() if entry.is_file() and entry.name[0] not in "._")
        found = [str(entry) for entry in inside if suffix_of(entry) in suffixes]
        if not found:
            seen = ", ".join(entry.name for entry in inside[:5]) or "no files"
            raise DataError(f"{path} is a directory without a file of a known format ({', '.join(suffixes)}): {seen}")
        return found
    if not Path(path).exists() and glob.has_magic(path):
        found = sorted(name for name in glob.glob(path, recursive=True) if Path(name).name[0] not in "._")
        if not found:
            raise DataError(f"{path} matches no file")
        return found
    return [path]


def describe(paths: Sequence[str]) -> str:
    """The one file, or the first of how many, for messages."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def file_identity(path: str) -> tuple[str, int, str]:
    """Name, size in bytes, and a checksum of the first and last 64 KiB: the same for a copy, another for other data.

    The ends hold what formats say about the whole (a Parquet footer, the checksum of a .gz file), and every length. A
    change in the middle of a longer file that leaves its size and its ends alone goes unnoticed.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(file.read(_IDENTITY_BYTES))
        file.seek(max(file.tell(), size - _IDENTITY_BYTES))
        digest.update(file.read(_IDENTITY_BYTES))
    return Path(path).name, size, digest.hexdigest()[:16]


class BlockSource(Source):
    """Rows in files that are decoded a block at a time (a Parquet row group, a byte range of a text file).

    `take` decodes the blocks that its rows touch, and keeps them, up to `CACHE_BYTES`, for the next call: under the
    `blocks` order, which stays inside a few blocks for a while, every block is decoded about once.

    Args of a subclass's `__init__` to pass on:
        paths: the files, in order
        offsets: row ids where blocks begin, `[blocks + 1]`
        block_file: which of `paths` each block is in, `[blocks]`
        schema: column names and types, the same in all files
        fill_null: what stands in for a null in a numeric column; None makes a null an error
    """

    def __init__(
        self,
        paths: Sequence[str],
        offsets: Ints,
        block_file: Ints,
        schema: pa.Schema,
        fill_null: float | None,
    ) -> None:
        self.paths = list(paths)
        self.fill_null = fill_null
        self._offsets = offsets
        self._block_file = block_file
        self._schema = schema
        self._cache: OrderedDict[int, tuple[Block, int]] = OrderedDict()
        self._handles: OrderedDict[int, Any] = OrderedDict()
        self._pid = os.getpid()

    @abstractmethod
    def _open(self, path: str) -> Any:
        """A handle on one file; a few are kept open."""

    @abstractmethod
    def _read_block(self, handle: Any, block: int) -> pa.Table:
        """The rows of `block`, with the columns of `self._schema`."""

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._schema.names)

    def blocks(self) -> Ints:
        return self._offsets

    @property
    def schema(self) -> pa.Schema:
        """The columns and their types in Arrow."""
        return self._schema

    @property
    def block_file(self) -> Ints:
        """Which of `paths` each block is in, `[blocks]`."""
        return self._block_file

    def read_table(self, block: int) -> pa.Table:
        """The rows of `block` as they are in the file, nulls and all."""
        return self._read_block(self._handle(int(self._block_file[block])), block)

    def select(self, columns: Sequence[str]) -> Source:
        check_columns(columns, self.columns, str(self))
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__getstate__(), _schema=pa.schema([self._schema.field(name) for name in columns]))
        return other

    def fingerprint(self) -> str:
        return fingerprint_of(type(self).__name__, [file_identity(path) for path in self.paths], len(self))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_handles": OrderedDict()}

    def __str__(self) -> str:
        return describe(self.paths)

    def take(self, rows: Ints) -> Columns:
        if len(rows) == 0:
            rows = np.zeros(0, np.int64)
            return {name: values[:0] for name, values in self._block(0).items()} if len(self) else {}
        block = np.searchsorted(self._offsets, rows, side="right") - 1
        touched, counts = np.unique(block, return_counts=True)
        if len(touched) == 1:
            decoded = self._block(int(touched[0]), keep=1)
            local = rows - self._offsets[touched[0]]
            return {name: gather_block(values, local) for name, values in decoded.items()}
        by_block = np.split(np.argsort(block, kind="stable"), np.cumsum(counts)[:-1])
        blocks = [self._block(int(index), keep=len(touched)) for index in touched]
        local = [rows[where] - self._offsets[index] for where, index in zip(by_block, touched, strict=True)]
        return {
            name: _merge([gather_block(decoded[name], at) for decoded, at in zip(blocks, local, strict=True)], by_block)
            for name in self._schema.names
        }

    def _block(self, block: int, keep: int = 1) -> Block:
        if self._pid != os.getpid():  # after a fork: the parent's handles and their file positions are not ours
            self._handles, self._pid = OrderedDict(), os.getpid()
        if block in self._cache:
            self._cache.move_to_end(block)
            return self._cache[block][0]
        table = self._read_block(self._handle(int(self._block_file[block])), block)
        expected = int(self._offsets[block + 1] - self._offsets[block])
        path = self.paths[self._block_file[block]]
        if table.num_rows != expected:
            raise DataError(
                f"{path}: the block from row {self._row_in_file(block)} on gave {table.num_rows} rows where its index "
                f"says {expected}; the file has changed since it was opened, or is damaged"
            )
        decoded = {
            name: decode_column(table.column(name), name, path, self._row_in_file(block), self.fill_null)
            for name in self._schema.names
        }
        self._cache[block] = (decoded, table.nbytes)
        while len(self._cache) > keep and sum(size for _, size in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return decoded

    def _row_in_file(self, block: int) -> int:
        """Row of its file at which `block` begins."""
        first_of_file = int(np.searchsorted(self._block_file, self._block_file[block]))
        return int(self._offsets[block] - self._offsets[first_of_file])

    def _handle(self, file: int) -> Any:
        if file not in self._handles:
            self._handles[file] = self._open(self.paths[file])
            while len(self._handles) > 16:
                self._handles.popitem(last=False)
        self._handles.move_to_end(file)
        return self._handles[file]


def gather_block(values: NDArray[Any] | list[Any], local: Ints) -> NDArray[Any] | list[Any]:
    """Values at `local` rows of a decoded block."""
    if isinstance(values, list):
        return [values[row] for row in local.tolist()]
    return values.take(local, axis=0)


def _merge(parts: list[NDArray[Any] | list[Any]], where: list[Ints]) -> NDArray[Any] | list[Any]:
    """One column of the values in `parts`, each at its places `where`; an array if all parts are, of one shape."""
    rows = sum(map(len, where))
    arrays = [part for part in parts if not isinstance(part, list)]
    if len(arrays) == len(parts) and len({part.shape[1:] for part in arrays}) == 1:
        merged = np.empty((rows, *arrays[0].shape[1:]), arrays[0].dtype)
        for part, places in zip(arrays, where, strict=True):
            merged[places] = part
        return merged
    listed: list[Any] = [None] * rows
    for values, places in zip(parts, where, strict=True):
        for place, value in zip(places.tolist(), values, strict=True):
            listed[place] = value
    return listed


def check_distinct(path: str, names: Sequence[str]) -> None:
    """Raises DataError if two columns have the same name."""
    duplicates = sorted(name for name, count in Counter(names).items() if count > 1)
    if duplicates:
        raise DataError(f"{path} has more than one column named {', '.join(duplicates)}: rename them in the file")


def schema_difference(path: str, found: pa.Schema, first_path: str, first: pa.Schema) -> str:
    """Which column makes `found` of `path` differ from `first` of `first_path`, as an error message."""
    rule = "files of one dataset must have the same columns, in the same order"
    for name in first.names:
        if name not in found.names:
            return f"{path} has no column {name!r}, which {first_path} has; {rule}"
    for name in found.names:
        if name not in first.names:
            return f"{path} has a column {name!r}, which {first_path} has not; {rule}"
    for name in first.names:
        if found.field(name).type != first.field(name).type:
            return (
                f"{path} holds {found.field(name).type} in column {name!r}, where {first_path} holds "
                f"{first.field(name).type}; {rule}"
            )
    return f"{path} has its columns in another order than {first_path}: {found.names} and {first.names}; {rule}"


def decode_column(
    column: pa.ChunkedArray, name: str, path: str, first_row: int, fill_null: float | None
) -> NDArray[Any] | list[Any]:
    """An Arrow column as an array (numbers, booleans, lists of one length) or a list (strings, bytes, other lists).

    Timestamps, dates, times and durations become whole numbers in the unit of the file, decimals float64, lists of
    lists of one length arrays of more dimensions, and a pair of `bytes` and `path`, as Hugging Face keeps an image,
    its bytes. A null among strings, bytes or lists of them is None.

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
            return list(column.to_pylist())
        except UnicodeDecodeError as error:
            row = first_row + next(row for row, value in enumerate(column) if not _is_utf8(value))
            raise DataError(f"{path}: column {name!r} is no UTF-8 text in row {row} ({error})") from None
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return list(column.to_pylist())
    if pa.types.is_null(kind):
        column, kind = column.cast(pa.float32()), pa.float32()
    if pa.types.is_decimal(kind):
        column, kind = column.cast(pa.float64()), pa.float64()
    if (
        pa.types.is_timestamp(kind)
        or pa.types.is_date64(kind)
        or pa.types.is_time64(kind)
        or pa.types.is_duration(kind)
    ):
        column, kind = column.cast(pa.int64()), pa.int64()
    elif pa.types.is_date32(kind) or pa.types.is_time32(kind):
        column, kind = column.cast(pa.int32()), pa.int32()
    if column.null_count:
        row = first_row + int(pc.index(column.is_null(), pa.scalar(True)).as_py())
        if fill_null is None or pa.types.is_nested(kind):
            raise DataError(
                f"{path}: column {name!r} is null in row {row} ({column.null_count} nulls in the {len(column)} rows from "
                f"row {first_row}): a tensor has no null; fill it in the file, leave the column out, or choose a value "
                f"for all nulls with --data.fill_null"
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


def _is_utf8(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _decode_lists(column: pa.ChunkedArray, name: str, path: str, first_row: int) -> NDArray[Any] | list[Any]:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no chunk, or too much for one
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    values = _list_values(array, name, path, first_row)
    return list(array.to_pylist()) if values is None else values


def _list_values(array: pa.Array, name: str, path: str, first_row: int) -> NDArray[Any] | list[Any] | None:
    """The lists as one array, if they are of one length, or as a list of arrays; None if they must be Python lists."""
    flat = array.flatten()
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
