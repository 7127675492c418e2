"""Embedded, in one process: the pool that `open_pool` makes."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import anyio
import asyncpg
import pytest
from msgspec.structs import replace

import ampd
from tests.pools import INDEX, ONE, TWO, migration, on_each, tables, until_none_is_left
from tests.scenes import GENEROUS, unplaced
from tests.servers import Database, Role, pgbouncer

pytestmark = [pytest.mark.anyio, pytest.mark.any_server]


async def _size(pool: asyncpg.Pool) -> int:
    return int(pool.get_size())


async def test_opens_on_a_schema_that_it_has_migrated(
    configured: Callable[..., ampd.MetadataDb], database: Database
) -> None:
    """With auto_migrate the pool comes with the schema in place, and the end of the block closes its connections."""
    async with ampd.open_pool(configured(ONE, TWO, auto_migrate=True)) as pool:
        assert await pool.fetch("SELECT id, state FROM jobs") == [(1, "new")]
    assert await database.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND backend_type = 'client backend'"
    ) == 0  # fmt: skip


async def test_refuses_a_schema_that_is_behind(configured: Callable[..., ampd.MetadataDb], database: Database) -> None:
    """Without auto_migrate a schema that is behind is an error that names the command, and nothing is written."""
    await ampd.migrate(database.url, migrations=[ONE])
    with pytest.raises(ampd.MigrationConflict) as caught:
        async with ampd.open_pool(configured(ONE, TWO, INDEX)):
            pass
    assert (caught.value.code, caught.value.message, caught.value.hint) == (
        "conflict",
        f"the schema of 127.0.0.1:{database.server.port}/{database.name} is behind: 2 migrations pending "
        "(from 2 job_state)",
        "run `ampd migrate` before the service starts, or set auto_migrate = true",
    )
    assert await database.fetch("SELECT version FROM ampd_schema_migrations") == [(1,)]


async def test_leaves_an_empty_database_empty(configured: Callable[..., ampd.MetadataDb], database: Database) -> None:
    """Without auto_migrate not even the history table is made."""
    with pytest.raises(ampd.MigrationConflict, match="is behind: 1 migration pending"):
        async with ampd.open_pool(configured(ONE)):
            pass
    assert await tables(database) == []


@pytest.mark.parametrize("auto_migrate", [False, True])
async def test_needs_no_more_than_select_when_current(
    configured: Callable[..., ampd.MetadataDb], database: Database, reader: Role, auto_migrate: bool
) -> None:
    """Once the schema is current a role that may only read opens its pool, with auto_migrate and without."""
    await ampd.migrate(database.url, migrations=[ONE])
    async with ampd.open_pool(configured(ONE, url=reader.url, auto_migrate=auto_migrate)) as pool:
        assert await pool.fetchval("SELECT id FROM jobs") == 1


@pytest.mark.parametrize("auto_migrate", [False, True])
async def test_lets_an_old_build_in_with_a_warning(
    configured: Callable[..., ampd.MetadataDb], database: Database, auto_migrate: bool
) -> None:
    """A database that is ahead of the build is warned of and used: old replicas restart during a rollout."""
    await ampd.migrate(database.url, migrations=[ONE, TWO])
    events: list[ampd.Event] = []
    async with ampd.open_pool(configured(ONE, auto_migrate=auto_migrate), on_event=events.append) as pool:
        assert await pool.fetchval("SELECT id FROM jobs") == 1
    message = "the database is ahead of this build by 1 migration (newest: 2); nothing is applied"
    warnings = [event for event in events if isinstance(event, ampd.Warned)]
    assert list(map(unplaced, warnings)) == [ampd.Warned(message=message)]
    place = f"{database.server.host}:{database.server.port}/{database.name}"
    assert {(event.database, event.schema) for event in events} == {(place, "public")}


@pytest.mark.parametrize("auto_migrate", [False, True])
async def test_refuses_a_conflict(
    configured: Callable[..., ampd.MetadataDb], database: Database, auto_migrate: bool
) -> None:
    """A file that has changed since it was applied keeps the service from starting, with auto_migrate and without."""
    await ampd.migrate(database.url, migrations=[ONE])
    with pytest.raises(ampd.MigrationConflict, match="1 jobs was applied and its file has changed since"):
        async with ampd.open_pool(configured(replace(ONE, sql="SELECT 2"), TWO, auto_migrate=auto_migrate)):
            pass


async def test_migrates_by_the_url_of_migrations(
    configured: Callable[..., ampd.MetadataDb], database: Database, reader: Role
) -> None:
    """Where migrations have a direct connection they run over it, and the pool keeps the services' URL."""
    config = configured(ONE, url=reader.url, auto_migrate=True)
    direct = replace(config, migrations=replace(config.migrations, url=ampd.DatabaseUrl(database.url)))
    async with ampd.open_pool(direct) as pool:
        assert await pool.fetchval("SELECT current_user") == reader.name
        assert await database.fetchval("SELECT applied_by FROM ampd_schema_migrations") == "postgres"
    with pytest.raises(ampd.ConfigError, match="no database URL is configured"):
        async with ampd.open_pool(replace(direct, url=None)):
            pass


async def test_is_as_large_as_configured(configured: Callable[..., ampd.MetadataDb]) -> None:
    """The sizes of the configuration are the pool's."""
    async with ampd.open_pool(configured(ONE, auto_migrate=True, pool_size=5, min_connections=2)) as pool:
        assert (pool.get_size(), pool.get_min_size(), pool.get_max_size()) == (2, 2, 5)


async def test_a_pool_that_is_used_up_fails_fast(configured: Callable[..., ampd.MetadataDb]) -> None:
    """Whoever gets no connection within acquire_timeout_secs hears so; a timeout of one's own wins, and 0 is none."""
    config = configured(ONE, auto_migrate=True, pool_size=1, min_connections=1, acquire_timeout_secs=0.01)
    async with ampd.open_pool(config) as pool:
        async with pool.acquire(timeout=GENEROUS):
            for asking in (pool.fetchval("SELECT 1"), pool.acquire()):
                with pytest.raises(TimeoutError) as error:
                    await asking
                assert str(error.value) == (
                    "none of the pool's 1 connections was free within 0.01 s (metadata_db.acquire_timeout_secs)"
                )
            with pytest.raises(TimeoutError, match=r"^$"):
                await pool.acquire(timeout=0.001)
            patient = asyncio.ensure_future(_with(pool.acquire(timeout=GENEROUS)))
            await asyncio.sleep(0.02)
        assert await patient == 1
    async with ampd.open_pool(replace(config, acquire_timeout_secs=0)) as pool:
        async with pool.acquire(timeout=GENEROUS):
            patient = asyncio.ensure_future(pool.fetchval("SELECT 1"))
            await asyncio.sleep(0.02)
            assert not patient.done()
        assert await patient == 1


async def _with(acquiring: Any) -> object:
    async with acquiring as connection:
        return await connection.fetchval("SELECT 1")


async def test_idle_connections_end(configured: Callable[..., ampd.MetadataDb]) -> None:
    """Connections beyond min_connections are closed when they have been idle for idle_timeout_secs."""
    async with ampd.open_pool(
        configured(ONE, auto_migrate=True, pool_size=2, min_connections=0, idle_timeout_secs=0.05)
    ) as pool:
        await on_each(pool, "SELECT 1")
        await until_none_is_left(lambda: _size(pool))


async def test_connections_are_renewed(configured: Callable[..., ampd.MetadataDb]) -> None:
    """After max_lifetime_secs a connection is replaced, but never one that is in use."""
    async with ampd.open_pool(
        configured(ONE, auto_migrate=True, pool_size=2, min_connections=1, max_lifetime_secs=0.2)
    ) as pool:
        async with pool.acquire() as used:
            first = await used.fetchval("SELECT pg_backend_pid()")
            seen = {await pool.fetchval("SELECT pg_backend_pid()")}
            with anyio.fail_after(20):
                while len(seen) < 3:
                    seen.add(await pool.fetchval("SELECT pg_backend_pid()"))
                    await anyio.sleep(0.01)
            assert await used.fetchval("SELECT pg_backend_pid()") == first
        assert first not in {row[0] for rows in await on_each(pool, "SELECT pg_backend_pid()") for row in rows}


async def test_what_the_block_raises_comes_through(configured: Callable[..., ampd.MetadataDb]) -> None:
    """An error of the service is its own, and the pool is closed all the same."""
    pools: list[asyncpg.Pool] = []

    async def serve() -> None:
        async with ampd.open_pool(configured(ONE, auto_migrate=True)) as pool:
            pools.append(pool)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await serve()
    assert pools[0].is_closing()


async def test_works_in_the_configured_schema(configured: Callable[..., ampd.MetadataDb], database: Database) -> None:
    """`schema` is made when missing, holds tables and history, and is where the pool's queries look first."""
    async with ampd.open_pool(configured(ONE, schema='the "amp"', auto_migrate=True)) as pool:
        assert await on_each(pool, "SELECT id FROM jobs") == [[(1,)]] * 10
    assert await database.fetch(
        "SELECT schemaname, tablename FROM pg_tables WHERE schemaname !~ '^pg_|^information' ORDER BY 2"
    ) == [('the "amp"', "ampd_schema_migrations"), ('the "amp"', "jobs")]


async def test_takes_the_arguments_of_migrate(configured: Callable[..., ampd.MetadataDb], database: Database) -> None:
    """Migrations, schema and limits may be given in place of the configured ones, with auto_migrate and without."""
    given: dict[str, Any] = {"migrations": [ONE, TWO], "schema": "amp", "limits": ampd.Limits(lock_timeout_secs=1)}
    with pytest.raises(ampd.MigrationConflict, match=r"2 migrations pending \(from 1 jobs\)"):
        async with ampd.open_pool(configured(INDEX), **given):
            pass
    for auto_migrate in (True, False):
        async with ampd.open_pool(configured(INDEX, auto_migrate=auto_migrate), **given) as pool:
            assert await pool.fetchval("SELECT state FROM jobs") == "new"
    assert await database.fetch("SELECT version FROM amp.ampd_schema_migrations ORDER BY 1") == [(1,), (2,)]
    for name, value, kind, said in (
        ("schema", "", ampd.ConfigError, "the schema's name is empty"),
        ("limits", ampd.Migrations(), TypeError, "limits= takes an ampd.Limits, not Migrations"),
        ("migrations", "sql", TypeError, "migrations= takes what ampd.read_migrations"),
        ("on_event", None, TypeError, "on_event= takes a plain function of one event, not NoneType"),
    ):
        with pytest.raises(kind, match=f"^{re.escape(said)}"):
            async with ampd.open_pool(configured(ONE), **{name: value}):  # type: ignore[arg-type]
                pass


async def test_works_behind_a_pooler(configured: Callable[..., ampd.MetadataDb], database: Database) -> None:
    """Behind PgBouncer in transaction mode the pool migrates, opens and serves."""
    with pgbouncer(database.server) as bouncer:
        url = bouncer.url(database.name)
        async with ampd.open_pool(configured(ONE, TWO, INDEX, url=url, auto_migrate=True)) as pool:
            values = await asyncio.gather(*(pool.fetchval("SELECT id + $1::int FROM jobs", n) for n in range(20)))
        assert values == list(range(1, 21))


async def test_a_schema_does_not_reach_behind_a_pooler(
    configured: Callable[..., ampd.MetadataDb], database: Database
) -> None:
    """PgBouncer refuses the search path that `schema` stands for: the error says what to do instead, and it works."""
    with pgbouncer(database.server) as bouncer:
        url = bouncer.url(database.name)
        with pytest.raises(ampd.ConfigError) as caught:
            async with ampd.open_pool(configured(ONE, url=url, schema="amp", auto_migrate=True)):
                pass
        assert caught.value.hint == (
            "this pooler takes no settings from its clients, so metadata_db.schema cannot reach the pool: leave it out "
            "and ALTER ROLE … SET search_path = amp, or connect directly"
        )
    await database.execute(f"ALTER ROLE postgres IN DATABASE {database.name} SET search_path = amp")
    with pgbouncer(database.server) as bouncer:  # another one: its server connections have that path from the start
        async with ampd.open_pool(configured(ONE, url=bouncer.url(database.name), auto_migrate=True)) as pool:
            assert await pool.fetchval("SELECT id FROM jobs") == 1


async def test_says_so_when_the_server_is_full(configured: Callable[..., ampd.MetadataDb], database: Database) -> None:
    """A pool that cannot have its connections is a ConnectionFailed with a hint, and closes the ones it got."""
    role = await database.role("few", "ALL ON SCHEMA public")
    await database.execute(f"ALTER ROLE {role.name} CONNECTION LIMIT 2")
    with pytest.raises(ampd.ConnectionFailed) as caught:
        async with ampd.open_pool(configured(ONE, auto_migrate=True, url=role.url, min_connections=4)):
            pass
    assert (caught.value.sqlstate, caught.value.hint) == (
        "53300",
        "close idle connections, or raise max_connections (or the role's or database's CONNECTION LIMIT)",
    )
    await until_none_is_left(
        lambda: database.fetchval("SELECT count(*) FROM pg_stat_activity WHERE usename = $1", role.name)
    )


async def test_events_tell_the_run_in_order(database: Database) -> None:
    """Each migration is announced, told statement by statement and reported as applied before the next begins."""
    events: list[ampd.Event] = []
    report = await ampd.migrate(database.url, migrations=[ONE, TWO, INDEX], on_event=events.append)
    durations = [done.duration_ms for done in report.applied]
    assert list(map(unplaced, events[1:-1])) == [
        ampd.Starting(version=1, name="jobs", number=1, total=3, statements=2),
        ampd.StatementStarted(version=1, name="jobs", migration=1, total=3, number=1, statements=2, line=1),
        ampd.StatementStarted(version=1, name="jobs", migration=1, total=3, number=2, statements=2, line=2),
        ampd.Applied(version=1, name="jobs", number=1, total=3, duration_ms=durations[0]),
        ampd.Starting(version=2, name="job_state", number=2, total=3, statements=1),
        ampd.StatementStarted(version=2, name="job_state", migration=2, total=3, number=1, statements=1, line=1),
        ampd.Applied(version=2, name="job_state", number=2, total=3, duration_ms=durations[1]),
        ampd.Starting(version=3, name="job_index", number=3, total=3, statements=1, transactional=False),
        ampd.StatementStarted(version=3, name="job_index", migration=3, total=3, number=1, statements=1, line=2),
        ampd.Applied(version=3, name="job_index", number=3, total=3, duration_ms=durations[2]),
    ]


async def test_events_pass_on_what_the_server_says(database: Database) -> None:
    """Notices of a migration arrive as events between its statements, and are the only ones from the server."""
    events: list[ampd.Event] = []
    noisy = migration(1, "noisy", "DO $$BEGIN RAISE NOTICE 'half way'; END$$;\nDROP TABLE IF EXISTS nothing;")
    await ampd.migrate(database.url, migrations=[noisy], on_event=events.append)
    assert [unplaced(event) for event in events if isinstance(event, ampd.ServerMessage)] == [
        ampd.ServerMessage(severity="NOTICE", message="half way"),
        ampd.ServerMessage(severity="NOTICE", message='table "nothing" does not exist, skipping'),
    ]
