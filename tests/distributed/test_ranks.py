"""The helper of the other tests fails when it should, with the reason, and leaves nothing behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run, run_ranks


def act(case: tuple[str, str]) -> int:
    kind, folder = case
    Path(folder, str(os.getpid())).touch()
    if kind == "raise" and dist.get_rank() == 1:
        raise LookupError("of this rank")
    if kind == "die" and dist.get_rank() == 1:
        os._exit(0)
    if kind == "hang" and dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()
    return dist.get_rank()


def test_results(tmp_path: Path) -> None:
    case = ("", str(tmp_path))
    assert run_ranks(act, 2, [case, case, case]) == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("raise", r"rank 1 of 2:\nTraceback(.|\n)*LookupError: of this rank"),
        ("die", r"rank 1 of 2:\nended without an answer"),
        ("hang", r"rank 1 of 2:\nTimeout(.|\n)*in act"),
    ],
)
def test_a_rank_that_fails(kind: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=reason):
        run_ranks(act, 2, [(kind, str(tmp_path))], timeout_s=1)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)  # neither running nor a zombie


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are found in /proc")
def test_a_job_that_leaves_a_process_behind(tmp_path: Path) -> None:
    script = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    with pytest.raises(AssertionError, match="processes left behind") as caught:
        run("python", "-c", script, cwd=tmp_path)
    pid = int(str(caught.value).splitlines()[1])
    assert not Path(f"/proc/{pid}").exists() or "zombie" in Path(f"/proc/{pid}/status").read_text()
