"""The files of a checkpoint: found, checked against their manifest, renamed, and made to survive a power cut."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = "set-aside-"

Manifest = dict[str, list[Any]]
"""Size in bytes and SHA-256 by file name."""


class HashingFileSystem(FileSystem):
    """Notes size and SHA-256 of what passes through it, so that nothing has to be read back."""

    def __init__(self) -> None:
        self.written: Manifest = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        with Path(path).open(mode) as file:
            stream = _HashingStream(file)
            yield stream
        self.written[Path(path).name] = [stream.size, stream.digest.hexdigest()]


class _HashingStream:
    def __init__(self, file: Any) -> None:
        self.size = 0
        self.digest = hashlib.sha256()
        self._file = file

    def write(self, content: bytes) -> int:
        self.size += len(content)
        hashing = threading.Thread(target=self.digest.update, args=(content,))  # both let go of the GIL
        hashing.start()
        try:
            return int(self._file.write(content))
        finally:
            hashing.join()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def find(folder: Path) -> list[Path]:
    """The published checkpoints in `folder`, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.name.rpartition("-")[2])


def verify(path: Path, content: bool = True) -> str | None:
    """What is wrong with the checkpoint at `path`; None if every byte is as it was written.

    With `content=False` only the names and sizes of its files are compared.
    """
    try:
        written = json.loads((path / "manifest.json").read_text())
        manifest = written["files"]
        if written["sha256"] != hash_of(manifest):
            return "manifest.json is not as it was written"
        wrong = []
        for name, (size, digest) in manifest.items():
            file = path / name
            if not file.is_file():
                wrong.append(f"{name} is missing or no file")
            elif file.stat().st_size != size or (content and _hash_of_file(file) != digest):
                wrong.append(f"{name} is not as it was written")
        wrong += [
            f"{file.name} was not written" for file in path.iterdir() if file.name not in {*manifest, "manifest.json"}
        ]
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        return f"manifest.json cannot be read ({type(error).__name__}: {error})"
    return "; ".join(wrong) or None


def _hash_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def set_aside(path: Path) -> None:
    """Rename a checkpoint so that it is neither gone on from nor pruned."""
    target = path.with_name(f"{_ASIDE}{path.name}")
    count = 1
    while target.exists():
        count += 1
        target = path.with_name(f"{_ASIDE}{count}-{path.name}")
    path.rename(target)


def sync_to_disk(path: Path) -> None:
    """Make the content of a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
