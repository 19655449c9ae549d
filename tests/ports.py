"""Ports for servers that must be told one, and that no other process of the tests is given meanwhile."""

from __future__ import annotations

import os
import random
import socket

PORTS = range(11000, 21000)
"""Below the ports that the system gives to outgoing connections, so a server that is away finds its own port again.

The bus of a Redis Cluster's node is 10,000 higher: below them too, and never the port of another server.
"""
BUS = 10_000

_given: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on, nor on that of its cluster bus. This process gets each port once."""
    own = _share(PORTS, os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    for port in random.sample(own, len(own)):
        if port not in _given and _is_free(port) and _is_free(port + BUS):
            _given.add(port)
            return port
    raise RuntimeError(f"no port is free between {PORTS.start} and {PORTS.stop}")


def _share(ports: range, worker: str | None, count: int) -> range:
    """The ports for one of several processes that test side by side: pytest-xdist calls them gw0, gw1, …"""
    return ports if worker is None else ports[int(worker.removeprefix("gw")) :: count]


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
