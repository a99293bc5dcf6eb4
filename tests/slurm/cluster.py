"""A Slurm cluster of two nodes on this machine: the real daemons, with their own key, ports and files in one folder."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel"]
# What decides how a job runs; none of it may come from the shell that runs the tests.
LEFT_OUT = re.compile("SLURM|SBATCH|SRUN|DDP_STREAM_|PET_|ACCELERATE_|MASTER_|(LOCAL_)?RANK$|WORLD_SIZE$")

CONF = """
ClusterName=test
FirstJobId={ctld_port}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SwitchType=switch/none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
MpiDefault=none
GresTypes=gpu
ReturnToService=2
KillWait=15
SlurmdTimeout=20
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1_port} CPUs=16 RealMemory=8000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2_port} CPUs=16 RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES DefaultTime=10 MaxTime=INFINITE State=UP OverTimeLimit=0
"""


def missing() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a test cluster needs Linux and root"
    lacking = [name for name in PROGRAMS if _program(name) is None]
    return f"{', '.join(lacking)} not installed (apt-get install slurm-wlm munge)" if lacking else None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")


class Cluster:
    """The daemons and what can be asked of them.

    Args:
        folder: for all their files; short, as a socket's path must be
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "state").mkdir()
        ports = iter(_free_ports(3))
        text = CONF.format(
            host=socket.gethostname().partition(".")[0],
            folder=folder,
            ctld_port=next(ports),
            n1_port=next(ports),
            n2_port=next(ports),
        )
        (folder / "slurm.conf").write_text(text.lstrip())
        # Two devices that every machine has stand for two GPUs: Slurm counts them, torch does not see them.
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        kept = {name: value for name, value in os.environ.items() if not LEFT_OUT.match(name)}
        self.env = kept | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}{os.pathsep}/usr/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key-file": key} | {f"{name}-file": self.folder / f"munge.{name}" for name in ("pid", "log", "seed")}
        options = [f"--{name}={path}" for name, path in files.items()]
        # --force: its files would otherwise have to be in folders of root's alone.
        self.call("munged", "--force", f"--socket={self.folder / 'munge.socket'}", *options)
        self.call("slurmctld", "-f", self.env["SLURM_CONF"])
        for node in ("n1", "n2"):
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd and wait for the node to be idle."""
        self.call("slurmd", "-f", self.env["SLURM_CONF"], "-N", node)
        self.wait_until(lambda: self.call("sinfo", "-h", "-n", node, "-o", "%T").strip() == "idle", f"{node} idle", 30)

    def kill_node(self, node: str) -> None:
        """What a power cut does: slurmd, its step daemons, and all that they started, at once."""
        started = self.processes_of(node)
        # The steps' daemons first, or they would still report the end of what they started.
        daemons = {parent for parent in map(_parent, started) if _name(parent) == "slurmstepd"}
        victims = [*daemons, *started]
        for pid in [self._pid(f"slurmd-{node}.pid"), *victims]:
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End all jobs, then the daemons, and wait for them."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.call("scancel", "--full", "--signal=KILL", *self.call("squeue", "-h", "-o", "%A").split())
        names = ["slurmd-n1", "slurmd-n2", "slurmctld", "munge"]
        pids = [pid for pid in (self._pid(f"{name}.pid") for name in names) if pid is not None]
        for node in ("n1", "n2"):
            for pid in self.processes_of(node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for pid in filter(_alive, pids):
            os.kill(pid, signal.SIGTERM)
        limit = time.monotonic() + 15
        while any(_alive(pid) for pid in pids):
            if time.monotonic() > limit:
                for pid in filter(_alive, pids):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def call(self, *command: str, cwd: Path | None = None, **env: str) -> str:
        """Run a program of Slurm's; returns what it printed."""
        program = _program(command[0])
        assert program is not None
        done = subprocess.run(
            [program, *command[1:]],
            cwd=cwd,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def processes_of(self, node: str, job: str | None = None) -> list[int]:
        """The step daemons of a node and every process below them; or those of one job alone, without daemons."""
        spool = f"SLURMD_NODENAME={node}\0"
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environ = (entry / "environ").read_text(errors="replace")
                name = (entry / "comm").read_text().strip()
                command = (entry / "cmdline").read_text().split("\0")
            except OSError:
                continue
            ours = f"SLURM_CONF={self.env['SLURM_CONF']}\0" in environ
            if job is not None and f"SLURM_JOB_ID={job}\0" not in environ:
                continue
            stepd = name == "slurmstepd" and ours and f"SLURMD_NODENAME={node}" in environ
            if stepd or (ours and spool in environ and "slurmd" not in command[0]):
                found.append(int(entry.name))
        return found

    def wait_until(self, true: Callable[[], bool], what: str, timeout: float) -> None:
        """Wait for something to come true."""
        limit = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < limit, f"not within {timeout:g} s: {what}"
            time.sleep(0.1)

    def _pid(self, name: str) -> int | None:
        path = self.folder / name
        return int(path.read_text()) if path.exists() else None


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster for as long as the block lasts; it leaves no process behind."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
