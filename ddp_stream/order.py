"""In which order an epoch visits the rows: bijections of `0..N-1`, pure functions of `(seed, epoch)`.

    position p in the epoch  --Order.rows-->  row id      and back by Order.positions

No table of the rows is kept, so 10^12 rows cost what 10 do, and only unsigned 64-bit integers are used, so every
machine computes the same order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Shuffle = Literal["none", "full", "blocks"]
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

_WORD = (1 << 64) - 1
_ROUNDS = 4
_MIN_DOMAIN = 128  # on fewer points a Feistel network reaches too few of the permutations to be uniform
_CHUNK = 1 << 14  # rows hashed at a time, so that the temporaries stay in the cache

_FEW_BLOCKS = 16  # in a span; a comparison for each takes less than a search among all

DEFAULT_BLOCK_ROWS = 4096
"""Block size of the `blocks` order over a source that has no natural blocks."""
BLOCKS_PER_WINDOW = 4
"""Blocks shuffled together by the `blocks` order where no window is asked for."""


def mix(*words: int) -> int:
    """A 64-bit hash of integers: the splitmix64 finaliser (Steele, Lea, Flood 2014) chained over `words`."""
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state ^ (word & _WORD)) + 0x9E3779B97F4A7C15 & _WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state


def mix_array(words: Words) -> Words:
    """The splitmix64 finaliser of every element of `words [n]`, as a new array."""
    state = words + np.uint64(0x9E3779B97F4A7C15)
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state


class Permutation:
    """A keyed bijection of `0..size-1`, evaluated at any points without a table.

    A generalized Feistel network over the smallest near-square `a x b` that holds `size`, cycle-walked into the range
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): fewer than one point in `sqrt(size)` has to
    walk. `key` may be one word or an array with a word for every point, which evaluates many permutations of the same
    size at once.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        held = max(_MIN_DOMAIN, size)
        self._left = math.isqrt(held - 1) + 1
        self._right = -(-held // self._left)
        self._whole = size == self._left * self._right  # then nothing falls outside

    def forward(self, points: Ints, key: int | Words) -> Ints:
        """Images of `points [n]`, each in `0..size-1`."""
        return self._walk(points, key, range(_ROUNDS), np.subtract)

    def inverse(self, points: Ints, key: int | Words) -> Ints:
        """Where `forward` came from."""
        return self._walk(points, key, range(_ROUNDS - 1, -1, -1), np.add)

    def _walk(self, points: Ints, key: int | Words, rounds: range, back: np.ufunc) -> Ints:
        if self.size == 1:
            return np.zeros(len(points), np.int64)
        out = np.empty(len(points), np.int64)
        for start in range(0, len(points), _CHUNK):
            part = slice(start, start + _CHUNK)
            keys = np.uint64(key) if isinstance(key, int) else key[part]
            values = self._network(points[part].view(np.uint64), keys, rounds, back)
            outside = np.empty(0, np.intp) if self._whole else np.flatnonzero(values >= np.uint64(self.size))
            while len(outside):
                keys_outside = keys if isinstance(keys, np.uint64) else keys[outside]
                values[outside] = self._network(values[outside], keys_outside, rounds, back)
                outside = outside[values[outside] >= np.uint64(self.size)]
            out[part] = values.view(np.int64)
        return out

    def _network(self, values: Words, keys: Words | np.uint64, rounds: range, back: np.ufunc) -> Words:
        half = np.uint64(32)
        left = values // np.uint64(self._right)
        right = values - left * np.uint64(self._right)
        spare = np.empty_like(left)
        for r in rounds:
            # Even rounds shift the left half by a hash of the right one, odd rounds the other way round. Going back,
            # the rounds are run backwards, and shift the other way.
            source, target, size = (right, left, self._left) if r % 2 == 0 else (left, right, self._right)
            word = source + np.uint64(mix(r))
            word ^= keys
            word *= np.uint64(0xBF58476D1CE4E5B9)
            np.right_shift(word, np.uint64(29), out=spare)
            word ^= spare
            word *= np.uint64(0x94D049BB133111EB)
            word >>= half
            word *= np.uint64(size)
            word >>= half
            # Beyond the range, one of the two is a small number, and the other wraps around to a huge one.
            if back is np.subtract:
                target += word
            else:
                target -= word
            back(target, np.uint64(size), out=spare)
            np.minimum(target, spare, out=target)
        left *= np.uint64(self._right)
        left += right
        return left


class Order(ABC):
    """A bijection between the positions of an epoch and the row ids `0..total-1`."""

    window_rows: int | None = None
    """Positions of a lane that are shuffled among themselves, from its begin on; None if there are no such windows."""

    def __init__(self, total: int) -> None:
        self.total = total

    @abstractmethod
    def rows(self, positions: Ints) -> Ints:
        """Row ids at `positions [n]`, each in `0..total-1`."""

    @abstractmethod
    def positions(self, rows: Ints) -> Ints:
        """The inverse: the positions of row ids `rows [n]`."""


class Sequential(Order):
    """Row `p` at position `p`."""

    def rows(self, positions: Ints) -> Ints:
        return positions

    def positions(self, rows: Ints) -> Ints:
        return rows


class Full(Order):
    """A keyed permutation of all rows, in O(1) memory."""

    def __init__(self, total: int, seed: int, epoch: int) -> None:
        super().__init__(total)
        self._permutation = Permutation(total)
        self._key = mix(seed, epoch, 1)

    def rows(self, positions: Ints) -> Ints:
        return self._permutation.forward(positions, self._key)

    def positions(self, rows: Ints) -> Ints:
        return self._permutation.inverse(rows, self._key)


class BlockLayout:
    """Where a source's natural blocks (Parquet row groups, byte ranges of a text file) begin.

    Either explicit `offsets [blocks + 1]` from 0 to `total`, or blocks of equal `block_rows` but for the last,
    which need no table.
    """

    def __init__(self, total: int, *, offsets: Ints | None = None, block_rows: int | None = None) -> None:
        self.total = total
        if offsets is not None:
            offsets = np.asarray(offsets, np.int64)
            sizes = np.diff(offsets)
            if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != total or (sizes < 0).any():
                raise ValueError(
                    f"block offsets must rise from 0 to the {total} rows of the source; got {len(offsets)} offsets "
                    f"from {offsets[:1].tolist()} to {offsets[-1:].tolist()}"
                )
            offsets = np.concatenate([offsets[:1], offsets[1:][sizes > 0]])  # blocks without a row play no part
        self.offsets = offsets
        self.block_rows = block_rows or DEFAULT_BLOCK_ROWS
        self.count = len(offsets) - 1 if offsets is not None else -(-total // self.block_rows)

    @property
    def mean_rows(self) -> int:
        """Rows of an average block, at least 1."""
        return max(1, -(-self.total // max(1, self.count)))


class Blocks(Order):
    """Permute the blocks, then shuffle the rows inside windows of consecutive permuted blocks.

    Reading an epoch touches each block about once, and holds no more than a window's blocks at a time. A window is
    `window_rows` positions; windows never cross from one lane into the next, so a rank that owns whole lanes reads
    only their blocks.
    """

    def __init__(
        self,
        layout: BlockLayout,
        seed: int,
        epoch: int,
        *,
        window_rows: int | None = None,
        lanes: int = 1,
    ) -> None:
        super().__init__(layout.total)
        if window_rows is not None and window_rows < 1:
            raise ValueError(
                f"window_rows={window_rows}: a window needs at least one row, or None for about four blocks"
            )
        self._layout = layout
        self._window: int = window_rows or 1 << (BLOCKS_PER_WINDOW * layout.mean_rows - 1).bit_length()
        self.window_rows = self._window
        self._lanes = lanes
        self._block_permutation = Permutation(layout.count)
        self._block_key = mix(seed, epoch, 2)
        self._window_key = np.uint64(mix(seed, epoch, 3))
        if layout.offsets is not None:
            self._order = self._block_permutation.forward(np.arange(layout.count), self._block_key)
            self._starts = np.concatenate([[0], np.cumsum(np.diff(layout.offsets)[self._order])])
            self._shift = layout.offsets[self._order] - self._starts[:-1]  # from a position to its row
        elif layout.count:
            last = np.array([layout.count - 1])
            self._short_at = int(self._block_permutation.inverse(last, self._block_key)[0])
            self._short_rows = layout.total - (layout.count - 1) * layout.block_rows

    def rows(self, positions: Ints) -> Ints:
        if self.total == 0 or len(positions) == 0:
            return positions
        return self._block_rows(self._shuffle(positions, inverse=False))

    def positions(self, rows: Ints) -> Ints:
        if self.total == 0:
            return rows
        return self._shuffle(self._block_positions(rows), inverse=True)

    def _shuffle(self, positions: Ints, *, inverse: bool) -> Ints:
        """Permute every position within its window."""
        if self._lanes == 1 and len(positions):
            # Spans of a single lane lie in one window or two, so the keys and sizes are few, and no arrays.
            window = positions // self._window
            first, last = int(window.min()), int(window.max())
            if first == last:
                return self._shuffle_window(positions, first, inverse)
            if last - first < 8:
                out = np.empty_like(positions)
                for index in range(first, last + 1):
                    chosen = np.flatnonzero(window == index)
                    out[chosen] = self._shuffle_window(positions[chosen], index, inverse)
                return out
        size, more = divmod(self.total, self._lanes)
        boundary = more * (size + 1)
        lane = np.where(positions < boundary, positions // (size + 1), more + (positions - boundary) // max(1, size))
        lane_start = lane * size + np.minimum(lane, more)
        lane_rows = size + (lane < more)
        within = (positions - lane_start) // self._window
        window_start = within * self._window
        window_rows = np.minimum(self._window, lane_rows - window_start)
        window_start += lane_start
        keys = mix_array(window_start.astype(np.uint64) ^ self._window_key)
        out = np.empty_like(positions)
        for rows in {self._window, size % self._window, (size + 1) % self._window} - {0}:
            # Whole windows, and the last ones of shorter and of longer lanes.
            chosen = np.flatnonzero(window_rows == rows)
            permutation = Permutation(rows)
            walk = permutation.inverse if inverse else permutation.forward
            start = window_start[chosen]
            out[chosen] = start + walk(positions[chosen] - start, keys[chosen])
        return out

    def _shuffle_window(self, positions: Ints, window: int, inverse: bool) -> Ints:
        """Permute positions that all lie in `window` of a single lane."""
        start = window * self._window
        permutation = Permutation(min(self._window, self.total - start))
        key = int(mix_array(np.array([start], np.uint64) ^ self._window_key)[0])
        moved = (permutation.inverse if inverse else permutation.forward)(positions - start, key)
        moved += start
        return moved

    def _block_rows(self, positions: Ints) -> Ints:
        """Row ids at positions of the permuted blocks laid end to end."""
        layout = self._layout
        if layout.offsets is not None:
            ends = np.array([positions.min(), positions.max()])
            first, last = (np.searchsorted(self._starts, ends, side="right") - 1).tolist()
            if last - first >= _FEW_BLOCKS:
                rows: Ints = positions + self._shift[np.searchsorted(self._starts, positions, side="right") - 1]
                return rows
            rows = positions + self._shift[first]
            for later in range(first + 1, last + 1):  # a search for every position takes longer
                rows += (positions >= self._starts[later]) * (self._shift[later] - self._shift[later - 1])
            return rows
        slot, within = self._uniform_slot(positions)
        block = self._block_permutation.forward(slot, self._block_key)
        return block * layout.block_rows + within

    def _uniform_slot(self, positions: Ints) -> tuple[Ints, Ints]:
        """The permuted block that holds each position, and the row inside it, where only one block is short."""
        size = self._layout.block_rows
        missing = size - self._short_rows
        after = positions >= self._short_at * size + self._short_rows
        slot, within = np.divmod(positions + np.where(after, missing, 0), size)
        return slot, within

    def _block_positions(self, rows: Ints) -> Ints:
        layout = self._layout
        if layout.offsets is not None:
            block = np.searchsorted(layout.offsets, rows, side="right") - 1
            slot = self._block_permutation.inverse(block, self._block_key)
            return self._starts[slot] + rows - layout.offsets[block]
        block, within = np.divmod(rows, layout.block_rows)
        slot = self._block_permutation.inverse(block, self._block_key)
        missing = layout.block_rows - self._short_rows
        return slot * layout.block_rows + within - np.where(slot > self._short_at, missing, 0)


def make_order(
    shuffle: Shuffle,
    layout: BlockLayout,
    *,
    seed: int,
    epoch: int,
    window_rows: int | None = None,
    lanes: int = 1,
) -> Order:
    """The order of one epoch over the rows of `layout`.

    Raises:
        ValueError: `shuffle` is not one of `none`, `full`, `blocks`.
    """
    if shuffle == "none":
        return Sequential(layout.total)
    if shuffle == "full":
        return Full(layout.total, seed, epoch)
    if shuffle == "blocks":
        return Blocks(layout, seed, epoch, window_rows=window_rows, lanes=lanes)
    raise ValueError(f"shuffle={shuffle!r} is unknown: use 'none', 'full' or 'blocks'")
