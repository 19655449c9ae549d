"""The clients of the soak. Each visit starts a run over HTTP, reads it in several ways, and checks what arrived."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from asgi_realtime.core.event_stream import EventParser
from benchmarks.soak.app import SECRET

KINDS = ("steady", "cut", "stalled", "expiring")
"""Readers that read on, disconnect after a few events, pause, and have tokens of two seconds."""

GIVE_UP_S = 60.0
"""How long a visit may take. Redis is away for a few seconds of it."""


@dataclass(slots=True)
class Tally:
    """What happened so far."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Visitor:
    """Visits a server one time after another."""

    def __init__(self, http: httpx.AsyncClient, tally: Tally, seed: int) -> None:
        self._http = http
        self._tally = tally
        self._random = random.Random(seed)
        self._owner = f"user:{seed}"

    async def visit_until(self, over: asyncio.Event) -> None:
        while not over.is_set():
            try:
                async with asyncio.timeout(GIVE_UP_S):
                    await self._visit()
            except Exception as exc:
                self._tally.failures.append(f"a visit failed: {exc!r}")
                await asyncio.sleep(1)

    async def _visit(self) -> None:
        count = self._random.randrange(20, 200)
        large = self._random.random() < 0.2
        payload = {"count": count, "size": 20_000 if large else 20, "pause_s": self._random.choice((0.001, 0.01, 0.02))}
        trigger = await self._token("trigger:tasks:produce")
        body = {"payload": payload, "options": {"tags": ["soak"]}}
        key = {"x-trigger-request-idempotency-key": f"{self._random.getrandbits(64):x}"}
        run_id = (await self._post("/api/v1/tasks/produce/trigger", trigger, body, key))["id"]
        self._tally.counts["runs"] += 1

        readers = [asyncio.create_task(self._read(run_id, kind)) for kind in KINDS]
        try:
            sender = await self._token(f"write:inputStreams:{run_id}")
            await self._post(f"/v1/streams/{run_id}/input/go", sender, {"data": None}, key)
            canceled = self._random.random() < 0.2
            if canceled:
                await asyncio.sleep(self._random.random())
                await self._post(f"/api/v2/runs/{run_id}/cancel", await self._token(f"write:runs:{run_id}"), {})
                self._tally.counts["cancels"] += 1
            read = await asyncio.gather(*readers)
        finally:
            for reader in readers:
                reader.cancel()
        self._check(run_id, count, dict(zip(KINDS, read, strict=True)), canceled=canceled)

    def _check(self, run_id: str, count: int, read: dict[str, tuple[list[int], str]], *, canceled: bool) -> None:
        complete = read["steady"]
        for kind, (numbers, reason) in read.items():
            self._tally.counts["chunks"] += len(numbers)
            if numbers != list(range(len(numbers))):
                self._tally.failures.append(f"{run_id}, {kind}: chunks are missing or doubled: {numbers}")
            elif (numbers, reason) != complete:
                self._tally.failures.append(
                    f"{run_id}, {kind}: {len(numbers)} {reason}, steady: {len(complete[0])} {complete[1]}"
                )
            elif reason == "complete" and len(numbers) != count or reason != "complete" and not canceled:
                self._tally.failures.append(f"{run_id}, {kind}: {len(numbers)} of {count} chunks, {reason}")

    async def _read(self, run_id: str, kind: str) -> tuple[list[int], str]:
        """The numbers of all chunks, and why the stream ended."""
        numbers: list[int] = []
        last_id, token = "", ""
        while True:
            token = token or await self._token(f"read:runs:{run_id}", "2s" if kind == "expiring" else "5m")
            headers = {"authorization": f"Bearer {token}", "accept": "text/event-stream"}
            headers |= {"last-event-id": last_id} if last_id else {}
            try:
                async with self._http.stream("GET", f"/v1/streams/{run_id}/default", headers=headers) as response:
                    if response.status_code == 401:
                        token = ""
                    elif response.status_code != 200:
                        await self._pause(response)
                    else:
                        left = self._random.randrange(1, 40) if kind == "cut" else -1
                        async for name, id, data in self._events(response):
                            if name == "end" and (reason := json.loads(data)["reason"]) == "token_expired":
                                token = ""
                            elif name == "end":
                                return numbers, reason
                            if name == "gap":
                                raise AssertionError(f"{run_id}, {kind}: a gap: {data}")
                            if name == "message":
                                numbers.append(json.loads(data)["number"])
                                last_id, left = id, left - 1
                            if left == 0:
                                break
                            if kind == "stalled" and self._random.random() < 0.03:
                                await asyncio.sleep(self._random.random() * 1.5)
            except httpx.TransportError:
                self._tally.counts["connections lost"] += 1
            self._tally.counts["resumptions"] += 1
            await asyncio.sleep(0.05)

    async def _events(self, response: httpx.Response) -> AsyncIterator[tuple[str, str, str]]:
        parser = EventParser()
        async for part in response.aiter_bytes():
            for event in parser.feed(part):
                yield event.event, event.id or "", event.data

    async def _token(self, scope: str, lifetime: str = "5m") -> str:
        body = {"scopes": [scope], "expirationTime": lifetime, "realtime": {"owner": self._owner}}
        token: str = (await self._post("/api/v1/auth/public-tokens", SECRET, body))["token"]
        return token

    async def _post(self, path: str, token: str, body: Any, headers: dict[str, str] | None = None) -> dict[str, Any]:
        """The response, once there is one: a request is repeated while the server or Redis is away."""
        while True:
            try:
                response = await self._http.post(
                    path, json=body, headers={"authorization": f"Bearer {token}", **(headers or {})}
                )
            except httpx.TransportError:
                self._tally.counts["connections lost"] += 1
                await asyncio.sleep(0.2)
                continue
            if response.status_code in (429, 503):
                await self._pause(response)
                continue
            assert response.status_code < 300, f"{path}: {response.status_code} {response.text[:300]}"
            found: dict[str, Any] = response.json()
            return found

    async def _pause(self, response: httpx.Response) -> None:
        self._tally.counts[f"responses with {response.status_code}"] += 1
        assert response.status_code in (429, 503), f"{response.status_code}: {(await response.aread())[:300]!r}"
        await asyncio.sleep(0.2)
