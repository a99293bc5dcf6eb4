"""What the training loop iterates: every rank's share of the global batches, read ahead by workers.

source.take(rows) -> transform -> a span of several steps     in the worker
  -> one message, in shared memory                            its price is fixed, so it carries megabytes
  -> (pinned, where there is an accelerator)                  by the DataLoader's own thread
  -> one Batch a step, views of the message                   in the main process
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from ddp_stream.batch import Batch
from ddp_stream.dataset import SpanReader, Transform, start_worker, workers_start
from ddp_stream.message import Packed, Span, Unpacker
from ddp_stream.order import Order, Shuffle
from ddp_stream.partition import GlobalBatchPlan, Tail, shard_bounds
from ddp_stream.sources.base import Source
from ddp_stream.texts import Texts
from ddp_stream.topology import Topology

MESSAGE_BYTES = 4 << 20
"""Bytes that a worker gathers before it sends them on."""
_WINDOW_BYTES = 32 << 20
_MOST_STEPS = 256
_PREFETCH_FACTOR = 2  # torch's own


class StreamLoader:
    """Batches of one rank by the global batch plan: every row once per epoch, equally many steps on every rank.

        loader = StreamLoader(source, global_batch_size=512, seed=0, num_workers=2)
        for epoch in range(3):
            loader.set_epoch(epoch)
            for batch in loader:
                ...

    What a step contains depends on the source, `global_batch_size`, `shuffle`, `seed`, `lanes`, `window_rows` and
    the epoch, and on nothing else: not on the number of ranks, of workers, or of interruptions. It follows the
    StatefulDataLoader protocol: `state_dict()` counts the batches that the caller has taken, and an iteration that
    follows `load_state_dict()` goes on behind them, on any number of ranks and workers.

    It shards by itself, and is no DataLoader, so that `accelerator.prepare` leaves it alone.

    Args:
        source: where the rows live
        global_batch_size: rows of one step over all ranks
        shuffle: `none`, `full` or `blocks`; True (or None) takes `blocks` where the source has blocks and else
            `full`, False is `none`
        seed: another seed, another shuffle
        num_workers: processes that read ahead; with 0 the caller's own process reads
        tail: `pad` (every row, the last step may repeat some with weight 0) or `drop` (full steps only)
        lanes: slices of the order that a batch is drawn from side by side; divides `global_batch_size`
        window_rows: rows shuffled together by `blocks`; None takes about four blocks
        transform: a function of a dict of columns `[rows, ...]`, run in the worker on many rows at once; it may
            change the columns, not the rows
        topology: which rank this is; found by itself when None
        pin_memory: None pins where there is an accelerator
        persistent_workers: None keeps workers from one epoch to the next
        prefetch_factor: messages that every worker prepares ahead
        multiprocessing_context: `fork`, `spawn` or `forkserver`; None takes Python's default

    Raises:
        ValueError: `global_batch_size` is smaller than the number of ranks, or not a multiple of `lanes`.
        DataError: (when iterated) the source cannot give the rows it promised.
    """

    def __init__(
        self,
        source: Source,
        global_batch_size: int,
        *,
        shuffle: Shuffle | bool | None = None,
        seed: int = 0,
        num_workers: int = 0,
        tail: Tail = "pad",
        lanes: int = 1,
        window_rows: int | None = None,
        transform: Transform | None = None,
        topology: Topology | None = None,
        pin_memory: bool | None = None,
        persistent_workers: bool | None = None,
        prefetch_factor: int | None = None,
        multiprocessing_context: str | None = None,
    ) -> None:
        self.source = source
        self.topology = topology or Topology.detect()
        world_size = self.topology.world_size
        if global_batch_size < world_size:
            raise ValueError(
                f"global_batch_size={global_batch_size} is smaller than world_size={world_size}: some ranks would have "
                f"no row in any step; use at least {world_size} rows per step, or fewer ranks"
            )
        self.plan = GlobalBatchPlan(len(source), global_batch_size, lanes, tail)
        self.slots = shard_bounds(global_batch_size, self.topology.rank, world_size)
        self._reader = SpanReader(
            source,
            self.plan,
            self.slots,
            shuffle=resolve_shuffle(shuffle, source),
            seed=seed,
            window_rows=window_rows,
            transform=transform,
        )
        self.num_workers = num_workers
        self.messages_ahead = num_workers * (prefetch_factor or _PREFETCH_FACTOR)
        pin = torch.accelerator.is_available() if pin_memory is None else pin_memory
        self._options: dict[str, Any] = {
            "num_workers": num_workers,
            # Without an accelerator there is nothing to pin for, and torch would warn in every epoch.
            "pin_memory": pin and torch.accelerator.is_available(),
        }
        if num_workers > 0:
            self._options.update(
                persistent_workers=True if persistent_workers is None else persistent_workers,
                prefetch_factor=prefetch_factor,
                multiprocessing_context=multiprocessing_context,
                worker_init_fn=start_worker,
            )
        self._unpacker = Unpacker()
        self._reader.loader = self._unpacker.loader
        self._data_loader: DataLoader[Any] | None = None
        self._running: list[Any] = []  # the DataLoader's iterator, which owns the workers
        # Workers ignore SIGTERM, by which multiprocessing would end them at exit, to wait for them for ever. So they
        # are told to end before that, and before (priority 10) the queues close by which they are told.
        multiprocessing.util.Finalize(self, _end_workers, args=(self._running,), exitpriority=100)
        self._epoch = 0
        self._offset = 0
        self._loaded = False  # a state was loaded: the next iteration starts at its offset
        self._finished = False  # all of this epoch was taken: the next iteration starts the one after
        self._ones = torch.ones(self.slots[1] - self.slots[0])
        self._stride = self.plan.stride
        self._last_full = self.plan.total // self.plan.lanes - self._stride  # no step up to here has an empty slot

    @property
    def reader(self) -> SpanReader:
        """What runs in the workers."""
        return self._reader

    @property
    def shuffle(self) -> Shuffle:
        """The order in force."""
        return self._reader.shuffle

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the content of every step but the global batch size: the same after a resume, or no resume."""
        reader = self._reader
        return {
            "rows": self.plan.total,
            "shuffle": reader.shuffle,
            "seed": reader.seed,
            "lanes": self.plan.lanes,
            "window_rows": reader.window_rows,
            "tail": self.plan.tail,
        }

    def order(self, epoch: int) -> Order:
        """The order in which `epoch` visits the rows."""
        return self._reader.order(epoch)

    def __len__(self) -> int:
        """Steps of a whole epoch, the same on every rank."""
        return self.plan.steps()

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration. In the epoch of a loaded state, that state's position is kept."""
        if not (self._loaded and epoch == self._epoch):
            self._epoch, self._offset, self._loaded = epoch, 0, False
        self._finished = False

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch that the caller has taken: `epoch`, `offset`, and the identity."""
        return {"epoch": self._epoch, "offset": self._offset, **self.identity}

    def state_after(self, batch: Batch) -> dict[str, Any]:
        """`state_dict()` as it was when `batch` was the last one taken, for loops that fetch ahead of their step."""
        return {"epoch": batch.epoch, "offset": batch.offset + self.plan.stride, **self.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind the position in `state`, which any number of ranks and workers may have written.

        Raises:
            ValueError: `state` belongs to other rows or to another order of them, so that going on from it would
                repeat rows and lose others.
        """
        differing = {
            name: (state[name], value)
            for name, value in self.identity.items()
            if name in state and state[name] != value
        }
        if differing:
            listed = "; ".join(f"{name} was {old} and is {new}" for name, (old, new) in differing.items())
            raise ValueError(
                f"this loader cannot go on from that state, since its steps would hold other rows: {listed}; use the "
                f"values it was saved with, or start a new run"
            )
        epoch, offset = int(state["epoch"]), int(state["offset"])
        if epoch < 0 or offset < 0:
            raise ValueError(f"epoch={epoch} and offset={offset} in the state: a position cannot be negative")
        self._epoch, self._offset = epoch, offset
        self._loaded, self._finished = True, self.plan.steps(offset) == 0

    def __iter__(self) -> Iterator[Batch]:
        if self._finished:
            self._epoch, self._offset = self._epoch + 1, 0
        elif not self._loaded:
            self._offset = 0
        self._loaded = self._finished = False
        return self._batches(self._epoch, self._offset)

    def _batches(self, epoch: int, offset: int) -> Iterator[Batch]:
        if self.plan.steps(offset) > 0:
            self._reader.position.copy_(torch.tensor([epoch, offset]))
            for message in self._messages():
                span = self._unpacker.unpack(message) if isinstance(message, Packed) else message
                for index in range(span.steps):
                    batch = self._cut(span, index)
                    self._epoch, self._offset = epoch, batch.offset + self._stride
                    yield batch
        self._finished = True

    def _messages(self) -> Iterator[Span | Packed]:
        if self._data_loader is None:
            self._reader.span_steps = steps_per_message(
                self.slots[1] - self.slots[0],
                row_bytes(self._reader, *self._reader.position.tolist()),
                len(self),
                self.num_workers,
                self._reader.window_steps,
            )
            # A generator of its own, because the DataLoader would otherwise draw from the global one.
            self._data_loader = DataLoader(self._reader, batch_size=None, generator=torch.Generator(), **self._options)
        context = multiprocessing.get_context(self._options.get("multiprocessing_context"))
        with workers_start(context.get_start_method()):
            self._running[:] = [iter(self._data_loader)]
        iterator: Iterator[Span | Packed] = self._running[0]
        return iterator

    def _cut(self, span: Span, index: int) -> Batch:
        offset = span.offset + index * self._stride
        size = len(self._ones)
        part = slice(index * size, (index + 1) * size)
        weight, filled, global_rows = self._ones, None, self.plan.global_batch_size
        if offset > self._last_full:
            global_rows = self.plan.rows_in_step(offset)
        if global_rows < self.plan.global_batch_size:
            filled = torch.from_numpy(self.plan.positions(offset, 1, *self.slots)[1])
            weight = filled.to(torch.float32)
        return Batch(
            span.columns,
            weight=weight,
            rows=span.rows[part],
            epoch=span.epoch,
            step=-(-offset // self._stride),
            offset=offset,
            global_rows=global_rows,
            filled=filled,
            span=part,
        )


def steps_per_message(slots: int, row_bytes: int, steps: int, num_workers: int, window_steps: int | None) -> int:
    """Steps of a span: whole windows of the order, so that no two workers decode the same blocks, if they are not large.

    Else as many as fit `MESSAGE_BYTES`; and few enough that all workers have some in every epoch.

    Args:
        slots: this rank's rows of a step
        row_bytes: bytes of one row in a message
        steps: steps of the epoch
        num_workers: this rank's workers
        window_steps: steps that just fill a window
    """
    step_bytes = slots * row_bytes
    if window_steps is not None and window_steps * step_bytes <= _WINDOW_BYTES:
        fitting = window_steps * max(1, MESSAGE_BYTES // (window_steps * step_bytes))
    else:
        fitting = min(_MOST_STEPS, max(1, MESSAGE_BYTES // step_bytes))
    return max(1, min(fitting, steps // (2 * max(1, num_workers))))


def row_bytes(reader: SpanReader, epoch: int = 0, offset: int = 0) -> int:
    """Bytes of one row in a message: its columns as the transform leaves them, and its id.

    Seen in the first row that is read from `epoch` and `offset` on, whose block is then at hand.
    """
    row = reader.rows(reader.order(epoch), offset, 1)[:1]
    return 8 + sum(_nbytes(column) for column in reader.read(row).values())


def _end_workers(running: list[Any]) -> None:
    """End the workers of a DataLoader's iterator: by its own protocol, and those that are stuck by force."""
    for iterator in running:
        workers = getattr(iterator, "_workers", [])
        if workers:
            iterator._shutdown_workers()
        for worker in workers:
            if worker.is_alive():
                worker.kill()
    running.clear()


def resolve_shuffle(shuffle: Shuffle | bool | None, source: Source) -> Shuffle:
    """The order that `shuffle` stands for over `source`.

    Raises:
        ValueError: an order is asked for of a source that can only be read in its own.
    """
    if getattr(source, "forward_only", False):
        if shuffle is None or shuffle is False or shuffle == "none":
            return "none"
        raise ValueError(
            f"shuffle={shuffle!r}: {source} is read forward only, and has no order but its own; use shuffle='none', or "
            f"write the rows to files"
        )
    if shuffle is False:
        return "none"
    if shuffle is None or shuffle is True:
        return "full" if getattr(source, "blocks", lambda: None)() is None else "blocks"
    return shuffle


def _nbytes(column: Any) -> int:
    """Bytes of one row's value, roughly for what is no tensor."""
    if isinstance(column, torch.Tensor):
        return int(column.nbytes)
    if isinstance(column, Mapping):
        return sum(_nbytes(value) for value in column.values())
    if isinstance(column, (tuple, list, Texts)):
        return sum(_nbytes(value) for value in column)
    return len(column) if isinstance(column, (str, bytes)) else 64
