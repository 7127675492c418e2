"""Databases for tests: templates, copies, and what killed processes have left."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from secrets import randbelow

import anyio
import asyncpg
import pytest

from ampd import AmpdError, DatabaseUrl, MigrationFailed, PermissionDenied
from ampd.testing.databases import FreshDatabases, Template, fresh_databases, left_over, unused
from tests.scenes import end_backend, scripts
from tests.servers import Database

pytestmark = pytest.mark.anyio


def template_of(database: Database, *texts: str) -> Template:
    """Return a template of a project that is named after the test's database."""
    return Template(database.name, scripts(*texts or ("CREATE TABLE t (id int)",)))


async def names(database: Database, beginning: str) -> list[str]:
    """Return the databases of the server whose names begin so."""
    rows = await database.fetch("SELECT datname FROM pg_database WHERE starts_with(datname, $1) ORDER BY 1", beginning)
    return [row["datname"] for row in rows]


async def tables(url: DatabaseUrl) -> list[str]:
    """Return the tables in a database."""
    connection = await asyncpg.connect(url.reveal())
    try:
        rows = await connection.fetch("SELECT relname FROM pg_class WHERE relkind = 'r' AND oid >= 16384 ORDER BY 1")
        return [row["relname"] for row in rows]
    finally:
        await connection.close()


@pytest.fixture
async def opened(database: Database) -> AsyncIterator[FreshDatabases]:
    """The test databases of a process, whose templates are dropped after the test."""
    async with fresh_databases(DatabaseUrl(database.url)) as databases:
        yield databases
    for name in await names(database, Template(database.name).prefix):
        await database.execute(f"DROP DATABASE {name}")


@asynccontextmanager
async def killed(database: Database, template: Template) -> AsyncIterator[str]:
    """Yield the name of a copy whose process is gone."""
    abandoned = fresh_databases(DatabaseUrl(database.url))
    databases = await abandoned.__aenter__()
    url = await databases.copy(template)
    pid = databases._session.server_pid
    databases._standing.clear()
    await end_backend(database, pid)
    await abandoned.__aexit__(None, None, None)
    assert url.database is not None
    yield url.database


def test_a_database_belongs_to_the_process_in_its_name() -> None:
    """Left over is what has the form of our names, and the id of nobody who lives."""
    ours = ["ampd_test_0000000a_1", "ampd_test_0000000b_22"]
    others = [
        "ampd_test_a_1",
        "ampd_test_0000000a",
        "ampd_test_0000000a_1_",
        "ampd_test_8000000a_1",
        "shop",
        "AMPD_TEST",
    ]
    assert left_over([*ours, *others], []) == ours
    assert left_over([*ours, *others], [10]) == ours[1:]


def test_a_template_is_named_after_what_is_in_it() -> None:
    """Equal files in the same place have the same template; anything else has another one, of the same project."""
    one = Template("p", scripts("SELECT 1"))
    assert one.name == Template("p", scripts("SELECT 1")).name
    different = [
        Template("p", scripts("SELECT 2")),
        Template("p", scripts("SELECT 1", "SELECT 2")),
        Template("p", scripts("SELECT 1"), schema="s"),
        Template("p", scripts("SELECT 1"), table="s"),
        Template("p"),
    ]
    assert len({each.name for each in (one, *different)}) == 6
    assert {each.prefix for each in different} == {one.prefix}
    assert not Template("q").name.startswith(one.prefix)
    assert unused([each.name for each in different], different[0].name, []) == [each.name for each in different[1:]]


async def test_each_copy_is_migrated_and_apart(database: Database, opened: FreshDatabases) -> None:
    """A copy has the tables and the history; what is done in one is in no other; a template without files is empty."""
    first, second = await opened.copy(template_of(database)), await opened.copy(template_of(database))
    assert first != second
    assert await tables(first) == await tables(second) == ["ampd_schema_migrations", "t"]
    assert await tables(await opened.copy(Template(database.name))) == []
    connection = await asyncpg.connect(first.reveal())
    await opened.drop(first.database or "")  # whoever is connected
    assert connection.is_closed() or await names(database, first.database or "") == []


@pytest.mark.usefixtures("opened")
async def test_processes_at_the_same_time_make_one_template(database: Database) -> None:
    """One makes it, and the others wait for it."""
    found = []

    async def work() -> None:
        async with fresh_databases(DatabaseUrl(database.url)) as databases:
            found.append(await tables(await databases.copy(template_of(database))))

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(work)
    assert found == [["ampd_schema_migrations", "t"]] * 4
    assert await names(database, Template(database.name).prefix) == [template_of(database).name]


async def test_what_a_killed_process_has_left_is_dropped(database: Database, opened: FreshDatabases) -> None:
    """Its databases are gone with the next process; a living one's, and everybody else's, stay."""
    role = await database.role("other", password="x")
    alive = await opened.copy(template_of(database))
    strangers = f"ampd_test_00000001_{randbelow(10**12)}"
    await database.execute(f"CREATE DATABASE {strangers} OWNER {role.name}")
    async with killed(database, template_of(database)) as dead:
        assert await names(database, dead) == [dead]
        async with fresh_databases(DatabaseUrl(database.url)):
            assert await names(database, dead) == []
            assert await names(database, alive.database or "") == [alive.database]
            assert await names(database, strangers) == [strangers]
    await database.execute(f"DROP DATABASE {strangers}")


@pytest.mark.any_server
@pytest.mark.usefixtures("opened")
async def test_a_leftover_that_somebody_uses_stays(database: Database) -> None:
    """Nothing is dropped under a session, whoever's it is."""
    async with killed(database, template_of(database)) as dead:
        connection = await asyncpg.connect(database.server.url(dead))
        async with fresh_databases(DatabaseUrl(database.url)):
            assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
        await database.execute(f"DROP DATABASE IF EXISTS {dead} WITH (FORCE)")


@pytest.mark.any_server
async def test_a_template_that_is_no_longer_used_is_dropped(database: Database, opened: FreshDatabases) -> None:
    """Changed files make a new template, and drop the project's others but for those that a process uses."""
    old, new, newest = (template_of(database, text) for text in ("SELECT 1", "SELECT 2", "SELECT 3"))
    async with fresh_databases(DatabaseUrl(database.url)) as first:
        await first.copy(old)
        await opened.copy(new)
        assert await names(database, old.prefix) == sorted([old.name, new.name])
    await opened.copy(newest)
    assert await names(database, old.prefix) == sorted([new.name, newest.name])


@pytest.mark.any_server
async def test_a_template_that_was_dropped_is_made_again(database: Database, opened: FreshDatabases) -> None:
    """Whoever drops it, the next copy has all migrations."""
    await opened.copy(template_of(database))
    await database.execute(f"DROP DATABASE {template_of(database).name}")
    assert await tables(await opened.copy(template_of(database))) == ["ampd_schema_migrations", "t"]


async def test_a_session_that_the_server_has_ended_is_opened_again(database: Database, opened: FreshDatabases) -> None:
    """The process keeps its id, and so its databases."""
    before = await opened.copy(template_of(database))
    await end_backend(database, opened._session.server_pid)
    after = await opened.copy(template_of(database))
    async with fresh_databases(DatabaseUrl(database.url)):
        assert await names(database, before.database or "") == [before.database]
    assert (before.database or "").rpartition("_")[0] == (after.database or "").rpartition("_")[0]


async def test_a_migration_that_fails_leaves_nothing(database: Database, opened: FreshDatabases) -> None:
    """Its error is the one of `migrate`; neither a template nor a database is there afterwards."""
    with pytest.raises(MigrationFailed, match=r"1_step\.sql:1: division by zero"):
        await opened.copy(template_of(database, "SELECT 1 / 0"))
    assert await names(database, Template(database.name).prefix) == []
    assert opened._standing == []


async def test_a_role_that_may_not_create_databases_is_told(database: Database) -> None:
    """The hint has the statement that helps."""
    role = await database.role("poor")
    async with fresh_databases(DatabaseUrl(role.url)) as databases:
        with pytest.raises(PermissionDenied, match="permission denied to create database") as raised:
            await databases.copy(Template(database.name))
    assert raised.value.hint == f'ALTER ROLE "{role.name}" CREATEDB'


async def test_a_template_of_another_owner_is_not_copied(database: Database, opened: FreshDatabases) -> None:
    """Its name can be computed, and whatever a stranger has put in it would run with the rights of the tests."""
    template, eve = template_of(database), await database.role("eve")
    await database.execute(f"CREATE DATABASE {template.name} OWNER {eve.name} IS_TEMPLATE true")
    with pytest.raises(AmpdError) as refused:
        await opened.copy(template)
    assert refused.value.message == f'database "{template.name}" already exists'
    assert opened._standing == []
    await database.execute(f"ALTER DATABASE {template.name} IS_TEMPLATE false")


async def test_a_role_whose_name_needs_quotes(database: Database) -> None:
    """It is taken for no other role: what belongs to one whose name differs in case alone stays."""
    name = f"{database.name}_Odd-role"
    await database.execute(f'CREATE ROLE "{name}" LOGIN CREATEDB')
    try:
        async with fresh_databases(DatabaseUrl(database.server.url(database.name, name))) as databases:
            assert await tables(await databases.copy(template_of(database))) == ["ampd_schema_migrations", "t"]
    finally:
        await database.execute(f"DROP DATABASE IF EXISTS {template_of(database).name}")
        await database.execute(f'DROP ROLE "{name}"')
