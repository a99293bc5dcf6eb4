"""`audit`: run the loader without a model, on the topology it was launched on, and say which rows came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from ddp_stream.audit import Proof
from ddp_stream.batch import Batch
from ddp_stream.commands.cli import Parser, make_parser
from ddp_stream.commands.demo import BrokenStreamingDataset
from ddp_stream.sources import InMemory
from ddp_stream.training.config import DataConfig
from ddp_stream.training.data import make_loader, make_source
from ddp_stream.training.engine import make_engine


@dataclass
class BrokenConfig:
    """The proof."""

    broken: bool = False
    """Swap in a reader that ignores which worker it is, to see the audit fail."""


@dataclass
class AuditCommandConfig:
    """Run the loader on the topology it was launched on, and say which rows came: missing, twice, or exactly once."""

    data: DataConfig = field(default_factory=DataConfig)
    """Where rows come from, and how they are dealt."""
    epochs: int = 1
    """Passes over the data."""
    seed: int = 0
    """Decides the shuffle."""
    timeout_s: float = 300.0
    """Seconds after which a collective operation that some rank does not join is an error."""
    audit: BrokenConfig = field(default_factory=BrokenConfig)
    """The proof."""


def parser() -> Parser:
    """The command's options."""
    return make_parser(AuditCommandConfig, task=False)


def run(parser: Parser, arguments: Any) -> int:
    """Audit; returns 0 if every row came exactly once on every epoch."""
    values = parser.instantiate(arguments)
    config = AuditCommandConfig(**{name: values[name] for name in AuditCommandConfig.__dataclass_fields__})
    engine = make_engine("ddp", config.timeout_s)
    topology = engine.topology
    source = make_source(config.data)
    loader = make_loader(source, config.data, seed=config.seed, topology=topology)
    proof = Proof(loader.plan, topology, len(source.excluded))
    right = True
    for epoch in range(config.epochs):
        loader.set_epoch(epoch)
        batches: Iterable[Batch] = _broken(loader.plan.total, config.data) if config.audit.broken else loader
        rows = 0
        for batch in batches:
            proof.record(batch)
            rows += len(batch.trained_rows)
        per_rank = [rows] * topology.world_size
        if dist.is_initialized():
            dist.all_gather_object(per_rank, rows)
        verdict = proof.verdict(loader.order(epoch))
        proof.reset()
        right = right and verdict.exactly_once
        if topology.rank == 0:
            print(
                f"{source}, epoch {epoch}, shuffle {loader.shuffle}: {topology.world_size} rank(s) x "
                f"{loader.num_workers} worker(s), rows per rank {_shown(per_rank)}"
            )
            print(
                f"  rows {verdict.rows}  missing {verdict.missing}  duplicates {verdict.duplicate}  "
                f"{f'excluded {verdict.excluded}  ' if verdict.excluded else ''}"
                f"{'exactly once' if verdict.exactly_once else 'NOT exactly once'}"
            )
            if not verdict.exactly_once or verdict.left_out:
                print(f"  {verdict}", flush=True)
    engine.close()
    return 0 if right else 1


def _broken(total: int, data: DataConfig) -> Iterator[Batch]:
    """Row ids as the broken reader hands them out."""
    if data.num_workers == "auto" or data.num_workers < 2:
        raise ValueError(
            f"--audit.broken with --data.num_workers {data.num_workers}: a reader that ignores which worker it is goes "
            f"unnoticed until there are several; use 2 or more"
        )
    dataset = BrokenStreamingDataset(InMemory({"row": np.arange(total)}))
    for sample in DataLoader(dataset, batch_size=data.global_batch_size, num_workers=data.num_workers):
        rows = sample["row"]
        yield Batch({}, weight=torch.ones(len(rows)), rows=rows)


def _shown(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
