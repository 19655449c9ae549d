from __future__ import annotations

import base64
import hmac
import json
import math
import re
from collections.abc import Callable
from typing import Any

import jwt
import pytest

from asgi_realtime.core.errors import ExpiredToken, InvalidConfiguration, InvalidToken, UsageError
from asgi_realtime.tokens import AUDIENCE, ISSUER, Claims, TokenAuthority, _read_claims, check_owner

SECRET = "a-secret-of-thirty-two-bytes-or-more"
OTHER = "another-secret-of-thirty-two-bytes-and-more"
NOW = 1_700_000_000.5


class Clock:
    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def authority(secrets: Any = SECRET, **options: Any) -> TokenAuthority:
    return TokenAuthority(secrets, clock=options.pop("clock", Clock()), **options)


def forged(secret: str = SECRET, algorithm: str = "HS256", **changes: Any) -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "env", "pub": True, "exp": int(NOW) + 60, "scopes": ["read:runs"]}
    claims |= changes
    return jwt.encode({key: value for key, value in claims.items() if value is not ...}, secret, algorithm=algorithm)


def part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def test_a_minted_token_has_the_claims_of_the_official_clients() -> None:
    token = authority().mint(["read:runs:run_1"], expires_in_s=60)
    assert jwt.get_unverified_header(token)["alg"] == "HS256"
    assert jwt.decode(token, options={"verify_signature": False}) == {
        "iss": "https://id.trigger.dev",
        "aud": "https://api.trigger.dev",
        "sub": "asgi_realtime",
        "pub": True,
        "iat": 1_700_000_000,
        "exp": 1_700_000_061,
        "scopes": ["read:runs:run_1"],
    }


def test_a_minted_token_verifies() -> None:
    ours = authority()
    claims = ours.verify(ours.mint(["read:runs:run_1", "read:tags"], expires_in_s=60))
    assert claims.scopes == ("read:runs:run_1", "read:tags")
    assert claims.expires_at == 1_700_000_061
    assert not claims.one_time
    assert not claims.secret
    assert claims.skip_columns == ()
    assert re.fullmatch("[0-9a-f]{32}", claims.token_id)


def test_a_token_of_the_official_client_verifies() -> None:
    claims = authority().verify(forged(iat=int(NOW) + 5, aud=[AUDIENCE], realtime={"skipColumns": ["payload"]}))
    assert claims.scopes == ("read:runs",)
    assert claims.skip_columns == ("payload",)


def test_one_time_tokens_differ() -> None:
    ours = authority()
    one, two = (ours.mint(["trigger:tasks:chat"], expires_in_s=60, one_time=True) for _ in range(2))
    assert ours.verify(one).one_time
    assert ours.verify(one).token_id != ours.verify(two).token_id


def test_a_token_with_its_own_id_is_unique() -> None:
    ours = authority()
    alike = {ours.mint(["read:runs"], expires_in_s=60) for _ in range(2)}
    assert len(alike) == 1
    own = {ours.mint(["read:runs"], expires_in_s=60, own_id=True) for _ in range(2)}
    assert len(own) == 2 and not any(ours.verify(token).one_time for token in own)


def test_omitted_columns_are_a_claim_of_the_token() -> None:
    token = authority().mint(["read:runs"], expires_in_s=60, skip_columns=["payload"])
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["realtime"] == {"skipColumns": ["payload"]}
    assert authority().verify(token).skip_columns == ("payload",)


def test_owner_and_tags_are_claims_of_the_token() -> None:
    token = authority().mint(["read:runs"], expires_in_s=60, skip_columns=["payload"], owner="user:1", tags=["a"])
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["realtime"] == {"skipColumns": ["payload"], "owner": "user:1", "tags": ["a"]}
    assert authority().verify(token).owner == "user:1"
    assert authority().verify(token).tags == ("a",)


def test_a_token_without_an_owner_is_its_own_owner() -> None:
    for token in (authority().mint(["read:runs"], expires_in_s=60, own_id=True), forged(), forged(realtime=[])):
        claims = authority().verify(token)
        assert claims.owner == claims.token_id
    assert authority().authenticate(SECRET).owner == ""


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        (1, "owner is a int; allowed is a str"),
        (" ", "owner is empty"),
        ("u" * 129, "owner is 129 characters, limit 128"),
        ("a\nb", "has a control character"),
        ("\ud83d", "has a control character or a lone surrogate"),
    ],
)
def test_an_invalid_owner_is_rejected(owner: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_owner(owner)
    payload = {"exp": NOW + 60, "pub": True, "scopes": [], "realtime": {"owner": owner}}  # PyJWT encodes no surrogate
    with pytest.raises(InvalidToken, match=f"no valid realtime.owner: .*{message}"):
        _read_claims(payload, now=NOW, token_id="")
    assert check_owner("u" * 128) == "u" * 128
    assert check_owner(None) is None


def test_a_respelled_signature_is_the_same_token() -> None:
    """Base64 can be padded or not, so a spent one-time token could be used again as another string."""
    ours = authority()
    token = ours.mint(["trigger:tasks:chat"], expires_in_s=60, one_time=True)
    respelled = token + "="
    assert ours.verify(respelled).token_id == ours.verify(token).token_id


def signed(payload: bytes, secret: str = SECRET) -> str:
    """A token with the usual header and this text as its payload."""
    content = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}') + b"." + payload
    signature = base64.urlsafe_b64encode(hmac.digest(secret.encode(), content, "sha256")).rstrip(b"=")
    return f"{content.decode()}.{signature.decode()}"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"!",
        b"AAAAA",
        b"W10",
        part("text").encode(),
        part({}).encode(),
        base64.urlsafe_b64encode(b'{"a":' + b"[" * 3000),
    ],
    ids=["empty", "not base64", "cut off", "a list", "a string", "no claims", "deep"],
)
def test_a_signed_token_with_a_bad_payload_is_rejected(payload: bytes) -> None:
    with pytest.raises(InvalidToken, match="token is not a JWT|token has no iss"):
        authority().verify(signed(payload))


def test_each_modified_character_makes_a_token_invalid() -> None:
    ours = authority()
    token = ours.mint(["read:runs:run_1"], expires_in_s=60)
    for place, character in enumerate(token):
        other = "Q" if character in "ABCD" else "A"  # the last character has two bits that do not count
        with pytest.raises(InvalidToken, match="signature|not a JWT|not signed"):
            ours.verify(token[:place] + other + token[place + 1 :])


@pytest.mark.parametrize("secret", [SECRET, OTHER])
@pytest.mark.parametrize("header", [None, {"kid": "1"}])
def test_each_header_and_each_secret_is_accepted(header: dict[str, Any] | None, secret: str) -> None:
    token = jwt.encode(jwt.decode(forged(), options={"verify_signature": False}), secret, headers=header)
    assert authority([SECRET, OTHER]).verify(token).scopes == ("read:runs",)


def test_extra_claims_and_the_subject_can_be_set() -> None:
    token = authority().mint(
        ["admin"], expires_in_s=1, subject="env_1", extra={"realtime": {"skipColumns": ["output"]}}
    )
    assert jwt.decode(token, options={"verify_signature": False})["sub"] == "env_1"
    assert authority().verify(token).skip_columns == ("output",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scopes": "read:runs"}, "list of strings"),
        ({"scopes": [1]}, "list of strings"),
        ({"expires_in_s": 0}, "expires_in_s is 0"),
        ({"expires_in_s": math.inf}, "expires_in_s is inf"),
        ({"expires_in_s": math.nan}, "expires_in_s is nan"),
        ({"extra": {"exp": 1, "aud": "x"}}, "extra has aud, exp"),
        ({"extra": {"x": object()}}, "cannot be encoded as JSON"),
    ],
)
def test_invalid_claims_are_not_minted(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        authority().mint(**{"scopes": ["read:runs"], "expires_in_s": 60, **arguments})


def test_the_first_secret_signs_and_all_verify() -> None:
    old, rotated = authority(OTHER), authority([SECRET, OTHER])
    assert rotated.verify(old.mint(["admin"], expires_in_s=60)).scopes == ("admin",)
    assert authority(SECRET).verify(rotated.mint(["admin"], expires_in_s=60)).scopes == ("admin",)
    with pytest.raises(InvalidToken, match="wrong signature"):
        rotated.verify(forged(secret="x" * 32))


UNSIGNED = f"{part({'alg': 'none', 'typ': 'JWT'})}.{part({'exp': 2**40})}."
NO_ALG = f"{part({'typ': 'JWT'})}.{part({'exp': 2**40})}.AAAA"
DEEP = f"{base64.urlsafe_b64encode(b'[' * 3000).decode()}.{part({})}.AAAA"


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "no token"),
        ("x", "not a JWT"),
        ("a.b.c", "not a JWT"),
        ("ä.b.c", "not a JWT"),
        (DEEP, "not a JWT"),
        (UNSIGNED, "not signed with HS256"),
        (NO_ALG, "not signed with HS256"),
        (forged(algorithm="HS512", secret="x" * 64), "not signed with HS256, the only algorithm that is allowed"),
        (forged(secret=OTHER), "wrong signature.*another secret.*another worker, or a restart"),
        (f"{forged(scopes=['admin']).rpartition('.')[0]}.{forged().rpartition('.')[2]}", "wrong signature"),
        (forged(exp=...), "no exp"),
        (forged(exp=True), "not a finite number"),
        (forged(exp="soon"), "not a finite number"),
        (forged(exp=math.inf), "not a finite number"),
        (forged(nbf="later"), "not a finite number"),
        (forged(nbf=NOW + 5.1), "not valid yet"),
        (forged(iss=...), "no iss"),
        (forged(iss="https://evil.example"), "wrong iss"),
        (forged(aud=...), "no aud"),
        (forged(aud="https://evil.example"), "wrong aud"),
        (forged(scopes=...), "no valid scopes"),
        (forged(scopes="admin"), "no valid scopes"),
        (forged(scopes=["admin", 1]), "no valid scopes"),
        (forged(pub=...), "pub must be true"),
        (forged(pub="true"), "pub must be true"),
        (forged(realtime={"skipColumns": "payload"}), "no valid realtime.skipColumns"),
        (forged(realtime={"tags": "user:1"}), "no valid realtime.tags"),
    ],
)
def test_a_bad_token_is_rejected_with_the_reason(token: str, message: str) -> None:
    with pytest.raises(InvalidToken, match=message) as caught:
        authority([OTHER[::-1], SECRET]).verify(token)
    assert not isinstance(caught.value, ExpiredToken)
    assert caught.value.status == 401
    assert not token or len(token) < 2 or token not in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("kid", [1, None, [], {}, True])
@pytest.mark.parametrize("alg", ["none", "RS256", "HS256"])
def test_a_malformed_key_id_is_rejected(alg: str, kid: object) -> None:
    """With an older PyJWT, the response was a 500: it raised while the message for a wrong `alg` was made."""
    with pytest.raises(InvalidToken, match="token"):
        authority().verify(f"{part({'alg': alg, 'kid': kid})}.{part({})}.AAAA")


def test_nbf_has_a_few_seconds_of_leeway() -> None:
    """The clocks of two hosts differ a little, and a new token was not valid yet."""
    assert authority().verify(forged(nbf=NOW + 5, iat=int(NOW) + 5)).scopes == ("read:runs",)


def test_an_expired_token_raises_its_own_error() -> None:
    with pytest.raises(ExpiredToken, match="token has expired"):
        authority().verify(forged(exp=int(NOW)))


def test_the_expiry_of_a_cached_token_is_still_checked() -> None:
    clock = Clock()
    ours = authority(clock=clock)
    token = ours.mint(["admin"], expires_in_s=60)
    assert ours.verify(token) is ours.verify(token)
    clock.now += 60.4
    ours.verify(token)
    clock.now += 0.1
    with pytest.raises(ExpiredToken):
        ours.verify(token)
    with pytest.raises(ExpiredToken):
        ours.verify(token)


def test_the_cache_retains_the_most_recently_used_tokens() -> None:
    ours = authority(cache_size=2)
    tokens = [ours.mint([f"read:runs:{n}"], expires_in_s=60) for n in range(3)]
    first, second = ours.verify(tokens[0]), ours.verify(tokens[1])
    assert ours.verify(tokens[0]) is first
    ours.verify(tokens[2])
    assert ours.verify(tokens[0]) is first
    again = ours.verify(tokens[1])
    assert again is not second
    assert again == second


def test_failures_are_not_cached() -> None:
    clock = Clock()
    ours = authority(clock=clock)
    early = forged(nbf=NOW + 10)
    with pytest.raises(InvalidToken, match="not valid yet"):
        ours.verify(early)
    clock.now += 10
    assert ours.verify(early).scopes == ("read:runs",)


def test_a_secret_key_grants_full_access() -> None:
    ours = authority([SECRET, OTHER])
    for secret in (SECRET, OTHER):
        assert ours.is_secret(secret)
        assert ours.authenticate(secret) == Claims(("admin",), math.inf, token_id="secret", secret=True)
    for other in ("", SECRET[:-1], SECRET + "x", "ä", "\ud800"):
        assert not ours.is_secret(other)


def test_authenticate_accepts_tokens_too() -> None:
    assert authority().authenticate(forged()).scopes == ("read:runs",)
    with pytest.raises(InvalidToken):
        authority().authenticate(SECRET[:-1])


@pytest.mark.parametrize(
    ("secrets", "message"),
    [
        ("", "missing"),
        (None, "missing"),
        ([], "missing"),
        ([SECRET, ""], "missing"),
        (SECRET[:31], "31 bytes, minimum 32"),
        ([SECRET, "short"], "5 bytes"),
        (SECRET.encode(), "is a bytes"),
        ([1], "is a int"),
        ("ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABgQC", "public key"),
        ("\ud800" * 32, "invalid text"),
    ],
)
def test_a_missing_or_weak_secret_is_rejected_with_the_command_that_generates_one(secrets: Any, message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message) as caught:
        TokenAuthority(secrets)
    assert 'python -c "import secrets; print(secrets.token_urlsafe(32))"' in str(caught.value)
    assert not isinstance(secrets, str) or not secrets or secrets not in str(caught.value)


def test_thirty_two_bytes_are_enough() -> None:
    for secret in ("x" * 32, "ä" * 16):
        ours = TokenAuthority(secret)
        ours.verify(ours.mint(["admin"], expires_in_s=60))


def test_no_repr_contains_a_secret_or_a_token() -> None:
    ours = authority()
    token = ours.mint(["admin"], expires_in_s=60)
    show: Callable[[object], str] = repr
    assert show(ours) == "<TokenAuthority with 1 secret(s)>"
    assert SECRET not in show(ours.authenticate(SECRET))
    assert token not in show(ours.verify(token))
