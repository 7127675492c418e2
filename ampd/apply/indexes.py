"""SQL expressions for what statements outside of a transaction have done to indexes, by the catalog.

An index that such a statement leaves INVALID has to be dropped before the statement can run again; and only the
catalog shows whether an interrupted one has completed.

All of them are for a block of `asking_sql`: the search path is pinned, and `named` is what the statement names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ampd.postgres.quoting import PIN_SEARCH_PATH, do_block, identifier, literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ampd.postgres.connection import Session
    from ampd.sql.kinds import IndexBuild


class Index(msgspec.Struct, frozen=True):
    """An index as the catalog has it: its qualified and quoted name, or None where there is none."""

    name: str | None
    valid: bool | None


class Worker(msgspec.Struct, frozen=True):
    """The process id of a session that builds, rebuilds or drops an index of a table, or None."""

    pid: int | None


class Leftover(msgspec.Struct, frozen=True):
    """An INVALID index, and the `Worker` on its table, if there is one."""

    name: str
    worker: int | None


def asking_sql(session: Session, expression: str, names: Iterable[tuple[str, ...]]) -> str:
    """Return a block that notes the value of an expression; the names are looked up on the search path as it is."""
    relations = ", ".join(
        f"pg_catalog.to_regclass({literal('.'.join(map(identifier, name)))})" for name in names if name
    )
    return do_block(f"""
DECLARE
  named pg_catalog.regclass[] := ARRAY[{relations}]::pg_catalog.regclass[];
BEGIN
  {PIN_SEARCH_PATH}
  {session.note_sql(f"to_jsonb({expression})")}
END""")


def index_sql(build: IndexBuild) -> str:
    """Return an expression for the index of that name on that table, as `Index`."""
    return f"""(SELECT jsonb_build_object('valid', bool_and(i.indisvalid AND i.indisready),
            'name', min(format('%I.%I', n.nspname, c.relname)))
        FROM {_INDEXES} WHERE i.indrelid = named[1] AND c.relname = {literal(build.name)})"""


def is_taken_sql(build: IndexBuild) -> str:
    """Return an expression for whether anything has the name that an index is to get, as `bool`."""
    return f"""EXISTS (SELECT FROM pg_class c JOIN pg_class t ON t.relnamespace = c.relnamespace
        WHERE t.oid = named[1] AND c.relname = {literal(build.name)})"""


ARE_THERE = "(SELECT bool_or(relation IS NOT NULL) FROM unnest(named) relation)"  # whether any of the names exists


def invalid_builds_sql(build: IndexBuild, begun_by: str) -> str:
    """Return an expression for the INVALID indexes that a build has left, as `list[Leftover]`.

    `begun_by` is the transaction of the record that the build was begun: an older index is none of its.
    """
    name = "" if build.name is None else f" AND c.relname = {literal(build.name)}"
    return _invalid_sql(f"i.indrelid = named[1]{name}", begun_by)


def invalid_copies_sql(what: str, name: tuple[str, ...], begun_by: str) -> str:
    """Return an expression for the copies that a REINDEX CONCURRENTLY has left since then, as `list[Leftover]`.

    `what` it names (INDEX, TABLE, SCHEMA, DATABASE) bounds where they are looked for: each on the table of the index
    that it is a copy of. One of such a name elsewhere belongs to somebody else.
    """
    tree = "(SELECT named[1] UNION ALL SELECT relid FROM pg_partition_tree(named[1]))"
    scope = {
        "INDEX": f"original.indexrelid = ANY {tree}",
        "TABLE": f"original.indrelid = ANY {tree}",
        "SCHEMA": f"n.nspname = {literal('.'.join(name))}",
    }.get(what, "n.nspname <> 'pg_toast'")
    return _invalid_sql(
        f"""c.relname ~ '_cc(new|old)[0-9]*$' AND EXISTS (
          SELECT FROM pg_index original JOIN pg_class o ON o.oid = original.indexrelid
          WHERE original.indrelid = i.indrelid AND original.indexrelid <> i.indexrelid
            AND starts_with(o.relname, regexp_replace(c.relname, '_cc(new|old)[0-9]*$', '')) AND {scope})""",
        begun_by,
    )


_INDEXES = """pg_index i
        JOIN pg_class c ON c.oid = i.indexrelid
        JOIN pg_namespace n ON n.oid = c.relnamespace"""


def _invalid_sql(condition: str, begun_by: str) -> str:
    return f"""(SELECT COALESCE(jsonb_agg(jsonb_build_object(
            'name', format('%I.%I', n.nspname, c.relname), 'worker', {_worker_of_sql("i.indrelid")})), '[]')
        FROM {_INDEXES}
        WHERE NOT i.indisvalid AND c.relkind = 'i' AND {condition}
          AND age(i.xmin) <= age({literal(begun_by)}::xid))"""


def _worker_of_sql(table: str) -> str:
    # Whoever builds, rebuilds or drops an index concurrently holds this lock throughout; autovacuum, which has no user,
    # gives it up for us.
    return f"""(SELECT min(l.pid) FROM pg_locks l
        JOIN pg_database d ON d.oid = l.database
        JOIN pg_stat_activity a ON a.pid = l.pid
        WHERE l.relation = {table} AND l.granted AND d.datname = current_database()
          AND l.mode = 'ShareUpdateExclusiveLock' AND l.pid <> pg_backend_pid() AND a.usesysid IS NOT NULL)"""


# The session that builds another index on the same table, as `Worker`.
WORKER = f"jsonb_build_object('pid', {_worker_of_sql('named[1]')})"
