"""From everybody's facts to findings: what must be the same on all ranks, and what their machines allow them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ddp_stream.deal import size
from ddp_stream.doctor.checks import Finding, Result, hosts, odd_ones, several, who
from ddp_stream.doctor.facts import Facts

_LEAST_SHM = 1 << 20
_TELLING_S = 0.2  # what was read in less time says little of the disk


def versions(ranks: Sequence[Facts]) -> Result:
    """The same packages everywhere."""
    findings = []
    for name in ranks[0].versions:
        installed = {facts.rank: facts.versions.get(name) for facts in ranks}
        for group, theirs, others in odd_ones(ranks, lambda facts: installed[facts.rank]):  # noqa: B023
            findings.append(
                Finding(
                    "FATAL",
                    f"{name} is {theirs} for {who(group)}, and {others} elsewhere",
                    f"install one {name} everywhere",
                )
            )
    shown = ", ".join(f"{name} {ranks[0].versions[name]}" for name in ("python", "torch"))
    return Result("versions", f"{shown}; the same of all packages" if not findings else shown, findings)


def code(ranks: Sequence[Facts]) -> Result:
    """The same source files everywhere."""
    findings = []
    for group, theirs, others in odd_ones(ranks, lambda facts: facts.code):
        names = sorted(name for name in {*theirs, *others} if theirs.get(name) != others.get(name))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        findings.append(
            Finding(
                "FATAL",
                f"{who(group)} has other code than the rest: {', '.join(names[:3])}{more}",
                "check out the same commit everywhere, or run from a shared directory",
            )
        )
    return Result("code", f"{len(ranks[0].code)} files", findings)


def configuration(ranks: Sequence[Facts]) -> Result:
    """The same settings everywhere."""
    findings = []
    for group, theirs, others in odd_ones(ranks, lambda facts: facts.config):
        names = sorted(name for name in {*theirs, *others} if theirs.get(name) != others.get(name))
        shown = "; ".join(f"{name} is {theirs.get(name)} and {others.get(name)} elsewhere" for name in names[:3])
        findings.append(
            Finding(
                "FATAL", f"{who(group)} was started with other settings: {shown}", "give every machine the same command"
            )
        )
    return Result("settings", f"{len(ranks[0].config)} settings", findings)


def data(ranks: Sequence[Facts]) -> Result:
    """The data is there, and the same everywhere."""
    errors: dict[str, list[Facts]] = {}
    for facts in ranks:
        if facts.data.get("error"):
            errors.setdefault(facts.data["error"], []).append(facts)
    findings = [
        Finding("FATAL", f"{who(group)}: {error}", "mend what it says, on the machines that it says it of")
        for error, group in errors.items()
    ]
    whole = [facts for facts in ranks if not facts.data.get("error")]
    if not whole:
        return Result("data", "cannot be read", findings)
    for group, theirs, others in odd_ones(whole, lambda facts: [facts.data["rows"], facts.data["fingerprint"]]):
        findings.append(
            Finding(
                "FATAL",
                f"{who(group)} sees other data in {whole[0].data['source']}: {theirs[0]} rows, fingerprint {theirs[1]}, "
                f"where the others see {others[0]} rows, {others[1]}",
                "copy the same files to every machine, or read them from a shared directory",
            )
        )
    first = whole[0].data
    return Result("data", f"{first['source']}, {first['rows']:,} rows, fingerprint {first['fingerprint']}", findings)


def data_rate(ranks: Sequence[Facts]) -> Result | None:
    """How fast one process of every rank reads and transforms."""
    rates = [facts for facts in ranks if facts.data.get("rows_per_s")]
    if not rates:
        return None
    slowest = min(rates, key=lambda facts: facts.data["rows_per_s"])
    usual = statistics.median(facts.data["rows_per_s"] for facts in rates)
    findings = []
    long_enough = min(facts.data["read_s"] for facts in rates) > _TELLING_S
    if several(rates) and long_enough and slowest.data["rows_per_s"] < usual / 5:
        findings.append(
            Finding(
                "WARN",
                f"{slowest} reads {slowest.data['rows_per_s']:,.0f} rows/s, where most read {usual:,.0f}: all wait for it",
                "look at the disk, or the mount, of that machine",
            )
        )
    detail = (
        f"{slowest.data['rows_per_s']:,.0f} rows/s ({slowest.data['bytes_per_s'] / 1e6:.1f} MB/s) in one process of "
    )
    return Result("data rate", f"{detail}{slowest}, the slowest", findings)


def foreseen(ranks: Sequence[Facts]) -> Result | None:
    """What arithmetic says of the batch, the ranks and the workers."""
    if "foreseen" not in ranks[0].data:
        return None
    level = "FATAL" if ranks[0].data["steps"] == 0 else "WARN"
    found = [Finding(level, what, fix) for what, fix in ranks[0].data["foreseen"]]  # type: ignore[arg-type]
    return Result("arithmetic", f"{ranks[0].data['steps']:,} steps an epoch", found)


def cpus(ranks: Sequence[Facts]) -> Result:
    """A CPU for every worker at least."""
    findings, fewest = [], float("inf")
    slurm = ranks[0].launcher["slurm_job"] is not None
    for group in hosts(ranks).values():
        shared: dict[str, list[Facts]] = {}
        for facts in group:
            shared.setdefault(str(facts.machine["cpu_list"]), []).append(facts)
        for together in shared.values():
            allotted = min(facts.machine["cpus"] for facts in together)
            workers = sum(facts.data["num_workers"] for facts in together)
            fewest = min(fewest, allotted / len(together))
            if workers > allotted:
                findings.append(
                    Finding(
                        "WARN",
                        f"{together[0].host}: {len(together)} rank(s) with {workers} workers share {allotted:g} CPUs",
                        f"--data.num_workers {int(allotted) // len(together)}, or {workers + len(together)} CPUs"
                        + (" (--cpus-per-task, and SRUN_CPUS_PER_TASK for srun)" if slurm else ""),
                    )
                )
    return Result("CPUs", f"{fewest:g} a rank, {ranks[0].data['num_workers']} workers each", findings)


def shared_memory(ranks: Sequence[Facts]) -> Result:
    """/dev/shm holds the messages on their way from workers to ranks."""
    findings, detail = [], "no workers, so none needed"
    for group in hosts(ranks).values():
        need = max(sum(facts.data.get("shm_bytes", 0) for facts in group), _LEAST_SHM)
        free = min((f.machine["shm_bytes"] for f in group if f.machine["shm_bytes"] is not None), default=None)
        if not group[0].data["num_workers"]:
            continue
        if free is None:
            detail = "no /dev/shm on this system"
            continue
        if "free" not in detail:
            detail = f"{size(free)} free, {size(need)} needed"
        if free < need:
            findings.append(
                Finding(
                    "FATAL",
                    f"{group[0].host}: /dev/shm has {size(free)} free of {size(group[0].machine['shm_total_bytes'])}, and "
                    f"the messages of {len(group)} rank(s) need {size(need)}: workers would die of a bus error",
                    "empty it, give the container a larger one (--shm-size), or --data.num_workers 0",
                )
            )
    return Result("/dev/shm", detail, findings)


def memory(ranks: Sequence[Facts]) -> Result:
    """Memory for what the loaders hold."""
    findings, detail = [], "unknown"
    for group in hosts(ranks).values():
        need = sum(facts.data.get("memory_bytes", 0) for facts in group)
        free = min((f.machine["memory_bytes"] for f in group if f.machine["memory_bytes"] is not None), default=None)
        if free is None:
            continue
        if detail == "unknown":
            detail = f"{size(free)} free, the loaders need {size(need)}"
        if free < need:
            findings.append(
                Finding(
                    "FATAL",
                    f"{group[0].host}: {size(free)} of memory are free, and the loaders of {len(group)} rank(s) hold "
                    f"{size(need)}",
                    "ask for more memory, or fewer --data.num_workers",
                )
            )
    return Result("memory", detail, findings)


def open_files(ranks: Sequence[Facts]) -> Result:
    """Every message on its way holds a file open."""
    findings = []
    for facts in [group[0] for group in hosts(ranks).values()]:
        need = 256 + 4 * facts.data.get("messages_ahead", 0)
        if facts.machine["open_files"] < need:
            findings.append(
                Finding(
                    "WARN",
                    f"{facts.host}: {facts.machine['open_files']} files may be open, and the workers' messages may "
                    f"need {need}",
                    "ulimit -n 4096",
                )
            )
    least = min(facts.machine["open_files"] for facts in ranks)
    return Result("open files", f"{least:,} allowed" if least < 1 << 40 else "no limit", findings)


def run_directory(ranks: Sequence[Facts]) -> Result | None:
    """The run directory is one, and can be written by all."""
    known = [facts for facts in ranks if facts.run_dir]
    if not known or known[0] is not ranks[0]:
        return None
    first = known[0].run_dir
    findings = [
        Finding(
            "FATAL",
            f"{facts.host} cannot write the run directory {facts.run_dir['path']}: {facts.run_dir['error']}",
            "another --run.dir, or the rights to this one",
        )
        for facts in known
        if facts.run_dir["error"]
    ]
    for facts in known[1:] if first["error"] is None else []:
        if facts.run_dir["error"] is None and (facts.run_dir["seen_s"] is None or facts.rank in first["unseen"]):
            what = f"{facts.run_dir['path']} on {facts.host} is not the directory of that name on {ranks[0].host}: "
            what += "checkpoints would be torn apart"
            findings.append(Finding("FATAL", what, "--run.dir on a file system that all machines share"))
    seen = [facts.run_dir["seen_s"] for facts in known[1:] if facts.run_dir["seen_s"] is not None]
    if seen and max(seen) > 3:
        findings.append(
            Finding(
                "WARN",
                f"a renamed file is seen after {max(seen):.1f} s on another machine: a restart may miss a checkpoint",
                "a shorter attribute cache for the mount (NFS: actimeo=1)",
            )
        )
    shown = f", a rename seen within {max(seen):.2f} s" if seen else ""
    return Result("run directory", f"{first['path']}, written by {len(known)} machine(s){shown}", findings)


def devices(ranks: Sequence[Facts]) -> Result:
    """A device for every rank, and CPUs near it."""
    findings = []
    for group in hosts(ranks).values():
        for facts in group:
            seen = facts.devices
            if seen["kind"] not in ("cpu", "mps") and 1 < seen["count"] <= facts.local_rank:
                findings.append(
                    Finding(
                        "FATAL",
                        f"{facts}: local rank {facts.local_rank} has no {seen['kind']} device, for {seen['count']} are seen",
                        f"start {seen['count']} ranks on this machine, or look at CUDA_VISIBLE_DEVICES",
                    )
                )
                continue
            index = 0 if seen["count"] == 1 else facts.local_rank
            near = _cpu_list(seen["near"][index]) if index < len(seen["near"]) else set()
            if near and not near & set(facts.machine["cpu_list"]):
                findings.append(
                    Finding(
                        "WARN",
                        f"{facts}: its CPUs {facts.machine['cpu_list'][:4]}... are on another NUMA node than its device",
                        "srun --gpu-bind=closest, or numactl",
                    )
                )
        ids = [
            facts.devices["ids"][0 if facts.devices["count"] == 1 else facts.local_rank]
            for facts in group
            if len(facts.devices["ids"]) > (0 if facts.devices["count"] == 1 else facts.local_rank)
        ]
        if len(set(ids)) < len(ids):
            findings.append(
                Finding(
                    "FATAL",
                    f"{group[0].host}: {len(ids)} ranks share {len(set(ids))} device(s)",
                    "one rank a device: look at CUDA_VISIBLE_DEVICES and at --gpus-per-task",
                )
            )
    for group, theirs, others in odd_ones(ranks, lambda facts: facts.devices["kind"]):
        findings.append(
            Finding(
                "FATAL", f"{who(group)} would compute on {theirs}, the others on {others}", "check the driver there"
            )
        )
    first = ranks[0].devices
    return Result("devices", f"{first['count']} {first['kind']} a machine" if first["count"] else "CPU only", findings)


def _cpu_list(text: str) -> set[int]:
    """`0-3,8` as numbers."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.strip().isdigit():
            found.update(range(int(first), int(last or first) + 1))
    return found


def requeue(ranks: Sequence[Facts]) -> Result | None:
    """Inside Slurm: who could requeue the job."""
    facts = ranks[0]
    if not facts.launcher["slurm_job"]:
        return None
    if facts.launcher["scontrol"]:
        return Result("requeue", f"job {facts.launcher['slurm_job']}, scontrol at {facts.launcher['scontrol']}")
    finding = Finding(
        "WARN",
        f"{facts.host}: there is no scontrol on the PATH, with which job {facts.launcher['slurm_job']} would be requeued",
        "let the batch script, outside the container, requeue; or put scontrol on the PATH",
    )
    return Result("requeue", "no scontrol", [finding])
