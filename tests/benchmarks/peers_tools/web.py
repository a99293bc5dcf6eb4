"""WebDataset: tar shards, shuffled by shard and in a buffer, batched in the workers as its documentation advises."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from peers_tools.base import Loader, Setup, delivered
from peers_tools.data import BATCH, SHARDS, Case, matrix

_BUFFER = 10_000


def convert(case: Case, folder: Path) -> None:
    """A member of raw float32 a row, in 16 shards."""
    values = matrix(case)
    target = folder / "web-1"
    target.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        with tarfile.open(target / f"{shard:03}.tar", "w") as tar:
            for row in range(shard * case.rows // SHARDS, (shard + 1) * case.rows // SHARDS):
                member = tarfile.TarInfo(f"{row:06}.bin")
                member.size = values[row].nbytes
                tar.addfile(member, io.BytesIO(values[row].tobytes()))


def collate(rows: list[tuple[bytes]]) -> torch.Tensor:
    values = np.frombuffer(bytearray().join(row for (row,) in rows), np.float32)
    return torch.from_numpy(values.reshape(len(rows), -1))


class Web(Loader):
    """It has no state: going on means reading and discarding."""

    resume_by = "skip"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        shards = sorted(map(str, Path(setup.data("web-1")).glob("*.tar")))
        self.data = webdataset.WebDataset(
            shards, shardshuffle=len(shards) if setup.shuffle else False, seed=setup.seed, detshuffle=setup.shuffle
        )
        if setup.shuffle:
            self.data = self.data.shuffle(_BUFFER, initial=_BUFFER, seed=setup.seed)
        self.data = self.data.to_tuple("bin").batched(BATCH, collation_fn=collate)
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
