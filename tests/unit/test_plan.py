"""`plan` as a user meets it."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

import ddp_stream.deal
from ddp_stream.commands import plan
from ddp_stream.partition import span_starts


@pytest.fixture
def ask(capsys):
    def ask(*arguments):
        parser = plan.parser()
        code = plan.run(parser, parser.parse_args(list(arguments)))
        out, err = capsys.readouterr()
        return code, out, err

    return ask


def test_a_cluster_that_is_not_there(ask):
    code, out, _ = ask(
        "--rows", "100000000", "--world_size", "1024", "--data.num_workers", "8", "--data.global_batch_size", "8192"
    )
    assert code == 0
    assert "1,024 rank(s) x 8 worker(s) = 8,192 global workers on 128 node(s)" in out
    # 10^8 = 12,207 * 8,192 + 256; the last step has 8,192 - 256 empty slots.
    assert "12,208 steps of 8,192 rows" in out
    assert "7,936 empty slots" in out
    assert "97,656 to 97,664 rows an epoch" in out


def test_a_real_file_and_the_task_that_is_trained_on_it(ask, tmp_path):
    file = tmp_path / "rows.csv"
    pa.csv.write_csv(pa.table({"x": np.arange(100.0), "y": np.arange(100.0), "label": np.arange(100.0)}), file)
    code, out, _ = ask("--data.path", str(file), "--world_size", "2", "--checkpoint.every_steps", "1")
    assert code == 0
    assert "100 rows in 1 blocks, 20 B a row" in out  # 2 features, a label, an id: 3 * 4 + 8
    # 2 * 16 + 16 + 16 + 1 = 65 weights of 4 bytes, and Adam's two moments.
    assert "260 B of weights + 520 B of optimizer (adam)" in out
    assert "saved every 1 steps; a crash repeats at most 64 rows" in out


def test_a_step_and_a_row_agree(ask):
    cluster = ["--rows", "1000", "--world_size", "3", "--data.num_workers", "2", "--epoch", "4"]
    code, out, _ = ask(*cluster, "--find", "321")
    words = out.replace(",", "").split()
    step, rank, worker = (words[words.index(name) + 1] for name in ("step", "rank", "worker"))
    assert code == 0
    code, out, _ = ask(*cluster, "--step", step)
    (line,) = [line for line in out.splitlines() if f"rank {rank}, worker {worker}:" in line]
    assert code == 0
    rows = line.partition("rows ")[2].split()
    assert len(rows) <= 12 + 3
    assert "321" in rows or "more" in rows


def test_a_simulation_can_fail(ask, monkeypatch):
    cluster = ["--rows", "1000", "--world_size", "3", "--simulate"]
    code, out, _ = ask(*cluster)
    assert code == 0
    assert "all 1,000 rows through all 6 global workers: 1000 rows, each exactly once" in out
    monkeypatch.setattr(
        ddp_stream.deal, "span_starts", lambda steps, size, worker, count: span_starts(steps, size, 0, count)
    )
    code, out, _ = ask(*cluster)
    assert code == 1
    assert "missing rows" in out
    assert "rows seen again" in out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--world_size", "100"], "global_batch_size=64 is smaller than world_size=100"),
    (["--rows", "10", "--step", "1"], "--step 1: an epoch has the steps 0..0"),
    (["--rows", "10", "--find", "10"], "--find 10: the data has the rows 0..9"),
    (["--rows", "10", "--world_size", "0"], "--world_size 0: it must be at least 1"),
    (["--rows", "10", "--data.path", "x.csv"], "--rows 10 stands for data that is not there"),
    (["--rows", "10", "--data.num_workers", "auto"], "--data.num_workers auto measures data"),
    (["--data.path", "nowhere.csv"], "nowhere.csv is not there"),
    (["--rows", "0", "--plot", "x.png"], "an epoch without a step cannot be drawn"),
])  # fmt: skip
def test_there_is_no_such_plan(arguments, message, ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = ask(*arguments)
    assert code == 2
    assert message in err


def test_a_picture(ask, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is in the extra `dev`")
    file = tmp_path / "plan.png"
    code, _, _ = ask(
        "--rows", "4000", "--world_size", "2", "--data.lanes", "2", "--block_rows", "100", "--plot", str(file)
    )
    assert code == 0
    pixels = np.asarray(image.open(file).convert("RGB")).reshape(-1, 3)
    coloured = pixels[pixels.max(axis=1).astype(int) - pixels.min(axis=1) > 60]
    hues = set(map(tuple, (coloured // 64).tolist()))
    assert len(hues) >= 4  # two ranks, two shades of each


def test_a_picture_without_pillow(ask, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    code, _, err = ask("--rows", "4000", "--plot", str(tmp_path / "plan.png"))
    assert code == 2
    assert "pip install 'ddp_stream[images]'" in err


def test_workers_as_measured_here(ask):
    code, out, _ = ask("--world_size", "2", "--data.num_workers", "auto")  # synthetic rows cost nothing to read
    assert code == 0
    assert "2 rank(s) x 1 worker(s) = 2 global workers" in out
    assert "workers as auto would have it on this machine: 0" in out
    assert "no shared memory" in out
