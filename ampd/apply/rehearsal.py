"""Rehearsing: every pending transactional migration for real, in one transaction that is rolled back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import anyio
import msgspec

from ampd import sqlstates
from ampd.display import one_line
from ampd.errors import AmpdError, ConnectionFailed, MigrationInterrupted
from ampd.postgres.failures import SESSION_LIMITS, malformed_error
from ampd.postgres.server_error import ServerError
from ampd.sql.slices import in_slices

from .message import Message
from .rehearsal_message import composing
from .rehearsal_report import Lock, Rehearsal, RehearsedMigration, SkippedMigration, Table, held_locks
from .session_state import BEYOND_ROLLBACK
from .table_locks import with_lock_retries
from .tracker import StatementTracker
from .transaction import refused_error
from .transaction_message import parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ampd.postgres.connection import Session
    from ampd.postgres.database import Database

    from .prepared import Execution


_END_SECS = 1.0  # for a statement to end when it is cancelled; after that the connection is closed
_OUTSIDE = "it runs outside of a transaction, and cannot be rolled back"
# What a migration may lack that one before it, which was not rehearsed, would have made.
_UNDEFINED = (
    sqlstates.UNDEFINED_TABLE,
    sqlstates.UNDEFINED_COLUMN,
    sqlstates.UNDEFINED_OBJECT,
    sqlstates.UNDEFINED_FUNCTION,
)


class _NotRehearsable(Exception):
    """A migration cannot be rehearsed; the transaction is aborted."""


class _Tracker(StatementTracker):
    """Where the server is, and the documents that it has noted on the way."""

    def __init__(self, session: Session, execution: Execution) -> None:
        super().__init__(session, execution)
        self.documents: list[str] = []

    def __call__(self, note: str) -> None:
        if note.startswith("["):
            self.documents.append(note)
        else:
            super().__call__(note)


class _Rehearsing:
    """One rehearsal: the migration that it is at, and what it has found."""

    def __init__(self, executions: Sequence[Execution], secs: float) -> None:
        self._executions = executions
        self._secs = secs
        self.current = executions[0]
        self._begun = False
        self._tables: dict[int, Table] = {}
        self._files: dict[int, int | None] = {}
        self.migrations: list[RehearsedMigration] = []
        self.skipped: list[SkippedMigration] = []

    async def attempt(self, session: Session) -> None:
        """Run them all; the transaction stays open.

        Raises:
            LockTaken: another runner has the lock.
            LockUnavailable: a table lock was not acquired in time.
            AmpdError: a migration failed.
        """
        history = self.current.history
        for number, each in enumerate(self._executions):
            if each.directives.no_transaction:
                self._skip(each, _OUTSIDE)
                continue
            self.current = msgspec.structs.replace(each, history=history)
            try:
                await self._run(session, self.current)
            except _NotRehearsable as why:
                self._skip(each, str(why))
                for rest in self._executions[number + 1 :]:
                    self._skip(rest, f"it comes after {each.migration.label}")
                return
            history = history.with_rows([self.current.as_applied()])

    def _skip(self, execution: Execution, reason: str) -> None:
        self.skipped.append(SkippedMigration(execution.migration.version, execution.migration.name, reason))

    async def _run(self, session: Session, execution: Execution) -> None:
        message, tracker = Message(), _Tracker(session, execution)
        try:
            for part in parts(execution.statements):
                message = await in_slices(composing(session, execution, part, first=not self._begun, secs=self._secs))
                self._begun = True
                await session.run(str(message), on_note=tracker)
        except ServerError as error:
            if why := self._reason(error, execution, tracker.running):
                raise _NotRehearsable(why) from error
            counts_bytes = session.counts_bytes
            raise refused_error(error, execution, message, tracker.running, counts_bytes=counts_bytes) from error
        try:
            tables, entered = msgspec.json.decode(tracker.documents[0], type=tuple[list[Table], int])
            left, locks = msgspec.json.decode(tracker.documents[-1], type=tuple[int, list[Lock]])
        except (IndexError, ValueError) as error:
            raise malformed_error(error) from error
        self._tables = self._tables or {table.oid: table for table in tables}
        held = held_locks(self._tables, self._files, locks)
        migration = execution.migration
        self.migrations.append(RehearsedMigration(migration.version, migration.name, left - entered, held))

    def _reason(self, error: ServerError, execution: Execution, running: int) -> str | None:
        """Return why a failure is the rehearsal's and perhaps not the migration's; None for a fault."""
        if self.migrations and error.sqlstate == sqlstates.UNSAFE_NEW_ENUM_VALUE_USAGE:
            added = re.findall(r"(?i)\badd\s+value\s+(?:if\s+not\s+exists\s+)?'([^']+)'", execution.migration.sql)
            if not any(value in error.message for value in added):
                return "it uses an enum value that a migration before it adds, which has to be committed first"
        if self.skipped and running >= 0 and error.sqlstate in _UNDEFINED:
            missed = self.skipped[-1]
            return f"without {missed.version} {one_line(missed.name)} the server says: {one_line(error.message)}"
        return None


def _is_of_the_server(error: AmpdError) -> bool:
    """Return whether an error is how the server itself ends what takes too long."""
    return isinstance(error, ConnectionFailed) or error.sqlstate in (sqlstates.QUERY_CANCELED, *SESSION_LIMITS)


async def rehearse(
    database: Database, session: Session, executions: Sequence[Execution], secs: float, shown: str
) -> Rehearsal:
    """Run migrations in one transaction for at most so many seconds, roll it back, and return what it held.

    Raises:
        LockTaken: another runner has the lock, or has changed the history.
    """
    rehearsing = _Rehearsing(executions, secs)
    error: AmpdError | None = None
    limit = anyio.move_on_after(secs)
    try:
        with limit:
            await with_lock_retries(database, session, lambda: rehearsing.current, rehearsing.attempt)
    except AmpdError as failure:
        error = failure
    finally:
        ended = await session.recover(BEYOND_ROLLBACK, timeout=_END_SECS if limit.cancelled_caught else None)
    if limit.cancelled_caught or (error and anyio.current_time() >= limit.deadline and _is_of_the_server(error)):
        current = rehearsing.current.migration
        how = "everything was rolled back"
        if limit.cancelled_caught and not ended:
            how = "its statement did not end, so the connection was closed: the server rolls back once it notices"
        error = MigrationInterrupted(
            f"the rehearsal was ended after {secs:g} s, in {current.label}: its locks stand in the way of others",
            hint=f"{how}; --rehearse-secs takes another limit",
        )
        error.version, error.file = current.version, current.file
    return Rehearsal(shown, tuple(rehearsing.migrations), tuple(rehearsing.skipped), error)
