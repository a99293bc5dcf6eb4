"""Bytes read over bytes used, counted at the file: near 1 for every number of ranks that divides the lanes."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddp_stream import StreamLoader, Topology
from ddp_stream.sources import Parquet, decoded

GROUPS, GROUP_ROWS, COLUMNS = 64, 1024, 8


class CountingFile:
    """A file that pyarrow reads through Python, and that counts what it gives."""

    def __init__(self, path):
        self._file = Path(path).open("rb")  # noqa: SIM115  (pyarrow closes it)
        self.count = 0

    def read(self, size=-1):
        content = self._file.read(size)
        self.count += len(content)
        return content

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.fixture
def path(tmp_path):
    rng = np.random.default_rng(0)
    rows = GROUPS * GROUP_ROWS
    table = pa.table({"id": np.arange(rows), **{f"x{i}": rng.random(rows, np.float32) for i in range(COLUMNS)}})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=GROUP_ROWS, compression="zstd")
    return str(tmp_path / "a.parquet")


@pytest.fixture
def opened(monkeypatch):
    """The files that are opened, each a CountingFile."""
    files, parquet_file = [], pq.ParquetFile

    def open_counting(path, **options):
        files.append(CountingFile(path))
        return parquet_file(files[-1], **options)

    monkeypatch.setattr(pq, "ParquetFile", open_counting)
    return files


def bytes_read_per_byte_used(path, world_size, lanes, opened):
    """Over an epoch on all ranks; asserts that they see every row once."""
    rows = []
    for rank in range(world_size):
        loader = StreamLoader(Parquet(path), 256, lanes=lanes, shuffle="blocks", topology=Topology(rank, world_size))
        rows += [row for batch in loader for row in batch["id"].tolist()]
    assert sorted(rows) == list(range(GROUPS * GROUP_ROWS))
    return sum(file.count for file in opened) / Path(path).stat().st_size


@pytest.mark.parametrize(
    ("lanes", "world_size", "least", "most"),
    [
        (4, 1, 0.9, 1.1),
        (4, 2, 0.9, 1.1),
        (4, 4, 0.9, 1.1),
        (1, 1, 0.9, 1.1),
        (1, 2, 1.9, 2.2),  # every rank takes its share of every step, and so a part of every row group
        (1, 4, 3.8, 4.4),
    ],
)
def test_bytes_read(path, lanes, world_size, least, most, opened, monkeypatch):
    monkeypatch.setattr(decoded, "CACHE_BYTES", 0)  # nothing is kept but what the current rows need
    ratio = bytes_read_per_byte_used(path, world_size, lanes, opened)
    print(f"{lanes} lane(s), {world_size} rank(s): {ratio:.2f} bytes read for every byte used")
    assert least < ratio < most
