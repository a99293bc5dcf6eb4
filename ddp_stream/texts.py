"""Columns of strings or bytes as they are in files: one run of bytes, and Python objects only where they are looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

TEXT_TYPES = {pa.string(): np.int32, pa.binary(): np.int32, pa.large_string(): np.int64, pa.large_binary(): np.int64}
"""What a Texts may hold, and the type of its offsets."""


class Texts(Sequence[Any]):
    """Strings or bytes (None for a null) in an Arrow array; a slice is a view.

    Args:
        array: of type string, large_string, binary or large_binary
    """

    def __init__(self, array: pa.Array) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: Any) -> Any:
        return Texts(self.array[index]) if isinstance(index, slice) else self.array[index].as_py()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.tolist() == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list's

    def __repr__(self) -> str:
        return repr(self.tolist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.tolist(), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return int(self.array.nbytes)

    def tolist(self) -> list[Any]:
        """All of them as Python objects."""
        return list(self.array.to_pylist())

    def take(self, rows: NDArray[np.int64]) -> Texts:
        """Those at `rows [n]`."""
        return Texts(self.array.take(pa.array(rows)))

    def pieces(self) -> tuple[pa.DataType, torch.Tensor, torch.Tensor] | None:
        """Type, where each one ends and the next begins `[n + 1]`, and their bytes; None if there is a null."""
        array, dtype = self.array, TEXT_TYPES[self.array.type]
        if array.null_count:
            return None
        _, ends, data = array.buffers()
        offsets = np.zeros(len(array) + 1, dtype)
        if ends is not None:
            offsets[:] = np.frombuffer(ends, dtype)[array.offset : array.offset + len(array) + 1]
        first, last = offsets[[0, -1]].tolist()
        offsets -= first
        inside = torch.zeros(0, dtype=torch.uint8)
        if last > first:
            inside = torch.frombuffer(data, dtype=torch.uint8, offset=first, count=last - first)
        return array.type, torch.from_numpy(offsets), inside

    @staticmethod
    def joined(kind: pa.DataType, offsets: torch.Tensor, data: torch.Tensor) -> Texts:
        """The inverse of `pieces`, which keeps the memory of both tensors in use."""
        buffers = [None, pa.py_buffer(offsets.numpy()), pa.py_buffer(data.numpy())]
        return Texts(pa.Array.from_buffers(kind, len(offsets) - 1, buffers))


def end_to_end(parts: Sequence[Texts]) -> Texts | list[Any]:
    """One after the other; a list where they are too much for one array (2 GiB of strings)."""
    try:
        return Texts(pa.concat_arrays([part.array for part in parts]))
    except pa.ArrowInvalid:
        return [text for part in parts for text in part.tolist()]


def as_texts(column: list[Any]) -> Texts | None:
    """A list that holds nothing but strings, or nothing but bytes; None if it holds anything else."""
    if not column or type(column[0]) not in (str, bytes):
        return None
    try:
        array = pa.array(column, pa.string() if isinstance(column[0], str) else pa.binary())
    except (pa.ArrowException, TypeError, UnicodeError):
        return None
    if isinstance(array, pa.ChunkedArray) or set(map(type, column)) != {type(column[0])}:
        return None
    return Texts(array)


def as_lists(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns as functions expect them: strings in plain lists."""
    return {name: column.tolist() if isinstance(column, Texts) else column for name, column in columns.items()}
