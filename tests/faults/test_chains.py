"""Chains of kills at random steps, each gone on with on another number of ranks and workers, with another engine."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from broken import SOURCE, assert_exactly_once, assert_no_leftovers, events, status
from ranks import DDP_STREAM, start_torchrun

from ddp_stream.training.manifest import find, step_of
from ddp_stream.training.rundir import read_metrics, timeline

pytestmark = pytest.mark.slow

ROWS, LANES, RESUMES = 900, 4, 6
BATCHES = [8, 12, 20]  # that the lanes divide; each attempt takes at most 6 steps, so 6 of them at most 720 rows
SETTINGS = [
    *("--data.source", SOURCE, "--data.source.total_samples", str(ROWS), "--data.lanes", str(LANES)),
    *("--data.shuffle", "full", "--epochs", "1", "--checkpoint.every_steps", "2", "--audit.trace", "true"),
]


@dataclass(frozen=True)
class Chain:
    """What changes from one attempt to the next is drawn from `seed`; the rest stays."""

    seed: int
    ranks: int | None = None
    batch: int | None = None

    def __str__(self) -> str:
        ranks = f"{self.ranks} ranks" if self.ranks else "any ranks"
        return f"{ranks}, {f'batches of {self.batch}' if self.batch else 'any batches'}, seed {self.seed}"


CHAINS = [Chain(0), Chain(1), Chain(2, batch=12), Chain(3, batch=12)]
CHAINS += [Chain(4, ranks=2, batch=12), Chain(5, ranks=3, batch=12), Chain(6, ranks=4, batch=12)]


def attempt(folder: Path, ranks: int, batch: int, *arguments: str, fault: dict[str, object] | None = None) -> str:
    """Of the run in `folder/run`; returns what torchrun and its ranks said."""
    job = start_torchrun(
        *(DDP_STREAM, "train", *SETTINGS, "--run.dir", "run", "--data.global_batch_size", str(batch), *arguments),
        options=["--standalone", f"--nproc_per_node={ranks}"],
        cwd=folder,
        env={"DDP_STREAM_FAULT": json.dumps(fault)} if fault else {},
    ).wait(120)
    return f"exit {job.code}\n{job.out}\n{job.err}"


def draw(rng: random.Random, chain: Chain, done: int) -> tuple[list[object], dict[str, object]]:
    """A topology, and a fault in one of the next steps."""
    ranks, workers = chain.ranks or rng.randint(1, 4), rng.randint(0, 3)
    engine, async_save = rng.choice(["ddp", "accelerate"]), rng.choice(["true", "false"])
    rank = rng.randrange(ranks)
    victim, name = rng.choice(
        [(rank, "SIGKILL"), (rank, "SIGTERM"), ("agent", "SIGKILL"), ("agent", "SIGTERM")]
        + [("worker", "SIGKILL")] * (workers > 0)
    )
    fault = {"at": rng.choice(["forward", "backward"]), "step": done + rng.randint(1, 4)}
    fault |= {"rank": rank, "to": victim, "signal": name}
    return [ranks, chain.batch or rng.choice(BATCHES), workers, engine, async_save], fault


def run_chain(chain: Chain, folder: Path) -> list[str]:
    """Break a run `RESUMES` times, then let it end; returns what every attempt was."""
    rng = random.Random(chain.seed)
    told = []
    for number in range(RESUMES + 1):
        done = max(map(step_of, find(folder / "run" / "checkpoints")), default=0)
        (ranks, batch, *others), fault = draw(rng, chain, done)
        names = ["--data.num_workers", "--engine", "--checkpoint.async_save"]
        arguments = [str(text) for pair in zip(names, others, strict=True) for text in pair]
        broken = number < RESUMES
        said = attempt(folder, int(str(ranks)), int(str(batch)), *arguments, fault=fault if broken else None)
        told.append(f"{ranks} x {others[0]}, {others[1]}, batches of {batch}, {fault if broken else ''}")
        faults = list((folder / "run").glob(".fault-*"))
        assert len(faults) == broken, f"{told[-1]}\n{said}"
        assert broken or said.startswith("exit 0"), said
        for path in faults:  # so that the next one can happen
            path.unlink()
    return told


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run that nobody touched, by its number of ranks."""
    runs: dict[int, Path] = {}

    def of(ranks: int) -> Path:
        if ranks not in runs:
            folder = tmp_path_factory.mktemp("unbroken")
            said = attempt(folder, ranks, 12, "--data.num_workers", "1")
            assert said.startswith("exit 0"), said
            runs[ranks] = folder / "run"
        return runs[ranks]

    return of


@pytest.fixture(scope="module")
def chains(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Chain, Future]]:
    """All that were asked for, three at a time, since most of their time is waiting."""
    wanted = [item.callspec.params["chain"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(3) as pool:
        folders = {chain: tmp_path_factory.mktemp("chain") for chain in wanted}
        yield {chain: (folder, pool.submit(run_chain, chain, folder)) for chain, folder in folders.items()}
        pool.shutdown(cancel_futures=True)


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in timeline(read_metrics(run / "metrics.jsonl")) if event["event"] == "step"]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_a_chain_ends_as_if_nothing_had_been(
    chain: Chain, chains: dict, unbroken: Callable[[int], Path], report: Callable[..., None]
) -> None:
    folder, running = chains[chain]
    told, run = running.result(), folder / "run"
    resumes = [event["step"] for event in events(run, "resume")]
    report("chains of kills: resumed from which steps", chain, resumes)
    assert len(resumes) >= 5, told
    assert status(run) == "done"
    assert_exactly_once(run, ROWS, 1)
    assert_no_leftovers(run)
    if chain.batch:
        assert losses(run) == pytest.approx(losses(unbroken(chain.ranks or 1)), rel=1e-5)
    if chain.ranks:
        same = unbroken(chain.ranks)
        assert (run / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
