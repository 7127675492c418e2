"""Embedded in a real service: Starlette under uvicorn, whose workers all migrate in their lifespan at the same time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any
from urllib.request import urlopen

import pytest

import ampd
from tests.repetition import TIMES
from tests.servers import Ampd, Database, free_port

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]

ROOT = Path(__file__).parent.parent
WORKERS = 8
PATIENCE_SECS = 60  # after which what still runs is killed, and the test fails

ADVISORY_LOCKS = """
    SELECT count(*) FROM pg_locks
    WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


class Service:
    """A running uvicorn."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self._port = port
        self.log = ""

    def wait_until_up(self, workers: int = 1) -> None:
        """Wait until uvicorn listens and that many workers have begun to serve."""
        self._read_log(
            lambda log: log.count("Application startup complete.") == workers and "Uvicorn running on" in log
        )

    def _read_log(self, until: Callable[[str], bool]) -> None:
        assert self._process.stderr is not None
        while not until(self.log) and (line := self._process.stderr.readline()):
            self.log += line

    def health(self) -> dict[str, Any]:
        """Ask a worker, any, how it is."""
        with urlopen(f"http://127.0.0.1:{self._port}/health", timeout=PATIENCE_SECS) as answer:
            told: dict[str, Any] = json.load(answer)
            return told

    def exit_code(self) -> int:
        """Return what it has ended with by itself."""
        self._read_log(lambda _: False)
        return self._process.wait()


@contextmanager
def service(database: Database, migrations: Path, *, workers: int = 1, auto_migrate: bool) -> Iterator[Service]:
    """Start uvicorn, and stop it in the end."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "AMP_", "UVICORN"))}
    environment |= {
        "AMP_CONFIG_METADATA_DB__URL": database.url,
        "AMP_CONFIG_METADATA_DB__AUTO_MIGRATE": str(auto_migrate),
        "AMP_CONFIG_METADATA_DB__POOL_SIZE": "2",
        "AMP_CONFIG_METADATA_DB__MIGRATIONS__DIR": str(migrations),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "tests.service:app", f"--port={port}", f"--workers={workers}"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = Timer(PATIENCE_SECS, process.kill)
    watchdog.start()
    try:
        yield Service(process, port)
    finally:
        watchdog.cancel()
        process.terminate()
        try:
            process.communicate(timeout=PATIENCE_SECS)
        finally:
            process.kill()


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    """The packaged migrations, each of which also notes that it ran, and an index built outside of a transaction."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    (folder / "0_ran.sql").write_text("CREATE TABLE ran (version bigint);\nINSERT INTO ran VALUES (0);\n")
    for each in ampd.read_migrations():
        name = f"{each.version}_{each.name}.sql"
        (folder / name).write_text(f"{each.sql}\nINSERT INTO ran VALUES ({each.version});\n")
    (folder / "99999999999999_index.sql").write_text(
        "-- no-transaction\nCREATE INDEX CONCURRENTLY ran_version ON ran (version);\n"
        "INSERT INTO ran VALUES (99999999999999);\n"
    )
    return folder


@pytest.mark.parametrize("_start", range(TIMES))
async def test_eight_workers_start_on_an_empty_database(database: Database, migrations: Path, _start: int) -> None:
    """Eight workers migrate one empty database at once: each migration runs once, and every worker serves."""
    files = ampd.read_migrations(migrations)
    with service(database, migrations, workers=WORKERS, auto_migrate=True) as uvicorn:
        uvicorn.wait_until_up(WORKERS)
        healthy: set[str] = set()
        while len(healthy) < WORKERS:
            told = uvicorn.health()
            assert told["applied"] == len(files)
            healthy.add(told["node"])
        assert await database.fetch("SELECT version FROM ran ORDER BY 1") == [(each.version,) for each in files]
        assert {row[0] for row in await database.fetch("SELECT node_id FROM workers")} == healthy
    assert [line for line in uvicorn.log.splitlines() if "INFO" not in line] == []
    assert await database.fetchval(ADVISORY_LOCKS) == 0


async def test_a_service_refuses_a_schema_that_is_behind(database: Database, migrations: Path, ampd: Ampd) -> None:
    """With auto_migrate = false the service does not start, names the command, and starts once that has been run."""
    with service(database, migrations, auto_migrate=False) as uvicorn:
        assert uvicorn.exit_code() == 3
    assert uvicorn.log.partition("ampd.errors.MigrationConflict: ")[2].partition("\n\n")[0].splitlines()[:2] == [
        f"the schema of 127.0.0.1:{database.server.port}/{database.name} is behind: 9 migrations pending (from 0 ran)",
        "hint: run `ampd migrate` before the service starts, or set auto_migrate = true",
    ]
    assert await database.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0

    assert ampd("migrate", "--migrations", migrations, url=database.url).returncode == 0
    with service(database, migrations, auto_migrate=False) as uvicorn:
        uvicorn.wait_until_up()
        assert uvicorn.health()["applied"] == 9
