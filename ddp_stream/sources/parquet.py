"""Parquet files: row groups are the blocks, and only the columns asked for are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddp_stream.sources.base import DataError
from ddp_stream.sources.files import BlockSource
from ddp_stream.sources.paths import chosen_columns, existing_files, has_changed, same_columns, schema_difference

_MOST_FOOTERS = 16


class Parquet(BlockSource):
    """Rows of one Parquet file, or of several laid end to end.

    Args:
        paths: the files, in order
        fill_null: what stands in for a null in a numeric column; None makes a null an error
        columns: the columns to read, which all files must have; None reads all, which must be the same in all files
    """

    def __init__(
        self, paths: str | Sequence[str], fill_null: float | None = None, columns: Sequence[str] | None = None
    ) -> None:
        files = existing_files(paths)
        self._footers: dict[str, tuple[Any, pq.FileMetaData]] = {}
        sizes: list[int] = []
        block_file: list[int] = []
        self_group: list[int] = []
        schema: pa.Schema | None = None
        for index, path in enumerate(files):
            with self._open(path) as file:
                metadata, found = file.metadata, chosen_columns(file.schema_arrow, columns, path)
                if schema is None:
                    schema = found
                elif not same_columns(found, schema):
                    raise DataError(schema_difference(path, found, files[0], schema))
                for group in range(metadata.num_row_groups):
                    sizes.append(metadata.row_group(group).num_rows)
                    block_file.append(index)
                    self_group.append(group)
        self._group = np.array(self_group, np.int64)
        offsets = np.cumsum([0, *sizes], dtype=np.int64)
        if offsets[-1] == 0:
            raise DataError(f"{files[0]} has columns but no rows: there is nothing to train on")
        assert schema is not None
        super().__init__(files, offsets, np.array(block_file, np.int64), schema, fill_null)

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            version = _version(path)
            known, footer = self._footers.get(path, (None, None))
            # Not mapped: its pages would count as memory, for no gain in speed.
            file = pq.ParquetFile(path, metadata=footer if known == version else None)
            if _version(path) != version:
                raise has_changed(path, "it was replaced while it was opened")
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is no Parquet file that can be read: {error}") from None
        if len(self._footers) < _MOST_FOOTERS:  # the other thread opens it, too, and a footer may be large
            self._footers[path] = version, file.metadata
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_footers": {}}

    def _read_block(self, handle: Any, block: int) -> pa.Table:
        path, group = self.paths[self._block_file[block]], int(self._group[block])
        if group >= handle.num_row_groups:
            raise has_changed(path, f"it had a row group {group} and has {handle.num_row_groups} row groups")
        try:
            table = handle.read_row_group(group, columns=self._schema.names)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: row group {group} cannot be read: {error}") from None
        missing = set(self._schema.names) - set(table.column_names)
        if missing:
            raise has_changed(path, f"it has no column {min(missing)!r} any more")
        return table


def _version(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns
