"""Whose the history and its schema are: the configured role's, and never a stranger's."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

import ampd
from ampd.config import MetadataDb, Migrations
from tests.scenes import building, end_backend, history, meanwhile, scripts
from tests.servers import Database, Role
from tests.strangers import FILES, TABLE, caught, plant

pytestmark = pytest.mark.anyio

Command = Callable[..., Awaitable[Any]]
NAME = "ampd_schema_migrations"


@pytest.fixture
async def roles(database: Database) -> tuple[Role, Role]:
    """A role that owns everything and cannot log in, and a login that must take it on to do anything."""
    owner, login = await database.role("owner"), await database.role("login")
    await database.execute(
        f"ALTER ROLE {owner.name} NOLOGIN; ALTER ROLE {login.name} NOINHERIT; GRANT {owner.name} TO {login.name};"
        f"GRANT CREATE ON DATABASE {database.name} TO {owner.name};"
        f"GRANT USAGE, CREATE ON SCHEMA public TO {owner.name}"
    )
    return owner, login


def configured(role: Role, owner: str | None, **settings: Any) -> MetadataDb:
    """Return a configuration for a login, with a role that migrations run as."""
    return MetadataDb(url=ampd.DatabaseUrl(role.url), migrations=Migrations(role=owner), **settings)


MIXED = scripts(
    "CREATE TABLE a (id integer);",
    "RESET ROLE; CREATE TABLE b (); SET ROLE NONE; CREATE TABLE c ();",
    "-- no-transaction\nCREATE TABLE d ();\nCREATE INDEX CONCURRENTLY i ON a (id);\nRESET ROLE;\nCREATE TABLE e ();\n"
    "VACUUM a;\nDISCARD ALL;\nCREATE TABLE f ();",
)


@pytest.mark.parametrize("schema", [None, "fresh"])
async def test_migrations_and_the_history_belong_to_the_configured_role(
    database: Database, roles: tuple[Role, Role], schema: str | None
) -> None:
    """A login without any right of its own migrates as `role`, in both kinds of file, and resolves as it, too."""
    owner, login = roles
    report = await ampd.migrate(configured(login, owner.name, schema=schema), migrations=MIXED)
    assert len(report.applied) == 3
    owners = await database.fetch(
        "SELECT relname, pg_get_userbyid(relowner) AS owner FROM pg_class WHERE relkind IN ('r', 'i') "
        "AND relnamespace = $1::regnamespace",
        schema or "public",
    )
    assert {row["owner"] for row in owners} == {owner.name}
    assert {row["relname"] for row in owners} >= {*"abcdefi", NAME}
    if schema:
        assert (
            await database.fetchval("SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = $1", schema)
            == owner.name
        )
    assert (await ampd.migrate(configured(login, owner.name, schema=schema), migrations=MIXED)).applied == ()


async def test_who_only_reads_trusts_the_role_without_being_a_member(
    database: Database, roles: tuple[Role, Role]
) -> None:
    """A service with SELECT alone reads what the configured role has applied, and no other role's history."""
    owner, login = roles
    await ampd.migrate(configured(login, owner.name), migrations=MIXED)
    reader = await database.role("service", f"SELECT ON {NAME}")
    assert (await ampd.status(configured(reader, owner.name), migrations=MIXED)).up_to_date
    for role in (None, login.name):
        with pytest.raises(ampd.PermissionDenied, match=f"belongs to {owner.name}") as refusal:
            await ampd.status(configured(reader, role), migrations=MIXED)
        assert f'role = "{owner.name}"' in str(refusal.value.hint)
    with pytest.raises(ampd.PermissionDenied, match="cannot take on the role") as denial:
        await ampd.migrate(configured(reader, owner.name), migrations=(*MIXED, *scripts("", "", "", "SELECT 1")[3:]))
    assert denial.value.hint == (
        f'if there is such a role, as a superuser: GRANT "{owner.name}" TO "{reader.name}"; '
        "else correct metadata_db.migrations.role"
    )


async def test_an_interrupted_migration_is_resolved_as_the_role(database: Database, roles: tuple[Role, Role]) -> None:
    """`resolve` writes as the configured role."""
    owner, login = roles
    files = scripts("-- no-transaction\nCREATE TABLE a ();\nSELECT 1/0;")
    with pytest.raises(ampd.MigrationFailed):
        await ampd.migrate(configured(login, owner.name), migrations=files)
    await ampd.resolve(configured(login, owner.name), 1, ampd.Resolution.ROLLED_BACK, migrations=files)
    assert await history(database) == []


async def test_another_tools_history_is_taken_over_as_the_role(database: Database, roles: tuple[Role, Role]) -> None:
    """`baseline` reads and writes as the configured role, the login having no right of its own."""
    owner, login = roles
    await database.execute(
        f"SET ROLE {owner.name}; CREATE TABLE schema_migrations (version varchar PRIMARY KEY);"
        "INSERT INTO schema_migrations VALUES ('1')"
    )
    status = await ampd.baseline(configured(login, owner.name), source="dbmate", migrations=FILES[:1])
    assert status.up_to_date
    assert (
        await database.fetchval(f"SELECT pg_get_userbyid(relowner) FROM pg_class WHERE relname = '{NAME}'")
        == owner.name
    )
    reader = await database.role("service", f"SELECT ON {NAME}")
    with pytest.raises(ampd.PermissionDenied, match="cannot take on the role"):
        await ampd.baseline(configured(reader, owner.name), 1, migrations=FILES[:1])


@pytest.mark.parametrize("role", ["none", "pg_monitor", "x" * 64, "a\0b"])
def test_a_role_that_cannot_be_is_refused(role: str) -> None:
    """The configuration names the key."""
    with pytest.raises(ampd.ConfigError, match=r"metadata_db\.migrations\.role: the role"):
        Migrations(role=role)


@pytest.fixture
async def keeper(database: Database, stranger: Role) -> Role:
    """A stranger who may create schemas, and owns the one that is called amp."""
    await database.execute(
        f"GRANT CREATE ON DATABASE {database.name} TO {stranger.name}; CREATE SCHEMA amp AUTHORIZATION {stranger.name}"
    )
    return stranger


SWAP = (
    "ALTER SCHEMA amp RENAME TO aside; CREATE SCHEMA amp; GRANT ALL ON SCHEMA amp TO PUBLIC;"
    + TABLE.replace(NAME, f"amp.{NAME}")
    + f"ALTER TABLE amp.{NAME} ADD done_checksum bytea; GRANT ALL ON amp.{NAME} TO PUBLIC;"
    f"CREATE TRIGGER t BEFORE INSERT OR UPDATE ON amp.{NAME} FOR EACH STATEMENT EXECUTE FUNCTION snap()"
)


@pytest.mark.parametrize("command", [ampd.status, ampd.migrate])
async def test_no_history_is_begun_in_the_schema_of_a_stranger(
    database: Database, keeper: Role, command: Command
) -> None:
    """Its owner could rename it in the middle of a run, or hide what was applied: the error says what to do."""
    with pytest.raises(ampd.PermissionDenied) as refusal:
        await command(database.url, migrations=FILES, schema="amp")
    assert refusal.value.message == (
        f'the schema "amp" belongs to {keeper.name}, who could replace or hide the history in it, and so is not '
        "trusted: that is neither postgres, nor a superuser, nor the owner of the database, nor the role in "
        "metadata_db.migrations.role"
    )
    assert refusal.value.hint == (
        f'if {keeper.name} is the role that migrates this database, write `role = "{keeper.name}"` under '
        '[metadata_db.migrations]; else, as its owner or a superuser: ALTER SCHEMA "amp" OWNER TO "postgres"; or '
        "set metadata_db.schema to another schema; if migrations were applied here before, find out first what has "
        "become of their history"
    )
    assert await database.fetchval("SELECT to_regclass('victims')") is None
    await database.execute('ALTER SCHEMA amp OWNER TO "postgres"')
    await command(database.url, migrations=FILES, schema="amp")


async def test_a_schema_named_like_the_migrator_is_not_used_before_its_owner_is_looked_at(
    database: Database, stranger: Role
) -> None:
    """Where the search path begins with "$user", whoever may create schemas makes one for the migrator."""
    await database.execute(
        f"GRANT CREATE ON DATABASE {database.name} TO {stranger.name}; CREATE SCHEMA postgres AUTHORIZATION "
        f'{stranger.name}; ALTER DATABASE {database.name} SET search_path = "$user", public'
    )
    with pytest.raises(ampd.PermissionDenied, match=f'the schema "postgres" belongs to {stranger.name}'):
        await ampd.migrate(database.url, migrations=FILES)


async def test_a_history_in_the_schema_of_a_stranger_is_not_gone_by(database: Database, keeper: Role) -> None:
    """Neither read nor written, by any command, though the table itself is ours; no hint leads to a second history."""
    await database.execute("ALTER SCHEMA amp OWNER TO postgres; GRANT USAGE ON SCHEMA amp TO PUBLIC")
    await ampd.migrate(database.url, migrations=FILES[:1], schema="amp")
    await database.execute(f"ALTER SCHEMA amp OWNER TO {keeper.name}")
    commands: list[Command] = [ampd.status, ampd.migrate]
    for command in commands:
        with pytest.raises(ampd.PermissionDenied, match=f'the schema "amp" belongs to {keeper.name}') as refusal:
            await command(database.url, migrations=FILES, schema="amp")
        assert refusal.value.hint == (
            "find out whether the history is whole; then, as its owner or a superuser: "
            'ALTER SCHEMA "amp" OWNER TO "postgres"'
        )
    assert await database.fetchval(f"SELECT count(*) FROM amp.{NAME}") == 1


async def test_schemas_of_these_owners_are_trusted(database: Database) -> None:
    """The migrator's own, the configured role's, a superuser's, the database's owner's, also by its other name."""
    me, owner, other = [await database.role(name) for name in ("me", "owner", "other")]
    await database.execute(f"GRANT {owner.name} TO {me.name}; CREATE SCHEMA amp")
    files = scripts("SELECT 1")

    async def goes(role: str | None, schema_owner: str) -> None:
        await database.execute(
            f"ALTER SCHEMA amp OWNER TO {schema_owner}; DROP TABLE IF EXISTS amp.{NAME};"
            f"GRANT ALL ON SCHEMA amp TO {me.name}, {owner.name}"
        )
        for _ in range(2):
            await ampd.migrate(configured(me, role, schema="amp"), migrations=files)

    for role, schema_owner in ((None, "postgres"), (None, me.name), (owner.name, me.name), (owner.name, owner.name)):
        await goes(role, schema_owner)
    reader = await database.role("reader", "USAGE ON SCHEMA amp", f"SELECT ON amp.{NAME}")
    assert (await ampd.status(configured(reader, owner.name, schema="amp"), migrations=files)).up_to_date
    for schema_owner in (other.name, owner.name):  # one that I am a member of is a stranger as well
        with pytest.raises(ampd.PermissionDenied, match=f'the schema "amp" belongs to {schema_owner}'):
            await goes(None, schema_owner)
    await database.execute(f"ALTER DATABASE {database.name} OWNER TO {owner.name}")
    await goes(None, owner.name)
    if database.server.major >= 14:
        await goes(None, "pg_database_owner")


async def test_the_schema_public_may_belong_to_a_platforms_administrators(database: Database) -> None:
    """On Cloud SQL that is cloudsqlsuperuser, who is none: no superuser migrates there, and whoever does goes on."""
    me, administrators = await database.role("me", "USAGE, CREATE ON SCHEMA public"), await database.role("admins")
    await database.execute(f"ALTER SCHEMA public OWNER TO {administrators.name}")
    with pytest.raises(ampd.PermissionDenied, match='the schema "public" belongs to'):
        await ampd.migrate(me.url, migrations=FILES[:1])
    await database.execute(f"ALTER ROLE {administrators.name} CREATEROLE")
    await ampd.migrate(me.url, migrations=FILES[:1])
    await ampd.migrate(me.url, migrations=FILES)
    with pytest.raises(ampd.PermissionDenied, match='the schema "public" belongs to'):
        await ampd.migrate(
            MetadataDb(url=ampd.DatabaseUrl(database.url), migrations=Migrations(role=me.name)), migrations=FILES
        )


@pytest.mark.parametrize("mode", ["", "-- no-transaction\n"])
async def test_a_history_that_is_swapped_with_its_schema_is_not_written(
    database: Database, keeper: Role, mode: str
) -> None:
    """While a migration runs its schema is given to a stranger, who puts another in its place: no trigger is run."""
    await plant(database, keeper, "")
    await database.execute("ALTER SCHEMA amp OWNER TO postgres")
    await ampd.migrate(database.url, migrations=FILES[:1], schema="amp")

    async def swap() -> None:
        await database.execute(f"ALTER SCHEMA amp OWNER TO {keeper.name}")
        async with database.connect(keeper.url) as connection:
            await connection.execute(SWAP)
        await end_backend(database, gate.get_server_pid())

    def listen(event: ampd.Event) -> None:
        if isinstance(event, ampd.StatementStarted) and event.number == 2:
            meanwhile(swap)

    text = f"{mode}-- lock-timeout: 0\nSELECT 1;\nSELECT pg_advisory_xact_lock(1);\nCREATE TABLE public.never ();"
    files = (*FILES[:1], *scripts("", text)[1:])
    async with database.connect() as gate:
        await gate.execute("SELECT pg_advisory_lock(1)")
        with pytest.raises(ampd.MigrationFailed, match="was dropped, renamed or moved while this migration ran"):
            await ampd.migrate(database.url, migrations=files, schema="amp", on_event=listen)
    assert await caught(database) == []
    assert await database.fetchval("SELECT to_regclass('public.never')") is None


@pytest.mark.parametrize("mode", ["", "-- no-transaction\n"])
async def test_a_migration_may_give_the_schema_to_whom_ampd_trusts_and_to_no_stranger(
    database: Database, keeper: Role, mode: str
) -> None:
    """The history is not left where the next run could not go by it."""
    owner = await database.role("owner", f"CREATE ON DATABASE {database.name}")
    await database.execute(f"ALTER SCHEMA amp OWNER TO {owner.name}; GRANT {keeper.name} TO {owner.name}")
    files = scripts(f"{mode}CREATE TABLE a ();\nALTER SCHEMA amp OWNER TO {keeper.name};\nCREATE TABLE b ();")
    with pytest.raises(ampd.MigrationFailed) as failure:
        await ampd.migrate(owner.url, migrations=files, schema="amp")
    assert "is in a schema that was given to a role that is not trusted while this migration ran" in str(failure.value)
    assert await database.fetchval("SELECT to_regclass('amp.b')") is None
    assert (
        await database.fetchval("SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'amp'")
        == owner.name
    )
    await database.execute(f"ALTER DATABASE {database.name} OWNER TO {keeper.name}")
    await ampd.migrate(owner.url, migrations=files, schema="amp")
    assert await database.fetchval("SELECT to_regclass('amp.b')") is not None


async def test_a_view_in_the_place_of_the_history_is_not_asked_when_a_build_was_begun(
    database: Database, keeper: Role, open_path: Path
) -> None:
    """What a failed build has left is looked for by the record of the build, in the history that was read."""
    open_path.chmod(0o777)  # the question is asked in a read-only transaction: only a file shows who has run what
    await database.execute("ALTER SCHEMA amp OWNER TO postgres; CREATE TABLE big AS SELECT generate_series(1, 9) AS x")
    await ampd.migrate(database.url, migrations=scripts("SELECT 1"), schema="amp")
    files = scripts("SELECT 1", "-- no-transaction\nCREATE UNIQUE INDEX CONCURRENTLY i ON public.big (x);")

    async def run() -> None:
        with pytest.raises(ampd.MigrationFailed):
            await ampd.migrate(database.url, migrations=files, schema="amp")

    async with database.connect() as holder, anyio.create_task_group() as tasks:
        await holder.execute("BEGIN; INSERT INTO big VALUES (1)")  # the build waits for this, and then fails
        tasks.start_soon(run)
        await building(database)
        await database.execute(f"ALTER SCHEMA amp OWNER TO {keeper.name}")
        async with database.connect(keeper.url) as connection:
            await connection.execute(
                "ALTER SCHEMA amp RENAME TO aside; CREATE SCHEMA amp; GRANT ALL ON SCHEMA amp TO PUBLIC;"
                "CREATE FUNCTION amp.snap() RETURNS xid LANGUAGE plpgsql AS $$ BEGIN "
                f"COPY (SELECT current_user) TO '{open_path}/caught'; RETURN '3'; END $$;"
                f"CREATE VIEW amp.{NAME} AS SELECT 2::bigint AS version, amp.snap() AS xmin;"
                f"GRANT ALL ON amp.{NAME} TO PUBLIC"
            )
        await holder.execute("COMMIT")
    assert not (open_path / "caught").exists()
