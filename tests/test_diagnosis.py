"""What a failure looks like: where it stands in which file, what the server said, what to do; never a password."""

import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

import ampd
from ampd.apply import diagnosis
from ampd.errors import AmpdError
from ampd.postgres.server_error import ServerError
from ampd.sql import splitter
from tests.folders import write
from tests.scenes import scripts
from tests.servers import Ampd, Database, Server

pytestmark = pytest.mark.anyio


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
hint: leave that table and its schema as they are, also where a statement goes over all tables; \
nothing of this migration was kept: fix the file and run again""",
        id="its own row removed",
    ),
    pytest.param(
        "-- statement-timeout: 300ms\nSELECT 1;\nSELECT pg_sleep(60);\n",
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
hint: it exists already: was it made by hand, or by another tool? If all that the files up to a VERSION make is \
there, `ampd baseline VERSION` records them as applied; \
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


SECRET = "s3cr3t/p@ss:w%rd"


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
