"""What a session, a role or a file has set: each file finds the session as new, and comes back to its own settings."""

import pytest

import ampd
from tests.scenes import scripts
from tests.servers import Database

pytestmark = pytest.mark.anyio


def ensure(condition: str) -> str:
    """Return a script that fails unless the condition holds."""
    return f"DO $ensure$ BEGIN IF ({condition}) IS NOT TRUE THEN RAISE 'not so'; END IF; END $ensure$;"


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
        pytest.param(
            "PREPARE p AS SELECT 1;", "NOT EXISTS (SELECT FROM pg_prepared_statements WHERE name = 'p')", id="PREPARE"
        ),
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


async def test_a_prepared_statement_of_an_earlier_file_is_gone(database: Database) -> None:
    """The error is the server's, without the driver's advice on statements that it prepares itself."""
    with pytest.raises(ampd.MigrationFailed) as caught:
        await ampd.migrate(database.url, migrations=scripts("PREPARE p AS SELECT 1", "EXECUTE p"))
    assert caught.value.message == '2_step.sql:1: prepared statement "p" does not exist (SQLSTATE 26000)'
    assert caught.value.hint == "nothing of this migration was kept: fix the file and run again"


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


async def test_a_hidden_client_encoding_does_not_change_what_follows(database: Database) -> None:
    """Nothing in the file shows that a block changes the encoding of the client, and the next statement is UTF-8."""
    hidden = "DO $$ BEGIN PERFORM set_config('client_encoding', 'LATIN1', false); END $$"
    text = f"-- no-transaction\nCREATE TABLE t (a text);\n{hidden};\nINSERT INTO t VALUES ('größe');\nVACUUM t"
    await ampd.migrate(database.url, migrations=scripts(text))
    assert await database.fetchval("SELECT a FROM t") == "größe"
