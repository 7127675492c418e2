"""A service's pool, on a database that is migrated first, or checked to be up to date."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from msgspec.structs import replace

from .config import Limits, MetadataDb, check_name
from .errors import ConfigError, MigrationConflict
from .events import OnEvent, Warned, ignore
from .history.refusals import check_conflicts
from .migration import Migration
from .migrator import apply_pending, current_status
from .postgres.connection import Pool, check_event_loop
from .postgres.pool import connected, shared_password, unopened_pool
from .redaction import Hidden
from .report import ahead_warning, count, still_pending
from .run import Run

_INSTEAD = {
    "Config": "give its metadata_db",
    "Pool": "a pool of your own goes to ampd.migrate",
    "Connection": "one of your own goes to ampd.migrate",
}


@asynccontextmanager
async def open_pool(
    metadata_db: MetadataDb,
    *,
    migrations: Iterable[Migration] | None = None,
    schema: str | None = None,
    table: str | None = None,
    limits: Limits | None = None,
    on_event: OnEvent = ignore,
    **options: Any,
) -> AsyncIterator[Pool]:
    """Open a connection pool on a database whose schema is current, and close it in the end.

    With `auto_migrate` the pending migrations are applied first; without it the schema must be up to date already. A
    database that is ahead of this build is let through with a warning event: old replicas restart during a rollout.
    The arguments are those of `migrate`; a `schema` is also where the pool's queries look first.

    The pool prepares no statements, and so works behind any pooler; where there is none, `statement_cache_size=100`
    saves a round trip per query. That and any other `options` go to `asyncpg.create_pool`, and win over the sizes and
    lifetimes of the configuration, but not over its database. A `password=`, such as a function that is asked for each
    connection, is also used to migrate, unless migrations have a URL, or the pool a user, of their own.

    Raises:
        ConfigError: an option is none of asyncpg's, or would lead to another database; nothing was migrated.
        MigrationConflict: without `auto_migrate`, migrations are pending; the hint names the command to run.
        AmpdError: as `migrate` and `status` do.
    """
    hidden_options = Hidden(options)
    del options
    if not isinstance(metadata_db, MetadataDb):
        kind = type(metadata_db).__name__
        del metadata_db  # which may be a URL with its password
        instead = _INSTEAD.get(kind, "of a URL make one: ampd.MetadataDb(url=...)")
        raise TypeError(f"open_pool takes the metadata_db section of a configuration, not {kind}; {instead}")
    check_event_loop()
    if schema is not None:
        check_name("schema", schema)
        metadata_db = replace(metadata_db, schema=schema)
    password = shared_password(metadata_db, hidden_options)
    unopened = unopened_pool(metadata_db, hidden_options)
    run = await Run.of(Hidden(metadata_db), migrations, table=table, limits=limits, on_event=on_event)
    run.database.password = password
    if metadata_db.auto_migrate:
        await apply_pending(run)
    else:
        await _check_up_to_date(run, on_event)
    async with await _connected(metadata_db, unopened) as pool:
        renewal = asyncio.create_task(_renew(pool, metadata_db.max_lifetime_secs))
        try:
            yield pool
        finally:
            renewal.cancel()


async def _check_up_to_date(run: Run, on_event: OnEvent) -> None:
    """Check that nothing is pending or in conflict; that the database is ahead is a warning.

    Raises:
        MigrationConflict: something is.
        AmpdError: as `status` does.
    """
    run.needs_rows = False
    found = await current_status(run)
    check_conflicts(found.plan)
    if pending := still_pending(found.plan):
        raise MigrationConflict(
            f"the schema of {found.database} is behind: {count(len(pending), 'migration')} pending "
            f"(from {pending[0].version} {pending[0].name})",
            conflicts=(),
            hint="run `ampd migrate` before the service starts, or set auto_migrate = true",
        )
    if found.plan.ahead:
        message = ahead_warning([info.version for info in found.plan.ahead])
        on_event(Warned(message=message, database=found.database, schema=found.schema))


async def _connected(metadata_db: MetadataDb, pool: Pool) -> Pool:
    try:
        return await connected(pool, metadata_db.require_url())
    except ConfigError as error:
        if metadata_db.schema is None or "search_path" not in error.message:
            raise
        raise ConfigError(
            error.message,
            hint="this pooler takes no settings from its clients, so metadata_db.schema cannot reach the pool: leave "
            f"it out and ALTER ROLE … SET search_path = {metadata_db.schema}, or connect directly",
            sqlstate=error.sqlstate,
        ) from error


async def _renew(pool: Pool, max_lifetime_secs: float) -> None:
    """Replace the connections, each when it is next free, before they grow older than they may."""
    while max_lifetime_secs:
        await asyncio.sleep(max_lifetime_secs * random.uniform(0.8, 1))
        await pool.expire_connections()
