"""Two hosts, each with a network of its own, make one world by the commands of the README and of the scripts' help."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import CABLE, STRAY, Ended, Host, needs_hosts, together, two_hosts
from test_scripts import LAUNCH, ROOT, environment

pytestmark = [pytest.mark.slow, needs_hosts]

ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
README = (ROOT / "README.md").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where both stand, as in a clone: `launch/` is here."""
    (tmp_path / "launch").symlink_to(LAUNCH)
    return tmp_path


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    # As Debian's installer writes it, each host's own name leads to itself alone: gloo must not go by it.
    with two_hosts(tmp_path, own="127.0.1.1") as hosts:
        yield hosts


def readme(mark: str) -> list[str]:
    block = re.search(rf"<!-- test: two-hosts {mark} -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert block is not None
    return block[1].splitlines()


def help_of(script: str) -> list[str]:
    examples = (LAUNCH / script).read_text().partition("Example")[2].partition("\nEND\n")[0]
    return re.findall(r"^  (launch/.*)", examples, re.MULTILINE)


def run(lines: list[str], hosts: list[Host], folder: Path, **env: str) -> list[Ended]:
    commands = dict(zip(hosts, map(shlex.split, lines), strict=True))
    return together(commands, cwd=folder, env=environment(**ON_CPU, **env))


def assert_trained(folder: Path, engine: str, epochs: int) -> None:
    (run_dir,) = (folder / "runs").iterdir()
    assert json.loads((run_dir / "status.json").read_text())["status"] == "done"
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(event["world_size"], event["engine"]) for event in events if event["event"] == "start"] == [(4, engine)]
    proofs = [(event["exactly_once"], event["rows"]) for event in events if event["event"] == "epoch"]
    assert proofs == [(True, 1000)] * epochs


@pytest.mark.parametrize(("mark", "engine"), [("torchrun", "ddp"), ("accelerate", "accelerate")])
def test_trains_exactly_once(mark: str, engine: str, hosts: list[Host], folder: Path) -> None:
    first, second = run(readme(mark), hosts, folder)
    assert first.code == second.code == 0, first.text + second.text
    assert "4 rank(s) x 2 worker(s)" in first.text
    assert "exactly once" not in second.text  # rank 0 is on the first, and it alone speaks
    assert_trained(folder, engine, epochs=10)


def test_by_the_head_s_name(folder: Path) -> None:
    lines = [line.replace("10.0.0.1", "first") for line in help_of("multi_node.sh")]
    with two_hosts(folder) as hosts:
        first, second = run(lines, hosts, folder)
    assert first.code == second.code == 0, first.text + second.text
    assert_trained(folder, "ddp", epochs=1)


LOOK = """
import sys
from ddp_stream.training.network import interface_to_head
for head in sys.argv[1:]:
    print(head, interface_to_head({"MASTER_ADDR": head, "MASTER_PORT": "29400"}))
"""


def test_the_interface_is_that_on_the_way_to_the_head(hosts: list[Host]) -> None:
    heads = ["10.0.0.1", "10.0.0.2", "10.9.0.1", "first", "no.such.host"]
    first, second = (host.run(sys.executable, "-c", LOOK, *heads, env=environment()).splitlines() for host in hosts)
    # Only the first has a way to its stray interface. It takes its own name for 127.0.1.1.
    assert first == [f"10.0.0.1 {CABLE}", f"10.0.0.2 {CABLE}", f"10.9.0.1 {STRAY}", "first None", "no.such.host None"]
    assert second == [f"10.0.0.1 {CABLE}", f"10.0.0.2 {CABLE}", "10.9.0.1 None", f"first {CABLE}", "no.such.host None"]


def test_machines_with_another_number_of_ranks_are_an_error(hosts: list[Host], folder: Path) -> None:
    lines = help_of("multi_node.sh")
    first, second = run([lines[0], lines[1].replace("--nproc 2", "--nproc 1")], hosts, folder)
    assert first.code == second.code == 1
    assert (
        "DDP_STREAM_WORLD_SIZE=4 processes were promised by the launcher, but this one finds WORLD_SIZE=3" in first.text
    )
