"""Rows that can only be read forward, such as those of a pipe, a socket or a generator."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ddp_stream.sources.base import Columns, DataError, Ints, Source, fingerprint_of
from ddp_stream.sources.memory import collate


class ForwardOnly(Source):
    """The first `rows` rows of an iterable, in the order in which it yields them.

    Every reader (each worker of each rank) iterates for itself, and passes over the rows of the others: they are exactly
    once in an epoch on any number of ranks and workers, and all readers together read them as many times as there are
    readers. A resume goes on at the right row, but only after it has read past all that came before.

        --data.source ddp_stream.sources.ForwardOnly --data.source.open my_module.lines --data.source.rows 100000

    Args:
        open: a function, by import path, that returns the iterable: the same rows, in the same order, in every process and
            at every call; a row is a dict, a tuple or a value, as in a torch `Dataset`
        rows: how many rows an epoch has, such as steps times `global_batch_size`; what follows them is not read

    Raises:
        DataError: (by `take`) rows are asked for in another order, or there are fewer.
    """

    def __init__(self, open: Callable[..., Any], rows: int) -> None:
        if rows < 1:
            raise ValueError(f"rows={rows}: an epoch needs at least one row")
        self._open: Callable[[], Iterable[Any]] = open
        self._rows = rows
        self._first: Any = None
        self._rest: tuple[int, Iterator[Any]] | None = None  # the process that reads, and where it is
        self._read = 0
        self._last: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rest": None, "_first": None, "_last": None}

    @property
    def forward_only(self) -> bool:
        return True

    def __len__(self) -> int:
        return self._rows

    def take(self, rows: Ints) -> Columns:
        if (np.diff(rows) < 0).any():
            raise DataError(
                f"{self} is read forward only, and rows were asked for in another order: use --data.shuffle none and "
                f"--data.lanes 1, or write the rows to files"
            )
        return collate([self._row(row) for row in rows.tolist()])

    def _row(self, row: int) -> Any:
        if row == 0 and self._first is not None:  # what a row looks like is asked for now and then
            return self._first
        if self._rest is None or self._rest[0] != os.getpid() or row < self._read - 1:
            self._rest, self._read = (os.getpid(), iter(self._open())), 0
        while self._read <= row:
            try:
                self._last = next(self._rest[1])
            except StopIteration:
                raise DataError(
                    f"{self} ended after {self._read} rows, so that row {row} is missing and no epoch "
                    f"can end: give the number of rows there are (--data.source.rows)"
                ) from None
            self._read += 1
            if self._read == 1:
                self._first = self._last
        return self._last

    def fingerprint(self) -> str:
        """What can be known without reading: where the rows come from, and how many."""
        return fingerprint_of("ForwardOnly", self._name, self._rows)

    @property
    def _name(self) -> str:
        kind = self._open if hasattr(self._open, "__qualname__") else type(self._open)
        return f"{kind.__module__}.{kind.__qualname__}"

    def __str__(self) -> str:
        return f"{self._name} ({self._rows} rows)"
