"""Arrow record batches, memory-mapped: IPC and Feather files, and Hugging Face datasets."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ddp_stream.sources.base import Column, Columns, DataError, Ints, Source, fingerprint_of
from ddp_stream.sources.decode import decode_column
from ddp_stream.sources.decoded import CACHE_BYTES
from ddp_stream.sources.files import BlockSource
from ddp_stream.sources.paths import chosen_columns, existing_files, has_changed, same_columns, schema_difference
from ddp_stream.sources.selection import Excluding

_BLOCK_BYTES = 4 << 20
_BLOCK_ROWS = 1 << 16
_ENDS_ROWS = 1000
_MAPPED_BYTES = 4096  # what a batch costs that stays in its file


class BatchSource(BlockSource):
    """Rows in record batches: `take` gathers them in Arrow, and decodes no other row.

    A batch that lies uncompressed in memory or in a memory map is cut into blocks of about 4 MiB, so that the `blocks`
    order has some to permute; one that must be decompressed is a block by itself.

    Args of a subclass's `__init__` to pass on:
        paths: the files, in order
        batch_rows: rows of every batch
        batch_file: which of `paths` each batch is in
        row_bytes: bytes of an uncompressed row in every batch; 0 where the batch is compressed
        schema: column names and types, the same in all files
        fill_null: what stands in for a null in a numeric column; None makes a null an error
    """

    def __init__(
        self,
        paths: Sequence[str],
        batch_rows: Sequence[int],
        batch_file: Sequence[int],
        row_bytes: Sequence[float],
        schema: pa.Schema,
        fill_null: float | None,
    ) -> None:
        starts: list[Ints] = []
        for rows, width in zip(batch_rows, row_bytes, strict=True):
            size = min(_BLOCK_ROWS, max(1, int(_BLOCK_BYTES / width))) if width else max(1, rows)
            starts.append(np.arange(0, rows, size))
        self._batch_offsets = np.cumsum([0, *batch_rows], dtype=np.int64)
        if self._batch_offsets[-1] == 0:
            raise DataError(f"{paths[0]} has columns but no rows: there is nothing to train on")
        counts = [len(part) for part in starts]
        self._block_batch = np.repeat(np.arange(len(counts)), counts)
        offsets = np.concatenate([*starts, [0]]).astype(np.int64)
        offsets[:-1] += self._batch_offsets[self._block_batch]
        offsets[-1] = self._batch_offsets[-1]
        self._batch_file = np.array(batch_file, np.int64)
        self._compressed = np.array(row_bytes) == 0
        self._batches: OrderedDict[int, tuple[pa.RecordBatch, int]] = OrderedDict()
        super().__init__(paths, offsets, self._batch_file[self._block_batch], schema, fill_null)

    @abstractmethod
    def _open(self, path: str) -> Any:
        """A handle on one file whose `get_batch(index)` gives the batches of that file."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_batches": OrderedDict()}

    def _read_block(self, handle: Any, block: int) -> pa.Table:
        batch = int(self._block_batch[block])
        start, end = self._offsets[block : block + 2] - self._batch_offsets[batch]
        return pa.Table.from_batches([self._batch(batch).slice(start, end - start)])

    def _batch(self, batch: int, keep: int = 1) -> pa.RecordBatch:
        """A batch with the columns asked for, as it lies in its file or decompressed."""
        file = int(self._batch_file[batch])
        handle = self._handle(file)
        if batch not in self._batches:
            index = batch - int(np.searchsorted(self._batch_file, file))
            try:
                found = handle.get_batch(index).select(self._schema.names)
            except (KeyError, IndexError) as error:
                raise has_changed(self.paths[file], str(error)) from None
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{self.paths[file]}: record batch {index} cannot be read: {error}") from None
            rows = int(self._batch_offsets[batch + 1] - self._batch_offsets[batch])
            if found.num_rows != rows:
                raise has_changed(self.paths[file], f"record batch {index} had {rows} rows and has {found.num_rows}")
            self._batches[batch] = found, found.nbytes if self._compressed[batch] else _MAPPED_BYTES
            while len(self._batches) > keep and sum(size for _, size in self._batches.values()) > CACHE_BYTES:
                self._batches.popitem(last=False)
        self._batches.move_to_end(batch)
        return self._batches[batch][0]

    def take(self, rows: Ints) -> Columns:
        if len(rows) == 0:
            return {name: values[:0] for name, values in self.take(np.zeros(1, np.int64)).items()}
        index = np.searchsorted(self._batch_offsets, rows, side="right") - 1
        touched, counts = np.unique(index, return_counts=True)
        if len(touched) == 1:
            batches = [_gather(self._batch(int(touched[0])), rows - self._batch_offsets[touched[0]])]
        else:
            by_batch = np.argsort(index, kind="stable")
            batches = [
                _gather(self._batch(batch, len(touched)), rows[where] - self._batch_offsets[batch])
                for batch, where in zip(touched.tolist(), np.split(by_batch, np.cumsum(counts)[:-1]), strict=True)
            ]
        back = None
        if len(touched) > 1 and (np.diff(by_batch) != 1).any():
            back = np.empty_like(by_batch)
            back[by_batch] = np.arange(len(rows))
        try:
            return {
                name: self._decode([batch.column(index) for batch in batches], name, back)
                for index, name in enumerate(self._schema.names)
            }
        except DataError:
            for block in np.unique(np.searchsorted(self._offsets, rows, side="right") - 1).tolist():
                self._block(block)  # says file and row
            raise

    def ahead(self, rows: Ints) -> None:
        """Nothing: batches are taken from where they lie."""

    @property
    def decodes_blocks(self) -> bool:
        return bool(self._compressed.any())

    def without(self, rows: Mapping[int, str]) -> Source:
        return Excluding(self, rows)

    def _decode(self, parts: list[pa.Array], name: str, back: Ints | None) -> Column:
        """A column from the batches' parts of it, in the order `back`."""
        if pa.types.is_dictionary(parts[0].type):
            parts = [part.dictionary_decode() for part in parts]
        column = pa.chunked_array(parts) if back is None else pa.chunked_array([pa.concat_arrays(parts).take(back)])
        return decode_column(column, name, self.paths[0], 0, self.fill_null)


def _gather(batch: pa.RecordBatch, local: Ints) -> pa.RecordBatch:
    """Rows `local` of a batch: a view where they lie side by side."""
    first, last = int(local[0]), int(local[-1])
    if last - first == len(local) - 1 and (np.diff(local) == 1).all():
        return batch.slice(first, len(local))
    return batch.take(pa.array(local))


class Arrow(BatchSource):
    """Rows of one Arrow IPC or Feather file (file or stream format), or of several laid end to end.

    The batches of a compressed stream are decompressed when it is opened, and stay in memory; those of a compressed file
    when their rows are asked for.

    Args:
        paths: the files, in order
        fill_null: what stands in for a null in a numeric column; None makes a null an error
        columns: the columns to read, which all files must have; None reads all, which must be the same in all files
    """

    def __init__(
        self, paths: str | Sequence[str], fill_null: float | None = None, columns: Sequence[str] | None = None
    ) -> None:
        files = existing_files(paths)
        batch_rows: list[int] = []
        batch_file: list[int] = []
        row_bytes: list[float] = []
        schema: pa.Schema | None = None
        for index, path in enumerate(files):
            whole = _open_arrow(path)
            found = chosen_columns(whole.schema, columns, path)
            if schema is None:
                schema = found
            elif not same_columns(found, schema):
                raise DataError(schema_difference(path, found, files[0], schema))
            # A compressed batch is decompressed by the column, so to learn of its rows the narrowest one is read.
            widths = [_width(kind) for kind in whole.schema.types]
            narrowest = widths.index(min(widths)) if widths else None
            batch = 0
            try:
                compressed = whole.num_record_batches > 0 and not whole.holds(whole.get_batch(0))
                file = _open_arrow(path, None if narrowest is None else [narrowest]) if compressed else whole
                for batch in range(file.num_record_batches):
                    part = file.get_batch(batch)
                    batch_rows.append(part.num_rows)
                    batch_file.append(index)
                    row_bytes.append(0.0 if compressed else max(1.0, part.nbytes / max(1, part.num_rows)))
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{path}: record batch {batch} cannot be read: {error}") from None
        assert schema is not None
        super().__init__(files, batch_rows, batch_file, row_bytes, schema, fill_null)

    def _open(self, path: str) -> Any:
        place = {name: index for index, name in enumerate(_open_arrow(path).schema.names)}
        missing = next((name for name in self._schema.names if name not in place), None)
        if missing is not None:
            raise has_changed(path, f"it has no column {missing!r} any more")
        return _open_arrow(path, [place[name] for name in self._schema.names])


class _File:
    """An IPC file, whose batches are read when they are asked for."""

    def __init__(self, path: str, fields: list[int] | None) -> None:
        source = pa.memory_map(path)
        self._bytes = source.read_buffer()
        self._reader = pa.ipc.open_file(self._bytes, options=pa.ipc.IpcReadOptions(included_fields=fields))
        self.schema = self._reader.schema
        self.num_record_batches = self._reader.num_record_batches

    def get_batch(self, index: int) -> pa.RecordBatch:
        return self._reader.get_batch(index)

    def holds(self, batch: pa.RecordBatch) -> bool:
        """Whether the values of `batch` lie in the file, and not decompressed elsewhere."""
        start, end = self._bytes.address, self._bytes.address + self._bytes.size
        buffers = [
            buffer for column in batch.columns for buffer in column.buffers() if buffer is not None and buffer.size
        ]
        return all(start <= buffer.address < end for buffer in buffers)


class _Stream:
    """An IPC stream, such as Hugging Face datasets writes; its batches are known after they were passed by once."""

    def __init__(self, path: str, fields: list[int] | None) -> None:
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        reader = pa.ipc.open_stream(pa.memory_map(path), options=options)
        self.schema = reader.schema
        self._batches = list(reader)
        self.num_record_batches = len(self._batches)

    def get_batch(self, index: int) -> pa.RecordBatch:
        return self._batches[index]

    def holds(self, batch: pa.RecordBatch) -> bool:
        """The batches lie in memory, wherever that is."""
        return True


def _open_arrow(path: str, fields: list[int] | None = None) -> _File | _Stream:
    try:
        with open(path, "rb") as file:
            magic = file.read(6)
        if magic[:4] == b"FEA1":
            raise pa.ArrowInvalid("it is in Feather version 1; write it again with a current version")
        return _File(path, fields) if magic == b"ARROW1" else _Stream(path, fields)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DataError(f"{path} is no Arrow file that can be read: {error}") from None


def _width(kind: pa.DataType) -> int:
    try:
        return int(kind.bit_width)
    except ValueError:
        return 1 << 30


class HFDataset(BatchSource):
    """Rows of a Hugging Face `datasets.Dataset`, in memory or memory-mapped, read from its Arrow table.

    What the dataset selects, shuffles or sorts by its indices is respected; its format and transforms are not applied.
    An image or audio column holds the encoded bytes.

    Args:
        dataset: the dataset
        fill_null: what stands in for a null in a numeric column; None makes a null an error
    """

    def __init__(self, dataset: Any, fill_null: float | None = None) -> None:
        if not hasattr(dataset, "data") or not hasattr(dataset, "_indices"):
            raise DataError(
                f"{type(dataset).__name__} is no datasets.Dataset: a DatasetDict has one for every split, and an "
                f"IterableDataset has no rows that can be dealt to ranks by their ids"
            )
        self.dataset = dataset
        batches = dataset.data.table.to_batches()
        super().__init__(
            [f"Dataset({dataset.num_rows} rows)"],
            [batch.num_rows for batch in batches],
            [0] * len(batches),
            [max(1.0, batch.nbytes / max(1, batch.num_rows)) for batch in batches],
            dataset.data.table.schema.remove_metadata(),
            fill_null,
        )
        indices = dataset._indices
        self._rows = None if indices is None else indices.column(0).to_numpy().astype(np.int64)

    def _open(self, path: str) -> Any:
        return _Table(self.dataset.data.table)

    def __len__(self) -> int:
        return super().__len__() if self._rows is None else len(self._rows)

    def blocks(self) -> Any:
        """Batches, but for a dataset with indices: those may lead anywhere."""
        return super().blocks() if self._rows is None else None

    def take(self, rows: Ints) -> Columns:
        return super().take(rows if self._rows is None else self._rows[rows])

    def fingerprint(self) -> str:
        table = self.dataset.data.table
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            for end in (table.slice(0, _ENDS_ROWS), table.slice(max(0, len(table) - _ENDS_ROWS))):
                stream.write_table(end.combine_chunks())
        digest = hashlib.sha256(sink.getvalue())
        if self._rows is not None:
            digest.update(self._rows.tobytes())
        return fingerprint_of("HFDataset", len(self), digest.hexdigest())


class _Table:
    def __init__(self, table: pa.Table) -> None:
        self._batches = table.to_batches()

    def get_batch(self, index: int) -> pa.RecordBatch:
        return self._batches[index]
