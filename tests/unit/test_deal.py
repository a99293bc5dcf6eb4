"""Who reads what, as planned: against the workers that really read it, and against plans that are wrong."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import get_worker_info

import ddp_stream.deal
import ddp_stream.simulate
from ddp_stream.deal import Deal, Imagined, foreseen
from ddp_stream.loader import StreamLoader
from ddp_stream.partition import GlobalBatchPlan, shard_bounds, span_starts
from ddp_stream.simulate import simulate
from ddp_stream.sources import InMemory, Parquet
from ddp_stream.topology import Topology


def make_deal(rows, global_batch_size, world_size, num_workers, *, row_bytes=100, block_rows=None, epoch=0, **options):
    loader = StreamLoader(
        Imagined(rows, row_bytes, block_rows),
        global_batch_size,
        num_workers=num_workers,
        topology=Topology(0, world_size),
        **options,
    )
    return Deal(loader, world_size, epoch)


def name_the_worker(columns):
    info = get_worker_info()
    return {"row": columns["row"], "worker": torch.full((len(columns["row"]),), info.id if info else 0)}


@pytest.mark.parametrize(
    ("num_workers", "options"), [(3, {"lanes": 4}), (2, {"tail": "drop", "shuffle": "blocks"}), (0, {})]
)
def test_the_workers_read_what_was_planned(num_workers, options):
    source, world_size, epoch = InMemory({"row": np.arange(997)}), 3, 1
    read = []  # by the loader's own processes
    for rank in range(world_size):
        loader = StreamLoader(
            source,
            20,
            num_workers=num_workers,
            topology=Topology(rank, world_size),
            transform=name_the_worker,
            **options,
        )
        loader.set_epoch(epoch)
        for batch in loader:
            filled = batch.weight > 0
            read += [
                (row, batch.step, rank, worker)
                for row, worker in zip(batch.rows[filled].tolist(), batch["worker"][filled].tolist(), strict=True)
            ]
    deal = Deal(loader, world_size, epoch)
    found = deal.find(np.arange(997))
    planned = zip(range(997), found.step.tolist(), found.rank.tolist(), found.worker.tolist(), strict=True)
    reached = [place for place, there in zip(planned, found.reached, strict=True) if there]
    assert sorted(read) == reached
    assert len(reached) == (980 if options.get("tail") == "drop" else 997)  # 49 steps of 20, and 17 rows
    readers = np.zeros((world_size, deal.num_workers), np.int64)
    for _, _, rank, worker in read:
        readers[rank, worker] += 1
    assert np.array_equal(deal.rows_by_worker(), readers)


@pytest.mark.parametrize(("workers", "lanes"), [(1, 1), (3, 4)])
def test_spans_and_their_bytes_are_the_loader_s(workers, lanes):
    source = InMemory({"x": np.zeros((997, 5), np.float32)})
    for rank in range(3):
        loader = StreamLoader(source, 20, num_workers=workers, topology=Topology(rank, 3), lanes=lanes)
        deal, reader, stride = Deal(loader, 3), loader.reader, loader.plan.stride
        reader.span_steps = deal.span_steps(rank)
        for worker in range(workers):
            spans = list(reader.starts(0, worker, workers))
            assert [offset for offset, _ in spans] == [start * stride for start in deal.starts(rank, worker)]
            assert [steps for _, steps in spans] == [len(p.rows) for p in deal.read(rank, deal.starts(rank, worker))]
        span = next(reader.spans(0, 0, 0, workers))
        sent = span.columns["x"].nbytes + span.rows.nbytes
        assert sent == span.steps * (deal.slots(rank)[1] - deal.slots(rank)[0]) * deal.row_bytes
        assert deal.message_bytes >= sent  # of rank 0, which has the most slots
        # Gone on with in the middle, the ranks' workers still share what is left of the spans, whoever takes which.
        done = 7
        left = sorted(span for worker in range(workers) for span in reader.starts(done * stride, worker, workers))
        assert left[0][0] == done * stride
        assert [offset + steps * stride for offset, steps in left[:-1]] == [offset for offset, _ in left[1:]]
        assert left[-1][0] + left[-1][1] * stride == deal.steps * stride


@pytest.mark.parametrize("tail", ["pad", "drop"])
@pytest.mark.parametrize(("rows", "batch", "lanes", "world", "workers"), [
    (1000, 64, 1, 3, 2), (101, 12, 4, 5, 3), (7, 12, 3, 4, 2), (5000, 6, 2, 6, 7), (64, 64, 8, 8, 1), (0, 4, 1, 2, 2),
])  # fmt: skip
def test_rows_of_every_worker_are_those_it_reads(rows, batch, lanes, world, workers, tail):
    deal = make_deal(rows, batch, world, workers, lanes=lanes, tail=tail)
    counted = [
        [
            sum(int(part.filled.sum()) for part in deal.read(rank, deal.starts(rank, worker)))
            for worker in range(workers)
        ]
        for rank in range(world)
    ]
    assert deal.rows_by_worker().tolist() == counted
    assert deal.trained_rows == np.sum(counted)
    assert deal.padded_slots == deal.steps * batch - np.sum(counted)


def test_a_trillion_rows_on_65_536_ranks():
    deal = make_deal(10**12, 524_288, 65_536, 8)
    # 10^12 = 1,907,348 * 524,288 + 331,776: that many steps and one more; a rank takes 8 slots of each, and of the last
    # one the first 331,776 / 8 = 41,472 ranks.
    assert 1_907_348 * 524_288 + 331_776 == 10**12
    by_rank = deal.rows_by_worker().sum(axis=1)
    assert by_rank.tolist() == [8 * 1_907_349] * 41_472 + [8 * 1_907_348] * (65_536 - 41_472)
    found = deal.find(np.array([123_456_789_012]))
    rank, step, slot = found.rank.item(), found.step.item(), found.slot.item()
    first, end = deal.slots(rank)
    assert first <= slot < end
    assert deal.part(rank, step).rows[0, slot - first] == 123_456_789_012
    assert any(start <= step < start + deal.span_steps(rank) for start in deal.starts(rank, found.worker.item()))


def forget_the_rank(total, index, count):
    return shard_bounds(total, 0, count)


def forget_one_slot(total, index, count):
    start, end = shard_bounds(total, index, count)
    return start, end - (index == count - 1)


def forget_the_worker(steps, span_steps, worker, num_workers):
    return span_starts(steps, span_steps, 0, num_workers)


def forget_a_span(steps, span_steps, worker, num_workers):
    return span_starts(steps, span_steps, worker, num_workers)[1:]


class Shifted(GlobalBatchPlan):
    def positions(self, *arguments):
        positions, filled = super().positions(*arguments)
        return np.minimum(positions + 1, self.total - 1), filled


def run_simulation(whole, monkeypatch, **options):
    monkeypatch.setattr(ddp_stream.simulate, "WHOLE_ROWS", 10**6 if whole else 0)
    deal = make_deal(5000, 60, 4, 3, **options)
    return deal, lambda: simulate(deal)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("options", [{}, {"lanes": 6}, {"block_rows": 130, "lanes": 2}, {"tail": "drop"}])
def test_a_simulation_of_what_is_right(whole, options, monkeypatch):
    _, run = run_simulation(whole, monkeypatch, **options)
    simulated = run()
    assert simulated.exactly_once
    assert ("SAMPLED" in simulated.lines[0]) is not whole


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("name", "broken"), [
    ("shard_bounds", forget_the_rank), ("shard_bounds", forget_one_slot), ("span_starts", forget_the_worker),
])  # fmt: skip
def test_a_simulation_of_what_is_wrong(whole, name, broken, monkeypatch):
    monkeypatch.setattr(ddp_stream.deal, name, broken)
    _, run = run_simulation(whole, monkeypatch)
    simulated = run()
    assert not simulated.exactly_once, simulated.lines


def test_a_simulation_with_a_span_that_nobody_reads(monkeypatch):
    monkeypatch.setattr(ddp_stream.deal, "span_starts", forget_a_span)
    _, run = run_simulation(True, monkeypatch)
    (line,) = run().lines
    # The first span of each of the 3 workers: 84 steps are 3 * 2 spans of 14 steps, so half of the rows, 42 * 60.
    assert "2480 rows seen of 5000: 2520 missing, 0 duplicate; missing rows" in line


@pytest.mark.parametrize("whole", [True, False])
def test_a_simulation_of_a_wrong_plan(whole, monkeypatch):
    deal, run = run_simulation(whole, monkeypatch)
    deal.plan = deal._reader.plan = Shifted(5000, 60)
    assert not run().exactly_once


def test_decoded_blocks_are_those_that_the_source_decodes(tmp_path, monkeypatch):
    monkeypatch.setattr(ddp_stream.deal, "CACHE_BYTES", 3000)
    monkeypatch.setattr("ddp_stream.sources.decoded.CACHE_BYTES", 3000)
    pa.parquet.write_table(pa.table({"x": np.arange(4000.0)}), tmp_path / "rows.parquet", row_group_size=100)
    counted = []
    real = Parquet._read_block
    monkeypatch.setattr(Parquet, "_read_block", lambda *arguments: counted.append(arguments[2]) or real(*arguments))
    for lanes in (1, 4):
        source = Parquet(str(tmp_path / "rows.parquet"))
        loader = StreamLoader(source, 40, topology=Topology(1, 2), lanes=lanes, num_workers=0)
        deal = Deal(loader, 2)
        deal.row_bytes = 8  # as decoded
        loader.reader.span_steps = deal.span_steps(1)
        counted.clear()
        source._decoded = None  # of the row that the deal looked at
        asked = sum(len(span.rows) for span in loader.reader.spans(0, 0, 0, 1))
        assert deal.decoded(1, 0, 10**9) == (asked, 100 * len(counted))


def test_lanes_let_ranks_read_their_own_part_only():
    apart = make_deal(2**20, 256, 8, 2, block_rows=4096, lanes=8).amplification()
    together = make_deal(2**20, 256, 8, 2, block_rows=4096).amplification()
    assert 1 <= apart < 3
    assert together >= 8


@pytest.mark.parametrize(("arguments", "problem", "fix"), [
    ((1000, 64, 3, 2), "uneven ranks: 1 ranks take 22 rows of a step and 2 take 21", "63 or 66"),
    ((3, 8, 4, 1), "2 of 4 ranks have not one row in the epoch (the first is rank 2)", "use fewer ranks"),
    ((100, 90, 2, 1), "wastes 80 of 180 slots (44%)", "--data.global_batch_size 50"),
    ((0, 8, 2, 1), "0 rows make no step of 8", "or less"),
    ((256, 64, 2, 6), "4 of 12 workers have nothing to read, an epoch being 4 steps long", "--data.num_workers 4"),
])  # fmt: skip
def test_what_arithmetic_foresees(arguments, problem, fix):
    found = foreseen(make_deal(*arguments))
    assert any(problem in what and fix in how for what, how in found), found


def test_nothing_to_mind():
    assert foreseen(make_deal(100_000, 64, 4, 2)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "batch", "world"), [(10**8, 8192, 1024), (10**12, 524_288, 65_536)])
def test_a_large_cluster(rows, batch, world):
    simulated = simulate(make_deal(rows, batch, world, 8, row_bytes=1024))
    assert simulated.exactly_once, simulated.lines
