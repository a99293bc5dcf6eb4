"""What CSV and JSON Lines share: an index of byte offsets, so that any row can be read without the ones before it.

    one pass over the bytes -> where every 4,096th row begins -> a block is parsed when its rows are asked for

The types of the columns are found on up to 16 blocks spread over each file, and hold for all of them. The index is
kept in the cache where the files are large.
"""

from __future__ import annotations

import mmap
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ddp_stream.sources.base import DataError, Ints
from ddp_stream.sources.cache import Arrays, as_array, cached_arrays
from ddp_stream.sources.files import BlockSource
from ddp_stream.sources.paths import check_distinct, describe, existing_files, has_changed, reading, schema_difference
from ddp_stream.sources.selection import search

BLOCK_ROWS = 4096
_SCAN_BYTES = 4 << 20
_SAMPLED_BLOCKS = 16
_NEWLINE, _QUOTE = b'\n"'
_LONGEST_BLANK = 80
Bytes = bytes | mmap.mmap
OnBadRow = Literal["raise", "skip"]


class TextSource(BlockSource):
    """Rows of one text file, or of several laid end to end, one row a line. Blank lines are no rows.

    Args of a subclass's `__init__` to pass on:
        paths: the files, in order
        options: what else decides how they are read
        fill_null: what stands in for a null in a numeric column; None makes a null an error
        on_bad_row: with `skip`, types are those of most rows, for `skip_bad_rows` to leave out the others
    """

    quoted: ClassVar[bool]
    """A line end between double quotes ends no row."""
    header: ClassVar[bool]
    """The first line names the columns."""
    blank: ClassVar[bytes]
    """Lines of nothing else are blank."""
    keep_index: ClassVar[bool] = True
    """Keep the index in the cache."""

    def __init__(
        self, paths: str | Sequence[str], options: Sequence[Any], fill_null: float | None, on_bad_row: OnBadRow
    ) -> None:
        files = existing_files(paths)
        self.on_bad_row = on_bad_row
        if self.keep_index:
            parts = (type(self).__name__, BLOCK_ROWS, on_bad_row, *options)
            index = cached_arrays(files, parts, f"the index of {describe(files)}", lambda: self._index(files))
        else:
            index = self._index(files)
        self._byte_ranges = index["byte_ranges"]
        schema = pa.ipc.read_schema(pa.py_buffer(index["schema"].tobytes()))
        self._all_names = tuple(schema.names)
        super().__init__(files, index["offsets"], index["block_file"], schema, fill_null)

    @abstractmethod
    def _names(self, path: str, first_line: bytes) -> tuple[str, ...]:
        """The columns that the header names."""

    @abstractmethod
    def _parse(
        self, data: bytes, path: str, names: tuple[str, ...], schema: pa.Schema | None, first_row: int
    ) -> pa.Table:
        """The rows in `data`, with the columns of `schema`; None finds the types.

        Raises:
            DataError: with the row counted from `first_row`.
        """

    @abstractmethod
    def _common(self, left: pa.Schema, right: pa.Schema, *, one_file: bool) -> pa.Schema | None:
        """The schema that holds the values of both, from blocks of one file or of two; None if there is none."""

    @abstractmethod
    def _types_of_most(self, lines: Sequence[bytes], path: str, names: tuple[str, ...]) -> pa.Schema:
        """The types that hold for most of `lines`."""

    def _open(self, path: str) -> Any:
        return map_file(path)

    def _read_block(self, handle: Any, block: int) -> pa.Table:
        start, end = self._byte_ranges[block].tolist()
        path = self.paths[self._block_file[block]]
        return self._parse(handle[start:end], path, self._all_names, self._schema, self._row_in_file(block))

    def read_rows(self, block: int) -> pa.Table:
        dropped = self._dropped_in(block)
        if len(dropped) == 0:
            return self.read_table(block)
        lines = np.delete(np.array(self._block_lines(block), object), dropped)
        return self._parse_lines(lines.tolist(), block, 0) if len(lines) else self._schema.empty_table()

    def _block_lines(self, block: int) -> list[bytes]:
        """The lines of `block` that are rows, those that are left out included."""
        start, end = self._byte_ranges[block].tolist()
        file = int(self._block_file[block])
        return self._split(self._handle(file)[start:end], self.paths[file])

    def _split(self, data: bytes, path: str) -> list[bytes]:
        portions = self._lines(data, path)
        return [data[start:end] for part in portions for start, end in zip(*(a.tolist() for a in part), strict=True)]

    def _parse_lines(self, lines: Sequence[bytes], block: int, row: int) -> pa.Table:
        path = self.paths[self._block_file[block]]
        first = self._row_in_file(block) + row
        table = self._parse(b"".join(lines), path, self._all_names, self._schema, first)
        if table.num_rows != len(lines):
            raise DataError(f"{path}: {len(lines)} lines from row {first} on hold {table.num_rows} rows")
        return table

    def _bad_in(self, block: int) -> dict[int, str]:
        lines = self._block_lines(block)
        kept = np.delete(np.arange(len(lines)), self._dropped_in(block))
        lines = [lines[place] for place in kept.tolist()]
        bad = search(
            range(len(lines)), lambda rows: self._parse_lines(lines[rows.start : rows.stop], block, rows.start)
        )
        good = [row for row in range(len(lines)) if row not in bad]
        if good:
            wrong = self._bad_values(self._parse_lines([lines[row] for row in good], block, 0), block)
            bad |= {good[row]: reason for row, reason in wrong.items()}
        return dict(sorted(bad.items()))

    def _index(self, files: list[str]) -> Arrays:
        """Byte ranges `[blocks, 2]` and the file of every block, the rows before it, and the common schema."""
        sizes: list[Ints] = []
        block_file: list[Ints] = []
        byte_ranges: list[NDArray[np.int64]] = []
        schema: pa.Schema | None = None
        for index, path in enumerate(files):
            data = map_file(path)
            if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(
                    f"{path} is in UTF-16, and text is read as UTF-8: convert it, as with iconv -f utf-16 -t utf-8"
                )
            starts, rows, first_line = self._scan(data, path)
            names = self._names(path, first_line) if self.header else ()
            check_distinct(path, names)
            found = self._infer(path, data, starts, rows, names)
            common = found if schema is None else self._common(schema, found, one_file=False)
            if common is None:
                assert schema is not None
                raise DataError(schema_difference(path, found, files[0], schema))
            schema = common
            sizes.append(rows)
            block_file.append(np.full(len(rows), index))
            byte_ranges.append(np.stack([starts[:-1], starts[1:]], axis=1))
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        if offsets[-1] == 0:
            raise DataError(
                f"{describe(files)} has {'a header but no rows' if self.header else 'blank lines only'}: there is nothing "
                f"to train on"
            )
        assert schema is not None
        return {
            "offsets": offsets.astype(np.int64),
            "block_file": np.concatenate(block_file).astype(np.int64),
            "byte_ranges": np.concatenate(byte_ranges).astype(np.int64),
            "schema": as_array(schema.serialize().to_pybytes()),
        }

    def _scan(self, data: mmap.mmap, path: str) -> tuple[Ints, Ints, bytes]:
        """Byte offsets where blocks begin `[blocks + 1]`, rows in each `[blocks]`, and the first line if a header."""
        starts: list[int] = []
        rows: list[int] = []
        first_line: bytes | None = None
        in_block = BLOCK_ROWS
        for line_starts, line_ends in self._lines(data, path):
            if self.header and first_line is None and len(line_starts):
                first_line = bytes(data[line_starts[0] : line_ends[0]])
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
        if self.header and first_line is None:
            raise DataError(f"{path} has blank lines only: there is nothing to train on")
        return np.array([*starts, len(data)], np.int64), np.array(rows, np.int64), first_line or b""

    def _lines(self, data: Bytes, path: str) -> Iterator[tuple[Ints, Ints]]:
        """Where the lines of `data` that are not blank begin and end (behind their line end), a portion at a time."""
        line_start = 3 if data[:3] == b"\xef\xbb\xbf" else 0
        quotes = 0
        for begin in range(line_start, len(data), _SCAN_BYTES):
            chunk = np.frombuffer(data, np.uint8, min(_SCAN_BYTES, len(data) - begin), begin)
            ends = np.flatnonzero(chunk == _NEWLINE)
            quote_at = np.flatnonzero(chunk == _QUOTE) if self.quoted else ends[:0]
            if quotes or len(quote_at):
                ends = ends[(quotes + np.searchsorted(quote_at, ends)) % 2 == 0]
                quotes = (quotes + len(quote_at)) % 2
            del chunk
            line_ends = ends + begin + 1
            if begin + _SCAN_BYTES >= len(data) and (len(line_ends) == 0 or line_ends[-1] != len(data)):
                line_ends = np.append(line_ends, len(data))  # the last line may lack its line end
            if len(line_ends) == 0:
                continue
            line_starts = np.concatenate([[line_start], line_ends[:-1]])
            line_start = int(line_ends[-1])
            full = ~self._blank(data, line_starts, line_ends)
            yield line_starts[full], line_ends[full]
        if quotes:
            raise DataError(f"{path}: a quoted field is never closed, so the rows after it cannot be told apart")

    def _blank(self, data: Bytes, starts: Ints, ends: Ints) -> NDArray[np.bool_]:
        blank = np.zeros(len(starts), np.bool_)
        longest = 2 if self.blank == b"\r\n" else _LONGEST_BLANK
        for index in np.flatnonzero(ends - starts <= longest).tolist():
            blank[index] = not data[starts[index] : ends[index]].strip(self.blank)
        return blank

    def _infer(self, path: str, data: mmap.mmap, starts: Ints, rows: Ints, names: tuple[str, ...]) -> pa.Schema:
        """The types that hold on blocks spread over the file."""
        schema = pa.schema([(name, pa.null()) for name in names])
        if len(starts) == 1:
            return schema
        blocks = np.unique(np.linspace(0, len(starts) - 2, _SAMPLED_BLOCKS).astype(np.int64)).tolist()
        if self.on_bad_row == "skip":
            parts = [self._split(data[starts[block] : starts[block + 1]], path) for block in blocks]
            return self._types_of_most([line for part in parts for line in part], path, names)
        for block in blocks:
            table = self._parse(data[starts[block] : starts[block + 1]], path, names, None, block * BLOCK_ROWS)
            if table.num_rows != rows[block]:
                raise DataError(
                    f"{path}: the {rows[block]} lines from row {block * BLOCK_ROWS} on hold {table.num_rows} rows; write "
                    f"the file again with one row a line"
                )
            found = table.schema
            common = self._common(schema, found, one_file=True)
            if common is None:
                raise DataError(schema_difference(f"{path} from row {block * BLOCK_ROWS} on", found, path, schema))
            schema = common
        return schema


def map_file(path: str) -> mmap.mmap:
    """The bytes of a file that is not empty."""
    with reading(path), open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise has_changed(path, "it is empty") from None
