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

ROOT = Path(__file__).parents[2]
DDP_STREAM = str(ROOT / "ddp_stream" / "__main__.py")
# What a launcher around pytest, or the shell that started it, would otherwise hand down.
INHERITED = re.compile("(DDP_STREAM|ACCELERATE|TORCHELASTIC|SLURM|MASTER|GROUP|ROLE|OMP)_|(LOCAL_)?(RANK|WORLD_SIZE)$")
JOB_TIMEOUT_S = 60
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["pytest", "accelerate", "torch.distributed.run", "torch._dynamo"]
    + [f"ddp_stream.commands.{command}" for command in ("audit", "demo", "train")]
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


def torchrun(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None, cold: bool = False) -> Job:
    """`torchrun --standalone --nproc_per_node=2 SCRIPT ARGUMENT...`; DDP_STREAM is the script of `-m ddp_stream`."""
    options = ["--standalone", "--nproc_per_node=2"]
    if cold:
        return run("torchrun", *options, *arguments, cwd=cwd, env=env)
    return _run(_torchrun, [*options, "--run-path", "--start-method=fork", *arguments], cwd, env or {})


def ddp_stream(*arguments: str, cwd: Path) -> Job:
    """`python -m ddp_stream ARGUMENT...` in one process."""
    return _run(_script, [DDP_STREAM, *arguments], cwd, {})


def run(*command: str, cwd: Path, env: Mapping[str, str] | None = None) -> Job:
    """A command from nothing; its program is one that is installed beside this Python."""
    return _run(None, [str(Path(sys.executable).with_name(command[0])), *command[1:]], cwd, env or {})


def _run(warm: Callable[[list[str]], None] | None, arguments: list[str], cwd: Path, env: Mapping[str, str]) -> Job:
    """Run it to the end; fails if it does not end in time, or leaves a process behind."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out").resolve(), Path(folder, "err")
        if warm is None:
            code = _cold(arguments, cwd, env, out, err)
        else:
            process = SERVER.Process(target=_warm, args=(warm, arguments, cwd, env, out, err))
            process.start()
            process.join(JOB_TIMEOUT_S)
            code = process.exitcode
        ended = time.time()
        left = _processes_of(out)
        while code is not None and left and time.time() < ended + 2:
            time.sleep(0.02)
            left = _processes_of(out)
        still = left
        while still:
            for pid in still:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
            still = _processes_of(out)
        job = Job(code if code is not None else -1, out.read_text(), err.read_text(), ended)
    assert code is not None, f"not done after {JOB_TIMEOUT_S} s\n{job.out}\n{job.err}"
    assert not left, f"processes left behind: {left}\n{job.out}\n{job.err}"
    return job


def _cold(command: list[str], cwd: Path, env: Mapping[str, str], out: Path, err: Path) -> int | None:
    kept = {name: value for name, value in os.environ.items() if not INHERITED.match(name)}
    kept |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    with out.open("w") as out_file, err.open("w") as err_file:
        process = subprocess.Popen(command, cwd=cwd, env=kept, stdout=out_file, stderr=err_file)
    try:
        return process.wait(JOB_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


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
    torch.distributed.run.run_script_path = lambda *arguments: _script(list(arguments))
    torch.distributed.run.main(arguments)


def _script(arguments: list[str]) -> None:
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code:  # sys.exit(0) is a good end for a process, but torchrun would wait for the function to return
            raise


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
