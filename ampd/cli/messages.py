"""Messages as a person reads them: commands that can be pasted, and lines that fit the terminal."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from ampd.display import fitted, visible

if TYPE_CHECKING:
    from collections.abc import Iterable


_COMMAND = re.compile(r"`((?:[A-Z_]+=\S+ )?ampd (?:migrate|status|baseline|resolve)\b[^`]*)`")
_options: list[str] = []  # of the command line, which commands in messages need as well


def remember_options(options: Iterable[str]) -> None:
    """Remember with which options, quoted for a shell, a command in a message is about the same database and files."""
    _options[:] = options


def completed(text: str) -> str:
    """Return a message with these options in its commands, so that they can be pasted."""

    def complete(command: re.Match[str]) -> str:
        return f"`{' '.join([command[1], *(each for each in _options if each.partition(' ')[0] not in command[1])])}`"

    return _COMMAND.sub(complete, text) if _options else text


def told(text: str, columns: int | None) -> str:
    """Return a message as a terminal of so many columns shows it, or a pipe."""
    text = completed(visible(text))
    return fitted(text, columns) if columns else text


def terminal_columns(stream: TextIO | None = None) -> int | None:
    """Return the width of the terminal that a stream, by default stdout, is; None if it is none."""
    with suppress(OSError, ValueError):
        return os.get_terminal_size((stream or sys.stdout).fileno()).columns or 80
    return None
