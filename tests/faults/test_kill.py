"""Killed and started again by the same command, a run ends with the bits it would have had, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROWS = 40_000  # 625 steps of 64 rows an epoch
TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone"]
SETTINGS = [
    *("--data.source", "ddp_stream.sources.SyntheticRegression", "--data.source.total_samples", str(ROWS)),
    *("--data.shuffle", "full", "--epochs", "2", "--checkpoint.every_steps", "50", "--audit.trace", "true"),
]


def start(folder: Path, ranks: int = 2) -> subprocess.Popen[bytes]:
    command = [*TORCHRUN, f"--nproc_per_node={ranks}", "-m", "ddp_stream", "train", *SETTINGS, "--run.dir", str(folder)]
    log = folder.with_suffix(".log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(folder: Path, ranks: int = 2) -> None:
    assert start(folder, ranks).wait(120) == 0, folder.with_suffix(".log").read_text()[-3000:]


def wait_for_step(folder: Path, step: int) -> None:
    limit = time.monotonic() + 90
    checkpoints = folder / "checkpoints"
    while time.monotonic() < limit:
        if checkpoints.is_dir() and any(int(path.name[5:]) >= step for path in checkpoints.glob("step-*")):
            return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of step {step}: {folder.with_suffix('.log').read_text()[-3000:]}")


def processes(folder: Path) -> dict[int, list[str]]:
    """Processes of this run that are alive: the agent, the ranks, and their workers."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_text().split("\0")
            alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            continue
        if str(folder) in command and alive:
            found[int(entry.name)] = command
    return found


def ranks_of(agent: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return sorted(map(int, children))


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def assert_same(folder: Path, untouched: Path) -> None:
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    assert (folder / "model.safetensors").read_bytes() == (untouched / "model.safetensors").read_bytes()
    assert [event["exactly_once"] for event in events(folder, "epoch")] == [True, True]
    # The traces say the same without our arithmetic: of a step done again, the highest attempt counts.
    steps: dict[tuple[int, int], dict[int, list[int]]] = {}
    for path in (folder / "trace").glob("*.jsonl"):
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # cut short by the kill; the step was done again
            steps.setdefault((line["epoch"], line["step"]), {}).setdefault(line["attempt"], []).extend(line["rows"])
    for epoch in (0, 1):
        rows = [row for (e, _), attempts in steps.items() if e == epoch for row in attempts[max(attempts)]]
        assert sorted(rows) == list(range(ROWS))


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "untouched"
    finish(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=lambda sent: sent.name)
@pytest.mark.parametrize("victim", ["agent", "rank 0", "rank 1"])
def test_killed_and_started_again(sent: signal.Signals, victim: str, untouched: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    agent = start(folder)
    wait_for_step(folder, 100)
    os.kill(agent.pid if victim == "agent" else ranks_of(agent)[int(victim[-1])], sent)
    agent.wait(60)
    limit = time.monotonic() + 10
    while processes(folder) and time.monotonic() < limit:
        time.sleep(0.1)
    assert processes(folder) == {}
    if sent == signal.SIGTERM:
        assert json.loads((folder / "status.json").read_text())["status"] == "preempted"
    finish(folder)
    assert events(folder, "resume")
    assert_same(folder, untouched)
    assert not list(Path("/dev/shm").glob("torch_*"))
