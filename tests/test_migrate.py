"""What a run does to a database: order, history, schema, and the session that it leaves to the next file."""

from collections.abc import Coroutine
from hashlib import sha256
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import msgspec
import pytest

import ampd
from ampd.events import Applied, Event, Finished, Planned, ServerMessage, Starting, StatementStarted
from ampd.migration import Migration, checksum
from ampd.report import PendingMigration
from ampd.version import VERSION
from tests.folders import write
from tests.scenes import GENEROUS, Heard, history, meanwhile, scripts, unplaced
from tests.servers import Database

pytestmark = pytest.mark.anyio


def ensure(condition: str) -> str:
    """Return a script that fails unless the condition holds."""
    return f"DO $ensure$ BEGIN IF ({condition}) IS NOT TRUE THEN RAISE 'not so'; END IF; END $ensure$;"


# --- order and history


async def test_migrations_run_in_the_order_of_their_numbers(database: Database, tmp_path: Path) -> None:
    """Versions are compared as integers, whatever their digits look like."""
    names = ["9_a.sql", "10_b.sql", "0011_c.up.sql", "20260302090000_d.sql", "100_e.sql"]
    say = "CREATE TABLE IF NOT EXISTS seen (n serial, version text); INSERT INTO seen (version) VALUES ('{}');"
    files = ampd.read_migrations(write(tmp_path, {name: say.format(name.split("_")[0]) for name in names}))
    report = await ampd.migrate(database.url, migrations=files)
    assert [done.version for done in report.applied] == [9, 10, 11, 100, 20260302090000]
    rows = await database.fetch("SELECT version FROM seen ORDER BY n")
    assert [row["version"] for row in rows] == ["9", "10", "0011", "100", "20260302090000"]


async def test_the_history_table_is_as_the_contract_has_it(database: Database) -> None:
    """Columns, types and constraints of the table, and what a row says, are those that others rely on."""
    text = "SELECT 1;\nSELECT 2;\n"
    await ampd.migrate(database.url, migrations=(Migration(7, "a_b", "7_a_b.sql", text, checksum(text.encode())),))
    columns = await database.fetch(
        "SELECT attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute "
        "WHERE attrelid = 'ampd_schema_migrations'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
    )
    assert [tuple(column) for column in columns] == [
        ("version", "bigint", True),
        ("name", "text", True),
        ("checksum", "bytea", True),
        ("started_at", "timestamp with time zone", True),
        ("finished_at", "timestamp with time zone", False),
        ("statements_done", "integer", True),
        ("applied_by", "text", True),
        ("ampd_version", "text", True),
    ]
    key = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'ampd_schema_migrations'::regclass"
    assert [row[0] for row in await database.fetch(f"{key} AND contype = 'p'")] == ["PRIMARY KEY (version)"]
    (row,) = await database.fetch("SELECT *, finished_at >= started_at AS in_order FROM ampd_schema_migrations")
    assert row["version"] == 7
    assert row["name"] == "a_b"
    assert row["checksum"] == sha256(text.encode()).digest()
    assert row["statements_done"] == 2
    assert row["applied_by"] == "postgres"
    assert row["ampd_version"] == VERSION
    assert row["in_order"]


async def test_a_second_run_writes_nothing(database: Database) -> None:
    """With nothing pending no row version of the history changes, and no event is told but the plan and the end."""
    files = scripts("CREATE TABLE a ();", "CREATE TABLE b ();")
    await ampd.migrate(database.url, migrations=files)
    before = await database.fetch("SELECT xmin, ctid, * FROM ampd_schema_migrations ORDER BY version")
    events = Heard()
    report = await ampd.migrate(database.url, migrations=files, on_event=events)
    assert (report.applied, report.pending, report.current_version) == ((), (), 2)
    assert list(map(unplaced, events)) == [Planned(applied=2, pending=(), ahead=(), total=2), Finished(report=report)]
    events.assert_adds_up()
    assert await database.fetch("SELECT xmin, ctid, * FROM ampd_schema_migrations ORDER BY version") == before


async def test_what_came_before_a_failure_stays(database: Database) -> None:
    """A failing migration leaves nothing behind, those before it stay, and the next run goes on from there."""
    bad = "CREATE TABLE half ();\nSELECT 1/0;\nCREATE TABLE never ();"
    with pytest.raises(ampd.MigrationFailed) as caught:
        await ampd.migrate(database.url, migrations=scripts("CREATE TABLE a ();", bad, "CREATE TABLE c ();"))
    report = caught.value.report
    assert report is not None
    assert [done.version for done in report.applied] == [1]
    assert [step.version for step in report.pending] == [2, 3]
    assert await history(database) == [(1, True, 1)]
    assert await database.fetchval("SELECT to_regclass('half')") is None
    good = scripts("CREATE TABLE a ();", "CREATE TABLE half ();", "CREATE TABLE c ();")
    report = await ampd.migrate(database.url, migrations=good)
    assert [done.version for done in report.applied] == [2, 3]


async def test_events_tell_the_course_of_a_run(database: Database) -> None:
    """The plan; each migration starts, tells its statements as the server begins them, and is applied; the end."""
    events = Heard()
    text = "SELECT 1;\n\nDO $$ BEGIN RAISE NOTICE 'hello'; END $$;"
    report = await ampd.migrate(database.url, migrations=scripts(text, "SELECT 3"), on_event=events)
    pending = (PendingMigration(1, "step"), PendingMigration(2, "step"))
    assert [unplaced(event) for event in events if not isinstance(event, Applied)] == [
        Planned(applied=0, pending=pending, ahead=(), total=2),
        Starting(version=1, name="step", number=1, total=2, statements=2),
        StatementStarted(version=1, name="step", migration=1, total=2, number=1, statements=2, line=1),
        StatementStarted(version=1, name="step", migration=1, total=2, number=2, statements=2, line=3),
        ServerMessage(severity="NOTICE", message="hello"),
        Starting(version=2, name="step", number=2, total=2, statements=1),
        StatementStarted(version=2, name="step", migration=2, total=2, number=1, statements=1, line=1),
        Finished(report=report),
    ]
    assert {(event.database, event.schema) for event in events} == {(report.database, "public")}
    events.assert_adds_up()
    applied = [event for event in events if isinstance(event, Applied)]
    assert [(event.version, event.number, event.total) for event in applied] == [(1, 1, 2), (2, 2, 2)]


async def test_a_target_stops_the_run(database: Database) -> None:
    """Nothing beyond the target is applied, and nothing at all for a target that is passed already."""
    files = scripts("CREATE TABLE a ();", "CREATE TABLE b ();", "CREATE TABLE c ();")
    report = await ampd.migrate(database.url, migrations=files, target=2)
    assert ([done.version for done in report.applied], [step.version for step in report.pending]) == ([1, 2], [3])
    assert (await ampd.migrate(database.url, migrations=files, target=1)).applied == ()
    with pytest.raises(ampd.ConfigError, match="there is no migration with version 4"):
        await ampd.migrate(database.url, migrations=files, target=4)
    assert await history(database) == [(1, True, 1), (2, True, 1)]


async def test_out_of_order_where_it_is_allowed(database: Database) -> None:
    """With allow_out_of_order a late migration is applied, and the rest of the order stands."""
    one, two, three = scripts("CREATE TABLE a ();", "CREATE TABLE b ();", "CREATE TABLE c ();")
    await ampd.migrate(database.url, migrations=(one, three))
    with pytest.raises(ampd.MigrationConflict, match="2 step is not applied and 3 already is"):
        await ampd.migrate(database.url, migrations=(one, two, three))
    lenient = ampd.MetadataDb(url=ampd.DatabaseUrl(database.url), migrations=ampd.Migrations(allow_out_of_order=True))
    report = await ampd.migrate(lenient, migrations=(one, two, three))
    assert [done.version for done in report.applied] == [2]
    assert (await ampd.status(database.url, migrations=(one, two, three))).up_to_date


@pytest.mark.parametrize("run", [ampd.migrate, ampd.status])
async def test_limits_leave_folder_and_policy_as_configured(database: Database, tmp_path: Path, run: Any) -> None:
    """Whoever is less patient for once still migrates from the configured folder, in the order that it allows."""
    for version in (1, 2):
        (tmp_path / f"{version}_step.sql").write_text(f"CREATE TABLE t{version} ();")
    await ampd.migrate(database.url, migrations=[ampd.read_migrations(tmp_path)[1]])
    configured = ampd.MetadataDb(
        url=ampd.DatabaseUrl(database.url), migrations=ampd.Migrations(dir=tmp_path, allow_out_of_order=True)
    )
    found = await run(configured, limits=ampd.Limits(lock_timeout_secs=1))
    steps = found.applied if isinstance(found, ampd.Report) else found.plan.pending
    assert [step.version for step in steps] == [1]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"schema": ""}, ampd.ConfigError, "the schema's name is empty"),
        ({"schema": "pg_x"}, ampd.ConfigError, "the schema pg_x is a name that PostgreSQL keeps for itself"),
        ({"schema": 3}, TypeError, "the name of a schema is a str, not int"),
        ({"limits": ampd.Migrations()}, TypeError, "limits= takes an ampd.Limits, not Migrations"),
        ({"on_event": "print"}, TypeError, "on_event= takes a plain function of one event, not str"),
        ({"migrations": "sql"}, TypeError, "migrations= takes what ampd.read_migrations(...) returns, not str"),
        ({"target": True}, TypeError, "target= takes the version of a migration, an int, not bool"),
        ({"target": "3"}, TypeError, "target= takes the version of a migration, an int, not str"),
        ({"version": "3"}, TypeError, "version= takes the version of a migration, an int, not str"),
        ({"resolution": "applied"}, TypeError, "the resolution is ampd.Resolution.APPLIED or"),
        ({"resolution": True}, TypeError, "the resolution is ampd.Resolution.APPLIED or"),
    ],
)
async def test_arguments_of_the_wrong_kind(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    """What is no value for an argument is refused by name, by each function that takes it, and before anything else."""
    nowhere = "postgresql://u@127.0.0.1:1/d"
    settled: dict[str, Any] = {"version": 1, "resolution": ampd.Resolution.APPLIED, "migrations": (), **arguments}
    runs: list[Coroutine[Any, Any, object]] = [] if "target" in arguments else [ampd.resolve(nowhere, **settled)]
    if not arguments.keys() & {"version", "resolution"}:
        runs += [run(nowhere, **{"migrations": (), **arguments}) for run in (ampd.migrate, ampd.status)]
    for run in runs:
        with pytest.raises(kind) as refused:
            await run
        assert str(refused.value).startswith(message)


# --- odd files


@pytest.mark.parametrize(
    ("content", "statements"),
    [
        pytest.param(b"", 0, id="empty"),
        pytest.param(b" \r\n\t\n", 0, id="white space"),
        pytest.param(b"\xef\xbb\xbf", 0, id="only a BOM"),
        pytest.param(b"-- later", 0, id="a comment without a line break"),
        pytest.param(b"/* a /* nested */ comment */", 0, id="a nested comment"),
        pytest.param(b";;;", 0, id="semicolons"),
        pytest.param(b"CREATE TABLE a ()", 1, id="no semicolon"),
        pytest.param(b"CREATE TABLE a (); -- done", 1, id="a trailing comment without a line break"),
        pytest.param(b"CREATE TABLE a () -- done", 1, id="a trailing comment instead of a semicolon"),
        pytest.param(b"CREATE TABLE a (); /* done */", 1, id="a trailing block comment"),
        pytest.param(b"\xef\xbb\xbfCREATE TABLE a ();\r\n", 1, id="BOM and CRLF"),
        pytest.param("SELECT 'größe 🎉';\nSELECT 2".encode(), 2, id="wide characters"),
        pytest.param(b"SELECT $ampd$;$ampd$, $$ ; $$, E'\\';', U&'\\0061;'; SELECT 2", 2, id="quotes of every kind"),
    ],
)
@pytest.mark.parametrize("directive", [b"", b"-- no-transaction\n"])
async def test_odd_files_are_applied_like_any_other(
    database: Database, tmp_path: Path, content: bytes, statements: int, directive: bytes
) -> None:
    """A file that holds next to nothing, or ends oddly, is recorded with its checksum, and the next one runs."""
    bom = b"\xef\xbb\xbf" if content.startswith(b"\xef\xbb\xbf") else b""
    content = bom + directive + content.removeprefix(bom)
    files = ampd.read_migrations(write(tmp_path, {"1_odd.sql": content, "2_next.sql": "CREATE TABLE b ();"}))
    await ampd.migrate(database.url, migrations=files)
    assert await history(database) == [(1, True, statements), (2, True, 1)]
    normal = content.removeprefix(bom).replace(b"\r\n", b"\n")
    assert await database.fetchval("SELECT checksum FROM ampd_schema_migrations") == sha256(normal).digest()
    assert await database.fetchval("SELECT to_regclass('a') IS NOT NULL") == (b"CREATE TABLE a" in content)


async def test_a_file_name_may_hold_anything(database: Database, tmp_path: Path) -> None:
    """Quotes, backslashes, comment signs and our own dollar quote in a name reach the history as they are."""
    name = 'it\'s \\ a "name" %s $ampd$ $$ -- * ; größe über zwei'
    files = ampd.read_migrations(write(tmp_path, {f"1_{name}.sql": "SELECT 1", f"2_{name}.sql": "-- no-transaction\n"}))
    await ampd.migrate(database.url, migrations=files)
    rows = await database.fetch("SELECT name FROM ampd_schema_migrations")
    assert [row["name"] for row in rows] == [name, name]


@pytest.mark.parametrize("setting", ["standard_conforming_strings = off", "backslash_quote = off"])
async def test_strings_mean_what_the_file_says(database: Database, setting: str) -> None:
    """A backslash in a plain string is a backslash even for a role whose default says otherwise."""
    role = await database.role("odd", "CREATE ON SCHEMA public")
    await database.execute(f"ALTER ROLE {role.name} SET {setting}")
    odd = Migration(
        1, "it's \\", "1_it's \\.sql", "CREATE TABLE a AS SELECT 'c:\\temp\\' AS path; SELECT 2", b"\0" * 32
    )
    await ampd.migrate(role.url, migrations=(odd,))
    assert await database.fetchval("SELECT path FROM a") == "c:\\temp\\"
    assert await database.fetchval("SELECT name FROM ampd_schema_migrations") == "it's \\"


async def test_a_file_of_five_thousand_statements(database: Database) -> None:
    """A long file runs as one, and the one statement in it that fails is found."""
    long = "".join(f"INSERT INTO a VALUES ({number});\n" for number in range(5000))
    table = "CREATE TABLE a (x int UNIQUE);"
    with pytest.raises(ampd.MigrationFailed) as caught:
        await ampd.migrate(database.url, migrations=scripts(table, f"{long}  INSERT INTO a VALUES (0);\n"))
    assert (caught.value.line, caught.value.column) == (5001, 3)
    await ampd.migrate(database.url, migrations=scripts(table, long))
    assert await database.fetchval("SELECT count(*) FROM a") == 5000
    assert await history(database) == [(1, True, 1), (2, True, 5000)]


async def test_a_new_enum_value(database: Database) -> None:
    """ALTER TYPE ADD VALUE runs in a transaction, and the next file may use the value."""
    files = scripts("CREATE TYPE e AS ENUM ('a');", "ALTER TYPE e ADD VALUE 'b';", "SELECT 'b'::e;")
    assert (await ampd.migrate(database.url, migrations=files)).current_version == 3


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
async def test_a_database_in_another_encoding(database: Database, encoding: str) -> None:
    """The spot of an error is right whatever the database's encoding, and the text is kept as it can be."""
    other = f"{database.name}_other"
    await database.execute(
        f"CREATE DATABASE {other} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    try:
        url = database.server.url(other)
        with pytest.raises(ampd.MigrationFailed) as caught:
            await ampd.migrate(url, migrations=scripts("CREATE TABLE a AS SELECT 'größe' AS x;\nSELECT 'äöü', nosuch;"))
        assert (caught.value.line, caught.value.column) == (2, 15)
        await ampd.migrate(url, migrations=scripts("CREATE TABLE a AS SELECT 'größe' AS x;"))
        async with database.connect(url) as connection:
            assert await connection.fetchval("SELECT x FROM a") == "größe"
    finally:
        await database.execute(f"DROP DATABASE {other} WITH (FORCE)")


# --- files that do harm


@pytest.mark.parametrize(
    ("harm", "options"),
    [
        ("DROP TABLE ampd_schema_migrations;", {}),
        ("DELETE FROM ampd_schema_migrations;", {}),
        ("ALTER TABLE ampd_schema_migrations RENAME TO gone;", {}),
        ("DROP SCHEMA home CASCADE;", {"schema": "home"}),
        ("DROP TABLE IF EXISTS ampd_schema_migrations; CREATE TABLE ampd_schema_migrations (version bigint);", {}),
    ],
)
@pytest.mark.parametrize("before", [0, 1])
async def test_a_file_that_takes_its_own_history_away(
    database: Database, harm: str, options: dict[str, Any], before: int
) -> None:
    """Such a file fails as a whole, in its first run and later, and the history is as it was."""
    files = scripts(*["SELECT 1"] * before, f"CREATE TABLE public.kept ();\n{harm}")
    with pytest.raises(ampd.MigrationFailed) as caught, anyio.fail_after(GENEROUS):
        await ampd.migrate(database.url, migrations=files, **options)
    assert caught.value.version == before + 1
    assert await database.fetchval("SELECT to_regclass('kept')") is None
    status = await ampd.status(database.url, migrations=files, **options)
    assert status.current_version == (before or None)
    assert not status.plan.conflicts


@pytest.mark.parametrize(
    "escape",
    [
        "COMMIT;",
        "ROLLBACK;",
        "END",
        "ABORT;",
        "BEGIN;",
        "START TRANSACTION;",
        "COMMIT AND CHAIN;",
        "/* x */ commit ; -- x",
        "PREPARE TRANSACTION 'x';",
    ],
)
async def test_transaction_control_is_refused_before_anything_runs(database: Database, escape: str) -> None:
    """A transactional file cannot end its transaction: no file runs, not even those before it."""
    with pytest.raises(ampd.InvalidMigration) as caught:
        await ampd.migrate(database.url, migrations=scripts("CREATE TABLE a ();", f"CREATE TABLE b ();\n{escape}"))
    assert (caught.value.version, caught.value.line) == (2, 2)
    assert await database.fetchval("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == 0


@pytest.mark.parametrize(
    "escape", ["CALL p();", "DO $$ BEGIN COMMIT; END $$;", "DO $$ BEGIN EXECUTE 'COMMIT'; END $$;"]
)
async def test_transaction_control_in_disguise_is_refused_by_the_server(database: Database, escape: str) -> None:
    """What the lexer cannot see the server refuses, and nothing of the file is kept."""
    procedure = "CREATE PROCEDURE p() LANGUAGE plpgsql AS $$ BEGIN COMMIT; END $$;"
    with pytest.raises(ampd.MigrationFailed) as caught:
        await ampd.migrate(database.url, migrations=scripts(procedure, f"CREATE TABLE b ();\n{escape}"))
    assert (caught.value.version, caught.value.line) == (2, 2)
    assert await history(database) == [(1, True, 1)]
    assert await database.fetchval("SELECT to_regclass('b')") is None


async def test_savepoints_are_a_file_s_own_affair(database: Database) -> None:
    """A file may use savepoints: they do not end its transaction."""
    text = "CREATE TABLE a (); SAVEPOINT s; CREATE TABLE b (); ROLLBACK TO SAVEPOINT s; RELEASE s; CREATE TABLE c ();"
    await ampd.migrate(database.url, migrations=scripts(text))
    made = await database.fetch("SELECT relname FROM pg_class WHERE relname IN ('a', 'b', 'c') ORDER BY 1")
    assert [row[0] for row in made] == ["a", "c"]


# --- the session that one file leaves to the next


@pytest.mark.parametrize(
    ("script", "check"),
    [
        pytest.param("SET work_mem = '7MB';", "current_setting('work_mem') <> '7MB'", id="SET"),
        pytest.param(
            "SELECT set_config('work_mem', '7MB', false);", "current_setting('work_mem') <> '7MB'", id="set_config"
        ),
        pytest.param("SET my.own = 'x';", "coalesce(current_setting('my.own', true), '') = ''", id="a custom setting"),
        pytest.param("SET TIME ZONE 'Asia/Tokyo';", "current_setting('TimeZone') <> 'Asia/Tokyo'", id="time zone"),
        pytest.param("SET ROLE pg_monitor;", "current_user = 'postgres'", id="SET ROLE"),
        pytest.param(
            "SET SESSION AUTHORIZATION pg_monitor;", "session_user = 'postgres'", id="SET SESSION AUTHORIZATION"
        ),
        pytest.param(
            "CREATE SCHEMA other; SET search_path = other; CREATE TABLE a ();",
            "current_schema() = 'public' AND to_regclass('other.a') IS NOT NULL",
            id="search_path",
        ),
        pytest.param("SET search_path = '';", "current_schema() = 'public'", id="an empty search_path"),
        pytest.param("CREATE TEMP TABLE t ();", "to_regclass('pg_temp.t') IS NULL", id="temporary table"),
        pytest.param("PREPARE p AS SELECT 1;", "NOT EXISTS (SELECT FROM pg_prepared_statements)", id="PREPARE"),
        pytest.param(
            "DECLARE c CURSOR WITH HOLD FOR SELECT 1;",
            "NOT EXISTS (SELECT FROM pg_cursors WHERE is_holdable)",
            id="cursor",
        ),
        pytest.param(
            "CREATE SEQUENCE s; SELECT nextval('s');",
            "DO $$ BEGIN PERFORM lastval(); RAISE 'not so'; "
            "EXCEPTION WHEN object_not_in_prerequisite_state THEN NULL; END $$;",
            id="sequence",
        ),
        pytest.param("LISTEN news;", "NOT EXISTS (SELECT pg_listening_channels())", id="LISTEN"),
        pytest.param(
            "SELECT pg_advisory_lock(42);",
            "NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND pid = pg_backend_pid())",
            id="advisory lock",
        ),
        pytest.param("SET lock_timeout = '1ms';", "current_setting('lock_timeout') <> '1ms'", id="lock_timeout"),
        pytest.param(
            "SET statement_timeout = '77s';", "current_setting('statement_timeout') <> '77s'", id="statement_timeout"
        ),
        pytest.param(
            "SET default_transaction_isolation = 'serializable';",
            "current_setting('transaction_isolation') = 'read committed'",
            id="isolation",
        ),
        pytest.param(
            "SET session_replication_role = replica;",
            "current_setting('session_replication_role') = 'origin'",
            id="session_replication_role",
        ),
        pytest.param(
            "SET client_min_messages = error;", "current_setting('client_min_messages') = 'notice'", id="hush"
        ),
        pytest.param(
            "SET check_function_bodies = off;", "current_setting('check_function_bodies') = 'on'", id="as pg_dump"
        ),
        pytest.param("SET row_security = off;", "current_setting('row_security') = 'on'", id="row_security"),
        pytest.param("SET xmloption = content;", "1 = 1", id="xmloption"),
        pytest.param("SET LOCAL work_mem = '7MB';", "current_setting('work_mem') <> '7MB'", id="SET LOCAL"),
        pytest.param(
            "SET quote_all_identifiers = on;", "current_setting('quote_all_identifiers') = 'off'", id="quotes"
        ),
        pytest.param("SET standard_conforming_strings = off;", "length('\\n') = 2", id="standard_conforming_strings"),
    ],
)
@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"])
async def test_a_file_finds_the_session_as_new(database: Database, script: str, check: str, directive: str) -> None:
    """Whatever a file does to its session is gone for the next one, and the history says who really ran it."""
    look = check if check.startswith("DO ") else ensure(check)
    files = scripts(directive + script, look, directive + look)
    await ampd.migrate(database.url, migrations=files)
    rows = await database.fetch("SELECT version, applied_by FROM ampd_schema_migrations ORDER BY 1")
    assert [tuple(row) for row in rows] == [(1, "postgres"), (2, "postgres"), (3, "postgres")]


async def test_what_a_file_sets_holds_to_its_end(database: Database) -> None:
    """A setting counts for the statements that follow it in the same file, in a transaction and outside of one."""
    text = f"SET work_mem = '7MB'; CREATE TEMP TABLE t (); {ensure('current_setting($$work_mem$$) = $$7MB$$')} TABLE t;"
    assert (
        await ampd.migrate(database.url, migrations=scripts(text, f"-- no-transaction\n{text}"))
    ).current_version == 2


@pytest.mark.parametrize("level", ["warning", "error"])
async def test_hushed_messages_do_not_hide_where_a_file_fails(database: Database, level: str) -> None:
    """A file that silences the server is diagnosed all the same."""
    text = f"SET client_min_messages = {level};\nSELECT 1;\n\n  ALTER TABLE missing ADD x int;\n"
    with pytest.raises(ampd.MigrationFailed) as caught:
        await ampd.migrate(database.url, migrations=scripts(text))
    assert (caught.value.line, caught.value.column) == (4, 3)


# --- defaults of the role and of the database


@pytest.mark.parametrize(
    "setting",
    [
        "default_transaction_isolation = 'serializable'",
        "default_transaction_deferrable = on",
        "client_min_messages = error",
        "statement_timeout = '60ms'",
        "lock_timeout = '1ms'",
        "idle_in_transaction_session_timeout = '60ms'",
        "bytea_output = 'escape'",
        "DateStyle = 'German'",
        "TimeZone = 'Asia/Kathmandu'",
        "IntervalStyle = 'sql_standard'",
        "extra_float_digits = -15",
        "quote_all_identifiers = on",
        "plpgsql.variable_conflict = 'error'",
        "plpgsql.extra_errors = 'all'",
        "row_security = off",
        "array_nulls = off",
        "transform_null_equals = on",
        "search_path = 'public, pg_catalog'",
        "synchronous_commit = off",
        "enable_seqscan = off",
        "max_parallel_workers_per_gather = 4",
        "standard_conforming_strings = off",
        "xmloption = document",
        "check_function_bodies = off",
        "lc_messages = 'C'",
    ],
)
async def test_defaults_of_a_role_change_nothing(database: Database, setting: str) -> None:
    """A run, a second run, the status and a no-transaction file work whatever the role's settings are."""
    role = await database.role("odd", "CREATE ON SCHEMA public")
    name, value = setting.split(" = ")
    value = value.strip("'") if name == "search_path" else value
    await database.execute(f"ALTER ROLE {role.name} SET {name} = {value}")
    slow = "SELECT pg_sleep(0.1);" if "timeout" in name else ""
    files = scripts(
        f"CREATE TABLE a (x int); {slow}",
        f"-- no-transaction\n{slow}\nCREATE INDEX CONCURRENTLY i ON a (x);\n{slow}",
        f"INSERT INTO a VALUES (1); {ensure('current_setting($$transaction_isolation$$) = $$read committed$$')}",
    )
    assert (await ampd.migrate(role.url, migrations=files)).current_version == 3
    assert (await ampd.migrate(role.url, migrations=files)).applied == ()
    status = await ampd.status(role.url, migrations=files)
    assert status.up_to_date
    applied = [step.applied for step in status.plan.migrations]
    assert [row.started_at.tzinfo is not None for row in applied if row] == [True] * 3


# --- the schema


@pytest.mark.parametrize("schema", ["amp", 'Amp\'s "own" \\ schema', "größe", "with space", "select", "a,b"])
@pytest.mark.parametrize("exists", [False, True])
async def test_the_configured_schema(database: Database, schema: str, exists: bool) -> None:
    """It is created when missing, holds the history and what the files create, and the rest of the path stays."""
    quoted = '"' + schema.replace('"', '""') + '"'
    if exists:
        await database.execute(f"CREATE SCHEMA {quoted}")
    await database.execute("CREATE TABLE public.shared (x int)")
    text = (
        f"CREATE TABLE a (x int); INSERT INTO shared VALUES (1); {ensure('(current_schemas(false))[2] = $$public$$')}"
    )
    files = scripts(text, "-- no-transaction\nCREATE INDEX CONCURRENTLY i ON a (x);\nCREATE TABLE b ();")
    await ampd.migrate(database.url, migrations=files, schema=schema)
    assert (await ampd.migrate(database.url, migrations=files, schema=schema)).applied == ()
    status = await ampd.status(database.url, migrations=files, schema=schema)
    assert (status.schema, status.up_to_date) == (schema, True)
    rows = await database.fetch(
        "SELECT relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace AND nspname = $1 "
        "WHERE relkind IN ('r', 'i') AND relname <> 'ampd_schema_migrations_pkey' ORDER BY 1",
        schema,
    )
    assert [row[0] for row in rows] == ["a", "ampd_schema_migrations", "b", "i"]
    assert await database.fetchval("SELECT to_regclass('public.ampd_schema_migrations')") is None


@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"])
async def test_an_answer_in_another_encoding(database: Database, directive: str) -> None:
    """What a file has made unreadable is told with the way out, and of that file."""
    text = f"{directive}SET client_encoding = 'LATIN1'; DO $$ BEGIN RAISE EXCEPTION '%', chr(233); END $$"
    with pytest.raises(ampd.ConnectionFailed) as raised:
        await ampd.migrate(database.url, migrations=scripts(text))
    assert str(raised.value) == (
        "the connection was given up: the server's answer is not UTF-8\n"
        "hint: 1_step.sql was being applied; remove SET client_encoding from the file, and run again"
    )


@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"])
@pytest.mark.parametrize(
    "taken_back", ["RESET search_path", "SET search_path TO DEFAULT", "SET SCHEMA 'public'; RESET ALL", "DISCARD ALL"]
)
async def test_the_configured_schema_is_what_a_file_comes_back_to(
    database: Database, directive: str, taken_back: str
) -> None:
    """A file that takes back its search path is again in the schema that it began in."""
    if taken_back == "DISCARD ALL" and not directive:
        pytest.skip("DISCARD ALL does not run in a transaction")
    text = f"{directive}SET search_path = public; CREATE TABLE a (); {taken_back}; CREATE TABLE b (); CREATE TABLE c ()"
    await ampd.migrate(database.url, migrations=scripts(text), schema="amp")
    rows = await database.fetch("SELECT schemaname || '.' || tablename FROM pg_tables WHERE schemaname !~ '^(pg|inf)'")
    assert {row[0] for row in rows} == {"amp.ampd_schema_migrations", "public.a", "amp.b", "amp.c"}


@pytest.mark.parametrize(
    ("before", "sqlstate", "message"),
    [
        (
            "CREATE FUNCTION f() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN PERFORM 1 FROM nothing; END';"
            "CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION f()",
            "42P01",
            'relation "nothing" does not exist',
        ),
        (
            "CREATE DOMAIN ampd_schema_migrations AS integer",
            "42710",
            'type "ampd_schema_migrations" already exists',
        ),
    ],
    ids=["event trigger", "type"],
)
@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"])
async def test_what_is_in_the_way_of_the_history_is_no_other_runner(
    database: Database, directive: str, before: str, sqlstate: str, message: str
) -> None:
    """An error that a race of two runners could cause is told as it is when there is no other one."""
    await database.execute(before)
    with anyio.fail_after(GENEROUS), pytest.raises(ampd.MigrationFailed) as raised:
        await ampd.migrate(database.url, migrations=scripts(f"{directive}CREATE TABLE a ()"))
    assert raised.value.message == (
        f'the history table "public".ampd_schema_migrations could not be written: {message} (SQLSTATE {sqlstate})'
    )
    assert raised.value.hint == (
        "look for an event trigger, a trigger or a type that is in its way, and run again; nothing was kept"
    )


async def test_two_schemas_of_one_database_are_independent(database: Database) -> None:
    """Each schema has its own history, and the same files may be applied to each."""
    files = scripts("CREATE TABLE a ();")
    for schema in ("one", "two", "public"):
        report = await ampd.migrate(database.url, migrations=files, schema=schema)
        assert [done.version for done in report.applied] == [1], schema
    assert await database.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'ampd_schema_migrations'") == 3


async def test_the_history_is_found_along_the_search_path(database: Database) -> None:
    """Without a schema configured the history is where the search path finds it, else in the current schema."""
    files = scripts("CREATE TABLE a ();")
    await ampd.migrate(database.url, migrations=files)
    await database.execute("CREATE SCHEMA mine")
    role = await database.role("late", "SELECT ON ampd_schema_migrations", "USAGE, CREATE ON SCHEMA mine")
    await database.execute(f"ALTER ROLE {role.name} SET search_path = mine, public")
    assert (await ampd.status(role.url, migrations=files)).schema == "public"
    assert (await ampd.migrate(role.url, migrations=files)).applied == ()
    await database.execute("DROP TABLE ampd_schema_migrations, a")
    report = await ampd.migrate(role.url, migrations=files)
    assert (report.schema, [done.version for done in report.applied]) == ("mine", [1])
    assert await database.fetchval("SELECT to_regclass('mine.ampd_schema_migrations') IS NOT NULL")


async def test_the_history_is_not_kept_in_a_temporary_schema(database: Database) -> None:
    """A search path that begins with pg_temp leaves the history in the first schema that lasts."""
    await database.execute(f"ALTER DATABASE {database.name} SET search_path = pg_temp, public")
    files = scripts("CREATE TEMP TABLE passing ();", "CREATE TABLE public.lasting ();")
    report = await ampd.migrate(database.url, migrations=files)
    assert (report.schema, report.current_version) == ("public", 2)


async def test_a_temporary_table_of_the_same_name_is_not_the_history(database: Database) -> None:
    """A pool's connection with a temporary table named like the history is not taken in by it."""
    files = scripts("CREATE TABLE a ();")

    async def disguise(connection: asyncpg.Connection) -> None:
        await connection.execute("CREATE TEMP TABLE IF NOT EXISTS ampd_schema_migrations (version bigint)")
        await connection.execute("SET search_path = public, pg_temp")

    async with asyncpg.create_pool(database.url, min_size=1, max_size=1, setup=disguise) as pool:
        report = await ampd.migrate(pool, migrations=files)
        assert [done.version for done in report.applied] == [1]
        assert (await ampd.status(pool, migrations=files)).up_to_date
    assert await history(database) == [(1, True, 1)]


DEFERRED = """
CREATE TABLE heard (what text); CREATE TABLE t (id integer);
CREATE FUNCTION hear() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO heard VALUES (current_setting('app.who', true) || ' ' || current_setting('search_path'));
  RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER hears AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hear();
"""


@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"])
async def test_deferred_triggers_see_the_session_of_their_file(database: Database, directive: str) -> None:
    """What runs at the end of the transaction runs before the session is taken back, as in psql."""
    setting = "SET search_path = public, app; SET app.who = 'bob'"
    temporary = (
        "CREATE TEMPORARY TABLE p (id integer PRIMARY KEY);"
        "CREATE TEMPORARY TABLE c (id integer REFERENCES p DEFERRABLE INITIALLY DEFERRED);"
    )
    late = "BEGIN; INSERT INTO c VALUES (1); INSERT INTO t VALUES (1); INSERT INTO p VALUES (1); COMMIT"
    if not directive:
        late = late.removeprefix("BEGIN; ").removesuffix("; COMMIT")
    files = scripts(DEFERRED, f"{directive}{setting}; {temporary}{late}")
    await ampd.migrate(database.url, migrations=files)
    assert await database.fetchval("SELECT what FROM heard") == "bob public, app"


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (
            "(id integer)",
            "it has no column version, name, checksum, started_at, finished_at, statements_done, applied_by, ",
        ),
        ("AS SELECT 1::bigint AS version", "it has no column name, checksum, "),
        (
            "AS SELECT 1 AS version, 'a'::name AS name, '\\x'::bytea AS checksum, now() AS started_at, "
            "now() AS finished_at, 1 AS statements_done, 'a' AS applied_by, 'a' AS ampd_version",
            "it has a column version of type integer, and has a column name of type name",
        ),
    ],
)
async def test_a_table_that_is_no_history(database: Database, table: str, problem: str) -> None:
    """A table of that name and another shape is told, whoever comes to read or to write."""
    await database.execute(f"CREATE TABLE ampd_schema_migrations {table}")
    for run in (ampd.status, ampd.migrate):
        with pytest.raises(ampd.ConfigError) as raised:
            await run(database.url, migrations=scripts("SELECT 1"))
        assert "is not ampd's history table, or was changed by hand: " + problem in raised.value.message


async def test_a_history_that_moves_between_plan_and_turn(database: Database) -> None:
    """What another runner has applied since the plan was made is seen under the lock, and judged anew."""
    files = scripts("CREATE TABLE t ()")

    def another_is_faster(event: Event) -> None:
        if isinstance(event, Planned):
            later = msgspec.structs.replace(files[0], version=2, sql="CREATE TABLE u ()")
            meanwhile(lambda: ampd.migrate(database.url, migrations=[later]))

    with pytest.raises(ampd.MigrationConflict, match="1 step is not applied and 2 already is"):
        await ampd.migrate(database.url, migrations=files, on_event=another_is_faster)
    assert await database.fetchval("SELECT to_regclass('t')") is None


# --- another project's history


@pytest.mark.parametrize("out_of_order", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), [(1, 2024), (2024, 1)], ids=["theirs above", "theirs below"])
async def test_another_projects_history_is_refused_by_every_call(
    database: Database, tmp_path: Path, ours: int, theirs: int, out_of_order: bool
) -> None:
    """Whichever way round the versions lie, nothing is applied, settled, shown as ahead or opened."""
    folders = [write(tmp_path / str(version), {f"{version}_a{version}.sql": "SELECT 1;"}) for version in (ours, theirs)]
    write(folders[0], {f"{ours}_a{ours}.sql": "CREATE TABLE t ();"})
    await ampd.migrate(database.url, migrations=ampd.read_migrations(folders[1]))
    policy = ampd.Migrations(dir=folders[0], allow_out_of_order=out_of_order)
    configured = ampd.MetadataDb(url=ampd.DatabaseUrl(database.url), migrations=policy)

    async def opened(*, auto_migrate: bool) -> None:
        async with ampd.open_pool(msgspec.structs.replace(configured, auto_migrate=auto_migrate)):
            pytest.fail("a service has started on another project's history")

    for call in (
        lambda: ampd.migrate(configured),
        lambda: ampd.status(configured),
        lambda: ampd.resolve(configured, theirs, ampd.Resolution.APPLIED),
        lambda: ampd.resolve(configured, theirs, ampd.Resolution.ROLLED_BACK),
        lambda: opened(auto_migrate=False),
        lambda: opened(auto_migrate=True),
    ):
        with pytest.raises(ampd.MigrationConflict, match=r"is the history of another project: none of") as error:
            await call()
        assert f"history: {theirs} a{theirs}, last at" in error.value.message
        assert "allow_out_of_order" not in str(error.value)
    assert await history(database) == [(theirs, True, 1)]


# --- migrations that the caller has put together


async def test_migrations_in_whatever_they_come(database: Database) -> None:
    """A generator works as well as a list, in any order."""
    files = scripts("CREATE TABLE t ()", "ALTER TABLE t ADD x int")
    for run in (ampd.status, ampd.migrate):
        with pytest.raises(ampd.ConfigError) as refused:
            await run(database.url, migrations=reversed(files), target=3)
        assert refused.value.hint == "the newest are 1 step, 2 step"
    report = await ampd.migrate(database.url, migrations=(each for each in reversed(files)))
    assert [each.version for each in report.applied] == [1, 2]
    assert (await ampd.status(database.url, migrations=(each for each in files))).up_to_date


@pytest.mark.parametrize(("given", "kind"), [("m", "str"), (Path("m"), type(Path()).__name__), (["m"], "str")])
async def test_what_are_no_migrations(given: Any, kind: str) -> None:
    """A path is no migrations, and the message says what makes some of it; nothing was connected to."""
    for run in (ampd.status, ampd.migrate):
        with pytest.raises(TypeError) as refused:
            await run("postgresql://127.0.0.1:1/nowhere", migrations=given)
        assert str(refused.value) == f"migrations= takes what ampd.read_migrations(...) returns, not {kind}"


async def test_two_migrations_with_one_version() -> None:
    """Neither is silently left out, as neither is of a folder."""
    first = Migration(1, "a", "a.sql", "", b"")
    with pytest.raises(ampd.InvalidMigration) as refused:
        await ampd.migrate("postgresql://127.0.0.1:1/nowhere", migrations=[first, Migration(1, "b", "b.sql", "", b"")])
    assert str(refused.value) == (
        "a.sql and b.sql have the same version, 1\nhint: give each migration a version that no other has"
    )
