from __future__ import annotations

from typing import Any

import jwt
import pytest

from asgi_realtime import Limits
from asgi_realtime.testing import AsgiClient
from tests.asgi.official_sdk import call, on_one_loop, with_tasks
from tests.inprocess import SECRET, FakeClock

pytestmark = pytest.mark.anyio

CLAIMS = "/api/v1/auth/jwt/claims"
TOKENS = "/api/v1/auth/public-tokens"


async def test_the_sdk_gets_the_claims_of_its_tokens() -> None:
    """The SDK adds scopes and times and signs with the secret key."""
    async with with_tasks() as realtime:
        answer = await call(realtime, "POST", CLAIMS)
        assert (answer.status, answer.json) == (200, {"sub": "asgi_realtime", "pub": True})
        claims = {
            **answer.json,
            "scopes": ["read:runs:run_1"],
            "iss": "https://id.trigger.dev",
            "aud": "https://api.trigger.dev",
            "exp": 4_000_000_000,
        }
        assert realtime.verify_token(jwt.encode(claims, SECRET)).scopes == ("read:runs:run_1",)


@pytest.mark.parametrize("path", [CLAIMS, TOKENS])
async def test_creating_tokens_needs_the_secret_key(path: str) -> None:
    async with with_tasks() as realtime:
        assert (await AsgiClient(realtime).post(path)).status_code == 401
        token = realtime.create_public_token(scopes=["admin"])
        answer = await call(realtime, "POST", path, {"scopes": ["admin"]}, token=token)
        assert (answer.status, answer.json["code"]) == (403, "forbidden")
        assert "needs the secret key" in answer.error


async def test_a_token_is_created() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        answer = await call(realtime, "POST", TOKENS, {"scopes": ["read:runs:run_1", "read:tags"]})
        assert (answer.status, list(answer.json)) == (200, ["token"])
        claims = realtime.verify_token(answer.json["token"])
        assert claims.scopes == ("read:runs:run_1", "read:tags")
        assert claims.expires_at == clock.seconds + 900
        assert (claims.one_time, claims.skip_columns) == (False, ())


async def test_a_token_can_be_one_time_and_hide_columns() -> None:
    async with with_tasks() as realtime:
        body = {
            "scopes": ["trigger:tasks:echo"],
            "oneTimeUse": True,
            "realtime": {"skipColumns": ["payload", "output", "payload"], "owner": "user:1", "tags": ["a"]},
        }
        tokens = [(await call(realtime, "POST", TOKENS, body)).json["token"] for _ in range(2)]
        assert tokens[0] != tokens[1]
        claims = realtime.verify_token(tokens[0])
        assert (claims.one_time, claims.skip_columns, claims.owner) == (True, ("payload", "output"), "user:1")
        assert claims.tags == ("a",)
        body = {"scopes": ["read:runs"], "oneTimeUse": None, "realtime": None, "expirationTime": None}
        claims = realtime.verify_token((await call(realtime, "POST", TOKENS, body)).json["token"])
        assert (claims.one_time, claims.skip_columns) == (False, ())


@on_one_loop
@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("15m", 900),
        ("1hr", 3600),
        ("1h30m", 5400),
        ("2 hours", 7200),
        ("1 day", 86400),
        ("1 day from now", 86400),
        ("90 Secs", 90),
        ("+1w", 604800),
        ("1.5m", 90),
        (1_700_000_060, 60),
        (1_700_000_060.5, 61),
        ("30d", 30 * 86400),
    ],
)
async def test_a_token_expires_after_a_span_or_at_a_time(time: Any, seconds: int) -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        answer = await call(realtime, "POST", TOKENS, {"scopes": ["read:runs"], "expirationTime": time})
        assert answer.status == 200, answer.json
        assert realtime.verify_token(answer.json["token"]).expires_at == clock.seconds + seconds


@on_one_loop
@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "malformed"),
        (b"[]", 400, "Expected `object`"),
        ({}, 400, "missing required field `scopes`"),
        ({"scopes": "read:runs"}, 400, "Expected `array`"),
        ({"scopes": [1]}, 400, "Expected `str`"),
        ({"scopes": []}, 422, "scopes is empty"),
        ({"scopes": ["read"]}, 422, "scope 'read' without a type grants nothing"),
        ({"scopes": ["fly:runs"]}, 422, "unknown action"),
        ({"scopes": ["read:runs"], "expirationTime": 1_699_999_999}, 400, "is in the past"),
        ({"scopes": ["read:runs"], "expirationTime": 1_700_000_000}, 400, "is in the past"),
        ({"scopes": ["read:runs"], "expirationTime": "0s"}, 400, "is in the past"),
        (
            {"scopes": ["read:runs"], "expirationTime": "1 hour ago"},
            400,
            "allowed are unix seconds and spans like '1h'",
        ),
        ({"scopes": ["read:runs"], "expirationTime": "soon"}, 400, "allowed are unix seconds and spans"),
        ({"scopes": ["read:runs"], "expirationTime": "31d"}, 422, "limit 2592000"),
        ({"scopes": ["read:runs"], "expirationTime": "1 year"}, 422, "limit 2592000"),
        ({"scopes": ["read:runs"], "expirationTime": 1_702_592_001}, 422, "limit 2592000"),
        ({"scopes": ["read:runs"], "expirationTime": 10**30}, 422, "limit 2592000"),
        (b'{"scopes": ["read:runs"], "expirationTime": 1%b}' % (b"0" * 400), 422, "limit 2592000"),
        ({"scopes": ["read:runs"], "expirationTime": True}, 400, "got `bool`"),
        ({"scopes": ["read:runs"], "oneTimeUse": 1}, 400, "Expected `bool"),
        ({"scopes": ["read:runs"], "realtime": {"skipColumns": "payload"}}, 400, "Expected `array`"),
        ({"scopes": ["read:runs"], "realtime": {"skipColumns": ["status"]}}, 422, "skip_columns has 'status'; allowed"),
        ({"scopes": ["read:runs"], "realtime": {"owner": ""}}, 422, "owner is empty"),
        (b" " * 65_537, 413, "limit 65536"),
    ],
)
async def test_an_invalid_token_request_is_rejected(body: Any, status: int, message: str) -> None:
    async with with_tasks(clock=FakeClock()) as realtime:
        answer = await call(realtime, "POST", TOKENS, body)
        assert answer.status == status
        assert message in answer.error


async def test_the_longest_lifetime_is_configurable() -> None:
    async with with_tasks(limits=Limits(token_life=60), clock=FakeClock()) as realtime:
        statuses = [
            (await call(realtime, "POST", TOKENS, {"scopes": ["read:runs"], "expirationTime": time})).status
            for time in ("60s", "61s", 1_700_000_060, 1_700_000_061)
        ]
        assert statuses == [200, 422, 200, 422]
