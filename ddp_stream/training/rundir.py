"""The run directory: what a run leaves behind, in files that anything can read.

RUN/config.yaml      the whole resolved configuration; `train --config` takes it back
RUN/metrics.jsonl    one JSON object a line: start, step, epoch, ...
RUN/status.json      how it ended: done, preempted or failed
RUN/excluded.jsonl   rows that were left out on purpose, and why
RUN/trace/           with `--audit.trace true`: every row id of every step, a file a rank
RUN/model.safetensors
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from ddp_stream.batch import Batch

Status = Literal["done", "preempted", "failed"]


def choose_run_dir(requested: str | None, environ: Mapping[str, str]) -> Path:
    """The run directory; one of its own under `runs/` if none is asked for.

    Under torchrun its name ends in the launcher's run id, by which a restart of the same job finds it again.
    """
    if requested is not None:
        return Path(requested)
    launch = re.sub(r"[^\w.-]", "-", environ.get("TORCHELASTIC_RUN_ID", "none"))[:36]
    suffix = "" if launch == "none" else f"-{launch}"
    if suffix:
        earlier = sorted(Path("runs").glob(f"*{suffix}"))
        if earlier:
            return earlier[-1]
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}{suffix}"


def restarted(environ: Mapping[str, str]) -> bool:
    """Whether torchrun or Slurm started this run again by itself."""
    return any(int(environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


class RunDir:
    """Writes the files of one attempt. Rank 0 writes all but the traces and the report of a failure.

    Args:
        path: the directory; made if it is not there
        rank: this rank
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self.rank = rank
        self.attempt = 0
        self._metrics: IO[str] | None = None
        self._trace: IO[str] | None = None

    def open(self, config_yaml: str) -> int:
        """Make the directory and begin an attempt (rank 0 only); returns its number, from 0.

        Raises:
            OSError: the directory cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("config.yaml", "status.json", "model.safetensors"):
            for unfinished in self.path.glob(f".{name}.*"):  # by a process that was killed over it
                unfinished.unlink()
        events = read_metrics(self.path / "metrics.jsonl")
        self.attempt = sum(event.get("event") == "start" for event in events)
        (self.path / "status.json").unlink(missing_ok=True)
        write_atomically(self.path / "config.yaml", config_yaml)
        self._metrics = open_lines(self.path / "metrics.jsonl")
        return self.attempt

    def trace(self, batch: Batch, step: int) -> None:
        """Note the rows that this rank trained on in optimizer step `step`."""
        if self._trace is None:
            folder = self.path / "trace"
            folder.mkdir(exist_ok=True)
            self._trace = open_lines(folder / f"rank-{self.rank:05d}.jsonl")
        rows = batch.trained_rows.tolist()
        line = {"attempt": self.attempt, "epoch": batch.epoch, "step": step, "rows": rows}
        self._trace.write(json.dumps(line) + "\n")

    def list_excluded(self, excluded: Mapping[int, str]) -> str | None:
        """Write which rows are left out and why (rank 0), and return the first few; None if there are none."""
        if not excluded:
            return None
        if self.rank == 0:
            lines = [json.dumps({"row": row, "reason": reason}) + "\n" for row, reason in sorted(excluded.items())]
            (self.path / "excluded.jsonl").write_text("".join(lines))
        first = [f"row {row}: {reason[:100]}" for row, reason in sorted(excluded.items())[:3]]
        more = ["..."] if len(excluded) > 3 else []
        return f"{len(excluded)} rows are excluded, see {self.path}/excluded.jsonl ({'; '.join(first + more)})"

    def log(self, event: str, **values: Any) -> None:
        """Append an event to `metrics.jsonl` (rank 0 only)."""
        if self._metrics is not None:
            self._metrics.write(json.dumps({"event": event, **values}) + "\n")

    def timeline(self) -> list[Mapping[str, Any]]:
        """What `timeline` makes of the events so far."""
        self.flush()
        return timeline(read_metrics(self.path / "metrics.jsonl"))

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        for file in (self._metrics, self._trace):
            if file is not None:
                file.flush()

    def finish(self, status: Status, step: int, reason: str) -> None:
        """Write `status.json`."""
        self.flush()
        text = json.dumps({"status": status, "step": step, "reason": reason}) + "\n"
        write_atomically(self.path / "status.json", text)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The events in a `metrics.jsonl`; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text().splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def timeline(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events of the one run that made the weights: what a later attempt did again, or rolled back, is left out.

    Args:
        events: those of `read_metrics`, of all attempts
    """
    kept: list[Mapping[str, Any]] = []
    current: int | None = None
    for event in events:
        if "step" in event and event["attempt"] != current:
            current = event["attempt"]
            # Where this attempt begins: behind the checkpoint that it goes on from, or with its first step.
            last = event["step"] - (event["event"] != "resume")
            kept = [earlier for earlier in kept if earlier.get("step", 0) <= last]
        kept.append(event)
    return kept


def open_lines(path: Path) -> IO[str]:
    """Open a file of lines to append to; a last line that a crash cut short gets its end, and stays one of its own."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return path.open("a")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to; what is written takes the place of `path` at the end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
