"""Taking over what another tool has applied: each history as the tool itself writes it, believed and refused."""

from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

import ampd as library
from ampd.config import HISTORY_TABLE as TABLE
from ampd.history.first_run import Neighbour
from ampd.redaction import Hidden
from ampd.run import Run
from ampd.takeover import tools
from ampd.takeover.baseline import Takeover
from ampd.takeover.proof import Baseline, Record, proved
from ampd.takeover.tools import TOOLS, Row, read_rows
from tests.cli_output import plain, seen
from tests.folders import write
from tests.scenes import Heard
from tests.servers import Ampd, Database

pytestmark = pytest.mark.anyio

USERS, POSTS = "CREATE TABLE users (id int);\n", "CREATE TABLE posts (id int);\n"

SHA_USERS = "6337697883ead93bde2c64aa4c89983e494facc84418dc07c69854725a0401e9abccd1b1a56f06b2871d89dd25d29d40"
SHA_POSTS = "be09f52265b83a6fab64f58b5b241f0aa0a5b75187a0aee25881c8ae07846e30ff14c2ff372656e4dd425eca05e084e4"


class Taken(msgspec.Struct, frozen=True):
    """A history as a tool has written it, the files that belong to it, and what is refused after a row was changed."""

    history: str
    files: dict[str, str]
    tampered: dict[str, str]  # statement: the problem


# Recorded from databases that these releases have migrated: Flyway 13.12, dbmate 2.36, node-pg-migrate 9.0, yoyo 9.0,
# Alembic 1.20, goose 3.29, golang-migrate 4.20, sqlx 0.9.
TAKEN = {
    "sqlx": Taken(
        """
        CREATE TABLE _sqlx_migrations (version bigint PRIMARY KEY, description text NOT NULL,
            installed_on timestamptz NOT NULL DEFAULT now(), success boolean NOT NULL, checksum bytea NOT NULL,
            execution_time bigint NOT NULL);
        INSERT INTO _sqlx_migrations VALUES
            (20240101000000, 'create users', '2024-01-01 10:00:00.5+00', true, decode('SHA_USERS', 'hex'), 3000000),
            (20240102000000, 'posts', '2024-01-02 10:00:00+00', true, decode('SHA_POSTS', 'hex'), 3000000);
        """.replace("SHA_USERS", SHA_USERS).replace("SHA_POSTS", SHA_POSTS),
        {"20240101000000_create_users.sql": USERS, "20240102000000_posts.up.sql": POSTS},
        {
            "UPDATE _sqlx_migrations SET success = false WHERE description = 'posts'":
                "20240102000000 posts is recorded as failed, or as not finished",
            r"UPDATE _sqlx_migrations SET checksum = '\x00' WHERE description = 'posts'":
                "20240102000000 posts is applied, and m/20240102000000_posts.up.sql has another SHA-384: it was "
                "changed since",
            "UPDATE _sqlx_migrations SET description = 'others' WHERE description = 'posts'":
                "20240102000000 others is applied, and m/20240102000000_posts.up.sql has another name",
            "UPDATE _sqlx_migrations SET version = 9 WHERE description = 'posts'":
                "9 posts is applied, and there is no such file",
            "UPDATE _sqlx_migrations SET checksum = '' WHERE description = 'posts'":
                "20240102000000 posts is applied, and its row has no SHA-384",
            "ALTER TABLE _sqlx_migrations ALTER success DROP NOT NULL; UPDATE _sqlx_migrations SET success = NULL":
                "20240102000000 posts does not say whether it is done",
            "DELETE FROM _sqlx_migrations WHERE description = 'create users'":
                "m/20240101000000_create_users.sql is not among the applied ones, and newer ones are",
        },
    ),
    "flyway": Taken(
        """
        CREATE TABLE flyway_schema_history (installed_rank int PRIMARY KEY, version varchar(50),
            description varchar(200) NOT NULL, type varchar(20) NOT NULL, script varchar(1000) NOT NULL,
            checksum int, installed_by varchar(100) NOT NULL, installed_on timestamp NOT NULL DEFAULT now(),
            execution_time int NOT NULL, success boolean NOT NULL);
        INSERT INTO flyway_schema_history VALUES
            (1, '001', 'create users', 'SQL', 'V001__create_users.sql', 1149260906, 'amp', now(), 44, true),
            (2, '1.5', 'gone', 'SQL', 'V1.5__gone.sql', 5, 'amp', now(), 24, true),
            (3, '1.5', 'gone', 'DELETE', 'V1.5__gone.sql', 5, 'amp', now(), 24, true),
            (4, '2.1', 'posts', 'SQL', 'V2.1__posts.sql', -1877934394, 'amp', now(), 24, true),
            (5, NULL, 'view', 'SQL', 'R__view.sql', -1466044959, 'amp', now(), 65, true);
        """,
        # With a byte order mark and CRLF, neither of which counts.
        {"1_create_users.sql": "\ufeffCREATE TABLE users (id int);\r\n-- café\r\n", "21_posts.sql": POSTS},
        {
            "UPDATE flyway_schema_history SET success = false WHERE version = '2.1'":
                "2.1 posts is recorded as failed, or as not finished",
            "UPDATE flyway_schema_history SET checksum = 7 WHERE version = '2.1'":
                "2.1 posts is applied, and m/21_posts.sql has another CRC32: it was changed since",
            "UPDATE flyway_schema_history SET checksum = NULL WHERE version = '2.1'":
                "2.1 posts is applied, and its row has no CRC32",
            "UPDATE flyway_schema_history SET description = 'others' WHERE version = '2.1'":
                "2.1 others is applied, and there is no such file",
            "UPDATE flyway_schema_history SET version = '21', description = 'others' WHERE version = '2.1'":
                "21 others is applied, and m/21_posts.sql has another name",
        },
    ),
    "alembic": Taken(
        """
        CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY);
        INSERT INTO alembic_version VALUES ('27c6a30d7c24');
        """,
        {"1_1975ea83b712_users.sql": USERS, "2_27c6a30d7c24_posts.sql": POSTS},
        {
            "UPDATE alembic_version SET version_num = 'beef'":
                "the current revision is beef, and of the files at hand none has it in its name",
            "INSERT INTO alembic_version VALUES ('beef')":
                "Alembic has not one current revision but 2: 27c6a30d7c24, beef",
            "DELETE FROM alembic_version": "Alembic has not one current revision but 0: none",
            "UPDATE alembic_version SET version_num = ''":
                "the current revision is an empty row, and of the files at hand none has it in its name",
        },
    ),
    "goose": Taken(
        """
        CREATE TABLE goose_db_version (id integer PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY,
            version_id bigint NOT NULL, is_applied boolean NOT NULL, tstamp timestamp NOT NULL DEFAULT now());
        INSERT INTO goose_db_version (version_id, is_applied) VALUES (0, true), (1, true), (2, true), (3, true),
            (3, false);
        """,
        {
            "00001_users.sql": f"-- +goose Up\n{USERS}-- +goose Down\nDROP TABLE users;\n",
            "00002_posts.sql": f"-- +goose Up\n{POSTS}",
            "00003_later.sql": "CREATE TABLE later ();\n",
        },
        {
            "UPDATE goose_db_version SET version_id = 4 WHERE version_id = 2":
                "4 is applied, and there is no such file",
            "ALTER TABLE goose_db_version ALTER is_applied DROP NOT NULL;UPDATE goose_db_version SET is_applied = NULL":
                "2 does not say whether it is done",
            "DELETE FROM goose_db_version WHERE version_id = 1":
                "m/00001_users.sql is not among the applied ones, and newer ones are",
        },
    ),
    "golang-migrate": Taken(
        """
        CREATE TABLE schema_migrations (version bigint PRIMARY KEY, dirty boolean NOT NULL);
        INSERT INTO schema_migrations VALUES (2, false);
        """,
        {"000001_users.up.sql": USERS, "000001_users.down.sql": "DROP TABLE users", "000002_posts.up.sql": POSTS},
        {
            "UPDATE schema_migrations SET dirty = true": "2 is recorded as failed, or as not finished",
            "ALTER TABLE schema_migrations ALTER dirty DROP NOT NULL; UPDATE schema_migrations SET dirty = NULL":
                "2 does not say whether it is done",
            "UPDATE schema_migrations SET version = 3": "3 is applied, and there is no such file",
            "INSERT INTO schema_migrations VALUES (1, false)": "2 rows are current (1, 2)",
        },
    ),
    "dbmate": Taken(
        """
        CREATE TABLE schema_migrations (version varchar PRIMARY KEY);
        INSERT INTO schema_migrations VALUES ('0002'), ('20240101000000');
        """,
        {
            "0002_posts.sql": f"-- migrate:up\n{POSTS}",
            "20240101000000_users.sql": f"-- migrate:up\n{USERS}-- migrate:down\nDROP TABLE users;\n",
        },
        {
            "UPDATE schema_migrations SET version = '3' WHERE version = '0002'":
                "3 is applied, and there is no such file",
            "DELETE FROM schema_migrations WHERE version = '0002'":
                "m/0002_posts.sql is not among the applied ones, and newer ones are",
            "INSERT INTO schema_migrations VALUES ('2')": "2 leads to m/0002_posts.sql, and so does another one",
        },
    ),
    "node-pg-migrate": Taken(
        """
        CREATE TABLE pgmigrations (id serial PRIMARY KEY, name varchar(255) NOT NULL, run_on timestamp NOT NULL);
        INSERT INTO pgmigrations (name, run_on) VALUES
            ('1700000000000_create-users', '2026-11-28 21:35:14.182354'),
            ('1700000000001_posts.up', '2026-11-28 21:35:14.182354');
        """,
        {"1700000000000_create-users.sql": USERS, "1700000000001_posts.up.sql": POSTS},
        {
            "UPDATE pgmigrations SET name = '1700000000001_others' WHERE id = 2":
                "1700000000001_others is applied, and there is no such file",
            "ALTER TABLE pgmigrations ALTER run_on TYPE text; UPDATE pgmigrations SET run_on = '2026-99-99 21:35:14'":
                "1700000000001_posts.up was applied at 2026-99-99 21:35:14, which is no time",
            "ALTER TABLE pgmigrations ALTER run_on TYPE text;UPDATE pgmigrations SET run_on = '2026-11-28 21:35:14-16'":
                "1700000000001_posts.up was applied at 2026-11-28 21:35:14-16, which is no time",
        },
    ),
    "yoyo": Taken(
        """
        CREATE TABLE _yoyo_migration (migration_hash varchar(64) PRIMARY KEY, migration_id varchar(255),
            applied_at_utc timestamp);
        CREATE TABLE _yoyo_log (id varchar(36) PRIMARY KEY, migration_hash varchar(64), migration_id varchar(255),
            operation varchar(10), username varchar(255), hostname varchar(255), comment varchar(255),
            created_at_utc timestamp);
        INSERT INTO _yoyo_migration VALUES ('6c91', '0001.create-users', '2026-11-28 21:35:15.539214'),
            ('6820', '20240101_01_AbCdE-posts', '2026-11-28 21:35:15.579916');
        INSERT INTO _yoyo_log VALUES ('998d', '6c91', '0001.create-users', 'apply', 'root', 'localhost', NULL, now());
        """,
        {"0001_create-users.sql": USERS, "2024010101_AbCdE-posts.sql": POSTS},
        {
            "UPDATE _yoyo_migration SET migration_id = '0002.others' WHERE migration_hash = '6820'":
                "0002.others is applied, and there is no such file",
        },
    ),
}  # fmt: skip


def test_every_tool_is_here() -> None:
    """There is a history of each tool that can be taken over."""
    assert TAKEN.keys() == TOOLS.keys()


def files_of(taken: Taken, folder: Path, **more: str) -> tuple[library.Migration, ...]:
    """Write the files into a folder m and return the migrations; more are given by name."""
    return library.read_migrations(write(folder / "m", taken.files | more))


@pytest.mark.parametrize("source", ["named", "auto"])
@pytest.mark.parametrize("tool", TAKEN)
async def test_what_a_tool_has_applied_is_recorded(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, source: str
) -> None:
    """Every row with its time is in ampd's history, nothing was run, and `migrate` goes on from there."""
    taken = TAKEN[tool]
    monkeypatch.chdir(tmp_path)
    await database.execute(taken.history)
    files = files_of(taken, Path())
    with pytest.raises(library.MigrationConflict, match=rf"`ampd baseline --from {tool}` checks that and records it"):
        await library.migrate(database.url, migrations=files)
    status = await library.baseline(database.url, source=tool if source == "named" else "auto", migrations=files)
    assert [info.state for info in status.plan.migrations[:2]] == ["applied", "applied"]
    rows = await database.fetch(f"SELECT * FROM {TABLE} ORDER BY version")
    assert [(row["version"], row["ampd_version"]) for row in rows] == [
        (file.version, f"{library.__version__} baseline from {tool}") for file in files[:2]
    ]
    if tool in ("node-pg-migrate", "yoyo"):
        assert [f"{row['finished_at']:%Y-%m-%d %H:%M}" for row in rows] == ["2026-11-28 21:35"] * 2
    again = await library.baseline(database.url, source=tool, migrations=files)
    assert again == status
    files = files_of(taken, Path(), **{"99999999999999_last.sql": "CREATE TABLE last ();\n"})
    applied = (await library.migrate(database.url, migrations=files)).applied
    assert applied[-1].version == 99999999999999
    assert await database.fetchval("SELECT to_regclass('users') IS NULL AND to_regclass('last') IS NOT NULL")


@pytest.mark.any_server
@pytest.mark.parametrize(
    ("tool", "change", "problem"),
    [(tool, change, problem) for tool, taken in TAKEN.items() for change, problem in taken.tampered.items()],
)
async def test_what_does_not_agree_is_refused(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, change: str, problem: str
) -> None:
    """A row that failed, or that no file belongs to, is named, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    await database.execute(f"{TAKEN[tool].history}; {change}")
    files = files_of(TAKEN[tool], Path())
    with pytest.raises(library.MigrationConflict) as error:
        await library.baseline(database.url, source=tool, migrations=files)
    first, *problems = error.value.message.splitlines()
    assert first.endswith("does not agree with the files; nothing was recorded:")
    assert f"  {problem}" in problems
    assert await database.fetchval(f"SELECT to_regclass('{TABLE}') IS NULL")


async def test_files_below_are_pending_where_order_is_free(database: Database, tmp_path: Path) -> None:
    """With allow_out_of_order a file that the tool has not applied is left pending."""
    taken = TAKEN["dbmate"]
    await database.execute(f"{taken.history}; DELETE FROM schema_migrations WHERE version = '0002'")
    files_of(taken, tmp_path)
    migrations = library.Migrations(dir=tmp_path / "m", allow_out_of_order=True)
    metadata_db = library.MetadataDb(url=library.DatabaseUrl(database.url), migrations=migrations)
    status = await library.baseline(metadata_db, source="dbmate")
    assert [info.state for info in status.plan.migrations] == ["pending", "applied"]


async def test_what_ampd_has_applied_since(database: Database, tmp_path: Path) -> None:
    """A file that the tool knows nothing of is none that is missing once it is in ampd's history."""
    taken = TAKEN["dbmate"]
    await database.execute(taken.history)
    await library.baseline(database.url, source="dbmate", migrations=files_of(taken, tmp_path))
    files = files_of(taken, tmp_path, **{"3_late.sql": "SELECT 1;\n"})
    await library.baseline(database.url, 3, migrations=files)
    assert (await library.baseline(database.url, source="dbmate", migrations=files)).up_to_date


async def test_what_flyway_found_at_its_beginning(database: Database, tmp_path: Path) -> None:
    """Files at or below Flyway's own baseline count as applied; what it repeats is left out, and said."""
    taken = TAKEN["flyway"]
    await database.execute(
        f"{taken.history}; UPDATE flyway_schema_history SET type = 'BASELINE', checksum = NULL WHERE version = '001'"
    )
    heard = Heard()
    files = files_of(taken, tmp_path)
    assert (await library.baseline(database.url, source="flyway", migrations=files, on_event=heard)).up_to_date
    assert [event.message for event in heard.of(library.Warned)] == [
        "view is repeatable, which ampd's migrations are not: it is left out"
    ]


def named(*labels: str) -> list[library.Migration]:
    """Return migrations without any text, of the same checksum for Flyway."""
    return [library.Migration(int(v), name, f"m/{v}_{name}.sql", "", b"") for v, name in map(str.split, labels)]


def flyways(*labels: str) -> list[Row]:
    """Return the rows that Flyway has of such migrations."""
    return [Row(version, name, "0", kind="SQL") for version, name in map(str.split, labels)]


async def test_a_history_that_proves_nothing(database: Database, tmp_path: Path) -> None:
    """A tool that has applied nothing yet has left its table all the same, which keeps `migrate` from beginning."""
    await database.execute(f"{TAKEN['goose'].history}; DELETE FROM goose_db_version WHERE version_id > 0")
    files, heard = files_of(TAKEN["goose"], tmp_path), Heard()
    assert (await library.baseline(database.url, source="goose", migrations=files, on_event=heard)).plan.pending
    assert [event.message for event in heard.of(library.Warned)] == [
        'none of these migrations is in the history of goose, "public"."goose_db_version" (owner postgres): if '
        "nothing that they create is there, rename that table, and run `ampd migrate`; else `ampd baseline VERSION` "
        "records them"
    ]
    await database.execute("ALTER TABLE goose_db_version RENAME TO old")
    assert (await library.migrate(database.url, migrations=named("1 first"))).applied


async def test_flyways_beginning_at_a_version_that_no_file_has() -> None:
    """It stands for no file, and vouches for none; where nothing was applied since, nobody can say where it lies."""
    files = named("10 there", "20 first", "30 pending")
    begin = Row("1.20.0", "<< Flyway Baseline >>", kind="BASELINE")
    rows = [begin, *flyways("1.20.1 first")]
    found = proved("flyway", rows, files[1:], None)
    assert ([each.migration.version for each in found.records], found.problems) == ([20], ())
    assert proved("flyway", rows, files, None).problems == (
        "m/10_there.sql is not among the applied ones, and newer ones are",
    )
    assert proved("flyway", rows, files, None, recorded={10}).problems == ()
    assert proved("flyway", [begin], files, None).problems == (
        "1.20.0 << Flyway Baseline >> is where that history begins, and no file can have such a version",
    )


async def test_a_changed_file_is_one_problem() -> None:
    """A file that a row leads to is none that is missing, nor is the one before it the newest, if it has changed."""
    files = named("1 first", "2 second", "3 third")
    rows = [Row("1", "first", "7", kind="SQL"), *flyways("2 second"), Row("3", "others", "0", kind="SQL")]
    assert proved("flyway", rows, files, 3).problems == (
        "1 first is applied, and m/1_first.sql has another CRC32: it was changed since",
        "3 others is applied, and m/3_third.sql has another name",
    )


async def test_flyways_versions_of_several_numbers() -> None:
    """Of several files with the name it is the one with the checksum, else the one with the digits of the version."""
    files = named("2019120201 Schema", "2022070501 Schema", "2022070502 views")
    found = proved("flyway", flyways("20191202.01 Schema", "20220705.01 Schema", "2022.07.05.02 views"), files, None)
    assert (len(found.records), found.problems) == (3, ())
    assert proved("flyway", flyways("2019.01 Schema"), files, None).problems == (
        "2019.01 Schema is applied, and may be any of m/2019120201_Schema.sql, m/2022070501_Schema.sql",
    )
    changed = [*named("1 Schema"), library.Migration(2, "Schema", "m/2_Schema.sql", "SELECT 2;", b"")]
    found = proved("flyway", flyways("1.5 Schema"), changed, None)
    assert [each.migration.version for each in found.records] == [1]


async def test_flyways_files_numbered_anew() -> None:
    """Between V13 and V14 there was V13.1, so that all had to be: name and checksum tell which file it is."""
    files = named("10 first", "130 index", "131 fill", "140 parent")
    found = proved("flyway", flyways("1 first", "13 index", "13.1 fill", "14 parent"), files, None)
    assert ([each.migration.version for each in found.records], found.problems) == ([10, 130, 131, 140], ())
    assert proved("flyway", flyways("1 first", "10 index"), files, None).problems == ()
    assert proved("flyway", flyways("1 first", "10 others"), files, None).problems == (
        "10 others is applied, and m/10_first.sql has another name",
    )
    by_java = Row("1", "first", kind="JDBC")
    assert proved("flyway", [by_java], files, None).problems == ("1 first is applied, and there is no such file",)


async def test_a_word_on_alembics_revision(database: Database, tmp_path: Path) -> None:
    """Where no file has the revision in its name a person says which one it is; a wrong word is refused."""
    taken = TAKEN["alembic"]
    await database.execute(taken.history)
    files = files_of(taken, tmp_path)
    with pytest.raises(library.MigrationConflict, match=r"27c6a30d7c24: that is .*/2_27c6a30d7c24_posts.sql"):
        await library.baseline(database.url, 1, source="alembic", migrations=files)
    others = library.read_migrations(write(tmp_path / "o", {"1_users.sql": USERS, "2_posts.sql": POSTS}))
    with pytest.raises(library.MigrationConflict, match="`ampd baseline VERSION --from alembic` takes your word"):
        await library.baseline(database.url, source="alembic", migrations=others)
    status = await library.baseline(database.url, 1, source="alembic", migrations=others)
    assert [info.state for info in status.plan.migrations] == ["applied", "pending"]


async def test_a_version_that_is_not_the_newest(database: Database, tmp_path: Path) -> None:
    """Given both, the word and the history have to agree."""
    await database.execute(TAKEN["golang-migrate"].history)
    files = files_of(TAKEN["golang-migrate"], tmp_path)
    with pytest.raises(library.MigrationConflict, match="the newest that is applied is 2, not 1"):
        await library.baseline(database.url, 1, source="auto", migrations=files)


async def test_a_history_that_does_not_know_when(database: Database, tmp_path: Path) -> None:
    """As some releases make it; the time is then that of the takeover."""
    await database.execute(f"{TAKEN['goose'].history}; ALTER TABLE goose_db_version DROP tstamp")
    files = files_of(TAKEN["goose"], tmp_path)
    await library.baseline(database.url, source="goose", migrations=files)
    assert await database.fetchval(f"SELECT bool_and(finished_at > now() - interval '1 hour') FROM {TABLE}")


async def test_a_pool_is_used_and_given_back(database: Database, tmp_path: Path) -> None:
    """As by every other call."""
    await database.execute(TAKEN["goose"].history)
    files = files_of(TAKEN["goose"], tmp_path)
    async with asyncpg.create_pool(database.url, min_size=1, max_size=1) as pool:
        assert (await library.baseline(pool, source="auto", migrations=files)).current_version == 2
        assert await pool.fetchval("SHOW search_path") == '"$user", public'


async def test_what_has_changed_since_it_was_shown(database: Database, tmp_path: Path) -> None:
    """What a person has agreed to is what is written, or nothing."""
    await database.execute(f"{TAKEN['goose'].history}; DELETE FROM goose_db_version WHERE version_id = 2")
    source: Hidden[Any] = Hidden(database.url)
    takeover = Takeover(await Run.of(source, files_of(TAKEN["goose"], tmp_path)), "goose")
    shown = await takeover.examine()
    await database.execute("INSERT INTO goose_db_version (version_id, is_applied) VALUES (2, true)")
    with pytest.raises(
        library.MigrationConflict, match="has changed since these rows were shown; nothing was recorded"
    ):
        await takeover.record(shown)
    assert await database.fetchval(f"SELECT to_regclass('{TABLE}') IS NULL")
    assert (await takeover.record(await takeover.examine())).current_version == 2


async def test_no_files_at_all(database: Database) -> None:
    """Without files every row is one too many."""
    await database.execute(TAKEN["sqlx"].history)
    with pytest.raises(library.MigrationConflict, match="20240102000000 posts is applied, and there is no such file"):
        await library.baseline(database.url, source="sqlx", migrations=())


async def test_which_tool_it_is(database: Database, tmp_path: Path) -> None:
    """None, another one or several are said; a name that is none lists them all."""
    files = files_of(TAKEN["goose"], tmp_path)
    with pytest.raises(library.ConfigError) as error:
        await library.baseline(database.url, source="auto", migrations=files)
    assert str(error.value) == (
        '"public" contains no history of a tool that ampd can read\n'
        "hint: if it is in another schema, set metadata_db.schema; if you know what the database contains, "
        "`ampd baseline VERSION` records every file up to VERSION as applied"
    )
    await database.execute(TAKEN["goose"].history)
    with pytest.raises(library.ConfigError) as error:
        await library.baseline(database.url, source="sqlx", migrations=files)
    assert str(error.value) == (
        '"public" contains no history of sqlx that has entries, but goose: "public"."goose_db_version" '
        "(owner postgres)\n"
        "hint: to take over what is there: `ampd baseline --from goose`; if the history of sqlx is in another schema, "
        "set metadata_db.schema; if you know what the database contains, `ampd baseline VERSION` records every file "
        "up to VERSION as applied"
    )
    await database.execute(TAKEN["alembic"].history)
    with pytest.raises(library.ConfigError) as error:
        await library.baseline(database.url, source="auto", migrations=files)
    assert error.value.message == (
        '"public" contains the histories of several tools: alembic: "public"."alembic_version" (owner postgres), '
        'goose: "public"."goose_db_version" (owner postgres)'
    )
    with pytest.raises(library.ConfigError) as error:
        await library.baseline(database.url, source="rails", migrations=files)
    assert error.value.message == f'"rails" is none of the tools: {", ".join(TOOLS)}, or auto'


async def test_a_strangers_history_is_not_believed(database: Database, tmp_path: Path) -> None:
    """Nobody decides what is applied by planting another tool's table."""
    stranger = await database.role("stranger", "USAGE, CREATE ON SCHEMA public")
    async with database.connect(stranger.url) as connection:
        await connection.execute(TAKEN["dbmate"].history)
    with pytest.raises(library.PermissionDenied, match=f"owner {stranger.name}.* is not trusted"):
        await library.baseline(database.url, source="dbmate", migrations=files_of(TAKEN["dbmate"], tmp_path))


async def test_a_table_that_is_put_in_its_place(database: Database) -> None:
    """Whose the table is counts when it is locked, whatever was seen before."""
    stranger = await database.role("stranger", "USAGE, CREATE ON SCHEMA public")
    async with database.connect(stranger.url) as connection:
        await connection.execute(TAKEN["dbmate"].history)
    seen_before = Neighbour("public", "schema_migrations", "postgres", True)
    source: Hidden[Any] = Hidden(database.url)
    run = await Run.of(source, ())
    async with run.sessions() as (session, *_):
        with pytest.raises(library.PermissionDenied, match="is not trusted"):
            await read_rows(session, seen_before, TOOLS["dbmate"], None)


async def test_a_history_that_cannot_be_read_whole(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are hidden from us, or that are too many, are no proof."""
    await database.execute(
        f"{TAKEN['dbmate'].history}; ALTER TABLE schema_migrations ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY one ON schema_migrations USING (version = '0002')"
    )
    files = files_of(TAKEN["dbmate"], tmp_path)
    role = await database.role("some", "SELECT ON schema_migrations", "USAGE, CREATE ON SCHEMA public")
    with pytest.raises(library.AmpdError, match="would be affected by row-level security"):
        await library.baseline(role.url, source="dbmate", migrations=files)
    monkeypatch.setattr(tools, "_MOST_ROWS", 1)
    with pytest.raises(library.ConfigError, match=r"the history .*schema_migrations.* has more than 1 rows"):
        await library.baseline(database.url, source="dbmate", migrations=files)
    assert await database.fetchval(f"SELECT to_regclass('{TABLE}') IS NULL")


async def test_a_history_with_columns_of_other_types(database: Database, tmp_path: Path) -> None:
    """It is not the tool's, and the error names it."""
    await database.execute(f"{TAKEN['sqlx'].history}; ALTER TABLE _sqlx_migrations ALTER success TYPE text")
    with pytest.raises(library.ConfigError) as error:
        await library.baseline(database.url, source="sqlx", migrations=files_of(TAKEN["sqlx"], tmp_path))
    assert plain(str(error.value)) == (
        'the history "public"."_sqlx_migrations" (owner postgres) is not as its tool makes it: argument of NOT must be '
        "type boolean, not type text\n"
        "hint: if you know what the database contains, `ampd baseline VERSION` records every file up to VERSION as "
        "applied"
    )


async def test_the_command(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """The rows are shown with their times before --yes writes them."""
    files_of(TAKEN["node-pg-migrate"], tmp_path)
    ampd_rows = (
        "DATABASE: to be recorded as applied, without running them:\n"
        "  1700000000000 create-users  2026-11-28 21:35\n"
        "  1700000000001 posts         2026-11-28 21:35\n"
    )
    await database.execute(TAKEN["node-pg-migrate"].history)
    process = ampd("baseline", "--from", "auto", "--yes", "--migrations", "m", url=database.url)
    done = "DATABASE: recorded 2 migrations as applied; up to date, at version 1700000000001\n"
    assert seen(process) == (0, done, plain(ampd_rows))


def test_times_are_left_out_where_they_do_not_fit() -> None:
    """A narrow terminal shows versions and names."""
    migration = library.Migration(20240101000000, "users", "20240101000000_users.sql", "", b"")
    baseline = Baseline((Record(migration, "2024-01-01 10:00:00+00"),))
    assert baseline.text(80) == "  20240101000000 users  2024-01-01 10:00"
    assert baseline.text(30) == "  20240101000000 users"
