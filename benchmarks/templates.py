"""What a fresh database costs a test: the copy of a template, beside an empty database that is migrated anew."""

from statistics import median
from time import perf_counter

import asyncpg

import ampd
from ampd.testing.databases import FreshDatabases, Template, fresh_databases

REPETITIONS = 40


async def templates(url: str) -> str:
    """Take turns on a server, with the packaged migrations, and return the medians as a table."""
    migrated, empty = Template("benchmarks", ampd.read_migrations()), Template("benchmarks")
    seconds: dict[str, list[float]] = {"copied": [], "migrated anew": [], "dropped": []}
    async with fresh_databases(ampd.DatabaseUrl(url)) as databases:
        for template in (migrated, empty):  # made here, and not in the first turn
            await _drop(databases, await databases.copy(template))
        for _ in range(REPETITIONS):
            begin = perf_counter()
            copy = await databases.copy(migrated)
            seconds["copied"].append(perf_counter() - begin)
            begin = perf_counter()
            anew = await databases.copy(empty)
            await ampd.migrate(anew.reveal())
            seconds["migrated anew"].append(perf_counter() - begin)
            assert await _tables(copy) == await _tables(anew)
            for each in (copy, anew):
                begin = perf_counter()
                await _drop(databases, each)
                seconds["dropped"].append(perf_counter() - begin)
    rows = [f"| {name} | {median(each) * 1000:.0f} ms | {max(each) * 1000:.0f} ms |" for name, each in seconds.items()]
    ratio = median(seconds["migrated anew"]) / median(seconds["copied"])
    heading = "| a test's database, with amp's 7 migrations | median | longest |\n| :-- | --: | --: |"
    return "\n".join([heading, *rows, "", f"Migrating anew takes {ratio:.1f} times as long as a copy."])


async def _drop(databases: FreshDatabases, url: ampd.DatabaseUrl) -> None:
    await databases.drop(url.database_or_default)


async def _tables(url: ampd.DatabaseUrl) -> int:
    connection = await asyncpg.connect(url.reveal())
    found: int = await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
    await connection.close()
    return found
