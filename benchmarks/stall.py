"""What other readers feel while a migration waits for a table that one long reader holds."""

import asyncio
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from ampd.config import Migrations
from benchmarks.compare import run
from benchmarks.peers import AMPD, PEERS, Absent, Origin, Subject, obtain
from benchmarks.record import Stall, StallRecord, Wait, facts
from benchmarks.server import Server
from benchmarks.workload import PreparedMigration

HOLD_SECONDS = 30.0
MIGRATE_AT_SECONDS = 2.0
PEERS_MEASURED = ("goose", "dbmate")
READERS = 4
PAUSE_SECONDS = 0.01
NOTICEABLE_SECONDS = 0.05

PREPARE = "CREATE TABLE visits (id bigint PRIMARY KEY); INSERT INTO visits SELECT generate_series(1, 1000)"
READ = "SELECT 1 FROM visits LIMIT 1"
MIGRATION = PreparedMigration(1, "add_note", "ALTER TABLE visits ADD COLUMN note text;\n")
PSQL = Subject(
    "psql",
    Origin("psql", (), Path(shutil.which("psql") or "psql")),
    lambda _scripts, _folder: None,
    lambda program, url: (program, "--no-psqlrc", url, "--command", MIGRATION.sql),
)


async def stall(server: Server) -> StallRecord:
    """Lets ampd at its defaults, psql and two peers run the same migration, one after the other on a fresh database."""
    found = [obtain(peer) for peer in PEERS if peer.name in PEERS_MEASURED]
    for absent in (peer for peer in found if isinstance(peer, Absent)):
        print(f"{absent.name} is absent: {absent.reason}", file=sys.stderr)
    subjects = [AMPD, PSQL, *(peer for peer in found if isinstance(peer, Subject))]
    with TemporaryDirectory() as scratch:
        for subject in subjects:
            await _prepare(server, subject, Path(scratch, subject.name))
        stalls = await asyncio.gather(*(_stall_under(server, each, Path(scratch, each.name)) for each in subjects))
    return StallRecord(
        facts=facts(await server.release()),
        hold_seconds=HOLD_SECONDS,
        migrate_at_seconds=MIGRATE_AT_SECONDS,
        lock_timeout_seconds=Migrations().lock_timeout_secs,
        stalls=stalls,
    )


async def _prepare(server: Server, subject: Subject, folder: Path) -> None:
    folder.mkdir()
    subject.lay_out([MIGRATION], folder)
    await server.create_anew(_database(subject))
    async with server.connect(_database(subject)) as connection:
        await connection.execute(PREPARE)


async def _stall_under(server: Server, subject: Subject, folder: Path) -> Stall:
    database = _database(subject)
    url = server.url_of(database)
    begin = perf_counter()
    done = asyncio.Event()
    async with asyncio.TaskGroup() as everyone:
        everyone.create_task(_hold(server, database))
        readers = [everyone.create_task(_read(server, database, begin, done)) for _ in range(READERS)]
        await asyncio.sleep(MIGRATE_AT_SECONDS)
        seconds = await run(subject.argv(url), folder, **{subject.url_variable: url})
        await asyncio.sleep(begin + HOLD_SECONDS + 1 - perf_counter())
        done.set()
    reads = [read for reader in readers for read in reader.result()]
    return Stall(
        subject=subject.name,
        migration_seconds=seconds,
        reads=len(reads),
        worst_seconds=max(read.duration for read in reads),
        waits=sorted((r for r in reads if r.duration >= NOTICEABLE_SECONDS), key=lambda read: read.start),
    )


def _database(subject: Subject) -> str:
    return f"bench_stall_{subject.name}"


async def _hold(server: Server, database: str) -> None:
    async with server.connect(database) as connection, connection.transaction():
        await connection.execute(READ)
        await asyncio.sleep(HOLD_SECONDS)


async def _read(server: Server, database: str, begin: float, done: asyncio.Event) -> list[Wait]:
    reads = []
    async with server.connect(database) as connection:
        while not done.is_set():
            start = perf_counter()
            await connection.execute(READ)
            reads.append(Wait(start - begin, perf_counter() - start))
            await asyncio.sleep(PAUSE_SECONDS)
    return reads
