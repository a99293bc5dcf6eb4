"""What every compared loader is to the benchmark: an epoch of batches, and a state to go on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peers_tools.data import BATCH, IMAGE, WINDOW, Case


@dataclass(frozen=True)
class Setup:
    """One arrangement to measure."""

    tool: str
    case: Case
    folder: Path
    workers: int
    shuffle: bool
    seed: int = 0

    def data(self, name: str) -> str:
        """The file or directory of the case's data with that name."""
        return str(self.folder / name)

    @property
    def converted(self) -> str:
        """Where the rows are in the tool's own format."""
        return self.data(f"{self.tool}-{self.case.name}")


class Loader:
    """A loader under measurement. Subclasses are made with a Setup, which is the moment the clock starts."""

    resume_by = "state"
    """How it goes on in the middle of an epoch: `state`, `skip` (reads and discards), or None if it has no way."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def epoch(self, number: int) -> Iterator[Mapping[str, Any]]:
        """The batches of an epoch, dicts of columns."""
        raise NotImplementedError

    def state(self, taken: int) -> Any:
        """The position behind the `taken` batches that this epoch has delivered; pickled for another process."""
        return taken

    def load(self, state: Any) -> None:
        """Go on from `state` in the next call of `epoch(0)`."""
        raise NotImplementedError

    def rows(self, batch: Mapping[str, Any]) -> np.ndarray:
        """Ids of the delivered rows, read off the delivered values: every row of the data carries its own."""
        return row_ids(self.setup.case, batch)


def delivered(case: Case, values: Any) -> dict[str, Any]:
    """A batch as the case's columns: views, no copy. One tensor a row, `[rows, 33]`, is the quickest for every peer."""
    if case.kind == "table":
        return {"features": values[:, :-1], "label": values[:, -1]}
    return values if case.kind == "images" else {{"matrix": "rows"}.get(case.kind, case.kind): values}


def pixels(jpeg: bytes) -> torch.Tensor:
    """`[3, 64, 64]` uint8, by torchvision: on small images twice as quick as Pillow, which the peers take by themselves."""
    from torchvision.io import decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8))


def row_ids(case: Case, batch: Mapping[str, Any]) -> np.ndarray:
    """The row ids that the values of a batch carry."""
    if case.kind == "text":
        return np.array([int(text[: text.index(" ")]) for text in batch["text"]], np.int64)
    if case.kind == "tokens":
        return batch["tokens"][:, 0].numpy().astype(np.int64)
    column = batch["rows"][:, -1] if case.kind == "matrix" else batch["label"]
    return column.numpy().astype(np.int64)


def check_batch(case: Case, batch: Mapping[str, Any]) -> None:
    """Raises ValueError unless a full batch holds what all loaders must deliver, in the same types."""
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "table": {"features": ((BATCH, 32), torch.float32)},
        "matrix": {"rows": ((BATCH, 33), torch.float32)},
        "images": {"image": ((BATCH, 3, IMAGE, IMAGE), torch.uint8)},
        "tokens": {},
        "text": {},
    }[case.kind]
    for name, (shape, dtype) in expected.items():
        value = batch[name]
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
            raise ValueError(f"{name} is {type(value)} {getattr(value, 'shape', '')} {getattr(value, 'dtype', '')}")
    if case.kind == "tokens" and (tuple(batch["tokens"].shape) != (BATCH, WINDOW)):
        raise ValueError(f"tokens are {batch['tokens'].shape}")
    if case.kind == "text" and not (len(batch["text"]) == BATCH and isinstance(batch["text"][0], str)):
        raise ValueError(f"text is {type(batch['text'])}")
