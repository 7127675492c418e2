"""Where the down section of another tool's file begins: the comments that separate its two directions. Pure.

Each tool has a parser of its own; what is refused here is what any of them takes for its separator, or a person
would: in any case, with any dashes and spaces, whatever follows. ampd runs files whole, and such a section would
undo what the file has just done.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Comment(msgspec.Struct, frozen=True):
    """A comment of a script: where it begins, and whether it stands on a line of its own between two statements."""

    offset: int
    text: str
    apart: bool


class Separator(msgspec.Struct, frozen=True):
    """A comment that begins a down section: of which tool, if that is known."""

    offset: int
    marker: str
    tool: str | None


_SOME = "another tool"
_TOOLS = (  # the first that fits is taken
    ("goose", r"\+\s*goose\s+down"),
    ("sql-migrate", r"\+\s*migrate\s+down"),  # migra as well
    ("micrate", r"\+\s*micrate\s+down"),
    (_SOME, r"\+\w+\s+down"),
    ("dbmate", r"migrate\s*:\s*down|migration:down"),  # migretti as well
    ("Migrondi", r"migrondi\s*:\s*down"),
    ("tern", r"create\s+above\s*/+\s*drop\s+below"),
    ("MyBatis Migrations", r"//.*?@\s*undo"),  # dbdeploy as well
    ("Play", r"!\s*downs?"),
    ("rambler", r"rambler\s+down"),
    ("shmig", r"=+\s*down\s*=+"),
    ("soma-schema", r"down\s*=="),
    ("Atlas", r"down\.sql\s*--"),
    (_SOME, r"@\s*(?:down|undo|rollback)(?:query|script)?"),
    (_SOME, r";;\s*down"),
    ("node-pg-migrate", r"down\s+migration(?=\s*(?:[^\w\s]|\Z))"),  # it takes prose as well: see below
)
_MARKER = re.compile("|".join(f"(?P<t{number}>{pattern})" for number, (_, pattern) in enumerate(_TOOLS)), re.IGNORECASE)
_WHAT = r"(?:\W+(?:migrations?|section|script|part|sql))?\W*"
_BARE_UP = re.compile(rf"\W*(?:ups?|upgrade){_WHAT}", re.IGNORECASE)
_BARE_DOWN = re.compile(
    rf"\W*(?:(?P<down>downs?|downgrade)|(?:migrate|migration)\W+down|undo|roll\s?back|revert){_WHAT}", re.IGNORECASE
)
_PROSE = re.compile(r"(?P<way>up|down)\s+migration(?!\w)", re.IGNORECASE)
_OPENING = re.compile(r"(?:--|/\*)[-*\s\ufeff]*")
_DOWN_WORDS = r"down|undo|roll\s?back|revert|drop\s+below"
_SUSPICIOUS = re.compile(rf"(?<!\w)(?:{_DOWN_WORDS})", re.IGNORECASE)
_SUSPICIOUS_BETWEEN = re.compile(rf"(?<!\w)(?:up|{_DOWN_WORDS})", re.IGNORECASE)
_SHOWN = 60  # characters of a marker


def suspicious(text: str, *, between: bool) -> bool:
    """Return whether a piece of a script may contain a separator: cheap, with false positives.

    In what lies between two statements an `-- up` counts as well.
    """
    words = _SUSPICIOUS_BETWEEN if between else _SUSPICIOUS
    return ("--" in text or "/*" in text) and words.search(text) is not None


def separators(comments: Iterable[Comment | None]) -> Iterator[Separator | None]:
    """Yield the comments that begin a down section, `tool` being None for those that may mean something else.

    A bare `-- down` is certainly a separator only if there is an `-- up`. None in between, on either side: there the
    search can be interrupted.
    """
    bare: list[tuple[Separator, bool]] = []
    prose: list[Separator] = []
    ups = up_migrations = False
    for comment in comments:
        yield None
        body = _body(comment.text) if comment else None
        if comment is None or body is None:
            continue
        if (found := _MARKER.match(body)) and not re.match(r"\w", body[found.end() : found.end() + 1]):
            tool = _TOOLS[int((found.lastgroup or "")[1:])][0]
            if tool != "node-pg-migrate" or comment.apart:
                yield Separator(comment.offset, _shown(found[0]), tool)
        elif comment.apart:
            if found := _BARE_DOWN.fullmatch(body):
                bare.append((Separator(comment.offset, _shown(comment.text), None), bool(found["down"])))
            elif found := _PROSE.match(body):
                up_migrations |= found["way"].lower() == "up"
                if found["way"].lower() == "down":
                    prose.append(Separator(comment.offset, _shown(found[0]), "node-pg-migrate"))
            ups |= _BARE_UP.fullmatch(body) is not None
    yield from prose if up_migrations else ()
    for separator, paired in bare:
        yield msgspec.structs.replace(separator, tool=_SOME) if ups and paired else separator


def _body(comment: str) -> str | None:
    """Return what a comment says, without its dashes; None for one of several lines, which is no separator."""
    opening = None if "\n" in comment or "\r" in comment else _OPENING.match(comment)
    return comment[opening.end() :].removesuffix("*/") if opening else None


def _shown(marker: str) -> str:
    words = " ".join(marker.split())
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]}…"
