"""What is published of objects. The classes here have the structure of those of real clients; `tests/models` uses the
real ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
import pydantic
import pytest

from asgi_realtime.core.chunks import decode, encode_value
from asgi_realtime.core.errors import EncodingError
from asgi_realtime.core.private_attributes import may_have_private


def published(value: object) -> Any:
    return decode(encode_value(value))


def of_package(package: str, cls: type) -> type:
    """The class as if it were defined in a package."""
    cls.__module__ = package
    return cls


# Models of API clients


class Generated(pydantic.BaseModel):
    """The base class of a client that Stainless generates."""

    model_config = {"extra": "allow"}

    @classmethod
    def construct(cls, _fields_set: set[str] | None = None, **values: Any) -> Any:
        return cls.model_construct(_fields_set, **values)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


Generated.construct.__func__.__module__ = "some_client._models"  # type: ignore[attr-defined]


class Chunk(Generated):
    id: str
    finish_reason: str | None = None
    usage: int | None = None
    stop: str | None = pydantic.Field(None, alias="stopReason")


def test_models_of_generated_clients_are_encoded_as_the_api_sent_them() -> None:
    sent = {"id": "1", "finish_reason": None, "stopReason": "end", "new": [1]}
    assert published(Chunk.model_validate(sent)) == sent
    assert published({"chunks": [Chunk.model_validate(sent)]}) == {"chunks": [sent]}


class TextEvent(Generated):
    type: str
    text: str
    snapshot: str
    parsed: Any = None


class ArgumentsEvent(Generated):
    type: str
    arguments: str
    parsed_arguments: Any
    arguments_delta: str


class Response(Generated):
    id: str
    instructions: Any = None
    prompt: Any = None
    tools: list[Any] = []
    output: list[Any] = []


class ResponseEvent(Generated):
    type: str
    response: Response


def test_the_text_so_far_is_omitted_from_the_events_of_helper_streams() -> None:
    event = TextEvent(type="text", text="c", snapshot="abc", parsed={"a": 1})
    assert published(event) == {"type": "text", "text": "c"}
    arguments = ArgumentsEvent(type="arguments", arguments="{}", parsed_arguments={}, arguments_delta="}")
    assert published(arguments) == {"type": "arguments", "arguments_delta": "}"}


def test_a_response_is_published_without_the_prompt_and_tools_that_it_repeats() -> None:
    response = Response(id="r", instructions="secret", prompt={"id": "p"}, tools=[{"headers": "secret"}], output=[1])
    assert published(response) == {"id": "r", "output": [1]}
    event = ResponseEvent(type="response.created", response=response)
    assert published(event) == {"type": "response.created", "response": {"id": "r", "output": [1]}}


class GoogleResponse(pydantic.BaseModel):
    sdk_http_response: Any = None
    response_id: str | None = pydantic.Field(None, alias="responseId")
    model_version: str | None = pydantic.Field(None, alias="modelVersion")
    automatic_function_calling_history: list[Any] | None = None


def test_upstream_headers_and_histories_of_a_client_are_omitted() -> None:
    cls = of_package("google.genai.types", GoogleResponse)
    value = cls(responseId="r", sdk_http_response={"headers": "secret"}, automatic_function_calling_history=["secret"])
    assert published(value) == {"responseId": "r"}


class Part(pydantic.BaseModel):
    type: str = "text-delta"
    delta: str
    provider: Any = pydantic.Field(None, alias="providerMetadata")


def test_parts_of_chat_protocols_are_encoded_without_nulls_but_with_defaults() -> None:
    cls = of_package("pydantic_ai.ui.vercel_ai.response_types", Part)
    assert published(cls(delta="x")) == {"type": "text-delta", "delta": "x"}


class OwnModel(pydantic.BaseModel):
    text: str
    snapshot: str | None = None
    instructions: str = "stir"
    _private: str = "secret"


def test_models_of_users_are_encoded_with_all_fields() -> None:
    assert published(OwnModel(text="x")) == {"text": "x", "snapshot": None, "instructions": "stir"}


@dataclass
class DictOutput(dict[str, Any]):
    text: str
    logprobs: Any = None

    def __post_init__(self) -> None:
        self.update(dataclasses.asdict(self))


def test_a_dataclass_that_is_a_dict_is_encoded_without_nulls() -> None:
    assert published(DictOutput("x")) == {"text": "x"}


# Private attributes


@dataclass
class State:
    text: str
    _secret: str = "secret"


@dataclass(slots=True)
class Outer:
    state: State
    states: list[State] = field(default_factory=list)
    _secret: str = "secret"


class Private(msgspec.Struct, rename="camel", tag="private"):
    some_text: str
    _secret: str = "secret"


class ModelWithState(pydantic.BaseModel):
    state: State
    outer: Outer = pydantic.Field(alias="theOuter")
    by_name: dict[str, tuple[State, ...]] = {}
    mongo_id: int = pydantic.Field(default=1, alias="_id")


class States(pydantic.RootModel[list[State]]): ...


MODEL_WITH_STATE = ModelWithState(state=State("_x"), theOuter=Outer(State("y")), by_name={"_z": (State("z"),)})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            {"a": MODEL_WITH_STATE},
            {
                "a": {
                    "state": {"text": "_x"},
                    "theOuter": {"state": {"text": "y"}, "states": []},
                    "by_name": {"_z": [{"text": "z"}]},
                    "_id": 1,
                }
            },
        ),
        (States([State("x\ud800")]), [{"text": "x\ud800"}]),
        (State("x"), {"text": "x"}),
        (Outer(State("x"), [State("y")]), {"state": {"text": "x"}, "states": [{"text": "y"}]}),
        ({"a": [State("x")]}, {"a": [{"text": "x"}]}),
        ([(State("x"), 1)], [[{"text": "x"}, 1]]),
        ({"_key": State("_x\ud800")}, {"_key": {"text": "_x\ud800"}}),
        ({None: State("x")}, {"null": {"text": "x"}}),
        (Private("x"), {"someText": "x"}),
        ({"_id": 1, "a": "_b"}, {"_id": 1, "a": "_b"}),
    ],
)
def test_private_attributes_are_never_published(value: object, expected: object) -> None:
    assert published(value) == expected


# Agents, prompts, histories


@dataclass
class FirstNode:
    user_prompt: str
    system_prompts: tuple[str, ...]


@pytest.mark.parametrize("wrap", [lambda node: {"a": [node]}, lambda node: [{"a": node}], lambda node: ({"a": node},)])
def test_a_prompt_inside_plain_values_is_rejected(wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(EncodingError, match="FirstNode carries prompts"):
        encode_value(wrap(FirstNode("hi", ("secret",))))


@dataclass
class Agent:
    instructions: str
    handoffs: list[Any]


@dataclass
class RunItemEvent:
    name: str
    item: Any
    type: str = "run_item_stream_event"


@dataclass
class ModelRequest:
    parts: list[Any]
    instructions: str | None = None
    kind: str = "request"


@dataclass
class RunResult:
    output: str

    def all_messages(self) -> list[Any]:
        return []

    new_messages = all_messages


@dataclass
class RunResultEvent:
    result: Any
    event_kind: str = "agent_run_result"


class SystemMessage(pydantic.BaseModel):
    content: str
    additional_kwargs: dict[str, Any] = {}
    response_metadata: dict[str, Any] = {}
    type: str = "system"


@pytest.mark.parametrize(
    "value",
    [
        Agent("secret", []),
        {"agent": Agent("secret", [object()])},
        {"the_agent": [Agent("secret", [])]},
        RunItemEvent("message", object()),
        ModelRequest(["secret"]),
        RunResult("x"),
        RunResultEvent("x"),
        [SystemMessage(content="secret")],
        {"event": "on_chat_model_start", "run_id": "1", "data": {"input": {"messages": ["secret"]}}},
    ],
)
def test_agents_prompts_and_histories_are_rejected_with_the_alternative(value: object) -> None:
    with pytest.raises(EncodingError, match="encode=") as caught:
        encode_value(value)
    assert "secret" not in str(caught.value)


def test_other_events_of_langchain_are_published() -> None:
    event = {"event": "on_chat_model_stream", "run_id": "1", "data": {"chunk": "x"}}
    assert published(event) == event


# numpy


class Scalar:
    """As a scalar or an array of numpy."""

    dtype = "float64"

    def __init__(self, value: Any) -> None:
        self.value = value

    def item(self) -> Any:
        return self.value

    def tolist(self) -> Any:
        return self.value


def test_scalars_and_arrays_of_numpy_are_encoded() -> None:
    value = {"loss": Scalar(0.5), "nan": Scalar(float("nan")), "all": Scalar([[1, 2], [3]]), Scalar(7): 1}
    assert published(value) == {"loss": 0.5, "nan": None, "all": [[1, 2], [3]], "7": 1}


class Plain(pydantic.BaseModel):
    kind: Literal["a", "b"] = "a"
    text: Annotated[str, "doc"] | None = None
    pairs: tuple[dict[str, int], ...] = ()
    inner: list[Plain] = []


class WithAny(pydantic.BaseModel):
    inner: list[dict[str, Any]] = []


class WithCallable(pydantic.BaseModel):
    inner: Callable[[int], str] | None = None


class WithExtra(pydantic.BaseModel, extra="allow"): ...


@pytest.mark.parametrize(
    ("model", "extra", "expected"),
    [
        (Plain, True, False),
        (WithAny, False, True),
        (WithCallable, False, True),
        (ModelWithState, False, True),
        (WithExtra, True, True),
        (WithExtra, False, False),
    ],
)
def test_only_models_that_can_contain_dataclasses_are_searched(model: Any, extra: bool, expected: bool) -> None:
    assert may_have_private(model, extra=extra) is expected
