"""Hugging Face datasets: streamed from the file, streamed as Arrow batches in process, and map-style.

Streaming follows its guide: `reshard` makes shards of row groups, `shuffle` permutes them and mixes rows in a buffer,
`batch` after `with_format` stays in Arrow; images come from the tar shards. The map-style dataset was written to disk,
with features, and tokens, in one column; streaming reads tokens from there, in 16 shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from peers_tools.base import Loader, Setup, pixels
from peers_tools.data import BATCH, NAMES, SHARDS, WINDOW, rows_of, shards

_BUFFER = 10_000


def stack_table(table: Any) -> dict[str, Any]:
    """An Arrow table as tensors."""
    columns = {name: table.column(name).to_numpy() for name in [*NAMES, "label"]}
    features = np.stack([columns[name] for name in NAMES], axis=1)
    return {"features": torch.from_numpy(features), "label": torch.from_numpy(np.array(columns["label"]))}


def stack_tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of 33 tensors as two."""
    return {"features": torch.stack([batch[name] for name in NAMES], dim=1), "label": batch["label"]}


def decoded(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of images, read as bytes."""
    return {
        "image": torch.stack([pixels(image["bytes"]) for image in batch["jpg"]]),
        "label": torch.tensor(batch["cls"]),
    }


def convert(setup: Setup, target: str) -> None:
    """The map-style dataset as Arrow files, features in one column of fixed-size lists."""
    case, path = setup.case, setup.data(setup.case.file)
    if case.kind == "tokens":
        flat = pa.array(rows_of(case, setup.folder).reshape(-1))
        data = datasets.Dataset(pa.table({"tokens": pa.FixedSizeListArray.from_arrays(flat, WINDOW)}))
    elif case.kind == "images":
        jpegs, labels = zip(*rows_of(case, setup.folder), strict=True)
        data = datasets.Dataset.from_dict({"jpg": [{"bytes": jpeg} for jpeg in jpegs], "cls": labels})
    else:
        data = datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=setup.data("hf"))
    if case.kind == "table":
        features = datasets.Features(
            {"features": datasets.List(datasets.Value("float32"), length=32), "label": datasets.Value("float32")}
        )
        data = data.map(
            lambda batch: {"features": np.stack([batch[name] for name in NAMES], axis=1), "label": batch["label"]},
            batched=True,
            input_columns=None,
            remove_columns=data.column_names,
            features=features,
        )
    data.save_to_disk(target)


def stream(setup: Setup) -> Any:
    """The file as an iterable dataset, in the shards that shuffling can permute."""
    path = setup.data(setup.case.file)
    if setup.case.kind == "images":
        data = datasets.load_dataset("webdataset", data_files=[*map(str, shards(path))], split="train", streaming=True)
        return data.select_columns(["jpg", "cls"]).cast_column("jpg", datasets.Image(decode=False))
    if setup.case.kind == "tokens":
        return datasets.load_from_disk(setup.data(f"hf-map-{setup.case.name}")).to_iterable_dataset(SHARDS)
    if path.endswith(".csv"):  # without the types, every number is a float64
        features = datasets.Features({name: datasets.Value("float32") for name in [*NAMES, "label"]})
        return datasets.load_dataset("csv", data_files=path, features=features, split="train", streaming=True)
    return datasets.load_dataset("parquet", data_files=path, split="train", streaming=True).reshard()


class HfStream(Loader):
    """`load_dataset(streaming=True)`, `.batch` in torch format, through a (Stateful)DataLoader."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        data = stream(setup)
        if setup.shuffle:
            # Mixing several shards in the buffer, which is the default, takes five times as long.
            data = data.shuffle(seed=setup.seed, buffer_size=_BUFFER, max_buffer_input_shards=1)
        self.data = self.arranged(data)
        self.start()

    def arranged(self, data: Any) -> Any:
        if self.setup.case.kind == "text":
            return data.batch(BATCH)
        if self.setup.case.kind == "images":
            return data.batch(BATCH).map(decoded, remove_columns=["jpg", "cls"])
        if self.setup.case.kind == "tokens":
            return data.with_format("torch").batch(BATCH)
        return data.with_format("torch").batch(BATCH).map(stack_tensors)

    def start(self) -> None:
        workers = self.setup.workers
        self.loader = StatefulDataLoader(
            self.data, batch_size=None, num_workers=workers, persistent_workers=workers > 0
        )

    def epoch(self, number: int) -> Iterator[Mapping[str, Any]]:
        self.data.set_epoch(number)
        return iter(self.loader)

    def state(self, taken: int) -> Any:
        return self.loader.state_dict()

    def load(self, state: Any) -> None:
        self.loader.load_state_dict(state)


class ArrowBatches(IterableDataset):
    """`.iter(256)` in Arrow format over a worker's share, stacked by hand."""

    def __init__(self, data: Any) -> None:
        self.data = data.with_format("arrow")

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        worker = get_worker_info()
        data = self.data
        if worker is not None:
            if worker.id >= data.num_shards:  # a CSV file is one shard
                return
            data = data.shard(min(worker.num_workers, data.num_shards), worker.id)
        for table in data.iter(BATCH):
            if "text" in table.column_names:
                yield {"text": table["text"].to_pylist()}
            elif "tokens" in table.column_names:
                flat = pa.concat_arrays(table["tokens"].chunks).flatten().to_numpy()
                yield {"tokens": torch.from_numpy(flat.copy()).view(-1, WINDOW)}
            else:
                yield stack_table(table)


class HfArrow(HfStream):
    """Arrow batches in process, or in the workers of a DataLoader: what an expert would write. A state in process."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.resume_by = None if setup.workers else "state"

    def arranged(self, data: Any) -> Any:
        return data

    def start(self) -> None:
        self.batches = ArrowBatches(self.data)
        workers = self.setup.workers
        if workers:
            self.loader = DataLoader(self.batches, batch_size=None, num_workers=workers, persistent_workers=True)

    def epoch(self, number: int) -> Iterator[Mapping[str, Any]]:
        self.batches.data.set_epoch(number)
        return iter(self.loader if self.setup.workers else self.batches)

    def state(self, taken: int) -> Any:
        return self.batches.data.state_dict()

    def load(self, state: Any) -> None:
        self.batches.data.load_state_dict(state)


class HfMap(Loader):
    """Map-style in torch format under a DataLoader with DistributedSampler; resumed by accelerate's skipping."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        data = datasets.load_from_disk(setup.converted)
        if setup.case.kind == "images":
            data = data.with_transform(decoded)
        elif setup.case.kind != "text":
            data = data.with_format("torch")
        self.sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=setup.shuffle, seed=setup.seed)
        workers = setup.workers
        self.loader = DataLoader(data, BATCH, sampler=self.sampler, num_workers=workers, persistent_workers=workers > 0)
        self.skip = 0

    def epoch(self, number: int) -> Iterator[Mapping[str, Any]]:
        self.sampler.set_epoch(number)
        if not self.skip:
            return iter(self.loader)
        from accelerate import skip_first_batches

        return iter(skip_first_batches(self.loader, self.skip))

    def load(self, state: Any) -> None:
        self.skip = state


TOOLS = {"hf-stream": HfStream, "hf-arrow": HfArrow, "hf-map": HfMap}
