"""Real gloo ranks with real workers: together they read every row once, whatever the numbers."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import run_ranks
from torch.utils.data import DataLoader

from ddp_stream import StreamingDataset, StreamLoader, Topology, shard_bounds
from ddp_stream.audit import Proof, Verdict
from ddp_stream.order import Shuffle
from ddp_stream.partition import Tail
from ddp_stream.sources import InMemory

WORLD_SIZES = [1, 2, 3, 4]
WORKERS = [0, 1, 2, 3]
SIZES = [0, 1, 7, 20, 1000, 10007]
BATCHES = [(64, 1), (64, 4), (10, 1), (100, 4)]  # (global batch, lanes); three ranks divide none of them
SHUFFLES: list[Shuffle] = ["none", "full", "blocks"]
TAILS: list[Tail] = ["pad", "drop"]


def source(rows: int) -> InMemory:
    return InMemory({"row": torch.arange(rows)})


def times_seen(parts: list[NDArray[np.int64]], rows: int) -> list[int]:
    return [int(times) for times in np.bincount(np.concatenate(parts), minlength=rows)]


# StreamingDataset in a plain DataLoader


def read_dataset(case: tuple[int, int, str | None]) -> NDArray[np.int64]:
    rows, workers, context = case
    multiprocessing.set_forkserver_preload(["torch"])
    dataset = StreamingDataset(source(rows))
    loader = DataLoader(dataset, batch_size=256, num_workers=workers, multiprocessing_context=context)
    return np.array([row for batch in loader for row in batch["row"].tolist()], np.int64)


def check_dataset(world_size: int, cases: list[tuple[int, int, str | None]]) -> None:
    seen = run_ranks(read_dataset, world_size, cases)
    for index, (rows, workers, context) in enumerate(cases):
        by_rank = [seen[rank][index] for rank in range(world_size)]
        assert times_seen(by_rank, rows) == [1] * rows, (rows, workers, context)
        # Rank r holds the global workers r * K .. r * K + K - 1, and their shards lie end to end.
        readers = max(1, workers)
        for rank, part in enumerate(by_rank):
            start, _ = shard_bounds(rows, rank * readers, world_size * readers)
            _, end = shard_bounds(rows, rank * readers + readers - 1, world_size * readers)
            assert sorted(part) == list(range(start, end)), (rows, workers, rank)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_streaming_dataset(world_size: int) -> None:
    check_dataset(world_size, [(rows, workers, None) for rows, workers in product(SIZES, WORKERS)])


def test_streaming_dataset_in_spawned_workers() -> None:
    check_dataset(2, [(1000, 2, "spawn")])  # where nothing but the dataset itself can tell the rank


@pytest.mark.slow
def test_streaming_dataset_in_every_kind_of_worker() -> None:
    check_dataset(3, list(product([1, 1000], [2, 3], ["spawn", "forkserver"])))


# StreamLoader


@dataclass(frozen=True)
class Case:
    rows: int
    global_batch_size: int
    lanes: int
    shuffle: Shuffle
    tail: Tail
    workers: int = 0
    context: str | None = None

    def loader(self, **options: Any) -> StreamLoader:
        return StreamLoader(
            source(self.rows),
            self.global_batch_size,
            lanes=self.lanes,
            shuffle=self.shuffle,
            tail=self.tail,
            seed=1,
            num_workers=self.workers,
            multiprocessing_context=self.context,
            **options,
        )


@dataclass(frozen=True)
class Epoch:
    """What one rank saw of an epoch."""

    rows: NDArray[np.int64]
    steps: int
    verdict: Verdict


CASES = [
    Case(rows, global_batch_size, lanes, shuffle, tail)
    for rows, (global_batch_size, lanes), shuffle, tail in product(SIZES, BATCHES, SHUFFLES, TAILS)
]


def read_loader(case: Case) -> list[Epoch]:
    loader = case.loader()
    proof = Proof(loader.plan, Topology.detect())
    epochs = []
    for epoch in range(2):
        steps, rows = 0, [torch.empty(0, dtype=torch.int64)]
        for batch in loader:
            assert batch.epoch == epoch
            assert torch.equal(batch["row"], batch.rows)  # the values are those of the rows
            steps += 1
            rows.append(batch.trained_rows)
            proof.record(batch)
        epochs.append(Epoch(torch.cat(rows).numpy(), steps, proof.verdict(loader.order(epoch))))
        proof.reset()
    return epochs


def check(case: Case, by_rank: list[Epoch]) -> None:
    # A step takes G / L rows of every lane. `pad` goes on to the end of the longest lane, `drop` stops with the
    # last step that even the shortest lane fills.
    stride = case.global_batch_size // case.lanes
    shortest, longest = case.rows // case.lanes, -(-case.rows // case.lanes)
    steps = shortest // stride if case.tail == "drop" else -(-longest // stride)
    left_out = case.rows - steps * case.global_batch_size if case.tail == "drop" else 0
    where = f"{case} on {len(by_rank)} rank(s)"
    seen = times_seen([epoch.rows for epoch in by_rank], case.rows)
    assert max(seen, default=0) <= 1, where
    assert sum(seen) + left_out == case.rows, where
    assert [epoch.steps for epoch in by_rank] == [steps] * len(by_rank), where
    for epoch in by_rank:
        verdict = epoch.verdict
        assert (verdict.exactly_once, verdict.rows, verdict.left_out) == (True, sum(seen), left_out), where


def check_all(world_size: int, cases: list[Case], timeout_s: float = 120) -> None:
    seen = run_ranks(read_loader, world_size, cases, timeout_s=timeout_s)
    for index, case in enumerate(cases):
        first, second = ([seen[rank][index][epoch] for rank in range(world_size)] for epoch in range(2))
        check(case, first)
        check(case, second)
        # The workers of the first epoch live on in the second, and must know that it is another one.
        same = all(np.array_equal(a.rows, b.rows) for a, b in zip(first, second, strict=True))
        assert same == (case.shuffle == "none" or first[0].steps == 0 or case.rows == 1), case


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_stream_loader(world_size: int) -> None:
    check_all(world_size, CASES)


# A start of a worker costs too much to repeat every case with 1, 2 and 3 of them on 1 to 4 ranks. Every 17th case,
# beginning at another one for each of these 12 pairs, still meets every value of every setting with every pair.
PAIRS = list(product(WORLD_SIZES, [1, 2, 3]))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_stream_loader_with_workers(world_size: int) -> None:
    cases = [
        replace(case, workers=workers)
        for workers in (1, 2, 3)
        for case in CASES[PAIRS.index((world_size, workers)) :: 17]
    ]
    check_all(world_size, cases)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "workers"), PAIRS)
def test_stream_loader_with_workers_in_every_case(world_size: int, workers: int) -> None:
    check_all(world_size, [replace(case, workers=workers) for case in CASES], timeout_s=280)


# Workers that live on


def with_pid(columns: Any) -> Any:
    return {**columns, "pid": torch.full((len(columns["row"]),), os.getpid())}


def read_again(case: tuple[int, str | None]) -> tuple[list[list[list[int]]], list[set[int]]]:
    """The rows of every step, and the workers' pids: of epochs 0 and 1, of 0 from step 3 on, of 1 from step 5 on."""
    workers, context = case
    multiprocessing.set_forkserver_preload(["torch"])
    loader = Case(1000, 64, 1, "full", "pad", workers, context).loader(transform=with_pid)
    runs = [list(loader), list(loader)]
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "offset": 3 * 64})
    runs.append(list(loader))
    loader.set_epoch(1)
    assert len(list(islice(loader, 5))) == 5  # and away, while the workers read on
    loader.load_state_dict(loader.state_dict())
    runs.append(list(loader))
    rows = [[batch.rows.tolist() for batch in batches] for batches in runs]
    return rows, [{pid for batch in batches for pid in batch["pid"].tolist()} for batches in runs]


def check_again(cases: list[tuple[int, str | None]]) -> None:
    for by_case in run_ranks(read_again, 2, cases):
        for case, (rows, pids) in zip(cases, by_case, strict=True):
            first, second, first_again, second_again = rows
            assert len(first) == len(second) == 16  # ceil(1000 / 64)
            assert first != second, case
            assert first_again == first[3:], case
            assert second_again == second[5:], case
            assert len(pids[0]) == case[0]
            assert pids == [pids[0]] * 4, case  # the same workers throughout
        assert all(rows == by_case[0][0] for rows, _ in by_case)


def test_workers_see_the_next_epoch_and_a_loaded_state() -> None:
    check_again([(3, None), (1, "spawn"), (2, "forkserver")])


@pytest.mark.slow
def test_every_kind_of_worker_sees_the_next_epoch_and_a_loaded_state() -> None:
    check_again(list(product([1, 2, 3], ["fork", "spawn", "forkserver"])))


# An epoch that changes hands

HOPS = [  # ranks, workers, global batch size, steps
    (1, 0, 64, 3),
    (4, 2, 48, 3),
    (3, 1, 20, 3),
    (2, 3, 64, 3),
    (1, 2, 100, None),
]


def go_on(task: tuple[Case, int | None, dict[str, Any] | None]) -> tuple[NDArray[np.int64], dict[str, Any]]:
    case, steps, state = task
    loader = case.loader()
    if state is not None:
        loader.load_state_dict(state)
    rows = [batch.trained_rows for batch in islice(loader, steps)]
    return torch.cat(rows).numpy(), loader.state_dict()


def test_resume_on_other_numbers_of_ranks_and_workers() -> None:
    kinds: list[tuple[Shuffle, Tail]] = [("none", "pad"), ("full", "pad"), ("full", "drop"), ("blocks", "drop")]
    cases = [Case(1000, 0, 4, *kind) for kind in kinds]
    states: list[Any] = [None] * len(cases)
    seen: list[list[NDArray[np.int64]]] = [[] for _ in cases]
    for world_size, workers, global_batch_size, steps in HOPS:
        now = [replace(case, workers=workers, global_batch_size=global_batch_size) for case in cases]
        by_rank = run_ranks(go_on, world_size, [(case, steps, state) for case, state in zip(now, states, strict=True)])
        for index in range(len(cases)):
            seen[index] += [answers[index][0] for answers in by_rank]
            states[index] = json.loads(json.dumps(by_rank[0][index][1]))
            assert all(answers[index][1] == states[index] for answers in by_rank)
    # Every lane has 250 rows and gave (64 + 48 + 20 + 64) / 4 * 3 = 147 of them before the last hop, whose steps take
    # 25 each. 103 rows are 4 steps, and 3 rows of every lane that only a padded step reaches.
    for case, parts, state in zip(cases, seen, states, strict=True):
        times = times_seen(parts, 1000)
        assert max(times) == 1
        assert sum(times) == (1000 if case.tail == "pad" else 1000 - 4 * 3)
        assert state["offset"] == 147 + 25 * (5 if case.tail == "pad" else 4)
