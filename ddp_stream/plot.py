"""Draws who reads what: a PNG with the first steps above, and the readers over the whole source below."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddp_stream.deal import Deal

Picture = NDArray[np.uint8]

_WIDTH, _LEFT, _RIGHT = 1200, 150, 30
_BARS = 24  # readers drawn, and height of one in pixels
_STEPS = 48
_BINS = _WIDTH - _LEFT - _RIGHT
_ROWS = 1 << 18  # rows looked at for each reader


def plot(deal: Deal, path: Path) -> None:
    """Write the picture of `deal` to `path`.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: there is no step to draw.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise ImportError("drawing needs Pillow, which is not installed: pip install 'ddp_stream[images]'") from None
    if deal.steps == 0:
        raise ValueError("an epoch without a step cannot be drawn")
    ranks = _spread(deal.world_size, 8)
    readers = [(rank, worker) for rank in ranks for worker in _spread(deal.num_workers, max(1, _BARS // len(ranks)))]
    steps, slots = _steps(deal, ranks)
    sources = np.stack(
        [_source(deal, rank, worker, _colour(ranks.index(rank), len(ranks), 0.35)) for rank, worker in readers]
    )
    top, bar = 90, 22
    middle = top + bar * len(ranks) + 90
    image = Image.new("RGB", (_WIDTH, middle + bar * len(readers) + 60), "white")
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(18), ImageFont.load_default(13)

    def write(x: int, y: int, text: str, face: Any = small, anchor: str = "la") -> None:
        draw.text((x, y), text, fill=(40, 40, 40), font=face, anchor=anchor)

    cluster = f"{deal.plan.total:,} rows on {deal.world_size:,} ranks x {deal.num_workers} workers"
    write(
        _LEFT, 14, f"{cluster}: {deal.steps:,} steps of {deal.plan.global_batch_size:,}, {deal.plan.lanes} lanes", font
    )
    write(_LEFT, 46, f"Steps of epoch {deal.epoch}, from the first: a colour is a rank, a shade the worker that reads")
    image.paste(Image.fromarray(_scaled(steps, bar)), (_LEFT, top))
    write(_LEFT, top + bar * len(ranks) + 4, "step 0")
    write(_WIDTH - _RIGHT, top + bar * len(ranks) + 4, f"step {slots - 1:,}", anchor="ra")
    for index, rank in enumerate(ranks):
        write(20, top + index * bar + 3, f"rank {rank:,}")
    write(
        _LEFT, middle - 34, "Where in the source each reader reads: the darker, the more of the rows there are its own"
    )
    image.paste(Image.fromarray(_scaled(sources, bar)), (_LEFT, middle))
    for index, (rank, worker) in enumerate(readers):
        write(20, middle + index * bar + 3, f"rank {rank:,}, worker {worker}")
    write(_LEFT, middle + bar * len(readers) + 4, "row 0")
    write(_WIDTH - _RIGHT, middle + bar * len(readers) + 4, f"row {deal.plan.total - 1:,}", anchor="ra")
    image.save(path, format="PNG")


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `0..count-1`, evenly, with the first and the last."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).astype(int).tolist()))


def _colour(index: int, count: int, light: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb(index / max(1, count), light, 0.6)
    return int(255 * red), int(255 * green), int(255 * blue)


def _steps(deal: Deal, ranks: list[int]) -> tuple[Picture, int]:
    """A column a step, a row a rank, `[ranks, steps, 3]`, over two rounds of the workers at most; and how many steps."""
    shown = min(deal.steps, max(_STEPS, 2 * deal.num_workers * deal.span_steps(0)))
    columns = np.linspace(0, shown - 1, min(shown, _BINS)).astype(np.int64)
    picture = np.full((len(ranks), len(columns), 3), 255, np.uint8)
    for index, rank in enumerate(ranks):
        for worker in range(deal.num_workers):
            light = 0.35 + 0.45 * worker / max(1, deal.num_workers - 1)
            size = deal.span_steps(rank)
            for start in deal.starts(rank, worker):
                if start >= shown:
                    break
                picture[index, (columns >= start) & (columns < start + size)] = _colour(index, len(ranks), light)
    return picture, shown


def _source(deal: Deal, rank: int, worker: int, colour: tuple[int, int, int]) -> Picture:
    """How many rows of each stretch of the source one worker reads, as a line `[stretches, 3]`."""
    counts = np.zeros(_BINS, np.int64)
    starts = deal.starts(rank, worker)
    most = max(1, _ROWS // max(1, deal.span_steps(rank) * (deal.slots(rank)[1] - deal.slots(rank)[0])))
    for part in deal.read(rank, [starts[index] for index in _spread(len(starts), most)] if starts else []):
        counts += np.bincount(part.rows[part.filled] * _BINS // deal.plan.total, minlength=_BINS)
    dark = np.sqrt(counts / max(1, counts.max()))  # so that a little is seen, too
    return np.asarray(255 - dark[:, None] * (255 - np.array(colour)), np.uint8)


def _scaled(picture: Picture, bar: int) -> Picture:
    """Stretched to the width of the drawing, rows `bar` high with a gap between them."""
    columns = np.arange(_BINS) * picture.shape[1] // _BINS
    tall = np.repeat(picture[:, columns], bar, axis=0)
    tall[bar - 2 :: bar] = 255
    tall[bar - 1 :: bar] = 255
    return np.ascontiguousarray(tall)
