"""How fast are others? Our loader and its peers on the same rows, interleaved, every measurement in a fresh process.

    pip install -e ".[peers]" && pip install --no-deps mosaicml-streaming
    python tests/benchmarks/peers.py --case 1 --json figures.json

For every loader, with 0 and 2 workers: rows a second (median over epochs after the first; of the first where that one
takes longer than 4 s), CPU cores used meanwhile, seconds to the first batch of 256 rows after the imports, peak memory
of the process tree, seconds to the first batch behind a state at 10% and 90% of the epoch, and whether the rows before
and after it are all rows once (`union`), in the order of the run that was not interrupted (`order`). Formats of their
own are written before, outside of what is timed. With `--json` the raw figures are kept, and a later call adds its
repeats to them, so that a long run may be made of short ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from peers_tools.data import CASES, make  # noqa: E402
from peers_tools.measure import POINTS, TOOLS  # noqa: E402

PACKAGES = [
    *("ddp_stream", "torch", "numpy", "pyarrow", "pillow", "accelerate"),
    *("torchdata", "datasets", "webdataset", "mosaicml-streaming", "litdata", "grain"),
]
CONVERTED = ("hf-map", "webdataset", "mosaic", "litdata")
READS_OTHERS = {("4", "hf-stream"): "hf-map", ("4", "hf-arrow"): "hf-map"}
UNSHUFFLED = ("ours", "bare", "bare-stacked", "torch-getitems", "hf-arrow")


def child(timeout_s: float, **job: Any) -> dict[str, Any]:
    """The figures of one measurement, or `error` with the last line that it wrote."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"DISABLE_VERSION_CHECK": "1", "DDP_STREAM_CACHE": str(Path(job["folder"]) / "cache")}
    command = [sys.executable, "-m", "peers_tools.measure", json.dumps(job)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"more than {timeout_s:.0f} s"}
    if done.returncode == 0:
        figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return figures
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line[0].isspace()]
    return {"error": (lines or [f"exit code {done.returncode}"])[-1][:300]}


def measure(arguments: argparse.Namespace, folder: Path, raw: dict[str, Any]) -> None:
    """Add `--repeats` rounds over all tools and worker counts to `raw`, and write it as it grows."""

    def keep() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(raw, indent=1))

    shuffle = arguments.shuffle == "on"
    for case in arguments.case:
        make(CASES[case], folder)
        for tool in tools_of(arguments, case):
            tool = READS_OTHERS.get((case, tool), tool)
            if tool in CONVERTED and f"{case} {tool}" not in raw["conversions"]:
                job = {"what": "convert", "case": case, "tool": tool, "workers": 0, "shuffle": shuffle}
                raw["conversions"][f"{case} {tool}"] = child(600, folder=str(folder), **job)
                keep()
    for _ in range(arguments.repeats):
        for case in arguments.case:
            for tool in tools_of(arguments, case):
                for workers in arguments.workers:
                    if arguments.budget_s and time.monotonic() > arguments.ends:
                        return
                    record = one(case, tool, workers, shuffle, folder, raw["records"])
                    raw["records"].append(record)
                    keep()
                    print(json.dumps(record), file=sys.stderr, flush=True)


def tools_of(arguments: argparse.Namespace, case: str) -> list[str]:
    """The loaders asked for that have an arrangement for `case`."""
    return [tool for tool in arguments.tool if case in TOOLS[tool][1].split()]


def one(case: str, tool: str, workers: int, shuffle: bool, folder: Path, records: list[Any]) -> dict[str, Any]:
    """One repeat of one arrangement: a run, and a resume from each of its states."""
    key = {"case": case, "tool": tool, "workers": workers, "shuffle": shuffle}
    checked = any(all(record[name] == value for name, value in key.items()) for record in records)
    shutil.rmtree(folder / "cache", ignore_errors=True)  # indexes of files are made anew in every run
    record = {**key, **child(120, what="run", folder=str(folder), **key)}
    if record.get("resume_by") and shuffle:
        record["resume"] = {
            str(percent): child(120, what="resume", percent=percent, rest=not checked, folder=str(folder), **key)
            for percent in POINTS
        }
    return record


def table(raw: dict[str, Any]) -> str:
    """All figures so far as Markdown: medians, and in brackets the smallest and the largest."""
    grouped: dict[tuple[str, bool, int, str], list[dict[str, Any]]] = defaultdict(list)
    for record in raw["records"]:
        grouped[(record["case"], record["shuffle"], record["workers"], record["tool"])].append(record)
    lines = [raw["machine"], ""]
    for case, shuffle, workers in sorted({key[:3] for key in grouped}, key=lambda key: (key[0], not key[1], key[2])):
        title = f"Case {case}: {CASES[case].title}; {workers} workers, shuffle {'on' if shuffle else 'off'}"
        lines += [f"**{title}**", "", "| loader | rows/s | cores | first batch ms | peak MB (at import) "]
        lines[-1] += "| resume 10% ms | resume 90% ms | union | order | repeats |"
        lines.append("|---|---|---|---|---|---|---|---|---|---|")
        rows = {key[3]: records for key, records in grouped.items() if key[:3] == (case, shuffle, workers)}
        for tool, records in sorted(rows.items(), key=lambda item: -speed(item[1])):
            lines.append(row(tool, records))
        lines.append("")
    seconds = {name: round(value.get("convert_s", -1), 1) for name, value in raw["conversions"].items()}
    lines.append(f"Seconds to convert (case, loader): {seconds}")
    return "\n".join(lines)


def brief(raw: dict[str, Any]) -> str:
    """The tables of the README: rows a second in every case, what else is known of case 1, and of resuming."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for record in raw["records"]:
        if record["shuffle"]:
            found[(record["tool"], record["case"], record["workers"])].append(record)
    tools = [tool for tool in TOOLS if any(key[0] == tool for key in found)]
    cases = [case for case in CASES if any(key[1] == case for key in found)]
    workers = sorted({key[2] for key in found})

    def cell(tool: str, case: str, figure: Any) -> str:
        texts = []
        for count in workers:
            good = [record for record in found.get((tool, case, count), []) if "error" not in record]
            values = [value for record in good if (value := figure(record)) is not None]
            texts.append(short(statistics.median(values)) if values else "-")
        return " / ".join(texts) if any(text != "-" for text in texts) else ""

    lines = ["| 1,000 rows/s | " + " | ".join(CASES[case].label for case in cases) + " |"]
    lines.append("|---" * (len(cases) + 1) + "|")
    for tool in tools:
        cells = (cell(tool, case, lambda record: record["rows_per_s"] / 1000) for case in cases)
        lines.append(f"| {tool} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| Parquet | first batch, ms | resume at 10%, ms | at 90%, ms | peak MB | rows after a resume, all cases |",
    ]
    lines.append("|---" * 6 + "|")
    for tool in tools:
        resumes = [
            (key[1], figures)
            for key, records in found.items()
            if key[0] == tool
            for record in records
            for figures in record.get("resume", {}).values()
            if "union" in figures
        ]
        wrong = sorted({CASES[case].label for case, figures in resumes if figures["union"] != "ok"})
        moved = sorted(
            {CASES[case].label for case, figures in resumes if figures["union"] == "ok" and not figures["order"]}
        )
        said = ["right"] if resumes and not wrong and not moved else []
        said += [f"lost or repeated in {', '.join(wrong)}"] if wrong else []
        said += [f"another order in {', '.join(moved)}"] if moved else []
        cells = [
            cell(tool, "1", lambda record: record["first_s"] * 1000),
            cell(tool, "1", lambda record: resumed_ms(record, "10")),
            cell(tool, "1", lambda record: resumed_ms(record, "90")),
            cell(tool, "1", lambda record: record["peak_mb"]),
            "; ".join(said),
        ]
        lines.append(f"| {tool} | " + " | ".join(cells) + " |")
    repeats = [len(records) for records in found.values()]
    counts = f"{min(repeats)} to {max(repeats)}" if min(repeats) < max(repeats) else str(max(repeats))
    lines += ["", f"{' / '.join(map(str, workers))} workers; medians of {counts} repeats. {raw['machine']}"]
    return "\n".join(lines)


def resumed_ms(record: dict[str, Any], percent: str) -> float | None:
    seconds = record.get("resume", {}).get(percent, {}).get("resume_s")
    return None if seconds is None else seconds * 1000


def short(value: float) -> str:
    """
    >>> short(12345.6), short(1.234)
    ('12,346', '1.2')
    """
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def speed(records: list[dict[str, Any]]) -> float:
    good = [record["rows_per_s"] for record in records if "error" not in record]
    return statistics.median(good) if good else 0.0


def row(tool: str, records: list[dict[str, Any]]) -> str:
    good = [record for record in records if "error" not in record]
    if not good:
        return f"| {tool} | failed: {records[0]['error']} | | | | | | | | {len(records)} |"
    cells = [
        tool,
        spread([record["rows_per_s"] / 1000 for record in good], "k"),
        f"{statistics.median(record['cores'] for record in good):.1f}",
        spread([record["first_s"] * 1000 for record in good]),
        f"{statistics.median(record['peak_mb'] for record in good):.0f} "
        f"({statistics.median(record['import_mb'] for record in good):.0f})",
    ]
    resumes = {str(percent): [r["resume"][str(percent)] for r in good if "resume" in r] for percent in POINTS}
    for found in resumes.values():
        times = [figures["resume_s"] * 1000 for figures in found if "resume_s" in figures]
        cells.append(spread(times) if times else next((f["error"] for f in found if "error" in f), "-"))
    for name in ("union", "order"):
        said = [str(figures[name]) for found in resumes.values() for figures in found if name in figures]
        cells.append("-" if not said else "right" if set(said) <= {"ok", "True"} else "; ".join(said))
    if any(record["epoch_once"] != "ok" for record in good):
        cells[-2] += f" (epoch: {good[0]['epoch_once']})"
    return "| " + " | ".join([*cells, str(len(good))]) + " |"


def spread(values: list[float], unit: str = "") -> str:
    digits = 0 if statistics.median(values) >= 20 else 1
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle}{unit} ({low}-{high})"


def machine() -> str:
    """Processor, cores and versions."""
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return f"{model.partition(': ')[2]}, {os.cpu_count()} cores, Python {platform.python_version()}; {', '.join(found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", nargs="*", default=["1"], choices=sorted({c for _, cases in TOOLS.values() for c in cases.split()})
    )
    parser.add_argument("--tool", nargs="*", choices=TOOLS)
    parser.add_argument("--workers", nargs="*", type=int, default=[0, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shuffle", choices=["on", "off"], default="on")
    parser.add_argument("--data", type=Path, help="where the data is made and kept; a temporary directory by default")
    parser.add_argument("--json", type=Path, help="keep the raw figures here, beside the ones that are there")
    parser.add_argument("--brief", action="store_true", help="print the tables of the README only")
    parser.add_argument("--budget_s", type=float, help="begin no measurement after so many seconds")
    arguments = parser.parse_args()
    arguments.tool = arguments.tool or [t for t in TOOLS if arguments.shuffle == "on" or t in UNSHUFFLED]
    arguments.ends = time.monotonic() + (arguments.budget_s or 0)
    raw: dict[str, Any] = {"machine": machine(), "conversions": {}, "records": []}
    if arguments.json and arguments.json.exists():
        raw |= json.loads(arguments.json.read_text())
    with tempfile.TemporaryDirectory() as temporary:
        measure(arguments, arguments.data or Path(temporary), raw)
    print(brief(raw) if arguments.brief else table(raw))


if __name__ == "__main__":
    main()
