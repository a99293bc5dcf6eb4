"""The run directory: one timeline over attempts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddp_stream.training.rundir import RunDir, read_metrics, timeline


def told(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(event["event"], event["attempt"], event.get("step")) for event in timeline(events)]


def attempt(number: int, *events: tuple[str, int]) -> list[dict[str, Any]]:
    start = {"event": "start", "attempt": number}
    return [start, *({"event": name, "attempt": number, "step": step} for name, step in events)]


def test_of_a_step_that_was_done_again_the_highest_attempt_counts() -> None:
    first = attempt(0, ("step", 1), ("step", 2), ("checkpoint", 2), ("step", 3), ("epoch", 3), ("evaluation", 3))
    second = attempt(1, ("resume", 2), ("step", 3), ("step", 4), ("checkpoint", 4), ("stop", 4))
    third = attempt(2, ("resume", 4), ("step", 5))
    assert told(first + second + third) == [
        ("start", 0, None),
        *(("step", 0, 1), ("step", 0, 2), ("checkpoint", 0, 2)),
        ("start", 1, None),
        *(("resume", 1, 2), ("step", 1, 3), ("step", 1, 4), ("checkpoint", 1, 4), ("stop", 1, 4)),
        ("start", 2, None),
        *(("resume", 2, 4), ("step", 2, 5)),
    ]


def test_steps_that_were_rolled_back_and_not_reached_again_do_not_count() -> None:
    first = attempt(0, ("step", 1), ("step", 2), ("checkpoint", 2), ("step", 3), ("checkpoint", 3), ("step", 4))
    second = attempt(1, ("resume", 2), ("stop", 2))
    assert [entry for entry in told(first + second) if entry[0] != "start"] == [
        *(("step", 0, 1), ("step", 0, 2), ("checkpoint", 0, 2)),
        *(("resume", 1, 2), ("stop", 1, 2)),
    ]


def test_a_run_that_starts_anew_has_no_past() -> None:
    first = attempt(0, ("step", 1), ("step", 2), ("checkpoint", 2))
    second = attempt(1, ("step", 1))
    assert [entry for entry in told(first + second) if entry[0] != "start"] == [("step", 1, 1)]


def test_a_line_that_a_crash_cut_short_is_left_out_and_the_next_attempt_begins_a_new_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path, 0)
    assert run.open("") == 0
    run.log("start", attempt=0)
    run.log("step", attempt=0, step=1)
    run.flush()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "att')
    again = RunDir(tmp_path, 0)
    assert again.open("") == 1
    again.log("start", attempt=1)
    assert told(read_metrics(tmp_path / "metrics.jsonl")) == [("start", 0, None), ("step", 0, 1)]
    assert [event["event"] for event in again.timeline()] == ["start", "step", "start"]
