"""Compressed text (.csv.gz, .jsonl.zst and the like), read once into an Arrow file in the cache directory.

    decompress to a file beside it -> index and parse that, as any text -> one record batch a block, with its checksum

What is compressed as one stream has no random access, so the first start reads it whole, and later ones do not.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from rich.progress import Progress

from ddp_stream.sources import cache
from ddp_stream.sources.arrow import BatchSource
from ddp_stream.sources.base import DataError, fingerprint_of
from ddp_stream.sources.cache import Arrays, Damaged
from ddp_stream.sources.csv import Csv
from ddp_stream.sources.jsonl import JsonLines
from ddp_stream.sources.paths import CODECS, describe, existing_files, stamp_of
from ddp_stream.sources.selection import find_bad_rows
from ddp_stream.sources.text import OnBadRow, TextSource

_COPY_BYTES = 1 << 20
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class _Csv(Csv):
    keep_index = False


class _JsonLines(JsonLines):
    keep_index = False


TEXTS: dict[str, Callable[..., TextSource]] = {
    ".csv": _Csv,
    ".tsv": functools.partial(_Csv, delimiter="\t"),
    ".jsonl": _JsonLines,
    ".ndjson": _JsonLines,
}


class CompressedText(BatchSource):
    """Rows of one compressed CSV, TSV or JSON Lines file, or of several laid end to end.

    Args:
        paths: the files, in order; all of one format, which their suffixes name (`.csv.gz`, `.jsonl.zst`)
        fill_null: what stands in for a null number; None makes it an error
        on_bad_row: with `skip`, rows that cannot be read are left out of the Arrow file

    Raises:
        DataError: as for plain text; or the cache directory cannot be written.
    """

    def __init__(
        self, paths: str | Sequence[str], fill_null: float | None = None, on_bad_row: OnBadRow = "raise"
    ) -> None:
        files = existing_files(paths)
        self._text = Path(Path(files[0]).stem).suffix.lower()
        self._rule = on_bad_row, fill_null if on_bad_row == "skip" else None
        self._file = cache.cache_dir() / f"{stamp_of(files, 'CompressedText', self._text, *self._rule)}.arrows"
        index = self._made(files)
        self._skipped: Mapping[int, str] = {int(row): why for row, why in cache.from_array(index["bad"]).items()}
        super().__init__(
            files,
            index["rows"].tolist(),
            index["file"].tolist(),
            (np.diff(index["ends"]) / np.maximum(1, index["rows"])).clip(1).tolist(),
            pa.ipc.read_schema(pa.py_buffer(index["schema"].tobytes())),
            fill_null,
        )
        self._ends, self._checksums = index["ends"], index["checksums"]

    @property
    def excluded(self) -> Mapping[int, str]:
        return self._skipped

    def fingerprint(self) -> str:
        return fingerprint_of(super().fingerprint(), sorted(self._skipped))

    def _open(self, path: str) -> Any:
        first = int(np.searchsorted(self._batch_file, self.paths.index(path)))
        buffer = pa.memory_map(str(self._file)).read_buffer()
        schema = pa.ipc.read_schema(buffer)
        return _Batches(buffer, schema, self._ends[first:], self._checksums[first:])

    def _batch(self, batch: int, keep: int = 1) -> pa.RecordBatch:
        try:
            return super()._batch(batch, keep)
        except (Damaged, FileNotFoundError) as error:
            _log.warning("%s is damaged (%s): %s is read again", self._file, error, self)
            self._file.unlink(missing_ok=True)
            self._made(self.paths)
            self._handles = None
            return super()._batch(batch, keep)

    def _made(self, files: list[str]) -> Arrays:
        """The index of the Arrow file, which is made if it is not there."""
        what = f"a copy of {describe(files)} with random access"
        index_file = self._file.with_suffix(".index")

        def load(_: Path) -> Arrays:
            index = cache.read_arrays(index_file)
            if os.stat(self._file).st_size != index["ends"][-1] + len(_END_OF_STREAM):
                raise Damaged("its size is wrong")
            return index

        def make() -> Arrays:
            index = self._make(files)
            cache.write_arrays(index_file, index)
            return index

        try:
            return cache.load_or_make(self._file, load, make, what)
        except TimeoutError:
            raise
        except OSError as error:
            raise DataError(
                f"{describe(files)} is compressed, and has no random access unless it is read once into the cache "
                f"directory {self._file.parent}, which failed: {error}; name another directory with DDP_STREAM_CACHE, or "
                f"decompress the files"
            ) from None

    def _make(self, files: list[str]) -> Arrays:
        total = sum(os.stat(path).st_size for path in files)
        with ExitStack() as stack:
            progress = stack.enter_context(Progress(transient=True, disable=not sys.stderr.isatty()))
            task = progress.add_task(f"Decompressing {describe(files)}", total=total)
            plain: list[str] = []
            for path in files:
                plain.append(str(stack.enter_context(_decompressed(path, self._file, len(plain)))))
                with open(plain[-1], "wb") as file:
                    _decompress(path, file, lambda count: progress.update(task, advance=count))
            progress.update(task, description=f"Reading {describe(files)}", completed=0)
            try:
                on_bad_row, fill_null = self._rule
                text = TEXTS[self._text](plain, fill_null=fill_null, on_bad_row=on_bad_row)
                bad = find_bad_rows(text) if on_bad_row == "skip" else {}
                kept = text.without(bad) if bad else text
                assert isinstance(kept, TextSource)
                index = self._convert(kept, lambda done: progress.update(task, completed=done * total))
                bad = {row: _renamed(reason, plain, files) for row, reason in bad.items()}
                return {**index, "bad": cache.as_array(bad)}
            except DataError as error:
                raise DataError(_renamed(str(error), plain, files)) from None

    def _convert(self, text: TextSource, report: Callable[[float], None]) -> Arrays:
        """One record batch for each block of `text`."""
        blocks = len(text.blocks()) - 1
        ends, checksums = [], []
        schema = text.schema.serialize()
        with cache.written_whole(self._file) as temporary, open(temporary, "wb") as file:
            file.write(schema)
            ends.append(file.tell())
            for block in range(blocks):
                columns = [column.combine_chunks() for column in text.read_rows(block).columns]
                message = pa.record_batch(columns, schema=text.schema).serialize()
                file.write(message)
                ends.append(file.tell())
                checksums.append(zlib.crc32(message))
                report((block + 1) / blocks)
            file.write(_END_OF_STREAM)
        return {
            "ends": np.array(ends, np.int64),
            "checksums": np.array(checksums, np.int64),
            "rows": np.diff(text.blocks()),
            "file": text.block_file,
            "schema": cache.as_array(schema.to_pybytes()),
        }


class _Batches:
    """The record batches of a file whose checksums are known."""

    def __init__(self, buffer: pa.Buffer, schema: pa.Schema, ends: Any, checksums: Any) -> None:
        self._buffer, self._schema, self._ends, self._checksums = buffer, schema, ends, checksums

    def get_batch(self, index: int) -> pa.RecordBatch:
        start, end = int(self._ends[index]), int(self._ends[index + 1])
        message = self._buffer.slice(start, end - start)
        if zlib.crc32(message) != self._checksums[index]:
            raise Damaged(f"the checksum of its record batch {index} is wrong")
        return pa.ipc.read_record_batch(message, self._schema)


def _renamed(message: str, temporary: Sequence[str], files: Sequence[str]) -> str:
    """`message` with the names of the compressed files in place of the temporary ones."""
    for name, path in zip(temporary, files, strict=True):
        message = message.replace(name, path)
    return message


@contextmanager
def _decompressed(path: str, file: Path, number: int) -> Iterator[Path]:
    """Where to decompress `path` to for a while."""
    temporary = file.with_name(f"{file.stem}.plain-{number}-{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _decompress(path: str, to: BinaryIO, report: Callable[[int], None]) -> None:
    try:
        with pa.OSFile(path) as source, pa.CompressedInputStream(source, CODECS[Path(path).suffix.lower()]) as stream:
            done = 0
            while chunk := stream.read(_COPY_BYTES):
                to.write(chunk)
                report(source.tell() - done)
                done = source.tell()
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be decompressed: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise DataError(f"{path} cannot be decompressed: {error}") from None


_log = logging.getLogger("ddp_stream")
