"""A task: a function under an id, with its payload typed by its annotation.

Payloads and outputs always travel as JSON, also inside one process, so that a task sees the same everywhere.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import msgspec
import msgspec.inspect

from asgi_realtime.core.chunks import decode, encode_value
from asgi_realtime.core.errors import EncodingError, InvalidConfiguration, InvalidPayload, LimitExceeded, UsageError
from asgi_realtime.engine.run import Run

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
        plain = _plain_function(function)
        self.is_async = inspect.iscoroutinefunction(plain)
        hints = _hints(plain)
        self._parameters = _parameters(function, hints)
        self.payload_type = next((hints.get(name, _ANY) for name, run in self._parameters if not run), _ANY)
        self._decode_payload = decoder_of(self.payload_type)
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
        self.check_payload(data, limit_bytes=limit_bytes)
        return data

    def check_payload(self, data: bytes | None, *, limit_bytes: int) -> None:
        """Check JSON, or no payload at all, against the annotation. Raises `InvalidPayload`, `LimitExceeded`."""
        if data is not None and len(data) > limit_bytes:
            raise LimitExceeded(
                f"the payload of task {self.id!r} is {len(data)} bytes, limit {limit_bytes}", status=413
            )
        if data is not None or self.takes_payload:
            self.decode_payload(data or b"null")

    def decode_payload(self, data: bytes) -> Any:
        """The payload as its annotation says. Raises `InvalidPayload`."""
        try:
            return self._decode_payload(data)
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


TaskLike = Task[Any, Any] | str


def id_of(task: TaskLike) -> str:
    """The id of what names a task. Raises `UsageError`."""
    if isinstance(task, Task):
        return task.id
    if not isinstance(task, str):
        raise UsageError(f"{task!r} is not a task; allowed are what @realtime.task(id) gives, and that id")
    return task


def decode_as(data: bytes, annotation: Any) -> Any:
    """Decode JSON into a type: dataclass, msgspec, pydantic, TypedDict, or plain. Raises `UsageError`."""
    return decoder_of(annotation)(data)


def decoder_of(annotation: Any) -> Callable[[bytes], Any]:
    """What decodes JSON into a type. Raises `InvalidConfiguration` for a type that has no JSON form."""
    if annotation is _ANY or annotation is inspect.Parameter.empty or annotation is object:
        return decode
    read = _reader(annotation)

    def decode_typed(data: bytes) -> Any:
        try:
            return read(data)
        except RecursionError as exc:
            raise UsageError("JSON is nested too deeply") from exc
        except (msgspec.MsgspecError, ValueError, TypeError) as exc:
            raise UsageError(str(exc)) from exc

    return decode_typed


def _reader(annotation: Any) -> Callable[[bytes], Any]:
    try:
        if _is_foreign(annotation):
            raise TypeError(f"{_name(annotation)} cannot be made from JSON")
        return msgspec.json.Decoder(annotation, dec_hook=_decode_foreign).decode
    except TypeError as exc:
        adapter = _pydantic_adapter(annotation)
        if adapter is None:
            raise InvalidConfiguration(f"{_name(annotation)} is not a type for payloads or chunks: {exc}") from exc
        return adapter


def _is_foreign(annotation: Any) -> bool:
    """Whether msgspec would leave it to the hook, which knows pydantic models only."""
    known = msgspec.inspect.type_info(annotation)
    return isinstance(known, msgspec.inspect.CustomType) and not hasattr(annotation, "model_validate_json")


def _pydantic_adapter(annotation: Any) -> Callable[[bytes], Any] | None:
    """What pydantic knows and msgspec does not, such as a union of models."""
    try:
        import pydantic
    except ImportError:
        return None
    try:
        return pydantic.TypeAdapter(annotation).validate_json
    except pydantic.errors.PydanticUserError:
        return None


def _decode_foreign(annotation: Any, value: Any) -> Any:
    """Types that msgspec does not know: pydantic models, told by their method. From JSON, as strict models want it."""
    validate = getattr(annotation, "model_validate_json", None)
    if validate is None:
        raise TypeError(f"{_name(annotation)} cannot be made from JSON")
    return validate(encode_value(value))


def _name(annotation: Any) -> str:
    return getattr(annotation, "__name__", None) or str(annotation)


def _plain_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is behind decorators, `functools.partial` and objects with `__call__`. Raises `InvalidConfiguration`."""
    plain = inspect.unwrap(function)
    while isinstance(plain, functools.partial):
        plain = inspect.unwrap(plain.func)
    if not inspect.isroutine(plain):
        plain = inspect.unwrap(getattr(plain, "__call__", plain))  # noqa: B004 - a class's own, where it has one
    if not inspect.isroutine(plain) or isinstance(function, type):
        raise InvalidConfiguration(f"a task is a function; this is a {type(function).__name__}: {function!r}")
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise InvalidConfiguration(
            f"{plain.__qualname__!r} is a generator function, which cannot be a task: pipe what it gives inside of one"
        )
    return plain


def _parameters(function: Callable[..., Any], hints: dict[str, Any]) -> list[tuple[str, bool]]:
    """The function's parameters: name, and whether it takes the run."""
    parameters: list[tuple[str, bool]] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            if parameter.default is parameter.empty or not parameters:
                parameters.append((parameter.name, hints.get(parameter.name) is Run))
        elif parameter.kind is parameter.VAR_POSITIONAL:  # of a decorator without `functools.wraps`, as a rule
            parameters.append((f"*{parameter.name}", False))
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
    """The annotations, evaluated; also those that name what is local to an enclosing function and used inside."""
    try:
        return typing.get_type_hints(function, localns=_closure(function))
    except NameError as exc:
        raise InvalidConfiguration(
            f"an annotation of {getattr(function, '__qualname__', function)!r} cannot be evaluated: {exc};"
            " define the type at module level"
        ) from exc


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function uses of the functions around it, as far as it is there already."""
    plain = getattr(function, "__func__", function)
    if not inspect.isfunction(plain):
        return {}
    cells = zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=False)
    empty = types.CellType()  # such as that of the function itself while it is being decorated
    return {name: cell.cell_contents for name, cell in cells if cell != empty}
