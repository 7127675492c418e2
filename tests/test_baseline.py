"""Recording migrations as applied without running them: on a person's word."""

import asyncio
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
from msgspec.structs import replace

import ampd as library
from ampd.advisory_lock import lock_key
from ampd.config import HISTORY_TABLE as TABLE
from tests.cli_output import plain, seen
from tests.folders import write
from tests.scenes import Heard, scripts, transaction, waiting_for_a_lock
from tests.servers import Ampd, Database

pytestmark = pytest.mark.anyio

FILES = scripts("CREATE TABLE a ()", "CREATE TABLE b ()", "CREATE TABLE c ()")


async def rows(database: Database) -> list[tuple[int, str, str]]:
    """Return version, name and `ampd_version` of each finished row of the history."""
    found = await database.fetch(f"SELECT * FROM {TABLE} WHERE finished_at IS NOT NULL ORDER BY version")
    return [(row["version"], row["name"], row["ampd_version"]) for row in found]


BY_WORD = f"{library.__version__} baseline"


async def test_files_up_to_a_version_are_recorded_and_nothing_is_run(database: Database) -> None:
    """Nothing of the files has run afterwards, and a run goes on behind them; a second call records nothing."""
    status = await library.baseline(database.url, 2, migrations=FILES)
    assert [info.state for info in status.plan.migrations] == ["applied", "applied", "pending"]
    assert await rows(database) == [(1, "step", BY_WORD), (2, "step", BY_WORD)]
    before = await database.fetch(f"SELECT xmin, * FROM {TABLE}")
    assert await library.baseline(database.url, 2, migrations=FILES) == status
    assert await database.fetch(f"SELECT xmin, * FROM {TABLE}") == before
    report = await library.migrate(database.url, migrations=FILES)
    assert [each.version for each in report.applied] == [3]
    assert await database.fetchval("SELECT to_regclass('a') IS NULL AND to_regclass('c') IS NOT NULL")


async def test_an_empty_database_is_doubted(database: Database) -> None:
    """Where there is no table at all it may be the wrong database."""
    heard = Heard()
    await library.baseline(database.url, 2, migrations=FILES, on_event=heard)
    await library.baseline(database.url, 3, migrations=FILES, on_event=heard)
    assert [event.message for event in heard.of(library.Warned)] == [
        '"public" contains no tables: is it the right database?'
    ]


async def test_what_is_missing_below_is_added_to_a_history_that_agrees(database: Database) -> None:
    """Rows that agree with the files stay as they are."""
    await library.migrate(database.url, migrations=FILES[1:2])
    status = await library.baseline(database.url, 3, migrations=FILES)
    assert status.up_to_date
    assert await rows(database) == [(1, "step", BY_WORD), (2, "step", library.__version__), (3, "step", BY_WORD)]


async def test_a_history_that_does_not_agree_is_left_alone(database: Database) -> None:
    """A file that has changed, or is gone, is a conflict as for `migrate`."""
    await library.migrate(database.url, migrations=FILES[:2])
    with pytest.raises(library.MigrationConflict, match="1 step was applied and its file has changed since"):
        await library.baseline(database.url, 3, migrations=(*scripts("CREATE TABLE x ()"), *FILES[1:]))
    with pytest.raises(library.MigrationConflict, match="1 step was applied and there is no such file"):
        await library.baseline(database.url, 3, migrations=FILES[1:])
    others = [replace(each, name="other") for each in scripts("SELECT 1", "SELECT 2")]
    with pytest.raises(library.MigrationConflict, match="the history of another project"):
        await library.baseline(database.url, 2, migrations=others)
    assert [version for version, _, _ in await rows(database)] == [1, 2]


async def test_arguments_that_say_nothing(database: Database) -> None:
    """A version has to be given, and to be that of a file."""
    with pytest.raises(library.ConfigError) as error:
        await library.baseline(database.url, 4, migrations=FILES)
    assert str(error.value) == "there is no migration with version 4\nhint: the newest are 1 step, 2 step, 3 step"
    with pytest.raises(library.ConfigError, match="say what the database contains already"):
        await library.baseline(database.url, migrations=FILES)
    with pytest.raises(TypeError, match="not str"):
        await library.baseline(database.url, "2", migrations=FILES)  # type: ignore[arg-type]


async def test_tables_and_another_tools_history_are_no_obstacle(database: Database) -> None:
    """What keeps a first run away is what a baseline is for; but a history of ours elsewhere is one."""
    await database.execute("CREATE TABLE alembic_version AS SELECT 'x' AS version_num; CREATE TABLE customers ()")
    newest = library.read_migrations()[-1].version
    assert (await library.baseline(database.url, newest)).up_to_date
    with pytest.raises(library.ConfigError, match='there is no history of migrations in "app", but one in "public"'):
        await library.baseline(await elsewhere(database), 1, migrations=FILES)


async def elsewhere(database: Database) -> str:
    """Return a URL whose search path leads to another schema."""
    await database.execute("CREATE SCHEMA app")
    return f"{database.url}?options=-csearch_path%3Dapp"


async def test_a_history_that_a_stranger_owns(database: Database) -> None:
    """The rows go nowhere but to a table that is trusted, as any other write."""
    stranger = await database.role("stranger", "USAGE, CREATE ON SCHEMA public")
    await library.migrate(stranger.url, migrations=scripts("SELECT 1"))
    await database.execute(f"ALTER SCHEMA public OWNER TO {stranger.name}")
    with pytest.raises(library.PermissionDenied, match="and so is not trusted"):
        await library.baseline(database.url, 3, migrations=FILES)


@pytest.mark.any_server
async def test_it_waits_for_whoever_has_the_lock(database: Database) -> None:
    """While another runner has the lock nothing is written; what it has recorded is not recorded again."""
    await library.migrate(database.url, migrations=FILES[:1])
    heard = Heard()
    async with transaction(database, f"SELECT pg_advisory_xact_lock({lock_key('public', TABLE)})") as holder:
        work = asyncio.ensure_future(library.baseline(database.url, 3, migrations=FILES, on_event=heard))
        await heard.first(library.Waiting)
        assert len(await rows(database)) == 1
        await holder.execute("COMMIT")
    assert (await work).up_to_date
    assert len(await rows(database)) == 3


@pytest.mark.any_server
@pytest.mark.parametrize("statement", ["CREATE INDEX CONCURRENTLY i ON a (x)", "DO 'BEGIN LOCK TABLE a; END'"])
async def test_it_waits_for_a_file_that_another_runner_is_at(database: Database, statement: str) -> None:
    """A no-transaction file that is being applied is no conflict, resumable or not; who applies it records it."""
    files = scripts("CREATE TABLE a (x int)", f"-- no-transaction\n-- lock-timeout: 0\n{statement}", "SELECT 1")
    await library.migrate(database.url, migrations=files[:1])
    async with transaction(database, "SELECT FROM a") as reader, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: library.migrate(database.url, migrations=files[:2]))
        await waiting_for_a_lock(database)
        heard = Heard()
        work = asyncio.ensure_future(library.baseline(database.url, 3, migrations=files, on_event=heard))
        await heard.first(library.Waiting)
        await reader.execute("COMMIT")
    assert (await work).up_to_date
    assert [by for _, _, by in await rows(database)] == [library.__version__] * 2 + [BY_WORD]


async def test_the_schema_and_the_table_are_made(database: Database) -> None:
    """As by a first run."""
    assert (await library.baseline(database.url, 3, migrations=FILES, schema="app")).up_to_date
    assert await database.fetchval(f"SELECT count(*) FROM app.{TABLE}") == 3


async def test_a_role_without_the_right_to_create(database: Database) -> None:
    """What the role may not do is said with the GRANT."""
    await database.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    role = await database.role("poor")
    with pytest.raises(library.PermissionDenied, match="permission denied for schema public"):
        await library.baseline(role.url, 3, migrations=FILES)


# --- the command

FOLDER = {f"{number}_{name}.sql": "SELECT 1;\n" for number, name in enumerate(("users", "posts"), start=1)}
ROWS = "DATABASE: to be recorded as applied, without running them:\n  1 users\n  2 posts\n"


@pytest.mark.any_server
async def test_the_rows_are_shown_and_yes_is_needed(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """Nothing is written before; with --yes it is, and once more there is nothing to do."""
    await database.execute("CREATE TABLE users ()")
    write(tmp_path / "m", FOLDER)
    command = ("baseline", "2", "--migrations", "m")
    refusal = (
        "error: nothing was recorded: this is no terminal, so nobody can be asked\n"
        "hint: look at these rows, and run it again with --yes\n"
    )
    assert seen(ampd(*command, url=database.url)) == (1, "", f"{ROWS}{refusal}")
    done = "DATABASE: recorded 2 migrations as applied; up to date, at version 2\n"
    assert seen(ampd(*command, "--yes", url=database.url)) == (0, done, ROWS)
    assert seen(ampd(*command, url=database.url)) == (0, "DATABASE: nothing to record; up to date, at version 2\n", "")
    assert '"state": "applied"' in ampd(*command, "--json", url=database.url).stdout
    status = seen(ampd("status", "--migrations", "m", url=database.url))
    assert status == (
        0,
        "DATABASE: up to date, at version 2\n\n"
        "state    version  name   when  took  by\n"
        "applied        1  users  TIME  baseline  postgres\n"
        "applied        2  posts  TIME  baseline  postgres\n",
        "",
    )


def told(terminal: int) -> str:
    """Return what was written to a terminal that nobody has open any more."""
    text = b""
    with suppress(OSError):
        while piece := os.read(terminal, 4096):
            text += piece
    return text.decode()


@pytest.mark.any_server
@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("", 1), ("n", 1)])
def test_it_asks_on_a_terminal(database: Database, tmp_path: Path, answer: str, code: int) -> None:
    """Only a yes writes; an empty answer is a no."""
    folder = write(tmp_path / "m", FOLDER)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ampd", "baseline", "2", "--migrations", folder],
        env={"AMP_CONFIG_METADATA_DB__URL": database.url, "PATH": os.environ["PATH"]},
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    os.write(ours, f"{answer}\n".encode())
    output, _ = process.communicate(timeout=60)
    shown = told(ours).replace("\r\n", "\n").replace("\x1b[2K", "")
    os.close(ours)
    assert "  1 users\n  2 posts\nRecord them? [y/N] " in shown
    assert (process.returncode, "nothing was recorded" in shown) == (code, code == 1)
    assert plain(output) == ("" if code else "DATABASE: recorded 2 migrations as applied; up to date, at version 2\n")
