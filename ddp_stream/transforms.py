"""Transforms: functions of a dict of columns, applied in the workers to many rows at once."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ddp_stream.batch import as_tensor
from ddp_stream.pool import empty, empty_tensor
from ddp_stream.sources.base import Column, Columns, DataError
from ddp_stream.sources.interleaved import rows_of


class DecodeImages:
    """Encoded images (JPEG, PNG, or whatever Pillow reads) to pixels `[rows, height, width, channels]`, uint8.

    Without a `size` all images must be of one. Needs the extra `images`.

        --data.transform ddp_stream.transforms.DecodeImages --data.transform.column jpg --data.transform.size "[64, 64]"

    Args:
        column: the column of bytes, which the pixels replace
        size: height and width to resize to; None leaves images as they are
        mode: `RGB` (3 channels), `L` (1, grey) or `RGBA` (4)
    """

    def __init__(
        self, column: str = "image", size: tuple[int, int] | None = None, mode: Literal["RGB", "L", "RGBA"] = "RGB"
    ) -> None:
        self.column = column
        self.size = size
        self.mode = mode

    def __call__(self, columns: Columns) -> Columns:
        if self.column not in columns:
            raise DataError(f"there is no column {self.column!r} to decode; there are: {', '.join(columns)}")
        encoded = columns[self.column]
        channels = len(self.mode)
        pixels = empty((len(encoded), *(self.size or (0, 0)), channels), np.uint8)
        for index, content in enumerate(encoded):
            image = self._decode(content, index)
            if index == 0 and self.size is None:
                pixels = empty((len(encoded), *image.shape[:2], channels), np.uint8)
            if image.shape[:2] != pixels.shape[1:3]:
                raise DataError(
                    f"column {self.column!r} has images of {pixels.shape[1]}x{pixels.shape[2]} and of "
                    f"{image.shape[0]}x{image.shape[1]} pixels, which do not fit one tensor: choose one size for all, as in "
                    f"--data.transform.size '[{pixels.shape[1]}, {pixels.shape[2]}]'"
                )
            pixels[index] = image.reshape(pixels.shape[1:])
        return {**columns, self.column: torch.from_numpy(pixels)}

    def _decode(self, content: Any, index: int) -> Any:
        try:
            from PIL import Image
        except ImportError:
            raise ImportError("decoding images needs Pillow: pip install 'ddp_stream[images]'") from None
        try:
            if self.size is None and self.mode == "RGB" and bytes(content[:2]) == b"\xff\xd8":
                with contextlib.suppress(ImportError, ValueError):  # damaged ones Pillow reads all the same, or says so
                    return _decode_jpeg(content)
            image: Any = Image.open(io.BytesIO(content))
            if self.size is not None:
                height, width = self.size
                image.draft(self.mode, (width, height))  # a JPEG is decoded no larger than needed
            if image.mode != self.mode:
                image = image.convert(self.mode)
            if self.size is not None and image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            return np.asarray(image)
        except Exception as error:  # Pillow raises whatever its codecs do
            shown = "None" if content is None else f"{len(content)} bytes, beginning with {bytes(content[:8])!r}"
            raise DataError(f"column {self.column!r}: an image cannot be decoded ({error}); it is {shown}") from None


def _decode_jpeg(content: Any) -> Any:
    """The same library inside and the same pixels as Pillow's, in a fifth of the time for small images.

    Raises:
        ImportError: simplejpeg is not installed.
        ValueError: it is damaged, or of a kind that Pillow turns into RGB in a way of its own.
    """
    import simplejpeg

    if simplejpeg.decode_jpeg_header(content)[2] not in ("YCbCr", "Gray"):
        raise ValueError
    return simplejpeg.decode_jpeg(content, "RGB")


def side_by_side(columns: Sequence[Column]) -> torch.Tensor:
    """Columns of numbers `[rows]` or `[rows, ...]` as one tensor `[rows, n]`, float32, which may share their memory."""
    neighbours = rows_of(columns)
    if neighbours is not None:
        columns = [neighbours]
    parts: list[torch.Tensor] = [as_tensor(column) for column in columns]
    parts = [part.flatten(1) if part.dim() > 1 else part.unsqueeze(1) for part in parts]
    if len(parts) == 1 and parts[0].dtype == torch.float32 and parts[0].is_contiguous():
        return parts[0]
    out = empty_tensor((len(parts[0]), sum(part.shape[1] for part in parts)), torch.float32)
    start = 0
    for part in parts:
        out[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    return out


def per_row(function: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Callable[[Columns], Columns]:
    """A transform from a function of one row, a dict of values, to a dict of values.

        @per_row
        def transform(row):
            return {"tokens": torch.tensor(row["text"].encode()[:64]), "label": row["label"]}

    Numbers, arrays and tensors of one shape are stacked to tensors `[rows, ...]`; all else becomes lists. It is slower
    than a function of whole columns.
    """

    @functools.wraps(function)
    def transform(columns: Columns) -> Columns:
        values = {name: as_tensor(column) for name, column in columns.items()}
        count = len(next(iter(values.values()))) if values else 0
        rows = [function({name: column[index] for name, column in values.items()}) for index in range(count)]
        if not rows:
            return {}
        for row in rows:
            if row.keys() != rows[0].keys():
                raise DataError(
                    f"a function of rows returned {sorted(row)} for one row and {sorted(rows[0])} for another: every row "
                    f"needs the same columns"
                )
        return {name: _stack([row[name] for row in rows]) for name in rows[0]}

    return transform


def _stack(values: list[Any]) -> Column:
    first = values[0]
    if isinstance(first, torch.Tensor):
        same = all(isinstance(value, torch.Tensor) and value.shape == first.shape for value in values)
        return torch.stack(values) if same else values
    if isinstance(first, np.ndarray):
        same = all(isinstance(value, np.ndarray) and value.shape == first.shape for value in values)
        return np.stack(values) if same else values
    if isinstance(first, (bool, int, float, np.generic)):
        return torch.tensor(values)
    return values
