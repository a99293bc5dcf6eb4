"""MosaicML Streaming on MDS shards in a local directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from peers_tools.base import Loader, Setup, delivered
from peers_tools.data import BATCH, FEATURES, Case, matrix


def convert(case: Case, folder: Path) -> None:
    columns = {"row": f"ndarray:float32:{FEATURES + 1}"}
    with MDSWriter(out=str(folder / "mosaic-1"), columns=columns) as writer:
        for row in matrix(case):
            writer.write({"row": row})


class Mosaic(Loader):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        clean_stale_shared_memory()
        data = StreamingDataset(
            local=setup.data("mosaic-1"), shuffle=setup.shuffle, shuffle_seed=setup.seed, batch_size=BATCH
        )
        workers = setup.workers
        self.loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)

    def epoch(self, number: int) -> Iterator[Mapping[str, Any]]:
        return (delivered(self.setup.case, batch["row"]) for batch in self.loader)

    def state(self, taken: int) -> Any:
        return self.loader.state_dict()

    def load(self, state: Any) -> None:
        self.loader.load_state_dict(state)


TOOLS = {"mosaic": Mosaic}
