"""Every way to ask two ranks to stop: both stop after the same step, soon, with a checkpoint, and say why."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from broken import AS_LAUNCHED, SETTINGS, assert_no_leftovers, events, status
from ranks import DDP_STREAM, Job, Running, start_torchrun

from ddp_stream.training.manifest import find, verify

pytestmark = pytest.mark.slow

ENDLESS = [*SETTINGS, "--epochs", "100000", "--eval.every_epochs", "100000"]
SLOW = """
import time
from ddp_stream.tasks import Regression

class Slow(Regression):
    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def loss(self, model, batch):
        time.sleep(self.seconds)
        return super().loss(model, batch)
"""


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts the run that is to be stopped."""
    jobs = []

    def start(*arguments: str, env: Mapping[str, str] | None = None) -> Running:
        (tmp_path / "slow.py").write_text(SLOW)
        arguments = (DDP_STREAM, "train", *ENDLESS, "--run.dir", "run", *arguments)
        jobs.append(start_torchrun(*arguments, cwd=tmp_path, env={**AS_LAUNCHED, **(env or {})}))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def wait_until(condition: Callable[[], Any], job: Running) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert job.code() is None, job.said()
        assert time.monotonic() < limit, job.said()
        time.sleep(0.05)


def steps_done(run: Path) -> int:
    return max((event["step"] for event in events(run, "step")), default=0)


def ranks_of(job: Running) -> list[int]:
    """By rank, since torchrun starts them in this order."""
    return sorted(map(int, Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()))


def assert_stopped(run: Path, job: Job, reason: str, code: int = 0) -> dict[str, Any]:
    """Preempted for `reason`, with a whole checkpoint of the last step; returns the event."""
    (stop,) = events(run, "stop")
    assert stop["reason"].startswith(reason), job.err
    assert json.loads((run / "status.json").read_text()) == {
        "status": "preempted",
        "step": stop["step"],
        "reason": stop["reason"],
    }
    newest = find(run / "checkpoints")[-1]
    assert (newest.name, verify(newest)) == (f"step-{stop['step']:08d}", None)
    assert job.code == code, job.err
    assert_no_leftovers(run)
    return stop


@dataclass(frozen=True)
class Ask:
    """How to ask, of whom, and how torchrun then ends."""

    reason: str
    signal: signal.Signals | None = None
    to: str = ""
    code: int = 0
    arguments: list[str] = field(default_factory=list)
    env: Callable[[], dict[str, str]] = dict

    def __str__(self) -> str:
        return f"{self.reason} to {self.to}" if self.to else self.reason


# A torchrun that was signalled itself reports failure, however well its ranks ended.
ASKS = [
    Ask("SIGINT", signal.SIGINT, "rank 1"),
    Ask("SIGINT", signal.SIGINT, "agent", 1),
    Ask("SIGTERM", signal.SIGTERM, "rank 0"),
    Ask("SIGUSR1", signal.SIGUSR1, "agent", 1),
    Ask("STOP file in run"),
]


@pytest.mark.parametrize("ask", ASKS, ids=str)
def test_a_stop_is_acted_on_within_two_seconds(
    ask: Ask, begin: Callable[..., Running], tmp_path: Path, report: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    job = begin()
    wait_until(lambda: steps_done(run) > 1000, job)
    asked = time.time()
    if ask.signal is None:
        (run / "STOP").touch()
    else:
        os.kill(job.pid if ask.to == "agent" else ranks_of(job)[int(ask.to[-1])], ask.signal)
    ended = job.wait()
    (run / "STOP").unlink(missing_ok=True)
    stop = assert_stopped(run, ended, ask.reason, ask.code)
    saving = next(event["seconds"] for event in events(run, "checkpoint") if event["step"] == stop["step"])
    acted = stop["time"] - asked - saving
    report("stops: how, seconds until it was acted on, seconds of the checkpoint", ask, acted, f"{saving:.3f}")
    assert acted < 2
    if ask.to in ("agent", "rank 0"):  # which times it from the signal
        assert 0 < stop["seconds"] <= stop["time"] - asked + 0.01


def test_a_stop_is_acted_on_within_two_steps(begin: Callable[..., Running], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = begin("--task", "slow.Slow", "--task.seconds", "1.5")
    wait_until(lambda: steps_done(run) >= 2, job)
    done = steps_done(run)
    os.kill(ranks_of(job)[1], signal.SIGTERM)
    stop = assert_stopped(run, job.wait(), "SIGTERM (rank 1)")
    assert stop["step"] <= done + 2


def test_the_second_interrupt_of_a_rank_ends_it_at_once(begin: Callable[..., Running], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = begin("--task", "slow.Slow", "--task.seconds", "15")
    wait_until(lambda: "run directory" in job.said(), job)
    time.sleep(1)  # whatever it does by then, it is not done with a step of 15 s
    pid = ranks_of(job)[0]
    for _ in range(2):
        asked = time.time()
        os.kill(pid, signal.SIGINT)
        time.sleep(0.5)  # else the two are one
    ended = job.wait()  # torchrun gives the other rank, which sleeps, 30 s
    assert ended.code == 1
    assert status(run) == "failed"
    assert "KeyboardInterrupt" in json.loads((run / "status.json").read_text())["reason"]
    assert (run / "status.json").stat().st_mtime - asked < 3


def test_minutes_that_are_over(begin: Callable[..., Running], tmp_path: Path) -> None:
    job = begin("--max_minutes", "0.05")
    stop = assert_stopped(tmp_path / "run", job.wait(), "max_minutes=0.05 are over")
    assert stop["step"] > 0


def test_a_slurm_allocation_that_ends(begin: Callable[..., Running], tmp_path: Path) -> None:
    end = int(time.time()) + 65  # a minute is left for the checkpoint
    job = begin(env={"SLURM_JOB_END_TIME": str(end)})
    stop = assert_stopped(tmp_path / "run", job.wait(), "the Slurm allocation ends")
    assert stop["time"] >= end - 60


def test_saving_that_takes_more_than_half_of_what_torchrun_grants_is_a_warning(
    begin: Callable[..., Running], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = begin("--task", "slow.Slow", "--task.seconds", "1.5", env={"PET_SHUTDOWN_TIMEOUT": "3"})
    wait_until(lambda: steps_done(run) >= 1, job)
    limit = time.monotonic() + 60
    os.kill(job.pid, signal.SIGTERM)
    ended = job.wait(limit - time.monotonic())
    assert "more than half of the 3 s after which torchrun kills its ranks" in ended.out, ended.out
