"""Migrations that travel together: each stays a transaction, whatever becomes of the others."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import anyio
import asyncpg
import pytest

import ampd
from ampd import Limits, LockTimeout, Migration, MigrationFailed, Report, Starting
from ampd.advisory_lock import lock_key
from ampd.apply import batch, session_state, transaction_message
from ampd.apply import transaction as applying_in_transactions
from ampd.apply.background import in_background
from ampd.apply.batch import Batch
from ampd.apply.message import Message
from ampd.apply.tracker import BatchTracker
from ampd.config import HISTORY_TABLE as TABLE
from ampd.postgres import connection
from ampd.postgres.connection import Session
from ampd.sql.slices import Slices
from tests.scenes import (
    Heard,
    assert_no_trace,
    blind_to_problems,
    end_backend,
    history,
    meanwhile,
    never_look,
    report_at_once,
    scripts,
    transaction,
    waiting_for_a_lock,
)
from tests.servers import Database, Proxy

pytestmark = pytest.mark.anyio


def tables(count: int) -> tuple[Migration, ...]:
    """Return migrations that each create a table, t1 and so on."""
    return scripts(*(f"CREATE TABLE t{number} ();" for number in range(1, count + 1)))


def with_third(files: Sequence[Migration], sql: str) -> tuple[Migration, ...]:
    """Return the migrations with another one in the third place."""
    return (*files[:2], *scripts("", "", sql)[2:], *files[3:])


async def applied(database: Database) -> list[int]:
    """Return the versions that the history has as finished."""
    rows = await database.fetch("SELECT version FROM ampd_schema_migrations WHERE finished_at IS NOT NULL ORDER BY 1")
    return [row["version"] for row in rows]


BROKEN = {
    "at run time": ("SELECT 1;\nSELECT 1/0;", 2, "division by zero"),
    "while it is read": ("SELECT 1;\nSELEKT 2;", 2, 'syntax error at or near "SELEKT"'),
    "at the end": (
        "CREATE TABLE p (id int PRIMARY KEY);\n"
        "CREATE TABLE c (id int REFERENCES p DEFERRABLE INITIALLY DEFERRED);\nINSERT INTO c VALUES (1);",
        None,
        "violates foreign key constraint",
    ),
}


@pytest.mark.parametrize("source", ["url", "pool"])
@pytest.mark.parametrize("broken", BROKEN)
async def test_an_error_leaves_exactly_those_before_it(database: Database, broken: str, source: str) -> None:
    """Wherever the server notices it, with the line in the right file; and the next run goes on from there."""
    sql, line, message = BROKEN[broken]
    files, heard = tables(5), Heard()
    async with asyncpg.create_pool(database.url, min_size=1) as pool:
        with pytest.raises(MigrationFailed, match=message) as failure:
            await ampd.migrate(
                database.url if source == "url" else pool, migrations=with_third(files, sql), on_event=heard
            )
        assert (failure.value.version, failure.value.line) == (3, line)
        assert [each.version for each in heard.of(ampd.Applied)] == [1, 2]
        # One that the server cannot read has never started.
        assert [each.version for each in heard.of(ampd.Failed)] == ([] if "SELEKT" in sql else [3])
        assert await applied(database) == [1, 2]
        report = await ampd.migrate(database.url if source == "url" else pool, migrations=files)
    assert [each.version for each in report.applied] == [3, 4, 5]


async def test_a_lock_timeout_leaves_those_before_it_and_is_tried_again(database: Database) -> None:
    """The ones before it are committed, and the ones after it follow when the lock is free."""
    await database.execute("CREATE TABLE busy ()")
    files, heard = with_third(tables(5), "ALTER TABLE busy ADD COLUMN a int"), Heard()
    async with transaction(database, "SELECT FROM busy") as reader, anyio.create_task_group() as tasks:

        async def run() -> None:
            await ampd.migrate(database.url, migrations=files, limits=Limits(lock_timeout_secs=0.1), on_event=heard)

        tasks.start_soon(run)
        assert (await heard.first(ampd.LockRetry)).version == 3
        assert await applied(database) == [1, 2]
        await reader.execute("COMMIT")
    assert await applied(database) == [1, 2, 3, 4, 5]
    assert [each.version for each in heard.of(ampd.Applied)] == [1, 2, 3, 4, 5]


async def test_a_lock_that_stays_taken_ends_the_run_there(database: Database) -> None:
    """The error names the third, and the first two stay."""
    await database.execute("CREATE TABLE busy ()")
    files = with_third(tables(5), "ALTER TABLE busy ADD COLUMN a int")
    async with transaction(database, "SELECT FROM busy"):
        with pytest.raises(LockTimeout) as failure:
            await ampd.migrate(
                database.url, migrations=files, limits=Limits(lock_timeout_secs=0.1, lock_retry_secs=0.3)
            )
    assert failure.value.version == 3
    assert await applied(database) == [1, 2]


async def test_a_connection_lost_in_the_middle_leaves_whole_migrations(database: Database) -> None:
    """What was reported is there; what was running is not."""
    files, heard = with_third(tables(5), "SELECT pg_advisory_xact_lock(4711)"), Heard()
    async with transaction(database, "SELECT pg_advisory_xact_lock(4711)"), anyio.create_task_group() as tasks:

        async def run() -> None:
            with pytest.raises(ampd.ConnectionFailed) as failure:
                await ampd.migrate(database.url, migrations=files, limits=Limits(lock_timeout_secs=0), on_event=heard)
            assert failure.value.version == 3

        tasks.start_soon(run)
        (worker,) = await waiting_for_a_lock(database)
        await end_backend(database, worker)
    assert await applied(database) == [1, 2] == [each.version for each in heard.of(ampd.Applied)]


async def test_cancelled_in_the_middle_it_says_how_far_it_came(database: Database) -> None:
    """The one that runs is rolled back; the report has those before it."""
    files, heard = with_third(tables(5), "SELECT pg_advisory_xact_lock(4711)"), Heard()
    async with transaction(database, "SELECT pg_advisory_xact_lock(4711)"):
        async with anyio.create_task_group() as tasks:

            async def run() -> None:
                await ampd.migrate(database.url, migrations=files, limits=Limits(lock_timeout_secs=0), on_event=heard)

            tasks.start_soon(run)
            await waiting_for_a_lock(database)
            tasks.cancel_scope.cancel()
        (stopped,) = heard.of(ampd.Stopped)
    assert stopped.confirmed
    assert [each.version for each in stopped.report.applied] == [1, 2] == await applied(database)


@pytest.mark.parametrize(
    "sql",
    [
        "DEALLOCATE ALL",
        "DO 'BEGIN EXECUTE ''DEALLOCATE ALL''; END'",
        "DO $$ BEGIN DEALLOCATE ALL; END $$",
        "DO $$ BEGIN EXECUTE (SELECT 'DEALLOCATE ' || name FROM pg_prepared_statements WHERE name ~ 'begin'); END $$",
    ],
)
async def test_a_script_may_drop_prepared_statements(database: Database, sql: str) -> None:
    """Ours among them: what they would have done is done without them."""
    files = with_third(tables(5), f"CREATE TABLE once (); {sql};")
    report = await ampd.migrate(database.url, migrations=files)
    assert [each.version for each in report.applied] == [1, 2, 3, 4, 5] == await applied(database)
    assert await history(database) == [(version, True, 2 if version == 3 else 1) for version in range(1, 6)]


@pytest.mark.one_version
async def test_row_level_security_on_the_history_costs_no_message(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a platform has switched it on, nothing is prepared that could only find that out."""
    never_look(monkeypatch)
    await ampd.migrate(database.url, migrations=tables(1))
    await database.execute("ALTER TABLE ampd_schema_migrations ENABLE ROW LEVEL SECURITY")
    async with Proxy(database.server.host, database.server.port) as proxy:
        url = f"postgresql://postgres@{proxy.host}:{proxy.port}/{database.name}"
        await ampd.migrate(url, migrations=tables(4))
        assert proxy.round_trips == 1 + 1
    assert await applied(database) == [1, 2, 3, 4]


@pytest.mark.one_version
@pytest.mark.parametrize("change", ["DEALLOCATE ALL", "GRANT SELECT ON ALL TABLES IN SCHEMA public TO PUBLIC"])
async def test_a_connection_that_does_not_roll_back_between_two_messages_is_replaced(
    database: Database, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """What is left of the batch goes over another one."""
    monkeypatch.setattr(connection, "close_timeout", lambda: 0.01)
    async with Proxy(database.server.host, database.server.port, delay=0.02) as line:
        url = f"postgresql://postgres@{line.host}:{line.port}/{database.name}"
        await ampd.migrate(url, migrations=with_third(tables(5), change))
    assert await applied(database) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "change",
    ["GRANT SELECT ON ALL TABLES IN SCHEMA public TO PUBLIC", "PREPARE mine AS SELECT 1", "DEALLOCATE ALL"],
)
async def test_a_script_that_ends_with_the_whole_check_is_not_run_again(database: Database, change: str) -> None:
    """A prepared statement fails; then the whole check finds nothing wrong."""
    await database.execute("CREATE SEQUENCE runs")
    await ampd.migrate(database.url, migrations=with_third(tables(5), f"SELECT nextval('runs'); {change}"))
    assert await applied(database) == [1, 2, 3, 4, 5]
    assert await database.fetchval("SELECT last_value FROM runs") == 1


@pytest.mark.parametrize("source", ["url", "pool"])
async def test_a_script_that_sets_another_encoding_ends_with_the_whole_check_as_well(
    database: Database, source: str
) -> None:
    """Nobody could set the driver's own between the prepared statement that fails and the savepoint."""
    hidden = "SELECT set_config('client_' || 'encoding', 'LATIN1', false)"
    files = with_third(tables(4), f"{hidden}; GRANT SELECT ON ALL TABLES IN SCHEMA public TO PUBLIC")
    async with asyncpg.create_pool(database.url, min_size=1, max_size=1) as pool:
        await ampd.migrate(database.url if source == "url" else pool, migrations=files)
    assert await applied(database) == [1, 2, 3, 4]


async def test_a_deferred_trigger_that_misses_a_table_has_its_own_error(database: Database) -> None:
    """It is refused with the SQLSTATE of a history that is gone, before the end has begun."""
    deferred = """CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN DELETE FROM nowhere; END';
        CREATE CONSTRAINT TRIGGER late AFTER INSERT ON t1 DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
        EXECUTE FUNCTION f(); INSERT INTO t1 DEFAULT VALUES"""
    with pytest.raises(MigrationFailed, match='relation "nowhere" does not exist') as failure:
        await ampd.migrate(database.url, migrations=with_third(tables(5), deferred))
    assert failure.value.version == 3
    assert await applied(database) == [1, 2]


async def test_scripts_do_not_see_what_others_have_prepared(database: Database) -> None:
    """Two migrations of one message may prepare a statement of the same name."""
    files = scripts("PREPARE mine AS SELECT 1", "PREPARE mine AS SELECT 2", "EXECUTE mine")
    with pytest.raises(MigrationFailed, match='prepared statement "mine" does not exist') as failure:
        await ampd.migrate(database.url, migrations=files)
    assert failure.value.version == 3


async def test_a_script_may_leave_a_savepoint_open_and_statements_prepared(database: Database) -> None:
    """The row that is marked as finished in the savepoint is still the one of this transaction."""
    files = with_third(tables(4), "SAVEPOINT here; PREPARE mine AS SELECT 1")
    await ampd.migrate(database.url, migrations=files)
    assert await history(database) == [(version, True, 2 if version == 3 else 1) for version in range(1, 5)]


async def test_nothing_is_left_on_a_connection_of_the_callers_pool(database: Database) -> None:
    """No prepared statement and no setting, whether it ends well or not."""
    async with asyncpg.create_pool(database.url, min_size=1, max_size=1) as pool:
        await ampd.migrate(pool, migrations=tables(3)[:2])
        with pytest.raises(MigrationFailed):
            await ampd.migrate(pool, migrations=with_third(tables(4), "SELECT 1/0"))
        left = await pool.fetch("SELECT name FROM pg_prepared_statements WHERE from_sql")
        name = await pool.fetchval("SELECT current_setting('application_name')")
    assert (left, name) == ([], "")


async def test_a_session_says_which_migration_it_is_at(database: Database) -> None:
    """By its application_name, which every role can see."""
    files = with_third(tables(4), "SELECT pg_advisory_xact_lock(4711)")
    gate = transaction(database, "SELECT pg_advisory_xact_lock(4711)")
    async with gate as holder, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: ampd.migrate(database.url, migrations=files, limits=Limits(lock_timeout_secs=0)))
        (worker,) = await waiting_for_a_lock(database)
        name = await database.fetchval("SELECT application_name FROM pg_stat_activity WHERE pid = $1", worker)
        await holder.execute("COMMIT")
    assert name == "ampd 3 3/4"


@pytest.mark.one_version
async def test_a_message_has_a_size(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is longer takes another round trip, and no more than that."""
    never_look(monkeypatch)
    monkeypatch.setattr(batch, "LONGEST_MESSAGE", 10 * (batch.ENVELOPE + 30))
    async with Proxy(database.server.host, database.server.port) as proxy:
        url = f"postgresql://postgres@{proxy.host}:{proxy.port}/{database.name}"
        await ampd.migrate(url, migrations=tables(25))
        assert proxy.round_trips == 1 + 3
    assert await applied(database) == list(range(1, 26))


@pytest.mark.one_version
async def test_the_next_message_is_composed_while_the_server_is_at_work(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the answer to the one before it, which would be time lost."""
    steps: list[str] = []
    run, composing = Session.run, transaction_message.composing

    async def observed(session: Session, message: str, **options: Any) -> None:
        await run(session, message, **options)
        steps.append("answered")

    def composed(session: Session, batch: Batch, numbers: range, *rest: Any) -> Slices[Message]:
        steps.append(f"composing {numbers.start}")
        return composing(session, batch, numbers, *rest)

    monkeypatch.setattr(Session, "run", observed)
    monkeypatch.setattr(applying_in_transactions, "composing", composed)
    monkeypatch.setattr(batch, "LONGEST_MESSAGE", 2 * (batch.ENVELOPE + 30))
    await ampd.migrate(database.url, migrations=tables(6))
    first = steps.index("composing 0")
    assert steps[first:] == ["composing 0", "composing 2", "answered", "composing 4", "answered", "answered"]


@pytest.mark.one_version
@pytest.mark.parametrize("change", ["DEALLOCATE ALL", "GRANT SELECT ON ALL TABLES IN SCHEMA public TO PUBLIC"])
@pytest.mark.parametrize("where", [1, 2, 3, 4])
async def test_a_message_that_was_composed_for_another_case_is_not_sent(
    database: Database, monkeypatch: pytest.MonkeyPatch, change: str, where: int
) -> None:
    """Where a message has ended early, the next one begins at another migration, and with the whole check."""
    monkeypatch.setattr(batch, "LONGEST_MESSAGE", 2 * (batch.ENVELOPE + 80))
    files = scripts(*(f"CREATE TABLE t{number} (); {change if number == where else ''}" for number in range(1, 7)))
    await ampd.migrate(database.url, migrations=files)
    assert await applied(database) == list(range(1, 7))


@pytest.mark.one_version
@pytest.mark.parametrize("whole", [False, True])
async def test_what_a_migration_adds_to_a_message_is_small(
    database: Database, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """The first one carries what the others use; where nothing can be prepared, each has a message's share of it."""
    sent: list[int] = []
    run = Session.run

    async def measured(session: Session, message: str, **options: Any) -> None:
        sent.append(len(message.encode()))
        await run(session, message, **options)

    await ampd.migrate(database.url, migrations=tables(1))
    if whole:
        await database.execute("ALTER TABLE ampd_schema_migrations ENABLE ROW LEVEL SECURITY")
    monkeypatch.setattr(Session, "run", measured)
    await ampd.migrate(database.url, migrations=tables(51))
    scripts_alone = sum(len(file.sql) for file in tables(51)[1:])
    assert (sent[-1] - scripts_alone) / 50 < (batch.WHOLE_ENVELOPE if whole else batch.ENVELOPE)


@pytest.mark.one_version
@pytest.mark.parametrize(
    ("change", "count"),
    [("DEALLOCATE ALL", 1), ("GRANT SELECT ON ALL TABLES IN SCHEMA public TO PUBLIC", 8)],
)
async def test_a_message_is_not_sent_again_and_again(
    database: Database, monkeypatch: pytest.MonkeyPatch, change: str, count: int
) -> None:
    """However many migrations let the history be looked at anew: the rest goes once more, with the whole check."""
    never_look(monkeypatch)
    files = scripts(*(f"CREATE TABLE t{number} (); {change if number <= count else ''}" for number in range(1, 9)))
    async with Proxy(database.server.host, database.server.port) as proxy:
        url = f"postgresql://postgres@{proxy.host}:{proxy.port}/{database.name}"
        await ampd.migrate(url, migrations=files)
        assert proxy.round_trips == 1 + 1 + 1 + 1  # the read, a message, its rollback, another message
    assert await applied(database) == list(range(1, 9))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        "CREATE ROLE {role}; ALTER TABLE ampd_schema_migrations OWNER TO {role}",
        "ALTER TABLE ampd_schema_migrations ALTER name SET DEFAULT 'x'",
        "CREATE INDEX mine ON ampd_schema_migrations (lower(name))",
        "ALTER TABLE ampd_schema_migrations ADD CHECK (version > 0)",
        "CREATE DOMAIN title AS text; ALTER TABLE ampd_schema_migrations ALTER name TYPE title",
        "ALTER TABLE ampd_schema_migrations ALTER name TYPE varchar",
        "ALTER TABLE ampd_schema_migrations RENAME name TO title",
        "ALTER TABLE ampd_schema_migrations DROP name",
        "ALTER TABLE ampd_schema_migrations ALTER version TYPE text",
    ],
)
async def test_a_migration_that_alters_the_history_is_refused(database: Database, change: str, first: bool) -> None:
    """In the very transaction that has created the history as well, and whatever row of the catalog tells it."""
    role = f"{database.name}_heir"
    files = (*scripts(change.format(role=role)), *tables(3)[1:])
    if not first:
        files = (*tables(1), *scripts("", change.format(role=role))[1:], *tables(3)[2:])
        await ampd.migrate(database.url, migrations=files[:1])
    with pytest.raises(MigrationFailed, match="is not as ampd has made it any more") as failure:
        await ampd.migrate(database.url, migrations=files)
    assert failure.value.version == (1 if first else 2)


@pytest.mark.one_version
async def test_a_cast_of_text_silences_no_check(database: Database) -> None:
    """What fails where something is not as it was does so whatever somebody makes of a text as a truth value."""
    cast = """CREATE FUNCTION truth(text) RETURNS boolean LANGUAGE sql AS 'SELECT NULL::boolean';
        CREATE CAST (text AS boolean) WITH FUNCTION truth(text);
        CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER mine BEFORE UPDATE ON ampd_schema_migrations FOR EACH ROW EXECUTE FUNCTION f()"""
    with pytest.raises(MigrationFailed, match="is not as ampd has made it any more") as failure:
        await ampd.migrate(database.url, migrations=with_third(tables(5), cast))
    assert failure.value.version == 3
    assert await applied(database) == [1, 2]


@pytest.mark.one_version
async def test_a_client_that_is_lost_before_it_ends_a_migration_anyway_holds_no_locks(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server waits no longer for the message that goes back to the savepoint than for any other."""
    monkeypatch.setattr(session_state, "LEASE_SECS", 1)
    silent = partial(meanwhile, partial(assert_no_trace, database))
    monkeypatch.setattr(applying_in_transactions, "ending_sql", lambda *_: silent() or "SELECT 1")
    files = with_third(tables(5), "GRANT SELECT ON ALL TABLES IN SCHEMA public TO PUBLIC")
    with pytest.raises(MigrationFailed, match="idle-in-transaction timeout"):
        await ampd.migrate(database.url, migrations=files)
    assert await applied(database) == [1, 2]


async def test_the_first_script_of_all_may_drop_all_prepared_statements(database: Database) -> None:
    """The history is created all the same."""
    files = (*scripts("DEALLOCATE ALL"), *tables(3)[1:])
    assert len((await ampd.migrate(database.url, migrations=files)).applied) == 3


async def test_an_interruption_between_two_transactions_is_not_that_of_the_first(database: Database) -> None:
    """What the history has as applied is reported so, whatever ends the message after its COMMIT."""
    files, heard, cancelled = with_third(tables(4), "SELECT pg_sleep(60)"), Heard(), False
    take = BatchTracker._take

    def interrupted(self: BatchTracker, word: str, *rest: str) -> None:
        nonlocal cancelled
        if word == "begin" and rest == ("2",):  # as if nothing had come from here on
            cancelled = True
            raise RuntimeError("lost")
        if not cancelled:
            take(self, word, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchTracker, "_take", interrupted)
        with pytest.raises(RuntimeError):
            await ampd.migrate(database.url, migrations=files, on_event=heard)
    assert [each.version for each in heard.of(ampd.Applied)] == [1, 2] == await applied(database)


async def test_a_row_that_comes_between_two_transactions_is_noticed(database: Database) -> None:
    """What was planned before a newer build has applied its own is not applied after it."""
    files, heard = (*tables(1), *scripts("", "SELECT pg_sleep(0.3)")[1:], *tables(4)[2:]), Heard()

    async def newer() -> None:
        async with database.connect() as connection:
            await connection.execute(
                "BEGIN; LOCK TABLE ampd_schema_migrations IN SHARE ROW EXCLUSIVE MODE; INSERT INTO "
                "ampd_schema_migrations VALUES (99, 'newer', '', now(), now(), 1, 'a', 'b'); COMMIT"
            )

    def listen(event: ampd.Event) -> None:
        heard(event)
        if isinstance(event, ampd.StatementStarted) and event.version == 2:
            meanwhile(newer)  # which waits for the end of that transaction, and is served before the next one

    with pytest.raises(ampd.MigrationConflict, match="2 migrations are in conflict"):
        await ampd.migrate(database.url, migrations=files, on_event=listen)
    assert [each.version for each in heard.of(ampd.Applied)] == [1, 2]
    assert await applied(database) == [1, 2, 99]


async def between_second_and_third(database: Database, heard: Heard, *statements: str) -> Report:
    """Migrate, and let another session run statements, which first wait for a lock, once the second is committed."""
    files = (*tables(1), *scripts("", "SELECT pg_advisory_xact_lock(4711)")[1:], *tables(4)[2:])
    gate = transaction(database, "SELECT pg_advisory_xact_lock(4711)")
    async with gate as holder, database.connect() as other:

        async def interfere() -> None:
            await heard.first(ampd.StatementStarted)
            await waiting_for_a_lock(database)
            async with anyio.create_task_group() as both:
                both.start_soon(other.execute, ";".join(("BEGIN", *statements)))
                await waiting_for_a_lock(database, count=2)
                await holder.execute("COMMIT")
            await heard.first(ampd.Waiting)
            await other.execute("COMMIT")

        async with in_background(interfere):
            return await ampd.migrate(
                database.url, migrations=files, limits=Limits(lock_timeout_secs=0), on_event=heard
            )


async def test_what_another_runner_goes_on_with_has_not_started(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may acquire the lock between two migrations: then the next one has neither begun nor failed here."""
    report_at_once(monkeypatch)
    heard, lock = Heard(), f"SELECT pg_advisory_xact_lock({lock_key('public', TABLE)})"
    report = await between_second_and_third(database, heard, lock)
    assert [each.version for each in report.applied] == [1, 2, 3, 4] == [each.version for each in heard.of(Starting)]
    assert heard.of(ampd.Failed) == []


async def test_a_history_that_is_gone_between_two_migrations_is_no_error_of_the_second(database: Database) -> None:
    """The history is looked for, and the error names no file."""
    heard = Heard()
    rename = "LOCK TABLE ampd_schema_migrations; ALTER SCHEMA public RENAME TO other; CREATE SCHEMA public; COMMIT"
    with pytest.raises(ampd.ConfigError, match='no history of migrations in "public", but one in "other"'):
        await between_second_and_third(database, heard, rename)
    assert heard.of(ampd.Failed) == []


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("COMMIT", "ended its own transaction"),
        ("COMMIT; BEGIN", "ended its own transaction"),
        ("ROLLBACK; BEGIN", "has lost rows while this migration ran"),
    ],
)
async def test_a_script_that_ends_its_transaction_is_found_out(
    database: Database, monkeypatch: pytest.MonkeyPatch, ending: str, message: str
) -> None:
    """Also where the search for what cannot work has not seen it: nothing after it is run."""
    blind_to_problems(monkeypatch)
    files = (*tables(1), *scripts("", f"CREATE TABLE t2 (); {ending}; SELECT 1")[1:], *tables(3)[2:])
    with pytest.raises(MigrationFailed, match=message) as failure:
        await ampd.migrate(database.url, migrations=files)
    assert failure.value.version == 2
    assert await database.fetchval("SELECT to_regclass('t3')") is None
