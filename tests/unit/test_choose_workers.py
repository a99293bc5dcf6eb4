"""`--data.num_workers auto`: none for a source that is quick, one a CPU for one that is slow."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ddp_stream import StreamLoader
from ddp_stream.sources import InMemory, SyntheticRegression
from ddp_stream.sources.base import Columns, Ints
from ddp_stream.topology import Topology
from ddp_stream.training.config import DataConfig
from ddp_stream.training.data import choose_workers, make_loader


class Slow(InMemory):
    """2 ms a row."""

    def take(self, rows: Ints) -> Columns:
        time.sleep(0.002 * len(rows))
        return super().take(rows)


@pytest.mark.parametrize(("cpus", "workers"), [(1, 0), (1.5, 1), (4, 3), (64, 8)])
def test_a_slow_source_gets_the_cpus_that_are_left(cpus: float, workers: int) -> None:
    loader = StreamLoader(Slow({"x": np.arange(500)}), 4)
    assert choose_workers(loader, cpus) == workers


@pytest.mark.parametrize("rows", [0, 1, 100_000])
def test_a_quick_source_needs_none(rows: int) -> None:
    assert choose_workers(StreamLoader(SyntheticRegression(rows), 4), 64) == 0


def test_auto_is_resolved_when_the_loader_is_made() -> None:
    config = DataConfig(num_workers="auto", global_batch_size=4)
    loader = make_loader(SyntheticRegression(50), config, seed=0, topology=Topology())
    assert loader.num_workers == 0
    assert sum(int((batch.weight > 0).sum()) for batch in loader) == 50
