"""What a run does to a database: order, history, schema, and the session that it leaves to the next file."""

from collections.abc import Coroutine
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import ampd
from ampd.events import Applied, Finished, Planned, ServerMessage, Starting, StatementStarted
from ampd.migration import Migration
from ampd.report import PendingMigration
from tests.folders import write
from tests.scenes import Heard, history, scripts, unplaced
from tests.servers import Database

pytestmark = pytest.mark.anyio


async def test_migrations_run_in_the_order_of_their_numbers(database: Database, tmp_path: Path) -> None:
    """Versions are compared as integers, whatever their digits look like."""
    names = ["9_a.sql", "10_b.sql", "0011_c.up.sql", "20260302090000_d.sql", "100_e.sql"]
    say = "CREATE TABLE IF NOT EXISTS seen (n serial, version text); INSERT INTO seen (version) VALUES ('{}');"
    files = ampd.read_migrations(write(tmp_path, {name: say.format(name.split("_")[0]) for name in names}))
    report = await ampd.migrate(database.url, migrations=files)
    assert [done.version for done in report.applied] == [9, 10, 11, 100, 20260302090000]
    rows = await database.fetch("SELECT version FROM seen ORDER BY n")
    assert [row["version"] for row in rows] == ["9", "10", "0011", "100", "20260302090000"]


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
    pending = tuple(PendingMigration(number, "step", f"{number}_step.sql") for number in (1, 2))
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
        ({"schema": "pg_x"}, ampd.ConfigError, "the schema pg_x is reserved by PostgreSQL"),
        ({"schema": "information_schema"}, ampd.ConfigError, "the schema information_schema is reserved by PostgreSQL"),
        ({"schema": "\udcff"}, ampd.ConfigError, "the schema's name cannot be encoded in UTF-8"),
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


@pytest.mark.any_server
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


@pytest.mark.any_server
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


async def test_an_answer_in_another_encoding(database: Database) -> None:
    """What a file has made unreadable is told with the way out, and of that file; in a message of its own it is not."""
    text = "SET client_encoding = 'LATIN1'; DO $$ BEGIN RAISE EXCEPTION '%', chr(233); END $$"
    with pytest.raises(ampd.MigrationFailed, match="é"):
        await ampd.migrate(database.url, migrations=scripts(f"-- no-transaction\n{text}"), table="other")
    with pytest.raises(ampd.ConnectionFailed) as raised:
        await ampd.migrate(database.url, migrations=scripts(text))
    assert str(raised.value) == (
        "the connection was given up: the server's answer is not UTF-8\n"
        "hint: 1_step.sql was being applied; remove SET client_encoding from the file, and run again"
    )


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


@pytest.mark.parametrize(
    ("given", "kind"), [("m", "str"), (Path("m"), type(Path()).__name__), (["m"], "str"), ([1], "int")]
)
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
