from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import ipaddress
import json
import pathlib
import re
import types
import uuid
from typing import Any

import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_realtime.core import chunks
from asgi_realtime.core.chunks import decode, decode_as, encode_value, json_line
from asgi_realtime.core.errors import EncodingError, UsageError


class Text(str):
    __slots__ = ()


class Count(int):
    pass


class Ratio(float):
    pass


class Color(enum.Enum):
    RED = "red"


class Struct(msgspec.Struct):
    a: Any


@dataclasses.dataclass
class Data:
    a: Any


class Model(pydantic.BaseModel):
    user_name: str = pydantic.Field(alias="userName")
    score: float | None = None
    at: datetime.date | None = None


class LooseModel(pydantic.BaseModel):
    model_config = {"ser_json_inf_nan": "constants"}
    text: Any = None
    number: float = 0.0


class BrokenModel(pydantic.BaseModel):
    value: int = 1

    @pydantic.field_serializer("value")
    def serialize(self, value: int) -> int:
        raise RuntimeError("out of order")


@pydantic.dataclasses.dataclass
class PydanticData:
    a: int


@pytest.mark.parametrize(
    ("value", "data"),
    [
        ("hi\n\r\0", b'"hi\\n\\r\\u0000"'),
        ("\u2028\u2029\x85\x0b\x0c\x1c", b'"\\u2028\\u2029\\u0085\\u000b\\f\\u001c"'),
        ({"\u2028": ["ü\x85"]}, b'{"\\u2028":["\xc3\xbc\\u0085"]}'),
        ("\u2000\u0105", b'"\xe2\x80\x80\xc4\x85"'),
        (None, b"null"),
        (True, b"true"),
        (1, b"1"),
        (1.5, b"1.5"),
        (2**64, b"18446744073709551616"),
        ({"a": [1, {"b": None}]}, b'{"a":[1,{"b":null}]}'),
        ({1: "one"}, b'{"1":"one"}'),
        ((1, 2), b"[1,2]"),
        ({1}, b"[1]"),
        (frozenset(["a"]), b'["a"]'),
        (datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC), b'"2024-01-02T03:04:05Z"'),
        (datetime.date(2024, 1, 2), b'"2024-01-02"'),
        (uuid.UUID(int=1), b'"00000000-0000-0000-0000-000000000001"'),
        (decimal.Decimal("1.10"), b'"1.10"'),
        (Color.RED, b'"red"'),
        (Struct(1), b'{"a":1}'),
        (Data([Struct("x")]), b'{"a":[{"a":"x"}]}'),
        (PydanticData(1), b'{"a":1}'),
        (Text("x"), b'"x"'),
        ([Text("x"), Count(1), Ratio(0.5)], b'["x",1,0.5]'),
        (types.MappingProxyType({"a": 1}), b'{"a":1}'),
        (collections.ChainMap({"a": 1}), b'{"a":1}'),
        ({"audio": b"\x00\x01"}, b'{"audio":"AAE="}'),
        (float("nan"), b"null"),
        ([float("inf"), {"a": float("-inf")}], b'[null,{"a":null}]'),
        (Ratio("nan"), b"null"),
        ({None: 1, True: 2, False: 3, 4: 5}, b'{"null":1,"true":2,"false":3,"4":5}'),
        ({"a": [{None: float("nan")}]}, b'{"a":[{"null":null}]}'),
        (collections.deque([1, {"a": 2}]), b'[1,{"a":2}]'),
        (pathlib.PurePosixPath("/x/y"), b'"/x/y"'),
        ([ipaddress.ip_address("127.0.0.1"), ipaddress.ip_network("::/64")], b'["127.0.0.1","::/64"]'),
        (re.compile("a+"), b'"a+"'),
        (types.SimpleNamespace(a=1, _b=2), b'{"a":1}'),
        (pydantic.SecretStr("secret"), b'"**********"'),
    ],
)
def test_values_have_one_json_form(value: object, data: bytes) -> None:
    assert encode_value(value) == data
    assert encode_value(value) == data


def test_pydantic_models_are_encoded_by_alias() -> None:
    model = Model(userName="ada", at=datetime.date(2024, 1, 2))
    expected = {"userName": "ada", "score": None, "at": "2024-01-02"}
    assert decode(encode_value(model)) == expected
    assert decode(encode_value({"models": [model]})) == {"models": [expected]}
    assert decode(encode_value(Data(model))) == {"a": expected}


def test_an_openai_chunk_is_encoded_as_the_api_sent_it() -> None:
    from openai.types.chat import ChatCompletionChunk  # a second of imports

    sent: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt",
        "choices": [{"index": 0, "delta": {"content": "hi", "new_field": 1}, "finish_reason": None}],
        "usage": None,
        "unknown": {"kept": True},
    }
    chunk = ChatCompletionChunk.construct(**sent)
    assert decode(encode_value(chunk)) == sent
    assert decode(encode_value([chunk])) == [sent]
    assert "system_fingerprint" in chunk.model_dump()


def test_an_openai_model_of_unexpected_shape_is_encoded_without_a_warning() -> None:
    from openai.types.chat import ChatCompletionChunk  # a second of imports

    sent: dict[str, Any] = {"id": 7, "choices": [{"index": "zero", "delta": "text"}]}
    assert decode(encode_value(ChatCompletionChunk.construct(**sent))) == sent


def test_an_anthropic_event_is_encoded_as_the_api_sent_it() -> None:
    from anthropic.types import RawContentBlockDeltaEvent, TextDelta  # a second of imports

    sent = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}}
    event = RawContentBlockDeltaEvent.model_validate(sent)
    assert isinstance(event.delta, TextDelta)
    assert decode(encode_value(event)) == sent


@pytest.mark.parametrize("value", [b"x", bytearray(b"x"), memoryview(b"x")])
def test_bytes_are_rejected_with_an_alternative(value: object) -> None:
    with pytest.raises(EncodingError, match="base64") as caught:
        encode_value(value)
    assert type(value).__name__ in str(caught.value)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("\ud800", "\ud800"),
        ("a\udc00b", "a\udc00b"),
        ("\ud83d\ude00", "😀"),
        ("\ufeff\ud800\u2028", "\ufeff\ud800\u2028"),
        ({"\ud800": ["\ud800", 1, None, {"x": "\udfff"}]}, {"\ud800": ["\ud800", 1, None, {"x": "\udfff"}]}),
        (Data("\ud800"), {"a": "\ud800"}),
        (Struct({"\ud800"}), {"a": ["\ud800"]}),
        ({1: Text("\ud800")}, {"1": "\ud800"}),
        ([LooseModel(text=1), "\ud800"], [{"text": 1, "number": 0.0}, "\ud800"]),
        (LooseModel(text="\ud800"), {"text": "\ud800", "number": 0.0}),
        ([msgspec.Raw(b'{"raw":1}'), "\ud800"], [{"raw": 1}, "\ud800"]),
        (["\ud800", float("nan"), 2**70, b"x"], ["\ud800", None, 2**70, "eA=="]),
    ],
)
def test_lone_surrogates_are_kept_as_escapes(value: object, expected: object) -> None:
    data = encode_value(value)
    assert data.isascii()
    assert decode(data) == expected


def test_the_halves_of_an_emoji_in_two_chunks_are_joined_by_a_browser() -> None:
    halves = [json.loads(encode_value(half)) for half in ("x\ud83d", "\ude00y")]
    assert "".join(halves).encode("utf-16-le", "surrogatepass").decode("utf-16-le") == "x😀y"


class Named(msgspec.Struct, rename="camel"):
    some_text: str
    raw: msgspec.Raw = msgspec.Raw(b"")
    more: list[msgspec.Raw] = []


class Tagged(msgspec.Struct, tag="tagged"): ...


class TaggedToo(msgspec.Struct, tag="tagged too"): ...


KINDS: Any = Tagged | TaggedToo


def test_typed_decoding_keeps_lone_surrogates() -> None:
    data = b'{"someText":"\\ud800","raw":{"a":["\\ud801"]},"more":["\\ud802",1]}'
    found = decode_as(data, Named)
    assert found.some_text == "\ud800"
    assert [bytes(raw) for raw in (found.raw, *found.more)] == [b'{"a":["\\ud801"]}', b'"\\ud802"', b"1"]
    with pytest.raises(msgspec.ValidationError):
        decode_as(b'{"someText":["\\ud800"]}', Named)
    with pytest.raises(UsageError, match="JSON"):
        decode_as(b'{"someText":"\\ud800"', Named)
    assert decode_as(b'{"someText":"x","\\ud800":1}', Named).some_text == "x", "unknown names are ignored"
    with pytest.raises(UsageError, match="a name has a lone surrogate"):
        decode_as(b'{"type":"\\ud800"}', KINDS)


def test_nan_in_the_json_of_a_model_becomes_null() -> None:
    assert decode(encode_value(LooseModel(number=float("nan")))) == {"text": None, "number": None}
    assert decode(encode_value([LooseModel(number=float("-inf"))])) == [{"text": None, "number": None}]
    assert decode(encode_value(LooseModel(text="NaN", number=0.5))) == {"text": "NaN", "number": 0.5}


def test_an_encoding_error_names_the_type_and_path() -> None:
    with pytest.raises(EncodingError, match=r"^object has no JSON form; allowed are str, numbers"):
        encode_value(object())
    with pytest.raises(EncodingError, match=r"^at \['a'\]\[1\]: complex has no JSON form"):
        encode_value({"b": "\ud800", "a": [1, 1j]})
    with pytest.raises(EncodingError, match=r"^at \[0\]: dict has no JSON form: "):
        encode_value([{(1,): 1}])
    with pytest.raises(EncodingError, match="generator"):
        encode_value({"a": (n for n in [1])})


def test_an_error_of_a_model_serializer_becomes_an_encoding_error() -> None:
    with pytest.raises(EncodingError, match=r"^at \['m'\]: BrokenModel has no JSON form: .*out of order") as caught:
        encode_value({"m": BrokenModel()})
    assert caught.value.__cause__ is not None


def circular_list() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def circular_model() -> LooseModel:
    value = LooseModel()
    value.text = value
    return value


@pytest.mark.parametrize(
    "value",
    [
        circular_list(),
        circular_model(),
        {"a": "\ud800", "b": circular_list()},
        {(1,): 1, "b": circular_list()},
        10**5000,
        msgspec.UNSET,
        ValueError,
    ],
    ids=["list", "model", "after-surrogate", "after-bad-key", "huge-int", "unset", "class"],
)
def test_only_encoding_errors_are_raised(value: object) -> None:
    with pytest.raises(EncodingError):
        encode_value(value)


def test_a_circular_value_raises_an_encoding_error() -> None:
    for value in (circular_list(), {"a": "\ud800", "b": circular_list()}):
        with pytest.raises(EncodingError, match="contains itself"):
            encode_value(value)


def test_raw_json_is_put_on_one_line() -> None:
    assert encode_value(msgspec.Raw(b'{\n "a":\r\n 1}')) == b'{"a":1}'
    with pytest.raises(EncodingError, match="msgspec.Raw"):
        encode_value({"a": msgspec.Raw(b'"\n')})


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    )
)
def test_every_json_value_becomes_one_line_of_valid_json(value: object) -> None:
    data = encode_value(value)
    assert b"\n" not in data
    assert b"\r" not in data
    assert len(data.decode().splitlines()) == 1
    json.loads(data, parse_constant=pytest.fail)
    assert encode_value(decode(data)) == data


def test_escaped_lone_surrogates_are_decoded() -> None:
    assert decode(b'{"a":"\\ud800","b":"\\ud83d\\ude00"}') == {"a": "\ud800", "b": "😀"}


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"NaN", b"1 2", b'"\xff"', b'["\\ud800", NaN]', b'"\\ud800', b"[" * 100_000, b'"\\u12"'],
    ids=["empty", "open", "nan", "two", "utf8", "surrogate-nan", "surrogate-open", "deep", "escape"],
)
def test_malformed_json_is_rejected(data: bytes) -> None:
    with pytest.raises(UsageError, match="JSON"):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"null",
        b"-0",
        b"0.10000000000000000555",
        b"12345678901234567890123456789",
        b"1.50",
        b'{"b": 1, "a": 2, "b":3}',
        b'"caf\\u00e9 \\ud83d\\ude00 \\\\ud800"',
        '"ü 🙂 \ufeff"'.encode(),
        b'"\\ud800 \\uDC00"',
        b'"\\u0000\\r\\n"',
    ],
)
def test_received_json_is_stored_byte_for_byte(data: bytes) -> None:
    assert json_line(data) == data
    assert json_line(b" \t" + data + b" \r\n") == data, "white space around it is no part of it"


def test_received_json_is_put_on_one_line() -> None:
    assert json_line(b'{\r\n "a":\r[1,\n2]}') == b'{   "a": [1, 2]}'


def test_unicode_line_breaks_in_received_json_become_escapes() -> None:
    assert json_line('{"\u2028": "\u2029ü\x85"}'.encode()) == '{"\\u2028": "\\u2029ü\\u0085"}'.encode()


@pytest.mark.parametrize(
    "data",
    [
        b'"\\uDC00!"',
        b'"\\ud83d\\ud83d\\ude00"',
        b'["\\\\ud800", "\\\\\\ud800", "\\ud800\\n", "\\ud800\\u0041"]',
        b'{"\\ud800": 0.10000000000000000555}',
    ],
)
def test_lone_surrogates_in_received_json_remain(data: bytes) -> None:
    assert json_line(data) == data
    assert decode(data) == json.loads(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"undefined",
        b"{",
        b"1 2",
        b"1\n2",
        b"NaN",
        b"1e999",
        b'"\xff"',
        b'"a\rb"',
        b'"a\nb"',
        b'"a\x00b"',
        b"\xef\xbb\xbf1",
        b'["\\ud800", NaN]',
        b'["\\ud800", 1e999]',
        b'"\\ud800',
        b'"\\u12"',
        b"\\ud800",
        b"[" * 100_000,
        b'["\\ud800",' + b"[" * 100_000,
    ],
)
def test_received_text_that_is_not_json_is_rejected(data: bytes) -> None:
    with pytest.raises(UsageError, match="JSON"):
        json_line(data)


@given(st.text(st.characters()))
def test_any_received_string_is_stored_on_one_line(text: str) -> None:
    """The sender is `json.dumps`, which escapes lone surrogates like `JSON.stringify`."""
    data = json.dumps({"text": text}).encode()
    line = json_line(data)
    assert b"\n" not in line and b"\r" not in line
    assert decode(line) == decode(data)


def test_raw_fields_of_a_struct_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Body(msgspec.Struct):
        text: str = ""
        payload: msgspec.Raw = msgspec.Raw(b"")

    decoded: list[bytes] = []
    decode_surrogates = chunks._decode_surrogates

    def spy(data: bytes) -> Any:
        decoded.append(data)
        return decode_surrogates(data)

    monkeypatch.setattr(chunks, "_decode_surrogates", spy)
    found = decode_as(rb'{"other": ["\ud800"], "payload": [ "\ud801" ], "text": "a"}', Body)
    assert (found.text, bytes(found.payload)) == ("a", rb'[ "\ud801" ]')
    assert decoded == [b'"a"']
