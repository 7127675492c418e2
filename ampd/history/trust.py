"""Which roles may own a history table, its columns, and what may be on it: SQL that asks the catalog.

What is defined on the table runs with the rights of whoever migrates: a trigger, a rule, a default, a check, an
expression in an index. ampd makes none of these, so that each of them is somebody else's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ampd.postgres.quoting import PIN_SEARCH_PATH, do_block, literal

if TYPE_CHECKING:
    from ampd.postgres.connection import Session


def trusted_owner_sql(owner: str, role: str | None = None) -> str:
    """Return an SQL expression for whether a history that belongs to `owner`, an expression of type oid, is trusted.

    The search path must be pinned, for this and for all that follows.
    """
    return f"EXISTS (SELECT FROM pg_roles r WHERE r.oid = {owner} AND {trusted_role_sql(role)})"


def known_role_sql(owner: str, role: str | None = None) -> str:
    """Return an SQL expression for whether the name of `owner`, an expression of type oid, is enough to trust it.

    It opens no catalog; where it is false, `trusted_owner_sql` says.
    """
    return f"pg_get_userbyid({owner}) IN ({_trusted_names(role)})"


def trusted_role_sql(role: str | None = None) -> str:
    """Return a condition on the row r of pg_roles for whether what belongs to it is trusted.

    Trusted are the role that connects or migrates, a superuser, the owner of the database (pg_database_owner is nobody
    else), and `role`, the configured one; never a role just because we are a member of it.
    """
    return f"""(r.rolsuper OR r.rolname IN ({_trusted_names(role)})
        OR r.oid = (SELECT datdba FROM pg_database WHERE datname = current_database()))"""


def _trusted_names(role: str | None) -> str:
    return ", ".join(("CURRENT_USER", "SESSION_USER", "'pg_database_owner'", *([literal(role)] if role else ())))


_PUBLIC = 2200  # the oid of the schema public that a database is made with


def managed_schema_sql(schema: str, owner: str) -> str:
    """Return an SQL expression for whether a schema may contain a history, although its owner is not trusted.

    Whoever owns a schema can rename or drop it, whatever is in it, and put another in its place. So its owner must be
    trusted as that of the table is. On some managed platforms the schema public belongs to the administrators' role,
    which may create roles but is no superuser (Google's cloudsqlsuperuser): that is accepted unless we are a superuser.
    Both arguments are expressions of type oid.
    """
    return f"""{schema} = {_PUBLIC} AND EXISTS (SELECT FROM pg_roles WHERE oid = {owner} AND rolcreaterole)
      AND NOT EXISTS (SELECT FROM pg_roles WHERE rolsuper AND rolname IN (CURRENT_USER, SESSION_USER))"""


COLUMNS = {
    "version": "bigint",
    "name": "text",
    "checksum": "bytea",
    "started_at": "timestamp with time zone",
    "finished_at": "timestamp with time zone",
    "statements_done": "integer",
    "applied_by": "text",
    "ampd_version": "text",
    "done_checksum": "bytea",
}
# Older histories lack this one: they get it with their first no-transaction migration.
DONE_CHECKSUM = "done_checksum"
_OIDS = {"bigint": 20, "integer": 23, "text": 25, "bytea": 17, "timestamp with time zone": 1184}
_REQUIRED = {name: _OIDS[kind] for name, kind in COLUMNS.items() if name != DONE_CHECKSUM}

# Whether a table c is as ampd makes it, as far as that does not concern its columns, indexes, rules and triggers.
PLAIN = "(c.relkind = 'r' AND c.relpersistence = 'p' AND c.relchecks = 0 AND NOT c.relispartition)"
# The oids of the tables that have the columns of a history, whatever else they have and is on them.
CANDIDATES = f"""SELECT attrelid FROM pg_attribute
      WHERE attnum > 0 AND NOT attisdropped AND (attname, atttypid) IN ({
    ", ".join(f"('{name}', {oid})" for name, oid in _REQUIRED.items())
}) GROUP BY attrelid HAVING count(*) = {len(_REQUIRED)}"""

# These flags stay set until the next VACUUM after the last trigger or rule was dropped.
MAY_FIRE = "(c.relhastriggers OR c.relhasrules)"


def shaped_sql(table: str) -> str:
    """Return an aggregate over `columns_sql` for whether columns and indexes of the same table are as ampd makes them.

    The columns of a parent are inherited as well.
    """
    columns = ",".join(f"{name} {oid}" for name, oid in _REQUIRED.items())
    return f"""(bool_and(NOT atthasdef AND attinhcount = 0 AND atttypid < 16384
        AND (attname <> '{DONE_CHECKSUM}' OR atttypid = {_OIDS[COLUMNS[DONE_CHECKSUM]]}))
      AND array_agg(concat(attname, ' ', atttypid)) @> '{{{columns}}}'
      AND NOT EXISTS (SELECT FROM pg_index
        WHERE indrelid = {table} AND (indexprs IS NOT NULL OR indpred IS NOT NULL)))"""


def columns_sql(table: str) -> str:
    """Return what stands after FROM for the columns of a table, an expression of type oid."""
    return f"pg_attribute WHERE attrelid = {table} AND attnum > 0 AND NOT attisdropped"


def fires_sql(table: str) -> str:
    """Return an SQL expression for whether a table, an expression of type oid, has a trigger or a rule."""
    return (
        f"(EXISTS (SELECT FROM pg_trigger WHERE tgrelid = {table}) "
        f"OR EXISTS (SELECT FROM pg_rewrite WHERE ev_class = {table}))"
    )


def alterations_sql(session: Session, oid: int) -> str:
    """Return a message that notes what on a table is not as ampd has made it, in words, as `list[str]`."""
    wanted = ", ".join(f"({place}, '{name}', '{kind}')" for place, (name, kind) in enumerate(COLUMNS.items()))
    document = f"""(SELECT coalesce(jsonb_agg(what), '[]') FROM (
      SELECT 'is not a plain table' FROM pg_class
        WHERE oid = {oid} AND (relkind <> 'r' OR relpersistence <> 'p' OR relispartition)
      UNION ALL SELECT 'inherits from ' || inhparent::regclass FROM pg_inherits WHERE inhrelid = {oid}
      UNION ALL SELECT 'has no column ' || string_agg(name, ', ' ORDER BY place)
        FROM (VALUES {wanted}) w (place, name, kind)
        WHERE name <> '{DONE_CHECKSUM}' AND NOT EXISTS (
          SELECT FROM pg_attribute WHERE attrelid = {oid} AND attname = name AND NOT attisdropped) HAVING count(*) > 0
      UNION ALL SELECT format('has a column %I of type %s', attname, format_type(atttypid, atttypmod))
        FROM pg_attribute LEFT JOIN (VALUES {wanted}) w (place, name, kind) ON name = attname
        WHERE attrelid = {oid} AND attnum > 0 AND NOT attisdropped
          AND CASE WHEN kind IS NULL THEN atttypid >= 16384 ELSE format_type(atttypid, atttypmod) <> kind END
      UNION ALL SELECT format('has a %s for its column %I',
          CASE attgenerated WHEN '' THEN 'default' ELSE 'generated value' END, attname)
        FROM pg_attribute WHERE attrelid = {oid} AND atthasdef AND NOT attisdropped
      UNION ALL SELECT DISTINCT CASE WHEN c.oid IS NULL THEN format('has the trigger %I', tgname)
          ELSE format('has a part in the constraint %I', conname) END
        FROM pg_trigger LEFT JOIN pg_constraint c ON c.oid = tgconstraint AND tgisinternal WHERE tgrelid = {oid}
      UNION ALL SELECT format('has the rule %I', rulename) FROM pg_rewrite WHERE ev_class = {oid}
      UNION ALL SELECT format('has the check %I', conname) FROM pg_constraint WHERE conrelid = {oid} AND contype = 'c'
      UNION ALL SELECT format('has the index %I with an expression or a condition', relname)
        FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
        WHERE indrelid = {oid} AND (indexprs IS NOT NULL OR indpred IS NOT NULL) LIMIT 10) _ (what))"""
    body = f"BEGIN {PIN_SEARCH_PATH} {session.note_sql(document)} END"
    return f"BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {do_block(body)}; COMMIT"
