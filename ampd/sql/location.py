"""Where in a script something is: line, column, and an excerpt with a caret. Pure."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

HEAD = 1000  # characters of a statement, within which its first words are, unless there are comments in between


def locate(script: str, offset: int) -> tuple[int, int]:
    """Return the line and the column of an offset, both counted from 1."""
    offset = max(0, min(offset, len(script)))
    return script.count("\n", 0, offset) + 1, offset - script.rfind("\n", 0, offset)


def locations(script: str, offsets: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield line and column of ascending offsets; each line break is counted once, for all of them."""
    line, start, counted = 1, 0, 0
    for offset in offsets:
        if breaks := script.count("\n", counted, offset):
            line, start = line + breaks, script.rfind("\n", counted, offset) + 1
        counted = offset
        yield line, offset - start + 1


def excerpt(
    script: str, offset: int, *, file: str, hide: Callable[[str], str] = str, place: tuple[int, int] | None = None
) -> str:
    """Return the line of an offset with a caret below it; for the blank end of a script, its last visible line.

    `hide` takes secrets out of a text; `place` is what `locate` returns for the offset, if that is known.
    """
    visible = _visible_end(script)
    if offset not in range(visible + 1) or place is None:
        offset = max(0, min(offset, visible))
        place = locate(script, offset)
    line, column = place
    start, far = offset - column + 1, 10 * _WINDOW  # what is farther off is not shown, however narrow the rest
    begin, end = max(start, offset - far), script.find("\n", offset, offset + far)
    around = script[begin : end if end >= 0 else offset + far]
    around = around.rstrip() if end >= 0 or offset + far >= len(script) else around
    before, around = hide(around[: offset - begin]), hide(around)
    before, after = _printable(around[: len(before)]), _printable(around[len(before) :])
    columns = list(accumulate(map(_width, before + after), initial=0))
    if columns[-1] > _WINDOW:
        first = max(0, min(columns[len(before)] - _WINDOW // 2, columns[-1] - _WINDOW))
        left, right = bisect_left(columns, first), bisect_right(columns, first + _WINDOW) - 1
        after = after[: right - len(before)] + "…" * (right < len(columns) - 1)
        before = "…" * (left > 0) + before[left:]
    margin = " " * len(str(line))
    indent = " " * sum(map(_width, before))
    return f"{file}:{line}:{column}\n{margin} |\n{line} | {before}{after}\n{margin} | {indent}^"


def _visible_end(script: str) -> int:
    """Return the length of a script without the white space at its end, of which no copy is made."""
    end = len(script)
    while end and not (last := script[max(0, end - HEAD) : end].rstrip()):
        end = max(0, end - HEAD)
    return max(0, end - HEAD) + len(last) if end else 0


# Drawing.

_WINDOW = 100  # columns of a long line that an excerpt shows


def _printable(text: str) -> str:
    return "".join("    " if c == "\t" else c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
