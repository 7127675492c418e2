"""No-transaction migrations: index builds among waiting runners, interruptions, and going on after them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import asyncpg
import pytest

import ampd as library
from ampd import (
    Blocked,
    LockRetry,
    LockTimeout,
    MigrationFailed,
    MigrationInterrupted,
    Planned,
    Report,
    Resolution,
    Starting,
    StatementStarted,
    Waiting,
    Warned,
)
from ampd.apply import guard, session_state, table_locks
from ampd.config import Limits
from ampd.events import Event
from ampd.resumption import done_checksum
from ampd.sql.splitter import split
from tests.scenes import (
    GENEROUS,
    Heard,
    ampds,
    assert_no_trace,
    building,
    end_backend,
    folder_of,
    history,
    indexes,
    meanwhile,
    scripts,
    skip_before,
    transaction,
    until,
    waiting_for_a_lock,
)
from tests.servers import Ampd, Database

pytestmark = pytest.mark.anyio

BUILD = "-- no-transaction\nCREATE INDEX CONCURRENTLY t_id ON t (id)"
OLD_SNAPSHOT = "SELECT FROM t"
GATE = "SELECT pg_advisory_xact_lock(1)"


@pytest.fixture
async def table(database: Database) -> Database:
    """A database with a table `t` of a few rows."""
    await database.execute("CREATE TABLE t (id integer); INSERT INTO t VALUES (1), (2), (3)")
    return database


@asynccontextmanager
async def killed_while_building(database: Database, ampd: Ampd, folder: Path) -> AsyncIterator[int]:
    """Kill the runner while its index build waits for an old snapshot; yield the backend that is left behind."""
    async with transaction(database, OLD_SNAPSHOT):
        process = ampd.start("migrate", "--migrations", folder, url=database.url)
        pid = await building(database)
        process.kill()
        process.communicate()
        yield pid


@pytest.mark.any_server
async def test_twenty_waiting_runners_do_not_deadlock_an_index_build(table: Database) -> None:
    """However many runners wait, the build waits for none of them, and one of them has applied it once."""
    reports = list[Report]()

    async def run() -> None:
        reports.append(await library.migrate(table.url, migrations=scripts(BUILD)))

    async with transaction(table, OLD_SNAPSHOT) as reader, anyio.create_task_group() as tasks:
        for _ in range(21):
            tasks.start_soon(run)
        await building(table)

        async def all_there() -> bool:
            return len(await ampds(table)) >= 22  # the guard is one more

        await until(all_there)
        await reader.execute("COMMIT")
    assert sorted(len(report.applied) for report in reports) == [0] * 20 + [1]
    assert await indexes(table) == [("t_id", True)]
    assert await history(table) == [(1, True, 1)]
    await assert_no_trace(table)


async def test_lock_timeout_does_not_apply_inside_a_build(table: Database) -> None:
    """Neither the role's lock_timeout nor ours interrupts a build that waits for a writer."""
    role = await table.role("migrator", "ALL ON SCHEMA public")
    await table.execute(f"ALTER ROLE {role.name} SET lock_timeout = '20ms'; ALTER TABLE t OWNER TO {role.name}")
    heard = Heard()
    limits = Limits(lock_timeout_secs=0.02, lock_retry_secs=60)
    async with transaction(table, "INSERT INTO t VALUES (4)") as writer, anyio.create_task_group() as tasks:

        async def free_it() -> None:
            await building(table)
            await heard.first(Blocked)
            await writer.execute("COMMIT")

        tasks.start_soon(free_it)
        await library.migrate(role.url, migrations=scripts(BUILD), limits=limits, on_event=heard)
    assert await indexes(table) == [("t_id", True)]
    assert not heard.of(LockRetry)
    assert not heard.of(Warned)
    assert [event.number for event in heard.of(StatementStarted)] == [1]
    heard.assert_adds_up()


@pytest.mark.parametrize("blocker", ["INSERT INTO t VALUES (4)", OLD_SNAPSHOT], ids=["writer", "old snapshot"])
async def test_a_build_that_waits_too_long_is_cancelled(table: Database, blocker: str) -> None:
    """After lock_retry_secs in the way of others the build is cancelled, says who blocked it, and resumes later."""
    limits = Limits(lock_retry_secs=1)
    async with transaction(table, blocker) as connection:
        with anyio.fail_after(GENEROUS), pytest.raises(LockTimeout) as raised:
            await library.migrate(table.url, migrations=scripts(BUILD), limits=limits)
        pid = connection.get_server_pid()
    error = raised.value
    assert error.message.startswith("1_step.sql:2: blocked by other sessions; gave up after ")
    assert f"\n  blocked by pid {pid}: user postgres, application ?, from 127.0.0.1, idle in tr" in error.message
    assert error.hint == (
        f"wait for the blocking transaction, or end it (pg_terminate_backend of {pid}), and run again; "
        "it is recorded as unfinished: fix the cause and run `ampd migrate` again; it resumes at this statement"
    )
    assert [each.pid for each in error.blockers] == [pid]
    assert await indexes(table) == [("t_id", False)]
    assert await history(table) == [(1, False, 0)]
    await library.migrate(table.url, migrations=scripts(BUILD))
    assert await indexes(table) == [("t_id", True)]
    assert await history(table) == [(1, True, 1)]


async def test_the_ruin_of_a_killed_build_is_cleared_away(table: Database, ampd: Ampd, tmp_path: Path) -> None:
    """After a kill in mid-build the next run drops the INVALID index, says so, builds it again and goes on."""
    files = (f"{BUILD}; INSERT INTO t VALUES (4); CREATE INDEX CONCURRENTLY t_more ON t (id, id)",)
    async with killed_while_building(table, ampd, folder_of(tmp_path / "files", *files)) as orphan:
        await end_backend(table, orphan)
        assert await indexes(table) == [("t_id", False)]
        assert await history(table) == [(1, False, 0)]
    heard = Heard()
    report = await library.migrate(table.url, migrations=scripts(*files), on_event=heard)
    assert [each.version for each in report.applied] == [1]
    assert [event.message for event in heard.of(Warned)] == [
        "dropping the INVALID index public.t_id that an interrupted run left"
    ]
    assert await indexes(table) == [("t_id", True), ("t_more", True)]
    assert await history(table) == [(1, True, 3)]
    assert await table.fetchval("SELECT count(*) FROM t") == 4
    heard.assert_adds_up()


async def test_a_build_that_goes_on_without_its_runner_is_waited_for(
    table: Database, ampd: Ampd, tmp_path: Path
) -> None:
    """While the server still builds for a runner that was killed, the next one waits, and then leaves the index be."""
    heard = Heard()
    async with killed_while_building(table, ampd, folder_of(tmp_path / "files", BUILD)) as orphan:
        built = "SELECT 't_id'::regclass::oid"
        oid = await table.fetchval(built)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: library.migrate(table.url, migrations=scripts(BUILD), on_event=heard))
            waiting = await heard.first(Waiting)
            assert (waiting.holder.pid, waiting.holder.migration) == (orphan, "1 step")
            assert await building(table) == orphan
            await table.fetchval("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_xmin IS NOT NULL"
                                 " AND state = 'idle in transaction' AND datname = current_database()")  # fmt: skip
    assert await table.fetchval(built) == oid
    assert not heard.of(Warned)
    assert await indexes(table) == [("t_id", True)]
    assert await history(table) == [(1, True, 1)]
    heard.assert_adds_up()


async def test_clearing_away_is_watched_like_a_build(table: Database, ampd: Ampd, tmp_path: Path) -> None:
    """Dropping an INVALID index may have to wait as well: that too is told, ends in time, and can be resumed."""
    async with killed_while_building(table, ampd, folder_of(tmp_path / "files", BUILD)) as orphan:
        await end_backend(table, orphan)
    heard = Heard()
    async with transaction(table, "INSERT INTO t VALUES (4)") as writer:
        limits = Limits(lock_retry_secs=1)
        with pytest.raises(LockTimeout) as raised:
            await library.migrate(table.url, migrations=scripts(BUILD), limits=limits, on_event=heard)
        assert [each.pid for each in raised.value.blockers] == [writer.get_server_pid()]
    assert heard.of(Blocked)
    await library.migrate(table.url, migrations=scripts(BUILD))
    assert await indexes(table) == [("t_id", True)]
    heard.assert_adds_up()


async def test_a_failed_unique_build_can_be_mended(table: Database) -> None:
    """Duplicates fail a unique build; once they are gone the next run clears its ruin away and completes."""
    files = scripts("-- no-transaction\nINSERT INTO t VALUES (3);\nCREATE UNIQUE INDEX CONCURRENTLY t_id ON t (id)")
    with pytest.raises(MigrationFailed) as raised:
        await library.migrate(table.url, migrations=files)
    assert (raised.value.sqlstate, raised.value.line, raised.value.detail) == (
        "23505",
        3,
        "Key (id)=(3) is duplicated.",
    )
    assert await history(table) == [(1, False, 1)]
    with pytest.raises(MigrationFailed, match="could not create unique index"):
        await library.migrate(table.url, migrations=files)
    await table.execute("DELETE FROM t WHERE ctid = (SELECT max(ctid) FROM t)")
    await library.migrate(table.url, migrations=files)
    assert await indexes(table) == [("t_id", True)]
    assert await history(table) == [(1, True, 2)]


async def test_an_invalid_index_of_somebody_else_is_no_success(table: Database) -> None:
    """IF NOT EXISTS is content with an INVALID index that stands there already; ampd is not."""
    await table.execute("INSERT INTO t VALUES (3)")
    with pytest.raises(Exception, match="could not create unique index"):
        await table.execute("CREATE UNIQUE INDEX CONCURRENTLY t_id ON t (id)")
    files = scripts("-- no-transaction\nCREATE INDEX CONCURRENTLY IF NOT EXISTS t_id ON t (id)")
    with pytest.raises(MigrationFailed) as raised:
        await library.migrate(table.url, migrations=files)
    assert raised.value.message == ("1_step.sql:2: index public.t_id exists and is INVALID: an earlier build failed")
    assert raised.value.hint == "DROP INDEX CONCURRENTLY public.t_id; then run `ampd migrate` again"


FAILING = "-- no-transaction\nINSERT INTO t VALUES (4);\nVACUUM t;\nSELECT 1 / 0;\nINSERT INTO t VALUES (5)"


async def stopped_at_the_third(database: Database) -> None:
    """Run a migration whose third statement fails."""
    with pytest.raises(MigrationFailed) as raised:
        await library.migrate(database.url, migrations=scripts(FAILING))
    assert (raised.value.line, raised.value.sqlstate) == (4, "22012")
    assert await history(database) == [(1, False, 2)]


async def test_a_statement_not_yet_done_may_be_edited(table: Database) -> None:
    """What failed may be mended in the file: the run goes on there, and repeats nothing before it."""
    await stopped_at_the_third(table)
    mended = scripts(FAILING.replace("1 / 0", "1 / 1").replace("(5)", "(6)"))
    await library.migrate(table.url, migrations=mended)
    assert [row["id"] for row in await table.fetch("SELECT id FROM t ORDER BY id")] == [1, 2, 3, 4, 6]
    assert await history(table) == [(1, True, 4)]
    checksum = await table.fetchval("SELECT checksum FROM ampd_schema_migrations")
    assert checksum == mended[0].checksum


@pytest.mark.parametrize(
    ("resolution", "rows"), [(Resolution.APPLIED, [1, 2, 3, 4]), (Resolution.ROLLED_BACK, [1, 2, 3, 4, 4, 5])]
)
async def test_a_statement_already_done_may_not(table: Database, resolution: Resolution, rows: list[int]) -> None:
    """When the done part has changed only a person can tell what is true, and the error holds the line to type."""
    await stopped_at_the_third(table)
    changed = scripts(FAILING.replace("INTO t", "INTO  t").replace("1 / 0", "1 / 1"))
    with pytest.raises(MigrationInterrupted) as raised:
        await library.migrate(table.url, migrations=changed)
    assert (raised.value.message, raised.value.code) == (
        "1 step was started and did not finish: 2 statements are recorded as done",
        "interrupted",
    )
    assert raised.value.hint is not None
    assert "`ampd resolve 1 --applied`" in raised.value.hint
    assert "`ampd resolve 1 --rolled-back`" in raised.value.hint
    await library.resolve(table.url, 1, resolution, migrations=changed)
    assert await table.fetchval("SELECT count(done_checksum) FROM ampd_schema_migrations") == 0
    report = await library.migrate(table.url, migrations=changed)
    assert len(report.applied) == (resolution is Resolution.ROLLED_BACK)
    assert [row["id"] for row in await table.fetch("SELECT id FROM t ORDER BY id")] == rows


@pytest.mark.parametrize(
    "opaque",
    [f"DO $$ BEGIN INSERT INTO t VALUES (4); COMMIT; PERFORM {GATE[7:]}; END $$", "CALL slow()"],
    ids=["DO", "CALL"],
)
async def test_a_killed_block_that_commits_by_itself_is_interrupted(
    table: Database, ampd: Ampd, tmp_path: Path, opaque: str
) -> None:
    """How far a DO block or a procedure came cannot be told: the next run waits for its end, and then asks a person."""
    await table.execute(
        f"CREATE PROCEDURE slow() LANGUAGE plpgsql AS 'BEGIN INSERT INTO t VALUES (4); COMMIT; PERFORM {GATE[7:]}; END'"
    )
    files, heard = (f"-- no-transaction\n-- lock-timeout: 0\n{opaque};\nINSERT INTO t VALUES (5)",), Heard()
    async with transaction(table, GATE) as gate:
        process = ampd.start("migrate", "--migrations", folder_of(tmp_path / "files", *files), url=table.url)
        (orphan,) = await waiting_for_a_lock(table)
        process.kill()
        process.communicate()
        async with anyio.create_task_group() as tasks:

            async def end_it() -> None:
                assert (await heard.first(Waiting)).holder.pid == orphan
                await gate.execute("COMMIT")

            tasks.start_soon(end_it)
            with pytest.raises(MigrationInterrupted, match="0 statements are recorded as done"):
                await library.migrate(table.url, migrations=scripts(*files), on_event=heard)
    assert await history(table) == [(1, False, 0)]
    assert await table.fetchval("SELECT max(id) FROM t") == 4
    heard.assert_adds_up()


async def test_an_explicit_transaction_succeeds_or_fails_as_one(table: Database) -> None:
    """From BEGIN to COMMIT a file's statements are one unit, recorded in that very transaction."""
    text = (
        "-- no-transaction\nINSERT INTO t VALUES (4);\nBEGIN;\nINSERT INTO t VALUES (5);\n"
        "SELECT 1 / 0;\nCOMMIT;\nVACUUM t"
    )
    with pytest.raises(MigrationFailed) as raised:
        await library.migrate(table.url, migrations=scripts(text))
    assert (raised.value.line, raised.value.sqlstate) == (5, "22012")
    assert await history(table) == [(1, False, 1)]
    assert await table.fetchval("SELECT max(id) FROM t") == 4
    heard = Heard()
    await library.migrate(table.url, migrations=scripts(text.replace("1 / 0", "1 / 1")), on_event=heard)
    assert await table.fetchval("SELECT array_agg(id ORDER BY id) FROM t") == [1, 2, 3, 4, 5]
    assert await history(table) == [(1, True, 6)]
    assert [(event.number, event.line) for event in heard.of(StatementStarted)] == [
        (2, 3), (3, 4), (4, 5), (5, 6), (6, 7),
    ]  # fmt: skip
    heard.assert_adds_up()


async def test_a_limit_that_the_file_sets_is_the_files_own(table: Database) -> None:
    """A file that sets lock_timeout has its way: the build is tried again, its ruin cleared away, until the limit."""
    files = scripts("-- no-transaction\nSET lock_timeout = '50ms';\nCREATE INDEX CONCURRENTLY t_id ON t (id)")
    heard = Heard()
    async with transaction(table, "INSERT INTO t VALUES (4)") as writer:
        limits = Limits(lock_retry_secs=0.5)
        with pytest.raises(LockTimeout) as raised:
            await library.migrate(table.url, migrations=files, limits=limits)
        assert (raised.value.sqlstate, raised.value.line) == ("55P03", 3)
        async with anyio.create_task_group() as tasks:

            async def free_it() -> None:
                await heard.first(LockRetry)
                await writer.execute("COMMIT")

            tasks.start_soon(free_it)
            await library.migrate(table.url, migrations=files, on_event=heard)
    assert await indexes(table) == [("t_id", True)]
    assert await history(table) == [(1, True, 2)]


@pytest.mark.parametrize("statement", ["ALTER TABLE t ADD more integer; SET lock_timeout = 0", "VACUUM FULL t"])
async def test_whoever_queues_behind_it_is_let_through(table: Database, statement: str) -> None:
    """What others would have to queue behind gives up its place after lock_timeout, whatever the file sets later on."""
    limits = Limits(lock_timeout_secs=0.1, lock_retry_secs=0.5)
    heard = Heard()
    async with transaction(table, "SELECT FROM t"):
        with anyio.fail_after(GENEROUS), pytest.raises(LockTimeout) as raised:
            await library.migrate(
                table.url, migrations=scripts(f"-- no-transaction\n{statement}"), limits=limits, on_event=heard
            )
    assert (raised.value.sqlstate, raised.value.line) == ("55P03", 2)
    heard.assert_adds_up()


async def test_a_detachment_waits_in_nobodys_way(table: Database) -> None:
    """DETACH PARTITION CONCURRENTLY, which a lock_timeout would leave half done, waits for whoever has read."""
    skip_before(table, 14, "DETACH PARTITION CONCURRENTLY")
    await table.execute(
        "CREATE TABLE p (id integer) PARTITION BY RANGE (id); CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (9)"
    )
    files = scripts("-- no-transaction\nALTER TABLE p DETACH PARTITION p1 CONCURRENTLY")
    heard = Heard()
    limits = Limits(lock_timeout_secs=0.02)
    async with transaction(table, "SELECT FROM p") as reader, anyio.create_task_group() as tasks:

        async def free_it() -> None:
            await heard.first(Blocked)
            await reader.execute("COMMIT")

        tasks.start_soon(free_it)
        with anyio.fail_after(GENEROUS):
            await library.migrate(table.url, migrations=files, limits=limits, on_event=heard)
    assert await history(table) == [(1, True, 1)]
    assert await table.fetchval("SELECT count(*) FROM pg_inherits") == 0
    heard.assert_adds_up()


@pytest.mark.parametrize("statement", ["REINDEX TABLE p", "REINDEX INDEX p_id", "CLUSTER p USING p_id"])
async def test_what_a_partitioned_table_refuses_in_a_transaction(table: Database, statement: str) -> None:
    """Only the server can tell that a table is partitioned: what runs outside of a transaction for one, always does."""
    skip_before(table, 15 if "CLUSTER" in statement else 14, statement)
    await table.execute(
        "CREATE TABLE p (id integer) PARTITION BY RANGE (id); CREATE INDEX p_id ON p (id);"
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (9)"
    )
    await library.migrate(table.url, migrations=scripts(f"-- no-transaction\n{statement}; {statement}"))
    assert await history(table) == [(1, True, 2)]


PARTED = (
    "CREATE TABLE p (id integer, data jsonb) PARTITION BY RANGE (id); CREATE INDEX p_id ON p (id);"
    "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (9)"
)


@pytest.mark.parametrize(
    ("statement", "hint"),
    [
        (
            "CREATE INDEX CONCURRENTLY p_more ON ONLY p (id)",
            "an index on a partitioned table is built in parts: CREATE INDEX … ON ONLY the table, then for each "
            "partition CREATE INDEX CONCURRENTLY and ALTER INDEX … ATTACH PARTITION; ",
        ),
        (
            "DROP INDEX CONCURRENTLY p_id",
            "an index on a partitioned table is dropped with those of its partitions, and only without CONCURRENTLY; ",
        ),
        (
            "CREATE UNIQUE INDEX CONCURRENTLY p1_more ON p1 USING hash (id)",
            "this server does not support it: check its version and extensions; ",
        ),
    ],
)
async def test_what_a_partitioned_table_refuses_concurrently(table: Database, statement: str, hint: str) -> None:
    """The way that there is instead is told, for whoever has a partitioned table and only for them."""
    await table.execute(PARTED)
    with pytest.raises(library.MigrationFailed) as caught:
        await library.migrate(table.url, migrations=scripts(f"-- no-transaction\n{statement}"))
    assert (caught.value.hint or "").startswith(hint)


async def test_the_way_to_index_a_partitioned_table_works(table: Database) -> None:
    """What the hint says is a migration that leaves a valid index, on the parent too."""
    await table.execute(PARTED)
    way = (
        "-- no-transaction\nCREATE INDEX p_more ON ONLY p (id);\nCREATE INDEX CONCURRENTLY p1_more ON p1 (id);\n"
        "ALTER INDEX p_more ATTACH PARTITION p1_more;"
    )
    await library.migrate(table.url, migrations=scripts(way))
    assert ("p_more", True) in await indexes(table, "p")


async def test_an_index_without_a_name_is_told_before_it_is_built(table: Database) -> None:
    """A person who has to look after every interruption is told so in time, with the name to give it."""
    heard = Heard()
    await library.migrate(
        table.url, migrations=scripts("-- no-transaction\nCREATE INDEX CONCURRENTLY ON t (id)"), on_event=heard
    )
    assert [event.message for event in heard.of(Warned)] == [
        "1_step.sql:2: CREATE INDEX CONCURRENTLY without a name cannot be resumed where it is interrupted: a person "
        "has to look; give it a name, such as t_id_idx"
    ]
    assert [type(event) for event in heard[:3]] == [Planned, Warned, Starting]
    heard.assert_adds_up()


@pytest.mark.any_server
async def test_the_guard_is_in_nobodys_way(table: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look from the guard's session, for want of another one, leaves no lock that the migration could wait for."""
    monkeypatch.setattr(table_locks, "_ANSWER_SECS", 0.1)
    heard = Heard()
    limits = Limits(lock_timeout_secs=8)
    async with (
        asyncpg.create_pool(table.url, min_size=2, max_size=2) as pool,
        transaction(table, "SELECT FROM pg_am") as reader,
        anyio.create_task_group() as tasks,
    ):

        async def free_it() -> None:
            assert (await heard.first(Blocked)).blockers[0].pid == reader.get_server_pid()
            await reader.execute("COMMIT")

        tasks.start_soon(free_it)
        files = scripts("-- no-transaction\nVACUUM FULL pg_am; VACUUM FULL pg_database; VACUUM FULL pg_authid")
        with anyio.fail_after(GENEROUS):
            await library.migrate(pool, migrations=files, limits=limits, on_event=heard)
    heard.assert_adds_up()


async def test_a_plan_made_from_an_older_history_is_made_anew(table: Database) -> None:
    """A runner that has looked while another one was in the middle does not repeat what that one does meanwhile."""
    await stopped_at_the_third(table)
    mended = scripts(FAILING.replace("1 / 0", "1 / 1"))
    begun = done_checksum(split(mended[0].sql)[:2])
    earlier = f"statements_done = 0, done_checksum = NULL, checksum = '\\x{mended[0].checksum.hex()}'"
    later = f"statements_done = 2, done_checksum = '\\x{begun.hex()}'"
    await table.execute(f"UPDATE ampd_schema_migrations SET {earlier}")

    def on_event(event: Event) -> None:
        if isinstance(event, Planned) and not heard:  # it has planned, and is about to take the lock
            meanwhile(lambda: table.execute(f"UPDATE ampd_schema_migrations SET {later}"))
        heard(event)

    heard = Heard()
    await library.migrate(table.url, migrations=mended, on_event=on_event)
    assert [event.resumed_at for event in heard.of(Starting)] == [2]
    heard.assert_adds_up()
    assert await table.fetchval("SELECT array_agg(id ORDER BY id) FROM t") == [1, 2, 3, 4, 5]
    assert await history(table) == [(1, True, 4)]


async def test_what_a_file_has_set_holds_when_it_is_resumed(table: Database) -> None:
    """A SET in the done part is repeated for what is still to be run."""
    await table.execute("CREATE SCHEMA other")
    text = "-- no-transaction\nSET search_path = other;\nSELECT 1 / 0;\nCREATE TABLE made ()"
    with pytest.raises(MigrationFailed):
        await library.migrate(table.url, migrations=scripts(text), schema="public")
    await library.migrate(table.url, migrations=scripts(text.replace("1 / 0", "1 / 1")), schema="public")
    assert await table.fetchval("SELECT to_regclass('other.made')::text") == "other.made"


@pytest.mark.parametrize(
    ("statement", "left"),
    [
        ("CREATE INDEX CONCURRENTLY t_new ON t (id)", [("t_id", True), ("t_new", True)]),
        ("DROP INDEX CONCURRENTLY t_id", []),
        ("REINDEX INDEX CONCURRENTLY t_id", [("t_id", True)]),
    ],
)
async def test_what_runs_concurrently_is_resumed(
    table: Database, ampd: Ampd, tmp_path: Path, statement: str, left: list[tuple[str, bool]]
) -> None:
    """Killed while it waits, each concurrent statement ends at the next run as if nothing had happened."""
    await table.execute("CREATE INDEX t_id ON t (id)")
    files = (f"-- no-transaction\n{statement}",)
    async with transaction(table, OLD_SNAPSHOT):
        process = ampd.start("migrate", "--migrations", folder_of(tmp_path / "files", *files), url=table.url)
        (orphan,) = await waiting_for_a_lock(table)
        process.kill()
        process.communicate()
        await end_backend(table, orphan)
    await library.migrate(table.url, migrations=scripts(*files))
    assert await indexes(table) == left
    assert await history(table) == [(1, True, 1)]


async def test_the_roles_transaction_timeout_does_not_end_the_guard(database: Database) -> None:
    """A guard may sit in its transaction for longer than the role's transactions may last."""
    skip_before(database, 17, "transaction_timeout")
    await database.execute(f"ALTER DATABASE {database.name} SET transaction_timeout = '300ms'")
    two_steps = "-- no-transaction\nCALL patience();\nCREATE TABLE done ();\n"
    procedure = (
        "CREATE PROCEDURE patience() LANGUAGE plpgsql AS $$ BEGIN\n"
        "  FOR turn IN 1..5 LOOP PERFORM pg_sleep(0.1); COMMIT; END LOOP;\nEND $$;\n"
    )
    report = await library.migrate(database.url, migrations=scripts(procedure, two_steps))
    assert report.current_version == 2


@pytest.mark.any_server
async def test_a_statement_may_outlast_the_lease_of_its_guard(table: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard's heartbeat keeps its transaction, and with it the lock."""
    monkeypatch.setattr(session_state, "LEASE_SECS", 2)
    monkeypatch.setattr(guard, "_HEARTBEAT_SECS", 0.1)
    await table.execute("CREATE PROCEDURE slow() LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(3); END'")
    report = await library.migrate(table.url, migrations=scripts("-- no-transaction\nCALL slow(); VACUUM t"))
    assert len(report.applied) == 1
