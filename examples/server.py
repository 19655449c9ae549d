"""Run one of the examples under uvicorn: start the model, print the address, and stop cleanly at Ctrl-C."""

from __future__ import annotations

import itertools
import os
import socket
import sys

import uvicorn

from examples.local_model import ModelMissing, model_endpoint


class Server(uvicorn.Server):
    """Prints the address once the server is ready."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        print(f"The chat is at http://{host}:{port} (press Ctrl-C to stop)", flush=True)


def free_socket(port: int) -> socket.socket:
    """Bind `port` of this machine, or the next free one."""
    for candidate in itertools.count(port):
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if os.name == "posix":  # on Windows the option lets two servers bind the same port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(("127.0.0.1", candidate))
            bound.listen(2048)
        except OSError:
            bound.close()
        else:
            return bound
    raise AssertionError("unreachable: bind rejects a port above 65535 with an OverflowError")


def run(app: str) -> None:
    """Serve `app` (`module:attribute`) until a signal. PORT is the first port to try."""
    try:
        with model_endpoint():
            with free_socket(int(os.environ.get("PORT", "8000"))) as bound:
                Server(uvicorn.Config(app, log_level="warning")).run(sockets=[bound])
    except ModelMissing as exc:
        sys.exit(f"{exc}.\nOr set OPENAI_BASE_URL or OPENAI_API_KEY to use another endpoint.")
    except KeyboardInterrupt:
        pass  # uvicorn raises the signal again after its shutdown
