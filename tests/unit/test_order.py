"""Orders: known values, uniformity, locality of blocks, and a trillion rows without a table."""

import tracemalloc

import numpy as np
import pytest

from ddp_stream import order as order_module
from ddp_stream.order import BlockLayout, Blocks, Full, Permutation, Sequential, make_order, mix, mix_array
from ddp_stream.partition import GlobalBatchPlan

TRILLION = 10**12


def epoch(order):
    """All rows of an epoch, in its order."""
    return order.rows(np.arange(order.total))


# --- known values: whoever changes the order breaks the resume of every run there is, and should know it ---


def test_mix_is_splitmix64():
    # The published outputs of splitmix64: the first two of seed 0, and the first of seed 1.
    first = mix_array(np.array([0, 1], np.uint64))
    assert [hex(word) for word in first.tolist()] == ["0xe220a8397b1dcdaf", "0x910a2dec89025cc1"]
    assert hex(mix(0)) == "0x6e789e6aa1b965f4"


def test_the_full_order_is_the_one_it_always_was():
    assert epoch(Full(12, seed=0, epoch=0)).tolist() == [7, 5, 1, 0, 10, 3, 11, 6, 9, 8, 4, 2]
    assert epoch(Full(12, seed=0, epoch=1)).tolist() == [11, 3, 4, 2, 6, 5, 1, 10, 9, 0, 8, 7]
    assert epoch(Full(12, seed=1, epoch=0)).tolist() == [5, 4, 9, 2, 0, 8, 10, 3, 11, 6, 1, 7]
    far = Full(TRILLION, seed=7, epoch=3).rows(np.array([0, 1, TRILLION - 1]))
    assert far.tolist() == [591044290733, 935737447326, 221366356255]


def test_the_blocks_order_is_the_one_it_always_was():
    natural = BlockLayout(12, offsets=np.array([0, 3, 5, 5, 9, 12]))
    assert epoch(Blocks(natural, 0, 0, window_rows=6)).tolist() == [3, 4, 5, 2, 0, 1, 9, 11, 7, 10, 8, 6]
    uniform = BlockLayout(12, block_rows=5)
    lanes = Blocks(uniform, 0, 0, window_rows=8, lanes=2)
    assert epoch(lanes).tolist() == [5, 6, 0, 9, 7, 8, 4, 11, 2, 10, 3, 1]
    assert epoch(Blocks(uniform, 0, 0)).tolist() == [5, 6, 1, 2, 4, 11, 0, 10, 8, 7, 9, 3]
    far = Blocks(BlockLayout(TRILLION), seed=7, epoch=3).rows(np.array([0, 1, TRILLION - 1]))
    assert far.tolist() == [546437290811, 821246433054, 538916433913]


@pytest.mark.parametrize("shuffle", ["full", "blocks"])
def test_every_seed_and_epoch_has_an_order_of_its_own(shuffle):
    layout = BlockLayout(1000, block_rows=10)
    orders = [epoch(make_order(shuffle, layout, seed=s, epoch=e)) for s in range(4) for e in range(4)]
    # (seed 0, epoch 1) is not (seed 1, epoch 0) either. Two random orders of 1000 agree in about one place.
    agreeing = [int((a == b).sum()) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreeing) < 20


def test_blocks_without_rows_play_no_part():
    with_empty = BlockLayout(12, offsets=np.array([0, 0, 3, 5, 5, 5, 9, 12, 12]))
    without = BlockLayout(12, offsets=np.array([0, 3, 5, 9, 12]))
    assert np.array_equal(epoch(Blocks(with_empty, 2, 0)), epoch(Blocks(without, 2, 0)))


def test_make_order():
    layout = BlockLayout(10)
    assert epoch(make_order("none", layout, seed=0, epoch=0)).tolist() == list(range(10))
    assert isinstance(make_order("full", layout, seed=0, epoch=0), Full)
    assert isinstance(make_order("blocks", layout, seed=0, epoch=0), Blocks)
    with pytest.raises(ValueError, match="shuffle='random' is unknown: use 'none', 'full' or 'blocks'"):
        make_order("random", layout, seed=0, epoch=0)


@pytest.mark.parametrize("offsets", [[0, 5, 9], [1, 5, 10], [0, 7, 5, 10], []])
def test_block_offsets_that_do_not_cover_the_rows_are_an_error(offsets):
    with pytest.raises(ValueError, match="must rise from 0 to the 10 rows of the source"):
        BlockLayout(10, offsets=np.array(offsets, np.int64))


@pytest.mark.parametrize(
    "order",
    [
        Sequential(0),
        Full(0, 0, 0),
        Blocks(BlockLayout(0, offsets=np.array([0])), 0, 0),
        Blocks(BlockLayout(0), 0, 0),
    ],
    ids=["none", "full", "natural blocks", "uniform blocks"],
)
def test_an_order_of_no_rows_is_empty(order):
    nothing = np.empty(0, np.int64)
    assert order.rows(nothing).tolist() == []
    assert order.positions(nothing).tolist() == []


@pytest.mark.parametrize("window_rows", [-1, -4096])
def test_a_window_of_less_than_one_row_is_refused_with_its_value(window_rows):
    with pytest.raises(ValueError, match=str(window_rows)):
        make_order("blocks", BlockLayout(100), seed=0, epoch=0, window_rows=window_rows)


@pytest.mark.parametrize("total", [1, 2, 127, 128, 129, 1 << 14, (1 << 14) + 1, 40_000])
def test_bijections_at_the_edges_of_powers_of_two_and_of_chunks(total):
    everywhere = np.arange(total)
    for order in (Full(total, 3, 1), Blocks(BlockLayout(total, block_rows=128), 3, 1)):
        rows = order.rows(everywhere)
        assert np.array_equal(np.sort(rows), everywhere)
        assert np.array_equal(order.positions(rows), everywhere)


# --- uniformity ---


def epochs(size, seeds):
    """The `full` orders of `size` rows for seeds 0..seeds-1, epoch 0, `[seeds, size]`, evaluated at once."""
    keys = np.array([mix(seed, 0, 1) for seed in range(seeds)], np.uint64)
    orders = Permutation(size).forward(np.tile(np.arange(size), seeds), np.repeat(keys, size))
    return orders.reshape(seeds, size)


def surprise(chi_square, freedom):
    """How many standard deviations `chi_square` is too large, by the cube-root approximation of Wilson and Hilferty.

    5.0 is exceeded by chance with a probability of 2.9e-7.
    """
    spread = 2 / (9 * freedom)
    return float(((chi_square / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def surprise_of_places(orders):
    """Chi-square of the table row x position, `[size, size]`, where each cell expects seeds / size.

    All sums over a line of the table are fixed, so it has (size - 1)^2 degrees of freedom, and the usual sum has
    to be multiplied by (size - 1) / size.
    """
    seeds, size = orders.shape
    table = np.zeros((size, size))
    np.add.at(table, (np.broadcast_to(np.arange(size), orders.shape), orders), 1)
    expected = seeds / size
    chi_square = ((table - expected) ** 2 / expected).sum() * (size - 1) / size
    return surprise(chi_square, (size - 1) ** 2)


def surprise_of_neighbours(orders):
    """Chi-square of which row follows which, from one pair of neighbours a seed, so that draws are independent."""
    seeds, size = orders.shape
    draw = np.arange(seeds)
    at = draw % (size - 1)
    table = np.zeros((size, size))
    np.add.at(table, (orders[draw, at], orders[draw, at + 1]), 1)
    expected = seeds / (size * (size - 1))
    off_diagonal = ~np.eye(size, dtype=bool)
    chi_square = ((table - expected) ** 2 / expected)[off_diagonal].sum()
    return surprise(chi_square, size * (size - 1) - 1)


# Seen with seeds 0..n-1: -2.1 to 1.6 standard deviations; with one round 100 and more (below), with two 14 among the
# neighbours of 50 rows, with three nothing is seen any more.
SIZES = [(5, 8_000), (7, 8_000), (20, 8_000), (50, 20_000), (300, 3_000)]


def test_the_vectorised_orders_are_those_of_full():
    assert np.array_equal(epochs(20, 3), [epoch(Full(20, seed, 0)) for seed in range(3)])


@pytest.mark.parametrize(("size", "seeds"), SIZES)
def test_every_row_is_equally_likely_everywhere(size, seeds):
    assert surprise_of_places(epochs(size, seeds)) < 5


@pytest.mark.parametrize(("size", "seeds"), SIZES[:-1])
def test_every_row_is_equally_likely_to_follow_any_other(size, seeds):
    assert surprise_of_neighbours(epochs(size, seeds)) < 5


def test_all_120_orders_of_five_rows_are_equally_likely():
    seeds = 24_000
    _, counts = np.unique(epochs(5, seeds), axis=0, return_counts=True)
    assert len(counts) == 120  # 5!, each expected 24,000 / 120 = 200 times
    assert surprise(((counts - 200) ** 2 / 200).sum(), 119) < 5


@pytest.mark.parametrize(("size", "seeds"), SIZES[:-1])
def test_one_round_would_be_noticed(size, seeds, monkeypatch):
    monkeypatch.setattr(order_module, "_ROUNDS", 1)
    assert surprise_of_places(epochs(size, seeds)) > 20
    assert surprise_of_neighbours(epochs(size, seeds)) > 20


def windows_of_one_epoch():
    """3,000 windows of 20 rows, one block each: the order within every window, `[3000, 20]`."""
    order = Blocks(BlockLayout(60_000, block_rows=20), 0, 0, window_rows=20)
    return epoch(order).reshape(3_000, 20) % 20


def test_windows_of_one_epoch_are_shuffled_evenly():
    windows = windows_of_one_epoch()
    assert surprise_of_places(windows) < 5
    assert surprise_of_neighbours(windows) < 5


def test_windows_that_were_all_shuffled_alike_would_be_noticed(monkeypatch):
    monkeypatch.setattr(order_module, "mix_array", np.zeros_like)  # the same key for every window
    assert surprise_of_places(windows_of_one_epoch()) > 20


# --- locality of blocks ---


def test_a_window_reads_whole_blocks_and_no_block_is_read_twice():
    # 100 blocks of 10 rows, windows of 40 positions: 25 windows of exactly 4 blocks, and 25 * 4 = 100.
    order = Blocks(BlockLayout(1000, block_rows=10), 5, 0, window_rows=40)
    windows = [set(window) for window in (epoch(order) // 10).reshape(25, 40).tolist()]
    assert [len(window) for window in windows] == [4] * 25
    assert set().union(*windows) == set(range(100))
    assert sorted(windows[0]) != [0, 1, 2, 3]  # and the blocks themselves are shuffled


def test_lanes_share_no_block():
    # 4 lanes of 250 positions are 25 blocks of 10 rows each. A window of 40 does not divide 250, so windows that
    # crossed from one lane into the next would mix their blocks.
    order = Blocks(BlockLayout(1000, block_rows=10), 5, 0, window_rows=40, lanes=4)
    lanes = [set(lane) for lane in (epoch(order) // 10).reshape(4, 250).tolist()]
    assert [len(lane) for lane in lanes] == [25] * 4
    assert set().union(*lanes) == set(range(100))


def test_rows_of_a_window_are_not_left_in_file_order():
    rows = epoch(Blocks(BlockLayout(4096, block_rows=64), 0, 0))
    assert (np.diff(rows) == 1).mean() < 0.05  # rows that still follow their neighbour


def test_the_usual_window_is_about_four_blocks():
    # 4 * 10 = 40 rows, and the next power of two is 64: positions 0..63 touch 7 blocks of 10 rows.
    order = Blocks(BlockLayout(1000, block_rows=10), 5, 0)
    assert len(set((epoch(order)[:64] // 10).tolist())) == 7


# --- size ---


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sequential(TRILLION),
        lambda: Full(TRILLION, 1, 2),
        lambda: Blocks(BlockLayout(TRILLION), 1, 2, lanes=64),
        lambda: Blocks(BlockLayout(TRILLION, block_rows=1_000_003), 1, 2, window_rows=5_000_000, lanes=7),
    ],
    ids=["none", "full", "blocks", "odd blocks"],
)
def test_a_trillion_rows_need_no_table(make):
    tracemalloc.start()
    try:
        order = make()
        plan = GlobalBatchPlan(TRILLION, global_batch_size=448, lanes=7)
        steps = np.random.default_rng(0).integers(0, plan.steps(), 20)
        for step in [0, *steps.tolist(), plan.steps() - 1]:
            positions, filled = plan.positions(step * plan.stride, 1, 0, 448)
            rows = order.rows(positions)
            assert rows.min() >= 0
            assert rows.max() < TRILLION
            assert len(np.unique(rows[filled])) == plan.rows_in_step(step * plan.stride)
            assert np.array_equal(order.positions(rows), positions)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10e6  # one bit a row would be 125 GB
