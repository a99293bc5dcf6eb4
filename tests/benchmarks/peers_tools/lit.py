"""LitData on chunks written by `optimize`, in a local directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import litdata
import torch

from peers_tools.base import Loader, Setup, delivered
from peers_tools.data import BATCH, Case, matrix


class TableRow:
    """Row `index` as a sample."""

    def __init__(self, case: Case) -> None:
        self.values = torch.from_numpy(matrix(case))

    def __call__(self, index: int) -> torch.Tensor:
        return self.values[index].clone()


def convert(case: Case, folder: Path) -> None:
    litdata.optimize(
        fn=TableRow(case),
        inputs=list(range(case.rows)),
        output_dir=str(folder / "litdata-1"),
        chunk_bytes="4MB",
        num_workers=1,
        start_method="fork",
        verbose=False,
    )


class Lit(Loader):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.data = litdata.StreamingDataset(
            setup.data("litdata-1"),
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
