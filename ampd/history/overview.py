"""Every history of a database, whatever its schema and name: found by the catalog, and read if it is trusted."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from ampd.advisory_lock import LABEL, holder_sql, key_sql
from ampd.display import one_line
from ampd.other_sessions import Holder
from ampd.postgres.quoting import do_block, identifier, literal
from ampd.report import pretty_json, table
from ampd.sqlstates import READ

from .table import LOCK, pin_session_sql
from .trust import (
    CANDIDATES,
    MAY_FIRE,
    PLAIN,
    columns_sql,
    fires_sql,
    managed_schema_sql,
    shaped_sql,
    trusted_owner_sql,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ampd.postgres.connection import Session


_LOCK_MS = 300  # of waiting for somebody who has locked a history: others are to be shown all the same
_MANY_LOCKED = 10  # after so many the others get _HASTE_MS each: dozens would take all the time there is
_HASTE_MS = 1
_MOST = 10_000  # histories, those of trusted owners first: nobody can hide these behind tables of their own
_MOST_UNFINISHED = 10  # of one history: there is one, as a rule
_SECS = 60


class Unread(StrEnum):
    """Why a history was not read; the values are the words of the JSON document."""

    OWNER = "owner"  # of the table: is not trusted
    SCHEMA_OWNER = "schema_owner"  # is not trusted
    ALTERED = "altered"  # something on it is not ampd's
    PRIVILEGE = "privilege"
    ROW_SECURITY = "row_security"
    LOCKED = "locked"
    ERROR = "error"


class Unfinished(msgspec.Struct, frozen=True):
    """A migration that was started and has not finished."""

    version: int
    name: str


class FoundHistory(msgspec.Struct, frozen=True):
    """A history of the database, and how far it has come; without figures where it was not read."""

    schema: str
    table: str
    owner: str
    schema_owner: str
    unread: Unread | None = None
    detail: str | None = None  # the server's words, where reading failed
    current_version: int | None = None
    applied: int | None = None  # how many migrations are finished
    last_applied_at: datetime | None = None
    unfinished: tuple[Unfinished, ...] = ()
    runner: Holder | None = None  # who holds its lock

    @property
    def name(self) -> str:
        """Return the qualified name for people."""
        return one_line(f"{self.schema}.{self.table}")

    @property
    def quoted(self) -> str:
        """Return the qualified name as SQL spells it."""
        return one_line(f"{identifier(self.schema)}.{identifier(self.table)}")

    def cells(self) -> tuple[str, ...]:
        """Return its line of the table."""
        version = "" if self.current_version is None else str(self.current_version)
        last = f"{self.last_applied_at.astimezone(UTC):%Y-%m-%d %H:%M}" if self.last_applied_at else ""
        return self.name, version, self._applied(), last, one_line(self.owner)

    def _applied(self) -> str:
        if self.unread is not None:
            return _UNREAD[self.unread][0]
        if self.runner is not None:
            return f"{self.applied}, running"
        return f"{self.applied}, {len(self.unfinished)} unfinished" if self.unfinished else str(self.applied)

    def fields(self) -> dict[str, object]:
        """Return what the JSON document shows."""
        read = self.unread is None
        state = "unfinished" if self.unfinished else "applied" if self.applied else "empty"
        return {
            "schema": self.schema,
            "table": self.table,
            "owner": self.owner,
            "state": ("running" if self.runner else state) if read else "unread",
            "reason": self.unread,
            "current_version": self.current_version,
            "applied": self.applied,
            "last_applied_at": self.last_applied_at.isoformat() if self.last_applied_at else None,
            "unfinished": self.unfinished,
            "runner": self.runner and {name: getattr(self.runner, name) for name in _OF_A_RUNNER},
        }


_OF_A_RUNNER = ("pid", "user", "application", "client", "since")


class Overview(msgspec.Struct, frozen=True):
    """Every history of a database, by schema and name; `user` is who has asked.

    `truncated` says that there are more: those left out belong to owners that are not trusted, unless all shown do not.
    """

    user: str
    histories: tuple[FoundHistory, ...]
    database: str = ""
    truncated: bool = False

    def json(self) -> bytes:
        """Return the document of `status --all --json`."""
        histories = [each.fields() for each in self.histories]
        return pretty_json({"database": self.database, "truncated": self.truncated, "histories": histories})

    def text(self, columns: int | None = None) -> str:
        """Return what `status --all` prints: a line for each history, and what is to be known of some.

        What is least needed is left out of the table where it has to fit so many `columns`.
        """
        if not self.histories:
            return f"{self.database}: no history of ampd"
        number = len(self.histories)
        top = f"{self.database}: {number} {'history' if number == 1 else 'histories'}"
        rows = [_HEADINGS, *(each.cells() for each in self.histories)]
        lines = table(rows, "<><<<", columns, flexible=0, least=_LEAST_NAME)
        return "\n\n".join((top, lines, *self._notes()))

    def _notes(self) -> Iterator[str]:
        """Yield a paragraph for each thing to be known."""
        if self.truncated:
            yield "there are more, which are not shown; those of owners that are trusted come first"
        for each in self.histories:
            if each.runner:
                yield f"the migration lock of {each.name} is held by {each.runner.describe()}"
        stopped = [each for each in self.histories if each.unfinished and not each.runner]
        if stopped:
            lines = (
                f"  {each.name}: {', '.join(f'{one.version} {one_line(one.name)}' for one in each.unfinished)}"
                for each in stopped
            )
            yield "\n".join(("unfinished; `ampd status` with the files of that history says what to do:", *lines))
        for reason, (_, message) in _UNREAD.items():
            if found := [each for each in self.histories if each.unread is reason]:
                lines = (f"  {self._evidence(each)}" for each in found)
                yield "\n".join((message.format(me=one_line(self.user)), *lines))

    def _evidence(self, history: FoundHistory) -> str:
        me = one_line(identifier(self.user))
        match history.unread:
            case Unread.PRIVILEGE:
                schema = one_line(identifier(history.schema))
                return f"GRANT USAGE ON SCHEMA {schema} TO {me}; GRANT SELECT ON TABLE {history.quoted} TO {me};"
            case Unread.ROW_SECURITY:
                return f"ALTER TABLE {history.quoted} DISABLE ROW LEVEL SECURITY;"
            case Unread.SCHEMA_OWNER:
                return f"{history.name}: its schema belongs to {one_line(history.schema_owner)}"
            case Unread.OWNER:
                return f"{history.name} belongs to {one_line(history.owner)}"
            case _:
                return f"{history.name}: {one_line(history.detail)}" if history.detail else history.name


_HEADINGS = ("history", "version", "applied", "last (UTC)", "owner")
_LEAST_NAME = 29  # characters: public.ampd_schema_migrations
_UNREAD = {
    Unread.OWNER: (
        "not trusted",
        "not read: it belongs neither to {me}, nor to a superuser, the owner of the database, or the role in "
        "metadata_db.migrations.role:",
    ),
    Unread.SCHEMA_OWNER: (
        "not trusted",
        "not read: whoever owns the schema could replace the history, and is neither {me}, nor a superuser, the "
        "owner of the database, or the role in metadata_db.migrations.role:",
    ),
    Unread.ALTERED: (
        "altered",
        "not read: something on it is not as ampd makes it; `ampd status` of that history says what:",
    ),
    Unread.PRIVILEGE: ("not readable", "not readable for {me}; as the owner:"),
    Unread.ROW_SECURITY: (
        "not readable",
        "row level security would hide rows from {me}; as the owner, or let {me} have BYPASSRLS:",
    ),
    Unread.LOCKED: ("locked", "locked by another session:"),
    Unread.ERROR: ("not readable", "not readable:"),
}


async def read_overview(session: Session, role: str | None) -> Overview:
    """Read how far every history has come, in one round trip and a read-only transaction.

    The configured `role` reads them if we are a member of it, and may own them. A history of anybody else's is not
    locked, and so not waited for.

    Raises:
        AmpdError: the question could not be answered.
    """
    found = await session.ask(_overview_sql(session, role), Overview, timeout=_SECS)
    by_name = sorted(found.histories, key=lambda each: (each.schema, each.table))
    return msgspec.structs.replace(found, histories=tuple(by_name))


# Parts of the block of `_overview_sql`, with its variables.

# Into `held`: the keys of all advisory locks of the database, and of statements of runners that are gone.
_HELD_KEYS = f"""held := ARRAY(
  SELECT (classid::int8 << 32) | objid::int8 FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND objsubid = 1
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  UNION ALL SELECT ('x' || lpad(substring(query from {literal(LABEL)}), 16, '0'))::bit(64)::int8 FROM pg_stat_activity
    WHERE state = 'active' AND datname = current_database() AND query ~ {literal(LABEL)});"""

# Into `found`: how far the history in `t` has come, and who holds its lock.
_IS_RUNNER = "(pg_has_role(a.usesysid, t.owner_oid, 'MEMBER') OR has_table_privilege(a.usesysid, home, 'INSERT'))"
_READ_ROWS = f"""EXECUTE format('SELECT jsonb_build_object(
          ''applied'', count(finished_at), ''current_version'', max(version) FILTER (WHERE finished_at IS NOT NULL),
          ''last_applied_at'', max(finished_at) FILTER (WHERE finished_at BETWEEN ''epoch'' AND ''9999-01-01''),
          ''unfinished'', to_jsonb((array_agg(jsonb_build_object(''version'', version, ''name'', name) ORDER BY version)
            FILTER (WHERE finished_at IS NULL))[:{_MOST_UNFINISHED}]))
        FROM (SELECT concat(h.version)::int8 AS version, left(concat(h.name), 200) AS name,
            nullif(concat(h.finished_at), '''')::timestamptz AS finished_at
          FROM ONLY %I.%I h WHERE h.tableoid = %s) h', t.schema, t."table", home) INTO found;
      lock_key := {key_sql("t.schema", 't."table"')};
      IF lock_key = ANY (held) THEN
        found := found || jsonb_build_object('runner', {holder_sql("lock_key", _IS_RUNNER)});
      END IF;
      found := jsonb_strip_nulls(found);"""


def _look_sql(role: str | None) -> str:
    """Return PL/pgSQL that puts a table's names and owners into `t`, and why it is not to be read, if so."""
    unaltered = (
        f"{PLAIN} AND NOT ({MAY_FIRE} AND {fires_sql('c.oid')}) "
        f"AND (SELECT {shaped_sql('c.oid')} FROM {columns_sql('c.oid')})"
    )
    trusted_schema = f"({trusted_owner_sql('n.nspowner', role)} OR {managed_schema_sql('n.oid', 'n.nspowner')})"
    readable = "has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')"
    return f"""\
SELECT n.nspname AS schema, c.relname AS "table", pg_get_userbyid(c.relowner) AS owner, c.relowner AS owner_oid,
          pg_get_userbyid(n.nspowner) AS schema_owner, CASE
            WHEN NOT {trusted_owner_sql("c.relowner", role)} THEN '{Unread.OWNER}'
            WHEN NOT {trusted_schema} THEN '{Unread.SCHEMA_OWNER}'
            WHEN NOT ({unaltered}) THEN '{Unread.ALTERED}'
            WHEN NOT ({readable}) THEN '{Unread.PRIVILEGE}'
            WHEN c.relrowsecurity AND row_security_active(c.oid) THEN '{Unread.ROW_SECURITY}'
          END AS unread
        INTO t FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = home;"""


def _overview_sql(session: Session, role: str | None) -> str:
    set_role = f"""
  BEGIN
    PERFORM pg_catalog.set_config('role', {literal(role)}, true);
  EXCEPTION WHEN OTHERS THEN NULL;
  END;"""
    # As in the read of one history: lock it, look at it by its oid, and read it only then; concat() runs no cast of
    # anybody's. Each is read in a block that an error ends, which releases its lock: thousands would fill the server's
    # table of locks. A name that the client cannot read, as in a database of SQL_ASCII, would end the whole answer.
    body = f"""
DECLARE
home pg_catalog.oid;
t pg_catalog.record;
found pg_catalog.jsonb;
why pg_catalog.text;
detail pg_catalog.text;
lock_key pg_catalog.int8;
held pg_catalog.int8[];
histories pg_catalog.jsonb[] := '{{}}';
truncated pg_catalog.bool := false;
locked pg_catalog.int4 := 0;
BEGIN{set_role if role else ""}{pin_session_sql(str(_LOCK_MS), timezone="UTC")}
{_HELD_KEYS}
FOR home IN SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND c.oid IN ({CANDIDATES})
    ORDER BY {trusted_owner_sql("c.relowner", role)} DESC, n.nspname, c.relname LIMIT {_MOST} + 1 LOOP
  IF cardinality(histories) = {_MOST} THEN
    truncated := true;
    EXIT;
  END IF;
  found := NULL; detail := NULL;
  BEGIN
    FOR look IN 1..2 LOOP
      {_look_sql(role)}
      why := t.unread;
      EXIT WHEN t.schema IS NULL OR why IS NOT NULL OR look = 2;
      IF locked >= {_MANY_LOCKED} THEN
        PERFORM set_config('lock_timeout', '{_HASTE_MS}', true);
      END IF;
      EXECUTE format('{LOCK} %I.%I IN ACCESS SHARE MODE', t.schema, t."table");
    END LOOP;
    IF why IS NULL AND t.schema IS NOT NULL THEN
      {_READ_ROWS}
    END IF;
    PERFORM convert_to(concat(t.schema, t."table", t.owner, t.schema_owner, found), 'UTF8');
    RAISE EXCEPTION 'read' USING ERRCODE = '{READ}';
  EXCEPTION
    WHEN SQLSTATE '{READ}' THEN NULL;
    WHEN lock_not_available THEN why := '{Unread.LOCKED}'; locked := locked + 1;
    WHEN character_not_in_repertoire OR untranslatable_character THEN
      why := coalesce(why, '{Unread.ERROR}'); detail := SQLERRM; found := NULL;
      t.schema := {_escaped_sql("t.schema")}; t."table" := {_escaped_sql('t."table"')};
      t.owner := {_escaped_sql("t.owner")}; t.schema_owner := {_escaped_sql("t.schema_owner")};
    WHEN undefined_table OR invalid_schema_name THEN CONTINUE;
    WHEN OTHERS THEN why := '{Unread.ERROR}'; detail := SQLERRM; found := NULL;
  END;
  CONTINUE WHEN t.schema IS NULL;
  histories := array_append(histories, jsonb_build_object('schema', t.schema, 'table', t."table", 'owner', t.owner,
    'schema_owner', t.schema_owner, 'unread', why, 'detail', detail) || coalesce(found, '{{}}'));
END LOOP;
{session.note_sql("jsonb_build_object('user', current_user, 'truncated', truncated, 'histories', histories)")}
END"""
    begin = f"BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; SET LOCAL statement_timeout = '{_SECS // 2}s'"
    return f"{begin}; {do_block(body)}; COMMIT"


def _escaped_sql(text: str) -> str:
    """Return an SQL expression for a text of any bytes in plain characters, as a bytea is escaped."""
    return f"encode(convert_to({text}, getdatabaseencoding()::name), 'escape')"
