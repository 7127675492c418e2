"""SQL expressions for what statements outside of a transaction have done to indexes, by the catalog.

An index that such a statement leaves INVALID has to be dropped before the statement can run again; and only the
catalog shows whether an interrupted one has completed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ampd.postgres.quoting import identifier, literal

if TYPE_CHECKING:
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


def index_sql(build: IndexBuild) -> str:
    """Return an expression for the index of that name on that table, as `Index`."""
    return f"""(SELECT pg_catalog.jsonb_build_object('valid', pg_catalog.bool_and(i.indisvalid AND i.indisready),
            'name', pg_catalog.min(pg_catalog.format('%I.%I', n.nspname, c.relname)))
        FROM {_INDEXES}
        WHERE i.indrelid OPERATOR(pg_catalog.=) {_relation_sql(build.table)}
          AND c.relname OPERATOR(pg_catalog.=) {literal(build.name)})"""


def is_taken_sql(build: IndexBuild) -> str:
    """Return an expression for whether anything has the name that an index is to get, as `bool`."""
    return f"""EXISTS (
        SELECT FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_class t ON t.relnamespace OPERATOR(pg_catalog.=) c.relnamespace
        WHERE t.oid OPERATOR(pg_catalog.=) {_relation_sql(build.table)}
          AND c.relname OPERATOR(pg_catalog.=) {literal(build.name)})"""


def are_there_sql(names: tuple[tuple[str, ...], ...]) -> str:
    """Return an expression for whether any relation of these names exists, as `bool`."""
    return " OR ".join(f"{_relation_sql(name)} IS NOT NULL" for name in names)


def invalid_builds_sql(build: IndexBuild, begun_by: str) -> str:
    """Return an expression for the INVALID indexes that a build has left, as `list[Leftover]`.

    `begun_by` is the transaction of the record that the build was begun: an older index is none of its.
    """
    named = "true" if build.name is None else f"c.relname OPERATOR(pg_catalog.=) {literal(build.name)}"
    return _invalid_sql(
        f"i.indrelid OPERATOR(pg_catalog.=) {_relation_sql(build.table)} AND {named} AND {_younger_sql(begun_by)}"
    )


def invalid_copies_sql(what: str, name: tuple[str, ...], begun_by: str) -> str:
    """Return an expression for the copies that a REINDEX CONCURRENTLY has left since then, as `list[Leftover]`.

    `what` it names (INDEX, TABLE, SCHEMA, DATABASE) bounds where they are looked for: each on the table of the index
    that it is a copy of. One of such a name elsewhere belongs to somebody else.
    """
    stem = r"pg_catalog.regexp_replace(c.relname::pg_catalog.text, '_cc(new|old)[0-9]*$', '')"
    tree = f"""(SELECT {_relation_sql(name)}::pg_catalog.oid UNION ALL
          SELECT relid::pg_catalog.oid FROM pg_catalog.pg_partition_tree({_relation_sql(name)}))"""
    scope = {
        "INDEX": f"original.indexrelid OPERATOR(pg_catalog.=) ANY {tree}",
        "TABLE": f"original.indrelid OPERATOR(pg_catalog.=) ANY {tree}",
        "SCHEMA": f"n.nspname OPERATOR(pg_catalog.=) {literal('.'.join(name))}",
    }.get(what, "n.nspname OPERATOR(pg_catalog.<>) 'pg_toast'")
    return _invalid_sql(f"""c.relname OPERATOR(pg_catalog.~) '_cc(new|old)[0-9]*$' AND EXISTS (
          SELECT FROM pg_catalog.pg_index original
          JOIN pg_catalog.pg_class o ON o.oid OPERATOR(pg_catalog.=) original.indexrelid
          WHERE original.indrelid OPERATOR(pg_catalog.=) i.indrelid
            AND original.indexrelid OPERATOR(pg_catalog.<>) i.indexrelid
            AND pg_catalog.starts_with(o.relname::pg_catalog.text, {stem}) AND {scope})
        AND {_younger_sql(begun_by)}""")


_INDEXES = """pg_catalog.pg_index i
        JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) i.indexrelid
        JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"""


def _invalid_sql(condition: str) -> str:
    return f"""(SELECT COALESCE(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
            'name', pg_catalog.format('%I.%I', n.nspname, c.relname), 'worker', {_worker_of_sql("i.indrelid")})), '[]')
        FROM {_INDEXES}
        WHERE NOT i.indisvalid AND c.relkind OPERATOR(pg_catalog.=) 'i' AND {condition})"""


def worker_sql(build: IndexBuild) -> str:
    """Return an expression for the session that builds another index on the same table, as `Worker`."""
    return f"pg_catalog.jsonb_build_object('pid', {_worker_of_sql(_relation_sql(build.table))})"


def _worker_of_sql(table: str) -> str:
    # Whoever builds, rebuilds or drops an index concurrently holds this lock throughout; autovacuum, which has no user,
    # gives it up for us.
    return f"""(SELECT pg_catalog.min(l.pid) FROM pg_catalog.pg_locks l
        JOIN pg_catalog.pg_database d ON d.oid OPERATOR(pg_catalog.=) l.database
        JOIN pg_catalog.pg_stat_activity a ON a.pid OPERATOR(pg_catalog.=) l.pid
        WHERE l.relation OPERATOR(pg_catalog.=) {table} AND l.granted
          AND d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()
          AND l.mode OPERATOR(pg_catalog.=) 'ShareUpdateExclusiveLock'
          AND l.pid OPERATOR(pg_catalog.<>) pg_catalog.pg_backend_pid()
          AND a.usesysid IS NOT NULL)"""


def _younger_sql(begun_by: str) -> str:
    return f"pg_catalog.age(i.xmin) OPERATOR(pg_catalog.<=) pg_catalog.age({literal(begun_by)}::pg_catalog.xid)"


def _relation_sql(name: tuple[str, ...]) -> str:
    return f"pg_catalog.to_regclass({literal('.'.join(map(identifier, name)))})"
