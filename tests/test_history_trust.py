"""Whose history table is believed and written, and what on it is refused."""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import asyncpg
import pytest

import ampd
from ampd.config import MetadataDb
from ampd.history.trust import trusted_owner_sql
from ampd.resumption import done_checksum
from ampd.sql.splitter import split
from tests.scenes import GENEROUS, Heard, end_backend, history, meanwhile, scripts, waiting_for_a_lock
from tests.servers import Database, Role
from tests.strangers import FILES, ROW, TABLE, caught, plant

pytestmark = pytest.mark.anyio

Command = Callable[..., Awaitable[Any]]
NAME = "ampd_schema_migrations"


async def test_trusted_owners_are_me_superusers_the_databases_owner_and_the_configured_role(database: Database) -> None:
    """A group that I am a member of is not among them, nor is anybody else."""
    me, group, owner, other = [await database.role(name) for name in ("me", "group", "owner", "other")]
    await database.execute(f"GRANT {group.name} TO {me.name}; ALTER DATABASE {database.name} OWNER TO {owner.name}")

    async def trusted(name: str, role: str | None) -> bool:
        async with database.connect(me.url) as connection:
            oid = f"(SELECT oid FROM pg_roles WHERE rolname = '{name}')"
            return bool(await connection.fetchval(f"SELECT {trusted_owner_sql(oid, role)}"))

    for name in (me.name, "postgres", owner.name):
        assert await trusted(name, None), name
    for name in (group.name, other.name, "pg_monitor"):
        assert not await trusted(name, None), name
    assert await trusted(other.name, other.name)


@pytest.mark.parametrize("command", [ampd.status, ampd.migrate])
@pytest.mark.parametrize("victim", ["postgres", "plain"])
async def test_a_table_that_is_swapped_while_ampd_waits_for_it_is_not_read(
    database: Database, stranger: Role, command: Command, victim: str
) -> None:
    """A stranger holds the table until ampd waits, and puts a view over his function in its place: it is not run."""
    url = database.url
    if victim == "plain":
        role = await database.role("plain", "USAGE, CREATE ON SCHEMA public")
        victim, url = role.name, role.url
    await plant(database, stranger, f"{TABLE}{ROW} GRANT SELECT ON {NAME} TO PUBLIC")

    async def run() -> None:
        with pytest.raises(ampd.PermissionDenied, match=f"belongs to {stranger.name}"), anyio.fail_after(GENEROUS):
            await command(url, migrations=FILES[:1])

    async with database.connect(stranger.url) as thief, anyio.create_task_group() as tasks:
        await thief.execute(f"BEGIN; LOCK TABLE {NAME} IN ACCESS EXCLUSIVE MODE")
        tasks.start_soon(run)
        await waiting_for_a_lock(database)
        await thief.execute(
            f"ALTER TABLE {NAME} RENAME TO base; CREATE VIEW {NAME} AS SELECT * FROM base WHERE snap('view');"
            f"GRANT SELECT ON {NAME} TO PUBLIC; COMMIT"
        )
    assert await caught(database, victim) == []


async def test_a_table_that_is_dropped_while_ampd_waits_for_it_is_looked_for_again(database: Database) -> None:
    """Where it was the history's owner, there simply is none any more."""
    await ampd.migrate(database.url, migrations=scripts("SELECT 1"))
    async with database.connect() as owner, anyio.create_task_group() as tasks:
        await owner.execute(f"BEGIN; DROP TABLE {NAME}")

        async def run() -> None:
            assert (await ampd.status(database.url, migrations=scripts("SELECT 1"))).current_version is None

        tasks.start_soon(run)
        await waiting_for_a_lock(database)
        await owner.execute("COMMIT")


async def test_forged_rows_are_not_believed_by_any_command(database: Database, stranger: Role) -> None:
    """A stranger's table that says that nothing is pending, or that the database is ahead, is refused by its owner."""
    await plant(database, stranger, TABLE + ROW)
    await database.execute(f"GRANT SELECT ON {NAME} TO PUBLIC")
    reader = await database.role("service")

    async def pool(url: str, **_: Any) -> None:
        async with ampd.open_pool(MetadataDb(url=ampd.DatabaseUrl(url))):
            pass

    async def resolve(url: str, *, migrations: Any) -> None:
        await ampd.resolve(url, 1, ampd.Resolution.APPLIED, migrations=migrations)

    async def baseline(url: str, *, migrations: Any) -> None:
        await ampd.baseline(url, 1, migrations=migrations)

    commands: list[Command] = [ampd.status, ampd.migrate, pool, resolve, baseline]
    for command in commands:
        for url, user in ((database.url, "postgres"), (reader.url, reader.name)):
            with pytest.raises(ampd.PermissionDenied) as refusal:
                await command(url, migrations=FILES[:1])
            assert refusal.value.message == (
                f'the history table "public".{NAME} belongs to {stranger.name}, and so is not trusted: that is neither '
                f"{user}, nor a superuser, nor the owner of the database, nor the role in metadata_db.migrations.role"
            )
            hint = str(refusal.value.hint)
            assert f'write `role = "{stranger.name}"` under [metadata_db.migrations]' in hint
            assert "drop" not in hint.lower()


async def test_a_common_group_is_a_stranger(database: Database, stranger: Role) -> None:
    """That the migrator is a member of the owner says nothing about what the owner's other members may do to it."""
    group, worker = await database.role("group"), await database.role("worker", "USAGE, CREATE ON SCHEMA public")
    await database.execute(f"GRANT {group.name} TO {stranger.name}, {worker.name}")
    await plant(
        database,
        stranger,
        TABLE + f"CREATE TRIGGER t BEFORE INSERT ON {NAME} FOR EACH ROW EXECUTE FUNCTION snap();"
        f"GRANT ALL ON {NAME} TO PUBLIC",
    )
    await database.execute(f"ALTER TABLE {NAME} OWNER TO {group.name}")
    with pytest.raises(ampd.PermissionDenied, match=f"belongs to {group.name}"):
        await ampd.migrate(worker.url, migrations=FILES[:1])
    assert await caught(database, worker.name) == []


async def test_the_owner_of_the_schema_is_a_stranger(database: Database, stranger: Role) -> None:
    """Whoever may create schemas may name one like the migrator, where its search path looks first."""
    await database.execute(
        f"GRANT CREATE ON DATABASE {database.name} TO {stranger.name};"
        f'ALTER DATABASE {database.name} SET search_path = "$user", public'
    )
    trap = f"CREATE TRIGGER t BEFORE INSERT ON postgres.{NAME} FOR EACH ROW EXECUTE FUNCTION snap();"
    await plant(
        database, stranger, "CREATE SCHEMA postgres;" + TABLE.replace("TABLE ampd", "TABLE postgres.ampd") + trap
    )
    with pytest.raises(ampd.PermissionDenied, match=f'"postgres".{NAME} belongs to {stranger.name}'):
        await ampd.migrate(database.url, migrations=FILES[:1])
    assert await caught(database) == []


async def test_a_raced_first_run_makes_the_table_itself_or_not_at_all(database: Database, stranger: Role) -> None:
    """A table that a stranger makes at the very moment is not taken for the one that ampd was making."""
    await plant(database, stranger, "")
    async with database.connect(stranger.url) as racer, anyio.create_task_group() as tasks:
        await racer.execute(
            f"BEGIN; {TABLE} GRANT ALL ON {NAME} TO PUBLIC;"
            f"CREATE TRIGGER t BEFORE INSERT ON {NAME} FOR EACH ROW EXECUTE FUNCTION snap();"
        )

        async def run() -> None:
            with pytest.raises(ampd.PermissionDenied, match=f"belongs to {stranger.name}"):
                await ampd.migrate(database.url, migrations=FILES[:1])

        tasks.start_soon(run)
        await waiting_for_a_lock(database)
        await racer.execute("COMMIT")
    assert await caught(database) == []
    assert await database.fetchval("SELECT to_regclass('victims')") is None


@pytest.mark.parametrize("each", ["ROW", "STATEMENT"])  # the latter fires for a statement that finds no row as well
@pytest.mark.parametrize("mode", ["", "-- no-transaction\n"])
async def test_a_trigger_that_appears_between_two_transactions_is_not_run(
    database: Database, stranger: Role, mode: str, each: str
) -> None:
    """Whoever was granted ALL on the history may put a trigger on it, and does so while a run is under way."""
    await plant(database, stranger, "")
    await ampd.migrate(database.url, migrations=FILES[:1])
    await database.execute(f"GRANT ALL ON {NAME} TO {stranger.name}")
    planted = False
    until_somebody_waits = (
        "DO $$ BEGIN FOR i IN 1..1000 LOOP EXIT WHEN EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = "
        f"'{NAME}'::regclass); PERFORM pg_sleep(0.01); END LOOP; END $$"
    )

    async def trap() -> None:
        async with database.connect(stranger.url) as connection:
            await connection.execute(
                f"CREATE TRIGGER t BEFORE INSERT OR UPDATE ON {NAME} FOR EACH {each} EXECUTE FUNCTION snap()"
            )

    def listen(event: ampd.Event) -> None:
        nonlocal planted
        if isinstance(event, ampd.StatementStarted) and event.version == 2:
            planted = True
            meanwhile(trap)  # which waits for the end of that transaction, and is served before the next one

    files = (*FILES[:1], *scripts("", until_somebody_waits, f"{mode}SELECT 1")[1:])
    with pytest.raises(ampd.ConfigError, match="it has the trigger t"):
        await ampd.migrate(database.url, migrations=files, on_event=listen)
    assert planted
    assert await caught(database) == []


async def test_a_trigger_that_appears_between_two_statements_is_not_run(database: Database, stranger: Role) -> None:
    """A no-transaction migration stops before it would record its next statement."""
    await plant(database, stranger, "")
    await ampd.migrate(database.url, migrations=FILES[:1])
    await database.execute(f"GRANT ALL ON {NAME} TO {stranger.name}")

    async def trap() -> None:
        async with database.connect(stranger.url) as connection:
            await connection.execute(f"CREATE TRIGGER t BEFORE UPDATE ON {NAME} FOR EACH ROW EXECUTE FUNCTION snap()")
        await end_backend(database, gate.get_server_pid())

    def listen(event: ampd.Event) -> None:
        if isinstance(event, ampd.StatementStarted) and event.number == 2:
            meanwhile(trap)

    text = "-- no-transaction\n-- lock-timeout: 0\nSELECT 1;\nSELECT pg_advisory_xact_lock(1);\nCREATE TABLE never ();"
    async with database.connect() as gate:
        await gate.execute("SELECT pg_advisory_lock(1)")
        with pytest.raises(ampd.MigrationFailed, match="is not as ampd has made it any more") as failure:
            await ampd.migrate(database.url, migrations=(*FILES[:1], *scripts("", text)[1:]), on_event=listen)
    assert failure.value.line == 4
    assert await caught(database) == []
    assert await database.fetchval("SELECT to_regclass('never')") is None


ALTERATIONS = {
    "the trigger": (
        f"CREATE TRIGGER tr BEFORE INSERT ON {NAME} FOR EACH ROW EXECUTE FUNCTION noted()",
        "it has the trigger tr",
    ),
    "the rule": (f"CREATE RULE ru AS ON INSERT TO {NAME} DO ALSO SELECT 1", "it has the rule ru"),
    "the check": (f"ALTER TABLE {NAME} ADD CONSTRAINT ch CHECK (version > 0)", "it has the check ch"),
    "a default": (
        f"ALTER TABLE {NAME} ALTER ampd_version SET DEFAULT 'x'",
        "it has a default for its column ampd_version",
    ),
    "a generated column": (
        f"ALTER TABLE {NAME} ADD n bigint GENERATED ALWAYS AS (version) STORED",
        "it has a generated value for its column n",
    ),
    "an index": (f"CREATE INDEX ix ON {NAME} (lower(name))", "it has the index ix with an expression or a condition"),
    "a partial index": (
        f"CREATE INDEX ix ON {NAME} (name) WHERE version > 0",
        "it has the index ix with an expression or a condition",
    ),
    "a parent": (
        f"CREATE TABLE parent (version bigint NOT NULL); ALTER TABLE {NAME} INHERIT parent",
        "it inherits from public.parent",
    ),
    "a constraint of another table": (
        f"CREATE TABLE other (v bigint CONSTRAINT fk REFERENCES {NAME} ON DELETE CASCADE)",
        "it has a part in the constraint fk",
    ),
    "a type": (f"ALTER TABLE {NAME} ALTER checksum TYPE text", "it has a column checksum of type text"),
    "a domain": (
        f"CREATE DOMAIN odd AS text; ALTER TABLE {NAME} ADD x odd",
        "it has a column x of type public.odd",
    ),
    "a column less": (f"ALTER TABLE {NAME} DROP ampd_version", "it has no column ampd_version"),
    "no log": (f"ALTER TABLE {NAME} SET UNLOGGED", "it is not a plain table"),
}


@pytest.mark.parametrize("which", ALTERATIONS)
async def test_what_ampd_has_not_made_is_refused_by_name(database: Database, which: str) -> None:
    """Whatever its owner has put on the history is named by every command, before anything is written."""
    alteration, said = ALTERATIONS[which]
    files = scripts("CREATE TABLE a ()", "CREATE TABLE b ()")
    await ampd.migrate(database.url, migrations=files[:1])
    await database.execute(
        "CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END';" + alteration
    )
    for command in (ampd.status, ampd.migrate):
        with pytest.raises(ampd.ConfigError) as refusal:
            await command(database.url, migrations=files)
        assert refusal.value.message.endswith(f": {said}")
    assert await database.fetchval("SELECT to_regclass('b')") is None


@pytest.mark.parametrize(
    ("alteration", "undone"),
    [
        (ALTERATIONS["the trigger"][0], f"DROP TRIGGER tr ON {NAME}"),
        (ALTERATIONS["the rule"][0], f"DROP RULE ru ON {NAME}"),
        (f"ALTER TABLE {NAME} ADD reason text", "SELECT 1"),  # as a newer release may
        (f"CREATE INDEX ON {NAME} (name)", "SELECT 1"),
        (f"CREATE TABLE heir () INHERITS ({NAME}); INSERT INTO heir SELECT * FROM {NAME}", "SELECT 1"),
    ],
)
async def test_what_runs_nobodys_code_is_left_alone(database: Database, alteration: str, undone: str) -> None:
    """A trigger that is gone again, another column, an index or an heir do not disturb."""
    files = scripts("CREATE TABLE a ()", "CREATE TABLE b ()", "-- no-transaction\nSELECT 1")
    await ampd.migrate(database.url, migrations=files[:1])
    await database.execute(
        "CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END';" + alteration
    )
    await database.execute(undone)
    assert [done.version for done in (await ampd.migrate(database.url, migrations=files)).applied] == [2, 3]
    assert (await ampd.status(database.url, migrations=files)).up_to_date


async def test_an_event_trigger_that_alters_the_new_history_is_refused(database: Database) -> None:
    """What was made is looked at before it is used."""
    await database.execute(
        "CREATE FUNCTION put() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"ALTER TABLE {NAME} ALTER ampd_version SET DEFAULT 'x'; END $$;"
        "CREATE EVENT TRIGGER e ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION put()"
    )
    with pytest.raises(ampd.MigrationFailed, match="is not as ampd makes it") as failure:
        await ampd.migrate(database.url, migrations=scripts("SELECT 1"))
    assert "event trigger" in str(failure.value.hint)
    assert await database.fetchval(f"SELECT to_regclass('{NAME}')") is None


async def test_row_level_security_is_no_obstacle_to_those_whom_it_does_not_concern(database: Database) -> None:
    """Owner, superuser and BYPASSRLS go on, with a warning; no policy is ever run."""
    owner = await database.role("owner", "USAGE, CREATE ON SCHEMA public")
    past, reader = await database.role("past"), await database.role("reader")
    files = scripts("SELECT 1", "SELECT 2", "-- no-transaction\nSELECT 3")
    await ampd.migrate(owner.url, migrations=files[:1])
    await database.execute(
        "CREATE TABLE seen (); CREATE FUNCTION see() RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER AS "
        "'BEGIN INSERT INTO seen DEFAULT VALUES; RETURN true; END';"
        f"ALTER TABLE {NAME} ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON {NAME} USING (see());"
        f"GRANT SELECT ON {NAME} TO {past.name}, {reader.name}; ALTER ROLE {past.name} BYPASSRLS"
    )
    heard = Heard()
    for url, count in ((owner.url, 2), (database.url, 3)):
        if url == database.url:
            await database.execute(f"ALTER TABLE {NAME} FORCE ROW LEVEL SECURITY")  # which binds the owner alone
            await database.execute(f"ALTER TABLE {NAME} OWNER TO postgres")
        report = await ampd.migrate(url, migrations=files[:count], on_event=heard)
        assert [done.version for done in report.applied] == [count]
    assert all("row level security is on" in event.message for event in heard.of(ampd.Warned))
    assert len(heard.of(ampd.Warned)) == 2
    await database.execute(f"ALTER TABLE {NAME} OWNER TO postgres")
    assert (await ampd.status(past.url, migrations=files)).up_to_date
    with pytest.raises(ampd.PermissionDenied) as refusal:
        await ampd.status(reader.url, migrations=files)
    assert refusal.value.message == (
        f'row level security on the history table "public".{NAME} would hide its rows from {reader.name}'
    )
    assert f'ALTER TABLE "public".{NAME} DISABLE ROW LEVEL SECURITY' in str(refusal.value.hint)
    assert f'ALTER ROLE "{reader.name}" BYPASSRLS' in str(refusal.value.hint)
    await database.execute(f"ALTER TABLE {NAME} DISABLE ROW LEVEL SECURITY")
    assert (await ampd.status(reader.url, migrations=files)).up_to_date
    assert await database.fetchval("SELECT count(*) FROM seen") == 0


async def test_forced_row_level_security_is_told_to_the_owner(database: Database) -> None:
    """The owner that a policy would hide its own rows from is told so, by every command."""
    owner = await database.role("owner", "USAGE, CREATE ON SCHEMA public")
    await ampd.migrate(owner.url, migrations=scripts("SELECT 1"))
    await database.execute(f"ALTER TABLE {NAME} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    for command in (ampd.status, ampd.migrate):
        with pytest.raises(ampd.PermissionDenied, match="would hide its rows") as refusal:
            await command(owner.url, migrations=scripts("SELECT 1", "SELECT 2"))
        assert "NO FORCE ROW LEVEL SECURITY" in str(refusal.value.hint)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (f"UPDATE {NAME} SET name = repeat('x', 100000000)", "it has rows of a size"),
        (
            f"UPDATE {NAME} SET name = (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 3000) i)",
            "of a size",
        ),
        (
            f"UPDATE {NAME} SET checksum = (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 999) i)::bytea",
            "of a size",
        ),
        (f"UPDATE {NAME} SET started_at = 'infinity'", "cannot be read"),
        (f"UPDATE {NAME} SET started_at = '4000-01-01 BC'", "cannot be read"),
        (
            f"INSERT INTO {NAME} SELECT i, 'x', '', now(), now(), 1, 'x', 'x' FROM generate_series(10, 60010) i",
            "more than 50000 rows",
        ),
        (f"ALTER TABLE {NAME} ALTER checksum TYPE text", "a column checksum of type text"),
        (f"ALTER TABLE {NAME} ADD odd jsonb DEFAULT (repeat('[', 900) || repeat(']', 900))::jsonb", "a default"),
        (f"ALTER TABLE {NAME} ALTER name DROP NOT NULL; UPDATE {NAME} SET name = NULL", "of a size"),
    ],
)
async def test_odd_types_and_sizes_end_in_an_error_of_the_configuration(
    database: Database, change: str, said: str
) -> None:
    """The answer to a read is bounded, whatever somebody has written into the table."""
    await ampd.migrate(database.url, migrations=scripts("SELECT 1"))
    await database.execute(change)
    for command in (ampd.status, ampd.migrate):
        with pytest.raises(ampd.ConfigError) as refusal:
            await command(database.url, migrations=scripts("SELECT 1", "SELECT 2"))
        assert said in refusal.value.message
        assert len(str(refusal.value)) < 1000


VANDALS = {
    "drops": (f"DROP TABLE {NAME}", "was dropped, renamed or moved"),
    "renames": (f"ALTER TABLE {NAME} RENAME TO elsewhere", "was dropped, renamed or moved"),
    "moves": (f"ALTER TABLE {NAME} SET SCHEMA away", "was dropped, renamed or moved"),
    "empties": (f"TRUNCATE {NAME}", "has lost rows"),
    "deletes": (f"DELETE FROM {NAME} WHERE version = ", "has lost rows"),
    "revokes": (f"REVOKE ALL ON {NAME} FROM CURRENT_USER", "may not be written by {user} any more"),
    "forces row security": (
        f"ALTER TABLE {NAME} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
        "is not as ampd has made it any more (`ampd status` says why)",
    ),
}


@pytest.mark.parametrize("which", VANDALS)
@pytest.mark.parametrize("mode", ["", "-- no-transaction\n"])
async def test_a_migration_that_harms_the_history_is_stopped(database: Database, which: str, mode: str) -> None:
    """One sentence says what has become of it, with the statement; nothing of the statement is kept or recorded."""
    owner = await database.role("owner", "USAGE, CREATE ON SCHEMA public", f"CREATE ON DATABASE {database.name}")
    act, said = VANDALS[which]
    if which == "deletes":
        act += str(1 + bool(mode))
    act = act.replace("CURRENT_USER", owner.name)
    files = scripts("CREATE SCHEMA away", f"{mode}CREATE TABLE a ();\n{act};\nCREATE TABLE never ();")
    await ampd.migrate(owner.url, migrations=files[:1])
    with pytest.raises(ampd.MigrationFailed) as failure:
        await ampd.migrate(owner.url, migrations=files)
    line = 3 if mode else 2
    assert failure.value.message == (
        f'2_step.sql:{line}: ampd\'s history table "public".{NAME} {said.format(user=owner.name)} '
        "while this migration ran"
    )
    assert "leave that table and its schema as they are" in str(failure.value.hint)
    assert await database.fetchval("SELECT to_regclass('never')") is None
    assert await history(database) == ([(1, True, 1), (2, False, 1)] if mode else [(1, True, 1)])


async def test_a_procedure_that_commits_its_harm_ends_the_run(database: Database) -> None:
    """What no rollback takes back is told, and nothing is recorded, run again or applied to a new history."""
    await database.execute(
        f"CREATE PROCEDURE away() LANGUAGE plpgsql AS $$ BEGIN ALTER TABLE {NAME} RENAME TO gone; COMMIT; END $$"
    )
    files = scripts("-- no-transaction\nCREATE TABLE a ();\nCALL away();\nCREATE TABLE never ();")
    with pytest.raises(ampd.MigrationFailed, match=r"1_step\.sql:3: .* was dropped, renamed or moved") as failure:
        await ampd.migrate(database.url, migrations=files)
    assert "put that table back as it was" in str(failure.value.hint)
    assert await database.fetchval("SELECT to_regclass('never')") is None
    assert await database.fetchval(f"SELECT to_regclass('{NAME}')") is None


async def test_row_level_security_that_a_migration_switches_on_is_no_harm(database: Database) -> None:
    """A loop over all tables that enables it, as platforms do, is applied like anything else."""
    owner = await database.role("owner", "USAGE, CREATE ON SCHEMA public")
    files = scripts(f"ALTER TABLE {NAME} ENABLE ROW LEVEL SECURITY", "SELECT 1")
    assert len((await ampd.migrate(owner.url, migrations=files)).applied) == 2


async def test_an_old_invalid_index_is_not_dropped_on_the_word_of_a_forged_row(database: Database) -> None:
    """An index that is older than the record of its build was left by somebody else: a person decides."""
    text = "-- no-transaction\nCREATE UNIQUE INDEX CONCURRENTLY i ON t (id);\nCREATE TABLE never ();"
    files = scripts("CREATE TABLE t (id integer); INSERT INTO t VALUES (1), (1);", text)
    await ampd.migrate(database.url, migrations=files[:1])
    with pytest.raises(asyncpg.UniqueViolationError):
        await database.execute("CREATE UNIQUE INDEX CONCURRENTLY i ON t (id)")
    begun = done_checksum(split(text)[:1])
    await database.execute(
        f"INSERT INTO {NAME} VALUES (2, 'step', '\\x{files[1].checksum.hex()}', now(), NULL, 0, 'x', 'y', "
        f"'\\x{begun.hex()}')"
    )
    with pytest.raises(ampd.MigrationInterrupted, match="was started and did not finish") as refusal:
        await ampd.migrate(database.url, migrations=files)
    assert '"public"."i"' in str(refusal.value.hint) or "public.i" in str(refusal.value.hint)
    assert await database.fetchval("SELECT indisvalid FROM pg_index WHERE indexrelid = 'i'::regclass") is False
    assert await database.fetchval("SELECT to_regclass('never')") is None


@pytest.mark.parametrize("what", ["INDEX CONCURRENTLY i", "TABLE CONCURRENTLY t", "SCHEMA CONCURRENTLY public"])
async def test_what_an_interrupted_reindex_has_left_is_told_from_what_others_have(
    database: Database, stranger: Role, what: str
) -> None:
    """Copies go only where they are those of an index that the statement names; nobody else's index is touched."""
    text = f"-- no-transaction\nREINDEX {what};"
    files = scripts("CREATE TABLE t (x int); CREATE INDEX i ON t (x); INSERT INTO t VALUES (1), (1)", text)
    await ampd.migrate(database.url, migrations=files[:1])
    await database.execute(
        f"INSERT INTO {NAME} VALUES (2, 'step', '\\x{files[1].checksum.hex()}', now(), NULL, 0, 'x', 'y', "
        f"'\\x{done_checksum(split(text)[:1]).hex()}')"
    )
    await database.execute(f"CREATE SCHEMA his AUTHORIZATION {stranger.name}")
    async with database.connect(stranger.url) as connection:
        await connection.execute(
            "CREATE TABLE his.p (a int) PARTITION BY RANGE (a); CREATE TABLE his.part PARTITION OF his.p DEFAULT;"
            "CREATE INDEX i ON ONLY his.p (a); CREATE INDEX i_ccnew ON ONLY his.p (a);"
            "CREATE TABLE his.u (y int); INSERT INTO his.u VALUES (1), (1)"
        )
        with pytest.raises(asyncpg.UniqueViolationError):
            await connection.execute("CREATE UNIQUE INDEX CONCURRENTLY accounts_ccnew ON his.u (y)")
    for name in ("i_ccnew", "other_ccnew"):
        with pytest.raises(asyncpg.UniqueViolationError):
            await database.execute(f"CREATE UNIQUE INDEX CONCURRENTLY {name} ON t (x)")
    await ampd.migrate(database.url, migrations=files)
    left = await database.fetch(
        "SELECT indexrelid::regclass::text AS name FROM pg_index WHERE NOT indisvalid ORDER BY 1"
    )
    assert [row["name"] for row in left] == ["his.accounts_ccnew", "his.i", "his.i_ccnew", "other_ccnew"]
