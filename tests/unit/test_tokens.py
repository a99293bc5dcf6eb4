"""Tokens: windows by the definition, written out in plain Python."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ddp_stream import StreamLoader
from ddp_stream.sources import DataError, Tokens
from ddp_stream.sources import tokens as tokens_module


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, tokens, dtype="<u2"):
    array = np.array(tokens, dtype)
    np.save(name, array) if name.endswith(".npy") else array.tofile(name)
    return name


def read(source, rows=None):
    taken = source.take(np.arange(len(source)) if rows is None else np.array(rows, np.int64))
    return [column.tolist() for column in taken.values()]


@pytest.mark.parametrize(("name", "dtype"), [("a.bin", "uint16"), ("a.bin", "uint32"), ("a.npy", "int64")])
@pytest.mark.parametrize(
    ("count", "stride", "starts"),
    # Windows of 4 + 1 tokens; the last one begins at count - 5 at the latest.
    [
        (20, None, [0, 4, 8, 12]),
        (21, None, [0, 4, 8, 12, 16]),
        (5, None, [0]),
        (9, 1, [0, 1, 2, 3, 4]),
        (20, 7, [0, 7, 14]),
    ],
)
def test_windows(name, dtype, count, stride, starts):
    source = Tokens(write(name, range(count), dtype), 4, stride, dtype=dtype if dtype != "int64" else "uint16")
    assert (len(source), source.columns) == (len(starts), ("tokens",))
    assert read(source) == [[list(range(start, start + 5)) for start in starts]]
    assert source.take(np.array([0]))["tokens"].dtype == dtype
    assert read(pickle.loads(pickle.dumps(source)), [len(starts) - 1])[0][0][0] == starts[-1]


def test_windows_do_not_cross_files():
    write("b.bin", range(100, 103))  # too short for a window
    source = Tokens([write("a.bin", range(10)), "b.bin", write("c.bin", range(200, 206))], 4)
    assert read(source) == [[[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [200, 201, 202, 203, 204]]]
    assert read(source, [2, 0]) == [[[200, 201, 202, 203, 204], [0, 1, 2, 3, 4]]]
    assert read(Tokens("*.bin", 4)) == read(source) == read(Tokens(".", 4))


@pytest.mark.parametrize("seed", range(20))
def test_windows_of_documents(seed, monkeypatch):
    """Every token but the first of its document is a target once; a document ends with 0."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(tokens_module, "_SCAN_TOKENS", int(rng.integers(1, 9)))
    length = int(rng.integers(1, 6))
    stride = None if seed % 2 else int(rng.integers(1, length + 1))
    expected = []
    for file in range(int(rng.integers(1, 4))):
        documents = [[*rng.integers(1, 100, rng.integers(0, 12)).tolist(), 0] for _ in range(int(rng.integers(1, 6)))]
        if rng.random() < 0.5:
            documents[-1] = documents[-1][:-1] or [5, 6]  # the last lacks its end
        write(f"{file}.bin", [token for document in documents for token in document])
        for document in documents:
            start = 0
            while len(document) - start >= 2:
                window = document[start : start + length + 1]
                expected.append((window + [0] * (length + 1 - len(window)), len(window)))
                if start + length + 1 >= len(document):
                    break
                start += stride or length
    if not expected:
        return
    source = Tokens("*.bin", length, stride, end_of_document=0)
    windows, lengths = read(source)
    assert list(zip(windows, lengths, strict=True)) == expected
    rows = rng.integers(0, len(expected), 30).tolist()
    assert read(source, rows) == [[expected[row][0] for row in rows], [expected[row][1] for row in rows]]
    if stride is None:
        targets = sum(len(window[1:count]) for window, count in expected)
        assert targets == sum(count - 1 for _, count in expected)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "a.bin is empty"),
        (b"abc", {}, "a.bin has 3 bytes, which is no multiple of the 2 of a token in uint16"),
        (b"abcdef", {"dtype": "uint32"}, "a.bin has 6 bytes, which is no multiple of the 4"),
        (b"abcdef", {}, r"a.bin has 3 tokens, which is too few for a window of sequence_length \+ 1 = 5"),
        (b"\0\0" * 9, {"end_of_document": 0}, "a.bin has 9 tokens, which is too few"),
    ],
)
def test_what_holds_no_window(content, options, message):
    Path("a.bin").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Tokens("a.bin", 4, **options)


def test_what_holds_no_tokens():
    np.save("a.npy", np.zeros((3, 3), np.int64))
    np.save("b.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"a.npy holds int64 of shape \(3, 3\)"):
        Tokens("a.npy", 1)
    with pytest.raises(DataError, match=r"b.npy holds float64"):
        Tokens("b.npy", 1)
    with pytest.raises(ValueError, match="sequence_length=0, stride=None"):
        Tokens("a.npy", 0)


def test_what_identifies_them():
    write("a.bin", range(100))
    prints = [Tokens("a.bin", *how).fingerprint() for how in [(4,), (5,), (4, 3), (4, 4, 7)]]
    assert len(set(prints)) == 4
    assert Tokens("a.bin", 4, 4).fingerprint() == prints[0]


def test_through_a_loader():
    loader = StreamLoader(Tokens(write("a.bin", range(4001)), 40), 16, num_workers=2)
    windows = torch.cat([batch["tokens"].long()[batch.weight > 0] for batch in loader])
    assert sorted(windows[:, 1:].flatten().tolist()) == list(range(1, 4001))
