"""One attempt at a run: the objects it is made of, its loop, its checkpoints and its proof."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from ddp_stream.audit import Proof, Verdict
from ddp_stream.loader import StreamLoader
from ddp_stream.sources import Source
from ddp_stream.sources.transformed import name_of
from ddp_stream.training import faults
from ddp_stream.training.checkpoint import Checkpoints
from ddp_stream.training.config import DataConfig, TrainConfig
from ddp_stream.training.data import check_same_data, cost_of_order, make_eval_source, make_loader, make_source
from ddp_stream.training.engine import Engine
from ddp_stream.training.evaluation import evaluate
from ddp_stream.training.optim import Schedule, make_optimizer
from ddp_stream.training.reporter import Reporter
from ddp_stream.training.rundir import RunDir, replacing, restarted
from ddp_stream.training.stopping import StopRequest
from ddp_stream.training.task import Task
from ddp_stream.transfer import transfer


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


@dataclass(frozen=True)
class EpochEnd:
    """How an epoch ended on this attempt.

    Attributes:
        loss: mean over the rows so far
        verdict: the proof; None where a stop put it off
        whole: no step of the epoch is left
        stop: why to stop now, or None
    """

    loss: float
    verdict: Verdict | None
    whole: bool
    stop: str | None


class Training:
    """One attempt at a run: the objects it is made of, and its loop."""

    def __init__(self, config: TrainConfig, engine: Engine, run: RunDir, stop: StopRequest) -> None:
        self.config = config
        self.engine = engine
        self.run_dir = run
        self.stop = stop
        self.step = 0
        self.task: Task = config.task
        source = make_source(config.data)
        self.task.setup(source)
        if self.task.columns is not None:
            source = source.select(self.task.columns)
        check_same_data(source, engine)
        self.excluded = source.excluded
        self.loader: StreamLoader = self._loader(source, config.data)
        eval_source = make_eval_source(config.eval, config.data)
        self.eval_loader: StreamLoader | None = None
        if eval_source is not None:
            if self.task.columns is not None:
                eval_source = eval_source.select(self.task.columns)
            self.eval_loader = self._loader(eval_source, replace(config.data, shuffle="none", tail="pad"))
        engine.seed(config.seed)
        model = self.task.build_model().to(engine.device)
        optimizer = self.task.configure_optimizer(model) or make_optimizer(config.optim, model)
        self.schedule = Schedule(config.optim, optimizer)
        engine.prepare(model, optimizer)
        self.proof = Proof(self.loader.plan, engine.topology, len(self.excluded))
        self.reporter = Reporter(engine, run, config, stop)
        self.checkpoints = Checkpoints(
            run.path / "checkpoints", engine, config.checkpoint.keep, config.checkpoint.async_save
        )
        self.identity = {
            **self.loader.identity,
            "data": source.fingerprint(),
            "columns": config.data.columns,
            "fill_null": config.data.fill_null,
            "transform": None if config.data.transform is None else name_of(config.data.transform),
            "task": f"{type(self.task).__module__}.{type(self.task).__qualname__}",
            **{f"optim.{name}": value for name, value in asdict(config.optim).items()},
        }
        self._warm = False
        self._saved_step: int | None = None
        self._stalls: dict[int, float] = {}
        if faults.VARIABLE in os.environ:
            faults.arm(self, os.environ[faults.VARIABLE])

    def _loader(self, source: Source, data: DataConfig) -> StreamLoader:
        changed = type(self.task).transform is not Task.transform
        transform = self.task.transform if changed else None
        return make_loader(source, data, seed=self.config.seed, topology=self.engine.topology, transform=transform)

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
            excluded=len(self.excluded),
            steps_per_epoch=len(loader),
            global_batch_size=loader.plan.global_batch_size,
            shuffle=loader.shuffle,
        )
        run.flush()  # before any trace of this attempt
        self.say(
            f"{loader.source}: {loader.plan.total} rows, {len(loader)} steps of {loader.plan.global_batch_size} rows an "
            f"epoch on {engine.topology.world_size} rank(s) x {loader.num_workers} worker(s), shuffle {loader.shuffle}, "
            f"{engine.device}; run directory {run.path}"
        )
        for text in filter(None, (run.list_excluded(self.excluded), cost_of_order(loader))):
            self.say(f"note: {text}")
        position = self.resume()
        total_steps = self.step + sum(
            loader.plan.steps(position["offset"] if epoch == position["epoch"] else 0)
            for epoch in range(position["epoch"], self.config.epochs)
        )
        if self.config.max_steps is not None:
            total_steps = min(total_steps, self.config.max_steps)
        self.schedule.total_steps = total_steps
        ends: list[EpochEnd] = []
        reason: str | None = None
        if position["epoch"] > 0 and position["offset"] == 0:
            reason = self.evaluate(position["epoch"] - 1)  # if the attempt before ended inside it
        for epoch in range(position["epoch"], self.config.epochs):
            if reason is not None or self.step >= total_steps > 0:
                break
            ends.append(self.epoch(epoch))
            reason = ends[-1].stop
            if ends[-1].whole and reason is None:
                reason = self.evaluate(epoch)
        self.checkpoints.wait()
        self.note_saved()
        self.finish(reason)
        self.reporter.close()
        engine.barrier()
        judged = [(end.verdict, end.loss) for end in ends if end.verdict is not None]
        verdicts, losses = [verdict for verdict, _ in judged], [loss for _, loss in judged]
        return Result(engine.unwrap(), run.path, self.step, verdicts, losses)

    def finish(self, reason: str | None) -> None:
        """Write how this attempt ended: `done`, or `preempted` for `reason`."""
        run = self.run_dir
        if self.engine.topology.rank != 0:
            return
        if reason is None:
            with replacing(run.path / "model.safetensors") as path:
                safetensors.torch.save_model(self.engine.unwrap(), str(path))
            run.finish("done", self.step, f"{self.step} steps, every row exactly once in every epoch")
            return
        seconds = None if self.stop.asked_at is None else time.monotonic() - self.stop.asked_at
        run.log("stop", attempt=run.attempt, step=self.step, reason=reason, seconds=seconds, time=time.time())
        run.finish("preempted", self.step, reason)
        self.say(f"stopped after step {self.step}: {reason}; the same command goes on from here")
        # torchrun kills its ranks when this is over; launch/ and slurm/ set the variable.
        grace = float(os.environ.get("PET_SHUTDOWN_TIMEOUT", "30"))
        if seconds is not None and seconds > grace / 2 and "TORCHELASTIC_RUN_ID" in os.environ:
            self.say(
                f"warning: it took {seconds:.0f} s from the signal to here, more than half of the {grace:.0f} s after which "
                f"torchrun kills its ranks: give it more (torchrun --shutdown-timeout), or save faster"
            )

    def evaluate(self, epoch: int) -> str | None:
        """Measure the model after `epoch`, where that is due and not done yet; returns why to stop, if so."""
        every = self.config.eval.every_epochs
        if self.eval_loader is None or ((epoch + 1) % every and epoch + 1 < self.config.epochs):
            return None
        events = self.run_dir.timeline() if self.engine.topology.rank == 0 else []
        if self.engine.from_rank_0(any(e["event"] == "evaluation" and e["epoch"] == epoch for e in events)):
            return None
        found, reason = evaluate(self.task, self.engine, self.eval_loader, self.reporter)
        if found is None:
            return reason
        self.run_dir.log(
            "evaluation",
            attempt=self.run_dir.attempt,
            epoch=epoch,
            step=self.step,
            **found.metrics,
            rows=found.verdict.rows,
            exactly_once=found.verdict.exactly_once,
            time=time.time(),
        )
        self.run_dir.flush()
        self.reporter.track(self.step, **{f"eval/{name}": value for name, value in found.metrics.items()})
        self.say(f"epoch {epoch}: evaluation {found}")
        if not found.verdict.exactly_once:
            raise ProofError(f"evaluation after epoch {epoch}: {found.verdict}")
        return None

    def epoch(self, epoch: int) -> EpochEnd:
        """Train on the rows of one epoch from the loader's position on, save, and judge the epoch if it is whole.

        Raises:
            ProofError: some row did not train the model exactly once.
        """
        end, stop = self.steps(epoch)
        self.reporter.report()
        loss = self.reporter.mean_loss
        whole = self.loader.plan.steps(end) == 0
        if stop is not None:  # the digest goes into the checkpoint, and is judged when the epoch is over
            self.save(epoch, end)
            return EpochEnd(loss, None, whole, stop)
        verdict = self.proof.verdict(self.loader.order(epoch), end)
        self.run_dir.log(
            "epoch",
            attempt=self.run_dir.attempt,
            epoch=epoch,
            step=self.step,
            loss=loss if math.isfinite(loss) else None,
            rows=verdict.rows,
            missing=verdict.missing,
            duplicate=verdict.duplicate,
            left_out=verdict.left_out,
            excluded=verdict.excluded,
            exactly_once=verdict.exactly_once,
            time=time.time(),
        )
        mark = "exactly once" if verdict.exactly_once else "PROOF FAILED"
        self.say(f"epoch {epoch}: loss {loss:.6g}, lr {self.schedule.lr:.3g}, {self.step} steps, {mark}: {verdict}")
        if not verdict.exactly_once:
            raise ProofError(f"epoch {epoch}: {verdict}")
        if whole:
            self.proof.reset()
            self.reporter.reset_mean()
            self.save(epoch + 1, 0)
            if epoch + 1 < self.config.epochs:
                stop = self.reporter.stop_reason()
        else:  # max_steps ended the run inside the epoch
            self.save(epoch, end)
        return EpochEnd(loss, verdict, whole, stop)

    def steps(self, epoch: int) -> tuple[int, str | None]:
        """The optimizer steps of an epoch; returns the offset that was reached, and why to stop there, if so."""
        data, optim, every = self.config.data, self.config.optim, self.config.checkpoint.every_steps
        self.engine.model.train()
        self.loader.set_epoch(epoch)
        end: int = self.loader.state_dict()["offset"]
        for batch in transfer(self.loader, self.engine.device):
            if not self._warm:
                self.engine.warm_up(self.task, batch, data.micro_batch_size)
                self.engine.shorten_timeout()  # every rank has its data and its model now
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
            if self.step == self.config.max_steps or not self.loader.plan.steps(end):
                break
            saving = (every and self.step % every == 0) or (due is not None and due.save)
            if saving and due is None:
                due = self.reporter.report()
            if due is not None and due.stop is not None:
                return end, due.stop
            if saving:
                self.save(epoch, end)
            elif due is not None:
                self.note_saved()
        return end, None

    def save(self, epoch: int, offset: int) -> None:
        """Write a checkpoint from which a run goes on with `epoch` at `offset`; a collective call."""
        if self._saved_step == self.step:
            return
        started = time.monotonic()
        self.run_dir.flush()
        self.checkpoints.save(
            self.step,
            {
                "step": self.step,
                "epoch": epoch,
                "offset": offset,
                "global_batch_size": self.loader.plan.global_batch_size,
                "world_size": self.engine.topology.world_size,
                "num_workers": self.loader.num_workers,
                "engine": self.config.engine,
                "digest": self.proof.reduced_digest().state_dict(),
                "loss": self.reporter.mean_state(),
                "identity": self.identity,
            },
        )
        self.reporter.saved_at = time.monotonic()
        self._saved_step = self.step
        self._stalls[self.step] = self.reporter.saved_at - started
        self.note_saved()

    def note_saved(self) -> None:
        """Log the checkpoints that were published since the last time.

        `seconds` is what the training loop waited for one, `written` what it took to write.
        """
        for step, written in self.checkpoints.take_published():
            seconds = self._stalls.pop(step)
            self.run_dir.log(
                "checkpoint",
                attempt=self.run_dir.attempt,
                step=step,
                seconds=seconds,
                written=written,
                time=time.time(),
            )
            self.run_dir.flush()

    def resume(self) -> dict[str, Any]:
        """Go on from a checkpoint if there is one; returns the position, `epoch` and `offset`.

        Raises:
            ValueError: the checkpoint belongs to other data or another order of it.
        """
        asked = self.config.checkpoint.resume
        # Started again by the launcher, by the same command: what was asked for then, was done.
        path, damaged = self.checkpoints.choose("auto" if restarted(os.environ) else asked)
        if path is None and restarted(os.environ):
            path, _ = self.checkpoints.choose(asked)
        for what in damaged:
            self.say(f"damaged checkpoint passed over: {what}")
        if path is None:
            return {"epoch": 0, "offset": 0}
        state = self.checkpoints.load(path)
        before, now = state["identity"], self.identity
        differing = [
            f"{name} was {before.get(name)} and is {value}"
            for name, value in now.items()
            if json.dumps(before.get(name)) != json.dumps(value)  # by which a nan is a nan
        ]
        if differing:
            raise ValueError(
                f"{path} belongs to another run ({'; '.join(differing)}): going on from it would repeat rows and lose "
                f"others; give it the settings it was made with, or another --run.dir"
            )
        self.step = self._saved_step = int(state["step"])
        self.loader.load_state_dict({"epoch": state["epoch"], "offset": state["offset"]})
        self.proof.resume(state["digest"], state["offset"])
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
            engine=self.config.engine,
            global_batch_size=self.loader.plan.global_batch_size,
        )
        self.run_dir.flush()
        self.say(f"going on from {path}: step {self.step}, epoch {state['epoch']}")
        return {"epoch": int(state["epoch"]), "offset": int(state["offset"])}

    def say(self, text: str) -> None:
        """A line for whoever watches, from rank 0."""
        if self.engine.topology.rank == 0:
            print(text, flush=True)
