"""Applying one migration in one transaction and one message: the lock, the history row, the script, the commit."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

from ampd import advisory_lock
from ampd.errors import AmpdError, ConnectionFailed, MigrationFailed
from ampd.history import refusals, table, writing
from ampd.plan import Resolution
from ampd.postgres.failures import ABOUT_THE_CONNECTION, translated_error
from ampd.postgres.quoting import do_block
from ampd.postgres.server_error import ServerError
from ampd.sql import scanner, splitter
from ampd.sql.slices import in_slices
from ampd.sqlstates import DEADLOCK_DETECTED, ESCAPED, LOCK_NOT_AVAILABLE

from . import session_state
from .diagnosis import UNREAD, migration_error
from .location import location_of
from .message import Message
from .session_state import (
    BEYOND_ROLLBACK,
    NO_TRANSACTION_TIMEOUT,
    NOTICE_A_DEAD_CLIENT,
    RUN_DEFERRED,
    reset_session_sql,
    save_settings_sql,
    set_role_sql,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ampd.history.table import History
    from ampd.plan import MigrationInfo
    from ampd.postgres.connection import Session
    from ampd.sql.slices import Slices

    from .prepared import Execution


NOTHING_KEPT = "nothing of this migration was kept"
ROLLED_BACK = f"{NOTHING_KEPT}: fix the file and run again"


class LockUnavailable(Exception):
    """A lock was not acquired in time, or there was a deadlock; the transaction is rolled back."""

    def __init__(self, error: AmpdError) -> None:
        super().__init__(error.message)
        self.error = error


async def apply_in_transaction(session: Session, execution: Execution) -> None:
    """Apply one migration in one round trip; a large one in several messages of one transaction.

    Raises:
        LockTaken: another runner has the lock; nothing was done.
        LockUnavailable: worth another attempt; nothing was done.
        AmpdError: the migration failed; nothing of it is left.
    """
    message, tracker = Message(), StatementTracker(session, execution)
    try:
        for part in parts(execution.statements):
            message = await in_slices(_composing(session, execution, part, tracker.transaction or ""))
            tracker.running = -1
            await session.run(str(message), on_note=tracker, on_event=execution.on_event)
    except BaseException as error:
        await session.recover(BEYOND_ROLLBACK)
        if isinstance(error, ServerError):
            raise refused_error(
                error, execution, message, tracker.running, counts_bytes=session.counts_bytes
            ) from error
        raise


LARGE = 1_000_000  # characters of SQL; what is longer goes in several messages, which bounds memory on either side
_PART = 256 * 1024  # characters of SQL in each of those, and what is left of the last statement


def parts(statements: splitter.Statements) -> Iterator[range]:
    """Yield the numbers of the statements that go into each message of a transaction: mostly all of them into one."""
    count = len(statements)
    first, begin, end = 0, statements.start(0) if count else 0, statements.end(-1) if count else 0
    for border in range(begin + _PART, end, _PART) if end - begin > LARGE else ():
        past = statements.before(border)
        if first < past < count:
            yield range(first, past)
            first = past
    yield range(first, count)


def stay_in_transaction_sql() -> str:
    """Return a PL/pgSQL statement that limits how long the client may be silent between two messages."""
    lease = f"{session_state.LEASE_SECS}s"
    return f"PERFORM pg_catalog.set_config('idle_in_transaction_session_timeout', '{lease}', true);"


RESET_CLIENT_ENCODING = "SET LOCAL client_encoding = 'UTF8'; "  # whatever the script has set


def note_transaction_sql(session: Session) -> str:
    """Return a PL/pgSQL statement that tells `StatementTracker` which transaction it is."""
    return session.note_sql("pg_catalog.concat('transaction ', pg_catalog.pg_current_xact_id())")


def check_transaction_sql(transaction: str) -> str:
    """Return a statement that begins a further message: it fails if the script has ended the transaction."""
    # IS DISTINCT FROM would take the operator of the search path that the script has left.
    current = "COALESCE(pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text, '')"
    return do_block(f"""BEGIN
  IF {current} OPERATOR(pg_catalog.<>) '{transaction}' THEN
    RAISE EXCEPTION 'the migration ended its own transaction' USING ERRCODE = '{ESCAPED}';
  END IF;
END""")


async def resolve(session: Session, history: History, info: MigrationInfo, resolution: Resolution) -> None:
    """Record, under the lock, what became of an interrupted migration.

    Raises:
        LockTaken: another runner has the lock.
    """
    statements = len(await in_slices(splitter.splitting(info.migration.sql))) if info.migration else 0
    applied = resolution is Resolution.APPLIED
    await record(
        session, history, writing.resolve_sql(history, info.version, info.migration, statements, applied=applied)
    )


async def record(session: Session, history: History, part: str) -> None:
    """Run a part of `enter_sql` under the lock, in a transaction of its own.

    Raises:
        LockTaken: another runner has the lock, or has added to the history.
    """
    refusals.check_writable(history)
    body = f"BEGIN {advisory_lock.try_lock_sql(history.lock_key)}{writing.enter_sql(history, part)} END"
    try:
        await session.run(
            "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '10s'; "
            f"{set_role_sql(history.role, local=True)}{do_block(body)}; COMMIT"
        )
    except ServerError as error:
        await session.recover()
        raise refusals.refusal_error(error, history) or translated_error(error) from error


LOCK_ACQUIRED = "lock"


def note_lock_sql(session: Session) -> str:
    """Return a PL/pgSQL statement that tells `StatementTracker` that the lock is ours and the migration begun."""
    return session.note_sql(f"'{LOCK_ACQUIRED}'")


_LONGEST_NOTE = 40  # characters: no number of ours has more digits


class StatementTracker:
    """Which statement of a message the server is at, by the notes that it sends."""

    def __init__(self, session: Session, execution: Execution, running: int = -1) -> None:
        self._session = session
        self._execution = execution
        self.running = running  # the statement's index; -1 in our own preamble, and one past the last at the end
        self.transaction: str | None = None  # which one it is, where that was asked for

    def __call__(self, note: str) -> None:
        """Take one note; what is none of ours, from somebody who knows the nonce, is ignored."""
        if len(note) > _LONGEST_NOTE:
            return
        match note.split(" "):
            case ["pid", number] if number.isdecimal():
                self._session.backend_pid = int(number)
            case ["transaction", number] if number.isdecimal():
                self.transaction = self.transaction or number  # the first is from before the script
            case [number] if number.isdecimal():
                self.running = int(number)
                statements = self._execution.statements
                if self.running < len(statements):
                    self._execution.running.statement(self.running, statements.line(self.running))
            case _ if note == LOCK_ACQUIRED:
                self._execution.running.start()


def _composing(session: Session, execution: Execution, part: range, transaction: str) -> Slices[Message]:
    """Return, in slices, the message that runs a part of the script: the first opens a transaction, the last commits.

    In between, `transaction` is the one that it must still be.
    """
    statements = execution.statements
    message = Message(f"{advisory_lock.label_sql(execution.history.lock_key, execution.migration.label)} ")
    if part.start == 0:
        _enter(message, session, execution, several=part.stop < len(statements))
    else:
        message.add(f"{check_transaction_sql(transaction)};\n")
    for number in part:
        statement = statements[number]
        message.add(f"{session.marker_sql(str(number))}; ")
        message.add_statement(statement)
        message.add(execution.again_after_sql(statement, local=True))
        yield
    if part.stop == len(statements):
        _leave(message, session, execution)
    else:
        message.add(RESET_CLIENT_ENCODING)
    message.join()
    yield
    return message


def _enter(message: Message, session: Session, execution: Execution, *, several: bool) -> None:
    history, migration = execution.history, execution.migration
    goes_on = f"{stay_in_transaction_sql()} {note_transaction_sql(session)}" if several else ""
    try_lock = advisory_lock.try_lock_sql(history.lock_key)
    enter = f"""BEGIN {session.note_pid_sql()}{NOTICE_A_DEAD_CLIENT}{NO_TRANSACTION_TIMEOUT}{try_lock}
  {writing.enter_sql(history, writing.insert_sql(history, migration))}{execution.search_path_sql(local=True)}
  {goes_on}{note_lock_sql(session)}
END"""
    message.add("BEGIN ISOLATION LEVEL READ COMMITTED; ")
    if session.shared:
        message.add(f"{do_block(f'BEGIN {save_settings_sql(local=True)} END')}; ")
    # The limit on the script's statements is not meant for ours.
    message.add(f"{execution.limits_sql()}SET LOCAL statement_timeout = 0; {set_role_sql(history.role, local=True)}")
    message.add(f"{do_block(enter)}; {execution.limits_sql()}\n")


def _leave(message: Message, session: Session, execution: Execution) -> None:
    count = len(execution.statements)
    message.add(f"{session.marker_sql(str(count))}; {RUN_DEFERRED}")
    message.add(f"{reset_session_sql(shared=session.shared, saved=True)}{execution.limits_sql()}")
    message.add(
        f"{set_role_sql(execution.history.role, local=True)}"
        f"{writing.finish_sql(execution.history, execution.migration, count)}; COMMIT"
    )


def refused_error(
    error: ServerError, execution: Execution, message: Message, running: int, *, counts_bytes: bool = False
) -> Exception:
    """Return the error for what the server refused: our own preamble, a statement of the script, or the end."""
    refused = partial(migration_error, error, execution.migration, statements=execution.statements)
    offset = message.script_offset(error.position, counts_bytes=counts_bytes) if error.position else None
    if error.sqlstate == ESCAPED:
        return refused(None, None, aftermath=ROLLED_BACK)
    if running < 0 and offset is None:
        away = refusals.refusal_error(error, execution.history)
        if away is not None:
            return away
        if error.sqlstate in UNREAD:
            return refused(None, None, aftermath=ROLLED_BACK)
        if error.sqlstate not in (LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED):
            known = translated_error(error)
            ours = type(known) is ConnectionFailed and error.sqlstate[:2] not in ABOUT_THE_CONNECTION
            return refusals.unwritable_error(error, execution.history) if ours else known
    at_end = running >= len(execution.statements)
    if at_end and (harm := refusals.harm(error, execution.history)):
        return harm_error(harm, error, execution, None, aftermath=ROLLED_BACK)
    statement = None if at_end or running < 0 else execution.statements[running]
    if error.sqlstate in (LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED):
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
        places = (found.start() for found in re.finditer(table.TABLE, migration.sql, re.IGNORECASE))
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
