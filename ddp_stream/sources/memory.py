"""Rows that are in memory already, rows that are computed, and rows of somebody else's Dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset, default_collate

from ddp_stream.order import mix, mix_array
from ddp_stream.pool import empty, empty_tensor
from ddp_stream.sources.base import Column, Columns, DataError, Ints, Source, check_columns, fingerprint_of
from ddp_stream.texts import Texts


class InMemory(Source):
    """Columns in memory: tensors, arrays or lists of equal length.

    Raises:
        DataError: the columns differ in length, or there are none.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"columns in memory must be of one length, at least one column; got {lengths}")
        self._columns = dict(columns)
        self._rows = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._rows

    def take(self, rows: Ints) -> Columns:
        return {name: gather(column, rows) for name, column in self._columns.items()}

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._columns)

    def select(self, columns: Sequence[str]) -> Source:
        check_columns(columns, self.columns, str(self))
        return InMemory({name: self._columns[name] for name in columns})


def gather(column: Column, rows: Ints) -> Column:
    """Values of `column` at `rows`, which are within it.

    Raises:
        IndexError: a row is not within it.
    """
    if isinstance(column, torch.Tensor):
        out = empty_tensor((len(rows), *column.shape[1:]), column.dtype)
        return torch.index_select(column.detach(), 0, torch.from_numpy(rows), out=out)
    if isinstance(column, list):
        return [column[row] for row in rows.tolist()]
    if isinstance(column, Texts):
        return column.take(rows)
    if len(rows) and not (rows.min() >= 0 and rows.max() < len(column)):
        raise IndexError(f"rows {rows.min()} to {rows.max()} of a column of {len(column)}")
    if not (column.flags.c_contiguous and column.flags.aligned):
        return np.ascontiguousarray(column[rows])  # numpy.take would copy the whole column first
    # The mode is that which does not take the result through a buffer; after the check above nothing is clipped.
    return np.take(column, rows, axis=0, out=empty((len(rows), *column.shape[1:]), column.dtype), mode="clip")


class SyntheticRegression(Source):
    """Standard normal features and their sum: `features [rows, n_features]` and `label [rows, 1]`, float32.

    Every value is a function of `(seed, row)` alone, by a counter-based hash and the Box-Muller transform, so all
    machines and all readers see the same rows.

    Args:
        total_samples: number of rows
        n_features: features in a row
        seed: another seed, other rows
    """

    def __init__(self, total_samples: int, n_features: int = 4, seed: int = 42) -> None:
        if total_samples < 0 or n_features < 1:
            raise ValueError(
                f"SyntheticRegression(total_samples={total_samples}, n_features={n_features}): needs at least 0 rows "
                f"and 1 feature"
            )
        self.total_samples = total_samples
        self.n_features = n_features
        self.seed = seed

    def __len__(self) -> int:
        return self.total_samples

    def take(self, rows: Ints) -> Columns:
        pairs = -(-self.n_features // 2)
        columns = np.arange(2 * pairs, dtype=np.uint64)
        counter: NDArray[np.uint64] = np.add.outer(rows.astype(np.uint64) * np.uint64(2 * pairs), columns)
        words = mix_array(counter ^ np.uint64(mix(self.seed)))
        uniform = (words >> np.uint64(11)).astype(np.float64) + 0.5
        uniform *= 2.0**-53
        radius = np.sqrt(-2.0 * np.log(uniform[:, :pairs]))
        angle = 2.0 * np.pi * uniform[:, pairs:]
        normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        features = normal[:, : self.n_features].astype(np.float32)
        label: NDArray[np.float32] = features.sum(axis=1, dtype=np.float64).astype(np.float32)[:, None]
        return {"features": torch.from_numpy(features), "label": torch.from_numpy(label)}

    @property
    def columns(self) -> tuple[str, ...]:
        return ("features", "label")

    def fingerprint(self) -> str:
        return fingerprint_of("SyntheticRegression", self.total_samples, self.n_features, self.seed)

    def sample(self, columns: Columns, index: int) -> tuple[Any, Any]:
        return columns["features"][index], columns["label"][index]


class TorchDataset(Source):
    """Any map-style torch `Dataset`: `__len__`, and `__getitem__` or `__getitems__`.

    Samples are collated by torch's `default_collate`. A sample that is a dict gives its keys as columns, a tuple
    gives columns named "0", "1", ..., and anything else one column, "0".
    """

    def __init__(self, dataset: Dataset) -> None:  # type: ignore[type-arg]  # so that the command line can make one
        random_access = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
        if not hasattr(dataset, "__len__") or not random_access:
            raise DataError(
                f"{type(dataset).__name__} is a stream, or has no __len__ or no __getitem__: only a map-style Dataset has "
                f"rows that can be dealt to ranks by their ids"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, rows: Ints) -> Columns:
        ids = rows.tolist()
        fetch = getattr(self.dataset, "__getitems__", None)
        return collate(fetch(ids) if fetch is not None else [self.dataset[row] for row in ids])


def collate(samples: list[Any]) -> Columns:
    """Columns of samples by torch's `default_collate`; those of a tuple are "0", "1", ..., that of a value is "0"."""
    if not samples:
        return {}
    if isinstance(samples[0], Mapping):
        return dict(default_collate(samples))
    columns = default_collate(samples)
    if not isinstance(samples[0], (tuple, list)):
        columns = [columns]
    return {str(index): column for index, column in enumerate(columns)}
