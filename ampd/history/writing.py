"""Writing the history: PL/pgSQL for the transactions that create, enter and change it. Runs none of it.

Every transaction locks the table, looks at it by its oid, and only then writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ampd.advisory_lock import lock_acquired_sql
from ampd.postgres.quoting import PIN_SEARCH_PATH, identifier, literal
from ampd.sqlstates import ALTERED, EMPTIED, ESCAPED, EXPOSED, INVALID_TEXT_REPRESENTATION, MOVED, REPLACED
from ampd.version import VERSION

from .table import LOCK
from .trust import (
    COLUMNS,
    DONE_CHECKSUM,
    MAY_FIRE,
    PLAIN,
    columns_sql,
    fires_sql,
    managed_schema_sql,
    shaped_sql,
    trusted_owner_sql,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ampd.migration import Migration
    from ampd.postgres.connection import Session
    from ampd.postgres.server_error import ServerError

    from .table import History


def enter_sql(history: History, *parts: str, newest: str | None = None, before_creation: str = "") -> str:
    """Return PL/pgSQL for the beginning of a transaction that writes the history, under the lock.

    It checks that the history is ours to write and unchanged since it was read, or creates it where there was none,
    and then runs `parts`. `newest` is an SQL expression for `History.newest`, where that is known only then;
    `before_creation` is PL/pgSQL to run before a history is created.
    """
    create = "" if history.table_exists else f"{before_creation}{_create_sql(history)}"
    return _pinned_sql(f"{create}{_check_sql(history, newest or literal(history.newest))}{''.join(parts)}")


def leave_sql(history: History, version: int, statements: int, before: int | None) -> str:
    """Return PL/pgSQL that records a migration as finished, in the transaction that started it and in no other.

    It has so many `statements`; `before` is the newest version before it, if there is one.
    """
    newest = "NULL" if before is None else str(before)
    there = f"{_has_row_sql(history, version)} AND ({newest} IS NULL OR {_has_row_sql(history, newest)})"
    return _pinned_sql(f"""{_check_sql(history)}
    UPDATE ONLY {history.name} SET finished_at = clock_timestamp(), statements_done = {statements}
     WHERE version = {version} AND xmin = pg_current_xact_id()::xid AND {there};
    IF NOT FOUND THEN
      RAISE EXCEPTION 'the migration ended its own transaction, or deleted its history row' USING ERRCODE =
        CASE WHEN {there} THEN '{ESCAPED}' ELSE '{EMPTIED}' END;
    END IF;""")


def _pinned_sql(body: str) -> str:
    """Return PL/pgSQL that runs other PL/pgSQL on a search path on which no stranger can put anything."""
    return f"""
  DECLARE
    path pg_catalog.text := pg_catalog.current_setting('search_path');
    wrong pg_catalog.text;
  BEGIN
    {PIN_SEARCH_PATH}{body}
    PERFORM set_config('search_path', path, true);
  END;"""


def lock_sql(history: History) -> str:
    """Return the statement that locks the history, before anything of it is looked at."""
    return f"\n    {LOCK} {history.name} IN ROW EXCLUSIVE MODE;"


def _check_sql(history: History, newest: str = "NULL") -> str:
    """Return PL/pgSQL that locks the history, and raises what is wrong with it."""
    return f"""{lock_sql(history)}
    wrong := {_wrong_sql(history, newest)};
    IF wrong <> '' THEN
      RAISE EXCEPTION 'the history is not as ampd makes it, or was replaced' USING ERRCODE = wrong;
    END IF;"""


def _wrong_sql(history: History, newest: str = "NULL") -> str:
    """Return an SQL expression for what is wrong with the history, as an SQLSTATE; '' if it is ours and as it was read.

    `newest` is an SQL expression for what `History.newest` has to be, or NULL. The history must be locked, and the
    search path pinned. What follows may name the history again: nobody but the owner of its schema could give the name
    to another table now.
    """
    known, owner = history.table, history.schema_owner
    same = "pg_get_userbyid(c.relowner) = CURRENT_USER" if known is None else f"c.relowner = {known.owner_oid}"
    this = "" if known is None else f"c.oid = {known.oid} AND "
    owners = f"c.relowner, {owner.oid}" if owner else "c.relowner"
    return f"""COALESCE((
      SELECT CASE
        WHEN ({same} AND {PLAIN} AND (SELECT {shaped_sql("c.oid")} FROM {columns_sql("c.oid")})
          AND NOT ({MAY_FIRE} AND {fires_sql("c.oid")})
          AND NOT (c.relrowsecurity AND row_security_active(c.oid))) IS NOT TRUE THEN '{ALTERED}'
        WHEN (SELECT nspowner NOT IN ({owners}) AND NOT {trusted_owner_sql("nspowner", history.role)}
                AND NOT ({managed_schema_sql("oid", "nspowner")})
              FROM pg_namespace WHERE oid = c.relnamespace) THEN '{EXPOSED}'
        WHEN {newest} <> COALESCE((
          SELECT {_NEWEST} FROM ONLY {history.name} h ORDER BY h.version DESC LIMIT 1), '') THEN '{MOVED}'
        ELSE '' END
      FROM pg_class c WHERE {this}{_is_named_sql(history)}), '{REPLACED}')"""


# The newest row, as `History.newest` has it.
_NEWEST = "pg_catalog.concat(h.version, CASE WHEN h.finished_at IS NULL THEN ' unfinished' END)"


def _is_named_sql(history: History) -> str:
    """Return a condition for the row c of pg_class that the history's name stands for."""
    return (
        f"c.relname = {literal(history.place.table)} AND c.relnamespace = (SELECT oid FROM pg_namespace "
        f"WHERE nspname = {literal(history.schema)})"
    )


# The other types are keywords, which no search path changes.
_SPELT = {"text": "pg_catalog.text", "bytea": "pg_catalog.bytea"}


def _create_sql(history: History) -> str:
    """Return a part of `enter_sql` that creates the history; another runner may have done so meanwhile."""
    assert history.schema is not None
    # CREATE SCHEMA wants the right to create one even where it exists: only when it does not.
    schema = "" if history.schema_exists else f"\n    CREATE SCHEMA {identifier(history.schema)};"
    rules = {"version": " PRIMARY KEY", "finished_at": "", DONE_CHECKSUM: ""}
    columns = ",\n      ".join(
        f"{name} {_SPELT.get(kind, kind)}{rules.get(name, ' NOT NULL')}" for name, kind in COLUMNS.items()
    )
    # A query, and not to_regclass: that may answer from what this session knew before it had the lock.
    return f"""
    IF EXISTS (SELECT FROM pg_class c WHERE {_is_named_sql(history)}) THEN
      RAISE EXCEPTION 'the history has moved' USING ERRCODE = '{MOVED}';
    END IF;""" + _for_event_triggers_sql(f"""{schema}
    CREATE TABLE {history.name} (
      {columns}
    );
    COMMENT ON TABLE {history.name} IS 'Which migrations ampd has applied, one row each';{_comment_sql(history)}""")


def _comment_sql(history: History) -> str:
    return f"""
    COMMENT ON COLUMN {history.name}.{DONE_CHECKSUM} IS
      'SHA-256 of the statements that a no-transaction migration has begun or done; null once it is finished';"""


def _for_event_triggers_sql(definitions: str) -> str:
    """Return a part of `enter_sql` that runs DDL with the original search path, on which event triggers may rely."""
    return f"""
    PERFORM set_config('search_path', path, true);{definitions}
    {PIN_SEARCH_PATH}"""


_STARTED = "(version, name, checksum, started_at, statements_done, applied_by, ampd_version)"


def _started_sql(version: str, name: str, checksum: str) -> str:
    return (
        f"{version}, {name}, pg_catalog.decode({checksum}, 'hex'), pg_catalog.clock_timestamp(), 0, CURRENT_USER, "
        f"'{VERSION}'"
    )


def insert_sql(history: History, migration: Migration) -> str:
    """Return a part of `enter_sql` that records a migration as started."""
    return insert_values_sql(history, str(migration.version), literal(migration.name), f"'{migration.checksum.hex()}'")


def insert_values_sql(history: History, version: str, name: str, checksum: str) -> str:
    """Return the same of values as SQL spells them; the checksum is a literal of hexadecimal digits."""
    return f"""
    INSERT INTO {history.name} {_STARTED}
    VALUES ({_started_sql(version, name, checksum)});"""


def prepare_sql(history: History, prefix: str, settings: str) -> str:
    """Return a part of `enter_sql` that prepares four statements, whose names begin with `prefix`.

    `…_begin` acquires the lock, checks that the catalog has the history as this transaction has found it, and evaluates
    `settings`, a PL/pgSQL expression for the text of a list of SQL expressions; `…_enter` records a migration as
    started, `…_end` checks the catalog once more and that the transaction is the one that has started it, and `…_leave`
    records it as finished. To look whether the rows of the catalog are the same versions is much cheaper than the whole
    check; and to run a statement, than to plan it. What is not as it should be ends in an error, see `found_change`:
    then `enter_sql` and `leave_sql` tell what it is.

    They are run on any search path: what they name is qualified, operators included.
    """
    eq, quote = "OPERATOR(pg_catalog.=)", f"${prefix}_sql$"
    # No boolean, so that to evaluate it is an error. As a constant it would be evaluated when it is planned, and a cast
    # from text somebody else may have defined.
    changed = f"pg_catalog.boolin(pg_catalog.textout(pg_catalog.concat('{_changed(prefix)}')))"
    # For format(). Whatever is made for a table depends on it: an index, a trigger, a rule, a policy.
    same = f"""EXISTS (SELECT FROM pg_catalog.pg_class
        WHERE oid {eq} %1$s AND ctid {eq} %2$L::pg_catalog.tid AND xmin {eq} %3$L::pg_catalog.xid)
      AND EXISTS (SELECT FROM pg_catalog.pg_namespace
        WHERE oid {eq} %4$s AND ctid {eq} %5$L::pg_catalog.tid AND xmin {eq} %6$L::pg_catalog.xid)
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_attribute WHERE attrelid {eq} %1$s
        AND NOT (ctid {eq} ANY (%7$L::pg_catalog.tid[]) AND xmin {eq} ANY (%8$L::pg_catalog.xid[])))
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend WHERE refclassid {eq} {_PG_CLASS} AND refobjid {eq} %1$s
        AND NOT (ctid {eq} ANY (%9$L::pg_catalog.tid[]) AND xmin {eq} ANY (%10$L::pg_catalog.xid[])))"""
    entering = f"""PREPARE {prefix}_enter (pg_catalog.int8, pg_catalog.text, pg_catalog.text, pg_catalog.text) AS
      INSERT INTO {history.name} {_STARTED}
      SELECT {_started_sql("$1", "$2", "$3")}
      WHERE CASE WHEN COALESCE(
          (SELECT {_NEWEST} FROM ONLY {history.name} h ORDER BY h.version DESC LIMIT 1), '') {eq} $4
        THEN true ELSE {changed} END"""
    # The script has left the transaction, the rows and the session's prepared statements alone.
    unharmed = f"""EXISTS (SELECT FROM ONLY {history.name} h
        WHERE h.version {eq} $1 AND h.xmin {eq} pg_catalog.pg_current_xact_id()::pg_catalog.xid)
      AND ($2 IS NULL OR EXISTS (SELECT FROM ONLY {history.name} h WHERE h.version {eq} $2))
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_prepared_statements
        WHERE from_sql AND NOT pg_catalog.starts_with(name, {literal(prefix)}))"""
    leaving = f"""PREPARE {prefix}_leave (pg_catalog.int8, pg_catalog.int4) AS
      UPDATE ONLY {history.name} h SET finished_at = pg_catalog.clock_timestamp(), statements_done = $2
      WHERE h.version {eq} $1"""
    # With a trigger, a rule or row level security, or the flag of one that is gone, nothing counts as the same.
    return f"""
    DECLARE
      same pg_catalog.text := COALESCE((
        SELECT format({quote}{same}{quote}, c.oid, c.ctid, c.xmin, n.oid, n.ctid, n.xmin,
          a.ctids, a.xmins, d.ctids, d.xmins)
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace,
          LATERAL (SELECT array_agg(ctid), array_agg(xmin) FROM pg_attribute WHERE attrelid = c.oid)
            a (ctids, xmins),
          LATERAL (SELECT array_agg(ctid), array_agg(xmin) FROM pg_depend
            WHERE refclassid = {_PG_CLASS} AND refobjid = c.oid) d (ctids, xmins)
        WHERE {_is_named_sql(history)} AND NOT ({MAY_FIRE} OR c.relrowsecurity)), 'false');
    BEGIN
      EXECUTE concat({quote}PREPARE {prefix}_begin AS SELECT CASE
        WHEN {lock_acquired_sql(history.lock_key)} AND {quote}, same,
        ' THEN pg_catalog.concat(', {settings}, {quote}) ELSE {changed}::pg_catalog.text END{quote});
      EXECUTE concat({quote}PREPARE {prefix}_end (pg_catalog.int8, pg_catalog.int8) AS SELECT CASE
        WHEN {quote}, same, {quote} AND {unharmed}
        THEN pg_catalog.concat(pg_catalog.pg_advisory_unlock_all()) ELSE {changed}::pg_catalog.text END{quote});
    END;
    EXECUTE {quote}{entering}{quote};
    EXECUTE {quote}{leaving}{quote};"""


_PG_CLASS = 1259  # the oid of pg_class, on every server


def found_change(error: ServerError, prefix: str) -> bool:
    """Return whether a statement of `prepare_sql` has found that something is not as it was."""
    return error.sqlstate == INVALID_TEXT_REPRESENTATION and _changed(prefix) in error.message


def _changed(prefix: str) -> str:
    return f"{prefix}: not as it was"


def baseline_sql(history: History, migrations: Iterable[tuple[Migration, str | None]], source: str | None) -> str:
    """Return a part of `enter_sql` that records migrations as applied, each at a time as text, or now.

    `source` is the tool that has applied them, by whose name the rows are known; None for a person's word.
    """
    by = f"{VERSION} baseline{f' from {source}' if source else ''}"
    rows = ",\n      ".join(
        f"({each.version}, {literal(each.name)}, {_hex_sql(each.checksum)}, {when}, {when}, 0, CURRENT_USER, '{by}')"
        for each, at in migrations
        for when in (f"{literal(at)}::timestamptz" if at else "now()",)
    )
    return f"""
    INSERT INTO {history.name} (version, name, checksum, started_at, finished_at, statements_done, applied_by,
      ampd_version) VALUES
      {rows};"""


def add_done_checksum_sql(history: History) -> str:
    """Return a part of `enter_sql` that adds the column that resuming needs; older histories were made without it."""
    add = f"""
    ALTER TABLE {history.name} ADD COLUMN {DONE_CHECKSUM} pg_catalog.bytea;{_comment_sql(history)}"""
    return f"""
    IF NOT {_has_done_checksum_sql(history)} THEN{_for_event_triggers_sql(add)}
    END IF;"""


def _has_done_checksum_sql(history: History) -> str:
    return f"""EXISTS (SELECT FROM pg_attribute WHERE attrelid = {literal(history.name)}::regclass
                   AND attname = '{DONE_CHECKSUM}' AND NOT attisdropped)"""


def begun_by_sql(session: Session, history: History, version: int) -> str:
    """Return PL/pgSQL that notes the transaction that has last written a migration's row of the history, as `str`."""
    xmin = f"(SELECT to_jsonb(h.xmin::text) FROM ONLY {history.name} h WHERE h.version = {version})"
    return f"{_check_pinned_sql(history)} {session.note_sql(xmin)}"


class Checkpoint(msgspec.Struct, frozen=True):
    """How far a no-transaction migration has come: statements done, and the checksum of all that were begun."""

    done: int
    checksum: bytes | None


def advance_sql(history: History, migration: Migration, was: Checkpoint, now: Checkpoint) -> str:
    """Return PL/pgSQL that ends a transaction with the record how far a no-transaction migration has come.

    It fails if another runner has gone on with it: a message may reach the server long after its runner was given up.
    """
    return _update_sql(
        history, migration, was, f"statements_done = {now.done}, {DONE_CHECKSUM} = {_hex_sql(now.checksum)}"
    )


def finish_no_transaction_sql(history: History, migration: Migration, was: Checkpoint, statements: int) -> str:
    """Return PL/pgSQL that ends a transaction with the record that a no-transaction migration is done."""
    return _update_sql(
        history,
        migration,
        was,
        f"finished_at = clock_timestamp(), statements_done = {statements}, "
        f"name = {literal(migration.name)}, checksum = {_hex_sql(migration.checksum)}, {DONE_CHECKSUM} = NULL",
    )


def _update_sql(history: History, migration: Migration, was: Checkpoint, change: str) -> str:
    begun = was.checksum.hex() if was.checksum else ""
    return f"""{_check_pinned_sql(history)}
    UPDATE ONLY {history.name} SET {change}
     WHERE version = {migration.version} AND finished_at IS NULL
       AND statements_done = {was.done} AND COALESCE(encode({DONE_CHECKSUM}, 'hex'), '') = '{begun}';
    IF NOT FOUND THEN
      RAISE EXCEPTION 'the history has moved' USING ERRCODE =
        CASE WHEN {_has_row_sql(history, migration.version)} THEN '{MOVED}' ELSE '{EMPTIED}' END;
    END IF;"""


def _check_pinned_sql(history: History) -> str:
    """Return PL/pgSQL that pins the search path for the rest of the transaction, and locks and checks the history."""
    return f"""
    DECLARE
      wrong pg_catalog.text;
    BEGIN
    {PIN_SEARCH_PATH}{_check_sql(history)}
    END;"""


def _has_row_sql(history: History, version: int | str) -> str:
    return f"EXISTS (SELECT FROM ONLY {history.name} WHERE version = {version})"


def _hex_sql(checksum: bytes | None) -> str:
    return "NULL" if checksum is None else f"decode('{checksum.hex()}', 'hex')"


def resolve_sql(history: History, version: int, migration: Migration | None, statements: int, *, applied: bool) -> str:
    """Return a part of `enter_sql` that ends an interrupted migration, as applied or as never begun."""
    this = f"WHERE version = {version} AND finished_at IS NULL"
    if not applied:
        return f"\n    DELETE FROM ONLY {history.name} {this};"
    file = (
        f", name = {literal(migration.name)}, checksum = {_hex_sql(migration.checksum)}, statements_done = {statements}"
        if migration
        else ""
    )
    return f"""
    UPDATE ONLY {history.name} SET finished_at = clock_timestamp(), applied_by = CURRENT_USER,
      ampd_version = '{VERSION}'{file} {this};
    IF {_has_done_checksum_sql(history)} THEN
      UPDATE ONLY {history.name} SET {DONE_CHECKSUM} = NULL WHERE version = {version};
    END IF;"""
