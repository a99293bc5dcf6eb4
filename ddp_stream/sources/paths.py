"""Paths of data files: what they stand for, and what identifies the bytes behind them."""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from ddp_stream.sources.base import DataError, check_columns, fingerprint_of

CODECS = {".gz": "gzip", ".zst": "zstd"}
"""Suffixes of compressed text, and the names of their codecs in Arrow."""
_IDENTITY_BYTES = 64 << 10
_BLOCK_OF_TAR = 512


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns what the file system minds about `path` into a DataError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} is not there any more: its rows would be lost; put it back, and start again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}{_whose(error)}") from None


def _whose(error: OSError) -> str:
    return f"; let user {os.geteuid()} read it" if isinstance(error, PermissionError) else ""


def has_changed(path: str, how: str) -> DataError:
    """The error for a file that is not what it was."""
    return DataError(
        f"{path} has changed since it was opened: {how}; rows would be lost or mixed up, so leave files alone during a run, "
        f"and start again"
    )


def existing_files(paths: str | Sequence[str]) -> list[str]:
    """`paths` as a list; raises DataError for one that is not a file, is empty, or must not be read."""
    files = [paths] if isinstance(paths, str) else list(paths)
    for path in files:
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
            if isinstance(error, PermissionError):
                raise DataError(f"{path} cannot be read: {error.strerror}{_whose(error)}") from None
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            remote = "; only files are read, so copy what is elsewhere, or mount it" if "://" in path else ""
            raise DataError(f"{path} is not there, or is no file{remote}")
        if status.st_size == 0:
            raise DataError(f"{path} is empty (0 bytes): there is nothing to train on; remove it, or write it again")
        if not os.access(path, os.R_OK):
            raise DataError(f"{path} cannot be read: Permission denied{_whose(PermissionError())}")
    if not files:
        raise DataError("no file was named")
    return files


_BEGINNINGS = {
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
    b"FEA1": ".feather",
    b"\xff\xff\xff\xff": ".arrow",
    b"\x93NUMPY": ".npy",
    b"PK\x03\x04": ".npz",
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"BZh": ".bz2",
    b"\xfd7zXZ\0": ".xz",
}


def suffix_by_content(path: str | Path) -> str:
    """The suffix that the first bytes of a file ask for; empty where they do not tell. Text is JSON Lines or unknown."""
    try:
        with open(path, "rb") as file:
            head = file.read(_BLOCK_OF_TAR)
    except OSError:
        return ""
    for beginning, suffix in _BEGINNINGS.items():
        if head.startswith(beginning):
            return suffix
    if head[257:262] == b"ustar":
        return ".tar"
    return ".jsonl" if head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")[:1] == b"{" else ""


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
    if not path:
        raise DataError("the path is empty: name a file, a directory or a glob")
    if os.path.isdir(path):
        with reading(path):
            entries = sorted(entry for entry in Path(path).iterdir() if entry.name[0] not in "._")
        inside = [entry for entry in entries if not entry.is_dir()]
        found = [str(entry) for entry in inside if suffix_of(entry) in suffixes]
        found = found or [str(entry) for entry in inside if suffix_by_content(entry) in suffixes]
        if not found:
            seen = ", ".join(entry.name for entry in inside[:5]) or "no files"
            deeper = "" if len(inside) == len(entries) else f"; for those in its directories, name {path}/**/*.SUFFIX"
            raise DataError(
                f"{path} is a directory without a file of a known format ({', '.join(suffixes)}): {seen}{deeper}"
            )
        return found
    if glob.has_magic(path) and not os.path.exists(path):
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
    with reading(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(file.read(_IDENTITY_BYTES))
        file.seek(max(file.tell(), size - _IDENTITY_BYTES))
        digest.update(file.read(_IDENTITY_BYTES))
    return Path(path).name, size, digest.hexdigest()[:16]


def stamp_of(paths: Sequence[str], *parts: Any) -> str:
    """A name for what is found out about `paths`: another one after any of them was touched."""
    return fingerprint_of([(file_identity(path), os.stat(path).st_mtime_ns) for path in paths], *parts)


def check_distinct(path: str, names: Sequence[str]) -> None:
    """Raises DataError if two columns have the same name."""
    duplicates = sorted(name for name, count in Counter(names).items() if count > 1)
    if duplicates:
        raise DataError(f"{path} has more than one column named {', '.join(duplicates)}: rename them in the file")


def chosen_columns(schema: pa.Schema, columns: Sequence[str] | None, path: str) -> pa.Schema:
    """The fields of a file's `schema` that are to be read; raises DataError if one is not there, or is there twice."""
    schema = schema.remove_metadata()
    check_distinct(path, schema.names)
    if columns is None:
        return schema
    check_columns(columns, schema.names, path)
    return pa.schema([schema.field(name) for name in columns])


def same_columns(found: pa.Schema, first: pa.Schema) -> bool:
    """Whether both have columns of the same names and types, in whatever order."""
    return len(found) == len(first) and {field.name: field.type for field in found} == {
        field.name: field.type for field in first
    }


def schema_difference(path: str, found: pa.Schema, first_path: str, first: pa.Schema) -> str:
    """Which column makes `found` of `path` differ from `first` of `first_path`, as an error message."""
    rule = (
        "files of one dataset must have the same columns: write it again like the others, or leave it out; of Parquet and "
        "Arrow files, --data.columns may choose columns that all have"
    )
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
