"""Writing the history: PL/pgSQL for the transactions that create, enter and change it. Runs none of it.

Every transaction locks the table, looks at it by its oid, and only then writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ampd.postgres.quoting import do_block, identifier, literal
from ampd.sqlstates import ALTERED, EMPTIED, ESCAPED, EXPOSED, MOVED, REPLACED
from ampd.version import VERSION

from .table import LOCK, TABLE
from .trust import COLUMNS, LAST, MAY_FIRE, PLAIN, SHAPED, columns_sql, fires_sql, trusted_schema_sql

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ampd.migration import Migration
    from ampd.postgres.connection import Session

    from .table import History


def enter_sql(history: History, *parts: str) -> str:
    """Return PL/pgSQL for the beginning of a transaction that writes the history, under the lock.

    It checks that the history is ours to write and unchanged since it was read, or creates it where there was none,
    and then runs `parts`.
    """
    if history.table_exists:
        finished = sum(1 for row in history.applied if row.finished_at is not None)
        newest = max((row.version for row in history.applied), default=-1)
        begin = f"""{_check_table_sql(history)}
    IF (SELECT count(*) <> {len(history.applied)} OR count(h.finished_at) <> {finished}
          OR COALESCE(max(h.version), -1) <> {newest} FROM ONLY {history.name} h) THEN
      RAISE EXCEPTION 'the history has moved' USING ERRCODE = '{MOVED}';
    END IF;"""
    else:
        # A query, and not to_regclass: that may answer from what this session knew before it had the lock.
        begin = f"""
    IF EXISTS (SELECT FROM pg_class c WHERE {_is_named_sql(history)}) THEN
      RAISE EXCEPTION 'the history has moved' USING ERRCODE = '{MOVED}';
    END IF;{_create_sql(history)}{_check_table_sql(history)}"""
    return f"""
  DECLARE
    path pg_catalog.text := pg_catalog.current_setting('search_path');
  BEGIN{_PIN}{begin}{"".join(parts)}
    PERFORM set_config('search_path', path, true);
  END;"""


# The path is pinned for the rest of the transaction, unless it is put back.
_PIN = """
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);"""


def _is_named_sql(history: History) -> str:
    """Return a condition for the row c of pg_class that the history's name stands for."""
    return (
        f"c.relname = '{TABLE}' AND c.relnamespace = (SELECT oid FROM pg_namespace "
        f"WHERE nspname = {literal(history.schema)})"
    )


def _check_table_sql(history: History) -> str:
    """Return PL/pgSQL that locks the history, and checks that it is the one that was read, and ours.

    What follows may name it again: nobody but the owner of its schema could give the name to another table now. The
    search path must be pinned.
    """
    known, owner = history.table, history.schema_owner
    same = "pg_get_userbyid(c.relowner) = CURRENT_USER" if known is None else f"c.relowner = {known.owner_oid}"
    this = "" if known is None else f"c.oid = {known.oid} AND "
    owners = f"c.relowner, {owner.oid}" if owner else "c.relowner"
    return f"""
    {LOCK} {history.name} IN ROW EXCLUSIVE MODE;
    DECLARE
      home pg_catalog.oid;
      ours pg_catalog.bool;
      may_fire pg_catalog.bool;
      may_hide pg_catalog.bool;
      schema_oid pg_catalog.oid;
      schema_owner pg_catalog.oid;
      schema_trusted pg_catalog.bool;
    BEGIN
      SELECT c.oid, {same} AND {PLAIN} AND (SELECT {SHAPED} FROM {columns_sql("c.oid")}),
             {MAY_FIRE}, c.relrowsecurity, n.oid, n.nspowner, n.nspowner IN ({owners})
        INTO home, ours, may_fire, may_hide, schema_oid, schema_owner, schema_trusted
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {this}{_is_named_sql(history)};
      IF may_fire THEN
        ours := ours AND NOT {fires_sql("home")};
      END IF;
      IF may_hide THEN
        ours := ours AND NOT row_security_active(home);
      END IF;
      IF NOT schema_trusted THEN
        schema_trusted := {trusted_schema_sql("schema_oid", "schema_owner", history.role)};
      END IF;
      IF home IS NULL THEN
        RAISE EXCEPTION 'the history is another table now' USING ERRCODE = '{REPLACED}';
      ELSIF NOT ours THEN
        RAISE EXCEPTION 'the history is not as ampd makes it' USING ERRCODE = '{ALTERED}';
      ELSIF NOT schema_trusted THEN
        RAISE EXCEPTION 'the schema of the history belongs to a stranger' USING ERRCODE = '{EXPOSED}';
      END IF;
    END;"""


def _create_sql(history: History) -> str:
    assert history.schema is not None
    # CREATE SCHEMA wants the right to create one even where it exists: only when it does not.
    schema = "" if history.schema_exists else f"\n    CREATE SCHEMA {identifier(history.schema)};"
    rules = {"version": " PRIMARY KEY", "finished_at": ""}
    columns = ",\n      ".join(
        f"{name} {_SPELT.get(kind, kind)}{rules.get(name, ' NOT NULL')}"
        for name, kind in COLUMNS.items()
        if name != LAST
    )
    return _for_event_triggers_sql(f"""{schema}
    CREATE TABLE {history.name} (
      {columns}
    );
    COMMENT ON TABLE {history.name} IS 'Which migrations ampd has applied, one row each';""")


# The other types are keywords, which no search path changes.
_SPELT = {"text": "pg_catalog.text", "bytea": "pg_catalog.bytea"}


def _for_event_triggers_sql(definitions: str) -> str:
    """Return a part of `enter_sql` that runs DDL with the original search path, on which event triggers may rely."""
    return f"""
    PERFORM set_config('search_path', path, true);{definitions}{_PIN}"""


def insert_sql(history: History, migration: Migration) -> str:
    """Return a part of `enter_sql` that records a migration as started."""
    return f"""
    INSERT INTO {history.name} (version, name, checksum, started_at, statements_done, applied_by, ampd_version)
    VALUES ({migration.version}, {literal(migration.name)}, decode('{migration.checksum.hex()}', 'hex'),
            clock_timestamp(), 0, CURRENT_USER, '{VERSION}');"""


def adopt_sql(history: History, migrations: Iterable[tuple[Migration, str | None]], source: str | None) -> str:
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


def make_room_sql(history: History) -> str:
    """Return a part of `enter_sql` that adds the column that resuming needs, if it is missing."""
    add = f"""
      ALTER TABLE {history.name} ADD COLUMN {LAST} pg_catalog.bytea;
      COMMENT ON COLUMN {history.name}.{LAST} IS
        'SHA-256 of the statements that a no-transaction migration has begun or done; null once it is finished';"""
    return f"""
    IF NOT {_has_room_sql(history)} THEN{_for_event_triggers_sql(add)}
    END IF;"""


def _has_room_sql(history: History) -> str:
    return f"""EXISTS (SELECT FROM pg_attribute WHERE attrelid = {literal(history.name)}::regclass
                   AND attname = '{LAST}' AND NOT attisdropped)"""


def begun_by_sql(session: Session, history: History, version: int) -> str:
    """Return PL/pgSQL that notes the transaction that has last written a migration's row of the history, as `str`."""
    xmin = f"(SELECT to_jsonb(h.xmin::text) FROM ONLY {history.name} h WHERE h.version = {version})"
    return f"{_PIN}{_check_table_sql(history)} {session.note_sql(xmin)}"


class Checkpoint(msgspec.Struct, frozen=True):
    """How far a no-transaction migration has come: statements done, and the checksum of all that were begun."""

    done: int
    checksum: bytes | None


def advance_sql(history: History, migration: Migration, was: Checkpoint, now: Checkpoint) -> str:
    """Return PL/pgSQL that ends a transaction with the record how far a no-transaction migration has come.

    It fails if another runner has gone on with it: a message may reach the server long after its runner was given up.
    """
    return _update_sql(history, migration, was, f"statements_done = {now.done}, {LAST} = {_hex_sql(now.checksum)}")


def finish_no_transaction_sql(history: History, migration: Migration, was: Checkpoint, statements: int) -> str:
    """Return PL/pgSQL that ends a transaction with the record that a no-transaction migration is done."""
    return _update_sql(
        history,
        migration,
        was,
        f"finished_at = clock_timestamp(), statements_done = {statements}, "
        f"name = {literal(migration.name)}, checksum = {_hex_sql(migration.checksum)}, {LAST} = NULL",
    )


def _update_sql(history: History, migration: Migration, was: Checkpoint, change: str) -> str:
    begun = was.checksum.hex() if was.checksum else ""
    return f"""{_PIN}{_check_table_sql(history)}
    UPDATE ONLY {history.name} SET {change}
     WHERE version = {migration.version} AND finished_at IS NULL
       AND statements_done = {was.done} AND COALESCE(encode({LAST}, 'hex'), '') = '{begun}';
    IF NOT FOUND THEN
      RAISE EXCEPTION 'the history has moved' USING ERRCODE =
        CASE WHEN {_has_row_sql(history, migration.version)} THEN '{MOVED}' ELSE '{EMPTIED}' END;
    END IF;"""


def _has_row_sql(history: History, version: int) -> str:
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
    IF {_has_room_sql(history)} THEN
      UPDATE ONLY {history.name} SET {LAST} = NULL WHERE version = {version};
    END IF;"""


def finish_sql(history: History, migration: Migration, statements: int) -> str:
    """Return a statement that records a migration as finished, in the transaction that started it and in no other."""
    there = _has_row_sql(history, migration.version)
    if history.applied:
        there += f" AND {_has_row_sql(history, max(row.version for row in history.applied))}"
    return do_block(f"""BEGIN{_PIN}{_check_table_sql(history)}
    UPDATE ONLY {history.name} SET finished_at = clock_timestamp(), statements_done = {statements}
     WHERE version = {migration.version} AND xmin = pg_current_xact_id()::xid AND {there};
    IF NOT FOUND THEN
      RAISE EXCEPTION 'the migration ended its own transaction, or deleted its history row' USING ERRCODE =
        CASE WHEN {there} THEN '{ESCAPED}' ELSE '{EMPTIED}' END;
    END IF;
END""")
