from __future__ import annotations

import logging

import pytest

from asgi_realtime.asgi.auth import RedactAccessToken, authorize, bearer, redact_query, run_resources
from asgi_realtime.core.errors import ScopeDenied
from asgi_realtime.core.runs import BatchMember, Status, StoredRecord
from asgi_realtime.tokens import Claims


@pytest.mark.parametrize(
    ("query", "redacted", "token"),
    [
        (b"", b"", ""),
        (b"a=1", b"a=1", ""),
        (b"access_token=abc", b"access_token=REDACTED", "abc"),
        (b"a=%20&access_token=a%2Bb&b", b"a=%20&access_token=REDACTED&b", "a+b"),
        (b"access%5Ftoken=abc", b"access%5Ftoken=REDACTED", "abc"),
        (b"%61ccess_t%6Fken=abc", b"%61ccess_t%6Fken=REDACTED", "abc"),
        (b"access_token=a&access_token=b", b"access_token=REDACTED&access_token=REDACTED", "b"),
        (b"access_token=a=b", b"access_token=REDACTED", "a=b"),
        (b"access_token=", b"access_token=", ""),
        (b"access_token", b"access_token", ""),
        (b"my_access_token=abc", b"my_access_token=abc", ""),
        (b"&&access_token=abc&", b"&&access_token=REDACTED&", "abc"),
        (b"a=1;access_token=abc;b", b"a=1;access_token=REDACTED;b", ""),
        (b"a;ACCESS%5Ftoken=abc&access_token=x", b"a;ACCESS%5Ftoken=REDACTED&access_token=REDACTED", "x"),
    ],
)
def test_the_token_is_redacted_in_the_query(query: bytes, redacted: bytes, token: str) -> None:
    scope = {"query_string": query}
    assert redact_query(scope) == token
    assert scope["query_string"] == redacted


@pytest.mark.parametrize("mark", [";", "&", "/"])
def test_a_token_in_the_path_is_redacted(mark: str) -> None:
    """A URL with a wrong separator is a 404, and the server logged its path with the token."""
    path = f"/v1/streams/run_1/default{mark}access_token=abc"
    scope = {"path": path, "raw_path": path.encode()}
    assert redact_query(scope) == ""
    assert scope["path"] == path.replace("abc", "REDACTED")
    assert scope["raw_path"] == path.replace("abc", "REDACTED").encode()


def test_a_scope_without_a_query_is_not_changed() -> None:
    scope: dict[str, object] = {}
    assert redact_query(scope) == ""
    assert scope == {}


@pytest.mark.parametrize(
    ("header", "token"),
    [
        (None, ""),
        (b"Bearer abc", "abc"),
        (b"bearer abc", "abc"),
        (b"  BEARER   abc  ", "abc"),
        (b"Basic abc", ""),
        (b"abc", ""),
        (b"Bearer", ""),
    ],
)
def test_the_bearer_token_of_a_header(header: bytes | None, token: str) -> None:
    assert bearer(header) == token


def filtered(message: object, *args: object) -> str:
    record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, message, args or None, None)
    assert RedactAccessToken().filter(record)
    return record.getMessage()


def test_the_log_filter_redacts_tokens_in_message_and_arguments() -> None:
    line = '%s - "%s %s HTTP/%s" %d'
    path = "/v1/runs/a?access_token=ey.J.x&b=1"
    assert (
        filtered(line, "::1", "GET", path, "1.1", 200)
        == '::1 - "GET /v1/runs/a?access_token=REDACTED&b=1 HTTP/1.1" 200'
    )
    assert filtered("GET /?ACCESS%5FTOKEN=abc HTTP") == "GET /?ACCESS%5FTOKEN=REDACTED HTTP"
    assert filtered("%(path)s %(n)d", {"path": path, "n": 1}) == "/v1/runs/a?access_token=REDACTED&b=1 1"
    assert filtered("nothing to see") == "nothing to see"
    assert filtered(ValueError("x")) == "x"


RECORD = StoredRecord(
    id="run_1",
    task="chat",
    status=Status.QUEUED,
    created_at_ms=0,
    updated_at_ms=0,
    tags=("a", "b"),
    batch=BatchMember("batch_1", 0, 1),
)


def test_the_names_of_a_run() -> None:
    assert run_resources(RECORD) == [
        ("runs", "run_1"),
        ("tasks", "chat"),
        ("tags", "a"),
        ("tags", "b"),
        ("batch", "batch_1"),
    ]


def test_an_error_names_the_missing_scope_and_reveals_nothing_about_the_run() -> None:
    claims = Claims(scopes=("read:runs:run_2",), expires_at=0)
    with pytest.raises(ScopeDenied, match="'read:runs:run_1'") as refused:
        authorize(claims, "read", run_resources(RECORD))
    assert "chat" not in str(refused.value)
    with pytest.raises(ScopeDenied, match="'read:runs'"):
        authorize(claims, "read", [("runs", None)])
    authorize(Claims(scopes=(), expires_at=0, secret=True), "read", run_resources(RECORD))
