"""What users write: a model and the loss of every row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ddp_stream.batch import Batch
from ddp_stream.sources.base import Columns, Source


class Task(ABC):
    """A model and its loss. Everything else is the template's business.

        class MyTask(Task):
            def build_model(self):
                return nn.Linear(4, 1)

            def loss(self, model, batch):
                return (model(batch["features"]) - batch["label"]).square().mean(dim=1)

    The arguments of `__init__` are settings: `--task my_module.MyTask --task.width 64`.
    """

    def setup(self, source: Source) -> None:  # noqa: B027  (a hook, empty by choice)
        """Look at the data before the model is built: names of columns, classes, sizes. Runs on every rank."""

    @property
    def columns(self) -> Sequence[str] | None:
        """The columns that `transform` and `loss` use, after `setup`; formats that can skip the others do. None: all."""
        return None

    def transform(self, columns: Columns) -> Columns:
        """Change columns `[rows, ...]` in the worker, many rows at once, before they are sent to the training process."""
        return columns

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A new model. Every rank draws the same weights, from the run's seed."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """One loss per row of `batch`, shape `[rows]`; the template weighs, averages and differentiates it.

        Call `model(...)` itself, not its parts: that call is what lets gradients be shared between ranks.
        """

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        """What an evaluation reports: one value per row of `batch` by name, each `[rows]`; by default the loss.

        The template averages them over all rows. Runs without gradients, the model in `eval()` mode.
        """
        return {"loss": self.loss(model, batch)}

    def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer | None:
        """An optimizer of your own; None takes the one that the configuration names."""
        return None
