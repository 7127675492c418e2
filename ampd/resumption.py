"""How an interrupted no-transaction migration goes on: which of its statements are done, by their checksum. Pure."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec

from .migration import AppliedMigration, DirectiveError, Migration, directives
from .redaction import masked
from .sql.slices import Slices, at_once

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .sql.scanner import Statement
    from .sql.splitter import Statements


class Resumption(msgspec.Struct, frozen=True):
    """Where an interrupted migration can go on: after `done` statements.

    `in_doubt` says that the next one was begun, and that only the database can tell how far it came.
    """

    done: int
    in_doubt: bool


_LONGEST_SUMMARY = 80  # characters


def summary(text: str) -> str:
    """Return a statement on one line, cut where it is long."""
    line = masked(" ".join(text.split()))
    return line if len(line) <= _LONGEST_SUMMARY else f"{line[: _LONGEST_SUMMARY - 1]}…"


def done_checksum(statements: Sequence[Statement]) -> bytes:
    """Return the SHA-256 that identifies the statements of a no-transaction migration that were begun or done.

    As with the checksum of a file, line ends do not count.
    """
    return DoneChecksums(statements).of(len(statements))


class DoneChecksums:
    """The checksums of the first statements of a file, each computed from the one before."""

    def __init__(self, statements: Sequence[Statement]) -> None:
        self._statements = statements
        self._before = self._at = (0, sha256())

    def of(self, count: int) -> bytes:
        """Return the checksum of the first `count` statements."""
        return at_once(self.computing(count))

    def computing(self, count: int) -> Slices[bytes]:
        """Return it in slices; the work of `of`."""
        if count == self._before[0]:
            return self._before[1].digest()
        if count != self._at[0]:
            known, digest = self._at if self._at[0] < count else (0, sha256())
            digest = digest.copy()
            for number in range(known, count):
                text = self._statements[number].text.encode().replace(b"\r\n", b"\n")
                digest.update(b"\0" + text if number else text)
                yield
            self._before, self._at = self._at, (count, digest)
        return self._at[1].digest()


def resumption(migration: Migration, row: AppliedMigration) -> Resumption | None:
    """Return where to go on with an interrupted migration; None if that is not provably safe.

    It is when the file still runs statement by statement, every statement that was done stands in it unchanged and has
    made nothing temporary that the others mention, and the one that was begun stands unchanged as well, and can either
    be run again or leaves traces by which to tell whether it must be.
    """
    return at_once(resuming(migration, row))


def resuming(migration: Migration, row: AppliedMigration) -> Slices[Resumption | None]:
    """Return it in slices; the work of `resumption`."""
    from .sql.kinds import Kind, kind
    from .sql.splitter import splitting

    if _runs_in_a_transaction(migration):
        return None
    statements = yield from splitting(migration.sql)
    done = row.statements_done
    if not 0 <= done <= len(statements):
        return None
    if (yield from binding_to_session(statements, done)):
        return None
    checksums = DoneChecksums(statements)
    if row.done_checksum == (yield from checksums.computing(done)):
        return Resumption(done, in_doubt=False)
    begun = min(done + 1, len(statements))
    if row.done_checksum is None:
        unchanged = migration.checksum == row.checksum
    else:
        unchanged = row.done_checksum == (yield from checksums.computing(begun))
    if not unchanged or (begun > done and kind(statements[done]) is Kind.NOT_RESUMABLE):
        return None
    return Resumption(done, in_doubt=begun > done)


def binding_to_session(statements: Statements, done: int) -> Slices[bool]:
    """Return, in slices, whether a remaining statement mentions a temporary object that an executed one created.

    In a new session it could find another object of that name.
    """
    from .sql.kinds import mentions, temporary

    gone: set[str] = set()
    for number in range(done):
        if name := temporary(statements[number]):
            gone.add(name)
        yield
    for number in range(done, len(statements)) if gone else ():
        statement = statements[number]
        if any(mentions(statement, name) for name in gone):
            return True
        yield
    return False


def _runs_in_a_transaction(migration: Migration) -> bool:
    try:
        return not directives(migration.sql).no_transaction
    except DirectiveError:
        return False  # it is refused for that later, with the line
