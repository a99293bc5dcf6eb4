"""The same training run on any number of ranks: it agrees with a plain loop over the same global batches."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from ranks import run_ranks

from ddp_stream.order import BlockLayout, make_order, mix
from ddp_stream.sources import SyntheticRegression
from ddp_stream.tasks import Regression
from ddp_stream.training.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from ddp_stream.training.train import train

ROWS, BATCH, EPOCHS, SEED = 1000, 96, 2, 3
STEPS = 22  # an epoch is 10 steps of 96 rows and one of 40
PEAK, WARMUP = 0.01, 5


@dataclass(frozen=True)
class Run:
    directory: str
    optimizer: Literal["adam", "sgd"]
    workers: int
    micro_batch_size: int | None
    clip_norm: float | None
    engine: Literal["ddp", "accelerate"] = "ddp"


@dataclass(frozen=True)
class Trained:
    weights: torch.Tensor  # [parameters], one after the other
    losses: list[float]


@functools.cache
def plain(optimizer_name: str, clip_norm: float | None) -> Trained:
    """One process, no worker, no engine: every step is the mean over rows 96 s .. 96 s + 95 of the epoch's order."""
    source = SyntheticRegression(ROWS)
    torch.manual_seed(mix(SEED) >> 1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    if optimizer_name == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters())
    else:
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    losses = []
    for epoch in range(EPOCHS):
        order = make_order("full", BlockLayout(ROWS), seed=SEED, epoch=epoch)
        total = 0.0
        for step in range(11):
            rows = source.take(order.rows(np.arange(96 * step, min(96 * step + 96, ROWS))))
            error = model(rows["features"]) - rows["label"]
            loss = error.square().mean()
            optimizer.zero_grad()
            loss.backward()
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            done = 11 * epoch + step
            factor = (done + 1) / WARMUP
            if done >= WARMUP:
                factor = 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (STEPS - WARMUP)))
            optimizer.param_groups[0]["lr"] = PEAK * factor
            optimizer.step()
            total += loss.item() * len(rows["label"])
        losses.append(total / ROWS)
    return Trained(torch.nn.utils.parameters_to_vector(model.parameters()).detach(), losses)


def train_here(run: Run) -> Trained:
    config = TrainConfig(
        task=Regression(),
        data=DataConfig(global_batch_size=BATCH, micro_batch_size=run.micro_batch_size, num_workers=run.workers),
        optim=OptimConfig(
            run.optimizer, lr=PEAK, momentum=0.9, schedule="cosine", warmup_steps=WARMUP, clip_norm=run.clip_norm
        ),
        engine=run.engine,
        epochs=EPOCHS,
        seed=SEED,
        run=RunConfig(dir=run.directory),
    )
    result = train(config)
    assert result.steps == STEPS
    assert [verdict.exactly_once for verdict in result.verdicts] == [True, True]
    return Trained(torch.nn.utils.parameters_to_vector(result.model.parameters()).detach(), result.losses)


def check(world_size: int, runs: list[Run]) -> None:
    for by_run in run_ranks(train_here, world_size, runs, group=False):
        for run, trained in zip(runs, by_run, strict=True):
            expected = plain(run.optimizer, run.clip_norm)
            difference = (trained.weights - expected.weights).norm() / expected.weights.norm()
            assert difference < 1e-5, (run, difference)
            assert trained.losses == pytest.approx(expected.losses, rel=1e-5), run


# Adam forgives a gradient that is too large by some factor, and SGD does not.
SETTINGS: list[tuple[Literal["adam", "sgd"], int, int | None, float | None]] = [
    ("adam", 0, None, None),
    ("adam", 2, 7, 0.5),
    ("sgd", 0, None, 0.5),
    ("sgd", 0, 7, None),
    ("sgd", 2, None, None),
    ("sgd", 2, 7, 0.5),
]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ddp(world_size: int, tmp_path: Path) -> None:
    check(world_size, [Run(str(tmp_path / str(index)), *setting) for index, setting in enumerate(SETTINGS)])


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[-1]], ids=["plain", "accumulated-clipped"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_accelerate(
    world_size: int, setting: tuple[Literal["adam", "sgd"], int, int | None, float | None], tmp_path: Path
) -> None:
    # One run for every set of ranks, for accelerate's state is one for the whole life of a process.
    check(world_size, [Run(str(tmp_path), *setting, "accelerate")])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_clipping_matters(optimizer: str) -> None:
    free, clipped = plain(optimizer, None), plain(optimizer, 0.5)
    assert (free.weights - clipped.weights).norm() / free.weights.norm() > 1e-3
