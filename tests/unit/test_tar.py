"""WebDataset shards: what Python's tarfile writes is what is read, and nothing that a tar file says is acted upon."""

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ddp_stream.sources import DataError, WebDataset, open_source
from ddp_stream.sources import tar as tar_module


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, members, format_=tarfile.PAX_FORMAT):
    """A tar file with `members`: pairs of a name and bytes, or TarInfo objects."""
    with tarfile.open(path, "w", format=format_) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def read(source, rows=None):
    return dict(source.take(np.arange(len(source)) if rows is None else np.array(rows, np.int64)))


def test_members_of_a_sample_are_columns():
    first = [("0.jpg", b"J0"), ("0.cls", b"7"), ("1.jpg", b"J1"), ("1.cls", b"8"), ("1.seg.png", b"S1")]
    second = [("a/2.cls", b"9"), ("a/2.JPG", b"")]
    source = open_source([write("a.tar", first), write("empty.tar", []), write("b.tar", second)])
    expected = {
        "__key__": ["0", "1", "a/2"],
        "jpg": [b"J0", b"J1", b""],
        "cls": [b"7", b"8", b"9"],
        "seg.png": [None, b"S1", None],
    }
    assert (len(source), source.columns) == (3, tuple(expected))
    assert read(source) == expected
    assert read(source, [2, 0, 2]) == {name: [values[i] for i in (2, 0, 2)] for name, values in expected.items()}
    cls = source.select(["cls"])
    assert read(pickle.loads(pickle.dumps(cls)), [1]) == {"cls": [b"8"]}
    assert cls.fingerprint() == source.fingerprint()


def test_samples_whose_members_are_apart():
    members = [(f"{i}.{suffix}", f"{suffix}{i}".encode()) for suffix in ("txt", "cls") for i in range(5)]
    assert read(WebDataset(write("a.tar", members)), [3])["cls"] == [b"cls3"]


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("seed", range(5))
def test_tar_files_of_all_dialects(format_, seed):
    rng = np.random.default_rng(seed)
    members = []
    for index in range(30):
        folder = "/".join("d" * rng.integers(1, 30) for _ in range(rng.integers(0, 4)))
        name = f"{folder}/{index:03}" + "x" * int(rng.integers(0, 60))
        if format_ != tarfile.USTAR_FORMAT:
            name += "é" * int(rng.integers(0, 150))
        members.append((f"{name.lstrip('/')}.bin", rng.bytes(int(rng.integers(0, 2000)))))
    source = WebDataset(write("a.tar", members, format_))
    assert read(source) == {"__key__": [name[:-4] for name, _ in members], "bin": [content for _, content in members]}


def test_blocks_are_runs_of_samples_of_one_shard(monkeypatch):
    monkeypatch.setattr(tar_module, "_BLOCK_BYTES", 1000)
    paths = [write(f"{shard}.tar", [(f"{i}.bin", bytes(400)) for i in range(6)]) for shard in range(2)]
    # 400-byte samples begin at 0, 400, 800 | 1200, 1600 | 2000.
    assert WebDataset(paths).blocks().tolist() == [0, 3, 5, 6, 9, 11, 12]


def test_hostile_names_and_kinds_are_harmless(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("secret")
    members = [
        ("../../escape.txt", b"1"),
        ("/etc/absolute.txt", b"2"),
        ("dir/../dots.txt", b"3"),
        special("link.txt", tarfile.SYMTYPE, str(outside)),
        special("hard.txt", tarfile.LNKTYPE, str(outside)),
        special("null.txt", tarfile.CHRTYPE),
        special("pipe.txt", tarfile.FIFOTYPE),
        special("folder.txt", tarfile.DIRTYPE),
        ("no_suffix", b"4"),
        (".hidden.txt", b"5"),
        ("last.txt", b"6"),
    ]
    Path("inner").mkdir()
    os.chdir("inner")
    source = WebDataset(write("a.tar", members))
    assert read(source) == {
        "__key__": ["../../escape", "/etc/absolute", "dir/../dots", "last"],
        "txt": [b"1", b"2", b"3", b"6"],
    }
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "inner", "outside"]


def with_header(content, offset, **fields):
    """`content` with fields of the header at `offset` set, and its checksum made right."""
    places = {"size": (124, 136), "kind": (156, 157)}
    content = bytearray(content)
    for name, value in fields.items():
        start, end = places[name]
        content[offset + start : offset + end] = value.ljust(end - start, b"\0")
    header = content[offset : offset + 512]
    total = sum(header) - sum(header[148:156]) + 8 * 32
    content[offset + 148 : offset + 156] = b"%06o\0 " % total
    return bytes(content)


def damaged(kind):
    whole = Path(write("whole.tar", [("0.txt", b"x" * 600), ("1.txt", b"y" * 600)])).read_bytes()
    second = 512 + 1024  # behind a header and 600 bytes in two blocks
    if kind == "cut off":
        return whole[: second + 700]
    if kind == "cut off in a header":
        return whole[: second + 100]
    if kind == "a flipped bit":
        return whole[: second + 3] + bytes([whole[second + 3] ^ 1]) + whole[second + 4 :]
    if kind == "huge size":
        return with_header(whole, second, size=b"77777777777")
    if kind == "huge binary size":
        return with_header(whole, second, size=b"\x80" + b"\x7f" * 11)
    if kind == "negative size":
        return with_header(whole, second, size=b"\xff" * 10 + b"\xfc\x00")
    if kind == "no number":
        return with_header(whole, second, size=b"12x")
    if kind == "sparse":
        return with_header(whole, second, kind=b"S")
    if kind == "huge extension":
        return with_header(whole + bytes(2 << 20), second, kind=b"x", size=b"%o" % (3 << 19))
    return {"gzip": gzip.compress(whole), "text": b"hello " * 1000, "empty": b""}[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut off", "the member at byte 1536 claims 600 bytes, and the file has 2236"),
        ("cut off in a header", "byte 1536 begins no member"),
        ("a flipped bit", "byte 1536 begins no member"),
        ("huge size", "the member at byte 1536 claims 8589934591 bytes"),
        ("huge binary size", "the member at byte 1536 claims"),
        ("negative size", "the member at byte 1536 claims -1024 bytes"),
        ("no number", "byte 1536 begins no member"),
        ("sparse", "is sparse"),
        ("huge extension", "the member at byte 1536 claims 1572864 bytes"),
        ("gzip", "byte 0 begins no member. A compressed one"),
        ("text", "byte 0 begins no member"),
        ("empty", "is empty"),
    ],
)
def test_damaged_shards_say_where(kind, message):
    Path("a.tar").write_bytes(damaged(kind))
    with pytest.raises(DataError, match=f"^a.tar.*{message}"):
        WebDataset("a.tar")


def test_what_else_is_no_dataset():
    with pytest.raises(DataError, match=r"a.tar has the member '0.TXT' twice"):
        WebDataset(write("a.tar", [("0.txt", b"a"), ("0.TXT", b"b")]))
    with pytest.raises(DataError, match=r"b.tar has no member with a name such as"):
        WebDataset(write("b.tar", [("README", b"a")]))


def test_a_shard_that_was_cut_off_after_it_was_opened():
    source = WebDataset(write("a.tar", [("0.txt", b"a" * 600)]))
    os.truncate("a.tar", 800)
    with pytest.raises(DataError, match=r"a.tar has changed since it was opened: it ends before byte 1112"):
        read(source)


def test_the_index_is_kept(monkeypatch):
    monkeypatch.setenv("DDP_STREAM_CACHE", "cache")
    monkeypatch.setattr("ddp_stream.sources.cache._WORTH_BYTES", 0)
    before = read(WebDataset(write("a.tar", [("0.txt", b"a"), ("é.txt", b"b")])))
    monkeypatch.setattr(tar_module, "_members", None)
    assert read(WebDataset("a.tar")) == before == {"__key__": ["0", "é"], "txt": [b"a", b"b"]}


def test_few_files_stay_open(monkeypatch):
    monkeypatch.setattr(tar_module, "_OPEN_FILES", 4)
    source = WebDataset([write(f"{i:02}.tar", [(f"{i}.txt", bytes([i]))]) for i in range(20)])
    before = len(os.listdir("/proc/self/fd"))
    assert read(source)["txt"] == [bytes([i]) for i in range(20)]
    assert len(os.listdir("/proc/self/fd")) <= before + 4
