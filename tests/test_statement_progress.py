"""How far a long statement is: told while it runs, by those who wait for it, and by `status`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import asyncpg
import pytest

import ampd as library
from ampd import Limits, Progressed, StatementProgress, Waiting
from tests.scenes import GENEROUS, Heard, report_at_once, scripts, skip_before, transaction, until
from tests.servers import Database, Role

pytestmark = pytest.mark.anyio

PATIENT = Limits(lock_timeout_secs=GENEROUS)
TABLE = """
CREATE TABLE t (x integer);
INSERT INTO t SELECT generate_series(1, 1000);
CREATE FUNCTION gate(x integer) RETURNS integer IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
  IF x = 500 THEN PERFORM pg_advisory_xact_lock(1); END IF;
  RETURN x;
END $$"""


@pytest.fixture
async def table(database: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    """A database with a table of five pages, and a function that waits at a row of the third."""
    report_at_once(monkeypatch)
    await database.execute(TABLE)
    return database


@asynccontextmanager
async def closed(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """Keep the gate closed."""
    async with transaction(database, "SELECT pg_advisory_xact_lock(1)") as keeper:
        yield keeper


@pytest.mark.parametrize(
    ("before", "statement", "told"),
    [
        ("SELECT", "CREATE INDEX ON t (gate(x))", "building index: scanning table 40 %"),
        (
            "SELECT",
            "-- no-transaction\nCREATE INDEX CONCURRENTLY i ON t (gate(x))",
            "building index: scanning table 40 %",
        ),
        ("CREATE INDEX i ON t (gate(x))", "-- no-transaction\nVACUUM FULL t", "VACUUM FULL: rebuilding index"),
        ("CREATE INDEX i ON t (gate(x))", "CLUSTER t USING i", "CLUSTER: rebuilding index"),
        ("CREATE INDEX i ON t (gate(x))", "ANALYZE t", "ANALYZE: computing statistics"),
    ],
    ids=["index", "concurrently", "vacuum full", "cluster", "analyze"],
)
async def test_a_long_statement_tells_how_far_it_is(table: Database, before: str, statement: str, told: str) -> None:
    """The server's phase and percent are an event, and the same is seen by another runner and by `status`."""
    await table.execute(before)
    heard, other, files = Heard(), Heard(), scripts(statement)
    async with closed(table) as keeper, anyio.create_task_group() as tasks:

        async def look() -> None:
            progressed = await heard.first(Progressed)
            assert str(progressed) == f"[1/1] 1 step: {told}"
            tasks.start_soon(lambda: library.migrate(table.url, migrations=files, on_event=other))
            waiting = await other.first(Waiting)
            assert str(waiting).endswith(f", {told}")
            (info,) = (await library.status(table.url, migrations=files)).plan.running
            assert info.runner is not None
            assert info.runner.progress == progressed.progress
            await keeper.execute("COMMIT")

        tasks.start_soon(look)
        await library.migrate(table.url, migrations=files, limits=PATIENT, on_event=heard)
    heard.assert_adds_up()


async def test_a_vacuum_tells_how_far_it_is(table: Database) -> None:
    """VACUUM counts the pages that it has read; here it waits for one that a cursor is on."""
    skip_before(table, 14, "VACUUM that waits there")
    heard = Heard()
    oldest = "pg_snapshot_xmin(pg_current_snapshot())::text::bigint"  # of all databases: no row after it can be frozen

    async def can_be_frozen() -> bool:
        return bool(await table.fetchval(f"SELECT {oldest} > (SELECT max(xmin::text::bigint) FROM t)"))

    await until(can_be_frozen)
    async with transaction(table, "DECLARE c CURSOR FOR SELECT FROM t", "MOVE 500 IN c") as keeper:

        async def look() -> None:
            assert str((await heard.first(Progressed)).progress) == "VACUUM: scanning heap 40 %"
            await keeper.execute("COMMIT")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look)
            files = scripts("-- no-transaction\nVACUUM (FREEZE) t")
            await library.migrate(table.url, migrations=files, on_event=heard)


async def test_a_copy_tells_how_far_it_is(table: Database, open_path: Path) -> None:
    """COPY counts bytes where the server knows how many there are, and rows else."""
    skip_before(table, 14, "pg_stat_progress_copy")
    (open_path / "rows").write_text("".join(f"{row:0199}\n" for row in range(1, 1001)))
    (open_path / "rows").chmod(0o644)
    for statement, told in (
        (f"COPY t FROM '{open_path}/rows' WHERE gate(x) > 0", "COPY FROM 65 %"),
        ("COPY (SELECT gate(x) FROM t) TO '/dev/null'", "COPY TO: 499 rows"),
    ):
        heard = Heard()
        async with closed(table) as keeper, anyio.create_task_group() as tasks:

            async def look(heard: Heard, keeper: asyncpg.Connection, told: str) -> None:
                assert str((await heard.first(Progressed)).progress) == told
                await keeper.execute("COMMIT")

            tasks.start_soon(look, heard, keeper, told)
            await library.migrate(
                table.url, migrations=scripts(statement), table=f"h{len(told)}", limits=PATIENT, on_event=heard
            )


async def test_the_progress_of_another_role_is_not_seen(table: Database, reader: Role) -> None:
    """The server hides it from whoever is not a member of that role; who is at it is seen all the same."""
    heard, files = Heard(), scripts("-- no-transaction\nCREATE INDEX CONCURRENTLY i ON t (gate(x))")
    async with closed(table) as keeper, anyio.create_task_group() as tasks:

        async def look() -> None:
            await heard.first(Progressed)
            (info,) = (await library.status(reader.url, migrations=files)).plan.running
            assert info.runner is not None
            assert (info.runner.user, info.runner.progress) == ("postgres", None)
            await keeper.execute("COMMIT")

        tasks.start_soon(look)
        await library.migrate(table.url, migrations=files, limits=PATIENT, on_event=heard)


def test_progress_in_words() -> None:
    """A phase, and a percentage where the server counts; what would move a cursor is not shown."""
    assert str(StatementProgress("building index: scanning table", 43)) == "building index: scanning table 43 %"
    assert str(StatementProgress("waiting for old\x1b snapshots")) == r"waiting for old\x1b snapshots"
