"""What one rank finds out by itself: who started it, what is installed, and what its machine allows it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import ddp_stream
from ddp_stream.doctor.network import gather_network
from ddp_stream.topology import Topology, allotted_cpus, read_text, seen_cpus
from ddp_stream.training.engine import WorldError, check_launcher

PACKAGES = ("torch", "numpy", "pyarrow", "accelerate", "safetensors", "jsonargparse", "wandb")
_NAMED = ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "DDP_STREAM_WORLD_SIZE")
_PREFIXES = ("GLOO_", "NCCL_", "PET_", "TORCHELASTIC_SIGNALS")
_MANY = 1 << 62


@dataclass
class Facts:
    """What is known of one rank, in values that JSON can hold. The last four follow once the ranks have met."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    """The machine's name, to be shown."""
    network: str
    """What tells machines apart: ranks of one network reach each other by the loopback interface."""
    launcher: dict[str, Any]
    versions: dict[str, str]
    code: dict[str, str]
    config: dict[str, str]
    net: dict[str, Any]
    machine: dict[str, Any]
    devices: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    clock: dict[str, Any] = field(default_factory=dict)
    run_dir: dict[str, Any] = field(default_factory=dict)
    exchange: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def to_json(self) -> dict[str, Any]:
        """All of it as a dict."""
        return asdict(self)


def gather(environ: Mapping[str, str], config: dict[str, str], code: list[Path]) -> Facts:
    """The facts of this rank but for its data.

    Args:
        environ: the environment
        config: the configuration, every setting under its dotted name
        code: files of the user's own that take part, beside this package
    """
    topology = Topology.detect(environ)
    head = environ.get("MASTER_ADDR") if topology.world_size > 1 else None
    port = environ.get("MASTER_PORT", "")
    net = gather_network(head, int(port) if port.isdigit() else None, environ)
    host = environ.get("SLURMD_NODENAME", net["hostname"])
    return Facts(
        rank=topology.rank,
        world_size=topology.world_size,
        local_rank=int(environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", "0"))),
        host=host,
        network=f"{read_text('/proc/sys/kernel/random/boot_id') or net['hostname']} {_link('/proc/self/ns/net')}",
        launcher=_launcher(environ),
        versions=_versions(),
        code=_code(code),
        config=config,
        net=net,
        machine=_machine(environ),
        devices=_devices(),
    )


def _launcher(environ: Mapping[str, str]) -> dict[str, Any]:
    broken = None
    try:
        check_launcher(environ)
    except WorldError as error:
        broken = str(error)
    if "ACCELERATE_MIXED_PRECISION" in environ:
        name = "accelerate"
    elif "TORCHELASTIC_RUN_ID" in environ:
        name = "torchrun"
    elif "RANK" not in environ and "SLURM_PROCID" in environ:
        name = "srun"
    else:
        name = "by hand" if "RANK" in environ else "alone"
    return {
        "name": name,
        "broken": broken,
        "flags": _parent_flags() if "TORCHELASTIC_RUN_ID" in environ else {},
        "agent_store": environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        "run_id": f"{environ.get('TORCHELASTIC_RUN_ID', '')}.{environ.get('TORCHELASTIC_RESTART_COUNT', '')}",
        "nodes": _number(environ, "GROUP_WORLD_SIZE"),
        "local_world_size": _number(environ, "LOCAL_WORLD_SIZE"),
        "slurm_nodes": _number(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
        "slurm_job": environ.get("SLURM_JOB_ID"),
        "slurm_nodelist": environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST")),
        "scontrol": shutil.which("scontrol"),
        "environment": {
            name: value for name, value in sorted(environ.items()) if name in _NAMED or name.startswith(_PREFIXES)
        },
    }


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        if environ.get(name, "").isdigit():
            return int(environ[name])
    return None


def _parent_flags() -> dict[str, str]:
    """The long options of the process that started this one, which is torchrun or accelerate."""
    words = read_text(f"/proc/{os.getppid()}/cmdline").split("\0")
    flags: dict[str, str] = {}
    for index, word in enumerate(words):
        if (word in ("-m", "--module") and index > 2) or (word.endswith(".py") and index > 1):
            break  # what follows belongs to the ranks
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            following = words[index + 1] if index + 1 < len(words) else ""
            flags[name.replace("_", "-")] = value or ("" if following.startswith("-") else following)
    return flags


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        if torch.distributed.is_nccl_available():
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def _code(own: list[Path]) -> dict[str, str]:
    """A hash of every file of this package and of `own`, by name."""
    root = Path(ddp_stream.__file__).parent
    files = {f"ddp_stream/{path.relative_to(root)}": path for path in sorted(root.rglob("*.py"))}
    files |= {path.name: path for path in own}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for name, path in files.items() if path.is_file()}


def _machine(environ: Mapping[str, str]) -> dict[str, Any]:
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "cpu_list": seen_cpus(),
        "cpus": allotted_cpus(),
        "memory_bytes": _memory_bytes(),
        "shm_bytes": shm.free if shm else None,
        "shm_total_bytes": shm.total if shm else None,
        "open_files": _MANY if soft == resource.RLIM_INFINITY else soft,
    }


def _memory_bytes() -> int | None:
    """Memory that is free to use: the machine's, or what the cgroup leaves of it."""
    free: int | None = None
    for line in read_text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = 1024 * int(line.split()[1])
    most, used = read_text("/sys/fs/cgroup/memory.max"), read_text("/sys/fs/cgroup/memory.current")
    if most.isdigit() and used.isdigit():
        left = int(most) - int(used)
        free = left if free is None else min(free, left)
    return free


def _devices() -> dict[str, Any]:
    """The accelerators that this rank sees, and for CUDA the CPUs near each."""
    if not torch.accelerator.is_available():
        return {"kind": "cpu", "count": 0, "ids": [], "near": []}
    kind = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count()
    ids, near = [], []
    if kind is not None and kind.type == "cuda":
        for index in range(count):
            found = torch.cuda.get_device_properties(index)
            ids.append(str(getattr(found, "uuid", index)))
            where = [getattr(found, f"pci_{part}_id", 0) for part in ("domain", "bus", "device")]
            near.append(read_text("/sys/bus/pci/devices/{:04x}:{:02x}:{:02x}.0/local_cpulist".format(*where)))
    return {"kind": kind.type if kind is not None else "cpu", "count": count, "ids": ids, "near": near}


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return sys.platform
