"""Down sections of other tools: refused in every spelling before anything runs, and never found in prose."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import ampd
from ampd.events import Starting, Warned
from ampd.sql.checks import Caution, Problem, problems
from tests.repetition import examples
from tests.scenes import Heard, folder_of, scripts
from tests.servers import Ampd, Database

SEPARATORS = (
    ("goose", "-- +goose Down"),
    ("sql-migrate", "-- +migrate Down"),
    ("micrate", "-- +micrate Down"),
    ("another tool", "-- +mig Down"),
    ("dbmate", "-- migrate:down"),
    ("dbmate", "-- migrate: down"),
    ("dbmate", "-- migration:down"),
    ("Migrondi", "-- ---------- MIGRONDI:DOWN:1585550763000 ----------"),
    ("tern", "---- create above / drop below ----"),
    ("node-pg-migrate", "-- Down Migration"),
    ("node-pg-migrate", "-- Down Migration (drops everything)"),
    ("MyBatis Migrations", "-- //@UNDO"),
    ("MyBatis Migrations", "--// @UNDO"),
    ("MyBatis Migrations", "-- // what follows is for @UNDO"),
    ("Play", "# --- !Downs"),
    ("Play", "-- !Downs"),
    ("rambler", "-- rambler down"),
    ("shmig", "-- ==== DOWN ===="),
    ("soma-schema", "-- DOWN =="),
    ("Atlas", "-- down.sql --"),
    ("another tool", "-- @DOWN"),
    ("another tool", "-- @down {"),
    ("another tool", "-- @Down()"),
    ("another tool", "-- @UNDO"),
    ("another tool", "--@rollbackQuery"),
    ("another tool", "--;; down"),
)

BARE = (
    "-- down",
    "--down",
    "--- DOWN ---",
    "-- Down:",
    "-- Down.",
    "-- #DOWN",
    "-- [down]",
    "-- ** Down **",
    "-- migrate down",
    "-- Down section",
    "-- down script:",
    "-- Downgrade",
    "-- UNDO",
    "-- Rollback",
    "-- roll back",
    "-- Rollback script",
    "-- revert",
    "/* down */",
)

PROSE = (
    "-- slow down the heartbeat",
    "-- down migration is not needed",
    "-- Down migrations are written by hand",
    "-- there is no down migration",
    "-- down to the last byte",
    "-- this takes the replica down for a minute: see the runbook",
    "-- count down from ten",
    "-- downtime: none",
    "-- downstream readers want the old name",
    "-- breakdown",
    "-- rollback is by restoring the backup",
    "-- rolled back by hand in March",
    "-- undo of 0003 by hand: see the wiki",
    "-- undone",
    "-- revert to the old default, which was 5",
    "-- reverts commit 1234567",
    "-- up and down are directions",
    "-- markdown",
    "-- written down",
    "-- a + slow down",
    "-- + slow down",
    "-- migrate the down-payments",
    "-- migrations go up, never down",
    "-- goose down jackets",
    "-- goose feathers and down",
    "-- settings @download",
    "-- @undocumented",
    "-- drop below zero is refused",
    "-- create above the fold",
    "-- !important: down payments",
    "-- = down payment",
    "-- down = 1",
    "-- shut.down.sql is elsewhere",
    "--rollback DROP TABLE t;",
    "--liquibase formatted sql",
    "--changeset me:1 endDelimiter:;",
    "-- +goose Up",
    "-- +goose StatementBegin",
    "-- +migrate Up",
    "-- migrate:up transaction:false",
    "-- Up Migration",
    "-- rambler up",
    "-- ====  UP  ====",
    "-- !Ups",
    "-- @UP",
    "-- up",
    "/* liquibase rollback */",
    "/*\n-- +goose Down\nDROP TABLE t;\n*/",
    "/* -- migrate:down\nDROP TABLE t; */",
)


def found(comment: str, *, before: str = "CREATE TABLE t ();\n", after: str = "\nDROP TABLE t;\n") -> list[Problem]:
    """Return what is found in a script with that comment between what is done and what would undo it."""
    return list(problems(f"{before}{comment}{after}", transactional=True))


@pytest.mark.parametrize(("tool", "separator"), SEPARATORS)
@pytest.mark.parametrize("transactional", [True, False])
def test_the_separator_of_every_tool_is_refused(tool: str, separator: str, transactional: bool) -> None:
    """Each is found at its line, with the name of the tool that it belongs to, and what to do."""
    (problem,) = problems(f"CREATE TABLE t ();\n{separator}\nDROP TABLE t;\n", transactional=transactional)
    assert type(problem) is Problem
    assert problem.line == 2
    assert problem.message.endswith(f" begins the down section of {tool}, and ampd runs files whole")
    assert problem.hint == "keep only the up part in the file"


def test_a_separator_is_shown_as_it_stands() -> None:
    """The message quotes the marker, on one line and not for ever."""
    assert [each.message for each in found("-- +GOOSE\t DOWN; of it all")] == [
        "`+GOOSE DOWN` begins the down section of goose, and ampd runs files whole"
    ]
    assert [each.message for each in found("-- //" + "x" * 1000 + " @UNDO")] == [
        f"`//{'x' * 58}…` begins the down section of MyBatis Migrations, and ampd runs files whole"
    ]


SPACES = st.text(" \t\xa0", max_size=3)
MARKED = [text.removeprefix("# ").lstrip("- ") for tool, text in SEPARATORS if tool != "tern"]


@given(
    st.sampled_from(MARKED),
    st.text("-", min_size=2, max_size=6),
    SPACES,
    SPACES,
    st.sampled_from(("", ";", ":", ".", " ;", " -- what undoes it", " (all of it)", " ----")),
    st.sampled_from((str, str.upper, str.lower, str.title)),
    st.sampled_from(("\n", "\r\n")),
)
@examples(100)
@example("+goose Down", "---", "", " ", ";", str, "\n")
@example("migrate:down", "--", "", "\t", ";", str.upper, "\r\n")
def test_a_separator_is_refused_however_it_is_spelled(
    marker: str, dashes: str, indent: str, space: str, what_follows: str, case: object, line_end: str
) -> None:
    """Dashes, spaces, case, what follows, the line end: none of it hides a separator."""
    assert callable(case)
    comment = f"{indent.replace(chr(160), ' ')}{dashes}{space}{case(marker)}{what_follows}"
    (problem,) = found(comment, before=f"CREATE TABLE t ();{line_end}", after=f"{line_end}DROP TABLE t;{line_end}")
    assert type(problem) is Problem
    assert " begins the down section of " in problem.message


@pytest.mark.parametrize(
    "script",
    [
        "-- +goose Down\nDROP TABLE t;",
        "\n\n--+goose Down",
        "CREATE TABLE t (); -- +goose Down\nDROP TABLE t;",
        "CREATE TABLE t ()\n-- +goose Down\n",
        "SELECT 1\n-- +goose Down\nDROP TABLE t;",
        "/* +goose Down */ DROP TABLE t;",
        "/* -- +goose Down */ DROP TABLE t;",
        "CREATE TABLE t ();\r-- +goose Down\rDROP TABLE t;",
        "-- +goose Down\nDROP TABLE t;\n-- +goose Up\nCREATE TABLE t ();",
        "BEGIN; CREATE FUNCTION f() RETURNS int LANGUAGE sql AS $$ SELECT 1 -- down\n $$;\n--- +goose Down\n; SELECT 1",
    ],
)
def test_a_separator_is_refused_wherever_it_stands(script: str) -> None:
    """At the beginning, at the end, behind a statement or inside of one that lacks its semicolon."""
    messages = [each.message for each in problems(script, transactional=False)]
    assert [each for each in messages if "down section of goose" in each]


@pytest.mark.parametrize("comment", PROSE)
def test_prose_is_no_separator(comment: str) -> None:
    """A comment that only speaks of such things is no business of ampd's, nor are other tools' up sections."""
    assert found(comment) == []
    assert found(comment, before="") == []


@pytest.mark.parametrize("text", ["'\n-- +goose Down\n'", "$$\n-- +goose Down\n$$", '"\n-- migrate:down\n"'])
def test_a_string_holds_no_separator(text: str) -> None:
    """What is inside of a string, a body or a name is not a comment."""
    assert problems(f"SELECT 1 AS a, {text}; SELECT 2", transactional=True) == ()


@pytest.mark.parametrize("comment", BARE)
def test_a_bare_word_is_a_caution(comment: str) -> None:
    """It may be a heading or a separator: the script runs, and a person is told before."""
    (caution,) = found(comment)
    assert type(caution) is Caution
    assert caution.message == f"`{comment}` may begin a section that undoes the migration, and ampd runs files whole"
    assert (caution.line, caution.hint) == (2, "if it does, keep only the up part in the file")


@pytest.mark.parametrize(
    "script",
    [
        "CREATE TABLE t ();\n-- down\n",
        "CREATE TABLE t ();\n-- down\n-- DROP TABLE t;\n",
        "INSERT INTO ways VALUES (1); -- up\nINSERT INTO ways VALUES (2); -- down\nSELECT 1;",
        "INSERT INTO ways VALUES\n-- up\n(1),\n-- down\n(2);\nSELECT 1",
        "CREATE TYPE way AS ENUM (\n  'up',\n  -- down\n  'down'\n); SELECT 1",
    ],
)
def test_a_bare_word_counts_between_statements_only(script: str) -> None:
    """Where nothing follows, in a line of code, or inside of a statement it begins nothing."""
    assert problems(script, transactional=True) == ()


@pytest.mark.parametrize(
    ("up", "down"),
    [
        ("-- Up", "-- Down"),
        ("-- UP --", "-- DOWN --"),
        ("--up", "--down:"),
        ("-- Upgrade", "-- Downgrade"),
        ("-- Up migration", "-- Down migration drops it"),
    ],
)
def test_a_bare_down_beside_an_up_is_refused(up: str, down: str) -> None:
    """The two together are how several tools part a file, and there is nothing else that they could mean."""
    (problem,) = found(down, before=f"{up}\nCREATE TABLE t ();\n")
    assert (type(problem), problem.line) == (Problem, 3)
    assert " begins the down section of " in problem.message
    (again,) = found("SELECT 1;", before=f"{down}\nDROP TABLE t;\n{up}\nCREATE TABLE t ();\n")
    assert (type(again), again.line) == (Problem, 1)


@pytest.mark.anyio
async def test_a_down_section_is_refused_before_anything_runs(database: Database) -> None:
    """Nothing of any pending file is run, and the error says where the section begins and whose it is."""
    files = scripts("CREATE TABLE a ();", "CREATE TABLE b ();\n-- migrate:down;\nDROP TABLE b;\n")
    with pytest.raises(ampd.InvalidMigration) as error:
        await ampd.migrate(database.url, migrations=files)
    assert error.value.message == (
        "2_step.sql:2: `migrate:down` begins the down section of dbmate, and ampd runs files whole"
    )
    assert (error.value.file, error.value.line, error.value.column) == ("2_step.sql", 2, 1)
    assert error.value.hint == "keep only the up part in the file"
    assert await database.fetchval("SELECT count(*) FROM pg_class WHERE relname IN ('a', 'b')") == 0


@pytest.mark.anyio
async def test_what_is_applied_may_hold_one(database: Database) -> None:
    """A folder of another tool whose history was taken over stays usable: only pending files are looked at."""
    files = scripts("CREATE TABLE a ();", "CREATE TABLE b ();\n-- migrate:down\nDROP TABLE b;\n")
    await ampd.migrate(database.url, migrations=files[:1])
    await database.execute(
        "INSERT INTO ampd_schema_migrations (version, name, checksum, started_at, finished_at, statements_done, "
        f"applied_by, ampd_version) SELECT 2, 'step', '\\x{files[1].checksum.hex()}', now(), now(), 1, 'a', 'b'"
    )
    await ampd.migrate(database.url, migrations=(*files, *scripts("", "", "CREATE TABLE c ();")[2:]))
    assert await database.fetchval("SELECT to_regclass('c') IS NOT NULL")


DOUBTFUL = "CREATE TABLE t ();\n-- down\nDROP TABLE t;\n"
DOUBT = (
    "`-- down` may begin a section that undoes the migration, and ampd runs files whole; "
    "if it does, keep only the up part in the file"
)


@pytest.mark.anyio
async def test_a_caution_is_told_before_anything_runs(database: Database) -> None:
    """Every pending file's cautions come first, once, and then the files run."""
    heard = Heard()
    await ampd.migrate(database.url, migrations=scripts("SELECT 1;", DOUBTFUL), on_event=heard)
    warned = [event.message for event in heard.of(Warned)]
    assert warned == [f"2_step.sql:2: {DOUBT}"]
    assert heard.index(heard.of(Warned)[0]) < heard.index(heard.of(Starting)[0])
    heard.clear()
    await ampd.migrate(database.url, migrations=scripts("SELECT 1;", DOUBTFUL), on_event=heard)
    assert heard.of(Warned) == []


def test_a_caution_is_told_by_every_command_that_looks_at_pending_files(
    database: Database, ampd: Ampd, tmp_path: Path
) -> None:
    """`--check`, `--dry-run` and `migrate` say the same on stderr, and nothing of it on stdout."""
    folder = folder_of(tmp_path / "m", DOUBTFUL)
    for arguments in (["--check"], ["--dry-run"], ["--check", "--json"], []):
        done = ampd("migrate", *arguments, "--migrations", folder, url=database.url)
        assert f"warning: {folder}/1_step.sql:2: {DOUBT}\n" in done.stderr
        assert "warning" not in done.stdout
        assert "may begin" not in done.stdout


@pytest.mark.parametrize(
    ("files", "undone"),
    [
        (["1_a.sql", "2_a_down.sql"], {2: 1}),
        (["1_a_up.sql", "2_a_down.sql"], {2: 1}),
        (["1_a.up.sql", "2_a-down.sql"], {2: 1}),
        (["1_a.sql", "2_A.UNDO.sql"], {2: 1}),
        (["1_a.sql", "2_a.rollback.sql", "3_b.sql", "4_b_undo.sql"], {2: 1, 4: 3}),
        (["1_a.sql", "2_scale_down.sql"], {}),
        (["1_a.sql", "2_down.sql", "3_a_down_payments.sql", "4_b_down.sql"], {}),
        (["1_a_down.sql"], {}),
    ],
)
def test_the_name_of_what_undoes_another(tmp_path: Path, files: list[str], undone: dict[int, int]) -> None:
    """A down file counts only beside the file that it undoes."""
    from ampd.migration import reversals

    for file in files:
        (tmp_path / file).write_text("SELECT 1")
    found = reversals(ampd.read_migrations(tmp_path))
    assert {version: original.version for version, original in found.items()} == undone


@pytest.mark.anyio
async def test_a_down_file_beside_its_up_file_is_told(database: Database, tmp_path: Path) -> None:
    """It runs like any other file, and whoever runs it is told before."""
    (tmp_path / "0001_a.sql").write_text("CREATE TABLE a ();")
    (tmp_path / "0002_a_down.sql").write_text("DROP TABLE a;")
    heard = Heard()
    await ampd.migrate(database.url, migrations=ampd.read_migrations(tmp_path), on_event=heard)
    assert [event.message for event in heard.of(Warned)] == [
        f"{tmp_path}/0002_a_down.sql has the name of what undoes {tmp_path}/0001_a.sql, and ampd runs it like any "
        "other migration; name it 1_a.down.sql, which ampd ignores, if it does"
    ]
