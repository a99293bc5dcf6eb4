"""The cache: made once by one process, kept, made again when the data or the cached file changed."""

import gzip
import logging
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from ddp_stream.sources import Csv, DataError, cache, open_source


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDP_STREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_WORTH_BYTES", 0)


def files():
    return sorted(path.suffix for path in Path("cache").iterdir())


def write_csv(rows=5000):
    Path("a.csv").write_text("id\n" + "".join(f"{row}\n" for row in range(rows)))


def test_the_directory_is_where_the_environment_says(monkeypatch):
    assert cache.cache_dir() == Path(os.environ["DDP_STREAM_CACHE"])
    monkeypatch.delenv("DDP_STREAM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_dir() == Path("/x/ddp_stream")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache.cache_dir() == Path("/home/me/.cache/ddp_stream")


def test_an_index_is_made_once(monkeypatch):
    write_csv()
    first = Csv("a.csv")
    assert files() == [".index", ".lock"]
    monkeypatch.setattr(Csv, "_index", None)  # a second pass over the file would fail
    second = Csv("a.csv")
    assert second.blocks().tolist() == first.blocks().tolist() == [0, 4096, 5000]
    assert second.take(np.array([4999, 0]))["id"].tolist() == [4999, 0]
    assert second.select(["id"]).columns == ("id",)


def test_another_file_or_another_way_to_read_it_has_another_index():
    write_csv()
    Csv("a.csv")
    os.utime("a.csv", ns=(1, 1))  # as an editor leaves it that changed a byte in the middle
    Csv("a.csv")
    Csv("a.csv", delimiter=";")
    assert files().count(".index") == 3


@pytest.mark.parametrize("position", [0, 40, -1, None], ids=["digest", "header", "last byte", "truncated"])
def test_a_damaged_index_is_made_again(position, caplog):
    write_csv()
    Csv("a.csv")
    (path,) = Path("cache").glob("*.index")
    content = bytearray(path.read_bytes())
    if position is None:
        del content[len(content) // 2 :]
    else:
        content[position] ^= 1
    path.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        assert Csv("a.csv").take(np.array([4999]))["id"].tolist() == [4999]
    assert "is damaged (its checksum is wrong): the index of a.csv is made again" in caplog.text
    caplog.clear()
    Csv("a.csv")
    assert not caplog.text


def test_without_a_place_to_write_it_is_made_every_time(monkeypatch, caplog):
    write_csv()
    Path("file").write_text("")
    monkeypatch.setenv("DDP_STREAM_CACHE", "file/cache")
    assert len(Csv("a.csv")) == 5000
    assert "cannot be kept in file/cache" in caplog.text


def count_makes(path, makes):
    """Opens in a process of its own; every pass over the data appends a byte to `makes`."""
    index = Csv._index

    def slow_index(self, paths):
        with open(makes, "ab") as file:
            file.write(b"x")
        time.sleep(0.3)
        return index(self, paths)

    Csv._index = slow_index
    assert len(open_source(path)) == 5000


def test_of_many_processes_one_makes_it():
    write_csv()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_makes, args=("a.csv", "makes")) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert Path("makes").read_bytes() == b"x"


def make_and_hang(file):
    def make():
        with cache.written_whole(file) as temporary:
            temporary.write_bytes(b"half")
            Path("begun").touch()
            time.sleep(60)

    cache.load_or_make(file, cache.read_arrays, make, "something")


def test_a_killed_maker_leaves_no_lock_and_no_half_file(monkeypatch, caplog):
    file = cache.cache_dir() / "key.index"
    process = multiprocessing.get_context("fork").Process(target=make_and_hang, args=(file,))
    process.start()
    while not Path("begun").exists():
        time.sleep(0.01)
    monkeypatch.setattr(cache, "WAIT_S", 0.3)
    monkeypatch.setattr(cache, "_SAY_AFTER_S", 0.1)
    with pytest.raises(TimeoutError, match=r"another process has been making something.*key\.lock"):
        cache.load_or_make(file, cache.read_arrays, lambda: {}, "something")
    assert "waiting for another process that makes something" in caplog.text
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert files() == [".lock", ".tmp"]
    made = cache.load_or_make(file, cache.read_arrays, lambda: {"x": np.arange(3)}, "something")
    assert made["x"].tolist() == [0, 1, 2]
    assert files() == [".lock"]


def test_arrays_come_back_as_they_were():
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.zeros(0, np.uint8), "c": cache.as_array({"x": [1, "é"]})}
    cache.cache_dir().mkdir()
    cache.write_arrays(cache.cache_dir() / "x.index", arrays)
    read = cache.read_arrays(cache.cache_dir() / "x.index")
    assert read["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read["b"].shape == (0,)
    assert cache.from_array(read["c"]) == {"x": [1, "é"]}


def without_space(answers):
    """In a process of its own, in which no file may be longer than 1 KiB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    for path in ("a.csv", "a.csv.gz", "a.npz"):
        try:
            answers.put(len(open_source(path)))
        except DataError as error:
            answers.put(str(error))


def test_a_full_disk_while_it_is_made():
    write_csv(400_000)  # its index is longer than 1 KiB
    Path("a.csv.gz").write_bytes(gzip.compress(Path("a.csv").read_bytes()))
    np.savez_compressed("a.npz", id=np.arange(5000))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=without_space, args=(answers,))
    process.start()
    index, text, archive = (answers.get(timeout=60) for _ in range(3))
    process.join()
    assert index == 400_000  # made every time
    for answer, path in ((text, "a.csv.gz"), (archive, "a.npz")):
        assert answer.startswith(f"{path} is compressed")
        assert "File too large; name another directory with DDP_STREAM_CACHE" in answer
    assert set(files()) == {".lock"}  # nothing half-made is left
    assert len(open_source("a.csv.gz")) == 400_000
