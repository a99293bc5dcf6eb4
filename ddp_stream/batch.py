"""What the training loop receives: the rows of one step that one rank works on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddp_stream.texts import Texts


class Batch(Mapping[str, Any]):
    """The columns of one rank's share of a global batch, and what is known about its rows.

    `batch["name"]` is a tensor `[rows, ...]`, or a list of length `rows` for what no tensor holds. Columns are views
    of a larger message, and are cut when they are asked for: whoever keeps one for long should keep a copy of it.

    Attributes:
        weight: `[rows]` float32, 1 for a row and 0 for an empty slot that repeats a row to keep the shape
        rows: `[rows]` int64 row ids; they stay on the host, where the proof counts them
        epoch: the epoch, from 0
        step: steps of this size in the epoch before this one
        offset: rows taken from every lane before this step, which is the loader's position
        global_rows: rows with weight 1 in this step over all ranks: what a loss is divided by
    """

    def __init__(
        self,
        columns: Mapping[str, Any],
        *,
        weight: torch.Tensor,
        rows: torch.Tensor,
        epoch: int = 0,
        step: int = 0,
        offset: int = 0,
        global_rows: int | None = None,
        filled: torch.Tensor | None = None,
        span: slice | None = None,
    ) -> None:
        self._columns = columns
        self._span = span
        self.weight = weight
        self.rows = rows
        self.epoch = epoch
        self.step = step
        self.offset = offset
        if global_rows is None:  # made by hand, not by a loader
            filled = weight.cpu() > 0
            global_rows = int(filled.sum())
        self.global_rows = global_rows
        self._filled = filled  # [rows] bool on the host; None if no slot is empty

    def __getitem__(self, name: str) -> Any:
        column = self._columns[name]
        return column if self._span is None else cut(column, self._span)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        return (
            f"Batch(columns={list(self._columns)}, rows={len(self.rows)} of {self.global_rows}, epoch={self.epoch}, "
            f"step={self.step})"
        )

    @property
    def trained_rows(self) -> torch.Tensor:
        """Ids of the rows with weight 1, on the host: what the proof counts."""
        return self.rows if self._filled is None else self.rows[self._filled]

    def _with(self, columns: Mapping[str, Any], weight: torch.Tensor, part: slice = slice(None)) -> Batch:
        return Batch(
            columns,
            weight=weight,
            rows=self.rows[part],
            filled=None if self._filled is None else self._filled[part],
            epoch=self.epoch,
            step=self.step,
            offset=self.offset,
            global_rows=self.global_rows,
        )

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """A batch whose columns and weight are on `device`; `rows` stays on the host."""
        columns = {name: move(column, device, non_blocking) for name, column in self.items()}
        return self._with(columns, self.weight.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A batch whose columns and weight are in page-locked memory, from which copies do not block."""
        return self._with({name: pin(column) for name, column in self.items()}, self.weight.pin_memory())

    def split(self, size: int | None) -> list[Batch]:
        """Micro-batches of at most `size` rows; `global_rows` remains that of the whole step."""
        count = len(self.rows)
        if size is None or size >= count:
            return [self]
        parts = [slice(start, start + size) for start in range(0, count, size)]
        return [
            self._with({name: cut(column, part) for name, column in self.items()}, self.weight[part], part)
            for part in parts
        ]


def cut(value: Any, part: slice) -> Any:
    """Rows `part` of a column; a column may be a mapping or a tuple of columns."""
    if isinstance(value, Texts):
        return value[part].tolist()
    if isinstance(value, (torch.Tensor, list)):
        return value[part]
    if isinstance(value, (Mapping, tuple)):
        return _map(value, lambda item: cut(item, part))
    return value[part]


def move(value: Any, device: torch.device | str, non_blocking: bool = True) -> Any:
    """`value` with every tensor in it (in mappings, lists, tuples, named tuples, or anything with `to`) on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=non_blocking)
    if hasattr(value, "to"):
        return value.to(device, non_blocking=non_blocking)
    return _map(value, lambda item: move(item, device, non_blocking))


def pin(value: Any) -> Any:
    """`value` with every tensor in it in page-locked memory."""
    if isinstance(value, torch.Tensor):
        # Of a column in a wide table, all that lies between its values would be pinned, too.
        return value.contiguous().pin_memory()
    if isinstance(value, Batch):
        return value.pin_memory()
    return _map(value, pin)


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: function(item) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(function(item) for item in value))
    if isinstance(value, tuple):
        return tuple(function(item) for item in value)
    if isinstance(value, list):
        # A list of strings is a column of its own; looking at its first item tells, without a loop over the rows.
        return (
            [function(item) for item in value]
            if value and not isinstance(value[0], (str, bytes, int, float))
            else value
        )
    return value


def as_tensor(column: Any) -> Any:
    """An array as a tensor that shares its memory; anything else as it is."""
    if isinstance(column, np.ndarray) and column.dtype.kind in "biufc":
        return torch.from_numpy(_native(column))
    if isinstance(column, np.ndarray) and column.dtype.kind in "mM":
        return torch.from_numpy(_native(column.view(np.int64)))
    if isinstance(column, np.ndarray):
        return column.tolist()
    return _map(column, as_tensor) if isinstance(column, (Mapping, tuple)) else column


def _native(array: NDArray[Any]) -> NDArray[Any]:
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array if array.flags.writeable else array.copy()
