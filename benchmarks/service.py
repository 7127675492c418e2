"""What `await ampd.migrate(pool)` costs a service on a current schema: time, and pauses of its event loop."""

import asyncio
import gc
import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, thread_time

import asyncpg

import ampd
from benchmarks.growth import numbers
from benchmarks.record import Timing, TimingsRecord, facts
from benchmarks.server import Server

DATABASE = "bench_service"
FILES = (100, 10_000)
ROUNDS = 50
READ_ROUNDS = 20
PAUSE_ROUNDS = 10
TICK_SECONDS = 0.002
BARE, MIGRATE, PAUSE = "SELECT 1", "migrate", "longest pause"
PLAIN, READ = "plain reading", "migrate, reading"


async def service(server: Server, counts: Sequence[int] = FILES) -> TimingsRecord:
    """Takes `SELECT 1` and `migrate` in turns on one pool, the files at hand; then reads them as well.

    A pause is processor time.
    """
    timings = []
    for count in counts:
        with TemporaryDirectory() as folder:
            for number in numbers(count):
                Path(folder, f"{number}_step.sql").write_text(f"SELECT {number};\n")
            await server.create_anew(DATABASE)
            config = ampd.Migrations(dir=Path(folder))
            async with asyncpg.create_pool(server.url_of(DATABASE), min_size=1, max_size=2) as pool:
                await ampd.migrate(pool, migrations=ampd.read_migrations(folder))
                files = ampd.read_migrations(folder)
                for number in range(ROUNDS if count <= 1_000 else ROUNDS // 10):
                    begin = perf_counter()
                    await pool.execute("SELECT 1")
                    timings.append(Timing(BARE, str(count), number, perf_counter() - begin))
                    begin = perf_counter()
                    await ampd.migrate(pool, migrations=files)
                    timings.append(Timing(MIGRATE, str(count), number, perf_counter() - begin))
            metadata_db = ampd.MetadataDb(url=ampd.DatabaseUrl(server.url_of(DATABASE)), migrations=config)
            for number in range(READ_ROUNDS):
                begin = perf_counter()
                _read_and_hash(folder)
                timings.append(Timing(PLAIN, str(count), number, perf_counter() - begin))
                begin = perf_counter()
                await ampd.migrate(metadata_db)
                timings.append(Timing(READ, str(count), number, perf_counter() - begin))
            for number in range(PAUSE_ROUNDS):
                gc.collect()
                pauses: list[float] = []
                ticking = asyncio.create_task(_tick(pauses))
                await ampd.migrate(metadata_db)  # reads and hashes the files as well
                ticking.cancel()
                timings.append(Timing(PAUSE, str(count), number, max(pauses)))
    return TimingsRecord(facts(await server.release()), timings)


def _read_and_hash(folder: str) -> None:
    for name in sorted(os.listdir(folder)):
        with open(f"{folder}/{name}", "rb") as file:
            sha256(file.read()).hexdigest()


async def _tick(pauses: list[float]) -> None:
    while True:
        begin = thread_time()
        await asyncio.sleep(TICK_SECONDS)
        pauses.append(thread_time() - begin)


def service_report(record: TimingsRecord) -> Iterator[str]:
    """Yield a table: each number of files."""
    yield (
        "| files | `SELECT 1` on the pool | `await ampd.migrate(pool)` | reading and hashing the files "
        "| `await ampd.migrate(metadata_db)`, which reads them | longest pause of the event loop |"
    )
    yield "| --: | --: | --: | --: | --: | --: |"
    for case in dict.fromkeys(timing.case for timing in record.timings):
        cells = [f"{record.median(subject, case) * 1000:.2f} ms" for subject in (BARE, MIGRATE, PLAIN, READ, PAUSE)]
        yield f"| {int(case):,} | {' | '.join(cells)} |"
