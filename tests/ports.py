"""Ports for servers that need to know their port before they start. No two test processes get the same one."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile

PORTS = range(11000, 21000)
"""Below the ports that the system assigns to outgoing connections, so a stopped server finds its own port free again.

The bus of a Redis Cluster node is 10,000 higher: also below them, and never the port of another server.
"""
BUS = 10_000

_lock_file: int | None = None
_assigned: set[int] = set()


def free_port() -> int:
    """A port on which nothing listens, nor on that of its cluster bus. Reserved until this process exits."""
    for port in random.sample(PORTS, len(PORTS)):
        if port not in _assigned and _reserve(port) and _is_free(port) and _is_free(port + BUS):
            _assigned.add(port)
            return port
    raise RuntimeError(f"no port is free between {PORTS.start} and {PORTS.stop}")


def _reserve(port: int) -> bool:
    """Lock the byte of a port in a file that all test processes of this user share; the lock ends with the process."""
    global _lock_file
    if _lock_file is None:
        path = os.path.join(tempfile.gettempdir(), f"asgi_realtime-ports-{os.getuid()}")
        _lock_file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.lockf(_lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
