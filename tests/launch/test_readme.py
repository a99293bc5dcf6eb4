"""Every example of the README runs as it stands there, in order, in one directory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text()
BLOCK = re.compile(r"(?:<!-- test: (?P<mark>.+?) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = list(BLOCK.finditer(TEXT))
ELSEWHERE = ("two-hosts ", "slurm ", "none, needs ")  # test_two_hosts.py runs these, tests/slurm those, CI not the last
FAULTS = ("--audit.broken", "--data.lanes 3")  # shown to fail
HERE = [block for block in BLOCKS[1:] if not block["mark"].startswith(ELSEWHERE)]

# Commands outside such blocks: after a $ in text, and in a table of commands. The scripts' help has some, too.
AFTER_PROMPT = re.findall(r"^\$ (.+)$", TEXT, re.MULTILINE)
IN_TABLES = re.findall(r"^\|[^|`]+\| `([^`|]+)` \|$", TEXT, re.MULTILINE)
IN_HELP = [
    example
    for script in sorted(README.parent.glob("launch/*.sh"))
    for example in re.findall(r"^(?:Example:)? +(launch/.+)$", script.read_text(), re.MULTILINE)
    if "--nnodes" not in example  # test_two_hosts.py runs these
]


def run(command: list[str], cwd: Path, *, code: int = 0, **options: Any) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples build on each other, as they do for a reader."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "launch").symlink_to(README.parent / "launch")  # as in a clone
    return folder


def test_every_block_but_the_first_is_run_by_a_test() -> None:
    # The first holds the two commands that .ci/run runs in a fresh environment.
    assert [block["mark"] for block in BLOCKS] == [
        *(None, "own-data", "own-transform", "own-loop", "own-task my_task.py", "own-task run"),
        *("two-hosts torchrun", "two-hosts accelerate"),
        *("slurm submit", "slurm sweep", "slurm wrap", "none, needs Pyxis"),
    ]


def test_every_command_elsewhere_is_run_by_a_test() -> None:
    """That is, by test_command, or with --hosts by test_doctor_faults.py: no way of writing one goes unseen."""
    written = re.findall(r"^.*(?:python -m ddp_stream|launch/\w+\.sh|ddp-stream) .*$", TEXT, re.MULTILINE)
    in_blocks = "\n".join(block["code"] for block in BLOCKS)
    known = [*AFTER_PROMPT, *IN_TABLES]
    assert [line for line in written if line not in in_blocks and not any(command in line for command in known)] == []
    assert len(known) >= 10


@pytest.mark.parametrize("block", HERE, ids=lambda block: block["mark"])
def test_block(block: re.Match[str], folder: Path) -> None:
    mark, code = block["mark"], block["code"]
    if mark.endswith(".py"):
        (folder / mark.split()[-1]).write_text(code)
        return
    interpreter = ["bash", "-euo", "pipefail", "-c"] if block["language"] == "bash" else [sys.executable, "-c"]
    out = run([*interpreter, code], folder)
    for name in re.findall(r"--run.dir (\S+)", code):
        events = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        epochs = [event for event in events if event["event"] == "epoch"]
        assert all(epoch["exactly_once"] and epoch["rows"] == 442 for epoch in epochs)
        assert epochs[-1]["loss"] < epochs[0]["loss"]
        assert "442 rows, each exactly once" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", dict.fromkeys(command for command in [*AFTER_PROMPT, *IN_TABLES, *IN_HELP] if "--hosts" not in command)
)
def test_command(command: str, folder: Path) -> None:
    if not (folder / "diabetes.csv").exists():
        run(["bash", "-euo", "pipefail", "-c", HERE[0]["code"]], folder)
    # --debug asks on the terminal: go on, and then there is nobody any more.
    run(["bash", "-c", command], folder, code=any(fault in command for fault in FAULTS), input="c\n")
