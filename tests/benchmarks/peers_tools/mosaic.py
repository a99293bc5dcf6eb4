"""MosaicML Streaming on MDS shards in a local directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from peers_tools.base import Loader, Setup, delivered, pixels
from peers_tools.data import BATCH, FEATURES, WINDOW, rows_of

COLUMNS = {
    "table": {"row": f"ndarray:float32:{FEATURES + 1}"},
    "images": {"image": "bytes", "label": "int"},
    "tokens": {"row": f"ndarray:uint16:{WINDOW}"},
    "text": {"row": "str"},
}


def convert(setup: Setup, target: str) -> None:
    columns = COLUMNS[setup.case.kind]
    with MDSWriter(out=target, columns=columns) as writer:
        for row in rows_of(setup.case, setup.folder):
            writer.write(dict(zip(columns, row if setup.case.kind == "images" else [row], strict=True)))


class Decoded(StreamingDataset):
    def __getitem__(self, row: int) -> Any:
        found = super().__getitem__(row)
        return {**found, "image": pixels(found["image"])}


class Mosaic(Loader):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        clean_stale_shared_memory()
        kind = Decoded if setup.case.kind == "images" else StreamingDataset
        data = kind(local=setup.converted, shuffle=setup.shuffle, shuffle_seed=setup.seed, batch_size=BATCH)
        workers = setup.workers
        self.loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)

    def epoch(self, number: int) -> Iterator[Mapping[str, Any]]:
        return (delivered(self.setup.case, batch.get("row", batch)) for batch in self.loader)

    def state(self, taken: int) -> Any:
        return self.loader.state_dict()

    def load(self, state: Any) -> None:
        self.loader.load_state_dict(state)


TOOLS = {"mosaic": Mosaic}
