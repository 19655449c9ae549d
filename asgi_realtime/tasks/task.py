"""A task: a function with an id. Its annotations are the types of the payload and the output.

Payloads and outputs are always encoded as JSON, even within one process, so a task receives the same values whichever
process executes it.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

from asgi_realtime.core.chunks import decode, encode_value
from asgi_realtime.core.errors import EncodingError, InvalidConfiguration, InvalidPayload, LimitExceeded, UsageError
from asgi_realtime.engine.run import Run
from asgi_realtime.tasks.decoding import decoder_of, type_name

P = ParamSpec("P")
R = TypeVar("R")


class Parameter(NamedTuple):
    """A parameter of a task's function."""

    name: str
    is_run: bool
    """It receives the `Run`; otherwise the payload."""


class Task(Generic[P, R]):
    """A registered task. Calling it calls the plain function, without a run.

    `function` takes `()`, `(payload)`, `(payload, run)` or `(run: Run)`. Raises `InvalidConfiguration` for any other
    signature.
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
        payload = next((parameter for parameter in self._parameters if not parameter.is_run), None)
        self.takes_payload = payload is not None
        self.payload_type: Any = Any if payload is None else hints.get(payload.name, Any)
        self._decode_payload = decoder_of(self.payload_type)
        self.output_type = hints.get("return", Any)
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    def __repr__(self) -> str:
        return f"<Task {self.id!r}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        return self.function(*args, **kwargs)

    def encode_payload(self, payload: Any, *, limit_bytes: int) -> bytes:
        """Encode the payload and check it against the annotation. Raises `InvalidPayload`, `LimitExceeded`."""
        try:
            data = encode_value(payload)
        except EncodingError as exc:
            raise InvalidPayload(f"the payload of task {self.id!r} cannot be encoded as JSON: {exc}") from exc
        self.check_payload(data, limit_bytes=limit_bytes)
        return data

    def check_payload(self, data: bytes | None, *, limit_bytes: int) -> None:
        """Check JSON, or a missing payload, against the annotation. Raises `InvalidPayload`, `LimitExceeded`."""
        if data is not None and len(data) > limit_bytes:
            raise LimitExceeded(
                f"the payload of task {self.id!r} is {len(data)} bytes, limit {limit_bytes}", status=413
            )
        if data is not None or self.takes_payload:
            self.decode_payload(data or b"null")

    def decode_payload(self, data: bytes) -> Any:
        """Decode the payload into its annotation. Raises `InvalidPayload`."""
        try:
            return self._decode_payload(data)
        except UsageError as exc:
            raise InvalidPayload(
                f"the payload of task {self.id!r} does not fit {type_name(self.payload_type)}: {exc}"
            ) from exc

    def decode_output(self, data: bytes) -> Any:
        """Decode the output into the return annotation, or as plain JSON if it does not match."""
        try:
            return self._output_decoder(data)
        except UsageError:
            return decode(data)

    @cached_property
    def _output_decoder(self) -> Callable[[bytes], Any]:
        try:
            return decoder_of(self.output_type)
        except InvalidConfiguration:  # the annotation is for readers of the code; an output need not match it
            return decode

    def arguments(self, payload: Any, run: Run) -> list[Any]:
        """The arguments of the function."""
        return [run if parameter.is_run else payload for parameter in self._parameters]


TaskLike = Task[Any, Any] | str


def id_of(task: TaskLike) -> str:
    """The id of a task. Raises `UsageError` for a value that does not name a task."""
    if isinstance(task, Task):
        return task.id
    if not isinstance(task, str):
        raise UsageError(f"{task!r} is not a task; pass a function decorated with @realtime.task(id), or that id")
    return task


def _plain_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Unwrap decorators, `functools.partial` and objects with `__call__`. Raises `InvalidConfiguration`."""
    plain = inspect.unwrap(function)
    while isinstance(plain, functools.partial):
        plain = inspect.unwrap(plain.func)
    if not inspect.isroutine(plain):
        plain = inspect.unwrap(getattr(plain, "__call__", plain))  # noqa: B004 - to unwrap it, not to test for it
    if not inspect.isroutine(plain) or isinstance(function, type):
        raise InvalidConfiguration(f"a task is a function; this is a {type(function).__name__}: {function!r}")
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise InvalidConfiguration(
            f"{plain.__qualname__!r} is a generator function, which cannot be a task; pipe its items from inside one"
        )
    return plain


def _parameters(function: Callable[..., Any], hints: dict[str, Any]) -> list[Parameter]:
    """The parameters of a task's function. Raises `InvalidConfiguration` if a task cannot have them.

    The first one counts even if it has a default; later ones with a default do not. Of two parameters the second
    receives the run even without an annotation.
    """
    parameters = [
        Parameter(name, hints.get(name) is Run) for name in _required(inspect.signature(function).parameters.values())
    ]
    names = [parameter.name for parameter in parameters]
    if len(parameters) == 2 and not any(parameter.is_run for parameter in parameters):
        parameters[1] = Parameter(names[1], is_run=True)
    shape = [parameter.is_run for parameter in parameters]
    if any(name.startswith("*") for name in names) or shape not in ([], [False], [True], [False, True]):
        raise InvalidConfiguration(
            f"a task takes (), (payload), (payload, run) or (run: Run); this one takes ({', '.join(names)})"
        )
    return parameters


def _required(parameters: Iterable[inspect.Parameter]) -> Iterator[str]:
    """The names of the parameters that need an argument; with a star if they are not positional."""
    is_first = True
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            if parameter.default is parameter.empty or is_first:
                yield parameter.name
        elif parameter.kind is parameter.VAR_POSITIONAL:  # usually from a decorator without `functools.wraps`
            yield f"*{parameter.name}"
        elif parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            yield f"*, {parameter.name}"
        is_first = False


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The evaluated annotations, including those that name local variables of an enclosing function."""
    try:
        return typing.get_type_hints(function, localns=_closure(function))
    except NameError as exc:
        raise InvalidConfiguration(
            f"an annotation of {getattr(function, '__qualname__', function)!r} cannot be evaluated: {exc};"
            " define the type at module level"
        ) from exc


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables of enclosing functions that a function uses and that have a value already."""
    plain = getattr(function, "__func__", function)
    if not inspect.isfunction(plain):
        return {}
    cells = zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=False)
    empty = types.CellType()  # that of the function itself is empty while it is being decorated
    return {name: cell.cell_contents for name, cell in cells if cell != empty}
