"""The one place that all events of a run go through, and the order that they keep.

The callback is the caller's code. What it raises must neither be taken for an error of ours nor get lost in the
driver's event loop, and must not leave half a migration behind: it ends the run as a cancellation would.
"""

from __future__ import annotations

from collections.abc import Coroutine
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import AmpdError, MigrationInterrupted
from .events import (
    AFTERWARDS,
    Applied,
    Event,
    Failed,
    Finished,
    LockRetry,
    OnEvent,
    Progressed,
    Starting,
    StatementStarted,
    Stopped,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from .statement_progress import StatementProgress


_PLAIN = "on_event= takes a plain function of one event"


class CallbackRaised(Exception):
    """Carries what the callback has raised past everything that handles errors of our own."""


class Emitter:
    """Calls `on_event` with each event of one run, stamped with database and schema, and with nothing after the last.

    As a context manager it raises what the callback has raised, unchanged. Such a callback is not called again.
    """

    def __init__(self, on_event: OnEvent, where: Callable[[], tuple[str, str | None]]) -> None:
        """Keep the callback, and a function that returns database and schema as far as they are known.

        Raises:
            TypeError: it cannot be called, or calling it would only make a coroutine.
        """
        check_callback(on_event)
        self._on_event = on_event
        self._where = where
        self._ended = False
        self._raised: Exception | None = None
        self._afterwards: list[Callable[[Exception | None], None]] = []

    def __call__(self, event: Event) -> None:
        """Emit one event."""
        if self._ended or self._raised is not None:
            return
        self._ended = isinstance(event, Finished | Stopped)
        database, schema = self._where()
        token = AFTERWARDS.set(self._afterwards)
        try:
            answer: object = self._on_event(msgspec.structs.replace(event, database=database, schema=schema))
            if isinstance(answer, Coroutine):
                answer.close()
                raise TypeError(f"{_PLAIN}, and this one returns a coroutine")
        except Exception as error:
            self._raised = error
            raise CallbackRaised from error
        finally:
            AFTERWARDS.reset(token)
            if self._ended or self._raised is not None:
                for call in self._afterwards:
                    call(self._raised)

    async def __aenter__(self) -> Emitter:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._raised is not None and (error is None or isinstance(error, Exception)):
            before = self._raised.__context__
            try:
                raise self._raised
            finally:
                self._raised.__context__ = before


def check_callback(on_event: object) -> None:
    """Check that a callback can be called as a plain function.

    Raises:
        TypeError: it cannot be called at all, or is an `async def`.
    """
    import inspect
    from functools import partial

    if not callable(on_event):
        raise TypeError(f"{_PLAIN}, not {type(on_event).__name__}")
    function: object = on_event
    while isinstance(function, partial):
        function = function.func
    called = (function, type(function).__call__)
    if any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for each in called):
        raise TypeError(f"{_PLAIN}, and this one is an async def: let a plain function put the event into a queue")


class RunningMigration:
    """Emits the events of one migration: a start once it has the lock, its statements, and one end."""

    def __init__(self, emit: Emitter, starting: Starting) -> None:
        self._emit = emit
        self.since: float = monotonic()
        self._begun = self._ended = False
        self._duration_ms: int | None = None
        self._cost: dict[str, Any] = {"retries": 0, "longest_attempt_secs": 0.0, "most_queued": 0}
        self.starting = starting
        self.started: bool = False
        self._progress: StatementProgress | None = None

    def begin(self) -> None:
        """Count the time from now on: its transaction begins, unless this is another attempt."""
        if not self._begun:
            self._begun, self.since = True, monotonic()

    def finish(self) -> None:
        """Count the time up to now: it is done."""
        self._duration_ms = self.duration_ms

    def start(self) -> None:
        """Emit that it starts, unless an earlier attempt has: one that ends in a lock timeout is made again."""
        if not self.started:
            self.started = True
            self._emit(self.starting)

    def statement(self, index: int, line: int) -> None:
        """Emit that the server has begun a statement; the index counts from 0."""
        self._progress = None
        if self.started and not self._ended:
            this = self.starting
            self._emit(
                StatementStarted(
                    version=this.version,
                    name=this.name,
                    migration=this.number,
                    total=this.total,
                    number=index + 1,
                    statements=this.statements,
                    line=line,
                )
            )

    def progress(self, found: StatementProgress | None) -> None:
        """Emit how far the running statement is, if the server tells and it is further than before."""
        if found != self._progress and self.started and not self._ended:
            self._progress = found
            if found is not None:
                this = self.starting
                self._emit(
                    Progressed(
                        version=this.version, name=this.name, number=this.number, total=this.total, progress=found
                    )
                )

    def retry(self, event: LockRetry) -> None:
        """Emit that a table lock has ended an attempt, and add up what that has cost others."""
        cost = self._cost
        self._cost = {
            "retries": cost["retries"] + 1,
            "longest_attempt_secs": max(cost["longest_attempt_secs"], event.took),
            "most_queued": max(cost["most_queued"], event.queued),
        }
        self._emit(event)

    def applied(self) -> None:
        """Emit that it is applied and committed."""
        self.start()  # a note of the server may have got lost on the way
        self._ended = True
        self._emit(Applied(**self._facts(), **self._cost))

    def failed(self, error: Exception) -> None:
        """Emit that this run has not applied it, and why; nothing if it has not started."""
        if self.started and not self._ended:
            self._ended = True
            self._emit(Failed(**self._facts(), error=as_ampd_error(error)))

    @property
    def duration_ms(self) -> int:
        """Return how long it has run in milliseconds, the wait for its lock included."""
        return round((monotonic() - self.since) * 1000) if self._duration_ms is None else self._duration_ms

    def _facts(self) -> dict[str, Any]:
        this = self.starting
        return {
            "version": this.version,
            "name": this.name,
            "number": this.number,
            "total": this.total,
            "duration_ms": self.duration_ms,
        }


def as_ampd_error(error: Exception) -> AmpdError:
    """Return an error of ampd's as it is, and any other as a MigrationInterrupted that names its type."""
    return error if isinstance(error, AmpdError) else MigrationInterrupted(f"{type(error).__name__}: {error}")
