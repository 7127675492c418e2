"""A script as psql has to read it, so that it sends the same. Pure."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from .scanner import compiled, tokenize

if TYPE_CHECKING:
    from .splitter import Statements

# Outside of quotes and comments psql replaces :name, :'name', :"name" and :{?name}, if it has a variable of that name;
# not :: and :=. Behind a backslash a colon is only a colon.
_COLON = r"""::|:(?=[\w'"{]|[^\0-\x7f])"""


def for_psql(script: str, statements: Statements, number: int, *, joined: bool = False) -> str:
    """Return a statement with all that stands behind it, and before the first one, and with a semicolon.

    psql does not yet send a statement that is `joined` to what follows.
    """
    start, end, past = statements.start(number), statements.end(number), len(script)
    before, is_last = "" if number else script[:start], number + 1 == len(statements)
    after = script[end : past if is_last else statements.start(number + 1)]
    if is_last and all(after[at:to] != ";" for _, at, to in tokenize(after)):
        after = f";{after}"
    return f"{before}{_uninterpolated(script[start:end])}{join(after) if joined else after}"


def join(text: str) -> str:
    """Return whole statements so that psql sends them together with what follows: a backslash before each semicolon."""
    semicolons = [at for kind, at, _ in tokenize(text) if kind == "mark" and text[at] == ";"]
    return "\\".join(text[at:to] for at, to in pairwise((0, *semicolons, len(text))))


def is_plain(text: str) -> bool:
    """Return whether psql reads a text in the same way with any client_encoding and standard_conforming_strings."""
    return text.isascii() and "\\" not in text


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
