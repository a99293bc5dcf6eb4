"""Sources: the rows that were written are the rows that are read, in any order, and bad data says where it is."""

import csv as python_csv
import datetime
import decimal
import io
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from ddp_stream.sources import (
    Csv,
    DataError,
    InMemory,
    Npy,
    Parquet,
    Source,
    SyntheticRegression,
    TorchDataset,
    open_source,
)
from ddp_stream.sources import decoded as decoded_module
from ddp_stream.sources import text as text_module
from ddp_stream.sources.paths import file_identity
from ddp_stream.texts import Texts


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content):
    """Writes text or bytes to the file `name`; returns the name."""
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def plain(column):
    """A column as a list of Python values."""
    return column.tolist() if isinstance(column, (np.ndarray, torch.Tensor)) else list(column)


def read(source, rows=None):
    """`{column: values}` of `rows`, by default all of them."""
    rows = np.arange(len(source)) if rows is None else np.array(rows, np.int64)
    return {name: plain(column) for name, column in source.take(rows).items()}


def read_in_any_order(source, expected, seed=0):
    """Asserts that rows taken at random, with repetitions, are those of `expected` (`{column: all values}`)."""
    assert len(source) == len(next(iter(expected.values())))
    assert source.columns == tuple(expected)
    rng = np.random.default_rng(seed)
    for count in (1, 3, 50):
        rows = rng.integers(0, len(source), count)
        assert read(source, rows) == {name: [values[row] for row in rows] for name, values in expected.items()}
    assert read(source) == expected


# --- what every source can do by itself ---


class Squares(Source):
    """The least that a source can be."""

    def __len__(self):
        return 5

    def take(self, rows):
        return {"x": rows, "square": rows**2}


def test_two_methods_make_a_source():
    source = Squares()
    assert source.columns == ("x", "square")
    assert source.blocks() is None
    assert source.sample(source.take(np.array([3, 4])), 1) == {"x": 4, "square": 16}
    assert str(source) == "Squares(5 rows)"
    assert source.fingerprint() == Squares().fingerprint()


def test_any_source_can_select():
    source = Squares().select(["square"])
    assert (source.columns, len(source), read(source, [3])) == (("square",), 5, {"square": [9]})
    with pytest.raises(DataError, match=r"Squares\(5 rows\) has no column 'sqare'; did you mean 'square'\?"):
        Squares().select(["sqare"])


# --- SyntheticRegression ---


def test_synthetic_rows_are_the_ones_they_always_were():
    taken = SyntheticRegression(10**12).take(np.array([0, 1, 10**12 - 1]))
    features = [
        [-0.14924037, 2.67486429, -0.06695505, -0.88156945],
        [-0.83424693, 0.19257142, 0.82648605, -0.65924931],
        [0.49696901, 1.05221331, 0.98281693, -0.54426974],
    ]
    labels = [[1.57709944], [-0.47443879], [1.98772955]]  # the sums of the features
    torch.testing.assert_close(taken["features"], torch.tensor(features), rtol=0, atol=1e-6)
    torch.testing.assert_close(taken["label"], torch.tensor(labels), rtol=0, atol=1e-6)
    odd = SyntheticRegression(5, n_features=3, seed=7).take(np.array([2]))
    torch.testing.assert_close(
        odd["features"], torch.tensor([[1.10817659, 0.78588653, -0.18976207]]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("n_features", [1, 3, 4])
def test_synthetic_shapes(n_features):
    taken = SyntheticRegression(100, n_features).take(np.array([7, 7, 99]))
    assert (taken["features"].shape, taken["label"].shape) == ((3, n_features), (3, 1))
    assert {taken["features"].dtype, taken["label"].dtype} == {torch.float32}


def test_a_synthetic_row_does_not_depend_on_who_reads_it():
    source = SyntheticRegression(100)
    whole = source.take(np.arange(100))
    rows = np.array([41, 3, 99])
    assert source.take(rows)["features"].equal(whole["features"][rows])
    assert SyntheticRegression(1000).take(rows)["features"].equal(whole["features"][rows])
    assert not SyntheticRegression(100, seed=43).take(rows)["features"].equal(whole["features"][rows])


def test_synthetic_features_are_standard_normal_and_independent():
    features = SyntheticRegression(20_000, seed=0).take(np.arange(20_000))["features"].numpy()
    # 20,000 draws a feature: the standard error of a mean or a correlation is 0.0071, of a deviation 0.005.
    assert np.abs(features.mean(axis=0)).max() < 5 * 0.0071
    assert np.abs(features.std(axis=0) - 1).max() < 5 * 0.005
    assert np.abs(np.corrcoef(features.T) - np.eye(4)).max() < 5 * 0.0071
    within_one_sigma = (np.abs(features) < 1).mean()  # 68.27% of a normal distribution; 80,000 draws
    assert abs(within_one_sigma - 0.6827) < 5 * 0.0017


def test_the_synthetic_label_is_the_sum():
    taken = SyntheticRegression(100, 3).take(np.arange(100))
    torch.testing.assert_close(taken["label"], taken["features"].sum(dim=1, keepdim=True))


def test_a_synthetic_sample_is_a_tuple():
    source = SyntheticRegression(100)
    taken = source.take(np.array([5, 6]))
    features, label = source.sample(taken, 1)
    assert features.equal(taken["features"][1])
    assert label.equal(taken["label"][1])


def test_synthetic_identity_and_errors():
    assert SyntheticRegression(10).fingerprint() == SyntheticRegression(10).fingerprint()
    assert len({SyntheticRegression(*a).fingerprint() for a in [(10,), (11,), (10, 5), (10, 4, 0)]}) == 4
    for wrong in ((-1, 4), (10, 0)):
        with pytest.raises(ValueError, match=f"total_samples={wrong[0]}, n_features={wrong[1]}"):
            SyntheticRegression(*wrong)


# --- InMemory and TorchDataset ---


def test_in_memory_columns_of_every_kind():
    source = InMemory({"t": torch.arange(5) * 10, "a": np.arange(5.0), "s": list("vwxyz")})
    read_in_any_order(source, {"t": [0, 10, 20, 30, 40], "a": [0, 1, 2, 3, 4], "s": list("vwxyz")})
    taken = source.take(np.array([4, 0]))
    assert [type(column) for column in taken.values()] == [torch.Tensor, np.ndarray, list]
    assert source.select(["s"]).columns == ("s",)
    assert read(source.select(["s"]), [4, 0]) == {"s": ["z", "v"]}


def test_in_memory_columns_must_be_of_one_length():
    with pytest.raises(DataError, match=r"of one length.*'a': 3, 'b': 2"):
        InMemory({"a": [1, 2, 3], "b": [1, 2]})
    with pytest.raises(DataError, match="at least one column"):
        InMemory({})


class Samples(Dataset):
    def __init__(self, sample):
        self.sample = sample

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.sample(index)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (lambda i: {"x": torch.full((2,), i), "s": f"row {i}"}, {"x": [[3, 3], [1, 1]], "s": ["row 3", "row 1"]}),
        (lambda i: (float(i), i * 10), {"0": [3.0, 1.0], "1": [30, 10]}),
        (lambda i: [i, np.array([i])], {"0": [3, 1], "1": [[3], [1]]}),
        (lambda i: i * 10, {"0": [30, 10]}),
        (lambda i: torch.full((2,), i), {"0": [[3, 3], [1, 1]]}),
    ],
    ids=["dict", "tuple", "list", "scalar", "tensor"],
)
def test_samples_of_a_torch_dataset_become_columns(sample, expected):
    source = TorchDataset(Samples(sample))
    assert len(source) == 4
    assert read(source, [3, 1]) == expected
    assert source.columns == tuple(expected)


def test_a_torch_dataset_is_asked_for_many_rows_at_once_if_it_can():
    class Many(Samples):
        def __getitems__(self, indices):
            return [index * 100 for index in indices]

    assert read(TorchDataset(Many(lambda i: i)), [3, 1]) == {"0": [300, 100]}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class StreamOfKnownLength(Stream):
    def __len__(self):
        return 3


@pytest.mark.parametrize("dataset", [Stream(), StreamOfKnownLength()], ids=lambda dataset: type(dataset).__name__)
def test_a_stream_is_no_map_style_dataset(dataset):
    with pytest.raises(DataError, match=f"^{type(dataset).__name__} .*map-style"):
        TorchDataset(dataset)


# --- Npy ---


def test_npy_is_one_column():
    np.save("a.npy", np.arange(10).reshape(5, 2))
    read_in_any_order(Npy("a.npy"), {"features": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]})


def test_structured_npy_has_its_fields_as_columns():
    rows = [(i, i / 2, [i, -i]) for i in range(5)]
    np.save("a.npy", np.array(rows, [("id", "i4"), ("half", "f8"), ("pair", "i2", (2,))]))
    source = Npy("a.npy")
    expected = {"id": [0, 1, 2, 3, 4], "half": [0, 0.5, 1, 1.5, 2], "pair": [[i, -i] for i in range(5)]}
    read_in_any_order(source, expected)
    assert all(column.flags.c_contiguous for column in source.take(np.arange(5)).values())
    assert read(source.select(["half"]), [4]) == {"half": [2.0]}


def test_npy_files_are_laid_end_to_end():
    for index, values in enumerate([[0, 1, 2], [3], [4, 5]]):
        np.save(f"{index}.npy", np.array(values))
    read_in_any_order(Npy(["0.npy", "1.npy", "2.npy"]), {"features": [0, 1, 2, 3, 4, 5]})


def test_npy_files_that_differ_are_both_named():
    np.save("a-0.npy", np.zeros((2, 3), np.float32))
    np.save("a-1.npy", np.zeros((2, 4), np.float32))
    np.save("a-2.npy", np.zeros((2, 3), np.int64))
    with pytest.raises(DataError, match=r"a-1.npy holds float32 rows of shape \(4,\), but a-0.npy .* \(3,\)"):
        Npy(["a-0.npy", "a-1.npy"])
    with pytest.raises(DataError, match=r"a-2.npy holds int64 .* a-0.npy holds float32"):
        Npy(["a-0.npy", "a-2.npy"])


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["x"], {"features": 1}),
        (["features", "label"], {"features": 1, "label": 1}),
        (["0", "1", "2"], {"features": 3}),
        (["part-0", "part-1"], {"features": 2}),
        (["train_000-of-002", "train_001-of-002"], {"features": 2}),
        (["features0", "features1", "label0", "label1"], {"features": 2, "label": 2}),
        (["a.0", "b.0", "a.1", "b.1"], {"a": 2, "b": 2}),
    ],
)
def test_npy_files_lie_end_to_end_or_side_by_side_by_their_names(names, columns):
    rng = np.random.default_rng(0)
    lengths = [4, 1, 7]
    expected = {column: rng.integers(0, 100, (sum(lengths[:parts]), 2)) for column, parts in columns.items()}
    left = {
        column: [*np.split(values, np.cumsum(lengths[: columns[column]])[:-1])] for column, values in expected.items()
    }
    Path("data").mkdir()
    for name in sorted(names):
        column = next((column for column in columns if name.startswith(column)), "features")
        np.save(f"data/{name}.npy", left[column].pop(0))
    source = open_source("data")
    expected = {column: values.tolist() for column, values in expected.items()}
    read_in_any_order(source, expected)
    last = list(columns)[-1]
    assert read(source.select([last]), [2, 0]) == {last: [expected[last][2], expected[last][0]]}
    copy = pickle.loads(pickle.dumps(source.select([last])))
    assert (copy.columns, copy.fingerprint()) == ((last,), source.fingerprint())


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"features": 5, "label": 4}, r"different lengths: \{'features': 5, 'label': 4\}.*--data.columns"),
        ({"a-0": 2, "a-1": 2, "b-1": 2, "b-2": 2}, r"column 'b' are numbered \[1, 2\], and those of 'a' \[0, 1\]"),
        ({"a-1": 2, "a-10": 2, "b-01": 2, "b-10": 2, "b-2": 2}, r"column 'b' are numbered"),
        ({"0": 2, "label": 2}, r"a name each"),
    ],
)
def test_npy_files_that_do_not_fit_together(lengths, message):
    for name, rows in lengths.items():
        np.save(f"{name}.npy", np.arange(rows))
    with pytest.raises(DataError, match=message):
        open_source("*.npy")


def test_an_empty_npy_file_among_many():
    for index, values in enumerate([[0, 1], [], [2], []]):
        np.save(f"{index}.npy", np.array(values, np.int64))
    read_in_any_order(open_source("*.npy"), {"features": [0, 1, 2]})


# --- Npz ---


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_arrays_are_columns(save, tmp_path, monkeypatch):
    monkeypatch.setenv("DDP_STREAM_CACHE", str(tmp_path / "cache"))
    expected = {
        "x": [[i, -i] for i in range(5)],
        "y": [0.5, 1.5, 2.5, 3.5, 4.5],
        "f": [[[i] * 3] * 2 for i in range(5)],
    }
    fortran = np.asfortranarray(np.array(expected["f"], np.int16))
    for index, part in enumerate([slice(0, 2), slice(2, 2), slice(2, 5)]):
        save(f"{index}.npz", x=np.array(expected["x"])[part], y=np.array(expected["y"])[part], f=fortran[part])
    source = open_source("*.npz")
    read_in_any_order(source, expected)
    assert read(pickle.loads(pickle.dumps(source.select(["y"]))), [4, 0]) == {"y": [4.5, 0.5]}
    arrays = source._parts()["x"]
    assert all(array.base is not None for array in arrays if len(array))  # mapped, not read
    assert (tmp_path / "cache").exists() == (save is np.savez_compressed)


def test_a_damaged_copy_of_an_npz_archive_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DDP_STREAM_CACHE", str(tmp_path / "cache"))
    np.savez_compressed("a.npz", x=np.arange(100))
    open_source("a.npz")
    (copy,) = (tmp_path / "cache").glob("*.npz")
    content = bytearray(copy.read_bytes())
    content[500] ^= 1
    copy.write_bytes(bytes(content))
    assert read(open_source("a.npz")) == {"x": list(range(100))}


def test_npz_arrays_of_other_lengths_are_left_out_by_choosing_columns():
    np.savez("a.npz", x=np.arange(5), names=np.array(["a", "b"]), seed=np.array(7))
    with pytest.raises(DataError, match=r"a.npz: array 'seed' has no rows: its shape is \(\)"):
        open_source("a.npz")
    with pytest.raises(DataError, match=r"a.npz has columns of different lengths: \{'x': 5, 'names': 2\}"):
        open_source("a.npz", columns=["x", "names"])
    assert read(open_source("a.npz", columns=["x"])) == {"x": [0, 1, 2, 3, 4]}


def test_what_is_no_npz_archive():
    np.savez("a.npz", x=np.arange(5))
    for name, content, message in [
        ("b.npz", b"no zip", "b.npz is no .npz archive"),
        ("c.npz", Path("a.npz").read_bytes()[:100], "c.npz is no .npz archive"),
    ]:
        with pytest.raises(DataError, match=message):
            open_source(write(name, content))
    np.savez("d.npz", x=np.array([None, "x"], object))
    with pytest.raises(DataError, match=r"d.npz: x.npy is no array of fixed-size values \(it holds Python objects\)"):
        open_source("d.npz")
    np.savez("e.npz", y=np.arange(5))
    with pytest.raises(DataError, match=r"e.npz holds the arrays \['y'\], and a.npz holds \['x'\]"):
        open_source(["a.npz", "e.npz"])


def zip_archive():
    archive = io.BytesIO()
    np.savez(archive, a=np.arange(3))
    return archive.getvalue()


def npy(array, **options):
    content = io.BytesIO()
    np.save(content, array, **options)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.npy"),
        (b"1,2,3\n", "x.npy is no .npy file"),
        (npy(np.arange(10))[:-5], "x.npy is no .npy file"),
        (npy(np.array(["a", None], object), allow_pickle=True), "x.npy is no .npy file of fixed-size values"),
        (npy(np.zeros((0, 3))), r"x.npy has no rows: its shape is \(0, 3\)"),
        (npy(np.float32(1)), r"x.npy has no rows: its shape is \(\)"),
        (zip_archive(), "x.npy"),
    ],
    ids=["empty", "text", "truncated", "objects", "no rows", "a number", "npz"],
)
def test_what_is_no_npy_file_of_rows(content, message):
    write("x.npy", content)
    with pytest.raises(DataError, match=message):
        Npy("x.npy")


# --- Csv: reading ---


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of three rows, found in portions of seven bytes."""
    monkeypatch.setattr(text_module, "BLOCK_ROWS", 3)
    monkeypatch.setattr(text_module, "_SCAN_BYTES", 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b\n1,x\n2,y\n", {"a": [1, 2], "b": ["x", "y"]}),
        ("a,b\n1,x\n2,y", {"a": [1, 2], "b": ["x", "y"]}),  # no line end after the last row
        ("a,b\r\n1,x\r\n2,y\r\n", {"a": [1, 2], "b": ["x", "y"]}),
        ("\ufeffa,b\n1,x\n2,y\n", {"a": [1, 2], "b": ["x", "y"]}),
        ("\n\na,b\n\n1,x\n\r\n\n2,y\n\n\n", {"a": [1, 2], "b": ["x", "y"]}),
        ('a,b\n1,"x,y"\n2,"line\nline"\n', {"a": [1, 2], "b": ["x,y", "line\nline"]}),
        ('a,b\n1,"blank\n\nline"\n2,"\r\n"\n', {"a": [1, 2], "b": ["blank\n\nline", "\r\n"]}),
        ('a,b\n1,"say ""hi"""\n2,""""\n', {"a": [1, 2], "b": ['say "hi"', '"']}),
        ('"a","b\nc"\n1,x\n', {"a": [1], "b\nc": ["x"]}),
        ("a\n0.5\n", {"a": [0.5]}),
        ("a,b\n1,\n2,y\n", {"a": [1, 2], "b": ["", "y"]}),  # an empty string is a string
        ("a,b\n1,NA\n2,y\n", {"a": [1, 2], "b": ["NA", "y"]}),
        ("a,b\nä,true\n€,false\n", {"a": ["ä", "€"], "b": [True, False]}),
        ("day\n1970-01-02\n1971-01-01\n", {"day": [1, 365]}),  # days since 1970
    ],
)
def test_csv_dialects(text, expected, small_blocks):
    read_in_any_order(Csv(write("a.csv", text)), expected)


def test_tabs_and_other_delimiters():
    expected = {"a": [1, 3], "b,c": ["x,y", "z"]}
    read_in_any_order(Csv(write("a.tsv", "a\tb,c\n1\tx,y\n3\tz\n")), expected)
    read_in_any_order(Csv(write("a.csv", "a;b,c\n1;x,y\n3;z\n"), delimiter=";"), expected)


@pytest.mark.parametrize("seed", range(30))
def test_csv_of_random_fields_blocks_and_portions(seed, monkeypatch):
    """Python's own csv module writes, with whatever needs quoting; Csv reads, whatever the bytes it scans at once."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(text_module, "BLOCK_ROWS", int(rng.integers(1, 6)))
    monkeypatch.setattr(text_module, "_SCAN_BYTES", int(rng.integers(1, 40)))
    rows = int(rng.integers(1, 40))
    pieces = ["x", ",", '"', "\n", "\r\n", " ", "é", "\n\n"]
    expected = {
        "number": rng.integers(-100, 100, rows).tolist(),
        "te,xt": ["t" + "".join(rng.choice(pieces, rng.integers(0, 6))) for _ in range(rows)],
        "half": (rng.integers(-100, 100, rows) + 0.5).tolist(),
    }
    text = io.StringIO()
    line_end = str(rng.choice(["\n", "\r\n"]))
    writer = python_csv.writer(text, lineterminator=line_end)
    writer.writerow(expected)
    for row in zip(*expected.values(), strict=True):
        writer.writerow(row)
        text.write(line_end * int(rng.integers(0, 3) == 0))  # a blank line now and then
    content = text.getvalue().rstrip("\r\n") if rng.random() < 0.5 else text.getvalue()
    read_in_any_order(Csv(write("a.csv", content)), expected, seed)


def test_csv_of_several_real_blocks():
    # 13,000 rows = 3 blocks of 4,096 and one of 712.
    expected = {"id": list(range(13_000)), "name": [f"row, {i}" for i in range(13_000)]}
    source = Csv(write("a.csv", "id,name\n" + "".join(f'{i},"row, {i}"\n' for i in range(13_000))))
    assert source.blocks().tolist() == [0, 4096, 8192, 12_288, 13_000]
    read_in_any_order(source, expected)


def test_csv_files_of_different_sizes(small_blocks):
    sizes = [4, 1, 7, 1]
    paths, first = [], 0
    for index, size in enumerate(sizes):
        rows = range(first, first + size)
        paths.append(write(f"{index}.csv", "id,half\n" + "".join(f"{i},{i / 2}\n" for i in rows)))
        first += size
    source = Csv(paths)
    # Blocks of 3 that never cross a file: 3 + 1, 1, 3 + 3 + 1, 1.
    assert source.blocks().tolist() == [0, 3, 4, 5, 8, 11, 12, 13]
    read_in_any_order(source, {"id": list(range(13)), "half": [i / 2 for i in range(13)]})


def test_integers_that_turn_into_floats_are_floats_from_the_first_row_on(small_blocks):
    column = Csv(write("a.csv", "a\n" + "1\n" * 9 + "2.5\n")).take(np.array([0, 9]))["a"]
    assert (column.dtype, column.tolist()) == (np.float64, [1.0, 2.5])
    paths = [write("b.csv", "a\n1\n"), write("c.csv", "a\n2.5\n")]
    assert Csv(paths).take(np.array([0]))["a"].dtype == np.float64


def test_a_column_of_numbers_and_words_is_a_column_of_strings(small_blocks):
    assert read(Csv(write("a.csv", "a\n" + "1\n" * 9 + "x\n")), [0, 9]) == {"a": ["1", "x"]}


def test_column_names_are_taken_as_they_are_written():
    header = 'id,NA,nan,007,true,1e3,2020-01-01 00:00,"q""uoted"," space"'
    names = ("id", "NA", "nan", "007", "true", "1e3", "2020-01-01 00:00", 'q"uoted', " space")
    assert Csv(write("a.csv", header + "\n1,2,3,4,5,6,7,8,9\n")).columns == names


@pytest.mark.parametrize("name", ["a\u2028b", "a\x85b", "a\x0cb", '"a\u2028b"'])
def test_only_a_line_feed_ends_the_header(name):
    assert Csv(write("a.csv", f"{name},c\n1,2\n")).columns == (name.strip('"'), "c")


def test_an_empty_column_name_is_given_one():
    # What pandas writes for an index without a name.
    assert Csv(write("a.csv", ",a\n0,1\n")).columns == ("unnamed_0", "a")


def test_a_header_may_be_longer_than_a_mebibyte():
    names = ("a" * (1 << 20), "b")
    assert Csv(write("a.csv", ",".join(names) + "\n1,2\n")).columns == names


# --- Csv: errors ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.csv is empty"),
        ("\n\r\n\n", "a.csv has blank lines only"),
        ("\ufeff", "a.csv has blank lines only"),
        ("a,b\n", "a.csv has a header but no rows"),
        ("a,b", "a.csv has a header but no rows"),
        ("1,2\n3,4\n", r"a.csv: the first line \('1,2'\) looks like data"),
        ("1,,2\n3,4,5\n", r"a.csv: the first line \('1,,2'\) looks like data"),
        ("2020-01-01,7\n2020-01-02,8\n", r"a.csv: the first line \('2020-01-01,7'\) looks like data"),
        ("true,0.5\nfalse,0.7\n", r"a.csv: the first line \('true,0.5'\) looks like data"),
        ("a,b,a\n1,2,3\n", "a.csv has more than one column named a"),
        ("a,b\n1,2\n3,4\n5,6,7\n", "a.csv: .*row 2: Expected 2 columns, got 3"),
        ("a,b\n1,2\n\n3\n", "a.csv: .*row 1: Expected 2 columns, got 1"),
        ('a,b\n1,"2\n3,4\n', "a.csv: a quoted field is never closed"),
        ("a,b\r1,2\r3,4\r", "a.csv: the first line holds a carriage return.* 2 rows would be lost"),
        ('{"a":1}\n{"a":2}\n', "a.csv: the first line is an object of JSON"),
        ("a;b\n1;2\n", "a.csv: the header is the one column 'a;b'.*--data.source.delimiter ';'"),
        ("a\n1\n".encode("utf-16"), "a.csv is in UTF-16.*iconv"),
        ("a,b\n1,x\n2,ä\n".encode("latin1"), "a.csv: column 'b' is no UTF-8 text in row 1.*iconv"),
    ],
)
def test_a_csv_file_that_cannot_be_trained_on_says_why(text, message):
    write("a.csv", text)
    with pytest.raises(DataError, match=message):
        Csv("a.csv")


def test_a_ragged_line_far_into_the_file_is_named_by_its_row(small_blocks):
    # The first block is well-formed, so the row is counted from the start of the file: 3 + 3 + 1.
    with pytest.raises(DataError, match=r"a.csv: .*row 7: Expected 2 columns, got 3"):
        Csv(write("a.csv", "a,b\n" + "1,2\n" * 7 + "1,2,3\n"))


def test_a_missing_number_names_file_column_and_row(small_blocks):
    write("a.csv", "a,b\n" + "1,2\n" * 10)
    write("b.csv", "a,b\n" + "1,2\n" * 7 + "3,\n" + "1,2\n" * 3)
    source = Csv(["a.csv", "b.csv"])
    # Row 7 of the second file, in its block of rows 6..8.
    with pytest.raises(DataError, match=r"b.csv: column 'b' is null in row 7 \(1 nulls in the 3 rows from row 6\)"):
        source.take(np.array([17]))
    assert read(source, [0, 10, 15]) == {"a": [1, 1, 1], "b": [2, 2, 2]}  # other blocks are fine
    assert read(Csv("b.csv", fill_null=-1), [6, 7]) == {"a": [1, 3], "b": [2, -1]}
    assert read(source.select(["a"]), [17]) == {"a": [3]}


def test_a_word_among_numbers_names_file_column_and_row(small_blocks, monkeypatch):
    monkeypatch.setattr(text_module, "_SAMPLED_BLOCKS", 2)  # the first and the last, so that row 4 comes as a surprise
    source = Csv(write("a.csv", "a,b\n1,1\n2,2\n3,3\n\n4,4\n5,five\n6,6\n7,7\n"))
    with pytest.raises(DataError, match=r"a.csv: column 'b': row 4: .*invalid value 'five'"):
        source.take(np.arange(7))
    with pytest.raises(DataError, match=r"a.csv: column 'b': row 4"):
        source.select(["b"]).take(np.arange(7))
    assert read(source.select(["a"])) == {"a": [1, 2, 3, 4, 5, 6, 7]}


def test_a_quote_inside_an_unquoted_field_loses_no_row():
    with pytest.raises(DataError, match=r"a.csv"):
        read(Csv(write("a.csv", 'id,size\n1,5" pipe\n2,6" pipe\n3,plug\n')))


def test_a_csv_file_that_changed_after_it_was_opened():
    source = Csv(write("a.csv", "a\n1\n2\n3\n"))
    write("a.csv", "a\n123\n3\n")
    with pytest.raises(
        DataError, match=r"a.csv has changed since it was opened: from row 0 on it has 2 rows where its index says 3"
    ):
        source.take(np.array([0]))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("a\n1\n", "b.csv has no column 'b', which a.csv has"),
        ("a,b,c\n1,2,3\n", "b.csv has a column 'c', which a.csv has not"),
        ("a,b\n1,x\n", "b.csv holds string in column 'b', where a.csv holds int64"),
        ("b,a\n1,2\n", "b.csv has its columns in another order than a.csv"),
    ],
)
def test_csv_files_that_differ_are_both_named(second, message):
    write("a.csv", "a,b\n1,2\n")
    write("b.csv", second)
    with pytest.raises(DataError, match=message):
        Csv(["a.csv", "b.csv"])


def test_duplicate_columns_in_files_that_differ():
    write("a.csv", "a,a\n1,2\n")
    write("b.csv", "a,a\n1,x\n")
    with pytest.raises(DataError, match="more than one column named a"):
        Csv(["a.csv", "b.csv"])


# --- Parquet: reading ---


def write_parquet(name, columns, row_group_size=None, schema=None):
    """Writes `{column: values}` to the Parquet file `name`; returns the name."""
    pq.write_table(pa.table(columns, schema=schema), name, row_group_size=row_group_size)
    return name


def test_parquet_row_groups_are_blocks():
    # 10 rows in groups of 4: 4 + 4 + 2.
    expected = {"id": list(range(10)), "half": [i / 2 for i in range(10)], "name": [f"row {i}" for i in range(10)]}
    source = Parquet(write_parquet("a.parquet", expected, row_group_size=4))
    assert source.blocks().tolist() == [0, 4, 8, 10]
    read_in_any_order(source, expected)


def test_parquet_files_are_laid_end_to_end():
    paths = [
        write_parquet("a.parquet", {"id": [0, 1, 2]}, row_group_size=2),
        write_parquet("b.parquet", {"id": [3]}),
        write_parquet("c.parquet", {"id": pa.array([], pa.int64())}),
        write_parquet("d.parquet", {"id": [4, 5]}),
    ]
    read_in_any_order(Parquet(paths), {"id": [0, 1, 2, 3, 4, 5]})


def test_empty_row_groups():
    table = pa.table({"id": [0, 1, 2]})
    with pq.ParquetWriter("a.parquet", table.schema) as writer:
        for part in (table[:0], table[:2], table[:0], table[:0], table[2:], table[:0]):
            writer.write_table(part)
    metadata = pq.read_metadata("a.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [0, 2, 0, 0, 1, 0]
    source = Parquet("a.parquet")
    read_in_any_order(source, {"id": [0, 1, 2]})
    assert read(source, []) == {"id": []}


DAYS = [datetime.date(1970, 1, 1 + i) for i in range(4)]
TIMES = [datetime.datetime(1970, 1, 1, 0, 0, i) for i in range(4)]
CENTS = [decimal.Decimal("0.25"), decimal.Decimal("-1.50"), decimal.Decimal("3.00"), decimal.Decimal("0.01")]
WORDS = ["a", "", "ä", "a"]


@pytest.mark.parametrize(
    ("array", "expected", "dtype"),
    [
        (pa.array([True, False, True, True]), [True, False, True, True], np.bool_),
        (pa.array([1, -2, 3, 4], pa.int8()), [1, -2, 3, 4], np.int8),
        (pa.array([1, 2, 3, 2**32 - 1], pa.uint32()), [1, 2, 3, 2**32 - 1], np.uint32),
        (pa.array([1.5, 2.5, 3.5, float("inf")], pa.float32()), [1.5, 2.5, 3.5, float("inf")], np.float32),
        (pa.array(np.array([1.5, 2.5, 3.5, 4.5], np.float16)), [1.5, 2.5, 3.5, 4.5], np.float16),
        (pa.array(CENTS), [0.25, -1.5, 3.0, 0.01], np.float64),
        (pa.array(DAYS), [0, 1, 2, 3], np.int32),
        (pa.array(TIMES, pa.timestamp("ms")), [0, 1000, 2000, 3000], np.int64),
        (pa.array(TIMES, pa.timestamp("us", "UTC")), [0, 10**6, 2 * 10**6, 3 * 10**6], np.int64),
        (pa.array([0, 1, 2, 3], pa.duration("us")), [0, 1, 2, 3], np.int64),
        (pa.array([0, 1, 2, 3], pa.time32("ms")), [0, 1, 2, 3], np.int32),
        (pa.array([0, 1, 2, 3], pa.time64("us")), [0, 1, 2, 3], np.int64),
        (pa.array(WORDS), WORDS, None),
        (pa.array(WORDS, pa.large_string()), WORDS, None),
        (pa.array(WORDS).dictionary_encode(), WORDS, None),
        (pa.array([7, 8, 7, 9]).dictionary_encode(), [7, 8, 7, 9], np.int64),
        (pa.array([b"\0", b"", b"\xff", b"x"]), [b"\0", b"", b"\xff", b"x"], None),
        (
            pa.array([[1, 2], [3, 4], [5, 6], [7, 8]], pa.list_(pa.int64(), 2)),
            [[1, 2], [3, 4], [5, 6], [7, 8]],
            np.int64,
        ),
        (pa.array([[1.5], [2.5], [3.5], [4.5]]), [[1.5], [2.5], [3.5], [4.5]], np.float64),
        (pa.array([[True, False]] * 4), [[True, False]] * 4, np.bool_),
        (pa.array([["a"], ["b", "c"], [], ["d"]]), [["a"], ["b", "c"], [], ["d"]], None),
        (pa.array([[cent] for cent in CENTS]), [[0.25], [-1.5], [3.0], [0.01]], np.float64),
        (pa.array([[time] for time in TIMES], pa.list_(pa.timestamp("ms"))), [[0], [1000], [2000], [3000]], np.int64),
        (pa.array([[1], [2], [3], [4]], pa.list_view(pa.uint8())), [[1], [2], [3], [4]], np.uint8),
        (pa.array([b"ab", b"cd", b"\0\0", None], pa.binary(2)), [b"ab", b"cd", b"\0\0", None], None),
        (pa.array([b"a", b"", None, b"b"], pa.binary_view()), [b"a", b"", None, b"b"], None),
        (pa.array([{"x": row, "y": None} for row in range(4)]), [{"x": row, "y": None} for row in range(4)], None),
        (pa.array([[("k", 1)], [], None, []], pa.map_(pa.string(), pa.int8())), [[("k", 1)], [], None, []], None),
        (pa.array([[[1], [2]], [], [[3]], []]), [[[1], [2]], [], [[3]], []], None),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_parquet_types(array, expected, dtype):
    source = Parquet(write_parquet("a.parquet", {"c": array}, row_group_size=2))
    read_in_any_order(source, {"c": expected})
    column = source.take(np.array([3, 0]))["c"]
    assert (column.dtype if dtype else type(column)) in ((dtype,) if dtype else (list, Texts))


def listed(source, rows):
    """The column `c` of lists, each as a Python list."""
    return [plain(item) for item in source.take(np.array(rows))["c"]]


@pytest.mark.parametrize(
    "values",
    [
        [[1, 2], [3], [], [4, 5, 6]],  # two row groups, ragged in themselves
        [[1, 2, 3], [4, 5, 6], [7], [8, 9]],  # the first happens to be even
        [[1, 2, 3], [4, 5, 6], [7], [8]],  # both are, but of different lengths, and 1 would broadcast to 3
        [[1, 2, 3], [4, 5, 6], [7, 8], [9, 10]],
        [[1, 2], [3, 4], [], []],
        [[], [], [1], [2]],
    ],
)
def test_ragged_lists(values):
    source = Parquet(write_parquet("a.parquet", {"c": pa.array(values, pa.list_(pa.int64()))}, row_group_size=2))
    for rows in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0], [1, 3], [2, 3], [0]):
        assert listed(source, rows) == [values[row] for row in rows]


def test_fill_null():
    columns = {"i": [1, None, 3], "f": [0.5, None, 1.5], "b": [True, None, False]}
    source = Parquet(write_parquet("a.parquet", columns), fill_null=0)
    assert read(source) == {"i": [1, 0, 3], "f": [0.5, 0, 1.5], "b": [True, False, False]}
    nothing = write_parquet("b.parquet", {"n": pa.nulls(2)})
    assert read(Parquet(nothing, fill_null=7)) == {"n": [7.0, 7.0]}


@pytest.mark.parametrize("fill_null", [0.5, float("nan"), 1e30])
def test_a_fill_value_that_the_column_cannot_hold(fill_null):
    source = Parquet(write_parquet("a.parquet", {"i": [1, None, 3]}), fill_null=fill_null)
    with pytest.raises(DataError, match=r"a.parquet: .*'i'"):
        source.take(np.arange(3))


# --- Parquet: errors ---


def test_a_null_names_file_column_and_row():
    write_parquet("a.parquet", {"x": [1, 2]})
    write_parquet("b.parquet", {"x": [1, 2, 3, 4, 5, None]}, row_group_size=4)
    # Row 5 of the second file, in its row group of rows 4 and 5.
    with pytest.raises(DataError, match=r"b.parquet: column 'x' is null in row 5 \(1 nulls in the 2 rows from row 4\)"):
        Parquet(["a.parquet", "b.parquet"]).take(np.array([6]))


@pytest.mark.parametrize("values", [[[1], None], [[1], [None]]])
def test_a_null_in_or_instead_of_a_list(values):
    source = Parquet(write_parquet("a.parquet", {"x": values}), fill_null=0)
    with pytest.raises(DataError, match=r"a.parquet: column 'x' .*null"):
        source.take(np.arange(2))


def test_a_truncated_parquet_file():
    content = Path(write_parquet("a.parquet", {"x": list(range(1000))})).read_bytes()
    for size in (len(content) - 10, 100, 3):
        write("b.parquet", content[:size])
        with pytest.raises(DataError, match=r"b.parquet is no Parquet file that can be read"):
            Parquet("b.parquet")


def test_a_parquet_file_without_rows():
    with pytest.raises(DataError, match=r"a.parquet has columns but no rows"):
        Parquet(write_parquet("a.parquet", {"x": pa.array([], pa.int64())}))


def test_duplicate_columns_in_parquet():
    pq.write_table(pa.table([[1], [2]], names=["x", "x"]), "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet has more than one column named x"):
        Parquet("a.parquet")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"x": [1]}, "b.parquet has no column 'y', which a.parquet has"),
        ({"x": [1], "y": [2], "z": [3]}, "b.parquet has a column 'z', which a.parquet has not"),
        ({"x": [1], "y": ["2"]}, "b.parquet holds string in column 'y', where a.parquet holds int64"),
    ],
)
def test_parquet_files_that_differ_are_both_named(second, message):
    write_parquet("a.parquet", {"x": [1], "y": [2]})
    write_parquet("b.parquet", second)
    with pytest.raises(DataError, match=message):
        Parquet(["a.parquet", "b.parquet"])


def test_files_of_which_one_promises_to_have_no_nulls_agree():
    write_parquet("a.parquet", {"x": [1, 2]})
    write_parquet("b.parquet", {"x": [3]}, schema=pa.schema([pa.field("x", pa.int64(), nullable=False)]))
    assert read(Parquet(["a.parquet", "b.parquet"])) == {"x": [1, 2, 3]}


# --- select, cache, processes, identity ---


def test_files_may_have_their_columns_in_another_order():
    write_parquet("a.parquet", {"x": [1], "y": ["a"]})
    write_parquet("b.parquet", {"y": ["b"], "x": [2]})
    assert read(Parquet(["a.parquet", "b.parquet"])) == {"x": [1, 2], "y": ["a", "b"]}


def test_of_files_that_differ_the_common_columns_can_be_chosen():
    write_parquet("a.parquet", {"x": [1], "y": [2], "old": [1]})
    write_parquet("b.parquet", {"new": ["1"], "y": [4], "x": [3]})
    assert read(open_source("?.parquet", columns=["y", "x"])) == {"y": [2, 4], "x": [1, 3]}
    with pytest.raises(DataError, match=r"b.parquet has no column 'old'"):
        open_source("?.parquet", columns=["x", "old"])


def test_select_reads_only_these_columns():
    write_parquet("a.parquet", {"x": list(range(1000)), "y": list(range(1000))})
    column = pq.read_metadata("a.parquet").row_group(0).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    with open("a.parquet", "r+b") as file:
        file.seek(start)
        file.write(b"\xff" * column.total_compressed_size)  # destroys y
    with pytest.raises(DataError, match=r"a.parquet: row group 0 cannot be read"):
        Parquet("a.parquet").take(np.arange(3))
    assert read(Parquet("a.parquet").select(["x"]), [999, 0]) == {"x": [999, 0]}


@pytest.mark.parametrize("columns", [["c", "a"], ["b"]])
def test_select_keeps_the_order_asked_for(columns):
    values = {"a": [1, 2], "b": [3, 4], "c": ["x", "y"]}
    write("a.csv", "a,b,c\n1,3,x\n2,4,y\n")
    write_parquet("a.parquet", values)
    for path in ("a.csv", "a.parquet"):
        source = open_source(path)
        source.take(np.arange(2))  # fills a cache that the selection must not share
        selected = source.select(columns)
        assert list(selected.columns) == columns
        assert read(selected) == {name: values[name] for name in columns}
        assert read(source) == values


def test_the_cache_gives_back_what_it_keeps(monkeypatch):
    source = Parquet(write_parquet("a.parquet", {"x": list(range(100))}, row_group_size=10))
    decoded = []
    read_block = source._read_block
    monkeypatch.setattr(source, "_read_block", lambda handle, b: decoded.append(b) or read_block(handle, b))
    for _ in range(3):
        read(source)
    assert sorted(decoded) == list(range(10))  # all 10 blocks fit: each is decoded once
    monkeypatch.setattr(decoded_module, "CACHE_BYTES", 0)
    source = Parquet("a.parquet")
    for _ in range(2):
        assert read(source, [5, 95, 15, 25]) == {"x": [5, 95, 15, 25]}
        assert len(source._decoded) == 4  # what one call touches is kept in any case
        assert read(source, [50]) == {"x": [50]}
        assert len(source._decoded) == 1


def test_many_files_are_not_all_kept_open():
    paths = [write_parquet(f"{i:02}.parquet", {"x": [i]}) for i in range(40)]
    source = Parquet(paths)
    read_in_any_order(source, {"x": list(range(40))})
    assert 1 < len(source._handles.opened) <= 16


def sources_of_three_blocks():
    rows = 3 * 4096  # three blocks of a CSV file
    write("a.csv", "id\n" + "".join(f"{i}\n" for i in range(rows)))
    write_parquet("a.parquet", {"id": list(range(rows))}, row_group_size=4096)
    np.save("a.npy", np.array([(i,) for i in range(rows)], [("id", "i8")]))
    return [open_source(path) for path in ("a.csv", "a.parquet", "a.npy")]


def test_a_source_pickles_small_even_after_it_was_read():
    for source in sources_of_three_blocks():
        source.take(np.arange(len(source)))
        pickled = pickle.dumps(source)
        assert len(pickled) < 10_000, source
        copy = pickle.loads(pickled)
        assert read(copy, [12_287, 0]) == {"id": [12_287, 0]}
        assert copy.fingerprint() == source.fingerprint()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_source_reads_in_another_process(method):
    sources = sources_of_three_blocks()
    for source in sources:
        source.take(np.array([5000]))  # opens its file here first
    with multiprocessing.get_context(method).Pool(1) as pool:
        for source in sources:
            taken = pool.apply(source.take, (np.array([12_287, 0, 5000]),))
            assert taken["id"].tolist() == [12_287, 0, 5000]


def test_a_fingerprint_is_that_of_the_bytes_and_not_of_the_clock():
    for source in sources_of_three_blocks():
        (path,) = source.paths
        before = source.fingerprint()
        assert source.select(["id"]).fingerprint() == before
        Path("copy").mkdir(exist_ok=True)
        shutil.copy(path, "copy")
        os.utime(f"copy/{path}", ns=(0, 0))
        assert open_source(f"copy/{path}").fingerprint() == before
        for index in (1000, -1):
            content = bytearray(Path(path).read_bytes())
            content[index] ^= 1  # as many bytes
            write(f"copy/{path}", bytes(content))
            assert file_identity(f"copy/{path}") != file_identity(path)


def test_the_ends_of_a_long_file_tell_it_from_another():
    size = 200 << 10
    identities = []
    for changed in (None, 0, (64 << 10) - 1, size - (64 << 10), size - 1):
        content = bytearray(size)
        if changed is not None:
            content[changed] = 1
        write("long.npy", bytes(content))
        identities.append(file_identity("long.npy"))
    assert len(set(identities)) == 5


# --- open_source ---


def test_a_directory_stands_for_its_files_sorted_by_name():
    Path("data").mkdir()
    for index, name in enumerate(["a.csv", "b.CSV", "c.csv"]):
        write(f"data/{name}", f"id\n{index}\n")
    for ignored in ("_SUCCESS", ".d.csv", "_e.csv", "README.md"):
        write(f"data/{ignored}", "id\n9\n")
    for path in ("data", Path("data"), ["data"]):
        assert read(open_source(path)) == {"id": [0, 1, 2]}
    assert read(open_source("data/*.csv")) == {"id": [0, 2]}
    assert read(open_source(["data/c.csv", Path("data/a.csv")])) == {"id": [2, 0]}  # a list is not sorted


def test_a_name_that_looks_like_a_glob_may_be_a_file():
    write("a[1].csv", "id\n5\n")
    assert read(open_source("a[1].csv")) == {"id": [5]}


@pytest.mark.parametrize(
    ("path", "kind"), [("a.csv", Csv), ("a.tsv", Csv), ("a.parquet", Parquet), ("a.pq", Parquet), ("a.npy", Npy)]
)
def test_the_suffix_names_the_format(path, kind):
    if kind is Csv:
        write(path, "id\n1\n")
    elif kind is Parquet:
        write_parquet(path, {"id": [1]})
    else:
        np.save(path, np.array([1]))
    assert isinstance(open_source(path), kind)


def test_columns_and_fill_null_are_passed_on():
    write("a.csv", "a,b,c\n1,,3\n4,5,6\n")
    assert read(open_source("a.csv", columns=["b"], fill_null=-1)) == {"b": [-1, 5]}


def test_paths_that_lead_nowhere():
    Path("mixed").mkdir()
    Path("nothing").mkdir()
    write("mixed/a.csv", "id\n1\n")
    write_parquet("mixed/b.parquet", {"id": [1]})
    write("nothing/notes.txt", "x")
    write("empty.csv", "")
    write("data.json", "[]")
    for path, message in [
        ("missing.csv", "missing.csv is not there"),
        (["mixed/a.csv", "missing.csv"], "missing.csv is not there"),
        ("missing.npy", "missing.npy is not there"),
        ("*.parquet", r"\*.parquet matches no file"),
        ("mixed", r"mixed: found 2 files with the suffixes \['.csv', '.parquet'\]"),
        ("nothing", "nothing is a directory without a file of a known format.*notes.txt"),
        ("empty.csv", r"empty.csv is empty \(0 bytes\)"),
        ("data.json", r"data.json: .*\['.json'\]; a dataset is files of one format out of .csv, .tsv, .jsonl"),
        ([], "found 0 files"),
    ]:
        with pytest.raises(DataError, match=message):
            open_source(path)


@pytest.mark.parametrize("path", ["a.csv", "a.parquet", "a.npy"])
def test_an_unknown_column_is_met_with_the_nearest_name(path):
    write("a.csv", "id,label\n1,2\n")
    write_parquet("a.parquet", {"id": [1], "label": [2]})
    np.save("a.npy", np.array([(1, 2)], [("id", "i8"), ("label", "i8")]))
    with pytest.raises(DataError, match=rf"{path} has no column 'labl'; did you mean 'label'\? It has: id, label"):
        open_source(path, columns=["id", "labl"])
    with pytest.raises(DataError, match=f"{path} has no column 'zzz'.* [Ii]t has: id, label"):
        open_source(path, columns=["zzz"])
