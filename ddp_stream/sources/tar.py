"""WebDataset shards: tar files, read in place by an index of where their members lie."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ddp_stream.sources.base import Column, Columns, DataError, Ints, Source, check_columns, fingerprint_of
from ddp_stream.sources.cache import Arrays, as_array, cached_arrays, from_array
from ddp_stream.sources.paths import describe, existing_files, file_identity, has_changed, reading, stamp_of

KEY = "__key__"
_BLOCK_BYTES = 4 << 20
_OPEN_FILES = 64
_ABSENT = -1
_BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories, pipes, whatever size they claim
_LONGEST_EXTENSION = 1 << 20
_EXTENSIONS = (b"L", b"K", b"x", b"g")


class WebDataset(Source):
    """Samples of one tar file, or of several laid end to end.

    Members of a shard whose names agree up to the first dot of the file name are a sample, in the order in which samples
    first appear: `dir/0001.jpg` and `dir/0001.cls` are the columns `jpg` and `cls` of the sample `dir/0001`. A column is a
    list of bytes, None where a sample has no such member; the column `__key__` holds the samples' names.

    Nothing is extracted: a name is a label, whatever path it looks like, and what is no regular file is passed over, as are
    names without a dot and those that begin with one.

    Args:
        paths: the files, in order

    Raises:
        DataError: a file is no tar file, is compressed or cut off, or has a member twice.
    """

    def __init__(self, paths: str | Sequence[str]) -> None:
        self.paths = existing_files(paths)
        index = cached_arrays(
            self.paths, ("WebDataset",), f"the index of {describe(self.paths)}", lambda: _index(self.paths)
        )
        self._start, self._size = index["start"], index["size"]
        self._names: tuple[str, ...] = tuple(from_array(index["names"]))
        self._column = {name: column for column, name in enumerate(self._names)}
        self._keys, self._key_ends = index["keys"], index["key_ends"]
        self._first = np.concatenate([[0], np.cumsum(index["rows"])])
        if self._first[-1] == 0:
            raise DataError(
                f"{describe(self.paths)} has no member with a name such as 0001.jpg: there is nothing to read"
            )
        self._names = (KEY, *self._names)
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def columns(self) -> tuple[str, ...]:
        return self._names

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def blocks(self) -> Ints:
        """Runs of samples of one shard, of about 4 MiB."""
        size = self._size.clip(min=0).sum(axis=1)
        shard = np.repeat(np.arange(len(self.paths)), np.diff(self._first))
        before = np.cumsum(size) - size
        run = (before - before[self._first[shard]]) // _BLOCK_BYTES
        changes = np.flatnonzero((np.diff(run) != 0) | (np.diff(shard) != 0)) + 1
        return np.concatenate([[0], changes, [len(self)]])

    def select(self, columns: Sequence[str]) -> Source:
        check_columns(columns, self.columns, str(self))
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__getstate__(), _names=tuple(columns))
        return other

    def take(self, rows: Ints) -> Columns:
        shards = (np.searchsorted(self._first, rows, side="right") - 1).tolist()
        taken: dict[str, Column] = {}
        for name in self._names:
            if name == KEY:
                taken[name] = [self._key(row) for row in rows.tolist()]
                continue
            column = self._column[name]
            starts, sizes = self._start[rows, column].tolist(), self._size[rows, column].tolist()
            taken[name] = [
                None if size == _ABSENT else self._read(shard, start, size)
                for shard, start, size in zip(shards, starts, sizes, strict=True)
            ]
        return taken

    def _key(self, row: int) -> str:
        start = int(self._key_ends[row - 1]) if row else 0
        return bytes(self._keys[start : int(self._key_ends[row])]).decode(errors="replace")

    def _read(self, shard: int, start: int, size: int) -> bytes:
        if shard not in self._files:
            with reading(self.paths[shard]):
                self._files[shard] = io.FileIO(self.paths[shard])
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        content = os.pread(self._files[shard].fileno(), size, start)
        if len(content) != size:
            raise has_changed(self.paths[shard], f"it ends before byte {start + size}")
        return content

    def where(self, row: int) -> str:
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        return f"{self.paths[shard]}, sample {self._key(row)}"

    def fingerprint(self) -> str:
        return fingerprint_of("WebDataset", [file_identity(path) for path in self.paths], len(self))

    def stamp(self) -> str | None:
        return stamp_of(self.paths, "WebDataset", self._names)

    def __str__(self) -> str:
        return describe(self.paths)


def _index(paths: list[str]) -> Arrays:
    """Where members begin and their sizes `[samples, columns]`, names of samples, samples of each shard `[shards]`."""
    names: dict[str, int] = {}
    samples: list[dict[int, tuple[int, int]]] = []
    keys: list[bytes] = []
    rows: list[int] = []
    for path in paths:
        of_key: dict[str, dict[int, tuple[int, int]]] = {}
        for name, start, size in _members(path):
            folder, _, file = name.rpartition("/")
            stem, dot, suffix = file.partition(".")
            if not stem or not dot or not suffix:
                continue
            key = f"{folder}/{stem}" if folder else stem
            column = names.setdefault(suffix.lower(), len(names))
            members = of_key.setdefault(key, {})
            if column in members:
                raise DataError(
                    f"{path} has the member {name!r} twice: one sample would hide the other; names must differ before "
                    f"their first dot"
                )
            members[column] = start, size
        samples += of_key.values()
        keys += [key.encode(errors="surrogateescape") for key in of_key]
        rows.append(len(of_key))
    starts = np.zeros((len(samples), len(names)), np.int64)
    sizes = np.full((len(samples), len(names)), _ABSENT, np.int64)
    for row, members in enumerate(samples):
        for column, (start, size) in members.items():
            starts[row, column], sizes[row, column] = start, size
    return {
        "start": starts,
        "size": sizes,
        "names": as_array(list(names)),
        "keys": as_array(b"".join(keys)),
        "key_ends": np.cumsum([len(key) for key in keys], dtype=np.int64),
        "rows": np.array(rows, np.int64),
    }


def _members(path: str) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of every regular file in a tar file (ustar, GNU or pax).

    Only headers are read, one a member, so that a shard of many gigabytes takes seconds.
    """
    with open(path, "rb", buffering=0) as file:
        length = os.fstat(file.fileno()).st_size
        offset = 0
        name: bytes | None = None  # what extension headers say of the next member
        told_size: int | None = None
        while offset < length:
            header = os.pread(file.fileno(), _BLOCK, offset)
            if header == bytes(_BLOCK):
                return
            kind, start = header[156:157], offset + _BLOCK
            try:
                if len(header) < _BLOCK or int(header[148:156].strip(b" \0"), 8) != _checksum(header):
                    raise ValueError
                size = _number(header[124:136])
                if kind in _WITHOUT_CONTENT:
                    size = 0
                elif kind not in _EXTENSIONS and told_size is not None:
                    size = told_size
                if size < 0 or start + size > length or (kind in _EXTENSIONS and size > _LONGEST_EXTENSION):
                    raise DataError(
                        f"{path}: the member at byte {offset} claims {size} bytes, and the file has {length}: it is cut off "
                        f"or damaged"
                    )
                if kind == b"L":
                    name = os.pread(file.fileno(), size, start).rstrip(b"\0")
                elif kind == b"x":
                    records = _pax_records(os.pread(file.fileno(), size, start))
                    name = records.get(b"path", name)
                    told_size = int(records[b"size"]) if b"size" in records else told_size
            except DataError:
                raise
            except ValueError:
                raise DataError(
                    f"{path} is no tar file that can be read in place: byte {offset} begins no member. A compressed one "
                    f"(.tar.gz) must be decompressed; another one is damaged or cut off"
                ) from None
            offset = start + -(-size // _BLOCK) * _BLOCK
            if kind in _EXTENSIONS:
                continue
            if name is None:
                name = header[:100].split(b"\0")[0]
                if header[257:263] == b"ustar\0" and header[345]:
                    name = header[345:500].split(b"\0")[0] + b"/" + name
            if kind in _REGULAR and not name.endswith(b"/"):
                yield name.decode(errors="surrogateescape"), start, size
            elif kind == b"S":
                raise DataError(f"{path}: the member {name!r} is sparse: write it again as a plain file")
            name = told_size = None


def _checksum(header: bytes) -> int:
    return sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _number(field: bytes) -> int:
    """A number in octal digits, or, where the first bit is set, in binary."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big", signed=True) if field[0] == 0xFF else int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """The records of a pax header: `LENGTH KEY=VALUE\\n`, one after the other."""
    records: dict[bytes, bytes] = {}
    while content:
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or not len(digits) < int(digits) <= len(content):
            break
        key, _, value = content[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[key] = value
        content = content[int(digits) :]
    return records
