"""A source whose columns a function of the user's makes from another one's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from ddp_stream.sources.base import Columns, DataError, Ints, Source, check_taken, fingerprint_of
from ddp_stream.sources.paths import file_identity
from ddp_stream.texts import as_lists


class Transformed(Source):
    """`transform(columns)` of the rows of `source`: it runs where rows are read, in the workers, on many rows at once.

    It may change the columns, not the number of rows, and must depend on nothing but the rows.

    Args:
        source: where the rows come from
        transform: a function of a dict of columns to a dict of columns, each with a value for every row

    Raises:
        DataError: (by `take`) the transform returned more or fewer values than rows.
    """

    def __init__(self, source: Source, transform: Callable[[Columns], Columns]) -> None:
        self._source = source
        self._transform = transform
        self._names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self._source)

    def take(self, rows: Ints) -> Columns:
        columns = self._source.take(rows)
        check_taken(columns, len(rows), str(self._source))
        try:
            columns = self._transform(as_lists(columns))
        except Exception as error:
            raise self._named(error, rows) from error
        check_taken(columns, len(rows), f"the transform {name_of(self._transform)} of {self._source}")
        return columns

    def _named(self, error: Exception, rows: Ints) -> Exception:
        """`error` with the first of `rows` that makes the transform fail by itself, found by halving."""
        while len(rows) > 1:
            half = rows[: len(rows) // 2]
            try:
                self._transform(as_lists(self._source.take(half)))
                rows = rows[len(half) :]
            except Exception as found:
                error, rows = found, half
        try:
            self._transform(as_lists(self._source.take(rows)))
            return error  # it takes several rows to make it fail
        except Exception as found:
            return DataError(f"{self.where(int(rows[0]))}: the transform {name_of(self._transform)} fails: {found}")

    def ahead(self, rows: Ints) -> None:
        self._source.ahead(rows)

    @property
    def columns(self) -> tuple[str, ...]:
        if self._names is None:
            self._names = super().columns
        return self._names

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
        """Another one after the module of the transform changed, too."""
        inner = self._source.stamp()
        module: Any = sys.modules.get(_function(self._transform).__module__)
        file = getattr(module, "__file__", None)
        if inner is None or file is None:
            return None
        settings = getattr(self._transform, "__dict__", {}) if not hasattr(self._transform, "__name__") else {}
        return fingerprint_of(inner, name_of(self._transform), file_identity(file), settings)

    def where(self, row: int) -> str:
        return self._source.where(row)

    def __str__(self) -> str:
        return str(self._source)


def name_of(transform: Callable[..., Any]) -> str:
    """The import path of a function, or of the class of a callable object."""
    return f"{_function(transform).__module__}.{_function(transform).__qualname__}"


def _function(transform: Any) -> Any:
    return transform if hasattr(transform, "__qualname__") else type(transform)
