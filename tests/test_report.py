"""What a run came to and where a database stands: whole documents and whole texts."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone

import msgspec
import pytest

from ampd import ConfigError, LockTimeout, Migration, MigrationConflict, MigrationFailed, Report, Status
from ampd.display import fitted
from ampd.migration import AppliedMigration, checksum
from ampd.other_sessions import Blocker, Holder
from ampd.plan import make_plan
from ampd.report import (
    AppliedNow,
    PendingMigration,
    Result,
    count,
    duration,
    examined_json,
    migrate_json,
    pending_of,
)
from ampd.statement_progress import StatementProgress
from tests.cli_output import late, restore

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def migration(version: int, name: str, sql: str) -> Migration:
    """Return a migration as its file would give it."""
    return Migration(version, name, f"sql/{version}_{name}.sql", sql, checksum(sql.encode()))


def row(file: Migration, *, secs: float | None = 1.5, done: int = 1, by: str = "amp") -> AppliedMigration:
    """Return the row that a migration has in the history, finished after so many seconds, or not."""
    finished_at = None if secs is None else NOON + timedelta(seconds=secs)
    return AppliedMigration(file.version, file.name, file.checksum, NOON, finished_at, done, by, "0.1.0")


JOBS = migration(1, "jobs", "CREATE TABLE jobs (id int);\n")
STATE = migration(20, "job_state", "ALTER TABLE jobs ADD state text;\n\n")
INDEX = migration(30, "index", "-- no-transaction\nCREATE INDEX CONCURRENTLY i ON jobs (id);\nVACUUM jobs;")
EDITED = migration(1, "jobs", "CREATE TABLE jobs (id bigint);\n")
GONE = migration(2, "gone", "SELECT 2;")
DOCUMENT_OF_STATE = {"version": 20, "name": "job_state", "file": "sql/20_job_state.sql", "transactional": True}
DOCUMENT_OF_LATER = {"version": 40, "name": "later", "file": "sql/40_later.sql", "transactional": True}
LATER = migration(40, "later", "SELECT 40;")


def status(
    files: list[Migration],
    rows: list[AppliedMigration],
    *,
    target: int | None = None,
    runner: Holder | None = None,
) -> Status:
    """Return where a database with this history stands."""
    return Status("h:5432/amp", "public", make_plan(files, rows, target=target, runner=runner))


EVERYTHING = status(
    [JOBS, migration(3, "late", "SELECT 3;"), STATE, INDEX, migration(35, "new", "SELECT 35;")],
    [row(EDITED), row(GONE, secs=0.25), row(STATE), row(INDEX, secs=None, by="deploy", done=3)],
)


def test_the_document_of_status() -> None:
    """`status --json` is the contract's document, every migration with its checksums, times and role."""
    document = json.loads(EVERYTHING.json())
    states = [(each["version"], each["state"]) for each in document["migrations"]]
    assert [(info.version, info.state) for info in EVERYTHING.migrations] == states
    assert document == {
        "database": "h:5432/amp",
        "schema": "public",
        "current_version": 20,
        "up_to_date": False,
        "result": "conflict",
        "migrations": [
            {
                "version": 1,
                "name": "jobs",
                "state": "changed",
                "checksum": JOBS.checksum.hex(),
                "applied_checksum": EDITED.checksum.hex(),
                "applied_at": "2026-01-02T12:00:01.500000+00:00",
                "started_at": "2026-01-02T12:00:00+00:00",
                "duration_ms": 1500,
                "applied_by": "amp",
                "statements_done": 1,
                "file": "sql/1_jobs.sql",
                "runner": None,
            },
            {
                "version": 2,
                "name": "gone",
                "state": "missing",
                "checksum": GONE.checksum.hex(),
                "applied_checksum": GONE.checksum.hex(),
                "applied_at": "2026-01-02T12:00:00.250000+00:00",
                "started_at": "2026-01-02T12:00:00+00:00",
                "duration_ms": 250,
                "applied_by": "amp",
                "statements_done": 1,
                "file": None,
                "runner": None,
            },
            {
                "version": 3,
                "name": "late",
                "state": "out_of_order",
                "checksum": checksum(b"SELECT 3;").hex(),
                "applied_checksum": None,
                "applied_at": None,
                "started_at": None,
                "duration_ms": None,
                "applied_by": None,
                "statements_done": None,
                "file": "sql/3_late.sql",
                "runner": None,
            },
            {
                "version": 20,
                "name": "job_state",
                "state": "applied",
                "checksum": STATE.checksum.hex(),
                "applied_checksum": STATE.checksum.hex(),
                "applied_at": "2026-01-02T12:00:01.500000+00:00",
                "started_at": "2026-01-02T12:00:00+00:00",
                "duration_ms": 1500,
                "applied_by": "amp",
                "statements_done": 1,
                "file": "sql/20_job_state.sql",
                "runner": None,
            },
            {
                "version": 30,
                "name": "index",
                "state": "interrupted",
                "checksum": INDEX.checksum.hex(),
                "applied_checksum": INDEX.checksum.hex(),
                "applied_at": None,
                "started_at": "2026-01-02T12:00:00+00:00",
                "duration_ms": None,
                "applied_by": "deploy",
                "statements_done": 3,
                "file": "sql/30_index.sql",
                "runner": None,
            },
            {
                "version": 35,
                "name": "new",
                "state": "pending",
                "checksum": checksum(b"SELECT 35;").hex(),
                "applied_checksum": None,
                "applied_at": None,
                "started_at": None,
                "duration_ms": None,
                "applied_by": None,
                "statements_done": None,
                "file": "sql/35_new.sql",
                "runner": None,
            },
        ],
    }
    assert list(document) == ["database", "schema", "current_version", "up_to_date", "result", "migrations"]


def test_the_document_of_an_empty_status() -> None:
    """Without migrations on either side the document is laid out for people too, with null where nothing is known."""
    assert Status("h:5432/amp", None, make_plan([], [])).json().decode() == (
        '{\n  "database": "h:5432/amp",\n  "schema": null,\n  "current_version": null,\n'
        '  "up_to_date": true,\n  "result": "up_to_date",\n  "migrations": []\n}'
    )


def test_a_newer_database_in_the_document() -> None:
    """What only a newer build knows is `ahead` in the document, and the database is not up to date."""
    document = json.loads(status([JOBS], [row(JOBS), row(LATER)]).json())
    assert (document["current_version"], document["up_to_date"]) == (40, False)
    assert [each["state"] for each in document["migrations"]] == ["applied", "ahead"]


GONE_FILE = "'sql/*2_gone*'"
TEXT = f"""\
h:5432/amp: at version 20, 1 pending, 4 conflicts

state         version  name       when (UTC)          took  by
changed             1  jobs       2026-01-02 12:00   1.5 s  amp
missing             2  gone       2026-01-02 12:00  250 ms  amp
out of order        3  late
applied            20  job_state  2026-01-02 12:00   1.5 s  amp
interrupted        30  index      2026-01-02 12:00          deploy
pending            35  new

1 jobs was applied and its file has changed since
  to do: {restore("sql/1_jobs.sql")}

2 gone was applied and there is no such file: the files at hand go from 1 jobs to 3 late
  to do: {restore(GONE_FILE)}

3 late is not applied and 30 already is: the history goes from 2 gone to 20 job_state
  to do: {late(30, "sql/3_late.sql", "sql/36_late.sql")}

30 index was started and did not finish: 3 statements are recorded as done
  to do: look at the database, finish or undo the migration by hand, then run `ampd resolve 30 --applied` or \
`ampd resolve 30 --rolled-back`"""
NARROW = """\
h:5432/amp, schema amp: at version 1, 1
  running, 1 pending

state    version  name
applied        1  jobs
running       30  index
pending       40  a_name_that_is_long_..

30 index is being run, at statement 1 of
  2, building index: scanning table 43 %
  by pid 77, user amp, on 10.0.0.1,
    application ampd, since 2026-01-02
    12:00:00+0000

next: `ampd migrate` waits for it"""


def test_the_text_of_status() -> None:
    """`status` prints the database, a line for each migration under headings, and then what to do."""
    assert EVERYTHING.text() == TEXT


@pytest.mark.parametrize("columns", [20, 30, 40, 60, 80, 120])
def test_the_text_fits_a_terminal(columns: int) -> None:
    """No line is wider than a terminal of 40 columns but for a command; below, state, version and some name stay."""
    for found in (EVERYTHING, RUNNING):
        lines = fitted(found.text(columns), columns).splitlines()
        assert max(len(line) for line in lines if "`" not in line) <= max(columns, 40)
        assert " ".join(found.text(columns).split()).startswith(" ".join(found.text().splitlines()[0].split()))
    assert fitted(RUNNING.text(40), 40) == NARROW
    assert EVERYTHING.text(150) == TEXT


SCANNING = StatementProgress("building index: scanning table", 43)
RUNNER = Holder(77, "amp", "ampd", "10.0.0.1", NOON, progress=SCANNING)
LONG = migration(40, "a_name_that_is_long_enough", "SELECT 40;")
RUNNING = Status(
    "h:5432/amp", "amp", make_plan([JOBS, INDEX, LONG], [row(JOBS), row(INDEX, secs=None, done=0)], runner=RUNNER)
)


RUNNING_TEXT = """\
h:5432/amp, schema amp: at version 1, 1 running, 1 pending

state    version  name                        when (UTC)         took  by
applied        1  jobs                        2026-01-02 12:00  1.5 s  amp
running       30  index                       2026-01-02 12:00         amp
pending       40  a_name_that_is_long_enough

30 index is being run, at statement 1 of 2, building index: scanning table 43 %
  by pid 77, user amp, on 10.0.0.1, application ampd, since 2026-01-02 12:00:00+0000

next: `ampd migrate` waits for it"""


def test_a_running_migration() -> None:
    """It is no conflict and not up to date; text and document say who is at it, since when, at which statement."""
    assert RUNNING.text() == RUNNING_TEXT
    assert (RUNNING.plan.conflicts, RUNNING.up_to_date) == ((), False)
    assert [info.version for info in RUNNING.plan.pending] == [40]
    document = json.loads(RUNNING.json())
    assert document["result"] == "pending"
    runner = {"pid": 77, "user": "amp", "application": "ampd", "client": "10.0.0.1"}
    runner |= {"since": "2026-01-02T12:00:00+00:00", "statement": 1, "statements": 2}
    runner |= {"phase": "building index: scanning table", "percent": 43}
    assert [(each["state"], each["runner"]) for each in document["migrations"]] == [
        ("applied", None),
        ("running", runner),
        ("pending", None),
    ]


def test_a_migration_that_its_runner_says_it_is_at() -> None:
    """The row of a transactional migration cannot be seen before its end: the comment of its message tells."""
    runner = msgspec.structs.replace(RUNNER, query="/* ampd 4711 20 job_state */ BEGIN")
    found = Status("h:5432/amp", "public", make_plan([JOBS, STATE, LATER], [row(JOBS)], runner=runner))
    assert [info.state for info in found.plan.migrations] == ["applied", "running", "pending"]
    assert found.text().splitlines()[-4:] == [
        "20 job_state is being run, building index: scanning table 43 %",
        "  by pid 77, user amp, on 10.0.0.1, application ampd, migration 20 job_state, since 2026-01-02 12:00:00+0000",
        "",
        "next: `ampd migrate` waits for it",
    ]


def test_an_interrupted_migration_that_goes_on() -> None:
    """What the next run resumes is said to go on, and where."""
    found = status([INDEX], [row(INDEX, secs=None, done=0)])
    assert found.text().splitlines()[-3:] == [
        "30 index was interrupted; it goes on after statement 0",
        "",
        "next: `ampd migrate` applies 1 migration",
    ]


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0 ms"),
        (999, "999 ms"),
        (1000, "1.0 s"),
        (15_700, "15.7 s"),
        (59_949, "59.9 s"),
        (59_950, "1 min 0 s"),
        (192_400, "3 min 12 s"),
        (3_599_600, "1 h 0 min"),
        (90_000_000, "25 h 0 min"),
    ],
)
def test_durations_as_people_read_them(ms: int, text: str) -> None:
    """Milliseconds below a second, tenths below a minute, then whole seconds, then minutes."""
    assert duration(ms) == text


@pytest.mark.parametrize(
    ("found", "summary"),
    [
        (status([], []), "up to date, no migration applied"),
        (status([JOBS], [row(JOBS)]), "up to date, at version 1"),
        (status([JOBS, STATE], []), "no migration applied, 2 pending"),
        (status([JOBS, STATE], [row(JOBS)]), "at version 1, 1 pending"),
        (status([JOBS, STATE], [row(JOBS)], target=1), "nothing to apply, at version 1, 1 left pending"),
        (status([JOBS], [row(JOBS), row(LATER)]), "at version 40, ahead of this build by 1 migration"),
        (status([JOBS], [row(EDITED)]), "at version 1, 1 conflict"),
        (
            status([JOBS], [row(EDITED), row(STATE), row(LATER)]),
            "at version 40, 1 conflict, ahead of this build by 2 migrations",
        ),
        (status([INDEX], [row(INDEX, secs=None, done=0)]), "no migration applied, 1 pending"),
    ],
)
def test_the_sum_of_status(found: Status, summary: str) -> None:
    """The first line says the version and what is left, in conflict or ahead."""
    assert found.summary() == summary
    assert found.text().splitlines()[0] == f"h:5432/amp: {summary}"


@pytest.mark.parametrize(
    ("found", "ready", "pending", "ahead", "conflicts"),
    [
        (status([JOBS], [row(JOBS)]), True, [], [], []),
        (status([], []), True, [], [], []),
        (status([JOBS, STATE], [row(JOBS)]), False, [20], [], []),
        (status([JOBS, STATE], [row(JOBS)], target=1), True, [], [], []),
        (status([JOBS], [row(JOBS), row(LATER)]), True, [], [40], []),
        (status([JOBS], [row(JOBS), row(LATER, secs=None)]), True, [], [40], []),  # a newer build is at it
        (status([JOBS, STATE], [row(JOBS), row(LATER)]), False, [], [40], [20]),  # no newer build has left out a file
        (status([JOBS], [row(EDITED), row(LATER)]), False, [], [40], [1]),
        (status([INDEX], [row(INDEX, secs=None, done=0)]), False, [30], [], []),  # to be resumed
        (status([EDITED], [row(JOBS, secs=None)]), False, [], [], [1]),
        (RUNNING, False, [40], [], []),
        (status([JOBS, INDEX], [row(JOBS), row(INDEX, secs=None, done=0)], runner=RUNNER), False, [], [], []),
    ],
    ids=[
        "current",
        "nothing",
        "behind",
        "target",
        "ahead",
        "running ahead",
        "out of order",
        "changed",
        "resumed",
        "interrupted",
        "running",
        "running last",
    ],
)
def test_an_answer_for_a_readiness_probe(
    found: Status, ready: bool, pending: list[int], ahead: list[int], conflicts: list[int]
) -> None:
    """A service can start where the database is current or ahead, and nothing is pending, running or in conflict."""
    assert found.ready is ready
    assert [info.version for info in found.pending] == pending
    assert [info.version for info in found.ahead] == ahead
    assert [conflict.version for conflict in found.conflicts] == conflicts


def test_times_are_those_of_utc() -> None:
    """Whatever zone the server gives them in."""
    zone = timezone(timedelta(hours=2))
    local = AppliedMigration(1, "jobs", JOBS.checksum, NOON.astimezone(zone), NOON.astimezone(zone), 1, "amp", "0")
    assert status([JOBS], [local]).text().splitlines()[-1] == "applied        1  jobs  2026-01-02 12:00  0 ms  amp"


def report(current: int | None, applied: int, pending: int = 0, ahead: tuple[int, ...] = ()) -> Report:
    """Return a report with so many migrations."""
    done = tuple(AppliedNow(number, f"m{number}", 250) for number in range(1, applied + 1))
    rest = tuple(PendingMigration(90 + number, f"p{number}") for number in range(pending))
    return Report("h:5432/amp", "public", current, done, rest, ahead)


@pytest.mark.parametrize(
    ("finished", "result", "text"),
    [
        (report(1, 1), Result.MIGRATED, "applied 1 migration in 250 ms, now at version 1"),
        (report(3, 3), Result.MIGRATED, "applied 3 migrations in 750 ms, now at version 3"),
        (report(3, 3, 2), Result.MIGRATED, "applied 3 migrations in 750 ms, now at version 3, 2 left pending"),
        (report(3, 0), Result.UP_TO_DATE, "up to date, at version 3"),
        (report(3, 0, 1), Result.UP_TO_DATE, "nothing to apply, at version 3, 1 left pending"),
        (report(None, 0), Result.UP_TO_DATE, "up to date, without any migration"),
        (report(9, 0, ahead=(8, 9)), Result.AHEAD, "at version 9, ahead of this build; nothing applied"),
    ],
)
def test_what_a_run_came_to(finished: Report, result: Result, text: str) -> None:
    """A run ends migrated, up to date or ahead, and says so in one line."""
    assert finished.result is result
    assert finished.text() == f"h:5432/amp: {text}"


@pytest.mark.parametrize(
    ("finished", "expected"),
    [
        (
            report(2, 2, 1),
            {
                "result": "migrated",
                "current_version": 2,
                "applied": [
                    {"version": 1, "name": "m1", "duration_ms": 250},
                    {"version": 2, "name": "m2", "duration_ms": 250},
                ],
                "pending": [{"version": 90, "name": "p0", "file": None, "transactional": True}],
                "error": None,
            },
        ),
        (
            report(None, 0),
            {"result": "up_to_date", "current_version": None, "applied": [], "pending": [], "error": None},
        ),
        (
            report(9, 0, ahead=(9,)),
            {"result": "ahead", "current_version": 9, "applied": [], "pending": [], "error": None},
        ),
    ],
)
def test_the_document_of_migrate(finished: Report, expected: dict[str, object]) -> None:
    """`migrate --json` is the contract's document, with its keys in the contract's order."""
    document = json.loads(finished.json())
    assert document == expected
    assert list(document) == ["result", "current_version", "applied", "pending", "error"]


NOTHING = {"line": None, "column": None, "sqlstate": None, "detail": None, "file": None, "version": None, "hint": None}
BLOCKER = Blocker(pid=7, user="u", application="psql", client=None, state="active", since=NOON, query="SELECT 1")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: ConfigError("no"), NOTHING | {"code": "config", "message": "no"}),
        (
            lambda: MigrationFailed(
                "sql/1_jobs.sql:2: it exists",
                hint="mend it",
                version=1,
                file="sql/1_jobs.sql",
                line=2,
                column=3,
                sqlstate="42P07",
                detail="so",
                excerpt="sql/1_jobs.sql:2:3\n  |",
            ),
            {
                "code": "migration_failed",
                "message": "sql/1_jobs.sql:2: it exists",
                "hint": "mend it",
                "version": 1,
                "file": "sql/1_jobs.sql",
                "line": 2,
                "column": 3,
                "sqlstate": "42P07",
                "detail": "so",
            },
        ),
        (
            lambda: LockTimeout("late", blockers=(BLOCKER,), version=1),
            NOTHING
            | {
                "code": "lock_timeout",
                "message": "late",
                "version": 1,
                "blockers": [
                    {
                        "pid": 7,
                        "user": "u",
                        "application": "psql",
                        "client": None,
                        "state": "active",
                        "since": "2026-01-02T12:00:00Z",
                        "query": "SELECT 1",
                        "own_pool": False,
                    }
                ],
            },
        ),
        (
            lambda: MigrationConflict("two", conflicts=status([JOBS], [row(EDITED)]).plan.conflicts, hint="look"),
            NOTHING
            | {
                "code": "conflict",
                "message": "two",
                "hint": "look",
                "version": 1,
                "file": "sql/1_jobs.sql",
                "conflicts": [
                    {
                        "version": 1,
                        "name": "jobs",
                        "state": "changed",
                        "file": "sql/1_jobs.sql",
                        "file_checksum": JOBS.checksum.hex(),
                        "applied_name": "jobs",
                        "applied_checksum": EDITED.checksum.hex(),
                        "applied_at": "2026-01-02T12:00:01.500000+00:00",
                        "applied_by": "amp",
                        "message": "1 jobs was applied and its file has changed since",
                        "hint": restore("sql/1_jobs.sql"),
                    }
                ],
            },
        ),
    ],
    ids=["config", "migration_failed", "lock_timeout", "conflict"],
)
def test_the_document_of_a_failure(make: Callable[[], ConfigError], expected: dict[str, object]) -> None:
    """A failed run's document has what was applied before, what is left, and the error with its fields."""
    applied, pending = (AppliedNow(1, "jobs", 3),), (PendingMigration(20, "job_state", "sql/20_job_state.sql"),)
    document = json.loads(migrate_json(Result.FAILED, 1, applied, pending, make().fields()))
    assert document == {
        "result": "failed",
        "current_version": 1,
        "applied": [{"version": 1, "name": "jobs", "duration_ms": 3}],
        "pending": [DOCUMENT_OF_STATE],
        "error": expected,
    }


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (status([JOBS], [row(JOBS)]), ("up_to_date", 1, [])),
        (status([JOBS, STATE], [row(JOBS)]), ("pending", 1, [DOCUMENT_OF_STATE])),
        (status([JOBS, STATE], [row(JOBS)], target=1), ("up_to_date", 1, [DOCUMENT_OF_STATE])),
        (
            status([JOBS, STATE, LATER], [row(JOBS)], target=20),
            (
                "pending",
                1,
                [DOCUMENT_OF_STATE, DOCUMENT_OF_STATE | {"version": 40, "name": "later", "file": "sql/40_later.sql"}],
            ),
        ),
        (
            status([JOBS, INDEX], [row(JOBS), row(INDEX, secs=None, done=0)], target=1),
            ("up_to_date", 1, [{"version": 30, "name": "index", "file": "sql/30_index.sql", "transactional": False}]),
        ),
        (status([JOBS], [row(JOBS), row(LATER)]), ("ahead", 40, [])),
        (status([JOBS, STATE, INDEX], [row(JOBS), row(LATER)]), ("ahead", 40, [])),
    ],
)
def test_the_document_of_a_run_that_only_looks(
    found: Status, expected: tuple[str, int, list[dict[str, object]]]
) -> None:
    """`--check --json` and `--dry-run --json` give the document of `migrate` with nothing applied, and all the rest."""
    result, current, pending = expected
    document = {"result": result, "current_version": current, "applied": [], "pending": pending, "error": None}
    assert json.loads(examined_json(found)) == document


def test_a_path_that_is_not_utf8_is_shown_as_well_as_can_be() -> None:
    """JSON is UTF-8: bytes of a path that are not become the replacement character, the others what they stand for."""
    surrogates = b"gr\xc3\xb6\xff".decode("ascii", "surrogateescape")
    document = migrate_json(Result.FAILED, None, (), (), ConfigError("größe", file=surrogates).fields())
    error = json.loads(document)["error"]
    assert (error["message"], error["file"]) == ("größe", "grö\ufffd")


def test_non_ascii_is_not_escaped() -> None:
    """Names stand in the document as they are."""
    assert '"name": "größe 中文"' in status([migration(1, "größe 中文", "")], []).json().decode()


def test_small_words() -> None:
    """A count agrees with its noun, and steps become what the report shows."""
    assert [count(number, "migration") for number in (0, 1, 2)] == ["0 migrations", "1 migration", "2 migrations"]
    assert pending_of(status([JOBS], []).plan.pending) == (PendingMigration(1, "jobs", "sql/1_jobs.sql"),)
    (index,) = pending_of(status([INDEX], []).plan.pending)
    assert (index.file, index.transactional) == ("sql/30_index.sql", False)
    (odd,) = pending_of(status([migration(1, "odd", "-- lock-timeout: x\nSELECT 1")], []).plan.pending)
    assert odd.transactional
