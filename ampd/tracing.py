"""Events to spans of OpenTelemetry: one for a run, and in it one for each migration."""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager
from functools import partial
from time import time_ns
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import AmpdError, ConfigError
from .events import (
    AFTERWARDS,
    Applied,
    Blocked,
    Event,
    Failed,
    Finished,
    LockRetry,
    OnEvent,
    Planned,
    Retrying,
    Starting,
    Stopped,
    Waiting,
    WaitingForConnection,
)
from .version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.trace import Span, Tracer
else:
    try:
        from opentelemetry.trace import Tracer
    except ImportError:  # whoever looks at the signature finds a type all the same
        Tracer = Any

_LOGGER = logging.getLogger(__name__)
_ADDRESS = re.compile(r"(?s)(?P<host>[^,]*):(?P<port>\d+)/(?P<name>.*)")
_DATABASE = re.compile(r"(?s).*:\d+/(?P<name>.*)")


def trace_events(tracer: Tracer | None = None) -> OnEvent:
    """Return a callback for `on_event=` that makes spans with a tracer of OpenTelemetry.

    It is for `migrate`, `migrate_schemas` and `open_pool`, which say how each run ends.

    A run is a span `ampd migrate`, whose parent is whatever span it is called in, and each migration that starts a span
    `migration VERSION NAME` within it. Both end when the run and the migration do, and a failure is their status. The
    attributes are those of the semantic conventions for databases, and `ampd.…`; no statement's text is in them. Runs
    at the same time may share a callback if each has a database or a schema of its own.

    Args:
        tracer: by default that of the global tracer provider.

    Raises:
        ConfigError: opentelemetry-api is not installed.
        TypeError: it is no tracer.
    """
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise ConfigError(
            "opentelemetry-api, which trace_events makes spans with, is not installed",
            hint="pip install 'ampd-migrate[otel]'",
        ) from error
    target = trace.get_tracer("ampd", VERSION) if tracer is None else tracer
    if not isinstance(target, trace.Tracer):
        raise TypeError(f"trace_events takes a Tracer of OpenTelemetry, not {type(target).__name__}")
    runs: list[_TracedRun] = []

    def trace_event(event: Event) -> None:
        run = next((each for each in runs if each.is_of(event)), None)
        if run is None:
            if not isinstance(event, _BEGINNINGS):
                return
            runs.append(run := _TracedRun(target, event))
            AFTERWARDS.get([]).append(partial(give_up, run))
        if isinstance(event, Finished | Stopped):
            runs.remove(run)
        run.take(event)

    def give_up(run: _TracedRun, error: Exception | None) -> None:
        if run in runs:  # a function around this one has raised, or kept back the last event
            runs.remove(run)
            with _logged(error):
                run.give_up(error)

    def traced(event: Event) -> None:
        with _logged(event):
            trace_event(event)

    return traced


@contextmanager
def _logged(what: object) -> Iterator[None]:
    """Log what a processor or a sampler raises: to trace a run must not end it."""
    try:
        yield
    except Exception:
        _LOGGER.warning("a span could not be made of %s", type(what).__name__, exc_info=True)


# One of these is the first that a run of `migrate` emits, or tells of a wait before that.
_BEGINNINGS = (Planned, Finished, Stopped, Waiting, Retrying, WaitingForConnection)


class _TracedRun:
    """The spans of one run."""

    def __init__(self, tracer: Tracer, event: Event) -> None:
        waited = event.waited if isinstance(event, Waiting | Retrying | WaitingForConnection) else 0
        self._tracer = tracer
        self._database = self._schema = ""
        self._facts: dict[str, str | int] = {}
        self._learn(event)
        self._migration: Span | None = None
        self._span = tracer.start_span("ampd migrate", attributes=self._facts, start_time=time_ns() - int(waited * 1e9))

    def is_of(self, event: Event) -> bool:
        """Return whether an event can be one of this run, as far as database and schema are known."""
        here = ((self._database, _database(event)), (self._schema, event.schema or ""))
        return all(not known or not told or known == told for known, told in here)

    def take(self, event: Event) -> None:
        """Take an event of the run."""
        if self._learn(event):
            self._span.set_attributes(self._facts)
        match event:
            case Starting():
                self._start(event)
            case Applied():
                self._end_migration({"ampd.migration.retries": event.retries} if event.retries else {})
            case Failed():
                self._end_migration(_failure(event.error), event.error.message)
            case Blocked() | LockRetry() | Waiting() | Retrying() | WaitingForConnection():
                (self._migration or self._span).add_event(type(event).__name__, _numbers(event))
            case Finished():
                result = {"ampd.run.result": event.report.result.value, "ampd.run.applied": len(event.report.applied)}
                if event.error is not None:
                    result |= {"ampd.run.result": "failed", **_failure(event.error)}
                _end(self._span, result, None if event.error is None else event.error.message)
            case Stopped():
                result = {
                    "ampd.run.result": "stopped",
                    "ampd.run.applied": len(event.report.applied),
                    "error.type": "stopped",
                }
                _end(self._span, result, str(event))
            case _:
                pass

    def give_up(self, error: Exception | None) -> None:
        """End the spans of a run whose last event will not come, because `on_event` has raised an error, say."""
        failed = {"error.type": "stopped" if error is None else type(error).__name__}
        said = "stopped" if error is None else f"on_event raised {type(error).__name__}"
        self._end_migration(failed, said)
        _end(self._span, {"ampd.run.result": "stopped", **failed}, said)

    def _learn(self, event: Event) -> bool:
        """Take database and schema from an event; return whether anything is new."""
        before = self._database, self._schema
        self._database, self._schema = self._database or _database(event), self._schema or event.schema or ""
        name = _DATABASE.fullmatch(self._database)
        namespace = "|".join(filter(None, (name and name["name"], self._schema)))
        self._facts = {"db.system.name": "postgresql", "db.operation.name": "migrate"}
        self._facts |= {"db.namespace": namespace} if namespace else {}
        if address := _ADDRESS.fullmatch(self._database):  # there may be several hosts
            self._facts |= {"server.address": address["host"].strip("[]"), "server.port": int(address["port"])}
        return before != (self._database, self._schema)

    def _start(self, event: Starting) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context

        self._migration = self._tracer.start_span(
            f"migration {event.label}",
            context=set_span_in_context(self._span),
            kind=SpanKind.CLIENT,
            attributes=self._facts
            | {
                "ampd.migration.version": event.version,
                "ampd.migration.name": event.name,
                "ampd.migration.transactional": event.transactional,
                "ampd.migration.statements": event.statements,
            },
        )

    def _end_migration(self, attributes: dict[str, Any], failure: str | None = None) -> None:
        if self._migration is not None:
            _end(self._migration, attributes, failure)
            self._migration = None


def _end(span: Span, attributes: dict[str, Any], failure: str | None) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attributes(attributes)
    if failure is not None:
        span.set_status(StatusCode.ERROR, failure)
    span.end()


def _database(event: Event) -> str:
    """Return the database of an event; nothing where a pool's is not known yet."""
    return event.database if _DATABASE.fullmatch(event.database) else ""


def _failure(error: AmpdError) -> dict[str, str | int]:
    """Return what is said of an error: by its SQLSTATE where the server has sent one, else by its class."""
    said = {"error.type": error.sqlstate or type(error).__name__, "ampd.error.code": error.code}
    more = {"db.response.status_code": error.sqlstate, "code.file.path": error.file, "code.line.number": error.line}
    return said | {name: value for name, value in more.items() if value is not None}


def _numbers(event: Event) -> dict[str, Any]:
    """Return the fields of an event that are numbers, but for the migration's version: others may contain SQL."""
    fields = msgspec.structs.asdict(event).items()
    return {f"ampd.{name}": value for name, value in fields if isinstance(value, int | float) and name != "version"}
