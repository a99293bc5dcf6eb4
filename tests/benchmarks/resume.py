"""What a resume costs: seconds to the first batch at 0, 10 and 90 percent of an epoch, and the size of the state.

    python tests/benchmarks/resume.py [--rows 10000000]

Every measurement is a fresh process that opens the file, loads the state, and takes one batch; imports are not
counted. The same arithmetic is then timed for 10^12 rows, without the rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddp_stream import StreamLoader
from ddp_stream.order import BlockLayout, make_order
from ddp_stream.partition import GlobalBatchPlan
from ddp_stream.sources import open_source

BATCH = 1024
REPEATS = 5


def first_batch(path: str, num_workers: int, state: str) -> float:
    """Seconds from nothing but imports to the first batch behind `state` (JSON, or empty)."""
    started = time.perf_counter()
    loader = StreamLoader(open_source(path), BATCH, num_workers=num_workers)
    if state:
        loader.load_state_dict(json.loads(state))
    next(iter(loader))
    return time.perf_counter() - started


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(first_batch(sys.argv[2], int(sys.argv[3]), sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.parquet"
        values = np.random.default_rng(0).random((rows, 4), np.float32)
        pq.write_table(
            pa.table({f"x{i}": values[:, i] for i in range(4)}), path, row_group_size=1 << 16, compression="zstd"
        )
        loader = StreamLoader(open_source(path), BATCH)
        print(f"{rows} rows in Parquet, {Path(path).stat().st_size / 1e6:.0f} MB, batches of {BATCH}, {REPEATS} runs")
        print("| workers | position | first batch after, s (min to max) | state, bytes |")
        print("|---|---|---|---|")
        times: dict[tuple[int, int], list[float]] = {}
        states = {
            percent: json.dumps({**loader.state_dict(), "offset": len(loader) * percent // 100 * BATCH})
            for percent in (0, 10, 90)
        }
        for _ in range(REPEATS):  # interleaved
            for num_workers in (0, 2):
                for percent, state in states.items():
                    command = [sys.executable, __file__, "--child", path, str(num_workers), state]
                    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                    times.setdefault((num_workers, percent), []).append(float(out))
        for (num_workers, percent), found in sorted(times.items()):
            spread = f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"
            print(f"| {num_workers} | {percent}% | {spread} | {len(states[percent])} |")
    total = 10**12
    plan = GlobalBatchPlan(total, BATCH)
    print(f"\n{total:.0e} rows, the ids of one batch:")
    for percent in (0, 10, 90):
        offset = total // 100 * percent // BATCH * BATCH
        found = []
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            order = make_order("full", BlockLayout(total), seed=0, epoch=1, window_rows=None, lanes=1)
            order.rows(plan.positions(offset, 1, 0, BATCH)[0])
            found.append(time.perf_counter() - started)
        print(f"at {percent}%: {1e3 * statistics.median(found[1:]):.2f} ms")


if __name__ == "__main__":
    main()
