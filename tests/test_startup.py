"""The order of starting: a server that is not there yet is waited for; what waiting cannot mend is told at once."""

import asyncio
import os
import re
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

import anyio
import asyncpg
import pytest

import ampd as library
from ampd import (
    AmpdError,
    AuthenticationFailed,
    ConnectionFailed,
    DatabaseMissing,
    LockRetry,
    Retrying,
    WaitingForConnection,
    backoff,
)
from ampd.config import Limits
from ampd.events import Finished
from ampd.postgres.failures import connection_error
from tests.scenes import GENEROUS, Heard, history, scripts, transaction
from tests.servers import Ampd, Database, Proxy, free_port

pytestmark = [pytest.mark.anyio, pytest.mark.any_server]

FILES = scripts("CREATE TABLE t ()")
PATIENT = Limits(connect_wait_secs=GENEROUS)


class Door(Proxy):
    """A proxy on a port of our choice, which turns the first so many callers away, each with the same answer."""

    def __init__(self, database: Database, port: int = 0, *, refusals: int = 0, answer: bytes = b"") -> None:
        super().__init__(database.server.host, database.server.port)
        self.port = port
        self.refusals = refusals
        self.answer = answer

    async def __aenter__(self) -> Self:
        """Listen."""
        self._server = await asyncio.start_server(self._open, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def url(self, database: Database) -> str:
        """Return the URL of a database behind the door."""
        return f"postgresql://postgres@{self.host}:{self.port}/{database.name}"

    async def _open(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusals <= 0:
            return self._accept(reader, writer)
        length = int.from_bytes(await reader.readexactly(4))
        if await reader.readexactly(length - 4) == (80877103).to_bytes(4):  # it asks for TLS first
            writer.write(b"N")
            await reader.readexactly(int.from_bytes(await reader.readexactly(4)) - 4)
        self.refusals -= 1
        writer.write(self.answer)
        with suppress(ConnectionError):
            await writer.drain()
        return writer.close()


def fatal(sqlstate: str, message: str) -> bytes:
    """Return the message by which a server refuses a connection."""
    fields = (b"SFATAL", b"VFATAL", b"C" + sqlstate.encode(), b"M" + message.encode())
    body = b"".join(field + b"\0" for field in fields) + b"\0"
    return b"E" + (len(body) + 4).to_bytes(4) + body


def said(kind: bytes, body: bytes) -> bytes:
    """Return a message of the server."""
    return kind + (len(body) + 4).to_bytes(4) + body


# What a server says when it lets somebody in: no password is wanted, a key to cancel by, ready for queries.
GREETING = (said(b"R", bytes(4)), said(b"S", b"server_version\x0015.0\0"), said(b"K", bytes(8)), said(b"Z", b"I"))
GOING = fatal("57P01", "terminating connection due to administrator command")
HANGING_UP = [b"".join(GREETING[:length]) + last for length in range(1, 5) for last in (b"", GOING)]


class Flaky(Door):
    """A door at which every other caller is hung up on, a word later each time."""

    async def _open(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.refusals = self.connections % 2
        self.connections += self.refusals
        self.answer = HANGING_UP[self.connections // 2 % len(HANGING_UP)]
        await super()._open(reader, writer)


@pytest.mark.parametrize("answer", HANGING_UP, ids=[f"{n // 2 + 1}{'-fatal' * (n % 2)}" for n in range(8)])
@pytest.mark.parametrize("lent", [False, True], ids=["url", "pool"])
async def test_a_server_that_hangs_up_after_its_greeting(database: Database, answer: bytes, lent: bool) -> None:
    """However far it has let us in, it is asked again like any other server that cannot be reached."""
    async with Door(database, refusals=3, answer=answer) as door:
        url = f"{door.url(database)}?sslmode=disable"
        if lent:
            async with asyncpg.create_pool(url, min_size=0, max_size=1) as pool:
                report = await library.migrate(pool, migrations=FILES, limits=PATIENT)
        else:
            report = await library.migrate(url, migrations=FILES, limits=PATIENT)
        assert len(report.applied) == 1
        door.refusals = 99
        with pytest.raises(ConnectionFailed) as raised:
            await library.status(url, migrations=FILES, limits=Limits(connect_wait_secs=0))
    assert re.search("the server closed the connection|terminating connection due to", raised.value.message)


@pytest.mark.parametrize("lent", [False, True], ids=["url", "pool"])
async def test_a_server_that_hangs_up_on_every_other_connection(database: Database, lent: bool) -> None:
    """The connections that a run takes besides its first are asked for again as well."""
    await database.execute("CREATE TABLE busy ()")
    files = scripts("-- no-transaction\nCREATE TABLE t (); ALTER TABLE busy ADD x int; SELECT 1", "SELECT 1")
    heard, limits = Heard(), Limits(connect_wait_secs=GENEROUS, lock_timeout_secs=0.1)

    async def run(url: str) -> None:
        if lent:
            async with asyncpg.create_pool(url, min_size=0, max_size=3) as pool:
                await library.migrate(pool, migrations=files, limits=limits, on_event=heard)
        else:
            await library.migrate(url, migrations=files, limits=limits, on_event=heard)

    async with Flaky(database) as door, transaction(database, "SELECT FROM busy") as reader:
        door.connections = 1
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, f"{door.url(database)}?sslmode=disable")
            await heard.first(LockRetry)
            await anyio.sleep(1)  # in which connections to look from are tried
            await reader.execute("COMMIT")
    assert [finished for _, finished, _ in await history(database)] == [True, True]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (fatal("57P03", "the database system is starting up"), "is not ready: the database system is starting up"),
        (fatal("57P03", "the database system is in recovery mode"), "is not ready: the database system is in"),
        (fatal("57P03", "the database system is shutting down"), "is not ready: the database system is shutting down"),
        (fatal("57P01", "terminating connection due to administrator command"), ": terminating connection"),
        (b"", ""),
    ],
    ids=["starting", "recovering", "shutting down", "going", "hung up"],
)
async def test_a_server_that_is_not_ready_is_waited_for(
    database: Database, monkeypatch: pytest.MonkeyPatch, answer: bytes, reason: str
) -> None:
    """What passes by itself is retried without a flood of words, until the server lets us in."""
    monkeypatch.setattr(backoff, "_REPORT_EVERY_SECS", 2 * GENEROUS)
    heard = Heard()
    async with Door(database, refusals=4, answer=answer) as door:
        report = await library.migrate(door.url(database), migrations=FILES, limits=PATIENT, on_event=heard)
        where = f"127.0.0.1:{door.port}/{database.name}"
    assert door.refusals == 0
    assert len(report.applied) == 1
    (told,) = heard.of(Retrying)
    assert reason in told.reason
    assert where in told.reason
    assert told.limit == GENEROUS
    heard.assert_adds_up()


async def test_a_server_that_comes_up_later_is_found(database: Database, ampd: Ampd) -> None:
    """Started before its server, the command waits with one line, and does its work once there is somebody."""
    port = free_port()
    (ampd.folder / FILES[0].file).write_text(FILES[0].sql)
    url = f"postgresql://postgres@127.0.0.1:{port}/{database.name}"
    process = ampd.start("migrate", "--migrations", ".", url=url)
    assert process.stderr is not None
    line = await anyio.to_thread.run_sync(process.stderr.readline)
    where = f"127.0.0.1:{port}/{database.name}"
    assert re.sub(r"\d+ s", "N s", line) == f"{where} cannot be reached: connection refused; trying for N s more\n"
    async with Door(database, port):
        stdout, stderr = await anyio.to_thread.run_sync(process.communicate)
    assert process.returncode == 0, stderr
    assert "trying for" not in stderr
    assert await database.fetchval("SELECT count(*) FROM ampd_schema_migrations") == 1
    assert stdout


async def test_a_role_without_a_free_connection_waits(database: Database) -> None:
    """Too many connections is a state that passes."""
    role = await database.role("crowded", "ALL ON SCHEMA public")
    await database.execute(f"ALTER ROLE {role.name} CONNECTION LIMIT 0")
    heard = Heard()
    async with anyio.create_task_group() as tasks:

        async def make_room() -> None:
            assert "too many connections for role" in (await heard.first(WaitingForConnection)).reason
            await database.execute(f"ALTER ROLE {role.name} CONNECTION LIMIT 2")

        tasks.start_soon(make_room)
        report = await library.migrate(role.url, migrations=FILES, limits=PATIENT, on_event=heard)
    assert len(report.applied) == 1
    heard.assert_adds_up()


@pytest.mark.parametrize(
    ("host", "reason"),
    [("127.0.0.1", "connection refused"), ("nowhere.invalid", "the host name is not known")],
)
async def test_patience_ends(monkeypatch: pytest.MonkeyPatch, host: str, reason: str) -> None:
    """After connect_wait_secs the error says what was tried and why it failed; what was told meanwhile is one line."""
    monkeypatch.setattr(backoff, "_REPORT_EVERY_SECS", 2 * GENEROUS)
    heard, port = Heard(), free_port()
    with pytest.raises(ConnectionFailed) as raised:
        await library.migrate(
            f"postgresql://postgres@{host}:{port}/amp",
            migrations=FILES,
            limits=Limits(connect_wait_secs=0.6),
            on_event=heard,
        )
    assert raised.value.message.startswith(f"{host}:{port}/amp cannot be reached: {reason}")
    assert raised.value.hint == "check host and port, and that the server runs and listens there"
    assert len(heard.of(Retrying)) == 1
    heard.assert_adds_up()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (fatal("28P01", 'password authentication failed for user "postgres"'), AuthenticationFailed),
        (fatal("28000", 'no pg_hba.conf entry for host "127.0.0.1"'), AuthenticationFailed),
        (fatal("3D000", 'database "amp" does not exist'), DatabaseMissing),
    ],
    ids=["password", "pg_hba", "database"],
)
async def test_what_waiting_cannot_mend_is_told_at_once(
    database: Database, answer: bytes, kind: type[AmpdError]
) -> None:
    """A wrong password or a missing database is asked for once, and never retried."""
    heard = Heard()
    async with Door(database, refusals=99, answer=answer) as door:
        with pytest.raises(kind):
            await library.migrate(door.url(database), migrations=FILES, limits=PATIENT, on_event=heard)
    assert door.refusals == 98
    assert [type(event) for event in heard] == [Finished]
    heard.assert_adds_up()


async def test_a_server_that_hangs_up_at_once() -> None:
    """It is told in words of our own; the driver's are about its insides."""
    async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0) as server:
        where = f"127.0.0.1:{server.sockets[0].getsockname()[1]}/amp"
        with pytest.raises(ConnectionFailed) as raised:
            await library.status(f"postgresql://u@{where}", migrations=(), limits=Limits(connect_wait_secs=0))
    assert raised.value.message == f"{where} cannot be reached: the server closed the connection"


async def test_a_refusal_that_repeats_the_password(database: Database) -> None:
    """What a server says of the password is hidden in the traceback as well."""
    async with Door(database, refusals=1, answer=fatal("XX000", "no hunter2 here")) as door:
        url = door.url(database).replace("@", ":hunter2@")
        with pytest.raises(ConnectionFailed) as raised:
            await library.status(url, migrations=())
    assert raised.value.message.endswith(": no *** here")
    assert "hunter2 here" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        (lambda server: server.url("no_such_database"), DatabaseMissing),
        (lambda server: server.url("postgres", "no_such_role"), AuthenticationFailed),
    ],
    ids=["database", "role"],
)
async def test_a_real_server_refuses(database: Database, url: Callable[[object], str], kind: type[AmpdError]) -> None:
    """The same of a real server, in its own words."""
    with pytest.raises(kind, match="no_such_"):
        await library.status(url(database.server), migrations=FILES, limits=PATIENT)


async def test_the_second_host_answers_when_the_first_does_not(database: Database) -> None:
    """With several hosts in the URL one that is down is passed over."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refused
        hosts = f"127.0.0.1:{closed.getsockname()[1]},{database.server.host}:{database.server.port}"
        url = f"postgresql://postgres@{hosts}/{database.name}?target_session_attrs=read-write"
        report = await library.migrate(url, migrations=FILES, limits=PATIENT)
    assert len(report.applied) == 1


# --- a home that is none


_AS_A_STRANGER = """
import asyncio, os, sys, ampd
asyncio.run(ampd.status(sys.argv[1], migrations=()))  # imports what the stranger may not read
os.setgroups([]), os.setgid(54321), os.setuid(54321)
try:
    print(asyncio.run(ampd.status(sys.argv[2], migrations=(), on_event=lambda event: print(event.message))).summary())
except ampd.AmpdError as error:
    print(error)
"""
_CLOSED = "this user may not look for certificates in {home}/.postgresql"
_FRESH = "up to date, no migration applied"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize(
    ("query", "env", "said"),
    [
        ("?sslmode=disable", {}, _FRESH),
        ("?sslmode=disable", {"HOME": "{home}"}, _FRESH),
        ("?sslmode=disable", {"PGPASSFILE": "{home}/pgpass"}, _FRESH),
        ("?sslmode=disable&passfile={home}/pgpass", {}, _FRESH),
        ("", {}, _FRESH),
        (
            "",
            {"HOME": "{home}"},
            f"{_CLOSED}, so the connection goes without TLS; set HOME to a folder that it may enter\n{_FRESH}",
        ),
        (
            "?sslmode=require",
            {"HOME": "{home}"},
            f"{_CLOSED}, as sslmode=require makes it\n"
            "hint: set HOME to a folder that it may enter, or use sslmode=disable",
        ),
        (
            "?user=",
            {"HOME": "/"},
            "the database URL has no user, and user id 54321 of this machine has no name\n"
            "hint: write the URL as postgresql://user:***@host:5432/database, or set PGUSER",
        ),
    ],
)
def test_a_user_without_a_name_or_a_home(
    database: Database, tmp_path: Path, query: str, env: dict[str, str], said: str
) -> None:
    """A home that is not there or may not be entered has no password file and no certificates, as to psql."""
    tmp_path.chmod(0o700)
    url = database.url.replace("postgres@", "") if query == "?user=" else database.url + query.format(home=tmp_path)
    process = subprocess.run(
        [sys.executable, "-c", _AS_A_STRANGER, f"{database.url}?sslmode=disable", url],
        env={name: value.format(home=tmp_path) for name, value in env.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.stdout, process.stderr) == (f"{said.format(home=tmp_path)}\n", "")


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("postgresql:///db?host=/sockets", "the socket folder"),
        ("postgresql:///db", "the socket folder"),
        ("postgresql://h/db", "the files that sslrootcert, sslcert, sslkey and sslcrl name"),
    ],
)
def test_a_permission_that_is_lacking(url: str, what: str) -> None:
    """Only a URL with a socket in it leads to the folder of the socket."""
    error, again = connection_error(PermissionError(13, "Permission denied"), library.DatabaseUrl(url), str)
    assert (error.message.endswith(": Permission denied"), error.hint, again) == (
        True,
        f"check the permissions of {what}",
        False,
    )
