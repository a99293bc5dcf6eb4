"""Ready tasks for tables of numbers: `Regression` and `Classification`, with a small MLP."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ddp_stream.batch import Batch, as_tensor
from ddp_stream.sources.base import Columns, DataError, Source, check_columns
from ddp_stream.training.task import Task
from ddp_stream.transforms import side_by_side

_ROWS_AT_ONCE = 1 << 16


class _Tabular(Task):
    """Columns of numbers, side by side as `features [rows, n]`, against the column `label`."""

    def __init__(self, label: str, features: Sequence[str] | None, hidden: Sequence[int]) -> None:
        self.label = label
        self.features = list(features) if features is not None else None
        self.hidden = tuple(hidden)
        self.n_features = 0

    def setup(self, source: Source) -> None:
        if self.features is not None and self.label in self.features:
            raise DataError(f"the label {self.label!r} is among the features: the model would only learn to copy it")
        check_columns([self.label], source.columns, str(source))
        check_columns(self.features or [], source.columns, str(source))
        if self.features is not None:
            source = source.select([*self.features, self.label])
        example = source.take(np.zeros(min(1, len(source)), np.int64))
        if self.features is None:
            self.features = [name for name in source.columns if name != self.label and _is_numeric(example[name])]
        if not self.features:
            raise DataError(
                f"{source} has no numeric column but the label {self.label!r}: there is nothing to learn from; it has "
                f"{', '.join(source.columns)}"
            )
        for name in self.features:
            _check_numeric(name, example[name], source)
        self.n_features = self._stack(example).shape[1]

    @property
    def columns(self) -> Sequence[str] | None:
        return None if self.features is None else [*self.features, self.label]

    def transform(self, columns: Columns) -> Columns:
        return {"features": self._stack(columns), "label": self._label(columns[self.label])}

    def _stack(self, columns: Columns) -> torch.Tensor:
        """The features side by side, `[rows, n]` float32."""
        assert self.features is not None, "setup() names the features"
        return side_by_side([columns[name] for name in self.features])

    def _label(self, column: Any) -> torch.Tensor:
        raise NotImplementedError

    def _mlp(self, outputs: int) -> nn.Module:
        sizes = [self.n_features, *self.hidden]
        layers: list[nn.Module] = []
        for inputs, width in pairwise(sizes):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class Regression(_Tabular):
    """Predict numbers by least squares: the loss of a row is the mean squared error of its label.

    Args:
        label: the column to predict
        features: the columns to predict it from; None takes every numeric column but the label
        hidden: widths of the hidden layers
    """

    def __init__(
        self, label: str = "label", features: list[str] | None = None, hidden: tuple[int, ...] = (16,)
    ) -> None:
        super().__init__(label, features, hidden)
        self.n_outputs = 0

    def setup(self, source: Source) -> None:
        super().setup(source)
        example = source.select([self.label]).take(np.zeros(min(1, len(source)), np.int64))[self.label]
        _check_numeric(self.label, example, source)
        self.n_outputs = self._label(example).shape[1]

    def _label(self, column: Any) -> torch.Tensor:
        return side_by_side([column])

    def build_model(self) -> nn.Module:
        return self._mlp(self.n_outputs)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        error: torch.Tensor = model(batch["features"]) - batch["label"]
        return error.square().mean(dim=1)


class Classification(_Tabular):
    """Predict one of several classes by cross-entropy.

    Args:
        label: the column with the class: whole numbers, or strings
        features: the columns to predict it from; None takes every numeric column but the label
        hidden: widths of the hidden layers
        num_classes: labels are `0..num_classes-1`; None reads the label column once to find its distinct values
    """

    def __init__(
        self,
        label: str,
        features: list[str] | None = None,
        hidden: tuple[int, ...] = (16,),
        num_classes: int | None = None,
    ) -> None:
        super().__init__(label, features, hidden)
        self.classes: list[Any] | None = None if num_classes is None else list(range(num_classes))

    def setup(self, source: Source) -> None:
        super().setup(source)
        if self.classes is None:
            self.classes = _distinct(source.select([self.label]), self.label)

    def _label(self, column: Any) -> torch.Tensor:
        assert self.classes is not None, "setup() finds the classes"
        values = np.asarray(column).reshape(len(column))
        classes = np.asarray(self.classes)
        index = np.searchsorted(classes, values).clip(max=len(classes) - 1)
        unknown = np.flatnonzero(classes[index] != values)
        if len(unknown):
            raise DataError(
                f"the label {self.label!r} holds {values[unknown[0]]!r}, which is none of the {len(classes)} classes "
                f"{self.classes[:10]}"
            )
        return torch.from_numpy(index)

    def build_model(self) -> nn.Module:
        assert self.classes is not None, "setup() finds the classes"
        return self._mlp(len(self.classes))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(model(batch["features"]), batch["label"], reduction="none")

    def metrics(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        scores = model(batch["features"])
        return {
            "loss": functional.cross_entropy(scores, batch["label"], reduction="none"),
            "accuracy": (scores.argmax(dim=1) == batch["label"]).float(),
        }


def _is_numeric(column: Any) -> bool:
    column = as_tensor(column)
    return isinstance(column, torch.Tensor) and not column.is_complex()


def _check_numeric(name: str, column: Any, source: Source) -> None:
    if not _is_numeric(column):
        raise DataError(
            f"{source}: column {name!r} holds {type(column[0]).__name__} values such as {column[0]!r}, and this task needs "
            f"numbers; name other columns with --task.features, or write a task with a transform of your own"
        )


def _distinct(source: Source, name: str) -> list[Any]:
    found: set[Any] = set()
    for start in range(0, len(source), _ROWS_AT_ONCE):
        column = source.take(np.arange(start, min(start + _ROWS_AT_ONCE, len(source))))[name]
        found.update(np.unique(np.asarray(column)).tolist())
        if len(found) > 100_000:
            raise DataError(f"the label {name!r} has more than 100,000 different values: is it a class?")
    return sorted(found)
