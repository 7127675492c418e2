"""Hundreds of schemas with the same migrations: `ampd.migrate_schemas` beside a loop that takes one after the other."""

from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter

import ampd
from ampd.migration import checksum
from benchmarks.server import Server
from benchmarks.workload import generated

DATABASE = "bench_tenants"
MIGRATIONS = 3
CONCURRENCY = (1, 4, 8, 16)


async def tenants(server: Server, schemas: int) -> list[str]:
    """Measures a fresh run and one with nothing pending in each way, each on a database of its own; returns a table."""
    names = [f"tenant_{number}" for number in range(schemas)]
    files = _files()
    url = server.url_of(DATABASE)

    async def loop() -> None:
        for name in names:
            await ampd.migrate(url, migrations=files, schema=name)

    async def together(concurrency: int) -> None:
        report = await ampd.migrate_schemas(url, names, migrations=files, concurrency=concurrency)
        assert not report.errors, report.text()

    ways: list[tuple[str, Callable[[], Awaitable[None]]]] = [("a loop over `ampd.migrate`", loop)]
    for number in CONCURRENCY:
        ways.append((f"`ampd.migrate_schemas(…, concurrency={number})`", partial(together, number)))
    lines = ["|  | fresh | per schema | nothing pending | per schema |", "| :-- | --: | --: | --: | --: |"]
    for title, run in ways:
        await server.create_anew(DATABASE)
        cells = [cell for _ in range(2) for cell in await _timed(run, schemas)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


async def _timed(run: Callable[[], Awaitable[None]], schemas: int) -> tuple[str, str]:
    begin = perf_counter()
    await run()
    seconds = perf_counter() - begin
    return f"{seconds:.1f} s", f"{seconds / schemas * 1000:.1f} ms"


def _files() -> tuple[ampd.Migration, ...]:
    return tuple(
        ampd.Migration(each.version, each.name, f"{each.name}.sql", each.sql, checksum(each.sql.encode()))
        for each in generated()[:MIGRATIONS]
    )
