"""A stranger who may create objects in `public`, and a superuser who migrates: nothing of the stranger's is run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import asyncpg
import pytest

import ampd
from ampd.advisory_lock import lock_key
from ampd.config import HISTORY_TABLE as NAME
from ampd.errors import AmpdError
from ampd.other_sessions import Holder
from ampd.resumption import done_checksum
from ampd.sql.splitter import split
from tests.scenes import GENEROUS, Heard, history, scripts, transaction, waiting_for_a_lock
from tests.servers import Database, Role
from tests.strangers import FILES, ROW, TABLE, caught, plant

pytestmark = pytest.mark.anyio


async def run_everything(database: Database) -> list[str]:
    """Migrate, look and migrate again, as the superuser; return the codes of the errors."""
    codes = []
    for _ in range(2):
        for run in (ampd.migrate, ampd.status):
            try:
                with anyio.fail_after(GENEROUS):
                    await run(database.url, migrations=FILES)
            except AmpdError as error:
                codes.append(error.code)
    return codes


OVERLOADED = [
    "set_config",
    "current_setting",
    "pg_try_advisory_xact_lock",
    "pg_advisory_unlock_all",
    "current_schemas",
    "current_database",
    "pg_backend_pid",
    "clock_timestamp",
    "decode",
    "encode",
    "count",
    "max",
    "min",
    "to_regclass",
    "format",
    "coalesce",
    "host",
    "inet_server_addr",
    "inet_server_port",
    "pg_is_in_recovery",
    "starts_with",
    "left",
    "substr",
    "replace",
    "concat_ws",
    "pg_get_userbyid",
    "pg_has_role",
    "pg_current_xact_id",
    "num_nonnulls",
    "pg_blocking_pids",
    "has_table_privilege",
    "int8",
    "text",
    "now",
    "statement_timestamp",
    "current_user",
    "pg_is_other_temp_schema",
    "has_schema_privilege",
    "row_security_active",
    "pg_column_size",
    "quote_ident",
    "to_regnamespace",
]


async def overload(database: Database) -> str:
    """Return SQL that overloads, in public, every function and operator of pg_catalog that ampd could come across."""
    functions = await database.fetch(
        """
        SELECT DISTINCT p.proname AS name, pg_get_function_identity_arguments(p.oid) AS arguments,
               format_type(prorettype, NULL) AS result
        FROM pg_proc p
        WHERE pronamespace = 'pg_catalog'::regnamespace AND prokind = 'f' AND NOT proretset AND provariadic = 0
          AND proname = ANY ($1) AND NOT EXISTS (
            SELECT FROM unnest(proargtypes) a JOIN pg_type t ON t.oid = a WHERE t.typtype = 'p')
          AND (SELECT typtype FROM pg_type WHERE oid = prorettype) <> 'p'
        """,
        OVERLOADED,
    )
    parts = [
        f"CREATE FUNCTION public.{row['name']}({row['arguments']}) RETURNS {row['result']} "
        f"LANGUAGE plpgsql AS $$ BEGIN PERFORM public.snap('{row['name']}'); RETURN NULL; END $$;"
        for row in functions
    ]
    for operator in ("=", "<>", "<", ">"):
        for left, right in (
            ("bigint", "integer"),
            ("bigint", "bigint"),
            ("integer", "integer"),
            ("name", "name"),
            ("name", "text"),
            ("text", "text"),
            ("oid", "oid"),
            ("oid", "regclass"),
            ("xid", "xid"),
            ("boolean", "boolean"),
            ("bytea", "bytea"),
            ('"char"', '"char"'),
        ):
            parts.append(
                f"CREATE OR REPLACE FUNCTION public.trap(a {left}, b {right}) RETURNS boolean LANGUAGE plpgsql AS "
                f"$$ BEGIN PERFORM public.snap('{operator} {left}'); RETURN true; END $$;"
                f"CREATE OPERATOR public.{operator} (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = public.trap);"
            )
    # Calls that no function of pg_catalog matches exactly would be drawn to one that does.
    for name, arguments in (
        ("set_config", "unknown_a varchar, b varchar, c boolean"),
        ("concat", "a text, b text"),
        ("concat", "a text, b integer"),
        ("concat", "a tid, b xid"),
        ("concat", "a bigint, b text"),
        ("count", "a integer"),
        ("decode", "a varchar, b varchar"),
        ("to_regclass", "a varchar"),
        ("jsonb_build_object", "a text, b text"),
    ):
        parts.append(
            f"CREATE FUNCTION public.{name}({arguments}) RETURNS text LANGUAGE plpgsql AS $$ BEGIN "
            f"PERFORM public.snap('{name}'); RETURN NULL; END $$;"
        )
    parts += [
        f"CREATE TABLE public.{table} (LIKE pg_catalog.{table});"
        for table in (
            "pg_class",
            "pg_namespace",
            "pg_roles",
            "pg_locks",
            "pg_stat_activity",
            "pg_database",
            "pg_index",
            "pg_settings",
            "pg_prepared_statements",
        )
    ]
    parts += [
        f"CREATE DOMAIN public.{name} AS pg_catalog.{name} CHECK (public.snap('{name}'));"
        for name in ("text", "bytea", "name", "jsonb", "regclass", "oid", "xid")
    ]
    return "".join(parts)


async def test_overloaded_names_are_not_called(database: Database, stranger: Role) -> None:
    """With public before pg_catalog on the path, no function, operator, type or table of a stranger is taken."""
    await plant(database, stranger, await overload(database))
    async with database.connect() as victim:  # the trap works: whoever does not take care is caught
        await victim.fetch("SELECT set_config('work_mem', '1MB', true)")
    assert ("postgres", "set_config") in await caught(database)
    await database.execute("DELETE FROM evidence.traps WHERE by OPERATOR(pg_catalog.=) 'postgres'")
    assert await run_everything(database) == []
    assert await caught(database) == []
    assert await history(database) == [(1, True, 2), (2, True, 2), (3, True, 1)]


@pytest.mark.parametrize("lent", [False, True])
async def test_overloaded_names_are_not_called_between_migrations(
    database: Database, stranger: Role, lent: bool
) -> None:
    """What is prepared for those of one message, or made in its place, is run on the paths that the files leave."""
    await plant(database, stranger, await overload(database))
    change = "SET search_path = public, pg_catalog; CREATE TABLE public."
    endings = (
        "SELECT 1",
        "PREPARE mine AS SELECT 1",
        "GRANT SELECT ON ampd_schema_migrations TO PUBLIC",
        "DEALLOCATE ALL",
    )
    files = scripts(*(f"{change}made{number} (); {ending}" for number, ending in enumerate((*endings, *endings))))
    async with database.connect() as connection:
        await ampd.migrate(connection if lent else database.url, migrations=files)
    assert await caught(database) == []
    assert [finished for _, finished, _ in await history(database)] == [True] * 8


async def test_a_type_of_a_stranger_is_not_taken_for_a_record(database: Database, stranger: Role) -> None:
    """Nor is one taken where we put back what others have set, on the path that a file has left."""
    await plant(
        database,
        stranger,
        "CREATE DOMAIN trap AS text CHECK (snap('record'));"
        "CREATE TYPE record AS (name trap, setting trap, before trap); CREATE TYPE jsonb AS (a trap)",
    )
    files = scripts("SET search_path = public, pg_catalog; SET work_mem = '99kB'", f"-- no-transaction\n{FILES[0].sql}")
    async with asyncpg.create_pool(database.url, min_size=2, max_size=2) as pool:
        await ampd.migrate(pool, migrations=files)
    assert await caught(database) == []


@pytest.mark.parametrize(
    "sql",
    [
        pytest.param(TABLE, id="a table"),
        pytest.param(TABLE + "GRANT ALL ON ampd_schema_migrations TO PUBLIC;", id="a table that everybody may write"),
        pytest.param(
            TABLE + "CREATE TRIGGER t BEFORE INSERT OR UPDATE ON ampd_schema_migrations "
            "FOR EACH ROW EXECUTE FUNCTION snap();",
            id="a trigger for each row",
        ),
        pytest.param(
            TABLE
            + "CREATE TRIGGER t AFTER INSERT ON ampd_schema_migrations FOR EACH STATEMENT EXECUTE FUNCTION snap();",
            id="a trigger for each statement",
        ),
        pytest.param(TABLE.replace("applied_by text NOT NULL", "applied_by text CHECK (snap('check'))"), id="a check"),
        pytest.param(
            TABLE.replace("finished_at timestamptz", "finished_at timestamptz, extra bool DEFAULT snap('default')"),
            id="a default",
        ),
        pytest.param(
            TABLE + "CREATE INDEX ON ampd_schema_migrations ((snap_i(name)));", id="an index on an expression"
        ),
        pytest.param(
            TABLE + "CREATE RULE r AS ON INSERT TO ampd_schema_migrations DO ALSO SELECT snap('rule');", id="a rule"
        ),
        pytest.param(
            TABLE + ROW + "ALTER TABLE ampd_schema_migrations ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
            "CREATE POLICY p ON ampd_schema_migrations USING (snap('policy'));",
            id="row-level security",
        ),
        pytest.param(
            f"{TABLE.replace('ampd_schema_migrations', 'base')}"
            "CREATE VIEW ampd_schema_migrations AS SELECT * FROM base WHERE snap('view');",
            id="a view",
        ),
        pytest.param(
            "CREATE MATERIALIZED VIEW ampd_schema_migrations AS SELECT 1::bigint AS version WITH NO DATA;",
            id="a materialized view",
        ),
        pytest.param(
            TABLE.replace("PRIMARY KEY", "").replace(");", ") PARTITION BY LIST (version);"), id="a partitioned table"
        ),
        pytest.param("CREATE SEQUENCE ampd_schema_migrations;", id="a sequence"),
        pytest.param("CREATE TYPE ampd_schema_migrations AS (version bigint);", id="a composite type"),
        pytest.param(
            f"{TABLE.replace('ampd_schema_migrations', 'base')}"
            "CREATE TABLE ampd_schema_migrations () INHERITS (base);"
            "CREATE TRIGGER t BEFORE INSERT ON ampd_schema_migrations FOR EACH ROW EXECUTE FUNCTION snap();",
            id="a table that inherits",
        ),
        pytest.param(
            TABLE + "CREATE TABLE heir () INHERITS (ampd_schema_migrations);"
            "CREATE TRIGGER t BEFORE UPDATE ON heir FOR EACH ROW EXECUTE FUNCTION snap();"
            "INSERT INTO heir VALUES (2, 'step', '', now(), NULL, 0, 'x', 'y');",
            id="a table with an heir",
        ),
    ],
)
async def test_a_history_table_of_a_stranger_is_not_written(database: Database, stranger: Role, sql: str) -> None:
    """Whatever a stranger puts in the history's place, none of its code runs, no migration does, and it is named."""
    indexed = (
        "CREATE FUNCTION snap_i(what text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN "
        "PERFORM snap(what); RETURN what; END $$;"
    )
    await plant(database, stranger, indexed + sql)
    codes = await run_everything(database)
    assert codes == ["permission"] * 4
    assert await caught(database) == []
    assert await database.fetchval("SELECT to_regclass('victims')") is None


@pytest.mark.parametrize("mode", ["", "-- no-transaction\nBEGIN;\n"])
async def test_a_large_migration_takes_no_operator_of_a_stranger(database: Database, stranger: Role, mode: str) -> None:
    """What goes in several messages begins each with a question of its own, on the path that the file has left."""
    operators = "".join(
        f"CREATE FUNCTION trap{number}(a {kind}, b {kind}) RETURNS boolean LANGUAGE plpgsql AS "
        f"$$ BEGIN PERFORM public.snap('{name} {kind}'); RETURN true; END $$;"
        f"CREATE OPERATOR {name} (LEFTARG = {kind}, RIGHTARG = {kind}, FUNCTION = trap{number});"
        for number, (name, kind) in enumerate((name, kind) for name in ("=", "<>") for kind in ("text", "xid8"))
    )
    await plant(database, stranger, operators)
    large = mode + f"DO '/* {'x' * 300_000} */ BEGIN END';\n" * 4 + "COMMIT;\n" * bool(mode)
    await ampd.migrate(database.url, migrations=scripts(large))
    assert await caught(database) == []


KEY = lock_key("public", NAME)
LABEL = f"/* ampd {KEY % 2**64:x} 2 step */"  # that a runner's statements begin with
BUILD = scripts("CREATE TABLE t (x int)", "-- no-transaction\nCREATE INDEX CONCURRENTLY i ON t (x);")


@asynccontextmanager
async def forging(database: Database, forger: asyncpg.Connection, *, waiting: int = 0) -> AsyncIterator[None]:
    """Let the forger's session have a forged label, blocked by an innocent one; so many others wait already."""
    async with database.connect() as innocent:
        await innocent.execute("BEGIN; SELECT pg_advisory_xact_lock(4711)")
        blocked = asyncio.ensure_future(forger.execute(f"{LABEL} SELECT pg_advisory_xact_lock(4711)"))
        try:
            await waiting_for_a_lock(database, count=waiting + 1)
            yield
        finally:
            await innocent.execute("ROLLBACK")
            await blocked


async def test_a_forged_label_is_not_taken_for_a_build_that_is_blocked(database: Database, stranger: Role) -> None:
    """A stranger's session that calls itself ours and waits for another makes no build give up, and accuses nobody."""
    await ampd.migrate(database.url, migrations=BUILD[:1])
    await database.execute(
        "CREATE FUNCTION slow(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN "
        "PERFORM pg_advisory_xact_lock_shared(1); RETURN $1; END $$; INSERT INTO t VALUES (1)"
    )
    files = (BUILD[0], *scripts("", BUILD[1].sql.replace("(x)", "(slow(x))"))[1:])
    heard = Heard()

    async def run() -> None:
        await ampd.migrate(database.url, migrations=files, on_event=heard)

    with anyio.fail_after(GENEROUS):
        async with (
            database.connect(stranger.url) as forger,  # before ours: the server lists it first
            anyio.create_task_group() as tasks,
            transaction(database, "SELECT pg_advisory_xact_lock(1)") as gate,
        ):
            tasks.start_soon(run)
            await waiting_for_a_lock(database)
            async with forging(database, forger, waiting=1):
                blocked = await heard.first(ampd.Blocked)
                assert [each.pid for each in blocked.blockers] == [gate.get_server_pid()]


async def test_a_forged_label_is_not_taken_for_a_runner(database: Database, stranger: Role) -> None:
    """An interrupted migration is gone on with, though a stranger's session calls itself its runner."""
    text = "-- no-transaction\nCREATE TABLE a ();\nCREATE TABLE b ();"
    files = scripts("SELECT 1", text)
    await ampd.migrate(database.url, migrations=files[:1])
    await database.execute(
        f"INSERT INTO {NAME} VALUES (2, 'step', '\\x{files[1].checksum.hex()}', now(), NULL, 1, 'x', 'y', "
        f"'\\x{done_checksum(split(text)[:1]).hex()}')"
    )
    async with database.connect(stranger.url) as forger, forging(database, forger):
        await ampd.migrate(database.url, migrations=files, limits=ampd.Limits(advisory_lock_wait_secs=0.2))
    assert await database.fetchval("SELECT to_regclass('a') IS NULL AND to_regclass('b') IS NOT NULL")


async def test_any_bytes_of_another_session_are_shown(database: Database, stranger: Role) -> None:
    """In a database of SQL_ASCII a statement need be no text: who holds the lock is named all the same."""
    ascii_only = Database(database.server, f"{database.name}_ascii")
    await database.execute(f"CREATE DATABASE {ascii_only.name} ENCODING 'SQL_ASCII' TEMPLATE template0")
    try:
        await ampd.migrate(ascii_only.url, migrations=scripts("SELECT 1"))
        async with ascii_only.connect(database.server.url(ascii_only.name, stranger.name)) as holder:
            query = f"BEGIN; SELECT pg_advisory_xact_lock({KEY}) -- "
            await holder.execute(query.ljust(200) + "€" * 100)  # a cut after 300 bytes leaves less than a character
            with pytest.raises(ampd.AdvisoryLockTimeout, match=f"user {stranger.name}"):
                await ampd.migrate(
                    ascii_only.url,
                    migrations=scripts("SELECT 1", "SELECT 2"),
                    limits=ampd.Limits(advisory_lock_wait_secs=0.2),
                )
    finally:
        await database.execute(f"DROP DATABASE {ascii_only.name} WITH (FORCE)")


LINE = "x\n::error::forged"


async def test_names_that_others_have_chosen_stay_on_their_line(database: Database, stranger: Role) -> None:
    """What a CI server would take for a command of ours, or a person for a line of ours, is shown as an escape."""
    await plant(database, stranger, "")
    await ampd.migrate(database.url, migrations=FILES[:1])
    await database.execute(
        f'GRANT ALL ON {NAME} TO {stranger.name}; CREATE ROLE "{database.name}_{LINE}" LOGIN;'
        f'GRANT {stranger.name} TO "{database.name}_{LINE}"'
    )
    undo = {
        f'CREATE TRIGGER "{LINE}" BEFORE INSERT ON {NAME} FOR EACH ROW EXECUTE FUNCTION snap()': (
            f'DROP TRIGGER "{LINE}" ON {NAME}'
        ),
        f'CREATE TABLE fk (v bigint, CONSTRAINT "{LINE}" FOREIGN KEY (v) REFERENCES {NAME})': "DROP TABLE fk",
        f'ALTER SCHEMA public OWNER TO "{database.name}_{LINE}"': "ALTER SCHEMA public OWNER TO postgres",
        f'ALTER TABLE {NAME} OWNER TO "{database.name}_{LINE}"': f"ALTER TABLE {NAME} OWNER TO postgres",
    }
    for act, back in undo.items():
        await database.execute(act)
        with pytest.raises(AmpdError) as refusal:
            await ampd.status(database.url, migrations=FILES)
        await database.execute(back)
        assert "x\\n::error::forged" in refusal.value.message
        assert "\n" not in f"{refusal.value.message}{refusal.value.hint}"
    await database.execute(f'REVOKE {stranger.name} FROM "{database.name}_{LINE}"; DROP ROLE "{database.name}_{LINE}"')


def test_a_role_and_its_session_are_described_on_one_line() -> None:
    """Also where the name is that of whoever holds the advisory lock."""
    assert "\n" not in Holder(1, user=LINE, application=LINE, client=LINE, query=f"/* ampd 0 {LINE} */").describe()
