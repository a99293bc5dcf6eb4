"""What is said about the data before training begins."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddp_stream import StreamLoader, Topology
from ddp_stream.sources import InMemory, decoded, open_source
from ddp_stream.training.data import cost_of_full


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_the_order_full_says_what_it_costs(suffix, tmp_path, monkeypatch):
    table = pa.table({"x": np.arange(100_000)})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path, row_group_size=1000)
    else:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=1000)
    source = open_source(path)

    def cost(shuffle):
        return cost_of_full(StreamLoader(source, 64, shuffle=shuffle, topology=Topology(), num_workers=0))

    assert cost("full") is None  # all decoded rows fit the cache
    monkeypatch.setattr(decoded, "CACHE_BYTES", 1_000_000)  # 100,000 rows of 8 bytes and their ids are 1.6 MB
    assert cost("blocks") is None
    if suffix == "arrow":  # where every row can be read by itself
        assert cost("full") is None
        return
    # A message has 256 steps of 64 rows, and so many rows touch all 100 blocks: 100,000 / 16,384 = 6.1.
    text = cost("full")
    assert "a message of 16,384 rows touches 100 of its 100 blocks" in text
    assert "6.1 rows for every row used, 2 MB at a time" in text
    assert "--data.shuffle blocks" in text


def test_where_any_row_is_as_near_as_any_other_there_is_nothing_to_say():
    assert cost_of_full(StreamLoader(InMemory({"x": np.arange(1000)}), 64, shuffle="full")) is None
