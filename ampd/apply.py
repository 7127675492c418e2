"""Applying one migration in one transaction and one message: the turn, the history row, the script, the commit."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from . import history as sql_of
from . import record, sql
from .diagnose import (
    CHARACTER_NOT_IN_REPERTOIRE,
    DEADLOCK_DETECTED,
    LOCK_NOT_AVAILABLE,
    UNTRANSLATABLE_CHARACTER,
    Message,
    failure,
)
from .errors import AmpdError, ConnectionFailed, MigrationFailed
from .migration import Directives, Migration
from .plan import Settlement
from .postgres import ABOUT_THE_CONNECTION, ServerError, do_block, identifier, literal, translate
from .slices import in_slices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .config import Patience
    from .events import OnEvent
    from .history import History
    from .plan import Step
    from .postgres import Session
    from .slices import Slices
    from .telling import Running

NOTHING_KEPT = "nothing of this migration was kept"
ROLLED_BACK = f"{NOTHING_KEPT}: fix the file and run again"


class LockUnavailable(Exception):
    """A lock could not be had in time, or a deadlock went against us; the transaction is rolled back."""

    def __init__(self, error: AmpdError) -> None:
        super().__init__(error.message)
        self.error = error


class Script(msgspec.Struct, frozen=True):
    """One step of a plan, its file taken apart and found fit to run."""

    step: Step
    migration: Migration
    statements: sql.Statements
    directives: Directives
    cautions: tuple[sql.Caution, ...] = ()


class Job(msgspec.Struct, frozen=True):
    """A script, the history that it is to be added to, and how."""

    script: Script
    history: History
    schema: str | None  # as configured; None leaves the search path alone
    patience: Patience
    on_event: OnEvent
    running: Running

    @property
    def lock_timeout_secs(self) -> float:
        """Return how long one attempt may wait for a lock: as the file says, else as configured; 0 for no limit."""
        wish = self.script.directives.lock_timeout
        return self.patience.lock_timeout_secs if wish is None else wish

    @property
    def statement_timeout_secs(self) -> float:
        """Return how long one statement may run: as the file says, else as configured; 0 for no limit."""
        wish = self.script.directives.statement_timeout
        return self.patience.statement_timeout_secs if wish is None else wish

    def set_limits(self) -> str:
        """Return the statements that hold the rest of a transaction to its limits."""
        return (
            f"SET LOCAL lock_timeout = {milliseconds(self.lock_timeout_secs)}; "
            f"SET LOCAL statement_timeout = {milliseconds(self.statement_timeout_secs)}; "
        )

    def set_path(self, *, local: bool) -> str:
        """Return PL/pgSQL that puts the configured schema before the rest of the search path."""
        if self.schema is None:
            return ""
        front = literal(identifier(self.schema))
        path = "pg_catalog.current_setting('search_path')"
        return f"""
  PERFORM pg_catalog.set_config('search_path', CASE WHEN {path} OPERATOR(pg_catalog.=) '' THEN {front}
    ELSE pg_catalog.concat({front}, ', ', {path}) END, {str(local).lower()});"""

    def set_again_after(self, statement: sql.Statement, *, local: bool) -> str:
        """Return the statements that set path and role again where a statement of the file has taken them back."""
        role = take_on(self.history.role, local=local) if sql.resets_role(statement) else ""
        if self.schema is None or not sql.resets_path(statement):
            return role
        return f"{role}{do_block(f'BEGIN {self.set_path(local=local)} END')}; "


def milliseconds(seconds: float) -> int:
    """Return what PostgreSQL's timeouts take; never 0, which is no limit, for a limit that rounds down to it."""
    return max(1, round(seconds * 1000)) if seconds else 0


# A server that loses its client in the middle of a statement finishes it first, locks held, unless told to look up.
NOTICE_A_DEAD_CLIENT = """
  BEGIN
    PERFORM pg_catalog.set_config('client_connection_check_interval', '1s', true);
  EXCEPTION WHEN OTHERS THEN NULL;  -- before PostgreSQL 14, and on Windows
  END;
  PERFORM pg_catalog.set_config('tcp_keepalives_idle', '5', true),
          pg_catalog.set_config('tcp_keepalives_interval', '2', true),
          pg_catalog.set_config('tcp_keepalives_count', '3', true);"""

NO_TRANSACTION_TIMEOUT = """
  BEGIN
    PERFORM pg_catalog.set_config('transaction_timeout', '0', true);
  EXCEPTION WHEN undefined_object THEN NULL;  -- before PostgreSQL 17
  END;"""

# Deferred constraints and triggers are a part of the script: they see the session as the script has left it.
RUN_DEFERRED = "SET CONSTRAINTS ALL IMMEDIATE; "

# Not DEALLOCATE ALL: the driver of a lent connection has prepared statements of its own.
_DEALLOCATE = """
DECLARE
  made pg_catalog.text;
BEGIN
  FOR made IN SELECT name FROM pg_catalog.pg_prepared_statements WHERE from_sql LOOP
    EXECUTE pg_catalog.format('DEALLOCATE %I', made);
  END LOOP;
END"""

# What a rollback does not take back.
BEYOND_ROLLBACK = f"SELECT pg_catalog.pg_advisory_unlock_all(); {do_block(_DEALLOCATE)}; "

_FOUND = "ampd.found"  # a setting that holds what others had set before us

# A transaction's own modes cannot be reset, and end with it.
_SET = """pg_catalog.pg_settings
    WHERE source OPERATOR(pg_catalog.=) 'session'
      AND name OPERATOR(pg_catalog.<>) ALL ('{transaction_isolation, transaction_read_only, transaction_deferrable}')"""

_REMEMBER = f"""
  PERFORM pg_catalog.set_config('{_FOUND}', (
    SELECT pg_catalog.jsonb_build_object('role', pg_catalog.current_setting('role'),
      'settings', COALESCE(pg_catalog.jsonb_object_agg(name, setting), '{{}}'))::pg_catalog.text
    FROM {_SET} AND name OPERATOR(pg_catalog.<>) '{_FOUND}'), %s);"""

_TO_THE_FOUND_ROLE = """
  IF kept OPERATOR(pg_catalog.->>) 'role' OPERATOR(pg_catalog.<>) 'none' THEN
    PERFORM pg_catalog.set_config('role', kept OPERATOR(pg_catalog.->>) 'role', %s);
  END IF;"""

_IF_FOUND = f"""
DECLARE
  kept pg_catalog.jsonb;
  one pg_catalog.record;
BEGIN
  IF COALESCE(pg_catalog.current_setting('{_FOUND}', true), '') OPERATOR(pg_catalog.=) '' THEN%s
    RETURN;
  END IF;
  kept := pg_catalog.current_setting('{_FOUND}')::pg_catalog.jsonb;"""

_RESTORE = f"""{_IF_FOUND}
  FOR one IN
    SELECT name, setting, kept OPERATOR(pg_catalog.->) 'settings' OPERATOR(pg_catalog.->>) name AS before
    FROM {_SET} OR kept OPERATOR(pg_catalog.->) 'settings' OPERATOR(pg_catalog.?) name
  LOOP
    IF one.before IS NULL THEN
      EXECUTE (SELECT pg_catalog.concat('RESET ', pg_catalog.string_agg(pg_catalog.quote_ident(part), '.'))
               FROM pg_catalog.unnest(pg_catalog.string_to_array(one.name, '.')) part);
    ELSIF one.before OPERATOR(pg_catalog.<>) one.setting THEN
      PERFORM pg_catalog.set_config(one.name, one.before, false);
    END IF;
  END LOOP;{_TO_THE_FOUND_ROLE % "false"}
  PERFORM pg_catalog.set_config('{_FOUND}', '', false);
END"""

_AS_FOUND = f"""{_IF_FOUND % ""}{_TO_THE_FOUND_ROLE % "true"}
END"""


def remember(*, local: bool) -> str:
    """Return PL/pgSQL that notes what those who share the session with us have set it to, for `reset`; once only."""
    return f"""
  IF COALESCE(pg_catalog.current_setting('{_FOUND}', true), '') OPERATOR(pg_catalog.=) '' THEN{
        _REMEMBER % str(local).lower()
    }
  END IF;"""


def reset(*, shared: bool, remembered: bool = False) -> str:
    """Return the statements that take back role and settings: to the defaults, or to what others had set.

    `remembered` says that it was noted in this very transaction: if the note is gone, a RESET ALL has taken it away.
    """
    settings = do_block(_RESTORE % (" EXECUTE 'RESET ALL';" if remembered else "")) if shared else "RESET ALL"
    return f"SET LOCAL statement_timeout = 0; SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; {settings}; "


def take_on(role: str | None, *, local: bool) -> str:
    """Return the statement that takes on the configured role, for a transaction or for the session."""
    return "" if role is None else f"SET {'LOCAL ' if local else ''}ROLE {identifier(role)}; "


def as_ourselves(role: str | None, *, shared: bool) -> str:
    """Return the statements by which the rest of a transaction has our own role, whatever its script has set."""
    found = f"{do_block(_AS_FOUND)}; " if shared else ""
    own = take_on(role, local=True) or f"SET LOCAL ROLE TO DEFAULT; {found}"
    return f"SET LOCAL SESSION AUTHORIZATION DEFAULT; {own}"


def leave_no_trace(*, shared: bool, remembered: bool = False) -> str:
    """Return the statements that take back whatever a script may have done to the session."""
    taken_back = reset(shared=shared, remembered=remembered)
    return f"{taken_back}CLOSE ALL; UNLISTEN *; DISCARD TEMP; DISCARD SEQUENCES; {BEYOND_ROLLBACK}"


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


def parts(statements: sql.Statements) -> Iterator[range]:
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
    lease = f"{sql_of.GUARD_LEASE_SECS}s"
    return f"PERFORM pg_catalog.set_config('idle_in_transaction_session_timeout', '{lease}', true);"


AS_THE_NEXT_IS_SENT = "SET LOCAL client_encoding = 'UTF8'; "  # whatever the script has set


def note_transaction(session: Session) -> str:
    """Return a PL/pgSQL statement that tells `Course` which transaction it is."""
    return session.note("pg_catalog.concat('transaction ', pg_catalog.pg_current_xact_id())")


def insist_on_transaction(transaction: str) -> str:
    """Return a statement that begins a further message: what the one before has ended must not go on outside of it."""
    return do_block(f"""BEGIN
  IF pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text IS DISTINCT FROM '{transaction}' THEN
    RAISE EXCEPTION 'the migration ended the transaction that it ran in' USING ERRCODE = '{sql_of.ESCAPED}';
  END IF;
END""")


async def settle(session: Session, history: History, step: Step, settlement: Settlement) -> None:
    """Write down in one turn what became of an interrupted migration.

    Raises:
        TurnTaken: somebody else is at it.
    """
    sql_of.refuse_to_write(history)
    statements = len(await in_slices(sql.splitting(step.migration.sql))) if step.migration else 0
    applied = settlement is Settlement.APPLIED
    write = record.settle(history, step.version, step.migration, statements, applied=applied)
    body = f"BEGIN {sql_of.take_turn(history)}{record.enter(history, write)} END"
    try:
        await session.run(
            "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '10s'; "
            f"{take_on(history.role, local=True)}{do_block(body)}; COMMIT"
        )
    except ServerError as error:
        await session.recover()
        raise sql_of.turned_away(error, history) or translate(error) from error


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
    message = Message(f"{sql_of.label(job.history.schema or '', job.script.migration)} ")
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
    enter = f"""BEGIN {session.note_pid()}{NOTICE_A_DEAD_CLIENT}{NO_TRANSACTION_TIMEOUT}{sql_of.take_turn(history)}
  {record.enter(history, record.insert(history, migration))}{job.set_path(local=True)}
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
        f"{take_on(job.history.role, local=True)}{record.finish(job.history, job.script.migration, count)}; COMMIT"
    )


def meaning(error: ServerError, job: Job, message: Message, running: int, *, counts_bytes: bool = False) -> Exception:
    """Tell apart what the server refused: our own preamble, a statement of the script, or the end."""
    script = job.script
    refused = partial(failure, error, script.migration, statements=script.statements)
    offset = message.script_offset(error.position, counts_bytes=counts_bytes) if error.position else None
    if error.sqlstate == sql_of.ESCAPED:
        return refused(None, None, aftermath=ROLLED_BACK)
    if running < 0 and offset is None:
        away = sql_of.turned_away(error, job.history)
        if away is not None:
            return away
        # Refused while still being read, and without a position.
        if error.sqlstate in (CHARACTER_NOT_IN_REPERTOIRE, UNTRANSLATABLE_CHARACTER):
            escapes = error.sqlstate == CHARACTER_NOT_IN_REPERTOIRE
            sent = (script.statements[number] for number in map(script.statements.before, message.starts()))
            escaped = next(filter(sql.has_byte_escape, sent), None) if escapes else None
            return refused(escaped, None, aftermath=ROLLED_BACK)
        if error.sqlstate not in (LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED):
            known = translate(error)
            ours = type(known) is ConnectionFailed and error.sqlstate[:2] not in ABOUT_THE_CONNECTION
            return sql_of.unwritable(error, job.history) if ours else known
    at_end = running >= len(script.statements)
    if at_end and (harm := sql_of.harm(error, job.history)):
        return harmed(harm, error, job, None, aftermath=ROLLED_BACK)
    statement = None if at_end or running < 0 else script.statements[running]
    if error.sqlstate in (LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED):
        return LockUnavailable(refused(statement, offset, aftermath=NOTHING_KEPT))
    return refused(statement, offset, aftermath=ROLLED_BACK)


def harmed(
    harm: str, error: ServerError, job: Job, statement: sql.Statement | None, *, aftermath: str
) -> MigrationFailed:
    """Return the error for a migration after which our own history is not what it was.

    Where it is not known which statement did that, it is the one that names the history, if there is such a one.
    """
    migration = job.script.migration
    if statement is None:
        places = (found.start() for found in re.finditer(sql_of.TABLE, migration.sql, re.IGNORECASE))
        naming = {number for place in places if (number := job.script.statements.at(place)) is not None}
        statement = job.script.statements[naming.pop()] if len(naming) == 1 else None
    line, column = sql.locate(migration.sql, statement.start) if statement else (None, None)
    return MigrationFailed(
        f"{migration.file}{f':{line}' if line else ''}: {harm}",
        hint=f"leave that table to ampd, also where a statement goes over all tables; {aftermath}",
        version=migration.version,
        file=migration.file,
        line=line,
        column=column,
        sqlstate=error.sqlstate,
        excerpt=sql.excerpt(migration.sql, statement.start, file=migration.file) if statement else None,
    )
