"""From the configuration to a source and a loader."""

from __future__ import annotations

import math
import os
import time
from typing import Any

from ddp_stream.dataset import Transform
from ddp_stream.deal import Deal
from ddp_stream.loader import StreamLoader
from ddp_stream.sources import (
    DataError,
    Source,
    SyntheticRegression,
    decoded,
    exclude,
    open_source,
    skip_bad_rows,
)
from ddp_stream.sources.selection import present
from ddp_stream.sources.transformed import Transformed
from ddp_stream.topology import Topology, allotted_cpus
from ddp_stream.training.config import DataConfig, EvalConfig
from ddp_stream.training.engine import Engine

_PROBE_S = 0.25
_QUICK_STEP_S = 1e-3
_MOST_WORKERS = 8


def make_source(config: DataConfig) -> Source:
    """The source that the configuration names.

    Raises:
        ValueError: both `path` and `source` are given.
        DataError: the files cannot be read.
    """
    _check_one(config.path, config.source, "data")
    source = SyntheticRegression(1000) if config.source is None else config.source  # an empty source is false, too
    return _prepared(config.path, source, config, config.exclude)


def make_eval_source(config: EvalConfig, data: DataConfig) -> Source | None:
    """The source to evaluate on, prepared as the one to train on; None if the configuration names none."""
    _check_one(config.path, config.source, "eval")
    if config.path is None and config.source is None:
        return None
    return _prepared(config.path, config.source, data, None)


def _prepared(
    path: list[str] | str | None, source: Source | None, config: DataConfig, rows: list[int] | None
) -> Source:
    """Choose columns, leave out rows, transform."""
    skip = config.on_bad_row == "skip"
    if path is not None:
        source = open_source(path, config.columns, config.fill_null, config.on_bad_row)
    else:
        assert source is not None
        source = source.select(config.columns) if config.columns is not None else source
        source = skip_bad_rows(source) if skip else source
    if rows is not None:
        source = exclude(source, present(source, rows))
    if config.transform is not None:
        source = Transformed(source, config.transform)
        source = skip_bad_rows(source) if skip else source
    return source


def check_same_data(source: Source, engine: Engine) -> None:
    """A collective call; raises DataError if the ranks' sources differ, so that what is trained on would too."""
    prints = engine.from_all_ranks(source.fingerprint())
    other = next((rank for rank, seen in enumerate(prints) if seen != prints[0]), None)
    if other is not None:
        raise DataError(
            f"rank 0 and rank {other} see different data in {source} (fingerprints {prints[0]} and {prints[other]}): rows "
            f"would be lost and repeated; give all machines the same files"
        )


def cost_of_order(loader: StreamLoader) -> str | None:
    """What is worth knowing about the price of the order in force, if anything is."""
    return cost_of_forward(loader) or cost_of_full(loader)


def cost_of_full(loader: StreamLoader) -> str | None:
    """What the order `full` costs where blocks are decoded whole and do not fit the cache, and what to use instead."""
    if loader.shuffle != "full" or not loader.source.decodes_blocks:
        return None
    deal = Deal(loader, loader.topology.world_size)
    data = deal.row_bytes * len(loader.source)
    if data <= decoded.CACHE_BYTES:
        return None
    rows = max(1, deal.message_bytes // deal.row_bytes)
    touched = deal.block_count * (1 - (1 - 1 / deal.block_count) ** rows)
    times = touched * len(loader.source) / deal.block_count / rows
    return (
        f"the order `full` draws rows from all over {loader.source}: a message of {rows:,} rows touches {touched:,.0f} of "
        f"its {deal.block_count:,} blocks, and these are decoded whole, {times:,.1f} rows for every row used, "
        f"{touched / deal.block_count * data / 1e6:,.0f} MB at a time in every worker; --data.shuffle blocks decodes each "
        f"block about once, a few at a time"
    )


def cost_of_forward(loader: StreamLoader) -> str | None:
    """What it means that rows can only be read forward."""
    if not getattr(loader.source, "forward_only", False):
        return None
    readers = loader.topology.world_size * max(1, loader.num_workers)
    return (
        f"{loader.source} is read forward only: each of {readers} reader(s) reads all rows to find its own, and a resume "
        f"reads past those that were trained on; written to files, rows are read once"
    )


def _check_one(path: list[str] | str | None, source: Source | None, group: str) -> None:
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
    options |= {"seed": seed, "topology": topology, "transform": transform}
    if config.num_workers == "auto":
        loader = StreamLoader(source, config.global_batch_size, **{**options, "num_workers": 0})
        options["num_workers"] = choose_workers(loader, allotted_cpus() / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return StreamLoader(source, config.global_batch_size, **options)


def choose_workers(loader: StreamLoader, cpus: float) -> int:
    """How many workers serve a rank best that has `cpus` CPUs; found out by reading for a quarter of a second.

    A source whose steps are read in less than a millisecond is quicker without: blocks are decoded in a thread anyway,
    and a message costs as much again as what is in it. Else a worker for every CPU but the one that trains.
    """
    reader, plan = loader.reader, loader.plan
    order = reader.order(0)
    at_once = reader.window_steps or 16
    begun, read = time.perf_counter(), 0
    for first in range(0, len(loader), at_once):
        steps = min(at_once, len(loader) - first)
        reader.read(reader.rows(order, first * plan.stride, steps))
        if first == 0:  # files are opened, and libraries start
            begun = time.perf_counter()
        else:
            read += steps
        if time.perf_counter() - begun > _PROBE_S:
            break
    step_s = (time.perf_counter() - begun) / read if read else 0.0
    return min(_MOST_WORKERS, max(0, math.ceil(cpus) - 1)) if step_s > _QUICK_STEP_S else 0
