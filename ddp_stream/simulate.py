"""Does a planned cluster read every row exactly once? Every reader's rows are counted, or a sample's traced back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ddp_stream.audit import Proof
from ddp_stream.batch import Batch
from ddp_stream.deal import Deal, Part
from ddp_stream.topology import Topology

WHOLE_ROWS = 200_000_000
"""Up to this many rows all readers are run through; it takes some 30 s for every 100 million."""
_SAMPLE_ROWS = 20_000_000
_SAMPLE_SLOTS = 4_000_000
_SAMPLE_RANKS = 200_000
_SAMPLE_READERS = 32


@dataclass(frozen=True)
class Simulated:
    """How a simulation ended.

    Attributes:
        exactly_once: nothing wrong was found
        lines: what was checked, and what came out
    """

    exactly_once: bool
    lines: tuple[str, ...]


def simulate(deal: Deal) -> Simulated:
    """Check that the readers of `deal` take every row exactly once: all of them, or a sample where they are too many."""
    return _whole(deal) if deal.plan.total <= WHOLE_ROWS else _sampled(deal)


def _whole(deal: Deal) -> Simulated:
    """Every row of every worker of every rank goes into the same proof that ends a training epoch."""
    proof = Proof(deal.plan, Topology())
    for rank in range(deal.world_size):
        for worker in range(deal.num_workers):
            for part in deal.read(rank, deal.starts(rank, worker)):
                rows = torch.from_numpy(part.rows[part.filled])
                proof.record(Batch({}, weight=torch.ones(len(rows)), rows=rows))
    verdict = proof.verdict(deal.order)
    readers = deal.world_size * deal.num_workers
    lines = [f"all {deal.plan.total:,} rows through all {readers:,} global workers: {verdict}"]
    return Simulated(verdict.exactly_once, tuple(lines))


def _sampled(deal: Deal) -> Simulated:
    """Steps over all ranks, spans of some workers, and rows at random, each traced forth and back."""
    random = np.random.default_rng(0)
    wrong: list[str] = []
    steps = _picked(random, deal.steps, max(1, min(64, _SAMPLE_RANKS // deal.world_size)))
    slots = 0
    for step in steps.tolist():
        seen, wrong_step = _check_step(deal, step)
        slots += seen
        wrong += wrong_step
    readers = _picked(random, deal.world_size * deal.num_workers, _SAMPLE_READERS)
    spans = whole = rows = 0
    for reader in readers.tolist():
        rank, worker = divmod(reader, deal.num_workers)
        starts = deal.starts(rank, worker)
        span_rows = deal.span_steps(rank) * max(1, deal.slots(rank)[1] - deal.slots(rank)[0])
        chosen = _picked(random, len(starts), max(1, _SAMPLE_ROWS // len(readers) // span_rows))
        whole += len(chosen) == len(starts)
        for part in deal.read(rank, [starts[index] for index in chosen.tolist()]):
            spans += 1
            rows += int(part.filled.sum())
            wrong += _check_part(deal, part, rank, worker)
    traced = np.unique(random.integers(0, deal.plan.total, 1_000_000))
    read, wrong_rows = _check_rows(deal, traced)
    wrong += wrong_rows
    lines = [
        f"SAMPLED, since {deal.plan.total:,} rows are too many to run through:",
        f"{len(steps)} of {deal.steps:,} steps over all {deal.world_size:,} ranks: {slots:,} slots, checked that none "
        f"is dealt twice or to nobody and that no row is in two",
        f"{len(readers)} of {deal.world_size * deal.num_workers:,} global workers ({whole} of them whole, {spans:,} spans "
        f"in all): {rows:,} rows, checked that each leads back to this worker and step and to no other",
        f"{len(traced):,} row ids at random: checked that the order leads there and back, and, for {read:,} of them, that "
        f"the rank which has the slot reads that row",
    ]
    return Simulated(not wrong, (*lines, *(wrong[:5] or ["exactly once, as far as was sampled"])))


def _picked(random: np.random.Generator, count: int, most: int) -> NDArray[np.int64]:
    """All of `0..count-1`, or `most` of them with the first and the last."""
    if count <= most:
        return np.arange(count)
    return np.unique(np.concatenate([[0, count - 1], random.integers(0, count, max(0, most - 2))]))


def _check_step(deal: Deal, step: int) -> tuple[int, list[str]]:
    """All ranks' slots of one step together."""
    parts = [deal.part(rank, step) for rank in range(deal.world_size)]
    slots = sum(part.rows.size for part in parts)
    rows = np.concatenate([part.rows[part.filled] for part in parts])
    expected = deal.plan.rows_in_step(step * deal.plan.stride)
    different = len(np.unique(rows))
    if slots == deal.plan.global_batch_size and len(rows) == different == expected:
        return slots, []
    return slots, [
        f"step {step}: {slots} slots of {deal.plan.global_batch_size} dealt, {len(rows)} rows read of {expected}, "
        f"{different} of them different"
    ]


def _check_part(deal: Deal, part: Part, rank: int, worker: int) -> list[str]:
    """Every row of a span leads back to the reader and the step it was read for."""
    step, slot = np.broadcast_arrays(
        part.step + np.arange(len(part.rows))[:, None], np.arange(*deal.slots(rank))[None, :]
    )
    rows, step, slot = part.rows[part.filled], step[part.filled], slot[part.filled]
    found = deal.find(rows)
    same = (found.step == step) & (found.slot == slot) & (found.rank == rank) & (found.worker == worker)
    if same.all() and found.reached.all():
        return []
    at = int(np.argmin(same & (found.reached == 1)))
    return [
        f"row {rows[at]} is read by rank {rank}, worker {worker} in slot {slot[at]} of step {step[at]}, and belongs to "
        f"rank {found.rank[at]}, worker {found.worker[at]}, slot {found.slot[at]} of step {found.step[at]}"
    ]


def _check_rows(deal: Deal, rows: NDArray[np.int64]) -> tuple[int, list[str]]:
    """Every row has a place in the epoch, and that place holds the row."""
    found = deal.find(rows)
    held = deal.order.rows(found.position)
    bad = np.flatnonzero(rows != held)
    wrong = [f"row {rows[index]} has a place that holds row {held[index]}" for index in bad[:5].tolist()]
    reached = np.flatnonzero(found.reached)
    chosen = reached[:: max(1, len(reached) // 1000)]  # each costs a call
    for index in chosen.tolist():
        rank, step, slot = int(found.rank[index]), int(found.step[index]), int(found.slot[index])
        first, end = deal.slots(rank)
        read = int(deal.part(rank, step).rows[0, slot - first]) if first <= slot < end else None
        if read != rows[index]:
            wrong.append(f"row {rows[index]} belongs to rank {rank}, step {step}, slot {slot}, which reads row {read}")
    return len(chosen), wrong
