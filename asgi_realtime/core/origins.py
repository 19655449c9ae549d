"""Origins as browsers send them: `https://app.example`, lowercase, in ASCII, without the default port.

An `Origin` header is compared as text, so an origin that is spelled in another way never matches. Clear spellings are
normalized; every other one is rejected where it is configured. Spec: WHATWG URL, sections 3.3 and 4.5; RFC 6454,
section 6.2.
"""

from __future__ import annotations

import ipaddress
import re

from asgi_realtime.core.errors import InvalidConfiguration

_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\[[0-9a-f:.]+\]|[^\s\[\]:/?#@,*%\\]+)(?::(?P<port>[0-9]{1,9}))?/?"
)
_ASCII_HOST = re.compile(r"[a-z0-9._-]+")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def normalize_origin(origin: str) -> str:
    """The origin as a browser sends it. Raises `InvalidConfiguration`."""
    found = _ORIGIN.fullmatch(origin.lower()) if isinstance(origin, str) else None
    if found is None:
        raise InvalidConfiguration(
            f"cors origin {origin!r}; allowed are '*' and origins like 'https://app.example': a scheme, a host and an"
            " optional port, without a path or wildcard"
        )
    scheme, port = found["scheme"], int(found["port"] or 0)
    if port > 65535:
        raise InvalidConfiguration(f"cors origin {origin!r}: the port is {port}, limit 65535")
    suffix = f":{port}" if port and port != _DEFAULT_PORTS.get(scheme) else ""
    return f"{scheme}://{_normalize_host(found['host'], origin)}{suffix}"


def _normalize_host(host: str, origin: str) -> str:
    try:
        if host.startswith("["):
            return f"[{ipaddress.IPv6Address(host[1:-1]).compressed}]"
        if _ASCII_HOST.fullmatch(host):
            return host
        encoded = host.encode("idna")
        # Python knows IDNA 2003, browsers use UTS 46. Where these differ ('ß'), the name does not survive a round trip.
        if _ASCII_HOST.fullmatch(encoded.decode()) and encoded.decode("idna") == host:
            return encoded.decode()
    except ValueError:
        pass
    raise InvalidConfiguration(
        f"cors origin {origin!r}: the host is not valid; allowed are ASCII names (a browser shows other names as"
        " 'xn--…' in its Origin header) and IP addresses"
    )
