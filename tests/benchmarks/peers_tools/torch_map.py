"""torch's DataLoader and torchdata's StatefulDataLoader on a map-style dataset.

Rows and text are in memory, tokens are mapped, and images are read by an index of the members of the shards.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from peers_tools.base import Loader, Setup, delivered, pixels
from peers_tools.data import BATCH, NAMES, rows_of, shards, tokens


class Rows(Dataset):
    """Reads the file once into one tensor, or list of text; a sample is a view of a row."""

    def __init__(self, setup: Setup) -> None:
        path = setup.data(setup.case.file)
        if setup.case.kind == "text":
            self.values: Any = rows_of(setup.case, setup.folder)
            return
        if setup.case.kind == "tokens":
            self.values = torch.from_numpy(tokens(path))
            return
        if setup.case.kind == "matrix":
            self.values = torch.from_numpy(np.load(path))
            return
        if path.endswith(".csv"):
            types = dict.fromkeys([*NAMES, "label"], pa.float32())
            table = pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types=types))
        else:
            table = pq.read_table(path)
        columns = [table.column(name).to_numpy() for name in [*NAMES, "label"]]
        self.values = torch.from_numpy(np.stack(columns, axis=1))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> Any:
        return self.values[row]


class WholeBatches(Rows):
    """`__getitems__`, which the DataLoader calls with all indices of a batch."""

    def __getitems__(self, rows: list[int]) -> Any:
        return [self.values[row] for row in rows] if isinstance(self.values, list) else self.values[rows]


class Images(Dataset):
    """JPEGs where they lie in the shards, by an index that is made at the start."""

    def __init__(self, setup: Setup) -> None:
        self.members, self.files = [], []
        for shard in shards(setup.data(setup.case.file)):
            with tarfile.open(shard) as tar:
                found = [(len(self.files), member.offset_data, member.size) for member in tar]
            self.members += zip(found[::2], found[1::2], strict=True)  # image and label
            self.files.append(os.open(shard, os.O_RDONLY))

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, row: int) -> dict[str, Any]:
        jpeg, label = (os.pread(self.files[shard], size, start) for shard, start, size in self.members[row])
        return {"image": pixels(jpeg), "label": int(label)}


def dataset(setup: Setup, rows: type[Rows] = Rows) -> Any:
    """The case's map-style dataset."""
    return Images(setup) if setup.case.kind == "images" else rows(setup)


def as_it_is(batch: Any) -> Any:
    return batch


class TorchMap(Loader):
    """DataLoader with DistributedSampler; resumed as accelerate does it, by skipping batches of the sampler."""

    rows_type: type[Rows] = Rows
    collate: Any = None
    state_type: type[DataLoader] = DataLoader

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        data = dataset(setup, self.rows_type)
        self.sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=setup.shuffle, seed=setup.seed)
        self.loader = self.state_type(
            data,
            BATCH,
            sampler=self.sampler,
            num_workers=setup.workers,
            persistent_workers=setup.workers > 0,
            collate_fn=self.collate,
        )
        self.skip = 0

    def epoch(self, number: int) -> Iterator[Mapping[str, Any]]:
        self.sampler.set_epoch(number)
        loader = self.loader
        if self.skip:
            from accelerate import skip_first_batches

            loader = skip_first_batches(loader, self.skip)
        return (delivered(self.setup.case, batch) for batch in loader)

    def load(self, state: Any) -> None:
        self.skip = state


class TorchGetitems(TorchMap):
    rows_type = WholeBatches
    collate = staticmethod(as_it_is)


class Stateful(TorchMap):
    """StatefulDataLoader, which is a DataLoader with a state."""

    def __init__(self, setup: Setup) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader
        from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

        super().__init__(setup)
        data = self.loader.dataset
        self.sampler = StatefulDistributedSampler(data, 1, 0, shuffle=setup.shuffle, seed=setup.seed)
        self.loader = StatefulDataLoader(
            data, BATCH, sampler=self.sampler, num_workers=setup.workers, persistent_workers=setup.workers > 0
        )

    def state(self, taken: int) -> Any:
        return self.loader.state_dict()

    def load(self, state: Any) -> None:
        self.loader.load_state_dict(state)


TOOLS = {"torch": TorchMap, "torch-getitems": TorchGetitems, "stateful": Stateful}
