"""What the tests of the blocking calls share."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread

from asgi_realtime import Realtime, TaskError
from asgi_realtime.brokers.memory import MemoryBroker
from tests.inprocess import make_realtime

GUARD_S = 60.0


def with_tasks(**options: Any) -> Realtime:
    realtime = make_realtime(**options)

    @realtime.task("double")
    async def double(payload: int) -> int:
        return payload * 2

    @realtime.task("fails")
    async def fails() -> None:
        raise TaskError("no")

    return realtime


async def in_thread(function: Callable[[], Any]) -> Any:
    with anyio.fail_after(GUARD_S):
        return await anyio.to_thread.run_sync(function)


def run_program(program: str) -> str:
    """Run a program in a new process and return its output."""
    prelude = """
        import os, signal, sys, threading, time
        from asgi_realtime import *
        from asgi_realtime.brokers.memory import MemoryBroker

        class Shared(MemoryBroker):
            shared = True

        class Nobody:
            async def enqueue(self, run_id, task_id): ...

        def make():
            realtime = Realtime(secret_key="k" * 32, broker=Shared(), executor=Nobody())

            @realtime.task("double")
            def double(payload: int) -> int:
                return payload * 2

            @realtime.task("wait")
            async def wait() -> None:
                await current_run().input("never").get()

            return realtime

        realtime = make()
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(prelude) + textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


class Shared(MemoryBroker):
    """Claims to be shared between processes."""

    shared = True


def wait_for(fact: Callable[[], object]) -> None:
    """Block this thread until the fact is true."""
    deadline = time.monotonic() + GUARD_S
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.001)
