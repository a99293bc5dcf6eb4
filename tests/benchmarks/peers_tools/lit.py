"""LitData on chunks written by `optimize`, in a local directory."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import litdata
import torch
from PIL import Image

from peers_tools.base import Loader, Setup, delivered
from peers_tools.data import BATCH, WINDOW, rows_of


class Row:
    """Row `index` as a sample."""

    def __init__(self, setup: Setup) -> None:
        self.rows = rows_of(setup.case, setup.folder)

    def __call__(self, index: int) -> Any:
        row = self.rows[index]
        if isinstance(row, tuple):
            return {"image": Image.open(io.BytesIO(row[0])), "label": row[1]}
        return row if isinstance(row, str) else torch.from_numpy(row).clone()


def loader_of(setup: Setup) -> Any:
    return litdata.TokensLoader(block_size=WINDOW) if setup.case.kind == "tokens" else None


def convert(setup: Setup, target: str) -> None:
    litdata.optimize(
        fn=Row(setup),
        inputs=list(range(setup.case.rows)),
        output_dir=target,
        chunk_bytes="4MB",
        item_loader=loader_of(setup),
        num_workers=1,
        start_method="fork",
        verbose=False,
    )


class Lit(Loader):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.data = litdata.StreamingDataset(
            setup.converted,
            item_loader=loader_of(setup),
            shuffle=setup.shuffle,
            seed=setup.seed,
            drop_last=False,
            batch_decode=0,  # the default decodes 32 neighbours for every row that the shuffle asks for
        )
        workers = setup.workers
        self.loader = litdata.StreamingDataLoader(
            self.data, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0
        )

    def epoch(self, number: int) -> Iterator[Mapping[str, Any]]:
        return (delivered(self.setup.case, batch) for batch in self.loader)

    def state(self, taken: int) -> Any:
        return self.loader.state_dict()

    def load(self, state: Any) -> None:
        self.loader.load_state_dict(state)


TOOLS = {"litdata": Lit}
