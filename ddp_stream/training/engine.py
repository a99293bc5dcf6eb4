"""Who shares the work between ranks: torch's DistributedDataParallel by hand, or accelerate.

An engine knows rank, world size and device, wraps the model, and runs one optimizer step. The data never passes
through it: batches arrive already dealt.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_stream.ancestry import die_with_parent
from ddp_stream.batch import Batch
from ddp_stream.order import mix
from ddp_stream.topology import Topology, numbered_by_slurm
from ddp_stream.training.network import choose_interface
from ddp_stream.training.task import Task

T = TypeVar("T")

_FIRST_TIMEOUT_S = 1800.0


class WorldError(RuntimeError):
    """The processes that run are not the ones that the launcher promised."""


class Engine(ABC):
    """Runs optimizer steps on this rank, together with the others."""

    device: torch.device
    topology: Topology
    timeout_s: float
    model: nn.Module
    optimizer: torch.optim.Optimizer
    raw_optimizer: torch.optim.Optimizer
    """The optimizer as it was before `prepare`."""

    @abstractmethod
    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Wrap model and optimizer; the model is on `device` already."""

    @abstractmethod
    def unwrap(self) -> nn.Module:
        """The model as the task built it."""

    @abstractmethod
    def _backward(self, loss: torch.Tensor, gradient: torch.Tensor) -> None:
        """Backward from `loss [rows]` with `gradient [rows]`, that is from `sum(loss * gradient)`."""

    @abstractmethod
    def _no_sync(self) -> AbstractContextManager[Any]: ...

    @abstractmethod
    def _clip(self, norm: float) -> None: ...

    def step(self, task: Task, batch: Batch, micro_batch_size: int | None, clip_norm: float | None) -> torch.Tensor:
        """One optimizer step on `batch`, this rank's share of a global batch.

        Every rank minimises `world_size / global_rows * sum(loss * weight)`. DDP averages gradients over the ranks,
        which takes `world_size` out again: what remains is the mean over the rows of the global batch, however they
        are spread over ranks and micro-batches, and without asking the others how many they have.

        Returns:
            The sum of `loss * weight` over this rank's rows, a scalar on the device, not yet awaited.
        """
        scale = self.topology.world_size / max(1, batch.global_rows)
        parts = batch.split(micro_batch_size)
        total: torch.Tensor | None = None
        for index, part in enumerate(parts):
            synchronise = index == len(parts) - 1  # one exchange of gradients a step is enough
            with contextlib.nullcontext() if synchronise else self._no_sync():
                loss = task.loss(self.model, part)
                if loss.shape != part.weight.shape:
                    raise ValueError(
                        f"{type(task).__name__}.loss returned shape {list(loss.shape)} for {len(part.rows)} rows; it must "
                        f"return one loss per row, shape [{len(part.rows)}], so that rows can be weighed: use "
                        f"reduction='none', and average over other dimensions only"
                    )
                weight = part.weight.to(loss.dtype)
                self._backward(loss, weight * scale)
            weighted = torch.dot(loss.detach(), weight)
            total = weighted if total is None else total + weighted
        if clip_norm is not None:
            self._clip(clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        assert total is not None, "a batch has at least one slot on every rank"
        return total

    def warm_up(self, task: Task, batch: Batch, micro_batch_size: int | None) -> None:
        """A forward and backward pass that leaves no trace, before the first real one.

        DDP lays its gradient buckets out anew after its first backward pass, and the order in which floats are added
        follows the layout. Without this, a run that goes on from a checkpoint would differ in the last bits from one
        that never stopped.
        """
        if self.topology.world_size == 1:
            return
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
        part = batch.split(micro_batch_size)[0]
        self._backward(task.loss(self.model, part), torch.zeros_like(part.weight))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    def seed(self, *words: int) -> None:
        """Seed the random numbers of host and device from `words`.

        Not by `torch.manual_seed`, which formats a stack trace for every device that is not there: 1 ms a call.
        """
        seed = mix(*words) >> 1
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over the ranks, in place."""
        if dist.is_initialized():
            dist.all_reduce(values)
        return values

    def new_host_group(self) -> Any:
        """A group of all ranks for another thread's messages between hosts; None for a single process."""
        if not dist.is_initialized():
            return None
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))

    def from_rank_0(self, value: T, group: Any = None) -> T:
        """Rank 0's `value`, on every rank."""
        if not dist.is_initialized():
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, group=group)
        result: T = values[0]
        return result

    def from_all_ranks(self, value: T, group: Any = None) -> list[T]:
        """Every rank's `value`, by rank."""
        if not dist.is_initialized():
            return [value]
        values: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(values, value, group=group)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if dist.is_initialized():
            dist.barrier()

    def shorten_timeout(self) -> None:
        """From now on a collective call that some rank does not join fails after `timeout_s` seconds.

        Before the first step ranks may wait longer for each other: for one that builds an index, or compiles.
        """
        if dist.is_initialized():
            module = dist.distributed_c10d
            set_timeout = getattr(module, "set_timeout", module._set_pg_timeout)  # the name before torch 2.13
            set_timeout(timedelta(seconds=self.timeout_s))

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


class DdpEngine(Engine):
    """torch.distributed and DistributedDataParallel; a single process goes without both."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.topology = Topology.detect()
        self.device = pick_device(self.topology)
        if self.topology.world_size > 1 and not dist.is_initialized():
            dist.init_process_group(
                backend_for(self.device),
                store=_store_of_this_attempt(os.environ, timeout_s),
                rank=self.topology.rank,
                world_size=self.topology.world_size,
                timeout=timedelta(seconds=max(timeout_s, _FIRST_TIMEOUT_S)),
            )

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module = model
        self.optimizer = self.raw_optimizer = optimizer
        if dist.is_initialized():
            on_device = [self.device] if self.device.type != "cpu" else None
            self.model = DistributedDataParallel(model, device_ids=on_device)
        else:
            self.model = model

    def unwrap(self) -> nn.Module:
        return self._module

    def _backward(self, loss: torch.Tensor, gradient: torch.Tensor) -> None:
        loss.backward(gradient)  # type: ignore[no-untyped-call]

    def _no_sync(self) -> AbstractContextManager[Any]:
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _clip(self, norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), norm)


class AccelerateEngine(Engine):
    """Hugging Face accelerate prepares the model and the optimizer. It never sees the data."""

    def __init__(self, timeout_s: float) -> None:
        import accelerate

        self.timeout_s = timeout_s

        promised = Topology.detect()
        cpu = not torch.accelerator.is_available()
        self._accelerator = accelerate.Accelerator(
            # Without cpu=True, processes started with use_cpu each believe that they are alone.
            cpu=cpu,
            kwargs_handlers=[
                accelerate.InitProcessGroupKwargs(timeout=timedelta(seconds=max(timeout_s, _FIRST_TIMEOUT_S)))
            ],
        )
        found, rank = self._accelerator.num_processes, self._accelerator.process_index
        if (rank, found) != (promised.rank, promised.world_size):
            raise WorldError(
                f"accelerate takes this process for rank {rank} of {found}, but the environment says rank "
                f"{promised.rank} of {promised.world_size}: every process would train on its own; start it with "
                f"launch/accelerate.sh, whose YAML files make both agree"
            )
        self.topology = Topology(rank, found)
        self.device = self._accelerator.device

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.raw_optimizer = optimizer
        self.model, self.optimizer = self._accelerator.prepare(model, optimizer)

    def unwrap(self) -> nn.Module:
        module: nn.Module = self._accelerator.unwrap_model(self.model)
        return module

    def _backward(self, loss: torch.Tensor, gradient: torch.Tensor) -> None:
        self._accelerator.backward(loss, gradient=gradient)

    def _no_sync(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._accelerator.no_sync(self.model)
        return context

    def _clip(self, norm: float) -> None:
        self._accelerator.clip_grad_norm_(self.model.parameters(), norm)

    def close(self) -> None:
        self._accelerator.end_training()
        super().close()


def make_engine(name: str, timeout_s: float) -> Engine:
    """The engine called `name`: `ddp` or `accelerate`.

    Raises:
        WorldError: fewer or more processes run than the launcher promised.
    """
    check_launcher(os.environ)
    choose_interface(os.environ)
    if "TORCHELASTIC_RUN_ID" in os.environ or numbered_by_slurm(os.environ):
        die_with_parent()  # torchrun's agent, or Slurm's step daemon; killed, it would leave its ranks behind
    return AccelerateEngine(timeout_s) if name == "accelerate" else DdpEngine(timeout_s)


def _store_of_this_attempt(environ: Mapping[str, str], timeout_s: float) -> Any:
    """Where ranks find each other that one torchrun agent started; None leaves that to torch.

    The agent's store outlives a restart. Without a prefix a rank may find there the address of one that is dead.
    (Agents on several nodes count their restarts apart.)
    """
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    timeout = timedelta(seconds=max(timeout_s, _FIRST_TIMEOUT_S))
    store = dist.TCPStore(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    return dist.PrefixStore(f"attempt-{environ['TORCHELASTIC_RESTART_COUNT']}", store)  # type: ignore[attr-defined]


def check_launcher(environ: Mapping[str, str]) -> None:
    """Raises WorldError if a launcher promised another number of processes than it started."""
    world_size = Topology.detect(environ).world_size
    promised = environ.get("DDP_STREAM_WORLD_SIZE")
    if promised is not None and promised != str(world_size):
        raise WorldError(
            f"DDP_STREAM_WORLD_SIZE={promised} processes were promised by the launcher, but this one finds "
            f"WORLD_SIZE={world_size}: some did not start, or do not know of each other; check the launcher's settings"
        )
    if numbered_by_slurm(environ) and world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        raise WorldError(
            f"srun started {world_size} tasks, but MASTER_ADDR and MASTER_PORT do not say where they meet: submit "
            f"slurm/srun.sbatch, which sets both, or export the first node's address and a free port on it"
        )
    # `accelerate launch` sets these for several processes, and RANK only in processes that it starts side by side.
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_ADDR" in environ and "WORLD_SIZE" not in environ:
        raise WorldError(
            "accelerate launch was asked for several processes and started one (there is no WORLD_SIZE beside "
            "MASTER_ADDR): on CPU it does so unless mpirun is set up; use launch/accelerate.sh, or the YAML file that "
            "it uses, launch/accelerate/cpu_gloo.yaml"
        )


def pick_device(topology: Topology) -> torch.device:
    """This rank's device, made the current one.

    Raises:
        WorldError: more ranks on this node than it shows devices.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    # MPS has no collective operations, so several ranks on a Mac compute on its CPU.
    if accelerator is None or (accelerator.type == "mps" and topology.world_size > 1):
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    count = torch.accelerator.device_count()
    # A launcher that shows every rank one device of its own counts them from 0 in each.
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise WorldError(
            f"local rank {local_rank} has no {accelerator.type} device: this node shows {count}; start at most {count} "
            f"ranks on it"
        )
    torch.accelerator.set_device_index(index)
    return torch.device(accelerator.type, index)


def backend_for(device: torch.device) -> str:
    """The backends of a process group whose ranks compute on `device`."""
    # Beside the device's own backend always gloo, for the proof's and the run's small tensors on the host.
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
