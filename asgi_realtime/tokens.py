"""Public access tokens: minting, verifying, and the secret key itself as a credential.

HS256 and nothing else, `exp` required, issuer and audience those of the official clients, which mint such tokens with
our secret themselves (docs/protocol.md). A verified token is remembered, its expiry is checked each time.
No message, repr or log of this module carries a token or a secret.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets as random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jwt

from asgi_realtime.core.errors import ExpiredToken, InvalidConfiguration, InvalidToken, UsageError, shown
from asgi_realtime.core.run_columns import SKIPPABLE_COLUMNS

ISSUER = "https://id.trigger.dev"
AUDIENCE = "https://api.trigger.dev"
SUBJECT = "asgi_realtime"
MIN_SECRET_BYTES = 32
PUBLIC_TOKEN_EXPIRES_IN = "15m"
"""How long a token lasts that is made for a browser, unless it is said otherwise."""

MAKE_SECRET = 'python -c "import secrets; print(secrets.token_urlsafe(32))"'

_ALGORITHM = "HS256"  # pinned: a token that may choose its algorithm may choose "none" (RFC 8725, 2.1)
_OWN_CLAIMS = frozenset({"iss", "aud", "sub", "pub", "iat", "exp", "scopes", "otu", "jti", "home"})
# PyJWT reads the clock of the machine; ours is an argument, so the claims with times are checked here. `iat` is not
# checked: a host whose clock is a second ahead mints good tokens. Nothing uses `sub`.
_OPTIONS: Any = {
    "require": ["iss", "aud", "exp"],
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
    "verify_sub": False,
    "verify_jti": False,
}


@dataclass(frozen=True, slots=True)
class Claims:
    """What a credential says. `secret` is true for the secret key itself, which may do everything."""

    scopes: tuple[str, ...]
    expires_at: float
    one_time: bool = False
    skip_columns: tuple[str, ...] = ()
    token_id: str = ""
    """Names the token in limits and claims, without giving it away."""
    secret: bool = False
    home: str = ""
    """The process that made the token, if that keeps its runs in its own memory."""


_ALL_POWERS = Claims(scopes=("admin",), expires_at=math.inf, token_id="secret", secret=True)


class TokenAuthority:
    """Mints and verifies tokens with one secret or several: the first signs, all verify. Thread-safe.

    `home` gives the name of this process where it keeps its runs in memory, and "" where processes share them.
    """

    def __init__(
        self,
        secrets: str | Sequence[str],
        *,
        cache_size: int = 10_000,
        clock: Callable[[], float] = time.time,
        home: Callable[[], str] = str,
    ) -> None:
        self._secrets = _checked_secrets(secrets)
        self._secret_bytes = tuple(secret.encode() for secret in self._secrets)
        self._cache_size = cache_size
        self._clock = clock
        self._home = home
        self._cache: dict[str, Claims] = {}  # in order of use, the oldest first
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<TokenAuthority with {len(self._secrets)} secret(s)>"

    def mint(
        self,
        scopes: Sequence[str],
        *,
        expires_in_s: float,
        one_time: bool = False,
        own_id: bool = False,
        skip_columns: Sequence[str] = (),
        subject: str = SUBJECT,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Return a signed token. The scopes are taken as they are; see `core.scopes.flatten_scopes`.

        With `own_id` it differs from all others, as a one-time token does; if not, two that say the same in one second
        are one and the same. `skip_columns` are kept from whoever reads runs with it; see `check_columns`. `extra` are
        further claims.
        """
        if isinstance(scopes, str) or not all(isinstance(scope, str) for scope in scopes):
            raise UsageError("scopes must be a list of strings")
        if not 0 < expires_in_s < math.inf:
            raise UsageError(f"expires_in_s is {expires_in_s!r}; it must be a number above 0")
        if clash := _OWN_CLAIMS.intersection(extra or ()):
            raise UsageError(f"extra has {', '.join(sorted(clash))}, which mint() sets; allowed are other claims")
        now = self._clock()
        claims: dict[str, Any] = {**(extra or {}), "iss": ISSUER, "aud": AUDIENCE, "sub": subject, "pub": True}
        claims |= {"iat": int(now), "exp": math.ceil(now + expires_in_s), "scopes": list(scopes)}
        if skip_columns:
            claims["realtime"] = {"skipColumns": list(skip_columns)}
        if home := self._home():
            claims["home"] = home
        if one_time:
            claims["otu"] = True
        if one_time or own_id:
            # Without an id of its own, a second one-time token of the same second would count as spent with the first.
            claims["jti"] = random.token_urlsafe(12)
        return _sign(claims, self._secrets[0])

    def verify(self, token: str) -> Claims:
        """Return what a token says. Raises `InvalidToken`, or `ExpiredToken` if that is all that is wrong with it."""
        now = self._clock()
        with self._lock:
            claims = self._cache.pop(token, None)
            if claims is not None and claims.expires_at > now:
                self._cache[token] = claims
                return claims
        claims = _read_claims(_decode(token, self._secrets), now=now, token_id=_token_id(token))
        with self._lock:
            self._cache[token] = claims
            if len(self._cache) > self._cache_size:
                del self._cache[next(iter(self._cache))]
        return claims

    def is_from_elsewhere(self, claims: Claims) -> bool:
        """Whether a token is of a process that keeps its runs in its own memory, and not of this one."""
        return bool(claims.home) and claims.home != self._home()

    def is_secret(self, credential: str) -> bool:
        """Whether this is one of the secret keys, in constant time."""
        given = credential.encode("utf-8", "surrogatepass")
        found = [hmac.compare_digest(given, secret) for secret in self._secret_bytes]  # no early exit
        return any(found)

    def authenticate(self, credential: str) -> Claims:
        """Return the claims of a token, or full powers for a secret key. Raises as `verify`."""
        return _ALL_POWERS if self.is_secret(credential) else self.verify(credential)


def check_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """Columns of runs that a token may keep from its holder, without repeats. Raises `UsageError` for any other."""
    found = (columns,) if isinstance(columns, str) else tuple(columns)
    for column in found:
        if column not in SKIPPABLE_COLUMNS:
            name = shown(column) if isinstance(column, str) else f"a {type(column).__name__}"
            raise UsageError(f"skip_columns has {name}; allowed are {', '.join(SKIPPABLE_COLUMNS)}")
    return tuple(dict.fromkeys(found))


def _checked_secrets(secrets: str | Sequence[str]) -> tuple[str, ...]:
    found = (secrets,) if isinstance(secrets, str | bytes) else tuple(secrets or ())
    if not found or "" in found:
        raise InvalidConfiguration(f"secret_key is missing; make one with: {MAKE_SECRET}")
    for secret in found:
        if not isinstance(secret, str):
            raise InvalidConfiguration(
                f"secret_key is a {type(secret).__name__}; allowed is a str, from: {MAKE_SECRET}"
            )
        _check_secret(secret)
    return found


def _check_secret(secret: str) -> None:
    size = len(secret.encode("utf-8", "surrogatepass"))
    if size < MIN_SECRET_BYTES:
        raise InvalidConfiguration(
            f"secret_key is {size} bytes, at least {MIN_SECRET_BYTES}; make one with: {MAKE_SECRET}"
        )
    try:
        jwt.encode({}, secret, algorithm=_ALGORITHM)
    except (jwt.InvalidKeyError, UnicodeEncodeError):
        # Without a cause: that of an encoding error carries the secret.
        raise InvalidConfiguration(
            f"secret_key is a public key, a certificate or no text, not a random secret; make one with: {MAKE_SECRET}"
        ) from None


def _sign(claims: dict[str, Any], secret: str) -> str:
    try:
        return jwt.encode(claims, secret, algorithm=_ALGORITHM)
    except (TypeError, ValueError) as exc:
        raise UsageError(f"extra claims have no JSON form: {exc}") from exc


def _token_id(token: str) -> str:
    # Of the signed part only: base64 spells one signature in several ways (padding, spare bits), and a one-time token
    # that can be respelled could be used again.
    return hashlib.sha256(token.rpartition(".")[0].encode()).hexdigest()[:32]


def _decode(token: str, secrets: tuple[str, ...]) -> dict[str, Any]:
    if not token:
        raise InvalidToken("no token; pass one as `Authorization: Bearer …` or `?access_token=…`")
    if not token.isascii():
        raise InvalidToken("token is not a JWT")
    try:
        return _decode_with_any(token, secrets)
    except jwt.InvalidSignatureError as exc:
        raise InvalidToken(
            "token has a wrong signature: it was signed with another secret, or changed, or this server made its own"
            " key anew: another worker, or a restart"
        ) from exc
    except jwt.InvalidAlgorithmError as exc:
        raise InvalidToken(_algorithm_message(token)) from exc
    except jwt.MissingRequiredClaimError as exc:
        raise InvalidToken(f"token has no {exc.claim}; tokens need iss, aud, exp, pub and scopes") from exc
    except jwt.InvalidIssuerError as exc:
        raise InvalidToken(f"token has a wrong iss; allowed is {ISSUER}") from exc
    except jwt.InvalidAudienceError as exc:
        raise InvalidToken(f"token has a wrong aud; allowed is {AUDIENCE}") from exc
    except (jwt.InvalidTokenError, RecursionError) as exc:
        raise InvalidToken("token is not a JWT") from exc


def _decode_with_any(token: str, secrets: tuple[str, ...]) -> dict[str, Any]:
    for secret in secrets[:-1]:
        try:
            return _decode_with(token, secret)
        except jwt.InvalidSignatureError:
            continue
    return _decode_with(token, secrets[-1])


def _decode_with(token: str, secret: str) -> dict[str, Any]:
    return jwt.decode(token, secret, algorithms=[_ALGORITHM], issuer=ISSUER, audience=AUDIENCE, options=_OPTIONS)


def _algorithm_message(token: str) -> str:
    if str(jwt.get_unverified_header(token).get("alg", "none")).lower() == "none":
        return f"token is not signed; allowed is {_ALGORITHM}"
    return f"token is signed with another algorithm; allowed is {_ALGORITHM}"


def _read_claims(payload: dict[str, Any], *, now: float, token_id: str) -> Claims:
    expires_at = payload["exp"]
    if not _is_time(expires_at) or not _is_time(payload.get("nbf", 0)):
        raise InvalidToken("token has an exp or nbf that is no number")
    if expires_at <= now:
        raise ExpiredToken("token has expired")
    if payload.get("nbf", 0) > now:
        raise InvalidToken("token is not valid yet (nbf)")
    if payload.get("pub") is not True:
        raise InvalidToken("token is not a public access token: pub must be true")
    realtime = payload.get("realtime")
    skip_columns = realtime.get("skipColumns", []) if isinstance(realtime, dict) else []
    return Claims(
        scopes=_strings(payload.get("scopes"), "scopes"),
        expires_at=expires_at,
        one_time=bool(payload.get("otu")),
        skip_columns=_strings(skip_columns, "realtime.skipColumns"),
        token_id=token_id,
        home=home if isinstance(home := payload.get("home", ""), str) else "",
    )


def _is_time(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _strings(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidToken(f"token has no valid {name}: it must be a list of strings")
    return tuple(value)
