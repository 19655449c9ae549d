"""The command: `python -m benchmarks.soak [--seconds 60] [--visitors 20] [--redis]`.

Clients trigger runs over HTTP, send inputs, cancel, and read each run in several ways: with cuts, pauses, and tokens
that expire. Each reader must get every chunk once and in order, and afterwards the server must hold what it held
before. With `--redis` the server runs on a Redis that is killed half-way and returns with its data after two seconds.
Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from benchmarks.soak.app import KEEP_S
from benchmarks.soak.visitors import Tally, Visitor

AWAY_S = 2.0
"""How long Redis is away."""

SETTLE_S = KEEP_S + 15.0
MAX_GROWTH_MIB = 64
_START_S = 20.0
_ROOT = Path(__file__).parent.parent.parent

Inside = dict[str, int]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(*command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, cwd=_ROOT, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def redis_with_one_crash(port: int, over: asyncio.Event, seconds: float) -> None:
    """A Redis with an append-only file. It is killed after half of the time, and started again."""
    with TemporaryDirectory() as directory:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", directory]
        command += ["--save", "", "--appendonly", "yes"]
        with running(*command) as process:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), seconds / 2)
            process.kill()
            process.wait()
        await asyncio.sleep(AWAY_S)
        with running(*command):
            await over.wait()


@contextlib.asynccontextmanager
async def site(*, redis: bool, seconds: float) -> AsyncIterator[str]:
    """The address of a server."""
    over = asyncio.Event()
    environment = {}
    async with asyncio.TaskGroup() as tasks:
        if redis:
            redis_port = free_port()
            environment["SOAK_BROKER"] = f"redis://127.0.0.1:{redis_port}"
            tasks.create_task(redis_with_one_crash(redis_port, over, seconds))
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", "benchmarks.soak.app:app", "--port", str(port)]
        try:
            with running(*command, "--log-level", "warning", **environment):
                yield f"http://127.0.0.1:{port}"
        finally:
            over.set()


async def look_inside(http: httpx.AsyncClient) -> Inside:
    found: Inside = (await http.get("/inside")).json()
    return found


async def until_served(http: httpx.AsyncClient) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            if (await http.get("/realtime/v1/health")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "the server did not start; see its messages above"
        await asyncio.sleep(0.1)


async def until_settled(http: httpx.AsyncClient, before: Inside) -> Inside:
    """What the server holds, once it is no more than before, or after `SETTLE_S`."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        now = await look_inside(http)
        if not leaks(before, now) or time.monotonic() > deadline:
            return now
        await asyncio.sleep(0.5)


def leaks(before: Inside, after: Inside) -> list[str]:
    """The names of what the server holds more of."""
    slack = {"memory_mib": MAX_GROWTH_MIB, "tasks": 2, "files": 4}
    return [name for name in before if after[name] > before[name] + slack.get(name, 0)]


async def visit(url: str, *, seconds: float, visitors: int, tally: Tally) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    over = asyncio.Event()
    async with httpx.AsyncClient(base_url=f"{url}/realtime", limits=limits, timeout=30) as http:
        async with asyncio.TaskGroup() as tasks:
            for seed in range(visitors):
                tasks.create_task(Visitor(http, tally, seed).visit_until(over))
            await asyncio.sleep(seconds)
            over.set()


async def soak(*, seconds: float, visitors: int, redis: bool) -> bool:
    """Run everything and print a table. Returns whether everything was right."""
    warm_up, tally = Tally(), Tally()
    warm_up_s = min(10.0, seconds / 4)
    async with site(redis=redis, seconds=seconds) as url, httpx.AsyncClient(base_url=url, timeout=30) as http:
        await until_served(http)
        await visit(url, seconds=warm_up_s, visitors=visitors, tally=warm_up)
        await asyncio.sleep(KEEP_S + 1)
        before = await look_inside(http)
        await visit(url, seconds=seconds - warm_up_s, visitors=visitors, tally=tally)
        after = await until_settled(http, before)
    tally.counts += warm_up.counts
    failures = warm_up.failures + tally.failures + [f"more {name} than before" for name in leaks(before, after)]
    print(f"{'Redis, killed once' if redis else 'memory'}, {seconds:g} s, {visitors} visitors")
    print(*(f"  {name:24}{count:>10}" for name, count in sorted(tally.counts.items())), sep="\n")
    print(f"  {'the server holds':24}{'before':>10}{'after':>10}")
    print(*(f"  {name:24}{before[name]:>10}{after[name]:>10}" for name in before), sep="\n")
    print(*(f"  FAILED: {failure}"[:500] for failure in failures[:20]), f"  {len(failures)} failures", sep="\n")
    return not failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long; default: 60")
    parser.add_argument("--visitors", type=int, default=20, help="clients at once; default: 20")
    parser.add_argument("--redis", action="store_true", help="on a Redis of its own, which is killed half-way")
    options = parser.parse_args()
    return 0 if asyncio.run(soak(**vars(options))) else 1


if __name__ == "__main__":
    sys.exit(main())
