"""Embedded, in one process: the pool that `open_pool` makes, and a pool of the service's own lent to `migrate`."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest
from msgspec.structs import replace

import ampd
from ampd.advisory_lock import lock_key
from ampd.history.table import TABLE
from ampd.migration import checksum
from tests.scenes import Heard, history, unplaced
from tests.servers import Database, Role, pgbouncer

pytestmark = pytest.mark.anyio


def migration(version: int, name: str, sql: str) -> ampd.Migration:
    """Return a migration as its file would give it."""
    return ampd.Migration(version, name, f"{version}_{name}.sql", sql, checksum(sql.encode()))


ONE = migration(1, "jobs", "CREATE TABLE jobs (id int);\nINSERT INTO jobs VALUES (1);\n")
TWO = migration(2, "job_state", "ALTER TABLE jobs ADD COLUMN state text DEFAULT 'new';\n")
INDEX = migration(3, "job_index", "-- no-transaction\nCREATE INDEX CONCURRENTLY jobs_id ON jobs (id);\n")


@pytest.fixture
def configured(database: Database, tmp_path: Path) -> Callable[..., ampd.MetadataDb]:
    """A function from migrations and keys to the configuration of a service that has these."""

    def configure(*migrations: ampd.Migration, url: str = database.url, **keys: Any) -> ampd.MetadataDb:
        folder = tmp_path / "migrations"
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        for each in migrations:
            (folder / each.file).write_text(each.sql)
        files = ampd.Migrations(dir=folder, connect_wait_secs=0)
        return ampd.MetadataDb(url=ampd.DatabaseUrl(url), migrations=files, **keys)

    return configure


@asynccontextmanager
async def lent_pool(database: Database, **options: Any) -> AsyncIterator[asyncpg.Pool]:
    """Hold a pool such as a service makes for itself, prepared statements and all."""
    async with asyncpg.create_pool(database.url, **{"min_size": 2, "max_size": 2, **options}) as pool:
        yield pool


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


async def _size(pool: asyncpg.Pool) -> int:
    return int(pool.get_size())


async def tables(database: Database) -> list[str]:
    """Return the names of the tables in the schema public."""
    return [row[0] for row in await database.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]


async def advisory_locks(database: Database) -> int:
    """Return how many advisory locks are held in a database."""
    held: int = await database.fetchval(
        "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database "
        "WHERE locktype = 'advisory' AND datname = current_database()"
    )
    return held


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


@pytest.mark.parametrize(("auto_migrate", "added"), [(False, ""), (True, "; nothing is applied")])
async def test_lets_an_old_build_in_with_a_warning(
    configured: Callable[..., ampd.MetadataDb], database: Database, auto_migrate: bool, added: str
) -> None:
    """A database that is ahead of the build is warned of and used: old replicas restart during a rollout."""
    await ampd.migrate(database.url, migrations=[ONE, TWO])
    events: list[ampd.Event] = []
    async with ampd.open_pool(configured(ONE, auto_migrate=auto_migrate), on_event=events.append) as pool:
        assert await pool.fetchval("SELECT id FROM jobs") == 1
    message = f"the database is ahead of this build by 1 migration (newest: 2){added}"
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


async def test_is_as_large_as_configured(configured: Callable[..., ampd.MetadataDb]) -> None:
    """The sizes of the configuration are the pool's."""
    async with ampd.open_pool(configured(ONE, auto_migrate=True, pool_size=5, min_connections=2)) as pool:
        assert (pool.get_size(), pool.get_min_size(), pool.get_max_size()) == (2, 2, 5)


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


async def test_takes_the_drivers_options(configured: Callable[..., ampd.MetadataDb]) -> None:
    """Options go to asyncpg, and settings of the service's own do not displace the schema."""
    options: dict[str, Any] = {
        "server_settings": {"application_name": "billing"},
        "statement_cache_size": 100,
        "max_size": 1,
    }
    config = configured(ONE, schema="amp", auto_migrate=True, min_connections=1)
    async with ampd.open_pool(config, **options) as pool:
        assert pool.get_max_size() == 1
        assert await pool.fetchval("SELECT current_setting('application_name')") == "billing"
        assert await pool.fetchval("SELECT id FROM jobs") == 1
        assert await pool.fetchval("SELECT count(*) FROM pg_prepared_statements") > 0


async def test_no_prepared_statements_by_default(configured: Callable[..., ampd.MetadataDb]) -> None:
    """Behind a pooler in transaction mode prepared statements would be some other client's: there are none."""
    async with ampd.open_pool(configured(ONE, auto_migrate=True, pool_size=1)) as pool:
        assert await pool.fetchval("SELECT 1 + $1::int", 1) == 2
        assert await pool.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name <> ''") == 0


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


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"max_size": 2}, (2, 2)),
        ({"max_size": 20}, (3, 20)),
        ({"min_size": 0}, (0, 10)),
        ({"min_size": 1, "max_size": 1}, (1, 1)),
    ],
)
async def test_sizes_among_the_options_win(
    configured: Callable[..., ampd.MetadataDb], options: dict[str, Any], sizes: tuple[int, int]
) -> None:
    """A size that is given as an option replaces the configured one, which gives way where it would contradict."""
    async with ampd.open_pool(configured(ONE, auto_migrate=True), **options) as pool:
        assert (pool.get_min_size(), pool.get_max_size()) == sizes


OPTIONS = "they are those of asyncpg.create_pool; what metadata_db holds is set there"


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        *(
            (
                {name: "x"},
                f"open_pool takes no {name}=: its pool is on the database that it has migrated",
                "say in metadata_db.url which database that is",
            )
            for name in ("dsn", "host", "port", "database", "service", "servicefile")
        ),
        ({"pool_sise": 1, "url": 2}, "open_pool knows no option pool_sise=, url=", OPTIONS),
        (
            {"min_size": 11},
            "min_size=11 is above the size of the pool, 10",
            "give open_pool max_size as well, or raise metadata_db.pool_size",
        ),
        (
            {"max_size": 0},
            "the options of open_pool are not what asyncpg takes: max_size is expected to be greater than zero",
            OPTIONS,
        ),
        (
            {"max_size": "2"},
            "the options of open_pool are not what asyncpg takes: "
            "'<' not supported between instances of 'str' and 'int'",
            OPTIONS,
        ),
        (
            {"connection_class": int},
            "the options of open_pool are not what asyncpg takes: connection_class is expected to be a subclass of "
            "asyncpg.Connection, got <class 'int'>",
            OPTIONS,
        ),
        (
            {"ssl": "perhaps"},
            "open_pool has ssl='perhaps', which is not one of its values",
            "use disable, allow, prefer, require, verify-ca, verify-full",
        ),
        (
            {"loop": object()},
            "loop= is another event loop",
            "leave it out: the pool belongs to the running one",
        ),
    ],
)
async def test_options_that_cannot_be_are_refused_before_anything_is_migrated(
    configured: Callable[..., ampd.MetadataDb],
    database: Database,
    options: dict[str, Any],
    message: str,
    hint: str,
) -> None:
    """An option that asyncpg does not know, or that leads to another database, is refused by name, nothing written."""
    with pytest.raises(ampd.ConfigError) as refused:
        async with ampd.open_pool(configured(ONE, auto_migrate=True), **options):
            pass
    assert (refused.value.message, refused.value.hint) == (message, hint)
    assert await tables(database) == []


async def test_functions_and_classes_among_the_options_are_used(configured: Callable[..., ampd.MetadataDb]) -> None:
    """What a service gives asyncpg to call or to make is called and made, the running loop named or not."""
    called: list[str] = []

    class Connection(asyncpg.Connection):  # type: ignore[misc]
        pass

    class Record(asyncpg.Record):  # type: ignore[misc]
        pass

    async def connect(*arguments: Any, region: str, **options: Any) -> asyncpg.Connection:
        called.append(f"connect in {region}")
        return await asyncpg.connect(*arguments, **options)

    async def init(_: asyncpg.Connection) -> None:
        called.append("init")

    async def setup(_: object) -> None:
        called.append("setup")

    async def reset(_: object) -> None:
        called.append("reset")

    options: dict[str, Any] = {
        "loop": asyncio.get_running_loop(),
        "connect": connect,
        "region": "north",
        "init": init,
        "setup": setup,
        "reset": reset,
        "connection_class": Connection,
        "record_class": Record,
        "max_queries": 7,
        "command_timeout": 5,
        "max_size": 1,
    }
    async with ampd.open_pool(configured(ONE, auto_migrate=True), **options) as pool:
        assert isinstance(await pool.fetchrow("SELECT 1"), Record)
        async with pool.acquire() as connection:
            assert isinstance(connection, Connection)
    assert set(called) == {"connect in north", "init", "setup", "reset"}


async def test_says_what_the_drivers_options_were_refused_for(configured: Callable[..., ampd.MetadataDb]) -> None:
    """An option that the server refuses is an error of ampd's, as the same in a URL would be."""
    with pytest.raises(ampd.AuthenticationFailed) as refused:
        async with ampd.open_pool(configured(ONE, auto_migrate=True), user="no body"):
            pass
    assert refused.value.message.endswith(': role "no body" does not exist')
    for given, message, hint in (
        ({"nonsense": "1"}, 'unrecognized configuration parameter "nonsense"', "remove nonsense from the URL"),
        ({"work_mem": "x"}, 'invalid value for parameter "work_mem": "x"', "remove work_mem from the URL"),
        ({"work_mem": 1}, "server_settings is expected to be None or a Dict[str, str]", "correct the database URL"),
    ):
        with pytest.raises(ampd.ConfigError) as wrong:
            async with ampd.open_pool(configured(ONE, auto_migrate=True), server_settings=given, min_size=1):
                pass
        assert wrong.value.message.endswith(f": {message}")
        assert wrong.value.hint == f"{hint}; or correct the option of open_pool that it comes from"


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


@pytest.mark.parametrize("size", [1, 2])
async def test_a_lent_pool_comes_back_as_it_was(database: Database, size: int) -> None:
    """After a run every connection has its settings, its codecs and no lock, and the pool is open; one is enough."""

    async def prepare(connection: asyncpg.Connection) -> None:
        await connection.set_type_codec("json", schema="pg_catalog", encoder=str, decoder=lambda text: f"<{text}>")

    async with lent_pool(database, min_size=size, max_size=size, init=prepare) as pool:
        settings = """SELECT pg_backend_pid(), current_user, '1'::json, (
            SELECT json_object_agg(name, setting ORDER BY name) FROM pg_settings WHERE source = 'session')"""
        before = await on_each(pool, settings)
        wild = migration(
            9,
            "wild",
            "SET search_path = pg_catalog; SET statement_timeout = '1h'; SET ROLE pg_monitor; LISTEN noise; "
            "SELECT pg_advisory_lock(7); PREPARE mine AS SELECT 1;",
        )
        report = await ampd.migrate(pool, migrations=[ONE, TWO, wild])
        assert [done.version for done in report.applied] == [1, 2, 9]
        assert report.database == f"127.0.0.1:{database.server.port}/{database.name}"
        assert sorted(await on_each(pool, settings)) == sorted(before)
        assert await on_each(pool, "SELECT pg_listening_channels()") == [[]] * size
        assert await advisory_locks(database) == 0
        assert (await ampd.status(pool, migrations=[ONE, TWO, wild])).up_to_date


@pytest.mark.parametrize("in_transaction", [False, True])
async def test_cached_statements_survive_the_change(database: Database, in_transaction: bool) -> None:
    """No connection of a lent pool stumbles over a statement that it had prepared on the old schema."""
    await ampd.migrate(database.url, migrations=[ONE])
    async with lent_pool(database) as pool:
        assert await on_each(pool, "SELECT * FROM jobs") == [[(1,)]] * 2
        await ampd.migrate(pool, migrations=[ONE, TWO])
        assert await on_each(pool, "SELECT * FROM jobs", in_transaction=in_transaction) == [[(1, "new")]] * 2


async def test_a_pool_of_one_cannot_run_outside_of_a_transaction(database: Database) -> None:
    """A no-transaction file needs a second connection: a pool of one is told so before anything runs."""
    async with lent_pool(database, min_size=1, max_size=1) as pool:
        with pytest.raises(ampd.ConfigError) as caught:
            await ampd.migrate(pool, migrations=[ONE, INDEX])
        assert (caught.value.message, caught.value.hint) == (
            "3 job_index runs outside of a transaction and needs two connections; the pool has one",
            "give `ampd.migrate` a pool with max_size of at least 2, or the URL",
        )
        assert await pool.fetchval("SELECT to_regclass('ampd_schema_migrations')") is None
        assert caught.value.report is not None
        assert [each.version for each in caught.value.report.pending] == [1, 3]


async def test_a_pool_of_two_runs_outside_of_a_transaction(database: Database) -> None:
    """Two connections of a lent pool are enough for a no-transaction file, and both come back clean."""
    async with lent_pool(database) as pool:
        settings = "SELECT count(*) FROM pg_settings WHERE source = 'session' AND name ~ 'timeout|search_path'"
        before = await on_each(pool, settings)
        await ampd.migrate(pool, migrations=[ONE, INDEX], schema="amp")
        assert await pool.fetchval("SELECT indisvalid FROM pg_index WHERE indexrelid = 'amp.jobs_id'::regclass")
        assert await on_each(pool, settings) == before
        assert await advisory_locks(database) == 0


async def test_a_waiting_run_lets_the_service_use_its_pool(database: Database) -> None:
    """While a run waits for another runner the pool's other connections serve, and the run follows when it may."""
    async with lent_pool(database) as pool, database.connect() as other, other.transaction():
        await other.execute(f"SELECT pg_advisory_xact_lock({lock_key('public', TABLE)})")
        run = asyncio.create_task(ampd.migrate(pool, migrations=[ONE]))
        for _ in range(50):
            assert await pool.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
        assert not run.done()
        await other.execute("COMMIT; BEGIN")
        with anyio.fail_after(30):
            assert (await run).current_version == 1


@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"])
async def test_a_lent_pool_outlives_its_backend(database: Database, directive: str) -> None:
    """When the server ends the connection that migrates, the run says so, and the pool opens another one."""
    slow = migration(4, "slow", f"{directive}SELECT pg_sleep(600);\n")
    begun = asyncio.Event()
    async with lent_pool(database) as pool:
        run = asyncio.create_task(ampd.migrate(pool, migrations=[slow], on_event=lambda event: _slow(begun, event)))
        with anyio.fail_after(30):
            await begun.wait()
            await until_none_is_left(
                lambda: database.fetchval(
                    "SELECT 1 - count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'PgSleep' "
                    "AND datname = current_database()"
                )
            )
            with pytest.raises(ampd.ConnectionFailed, match="the connection to the server was lost"):
                await run
        assert await on_each(pool, "SELECT 1") == [[(1,)]] * 2
        assert await advisory_locks(database) == 0


BRIEF = 0.2  # seconds: shorter than anything below


@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"])
async def test_the_drivers_timeout_is_not_ours(database: Database, directive: str) -> None:
    """A pool's command_timeout ends no migration, no wait for a lock, and no wait for another runner."""
    files = [
        migration(1, "slow", f"{directive}CREATE TABLE t (); SELECT pg_sleep({3 * BRIEF})"),
        migration(2, "blocked", f"{directive}ALTER TABLE t ADD COLUMN x int"),
        migration(3, "index", "-- no-transaction\nCREATE INDEX CONCURRENTLY i ON t (x)"),
    ]
    limits, heard, others = ampd.Limits(lock_timeout_secs=2 * BRIEF), Heard(), Heard()

    async def run(pool: asyncpg.Pool, events: Heard) -> None:
        await ampd.migrate(pool, migrations=files, limits=limits, on_event=events)

    async with (
        lent_pool(database, command_timeout=BRIEF) as pool,
        lent_pool(database, command_timeout=BRIEF) as other,
        database.connect() as reader,
        anyio.create_task_group() as tasks,
    ):
        await ampd.migrate(pool, migrations=files[:1])
        await reader.execute("BEGIN; SELECT FROM t")
        tasks.start_soon(run, pool, heard)
        await heard.first(ampd.LockRetry)
        tasks.start_soon(run, other, others)
        await asyncio.sleep(2 * BRIEF)
        await reader.execute("COMMIT")
    assert await history(database) == [(1, True, 2), (2, True, 1), (3, True, 1)]
    assert await advisory_locks(database) == 0


async def test_a_lost_connection_of_a_pool_with_a_timeout(database: Database) -> None:
    """Where the driver's timeout plays no part, a connection that the server has ended is told as that."""
    slow, begun = migration(4, "slow", "SELECT pg_sleep(600)"), asyncio.Event()
    async with lent_pool(database, command_timeout=BRIEF, ssl=False) as pool:
        run = asyncio.create_task(ampd.migrate(pool, migrations=[slow], on_event=lambda event: _slow(begun, event)))
        await begun.wait()
        await asyncio.sleep(2 * BRIEF)
        await database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep' "
            "AND datname = current_database()"
        )
        with pytest.raises(ampd.ConnectionFailed, match="terminat"):
            await run


def _slow(begun: asyncio.Event, event: ampd.Event) -> None:
    if isinstance(event, ampd.StatementStarted):
        begun.set()


async def cancel_by_asyncio(run: Callable[[], Coroutine[Any, Any, Any]], begun: asyncio.Event) -> None:
    """Cancel as asyncio does, by the task."""
    task = asyncio.create_task(run())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_by_anyio(run: Callable[[], Coroutine[Any, Any, Any]], begun: asyncio.Event) -> None:
    """Cancel as anyio does, by the scope, and so at every await from then on."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await begun.wait()
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("cancel", [cancel_by_asyncio, cancel_by_anyio])
@pytest.mark.parametrize(
    ("directive", "left"),
    [("", []), ("-- no-transaction\n", [(4, 1, False)])],
)
async def test_a_cancelled_run_gives_clean_connections_back(
    database: Database, cancel: Callable[..., Awaitable[None]], directive: str, left: list[tuple[object, ...]]
) -> None:
    """Cancelled in mid-statement, a run stops it, keeps what was done, and returns the connections fit for use."""
    slow = migration(4, "slow", f"{directive}CREATE TABLE slow (id int);\nSELECT pg_sleep(600);\n")
    begun = asyncio.Event()
    events: list[ampd.Event] = []

    def listen(event: ampd.Event) -> None:
        events.append(event)
        if isinstance(event, ampd.StatementStarted) and (event.version, event.number) == (4, 2):
            begun.set()

    async with lent_pool(database) as pool:
        with anyio.fail_after(30):
            await cancel(lambda: ampd.migrate(pool, migrations=[ONE, slow], on_event=listen), begun)
        assert await on_each(pool, "SELECT 1") == [[(1,)]] * 2
        assert await pool.fetch(
            "SELECT version, statements_done, finished_at IS NOT NULL FROM ampd_schema_migrations ORDER BY version"
        ) == [(1, 2, True), *left]
        assert await pool.fetchval("SELECT to_regclass('slow') IS NOT NULL") == bool(left)
        asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
        assert await pool.fetchval(asleep) == 0
        assert await advisory_locks(database) == 0
    assert [event.version for event in events if isinstance(event, ampd.Applied)] == [1]


async def test_what_the_service_sets_on_its_connections_holds_throughout(database: Database) -> None:
    """What `setup` sets is in force for each migration, and for the service afterwards; what a file sets is not."""
    owner = await database.role("owner", "ALL ON SCHEMA public")
    await database.execute(f"CREATE SCHEMA app AUTHORIZATION {owner.name}")

    async def setup(connection: asyncpg.Connection) -> None:
        await connection.execute(f"SET search_path = app; SET ROLE {owner.name}; SET app.tenant = 'blue'")

    noisy = "RESET ROLE; SET search_path = public; SET app.tenant = 'red'; SET work_mem = '123kB'; SET app.mood = 'ill'"
    files = [
        migration(1, "first", f"CREATE TABLE one (); {noisy}"),
        migration(2, "second", "CREATE TABLE two ()"),
        migration(3, "third", f"-- no-transaction\nCREATE TABLE three (); SELECT 1; {noisy}; VACUUM"),
        migration(4, "fourth", "CREATE TABLE four ()"),
    ]
    names = ("search_path", "app.tenant", "work_mem")
    facts = f"SELECT current_user, {', '.join(f'current_setting({name!r})' for name in names)}"
    async with asyncpg.create_pool(database.url, min_size=2, max_size=2, setup=setup) as pool:
        await ampd.migrate(pool, migrations=files)
        for row in await asyncio.gather(*(pool.fetchrow(facts) for _ in range(4))):
            assert tuple(row) == (owner.name, "app", "blue", "4MB")
    rows = await database.fetch(
        "SELECT schemaname, tablename, tableowner FROM pg_tables WHERE schemaname IN ('app', 'public') ORDER BY 2"
    )
    assert [tuple(row) for row in rows] == [
        ("app", name, owner.name) for name in ("ampd_schema_migrations", "four", "one", "three", "two")
    ]


async def test_a_connection_that_cannot_be_cleaned_is_not_given_back(database: Database) -> None:
    """What a file has set with a role that is gone again, and we may not take back, goes with its connection."""
    role = await database.role("migrator", "CREATE, USAGE ON SCHEMA public")
    powerful = f"{database.name}_powerful"
    await database.execute(f"CREATE ROLE {powerful} SUPERUSER; GRANT {powerful} TO {role.name}")
    wild = f"-- no-transaction\nSET ROLE {powerful}; SET session_replication_role = replica; CREATE TABLE t ()"
    async with asyncpg.create_pool(role.url, min_size=2, max_size=2) as pool:
        await ampd.migrate(pool, migrations=[migration(1, "wild", wild)])
        assert (
            await on_each(pool, "SELECT current_user::text, current_setting('session_replication_role')")
            == [[(role.name, "origin")]] * 2
        )


async def test_a_statement_timeout_of_the_file_does_not_end_the_cleaning(database: Database) -> None:
    """However short the file wants its statements, what it has set is taken back, after an error too."""
    many = "DO $$BEGIN FOR i IN 1..300 LOOP EXECUTE 'CREATE TEMP TABLE t' || i || ' ()'; END LOOP; END$$"
    short = f"-- no-transaction\n{many}; SET work_mem = '123kB'; SET statement_timeout = '1ms'; SELECT pg_sleep(600)"
    async with lent_pool(database) as pool:
        before = await on_each(pool, "SELECT pg_backend_pid()")
        with pytest.raises(ampd.MigrationFailed, match="statement timeout"):
            await ampd.migrate(pool, migrations=[migration(1, "short", short)])
        facts = "SELECT current_setting('work_mem'), current_setting('statement_timeout')"
        assert await on_each(pool, facts) == [[("4MB", "0")]] * 2
        assert sorted(await on_each(pool, "SELECT pg_backend_pid()")) == sorted(before)


OPENED = "hint: pass a pool that has been opened, and is closed after the run"


async def test_a_pool_that_is_not_open(database: Database) -> None:
    """A pool that was not opened, or is closed, is a mistake of the caller's and told as one."""
    pool = asyncpg.create_pool(database.url, min_size=1, max_size=1)
    with pytest.raises(ampd.ConfigError) as unopened:
        await ampd.migrate(pool, migrations=[ONE])
    assert str(unopened.value) == f"the pool is not initialized\n{OPENED}"
    await (await pool).close()
    for run in (ampd.migrate, ampd.status):
        with pytest.raises(ampd.ConfigError) as closed:
            await run(pool, migrations=[ONE])
        assert str(closed.value) == f"the pool is closed\n{OPENED}"
    assert await tables(database) == []


async def test_a_pool_of_another_event_loop(database: Database) -> None:
    """A pool that was opened in another event loop is refused, and not waited for."""
    loop = asyncio.new_event_loop()
    try:
        make = asyncpg.create_pool(database.url, min_size=1, max_size=1, loop=loop)
        pool = await anyio.to_thread.run_sync(loop.run_until_complete, make)
        with pytest.raises(ampd.ConfigError) as refused:
            await ampd.migrate(pool, migrations=[ONE])
        assert str(refused.value) == (
            "the pool belongs to another event loop\nhint: open the pool in the loop that migrates"
        )
        await anyio.to_thread.run_sync(loop.run_until_complete, pool.close())
    finally:
        loop.close()


async def test_what_is_no_database(database: Database) -> None:
    """A connection, or whatever else is neither a URL nor a pool nor a configuration, is named and refused."""
    kinds = "the database is a PostgreSQL URL, an asyncpg.Pool or the metadata_db section of a configuration, not "
    async with database.connect() as connection, lent_pool(database) as pool, pool.acquire() as lent:
        for source, kind in ((connection, "Connection"), (lent, "PoolConnectionProxy"), (None, "NoneType")):
            for run in (ampd.migrate, ampd.status):
                with pytest.raises(TypeError) as refused:
                    await run(source, migrations=[ONE])
                assert str(refused.value) == kinds + kind
    with pytest.raises(TypeError) as refused:
        async with ampd.open_pool(ampd.Config()):  # type: ignore[arg-type]
            pass
    assert str(refused.value) == "open_pool takes the metadata_db section of a configuration, not Config"
    with pytest.raises(TypeError, match="a database URL is a str, not bytes"):
        ampd.DatabaseUrl(b"postgresql://h/d")  # type: ignore[arg-type]
