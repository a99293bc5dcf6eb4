"""What asking for a stop costs: an epoch of 5 ms steps with the checks, beside the same epoch without.

    torchrun --standalone --nproc_per_node=2 tests/benchmarks/stop.py

Both epochs run the same loop; `without` leaves out the reduction that carries losses and requests to stop.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ddp_stream.batch import Batch
from ddp_stream.sources import SyntheticRegression
from ddp_stream.tasks import Regression
from ddp_stream.training.config import DataConfig, TrainConfig
from ddp_stream.training.engine import make_engine
from ddp_stream.training.loop import Training
from ddp_stream.training.reporter import Reporter
from ddp_stream.training.rundir import RunDir
from ddp_stream.training.stopping import StopRequest

STEPS = 600
STEP_S = 0.005
REPEATS = 5


class Slow(Regression):
    """A step takes at least `STEP_S`."""

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        time.sleep(STEP_S)
        return super().loss(model, batch)


def main() -> None:
    engine = make_engine("ddp", 300)
    inside: list[float] = []
    real = Reporter.report

    def counted(self: Reporter) -> object:
        started = time.perf_counter()
        due = real(self)
        inside.append(time.perf_counter() - started)
        return due

    with TemporaryDirectory() as folder:
        data = DataConfig(source=SyntheticRegression(64 * STEPS), global_batch_size=64, num_workers=0)
        run = RunDir(Path(folder), engine.topology.rank)
        training = Training(TrainConfig(Slow("label"), data=data), engine, run, StopRequest(Path(folder), None, {}))
        times: dict[bool, list[float]] = {True: [], False: []}
        epochs = iter(range(100))
        for _ in range(REPEATS + 1):
            for checked in (True, False):
                # What is not reduced is dropped at the end of the epoch, outside of the time.
                Reporter.report = (
                    counted if checked else (lambda self: real(self) if self._losses[STEPS - 1 :] else None)
                )  # type: ignore[assignment,method-assign,return-value]
                engine.barrier()
                started = time.perf_counter()
                training.steps(next(epochs))
                times[checked].append(time.perf_counter() - started)
                Reporter.report = real  # type: ignore[method-assign]
                training.reporter.report()
                training.proof.reset()
    with_checks, without = (statistics.median(times[checked][1:]) / STEPS for checked in (True, False))
    ratios = sorted(a / b - 1 for a, b in zip(times[True][1:], times[False][1:], strict=True))
    if engine.topology.rank == 0:
        print(f"torch {torch.__version__}, {engine.topology.world_size} ranks, {STEPS} steps, {REPEATS} pairs")
        share = 100 * sum(inside) / sum(times[True])
        print(
            f"{len(inside) / (REPEATS + 1):.0f} checks an epoch, {1e3 * statistics.median(inside):.2f} ms each, the wait",
            end=" ",
        )
        print(f"for the other rank included: {share:.2f}% of the time")
        print(f"{1e3 * with_checks:.3f} ms a step with checks")
        print(f"{1e3 * without:.3f} ms without: {100 * statistics.median(ratios):+.2f}% ", end="")
        print(f"({100 * ratios[0]:+.2f}% to {100 * ratios[-1]:+.2f}%)")
    engine.close()


if __name__ == "__main__":
    main()
