"""The statements of a no-transaction file, as units that succeed or fail as one, and what they set. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from . import kinds, scanner, splitter
from .kinds import Kind
from .slices import Slices

if TYPE_CHECKING:
    from collections.abc import Iterator


class Unit(msgspec.Struct, frozen=True):
    """Statements that succeed or fail as one: a single one, or all from a BEGIN to its COMMIT."""

    first: int
    statements: splitter.Statements
    kind: Kind
    settings: tuple[scanner.Statement, ...]  # by which the file has set its session before it

    @property
    def past(self) -> int:
        """Return the number of the first statement after it."""
        return self.first + len(self.statements)

    @property
    def is_transactional(self) -> bool:
        """Return whether it can be recorded in the transaction that it runs in."""
        return self.kind in (Kind.TRANSACTIONAL, Kind.SESSION, Kind.COMMIT)

    @property
    def is_concurrent(self) -> bool:
        """Return whether nobody queues behind it while it waits for a lock."""
        return len(self.statements) == 1 and kinds.is_concurrent(self.statements[0])


Settings = list[tuple[str | None, scanner.Statement]]  # statements that set the session, with what they set


def units(statements: splitter.Statements, first: int, settings: Settings) -> Iterator[Unit]:
    """Yield what remains to be run from statement `first` on, explicit transactions in one piece.

    `settings` are those in force before it.
    """
    while first < len(statements):
        piece, kind = _piece(statements, first)
        yield Unit(first, piece, kind, tuple(statement for _, statement in settings))
        settings = _after(settings, piece, kind)
        first += len(piece)


def finding_in_force(statements: splitter.Statements) -> Slices[Settings]:
    """Return, in slices, the statements by which a file has set its session, unless a later one has reset them."""
    settings: Settings = []
    first = next(statements.notable(), None)
    while first is not None:
        piece, kind = _piece(statements, first)
        settings = _after(settings, piece, kind)
        first = next(statements.notable(first + len(piece)), None)
        yield
    return settings


def _piece(statements: splitter.Statements, first: int) -> tuple[splitter.Statements, Kind]:
    """Return the statements of the unit that begins with statement `first`, and its kind."""
    past = first + 1
    kind = kinds.kind(statements[first])
    if kind is Kind.BEGIN:
        ends = (number for number in statements.notable(past) if kinds.ends_transaction(statements[number]))
        past = next(ends, len(statements) - 1) + 1
        kind = kinds.kind(statements[past - 1])
    return statements[first:past], kind


def _after(before: Settings, statements: splitter.Statements, kind: Kind) -> Settings:
    """Return what is in force after statements that are committed or rolled back together."""
    if kind is Kind.ROLLBACK:
        return before
    settings, at_savepoint = before, dict[str, Settings]()
    for statement in map(statements.__getitem__, statements.notable()):
        name = kinds.setting(statement)
        match kinds.savepoint(statement):
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
        taken_back = statement.words[0] == "RESET" or kinds.resets_path(statement) or kinds.resets_role(statement)
        if (name and not taken_back) or statement.words[:1] == ("LOAD",):
            settings = [*settings, (name, statement)]
    return settings
