from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from datetime import timedelta
from typing import Any

import pytest

from asgi_realtime import Cors, InvalidConfiguration, Limits, Retention, Timeouts, UsageError
from asgi_realtime.core.config import parse_span


@pytest.mark.parametrize(
    ("span", "seconds"),
    [
        (1, 1.0),
        (0.5, 0.5),
        (timedelta(minutes=2), 120.0),
        ("90s", 90.0),
        ("15m", 900.0),
        ("1h", 3600.0),
        ("2hr", 7200.0),
        ("1h30m", 5400.0),
        ("2d", 172_800.0),
        ("1w", 604_800.0),
        ("250ms", 0.25),
        ("1.5h", 5400.0),
        (" 15M ", 900.0),
        ("10d4h", 878_400.0),
    ],
)
def test_spans_are_seconds_timedeltas_or_text(span: Any, seconds: float) -> None:
    assert parse_span(span) == seconds


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ("", "ttl is ''; allowed are seconds, a timedelta, or text like '90s', '15m', '1h30m'"),
        ("15 m", "ttl is '15 m'"),
        ("15", "ttl is '15'"),
        ("m", "ttl is 'm'"),
        ("-1s", "ttl is '-1s'"),
        ("1y", "ttl is '1y'"),
        ("1e3s", "ttl is '1e3s'"),
        (0, "ttl is 0; it must be more than zero and less than ten years"),
        (-1, "ttl is -1"),
        ("0s", "ttl is '0s'"),
        (float("nan"), "ttl is nan"),
        (float("inf"), "ttl is inf"),
        ("9" * 3_000_000 + "h", f"ttl is '{'9' * 80}'…; it must be more than zero and less than ten years"),
        (timedelta(days=-1), "more than zero"),
        ("600w", "less than ten years"),
        (10**400, "less than ten years"),
        (-(10**400), "more than zero"),
        (True, "ttl is a bool; allowed are seconds, a timedelta, or text like '15m'"),
        (None, "ttl is a NoneType"),
        (b"15m", "ttl is a bytes"),
    ],
)
def test_invalid_spans_are_rejected_by_name(span: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_span(span, name="ttl")
    assert message in str(caught.value)


@pytest.mark.parametrize("settings", [Limits, Retention, Timeouts])
def test_every_setting_has_a_positive_default_and_rejects_invalid_values(settings: Any) -> None:
    defaults = settings()
    for field in fields(settings):
        assert getattr(defaults, field.name) > 0
        allowed = 100 if field.name == "stream_age" else 1  # at least the heartbeat
        assert getattr(settings(**{field.name: allowed}), field.name) == allowed
        for bad in (0, -1, True, None, "1", float("nan")):
            with pytest.raises(InvalidConfiguration) as caught:
                settings(**{field.name: bad})
            assert str(caught.value) == f"{settings.__name__}.{field.name} is {bad!r}; it must be a number above 0"
    with pytest.raises(FrozenInstanceError):
        defaults.__setattr__(fields(settings)[0].name, 1)


@pytest.mark.parametrize(
    ("origins", "kept"),
    [
        ("*", "*"),
        (["https://a.example", "*"], "*"),
        ("https://a.example", ("https://a.example",)),
        (["https://a.example", "http://localhost:8000"], ("https://a.example", "http://localhost:8000")),
        (["capacitor://localhost"], ("capacitor://localhost",)),
        ([], ()),
    ],
)
def test_origins_are_a_star_or_a_list(origins: Any, kept: Any) -> None:
    assert Cors(origins).origins == kept


@pytest.mark.parametrize(
    "origin",
    [
        "a.example",
        "https://a.example/path",
        "https://a.example//",
        "https://",
        "https://a b",
        "https://*.example.com",
        "http://localhost:*",
        "https://user@a.example",
        "https://a.example, https://b.example",
        "null",
        "",
        b"https://a.example",
    ],
)
def test_an_invalid_origin_is_rejected(origin: Any) -> None:
    """An origin with a wildcard was accepted and never matched."""
    with pytest.raises(InvalidConfiguration, match="allowed are '\\*' and origins like 'https://app.example'"):
        Cors([origin])


@pytest.mark.parametrize(
    ("configured", "sent"),
    [
        ("https://App.Example.com", "https://app.example.com"),
        ("HTTPS://app.example.com", "https://app.example.com"),
        ("https://app.example.com:443", "https://app.example.com"),
        ("http://app.example.com:80", "http://app.example.com"),
        ("http://app.example.com:443", "http://app.example.com:443"),
        ("https://app.example.com/", "https://app.example.com"),
        ("https://Bücher.example", "https://xn--bcher-kva.example"),
        ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example"),
        ("http://[0:0:0:0:0:0:0:1]:3000", "http://[::1]:3000"),
        ("https://a_b.example", "https://a_b.example"),
    ],
)
def test_an_origin_is_normalized_to_what_browsers_send(configured: str, sent: str) -> None:
    """It was accepted as it was written, and never matched."""
    assert Cors([configured, sent]).origins == (sent,)


@pytest.mark.parametrize("origin", ["https://faß.example", "http://[::1::]", "https://a‥b.example", "https://a!b"])
def test_a_host_that_browsers_spell_differently_is_rejected(origin: str) -> None:
    with pytest.raises(InvalidConfiguration, match="the host is not valid"):
        Cors(origin)


@pytest.mark.parametrize("max_age", ["300", 1.5, -1, None, True])
def test_an_invalid_max_age_is_rejected(max_age: Any) -> None:
    """It was accepted, and every preflight request was a 500."""
    with pytest.raises(InvalidConfiguration, match="Cors.max_age is"):
        Cors(max_age=max_age)


def test_a_port_has_a_limit() -> None:
    assert Cors("http://a:65535").origins == ("http://a:65535",)
    with pytest.raises(InvalidConfiguration, match="the port is 65536, limit 65535"):
        Cors("http://a:65536")


def test_a_stream_cannot_end_before_its_first_heartbeat() -> None:
    """The client received nothing but `reconnect`, again and again, and gave up."""
    assert Timeouts(stream_age=15, heartbeat=15).stream_age == 15
    with pytest.raises(InvalidConfiguration, match="stream_age is 14; it must be at least heartbeat, 15"):
        Timeouts(stream_age=14, heartbeat=15)
