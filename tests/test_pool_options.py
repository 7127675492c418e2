"""The driver's options of `open_pool`: which are taken, and what each refusal says."""

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

import ampd
from tests.pools import ONE, tables
from tests.servers import Database

pytestmark = [pytest.mark.anyio, pytest.mark.any_server]


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
