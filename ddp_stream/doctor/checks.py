"""From everybody's facts to findings: pure functions, each for one question, on the ranks and the network."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ddp_stream.doctor.facts import Facts
from ddp_stream.doctor.network import is_loopback

Level = Literal["FATAL", "WARN"]


@dataclass(frozen=True)
class Finding:
    """Something wrong, and one way out of it.

    Attributes:
        level: FATAL if training would fail, hang, or train on something else; WARN if it would be slow or fragile
        what: what was found, where, with the values seen
        fix: what to do
    """

    level: Level
    what: str
    fix: str


@dataclass(frozen=True)
class Result:
    """What a check says: a line for the table, and findings if there are any."""

    check: str
    detail: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def status(self) -> str:
        """`ok`, or the worst level found."""
        levels = {finding.level for finding in self.findings}
        return "FATAL" if "FATAL" in levels else "WARN" if levels else "ok"


def hosts(ranks: Sequence[Facts]) -> dict[str, list[Facts]]:
    """Ranks by machine, the first rank's first."""
    found: dict[str, list[Facts]] = {}
    for facts in ranks:
        found.setdefault(facts.network, []).append(facts)
    return found


def told_apart(ranks: Sequence[Facts]) -> list[Facts]:
    """The same ranks; machines that bear one name get their address on the network beside it."""
    machines = Counter(group[0].host for group in hosts(ranks).values())
    return [
        replace(facts, host=f"{facts.host} ({facts.net.get('route', facts.net['gloo'])[1]})")
        if machines[facts.host] > 1
        else facts
        for facts in ranks
    ]


def several(ranks: Sequence[Facts]) -> bool:
    """Whether the ranks are on more than one machine."""
    return len(hosts(ranks)) > 1


def who(ranks: Sequence[Facts]) -> str:
    """Ranks and their hosts, the first few."""
    shown = ", ".join(map(str, ranks[:4]))
    return f"{shown} and {len(ranks) - 4} more" if len(ranks) > 4 else shown


def odd_ones(ranks: Sequence[Facts], value: Callable[[Facts], Any]) -> list[tuple[list[Facts], Any, Any]]:
    """Ranks whose `value` is not that of most (at a tie, not that of rank 0): who, theirs, and the others'."""
    counts = Counter(repr(value(facts)) for facts in ranks)
    first = repr(value(ranks[0]))
    usual = max(counts, key=lambda key: (counts[key], key == first))
    example = next(value(facts) for facts in ranks if repr(value(facts)) == usual)
    odd: dict[str, list[Facts]] = {}
    for facts in ranks:
        if repr(value(facts)) != usual:
            odd.setdefault(repr(value(facts)), []).append(facts)
    return [(group, value(group[0]), example) for group in odd.values()]


def launcher(ranks: Sequence[Facts]) -> Result:
    """As many ranks as were promised, by every sign there is."""
    findings = []
    if ranks[0].launcher["broken"]:
        fix = "start it with launch/local.sh, launch/accelerate.sh or torchrun"
        if several(ranks):
            fix = "start it on every machine with the same --nnodes and --nproc, and another --node-rank"
        started = ", ".join(f"{len(group)} on {group[0].host}" for group in list(hosts(ranks).values())[:8])
        findings.append(Finding("FATAL", f"{ranks[0].launcher['broken']}; started: {started}", fix))
    for group, theirs, others in odd_ones(ranks, lambda facts: facts.world_size):
        findings.append(
            Finding(
                "FATAL",
                f"{who(group)} believes in world_size={theirs}, the others in {others}",
                "give every machine the same number of nodes and of processes",
            )
        )
    first = ranks[0].launcher
    if first["slurm_nodes"] and first["nodes"] and first["nodes"] < first["slurm_nodes"] and first["name"] != "alone":
        findings.append(
            Finding(
                "FATAL",
                f"Slurm allotted {first['slurm_nodes']} nodes and this world has {first['nodes']}: each formed its own",
                "give torchrun --nnodes $SLURM_NNODES and one --rdzv-endpoint on the first node",
            )
        )
    detail = f"{ranks[0].world_size} rank(s) on {len(hosts(ranks))} machine(s), {first['name']}"
    return Result("world size", detail, findings)


def flags(ranks: Sequence[Facts]) -> Result | None:
    """torchrun's own settings: what happens to signals, and where ranks meet."""
    if ranks[0].launcher["name"] not in ("torchrun", "accelerate"):
        return None
    findings = []
    for group in hosts(ranks).values():
        facts = group[0]
        environment, given = facts.launcher["environment"], facts.launcher["flags"]
        signals = environment.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
        if facts.launcher["slurm_job"] and "SIGUSR1" not in signals:
            findings.append(
                Finding(
                    "FATAL",
                    f"{facts.host}: a warning by SIGUSR1 would kill torchrun and leave its ranks running, for it "
                    f"handles only {signals or 'its default signals'}",
                    "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 300",
                )
            )
        restarts = given.get("max-restarts", environment.get("PET_MAX_RESTARTS", "0"))
        if restarts not in ("0", ""):
            findings.append(
                Finding(
                    "WARN",
                    f"{facts.host}: --max-restarts {restarts}: torchrun starts all ranks again after any error, also "
                    f"one that comes back",
                    "leave it at 0 and let the scheduler requeue",
                )
            )
    return Result("torchrun flags", "signals and restarts", findings)


def head(ranks: Sequence[Facts]) -> Result | None:
    """The head's name means the same address everywhere, and one that others can reach."""
    name = ranks[0].net["head"]
    if name is None:
        return None
    findings = []
    for facts in [group[0] for group in hosts(ranks).values()]:
        found = facts.net["head_addresses"]
        if not found:
            findings.append(
                Finding(
                    "FATAL",
                    f"{facts.host} cannot resolve the head's name {name!r} ({facts.net['head_error']})",
                    "give the head's address, or put its name into DNS or /etc/hosts",
                )
            )
        elif several(ranks) and is_loopback(found[0]):
            level: Level = "WARN" if facts is ranks[0] else "FATAL"
            findings.append(
                Finding(
                    level,
                    f"on {facts.host} the head's name {name!r} is {found[0]}, its own loopback",
                    "give the head's address on the network, or mend /etc/hosts",
                )
            )
    outside = [
        facts for facts in ranks if facts.net["head_addresses"] and not is_loopback(facts.net["head_addresses"][0])
    ]
    if outside and several(ranks):
        for group, theirs, others in odd_ones(outside, lambda facts: facts.net["head_addresses"]):
            findings.append(
                Finding(
                    "FATAL",
                    f"the head's name {name!r} is {', '.join(theirs)} on {group[0].host} and {', '.join(others)} elsewhere",
                    "give the head's address instead of its name",
                )
            )
    astray = ranks[0].rank == 0 and ranks[0].net["head_addresses"] and not ranks[0].net["head_is_here"]
    if astray and not ranks[0].launcher["agent_store"]:
        findings.append(
            Finding(
                "FATAL",
                f"rank 0 runs on {ranks[0].host}, and the head {name!r} ({ranks[0].net['head_addresses'][0]}) is another "
                f"machine: the others would look for it there",
                "MASTER_ADDR must be the machine of rank 0",
            )
        )
    shown = ", ".join(ranks[0].net["head_addresses"]) or "unknown"
    return Result("head", f"{name} is {shown} on {len(hosts(ranks))} machine(s)", findings)


def port(ranks: Sequence[Facts]) -> Result | None:
    """The port where ranks meet is not one that the kernel hands out to others."""
    facts = ranks[0]
    first, last = facts.net["ephemeral"]
    if facts.launcher["agent_store"]:  # torchrun meets at the rendezvous, and picks MASTER_PORT anew by itself
        given, environment = facts.launcher["flags"], facts.launcher["environment"]
        endpoint = given.get("rdzv-endpoint") or environment.get("PET_RDZV_ENDPOINT", "")
        number = endpoint.rpartition(":")[2] or given.get("master-port") or given.get("main-process-port", "")
        if "standalone" in given or not number.isdigit() or int(number) == 0:
            return Result("port", "chosen free by torchrun")
        chosen = int(number)
    elif facts.net["port"] is None:
        return None
    else:
        chosen = facts.net["port"]
    findings = []
    if first <= chosen <= last:
        findings.append(
            Finding(
                "WARN",
                f"port {chosen} is in the range {first}-{last} out of which {facts.host} hands ports to any program: some "
                f"day it is taken",
                f"a port below {first}, such as {20000 + chosen % 10000}",
            )
        )
    return Result("port", f"{chosen}, outside {first}-{last}" if not findings else str(chosen), findings)


def interfaces(ranks: Sequence[Facts]) -> Result:
    """Gloo listens where the others can reach it."""
    findings, shown = [], []
    for facts in [group[0] for group in hosts(ranks).values()]:
        name, address = facts.net["gloo"]
        named = facts.net["gloo_named"]
        route = facts.net.get("route", [None, None])[0]
        better = route if route and route != "lo" else _interface_towards(ranks, facts)
        shown.append(f"{facts.host} {name or '?'} {address or 'no address'}")
        if named and not facts.net["interfaces"].get(name):
            findings.append(
                Finding(
                    "FATAL",
                    f"{facts.host}: GLOO_SOCKET_IFNAME={named}, and there is no such interface with an address; it has "
                    f"{', '.join(facts.net['interfaces'])}",
                    f"GLOO_SOCKET_IFNAME={better}",
                )
            )
        elif several(ranks) and (address is None or is_loopback(address)):
            cause = f"GLOO_SOCKET_IFNAME={named}" if named else f"its name {facts.net['hostname']!r} is {address}"
            findings.append(
                Finding(
                    "FATAL",
                    f"{facts.host}: gloo would listen on the loopback interface, where no other machine reaches it, for "
                    f"{cause}",
                    f"GLOO_SOCKET_IFNAME={better} on this machine",
                )
            )
        elif several(ranks) and route not in (None, "lo") and name is not None and name != route:
            findings.append(
                Finding(
                    "WARN",
                    f"{facts.host}: gloo would use {name} ({address}), and the way to the head goes over {route}",
                    f"GLOO_SOCKET_IFNAME={route}",
                )
            )
        nccl = facts.net["nccl_named"]
        if (
            nccl
            and nccl[0] not in "^="
            and not any(i.startswith(tuple(nccl.split(","))) for i in facts.net["interfaces"])
        ):
            findings.append(
                Finding(
                    "FATAL" if facts.devices["count"] else "WARN",
                    f"{facts.host}: NCCL_SOCKET_IFNAME={nccl}, and no interface begins so; it has "
                    f"{', '.join(facts.net['interfaces'])}",
                    f"NCCL_SOCKET_IFNAME={better}",
                )
            )
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return Result("interfaces", f"gloo on {'; '.join(shown[:4])}{more}", findings)


def _interface_towards(ranks: Sequence[Facts], facts: Facts) -> str:
    """The interface of `facts` whose address is most like those by which the others reach the head."""
    others = [other.net["route"][1] for other in ranks if other.network != facts.network and "route" in other.net]
    own = [(address, name) for name, found in facts.net["interfaces"].items() for address in found if name != "lo"]
    likeness = [(_shared(address, other or ""), name) for address, name in own for other in others]
    return max(likeness, default=(0, own[0][1] if own else "eth0"), key=lambda pair: pair[0])[1]


def _shared(one: str, two: str) -> int:
    """How many characters two addresses have in common from the left."""
    return next((index for index, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def all_reduce(ranks: Sequence[Facts]) -> Result | None:
    """An all-reduce gives the right sum on every rank; how fast, and which pair is slowest."""
    if len(ranks) == 1:
        return None
    findings = []
    failed = [facts for facts in ranks if facts.exchange.get("error")]
    if failed:
        other = [facts for facts in failed if not facts.exchange.get("in_vain")] or failed
        findings.append(
            Finding(
                "FATAL",
                f"{who(other)} could not talk to the others: {other[0].exchange['error']}",
                "see head, interfaces and port above; a firewall must let any port through between the machines",
            )
        )
    wrong = [facts for facts in ranks if facts.exchange.get("correct") is False]
    if wrong:
        findings.append(
            Finding(
                "FATAL",
                f"an all-reduce gave a wrong sum on {who(wrong)}",
                "take this machine out, and have its memory and network tested",
            )
        )
    done = [facts for facts in ranks if "bytes_per_s" in facts.exchange]
    if not done:
        return Result("all-reduce", "not done", findings)
    latency = max(facts.exchange["latency_s"] for facts in done)
    rate = min(facts.exchange["bytes_per_s"] for facts in done)
    detail = (
        f"right sum, {latency * 1e3:.2f} ms for a number, {rate / 1e6:.0f} MB/s for 4 MiB" if not wrong else "wrong sum"
    )
    by_rank = {facts.rank: facts for facts in ranks}
    pairs = [
        (found[1], found[0], facts, by_rank[int(peer)])
        for facts in done
        for peer, found in facts.exchange.get("pairs", {}).items()
        if int(peer) in by_rank
    ]
    if pairs:
        speed, back, one, two = min(pairs, key=lambda pair: pair[0])
        detail += f"; slowest pair {one} and {two}: {speed / 1e6:.0f} MB/s, {back * 1e3:.2f} ms there and back"
    across = [pair for pair in pairs if pair[2].network != pair[3].network]
    if len(across) >= 3:
        usual = statistics.median(pair[0] for pair in across)
        speed, _, one, two = min(across, key=lambda pair: pair[0])
        if speed < usual / 4:
            findings.append(
                Finding(
                    "WARN",
                    f"{one} and {two} exchange {speed / 1e6:.0f} MB/s, where most pairs have {usual / 1e6:.0f}: every "
                    f"step waits for them",
                    "leave one of the two machines out and ask again which pair is slowest",
                )
            )
    return Result("all-reduce", detail, findings)


def clocks(ranks: Sequence[Facts]) -> Result | None:
    """Clocks agree: limits on time, and which file is newer, are decided by them."""
    known = [facts for facts in ranks if facts.clock]
    if len(known) < 2:
        return None
    findings = []
    for facts in known:
        ahead, error = facts.clock["ahead_s"], facts.clock["error_s"]
        if abs(ahead) - error > 2:
            findings.append(
                Finding(
                    "FATAL" if abs(ahead) > 30 else "WARN",
                    f"the clock of {facts.host} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} that of "
                    f"{ranks[0].host}: it would stop for the time limit at another moment, or too late",
                    "start chrony or ntpd there",
                )
            )
    worst = max(abs(facts.clock["ahead_s"]) for facts in known)
    return Result("clocks", f"within {max(worst, 0.001):.3f} s of each other", findings)
