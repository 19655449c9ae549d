"""A task: a function with an id. Its annotations are the types of the payload and the output.

Payloads and outputs are always encoded as JSON, even within one process, so a task receives the same values whichever
process executes it.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, overload

from asgi_realtime.core.chunks import decode, encode_value
from asgi_realtime.core.errors import EncodingError, InvalidConfiguration, InvalidPayload, LimitExceeded, UsageError
from asgi_realtime.core.nesting import check_depth
from asgi_realtime.engine.on_end import OnEnd, check_on_end
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
    signature. `R` is the type of the output.
    """

    def __init__(
        self,
        task_id: str,
        function: Callable[P, Awaitable[R] | R],
        *,
        max_duration_s: float | None,
        concurrency_limit: int,
        on_end: OnEnd | None = None,
        unwatched: Mapping[str, Any] = {},
    ) -> None:
        self.id = task_id
        self.function = function
        self.max_duration_s = max_duration_s
        self.concurrency_limit = concurrency_limit
        self.on_end = check_on_end(on_end)
        self.unwatched = unwatched
        """The fields of its runs that `on_unwatched` sets."""
        plain = _plain_function(function)
        self.is_async = inspect.iscoroutinefunction(plain)
        hints = _hints(plain)
        self._parameters = _parameters(function, hints)
        self.payload_type = _payload_type(self._parameters, hints)
        self.takes_payload = self.payload_type is not Any or not all(one.is_run for one in self._parameters)
        self._decode_payload = decoder_of(self.payload_type)
        self.output_type = hints.get("return", Any)
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    def __repr__(self) -> str:
        return f"<Task {self.id!r}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Awaitable[R] | R:
        return self.function(*args, **kwargs)

    def encode_payload(self, payload: Any, *, limit_bytes: int) -> bytes:
        """Encode the payload and check it against the annotation. Raises `InvalidPayload`, `LimitExceeded`."""
        try:
            data = encode_value(payload)
        except EncodingError as exc:
            raise InvalidPayload(f"the payload of task {self.id!r} cannot be encoded as JSON: {exc}") from exc
        self.check_payload(data, limit_bytes=limit_bytes)
        check_depth(data, what=f"the payload of task {self.id!r}")
        return data

    def check_payload(self, data: bytes | None, *, limit_bytes: int, is_valid: bool = False) -> None:
        """Check JSON, or a missing payload, against the annotation. Raises `InvalidPayload`, `LimitExceeded`.

        `is_valid`: the caller has decoded it, so without an annotation nothing is left to check.
        """
        if data is not None and len(data) > limit_bytes:
            raise LimitExceeded(
                f"the payload of task {self.id!r} is {len(data)} bytes, limit {limit_bytes}", status=413
            )
        if (data is not None or self.takes_payload) and not (is_valid and self._decode_payload is decode):
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

    def arguments(self, run: Run) -> list[Any]:
        """The arguments of the function."""
        return [run if parameter.is_run else run.payload for parameter in self._parameters]


class AsyncTask(Task[P, R]):
    """A task whose function is `async def`: a call returns its coroutine."""

    if TYPE_CHECKING:

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]: ...


class SyncTask(Task[P, R]):
    """A task whose function is `def`: a call returns its result."""

    if TYPE_CHECKING:

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


class TaskDecorator(Protocol):
    """The decorator that `Realtime.task` returns. It turns a function into a `Task` with the same types.

    The overloads overlap, because a `def` function can return any object. The first one that matches counts.
    """

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncTask[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, Awaitable[R]], /) -> Task[P, R]: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, function: Callable[P, R], /) -> SyncTask[P, R]: ...


def class_of(function: Callable[..., Any]) -> type[Task[..., Any]]:
    """The class of the task of a function. Raises `InvalidConfiguration`."""
    return AsyncTask if inspect.iscoroutinefunction(_plain_function(function)) else SyncTask


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
    names = list(_required(inspect.signature(function).parameters.values()))
    parameters = [Parameter(name, _is_run(hints.get(name))) for name in names]
    if len(parameters) == 2 and not any(parameter.is_run for parameter in parameters):
        _check_can_receive_run(names[1], hints)
        parameters[1] = Parameter(names[1], is_run=True)
    kinds = [parameter.is_run for parameter in parameters]
    if any(name.startswith("*") for name in names) or kinds not in ([], [False], [True], [False, True]):
        raise InvalidConfiguration(
            f"a task takes (), (payload), (payload, run) or (run: Run); this one takes ({', '.join(names)})"
        )
    if names[:1] == ["run"] and "run" not in hints:
        raise InvalidConfiguration(
            "the first parameter of the task is called run, but without an annotation it would receive the payload;"
            " write (run: Run) for the run, or call it payload"
        )
    return parameters


def _is_run(annotation: Any) -> bool:
    """Whether an annotation is `Run`, `Run[T]`, `Run | None` or `Annotated[Run, …]`."""
    return any(True for _ in _runs_in(annotation))


def _runs_in(annotation: Any) -> Iterator[Any]:
    for part in (annotation, *typing.get_args(annotation)):
        if part is Run or typing.get_origin(part) is Run:
            yield part


def _payload_type(parameters: Iterable[Parameter], hints: dict[str, Any]) -> Any:
    """The annotation of the payload, or the `T` of `run: Run[T]`. Raises `InvalidConfiguration` if they differ."""
    found = []
    for name, is_run in parameters:
        annotation = hints.get(name, Any)
        found += (
            [argument for run in _runs_in(annotation) for argument in typing.get_args(run)] if is_run else [annotation]
        )
    if len(found) == 2 and found[0] != found[1]:
        raise InvalidConfiguration(
            f"the task declares two types of its payload, {type_name(found[0])} and Run[{type_name(found[1])}];"
            " write Run without a type, or the same one"
        )
    return found[0] if found else Any


def _check_can_receive_run(name: str, hints: dict[str, Any]) -> None:
    """Raise `InvalidConfiguration` for the second of two parameters if its annotation is a data type."""
    annotation = hints.get(name, Any)
    if annotation is Any or annotation in Run.__mro__ or getattr(annotation, "_is_protocol", False):
        return
    raise InvalidConfiguration(
        f"the second parameter of the task, {name}: {type_name(annotation)}, would receive the run; annotate it with"
        " Run, or put both values into one payload"
    )


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
