"""When to stop before the end: signals, a STOP file, a wall-clock limit, the end of the Slurm allocation.

A rank only notes that it was asked. All ranks together decide, at steps that they agree on, so that all stop after
the same step and the checkpoint is one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

_SLURM_MARGIN_S = 60.0


class StopRequest:
    """Whether this rank was asked to stop, and by what.

    SIGTERM and SIGUSR1 ask; SIGINT asks once and interrupts the second time. As a context manager it installs the
    handlers, and puts the former ones back.

    Args:
        run_dir: where a file named `STOP` asks to stop
        max_minutes: minutes from now; None sets no limit
        environ: `SLURM_JOB_END_TIME`, if there, is taken with a minute to spare; `DDP_STREAM_STOP_FILE` names one more
            file that asks to stop, and may hold the reason
    """

    def __init__(self, run_dir: Path, max_minutes: float | None, environ: Mapping[str, str]) -> None:
        self.reason: str | None = None
        self.asked_at: float | None = None
        """When this rank got a signal, by `time.monotonic()`."""
        self._files = [run_dir / "STOP"]
        if environ.get("DDP_STREAM_STOP_FILE"):
            self._files.append(Path(environ["DDP_STREAM_STOP_FILE"]))
        self._limits: list[tuple[float, str]] = []
        if max_minutes is not None:
            self._limits.append((time.time() + 60 * max_minutes, f"max_minutes={max_minutes:g} are over"))
        if environ.get("SLURM_JOB_END_TIME", "").isdigit():
            end = int(environ["SLURM_JOB_END_TIME"]) - _SLURM_MARGIN_S
            self._limits.append((end, "the Slurm allocation ends"))
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python handles signals in the main thread; training in another one leaves them to whoever has that.
        main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) if main else ():
            self._former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        if self.reason is None:
            self.reason, self.asked_at = signal.Signals(number).name, time.monotonic()

    def requested(self) -> bool:
        """Whether this rank was asked to stop by now."""
        if self.reason is None:
            now = time.time()
            over = [reason for end, reason in self._limits if now >= end]
            if over:
                self.reason = over[0]
            else:
                self.reason = next(filter(None, map(_reason, self._files)), None)
        return self.reason is not None


def _reason(file: Path) -> str | None:
    """What a file that asks to stop says; None if it is not there."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    except OSError:  # a directory of that name, or one that may not be read
        lines = []
    return lines[0] if lines else f"{file.name} file in {os.fspath(file.parent)}"
