"""A memory pool for large arrays, since the kernel takes longer to hand out a fresh page than a copy takes to fill one.

An array from here is like any other one. When it and all its views are gone, its memory is kept for the next.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

FREE_BYTES = 64 << 20
"""Memory that a process keeps beyond what is in use."""
_SMALLEST = 64 << 10  # bytes; malloc has what is smaller at hand

_free: dict[int, list[NDArray[np.uint8]]] = {}  # by size


class _Lent(np.ndarray[Any, Any]):
    """What an array from the pool has as its base, and views of that array have: it is there as long as one of them."""

    # The defaults are for the end of the program, when the names of a module may be gone before its last array.
    def __del__(self, free: dict[int, list[NDArray[np.uint8]]] = _free, most: int = FREE_BYTES) -> None:
        block = self.base
        if block is None:
            return
        if sum(size * len(blocks) for size, blocks in list(free.items())) + len(block) > most:
            free.clear()  # of sizes that were in use once
        if len(block) <= most:
            free.setdefault(len(block), []).append(block)


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array like `numpy.empty`'s."""
    dtype = np.dtype(dtype)
    nbytes = int(math.prod(shape)) * dtype.itemsize
    if nbytes < _SMALLEST or dtype.hasobject:
        return np.empty(shape, dtype)
    step = 1 << (nbytes.bit_length() - 4)  # at most an eighth more, so that sizes that differ a little share memory
    size = -(-nbytes // step) * step
    try:
        block = _free[size].pop()
    except (KeyError, IndexError):
        block = np.empty(size, np.uint8)
    # By way of a memoryview, because a view of a view has the first array as its base, and not the one between.
    lent = np.asarray(memoryview(block.view(_Lent)))
    return lent[:nbytes].view(dtype).reshape(shape)


def empty_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor like `torch.empty`'s, on the CPU."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(empty((math.prod(shape) * dtype.itemsize,), np.uint8)).view(dtype).view(shape)
