"""`checkpoint`: list, verify or export the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from ddp_stream.commands.cli import Parser
from ddp_stream.training.manifest import find, verify

Action = Literal["list", "verify", "export"]


def parser() -> Parser:
    """The command's options."""
    parser = Parser(description="List, verify or export the checkpoints of a run directory.")
    parser.add_argument("action", type=Action, help="list names them, verify reads every byte, export writes the model")
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument(
        "--step", type=int | None, default=None, help="the step to export; by default the newest whole one"
    )
    parser.add_argument(
        "--out", type=Path | None, default=None, help="where to export to; by default RUN/step-NNNNNNNN.safetensors"
    )
    return parser


def run(parser: Parser, arguments: Any) -> int:
    """Returns 0; 1 if nothing is there, or something is damaged."""
    run_dir = Path(arguments.run)
    found = find(run_dir / "checkpoints")
    if not found:
        print(f"{run_dir} has no checkpoints")
        return 1
    if arguments.action == "export":
        return _export(run_dir, found, arguments.step, arguments.out)
    right = True
    for path in found:
        size = sum(file.stat().st_size for file in path.iterdir())
        line = f"{path.name}  {size / 1e6:.1f} MB"
        if arguments.action == "verify":
            wrong = verify(path)
            right = right and wrong is None
            line += f"  {wrong or 'whole'}"
        print(line)
    return 0 if right else 1


def _export(run_dir: Path, found: list[Path], step: int | None, out: Path | None) -> int:
    """Write the plain model state of one checkpoint as one safetensors file."""
    wanted = [path for path in found if step is None or path.name == f"step-{step:08d}"]
    whole = [path for path in wanted if verify(path) is None]
    if not whole:
        print(
            f"{run_dir} has no whole checkpoint{'' if step is None else f' of step {step}'}: {[p.name for p in found]}"
        )
        return 1
    target = out or run_dir / f"{whole[-1].name}.safetensors"
    model: dict[str, torch.Tensor] = {}
    for shard in sorted(whole[-1].glob("*.safetensors")):
        for name, value in safetensors.torch.load_file(shard).items():
            if name.startswith("model."):
                model[name.removeprefix("model.")] = value
    safetensors.torch.save_file(model, target)
    print(f"{whole[-1].name}: {len(model)} tensors to {target}")
    return 0
