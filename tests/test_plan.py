"""The plan: the contract's table of conflicts, where an interrupted migration goes on, and the laws of any plan."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from ampd.errors import MigrationConflict
from ampd.history.refusals import check_project
from ampd.migration import AppliedMigration, Migration, checksum
from ampd.plan import Conflict, MigrationInfo, Order, Plan, State, conflict_of, is_another_projects, make_plan, planning
from ampd.resumption import DoneChecksums, Resumption, done_checksum, resumption, summary
from ampd.sql.splitter import split
from tests.cli_output import late, restore
from tests.repetition import examples

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
RESUMABLE = "-- no-transaction\nVACUUM;\n"


def migration(version: int, sql: str | None = None) -> Migration:
    """Return a migration as its file would give it."""
    sql = f"SELECT {version};" if sql is None else sql
    return Migration(version, f"m{version}", f"sql/{version}_m{version}.sql", sql, checksum(sql.encode()))


def row(file: Migration, *, finished: bool = True, done: int = 0, begun: bytes | None = None) -> AppliedMigration:
    """Return the row that a migration has in the history."""
    finished_at = NOON + timedelta(seconds=1) if finished else None
    return AppliedMigration(file.version, file.name, file.checksum, NOON, finished_at, done, "amp", "0.1.0", begun)


def scene(files: str, rows: str) -> tuple[list[Migration], list[AppliedMigration]]:
    """Return what words say: `2` is a file or row, `2^` a file to resume, `2*` a changed, `2~` an unfinished row."""
    folder = [migration(int(word.rstrip("^")), RESUMABLE if "^" in word else None) for word in files.split()]
    contents = {each.version: each.sql for each in folder}
    history = []
    for word in rows.split():
        version = int(word.rstrip("*~"))
        file = migration(version, "SELECT 'other';" if "*" in word else contents.get(version))
        history.append(row(file, finished="~" not in word))
    return folder, history


def told(infos: Sequence[MigrationInfo | Conflict]) -> str:
    """Return the versions of migrations as words."""
    return " ".join(str(info.version) for info in infos)


# files, rows, states in the order of versions (initials, for short), pending, conflicts, up to date
A, P, C, M, O, I, _, H = (state.value for state in State)  # noqa: E741
TABLE = [
    ("", "", [], "", "", True),
    ("1 2", "", [P, P], "1 2", "", False),
    ("1 2 3", "1", [A, P, P], "2 3", "", False),
    ("1 2", "1 2", [A, A], "", "", True),
    ("10 9", "9", [A, P], "10", "", False),
    # applied, but the file's checksum differs
    ("1 2", "1* 2", [C, A], "", "1", False),
    ("1 2", "1 2*", [A, C], "", "2", False),
    ("1 2 3", "1* 2", [C, A, P], "3", "1", False),
    # applied, version at most the newest on disk, and no such file
    ("2", "1 2", [M, A], "", "1", False),
    ("1 3", "1 2", [A, M, P], "3", "2", False),
    ("1 3", "1 2 3", [A, M, A], "", "2", False),
    # applied, version above the newest on disk
    ("1", "1 2", [A, H], "", "", False),
    ("1 2", "1 2 3 4", [A, A, H, H], "", "", False),
    ("", "1", [H], "", "", False),
    ("2", "1 2 3", [M, A, H], "", "1", False),
    ("1 2", "1* 2 3", [C, A, H], "", "1", False),
    # not applied, version below the newest applied
    ("1 2", "2", [O, A], "", "1", False),
    ("1 2 3 4", "1 3", [A, O, A, P], "4", "2", False),
    ("1 2", "1 3", [A, O, H], "", "2", False),
    ("1 2 3", "1 3*", [A, O, C], "", "2 3", False),
    # started and not finished
    ("1 2", "1 2~", [A, I], "", "2", False),
    ("1 2 3", "1 2~", [A, I, P], "3", "2", False),
    ("1 2", "1~", [I, P], "2", "1", False),
    # the same of a newer build: it runs it now, or will resume it
    ("1", "1 2~", [A, H], "", "", False),
    ("", "1~", [H], "", "", False),
    ("3", "1~ 2 3", [I, M, A], "", "1 2", False),
    ("1 2", "1 2*~", [A, I], "", "2", False),
    ("1 2 3", "1 3~", [A, O, I], "", "2 3", False),
    # started and not finished, and to be resumed
    ("1 2^", "1 2~", [A, I], "2", "", False),
    ("1 2^ 3", "1 2~", [A, I, P], "2 3", "", False),
    ("1 2^", "1 2*~", [A, I], "", "2", False),
    ("1 2^", "1 2~ 3", [A, I, H], "", "2", False),
    # all at once
    ("1 2 4 5 7^ 8", "1* 3 5 7~", [C, O, M, O, A, I, P], "7 8", "1 2 3 4", False),
]


@pytest.mark.parametrize(("files", "rows", "states", "pending", "conflicts", "up_to_date"), TABLE)
def test_the_table_of_conflicts(
    files: str, rows: str, states: list[str], pending: str, conflicts: str, up_to_date: bool
) -> None:
    """Each version stands where the contract's table puts it, and all conflicts are there at once."""
    plan = make_plan(*scene(files, rows))
    assert [info.state.value for info in plan.migrations] == states
    assert (told(plan.pending), told(plan.conflicts)) == (pending, conflicts)
    assert plan.up_to_date is up_to_date


@pytest.mark.parametrize(
    ("files", "rows", "states", "pending"),
    [
        ("1 2", "2", [P, A], "1"),
        ("1 2 3 4", "1 3", [A, P, A, P], "2 4"),
        ("1 2", "1 3", [A, P, H], ""),
        ("1 2 3^", "1 3~", [A, P, I], "2 3"),
        ("1 2", "1* 2", [C, A], ""),
    ],
)
def test_out_of_order_where_it_is_allowed(files: str, rows: str, states: list[str], pending: str) -> None:
    """With `allow_out_of_order` a late migration is simply pending; nothing else changes."""
    plan = make_plan(*scene(files, rows), order=Order.ALLOW_OUT_OF_ORDER)
    assert [info.state.value for info in plan.migrations] == states
    assert told(plan.pending) == pending


@pytest.mark.parametrize(
    ("files", "rows", "target", "pending", "conflicts"),
    [
        ("1 2 3", "", 2, "1 2", ""),
        ("1 2 3", "", 0, "", ""),
        ("1 2 3", "1 2", 1, "", ""),
        ("1 2 3", "1", 3, "2 3", ""),
        ("1 2 3", "1* 2", 3, "3", "1"),
        ("1 2^ 3", "1 2~", 2, "2", ""),
        ("1 2^ 3", "1 2~", 1, "", "2"),
    ],
)
def test_a_target_bounds_what_is_pending(files: str, rows: str, target: int, pending: str, conflicts: str) -> None:
    """Nothing beyond the target is pending, and no conflict is hidden by it."""
    plan = make_plan(*scene(files, rows), target=target)
    assert (told(plan.pending), told(plan.conflicts)) == (pending, conflicts)


@pytest.mark.parametrize(
    ("rows", "current"), [("", None), ("1", 1), ("1 2~", 1), ("1~", None), ("1 3", 3), ("1* 2", 2), ("0", 0)]
)
def test_the_current_version(rows: str, current: int | None) -> None:
    """The current version is the highest that is applied and finished, whether or not it has a file."""
    assert make_plan(*scene("0 1 2", rows)).current_version == current


def test_a_plan_is_made_in_slices() -> None:
    """Between any two migrations the event loop can go on."""
    files, rows = scene("1 2 3 4 5", "1 2")
    slices = planning(files, rows, target=None, order=Order.STRICT, runner=None, find_resumption=resumption)
    assert sum(1 for _ in slices) >= len(files)


def test_what_the_properties_select() -> None:
    """A plan knows which of its migrations are ahead and which of its conflicts are interruptions."""
    plan = make_plan(*scene("1 2", "1* 2~ 3 4"))
    assert told(plan.ahead) == "3 4"
    assert told(plan.interrupted) == "2"


OTHER = checksum(b"SELECT 'other';").hex()
OWN = checksum(b"SELECT 2;").hex()


@pytest.mark.parametrize(
    ("files", "rows", "expected", "evidence"),
    [
        (
            "2",
            "2*",
            {
                "version": 2,
                "name": "m2",
                "state": "changed",
                "file": "sql/2_m2.sql",
                "file_checksum": OWN,
                "applied_name": "m2",
                "applied_checksum": OTHER,
                "applied_at": "2026-01-02T12:00:01+00:00",
                "applied_by": "amp",
                "message": "2 m2 was applied and its file has changed since",
                "hint": restore("sql/2_m2.sql"),
            },
            f"  file:    sql/2_m2.sql, SHA-256 {OWN}\n  applied: 2026-01-02 12:00:01+0000 by amp, SHA-256 {OTHER}",
        ),
        (
            "3",
            "2 3",
            {
                "version": 2,
                "name": "m2",
                "state": "missing",
                "file": None,
                "file_checksum": None,
                "applied_name": "m2",
                "applied_checksum": OWN,
                "applied_at": "2026-01-02T12:00:01+00:00",
                "applied_by": "amp",
                "message": "2 m2 was applied and there is no such file: the first file at hand is 3 m3",
                "hint": restore("'sql/*2_m2*'"),
            },
            f"  file:    none\n  applied: 2026-01-02 12:00:01+0000 by amp, SHA-256 {OWN}",
        ),
        (
            "2 3",
            "3",
            {
                "version": 2,
                "name": "m2",
                "state": "out_of_order",
                "file": "sql/2_m2.sql",
                "file_checksum": OWN,
                "applied_name": None,
                "applied_checksum": None,
                "applied_at": None,
                "applied_by": None,
                "message": "2 m2 is not applied and 3 already is: the history begins with 3 m3",
                "hint": late(3, "sql/2_m2.sql", "sql/4_m2.sql"),
            },
            f"  file:    sql/2_m2.sql, SHA-256 {OWN}\n  applied: never",
        ),
        (
            "2",
            "2*~",
            {
                "version": 2,
                "name": "m2",
                "state": "interrupted",
                "file": "sql/2_m2.sql",
                "file_checksum": OWN,
                "applied_name": "m2",
                "applied_checksum": OTHER,
                "applied_at": "2026-01-02T12:00:00+00:00",
                "applied_by": "amp",
                "message": "2 m2 was started and did not finish: 0 statements are recorded as done",
                "hint": "restore the file as it was when it was started, and `ampd migrate` may resume it; else "
                "look at the database, finish or undo the migration by hand, then run "
                "`ampd resolve 2 --applied` or `ampd resolve 2 --rolled-back`",
            },
            f"  file:    sql/2_m2.sql, SHA-256 {OWN}\n  started: 2026-01-02 12:00:00+0000 by amp, SHA-256 {OTHER}",
        ),
    ],
    ids=["changed", "missing", "out of order", "interrupted"],
)
def test_what_a_conflict_tells(files: str, rows: str, expected: dict[str, object], evidence: str) -> None:
    """A conflict has version, name, both checksums, when and by whom it was applied, and what to do."""
    (conflict,) = make_plan(*scene(files, rows)).conflicts
    assert conflict.fields() == expected
    assert conflict.evidence == evidence


def test_a_conflict_tells_the_name_of_the_row_where_it_differs() -> None:
    """A file that was renamed and changed is shown beside the name under which it was applied."""
    files, (applied,) = scene("2", "2*")
    (conflict,) = make_plan(files, (replace(applied, name="old"),)).conflicts
    assert (conflict.fields()["name"], conflict.fields()["applied_name"]) == ("m2", "old")
    assert "\n  applied: as old, 2026-01-02 12:00:01+0000 by amp, SHA-256 " in conflict.evidence


# Another project's history.


def theirs(version: int, *, sql: str = "SELECT 'theirs';", finished: bool = True) -> AppliedMigration:
    """Return the row of a migration that is none of ours."""
    return replace(row(migration(version, sql), finished=finished), name=f"theirs{version}")


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize(
    ("files", "rows", "expected"),
    [
        # their versions are below ours, above them, on both sides, between them, the same ones
        ([5, 6], [theirs(1), theirs(2)], True),
        ([1, 2], [theirs(2024), theirs(2025)], True),
        ([5, 6], [theirs(1), theirs(9)], True),
        ([1, 9], [theirs(5)], True),
        ([1, 2], [theirs(1), theirs(2)], True),
        ([1, 2], [theirs(1), theirs(2), theirs(3)], True),
        # theirs is being applied, or was interrupted
        ([1, 2], [theirs(3, finished=False)], True),
        # one row that agrees in name, or in content, is enough
        ([1, 2], [theirs(1), replace(theirs(2), name="m2")], False),
        ([1, 2], [theirs(1, sql="SELECT 1;"), theirs(3)], False),
        # a file that was given another version is still ours
        ([1, 5], [theirs(2, sql="SELECT 5;")], False),
        # the name alone is not: many begin with an init
        ([1, 2], [replace(theirs(9), name="m1")], True),
        # nothing to tell by
        ([], [theirs(1)], False),
        ([1], [], False),
        ([], [], False),
    ],
)
def test_another_projects_history(files: list[int], rows: list[AppliedMigration], expected: bool, order: Order) -> None:
    """No row belongs to a file: whatever the versions say, out of order or ahead, it is another project's."""
    plan = make_plan([migration(version) for version in files], rows, order=order)
    assert is_another_projects(plan) is expected


def test_what_another_projects_history_tells() -> None:
    """The error says whose history it is by a few of its rows, and how to come together, and nothing else."""
    files = [migration(version) for version in (1, 2, 3)]
    rows = [theirs(version, finished=version < 24) for version in (21, 22, 23, 24, 25)]
    rows[1] = replace(rows[1], finished_at=NOON + timedelta(days=1), applied_by="shop")
    with pytest.raises(MigrationConflict) as error:
        check_project(make_plan(files, rows), history='"app".ampd_schema_migrations', packaged=False)
    assert str(error.value) == (
        '"app".ampd_schema_migrations is the history of another project: none of the migrations in it is among the '
        "files of sql\n"
        "  history: 21 theirs21, 22 theirs22, 23 theirs23 and 2 more, last at 2026-01-03 12:00:00+0000 by shop\n"
        "  files:   1 m1, 2 m2, 3 m3\n"
        "hint: give the folder of that project with --migrations DIR, or the database or schema (metadata_db.schema) "
        "that these files are for; if they are that project's, renamed and changed, restore them"
    )
    assert error.value.fields()["conflicts"] == []
    with pytest.raises(MigrationConflict) as error:
        check_project(make_plan([replace(files[0], file="1.sql")], rows[4:]), history="h", packaged=True)
    assert str(error.value) == (
        "h is the history of another project: none of the migrations in it is among the files at hand\n"
        "  history: 25 theirs25, last at 2026-01-02 12:00:00+0000 by amp\n"
        "  files:   1 m1\n"
        "hint: no folder was named, so these are the migrations packaged with ampd: give the folder of your project "
        "with --migrations DIR or metadata_db.migrations.dir; to have amp's schema in this database as well, set "
        "metadata_db.schema to another schema"
    )


# Where an interrupted migration goes on.

STEPS = ("CREATE TABLE t (id int)", "CREATE INDEX CONCURRENTLY i ON t (id)", "CALL p()", "VACUUM t")
FILE = migration(1, "-- no-transaction\n" + ";\n".join(STEPS) + ";\n")
EDITED_AFTER = migration(1, FILE.sql.replace("VACUUM t", "VACUUM FULL t"))
EDITED_BEFORE = migration(1, FILE.sql.replace("id int", "id bigint"))
RESPACED = migration(1, FILE.sql.replace(";\n", "  ;\n\n-- so\n"))
WINDOWS = Migration(1, "m1", "1_m1.sql", FILE.sql.replace("\n", "\r\n").replace("t (id", "t (\r\nid"), b"")
UNIX = Migration(1, "m1", "1_m1.sql", WINDOWS.sql.replace("\r\n", "\n"), b"")
TRANSACTIONAL = migration(1, FILE.sql.removeprefix("-- no-transaction\n"))
BAD_DIRECTIVE = migration(1, "-- lock-timeout: soon\n" + FILE.sql)


def begun(count: int, file: Migration = FILE) -> bytes:
    """Return the checksum of the first statements of a file."""
    return done_checksum(split(file.sql)[:count])


@pytest.mark.parametrize(
    ("file", "done", "checksum_of", "expected"),
    [
        # the checksum is that of what is done: the next one was not begun
        (FILE, 0, begun(0), Resumption(0, in_doubt=False)),
        (FILE, 1, begun(1), Resumption(1, in_doubt=False)),
        (FILE, 2, begun(2), Resumption(2, in_doubt=False)),
        (FILE, 4, begun(4), Resumption(4, in_doubt=False)),
        # the checksum is that of one more: it was begun, and is in doubt
        (FILE, 0, begun(1), Resumption(0, in_doubt=True)),
        (FILE, 1, begun(2), Resumption(1, in_doubt=True)),
        (FILE, 3, begun(4), Resumption(3, in_doubt=True)),
        # … and nobody can tell how far a procedure came
        (FILE, 2, begun(3), None),
        # neither: what was done stands otherwise in the file, or something is lost
        (FILE, 1, begun(3), None),
        (FILE, 2, begun(1), None),
        (FILE, 1, b"", None),
        (EDITED_BEFORE, 1, begun(1), None),
        (EDITED_BEFORE, 1, begun(2), None),
        # what is not done yet may change, and so may white space and comments between statements
        (EDITED_AFTER, 3, begun(3), Resumption(3, in_doubt=False)),
        (EDITED_AFTER, 3, begun(4), None),
        (RESPACED, 1, begun(2), Resumption(1, in_doubt=True)),
        (migration(1, "-- no-transaction\nCREATE TABLE t (id int);"), 1, begun(1), Resumption(1, in_doubt=False)),
        # statements that were done are gone
        (migration(1, "-- no-transaction\n"), 1, begun(1), None),
        (migration(1, "-- no-transaction\nCREATE TABLE t (id int);"), 2, begun(2), None),
        # Windows' line ends are the same statements
        (WINDOWS, 1, begun(1, UNIX), Resumption(1, in_doubt=False)),
        (UNIX, 1, begun(2, WINDOWS), Resumption(1, in_doubt=True)),
        # rows that somebody else has made have no checksum of what was begun: the whole file must be the same
        (FILE, 0, None, Resumption(0, in_doubt=True)),
        (FILE, 1, None, Resumption(1, in_doubt=True)),
        (FILE, 2, None, None),
        (FILE, 4, None, Resumption(4, in_doubt=False)),
        (EDITED_AFTER, 0, None, None),
        (FILE, 5, None, None),
        (FILE, -1, None, None),
        (FILE, -1, begun(3), None),
        # a file that is to run in one transaction now has nothing to go on with
        (TRANSACTIONAL, 1, begun(1), None),
        # one that cannot be read so far will be refused for that, not for having been interrupted
        (BAD_DIRECTIVE, 1, begun(1), Resumption(1, in_doubt=False)),
    ],
)
def test_where_an_interrupted_migration_goes_on(
    file: Migration, done: int, checksum_of: bytes | None, expected: Resumption | None
) -> None:
    """It goes on where every statement done or begun is unchanged, and nothing is in doubt that leaves no trace."""
    applied = row(FILE, finished=False, done=done, begun=checksum_of)
    assert resumption(file, applied) == expected
    plan = make_plan([file], [applied])
    assert [info.resumption for info in plan.migrations] == [expected]
    assert bool(plan.pending) is (expected is not None)


def test_only_what_was_interrupted_is_resumable() -> None:
    """A migration without a file, without a row or with an end has nothing to be resumed."""
    assert [info.resumption for info in make_plan([], [row(FILE, finished=False)]).migrations] == [None]
    assert [info.resumption for info in make_plan([FILE], []).migrations] == [None]
    assert [info.resumption for info in make_plan([FILE], [row(FILE)]).migrations] == [None]


def test_the_done_checksum_is_told_apart_by_statements() -> None:
    """The checksum of statements is the SHA-256 of their texts with a NUL between, which no text can hold."""
    one, two = split("SELECT 1; SELECT 2"), split("SELECT 1\n;;SELECT 2;")
    assert done_checksum(one) == done_checksum(two) == sha256(b"SELECT 1\0SELECT 2").digest()
    assert done_checksum(()) == sha256(b"").digest()


def test_done_checksums_can_be_asked_for_in_any_order() -> None:
    """Whatever was asked before, the checksum of the first statements is the same."""
    statements = split("SELECT 1; SELECT 2;\r\nSELECT\r\n3; SELECT 4")
    checksums = DoneChecksums(statements)
    for count in (0, 1, 2, 2, 1, 3, 3, 4, 0, 4, 2, 1, 4):
        assert checksums.of(count) == done_checksum(statements[:count]), count


# Laws.

VERSIONS = st.integers(0, 9)
FILES = st.dictionaries(VERSIONS, st.sampled_from(["SELECT 1;", "SELECT 2;", RESUMABLE]), max_size=8)
ROWS = st.dictionaries(
    VERSIONS, st.tuples(st.sampled_from(["SELECT 1;", "SELECT 2;", RESUMABLE]), st.booleans()), max_size=8
)
SCENES = st.tuples(FILES, ROWS, st.sampled_from(Order), st.none() | VERSIONS)
Scene = tuple[dict[int, str], dict[int, tuple[str, bool]], Order, int | None]


def made(given_scene: Scene) -> tuple[list[Migration], list[AppliedMigration]]:
    """Return the folder and the history of a scene."""
    files, rows, _, _ = given_scene
    history = [row(migration(version, sql), finished=finished) for version, (sql, finished) in rows.items()]
    return [migration(version, sql) for version, sql in files.items()], history


def planned(given_scene: Scene) -> Plan:
    """Return the plan for a scene."""
    return make_plan(*made(given_scene), target=given_scene[3], order=given_scene[2])


@given(SCENES)
@examples(80)
def test_each_version_stands_once_where_the_contract_says(given_scene: Scene) -> None:
    """Every version of either side is one info, in order, with the state that the contract's table gives it."""
    files, rows, order, _ = given_scene
    plan = planned(given_scene)
    assert [info.version for info in plan.migrations] == sorted(files.keys() | rows.keys())
    for info in plan.migrations:
        version = info.version
        if version in rows and all(version > other for other in files):
            expected = State.AHEAD
        elif version in rows and not rows[version][1]:
            expected = State.INTERRUPTED
        elif version in rows and version not in files:
            expected = State.MISSING
        elif version in rows:
            expected = State.APPLIED if rows[version][0] == files[version] else State.CHANGED
        elif order is Order.STRICT and any(version < other for other in rows):
            expected = State.OUT_OF_ORDER
        else:
            expected = State.PENDING
        assert (version, info.state) == (version, expected)


@given(SCENES)
@examples(80)
def test_what_is_pending(given_scene: Scene) -> None:
    """Pending is in order, has files, lies within the target, and is nothing while the database is ahead."""
    _, _, _, target = given_scene
    plan = planned(given_scene)
    versions = [info.version for info in plan.pending]
    assert versions == sorted(versions)
    assert all(info.migration is not None for info in plan.pending)
    assert {info.state for info in plan.pending} <= {State.PENDING, State.INTERRUPTED}
    assert target is None or all(version <= target for version in versions)
    assert not (plan.ahead and plan.pending)
    if not plan.ahead:
        waiting = {info.version for info in plan.migrations if info.state is State.PENDING}
        assert waiting - set(versions) == {version for version in waiting if target is not None and version > target}


@given(SCENES)
@examples(80)
def test_what_is_in_conflict(given_scene: Scene) -> None:
    """Conflicts are in order, never pending too, and the whole of what is changed, missing, late or interrupted."""
    plan = planned(given_scene)
    versions = [conflict.version for conflict in plan.conflicts]
    pending = {info.version for info in plan.pending}
    bad = (State.CHANGED, State.MISSING, State.OUT_OF_ORDER, State.INTERRUPTED)
    assert versions == [info.version for info in plan.migrations if info.state in bad and info.version not in pending]
    assert [conflict_of(conflict.info) for conflict in plan.conflicts] == list(plan.conflicts)
    assert all(re.match(rf"{each.version} m{each.version} (was|is not) ", each.message) for each in plan.conflicts)


@given(SCENES, st.randoms(use_true_random=False))
@examples(50)
def test_the_order_of_what_is_given_does_not_matter(given_scene: Scene, random: Random) -> None:
    """Files and rows may come in any order."""
    folder, history = made(given_scene)
    random.shuffle(folder)
    random.shuffle(history)
    assert make_plan(folder, history, target=given_scene[3], order=given_scene[2]) == planned(given_scene)


@given(SCENES)
@examples(80)
def test_applying_what_is_pending_leaves_nothing_pending(given_scene: Scene) -> None:
    """Once what was pending is applied nothing more is to be done, and no conflict has come of it on the way."""
    plan = planned(given_scene)
    assume(not plan.conflicts)
    folder, history = made(given_scene)
    rows = {each.version: each for each in history}
    for info in plan.pending:
        assert info.migration is not None
        rows[info.version] = row(info.migration)
        again = make_plan(folder, rows.values(), target=given_scene[3], order=given_scene[2])
        assert not again.conflicts
        assert [each.version for each in again.pending] == [
            each.version for each in plan.pending if each.version > info.version
        ]
    after = make_plan(folder, rows.values(), target=given_scene[3], order=given_scene[2])
    assert not after.pending
    assert after.up_to_date is not bool(after.ahead)


@given(SCENES, st.sets(VERSIONS))
@examples(80)
def test_a_history_is_ours_as_long_as_one_row_is(given_scene: Scene, renamed: set[int]) -> None:
    """It is another project's if and only if no row has a file of its version and name, or of its content."""
    folder, history = made(given_scene)
    history = [replace(each, name="other") if each.version in renamed else each for each in history]
    contents = {each.checksum for each in folder}
    named = {(each.version, each.name) for each in folder}
    ours = [each for each in history if (each.version, each.name) in named or each.checksum in contents]
    plan = make_plan(folder, history, target=given_scene[3], order=given_scene[2])
    assert is_another_projects(plan) is bool(folder and history and not ours)


@given(SCENES)
@examples(50)
def test_a_target_only_takes_away(given_scene: Scene) -> None:
    """With a target, what is pending is what would be without one, up to it; every state stays the same."""
    files, rows, order, target = given_scene
    bounded, whole = planned(given_scene), planned((files, rows, order, None))
    assert bounded.migrations == whole.migrations
    assert bounded.pending == tuple(info for info in whole.pending if target is None or info.version <= target)


def test_a_step_is_named_by_its_file() -> None:
    """A migration of a plan has the name of its file, and of its row where there is no file."""
    renamed = replace(row(migration(1)), name="old")
    assert MigrationInfo(State.APPLIED, migration(1), renamed).name == "m1"
    assert MigrationInfo(State.AHEAD, None, renamed).name == "old"


@pytest.mark.parametrize(
    ("done", "recorded", "told"),
    [
        (1, 2, "  at:      statement 2 of 3, line 3, begun and perhaps done: CALL grow( 'postgresql://a:***@h/d', 1)"),
        (1, 1, "  at:      statement 2 of 3, line 3: CALL grow( 'postgresql://a:***@h/d', 1)"),
        (0, 1, "  at:      statement 1 of 3, line 2, begun and perhaps done: SELECT 1"),
        (3, 3, None),
    ],
)
def test_the_statement_in_doubt_is_named(done: int, recorded: int, told: str | None) -> None:
    """An interrupted migration tells which statement a person has to look for, on one line, without a password."""
    call = "CALL grow(\n  'postgresql://a:geheim@h/d', 1)"
    file = migration(1, f"-- no-transaction\nSELECT 1;\n{call};\nSELECT 3;")
    begun = row(file, finished=False, done=done, begun=done_checksum(split(file.sql)[:recorded]))
    assert conflict_of(MigrationInfo(State.INTERRUPTED, file, begun, 1)).evidence.splitlines()[2:] == (
        [told] if told else []
    )


def test_a_long_statement_is_summed_up() -> None:
    """A conflict shows a statement on one line that a terminal holds."""
    assert summary("SELECT\n  1") == "SELECT 1"
    assert summary("x" * 80) == "x" * 80
    assert summary("x" * 81) == "x" * 79 + "…"
