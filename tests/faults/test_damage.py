"""Checkpoints of two ranks that are damaged, or cannot be written: seen by both, told by name, and no work is lost."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from broken import SETTINGS, assert_as_untouched, events, status
from ranks import DDP_STREAM, run_ranks, torchrun

from ddp_stream.sources import SyntheticRegression
from ddp_stream.tasks import Regression
from ddp_stream.training import checkpoint
from ddp_stream.training.config import CheckpointConfig, DataConfig, RunConfig, TrainConfig
from ddp_stream.training.manifest import find, verify
from ddp_stream.training.train import train

STEPS = 26  # two epochs of 12 steps of 16 rows and one of 8


@dataclass(frozen=True)
class Attempt:
    """A run of two epochs, or a part of it."""

    folder: Path
    max_steps: int | None = None
    resume: str = "auto"
    background: bool = False
    as_root: bool = True  # who may write everywhere
    hidden: tuple[int, ...] = (16,)
    no_rename: bool = False


@dataclass(frozen=True)
class Ended:
    """How it ended on one rank."""

    steps: int
    weights: list[torch.Tensor]
    error: str | None


def attempt(settings: Attempt) -> Ended:
    if settings.no_rename:
        checkpoint._rename = no_rename
    if not settings.as_root:
        obey_permissions()
    saving = CheckpointConfig(every_steps=5, resume=settings.resume, async_save=settings.background)
    data = DataConfig(source=SyntheticRegression(200), global_batch_size=16, num_workers=0)
    run = RunConfig(str(settings.folder))
    task = Regression(hidden=settings.hidden)
    config = TrainConfig(task, data=data, epochs=2, max_steps=settings.max_steps, checkpoint=saving, run=run)
    try:
        result = train(config)
    except checkpoint.CheckpointError as error:
        return Ended(0, [], str(error))
    return Ended(result.steps, list(result.model.state_dict().values()), None)


def obey_permissions() -> None:
    """Give up root's right to read and write everything (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH), if we have it."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110
    assert libc.capset(header, sets) == 0


def no_rename(unfinished: Path, target: Path) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))


def both(*attempts: Attempt) -> list[list[Ended]]:
    """Every attempt on two ranks: `[attempt][rank]`."""
    return [list(ranks) for ranks in zip(*run_ranks(attempt, 2, attempts, group=False), strict=True)]


def assert_whole_run(ended: list[Ended], weights: list[torch.Tensor]) -> None:
    for rank in ended:
        assert (rank.steps, rank.error) == (STEPS, None)
        assert all(map(torch.equal, rank.weights, weights))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """Of a run that met no trouble."""
    ((ended, _),) = both(Attempt(tmp_path_factory.mktemp("whole")))
    assert ended.steps == STEPS
    return ended.weights


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after step 12, with checkpoints of steps 10 and 12."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    both(Attempt(folder, max_steps=12))
    assert [path.name for path in find(folder / "checkpoints")] == ["step-00000010", "step-00000012"]
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "emptied": lambda path: path.write_bytes(b"") and None,
    "first byte": lambda path: flip(path, 0.0),
    "middle byte": lambda path: flip(path, 0.5),
    "last byte": lambda path: flip(path, 1.0),
    "deleted": Path.unlink,
    "a directory": replace_by_directory,
}


@pytest.mark.slow
def test_any_damage_of_any_file_is_passed_over(stopped: Path, weights: list[torch.Tensor], tmp_path: Path) -> None:
    names = sorted(path.name for path in (stopped / "checkpoints" / "step-00000012").iterdir())
    assert len(names) == 4  # a file of tensors for each rank, state.json and manifest.json
    cases = {(name, damage): tmp_path / f"{damage} {name}" for name in names for damage in DAMAGES}
    for (name, damage), folder in cases.items():
        shutil.copytree(stopped, folder)
        DAMAGES[damage](folder / "checkpoints" / "step-00000012" / name)
    for ((name, damage), folder), ended in zip(cases.items(), both(*map(Attempt, cases.values())), strict=True):
        (resume,) = events(folder, "resume")
        assert resume["step"] == 10, (name, damage)
        assert len(resume["damaged"]) == 1
        assert resume["damaged"][0].startswith("step-00000012: ")
        assert name in resume["damaged"][0], (name, damage)
        assert_whole_run(ended, weights)
        # It neither counts as one that is kept, nor comes into the way of the new one of the same step.
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
            "set-aside-step-00000012",
            "step-00000025",
            "step-00000026",
        ]


def test_with_only_damaged_ones_it_does_not_start_over(stopped: Path, tmp_path: Path) -> None:
    folders = [tmp_path / damage for damage in DAMAGES]
    for folder, damage in zip(folders, DAMAGES.values(), strict=True):
        shutil.copytree(stopped, folder)
        for path in find(folder / "checkpoints"):
            damage(path / "state.json")
    for folder, ended in zip(folders, both(*map(Attempt, folders)), strict=True):
        for rank in ended:
            assert "will not start over by itself" in str(rank.error)
            assert "step-00000010: " in str(rank.error)
            assert "step-00000012: " in str(rank.error)
        assert status(folder) == "failed"
        assert len(find(folder / "checkpoints")) == 2  # as they were, for whoever can mend them


def test_newer_ones_are_set_aside_when_the_run_goes_on_from_an_older(
    stopped: Path, weights: list[torch.Tensor], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    both(Attempt(run, max_steps=11, resume=str(run / "checkpoints" / "step-00000010")))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["set-aside-step-00000012", "step-00000010", "step-00000011"]
    both(Attempt(run, max_steps=12))
    (ended,) = both(Attempt(run, resume=str(run / "checkpoints" / "step-00000011")))
    assert_whole_run(ended, weights)
    aside = sorted(path.name for path in (run / "checkpoints").iterdir() if path not in find(run / "checkpoints"))
    assert aside == ["set-aside-2-step-00000012", "set-aside-step-00000012"]


# What cannot be written


@contextlib.contextmanager
def mounted(path: Path, size: str) -> Iterator[None]:
    path.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if made.returncode != 0:
        pytest.skip(f"a file system of a size of its own needs the right to mount: {made.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)


def assert_left_alone(run: Path, names: list[str]) -> None:
    """The checkpoints of before, whole, and nothing of the one that failed."""
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    assert [verify(path) for path in find(run / "checkpoints")] == [None] * len(names)


BACKGROUND = pytest.mark.parametrize(
    "background", [pytest.param(False, id="sync"), pytest.param(True, id="async", marks=pytest.mark.slow)]
)


@BACKGROUND
def test_a_disk_that_fills_up_while_tensors_are_written(background: bool, tmp_path: Path) -> None:
    wide = (256, 256)  # 67 k parameters, 0.8 MB with Adam's moments, half of it by each rank
    ((whole, _),) = both(Attempt(tmp_path / "whole", hidden=wide))
    run = tmp_path / "run"
    with mounted(run, "1500k"):
        (ended,) = both(Attempt(run, hidden=wide, background=background))
        for rank in ended:
            assert "the checkpoint of step 10 could not be written" in str(rank.error)
            assert "No space left on device" in str(rank.error)
            assert "free some space" in str(rank.error)
        assert status(run) == "failed"
        assert_left_alone(run, ["step-00000005"])
        remount(run, "size=10m")
        (ended,) = both(Attempt(run, hidden=wide, background=background))
        assert events(run, "resume")[-1]["step"] == 5
        assert_whole_run(ended, whole.weights)


@pytest.mark.slow
@pytest.mark.parametrize("background", ["false", "true"], ids=["sync", "async"])
def test_a_disk_that_fills_up_anywhere(background: str, untouched: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [DDP_STREAM, "train", *SETTINGS, "--run.dir", "run", "--checkpoint.async_save", background]
    with mounted(run, "1m"):
        filler = run / ".fault-filler"
        for pages in range(0, 9, 2):  # so many are free
            filler.unlink(missing_ok=True)
            filler.write_bytes(bytes(4096 * (os.statvfs(run).f_bavail - pages)))
            job = torchrun(*arguments, cwd=tmp_path)
            assert job.code == 1, pages
            assert "No space left on device" in job.err, pages
        filler.unlink()
        assert torchrun(*arguments, cwd=tmp_path).code == 0
        assert_as_untouched(run, untouched)


@BACKGROUND
def test_a_directory_without_the_right_to_write(
    background: bool, stopped: Path, weights: list[torch.Tensor], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    (run / "checkpoints").chmod(0o555)
    (ended,) = both(Attempt(run, background=background, as_root=False))
    for rank in ended:
        assert f"could not begin a checkpoint in {run / 'checkpoints'}" in str(rank.error)
        assert "Permission denied" in str(rank.error)
    assert_left_alone(run, ["step-00000010", "step-00000012"])
    (run / "checkpoints").chmod(0o755)
    (ended,) = both(Attempt(run, background=background, as_root=False))
    assert_whole_run(ended, weights)


@BACKGROUND
def test_a_read_only_file_system(background: bool, weights: list[torch.Tensor], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with mounted(run / "checkpoints", "10m"):
        both(Attempt(run, max_steps=12))
        remount(run / "checkpoints", "ro")
        (ended,) = both(Attempt(run, background=background))
        for rank in ended:
            assert "Read-only file system" in str(rank.error)
            assert "give another --run.dir" in str(rank.error)
        assert_left_alone(run, ["step-00000010", "step-00000012"])
        remount(run / "checkpoints", "rw")
        (ended,) = both(Attempt(run, background=background))
        assert_whole_run(ended, weights)


@BACKGROUND
def test_a_rename_that_fails(background: bool, stopped: Path, weights: list[torch.Tensor], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    (ended,) = both(Attempt(run, background=background, no_rename=True))
    for rank in ended:
        assert "rank 0 could not publish the checkpoint of step 13" in str(rank.error)
        assert "Input/output error" in str(rank.error)
    (ended,) = both(Attempt(run, background=background))
    assert [event["step"] for event in events(run, "resume")] == [12, 12]
    assert_whole_run(ended, weights)
    assert_left_alone(run, ["step-00000025", "step-00000026"])
