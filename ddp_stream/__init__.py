"""Distributed training on every row exactly once per epoch, with proof."""

import ddp_stream.ancestry  # first: it notes the parent before torch is imported  # noqa: F401
from ddp_stream.batch import Batch
from ddp_stream.dataset import StreamingDataset
from ddp_stream.loader import StreamLoader
from ddp_stream.partition import shard_bounds
from ddp_stream.sources import open_source
from ddp_stream.strided import StridedDataset
from ddp_stream.topology import Topology
from ddp_stream.training.task import Task

__all__ = [
    "Batch",
    "StreamLoader",
    "StreamingDataset",
    "StridedDataset",
    "Task",
    "Topology",
    "open_source",
    "shard_bounds",
]
