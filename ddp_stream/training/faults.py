"""Faults on demand, for tests of what happens when a process dies at the worst moment.

    DDP_STREAM_FAULT='{"at": "forward", "step": 120, "rank": 1, "to": "agent", "signal": "SIGKILL"}'

`at` names the moment: `loading` (the `step`-th message of a worker), `forward` (inside the loss of optimizer step
`step`, from 0), `backward`, `write` (half of this rank's tensors are in the file; `step` as in its name), `before NAME`
or `after NAME` for a step of `Checkpoints.publish_steps`, or `evaluation`. It happens in rank `rank`; `to` is who gets
the signal: a rank on this host by its number, `worker` (one of the rank's own), or `agent` (the rank's parent). Every
fault happens once in the life of a run directory, and without the variable nothing of this is in the way.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddp_stream.training.loop import Training

VARIABLE = "DDP_STREAM_FAULT"
_LINGER_S = 1.0


class Fault:
    """One fault; picklable, so that workers carry it along.

    Args:
        fault: as in the variable
        pids: of all ranks
        folder: where a file notes that it happened
    """

    def __init__(self, fault: dict[str, Any], pids: list[int], folder: Path) -> None:
        self.fault = fault
        self._pids: dict[Any, int] = {"agent": os.getppid(), **dict(enumerate(pids))}
        self._done = folder / f".fault-{fault['at'].replace(' ', '-')}"

    def strike(self) -> None:
        """Send the signal, unless it was sent before."""
        try:
            self._done.touch(exist_ok=False)
        except FileExistsError:
            return
        number = getattr(signal, self.fault["signal"])
        victim = self._pids.get(self.fault["to"])
        if victim is None:
            workers = multiprocessing.active_children()
            victim = next((worker.pid for worker in workers if worker.pid), os.getpid())
        os.kill(victim, number)
        time.sleep(_LINGER_S)  # so that a death elsewhere finds this process at this place


class _Loading:
    """A transform that strikes at a worker's `step`-th message."""

    def __init__(self, fault: Fault, transform: Any) -> None:
        self._fault = fault
        self._transform = transform
        self._messages = 0

    def __call__(self, columns: Any) -> Any:
        if self._messages == self._fault.fault["step"]:
            self._fault.strike()
        self._messages += 1
        return columns if self._transform is None else self._transform(columns)


class _Stream:
    """A file of which one half is written when the fault strikes."""

    def __init__(self, fault: Fault, stream: Any) -> None:
        self._fault = fault
        self._stream = stream

    def write(self, content: bytes) -> int:
        half = len(content) // 2
        self._stream.write(content[:half])
        self._stream.flush()
        self._fault.strike()
        self._stream.write(content[half:])
        return len(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def arm(training: Training, text: str) -> None:
    """Put the fault of the environment variable, `text`, at its place.

    Raises:
        ValueError: there is no such place.
    """
    fault = Fault(json.loads(text), training.engine.from_all_ranks(os.getpid()), training.run_dir.path)
    at, step = fault.fault["at"], fault.fault.get("step")
    if training.engine.topology.rank != fault.fault.get("rank", 0):
        return
    if at == "loading":
        reader = training.loader._reader
        reader.transform = _Loading(fault, reader.transform)
    elif at == "forward":
        _before(training.task, "loss", fault, lambda: training.step == step)
    elif at == "backward":
        _before(training.engine, "_backward", fault, lambda: training._warm and training.step == step)
    elif at == "evaluation":
        _before(training.task, "metrics", fault, lambda: True)
    elif at == "write":
        _in_file(training, fault)
    elif at.startswith(("before ", "after ")):
        _publishing(training, fault, *at.split(" ", 1))
    else:
        raise ValueError(f"{VARIABLE}: there is no place called {at!r}")


def _before(owner: Any, name: str, fault: Fault, when: Callable[[], bool]) -> None:
    original = getattr(owner, name)

    def struck(*arguments: Any, **named: Any) -> Any:
        if when():
            fault.strike()
        return original(*arguments, **named)

    vars(owner)[name] = struck


def _in_file(training: Training, fault: Fault) -> None:
    original = training.checkpoints._writer

    def writer(unfinished: Path, files: Any) -> Any:
        if unfinished.name.endswith(f"step-{fault.fault['step']:08d}"):
            create = files.create_stream

            @contextlib.contextmanager
            def create_stream(path: Any, mode: str) -> Generator[Any, None, None]:
                with create(path, mode) as stream:
                    yield _Stream(fault, stream)

            files.create_stream = create_stream
        return original(unfinished, files)

    vars(training.checkpoints)["_writer"] = writer


def _publishing(training: Training, fault: Fault, when: str, where: str) -> None:
    original = training.checkpoints.publish_steps

    def publish_steps(*arguments: Any) -> list[tuple[str, Callable[[], None]]]:
        steps = original(*arguments)
        if arguments[1].name != f"step-{fault.fault['step']:08d}":
            return steps
        index = [name for name, _ in steps].index(where)
        steps.insert(index + (when == "after"), ("fault", fault.strike))
        return steps

    vars(training.checkpoints)["publish_steps"] = publish_steps
