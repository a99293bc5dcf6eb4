"""What the proof is for: each of these runs loses or repeats rows, and each must end with 1 and name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import DDP_STREAM, Job, torchrun

from ddp_stream.order import BlockLayout, make_order

# 1000 rows in steps of 64. The script changes something, and goes on as `python -m ddp_stream`.
BROKEN = """
import ddp_stream.training.loop as loop
from ddp_stream.__main__ import main
from ddp_stream.partition import GlobalBatchPlan

def steps(batches, device, real=loop.transfer):
    for batch in real(batches, device):
        yield from [batch] * times(batch)

def positions(self, *span, real=GlobalBatchPlan.positions):
    found, filled = real(self, *span)
    return shifted(found), filled

{change}
main()
"""
SKIP_A_STEP = "times = lambda batch: 0 if batch.step == 3 else 1; loop.transfer = steps"
REPEAT_A_STEP = "times = lambda batch: 2 if batch.step == 3 else 1; loop.transfer = steps"
SHIFT_POSITIONS = "shifted = lambda found: found - (found >= 500); GlobalBatchPlan.positions = positions"


def train(change: str, folder: Path, *arguments: str, cold: bool = False) -> Job:
    script = folder / "broken.py"
    script.write_text(BROKEN.format(change=change))
    return torchrun(str(script), "train", "--run.dir", "run", *arguments, cwd=folder, cold=cold)


def rows_at(start: int, end: int) -> list[int]:
    """The rows at these positions of epoch 0, by number."""
    order = make_order("full", BlockLayout(1000), seed=0, epoch=0)
    return sorted(order.rows(np.arange(start, end)).tolist())


def first_ten(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")


def check_failed(folder: Path, job: Job, missing: list[int], duplicate: list[int]) -> None:
    assert job.code == 1, job.err
    events = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs: list[dict[str, Any]] = [event for event in events if event["event"] == "epoch"]
    assert len(epochs) == 1  # it ends with the first epoch
    assert epochs[0]["exactly_once"] is False
    assert epochs[0]["rows"] == 1000 - len(missing) + len(duplicate)
    assert (epochs[0]["missing"], epochs[0]["duplicate"]) == (len(missing), len(duplicate))
    status = json.loads((folder / "run" / "status.json").read_text())
    assert status["status"] == "failed"
    for text in (status["reason"], job.out):
        assert f"{len(missing)} missing, {len(duplicate)} duplicate" in text
        assert f"missing rows {first_ten(missing)}" in text or not missing
        assert f"rows seen again {first_ten(duplicate)}" in text or not duplicate


def test_nothing_broken(tmp_path: Path) -> None:
    job = train("", tmp_path)
    assert job.code == 0, job.err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "done"


def test_a_skipped_step(tmp_path: Path) -> None:
    job = train(SKIP_A_STEP, tmp_path, "--audit.trace", "true", cold=True)
    skipped = rows_at(3 * 64, 4 * 64)
    check_failed(tmp_path, job, missing=skipped, duplicate=[])
    # The traces are written by other code than the proof, and say the same.
    traced = [json.loads(line) for file in (tmp_path / "run" / "trace").iterdir() for line in file.open()]
    assert len(traced) == 2 * 15  # ranks, steps
    seen = sorted(row for line in traced for row in line["rows"])
    assert sorted(seen + skipped) == list(range(1000))


def test_a_step_trained_twice(tmp_path: Path) -> None:
    job = train(REPEAT_A_STEP, tmp_path)
    check_failed(tmp_path, job, missing=[], duplicate=rows_at(3 * 64, 4 * 64))


def test_a_plan_that_repeats_a_position(tmp_path: Path) -> None:
    # Position 500 becomes 499, 501 becomes 500, ...: 499 is there twice, and 999 no more.
    job = train(SHIFT_POSITIONS, tmp_path)
    check_failed(tmp_path, job, missing=rows_at(999, 1000), duplicate=rows_at(499, 500))


SHORT_SOURCE = """
from ddp_stream.sources import SyntheticRegression

class Short(SyntheticRegression):
    def take(self, rows):
        columns = super().take(rows)
        return {name: column[:-1] if 500 in rows else column for name, column in columns.items()}
"""


def test_a_source_that_returns_fewer_rows(tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text(SHORT_SOURCE)
    arguments = ["--data.source", "short.Short", "--data.source.total_samples", "1000", "--run.dir", "run"]
    job = torchrun(DDP_STREAM, "train", *arguments, cwd=tmp_path)
    assert job.code == 1
    assert "DataError: Short(1000 rows): column 'features' has " in job.err
    assert "rows would be lost or invented" in job.err
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed"
    assert "DataError: Short(1000 rows): column 'features' has " in status["reason"]


PREPARED = """
import sys, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from ddp_stream import Batch, StreamingDataset, StreamLoader, Topology
from ddp_stream.audit import Proof
from ddp_stream.sources import InMemory

accelerator = Accelerator(cpu=not torch.accelerator.is_available())
source = InMemory({{"row": torch.arange(64)}})
stream = StreamLoader(source, 8, shuffle="none")
assert accelerator.prepare(stream) is stream
loader = {loader}
proof = Proof(stream.plan, Topology.detect())
for batch in loader:
    rows = batch["row"].cpu()
    proof.record(Batch({{}}, weight=torch.ones(len(rows)), rows=rows))
verdict = proof.verdict(stream.order(0))
accelerator.print(verdict)
sys.exit(0 if verdict.exactly_once else 1)
"""


@pytest.mark.parametrize(
    ("loader", "seen"),
    [
        ("stream", 64),
        ("DataLoader(StreamingDataset(source), batch_size=4)", 64),
        ("accelerator.prepare(stream)", 64),
        # Rank 0 reads its half of the rows, and accelerate deals that half to both ranks.
        ("accelerator.prepare(DataLoader(StreamingDataset(source), batch_size=4))", 32),
    ],
    ids=["StreamLoader", "DataLoader", "StreamLoader prepared", "DataLoader prepared"],
)
def test_accelerator_prepare(loader: str, seen: int, tmp_path: Path) -> None:
    script = tmp_path / "prepared.py"
    script.write_text(PREPARED.format(loader=loader))
    job = torchrun(str(script), cwd=tmp_path)
    assert job.code == (0 if seen == 64 else 1), job.err
    missing = ", ".join(map(str, range(32, 42)))
    failed = f"32 rows seen of 64: 32 missing, 0 duplicate; missing rows {missing}, ..."
    assert job.out == ("64 rows, each exactly once\n" if seen == 64 else failed + "\n")


def test_audit(tmp_path: Path) -> None:
    job = torchrun(DDP_STREAM, "audit", cwd=tmp_path)
    assert job.code == 0
    assert "rows per rank 512, 488\n  rows 1000  missing 0  duplicates 0  exactly once" in job.out
    # Both workers of a rank read all of its 500 rows.
    job = torchrun(DDP_STREAM, "audit", "--audit.broken", "true", cwd=tmp_path)
    assert job.code == 1
    assert "rows per rank 1000, 1000\n  rows 2000  missing 0  duplicates 1000  NOT exactly once" in job.out
    assert f"rows seen again {first_ten(list(range(1000)))}" in job.out
