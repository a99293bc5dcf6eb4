"""Memory that is used again: never while anybody can see it, and not without bound."""

import gc
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import torch

from ddp_stream import pool
from ddp_stream.sources.memory import gather

LARGE = (300_000,)


@pytest.fixture(autouse=True)
def _empty_pool():
    gc.collect()
    pool._free.clear()


def address(array):
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def test_memory_is_used_again_when_the_array_is_gone():
    array = pool.empty(LARGE, np.float32)
    first = address(array)
    del array
    assert address(pool.empty((3, 100_000), np.int32)) == first
    smaller = pool.empty((299_000,), np.float32)  # a little smaller: the same memory
    assert address(smaller) == first
    assert address(pool.empty(LARGE, np.float32)) != first


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array[5:10],
        lambda array: array.reshape(3, -1).T[1],
        lambda array: array.view(np.uint8),
        lambda array: torch.from_numpy(array)[7:9],
        lambda array: memoryview(array)[3:4],
    ],
    ids=["slice", "reshaped", "other type", "tensor", "memoryview"],
)
def test_a_view_keeps_the_memory(view):
    array = pool.empty(LARGE, np.float32)
    first = address(array)
    part = view(array)
    del array
    assert address(pool.empty(LARGE, np.float32)) != first
    del part
    gc.collect()
    assert any(address(block) == first for blocks in pool._free.values() for block in blocks)


def test_tensors_of_any_type_and_of_no_value():
    for dtype in (torch.bfloat16, torch.float64, torch.bool):
        tensor = pool.empty_tensor((500, 300), dtype)
        assert tensor.dtype == dtype
        assert tensor.shape == (500, 300)
        tensor.fill_(1)
        assert tensor.sum() == 150_000 or dtype == torch.bfloat16
    assert pool.empty_tensor((0, 4), torch.float32).shape == (0, 4)
    assert pool.empty((0, 4), np.float32).shape == (0, 4)
    assert pool.empty((np.int64(1000), 100), np.float32).shape == (1000, 100)


def test_what_is_kept_has_a_bound():
    megabytes = pool.FREE_BYTES >> 20
    several = [pool.empty((3 << 20,), np.uint8) for _ in range(megabytes // 2)]
    assert not pool._free
    del several
    assert 0 < len(pool._free[3 << 20]) * 3 <= megabytes
    large = pool.empty((pool.FREE_BYTES - (1 << 20),), np.uint8)  # what was in use once makes room for it
    del large
    assert [len(blocks) for blocks in pool._free.values()] == [1]
    too_large = pool.empty((pool.FREE_BYTES + 1,), np.uint8)
    del too_large
    assert sum(size * len(blocks) for size, blocks in pool._free.items()) <= pool.FREE_BYTES


def test_arrays_that_outlive_the_program_are_no_noise(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from ddp_stream import pool\nkept = [pool.empty((1 << 20,), 'f4') for _ in range(70)]\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""


def test_threads_never_share_memory():
    seen = []

    def work(number):
        for _ in range(200):
            array = pool.empty((20_000,), np.int64)
            array[:] = number
            seen.append((array == number).all())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 800
    assert all(seen)


def unaligned(values):
    memory = np.empty(values.nbytes + 1, np.uint8)
    array = np.ndarray(values.shape, values.dtype, buffer=memory, offset=1)
    array[:] = values
    return array


def as_field(values):
    array = np.zeros(len(values), [("other", np.int64), ("values", values.dtype, values.shape[1:])])
    array["values"] = values
    return array["values"]


VALUES = np.arange(600_000, dtype=np.float32).reshape(200_000, 3)


@pytest.mark.parametrize(
    "column",
    [
        VALUES,
        np.asfortranarray(VALUES),
        unaligned(VALUES),
        as_field(VALUES),
        VALUES[::-1],
        VALUES.astype(">f4"),
        torch.from_numpy(VALUES),
    ],
    ids=["plain", "Fortran", "unaligned", "field", "backwards", "big-endian", "tensor"],
)
def test_rows_are_gathered_without_a_copy_of_the_column(column):
    rows = np.array([199_999, 0, 7, 7, 100_000])
    expected = np.asarray(column)[rows]
    tracemalloc.start()
    try:
        found = gather(column, rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(np.asarray(found), expected)
    assert found.is_contiguous() if isinstance(found, torch.Tensor) else found.flags.c_contiguous
    assert peak < 100_000  # the column has 2.4 MB
    assert gather(column, rows[:0]).shape == (0, 3)


def test_what_is_gathered_lies_row_by_row():
    channels_last = VALUES[:9600].reshape(100, 3, 12, 8).transpose(0, 2, 3, 1)
    found = gather(channels_last, np.array([5, 3]))
    assert np.array_equal(found, channels_last[[5, 3]])
    assert found.flags.c_contiguous


@pytest.mark.parametrize("row", [-1, 200_000])
@pytest.mark.parametrize("column", [VALUES, np.asfortranarray(VALUES), torch.from_numpy(VALUES)])
def test_a_row_that_is_not_there_is_an_error(column, row):
    with pytest.raises(IndexError):
        gather(column, np.array([0, row]))
