"""A script, split into its statements. Pure."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import overload

from .kinds import ROUTINE, rules_by_word
from .location import HEAD
from .scanner import COMMENTS, STRUCTURE, TO_UPPER, WORD, Statement, coarse_tokens, compiled, leading_words
from .slices import Slices, at_once


class Statements(Sequence[Statement]):
    """The statements of a script, each made when it is asked for: 13 bytes of memory for each, beside the script."""

    __slots__ = ("_ends", "_lines", "_noted", "_script", "_starts")

    def __init__(self, script: str, starts: array[int], ends: array[int], lines: array[int], noted: bytes) -> None:
        self._script = script
        self._starts = starts
        self._ends = ends
        self._lines = lines
        self._noted = noted  # 1 for each statement that is notable, else 0

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Statement: ...

    @overload
    def __getitem__(self, index: slice) -> Statements: ...

    def __getitem__(self, index: int | slice) -> Statement | Statements:
        if isinstance(index, slice):
            parts = (self._starts[index], self._ends[index], self._lines[index], self._noted[index])
            return Statements(self._script, *parts)
        start, end = self._starts[index], self._ends[index]
        text = self._script[start:end]
        return Statement(text, start, end, self._lines[index], leading_words(text))

    def __eq__(self, other: object) -> bool:
        """Return whether both have the same statements; the other one may be a tuple."""
        if not isinstance(other, tuple | Statements):
            return NotImplemented
        return len(self) == len(other) and all(map(Statement.__eq__, self, other))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Statements({list(self)!r})"

    def start(self, index: int) -> int:
        """Return the offset in the script at which a statement begins."""
        return self._starts[index]

    def end(self, index: int) -> int:
        """Return the offset in the script at which a statement ends."""
        return self._ends[index]

    def line(self, index: int) -> int:
        """Return the line that a statement begins in, counted from 1."""
        return self._lines[index]

    def at(self, offset: int) -> int | None:
        """Return the number of the statement that an offset of the script lies in; None for what lies between."""
        index = bisect_right(self._starts, offset) - 1
        return index if index >= 0 and offset < self._ends[index] else None

    def before(self, offset: int) -> int:
        """Return how many statements begin before an offset of the script."""
        return bisect_left(self._starts, offset)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield where each statement starts and ends."""
        return zip(self._starts, self._ends, strict=True)

    def notable(self, start: int = 0) -> Iterator[int]:
        """Yield the numbers, from `start` on, of the statements that ampd has to look at.

        All others, in a long script most, are TRANSACTIONAL, and have neither a `setting` nor a `savepoint`.
        """
        while (start := self._noted.find(1, start)) >= 0:
            yield start
            start += 1


def split(script: str) -> Statements:
    """Return the statements of a script; between them are white space, comments and semicolons."""
    return at_once(splitting(script))


def splitting(script: str) -> Slices[Statements]:
    """Return them in slices; the work of `split`."""
    rules, word = rules_by_word(), compiled(WORD)
    wide = len(script) >= 1 << 31
    starts, ends, lines = (array("Q" if wide else "I") for _ in range(3))
    noted = bytearray()
    line, counted = 1, 0
    for span in _spans(script):
        if span is None:
            yield
            continue
        start, end = span
        line, counted = line + script.count("\n", counted, start), start
        starts.append(start)
        ends.append(end)
        lines.append(line)
        first = word.match(script, start)
        head = first[0].translate(TO_UPPER) if first else ""
        if head == "SELECT":
            text = script[start : min(end, start + HEAD)].translate(TO_UPPER)
            noted.append("SET_CONFIG" in text or (len(text) == HEAD and ("--" in text or "/*" in text)))
        else:
            noted.append(head in rules or head == "SAVEPOINT")
    return Statements(script, starts, ends, lines, bytes(noted))


def _spans(script: str) -> Iterator[tuple[int, int] | None]:
    """Yield where each statement starts and ends: at a semicolon outside parentheses and outside a routine's body.

    None in between: here the search can be interrupted.
    """
    start, end, depth, in_body, text = -1, 0, 0, False, ""
    routine: bool | None = None  # whether the statement creates one, as soon as it matters
    for kind, at, past in coarse_tokens(script):
        if kind in COMMENTS or kind == "run":
            yield None
        if kind in COMMENTS:
            continue
        previous, text = text, script[at:past].upper() if kind in STRUCTURE else ""
        if text == ";" and not depth and not in_body:
            if start >= 0:
                yield start, end
            start, routine = -1, None
            continue
        if start < 0 and kind == "psql":
            yield at, past
            continue
        start, end = at if start < 0 else start, past
        if text == "(":
            depth += 1
        elif text == ")":
            depth = max(0, depth - 1)
        elif text == "ATOMIC" and previous == "BEGIN" and not depth:
            if routine is None:
                routine = bool(re.match(ROUTINE, " ".join(leading_words(script[start:at]))))
            in_body = routine
        elif text == "END" and in_body and previous in (";", "ATOMIC"):  # the END of a CASE never stands there
            in_body, depth = False, 0
    if start >= 0:
        yield start, end
