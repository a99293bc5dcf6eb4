"""Many narrow columns of one type, kept row by row, so that to gather a row is one copy and not one for every column."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ddp_stream.pool import empty

_FEWEST = 8  # columns of a type for which it pays


def interleave(columns: Mapping[str, Any]) -> dict[Any, Any]:
    """Columns of one type `[rows]` in one array `[rows, columns]` under the tuple of their names; others as they are."""
    alike: dict[Any, list[str]] = defaultdict(list)
    for name, values in columns.items():
        if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iuf":
            alike[values.dtype].append(name)
    kept: dict[Any, Any] = dict(columns)
    for dtype, names in alike.items():
        if len(names) >= _FEWEST:
            rows = empty((len(columns[names[0]]), len(names)), dtype)
            for index, name in enumerate(names):
                rows[:, index] = kept.pop(name)
            kept[tuple(names)] = rows
    return kept


def separate(kept: Mapping[Any, Any], names: Sequence[str]) -> dict[str, Any]:
    """The inverse, whose columns are views: the columns in the order of `names`."""
    columns: dict[str, Any] = {}
    for key, values in kept.items():
        if isinstance(key, tuple):
            columns.update((name, values[:, index]) for index, name in enumerate(key))
        else:
            columns[key] = values
    return {name: columns[name] for name in names}


def rows_of(columns: Sequence[Any]) -> NDArray[Any] | None:
    """`columns` as one view `[rows, columns]`, if they are neighbours in an array that `separate` took apart."""
    first = columns[0]
    if len(columns) < 2 or not isinstance(first, np.ndarray) or first.ndim != 1 or first.base is None:
        return None
    start = first.ctypes.data
    for index, column in enumerate(columns):
        same = isinstance(column, np.ndarray) and column.base is first.base and column.dtype == first.dtype
        if not (same and column.shape == first.shape and column.strides == first.strides):
            return None
        if column.ctypes.data != start + index * first.itemsize:
            return None
    return as_strided(first, (len(first), len(columns)), (first.strides[0], first.itemsize))
