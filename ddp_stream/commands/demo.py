"""`demo`: on one screen, why sharding needs two levels."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from ddp_stream.commands.cli import Parser, make_parser
from ddp_stream.dataset import StreamingDataset
from ddp_stream.sources import InMemory
from ddp_stream.topology import Topology

SAMPLES = 20
WORKERS = 3
BATCH = 4


class BrokenStreamingDataset(StreamingDataset):
    """What goes wrong without the worker's part of the index: every worker of a rank reads all of the rank's rows."""

    def bounds(self, topology: Topology) -> tuple[int, int]:
        return super().bounds(Topology(topology.rank, topology.world_size))


@dataclass
class DemoConfig:
    """Show on one screen how rows are dealt to ranks and workers, and what happens without."""


def parser() -> Parser:
    """The command's options."""
    return make_parser(DemoConfig, task=False)


def run(parser: Parser, arguments: Any) -> int:
    """Print the demo; returns 1 if the dataset did not do what the demo tells."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # three workers on two cores are the point here
    console = Console()
    source = InMemory({"row": np.arange(SAMPLES)})
    sharded = Counter(_rows(StreamingDataset(source)))
    broken = Counter(_rows(BrokenStreamingDataset(source)))
    console.print(f"{SAMPLES} samples, {WORKERS} workers, batches of {BATCH}\n")
    console.print(f"StreamingDataset: {_summary(sharded)}")
    console.print(f"without sharding: {_summary(broken)}\n")
    console.print(f"Two levels: 2 ranks x {WORKERS} workers, global_worker = rank * num_workers + worker")
    table = Table("rank", "worker", "global worker", "rows")
    dealt: Counter[int] = Counter()
    for rank in range(2):
        for worker in range(WORKERS):
            topology = Topology(rank, 2, worker, WORKERS)
            start, end = StreamingDataset(source).bounds(topology)
            dealt.update(range(start, end))
            rows = " ".join(map(str, range(start, end)))
            table.add_row(str(rank), str(worker), f"{topology.global_worker} of {topology.global_workers}", rows)
    console.print(table)
    console.print(f"union: {_summary(dealt)}")
    right = all(set(seen.values()) == {1} and len(seen) == SAMPLES for seen in (sharded, dealt))
    return 0 if right and broken.total() == SAMPLES * WORKERS else 1


def _rows(dataset: StreamingDataset) -> Iterator[int]:
    for batch in DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS):
        yield from batch["row"].tolist()


def _summary(seen: Counter[int]) -> str:
    times = sorted(set(seen.values()))
    each = f"each {times[0]} time(s)" if len(times) == 1 else f"between {times[0]} and {times[-1]} times"
    return f"{seen.total()} seen, {len(seen)} different, {each}"
