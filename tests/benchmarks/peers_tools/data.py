"""The data of the five cases, made from a seed. Every row carries its own id, so that what was delivered can be checked.

case            rows     where the id is
1 table         200,000  `label`, as float32
2 csv, npy      200,000  `label`; the last column of the matrix
3 images         20,000  `label`, the member `cls`
4 tokens         48,828  the first token of the window
5 text          200,000  the first word
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

BATCH = 256
FEATURES = 32
NAMES = [f"f{index}" for index in range(FEATURES)]
IMAGE = 64
WINDOW = 1024
SHARDS = 16
_GROUP = 8192


@dataclass(frozen=True)
class Case:
    """What is read: `name` as on the command line, `kind` of rows, how many, and the file they are in; how it is called."""

    name: str
    kind: str
    rows: int
    file: str
    label: str
    title: str

    @property
    def steps(self) -> int:
        return -(-self.rows // BATCH)


CASES = {
    case.name: case
    for case in (
        Case("1", "table", 200_000, "rows.parquet", "Parquet", "200,000 rows x 32 float32 + label, Parquet (zstd)"),
        Case("2csv", "table", 200_000, "rows.csv", "CSV", "the same rows as CSV"),
        Case("2npy", "matrix", 200_000, "rows.npy", ".npy", "the same rows as one .npy matrix"),
        Case("3", "images", 20_000, "images", "JPEG", "20,000 JPEGs of 64x64 in tar shards, decoded"),
        Case("4", "tokens", 48_828, "tokens.bin", "tokens", "50 M uint16 tokens, windows of 1,024"),
        Case("5", "text", 200_000, "text.parquet", "text", "200,000 text rows, Parquet (zstd)"),
    )
}


def make(case: Case, folder: Path) -> None:
    """Write the file of `case` into `folder`, unless it is there."""
    target = folder / case.file
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{case.file}.partial"
    {"table": _table, "matrix": _matrix, "images": _images, "tokens": _tokens, "text": _text}[case.kind](case, partial)
    os.rename(partial, target)


def matrix(case: Case) -> np.ndarray:
    """`[rows, 33]` float32: normal features, and the row id as label."""
    values = np.empty((case.rows, FEATURES + 1), np.float32)
    values[:, :FEATURES] = np.random.default_rng(0).standard_normal((case.rows, FEATURES), np.float32)
    values[:, FEATURES] = np.arange(case.rows)
    return values


def rows_of(case: Case, folder: Path) -> Sequence[Any]:
    """The rows as whoever converts them has them: arrays, text, or `(JPEG, label)`."""
    if case.kind == "images":
        return [row for shard in shards(folder / case.file) for row in members(shard.read_bytes())]
    if case.kind == "tokens":
        return tokens(folder / case.file)
    if case.kind == "text":
        return pq.read_table(folder / case.file)["text"].to_pylist()
    return matrix(case)


def shards(folder: Path | str) -> list[Path]:
    return sorted(Path(folder).glob("*.tar"))


def members(tar: bytes) -> Iterator[tuple[bytes, int]]:
    """JPEG and label of every sample of a shard in memory. Its headers are plain, and the two lie side by side."""
    found, start = [], 0
    while size_digits := tar[start + 124 : start + 135].strip(b"\0"):
        begin, size = start + 512, int(size_digits, 8)
        found.append(tar[begin : begin + size])
        start = begin + -(-size // 512) * 512
        if len(found) == 2:
            yield found[0], int(found[1])
            found = []


def tokens(path: Path | str) -> np.ndarray:
    """`[rows, 1024]`, mapped; writable in memory, as torch wants it, never in the file."""
    return np.memmap(path, np.uint16, "c").reshape(-1, WINDOW)


def _table(case: Case, path: Path) -> None:
    columns = [np.ascontiguousarray(column) for column in matrix(case).T]
    table = pa.table(columns, names=[*NAMES, "label"])
    if case.file.endswith(".csv"):
        pyarrow.csv.write_csv(table, path)
    else:
        pq.write_table(table, path, row_group_size=_GROUP, compression="zstd")


def _matrix(case: Case, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, matrix(case))


def _images(case: Case, path: Path) -> None:
    from PIL import Image

    path.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(path / f"{shard:03}.tar", "w") as tar:
            for row in range(shard * case.rows // SHARDS, (shard + 1) * case.rows // SHARDS):
                coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(coarse).resize((IMAGE, IMAGE), Image.Resampling.BICUBIC).save(buffer, "JPEG")
                for suffix, content in (("jpg", buffer.getvalue()), ("cls", str(row).encode())):
                    member = tarfile.TarInfo(f"{row:06}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _tokens(case: Case, path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 1 << 16, (case.rows, WINDOW), np.uint16)
    tokens[:, 0] = np.arange(case.rows)
    tokens.tofile(path)


def _text(case: Case, path: Path) -> None:
    rng = np.random.default_rng(0)
    words = np.array(["".join(chr(97 + letter) for letter in rng.integers(0, 26, n)) for n in rng.integers(2, 9, 4000)])
    lengths = rng.integers(10, 60, case.rows)
    chosen = np.split(words[rng.integers(0, len(words), lengths.sum())], np.cumsum(lengths)[:-1])
    text = [f"{row} {' '.join(line)}" for row, line in enumerate(chosen)]
    pq.write_table(pa.table({"text": text}), path, row_group_size=_GROUP, compression="zstd")
