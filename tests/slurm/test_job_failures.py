"""What goes wrong on a cluster: a rank raises, a node dies, a program is missing."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

import pytest
from cluster import Cluster, running_cluster
from jobs import ROWS, SLOW, TWO_BY_TWO, submit, together

pytestmark = pytest.mark.slow


def test_a_rank_that_raises_ends_the_job_on_all_nodes(cluster: Cluster, tmp_path: Path) -> None:
    scripts = ["torchrun.sbatch", "srun.sbatch"]

    def raises(script: str) -> None:
        arguments = [*SLOW, "--task", "tasks.Raises", "--data.num_workers", "1"]
        job = submit(cluster, tmp_path, script, TWO_BY_TWO, arguments, run=f"runs/{script}")
        job.wait_until((job.run / "status.json").exists, "a rank to raise", 120)
        raised = time.time()
        job.wait("FAILED", 60)
        ended = re.findall(r"^(\S+ \S+) srun ended with", job.log, re.MULTILINE)
        assert len(ended) == 1
        assert time.mktime(time.strptime(ended[0], "%Y-%m-%d %H:%M:%S")) - raised < 60
        host = next(node for node in ("n1", "n2") if "the error of this test" in job.node_log(node))
        story = rf"failed at step 3: rank 2 on {host}, step 3: LookupError: .*the error of this test.*not requeued"
        assert re.search(story, job.log, re.DOTALL), job.log
        assert job.field("Restarts") == "0"
        assert not [pid for node in ("n1", "n2") for pid in cluster.processes_of(node, job.number)]

    together(*[lambda script=script: raises(script) for script in scripts])


def test_a_missing_scontrol_is_an_error_that_says_so(cluster: Cluster, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "env", "uname", "date"):
        (programs / name).symlink_to(f"/usr/bin/{name}")
    # sbatch itself is found before; the job inherits this.
    job = submit(cluster, tmp_path, "torchrun.sbatch", TWO_BY_TWO, [], run="runs/none", PATH=str(programs))
    job.wait("FAILED", 30)
    assert "torchrun.sbatch: scontrol, which knows nodes and files of this job, does not work on " in job.log
    assert not job.run.exists()


def test_a_launcher_that_fails_on_one_node_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """The other node's is ended by SIGTERM, which is no warning."""
    wrap = tmp_path / "wrap"
    wrap.write_text("#!/bin/bash\nif [[ $SLURM_NODEID == 0 ]]; then exit 3; fi\nexec sleep 100\n")
    wrap.chmod(0o755)
    job = submit(cluster, tmp_path, "torchrun.sbatch", TWO_BY_TWO, [], run="runs/none", DDP_STREAM_WRAP=str(wrap))
    job.wait("FAILED", 60)
    assert job.field("Restarts") == "0"
    assert "the ranks left no status.json: killed, or never begun" in job.log
    assert "not requeued: it failed" in job.log


def test_a_node_that_dies(tmp_path: Path) -> None:
    """Not that of the batch script: the job goes on with the node that is left."""

    def dies(node: str, other: str) -> None:
        (tmp_path / node).mkdir()
        # A cluster of its own: other jobs would die, too.
        with tempfile.TemporaryDirectory(prefix="slurm-") as folder, running_cluster(Path(folder)) as cluster:
            options = ["--nodes=1-2", "--ntasks-per-node=2"]
            job = submit(cluster, tmp_path / node, "torchrun.sbatch", options, SLOW)
            job.wait_for_step(40)
            cluster.kill_node(node)
            job.wait("COMPLETED", 200)
            job.assert_done(ROWS)
            assert job.field("Restarts") == "1"
            assert [event["world_size"] for event in job.events("start")] == [4, 2]
            assert [event["step"] >= 40 for event in job.events("resume")] == [True]
            assert f"attempt 1, on 1 node(s): {other}; until" in job.log
            if node == "n2":
                assert "to go on with 1 node(s), without n2" in job.log

    together(lambda: dies("n2", "n1"))
