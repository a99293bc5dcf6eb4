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
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict_loader as dcp_loader
import torch.distributed.checkpoint.state_dict_saver as dcp_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ddp_stream.training.engine import Engine
from ddp_stream.training.manifest import (
    HashingFileSystem,
    Manifest,
    find,
    hash_of,
    make_empty,
    set_aside,
    step_of,
    sync_to_disk,
    verify,
)

_LEFTOVER = ".unfinished-"
_WAY_OUT = "; the checkpoints before it are untouched: free some space, or give another --run.dir"
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
# A single process saves and loads without torch.distributed, and knows it.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what was written."""


class Checkpoints:
    """The checkpoints of one run. `save`, `wait`, `load` and `choose` are collective calls.

    Args:
        folder: `RUN/checkpoints`
        engine: holds the model and the optimizer
        keep: how many whole checkpoints remain
        background: write while training goes on, from a copy in host memory
    """

    def __init__(self, folder: Path, engine: Engine, keep: int, background: bool = False) -> None:
        if keep < 2:
            raise ValueError(f"checkpoint.keep={keep}: the newest may turn out damaged, so keep at least 2")
        self.folder = folder
        self._engine = engine
        self._keep = keep
        self._background = background
        # The writing thread talks to the other ranks' ones on a group of its own.
        self._group = engine.new_host_group() if background else None
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copies: dict[str, torch.Tensor] = {}
        self._published: list[tuple[int, float]] = []

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint of model, optimizer and `state` (JSON).

        It is published before this returns; in the background, before the next `save` or `wait` returns.

        Raises:
            CheckpointError: on every rank, if any could not write; earlier checkpoints are as they were.
        """
        self.wait()
        target = self.folder / f"step-{step:08d}"
        if self._background:
            tensors = self._copy_to_host(self._tensors())
            self._writing = threading.Thread(
                target=self._write_in_background, args=(target, step, tensors, state), daemon=True
            )
            self._writing.start()
        else:
            self._write(target, step, self._tensors(), state)
        return target

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is published.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are as they were.
        """
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def take_published(self) -> list[tuple[int, float]]:
        """Step and seconds of writing of the checkpoints published since the last call."""
        taken = self._published[:]
        del self._published[: len(taken)]
        return taken

    def load(self, path: Path) -> dict[str, Any]:
        """Put the tensors of the checkpoint at `path` into model and optimizer; returns its `state`."""
        tensors = self._tensors()
        try:
            dcp_loader.load(
                tensors,
                storage_reader=HuggingFaceStorageReader(str(path)),
                no_dist=self._engine.topology.world_size == 1,
            )
        except CheckpointException as error:
            raise CheckpointError(
                f"{path} does not fit this model and optimizer ({_first_failure(error)}); give it the ones it was made "
                f"with, or another --run.dir"
            ) from error
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

        Those that the run does not go on from, but would later take for its own newest ones, are renamed.

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
        self._clear()
        chosen: Path | None = None
        damaged: list[str] = []
        if resume == "auto":
            for path in reversed(find(self.folder)):
                wrong = verify(path)
                if wrong is None:
                    chosen = path
                    break
                damaged.append(f"{path.name}: {wrong}")
            if damaged and chosen is None:
                raise CheckpointError(
                    f"no checkpoint in {self.folder} is whole ({'; '.join(damaged)}); this run will not start over by "
                    f"itself and spend its work: restore one, or start anew with --checkpoint.resume never"
                )
        elif resume != "never":
            chosen = Path(resume)
            wrong = verify(chosen)
            if wrong is not None:
                raise CheckpointError(f"{resume} is damaged or no checkpoint: {wrong}; name another one, or use auto")
        found = find(self.folder)
        ours = chosen is not None and chosen.resolve() in [path.resolve() for path in found]
        for path in found:
            if chosen is None or not ours or step_of(path) > step_of(chosen):
                set_aside(path)
        return chosen, damaged

    def _tensors(self) -> dict[str, torch.Tensor]:
        model, optimizer = get_state_dict(self._engine.unwrap(), self._engine.raw_optimizer, options=_OPTIONS)
        tensors: dict[str, Any] = {f"model.{name}": value for name, value in model.items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
        # What is no tensor (rates, betas) is configuration, and comes from there.
        return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}

    def _copy_to_host(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies that training does not change, in memory that is kept for the next time."""
        for name, value in tensors.items():
            if name not in self._copies:
                self._copies[name] = torch.empty_like(value, device="cpu", pin_memory=value.device.type == "cuda")
            self._copies[name].copy_(value, non_blocking=True)
        if self._engine.device.type != "cpu":
            torch.accelerator.synchronize()
        return {name: self._copies[name] for name in tensors}

    def _write_in_background(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # raised by the next wait()
            self._error = error

    def _write(self, target: Path, step: int, tensors: dict[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        started = time.monotonic()
        unfinished = self.folder / f"{_LEFTOVER}{target.name}"
        self._on_rank_0(lambda: make_empty(unfinished), f"begin a checkpoint in {self.folder}", _WAY_OUT)
        files = HashingFileSystem()
        try:
            # One process alone writes without torch.distributed.
            dcp_saver.save(
                tensors,
                storage_writer=self._writer(unfinished, files),
                process_group=self._group,
                no_dist=self._engine.topology.world_size == 1,
            )
        except (CheckpointException, OSError) as error:
            self._on_rank_0(lambda: shutil.rmtree(unfinished, ignore_errors=True), "clean up")
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({_first_failure(error)})"
                f"{_WAY_OUT}"
            ) from error
        manifests = self._engine.from_all_ranks(files.written, self._group)
        manifest = {name: entry for written in manifests for name, entry in sorted(written.items())}

        def publish() -> None:
            for _, action in self.publish_steps(unfinished, target, state, manifest):
                action()

        self._on_rank_0(publish, f"publish the checkpoint of step {step}", _WAY_OUT)
        self._published.append((step, time.monotonic() - started))

    def _writer(self, unfinished: Path, files: FileSystem) -> HuggingFaceStorageWriter:
        writer = HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
        writer.fs = files
        return writer

    def publish_steps(
        self, unfinished: Path, target: Path, state: Mapping[str, Any], manifest: Manifest
    ) -> list[tuple[str, Callable[[], None]]]:
        """What rank 0 does, one after the other, when all ranks have written their tensors; each may be the last."""

        def write_state() -> None:
            text = json.dumps(state, indent=1)
            (unfinished / "state.json").write_text(text)
            manifest["state.json"] = [len(text.encode()), hashlib.sha256(text.encode()).hexdigest()]

        def write_manifest() -> None:
            text = json.dumps({"files": manifest, "sha256": hash_of(manifest)}, indent=1)
            (unfinished / "manifest.json").write_text(text)

        def sync() -> None:
            for name in ("state.json", "manifest.json"):
                sync_to_disk(unfinished / name)
            sync_to_disk(unfinished)

        def sync_folder() -> None:
            sync_to_disk(self.folder)
            sync_to_disk(self.folder.parent)

        def retain() -> None:  # by another name first, so that one that is half removed is not taken for damaged
            whole = [path for path in find(self.folder) if verify(path, content=False) is None]
            for path in whole[: -self._keep]:
                path.rename(path.with_name(f"{_LEFTOVER}{path.name}"))

        return [
            ("state", write_state),
            ("manifest", write_manifest),
            ("sync", sync),
            ("rename", lambda: _rename(unfinished, target)),
            ("sync folder", sync_folder),
            ("retain", retain),
            ("clear", self._clear),
        ]

    def _clear(self) -> None:
        for leftover in self.folder.glob(f"{_LEFTOVER}*"):
            shutil.rmtree(leftover)

    def _on_rank_0(self, action: Callable[[], None], what: str, way_out: str = "") -> None:
        """Run `action` on rank 0; if it fails there, every rank raises."""
        wrong: str | None = None
        if self._engine.topology.rank == 0:
            try:
                action()
            except (OSError, CheckpointError) as error:
                wrong = str(error)
        wrong = self._engine.from_rank_0(wrong, self._group)
        if wrong is not None:
            raise CheckpointError(f"rank 0 could not {what}: {wrong}{way_out}")


def _first_failure(error: BaseException) -> str:
    """The cause, without the stack traces that torch prints for every rank."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return str(error)


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _rename(unfinished: Path, target: Path) -> None:
    unfinished.rename(target)
