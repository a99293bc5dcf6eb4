"""The proof: did every row train the model exactly once?

Every rank folds the row ids it trains on into a digest. A digest does not depend on the order of the rows, so one
all-reduce an epoch adds the ranks' digests up, and the sum is compared with the digest of the rows there are. If
they differ, a table of counts (kept where the dataset is small enough) tells which rows are to blame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ddp_stream.batch import Batch
from ddp_stream.order import Order, mix_array
from ddp_stream.partition import GlobalBatchPlan, shard_bounds
from ddp_stream.topology import Topology

TABLE_ROWS = 1 << 26
"""Up to this many rows (one byte each) the proof can name the rows that it misses."""
_FOLD_ROWS = 1 << 16
_NAMED = 10
_SALT = np.uint64(0xD6E8FEB86659FD93)


@dataclass
class Digest:
    """How many row ids, and the sums mod 2^64 of two independent 64-bit mixes of them.

    Two different multisets of rows have the same digest with a probability of about 2^-128.
    """

    count: int = 0
    sums: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(2, np.uint64))

    def fold(self, rows: NDArray[np.int64], sign: int = 1) -> None:
        """Add `rows [n]`, or take them out with `sign=-1`."""
        words = rows.view(np.uint64)
        first = mix_array(words)
        both = np.array([first.sum(dtype=np.uint64), mix_array(words ^ _SALT).sum(dtype=np.uint64)])
        self.count += sign * len(rows)
        self.sums = self.sums + both if sign > 0 else self.sums - both

    def reduced(self) -> Digest:
        """The sum of all ranks' digests."""
        values = all_reduce_sum(torch.from_numpy(np.array([self.count, *self.sums.view(np.int64)], np.int64)))
        return Digest(int(values[0]), values[1:].numpy().view(np.uint64))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digest) and self.count == other.count and bool((self.sums == other.sums).all())

    def state_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"count": self.count, "sums": [int(value) for value in self.sums]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From `state_dict()`."""
        self.count, self.sums = int(state["count"]), np.array(state["sums"], np.uint64)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of an int64 host tensor over the ranks, if there are several."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


@dataclass(frozen=True)
class Verdict:
    """What the proof says of an epoch.

    Attributes:
        rows: row ids seen over all ranks, repeated ones included
        expected: rows that should have been seen: all, but for those that `tail="drop"` or `max_steps` left out
        left_out: rows that the plan did not reach
        missing: rows that should have been seen and were not
        duplicate: how often rows were seen more than they should
        exactly_once: nothing missing, nothing twice, nothing else
        counted: the two counts are exact; without a table they are the least that explains the digest
        missing_rows: ids of the first few
        duplicate_rows: ids of the first few
        excluded: rows that were left out of the source on purpose, so that
            rows + left_out + excluded is the number of rows in the data
    """

    rows: int
    expected: int
    left_out: int
    missing: int
    duplicate: int
    exactly_once: bool
    counted: bool = True
    missing_rows: tuple[int, ...] = ()
    duplicate_rows: tuple[int, ...] = ()
    excluded: int = 0

    def __str__(self) -> str:
        left_out = f", {self.left_out} left out by the plan" if self.left_out else ""
        left_out += f", {self.excluded} excluded" if self.excluded else ""
        if self.exactly_once:
            return f"{self.rows} rows, each exactly once{left_out}"
        least = "" if self.counted else "at least "
        text = f"{self.rows} rows seen of {self.expected}{left_out}: {least}{self.missing} missing, "
        text += f"{least}{self.duplicate} duplicate"
        if self.missing_rows:
            text += f"; missing rows {_listed(self.missing_rows, self.missing)}"
        if self.duplicate_rows:
            text += f"; rows seen again {_listed(self.duplicate_rows, self.duplicate)}"
        return text


class Proof:
    """Counts the rows of one epoch at a time on this rank, and judges them over all ranks.

    Args:
        plan: which rows an epoch has, and which of them its steps reach
        topology: this rank
        excluded: how many rows are in the data and not in the plan, because they were left out on purpose
    """

    def __init__(self, plan: GlobalBatchPlan, topology: Topology, excluded: int = 0) -> None:
        self.plan = plan
        self._excluded = excluded
        self._topology = topology
        self._whole: Digest | None = None
        self.digest = Digest()
        self._resumed_at = 0
        self._pending: list[torch.Tensor] = []
        self._pending_rows = 0
        self._table = np.zeros(plan.total, np.uint8) if plan.total <= TABLE_ROWS else None

    def record(self, batch: Batch) -> None:
        """This rank has trained on `batch`."""
        rows = batch.trained_rows
        self._pending.append(rows)
        self._pending_rows += len(rows)
        if self._pending_rows >= _FOLD_ROWS:
            self._fold()

    def resume(self, digest: dict[str, Any], offset: int) -> None:
        """Go on behind lane offset `offset` of the epoch, with the `digest` of all ranks up to there."""
        if self._topology.rank == 0:  # it is a sum over ranks, so one of them carries what was
            self.digest.load_state_dict(digest)
        self._resumed_at = offset

    def _fold(self) -> None:
        if self._pending:
            rows = torch.cat(self._pending).numpy()
            self._pending, self._pending_rows = [], 0
            self.digest.fold(rows)
            if self._table is not None:
                # The addend's type matters: with a Python 1 this is 60 times slower.
                np.add.at(self._table, rows[(rows >= 0) & (rows < self.plan.total)], np.uint8(1))

    def reduced_digest(self) -> Digest:
        """The digest over all ranks so far; a collective call."""
        self._fold()
        return self.digest.reduced()

    def verdict(self, order: Order, end: int | None = None) -> Verdict:
        """Judge the rows recorded so far against those at offsets before `end`; a collective call.

        Args:
            order: the epoch's order
            end: lane offset behind the last step; None is the end of the epoch
        """
        return replace(self._judge(order, end), excluded=self._excluded)

    def _judge(self, order: Order, end: int | None) -> Verdict:
        self._fold()
        end = self.plan.steps() * self.plan.stride if end is None else end
        expected = self._expected(order, end).reduced()
        seen = self.digest.reduced()
        left_out = self.plan.total - expected.count
        counts = None
        if self._table is not None and (seen != expected or left_out):
            # The rows of a part of an epoch are known by the order alone, so a repeated one must show in the counts.
            table = self._table.astype(np.int64)
            for rows in self._rows_between(order, 0, self._resumed_at, self._topology):
                table[rows] += 1  # an earlier attempt counted these
            counts = all_reduce_sum(torch.from_numpy(table)).numpy()
        if seen == expected and (counts is None or counts.max() <= 1):
            return Verdict(seen.count, expected.count, left_out, 0, 0, True)
        if counts is not None:
            wanted = np.ones(self.plan.total, np.int64)
            for rows in self._rows_between(order, end, self._longest_lane, Topology()):
                wanted[rows] = 0
            missing_rows = np.flatnonzero(counts < wanted)
            duplicate_rows = np.flatnonzero(counts > wanted)
            if len(missing_rows) or len(duplicate_rows):
                return Verdict(
                    rows=seen.count,
                    expected=expected.count,
                    left_out=left_out,
                    missing=len(missing_rows),
                    duplicate=int((counts - wanted)[duplicate_rows].sum()),
                    exactly_once=False,
                    missing_rows=tuple(missing_rows[:_NAMED].tolist()),
                    duplicate_rows=tuple(duplicate_rows[:_NAMED].tolist()),
                )
        # Too many rows to count each, or the fault is of an attempt before this one.
        short = expected.count - seen.count
        missing, duplicate = (max(1, short), max(0, -short)) if short >= 0 else (0, -short)
        if short == 0:
            duplicate = 1
        return Verdict(seen.count, expected.count, left_out, missing, duplicate, False, counted=False)

    def reset(self) -> None:
        """Forget the epoch that was judged."""
        self.digest = Digest()
        self._resumed_at = 0
        self._pending, self._pending_rows = [], 0
        if self._table is not None:
            self._table[:] = 0

    def _expected(self, order: Order, end: int) -> Digest:
        """This rank's part of the digest of the rows at offsets before `end`.

        A whole epoch is compared with `0..N-1` itself, so that a fault in the plan or the order shows too.
        """
        reached = self.plan.rows_between(0, end)
        if reached > self.plan.total // 2:
            if self._whole is None:
                self._whole = Digest()
                start, stop = shard_bounds(self.plan.total, self._topology.rank, self._topology.world_size)
                for first in range(start, stop, _FOLD_ROWS):
                    self._whole.fold(np.arange(first, min(first + _FOLD_ROWS, stop)))
            digest = Digest(self._whole.count, self._whole.sums.copy())
            for rows in self._rows_between(order, end, self._longest_lane, self._topology):
                digest.fold(rows, sign=-1)
            return digest
        digest = Digest()
        for rows in self._rows_between(order, 0, end, self._topology):
            digest.fold(rows)
        return digest

    @property
    def _longest_lane(self) -> int:
        return -(-self.plan.total // self.plan.lanes)

    def _rows_between(self, order: Order, start: int, end: int, topology: Topology) -> Iterator[NDArray[np.int64]]:
        """This rank's share of the row ids at lane offsets `start..end-1`."""
        single = GlobalBatchPlan(self.plan.total, self.plan.lanes, self.plan.lanes)  # one row of each lane a step
        first, stop = shard_bounds(max(0, end - start), topology.rank, topology.world_size)
        at_once = max(1, _FOLD_ROWS // self.plan.lanes)
        for offset in range(start + first, start + stop, at_once):
            steps = min(at_once, start + stop - offset)
            positions, filled = single.positions(offset, steps, 0, self.plan.lanes)
            yield order.rows(positions[filled])


def _listed(rows: tuple[int, ...], count: int) -> str:
    return ", ".join(map(str, rows)) + (", ..." if count > len(rows) else "")
