"""Tables of what tests saw, at the end of the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

_ROWS = pytest.StashKey[dict[str, list[Sequence[object]]]]()


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
            line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
            terminalreporter.write_line(line.rstrip())
