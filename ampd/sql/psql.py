"""A script as psql has to read it, so that it sends the same. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .scanner import compiled, tokenize

if TYPE_CHECKING:
    from .splitter import Statements

# Outside of quotes and comments psql replaces :name, :'name', :"name" and :{?name}, if it has a variable of that name;
# not :: and :=. Behind a backslash a colon is only a colon.
_COLON = r"""::|:(?=[\w'"{]|[^\0-\x7f])"""


def for_psql(script: str, statements: Statements, number: int) -> str:
    """Return a statement with all that stands behind it, and before the first one, and with a semicolon."""
    start, end, past = statements.start(number), statements.end(number), len(script)
    before, is_last = "" if number else script[:start], number + 1 == len(statements)
    after = script[end : past if is_last else statements.start(number + 1)]
    if is_last and all(after[at:to] != ";" for _, at, to in tokenize(after)):
        after = f";{after}"
    return f"{before}{_uninterpolated(script[start:end])}{after}"


def _uninterpolated(text: str) -> str:
    if ":" not in text:
        return text
    pieces, at = [], 0
    for kind, start, end in tokenize(text):
        for found in compiled(_COLON).finditer(text, start, end + 1) if kind == "other" else ():
            if found[0] == ":" and found.start() < end:
                pieces.append(text[at : found.start()])
                at = found.start()
    return "\\".join((*pieces, text[at:]))
