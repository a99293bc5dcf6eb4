"""Checkpoints: whole or not there, verified before they are believed, and never unpickled.

    RUN/checkpoints/step-00001234/
        *.safetensors     model and optimizer, by torch.distributed.checkpoint, a file a rank
        state.json        step, loader position, the proof's digest, the identity of the run
        manifest.json     size and SHA-256 of every other file, and its own

A checkpoint is written under another name, synced to the disk, and renamed at the end; only then are old ones removed.
So a crash at any moment leaves the checkpoint before it, and at worst a leftover that the next start removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict_loader as dcp_loader
import torch.distributed.checkpoint.state_dict_saver as dcp_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ddp_stream.training.engine import Engine

_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = ".unfinished-"
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
# A single process saves and loads without torch.distributed, and knows it.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what was written."""


class Checkpoints:
    """The checkpoints of one run. All methods but `find` and `verify` are collective calls.

    Args:
        folder: `RUN/checkpoints`
        engine: holds the model and the optimizer
        keep: how many whole checkpoints remain
    """

    def __init__(self, folder: Path, engine: Engine, keep: int) -> None:
        if keep < 2:
            raise ValueError(f"checkpoint.keep={keep}: the newest may turn out damaged, so keep at least 2")
        self.folder = folder
        self._engine = engine
        self._keep = keep

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint of model, optimizer and `state` (JSON), published before this returns.

        Raises:
            CheckpointError: on every rank, if any could not write; earlier checkpoints are as they were.
        """
        target = self.folder / f"step-{step:08d}"
        unfinished = self.folder / f"{_LEFTOVER}{target.name}"
        self._on_rank_0(lambda: _make_empty(unfinished), f"begin a checkpoint in {self.folder}")
        try:
            # One process alone writes without torch.distributed.
            dcp_saver.save(
                self._tensors(),
                storage_writer=HuggingFaceStorageWriter(str(unfinished), save_distributed=True),
                no_dist=self._engine.topology.world_size == 1,
            )
        except Exception as error:
            self._on_rank_0(lambda: shutil.rmtree(unfinished, ignore_errors=True), "clean up")
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({error}); the ones before it are "
                f"untouched: free some space, or give another --run.dir"
            ) from error
        self._on_rank_0(lambda: self._publish(unfinished, target, state), f"publish the checkpoint of step {step}")
        return target

    def load(self, path: Path) -> dict[str, Any]:
        """Put the tensors of the checkpoint at `path` into model and optimizer; returns its `state`."""
        tensors = self._tensors()
        dcp_loader.load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(path)),
            no_dist=self._engine.topology.world_size == 1,
        )
        model, optimizer = get_state_dict(self._engine.unwrap(), self._engine.raw_optimizer, options=_OPTIONS)
        set_state_dict(
            self._engine.unwrap(),
            self._engine.raw_optimizer,
            model_state_dict={**model, **_under("model.", tensors)},
            optim_state_dict={**optimizer, **_under("optimizer.", tensors)},
            options=_OPTIONS,
        )
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        return state

    def choose(self, resume: str) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, chosen by rank 0 for all, and what was found wrong with newer ones.

        Args:
            resume: `auto` (the newest whole one, or none if there is none), `never`, or a path

        Raises:
            CheckpointError: the path is damaged; or there are checkpoints and all are damaged.
        """
        found: tuple[Path | None, list[str]] = (None, [])

        def look() -> None:
            nonlocal found
            found = self._look(resume)

        self._on_rank_0(look, "look for a checkpoint")
        return self._engine.from_rank_0(found)

    def _look(self, resume: str) -> tuple[Path | None, list[str]]:
        for leftover in self.folder.glob(f"{_LEFTOVER}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if resume == "never":
            return None, []
        if resume != "auto":
            wrong = verify(Path(resume))
            if wrong:
                raise CheckpointError(f"{resume} is damaged or no checkpoint: {wrong}; name another one, or use auto")
            return Path(resume), []
        damaged: list[str] = []
        for path in reversed(find(self.folder)):
            wrong = verify(path)
            if wrong is None:
                return path, damaged
            damaged.append(f"{path.name}: {wrong}")
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole ({'; '.join(damaged)}); this run will not start over by itself "
                f"and spend its work: restore one, or start anew with --checkpoint.resume never"
            )
        return None, []

    def _tensors(self) -> dict[str, torch.Tensor]:
        model, optimizer = get_state_dict(self._engine.unwrap(), self._engine.raw_optimizer, options=_OPTIONS)
        tensors: dict[str, Any] = {f"model.{name}": value for name, value in model.items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
        # What is no tensor (rates, betas) is configuration, and comes from there.
        return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}

    def _publish(self, unfinished: Path, target: Path, state: Mapping[str, Any]) -> None:
        (unfinished / "state.json").write_text(json.dumps(state, indent=1))
        manifest = {path.name: list(_size_and_hash(path)) for path in sorted(unfinished.iterdir())}
        (unfinished / "manifest.json").write_text(
            json.dumps({"files": manifest, "sha256": _hash_of(manifest)}, indent=1)
        )
        for path in unfinished.iterdir():
            _sync(path)
        _sync(unfinished)
        if target.exists():  # written by an attempt that was rolled back behind it, or damaged
            shutil.rmtree(target)
        unfinished.rename(target)
        _sync(self.folder)
        whole = [path for path in find(self.folder) if (path / "manifest.json").is_file()]
        for path in whole[: -self._keep]:
            shutil.rmtree(path)

    def _on_rank_0(self, action: Any, what: str) -> None:
        """Run `action` on rank 0; if it fails there, every rank raises."""
        wrong: str | None = None
        if self._engine.topology.rank == 0:
            try:
                action()
            except (OSError, CheckpointError) as error:
                wrong = str(error)
        wrong = self._engine.from_rank_0(wrong)
        if wrong is not None:
            raise CheckpointError(f"rank 0 could not {what}: {wrong}")


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def find(folder: Path) -> list[Path]:
    """The published checkpoints in `folder`, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=lambda path: int(path.name[5:])
    )


def verify(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`; None if every byte is as it was written."""
    try:
        written = json.loads((path / "manifest.json").read_text())
        manifest = written["files"]
        if written["sha256"] != _hash_of(manifest):
            return "manifest.json is not as it was written"
        wrong = []
        for name, (size, digest) in manifest.items():
            file = path / name
            if not file.is_file():
                wrong.append(f"{name} is missing or no file")
            elif _size_and_hash(file) != (size, digest):
                wrong.append(f"{name} is not as it was written")
        wrong += [
            f"{file.name} was not written" for file in path.iterdir() if file.name not in {*manifest, "manifest.json"}
        ]
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        return f"manifest.json cannot be read ({type(error).__name__}: {error})"
    return "; ".join(wrong) or None


def _size_and_hash(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    return path.stat().st_size, digest.hexdigest()


def _hash_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _sync(path: Path) -> None:
    """Make the content of a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
