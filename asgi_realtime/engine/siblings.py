"""Noticing other workers of the same server, which a broker in memory does not reach.

Workers have the same parent, command line and folder. The first of them locks a file that is named after these three;
whoever finds it locked by another process says so in the log. The lock goes with the process, however that ends. This
does not see other machines and containers, nor workers that were started one by one by hand; where a request shows
them, it is answered `run_kept_elsewhere`.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger("asgi_realtime")

WARNING = (
    "several workers run this app, and the broker is in memory: each has runs of its own, and a browser that reaches"
    " another one does not find its run. Run one worker, or give all of them broker='redis://…' and the same secret_key"
)


class Siblings:
    """Locks the file of this process's family. Holds it from `look` to `leave`."""

    def __init__(self) -> None:
        self._held: tuple[int, Path] | None = None
        self._pid = os.getpid()

    def look(self) -> None:
        """Warn if another process of the family has the lock. Where there can be no such file, nothing is said."""
        if "PYTEST_XDIST_WORKER" in os.environ:  # its workers have one parent too, and share nothing on purpose
            return
        self.leave()
        self._pid = os.getpid()
        path = _family()
        try:
            self._held = (_lock(path), path)
        except BlockingIOError:
            logger.warning(WARNING)
        except (ImportError, OSError) as exc:  # Windows has no such locks; a folder may be read-only
            logger.debug("other workers cannot be seen: %s", exc)

    def leave(self) -> None:
        """Let another process have the lock. Idempotent."""
        held, self._held = self._held, None
        if held is None:
            return
        file, path = held
        if self._pid == os.getpid():  # in a child by a fork it is the lock of the parent
            with suppress(OSError):
                path.unlink()
        os.close(file)


def _family() -> Path:
    told = "\0".join([str(os.getppid()), os.getcwd(), *sys.argv])
    name = hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"asgi_realtime-{name}.lock"


def _lock(path: Path) -> int:
    """The locked file. Raises `BlockingIOError` if another process has the lock.

    A lock of POSIX: it belongs to the process, so a second `Realtime` in here gets it too, and a child that this
    process forks does not hold it.
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
