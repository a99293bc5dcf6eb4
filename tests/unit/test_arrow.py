"""Arrow files and Hugging Face datasets: the rows that were written, from batches of every size and format."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest

from ddp_stream.sources import Arrow, DataError, HFDataset, open_source
from ddp_stream.sources import arrow as arrow_module


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def plain(taken):
    return {name: column if isinstance(column, list) else column.tolist() for name, column in taken.items()}


def read(source, rows=None):
    return plain(source.take(np.arange(len(source)) if rows is None else np.array(rows, np.int64)))


def rows(first, last):
    return {
        "id": list(range(first, last)),
        "half": [i / 2 for i in range(first, last)],
        "name": [f"row {i}" for i in range(first, last)],
        "pair": [[i, -i] for i in range(first, last)],
    }


def write(name, sizes, codec=None, stream=False, first=0):
    """A file with a record batch of each of `sizes`."""
    table = pa.table(rows(first, first + sum(sizes)))
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(name, table.schema, options=options) as file:
        start = 0
        for size in sizes:
            columns = [column.combine_chunks() for column in table[start : start + size].columns]
            file.write_batch(pa.record_batch(columns, schema=table.schema))
            start += size
    return name


@pytest.mark.parametrize("codec", [None, "lz4", "zstd"])
@pytest.mark.parametrize("stream", [False, True], ids=["file", "stream"])
def test_every_row_of_every_batch(codec, stream, monkeypatch):
    monkeypatch.setattr(arrow_module, "_BLOCK_ROWS", 4)
    source = Arrow([write("a.arrow", [3, 0, 9], codec, stream), write("b.arrow", [1], codec, stream, first=12)])
    # A batch that is not compressed is cut in blocks of 4; the reader decompresses a stream as it passes by.
    assert source.blocks().tolist() == ([0, 3, 12, 13] if codec and not stream else [0, 3, 7, 11, 12, 13])
    expected = rows(0, 13)
    assert read(source) == expected
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 50):
        chosen = rng.integers(0, 13, count).tolist()
        want = {name: [values[row] for row in chosen] for name, values in expected.items()}
        assert read(source, chosen) == want
        assert read(source.select(["pair", "id"]), chosen) == {"pair": want["pair"], "id": want["id"]}
    assert read(pickle.loads(pickle.dumps(source)), [12, 0])["id"] == [12, 0]


def test_fixed_width_columns_are_views_of_the_file():
    source = Arrow(write("a.arrow", [1000])).select(["half"])
    first, second = (source.take(np.arange(500, 700))["half"] for _ in range(2))
    assert np.shares_memory(first, second)
    assert not first.flags.writeable


def test_only_the_columns_asked_for_are_decompressed(monkeypatch):
    source = Arrow(write("a.feather", [1000], "zstd")).select(["half"])
    source.take(np.array([5]))
    ((batch, _),) = source._batches.values()
    assert batch.nbytes < 1000 * 8 + 100


def test_decompressed_batches_are_kept_within_bounds(monkeypatch):
    monkeypatch.setattr(arrow_module, "CACHE_BYTES", 100_000)
    source = Arrow(write("a.feather", [1000] * 20, "zstd")).select(["half"])
    for row in range(0, 20_000, 500):
        assert source.take(np.array([row]))["half"][0] == row / 2
        assert sum(size for _, size in source._batches.values()) <= 100_000
    assert read(source, [19_999, 0, 7000])["half"] == [19_999 / 2, 0, 3500]


def test_feather_by_its_own_writer():
    pyarrow.feather.write_feather(pa.table(rows(0, 10)), "a.feather", chunksize=4)
    assert read(open_source("a.feather")) == rows(0, 10)


def test_types():
    table = pa.table(
        {
            "image": pa.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]]),
            "ragged": pa.array([[[1], [2, 3]], [[4]]]),
            "city": pa.array(["x", "y"]).dictionary_encode(),
            "tensor": pa.ExtensionArray.from_storage(
                pa.fixed_shape_tensor(pa.int32(), [2]), pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2))
            ),
            "hf": pa.array([{"bytes": b"a", "path": "a.png"}, {"bytes": b"b", "path": None}]),
            "when": pa.array([0, 1], pa.timestamp("us")),
        }
    )
    with pa.ipc.new_file("a.arrow", table.schema) as file:
        for row in (0, 1):
            file.write_table(table[row : row + 1])
    source = Arrow("a.arrow")
    assert read(source, [1, 0]) == {
        "image": [[[5, 6], [7, 8]], [[1, 2], [3, 4]]],
        "ragged": [[[4]], [[1], [2, 3]]],
        "city": ["y", "x"],
        "tensor": [[3, 4], [1, 2]],
        "hf": [b"b", b"a"],
        "when": [1, 0],
    }
    assert source.take(np.array([1, 0]))["image"].shape == (2, 2, 2)


def test_a_type_that_no_tensor_holds():
    table = pa.table({"x": pa.array([pa.MonthDayNano([1, 2, 3])]), "y": [1]})
    with pa.ipc.new_file("a.arrow", table.schema) as file:
        file.write_table(table)
    with pytest.raises(DataError, match=r"a.arrow: column 'x' is of type month_day.*no tensor holds"):
        Arrow("a.arrow").take(np.array([0]))
    assert read(open_source("a.arrow", columns=["y"])) == {"y": [1]}


def test_a_null_names_file_column_and_row():
    table = pa.table({"a": pa.array([1, 2, None, 4])})
    with pa.ipc.new_file("a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=2)
    with pa.ipc.new_file("b.arrow", table.schema) as file:
        file.write_table(table[:2])
    source = Arrow(["b.arrow", "a.arrow"])
    with pytest.raises(DataError, match=r"a.arrow: column 'a' is null in row 2"):
        source.take(np.array([0, 4, 2]))
    assert read(source, [5, 0, 3]) == {"a": [4, 1, 2]}
    assert read(Arrow("a.arrow", fill_null=-1)) == {"a": [1, 2, -1, 4]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.arrow is empty"),
        (b"hello world, this is no arrow file", "a.arrow is no Arrow file"),
        (b"FEA1 and so on", "a.arrow is no Arrow file.*Feather version 1"),
        (None, "a.arrow is no Arrow file"),
    ],
)
def test_what_is_no_arrow_file(content, message):
    if content is None:
        content = Path(write("a.arrow", [1000])).read_bytes()[:-100]
    Path("a.arrow").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Arrow("a.arrow")


def test_a_damaged_batch_says_where():
    content = bytearray(Path(write("a.feather", [1000, 1000], "zstd")).read_bytes())
    source = Arrow("a.feather")
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    Path("a.feather").write_bytes(content)
    with pytest.raises(DataError, match=r"a.feather"):
        read(source)


def test_files_that_differ_are_both_named():
    write("a.arrow", [2])
    with pa.ipc.new_file("b.arrow", pa.schema({"id": pa.string()})) as file:
        file.write_table(pa.table({"id": ["x"]}))
    with pytest.raises(DataError, match=r"b.arrow has no column 'half', which a.arrow has"):
        Arrow(["a.arrow", "b.arrow"])
    with pa.ipc.new_file("c.arrow", pa.schema({"id": pa.int64()})) as file:
        pass
    with pytest.raises(DataError, match=r"c.arrow has columns but no rows"):
        Arrow("c.arrow")


# --- Hugging Face ---


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


def test_a_dataset_in_memory_or_on_disk(datasets):
    dataset = datasets.Dataset.from_dict(rows(0, 10))
    dataset.save_to_disk("saved", num_shards=3)
    for loaded in (dataset, datasets.load_from_disk("saved")):
        source = HFDataset(loaded)
        assert read(source) == rows(0, 10)
        assert read(source, [9, 0, 5])["id"] == [9, 0, 5]
        assert source.select(["name"]).columns == ("name",)
        assert read(pickle.loads(pickle.dumps(source)), [7])["name"] == ["row 7"]
    assert read(open_source("saved")) == rows(0, 10)
    assert type(open_source("saved")) is Arrow


def test_indices_are_respected(datasets):
    dataset = datasets.Dataset.from_dict(rows(0, 20))
    for changed in (dataset.shuffle(seed=0), dataset.select([3, 19, 3]), dataset.filter(lambda row: row["id"] % 2)):
        source = HFDataset(changed)
        assert len(source) == len(changed)
        assert read(source)["id"] == changed["id"][:]
        assert read(source, [2, 0])["name"] == [changed[2]["name"], changed[0]["name"]]


def test_what_identifies_a_dataset(datasets):
    def dataset(last):
        return datasets.Dataset.from_dict({"id": [*range(9), last]})

    same = HFDataset(dataset(9)).fingerprint()
    assert HFDataset(dataset(9)).fingerprint() == same
    assert HFDataset(dataset(9)).select(["id"]).fingerprint() == same
    assert HFDataset(dataset(8)).fingerprint() != same
    assert HFDataset(dataset(9).select([1, 0])).fingerprint() != HFDataset(dataset(9).select([0, 1, 2])).fingerprint()


def test_what_is_no_dataset(datasets):
    with pytest.raises(DataError, match=r"DatasetDict is no datasets.Dataset"):
        HFDataset(datasets.DatasetDict())
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows(0, 3))).save_to_disk("saved")
    with pytest.raises(DataError, match="saved holds the splits train of a dataset: name one, as in saved/train"):
        open_source("saved")
    assert len(open_source("saved/train")) == 3
