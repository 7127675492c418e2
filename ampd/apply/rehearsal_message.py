"""The messages of a rehearsal: migrations one after the other in one transaction, with looks at its locks. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ampd import advisory_lock
from ampd.history import writing
from ampd.other_sessions import readable_sql
from ampd.postgres.quoting import PIN_SEARCH_PATH, do_block, literal
from ampd.sqlstates import QUERY_CANCELED

from .message import Message
from .prepared import milliseconds
from .session_state import (
    NO_TRANSACTION_TIMEOUT,
    NOTICE_A_DEAD_CLIENT,
    RESET_OBJECTS,
    RUN_DEFERRED,
    deallocate_sql,
    reset_settings_sql,
    save_settings_sql,
    set_role_sql,
)
from .transaction_message import RESET_CLIENT_ENCODING

if TYPE_CHECKING:
    from ampd.postgres.connection import Session
    from ampd.sql.slices import Slices

    from .prepared import Execution


_EVERY = 50  # statements, after so many: to limit one takes half a millisecond
_LATE_SECS = 1.0  # after which the server ends what a client has not ended in time
_NOW = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
_LOCKS = """(SELECT coalesce(json_agg(json_build_array(l.relation::bigint, l.mode, c.relfilenode::bigint,
    CASE WHEN c.relkind IN ('r', 'm', 'i') THEN pg_relation_size(l.relation) END)), '[]')
  FROM pg_locks l LEFT JOIN pg_class c ON c.oid = l.relation
  WHERE l.locktype = 'relation' AND l.pid = pg_backend_pid() AND l.mode <> 'SIReadLock'
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()))"""
# As at the end of a real run, and then back to what is declared, as a real transaction begins. By name alone that is
# not possible: a constraint may share its name with one that cannot be deferred.
_RUN_DEFERRED = f"""DECLARE
  made pg_catalog.record;
BEGIN
  {RUN_DEFERRED}
  SET CONSTRAINTS ALL DEFERRED;
  FOR made IN
    SELECT n.nspname, c.conname
    FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.connamespace
    WHERE c.condeferrable AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')
    GROUP BY n.nspname, c.conname HAVING NOT pg_catalog.bool_or(c.condeferred)
  LOOP
    EXECUTE pg_catalog.format('SET CONSTRAINTS %I.%I IMMEDIATE', made.nspname, made.conname);
  END LOOP;
END"""


def composing(session: Session, execution: Execution, part: range, *, first: bool, secs: float) -> Slices[Message]:
    """Return, in slices, the message that runs a part of a migration; the `first` one opens the transaction.

    The server ends the transaction by itself a little later than `secs` after its begin, if the client has not. It
    notes two JSON arrays: before the script each `Table`, in the first message, and the time in milliseconds; after it
    the time and each `Lock`.
    """
    label = f"rehearsal of {execution.migration.label}"
    message = Message(f"{advisory_lock.label_sql(execution.history.lock_key, label)} ")
    if part.start == 0:
        message.add(_enter_sql(session, execution, first=first, secs=secs))
    sets = True  # whether the statement before may have changed a limit
    for index in part:
        statement = execution.statements[index]
        held = sets or index < _EVERY or index % _EVERY == 0
        message.add(f"{_marker_sql(session, index, secs) if held else session.marker_sql(str(index))}; ")
        sets = statement.words[:1] in (("SET",), ("RESET",))
        message.add_statement(statement)
        message.add(execution.again_after_sql(statement, local=True))
        yield
    ends = part.stop == len(execution.statements)
    message.add(_leave_sql(session, execution, secs) if ends else RESET_CLIENT_ENCODING)
    message.join()
    yield
    return message


def _enter_sql(session: Session, execution: Execution, *, first: bool, secs: float) -> str:
    """Return the statements before a script, as a real run has them."""
    history = execution.history
    begin = "BEGIN ISOLATION LEVEL READ COMMITTED; " if first else ""
    tables = _tables_sql(history.schema or "", history.place.table) if first else "'[]'::json"
    save = do_block(f"BEGIN {save_settings_sql(session.saved_as, local=True)} END") + "; " if session.shared else ""
    note = f"\n    {session.note_sql(f'json_build_array({tables}, {_NOW})')}"
    body = (
        f"{session.note_pid_sql()}{NOTICE_A_DEAD_CLIENT}{NO_TRANSACTION_TIMEOUT}{_limit_all(secs)}"
        f"{advisory_lock.try_lock_sql(history.lock_key)}"
        f"{writing.enter_sql(history, writing.insert_sql(history, execution.migration), note)}"
        f"{execution.search_path_sql(local=True)}"
    )
    return (
        f"{begin}{save}SET LOCAL statement_timeout = 0; {_lock_timeout_sql(execution)}"
        f"SET LOCAL application_name = 'ampd rehearsal'; {set_role_sql(history.role, local=True)}"
        f"{do_block(f'BEGIN {body} END')};\n"
        f"SET LOCAL statement_timeout = {milliseconds(execution.statement_timeout_secs)}; "
    )


def _tables_sql(schema: str, table: str) -> str:
    """Return an expression for all tables but the history, and their indexes, as an array of `Table`.

    The search path must be pinned.
    """
    # Before PostgreSQL 14 a table that was never analyzed has 0 rows in 0 pages.
    name = readable_sql("format('%s%I.%I', CASE WHEN x.indrelid IS NOT NULL THEN 'index ' END, n.nspname, c.relname)")
    return f"""(
    SELECT coalesce(json_agg(json_build_array(c.oid::bigint, {name}, c.relkind = 'p',
      c.relfilenode::bigint, CASE WHEN c.relpages = 0 AND c.reltuples = 0
        AND current_setting('server_version_num')::integer < 140000 THEN -1 ELSE c.reltuples::bigint END,
      c.relpages::bigint * current_setting('block_size')::bigint, x.indrelid::bigint)), '[]')
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_index x ON x.indexrelid = c.oid
    JOIN pg_class t ON t.oid = coalesce(x.indrelid, c.oid)
    WHERE t.relkind IN ('r', 'p', 'm') AND t.relpersistence <> 't'
      AND n.nspname NOT IN ('pg_catalog', 'information_schema')
      AND NOT (n.nspname = {literal(schema)} AND t.relname = {literal(table)}))"""


def _lock_timeout_sql(execution: Execution) -> str:
    return f"SET LOCAL lock_timeout = {milliseconds(execution.lock_timeout_secs)}; "


def _marker_sql(session: Session, number: int, secs: float) -> str:
    """Return a statement that notes a number, and limits the next statement of the script."""
    return do_block(f"BEGIN {session.note_text_sql(str(number))}{_limit_statement(secs)} END")


def _remaining_sql(secs: float) -> str:
    until = f"(pg_catalog.now() OPERATOR(pg_catalog.+) '{secs + _LATE_SECS:.3f} s'::pg_catalog.interval)"
    return f"({until} OPERATOR(pg_catalog.-) pg_catalog.clock_timestamp())"


def _limit_statement(secs: float) -> str:
    """Return PL/pgSQL that limits a statement to what is left of the time, or to the script's own limit if shorter."""
    found = "pg_catalog.current_setting('statement_timeout')"
    own = f"CASE WHEN {found} OPERATOR(pg_catalog.<>) '0' THEN {found}::pg_catalog.interval END"
    least = _milliseconds_sql(f"LEAST({_remaining_sql(secs)}, {own})")
    return f"""
  IF {_remaining_sql(secs)} OPERATOR(pg_catalog.<) '1 ms' THEN
    RAISE EXCEPTION 'the time for the rehearsal is over' USING ERRCODE = '{QUERY_CANCELED}';
  END IF;
  PERFORM pg_catalog.set_config('statement_timeout', GREATEST(1, {least})::pg_catalog.text, true);"""


def _limit_all(secs: float) -> str:
    """Return PL/pgSQL that limits the transaction and the wait for the client as well: one that stands still."""
    remaining = f"GREATEST(1, {_milliseconds_sql(_remaining_sql(secs))})::pg_catalog.text"
    return f"""{_limit_statement(secs)}
  PERFORM pg_catalog.set_config('idle_in_transaction_session_timeout', {remaining}, true);
  IF pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL THEN  -- since PostgreSQL 17
    PERFORM pg_catalog.set_config('transaction_timeout', {remaining}, true);
  END IF;"""


def _milliseconds_sql(interval: str) -> str:
    return f"(pg_catalog.date_part('epoch', {interval}) OPERATOR(pg_catalog.*) 1000)::pg_catalog.int4"


def _leave_sql(session: Session, execution: Execution, secs: float) -> str:
    """Return the statements after a script: all that a real run does but for the COMMIT, and a look at the locks."""
    history, count = execution.history, len(execution.statements)
    finish = writing.leave_sql(history, execution.migration.version, count, history.newest_version)
    look = f"BEGIN {PIN_SEARCH_PATH} {session.note_sql(f'json_build_array({_NOW}, {_LOCKS})')} END"
    return (
        f"{_marker_sql(session, count, secs)}; {do_block(_RUN_DEFERRED)}; {do_block(look)}; "
        f"{reset_settings_sql(session.saved_as, required=True)}{RESET_OBJECTS}"
        f"{_lock_timeout_sql(execution)}"
        f"{set_role_sql(history.role, local=True)}{do_block(deallocate_sql())}; "
        f"{do_block(f'BEGIN{_limit_all(secs)} PERFORM pg_catalog.pg_advisory_unlock_all();{finish} END')}"
    )
