from __future__ import annotations

import json
from typing import Any

import pytest

from asgi_realtime.asgi.trigger_dev.superjson import MAX_DIGITS, parse
from asgi_realtime.core.errors import LimitExceeded, UsageError

WHEN = "2026-01-02T03:04:05.678Z"

# Output of `superjson.stringify` of the official package.
WRITTEN = [
    text.replace("WHEN", WHEN)
    for text in (
        '{"json":["WHEN",null,"1","NaN","-0","Infinity"],"meta":{"values":{"0":["Date"],"1":["undefined"],"2":["bigint"],'
        '"3":["number"],"4":["number"],"5":["number"]}}}',
        '{"json":"WHEN","meta":{"values":["Date"]}}',
        '{"json":null,"meta":{"values":["undefined"]}}',
        '{"json":[1,"WHEN",{"x":null}],"meta":{"values":["set",{"1":["Date"],"2.x":["undefined"]}]}}',
        '{"json":[["k","WHEN"],["WHEN",{"deep":["1"]}]],"meta":{"values":["map",{"0.1":["Date"],"1.0":["Date"],'
        '"1.1.deep":["set",{"0":["bigint"]}]}]}}',
        '{"json":[[[[1,"WHEN"]],1]],"meta":{"values":["map",{"0.0":["map",{"0.1":["Date"]}]}]}}',
        r'{"json":{"a.b":{"c\\d":"WHEN"},"e":{"f.g":[[[1,2]]]}},"meta":{"values":{"a\\.b.c\\d":["Date"],"e.f\\.g.0":["map"]}}}',
        '{"json":{"u":"https://a.example.com:8080/x?y=z#w"},"meta":{"values":{"u":["URL"]}}}',
        '{"json":{"t":[1,-2],"f":[1.5,null]},"meta":{"values":{"t":[["typed-array","Int8Array"]],'
        '"f":[["typed-array","Float32Array"]]}}}',
        '{"json":{"e":{"name":"Error","message":"bad"}},"meta":{"values":{"e":["Error"]}}}',
        '{"json":{"":"WHEN"},"meta":{"values":{"":["Date"]}}}',
    )
]


@pytest.mark.parametrize("text", WRITTEN)
def test_the_output_of_superjson_is_kept(text: str) -> None:
    parsed = parse(text.encode())
    assert parsed.meta is not None
    assert f'{{"json":{parsed.json.decode()},"meta":{parsed.meta.decode()}}}' == text


@pytest.mark.parametrize("text", ['{"json":{"a":1}}', '{"json":{"a":1},"meta":null}', '{"json":{"a":1},"meta":{}}'])
def test_plain_values_have_no_meta(text: str) -> None:
    assert parse(text.encode()) == (b'{"a":1}', None)


def test_json_is_kept_unchanged() -> None:
    text = b'{\n "json": {"n": 1.0, "big": 12345678901234567890123, "s": "\\ud800"},\n "meta": {}}'
    assert parse(text) == (b'{"n": 1.0, "big": 12345678901234567890123, "s": "\\ud800"}', None)


def values_kept(value: Any, values: Any, **meta: Any) -> Any:
    parsed = parse(json.dumps({"json": value, "meta": {"values": values, **meta}}).encode())
    return None if parsed.meta is None else json.loads(parsed.meta)["values"]


@pytest.mark.parametrize(
    ("value", "values", "kept"),
    [
        ("/a(/g", ["regexp"], None),
        (["/a/", WHEN], {"0": ["regexp"], "1": ["Date"]}, {"1": ["Date"]}),
        ([["/a/"]], {"0": ["set", {"0": ["regexp"]}]}, {"0": ["set"]}),
        ("http://256.256.256.256/", ["URL"], None),
        ("https://a b", ["URL"], None),
        ("https://a.example:99999", ["URL"], None),
        ("https://xn--a.xn--b", ["URL"], None),
        ("http://xn--a.com", ["URL"], None),
        ("http://a.XN--a.example/x", ["URL"], None),
        ("data:text/plain,x", ["URL"], None),
    ],
)
def test_an_annotation_that_cannot_be_checked_is_dropped(value: Any, values: Any, kept: Any) -> None:
    assert values_kept(value, values) == kept


@pytest.mark.parametrize(
    ("value", "values", "kept"),
    [
        ({"report.pdf": WHEN, "at": WHEN}, {"report.pdf": ["Date"], "at": ["Date"]}, {"at": ["Date"]}),
        ({"f": {"report.pdf": WHEN}}, {"f.report.pdf": ["Date"]}, None),
        ({"a.b": {"c.d": WHEN}}, {r"a\.b.c.d": ["Date"]}, None),
        ({r"e\.f": [["k", ["1"]]]}, {r"e\.f": ["map", {"0.1": ["set", {"0": ["bigint"]}]}]}, None),
        ({"x\\": {"y": WHEN}}, {r"x\.y": ["Date"]}, None),
        ([1], {"1": ["undefined"]}, None),
        ([1], {"00": ["undefined"]}, None),
        ([1], {"length": ["undefined"]}, None),
        ({"a": 1}, {"a.b": ["undefined"]}, None),
        ([WHEN], {"": ["Date"]}, None),
        ([WHEN], ["set", {"0": ["Date"], "7": ["Date"]}], ["set", {"0": ["Date"]}]),
    ],
)
def test_an_annotation_that_leads_nowhere_is_dropped(value: Any, values: Any, kept: Any) -> None:
    """superjson does not escape dots in the key of a leaf, and its own reader ignores the annotation."""
    assert values_kept(value, values) == kept


@pytest.mark.parametrize(
    ("value", "values", "kept"),
    [
        ({"a.b": "1", "a": {"b": "x"}}, {"a.b": ["bigint"]}, None),
        ({"n": {"a.b": "1", "a": ["x"]}, "c": "1"}, {"n.a.b": ["bigint"], "c": ["bigint"]}, {"c": ["bigint"]}),
        ({"a.0": ["1"], "a": [["x"]]}, {"a.0": ["set", {"0": ["bigint"]}]}, None),
        ({r"a\.b": WHEN, "a.b": 1}, {r"a\.b": ["Date"]}, None),
        ({"a.b": {"c": WHEN}, "a": {"b": {"c": 1}}}, {r"a\.b.c": ["Date"]}, {r"a\.b.c": ["Date"]}),
    ],
)
def test_an_ambiguous_annotation_is_dropped(value: Any, values: Any, kept: Any) -> None:
    """`a.b` can be a key or a path. If a value has both, the annotation can mean either."""
    assert values_kept(value, values) == kept


def test_a_buffer_becomes_a_uint8array() -> None:
    assert values_kept({"b": [104, 105]}, {"b": [["custom", "buffer"]]}) == {"b": [["typed-array", "Uint8Array"]]}


def test_equal_references_become_copies() -> None:
    assert values_kept({"x": {"s": WHEN}}, {"x.s": ["Date"]}, referentialEqualities={"x": ["y"]}, v=1) == {
        "x.s": ["Date"]
    }


@pytest.mark.parametrize("tree", [None, {}, [], False, 0, "", {"a": None}, {"a": {}}])
def test_an_empty_annotation_is_omitted(tree: Any) -> None:
    assert values_kept({"a": 1}, tree) is None


@pytest.mark.parametrize(
    ("value", "values", "message"),
    [
        (1, ["Date"], "annotation of the payload does not fit: 'Date'"),
        ({"a": {"toString": 1}}, {"a": ["Date"]}, "annotation of 'a' does not fit: 'Date'"),
        ({"a": {"toString": 1}}, {"a": ["number"]}, "does not fit: 'number'"),
        ("1e5", ["number"], "does not fit: 'number'"),
        ("12x", ["bigint"], "does not fit: 'bigint'"),
        ("1" * (MAX_DIGITS + 1), ["bigint"], "does not fit: 'bigint'"),
        (7, ["URL"], "does not fit: 'URL'"),
        ({"message": {"toString": 1}}, ["Error"], "does not fit: 'Error'"),
        ({"__proto__": {"message": {}}}, ["Error"], "does not fit: 'Error'"),
        ("x", ["Error"], "does not fit: 'Error'"),
        ({"0": 1}, ["set"], "does not fit: 'set'"),
        ([1], ["map"], "does not fit: 'map'"),
        ([{}], [["typed-array", "Uint8Array"]], "does not fit"),
        ([1], [["typed-array", "Array"]], "does not fit"),
        ([True], [["typed-array", "Uint8Array"]], "does not fit"),
        ({}, [["class", "User"]], r"""does not fit: '\["class","User"\]'"""),
        ("s", [["symbol", "s"]], "does not fit"),
        ([1], [["custom", "other"]], "does not fit"),
        (1, ["nope"], "does not fit: 'nope'"),
        (1, [None], "does not fit: 'null'"),
        ([[1, 2]], ["map", {"0": ["undefined"]}], "a whole pair of the map at the payload"),
        ({"message": "m"}, ["Error", {"message": ["undefined"]}], "has others inside: 'Error'"),
        ([WHEN], {"0": ["Date", {"x": ["Date"]}]}, "has others inside: 'Date'"),
        ({"a": 1}, {"__proto__.x": ["undefined"]}, "annotates '__proto__', which is not allowed"),
        ({"a": 1}, {"nowhere.__proto__": ["undefined"]}, "annotates '__proto__', which is not allowed"),
        ({"constructor": 1}, {"constructor": ["undefined"]}, "'constructor', which is not allowed"),
        ({"a": {"b": WHEN}}, {"a": {"b": ["Date"]}, "a.b": ["Date"]}, r"annotates 'a\.b' twice"),
        (
            {"a": [WHEN]},
            {"a": ["set"], "a.0": ["Date"]},
            r"annotates 'a\.0' within a value that it annotates elsewhere",
        ),
        ([1], ["set", [1]], "annotation of the payload is malformed"),
        ([1], ["set", {}, 1], "annotation of the payload is malformed"),
        ([1], "set", "annotation of the payload is malformed"),
    ],
)
def test_an_annotation_that_does_not_fit_is_rejected(value: Any, values: Any, message: str) -> None:
    """A client throws when it reads one, which ends its run feed."""
    with pytest.raises(UsageError, match=message):
        values_kept(value, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "not superjson: Expected `object`, got `array`"),
        ('"text"', "not superjson: Expected `object`, got `str`"),
        ("{}", 'not superjson: "json" is missing'),
        ('{"meta":{}}', '"json" is missing'),
        ('{"json":1,"meta":[]}', "meta is not an object"),
        ('{"json":' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_superjson_is_rejected(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text.encode())


def test_the_nesting_of_annotations_is_limited() -> None:
    value: Any = WHEN
    tree: Any = ["Date"]
    for _ in range(48):
        value, tree = [value], ["set", {"0": tree}]
    assert values_kept(value, tree) == tree
    for levels, message in ((20, "superjson's meta is nested too deeply"), (5000, "^JSON is nested too deeply")):
        for _ in range(levels):
            value, tree = [value], {"0": tree}
        text = f'{{"json":{_nested(value)},"meta":{{"values":{_nested(tree)}}}}}'
        with pytest.raises(UsageError, match=message):
            parse(text.encode())


def _nested(value: Any) -> str:
    """Encode without recursion."""
    text, end = "", ""
    while isinstance(value, list | dict) and value:
        if isinstance(value, dict):
            ((key, value),) = value.items()
            text, end = f'{text}{{"{key}":', "}" + end
        elif len(value) == 2:
            text, end, value = f'{text}["{value[0]}",', "]" + end, value[1]
        else:
            text, end, value = f"{text}[", "]" + end, value[0]
    return text + json.dumps(value) + end


def test_many_long_annotations_take_linear_time() -> None:
    """A payload of 1 MB with a long path to each of its annotations took a minute."""
    depth, width = 90, 1000
    inside = ",".join(['""'] * width)
    way = ".".join(["0"] * depth)
    values = ",".join(f'"{way}.{index}":["undefined"]' for index in range(width))
    parsed = parse(f'{{"json":{"[" * depth}[{inside}]{"]" * depth},"meta":{{"values":{{{values}}}}}}}'.encode())
    assert parsed.meta is not None and len(json.loads(parsed.meta)["values"]) == width


def test_annotations_below_one_long_path_share_it() -> None:
    """Each of them once copied the whole path: one request of 3 MB held the event loop for ten seconds."""
    depth, width = 90, 10_000
    tree = {".".join(["0"] * depth): {str(index): ["undefined"] for index in range(width)}}
    value: Any = [0] * width
    for _ in range(depth):
        value = [value]
    assert values_kept(value, tree) == tree


def test_a_payload_as_deep_as_allowed_is_accepted() -> None:
    deep = "[" * 100 + "]" * 100
    assert parse(f'{{"json":{deep}}}'.encode()).json == deep.encode()
    with pytest.raises(LimitExceeded, match="JSON is nested too deeply: 101 levels, limit 100"):
        parse(f'{{"json":[{deep}]}}'.encode())


def test_the_length_of_superjson_is_limited() -> None:
    with pytest.raises(LimitExceeded, match=r"superjson is 262155 bytes, limit 262144; send plain JSON") as caught:
        parse(b'{"json":"%b"}' % (b"x" * 262_144))
    assert caught.value.status == 413
