"""The training run, from the configuration to the proof."""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from ddp_stream.audit import Proof, Verdict
from ddp_stream.loader import StreamLoader
from ddp_stream.training.config import TrainConfig
from ddp_stream.training.data import make_loader, make_source
from ddp_stream.training.engine import Engine, make_engine
from ddp_stream.training.optim import Schedule, make_optimizer
from ddp_stream.training.rundir import RunDir, choose_run_dir
from ddp_stream.training.task import Task
from ddp_stream.training.tracking import Tracker
from ddp_stream.transfer import transfer

_REPORT_EVERY_S = 1.0
_MOST_STEPS_A_REPORT = 1024


class ProofError(RuntimeError):
    """Some row did not train the model exactly once."""


@dataclass(frozen=True)
class Result:
    """What `train` returns on every rank.

    Attributes:
        model: the trained model, unwrapped
        run_dir: where its files are
        steps: optimizer steps taken
        verdicts: the proof of every epoch
        losses: mean loss of every epoch
    """

    model: nn.Module
    run_dir: Path
    steps: int
    verdicts: list[Verdict]
    losses: list[float]


def train(config: TrainConfig, config_yaml: str = "") -> Result:
    """Train as configured, on all ranks together.

    Args:
        config: the configuration
        config_yaml: the same as text, for the run directory

    Raises:
        ProofError: an epoch's proof failed; `status.json` says which.
        WorldError: not all promised processes run.
        DataError, ValueError: the data or the configuration stand in the way.
    """
    try:
        engine = make_engine(config.engine, config.timeout_s)
    except Exception as error:
        if config.run.dir is not None:  # without an engine there is no way to agree on another one
            Path(config.run.dir).mkdir(parents=True, exist_ok=True)
            _report_failure(error, RunDir(Path(config.run.dir), int(os.environ.get("RANK", "0"))), 0)
        raise
    rank = engine.topology.rank
    run = RunDir(engine.from_rank_0(choose_run_dir(config.run.dir, os.environ)), rank)
    training: Training | None = None
    try:
        if rank == 0:
            run.open(config_yaml)
        run.attempt = engine.from_rank_0(run.attempt)
        training = Training(config, engine, run)
        return training.run()
    except BaseException as error:
        _report_failure(error, run, training.step if training is not None else 0)
        raise
    finally:
        run.flush()
        if sys.exc_info()[0] is None:
            engine.close()


def _report_failure(error: BaseException, run: RunDir, step: int) -> None:
    """Say on stderr and in `status.json` which rank failed where; the first of several ranks is believed."""
    where = f"rank {run.rank} on {socket.gethostname()}, step {step}"
    if not isinstance(error, ProofError):
        sys.stderr.write(f"[{where}] failed: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
    if run.path.is_dir() and not (run.path / "status.json").exists():
        run.finish("failed", step, f"{where}: {type(error).__name__}: {error}")


class Training:
    """One attempt at a run: the objects it is made of, and its loop."""

    def __init__(self, config: TrainConfig, engine: Engine, run: RunDir) -> None:
        self.config = config
        self.engine = engine
        self.run_dir = run
        self.step = 0
        self.task: Task = config.task
        source = make_source(config.data)
        self.task.setup(source)
        if self.task.columns is not None:
            source = source.select(self.task.columns)
        changed = type(self.task).transform is not Task.transform
        self.loader: StreamLoader = make_loader(
            source,
            config.data,
            seed=config.seed,
            topology=engine.topology,
            transform=self.task.transform if changed else None,
        )
        engine.seed(config.seed)
        model = self.task.build_model().to(engine.device)
        optimizer = self.task.configure_optimizer(model) or make_optimizer(config.optim, model)
        engine.prepare(model, optimizer)
        self.total_steps = config.epochs * len(self.loader)
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.schedule = Schedule(config.optim, optimizer, self.total_steps)
        self.proof = Proof(self.loader.plan, engine.topology)
        self.reporter = Reporter(engine, run, config)

    def run(self) -> Result:
        """Train to the end, and report."""
        engine, run, loader = self.engine, self.run_dir, self.loader
        run.log(
            "start",
            attempt=run.attempt,
            time=time.time(),
            world_size=engine.topology.world_size,
            num_workers=loader.num_workers,
            engine=self.config.engine,
            device=str(engine.device),
            rows=loader.plan.total,
            steps_per_epoch=len(loader),
            global_batch_size=loader.plan.global_batch_size,
            shuffle=loader.shuffle,
        )
        self.say(
            f"{loader.source}: {loader.plan.total} rows, {len(loader)} steps of {loader.plan.global_batch_size} rows an "
            f"epoch on {engine.topology.world_size} rank(s) x {loader.num_workers} worker(s), shuffle {loader.shuffle}, "
            f"{engine.device}; run directory {run.path}"
        )
        verdicts, losses = [], []
        for epoch in range(self.config.epochs):
            if self.step >= self.total_steps > 0:
                break
            loss, verdict = self.epoch(epoch)
            losses.append(loss)
            verdicts.append(verdict)
            if not verdict.exactly_once:
                raise ProofError(f"epoch {epoch}: {verdict}")
        if engine.topology.rank == 0:
            safetensors.torch.save_model(engine.unwrap(), str(run.path / "model.safetensors"))
            run.finish("done", self.step, f"{self.step} steps in {len(verdicts)} epochs, every row exactly once")
        self.reporter.close()
        engine.barrier()
        return Result(engine.unwrap(), run.path, self.step, verdicts, losses)

    def epoch(self, epoch: int) -> tuple[float, Verdict]:
        """Train on the rows of one epoch; returns their mean loss, and the proof."""
        data, optim = self.config.data, self.config.optim
        self.engine.model.train()
        self.loader.set_epoch(epoch)
        self.reporter.begin_epoch()
        end = 0
        for batch in transfer(self.loader, self.engine.device):
            lr = self.schedule.set(self.step)
            # What is drawn in a step depends on the step, not on how we got there.
            self.engine.seed(self.config.seed, self.step, self.engine.topology.rank)
            loss = self.engine.step(self.task, batch, data.micro_batch_size, optim.clip_norm)
            self.step += 1
            end = batch.offset + self.loader.plan.stride
            self.proof.record(batch)
            if self.config.audit.trace:
                self.run_dir.trace(batch, self.step)
            self.reporter.record(self.step, epoch, loss, batch.global_rows, lr)
            if self.step == self.config.max_steps:
                break
        mean_loss = self.reporter.end_epoch()
        verdict = self.proof.verdict(self.loader.order(epoch), end)
        self.proof.reset()
        self.run_dir.log(
            "epoch",
            epoch=epoch,
            loss=mean_loss,
            steps=self.step,
            rows=verdict.rows,
            missing=verdict.missing,
            duplicate=verdict.duplicate,
            left_out=verdict.left_out,
            exactly_once=verdict.exactly_once,
            time=time.time(),
        )
        lr = self.engine.optimizer.param_groups[0]["lr"]
        mark = "exactly once" if verdict.exactly_once else "PROOF FAILED"
        self.say(f"epoch {epoch}: loss {mean_loss:.6g}, lr {lr:.3g}, {self.step} steps, {mark}: {verdict}")
        return mean_loss, verdict

    def say(self, text: str) -> None:
        """A line for whoever watches, from rank 0."""
        if self.engine.topology.rank == 0:
            print(text, flush=True)


class Reporter:
    """Collects the losses of steps, and reduces those of many steps at once, at steps that all ranks agree on.

    An all-reduce in every step would cost more than a short step itself. When the next one is due follows from the
    slowest rank's pace, which the reduction itself tells everybody.
    """

    def __init__(self, engine: Engine, run: RunDir, config: TrainConfig) -> None:
        self._engine = engine
        self._run = run
        self._tracker = Tracker(config.wandb, run, {"seed": config.seed, "engine": config.engine})
        self._losses: list[torch.Tensor] = []
        self._steps: list[tuple[int, int, int, float]] = []
        self._until_report = 1
        self._since = time.monotonic()
        self._sum = 0.0
        self._rows = 0

    def begin_epoch(self) -> None:
        """Start the epoch's mean anew."""
        self._sum, self._rows = 0.0, 0
        self._since = time.monotonic()

    def record(self, step: int, epoch: int, loss: torch.Tensor, global_rows: int, lr: float) -> None:
        """Note one step; reduce and write when due."""
        self._losses.append(loss)
        self._steps.append((step, epoch, global_rows, lr))
        if len(self._losses) >= self._until_report:
            self._report()

    def end_epoch(self) -> float:
        """Reduce what is left; returns the mean loss over the epoch's rows (nan if there were none)."""
        if self._losses:
            self._report()
        self._run.flush()
        return self._sum / self._rows if self._rows else math.nan

    def close(self) -> None:
        """No more steps follow."""
        self._tracker.close()

    def _report(self) -> None:
        pace = (time.monotonic() - self._since) / len(self._losses)
        values = torch.stack([*self._losses, torch.tensor(pace, device=self._engine.device)])
        *sums, pace_sum = self._engine.all_reduce_sum(values).tolist()
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
            self._run.log("step", step=step, epoch=epoch, loss=loss, lr=lr)
            self._tracker.log(step, loss=loss, lr=lr)
        self._run.flush()
        self._losses, self._steps = [], []
        mean_pace = pace_sum / self._engine.topology.world_size
        self._until_report = max(1, min(_MOST_STEPS_A_REPORT, int(_REPORT_EVERY_S / max(mean_pace, 1e-6))))
        self._since = time.monotonic()
