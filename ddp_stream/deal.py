"""Who reads what on a whole cluster, by the functions that the loader itself runs on each of its ranks.

    rank r  --slots-->  its share of every step  --starts-->  worker k's spans of steps  --read-->  row ids
    row id  --find-->   position, step, slot, rank, worker

Nothing runs and nothing is read but one row, so the cluster need not be there.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddp_stream.dataset import SpanReader
from ddp_stream.loader import StreamLoader, row_bytes, steps_per_message
from ddp_stream.order import Order
from ddp_stream.partition import shard_bounds, shard_of, span_starts, span_worker
from ddp_stream.sources.base import Columns, Ints, Source
from ddp_stream.sources.decoded import CACHE_BYTES


class Imagined(Source):
    """Rows that are not there yet: of one size, in blocks of one length if at all.

    Args:
        rows: how many
        row_bytes: bytes of each
        block_rows: rows of a natural block, such as a Parquet row group; None means that there are none
    """

    def __init__(self, rows: int, row_bytes: int, block_rows: int | None = None) -> None:
        if rows < 0 or row_bytes < 1 or (block_rows is not None and block_rows < 1):
            raise ValueError(
                f"rows={rows}, row_bytes={row_bytes}, block_rows={block_rows}: there is no such dataset; it needs at "
                f"least 0 rows of 1 byte in blocks of 1 row"
            )
        self._rows = rows
        self._row_bytes = row_bytes
        self._block_rows = block_rows

    def __len__(self) -> int:
        return self._rows

    def take(self, rows: Ints) -> Columns:
        return {"values": np.zeros((len(rows), self._row_bytes), np.uint8)}

    def blocks(self) -> Ints | None:
        if self._block_rows is None:
            return None
        return np.append(np.arange(0, self._rows, self._block_rows), self._rows)

    def __str__(self) -> str:
        return f"{self._rows} imagined rows"


@dataclass(frozen=True)
class Found:
    """Where rows are in an epoch: arrays `[rows]`, each element for one row."""

    position: Ints
    step: Ints
    slot: Ints
    rank: Ints
    worker: Ints
    reached: Ints
    """1, or 0 for a row that the tail leaves out: then there is no such step."""


@dataclass(frozen=True)
class Part:
    """Consecutive steps of one rank: `rows [steps, slots]`, and `filled` of that shape, False in empty slots."""

    step: int
    rows: Ints
    filled: Any


class Deal:
    """One epoch from its start, as `world_size` ranks with the workers of `loader` read it.

    Args:
        loader: any rank's; what it holds beside its rank is the same on all
        world_size: ranks
        epoch: the epoch
    """

    def __init__(self, loader: StreamLoader, world_size: int, epoch: int = 0) -> None:
        self.plan = loader.plan
        self.world_size = world_size
        self.num_workers = max(1, loader.num_workers)
        self.epoch = epoch
        self.order: Order = loader.order(epoch)
        self.steps = self.plan.steps()
        self.row_bytes = row_bytes(loader.reader) if self.plan.total else 8
        reader = loader.reader
        self._blocks: Ints | None = getattr(reader.source, "blocks", lambda: None)()
        self._reader = SpanReader(
            reader.source,
            reader.plan,
            reader.slots,
            shuffle=reader.shuffle,
            seed=reader.seed,
            window_rows=reader.window_rows,
            transform=None,
        )
        self.message_bytes = self.span_steps(0) * self.slots(0)[1] * self.row_bytes

    def slots(self, rank: int) -> tuple[int, int]:
        """The slots of every step that `rank` fills, half-open."""
        return shard_bounds(self.plan.global_batch_size, rank, self.world_size)

    def span_steps(self, rank: int) -> int:
        """Steps that a worker of `rank` prepares as one message."""
        first, end = self.slots(rank)
        return self._span_steps(end - first)

    @functools.lru_cache(maxsize=4)  # noqa: B019  (a plan is made once, and ranks have two sizes at most)
    def _span_steps(self, slots: int) -> int:
        return steps_per_message(slots, self.row_bytes, self.steps, self.num_workers, self._reader.window_steps)

    def starts(self, rank: int, worker: int) -> range:
        """First steps of the spans that `worker` of `rank` prepares."""
        return span_starts(self.steps, self.span_steps(rank), worker, self.num_workers)

    def read(self, rank: int, starts: Iterable[int]) -> Iterator[Part]:
        """What a worker of `rank` reads in its spans that begin at `starts`."""
        size = self.span_steps(rank)
        for start in starts:
            yield self.part(rank, start, min(size, self.steps - start))

    def part(self, rank: int, step: int, steps: int = 1) -> Part:
        """What `rank` reads for `steps` steps from `step` on."""
        reader, stride = self._reader, self.plan.stride
        first, end = reader.slots = self.slots(rank)
        rows = reader.rows(self.order, step * stride, steps).reshape(steps, end - first)
        filled = np.ones(rows.shape, np.bool_)
        if step + steps == self.steps:  # only the last step may have empty slots
            filled[-1] = self.plan.positions((self.steps - 1) * stride, 1, first, end)[1]
        return Part(step, rows, filled)

    def find(self, rows: Ints) -> Found:
        """Where `rows [n]` are, by the inverse of everything above."""
        position = self.order.positions(rows)
        offset, slot = self.plan.locate(position)
        step = offset // self.plan.stride
        rank = shard_of(self.plan.global_batch_size, slot, self.world_size)
        worker = np.empty_like(step)
        for size in {self.slots(0)[1], self.plan.global_batch_size // self.world_size}:
            chosen = np.flatnonzero(self._slot_counts()[rank] == size)
            worker[chosen] = span_worker(step[chosen], self._span_steps(size), self.num_workers)
        return Found(position, step, slot, rank, worker, (step < self.steps).astype(np.int64))

    def _slot_counts(self) -> Ints:
        size, more = divmod(self.plan.global_batch_size, self.world_size)
        return size + (np.arange(self.world_size) < more)

    def rows_by_worker(self) -> Ints:
        """Rows that each reader trains on in this epoch, `[world_size, num_workers]`; empty slots are not among them."""
        slots = self._slot_counts()
        rows = np.zeros((self.world_size, self.num_workers), np.int64)
        if self.steps == 0:
            return rows
        last_step = np.array([self.steps - 1])
        filled = self.plan.positions((self.steps - 1) * self.plan.stride, 1, 0, self.plan.global_batch_size)[1]
        bounds = np.append(0, np.cumsum(slots))
        empty = slots - np.diff(np.append(0, np.cumsum(filled))[bounds])
        for rank in {0, self.world_size - 1}:  # all ranks are like the first one or like the last one
            size, count = self.span_steps(rank), self.slots(rank)[1] - self.slots(rank)[0]
            like = np.flatnonzero(slots == count)
            for worker in range(self.num_workers):
                starts = self.starts(rank, worker)
                whole = len(starts) * size - (max(0, starts[-1] + size - self.steps) if starts else 0)
                rows[like, worker] = whole * count
            rows[like, span_worker(last_step, size, self.num_workers)[0]] -= empty[like]
        return rows

    @property
    def padded_slots(self) -> int:
        """Empty slots of the epoch over all ranks."""
        return self.steps * self.plan.global_batch_size - self.trained_rows

    @property
    def trained_rows(self) -> int:
        """Rows of the epoch that train: all but those that the tail leaves out."""
        return self.plan.rows_between(0, self.steps * self.plan.stride)

    @property
    def block_count(self) -> int:
        """Natural blocks of the source that have rows; 0 if it has none."""
        return 0 if self._blocks is None else int((np.diff(self._blocks) > 0).sum())

    def decoded(self, rank: int, worker: int, most_rows: int) -> tuple[int, int]:
        """Rows that one worker asks for and rows that it decodes for them, blocks being decoded as a whole.

        A block is decoded again if it was not among the last ones that fit the sources' cache, assuming that a decoded
        row is as large as in a batch. Only the spans up to `most_rows` rows are looked at.
        """
        asked = decoded = 0
        if self._blocks is None:
            return 0, 0
        kept: OrderedDict[int, int] = OrderedDict()  # block to bytes
        for part in self.read(rank, self.starts(rank, worker)):
            touched = np.unique(np.searchsorted(self._blocks, part.rows, side="right") - 1)
            for block in touched.tolist():
                if block not in kept:
                    rows = int(self._blocks[block + 1] - self._blocks[block])
                    decoded += rows
                    kept[block] = rows * self.row_bytes
                kept.move_to_end(block)
            while len(kept) > len(touched) and sum(kept.values()) > CACHE_BYTES:
                kept.popitem(last=False)
            asked += part.rows.size
            if asked >= most_rows:
                break
        return asked, decoded

    def amplification(self) -> float:
        """Rows decoded for every row read, over a few workers of the first, a middle and the last rank."""
        ranks = sorted({0, self.world_size // 2, self.world_size - 1})
        workers = sorted({0, self.num_workers - 1})
        counts = [self.decoded(rank, worker, 1 << 21) for rank in ranks for worker in workers]
        asked, decoded = map(sum, zip(*counts, strict=True))
        return decoded / asked if asked else 1.0


def size(count: float) -> str:
    """Bytes, to be read.

    >>> size(1536), size(3 << 40)
    ('1.5 KiB', '3.0 TiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def foreseen(deal: Deal) -> list[tuple[str, str]]:
    """What would waste time or surprise, from arithmetic alone: each a problem and its fix."""
    plan, world = deal.plan, deal.world_size
    size, more = divmod(plan.global_batch_size, world)
    found = []
    if plan.total == 0 or deal.steps == 0:
        what = f"{plan.total} rows make no step of {plan.global_batch_size} with tail={plan.tail}"
        return [(what, f"--data.tail pad, or --data.global_batch_size {max(world, plan.total)} or less")]
    if more and 1 / (size + 1) > 0.02:
        idle = 1 - plan.global_batch_size / world / (size + 1)
        whole = [g for g in (size * world, (size + 1) * world) if g and g % plan.lanes == 0]
        fix = " or ".join(map(str, whole)) or f"a multiple of {world} and of lanes={plan.lanes}"
        found.append(
            (
                f"uneven ranks: {more} ranks take {size + 1} rows of a step and {world - more} take {size}, so {idle:.0%} "
                f"of the cluster waits in every step",
                f"--data.global_batch_size {fix}",
            )
        )
    by_worker = deal.rows_by_worker()
    idle_ranks = np.flatnonzero(by_worker.sum(axis=1) == 0)
    if len(idle_ranks):
        found.append(
            (
                f"{len(idle_ranks)} of {world} ranks have not one row in the epoch (the first is rank {idle_ranks[0]}): "
                f"{plan.total} rows are too few for {world} ranks",
                "use fewer ranks, or more rows",
            )
        )
    idle_workers = int((by_worker == 0).sum())
    if idle_workers and not len(idle_ranks):
        found.append(
            (
                f"{idle_workers} of {by_worker.size} workers have nothing to read, an epoch being {deal.steps} steps long",
                f"--data.num_workers {max(1, min(deal.num_workers, deal.steps))}, or a smaller --data.global_batch_size",
            )
        )
    slots = deal.steps * plan.global_batch_size
    if deal.padded_slots / slots > 0.05:
        fitting = max(world, -(-plan.total // deal.steps))
        fitting = -(-fitting // (world * plan.lanes)) * world * plan.lanes
        fix = f"--data.global_batch_size {fitting}" if fitting < plan.global_batch_size else "a smaller one"
        found.append(
            (
                f"global_batch_size={plan.global_batch_size} wastes {deal.padded_slots:,} of {slots:,} slots "
                f"({deal.padded_slots / slots:.0%}) on an epoch of {plan.total:,} rows",
                f"{fix}, or --data.tail drop",
            )
        )
    return found
