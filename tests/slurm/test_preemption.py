"""Warned before the end: every way a warning comes, and what the job makes of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import ROWS, SLOW, STEPS, TWO_BY_TWO, Job, submit, together

pytestmark = pytest.mark.slow

ONE = ["--nodes=1", "--ntasks-per-node=1"]
# A signal that does nothing: it only marks the moment, with a file, and makes it last a second.
WHILE_SAVING = '{"at": "write", "step": 40, "rank": 0, "to": "agent", "signal": "SIGCONT"}'


def assert_preempted_and_done(job: Job) -> int:
    """It always stopped in good order, with one checkpoint of all ranks, and went on from there to the end.

    Returns how often.
    """
    job.wait("COMPLETED", 240)
    job.assert_done(ROWS)
    requeues = int(job.field("Restarts"))
    assert requeues > 0
    stops, starts, resumed = job.events("stop"), job.events("start"), job.events("resume")
    assert len(stops) == requeues, job.everything()
    assert [event["attempt"] for event in starts] == list(range(requeues + 1))
    assert [event["step"] for event in resumed] == [event["step"] for event in stops]
    for attempt, stop in enumerate(stops):
        ranks = starts[attempt]["world_size"]
        assert job.last_steps(attempt) == [stop["step"]] * ranks
        assert 0 < stop["step"] < STEPS
    # The first step that a requeued job takes is the one after the last: none was lost, none done twice.
    assert [event["step"] for event in job.events("step")] == list(range(1, STEPS + 1))
    return requeues


def assert_story(job: Job, requeues: int) -> None:
    """The batch log, of all attempts, says what happened in order; the logs of the nodes are appended to."""
    attempt = [
        rf"job {job.number}, attempt N, on 2 node\(s\): n1 n2; until ",
        r"code: .*, (commit \w+(, with changes)?|not in git)",
        rf"run directory: {re.escape(str(job.run.relative_to(job.folder)))}; logs: .*/NODE.log",
        r"head: n1, 127.0.0.1 port \d+",
        r"command: srun .*node.bash .* train ",
    ]
    stop = [r"warned|srun ended", r"preempted at step \d+: ", r"requeued, for the M\. time of at most 50"]
    story = []
    for number in range(requeues):
        story += [line.replace("N", str(number), 1) if "attempt N" in line else line for line in attempt]
        story += [line.replace("M", str(number + 1)) for line in stop]
    story += [line.replace("attempt N", f"attempt {requeues}") for line in attempt]
    story += ["srun ended with 0 after", f"done: {STEPS} steps, every row exactly once"]
    assert re.search(".*".join(story), job.log, re.DOTALL), job.log
    assert sorted(path.name for path in (job.run / "logs").iterdir()) == ["n1.log", "n2.log"]
    for node in ("n1", "n2"):
        text = job.node_log(node)
        places = [text.index(f"job {job.number}-{number}, node {node}") for number in range(requeues + 1)]
        assert places == sorted(places)


def test_a_warned_job_ends_with_the_same_weights(cluster: Cluster, tmp_path: Path, undisturbed: Job) -> None:
    """Warned by a signal to the steps, to the batch script, to both and again: as if nothing had been, bit for bit."""

    def start(script: str, run: str, *more: str) -> Job:
        return submit(cluster, tmp_path, script, TWO_BY_TWO, [*SLOW, *more], run=run)

    steps = start("torchrun.sbatch", "runs/steps", "--data.num_workers", "2")
    batch = start("accelerate.sbatch", "runs/batch")
    twice = start("srun.sbatch", "runs/twice")

    def warn_steps() -> None:
        steps.wait_for_step(20)
        steps.warn()
        assert assert_preempted_and_done(steps) == 1

    def warn_batch() -> None:
        batch.wait_for_step(20)
        batch.warn("--batch")
        assert assert_preempted_and_done(batch) == 1

    def warn_twice() -> None:
        twice.wait_for_step(20)
        twice.warn("--full")
        twice.warn("--batch")
        assert assert_preempted_and_done(twice) == 1

    together(warn_steps, warn_batch, warn_twice, lambda: undisturbed.wait("COMPLETED", 240))
    undisturbed.assert_done(ROWS)
    for job in (steps, batch, twice):
        assert_story(job, 1)
        assert job.weights() == undisturbed.weights()


def test_early_late_and_too_many_warnings(cluster: Cluster, tmp_path: Path, undisturbed: Job) -> None:
    early = submit(cluster, tmp_path, "torchrun.sbatch", TWO_BY_TWO, SLOW, run="runs/early")
    often = submit(cluster, tmp_path, "srun.sbatch", ONE, SLOW, run="runs/often", DDP_STREAM_MAX_REQUEUES="1")
    again = {"DDP_STREAM_FAULT": WHILE_SAVING}
    cancelled = submit(cluster, tmp_path, "srun.sbatch", TWO_BY_TWO, SLOW, run="runs/cancelled", **again)

    def warn_before_the_ranks_exist() -> None:
        early.wait_until(lambda: "attempt 0" in early.log, "the batch script to begin", 60)
        early.warn("--batch")
        assert not (early.run / "metrics.jsonl").exists()
        assert assert_preempted_and_done(early) == 1
        # One step is taken nevertheless: a job that is always warned early still comes to its end.
        assert [event["step"] for event in early.events("stop")] == [1]

    def warn_more_often_than_it_may_be_requeued() -> None:
        for attempt in range(2):
            often.wait_until(lambda: f"attempt {attempt}" in often.log, f"attempt {attempt}", 60)  # noqa: B023
            often.warn("--batch")
        often.wait("FAILED")
        assert often.field("Restarts") == "1"
        assert "not requeued: this job was requeued 1 times, DDP_STREAM_MAX_REQUEUES=1" in often.log
        assert [event["step"] for event in often.events("stop")] == [1, 2]

    def cancel_while_it_saves() -> None:
        cancelled.wait_until((cancelled.run / ".fault-write").exists, "half a checkpoint", 120)
        cluster.call("scancel", cancelled.number)
        cancelled.wait("CANCELLED")
        assert cancelled.field("Restarts") == "0"
        assert "SIGTERM: Slurm ends this job" in cancelled.log
        assert "requeued, for" not in cancelled.log
        # Started by hand, it goes on.
        later = submit(cluster, tmp_path, "srun.sbatch", TWO_BY_TWO, SLOW, run="runs/cancelled")
        later.wait("COMPLETED")
        later.assert_done(ROWS)
        assert [event["step"] >= 20 for event in later.events("resume")] == [True]
        undisturbed.wait("COMPLETED")
        assert later.weights() == undisturbed.weights()

    together(warn_before_the_ranks_exist, warn_more_often_than_it_may_be_requeued, cancel_while_it_saves)
    assert early.weights() == undisturbed.weights()


def test_a_job_longer_than_its_time_limit_comes_to_its_end(limited: Job, undisturbed: Job) -> None:
    requeues = assert_preempted_and_done(limited)
    assert_story(limited, requeues)
    assert limited.log.count("warned by SIGUSR1; the job would end at 20") >= requeues
    assert limited.weights() == undisturbed.weights()
