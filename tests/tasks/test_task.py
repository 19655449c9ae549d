from __future__ import annotations

import builtins
import functools
import operator
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypedDict

import msgspec
import pydantic
import pytest

from asgi_realtime import (
    InvalidConfiguration,
    InvalidPayload,
    LimitExceeded,
    Limits,
    Realtime,
    Run,
    UsageError,
    current_run,
)
from asgi_realtime.core.chunks import decode
from asgi_realtime.tasks.decoding import decoder_of
from tests.inprocess import GUARD_S, make_realtime, stored


@dataclass
class Line:
    sku: str
    count: int = 1


@dataclass
class Order:
    number: int
    lines: list[Line]


class Point(msgspec.Struct):
    x: float
    y: float = 0.0


class Person(pydantic.BaseModel):
    name: str
    born: datetime | None = None


class StrictPerson(pydantic.BaseModel, strict=True):
    name: str
    born: datetime


class Cat(pydantic.BaseModel):
    lives: int


class Dog(pydantic.BaseModel):
    tricks: list[str]


class Prompt(TypedDict):
    text: str


async def takes_order(payload: Order, run: Run) -> Any:
    return payload


async def takes_point(payload: Point) -> Any:
    return payload


async def takes_person(payload: Person) -> Any:
    return payload


async def takes_strict_person(payload: StrictPerson) -> Any:
    return payload


async def takes_people(payload: list[Person]) -> Any:
    return payload


async def takes_pet(payload: Cat | Dog) -> Any:
    return payload


async def takes_prompt(payload: Prompt) -> Any:
    return payload


async def takes_dict(payload: dict[str, Any]) -> Any:
    return payload


async def takes_anything(payload: Any) -> Any:
    return payload


async def takes_object(payload: object) -> Any:
    return payload


async def takes_unannotated(payload) -> Any:  # type: ignore[no-untyped-def]
    return payload


BORN = datetime(2000, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("function", "payload", "decoded"),
    [
        (takes_order, {"number": 1, "lines": [{"sku": "a"}]}, Order(1, [Line("a")])),
        (takes_order, Order(1, [Line("a", 2)]), Order(1, [Line("a", 2)])),
        (takes_point, {"x": 1}, Point(1.0)),
        (takes_point, Point(1.5, 2.5), Point(1.5, 2.5)),
        (takes_person, {"name": "Ada", "born": "2000-01-02T00:00:00Z"}, Person(name="Ada", born=BORN)),
        (takes_person, Person(name="Ada", born=BORN), Person(name="Ada", born=BORN)),
        (takes_strict_person, StrictPerson(name="Ada", born=BORN), StrictPerson(name="Ada", born=BORN)),
        (takes_people, [{"name": "Ada"}], [Person(name="Ada")]),
        (takes_pet, {"tricks": ["sit"]}, Dog(tricks=["sit"])),
        (takes_pet, Cat(lives=9), Cat(lives=9)),
        (takes_prompt, {"text": "hi"}, {"text": "hi"}),
        (takes_dict, {"any": [1, None]}, {"any": [1, None]}),
        (takes_dict, Order(1, []), {"number": 1, "lines": []}),
        (takes_anything, [1, "a", None], [1, "a", None]),
        (takes_object, {"a": 1}, {"a": 1}),
        (takes_unannotated, (1, 2), [1, 2]),
        (takes_anything, None, None),
    ],
)
@pytest.mark.anyio
async def test_the_payload_is_always_decoded_from_json_into_its_annotation(
    function: Callable[..., Awaitable[Any]], payload: Any, decoded: Any
) -> None:
    realtime = make_realtime()
    seen: list[Any] = []

    @functools.wraps(function)
    async def spy(*args: Any) -> None:
        seen.append(args[0])

    task = realtime.task("t")(spy)
    async with realtime:
        await (await realtime.trigger(task, payload)).result(timeout=GUARD_S)
    assert seen == [decoded]
    assert type(seen[0]) is type(decoded)
    assert seen[0] is not payload or payload is None


@pytest.mark.parametrize(
    ("function", "payload", "message"),
    [
        (takes_order, {"number": "one", "lines": []}, "Expected `int`, got `str` - at `$.number`"),
        (takes_order, {"number": 1}, "missing required field `lines`"),
        (takes_order, None, "Expected `object`, got `null`"),
        (takes_point, {"x": None}, "$.x"),
        (takes_person, {"name": 1}, "name"),
        (takes_pet, {"wings": 2}, "does not fit"),
        (takes_prompt, {}, "text"),
        (takes_dict, [1], "Expected `object`, got `array`"),
        (takes_anything, b"raw", "cannot be encoded as JSON"),
        (takes_anything, {"a": object()}, "at ['a']: object has no JSON form"),
    ],
)
@pytest.mark.anyio
async def test_a_payload_that_does_not_match_is_rejected_before_a_run_exists(
    function: Callable[..., Awaitable[Any]], payload: Any, message: str
) -> None:
    realtime = make_realtime()
    task = realtime.task("t")(function)
    async with realtime:
        with pytest.raises(InvalidPayload) as caught:
            await realtime.trigger(task, payload, tags="x")
        assert message in str(caught.value)
        assert "'t'" in str(caught.value)
        assert caught.value.status == 422
        assert (await realtime.broker.changes("tag:x")).items == []


@pytest.mark.anyio
async def test_a_payload_over_the_limit_is_413_and_names_the_limit() -> None:
    realtime = make_realtime(limits=Limits(payload_bytes=10))
    realtime.task("t")(takes_anything)
    async with realtime:
        await realtime.trigger("t", "x" * 8)
        with pytest.raises(LimitExceeded, match="is 11 bytes, limit 10") as caught:
            await realtime.trigger("t", "x" * 9)
    assert caught.value.status == 413


async def nothing() -> str:
    return "nothing"


async def only_run(run: Run) -> str:
    return run.id


async def both(payload: int, run: Run) -> list[Any]:
    return [payload, run.id]


async def second_is_the_run(payload, run):  # type: ignore[no-untyped-def]
    return [payload, run.id]


async def maybe_run(payload: int, run: Run | None) -> list[Any]:
    return [payload, run and run.id]


async def payload_called_run(run: int) -> int:
    return run


async def untyped_second(payload: int, context: Any) -> list[Any]:
    return [payload, context.id]


async def with_more_defaults(payload: int, run: Run, factor: int = 2, *, extra: int = 0) -> list[Any]:
    return [payload * factor, run.id]


async def default_payload(payload: int = 5) -> int:
    return payload


class Callables:
    async def method(self, payload: int, run: Run) -> list[Any]:
        return [payload, run.id]

    async def __call__(self, payload: int) -> int:
        return payload


def fed(x: int, payload: int) -> int:
    return x * payload


@pytest.mark.parametrize(
    ("function", "payload", "output"),
    [
        (nothing, None, "nothing"),
        (only_run, None, "RUN"),
        (both, 1, [1, "RUN"]),
        (second_is_the_run, 1, [1, "RUN"]),
        (maybe_run, 1, [1, "RUN"]),
        (payload_called_run, 1, 1),
        (untyped_second, 1, [1, "RUN"]),
        (with_more_defaults, 2, [4, "RUN"]),
        (default_payload, 7, 7),
        (Callables().method, 3, [3, "RUN"]),
        (Callables(), 3, 3),
        (functools.partial(fed, 3), 4, 12),
    ],
)
@pytest.mark.anyio
async def test_a_task_takes_nothing_a_payload_a_run_or_both(
    function: Callable[..., Any], payload: Any, output: Any
) -> None:
    realtime = make_realtime()
    task: Any = realtime.task("t")(function)
    async with realtime:
        handle = await realtime.trigger(task, payload)
        expected = [handle.id if part == "RUN" else part for part in output] if isinstance(output, list) else output
        assert await handle.result(timeout=GUARD_S) == (handle.id if output == "RUN" else expected)


async def run_first(run: Run, payload: int) -> None: ...


async def three(payload: int, run: Run, third: int) -> None: ...


async def keyword_only(payload: int, *, needed: int) -> None: ...


async def anything_goes(*args: Any, **kwargs: Any) -> None: ...


async def two_runs(one: Run, two: Run) -> None: ...


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (run_first, "(run, payload)"),
        (three, "(payload, run, third)"),
        (keyword_only, "(payload, *, needed)"),
        (anything_goes, "(*args)"),
        (two_runs, "(one, two)"),
    ],
)
def test_other_signatures_are_rejected_with_the_allowed_ones(function: Callable[..., Any], given: str) -> None:
    register = make_realtime().task("t")
    with pytest.raises(InvalidConfiguration) as caught:
        register(function)
    assert str(caught.value).startswith("a task takes (), (payload), (payload, run) or (run: Run)")
    assert given in str(caught.value)


async def run_alone(run):  # type: ignore[no-untyped-def]
    return run


async def run_before_payload(run, payload):  # type: ignore[no-untyped-def]
    return run


async def two_payloads(payload: int, factor: int) -> int:
    return payload * factor


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (run_alone, r"called run, .* would receive the payload; write \(run: Run\) for the run, or call it payload"),
        (run_before_payload, r"called run, .* would receive the payload"),
        (two_payloads, "the second parameter of the task, factor: int, would receive the run; annotate it with Run"),
    ],
)
def test_a_signature_that_would_receive_something_else_is_rejected(function: Callable[..., Any], words: str) -> None:
    """`async def t(run)` was called with the payload, and failed at `run.metadata` in its first run."""
    with pytest.raises(InvalidConfiguration, match=words):
        make_realtime().task("t")(function)


def test_an_async_generator_function_is_rejected() -> None:
    async def chunks(payload: int) -> Any:
        yield payload

    with pytest.raises(InvalidConfiguration, match="generator"):
        make_realtime().task("t")(chunks)


def test_a_generator_function_is_rejected() -> None:
    def chunks(payload: int) -> Any:
        yield payload

    with pytest.raises(InvalidConfiguration, match="generator"):
        make_realtime().task("t")(chunks)


def test_an_object_that_is_not_a_function_is_rejected() -> None:
    with pytest.raises(InvalidConfiguration, match="int"):
        make_realtime().task("t")(3)  # type: ignore[call-overload]


def test_a_type_that_json_cannot_express_is_rejected_at_registration() -> None:
    async def impossible(payload: Realtime) -> None: ...

    with pytest.raises(InvalidConfiguration, match="Realtime"):
        make_realtime().task("t")(impossible)


@pytest.mark.anyio
async def test_a_type_that_is_local_to_an_enclosing_function_is_found() -> None:
    @dataclass
    class Local:
        n: int

    realtime = make_realtime()

    @realtime.task("t")
    async def local(payload: Local) -> int:
        assert isinstance(payload, Local)
        return payload.n

    async with realtime:
        assert await (await realtime.trigger(local, {"n": 3})).result(timeout=GUARD_S) == 3


def test_an_annotation_that_cannot_be_evaluated_is_rejected_with_the_fix() -> None:
    @dataclass
    class Hidden:
        n: int

    async def hidden(payload: Hidden) -> None: ...

    with pytest.raises(InvalidConfiguration, match="'Hidden' is not defined; define the type at module level"):
        make_realtime().task("t")(hidden)


@pytest.mark.anyio
async def test_a_local_task_can_refer_to_itself_and_to_later_tasks() -> None:
    """Their cells are empty while the decorator runs: registering raised `ValueError: Cell is empty`."""
    realtime = make_realtime()

    @realtime.task("first")
    async def first(payload: int) -> int:
        if payload:
            return await (await realtime.trigger(first, payload - 1)).result()
        return await (await realtime.trigger(second)).result()

    @realtime.task("second")
    async def second() -> int:
        return 42

    async with realtime:
        assert await (await realtime.trigger(first, 2)).result(timeout=GUARD_S) == 42


@pytest.mark.anyio
async def test_the_payload_of_a_run_has_the_type_that_the_task_declares() -> None:
    realtime = make_realtime()
    seen: list[object] = []

    @realtime.task("only_run")
    async def only_run(run: Run[Order] | None) -> None:
        assert run is not None
        seen.append(run.payload)

    @realtime.task("both")
    async def both(payload: Order, run: Run[Order]) -> None:
        seen.append((payload, current_run().payload))

    @realtime.task("none")
    async def none(run: Run) -> None:
        seen.append(run.payload)

    order: dict[str, Any] = {"number": 1, "lines": []}
    async with realtime:
        for task in (only_run, both, none):
            await (await realtime.trigger(task, order)).result()
        with pytest.raises(InvalidPayload, match="does not fit Order"):
            await realtime.trigger(only_run)
    assert seen == [Order(1, []), (Order(1, []), Order(1, [])), order]


def test_a_task_declares_one_type_of_its_payload() -> None:
    async def both(payload: Order, run: Run[Line]) -> None: ...

    with pytest.raises(InvalidConfiguration, match=r"two types of its payload, Order and Run\[Line\]"):
        make_realtime().task("both")(both)


@pytest.mark.anyio
async def test_a_task_can_be_called_as_the_plain_function() -> None:
    realtime = make_realtime()

    @realtime.task("async")
    async def double(payload: int) -> int:
        """Twice."""
        return payload * 2

    @realtime.task("sync")
    def triple(payload: int) -> int:
        return payload * 3

    assert await double(4) == 8
    assert triple(payload=4) == 12
    assert double.id == "async"
    assert repr(double) == "<Task 'async'>"
    assert double.__doc__ == "Twice."
    assert realtime.engine.supervisor is None


async def gives_order(payload: int) -> Order:
    return Order(payload, [Line("a")])


async def gives_optional_person(payload: str | None) -> Person | None:
    return None if payload is None else Person(name=payload)


async def gives_something_else(payload: int) -> Order:
    return payload  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("function", "payload", "output"),
    [
        (gives_order, 3, Order(3, [Line("a")])),
        (gives_optional_person, None, None),
        (gives_optional_person, "Ada", Person(name="Ada")),
        (gives_something_else, 4, 4),
    ],
)
@pytest.mark.anyio
async def test_a_result_has_the_type_of_the_return_annotation_if_it_matches(
    function: Callable[..., Awaitable[Any]], payload: Any, output: Any
) -> None:
    realtime = make_realtime()
    task = realtime.task("t")(function)
    async with realtime:
        handle = await realtime.trigger(task, payload)
        assert await handle.result(timeout=GUARD_S) == output
        record = await stored(realtime, handle)
        assert record.output == decode(record.output_json or b"")


def test_ids_must_differ() -> None:
    realtime = make_realtime()
    realtime.task("t")(nothing)
    with pytest.raises(InvalidConfiguration, match="a task 't' is registered already; ids must differ"):
        realtime.task("t")(both)


@pytest.mark.anyio
@pytest.mark.parametrize("where", [(sys, "ps1"), (builtins, "__IPYTHON__")], ids=["python", "ipython"])
async def test_a_task_can_be_registered_again_in_an_interactive_session(
    monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str]
) -> None:
    """Executing a notebook cell a second time raised `InvalidConfiguration`."""
    monkeypatch.setattr(*where, "", raising=False)
    realtime = make_realtime()

    @realtime.task("t")
    async def old() -> str:
        return "old"

    @realtime.task("t")
    async def new() -> str:
        return "new"

    async with realtime:
        for task in (old, new, "t"):
            assert await (await realtime.trigger(task)).result(timeout=GUARD_S) == "new"


@pytest.mark.parametrize(
    ("task_id", "error"),
    [("", UsageError), ("a/b", UsageError), ("x" * 129, LimitExceeded), (3, UsageError), ("..", UsageError)],
)
def test_a_task_id_must_be_usable_in_a_path(task_id: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="task id"):
        make_realtime().task(task_id)(nothing)


def test_a_decorator_without_an_id_shows_the_correct_form() -> None:
    with pytest.raises(InvalidConfiguration, match=r'@realtime\.task\("nothing"\)'):
        make_realtime().task(nothing)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", [nothing, None, 3, b"t"])
@pytest.mark.anyio
async def test_a_value_that_is_not_a_task_is_rejected(task: Any) -> None:
    async with make_realtime() as realtime:
        for call in (realtime.trigger(task), realtime.batch_trigger([(task, None)])):
            with pytest.raises(
                UsageError, match=r"is not a task; pass a function decorated with @realtime\.task\(id\)"
            ):
                await call
        for mint in (realtime.create_trigger_public_token, realtime.create_batch_trigger_public_token):
            with pytest.raises(UsageError, match=r"is not a task; pass a function decorated with"):
                mint(task)


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "2"])
def test_a_concurrency_limit_is_a_positive_integer(limit: Any) -> None:
    with pytest.raises(InvalidConfiguration, match="concurrency_limit is .*; it must be 1 or more"):
        make_realtime().task("t", concurrency_limit=limit)(nothing)


def test_max_duration_is_a_span() -> None:
    realtime = make_realtime()
    assert realtime.task("a", max_duration="15m")(nothing).max_duration_s == 900
    with pytest.raises(UsageError, match="max_duration is 'soon'"):
        realtime.task("b", max_duration="soon")(nothing)


def test_decoding_rejects_invalid_json() -> None:
    with pytest.raises(UsageError):
        decoder_of(Order)(b"{")
    with pytest.raises(UsageError):
        decoder_of(Any)(b"{")


class Unknown:
    """A class that JSON cannot express."""


async def takes_unknowns(payload: list[Unknown]) -> None: ...


def test_a_nested_type_that_json_cannot_express_is_rejected_with_the_payload() -> None:
    task = make_realtime().task("t")(takes_unknowns)
    assert task.encode_payload([], limit_bytes=100) == b"[]"
    with pytest.raises(InvalidPayload, match="Unknown cannot be decoded from JSON"):
        task.encode_payload([1], limit_bytes=100)


class Tree(msgspec.Struct):
    child: Tree | None = None


async def takes_tree(payload: Tree) -> None: ...


def test_a_payload_that_is_nested_too_deeply_is_rejected() -> None:
    task = make_realtime().task("t")(takes_tree)
    with pytest.raises(InvalidPayload, match="nested too deeply"):
        task.decode_payload(b'{"child":' * 100_000 + b"null" + b"}" * 100_000)


def test_without_pydantic_its_types_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(InvalidConfiguration, match="cannot be the type of a payload or chunk"):
        make_realtime().task("t")(takes_pet)


def test_a_builtin_has_no_closure() -> None:
    assert make_realtime().task("t")(operator.neg).payload_type is Any


def test_valid_json_is_checked_only_against_an_annotation(monkeypatch: pytest.MonkeyPatch) -> None:
    realtime, checked = make_realtime(), []

    @realtime.task("plain")
    async def plain(payload: Any) -> None: ...

    @realtime.task("typed")
    async def typed(payload: int) -> None: ...

    monkeypatch.setattr(type(plain), "decode_payload", lambda task, _: checked.append(task.id))
    for task in (plain, typed):
        task.check_payload(b"1", limit_bytes=10, is_valid=True)
    assert checked == ["typed"]
