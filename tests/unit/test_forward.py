"""Rows that can only be read forward: each exactly once, and a plain word about what cannot be had."""

import pickle
from itertools import count, islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ddp_stream import StreamLoader, StridedDataset, Topology
from ddp_stream.audit import Proof
from ddp_stream.sources import DataError, ForwardOnly, exclude
from ddp_stream.sources.transformed import Transformed
from ddp_stream.training.data import cost_of_order

passed = []


def hundred():
    for row in range(100):
        passed.append(row)
        yield {"id": row, "text": f"row {row}"}


def endless():
    return count()


def ids(loader):
    return [batch["id"].tolist() for batch in loader]


def test_rows_as_the_iterable_yields_them():
    source = ForwardOnly(hundred, 60)
    assert len(source) == 60
    assert source.columns == ("id", "text")
    passed.clear()
    for rows in ([0, 1, 5], [6, 6, 6], [59]):
        taken = source.take(np.array(rows))
        assert taken["id"].tolist() == rows
        assert taken["text"] == [f"row {row}" for row in rows]
    assert passed == list(range(1, 60))  # row 0 was known, and no row is read twice
    assert source.take(np.array([0]))["id"].tolist() == [0]  # nor for a look at what a row is
    assert source.take(np.array([59]))["id"].tolist() == [59]
    assert passed == list(range(1, 60))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.take(np.array([3]))["id"].tolist() == [3]
    assert copy.fingerprint() == source.fingerprint() != ForwardOnly(hundred, 61).fingerprint()


def test_values_and_tuples():
    assert ForwardOnly(endless, 10).take(np.array([2, 4]))["0"].tolist() == [2, 4]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_epochs_ranks_and_resume(num_workers):
    expected = [list(range(start, min(start + 16, 60))) for start in range(0, 60, 16)]

    def loaders(world_size):
        topologies = [Topology(rank, world_size) for rank in range(world_size)]
        source = ForwardOnly(hundred, 60)
        return [StreamLoader(source, 16, topology=topology, num_workers=num_workers) for topology in topologies]

    (whole,) = loaders(1)
    assert whole.shuffle == "none"
    for _ in range(2):
        proof = Proof(whole.plan, Topology())
        steps = []
        for batch in whole:
            proof.record(batch)
            steps.append(batch["id"][batch.weight > 0].tolist())
        assert steps == expected
        assert str(proof.verdict(whole.order(0))) == "60 rows, each exactly once"
    shares = [ids(loader) for loader in loaders(2)]
    assert [[*a, *b] for a, b in zip(*shares, strict=True)][:3] == expected[:3]
    first, *_ = loaders(2)
    assert len(list(islice(first, 2))) == 2
    for loader in loaders(4):
        loader.load_state_dict(first.state_dict())
        rank = loader.topology.rank
        assert ids(loader)[0] == expected[2][rank * 4 : rank * 4 + 4]


def test_wrapped_it_is_forward_only_still():
    inner = ForwardOnly(hundred, 60)
    for source in (exclude(inner, [3]), Transformed(inner, lambda columns: columns), inner.select(["id"])):
        loader = StreamLoader(source, 10)
        assert loader.shuffle == "none"
        assert "forward only: each of 1 reader(s) reads all rows" in cost_of_order(loader)
        rows = [row for row in range(60) if row != 3 or len(source) == 60]
        assert [row for step in ids(loader) for row in step][: len(rows)] == rows
    passed.clear()
    assert len(ids(StreamLoader(ForwardOnly(hundred, 60), 10, topology=Topology(1, 2)))) == 6
    assert passed[-60:] == list(range(60))  # what the note says: also the rows of rank 0 are read


def test_what_cannot_be_had():
    source = ForwardOnly(hundred, 101)
    for shuffle in (True, "full", "blocks"):
        with pytest.raises(ValueError, match="is read forward only, and has no order but its own"):
            StreamLoader(source, 10, shuffle=shuffle)
    with pytest.raises(DataError, match=r"test_forward.hundred \(101 rows\) is read forward only.*--data.lanes 1"):
        list(StreamLoader(source, 10, lanes=2))
    with pytest.raises(DataError, match=r"ended after 100 rows, so that row 100 is missing"):
        source.take(np.array([100]))
    with pytest.raises(ValueError, match="rows=0"):
        ForwardOnly(hundred, 0)
    with pytest.raises(ValueError, match="skip=-1"):
        StridedDataset(hundred, -1)


# --- the strided rule ---


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 2)])
@pytest.mark.parametrize("skip", [0, 7])
def test_strided(world_size, num_workers, skip, monkeypatch):
    seen = []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        loader = DataLoader(StridedDataset(hundred, skip), batch_size=None, num_workers=num_workers)
        rows = [sample["id"] for sample in loader]
        readers = range(rank * max(1, num_workers), (rank + 1) * max(1, num_workers))
        assert sorted(rows) == [
            row for row in range(skip, 100) if (row - skip) % (world_size * len(readers)) in readers
        ]
        seen += rows
    assert sorted(seen) == list(range(skip, 100))


def test_strided_without_an_end():
    loader = DataLoader(StridedDataset(endless), batch_size=4, num_workers=2)
    assert torch.cat(list(islice(loader, 2))).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
