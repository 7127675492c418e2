"""One PostgreSQL server for the whole run, a fresh database for each test that asks for one, and the command line."""

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import msgspec
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from ampd import DatabaseUrl, MetadataDb, Migration, Migrations
from ampd.local_server.server import local_server
from tests.folders import TWO, memory, write
from tests.servers import AdminSession, Ampd, Database, Role, Server, copy_cluster, server_of

SETTINGS = {
    "max_connections": "300",
    "max_prepared_transactions": "10",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "jit": "off",
    "max_wal_size": "256MB",
    "checkpoint_timeout": "1h",
}
PLUGIN = [] if entry_points(group="pytest11", name="ampd") else ["ampd.testing.plugin"]  # where it is not installed
pytest_plugins = PLUGIN
_SERVER = pytest.StashKey[Server]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let runs on other servers leave out what one run has told already."""
    parser.addoption("--other-server", action="store_true", help="leave out what no version of PostgreSQL changes")
    parser.addoption("--other-version", action="store_true", help="leave out what no version of anything changes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave them out."""

    def is_wanted(item: pytest.Item) -> bool:
        asks_server = "server" in getattr(item, "fixturenames", ())
        depends_on_server = asks_server and item.get_closest_marker("any_server") is None
        return item.get_closest_marker("one_version") is None and (
            depends_on_server or (not asks_server and not config.getoption("--other-server"))
        )

    if config.getoption("--other-server") or config.getoption("--other-version"):
        items[:] = filter(is_wanted, items)


def pytest_collection_finish() -> None:
    """Search what has been collected for garbage no more: it is much, and stays to the end."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Use more processes than there are cores: many tests wait for a lock or a deadline."""
    cores = os.cpu_count() or 1
    return cores + min(cores, 4)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Start the server once, in pytest-xdist's controller, and tell each worker where it is."""
    node.workerinput["server"] = msgspec.to_builtins(_server(node.config))


def _server(config: pytest.Config) -> Server:
    if hasattr(config, "workerinput"):
        return msgspec.convert(config.workerinput["server"], Server)
    if _SERVER not in config.stash:
        stack = ExitStack()
        config.add_cleanup(stack.close)
        config.stash[_SERVER] = start_server(stack)
    return config.stash[_SERVER]


def start_server(stack: ExitStack) -> Server:
    """Start a server that ends with the stack; AMPD_TEST_BINDIR says which PostgreSQL."""
    folder = Path(tempfile.mkdtemp(prefix="ampd-tests-", dir=memory()))
    stack.callback(shutil.rmtree, folder)
    folder.chmod(0o711)
    bindir = os.environ.get("AMPD_TEST_BINDIR")
    run = partial(local_server, bindir=Path(bindir) if bindir else None, tcp=True, settings=SETTINGS)
    portal = stack.enter_context(start_blocking_portal())
    with portal.wrap_async_context_manager(run(folder / "cluster")):
        pass
    for file in (*folder.glob("cluster/base/*/*_fsm"), *folder.glob("cluster/base/*/*_vm")):
        file.unlink()  # a quarter of the files of each database to come; a server does without, and makes them anew
    copy_cluster(folder / "cluster", folder / "db")
    local = stack.enter_context(portal.wrap_async_context_manager(run(folder / "db")))
    return server_of(local, str(folder / "cluster"))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Asyncio is the one event loop that asyncpg runs on."""
    return "asyncio"


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Server:
    """The run's PostgreSQL server."""
    return _server(request.config)


@pytest.fixture(scope="session")
def portal() -> Iterator[BlockingPortal]:
    """An event loop in a thread, for what lives longer than a test."""
    with start_blocking_portal() as portal:
        yield portal


@pytest.fixture(scope="session")
def admin(server: Server, portal: BlockingPortal) -> Iterator[AdminSession]:
    """A superuser's session for what concerns no single database."""
    session = AdminSession(portal, server.url())
    with session.open():
        yield session


@pytest.fixture(scope="session")
def ampd_server_url(server: Server) -> str:
    """The same server, for the plugin that makes databases."""
    return server.url()


@pytest.fixture
def named_roles(admin: AdminSession) -> Iterator[list[str]]:
    """Beginnings of names: such roles are dropped when the test's databases, where they own things, are gone."""
    beginnings: list[str] = []
    yield beginnings
    for beginning in beginnings:
        for role in admin.run("fetch", "SELECT rolname FROM pg_roles WHERE starts_with(rolname, $1)", beginning):
            admin.run("execute", f"DROP ROLE {role['rolname']}")


@pytest.fixture
def database(server: Server, portal: BlockingPortal, named_roles: list[str], ampd_empty_url: str) -> Iterator[Database]:
    """A fresh, empty database, dropped after the test together with the roles that are named after it."""
    fresh = Database(server, DatabaseUrl(ampd_empty_url).database_or_default)
    named_roles.append(f"{fresh.name}_")
    with AdminSession(portal, fresh.url).open():
        yield fresh


@pytest.fixture
async def reader(database: Database) -> Role:
    """A role that may SELECT from whatever the superuser makes in the schema public, and do nothing else there."""
    role = await database.role("reader", "SELECT ON ALL TABLES IN SCHEMA public")
    await database.execute(
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO {role.name};"
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC"
    )
    return role


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that every user may enter, as pytest's own are not: root runs a server as somebody else."""
    with tempfile.TemporaryDirectory(prefix="ampd-tests-", dir=memory()) as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def ampd(tmp_path: Path) -> Ampd:
    """The command line, run in a folder of the test's own."""
    return Ampd(tmp_path)


@pytest.fixture
async def stranger(database: Database) -> Role:
    """A role without privileges but for CREATE on public, where every other role looks first."""
    role = await database.role("stranger", "USAGE, CREATE ON SCHEMA public")
    await database.execute(
        "CREATE SCHEMA evidence; CREATE TABLE evidence.traps (by name, what text);"
        "GRANT USAGE ON SCHEMA evidence TO PUBLIC; GRANT INSERT ON evidence.traps TO PUBLIC;"
        f"ALTER DATABASE {database.name} SET search_path = public, pg_catalog"
    )
    return role


@pytest.fixture
def configured(database: Database, tmp_path: Path) -> Callable[..., MetadataDb]:
    """A function from migrations and keys to the configuration of a service that has these."""

    def configure(*migrations: Migration, url: str = database.url, **keys: Any) -> MetadataDb:
        folder = tmp_path / "migrations"
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        for each in migrations:
            (folder / each.file).write_text(each.sql)
        files = Migrations(dir=folder, connect_wait_secs=0)
        return MetadataDb(url=DatabaseUrl(url), migrations=files, **keys)

    return configure


@pytest.fixture(scope="module")
def bare_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No settings of whoever runs the tests, and none in their home."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PGHOST", "PGPORT", "PGUSER", "PGDATABASE", "PGPASSWORD", "PGSERVICE", "PGSSLMODE", "PGOPTIONS"):
            patch.delenv(name, raising=False)
        nowhere = tmp_path_factory.mktemp("home") / "none"
        for name in ("PGPASSFILE", "PGSERVICEFILE"):
            patch.setenv(name, str(nowhere))
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder `m` with two migrations, in the folder that the command runs in."""
    return write(tmp_path / "m", TWO)
