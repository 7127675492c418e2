"""Many runners at once on one database: each migration runs once, everybody ends well, and nothing is left behind."""

import asyncio
import re
import subprocess
from pathlib import Path

import anyio
import pytest

import ampd as library
from ampd.migrator import overview
from tests.cli_output import plain
from tests.folders import write
from tests.libraries import MEMBERS, SHARED, Member
from tests.scenes import Heard, assert_no_trace, history, scripts
from tests.servers import Ampd, Database

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]

# Run twice, the second run would succeed and be seen.
RAN = "CREATE TABLE IF NOT EXISTS ran (version int); INSERT INTO ran VALUES ({});\n"
FILES = {
    "1_table.sql": RAN.format(1)
    + "CREATE TABLE IF NOT EXISTS t (x int); INSERT INTO t SELECT generate_series(1, 100);",
    "2_slow.sql": RAN.format(2) + "SELECT pg_sleep(0.2);",
    "3_index.sql": "-- no-transaction\n" + RAN.format(3) + "CREATE INDEX CONCURRENTLY i ON t (x);\nANALYZE t;\n",
    "4_last.sql": RAN.format(4),
}


def started(ampd: Ampd, database: Database, count: int, *folders: str) -> list[subprocess.Popen[str]]:
    """Start so many processes at once, on each of the folders in turn."""
    return [
        ampd.start("migrate", "--migrations", folders[number % len(folders)], url=database.url)
        for number in range(count)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Wait for the processes and return code, stdout and stderr of each."""
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


async def ran(database: Database) -> list[tuple[int, int]]:
    """Return how often each migration ran."""
    rows = await database.fetch("SELECT version, count(*) FROM ran GROUP BY 1 ORDER BY 1")
    return [tuple(row) for row in rows]


async def test_thirty_processes_on_an_empty_database(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """All exit 0, each migration ran once, told by one process, and no lock or session is left."""
    write(tmp_path / "m", FILES)
    results = ended(started(ampd, database, 30, "m"))
    assert [(code, err) for code, _, err in results if code] == []
    assert await ran(database) == [(1, 1), (2, 1), (3, 1), (4, 1)]
    assert [finished for _, finished, _ in await history(database)] == [True] * 4
    told = re.findall(r"^\[\d/\d\] (\d \w+)  N ms$", plain("".join(err for _, _, err in results)), re.MULTILINE)
    assert sorted(told) == ["1 table", "2 slow", "3 index", "4 last"]
    assert all("now at version" in out or "up to date, at version 4" in out for _, out, _ in results)
    assert await database.fetchval("SELECT indisvalid FROM pg_index WHERE indexrelid = 'i'::regclass")
    await assert_no_trace(database)


async def test_a_race_with_processes_of_the_release_before(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """Old and new replicas that start together all exit 0, and the schema is that of the newest."""
    write(tmp_path / "new", FILES)
    write(tmp_path / "old", {name: content for name, content in FILES.items() if name != "4_last.sql"})
    results = ended(started(ampd, database, 12, "old", "new"))
    assert [(code, err) for code, _, err in results if code] == []
    assert await ran(database) == [(1, 1), (2, 1), (3, 1), (4, 1)]
    for number, (_, out, err) in enumerate(results):
        if "ahead of this build" in out:
            assert number % 2 == 0
            assert "warning: the database is ahead of this build by 1 migration (newest: 4)" in err
    await assert_no_trace(database)


async def test_a_race_for_a_schema_that_is_missing(database: Database) -> None:
    """Runners that all have to create the schema, the table and the first objects create each once."""
    files = scripts("CREATE TABLE a ();", "CREATE TABLE b ();")
    reports: list[library.Report] = []

    async def run() -> None:
        reports.append(await library.migrate(database.url, migrations=files, schema="fresh"))

    for number in range(2):
        await database.execute("DROP SCHEMA IF EXISTS fresh CASCADE")
        reports.clear()
        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(run)
        applied = sorted(done.version for report in reports for done in report.applied)
        assert (number, applied, {report.current_version for report in reports}) == (number, [1, 2], {2})
    await assert_no_trace(database)


async def test_a_race_in_which_the_migration_fails(database: Database) -> None:
    """When the pending migration cannot succeed, each runner fails for itself, and none waits for ever or runs on."""
    files = scripts("CREATE TABLE a (x int);", "INSERT INTO a VALUES (1); SELECT pg_sleep(0.05); SELECT 1/0;")
    heard = [Heard() for _ in range(8)]
    outcomes = await asyncio.gather(
        *(library.migrate(database.url, migrations=files, on_event=each) for each in heard), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [library.MigrationFailed] * 8
    for each in heard:
        each.assert_adds_up()
        assert [event.version for event in each.of(library.Failed)] == [2]
    assert await database.fetchval("SELECT count(*) FROM a") == 0
    assert await history(database) == [(1, True, 1)]
    await assert_no_trace(database)


async def test_two_libraries_and_an_application_in_one_database(database: Database) -> None:
    """Histories of their own, in the same schema and in another, are migrated at once, whatever tables they share."""
    await database.execute(SHARED)

    async def run(member: Member) -> library.Report:
        files, schema, table = member.migrations, member.schema, member.table
        return await library.migrate(database.url, migrations=files, schema=schema, table=table, limits=HURRIED)

    reports = await asyncio.gather(*(run(MEMBERS[number % 3]) for number in range(9)))
    assert [report.current_version for report in reports] == [4] * 9
    assert sum(len(report.applied) for report in reports) == 4 * 3
    found = await overview(library.MetadataDb(url=library.DatabaseUrl(database.url)))
    assert {each.name: (each.applied, each.unfinished) for each in found.histories} == {
        member.history: (4, ()) for member in MEMBERS
    }
    assert await database.fetchval("SELECT bool_and(indisvalid) FROM pg_index WHERE indrelid = 'shared'::regclass")
    await assert_no_trace(database)


HURRIED = library.Limits(lock_timeout_secs=0.1, lock_retry_secs=120)
