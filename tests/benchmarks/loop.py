"""How thin is the loop? Rows per second of `train` against a bare DDP loop on pre-batched tensors in memory.

    torchrun --standalone --nproc_per_node=2 tests/benchmarks/loop.py

Both train the same MLP (32-16-1, Adam) on the same number of rows in the same global batches, in turn, in one run.
`train` reads, shuffles, counts and reports; the bare loop has its batches lying ready. A ratio of 1 is a loop that
costs nothing.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_stream.sources import InMemory, Parquet, Source
from ddp_stream.tasks import Regression
from ddp_stream.training.config import DataConfig, TrainConfig
from ddp_stream.training.engine import make_engine
from ddp_stream.training.loop import Training
from ddp_stream.training.rundir import RunDir
from ddp_stream.training.stopping import StopRequest

ROWS = 1 << 17
FEATURES = 32
REPEATS = 5


def bare_seconds(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Seconds of an epoch of the hand-written loop."""
    model = DistributedDataParallel(nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def epoch() -> None:
        for features, label in batches:
            loss = (model(features) - label).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return timed(epoch)


def timed(epoch: object) -> float:
    """Seconds of a second call, after one to warm up."""
    epoch()
    dist.barrier()
    started = time.perf_counter()
    epoch()
    dist.barrier()
    return time.perf_counter() - started


def main() -> None:
    engine = make_engine("ddp", 300.0)
    rank, world_size = engine.topology.rank, engine.topology.world_size
    torch.manual_seed(0)
    features = torch.randn(ROWS, FEATURES)
    label = features.sum(dim=1, keepdim=True)
    folder = Path(engine.from_rank_0(tempfile.mkdtemp()))
    path = folder / "rows.parquet"
    if rank == 0:
        columns = {f"f{i}": features[:, i].numpy() for i in range(FEATURES)} | {"label": label[:, 0].numpy()}
        pq.write_table(pa.table(columns), path, row_group_size=8192, compression="zstd")
    dist.barrier()
    sources: dict[str, Source] = {
        "memory": InMemory({"features": features.numpy(), "label": label.numpy()}),
        "parquet": Parquet(str(path)),
    }
    if rank == 0:
        print(f"torch {torch.__version__}, {world_size} ranks, {ROWS} rows, median of {REPEATS} (smallest to largest)")
        print("| source | workers | global batch | bare rows/s | train rows/s | ratio |")
        print("|---|---|---|---|---|---|")
    for global_batch in (512, 2048):
        share = global_batch // world_size
        mine = np.arange(rank * share, (rank + 1) * share)
        batches = [(features[start + mine], label[start + mine]) for start in range(0, ROWS, global_batch)]
        for name, source in sources.items():
            for num_workers in (0, 1, 2):
                data = DataConfig(source=source, global_batch_size=global_batch, num_workers=num_workers)
                stop = StopRequest(folder, None, {})
                training = Training(TrainConfig(Regression(), data=data), engine, RunDir(folder / "run", rank), stop)
                epochs = iter(range(100))
                bare, ours = [], []
                for _ in range(REPEATS):
                    bare.append(bare_seconds(batches))
                    ours.append(timed(lambda training=training, epochs=epochs: training.epoch(next(epochs))))
                ratios = sorted(b / o for b, o in zip(bare, ours, strict=True))
                if rank == 0:
                    print(
                        f"| {name} | {num_workers} | {global_batch} | {ROWS / statistics.median(bare):,.0f} "
                        f"| {ROWS / statistics.median(ours):,.0f} "
                        f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
                        flush=True,
                    )
    engine.close()


if __name__ == "__main__":
    main()
