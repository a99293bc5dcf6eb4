"""Starts what a test needs: ranks that call a function, a torchrun job, or one `python -m ddp_stream`.

They are forked from one server process that has imported torch already, so that a start costs a fraction of a second
and not four. A job with `cold=True` starts from nothing, as a user's does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

ROOT = Path(__file__).parents[2]
DDP_STREAM = str(ROOT / "ddp_stream" / "__main__.py")
# What a launcher around pytest, or the shell that started it, would otherwise hand down.
INHERITED = re.compile("(DDP_STREAM|ACCELERATE|TORCHELASTIC|SLURM|MASTER|GROUP|ROLE|OMP)_|(LOCAL_)?(RANK|WORLD_SIZE)$")
JOB_TIMEOUT_S = 60
SERVER = multiprocessing.get_context("forkserver")
_SERVER_LOCK = threading.Lock()  # two threads that ask for one exit code would get it once
SERVER.set_forkserver_preload(
    ["pytest", "accelerate", "torch.distributed.run", "torch._dynamo"]
    + [f"ddp_stream.commands.{command}" for command in ("audit", "demo", "doctor", "train")]
)


def run_ranks(
    function: Callable[[Any], Any], world_size: int, cases: Sequence[Any], *, group: bool = True, timeout_s: float = 120
) -> list[list[Any]]:
    """`function(case)` for every case on every rank; returns `[rank][case]` results.

    The ranks are one gloo process group, and no environment variable says so. With `group=False` they only have the
    environment that torchrun gives, with another port for every case, and `function` starts and ends the group.

    Raises:
        RuntimeError: a rank raised, died, or was not done after `timeout_s`: with its traceback. None is left behind.
    """
    # Where ranks find each other. A group that ended cannot start again on the same store.
    count = 1 if group else len(cases)
    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in range(count)]
    ports = [store.port for store in stores]
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            receive, send = SERVER.Pipe(duplex=False)
            stacks = Path(folder, str(rank))
            arguments = (rank, world_size, function, cases, ports, group, timeout_s, send, stacks)
            process = SERVER.Process(target=_rank, args=arguments)
            process.start()
            send.close()
            ranks.append((process, receive, stacks))
        try:
            answers = _answers([receive for _, receive, _ in ranks], timeout_s)
            for process, _, _ in ranks:
                process.join(10)
        finally:
            for process, _, _ in ranks:
                process.kill()
                with contextlib.suppress(ProcessLookupError):  # there is none left
                    os.killpg(process.pid, signal.SIGKILL)  # its DataLoader workers
                process.join()
        failures = [
            f"rank {rank} of {world_size}:\n{answer or stacks.read_text() or 'ended without an answer'}"
            for rank, ((_, _, stacks), (done, answer)) in enumerate(zip(ranks, answers, strict=True))
            if not done
        ]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [answer for _, answer in answers]


def _answers(pipes: list[Connection], timeout_s: float) -> list[tuple[bool, Any]]:
    """What every rank sent, or `(False, "")` where there was nothing to wait for."""
    answers: dict[Any, tuple[bool, Any]] = {}
    deadline = time.monotonic() + timeout_s + 5
    while len(answers) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in answers], max(0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            try:
                answers[pipe] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                answers[pipe] = (False, "")
            if not answers[pipe][0]:  # the others may be waiting for this rank
                deadline = min(deadline, time.monotonic() + 1)
    return [answers.get(pipe, (False, "did not end")) for pipe in pipes]


def _rank(
    rank: int,
    world_size: int,
    function: Callable[[Any], Any],
    cases: Sequence[Any],
    ports: list[int],
    group: bool,
    timeout_s: float,
    answer: Connection,
    stacks: Path,
) -> None:
    os.setpgid(0, 0)
    _begin({})
    results = []
    with stacks.open("w") as file:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=file)
        try:
            if group:
                store = dist.TCPStore("localhost", ports[0])
                dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            else:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
                # The store is with the parent, as it is under torchrun.
                os.environ.update(MASTER_ADDR="localhost", TORCHELASTIC_USE_AGENT_STORE="True")
            for index, case in enumerate(cases):
                if not group:
                    os.environ["MASTER_PORT"] = str(ports[index])
                results.append(function(case))
            answer.send_bytes(pickle.dumps((True, results)))  # send() would leave tensors with this process
        except BaseException:
            answer.send_bytes(pickle.dumps((False, traceback.format_exc())))
            os._exit(1)  # the group's teardown may wait for ranks that wait for this one
        if dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def _begin(env: Mapping[str, str]) -> None:
    for name in [name for name in os.environ if INHERITED.match(name)]:
        del os.environ[name]
    os.environ.update(OMP_NUM_THREADS="1", **env)  # torchrun's default, too
    torch.set_num_threads(1)
    default = multiprocessing.get_all_start_methods()[0]  # and not the one by which this process came to be
    multiprocessing.set_start_method(default, force=True)


@dataclass(frozen=True)
class Job:
    """How a job ended."""

    code: int
    out: str
    err: str
    ended: float  # by time.time()


class Running:
    """A job that was started: `torchrun` or a command, and all that it starts.

    With `warm` it is forked from the server and calls that with the arguments, else they are a command.
    """

    def __init__(
        self, warm: Callable[[list[str]], None] | None, arguments: list[str], cwd: Path, env: Mapping[str, str]
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = Path(self._folder.name, "out").resolve(), Path(self._folder.name, "err")
        self._process: Any
        if warm is None:
            kept = {name: value for name, value in os.environ.items() if not INHERITED.match(name)}
            kept |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
            with self._out.open("w") as out, self._err.open("w") as err:
                self._process = subprocess.Popen(arguments, cwd=cwd, env=kept, stdout=out, stderr=err)
        else:
            self._process = SERVER.Process(target=_warm, args=(warm, arguments, cwd, env, self._out, self._err))
            with _SERVER_LOCK:
                self._process.start()
        self.pid: int = self._process.pid

    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        with _SERVER_LOCK:
            return self._process.exitcode  # type: ignore[no-any-return]

    def processes(self) -> list[int]:
        """The job itself and all that it started, as far as they are alive."""
        return _processes_of(self._out)

    def said(self) -> str:
        """What it wrote so far."""
        return "\n".join(path.read_text() for path in (self._out, self._err) if path.exists())

    def wait(self, timeout_s: float = JOB_TIMEOUT_S) -> Job:
        """Wait for its end; fails if it does not end in time, or leaves a process behind."""
        try:
            limit = time.monotonic() + timeout_s
            while self.code() is None and time.monotonic() < limit:
                time.sleep(0.02)
            code, ended = self.code(), time.time()
            left = self.processes()
            while code is not None and left and time.time() < ended + 2:
                time.sleep(0.02)
                left = self.processes()
            stacks = "" if code is not None else "\n".join(map(_where, left))
        finally:
            self.kill()
        job = Job(code if code is not None else -1, self._out.read_text(), self._err.read_text(), ended)
        self._folder.cleanup()
        assert code is not None, f"not done after {timeout_s} s\n{job.out}\n{job.err}\n{stacks}"
        assert not left, f"processes left behind: {left}\n{job.out}\n{job.err}"
        return job

    def kill(self) -> None:
        """Leave nothing of it."""
        while left := [*self.processes(), *([self.pid] if self.code() is None else [])]:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def start_torchrun(
    *arguments: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    options: Sequence[str] = ("--standalone", "--nproc_per_node=2"),
    cold: bool = False,
) -> Running:
    """`torchrun OPTION... SCRIPT ARGUMENT...`; DDP_STREAM is the script of `-m ddp_stream`."""
    if cold:
        return start("torchrun", *options, *arguments, cwd=cwd, env=env)
    return Running(_torchrun, [*options, *arguments], cwd, env or {})


def torchrun(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None, cold: bool = False) -> Job:
    """Two ranks of a script under torchrun, to the end."""
    return start_torchrun(*arguments, cwd=cwd, env=env, cold=cold).wait()


def start_ddp_stream(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Running:
    """`python -m ddp_stream ARGUMENT...` in one process."""
    return Running(_script, [DDP_STREAM, *arguments], cwd, env or {})


def ddp_stream(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Job:
    """The same, to the end."""
    return start_ddp_stream(*arguments, cwd=cwd, env=env).wait()


def start(*command: str, cwd: Path, env: Mapping[str, str] | None = None) -> Running:
    """A command from nothing; its program is one that is installed beside this Python."""
    return Running(None, [str(Path(sys.executable).with_name(command[0])), *command[1:]], cwd, env or {})


def run(*command: str, cwd: Path, env: Mapping[str, str] | None = None) -> Job:
    """The same, to the end."""
    return start(*command, cwd=cwd, env=env).wait()


def _warm(
    function: Callable[[list[str]], None], arguments: list[str], cwd: Path, env: Mapping[str, str], out: Path, err: Path
) -> None:
    for path, number in ((out, 1), (err, 2)):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    os.chdir(cwd)
    _begin(env)
    function(arguments)


def _torchrun(arguments: list[str]) -> None:
    """torchrun itself; only, its ranks are forked, where it would start a Python from nothing."""
    SubprocessHandler._popen = lambda self, args, env: _Forked(args, env)  # type: ignore[assignment, return-value]
    torch.distributed.run.main(arguments)


class _Forked:
    """What torchrun's agent knows of a `subprocess.Popen`."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._process = multiprocessing.get_context("fork").Process(target=_as_if_executed, args=(command, env))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0)
        return self._process.exitcode


def _as_if_executed(command: Sequence[str], env: Mapping[str, str]) -> None:
    os.setsid()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for entry in list(Path("/proc/self/fd").iterdir()):  # the agent's store must not outlive the agent in here
        with contextlib.suppress(OSError):
            if int(entry.name) > 2 and os.readlink(entry).startswith("socket:"):
                os.close(int(entry.name))
    os.environ.clear()
    os.environ.update(env)
    python, unbuffered, *arguments = command
    assert (python, unbuffered) == (sys.executable, "-u")
    _script(arguments)


def _script(arguments: list[str]) -> None:
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _where(pid: int) -> str:
    """What a process is and waits for."""
    found = [f"process {pid}"]
    for name in ("cmdline", "wchan", "stack"):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/{name}").read_text().replace("\0", " "))
    return "\n".join(found)


def _processes_of(out: Path) -> list[int]:
    """Every process whose standard output is `out`: a job's own, and all that it started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if os.readlink(entry) == str(out):
                found.append(int(entry.parts[2]))
        except OSError:  # gone, or another user's
            continue
    return found
