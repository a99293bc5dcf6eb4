"""ddp_stream.StreamLoader on the file as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ddp_stream import StreamLoader
from ddp_stream.sources import Tokens, decoded, open_source
from ddp_stream.transforms import DecodeImages, side_by_side
from peers_tools.base import Loader, Setup, row_ids
from peers_tools.data import BATCH, NAMES, WINDOW, shards

# The files here are small enough that all their decoded blocks would fit the cache, and later epochs would read from
# memory. Real ones do not, so every epoch is made to decode every block.
if not hasattr(decoded, "CACHE_BYTES"):
    raise RuntimeError("ddp_stream.sources.decoded.CACHE_BYTES is gone: find out what later epochs read, and mend this")
decoded.CACHE_BYTES = 0


def stack(columns: Mapping[str, Any]) -> dict[str, Any]:
    """32 columns in one."""
    return {"features": side_by_side([columns[name] for name in NAMES]), "label": columns["label"]}


decode = DecodeImages("jpg")


def image(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Channels before rows and columns of pixels, as every loader here delivers them: a view."""
    return {"image": decode(columns)["jpg"].permute(0, 3, 1, 2), "label": torch.tensor([*map(int, columns["cls"])])}


def source_of(setup: Setup) -> Any:
    path = setup.data(setup.case.file)
    if setup.case.kind == "tokens":  # windows side by side
        return Tokens(path, sequence_length=WINDOW - 1, stride=WINDOW)
    if setup.case.kind == "images":
        return open_source([*map(str, shards(path))]).select(["jpg", "cls"])
    return open_source(path)


class Ours(Loader):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        source = source_of(setup)
        self.loader = StreamLoader(
            source,
            BATCH,
            shuffle=setup.shuffle,
            seed=setup.seed,
            num_workers=setup.workers,
            transform={"table": stack, "images": image}.get(setup.case.kind),
        )

    def epoch(self, number: int) -> Iterator[Mapping[str, Any]]:
        self.loader.set_epoch(number)
        if self.setup.case.kind != "matrix":
            return iter(self.loader)
        return ({"rows": batch["features"], "batch": batch} for batch in self.loader)

    def state(self, taken: int) -> Any:
        return self.loader.state_dict()

    def load(self, state: Any) -> None:
        self.loader.load_state_dict(state)

    def rows(self, batch: Mapping[str, Any]) -> np.ndarray:
        weight = (batch["batch"] if self.setup.case.kind == "matrix" else batch).weight
        return row_ids(self.setup.case, batch)[weight.numpy() > 0]  # the last batch may repeat a row with weight 0


TOOLS = {"ours": Ours}
