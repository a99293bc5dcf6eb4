"""A block of shared memory is filled again when, and only when, nothing refers to it; nothing piles up."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import ddp_stream.loader
import ddp_stream.message
from ddp_stream import StreamLoader
from ddp_stream.message import Packed, Packer, Span, Unpacker
from ddp_stream.sources import InMemory, Parquet


def span(value: int, rows: int = 100) -> Span:
    columns = {"x": torch.full((rows, 3), value), "name": [str(value)] * rows}
    return Span(0, value, 1, columns, torch.arange(rows) + value)


def send(packed: Packed) -> Packed:
    """As between processes, but that the block is the same memory already."""
    block, packed.block = packed.block, None
    received: Packed = pickle.loads(pickle.dumps(packed))
    received.block = block
    return received


class Pair:
    def __init__(self) -> None:
        self.unpacker = Unpacker()
        self.packer = Packer(self.unpacker.loader, 0)

    def message(self, value: int, rows: int = 100) -> Packed:
        return send(self.packer.pack(span(value, rows)))


def check(found: Span, value: int, rows: int = 100) -> None:
    assert found.offset == value
    assert found.columns["x"].tolist() == [[value] * 3] * rows
    assert found.columns["name"] == [str(value)] * rows
    assert found.rows.tolist() == list(range(value, value + rows))


def test_a_block_is_filled_again_when_its_tensors_are_gone() -> None:
    pair = Pair()
    first = pair.message(1)
    assert first.block is not None
    found = pair.unpacker.unpack(first)
    check(found, 1)
    del found
    second = pair.message(2)
    assert (second.block, second.block_id) == (None, first.block_id)
    check(pair.unpacker.unpack(second), 2)


@pytest.mark.parametrize("keep", [lambda s: s.rows, lambda s: s.columns["x"], lambda s: s.columns["x"][5:7, 1:]])
def test_a_block_that_something_refers_to_is_left_alone(keep: Any) -> None:
    pair = Pair()
    kept = keep(pair.unpacker.unpack(pair.message(1)))
    before = kept.clone()
    for value in range(2, 40):
        check(pair.unpacker.unpack(pair.message(value)), value)
    assert torch.equal(kept, before)
    assert len(pair.packer._blocks) == 2


def test_a_larger_span_gets_a_larger_block() -> None:
    pair = Pair()
    for value, rows in enumerate([10, 1000, 10, 5000, 1]):
        check(pair.unpacker.unpack(pair.message(value, rows)), value, rows)
    assert len(pair.packer._blocks) == 1


def test_all_kept() -> None:
    pair = Pair()
    kept = [pair.unpacker.unpack(pair.message(value)) for value in range(40)]
    for value, found in enumerate(kept):
        check(found, value)
    assert len(pair.packer._blocks) == ddp_stream.message._MOST_BLOCKS
    kept.clear()
    assert pair.message(41).block is None


def test_what_was_thrown_away_on_its_way_is_not_waited_for() -> None:
    pair = Pair()
    found = pair.unpacker.unpack(pair.message(1))
    pair.message(2)  # with a block of its own, which the rank never sees
    del found
    again = pair.message(3)  # in the first one's block
    assert again.block is None
    pair.packer.begin()
    assert list(pair.packer._blocks) == [again.block_id]
    last = pair.message(4)
    assert (last.block, last.block_id) == (None, again.block_id)
    check(pair.unpacker.unpack(last), 4)


def make(monkeypatch: pytest.MonkeyPatch, **options: Any) -> StreamLoader:
    monkeypatch.setattr(ddp_stream.loader, "MESSAGE_BYTES", 1 << 10)
    source = InMemory({"x": np.arange(3000), "name": [str(row) for row in range(3000)]})
    return StreamLoader(source, 30, **{"num_workers": 2, **options})


def rows_of(batches: list[Any]) -> list[int]:
    for batch in batches:
        assert batch["x"].tolist() == batch.rows.tolist() == [int(name) for name in batch["name"]]
    return sorted(row for batch in batches for row in batch.rows[batch.weight > 0].tolist())


@pytest.mark.parametrize("persistent", [True, False])
def test_batches_that_are_kept_stay_as_they_are(persistent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make(monkeypatch, persistent_workers=persistent)
    kept = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        kept.append(list(loader))
    for batches in kept:
        assert rows_of(batches) == list(range(3000))


def test_an_iteration_that_is_broken_off_takes_nothing_from_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make(monkeypatch)
    for epoch in range(6):
        loader.set_epoch(epoch)
        for step, _ in enumerate(loader):
            if step == 7 * epoch:
                break
        loader.set_epoch(epoch)
        assert rows_of(list(loader)) == list(range(3000))


def held() -> tuple[int, int, int]:
    """File descriptors, threads, and mapped blocks of shared memory of this process."""
    maps = Path("/proc/self/maps").read_text().count("/torch_")
    return len(os.listdir("/proc/self/fd")), threading.active_count(), maps


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_piles_up(num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddp_stream.loader, "MESSAGE_BYTES", 1 << 10)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"x": np.arange(5000)}), path, row_group_size=100)
    loader = StreamLoader(Parquet(str(path)), 50, num_workers=num_workers)
    counts = []
    for epoch in range(20):
        loader.set_epoch(epoch)
        assert sum(len(batch.rows) for batch in loader) == 5000
        counts.append(held())
    early, late = counts[1], counts[-1]
    assert late[1] <= early[1]
    # How many blocks are in use at once is a matter of timing, but has an end.
    assert late[0] <= early[0] + 2 * ddp_stream.message._MOST_BLOCKS
    assert late[2] <= 2 * ddp_stream.message._MOST_BLOCKS
    assert max(count[0] for count in counts[10:]) <= max(count[0] for count in counts[:10]) + 2
    assert len(list(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))) == 0
