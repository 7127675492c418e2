"""What a run costs on the wire and at start, counted and not timed."""

import gc
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import asyncpg
import msgspec
import pytest

import ampd as library
from ampd.__main__ import main
from ampd.cli import commands
from ampd.postgres.connection import Session
from tests.folders import write
from tests.scenes import never_look, scripts
from tests.servers import Ampd, Database, Proxy

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]


async def test_nothing_pending_costs_one_connection_and_one_round_trip(database: Database) -> None:
    """A start with nothing pending reads the history in one round trip of one connection; so does a status."""
    files = scripts(*(f"CREATE TABLE t{number} ();" for number in range(20)))
    await library.migrate(database.url, migrations=files)
    for run in (library.migrate, library.status):
        async with Proxy(database.server.host, database.server.port) as proxy:
            await run(f"postgresql://postgres@{proxy.host}:{proxy.port}/{database.name}", migrations=files)
            assert (proxy.connections, proxy.round_trips) == (1, 1), run


async def test_no_time_is_spent_on_the_servers_goodbye(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's `close` waits for it: a round trip at the end of every run."""

    async def close(*_: object, **__: object) -> None:
        raise AssertionError("waits for the server")

    files = scripts("CREATE TABLE t ()", "-- no-transaction\nCREATE INDEX CONCURRENTLY ON t ((1))")
    monkeypatch.setattr(asyncpg.Connection, "close", close)
    for run in (library.migrate, library.migrate, library.status):
        await run(database.url, migrations=files)


@pytest.mark.parametrize("count", [1, 300])
async def test_nothing_pending_takes_few_bytes(database: Database, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 6 kB are sent and 1 kB received, however long the history is, and whatever its migrations are called."""
    files = scripts(*(f"SELECT {number}" for number in range(count)))
    files = (msgspec.structs.replace(files[0], name="größe \\x41"), *files[1:])
    await library.migrate(database.url, migrations=files)
    messages, notes = list[str](), list[str]()
    run = Session.run

    async def measured(session: Session, message: str, *, on_note: Any, **options: Any) -> None:
        messages.append(message)

        def noted(note: str) -> None:
            notes.append(note)
            on_note(note)

        await run(session, message, on_note=noted, **options)

    monkeypatch.setattr(Session, "run", measured)
    assert (await library.migrate(database.url, migrations=files)).result == "up_to_date"
    assert [len(message.encode()) <= 6000 for message in messages] == [True]
    assert [len(note.encode()) <= 900 for note in notes] == [True]  # beside what the protocol adds


@pytest.mark.parametrize("count", [1, 28, 200])
async def test_a_fresh_run_costs_one_round_trip_for_all(
    database: Database, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N migrations on an empty database go in one message, after the one that reads the history."""
    files = scripts(*(f"CREATE TABLE t{number} ();\nSELECT 1;\n" for number in range(count)))
    async with Proxy(database.server.host, database.server.port) as proxy:
        url = f"postgresql://postgres@{proxy.host}:{proxy.port}/{database.name}"
        never_look(monkeypatch)
        await library.migrate(url, migrations=files)
        assert (proxy.connections, proxy.round_trips) == (1, 2)


async def test_a_process_with_nothing_pending_costs_no_more(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """The command line adds nothing to what the library sends."""
    write(tmp_path / "m", {"1_a.sql": "SELECT 1", "2_b.sql": "SELECT 2"})
    assert ampd("migrate", "--migrations", "m", url=database.url).returncode == 0
    for command in ("migrate", "status"):
        async with Proxy(database.server.host, database.server.port) as proxy:
            url = f"postgresql://postgres@{proxy.host}:{proxy.port}/{database.name}"
            process = ampd.start(command, "--migrations", "m", url=url)
            await anyio.to_thread.run_sync(process.communicate)
            assert (process.returncode, proxy.connections, proxy.round_trips) == (0, 1, 1), command


NEEDED = {
    "ampd",
    "ampd.advisory_lock",
    "ampd.backoff",
    "ampd.cli",
    "ampd.cli.app",
    "ampd.cli.commands",
    "ampd.cli.messages",
    "ampd.cli.progress",
    "ampd.cli.runtime",
    "ampd.config",
    "ampd.config_sources",
    "ampd.database_url",
    "ampd.display",
    "ampd.emitter",
    "ampd.errors",
    "ampd.events",
    "ampd.history",
    "ampd.history.distrust",
    "ampd.history.reading",
    "ampd.history.refusals",
    "ampd.history.table",
    "ampd.history.trust",
    "ampd.lock_wait",
    "ampd.migration",
    "ampd.migrator",
    "ampd.other_sessions",
    "ampd.plan",
    "ampd.postgres",
    "ampd.postgres.connection",
    "ampd.postgres.connection_wait",
    "ampd.postgres.database",
    "ampd.postgres.failures",
    "ampd.postgres.libpq",
    "ampd.postgres.passwords",
    "ampd.postgres.passed_connection",
    "ampd.postgres.permissions",
    "ampd.postgres.quoting",
    "ampd.postgres.server_error",
    "ampd.redaction",
    "ampd.report",
    "ampd.resumption",
    "ampd.run",
    "ampd.source",
    "ampd.sql",
    "ampd.sql.slices",
    "ampd.sqlstates",
    "ampd.statement_progress",
    "ampd.version",
}


def imported(database: Database, folder: Path, *arguments: str, file: bool = False) -> set[str]:
    """Return the modules that a process has imported in the end."""
    url = f'[metadata_db]\nurl = "{database.url}"\n'
    program = (
        "import sys; from ampd.cli.commands import run; "
        f"code = run({list(arguments)!r}); print(*sys.modules); sys.exit(code)"
    )
    environment = {"AMP_CONFIG_METADATA_DB__URL": database.url, "PYTHONPATH": ":".join(sys.path)}
    if file:
        del environment["AMP_CONFIG_METADATA_DB__URL"]
        environment["AMP_CONFIG"] = str(write(folder, {"c.toml": url}) / "c.toml")
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return set(process.stdout.splitlines()[-1].split())


def test_a_start_with_nothing_pending_imports_what_it_needs(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """No lexer, server, pool, TOML, rich text or metadata: every replica pays for an import at every start."""
    write(tmp_path / "m", {"1_a.sql": "SELECT 1"})
    here = ("--migrations", "m")
    assert ampd("migrate", *here, url=database.url).returncode == 0
    for command in ("migrate", "status"):
        modules = imported(database, tmp_path, command, *here)
        assert {name for name in modules if name.split(".")[0] == "ampd"} == NEEDED, command
        unneeded = (
            "rich tomllib difflib importlib.metadata importlib.resources unittest email.parser http multiprocessing "
            "cyclopts.completion"
        )
        assert modules.isdisjoint(unneeded.split()), command
    modules = imported(database, tmp_path, "migrate", *here, file=True)
    assert "tomllib" in modules
    assert {name for name in modules if name.split(".")[0] == "ampd"} == NEEDED


def test_importing_ampd_costs_next_to_nothing() -> None:
    """`import ampd` alone loads neither the driver nor anything else that is not used yet, and changes no logging."""
    program = (
        "import sys, logging; before = set(sys.modules); import ampd; "
        "print(*sorted(name for name in set(sys.modules) - before "
        "if name.split('.')[0] not in sys.stdlib_module_names)); assert not logging.getLogger().handlers"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout == "ampd ampd.version\n"


def test_a_process_searches_for_garbage_only_where_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what a start makes nor, on the way out, what it has made: that would be a fifth of its time."""
    threshold, handlers = (
        gc.get_threshold(),
        [(each, signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM)],
    )
    monkeypatch.setattr(commands, "run", lambda _: gc.get_threshold()[0])
    gc.unfreeze()  # what the tests have frozen
    try:
        with pytest.raises(SystemExit) as end:
            main()
        assert gc.get_freeze_count() > 0
    finally:
        gc.set_threshold(*threshold)
        for each, handler in handlers:
            signal.signal(each, handler)
    assert end.value.code == 100_000
