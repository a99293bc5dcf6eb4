"""Metrics to Weights & Biases, from rank 0, if asked for."""

from __future__ import annotations

from typing import Any

from ddp_stream.training.config import WandbConfig
from ddp_stream.training.rundir import RunDir


class Tracker:
    """Sends events to wandb; with `mode="disabled"` it does nothing and wandb is not imported.

    The wandb run is named after the run directory, so a run that is started again goes on in the same one.

    Raises:
        ModuleNotFoundError: wandb is asked for and not installed.
    """

    def __init__(self, config: WandbConfig, run: RunDir, settings: dict[str, Any]) -> None:
        self._run: Any = None
        if config.mode == "disabled" or run.rank != 0:
            return
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"--wandb.mode {config.mode} needs wandb, which is not installed: pip install 'ddp_stream[wandb]'"
            ) from error
        self._run = wandb.init(
            project=config.project,
            mode=config.mode,
            dir=str(run.path),
            id=run.path.resolve().name,
            name=run.path.resolve().name,
            resume="allow",
            config=settings,
        )

    def log(self, step: int, **values: float) -> None:
        """Numbers of optimizer step `step`."""
        if self._run is not None:
            self._run.log(values, step=step)

    def close(self) -> None:
        """Finish the wandb run."""
        if self._run is not None:
            self._run.finish()
