"""From a path to a source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddp_stream.sources.arrow import Arrow
from ddp_stream.sources.base import DataError, Source
from ddp_stream.sources.compressed import TEXTS, CompressedText
from ddp_stream.sources.csv import Csv
from ddp_stream.sources.images import ImageFolder, has_images
from ddp_stream.sources.jsonl import JsonLines
from ddp_stream.sources.npy import Npy, Npz
from ddp_stream.sources.parquet import Parquet
from ddp_stream.sources.paths import CODECS, existing_files, expand, suffix_of
from ddp_stream.sources.selection import skip_bad_rows
from ddp_stream.sources.tar import WebDataset
from ddp_stream.sources.text import OnBadRow

FORMATS = {
    ".csv": Csv,
    ".tsv": Csv,
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".parquet": Parquet,
    ".pq": Parquet,
    ".arrow": Arrow,
    ".feather": Arrow,
    ".npy": Npy,
    ".npz": Npz,
    ".tar": WebDataset,
    **{text + codec: CompressedText for text in TEXTS for codec in CODECS},
}


def open_source(
    path: str | Path | Sequence[str | Path],
    columns: Sequence[str] | None = None,
    fill_null: float | None = None,
    on_bad_row: OnBadRow = "raise",
) -> Source:
    """The source for a file, a directory, a glob, or a list of them, by suffix; several files are laid end to end.

    A directory stands for the files in it of a known format, a glob for the files it matches, both sorted by name.
    Files whose names begin with `.` or `_` are left out, as everywhere in the field.

    Args:
        path: what to open
        columns: read these columns only
        fill_null: what stands in for nulls in numeric columns of text, Parquet and Arrow files; None makes a null an error
        on_bad_row: with `skip`, rows that cannot be read are left out, and `source.excluded` says which and why; to find
            them, all rows are read once

    Raises:
        DataError: nothing there, an unknown or a mixed format, an empty file, differing schemas, an unknown column.
    """
    source = _open(path, columns, fill_null, on_bad_row)
    return skip_bad_rows(source) if on_bad_row == "skip" else source


def _open(
    path: str | Path | Sequence[str | Path],
    columns: Sequence[str] | None,
    fill_null: float | None,
    on_bad_row: OnBadRow,
) -> Source:
    if isinstance(path, (str, Path)) and _is_image_folder(Path(path)):
        folder = ImageFolder(str(path))
        return folder.select(columns) if columns is not None else folder
    parts = [path] if isinstance(path, (str, Path)) else list(path)
    files = [file for part in parts for file in _saved(str(part)) or expand(str(part), tuple(FORMATS))]
    suffixes = sorted({suffix_of(file) for file in files})
    if len(suffixes) != 1 or suffixes[0] not in FORMATS:
        raise DataError(
            f"{path}: found {len(files)} files with the suffixes {suffixes}; a dataset is files of one format out of "
            f"{', '.join(FORMATS)}"
        )
    format_ = FORMATS[suffixes[0]]
    existing_files(files)
    if format_ is Npz:  # arrays of other lengths may lie beside the columns
        return Npz(files, columns)
    options: dict[str, Any] = {} if format_ in (Npy, WebDataset) else {"fill_null": fill_null}
    if format_ in (Csv, JsonLines, CompressedText):
        options["on_bad_row"] = on_bad_row
    source: Source = format_(files, **options)
    return source.select(columns) if columns is not None else source


def _saved(path: str) -> list[str]:
    """The files of a directory that `datasets.Dataset.save_to_disk` wrote; none if it is no such directory."""
    if (Path(path) / "state.json").is_file():
        state = json.loads((Path(path) / "state.json").read_text())
        return [str(Path(path) / Path(file["filename"]).name) for file in state["_data_files"]]
    if (Path(path) / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in Path(path).iterdir() if entry.is_dir())
        raise DataError(f"{path} holds the splits {', '.join(splits)} of a dataset: name one, as in {path}/{splits[0]}")
    return []


def _is_image_folder(path: Path) -> bool:
    """Whether `path` is a directory with images in its directories, and no file of another format beside these."""
    if not path.is_dir() or any(suffix_of(entry) in FORMATS for entry in path.iterdir() if entry.is_file()):
        return False
    return not (path / "dataset_dict.json").is_file() and has_images(path)
