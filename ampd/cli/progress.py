"""Progress in words: events in, lines on stderr out; a line every few seconds meanwhile, or a live display."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from threading import Event as Flag
from threading import Lock, Thread
from time import monotonic
from typing import TYPE_CHECKING, TextIO

from msgspec.structs import replace

from ampd.events import (
    Applied,
    Event,
    Failed,
    Finished,
    LockRetry,
    Planned,
    Progressed,
    ServerMessage,
    Starting,
    StatementStarted,
    Stopped,
    Waiting,
    how_far,
)
from ampd.redaction import shown
from ampd.report import duration

from .messages import terminal_columns, told

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ampd.migration import Migration
    from ampd.sql.scanner import Statement

    from .live import LiveDisplay

_SHOWN = 1000  # characters of a statement, before it is put on one line
_SILENCE_SECS = 5.0  # after which a log is told that something still runs
_REFRESH_SECS = 0.2  # of the live display, which a shorter run never loads


class Progress:
    """The callback of the command line; remembers how far a run has come, in case it emits no last event.

    While a migration runs a thread of its own tells so: a run that is slow to emit, or a display that is slow to
    write, is no reason for the other to be.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False, verbose: bool = False) -> None:
        self._quiet = quiet
        self.verbose: bool = verbose
        self._stream = stream or sys.stderr
        self._on_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._running: Starting | None = None
        self._waiting: Waiting | None = None  # on a terminal
        self._statement: StatementStarted | None = None
        self._progress: Progressed | None = None
        self._since = self._written = monotonic()
        self._applied: list[str] = []
        self.files: Mapping[int, Migration] = {}  # of which each statement is shown
        self.redact: Callable[[str], str] = str  # what is shown of one, as the run does with errors and notices
        self._split: tuple[int, Sequence[Statement]] = (0, ())
        self._writing = Lock()
        self._over: Flag | None = None  # of the thread, while there is one
        self._live: LiveDisplay | None = None
        self.stopped: Stopped | None = None

    @property
    def idle(self) -> bool:
        """Return whether no migration is running."""
        return self._running is None

    def interrupted(self) -> str:
        """Return what to say when a signal has ended the run."""
        return str(self.stopped) if self.stopped else how_far(self._applied, self._running, confirmed=False)

    def __call__(self, event: Event) -> None:
        """Take one event."""
        match event:
            case Planned():
                self._running = self._waiting = None
                if self.verbose or (self._on_terminal and event.pending):
                    self._line(str(event))
            case Starting():
                self._statement, self._progress, self._since, self._running = None, None, monotonic(), event
                self._waiting = None
                self._begin()
            case StatementStarted():
                self._statement, self._progress = event, None
                if self.verbose:
                    self._line(f"{event}: {self._text_of(event)}")
            case Progressed():
                self._progress = event
            case Applied():
                self._running = None
                self._applied.append(f"{event.version} {event.name}")
                self._line(str(event))
            case Waiting() if self._on_terminal:
                self._running, self._since, self._waiting = None, monotonic(), event
                self._begin()
            case Waiting():
                self._running = None
                self._line(str(event))
            case Stopped():
                self.stopped = event
            case Failed() | Finished():  # the command's last line tells it
                pass
            case LockRetry() if event.waited < 1:
                pass
            case ServerMessage() if event.severity != "WARNING" and not self.verbose:
                pass
            case _:
                self._line(str(event))

    def _text_of(self, event: StatementStarted) -> str:
        """Return the statement on one line, as the migration's file has it."""
        from ampd.resumption import summary
        from ampd.sql.splitter import split

        if self._split[0] != event.version:
            file = self.files.get(event.version)
            self._split = event.version, split(file.sql) if file else ()
        statements = self._split[1]
        if event.number > len(statements):
            return ""
        return summary(self.redact(statements[event.number - 1].text[:_SHOWN]))

    def clear(self) -> None:
        """End the live display, before something else is printed."""
        if self._over is not None:
            self._over.set()
            self._over = None
        if self._writing.acquire(timeout=1):  # who is stopped in the middle of writing is left behind
            with suppress(OSError, ValueError):
                if self._live is not None:
                    self._live.stop()
            self._live = None
            self._writing.release()

    def _begin(self) -> None:
        if self._over is None and not self._quiet:
            self._over = Flag()
            Thread(target=self._keep_telling, args=(self._over,), daemon=True).start()

    def _keep_telling(self, over: Flag) -> None:
        while not over.wait(_REFRESH_SECS if self._on_terminal else _SILENCE_SECS / 10):
            if self._on_terminal:
                from .live import LiveDisplay  # which takes a while
            with self._writing, suppress(OSError, ValueError):  # a closed stderr is no reason to stop a migration
                running, statement, progress = self._running, self._statement, self._progress
                waiting, passed = self._waiting, monotonic() - self._since
                if over.is_set():
                    return
                if waiting is not None:
                    self._live = self._live or LiveDisplay(self._stream)
                    self._live.wait(shown(str(replace(waiting, waited=waiting.waited + passed))))
                if running is None:
                    continue
                now = duration(passed * 1000)
                if statement:
                    now += f", statement {statement.number}/{statement.statements}"
                phase = shown(str(progress.progress)) if progress else ""
                if self._on_terminal:
                    self._live = self._live or LiveDisplay(self._stream)
                    self._live.show(running.number - 1, running.total, now, shown(running.label), phase)
                elif monotonic() - self._written >= _SILENCE_SECS:
                    now += f", {phase}" if phase else ""
                    self._write(f"[{running.number}/{running.total}] {shown(running.label)}: running for {now}\n")

    def _line(self, text: str) -> None:
        if self._quiet:
            return
        with self._writing, suppress(OSError, ValueError):
            if self._live is not None:
                self._live.line(told(shown(text), terminal_columns(self._stream)))
            else:
                self._write(f"{told(shown(text), terminal_columns(self._stream))}\n")

    def _write(self, text: str) -> None:
        self._written = monotonic()
        self._stream.write(text)
        self._stream.flush()
