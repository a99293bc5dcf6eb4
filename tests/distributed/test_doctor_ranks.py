"""The doctor under torchrun, and on processes that disagree: what every rank finds comes together on rank 0."""

from __future__ import annotations

from pathlib import Path

from ranks import DDP_STREAM, torchrun

WELL = ["--data.num_workers", "1"]


def test_two_ranks_and_nothing_wrong(tmp_path: Path) -> None:
    job = torchrun(DDP_STREAM, "doctor", *WELL, cwd=tmp_path)
    assert job.code == 0, job.out + job.err
    assert "doctor: nothing found" in job.out
    assert "2 rank(s) on 1 machine(s), torchrun" in job.out
    assert "right sum" in job.out
    assert "slowest pair rank 0 on" in job.out
    assert list(tmp_path.iterdir()) == []  # no trace


def test_what_one_rank_finds_is_known_to_all(tmp_path: Path) -> None:
    # A source that is not the same on all ranks, and a promise that the launcher did not keep.
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "from ddp_stream.sources import SyntheticRegression\n"
        "class Mine(SyntheticRegression):\n"
        "    def __init__(self):\n"
        "        super().__init__(1000, seed=int(os.environ['RANK']))\n"
        "    def fingerprint(self):\n"
        "        return f'seed {self.seed}'\n"
    )
    environment = {"DDP_STREAM_WORLD_SIZE": "4", "PYTHONPATH": str(tmp_path)}
    job = torchrun(DDP_STREAM, "doctor", *WELL, "--data.source", "mine.Mine", cwd=tmp_path, env=environment)
    assert job.code == 1
    lines = [line for line in job.out.splitlines() if line.startswith("FATAL  ")]
    assert len(lines) == 2, job.out
    assert lines[0].startswith("FATAL  world size: DDP_STREAM_WORLD_SIZE=4")
    assert "FATAL  data: rank 1 on" in lines[1]
    assert "fingerprint seed 1, where the others see 1000 rows, seed 0 -> " in lines[1]
    assert "doctor: 2 fatal, 0 to mind" in job.out
