"""What disks hold: odd names, wrong names, files that change or may not be read. Right values, or one clear line."""

import gzip
import io
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddp_stream.sources import Csv, DataError, Tokens, open_source

ROWS = 300


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDP_STREAM_CACHE", str(tmp_path / "cache"))


def write(path, suffix=None, ids=range(ROWS), column="id"):
    """A file in the format of `suffix` with one column of numbers."""
    table = pa.table({column: pa.array(ids, pa.int64())})
    suffix = suffix or Path(path).suffix
    Path(path).parent.mkdir(exist_ok=True)
    if suffix == ".parquet":
        pq.write_table(table, path, row_group_size=100)
    elif suffix == ".arrow":
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table, max_chunksize=100)
    elif suffix in (".npy", ".npz"):
        with open(path, "wb") as file:
            np.save(file, np.array(ids)) if suffix == ".npy" else np.savez(file, **{column: np.array(ids)})
    elif suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for row in ids:
                info = tarfile.TarInfo(f"{row:04}.{column}")
                info.size = len(str(row))
                tar.addfile(info, io.BytesIO(str(row).encode()))
    elif suffix == ".bin":
        np.array([*ids, 0], np.uint16).tofile(path)
    elif suffix == "images":
        for row in ids:
            Path(path, "class").mkdir(parents=True, exist_ok=True)
            Path(path, "class", f"{row:04}.png").write_bytes(str(row).encode())
    else:
        text = f"{column}\n" + "".join(f"{row}\n" for row in ids)
        if ".jsonl" in suffix:
            text = "".join(f'{{"{column}":{row}}}\n' for row in ids)
        Path(path).write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    return path


def read(source):
    (values,) = source.take(np.arange(len(source))).values()
    return [int(value) for value in values]


# --- names ---


@pytest.mark.parametrize(
    "name",
    ["X.PARQUET", "a b ü.csv", "x.snappy.parquet", "-x.csv", "--y.npy", "a[1].jsonl", "a*.csv", "~x.csv", "a\nb.csv"],
)
def test_odd_names(name):
    assert read(open_source(write(name, Path(name).suffix.lower()))) == list(range(ROWS))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".npy", ".npz", ".jsonl", "tar"])
def test_a_file_without_a_known_suffix_is_known_by_its_content(suffix):
    if suffix == "tar":
        write("part-0", ".tar")
        assert open_source("part-0").columns == ("__key__", "id")
        return
    for name in ("part-0", "part-1.json"):
        write(name, suffix, range(3))
    Path("notes").write_text("these are not data")
    assert read(open_source("part-0")) == [0, 1, 2] == read(open_source("part-1.json"))
    assert read(open_source(".")) == [0, 1, 2] * 2
    write("later.csv")
    assert len(open_source(".")) == ROWS  # as before where there is a suffix


@pytest.mark.parametrize(
    ("written", "named", "message"),
    [
        (".parquet", "a.csv", "a.csv begins like a .parquet file: is its name wrong"),
        (".csv.gz", "a.csv", "a.csv begins like a .gz file"),
        (".npy", "a.parquet", "a.parquet begins like a .npy file"),
        (".csv", "a.txt", r"\['.txt'\].* must be renamed"),
        (".csv", "a", r"\[''\].* must be renamed"),
        (".csv", "a.csv.bz2", r"\['.bz2'\].* must be decompressed"),
        (".csv.gz", "a.gz", r"\['.gz'\].* must be decompressed, and compressed text be named"),
        (".bin", "a.bin", "for tokens say --data.source ddp_stream.sources.Tokens --data.source.path a.bin"),
        (".csv", "a.json", r"one object a line"),
    ],
)
def test_a_wrong_name_is_told(written, named, message):
    with pytest.raises(DataError, match=message):
        open_source(write(named, written))


def test_the_delimiter_that_was_meant():
    Path("a.csv").write_text("a;b\n1;2\n")
    assert Csv("a.csv", delimiter=";").take(np.array([0]))["b"].tolist() == [2]
    assert Csv("a.csv", delimiter=",").columns == ("a;b",)


def test_links_and_paths(monkeypatch):
    write("data/a.csv")
    os.symlink("data/a.csv", "link.csv")
    os.symlink("data", "folder")
    os.symlink("nowhere.csv", "dangling.csv")
    os.symlink("loop.csv", "loop.csv")
    os.mkfifo("pipe.csv")
    monkeypatch.setenv("HOME", os.getcwd())
    for path in ("link.csv", "folder", "~/data", "~/data/*.csv"):
        assert read(open_source(path)) == list(range(ROWS))
    for path, message in [
        ("dangling.csv", "dangling.csv is not there, or is no file$"),
        ("loop.csv", "loop.csv is not there, or is no file"),
        ("pipe.csv", "pipe.csv is not there, or is no file"),
        ("s3://bucket/a.csv", "s3://bucket/a.csv is not there.* copy what is elsewhere, or mount it"),
        ("a\0.csv", "is not there, or is no file"),
        (4000 * "x" + ".csv", "is not there, or is no file"),
        ("", "the path is empty"),
        (".", "dangling.csv is not there"),  # and not the others without it
    ]:
        with pytest.raises(DataError, match=message):
            open_source(path)
    Path("deep/year=2020").mkdir(parents=True)
    write("deep/year=2020/a.csv")
    with pytest.raises(DataError, match=r"those in its directories, name deep/\*\*/\*.SUFFIX"):
        open_source("deep")
    assert len(open_source("deep/**/*.csv")) == ROWS


def test_an_image_folder_that_contains_itself():
    write("images", "images", range(3))
    os.symlink("../../images", "images/class/again")
    with pytest.raises(DataError, match="images/class/again leads back"):
        open_source("images")


# --- files that change, or go away, after they were opened ---

FORMATS = [".parquet", ".arrow", ".npy", ".npz", ".csv", ".jsonl", ".tar", "images", ".bin"]


def opened(path, suffix):
    """A source as it arrives in a worker: it knows the file, and has not opened it yet."""
    if suffix == ".bin":
        source = Tokens(path, 1)
    else:
        source = open_source(path)
        if suffix in (".tar", "images"):
            source = source.select(["id" if suffix == ".tar" else "image"])
    return pickle.loads(pickle.dumps(source))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("what", ["removed", "fewer rows", "other column"])
def test_a_file_that_is_another_one_by_now(suffix, what):
    path = write(f"data/a{suffix}", suffix)
    source = opened(path, suffix)
    if suffix == "images":
        Path(path, "class", "0007.png").unlink()
        message = "0007.png is not there any more"
    elif what == "removed":
        Path(path).unlink()
        message = "is not there any more|No such file"
    elif what == "fewer rows":
        write(path, suffix, range(10))
        message = "has changed since it was opened: |few for a window"
    else:
        if suffix not in (".parquet", ".arrow", ".npz", ".jsonl"):
            return  # the others know columns by their place
        write(path, suffix, column="other")
        message = "has changed since it was opened: |has no column 'id'|keys and types were found"
    with pytest.raises(DataError, match=message) as raised:
        source.take(np.arange(len(source)))
    assert path in str(raised.value)
    assert "\n" not in str(raised.value)


# --- files that may not be read ---


def as_nobody(paths, answers):
    if os.geteuid() == 0:
        os.setuid(65534)
    for path in paths:
        try:
            Tokens(path, 1) if path.endswith(".bin") else open_source(path)
            answers.put("read")
        except Exception as error:
            answers.put(f"{type(error).__name__}: {error}")


def test_permission_denied(tmp_path, monkeypatch):
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    monkeypatch.setenv("DDP_STREAM_CACHE", "cache")
    Path("cache").mkdir()
    Path("cache").chmod(0o777)
    paths = [write(f"a{suffix}", suffix) for suffix in (*FORMATS, ".csv.gz")]
    write("b/a.csv")
    os.chmod("aimages/class", 0)
    for path in (*paths, "b"):
        os.chmod(path, 0o555 if path == "aimages" else 0)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=as_nobody, args=([*paths, "b"], answers))
    process.start()
    for path in (*paths, "b"):
        assert f"DataError: {path} cannot be read: Permission denied; let user" in answers.get(timeout=60)
    process.join()


# --- wide ---


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".csv"])
def test_five_thousand_columns(suffix):
    table = pa.table({f"c{index}": [index, index + 1] for index in range(5000)})
    if suffix == ".parquet":
        pq.write_table(table, "a.parquet")
    elif suffix == ".arrow":
        with pa.ipc.new_file("a.arrow", table.schema) as file:
            file.write_table(table)
    else:
        names = ",".join(table.column_names)
        rows = [",".join(str(index + row) for index in range(5000)) for row in (0, 1)]
        Path("a.csv").write_text("\n".join([names, *rows]))
    taken = open_source(f"a{suffix}").take(np.array([1]))
    assert {name: values.tolist() for name, values in taken.items()} == {f"c{i}": [i + 1] for i in range(5000)}
