"""shard_bounds and the global batch plan on cases small enough to check by eye, and far too large to loop over."""

import itertools

import numpy as np
import pytest

from ddp_stream.partition import GlobalBatchPlan, shard_bounds, shard_of, span_starts, span_worker

TRILLION = 10**12


def test_shards_differ_by_one_row_and_the_first_ones_are_longer():
    # 11 = 4 * 2 + 3: three shards of 3, then one of 2.
    assert [shard_bounds(11, i, 4) for i in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 11)]
    # 2 rows for 3 shards: the last one is empty.
    assert [shard_bounds(2, i, 3) for i in range(3)] == [(0, 1), (1, 2), (2, 2)]
    assert shard_bounds(0, 0, 1) == (0, 0)


def test_a_trillion_rows_over_65_536_shards():
    # 10^12 = 65,536 * 15,258,789 + 4,096: shards 0..4,095 hold 15,258,790 rows, the others one less.
    short, count = 15_258_789, 65_536
    assert short * count + 4_096 == TRILLION
    assert shard_bounds(TRILLION, 0, count) == (0, short + 1)
    assert shard_bounds(TRILLION, 4_095, count) == (4_095 * (short + 1), 4_096 * (short + 1))
    assert shard_bounds(TRILLION, 4_096, count) == (4_096 * (short + 1), 4_096 * (short + 1) + short)
    assert shard_bounds(TRILLION, count - 1, count) == (TRILLION - short, TRILLION)


@pytest.mark.parametrize(
    ("total", "index", "count"), [(-1, 0, 1), (5, 0, 0), (5, 0, -2), (5, 3, 3), (5, -1, 3), (0, 1, 1)]
)
def test_there_is_no_such_shard(total, index, count):
    with pytest.raises(ValueError, match=rf"total={total}, index={index}, count={count}\): there is no such shard"):
        shard_bounds(total, index, count)


@pytest.mark.parametrize(("total", "count"), [(20, 3), (2, 3), (7, 7), (1, 4), (11, 1)])
def test_every_row_knows_its_shard(total, count):
    shards = [index for index in range(count) for _ in range(*shard_bounds(total, index, count))]
    assert shard_of(total, np.arange(total), count).tolist() == shards


@pytest.mark.parametrize(
    ("steps", "span_steps", "num_workers"), [(10, 3, 2), (10, 1, 4), (3, 5, 2), (0, 2, 2), (12, 4, 3)]
)
def test_every_step_is_in_a_span_of_one_worker(steps, span_steps, num_workers):
    worker = [None] * steps
    for index in range(num_workers):
        for first in span_starts(steps, span_steps, index, num_workers):
            for step in range(first, min(first + span_steps, steps)):
                assert worker[step] is None
                worker[step] = index
    assert span_worker(np.arange(steps), span_steps, num_workers).tolist() == worker


def table(plan):
    """Every step's positions with None for an empty slot, by the plan."""
    steps = []
    for offset in range(0, plan.steps() * plan.stride, plan.stride):
        positions, filled = plan.positions(offset, 1, 0, plan.global_batch_size)
        steps.append([p if f else None for p, f in zip(positions.tolist(), filled.tolist(), strict=True)])
    return steps


def by_hand(plan):
    """The same table from the definition, with loops: every lane is a list, a step takes `stride` from each."""
    lanes = [list(range(*shard_bounds(plan.total, lane, plan.lanes))) for lane in range(plan.lanes)]
    longest, shortest = len(lanes[0]), len(lanes[-1])
    end = longest if plan.tail == "pad" else shortest - shortest % plan.stride
    return [
        [(lane[i] if i < len(lane) else None) for lane in lanes for i in range(offset, offset + plan.stride)]
        for offset in range(0, end, plan.stride)
    ]


def test_one_lane_pads_the_last_step():
    plan = GlobalBatchPlan(total=10, global_batch_size=4)
    assert plan.steps() == 3  # ceil(10 / 4)
    assert table(plan) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, None, None]]
    assert [plan.rows_in_step(offset) for offset in (0, 4, 8)] == [4, 4, 2]


def test_an_empty_slot_repeats_the_last_row_of_its_lane():
    positions, filled = GlobalBatchPlan(total=10, global_batch_size=4).positions(8, 1, 0, 4)
    assert positions.tolist() == [8, 9, 9, 9]
    assert filled.tolist() == [True, True, False, False]


def test_one_lane_drops_the_last_step():
    plan = GlobalBatchPlan(total=10, global_batch_size=4, tail="drop")
    assert plan.steps() == 2  # 10 // 4
    assert table(plan) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_two_lanes_of_unequal_length():
    # 11 rows: lane 0 is positions 0..5, lane 1 is 6..10. A step takes 4 / 2 = 2 of each.
    plan = GlobalBatchPlan(total=11, global_batch_size=4, lanes=2)
    assert plan.stride == 2
    assert plan.steps() == 3  # ceil(6 / 2)
    assert table(plan) == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, None]]
    assert [plan.rows_in_step(offset) for offset in (0, 2, 4)] == [4, 4, 3]
    # drop: a step must be full in the shorter lane too, 5 // 2 = 2 steps, and rows 4, 5, 10 are left over.
    assert table(GlobalBatchPlan(11, 4, 2, "drop")) == [[0, 1, 6, 7], [2, 3, 8, 9]]


def test_more_lanes_than_rows():
    # 2 rows in 4 lanes: lanes 2 and 3 are empty, and repeat the last row there is.
    plan = GlobalBatchPlan(total=2, global_batch_size=4, lanes=4)
    positions, filled = plan.positions(0, 1, 0, 4)
    assert (plan.steps(), positions.tolist()) == (1, [0, 1, 1, 1])
    assert filled.tolist() == [True, True, False, False]
    assert GlobalBatchPlan(2, 4, 4, "drop").steps() == 0


def test_no_rows_make_no_steps():
    plan = GlobalBatchPlan(total=0, global_batch_size=4)
    assert (plan.steps(), plan.rows_in_step(0)) == (0, 0)
    assert [len(part) for part in plan.positions(0, 2, 0, 4)] == [0, 0]


def test_several_steps_and_some_slots_at_once():
    # Slots 1..2 of the steps at offsets 2, 4 of [[0,1,6,7], [2,3,8,9], [4,5,10,-]]: 3, 8 and 5, 10.
    plan = GlobalBatchPlan(total=11, global_batch_size=4, lanes=2)
    positions, filled = plan.positions(2, 2, 1, 3)
    assert positions.tolist() == [3, 8, 5, 10]
    assert filled.all()


def test_steps_that_remain_after_an_offset():
    # Lanes of 6 and 5 rows. pad: ceil((6 - offset) / 2); drop: (5 - offset) // 2; never fewer than none.
    pad, drop = GlobalBatchPlan(11, 4, 2), GlobalBatchPlan(11, 4, 2, "drop")
    assert [pad.steps(offset) for offset in range(8)] == [3, 3, 2, 2, 1, 1, 0, 0]
    assert [drop.steps(offset) for offset in range(8)] == [2, 2, 1, 1, 0, 0, 0, 0]


SMALL = [
    GlobalBatchPlan(total, lanes * stride, lanes, tail)
    for total, lanes, stride, tail in itertools.product((1, 2, 3, 7, 12, 13), (1, 2, 3, 5), (1, 2, 3), ("pad", "drop"))
]


@pytest.mark.parametrize("plan", SMALL, ids=str)
def test_the_formulas_agree_with_a_loop(plan):
    steps = by_hand(plan)
    assert table(plan) == steps
    assert plan.steps() == len(steps)
    for index, step in enumerate(steps):
        assert plan.rows_in_step(index * plan.stride) == sum(p is not None for p in step)
        for slot, position in enumerate(step):
            if position is not None:
                assert [array.item() for array in plan.locate(np.array([position]))] == [index * plan.stride, slot]


@pytest.mark.parametrize("plan", [plan for plan in SMALL if plan.tail == "pad"], ids=str)
def test_rows_between_agrees_with_a_loop(plan):
    lanes = [shard_bounds(plan.total, lane, plan.lanes) for lane in range(plan.lanes)]
    offsets = [p - start for start, end in lanes for p in range(start, end)]  # of every position in its lane
    for start, end in itertools.combinations(range(-1, plan.total + 2), 2):
        assert plan.rows_between(start, end) == sum(start <= offset < end for offset in offsets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": -1, "global_batch_size": 4}, "total=-1: a dataset cannot hold fewer than 0 rows"),
        ({"total": 9, "global_batch_size": 0}, "global_batch_size=0: a step needs at least one row"),
        ({"total": 9, "global_batch_size": 10, "lanes": 4}, "10 is not a multiple of lanes=4.*global_batch_size=8"),
        ({"total": 9, "global_batch_size": 2, "lanes": 4}, "2 is not a multiple of lanes=4.*global_batch_size=4"),
        ({"total": 9, "global_batch_size": 4, "lanes": 0}, "lanes=0"),
        ({"total": 9, "global_batch_size": 4, "tail": "keep"}, "tail='keep' is unknown: use 'pad' or 'drop'"),
    ],
)
def test_a_plan_that_cannot_be_says_what_can(arguments, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatchPlan(**arguments)


@pytest.mark.parametrize("position", [-1, 10])
def test_locate_knows_the_end_of_the_epoch(position):
    with pytest.raises(ValueError, match=rf"position={position} is outside the epoch's 0\.\.9"):
        GlobalBatchPlan(10, 4).locate(np.array([3, position]))


def test_a_trillion_rows_are_arithmetic():
    plan = GlobalBatchPlan(TRILLION, global_batch_size=4_096, lanes=64)
    # A lane has 10^12 / 64 = 15,625,000,000 rows; a step takes 64 of each: 244,140,625 steps, all of them full.
    assert plan.steps() == 244_140_625
    last = (plan.steps() - 1) * 64
    assert plan.rows_in_step(last) == 4_096
    positions, filled = plan.positions(last, 1, 4_095, 4_096)
    assert (positions.tolist(), filled.all()) == ([TRILLION - 1], True)
    assert [array.item() for array in plan.locate(np.array([TRILLION - 1]))] == [last, 4_095]
