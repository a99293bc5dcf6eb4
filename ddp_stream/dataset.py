"""What runs inside a worker: `StreamingDataset` for any DataLoader, and the reader behind `StreamLoader`."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ddp_stream.ancestry import die_with_parent
from ddp_stream.batch import as_tensor
from ddp_stream.message import Packed, Packer, Span
from ddp_stream.order import BlockLayout, Order, Shuffle, make_order
from ddp_stream.partition import GlobalBatchPlan, shard_bounds, span_starts
from ddp_stream.sources.base import Column, Columns, DataError, Ints, Source, check_taken
from ddp_stream.texts import as_lists
from ddp_stream.topology import Topology

Transform = Callable[[Columns], Columns]

_SAMPLES_AT_ONCE = 1024


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
            columns = {name: as_tensor(_by_itself(column)) for name, column in as_lists(columns).items()}
            for index in range(len(rows)):
                yield sample(columns, index)


def _by_itself(column: Any) -> Any:
    """A column without the others beside which it lies, and which would cross to the main process with every sample."""
    return np.ascontiguousarray(column) if isinstance(column, np.ndarray) and column.ndim == 1 else column


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
        self.loader = 0
        self._packer: Packer | None = None
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
            columns = self.transform(as_lists(columns))
            check_taken(columns, len(rows), f"the transform of {self.source}")
        if "" in columns:
            raise DataError(f"{self.source}: a column has an empty name; give it one")
        return {name: as_tensor(column) for name, column in columns.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packer": None}

    def __iter__(self) -> Iterator[Span | Packed]:
        # Read the position now, not when the first span is asked for: by then it may be another epoch's.
        epoch, offset = self.position.tolist()
        info = get_worker_info()
        if info is None:
            return self._from_first_step(epoch, offset)
        if self._packer is None:
            self._packer = Packer(self.loader, info.id)
        self._packer.begin()
        return map(self._packer.pack, self.spans(epoch, offset, info.id, info.num_workers))

    def _from_first_step(self, epoch: int, offset: int) -> Iterator[Span]:
        """All spans, read in this process: the first step by itself, which need not wait for the rest of its span."""
        steps = self.plan.steps(offset)
        if steps > 0:
            yield self.span(epoch, offset, 1, self.rows(self.order(epoch), offset, 1))
        if steps > 1:
            yield from self.spans(epoch, offset + self.plan.stride, 0, 1)

    def spans(self, epoch: int, offset: int, worker: int, num_workers: int) -> Iterator[Span]:
        """The spans that `worker` of `num_workers` reads from `offset` on."""
        order = self.order(epoch)
        # Under `full` the next rows may be anywhere, so that nothing is gained by reading them ahead.
        ahead = getattr(self.source, "ahead", None) if self.shuffle != "full" else None
        waiting: tuple[int, int, Ints] | None = None
        for start, steps in self.starts(offset, worker, num_workers):
            rows = self.rows(order, start, steps)
            if ahead is not None:
                ahead(rows)
            if waiting is not None:
                yield self.span(epoch, *waiting)
            waiting = (start, steps, rows)
        if waiting is not None:
            yield self.span(epoch, *waiting)

    def starts(self, offset: int, worker: int, num_workers: int) -> Iterator[tuple[int, int]]:
        """Offset and steps of every span that `worker` reads from `offset` on.

        Spans are cut from the begin of the epoch, so that they keep to the windows of the order wherever the epoch is
        gone on with; but worker 0 takes the first that is left, since that is the one the DataLoader asks first.
        """
        stride = self.plan.stride
        done = -(-offset // stride)
        steps = done + self.plan.steps(offset)
        cut = done - done % self.span_steps
        for first in span_starts(steps - cut, self.span_steps, worker, num_workers):
            start, end = max(cut + first, done), min(cut + first + self.span_steps, steps)
            yield offset + (start - done) * stride, end - start

    def rows(self, order: Order, offset: int, steps: int) -> Ints:
        """The rows of this rank's slots in `steps` steps from `offset` on, `[slots * steps]`."""
        return order.rows(self.plan.positions(offset, steps, *self.slots)[0])

    def span(self, epoch: int, offset: int, steps: int, rows: Ints) -> Span:
        """What is read of `rows`, which are those of `steps` steps from `offset` on."""
        return Span(epoch, offset, steps, self.read(rows), torch.from_numpy(rows))

    @property
    def window_steps(self) -> int | None:
        """Steps that just fill a window of the order, or a block of the source where rows come as they lie.

        None if they do not, or if it has neither.
        """
        if self.plan.total == 0 or self.shuffle == "full":
            return None
        size = self.order(0).window_rows or self._layout.mean_rows
        return size // self.plan.stride if size % self.plan.stride == 0 else None


@contextlib.contextmanager
def workers_start(start_method: str) -> Iterator[None]:
    """DataLoader workers that start in here do not get stop signals until `start_worker` ignores them.

    Nor does the fork server, with whose death they would die.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, _stop_signals())
    try:
        if start_method != "fork":
            resource_tracker.ensure_running()  # which unblocks some of them
            signal.pthread_sigmask(signal.SIG_BLOCK, _stop_signals())
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def start_worker(_: int) -> None:
    """DataLoader's `worker_init_fn`: leave stop signals to the rank, and do not outlive it.

    torchrun signals whole process groups. A worker that dies of SIGTERM would take its rank with it before the rank
    could save, and a worker blocked on a full pipe would stay behind for ever when its rank is killed.
    """
    for number in _stop_signals():
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _stop_signals())
    die_with_parent()


def _stop_signals() -> list[signal.Signals]:
    names = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
