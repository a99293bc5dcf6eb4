"""Who am I? Rank, world size and worker, and the combined index over all of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Slurm numbers the batch script and interactive shells as steps too, from here upwards.
_FIRST_SPECIAL_SLURM_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Topology:
    """One reader among all readers of a job.

    >>> Topology(rank=1, world_size=2, worker=2, num_workers=3).global_worker
    5

    `num_workers=0` (no worker processes) counts as one reader, worker 0 of 1.

    Raises:
        ValueError: `rank` is not in `0..world_size-1`, or `worker` not in `0..num_workers-1`.
    """

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    num_workers: int = 1

    def __post_init__(self) -> None:
        if self.num_workers == 0:
            object.__setattr__(self, "num_workers", 1)
        for name, index, count_name, count in (
            ("rank", self.rank, "world_size", self.world_size),
            ("worker", self.worker, "num_workers", self.num_workers),
        ):
            if not 0 <= index < count:
                raise ValueError(
                    f"{name}={index} with {count_name}={count}: there is no such {name}, so some rows would be read "
                    f"twice or not at all; {name} must be in 0..{count_name}-1"
                )

    @property
    def global_worker(self) -> int:
        """`rank * num_workers + worker`: this reader among all readers of all ranks."""
        return self.rank * self.num_workers + self.worker

    @property
    def global_workers(self) -> int:
        """`world_size * num_workers`: all readers of all ranks."""
        return self.world_size * self.num_workers

    @classmethod
    def detect(cls, environ: Mapping[str, str] | None = None) -> Topology:
        """The topology of this very process.

        Rank and world size come from torch.distributed where it is initialised, else from `RANK` and `WORLD_SIZE`,
        else from `SLURM_PROCID` and `SLURM_NTASKS` inside a Slurm step, else they are 0 of 1. The worker comes from
        `torch.utils.data.get_worker_info()`.

        Raises:
            ValueError: the environment names a rank without a world size (or the other way round), something that
                is no number, or a rank outside the world.
        """
        environ = os.environ if environ is None else environ
        rank, world_size = _initialised_ranks() or _environment_ranks(environ)
        worker, num_workers = _worker()
        return cls(rank, world_size, worker, num_workers)


def _initialised_ranks() -> tuple[int, int] | None:
    # A process that never imported torch.distributed has not initialised it either; importing it takes seconds.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return None


def _environment_ranks(environ: Mapping[str, str]) -> tuple[int, int]:
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _pair(environ, "RANK", "WORLD_SIZE")
    if numbered_by_slurm(environ):
        return _pair(environ, "SLURM_PROCID", "SLURM_NTASKS")
    return 0, 1


def numbered_by_slurm(environ: Mapping[str, str]) -> bool:
    """Whether this process is a task of a Slurm step, and no other launcher stands between."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return False
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    return "SLURM_PROCID" in environ and step.isdigit() and int(step) < _FIRST_SPECIAL_SLURM_STEP


def seen_cpus() -> list[int]:
    """The numbers of the CPUs that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def allotted_cpus() -> float:
    """How many CPUs this process may use at a time: those it sees, or the fewer that its cgroup allows."""
    quota, _, period = read_text("/sys/fs/cgroup/cpu.max").partition(" ")
    if not quota.isdigit():  # or by the first version of cgroups
        quota = read_text("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = read_text("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    seen = float(len(seen_cpus()))
    return min(seen, int(quota) / int(period)) if quota.isdigit() and period.strip().isdigit() else seen


def read_text(path: str) -> str:
    """What is in a small file of the system; nothing if it is not there."""
    try:
        return Path(path).read_text().strip("\n")
    except OSError:
        return ""


def _pair(environ: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    seen = f"{rank_name}={environ.get(rank_name)!r}, {size_name}={environ.get(size_name)!r}"
    try:
        rank, world_size = int(environ[rank_name]), int(environ[size_name])
    except KeyError as error:
        raise ValueError(
            f"the environment has {seen}: {error.args[0]} is missing, so this process cannot know its share of the "
            f"rows; set both (torchrun and srun do), or neither for a single process"
        ) from None
    except ValueError:
        raise ValueError(f"the environment has {seen}: both must be whole numbers") from None
    if not 0 <= rank < world_size:
        raise ValueError(
            f"the environment has {seen}: rank must be in 0..world_size-1, or two processes would read the same rows; "
            f"check what started this process"
        )
    return rank, world_size


def _worker() -> tuple[int, int]:
    data = sys.modules.get("torch.utils.data")
    info = data.get_worker_info() if data is not None else None
    return (info.id, info.num_workers) if info is not None else (0, 1)
