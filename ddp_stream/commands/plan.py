"""`plan`: the whole distribution by arithmetic alone, for any cluster you do not have yet."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ddp_stream.tasks  # noqa: F401  (so that --task finds the ready ones by name)
from ddp_stream.commands.cli import Parser, make_parser
from ddp_stream.deal import Deal, Imagined, foreseen, size
from ddp_stream.loader import StreamLoader
from ddp_stream.simulate import simulate
from ddp_stream.sources import Source
from ddp_stream.sources.decoded import CACHE_BYTES
from ddp_stream.topology import Topology
from ddp_stream.training.config import TrainConfig
from ddp_stream.training.data import make_loader, make_source
from ddp_stream.training.task import Task

_MOST_RANKS = 16
_MOST_ROWS = 12


def parser() -> Parser:
    """The command's options: those of train, a cluster, and questions."""
    parser = make_parser(TrainConfig, task=True)
    parser.description = "Say by arithmetic alone who would read what, on any cluster; takes the options of train."
    add = parser.add_argument_group("the cluster, and data that is not there yet").add_argument
    add("--world_size", type=int, default=1, help="ranks")
    add("--ranks_per_node", type=int, default=8, help="ranks on one machine")
    add("--rows", type=int | None, default=None, help="plan for so many rows, without data")
    add("--row_bytes", type=int, default=1024, help="bytes of one of these rows as a batch holds it")
    add("--block_rows", type=int | None, default=None, help="these rows lie in blocks (Parquet row groups) of so many")
    add = parser.add_argument_group("questions").add_argument
    add("--epoch", type=int, default=0, help="the epoch asked about")
    add("--step", type=int | None, default=None, help="which rows are in this step of the epoch, and who reads them")
    add("--find", type=int | None, default=None, help="in which step, rank and worker this row is")
    add("--simulate", action="store_true", help="run every reader, or a sample of a large cluster: exactly once?")
    add("--plot", type=Path | None, default=None, help="draw who reads what into this PNG file")
    return parser


def run(parser: Parser, arguments: Any) -> int:
    """Print the plan; returns 1 if a simulation found a row not read exactly once, 2 if there is no such plan."""
    values = parser.instantiate(arguments)
    config = TrainConfig(**{name: values[name] for name in TrainConfig.__dataclass_fields__})
    try:
        return _run(config, arguments)
    except (ValueError, ImportError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2


def _run(config: TrainConfig, asked: Any) -> int:
    _check(asked)
    task: Task | None = None
    source: Source
    if asked.rows is not None:
        if config.data.path is not None or config.data.source is not None:
            raise ValueError(f"--rows {asked.rows} stands for data that is not there; leave out --data.path and source")
        if config.data.num_workers == "auto":
            raise ValueError(
                "--data.num_workers auto measures data, and --rows stands for some that is not there: say how many"
            )
        source = Imagined(asked.rows, asked.row_bytes, asked.block_rows)
    else:
        task, source = config.task, make_source(config.data)
        task.setup(source)
        source = source.select(task.columns) if task.columns is not None else source
    transform = task.transform if task is not None and type(task).transform is not Task.transform else None
    topology = Topology(0, asked.world_size)
    loader = make_loader(source, config.data, seed=config.seed, topology=topology, transform=transform)
    deal = Deal(loader, asked.world_size, asked.epoch)
    if asked.step is not None:
        _print_step(deal, asked.step)
    if asked.find is not None:
        _print_row(deal, asked.find)
    if asked.step is None and asked.find is None:
        _print_plan(deal, loader, config, task, asked.ranks_per_node)
    if asked.plot is not None:
        from ddp_stream.plot import plot

        plot(deal, asked.plot)
        print(f"drawn into {asked.plot}")
    if not asked.simulate:
        return 0
    simulated = simulate(deal)
    _print("simulated", *simulated.lines)
    return 0 if simulated.exactly_once else 1


def _check(asked: Any) -> None:
    for name, least in (("world_size", 1), ("ranks_per_node", 1), ("epoch", 0)):
        if getattr(asked, name) < least:
            raise ValueError(f"--{name} {getattr(asked, name)}: it must be at least {least}")


def _print(name: str, *lines: str) -> None:
    for line in lines:
        print(f"{name:<13} {line}", flush=True)
        name = ""


def _print_plan(deal: Deal, loader: StreamLoader, config: TrainConfig, task: Task | None, per_node: int) -> None:
    plan, world, workers = deal.plan, deal.world_size, deal.num_workers
    blocks = f" in {deal.block_count:,} blocks" if deal.block_count else ""
    _print("data", f"{loader.source}: {plan.total:,} rows{blocks}, {size(deal.row_bytes)} a row in a batch")
    nodes, auto = -(-world // per_node), config.data.num_workers == "auto"
    _print(
        "cluster",
        f"{world:,} rank(s) x {workers} worker(s) = {world * workers:,} global workers on {nodes:,} node(s)",
        *([] if loader.num_workers else ["each rank reads for itself, being its one worker"]),
        *([f"workers as auto would have it on this machine: {loader.num_workers}"] if auto else []),
    )
    total_steps = config.epochs * deal.steps
    total_steps = min(total_steps, config.max_steps) if config.max_steps is not None else total_steps
    window = f", windows of {config.data.window_rows:,} rows" if config.data.window_rows else ""
    _print(
        "epoch",
        f"{deal.steps:,} steps of {plan.global_batch_size:,} rows, order {loader.shuffle}{window}, {plan.lanes} lane(s)",
        f"{config.epochs} epochs: {total_steps:,} steps",
    )
    left_out = plan.total - deal.trained_rows
    _print("tail", f"{plan.tail}: {deal.padded_slots:,} empty slots, all in the last step; {left_out:,} rows left out")
    if deal.steps:
        _print_readers(deal, loader, min(per_node, world))
    _print_model(deal, loader, config, task, world)
    for problem, fix in foreseen(deal):
        _print("MIND", problem, f"-> {fix}")


def _print_readers(deal: Deal, loader: StreamLoader, per_node: int) -> None:
    plan, world, workers = deal.plan, deal.world_size, deal.num_workers
    by_worker = deal.rows_by_worker()
    by_rank = by_worker.sum(axis=1)
    slots = sorted({deal.slots(rank)[1] - deal.slots(rank)[0] for rank in (0, world - 1)})
    _print(
        "a rank",
        f"{_span(by_rank)} rows an epoch ({size(int(by_rank.max()) * deal.row_bytes)}), {_span(slots)} a step",
    )
    spans = _span(sorted({deal.span_steps(rank) for rank in (0, world - 1)}))
    _print("a worker", f"{_span(by_worker)} rows an epoch, in messages of {spans} steps ({size(deal.message_bytes)})")
    if deal.block_count:
        times = deal.amplification()
        hint = ""
        if times > 1.5 and plan.global_batch_size % world == 0 and plan.lanes % world and loader.shuffle == "blocks":
            hint = f"; with --data.lanes {world} a rank reads only its own part of the files"
        _print("reading", f"{times:.2f} rows decoded for every row used, with a cache of {size(CACHE_BYTES)}{hint}")
    elif _forward_only(loader):
        readers = world * max(1, loader.num_workers)
        _print("reading", f"{readers:,} rows read for every row used: every reader passes over the rows of the others")
    else:
        _print("reading", "1.00 rows read for every row used: any row is as near as any other")
    ahead = (loader.messages_ahead + 1) * deal.message_bytes  # and the one that is trained on
    _print(
        "memory",
        f"{size(ahead)} of messages on their way to a rank, {size(per_node * ahead)} of /dev/shm a node"
        if loader.num_workers
        else f"{size(deal.message_bytes)} a message, no shared memory",
        *([f"{size(workers * CACHE_BYTES)} of decoded blocks in a rank's workers"] if deal.block_count else []),
    )


def _print_model(deal: Deal, loader: StreamLoader, config: TrainConfig, task: Task | None, world: int) -> None:
    if task is not None:
        try:
            with torch.device("meta"):
                model = task.build_model()
        except Exception as error:  # any code of the user's
            _print("checkpoint", f"size unknown: the model cannot be built without memory ({error})")
        else:
            state = {"adam": 2, "adamw": 2, "sgd": int(config.optim.momentum > 0)}[config.optim.name]
            weights = sum(value.nbytes for value in model.state_dict().values())
            trained = sum(value.nbytes for value in model.parameters() if value.requires_grad)
            _print(
                "checkpoint",
                f"{size(weights)} of weights + {size(state * trained)} of optimizer ({config.optim.name}), "
                f"{config.checkpoint.keep} kept: {size((config.checkpoint.keep + 1) * (weights + state * trained))} of disk",
            )
    every = min(config.checkpoint.every_steps or deal.steps, deal.steps)
    minutes = f" or {config.checkpoint.every_minutes:g} minutes" if config.checkpoint.every_minutes is not None else ""
    _print(
        "",
        f"saved every {every:,} steps{minutes}; a crash repeats at most {every * deal.plan.global_batch_size:,} rows",
    )
    even = [n for n in sorted({world // 2, world - 1, world + 1, world * 2}) if 0 < n <= deal.plan.global_batch_size]
    shares = ", ".join(f"{n:,}{'' if deal.plan.global_batch_size % n == 0 else ' (uneven)'}" for n in even)
    price = "the rows before it are read again" if _forward_only(loader) else "no row is read"
    _print("resume", f"from (epoch, offset): {price} to get there; on any ranks, such as {shares}")


def _forward_only(loader: StreamLoader) -> bool:
    return bool(getattr(loader.source, "forward_only", False))


def _print_step(deal: Deal, step: int) -> None:
    if not 0 <= step < deal.steps:
        raise ValueError(f"--step {step}: an epoch has the steps 0..{deal.steps - 1}")
    plan = deal.plan
    rows = plan.rows_in_step(step * plan.stride)
    _print(
        f"step {step}",
        f"epoch {deal.epoch}, offset {step * plan.stride}: {rows:,} rows on {deal.world_size:,} ranks; worker as in an "
        f"epoch begun at its start",
    )
    for rank in range(min(deal.world_size, _MOST_RANKS)):
        part = deal.part(rank, step)
        found = deal.find(part.rows[0, :1])
        worker = int(found.worker[0]) if part.filled[0, 0] else (step // deal.span_steps(rank)) % deal.num_workers
        listed = part.rows[part.filled]
        more = f" ... {len(listed) - _MOST_ROWS:,} more" if len(listed) > _MOST_ROWS else ""
        shown = " ".join(map(str, listed[:_MOST_ROWS].tolist())) or "none"
        _print("", f"rank {rank}, worker {worker}: rows {shown}{more}")
    if deal.world_size > _MOST_RANKS:
        _print("", f"... and {deal.world_size - _MOST_RANKS:,} more ranks")


def _print_row(deal: Deal, row: int) -> None:
    if not 0 <= row < deal.plan.total:
        raise ValueError(f"--find {row}: the data has the rows 0..{deal.plan.total - 1}")
    found = deal.find(np.array([row]))
    where = f"epoch {deal.epoch}, position {found.position[0]}"
    if not found.reached[0]:
        _print(f"row {row}", f"{where}: left out, for tail={deal.plan.tail} takes only full steps")
        return
    reader = found.rank[0] * deal.num_workers + found.worker[0]
    _print(
        f"row {row}",
        f"{where}: step {found.step[0]}, slot {found.slot[0]}, rank {found.rank[0]}, worker {found.worker[0]} (global "
        f"worker {reader})",
    )


def _span(values: Any) -> str:
    low, high = int(np.min(values)), int(np.max(values))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
