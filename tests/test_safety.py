"""Migrations that lock what others use fail a test."""

import asyncio

import pytest

import ampd
from tests.scenes import scripts
from tests.servers import Database

pytestmark = pytest.mark.anyio

BEFORE = "CREATE TABLE a (id int); CREATE TABLE b (id int)"
ROWS = "INSERT INTO a SELECT generate_series(1, 10)"


async def verdict(database: Database, *pending: str, rows: str = ROWS, blocked_ms: int = 0) -> str:
    """Return what is wrong with migrations that follow one which has made two tables; "" if nothing is."""
    before, *_ = everything = scripts(BEFORE, *pending)
    await ampd.migrate(database.url, migrations=[before])
    await database.execute(rows)
    try:
        await ampd.assert_migrations_safe(database.url, migrations=everything, blocked_ms=blocked_ms)
    except AssertionError as error:
        return str(error)
    finally:
        assert (await ampd.status(database.url, migrations=everything)).current_version == 1
    return ""


async def test_a_migration_that_blocks_nobody_is_safe(database: Database) -> None:
    """What makes tables of its own passes, and so does what only runs outside of a transaction."""
    concurrently = "-- no-transaction\nCREATE INDEX CONCURRENTLY ON a (id)"
    assert await verdict(database, "CREATE TABLE c (id int); INSERT INTO a VALUES (1)", concurrently) == ""


async def test_a_lock_on_a_table_with_rows_fails(database: Database) -> None:
    """Each table is named with the lock on it, as the rehearsal's report has it."""
    told = (await verdict(database, "CREATE INDEX ON a (id)")).splitlines()
    assert told[0] == "these migrations would keep others from their tables"
    assert told[1].startswith("2 step: ")
    assert told[2].startswith("  ! holds SHARE on public.a (")
    assert told[2].endswith(", blocks writes")
    assert len(told) == 3


async def test_a_table_without_rows_proves_nothing(database: Database) -> None:
    """A strong lock on an empty table is a failure that asks for rows, however long it may take."""
    told = (await verdict(database, "ALTER TABLE b ADD COLUMN c int", blocked_ms=10_000)).splitlines()
    assert told[2:] == ["  ? holds ACCESS EXCLUSIVE on public.b, which has no rows here: insert some before"]


async def test_a_short_lock_may_be_allowed(database: Database) -> None:
    """With a limit a lock that ends in time passes, but no rewriting."""
    assert await verdict(database, "ALTER TABLE a ADD COLUMN c int", blocked_ms=10_000) == ""
    await ampd.migrate(database.url, migrations=scripts(BEFORE, "SELECT 1"))
    with pytest.raises(AssertionError, match=r"! holds ACCESS EXCLUSIVE on public\.a .* rewritten or truncated"):
        await ampd.assert_migrations_safe(
            database.url,
            migrations=scripts(BEFORE, "SELECT 1", "ALTER TABLE a ALTER id TYPE bigint"),
            blocked_ms=10_000,
        )


async def test_nothing_pending_is_no_proof(database: Database) -> None:
    """A database that has all migrations fails the assertion, which would else never fail."""
    told = await verdict(database)
    assert told.splitlines()[0].endswith(f"/{database.name} has all migrations: nothing was rehearsed")


async def test_a_migration_that_fails_is_not_safe(database: Database) -> None:
    """The error that `migrate` would have is in the failure, with its place and hint."""
    told = await verdict(database, "ALTER TABLE nobody ADD COLUMN c int")
    assert told.startswith('the rehearsal failed: 2_step.sql:1: relation "nobody" does not exist (SQLSTATE 42P01)')


def test_a_test_without_a_loop_can_ask(database: Database) -> None:
    """`asyncio.run` is all that an ordinary test needs."""
    with pytest.raises(AssertionError, match="has all migrations"):
        asyncio.run(ampd.assert_migrations_safe(database.url, migrations=()))
