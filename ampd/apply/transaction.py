"""Applying migrations, each in one transaction: the lock, the history row, the script, the commit."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

from ampd.errors import AmpdError, ConnectionFailed, MigrationFailed
from ampd.history import refusals, writing
from ampd.postgres.failures import ABOUT_THE_CONNECTION, translated_error
from ampd.postgres.server_error import ServerError
from ampd.sql.slices import in_slices
from ampd.sqlstates import (
    DEADLOCK_DETECTED,
    ESCAPED,
    INVALID_SAVEPOINT_SPECIFICATION,
    INVALID_SQL_STATEMENT_NAME,
    LOCK_NOT_AVAILABLE,
    NO_ACTIVE_SQL_TRANSACTION,
    OPERATOR_INTERVENTION,
)

from .background import in_background
from .diagnosis import UNREAD, migration_error
from .location import location_of
from .message import Message
from .session_state import BEYOND_ROLLBACK
from .tracker import BatchTracker
from .transaction_message import composing, ending_sql, parts

if TYPE_CHECKING:
    from ampd.postgres.connection import Session
    from ampd.sql import scanner

    from .batch import Batch
    from .prepared import Execution


# Where a message ends after fewer migrations, a whole check for each of the rest costs less than to send these again.
_FEW = 20
# What going back to our savepoint is refused with, where the error came before it or after: of a deferred constraint.
_NO_SAVEPOINT = (INVALID_SAVEPOINT_SPECIFICATION, NO_ACTIVE_SQL_TRANSACTION)
NOTHING_KEPT = "nothing of this migration was kept"
ROLLED_BACK = f"{NOTHING_KEPT}: fix the file and run again"


class LockUnavailable(Exception):
    """A lock was not acquired in time, or there was a deadlock; the transaction is rolled back."""

    def __init__(self, error: AmpdError) -> None:
        super().__init__(error.message)
        self.error = error


async def apply_transactions(session: Session, batch: Batch) -> None:
    """Apply what is left of a batch, each migration in a transaction: many in a message, a large one in several.

    Raises:
        LockTaken: another runner has the lock; the current migration of the batch has left nothing.
        LockUnavailable: worth another attempt; the same.
        AmpdError: the current migration failed; nothing of it is left.
    """
    following = _Following(session, batch)
    while batch.done < len(batch):
        await session.reopen()  # it may not have answered when the last message was rolled back
        await _apply_next(session, batch, following)


class _Following:
    """The message after the one that the server is at work on, composed meanwhile."""

    def __init__(self, session: Session, batch: Batch) -> None:
        self._session = session
        self._batch = batch
        self._composed: Message | None = None

    async def compose(self, start: int) -> None:
        """Compose the message that begins with a migration; a large one's are composed when they are sent."""
        if self._composed is None and start < len(self._batch):
            numbers = self._batch.next_message(start)
            if _parts(self._batch, numbers) == [None]:
                self._composed = await in_slices(composing(self._session, self._batch, numbers))

    def take(self) -> Message | None:
        """Return what is composed, if it is, and forget it."""
        composed, self._composed = self._composed, None
        return composed


async def _apply_next(session: Session, batch: Batch, following: _Following) -> None:
    """Apply those that go into the next message; where it ends early, for no fault of theirs, the rest is left."""
    numbers, tracker = batch.next_message(batch.done), BatchTracker(session, batch)
    message, composed = Message(), following.take()
    try:
        for part in _parts(batch, numbers):
            if composed is not None:
                message = composed
            else:
                message = await in_slices(composing(session, batch, numbers, part, tracker.transaction or ""))
            tracker.running = -1
            try:
                async with in_background(partial(following.compose, numbers.stop)):
                    await session.run(str(message), on_note=tracker, on_event=batch.current().on_event)
            except ServerError as error:
                await _end_from_savepoint(session, batch, error)
                numbers = range(numbers.start, batch.done + 1)
                batch.whole_checks = len(numbers) < _FEW
                following.take()  # it begins with another migration
    except BaseException as error:
        following.take()
        await session.recover(BEYOND_ROLLBACK)
        if not isinstance(error, ServerError):
            raise
        if not _can_go_on_after(error, session, batch, numbers, begun=tracker.begun):
            running, counts_bytes = tracker.running, session.counts_bytes
            raise refused_error(error, batch.current(), message, running, counts_bytes=counts_bytes) from error
    else:
        batch.reach(numbers.stop)


def _parts(batch: Batch, numbers: range) -> list[range | None]:
    """Return the parts of the only migration of a message that is too large for one; else None alone."""
    pieces = list(parts(batch[numbers.start].statements)) if len(numbers) == 1 else []
    return [*pieces] if len(pieces) > 1 else [None]


async def _end_from_savepoint(session: Session, batch: Batch, error: ServerError) -> None:
    """End a migration with the whole check where a prepared statement could not; raise any other error again."""
    stopped = session.is_closed() or error.sqlstate[:2] == OPERATOR_INTERVENTION
    if stopped or batch.whole_checks or not batch.at_end:
        raise error
    try:
        await session.run(ending_sql(session, batch), on_event=batch.current().on_event)
    except ServerError as said:
        raise error if said.sqlstate in _NO_SAVEPOINT else said from None


def _can_go_on_after(error: ServerError, session: Session, batch: Batch, numbers: range, *, begun: bool) -> bool:
    """Return whether a batch can go on, since no migration is to blame; set how its messages are made from now on."""
    if begun and not batch.whole_checks and _is_about_prepared(error, session):
        # The next message begins here, with a whole check.
        batch.whole_checks = batch.at_end or batch.done - numbers.start < _FEW
        return True
    together, batch.one_by_one = not batch.one_by_one and len(numbers) > 1, True
    return together and not begun  # the server reads a message whole before it runs any of it


def _is_about_prepared(error: ServerError, session: Session) -> bool:
    """Return whether what is prepared has found that something is not as it was, or was dropped by a script."""
    dropped = error.sqlstate == INVALID_SQL_STATEMENT_NAME and session.prefix in error.message
    return dropped or writing.found_change(error, session.prefix)


def refused_error(
    error: ServerError,
    execution: Execution,
    message: Message | None = None,
    running: int = -1,
    *,
    counts_bytes: bool = False,
) -> Exception:
    """Return the error for what the server refused: our own preamble, a statement of the script, or the end.

    `running` is the index of the statement that it was at: -1 in the preamble, one past the last at the end. A message
    without statements of the script need not be given.
    """
    refused = partial(migration_error, error, execution.migration, statements=execution.statements, ended=running >= 0)
    offset = message.script_offset(error.position, counts_bytes=counts_bytes) if message and error.position else None
    at_end = running >= len(execution.statements)
    was_blocked = error.sqlstate in (LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED)
    if at_end and error.sqlstate == NO_ACTIVE_SQL_TRANSACTION:  # which is what our SAVEPOINT wants
        error.message, error.sqlstate = "the migration ended its own transaction", ESCAPED
    if error.sqlstate == ESCAPED:
        return refused(None, None, aftermath=ROLLED_BACK)
    if running < 0 and offset is None:
        if refusal := refusals.refusal_error(error, execution.history):
            return refusal
        if error.sqlstate in UNREAD:
            return refused(None, None, aftermath=ROLLED_BACK)
        if not was_blocked:
            known = translated_error(error)
            # That is what it makes of an error which it does not know.
            ours = type(known) is ConnectionFailed and error.sqlstate[:2] not in ABOUT_THE_CONNECTION
            return refusals.unwritable_error(error, execution.history) if ours else known
    if at_end and (harm := refusals.harm(error, execution.history)):
        return harm_error(harm, error, execution, None, aftermath=ROLLED_BACK)
    statement = None if at_end or running < 0 else execution.statements[running]
    if was_blocked:
        return LockUnavailable(refused(statement, offset, aftermath=NOTHING_KEPT))
    return refused(statement, offset, aftermath=ROLLED_BACK)


def harm_error(
    harm: str, error: ServerError, execution: Execution, statement: scanner.Statement | None, *, aftermath: str
) -> MigrationFailed:
    """Return the error for a migration that has changed the history table.

    If `statement` is None, the error shows the only one that names the table, if there is one.
    """
    migration = execution.migration
    if statement is None:
        named = re.escape(execution.history.place.table)
        places = (found.start() for found in re.finditer(named, migration.sql, re.IGNORECASE))
        naming = {number for place in places if (number := execution.statements.at(place)) is not None}
        statement = execution.statements[naming.pop()] if len(naming) == 1 else None
    found = location_of(migration, statement.start if statement else None)
    line = f":{found['line']}" if statement else ""
    return MigrationFailed(
        f"{migration.file}{line}: {harm}",
        hint=f"leave that table and its schema as they are, also where a statement goes over all tables; {aftermath}",
        sqlstate=error.sqlstate,
        **found,
    )
