"""From the configuration to a source and a loader."""

from __future__ import annotations

from typing import Any

from ddp_stream.dataset import Transform
from ddp_stream.loader import StreamLoader
from ddp_stream.sources import Source, SyntheticRegression, open_source
from ddp_stream.topology import Topology
from ddp_stream.training.config import DataConfig, EvalConfig


def make_source(config: DataConfig) -> Source:
    """The source that the configuration names.

    Raises:
        ValueError: both `path` and `source` are given.
        DataError: the files cannot be read.
    """
    _check_one(config.path, config.source, "data")
    if config.path is not None:
        return open_source(config.path, config.columns, config.fill_null)
    source = SyntheticRegression(1000) if config.source is None else config.source  # an empty source is false, too
    return source.select(config.columns) if config.columns is not None else source


def make_eval_source(config: EvalConfig, data: DataConfig) -> Source | None:
    """The source to evaluate on; None if the configuration names none."""
    _check_one(config.path, config.source, "eval")
    if config.path is not None:
        return open_source(config.path, data.columns, data.fill_null)
    return config.source


def _check_one(path: str | None, source: Source | None, group: str) -> None:
    if path is not None and source is not None:
        raise ValueError(
            f"--{group}.path {path} and --{group}.source {type(source).__name__} are both given, and rows come from one "
            f"of them: leave one out"
        )


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
