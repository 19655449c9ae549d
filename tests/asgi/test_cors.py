from __future__ import annotations

import pytest

from asgi_realtime.asgi.cors import cors_headers, preflight_headers
from asgi_realtime.core.config import Cors


def test_without_cors_there_are_no_headers() -> None:
    assert cors_headers(None, b"https://app.example") == []


def test_each_call_returns_a_new_list() -> None:
    assert cors_headers(Cors(), None) == cors_headers(Cors(), None)
    assert cors_headers(Cors(), None) is not cors_headers(Cors(), None)


@pytest.mark.parametrize("requested", [None, b"", b"a\r\nset-cookie: x", b"a" * 5000, b"\xff", b"a;b"])
def test_malformed_header_names_are_not_reflected(requested: bytes | None) -> None:
    names = [name for name, _ in preflight_headers(Cors(), requested)]
    assert b"access-control-allow-headers" not in names


def test_requested_header_names_are_reflected() -> None:
    requested = b"authorization, X-Trigger-Api-Version,last-event-id"
    assert (b"access-control-allow-headers", requested) in preflight_headers(Cors(max_age=5), requested)
    assert (b"access-control-max-age", b"5") in preflight_headers(Cors(max_age=5), requested)
