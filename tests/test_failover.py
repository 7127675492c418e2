"""A primary and a real standby: the primary is found, and when it dies in mid-run the standby takes over."""

import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import asyncpg
import msgspec
import pytest

import ampd as library
from ampd import ConnectionFailed, ReadOnlyServer, Report, Retrying
from ampd.config import Limits
from ampd.local_server.server import local_server
from tests.folders import memory
from tests.scenes import GENEROUS, Heard, folder_of, history, scripts, until, waiting_for_a_lock
from tests.servers import Ampd, Database, Server, _unprivileged, copy_cluster, free_port, server_of

pytestmark = pytest.mark.anyio

GATE = "SELECT pg_advisory_xact_lock(1)"
PATIENT = "-- lock-timeout: 0\n"
FILES = (
    "CREATE TABLE t (id integer)",
    f"{PATIENT}INSERT INTO t VALUES (1); {GATE}",
    "INSERT INTO t VALUES (2)",
)


class Pair(msgspec.Struct, frozen=True):
    """A primary, its standby, and the processes behind them."""

    primary: Database
    standby: Database
    primary_process: subprocess.Popen[bytes]

    def url(self, attributes: str = "read-write") -> str:
        """Return the URL that names both, the standby first."""
        hosts = ",".join(f"127.0.0.1:{each.server.port}" for each in (self.standby, self.primary))
        return f"postgresql://postgres@{hosts}/amp?target_session_attrs={attributes}"

    async def caught_up(self) -> None:
        """Wait until the standby has replayed all that the primary has written."""
        written = await self.primary.fetchval("SELECT pg_current_wal_lsn()")

        async def replayed() -> bool:
            there: bool = await self.standby.fetchval("SELECT pg_last_wal_replay_lsn() >= $1", written)
            return there

        await until(replayed)


@pytest.fixture
async def pair(server: Server) -> AsyncIterator[Pair]:
    """A primary with a streaming standby."""
    basebackup = Path(server.bindir) / "pg_basebackup"
    if not basebackup.exists():
        pytest.skip(f"NOT TESTED: these binaries of PostgreSQL {server.major} have no pg_basebackup")
    folder = Path(tempfile.mkdtemp(prefix="ampd-pair-", dir=memory()))
    folder.chmod(0o711)
    settings = {"max_connections": "30", "shared_buffers": "16MB", "wal_level": "replica", "fsync": "off"}
    data_dir = copy_cluster(server.cluster, folder / "primary")
    async with local_server(data_dir, bindir=Path(server.bindir), tcp=True, settings=settings) as local:
        home = folder / "home"
        home.mkdir()
        account = _unprivileged()
        if account:
            shutil.chown(home, account["user"], account["group"])
        data, port = home / "standby", free_port()
        upstream = f"host=127.0.0.1 port={local.port} user=postgres"
        copy: list[str | Path] = [basebackup, "-D", data, "-R", "-c", "fast", "-d", upstream]
        await anyio.to_thread.run_sync(lambda: subprocess.run(copy, check=True, cwd="/", **account))
        place_of_standby = {"port": str(port), "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        options = [
            word for name, value in {**settings, **place_of_standby}.items() for word in ("-c", f"{name}={value}")
        ]
        with (folder / "standby.log").open("wb") as log:
            standby = subprocess.Popen(  # noqa: ASYNC220 - it is not waited for
                [Path(server.bindir) / "postgres", "-D", data, *options], stdout=log, stderr=log, cwd="/", **account
            )
        try:
            pair = Pair(
                Database(server_of(local), "amp"),
                Database(Server(port, "", str(data), server.bindir, server.major), "amp"),
                local.process,
            )

            async def ready() -> bool:
                assert standby.poll() is None, (folder / "standby.log").read_text()
                try:
                    return bool(await pair.standby.fetchval("SELECT pg_is_in_recovery()"))
                except (OSError, asyncpg.PostgresError):
                    return False

            await until(ready)
            yield pair
        finally:
            standby.send_signal(signal.SIGQUIT)
            standby.wait()
    shutil.rmtree(folder)


async def test_a_failover_in_mid_run(pair: Pair, ampd: Ampd, tmp_path: Path) -> None:
    """Of two hosts the primary is found; when it dies the run fails as a lost connection, and the next completes."""
    folder = folder_of(tmp_path / "files", *FILES)
    async with pair.primary.connect() as gate:
        await gate.execute(f"BEGIN; {GATE}")
        process = ampd.start("migrate", "--migrations", folder, url=pair.url())
        await waiting_for_a_lock(pair.primary)
        await pair.caught_up()
        pair.primary_process.send_signal(signal.SIGQUIT)
        _, stderr = await anyio.to_thread.run_sync(process.communicate)
        gate.terminate()
    assert process.returncode == 1
    assert "error: the connection to the server was lost: " in stderr
    assert re.search(r"hint: \S*2_step\.sql was being applied; run the command again: what was committed", stderr)
    heard, reports = Heard(), list[Report]()

    async def again() -> None:  # sooner than the standby is promoted
        limits = Limits(connect_wait_secs=GENEROUS)
        reports.append(await library.migrate(pair.url(), migrations=scripts(*FILES), limits=limits, on_event=heard))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(again)
        await heard.first(Retrying)
        assert await pair.standby.fetchval("SELECT pg_promote()")
    assert [each.version for report in reports for each in report.applied] == [2, 3]
    assert await history(pair.standby) == [(1, True, 1), (2, True, 2), (3, True, 1)]
    assert await pair.standby.fetchval("SELECT array_agg(id ORDER BY id) FROM t") == [1, 2]
    heard.assert_adds_up()


async def test_a_standby_is_read_and_never_written(pair: Pair) -> None:
    """On a standby the status is to be had, nothing pending is a success, and anything pending is refused by name."""
    files = scripts(*FILES[:1])
    with pytest.raises(ReadOnlyServer) as raised:
        await library.migrate(pair.standby.url, migrations=files)
    assert raised.value.message.endswith(f"127.0.0.1:{pair.standby.server.port}/amp takes no writes: a standby, or "
                                         "read-only by default")  # fmt: skip
    await library.migrate(pair.url("primary"), migrations=files)
    await pair.caught_up()
    assert (await library.migrate(pair.standby.url, migrations=files)).applied == ()
    found = await library.status(pair.url("standby"), migrations=files)
    assert found.up_to_date
    wrong, impatient = f"{pair.standby.url}?target_session_attrs=read-write", Limits(connect_wait_secs=0)
    with pytest.raises(ConnectionFailed, match="no host of the URL is what target_session_attrs asks for"):
        await library.migrate(wrong, migrations=files, limits=impatient)
    assert (await library.migrate(pair.url("any"), migrations=files)).applied == ()
