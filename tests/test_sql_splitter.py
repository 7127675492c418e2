"""A script is split where PostgreSQL splits it: literal tables, and its own parser as the judge."""

import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given

from ampd.sql.checks import problems
from ampd.sql.scanner import Statement
from ampd.sql.splitter import split
from tests.repetition import examples
from tests.sql_texts import NASTY, SCRIPTS, accepted, assert_split_as_postgresql_does


@pytest.mark.parametrize("script", NASTY)
def test_statements_end_where_postgresql_ends_them(script: str) -> None:
    """Every nasty construct is split exactly as by PostgreSQL's own parser."""
    assert_split_as_postgresql_does(script)


def test_a_statement_knows_its_place_and_its_words() -> None:
    """A statement carries its text without semicolon and outer comments, its place and its leading words."""
    script = '-- first\ncreate Unique index if not exists i /* x */ ON t (a) -- why\n;\n\nDROP TABLE "ON" ;'
    assert split(script) == (
        Statement(
            text="create Unique index if not exists i /* x */ ON t (a)",
            start=9,
            end=61,
            line=2,
            words=("CREATE", "UNIQUE", "INDEX", "IF", "NOT", "EXISTS", "I", "ON"),
        ),
        Statement(text='DROP TABLE "ON"', start=72, end=87, line=5, words=("DROP", "TABLE")),
    )


@pytest.mark.parametrize("script", ["", " \n\t", ";", ";;\n;", "-- nothing", "/* nothing; */", "--\r;--\n/**/;"])
def test_empty_statements_are_dropped(script: str) -> None:
    """Comments, white space and lone semicolons are no statements."""
    assert split(script) == ()


@pytest.mark.parametrize(
    ("script", "texts"),
    [
        ("\\connect db\nSELECT 1;", ["\\connect db", "SELECT 1"]),
        ("SELECT 1 \\gset\n; SELECT 2", ["SELECT 1 \\gset", "SELECT 2"]),
        ("SELECT 1; SELECT 'a; b", ["SELECT 1", "SELECT 'a; b"]),
        ("SELECT 1; SELECT E'a\\'; b", ["SELECT 1", "SELECT E'a\\'; b"]),
        ("SELECT 1; SELECT 'a''; b", ["SELECT 1", "SELECT 'a''; b"]),
        ("SELECT 1; /* a; /* b; */", ["SELECT 1", "/* a; /* b; */"]),
        ("SELECT $a$ ; $b$ ; $", ["SELECT $a$ ; $b$ ; $"]),
        ("SELECT (1; SELECT 2", ["SELECT (1; SELECT 2"]),
        ("SELECT 1); SELECT 2", ["SELECT 1)", "SELECT 2"]),
        ("CREATE FUNCTION f() BEGIN ATOMIC SELECT CASE; END; SELECT 2", None),
        ("SELECT $a; SELECT 2$; SELECT 3", ["SELECT $a", "SELECT 2$", "SELECT 3"]),
    ],
)
def test_what_is_no_sql_degrades_gracefully(script: str, texts: list[str] | None) -> None:
    """Text that PostgreSQL would refuse still comes apart without loss, in the most useful way."""
    found = [statement.text for statement in split(script)]
    assert found == (texts or ["CREATE FUNCTION f() BEGIN ATOMIC SELECT CASE; END", "SELECT 2"])


def test_statements_are_found_in_linear_time() -> None:
    """However often a routine's body seems to begin, the statement is looked at once; else this takes minutes."""
    for piece in ("begin atomic ", "CREATE FUNCTION f() BEGIN ATOMIC "):
        assert len(split(piece * 100_000)) == 1


LONG = {
    "string": "'" + "it''s\n" * 100_000 + "'",
    "string in lines": "'a'\n" * 100_000,
    "escapes": "E'" + "\\\\'';\\'\n" * 100_000 + "'",
    "dollar": "$a$" + "$b$;" * 100_000 + "$a$",
    "name": '"' + 'a"";' * 100_000 + '"',
    "block comment": "1/*" + "/* ; */" * 100_000 + "*/",
    "line comment": "1--" + "; '" * 200_000,
    "list": "(" + "(1, 'a;', (2)), " * 50_000 + "(3))",
    "operators": "1" + " + 1" * 200_000,
}


@pytest.mark.parametrize("part", LONG.values(), ids=LONG)
def test_what_is_long_is_split_as_well_and_takes_no_memory(part: str) -> None:
    """Neither the length of a literal, a comment or a list nor what is in it counts, and at most one copy is made."""
    script = f"SELECT {part}\n; COMMIT"
    split("SELECT 1"), problems("SELECT 1", transactional=True)  # which compiles the patterns
    tracemalloc.start()
    try:
        statements = split(script)
        found = problems(script, transactional=False, statements=statements)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    end = len("SELECT 1") if part.startswith("1") and "\n" not in part and "+" not in part else script.rindex("\n;")
    assert [(each.start, each.end) for each in statements] == [
        (0, len(script[:end].rstrip())),
        (len(script) - 6, len(script)),
    ]
    assert found == ()
    assert peak < len(script) + 100_000


def test_statements_are_a_sequence_that_takes_little_memory() -> None:
    """Statements can be counted, sliced and compared like a tuple of them, and are made when asked for."""
    script = "".join(f"INSERT INTO t VALUES ({number});\n" for number in range(10_000))
    tracemalloc.start()
    try:
        statements = split(script)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 20 * len(statements)
    assert len(statements) == len(tuple(statements)) == 10_000
    assert statements == tuple(statements)
    assert statements[10:12] == tuple(statements)[10:12] != statements[11:13]
    assert (statements[-1].text, statements[-1].line) == ("INSERT INTO t VALUES (9999)", 10_000)
    assert statements.line(41) == 42
    assert statements.at(statements[7].start) == statements.at(statements[7].end - 1) == 7
    assert statements.at(statements[7].end) is None
    assert split("-- 1\nSELECT").at(0) is None


@given(SCRIPTS.filter(lambda script: "\0" not in script and script.isprintable() | script.isascii()))
@examples(380)
def test_whatever_postgresql_accepts_is_split_as_by_postgresql(script: str) -> None:
    """Every script that PostgreSQL's parser takes is split where it splits it, and has nothing unterminated."""
    if accepted(script):
        assert_split_as_postgresql_does(script)
        assert not [each for each in problems(script, transactional=False) if "unterminated" in each.message]


@pytest.mark.skipif(
    "AMPD_REAL_FOLDERS" not in os.environ, reason="AMPD_REAL_FOLDERS names no folder of real migrations"
)
def test_real_migrations_are_split_as_by_postgresql() -> None:
    """Every real .sql file that PostgreSQL's parser takes is split where it splits it."""
    files = sorted(Path(os.environ["AMPD_REAL_FOLDERS"]).rglob("*.sql"))
    scripts = [text for file in files if accepted(text := file.read_bytes().decode(errors="replace").replace("\0", ""))]
    assert scripts
    for script in scripts:
        assert_split_as_postgresql_does(script)
