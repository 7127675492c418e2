"""Progress in words: events in, lines on stderr out; on a terminal, one live line for what runs now."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from ampd.events import (
    Applied,
    Event,
    Failed,
    Finished,
    LockRetry,
    Planned,
    Starting,
    StatementStarted,
    Stopped,
    Waiting,
    how_far,
)
from ampd.redaction import shown

_ERASE = "\r\x1b[2K"


class Progress:
    """The callback of the command line; remembers how far a run has come, in case it emits no last event."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False, verbose: bool = False) -> None:
        self._quiet, self._verbose = quiet, verbose
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._running: Starting | None = None
        self._applied: list[str] = []
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
                self._running = None
                (self._line if self._verbose else self._now)(str(event))
            case Starting():
                self._running = event
                self._now(str(event))
            case StatementStarted():
                (self._line if self._verbose else self._now)(str(event))
            case Applied():
                self._running = None
                self._applied.append(f"{event.version} {event.name}")
                self._line(str(event))
            case Waiting():
                self._running = None
                self._line(str(event))
            case Stopped():
                self.stopped = event
            case Failed() | Finished():  # the command's last line tells it
                pass
            case LockRetry() if event.waited < 1:
                pass
            case _:
                self._line(str(event))

    def clear(self) -> None:
        """Erase the live line, before something else is printed."""
        if self._live:
            self._write(_ERASE)

    def _line(self, text: str) -> None:
        self.clear()
        self._write(f"{shown(text)}\n")

    def _now(self, text: str) -> None:
        if self._live:
            self._write(_ERASE + shown(text)[: self._columns() - 1])

    def _write(self, text: str) -> None:
        if self._quiet:
            return
        with suppress(OSError):  # a closed stderr is no reason to stop a migration
            self._stream.write(text)
            self._stream.flush()

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:
            return 80
