"""The configuration of a run. The text under a field is its help on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ddp_stream.order import Shuffle
from ddp_stream.partition import Tail
from ddp_stream.sources import Source
from ddp_stream.training.task import Task


@dataclass
class DataConfig:
    """Where rows come from, and how they are dealt."""

    path: list[str] | str | None = None
    """A file, a directory, a glob, or a list of them, in any format of the README; by default 1,000 synthetic rows."""
    source: Source | None = None
    """A source by import path, with its arguments as --data.source.NAME; in place of path."""
    columns: list[str] | None = None
    """Read these columns only; by default those that the task uses."""
    fill_null: float | None = None
    """The value that stands in for nulls in numeric columns; by default a null is an error."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """A row that cannot be read: raise an error, or skip it on all ranks alike; the proof counts it as excluded."""
    exclude: list[int] | None = None
    """Ids of rows to leave out; the proof counts them as excluded."""
    transform: Callable[..., Any] | None = None
    """A function of a dict of columns, or a class of such, by import path; it runs in the workers, on many rows."""
    global_batch_size: int = 64
    """Rows of one optimizer step over all ranks."""
    micro_batch_size: int | None = None
    """Most rows of one forward pass on one rank; gradients are accumulated over as many as it takes."""
    shuffle: Shuffle | None = None
    """The order of an epoch; by default blocks where the source has blocks (Parquet, CSV), else full."""
    window_rows: int | None = None
    """Rows shuffled together by the blocks order; by default about four blocks."""
    lanes: int = 1
    """Slices of the order that a batch is drawn from side by side; divides global_batch_size."""
    tail: Tail = "pad"
    """The last step: pad keeps every row, drop leaves out the rows that do not fill a step, and says how many."""
    num_workers: int | Literal["auto"] = 2
    """Processes on every rank that read ahead; 0 reads in the training process; auto measures which is better."""
    pin_memory: bool | None = None
    """Page-locked host memory; by default where there is an accelerator."""
    persistent_workers: bool | None = None
    """Keep workers from one epoch to the next; by default yes."""
    prefetch_factor: int | None = None
    """Messages of several steps that every worker prepares ahead; by default torch's."""
    multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None
    """How workers start; by default Python's way."""


@dataclass
class OptimConfig:
    """The optimizer, unless the task brings its own, and the learning rate."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """The optimizer."""
    lr: float = 1e-3
    """The learning rate at its peak."""
    weight_decay: float = 0.0
    """L2 penalty (adam, sgd) or decoupled decay (adamw)."""
    momentum: float = 0.0
    """Momentum of sgd."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up: constant, or a cosine down to 0 at the last step."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly to its peak."""
    clip_norm: float | None = None
    """Largest norm of the gradient of a whole step; larger ones are scaled down."""


@dataclass
class RunConfig:
    """Where the run leaves its results."""

    dir: str | None = None
    """The run directory; by default a new one under runs/."""


@dataclass
class AuditConfig:
    """The proof."""

    trace: bool = False
    """Write every row id of every step and rank to RUN/trace/."""


@dataclass
class CheckpointConfig:
    """When to save, and what to go on from."""

    every_steps: int | None = None
    """Save after every so many optimizer steps; always at the end of an epoch and at a stop."""
    every_minutes: float | None = None
    """Save when so many minutes have passed since the last time."""
    keep: int = 2
    """How many checkpoints remain, at least 2."""
    async_save: bool = False
    """Write while training goes on, from a copy of model and optimizer in the memory of every rank."""
    resume: str = "auto"
    """auto goes on from the newest whole checkpoint of the run directory, never starts anew, a path names one."""


@dataclass
class EvalConfig:
    """Rows that the model is measured on, each exactly once, and not trained with."""

    path: list[str] | str | None = None
    """A file, a directory, a glob, or a list of them, with the columns of the training data; by default none."""
    source: Source | None = None
    """A source by import path, with its arguments as --eval.source.NAME; in place of path."""
    every_epochs: int = 1
    """Evaluate after every so many epochs, and after the last."""


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """online sends metrics to wandb, offline writes its files into the run directory."""
    project: str = "ddp_stream"
    """The project they belong to."""


@dataclass
class TrainConfig:
    """Train a task on every row of the data, exactly once per epoch, and prove it."""

    task: Task
    """What to train, by import path, with its arguments as --task.NAME."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where rows come from, and how they are dealt."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Rows that the model is measured on, each exactly once, and not trained with."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and the learning rate."""
    engine: Literal["ddp", "accelerate"] = "ddp"
    """Who shares the gradients: torch's DistributedDataParallel by hand, or Hugging Face accelerate."""
    epochs: int = 3
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, even inside an epoch."""
    seed: int = 0
    """Decides the shuffle, the first weights and all random numbers of training."""
    timeout_s: float = 300.0
    """Seconds after which a collective operation that some rank does not join is an error; before the first step, at
    least half an hour."""
    run: RunConfig = field(default_factory=RunConfig)
    """Where the run leaves its results."""
    max_minutes: float | None = None
    """Stop, with a checkpoint, after so many minutes."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save, and what to go on from."""
    audit: AuditConfig = field(default_factory=AuditConfig)
    """The proof."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
