"""What a terminal shows: a bar over the migrations and the one that runs now, or what is waited for. Loads rich."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the caller: rich would end the process."""
        raise  # noqa: PLE0704 - called while the error is handled


class LiveDisplay:
    """Two or three lines at the end of what is printed, erased in the end; drawn by no thread of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._console = _Console(file=stream, highlight=False, force_terminal=True)
        self._live = Live(
            console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._spinner = Spinner("line")  # which is ASCII
        self._live.start()

    def show(self, done: int, total: int, now: str, label: str, phase: str = "") -> None:
        """Draw how many migrations of how many are done, how far the one that runs now is, and which it is."""
        bar = Table.grid(padding=(0, 1))
        width = min(40, max(4, self._console.width - 36))
        bar.add_row(ProgressBar(total=total, completed=done, width=width), Text(f"{done}/{total} {now}", no_wrap=True))
        lines = [Text(label, no_wrap=True, overflow="crop"), *([Text(phase, overflow="fold")] if phase else [])]
        self._live.update(Group(bar, *lines), refresh=True)

    def wait(self, text: str) -> None:
        """Draw what is waited for."""
        self._spinner.update(text=Text(text, overflow="fold"))
        self._live.update(self._spinner, refresh=True)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(Text(text), soft_wrap=True)

    def stop(self) -> None:
        """Erase it."""
        self._live.stop()
