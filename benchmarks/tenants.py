"""Hundreds of schemas with the same migrations: `ampd.migrate_schemas` beside a loop that takes one after the other."""

from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from time import perf_counter

import ampd
from ampd.migration import checksum
from benchmarks.record import Timing, TimingsRecord, facts
from benchmarks.server import Server
from benchmarks.workload import generated

DATABASE = "bench_tenants"
SCHEMAS = 300
MIGRATIONS = 3
CONCURRENCY = (4, 8)
LOOP = "a loop over `ampd.migrate`"
FRESH, PENDING_NOTHING = "fresh", "nothing pending"


async def tenants(server: Server, schemas: int = SCHEMAS) -> TimingsRecord:
    """Migrates so many empty schemas in each way, on a database of its own, and then once more with nothing to do."""
    names = [f"tenant_{number}" for number in range(schemas)]
    files, url = _files(), server.url_of(DATABASE)

    async def loop() -> None:
        for name in names:
            await ampd.migrate(url, migrations=files, schema=name)

    async def together(concurrency: int) -> None:
        report = await ampd.migrate_schemas(url, names, migrations=files, concurrency=concurrency)
        assert not report.errors, report.text()

    ways: dict[str, Callable[[], Awaitable[None]]] = {LOOP: loop}
    ways |= {f"`ampd.migrate_schemas`, {number} at a time": partial(together, number) for number in CONCURRENCY}
    timings = []
    for way, work in ways.items():
        await server.create_anew(DATABASE)
        for scenario in (FRESH, PENDING_NOTHING):
            begin = perf_counter()
            await work()
            timings.append(Timing(way, f"{schemas} {scenario}", 0, perf_counter() - begin))
    return TimingsRecord(facts(await server.release()), timings)


def tenants_report(record: TimingsRecord) -> Iterator[str]:
    """Yield a table: each way, in all and for each schema."""
    schemas = int(record.timings[0].case.split()[0])
    yield f"{schemas} schemas of {MIGRATIONS} migrations, by one URL.\n"
    yield "|  | fresh | per schema | nothing pending | per schema |"
    yield "| :-- | --: | --: | --: | --: |"
    for way in dict.fromkeys(timing.subject for timing in record.timings):
        seconds = [record.median(way, f"{schemas} {scenario}") for scenario in (FRESH, PENDING_NOTHING)]
        cells = [cell for secs in seconds for cell in (f"{secs:.1f} s", f"{secs / schemas * 1000:.0f} ms")]
        yield f"| {way} | {' | '.join(cells)} |"


def _files() -> tuple[ampd.Migration, ...]:
    return tuple(
        ampd.Migration(each.version, each.name, f"{each.name}.sql", each.sql, checksum(each.sql.encode()))
        for each in generated()[:MIGRATIONS]
    )
