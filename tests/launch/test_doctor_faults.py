"""The doctor on two hosts, with one fault at a time planted for real: it is found, named, and nothing else is."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hosts import STRAY, Ended, Host, needs_hosts, together, two_hosts
from test_scripts import LAUNCH, ROOT, environment

pytestmark = [pytest.mark.slow, needs_hosts]

(README,) = re.findall(r"^\$ (.+ --hosts .+) --data.path rows.parquet$", (ROOT / "README.md").read_text(), re.MULTILINE)
BY_HAND = README.replace("ada,bob,cyd", "first,second") + " --wait_s 40"
TORCHRUN = "launch/multi_node.sh --nnodes 2 --node-rank {rank} --head 10.0.0.1 --port 29400 --nproc {nproc} doctor"
TRAIN = " --data.path rows.csv --data.num_workers 1 --run.dir runs/one"
AT_ONCE = 3
FINDING = re.compile(r"^(FATAL|WARN) +([^:]+): (.*) -> (.+)$", re.MULTILINE)


@dataclass
class Pair:
    """Two hosts, and what is started on them; a plant changes either."""

    folder: Path
    first: Host
    second: Host
    stack: ExitStack
    commands: dict[Host, str] = field(default_factory=dict)
    env: dict[Host, str] = field(default_factory=dict)

    def start(self, command: str, second: str | None = None) -> None:
        """Start `command` on both, or another one on the second."""
        self.commands = {self.first: command + TRAIN, self.second: (second or command) + TRAIN}

    def prefix(self, words: str) -> None:
        """Start it on the second under another command."""
        self.commands[self.second] = f"{words} {self.commands[self.second]}"

    def both(self, options: str) -> None:
        self.commands = {host: f"{command} {options}" for host, command in self.commands.items()}

    def on_path(self, name: str) -> Path:
        """A directory in which Python on the second looks first."""
        path = self.folder / name
        path.mkdir()
        self.prefix(f"env PYTHONPATH={path}:{ROOT}")
        return path

    def run(self) -> list[Ended]:
        commands = {host: shlex.split(command) for host, command in self.commands.items()}
        return together(commands, cwd=self.folder, env=environment(CUDA_VISIBLE_DEVICES=""))


def other_data(pair: Pair) -> None:
    other = pair.folder / "other.csv"
    other.write_text(rows(999))
    pair.second.run("mount", "--bind", other, pair.folder / "rows.csv")


def other_version(pair: Pair) -> None:
    installed = pair.on_path("site") / "numpy-0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")


def other_code(pair: Pair) -> None:
    copy = pair.on_path("clone") / "ddp_stream"
    shutil.copytree(ROOT / "ddp_stream", copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "order.py").open("a") as file:
        file.write("# edited on one machine only\n")


def other_clock(pair: Pair) -> None:
    # A stand-in: hosts on one machine share its clock, and Linux has no namespace for it. Only time.time() is off.
    (pair.on_path("clock") / "sitecustomize.py").write_text(
        "import time\nright = time.time\ntime.time = lambda: right() - 61\n"
    )


def read_only(pair: Pair) -> None:
    runs = pair.folder / "runs"
    runs.mkdir()
    pair.second.run("mount", "--bind", runs, runs)
    pair.second.run("mount", "-o", "remount,bind,ro", runs)


def not_shared(pair: Pair) -> None:
    (pair.folder / "runs").mkdir()
    pair.second.run("mount", "-t", "tmpfs", "tmpfs", pair.folder / "runs")


def full_shm(pair: Pair) -> None:
    pair.second.run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", "/dev/shm")
    pair.second.run("sh", "-c", "head -c 8m /dev/zero > /dev/shm/somebody-else-s")


def busy_port(pair: Pair) -> None:
    listen = "import socket, sys; s = socket.create_server(('', 29400)); print('ready', flush=True); sys.stdin.read()"
    command = pair.first.command(sys.executable, "-c", listen)
    other = pair.stack.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )  # leaving the context closes its input, and waits
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"


def one_missing(pair: Pair) -> None:
    del pair.commands[pair.second]
    pair.both("--wait_s 6")


def debian(pair: Pair) -> None:
    """Each host's own name leads to itself alone, as Debian's installer writes it."""
    for host in (pair.first, pair.second):
        file = pair.folder / f"hosts-{host.name}"
        file.write_text(file.read_text().replace(f"{host.address} {host.name}", f"127.0.1.1 {host.name}"))


def known_as(pair: Pair, address: str | None) -> None:
    """What the second takes the head's name for."""
    file = pair.folder / "hosts-second"
    lines = [line for line in file.read_text().splitlines() if not line.endswith(" first")]
    file.write_text("\n".join([*lines, *([f"{address} first"] if address else []), ""]))
    pair.both("--wait_s 6")


def one_process(pair: Pair) -> None:
    pair.start("accelerate launch --cpu --num_processes 2 -m ddp_stream doctor")
    del pair.commands[pair.second]


@dataclass(frozen=True)
class Fault:
    """What is planted, and what the doctor must make of it.

    Attributes:
        plant: changes the pair before it starts
        found: every finding, in order: level, check, and a pattern of its text
        codes: exit codes of the first and of the second
        speaks: which of them prints the findings; the head, where it learns of the fault at all
        says: a pattern of its whole output
    """

    plant: Callable[[Pair], object]
    found: Sequence[tuple[str, str, str]]
    codes: tuple[int, ...] = (1, 1)
    speaks: int = 0
    says: str = "^doctor: "


FAULTS = {
    "nothing, by hand": Fault(lambda pair: None, [], codes=(0, 0)),
    "nothing, torchrun on Debian": Fault(
        lambda pair: (debian(pair), pair.start(*(TORCHRUN.format(rank=rank, nproc=1) for rank in (0, 1)))),
        [],
        codes=(0, 0),
    ),
    "head's own name on loopback": Fault(
        debian,
        [
            ("FATAL", "interfaces", "first: gloo would listen on the loopback interface, .* 'first' is 127.0.1.1"),
            ("WARN", "head", "on first the head's name 'first' is 127.0.1.1, its own loopback"),
        ],
    ),
    "wrong interface": Fault(
        lambda pair: pair.start(f"env GLOO_SOCKET_IFNAME={STRAY} {BY_HAND}"),
        [
            (
                "FATAL",
                "all-reduce",
                "rank . on (first|second).* could not talk to the others: .*Network is unreachable",
            ),
            *(
                ("WARN", "interfaces", f"{name}: gloo would use {STRAY} .*, and the way to the head goes over cable0")
                for name in ("first", "second")
            ),
        ],
    ),
    "no such interface": Fault(
        lambda pair: pair.prefix("env GLOO_SOCKET_IFNAME=ib0"),
        [
            ("FATAL", "interfaces", "second: GLOO_SOCKET_IFNAME=ib0, and there is no such interface"),
            ("FATAL", "all-reduce", "rank 1 on second could not talk to the others"),
        ],
    ),
    "one host missing": Fault(
        one_missing, [("FATAL", "all here", r"rank 1 \(host second\) did not arrive within 6 s")], codes=(1,)
    ),
    "other data on one host": Fault(
        other_data, [("FATAL", "data", "rank 1 on second sees other data in .*: 999 rows, .* others see 1000 rows")]
    ),
    "other package version": Fault(other_version, [("FATAL", "versions", "numpy is 0.1 for rank 1 on second, and ")]),
    "code differing": Fault(
        other_code, [("FATAL", "code", "rank 1 on second has other code .*: ddp_stream/order.py$")]
    ),
    "settings differing": Fault(
        lambda pair: pair.commands.update({pair.second: pair.commands[pair.second] + " --seed 1"}),
        [("FATAL", "settings", "rank 1 on second was started with other settings: seed is 1 and 0 elsewhere")],
    ),
    "unwritable run directory": Fault(
        read_only, [("FATAL", "run directory", "second cannot write the run directory .* Read-only file system")]
    ),
    "run directory not shared": Fault(
        not_shared, [("FATAL", "run directory", "/runs/one on second is not the directory of that name on first")]
    ),
    "full /dev/shm": Fault(
        full_shm,
        [
            ("FATAL", "data", "rank 1 on second: .*unable to allocate shared memory"),
            ("FATAL", "/dev/shm", "second: /dev/shm has 0 B free of 8.0 MiB, "),
        ],
    ),
    "fewer CPUs than workers": Fault(
        lambda pair: (pair.both("--data.num_workers 2"), pair.prefix("taskset --cpu-list 0")),
        [("WARN", "CPUs", r"second: 1 rank\(s\) with 2 workers share 1 CPUs")],
        codes=(0, 0),
    ),
    "busy port": Fault(
        lambda pair: (busy_port(pair), pair.both("--wait_s 6")),
        [("FATAL", "meeting", r"rank 0 on first: port 29400 on this machine cannot be had \(Address already in use\)")],
    ),
    "busy port, as the other sees it": Fault(
        lambda pair: (busy_port(pair), pair.both("--wait_s 6")),
        [("FATAL", "meeting", "rank 1 on second: first port 29400 .* another program has the port")],
        speaks=1,
    ),
    "ephemeral port": Fault(
        lambda pair: pair.both("--port 45000"),
        [("WARN", "port", "port 45000 is in the range .* out of which first hands ports to any program")],
        codes=(0, 0),
    ),
    "wrong world size": Fault(
        lambda pair: (
            pair.start(TORCHRUN.format(rank=0, nproc=2), TORCHRUN.format(rank=1, nproc=1)),
            pair.both("--data.global_batch_size 60"),
        ),
        [("FATAL", "world size", "DDP_STREAM_WORLD_SIZE=4 .*WORLD_SIZE=3.*; started: 2 on first, 1 on second")],
    ),
    "accelerate, one process": Fault(
        one_process,
        [("FATAL", "world size", "accelerate launch was asked for .* and started one.*; started: 1 on first")],
        codes=(1,),
    ),
    "clock off by a minute": Fault(
        other_clock, [("FATAL", "clocks", r"the clock of second is (60\.\d|61\.\d) s behind that of first")]
    ),
    "head's name on loopback elsewhere": Fault(
        lambda pair: known_as(pair, "127.0.1.1"),
        [],
        codes=(1, 2),
        speaks=1,
        says=r"both first \(127.0.1.1\) and second \(10.0.0.2\) are this machine, second",
    ),
    "head unknown": Fault(
        lambda pair: known_as(pair, None),
        [
            ("FATAL", "meeting", "rank 1 on second: first port 29400 could not be reached within 6 s"),
            ("FATAL", "head", "second cannot resolve the head's name 'first'"),
        ],
        speaks=1,
    ),
    "lanes that do not divide": Fault(
        lambda pair: pair.both("--data.lanes 3"),
        [("FATAL", "data", "rank 0 on first, rank 1 on second: .*global_batch_size=64 is not a multiple of lanes=3")],
    ),
    "uneven ranks": Fault(
        lambda pair: pair.both("--data.global_batch_size 5"),
        [("WARN", "arithmetic", "uneven ranks: 1 ranks take 3 rows of a step and 1 take 2")],
        codes=(0, 0),
    ),
    "few open files": Fault(
        lambda pair: pair.prefix("prlimit --nofile=250"),
        [("WARN", "open files", "second: 250 files may be open")],
        codes=(0, 0),
    ),
}


def rows(count: int) -> str:
    return "x,y,label\n" + "".join(f"{row},{row % 7},{row % 3}\n" for row in range(count))


def run(plant: Callable[[Pair], object], folder: Path) -> tuple[list[Ended], float]:
    """What the hosts' doctors print with a fault planted, and how many seconds they took."""
    (folder / "launch").symlink_to(LAUNCH)
    (folder / "rows.csv").write_text(rows(1000))
    with ExitStack() as stack:
        first, second = stack.enter_context(two_hosts(folder))
        pair = Pair(folder, first, second, stack)
        pair.start(BY_HAND)
        plant(pair)
        started = time.monotonic()
        return pair.run(), time.monotonic() - started


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[tuple[list[Ended], float]]]]:
    """All that were asked for, some at a time: they do not know of each other."""
    names = [item.callspec.params["fault"] for item in request.session.items if item.path == Path(__file__)]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(run, FAULTS[name].plant, tmp_path_factory.mktemp("fault")) for name in names}


@pytest.mark.parametrize("fault", FAULTS)
def test_doctor_names(
    fault: str, runs: dict[str, Future[tuple[list[Ended], float]]], report: Callable[..., None]
) -> None:
    planted = FAULTS[fault]
    ended, seconds = runs[fault].result()
    everything = "\n".join(end.text for end in ended)
    text = ended[planted.speaks].text
    found = FINDING.findall(text)
    verdict = re.search(f"^.*{planted.says}.*", text, re.MULTILINE)
    for line in [f"{level} {check}: {what} -> {fix}" for level, check, what, fix in found] or [verdict and verdict[0]]:
        report("What the doctor says on two hosts (exit codes, seconds)", fault, [e.code for e in ended], seconds, line)
    assert [(level, check) for level, check, _, _ in found] == [found[:2] for found in planted.found], everything
    for (_, _, what, fix), (_, _, pattern) in zip(found, planted.found, strict=True):
        assert re.search(pattern, what), what
        assert fix
    assert verdict, everything
    assert tuple(end.code for end in ended) == planted.codes, everything
    assert seconds < 60, everything
