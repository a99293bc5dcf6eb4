"""Who reads what of a stream whose length nobody knows: row `i` belongs to global worker `i % W`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from ddp_stream.topology import Topology


class StridedDataset(IterableDataset[Any]):
    """The rows of an iterable, each exactly once over all workers of all ranks, for a plain torch `DataLoader`.

    Global worker `g` of `W` yields rows `g, g + W, g + 2 W, ...`, and passes over the others, which it has to read, too.
    Nothing is known about the end, so ranks may differ by a row, and an endless stream needs a limit on the steps; training
    with `StreamLoader`, whose ranks take equally many steps, uses `ddp_stream.sources.ForwardOnly`.

        loader = DataLoader(StridedDataset(lines), batch_size=4, num_workers=3)

    Do not pass such a loader to `accelerator.prepare`, which would shard it a second time.

    Args:
        open: returns the iterable: the same rows, in the same order, in every process and at every call
        skip: rows to leave out at the beginning, to go on from there; they are read, too
    """

    def __init__(self, open: Callable[[], Iterable[Any]], skip: int = 0) -> None:
        super().__init__()
        if skip < 0:
            raise ValueError(f"skip={skip}: rows that were not there cannot be left out")
        self.open = open
        self.skip = skip
        self._rank_topology: Topology | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has no torch.distributed to ask, and perhaps no environment: its rank tells it.
        rank_topology = Topology.detect() if get_worker_info() is None else self._rank_topology
        return {**self.__dict__, "_rank_topology": rank_topology}

    def __iter__(self) -> Iterator[Any]:
        found, told = Topology.detect(), self._rank_topology
        if get_worker_info() is not None and told is not None:
            found = Topology(told.rank, told.world_size, found.worker, found.num_workers)
        return islice(self.open(), self.skip + found.global_worker, None, found.global_workers)
