"""Grain: a MapDataset over rows in memory, with its index shuffle, batched, read ahead by threads or processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
import torch

from peers_tools.base import Loader, Setup, delivered
from peers_tools.data import BATCH
from peers_tools.torch_map import Rows


class Grain(Loader):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.source = Rows(setup).values.numpy()
        self.saved: Any = None
        self.iterator: Any = None

    def epoch(self, number: int) -> Iterator[Mapping[str, Any]]:
        data = grain.MapDataset.source(self.source).seed(self.setup.seed + number)
        if self.setup.shuffle:
            data = data.shuffle()
        data = data.batch(BATCH).to_iter_dataset(grain.ReadOptions(num_threads=1))
        if self.setup.workers:
            data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.setup.workers))
        self.iterator = iter(data)
        if self.saved is not None:
            self.iterator.set_state(self.saved)
        return (delivered(self.setup.case, torch.from_numpy(np.asarray(batch))) for batch in self.iterator)

    def state(self, taken: int) -> Any:
        return self.iterator.get_state()

    def load(self, state: Any) -> None:
        self.saved = state


TOOLS = {"grain": Grain}
