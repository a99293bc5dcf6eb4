"""What one rank finds out about its data: is it there, is it the same, how fast does it come, what does it need?"""

from __future__ import annotations

import time
from typing import Any

from ddp_stream.deal import Deal, foreseen
from ddp_stream.doctor.limits import limited
from ddp_stream.pool import FREE_BYTES
from ddp_stream.sources.decoded import AHEAD_BYTES, CACHE_BYTES
from ddp_stream.topology import Topology
from ddp_stream.training.config import TrainConfig
from ddp_stream.training.data import make_loader, make_source
from ddp_stream.training.task import Task

_OPEN_S = 45.0
_READ_S = 1.0


def gather_data(config: TrainConfig, topology: Topology) -> dict[str, Any]:
    """Facts on the data of this rank; an `error` in place of those that could not be had."""
    facts: dict[str, Any] = {"num_workers": 0 if config.data.num_workers == "auto" else config.data.num_workers}
    try:
        limited(lambda: _gather(config, topology, facts), _OPEN_S, f"opening and reading {_name(config)}")
    except Exception as error:  # whatever a source or a task of the user's own raises
        return {**facts, "error": f"{type(error).__name__}: {error}"}
    return facts


def _name(config: TrainConfig) -> str:
    return str(config.data.path or config.data.source or "the data")


def _gather(config: TrainConfig, topology: Topology, facts: dict[str, Any]) -> None:
    started = time.monotonic()
    task: Task = config.task
    source = make_source(config.data)
    facts |= {"source": str(source), "rows": len(source), "fingerprint": source.fingerprint()}
    task.setup(source)
    if task.columns is not None:
        source = source.select(task.columns)
    changed = type(task).transform is not Task.transform
    loader = make_loader(
        source, config.data, seed=config.seed, topology=topology, transform=task.transform if changed else None
    )
    facts["num_workers"] = loader.num_workers
    deal = Deal(loader, topology.world_size)
    facts["open_s"] = time.monotonic() - started
    facts["steps"] = deal.steps
    facts["foreseen"] = foreseen(deal) if topology.rank == 0 else []
    ahead = (loader.messages_ahead + 1) * deal.message_bytes if loader.num_workers else 0
    facts["shm_bytes"] = ahead
    decoding = (CACHE_BYTES + AHEAD_BYTES if deal.block_count else 0) + min(FREE_BYTES, 2 * deal.message_bytes)
    facts["memory_bytes"] = ahead + deal.num_workers * decoding
    facts["messages_ahead"] = loader.messages_ahead
    started = time.monotonic()
    rows = 0
    for start in deal.starts(topology.rank, 0):
        steps = min(deal.span_steps(topology.rank), deal.steps - start)
        ids = loader.reader.rows(deal.order, start * deal.plan.stride, steps)
        loader.reader.read(ids)
        rows += len(ids)
        if time.monotonic() - started > _READ_S:
            break
    seconds = time.monotonic() - started
    facts["read_s"] = seconds
    facts["rows_per_s"] = rows / seconds if rows else 0.0
    facts["bytes_per_s"] = deal.row_bytes * facts["rows_per_s"]
