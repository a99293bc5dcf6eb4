"""The limit: pyarrow, numpy or simplejpeg reading the same file with no loader at all, in file order, on 1 or 2 threads.

It makes arrays of whole row groups (or pieces of the file), no batches and no tensors, and hands nothing to anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import simplejpeg
import torch

from peers_tools.base import Loader, Setup, row_ids
from peers_tools.data import NAMES, members, shards, tokens

_PIECE = 8192


class Bare(Loader):
    """`workers` threads (at least one) decode pieces of the file; 2 workers stand for 2 cores."""

    resume_by = None
    stacked = False

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.path = setup.data(setup.case.file)
        pa.set_cpu_count(max(1, setup.workers))
        self.threads = ThreadPoolExecutor(setup.workers) if setup.workers > 1 else None
        self.pieces, self.read = self._pieces()

    def _pieces(self) -> tuple[list[Any], Callable[[Any], Mapping[str, Any]]]:
        case = self.setup.case
        starts = list(range(0, case.rows, _PIECE))
        if case.kind == "images":
            return shards(self.path), self._images
        if case.kind == "tokens":
            return starts, self._tokens
        if self.path.endswith(".parquet"):
            return list(range(pq.ParquetFile(self.path).num_row_groups)), self._row_group
        if self.path.endswith(".csv"):
            return [None], self._csv
        return starts, self._slice

    def epoch(self, number: int) -> Iterator[Mapping[str, Any]]:
        return map(self.read, self.pieces) if self.threads is None else self.threads.map(self.read, self.pieces)

    def _row_group(self, group: int) -> Mapping[str, Any]:
        # A handle a piece: one handle must not be used by two threads, and opening it costs little.
        return self._arrays(pq.ParquetFile(self.path, memory_map=True).read_row_group(group, use_threads=False))

    def _csv(self, _: None) -> Mapping[str, Any]:
        options = pyarrow.csv.ReadOptions(use_threads=self.threads is not None)
        types = dict.fromkeys([*NAMES, "label"], pa.float32())
        convert = pyarrow.csv.ConvertOptions(column_types=types)
        return self._arrays(pyarrow.csv.read_csv(self.path, options, convert_options=convert))

    def _slice(self, start: int) -> Mapping[str, Any]:
        return {"rows": np.array(np.load(self.path, mmap_mode="r")[start : start + _PIECE])}

    def _images(self, shard: Path) -> Mapping[str, Any]:
        jpegs, labels = zip(*members(shard.read_bytes()), strict=True)
        images = np.stack([simplejpeg.decode_jpeg(jpeg) for jpeg in jpegs])
        return {"image": torch.from_numpy(images).permute(0, 3, 1, 2), "label": torch.tensor(labels)}

    def _tokens(self, start: int) -> Mapping[str, Any]:
        return {"tokens": torch.from_numpy(tokens(self.path)[start : start + _PIECE].copy())}

    def _arrays(self, table: pa.Table) -> Mapping[str, Any]:
        if self.setup.case.kind == "text":
            return {"text": table["text"].to_pylist()}
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
        if not self.stacked:
            return columns
        return {"features": np.stack([columns[name] for name in NAMES], axis=1), "label": columns["label"]}

    def rows(self, batch: Mapping[str, Any]) -> np.ndarray:
        if self.setup.case.kind in ("images", "tokens", "text"):
            return row_ids(self.setup.case, batch)
        column = batch["rows"][:, -1] if self.setup.case.kind == "matrix" else batch["label"]
        return column.astype(np.int64)


class BareStacked(Bare):
    """And the 32 columns put side by side, as every loader here delivers them."""

    stacked = True


TOOLS = {"bare": Bare, "bare-stacked": BareStacked}
