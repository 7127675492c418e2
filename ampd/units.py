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
    statements: tuple[sql.Statement, ...]
    kind: Kind

    @property
    def past(self) -> int:
        """Return the number of the first statement after it."""
        return self.first + len(self.statements)

    @property
    def transactional(self) -> bool:
        """Tell whether it can be recorded in the transaction that it runs in."""
        return self.kind in (Kind.TRANSACTIONAL, Kind.SESSION, Kind.COMMIT)


def units(statements: tuple[sql.Statement, ...], first: int) -> Iterator[Unit]:
    """Yield what remains to be run from statement `first` on, explicit transactions in one piece."""
    while first < len(statements):
        past = first + 1
        kind = sql.kind(statements[first])
        if kind is Kind.BEGIN:
            while past < len(statements) and not sql.ends_transaction(statements[past - 1]):
                past += 1
            kind = sql.kind(statements[past - 1])
        yield Unit(first, statements[first:past], kind)
        first = past


def in_force(statements: tuple[sql.Statement, ...]) -> tuple[sql.Statement, ...]:
    """Return the statements by which a file has set its session, as far as no later one has taken them back."""
    kept: list[tuple[str | None, sql.Statement]] = []
    for unit in units(statements, 0):
        if unit.kind is Kind.ROLLBACK:
            continue
        for statement in unit.statements:
            name = sql.setting(statement)
            if name == "all":
                kept = [(other, each) for other, each in kept if other in ("role", "session_authorization")]
            elif name is not None:
                kept = [(other, each) for other, each in kept if other != name]
            if (
                (name and statement.words[0] == "SET")
                or sql.is_set_config(statement)
                or statement.words[:1] == ("LOAD",)
            ):
                kept.append((name, statement))
    return tuple(statement for _, statement in kept)
