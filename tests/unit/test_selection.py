"""Rows that are left out: the ones named, and the ones that cannot be read; all others stay as they were."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddp_stream.sources import Csv, DataError, InMemory, exclude, open_source, selection, skip_bad_rows
from ddp_stream.sources import text as text_module
from ddp_stream.sources.base import before
from ddp_stream.sources.transformed import Transformed
from ddp_stream.transforms import DecodeImages


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDP_STREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text_module, "BLOCK_ROWS", 4)


def read(source, rows=None):
    taken = source.take(np.arange(len(source)) if rows is None else np.array(rows, np.int64))
    return {name: column if isinstance(column, list) else column.tolist() for name, column in taken.items()}


def sources(rows):
    """The same rows in every kind of source that leaves rows out in a way of its own."""
    table = pa.table({"id": list(range(rows))})
    Path("a.csv").write_text("id\n" + "\n".join(map(str, range(rows))))
    Path("a.jsonl").write_text("\n".join(f'{{"id":{row}}}' for row in range(rows)))
    pq.write_table(table, "a.parquet", row_group_size=4)
    with pa.ipc.new_file("a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=4)
    np.save("a.npy", np.array([(row,) for row in range(rows)], [("id", "i8")]))
    files = [open_source(f"a.{suffix}") for suffix in ("csv", "jsonl", "parquet", "arrow", "npy")]
    return [*files, InMemory({"id": np.arange(rows)})]


def test_ids_before_rows_were_left_out():
    rng = np.random.default_rng(0)
    for _ in range(50):
        total = int(rng.integers(1, 30))
        dropped = np.flatnonzero(rng.random(total) < rng.random())
        kept = np.delete(np.arange(total), dropped)
        assert before(np.arange(len(kept)), dropped).tolist() == kept.tolist()


@pytest.mark.parametrize("dropped", [[0], [18], [4, 5, 6, 7], [0, 1, 3, 8, 9, 17, 18], list(range(18))])
def test_the_other_rows_stay_as_they_were(dropped):
    kept = [row for row in range(19) if row not in dropped]
    for source in sources(19):
        left = exclude(source, dropped)
        assert len(left) == len(kept)
        assert read(left) == {"id": kept}
        rows = np.random.default_rng(0).integers(0, len(kept), 30).tolist()
        assert read(left, rows) == {"id": [kept[row] for row in rows]}
        assert dict(left.excluded) == dict.fromkeys(dropped, "left out by choice")
        assert dict(left.select(["id"]).excluded) == dict(left.excluded)
        if left.blocks() is not None:
            assert left.blocks().tolist() == [sum(row < bound for row in kept) for bound in source.blocks().tolist()]
        copy = pickle.loads(pickle.dumps(left))
        assert read(copy, [0]) == {"id": kept[:1]}
        assert copy.fingerprint() == left.fingerprint()
        if source.stamp() is not None:
            assert (
                len({source.fingerprint(), left.fingerprint(), exclude(source, [*dropped[1:], 1]).fingerprint()}) == 3
            )


def test_what_is_left_out_twice_is_known_by_its_first_id():
    for source in sources(10):
        left = exclude(exclude(source, {2: "a", 5: "b"}), {2: "c", 7: "d"})  # 0 1 3 4 6 7 8 9: 3 and 9
        assert dict(sorted(left.excluded.items())) == {2: "a", 3: "c", 5: "b", 9: "d"}
        assert read(left) == {"id": [0, 1, 4, 6, 7, 8]}
        again = exclude(left, selection.present(left, [3, 4, 8]))
        assert read(again) == {"id": [0, 1, 6, 7]}


def test_rows_that_are_not_there_cannot_be_left_out():
    for row in (-1, 10):
        with pytest.raises(ValueError, match=rf"row {row} cannot be left out: .* has the rows 0\.\.9"):
            exclude(sources(10)[0], [row])
    source = sources(10)[0]
    assert exclude(source, []) is source


# --- bad rows ---

CSV = ["id,x,s", "0,0.5,a", "1,one,b", "2,1.5,c", "3,,d", "4,2.5", "5,3.5,f", "6,4.5,g,h", "7,5.5,i", "8,6.5,j"]
CSV += [f"{row},{row}.5,k" for row in range(9, 40)]
JSONL = [
    '{"id":0,"x":0.5}',
    '{"id":1,"x":"one"}',
    '{"id":2',
    '{"id":3,"x":null}',
    '{"id":4,"x":1.5}{"id":4,"x":1.5}',
    '{"id":5,"x":1}',
    "[1]",
    '{"id":7,"x":1,"y":1}',
    '{"id":8,"x":2.5}',
]


def test_bad_rows_of_csv():
    Path("a.csv").write_text("\n".join(CSV))
    with pytest.raises(DataError, match=r"a.csv: .*row 4"):
        open_source("a.csv")
    source = open_source("a.csv", on_bad_row="skip")
    assert read(source)["id"] == [0, 2, 5, 7, 8, *range(9, 40)]
    assert read(source)["x"][:3] == [0.5, 1.5, 3.5]
    reasons = source.excluded
    assert sorted(reasons) == [1, 3, 4, 6]
    assert "a.csv, row 1: " in reasons[1]
    assert "'one'" in reasons[1]
    assert reasons[3] == "a.csv, row 3: column 'x' is null"
    assert "a.csv, row 4: " in reasons[4]
    assert "Expected 3 columns, got 2" in reasons[4]
    assert "row 6: Expected 3 columns, got 4" in reasons[6]
    assert sorted(open_source("a.csv", fill_null=0, on_bad_row="skip").excluded) == [1, 4, 6]
    assert sorted(open_source("a.csv", columns=["id"], on_bad_row="skip").excluded) == [4, 6]


def test_bad_rows_of_json_lines():
    Path("a.jsonl").write_text("\n".join(JSONL))
    Path("b.jsonl").write_text('{"id":9,"x":0.5}\n\n{"id":10,"x":true}\n')
    source = open_source(["a.jsonl", "b.jsonl"], columns=["id", "x"], on_bad_row="skip")
    assert read(source) == {"id": [0, 5, 7, 8, 9], "x": [0.5, 1.0, 1.0, 2.5, 0.5]}
    reasons = source.excluded
    assert sorted(reasons) == [1, 2, 3, 4, 6, 10]
    assert "b.jsonl, row 1: " in reasons[10]
    assert "hold 2 rows" in reasons[4]


def test_bad_rows_of_compressed_text():
    import gzip

    Path("a.csv").write_text("\n".join(CSV))
    Path("a.csv.gz").write_bytes(gzip.compress("\n".join(CSV).encode()))
    plain, packed = (open_source(name, on_bad_row="skip") for name in ("a.csv", "a.csv.gz"))
    assert read(packed) == read(plain)
    assert dict(packed.excluded) == {row: why.replace("a.csv", "a.csv.gz") for row, why in plain.excluded.items()}
    assert packed.fingerprint() != plain.fingerprint()


def test_bad_rows_of_parquet_and_arrow():
    lists = [[1, 2]] * 6 + [[3, None]] + [[5, 6]] * 3
    table = pa.table({"id": range(10), "x": [0.5, None, 1.5, 2.5, None, None, None, None, 3.5, 4.5], "l": lists})
    pq.write_table(table, "a.parquet", row_group_size=4)
    with pa.ipc.new_file("b.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=4)
    for path in ("a.parquet", "b.arrow"):
        source = open_source(path, on_bad_row="skip")
        assert read(source) == {"id": [0, 2, 3, 8, 9], "x": [0.5, 1.5, 2.5, 3.5, 4.5], "l": [[1, 2]] * 3 + [[5, 6]] * 2}
        assert sorted(source.excluded) == [1, 4, 5, 6, 7]
        assert source.excluded[4] == f"{path}, row 4: column 'x' is null"
        only = open_source(path, columns=["l"], on_bad_row="skip")
        assert list(only.excluded) == [6]
        assert "null inside a list" in only.excluded[6]


def test_bad_rows_are_found_once(monkeypatch):
    Path("a.csv").write_text("\n".join(CSV))
    before = open_source("a.csv", on_bad_row="skip")
    monkeypatch.setattr(Csv, "bad_rows", None)
    again = open_source("a.csv", on_bad_row="skip")
    assert dict(again.excluded) == dict(before.excluded)
    assert read(again) == read(before)


def half(columns):
    x = np.asarray(columns["x"])
    if (x % 7 == 3).any():
        raise ValueError(f"no half of {x[x % 7 == 3][0]}")
    return {"half": x / 2}


def test_bad_rows_of_a_transform(monkeypatch):
    monkeypatch.setattr(selection, "_ROWS_AT_ONCE", 16)
    source = skip_bad_rows(Transformed(exclude(InMemory({"x": np.arange(100)}), [0, 50]), half))
    bad = [row for row in range(100) if row % 7 == 3]
    assert read(source) == {"half": [row / 2 for row in range(1, 100) if row != 50 and row not in bad]}
    assert sorted(source.excluded) == sorted([0, 50, *bad])
    assert source.excluded[3] == "InMemory(100 rows), row 3: the transform test_selection.half fails: no half of 3"


def test_a_transform_that_fails_names_file_and_row():
    Path("a.csv").write_text("x\n" + "2\n" * 5)
    Path("b.csv").write_text("x\n" + "2\n" * 5 + "3\n" + "4\n")
    whole = open_source(["a.csv", "b.csv"])
    for source in (whole, exclude(whole, [0, 6, 7]), exclude(whole.select(["x"]), {3: "?"})):
        with pytest.raises(DataError, match=r"^b.csv, row 5: the transform test_selection.half fails: no half of 3$"):
            Transformed(source, half).take(np.arange(len(source)))


def test_a_transform_that_fails_on_no_single_row():
    def few(columns):
        if len(columns["x"]) > 1:
            raise KeyError("many")
        return columns

    with pytest.raises(KeyError, match="many"):
        Transformed(InMemory({"x": np.arange(9)}), few).take(np.arange(9))


def test_bad_images_and_samples_are_named():
    png = io.BytesIO()
    pytest.importorskip("PIL.Image").new("RGB", (4, 4)).save(png, "PNG")
    for row in range(5):
        Path(f"images/{row % 2}").mkdir(parents=True, exist_ok=True)
        Path(f"images/{row % 2}/{row}.png").write_bytes(png.getvalue() if row != 3 else b"no image")
    with tarfile.open("a.tar", "w") as tar:
        for row in range(5):
            tar.add(f"images/{row % 2}/{row}.png", f"{row:04}.image")
    for path, left_out, name in [("images", 4, "images/1/3.png"), ("a.tar", 3, "a.tar, sample 0003")]:
        source = skip_bad_rows(Transformed(open_source(path), DecodeImages()))
        assert len(source) == 4
        assert list(source.excluded) == [left_out]
        assert source.excluded[left_out].startswith(f"{name}: the transform ddp_stream.transforms.DecodeImages fails: ")
        assert "8 bytes, beginning with b'no image'" in source.excluded[left_out]


def test_faults_that_are_not_those_of_rows_are_not_skipped():
    Path("a.csv").write_text("a,b\n" + "1,\n" * 10)
    table = pa.table({"a": pa.array([pa.MonthDayNano([1, 2, 3])] * 10)})
    with pa.ipc.new_file("a.arrow", table.schema) as file:
        file.write_table(table)
    with pytest.raises(DataError, match="no row can be read"):
        skip_bad_rows(Transformed(InMemory({"x": np.array([3])}), half))
    with pytest.raises(ValueError, match="no half of 3"):
        skip_bad_rows(Transformed(InMemory({"x": np.full(50, 3)}), half))
    with pytest.raises(DataError, match="type month_day"):
        open_source("a.arrow", on_bad_row="skip")
    assert len(open_source("a.csv", columns=["a"], on_bad_row="skip")) == 10


def test_a_transform_may_not_change_the_number_of_rows():
    source = Transformed(InMemory({"x": np.arange(10)}), lambda columns: {"x": columns["x"][:-1]})
    with pytest.raises(DataError, match="column 'x' has 3 values where 4 rows were asked for"):
        source.take(np.arange(4))
