"""The files in slurm/, submitted unchanged to a cluster of two nodes, by the README's commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cluster import ROOT, Cluster
from jobs import TWO_BY_TWO, Job, submit, together

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
# The container that the README starts: it notes what is run in it, and runs it.
APPTAINER = """#!/bin/bash
echo "$SLURMD_NODENAME: $*" >>"$SLURM_SUBMIT_DIR/contained"
while [[ $1 != *.sif ]]; do shift; done
exec "${@:2}"
"""


def readme(mark: str, cluster: Cluster, folder: Path, **env: str) -> list[str]:
    """Run a block of the README as it stands there, in a clone; returns the numbers of the jobs.

    Jobs note which rows they trained on: sbatch puts that behind their arguments, by a function of that name.
    """
    block = re.search(rf"<!-- test: slurm {mark} -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert block is not None
    for name in ("slurm", "launch"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    traced = 'sbatch() { command sbatch "$@" --audit.trace true; }\n'
    out = cluster.call("bash", "-euo", "pipefail", "-c", traced + block[1], cwd=folder, **env)
    return re.findall(r"Submitted batch job (\d+)", out)


def test_three_launchers_at_once_train_every_row_exactly_once(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apptainer").write_text(APPTAINER)
    (tmp_path / "bin" / "apptainer").chmod(0o755)
    torchrun, srun = readme("submit", cluster, tmp_path)
    (accelerate,) = readme("wrap", cluster, tmp_path, PATH=f"{tmp_path}/bin:{cluster.env['PATH']}")
    jobs = [
        Job(cluster, torchrun, tmp_path, tmp_path / "runs/first"),
        Job(cluster, srun, tmp_path, tmp_path / f"runs/slurm-{srun}"),
        Job(cluster, accelerate, tmp_path, tmp_path / f"runs/slurm-{accelerate}"),
    ]
    for job in jobs:
        job.wait("COMPLETED")
        job.assert_done(1000, epochs=2)
        assert [(event["world_size"], event["num_workers"]) for event in job.events("start")] == [(4, 2)]
        assert sorted(path.name for path in (job.run / "logs").iterdir()) == ["n1.log", "n2.log"]
        assert "epoch 1: loss" in job.node_log("n1") + job.node_log("n2")
        assert "epoch 1: loss" not in job.log
        assert Path(job.field("StdOut")) == tmp_path / f"ddp_stream-{job.number}.out"
    losses = [[event["loss"] for event in job.events("step")] for job in jobs]
    assert losses[0] == losses[1] == pytest.approx(losses[2])
    assert jobs[0].weights() == jobs[1].weights()
    contained = sorted((tmp_path / "contained").read_text().splitlines())
    start = f"exec --nv --bind {tmp_path} torch.sif "
    assert [line.startswith(f"{node}: {start}") for node, line in zip(("n1", "n2"), contained, strict=True)] == [
        True
    ] * 2


def test_the_tasks_of_an_array_share_nothing(cluster: Cluster, tmp_path: Path) -> None:
    (number,) = readme("sweep", cluster, tmp_path)
    tasks = [Job(cluster, f"{number}_{index}", tmp_path, tmp_path / f"runs/sweep-{index}") for index in range(1, 6)]
    warned = tasks[2]
    warned.wait_until(lambda: "attempt 0" in warned.log, "the batch script to begin", 60)
    warned.warn("--batch")
    together(*[lambda task=task: task.wait("COMPLETED", 200) for task in tasks])
    assert [task.field("Restarts") for task in tasks] == ["0", "0", "1", "0", "0"]
    for task, rate in zip(tasks, ["0.1", "0.03", "0.01", "0.003", "0.001"], strict=True):
        task.assert_done(1000, epochs=3)
        assert [event["world_size"] for event in task.events("start")] == [2] * (1 + (task is warned))
        assert re.search(rf"\blr: {re.escape(rate)}$", (task.run / "config.yaml").read_text(), re.MULTILINE)
    assert len({task.weights() for task in tasks}) == 5
    assert max(task.field("StartTime") for task in tasks if task is not warned) < min(
        task.field("EndTime") for task in tasks
    ), "they were to run at once"
    ports = [port for task in tasks for port in re.findall(r"head: n1, 127.0.0.1 port (\d+)", task.log)]
    assert len(ports) == len(set(ports)) == 6


def test_a_dry_run_prints_each_node_s_command_and_runs_nothing(cluster: Cluster, tmp_path: Path) -> None:
    expected = {
        "torchrun.sbatch": r"torchrun --nproc_per_node=2 --nnodes=2 .*=127.0.0.1:\d+ --rdzv_conf=is_host={host},",
        "accelerate.sbatch": r".*launch/accelerate.sh --nproc 2 .* --node-rank {rank} --head 127.0.0.1",
        "srun.sbatch": "python -m ddp_stream train --epochs 7",
    }
    assert sorted(expected) == sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch"))
    arguments = ["--dry-run", "train", "--epochs", "7"]
    jobs = [submit(cluster, tmp_path, name, TWO_BY_TWO, arguments, run=f"runs/{name}") for name in expected]
    alone = submit(cluster, tmp_path, "torchrun.sbatch", ["--ntasks=2"], arguments, run="runs/alone")
    for job, command in zip(jobs, expected.values(), strict=True):
        job.wait("COMPLETED")
        for node, rank, host in (("n1", 0, "true"), ("n2", 1, "false")):
            assert re.search(f"^node {node}.*: {command.format(rank=rank, host=host)}", job.log, re.MULTILINE), job.log
    alone.wait("COMPLETED")
    assert re.search("^node n.: torchrun --nproc_per_node=2 --standalone -m ddp_stream train", alone.log, re.MULTILINE)
    assert not (tmp_path / "runs").exists()
