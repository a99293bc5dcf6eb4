"""The training run, from the configuration to the exit."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from ddp_stream.training.config import TrainConfig
from ddp_stream.training.engine import make_engine
from ddp_stream.training.loop import ProofError, Result, Training
from ddp_stream.training.rundir import RunDir, choose_run_dir
from ddp_stream.training.stopping import StopRequest


def train(config: TrainConfig, config_yaml: str = "") -> Result:
    """Train as configured, on all ranks together.

    Args:
        config: the configuration
        config_yaml: the same as text, for the run directory

    Raises:
        ProofError: an epoch's proof failed; `status.json` says which.
        WorldError: not all promised processes run.
        DataError, ValueError: the data or the configuration stand in the way.
    """
    try:
        engine = make_engine(config.engine, config.timeout_s)
    except Exception as error:
        if config.run.dir is not None:  # without an engine there is no way to agree on another one
            path = Path(config.run.dir)
            path.mkdir(parents=True, exist_ok=True)
            (path / "status.json").unlink(missing_ok=True)
            _report_failure(error, RunDir(path, int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))), 0)
        raise
    rank = engine.topology.rank
    run = RunDir(engine.from_rank_0(choose_run_dir(config.run.dir, os.environ)), rank)
    training: Training | None = None
    try:
        if rank == 0:
            run.open(config_yaml)
        run.attempt = engine.from_rank_0(run.attempt)
        with StopRequest(run.path, config.max_minutes, os.environ) as stop:
            training = Training(config, engine, run, stop)
            return training.run()
    except BaseException as error:
        _report_failure(error, run, training.step if training is not None else 0)
        raise
    finally:
        run.flush()
        if sys.exc_info()[0] is None:
            engine.close()


def _report_failure(error: BaseException, run: RunDir, step: int) -> None:
    """Say on stderr and in `status.json` which rank failed where; the first of several ranks is believed."""
    host = os.environ.get("SLURMD_NODENAME", socket.gethostname())  # as the batch log and scontrol call it
    where = f"rank {run.rank} on {host}, step {step}"
    if "Timed out waiting" in str(error):  # gloo's words; nccl ends the process itself
        where += ", another rank did not come within --timeout_s (its own lines, or py-spy dump, say where it is)"
    if not isinstance(error, ProofError):
        sys.stderr.write(f"[{where}] failed: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
    if run.path.is_dir() and not (run.path / "status.json").exists():
        run.finish("failed", step, f"{where}: {type(error).__name__}: {error}")
