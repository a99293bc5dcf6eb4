"""What a checkpoint costs: beside plain `torch.save` of the same state, and in the background.

    torchrun --standalone --nproc_per_node=2 tests/benchmarks/save.py [--width 4082] [--folder DIR]

An MLP of three `width x width` layers (50 million parameters by default) with Adam's two moments, in one process or
several. `seconds` is what the training loop waits; in the background the rest is written while it goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ddp_stream.training.checkpoint import Checkpoints
from ddp_stream.training.engine import make_engine

REPEATS = 5


def seconds(action: Callable[[], object], after: Callable[[], object] = lambda: None) -> list[float]:
    """Of `REPEATS` calls, the first (which touches fresh memory) left out; `after` is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
        after()
    return times[1:]


def plain(state: object, path: Path) -> None:
    """`torch.save` and, as a checkpoint must, out to the disk."""
    torch.save(state, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=4082)
    parser.add_argument("--folder", type=Path, help="where to write; by default the temporary directory")
    arguments = parser.parse_args()
    engine = make_engine("ddp", 300)
    engine.seed(0)
    width = arguments.width
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(3))).to(engine.device)
    optimizer = torch.optim.Adam(model.parameters())
    engine.prepare(model, optimizer)
    engine.model(torch.ones(2, width, device=engine.device)).sum().backward()
    optimizer.step()
    rank, world_size = engine.topology.rank, engine.topology.world_size
    folder = Path(engine.from_rank_0(tempfile.mkdtemp(dir=arguments.folder)))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    size = 3 * sum(parameter.nbytes for parameter in model.parameters())
    rows: list[tuple[str, list[float], list[float]]] = []

    times = seconds(lambda: plain(state, folder / f"plain-{rank}") if rank == 0 else None, engine.barrier)
    rows.append(("torch.save and fsync, rank 0", times, times))

    step = iter(range(1000))
    for name, background in (("checkpoint", False), ("checkpoint, async_save", True)):
        checkpoints = Checkpoints(folder / name.replace(" ", "-"), engine, 2, background)
        waited = seconds(lambda c=checkpoints: c.save(next(step), {}), checkpoints.wait)
        written = [seconds for _, seconds in checkpoints.take_published()][1:]
        rows.append((name, waited, written))
    if rank == 0:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"torch {torch.__version__}, {parameters / 1e6:.1f} M parameters, {size / 1e6:.0f} MB, {world_size} rank(s)"
        )
        print("| how | the loop waits, s (min to max) | written in, s | MB/s |")
        print("|---|---|---|---|")
        for name, waited, written in rows:
            median = statistics.median(written)
            spread = f"{min(waited):.2f} to {max(waited):.2f}"
            print(f"| {name} | {statistics.median(waited):.2f} ({spread}) | {median:.2f} | {size / median / 1e6:.0f} |")
        shutil.rmtree(folder)
    engine.barrier()
    engine.close()


if __name__ == "__main__":
    main()
