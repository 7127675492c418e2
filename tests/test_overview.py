"""`ampd status --all`: every history of a database, whatever its schema and name, and what is not read of it."""

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import pytest

import ampd as library
from ampd import migrator
from ampd.display import fitted
from ampd.history.overview import FoundHistory, Overview, Unfinished, Unread
from tests.cli_output import seen
from tests.scenes import scripts, transaction, until
from tests.servers import Ampd, Database, Proxy
from tests.strangers import TABLE

pytestmark = pytest.mark.anyio

NAME = "ampd_schema_migrations"
STUCK = "-- no-transaction\nCREATE PROCEDURE p() LANGUAGE plpgsql AS 'BEGIN COMMIT; PERFORM 1/0; END';\nCALL p();"


async def overview(url: str, role: str | None = None) -> Overview:
    """Return the overview that a command with this URL, and this `role` in the configuration, shows."""
    migrations = library.Migrations(role=role, connect_wait_secs=0)
    return await migrator.overview(library.MetadataDb(url=library.DatabaseUrl(url), migrations=migrations))


def unread(found: Overview) -> dict[str, Unread | None]:
    """Return the names of what was found, with why each was not read."""
    return {each.name: each.unread for each in found.histories}


async def test_every_history_has_a_line(ampd: Ampd, database: Database) -> None:
    """Whatever schema and table a history is in, the command shows it, as text and as JSON, and reads no folder."""
    await migrate(database, "SELECT 1", "SELECT 2")
    await migrate(database, "SELECT 1", schema="jobs", table="queue migrations")
    with pytest.raises(library.MigrationFailed):
        await migrate(database, "SELECT 1", STUCK, table="other")
    environment = {"AMP_CONFIG_METADATA_DB__MIGRATIONS__DIR": "/nowhere", "AMP_CONFIG_METADATA_DB__SCHEMA": "nowhere"}
    assert seen(ampd("status", "--all", url=database.url, env=environment)) == (
        0,
        "DATABASE: 3 histories\n\n"
        "history                        version  applied          last (UTC)        owner\n"
        "jobs.queue migrations                1  1                TIME  postgres\n"
        "public.ampd_schema_migrations        2  2                TIME  postgres\n"
        "public.other                         1  1, 1 unfinished  TIME  postgres\n\n"
        "unfinished; `ampd status` with the files of that history says what to do:\n  public.other: 2 step\n",
        "",
    )
    process = ampd("status", "--all", "--json", url=database.url, env=environment)
    document = json.loads(process.stdout)
    assert document["database"] == f"127.0.0.1:{database.server.port}/{database.name}"
    last = document["histories"][2]
    assert last.pop("last_applied_at").endswith("+00:00")
    assert last == {
        "schema": "public",
        "table": "other",
        "owner": "postgres",
        "state": "unfinished",
        "reason": None,
        "current_version": 1,
        "applied": 1,
        "unfinished": [{"version": 2, "name": "step"}],
        "runner": None,
    }
    assert [each["state"] for each in document["histories"]] == ["applied", "applied", "unfinished"]


async def migrate(database: Database, *texts: str, **place: Any) -> None:
    """Apply migrations with these texts."""
    await library.migrate(database.url, migrations=scripts(*texts), **place)


async def test_a_database_without_any(ampd: Ampd, database: Database) -> None:
    """A table that only looks like a history is none, and where there is none the command says so."""
    await database.execute(
        TABLE.replace("bytea", "text")
        + TABLE.replace(NAME, "short").replace("statements_done integer NOT NULL, ", "")
        + f"CREATE TABLE h (LIKE {NAME}); ALTER TABLE h DROP checksum, ADD checksum bytea; CREATE VIEW v AS TABLE h;"
        + "DROP TABLE h CASCADE"
    )
    assert seen(ampd("status", "--all", url=database.url)) == (0, "DATABASE: no history of ampd\n", "")
    process = ampd("status", "--all", "--json", url=database.url)
    assert json.loads(process.stdout)["histories"] == []


def test_no_folder_is_compared(ampd: Ampd) -> None:
    """--migrations beside --all is refused: it would change nothing."""
    assert seen(ampd("status", "--all", "--migrations", "m", url="postgresql://127.0.0.1:1/d")) == (
        1,
        "",
        "error: --all compares no files with the histories\nhint: leave out --all, or --migrations\n",
    )


async def test_a_reader_sees_what_it_may_and_the_grants_for_the_rest(database: Database) -> None:
    """A role with SELECT on some histories reads these; of the others it is told what to grant."""
    for schema in ("a", "b", "c"):
        await migrate(database, "SELECT 1", schema=schema)
    reader = await database.role("reader", "USAGE ON SCHEMA a, c", f"SELECT ON a.{NAME}, b.{NAME}, c.{NAME}")
    await database.execute(f"ALTER TABLE c.{NAME} ENABLE ROW LEVEL SECURITY")
    found = await overview(reader.url)
    assert unread(found) == {
        f"a.{NAME}": None,
        f"b.{NAME}": Unread.PRIVILEGE,
        f"c.{NAME}": Unread.ROW_SECURITY,
    }
    assert [each.applied for each in found.histories] == [1, None, None]
    assert found.text().split("\n\n")[2:] == [
        f"not readable for {reader.name}; as the owner:\n"
        f'  GRANT USAGE ON SCHEMA "b" TO "{reader.name}"; GRANT SELECT ON TABLE "b"."{NAME}" TO "{reader.name}";',
        f"row level security would hide rows from {reader.name}; as the owner, or let {reader.name} have BYPASSRLS:\n"
        f'  ALTER TABLE "c"."{NAME}" DISABLE ROW LEVEL SECURITY;',
    ]
    for line in found.text().splitlines():
        if line.startswith("  "):
            await database.execute(line)
    assert set(unread(await overview(reader.url)).values()) == {None}


async def test_histories_of_strangers_are_named_and_not_read(database: Database) -> None:
    """Neither a stranger's table nor one in a stranger's schema is locked or read, nor one with anything on it."""
    await migrate(database, "SELECT 1")
    eve = await database.role("eve")
    await database.execute(
        f"CREATE SCHEMA eve AUTHORIZATION {eve.name};"
        f"CREATE TABLE eve.ours (LIKE {NAME}); CREATE TABLE hers (LIKE {NAME}); CREATE TABLE eve.hers (LIKE {NAME});"
        f"ALTER TABLE hers OWNER TO {eve.name}; ALTER TABLE eve.hers OWNER TO {eve.name};"
        f"CREATE TABLE checked (LIKE {NAME}, CHECK (version > 0));"
        f"CREATE TABLE part (LIKE {NAME}) PARTITION BY RANGE (version); CREATE TABLE part_1 PARTITION OF part DEFAULT"
    )
    async with transaction(database, "LOCK TABLE eve.hers", url=eve.url):
        found = await overview(database.url)
    assert unread(found) == {
        "eve.hers": Unread.OWNER,
        "eve.ours": Unread.SCHEMA_OWNER,
        f"public.{NAME}": None,
        "public.checked": Unread.ALTERED,
        "public.hers": Unread.OWNER,
        "public.part_1": Unread.ALTERED,
    }
    assert found.text().split("\n\n")[2:] == [
        "not read: it belongs neither to postgres, nor to a superuser, the owner of the database, or the role in "
        f"metadata_db.migrations.role:\n  eve.hers belongs to {eve.name}\n  public.hers belongs to {eve.name}",
        "not read: whoever owns the schema could replace the history, and is neither postgres, nor a superuser, the "
        "owner of the database, or the role in metadata_db.migrations.role:\n"
        f"  eve.ours: its schema belongs to {eve.name}",
        "not read: something on it is not as ampd makes it; `ampd status` of that history says what:\n"
        "  public.checked\n  public.part_1",
    ]
    assert unread(await overview(database.url, role=eve.name))["eve.hers"] is None


async def test_a_locked_history_is_not_waited_for(database: Database) -> None:
    """One that another session has locked is named, and the others are shown."""
    await migrate(database, "SELECT 1")
    await migrate(database, "SELECT 1", table="locked")
    async with transaction(database, "LOCK TABLE locked"):
        found = await overview(database.url)
    assert unread(found) == {f"public.{NAME}": None, "public.locked": Unread.LOCKED}
    assert found.text().endswith("\n\nlocked by another session:\n  public.locked")


async def test_many_locked_histories_do_not_use_up_the_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some of them the others are waited for no more, so that what is not locked is shown in time."""
    monkeypatch.setattr("ampd.history.overview._LOCK_MS", 600_000)
    monkeypatch.setattr("ampd.history.overview._MANY_LOCKED", 0)
    await migrate(database, "SELECT 1")
    await database.execute(f"CREATE TABLE a (LIKE {NAME}); CREATE TABLE b (LIKE {NAME})")
    async with transaction(database, "LOCK TABLE a, b"):
        found = unread(await overview(database.url))
    assert found == {"public.a": Unread.LOCKED, "public.b": Unread.LOCKED, f"public.{NAME}": None}


async def test_nobody_hides_a_history_behind_tables(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are too many to show, those of owners that are not trusted are left out, and the command says so."""
    monkeypatch.setattr("ampd.history.overview._MOST", 2)
    await migrate(database, "SELECT 1")
    eve = await database.role("eve")
    await database.execute(
        f"CREATE SCHEMA a AUTHORIZATION {eve.name};"
        + "".join(f"CREATE TABLE a.{name} (LIKE {NAME}); ALTER TABLE a.{name} OWNER TO {eve.name};" for name in "xyz")
    )
    found = await overview(database.url)
    assert unread(found) == {"a.x": Unread.OWNER, f"public.{NAME}": None}
    assert "\n\nthere are more, which are not shown; those of owners that are trusted come first\n\n" in found.text()
    assert json.loads(found.json())["truncated"] is True


async def test_a_name_that_is_no_text(database: Database) -> None:
    """In a database of SQL_ASCII a name can be any bytes: its history is named, and the others are shown."""
    ascii_only = Database(database.server, f"{database.name}_ascii")
    await database.execute(f"CREATE DATABASE {ascii_only.name} ENCODING 'SQL_ASCII' TEMPLATE template0")
    try:
        await migrate(ascii_only, "SELECT 1")
        await migrate(ascii_only, "SELECT 1", table="café")
        await ascii_only.execute(
            f"DO $$ BEGIN EXECUTE format('CREATE TABLE %I (LIKE {NAME})', convert_from('\\xff', 'SQL_ASCII')); END $$"
        )
        found = await overview(ascii_only.url)
    finally:
        await database.execute(f"DROP DATABASE {ascii_only.name} WITH (FORCE)")
    assert unread(found) == {"public.\\377": Unread.ERROR, f"public.{NAME}": None, "public.café": None}
    assert found.text().endswith('public.\\377: invalid byte sequence for encoding "UTF8": 0xff')


async def test_who_is_migrating_is_shown(database: Database) -> None:
    """A run that is under way keeps nobody from seeing its history, and is named as the holder of the lock."""
    await migrate(database, "SELECT 1", table='odd "name"')
    slow = scripts("SELECT 1", "-- lock-timeout: 0\nSELECT pg_advisory_xact_lock(1)")
    async with transaction(database, "SELECT pg_advisory_xact_lock(1)") as gate:
        run = asyncio.create_task(library.migrate(database.url, migrations=slow, table='odd "name"'))

        async def shown() -> FoundHistory | None:
            (history,) = (await overview(database.url)).histories
            return history if history.runner else None

        history = await until(shown)
        assert history is not None
        assert history.runner is not None
        assert (history.applied, history.runner.migration) == (1, "2 step")
        assert history.fields()["state"] == "running"
        assert "1, running" in Overview("x", (history,)).text()
        await gate.execute("COMMIT")
        await run


@pytest.mark.any_server
async def test_it_needs_one_round_trip_and_no_schema(database: Database) -> None:
    """A search path that leads nowhere is no obstacle, and one message asks for everything."""
    for number in range(30):
        await migrate(database, "SELECT 1", schema=f"tenant_{number}")
    await database.execute(f"ALTER DATABASE {database.name} SET search_path = nowhere")
    async with Proxy(database.server.host, database.server.port) as line:
        found = await overview(f"postgresql://postgres@{line.host}:{line.port}/{database.name}?sslmode=disable")
        assert (line.connections, line.round_trips) == (1, 1)
    assert [each.applied for each in found.histories] == [1] * 30
    assert await database.fetchval("SELECT count(*) FROM pg_class WHERE relname = $1", NAME) == 30


async def test_a_row_of_another_hand_ends_nothing(database: Database) -> None:
    """Values that ampd does not write, such as a time without an end, keep no other history from being shown."""
    await migrate(database, "SELECT 1")
    await database.execute(
        f"CREATE TABLE odd (LIKE {NAME}); INSERT INTO odd VALUES "
        "(1, repeat('x', 9999), 'x', '-infinity', 'infinity', 1, '', ''), (2, '', 'x', now(), NULL, 1, '', '')"
    )
    found = await overview(database.url)
    assert [(each.applied, each.current_version, each.last_applied_at is None) for each in found.histories] == [
        (1, 1, False),
        (1, 1, True),
    ]


def test_a_terminal_of_80_columns() -> None:
    """The lines of the table fit, whatever is in them; what is least needed is left out, and text is broken."""
    noon = datetime(2026, 11, 23, 12, 30, tzinfo=UTC)
    histories = (
        FoundHistory("public", NAME, "amp", "amp", None, None, 20261123222400, 42, noon),
        FoundHistory("t" * 63, "t" * 63, "o" * 63, "amp", None, None, 7, 6, noon, (Unfinished(8, "index"),)),
        FoundHistory("eve", NAME, "eve", "eve", Unread.PRIVILEGE),
    )
    whole = Overview("amp", histories, "db:5432/amp")
    assert fitted(whole.text(80), 80) == (
        "db:5432/amp: 3 histories\n\n"
        "history                               version  applied          last (UTC)\n"
        f"public.{NAME}  20261123222400  42               2026-11-23 12:30\n"
        f"{'t' * 27}..               7  6, 1 unfinished  2026-11-23 12:30\n"
        f"eve.{NAME}                     not readable\n\n"
        "unfinished; `ampd status` with the files of that history says what to do:\n"
        f"{'t' * 63}.{'t' * 63}:\n    8 index\n\n"
        "not readable for amp; as the owner:\n"
        '  GRANT USAGE ON SCHEMA "eve" TO "amp"; GRANT SELECT ON TABLE\n'
        f'    "eve"."{NAME}" TO "amp";'
    )
    assert max(map(len, whole.text().splitlines())) > 120
    assert [each["reason"] for each in json.loads(whole.json())["histories"]] == [None, None, "privilege"]
