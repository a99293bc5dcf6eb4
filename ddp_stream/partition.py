"""Which rows form a global batch, and which of its slots a rank fills. Pure integer arithmetic.

    epoch, offset, slot j  --GlobalBatchPlan-->  position p in the epoch's order, or empty

Nothing here knows a file, a process or a shuffle; nothing here loops over rows, ranks or workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Tail = Literal["pad", "drop"]


def shard_bounds(total: int, index: int, count: int) -> tuple[int, int]:
    """Half-open bounds of shard `index` of `count` over `total` rows; the first `total % count` get one more.

    >>> [shard_bounds(20, i, 3) for i in range(3)]
    [(0, 7), (7, 14), (14, 20)]

    Raises:
        ValueError: `total` is negative, `count` is not positive, or `index` is outside `0..count-1`.
    """
    if total < 0 or count < 1 or not 0 <= index < count:
        raise ValueError(
            f"shard_bounds(total={total}, index={index}, count={count}): there is no such shard; "
            f"it needs total >= 0, count >= 1 and 0 <= index < count"
        )
    size, extra = divmod(total, count)
    start = index * size + min(index, extra)
    return start, start + size + (index < extra)


def shard_of(total: int, points: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The inverse of `shard_bounds`: which of `count` shards over `total` rows holds each of `points [n]`.

    >>> shard_of(20, np.array([0, 6, 7, 19]), 3).tolist()
    [0, 0, 1, 2]
    """
    size, extra = divmod(total, count)
    boundary = extra * (size + 1)  # where the shards that have one more end
    return np.where(points < boundary, points // (size + 1), extra + (points - boundary) // max(1, size))


def span_starts(steps: int, span_steps: int, worker: int, num_workers: int) -> range:
    """The first steps of the spans that `worker` prepares: of `steps` steps, cut into spans, every `num_workers`-th.

    >>> [list(span_starts(steps=10, span_steps=3, worker=worker, num_workers=2)) for worker in (0, 1)]
    [[0, 6], [3, 9]]
    """
    return range(worker * span_steps, steps, num_workers * span_steps)


def span_worker(step: NDArray[np.int64], span_steps: int, num_workers: int) -> NDArray[np.int64]:
    """The inverse of `span_starts`: which worker prepares each `step [n]`, counted from where the iteration began."""
    return step // span_steps % num_workers


@dataclass(frozen=True)
class GlobalBatchPlan:
    """The global batches of an epoch: the same for every number of ranks and workers.

    The epoch's order is cut into `lanes` contiguous lanes. A step at `offset` takes the next
    `global_batch_size / lanes` positions of every lane, side by side:

    >>> plan = GlobalBatchPlan(total=10, global_batch_size=4, lanes=2)
    >>> plan.steps()
    3
    >>> [plan.positions(offset, 1, 0, 4)[0].tolist() for offset in (0, 2, 4)]
    [[0, 1, 5, 6], [2, 3, 7, 8], [4, 4, 9, 9]]
    >>> [plan.rows_in_step(offset) for offset in (0, 2, 4)]
    [4, 4, 2]

    An empty slot (here in the last step) repeats the last position of its lane, and counts for nothing.
    """

    total: int
    """Rows in the epoch, `N`."""
    global_batch_size: int
    """Slots of one step over all ranks, `G`."""
    lanes: int = 1
    """Contiguous slices of the order that a batch is drawn from, `L`; divides `G`."""
    tail: Tail = "pad"
    """`pad`: the last step may hold fewer rows than slots. `drop`: only full steps are taken."""

    def __post_init__(self) -> None:
        if self.total < 0:
            raise ValueError(f"total={self.total}: a dataset cannot hold fewer than 0 rows")
        if self.global_batch_size < 1:
            raise ValueError(f"global_batch_size={self.global_batch_size}: a step needs at least one row")
        if self.lanes < 1 or self.global_batch_size % self.lanes:
            below = max(1, self.lanes) * max(1, self.global_batch_size // max(1, self.lanes))
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of lanes={self.lanes}: a step takes "
                f"equally many rows from every lane; use global_batch_size={below}, or a number of lanes that "
                f"divides {self.global_batch_size}"
            )
        if self.tail not in ("pad", "drop"):
            raise ValueError(f"tail={self.tail!r} is unknown: use 'pad' or 'drop'")

    @property
    def stride(self) -> int:
        """Rows that a step takes from each lane, `G / L`; also what a step adds to `offset`."""
        return self.global_batch_size // self.lanes

    def steps(self, offset: int = 0) -> int:
        """Steps from `offset` (rows already taken from every lane) to the end of the epoch."""
        shortest, more = divmod(self.total, self.lanes)
        if self.tail == "drop":
            return max(0, shortest - offset) // self.stride
        longest = shortest + (more > 0)
        return -(-max(0, longest - offset) // self.stride)

    def rows_in_step(self, offset: int) -> int:
        """Rows (slots that are not empty) over all ranks in the step at `offset`."""
        return self.rows_between(offset, offset + self.stride)

    def rows_between(self, start: int, end: int) -> int:
        """Rows that lie at offsets `start <= offset < end` of all lanes together."""
        size, more = divmod(self.total, self.lanes)

        def taken(length: int) -> int:
            return min(max(end, 0), length) - min(max(start, 0), length)

        return more * taken(size + 1) + (self.lanes - more) * taken(size)

    def positions(
        self, offset: int, steps: int, first_slot: int, end_slot: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Positions of slots `first_slot..end_slot-1` in each of `steps` steps from `offset` on.

        Returns:
            `positions [steps * (end_slot - first_slot)]`, step after step, and `filled`, of the same shape: False
            where the slot is empty and its position only repeats a row to keep the shape. With no rows at all
            there is no position to repeat, and both are empty.
        """
        if self.total == 0:
            return np.empty(0, np.int64), np.empty(0, np.bool_)
        slot = np.arange(first_slot, end_slot, dtype=np.int64)
        lane, within = np.divmod(slot, self.stride)
        size, more = divmod(self.total, self.lanes)
        start = lane * size + np.minimum(lane, more)
        end = start + size + (lane < more)
        step_offset = offset + np.arange(steps, dtype=np.int64)[:, None] * self.stride
        position = start + within + step_offset
        filled = position < end
        if not filled.all():
            position = np.where(filled, position, end - 1)
        return position.reshape(-1), filled.reshape(-1)

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The inverse: `(offset [n], slot [n])` of `positions [n]` for steps that start at offset 0.

        >>> [array.tolist() for array in GlobalBatchPlan(total=10, global_batch_size=4, lanes=2).locate(np.array([8]))]
        [[2], [3]]
        """
        outside = positions[(positions < 0) | (positions >= self.total)]
        if len(outside):
            raise ValueError(f"position={outside[0]} is outside the epoch's 0..{self.total - 1}")
        size, more = divmod(self.total, self.lanes)
        lane = shard_of(self.total, positions, self.lanes)
        step, within = np.divmod(positions - lane * size - np.minimum(lane, more), self.stride)
        return step * self.stride, lane * self.stride + within
