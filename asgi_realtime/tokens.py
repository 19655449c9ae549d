"""Public tokens: mint and verify them, and accept the secret key as a credential.

A public token is a JWT (RFC 7519), signed with HS256 only and with a required `exp`. Issuer and audience are those of
the official clients, which can mint such tokens themselves from the secret key (docs/protocol.md). Verified tokens are
cached; their expiry is checked on each use. No message, repr or log of this module contains a token or a secret.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import re
import secrets as random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jwt
import msgspec

from asgi_realtime.core.errors import (
    ExpiredToken,
    InvalidConfiguration,
    InvalidToken,
    LimitExceeded,
    UsageError,
    shown,
)
from asgi_realtime.core.names import CONTROL_CHARACTERS
from asgi_realtime.core.run_columns import SKIPPABLE_COLUMNS

ISSUER = "https://id.trigger.dev"
AUDIENCE = "https://api.trigger.dev"
SUBJECT = "asgi_realtime"
MIN_SECRET_BYTES = 32
PUBLIC_TOKEN_EXPIRES_IN = "15m"
"""Default lifetime of a token for a browser."""

LEEWAY_S = 5.0
"""How far the clock of the host that minted a token can be ahead, so that its `nbf` is in the future."""

MAX_OWNER_LENGTH = 128
"""Characters of the owner of a token."""

MAX_TOKEN_LENGTH = 128 * 1024
"""Characters of a token: enough for the token of a batch that names a thousand runs. Decoding takes time."""

MAKE_SECRET = 'python -c "import secrets; print(secrets.token_urlsafe(32))"'

_HEADER = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}')
"""The header of the tokens that PyJWT signs. It needs no padding."""

_decode_json = msgspec.json.Decoder(dict[str, Any]).decode
_BAD_IN_OWNER = re.compile(CONTROL_CHARACTERS.pattern + r"|[\ud800-\udfff]")
_ALGORITHM = "HS256"  # pinned: a token that could choose its algorithm could choose "none" (RFC 8725, 2.1)
_OWN_CLAIMS = frozenset({"iss", "aud", "sub", "pub", "iat", "exp", "scopes", "otu", "jti", "home"})
# PyJWT reads the machine's clock, but ours is an argument, so `_read_claims` checks `exp` and `nbf`. `iat` is not
# checked: a host with a clock that is ahead mints valid tokens. `sub` is not used.
_UNCHECKED = ("verify_exp", "verify_nbf", "verify_iat", "verify_sub", "verify_jti")
_OPTIONS: Any = {"require": ["iss", "aud", "exp"], **dict.fromkeys(_UNCHECKED, False)}


class Claims(msgspec.Struct, frozen=True, gc=False):  # made for each new token, in a tenth of a dataclass's time
    """The claims of a credential. `secret` is true for the secret key, which grants full access."""

    scopes: tuple[str, ...]
    expires_at: float
    issued_at: float = 0.0
    """By the clock of the process that minted the token; 0 if unknown."""
    one_time: bool = False
    skip_columns: tuple[str, ...] = ()
    token_id: str = ""
    """Identifies the token in broker claims, without revealing it."""
    owner: str = ""
    """To whom everything that arrives with the token is charged: the `owner` it was minted with, or else `token_id`.
    Empty for the secret key."""
    tags: tuple[str, ...] | None = None
    """The only tags that runs triggered with the token can have. None allows any."""
    secret: bool = False
    home: str = ""
    """The process that minted the token, if its runs are in its own memory."""


_FULL_ACCESS = Claims(scopes=("admin",), expires_at=math.inf, token_id="secret", secret=True)


class TokenAuthority:
    """Mints and verifies tokens with one secret or several: the first signs, all verify. Thread-safe.

    `home` returns the name of this process if its runs are in its own memory, and "" if processes share them. No token
    is valid for longer than `max_life_s`.
    """

    def __init__(
        self,
        secrets: str | Sequence[str],
        *,
        cache_size: int = 10_000,
        clock: Callable[[], float] = time.time,
        home: Callable[[], str] = str,
        max_life_s: float = math.inf,
    ) -> None:
        self._secrets = _checked_secrets(secrets)
        self._secret_bytes = tuple(secret.encode() for secret in self._secrets)
        self._macs = tuple(hmac.new(secret, digestmod="sha256") for secret in self._secret_bytes)
        self._cache_size = cache_size
        self._clock = clock
        self._home = home
        self._max_life_s = max_life_s
        self._cache: OrderedDict[str, Claims] = OrderedDict()  # in order of use, the oldest first
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<TokenAuthority with {len(self._secrets)} secret(s)>"

    def check_life(self, seconds: float, *, name: str) -> float:
        """A lifetime that a caller chose. Raises `LimitExceeded`; `mint` shortens a lifetime that is a default."""
        if seconds > self._max_life_s:
            raise LimitExceeded(
                f"{name} is {seconds:.0f} seconds, limit {self._max_life_s:.0f}; Limits(token_life=…) sets the limit"
            )
        return seconds

    def mint(
        self,
        scopes: Sequence[str],
        *,
        expires_in_s: float,
        one_time: bool = False,
        own_id: bool = False,
        skip_columns: Sequence[str] = (),
        owner: str | None = None,
        tags: Sequence[str] | None = None,
        subject: str = SUBJECT,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Return a signed token. The scopes are not validated here; see `core.scopes.flatten_scopes`.

        With `own_id` the token is unique, as one-time tokens always are; otherwise tokens with the same claims, minted
        within the same second, are identical. `skip_columns` are omitted from the runs that the token reads; see
        `check_columns`. `owner` is charged for what arrives with the token; see `check_owner`. Runs that are
        triggered with the token can have `tags` only; None allows any. `extra` are further claims.
        """
        if isinstance(scopes, str) or not all(isinstance(scope, str) for scope in scopes):
            raise UsageError("scopes must be a list of strings")
        if not 0 < expires_in_s < math.inf:
            raise UsageError(f"expires_in_s is {expires_in_s!r}; it must be a number above 0")
        if clash := _OWN_CLAIMS.intersection(extra or ()):
            raise UsageError(f"extra has {', '.join(sorted(clash))}, which mint() sets; allowed are other claims")
        now = self._clock()
        claims: dict[str, Any] = {**(extra or {}), "iss": ISSUER, "aud": AUDIENCE, "sub": subject, "pub": True}
        claims |= {"iat": int(now), "exp": math.ceil(now + min(expires_in_s, self._max_life_s)), "scopes": list(scopes)}
        options = {
            "skipColumns": list(skip_columns) or None,
            "owner": owner,
            "tags": None if tags is None else list(tags),
        }
        if given := {name: value for name, value in options.items() if value is not None}:
            claims["realtime"] = given
        if home := self._home():
            claims["home"] = home
        if one_time:
            claims["otu"] = True
        if one_time or own_id:
            # Without a unique id, spending a one-time token would spend another one minted within the same second.
            claims["jti"] = random.token_urlsafe(12)
        return _sign(claims, self._secrets[0])

    def verify(self, token: str) -> Claims:
        """Return the claims of a token. Raises `InvalidToken`, or `ExpiredToken` if it is otherwise valid."""
        if len(token) > MAX_TOKEN_LENGTH:
            raise InvalidToken(f"token is {len(token)} characters, limit {MAX_TOKEN_LENGTH}")
        now = self._clock()
        with self._lock:
            claims = self._cache.get(token)
            if claims is not None and claims.expires_at > now:
                self._cache.move_to_end(token)
                return claims
        payload = _read_own(token, self._macs) or _decode(token, self._secrets)
        claims = _read_claims(payload, now=now, token_id=_token_id(token))
        with self._lock:
            self._cache[token] = claims
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return claims

    def is_from_elsewhere(self, claims: Claims) -> bool:
        """Whether another process minted the token and holds its runs in its own memory."""
        return bool(claims.home) and claims.home != self._home()

    def is_secret(self, credential: str) -> bool:
        """Whether this is one of the secret keys. Takes constant time."""
        encoded = credential.encode("utf-8", "surrogatepass")
        found = [hmac.compare_digest(encoded, secret) for secret in self._secret_bytes]  # no early exit
        return any(found)

    def authenticate(self, credential: str) -> Claims:
        """Return the claims of a token, or full access for a secret key. Raises what `verify` raises."""
        return _FULL_ACCESS if self.is_secret(credential) else self.verify(credential)


def check_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """The columns that a token omits from runs, without duplicates. Raises `UsageError` for an unknown column."""
    found = (columns,) if isinstance(columns, str) else tuple(columns)
    for column in found:
        if column not in SKIPPABLE_COLUMNS:
            name = shown(column) if isinstance(column, str) else f"a {type(column).__name__}"
            raise UsageError(f"skip_columns has {name}; allowed are {', '.join(SKIPPABLE_COLUMNS)}")
    return tuple(dict.fromkeys(found))


def check_owner(owner: str | None) -> str | None:
    """The owner of a token, if it is valid. Raises `UsageError`, `LimitExceeded`."""
    if owner is None:
        return None
    if not isinstance(owner, str):
        raise UsageError(f"owner is a {type(owner).__name__}; allowed is a str, such as 'user:1'")
    if not owner.strip():
        raise UsageError("owner is empty; name the user, such as 'user:1', or omit it")
    if len(owner) > MAX_OWNER_LENGTH:
        raise LimitExceeded(f"owner is {len(owner)} characters, limit {MAX_OWNER_LENGTH}")
    if _BAD_IN_OWNER.search(owner):
        raise UsageError(f"owner {shown(owner)} has a control character or a lone surrogate, which are not allowed")
    return owner


def _checked_secrets(secrets: str | Sequence[str]) -> tuple[str, ...]:
    is_one = isinstance(secrets, str | bytes) or not isinstance(secrets, Sequence)
    found: tuple[Any, ...] = (secrets or "",) if is_one else tuple(secrets)
    if not found or "" in found:
        raise InvalidConfiguration(f"secret_key is missing; generate one with: {MAKE_SECRET}")
    for secret in found:
        if not isinstance(secret, str):
            raise InvalidConfiguration(
                f"secret_key is a {type(secret).__name__}; pass a str, generated with: {MAKE_SECRET}"
            )
        _check_secret(secret)
    return found


def _check_secret(secret: str) -> None:
    size = len(secret.encode("utf-8", "surrogatepass"))
    if size < MIN_SECRET_BYTES:
        raise InvalidConfiguration(
            f"secret_key is {size} bytes, minimum {MIN_SECRET_BYTES}; generate one with: {MAKE_SECRET}"
        )
    try:
        jwt.encode({}, secret, algorithm=_ALGORITHM)
    except (jwt.InvalidKeyError, UnicodeEncodeError):
        # `from None`: the cause of an encoding error contains the secret.
        raise InvalidConfiguration(
            f"secret_key is not a random secret but a public key, a certificate or invalid text; generate one with:"
            f" {MAKE_SECRET}"
        ) from None


def _sign(claims: dict[str, Any], secret: str) -> str:
    try:
        return jwt.encode(claims, secret, algorithm=_ALGORITHM)
    except (TypeError, ValueError) as exc:
        raise UsageError(f"extra claims cannot be encoded as JSON: {exc}") from exc


def _token_id(token: str) -> str:
    # Hashes the signed part only. Base64 allows several spellings of one signature (padding, spare bits), so otherwise
    # respelling a one-time token would make it usable again.
    return hashlib.sha256(token.rpartition(".")[0].encode()).hexdigest()[:32]


def _read_own(token: str, macs: tuple[hmac.HMAC, ...]) -> dict[str, Any] | None:
    """The payload of a valid token in the form that `mint` returns. None if PyJWT has to decide, or find the reason.

    It takes a sixth of the time of PyJWT, which also checks the secret and each character for each token.
    """
    signed, _, signature = token.encode("utf-8", "surrogatepass").rpartition(b".")
    header, _, encoded = signed.partition(b".")
    if header != _HEADER or not any(_is_signature(signature, signed, mac) for mac in macs):
        return None
    try:
        payload = _decode_json(base64.urlsafe_b64decode(encoded + b"=="))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    is_complete = payload.get("iss") == ISSUER and payload.get("aud") == AUDIENCE and payload.get("exp") is not None
    return payload if is_complete else None


def _is_signature(signature: bytes, signed: bytes, mac: hmac.HMAC) -> bool:
    mac = mac.copy()  # faster than to begin with the secret
    mac.update(signed)
    return hmac.compare_digest(signature, base64.urlsafe_b64encode(mac.digest()).rstrip(b"="))


def _decode(token: str, secrets: tuple[str, ...]) -> dict[str, Any]:
    if not token:
        raise InvalidToken("no token; pass one as `Authorization: Bearer …` or `?access_token=…`")
    if not token.isascii():
        raise InvalidToken("token is not a JWT")
    try:
        return _decode_with_any(token, secrets)
    except jwt.InvalidSignatureError as exc:
        raise InvalidToken(
            "token has a wrong signature: it was signed with another secret, or modified, or this server generates its"
            " secret_key at startup (another worker, or a restart)"
        ) from exc
    except jwt.InvalidAlgorithmError as exc:
        raise InvalidToken(f"token is not signed with {_ALGORITHM}, the only algorithm that is allowed") from exc
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


def _read_claims(payload: dict[str, Any], *, now: float, token_id: str) -> Claims:
    expires_at = payload["exp"]
    if not _is_time(expires_at) or not _is_time(payload.get("nbf", 0)):
        raise InvalidToken("token has an exp or nbf that is not a finite number")
    if expires_at <= now:
        raise ExpiredToken("token has expired")
    if payload.get("nbf", 0) > now + LEEWAY_S:
        raise InvalidToken("token is not valid yet (nbf)")
    if payload.get("pub") is not True:
        raise InvalidToken("token is not a public access token: pub must be true")
    realtime = payload.get("realtime")
    options: dict[str, Any] = realtime if isinstance(realtime, dict) else {}
    return Claims(
        scopes=_strings(payload.get("scopes"), "scopes"),
        expires_at=expires_at,
        issued_at=issued_at if _is_time(issued_at := payload.get("iat", 0)) else 0.0,
        one_time=bool(payload.get("otu")),
        skip_columns=_strings(options.get("skipColumns", []), "realtime.skipColumns"),
        token_id=token_id,
        owner=_owner(options.get("owner")) or token_id,
        tags=None if (tags := options.get("tags")) is None else _strings(tags, "realtime.tags"),
        home=home if isinstance(home := payload.get("home", ""), str) else "",
    )


def _is_time(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _owner(value: Any) -> str | None:
    try:
        return check_owner(value)
    except UsageError as exc:
        raise InvalidToken(f"token has no valid realtime.owner: {exc}") from exc


def _strings(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidToken(f"token has no valid {name}: it must be a list of strings")
    return tuple(value)
