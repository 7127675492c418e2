"""Why a history cannot be read, or is not believed: the questions that tell, and the errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ampd.display import one_line
from ampd.errors import ConfigError, LockTimeout, PermissionDenied
from ampd.other_sessions import Blocker
from ampd.postgres.quoting import PIN_SEARCH_PATH, do_block, identifier

if TYPE_CHECKING:
    from ampd.postgres.connection import Session

    from .table import History, Owner, Table


class _Lock(msgspec.Struct, frozen=True):
    """A table's qualified and quoted name, and a session that has locked it against everybody."""

    table: str
    blocker: Blocker


async def locked_error(session: Session, error: LockTimeout, which: str, history: str | None = None) -> LockTimeout:
    """Return the error for a table that could not be read since somebody has locked it, with who that is.

    `which` is a condition for the row c of pg_class and the row n of pg_namespace of the tables that it can be;
    `history` is what a history table is called.
    """
    document = f"""(SELECT coalesce(jsonb_agg(jsonb_build_object('table', format('%I.%I', n.nspname, c.relname),
      'blocker', jsonb_build_object('pid', l.pid, 'user', a.usename, 'application', a.application_name, 'client',
        coalesce(a.client_hostname, host(a.client_addr)), 'state', a.state, 'since', a.xact_start, 'query', NULL))),
      '[]')
    FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'relation' AND l.granted AND l.mode = 'AccessExclusiveLock' AND l.pid IS NOT NULL
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND {which})"""
    body = do_block(f"BEGIN {PIN_SEARCH_PATH} {session.note_sql(document)} END")
    locks = await session.ask(f"BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {body}; COMMIT", list[_Lock])
    if not locks:
        return error
    blockers = tuple(lock.blocker for lock in locks)
    pids = ", ".join(str(blocker.pid) for blocker in blockers)
    table = one_line(locks[0].table)
    what = (
        "the history table " if history and locks[0].table.endswith((f".{history}", f".{identifier(history)}")) else ""
    )
    return LockTimeout(
        f"another session has locked {what}{table}"
        + "".join(f"\n  blocked by {blocker.describe()}" for blocker in blockers),
        hint=f"wait for its transaction, or end it (pg_terminate_backend of {pids}), and run again",
        blockers=blockers,
        sqlstate=error.sqlstate,
        detail=error.detail,
    )


def check_trust(history: History, table: Table) -> None:
    """Check that a history table is trusted, and can be read.

    Raises:
        PermissionDenied: its owner is not trusted, or we may not read it.
    """
    if not table.trusted:
        raise _stranger_error(history, table.owner)
    if not table.readable:
        me = identifier(history.user)
        raise PermissionDenied(
            f"permission denied for table {one_line(history.place.table)}",
            hint=f"as its owner: GRANT SELECT ON TABLE {history.shown_name} TO {me}; and INSERT, UPDATE, DELETE, if "
            "it is to migrate",
        )
    if table.hidden:
        raise _hidden_error(history)


class SearchPath(msgspec.Struct, frozen=True):
    """A search path, and each schema that it names, quoted where need be, with whether it exists."""

    text: str
    schemas: tuple[tuple[str, bool], ...]


def path_sql(session: Session) -> str:
    """Return a message that notes the search path as `SearchPath`."""
    document = r"""jsonb_build_object('text', path, 'schemas', (
    SELECT coalesce(jsonb_agg(jsonb_build_array(name, to_regnamespace(name) IS NOT NULL) ORDER BY position), '[]')
    FROM regexp_matches(path, '("(?:[^"]|"")*"|[^",\s]+)', 'g') WITH ORDINALITY _ (word, position),
      replace(word[1], '"$user"', quote_ident(current_user)) name
    WHERE name <> '""' AND NOT starts_with(name, 'pg_')))"""
    return do_block(f"""
DECLARE
  path pg_catalog.text := pg_catalog.current_setting('search_path');
BEGIN
  {PIN_SEARCH_PATH}
  {session.note_sql(document)}
END""")


def search_path_error(user: str, path: SearchPath) -> ConfigError | PermissionDenied:
    """Return the error for a search path on which there is no schema that the role may use."""
    role, otherwise = identifier(user), "or set metadata_db.schema"
    shown = one_line(path.text) or "empty"
    for schema, exists in path.schemas:
        if exists:
            grant = f"GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}"
            return PermissionDenied(
                f"role {user} may not use any schema on its search path ({shown})",
                hint=f"as its owner: {grant}; {otherwise}",
            )
    make = f"CREATE SCHEMA {path.schemas[-1][0]} AUTHORIZATION {role}" if path.schemas else ""
    hint = make or f"ALTER ROLE {role} SET search_path = public"
    return ConfigError(
        f"the search path of role {user} ({shown}) names no schema that exists", hint=f"{hint}; {otherwise}"
    )


def not_ours_error(name: str, why: str) -> ConfigError:
    """Return the error for a table in the history's place that is not as ampd makes it."""
    return ConfigError(
        f"{name} is not ampd's history table, or was changed by hand: {why}",
        hint="undo the change; or if another program has made the table, keep the history under another name with "
        "metadata_db.migrations.table, or in a schema of its own with metadata_db.schema",
    )


def _stranger_error(history: History, owner: str) -> PermissionDenied:
    shown, me = one_line(owner), one_line(history.user)
    return PermissionDenied(
        f"the history table {history.shown_name} belongs to {shown}, and so is not trusted: that is neither {me}, "
        "nor a superuser, nor the owner of the database, nor the role in metadata_db.migrations.role",
        hint=f"if {shown} is the role that migrates this database, write `role = {_toml(owner)}` under "
        "[metadata_db.migrations]: its history is then believed, and migrations run under SET ROLE to it; "
        "if it is not, somebody has put the table there: find out who, and apply nothing before that",
    )


def exposed_error(history: History, owner: Owner) -> PermissionDenied:
    """Return the error for a history in a schema whose owner is not trusted."""
    assert history.schema is not None
    schema, table = one_line(identifier(history.schema)), history.table
    shown, me = one_line(owner.name), one_line(history.user)
    heir = identifier(table.owner if table else history.role or history.user)
    mend = f"ALTER SCHEMA {schema} OWNER TO {one_line(heir)}"
    if table is None:
        hint = (
            f"if {shown} is the role that migrates this database, write `role = {_toml(owner.name)}` under "
            f"[metadata_db.migrations]; else, as its owner or a superuser: {mend}; or set metadata_db.schema to "
            "another schema; if migrations were applied here before, find out first what has become of their history"
        )
    else:
        hint = f"find out whether the history is whole; then, as its owner or a superuser: {mend}"
    return PermissionDenied(
        f"the schema {schema} belongs to {shown}, who could replace or hide the history in it, and so "
        f"is not trusted: that is neither {me}, nor a superuser, nor the owner of the database, nor the role "
        "in metadata_db.migrations.role",
        hint=hint,
    )


def _toml(text: str) -> str:
    """Return a TOML string; JSON writes the same, but for one control character."""
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")


def _hidden_error(history: History) -> PermissionDenied:
    name = history.shown_name
    return PermissionDenied(
        f"row level security on the history table {name} would hide its rows from {one_line(history.user)}",
        hint=f"as its owner: ALTER TABLE {name} DISABLE ROW LEVEL SECURITY, or NO FORCE ROW LEVEL SECURITY for "
        f"the owner itself; or as a superuser: ALTER ROLE {identifier(history.user)} BYPASSRLS",
    )
