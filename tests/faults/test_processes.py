"""Who gets a signal and who does not, and who ends with whom: ranks, their workers, and what these are started by."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from ranks import run_ranks, start

from ddp_stream import StreamLoader
from ddp_stream.sources import SyntheticRegression


def read_while_signalled(case: tuple[str, str]) -> list[int]:
    """Rows read by workers whose process group gets a signal as soon as they exist, and again when they read."""
    start_method, name = case
    got: list[int] = []
    signal.signal(getattr(signal, name), lambda number, _: got.append(number))
    loader = StreamLoader(SyntheticRegression(4000), 16, num_workers=2, multiprocessing_context=start_method)

    def strike() -> None:
        while len(multiprocessing.active_children()) < 2:
            time.sleep(0.001)
        os.killpg(0, getattr(signal, name))

    threading.Thread(target=strike).start()
    rows: list[int] = []
    for batch in loader:
        if not rows:
            os.killpg(0, getattr(signal, name))
        rows += batch.trained_rows.tolist()
    assert len(got) == 2
    return sorted(rows)


@pytest.mark.parametrize(
    "start_method", ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("spawn", "forkserver"))]
)
def test_workers_leave_stop_signals_to_their_rank(start_method: str) -> None:
    cases = [(start_method, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT")]
    ((*found,),) = run_ranks(read_while_signalled, 1, cases, group=False)
    assert found == [list(range(4000))] * len(cases)


@pytest.mark.slow
def test_ranks_whose_agent_dies_while_they_start(tmp_path: Path) -> None:
    arguments = ["--standalone", "--nproc_per_node=2", "-m", "ddp_stream", "train", "--epochs", "100"]
    job = start("torchrun", *arguments, cwd=tmp_path)
    try:
        limit = time.monotonic() + 60
        while len(job.processes()) < 3 and time.monotonic() < limit:
            time.sleep(0.01)
        ranks = {pid for pid in job.processes() if pid != job.pid}
        assert len(ranks) == 2
        # Before its first import a rank cannot know its parent; from then on it does, and torch is what takes seconds.
        while not all(_loads_torch(pid) for pid in ranks) and time.monotonic() < limit:
            time.sleep(0.005)
        os.kill(job.pid, signal.SIGKILL)
        while ranks & set(job.processes()) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not ranks & set(job.processes()), job.said()
    finally:
        job.kill()


def _loads_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
