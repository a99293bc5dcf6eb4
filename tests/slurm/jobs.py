"""Jobs of the test cluster: submit the shipped files unchanged, and look at what they leave."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster import ROOT, Cluster

TWO_BY_TWO = ["--nodes=2", "--ntasks-per-node=2"]

# A step that takes long enough for a test to come between. The weights are those of Regression.
TASKS = """
import os, time
from ddp_stream.tasks import Regression

class Slow(Regression):
    def loss(self, model, batch):
        time.sleep(float(os.environ.get("TEST_DELAY_S", "0.05")))
        return super().loss(model, batch)

class Raises(Regression):
    def loss(self, model, batch):
        if batch.step == 3 and os.environ.get("RANK", os.environ["SLURM_PROCID"]) == "2":
            raise LookupError("the error of this test")
        return super().loss(model, batch)
"""
STEPS = 200
ROWS = 64 * STEPS
SLOW = [
    *("--task", "tasks.Slow", "--data.source", "ddp_stream.sources.SyntheticRegression"),
    *("--data.source.total_samples", str(ROWS), "--epochs", "1", "--checkpoint.every_steps", "20"),
    *("--data.num_workers", "0"),  # which spares half of the processes
]


class Job:
    """One job, or one task of an array.

    Args:
        cluster: where it runs
        number: what sbatch printed, with `_TASK` in an array
        folder: where it was submitted
        run: its run directory
    """

    def __init__(self, cluster: Cluster, number: str, folder: Path, run: Path) -> None:
        self.cluster = cluster
        self.number = number
        self.folder = folder
        self.run = run

    def field(self, name: str) -> str:
        """A field of Slurm's record, as `scontrol show job` prints it."""
        record = self.cluster.call("scontrol", "show", "job", "-o", self.number)
        return record.split(f" {name}=", 1)[1].split(" ", 1)[0]

    @property
    def log(self) -> str:
        """The batch log."""
        path = Path(self.field("StdOut"))
        return path.read_text() if path.exists() else ""

    def node_log(self, node: str) -> str:
        """What the ranks on a node printed."""
        return (self.run / "logs" / f"{node}.log").read_text()

    def wait(self, state: str, timeout: float = 120) -> None:
        """Until the job's last attempt has ended, which must be with `state`."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}  # after NODE_FAIL it is requeued
        self.wait_until(lambda: self.field("JobState") in ends, f"the job to end with {state}", timeout)
        assert self.field("JobState") == state, self.everything()

    def wait_for_step(self, step: int) -> None:
        """Until a checkpoint of this step, or a later one, is there."""
        folder = self.run / "checkpoints"
        self.wait_until(lambda: any(int(path.name[5:]) >= step for path in folder.glob("step-*")), f"step {step}", 120)

    def wait_until(self, true: Callable[[], bool], what: str, timeout: float) -> None:
        """Until something comes true, or an error with the logs."""
        limit = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < limit, f"not within {timeout:g} s: {what}\n{self.everything()}"
            time.sleep(0.2)

    def everything(self) -> str:
        """All logs, for an error message."""
        logs = [path.read_text()[-3000:] for path in sorted((self.run / "logs").glob("*.log"))]
        return "\n".join([self.cluster.call("scontrol", "show", "job", self.number), self.log, *logs])

    def status(self) -> dict[str, Any]:
        """`status.json`."""
        found: dict[str, Any] = json.loads((self.run / "status.json").read_text())
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of this kind in `metrics.jsonl`."""
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def weights(self) -> bytes:
        """The final weights."""
        return (self.run / "model.safetensors").read_bytes()

    def warn(self, *how: str) -> None:
        """`scancel --signal=USR1`, with more options."""
        self.cluster.call("scancel", "--signal=USR1", *how, self.number)

    def last_steps(self, attempt: int) -> list[int]:
        """The last step of every rank in an attempt, by its trace."""
        last = []
        for path in sorted((self.run / "trace").glob("*.jsonl")):
            lines = map(json.loads, path.read_text().splitlines())
            last.append(max(line["step"] for line in lines if line["attempt"] == attempt))
        return last

    def assert_done(self, rows: int, epochs: int = 1) -> None:
        """It is done, and every epoch is proven."""
        assert self.status()["status"] == "done", self.everything()
        proofs = [(event["epoch"], event["rows"], event["exactly_once"]) for event in self.events("epoch")]
        assert proofs == [(epoch, rows, True) for epoch in range(epochs)]
        # The traces say so without our arithmetic: of a step that was done again, the last attempt counts.
        steps: dict[tuple[int, int], dict[int, list[int]]] = {}
        for path in (self.run / "trace").glob("*.jsonl"):
            for text in path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue  # cut short by a kill; the step was done again
                attempts = steps.setdefault((line["epoch"], line["step"]), {})
                attempts.setdefault(line["attempt"], []).extend(line["rows"])
        for epoch in range(epochs):
            seen = [row for (e, _), attempts in steps.items() if e == epoch for row in attempts[max(attempts)]]
            assert sorted(seen) == list(range(rows))


def submit(
    cluster: Cluster,
    folder: Path,
    script: str,
    options: list[str],
    arguments: list[str],
    *,
    run: str | None = None,
    **env: str,
) -> Job:
    """Submit `slurm/SCRIPT` as it is.

    Args:
        cluster: where
        folder: the directory to submit from
        script: name of the file
        options: of sbatch
        arguments: of `ddp_stream train`
        run: the run directory; None leaves it to the script
        env: additions to the environment of sbatch
    """
    (folder / "tasks.py").write_text(TASKS)
    asked = [] if run is None else ["--run.dir", run]
    command = ["sbatch", "--parsable", *options, str(ROOT / "slurm" / script), *arguments, "--audit.trace", "true"]
    number = cluster.call(*command, *asked, cwd=folder, **env).strip()
    return Job(cluster, number, folder, folder / (run or f"runs/slurm-{number}"))


def together(*stories: Callable[[], None]) -> None:
    """Run them side by side, for most of their time is waiting; raises what the first one that failed raised."""
    with ThreadPoolExecutor(len(stories)) as pool:
        for future in [pool.submit(story) for story in stories]:
            future.result()
