"""A rehearsal: what it says of locks and times, and that nothing of it is left."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

import ampd
from ampd import preview, source
from ampd.advisory_lock import lock_key
from ampd.apply import rehearsal, transaction_message
from ampd.apply.rehearsal_report import (
    HeldLock,
    Lock,
    Rehearsal,
    RehearsedMigration,
    SkippedMigration,
    Table,
    _spelt,
    held_locks,
)
from ampd.config import HISTORY_TABLE as TABLE
from tests.cli_output import document, error, plain, seen
from tests.folders import write
from tests.scenes import (
    GENEROUS,
    assert_no_trace,
    folder_of,
    meanwhile,
    report_at_once,
    skip_before,
    transaction,
    until,
)
from tests.servers import Ampd, Database, Role
from tests.test_psql_script import dump

pytestmark = pytest.mark.anyio

TABLES = """CREATE TABLE jobs (id int PRIMARY KEY, note text);
INSERT INTO jobs SELECT g, 'n' FROM generate_series(1, 1200) g;
CREATE TABLE nothing (id int); CREATE TABLE events (id int, note text); INSERT INTO events TABLE jobs; ANALYZE"""
FILES = {
    "1_column.sql": "ALTER TABLE jobs ADD COLUMN at timestamptz;\nALTER TABLE nothing ADD COLUMN at timestamptz;\n",
    "2_rewrite.sql": "ALTER TABLE jobs ALTER COLUMN id TYPE bigint;\nCREATE TABLE fresh (id int);\n",
    "3_outside.sql": "-- no-transaction\nCREATE INDEX CONCURRENTLY i ON jobs (note);\n",
    "4_index.sql": "CREATE INDEX ON events (id);\nTRUNCATE nothing;\n",
}
OUTSIDE = "it runs outside of a transaction, and cannot be rolled back"
BOTH = "reads and writes"


async def rehearsed(
    database: Database, path: Path, *texts: str, secs: float = GENEROUS, **migrations: object
) -> Rehearsal:
    """Rehearse migrations 1, 2, … with these texts."""
    folder_of(path / "m", *texts)
    return await preview.rehearse(configured(database, path, **migrations), secs=secs)


def configured(database: Database, path: Path, **migrations: object) -> ampd.MetadataDb:
    """Return the configuration for this database and these migrations."""
    policy = msgspec.convert({"dir": path / "m", **migrations}, ampd.Migrations)
    return ampd.MetadataDb(url=ampd.DatabaseUrl(database.url), migrations=policy)


def summary(found: Rehearsal) -> tuple[list[int], list[tuple[int, str]], str]:
    """Return the versions that ran, what was skipped and why, and the error."""
    ran = [each.version for each in found.migrations]
    return ran, [(each.version, each.reason) for each in found.skipped], plain(str(found.error or ""))


@pytest.mark.any_server
async def test_a_rehearsal_shows_locks_and_leaves_nothing(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """Locks, sizes, rewrites and what was skipped are shown; --strict fails on what blocks; pg_dump is as before."""
    await database.execute(TABLES)
    before = dump(database, data=True)
    write(tmp_path / "m", FILES)

    def run(*options: str) -> tuple[int, str, str]:
        return seen(ampd("migrate", "--rehearse", *options, "--migrations", "m", url=database.url))

    found = """\
DATABASE: rehearsed 3 migrations in N s, and rolled back
(after each migration: all locks that the one transaction held by then)
1 column: N ms
  ! holds ACCESS EXCLUSIVE on public.jobs (1.2 k rows, 48 kB) for N ms, blocks reads and writes
    holds ACCESS EXCLUSIVE on public.nothing (0 rows, 0 bytes) for N ms
2 rewrite: N ms
  ! holds ACCESS EXCLUSIVE on public.jobs (1.2 k rows, 48 kB) for N ms, rewritten or truncated, blocks reads and writes
    holds ACCESS EXCLUSIVE on public.nothing (0 rows, 0 bytes) for N ms
4 index: N ms
  ! holds SHARE on public.events (1.2 k rows, 48 kB) for N ms, blocks writes
  ! holds ACCESS EXCLUSIVE on public.jobs (1.2 k rows, 48 kB) for N ms, blocks reads and writes
    holds ACCESS EXCLUSIVE on public.nothing (0 rows, 0 bytes) for N ms, rewritten or truncated
3 outside: not rehearsed, it runs outside of a transaction, and cannot be rolled back
"""
    if database.server.major < 14:  # which cannot tell an empty table from one that was never analyzed
        found = found.replace("0 rows, 0", "rows unknown, 0")
        line = "holds ACCESS EXCLUSIVE on public.nothing (rows unknown, 0 bytes) for N ms, rewritten or truncated"
        found = found.replace(f"    {line}", f"  ! {line}, blocks reads and writes")
    assert run() == (0, found, "")
    assert run("--strict", "--quiet") == (1, "", "")
    assert dump(database, data=True) == before

    process = ampd("migrate", "--rehearse", "--json", "--target=1", "--migrations", "m", url=database.url)
    lock = {"mode": "ACCESS EXCLUSIVE", "rewritten": False}
    jobs = {"table": "public.jobs", "rows": 1200, "bytes": 49152, "blocks": BOTH}
    nothing = {"table": "public.nothing", "rows": 0 if database.server.major > 13 else None, "bytes": 0, "blocks": None}
    told = {"version": 1, "name": "column", "duration_ms": "…", "locks": [lock | jobs, lock | nothing]}
    assert document(process) == {"result": "rehearsed", "migrations": [told], "skipped": [], "error": None}
    assert (process.returncode, process.stderr) == (0, "")

    assert ampd("migrate", "--migrations", "m", url=database.url).returncode == 0
    assert run("--strict") == (0, "DATABASE: nothing to rehearse\n", "")


@pytest.mark.any_server
async def test_a_fault_is_told_as_by_a_run(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """What a migration would fail of is the same error; what ran before it is shown, and nothing is kept."""
    role = await database.role("plain", "CREATE, USAGE ON SCHEMA public")
    await database.execute("CREATE TABLE theirs (id int)")
    before = dump(database)
    write(tmp_path / "m", {"1_first.sql": "CREATE TABLE a (id int);\n", "2_second.sql": "SELECT 1;\nDROP TABLE aa;\n"})
    mine, theirs = (("migrate", "--migrations", folder) for folder in ("m", "n"))
    code, stdout, stderr = seen(ampd(*mine, "--rehearse", url=database.url))
    assert (code, stdout) == (1, "DATABASE: rehearsed 1 migration in N s, and rolled back\n1 first: N ms\n")
    assert stderr.startswith('error: m/2_second.sql:2: table "aa" does not exist (SQLSTATE 42P01)\n')
    process = ampd(*mine, "--rehearse", "--json", url=database.url)
    message = 'm/2_second.sql:2: table "aa" does not exist (SQLSTATE 42P01)'
    hint = "nothing of this migration was kept: fix the file and run again"
    facts = {"version": 2, "file": "m/2_second.sql", "line": 2, "column": 1, "sqlstate": "42P01"}
    assert document(process) == {
        "result": "failed",
        "migrations": [{"version": 1, "name": "first", "duration_ms": "…", "locks": []}],
        "skipped": [],
        "error": error("migration_failed", message, hint, **facts),
    }
    write(tmp_path / "n", {"1_first.sql": "ALTER TABLE theirs ADD COLUMN n int;\n"})
    refused = seen(ampd(*theirs, "--rehearse", url=role.url))
    assert dump(database) == before
    assert seen(ampd(*theirs, url=role.url)) == refused
    assert "must be owner of table theirs" in refused[2]
    assert seen(ampd(*mine, url=database.url)) == (1, "", f"[1/2] 1 first  N ms\n{stderr}")


@pytest.mark.one_version
def test_options_that_do_not_go_together_are_refused(ampd: Ampd) -> None:
    """Whoever mixes them is told before anything connects."""
    one_of = "error: --rehearse runs what is pending, and --check and --dry-run do not\nhint: give one of them\n"
    for other in ("--check", "--dry-run"):
        assert seen(ampd("migrate", "--rehearse", other)) == (1, "", one_of)
    for option in (["--strict"], ["--rehearse-secs", "2"]):
        alone = f"error: {option[0]} goes with --rehearse alone\nhint: `ampd migrate --rehearse {option[0]}`\n"
        assert seen(ampd("migrate", *option)) == (1, "", alone)
    for secs in ("0", "-1", "nan", "inf", "3601"):
        wrong = f"error: --rehearse-secs takes seconds up to 3600, not {secs}\n"
        assert seen(ampd("migrate", "--rehearse", f"--rehearse-secs={secs}")) == (1, "", wrong)


async def test_the_locks_are_those_that_others_see(database: Database, tmp_path: Path) -> None:
    """On each table that was there before, the strongest mode is the one that pg_locks shows from outside."""
    await database.execute(f"{TABLES}; CREATE TABLE parts (id int) PARTITION BY RANGE (id)")
    await database.execute(
        "CREATE TABLE part PARTITION OF parts FOR VALUES FROM (0) TO (9); CREATE TABLE gone (id int)"
    )
    script = """-- lock-timeout: 30s
CREATE TABLE fresh (id int REFERENCES jobs); CREATE INDEX ON events (id); INSERT INTO nothing SELECT id FROM events;
ALTER TABLE parts ADD COLUMN n int; DROP TABLE gone; SELECT pg_advisory_xact_lock(42)"""
    seen_from_outside = """SELECT DISTINCT c.oid::regclass::text AS name, l.mode
      FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_stat_activity a USING (pid)
      WHERE a.datname = current_database() AND a.application_name = 'ampd rehearsal'
        AND c.relkind IN ('r', 'p') AND c.relnamespace = 'public'::regnamespace AND c.relname <> $1"""
    waiting = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
    waiting += " WHERE d.datname = current_database() AND l.objid = 42 AND NOT l.granted"
    async with transaction(database, "SELECT pg_advisory_xact_lock(42)") as gate, asyncio.TaskGroup() as group:
        task = group.create_task(rehearsed(database, tmp_path, script))
        await until(lambda: database.fetchval(waiting))
        rows = await database.fetch(seen_from_outside, TABLE)
        status = await ampd.status(configured(database, tmp_path))
        await gate.execute("ROLLBACK")
    found = task.result()
    assert summary(found) == ([1], [], "")
    assert [info.state for info in status.plan.migrations] == [ampd.State.PENDING]  # nobody applies it
    others = {(f"public.{row['name']}", _spelt(row["mode"])) for row in rows}
    shown = {(lock.table, lock.mode) for lock in found.migrations[0].locks}
    assert shown <= others
    assert shown == {
        ("public.events", "SHARE"),
        ("public.gone", "ACCESS EXCLUSIVE"),
        ("public.jobs", "SHARE ROW EXCLUSIVE"),
        ("public.nothing", "ROW EXCLUSIVE"),
        ("public.part", "ACCESS EXCLUSIVE"),
        ("public.parts", "ACCESS EXCLUSIVE"),
    }
    assert {name for name, _ in others} == {name for name, _ in shown}


async def test_an_index_that_is_locked_for_more_than_its_table(database: Database, tmp_path: Path) -> None:
    """REINDEX INDEX blocks the writes of a table, and by the lock on its index each query that is planned."""
    await database.execute(TABLES)
    await database.execute("CREATE INDEX events_x ON events (id); CREATE INDEX nothing_x ON nothing (id)")
    found = await rehearsed(
        database, tmp_path, "UPDATE jobs SET id = id; REINDEX INDEX events_x", "REINDEX INDEX nothing_x"
    )
    first, second = ([(lock.table, lock.mode, lock.blocks) for lock in each.locks] for each in found.migrations)
    assert first == [
        ("index public.events_x", "ACCESS EXCLUSIVE", "reads and writes"),
        ("public.events", "SHARE", "writes"),
        ("public.jobs", "ROW EXCLUSIVE", None),
    ]
    assert [each for each in second if each not in first] == [
        ("index public.nothing_x", "ACCESS EXCLUSIVE", None),
        ("public.nothing", "SHARE", None),
    ]


async def test_what_cannot_be_rehearsed_is_named(database: Database, tmp_path: Path) -> None:
    """A value of an enum that is not committed, and what a skipped migration would have made, are no faults."""
    await database.execute("CREATE TYPE mood AS ENUM ('sad')")
    add, use = "ALTER TYPE mood ADD VALUE 'happy'", "CREATE TABLE t AS SELECT 'happy'::mood AS m"
    enum = "it uses an enum value that a migration before it adds, which has to be committed first"
    found = await rehearsed(database, tmp_path, add, use, "SELECT 1")
    assert summary(found) == ([1], [(2, enum), (3, "it comes after 2 step")], "")
    together = await rehearsed(database, tmp_path, f"{add};\n{use}", "SELECT 1", "SELECT 1")
    assert summary(together)[:2] == ([], [])
    assert together.error is not None
    assert together.error.message.startswith(f"{tmp_path}/m/1_step.sql:2: unsafe use of new value")
    outside = "-- no-transaction\nCREATE TABLE made (id int)"
    needs = await rehearsed(database, tmp_path, "SELECT 1", outside, "ALTER TABLE made ADD COLUMN n int")
    lacking = 'without 2 step the server says: relation "made" does not exist'
    assert summary(needs) == ([1], [(2, OUTSIDE), (3, lacking)], "")
    fault = await rehearsed(database, tmp_path, "SELECT 1", outside, "SELECT 1/0")
    assert summary(fault)[:2] == ([1], [(2, OUTSIDE)])
    assert fault.error is not None
    assert fault.error.sqlstate == "22012"


async def test_each_migration_begins_as_in_a_transaction_of_its_own(database: Database, tmp_path: Path) -> None:
    """Settings, temporary tables, locks and the state of constraints do not reach the next migration."""
    await database.execute(
        "CREATE TABLE one (id int CONSTRAINT same UNIQUE DEFERRABLE INITIALLY DEFERRED);"
        "CREATE TABLE other (id int CONSTRAINT same CHECK (id > 0))"
    )
    first = """CREATE TABLE early (id int PRIMARY KEY, other int REFERENCES early DEFERRABLE INITIALLY DEFERRED);
INSERT INTO early VALUES (1, 2); SET search_path = pg_catalog; SET lock_timeout = '7s'; CREATE TEMP TABLE tt ();
INSERT INTO public.early VALUES (2, 1); SET client_encoding = 'LATIN1'; PREPARE p AS SELECT 1;
SELECT pg_advisory_lock(7); SET ROLE pg_monitor"""
    second = """INSERT INTO early VALUES (3, 4); INSERT INTO early VALUES (4, 3); CREATE TEMP TABLE tt ();
PREPARE p AS SELECT 1; CREATE TABLE late (id int PRIMARY KEY, other int REFERENCES late DEFERRABLE INITIALLY DEFERRED);
INSERT INTO late VALUES (1, 2); INSERT INTO late VALUES (2, 1);
DO $$ BEGIN ASSERT current_setting('lock_timeout') = '1s' AND current_user = session_user;
ASSERT NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 7 AND pid = pg_backend_pid()); END $$"""
    assert summary(await rehearsed(database, tmp_path, first, second, "SELECT 'ß'")) == ([1, 2, 3], [], "")
    broken = await rehearsed(database, tmp_path, first, "SELECT 1", "INSERT INTO early VALUES (9, 10)")
    assert summary(broken)[:2] == ([1, 2], [])
    configuration = configured(database, tmp_path)
    with pytest.raises(ampd.MigrationFailed) as failure:
        await ampd.migrate(configuration)
    assert str(broken.error) == str(failure.value)


async def test_each_migration_finds_constraints_as_they_were_declared(
    database: Database, stranger: Role, tmp_path: Path
) -> None:
    """Also those that share their name with one that cannot be deferred, which anybody can make."""
    await database.execute(
        "CREATE TABLE p (id int PRIMARY KEY);"
        "CREATE TABLE c (id int CONSTRAINT fk REFERENCES p DEFERRABLE INITIALLY DEFERRED);"
        f"CREATE TABLE at_once (id int UNIQUE DEFERRABLE); GRANT CREATE ON SCHEMA public TO {stranger.name}"
    )
    async with database.connect(stranger.url) as other:
        await other.execute("CREATE TABLE theirs (id int CONSTRAINT fk CHECK (true))")
    texts = "INSERT INTO p VALUES (1); INSERT INTO c VALUES (1)", "INSERT INTO c VALUES (2); INSERT INTO p VALUES (2)"
    altered = "ALTER TABLE c ADD x int"
    found = await rehearsed(
        database, tmp_path, *texts, altered, "INSERT INTO at_once VALUES (1), (1); DELETE FROM at_once"
    )
    assert summary(found)[:2] == ([1, 2, 3], [])
    assert found.error is not None
    assert (found.error.version, found.error.sqlstate) == (4, "23505")


async def test_a_rehearsal_has_the_schema_of_a_run(database: Database, tmp_path: Path) -> None:
    """The configured schema is where each migration makes its tables, also behind a RESET of its own."""
    folder_of(tmp_path / "m", "CREATE TABLE one ();\nRESET ALL;\nCREATE TABLE two ()", "DROP TABLE app.one, app.two")
    found = await preview.rehearse(msgspec.structs.replace(configured(database, tmp_path), schema="app"))
    assert summary(found) == ([1, 2], [], "")


async def test_a_deferred_check_of_another_table_is_made(database: Database, tmp_path: Path) -> None:
    """What is deleted may be referred to by a table that nobody has touched: the end of its migration finds out."""
    await database.execute(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int REFERENCES a DEFERRABLE INITIALLY DEFERRED);"
        "INSERT INTO a VALUES (1); INSERT INTO b VALUES (1)"
    )
    found = await rehearsed(database, tmp_path, "DELETE FROM a", "SELECT 1")
    assert summary(found)[:2] == ([], [])
    assert found.error is not None
    assert (found.error.version, found.error.sqlstate) == (1, "23503")


async def test_a_rehearsal_ends_in_time(database: Database, tmp_path: Path) -> None:
    """It holds its locks no longer than it may, and is rolled back in the middle of a statement."""
    before = dump(database)
    found = await rehearsed(database, tmp_path, "CREATE TABLE t ();\nSELECT pg_sleep(60)", secs=0.5)
    ended = (
        "the rehearsal was ended after N ms, in 1 step: its locks stand in the way of others\n"
        "hint: everything was rolled back; --rehearse-secs takes another limit"
    )
    assert summary(found) == ([], [], ended)
    assert dump(database) == before


@pytest.mark.parametrize(
    "text",
    [
        "CREATE TABLE t ();\nSELECT pg_sleep(60)",
        "SET statement_timeout = 0; CREATE TABLE t ();\nSELECT pg_sleep(60)",
        "CREATE TABLE t ();" + "SELECT pg_sleep(0.9);" * 60,
    ],
    ids=["one statement", "own limit", "many statements"],
)
async def test_a_client_that_stands_still_is_given_up(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """The server ends the transaction by itself, in the middle of a message: nobody queues behind a frozen client."""
    take, held = rehearsal._Tracker.__call__, list[TimeoutError]()

    def stand_still(tracker: rehearsal._Tracker, note: str) -> None:
        take(tracker, note)
        if tracker.running == 1:
            try:
                meanwhile(lambda: until(lambda: no_locks(database)))
            except TimeoutError as error:
                held.append(error)

    monkeypatch.setattr(rehearsal._Tracker, "__call__", stand_still)
    found = await rehearsed(database, tmp_path, text, secs=0.5)
    assert held == []
    assert summary(found)[2].startswith("the rehearsal was ended after N ms, in 1 step")
    assert await database.fetchval("SELECT to_regclass('t') IS NULL")


async def no_locks(database: Database) -> bool:
    """Return whether no session of ampd holds a lock in the database."""
    locks = (
        "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database JOIN pg_stat_activity a USING (pid)"
    )
    found: int = await database.fetchval(f"{locks} WHERE d.datname = $1 AND application_name ~ '^ampd'", database.name)
    return found == 0


async def test_a_client_that_stands_still_between_two_migrations_is_given_up(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server does not wait for longer than there is time."""
    held = list[TimeoutError]()

    def stand_still(*_: object) -> tuple[()]:
        try:
            meanwhile(lambda: until(lambda: no_locks(database)))
        except TimeoutError as error:
            held.append(error)
        return ()

    monkeypatch.setattr(rehearsal, "held_locks", stand_still)
    found = await rehearsed(database, tmp_path, "CREATE TABLE t ()", "SELECT 1", secs=0.5)
    assert found.error is not None
    assert held == []
    assert await database.fetchval("SELECT to_regclass('t') IS NULL")


async def test_a_file_that_cannot_be_cancelled_loses_its_connection(database: Database, tmp_path: Path) -> None:
    """A rehearsal waits no longer for a server that does not end when it is told to."""
    skip_before(database, 14, "client_connection_check_interval")
    stubborn = "BEGIN PERFORM pg_sleep(60); EXCEPTION WHEN query_canceled THEN NULL; END"
    found = await rehearsed(
        database, tmp_path, f"CREATE TABLE t ();\nDO $$ BEGIN LOOP {stubborn}; END LOOP; END $$", secs=0.5
    )
    closed = (
        "the rehearsal was ended after N ms, in 1 step: its locks stand in the way of others\n"
        "hint: its statement did not end, so the connection was closed: the server rolls back once it notices; "
        "--rehearse-secs takes another limit"
    )
    assert summary(found) == ([], [], closed)
    await assert_no_trace(database)


async def test_a_rehearsal_that_is_stopped_leaves_nothing(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """Ctrl+C ends it in the middle of a statement."""
    before = dump(database)
    folder_of(tmp_path / "m", "CREATE TABLE t ();\nSELECT pg_sleep(60)")
    options = ("--rehearse", "--rehearse-secs=60", "--migrations", "m")
    process = ampd.start("migrate", *options, url=database.url)
    sleeps = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    await until(lambda: database.fetchval(sleeps))
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=GENEROUS) == ("", "SIGINT: nothing was applied\n")
    assert process.returncode == 130
    await assert_no_trace(database)
    assert dump(database) == before


async def test_a_table_lock_is_tried_once(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is not free in time ends the rehearsal, and the error says who has it."""
    report_at_once(monkeypatch)
    await database.execute(TABLES)
    async with transaction(database, "SELECT count(*) FROM jobs") as reader:
        found = await rehearsed(database, tmp_path, "DROP TABLE jobs", lock_timeout_secs=2)
        assert isinstance(found.error, ampd.LockTimeout)
        assert [each.pid for each in found.error.blockers] == [reader.get_server_pid()]
        assert "canceling statement due to lock timeout" in found.error.message


async def test_the_migration_lock_is_tried_once(database: Database, tmp_path: Path) -> None:
    """While another runner is at work, nothing is rehearsed, and the error says who it is."""
    key = lock_key("public", TABLE)
    async with transaction(database, f"SELECT pg_advisory_xact_lock({key})") as runner:
        found = await rehearsed(database, tmp_path, "SELECT 1")
    assert isinstance(found.error, ampd.AdvisoryLockTimeout)
    assert f"the migration lock is held by a session that is not ampd: pid {runner.get_server_pid()}," in str(
        found.error
    )


async def test_a_history_that_changes_meanwhile(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a runner or a person has written to it, nobody can tell."""
    await ampd.migrate(database.url, migrations=ampd.read_migrations(folder_of(tmp_path / "m", "SELECT 1")))
    rehearse = rehearsal.rehearse

    async def changed(*arguments: Any) -> Rehearsal:
        await database.execute(f"UPDATE {TABLE} SET version = 3")
        return await rehearse(*arguments)

    monkeypatch.setattr(rehearsal, "rehearse", changed)
    told = "another runner was at work meanwhile, or the history was changed by hand\nhint: run again"
    assert summary(await rehearsed(database, tmp_path, "SELECT 1", "SELECT 2")) == ([], [], told)


async def test_a_large_file_is_rehearsed_in_parts(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes in several messages of the transaction, with the same end as any other."""
    monkeypatch.setattr(transaction_message, "LARGE", 100)
    monkeypatch.setattr(transaction_message, "_PART", 50)
    many = "SELECT set_config('client_encoding', 'LATIN1', false);\n" + "".join(
        f"CREATE TABLE t{n} ();\n" for n in range(20)
    )
    many += "DO $$ BEGIN ASSERT length('ß') = 1; END $$"
    assert summary(await rehearsed(database, tmp_path, many, "SELECT 1")) == ([1, 2], [], "")


async def test_the_session_of_a_pool_is_as_before(database: Database) -> None:
    """What is packaged is rehearsed on a connection of a pool, and nothing stays: no prepared statement, no table."""
    async with asyncpg.create_pool(database.url, min_size=1, max_size=2) as pool:
        found = await preview.rehearse(pool, secs=GENEROUS)
        assert found.error is None
        assert len(found.migrations) > 5
        assert await pool.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE from_sql") == 0
    assert await database.fetchval("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == 0


async def test_a_session_of_the_callers_is_as_before(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each migration finds the settings of the session's owner, and what no rollback takes back is taken back."""
    finds = "DO $$ BEGIN ASSERT current_setting('work_mem') = '7MB'; END $$"
    fails = "PREPARE p AS SELECT 1;\nSELECT pg_advisory_lock(7);\nSELECT 1/0"
    packaged = folder_of(tmp_path / "m", "SET work_mem = '3MB'", finds, fails)
    monkeypatch.setattr(source, "_packaged", lambda: packaged)
    async with database.connect() as connection:
        await connection.execute("SET work_mem = '7MB'")
        found = await preview.rehearse(connection, secs=GENEROUS)
        assert summary(found)[:2] == ([1, 2], [])
        assert found.error is not None
        assert found.error.sqlstate == "22012"
        assert await connection.fetchval("SHOW work_mem") == "7MB"
        left = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        assert await connection.fetchval(left) == 0
        assert await connection.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE from_sql") == 0


async def test_the_reads_of_an_earlier_transaction_are_no_locks(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A serializable transaction of the caller's has left marks that pg_locks shows as the session's."""
    await database.execute("CREATE SCHEMA app; CREATE TABLE app.t (id int)")
    packaged = folder_of(tmp_path / "m", "ALTER TABLE app.t ADD x int")
    monkeypatch.setattr(source, "_packaged", lambda: packaged)
    serializable = "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT FROM"
    async with database.connect() as connection, database.connect() as other:
        await other.execute(f"{serializable} pg_class")
        await connection.execute(f"{serializable} app.t; COMMIT")
        found = await preview.rehearse(connection, secs=GENEROUS)
    assert summary(found) == ([1], [], "")
    assert [(lock.table, lock.mode) for lock in found.migrations[0].locks] == [("app.t", "ACCESS EXCLUSIVE")]


def test_a_size_that_is_not_known_is_not_that_of_an_empty_table() -> None:
    """What has no file, a table that is dropped or one of partitions, counts as full unless it is known to be empty."""
    for rows, blocks in ((-1, BOTH), (5, BOTH), (0, None)):
        tables = {1: Table(1, "dropped", False, 10, rows, 0), 2: Table(2, "parent", True, 0, rows, 0)}
        locks = [Lock(oid, "AccessExclusiveLock", file, None) for oid, file in ((1, None), (2, 0))]
        assert [each.blocks for each in held_locks(tables, {}, locks)] == [blocks, blocks]


def test_sizes_are_as_people_read_them() -> None:
    """Rows and bytes are short, and say so where the server does not know."""
    locks = [
        HeldLock("public.a", "SHARE", rows, size, rewritten=False, blocks="writes")
        for rows, size in ((None, 0), (1, 8192), (41_300_000, 12 * 2**30), (2_500_000_000, 3 * 2**40))
    ]
    found = Rehearsal("d", (RehearsedMigration(1, "a\nb", 180, tuple(locks)),), (SkippedMigration(2, "c", "why"),))
    assert (
        found.text()
        == """\
d: rehearsed 1 migration in 180 ms, and rolled back
1 a\\nb: 180 ms
  ! holds SHARE on public.a (rows unknown, 0 bytes) for 180 ms, blocks writes
  ! holds SHARE on public.a (1 row, 8 kB) for 180 ms, blocks writes
  ! holds SHARE on public.a (41 M rows, 12 GB) for 180 ms, blocks writes
  ! holds SHARE on public.a (2.5 G rows, 3 TB) for 180 ms, blocks writes
2 c: not rehearsed, why"""
    )
