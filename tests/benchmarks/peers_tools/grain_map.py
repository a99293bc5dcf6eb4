"""Grain: a MapDataset over the rows of torch_map, with its index shuffle, batched, read ahead by threads or processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
import torch

from peers_tools.base import Loader, Setup, delivered
from peers_tools.data import BATCH
from peers_tools.torch_map import dataset


def stack(rows: list[Any]) -> Any:
    """A batch of arrays, of dicts, or of text."""
    if isinstance(rows[0], str):
        return list(rows)
    if isinstance(rows[0], dict):
        return {
            "image": torch.stack([row["image"] for row in rows]).numpy(),
            "label": np.array([row["label"] for row in rows]),
        }
    return np.stack(rows)


def tensors(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {name: torch.from_numpy(value) for name, value in batch.items()}
    return batch if isinstance(batch, list) else torch.from_numpy(batch)


class Grain(Loader):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        data = dataset(setup)
        values = getattr(data, "values", data)
        self.source = values.numpy() if isinstance(values, torch.Tensor) else values
        self.saved: Any = None
        self.iterator: Any = None

    def epoch(self, number: int) -> Iterator[Mapping[str, Any]]:
        data = grain.MapDataset.source(self.source).seed(self.setup.seed + number)
        if self.setup.shuffle:
            data = data.shuffle()
        data = data.batch(BATCH, batch_fn=stack).to_iter_dataset(grain.ReadOptions(num_threads=1))
        if self.setup.workers:
            data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.setup.workers))
        self.iterator = iter(data)
        if self.saved is not None:
            self.iterator.set_state(self.saved)
        return (delivered(self.setup.case, tensors(batch)) for batch in self.iterator)

    def state(self, taken: int) -> Any:
        return self.iterator.get_state()

    def load(self, state: Any) -> None:
        self.saved = state


TOOLS = {"grain": Grain}
