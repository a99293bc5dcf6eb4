"""Death before and after every step by which a checkpoint is published, as the code lists them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken import SETTINGS, assert_as_untouched, events
from ranks import ddp_stream

from ddp_stream.training.checkpoint import Checkpoints
from ddp_stream.training.manifest import find, verify

ALONE: Any = None  # no engine is needed to list them
NAMES = [name for name, _ in Checkpoints(Path(), ALONE, 2).publish_steps(Path(), Path(), {}, {})]
MOMENTS = ["write", *(f"{when} {name}" for name in NAMES for when in ("before", "after"))]
PUBLISHED = MOMENTS.index("after rename")


@pytest.mark.parametrize("background", ["false", "true"], ids=["sync", "async"])
@pytest.mark.parametrize(
    "moment", [pytest.param(name, marks=() if name == "after rename" else pytest.mark.slow) for name in MOMENTS]
)
def test_killed_while_publishing(
    moment: str, background: str, untouched_alone: Path, tmp_path: Path, report: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    arguments = ["train", *SETTINGS, "--data.num_workers", "0", "--run.dir", "run"]
    arguments += ["--checkpoint.async_save", background]
    fault = {"at": moment, "step": 30, "to": 0, "signal": "SIGKILL"}
    job = ddp_stream(*arguments, cwd=tmp_path, env={"DDP_STREAM_FAULT": json.dumps(fault)})
    assert job.code == -signal.SIGKILL
    names = [path.name for path in find(run / "checkpoints")]
    published = MOMENTS.index(moment) >= PUBLISHED
    # At most one more than retention leaves, and whatever has its name is whole.
    assert names in (
        [["step-00000020", "step-00000030"], ["step-00000010", "step-00000020", "step-00000030"]]
        if published
        else [["step-00000010", "step-00000020"]]
    )
    assert [verify(path) for path in find(run / "checkpoints")] == [None] * len(names)
    again = ddp_stream(*arguments, cwd=tmp_path)
    assert again.code == 0, again.err
    (resume,) = events(run, "resume")
    report("torn writes: killed where, going on from which step", moment, background, resume["step"])
    assert (resume["step"], resume["damaged"]) == (30 if published else 20, [])
    assert_as_untouched(run, untouched_alone)
