"""From the host to the device: one batch ahead, on a stream of its own, without blocking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from ddp_stream.batch import Batch, move

T = TypeVar("T")


def transfer(batches: Iterable[T], device: torch.device | str) -> Iterator[T]:
    """The same batches on `device`.

    Where the device has streams, the copy of the next batch runs while the current one is worked on: it is queued on
    a side stream, from pinned memory, and the working stream waits for it on the device, not on the host. The host's
    batch is held until its copy is done, so that its memory is not written to again too early. Elsewhere (CPU)
    nothing is read ahead.

    Args:
        batches: what to move; each a `Batch`, or tensors in nested mappings, lists and tuples
        device: where to
    """
    device = torch.device(device)
    if device.type == "cpu" or not hasattr(getattr(torch, device.type, None), "Stream"):
        for batch in batches:
            yield move(batch, device)
        return
    yield from _ahead(batches, device)


def _ahead(batches: Iterable[T], device: torch.device) -> Iterator[T]:
    module = getattr(torch, device.type)  # torch.cuda, torch.xpu, ...
    side = module.Stream(device)
    held: tuple[Any, Any, Any] | None = None
    for batch in batches:
        with module.stream(side):
            moved = move(batch, device)
        done = side.record_event()
        if held is not None:
            yield _hand_over(*held, module.current_stream(device))
        held = (batch, moved, done)
    if held is not None:
        yield _hand_over(*held, module.current_stream(device))


def _hand_over(source: Any, moved: Any, done: Any, working: Any) -> Any:
    """`moved`, safe to use on the stream `working`, once its copy from `source` is done."""
    working.wait_event(done)
    for tensor in _tensors(moved):
        # The allocator must not give this memory away while the working stream still uses it.
        tensor.record_stream(working)
    done.synchronize()  # the copy was queued a whole step ago; only now may `source` go
    del source
    return moved


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Batch):
        yield value.weight
        yield from _tensors(dict(value))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)) and value and not isinstance(value[0], (str, bytes)):
        for item in value:
            yield from _tensors(item)
