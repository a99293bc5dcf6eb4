"""How rows travel from a worker to its rank: several steps at once, in memory that both map and use again.

A message costs by the tensor and by the fresh page, so all tensors of a span lie in one block, and a worker fills a
block again when nothing in the rank refers to it any more.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ddp_stream.batch import pin
from ddp_stream.texts import Texts, as_texts

_ALIGNMENT = 64
_FILLED, _RECEIVED, _RELEASED = range(3)
"""A block begins with three numbers: of the message it holds, of the last one that the rank got, and let go of."""
_MOST_BLOCKS = 16

_OFFSETS, _BYTES = "\0offsets", "\0bytes"
"""What a column of strings is on its way; no column of a file has such a name."""

Layout = list[tuple[str, torch.dtype, torch.Size, int]]


@dataclass
class Span:
    """The consecutive steps that one worker prepared as one message.

    Attributes:
        epoch: the epoch of all its steps
        offset: lane offset of its first step
        steps: how many steps
        columns: all rows of the span, step after step
        rows: `[slots * steps]` int64 row ids
    """

    epoch: int
    offset: int
    steps: int
    columns: dict[str, Any]
    rows: torch.Tensor

    def pin_memory(self) -> Span:
        """A page-locked copy, for a span that was read in this process; the DataLoader calls it."""
        return Span(self.epoch, self.offset, self.steps, pin(self.columns), self.rows)


@dataclass
class Packed:
    """A span on its way between processes.

    A tensor in here would take a socket to cross: there is none but the block, the first time, unless columns are nested.

    Attributes:
        epoch: the epoch of all its steps
        offset: lane offset of its first step
        steps: how many steps
        others: the columns that are no tensors; the Arrow type in place of strings or bytes
        layout: name, type, shape and place in the block of every tensor; the row ids have the name ""
        loader: which of the rank's loaders it is for
        worker: who sent it
        block_id: which of the worker's blocks holds the tensors; negative for one that is used once
        message: the number of this message, from 1
        block: the block itself, `[bytes]` uint8, when the rank has not got it before
    """

    epoch: int
    offset: int
    steps: int
    others: dict[str, Any]
    layout: Layout
    loader: int
    worker: int
    block_id: int
    message: int
    block: torch.Tensor | None

    def pin_memory(self) -> Span:
        """Called by the DataLoader's pinning thread: unpacked, in one page-locked copy for all steps of the span."""
        return Unpacker.of[self.loader].unpack(self, page_locked=True)


class Packer:
    """Packs the spans of one worker."""

    def __init__(self, loader: int, worker: int) -> None:
        self._loader = loader
        self._worker = worker
        self._blocks: dict[int, torch.Tensor] = {}
        self._heads: dict[int, NDArray[np.int64]] = {}
        self._messages = 0

    def begin(self) -> None:
        """Another iteration begins: what the last one left on its way was thrown away."""
        for block_id, head in list(self._heads.items()):
            if head[_RECEIVED] == 0:
                del self._blocks[block_id], self._heads[block_id]  # the rank never got the block
            elif head[_RECEIVED] != head[_FILLED]:
                head[_RELEASED] = head[_FILLED]

    def pack(self, span: Span) -> Packed:
        """Copies the tensors of `span` into one block of shared memory."""
        tensors = {"": span.rows}
        others: dict[str, Any] = {}
        for name, column in span.columns.items():
            texts = as_texts(column) if isinstance(column, list) else column
            pieces = texts.pieces() if isinstance(texts, Texts) else None
            if pieces is not None:
                others[name], tensors[name + _OFFSETS], tensors[name + _BYTES] = pieces
            else:
                (tensors if isinstance(column, torch.Tensor) else others)[name] = column
        layout: Layout = []
        end = _ALIGNMENT
        for name, tensor in tensors.items():
            layout.append((name, tensor.dtype, tensor.shape, end))
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._messages += 1
        block_id, block, fresh = self._block(end)
        _head(block)[_FILLED] = self._messages
        for (_, dtype, shape, start), tensor in zip(layout, tensors.values(), strict=True):
            _view(block, dtype, shape, start).copy_(tensor)
        sent = block if fresh else None
        place = span.epoch, span.offset, span.steps
        return Packed(*place, others, layout, self._loader, self._worker, block_id, self._messages, sent)

    def _block(self, nbytes: int) -> tuple[int, torch.Tensor, bool]:
        free = [block_id for block_id, head in self._heads.items() if head[_RELEASED] == head[_FILLED]]
        for block_id in free:
            if self._blocks[block_id].nbytes >= nbytes:
                return block_id, self._blocks[block_id], False
        for block_id in free:  # all are too small
            del self._blocks[block_id], self._heads[block_id]
        storage = torch.UntypedStorage._new_shared(nbytes + nbytes // 16)  # type: ignore[no-untyped-call]
        block = torch.empty(0, dtype=torch.uint8).set_(storage)
        if len(self._blocks) >= _MOST_BLOCKS:  # whoever trains keeps them all
            return -1, block, True
        self._blocks[self._messages] = block
        self._heads[self._messages] = _head(block)
        return self._messages, block, True


class Unpacker:
    """Unpacks the spans that one loader gets from its workers."""

    of: ClassVar[weakref.WeakValueDictionary[int, Unpacker]] = weakref.WeakValueDictionary()
    """By loader: the DataLoader's pinning thread knows the message only."""
    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self.loader = next(self._numbers)
        self.of[self.loader] = self

    def unpack(self, packed: Packed, page_locked: bool = False) -> Span:
        """The span, its tensors views of the block, which is not written to again while one of them is there."""
        if packed.block is not None:
            whole = packed.block.numpy()
            if packed.block_id >= 0:
                self._blocks[packed.worker, packed.block_id] = whole
        else:
            whole = self._blocks[packed.worker, packed.block_id]
        head = whole[: 3 * 8].view(np.int64)
        head[_RECEIVED] = packed.message
        lent = whole[:]  # an object of its own: torch holds it as long as a tensor uses its memory
        weakref.finalize(lent, _release, head, packed.message).atexit = False
        block = torch.from_numpy(lent)
        del lent
        if page_locked:
            block = pin(block)
        columns: dict[str, Any] = {
            name: _view(block, dtype, shape, start) for name, dtype, shape, start in packed.layout
        }
        rows = columns.pop("")
        for name, value in packed.others.items():
            if isinstance(value, pa.DataType):
                columns[name] = Texts.joined(value, columns.pop(name + _OFFSETS), columns.pop(name + _BYTES))
            else:
                columns[name] = value
        return Span(packed.epoch, packed.offset, packed.steps, columns, rows)


def _release(head: NDArray[np.int64], message: int) -> None:
    head[_RELEASED] = message


def _head(block: torch.Tensor) -> NDArray[np.int64]:
    head: NDArray[np.int64] = block[: 3 * 8].view(torch.int64).numpy()
    return head


def _view(block: torch.Tensor, dtype: torch.dtype, shape: torch.Size, start: int) -> torch.Tensor:
    end = start + shape.numel() * dtype.itemsize
    return block[start:end].view(dtype).view(shape)
