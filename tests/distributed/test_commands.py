"""The commands as a user meets them: each in a process of its own, with its exit code and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import safetensors.torch
from ranks import ddp_stream

MY_TASK = """
from ddp_stream import Task
from torch import nn

class MyTask(Task):
    def __init__(self, width: int = 8):
        self.width = width

    def build_model(self):
        return nn.Sequential(nn.Linear(4, self.width), nn.Linear(self.width, 1))

    def loss(self, model, batch):
        return (model(batch["features"]) - batch["label"]).square().mean(dim=1)
"""


def train(folder: Path, *arguments: str) -> str:
    """Train with two workers into `folder/run`; returns what it printed."""
    job = ddp_stream("train", "--run.dir", "run", *arguments, cwd=folder)
    assert job.code == 0, job.err
    return job.out


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def losses(run_dir: Path) -> list[float]:
    return [event["loss"] for event in events(run_dir, "step")]


def test_train_with_the_defaults(tmp_path: Path) -> None:
    job = ddp_stream("train", cwd=tmp_path)
    assert job.code == 0, job.err
    (run_dir,) = (tmp_path / "runs").iterdir()
    written = {path.name for path in run_dir.iterdir()}
    assert written >= {"config.yaml", "metrics.jsonl", "model.safetensors", "status.json"}
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["status"], status["step"]) == ("done", 48)  # 3 epochs of ceil(1000 / 64) = 16 steps
    first, second, third = events(run_dir, "epoch")
    assert first["loss"] > second["loss"] > third["loss"]
    assert [event["exactly_once"] for event in (first, second, third)] == [True] * 3
    assert job.out.count("exactly once: 1000 rows, each exactly once") == 3


def test_a_run_can_be_repeated_from_its_own_config(tmp_path: Path) -> None:
    data = ["--data.source", "ddp_stream.sources.SyntheticRegression", "--data.source.total_samples", "333"]
    data += ["--data.lanes", "4", "--data.tail", "drop", "--data.shuffle", "blocks", "--data.micro_batch_size", "9"]
    optim = ["--optim.name", "adamw", "--optim.lr", "0.02", "--optim.schedule", "cosine", "--optim.clip_norm", "1.5"]
    train(tmp_path, *data, *optim, "--task.hidden", "[5, 3]", "--seed", "8", "--epochs", "2")
    job = ddp_stream("train", "--config", "run/config.yaml", "--run.dir", "again", cwd=tmp_path)
    assert job.code == 0, job.err
    assert len(losses(tmp_path / "run")) == 2 * (333 // 64)
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
    # An option behind --config changes what the file says.
    job = ddp_stream("train", "--config", "run/config.yaml", "--run.dir", "other", "--seed", "9", cwd=tmp_path)
    assert losses(tmp_path / "other") != losses(tmp_path / "run")


@pytest.mark.parametrize(
    ("option", "yaml", "right"),
    [
        ("--data.globl_batch_size", "data: {globl_batch_size: 32}", "data.global_batch_size"),
        ("--optim.shedule", "optim: {shedule: cosine}", "optim.schedule"),
        ("--epoch", "epoch: 1", "epochs"),
        ("--task.hiden", "task: {class_path: ddp_stream.tasks.Regression, init_args: {hiden: [8]}}", "task.hidden"),
    ],
)
def test_a_mistyped_name(option: str, yaml: str, right: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml)
    for arguments in ([option, "1"], ["--config", "mine.yaml"]):
        job = ddp_stream("train", *arguments, cwd=tmp_path)
        assert job.code == 2, arguments
        assert f"did you mean --{right}?" in job.err, arguments
    assert not (tmp_path / "runs").exists()


def test_a_task_of_my_own(tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(MY_TASK)
    train(tmp_path, "--task", "my_module.MyTask", "--task.width", "5", "--epochs", "1")
    weights = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    assert {name: list(value.shape) for name, value in weights.items()} == {
        "0.weight": [5, 4],
        "0.bias": [5],
        "1.weight": [1, 5],
        "1.bias": [1],
    }


def test_a_source_with_arguments(tmp_path: Path) -> None:
    source = ["--data.source", "ddp_stream.sources.SyntheticRegression"]
    out = train(tmp_path, *source, "--data.source.total_samples", "77", "--data.source.n_features", "3")
    assert "SyntheticRegression(77 rows): 77 rows, 2 steps of 64 rows an epoch" in out
    weights = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    assert list(weights["0.weight"].shape) == [16, 3]


def test_max_steps(tmp_path: Path) -> None:
    out = train(tmp_path, "--max_steps", "21")
    # An epoch has 16 steps. The second ends after 5 of them: 320 rows of 1000.
    assert "320 rows, each exactly once, 680 left out by the plan" in out
    assert [(event["rows"], event["left_out"]) for event in events(tmp_path / "run", "epoch")] == [
        (1000, 0),
        (320, 680),
    ]
    assert [event["step"] for event in events(tmp_path / "run", "step")] == list(range(1, 22))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 21


def test_csv_and_parquet_train_the_same(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 300))
    kinds = np.array(["below", "above", "far above"])[(y > x).astype(int) + (y > x + 1)]
    table = pa.table({"x": x, "y": y, "kind": kinds})
    pa.csv.write_csv(table, tmp_path / "rows.csv")
    pa.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=70)
    task = ["--task", "ddp_stream.tasks.Classification", "--task.label", "kind"]
    for file in ("rows.csv", "rows.parquet"):
        train(tmp_path, "--data.path", file, "--data.shuffle", "none", *task, "--run.dir", file + ".run")
    # One loss a step, 3 epochs of ceil(300 / 64) = 5 steps; of three classes, and learnt a little.
    csv, parquet = losses(tmp_path / "rows.csv.run"), losses(tmp_path / "rows.parquet.run")
    assert len(csv) == 15
    assert csv == parquet
    first, *_, last = events(tmp_path / "rows.csv.run", "epoch")
    assert last["loss"] < first["loss"] < 2 * np.log(3)


def test_wandb_offline(tmp_path: Path) -> None:
    train(tmp_path, "--wandb.mode", "offline", "--epochs", "1")
    (file,) = (tmp_path / "run").rglob("*.wandb")
    assert file.read_bytes()[:4] == b":W&B"


def test_demo(tmp_path: Path) -> None:
    job = ddp_stream("demo", cwd=tmp_path)
    assert job.code == 0, job.err
    assert "StreamingDataset: 20 seen, 20 different, each 1 time(s)" in job.out
    assert "without sharding: 60 seen, 20 different, each 3 time(s)" in job.out
