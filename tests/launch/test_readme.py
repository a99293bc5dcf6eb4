"""Every example of the README runs as it stands there, in order, in one directory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"(?:<!-- test: (?P<mark>.+?) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = list(BLOCK.finditer(README.read_text()))


def run(command: list[str], cwd: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples build on each other, as they do for a reader."""
    return tmp_path_factory.mktemp("readme")


def test_every_block_but_the_first_is_run_by_a_test() -> None:
    # The first holds the two commands that .ci/run runs in a fresh environment.
    assert [block["mark"] for block in BLOCKS] == [None, "own-data", "own-loop", "own-task my_task.py", "own-task run"]


@pytest.mark.parametrize("block", BLOCKS[1:], ids=lambda block: block["mark"])
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
