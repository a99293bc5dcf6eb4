"""JSON Lines: the rows of Python's own json module, whatever the blocks, and errors that name file and row."""

import json
from pathlib import Path

import numpy as np
import pytest

from ddp_stream.sources import DataError, JsonLines, open_source
from ddp_stream.sources import text as text_module


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of three rows, found in portions of seven bytes."""
    monkeypatch.setattr(text_module, "BLOCK_ROWS", 3)
    monkeypatch.setattr(text_module, "_SCAN_BYTES", 7)


def write(name, content):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def read(source, rows=None):
    rows = np.arange(len(source)) if rows is None else np.array(rows, np.int64)
    taken = source.take(rows)
    return {name: column if isinstance(column, list) else column.tolist() for name, column in taken.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a":1,"b":"x"}\n{"a":2,"b":"y"}\n', {"a": [1, 2], "b": ["x", "y"]}),
        ('{"a":1}\n{"a":2}', {"a": [1, 2]}),  # no line end after the last row
        ('{"a":1}\r\n{"a":2}\r\n', {"a": [1, 2]}),
        ('\ufeff{"a":1}\n', {"a": [1]}),
        ('\n\n{"a":1}\n   \n\r\n\t\n{"a":2}\n\n', {"a": [1, 2]}),
        ('{"a":"line\\nline"}\n{"a":"\\"\\u00e9"}\n', {"a": ["line\nline", '"é']}),
        ('{"a":"x\u2028y\x7f"}\n{"a":"{}\\n{"}\n', {"a": ["x\u2028y\x7f", "{}\n{"]}),
        ('{"a":"odd \' quote"}\n{"a":"\\""}\n', {"a": ["odd ' quote", '"']}),
        ('{"a":[1,2]}\n{"a":[3,4]}\n', {"a": [[1, 2], [3, 4]]}),
        ('{"a":["x"]}\n{"a":[]}\n', {"a": [["x"], []]}),
        ('{"a":true}\n{"a":false}\n', {"a": [True, False]}),
        ('{"a":"x"}\n{"b":"y"}\n', {"a": ["x", None], "b": [None, "y"]}),  # strings may be missing
        ('{"b":1,"a":2}\n{"a":3,"b":4}\n', {"b": [1, 4], "a": [2, 3]}),
        ('{"a":"1970-01-01 00:00:05"}\n', {"a": [5]}),
    ],
)
def test_dialects(text, expected, small_blocks):
    source = JsonLines(write("a.jsonl", text))
    assert read(source) == expected
    assert source.columns == tuple(expected)


@pytest.mark.parametrize("seed", range(20))
def test_random_rows_blocks_and_portions(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(text_module, "BLOCK_ROWS", int(rng.integers(1, 6)))
    monkeypatch.setattr(text_module, "_SCAN_BYTES", int(rng.integers(1, 40)))
    pieces = ["x", ",", '"', "\n", "\r\n", " ", "é", "{", "}", "\\", "[1"]
    rows = [
        {
            "number": int(rng.integers(-100, 100)),
            "text": "t" + "".join(rng.choice(pieces, rng.integers(0, 6))),
            "half": float(rng.integers(-100, 100) + 0.5),
        }
        for _ in range(int(rng.integers(1, 40)))
    ]
    text = ""
    for row in rows:
        text += json.dumps(row, ensure_ascii=bool(rng.integers(2))) + str(rng.choice(["\n", "\r\n", "\n  \n"]))
    source = open_source(write("a.ndjson", text.rstrip() if rng.random() < 0.5 else text))
    assert read(source) == {name: [row[name] for row in rows] for name in rows[0]}
    chosen = rng.integers(0, len(rows), 50).tolist()
    assert read(source, chosen) == {name: [rows[row][name] for row in chosen] for name in rows[0]}
    assert read(source.select(["half"]), chosen) == {"half": [rows[row]["half"] for row in chosen]}


def test_types_widen_over_blocks_and_files(small_blocks):
    lines = ['{"n":1,"l":[],"t":"2020-01-01"}'] * 4 + ['{"n":2.5,"l":[1],"t":"x"}', '{"n":null,"l":[0.5],"t":null}']
    source = JsonLines(
        [write("a.jsonl", "\n".join(lines)), write("b.jsonl", '{"n":7,"l":[2],"t":"y"}\n')], fill_null=-1
    )
    assert source.take(np.array([0, 4, 5, 6]))["n"].tolist() == [1.0, 2.5, -1.0, 7.0]
    assert source.take(np.array([0, 4, 6]))["t"] == ["2020-01-01", "x", "y"]
    assert [list(row) for row in source.take(np.array([0, 4, 6]))["l"]] == [[], [1.0], [2.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.jsonl is empty"),
        ("\n \n", "a.jsonl has blank lines only"),
        ('{"a":1}\n{"a" 2}\n', "a.jsonl: JSON parse error: Missing a colon.* in row 1"),
        ('{"a":1}\n{"a":2\n', "a.jsonl: JSON parse error: Missing a comma.* in row 1"),
        ('{"a":1}\n{"a":"x"}\n', r"a.jsonl: .*Column\(/a\) changed from number to string in row 1"),
        ('{"a":1}\n[1]\n', "a.jsonl: .* in row 1"),
        (
            '{"a":1}{"a":2}\n',
            "a.jsonl: the 1 lines from row 0 on hold 2 rows; write the file again with one row a line",
        ),
        ('{"a":1}\n{}\n', "a.jsonl: column 'a' is null in row 1"),
        (b'{"a":"x"}\n{"a":"\xff"}\n', "a.jsonl: column 'a' is no UTF-8 text in row 1"),
        ('{\n"a":1\n}\n', "a.jsonl: the 3 lines from row 0 on hold 1 rows"),
        ("[1]\n", "a.jsonl: there is no object, and a row is an object of JSON on one line, in row 0"),
        ('{"a":1}\n'.encode("utf-16"), "a.jsonl is in UTF-16"),
    ],
)
def test_what_cannot_be_trained_on_says_why(text, message):
    write("a.jsonl", text)
    with pytest.raises(DataError, match=message):
        read(JsonLines("a.jsonl"))


def test_a_surprise_far_into_the_file_is_named_by_its_row(small_blocks, monkeypatch):
    monkeypatch.setattr(text_module, "_SAMPLED_BLOCKS", 2)  # the first and the last
    lines = [f'{{"a":{i},"b":"x"}}' for i in range(10)]
    for line, message in [
        ('{"a":1.5,"b":"x"}', "couldn't parse:1.5 in row 4"),
        ('{"a":"x","b":"x"}', "changed from number to string in row 4"),
        ('{"a":1,"b":"x","c":1}', "unexpected field in row 4"),
        ('{"a":1,"b":"x"', "in row 4"),
    ]:
        source = JsonLines(write("a.jsonl", "\n".join([*lines[:4], line, *lines[5:]])))
        with pytest.raises(DataError, match=f"a.jsonl: .*{message}.*--data.columns"):
            read(source)
        assert read(source, [0, 9])["a"] == [0, 9]
    source = JsonLines(write("a.jsonl", "\n".join([*lines[:4], '{"a":1,"b":"x","c":1}', *lines[5:]])))
    assert read(source.select(["b"])) == {"b": ["x"] * 10}


def test_files_that_differ_are_both_named():
    with pytest.raises(DataError, match=r"b.jsonl holds string in column 'a', where a.jsonl holds int64"):
        JsonLines([write("a.jsonl", '{"a":1}'), write("b.jsonl", '{"a":"x"}')])
