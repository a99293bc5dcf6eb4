"""Checkpoints of a single process: resume is exact, damage is noticed, and nothing is lost by a failed write."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddp_stream.commands import checkpoint as command
from ddp_stream.sources import SyntheticRegression
from ddp_stream.tasks import Regression
from ddp_stream.training import checkpoint
from ddp_stream.training.checkpoint import CheckpointError
from ddp_stream.training.config import CheckpointConfig, DataConfig, RunConfig, TrainConfig
from ddp_stream.training.loop import Result
from ddp_stream.training.manifest import find, verify
from ddp_stream.training.rundir import read_metrics
from ddp_stream.training.train import train


def run(folder: Path, *, rows: int = 200, resume: str = "auto", **settings: object) -> Result:
    """Two epochs of 200 rows in batches of 16: 13 steps each, the last of 8 rows."""
    data = DataConfig(source=SyntheticRegression(rows), global_batch_size=16, num_workers=0)
    saving = CheckpointConfig(every_steps=5, resume=resume)
    config = TrainConfig(Regression(), data=data, epochs=2, checkpoint=saving, run=RunConfig(str(folder)))
    for name, value in settings.items():
        setattr(config, name, value)
    return train(config)


def status(folder: Path) -> tuple[str, int]:
    found = json.loads((folder / "status.json").read_text())
    return found["status"], found["step"]


def weights(result: Result) -> list[torch.Tensor]:
    return [value.clone() for value in result.model.state_dict().values()]


@pytest.mark.parametrize("stops", [[7], [13], [3, 4, 20], [25]])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, stops: list[int]) -> None:
    whole = run(tmp_path / "whole")
    for stop in stops:
        assert run(tmp_path / "broken", max_steps=stop).steps == stop
    last = run(tmp_path / "broken")
    assert last.steps == whole.steps == 26
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(last), strict=True))
    assert last.losses[-1] == pytest.approx(whole.losses[-1])  # the mean of the epoch, not of its last part
    assert last.verdicts[-1].exactly_once
    assert last.verdicts[-1].rows == 200


def test_the_metrics_tell_one_story(tmp_path: Path) -> None:
    run(tmp_path, max_steps=7)
    run(tmp_path)
    events = read_metrics(tmp_path / "metrics.jsonl")
    assert [event["attempt"] for event in events if event["event"] == "start"] == [0, 1]
    (resume,) = [event for event in events if event["event"] == "resume"]
    assert (resume["attempt"], resume["step"]) == (1, 7)
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 27))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, replace_by_directory])
@pytest.mark.parametrize("file", ["state.json", "manifest.json", "*.safetensors"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    run(tmp_path, max_steps=12)
    old, new = find(tmp_path / "checkpoints")
    assert (old.name, new.name) == ("step-00000010", "step-00000012")
    (victim,) = new.glob(file)
    damage(victim)
    assert victim.name in str(verify(new))
    run(tmp_path)
    (resume,) = [event for event in read_metrics(tmp_path / "metrics.jsonl") if event["event"] == "resume"]
    assert resume["step"] == 10
    assert victim.name in resume["damaged"][0]


def test_with_only_damaged_checkpoints_it_does_not_start_over(tmp_path: Path) -> None:
    run(tmp_path, max_steps=12)
    for path in find(tmp_path / "checkpoints"):
        flip(path / "state.json")
    with pytest.raises(CheckpointError, match="will not start over by itself"):
        run(tmp_path)
    assert status(tmp_path)[0] == "failed"
    assert run(tmp_path, resume="never").steps == 26


def test_a_path_names_the_checkpoint(tmp_path: Path) -> None:
    run(tmp_path / "first", max_steps=12)
    old, new = find(tmp_path / "first" / "checkpoints")
    assert run(tmp_path / "second", resume=str(old), max_steps=11).steps == 11
    flip(new / "state.json")
    with pytest.raises(CheckpointError, match=r"state.json is not as it was written"):
        run(tmp_path / "third", resume=str(new))


def test_other_data_is_not_gone_on_with(tmp_path: Path) -> None:
    run(tmp_path, max_steps=7)
    with pytest.raises(ValueError, match=r"rows was 200 and is 201"):
        run(tmp_path, rows=201)
    with pytest.raises(ValueError, match=r"seed was 0 and is 1"):
        run(tmp_path, seed=1)


def test_a_nan_that_stands_in_for_nulls_is_the_same_nan(tmp_path: Path) -> None:
    for steps in (7, 9):
        data = DataConfig(source=SyntheticRegression(200), global_batch_size=16, num_workers=0, fill_null=math.nan)
        assert run(tmp_path, data=data, max_steps=steps).steps == steps


@pytest.mark.parametrize("resume", ["never", "step-00000010"])
@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_launcher_that_repeats_the_command_goes_on(
    tmp_path: Path, launcher: str, resume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "old", max_steps=12)
    asked = resume if resume == "never" else str(tmp_path / "old" / "checkpoints" / resume)
    begins = {"never": 0, "step-00000010": 10}[resume]
    monkeypatch.setenv(launcher, "0")
    run(tmp_path / "new", resume=asked, max_steps=begins + 2)
    monkeypatch.setenv(launcher, "1")
    run(tmp_path / "new", resume=asked, max_steps=begins + 4)
    events = read_metrics(tmp_path / "new" / "metrics.jsonl")
    resumed = [event["step"] for event in events if event["event"] == "resume"]
    assert resumed == ([2] if resume == "never" else [10, 12])


def test_a_launcher_that_repeats_the_command_before_there_is_a_checkpoint_goes_back_to_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "old", max_steps=12)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(tmp_path / "new", resume=str(find(tmp_path / "old" / "checkpoints")[0]), max_steps=13)
    (resume,) = [event for event in read_metrics(tmp_path / "new" / "metrics.jsonl") if event["event"] == "resume"]
    assert resume["step"] == 10


def test_a_model_file_that_was_cut_short_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: torch.nn.Module, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    run(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr("safetensors.torch.save_model", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == whole
    assert not list(tmp_path.glob(".model*"))


def test_a_write_that_fails_leaves_the_ones_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, max_steps=12)
    before = find(tmp_path / "checkpoints")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync_to_disk", full)
    with pytest.raises(CheckpointError, match="No space left"):
        run(tmp_path)
    monkeypatch.undo()
    assert [path for path in find(tmp_path / "checkpoints") if verify(path) is None] == before
    assert run(tmp_path).steps == 26
    assert not list((tmp_path / "checkpoints").glob(".*"))  # the leftover is gone


def test_a_stop_file_stops_and_the_same_command_goes_on(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    stopped = run(tmp_path)
    assert 0 < stopped.steps < 26
    assert status(tmp_path) == ("preempted", stopped.steps)
    (tmp_path / "STOP").unlink()
    assert run(tmp_path).steps == 26
    assert status(tmp_path) == ("done", 26)


def test_a_stop_that_cannot_be_read_is_a_stop(tmp_path: Path) -> None:
    (tmp_path / "STOP").mkdir(parents=True)
    assert 0 < run(tmp_path).steps < 26
    assert f"STOP file in {tmp_path}" in json.loads((tmp_path / "status.json").read_text())["reason"]


def test_a_checkpoint_after_so_many_minutes(tmp_path: Path) -> None:
    saving = CheckpointConfig(every_minutes=1e-6)
    run(tmp_path, checkpoint=saving, max_steps=12)
    saved = [event["step"] for event in read_metrics(tmp_path / "metrics.jsonl") if event["event"] == "checkpoint"]
    assert saved[0] < 12  # and not at the end only
    assert saved[-1] == 12


def test_the_command_lists_verifies_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = run(tmp_path)

    def call(*arguments: str) -> tuple[int, str]:
        parser = command.parser()
        code = command.run(parser, parser.parse_args([*arguments[:1], str(tmp_path), *arguments[1:]]))
        return code, capsys.readouterr().out

    capsys.readouterr()
    assert call("list")[0] == 0
    code, out = call("verify")
    assert (code, out.count("whole")) == (0, 2)
    assert call("export")[0] == 0
    exported = load_file(tmp_path / "step-00000026.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in trained.model.state_dict().items())
    flip(tmp_path / "checkpoints" / "step-00000026" / "state.json")
    code, out = call("verify")
    assert (code, out.count("state.json is not as it was written")) == (1, 1)
    assert "step-00000025" in call("export")[1]
    assert call("export", "--step", "26")[0] == 1


@pytest.mark.parametrize(("rows", "steps"), [(0, 0), (1, 2), (16, 2), (17, 4)])
def test_few_rows_are_those_that_were_given(tmp_path: Path, rows: int, steps: int) -> None:
    result = run(tmp_path, rows=rows)
    assert ([verdict.rows for verdict in result.verdicts], result.steps) == ([rows, rows], steps)
    assert status(tmp_path) == ("done", steps)


def test_the_oldest_go_first(tmp_path: Path) -> None:
    run(tmp_path)
    assert [path.name for path in find(tmp_path / "checkpoints")] == ["step-00000025", "step-00000026"]
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000026")
    assert run(tmp_path).steps == 26
