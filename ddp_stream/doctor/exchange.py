"""All ranks in a process group: is an all-reduce right, how fast is it, and which pair of ranks is slowest?"""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from ddp_stream.doctor.limits import InVain, limited
from ddp_stream.topology import Topology
from ddp_stream.training.engine import backend_for, pick_device

GROUP_S = 30.0
"""How long ranks may take to connect, and any operation."""
TOTAL_S = 75.0
_ELEMENTS = 1 << 20
_PAIR_BYTES = 1 << 20
_MOST_PAIRED = 16


def exchange(topology: Topology, store: Store, leaders: list[int]) -> dict[str, Any]:
    """Facts on the communication of this rank; an `error` where there is none."""
    facts: dict[str, Any] = {"error": None, "stage": "choosing a device", "in_vain": False}
    own = store.clone()  # a thread that is left behind in a wait would keep its store for itself
    try:
        limited(
            lambda: _exchange(topology, own, leaders, facts), TOTAL_S, "the exchange", lambda: store.check(["failed"])
        )
    except Exception as error:  # gloo and NCCL raise of many kinds, and this is to be reported
        with contextlib.suppress(RuntimeError):
            store.set("failed", "")
        said = re.sub(r"\[[^]]*\.cc:\d+\] ", "", str(error).partition("\n")[0])  # where in gloo's code
        facts["error"] = f"{facts['stage']}: {type(error).__name__}: {said}"
        facts["in_vain"] = isinstance(error, InVain)
    return facts


def _exchange(topology: Topology, store: Store, leaders: list[int], facts: dict[str, Any]) -> None:
    rank, world_size = topology.rank, topology.world_size
    device = pick_device(topology)
    facts["backend"] = backend_for(device)
    facts["stage"] = f"connecting {world_size} ranks by {facts['backend']}"
    dist.init_process_group(
        facts["backend"], store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=GROUP_S)
    )
    facts["stage"] = "all-reduce"
    values = torch.tensor([rank + 1, (rank + 1) ** 2], dtype=torch.int64, device=device)
    dist.all_reduce(values)
    n = world_size
    facts["correct"] = values.tolist() == [n * (n + 1) // 2, n * (n + 1) * (2 * n + 1) // 6]
    facts["latency_s"] = _median_seconds(torch.ones(1, device=device), 20)
    large = torch.full((_ELEMENTS,), float(rank), device=device)
    dist.all_reduce(large)
    facts["correct"] = facts["correct"] and bool((large == n * (n - 1) / 2).all())
    seconds = _median_seconds(torch.zeros(_ELEMENTS, device=device), 3)
    facts["bytes_per_s"] = 2 * (n - 1) / n * 4 * _ELEMENTS / seconds  # what a ring sends and receives
    facts["stage"] = "pairs of ranks"
    paired = list(range(n)) if n <= _MOST_PAIRED else leaders[:_MOST_PAIRED]
    facts["pairs"] = _pairs(rank, paired)
    facts["stage"] = "the last barrier"
    dist.barrier()
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


def _median_seconds(values: torch.Tensor, times: int) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        dist.all_reduce(values)
        values[:1].cpu()  # a GPU is done when the host has it
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def rounds(paired: list[int]) -> Iterator[list[tuple[int, int]]]:
    """All pairs, in rounds in which everybody plays one match: the circle method of tournaments.

    >>> [sorted(pairs) for pairs in rounds([0, 1, 2, 3])]
    [[(0, 3), (1, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    """
    circle: list[int | None] = [*paired, *([None] if len(paired) % 2 else [])]
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        matches = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in matches if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def _pairs(rank: int, paired: list[int]) -> dict[str, list[float]]:
    """By peer: seconds there and back for a byte, and bytes a second. The lower rank of a pair measures."""
    found: dict[str, list[float]] = {}
    byte, large = torch.zeros(1, dtype=torch.uint8), torch.zeros(_PAIR_BYTES, dtype=torch.uint8)
    for matches in rounds(paired):
        for first, second in matches:
            if rank == first:
                latency = min(_there_and_back(byte, second) for _ in range(5))
                seconds = min(_there_and_back(large, second) for _ in range(3))
                found[str(second)] = [latency, 2 * _PAIR_BYTES / seconds]
            elif rank == second:
                for values in [byte] * 5 + [large] * 3:
                    dist.recv(values, first)
                    dist.send(values, first)
    return found


def _there_and_back(values: torch.Tensor, peer: int) -> float:
    started = time.perf_counter()
    dist.send(values, peer)
    dist.recv(values, peer)
    return time.perf_counter() - started
