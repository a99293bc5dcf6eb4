"""A signal to each kind of process at the worst moments, and the same command again.

The second run must end as one that nobody touched. All is torchrun with 2 ranks x 2 workers over gloo. Its agent gets
the settings that launch/ and slurm/ give it, by which it passes SIGUSR1 on to the ranks; how it dies of that signal
without them is in the rows that say so.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
from broken import AS_LAUNCHED, SETTINGS, STEPS, assert_as_untouched, events, shared_memory, status
from ranks import DDP_STREAM, Job, start_torchrun

# Where: the fault's name, its step, and from which checkpoints a killed run goes on: without and with async_save, which
# may not be done with one when the process dies some steps later.
MOMENTS = {
    "loading": ("loading", 4, {38}, {30, 38}),  # a worker's first message of the second epoch
    "forward": ("forward", 24, {20}, {10, 20}),
    "backward": ("backward", 25, {20}, {10, 20}),
    "writing": ("write", 30, {20}, {20}),
    "renamed": ("after rename", 30, {30}, {30}),  # and not yet synced, nor older ones removed
    "last step": ("forward", STEPS - 1, {30}, {20, 30}),  # of the first epoch
    "evaluation": ("evaluation", STEPS, {38}, {30, 38}),
}


@dataclass(frozen=True)
class Cell:
    """One way to break a run."""

    signal: str
    victim: str
    moment: str
    background: bool = False  # --checkpoint.async_save true
    plain: bool = False  # torchrun without the settings of launch/

    def __str__(self) -> str:
        extra = ", async" * self.background + ", bare torchrun" * self.plain
        return f"{self.signal} to {self.victim}, {self.moment}{extra}"

    @property
    def lethal(self) -> bool:
        return self.signal == "SIGKILL" or (self.plain and self.signal == "SIGUSR1")

    @property
    def fault(self) -> str:
        at, step, _, _ = MOMENTS[self.moment]
        # Only rank 0 publishes. Else the second rank is hit, or has its worker hit, where it is.
        rank = 0 if self.moment == "renamed" or self.victim in ("rank 0", "agent") else 1
        to = int(self.victim[-1]) if self.victim.startswith("rank") else self.victim
        return json.dumps({"at": at, "step": step, "rank": rank, "to": to, "signal": self.signal})


@dataclass(frozen=True)
class Broken:
    """What the first run did."""

    job: Job
    status: str
    again: Job
    seconds: float
    left: set[str]


SIGNALS, VICTIMS = ["SIGKILL", "SIGTERM", "SIGUSR1"], ["rank 0", "rank 1", "worker", "agent"]
CELLS = [Cell(*names) for names in product(SIGNALS, VICTIMS, MOMENTS)]
CELLS += [
    Cell(sent, victim, moment, background=True)
    for sent, moment in product(SIGNALS, ["forward", "writing", "renamed", "evaluation"])
    for victim in (VICTIMS if sent == "SIGKILL" else ["rank 1", "agent"])
]
CELLS += [Cell("SIGUSR1", "agent", moment, plain=True) for moment in ("forward", "writing", "evaluation")]
QUICK = [Cell("SIGKILL", "agent", "writing"), Cell("SIGTERM", "rank 1", "forward", True)]


def strike(cell: Cell, folder: Path) -> Broken:
    started = time.monotonic()
    before = shared_memory()
    arguments = [DDP_STREAM, "train", *SETTINGS, "--run.dir", "run", "--checkpoint.async_save", str(cell.background)]
    env = {} if cell.plain else AS_LAUNCHED
    job = start_torchrun(*arguments, cwd=folder, env={**env, "DDP_STREAM_FAULT": cell.fault}).wait()
    first = status(folder / "run")
    again = start_torchrun(*arguments, cwd=folder, env=env).wait()
    return Broken(job, first, again, time.monotonic() - started, shared_memory() - before)


@pytest.fixture(scope="module")
def cells(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """All cells that were asked for, three at a time, since most of their time is waiting."""
    wanted = [item.callspec.params["cell"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(3) as pool:
        folders = {cell: tmp_path_factory.mktemp("cell") for cell in wanted}
        running = {cell: (folder, pool.submit(strike, cell, folder)) for cell, folder in folders.items()}
        yield running
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, id=str(cell), marks=() if cell in QUICK else pytest.mark.slow) for cell in CELLS]
)
def test_the_same_command_again(cell: Cell, cells: dict, untouched: Path, report: Callable[..., None]) -> None:
    folder, running = cells[cell]
    broken = running.result()
    run = folder / "run"
    resumed = [event["step"] for event in events(run, "resume")]
    report(
        "the kill matrix: what was hit at which step, how that run ended, from where the next one went on, seconds of both",
        *(cell, f"step {MOMENTS[cell.moment][1]}", f"exit {broken.job.code}", broken.status, *resumed, broken.seconds),
    )
    output = f"{broken.job.err}\n{broken.again.err}"
    assert len(list(run.glob(".fault-*"))) == 1  # it happened
    assert broken.again.code == 0, output
    _, _, *checkpoints = MOMENTS[cell.moment]
    if cell.victim == "worker" and not cell.lethal:  # these signals are the rank's business
        assert (broken.job.code, broken.status, resumed) == (0, "done", [2 * STEPS])
    elif not cell.lethal:
        (stop,) = events(run, "stop")
        assert broken.status == "preempted", output
        assert resumed == [stop["step"]]
        assert MOMENTS[cell.moment][1] < stop["step"] < 2 * STEPS
        assert cell.signal in stop["reason"]
        # torchrun that was signalled itself reports failure, however well its ranks ended.
        assert broken.job.code == (1 if cell.victim == "agent" else 0)
    else:
        assert set(resumed) <= checkpoints[cell.background], output
        assert len(resumed) == 1
        killed = -signal.Signals[cell.signal].value
        assert (broken.status, broken.job.code) == (("none", killed) if cell.victim == "agent" else ("failed", 1))
    assert broken.left == set()
    assert_as_untouched(run, untouched)
    assert not re.search("Traceback", broken.again.err), broken.again.err
