"""WebDataset: tar shards, shuffled by shard and in a buffer, batched in the workers as its documentation advises."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
import webdataset

from peers_tools.base import Loader, Setup, delivered, pixels
from peers_tools.data import BATCH, SHARDS, rows_of, shards

_BUFFER = 10_000


def convert(setup: Setup, target: str) -> None:
    """A member of text, or of raw numbers, a row, in 16 shards. Images are in shards as they are."""
    if setup.case.kind == "images":
        os.symlink(setup.data(setup.case.file), target)
        return
    rows = rows_of(setup.case, setup.folder)
    os.mkdir(target)
    for shard in range(SHARDS):
        with tarfile.open(f"{target}/{shard:03}.tar", "w") as tar:
            for row in range(shard * len(rows) // SHARDS, (shard + 1) * len(rows) // SHARDS):
                content = rows[row].encode() if isinstance(rows[row], str) else rows[row].tobytes()
                member = tarfile.TarInfo(f"{row:06}.bin")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def numbers(rows: list[tuple[bytes]], dtype: Any) -> torch.Tensor:
    values = np.frombuffer(bytearray().join(row for (row,) in rows), dtype)
    return torch.from_numpy(values.reshape(len(rows), -1))


def images(rows: list[tuple[bytes, bytes]]) -> dict[str, torch.Tensor]:
    return {
        "image": torch.stack([pixels(jpeg) for jpeg, _ in rows]),
        "label": torch.tensor([int(label) for _, label in rows]),
    }


COLLATE = {
    "table": partial(numbers, dtype=np.float32),
    "tokens": partial(numbers, dtype=np.uint16),
    "text": lambda rows: [text.decode() for (text,) in rows],
    "images": images,
}


class Web(Loader):
    """It has no state: going on means reading and discarding."""

    resume_by = "skip"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        paths = list(map(str, shards(setup.converted)))
        self.data = webdataset.WebDataset(
            paths, shardshuffle=len(paths) if setup.shuffle else False, seed=setup.seed, detshuffle=setup.shuffle
        )
        if setup.shuffle:
            self.data = self.data.shuffle(_BUFFER, initial=_BUFFER, seed=setup.seed)
        members = ("jpg", "cls") if setup.case.kind == "images" else ("bin",)
        self.data = self.data.to_tuple(*members).batched(BATCH, collation_fn=COLLATE[setup.case.kind])
        workers = setup.workers
        self.loader = webdataset.WebLoader(
            self.data, batch_size=None, num_workers=workers, persistent_workers=workers > 0
        )
        self.skip = 0

    def epoch(self, number: int) -> Iterator[Mapping[str, Any]]:
        return (delivered(self.setup.case, batch) for batch in islice(iter(self.loader), self.skip, None))

    def load(self, state: Any) -> None:
        self.skip = state


TOOLS = {"webdataset": Web}
