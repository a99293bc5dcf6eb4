"""Tokens in flat files: row `i` is a window of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ddp_stream.pool import empty
from ddp_stream.sources.base import Columns, DataError, Ints, Source, fingerprint_of
from ddp_stream.sources.cache import Arrays, cached_arrays
from ddp_stream.sources.paths import (
    describe,
    existing_files,
    expand,
    file_identity,
    has_changed,
    reading,
    suffix_by_content,
)

_SCAN_TOKENS = 8 << 20
_INTEGERS = {2: np.int16, 4: np.int32}


class Tokens(Source):
    """Windows of `sequence_length + 1` tokens, memory-mapped, as the column `tokens [rows, sequence_length + 1]`.

    The inputs are `tokens[:, :-1]`, the targets `tokens[:, 1:]`, both in the type of the file: `.long()` them on the device.
    Window `i` of a file begins at token `i * stride`, so that by default every token but the first is a target once. What
    follows the last whole window of a file is not read.

    With `end_of_document`, windows begin anew in every document (what ends with that token), and the last one of a
    document is filled up with it. `length [rows]` then says how many tokens of a window are real.

        --data.source ddp_stream.sources.Tokens --data.source.path train.bin --data.source.sequence_length 1024

    Args:
        path: a `.bin` file of nothing but tokens or a one-dimensional `.npy` file; a directory or a glob of them; or a list
        sequence_length: targets of a window
        stride: tokens from the start of a window to that of the next; None takes `sequence_length`
        end_of_document: the token that ends a document; None lets windows run across documents
        dtype: the type of the tokens in `.bin` files, little-endian

    Raises:
        DataError: no tokens, or too few for one window.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        sequence_length: int,
        stride: int | None = None,
        end_of_document: int | None = None,
        dtype: Literal["uint16", "uint32"] = "uint16",
    ) -> None:
        self.sequence_length = sequence_length
        self.stride = sequence_length if stride is None else stride
        self.end_of_document = end_of_document
        self._dtype = np.dtype(dtype).newbyteorder("<")
        if self.sequence_length < 1 or self.stride < 1:
            raise ValueError(f"sequence_length={sequence_length}, stride={stride}: each must be at least 1")
        parts = [path] if isinstance(path, str) else path
        self.paths = existing_files([file for part in parts for file in expand(part, (".bin", ".npy"))])
        self._lengths: list[int] = []
        self._opened: tuple[int, list[NDArray[Any]]] | None = None
        self._tensors: list[torch.Tensor | None] = []
        what = f"the list of documents in {describe(self.paths)}"
        if end_of_document is None:
            documents = self._whole_files()
            windows = (documents["tokens"] - 1 - sequence_length) // self.stride + 1
        else:
            kept = ("Tokens", str(self._dtype), end_of_document)
            documents = cached_arrays(self.paths, kept, what, self._find_documents)
            windows = 1 - (sequence_length + 1 - documents["tokens"]).clip(max=0) // self.stride
            windows[documents["tokens"] < 2] = 0  # no target in it
        # Here a document is what windows do not leave: a file, where there are none.
        self._file, self._start, self._tokens = documents["file"], documents["start"], documents["tokens"]
        self._first_window = np.concatenate([[0], np.cumsum(windows.clip(0))])
        if self._first_window[-1] == 0:
            raise DataError(
                f"{describe(self.paths)} has {int(self._tokens.sum())} tokens, which is too few for a window of "
                f"sequence_length + 1 = {sequence_length + 1}"
            )

    def _arrays(self) -> list[NDArray[Any]]:
        if self._opened is None or self._opened[0] != os.getpid():
            arrays = [self._map(path) for path in self.paths]
            for path, array, length in zip(self.paths, arrays, self._lengths or map(len, arrays), strict=True):
                if len(array) != length:
                    raise has_changed(path, f"it held {length} tokens and holds {len(array)}")
            self._lengths = [len(array) for array in arrays]
            self._opened = os.getpid(), arrays
            self._tensors = [_as_integers(array) for array in arrays]
        return self._opened[1]

    def _map(self, path: str) -> NDArray[Any]:
        if ".npy" not in (Path(path).suffix.lower(), suffix_by_content(path)):
            with reading(path):
                size = os.stat(path).st_size
            if size % self._dtype.itemsize:
                raise DataError(
                    f"{path} has {size} bytes, which is no multiple of the {self._dtype.itemsize} of a token in "
                    f"{self._dtype.name}: it is cut off, or its tokens are of another dtype"
                )
            return np.asarray(np.memmap(path, self._dtype, "r"))
        try:
            with reading(path):
                array = np.load(path, mmap_mode="r", allow_pickle=False)
        except DataError:
            raise
        except (ValueError, EOFError) as error:
            raise DataError(f"{path} is no .npy file of tokens ({error})") from None
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(
                f"{path} holds {array.dtype} of shape {array.shape}, and tokens are whole numbers in one dimension"
            )
        return np.asarray(array)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_tensors": []}

    def _whole_files(self) -> Arrays:
        lengths = [len(array) for array in self._arrays()]
        return {
            "file": np.arange(len(lengths)),
            "start": np.zeros(len(lengths), np.int64),
            "tokens": np.array(lengths, np.int64),
        }

    def _find_documents(self) -> Arrays:
        """File, first token and number of tokens of every document, the token that ends it included."""
        files, starts, tokens = [], [], []
        for index, array in enumerate(self._arrays()):
            found = [
                begin + np.flatnonzero(array[begin : begin + _SCAN_TOKENS] == self.end_of_document) + 1
                for begin in range(0, len(array), _SCAN_TOKENS)
            ]
            ends = np.unique(np.concatenate([*found, [len(array)]])).astype(np.int64)  # the last may lack its end
            starts.append(np.concatenate([[0], ends[:-1]]))
            tokens.append(np.diff(ends, prepend=0))
            files.append(np.full(len(ends), index))
        return {"file": np.concatenate(files), "start": np.concatenate(starts), "tokens": np.concatenate(tokens)}

    def __len__(self) -> int:
        return int(self._first_window[-1])

    @property
    def columns(self) -> tuple[str, ...]:
        return ("tokens",) if self.end_of_document is None else ("tokens", "length")

    def take(self, rows: Ints) -> Columns:
        document = np.searchsorted(self._first_window, rows, side="right") - 1
        within = (rows - self._first_window[document]) * self.stride
        start = self._start[document] + within
        file = self._file[document]
        width = self.sequence_length + 1
        length = (self._tokens[document] - within).clip(max=width)
        arrays = self._arrays()
        if len(arrays) == 1 and self.end_of_document is None:
            return {"tokens": self._windows(0, start)}
        tokens = np.full((len(rows), width), self.end_of_document or 0, arrays[0].dtype)
        for index in np.unique(file).tolist():
            array = arrays[index]
            here = file == index
            inside = np.flatnonzero(here & (start + width <= len(array)))
            if len(inside):
                tokens[inside] = self._windows(index, start[inside])
            for row in np.flatnonzero(here & (start + width > len(array))).tolist():
                tokens[row, : length[row]] = array[start[row] : start[row] + length[row]]
        if self.end_of_document is None:
            return {"tokens": tokens}
        short = np.flatnonzero(length < width)
        tokens[short] = np.where(np.arange(width) < length[short, None], tokens[short], self.end_of_document)
        return {"tokens": tokens, "length": length}

    def _windows(self, file: int, start: Ints) -> NDArray[Any]:
        """The windows that begin at `start [n]`, all inside of `file`: `[n, sequence_length + 1]`."""
        array, tensor, width = self._arrays()[file], self._tensors[file], self.sequence_length + 1
        if tensor is None:
            return sliding_window_view(array, width)[start]
        out = empty((len(start), width), array.dtype)
        windows = tensor.as_strided((len(array) - width + 1, width), (1, 1))
        torch.index_select(
            windows, 0, torch.from_numpy(start), out=torch.from_numpy(out.view(_INTEGERS[array.itemsize]))
        )
        return out

    def fingerprint(self) -> str:
        files = [file_identity(path) for path in self.paths]
        how = (self.sequence_length, self.stride, self.end_of_document, str(self._dtype))
        return fingerprint_of("Tokens", files, *how)

    def __str__(self) -> str:
        return describe(self.paths)


def _as_integers(array: NDArray[Any]) -> torch.Tensor | None:
    """The tokens as a tensor of their size, from which torch gathers windows quicker than NumPy; None if it cannot."""
    if array.itemsize not in _INTEGERS or not array.dtype.isnative or not array.flags.c_contiguous or not len(array):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array.view(_INTEGERS[array.itemsize]))
