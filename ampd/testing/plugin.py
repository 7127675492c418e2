"""The plugin of pytest's: a migrated database for each test that asks for one.

pytest loads this module in every environment that has ampd, whether or not a test uses it. So it imports nothing that
pytest has not imported by then; the server, the driver and ampd itself come with the first fixture.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from ampd.database_url import DatabaseUrl
    from ampd.migration import Migration

    from .databases import Template

_ASYNCIO = "ampd-asyncio"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what a project says of its migrations."""
    parser.addini("ampd_migrations", "folders of the migrations that test databases have", type="paths")
    parser.addini("ampd_schema", "the schema that they are applied in, as metadata_db.schema", default=None)
    parser.addini("ampd_table", "the name of their history, as metadata_db.migrations.table", default=None)


def pytest_configure(config: pytest.Config) -> None:
    """Make pool and connection fixtures for pytest-asyncio, if that is there."""
    if config.pluginmanager.hasplugin("asyncio") and (fixtures := _asyncio_fixtures()):
        config.pluginmanager.register(fixtures, _ASYNCIO)


@pytest.fixture(scope="session")
def ampd_migrations(pytestconfig: pytest.Config) -> tuple[Migration, ...]:
    """The migrations of test databases: those of the folders `ampd_migrations`, else those packaged with ampd.

    Define a fixture of this name to have others.
    """
    from ampd import read_migrations

    folders: list[Path] = pytestconfig.getini("ampd_migrations")
    with _reported():
        if not folders:
            return read_migrations()
        files = [migration for folder in folders for migration in read_migrations(folder)]
        return tuple(sorted(files, key=lambda migration: migration.version))


@pytest.fixture(scope="session")
def ampd_server_url(pytestconfig: pytest.Config) -> Iterator[str]:
    """The URL of a server for tests: AMPD_TEST_URL, else of a managed one that ends with the last run that uses it."""
    if url := os.environ.get("AMPD_TEST_URL"):
        yield url
        return
    from .shared_server import shared_server

    with _entered(shared_server(str(pytestconfig.rootpath))) as url:
        yield url


class _Databases(NamedTuple):
    """What the fixtures do with databases, each blocking until it is done."""

    copy: Callable[[Template], DatabaseUrl]
    drop: Callable[[str], None]


@pytest.fixture(scope="session")
def _ampd_databases(ampd_server_url: str) -> Iterator[_Databases]:
    from anyio.from_thread import start_blocking_portal

    from ampd.database_url import DatabaseUrl

    from .databases import fresh_databases

    with start_blocking_portal() as portal:  # in a thread: the loop of the tests is theirs
        with _reported():
            url = DatabaseUrl(ampd_server_url)
        with _entered(portal.wrap_async_context_manager(fresh_databases(url))) as databases:
            yield _Databases(
                lambda template: portal.call(databases.copy, template), lambda name: portal.call(databases.drop, name)
            )


@pytest.fixture
def ampd_empty_url(_ampd_databases: _Databases, pytestconfig: pytest.Config) -> Iterator[str]:
    """The URL of an empty database of the test's own."""
    from .databases import Template

    yield from _fresh(_ampd_databases, Template(str(pytestconfig.rootpath)))


@pytest.fixture
def ampd_url(
    _ampd_databases: _Databases, pytestconfig: pytest.Config, ampd_migrations: tuple[Migration, ...]
) -> Iterator[str]:
    """The URL of a database of the test's own, which has all migrations."""
    from .databases import Template

    schema, table = pytestconfig.getini("ampd_schema"), pytestconfig.getini("ampd_table")
    yield from _fresh(_ampd_databases, Template(str(pytestconfig.rootpath), tuple(ampd_migrations), schema, table))


def _fresh(databases: _Databases, template: Template) -> Iterator[str]:
    with _reported():
        url = databases.copy(template)
    yield url.reveal()
    databases.drop(url.database_or_default)


def _opening(kind: str) -> Callable[..., AsyncIterator[Any]]:
    """Return a new function for a fixture: pytest-asyncio marks the function that it is given."""

    async def opened(ampd_url: str, pytestconfig: pytest.Config) -> AsyncIterator[Any]:
        from . import clients

        opening = clients.opened_pool if kind == "pool" else clients.opened_connection
        async with opening(ampd_url, pytestconfig.getini("ampd_schema")) as client:
            yield client

    return opened


# Which of these a test gets, depends on what runs it.
_ampd_pool_anyio = pytest.fixture(_opening("pool"), name="_ampd_pool_anyio")
_ampd_connection_anyio = pytest.fixture(_opening("connection"), name="_ampd_connection_anyio")


def _asyncio_fixtures() -> ModuleType | None:
    """Return the same fixtures for pytest-asyncio, in each of the loops that a test may have; None if it is too old."""
    import pytest_asyncio

    if "loop_scope" not in signature(pytest_asyncio.fixture).parameters:
        return None
    fixtures = ModuleType("ampd_asyncio")
    for scope in ("function", "class", "module", "package", "session"):
        for kind in ("pool", "connection"):
            name = f"_ampd_{kind}_asyncio_{scope}"
            setattr(fixtures, name, pytest_asyncio.fixture(_opening(kind), loop_scope=scope, name=name))
    return fixtures


@pytest.fixture
def ampd_pool(request: pytest.FixtureRequest) -> Any:
    """A pool (`asyncpg.Pool`) on the database of `ampd_url`."""
    return _in_loop(request, "pool")


@pytest.fixture
def ampd_connection(request: pytest.FixtureRequest) -> Any:
    """A connection (`asyncpg.Connection`) to the database of `ampd_url`."""
    return _in_loop(request, "connection")


def _in_loop(request: pytest.FixtureRequest, kind: str) -> Any:
    """Return the fixture that runs in the test's event loop: async fixtures belong to the plugin that runs the test."""
    if "anyio_backend" in request.fixturenames:
        return request.getfixturevalue(f"_ampd_{kind}_anyio")
    if not request.config.pluginmanager.hasplugin(_ASYNCIO):
        pytest.fail(
            f"ampd_{kind} needs an event loop: mark the test with pytest.mark.anyio, install pytest-asyncio "
            "(0.24 or newer), or take ampd_url",
            pytrace=False,
        )
    marker = request.node.get_closest_marker("asyncio")
    given = marker.kwargs.get("loop_scope") if marker else None
    scope = given or request.config.getini("asyncio_default_test_loop_scope") or "function"
    return request.getfixturevalue(f"_ampd_{kind}_asyncio_{scope}")


@contextmanager
def _reported() -> Iterator[None]:
    """Report an error of ampd's as it is meant for people, without a traceback."""
    from ampd.errors import AmpdError

    problem = None
    try:
        yield
    except AmpdError as error:
        problem = str(error)
    if problem is not None:  # beyond the block: what has led to it would be shown as well
        pytest.fail(problem, pytrace=False)


@contextmanager
def _entered(manager: Any) -> Iterator[Any]:
    """Enter a context manager, whose errors of entering are reported so."""
    with _reported():
        value = manager.__enter__()
    try:
        yield value
    finally:
        manager.__exit__(None, None, None)
