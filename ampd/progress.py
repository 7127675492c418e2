"""Progress in words: events in, lines on stderr out; on a terminal, one live line for what runs now."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from .events import (
    Applied,
    Blocked,
    Event,
    LockRetry,
    Retrying,
    ServerMessage,
    Starting,
    StatementStarted,
    Stopped,
    Waiting,
    Warned,
)
from .turn import told

_UNFINISHED = "unfinished: run `ampd migrate` again; it resumes or says what to do"
_UNCONFIRMED = "and the server has not said what became of it: look at `ampd status`"
_ERASE = "\r\x1b[2K"


class Progress:
    """The listener of the command line; remembers what was applied, for a run that is interrupted."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._running: Starting | None = None
        self._begun = False  # whether it has had its turn: another runner may be at the very same migration
        self.applied: list[Applied] = []
        self.stopped: Stopped | None = None

    @property
    def idle(self) -> bool:
        """Tell whether no migration is running."""
        return not self._begun

    def interrupted(self) -> str:
        """Return what to say when a signal has ended the run."""
        done = f"applied {', '.join(f'{each.version} {each.name}' for each in self.applied)}" if self.applied else ""
        confirmed = self.stopped is not None and self.stopped.confirmed
        if self._running is None:
            return done or "nothing was applied"
        if confirmed and not self._begun:
            return f"{done or 'nothing was applied'}; the rest was waiting for its turn"
        running = f"{self._running.version} {self._running.name}"
        end = _UNFINISHED if not self._running.transactional else "rolled back" if confirmed else _UNCONFIRMED
        return f"{done or 'nothing was applied'}; {running} was stopped, {end}"

    def __call__(self, event: Event) -> None:
        """Take one event."""
        match event:
            case Starting():
                self._running, self._begun = event, False
                resumed = f", resumed at statement {event.resumed_at + 1}" if event.resumed_at else ""
                self._now(f"[{event.number}/{event.total}] {event.version} {event.name} …{resumed}")
            case StatementStarted() if self._running:
                self._begun = True
                at = f"[{self._running.number}/{self._running.total}] {event.version} {self._running.name}"
                self._now(f"{at}: statement {event.number}/{event.statements}, line {event.line}")
            case Stopped():
                self.stopped = event
            case Applied():
                self._running, self._begun = None, False
                self.applied.append(event)
                self._line(f"[{event.number}/{event.total}] {event.version} {event.name}  {event.duration_ms} ms")
            case Blocked():
                self._begun = True
                self._line(f"blocked for {event.waited:.0f} s (limit {event.limit:g} s) by:")
                for blocker in event.blockers:
                    self._line(f"  {blocker.describe()}")
                if event.queued:
                    self._line(f"  {event.queued} more wait behind this migration")
            case LockRetry() if event.waited >= 1:
                self._line(f"lock not available: rolled back, trying again in {event.delay:.1f} s")
            case Waiting():
                self._line(f"another runner has its turn ({told(event)}); waiting {event.waited:.0f} s so far")
            case Retrying():
                self._line(f"{event.reason}; trying for {event.limit - event.waited:.0f} s more")
            case ServerMessage():
                self._line(f"{event.severity.lower()}: {event.message}")
            case Warned():
                self._line(f"warning: {event.message}")

    def clear(self) -> None:
        """Take the live line away, before something else is printed."""
        if self._live:
            self._write(_ERASE)

    def _line(self, text: str) -> None:
        self.clear()
        self._write(f"{text}\n")

    def _now(self, text: str) -> None:
        if self._live:
            self._write(_ERASE + text[: self._columns() - 1])

    def _write(self, text: str) -> None:
        with suppress(OSError):  # that nobody listens any more is no reason to stop a migration
            self._stream.write(text)
            self._stream.flush()

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:
            return 80
