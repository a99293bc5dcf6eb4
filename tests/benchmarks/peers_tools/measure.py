"""One measurement in a process of its own: its figures as JSON on the last line of stdout.

    run      build, first batch, the rest of epoch 0 (ids, memory, states at 10% and 90%), then timed epochs
    resume   build, load a state, first batch; and the rest of the epoch, to compare its ids

The clock starts when the imports are done, and importing is told apart. Looking at ids, memory and states is not timed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

POINTS = (10, 90)
_TIMED_S = 1.5
_SLOW_S = 4.0

TOOLS = {
    "ours": ("ours", "1 2csv 2npy 3 4 5"),
    "bare": ("bare", "1 2csv 2npy 3 4 5"),
    "bare-stacked": ("bare", "1 2csv"),
    "torch": ("torch_map", "1 2csv 2npy 3 4 5"),
    "torch-getitems": ("torch_map", "1 2csv 2npy 4 5"),
    "stateful": ("torch_map", "1 2csv 2npy 3 4 5"),
    "hf-stream": ("huggingface", "1 2csv 3 4 5"),
    "hf-arrow": ("huggingface", "1 2csv 4 5"),
    "hf-map": ("huggingface", "1 3 4 5"),
    "webdataset": ("web", "1 3 4 5"),
    "mosaic": ("mosaic", "1 3 4 5"),
    "litdata": ("lit", "1 3 4 5"),
    "grain": ("grain_map", "1 2npy 3 4 5"),
}
"""Module and cases of every loader. Who converts the rows reads the same copy in cases 1 and 2: measured in case 1."""


def module_of(tool: str) -> Any:
    return importlib.import_module(f"peers_tools.{TOOLS[tool][0]}")


def tree(pid: int) -> list[int]:
    """`pid` and all its descendants that are alive."""
    found = [pid]
    for process in found:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            found.extend(map(int, children.read_text().split()))
    return found


def tree_peak_mb() -> float:
    """Sum of the peak resident sizes of this process and its descendants; what they share counts for each."""
    kilobytes = 0
    for pid in tree(os.getpid()):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except FileNotFoundError:  # ended meanwhile
            continue
        kilobytes += int(status.partition("VmHWM:")[2].split()[0])
    return kilobytes / 1024


def tree_cpu_s() -> float:
    """CPU seconds of this process and of its living descendants."""
    ticks = 0
    for pid in tree(os.getpid()):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def touch(batch: Mapping[str, Any]) -> int:
    """Rows of a batch, with every column taken in the hand."""
    rows = 0
    for name in batch:
        rows = len(batch[name])
        break
    for name in batch:
        batch[name]
    return rows


def run(tool: str, setup: Any) -> dict[str, Any]:
    """Figures of a whole run from an empty process; states and ids go to files beside the data."""
    import numpy as np

    from peers_tools.base import check_batch

    maker = module_of(tool).TOOLS[tool]
    before_mb = tree_peak_mb()
    started = time.perf_counter()
    loader = maker(setup)
    batches: Iterator[Any] = iter(loader.epoch(0))
    batch = next(batches)
    first_s = time.perf_counter() - started
    if not tool.startswith("bare"):
        check_batch(setup.case, batch)
    marks = {setup.case.steps * percent // 100: percent for percent in POINTS} if loader.resume_by else {}
    ids, states, peak_mb, taken, aside = [], {}, 0.0, 0, 0.0
    while batch is not None:
        touch(batch)
        taken += 1
        looked = time.perf_counter()
        ids.append(loader.rows(batch))
        if taken in marks:
            states[marks[taken]] = (taken, loader.state(taken))
        if taken == 1 or taken in marks or taken % 200 == 0:
            peak_mb = max(peak_mb, tree_peak_mb())
        aside += time.perf_counter() - looked
        batch = next(batches, None)
    epoch_s = time.perf_counter() - started - aside
    peak_mb = max(peak_mb, tree_peak_mb())
    rows = sum(map(len, ids))
    speeds, cores = [rows / epoch_s], 0.0
    if epoch_s < _SLOW_S:
        speeds, timed_s, number = [], 0.0, 0
        cpu_s = tree_cpu_s()
        while timed_s < _TIMED_S and number < 30:
            number += 1
            began, seen = time.perf_counter(), 0
            for batch in loader.epoch(number):
                seen += touch(batch)
            epoch_s = time.perf_counter() - began
            timed_s += epoch_s
            speeds.append(seen / epoch_s)
        cores = (tree_cpu_s() - cpu_s) / timed_s
        peak_mb = max(peak_mb, tree_peak_mb())
    all_ids = np.concatenate(ids)
    np.savez(state_path(tool, setup, "ids"), ids=all_ids, taken=np.array([len(part) for part in ids]))
    for percent, state in states.items():
        Path(state_path(tool, setup, str(percent))).write_bytes(pickle.dumps(state))
    speeds.sort()
    return {
        "first_s": first_s,
        "rows_per_s": speeds[len(speeds) // 2],
        "epochs": len(speeds),
        "cores": cores,
        "peak_mb": peak_mb,
        "import_mb": before_mb,
        "epoch_once": exactly_once(all_ids, setup.case.rows),
        "shuffled": bool((np.diff(all_ids) != 1).mean() > 0.5),
        "resume_by": loader.resume_by,
    }


def resume(tool: str, setup: Any, percent: int, rest: bool) -> dict[str, Any]:
    """Seconds from nothing to the first batch behind a state, and whether the rest of the epoch was right."""
    import numpy as np

    maker = module_of(tool).TOOLS[tool]
    taken, state = pickle.loads(Path(state_path(tool, setup, str(percent))).read_bytes())
    started = time.perf_counter()
    loader = maker(setup)
    loader.load(state)
    batches = iter(loader.epoch(0))
    batch = next(batches, None)
    figures: dict[str, Any] = {"resume_s": time.perf_counter() - started}
    if rest:
        whole = np.load(state_path(tool, setup, "ids"))
        before = whole["ids"][: whole["taken"][:taken].sum()]
        expected = whole["ids"][len(before) :]
        after: list[Any] = [np.zeros(0, np.int64)]
        while batch is not None:
            touch(batch)
            after.append(loader.rows(batch))
            batch = next(batches, None)
        rows = np.concatenate(after)
        figures["union"] = exactly_once(np.concatenate([before, rows]), setup.case.rows)
        figures["order"] = bool(np.array_equal(rows, expected))
    return figures


def exactly_once(ids: Any, rows: int) -> str:
    """`ok`, or how many of the ids 0..rows-1 are missing and how many are there again."""
    import numpy as np

    counts = np.bincount(ids, minlength=rows)
    missing, repeated = int((counts[:rows] == 0).sum()), int(np.maximum(counts - 1, 0).sum())
    return "ok" if not missing and not repeated else f"{missing} missing, {repeated} twice"


def state_path(tool: str, setup: Any, name: str) -> str:
    """Where a run leaves its ids and states for the resumes that follow it."""
    suffix = ".npz" if name == "ids" else ".pickle"
    order = "on" if setup.shuffle else "off"
    return str(setup.folder / f"state-{setup.case.name}-{tool}-{setup.workers}-{order}-{name}{suffix}")


def main(job: dict[str, Any]) -> None:
    began = time.perf_counter()
    module = module_of(job["tool"])
    with contextlib.suppress(ImportError):  # pyarrow imports it by itself where it is there, at the first conversion
        import pandas  # noqa: F401
    if job["case"] == "3":
        import torchvision.io  # noqa: F401
    import_s = time.perf_counter() - began
    from peers_tools.base import Setup
    from peers_tools.data import CASES

    case, folder = CASES[job["case"]], Path(job["folder"])
    setup = Setup(job["tool"], case, folder, job["workers"], job["shuffle"])
    if job["what"] == "convert":
        figures = {}
        if not os.path.exists(setup.converted):
            began, partial = time.perf_counter(), setup.converted + ".partial"
            shutil.rmtree(partial, ignore_errors=True)
            module.convert(setup, partial)
            os.rename(partial, setup.converted)
            figures["convert_s"] = time.perf_counter() - began
    elif job["what"] == "run":
        figures = {"import_s": import_s, **run(job["tool"], setup)}
    else:
        figures = resume(job["tool"], setup, job["percent"], job["rest"])
    print("\n" + json.dumps(figures), flush=True)
    os._exit(0)  # some loaders leave threads behind that would keep the process waiting


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
