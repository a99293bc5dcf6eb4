"""Batches, and their way to the device. There is no GPU here: "meta" stands in for one."""

import contextlib
import gc
import types
import weakref
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from ddp_stream.batch import Batch, as_tensor, move
from ddp_stream.transfer import transfer

Pair = namedtuple("Pair", "left right")


class Calls(TorchFunctionMode):
    """Notes the keyword arguments of every call of the tensor method `name`; `pin_memory` needs a GPU, and is skipped."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == self.name:
            self.seen.append(kwargs)
            if self.name == "pin_memory":
                return args[0]
        return func(*args, **kwargs)


def make_batch(rows=5):
    """Row ids 100, 101, ...; the last row is an empty slot."""
    weight = torch.ones(rows)
    weight[-1] = 0
    columns = {"x": torch.arange(rows * 2.0).reshape(rows, 2), "name": [f"row {i}" for i in range(rows)]}
    return Batch(columns, weight=weight, rows=torch.arange(100, 100 + rows), epoch=2, step=3, offset=12)


# --- Batch ---


def test_a_batch_is_a_mapping_of_its_columns():
    batch = make_batch()
    assert (list(batch), len(batch), "x" in batch, "y" in batch) == (["x", "name"], 2, True, False)
    assert dict(batch)["name"][0] == "row 0"
    with pytest.raises(KeyError, match="y"):
        batch["y"]


def test_a_batch_made_by_hand_counts_its_own_rows():
    batch = make_batch()
    assert batch.global_rows == 4  # of 5 slots
    assert batch.trained_rows.tolist() == [100, 101, 102, 103]


def test_a_batch_of_a_longer_message_cuts_views():
    message = {
        "x": torch.arange(12).reshape(6, 2),
        "name": list("abcdef"),
        "pair": Pair(torch.arange(6), {"deep": torch.arange(6) * 10}),
    }
    batch = Batch(message, weight=torch.ones(2), rows=torch.arange(2), span=slice(2, 4))
    assert batch["x"].tolist() == [[4, 5], [6, 7]]
    assert batch["x"].data_ptr() == message["x"][2:].data_ptr()  # no copy
    assert batch["name"] == ["c", "d"]
    assert batch["pair"][0].tolist() == [2, 3]
    assert batch["pair"][1]["deep"].tolist() == [20, 30]


def test_a_named_tuple_column_keeps_its_names():
    pair = Pair(torch.arange(6), torch.arange(6))
    batch = Batch({"pair": pair}, weight=torch.ones(6), rows=torch.arange(6))
    assert [part["pair"].left.tolist() for part in batch.split(3)] == [[0, 1, 2], [3, 4, 5]]
    assert as_tensor(Pair(np.arange(2), np.arange(2))).right.tolist() == [0, 1]


def test_to_moves_columns_and_weight_and_leaves_the_row_ids():
    batch = make_batch()
    moved = batch.to("meta")
    assert (moved["x"].device.type, moved.weight.device.type, moved.rows.device.type) == ("meta", "meta", "cpu")
    assert moved["name"] == batch["name"]
    assert (moved.epoch, moved.step, moved.offset, moved.global_rows) == (2, 3, 12, 4)
    assert moved.trained_rows.tolist() == [100, 101, 102, 103]
    assert batch["x"].device.type == "cpu"


@pytest.mark.parametrize("non_blocking", [True, False])
def test_to_passes_non_blocking_on(non_blocking):
    with Calls("to") as calls:
        make_batch().to("meta", non_blocking=non_blocking)
    assert calls.seen == [{"non_blocking": non_blocking}] * 2  # x and weight


def test_pin_memory_pins_columns_and_weight():
    batch = make_batch()
    with Calls("pin_memory") as calls:
        pinned = batch.pin_memory()
    assert len(calls.seen) == 2  # x and weight; the row ids are not copied to the device
    assert (pinned["name"], pinned.epoch, pinned.global_rows) == (batch["name"], 2, 4)


def test_of_a_column_among_others_nothing_but_its_values_is_pinned():
    table = torch.arange(12.0).reshape(3, 4)
    batch = Batch({"x": table[:, 1]}, weight=torch.ones(3), rows=torch.arange(3))
    with Calls("pin_memory"):
        pinned = batch.pin_memory()["x"]
    assert pinned.tolist() == [1, 5, 9]
    assert pinned.untyped_storage().nbytes() == 12


def test_split_into_micro_batches():
    batch = make_batch(5)
    parts = batch.split(2)
    assert [part.rows.tolist() for part in parts] == [[100, 101], [102, 103], [104]]
    assert [part.trained_rows.tolist() for part in parts] == [[100, 101], [102, 103], []]
    assert [part.weight.tolist() for part in parts] == [[1, 1], [1, 1], [0]]
    assert [part["name"] for part in parts] == [["row 0", "row 1"], ["row 2", "row 3"], ["row 4"]]
    assert torch.cat([part["x"] for part in parts]).equal(batch["x"])
    # The loss is divided by the rows of the whole step, not of the micro-batch.
    assert [part.global_rows for part in parts] == [4, 4, 4]
    assert {(part.epoch, part.step, part.offset) for part in parts} == {(2, 3, 12)}


@pytest.mark.parametrize("size", [None, 5, 6])
def test_nothing_to_split(size):
    batch = make_batch(5)
    assert batch.split(size) == [batch]


# --- as_tensor ---


def test_arrays_become_tensors_that_share_their_memory():
    array = np.arange(3.0)
    tensor = as_tensor(array)
    array[0] = 7
    assert tensor.tolist() == [7, 1, 2]


def test_what_no_tensor_can_share_is_copied_or_kept():
    read_only = np.arange(3)
    read_only.flags.writeable = False
    assert as_tensor(read_only).tolist() == [0, 1, 2]
    assert as_tensor(np.array([1, 2], ">i4")).tolist() == [1, 2]
    assert as_tensor(np.array(["1970-01-01T00:00:07"], "M8[s]")).tolist() == [7]
    assert as_tensor(np.array(["a", "b"])) == ["a", "b"]
    assert as_tensor(["a", "b"]) == ["a", "b"]
    assert as_tensor({"deep": (np.arange(2),)})["deep"][0].tolist() == [0, 1]


# --- move and transfer ---


def test_move_goes_into_every_structure_and_leaves_the_rest():
    value = {
        "list": [torch.zeros(1), [torch.zeros(1)]],
        "tuple": (torch.zeros(1), "text"),
        "named": Pair(torch.zeros(1), {"deep": torch.zeros(1)}),
        "strings": ["a", "b"],
        "bytes": [b"a"],
        "none": None,
        "number": 3,
        "empty": [],
    }
    with Calls("to") as calls:
        moved = move(value, "meta")
    assert calls.seen == [{"non_blocking": True}] * 5
    tensors = [moved["list"][0], moved["list"][1][0], moved["tuple"][0], moved["named"].left]
    tensors.append(moved["named"].right["deep"])
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert isinstance(moved["named"], Pair)
    assert moved["tuple"][1] == "text"
    assert moved["strings"] is value["strings"]  # not even copied
    assert (moved["bytes"], moved["none"], moved["number"], moved["empty"]) == ([b"a"], None, 3, [])


def test_move_uses_an_objects_own_to():
    class Graph:
        def to(self, device, non_blocking=False):
            return ("moved", str(device), non_blocking)

    assert move([Graph()], "meta") == [("moved", "meta", True)]


def test_transfer_without_streams_moves_one_batch_at_a_time():
    read = []

    def source():
        for index in range(3):
            read.append(index)
            yield {"x": torch.full((1,), index)}

    with Calls("to") as calls:
        moved = transfer(source(), "cpu")
        assert read == []
        assert [next(moved)["x"].item(), read] == [0, [0]]  # nothing is read ahead
        assert [batch["x"].item() for batch in moved] == [1, 2]
    assert calls.seen == [{"non_blocking": True}] * 3


def test_transfer_keeps_batches_batches():
    (batch,) = transfer([make_batch()], torch.device("meta"))
    assert isinstance(batch, Batch)
    assert batch["x"].device.type == "meta"
    assert batch.rows.tolist() == [100, 101, 102, 103, 104]


@pytest.fixture
def stream_log(monkeypatch):
    """Gives the "meta" device streams that write down what is asked of them."""
    log = []

    class Event:
        def __init__(self, index):
            self.index = index

        def synchronize(self):
            log.append(f"host waits for copy {self.index}")

    class Stream:
        def __init__(self, device=None):
            self.events = 0

        def record_event(self):
            self.events += 1
            log.append(f"copy {self.events - 1} queued")
            return Event(self.events - 1)

        def wait_event(self, event):
            log.append(f"device waits for copy {event.index}")

    @contextlib.contextmanager
    def stream(stream):
        log.append("side stream")
        yield
        log.append("working stream")

    module = types.SimpleNamespace(stream=stream, Stream=Stream, current_stream=lambda device: Stream())
    monkeypatch.setattr(torch, "meta", module, raising=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append("tensor in use"))
    return log


def test_transfer_copies_one_batch_ahead_on_a_side_stream(stream_log):
    with Calls("to") as calls:
        for index, batch in enumerate(transfer([make_batch() for _ in range(3)], "meta")):
            assert batch["x"].device.type == "meta"
            stream_log.append(f"step {index}")

    def copy(index):
        return ["side stream", "working stream", f"copy {index} queued"]

    def step(index):  # the working stream uses two tensors of each batch, x and weight
        wait = [f"device waits for copy {index}", "tensor in use", "tensor in use"]
        return [*wait, f"host waits for copy {index}", f"step {index}"]

    assert stream_log == [*copy(0), *copy(1), *step(0), *copy(2), *step(1), *step(2)]
    assert calls.seen == [{"non_blocking": True}] * 6


def test_transfer_holds_the_hosts_batch_until_it_is_copied(stream_log):
    def source():
        for index in range(3):
            batch = make_batch()
            weakref.finalize(batch, stream_log.append, f"batch {index} freed")
            yield batch
            del batch

    for _ in transfer(source(), "meta"):
        pass
    gc.collect()
    for index in range(3):
        freed, copied = f"batch {index} freed", f"host waits for copy {index}"
        assert stream_log.index(freed) > stream_log.index(copied)


def test_transfer_protects_the_tensors_of_objects_that_move_themselves(stream_log):
    class Encoding(UserDict):  # as transformers' BatchEncoding: a mapping, no dict, with a `to` of its own
        def to(self, device, non_blocking=False):
            return Encoding({name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.items()})

    (moved,) = transfer([Encoding(ids=torch.zeros(2), mask=torch.zeros(2))], "meta")
    assert isinstance(moved, Encoding)
    assert stream_log.count("tensor in use") == 2


def test_transfer_of_nothing_is_nothing(stream_log):
    assert list(transfer([], "meta")) == []
    assert list(transfer([], "cpu")) == []
