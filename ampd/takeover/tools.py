"""Other tools' histories: what their columns mean, and reading one without running anybody's code."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from ampd.apply.session_state import set_role_sql
from ampd.display import one_line
from ampd.errors import ConfigError, ConnectionFailed, PermissionDenied
from ampd.history.first_run import tool_of
from ampd.history.reading import READ_LOCK_SECS
from ampd.history.table import LOCK
from ampd.history.trust import trusted_owner_sql
from ampd.postgres.quoting import do_block, identifier, literal
from ampd.sqlstates import DATA_EXCEPTION, SYNTAX_ERROR

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ampd.history.first_run import Neighbour
    from ampd.postgres.connection import Session


ON_YOUR_WORD = "`ampd baseline VERSION` records every file up to VERSION as applied"
GONE, NOT_RUN = "gone", "not run"  # what `kind` says of rows that stand for no migration: one undone, or the tool's own


class Tool(msgspec.Struct, frozen=True):
    """A tool whose history can be taken over: each column of it as an SQL expression over a row h.

    `version` is a number, or `name` is a whole file name. Where it `is_current`, its one row stands for all before it.
    """

    version: str = "''"
    name: str = "''"
    checksum: str = "''"
    at: str = "''"
    failed: str = "false"
    kind: str = "''"
    order: str = "h.version"
    is_current: bool = False

    @property
    def columns(self) -> set[str]:
        """Return the columns that its history needs to have; when and in which order, older releases may not know."""
        return _columns(self.version, self.name, self.checksum, self.failed, self.kind)

    def rows_sql(self, columns: frozenset[str]) -> str:
        """Return an SQL expression for all rows h of a table with these columns, each as `Row` has it."""
        at = self.at if _columns(self.at) <= columns else "''"
        order = self.order if _columns(self.order) <= columns else "1"
        cells = (self.version, self.name, self.checksum, at, self.failed, self.kind)
        texts = ", ".join(f"left(concat({cell}), {_LONGEST_TEXT})" for cell in cells)
        return f"coalesce(jsonb_agg(ARRAY[{texts}] ORDER BY {order}), '[]')"


def _columns(*expressions: str) -> set[str]:
    return {column for each in expressions for column in re.findall(r"h\.(\w+)", each)}


_LONGEST_TEXT = 300  # characters


_UNDONE = f"starts_with(h.type, 'UNDO') OR h.type = 'DELETE' THEN '{GONE}'"
TOOLS = {
    "sqlx": Tool(
        version="h.version",
        name="h.description",
        checksum="encode(h.checksum, 'hex')",
        at="h.installed_on",
        failed="NOT h.success",
    ),
    "flyway": Tool(
        version="h.version",
        name="h.description",
        checksum="h.checksum",
        at="h.installed_on",
        failed="NOT h.success",
        kind=f"CASE WHEN {_UNDONE} WHEN h.type = 'SCHEMA' THEN '{NOT_RUN}' ELSE h.type END",
        order="h.installed_rank",
    ),
    "alembic": Tool(name="h.version_num", order="h.version_num"),
    "goose": Tool(
        version="h.version_id",
        at="h.tstamp",
        failed="CASE WHEN h.is_applied IS NOT NULL THEN false END",
        kind=f"CASE WHEN h.version_id = 0 THEN '{NOT_RUN}' WHEN NOT h.is_applied THEN '{GONE}' END",
        order="h.id",
    ),
    "golang-migrate": Tool(version="h.version", failed="h.dirty", is_current=True),
    "dbmate": Tool(version="h.version"),
    "node-pg-migrate": Tool(name="h.name", at="h.run_on", order="h.id"),
    "yoyo": Tool(name="h.migration_id", at="concat(h.applied_at_utc, '+00')", order="h.applied_at_utc"),
}


class Row(msgspec.Struct, frozen=True, array_like=True):
    """A row of a tool's history, each value as text; empty where the tool has none."""

    version: str
    name: str
    checksum: str = ""
    at: str = ""
    failed: str = "f"
    kind: str = ""

    @property
    def label(self) -> str:
        """Return version and name on one line."""
        return one_line(f"{self.version} {self.name}".strip()) or "an empty row"

    @property
    def is_done(self) -> bool:
        """Return whether it says that its migration, if it stands for any, was applied."""
        return self.failed == "f"

    @property
    def undone(self) -> str:
        """Return what else it says."""
        says = "is recorded as failed, or as not finished" if self.failed == "t" else "does not say whether it is done"
        return f"{self.label} {says}"


class _Answer(msgspec.Struct, frozen=True):
    """What the server answers to a read; None for a table that is not trusted, or no table."""

    rows: tuple[Row, ...] | None


def found_history(tables: Iterable[Neighbour], home: str, source: str) -> tuple[str, Neighbour]:
    """Return which of TOOLS has a history in a schema, and the table; `source` is its name, or auto.

    Raises:
        ConfigError: there is none of that tool, or, for auto, none or several.
        PermissionDenied: its owner is not trusted.
    """
    here = one_line(identifier(home))
    found = {
        known.source: table
        for table in tables
        if table.schema == home and (known := tool_of(table)) and known.source in TOOLS
        if TOOLS[known.source].columns <= table.columns
    }
    shown = ", ".join(f"{name}: {table}" for name, table in found.items())
    ways = [f"`ampd baseline --from {name}`" for name in found]
    if source != "auto":
        found = {name: table for name, table in found.items() if name == source}
    if not found:
        missing = "a tool that ampd can read" if source == "auto" else f"{source} that has entries"
        instead = f"to take over what is there: {' or '.join(ways)}; " if ways else ""
        history = f"the history of {source}" if ways else "it"
        raise ConfigError(
            f"{here} contains no history of {missing}" + (f", but {shown}" if shown else ""),
            hint=f"{instead}if {history} is in another schema, set metadata_db.schema; if you know what the database "
            f"contains, {ON_YOUR_WORD}",
        )
    if len(found) > 1:
        raise ConfigError(
            f"{here} contains the histories of several tools: {shown}",
            hint="say which one with `ampd baseline --from TOOL`",
        )
    ((name, table),) = found.items()
    if not table.trusted:
        raise _stranger_error(table)
    return name, table


def _stranger_error(table: Neighbour) -> PermissionDenied:
    return PermissionDenied(
        f"the history {table} is not trusted: its owner is neither the role that connects, nor a superuser, nor the "
        "owner of the database, nor the role in metadata_db.migrations.role",
        hint="if that role migrates this database, name it as metadata_db.migrations.role; else somebody has put the "
        "table there",
    )


_MOST_ROWS = 50_000


async def read_rows(session: Session, table: Neighbour, tool: Tool, role: str | None) -> tuple[Row, ...]:
    """Read a tool's history in one round trip, in a read-only transaction.

    Raises:
        PermissionDenied: its owner is not trusted any more, or we may not read it.
        ConfigError: its columns are of other types than the tool makes them, or its rows are too many.
    """
    name = f"{identifier(table.schema)}.{identifier(table.name)}"
    this = f"c.relname = {literal(table.name)} AND n.nspname = {literal(table.schema)}"
    # As in the read of ampd's own history: lock it, look at it, and read it only then.
    body = f"""
DECLARE
  trusted pg_catalog.bool;
  found pg_catalog.jsonb;
BEGIN
  PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
          pg_catalog.set_config('datestyle', 'ISO', true),
          pg_catalog.set_config('row_security', 'off', true),
          pg_catalog.set_config('lock_timeout', '{READ_LOCK_SECS}s', true),
          pg_catalog.set_config('statement_timeout', '30s', true);
  {LOCK} {name} IN ACCESS SHARE MODE;
  SELECT {trusted_owner_sql("c.relowner", role)} INTO trusted
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {this} AND c.relkind = 'r';
  IF trusted THEN
    SELECT {tool.rows_sql(table.columns)} INTO found
      FROM (SELECT * FROM ONLY {name} LIMIT {_MOST_ROWS + 1}) h;
  END IF;
  {session.note_sql("jsonb_build_object('rows', found)")}
END"""
    begin = f"BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {set_role_sql(role, local=True)}"
    message = f"{begin}{do_block(body)}; COMMIT"
    try:
        answer = await session.ask(message, _Answer)
    except ConnectionFailed as error:
        if error.sqlstate is None or error.sqlstate[:2] not in (DATA_EXCEPTION, SYNTAX_ERROR):
            raise
        raise ConfigError(
            f"the history {table} is not as its tool makes it: {error.message}",
            hint=f"if you know what the database contains, {ON_YOUR_WORD}",
            sqlstate=error.sqlstate,
        ) from error
    if answer.rows is None:
        raise _stranger_error(table)
    if len(answer.rows) > _MOST_ROWS:
        raise ConfigError(f"the history {table} has more than {_MOST_ROWS} rows")
    return answer.rows
