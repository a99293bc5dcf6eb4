"""Compressed text: the rows of the plain file, read once, from a cache that is not believed when it is damaged."""

import gzip
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ddp_stream.sources import CompressedText, DataError, compressed, open_source
from ddp_stream.sources import text as text_module


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDP_STREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text_module, "BLOCK_ROWS", 3)


def write(name, content):
    content = content.encode() if isinstance(content, str) else content
    if name.endswith(".zst"):
        content = pa.Codec("zstd").compress(content, asbytes=True)
    elif name.endswith(".gz"):
        content = gzip.compress(content)
    Path(name).write_bytes(content)
    return name


def read(source, rows=None):
    taken = source.take(np.arange(len(source)) if rows is None else np.array(rows, np.int64))
    return {name: column if isinstance(column, list) else column.tolist() for name, column in taken.items()}


CSV = "a,b,c\n" + "".join(f'{i},{i / 2},"x, {i}"\n' for i in range(10))
TSV = CSV.replace(",", "\t").replace("x\t", "x,")
JSONL = "".join(f'{{"a":{i},"b":{i / 2},"c":"x, {i}"}}\n' for i in range(10))


@pytest.mark.parametrize("codec", [".gz", ".zst"])
@pytest.mark.parametrize(("suffix", "text"), [(".csv", CSV), (".TSV", TSV), (".jsonl", JSONL), (".ndjson", JSONL)])
def test_rows_are_those_of_the_plain_file(suffix, text, codec):
    plain, packed = open_source(write(f"a{suffix}", text)), open_source(write(f"a{suffix}{codec}", text))
    assert isinstance(packed, CompressedText)
    assert packed.columns == plain.columns == ("a", "b", "c")
    rng = np.random.default_rng(0)
    for rows in (None, [], [9], rng.integers(0, 10, 30).tolist()):
        assert read(packed, rows) == read(plain, rows)
        assert read(packed.select(["c"]), rows) == read(plain.select(["c"]), rows)
    assert sorted(path.suffix for path in Path("cache").iterdir()) == [".arrows", ".index", ".lock"]
    with pa.ipc.open_stream(next(Path("cache").glob("*.arrows"))) as stream:  # for any other tool
        assert stream.read_all().num_rows == 10


def test_several_files_share_types():
    write("d-0.csv.gz", "a\n1\n2\n")
    write("d-1.csv.gz", "a\n")
    write("d-2.csv.gz", "a\n3.5\n")
    source = open_source("d-*.csv.gz")
    assert read(source) == {"a": [1.0, 2.0, 3.5]}
    assert source.take(np.array([0]))["a"].dtype == np.float64


def test_it_is_read_once(monkeypatch):
    before = open_source(write("a.csv.gz", CSV))
    monkeypatch.setattr(compressed, "_decompress", None)
    again = open_source("a.csv.gz")
    assert again.fingerprint() == before.fingerprint() == pickle.loads(pickle.dumps(again)).fingerprint()
    assert read(again, [9, 0])["a"] == [9, 0]


def test_many_processes_read_it_once():
    write("a.csv.gz", CSV)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        sources = pool.map(open_source, ["a.csv.gz"] * 8)
    assert {tuple(read(source)["a"]) for source in sources} == {tuple(range(10))}
    assert sorted(path.suffix for path in Path("cache").iterdir()) == [".arrows", ".index", ".lock"]


def test_a_damaged_copy_is_made_again(caplog):
    source = open_source(write("a.csv.gz", CSV))
    expected = read(source)
    (copy,) = Path("cache").glob("*.arrows")
    whole = copy.read_bytes()
    for damage in ("flip", "truncate", "remove"):
        caplog.clear()
        content = bytearray(whole)
        content[len(content) // 2] ^= 1
        copy.unlink()
        if damage != "remove":
            copy.write_bytes(content[: len(content) // 2] if damage == "truncate" else content)
        assert read(open_source("a.csv.gz")) == expected
        assert copy.read_bytes() == whole
        assert ("is damaged" in caplog.text) == (damage != "remove")
    opened = open_source("a.csv.gz")
    copy.unlink()
    assert read(opened) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv.gz", gzip.compress(CSV.encode())[:-20], "a.csv.gz cannot be decompressed"),
        ("a.csv.gz", b"no gzip file", "a.csv.gz cannot be decompressed"),
        ("a.csv.zst", b"no zstd file", "a.csv.zst cannot be decompressed"),
        ("a.csv.gz", gzip.compress(b""), r"^a.csv.gz is empty \(0 bytes\)"),
        ("a.csv.gz", gzip.compress(b"a,b\n1,2\n3,4\n5,6\n7,8,9\n"), r"^a.csv.gz: .*row 3: Expected 2 columns, got 3"),
        ("a.jsonl.gz", gzip.compress(b'{"a":1}\n{"a"'), r"^a.jsonl.gz: .* in row 1"),
    ],
)
def test_what_cannot_be_read_says_why(name, content, message):
    Path(name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(name)
    assert [path.suffix for path in Path("cache").iterdir()] == [".lock"]  # nothing half-made is left


def test_parts_compressed_one_by_one_are_one_file():
    Path("a.csv.gz").write_bytes(gzip.compress(b"a\n1\n") + gzip.compress(b"2\n3\n"))
    assert read(open_source("a.csv.gz")) == {"a": [1, 2, 3]}
    codec = pa.Codec("zstd")
    Path("b.csv.zst").write_bytes(codec.compress(b"a\n1\n", asbytes=True) + codec.compress(b"2\n3\n", asbytes=True))
    assert read(open_source("b.csv.zst")) == {"a": [1, 2, 3]}


def test_without_a_cache_directory(monkeypatch):
    Path("file").write_text("")
    monkeypatch.setenv("DDP_STREAM_CACHE", "file/cache")
    with pytest.raises(DataError, match=r"a.csv.gz is compressed.*file/cache.*DDP_STREAM_CACHE"):
        open_source(write("a.csv.gz", CSV))


def test_a_null_names_the_compressed_file():
    source = open_source(write("a.csv.gz", "a,b\n1,2\n1,2\n1,2\n1,2\n,3\n"))
    with pytest.raises(DataError, match=r"a.csv.gz: column 'a' is null in row 4"):
        source.take(np.array([4]))
    assert read(open_source("a.csv.gz", fill_null=0), [4]) == {"a": [0], "b": [3]}
