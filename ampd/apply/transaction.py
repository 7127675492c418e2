"""Applying one migration in one transaction and one message: the turn, the history row, the script, the commit."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

from ampd import advisory_lock
from ampd.errors import AmpdError, ConnectionFailed, MigrationFailed
from ampd.history import refusals, table, writing
from ampd.plan import Settlement
from ampd.postgres.failures import ABOUT_THE_CONNECTION, translate
from ampd.postgres.quoting import do_block
from ampd.postgres.server_error import ServerError
from ampd.sql import kinds, location, scanner, splitter
from ampd.sql.slices import in_slices

from . import session_state
from .diagnosis import (
    CHARACTER_NOT_IN_REPERTOIRE,
    DEADLOCK_DETECTED,
    LOCK_NOT_AVAILABLE,
    UNTRANSLATABLE_CHARACTER,
    failure,
)
from .message import Message
from .session_state import (
    BEYOND_ROLLBACK,
    NO_TRANSACTION_TIMEOUT,
    NOTICE_A_DEAD_CLIENT,
    RUN_DEFERRED,
    leave_no_trace,
    remember,
    take_on,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ampd.history.table import History
    from ampd.plan import Step
    from ampd.postgres.connection import Session
    from ampd.sql.slices import Slices

    from .prepared import Job


NOTHING_KEPT = "nothing of this migration was kept"
ROLLED_BACK = f"{NOTHING_KEPT}: fix the file and run again"


class LockUnavailable(Exception):
    """A lock could not be had in time, or a deadlock went against us; the transaction is rolled back."""

    def __init__(self, error: AmpdError) -> None:
        super().__init__(error.message)
        self.error = error


async def apply_in_transaction(session: Session, job: Job) -> None:
    """Apply one migration in one round trip; a large one in several messages of one transaction.

    Raises:
        TurnTaken: somebody else is at it; nothing was done.
        LockUnavailable: worth another attempt; nothing was done.
        AmpdError: the migration failed; nothing of it is left.
    """
    message, course = Message(), Course(session, job)
    try:
        for part in parts(job.script.statements):
            message = await in_slices(_composing(session, job, part, course.transaction or ""))
            course.running = -1
            await session.run(str(message), on_note=course, on_event=job.on_event)
    except BaseException as error:
        await session.recover(BEYOND_ROLLBACK)
        if isinstance(error, ServerError):
            raise meaning(error, job, message, course.running, counts_bytes=session.counts_bytes) from error
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


def stay_in_transaction() -> str:
    """Return a PL/pgSQL statement that lets the client be slow between two messages, but not be gone."""
    lease = f"{session_state.LEASE_SECS}s"
    return f"PERFORM pg_catalog.set_config('idle_in_transaction_session_timeout', '{lease}', true);"


AS_THE_NEXT_IS_SENT = "SET LOCAL client_encoding = 'UTF8'; "  # whatever the script has set


def note_transaction(session: Session) -> str:
    """Return a PL/pgSQL statement that tells `Course` which transaction it is."""
    return session.note("pg_catalog.concat('transaction ', pg_catalog.pg_current_xact_id())")


def insist_on_transaction(transaction: str) -> str:
    """Return a statement that begins a further message: what the one before has ended must not go on outside of it."""
    return do_block(f"""BEGIN
  IF pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text IS DISTINCT FROM '{transaction}' THEN
    RAISE EXCEPTION 'the migration ended the transaction that it ran in' USING ERRCODE = '{table.ESCAPED}';
  END IF;
END""")


async def settle(session: Session, history: History, step: Step, settlement: Settlement) -> None:
    """Write down in one turn what became of an interrupted migration.

    Raises:
        TurnTaken: somebody else is at it.
    """
    refusals.refuse_to_write(history)
    statements = len(await in_slices(splitter.splitting(step.migration.sql))) if step.migration else 0
    applied = settlement is Settlement.APPLIED
    settled = writing.settle(history, step.version, step.migration, statements, applied=applied)
    body = f"BEGIN {advisory_lock.try_lock_sql(history.lock_key)}{writing.enter(history, settled)} END"
    try:
        await session.run(
            "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '10s'; "
            f"{take_on(history.role, local=True)}{do_block(body)}; COMMIT"
        )
    except ServerError as error:
        await session.recover()
        raise refusals.turned_away(error, history) or translate(error) from error


LOCK_HAD = "lock"


def note_lock(session: Session) -> str:
    """Return a PL/pgSQL statement that tells `Course` that the lock is ours and the migration begun."""
    return session.note(f"'{LOCK_HAD}'")


class Course:
    """Where the server is in a message, by the notes that it sends on its way."""

    def __init__(self, session: Session, job: Job, running: int = -1) -> None:
        self._session = session
        self._job = job
        self.running = running  # the statement's index; -1 in our own preamble, and one past the last at the end
        self.transaction: str | None = None  # which one it is, where that was asked for

    def __call__(self, note: str) -> None:
        """Take one note; what is none of ours is a server's or a function's that knows the mark, and is passed over."""
        match note.split(" "):
            case ["pid", number] if number.isdecimal():
                self._session.backend_pid = int(number)
            case ["transaction", number] if number.isdecimal():
                self.transaction = self.transaction or number  # the first is from before the script
            case [number] if number.isdecimal():
                self.running = int(number)
                statements = self._job.script.statements
                if self.running < len(statements):
                    self._job.running.statement(self.running, statements.line(self.running))
            case _ if note == LOCK_HAD:
                self._job.running.start()


def _composing(session: Session, job: Job, part: range, transaction: str) -> Slices[Message]:
    """Compose, in slices, the message that runs a part of the script: the first opens a transaction, the last commits.

    In between, `transaction` is the one that it must still be.
    """
    statements = job.script.statements
    message = Message(f"{advisory_lock.label_sql(job.history.lock_key, job.script.migration.label)} ")
    if part.start == 0:
        _enter(message, session, job, several=part.stop < len(statements))
    else:
        message.add(f"{insist_on_transaction(transaction)};\n")
    for number in part:
        statement = statements[number]
        message.add(f"{session.marker(str(number))}; ")
        message.add_statement(statement)
        message.add(job.set_again_after(statement, local=True))
        yield
    if part.stop == len(statements):
        _leave(message, session, job)
    else:
        message.add(AS_THE_NEXT_IS_SENT)
    message.join()
    yield
    return message


def _enter(message: Message, session: Session, job: Job, *, several: bool) -> None:
    history, migration = job.history, job.script.migration
    goes_on = f"{stay_in_transaction()} {note_transaction(session)}" if several else ""
    try_lock = advisory_lock.try_lock_sql(history.lock_key)
    enter = f"""BEGIN {session.note_pid()}{NOTICE_A_DEAD_CLIENT}{NO_TRANSACTION_TIMEOUT}{try_lock}
  {writing.enter(history, writing.insert(history, migration))}{job.set_path(local=True)}
  {goes_on}{note_lock(session)}
END"""
    message.add("BEGIN ISOLATION LEVEL READ COMMITTED; ")
    if session.shared:
        message.add(f"{do_block(f'BEGIN {remember(local=True)} END')}; ")
    # The limit on the script's statements is not meant for ours.
    message.add(f"{job.set_limits()}SET LOCAL statement_timeout = 0; {take_on(history.role, local=True)}")
    message.add(f"{do_block(enter)}; {job.set_limits()}\n")


def _leave(message: Message, session: Session, job: Job) -> None:
    count = len(job.script.statements)
    message.add(f"{session.marker(str(count))}; {RUN_DEFERRED}")
    message.add(f"{leave_no_trace(shared=session.shared, remembered=True)}{job.set_limits()}")
    message.add(
        f"{take_on(job.history.role, local=True)}{writing.finish(job.history, job.script.migration, count)}; COMMIT"
    )


def meaning(error: ServerError, job: Job, message: Message, running: int, *, counts_bytes: bool = False) -> Exception:
    """Tell apart what the server refused: our own preamble, a statement of the script, or the end."""
    script = job.script
    refused = partial(failure, error, script.migration, statements=script.statements)
    offset = message.script_offset(error.position, counts_bytes=counts_bytes) if error.position else None
    if error.sqlstate == table.ESCAPED:
        return refused(None, None, aftermath=ROLLED_BACK)
    if running < 0 and offset is None:
        away = refusals.turned_away(error, job.history)
        if away is not None:
            return away
        # Refused while still being read, and without a position.
        if error.sqlstate in (CHARACTER_NOT_IN_REPERTOIRE, UNTRANSLATABLE_CHARACTER):
            escapes = error.sqlstate == CHARACTER_NOT_IN_REPERTOIRE
            sent = (script.statements[number] for number in map(script.statements.before, message.starts()))
            escaped = next(filter(kinds.has_byte_escape, sent), None) if escapes else None
            return refused(escaped, None, aftermath=ROLLED_BACK)
        if error.sqlstate not in (LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED):
            known = translate(error)
            ours = type(known) is ConnectionFailed and error.sqlstate[:2] not in ABOUT_THE_CONNECTION
            return refusals.unwritable(error, job.history) if ours else known
    at_end = running >= len(script.statements)
    if at_end and (harm := refusals.harm(error, job.history)):
        return harmed(harm, error, job, None, aftermath=ROLLED_BACK)
    statement = None if at_end or running < 0 else script.statements[running]
    if error.sqlstate in (LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED):
        return LockUnavailable(refused(statement, offset, aftermath=NOTHING_KEPT))
    return refused(statement, offset, aftermath=ROLLED_BACK)


def harmed(
    harm: str, error: ServerError, job: Job, statement: scanner.Statement | None, *, aftermath: str
) -> MigrationFailed:
    """Return the error for a migration after which our own history is not what it was.

    Where it is not known which statement did that, it is the one that names the history, if there is such a one.
    """
    migration = job.script.migration
    if statement is None:
        places = (found.start() for found in re.finditer(table.TABLE, migration.sql, re.IGNORECASE))
        naming = {number for place in places if (number := job.script.statements.at(place)) is not None}
        statement = job.script.statements[naming.pop()] if len(naming) == 1 else None
    line, column = location.locate(migration.sql, statement.start) if statement else (None, None)
    return MigrationFailed(
        f"{migration.file}{f':{line}' if line else ''}: {harm}",
        hint=f"leave that table to ampd, also where a statement goes over all tables; {aftermath}",
        version=migration.version,
        file=migration.file,
        line=line,
        column=column,
        sqlstate=error.sqlstate,
        excerpt=location.excerpt(migration.sql, statement.start, file=migration.file) if statement else None,
    )
