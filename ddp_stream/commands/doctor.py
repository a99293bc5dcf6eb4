"""`doctor`: find out in a minute what would waste a night; takes the options of train, under any launcher."""

from __future__ import annotations

import inspect
import json
import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore  # type: ignore[attr-defined]

import ddp_stream.tasks  # noqa: F401  (so that --task finds the ready ones by name)
from ddp_stream.commands.cli import Parser, make_parser
from ddp_stream.doctor import checks, checks_machine
from ddp_stream.doctor.checks import Finding, Result
from ddp_stream.doctor.data import gather_data
from ddp_stream.doctor.exchange import exchange
from ddp_stream.doctor.facts import Facts, gather
from ddp_stream.doctor.meeting import Meeting, MeetingError
from ddp_stream.doctor.network import is_here, resolve
from ddp_stream.topology import Topology
from ddp_stream.training.config import TrainConfig
from ddp_stream.training.network import choose_interface

_OWN = ("hosts", "port", "wait_s", "config")
_REST_S = 360.0  # for everything after the arrival, at worst
_FACTS_S = 90.0
_VERDICT_S = 150.0
_SHOWN = 32
NETWORK_CHECKS = (
    checks.launcher,
    checks.flags,
    checks.head,
    checks.port,
    checks.interfaces,
    checks.all_reduce,
    checks.clocks,
)
CHECKS = (
    *NETWORK_CHECKS,
    checks_machine.versions,
    checks_machine.code,
    checks_machine.configuration,
    checks_machine.data,
    checks_machine.data_rate,
    checks_machine.foreseen,
    checks_machine.cpus,
    checks_machine.shared_memory,
    checks_machine.memory,
    checks_machine.open_files,
    checks_machine.run_directory,
    checks_machine.devices,
    checks_machine.requeue,
)


def parser() -> Parser:
    """The command's options: those of train, and how machines meet before there is a launcher."""
    parser = make_parser(TrainConfig, task=True)
    parser.description = "Find out in a minute what would waste a night; takes the options of train."
    add = parser.add_argument_group("without a launcher, by the same command on every machine").add_argument
    add(
        "--hosts",
        type=str | None,
        default=None,
        help="all machines, comma-separated, the head first; each finds itself in the list",
    )
    add("--port", type=int, default=29500, help="the port on the head where --hosts meet")
    add("--wait_s", type=float, default=60.0, help="seconds that ranks wait for each other to arrive")
    return parser


def run(parser: Parser, arguments: Any) -> int:
    """Gather, meet, judge; returns 1 on every rank if something is fatal."""
    hosts, wait_s = arguments["hosts"], arguments["wait_s"]
    settings = _flat(json.loads(parser.dump(arguments, format="json", skip_unset=False)))
    values = parser.instantiate(arguments)
    config = TrainConfig(**{name: values[name] for name in TrainConfig.__dataclass_fields__})
    watchdog = threading.Timer(wait_s + _REST_S, _give_up, [wait_s + _REST_S])
    watchdog.daemon = True
    watchdog.start()
    names = hosts.split(",") if hosts is not None else None
    try:
        if names is not None:
            _meet_by_hand(names, arguments["port"])
        choose_interface(os.environ)  # as train does
        facts = gather(os.environ, settings, _own_code(config))
        if names is not None:
            facts.host = names[facts.rank]
    except ValueError as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 2
    try:
        return _together(facts, config, wait_s, names)
    except MeetingError as error:
        return _report([facts], [Result("meeting", "failed", [Finding("FATAL", f"{facts}: {error}", error.fix)])])
    finally:
        watchdog.cancel()


def _together(facts: Facts, config: TrainConfig, wait_s: float, names: list[str] | None) -> int:
    """Everything that this rank does with the others; one rank alone goes the same way."""
    rank, topology = facts.rank, Topology(facts.rank, facts.world_size)
    meeting = Meeting(facts, wait_s, names)
    roll = meeting.roll_call(lambda text: print(f"doctor: {text}", flush=True))
    leaders = roll["leaders"]
    present = [other for other in range(facts.world_size) if other not in roll["missing"]]
    trouble: list[str] = []
    if not roll["twice"]:
        if rank in leaders:
            try:
                facts.clock = meeting.clocks(leaders)
                facts.run_dir = meeting.run_directory(leaders, Path(config.run.dir or "runs"))
            except MeetingError as error:
                trouble.append(f"{facts}: {error}")
        if len(present) == facts.world_size > 1:
            meeting.gather_again()
            facts.exchange = exchange(topology, PrefixStore("group", meeting.store), leaders)
    facts.data = gather_data(config, topology)
    meeting.set(f"facts/{rank}", facts.to_json())
    if rank != 0:
        code = int(meeting.get("verdict", "rank 0", _VERDICT_S))
        meeting.leave()
        return code
    told = meeting.collect("facts", present, _FACTS_S)
    trouble += [f"rank {other} arrived and did not report" for other in present if other not in told]
    results = [_presence(roll, wait_s, trouble)] if facts.world_size > 1 else []
    code = _report(checks.told_apart([Facts(**told[other]) for other in sorted(told)]), results)
    meeting.set("verdict", code)
    meeting.leave()
    return code


def _presence(roll: Mapping[str, Any], wait_s: float, trouble: list[str]) -> Result:
    findings = [Finding("FATAL", text, "look at the output of that rank") for text in trouble]
    if roll["missing"]:
        missing = ", ".join(map(str, roll["missing"][:8])) + (", ..." if len(roll["missing"]) > 8 else "")
        where = f" (host {', '.join(roll['missing_hosts'])})" if roll["missing_hosts"] else ""
        what = f"rank {missing}{where} did not arrive within {wait_s:g} s"
        findings.append(Finding("FATAL", what, "see that the machine is up, and that the same command runs there"))
    for rank in roll["twice"]:
        what = f"several processes are rank {rank}: they would train on the same rows"
        findings.append(Finding("FATAL", what, "give every machine another --node-rank, or let torchrun assign it"))
    return Result("all here", f"{len(roll['leaders'])} machine(s) answered", findings)


def _report(ranks: Sequence[Facts], results: list[Result]) -> int:
    """Print everything; returns the exit code."""
    everybody = ranks[0].rank == 0
    for check in CHECKS if ranks[0].data else NETWORK_CHECKS:
        result = check(ranks)
        if result is not None:
            results.append(result)
    lines = (
        [f"{'rank':<6}{'host':<20}{'gloo address':<18}{'device':<12}{'CPUs':<7}{'memory':<12}rows/s"]
        if everybody
        else []
    )
    for facts in ranks[:_SHOWN] if everybody else []:
        devices, memory = facts.devices, facts.machine["memory_bytes"]
        lines.append(
            f"{facts.rank:<6}{facts.host:<20}{facts.net['gloo'][1] or '-':<18}{devices['count']} {devices['kind']:<10}"
            f"{facts.machine['cpus']:<7g}{f'{memory / 2**30:.1f} GiB' if memory else '-':<12}"
            + (f"{facts.data['rows_per_s']:,.0f}" if "rows_per_s" in facts.data else "-")
        )
    if len(ranks) > _SHOWN:
        lines.append(f"... and {len(ranks) - _SHOWN} more")
    lines += ["", *(f"{result.check:<16}{result.status:<7}{result.detail}" for result in results), ""]
    findings = [(result.check, finding) for result in results for finding in result.findings]
    for level in ("FATAL", "WARN"):
        lines += [f"{level:<6} {check}: {f.what} -> {f.fix}" for check, f in findings if f.level == level]
    fatal = sum(finding.level == "FATAL" for _, finding in findings)
    lines.append(f"doctor: {fatal} fatal, {len(findings) - fatal} to mind" if findings else "doctor: nothing found")
    print("\n".join(lines), flush=True)
    return 1 if fatal else 0


def _meet_by_hand(names: list[str], port: int) -> None:
    """Take the place in the world that this machine has in `names`: one rank a machine.

    Raises:
        ValueError: this machine is not among them, or a launcher started this process.
    """
    if "WORLD_SIZE" in os.environ:
        raise ValueError("--hosts is for machines without a launcher, and this process has WORLD_SIZE; leave it out")
    found = {name: resolve(name)[0] for name in names}
    mine = [index for index, name in enumerate(names) if any(is_here(address) for address in found[name])]
    if not mine:
        listed = "; ".join(f"{name} is {', '.join(found[name]) or 'unknown'}" for name in names)
        raise ValueError(f"--hosts {','.join(names)}: none of them is this machine, {socket.gethostname()}: {listed}")
    if len(mine) > 1:
        both = " and ".join(f"{names[index]} ({', '.join(found[names[index]])})" for index in mine)
        raise ValueError(
            f"--hosts {','.join(names)}: both {both} are this machine, {socket.gethostname()}, so that it cannot tell which "
            f"of them it is; name machines by their addresses, or mend /etc/hosts here"
        )
    os.environ.update(RANK=str(mine[0]), WORLD_SIZE=str(len(names)), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR=names[0], MASTER_PORT=str(port))


def _own_code(config: TrainConfig) -> list[Path]:
    """The files that hold the user's task and source."""
    files = []
    for part in (config.task, config.data.source):
        module = type(part).__module__
        if part is not None and not module.startswith("ddp_stream"):
            file = inspect.getsourcefile(type(part))
            files += [Path(file)] if file is not None else []
    return files


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if not prefix and name in _OWN:
            continue
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _give_up(seconds: float) -> None:
    print(f"doctor: not done after {seconds:g} s, so something hangs; giving up", file=sys.stderr, flush=True)
    os._exit(1)
