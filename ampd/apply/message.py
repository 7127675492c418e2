"""A message of several statements, and where in which script a position of it is. Pure."""

from __future__ import annotations

from ampd.sql import scanner

_TERMINATOR = "\n;"  # the line break ends a comment at the end of the statement


class Message:
    """One message for the server, built of pieces, that remembers where each statement of a script went."""

    def __init__(self, text: str = "") -> None:
        self._parts = [text]
        self._length = len(text)
        self._statements: list[tuple[int, int, int]] = []  # where each begins here and in the script, and its length

    def __str__(self) -> str:
        return "".join(self._parts)

    def join(self) -> None:
        """Put the pieces together, so that they are not kept as well."""
        self._parts = [str(self)]

    def add(self, text: str) -> None:
        """Append text of our own."""
        self._parts.append(text)
        self._length += len(text)

    def add_statement(self, statement: scanner.Statement) -> None:
        """Append a statement of the script."""
        self._statements.append((self._length, statement.start, len(statement.text)))
        self.add(statement.text)
        self.add(_TERMINATOR)

    def script_offset(self, position: int, *, counts_bytes: bool = False) -> int | None:
        """Return where in the script a position (from 1) of the message lies; None if in text of our own."""
        text = str(self)
        if counts_bytes:
            position = len(text.encode()[: position - 1].decode(errors="replace")) + 1
        for start, start_in_script, length in reversed(self._statements):
            if start >= position:
                continue
            end = start + length
            # An incomplete statement is refused at the semicolon after it, inside a rule at the next word, and inside a
            # function's body at the end of everything.
            following = len(text) - len(text[end + len(_TERMINATOR) :].lstrip())
            ours = following < position - 1 < len(text)
            return None if ours else start_in_script + min(position - 1, end) - start
        return None
