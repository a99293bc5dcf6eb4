"""A fault on one rank ends the whole job soon, with the cause on stderr and in `status.json`, and leaves nothing behind.

That no process stays behind is checked by `ranks` after every job.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from ranks import DDP_STREAM, Job, run, torchrun

from ddp_stream.order import BlockLayout, make_order

FAULTY = """
import os, signal, time
from ddp_stream.sources import SyntheticRegression
from ddp_stream.tasks import Regression
from torch.utils.data import get_worker_info

rank = int(os.environ["RANK"])

class Faulty(Regression):
    def __init__(self, fault: str):
        super().__init__()
        self.fault = fault

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        if (batch.epoch, batch.step) == (0, 3):
            if self.fault == "raise" and rank == 1:
                raise LookupError("the fault of this test")
            if self.fault == "kill" and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "nan":
                loss = loss * float("nan")
        return loss

class Busy(SyntheticRegression):
    '''Workers that are at it for ten minutes, from the second message on.'''
    def take(self, rows):
        if get_worker_info() is not None and rows.max() >= 4 * 64:
            time.sleep(600)
        return super().take(rows)

class Dying(SyntheticRegression):
    def take(self, rows):
        if get_worker_info() is not None and 500 in rows:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
        return super().take(rows)

class Unreadable(SyntheticRegression):
    def take(self, rows):
        if 500 in rows:
            raise OSError("row 500 cannot be read")
        return super().take(rows)
"""
BUSY = ["--data.source", "faulty.Busy", "--data.source.total_samples", "1000", "--data.shuffle", "none"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "faulty.py").write_text(FAULTY)
    return tmp_path


def train(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Job:
    return torchrun(DDP_STREAM, "train", "--run.dir", "run", *arguments, cwd=folder, env=env)


def status(folder: Path) -> tuple[str, int, str]:
    values = json.loads((folder / "run" / "status.json").read_text())
    return values["status"], values["step"], values["reason"]


def test_a_rank_that_raises(folder: Path) -> None:
    arguments = ["train", "--run.dir", "run", "--task", "faulty.Faulty", "--task.fault", "raise", *BUSY]
    job = torchrun("-m", "ddp_stream", *arguments, cwd=folder, cold=True)  # `ranks` gives it 60 s
    assert job.code == 1
    where = f"rank 1 on {socket.gethostname()}, step 3"
    assert f"[{where}] failed: LookupError: the fault of this test" in job.err
    assert "Traceback" in job.err
    assert 'raise LookupError("the fault of this test")' in job.err  # the line in the user's file
    assert status(folder) == ("failed", 3, f"{where}: LookupError: the fault of this test")
    # Once the cause is known nobody waits for workers, least of all for busy ones.
    assert job.ended - (folder / "run" / "status.json").stat().st_mtime < 10


def test_a_rank_that_is_killed(folder: Path) -> None:
    job = train(folder, "--task", "faulty.Faulty", "--task.fault", "kill", *BUSY)
    assert job.code == 1
    kind, _, reason = status(folder)
    assert kind == "failed"
    assert reason.startswith("rank 0 on ")  # by the one that is left, whose peer is gone
    assert job.ended - (folder / "run" / "status.json").stat().st_mtime < 10


def test_a_worker_that_raises(folder: Path) -> None:
    job = train(folder, "--data.source", "faulty.Unreadable", "--data.source.total_samples", "1000")
    assert job.code == 1
    position = make_order("full", BlockLayout(1000), seed=0, epoch=0).positions(np.array([500])).item()
    rank = position % 64 // 32  # rank 0 takes slots 0..31 of every step, rank 1 the others
    assert f"[rank {rank} on " in job.err
    assert "Caught OSError in DataLoader worker process" in job.err
    kind, _, reason = status(folder)
    assert kind == "failed"
    assert reason.startswith(f"rank {rank} on ")
    assert "row 500 cannot be read" in reason


def test_a_worker_that_is_killed(folder: Path) -> None:
    job = train(folder, "--data.source", "faulty.Dying", "--data.source.total_samples", "1000")
    assert job.code == 1
    kind, _, reason = status(folder)
    assert kind == "failed"
    # torch has two ways to notice.
    assert re.search(r"DataLoader worker \(pid.*\) (is killed by signal: Killed|exited unexpectedly)", reason)


def test_a_loss_that_is_not_a_number(folder: Path) -> None:
    job = train(folder, "--task", "faulty.Faulty", "--task.fault", "nan")
    assert job.code == 1
    assert "FloatingPointError: the loss of step 4 (epoch 0, lr 0.001) is nan" in job.err
    kind, _, reason = status(folder)
    assert kind == "failed"
    assert "the loss of step 4 (epoch 0, lr 0.001) is nan" in reason


def test_fewer_rows_in_a_step_than_ranks(folder: Path) -> None:
    job = train(folder, "--data.global_batch_size", "1")
    assert job.code == 1
    kind, step, reason = status(folder)
    assert (kind, step) == ("failed", 0)
    assert "global_batch_size=1 is smaller than world_size=2" in reason
    assert "use at least 2 rows per step, or fewer ranks" in job.err


def test_fewer_ranks_than_the_launcher_promised(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "status.json").write_text('{"status": "preempted", "step": 7, "reason": "an earlier attempt"}')
    job = train(folder, env={"DDP_STREAM_WORLD_SIZE": "3"})
    assert job.code == 1
    message = "DDP_STREAM_WORLD_SIZE=3 processes were promised by the launcher, but this one finds WORLD_SIZE=2"
    assert message in job.err
    kind, step, reason = status(folder)
    assert (kind, step) == ("failed", 0)  # and not what the earlier attempt left
    assert message in reason


def test_accelerate_launch_that_starts_one_process_for_two(folder: Path) -> None:
    command = ["accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "ddp_stream", "train"]
    job = run(*command, "--engine", "accelerate", "--run.dir", "run", cwd=folder)
    assert job.code == 1
    assert "accelerate launch was asked for several processes and started one" in job.err
    assert "launch/accelerate.sh" in job.err
    assert status(folder)[0] == "failed"
