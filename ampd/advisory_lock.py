"""The advisory lock: its key, how it is tried, and who holds it.

It is `pg_try_advisory_xact_lock`: it ends with its transaction, so that no crash, pooler or pool can strand it.
It is only ever tried: a statement that blocked on it would hold a snapshot, and the holder's CREATE INDEX CONCURRENTLY
would wait for that snapshot for ever.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from .other_sessions import readable_sql
from .sqlstates import BUSY

if TYPE_CHECKING:
    from .errors import AmpdError


_UNSIGNED = 0xFFFF_FFFF_FFFF_FFFF
_LOW = 0xFFFF_FFFF


class LockTaken(Exception):
    """Another runner has the lock, or has added to the history: read it again.

    `unless` is what the server's refusal means if it turns out that no other runner was there.
    """

    def __init__(self, message: str, *, unless: AmpdError | None = None) -> None:
        super().__init__(message)
        self.unless = unless


def lock_key(schema: str, table: str) -> int:
    """Return the advisory lock's key: 64 bits, signed, of the SHA-256 of the history table's qualified name."""
    return int.from_bytes(sha256(f"{schema}.{table}".encode()).digest()[:8], "big", signed=True)


def key_sql(schema: str, table: str) -> str:
    """Return the same as an SQL expression of type int8, of expressions for both names; the search path pinned."""
    digest = f"encode(sha256(convert_to(concat({schema}, '.', {table}), 'UTF8')), 'hex')"
    return f"('x' || left({digest}, 16))::bit(64)::int8"


def holder_sql(key: str, is_runner_sql: str) -> str:
    """Return an expression for who holds the lock, or runs a statement of a runner that is gone, as `Holder`.

    `key` is an expression of type int8. Anybody can write a label: it counts only where `is_runner_sql` holds, a
    condition on the row a of pg_stat_activity. The search path must be pinned.
    """
    query = f"CASE WHEN {is_runner_sql} THEN {readable_sql('left(a.query, 300)')} END"
    return f"""(
    SELECT jsonb_build_object('pid', coalesce(a.pid, l.pid), 'user', a.usename, 'application', a.application_name,
      'client', coalesce(a.client_hostname, host(a.client_addr)), 'since', a.xact_start, 'query', {query})
    FROM pg_stat_activity a FULL JOIN (
        SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1
          AND classid = (({key} >> 32) & {_LOW}) AND objid = ({key} & {_LOW})
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())) l ON l.pid = a.pid
    WHERE l.pid IS NOT NULL
       OR a.state = 'active' AND a.pid <> pg_backend_pid() AND a.datname = current_database()
          AND starts_with(a.query, concat('/* ampd ', to_hex({key}), ' ')) AND {is_runner_sql}
    ORDER BY starts_with(a.query, '/* ampd ') DESC NULLS LAST, l.pid IS NULL LIMIT 1)"""


LABEL = r"^/\* ampd ([0-9a-f]{1,16}) "  # what such a comment begins with, for the server: the key in hexadecimal


def label_sql(key: int, migration: str) -> str:
    """Return the comment that a migration's messages begin with, for whoever looks at pg_stat_activity."""
    name = migration.replace("*/", "* /").replace("/*", "/ *")
    return f"/* ampd {key & _UNSIGNED:x} {name} */"


def try_lock_sql(key: int, *, for_session: bool = False) -> str:
    """Return PL/pgSQL that tries the lock, and touches nothing else; `for_session` is for psql alone."""
    return f"""
  IF NOT {lock_acquired_sql(key, for_session=for_session)} THEN
    RAISE EXCEPTION 'another runner holds the lock' USING ERRCODE = '{BUSY}';
  END IF;"""


def lock_acquired_sql(key: int, *, for_session: bool = False) -> str:
    """Return an SQL expression that tries the lock: whether it has been acquired."""
    lasting = "" if for_session else "xact_"
    return f"pg_catalog.pg_try_advisory_{lasting}lock({key})"
