"""The theorem: a bijection composed with a partition, for any sizes that hypothesis can think of.

epoch, step, slot  --plan-->  position  --order-->  row
"""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ddp_stream.order import BlockLayout, Permutation, make_order
from ddp_stream.partition import GlobalBatchPlan, shard_bounds

quick = settings(deadline=None, max_examples=150)

seeds = st.integers(0, 2**64 - 1)
tails = st.sampled_from(["pad", "drop"])


@st.composite
def layouts(draw):
    """Uniform blocks, or blocks of any sizes with empty ones among them; at least one row."""
    if draw(st.booleans()):
        return BlockLayout(draw(st.integers(1, 400)), block_rows=draw(st.integers(1, 50)))
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=15).filter(any))
    return BlockLayout(sum(sizes), offsets=np.cumsum([0, *sizes]))


@st.composite
def orders(draw, lanes=None):
    """Any order of one epoch."""
    return make_order(
        draw(st.sampled_from(["none", "full", "blocks", "blocks"])),
        draw(layouts()),
        seed=draw(seeds),
        epoch=draw(st.integers(0, 1000)),
        window_rows=draw(st.none() | st.integers(1, 130)),
        lanes=lanes or draw(st.integers(1, 9)),
    )


@quick
@given(orders())
def test_an_order_is_a_bijection_and_positions_is_its_inverse(order):
    everywhere = np.arange(order.total)
    rows = order.rows(everywhere)
    assert np.array_equal(np.sort(rows), everywhere)
    assert np.array_equal(order.positions(rows), everywhere)
    assert np.array_equal(order.rows(order.positions(everywhere)), everywhere)


@quick
@given(orders(), st.data())
def test_an_order_does_not_depend_on_what_is_asked_together(order, data):
    some = np.array(data.draw(st.lists(st.integers(0, order.total - 1), max_size=20)), np.int64)
    assert np.array_equal(order.rows(some), order.rows(np.arange(order.total))[some])


@quick
@given(st.integers(1, 2**62), seeds, st.data())
def test_a_permutation_of_any_size_is_undone_by_its_inverse(size, key, data):
    points = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)))
    images = Permutation(size).forward(points, key)
    assert len(set(images.tolist())) == len(points)
    assert images.min() >= 0
    assert images.max() < size
    assert np.array_equal(Permutation(size).inverse(images, key), points)


@quick
@given(st.integers(0, 10**15), st.integers(1, 10**6), st.data())
def test_shards_are_adjacent_and_cover_everything(total, count, data):
    index = data.draw(st.integers(0, count - 1))
    start, end = shard_bounds(total, index, count)
    assert end - start in (total // count, -(-total // count))
    assert start == (0 if index == 0 else shard_bounds(total, index - 1, count)[1])
    assert end == (total if index == count - 1 else shard_bounds(total, index + 1, count)[0])


def taken(plan, offset, steps):
    """Positions that `steps` steps from `offset` on really hold."""
    positions, filled = plan.positions(offset, steps, 0, plan.global_batch_size)
    return positions[filled]


@quick
@given(st.integers(0, 500), st.integers(1, 8), st.integers(1, 30), tails)
def test_an_epoch_takes_every_position_once(total, lanes, stride, tail):
    plan = GlobalBatchPlan(total, lanes * stride, lanes, tail)
    positions = taken(plan, 0, plan.steps())
    assert len(np.unique(positions)) == len(positions)
    if tail == "pad":
        assert len(positions) == total
    else:
        # Every step is full, and what is left would not have filled another one.
        assert len(positions) == plan.steps() * plan.global_batch_size
        assert total // lanes - plan.steps() * stride < stride


@quick
@given(orders(), st.integers(1, 8), st.integers(1, 30))
def test_an_epoch_trains_every_row_once(order, lanes, stride):
    plan = GlobalBatchPlan(order.total, lanes * stride, lanes)
    rows = order.rows(taken(plan, 0, plan.steps()))
    assert np.array_equal(np.sort(rows), np.arange(order.total))


@quick
@given(
    orders(),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 6)), max_size=4),
    st.integers(1, 20),
    tails,
)
def test_an_epoch_survives_any_changes_of_the_global_batch_size(order, lanes, changes, last_stride, tail):
    """`changes` is a list of (stride, steps taken with it); the global batch size is lanes * stride."""
    parts, offset = [], 0
    for stride, steps in [*changes, (last_stride, None)]:
        plan = GlobalBatchPlan(order.total, lanes * stride, lanes, tail)
        steps = plan.steps(offset) if steps is None else min(steps, plan.steps(offset))
        parts.append(taken(plan, offset, steps))
        offset += steps * stride
    rows = order.rows(np.concatenate(parts))
    assert len(np.unique(rows)) == len(rows)
    assert len(rows) == plan.rows_between(0, offset)
    if tail == "pad":
        assert len(rows) == order.total
    else:
        assert len(rows) == offset * lanes
        assert order.total // lanes - offset < last_stride


@quick
@given(st.integers(1, 500), st.integers(1, 6), st.integers(1, 12), tails, st.data())
def test_ranks_share_every_step_and_do_not_change_it(total, lanes, stride, tail, data):
    plan = GlobalBatchPlan(total, lanes * stride, lanes, tail)
    ranks = data.draw(st.integers(1, plan.global_batch_size))
    bounds = [shard_bounds(plan.global_batch_size, rank, ranks) for rank in range(ranks)]
    steps = plan.steps()

    def slots(first, end):
        return [part.reshape(steps, end - first) for part in plan.positions(0, steps, first, end)]

    whole, filled = slots(0, plan.global_batch_size)
    shares = [slots(*bound) for bound in bounds]
    assert all(end > start for start, end in bounds)  # nobody is idle
    assert np.array_equal(np.concatenate([share[0] for share in shares], axis=1), whole)
    assert np.array_equal(np.concatenate([share[1] for share in shares], axis=1), filled)
    assert filled.sum(axis=1).tolist() == [plan.rows_in_step(step * stride) for step in range(steps)]


@quick
@given(st.integers(1, 10**15), st.integers(1, 64), st.integers(1, 5000), st.data())
def test_locate_finds_the_step_and_slot_of_a_position(total, lanes, stride, data):
    plan = GlobalBatchPlan(total, lanes * stride, lanes)
    position = data.draw(st.integers(0, total - 1))
    offset, slot = (array.item() for array in plan.locate(np.array([position])))
    positions, filled = plan.positions(offset, 1, slot, slot + 1)
    assert (positions.tolist(), filled.tolist()) == ([position], [True])
    assert offset % stride == 0
    assert offset < plan.steps() * stride


@quick
@given(st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 500), st.integers(0, 10**6), tails)
def test_steps_left_are_steps_left(total, lanes, stride, offset, tail):
    plan = GlobalBatchPlan(total, lanes * stride, lanes, tail)
    left = plan.steps(offset)
    assert left == (0 if left == 0 else 1 + plan.steps(offset + stride))
    end = offset + left * stride
    if tail == "pad":
        assert plan.rows_between(end, total) == 0
    else:
        assert plan.rows_between(offset, end) == left * plan.global_batch_size
