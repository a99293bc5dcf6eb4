"""The run that is broken in these tests, untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken import SETTINGS
from ranks import DDP_STREAM, ddp_stream, torchrun


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
