from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from asgi_realtime.asgi.trigger_dev.decoding import read_json
from asgi_realtime.asgi.trigger_dev.run_requests import RunRequest, read_options, read_payload
from asgi_realtime.core.config import Limits
from asgi_realtime.core.errors import LimitExceeded, UsageError
from asgi_realtime.tasks.options import RunOptions
from asgi_realtime.tasks.records import Payload

SUPERJSON = "application/super+json"


def parse(body: Any, limits: Limits | None = None) -> tuple[Payload, RunOptions]:
    limits = limits or Limits()
    data = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    request = read_json(data, RunRequest)
    options = read_options(request, limits)
    return read_payload(request, options, limits), options.run_options()


# The payload


@pytest.mark.parametrize(
    ("body", "payload"),
    [
        ({"payload": {"a": [1, None]}}, b'{"a":[1,null]}'),
        ({"payload": "text"}, b'"text"'),
        ({"payload": '{"a":1}', "options": {"payloadType": "application/json"}}, rb'"{\"a\":1}"'),
        ({"payload": None}, b"null"),
        ({"payload": 'te"xt', "options": {"payloadType": "text/plain"}}, rb'"te\"xt"'),
        ({"payload": "", "options": {"payloadType": "text/plain"}}, b'""'),
        ({"payload": '{"json":{"a":1}}', "options": {"payloadType": SUPERJSON}}, b'{"a":1}'),
        ({"payload": '{"json":null}', "options": {"payloadType": SUPERJSON}}, b"null"),
        ({"options": {"payloadType": "application/json"}}, None),
        ({}, None),
        ({"options": None}, None),
        ({"payload": 1, "context": {}, "options": {"payloadType": None}}, b"1"),
        (
            b'{"payload": {"n": 1.0, "big": 12345678901234567890123,\n "s": "\\ud800"}}',
            b'{"n": 1.0, "big": 12345678901234567890123,  "s": "\\ud800"}',
        ),
    ],
)
def test_the_type_of_a_payload_decides_how_it_is_read(body: Any, payload: bytes | None) -> None:
    assert parse(body)[0] == Payload(payload)


def test_superjson_is_split_into_plain_json_and_annotations() -> None:
    text = '{"json":{"when":"2026-01-02T03:04:05.678Z"},"meta":{"values":{"when":["Date"]}}}'
    payload, _ = parse({"payload": text, "options": {"payloadType": SUPERJSON, "payloadSize": len(text)}})
    assert payload == Payload(b'{"when":"2026-01-02T03:04:05.678Z"}', b'{"values":{"when":["Date"]}}')


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body is malformed: not valid JSON"),
        (b"{", 400, "the body is malformed: not valid JSON"),
        (b"[]", 400, "the body does not fit: Expected `object`, got `array`"),
        (b"1", 400, "the body does not fit: Expected `object`, got `int`"),
        (b'{"payload": NaN}', 400, "malformed"),
        (b"\xff", 400, "malformed"),
        (b"[" * 100_000, 400, "Expected `object`, got `array`"),
        (b'{"payload": %b}' % (b"[" * 90_000), 400, "nested too deeply"),
        (b'{"options": []}', 400, "the field options does not fit; it must be an object"),
        (b'{"payload": {}, "options": {"payloadType": "text/plain"}}', 400, "type text/plain, so it must be a string"),
        (b'{"payload": 1, "options": {"payloadType": "application/super+json"}}', 400, "so it must be a string"),
        (b'{"payload": "{", "options": {"payloadType": "application/super+json"}}', 400, "the payload is malformed"),
        (
            b'{"payload": "{\\"json\\":\\"\\ud83d\\"}", "options": {"payloadType": "application/super+json"}}',
            400,
            "the payload is malformed: its text has a lone surrogate",
        ),
        (
            b'{"options": {"metadata": "{\\"a\\":\\"\\ud83d\\"}", "metadataType": "application/json"}}',
            422,
            "metadata is malformed: its text has a lone surrogate",
        ),
        (
            b'{"payload": "{\\"json\\":1,\\"meta\\":{\\"values\\":[\\"Date\\"]}}",'
            b' "options": {"payloadType": "application/super+json"}}',
            400,
            "the payload is malformed: superjson's annotation of the payload does not fit: 'Date'",
        ),
        (b'{"payload": "x", "options": {"payloadType": "text/html"}}', 422, "payloadType is 'text/html'; allowed are"),
        (b'{"payload": "x", "options": {"payloadType": 1}}', 422, "got `int` - at `$.payloadType`"),
        (b'{"payload": "x", "options": {"payloadType": "application/store"}}', 413, "the limit is 131071 bytes"),
    ],
)
def test_a_malformed_payload_is_rejected(body: bytes, status: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(body)
    assert caught.value.status == status
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"payload": [[]] * 5000}, "the payload is 15001 bytes, limit 10000"),
        ({"payload": "x" * 9999}, "the payload is 10001 bytes, limit 10000"),
        (
            {"payload": '"' * 10_000, "options": {"payloadType": SUPERJSON}},
            "the payload is 20002 bytes, limit 20000",
        ),
        (
            {"payload": "x" * 10_001, "options": {"payloadType": SUPERJSON}},
            "the payload, with the types of its values, is 10001 bytes, limit 10000",
        ),
        ({"options": {"metadata": [[]] * 22_000}}, "the options are 66014 bytes, limit 65936"),
        ({"options": {"tags": ["a"] * 20_000}}, "the options are 80010 bytes, limit 65936"),
    ],
)
def test_lengths_are_checked_before_decoding(body: Any, message: str) -> None:
    """A body of 7 MB was decoded into millions of values, which blocked the event loop, before it was rejected."""
    with pytest.raises(LimitExceeded) as caught:
        parse(body, Limits(payload_bytes=10_000, metadata_bytes=200))
    assert (caught.value.status, str(caught.value)) == (413, message)


# Options


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"tags": "one"}, "tags", "one"),
        ({"tags": []}, "tags", []),
        ({"tags": None}, "tags", None),
        ({"idempotencyKey": "k"}, "idempotency_key", "k"),
        ({"idempotencyKeyTTL": "5m"}, "idempotency_key_ttl", 300.0),
        ({"ttl": 90}, "ttl", 90.0),
        ({"ttl": 0}, "ttl", None),
        ({"ttl": None}, "ttl", None),
        ({"ttl": "1h30m"}, "ttl", 5400.0),
        ({"maxDuration": 2147483647}, "max_duration", None),  # `timeout.None` of the client
        ({"maxDuration": 0.5}, "max_duration", 0.5),
        ({"metadata": {"a": 1}}, "metadata", {"a": 1}),
        ({"metadata": None}, "metadata", None),
        ({"metadata": '{"a":1}', "metadataType": "application/json"}, "metadata", {"a": 1}),
        (
            {"metadata": '{"json":{"a":"x"},"meta":{"values":{"a":["Date"]}}}', "metadataType": SUPERJSON},
            "metadata",
            {"a": "x"},
        ),
        ({"delay": None}, "delay", None),
        ({"delay": "1h"}, "delay", 3600.0),
        ({"delay": "2030-01-01T00:00:00.000Z"}, "delay", datetime(2030, 1, 1, tzinfo=UTC)),
        ({"delay": "2030-01-01T01:00:00+01:00"}, "delay", datetime(2030, 1, 1, tzinfo=UTC)),
    ],
)
def test_an_option_has_several_forms(options: Any, name: str, value: Any) -> None:
    assert dict(parse({"options": options})[1])[name] == value


def test_options_without_a_counterpart_are_ignored() -> None:
    options = {
        "queue": {"name": "q"},
        "concurrencyKey": "k",
        "machine": "large-1x",
        "priority": 10,
        "maxAttempts": 3,
        "lockToVersion": "20260101.1",
        "externalDeploymentId": "abc",
        "region": "eu",
        "test": True,
        "debounce": {"key": "d", "delay": "1s"},
        "idempotencyKeyOptions": {"key": "k", "scope": "run"},
        "resumeParentOnCompletion": False,
        "addedInALaterVersion": 1,
    }
    assert parse({"options": options}) == parse({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tags": 1}, "Expected `str | array | null`, got `int` - at `$.tags`"),
        ({"tags": {"a": 1}}, "Expected `str | array | null`, got `object` - at `$.tags`"),
        ({"tags": [1]}, "Expected `str`, got `int` - at `$.tags[0]`"),
        ({"metadata": [1]}, "Expected `str | object | null`, got `array` - at `$.metadata`"),
        ({"metadata": "text"}, "metadata is malformed"),
        ({"metadata": "1"}, "metadata is not an object; allowed are"),
        ({"metadata": "{}", "metadataType": "text/plain"}, "metadata is not an object; allowed are"),
        ({"idempotencyKey": 1}, "Expected `str | null`, got `int` - at `$.idempotencyKey`"),
        ({"idempotencyKeyTTL": "soon"}, "idempotencyKeyTTL is 'soon'"),
        ({"idempotencyKeyTTL": 60}, "Expected `str | null`, got `int` - at `$.idempotencyKeyTTL`"),
        ({"ttl": "soon"}, "ttl is 'soon'"),
        ({"ttl": ""}, "ttl is ''"),
        ({"ttl": -1}, "ttl is -1; it must be more than zero"),
        ({"ttl": True}, "Expected `int | str | null`, got `bool` - at `$.ttl`"),
        ({"ttl": 1.5}, "Expected `int | str | null`, got `float` - at `$.ttl`"),
        ({"delay": 60}, "Expected `str | null`, got `int` - at `$.delay`"),
        ({"delay": "tomorrow"}, "delay is 'tomorrow'; allowed are spans like '90s'"),
        ({"delay": "2030-01-01T00:00:00"}, "with a time zone"),
        ({"delay": "600w"}, "delay is '600w'"),
        ({"maxDuration": "1h"}, "Expected `int | float | null`, got `str` - at `$.maxDuration`"),
        ({"maxDuration": 0}, "maxDuration is 0; it must be more than zero"),
        ({"parentRunId": 1}, "Expected `str | null`, got `int` - at `$.parentRunId`"),
    ],
)
def test_an_option_with_a_wrong_value_is_rejected(options: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse({"options": options})
    assert (caught.value.status, caught.value.code) == (422, "invalid")
    assert message in str(caught.value)
