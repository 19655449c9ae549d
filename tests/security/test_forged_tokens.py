"""Tokens that a client can make up or alter: each is rejected with 401, by every kind of route.

tests/test_tokens.py has the plain cases.
"""

from __future__ import annotations

import base64
import hmac
import json
from typing import Any

import pytest

from asgi_realtime import Realtime
from asgi_realtime.core.errors import InvalidToken
from asgi_realtime.testing import AsgiClient
from asgi_realtime.tokens import AUDIENCE, ISSUER, TokenAuthority

SECRET = "a-secret-of-64-bytes-so-that-it-is-long-enough-for-hs512-as-well"
NOW = 1_700_000_000
LATER = 2**40
"""Far beyond any clock, so that the tokens also suit a server with the real time."""

HEADER = {"alg": "HS256", "typ": "JWT"}
CLAIMS = {"iss": ISSUER, "aud": AUDIENCE, "sub": "env", "pub": True, "exp": LATER, "scopes": ["read:runs"]}


def encoded(value: object) -> str:
    """One part of a token: JSON of the value, or text as it is."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def signed(header: object, claims: object, *, digest: str = "sha256") -> str:
    """A token with our own signature, whatever its header says."""
    text = f"{encoded(header)}.{encoded(claims)}"
    return f"{text}.{encoded(hmac.new(SECRET.encode(), text.encode(), digest).digest())}"


def claims(**changes: object) -> str:
    """A token that is correctly signed, with other claims. `...` removes one."""
    found = {name: value for name, value in (CLAIMS | changes).items() if value is not ...}
    return signed(HEADER, found)


def raw(claims: str) -> str:
    return signed(HEADER, claims.encode())


VALID = claims()
HEAD, BODY, SIGNATURE = VALID.split(".")
AS_TEXT = json.dumps(CLAIMS)[1:-1]

BAD_CLAIMS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("iss", (1, True, {}, [ISSUER], "", ISSUER + "/", ISSUER.upper()), "wrong iss|not a JWT"),
    ("iss", (None,), "no iss"),
    (
        "aud",
        (1, True, {}, [], [1], [None], "", AUDIENCE + "/", ["https://x.example"]),
        "wrong aud|no aud|not a JWT",
    ),
    ("aud", (None,), "no aud"),
    ("exp", (True, False, "9" * 12, "", [], {}, [LATER], float("nan"), float("inf")), "not a finite number"),
    ("exp", (None,), "no exp"),
    ("exp", (0, -1, 1, -(10**300), 1.5), "expired"),
    ("nbf", (True, "1", None, [], {}, float("nan"), float("inf"), -float("inf")), "not a finite number"),
    ("nbf", (LATER, 10**300, 1e300), "not valid yet"),
    ("pub", (..., None, 1, "true", "True", [True], {"a": 1}), "pub must be true"),
    (
        "scopes",
        (None, "admin", {"admin": True}, 1, True, [["admin"]], [None], ["admin", {}]),
        "no valid scopes",
    ),
)

BAD_OPTIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("owner", (1, True, [], {}, "", " ", "a\nb", "a\x00b", "x" * 129, "\ud800")),
    ("tags", ("user:1", 1, True, {}, [1], [None], [["a"]])),
    ("skipColumns", (None, "payload", 1, {}, [1], [None])),
)

REJECTED: dict[str, tuple[str, str]] = {
    # Algorithms
    "none": (f"{encoded({'alg': 'none'})}.{BODY}.", "not signed with HS256"),
    "None, signed": (signed({"alg": "None"}, CLAIMS), "not signed with HS256"),
    "lowercase": (signed({"alg": "hs256"}, CLAIMS), "not signed with HS256"),
    "HS384": (signed({"alg": "HS384"}, CLAIMS, digest="sha384"), "not signed with HS256"),
    "HS512": (signed({"alg": "HS512"}, CLAIMS, digest="sha512"), "not signed with HS256"),
    "RS256 over our key": (signed({"alg": "RS256"}, CLAIMS), "not signed with HS256"),
    "ES256": (f"{encoded({'alg': 'ES256'})}.{BODY}.{encoded(bytes(64))}", "not signed with HS256"),
    "a list": (signed({"alg": ["HS256"]}, CLAIMS), "not"),
    "an object": (signed({"alg": {"a": 1}}, CLAIMS), "not"),
    "a number": (signed({"alg": 256}, CLAIMS), "not"),
    "null": (signed({"alg": None}, CLAIMS), "not signed with HS256"),
    "no alg": (signed({"typ": "JWT"}, CLAIMS), "not signed with HS256"),
    "HS512 of our own signature": (signed(HEADER, CLAIMS, digest="sha512"), "wrong signature"),
    # Headers
    "kid is a number": (signed({**HEADER, "kid": 1}, CLAIMS), "not a JWT"),
    "kid is a list": (signed({**HEADER, "kid": []}, CLAIMS), "not a JWT"),
    "crit": (signed({**HEADER, "crit": ["exp"]}, CLAIMS), "not a JWT"),
    "crit is empty": (signed({**HEADER, "crit": []}, CLAIMS), "not a JWT"),
    "b64": (signed({**HEADER, "b64": False, "crit": ["b64"]}, CLAIMS), "not"),
    "the header is a list": (signed([HEADER], CLAIMS), "not a JWT"),
    "the header is a string": (signed("HS256", CLAIMS), "not a JWT"),
    "the header is null": (signed(None, CLAIMS), "not a JWT"),
    "the header is not JSON": (signed(b"{alg:HS256}", CLAIMS), "not a JWT"),
    "the header is not UTF-8": (signed(b'{"alg":"HS256","x":"\xff"}', CLAIMS), "not a JWT"),
    "the last alg counts": (signed(b'{"alg":"HS256","alg":"none"}', CLAIMS), "not signed with HS256"),
    # Parts
    "no signature": (f"{HEAD}.{BODY}.", "wrong signature"),
    "no third part": (f"{HEAD}.{BODY}", "not a JWT"),
    "four parts": (f"{VALID}.{SIGNATURE}", "not a JWT"),
    "five parts, as JWE": (f"{HEAD}.{BODY}.{BODY}.{BODY}.{SIGNATURE}", "not a JWT|wrong signature"),
    "dots": ("." * 1000, "not a JWT"),
    "a padded header": (f"{HEAD}==.{BODY}.{SIGNATURE}", "not a JWT|wrong signature"),
    "a padded payload": (f"{HEAD}.{BODY}==.{SIGNATURE}", "not a JWT|wrong signature"),
    "a truncated signature": (VALID[:-4], "wrong signature|not a JWT"),
    "non-ASCII": (f"{HEAD}.{BODY}.{SIGNATURE}é", "not a JWT"),
    "other digits": (f"{HEAD}.{BODY}.٠", "not a JWT"),
    "a null byte": (f"{VALID}\x00", "not a JWT|wrong signature"),
    "a null byte first": (f"\x00{VALID}", "not a JWT|wrong signature"),
    "a space within": (f"{HEAD}. {BODY}.{SIGNATURE}", "not a JWT|wrong signature"),
    "long": ("a" * 100_000, "not a JWT"),
    "a long signature": (f"{HEAD}.{BODY}.{'A' * 100_000}", "wrong signature"),
    "too long": (f"{HEAD}.{BODY}.{'A' * 200_000}", "token is 200230 characters, limit 131072"),
    "nested": (signed({**HEADER, "cty": "JWT"}, VALID.encode()), "not a JWT"),
    "a nested string": (signed({**HEADER, "cty": "JWT"}, VALID), "not a JWT"),
    # Payloads
    "a list of claims": (signed(HEADER, [CLAIMS]), "not a JWT"),
    "a number of claims": (signed(HEADER, 1), "not a JWT"),
    "null claims": (signed(HEADER, None), "not a JWT"),
    "not UTF-8": (signed(HEADER, b'{"iss":"\xff"}'), "not a JWT"),
    "deep": (raw('{"a":' * 15_000), "not a JWT"),
    "deep and complete": (raw(f'{{{AS_TEXT},"x":{"[" * 40_000}{"]" * 40_000}}}'), "not a JWT"),
    "many digits": (raw(f'{{{AS_TEXT},"x":{"9" * 5000}}}'), "not a JWT"),
    # The last of two equal names counts, as in every reader that a host is likely to have.
    "exp twice": (raw(f'{{{AS_TEXT},"exp":1}}'), "expired"),
    "scopes twice": (raw(f'{{{AS_TEXT},"scopes":"admin"}}'), "no valid scopes"),
    "iss twice": (raw(f'{{{AS_TEXT},"iss":"https://evil.example"}}'), "wrong iss"),
    # Claims
    **{
        f"{name} is {value!r}": (claims(**{name: value}), message)
        for name, values, message in BAD_CLAIMS
        for value in values
    },
    **{
        f"realtime.{name} is {value!r}": (claims(realtime={name: value}), f"no valid realtime.{name}")
        for name, values in BAD_OPTIONS
        for value in values
    },
}


ACCEPTED: dict[str, str] = {
    "as it is": VALID,
    "aud is one of a list": claims(aud=["https://x.example", AUDIENCE]),
    "iat is in the future": claims(iat=LATER),
    "iat is a string": claims(iat="soon"),
    "no sub": claims(sub=...),
    "exp is a fraction": claims(exp=LATER + 0.5),
    "exp is huge": claims(exp=10**300),
    "nbf is in the past": claims(nbf=-1),
    "realtime is a list": claims(realtime=[]),
    "an owner in the wrong place": claims(owner={"a": 1}),
    "a jku": signed({**HEADER, "jku": "http://127.0.0.1:1/", "x5u": "http://127.0.0.1:1/", "jwk": {}}, CLAIMS),
    "no typ": signed({"alg": "HS256"}, CLAIMS),
}


@pytest.mark.parametrize(("token", "message"), REJECTED.values(), ids=REJECTED)
def test_a_forged_token_is_rejected_with_the_reason(token: str, message: str) -> None:
    with pytest.raises(InvalidToken, match=message) as caught:
        TokenAuthority(SECRET, clock=lambda: NOW).verify(token)
    assert caught.value.status == 401
    assert SIGNATURE not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("token", ACCEPTED.values(), ids=ACCEPTED)
def test_a_token_with_harmless_oddities_grants_its_scopes_only(token: str) -> None:
    claims = TokenAuthority(SECRET, clock=lambda: NOW).verify(token)
    assert claims.scopes == ("read:runs",)
    assert claims.owner == claims.token_id
    assert not claims.secret


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_every_kind_of_route_answers_a_forged_token_with_401(caplog: pytest.LogCaptureFixture) -> None:
    realtime = Realtime(secret_key=SECRET, signals=False)
    requests: tuple[tuple[str, str, dict[str, str]], ...] = (
        ("GET", "/v1/streams/run_1/default", {"accept": "text/event-stream"}),
        ("GET", "/v1/runs/run_1", {"trigger-version": "4.0.0"}),
        ("POST", "/api/v1/tasks/chat/trigger", {}),
        ("HEAD", "/v1/streams/run_1/self/default", {}),
    )
    async with AsgiClient(realtime) as client:
        for name, (token, message) in REJECTED.items():
            credential = token.encode("utf-8", "surrogateescape").decode("latin-1")
            for method, path, headers in requests:
                response = await client.request(
                    method, path, headers=headers | {"authorization": f"Bearer {credential}"}
                )
                assert response.status_code == 401, (name, method, message)
                assert response.headers["www-authenticate"] == "Bearer"
                assert method == "HEAD" or set(response.json()) == {"error", "code"}
    logged = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    codes = {line.partition(" with 401 ")[2].split()[0] for line in logged}
    assert codes == {"invalid_token"}, "an expired token is a normal event"


SPELLINGS = ("", "=", "==", "====", "\n", " ", "\t")
"""What base64 readers ignore after the signature."""


@pytest.mark.anyio
async def test_no_spelling_of_a_one_time_token_can_be_used_again() -> None:
    realtime = Realtime(secret_key=SECRET, signals=False)

    @realtime.task("chat")
    async def chat(payload: Any) -> None: ...

    async with AsgiClient(realtime) as client:
        token = realtime.create_trigger_public_token("chat")
        spare = token[-1]
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        equal = [token[:-1] + alphabet[alphabet.index(spare) // 4 * 4 + bits] for bits in range(4)]
        statuses = []
        for spelled in (*(token + end for end in SPELLINGS), *equal, token.replace("-", "+").replace("_", "/")):
            headers = {"authorization": f"Bearer {spelled}"}
            statuses.append((await client.post("/api/v1/tasks/chat/trigger", json={}, headers=headers)).status_code)
        assert statuses[0] == 200
        assert set(statuses[1:]) <= {400, 401, 403, 409, 422}
