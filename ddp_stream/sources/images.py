"""Image folders: a class for every directory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ddp_stream.sources.base import Columns, DataError, Ints, Source, check_columns, fingerprint_of
from ddp_stream.sources.paths import reading

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolder(Source):
    """Images in a directory for every class: `path/cat/1.jpg`, `path/dog/deep/2.png`.

    The columns are `image` (the encoded bytes, which `ddp_stream.transforms.DecodeImages` turns into pixels), `label`
    (the class as a number, in the order of the directories' names) and `path`, below the directory.

    Args:
        path: the directory

    Attributes:
        classes: names of the classes; `label` counts them

    Raises:
        DataError: no image lies in a directory below `path`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with reading(path):
            found = {entry.name: sorted(_images(entry)) for entry in sorted(Path(path).iterdir()) if is_class(entry)}
        self.classes = [name for name, files in found.items() if files]
        if not self.classes:
            raise DataError(
                f"{path} has no directory with images ({', '.join(SUFFIXES)}) in it: an image folder has one for every class"
            )
        self._files = [file for name in self.classes for file in found[name]]
        self._labels = np.repeat(np.arange(len(self.classes)), [len(found[name]) for name in self.classes])
        self._names: tuple[str, ...] = ("image", "label", "path")

    def __len__(self) -> int:
        return len(self._files)

    @property
    def columns(self) -> tuple[str, ...]:
        return self._names

    def select(self, columns: Sequence[str]) -> Source:
        check_columns(columns, self.columns, str(self))
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, _names=tuple(columns))
        return other

    def take(self, rows: Ints) -> Columns:
        files = [self._files[row] for row in rows.tolist()]
        columns: Columns = {
            "image": [self._read(file) for file in files] if "image" in self._names else [],
            "label": self._labels[rows],
            "path": files,
        }
        return {name: columns[name] for name in self._names}

    def _read(self, file: str) -> bytes:
        path = os.path.join(self.path, file)
        with reading(path), open(path, "rb") as content:
            return content.read()

    def where(self, row: int) -> str:
        return os.path.join(self.path, self._files[row])

    def fingerprint(self) -> str:
        """Names and sizes of the files: to read them all would take too long."""
        sizes = [os.stat(os.path.join(self.path, file)).st_size for file in self._files]
        return fingerprint_of("ImageFolder", self._files, sizes)

    def stamp(self) -> str | None:
        stats = [os.stat(os.path.join(self.path, file)) for file in self._files]
        changed = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        return fingerprint_of("ImageFolder", os.path.abspath(self.path), self._files, changed, self._names)

    def __str__(self) -> str:
        return f"{self.path} ({len(self.classes)} classes)"


def is_class(entry: Path) -> bool:
    """A directory that is not hidden."""
    return entry.is_dir() and entry.name[0] not in "._"


def has_images(path: Path) -> bool:
    """Whether a directory below `path` holds an image."""
    return any(next(_images(entry), None) for entry in path.iterdir() if is_class(entry))


def _images(folder: Path) -> Iterator[str]:
    """Images anywhere in `folder`, named from its parent directory on.

    Raises:
        OSError: a directory cannot be read.
        DataError: a link leads back to a directory that it is in.
    """
    for directory, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in folders:
            link = os.path.join(directory, name)
            if os.path.islink(link) and os.path.realpath(directory).startswith(os.path.realpath(link)):
                raise DataError(
                    f"{link} leads back to a directory that it is in, so that images would be read for ever"
                )
        below = os.path.relpath(directory, folder.parent)
        yield from (os.path.join(below, name) for name in files if name[0] != "." and name.lower().endswith(SUFFIXES))


def _raise(error: OSError) -> None:
    raise error
