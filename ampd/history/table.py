"""The history table as a value: its name, its rows, and what the catalog says of it and its owner."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ampd.advisory_lock import lock_key
from ampd.config import HISTORY_TABLE
from ampd.display import one_line
from ampd.migration import AppliedMigration
from ampd.other_sessions import Holder
from ampd.postgres.quoting import identifier

if TYPE_CHECKING:
    from collections.abc import Sequence


class Place(msgspec.Struct, frozen=True):
    """Where a history is, as configured: without a schema, where the search path finds it or would create it."""

    schema: str | None = None
    table: str = HISTORY_TABLE
    role: str | None = None  # which may own it

    @property
    def quoted_table(self) -> str:
        """Return the table's name as SQL spells it."""
        return self.table if self.table == HISTORY_TABLE else identifier(self.table)


LOCK = "LOCK TABLE ONLY"  # also found in the context of an error of that statement


def pin_session_sql(lock_timeout: str, **settings: str) -> str:
    """Return PL/pgSQL that lets a transaction read histories: by no names, policies or formats but the server's own.

    Not all servers have `restrict_nonsystem_relation_kind`, which is of August 2024.
    """
    pinned = {
        "search_path": "pg_catalog, pg_temp",
        "row_security": "off",
        "datestyle": "ISO",
        "lock_timeout": lock_timeout,
        **settings,
    }
    calls = "".join(f"pg_catalog.set_config('{name}', '{value}', true),\n  " for name, value in pinned.items())
    return f"""
PERFORM {calls}CASE WHEN pg_catalog.current_setting('restrict_nonsystem_relation_kind', true) IS NOT NULL
    THEN pg_catalog.set_config('restrict_nonsystem_relation_kind', 'view, foreign-table', true) END;"""


class Owner(msgspec.Struct, frozen=True):
    """The role that owns a schema, and whether it is trusted with a history in it."""

    oid: int
    name: str
    trusted: bool


class Table(msgspec.Struct, frozen=True):
    """A history table as the catalog has it."""

    oid: int
    owner_oid: int
    owner: str
    trusted: bool  # whether its owner is
    readable: bool  # a plain table that we have SELECT on; only then is it locked and read
    row_security: bool
    hidden: bool  # whether row level security would hide rows from us


class History(msgspec.Struct, frozen=True):
    """One consistent read of everything a plan depends on."""

    database: str
    user: str
    host: str | None
    port: int | None
    pid: int
    read_only: bool
    schema: str | None
    schema_exists: bool
    table_exists: bool
    schema_owner: Owner | None = None  # None where there is no schema yet
    holder_known: bool = False
    holder: Holder | None = None
    role_refused: str | None = None  # why SET ROLE to the configured one failed, in the server's words
    place: Place = Place()  # as configured
    table: Table | None = None  # as it was read; None also where it was made since
    applied: tuple[AppliedMigration, ...] = ()

    def with_rows(self, rows: Sequence[AppliedMigration]) -> History:
        """Return the history after some more migrations of ours, without another read."""
        versions = {row.version for row in rows}
        applied = (*(known for known in self.applied if known.version not in versions), *rows)
        return msgspec.structs.replace(self, applied=applied, table_exists=True, schema_exists=True)

    @property
    def newest(self) -> str:
        """Return the newest row's version, and whether it is unfinished, as one text; "" without rows."""
        newest = self._newest_row
        return f"{newest.version}{'' if newest.finished_at else ' unfinished'}" if newest else ""

    @property
    def newest_version(self) -> int | None:
        """Return the version of the newest row; None without rows."""
        newest = self._newest_row
        return newest.version if newest else None

    @property
    def _newest_row(self) -> AppliedMigration | None:
        return max(self.applied, key=lambda row: row.version, default=None)

    @property
    def role(self) -> str | None:
        """Return the role that migrations run as, where one is configured."""
        return self.place.role

    @property
    def address(self) -> str:
        """Return `host:port/database` as the server sees itself."""
        database = one_line(self.database)
        return f"{self.host}:{self.port}/{database}" if self.host else f"local/{database}"

    @property
    def lock_key(self) -> int:
        """Return the key of the advisory lock that whoever adds to this history holds."""
        assert self.schema is not None
        return lock_key(self.schema, self.place.table)

    @property
    def name(self) -> str:
        """Return the history table's qualified and quoted name."""
        assert self.schema is not None
        return f"{identifier(self.schema)}.{self.place.quoted_table}"

    @property
    def shown_name(self) -> str:
        """Return the name as a person is shown it, on one line."""
        return one_line(self.name)
