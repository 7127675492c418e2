"""The command line as a person and a script see it: both streams and the exit code, whole."""

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from ampd import read_migrations
from tests.cli_output import document, error, failed, late, plain, restore, seen
from tests.folders import TWO, write
from tests.servers import Ampd, Database

pytestmark = [pytest.mark.anyio, pytest.mark.any_server]

FIRST, SECOND = (sha256(script.encode()).hexdigest() for script in TWO.values())


@pytest.mark.usefixtures("folder")
async def test_a_database_from_empty_to_up_to_date(ampd: Ampd, database: Database) -> None:
    """Each command, before and after the first run, prints the whole of what it should and nothing else."""
    here = ("--migrations", "m")

    def run(*arguments: str) -> tuple[int, str, str]:
        return seen(ampd(*arguments, *here, url=database.url))

    pending = (
        "DATABASE: no migration applied, 2 pending\n\nstate    version  name    when  took  by\n"
        "pending        1  first\npending        2  second\n\n"
        "next: `ampd migrate --migrations m` applies 2 migrations\n"
    )
    assert run("status") == (0, pending, "")
    assert run("migrate", "--check") == (1, "DATABASE: no migration applied, 2 pending\n", "")
    code, script, stderr = run("migrate", "--dry-run")  # all of which is compared where psql runs it
    assert (code, script.partition("\n")[0], stderr) == (0, "-- DATABASE: no migration applied, 2 pending", "")
    assert all(text in script for text in TWO.values())
    assert await database.fetchval("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == 0

    done = "DATABASE: applied 1 migration in N s, now at version 1, 1 left pending\n"
    assert run("migrate", "--target", "1") == (0, done, "[1/1] 1 first  N ms\n")
    half = (
        "DATABASE: at version 1, 1 pending\n\nstate    version  name    when  took  by\n"
        "applied        1  first   TIME  N ms  postgres\npending        2  second\n\n"
        "next: `ampd migrate --migrations m` applies 1 migration\n"
    )
    assert run("status") == (0, half, "")
    nothing = (0, "DATABASE: nothing to apply, at version 1, 1 left pending\n", "")
    assert run("migrate", "--target", "1") == nothing
    assert run("migrate", "--target", "1", "--check") == nothing
    assert run("migrate") == (0, "DATABASE: applied 1 migration in N s, now at version 2\n", "[1/1] 2 second  N ms\n")
    assert run("migrate") == (0, "DATABASE: up to date, at version 2\n", "")
    assert run("migrate", "--check") == (0, "DATABASE: up to date, at version 2\n", "")
    assert run("migrate", "--dry-run") == (0, "-- DATABASE: up to date, at version 2\n", "")
    both = (
        "DATABASE: up to date, at version 2\n\nstate    version  name    when  took  by\n"
        "applied        1  first   TIME  N ms  postgres\napplied        2  second  TIME  N ms  postgres\n"
    )
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
            "runner": None,
        }

    def status(current: int | None) -> dict[str, object]:
        states = ["applied" if version <= (current or 0) else "pending" for version in (1, 2)]
        return {
            "database": f"127.0.0.1:{database.server.port}/{database.name}",
            "schema": "public",
            "current_version": current,
            "up_to_date": current == 2,
            "result": "up_to_date" if current == 2 else "pending",
            "migrations": [step(1, "first", states[0], FIRST, 1), step(2, "second", states[1], SECOND, 2)],
        }

    def report(result: str, current: int | None, applied: list[Any], pending: list[Any]) -> dict[str, object]:
        facts = {"result": result, "current_version": current, "applied": applied, "pending": pending}
        return {**facts, "error": None}

    first, second = {"version": 1, "name": "first"}, {"version": 2, "name": "second"}
    took = {"duration_ms": "…"}
    one_left, other_left = (
        each | {"file": f"m/{each['version']}_{each['name']}.sql", "transactional": True} for each in (first, second)
    )
    assert run("status") == (0, status(None), "")
    assert run("migrate", "--check") == (1, report("pending", None, [], [one_left, other_left]), "")
    assert run("migrate", "--dry-run") == (0, report("pending", None, [], [one_left, other_left]), "")
    assert run("migrate", "--dry-run", "--target=1") == (
        0,
        report("pending", None, [], [one_left, other_left]),
        "",
    )
    one = report("migrated", 1, [first | took], [other_left])
    assert run("migrate", "--target=1") == (0, one, "[1/1] 1 first  N ms\n")
    assert run("migrate", "--target=1") == (0, report("up_to_date", 1, [], [other_left]), "")
    assert run("migrate", "--check", "--target=1") == (0, report("up_to_date", 1, [], [other_left]), "")
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
    assert run("status") == (
        0,
        f"{ahead}\nstate    version  name    when  took  by\napplied        1  first   TIME  N ms  postgres\n"
        "ahead          2  second  TIME  N ms  postgres\n\nnext: nothing; a newer build has migrated this database\n",
        "",
    )
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


RESTORE = restore("m/1_first.sql")
GONE = "'m/*1_first*'"
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
    gone, options = "'m/*2_second*'", " --migrations m"
    expected = f"""\
error: 4 migrations are in conflict with the history of the database; nothing is applied
1 first was applied and its file has changed since
  file:    m/1_first.sql, SHA-256 {EDITED}
  applied: TIME by postgres, SHA-256 {FIRST}
  to do:   {RESTORE}
2 second was applied and there is no such file: the files at hand go from 1 first to 3 third
  file:    none
  applied: TIME by postgres, SHA-256 {SECOND}
  to do:   {restore(gone)}
3 third is not applied and 5 already is: the history goes from 2 second to 5 index
  file:    m/3_third.sql, SHA-256 {third}
  applied: never
  to do:   {late(5, "m/3_third.sql", "m/7_third.sql", options)}
5 index was started and did not finish: 0 statements are recorded as done
  file:    m/5_index.sql, SHA-256 {now}
  started: TIME by postgres, SHA-256 {index}
  to do:   restore the file as it was when it was started, and `ampd migrate{options}` may resume it; else \
look at the database, finish or undo the migration by hand, then run `ampd resolve 5 --applied{options}` \
or `ampd resolve 5 --rolled-back{options}`
hint: resolve each as it says; `ampd status{options}` shows them all
"""
    for arguments in (["migrate"], ["migrate", "--check"], ["migrate", "--dry-run"]):
        assert seen(ampd(*arguments, "--migrations", "m", url=database.url)) == (1, "", expected), arguments
    listed = re.sub("  (file|applied|started): .*\n", "", expected).replace("to do:   ", "to do: ").splitlines()[1:-1]
    told = "".join(f"{'' if line.startswith(' ') else chr(10)}{line}\n" for line in listed)
    states = f"""\
DATABASE: at version 2, 1 pending, 4 conflicts

state         version  name    when  took  by
changed             1  first   TIME  N ms  postgres
missing             2  second  TIME  N ms  postgres
out of order        3  third
interrupted         5  index   TIME        postgres
pending             6  last
{told}"""
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
            "applied_name": "first",
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
            "applied_name": "second",
            "applied_checksum": SECOND,
            "applied_at": "…",
            "applied_by": "postgres",
            "message": "2 second was applied and there is no such file: the files at hand go from 1 first to 3 third",
            "hint": restore("'m/*2_second*'"),
        },
    ]
    message = "2 migrations are in conflict with the history of the database; nothing is applied"
    hint = "resolve each as it says; `ampd status` shows them all"
    problem = error("conflict", message, hint, version=1, file="m/1_first.sql", conflicts=conflicts)
    expected = failed(
        problem,
        current_version=2,
        pending=[{"version": 3, "name": "third", "file": "m/3_third.sql", "transactional": True}],
    )
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
            f"error: 1 first was applied and there is no such file: the first file at hand is 2 second\n"
            f"  file:    none\n"
            f"  applied: TIME by postgres, SHA-256 {FIRST}\n"
            f"hint: {restore(GONE)}\n",
            id="missing",
        ),
        pytest.param(
            {"0_late.sql": "SELECT 3;"},
            f"error: 0 late is not applied and 2 already is: the history begins with 1 first\n"
            f"  file:    m/0_late.sql, SHA-256 {sha256(b'SELECT 3;').hexdigest()}\n"
            f"  applied: never\n"
            f"hint: {late(2, 'm/0_late.sql', 'm/3_late.sql', ' --migrations m')}\n",
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
error: 1 odd was started and did not finish: 1 statement is recorded as done
  file:    m/1_odd.sql, SHA-256 {new}
  started: TIME by postgres, SHA-256 {old}
hint: restore the file as it was when it was started, and `ampd migrate --migrations m` may resume it; else \
look at the database, finish or undo the migration by hand, then run `ampd resolve 1 --applied --migrations m` \
or `ampd resolve 1 --rolled-back --migrations m`
"""
    process = ampd("migrate", "--json", "--migrations", "m", url=database.url)
    assert (process.returncode, plain(process.stderr), document(process)["error"]["code"]) == (1, text, "interrupted")
    resolved = "DATABASE: version 1 is recorded as rolled back; no migration applied, 1 pending\n"
    run = ("resolve", "1", "--rolled-back", "--migrations", "m")
    assert seen(ampd(*run, url=database.url)) == (0, resolved, "")
    assert ampd("migrate", "--migrations", "m", url=database.url).returncode == 0
    refusal = "error: version 1 is applied, not interrupted: there is nothing to resolve\n"
    hint = "hint: `ampd status --migrations m` shows what is interrupted\n"
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


REACH = "hint: check host and port, and that the server runs and listens there\n"


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
    pending = [
        {"version": version, "name": name, "file": f"m/{version}_{name}.sql", "transactional": True}
        for version, name in ((3, "bad"), (4, "never"))
    ]
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


# --- how much is said


SAYING = "DO 'BEGIN RAISE NOTICE ''half way''; RAISE WARNING ''odd''; END';\nCREATE TABLE b ();\n"


@pytest.mark.parametrize(
    ("arguments", "env", "stderr"),
    [
        ([], {}, "warning: odd\n[1/1] 3 saying  N ms\n"),
        (["-q"], {}, ""),
        (["--quiet", "--verbose"], {"AMP_LOG": "debug"}, ""),
        *(
            (
                arguments,
                env,
                "DATABASE: 1 of 1 to apply, from 3 saying\n"
                "[1/1] 3 saying: statement 1/2, line 1: DO 'BEGIN RAISE NOTICE ''half way''; RAISE WARNING ''odd''; "
                "END'\n"
                "notice: half way\nwarning: odd\n"
                "[1/1] 3 saying: statement 2/2, line 2: CREATE TABLE b ()\n[1/1] 3 saying  N ms\n",
            )
            for arguments, env in ((["-v"], {}), (["--verbose"], {"AMP_LOG": "info"}), ([], {"AMP_LOG": "DEBUG"}))
        ),
    ],
)
def test_how_much_is_said(
    ampd: Ampd, database: Database, tmp_path: Path, arguments: list[str], env: dict[str, str], stderr: str
) -> None:
    """-q is silent but for errors, and -v, or AMP_LOG=debug, shows plan, statements and notices as well."""
    write(tmp_path / "m", {"3_saying.sql": SAYING})
    done = (
        ""
        if "-q" in arguments or "--quiet" in arguments
        else "DATABASE: applied 1 migration in N s, now at version 3\n"
    )
    assert seen(ampd("migrate", *arguments, "--migrations", "m", url=database.url, env=env)) == (0, done, stderr)


def test_quiet_leaves_results_that_were_asked_for(ampd: Ampd, database: Database, folder: Path) -> None:
    """A document and a script are printed all the same; a warning is not, and an error is."""
    write(folder, {"1_first.sql": "CREATE INDEX CONCURRENTLY ON a (id);\n"})
    quiet = ("migrate", "-q", "--migrations", "m")
    assert seen(ampd(*quiet, "--check", url=database.url))[:2] == (1, "")
    code, stdout, stderr = seen(ampd(*quiet, url=database.url))
    assert (code, stdout, stderr.startswith("error: ")) == (1, "", True)
    write(folder, {"1_first.sql": "CREATE TABLE a (id int);\n"})
    assert TWO["2_second.sql"] in ampd(*quiet, "--dry-run", url=database.url).stdout
    assert document(ampd(*quiet, "--json", url=database.url))["result"] == "migrated"
    assert seen(ampd(*quiet, "--check", url=database.url, env={"AMP_CONFIG_METADATA_DB_URL": "x"})) == (0, "", "")
