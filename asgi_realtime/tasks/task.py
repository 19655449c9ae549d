"""A task: a function under an id, with its payload typed by its annotation.

Payloads and outputs always travel as JSON, also inside one process, so that a task sees the same everywhere.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import msgspec

from asgi_realtime.core.chunks import decode, encode_value
from asgi_realtime.errors import EncodingError, InvalidConfiguration, InvalidPayload, LimitExceeded, UsageError
from asgi_realtime.run import Run

P = ParamSpec("P")
R = TypeVar("R")

_ANY: Any = Any


class Task(Generic[P, R]):
    """A registered task. Calling it calls the plain function, without a run.

    `function` takes `()`, `(payload)`, `(payload, run)` or `(run: Run)`; anything else is refused with
    `InvalidConfiguration`.
    """

    def __init__(
        self, task_id: str, function: Callable[P, Any], *, max_duration_s: float | None, concurrency_limit: int
    ) -> None:
        self.id = task_id
        self.function = function
        self.max_duration_s = max_duration_s
        self.concurrency_limit = concurrency_limit
        self.is_async = inspect.iscoroutinefunction(function)
        self._parameters = _parameters(function)
        hints = _hints(function)
        self.payload_type = next((hints.get(name, _ANY) for name, run in self._parameters if not run), _ANY)
        self.output_type = hints.get("return", _ANY)
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    def __repr__(self) -> str:
        return f"<Task {self.id!r}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        return self.function(*args, **kwargs)

    @property
    def takes_payload(self) -> bool:
        return any(not run for _, run in self._parameters)

    def encode_payload(self, payload: Any, *, limit_bytes: int) -> bytes:
        """The payload as JSON that fits the annotation. Raises `InvalidPayload`, `LimitExceeded`."""
        try:
            data = encode_value(payload)
        except EncodingError as exc:
            raise InvalidPayload(f"the payload of task {self.id!r} has no JSON form: {exc}") from exc
        if len(data) > limit_bytes:
            raise LimitExceeded(
                f"the payload of task {self.id!r} is {len(data)} bytes, limit {limit_bytes}", status=413
            )
        self.decode_payload(data)
        return data

    def decode_payload(self, data: bytes) -> Any:
        """The payload as its annotation says. Raises `InvalidPayload`."""
        try:
            return decode_as(data, self.payload_type)
        except UsageError as exc:
            raise InvalidPayload(
                f"the payload of task {self.id!r} does not fit {_name(self.payload_type)}: {exc}"
            ) from exc

    def decode_output(self, data: bytes) -> Any:
        """The output as the annotation of the return value says, as far as JSON can tell; else as plain JSON."""
        try:
            return decode_as(data, self.output_type)
        except UsageError:
            return decode(data)

    def arguments(self, payload: Any, run: Run) -> list[Any]:
        """What to call the function with."""
        return [run if is_run else payload for _, is_run in self._parameters]


def decode_as(data: bytes, annotation: Any) -> Any:
    """Decode JSON into a type: dataclass, msgspec, pydantic, TypedDict, or plain. Raises `UsageError`."""
    if annotation is _ANY or annotation is inspect.Parameter.empty or annotation is object:
        return decode(data)
    try:
        return msgspec.json.decode(data, type=annotation, dec_hook=_decode_foreign)
    except (msgspec.MsgspecError, ValueError, TypeError) as exc:
        raise UsageError(str(exc)) from exc


def _decode_foreign(annotation: type, value: Any) -> Any:
    """Types that msgspec does not know: pydantic models, told by their method."""
    validate = getattr(annotation, "model_validate", None)
    if validate is None:
        raise TypeError(f"{_name(annotation)} cannot be made from JSON")
    return validate(value)


def _name(annotation: Any) -> str:
    return getattr(annotation, "__name__", None) or str(annotation)


def _parameters(function: Callable[..., Any]) -> list[tuple[str, bool]]:
    """The function's parameters: name, and whether it takes the run."""
    hints = _hints(function)
    parameters: list[tuple[str, bool]] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            if parameter.default is parameter.empty or not parameters:
                parameters.append((parameter.name, hints.get(parameter.name) is Run))
        elif parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            parameters.append((f"*, {parameter.name}", False))
    if len(parameters) == 2 and not any(run for _, run in parameters) and not parameters[1][0].startswith("*"):
        parameters[1] = (parameters[1][0], True)
    shape = [run for _, run in parameters]
    if any(name.startswith("*") for name, _ in parameters) or shape not in ([], [False], [True], [False, True]):
        given = ", ".join(name for name, _ in parameters)
        raise InvalidConfiguration(
            f"a task takes (), (payload), (payload, run) or (run: Run); this one takes ({given})"
        )
    return parameters


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations, evaluated; also those that name what is local to an enclosing function."""
    target = inspect.unwrap(function)
    closure = inspect.getclosurevars(target).nonlocals if inspect.isfunction(target) else {}
    try:
        return typing.get_type_hints(target, localns=dict(closure))
    except NameError as exc:
        raise InvalidConfiguration(
            f"an annotation of {getattr(target, '__qualname__', target)!r} cannot be evaluated: {exc};"
            " define the type at module level"
        ) from exc
