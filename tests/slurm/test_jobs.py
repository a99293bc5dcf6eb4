"""The files in slurm/, submitted unchanged to a cluster of two nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster
from jobs import TWO_BY_TWO, submit

pytestmark = pytest.mark.slow


def test_three_launchers_at_once_train_every_row_exactly_once(cluster: Cluster, tmp_path: Path) -> None:
    gpus = ["--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2"]
    jobs = [
        submit(cluster, tmp_path, "torchrun.sbatch", TWO_BY_TWO, ["--epochs", "2"]),
        submit(cluster, tmp_path, "srun.sbatch", TWO_BY_TWO, ["--epochs", "2"]),
        submit(cluster, tmp_path, "accelerate.sbatch", gpus, ["--epochs", "2"], run="runs/accelerate"),
    ]
    for job in jobs:
        job.wait("COMPLETED")
        job.assert_done(1000, epochs=2)
        assert [(event["world_size"], event["num_workers"]) for event in job.events("start")] == [(4, 2)]
        assert sorted(path.name for path in (job.run / "logs").iterdir()) == ["n1.log", "n2.log"]
        assert "epoch 1: loss" in job.node_log("n1") + job.node_log("n2")
        assert "epoch 1: loss" not in job.log
    losses = [[event["loss"] for event in job.events("step")] for job in jobs]
    assert losses[0] == losses[1] == pytest.approx(losses[2])
    assert jobs[0].weights() == jobs[1].weights()
