"""What runs inside a worker: `StreamingDataset` for any DataLoader, and the reader behind `StreamLoader`."""

from __future__ import annotations

import ctypes
import functools
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ddp_stream.batch import as_tensor, pin
from ddp_stream.order import BlockLayout, Order, Shuffle, make_order
from ddp_stream.partition import GlobalBatchPlan, shard_bounds, span_starts
from ddp_stream.sources.base import Column, Columns, DataError, Ints, Source, check_taken
from ddp_stream.topology import Topology

Transform = Callable[[Columns], Columns]

_SAMPLES_AT_ONCE = 1024
_ALIGNMENT = 64


class StreamingDataset(IterableDataset[Any]):
    """The rows of a source, each exactly once over all workers of all ranks, for a plain torch `DataLoader`.

    Global worker `g` of `W` reads rows `shard_bounds(N, g, W)` in the source's order. Readers may differ by one row,
    so ranks may differ in their number of batches: this is for evaluation, export, inference and loops of your own.
    Training uses `StreamLoader`, which gives every rank the same number of steps.

        loader = DataLoader(StreamingDataset(source), batch_size=4, num_workers=3, pin_memory=True)

    Do not pass such a loader to `accelerator.prepare`, which would shard it a second time.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source
        self._rank_topology: Topology | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has no torch.distributed to ask, and perhaps no environment: its rank tells it.
        rank_topology = Topology.detect() if get_worker_info() is None else self._rank_topology
        return {**self.__dict__, "_rank_topology": rank_topology}

    def topology(self) -> Topology:
        """This reader among all readers."""
        found = Topology.detect()
        told = self._rank_topology
        if get_worker_info() is None or told is None:
            return found
        return Topology(told.rank, told.world_size, found.worker, found.num_workers)

    def bounds(self, topology: Topology) -> tuple[int, int]:
        """The half-open range of rows that `topology` reads."""
        return shard_bounds(len(self.source), topology.global_worker, topology.global_workers)

    def __iter__(self) -> Iterator[Any]:
        start, end = self.bounds(self.topology())
        sample = getattr(self.source, "sample", functools.partial(Source.sample, self.source))
        for first in range(start, end, _SAMPLES_AT_ONCE):
            rows = np.arange(first, min(first + _SAMPLES_AT_ONCE, end))
            columns = self.source.take(rows)
            check_taken(columns, len(rows), str(self.source))
            columns = {name: as_tensor(column) for name, column in columns.items()}
            for index in range(len(rows)):
                yield sample(columns, index)


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
        """Called by the DataLoader's pinning thread: one page-locked copy for all steps of the span."""
        return Span(self.epoch, self.offset, self.steps, pin(self.columns), self.rows)


@dataclass
class PackedSpan:
    """A span on its way between processes: all tensors in one shared block, for a message costs by the tensor."""

    epoch: int
    offset: int
    steps: int
    layout: list[tuple[str, torch.dtype, torch.Size, int]]
    block: torch.Tensor
    others: dict[str, Any]

    @classmethod
    def pack(cls, span: Span) -> PackedSpan:
        """Copies the tensors of `span` into one block of shared memory."""
        tensors = {"": span.rows}
        others: dict[str, Any] = {}
        for name, column in span.columns.items():
            (tensors if isinstance(column, torch.Tensor) else others)[name] = column
        layout: list[tuple[str, torch.dtype, torch.Size, int]] = []
        end = 0
        for name, tensor in tensors.items():
            layout.append((name, tensor.dtype, tensor.shape, end))
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        storage = torch.UntypedStorage._new_shared(max(end, 1))  # type: ignore[no-untyped-call]
        block = torch.empty(0, dtype=torch.uint8).set_(storage)
        for (_, dtype, shape, start), tensor in zip(layout, tensors.values(), strict=True):
            _view(block, dtype, shape, start).copy_(tensor)
        return cls(span.epoch, span.offset, span.steps, layout, block, others)

    def unpack(self) -> Span:
        """Views of the block; no copy."""
        columns = {name: _view(self.block, dtype, shape, start) for name, dtype, shape, start in self.layout}
        rows = columns.pop("")
        return Span(self.epoch, self.offset, self.steps, {**columns, **self.others}, rows)

    def pin_memory(self) -> PackedSpan:
        """One page-locked copy of the block."""
        return PackedSpan(self.epoch, self.offset, self.steps, self.layout, self.block.pin_memory(), self.others)


def _view(block: torch.Tensor, dtype: torch.dtype, shape: torch.Size, start: int) -> torch.Tensor:
    end = start + shape.numel() * dtype.itemsize
    return block[start:end].view(dtype).view(shape)


class SpanReader(IterableDataset[Any]):
    """Reads the spans of one rank: worker `k` of `K` takes every `K`-th span.

    The position to start from is in shared memory, where persistent workers see the one that their main process set
    for the next epoch or loaded from a checkpoint.
    """

    def __init__(
        self,
        source: Source,
        plan: GlobalBatchPlan,
        slots: tuple[int, int],
        *,
        shuffle: Shuffle,
        seed: int,
        window_rows: int | None,
        transform: Transform | None,
    ) -> None:
        super().__init__()
        self.source = source
        self.plan = plan
        self.slots = slots
        self.shuffle: Shuffle = shuffle
        self.seed = seed
        self.window_rows = window_rows
        self.transform = transform
        self.span_steps = 1
        self.position: torch.Tensor = torch.zeros(2, dtype=torch.int64)
        self.position.share_memory_()  # type: ignore[no-untyped-call]
        blocks = getattr(source, "blocks", lambda: None)() if shuffle == "blocks" else None
        self._layout = BlockLayout(plan.total, offsets=blocks)

    def order(self, epoch: int) -> Order:
        """The order of `epoch`."""
        return make_order(
            self.shuffle,
            self._layout,
            seed=self.seed,
            epoch=epoch,
            window_rows=self.window_rows,
            lanes=self.plan.lanes,
        )

    def read(self, rows: Ints) -> dict[str, Any]:
        """The transformed columns of `rows`, as tensors where they can be.

        Raises:
            DataError: the source or the transform returned more or fewer values than rows.
        """
        columns: Mapping[str, Column] = self.source.take(rows)
        check_taken(columns, len(rows), str(self.source))
        if self.transform is not None:
            columns = self.transform(columns)
            check_taken(columns, len(rows), f"the transform of {self.source}")
        if "" in columns:
            raise DataError(f"{self.source}: a column has an empty name; give it one")
        return {name: as_tensor(column) for name, column in columns.items()}

    def __iter__(self) -> Iterator[Span | PackedSpan]:
        # Read the position now, not when the first span is asked for: by then it may be another epoch's.
        epoch, offset = self.position.tolist()
        info = get_worker_info()
        if info is None:
            return self.spans(epoch, offset, 0, 1)
        return map(PackedSpan.pack, self.spans(epoch, offset, info.id, info.num_workers))

    def spans(self, epoch: int, offset: int, worker: int, num_workers: int) -> Iterator[Span]:
        """The spans that `worker` of `num_workers` reads from `offset` on."""
        order = self.order(epoch)
        steps = self.plan.steps(offset)
        for first in span_starts(steps, self.span_steps, worker, num_workers):
            start = offset + first * self.plan.stride
            yield self.span(order, epoch, start, min(self.span_steps, steps - first))

    def span(self, order: Order, epoch: int, offset: int, steps: int) -> Span:
        """This rank's slots in `steps` steps from `offset` on."""
        positions, _ = self.plan.positions(offset, steps, *self.slots)
        rows = order.rows(positions)
        return Span(epoch, offset, steps, self.read(rows), torch.from_numpy(rows))


def start_worker(_: int) -> None:
    """DataLoader's `worker_init_fn`: leave stop signals to the rank, and do not outlive it.

    torchrun signals whole process groups. A worker that dies of SIGTERM would take its rank with it before the rank
    could save, and a worker blocked on a full pipe would stay behind for ever when its rank is killed.
    """
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    die_with_parent()


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
