"""torchrun starts a broken run again by itself, on fewer nodes too; and a rank that hangs does not hang the others."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from broken import SETTINGS, assert_as_untouched, assert_exactly_once, events, status
from ranks import DDP_STREAM, start_torchrun

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("asked", ["auto", "never"])
def test_torchrun_starts_a_killed_rank_again(asked: str, untouched: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = {"at": "forward", "step": 24, "rank": 1, "to": 1, "signal": "SIGKILL"}
    job = start_torchrun(
        *(DDP_STREAM, "train", *SETTINGS, "--run.dir", "run", "--checkpoint.resume", asked),
        options=["--standalone", "--nproc_per_node=2", "--max-restarts=2"],
        cwd=tmp_path,
        env={"DDP_STREAM_FAULT": json.dumps(fault)},
        cold=True,  # an agent with threads cannot fork ranks a second time
    ).wait()
    assert job.code == 0, job.err
    assert [(event["attempt"], event["step"]) for event in events(run, "resume")] == [(1, 20)]
    assert_as_untouched(run, untouched)


def test_torchrun_goes_on_with_the_node_that_is_left(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run = tmp_path / "run"
    endpoint = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=elastic"]
    options = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", *endpoint]
    conf = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3,is_host="
    agents = [
        start_torchrun(
            *(DDP_STREAM, "train", *SETTINGS, "--run.dir", "run", "--epochs", "20"),
            options=[*options, "--rdzv-conf", f"{conf}{'false' if node else 'true'}"],
            cwd=tmp_path,
            cold=True,
        )
        for node in (0, 1)
    ]
    try:
        limit = time.monotonic() + 90
        while not any(event["step"] >= 20 for event in events(run, "checkpoint")):
            assert time.monotonic() < limit, "\n".join(agent.said() for agent in agents)
            time.sleep(0.02)
        os.kill(agents[1].pid, signal.SIGKILL)  # its rank dies with it
        killed, left = agents[1].wait(90), agents[0].wait(90)
    finally:
        for agent in agents:
            agent.kill()
    assert (killed.code, left.code) == (-signal.SIGKILL, 0), left.err
    (resume,) = events(run, "resume")
    assert (resume["before"]["world_size"], resume["world_size"]) == (2, 1)
    assert status(run) == "done"
    assert_exactly_once(run, epochs=20)


def test_a_rank_that_hangs_does_not_hang_the_others(tmp_path: Path) -> None:
    fault = {"at": "forward", "step": 24, "rank": 1, "to": 1, "signal": "SIGSTOP"}
    job = start_torchrun(
        *(DDP_STREAM, "train", *SETTINGS, "--run.dir", "run", "--timeout_s", "4"),
        cwd=tmp_path,
        env={"DDP_STREAM_FAULT": json.dumps(fault)},
    )
    ended = job.wait(90)  # and leaves no process
    assert ended.code == 1
    reason = json.loads((tmp_path / "run" / "status.json").read_text())["reason"]
    assert reason.startswith(f"rank 0 on {socket.gethostname()}, step 24"), reason
    assert "another rank did not come within --timeout_s" in reason
    assert "Traceback" in ended.err
    (struck,) = (tmp_path / "run").glob(".fault-*")
    # torchrun gives the rank that hangs 30 s to end.
    assert (tmp_path / "run" / "status.json").stat().st_mtime - struck.stat().st_mtime < 20
