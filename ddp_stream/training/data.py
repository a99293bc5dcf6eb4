"""From the configuration to a source and a loader."""

from __future__ import annotations

from typing import Any

from ddp_stream.dataset import Transform
from ddp_stream.loader import StreamLoader
from ddp_stream.sources import Source, SyntheticRegression, open_source
from ddp_stream.topology import Topology
from ddp_stream.training.config import DataConfig


def make_source(config: DataConfig) -> Source:
    """The source that the configuration names.

    Raises:
        ValueError: both `path` and `source` are given.
        DataError: the files cannot be read.
    """
    if config.path is not None and config.source is not None:
        raise ValueError(
            f"--data.path {config.path} and --data.source {type(config.source).__name__} are both given, and rows come "
            f"from one of them: leave one out"
        )
    if config.path is not None:
        return open_source(config.path, config.columns, config.fill_null)
    source = SyntheticRegression(1000) if config.source is None else config.source  # an empty source is false, too
    return source.select(config.columns) if config.columns is not None else source


def make_loader(
    source: Source, config: DataConfig, *, seed: int, topology: Topology, transform: Transform | None = None
) -> StreamLoader:
    """The loader of this rank."""
    options: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "shuffle",
            "window_rows",
            "lanes",
            "tail",
            "num_workers",
            "pin_memory",
            "persistent_workers",
            "prefetch_factor",
            "multiprocessing_context",
        )
    }
    return StreamLoader(source, config.global_batch_size, seed=seed, topology=topology, transform=transform, **options)
