"""The exceptions: one tree, stable codes, and what each says of itself."""

import json
import pickle
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ampd
from ampd import AmpdError, LockTimeout, MigrationConflict, MigrationFailed, MigrationInterrupted, errors, redaction
from ampd.migration import AppliedMigration, Migration
from ampd.other_sessions import Blocker
from ampd.plan import make_plan
from ampd.report import Report
from tests.cli_output import restore
from tests.repetition import examples

CODES = {
    "ConfigError": "config",
    "ConnectionFailed": "connection",
    "PermissionDenied": "permission",
    "MigrationConflict": "conflict",
    "MigrationFailed": "migration_failed",
    "AdvisoryLockTimeout": "advisory_lock_timeout",
    "LockTimeout": "lock_timeout",
    "InvalidMigration": "invalid_migration",
    "MigrationInterrupted": "interrupted",
}
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
FIELDS = ["code", "message", "hint", "version", "file", "line", "column", "sqlstate", "detail"]


def subclasses(above: type[AmpdError]) -> list[type[AmpdError]]:
    """Return all that derives from a class, at any depth."""
    return [each for direct in above.__subclasses__() for each in (direct, *subclasses(direct))]


EVERY = subclasses(AmpdError)


def test_the_codes_are_those_of_the_contract() -> None:
    """The contract's nine classes have its nine codes; a finer class has the code of the one that it refines."""
    assert {name: getattr(ampd, name).code for name in CODES} == CODES
    assert {each.code for each in EVERY} == set(CODES.values())
    finer = [each for each in EVERY if each.__name__ not in CODES]
    assert finer
    assert {each.__bases__[0].__name__ for each in finer} == {"ConnectionFailed"}


def test_every_class_is_public() -> None:
    """Whatever ampd raises can be caught by a public name."""
    public = {getattr(ampd, name) for name in ampd.__all__}
    assert [each.__name__ for each in EVERY if each not in public] == []
    assert AmpdError in public


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """The tree drawn in the module shows each class once, below the class that it derives from."""
    drawn: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ([│├└─ ]*)([A-Z]\w+)(?:  |$)", line):
            drawn.append((len(match[1]) // 4, match[2]))
    parents: dict[int, str] = {-1: "Exception"}
    tree = {}
    for depth, name in drawn:
        tree[name] = parents[depth - 1]
        parents[depth] = name
    assert len(tree) == len(drawn)
    assert tree == {"AmpdError": "Exception"} | {each.__name__: each.__bases__[0].__name__ for each in EVERY}


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({}, "it failed"),
        ({"hint": "do so"}, "it failed\nhint: do so"),
        ({"detail": "why"}, "it failed\ndetail: why"),
        ({"excerpt": "f.sql:1:1\n  |"}, "it failed\nf.sql:1:1\n  |"),
        (
            {"hint": "do so", "detail": "why", "excerpt": "f.sql:1:1\n  |", "version": 1, "sqlstate": "42601"},
            "it failed\nf.sql:1:1\n  |\ndetail: why\nhint: do so",
        ),
    ],
)
def test_what_an_error_says(facts: dict[str, Any], text: str) -> None:
    """Printed, an error is its message, then the excerpt, the detail and the hint where it has them."""
    assert str(MigrationFailed("it failed", **facts)) == text


@pytest.mark.parametrize("kind", [each for each in EVERY if not issubclass(each, (MigrationConflict, LockTimeout))])
def test_an_error_carries_its_fields(kind: type[AmpdError]) -> None:
    """Each error carries what the JSON document shows, None where not given."""
    bare = kind("it failed")
    assert bare.fields() == dict.fromkeys(FIELDS) | {"code": kind.code, "message": "it failed"}
    assert list(bare.fields()) == FIELDS
    facts: dict[str, Any] = {
        "hint": "h",
        "version": 1,
        "file": "f",
        "line": 2,
        "column": 3,
        "sqlstate": "42601",
        "detail": "d",
    }
    full = kind("it failed", **facts)
    assert full.fields() == {"code": kind.code, "message": "it failed"} | facts
    assert {name: getattr(full, name) for name in FIELDS} == full.fields()
    assert full.report is None


def test_a_lock_timeout_names_the_blockers() -> None:
    """A lock timeout carries who stood in the way, and the facts of any error."""
    blocker = Blocker(pid=7, user=None, application=None, client=None, state=None, since=None, query=None)
    error = LockTimeout("late", blockers=(blocker,), hint="h", version=3)
    assert error.blockers == (blocker,)
    assert error.fields() == dict.fromkeys(FIELDS) | {
        "code": "lock_timeout",
        "message": "late",
        "hint": "h",
        "version": 3,
        "blockers": [blocker],
    }


def conflicts() -> MigrationConflict:
    """Return an error over two conflicts: a changed file and a missing one."""
    file = Migration(1, "jobs", "sql/1_jobs.sql", "", b"\x01" * 32)
    rows = (
        AppliedMigration(1, "jobs", b"\x02" * 32, NOON, NOON, 1, "amp", "0.1.0"),
        AppliedMigration(2, "gone", b"\x03" * 32, NOON, NOON, 1, "deploy", "0.1.0"),
    )
    found = make_plan([file, Migration(3, "new", "sql/3_new.sql", "", b"")], rows).conflicts
    return MigrationConflict("2 migrations are in conflict", conflicts=found, hint="resolve each")


GONE = "'sql/*2_gone*'"


def test_a_conflict_lists_every_case() -> None:
    """All conflicts are told at once, each with version, name, both checksums, when, by whom and what to do."""
    assert str(conflicts()) == (
        "2 migrations are in conflict\n"
        "1 jobs was applied and its file has changed since\n"
        f"  file:    sql/1_jobs.sql, SHA-256 {'01' * 32}\n"
        f"  applied: 2026-01-02 12:00:00+0000 by amp, SHA-256 {'02' * 32}\n"
        f"  to do:   {restore('sql/1_jobs.sql')}\n"
        "2 gone was applied and there is no such file: the files at hand go from 1 jobs to 3 new\n"
        "  file:    none\n"
        f"  applied: 2026-01-02 12:00:00+0000 by deploy, SHA-256 {'03' * 32}\n"
        f"  to do:   {restore(GONE)}\n"
        "hint: resolve each"
    )
    assert conflicts().version == 1
    assert [each["version"] for each in conflicts().fields()["conflicts"]] == [1, 2]  # type: ignore[attr-defined]


def test_a_single_conflict_is_told_once() -> None:
    """With one conflict its message and its hint are those of the error, and its evidence stands between them."""
    (changed, _) = conflicts().conflicts
    assert str(MigrationInterrupted(changed.message, conflicts=(changed,), hint=changed.hint)) == (
        "1 jobs was applied and its file has changed since\n"
        f"  file:    sql/1_jobs.sql, SHA-256 {'01' * 32}\n"
        f"  applied: 2026-01-02 12:00:00+0000 by amp, SHA-256 {'02' * 32}\n"
        f"hint: {restore('sql/1_jobs.sql')}"
    )


def test_a_conflict_without_a_case() -> None:
    """A schema that is behind is a conflict of no single migration."""
    error = MigrationConflict("behind", hint="migrate")
    assert (str(error), error.version, error.fields()["conflicts"]) == ("behind\nhint: migrate", None, [])


@pytest.mark.parametrize("kind", EVERY)
def test_an_error_survives_being_sent_to_another_process(kind: type[AmpdError]) -> None:
    """Pickled, as worker processes send exceptions, an error keeps its class, its facts and its report."""
    error = conflicts() if kind is MigrationConflict else kind("it failed", hint="do so")
    error.report = Report("h:5432/amp", None, 1, (), ())
    received = pickle.loads(pickle.dumps(error))
    assert type(received) is type(error)
    assert (str(received), received.fields(), received.report) == (str(error), error.fields(), error.report)


def test_fields_hold_no_excerpt() -> None:
    """No text of a migration goes into the document: it is for the person at the terminal."""
    error = MigrationFailed("it failed", excerpt="INSERT INTO secrets VALUES ('x')")
    assert "INSERT" not in json.dumps(error.fields())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no postgresql://u:sekret@h:5432/db here", "no postgresql://u:***@h:5432/db here"),
        ("no postgresql:/u:sekret@h/db: not found", "no postgresql:/u:***@h/db: not found"),
        ("mysql://me@tenant:se@k/r:e?t@h", "mysql://me@tenant:***@h"),
        ('"postgresql://:se kret@h"', '"postgresql://:***@h"'),
        (
            "postgresql://u:se%6Bret@a:1,b:2/db?sslpassword=sekret&a=b",
            "postgresql://u:***@a:1,b:2/db?sslpassword=***&a=b",
        ),
        ("postgresql:///db?pass%77ord=sekret", "postgresql:///db?pass%77ord=***"),
        ("host=h password='se kret' user=u", "host=h password=*** user=u"),
        ("host=h password = 'it\\'s sekret' user=u", "host=h password = *** user=u"),
        ("host=h password = sekret", "host=h password = ***"),
        ("host=h password='sekret and", "host=h password=***"),
        ("1 | CREATE ROLE x PASSWORD 'sekret';", "1 | CREATE ROLE x PASSWORD ***;"),
        ("postgresql://u:a@h and postgresql://v:b@i", "postgresql://u:***@h and postgresql://v:***@i"),
    ],
)
def test_no_text_of_an_error_shows_the_password_of_a_url(text: str, shown: str) -> None:
    """A URL that stands where none belongs is repeated without its password, in every field and as printed."""
    error = MigrationFailed(text, hint=text, file=text, detail=text, excerpt=text)
    assert str(error) == f"{shown}\n{shown}\ndetail: {shown}\nhint: {shown}"
    assert (error.args, error.file, error.fields()["file"]) == ((shown,), shown, shown)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://h:5432/db",
        "postgresql:///amp?host=/tmp/x&port=5432&user=postgres",
        "see http://h:80/x, or ask me at x:y",
        "SELECT 'http://h:80', 'me@example.com'",
        "Key (password)=(x) already exists.",
        "m/1_x.sql:2: relation does not exist",
    ],
)
def test_what_holds_no_password_is_repeated_as_it_is(text: str) -> None:
    """Nothing else is taken for a password."""
    assert str(MigrationFailed(text)) == text


# What the search for passwords means, in one expression that takes quadratic time.
_REFERENCE = re.compile(r"""(\w:/{1,2}[^\s:/]*):(?:\S*|[^\n'"]*)@""")
_PIECES = st.lists(st.sampled_from(["a", ":", "/", "//", "@", " ", "\n", "'", '"', "p://u:", "x:/"]), max_size=20)


@given(_PIECES)
@examples(250)
def test_passwords_are_found_as_one_expression_finds_them(pieces: list[str]) -> None:
    """Reading each stretch of a text once finds what a backtracking expression finds."""
    text = "".join(pieces)
    assert redaction.masked(text) == _REFERENCE.sub(r"\1:***@", text)


@pytest.mark.parametrize(
    "unit", ["a:/b:", "a://:", "a:/b: ", "a:/:@ ", "a:/b:'", "password='", "password $", "password $$"]
)
def test_the_search_for_passwords_is_linear(unit: str) -> None:
    """What takes a fraction of a second would take a quarter of an hour if it were quadratic."""
    redaction.masked(unit * (500_000 // len(unit)))
    text = unit * (500_000 // len(unit))
    assert redaction._without_passwords(text).count("***") == ("@" in unit) * (500_000 // len(unit))


def test_a_long_text_is_cut_once_its_passwords_are_gone() -> None:
    """A text of the server may be of any length; where it is cut no half of a password is left."""
    secret = "postgresql://u:geheim@h/d "
    shown = redaction.masked(f"{'x' * 19_990} {secret}{secret * 10_000}")
    assert (len(shown), shown[-30:]) == (20_012, "xxxxxxxx postgresq… (and more)")
    assert "geheim" not in redaction.masked(f"{'x' * 19_990} postgresql://u:{'geheim' * 10_000}@h/d")
