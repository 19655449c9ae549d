"""OpenTelemetry: one span for each run, in the trace of the code that triggered it.

The record of a run carries the position of its trigger in a trace (W3C Trace Context, `traceparent`), so the process
that executes the run can continue the trace. Browsers never see it.

Nothing is configured or imported here: a host that records spans has imported `opentelemetry` already. Without it, a
run has no position and no span, at the cost of one look into `sys.modules`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from asgi_realtime.core.runs import StoredRecord

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_NAME = "asgi_realtime"


def _is_used() -> bool:
    return "opentelemetry.trace" in sys.modules


def current_traceparent() -> str | None:
    """Where the calling code is in a trace; None outside of one."""
    if not _is_used():
        return None
    from opentelemetry.trace import get_current_span

    context = get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


class RunSpan:
    """The span of a run in the process that executes it, or nothing."""

    __slots__ = ("_span",)

    def __init__(self, record: StoredRecord) -> None:
        self._span: Span | None = _start(record) if _is_used() else None

    def attach(self) -> Callable[[], None]:
        """Make it the current span of this context. Returns what undoes that, in the same context."""
        if self._span is None:
            return _nothing
        from opentelemetry.context import attach, detach
        from opentelemetry.trace import set_span_in_context

        token = attach(set_span_in_context(self._span))
        return lambda: detach(token)

    def record_error(self, error: BaseException) -> None:
        """The code of the run has raised."""
        if self._span is not None:
            self._span.record_exception(error)

    def end(self, record: StoredRecord | None) -> None:
        """The execution is over, with this last record if it could be stored. Idempotent."""
        span, self._span = self._span, None
        if span is None:
            return
        if record is not None:
            span.set_attribute(f"{_NAME}.run.status", record.status.value)
        if record is None or record.is_failed:
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR, "" if record is None or record.error is None else record.error.name)
        span.end()


def _start(record: StoredRecord) -> Span:
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanKind, get_tracer
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {} if record.traceparent is None else {"traceparent": record.traceparent}
    return get_tracer(_NAME).start_span(
        f"run {record.task}",
        context=TraceContextTextMapPropagator().extract(carrier, Context()),
        kind=SpanKind.CONSUMER,
        attributes={f"{_NAME}.run.id": record.id, f"{_NAME}.run.task": record.task},
    )


def _nothing() -> None:
    pass
