"""What a failure looks like: where it stands in which file, what the server said, what to do; never a password."""

import os
import re
import tempfile
import traceback
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import anyio
import asyncpg
import msgspec
import pytest
import trustme

import ampd
from ampd.apply import diagnosis
from ampd.errors import AmpdError, AuthenticationFailed, DatabaseMissing, ReadOnlyServer, TlsFailed
from ampd.local_server.server import local_server
from ampd.postgres.permissions import grant_hint
from ampd.postgres.server_error import ServerError
from ampd.sql import splitter
from tests.folders import write
from tests.scenes import GENEROUS, scripts, until
from tests.servers import Ampd, Database, Server

pytestmark = pytest.mark.anyio

AT_ONCE = ampd.Limits(connect_wait_secs=0)
KEPT = "nothing of this migration was kept: fix the file and run again"


async def migration_error(database: Database, folder: Path, script: str | bytes) -> AmpdError:
    """Return the error of a migration with this script."""
    files = ampd.read_migrations(write(folder / "m", {"1_x.sql": script}))
    with pytest.raises(AmpdError) as caught:
        await ampd.migrate(database.url, migrations=files)
    assert await database.fetchval("SELECT to_regclass('ampd_schema_migrations')") is None
    return caught.value


# --- every failing statement, with and without a position from the server

STATEMENTS = [
    pytest.param("SELECT 1;\nCREATE TABEL b ();\n", "42601", 2, 8, "CREATE TABEL b ();", id="syntax error"),
    pytest.param("SELECT 1;\nSELECT (1;\n", "42601", 2, 10, "SELECT (1;", id="syntax error at the semicolon"),
    pytest.param("SELECT 1;\n\tSELECT\t1,\tnosuch;\n", "42703", 2, 12, "    SELECT    1,    nosuch;", id="tabs"),
    pytest.param(
        "-- größe 中文 🎉\nSELECT 'ä🎉', nosuch;\n",
        "42703",
        2,
        14,
        "SELECT 'ä🎉', nosuch;",
        id="wide characters before it",
    ),
    pytest.param(
        b"SELECT 1;\r\n\r\nSELECT 1,\r\n  nosuch;\r\n", "42703", 4, 3, "  nosuch;", id="CRLF, with a position"
    ),
    pytest.param(
        b"SELECT 1;\r\n\r\nALTER TABLE missing ADD x int;\r\n",
        "42P01",
        3,
        1,
        "ALTER TABLE missing ADD x int;",
        id="CRLF, without a position",
    ),
    pytest.param("\ufeffSELECT nosuch;\n", "42703", 1, 8, "SELECT nosuch;", id="BOM"),
    pytest.param(
        "\ufeff-- ß\r\nSELECT 1; SELECT nosuch;", "42703", 2, 18, "SELECT 1; SELECT nosuch;", id="BOM and CRLF"
    ),
    pytest.param(
        "SELECT 1; ALTER TABLE missing ADD x int; SELECT 2;\n",
        "42P01",
        1,
        11,
        "SELECT 1; ALTER TABLE missing ADD x int; SELECT 2;",
        id="in the middle of a line",
    ),
    pytest.param(
        "CREATE TABLE a (id int PRIMARY KEY);\n\nINSERT INTO a VALUES (1);\n  INSERT INTO a\n    VALUES (1);\n",
        "23505",
        4,
        3,
        "  INSERT INTO a",
        id="unique violation",
    ),
    pytest.param(
        "CREATE TABLE a (x int CHECK (x > 0));\nINSERT INTO a VALUES (-1);",
        "23514",
        2,
        1,
        "INSERT INTO a VALUES (-1);",
        id="check violation",
    ),
    pytest.param(
        "CREATE TABLE a (x int); INSERT INTO a VALUES (NULL);\nALTER TABLE a\n  ALTER x SET NOT NULL;",
        "23502",
        2,
        1,
        "ALTER TABLE a",
        id="not-null violation",
    ),
    pytest.param(
        "SELECT 1;\nDO $$\nBEGIN\n  PERFORM 1;\n  PERFORM nosuch();\nEND $$;\n",
        "42883",
        5,
        3,
        "  PERFORM nosuch();",
        id="inside DO",
    ),
    pytest.param(
        "CREATE TABLE a (id int PRIMARY KEY);\n"
        "DO LANGUAGE plpgsql $x$ BEGIN\r\n\tINSERT INTO a VALUES (1), (1);\r\nEND $x$;\n",
        "23505",
        3,
        2,
        "    INSERT INTO a VALUES (1), (1);",
        id="a violation inside DO, CRLF",
    ),
    pytest.param("DO $$\nBEGIN\n  IF x THEN\nEND $$;\n", "42601", 4, 5, "END $$;", id="a syntax error inside DO"),
    pytest.param("DO $$ BEGIN\n COMMIT;\nEND $$;\n", "2D000", 2, 2, " COMMIT;", id="COMMIT inside DO"),
    pytest.param(
        "SELECT 1;\nDO 'BEGIN\n  PERFORM 1/0;\nEND';\n", "22012", 3, 3, "  PERFORM 1/0;", id="DO in plain quotes"
    ),
    pytest.param(
        "DO 'BEGIN\n  PERFORM ''$$'';\n  PERFORM 1/0;\nEND';\n", "22012", 3, 3, "  PERFORM 1/0;", id="quotes in quotes"
    ),
    pytest.param(
        "DO -- $$\nLANGUAGE 'plpgsql' $$ BEGIN\n  PERFORM 1/0;\nEND $$;\n",
        "22012",
        3,
        3,
        "  PERFORM 1/0;",
        id="DO with a comment and a language",
    ),
    pytest.param("DO E'BEGIN\n  PERFORM 1/0;\nEND';\n", "22012", 1, 1, "DO E'BEGIN", id="DO in quotes with escapes"),
    pytest.param(
        "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $f$\nBEGIN\n\n"
        "  EXECUTE 'DO $$ BEGIN PERFORM 1/0; END $$';\n  RETURN 1;\nEND $f$;\n"
        "DO $$\nBEGIN\n  PERFORM f();\nEND $$;\n",
        "22012",
        9,
        3,
        "  PERFORM f();",
        id="DO inside a function that DO calls",
    ),
    pytest.param(
        "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$\nBEGIN\n  RETRUN 1;\nEND $$;\n",
        "42601",
        3,
        3,
        "  RETRUN 1;",
        id="inside a function's body",
    ),
    pytest.param(
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS $$\n  SELECT nosuch\n$$;\n",
        "42703",
        2,
        10,
        "  SELECT nosuch",
        id="inside an SQL function's body",
    ),
]


@pytest.mark.parametrize(("script", "sqlstate", "line", "column", "excerpt"), STATEMENTS)
async def test_a_failing_statement_is_shown_with_a_caret(
    database: Database,
    tmp_path: Path,
    script: str | bytes,
    sqlstate: str,
    line: int,
    column: int,
    excerpt: str,
) -> None:
    """File, line and column are those of an editor, and the caret stands below the spot in the excerpt."""
    error = await migration_error(database, tmp_path, script)
    file = f"{tmp_path}/m/1_x.sql"
    assert (type(error), error.version, error.file, error.sqlstate) == (ampd.MigrationFailed, 1, file, sqlstate)
    assert (error.line, error.column) == (line, column)
    assert error.message.startswith(f"{file}:{line}: ")
    assert error.message.endswith(f" (SQLSTATE {sqlstate})")
    assert error.excerpt is not None
    where, gap, shown, caret = error.excerpt.splitlines()
    assert (where, gap, shown) == (f"{file}:{line}:{column}", "  |", f"{line} | {excerpt}")
    # A tab is shown as four columns, an emoji or an ideograph takes two.
    text = script.decode() if isinstance(script, bytes) else script
    before = text.removeprefix("\ufeff").split("\n")[line - 1][: column - 1]
    width = sum({"\t": 4, "🎉": 2}.get(character, 1) for character in before)
    assert caret == f"  | {' ' * width}^"


WHOLE = [
    pytest.param(
        "CREATE TABLE a (id int PRIMARY KEY);\nINSERT INTO a VALUES (1), (1);\n",
        """\
m/1_x.sql:2: duplicate key value violates unique constraint "a_pkey" (SQLSTATE 23505)
m/1_x.sql:2:1
  |
2 | INSERT INTO a VALUES (1), (1);
  | ^
detail: Key (id)=(1) already exists.
hint: nothing of this migration was kept: fix the file and run again""",
        id="detail",
    ),
    pytest.param(
        "DO $$\nBEGIN\n  RAISE 'no way' USING DETAIL = 'why', HINT = 'do this.', ERRCODE = 'P0042';\nEND $$",
        """\
m/1_x.sql:3: no way (SQLSTATE P0042)
m/1_x.sql:3:3
  |
3 |   RAISE 'no way' USING DETAIL = 'why', HINT = 'do this.', ERRCODE = 'P0042';
  |   ^
detail: why
hint: do this; nothing of this migration was kept: fix the file and run again""",
        id="the script's own error",
    ),
    pytest.param(
        "CREATE FUNCTION f(a int) RETURNS int LANGUAGE plpgsql AS $$\nBEGIN\n  RETURN 1/a;\nEND $$;\nSELECT 1, f(0);\n",
        """\
m/1_x.sql:5: division by zero in function f(integer) line 3 (SQLSTATE 22012)
m/1_x.sql:5:1
  |
5 | SELECT 1, f(0);
  | ^
hint: nothing of this migration was kept: fix the file and run again""",
        id="inside a function that is called",
    ),
    pytest.param(
        "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$\nBEGIN\n  RETURN 1/0;\nEND $$;\n"
        "DO $$\nBEGIN\n  PERFORM 1;\n  PERFORM f();\nEND $$;\n",
        """\
m/1_x.sql:8: division by zero in function f() line 3 (SQLSTATE 22012)
m/1_x.sql:8:3
  |
8 |   PERFORM f();
  |   ^
hint: nothing of this migration was kept: fix the file and run again""",
        id="inside a function that DO calls",
    ),
    pytest.param(
        "CREATE TABLE a (id int PRIMARY KEY);\n"
        "CREATE TABLE b (a int REFERENCES a DEFERRABLE INITIALLY DEFERRED);\nINSERT INTO b VALUES (7);\n",
        """\
m/1_x.sql: insert or update on table "b" violates foreign key constraint "b_a_fkey" at the end of the migration \
(SQLSTATE 23503)
detail: Key (a)=(7) is not present in table "a".
hint: nothing of this migration was kept: fix the file and run again""",
        id="a deferred constraint, at the end",
    ),
    pytest.param(
        "DELETE FROM ampd_schema_migrations;\n",
        """\
m/1_x.sql:1: ampd's history table "public".ampd_schema_migrations has lost rows while this migration ran
m/1_x.sql:1:1
  |
1 | DELETE FROM ampd_schema_migrations;
  | ^
hint: leave that table to ampd, also where a statement goes over all tables; \
nothing of this migration was kept: fix the file and run again""",
        id="its own row removed",
    ),
    pytest.param(
        "-- statement-timeout: 50ms\nSELECT 1;\nSELECT pg_sleep(60);\n",
        """\
m/1_x.sql:3: canceling statement due to statement timeout (SQLSTATE 57014)
m/1_x.sql:3:1
  |
3 | SELECT pg_sleep(60);
  | ^
hint: if it needs longer, raise statement_timeout_secs or begin the file with `-- statement-timeout: 10min`; \
nothing of this migration was kept: fix the file and run again""",
        id="statement timeout",
    ),
    pytest.param(
        "CREATE TABLE a ();\nCREATE TABLE a ();\n",
        """\
m/1_x.sql:2: relation "a" already exists (SQLSTATE 42P07)
m/1_x.sql:2:1
  |
2 | CREATE TABLE a ();
  | ^
hint: it exists already: was it made by hand, or by another tool?; \
nothing of this migration was kept: fix the file and run again""",
        id="exists already",
    ),
]


@pytest.mark.parametrize(("script", "text"), WHOLE)
async def test_the_whole_text_of_a_failure(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, text: str
) -> None:
    """A person reads what happened, where, the server's detail and hint, and what became of the migration."""
    monkeypatch.chdir(tmp_path)
    write(Path("m"), {"1_x.sql": script})
    with pytest.raises(AmpdError) as caught:
        await ampd.migrate(database.url, migrations=ampd.read_migrations("m"))
    assert str(caught.value) == text


async def test_a_new_enum_value_that_is_used_at_once(database: Database) -> None:
    """The server's refusal of an uncommitted enum value comes with the way out: a migration of its own."""
    one, two = "CREATE TYPE e AS ENUM ('a');", "ALTER TYPE e ADD VALUE 'b';\nSELECT 'b'::e;\n"
    with pytest.raises(ampd.MigrationFailed) as caught:
        await ampd.migrate(database.url, migrations=scripts(one, two))
    assert (caught.value.sqlstate, caught.value.line, caught.value.column) == ("55P04", 2, 8)
    assert caught.value.hint is not None
    assert caught.value.hint.endswith(KEPT)


def test_a_server_that_speaks_another_language() -> None:
    """The line inside a DO block is found whatever language the server's messages are in."""
    (migration,) = scripts("SELECT 1;\nDO $$\nBEGIN\n  PERFORM 1/0;\nEND $$;\n")
    said = SimpleNamespace(
        message="Division durch Null",
        sqlstate="22012",
        detail=None,
        hint=None,
        position=None,
        context="PL/pgSQL-Funktion inline_code_block Zeile 3 bei PERFORM",
    )
    statement = splitter.split(migration.sql)[1]
    error = diagnosis.migration_error(ServerError(said, str, None), migration, statement, None, aftermath="")
    assert (error.message, error.line, error.column) == ("1_step.sql:4: Division durch Null (SQLSTATE 22012)", 4, 3)


def test_a_character_that_the_encoding_lacks() -> None:
    """A character that the server could not even convert is found by its bytes, not in a comment that was not sent."""
    (migration,) = scripts("-- a → b\nSELECT 1;\nSELECT 'ä',\n  'a → b';\n")
    words = 'character with byte sequence 0xe2 0x86 0x92 in encoding "UTF8" has no equivalent in encoding "LATIN1"'
    said = SimpleNamespace(message=words, sqlstate="22P05", detail=None, hint=None, position=None, context=None)
    error = diagnosis.migration_error(ServerError(said, str, None), migration, None, None, aftermath="nothing was kept")
    assert (error.code, str(error)) == (
        "migration_failed",
        f"""\
1_step.sql:4: {words} (SQLSTATE 22P05)
1_step.sql:4:6
  |
4 |   'a → b';
  |      ^
hint: the database's encoding has no such character: do without it, or use a UTF8 database; nothing was kept""",
    )
    (unnamed,) = scripts("SELECT 1;")  # it stands in the name of the file, then
    error = diagnosis.migration_error(ServerError(said, str, None), unnamed, None, None, aftermath="nothing was kept")
    assert (error.message, error.line) == (f"1_step.sql: {words} (SQLSTATE 22P05)", None)


@pytest.mark.parametrize("script", ["SELECT 1;\nSELECT E'\\000';\n", "SELECT 1;\nSELECT E'\\xff';\n"])
async def test_what_the_server_cannot_even_read(database: Database, tmp_path: Path, script: str) -> None:
    """An error of the parse that carries no position is the migration's all the same, and not the connection's."""
    error = await migration_error(database, tmp_path, script)
    assert (error.code, error.version, error.sqlstate) == ("migration_failed", 1, "22021")
    assert error.message.startswith(f"{tmp_path}/m/1_x.sql")


async def test_a_failing_statement_outside_of_a_transaction(database: Database, tmp_path: Path) -> None:
    """A no-transaction file shows its failing statement likewise, and that it is recorded as unfinished."""
    files = ampd.read_migrations(
        write(tmp_path / "m", {"1_x.sql": "-- no-transaction\nCREATE TABLE a (x int);\n\n  SELECT 'ß', nosuch;\n"})
    )
    with pytest.raises(ampd.MigrationFailed) as caught:
        await ampd.migrate(database.url, migrations=files)
    error = caught.value
    assert (error.line, error.column, error.sqlstate) == (4, 15, "42703")
    assert error.excerpt == f"{tmp_path}/m/1_x.sql:4:15\n  |\n4 |   SELECT 'ß', nosuch;\n  |               ^"
    assert error.hint is not None
    assert error.hint.startswith("it is recorded as unfinished: ")
    rows = await database.fetch("SELECT version, finished_at, statements_done FROM ampd_schema_migrations")
    assert [tuple(row) for row in rows] == [(1, None, 1)]


@pytest.mark.parametrize(
    ("script", "line", "column", "message"),
    [
        ("SELECT 1;\n  COMMIT;\n", 2, 3, "COMMIT in a migration that runs in one transaction"),
        ("BEGIN;\nSELECT 1;\nCOMMIT;\n", 1, 1, None),
        ("SELECT 1;\nVACUUM;\n", 2, 1, "VACUUM cannot run inside a transaction block"),
        ("SELECT 1;\n\\d foo\n", 2, 1, "\\d is a command of psql, not SQL"),
        ("COPY a FROM STDIN;\n1\n\\.\n", 1, 1, None),
        ("SELECT 1;\nSELECT 'abc;\n", 2, 8, "unterminated string"),
        ("-- lock-timeout: soon\nSELECT 1;\n", 1, 1, None),
    ],
)
async def test_what_cannot_work_is_refused_before_anything_runs(
    database: Database, tmp_path: Path, script: str, line: int, column: int, message: str | None
) -> None:
    """A script that cannot be run is named with its line, even if it comes after others that could have run."""
    files = {"1_good.sql": "CREATE TABLE good ();", "2_bad.sql": script}
    with pytest.raises(ampd.InvalidMigration) as caught:
        await ampd.migrate(database.url, migrations=ampd.read_migrations(write(tmp_path / "m", files)))
    error = caught.value
    assert (error.version, error.file, error.line) == (2, f"{tmp_path}/m/2_bad.sql", line)
    if message is not None:
        assert error.excerpt is not None
        assert (error.column, error.message) == (column, f"{tmp_path}/m/2_bad.sql:{line}: {message}")
    assert await database.fetchval("SELECT to_regclass('good')") is None


async def test_everything_that_cannot_work_is_listed_at_once(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """Offences in several pending files are told in one error, and nothing is run."""
    write(
        tmp_path / "m",
        {"1_a.sql": "SELECT 1;\nCOMMIT;\n", "2_b.sql": "VACUUM;", "3_c.sql": "SELECT 1;", "4_d.sql": "\n\\q"},
    )
    process = ampd("migrate", "--migrations", "m", url=database.url)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.splitlines()[:4] == [
        "error: 3 places in the pending migrations cannot be run; nothing was:",
        "  m/1_a.sql:2: COMMIT in a migration that runs in one transaction",
        "  m/2_b.sql:1: VACUUM cannot run inside a transaction block",
        "  m/4_d.sql:2: \\q is a command of psql, not SQL",
    ]
    assert await database.fetchval("SELECT to_regclass('ampd_schema_migrations')") is None


async def test_a_list_of_what_cannot_work_has_an_end(database: Database) -> None:
    """Of many places the first twenty are named, and the others are counted."""
    with pytest.raises(ampd.InvalidMigration) as caught:
        await ampd.migrate(database.url, migrations=scripts("VACUUM;\n" * 15, "VACUUM;\n" * 10))
    lines = caught.value.message.splitlines()
    assert lines[0] == "25 places in the pending migrations cannot be run; nothing was:"
    assert lines[-2:] == ["  2_step.sql:5: VACUUM cannot run inside a transaction block", "  and 5 more"]
    assert len(lines) == 22


# --- privileges


async def refused(url: str, *texts: str, **options: Any) -> AmpdError:
    """Return the error of a run that is refused."""
    with pytest.raises(AmpdError) as caught:
        await ampd.migrate(url, migrations=scripts(*texts), limits=AT_ONCE, **options)
    return caught.value


async def test_no_right_to_create_in_the_schema(database: Database) -> None:
    """A role without CREATE on the schema is told the GRANT to run."""
    role = await database.role("low")
    await database.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    error = await refused(role.url, "CREATE TABLE a ();")
    assert isinstance(error, ampd.PermissionDenied)
    assert (error.sqlstate, error.message) == ("42501", "permission denied for schema public")
    assert f'GRANT USAGE, CREATE ON SCHEMA "public" TO "{role.name}"' in str(error.hint)


async def test_no_right_to_create_a_schema(database: Database) -> None:
    """A role that may not create the configured schema is told the GRANT to run."""
    role = await database.role("low")
    error = await refused(role.url, "CREATE TABLE a ();", schema="elsewhere")
    assert isinstance(error, ampd.PermissionDenied)
    assert error.message == f"permission denied for database {database.name}"
    assert f'GRANT CREATE ON DATABASE "{database.name}" TO "{role.name}"' in str(error.hint)


async def test_no_right_to_use_the_schema(database: Database) -> None:
    """A role without USAGE on the configured schema is told the GRANT to run, by `status` as well."""
    role = await database.role("low")
    await database.execute("CREATE SCHEMA elsewhere")
    await ampd.migrate(database.url, migrations=scripts("SELECT 1"), schema="elsewhere")
    for run in (ampd.migrate, ampd.status):
        with pytest.raises(ampd.PermissionDenied) as caught:
            await run(role.url, migrations=scripts("SELECT 1"), schema="elsewhere")
        assert caught.value.message == "permission denied for schema elsewhere"
        assert 'GRANT USAGE, CREATE ON SCHEMA "elsewhere"' in str(caught.value.hint)


async def test_no_right_to_read_the_history(database: Database) -> None:
    """A role without SELECT on the history table is told the GRANT to run; with SELECT alone `status` works."""
    role = await database.role("low")
    await ampd.migrate(database.url, migrations=scripts("SELECT 1"))
    for run in (ampd.migrate, ampd.status):
        with pytest.raises(ampd.PermissionDenied) as caught:
            await run(role.url, migrations=scripts("SELECT 1"))
        assert caught.value.message == "permission denied for table ampd_schema_migrations"
        grant = f'GRANT SELECT ON TABLE "public".ampd_schema_migrations TO "{role.name}"'
        assert caught.value.hint == f"as its owner: {grant}; and INSERT, UPDATE, DELETE, if it is to migrate"
    await database.execute(grant)
    assert (await ampd.status(role.url, migrations=scripts("SELECT 1"))).up_to_date
    assert (await ampd.migrate(role.url, migrations=scripts("SELECT 1"))).applied == ()


@pytest.mark.parametrize(
    ("path", "said", "hint"),
    [
        ("amp", "(amp) names no schema that exists", 'CREATE SCHEMA amp AUTHORIZATION "{role}"'),
        ('"A mp"', '("A mp") names no schema that exists', 'CREATE SCHEMA "A mp" AUTHORIZATION "{role}"'),
        ('"$user", amp', '("$user", amp) names no schema that exists', 'CREATE SCHEMA amp AUTHORIZATION "{role}"'),
        ("pg_temp", "(pg_temp) names no schema that exists", None),
        ("''", '("") names no schema that exists', None),
        (
            '"$user", amp, closed',
            '("$user", amp, closed) names no schema that it may use',
            'as its owner: GRANT USAGE, CREATE ON SCHEMA closed TO "{role}"',
        ),
    ],
)
async def test_a_search_path_that_leads_nowhere(database: Database, path: str, said: str, hint: str | None) -> None:
    """A schema that does not exist is told from one that the role may not use; the hint runs as it is printed."""
    role = await database.role("low")
    await database.execute(f"CREATE SCHEMA closed; ALTER ROLE {role.name} SET search_path = {path}")
    with pytest.raises(AmpdError) as caught:
        await ampd.status(role.url, migrations=())
    error = caught.value
    assert (error.code, error.message) == (
        "permission" if "may use" in said else "config",
        f"the search path of role {role.name} {said}",
    )
    statement = hint.format(role=role.name) if hint else f'ALTER ROLE "{role.name}" SET search_path = public'
    assert error.hint == f"{statement}; or set metadata_db.schema"
    await database.execute(statement.removeprefix("as its owner: "))
    assert (await ampd.status(role.url, migrations=())).up_to_date


async def test_a_statement_that_the_role_may_not_run(database: Database) -> None:
    """A privilege that a statement lacks is `permission`, with file and line, and the GRANT to run."""
    role = await database.role("low")
    await database.execute(f"CREATE TABLE theirs (id int); GRANT CREATE ON SCHEMA public TO {role.name}")
    error = await refused(role.url, "SELECT 1;\n\nALTER TABLE theirs ADD x int;")
    assert isinstance(error, ampd.PermissionDenied)
    assert (error.file, error.line, error.sqlstate) == ("1_step.sql", 3, "42501")
    assert error.hint == (
        f'as a superuser (in its schema): ALTER TABLE "theirs" OWNER TO "{role.name}"; or migrate as the owner; '
        "nothing of this migration was kept: run again after that"
    )
    error = await refused(role.url, "SELECT 1;\nSELECT * FROM theirs;")
    assert (error.code, error.line) == ("permission", 2)
    assert error.hint == (
        f'as its owner (in its schema): GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE "theirs" TO "{role.name}"; '
        "nothing of this migration was kept: run again after that"
    )


NAMES = ("theirs", "Theirs", "the irs", 'th"eirs', "the.irs")
ROUTINE_NAMES = NAMES[:4]
FUNCTION = "CREATE {} {{}}() {} LANGUAGE sql AS 'SELECT 1'; REVOKE EXECUTE ON ROUTINE {{}} FROM PUBLIC"
PRIVILEGES = [
    pytest.param("CREATE TABLE {} (id int PRIMARY KEY)", "INSERT INTO {} SELECT 1 FROM {}", NAMES, id="table"),
    pytest.param("CREATE TABLE {} ()", "TRUNCATE {}", NAMES, id="truncate"),
    pytest.param(
        "CREATE TABLE {} (id int PRIMARY KEY)", "CREATE TABLE t{number} (x int REFERENCES {})", NAMES, id="fk"
    ),
    pytest.param(
        "CREATE TABLE {} ()",
        "CREATE TRIGGER t AFTER INSERT ON {} EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        NAMES,
        id="trigger",
    ),
    pytest.param("CREATE VIEW {} AS SELECT 1", "SELECT * FROM {}", NAMES, id="view"),
    pytest.param("CREATE MATERIALIZED VIEW {} AS SELECT 1", "CREATE TABLE t{number} AS TABLE {}", NAMES, id="matview"),
    pytest.param("CREATE SEQUENCE {}", "SELECT setval('{}', nextval('{}'))", NAMES, id="sequence"),
    pytest.param("CREATE SCHEMA {}", "CREATE TABLE {}.t ()", NAMES, id="schema"),
    pytest.param(FUNCTION.format("FUNCTION", "RETURNS int"), "SELECT {}()", ROUTINE_NAMES, id="function"),
    pytest.param(FUNCTION.format("PROCEDURE", ""), "CALL {}()", ROUTINE_NAMES, id="procedure"),
    pytest.param(
        "CREATE AGGREGATE {}(int) (SFUNC = int4pl, STYPE = int); REVOKE EXECUTE ON ROUTINE {} FROM PUBLIC",
        "SELECT {}(1)",
        ROUTINE_NAMES,
        id="aggregate",
    ),
    pytest.param("REVOKE CREATE ON DATABASE {} FROM PUBLIC", "CREATE SCHEMA s", ("DATABASE",), id="database"),
    pytest.param("REVOKE USAGE ON LANGUAGE {} FROM PUBLIC", "SELECT 1", ("plpgsql",), id="language"),
]
OWNERS = [
    pytest.param("CREATE TABLE {} ()", "ALTER TABLE {} ADD x int", NAMES, id="table"),
    pytest.param("CREATE VIEW {} AS SELECT 1", "ALTER VIEW {} RENAME TO v{number}", NAMES, id="view"),
    pytest.param("CREATE MATERIALIZED VIEW {} AS SELECT 1", "DROP MATERIALIZED VIEW {}", NAMES, id="matview"),
    pytest.param("CREATE SEQUENCE {}", "ALTER SEQUENCE {} CYCLE", NAMES, id="sequence"),
    pytest.param("CREATE SCHEMA {}", "DROP SCHEMA {}", NAMES, id="schema"),
    pytest.param(
        FUNCTION.format("FUNCTION", "RETURNS int"), "ALTER FUNCTION {}() STRICT", ROUTINE_NAMES, id="function"
    ),
    pytest.param(FUNCTION.format("PROCEDURE", ""), "DROP PROCEDURE public.{}()", ROUTINE_NAMES, id="procedure"),
    pytest.param("SELECT '{}'", "ALTER DATABASE {} SET work_mem = '5MB'", ("DATABASE",), id="database"),
]


async def _refused_until_obeyed(
    database: Database, prepare: str, action: str, names: tuple[str, ...], statement: str
) -> None:
    """Run an action on an object of each name, follow the hint, and see it succeed."""
    role = await database.role("low", "CREATE ON SCHEMA public")
    texts = []
    for number, each in enumerate(names):
        name = each.replace("DATABASE", database.name)
        quoted = '"' + name.replace('"', '""') + '"'
        await database.execute(prepare.replace("{}", quoted))
        texts.append(action.replace("{number}", str(number)).replace("{}", quoted))
        error = await refused(role.url, *texts)
        assert isinstance(error, ampd.PermissionDenied)
        hint = re.match(
            rf'as (?:its owner|a superuser)(?: \(in its schema\))?: ({statement} .* TO "{role.name}")', str(error.hint)
        )
        assert hint, error
        await database.execute(hint[1])
        await ampd.migrate(role.url, migrations=scripts(*texts))


@pytest.mark.parametrize(("prepare", "action", "names"), PRIVILEGES)
async def test_the_grant_of_the_hint_is_what_was_missing(
    database: Database, prepare: str, action: str, names: tuple[str, ...]
) -> None:
    """The GRANT of a hint runs as it is printed, whatever the name, and what was refused then succeeds."""
    await _refused_until_obeyed(database, prepare, action, names, "GRANT")


@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"])
@pytest.mark.parametrize("taken", ["SET ROLE {}", "SET LOCAL ROLE '{}'", 'SET SESSION AUTHORIZATION "{}"'])
async def test_the_grant_of_the_hint_is_to_the_role_of_the_file(database: Database, taken: str, directive: str) -> None:
    """Where a file has taken on another role it is that one which lacks the privilege, and gets it."""
    low = await database.role("low")
    await database.execute("CREATE SCHEMA closed")
    begin, commit = ("BEGIN; ", "; COMMIT") if directive else ("", "")
    files = scripts(f"{directive}{begin}{taken.format(low.name)}; CREATE TABLE closed.t (){commit}")
    with pytest.raises(ampd.PermissionDenied) as raised:
        await ampd.migrate(database.url, migrations=files)
    grant = f'GRANT USAGE, CREATE ON SCHEMA "closed" TO "{low.name}"'
    assert str(raised.value.hint).startswith(f"as its owner: {grant}; ")
    await database.execute(grant)
    await ampd.migrate(database.url, migrations=files)


@pytest.mark.parametrize(("prepare", "action", "names"), OWNERS)
async def test_the_change_of_owner_of_the_hint_is_what_was_missing(
    database: Database, prepare: str, action: str, names: tuple[str, ...]
) -> None:
    """Where only the owner may do it, the ALTER of the hint runs as it is printed, and it then succeeds."""
    await _refused_until_obeyed(database, prepare, action, names, "ALTER")


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("permission denied for schema Fast", 'as its owner: GRANT USAGE, CREATE ON SCHEMA "Fast" TO "r"'),
        (
            "permission denied for materialized view a view",
            'as its owner (in its schema): GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE "a view" TO "r"',
        ),
        *(
            (message, 'migrate as its owner, or grant "r" the membership in the role that owns it')
            for message in ("must be owner of index i", "must be owner of type t", "must be owner of large object 7")
        ),
        *(
            (message, 'grant "r" the privilege that the message names, or migrate as a role that has it')
            for message in (
                'permission denied to create extension "x"',
                "permission denied for column x of relation y",
                "permission denied for tables",
                "permission denied for tablespace Fast",
                "permission denied for type t",
                "permission denied for foreign server s",
                "keine Berechtigung für Tabelle t",
            )
        ),
    ],
)
def test_what_a_refusal_is_read_as(message: str, hint: str) -> None:
    """Only the kinds of object that have a GRANT or an owner of their own get a statement to run."""
    said = SimpleNamespace(message=message, sqlstate="42501", detail=None, hint=None, position=None, context=None)
    assert grant_hint(ServerError(said, str, "r")) == hint


@pytest.mark.parametrize(
    ("statement", "table"),
    [
        ("SELECT * FROM amp.theirs", 'amp."theirs"'),
        ("INSERT INTO Amp . Theirs SELECT", None),  # which is not how the server spells it
        ('DELETE FROM "Am""p"."theirs" USING x.theirs_too', '"Am""p"."theirs"'),
        ("SELECT t.theirs FROM theirs t", None),
        ("SELECT FROM a.theirs, b.theirs", None),
        ("SELECT FROM their.s", None),
    ],
)
def test_the_schema_of_a_table_that_was_refused(statement: str, table: str | None) -> None:
    """The table in the GRANT has the schema that the statement gives it; else the hint says that it has one."""
    words = "permission denied for table theirs"
    said = SimpleNamespace(message=words, sqlstate="42501", detail=None, hint=None, position=None, context=None)
    hint = grant_hint(ServerError(said, str, "r"), (), statement)
    where = "as its owner" if table else "as its owner (in its schema)"
    assert hint == f"""{where}: GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE {table or '"theirs"'} TO "r\""""


async def test_hints_about_a_database_with_an_odd_name(database: Database) -> None:
    """The statements of the hints on connecting name the URL's database, however it is spelt, and run as printed."""
    name, odd = quote(f'{database.name}/"O d', safe=""), f'{database.name}/"O d'
    role = await database.role("low")
    url = database.server.url(name, role.name)
    with pytest.raises(DatabaseMissing) as missing:
        await ampd.status(url, migrations=())
    create = str(missing.value.hint).removeprefix("create it (").partition("), or")[0]
    assert create == 'CREATE DATABASE "' + odd.replace('"', '""') + '"'
    await database.execute(create)
    try:
        await database.execute(f"REVOKE CONNECT ON DATABASE {create.removeprefix('CREATE DATABASE ')} FROM PUBLIC")
        with pytest.raises(ampd.PermissionDenied) as denied:
            await ampd.status(url, migrations=())
        await database.execute(str(denied.value.hint))
        await ampd.status(url, migrations=())
    finally:
        await database.execute(f"DROP DATABASE {create.removeprefix('CREATE DATABASE ')} WITH (FORCE)")


@pytest.mark.parametrize(
    ("user", "problem", "verb"),
    [
        ("no body", "does not exist", "CREATE"),
        ("", "does not exist", "CREATE"),
        ("{database}_low", "is not permitted to log in", "ALTER"),
    ],
)
async def test_a_role_that_may_not_log_in(
    database: Database, monkeypatch: pytest.MonkeyPatch, user: str, problem: str, verb: str
) -> None:
    """A role that is not there, or no login, wants another statement than a new password."""
    monkeypatch.setenv("LOGNAME", "no body")
    role = await database.role("low")
    await database.execute(f"ALTER ROLE {role.name} NOLOGIN")
    name = user.format(database=database.name)
    with pytest.raises(AuthenticationFailed) as caught:
        await ampd.status(database.server.url(database.name, name).replace("//@", "//"), migrations=())
    who = name or "no body"
    assert caught.value.message.endswith(f'/{database.name}: role "{who}" {problem}')
    assert caught.value.hint == f'{verb} ROLE "{who}" LOGIN, or correct the user of the URL'


async def test_a_role_that_may_not_connect(database: Database) -> None:
    """A role without CONNECT is told the GRANT to run."""
    role = await database.role("low")
    await database.execute(f"REVOKE CONNECT ON DATABASE {database.name} FROM PUBLIC")
    error = await refused(role.url)
    assert isinstance(error, ampd.PermissionDenied)
    assert error.hint == f'GRANT CONNECT ON DATABASE "{database.name}" TO "{role.name}"'


# --- servers that take no writes


async def test_a_database_that_is_read_only_by_default(database: Database) -> None:
    """A read-only database is refused by name before anything runs; with nothing pending it is no obstacle."""
    one, two = scripts("CREATE TABLE a ();", "CREATE TABLE b ();")
    await ampd.migrate(database.url, migrations=(one,))
    await database.execute(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    assert (await ampd.migrate(database.url, migrations=(one,))).applied == ()
    assert not (await ampd.status(database.url, migrations=(one, two))).up_to_date
    with pytest.raises(ReadOnlyServer) as caught:
        await ampd.migrate(database.url, migrations=(one, two))
    assert (caught.value.code, caught.value.message.endswith("a standby, or read-only by default")) == (
        "connection",
        True,
    )
    assert str(caught.value.hint).startswith("connect to the primary")


# --- connections: each failure its own class and hint, at once, and never a password


SECRET = "s3cr3t/p@ss:w%rd"
CODED = quote(SECRET, safe="")


class Strict(msgspec.Struct, frozen=True):
    """A server that wants passwords and speaks TLS as `localhost`, and a folder with the certificates."""

    port: int
    folder: Path

    def url(self, user: str, query: str = "", *, host: str = "localhost", database: str = "amp") -> str:
        """Return a URL with the password in it; `{folder}` in the query is that of the certificates."""
        return f"postgresql://{user}:{CODED}@{host}:{self.port}/{database}?{query.format(folder=self.folder)}"


@pytest.fixture(scope="module")
async def strict(server: Server, anyio_backend: str) -> AsyncIterator[Strict]:  # noqa: ARG001
    """One such server for these tests: `alice` needs a password, `bob` TLS, and `eve` is let in by no rule."""
    rules = """
        local all all trust
        hostssl all bob all trust
        hostnossl all bob all reject
        host all eve all reject
        host all all all scram-sha-256
    """
    ours, other = trustme.CA(), trustme.CA()
    certificate = ours.issue_cert("localhost")
    with tempfile.TemporaryDirectory(prefix="ampd-tls-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        ours.cert_pem.write_to_path(str(folder / "ca.pem"))
        other.cert_pem.write_to_path(str(folder / "other.pem"))
        async with local_server(folder / "db", bindir=Path(server.bindir), tcp=True) as local:
            data, owner = local.data_dir, local.data_dir.stat()
            certificate.cert_chain_pems[0].write_to_path(str(data / "server.crt"))
            certificate.private_key_pem.write_to_path(str(data / "server.key"))
            (data / "pg_hba.conf").write_text(rules)
            for file in ("server.crt", "server.key", "pg_hba.conf"):
                (data / file).chmod(0o600)
                os.chown(data / file, owner.st_uid, owner.st_gid)
            admin = await asyncpg.connect(local.url)
            await admin.execute("SET password_encryption = 'scram-sha-256'")
            await admin.execute(
                f"CREATE ROLE alice LOGIN PASSWORD '{SECRET}'; CREATE ROLE bob LOGIN; CREATE ROLE eve LOGIN"
            )
            await admin.execute("GRANT CREATE ON SCHEMA public TO alice; GRANT CREATE ON DATABASE amp TO alice, bob")
            await admin.execute("ALTER SYSTEM SET ssl = on")
            await admin.execute("SELECT pg_reload_conf()")
            await admin.close()
            await until(lambda: _speaks_tls(local.url))
            yield Strict(local.port, folder)


async def _speaks_tls(url: str) -> bool:
    connection = await asyncpg.connect(url)
    try:
        return bool(await connection.fetchval("SELECT current_setting('ssl')::bool"))
    finally:
        await connection.close()


CHECK = "check user and password of the URL; with psql: ALTER ROLE \"{user}\" PASSWORD '...'"
TLS = "check sslmode, sslrootcert, sslcert and sslkey of the URL against what the server offers"
ASK = "ask the server's administrator for a pg_hba.conf entry for this role, database and address"


@pytest.mark.parametrize(
    ("user", "query", "host", "database", "kind", "said", "hint"),
    [
        pytest.param(
            "alice:wrong",
            "",
            "localhost",
            "amp",
            AuthenticationFailed,
            'password authentication failed for user "alice"',
            CHECK.format(user="alice"),
            id="wrong password",
        ),
        pytest.param(
            "mallory",
            "",
            "localhost",
            "amp",
            AuthenticationFailed,
            'password authentication failed for user "mallory"',
            CHECK.format(user="mallory"),
            id="unknown role",
        ),
        pytest.param(
            "eve",
            "",
            "localhost",
            "amp",
            AuthenticationFailed,
            "pg_hba.conf rejects connection for host",
            None,
            id="rejected by a rule",
        ),
        pytest.param(
            "bob",
            "sslmode=disable",
            "localhost",
            "amp",
            AuthenticationFailed,
            "pg_hba.conf rejects connection",  # "no encryption" since PostgreSQL 14, "SSL off" before
            f"add sslmode=require to the URL if the server insists on TLS; or {ASK}",
            id="rejected without TLS",
        ),
        pytest.param(
            "alice",
            "",
            "localhost",
            "nosuch",
            DatabaseMissing,
            'database "nosuch" does not exist',
            'create it (CREATE DATABASE "nosuch"), or correct the name in the URL',
            id="no such database",
        ),
        pytest.param(
            "alice",
            "sslmode=verify-full&sslrootcert={folder}/ca.pem",
            "127.0.0.1",
            "amp",
            TlsFailed,
            "certificate is not valid for '127.0.0.1'",
            TLS,
            id="verify-full by another name",
        ),
        pytest.param(
            "alice",
            "sslmode=verify-ca&sslrootcert={folder}/other.pem",
            "localhost",
            "amp",
            TlsFailed,
            "certificate verify failed",
            TLS,
            id="verify-ca with another authority",
        ),
        pytest.param(
            "alice",
            "sslmode=verify-full&sslrootcert={folder}/nosuch.pem",
            "localhost",
            "amp",
            AmpdError,
            "nosuch.pem",
            None,
            id="no such authority file",
        ),
        pytest.param(
            "alice",
            "require_auth=none",
            "localhost",
            "amp",
            ampd.ConfigError,
            "require_auth=none, which ampd cannot honour",
            "remove require_auth from the URL if you can do without it",
            id="a security parameter that cannot be honoured",
        ),
    ],
)
async def test_each_failure_to_connect_has_its_own_class_and_hint(
    strict: Strict,
    user: str,
    query: str,
    host: str,
    database: str,
    kind: type[AmpdError],
    said: str,
    hint: str | None,
) -> None:
    """What cannot pass by itself is told at once, with what to do, and without the password in any form."""
    url = strict.url(user, query, host=host, database=database)
    with pytest.raises(kind) as caught, anyio.fail_after(GENEROUS):
        await ampd.status(url, migrations=())  # patient for 30 s, if that were of any use
    error = caught.value
    assert kind is AmpdError or type(error) is kind
    assert said in error.message
    assert hint is None or error.hint == hint
    everything = "".join(traceback.format_exception(error)) + repr(error) + str(vars(error))
    for secret in (SECRET, CODED, quote(SECRET)):
        assert secret not in everything


async def test_a_pool_whose_password_is_wrong(strict: Strict) -> None:
    """Of a pool the user is known by the server's own words."""
    pool = asyncpg.create_pool(strict.url("alice").replace(CODED, "wrong"), min_size=0)
    async with pool:
        with pytest.raises(AuthenticationFailed) as caught:
            await ampd.status(pool, migrations=())
    assert caught.value.message == 'the pool\'s server: password authentication failed for user "alice"'
    hint = """check user and password of the URL; with psql: ALTER ROLE "alice" PASSWORD '...'"""
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("user", "query", "tls"),
    [
        ("alice", "sslmode=verify-full&sslrootcert={folder}/ca.pem", True),
        ("alice", "sslmode=verify-ca&sslrootcert={folder}/ca.pem", True),
        ("alice", "sslmode=require", True),
        ("alice", "sslmode=prefer", True),
        ("alice", "sslmode=disable", False),
        ("bob", "", True),
    ],
)
async def test_tls_modes_that_can_be_honoured_are(strict: Strict, user: str, query: str, tls: bool) -> None:
    """Each mode connects in the way that it names: the script itself finds out whether the connection is encrypted."""
    script = f"DO $$ BEGIN ASSERT (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()) IS {tls}; END $$"
    report = await ampd.migrate(strict.url(user, query), migrations=scripts(script), schema=f"s_{uuid.uuid4().hex}")
    assert report.current_version == 1


async def test_a_server_without_tls(database: Database) -> None:
    """A URL that insists on TLS is refused by name where the server has none."""
    with pytest.raises(TlsFailed, match="rejected SSL upgrade") as caught:
        await ampd.status(f"{database.url}?sslmode=require", migrations=())
    assert caught.value.hint == TLS


@pytest.mark.parametrize(
    "form",
    [
        f"postgresql://alice:{CODED}@localhost:{{port}}/amp?sslmode={{mode}}",
        f"postgresql://localhost:{{port}}/amp?user=alice&password={CODED}&sslmode={{mode}}",
        f"postgresql://alice@localhost:{{port}}/amp?sslmode={{mode}}&password={CODED}&sslpassword={CODED}",
        f"postgres://alice:{CODED}@localhost:{{port}},localhost:{{port}}/amp?sslmode={{mode}}",
    ],
)
@pytest.mark.parametrize(("mode", "code"), [("require", 0), ("bogus", 1), ("verify-full", 1)])
async def test_no_stream_shows_a_password(strict: Strict, ampd: Ampd, form: str, mode: str, code: int) -> None:
    """Whichever form the URL has, as a variable or in a file, neither stream ever shows its password."""
    url = form.format(port=strict.port, mode=mode)
    write(ampd.folder / "m", {"1_a.sql": f"SELECT 1;\nDO $$ BEGIN RAISE NOTICE '%', '{SECRET}'; END $$;"})
    (ampd.folder / "c.toml").write_text(f'[metadata_db]\nurl = "{url}"\npool_size = 1\n')
    here = {"AMP_CONFIG_METADATA_DB__SCHEMA": "public"}  # other tests have left their histories in other schemas
    runs = [
        ampd("status", "--migrations", "m", url=url, env=here),
        ampd("status", "--json", "--migrations", "m", "--config", "c.toml", env=here),
        ampd("migrate", "--json", "--migrations", "m", url=url, env=here),
    ]
    assert [process.returncode for process in runs] == [code] * 3
    for process in runs:
        for secret in (SECRET, CODED, quote(SECRET)):
            assert secret not in process.stdout + process.stderr


async def test_what_the_server_says_of_a_password_is_not_repeated(database: Database) -> None:
    """An error of the server that happens to hold the URL's password is shown without it."""
    role = await database.role("alice", password=SECRET)
    joined = f"'{SECRET[:5]}' || '{SECRET[5:]}'"
    text = f"DO $$ DECLARE a text := {joined}; BEGIN RAISE '%', a USING DETAIL = a, HINT = a; END $$"
    await database.execute(f"GRANT CREATE ON SCHEMA public TO {role.name}")
    with pytest.raises(ampd.MigrationFailed) as caught:
        await ampd.migrate(role.url, migrations=scripts(text))
    assert caught.value.message == "1_step.sql:1: *** (SQLSTATE P0001)"
    assert (caught.value.detail, str(caught.value.hint).split(";")[0]) == ("***", "***")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("script", ["SELECT '{0}', 1,\t'{0}', nosuch;", "SELECT '{0}',\n  '{0}', nosuch;"])
async def test_an_excerpt_does_not_repeat_a_password(database: Database, script: str) -> None:
    """A statement that holds the URL's password is shown without it, the caret still below the spot."""
    role = await database.role("alice", "CREATE ON SCHEMA public", password=SECRET)
    with pytest.raises(ampd.MigrationFailed) as caught:
        await ampd.migrate(role.url, migrations=scripts(f"-- {SECRET}\n{script.format(SECRET)}"))
    assert caught.value.excerpt is not None
    _, _, shown, caret = caught.value.excerpt.splitlines()
    assert shown.count("***") == script.splitlines()[-1].count("{0}")
    assert shown.index("nosuch") == caret.index("^")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


async def test_a_password_that_asyncpg_would_repeat(strict: Strict, ampd: Ampd) -> None:
    """A URL whose password was not encoded, and so reads as host or port, is not repeated either."""
    for url in (
        f"postgresql://alice:hush#hush@localhost:{strict.port}/amp",
        f"postgresql://alice:hush/hush@localhost:{strict.port}/amp",
        f"postgresql://alice:hush?hush@localhost:{strict.port}/amp",
        f"postgresql://alice:hush:hush@localhost:{strict.port}/amp",
    ):
        process = ampd("status", url=url, env={"AMP_CONFIG_METADATA_DB__MIGRATIONS__CONNECT_WAIT_SECS": "0"})
        assert (process.returncode, process.stdout) == (1, "")
        assert "hush" not in process.stderr
        assert "Traceback" not in process.stderr


# --- what can be told from an error alone


def told(script: str, sqlstate: str, message: str, *, number: int | None = None, context: str = "") -> AmpdError:
    """Return the error for what a server said of a script, or of its statement with this number (from 0)."""
    (migration,) = scripts(script)
    said = SimpleNamespace(message=message, sqlstate=sqlstate, detail=None, hint=None, position=None, context=context)
    statement = None if number is None else splitter.split(script)[number]
    return diagnosis.migration_error(ServerError(said, str, None), migration, statement, None, aftermath=KEPT)


@pytest.mark.parametrize(
    ("sqlstate", "said", "message"),
    [
        ("23503", "no such key", "1_step.sql: no such key at the end of the migration (SQLSTATE 23503)"),
        ("22021", "invalid byte sequence", "1_step.sql: invalid byte sequence (SQLSTATE 22021)"),
    ],
)
def test_the_end_of_a_migration_is_no_place_that_was_never_reached(sqlstate: str, said: str, message: str) -> None:
    """Without a statement to blame it was the COMMIT, unless the server could not even read the migration."""
    assert told("SELECT 1;", sqlstate, said).message == message


OUTSIDE = "the server will not run it in a transaction: make `-- no-transaction` the first line of the file"
QUERY = "SET TRANSACTION ISOLATION LEVEL must be called before any query"
WITHIN = "PL/pgSQL function inline_code_block line 1 at EXECUTE"


@pytest.mark.parametrize(
    ("script", "sqlstate", "said", "context", "helps"),
    [
        ("CLUSTER parts", "25001", "CLUSTER cannot run inside a transaction block", "", True),
        ("CLUSTER parts", "25001", "CLUSTER kann nicht in einem Transaktionsblock laufen", "", True),
        ("-- no-transaction\nBEGIN; CLUSTER parts; COMMIT", "25001", "CLUSTER cannot run", "", False),
        ("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "25001", "zu spät", "", False),
        ("SELECT set_config('transaction_isolation', 'serializable', true)", "25001", QUERY, "", False),
        ("DO $$BEGIN EXECUTE 'VACUUM'; END$$", "25001", "VACUUM cannot be executed from a function", WITHIN, False),
        ("DO $$BEGIN COMMIT; END$$", "2D000", "invalid transaction termination", WITHIN, True),
        ("CALL p()", "2D000", "invalid transaction termination", "PL/pgSQL function p() line 1 at COMMIT", True),
        ("SELECT f()", "2D000", "invalid transaction termination", "PL/pgSQL function f() line 1 at COMMIT", False),
        ("-- no-transaction\nCALL p()", "2D000", "cannot commit while a subtransaction is active", "", False),
    ],
)
def test_no_transaction_is_advised_where_it_helps(
    script: str, sqlstate: str, said: str, context: str, helps: bool
) -> None:
    """A file is to begin with `-- no-transaction` if its statement could then be run, and only then."""
    error = told(script, sqlstate, said, number=0, context=context)
    assert error.hint == (f"{OUTSIDE}; {KEPT}" if helps else KEPT)


async def test_a_block_that_commits_in_a_transactional_file(database: Database, tmp_path: Path) -> None:
    """A COMMIT inside DO is refused by the server, and works with what the hint advises."""
    script = "DO $$ BEGIN COMMIT; END $$;"
    error = await migration_error(database, tmp_path, script)
    assert (error.sqlstate, error.hint) == ("2D000", f"{OUTSIDE}; {KEPT}")
    await ampd.migrate(database.url, migrations=scripts(f"-- no-transaction\n{script}"))


# --- statements that break off


BROKEN_OFF = [
    pytest.param("select 1 +", ";", 1, 11, "select 1 +;", id="an operator"),
    pytest.param("select 1 +", " -- and what?\n;", 1, 11, "select 1 + -- and what?", id="a comment behind it"),
    pytest.param("create table x(a int) with", " ;", 1, 27, "create table x(a int) with ;", id="a clause"),
    pytest.param("select '中文🎉',\n  1,", "\n;", 2, 5, "  1,", id="wide characters before it"),
]
OPEN = [
    pytest.param("create table x(\n a int,\n b text\n", 3, 8, " b text", id="a parenthesis"),
    pytest.param(
        "create rule r as on insert to x do (\n  delete from x;\n  select 1",
        3,
        11,
        "  select 1",
        id="a rule of several statements",
    ),
    pytest.param(
        "create function f() returns int begin atomic\n  select 1;\n", 2, 12, "  select 1;", id="a function's body"
    ),
]


async def broken_off(database: Database, script: str) -> AmpdError:
    """Return the error of a script that the server cannot parse."""
    with pytest.raises(ampd.MigrationFailed) as caught:
        await ampd.migrate(database.url, migrations=scripts(script))
    assert caught.value.sqlstate == "42601"
    return caught.value


@pytest.mark.parametrize(("script", "rest", "line", "column", "excerpt"), BROKEN_OFF)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("create table a ();\n", "\ncreate table b ();"),
        ("-- no-transaction\nselect 1;\n", "\nselect 2;"),
        ("-- no-transaction\nbegin;\nselect 1;\n", "\ncommit;"),
    ],
    ids=["alone", "among others", "no-transaction", "explicit transaction"],
)
async def test_a_statement_that_breaks_off_is_shown_at_its_end(
    database: Database, before: str, script: str, rest: str, after: str, line: int, column: int, excerpt: str
) -> None:
    """What the server misses at the semicolon that ampd has put there is missing where the statement ends."""
    error = await broken_off(database, before + script + rest + after)
    line += before.count("\n")
    assert (error.line, error.column) == (line, column)
    assert error.excerpt is not None
    assert error.excerpt.splitlines()[2] == f"{line} | {excerpt}"
    assert error.excerpt.splitlines()[3] == f"{' ' * len(str(line))} | {' ' * (column - 1)}^"


@pytest.mark.parametrize(("script", "line", "column", "excerpt"), OPEN)
@pytest.mark.parametrize("before", ["", "select 1;\n", "-- no-transaction\n"])
async def test_what_is_never_closed_is_shown_at_the_end_of_the_script(
    database: Database, server: Server, before: str, script: str, line: int, column: int, excerpt: str
) -> None:
    """A statement that swallows whatever follows has no end of its own, and is wrong where the script ends."""
    if "atomic" in script and server.major < 14:
        pytest.skip("a function's body is a string before PostgreSQL 14")
    error = await broken_off(database, before + script)
    line += before.count("\n")
    assert (error.line, error.column) == (line, column)
    assert error.excerpt is not None
    assert error.excerpt.splitlines()[2] == f"{line} | {excerpt}"
