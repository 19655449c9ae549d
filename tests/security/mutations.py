"""Random requests for the mount: valid ones, and valid ones that were damaged.

Everything derives from one `random.Random`, so a seed reproduces its requests as long as this file stays the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from asgi_realtime.asgi.routes import ROUTES

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Sent:
    """One request as a server passes it to the app."""

    method: str
    path: str
    query: bytes = b""
    headers: Headers = ()
    parts: tuple[bytes, ...] = (b"",)
    """The body, as it arrives."""
    cut: bool = False
    """The client disconnects before the last part of its body."""
    credential: str = field(default="", repr=False)


@dataclass(slots=True)
class Known:
    """What a client knows of the server: ids and credentials, valid and invalid."""

    runs: list[str]
    batches: list[str]
    credentials: list[str]
    tasks: Sequence[str]
    tags: Sequence[str] = ("t", "u:1", "shared")
    streams: Sequence[str] = ("default", "other")


NUMBERS = ("0", "-1", "1e400", "-1e400", "9" * 400, "1.5", "1e-400", "9007199254740993", "18446744073709551616", "-0.0")
TEXTS = ("", "a", "ä", "\x00", "\ud83d", "\u2028", "\ufeff", "../..", "%00", "x" * 600, "__proto__", "$.a.0.b", "a.b.c")
NEWS = ("null", "true", "NaN", "Infinity", '"\\ud800"', '"\\u0000"', "[]", "{}", '"a"', '{"a":1,"a":2}', *NUMBERS)
BYTES = (
    b"\x00",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\n",
    b"\r",
    b'"',
    b"\\",
    b"{",
    b"[",
    b"]",
    b"}",
    b",",
    b"e9",
    b"\xef\xbb\xbf",
)
HEADER_NAMES = tuple(
    b"accept authorization content-encoding content-length content-type expect last-event-id origin prefer range"
    b" timeout-seconds trigger-version user-agent x-client-id x-forwarded-host x-http-method-override x-part-id"
    b" x-resume-from-chunk x-trigger-api-version x-trigger-client x-trigger-request-idempotency-key".split()
)
HEADER_VALUES = (
    *b"0 -1 99999999999999999999 text/event-stream application/json null 4.0.0 4.9.9 gzip 100-continue".split(),
    *b"*/*;q=nan bytes=0-1 v2 https://app.example 1-2-3 5_0 Bearer".split(),
    *(b"", b"\xff\xfe", b"\xc2\xb2", b"Basic eDp5", b"a" * 5000),
)
PARAMETERS = (
    "access_token tags offset handle cursor live skipColumns createdAt last_event_id lastEventId timeout startIndex"
    " columns log replica".split()
)
METHODS = ("GET", "POST", "PUT", "HEAD", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "PROPFIND", "X" * 200)


class Mutator:
    """Makes requests for what is known. `known` can grow while it is used."""

    def __init__(self, random: Random, known: Known) -> None:
        self._random = random
        self._known = known

    def requests(self, count: int) -> Iterator[Sent]:
        for _ in range(count):
            request = self._valid()
            for _ in range(self._random.choice((0, 0, 1, 1, 1, 2, 3))):
                request = self._random.choice(_DAMAGES)(self, request)
            yield request

    # Valid requests

    def _valid(self) -> Sent:
        chance, known = self._random, self._known
        route = chance.choice(ROUTES)
        path = re.sub(r"\{(\w+)\}", lambda match: self._segment(match[1]), route.pattern)
        path = "/" + path.replace("*", chance.choice(("", "/a", "/a/b")))
        headers: list[tuple[bytes, bytes]] = [(b"origin", b"https://app.example")]
        credential = chance.choice(known.credentials)
        query = b""
        if route.method == "GET" and chance.random() < 0.3:
            query = b"access_token=" + credential.encode()
        elif credential:
            headers.append((b"authorization", b"Bearer " + credential.encode()))
        if chance.random() < 0.5:
            headers.append((b"sec-fetch-site", chance.choice((b"same-origin", b"cross-site"))))
        if chance.random() < 0.5:
            headers.append((b"accept", b"text/event-stream"))
        if chance.random() < 0.4:
            headers.append((b"trigger-version", b"4.0.0"))
        if chance.random() < 0.2:
            headers.append((b"last-event-id", chance.choice((b"0", b"5", b"99"))))
        if chance.random() < 0.2:
            headers.append((b"x-client-id", b"writer"))
        if route.pattern == "v1/runs":
            query = b"&".join(filter(None, (query, b"tags=" + chance.choice(known.tags).encode())))
        if chance.random() < 0.1:
            query += b"&offset=0_0&live=true"
        if chance.random() < 0.1:
            query += b"&protocol=" + chance.choice((b"ai-sdk", b"ag-ui", b"sse", b"x"))
        body = self._body(route.pattern) if route.method in ("POST", "PUT") else b""
        return Sent(route.method, path, query, tuple(headers), (body,), credential=credential)

    def _segment(self, name: str) -> str:
        known = self._known
        choices: dict[str, Sequence[str]] = {
            "run_id": known.runs,
            "batch_id": known.batches,
            "task_id": known.tasks,
            "key": known.streams,
            "input_id": ("go", "stop"),
            "target": ("self", "parent", "root"),
            "hash": ("0123456789abcdef", "x"),
        }
        return self._random.choice(choices[name])

    def _body(self, pattern: str) -> bytes:
        if pattern.endswith("/trigger"):
            return _dump(self._run())
        if pattern == "api/v3/batches":
            return _dump(
                {
                    "runCount": self._random.choice((1, 2, 3)),
                    "taskIdentifiers": [self._random.choice(self._known.tasks)],
                }
            )
        if pattern.endswith("/items"):
            items = [{"index": n, "task": self._random.choice(self._known.tasks), **self._run()} for n in range(2)]
            return b"\n".join(map(_dump, items))
        if pattern.endswith("/metadata"):
            key = self._random.choice(("a", "$.a.b", "$.list.0", "list"))
            kind = self._random.choice(("set", "append", "remove", "increment", "delete"))
            value = self._random.choice((1, "x", [1], {"b": 1}))
            return _dump({"metadata": {"a": 1}, "operations": [{"type": kind, "key": key, "value": value}]})
        if pattern.endswith("/tags"):
            return _dump({"tags": [self._random.choice(self._known.tags)]})
        if pattern.endswith("/public-tokens"):
            return _dump({"scopes": ["read:runs:run_1"], "expirationTime": "1h", "realtime": {"owner": "user:1"}})
        if "/input/" in pattern:
            return _dump({"data": self._random.choice((1, "x", None, {"a": [1]}))})
        if "/streams/" in pattern:
            return b'{"a":1}\n"two"\n[3]\n'
        return b""

    def _run(self) -> dict[str, Any]:
        chance = self._random
        options: dict[str, Any] = {"payloadType": "application/json"}
        payload = json.dumps(chance.choice((1, {"a": [1, 2]}, "text", None)))
        if chance.random() < 0.4:
            options["payloadType"] = "application/super+json"
            kinds = (
                "Date",
                "bigint",
                "undefined",
                "Map",
                "set",
                ["map", {"0": ["Date"]}],
                ["custom", "x"],
                "URL",
                "regexp",
                "number",
            )
            value = chance.choice(
                ("2024-01-01T00:00:00Z", "12", None, [[1, 2]], [1], "https://x.example", "/a/g", "NaN")
            )
            payload = json.dumps({"json": {"a": value}, "meta": {"values": {"a": [chance.choice(kinds)]}, "v": 1}})
        extra: dict[str, Any] = {
            "tags": [chance.choice(self._known.tags)],
            "idempotencyKey": chance.choice(("k1", "k2")),
            "ttl": chance.choice(("1h", 60)),
            "delay": "1h",
            "metadata": '{"a":1}',
            "metadataType": "application/json",
            "maxDuration": 60,
            "parentRunId": chance.choice(self._known.runs),
            "queue": {"name": "q"},
        }
        for name in chance.sample(list(extra), chance.choice((0, 1, 2))):
            options[name] = extra[name]
        return {"payload": payload, "options": options}

    # Damages

    def _method(self, request: Sent) -> Sent:
        return replace(request, method=self._random.choice(METHODS))

    def _path(self, request: Sent) -> Sent:
        chance = self._random
        segments = request.path.split("/")
        place = chance.randrange(len(segments))
        text = chance.choice(
            (*TEXTS, "run_1", "realtime", "api", "v1", ".", "..", "a=b", "access_token=secret-in-path")
        )
        chance.choice((segments.insert, segments.__setitem__))(place, text.replace("\ud83d", "?"))
        if chance.random() < 0.2:
            del segments[chance.randrange(len(segments))]
        return replace(
            request, path="/" + "/".join(segments).lstrip("/") if chance.random() < 0.9 else "/".join(segments)
        )

    def _query(self, request: Sent) -> Sent:
        chance = self._random
        name = chance.choice(PARAMETERS)
        values = (
            "",
            "0",
            "-1",
            "99999999999999999999",
            "1_2",
            "true",
            "%",
            "%ff%fe",
            "%00",
            "a" * 2000,
            "nan",
            "inf",
            "\xff",
            "+",
            "[]",
        )
        added = f"{name}={chance.choice(values)}".encode("latin-1")
        return replace(request, query=chance.choice((b"&", b";", b"&&")).join((request.query, added)))

    def _header(self, request: Sent) -> Sent:
        chance = self._random
        headers = list(request.headers)
        added = (chance.choice(HEADER_NAMES), chance.choice(HEADER_VALUES))
        headers.insert(chance.randrange(len(headers) + 1), added)
        if chance.random() < 0.3:
            del headers[chance.randrange(len(headers))]
        return replace(request, headers=tuple(headers))

    def _credential(self, request: Sent) -> Sent:
        """Another credential, or the same one with a part changed."""
        chance = self._random
        token = chance.choice(self._known.credentials)
        if token and chance.random() < 0.7:
            place = chance.randrange(len(token))
            new = chance.choice(("", "=", ".", "A", "-", "\xff", "\x7f", "a.b", token))
            token = token[:place] + new + token[place + chance.choice((0, 1)) :]
        headers = tuple(pair for pair in request.headers if pair[0] != b"authorization")
        value = chance.choice((b"Bearer ", b"bearer  ", b"Basic ", b"")) + token.encode("latin-1")
        return replace(request, headers=(*headers, (b"authorization", value)), credential=token)

    def _bytes(self, request: Sent) -> Sent:
        chance = self._random
        body = b"".join(request.parts)
        for _ in range(chance.choice((1, 1, 2, 4))):
            place = chance.randrange(len(body) + 1)
            body = (
                body[:place]
                + chance.choice(BYTES) * chance.choice((1, 1, 3))
                + body[place + chance.choice((0, 1, 5)) :]
            )
        return replace(request, parts=(body,))

    def _structure(self, request: Sent) -> Sent:
        """Replace, repeat or nest one value of the JSON in the body."""
        chance = self._random
        body = b"".join(request.parts)
        values = [match.span() for match in re.finditer(rb'"(?:[^"\\]|\\.)*"|-?\d+|null|\[\]|\{\}', body)]
        if not values:
            return replace(request, parts=(self._new().encode("utf-8", "surrogatepass"),))
        start, stop = chance.choice(values)
        old = body[start:stop]
        new = self._new().encode("utf-8", "surrogatepass")
        depth = chance.choice((1, 3, 200, 1200))
        kept = (
            new,
            new,
            old + b"," + old,
            b"[" * depth + old + b"]" * depth,
            b'{"a":' * depth + old + b"}" * depth,
            json.dumps(new.decode("utf-8", "replace")).encode(),
        )
        return replace(request, parts=(body[:start] + chance.choice(kept) + body[stop:],))

    def _new(self) -> str:
        return self._random.choice(
            (*NEWS, *(json.dumps(text, ensure_ascii=self._random.random() < 0.5) for text in TEXTS))
        )

    def _lines(self, request: Sent) -> Sent:
        chance = self._random
        lines = b"".join(request.parts).split(b"\n")
        chance.shuffle(lines)
        lines.insert(0, chance.choice((b"", b"\r", b"   ", lines[0], b"undefined", b"\x00")))
        return replace(request, parts=(b"\n".join(lines) * chance.choice((1, 2, 50)),))

    def _parts(self, request: Sent) -> Sent:
        """The body in several parts, as with `Transfer-Encoding: chunked`; some bodies are cut off."""
        chance = self._random
        body = b"".join(request.parts)
        cuts = sorted(chance.randrange(len(body) + 1) for _ in range(chance.choice((1, 2, 5))))
        parts = tuple(body[start:stop] for start, stop in zip((0, *cuts), (*cuts, len(body)), strict=True))
        return replace(request, parts=parts, cut=chance.random() < 0.3)

    def _length(self, request: Sent) -> Sent:
        value = self._random.choice((b"0", b"5", b"999999999999", b"-1", b"+5", b"1e3", b"\xb2", b"9" * 5000))
        return replace(request, headers=(*request.headers, (b"content-length", value)))


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


_DAMAGES: tuple[Callable[[Mutator, Sent], Sent], ...] = (
    Mutator._method,
    Mutator._path,
    Mutator._query,
    Mutator._header,
    Mutator._credential,
    Mutator._bytes,
    Mutator._structure,
    Mutator._structure,
    Mutator._structure,
    Mutator._lines,
    Mutator._parts,
    Mutator._length,
)
