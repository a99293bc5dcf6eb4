"""From a path to a source."""

from __future__ import annotations

import json
import os
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
from ddp_stream.sources.paths import CODECS, existing_files, expand, reading, suffix_by_content, suffix_of
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
    """The source for a file, a directory, a glob, or a list of them; several files are laid end to end.

    The suffix names the format; where it names none, the first bytes do, which tell all formats but CSV. A directory
    stands for the files in it of a known format, a glob for the files it matches, both sorted by name. Files whose names
    begin with `.` or `_` are left out, as everywhere in the field.

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
    parts: list[str] = [os.path.expanduser(part) for part in ([path] if isinstance(path, (str, Path)) else path)]
    if len(parts) == 1 and parts[0] and _is_image_folder(Path(parts[0])):
        folder = ImageFolder(parts[0])
        return folder.select(columns) if columns is not None else folder
    files = [file for part in parts for file in _saved(part) or expand(part, tuple(FORMATS))]
    suffixes = sorted({_format_of(file) for file in files})
    if len(suffixes) != 1 or suffixes[0] not in FORMATS:
        raise DataError(
            f"{', '.join(parts)}: found {len(files)} files with the suffixes {suffixes}; a dataset is files of one format "
            f"out of {', '.join(FORMATS)}{_hint(suffixes, files)}"
        )
    format_ = FORMATS[suffixes[0]]
    existing_files(files)
    options: dict[str, Any] = {} if format_ in (Npy, Npz, WebDataset) else {"fill_null": fill_null}
    if format_ in (Csv, JsonLines, CompressedText):
        options["on_bad_row"] = on_bad_row
    if format_ in (Npz, Parquet, Arrow):  # what is not read need not fit
        options["columns"] = columns
    try:
        source: Source = format_(files, **options)
    except DataError as error:
        other = next((file for file in files if suffix_by_content(file) not in ("", *_beginnings(suffixes[0]))), None)
        if other is None:
            raise
        raise DataError(f"{error}; {other} begins like a {suffix_by_content(other)} file: is its name wrong?") from None
    return source.select(columns) if columns is not None else source


def _format_of(file: str) -> str:
    """The suffix by which `FORMATS` knows the file."""
    suffix = suffix_of(file)
    return suffix if suffix in FORMATS else suffix_by_content(file) or suffix


def _beginnings(suffix: str) -> tuple[str, ...]:
    """What files of this suffix may begin like."""
    alike: dict[Any, tuple[str, ...]] = {
        Parquet: (".parquet",),
        Arrow: (".arrow", ".feather"),
        JsonLines: (".jsonl",),
        CompressedText: (".gz", ".zst"),
    }
    return alike.get(FORMATS[suffix], (suffix,))


def _hint(suffixes: list[str], files: list[str]) -> str:
    """The way out for files that are known, but not read by their suffix."""
    if suffixes == [".bin"]:
        return (
            f"; for tokens say --data.source ddp_stream.sources.Tokens --data.source.path {files[0]} "
            f"--data.source.sequence_length 1024"
        )
    if len(suffixes) == 1 and suffixes[0].endswith((".gz", ".zst", ".bz2", ".xz", ".zip")):
        return "; other compressed files must be decompressed, and compressed text be named by what is in it"
    if suffixes == [".json"]:
        return "; a file of JSON must hold one object a line (JSON Lines)"
    return "" if len(suffixes) > 1 else "; text without such a suffix must be renamed, or linked to by a name with one"


def _saved(path: str) -> list[str]:
    """The files of a directory that `datasets.Dataset.save_to_disk` wrote; none if it is no such directory."""
    if os.path.isfile(os.path.join(path, "state.json")):
        state = json.loads((Path(path) / "state.json").read_text())
        return [str(Path(path) / Path(file["filename"]).name) for file in state["_data_files"]]
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        splits = sorted(entry.name for entry in Path(path).iterdir() if entry.is_dir())
        raise DataError(f"{path} holds the splits {', '.join(splits)} of a dataset: name one, as in {path}/{splits[0]}")
    return []


def _is_image_folder(path: Path) -> bool:
    """Whether `path` is a directory with images in its directories, and no file of another format beside these."""
    if not os.path.isdir(path):
        return False
    with reading(str(path)):
        if any(suffix_of(entry) in FORMATS for entry in path.iterdir() if entry.is_file()):
            return False
        return not (path / "dataset_dict.json").is_file() and has_images(path)
