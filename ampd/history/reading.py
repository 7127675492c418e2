"""One consistent read of the history, in one round trip, and what may be wrong with the table.

Migrations may leave any search_path behind and strangers may own objects on it. So what stands before the search path
has been replaced is qualified, operators included.

A name can come to mean another table at any time, so long as nothing is locked. So the table is locked first, and then
looked at by its oid: whose it is, and that nothing on it would run anybody's code. Only then is it read or written.
"""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec

from ampd.advisory_lock import holder_sql, lock_key
from ampd.display import one_line
from ampd.errors import LockTimeout
from ampd.migration import AppliedMigration
from ampd.other_sessions import Holder
from ampd.postgres.quoting import do_block, literal
from ampd.sql.slices import Slices, in_slices, mapping
from ampd.sqlstates import REPLACED
from ampd.statement_progress import progress_sql

from .distrust import (
    SearchPath,
    check_trust,
    exposed_error,
    locked_error,
    not_ours_error,
    path_sql,
    search_path_error,
)
from .table import LOCK, History, Owner, Table, pin_session_sql
from .trust import (
    COLUMNS,
    DONE_CHECKSUM,
    MAY_FIRE,
    PLAIN,
    alterations_sql,
    columns_sql,
    fires_sql,
    known_role_sql,
    managed_schema_sql,
    shaped_sql,
    trusted_role_sql,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ampd.migration import Migration
    from ampd.postgres.connection import Session

    from .table import Place


READ_LOCK_SECS = 10  # nobody locks a history table for so long but by hand
_LONGEST_ROW = 4096  # bytes as stored, of what has no length of its own: ten times what ampd writes
_MOST_ROWS = 50_000


class _Row(msgspec.Struct, frozen=True, array_like=True):
    """A row of the history table, each value as the server prints it; an empty text stands for NULL."""

    version: str
    name: str
    checksum: str
    started_at: str
    finished_at: str
    statements_done: str
    applied_by: str
    ampd_version: str
    done_checksum: str

    def migration(self) -> AppliedMigration:
        return AppliedMigration(
            version=int(self.version),
            name=self.name,
            checksum=bytes.fromhex(self.checksum[2:]),
            started_at=datetime.fromisoformat(self.started_at),
            finished_at=datetime.fromisoformat(self.finished_at) if self.finished_at else None,
            statements_done=int(self.statements_done),
            applied_by=self.applied_by,
            ampd_version=self.ampd_version,
            done_checksum=bytes.fromhex(self.done_checksum[2:]) if self.done_checksum else None,
        )


class _Answer(msgspec.Struct, frozen=True):
    """What the server answers to a read."""

    history: History
    rows: tuple[_Row, ...] | None
    fit: bool | None  # whether all rows are of a size that ampd writes; None without rows
    expected: bool | None = None  # the rows are those of the expected files, and left out
    unaltered: bool | None = None  # whether the table is as ampd has made it; None without one
    table: Table | None = None
    schema_owner: Owner | None = None
    holder: Holder | None = None


def digesting(files: Iterable[Migration]) -> Slices[str]:
    """Return, in slices, what identifies a history in which exactly these files are applied: SHA-256, in hexadecimal.

    The server computes the same of its rows, so that a history need not travel only to be found as expected.
    """
    digest, between = sha256(), b""
    for file in files:
        digest.update(between + file.checksum + f"{file.version} {file.name}".encode())
        between = b"\0"
        yield
    return digest.hexdigest()


def _expected_row(file: Migration) -> AppliedMigration:
    return AppliedMigration(
        version=file.version,
        name=file.name,
        checksum=file.checksum,
        started_at=_UNKNOWN,
        finished_at=_UNKNOWN,
        statements_done=0,
        applied_by="",
        ampd_version="",
    )


_UNKNOWN = datetime.fromtimestamp(0, UTC)

# Of the rows h, in the order of their versions; one that is unfinished, or too large, is none that a file could give.
# The text of each is hashed as it would be sent, in UTF-8, between a checksum of a fixed size and a zero byte.
_DIGEST = """bool_and(ampd_fit AND finished_at IS NOT NULL AND octet_length(checksum) = 32)
    AND encode(sha256(string_agg(checksum || textsend(concat(version, ' ', name)), decode('00', 'hex') ORDER BY version)
      FILTER (WHERE ampd_fit)), 'hex')"""

# The limit on a statement that runs is the one that held when it began. What the block does not reach is not parsed,
# and what it repeats is not planned again.
_BEGIN = (
    "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; SET LOCAL statement_timeout = '30s'; "
    "SET LOCAL check_function_bodies = off; SET LOCAL plan_cache_mode = force_generic_plan"
)


async def read(
    session: Session, place: Place, *, lock_schema: str | None = None, expected: Sequence[Migration] = ()
) -> History:
    """Read the history in one round trip, in a read-only transaction; with `lock_schema` also who holds its lock there.

    The configured role reads it if we are a member of that, and may own it. A history in which
    exactly the `expected` files are applied does not travel: its rows are then made of the files, and know no time.

    Raises:
        ConfigError: the table is not one of ampd's, or no schema of the search path exists.
        LockTimeout: another session has locked it.
        PermissionDenied: the owner of the table, or of its schema, is not trusted; or the role may not read the table,
            or use any schema of its search path.
    """
    try:
        known = await in_slices(digesting(expected)) if expected else None
        answer = await session.ask(_read_sql(session, place, lock_schema, known), _Answer)
        if answer.expected:
            applied = await in_slices(mapping(_expected_row, expected))
        else:
            applied = await in_slices(mapping(_Row.migration, answer.rows or ()))
    except LockTimeout as error:
        here = f" AND n.nspname = {literal(place.schema)}" if place.schema else ""
        raise await locked_error(session, error, f"c.relname = {literal(place.table)}{here}", place.table) from error
    except ValueError as error:
        raise not_ours_error(
            f"{one_line(place.table)} in {one_line(place.schema or 'the search path')}",
            f"a row of it cannot be read: {error}",
        ) from error
    history = msgspec.structs.replace(
        answer.history,
        table=answer.table,
        schema_owner=answer.schema_owner,
        holder_known=lock_schema is not None,
        holder=answer.holder,
        place=place,
        applied=applied,
    )
    # Only an answer of the backend's own tells: a pooler has another pid in its greeting, or none.
    session.role, session.pooled = history.user, history.pid != session.server_pid
    if history.schema is None:
        raise search_path_error(one_line(history.user), await session.ask(path_sql(session), SearchPath))
    if (table := history.table) is not None:
        if table.trusted and not answer.unaltered:
            alterations = await session.ask(alterations_sql(session, table.oid), list[str])
            raise not_ours_error(history.shown_name, f"it {', and '.join(map(one_line, alterations))}")
        check_trust(history, table)
    if (owner := history.schema_owner) is not None and not owner.trusted:
        raise exposed_error(history, owner)
    if answer.fit is False or len(history.applied) > _MOST_ROWS:
        raise not_ours_error(
            history.shown_name, f"it has rows of a size, or more than {_MOST_ROWS} rows, that ampd has not written"
        )
    return history


def history_warnings(history: History) -> Iterator[str]:
    """Yield warnings on a history that is about to be added to."""
    if history.table is not None and history.table.row_security:
        name = history.shown_name
        yield (
            f"row level security is on for the history table {name}: it does not concern this run, and keeps "
            "the history from roles that are neither its owner nor have BYPASSRLS"
        )


def _read_sql(session: Session, place: Place, lock_schema: str | None, known: str | None) -> str:
    """Return the message that reads a history and notes an `_Answer`; `known` is the digest of the expected rows."""
    find_holder = "" if lock_schema is None else _find_holder_sql(lock_schema, place.table)
    document = f"""json_build_object('history', h, 'schema_owner', CASE WHEN s.oid IS NOT NULL THEN s END,
  'table', CASE WHEN t.oid IS NOT NULL THEN t END, 'unaltered', h.unaltered, 'rows', applied, 'fit', fit,
  'expected', same{", 'holder', holder" if find_holder else ""})"""
    # A table that cannot be locked is looked for again. Nearly all of the time goes to planning: what is rarely needed
    # (which triggers and rules there are, what else is known of an owner) is asked in statements of its own.
    body = f"""
DECLARE
places pg_catalog.name[] := {_places_sql(place.schema)};
place pg_catalog.name;
home pg_catalog.oid;
locked pg_catalog.oid;
t pg_catalog.record;
s pg_catalog.record;
h pg_catalog.record;
{"refused pg_catalog.text;" if place.role else ""}
source pg_catalog.text;
same pg_catalog.bool;
applied pg_catalog.jsonb;
fit pg_catalog.bool;
{"holder pg_catalog.jsonb; progress pg_catalog.jsonb;" if find_holder else ""}
BEGIN{_take_role_sql(place.role)}{pin_session_sql(f"{READ_LOCK_SECS}s", bytea_output="hex")}
{_find_and_lock_sql(place)}
{_look_sql(place.role)}
{_look_again_sql(place.role)}
{_read_rows_sql(place, known)}{find_holder}
{session.note_sql(document)}
END"""
    return f"{_BEGIN}; {do_block(body)}; COMMIT"


# The parts of that block, in their order, with its variables. Whatever they name is found on the pinned search path,
# but for what comes before it: nothing may be looked up there, types included. And every catalog that a fresh backend
# need not open saves a tenth of a millisecond.


def _places_sql(schema: str | None) -> str:
    """Return an SQL expression for the schemas to look in, in their order."""
    return "pg_catalog.current_schemas(false)" if schema is None else f"ARRAY[{literal(schema)}::pg_catalog.name]"


def _take_role_sql(role: str | None) -> str:
    """Return PL/pgSQL that takes the configured role; who only reads need not have it, so why not goes to `refused`."""
    if role is None:
        return ""
    return f"""
  BEGIN
    PERFORM pg_catalog.set_config('role', {literal(role)}, true);
  EXCEPTION WHEN OTHERS THEN refused := SQLERRM;
  END;"""


def _named_in_format(place: Place) -> str:
    """Return the table's name as it stands in a format, in single quotes."""
    return place.quoted_table.replace("%", "%%").replace("'", "''")


def _find_and_lock_sql(place: Place) -> str:
    """Return PL/pgSQL that finds the table and locks it: its schema in `place`, its oid in `home`, the rest in `t`."""
    return f"""<<search>>
BEGIN
  FOR attempt IN 1..5 LOOP
    FOREACH place IN ARRAY places LOOP
      home := CASE WHEN NOT starts_with(place, 'pg_temp_')
        THEN to_regclass(quote_ident(place) || {literal(f".{place.quoted_table}")}) END;
      EXIT WHEN home IS NOT NULL;
    END LOOP;
    SELECT c.oid::int8 AS oid, c.relowner::int8 AS owner_oid, pg_get_userbyid(c.relowner) AS owner,
        {known_role_sql("c.relowner", place.role)} AS trusted, c.relnamespace,
        c.relkind = 'r' AND has_table_privilege(c.oid, 'SELECT') AS readable, {PLAIN} AS plain, {MAY_FIRE} AS may_fire,
        c.relrowsecurity AS row_security, c.relrowsecurity AND row_security_active(c.oid) AS hidden
      INTO t FROM pg_class c WHERE c.oid = home;
    EXIT search WHEN home IS NULL OR NOT t.readable OR home = locked;
    BEGIN
      EXECUTE format('{LOCK} %I.{_named_in_format(place)} IN ACCESS SHARE MODE', place);
      locked := home;
    EXCEPTION WHEN undefined_table OR wrong_object_type OR insufficient_privilege THEN NULL;
    END;
  END LOOP;
  RAISE EXCEPTION 'the history table is replaced all the time' USING ERRCODE = '{REPLACED}';
END;"""


def _look_sql(role: str | None) -> str:
    """Return PL/pgSQL that looks at what is locked: its schema into `s`, server and shape of the table into `h`."""
    return f"""IF home IS NULL THEN
  place := (SELECT name FROM unnest(places) name WHERE NOT starts_with(name, 'pg_temp_') LIMIT 1);
END IF;
SELECT n.oid AS schema, nspowner::int8 AS oid, pg_get_userbyid(nspowner) AS name,
    {known_role_sql("nspowner", role)} AS trusted
  INTO s FROM pg_namespace n WHERE n.oid = coalesce(t.relnamespace, to_regnamespace(quote_ident(place)));
SELECT current_database() AS database, current_user AS "user", pg_backend_pid() AS pid,
    host(inet_server_addr()) AS host, inet_server_port() AS port,
    pg_is_in_recovery() OR current_setting('default_transaction_read_only') = 'on' AS read_only,
    place AS schema, s.oid IS NOT NULL AS schema_exists, t.oid IS NOT NULL AS table_exists,
    {"refused AS role_refused, " if role else ""}t.plain AND {shaped_sql("home")} AS unaltered,
    bool_or(attname = '{DONE_CHECKSUM}') AS has_done_checksum
  INTO h FROM {columns_sql("home")};"""


def _look_again_sql(role: str | None) -> str:
    """Return PL/pgSQL for what is rarely asked: whether anything fires, and what else makes the owners trusted."""
    return f"""IF t.may_fire AND h.unaltered THEN
  h.unaltered := NOT {fires_sql("home")};
END IF;
IF NOT (coalesce(t.trusted, true) AND s.trusted) THEN
  SELECT bool_or(r.oid = t.owner_oid) IS TRUE, bool_or(r.oid = s.oid) IS TRUE INTO t.trusted, s.trusted
    FROM pg_roles r WHERE r.oid IN (t.owner_oid, s.oid) AND {trusted_role_sql(role)};
  IF NOT s.trusted THEN
    s.trusted := {managed_schema_sql("s.schema", "s.oid")};
  END IF;
END IF;"""


def _read_rows_sql(place: Place, known: str | None) -> str:
    """Return PL/pgSQL that reads the rows into `applied`; with the `known` digest it only makes `same` true."""
    # concat() takes any type as it prints itself, and so runs no cast of anybody's: a schema can be renamed under us.
    cells = ", ".join(f"concat({name})" for name in (*COLUMNS, "ampd_mark") if name != DONE_CHECKSUM)
    sizes = " + ".join(f"pg_column_size({name})" for name in ("name", "checksum", "applied_by", "ampd_version"))
    compare = (
        f"""
  EXECUTE concat($digest$SELECT {_DIGEST} = '{known}' $digest$, source) INTO same;"""
        if known
        else ""
    )
    return f"""IF t.readable AND t.trusted AND s.trusted AND h.unaltered AND NOT t.hidden THEN
  source := format('FROM (SELECT h.*, %1$s AS ampd_mark, h.tableoid = %2$s
      AND coalesce({sizes} + coalesce(pg_column_size(%1$s), 0), {_LONGEST_ROW}) < {_LONGEST_ROW} AS ampd_fit
    FROM ONLY %3$I.{_named_in_format(place)} h LIMIT {_MOST_ROWS + 1}) h',
    CASE WHEN h.has_done_checksum THEN '{DONE_CHECKSUM}' ELSE 'NULL' END, home, place);{compare}
  IF same IS NOT TRUE THEN
    EXECUTE concat('SELECT jsonb_agg(ARRAY[{cells}]) FILTER (WHERE ampd_fit), bool_and(ampd_fit) ', source)
      INTO applied, fit;
  END IF;
END IF;"""


def _find_holder_sql(lock_schema: str, table: str) -> str:
    """Return PL/pgSQL that puts into `holder` who has the lock of the history in a schema, and how far it is."""
    # A runner is who may write the history, if only as its owner; before there is one, whoever says so.
    is_runner = (
        "(home IS NULL OR pg_has_role(a.usesysid, t.owner_oid::oid, 'MEMBER') "
        "OR has_table_privilege(a.usesysid, home, 'INSERT'))"
    )
    return f"""
holder := {holder_sql(f"'{lock_key(lock_schema, table)}'::int8", is_runner)};
IF holder IS NOT NULL THEN{progress_sql("(holder->>'pid')::integer", "progress")}
  holder := holder || jsonb_build_object('progress', progress);
END IF;"""
