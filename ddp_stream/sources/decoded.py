"""Decoded blocks in memory: the ones in use, laid end to end, some that were used lately, and the next ones on their way."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddp_stream.pool import empty
from ddp_stream.sources.base import Ints
from ddp_stream.texts import Texts, end_to_end

CACHE_BYTES = 64 << 20
"""Decoded blocks that a process keeps beyond the ones that its current rows need."""
AHEAD_BYTES = 48 << 20
"""Decoded blocks, about, that are on their way or have come and wait, beyond which no more is read ahead."""

Values = NDArray[Any] | Texts | list[Any]
Block = dict[str | tuple[str, ...], Values]
Decode = Callable[[int], tuple[Block, int, int]]
"""From the number of a block to its columns, its rows, and its size in bytes."""


class DecodedBlocks:
    """The decoded blocks of one process.

    Args:
        decode: decodes one block; called by two threads at once
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._kept: OrderedDict[int, tuple[Block, int, int]] = OrderedDict()
        self._asked: list[int] = []  # of `ahead`, the last time
        self._coming: dict[int, Future[tuple[Block, int, int]]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._joined: tuple[dict[int, int], Block] = ({}, {})

    def __len__(self) -> int:
        return len(self._kept)

    def ahead(self, blocks: Sequence[int]) -> None:
        """Begin to decode `blocks` in a thread, as many as may be on their way.

        What is neither among them nor among those of the call before was for rows that nobody came for: it is given up.
        """
        wanted = {*self._asked, *blocks}
        self._asked = list(blocks)
        for block in [block for block in self._coming if block not in wanted]:
            self._coming.pop(block).cancel()
        sizes = [size for _, _, size in self._kept.values()]
        mean = sum(sizes) // len(sizes) if sizes else AHEAD_BYTES // 2  # not known yet
        for block in blocks:
            if block in self._kept or block in self._coming:
                continue
            if (len(self._coming) + 1) * mean > AHEAD_BYTES:
                return
            self._submit(block)

    def _submit(self, block: int) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="decode")
        with contextlib.suppress(RuntimeError):  # no thread starts any more: whoever needs the block decodes it
            self._coming[block] = self._thread.submit(self._decode, block)

    def get(self, block: int) -> Block:
        """The columns of one block."""
        self._fetch([block])
        return self._kept[block][0]

    def join(self, blocks: Sequence[int]) -> tuple[Block, Ints]:
        """The columns of `blocks` laid end to end, perhaps among others, and where each of `blocks` begins in them."""
        starts, columns = self._joined
        if not all(block in starts and block in self._kept for block in blocks):
            parts = self._fetch(blocks)
            ends = np.cumsum([rows for _, rows, _ in parts]).tolist()
            starts = dict(zip(blocks, [0, *ends[:-1]], strict=True))
            columns = parts[0][0]
            if len(parts) > 1:
                columns = {name: _laid_end_to_end([part[name] for part, _, _ in parts]) for name in columns}
                # The parts become views, so that nothing is held twice.
                for block, start, end, (_, rows, size) in zip(blocks, starts.values(), ends, parts, strict=True):
                    view = {name: values[start:end] for name, values in columns.items()}
                    self._kept[block] = (view, rows, size)
            self._joined = (starts, columns)
        else:
            for block in blocks:
                self._kept.move_to_end(block)
        return columns, np.array([starts[block] for block in blocks], np.int64)

    def _fetch(self, blocks: Sequence[int]) -> list[tuple[Block, int, int]]:
        missing = [block for block in blocks if block not in self._kept]
        for block in missing[:-1]:
            if block not in self._coming:
                self._submit(block)
        # The thread takes the first one first. What it has not begun by then is decoded here, from the last one on.
        for block in reversed(missing):
            coming = self._coming.get(block)
            if coming is None or coming.cancel():
                self._coming.pop(block, None)
                self._kept[block] = self._decode(block)
        for block in blocks:
            if block in self._coming:
                self._kept[block] = self._coming.pop(block).result()
            self._kept.move_to_end(block)
        held = sum(size for _, _, size in self._kept.values())
        while len(self._kept) > len(blocks) and held > CACHE_BYTES:
            held -= self._kept.popitem(last=False)[1][2]
        return [self._kept[block] for block in blocks]


def _laid_end_to_end(parts: Sequence[Values]) -> Values:
    """An array if all parts are arrays of one shape of row, Texts if all are, else a list."""
    texts = [part for part in parts if isinstance(part, Texts)]
    if len(texts) == len(parts):
        return end_to_end(texts)
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts) and len({part.shape[1:] for part in arrays}) == 1:
        dtype = np.result_type(*arrays)
        return np.concatenate(arrays, out=empty((sum(map(len, arrays)), *arrays[0].shape[1:]), dtype))
    return [value for part in parts for value in part]
