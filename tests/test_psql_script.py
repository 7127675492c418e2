"""The script of a dry run, as psql runs it."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import asyncpg
import msgspec
import pytest

import ampd
from ampd import State, preview
from ampd.advisory_lock import lock_key
from ampd.apply.psql_script import check_scriptable, psql_script
from ampd.config import HISTORY_TABLE as TABLE
from ampd.version import VERSION
from tests.cli_output import plain
from tests.scenes import indexes, scripts, transaction
from tests.servers import Database

pytestmark = pytest.mark.anyio

Configure = Callable[..., ampd.MetadataDb]
TRICKY = r"""-- \d :name 'it''s
CREATE TABLE t (id int, "name" int, note text, parts text[] DEFAULT '{a,b,c,d}');
INSERT INTO t VALUES (2, 3, 'C:\dir\:name :''id'' ß', DEFAULT);
INSERT INTO t VALUES (1, 1, E'it\'s \\d :id', DEFAULT), (1, 1, U&'\00e4:id', '{}');
UPDATE t SET parts = parts[1:id] || parts[:"name"] || parts['1':'2'] || parts[id::int:"name"];
CREATE VIEW v AS SELECT $$\d :id$$::text AS a, $x$:'name' $$ :{?id}$x$ AS b, /* :id */ '\'::text AS "c:id" FROM t;
CREATE FUNCTION f(id int) RETURNS int LANGUAGE plpgsql AS $f$ DECLARE n int := id; BEGIN n:=n + 1; RETURN n; END $f$;
SET search_path = pg_catalog; SET ROLE pg_monitor; RESET ROLE; RESET search_path;
CREATE TABLE last_one (at text[] DEFAULT ('{1,2}'::text[])[:2]) -- no semicolon"""
OUTSIDE = """-- no-transaction
SET lock_timeout = '7s'; INSERT INTO t (id) VALUES (7);

-- the builds
CREATE INDEX CONCURRENTLY i ON t (id, (parts[1:id]));
BEGIN; CREATE TABLE pair (n int); CREATE INDEX ON pair (n); COMMIT;
VACUUM t; DISCARD ALL;
DROP INDEX CONCURRENTLY i;
CREATE INDEX CONCURRENTLY j ON t (note)"""
OWN = (
    "SET LOCAL SESSION AUTHORIZATION DEFAULT; SET LOCAL ROLE TO DEFAULT; SET LOCAL lock_timeout = 1000; "
    "SET LOCAL statement_timeout = 0;"
)
RESET = (
    "SET CONSTRAINTS ALL IMMEDIATE; SET LOCAL statement_timeout = 0; SET SESSION AUTHORIZATION DEFAULT; "
    "RESET ROLE; RESET ALL; CLOSE ALL; UNLISTEN *; DISCARD TEMP; DISCARD SEQUENCES;\n"
    "\\encoding UTF8\nSET standard_conforming_strings = on;\nSET LOCAL lock_timeout = 1000;"
)
EXPECTED = f"""\
-- DATABASE: no migration applied, 2 pending
-- `psql -X -v ON_ERROR_STOP=1 -f FILE` does what `ampd migrate` would do, as postgres in schema public; ampd VERSION.
-- Connect as that role, and not through a pooler. It stops where the history is no longer as it was when this was
-- printed, or where a runner is at work: then print it again.
\\set ON_ERROR_STOP on
\\set ON_ERROR_ROLLBACK off
\\set AUTOCOMMIT on
\\set SINGLELINE off
\\encoding UTF8
SET standard_conforming_strings = on;

-- 1 step (m/1_step.sql)
BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = 1000; SET LOCAL statement_timeout = 0;
DO …;
SET LOCAL statement_timeout = 0;

-- t
CREATE TABLE t (a int[]);

{RESET}
DO …;
COMMIT;
DO …;

-- 2 step (m/2_step.sql): statement by statement, not in one transaction
DO …;

BEGIN ISOLATION LEVEL READ COMMITTED; {OWN}
DO …;
COMMIT;

BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = 1000; SET LOCAL statement_timeout = 0;
-- no-transaction
INSERT INTO t VALUES ('{{1}}');

-- then
SET CONSTRAINTS ALL IMMEDIATE; {OWN}
DO …;
COMMIT;

BEGIN ISOLATION LEVEL READ COMMITTED; {OWN}
DO …;
COMMIT;
SET lock_timeout = 0; SET statement_timeout = 0;

-- not in a transaction:
VACUUM t;

BEGIN ISOLATION LEVEL READ COMMITTED; {OWN}
DO …;
COMMIT;

BEGIN ISOLATION LEVEL READ COMMITTED; {RESET}
DO …;
COMMIT;
DO …;
"""


def program(database: Database, name: str) -> str:
    """Return one of PostgreSQL's client programs."""
    found = shutil.which(name, path=f"{database.server.bindir}:{os.environ.get('PATH', os.defpath)}")
    return found or pytest.skip(f"NOT TESTED: there is no {name}")


def psql(database: Database, script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a script as its header says, with variables of the names that occur in the migrations."""
    variables = [word for name in ("id", "name", "2") for word in ("-v", f"{name}=0 oops")]
    command = [program(database, "psql"), "-X", *variables, *options, "-q", "-f", "-", database.url]
    return subprocess.run(command, input=script, capture_output=True, encoding="utf-8", check=False)


def dump(database: Database, *, data: bool = False) -> str:
    """Return what pg_dump says of the schema, and of the data; nothing, if it is older than the server."""
    command = [program(database, "pg_dump"), *([] if data else ["--schema-only"]), database.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "server version mismatch" in done.stderr:
        return ""
    assert done.returncode == 0, done.stderr
    return re.sub(r"^\\(un)?restrict .*$", "", done.stdout, flags=re.MULTILINE)  # followed by a random word


async def printed(configuration: ampd.MetadataDb) -> str:
    """Return what `ampd migrate --dry-run` prints."""
    found, executions = await preview.dry_run(configuration)
    return "".join(psql_script(found, executions))


async def rows(database: Database, table: str) -> list[asyncpg.Record]:
    """Return the history but for its times, or a table of the migrations."""
    columns = "version, name, checksum, finished_at IS NULL, statements_done, applied_by, ampd_version"
    return await database.fetch(f"SELECT {'*' if table == 't' else columns} FROM {table} ORDER BY 1, 2")


@pytest.mark.parametrize(
    ("files", "settings"),
    [
        pytest.param((), (), id="packaged"),
        pytest.param((TRICKY,), (), id="colons and backslashes"),
        pytest.param((TRICKY,), ("standard_conforming_strings = off", "client_encoding = LATIN1"), id="other settings"),
        pytest.param((TRICKY, OUTSIDE, "-- nothing but a comment", "ALTER TABLE t ADD last int;\n"), (), id="outside"),
    ],
)
async def test_psql_does_what_migrate_does(
    database: Database, configured: Configure, files: tuple[str, ...], settings: tuple[str, ...]
) -> None:
    """After the script `status` says up to date, and schema, rows and history are as after `migrate`."""
    for setting in settings:
        await database.execute(f"ALTER DATABASE {database.name} SET {setting}")
    configuration = configured(*scripts(*files)) if files else ampd.MetadataDb(url=ampd.DatabaseUrl(database.url))
    tables, found = ("ampd_schema_migrations", *(("t",) if files else ())), []
    for by_psql in (True, False):
        await database.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        if by_psql:
            done = psql(database, await printed(configuration))
            assert done.stderr == ""
        else:
            await ampd.migrate(configuration)
        assert (await ampd.status(configuration)).up_to_date
        found.append((dump(database), [await rows(database, table) for table in tables]))
    assert found[0] == found[1]


SHELL = "\\! touch ran_by_psql"
STRINGS_OFF = "SELECT set_config('standard_conforming_strings', 'off', false) IS NULL;\n"
SHIFT_JIS = "DO $$ BEGIN EXECUTE 'SET client_encoding = SJIS'; END $$;\n"
READ_OTHERWISE = {
    "backslash": f"{STRINGS_OFF}INSERT INTO t VALUES ('a\\', ' {SHELL}\n', 'b')",
    "letter": f"{SHIFT_JIS}INSERT INTO t VALUES ('ß', ' {SHELL}\n', 'b');",
    "comment": f"{SHIFT_JIS}INSERT INTO t VALUES ('a'); /* ß/* */ {SHELL}\n */",
    "reset": "RESET ALL; INSERT INTO app.t VALUES ('ß'); -- ß",
    "semicolons": "CREATE RULE r AS ON DELETE TO t DO (SELECT 1; SELECT 2);;/*;*/INSERT INTO t VALUES ('\\;', $$;ß$$);",
}


@pytest.mark.parametrize("text", list(READ_OTHERWISE.values()), ids=list(READ_OTHERWISE))
async def test_psql_reads_a_file_as_ampd_does(
    database: Database, configured: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    """Whatever a file or a user has set, psql finds no command in a string or comment, and no other letters."""
    monkeypatch.chdir(tmp_path)
    found = []
    for client, first in ((ampd, ""), (psql, ""), (psql, "-- no-transaction\n")):
        await database.execute(
            "DROP SCHEMA IF EXISTS app CASCADE; CREATE SCHEMA app; CREATE TABLE app.t (a text, b text, c text)"
        )
        configuration = configured(*scripts(f"{first}{text}", f"{first}INSERT INTO t VALUES ('ß\\')"), schema="app")
        if client is ampd:
            await ampd.migrate(configuration)
        else:
            with monkeypatch.context() as patch:
                script = await printed(configuration)
                patch.setenv("PGCLIENTENCODING", "LATIN1")
                assert psql(database, script).stderr == ""
        found.append(await database.fetch("SELECT * FROM app.t"))
    assert found[0] == found[1] == found[2]
    assert not (tmp_path / "ran_by_psql").exists()


async def test_names_are_the_same_to_psql(
    database: Database, configured: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schema and a role beyond ASCII are found again once a file has reset the session."""
    owner = await database.role("öwner", f"CREATE ON DATABASE {database.name}")
    files = "RESET ALL", "-- no-transaction\nRESET ALL; DISCARD ALL; CREATE TABLE c ()", "RESET ROLE; CREATE TABLE d ()"
    configuration = configured(*scripts(*files), schema="ä\\b")
    policy = msgspec.structs.replace(configuration.migrations, role=owner.name)
    script = await printed(msgspec.structs.replace(configuration, migrations=policy))
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    assert psql(database, script).stderr == ""
    tables = await database.fetch(
        "SELECT schemaname, tablename, tableowner FROM pg_tables WHERE tableowner = $1", owner.name
    )
    assert {tuple(table) for table in tables} == {("ä\\b", name, owner.name) for name in ("c", "d", TABLE)}


async def test_the_whole_of_a_script(configured: Configure) -> None:
    """Each migration stands there as it is, between what enters and what finishes it, and what is outside says so."""
    files = "-- t\nCREATE TABLE t (a int[]);", "-- no-transaction\nINSERT INTO t VALUES ('{1}');\n\n-- then\nVACUUM t\n"
    configuration = configured(*scripts(*files))
    script = (await printed(configuration)).replace(f"{configuration.migrations.dir}", "m").replace(VERSION, "VERSION")
    assert re.sub(r"DO (\$\w+\$)(.|\n)*?\1;", "DO …;", plain(script)) == EXPECTED


@pytest.mark.parametrize("later", ["-- no-transaction\nALTER TABLE t ADD a int;", "ALTER TABLE t ADD a int"])
async def test_a_script_refuses_what_it_was_not_made_for(database: Database, configured: Configure, later: str) -> None:
    """A script that was run before, that a run has overtaken, or that meets a runner, fails and changes nothing."""
    one, two = scripts("CREATE TABLE t ()", later)

    async def state() -> tuple[object, ...]:
        return dump(database), await rows(database, "ampd_schema_migrations")

    async def refused(script: str) -> str:
        before, done = await state(), psql(database, script)
        assert (done.returncode, await state()) == (3, before)
        return re.sub(r"psql:<stdin>:\d+: (.*)\n(.|\n)*", r"\1", done.stderr)

    first = await printed(configured(one))
    assert psql(database, first).returncode == 0
    assert await refused(first) == "ERROR:  the history has moved"
    second = await printed(configured(one, two))
    async with transaction(database, f"SELECT pg_advisory_xact_lock({lock_key('public', TABLE)})"):
        assert await refused(second) == "ERROR:  another runner holds the lock"
    assert (await ampd.migrate(configured(one, two))).current_version == 2
    assert await refused(second) == "ERROR:  the history is not as ampd makes it, or was replaced"


async def test_a_run_goes_on_where_a_script_has_failed(database: Database, configured: Configure) -> None:
    """What a script has recorded of a file that runs statement by statement is what a run needs to go on with it."""
    await database.execute("CREATE TABLE t (id int)")
    files = scripts(
        "-- no-transaction\nINSERT INTO t VALUES (1), (1);\nCREATE UNIQUE INDEX CONCURRENTLY i ON t (id);\n"
    )
    configuration = configured(*files)
    assert "could not create unique index" in psql(database, await printed(configuration)).stderr
    found, executions = await preview.dry_run(configuration)
    assert [info.state for info in found.plan.pending] == [State.INTERRUPTED]
    with pytest.raises(ampd.MigrationInterrupted) as caught:
        check_scriptable(found, executions)
    assert (caught.value.message, caught.value.hint, caught.value.version, caught.value.file) == (
        "1 step was interrupted, and no script can tell how far it came",
        "`ampd migrate` goes on with it, and `ampd migrate --dry-run` prints what is pending after that",
        1,
        f"{configuration.migrations.dir}/1_step.sql",
    )
    await database.execute("DELETE FROM t WHERE ctid = '(0,1)'")
    assert (await ampd.migrate(configuration)).current_version == 1
    assert (await database.fetchval("SELECT count(*) FROM t"), await indexes(database)) == (1, [("i", True)])


async def test_a_script_has_the_schema_and_the_role_of_a_run(database: Database, configured: Configure) -> None:
    """A schema that is missing is made; tables are made in it, by the role, also once a file has reset the session."""
    owner = await database.role("owner", f"CREATE ON DATABASE {database.name}")
    files = (
        "CREATE TABLE a (); RESET ALL; RESET ROLE; CREATE TABLE b ()",
        "-- no-transaction\nDISCARD ALL; CREATE TABLE c ()",
    )
    configuration = configured(*scripts(*files), schema="app")
    policy = msgspec.structs.replace(configuration.migrations, role=owner.name)
    configuration = msgspec.structs.replace(configuration, migrations=policy)
    done = psql(database, await printed(configuration))
    assert (done.returncode, done.stderr) == (0, "")
    tables = await database.fetch(
        "SELECT schemaname, tablename, tableowner FROM pg_tables WHERE tableowner <> 'postgres'"
    )
    expected = {("app", name, owner.name) for name in ("a", "b", "c", TABLE)}
    assert {tuple(table) for table in tables} == expected
    assert (await ampd.status(configuration)).up_to_date


async def test_no_script_while_a_runner_is_at_work(configured: Configure) -> None:
    """Whether the running migration will be there, when what is pending after it is applied, is not known."""
    found, executions = await preview.dry_run(configured(*scripts("SELECT 1", "SELECT 2")))
    first, second = found.plan.migrations
    running = msgspec.structs.replace(found.plan, pending=(second,), running=(first,))
    with pytest.raises(ampd.AdvisoryLockTimeout) as caught:
        check_scriptable(msgspec.structs.replace(found, plan=running), executions[1:])
    told = "1 step is being run, and what is pending after it cannot be told yet\nhint: wait for it and run again"
    assert str(caught.value) == told
