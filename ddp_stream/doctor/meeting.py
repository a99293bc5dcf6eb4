"""Where the ranks meet: a key-value store at the head, before any process group, so that who is missing has a name."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from ddp_stream.doctor.facts import Facts
from ddp_stream.doctor.limits import limited

_STORE_S = 10.0
_SHARED_S = 15.0
_OTHER_PORT = "another port, or see who has this one: ss -ltnp"


class MeetingError(RuntimeError):
    """This rank could not reach the others, and what to do about it."""

    def __init__(
        self,
        what: str,
        fix: str = "start it everywhere, and see that the head's name is right and its port open to all",
    ) -> None:
        super().__init__(what)
        self.fix = fix


class Meeting:
    """The store, with a time limit on everything.

    Args:
        facts: this rank's
        wait_s: how long ranks wait for each other to arrive
        names: the host of every rank where it is known beforehand

    Raises:
        MeetingError: the store cannot be made or reached.
    """

    def __init__(self, facts: Facts, wait_s: float, names: list[str] | None = None) -> None:
        self.rank, self.world_size = facts.rank, facts.world_size
        self._facts = facts
        self._wait_s = wait_s
        self._names = names
        self._deadline = time.monotonic() + wait_s
        self._hosts_store = facts.rank == 0 and not facts.launcher["agent_store"]
        if facts.world_size == 1:
            self.store: Store = HashStore()
            return
        head, port = facts.net["head"], facts.net["port"]
        if not head or not port:
            raise MeetingError(
                f"MASTER_ADDR={head!r}, MASTER_PORT={port!r}: nobody said where the {self.world_size} ranks are to meet"
            )
        tcp = self._serve(head, port) if self._hosts_store else self._reach(head, port)
        self.store = PrefixStore(f"doctor.{facts.launcher['run_id']}", tcp)

    def _serve(self, head: str, port: int) -> TCPStore:
        try:
            # Bind first: a store finds out that it is not on this machine by waiting for itself.
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
        except OSError as error:
            raise MeetingError(f"port {port} on this machine cannot be had ({error.strerror})", _OTHER_PORT) from None
        try:
            return limited(lambda: self._tcp("127.0.0.1", port, True), _STORE_S, f"making a store on port {port}")
        except (RuntimeError, OSError) as error:
            raise MeetingError(
                f"port {port} on this machine cannot be had ({_first_line(error)})", _OTHER_PORT
            ) from None

    def _reach(self, head: str, port: int) -> TCPStore:
        wrong, fix = "", list[str]()
        while time.monotonic() < self._deadline:
            try:
                socket.create_connection((head, port), 3).close()
            except OSError as error:
                wrong, fix = str(error), []
                time.sleep(0.3)
                continue
            try:
                # Where another program has the port, torch's own time limit does not hold.
                return limited(lambda: self._tcp(head, port, False), _STORE_S, "its answer")
            except (RuntimeError, OSError) as error:
                wrong = f"something answers that is no store, so another program has the port; {_first_line(error)}"
                fix = [_OTHER_PORT]
        raise MeetingError(f"{head} port {port} could not be reached within {self._wait_s:g} s ({wrong})", *fix)

    @staticmethod
    def _tcp(host: str, port: int, serve: bool) -> TCPStore:
        return TCPStore(host, port, None, serve, timedelta(seconds=_STORE_S), wait_for_workers=False)

    def roll_call(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Wait for everybody; returns the same on all ranks: `missing` ranks and hosts, `twice`, and `leaders`.

        Leaders are the first rank of each machine, by rank.

        Raises:
            MeetingError: rank 0 is not there.
        """
        self.store.set(f"here/{self.rank}", json.dumps([self._facts.host, self._facts.network]))
        self.store.add(f"count/{self.rank}", 1)
        if self.rank != 0:
            self._deadline += _STORE_S  # for rank 0 to say who is missing
            return dict(self.get("roll", "rank 0"))
        waiting, asked = set(range(self.world_size)), time.monotonic()
        while waiting and time.monotonic() < self._deadline:
            waiting -= {rank for rank in waiting if self.store.check([f"here/{rank}"])}
            if waiting and time.monotonic() - asked > 5:
                asked = time.monotonic() + 5
                left = self._deadline - time.monotonic()
                say(f"waiting {left:.0f} s more for {self._listed(waiting)}")
            if waiting:
                time.sleep(0.1)
        here = {
            rank: json.loads(self.store.get(f"here/{rank}")) for rank in range(self.world_size) if rank not in waiting
        }
        first: dict[str, int] = {}
        for rank, (_, network) in here.items():
            first.setdefault(network, rank)
        known = {host for host, _ in here.values()}
        nodes = self._names or _slurm_nodes(self._facts.launcher["slurm_nodelist"])
        roll = {
            "missing": sorted(waiting),
            "missing_hosts": [
                name
                for index, name in enumerate(nodes)
                if (index in waiting if self._names else waiting and name not in known)
            ],
            "twice": [rank for rank in here if self.store.add(f"count/{rank}", 0) > 1],
            "leaders": sorted(first.values()),
        }
        self.set("roll", roll)
        return roll

    def _listed(self, ranks: Iterable[int]) -> str:
        ranks = sorted(ranks)
        shown = [f"{rank} ({self._names[rank]})" if self._names else str(rank) for rank in ranks[:8]]
        return f"rank {', '.join(shown)}{', ...' if len(ranks) > 8 else ''}"

    def set(self, key: str, value: Any) -> None:
        """Tell the others."""
        self.store.set(key, json.dumps(value))

    def get(self, key: str, whose: str, seconds: float | None = None) -> Any:
        """What somebody told; raises MeetingError after `seconds`, or at the end of the time to arrive."""
        left = max(1.0, self._deadline - time.monotonic()) if seconds is None else seconds
        try:
            self.store.wait([key], timedelta(seconds=left))
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise MeetingError(f"{whose} did not answer ({key}): {_first_line(error)}") from None

    def collect(self, key: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """`key/RANK` of every one of `ranks` that tells in time."""
        deadline = time.monotonic() + seconds
        told: dict[int, Any] = {}
        for rank in ranks:
            with contextlib.suppress(MeetingError):
                told[rank] = self.get(f"{key}/{rank}", f"rank {rank}", max(0.1, deadline - time.monotonic()))
        return told

    def clocks(self, leaders: list[int]) -> dict[str, Any]:
        """How many seconds this rank's clock is ahead of rank 0's, and how wrong that may be; leaders only."""
        if self.rank != 0:
            self.get(f"clock/{self.rank}/go", "rank 0", 60)
            self.set(f"clock/{self.rank}/time", time.time())
            return dict(self.get(f"clock/{self.rank}/offset", "rank 0", 30))
        for rank in leaders[1:]:
            sent = time.time()
            self.set(f"clock/{rank}/go", None)
            theirs = self.get(f"clock/{rank}/time", f"rank {rank}", 10)
            received = time.time()
            offset = {"ahead_s": theirs - (sent + received) / 2, "error_s": (received - sent) / 2}
            self.set(f"clock/{rank}/offset", offset)
        return {"ahead_s": 0.0, "error_s": 0.0}

    def run_directory(self, leaders: list[int], path: Path) -> dict[str, Any]:
        """Whether `path` can be written here, and how long a rename takes to be seen; leaders only.

        Rank 0 makes a file, all see it and make their own, and rank 0 sees those.
        """
        facts: dict[str, Any] = {"path": str(path.absolute()), "error": None, "seen_s": None, "unseen": []}
        probe = path / f".doctor-{self._facts.launcher['run_id'][:36] or 'probe'}"
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            if self.rank == 0:
                probe.mkdir(parents=True, exist_ok=True)
                _write(probe / "rank-0")
                self.set("run_dir/go", True)
            elif not self.get("run_dir/go", "rank 0", 30):
                return facts
            else:
                facts["seen_s"] = _seen_after(probe / "rank-0")
                if facts["seen_s"] is None:  # then find out whether one could write here at all
                    probe.mkdir(parents=True, exist_ok=True)
                _write(probe / f"rank-{self.rank}")
        except OSError as error:
            facts["error"] = f"{type(error).__name__}: {error}"
            if self.rank == 0:
                self.set("run_dir/go", False)
                return facts
        self.set(f"run_dir/{self.rank}", facts)
        if self.rank == 0:
            others = self.collect("run_dir", leaders[1:], 2 * _SHARED_S)
            written = [rank for rank, told in others.items() if told["error"] is None and told["seen_s"] is not None]
            facts["unseen"] = [rank for rank in written if _seen_after(probe / f"rank-{rank}") is None]
        if self.rank == 0 or facts["seen_s"] is None:
            shutil.rmtree(probe, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in made:
                    folder.rmdir()
        return facts

    def gather_again(self) -> None:
        """Wait until all ranks are here again; who was held up by a check is waited for."""
        self.set(f"ready/{self.rank}", None)
        if self.rank == 0:
            self.collect("ready", range(self.world_size), 4 * _SHARED_S)
            self.set("ready/all", None)
        else:
            self.get("ready/all", "rank 0", 5 * _SHARED_S)

    def leave(self) -> None:
        """End together: whoever keeps the store is the last to go."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "")
            if self._hosts_store:
                present = [f"left/{rank}" for rank in range(self.world_size) if self.store.check([f"here/{rank}"])]
                self.store.wait(present, timedelta(seconds=5))


def _write(path: Path) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text("")
    temporary.rename(path)


def _seen_after(path: Path) -> float | None:
    """Seconds until `path` is listed, or None if it is not in time."""
    started = time.monotonic()
    while time.monotonic() - started < _SHARED_S:
        with contextlib.suppress(OSError):
            if any(entry.name == path.name for entry in path.parent.iterdir()):
                return time.monotonic() - started
        time.sleep(0.01)
    return None


def _slurm_nodes(nodelist: str | None) -> list[str]:
    """The names in a Slurm node list; none if scontrol cannot be asked."""
    if not nodelist or shutil.which("scontrol") is None:
        return []
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, timeout=10, check=False
    )
    return done.stdout.split()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
