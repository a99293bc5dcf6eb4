"""Files that are made once from the user's data and kept: indexes, and text that was compressed.

    key of the data -> a file of that name in the cache directory -> believed if its checksum is right, else made again

One process makes a file, under a lock that the kernel drops when the process dies, and the others wait for it. A file
gets its name when it is whole. The cache may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from ddp_stream.sources.paths import stamp_of

WAIT_S = 3600.0
"""How long a process waits for another one that makes what it needs."""
_SAY_AFTER_S = 5.0
_WORTH_BYTES = 8 << 20
_DIGEST_BYTES = 32

_log = logging.getLogger("ddp_stream")
Arrays = dict[str, NDArray[Any]]
_T = TypeVar("_T")


class Damaged(Exception):
    """A cached file is not as it was written."""


def cache_dir() -> Path:
    """`DDP_STREAM_CACHE`, or `ddp_stream` in `XDG_CACHE_HOME` or `~/.cache`."""
    if "DDP_STREAM_CACHE" in os.environ:
        return Path(os.environ["DDP_STREAM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddp_stream"


def cached_arrays(paths: Sequence[str], parts: Sequence[Any], what: str, build: Callable[[], Arrays]) -> Arrays:
    """What `build()` returns for `paths`, kept for the next time where it takes long enough to be worth a file.

    Where no file can be written, it is built every time.
    """
    if sum(os.stat(path).st_size for path in paths) < _WORTH_BYTES:
        return build()
    file = cache_dir() / f"{stamp_of(paths, *parts)}.index"
    built: Arrays | None = None

    def make() -> Arrays:
        nonlocal built
        built = build()
        write_arrays(file, built)
        return built

    try:
        return load_or_make(file, read_arrays, make, what)
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
        _log.warning("%s cannot be kept in %s (%s), and is made in every start", what, file.parent, error)
        return build() if built is None else built


def load_or_make(file: Path, load: Callable[[Path], _T], make: Callable[[], _T], what: str) -> _T:
    """`load(file)` if there is one and it is whole, else `make()`, by one process while the others wait.

    Args:
        file: where in the cache
        load: reads it; raises FileNotFoundError or Damaged
        make: writes it and returns what `load` would
        what: what it is, for messages

    Raises:
        TimeoutError: another process has been making it for `WAIT_S` seconds.
    """
    with contextlib.suppress(FileNotFoundError, Damaged):
        return load(file)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _lock(file, what) as locked:
        try:
            return load(file)  # another process made it meanwhile
        except FileNotFoundError:
            pass
        except Damaged as error:
            _log.warning("%s is damaged (%s): %s is made again", file, error, what)
        if locked:
            for left in file.parent.glob(f"{file.stem}.*.tmp"):  # by a process that was killed
                left.unlink(missing_ok=True)
        return make()


@contextlib.contextmanager
def _lock(file: Path, what: str) -> Iterator[bool]:
    """Holds the lock of `file`; False where the file system has no locks, and two may make the same thing."""
    with open(file.with_suffix(".lock"), "w") as lock:
        started = said = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                now = time.monotonic()
                if now - started > WAIT_S:
                    raise TimeoutError(
                        f"another process has been making {what} for {WAIT_S:.0f} s, and holds the lock "
                        f"{file.with_suffix('.lock')}: end it if it is stuck, and start again"
                    ) from None
                if now - said > _SAY_AFTER_S:
                    _log.warning("waiting for another process that makes %s in %s", what, file.parent)
                    said = now + 60
                time.sleep(0.05)
                continue
            except OSError:
                yield False
                return
            yield True
            return


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """A path to write to; it becomes `file` if all goes well, and nothing otherwise."""
    temporary = file.with_name(f"{file.stem}.{file.suffix[1:]}-{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_arrays(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write `arrays` with their checksum, all or nothing."""
    content = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    with written_whole(file) as temporary:
        temporary.write_bytes(hashlib.sha256(content).digest() + content)


def read_arrays(file: Path) -> Arrays:
    """What `write_arrays` wrote.

    Raises:
        Damaged: a byte is not as it was written.
    """
    content = file.read_bytes()
    if hashlib.sha256(content[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
        raise Damaged("its checksum is wrong")
    return dict(safetensors.numpy.load(content[_DIGEST_BYTES:]))


def as_array(value: Any) -> NDArray[np.uint8]:
    """Anything that JSON holds, or bytes, as an array to keep beside others."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return np.frombuffer(content, np.uint8)


def from_array(array: NDArray[np.uint8]) -> Any:
    """The JSON value in an array of `as_array`."""
    return json.loads(array.tobytes())
