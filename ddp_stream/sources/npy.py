"""NumPy files, memory-mapped: .npy, one or a directory of them, and .npz."""

from __future__ import annotations

import os
import re
import shutil
import struct
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddp_stream.pool import empty
from ddp_stream.sources import cache
from ddp_stream.sources.base import Columns, DataError, Ints, Source, check_columns, fingerprint_of
from ddp_stream.sources.memory import gather
from ddp_stream.sources.paths import describe, existing_files, file_identity, has_changed, reading, stamp_of

_COLUMN = "features"
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name
Parts = dict[str, list[NDArray[Any]]]


class ArraySource(Source):
    """Columns of memory-mapped arrays, each in one part or in several laid end to end along their first axis.

    Args of a subclass's `__init__` to pass on:
        paths: the files
        columns: the columns to read; None reads all
    """

    def __init__(self, paths: Sequence[str], columns: Sequence[str] | None) -> None:
        self.paths = list(paths)
        self._names: tuple[str, ...] | None = None if columns is None else tuple(columns)
        self._opened: tuple[int, Parts] | None = None
        self._shapes: dict[str, list[tuple[Any, Any]]] | None = None
        parts = self._parts()
        lengths = {}
        for name, arrays in parts.items():
            first = arrays[0]
            for index, array in enumerate(arrays):
                path = self._path_of(name, index)
                if array.dtype.hasobject:
                    raise DataError(f"{path} is no .npy file of fixed-size values: it holds Python objects")
                if array.dtype.kind in "fc" and array.dtype.itemsize > {"f": 8, "c": 16}[array.dtype.kind]:
                    raise DataError(f"{path} holds {array.dtype}, which no tensor holds: write it again as float64")
                if array.ndim == 0:
                    raise DataError(f"{path} has no rows: its shape is ()")
                if array.dtype != first.dtype or array.shape[1:] != first.shape[1:]:
                    raise DataError(
                        f"{path} holds {array.dtype} rows of shape {array.shape[1:]}, but {self._path_of(name, 0)} holds "
                        f"{first.dtype} rows of shape {first.shape[1:]}: parts of one column must agree"
                    )
            lengths[name] = sum(map(len, arrays))
            if lengths[name] == 0:
                raise DataError(f"{self._path_of(name, 0)} has no rows: its shape is {first.shape}")
        if len(set(lengths.values())) > 1:
            raise DataError(
                f"{self} has columns of different lengths: {lengths}; a row has a value in each, so choose columns of one "
                f"length with --data.columns. Files are laid end to end if their names differ only in a number at the end"
            )
        self._rows = next(iter(lengths.values()))
        self._offsets = {name: np.cumsum([0, *map(len, arrays)]) for name, arrays in parts.items()}
        self._names = tuple(parts)

    @abstractmethod
    def _load(self) -> Parts:
        """Map the arrays of every column."""

    def _path_of(self, name: str, part: int) -> str:
        """The file of a part, for messages."""
        return str(self)

    def _parts(self) -> Parts:
        if self._opened is None or self._opened[0] != os.getpid():
            parts = self._load()
            names = tuple(parts) if self._names is None else self._names
            check_columns(names, tuple(parts), str(self))
            shapes = {name: [(array.shape, array.dtype) for array in parts[name]] for name in names}
            for name, found in shapes.items():
                was = found if self._shapes is None else self._shapes[name]
                part = next(
                    (part for part, pair in enumerate(zip(was, found, strict=True)) if pair[0] != pair[1]), None
                )
                if part is not None:
                    raise has_changed(self._path_of(name, part), f"it held {was[part]} and holds {found[part]}")
            self._shapes = self._shapes or shapes
            self._opened = os.getpid(), {name: parts[name] for name in names}
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return self._rows

    @property
    def columns(self) -> tuple[str, ...]:
        return self._names or ()

    def select(self, columns: Sequence[str]) -> Source:
        check_columns(columns, self.columns, str(self))
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__getstate__(), _names=tuple(columns))
        return other

    def take(self, rows: Ints) -> Columns:
        return {name: _gather(arrays, self._offsets[name], rows) for name, arrays in self._parts().items()}

    def fingerprint(self) -> str:
        return fingerprint_of(type(self).__name__, [file_identity(path) for path in self.paths])

    def __str__(self) -> str:
        return describe(self.paths)


def _gather(arrays: list[NDArray[Any]], offsets: Ints, rows: Ints) -> NDArray[Any]:
    if len(arrays) == 1:
        return np.asarray(gather(arrays[0], rows))
    values = empty((len(rows), *arrays[0].shape[1:]), arrays[0].dtype)
    part = np.searchsorted(offsets, rows, side="right") - 1
    for index in np.unique(part).tolist():
        here = np.flatnonzero(part == index)
        values[here] = gather(arrays[index], rows[here] - offsets[index])
    return values


class Npy(ArraySource):
    """One `.npy` file, or several.

    Files whose names differ only in a number at the end (`part-0.npy`, `part-1.npy`) are laid end to end; others lie side
    by side, a column each, named as the file (`features.npy`, `label.npy`); both may be combined (`features-0.npy`,
    `label-0.npy`, `features-1.npy`, ...). A single column is called `features [rows, ...]`, whatever the file's name. A
    structured array has its fields as columns.

    Args:
        paths: the files, in order
    """

    def __init__(self, paths: str | Sequence[str]) -> None:
        files = existing_files(paths)
        self._files: dict[str, list[str]] = {}
        numbers: dict[str, list[int]] = {}
        for path in files:
            found = re.fullmatch(r"(.*?)[-_.]?(\d*)(?:-of-\d+)?", Path(path).stem)
            assert found is not None, "every name has this form"
            self._files.setdefault(found[1], []).append(path)
            numbers.setdefault(found[1], []).append(int(found[2] or 0))
        if len(self._files) == 1:
            self._files = {_COLUMN: files}
        else:
            for name, of_column in numbers.items():
                first, of_first = next(iter(numbers.items()))
                if of_column != of_first or not name:
                    raise DataError(
                        f"{describe(files)}: the files of column {name!r} are numbered {of_column[:5]}, and those of "
                        f"{first!r} {of_first[:5]}: files side by side need a name each, and the same numbers in one order"
                    )
        super().__init__(files, None)

    def _path_of(self, name: str, part: int) -> str:
        return self._files.get(name, self.paths)[part]

    def _load(self) -> Parts:
        parts = {name: [_map(path) for path in files] for name, files in self._files.items()}
        first = next(iter(parts.values()))[0]
        if len(parts) > 1 or first.dtype.names is None:
            return parts
        for path, array in zip(self.paths, parts[_COLUMN], strict=True):
            if array.dtype != first.dtype:
                raise DataError(f"{path} holds {array.dtype}, but {self.paths[0]} holds {first.dtype}")
        return {field: [array[field] for array in parts[_COLUMN]] for field in first.dtype.names}


def _map(path: str) -> NDArray[Any]:
    try:
        with reading(path):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except DataError:
        raise
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is no .npy file of fixed-size values ({error})") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is no .npy file but an archive of several arrays (.npz): rename it")
    return np.asarray(array)  # a plain array is quicker than a memmap, and keeps the map open, too


class Npz(ArraySource):
    """One `.npz` archive, or several laid end to end: every array in it is a column, along its first axis.

    A compressed archive (`numpy.savez_compressed`) is written once to the cache directory without compression.

    Args:
        paths: the files, in order
        columns: the arrays to read; None reads all, which must be of one length
    """

    def __init__(self, paths: str | Sequence[str], columns: Sequence[str] | None = None) -> None:
        files = existing_files(paths)
        self._mapped = [_stored(path) for path in files]
        super().__init__(files, columns)

    def _load(self) -> Parts:
        archives = [_map_members(path, mapped) for path, mapped in zip(self.paths, self._mapped, strict=True)]
        for path, archive in zip(self.paths, archives, strict=True):
            if set(archive) != set(archives[0]):
                raise DataError(
                    f"{path} holds the arrays {sorted(archive)}, and {self.paths[0]} holds {sorted(archives[0])}: files of "
                    f"one dataset must have the same columns"
                )
        return {name: [archive[name] for archive in archives] for name in archives[0]}

    def _path_of(self, name: str, part: int) -> str:
        return f"{self.paths[part]}: array {name!r}"


def _stored(path: str) -> str:
    """`path`, or a copy of it in the cache whose members are not compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if all(member.compress_type == zipfile.ZIP_STORED for member in members):
                return path
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} is no .npz archive that can be read: {error}") from None

    def load(file: Path) -> str:
        try:
            with zipfile.ZipFile(file) as copy:
                bad = copy.testzip()
        except zipfile.BadZipFile as error:
            raise cache.Damaged(str(error)) from None
        if bad is not None:
            raise cache.Damaged(f"the checksum of {bad} is wrong")
        return str(file)

    def make() -> str:
        with (
            cache.written_whole(file) as temporary,
            zipfile.ZipFile(path) as archive,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as copy,
        ):
            for member in members:
                with archive.open(member) as source, copy.open(member.filename, "w", force_zip64=True) as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        return str(file)

    file = cache.cache_dir() / f"{stamp_of([path], 'Npz')}.npz"
    try:
        return cache.load_or_make(file, load, make, f"a copy of {path} that is not compressed")
    except (zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    except TimeoutError:
        raise
    except OSError as error:
        raise DataError(
            f"{path} is compressed, and can be mapped only if it is copied once into the cache directory {file.parent}, "
            f"which failed: {error}; name another directory with DDP_STREAM_CACHE, or save it with numpy.savez"
        ) from None


def _map_members(path: str, mapped: str) -> dict[str, NDArray[Any]]:
    """The arrays of an archive, each mapped where its bytes lie in the file `mapped`."""
    arrays: dict[str, NDArray[Any]] = {}
    with reading(mapped), zipfile.ZipFile(mapped) as archive, open(mapped, "rb") as file:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            file.seek(member.header_offset)
            name_bytes, extra_bytes = struct.unpack("<HH", file.read(_LOCAL_HEADER)[26:])
            file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
            try:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(file)
                if dtype.hasobject:
                    raise ValueError("it holds Python objects")
                size = int(np.prod(shape)) * dtype.itemsize
                if file.tell() + size > os.fstat(file.fileno()).st_size:
                    raise ValueError("it ends before its values do")
                arrays[name] = (
                    np.asarray(np.memmap(mapped, dtype, "r", file.tell(), shape, "F" if fortran else "C"))
                    if size
                    else np.empty(shape, dtype)
                )
            except (ValueError, EOFError) as error:
                raise DataError(f"{path}: {member.filename} is no array of fixed-size values ({error})") from None
    if not arrays:
        raise DataError(f"{path} holds no array")
    return arrays
