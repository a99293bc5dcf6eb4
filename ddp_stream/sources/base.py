"""What a source is: a fixed number of rows, read by row id, in columns."""

from __future__ import annotations

import difflib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ddp_stream.texts import Texts

Ints: TypeAlias = NDArray[np.int64]
Column: TypeAlias = "torch.Tensor | NDArray[Any] | Texts | list[Any]"
Columns: TypeAlias = Mapping[str, Column]


class DataError(ValueError):
    """Something in the data stands in the way of training on it: names the file, and the column and row if known."""


class Source(ABC):
    """Rows `0..len(self)-1`, read in columns.

    A subclass writes `__len__` and `take`. It opens its files in the process that reads, so that it pickles small
    and survives fork, spawn and forkserver.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def take(self, rows: Ints) -> Columns:
        """The rows with ids `rows [n]`, in that order: each column a tensor, array or list of length `n`."""

    def ahead(self, rows: Ints) -> None:  # noqa: B027  (a hint, which most sources have no use for)
        """`rows` are taken soon: begin to read them, beside what the caller does."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.take(np.zeros(min(1, len(self)), np.int64)))

    def blocks(self) -> Ints | None:
        """Where natural blocks begin, `[blocks + 1]` from 0 to `len(self)`; None where any row is as near as any."""
        return None

    def fingerprint(self) -> str:
        """What identifies the data: equal for equal data, different when a file has changed."""
        return fingerprint_of(type(self).__name__, len(self), self.columns)

    def select(self, columns: Sequence[str]) -> Source:
        """The same rows with these columns only; formats that can skip the others do not read them."""
        check_columns(columns, self.columns, str(self))
        return _Selected(self, tuple(columns))

    @property
    def decodes_blocks(self) -> bool:
        """To read a row is to decode the whole block that it is in."""
        return False

    @property
    def forward_only(self) -> bool:
        """Rows can be read in their own order only."""
        return False

    @property
    def excluded(self) -> Mapping[int, str]:
        """Rows that were left out on purpose and are not counted here: their ids before that, and why."""
        return {}

    def stamp(self) -> str | None:
        """Like `fingerprint`, but another one after a file was touched: what was found out about the rows may be kept
        under it. None if there are no files."""
        return None

    def where(self, row: int) -> str:
        """The file and the row in it, for messages."""
        return f"{self}, row {row}"

    def sample(self, columns: Columns, index: int) -> Any:
        """Row `index` of taken `columns`, as `StreamingDataset` yields it: by default a dict."""
        return {name: column[index] for name, column in columns.items()}

    def __str__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows)"


class _Selected(Source):
    def __init__(self, source: Source, columns: tuple[str, ...]) -> None:
        self._source = source
        self._columns = columns

    def __len__(self) -> int:
        return len(self._source)

    def take(self, rows: Ints) -> Columns:
        taken = self._source.take(rows)
        return {name: taken[name] for name in self._columns}

    def ahead(self, rows: Ints) -> None:
        self._source.ahead(rows)

    @property
    def columns(self) -> tuple[str, ...]:
        return self._columns

    def blocks(self) -> Ints | None:
        return self._source.blocks()

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    @property
    def decodes_blocks(self) -> bool:
        return self._source.decodes_blocks

    @property
    def forward_only(self) -> bool:
        return self._source.forward_only

    @property
    def excluded(self) -> Mapping[int, str]:
        return self._source.excluded

    def stamp(self) -> str | None:
        inner = self._source.stamp()
        return None if inner is None else fingerprint_of(inner, self._columns)

    def where(self, row: int) -> str:
        return self._source.where(row)

    def __str__(self) -> str:
        return str(self._source)


def original(rows: Mapping[int, str], dropped: Ints) -> tuple[Ints, dict[int, str]]:
    """`rows` and their reasons by the ids they had before the rows `dropped` (sorted) were left out.

    >>> original({2: "x"}, np.array([0, 1]))[1]
    {4: 'x'}
    """
    left = np.array(sorted(rows), np.int64)
    ids = before(left, dropped)
    return ids, dict(zip(ids.tolist(), (rows[row] for row in left.tolist()), strict=True))


def before(rows: Ints, dropped: Ints) -> Ints:
    """The ids that `rows` had before the rows `dropped [n]` (sorted) were left out."""
    return rows + np.searchsorted(dropped - np.arange(len(dropped)), rows, side="right")


def fingerprint_of(*parts: Any) -> str:
    """A short hash of values that JSON can write."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_columns(wanted: Iterable[str], available: Sequence[str], where: str) -> None:
    """Raises DataError, with the nearest name, for the first of `wanted` that is not `available`."""
    for name in wanted:
        if name not in available:
            near = difflib.get_close_matches(name, available, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            shown = ", ".join(available[:20]) + (", ..." if len(available) > 20 else "")
            raise DataError(f"{where} has no column {name!r}{hint} It has: {shown}")


def check_taken(columns: Columns, rows: int, where: str) -> None:
    """Raises DataError if a column has not exactly `rows` values: such a batch would lose or invent rows."""
    for name, column in columns.items():
        if len(column) != rows:
            raise DataError(
                f"{where}: column {name!r} has {len(column)} values where {rows} rows were asked for, so rows would be "
                f"lost or invented; take(rows) and a transform must return exactly one value a row"
            )
