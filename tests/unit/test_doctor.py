"""The doctor's judgement: facts as every rank gathers them, with one fault planted, and the finding that names it."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import socket
import threading
import time

import pytest

from ddp_stream.commands import doctor
from ddp_stream.doctor import checks
from ddp_stream.doctor.exchange import rounds
from ddp_stream.doctor.facts import Facts, gather
from ddp_stream.doctor.limits import InVain, limited
from ddp_stream.doctor.meeting import Meeting, MeetingError
from ddp_stream.doctor.network import is_here, own_interfaces, resolve

MIB = 1 << 20


@pytest.fixture(scope="module")
def gathered():
    """What one process finds out here, laid over a cluster of two machines with two ranks each."""
    return gather({}, {"seed": "0", "data.num_workers": "2"}, [])


@pytest.fixture
def cluster(gathered):
    ranks = []
    for rank in range(4):
        facts = copy.deepcopy(gathered)
        machine, local = divmod(rank, 2)
        facts.rank, facts.world_size, facts.local_rank = rank, 4, local
        facts.host, facts.network = ("ada", "bob")[machine], f"network {machine}"
        facts.launcher |= {"name": "torchrun", "agent_store": True, "nodes": 2, "local_world_size": 2}
        facts.launcher |= {"flags": {"nnodes": "2", "rdzv-endpoint": "ada:29400"}, "environment": {}, "broken": None}
        address = f"10.0.0.{machine + 1}"
        facts.net |= {
            "hostname": facts.host, "interfaces": {"lo": ["127.0.0.1"], "eth0": [address]}, "gloo": ["eth0", address],
            "gloo_named": None, "nccl_named": None, "head": "ada", "port": 29400, "head_addresses": ["10.0.0.1"],
            "head_error": None, "head_is_here": machine == 0, "route": ["eth0", address], "ephemeral": [32768, 60999],
        }  # fmt: skip
        facts.machine = {
            "cpu_list": [0, 1, 2, 3], "cpus": 4.0, "memory_bytes": 8000 * MIB, "shm_bytes": 1000 * MIB,
            "shm_total_bytes": 1000 * MIB, "open_files": 1024,
        }  # fmt: skip
        facts.devices = {"kind": "cpu", "count": 0, "ids": [], "near": []}
        facts.data = {
            "num_workers": 2, "source": "rows.csv", "rows": 1000, "fingerprint": "abc", "steps": 16, "foreseen": [],
            "shm_bytes": 20 * MIB, "memory_bytes": 150 * MIB, "messages_ahead": 4, "rows_per_s": 1e5, "bytes_per_s": 1e7,
            "read_s": 1.0,
        }  # fmt: skip
        facts.clock = {"ahead_s": 0.001 * machine, "error_s": 0.001} if local == 0 else {}
        facts.run_dir = (
            {"path": "/runs/a", "error": None, "seen_s": 0.01 if machine else None, "unseen": []} if local == 0 else {}
        )
        facts.exchange = {
            "error": None, "correct": True, "latency_s": 1e-4, "bytes_per_s": 1e9,
            "pairs": {str(peer): [1e-4, 1e9] for peer in range(rank + 1, 4)},
        }  # fmt: skip
        ranks.append(Facts(**json.loads(json.dumps(dataclasses.asdict(facts)))))
    return ranks


def judge(ranks):
    results = [result for check in doctor.CHECKS if (result := check(ranks)) is not None]
    return {
        (result.check, finding.level): (finding.what, finding.fix) for result in results for finding in result.findings
    }


def test_a_sound_cluster(cluster):
    assert judge(cluster) == {}
    assert {check(cluster) is None for check in doctor.CHECKS} == {True, False}  # requeue has nothing to say


def on(cluster, *ranks, **groups):
    """Plant values into groups of facts of some ranks: `net={"gloo": ...}`."""
    for rank in ranks:
        for group, values in groups.items():
            if isinstance(values, dict):
                getattr(cluster[rank], group).update(values)
            else:
                setattr(cluster[rank], group, values)


BOB = (2, 3)
ALL = (0, 1, 2, 3)
FAULTS = {
    "a promise": (
        lambda c: on(c, *ALL, launcher={"broken": "DDP_STREAM_WORLD_SIZE=8 processes were promised"}),
        "world size",
        "FATAL",
        "DDP_STREAM_WORLD_SIZE=8 processes were promised; started: 2 on ada, 2 on bob",
        "--nproc",
    ),
    "world sizes": (
        lambda c: on(c, 3, world_size=5),
        "world size",
        "FATAL",
        "rank 3 on bob believes in world_size=5, the others in 4",
        "same",
    ),
    "a world on every node": (
        lambda c: on(c, *ALL, launcher={"slurm_nodes": 2, "nodes": 1}),
        "world size",
        "FATAL",
        "Slurm allotted 2 nodes",
        "--rdzv",
    ),
    "signals": (
        lambda c: on(c, 0, launcher={"slurm_job": "7", "scontrol": "/bin/scontrol"}),
        "torchrun flags",
        "FATAL",
        "ada: a warning by SIGUSR1 would kill torchrun",
        "--signals-to-handle",
    ),
    "restarts": (
        lambda c: on(c, *ALL, launcher={"flags": {"max-restarts": "3"}}),
        "torchrun flags",
        "WARN",
        "--max-restarts 3",
        "0",
    ),
    "an unknown head": (
        lambda c: on(c, *BOB, net={"head_addresses": [], "head_error": "no such name"}),
        "head",
        "FATAL",
        "bob cannot resolve the head's name 'ada' (no such name)",
        "/etc/hosts",
    ),
    "a head on loopback": (
        lambda c: on(c, *BOB, net={"head_addresses": ["127.0.1.1"]}),
        "head",
        "FATAL",
        "on bob the head's name 'ada' is 127.0.1.1",
        "/etc/hosts",
    ),
    "two heads": (
        lambda c: on(c, *BOB, net={"head_addresses": ["10.9.0.1"]}),
        "head",
        "FATAL",
        "10.9.0.1 on bob and 10.0.0.1 elsewhere",
        "address",
    ),
    "rank 0 elsewhere": (
        lambda c: on(c, *ALL, launcher={"agent_store": False}, net={"head_is_here": False}),
        "head",
        "FATAL",
        "rank 0 runs on ada, and the head 'ada' (10.0.0.1) is another machine",
        "MASTER_ADDR",
    ),
    "an ephemeral port": (
        lambda c: on(c, *ALL, launcher={"flags": {"rdzv-endpoint": "ada:41234"}}),
        "port",
        "WARN",
        "port 41234 is in the range 32768-60999",
        "21234",
    ),
    "an ephemeral port without torchrun": (
        lambda c: on(c, *ALL, launcher={"agent_store": False}, net={"port": 40000}),
        "port",
        "WARN",
        "port 40000",
        "20000",
    ),
    "gloo on loopback": (
        lambda c: on(c, *BOB, net={"gloo": ["lo", "127.0.0.1"]}),
        "interfaces",
        "FATAL",
        "bob: gloo would listen on the loopback",
        "GLOO_SOCKET_IFNAME=eth0",
    ),
    "no such interface": (
        lambda c: on(c, *BOB, net={"gloo_named": "ib0", "gloo": ["ib0", None]}),
        "interfaces",
        "FATAL",
        "bob: GLOO_SOCKET_IFNAME=ib0, and there is no such interface",
        "GLOO_SOCKET_IFNAME=eth0",
    ),
    "another network": (
        lambda c: on(c, *BOB, net={"gloo": ["eth1", "172.16.0.2"]}),
        "interfaces",
        "WARN",
        "bob: gloo would use eth1 (172.16.0.2)",
        "=eth0",
    ),
    "nccl": (
        lambda c: on(c, *BOB, net={"nccl_named": "ib"}, devices={"count": 2}),
        "interfaces",
        "FATAL",
        "bob: NCCL_SOCKET_IFNAME=ib",
        "NCCL_SOCKET_IFNAME=eth0",
    ),
    "no exchange": (
        lambda c: [
            c[rank].exchange.clear() or c[rank].exchange.update(error="connecting 4 ranks: refused") for rank in BOB
        ],
        "all-reduce",
        "FATAL",
        "rank 2 on bob, rank 3 on bob could not talk to the others: connecting 4 ranks: refused",
        "firewall",
    ),
    "a wrong sum": (
        lambda c: on(c, 1, exchange={"correct": False}),
        "all-reduce",
        "FATAL",
        "wrong sum on rank 1 on ada",
        "memory",
    ),
    "a slow pair": (
        lambda c: c[1].exchange["pairs"].update({"3": [1e-3, 1e7]}),
        "all-reduce",
        "WARN",
        "rank 1 on ada and rank 3 on bob exchange 10 MB/s",
        "machines",
    ),
    "a clock": (
        lambda c: on(c, 2, clock={"ahead_s": -61.0}),
        "clocks",
        "FATAL",
        "the clock of bob is 61.0 s behind that of ada",
        "chrony",
    ),
    "a clock a little off": (
        lambda c: on(c, 2, clock={"ahead_s": 3.5}),
        "clocks",
        "WARN",
        "bob is 3.5 s ahead of",
        "ntpd",
    ),
    "versions": (
        lambda c: on(c, *BOB, versions={"numpy": "0.1"}),
        "versions",
        "FATAL",
        "numpy is 0.1 for rank 2 on bob, rank 3 on bob",
        "install",
    ),
    "code": (
        lambda c: on(c, 3, code={"ddp_stream/order.py": "x"}),
        "code",
        "FATAL",
        "rank 3 on bob has other code than the rest: ddp_stream/order.py",
        "commit",
    ),
    "settings": (
        lambda c: on(c, 3, config={"seed": "1"}),
        "settings",
        "FATAL",
        "rank 3 on bob was started with other settings: seed is 1 and 0 elsewhere",
        "same",
    ),
    "no data": (
        lambda c: [
            facts.data.clear() or facts.data.update(num_workers=2, error="DataError: rows.csv is not there")
            for facts in c[2:]
        ],
        "data",
        "FATAL",
        "rank 2 on bob, rank 3 on bob: DataError: rows.csv is not there",
        "mend",
    ),
    "other data": (
        lambda c: on(c, *BOB, data={"fingerprint": "def"}),
        "data",
        "FATAL",
        "rank 2 on bob, rank 3 on bob sees other data in rows.csv",
        "copy",
    ),
    "a slow disk": (
        lambda c: on(c, 2, data={"rows_per_s": 1e3}),
        "data rate",
        "WARN",
        "rank 2 on bob reads 1,000 rows/s, where most read 100,000",
        "disk",
    ),
    "arithmetic": (
        lambda c: on(c, 0, data={"foreseen": [["uneven ranks", "64"]]}),
        "arithmetic",
        "WARN",
        "uneven",
        "64",
    ),
    "no step": (
        lambda c: on(c, 0, data={"foreseen": [["no step", "pad"]], "steps": 0}),
        "arithmetic",
        "FATAL",
        "no step",
        "pad",
    ),
    "few CPUs": (
        lambda c: on(c, *BOB, machine={"cpus": 2.0}),
        "CPUs",
        "WARN",
        "bob: 2 rank(s) with 4 workers share 2 CPUs",
        "--data.num_workers 1",
    ),
    "few CPUs for one rank": (
        lambda c: on(c, 2, machine={"cpus": 1.0, "cpu_list": [7]}),
        "CPUs",
        "WARN",
        "bob: 1 rank(s) with 2 workers share 1 CPUs",
        "--data.num_workers 1",
    ),
    "/dev/shm": (
        lambda c: on(c, *BOB, machine={"shm_bytes": 39 * MIB}),
        "/dev/shm",
        "FATAL",
        "bob: /dev/shm has 39.0 MiB free of 1000.0 MiB, and the messages of 2 rank(s) need 40.0 MiB",
        "--shm-size",
    ),
    "memory": (
        lambda c: on(c, *BOB, machine={"memory_bytes": 299 * MIB}),
        "memory",
        "FATAL",
        "bob: 299.0 MiB of memory are free",
        "--data.num_workers",
    ),
    "files": (
        lambda c: on(c, *BOB, machine={"open_files": 271}),
        "open files",
        "WARN",
        "bob: 271 files may be open, and the workers' messages may need 272",
        "ulimit",
    ),
    "a run directory that is not written": (
        lambda c: on(c, 2, run_dir={"error": "OSError: read-only"}),
        "run directory",
        "FATAL",
        "bob cannot write the run directory /runs/a: OSError",
        "--run.dir",
    ),
    "a run directory that is not shared": (
        lambda c: on(c, 2, run_dir={"seen_s": None}),
        "run directory",
        "FATAL",
        "/runs/a on bob is not the directory of that name on ada",
        "share",
    ),
    "a slow mount": (lambda c: on(c, 2, run_dir={"seen_s": 4.0}), "run directory", "WARN", "after 4.0 s", "actimeo"),
    "no device": (
        lambda c: on(c, *ALL, devices={"kind": "cuda", "count": 2, "ids": ["a", "b"]}) or on(c, 3, local_rank=2),
        "devices",
        "FATAL",
        "rank 3 on bob: local rank 2 has no cuda device, for 2 are seen",
        "CUDA_VISIBLE_DEVICES",
    ),
    "one device for two": (
        lambda c: on(c, *ALL, devices={"kind": "cuda", "count": 1, "ids": ["a"]}),
        "devices",
        "FATAL",
        "bob: 2 ranks share 1 device(s)",
        "one rank a device",
    ),
    "a far device": (
        lambda c: on(c, *ALL, devices={"kind": "cuda", "count": 2, "ids": ["a", "b"], "near": ["0-3", "4-7,9"]}),
        "devices",
        "WARN",
        "rank 3 on bob: its CPUs [0, 1, 2, 3]... are on another NUMA node",
        "--gpu-bind",
    ),
    "two kinds": (
        lambda c: on(c, *BOB, devices={"kind": "cuda"}),
        "devices",
        "FATAL",
        "rank 2 on bob, rank 3 on bob would compute on cuda",
        "driver",
    ),
    "no scontrol": (
        lambda c: on(
            c,
            *ALL,
            launcher={"slurm_job": "7", "scontrol": None, "environment": {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGUSR1"}},
        ),
        "requeue",
        "WARN",
        "ada: there is no scontrol on the PATH, with which job 7",
        "batch script",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_and_nothing_else(fault, cluster):
    plant, check, level, what, fix = FAULTS[fault]
    plant(cluster)
    found = judge(cluster)
    assert list(found) == [(check, level)]
    assert what in found[check, level][0]
    assert fix in found[check, level][1]


def test_machines_of_one_name_are_told_apart(cluster):
    for facts in cluster:
        facts.host = "localhost"
    assert [facts.host for facts in checks.told_apart(cluster)] == ["localhost (10.0.0.1)"] * 2 + [
        "localhost (10.0.0.2)"
    ] * 2


def test_loopback_is_right_for_one_machine(cluster):
    ranks = cluster[:2]
    on(ranks, 0, 1, net={"gloo": ["lo", "127.0.0.1"], "head_addresses": ["127.0.0.1"]}, world_size=2)
    assert judge(ranks) == {}


def test_the_worst_level_is_the_status():
    finding = checks.Finding("WARN", "a", "b")
    assert checks.Result("c", "", []).status == "ok"
    assert checks.Result("c", "", [finding]).status == "WARN"
    assert checks.Result("c", "", [finding, checks.Finding("FATAL", "a", "b")]).status == "FATAL"


@pytest.mark.parametrize("count", [2, 3, 6, 7])
def test_every_pair_meets_once_and_nobody_twice_in_a_round(count):
    played = []
    for matches in rounds(list(range(count))):
        players = [player for match in matches for player in match]
        assert len(players) == len(set(players))
        played += matches
    assert sorted(played) == [(a, b) for a in range(count) for b in range(a + 1, count)]


def test_a_call_with_a_limit():
    assert limited(lambda: 3, 5, "it") == 3
    with pytest.raises(ZeroDivisionError):
        limited(lambda: 1 // 0, 5, "it")
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"sleeping took more than 0.1 s"):
        limited(lambda: time.sleep(3), 0.1, "sleeping")
    assert time.monotonic() - started < 3
    with pytest.raises(InVain, match=r"sleeping was given up, since another rank had failed"):
        limited(lambda: time.sleep(60), 60, "sleeping", lambda: True)
    assert time.monotonic() - started < 20


def test_a_network_as_it_is_here():
    assert resolve("localhost")[0][0] == "127.0.0.1"
    assert resolve("no.such.host.invalid")[0] == []
    assert is_here("127.0.0.1")
    assert not is_here("192.0.2.77")  # reserved for documentation
    assert own_interfaces()["lo"] == ["127.0.0.1"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def member(gathered, rank, port, world_size=2, **launcher):
    facts = copy.deepcopy(gathered)
    facts.rank, facts.world_size, facts.host = rank, world_size, f"host{rank}"
    facts.net |= {"head": "127.0.0.1", "port": port}
    facts.launcher |= launcher
    return facts


def test_who_is_missing_has_a_name(gathered):
    said = []
    meeting = Meeting(member(gathered, 0, free_port(), world_size=3), 5.5, ["ada", "bob", "cyd"])
    roll = meeting.roll_call(said.append)
    assert roll["missing"] == [1, 2]
    assert roll["missing_hosts"] == ["bob", "cyd"]
    assert len(said) == 1
    assert "for rank 1 (bob), 2 (cyd)" in said[0]


def test_a_missing_slurm_node_has_a_name(gathered, tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"  # the one command of Slurm that is asked, as it answers
    scontrol.write_text('#!/bin/sh\necho "$3" | tr , "\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    roll = Meeting(member(gathered, 0, free_port(), slurm_nodelist="host0,node7"), 0.5).roll_call(print)
    assert roll["missing_hosts"] == ["node7"]


def test_two_ranks_of_one_number(gathered):
    port, rolls = free_port(), []
    first = Meeting(member(gathered, 0, port), 10)
    others = [Meeting(member(gathered, 1, port), 10) for _ in range(2)]
    threads = [threading.Thread(target=lambda other=other: rolls.append(other.roll_call(print))) for other in others]
    for thread in threads:
        thread.start()
    time.sleep(0.3)  # both are there
    roll = first.roll_call(print)
    for thread in threads:
        thread.join()
    assert roll["twice"] == [1]
    assert rolls == [roll, roll]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_that_another_program_has(rank, gathered, monkeypatch):
    monkeypatch.setattr("ddp_stream.doctor.meeting._STORE_S", 0.5)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with pytest.raises(MeetingError, match="cannot be had" if rank == 0 else "another program has the port"):
            Meeting(member(gathered, rank, other.getsockname()[1]), 1)


def test_a_head_that_does_not_answer(gathered):
    port = free_port()
    with pytest.raises(MeetingError, match=rf"127.0.0.1 port {port} could not be reached within 0.5 s .*refused"):
        Meeting(member(gathered, 1, port), 0.5)
    with pytest.raises(MeetingError, match="nobody said where the 2 ranks are to meet"):
        Meeting(member(gathered, 1, None), 0.5)


@pytest.fixture
def ask(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DDP_STREAM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def ask(*arguments):
        parser = doctor.parser()
        code = doctor.run(parser, parser.parse_args(list(arguments)))
        return code, *capsys.readouterr()

    return ask


def test_alone_and_well(ask, tmp_path):
    code, out, _ = ask("--data.num_workers", "1", "--epochs", "2")
    assert code == 0, out
    assert "doctor: nothing found" in out
    assert "1 rank(s) on 1 machine(s), alone" in out
    (in_table,) = re.findall(r"^0 .* ([\d,]+)$", out, re.MULTILINE)
    (rate,) = re.findall(r"^data rate +ok +([\d,]+) rows/s", out, re.MULTILINE)
    assert in_table == rate != "0"
    assert "SyntheticRegression(1000 rows), 1,000 rows" in out
    assert list(tmp_path.iterdir()) == []  # no trace


@pytest.mark.parametrize(("arguments", "line"), [
    (["--data.path", "rows.csv"], "FATAL  data: rank 0 on .*: DataError: rows.csv is not there"),
    (["--data.lanes", "3"], "FATAL  data: .*global_batch_size=64 is not a multiple of lanes=3"),
    (["--data.global_batch_size", "900"], r"WARN   arithmetic: global_batch_size=900 wastes 800 of 1,800 slots \(44%\)"),
    (["--data.num_workers", "999"], "WARN   CPUs: .*: 1 rank.s. with 999 workers share"),
    (["--run.dir", "/proc/run"], "FATAL  run directory: .* cannot write the run directory /proc/run: "),
])  # fmt: skip
def test_alone_and_not_well(arguments, line, ask):
    code, out, _ = ask(*arguments)
    assert code == (1 if line.startswith("FATAL") else 0), out
    assert re.search(f"^{line}.* -> ", out, re.MULTILINE), out
    assert not re.search(r"^0 .* 0$", out, re.MULTILINE), out  # a rate that was not measured is no rate of 0


def test_workers_as_measured_here(ask):
    code, out, _ = ask("--data.num_workers", "auto")  # synthetic rows cost nothing to read
    assert code == 0, out
    assert re.search(r"^CPUs +ok .* 0 workers each$", out, re.MULTILINE), out
    assert "no workers, so none needed" in out


def test_accelerate_that_started_one_process(ask, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    code, out, _ = ask("--data.num_workers", "1")
    assert code == 1
    assert "FATAL  world size: accelerate launch was asked for several processes and started one" in out


def test_a_machine_that_is_not_in_the_list(ask):
    code, _, err = ask("--hosts", "192.0.2.77,192.0.2.78")
    assert code == 2
    assert "none of them is this machine" in err
