"""The run that is broken in these tests, untouched; and a table of what every broken one did, at the end of the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from broken import SETTINGS
from ranks import DDP_STREAM, ddp_stream, torchrun

_ROWS = pytest.StashKey[dict[str, list[Sequence[object]]]]()


@pytest.fixture(scope="session")
def untouched_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By one process, without workers."""
    folder = tmp_path_factory.mktemp("faults")
    assert ddp_stream("train", *SETTINGS, "--data.num_workers", "0", "--run.dir", "run", cwd=folder).code == 0
    return folder / "run"


@pytest.fixture(scope="session")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By 2 ranks with 2 workers each."""
    folder = tmp_path_factory.mktemp("faults")
    assert torchrun(DDP_STREAM, "train", *SETTINGS, "--run.dir", "run", cwd=folder).code == 0
    return folder / "run"


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`report(title, value, ...)` adds a row to the table called `title`."""

    def add(title: str, *values: object) -> None:
        request.config.stash.setdefault(_ROWS, {}).setdefault(title, []).append(values)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, rows in config.stash.get(_ROWS, {}).items():
        texts = [[f"{value:.1f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        terminalreporter.section(title)
        for row in texts:
            terminalreporter.write_line("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))
