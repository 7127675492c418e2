"""The statements of a no-transaction file, as units that succeed or fail as one, and what they set. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from . import sql
from .sql import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator


class Unit(msgspec.Struct, frozen=True):
    """Statements that succeed or fail as one: a single one, or all from a BEGIN to its COMMIT."""

    first: int
    statements: sql.Statements
    kind: Kind
    settings: tuple[sql.Statement, ...]  # by which the file has set its session before it

    @property
    def past(self) -> int:
        """Return the number of the first statement after it."""
        return self.first + len(self.statements)

    @property
    def transactional(self) -> bool:
        """Tell whether it can be recorded in the transaction that it runs in."""
        return self.kind in (Kind.TRANSACTIONAL, Kind.SESSION, Kind.COMMIT)

    @property
    def waits_in_nobodys_way(self) -> bool:
        """Tell whether nobody has to queue behind it while it waits for a lock."""
        return len(self.statements) == 1 and sql.is_concurrent(self.statements[0])


def units(statements: sql.Statements, first: int) -> Iterator[Unit]:
    """Yield what remains to be run from statement `first` on, explicit transactions in one piece."""
    settings = _in_force(statements[:first])
    for start, piece, kind in _pieces(statements, first):
        yield Unit(start, piece, kind, tuple(statement for _, statement in settings))
        settings = _after(settings, piece, kind)


def in_force(statements: sql.Statements) -> tuple[sql.Statement, ...]:
    """Return the statements by which a file has set its session, as far as no later one has taken them back."""
    return tuple(statement for _, statement in _in_force(statements))


_Settings = list[tuple[str | None, sql.Statement]]  # each with the name of what it sets
_Piece = tuple[int, sql.Statements, Kind]


def _pieces(statements: sql.Statements, first: int) -> Iterator[_Piece]:
    while first < len(statements):
        past = first + 1
        kind = sql.kind(statements[first])
        if kind is Kind.BEGIN:
            while past < len(statements) and not sql.ends_transaction(statements[past - 1]):
                past += 1
            kind = sql.kind(statements[past - 1])
        yield first, statements[first:past], kind
        first = past


def _in_force(statements: sql.Statements) -> _Settings:
    settings: _Settings = []
    for _, piece, kind in _pieces(statements, 0):
        settings = _after(settings, piece, kind)
    return settings


def _after(before: _Settings, statements: sql.Statements, kind: Kind) -> _Settings:
    """Return what is in force after statements that are committed or rolled back together."""
    if kind is Kind.ROLLBACK:
        return before
    settings, at_savepoint = before, dict[str, _Settings]()
    for statement in statements:
        name = sql.setting(statement)
        match sql.savepoint(statement):
            case ("SAVEPOINT", savepoint):
                at_savepoint[savepoint] = settings
            case ("ROLLBACK", savepoint):
                settings = at_savepoint.get(savepoint, settings)
        if statement.words[:2] == ("DISCARD", "ALL"):
            settings = []
        elif name == "all":
            settings = [(other, each) for other, each in settings if other in ("role", "session_authorization")]
        elif name is not None:
            settings = [(other, each) for other, each in settings if other != name]
        if (name and statement.words[0] != "RESET" and not sql.resets_path(statement)) or statement.words[:1] == (
            "LOAD",
        ):
            settings = [*settings, (name, statement)]
    return settings
