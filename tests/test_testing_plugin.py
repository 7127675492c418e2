"""The plugin of pytest's, in projects of its own."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ampd.testing.shared_server import folder_of, shared_server
from tests.conftest import PLUGIN
from tests.folders import write
from tests.scenes import GENEROUS
from tests.servers import Server

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.any_server

MIGRATIONS = {
    "1_accounts.sql": "CREATE TABLE accounts (email text)",
    "2_accounts_email.sql": "-- no-transaction\nCREATE UNIQUE INDEX CONCURRENTLY accounts_email ON accounts (email)",
}
INI = "[pytest]\nampd_migrations = migrations\nfilterwarnings = error\n"


@pytest.fixture
def project(pytester: pytest.Pytester, server: Server, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with two migrations, on the server of this run."""
    pytester.plugins = [*PLUGIN]
    monkeypatch.setenv("AMPD_TEST_URL", server.url())
    pytester.makefile(".ini", pytest=INI)
    write(pytester.path / "migrations", MIGRATIONS)
    return pytester


def run(project: pytest.Pytester, *arguments: str, without: str = "asyncio", **outcomes: int) -> str:
    """Run the project's tests in this process, without a plugin, and return what pytest has printed."""
    result = project.runpytest_inprocess("-p", "no:cacheprovider", "-p", f"no:{without}", *arguments)
    result.assert_outcomes(**outcomes)
    return str(result.stdout)


def test_each_test_has_a_migrated_database_of_its_own(project: pytest.Pytester) -> None:
    """In tests that anyio runs: a pool, a connection, fixtures on top of them; and a URL in ordinary tests."""
    project.makepyfile(
        """
        import asyncio, asyncpg, pytest

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.fixture
        async def app(ampd_pool):
            await ampd_pool.execute("INSERT INTO accounts VALUES ('a')")
            return ampd_pool

        @pytest.mark.anyio
        @pytest.mark.parametrize("time", [1, 2])
        async def test_async(app, ampd_connection, time):
            assert isinstance(app, asyncpg.Pool)
            assert isinstance(ampd_connection, asyncpg.Connection)
            assert await ampd_connection.fetch("SELECT * FROM accounts") == [("a",)]

        async def tables(url):
            connection = await asyncpg.connect(url)
            found = await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
            await connection.close()
            return found

        def test_ordinary(ampd_url, ampd_empty_url):
            assert asyncio.run(tables(ampd_url)) == 2
            assert asyncio.run(tables(ampd_empty_url)) == 0
        """
    )
    run(project, passed=3)


def test_pytest_asyncio_runs_the_fixtures_in_the_loop_of_the_test(project: pytest.Pytester) -> None:
    """In its strict mode, and whichever scope that loop has."""
    pytest.importorskip("pytest_asyncio", reason="NOT TESTED, no pytest-asyncio")
    project.makefile(".ini", pytest=f"{INI}asyncio_default_fixture_loop_scope = function\n")
    project.makepyfile(
        """
        import pytest, pytest_asyncio

        @pytest_asyncio.fixture
        async def app(ampd_pool):
            return ampd_pool

        @pytest.mark.asyncio
        async def test_default(app, ampd_connection):
            await app.execute("INSERT INTO accounts VALUES ('a')")
            assert await ampd_connection.fetch("SELECT * FROM accounts") == [("a",)]

        @pytest.mark.asyncio(loop_scope="module")
        async def test_module(ampd_pool):
            assert await ampd_pool.fetch("SELECT * FROM accounts") == []

        @pytest.mark.anyio
        @pytest.mark.parametrize("anyio_backend", ["asyncio"])
        async def test_both_in_one_project(ampd_pool):
            assert await ampd_pool.fetch("SELECT * FROM accounts") == []
        """
    )
    run(project, without="xdist", passed=3)
    project.makepyfile(
        """
        import pytest

        @pytest.fixture
        async def app(ampd_pool):
            return ampd_pool

        async def test_unmarked(app, ampd_connection):
            assert await app.fetch("SELECT * FROM accounts") == []
        """
    )
    run(project, "-o", "asyncio_mode=auto", without="xdist", passed=1)


def test_a_project_may_define_its_migrations(project: pytest.Pytester) -> None:
    """By a fixture of its own; and their schema and history in its configuration."""
    project.makefile(".ini", pytest=f"{INI}ampd_schema = shop\nampd_table = shop_history\n")
    project.makepyfile(
        """
        import ampd, pytest

        @pytest.fixture(scope="session")
        def ampd_migrations():
            return ampd.read_migrations("migrations")[:1]

        @pytest.mark.anyio
        @pytest.mark.parametrize("anyio_backend", ["asyncio"])
        async def test_it(ampd_pool, ampd_connection):
            for client in ampd_pool, ampd_connection:
                assert await client.fetchval("SELECT 'accounts'::regclass::oid::regclass::text") == "accounts"
                assert await client.fetchval("SELECT count(*) FROM shop.shop_history") == 1
        """
    )
    run(project, passed=1)


def test_folders_are_taken_together(project: pytest.Pytester) -> None:
    """In the order of their versions, whichever folder they come from."""
    write(project.path / "seed", {"3_seed.sql": "INSERT INTO accounts VALUES ('a')"})
    project.makepyfile(
        """
        def test_it(ampd_migrations):
            assert [each.version for each in ampd_migrations] == [1, 2, 3]
        """
    )
    run(project, "-o", "ampd_migrations=seed migrations", passed=1)


def test_what_is_wrong_is_said_without_a_traceback(project: pytest.Pytester) -> None:
    """A test that nothing runs in a loop, a migration that fails, a folder that is not there, a server that is not."""
    project.makepyfile("def test_it(ampd_pool): pass")
    assert "ampd_pool needs an event loop: mark the test" in run(project, errors=1)
    project.makepyfile("def test_it(ampd_url): pass")
    (project.path / "migrations" / "3_x.sql").write_text("SELECT 1 / 0")
    told = run(project, errors=1)
    assert "3_x.sql:1: division by zero (SQLSTATE 22012)" in told
    assert "Traceback" not in told
    assert "ampd/testing" not in told
    assert "the migrations folder" in run(project, "-o", "ampd_migrations=nowhere", errors=1)
    project.makepyfile("def test_it(ampd_empty_url): pass")
    project._monkeypatch.setenv("AMPD_TEST_URL", "postgresql://x:secret@127.0.0.1:1/d?connect_timeout=1")
    told = run(project, errors=1)
    assert "127.0.0.1:1/d" in told
    assert "secret" not in told


def test_it_costs_nothing_where_it_is_not_used() -> None:
    """pytest loads the module in every run of the environment: beyond pytest it imports nothing but itself."""
    program = (
        "import sys, pytest; before = set(sys.modules); import ampd.testing.plugin; "
        "print(*sorted(set(sys.modules) - before))"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout == "ampd ampd.testing ampd.testing.plugin ampd.version\n"


@pytest.mark.one_version
def test_a_managed_server_is_shared_and_ends_with_its_last_user(tmp_path: Path) -> None:
    """Whoever comes second finds the same one; afterwards neither it nor its folder is there."""
    project, folder = str(tmp_path), folder_of(str(tmp_path))
    with shared_server(project) as first:
        with shared_server(project) as second:
            assert first == second
        assert (folder / "db" / "postmaster.pid").exists()
    give_up = time.monotonic() + GENEROUS
    while folder.exists():
        assert time.monotonic() < give_up
        time.sleep(0.01)
