"""`train`: train a task on every row of the data, exactly once per epoch, and prove it."""

from __future__ import annotations

from typing import Any

import ddp_stream.tasks  # noqa: F401  (so that --task finds the ready ones by name)
from ddp_stream.commands.cli import Parser, make_parser
from ddp_stream.training.config import TrainConfig
from ddp_stream.training.loop import ProofError
from ddp_stream.training.train import train


def parser() -> Parser:
    """The command's options."""
    return make_parser(TrainConfig, task=True)


def run(parser: Parser, arguments: Any) -> int:
    """Train; returns the exit code."""
    text = parser.dump(arguments, skip_none=False)
    values = parser.instantiate(arguments)
    config = TrainConfig(**{name: values[name] for name in TrainConfig.__dataclass_fields__})
    try:
        train(config, text)
    except ProofError:
        return 1
    return 0
