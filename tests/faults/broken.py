"""The run that these tests break, and how they see that it ended as if nobody had."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddp_stream.training.rundir import read_metrics, timeline

ROWS, STEPS, EVERY = (
    600,
    38,
    10,
)  # 37 steps of 16 rows an epoch and one of 8; a checkpoint after every 10th and at its end
EPOCHS = 2
SOURCE = "ddp_stream.sources.SyntheticRegression"
SETTINGS = [
    *("--data.source", SOURCE, "--data.source.total_samples", str(ROWS), "--data.global_batch_size", "16"),
    *("--eval.source", SOURCE, "--eval.source.total_samples", "100", "--eval.source.seed", "1"),
    *("--data.shuffle", "full", "--epochs", str(EPOCHS), "--checkpoint.every_steps", str(EVERY)),
    *("--audit.trace", "true"),
]
# As launch/ and slurm/ have it: SIGUSR1 reaches the ranks, which by default it does not.
AS_LAUNCHED = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "PET_SHUTDOWN_TIMEOUT": "60"}

_EXPECTED = re.compile(
    r"config\.yaml|metrics\.jsonl|status\.json|model\.safetensors|trace/rank-\d{5}\.jsonl|\.fault-[\w-]+"
    r"|checkpoints/(set-aside-)?step-\d{8}/(state\.json|manifest\.json|[\w.-]+\.safetensors)"
)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(run / "metrics.jsonl") if event["event"] == kind]


def status(run: Path) -> str:
    """`done`, `preempted`, `failed`, or `none` where nobody lived to say so."""
    path = run / "status.json"
    return str(json.loads(path.read_text())["status"]) if path.exists() else "none"


def rows_by_epoch(run: Path) -> list[list[int]]:
    """What trained the weights, by the traces: a step behind which a later attempt began was rolled back."""
    began = {event["attempt"]: 0 for event in events(run, "start")}
    began |= {event["attempt"]: event["step"] for event in events(run, "resume")}
    epochs: dict[int, list[int]] = {}
    for path in (run / "trace").glob("*.jsonl"):
        for line in read_metrics(path):
            if all(line["step"] <= step for attempt, step in began.items() if attempt > line["attempt"]):
                epochs.setdefault(line["epoch"], []).extend(line["rows"])
    return [sorted(epochs[epoch]) for epoch in sorted(epochs)]


def assert_exactly_once(run: Path, rows: int = ROWS, epochs: int = EPOCHS) -> None:
    """By the proof that is always on, and by the traces, which know nothing of its arithmetic."""
    proofs = [event for event in timeline(read_metrics(run / "metrics.jsonl")) if event["event"] == "epoch"]
    assert [(event["epoch"], event["exactly_once"], event["rows"]) for event in proofs] == [
        (epoch, True, rows) for epoch in range(epochs)
    ]
    assert rows_by_epoch(run) == [list(range(rows))] * epochs


def assert_as_untouched(run: Path, untouched: Path) -> None:
    """The same weights bit for bit, the same losses and evaluations, every row once, and no file that stays behind."""
    assert status(run) == "done"
    assert (run / "model.safetensors").read_bytes() == (untouched / "model.safetensors").read_bytes()
    assert_exactly_once(run)
    assert _story(run) == _story(untouched)
    assert_no_leftovers(run)


def _story(run: Path) -> list[Mapping[str, Any]]:
    kinds = {"step", "epoch", "evaluation"}
    told = [event for event in timeline(read_metrics(run / "metrics.jsonl")) if event["event"] in kinds]
    return [{name: value for name, value in event.items() if name not in {"attempt", "time"}} for event in told]


def assert_no_leftovers(run: Path) -> None:
    files = [str(path.relative_to(run)) for path in run.rglob("*") if not path.is_dir()]
    assert [name for name in files if not _EXPECTED.fullmatch(name)] == []


def shared_memory() -> set[str]:
    """Blocks of tensors in /dev/shm whose maker is dead."""
    makers = {name: re.match(r"torch_(\d+)_", name) for name in os.listdir("/dev/shm")}
    return {name for name, maker in makers.items() if maker is not None and not Path("/proc", maker[1]).exists()}
