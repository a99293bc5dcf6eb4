"""What the formats with blocks share: rows that are decoded a block at a time."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ddp_stream.sources.base import Columns, DataError, Ints, Source, before, check_columns, fingerprint_of, original
from ddp_stream.sources.decode import decode_column
from ddp_stream.sources.paths import describe, file_identity, stamp_of
from ddp_stream.sources.selection import bad_values

CACHE_BYTES = 64 << 20
"""Decoded blocks that a process keeps beyond the ones that its current rows need."""

Block = dict[str, "NDArray[Any] | list[Any]"]


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
        self._offsets = self._whole_offsets = offsets
        self._dropped = np.zeros(0, np.int64)
        self._reasons: Mapping[int, str] = {}
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
        schema = pa.schema([self._schema.field(name) for name in columns])
        other.__dict__.update(self.__getstate__(), _schema=schema, _reasons=self._reasons)
        return other

    def fingerprint(self) -> str:
        files = [file_identity(path) for path in self.paths]
        return fingerprint_of(type(self).__name__, files, len(self), *self._dropped.tolist())

    def without(self, rows: Mapping[int, str]) -> Source:
        """The other rows; `rows` says why each is left out. A row left out may hold what cannot be read."""
        other = type(self).__new__(type(self))
        ids, reasons = original(rows, self._dropped)
        other.__dict__.update(
            self.__getstate__(),
            _reasons={**self._reasons, **reasons},
            _dropped=np.union1d(self._dropped, ids),
        )
        other._offsets = self._whole_offsets - np.searchsorted(other._dropped, self._whole_offsets)
        return other

    @property
    def excluded(self) -> Mapping[int, str]:
        return self._reasons

    def stamp(self) -> str | None:
        return stamp_of(self.paths, type(self).__name__, self._schema.names, self.fill_null, self._dropped.tolist())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_handles": OrderedDict(), "_reasons": {}}

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
        table = self.read_rows(block)
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

    def read_rows(self, block: int) -> pa.Table:
        """The rows of `block` but for those that are left out."""
        table = self.read_table(block)
        dropped = self._dropped_in(block)
        return table.take(np.delete(np.arange(table.num_rows), dropped)) if len(dropped) else table

    def _dropped_in(self, block: int) -> Ints:
        """Rows of `block`, counted from its first, that are left out."""
        start, end = np.searchsorted(self._dropped, self._whole_offsets[block : block + 2])
        dropped: Ints = self._dropped[start:end] - self._whole_offsets[block]
        return dropped

    def bad_rows(self, block: int) -> dict[int, str]:
        """Rows of `block` that cannot be read, by their ids: file, row and reason.

        Raises:
            DataError: it is not a matter of rows, but of the file or of a whole column.
        """
        try:
            self._block(block)
            return {}
        except DataError:
            found = self._bad_in(block)
            if not found:
                raise
        path, first = self.paths[self._block_file[block]], self._row_in_file(block)
        in_file = before(np.array(list(found), np.int64), self._dropped_in(block)) + first
        reasons = (reason.removeprefix(f"{path}: ") for reason in found.values())
        ids = (int(self._offsets[block]) + row for row in found)
        return {
            row: f"{path}, row {place}: {reason}"
            for row, place, reason in zip(ids, in_file.tolist(), reasons, strict=True)
        }

    def _bad_in(self, block: int) -> dict[int, str]:
        """Rows of `block` that cannot be read, counted from the first one that is not left out."""
        return self._bad_values(self.read_rows(block), block)

    def _bad_values(self, table: pa.Table, block: int) -> dict[int, str]:
        path = self.paths[self._block_file[block]]
        return bad_values(table, lambda column, name: decode_column(column, name, path, 0, self.fill_null))

    def _row_in_file(self, block: int) -> int:
        """Row of its file at which `block` begins."""
        first_of_file = int(np.searchsorted(self._block_file, self._block_file[block]))
        return int(self._whole_offsets[block] - self._whole_offsets[first_of_file])

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
