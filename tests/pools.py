"""What the tests of pools share: three migrations, and questions that they ask on every connection."""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import asyncpg

import ampd
from ampd.migration import checksum
from tests.servers import Database


def migration(version: int, name: str, sql: str) -> ampd.Migration:
    """Return a migration as its file would give it."""
    return ampd.Migration(version, name, f"{version}_{name}.sql", sql, checksum(sql.encode()))


ONE = migration(1, "jobs", "CREATE TABLE jobs (id int);\nINSERT INTO jobs VALUES (1);\n")
TWO = migration(2, "job_state", "ALTER TABLE jobs ADD COLUMN state text DEFAULT 'new';\n")
INDEX = migration(3, "job_index", "-- no-transaction\nCREATE INDEX CONCURRENTLY jobs_id ON jobs (id);\n")


async def on_each(pool: asyncpg.Pool, query: str, *, in_transaction: bool = False) -> list[list[Any]]:
    """Return the rows of a query on every connection of a pool, all of them held at the same time."""
    connections = [await pool.acquire() for _ in range(pool.get_max_size())]
    try:
        found = []
        for connection in connections:
            if in_transaction:
                async with connection.transaction():
                    found.append([tuple(row) for row in await connection.fetch(query)])
            else:
                found.append([tuple(row) for row in await connection.fetch(query)])
        return found
    finally:
        for connection in connections:
            await pool.release(connection)


async def until_none_is_left(count: Callable[[], Awaitable[int]]) -> None:
    """Wait for a number to become 0."""
    with anyio.fail_after(20):
        while True:
            if await count() == 0:
                return
            await anyio.sleep(0.01)


async def tables(database: Database) -> list[str]:
    """Return the names of the tables in the schema public."""
    return [row[0] for row in await database.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
