"""Hosts on this machine: each has a network, a name, /etc/hosts and mounts of its own, and one cable joins them.

They share processes and files, as the nodes of a cluster share a file system. Nothing of them is left when the process
that made them ends, however it ends.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

CABLE = "cable0"
"""The interface by which hosts reach each other."""
STRAY = "stray0"
"""An interface that is up and has an address, and leads nowhere."""

# The new namespaces live as long as this process, and this process as long as its standard input is open.
HOLD = """
hostname "$1"
mount --bind "$2" /etc/hosts
mount --types sysfs sysfs /sys
ip link set lo up
ip link add stray0 type veth peer name stray1
ip address add "$3/24" dev stray0
ip link set stray0 up
ip link set stray1 up
echo ready
exec cat
"""


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        name: its host name
        address: where the others reach it, by the cable
        pid: a process on it
    """

    name: str
    address: str
    pid: int

    def command(self, *command: str | Path, cwd: str | Path = "/") -> list[str]:
        """`command`, to be run on this host in the directory `cwd`."""
        # Not nsenter --wd, which opens the directory before it enters, so that it stays on the mounts of before.
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "sh", "-c", 'cd "$0"; exec "$@"']
        return [*enter, str(cwd), *map(str, command)]

    def run(self, *command: str | Path, env: Mapping[str, str] | None = None) -> str:
        """Run `command` here to its end; returns its output."""
        enter = self.command(*command)
        done = subprocess.run(enter, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


def missing() -> str | None:
    """Why there can be no such hosts here, or None."""
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"{program} is not installed (apt-get install iproute2 util-linux)"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "mount", "--types", "sysfs", "sysfs", "/sys"],
        capture_output=True,
        text=True,
        check=False,
    )
    return None if tried.returncode == 0 else f"no right to make network namespaces: {tried.stderr.strip()}"


needs_hosts = pytest.mark.skipif(missing() is not None, reason=f"two hosts: {missing()}")


@contextmanager
def two_hosts(
    folder: Path, *, addresses: Sequence[str] = ("10.0.0.1", "10.0.0.2"), own: str | None = None
) -> Iterator[list[Host]]:
    """Two hosts, `first` and `second`, that know each other's names.

    Args:
        folder: for their /etc/hosts
        addresses: theirs
        own: what a host's own name resolves to on itself; by default its address. Debian's installer writes 127.0.1.1
    """
    names = ("first", "second")
    with ExitStack() as stack:
        hosts = []
        for index, (name, address) in enumerate(zip(names, addresses, strict=True)):
            file = folder / f"hosts-{name}"
            known = {"localhost": "127.0.0.1", **dict(zip(names, addresses, strict=True))}
            known[name] = own or address
            file.write_text("".join(f"{where} {who}\n" for who, where in known.items()))
            holder = stack.enter_context(
                subprocess.Popen(
                    [
                        *("unshare", "--net", "--uts", "--mount"),
                        "sh",
                        "-euc",
                        HOLD,
                        "sh",
                        name,
                        file,
                        f"10.9.{index}.1",
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )  # leaving the context closes its input, and waits
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            hosts.append(Host(name, address, holder.pid))
        ends = [["name", CABLE, "netns", str(host.pid)] for host in hosts]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", CABLE)
            host.run("ip", "link", "set", CABLE, "up")
        yield hosts


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, and what it wrote."""

    code: int
    text: str


def together(
    commands: Mapping[Host, Sequence[str | Path]], *, cwd: Path, env: Mapping[str, str], timeout_s: float = 100
) -> list[Ended]:
    """Run one command on each host at the same time; fails if they are not done after `timeout_s`."""
    running = []
    for index, (host, command) in enumerate(commands.items()):
        log = cwd / f"log-{index}-{host.name}"
        with log.open("w") as file:
            process = subprocess.Popen(
                host.command(*command, cwd=cwd),
                env=dict(env),
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
            )
        running.append((process, log))
    deadline = time.monotonic() + timeout_s
    late = False
    for process, _ in running:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
            process.terminate()  # nsenter became the command, so this is the launcher
            process.wait(70)
    ended = [Ended(process.returncode, log.read_text()) for process, log in running]
    assert not late, f"not done after {timeout_s} s\n" + "\n".join(end.text for end in ended)
    return ended
