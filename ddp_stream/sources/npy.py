"""NumPy files, memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddp_stream.sources.base import Columns, DataError, Ints, Source, fingerprint_of
from ddp_stream.sources.files import describe, file_identity

_COLUMN = "features"


class Npy(Source):
    """One `.npy` file, or several laid end to end, along their first axis.

    A plain array is the column `features [rows, ...]`; a structured array has its fields as columns.

    Args:
        paths: the files, in order
    """

    def __init__(self, paths: str | Sequence[str]) -> None:
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        self._arrays: tuple[int, list[NDArray[Any]]] | None = None
        arrays = self._open()
        first = arrays[0]
        for path, array in zip(self.paths, arrays, strict=True):
            if array.dtype != first.dtype or array.shape[1:] != first.shape[1:]:
                raise DataError(
                    f"{path} holds {array.dtype} rows of shape {array.shape[1:]}, but {self.paths[0]} holds "
                    f"{first.dtype} rows of shape {first.shape[1:]}: files of one dataset must agree"
                )
        self._offsets = np.cumsum([0] + [len(array) for array in arrays])
        self._names = first.dtype.names

    def _open(self) -> list[NDArray[Any]]:
        if self._arrays is None or self._arrays[0] != os.getpid():
            arrays = []
            for path in self.paths:
                if not Path(path).is_file():
                    raise DataError(f"{path} is not there, or is no file")
                try:
                    array = np.load(path, mmap_mode="r", allow_pickle=False)
                except (ValueError, EOFError, OSError) as error:
                    raise DataError(f"{path} is no .npy file of fixed-size values ({error})") from None
                if not isinstance(array, np.ndarray):
                    raise DataError(f"{path} is no .npy file but an archive of several arrays (.npz)")
                if array.ndim == 0 or len(array) == 0:
                    raise DataError(f"{path} has no rows: its shape is {array.shape}")
                arrays.append(array)
            self._arrays = (os.getpid(), arrays)
        return self._arrays[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_arrays": None}

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def take(self, rows: Ints) -> Columns:
        arrays = self._open()
        if len(arrays) == 1:
            values = arrays[0].take(rows, axis=0)
        else:
            values = np.empty((len(rows), *arrays[0].shape[1:]), arrays[0].dtype)
            file = np.searchsorted(self._offsets, rows, side="right") - 1
            for index in np.unique(file).tolist():
                here = np.flatnonzero(file == index)
                values[here] = arrays[index].take(rows[here] - self._offsets[index], axis=0)
        if self._names is None:
            return {_COLUMN: values}
        return {name: np.ascontiguousarray(values[name]) for name in self._names}

    @property
    def columns(self) -> tuple[str, ...]:
        return self._names or (_COLUMN,)

    def fingerprint(self) -> str:
        return fingerprint_of("Npy", [file_identity(path) for path in self.paths])

    def __str__(self) -> str:
        return describe(self.paths)
