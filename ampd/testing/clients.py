"""What a test gets to work with on its database: a pool, or a connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ampd.config import MetadataDb
from ampd.database_url import DatabaseUrl
from ampd.postgres.connection import CONNECT_TIMEOUT_SECS, Pool, connect
from ampd.postgres.libpq import driver_arguments
from ampd.postgres.pool import connected, search_path, unopened_pool
from ampd.redaction import Hidden

_CLOSE_SECS = 5.0


@asynccontextmanager
async def opened_pool(url: str, schema: str | None) -> AsyncIterator[Pool]:
    """Open the pool that `ampd.open_pool` would open, on a database that is known to be up to date.

    Raises:
        TimeoutError: at the end of the block a connection is still acquired.
    """
    metadata_db = MetadataDb(url=DatabaseUrl(url), schema=schema, min_connections=0, max_lifetime_secs=0)
    pool = await connected(unopened_pool(metadata_db, Hidden({})), metadata_db.require_url())
    try:
        yield pool
    finally:
        try:
            async with asyncio.timeout(_CLOSE_SECS):
                await pool.close()
        except TimeoutError:  # the driver has terminated the pool by then
            raise TimeoutError("the test has acquired a connection of ampd_pool, and not released it") from None


@asynccontextmanager
async def opened_connection(url: str, schema: str | None) -> AsyncIterator[Any]:
    """Open a connection with the settings of that pool."""
    hidden, _ = driver_arguments(DatabaseUrl(url), CONNECT_TIMEOUT_SECS)
    if schema is not None:
        arguments = hidden.reveal()
        arguments["server_settings"] = search_path(schema) | (arguments.get("server_settings") or {})
    connection = await connect(hidden)
    try:
        yield connection
    finally:
        await connection.close(timeout=_CLOSE_SECS)
