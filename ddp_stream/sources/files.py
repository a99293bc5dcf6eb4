"""What the formats with blocks share: rows that are decoded a block at a time."""

from __future__ import annotations

import os
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ddp_stream.sources.base import Columns, DataError, Ints, Source, before, check_columns, fingerprint_of, original
from ddp_stream.sources.decode import decode_column
from ddp_stream.sources.decoded import Block, DecodedBlocks
from ddp_stream.sources.interleaved import interleave, separate
from ddp_stream.sources.memory import gather
from ddp_stream.sources.paths import describe, file_identity, has_changed, stamp_of
from ddp_stream.sources.selection import bad_values

_MOST_OPEN = 16  # files, in every thread


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
        self._block_rows = _equal_size(offsets)
        self._schema = schema
        self._decoded: DecodedBlocks | None = None
        self._handles: _Handles | None = None
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
        other._block_rows = _equal_size(other._offsets)
        return other

    @property
    def decodes_blocks(self) -> bool:
        return True

    @property
    def excluded(self) -> Mapping[int, str]:
        return self._reasons

    def stamp(self) -> str | None:
        return stamp_of(self.paths, type(self).__name__, self._schema.names, self.fill_null, self._dropped.tolist())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoded": None, "_handles": None, "_reasons": {}}

    def __str__(self) -> str:
        return describe(self.paths)

    def take(self, rows: Ints) -> Columns:
        if len(rows) == 0:
            nothing = {name: values[:0] for name, values in self._block(0).items()} if len(self) else {}
            return separate(nothing, self._schema.names if nothing else [])
        block, touched = self._touched(rows)
        columns, starts = self._blocks().join(touched.tolist())
        # From a row to its place in the joined columns it is the same way for all rows of a block.
        way = np.zeros(int(touched[-1] - touched[0]) + 1, np.int64)
        way[touched - touched[0]] = starts - self._offsets[touched]
        places = way.take(block - touched[0])
        places += rows
        taken = {name: gather(values, places) for name, values in columns.items()}
        return separate(taken, self._schema.names)

    def ahead(self, rows: Ints) -> None:
        if len(rows):
            self._blocks().ahead(self._touched(rows)[1].tolist())

    def _touched(self, rows: Ints) -> tuple[Ints, Ints]:
        """The block of each of `rows [n]`, and those blocks in rising order."""
        if self._block_rows is not None:
            block = rows // self._block_rows
        else:
            block = np.searchsorted(self._offsets, rows, side="right") - 1
        first = int(block.min())
        seen = np.zeros(int(block.max()) - first + 1, np.bool_)
        seen[block - first] = True
        return block, np.flatnonzero(seen) + first

    def _blocks(self) -> DecodedBlocks:
        if self._decoded is None or self._pid != os.getpid():
            # After a fork the parent's handles, with their positions in files, and its thread are not ours.
            self._handles, self._decoded, self._pid = None, DecodedBlocks(self._decode_block), os.getpid()
        return self._decoded

    def _block(self, block: int) -> Block:
        return self._blocks().get(block)

    def _decode_block(self, block: int) -> tuple[Block, int, int]:
        table = self.read_rows(block)
        expected = int(self._offsets[block + 1] - self._offsets[block])
        path = self.paths[self._block_file[block]]
        first, names = self._row_in_file(block), self._schema.names
        if table.num_rows != expected:
            raise has_changed(path, f"from row {first} on it has {table.num_rows} rows where its index says {expected}")
        if table.column_names != names:
            table = table.select(names)
        decoded = {
            name: decode_column(column, name, path, first, self.fill_null)
            for name, column in zip(names, table.itercolumns(), strict=True)
        }
        arrays = [values for values in decoded.values() if not isinstance(values, list)]
        # An Arrow table takes long to say how large it is.
        size = sum(v.nbytes for v in arrays) if len(arrays) == len(decoded) else table.nbytes
        return interleave(decoded), expected, size

    def where(self, row: int) -> str:
        block = int(np.searchsorted(self._offsets, row, side="right")) - 1
        whole = int(before(np.array([row]), self._dropped)[0])
        place = self._row_in_file(block) + whole - int(self._whole_offsets[block])
        return f"{self.paths[self._block_file[block]]}, row {place}"

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
        if self._handles is None:
            self._handles = _Handles()
        opened = self._handles.opened
        if file not in opened:
            opened[file] = self._open(self.paths[file])
            while len(opened) > _MOST_OPEN:
                opened.popitem(last=False)
        opened.move_to_end(file)
        return opened[file]


class _Handles(threading.local):
    """The files that this thread has open, since a handle is not for two threads at once; the one used last at the end."""

    def __init__(self) -> None:
        self.opened: OrderedDict[int, Any] = OrderedDict()


def _equal_size(offsets: Ints) -> int | None:
    """Rows of a block where all have as many, but perhaps fewer in the last; None where they differ."""
    sizes = np.diff(offsets)
    if len(sizes) and (sizes[:-1] == sizes[0]).all() and 0 < sizes[-1] <= sizes[0]:
        return int(sizes[0])
    return None
