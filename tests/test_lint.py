"""`ampd lint`: what squawk finds, with what ampd knows of how a file runs, in each format."""

import json
import os
import sys
from pathlib import Path

import msgspec
import pytest

from ampd import ConfigError, InvalidMigration
from ampd.cli.lint import find_squawk, run_squawk
from ampd.lint import Finding, Remark, findings
from ampd.resources import read_migrations
from tests.cli_output import error, seen
from tests.folders import write
from tests.scenes import scripts
from tests.servers import Ampd

pytestmark = pytest.mark.one_version

INDEX = Remark(
    0, 0, "require-concurrent-index-creation", "During normal index creation, table updates are blocked.", "Use it."
)
DROP = Remark(0, 0, "ban-drop-table", "Dropping a table may break existing clients.")
CHECK = Remark(0, 14, "constraint-missing-not-valid", "By default new constraints require a table scan.", "Use it.")
FOREIGN = Remark(0, 18, "adding-foreign-key-constraint", "It requires a table scan and a lock.")


def rules(*texts: str, remark: Remark, pending: bool = True) -> list[str]:
    """Return the rules that are left of one remark on the last of some files."""
    files = scripts(*texts)
    return [each.rule for each in findings([(each, [remark] * (each is files[-1])) for each in files], pending=pending)]


def test_a_finding_stands_where_an_editor_shows_it() -> None:
    """Lines and columns are counted from 1, in characters; squawk's from 0, in bytes, a lone CR being a line end."""
    (migration,) = scripts('SELECT 1;\r\nSELECT 2;\rSELECT 3; /* é€😀 */ ALTER TABLE old ADD "é" int NOT NULL;\n')
    remark = Remark(2, 26, "adding-required-field", "It is required.", "Make it nullable.")
    hint = (
        "add it without NOT NULL, fill it in batches in a `-- no-transaction` file; then ADD CONSTRAINT … CHECK "
        "(… IS NOT NULL) NOT VALID, VALIDATE it in the next file, and then SET NOT NULL"
    )
    finding = Finding("1_step.sql", 2, 31, "adding-required-field", "It is required.", hint)
    assert findings([(migration, [remark])], pending=False) == [finding]
    assert migration.sql.split("\n")[1][30:].startswith("ALTER")


@pytest.mark.parametrize(
    ("remark", "sql", "hint"),
    [
        (
            INDEX,
            "CREATE INDEX",
            "write CREATE INDEX CONCURRENTLY, and make `-- no-transaction` the first line of the file",
        ),
        (msgspec.structs.replace(INDEX, line=1), "-- no-transaction\nCREATE INDEX", "write CREATE INDEX CONCURRENTLY"),
        (CHECK, "ALTER TABLE x ADD CHECK (a > 1)", "add it NOT VALID, and VALIDATE CONSTRAINT in the next file"),
        (
            DROP,
            "DROP TABLE x",
            "if no running program depends on it, write `-- lint: allow ban-drop-table because REASON` "
            "before the statement",
        ),
        (
            Remark(0, 0, "syntax-error", "expected SEMICOLON", None),
            "CREATE ODD x",
            "correct the statement; or, if the server does take it, write `-- lint: allow syntax-error because REASON` "
            "before it",
        ),
        (Remark(0, 0, "ban-new", "It is new.", "Squawk's help."), "DROP x", "Squawk's help."),
    ],
)
def test_hints_are_in_the_words_of_ampd(remark: Remark, sql: str, hint: str) -> None:
    """They name the directive and the next file; what ampd has no words for keeps squawk's."""
    assert [each.hint for each in findings([(scripts(sql)[0], [remark])], pending=False)] == [hint]


@pytest.mark.parametrize("rule", ["require-lock-timeout", "prefer-robust-stmts", "prefer-timestamp-tz"])
def test_what_ampd_does_itself_or_locks_nothing_is_no_finding(rule: str) -> None:
    """Timeouts are set by ampd, files are run as a whole or resumed, and style is not its business."""
    assert rules("CREATE TABLE a ();", remark=Remark(0, 0, rule, "…")) == []


def test_one_constraint_is_one_finding() -> None:
    """The more precise of two remarks on one constraint is left; of two constraints both are."""
    (migration,) = scripts("ALTER TABLE x ADD FOREIGN KEY (a) REFERENCES y (a);")
    assert [each.rule for each in findings([(migration, [CHECK, FOREIGN])], pending=False)] == [FOREIGN.rule_name]
    (migration,) = scripts("ALTER TABLE x ADD CHECK (a > 1), ADD COLUMN b int REFERENCES y (a);")
    two = [CHECK, msgspec.structs.replace(FOREIGN, column=33)]
    assert len(findings([(migration, two)], pending=False)) == 2


NEW = "CREATE UNLOGGED TABLE App.a (n int);"
ON_NEW = "CREATE UNIQUE INDEX ON app.A (n);"


@pytest.mark.parametrize(
    ("texts", "pending", "left"),
    [
        ((NEW, ON_NEW), True, 0),
        ((NEW, ON_NEW), False, 1),  # the first may have been applied a year ago
        (("SELECT 1;", ON_NEW + NEW), True, 1),
        (("CREATE TABLE a (n int);", ON_NEW), True, 1),  # perhaps of another schema
        (("CREATE TABLE IF NOT EXISTS app.a (n int);", ON_NEW), True, 1),
        (("CREATE TABLE app.a (n) AS SELECT 1;", ON_NEW), True, 1),
        ((NEW, "CREATE INDEX CONCURRENTLY i ON ONLY app.a (n);"), True, 0),
        ((NEW, "CREATE INDEX i ON app.b (n);"), True, 1),
        ((NEW, "ALTER TABLE ONLY app.a ADD CHECK (n > 0);"), True, 0),
        ((NEW, "ALTER TABLE app.a ADD FOREIGN KEY (n) REFERENCES app.a (n);"), True, 0),
        ((NEW, "ALTER TABLE app.a ADD FOREIGN KEY (n) REFERENCES b (n);"), True, 1),  # which it locks as well
        ((NEW, "DROP INDEX i;"), True, 1),
    ],
)
def test_a_lock_on_a_new_table_harms_nobody(texts: tuple[str, ...], pending: bool, left: int) -> None:
    """A table that an earlier pending file creates, and leaves empty, is new; whatever is not certain is a finding."""
    assert len(rules(*texts, remark=INDEX, pending=pending)) == left


def test_dropping_a_new_table_is_a_finding() -> None:
    """What breaks programs rather than locks them out stays, whatever the table's age."""
    assert rules("CREATE TABLE a (n int);", "DROP TABLE a;", remark=DROP) == ["ban-drop-table"]


@pytest.mark.parametrize(
    ("sql", "left"),
    [
        ("-- lint: allow ban-drop-table because unused since May\nSELECT 1;\nDROP TABLE a;", 0),
        ("SELECT 1;\n--  LINT:  Allow  Ban-Drop-Table Because unused\nDROP TABLE a;", 0),
        ("SELECT 1;\nDROP TABLE -- lint: allow ban-drop-table because unused\na;", 0),
        ("SELECT 1;\n-- lint: allow ban-drop-view because unused\nDROP TABLE a;", 1),
        ("SELECT 1;\n-- lint: allow ban-drop-table because unused\nSELECT 2; DROP TABLE a;", 1),
        ("SELECT 1;\nDROP TABLE a; -- lint: allow ban-drop-table because unused", 1),
        ("SELECT '\n-- lint: allow ban-drop-table because unused\n'; DROP TABLE a;", 1),
    ],
)
def test_a_comment_allows_a_rule(sql: str, left: int) -> None:
    """Before a statement it holds for that one, in the leading comments for the file; in a string it is none."""
    line = sql.count("\n", 0, sql.index("DROP TABLE"))
    column = sql.index("DROP TABLE") - sql.rfind("\n", 0, sql.index("DROP TABLE")) - 1
    remark = msgspec.structs.replace(DROP, line=line, column=column)
    assert len(rules(sql, remark=remark)) == left


@pytest.mark.parametrize(
    "comment", ["allow ban-drop-table", "allow ban-drop-table because ", "allow because unused", "allow"]
)
def test_a_rule_is_not_allowed_without_a_reason(comment: str) -> None:
    """It is an error, with file and line and what to write."""
    with pytest.raises(InvalidMigration) as caught:
        rules(f"SELECT 1;\n-- lint: {comment}\nDROP TABLE a;", remark=DROP)
    assert str(caught.value) == (
        "1_step.sql:2: `-- lint: allow` needs a rule and a reason\nhint: write `-- lint: allow RULE because REASON`"
    )
    assert (caught.value.version, caught.value.line) == (1, 2)


# --- with squawk itself

SQUAWK = Path(sys.executable).with_name("squawk")
with_squawk = pytest.mark.skipif(not SQUAWK.exists(), reason="needs squawk, which .ci/lock/dev.txt has")

FILES = {
    "1_a.sql": "CREATE TABLE a (n int NOT NULL);\n",
    "2_b.sql": "CREATE INDEX a_n ON a (n);\n",
    "3_c.sql": "-- no-transaction\nCREATE INDEX CONCURRENTLY a_m ON a (n);\n",
}
MESSAGE = "During normal index creation, table updates are blocked, but reads are still allowed."
HINT = "write CREATE INDEX CONCURRENTLY, and make `-- no-transaction` the first line of the file"
TEXT = f"""\
m/2_b.sql:1:1: require-concurrent-index-creation: {MESSAGE}
  hint: {HINT}
3 migrations, 1 finding
"""
GITHUB = f"""\
::warning file=m/2_b.sql,line=1,col=1::require-concurrent-index-creation: {MESSAGE}%0Ahint: {HINT}
3 migrations, 1 finding
"""
FOUND = {
    "file": "m/2_b.sql",
    "line": 1,
    "column": 1,
    "rule": "require-concurrent-index-creation",
    "message": MESSAGE,
    "hint": HINT,
}


@with_squawk
def test_the_packaged_migrations_pass(ampd: Ampd) -> None:
    """Nothing in amp's schema locks or breaks a live database."""
    number = len(read_migrations())
    assert seen(ampd("lint")) == (0, f"{number} migrations, nothing found\n", "")


@with_squawk
def test_findings_in_each_format(ampd: Ampd, tmp_path: Path) -> None:
    """Text for people, a document for programs, annotations for GitHub, there by itself; exit 1."""
    write(tmp_path / "m", FILES)
    here = ("lint", "--migrations", "m")
    actions = {"GITHUB_ACTIONS": "true"}
    assert seen(ampd(*here, env={"GITHUB_ACTIONS": ""})) == (1, TEXT, "")
    assert seen(ampd(*here, env=actions)) == (1, GITHUB, "")
    assert seen(ampd(*here, "--format", "github")) == (1, GITHUB, "")
    assert seen(ampd(*here, "--format", "text", env=actions)) == (1, TEXT, "")
    process = ampd(*here, "--format", "json", env=actions)
    assert (process.returncode, json.loads(process.stdout), process.stderr) == (
        1,
        {"result": "findings", "findings": [FOUND]},
        "",
    )


@with_squawk
def test_files_that_are_given_are_pending(ampd: Ampd, tmp_path: Path) -> None:
    """In any order: a table that one of them creates is new in another; and a document says that all is clean."""
    write(tmp_path / "m", FILES)
    process = ampd("lint", "m/2_b.sql", "m/1_a.sql", "m/1_a.sql", "--format=json")
    assert (process.returncode, json.loads(process.stdout)) == (0, {"result": "clean", "findings": []})
    folder = os.fsdecode(b"\xff")
    write(tmp_path / folder, {"1_a.sql": "DROP TABLE a;"})
    process = ampd("lint", f"{folder}/1_a.sql", "--format", "json")
    assert [each["file"] for each in json.loads(process.stdout)["findings"]] == ["\N{REPLACEMENT CHARACTER}/1_a.sql"]
    assert seen(ampd("lint", "2_b.sql", cwd=tmp_path / "m", env={"GITHUB_ACTIONS": ""}))[1].startswith("2_b.sql:1:1: ")


@with_squawk
def test_the_configuration_lists_exceptions(ampd: Ampd, tmp_path: Path) -> None:
    """For applied files, which must not change: a rule and a file each."""
    write(tmp_path / "m", FILES)
    variable = "AMP_CONFIG_METADATA_DB__MIGRATIONS__LINT_ALLOW"
    here = ("lint", "--migrations", "m", "--format", "text")
    rule = "require-concurrent-index-creation"
    assert seen(ampd(*here, env={variable: f"ban-x:1_a.sql,{rule}:2_b.sql"})) == (
        0,
        "3 migrations, nothing found\n",
        "",
    )
    assert seen(ampd(*here, env={variable: f"{rule}:1_a.sql"})) == (1, TEXT, "")


@with_squawk
@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ["m/9_x.sql", "m/1_a.sql", "m/1_a.down.sql", "m", "nosuch/1_a.sql"],
            "m/9_x.sql, m/1_a.down.sql, m, nosuch/1_a.sql: not a migration file",
            "give files <version>_<name>.sql that are there, or their folder with --migrations",
        ),
        (
            ["m/1_a.sql", "--migrations", "m"],
            "both files and --migrations are given",
            "give the files, or their folder",
        ),
        (["--bogus"], "unknown option: --bogus", "`ampd lint --help` lists the options"),
    ],
)
def test_what_cannot_be_read(ampd: Ampd, tmp_path: Path, arguments: list[str], message: str, hint: str) -> None:
    """It is an error on stderr, and in the document."""
    write(tmp_path / "m", {**FILES, "1_a.down.sql": "DROP TABLE a;"})
    assert seen(ampd("lint", *arguments)) == (1, "", f"error: {message}\nhint: {hint}\n")
    document = json.loads(ampd("lint", *arguments, "--format", "json").stdout)
    assert document == {"result": "failed", "findings": [], "error": error("config", message, hint)}


@with_squawk
def test_settings_of_squawk_are_those_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in a folder above it, which may be somebody else's, switches nothing off."""
    (migration,) = scripts("DROP TABLE a;")
    write(tmp_path, {".squawk.toml": 'excluded_rules = ["ban-drop-table"]'})
    for folder, is_found in ((tmp_path, False), (write(tmp_path / "below", {}), True)):
        monkeypatch.chdir(folder)
        rules = [each.rule_name for each in run_squawk(find_squawk(), migration)]
        assert ("ban-drop-table" in rules) == is_found


def test_squawk_that_is_missing_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how to install it; and what it said, if it says no findings."""
    (migration,) = scripts("SELECT 1;")
    assert not SQUAWK.exists() or find_squawk() == str(SQUAWK)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        find_squawk()
    assert str(caught.value) == (
        "squawk, which finds what lint reports, is not installed\nhint: pip install 'ampd-migrate[lint]'"
    )
    squawk = tmp_path / "squawk"
    for script, said in [
        ("#!/bin/sh\necho too old >&2", "says: too old"),
        ("#!/bin/sh\nexit 3", "says: nothing, exit code 3"),
        ("#!/nowhere/sh", "cannot be run: No such file or directory"),
    ]:
        squawk.write_text(script)
        squawk.chmod(0o755)
        assert find_squawk() == str(squawk)
        with pytest.raises(ConfigError) as caught:
            run_squawk(str(squawk), migration)
        assert str(caught.value) == f"{squawk} {said}\nhint: pip install --upgrade 'ampd-migrate[lint]'"
