"""Paths of data files: what they stand for, and what identifies the bytes behind them."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ddp_stream.sources.base import DataError, fingerprint_of

CODECS = {".gz": "gzip", ".zst": "zstd"}
"""Suffixes of compressed text, and the names of their codecs in Arrow."""
_IDENTITY_BYTES = 64 << 10


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


def stamp_of(paths: Sequence[str], *parts: Any) -> str:
    """A name for what is found out about `paths`: another one after any of them was touched."""
    return fingerprint_of([(file_identity(path), os.stat(path).st_mtime_ns) for path in paths], *parts)


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
