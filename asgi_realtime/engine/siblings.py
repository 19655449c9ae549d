"""Detecting other workers of the same server, with which a broker in memory shares nothing.

Workers have the same parent, command line and working directory. The first one locks a file that is named after these
three, and each worker that finds it locked by another process logs a warning. The lock ends with the process, however
that ends. Workers on other machines, in other containers, or started separately are not detected at the start; a
request that reveals one is answered with 404 `run_kept_elsewhere`, by the `home` claim of its token.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from asgi_realtime.loop.logger import logger

WARNING = (
    "several workers run this app with a broker in memory: each has only its own runs, so a browser that reaches"
    " another worker does not find its run; run one worker, or give all of them broker='redis://…' and the same"
    " secret_key"
)


class Siblings:
    """Holds the lock from `check` to `release`, if this worker is the first."""

    def __init__(self) -> None:
        self._held: tuple[int, Path] | None = None
        self._pid = os.getpid()

    def check(self) -> None:
        """Log a warning if another worker holds the lock. Does nothing where the file cannot be created."""
        if "PYTEST_XDIST_WORKER" in os.environ:  # these workers have one parent too, and share nothing on purpose
            return
        self.release()
        self._pid = os.getpid()
        path = _lock_path()
        try:
            self._held = (_lock(path), path)
        except BlockingIOError:
            logger.warning(WARNING)
        except (ImportError, OSError) as exc:  # Windows has no such locks; a directory can be read-only
            logger.debug("other workers cannot be detected: %s", exc)

    def release(self) -> None:
        """Release the lock, so that another worker can hold it. Idempotent."""
        held, self._held = self._held, None
        if held is None:
            return
        file, path = held
        if self._pid == os.getpid():  # in a forked child the lock belongs to the parent
            with suppress(OSError):
                path.unlink()
        os.close(file)


def _lock_path() -> Path:
    identity = "\0".join([str(os.getppid()), os.getcwd(), *sys.argv])
    name = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"asgi_realtime-{name}.lock"


def _lock(path: Path) -> int:
    """Lock the file and return its descriptor. Raises `BlockingIOError` if another process holds the lock.

    POSIX locks belong to a process, so a second `Realtime` in this process gets the lock as well, and a forked child
    does not hold it.
    """
    import fcntl

    file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(file)
        if exc.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(exc.errno, "locked by another process") from exc
        raise
    return file
