"""Rehearsing: every pending transactional migration for real, in one transaction that is rolled back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import anyio
import msgspec

from ampd import advisory_lock, sqlstates
from ampd.display import one_line
from ampd.errors import AmpdError, MigrationInterrupted
from ampd.history import writing
from ampd.postgres.quoting import do_block, literal
from ampd.postgres.server_error import ServerError
from ampd.sql.slices import in_slices

from .message import Message
from .prepared import milliseconds
from .rehearsal_report import Lock, Rehearsal, RehearsedMigration, SkippedMigration, Table, held_locks
from .session_state import (
    BEYOND_ROLLBACK,
    NO_TRANSACTION_TIMEOUT,
    NOTICE_A_DEAD_CLIENT,
    RESET_OBJECTS,
    deallocate_sql,
    reset_settings_sql,
    save_settings_sql,
    set_role_sql,
)
from .table_locks import with_lock_retries
from .tracker import StatementTracker
from .transaction import refused_error
from .transaction_message import RESET_CLIENT_ENCODING, parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ampd.postgres.connection import Session
    from ampd.postgres.database import Database
    from ampd.sql.slices import Slices

    from .prepared import Execution


_OUTSIDE = "it runs outside of a transaction, and cannot be rolled back"
# What a migration may lack that one before it, which was not rehearsed, would have made.
_UNDEFINED = (
    sqlstates.UNDEFINED_TABLE,
    sqlstates.UNDEFINED_COLUMN,
    sqlstates.UNDEFINED_OBJECT,
    sqlstates.UNDEFINED_FUNCTION,
)

_NOW = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
_LOCKS = """(SELECT coalesce(json_agg(json_build_array(l.relation::bigint, l.mode, c.relfilenode::bigint,
    CASE WHEN c.relkind IN ('r', 'm') THEN pg_relation_size(l.relation) END)), '[]')
  FROM pg_locks l LEFT JOIN pg_class c ON c.oid = l.relation
  WHERE l.locktype = 'relation' AND l.pid = pg_backend_pid()
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()))"""
# Not SET CONSTRAINTS ALL, as at the end of a real run: it would hold for the following migrations as well, even for
# constraints that these make. A real transaction begins with each constraint as it was declared.
_RUN_DEFERRED = """DECLARE
  made pg_catalog.record;
BEGIN
  FOR made IN
    SELECT DISTINCT n.nspname, c.conname, c.condeferred FROM pg_catalog.pg_constraint c
    JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.connamespace
    WHERE c.condeferrable AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')
  LOOP
    EXECUTE pg_catalog.format('SET CONSTRAINTS %I.%I IMMEDIATE', made.nspname, made.conname);
    IF made.condeferred THEN
      EXECUTE pg_catalog.format('SET CONSTRAINTS %I.%I DEFERRED', made.nspname, made.conname);
    END IF;
  END LOOP;
END"""


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

    def __init__(self, session: Session, executions: Sequence[Execution], secs: float) -> None:
        self._session = session
        self._executions = executions
        self._secs = secs
        self.current = executions[0]
        self.begun = False
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
                message = await in_slices(self._composing(session, execution, part))
                tracker.running = -1 if part.start == 0 else tracker.running
                await session.run(str(message), on_note=tracker)
        except ServerError as error:
            if why := self._reason(error, execution, tracker.running):
                raise _NotRehearsable(why) from error
            counts_bytes = session.counts_bytes
            raise refused_error(error, execution, message, tracker.running, counts_bytes=counts_bytes) from error
        entered, tables = msgspec.json.decode(tracker.documents[0], type=tuple[int, list[Table]])
        left, locks = msgspec.json.decode(tracker.documents[-1], type=tuple[int, list[Lock]])
        self._tables = self._tables or {table.oid: table for table in tables}
        held = held_locks(self._tables, self._files, locks)
        migration = execution.migration
        self.migrations.append(RehearsedMigration(migration.version, migration.name, left - entered, held))

    def _reason(self, error: ServerError, execution: Execution, running: int) -> str | None:
        """Return why a failure is the rehearsal's and perhaps not the migration's; None for a fault."""
        if error.sqlstate == sqlstates.UNSAFE_NEW_ENUM_VALUE_USAGE:
            added = re.findall(r"(?i)\badd\s+value\s+(?:if\s+not\s+exists\s+)?'([^']+)'", execution.migration.sql)
            if not any(value in error.message for value in added):
                return "it uses an enum value that a migration before it adds, which has to be committed first"
        if self.skipped and running >= 0 and error.sqlstate in _UNDEFINED:
            missed = self.skipped[-1]
            return f"without {missed.version} {one_line(missed.name)} the server says: {one_line(error.message)}"
        return None

    def _composing(self, session: Session, execution: Execution, part: range) -> Slices[Message]:
        """Return, in slices, the message that runs a part of a migration."""
        label = f"rehearsal of {execution.migration.label}"
        message = Message(f"{advisory_lock.label_sql(execution.history.lock_key, label)} ")
        if part.start == 0:
            message.add(self._enter_sql(session, execution))
        for index in part:
            statement = execution.statements[index]
            message.add(f"{session.marker_sql(str(index))}; ")
            message.add_statement(statement)
            message.add(execution.again_after_sql(statement, local=True))
            yield
        ends = part.stop == len(execution.statements)
        message.add(_leave_sql(session, execution) if ends else RESET_CLIENT_ENCODING)
        message.join()
        yield
        return message

    def _enter_sql(self, session: Session, execution: Execution) -> str:
        """Return the statements before a script, as a real run has them; the first open the transaction."""
        history, tables = execution.history, "'[]'::json"
        begin = "" if self.begun else "BEGIN ISOLATION LEVEL READ COMMITTED; "
        if not self.begun:
            tables = _tables_sql(history.schema or "", history.place.table)
        self.begun = True
        save = do_block(f"BEGIN {save_settings_sql(local=True)} END") + "; " if session.shared else ""
        note = f"\n    {session.note_sql(f'json_build_array({_NOW}, {tables})')}"
        body = (
            f"{session.note_pid_sql()}{NOTICE_A_DEAD_CLIENT}{NO_TRANSACTION_TIMEOUT}"
            f"{advisory_lock.try_lock_sql(history.lock_key)}"
            f"{writing.enter_sql(history, writing.insert_sql(history, execution.migration), note)}"
            f"{execution.search_path_sql(local=True)}"
        )
        return (
            f"{begin}{save}SET LOCAL statement_timeout = 0; "
            f"SET LOCAL lock_timeout = {milliseconds(execution.lock_timeout_secs)}; "
            f"SET LOCAL idle_in_transaction_session_timeout = {milliseconds(self._secs + 1)}; "
            f"SET LOCAL application_name = 'ampd rehearsal'; {set_role_sql(history.role, local=True)}"
            f"{do_block(f'BEGIN {body} END')};\n"
            f"SET LOCAL statement_timeout = {milliseconds(execution.statement_timeout_secs)}; "
        )


class _NotRehearsable(Exception):
    """A migration cannot be rehearsed; the transaction is aborted."""


def _tables_sql(schema: str, table: str) -> str:
    """Return an expression for all tables but the history, as an array of `Table`. The search path must be pinned."""
    # Before PostgreSQL 14 a table that was never analyzed has 0 rows in 0 pages.
    return f"""(
    SELECT coalesce(json_agg(json_build_array(c.oid::bigint, format('%I.%I', n.nspname, c.relname), c.relkind = 'p',
      c.relfilenode::bigint, CASE WHEN c.relpages = 0 AND c.reltuples = 0
        AND current_setting('server_version_num')::integer < 140000 THEN -1 ELSE c.reltuples::bigint END,
      c.relpages::bigint * current_setting('block_size')::bigint)), '[]')
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'm') AND c.relpersistence <> 't'
      AND n.nspname NOT IN ('pg_catalog', 'information_schema')
      AND NOT (n.nspname = {literal(schema)} AND c.relname = {literal(table)}))"""


def _leave_sql(session: Session, execution: Execution) -> str:
    """Return the statements after a script: all that a real run does but for the COMMIT, and a look at the locks."""
    history, count = execution.history, len(execution.statements)
    before = str(max((row.version for row in history.applied), default="NULL"))
    finish = writing.leave_sql(history, str(execution.migration.version), str(count), before)
    look = (
        "BEGIN PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true); "
        f"{session.note_sql(f'json_build_array({_NOW}, {_LOCKS})')} END"
    )
    return (
        f"{session.marker_sql(str(count))}; {do_block(_RUN_DEFERRED)}; {do_block(look)}; "
        f"{reset_settings_sql(shared=session.shared, saved=True)}{RESET_OBJECTS}"
        f"SET LOCAL lock_timeout = {milliseconds(execution.lock_timeout_secs)}; "
        f"{set_role_sql(history.role, local=True)}{do_block(deallocate_sql())}; "
        f"{do_block(f'BEGIN PERFORM pg_catalog.pg_advisory_unlock_all();{finish} END')}"
    )


async def rehearse(
    source: Database, session: Session, executions: Sequence[Execution], secs: float, shown: str
) -> Rehearsal:
    """Run migrations in one transaction for at most so many seconds, roll it back, and return what it held.

    Raises:
        LockTaken: another runner has the lock, or has changed the history.
    """
    rehearsing = _Rehearsing(session, executions, secs)
    error: AmpdError | None = None
    try:
        with anyio.move_on_after(secs) as limit:
            await with_lock_retries(source, session, lambda: rehearsing.current, rehearsing.attempt)
    except AmpdError as failure:
        error = failure
    finally:
        await session.recover(BEYOND_ROLLBACK)
    if limit.cancelled_caught:
        current = rehearsing.current.migration
        error = MigrationInterrupted(
            f"the rehearsal was ended after {secs:g} s, in {current.label}: its locks stand in the way of others",
            hint="everything was rolled back; --rehearse-secs takes another limit",
        )
        error.version, error.file = current.version, current.file
    return Rehearsal(shown, tuple(rehearsing.migrations), tuple(rehearsing.skipped), error)
