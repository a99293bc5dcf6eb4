"""Decoded blocks: what is read ahead, what is kept, and how columns lie in them."""

import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ddp_stream import StreamingDataset
from ddp_stream.sources import DataError, Parquet, decoded
from ddp_stream.sources.interleaved import interleave, rows_of, separate
from ddp_stream.transforms import side_by_side


def blocks_of(size, log):
    """Blocks of `size` bytes; `log` gets every block that is decoded, and by which thread."""

    def decode(block):
        log.append((block, threading.current_thread().name.split("_")[0]))
        return {"x": np.full(size // 8, block, np.int64)}, size // 8, size

    return decoded.DecodedBlocks(decode)


@pytest.mark.parametrize("cache_bytes", [0, 4 * 8000, 1 << 20])
def test_every_block_is_decoded_once_and_ahead(monkeypatch, cache_bytes):
    monkeypatch.setattr(decoded, "CACHE_BYTES", cache_bytes)
    log = []
    blocks = blocks_of(8000, log)
    spans = [
        [number, number + 1, number + 2] for number in range(0, 40, 2)
    ]  # each begins in the block that one ends in
    blocks.join([0])  # by which the size of a block is known
    for now, then in itertools.pairwise([[0], *spans]):
        blocks.ahead(then)
        deadline = time.monotonic() + 20
        while len(log) <= then[-1] and time.monotonic() < deadline:  # nobody asks for them
            time.sleep(0.001)
        columns, starts = blocks.join(now)
        assert columns["x"][starts].tolist() == now
        assert len(blocks) <= max(3, cache_bytes // 8000)
    blocks.join(spans[-1])
    assert [block for block, _ in log] == list(range(41))
    assert {name for _, name in log[1:]} == {"decode"}


def test_what_is_missing_is_decoded_by_two_threads_at_once():
    both = threading.Barrier(2, timeout=20)
    names = []

    def decode(block):
        both.wait()
        names.append(threading.current_thread().name.split("_")[0])
        return {"x": np.full(10, block)}, 10, 80

    columns, starts = decoded.DecodedBlocks(decode).join([3, 5, 7, 8])
    assert columns["x"][starts].tolist() == [3, 5, 7, 8]
    assert sorted(names) == ["MainThread", "MainThread", "decode", "decode"]


def test_a_block_that_cannot_be_decoded_is_an_error_each_time_and_the_others_are_there():
    def decode(block):
        if block == 2:
            raise DataError("block 2 is damaged")
        return {"x": np.full(10, block)}, 10, 80

    blocks = decoded.DecodedBlocks(decode)
    blocks.ahead([2])
    for _ in range(2):
        with pytest.raises(DataError, match="block 2 is damaged"):
            blocks.join([1, 2, 3])
    assert blocks.join([1, 3])[0]["x"].tolist() == [1] * 10 + [3] * 10


def test_no_more_is_read_ahead_than_may_be_on_its_way(monkeypatch):
    monkeypatch.setattr(decoded, "AHEAD_BYTES", 3 * 8000)
    log = []
    blocks = blocks_of(8000, log)
    blocks.join([0])  # by which the size of a block is known
    blocks.ahead([1, 2, 3, 4, 5])
    assert set(blocks._coming) == {1, 2, 3}
    blocks.join([1, 2, 3, 4, 5])
    assert [block for block, _ in sorted(log)] == [0, 1, 2, 3, 4, 5]


def test_what_nobody_came_for_is_given_up():
    log = []
    blocks = blocks_of(8000, log)
    blocks.join([0])
    for start in range(100, 200, 10):  # iterations that were broken off
        blocks.ahead(range(start, start + 10))
    assert len(blocks._coming) <= 20
    blocks.ahead([1, 2])
    blocks.ahead([3, 4])
    assert set(blocks._coming) == {1, 2, 3, 4}


def test_large_blocks_are_decoded_by_two_threads_too(monkeypatch):
    monkeypatch.setattr(decoded, "AHEAD_BYTES", 1000)
    both = threading.Barrier(2, timeout=20)

    def decode(block):
        both.wait()
        return {"x": np.full(1000, block)}, 1000, 8000

    blocks = decoded.DecodedBlocks(decode)
    for start in (0, 2, 4):
        blocks.join([start, start + 1])


def test_a_thread_may_outlive_the_main_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import threading, time\n"
        "import numpy as np\n"
        "from ddp_stream.sources.decoded import DecodedBlocks\n"
        "def decode(block):\n"
        "    return {'x': np.full(9, block)}, 9, 72\n"
        "def train():\n"
        "    blocks = DecodedBlocks(decode)\n"
        "    blocks.join([0, 1])\n"
        "    threading.main_thread().join()\n"
        "    time.sleep(0.2)\n"
        "    print(blocks.join([2, 3])[0]['x'].sum())\n"
        "threading.Thread(target=train).start()\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("45\n", "")


def columns_of(rows):
    rng = np.random.default_rng(0)
    floats = {f"f{index}": rng.random(rows, np.float32) for index in range(9)}
    ints = {f"i{index}": rng.integers(0, 99, rows) for index in range(8)}
    few = {f"d{index}": rng.random(rows) for index in range(7)}
    return {**ints, **few, **floats, "matrix": rng.random((rows, 2), np.float32), "list": list(range(rows))}


def test_many_columns_of_a_type_lie_row_by_row():
    columns = columns_of(50)
    kept = interleave(columns)
    assert {len(key) for key in kept if isinstance(key, tuple)} == {9, 8}
    assert "d0" in kept
    names = list(columns)[::-1]
    back = separate(kept, names)
    assert list(back) == names
    for name, values in columns.items():
        assert np.array_equal(back[name], values)
        assert not isinstance(values, np.ndarray) or back[name].dtype == values.dtype


def test_neighbours_are_put_side_by_side_without_looking_at_each():
    columns = columns_of(50)
    back = separate(interleave(columns), list(columns))
    some = [f"f{index}" for index in range(2, 7)]
    expected = torch.from_numpy(np.stack([columns[name] for name in some], axis=1))
    view = rows_of([back[name] for name in some])
    assert np.shares_memory(view, back["f2"])
    assert torch.equal(torch.from_numpy(view), expected)
    found = side_by_side([back[name] for name in some])
    assert torch.equal(found, expected)
    assert found.is_contiguous()


@pytest.mark.parametrize(
    "chosen",
    [
        lambda back: [back["f1"], back["f0"]],
        lambda back: [back["f0"], back["f2"]],
        lambda back: [back["f8"], back["i0"]],
        lambda back: [back["f0"], back["f1"][:-1]],
        lambda back: [back["f0"], back["f1"].copy()],
        lambda back: [back["d0"], back["d1"]],
        lambda back: [back["matrix"], back["f0"]],
        lambda back: [back["f0"]],
    ],
    ids=["backwards", "gap", "types", "lengths", "copied", "few", "matrix", "one"],
)
def test_what_are_no_neighbours(chosen):
    columns = columns_of(50)
    assert rows_of(chosen(separate(interleave(columns), list(columns)))) is None


def test_columns_with_the_same_address_in_other_memory_are_no_neighbours():
    memory = np.zeros((10, 4), np.float32)
    a, b = np.lib.stride_tricks.as_strided(memory[:, 0], (10,), (16,)), memory[:, 1]
    assert a.base is not b.base
    assert rows_of([a, b]) is None


def test_a_wide_table_is_read_as_it_was_written(tmp_path):
    columns = columns_of(1000)
    columns["text"] = [f"row {index}" for index in range(1000)]
    columns["matrix"] = columns["matrix"].tolist()
    path = str(tmp_path / "wide.parquet")
    pq.write_table(pa.table(columns), path, row_group_size=300)
    source = Parquet(path)
    rows = np.random.default_rng(1).permutation(1000)
    for chosen in (list(columns), ["text", *(f"f{i}" for i in (3, 1, 0, 2, 8, 7, 6, 5, 4)), "i3"]):
        taken = source.select(chosen).take(rows)
        assert list(taken) == chosen
        for name in chosen:
            assert np.array_equal(np.asarray(taken[name]), np.asarray(columns[name])[rows])
        assert {name: len(values) for name, values in source.select(chosen).take(rows[:0]).items()} == dict.fromkeys(
            chosen, 0
        )


def test_a_sample_of_a_wide_table_drags_no_other_column_along(tmp_path):
    path = str(tmp_path / "wide.parquet")
    pq.write_table(pa.table({f"f{index}": np.arange(100, dtype=np.float32) for index in range(20)}), path)
    sample = next(iter(StreamingDataset(Parquet(path))))
    assert sample["f3"].untyped_storage().nbytes() == 400
