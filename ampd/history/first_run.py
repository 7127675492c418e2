"""What else is in the database before a first run, so that no history is overlooked.

A search path that differs from one role to another, or a schema that was set later, leads a run past the history; then
it would apply everything again. So where there is no history, and only then, one more question is asked, of the catalog
alone: no table of anybody else's is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ampd.config import HISTORY_TABLE
from ampd.display import one_line
from ampd.errors import ConfigError, LockTimeout, MigrationConflict, PermissionDenied
from ampd.postgres.quoting import do_block, identifier, literal
from ampd.sqlstates import NEIGHBOURS

from .distrust import locked_error
from .reading import READ_LOCK_SECS
from .refusals import NO_FOLDER
from .trust import trusted_owner_sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ampd.errors import AmpdError
    from ampd.postgres.connection import Session

    from .table import History, Place


_MOST = 20  # tables of each kind that are asked for


class Neighbour(msgspec.Struct, frozen=True):
    """Another table in the database; `trusted` says whether its owner may own a history."""

    schema: str
    name: str
    owner: str
    trusted: bool
    columns: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return one_line(f"{identifier(self.schema)}.{identifier(self.name)} (owner {self.owner})")


class Neighbours(msgspec.Struct, frozen=True):
    """What else the database contains: a limited number of each kind, those of trusted owners first."""

    histories: tuple[Neighbour, ...] = ()  # of ampd's, with rows, in other schemas
    tools: tuple[Neighbour, ...] = ()  # with rows, and named as the history of another tool is
    tables: tuple[Neighbour, ...] = ()  # of any kind, in the schema; asked for only where it matters
    type_owner: str | None = None  # of a type in the schema that has the name of the history, which a table cannot have


class Tool(msgspec.Struct, frozen=True):
    """Another tool, and how its history is recognised; `schema` is its own, if it has one."""

    name: str
    table: str
    columns: frozenset[str]
    schema: str | None = None

    @property
    def source(self) -> str | None:
        """Return how `ampd baseline --from` calls it; None if ampd does not read its history."""
        name = self.name.lower().removesuffix(" or rails")
        return name if name in SOURCES else None


SOURCES = ("sqlx", "flyway", "alembic", "goose", "golang-migrate", "dbmate", "node-pg-migrate", "yoyo")


def _tool(name: str, place: str, columns: str) -> Tool:
    schema, _, table = place.rpartition(".")
    return Tool(name, table, frozenset(columns.split()), schema or None)


TOOLS = (
    # with a schema of their own
    _tool("Drizzle", "drizzle.__drizzle_migrations", "hash created_at"),
    _tool("Atlas", "atlas_schema_revisions.atlas_schema_revisions", "version description hash"),
    _tool("graphile-migrate", "graphile_migrate.migrations", "hash filename"),
    _tool("Supabase", "supabase_migrations.schema_migrations", "version statements"),
    _tool("pgroll", "pgroll.migrations", "schema name migration"),
    _tool("Sqitch", "sqitch.changes", "change_id change project"),
    # in the schema that they migrate
    _tool("sqlx", "_sqlx_migrations", "version description checksum success"),
    _tool("Flyway", "flyway_schema_history", "installed_rank script success"),
    _tool("Flyway", "schema_version", "installed_rank script success"),
    _tool("tern", "schema_version", "version"),
    _tool("Alembic", "alembic_version", "version_num"),
    _tool("goose", "goose_db_version", "version_id is_applied"),
    _tool("golang-migrate", "schema_migrations", "version dirty"),
    _tool("Ecto", "schema_migrations", "version inserted_at"),
    _tool("dbmate or Rails", "schema_migrations", "version"),
    _tool("Rails", "ar_internal_metadata", "key value created_at"),
    _tool("node-pg-migrate", "pgmigrations", "name run_on"),
    _tool("yoyo", "_yoyo_migration", "migration_hash migration_id"),
    _tool("yoyo", "_yoyo_log", "migration_id operation"),
    _tool("refinery", "refinery_schema_history", "version name checksum"),
    _tool("Django", "django_migrations", "app name applied"),
    _tool("Prisma", "_prisma_migrations", "migration_name checksum started_at"),
    _tool("Liquibase", "databasechangelog", "id author filename"),
    _tool("Diesel", "__diesel_schema_migrations", "version run_on"),
    _tool("SeaORM", "seaql_migrations", "version applied_at"),
    _tool("Knex", "knex_migrations", "name batch migration_time"),
    _tool("TypeORM", "migrations", "id timestamp name"),
    _tool("Laravel", "migrations", "id migration batch"),
    _tool("postgres-migrations", "migrations", "id name hash executed_at"),
    _tool("Sequelize", "SequelizeMeta", "name"),
    _tool("MikroORM", "mikro_orm_migrations", "name executed_at"),
    _tool("Kysely", "kysely_migration", "name timestamp"),
    _tool("Atlas", "atlas_schema_revisions", "version description hash"),
    _tool("Doctrine", "doctrine_migration_versions", "version executed_at"),
    _tool("Phinx", "phinxlog", "version migration_name"),
    _tool("Entity Framework", "__EFMigrationsHistory", "MigrationId ProductVersion"),
    _tool("FluentMigrator", "VersionInfo", "Version AppliedOn"),
    _tool("sql-migrate", "gorp_migrations", "id applied_at"),
    _tool("Bun", "bun_migrations", "name group_id migrated_at"),
    _tool("Aerich", "aerich", "version app content"),
    _tool("Piccolo", "migration", "name app_name ran_on"),
    _tool("Play", "play_evolutions", "id hash apply_script"),
    _tool("Drizzle", "__drizzle_migrations", "hash created_at"),
)


def tool_of(table: Neighbour) -> Tool | None:
    """Return the tool whose history a table is, by name and columns; None for an application's own table of that name.

    A history of a single column is only recognised without any other.
    """
    for tool in TOOLS:
        if tool.table == table.name and tool.schema in (None, table.schema):
            known = tool.columns == table.columns if len(tool.columns) == 1 else tool.columns <= table.columns
            if known:
                return tool
    return None


async def read_neighbours(session: Session, history: History, *, packaged: bool) -> Neighbours:
    """Read what else there is, from the catalog alone, in one round trip and in a read-only transaction.

    Args:
        session: a connection, outside of any transaction.
        history: one without any rows.
        packaged: whether the packaged migrations are about to run because no folder was named.

    Raises:
        AmpdError: the question could not be answered.
    """
    assert history.schema is not None
    try:
        return await session.ask(_neighbours_sql(session, history.schema, history.place, packaged=packaged), Neighbours)
    except LockTimeout as error:
        names = ", ".join(sorted({literal(history.place.table), *(literal(tool.table) for tool in TOOLS)}))
        raise await locked_error(session, error, f"c.relname = ANY (ARRAY[{names}])") from error


def check_nothing_found_sql(home: str, place: Place, *, packaged: bool) -> str:
    """Return PL/pgSQL that raises NEIGHBOURS if `read_neighbours` could find anything; the search path must be pinned.

    It asks the size of no table, which could be locked.
    """
    nothing = msgspec.json.encode(Neighbours()).decode()
    return f"""
    IF {_document_sql(home, place, tables=packaged, filled=False)} <> '{nothing}'::jsonb THEN
      RAISE EXCEPTION 'there are other tables' USING ERRCODE = '{NEIGHBOURS}';
    END IF;"""


def _document_sql(home: str, place: Place, *, tables: bool, filled: bool = True) -> str:
    role, table = place.role, literal(place.table)
    names = ", ".join(sorted({literal(tool.table) for tool in TOOLS}))
    places = ", ".join(sorted({literal(tool.schema) for tool in TOOLS if tool.schema} | {literal(home)}))
    columns = "(SELECT jsonb_agg(attname) FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)"
    ours = _tables_sql(
        f"c.relname = {table} AND n.nspname <> {literal(home)} AND NOT starts_with(n.nspname, 'pg_temp_')",
        role,
        filled=filled,
    )
    named = f"c.relname = ANY (ARRAY[{names}]) AND n.nspname = ANY (ARRAY[{places}])"
    tools = _tables_sql(named, role, columns, filled=filled)
    # Extensions bring tables of their own, such as PostGIS its spatial_ref_sys.
    others = f"""c.relname <> {table} AND n.nspname = {literal(home)} AND NOT EXISTS (
        SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')"""
    any_table = _tables_sql(others, role, kinds="'r', 'p', 'f'", filled=False) if tables else "'[]'::jsonb"
    type_owner = f"""(SELECT pg_get_userbyid(t.typowner) FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
      WHERE t.typname = {table} AND n.nspname = {literal(home)} AND t.typrelid = 0)"""
    return (
        f"jsonb_build_object('histories', {ours}, 'tools', {tools}, 'tables', {any_table}, 'type_owner', {type_owner})"
    )


def _neighbours_sql(session: Session, home: str, place: Place, *, packaged: bool) -> str:
    # As in the read of the history: nothing is looked up before the search path has been replaced.
    body = f"""
BEGIN
  PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
          pg_catalog.set_config('lock_timeout', '{READ_LOCK_SECS}s', true),
          pg_catalog.set_config('statement_timeout', '30s', true);
  {session.note_sql(_document_sql(home, place, tables=packaged))}
END"""
    return f"BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {do_block(body)}; COMMIT"


def _tables_sql(which: str, role: str | None, columns: str = "NULL", *, kinds: str = "'r'", filled: bool = True) -> str:
    """Return an SQL expression for some tables as JSON; `filled` leaves out trusted owners' without any page.

    OFFSET keeps the server from asking for the size, and so for a lock, of any other table; its owner could hold one
    for as long as he likes.
    """
    size = "WHERE CASE WHEN trusted THEN pg_relation_size(id) > 0 ELSE true END" if filled else ""
    return f"""(
    SELECT coalesce(jsonb_agg(jsonb_strip_nulls(to_jsonb(few) - 'id')), '[]') FROM (
      SELECT * FROM (
        SELECT c.oid AS id, n.nspname AS schema, c.relname AS name, pg_get_userbyid(c.relowner) AS owner,
          {trusted_owner_sql("c.relowner", role)} AS trusted, {columns} AS columns
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ({kinds}) AND c.relpersistence <> 't' AND {which} OFFSET 0) known
      {size} ORDER BY trusted DESC, schema, name LIMIT {_MOST}) few)"""


class FirstRun(msgspec.Struct, frozen=True):
    """A schema `home` in which a history would be begun, and what speaks against it."""

    found: Neighbours
    home: str
    configured: bool  # whether the schema was set
    packaged: bool  # whether the packaged migrations are about to run, because no folder was named
    table: str = HISTORY_TABLE  # one of another name is a library's, beside whatever the application uses

    def error(self) -> AmpdError | None:
        """Return the error if no history may be begun here; None if it may.

        Tables of untrusted owners are no reason: else anybody could prevent a first run.
        """
        here, table, found = self._here, one_line(self.table), self.found
        if found.type_owner is not None:
            return PermissionDenied(
                f"the history table {here}.{table} cannot be made: a type of that name, which belongs to "
                f"{one_line(found.type_owner)}, is in its place",
                hint=f"as its owner or a superuser: ALTER TYPE {here}.{table} RENAME TO …; or set "
                "metadata_db.schema to another schema",
            )
        if not self.configured and (elsewhere := _trusted(found.histories)):
            there, home = one_line(elsewhere[0].schema), one_line(self.home)
            return ConfigError(
                f"there is no history of migrations in {here}, but one in {_some(elsewhere)}: "
                "everything would be applied again, and recorded in a second history",
                hint=f'to go on with that history set metadata_db.schema = "{there}", or let the search path lead '
                f'there; to begin one in {here} all the same set metadata_db.schema = "{home}"',
            )
        histories = _histories_of_tools(_trusted(found.tools), self.home) if self.table == HISTORY_TABLE else ()
        if tools := {tool: other for other, tool in histories}:
            if any(tool.name == "Rails" for tool in tools):  # one of its two tables could be dbmate's
                tools = {tool: other for tool, other in tools.items() if tool.name != "dbmate or Rails"}
            return MigrationConflict(_migrated_by(here, tools), hint=_way_out(tools, packaged=self.packaged))
        if self.packaged and (tables := _trusted(_tables_of_applications(found, self.home))):
            return ConfigError(
                f"{here} already contains tables: {_some(tables)}; amp's own would be created among them",
                hint=f"{NO_FOLDER}; if these tables are amp's, `ampd baseline VERSION` records its migrations up to "
                "VERSION as applied; to have amp's schema in this database as well, set metadata_db.schema to another "
                "one",
            )
        return None

    def warnings(self) -> Iterator[str]:
        """Yield warnings, for where there is no error."""
        here, found = self._here, self.found
        histories = found.histories if self.configured else _strangers(found.histories)
        if histories:
            there, left = ("is one", "is") if len(histories) == 1 else ("are some", "are")
            others = _some(histories)
            yield f"a history is begun in {here}, and there {there} in {others} as well, which {left} left alone"
        for other, tool in _histories_of_tools(found.tools, self.home):
            if not other.trusted or self.table != HISTORY_TABLE:
                seems = f"{here} seems to be migrated by {tool.name}: {other} has entries"
                yield f"{seems}; ampd runs every file all the same"
        for other, tool in _histories_of_tools(found.tools, None):
            yield f"this database is migrated by {tool.name} as well, whose history is {other}"
        if self.packaged and (tables := _strangers(_tables_of_applications(found, self.home))):
            yield f"{here} already contains tables: {_some(tables)}; amp's own are created among them"

    @property
    def _here(self) -> str:
        return one_line(identifier(self.home))


def _migrated_by(here: str, tools: Mapping[Tool, Neighbour]) -> str:
    """Return what is said of a schema that has the histories of other tools."""
    names = {tool.name for tool in tools}
    if len(names) == 1:
        other = next(iter(tools.values()))
        return f"{here} is migrated by {names.pop()}: its history {other} has entries, and ampd has none there"
    listed = "; ".join(f"{tool.name}, {other}" for tool, other in tools.items())
    return f"{here} is migrated by several tools, whose histories have entries, and ampd has none there: {listed}"


def _way_out(tools: Iterable[Tool], *, packaged: bool) -> str:
    sources = dict.fromkeys(tool.source for tool in tools if tool.source)
    if packaged and "sqlx" in sources:
        return (
            "if this is amp's own database, `ampd baseline --from sqlx` proves that and records the packaged "
            f"migrations as applied; else {NO_FOLDER}"
        )
    names = {tool.name for tool in tools}
    who = names.pop() if len(names) == 1 else "one of them"
    records = "`ampd baseline VERSION` records those up to VERSION as applied"
    if sources:
        commands = " or ".join(f"`ampd baseline --from {source}`" for source in sources)
        records = f"{commands} checks that and records it"
    return (
        f"{f'{NO_FOLDER}; ' if packaged else ''}ampd would run every file from the beginning: if {who} has "
        f"applied them, {records}; if they are others, give them a schema of their own with metadata_db.schema; if "
        f"what {who} has made is gone from here, rename its table"
    )


def _histories_of_tools(tables: Iterable[Neighbour], home: str | None) -> Iterator[tuple[Neighbour, Tool]]:
    """Yield the histories in one schema, or, for None, in the tools' own schemas."""
    for table in tables:
        tool = tool_of(table)
        if tool and (table.schema == home if home is not None else tool.schema == table.schema):
            yield table, tool


def _tables_of_applications(found: Neighbours, home: str) -> tuple[Neighbour, ...]:
    histories = {table.name for table, _ in _histories_of_tools(found.tools, home)}
    return tuple(table for table in found.tables if table.name not in histories)


def _trusted(tables: Iterable[Neighbour]) -> tuple[Neighbour, ...]:
    return tuple(table for table in tables if table.trusted)


def _strangers(tables: Iterable[Neighbour]) -> tuple[Neighbour, ...]:
    return tuple(table for table in tables if not table.trusted)


def _some(tables: tuple[Neighbour, ...]) -> str:
    more = " and others" if len(tables) > 3 else ""
    return ", ".join(map(str, tables[:3])) + more
