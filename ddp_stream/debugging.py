"""Looking into a rank that runs: its stacks on a signal, and one rank of several under pdb.

With `DDP_STREAM_DEBUG_RANK=R` (`launch/local.sh --debug R`) rank R stops in pdb before it begins, at every
`breakpoint()`, and where it fails. The other ranks pass by their breakpoints, and wait if they fail, for a launcher
ends all ranks as soon as one of them ends.
"""

from __future__ import annotations

import bdb
import faulthandler
import os
import pdb
import signal
import sys
from collections.abc import Mapping
from types import FrameType

VARIABLE = "DDP_STREAM_DEBUG_RANK"


def begin(frame: FrameType, environ: Mapping[str, str]) -> None:
    """Print stacks on SIGUSR2 and on a crash; stop in `frame` if this is the rank to debug."""
    faulthandler.enable()
    if hasattr(signal, "SIGUSR2"):
        faulthandler.register(signal.SIGUSR2)
    if VARIABLE not in environ:
        return
    chosen = environ.get("RANK", "0") == environ[VARIABLE]
    doing = "stops in pdb; `c` goes on" if chosen else f"leaves breakpoints to rank {environ[VARIABLE]}"
    print(f"{_rank(environ)} {doing}; `kill -USR2 {os.getpid()}` prints its stacks", flush=True)
    if chosen:
        pdb.Pdb(nosigint=True).set_trace(frame)
    else:
        os.environ["PYTHONBREAKPOINT"] = "0"


def failed(error: BaseException, environ: Mapping[str, str]) -> None:
    """After an error: pdb where it happened on the rank to debug; another rank waits until the launcher ends it."""
    if VARIABLE not in environ or isinstance(error, bdb.BdbQuit):
        return
    if environ.get("RANK", "0") == environ[VARIABLE]:
        pdb.post_mortem(error.__traceback__)
    else:
        sys.stderr.write(f"{_rank(environ)} failed, and waits for rank {environ[VARIABLE]}\n")
        sys.stderr.flush()
        while True:
            signal.pause()


def _rank(environ: Mapping[str, str]) -> str:
    return f"[rank {environ.get('RANK', '0')}, pid {os.getpid()}]"
