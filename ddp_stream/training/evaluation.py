"""Evaluation: every row of another dataset exactly once, whatever the number of ranks, and means over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ddp_stream.audit import Proof, Verdict
from ddp_stream.loader import StreamLoader
from ddp_stream.training.engine import Engine
from ddp_stream.training.reporter import Reporter
from ddp_stream.training.task import Task
from ddp_stream.transfer import transfer


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: the mean of each of the task's metrics over all rows
        verdict: the proof that every row was counted once
    """

    metrics: dict[str, float]
    verdict: Verdict

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value:.6g}" for name, value in self.metrics.items())
        return f"{values}; {self.verdict}"


def evaluate(
    task: Task, engine: Engine, loader: StreamLoader, reporter: Reporter
) -> tuple[Evaluation | None, str | None]:
    """Measure the model on the rows of `loader`; a collective call.

    Returns:
        What was found and None; or None and why to stop, when a stop was asked for before the end.
    """
    proof = Proof(loader.plan, engine.topology)
    sums: dict[str, torch.Tensor] = {}
    loader.set_epoch(0)
    training = engine.model.training
    # Wide sums, so that the mean over many rows does not depend on how they are spread over ranks. (MPS has none.)
    wide = torch.float32 if engine.device.type == "mps" else torch.float64
    engine.model.eval()
    try:
        with torch.no_grad():
            for index, batch in enumerate(transfer(loader, engine.device), 1):
                for name, values in task.metrics(engine.model, batch).items():
                    if values.shape != batch.weight.shape:
                        raise ValueError(
                            f"{type(task).__name__}.metrics returned shape {list(values.shape)} as {name!r} for "
                            f"{len(batch.rows)} rows; it must return one value per row, shape [{len(batch.rows)}]"
                        )
                    total = torch.dot(values.to(wide), batch.weight.to(wide))
                    sums[name] = sums[name] + total if name in sums else total
                proof.record(batch)
                if index % reporter.steps_per_report == 0:
                    reason = reporter.stop_reason()
                    if reason is not None:
                        return None, reason
    finally:
        engine.model.train(training)
    verdict = proof.verdict(loader.order(0), loader.plan.steps() * loader.plan.stride)
    names = sorted(sums)
    means: dict[str, float] = {}
    if names:
        totals = engine.all_reduce_sum(torch.stack([sums[name] for name in names]))
        means = {name: float(total) / verdict.rows for name, total in zip(names, totals, strict=True)}
    return Evaluation(means, verdict), None
