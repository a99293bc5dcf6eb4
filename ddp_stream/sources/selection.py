"""Rows that are left out on purpose: those that the user names, and those that cannot be read.

They are left out before the plan is made, so that all ranks and workers see the same source, which holds the other rows,
numbered anew from 0; `source.excluded` says which are not there, by the ids in the whole source, and why. To know them
beforehand, `skip_bad_rows` reads all rows once. What it finds in files is kept in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ddp_stream.sources import cache
from ddp_stream.sources.base import (
    Columns,
    DataError,
    Ints,
    Source,
    before,
    check_columns,
    check_taken,
    fingerprint_of,
    original,
)

_ROWS_AT_ONCE = 1024


def exclude(source: Source, rows: Iterable[int] | Mapping[int, str]) -> Source:
    """The rows of `source` but for `rows`, each of which may come with a reason.

    Raises:
        ValueError: there is no such row.
    """
    reasons: dict[int, str] = (
        dict(rows) if isinstance(rows, Mapping) else {int(row): "left out by choice" for row in rows}
    )
    if not reasons:
        return source
    wrong = next((row for row in reasons if not 0 <= row < len(source)), None)
    if wrong is not None:
        raise ValueError(f"row {wrong} cannot be left out: {source} has the rows 0..{len(source) - 1}")
    native: Callable[[Mapping[int, str]], Source] | None = getattr(source, "without", None)
    return native(reasons) if native is not None else Excluding(source, reasons)


class Excluding(Source):
    """A source that is never asked for some of its rows."""

    def __init__(self, source: Source, reasons: Mapping[int, str]) -> None:
        self._source = source
        self._reasons = reasons
        self._dropped = np.array(sorted(reasons), np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reasons": {}}

    def __len__(self) -> int:
        return len(self._source) - len(self._dropped)

    def take(self, rows: Ints) -> Columns:
        return self._source.take(before(rows, self._dropped))

    def ahead(self, rows: Ints) -> None:
        self._source.ahead(before(rows, self._dropped))

    @property
    def columns(self) -> tuple[str, ...]:
        return self._source.columns

    def blocks(self) -> Ints | None:
        blocks = self._source.blocks()
        return None if blocks is None else blocks - np.searchsorted(self._dropped, blocks)

    def fingerprint(self) -> str:
        return fingerprint_of(self._source.fingerprint(), self._dropped.tolist())

    def select(self, columns: Sequence[str]) -> Source:
        check_columns(columns, self.columns, str(self))
        return Excluding(self._source.select(columns), self._reasons)

    @property
    def decodes_blocks(self) -> bool:
        return self._source.decodes_blocks

    @property
    def forward_only(self) -> bool:
        return self._source.forward_only

    @property
    def excluded(self) -> Mapping[int, str]:
        inner = self._source.excluded
        return {**inner, **original(self._reasons, np.array(sorted(inner), np.int64))[1]}

    def stamp(self) -> str | None:
        inner = self._source.stamp()
        return None if inner is None else fingerprint_of(inner, self._dropped.tolist())

    def where(self, row: int) -> str:
        return self._source.where(int(before(np.array([row]), self._dropped)[0]))

    def sample(self, columns: Columns, index: int) -> Any:
        return self._source.sample(columns, index)

    def __str__(self) -> str:
        return str(self._source)


def skip_bad_rows(source: Source) -> Source:
    """The rows of `source` that can be read; reads all of them to find out, once for all processes if they are in files.

    Raises:
        DataError: no row can be read, or the fault is not that of single rows.
    """
    stamp = source.stamp()
    if stamp is None:
        return exclude(source, find_bad_rows(source))
    file = cache.cache_dir() / f"{fingerprint_of('bad rows', stamp)}.index"

    def load(path: Path) -> dict[int, str]:
        return {int(row): reason for row, reason in cache.from_array(cache.read_arrays(path)["bad"]).items()}

    def make() -> dict[int, str]:
        bad = find_bad_rows(source)
        cache.write_arrays(file, {"bad": cache.as_array({str(row): reason for row, reason in bad.items()})})
        return bad

    try:
        bad = cache.load_or_make(file, load, make, f"the list of bad rows in {source}")
    except TimeoutError:
        raise
    except OSError:  # nowhere to keep it
        bad = find_bad_rows(source)
    return exclude(source, bad)


def find_bad_rows(source: Source) -> dict[int, str]:
    """Rows of `source` that cannot be read, and why, by their ids."""
    in_block: Callable[[int], dict[int, str]] | None = getattr(source, "bad_rows", None)
    blocks = source.blocks()
    bad: dict[int, str] = {}
    if in_block is not None and blocks is not None:
        for block in range(len(blocks) - 1):
            bad |= in_block(block)
    else:
        for start in range(0, len(source), _ROWS_AT_ONCE):
            end = min(start + _ROWS_AT_ONCE, len(source))
            found = search(range(start, end), lambda part: _take(source, part))
            if start == 0 and len(found) == end > 1:
                _take(source, range(end))  # none of so many rows: the fault lies elsewhere, and this says where
            places = {row: getattr(source, "where", str)(row) for row in found}
            bad |= {row: why if places[row] in why else f"{places[row]}: {why}" for row, why in found.items()}
    if len(bad) == len(source) > 0:
        row, reason = next(iter(bad.items()))
        raise DataError(f"{source}: no row can be read; row {row}: {reason}")
    return dict(sorted(bad.items()))


def _take(source: Source, rows: range) -> None:
    check_taken(source.take(np.arange(rows.start, rows.stop)), len(rows), str(source))


def search(rows: range, read: Callable[[range], Any]) -> dict[int, str]:
    """Which of `rows` `read` raises for, and what, by halving."""
    try:
        read(rows)
    except Exception as error:  # a transform raises what it likes
        if len(rows) == 1:
            return {rows[0]: str(error)}
        half = len(rows) // 2
        return search(rows[:half], read) | search(rows[half:], read)
    return {}


def bad_values(table: pa.Table, decode: Callable[[pa.ChunkedArray, str], Any]) -> dict[int, str]:
    """Rows of `table` with a value that `decode(column, name)` raises for, and what.

    Raises:
        DataError: `decode` raises for no values at all, so that the column is of a type that cannot be read.
    """
    bad: dict[int, str] = {}
    for name in table.column_names:
        column = table.column(name)
        decode(column[:0], name)
        bad = _bad_in_column(column, name, decode) | bad
    return bad


def _bad_in_column(column: pa.ChunkedArray, name: str, decode: Callable[[pa.ChunkedArray, str], Any]) -> dict[int, str]:
    bad: dict[int, str] = {}
    places = np.arange(len(column))
    nulls = np.flatnonzero(column.is_null().to_numpy()) if column.null_count else np.zeros(0, np.int64)
    if len(nulls) and search(range(1), lambda _: decode(column.take(nulls[:1]), name)):
        bad = {row: f"column {name!r} is null" for row in nulls.tolist()}  # one is as bad as the other
        places = np.delete(places, nulls)
    rest = column.take(places)
    if len(rest):
        wrong = search(range(len(rest)), lambda rows: decode(rest[rows.start : rows.stop], name))
        bad |= {int(places[row]): reason for row, reason in wrong.items()}
    return bad


def present(source: Source, rows: Iterable[int]) -> list[int]:
    """Ids in `source` of `rows`, which are ids in the whole source; those that are left out already are passed over."""
    dropped = np.array(sorted(source.excluded), np.int64)
    wanted = np.setdiff1d(np.array(list(rows), np.int64), dropped)
    return [int(row) for row in wanted - np.searchsorted(dropped, wanted)]
