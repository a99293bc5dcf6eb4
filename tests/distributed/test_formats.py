"""Every format on real ranks with real workers: every row once, with its own values, whatever the files look like."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import DDP_STREAM, ddp_stream, run_ranks, torchrun
from torch.utils.data import DataLoader, Dataset

from ddp_stream import StreamingDataset, StreamLoader, Topology, open_source
from ddp_stream.audit import Proof, Verdict
from ddp_stream.sources import ForwardOnly, HFDataset, Source, Tokens, TorchDataset
from ddp_stream.sources import text as text_module

SIZES = [37, 1, 0, 210, 1, 64, 0]  # rows of each file: uneven, single, and empty
TOTAL = sum(SIZES)


def text_lines(format_: str, rows: range) -> str:
    if format_ == "jsonl":
        return "\n" + "".join(f'{{"name":"row {row}","id":{row}}}\r\n\n' for row in rows)
    separator = "\t" if format_ == "tsv" else ","
    return "\ufeffname" + separator + "id\n" + "".join(f'"row\n{row}"{separator}{row}\n' for row in rows)


def write(folder: Path, format_: str, index: int, rows: range) -> None:
    """One file of `format_` with the column `id`; most have a column of strings, too."""
    path = folder / f"part-{index}.{format_}"
    table = pa.table({"id": pa.array(rows, pa.int64()), "name": pa.array([f"row {row}" for row in rows], pa.string())})
    kind = format_.split(".")[0]
    if kind in ("csv", "tsv", "jsonl"):
        content = text_lines(kind, rows).encode()
        if format_.endswith(".gz"):
            content = gzip.compress(content)
        elif format_.endswith(".zst"):
            content = pa.Codec("zstd").compress(content, asbytes=True)
        path.write_bytes(content)
    elif format_ == "parquet":
        pq.write_table(table, path, row_group_size=16, compression="zstd")
    elif format_ in ("arrow", "feather"):
        options = pa.ipc.IpcWriteOptions(compression="lz4" if format_ == "feather" else None)
        with pa.ipc.new_file(str(path), table.schema, options=options) as file:
            file.write_table(table, max_chunksize=16)
    elif format_ == "saved":
        datasets.Dataset(table).save_to_disk(path)
    elif format_ == "images":
        for row in rows:  # nothing decodes them
            image = folder / f"class {index}" / f"{row:05}.png"
            image.parent.mkdir(exist_ok=True)
            image.write_bytes(str(row).encode())
    elif format_ == "npy":
        np.save(folder / f"id-{index}.npy", np.arange(rows.start, rows.stop))
        np.save(folder / f"half-{index}.npy", np.arange(rows.start, rows.stop) / 2)
    elif format_ == "npz":
        np.savez_compressed(path, id=np.arange(rows.start, rows.stop))
    elif format_ == "tar":
        with tarfile.open(path, "w") as tar:
            for row in rows:
                for suffix in ("id", "txt"):
                    info = tarfile.TarInfo(f"{row:05}.{suffix}")
                    info.size = len(str(row))
                    tar.addfile(info, io.BytesIO(str(row).encode()))
    else:
        # Windows of 1 + 1 tokens: `rows + 1` tokens have `rows` windows, the first of which begins with the row's id.
        np.arange(rows.start, rows.stop + 1, dtype=np.uint16).tofile(path)


FORMATS = [
    "csv",
    "tsv",
    "csv.gz",
    "csv.zst",
    "jsonl",
    "jsonl.gz",
    "jsonl.zst",
    "parquet",
    "arrow",
    "feather",
    "npy",
    "npz",
    "tar",
    "images",
    "bin",
    "saved",  # by a Hugging Face Dataset
    "mapped",  # such ones, memory-mapped and concatenated
    "table",  # one in memory
    "torch",
    "forward",
]


def ids() -> Iterator[dict[str, int]]:
    return ({"id": row} for row in count())


class Rows(Dataset[dict[str, int]]):
    def __len__(self) -> int:
        return TOTAL

    def __getitem__(self, row: int) -> dict[str, int]:
        return {"id": row}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for format_ in FORMATS[: FORMATS.index("mapped")]:
        (folder / format_).mkdir()
        first = 0
        for index, size in enumerate(SIZES):
            if (
                format_ not in ("bin", "saved") or size
            ):  # 0 rows would be one token, of the next file, or no file at all
                write(folder / format_, format_, index, range(first, first + size))
            first += size
    return folder


@dataclass(frozen=True)
class Case:
    folder: str
    format_: str
    workers: int

    def source(self) -> Source:
        text_module.BLOCK_ROWS = 16
        path = f"{self.folder}/{self.format_}"
        if self.format_ == "bin":
            return Tokens(path, 1)
        if self.format_ == "torch":
            return TorchDataset(Rows())
        if self.format_ == "forward":
            return ForwardOnly(ids, TOTAL)
        saved = [f"{self.folder}/saved/part-{index}.saved" for index, size in enumerate(SIZES) if size]
        if self.format_ == "saved":
            return open_source(saved)
        if self.format_ in ("mapped", "table"):
            parts = [datasets.load_from_disk(part, keep_in_memory=self.format_ == "table") for part in saved]
            return HFDataset(datasets.concatenate_datasets(parts))
        return open_source(path)

    @property
    def column(self) -> str:
        """Where a row's id is."""
        return {"bin": "tokens", "images": "image"}.get(self.format_, "id")

    def ids(self, columns: Any) -> list[int]:
        values = columns[self.column]
        return [int(value) for value in (values[:, 0] if self.format_ == "bin" else values)]


def read(case: Case) -> tuple[list[int], list[int], Verdict]:
    """The rows of `StreamingDataset`, those of an epoch of `StreamLoader`, and its verdict."""
    source = case.source()
    samples = DataLoader(StreamingDataset(source), batch_size=None, num_workers=case.workers)
    plain = [int(sample["tokens"][0] if case.format_ == "bin" else sample[case.column]) for sample in samples]
    loader = StreamLoader(source, 48, num_workers=case.workers, seed=3)
    proof = Proof(loader.plan, Topology.detect())
    rows = []
    for batch in loader:
        assert case.ids(batch) == batch.rows.tolist()  # the values are those of the rows
        rows += batch.trained_rows.tolist()
        proof.record(batch)
    return plain, rows, proof.verdict(loader.order(0))


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_every_format_exactly_once(data: Path, world_size: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDP_STREAM_CACHE", str(data / "cache"))
    cases = [Case(str(data), format_, workers) for format_ in FORMATS]
    answers = run_ranks(read, world_size, cases)
    for index, case in enumerate(cases):
        by_rank = [answers[rank][index] for rank in range(world_size)]
        for kind in (0, 1):
            assert sorted(row for answer in by_rank for row in answer[kind]) == list(range(TOTAL)), case
        assert all(answer[2].exactly_once and answer[2].rows == TOTAL for answer in by_rank), case


def go_on(task: tuple[Case, int | None, Any]) -> tuple[list[int], Any]:
    case, steps, state = task
    loader = StreamLoader(case.source(), 48, num_workers=case.workers, seed=3)
    if state is not None:
        loader.load_state_dict(state)
    batches = list(islice(loader, steps))
    assert all(case.ids(batch) == batch.rows.tolist() for batch in batches)
    rows = [row for batch in batches for row in batch.trained_rows.tolist()]
    return rows, loader.state_dict()


@pytest.mark.slow
def test_every_format_goes_on_elsewhere(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDP_STREAM_CACHE", str(data / "cache"))
    first = run_ranks(go_on, 2, [(Case(str(data), format_, 1), 3, None) for format_ in FORMATS])
    states = [state for _, state in first[0]]
    rest = run_ranks(go_on, 3, [(Case(str(data), f, 2), 1, state) for f, state in zip(FORMATS, states, strict=True)])
    states = [state for _, state in rest[0]]
    last = run_ranks(go_on, 1, [(Case(str(data), f, 0), None, state) for f, state in zip(FORMATS, states, strict=True)])
    for index, format_ in enumerate(FORMATS):
        rows = [row for answers in (*first, *rest, *last) for row in answers[index][0]]
        assert sorted(rows) == list(range(TOTAL)), format_


@pytest.mark.slow
def test_every_format_from_the_command_line(data: Path, tmp_path: Path) -> None:
    source = "--data.source=ddp_stream.sources."
    options = {
        "bin": [f"{source}Tokens", f"--data.source.path={data}/bin", "--data.source.sequence_length=1"],
        "torch": [f"{source}TorchDataset", "--data.source.dataset=test_formats.Rows"],
        "forward": [f"{source}ForwardOnly", "--data.source.open=test_formats.ids", f"--data.source.rows={TOTAL}"],
        "saved": [f"--data.path=[{', '.join(f'{data}/saved/part-{i}.saved' for i, size in enumerate(SIZES) if size)}]"],
        "parquet": [f"--data.path={data}/parquet/*.parquet"],
        "arrow": [f"--data.path+={data}/arrow/part-0.arrow", f"--data.path+={data}/arrow/part-[1-9].arrow"],
    }
    env = {
        "PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parent}",
        "DDP_STREAM_CACHE": str(data / "cache"),
    }
    for format_ in FORMATS:
        if format_ not in ("mapped", "table"):  # these are objects of Python
            arguments = options.get(format_, [f"--data.path={data}/{format_}"])
            job = ddp_stream("audit", *arguments, "--data.global_batch_size=48", cwd=tmp_path, env=env)
            assert job.code == 0, (format_, job.err)
            assert f"rows {TOTAL}  missing 0  duplicates 0  exactly once" in job.out, format_


# --- bad rows, rows left out and a transform, from the command line ---

MODULE = """
class Sum:
    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def __call__(self, columns):
        return {"features": columns["x"][:, None] * self.scale, "label": columns["y"]}
"""


def test_bad_rows_are_excluded_on_every_rank(tmp_path: Path) -> None:
    lines = ["x,y", *(f"{row / 10},{row}" for row in range(300))]
    lines[1 + 7] = "0.5,five"
    lines[1 + 299] = "1"
    (tmp_path / "a.csv").write_text("\n".join(lines))
    (tmp_path / "my_module.py").write_text(MODULE)
    env = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}", "DDP_STREAM_CACHE": str(tmp_path / "cache")}
    command = ["train", "--data.path", "a.csv", "--epochs", "1", "--run.dir", "run", "--data.exclude", "[3]"]
    command += ["--data.transform", "my_module.Sum", "--data.transform.scale", "2"]
    job = torchrun(DDP_STREAM, *command, "--data.on_bad_row", "skip", cwd=tmp_path, env=env)
    assert job.code == 0, job.err
    assert "exactly once: 297 rows, each exactly once, 3 excluded" in job.out
    excluded = [json.loads(line) for line in (tmp_path / "run" / "excluded.jsonl").read_text().splitlines()]
    assert [row["row"] for row in excluded] == [3, 7, 299]
    assert "a.csv, row 7: " in excluded[1]["reason"]
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (epoch,) = [event for event in events if event["event"] == "epoch"]
    assert (epoch["rows"], epoch["excluded"], epoch["left_out"], epoch["exactly_once"]) == (297, 3, 0, True)


PER_RANK = """
import os
import numpy as np
from ddp_stream.sources import InMemory

class PerRank(InMemory):
    def __init__(self):
        rows = 100 + int(os.environ["RANK"])
        super().__init__({"x": np.zeros((rows, 1), np.float32), "label": np.zeros(rows, np.float32)})
"""


@pytest.mark.slow
def test_ranks_that_see_different_data_do_not_train(tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(PER_RANK)
    env = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}"}
    job = torchrun(DDP_STREAM, "train", "--data.source", "my_module.PerRank", cwd=tmp_path, env=env)
    assert job.code != 0
    assert "rank 0 and rank 1 see different data in " in job.err
