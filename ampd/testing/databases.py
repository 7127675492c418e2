"""Databases for tests: a migrated template, made once, and a copy of it for each test.

A database's name says whose it is. `ampd_test_ID_NUMBER` belongs to the process that holds the advisory lock ID, which
the server frees when that process is gone, however it ended: then the database is a leftover, and whoever comes next
drops it. `ampd_template_PROJECT_KEY` is a template, of a project and of what was migrated into it. Other names, and
databases of other owners, are never touched.

A template is made as a test's database and renamed when it is done, so that a killed run leaves none that is half made.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from hashlib import sha256
from itertools import count
from secrets import randbelow
from typing import TypeVar

import msgspec

from ampd import sqlstates
from ampd.config import Limits
from ampd.database_url import DatabaseUrl
from ampd.errors import ConnectionFailed, PermissionDenied
from ampd.migration import Migration
from ampd.migrator import migrate
from ampd.postgres.connection import Session
from ampd.postgres.database import Database
from ampd.postgres.failures import translated_error
from ampd.postgres.quoting import do_block, identifier
from ampd.postgres.server_error import ServerError
from ampd.redaction import Hidden

T = TypeVar("T")

_CONNECT_SECS = 10.0

# The first of the two numbers of an advisory lock; the letters are "ampd" but for the last.
_LIVES, _MAKES, _USES = 0x616D7001, 0x616D7002, 0x616D7003
_TEST = re.compile(r"ampd_test_([0-7][0-9a-f]{7})_[0-9]+")
_LARGEST_NUMBER = 2**31


class Template(msgspec.Struct, frozen=True):
    """What is migrated into a template; nothing for an empty database."""

    project: str
    migrations: tuple[Migration, ...] = ()
    schema: str | None = None
    table: str | None = None

    @property
    def prefix(self) -> str:
        """Return how the names of the project's templates begin."""
        return f"ampd_template_{sha256(self.project.encode()).hexdigest()[:8]}_"

    @property
    def name(self) -> str:
        """Return its name: equal for equal files in the same place."""
        files = [(each.version, each.name, each.checksum) for each in self.migrations]
        return self.prefix + sha256(msgspec.json.encode((files, self.schema, self.table))).hexdigest()[:16]


def left_over(databases: Iterable[str], living: Iterable[int]) -> list[str]:
    """Return the databases of processes that are gone."""
    alive = {f"{number:08x}" for number in living}
    return [name for name in databases if (made := _TEST.fullmatch(name)) and made[1] not in alive]


def unused(templates: Iterable[str], kept: str, used: Iterable[int]) -> list[str]:
    """Return a project's templates that no process uses, but for the one that is kept."""
    in_use = set(used)
    return [name for name in templates if name != kept and _number(name) not in in_use]


def _number(name: str) -> int:
    """Return the number of an advisory lock for a template."""
    return int.from_bytes(sha256(name.encode()).digest()[:4], "big") % _LARGEST_NUMBER


@asynccontextmanager
async def fresh_databases(url: DatabaseUrl) -> AsyncIterator[FreshDatabases]:
    """Yield the test databases of this process on a server, after dropping those of processes that are gone.

    `url` leads to any database of the server; the role must be able to create databases.

    Raises:
        AmpdError: the server cannot be reached.
    """
    async with Database(Hidden(url), connect_wait_secs=1).second_session(_CONNECT_SECS) as session:
        databases = FreshDatabases(url, session)
        await databases.begin()
        try:
            yield databases
        finally:
            await databases.end()


class FreshDatabases:
    """The databases that one process makes for its tests, through a session that says that it lives."""

    def __init__(self, url: DatabaseUrl, session: Session) -> None:
        self._url = url
        self._session = session
        self._id = 0
        self._numbers = count(1)
        self._standing: list[str] = []
        self._used: set[str] = set()
        self._strategy = ""

    async def begin(self) -> None:
        """Take an id that no other process has, and drop what others have left."""
        await self._take_id()
        version, fsync = await self._ask(
            "json_build_array(current_setting('server_version_num')::int4, current_setting('fsync'))", tuple[int, str]
        )
        # A copy of files begins and ends with a checkpoint: cheap where nothing is synced, and where it is a burden on
        # all who use the server.
        self._strategy = " STRATEGY file_copy" if version >= 150000 and fsync == "off" else ""
        for name in left_over(await self._databases("ampd_test_"), await self._numbers_of(_LIVES)):
            await self._drop_unused(name)

    async def end(self) -> None:
        """Drop what is still there."""
        for name in self._standing[:]:
            await self.drop(name)

    async def copy(self, template: Template) -> DatabaseUrl:
        """Return the URL of a new copy of a template, which is made if there is none yet.

        Raises:
            AmpdError: a migration failed, or the role may not create databases.
        """
        with _translated():
            if template.name not in self._used:  # before it is copied: whoever cleans up leaves alone what is in use
                await self._run(f"SELECT pg_catalog.pg_advisory_lock_shared({_USES}, {_number(template.name)})")
                if template.name not in await self._databases(template.name):  # or it is somebody else's
                    await self._make(template)
                self._used.add(template.name)
            try:
                return await self._create(template.name, self._strategy)
            except ServerError as error:
                if error.sqlstate != sqlstates.INVALID_CATALOG_NAME:
                    raise
            await self._make(template)
            return await self._create(template.name, self._strategy)

    async def drop(self, name: str) -> None:
        """Drop a database that this process has made, whoever is connected."""
        with _translated():
            await self._run(f"DROP DATABASE IF EXISTS {identifier(name)} WITH (FORCE)")
        self._standing.remove(name)

    async def _create(self, template: str, strategy: str = "") -> DatabaseUrl:
        url = DatabaseUrl(self._url.reveal())
        url.database = name = f"ampd_test_{self._id:08x}_{next(self._numbers)}"
        await self._run(f"CREATE DATABASE {identifier(name)} TEMPLATE {identifier(template)}{strategy}")
        self._standing.append(name)
        return url

    async def _make(self, template: Template) -> None:
        """Make a template, unless another process is at it or has made it."""
        lock = f"({_MAKES}, {_number(template.name)})"
        await self._run(f"SELECT pg_catalog.pg_advisory_lock{lock}")
        try:
            if template.name in await self._databases(template.name):
                return
            url = await self._create("template0")
            assert url.database is not None
            try:
                await self._fill(url, template)
                await self._run(f"ALTER DATABASE {identifier(url.database)} ALLOW_CONNECTIONS false")
                await self._run(f"ALTER DATABASE {identifier(url.database)} RENAME TO {identifier(template.name)}")
            except BaseException:
                with suppress(ServerError):
                    await self.drop(url.database)
                raise
            self._standing.remove(url.database)
            for name in unused(await self._databases(template.prefix), template.name, await self._numbers_of(_USES)):
                await self._drop_unused(name)
        finally:
            await self._run(f"SELECT pg_catalog.pg_advisory_unlock{lock}")

    async def _fill(self, url: DatabaseUrl, template: Template) -> None:
        if template.migrations:
            await migrate(
                url.reveal(),
                migrations=template.migrations,
                schema=template.schema,
                table=template.table,
                limits=Limits(connect_wait_secs=0),
            )
        # The first session after a change of the catalog writes the relation cache's file, which the copies get too.
        async with Database(Hidden(url)).second_session(_CONNECT_SECS) as session:
            await session.check_answers(_CONNECT_SECS)

    async def _drop_unused(self, name: str) -> None:
        with suppress(ServerError):  # somebody is connected after all, or another process was faster
            await self._run(f"DROP DATABASE IF EXISTS {identifier(name)}")

    async def _take_id(self) -> None:
        """Take the lock that says whose the databases are; after a loss of the session the same one."""
        await self._session.run("SET search_path = pg_catalog, pg_temp")
        while not (self._id and await self._ask(f"to_json(pg_try_advisory_lock({_LIVES}, {self._id}))", bool)):
            self._id = randbelow(_LARGEST_NUMBER)

    async def _databases(self, beginning: str) -> list[str]:
        """Return the databases of this role whose names begin so."""
        return await self._ask(
            "(SELECT coalesce(json_agg(datname), '[]') FROM pg_database d JOIN pg_roles r ON r.oid = datdba "
            f"WHERE rolname = current_user AND starts_with(datname, '{beginning}'))",
            list[str],
        )

    async def _numbers_of(self, kind: int) -> list[int]:
        """Return the numbers of the advisory locks of one kind, whichever database their sessions are in."""
        return await self._ask(
            "(SELECT coalesce(json_agg(objid::int8), '[]') FROM pg_locks "
            f"WHERE locktype = 'advisory' AND classid = {kind} AND objsubid = 2)",
            list[int],
        )

    async def _ask(self, expression: str, kind: type[T]) -> T:
        return await self._session.ask(do_block(f"BEGIN {self._session.note_sql(expression)} END"), kind)

    async def _run(self, statement: str) -> None:
        try:
            await self._session.run(statement)
        except ConnectionFailed:  # the server was restarted, say
            await self._session.reopen()
            self._used.clear()
            await self._take_id()
            await self._session.run(statement)


@contextmanager
def _translated() -> Iterator[None]:
    """Raise an error of the server as one of ampd.

    Raises:
        PermissionDenied: the role may not create databases.
    """
    try:
        yield
    except ServerError as error:
        if error.sqlstate == sqlstates.INSUFFICIENT_PRIVILEGE and "create database" in error.message:
            role = identifier(error.role) if error.role else "the role"
            raise PermissionDenied(
                error.message, hint=f"ALTER ROLE {role} CREATEDB", sqlstate=error.sqlstate
            ) from error
        raise translated_error(error) from error
