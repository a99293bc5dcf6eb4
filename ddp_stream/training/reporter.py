"""What the ranks tell each other between steps, and what they tell whoever watches."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ddp_stream.training.config import TrainConfig
from ddp_stream.training.engine import Engine
from ddp_stream.training.rundir import RunDir
from ddp_stream.training.stopping import StopRequest
from ddp_stream.training.tracking import Tracker

_REPORT_EVERY_S = 1.0
_MOST_STEPS_A_REPORT = 256  # so that a run that slows down still asks in time
_MOST_GROWTH = 4


@dataclass(frozen=True)
class Due:
    """What all ranks know after a report: why to stop (or None), and whether to save."""

    stop: str | None
    save: bool


class Reporter:
    """Collects the losses of steps, and reduces those of many steps at once, at steps that all ranks agree on.

    An all-reduce in every step would cost more than a short step itself. When the next one is due follows from the
    ranks' pace, which the reduction itself tells everybody; so do requests to stop or to save.
    """

    def __init__(self, engine: Engine, run: RunDir, config: TrainConfig, stop: StopRequest) -> None:
        self._engine = engine
        self._run = run
        self._tracker = Tracker(config.wandb, run, {"seed": config.seed, "engine": config.engine})
        self._every_minutes = config.checkpoint.every_minutes
        self._stop = stop
        self.saved_at = time.monotonic()
        self._losses: list[torch.Tensor] = []
        self._steps: list[tuple[int, int, int, float]] = []
        self._until_report = 1
        self._since: float | None = None
        self.reset_mean()

    @property
    def steps_per_report(self) -> int:
        """Steps between reports at the ranks' pace, about a second; the same on all ranks."""
        return self._until_report

    def track(self, step: int, **values: float) -> None:
        """Send numbers of optimizer step `step` to the tracker."""
        self._tracker.log(step, **values)

    @property
    def mean_loss(self) -> float:
        """Mean over the epoch's rows so far (nan if there were none)."""
        return self._sum / self._rows if self._rows else math.nan

    def reset_mean(self) -> None:
        """Begin the mean of another epoch."""
        self._sum, self._rows = 0.0, 0

    def mean_state(self) -> dict[str, Any]:
        """The epoch's mean so far, for a checkpoint."""
        return {"sum": self._sum, "rows": self._rows}

    def load_mean(self, state: Mapping[str, Any]) -> None:
        """Go on with the mean of a checkpoint."""
        self._sum, self._rows = float(state["sum"]), int(state["rows"])

    def record(self, step: int, epoch: int, loss: torch.Tensor, global_rows: int, lr: float) -> Due | None:
        """Note one step; where a report is due, reduce, write, and return what all ranks agree on."""
        self._losses.append(loss)
        self._steps.append((step, epoch, global_rows, lr))
        return self.report() if len(self._losses) >= self._until_report else None

    def stop_reason(self) -> str | None:
        """Why to stop, agreed by all ranks; a collective call."""
        return self.report().stop

    def close(self) -> None:
        """No more steps follow."""
        self._tracker.close()

    def report(self) -> Due:
        """Reduce and write what was recorded since the last time; a collective call."""
        now = time.monotonic()
        # The first step, with the workers' start in it, tells nothing of the pace.
        pace = (now - self._since) / len(self._losses) if self._losses and self._since is not None else 0.0
        stop = self._stop.requested()
        save = self._every_minutes is not None and now - self.saved_at > 60 * self._every_minutes
        flags = torch.tensor([pace, float(stop), float(save)], device=self._engine.device)
        reduced = self._engine.all_reduce_sum(torch.cat([flags, *(loss.reshape(1) for loss in self._losses)])).tolist()
        pace_sum, stops, saves, *sums = reduced
        for (step, epoch, rows, lr), total in zip(self._steps, sums, strict=True):
            loss = total / rows
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of step {step} (epoch {epoch}, lr {lr:.3g}) is {loss}: the weights are lost from here on; "
                    f"look at the data of this step (--audit.trace true names its rows), lower --optim.lr, or set "
                    f"--optim.clip_norm"
                )
            self._sum += total
            self._rows += rows
            self._run.log("step", attempt=self._run.attempt, step=step, epoch=epoch, loss=loss, lr=lr)
            self._tracker.log(step, loss=loss, lr=lr)
        self._run.flush()
        if self._losses:
            mean_pace = pace_sum / self._engine.topology.world_size
            fitting = int(_REPORT_EVERY_S / mean_pace) if mean_pace else 1
            # A single step may have been quick by chance.
            self._until_report = max(1, min(fitting, _MOST_GROWTH * self._until_report, _MOST_STEPS_A_REPORT))
        self._losses, self._steps = [], []
        self._since = time.monotonic()
        reason = None
        if stops:
            reasons = self._engine.from_all_ranks(self._stop.reason)
            reason = next(f"{text} (rank {rank})" for rank, text in enumerate(reasons) if text is not None)
        return Due(reason, saves > 0)
