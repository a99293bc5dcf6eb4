"""Columns of strings: what Texts shows is what a list would, and it travels between processes without objects."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ddp_stream import StreamingDataset, StreamLoader
from ddp_stream.message import Packer, Span, Unpacker
from ddp_stream.sources import InMemory, open_source
from ddp_stream.texts import TEXT_TYPES, Texts, as_texts, end_to_end

WORDS = ["", "a", "naïve", "日本語", "x" * 5000, "tab\t", "nul\0"]


@pytest.mark.parametrize("kind", list(TEXT_TYPES), ids=str)
def test_shows_what_a_list_would(kind):
    values = [word.encode() for word in WORDS] if "binary" in str(kind) else WORDS
    texts = Texts(pa.array(values, kind))
    assert (len(texts), texts[3], texts[-1], list(texts)) == (7, values[3], values[-1], values)
    assert texts[2:5] == values[2:5]
    assert texts[2:5][1:] == values[3:5]
    assert texts.take(np.array([6, 0, 6])) == [values[6], values[0], values[6]]
    assert end_to_end([texts[5:], texts[:0], texts[:2]]) == values[5:] + values[:2]
    assert texts != values[::-1]
    assert np.asarray(texts[:3]).tolist() == values[:3]
    with pytest.raises(IndexError):
        texts[7]


@pytest.mark.parametrize("kind", list(TEXT_TYPES), ids=str)
def test_pieces_of_a_slice_are_those_of_the_slice(kind):
    values = [word.encode() for word in WORDS] if "binary" in str(kind) else WORDS
    for part in (slice(0, 7), slice(2, 5), slice(3, 3), slice(0, 1)):
        pieces = Texts(pa.array(values, kind))[part].pieces()
        assert pieces is not None
        assert Texts.joined(*pieces) == values[part]
        assert pieces[2].nbytes == sum(len(v if isinstance(v, bytes) else v.encode()) for v in values[part])
    assert Texts(pa.array([values[1], None], kind)).pieces() is None


def test_what_is_no_column_of_strings_stays_a_list():
    for column in (
        [],
        [1, 2],
        ["a", b"a"],
        ["a", None],
        [None, "a"],
        ["a", 1],
        ["\ud800"],
        [["a"]],
        [np.str_("a"), "b"],
    ):
        assert as_texts(column) is None, column
    assert as_texts(WORDS) == WORDS


def test_strings_cross_in_the_block():
    packer, unpacker = Packer(0, 0), Unpacker()
    columns = {"list": list(WORDS), "texts": Texts(pa.array(WORDS)), "bytes": [b"\xff", *[b""] * 6], "none": [None] * 7}
    message = packer.pack(Span(0, 0, 1, columns, torch.arange(7)))
    sent = {name: str(value) for name, value in message.others.items()}
    assert sent == {"list": "string", "texts": "string", "bytes": "binary", "none": str([None] * 7)}
    span = unpacker.unpack(message)
    assert {name: list(column) for name, column in span.columns.items()} == {
        name: list(column) for name, column in columns.items()
    }
    # Texts are views of the block, which is not filled again as long as they are there.
    other = Packer.pack(packer, Span(0, 1, 1, {"list": ["y" * 100] * 7}, torch.arange(7)))
    assert other.block_id != message.block_id
    assert span.columns["list"] == WORDS


def double(columns):
    assert type(columns["text"]) is list
    return {"text": [text * 2 for text in columns["text"]]}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("transform", [None, double])
def test_batches_hold_lists(workers, transform, tmp_path):
    values = [f"{row} {WORDS[row % 7]}" for row in range(300)]
    pq.write_table(pa.table({"text": values, "row": range(300)}), tmp_path / "text.parquet", row_group_size=64)
    loader = StreamLoader(
        open_source(str(tmp_path / "text.parquet")), 32, shuffle="blocks", num_workers=workers, transform=transform
    )
    for batch in loader:
        assert type(batch["text"]) is list
        expected = [values[row] * (2 if transform else 1) for row in batch.rows.tolist()]
        assert batch["text"] == expected


def test_samples_hold_strings():
    source = InMemory({"text": Texts(pa.array(WORDS))})
    assert [sample["text"] for sample in StreamingDataset(source)] == WORDS


def test_text_that_is_not_utf8_names_its_row(tmp_path):
    values = pa.array([b"fine"] * 70 + [b"\xff\xfe"] + [b"fine"] * 29, pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 100, values.buffers())})
    pq.write_table(table, tmp_path / "text.parquet", row_group_size=50)
    with pytest.raises(ValueError, match=r"column 'text' is no UTF-8 text in row 70"):
        open_source(str(tmp_path / "text.parquet")).take(np.array([99]))
