"""The proof: what it sees, what it counts, and which rows it names."""

import json

import numpy as np
import pytest
import torch

from ddp_stream import audit
from ddp_stream.audit import Digest, Proof
from ddp_stream.batch import Batch
from ddp_stream.order import Full, Sequential
from ddp_stream.partition import GlobalBatchPlan
from ddp_stream.topology import Topology


def digest(*rows):
    result = Digest()
    result.fold(np.array(rows, np.int64))
    return result


# --- the digest ---


def test_a_digest_does_not_depend_on_order_or_on_portions():
    whole = digest(*range(100))
    parts = Digest()
    for row in np.random.default_rng(0).permutation(100):
        parts.fold(np.array([row]))
    assert parts == whole


def test_taking_rows_out_leaves_the_rest():
    result = digest(*range(100))
    result.fold(np.arange(50, 100), sign=-1)
    assert result == digest(*range(50))


@pytest.mark.parametrize(
    "rows",
    [
        (0, 1, 2),  # 3 is missing
        (0, 1, 2, 3, 3),  # 3 twice
        (0, 1, 2, 2),  # 2 twice instead of 3: the count is right
        (0, 0, 3, 3),  # and so is the sum of the ids: 0 + 0 + 3 + 3 = 0 + 1 + 2 + 3
        (0, 1, 2, 4),
        (0, 1, 2, -1),
    ],
)
def test_a_digest_sees_missing_repeated_and_swapped_rows(rows):
    assert digest(*rows) != digest(0, 1, 2, 3)


def test_the_two_sums_are_two():
    assert (digest(0, 1, 2, 2).sums != digest(0, 1, 2, 3).sums).all()  # each sees a swap by itself
    first, second = digest(7).sums.tolist()
    assert first != second


def test_a_digest_is_the_one_it_always_was():
    # It is part of every checkpoint: with another hash, the proof of a resumed run would fail.
    assert digest(0, 1, 2).state_dict() == {"count": 3, "sums": [757462374196674878, 997953183043237175]}


def test_no_single_swap_among_64_rows_goes_unseen():
    whole = digest(*range(64)).sums
    swapped = [digest(*(twice if row == missing else row for row in range(64))).sums
               for missing in range(64) for twice in range(64) if twice != missing]  # fmt: skip
    assert all((sums != whole).all() for sums in swapped)


def test_a_digest_survives_json():
    saved = digest(*range(1000))
    assert max(saved.state_dict()["sums"]) > 2**53  # more than a float holds
    loaded = Digest()
    loaded.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    assert loaded == saved
    loaded.fold(np.array([1000]))
    assert loaded == digest(*range(1001))


# --- the verdict ---


def verdict(plan, order, *, skipped=(), twice=(), end=None, topology=None):
    """Record every step up to `end`, but for those in `skipped`, and those in `twice` a second time."""
    proof = Proof(plan, topology or Topology())
    stop = plan.steps() * plan.stride if end is None else end
    for step, offset in enumerate(range(0, stop, plan.stride)):
        positions, filled = plan.positions(offset, 1, 0, plan.global_batch_size)
        rows, weight = torch.from_numpy(order.rows(positions)), torch.from_numpy(filled).float()
        for _ in range(0 if step in skipped else 2 if step in twice else 1):
            proof.record(Batch({}, rows=rows, weight=weight))
    return proof.verdict(order, end)


# In order, with 4 rows a step: [0 1 2 3] [4 5 6 7] [8 9 - -].
PLAN, ORDER = GlobalBatchPlan(10, 4), Sequential(10)


def test_a_whole_epoch_is_exactly_once_and_the_padding_does_not_count():
    result = verdict(PLAN, ORDER)
    assert result.exactly_once
    assert (result.rows, result.expected, result.left_out) == (10, 10, 0)
    assert str(result) == "10 rows, each exactly once"


def test_padding_that_was_trained_on_would_count():
    proof = Proof(PLAN, Topology())
    for offset in (0, 4, 8):
        positions, _ = PLAN.positions(offset, 1, 0, 4)
        proof.record(Batch({}, rows=torch.from_numpy(positions), weight=torch.ones(4)))
    result = proof.verdict(ORDER)
    assert (result.rows, result.duplicate, result.duplicate_rows) == (12, 2, (9,))  # 9 in three slots


def test_a_skipped_step():
    result = verdict(PLAN, ORDER, skipped=[1])
    assert not result.exactly_once
    assert (result.rows, result.missing, result.missing_rows) == (6, 4, (4, 5, 6, 7))
    assert (result.duplicate, result.duplicate_rows) == (0, ())
    assert str(result) == "6 rows seen of 10: 4 missing, 0 duplicate; missing rows 4, 5, 6, 7"


def test_a_step_trained_twice():
    result = verdict(PLAN, ORDER, twice=[2])
    assert not result.exactly_once
    assert (result.rows, result.duplicate, result.duplicate_rows) == (12, 2, (8, 9))
    assert (result.missing, result.missing_rows) == (0, ())
    assert str(result) == "12 rows seen of 10: 0 missing, 2 duplicate; rows seen again 8, 9"


def test_what_an_earlier_attempt_trained_on_is_not_missing():
    proof = Proof(PLAN, Topology())
    proof.resume(digest(0, 1, 2, 3).state_dict(), 4)
    proof.record(Batch({}, rows=torch.tensor([8, 9]), weight=torch.ones(2)))
    result = proof.verdict(ORDER)
    assert (result.missing, result.missing_rows, result.duplicate) == (4, (4, 5, 6, 7), 0)


def test_a_fault_of_an_earlier_attempt_shows_though_nobody_knows_its_rows():
    proof = Proof(PLAN, Topology())
    proof.resume(digest(0, 1, 2).state_dict(), 4)
    proof.record(Batch({}, rows=torch.arange(4, 10), weight=torch.ones(6)))
    result = proof.verdict(ORDER)
    assert not result.exactly_once
    assert str(result) == "9 rows seen of 10: at least 1 missing, at least 0 duplicate"


def test_one_step_skipped_and_another_trained_twice():
    # The count alone is right: 10 - 4 + 4.
    result = verdict(PLAN, ORDER, skipped=[0], twice=[1])
    assert not result.exactly_once
    assert (result.rows, result.expected) == (10, 10)
    assert (result.missing, result.missing_rows) == (4, (0, 1, 2, 3))
    assert (result.duplicate, result.duplicate_rows) == (4, (4, 5, 6, 7))


def test_rows_are_named_by_id_not_by_position():
    order = Full(10, seed=0, epoch=0)
    result = verdict(PLAN, order, skipped=[1])
    assert result.missing_rows == tuple(sorted(order.rows(np.arange(4, 8)).tolist()))


def test_only_the_first_ten_rows_are_named():
    result = verdict(GlobalBatchPlan(100, 20), Sequential(100), skipped=[1])
    assert (result.missing, result.missing_rows) == (20, tuple(range(20, 30)))
    assert str(result).endswith("missing rows 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, ...")


def test_a_dropped_tail_is_left_out_not_missing():
    plan = GlobalBatchPlan(10, 4, tail="drop")
    result = verdict(plan, ORDER)
    assert result.exactly_once
    assert (result.rows, result.expected, result.left_out) == (8, 8, 2)
    assert str(result) == "8 rows, each exactly once, 2 left out by the plan"
    assert verdict(plan, ORDER, skipped=[0]).missing_rows == (0, 1, 2, 3)


@pytest.mark.parametrize("end", [4, 8])  # less and more than half of the rows: two ways to compute what is expected
def test_part_of_an_epoch(end):
    result = verdict(PLAN, ORDER, end=end)
    assert result.exactly_once
    assert (result.rows, result.expected, result.left_out) == (end, end, 10 - end)
    wrong = verdict(PLAN, ORDER, end=end, skipped=[0])
    assert (wrong.missing, wrong.missing_rows, wrong.left_out) == (4, (0, 1, 2, 3), 10 - end)


def test_rows_behind_the_end_are_duplicates():
    proof = Proof(PLAN, Topology())
    proof.record(Batch({}, rows=torch.arange(10), weight=torch.ones(10)))
    result = proof.verdict(ORDER, end=8)
    assert (result.missing, result.duplicate, result.duplicate_rows) == (0, 2, (8, 9))


@pytest.mark.parametrize("tail", ["pad", "drop"])
@pytest.mark.parametrize("lanes", [1, 2, 3, 6])
def test_all_fine_with_lanes_and_a_shuffle(lanes, tail):
    plan, order = GlobalBatchPlan(101, 6, lanes, tail), Full(101, 3, 4)
    whole = verdict(plan, order)
    assert whole.exactly_once
    assert whole.rows + whole.left_out == 101
    for end in range(0, plan.steps() * plan.stride, plan.stride):
        part = verdict(plan, order, end=end)
        assert part.exactly_once
        assert part.rows == plan.rows_between(0, end)


def test_many_rows_are_folded_in_portions(monkeypatch):
    monkeypatch.setattr(audit, "_FOLD_ROWS", 7)
    plan, order = GlobalBatchPlan(1000, 10, lanes=2), Full(1000, 0, 0)
    assert verdict(plan, order).exactly_once
    assert verdict(plan, order, end=100).exactly_once
    assert verdict(plan, order, skipped=[3]).missing == 10


@pytest.mark.parametrize(
    ("faults", "missing", "duplicate"),
    [
        ({"skipped": [1]}, 4, 0),
        ({"twice": [1]}, 0, 4),
        ({"skipped": [0], "twice": [1]}, 1, 1),  # the count is right, so all it can say is: one at least
        ({"skipped": [0], "twice": [2]}, 2, 0),  # 4 gone and 2 twice leave 2 too few
    ],
)
def test_without_a_table_the_proof_counts_the_least_that_explains_it(monkeypatch, faults, missing, duplicate):
    monkeypatch.setattr(audit, "TABLE_ROWS", 0)
    assert verdict(PLAN, ORDER).exactly_once
    result = verdict(PLAN, ORDER, **faults)
    assert not result.exactly_once
    assert not result.counted
    assert (result.missing, result.duplicate) == (missing, duplicate)
    assert (result.missing_rows, result.duplicate_rows) == ((), ())
    assert f"at least {missing} missing, at least {duplicate} duplicate" in str(result)


def test_reset_forgets_the_epoch():
    proof = Proof(PLAN, Topology())
    for epoch in range(3):
        order = Full(10, seed=0, epoch=epoch)
        proof.record(Batch({}, rows=torch.from_numpy(order.rows(np.arange(10))), weight=torch.ones(10)))
        assert proof.verdict(order).exactly_once
        proof.reset()
    assert proof.verdict(ORDER).missing == 10


# --- faults in the plan and in the order themselves ---


class Repeating(Sequential):
    """Row `again` stands at position `at` too, instead of row `at`."""

    def __init__(self, total, at, again):
        super().__init__(total)
        self.at, self.again = at, again

    def rows(self, positions):
        return np.where(positions == self.at, self.again, positions)


class Stuck(GlobalBatchPlan):
    """Slot 0 of the second step takes position 3 again, instead of position 4."""

    def positions(self, *args):
        positions, filled = super().positions(*args)
        return np.where(positions == 4, 3, positions), filled


def test_a_plan_that_repeats_a_position():
    result = verdict(Stuck(10, 4), ORDER)
    assert (result.rows, result.missing, result.duplicate) == (10, 1, 1)
    assert (result.missing_rows, result.duplicate_rows) == ((4,), (3,))


def test_an_order_that_repeats_a_row():
    result = verdict(PLAN, Repeating(10, at=7, again=3))
    assert not result.exactly_once
    assert (result.rows, result.missing, result.duplicate) == (10, 1, 1)
    assert (result.missing_rows, result.duplicate_rows) == ((7,), (3,))


@pytest.mark.parametrize("end", [4, 8])
def test_an_order_that_repeats_a_row_in_a_part_of_an_epoch(end):
    # Row 0 was seen twice, whatever the rest of the epoch would have held.
    result = verdict(PLAN, Repeating(10, at=1, again=0), end=end)
    assert not result.exactly_once
    assert result.duplicate_rows == (0,)


@pytest.mark.parametrize("outside", [10, -1])
def test_an_order_that_names_a_row_that_is_not_there(outside):
    result = verdict(PLAN, Repeating(10, at=7, again=outside))
    assert not result.exactly_once
    assert result.missing_rows == (7,)


def test_a_broken_order_is_seen_without_a_table(monkeypatch):
    monkeypatch.setattr(audit, "TABLE_ROWS", 0)
    assert not verdict(PLAN, Repeating(10, at=7, again=3)).exactly_once


# --- several ranks ---


def test_the_digests_of_the_ranks_add_up(monkeypatch):
    """What each rank expects is a share of the whole; the all-reduce, played by hand here, adds the shares up."""
    order = Full(101, 3, 4)
    plan = GlobalBatchPlan(101, 6, lanes=2)
    for end in (12, 45, 51):  # less than half, more than half, all of the 51 rows of the longer lane
        total = Digest()
        for rank in range(3):
            part = Proof(plan, Topology(rank, 3))._expected(order, end)
            total.count += part.count
            total.sums = total.sums + part.sums
        assert total == Proof(plan, Topology())._expected(order, end)
        assert total.count == plan.rows_between(0, end)
