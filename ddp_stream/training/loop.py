"""The training run, from the configuration to the proof."""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ddp_stream.audit import Proof, Verdict
from ddp_stream.loader import StreamLoader
from ddp_stream.training.checkpoint import Checkpoints
from ddp_stream.training.config import TrainConfig
from ddp_stream.training.data import make_loader, make_source
from ddp_stream.training.engine import Engine, make_engine
from ddp_stream.training.optim import Schedule, make_optimizer
from ddp_stream.training.rundir import RunDir, choose_run_dir
from ddp_stream.training.stopping import StopRequest
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
            path = Path(config.run.dir)
            path.mkdir(parents=True, exist_ok=True)
            (path / "status.json").unlink(missing_ok=True)
            _report_failure(error, RunDir(path, int(os.environ.get("RANK", "0"))), 0)
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
        self.schedule = Schedule(config.optim, optimizer)
        engine.prepare(model, optimizer)
        self.proof = Proof(self.loader.plan, engine.topology)
        self.reporter = Reporter(engine, run, config)
        self.checkpoints = Checkpoints(run.path / "checkpoints", engine, config.checkpoint.keep)
        self.identity = {**self.loader.identity, "data": source.fingerprint(), "task": _import_path(self.task)}
        self._warm = False
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()

    def run(self) -> Result:
        """Train to the end or to a stop, and report."""
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
        state = self.resume()
        total_steps = self.step + sum(
            loader.plan.steps(state["offset"] if epoch == state["epoch"] else 0)
            for epoch in range(state["epoch"], self.config.epochs)
        )
        if self.config.max_steps is not None:
            total_steps = min(total_steps, self.config.max_steps)
        self.schedule.total_steps = total_steps
        verdicts, losses = [], []
        reason: str | None = None
        with StopRequest(run.path, self.config.max_minutes, os.environ) as stop:
            self.reporter.stop = stop
            for epoch in range(state["epoch"], self.config.epochs):
                if self.step >= total_steps > 0:
                    break
                loss, verdict, reason = self.epoch(epoch)
                if reason is not None:
                    break
                losses.append(loss)
                verdicts.append(verdict)
                if not verdict.exactly_once:
                    raise ProofError(f"epoch {epoch}: {verdict}")
        if engine.topology.rank == 0:
            if reason is None:
                safetensors.torch.save_model(engine.unwrap(), str(run.path / "model.safetensors"))
                run.finish("done", self.step, f"{self.step} steps, every row exactly once in every epoch")
            else:
                run.log("stop", attempt=run.attempt, step=self.step, reason=reason, time=time.time())
                run.finish("preempted", self.step, reason)
                self.say(f"stopped after step {self.step}: {reason}; the same command goes on from here")
        self.reporter.close()
        engine.barrier()
        return Result(engine.unwrap(), run.path, self.step, verdicts, losses)

    def epoch(self, epoch: int) -> tuple[float, Verdict, str | None]:
        """Train on the rows of one epoch from the loader's position on.

        Returns:
            The mean loss of the rows, the proof, and why to stop; with a reason to stop, the epoch may go on later.
        """
        data, optim, every = self.config.data, self.config.optim, self.config.checkpoint.every_steps
        self.engine.model.train()
        self.loader.set_epoch(epoch)
        end = self.loader.state_dict()["offset"]
        whole = self.loader.plan.steps() * self.loader.plan.stride
        for batch in transfer(self.loader, self.engine.device):
            if not self._warm:
                self.engine.warm_up(self.task, batch, data.micro_batch_size)
                self._warm = True
            lr = self.schedule.set(self.step)
            # What is drawn in a step depends on the step, not on how we got there.
            self.engine.seed(self.config.seed, self.step, self.engine.topology.rank)
            loss = self.engine.step(self.task, batch, data.micro_batch_size, optim.clip_norm)
            self.step += 1
            end = batch.offset + self.loader.plan.stride
            self.proof.record(batch)
            if self.config.audit.trace:
                self.run_dir.trace(batch, self.step)
            due = self.reporter.record(self.step, epoch, loss, batch.global_rows, lr)
            if self.step == self.config.max_steps:
                break
            if due is not None and due.stop is not None and self.loader.plan.steps(end):
                self.reporter.report()
                self.save(self.loader.state_after(batch))
                return self.reporter.mean_loss, self.proof.verdict(self.loader.order(epoch), end), due.stop
            if (every and self.step % every == 0) or (due is not None and due.save):
                self.reporter.report()
                self.save(self.loader.state_after(batch))
        self.reporter.report()
        mean_loss = self.reporter.mean_loss
        verdict = self.proof.verdict(self.loader.order(epoch), end)
        self.run_dir.log(
            "epoch",
            attempt=self.run_dir.attempt,
            epoch=epoch,
            loss=mean_loss if math.isfinite(mean_loss) else None,
            steps=self.step,
            rows=verdict.rows,
            missing=verdict.missing,
            duplicate=verdict.duplicate,
            left_out=verdict.left_out,
            exactly_once=verdict.exactly_once,
            time=time.time(),
        )
        mark = "exactly once" if verdict.exactly_once else "PROOF FAILED"
        rate = self.schedule.lr
        self.say(f"epoch {epoch}: loss {mean_loss:.6g}, lr {rate:.3g}, {self.step} steps, {mark}: {verdict}")
        if verdict.exactly_once:
            if end < whole and self.loader.plan.steps(end):  # max_steps ended the run inside the epoch
                self.save({**self.loader.identity, "epoch": epoch, "offset": end})
            else:
                self.proof.reset()
                self.reporter.reset_mean()
                self.save({**self.loader.identity, "epoch": epoch + 1, "offset": 0})
        due_stop = self.reporter.stop_reason() if epoch + 1 < self.config.epochs else None
        return mean_loss, verdict, due_stop

    def save(self, position: Mapping[str, Any]) -> None:
        """Write a checkpoint of this step; a collective call."""
        if self._saved_step == self.step:
            return
        started = time.monotonic()
        self.run_dir.flush()
        path = self.checkpoints.save(
            self.step,
            {
                "step": self.step,
                "epoch": position["epoch"],
                "offset": position["offset"],
                "global_batch_size": self.loader.plan.global_batch_size,
                "world_size": self.engine.topology.world_size,
                "num_workers": self.loader.num_workers,
                "engine": self.config.engine,
                "digest": self.proof.reduced_digest().state_dict(),
                "loss": self.reporter.mean_state(),
                "identity": self.identity,
            },
        )
        self._saved_step, self._saved_at = self.step, time.monotonic()
        self.reporter.saved_at = self._saved_at
        seconds = self._saved_at - started
        self.run_dir.log("checkpoint", attempt=self.run_dir.attempt, step=self.step, path=path.name, seconds=seconds)
        self.run_dir.flush()

    def resume(self) -> dict[str, Any]:
        """Go on from a checkpoint if there is one; returns the position, `epoch` and `offset`.

        Raises:
            ValueError: the checkpoint belongs to other data or another order of it.
        """
        path, damaged = self.checkpoints.choose(self.config.checkpoint.resume)
        for what in damaged:
            self.say(f"damaged checkpoint passed over: {what}")
        if path is None:
            return {"epoch": 0, "offset": 0}
        state = self.checkpoints.load(path)
        before, now = state["identity"], self.identity
        differing = [
            f"{name} was {before.get(name)} and is {now.get(name)}" for name in now if before.get(name) != now[name]
        ]
        if differing:
            raise ValueError(
                f"{path} belongs to another run ({'; '.join(differing)}): going on from it would repeat rows and lose "
                f"others; give it the settings it was made with, or another --run.dir"
            )
        self.step = self._saved_step = int(state["step"])
        self.loader.load_state_dict({"epoch": state["epoch"], "offset": state["offset"]})
        if self.engine.topology.rank == 0:  # the digest is a sum over ranks, so one of them carries what was
            self.proof.digest.load_state_dict(state["digest"])
        self.reporter.load_mean(state["loss"])
        self.run_dir.log(
            "resume",
            attempt=self.run_dir.attempt,
            step=self.step,
            path=str(path),
            damaged=damaged,
            before={name: state[name] for name in ("world_size", "num_workers", "engine", "global_batch_size")},
            world_size=self.engine.topology.world_size,
            num_workers=self.loader.num_workers,
        )
        self.say(f"going on from {path}: step {self.step}, epoch {state['epoch']}")
        return {"epoch": int(state["epoch"]), "offset": int(state["offset"])}

    def say(self, text: str) -> None:
        """A line for whoever watches, from rank 0."""
        if self.engine.topology.rank == 0:
            print(text, flush=True)


def _import_path(task: Task) -> str:
    return f"{type(task).__module__}.{type(task).__qualname__}"


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

    def __init__(self, engine: Engine, run: RunDir, config: TrainConfig) -> None:
        self._engine = engine
        self._run = run
        self._tracker = Tracker(config.wandb, run, {"seed": config.seed, "engine": config.engine})
        self._every_minutes = config.checkpoint.every_minutes
        self.stop: StopRequest | None = None
        self.saved_at = time.monotonic()
        self._losses: list[torch.Tensor] = []
        self._steps: list[tuple[int, int, int, float]] = []
        self._until_report = 1
        self._since: float | None = None
        self.reset_mean()

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
        if self._since is None:
            self._since = time.monotonic()  # the first step, with the workers' start in it, tells nothing of the pace
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
        pace = (now - self._since) / len(self._losses) if self._losses and self._since is not None else 0.0
        stop = self.stop is not None and self.stop.requested()
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
            self._until_report = max(1, min(_MOST_STEPS_A_REPORT, int(_REPORT_EVERY_S / max(mean_pace, 1e-6))))
        self._losses, self._steps = [], []
        self._since = time.monotonic()
        reason = None
        if stops:
            asked = self.stop.reason if self.stop is not None else None
            reasons = self._engine.from_all_ranks(asked)
            reason = next(f"{text} (rank {rank})" for rank, text in enumerate(reasons) if text is not None)
        return Due(reason, saves > 0)
