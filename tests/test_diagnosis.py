"""What a failure looks like: where it stands in which file, what the server said, what to do; never a password."""

import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trustme

import ampd
from ampd.errors import AmpdError, AuthenticationFailed, ConnectionFailed, DatabaseMissing, ReadOnlyServer, TlsFailed
from ampd.solo import local_server
from tests.folders import write
from tests.scenes import scripts
from tests.servers import Ampd, Database, Server

pytestmark = pytest.mark.anyio

AT_ONCE = ampd.Migrations(connect_wait_secs=0)
KEPT = "nothing of this migration was kept: mend the file and run again"


async def failure(database: Database, folder: Path, script: str | bytes) -> AmpdError:
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
        "SELECT 1;\r\n\r\nSELECT 1,\r\n  nosuch;\r\n".encode(), "42703", 4, 3, "  nosuch;", id="CRLF, with a position"
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
    pytest.param("\ufeff-- ß\r\nSELECT 1; SELECT nosuch;", "42703", 2, 18, "SELECT 1; SELECT nosuch;", id="BOM and CRLF"),
    pytest.param(
        "SELECT 1; ALTER TABLE missing ADD x int; SELECT 2;\n",
        "42P01",
        1,
        11,
        "SELECT 1; ALTER TABLE missing ADD x int; SELECT 2;",
        id="in the middle of a line",
    ),
    pytest.param(
        "CREATE TABLE a (id int PRIMARY KEY);\n\nINSERT INTO a VALUES (1);\n  INSERT INTO a\n    VALUES (1);\nSELECT 1;\n",
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
        "CREATE TABLE a (id int PRIMARY KEY);\nDO LANGUAGE plpgsql $x$ BEGIN\r\n\tINSERT INTO a VALUES (1), (1);\r\nEND $x$;\n",
        "23505",
        3,
        2,
        "    INSERT INTO a VALUES (1), (1);",
        id="a violation inside DO, CRLF",
    ),
    pytest.param(
        "DO $$\nBEGIN\n  IF x THEN\nEND $$;\n", "42601", 4, 5, "END $$;", id="a syntax error inside DO"
    ),
    pytest.param("DO $$ BEGIN\n COMMIT;\nEND $$;\n", "2D000", 2, 2, " COMMIT;", id="COMMIT inside DO"),
    pytest.param("SELECT 1;\nDO 'BEGIN\n  PERFORM 1/0;\nEND';\n", "22012", 2, 1, "DO 'BEGIN", id="DO in plain quotes"),
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
    error = await failure(database, tmp_path, script)
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
hint: nothing of this migration was kept: mend the file and run again""",
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
hint: do this; nothing of this migration was kept: mend the file and run again""",
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
hint: nothing of this migration was kept: mend the file and run again""",
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
hint: nothing of this migration was kept: mend the file and run again""",
        id="inside a function that DO calls",
    ),
    pytest.param(
        "CREATE TABLE a (id int PRIMARY KEY);\n"
        "CREATE TABLE b (a int REFERENCES a DEFERRABLE INITIALLY DEFERRED);\nINSERT INTO b VALUES (7);\n",
        """\
m/1_x.sql: insert or update on table "b" violates foreign key constraint "b_a_fkey" at the end of the migration \
(SQLSTATE 23503)
detail: Key (a)=(7) is not present in table "a".
hint: nothing of this migration was kept: mend the file and run again""",
        id="a deferred constraint, at the end",
    ),
    pytest.param(
        "CREATE TYPE e AS ENUM ('a');\nALTER TYPE e ADD VALUE 'b';\nSELECT 'b'::e;\n",
        None,
        id="an enum value, new and used",
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
nothing of this migration was kept: mend the file and run again""",
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
nothing of this migration was kept: mend the file and run again""",
        id="exists already",
    ),
]


@pytest.mark.parametrize(("script", "text"), [case for case in WHOLE if case.values[1] is not None])
async def test_the_whole_text_of_a_failure(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, text: str
) -> None:
    """A person reads what happened, where, the server's detail and hint, and what became of the migration."""
    monkeypatch.chdir(tmp_path)
    write(Path("m"), {"1_x.sql": script})
    with pytest.raises(AmpdError) as caught:
        await ampd.migrate(database.url, migrations=ampd.read_migrations("m"))
    assert str(caught.value) == text


async def test_a_new_enum_value_that_is_used_at_once(database: Database, tmp_path: Path) -> None:
    """The server's refusal of an uncommitted enum value comes with the way out: a migration of its own."""
    one, two = "CREATE TYPE e AS ENUM ('a');", "ALTER TYPE e ADD VALUE 'b';\nSELECT 'b'::e;\n"
    with pytest.raises(ampd.MigrationFailed) as caught:
        await ampd.migrate(database.url, migrations=scripts(one, two))
    assert (caught.value.sqlstate, caught.value.line, caught.value.column) == ("55P04", 2, 8)
    assert caught.value.hint is not None
    assert caught.value.hint.endswith(KEPT)
    assert tmp_path.exists()


async def test_a_server_that_speaks_another_language(database: Database, tmp_path: Path) -> None:
    """The line inside a DO block is found whatever language the server's messages are in."""
    await database.execute(f"ALTER DATABASE {database.name} SET lc_messages = 'de_DE.UTF-8'")
    error = await failure(database, tmp_path, "SELECT 1;\nDO $$\nBEGIN\n  PERFORM 1/0;\nEND $$;\n")
    assert (error.line, error.column) == (4, 3)


@pytest.mark.parametrize("script", ["SELECT 1;\nSELECT E'\\000';\n", "SELECT 1;\nSELECT E'\\xff';\n"])
async def test_what_the_server_cannot_even_read(database: Database, tmp_path: Path, script: str) -> None:
    """An error of the parse that carries no position is the migration's all the same, and not the connection's."""
    error = await failure(database, tmp_path, script)
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
    assert error.excerpt is not None
    if message is not None:
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
    assert f'GRANT USAGE, CREATE ON SCHEMA public TO "{role.name}"' in str(error.hint)


async def test_no_right_to_create_a_schema(database: Database) -> None:
    """A role that may not create the configured schema is told the GRANT to run."""
    role = await database.role("low")
    error = await refused(role.url, "CREATE TABLE a ();", schema="elsewhere")
    assert isinstance(error, ampd.PermissionDenied)
    assert error.message == f"permission denied for database {database.name}"
    assert f'GRANT CREATE ON DATABASE {database.name} TO "{role.name}"' in str(error.hint)


async def test_no_right_to_use_the_schema(database: Database) -> None:
    """A role without USAGE on the configured schema is told the GRANT to run, by `status` as well."""
    role = await database.role("low")
    await database.execute("CREATE SCHEMA elsewhere")
    await ampd.migrate(database.url, migrations=scripts("SELECT 1"), schema="elsewhere")
    for run in (ampd.migrate, ampd.status):
        with pytest.raises(ampd.PermissionDenied) as caught:
            await run(role.url, migrations=scripts("SELECT 1"), schema="elsewhere")
        assert caught.value.message == "permission denied for schema elsewhere"
        assert "GRANT USAGE, CREATE ON SCHEMA elsewhere" in str(caught.value.hint)


async def test_no_right_to_read_the_history(database: Database) -> None:
    """A role without SELECT on the history table is told the GRANT to run; with SELECT alone `status` works."""
    role = await database.role("low")
    await ampd.migrate(database.url, migrations=scripts("SELECT 1"))
    for run in (ampd.migrate, ampd.status):
        with pytest.raises(ampd.PermissionDenied) as caught:
            await run(role.url, migrations=scripts("SELECT 1"))
        assert caught.value.message == "permission denied for table ampd_schema_migrations"
        assert f'ampd_schema_migrations TO "{role.name}"' in str(caught.value.hint)
        assert "GRANT SELECT" in str(caught.value.hint)
    await database.execute(f"GRANT SELECT ON ampd_schema_migrations TO {role.name}")
    assert (await ampd.status(role.url, migrations=scripts("SELECT 1"))).up_to_date
    assert (await ampd.migrate(role.url, migrations=scripts("SELECT 1"))).applied == ()


async def test_a_statement_that_the_role_may_not_run(database: Database) -> None:
    """A privilege that a statement lacks is `permission`, with file and line, and the GRANT to run."""
    role = await database.role("low")
    await database.execute(f"CREATE TABLE theirs (id int); GRANT CREATE ON SCHEMA public TO {role.name}")
    error = await refused(role.url, "SELECT 1;\n\nALTER TABLE theirs ADD x int;")
    assert isinstance(error, ampd.PermissionDenied)
    assert (error.file, error.line, error.sqlstate) == ("1_step.sql", 3, "42501")
    assert f'ALTER TABLE theirs OWNER TO "{role.name}"' in str(error.hint)
    error = await refused(role.url, "SELECT 1;\nSELECT * FROM theirs;")
    assert (error.code, error.line) == ("permission", 2)
    assert f'ON TABLE theirs TO "{role.name}"' in str(error.hint)


async def test_a_role_that_may_not_connect(database: Database) -> None:
    """A role without CONNECT is told the GRANT to run."""
    role = await database.role("low")
    await database.execute(f"REVOKE CONNECT ON DATABASE {database.name} FROM PUBLIC")
    error = await refused(role.url)
    assert isinstance(error, ampd.PermissionDenied)
    assert error.hint == f'GRANT CONNECT ON DATABASE "{database.name}" TO "{role.name}"'


# --- servers that take no writes


async def test_a_database_that_is_read_only_by_default(database: Database, tmp_path: Path) -> None:
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
    assert tmp_path.exists()


# --- connections: each failure its own class and hint, at once, and never a password


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, Path]:
    """A certificate authority, its certificate and another one's as files."""
    folder = tmp_path_factory.mktemp("tls")
    ours = trustme.CA()
    ours.cert_pem.write_to_path(str(folder / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(folder / "other.pem"))
    return ours, folder


@asynccontextmanager
async def strict_server(server: Server, folder: Path, authority: trustme.CA) -> AsyncIterator[Server]:
    """Run a server of the test's own that wants passwords, and speaks TLS as `localhost` and by no other name."""
    certificate = authority.issue_cert("localhost")
    # The server runs as another account when the tests run as root: it must be able to read what it owns.
    files = {"server.crt": certificate.cert_chain_pems[0].bytes(), "server.key": certificate.private_key_pem.bytes()}
    folder.chmod(0o711)
    async with local_server(folder / "db", bindir=Path(server.bindir), tcp=True, settings={"fsync": "off"}) as local:
        data = local.data_dir
        owner = data.stat()
        for name, content in files.items():
            (data / name).write_bytes(content)
            (data / name).chmod(0o600)
            import os

            os.chown(data / name, owner.st_uid, owner.st_gid)
        (data / "pg_hba.conf").write_text(
            "local all all trust\n"
            "hostssl all plain_only 0.0.0.0/0 reject\n"
            "host all outcast 0.0.0.0/0 reject\n"
            "hostssl all tls_only 0.0.0.0/0 trust\n"
            "hostnossl all tls_only 0.0.0.0/0 reject\n"
            "host all all 0.0.0.0/0 scram-sha-256\n"
        )
        ours = Server(local.port, str(local.socket_dir), str(data), server.bindir, server.major, "localhost")
        await Database(ours, "postgres").connect(ours.socket_url()).__aenter__()
        yield ours
