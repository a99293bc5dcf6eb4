"""Does peak memory grow with the file? The same epoch over a file and over one ten times as large.

    python tests/benchmarks/memory.py [--mb 200] [--dir DIRECTORY]

Writes a Parquet (zstd, row groups of 8,192) and a .npy file of random numbers, and each again ten times as large; reads an
epoch of each, shuffled, in a fresh process; prints the peak RSS of the process. The files are deleted afterwards. `mapped`
is what of it are pages of the file itself, which the kernel takes back when it needs them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = 32
GROUP = 8192


def write(path: Path, megabytes: int) -> None:
    rng = np.random.default_rng(0)
    groups = max(1, megabytes * 1_000_000 // (GROUP * COLUMNS * 4))
    if path.suffix == ".npy":
        shape = (groups * GROUP, COLUMNS)
        array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        for group in range(groups):
            array[group * GROUP : (group + 1) * GROUP] = rng.random((GROUP, COLUMNS), np.float32)
        array.flush()
        return
    schema = pa.schema([(f"x{column}", pa.float32()) for column in range(COLUMNS)])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for _ in range(groups):
            values = rng.random((COLUMNS, GROUP), np.float32)
            writer.write_table(pa.table(list(values), schema=schema))


def read(path: str) -> None:
    """An epoch; prints rows a second, peak RSS and mapped bytes, in MB."""
    from ddp_stream import StreamLoader, open_source

    loader = StreamLoader(open_source(path), 256)
    begun, rows, mapped = time.perf_counter(), 0, 0
    for step, batch in enumerate(loader):
        rows += len(batch.rows)
        if step % 100 == 0 or step == len(loader) - 1:
            mapped = max(mapped, _status("RssFile"))
    print(f"{rows / (time.perf_counter() - begun):.0f} {_status('VmHWM') / 1e3:.0f} {mapped / 1e3:.0f}")


def _status(name: str) -> int:
    """A number of kB about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mb", type=int, default=200, help="size of the smaller file")
    parser.add_argument("--dir", default=None, help="where to write the files for a while")
    parser.add_argument("--read", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read is not None:
        return read(options.read)
    print("| file | size | rows/s | peak RSS | of it mapped |\n|---|---|---|---|---|")
    for suffix in (".parquet", ".npy"):
        for megabytes in (options.mb, 10 * options.mb):
            with tempfile.TemporaryDirectory(dir=options.dir) as folder:
                path = Path(folder, f"rows{suffix}")
                write(path, megabytes)
                size = path.stat().st_size / 1e6
                command = [sys.executable, __file__, "--read", str(path)]
                rate, peak, mapped = map(int, subprocess.check_output(command, text=True).split())
            print(f"| {suffix} | {size:,.0f} MB | {rate:,} | {peak} MB | {mapped} MB |", flush=True)


if __name__ == "__main__":
    main()
