"""What no migration can contain, and what its author should know."""

import pytest

from ampd.sql.checks import Caution, problems
from tests.sql_texts import NASTY, accepted


def messages(script: str, *, transactional: bool = True) -> list[tuple[int, int, str]]:
    """Reduce the problems of a script to line, column and message."""
    return [(each.line, each.column, each.message) for each in problems(script, transactional=transactional)]


def test_problems_are_found_in_linear_time() -> None:
    """The lines before a problem are not counted anew for each; else this takes minutes."""
    found = problems("\\x\n" * 100_000, transactional=True)
    assert (found[-1].line, found[-1].column) == (100_000, 1)


@pytest.mark.parametrize(
    "script",
    [
        *NASTY[:17],
        "SAVEPOINT s; ROLLBACK TO s; RELEASE SAVEPOINT s",
        "SET TRANSACTION READ WRITE; SET LOCAL TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE",
        "SET transaction_read_only TO 'no'; SET LOCAL transaction_isolation = 'Read Committed'",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY; SET default_transaction_read_only = on",
        "COPY t FROM '/tmp/stdin'; COPY (SELECT a FROM stdin) TO STDOUT; COPY t TO STDOUT; COPY stdin FROM PROGRAM 'x'",
        "COPY t FROM '/x' WHERE a IS DISTINCT FROM stdin; COPY (SELECT (a) FROM stdin) TO '/x'; COPY t TO STDIN",
        "COPY \"from stdin\" TO '/x' (NULL 'FROM STDIN'); COPY public.from TO stdin",
        "SELECT '\n-- migrate:down\n'; DO $$\n-- +goose Down\n$$; /*\n-- +migrate Down\n*/ SELECT 1",
        "-- migrate:downwards\n-- see migrate:down\nSELECT 1 -- goose Down",
        "SET standard_conforming_strings = on; SELECT '\\'; SELECT '\\d'",
        "SELECT '\\'; SET standard_conforming_strings = off; SELECT 'a'",
        "DROP SUBSCRIPTION s",
    ],
)
def test_sound_scripts_have_no_problems(script: str) -> None:
    """What PostgreSQL takes inside a transaction is never complained about."""
    assert accepted(script)
    assert problems(script, transactional=True) == ()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "SELECT 1;\n  BEGIN;\nSELECT 2; COMMIT AND NO CHAIN;\nEND; ROLLBACK; ABORT;",
            [
                (2, 3, "BEGIN in a migration that runs in one transaction"),
                (3, 11, "COMMIT in a migration that runs in one transaction"),
                (4, 1, "END in a migration that runs in one transaction"),
                (4, 6, "ROLLBACK in a migration that runs in one transaction"),
                (4, 16, "ABORT in a migration that runs in one transaction"),
            ],
        ),
        (
            "START TRANSACTION; PREPARE TRANSACTION 'x'; COMMIT PREPARED 'x'; ROLLBACK PREPARED 'x'",
            [
                (1, 1, "START TRANSACTION in a migration that runs in one transaction"),
                (1, 20, "PREPARE TRANSACTION in a migration that runs in one transaction"),
                (1, 45, "COMMIT PREPARED in a migration that runs in one transaction"),
                (1, 66, "ROLLBACK PREPARED in a migration that runs in one transaction"),
            ],
        ),
        (
            "DROP INDEX CONCURRENTLY i;\nVACUUM t;\nCLUSTER;\nREINDEX SCHEMA s; DISCARD ALL; DROP DATABASE d",
            [
                (1, 1, "DROP INDEX CONCURRENTLY cannot run inside a transaction block"),
                (2, 1, "VACUUM cannot run inside a transaction block"),
                (3, 1, "CLUSTER without a table cannot run inside a transaction block"),
                (4, 1, "REINDEX SCHEMA cannot run inside a transaction block"),
                (4, 19, "DISCARD ALL cannot run inside a transaction block"),
                (4, 32, "DROP DATABASE cannot run inside a transaction block"),
            ],
        ),
    ],
)
def test_a_transactional_script_may_not_leave_its_transaction(
    script: str, expected: list[tuple[int, int, str]]
) -> None:
    """Transaction control, and what refuses to run in a transaction, is found in transactional scripts only."""
    assert accepted(script)
    assert messages(script) == expected
    assert messages(script, transactional=False) == []


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("BEGIN; SELECT 1; COMMIT; BEGIN; ROLLBACK; START TRANSACTION; PREPARE TRANSACTION 'x'", []),
        ("SELECT 1;\n BEGIN; SELECT 2", [(2, 2, "this transaction is never committed or rolled back")]),
        (
            "BEGIN; COMMIT AND CHAIN; SELECT 1",
            [
                (1, 1, "this transaction is never committed or rolled back"),
                (1, 8, "COMMIT AND CHAIN begins a transaction of which ampd cannot record that it is done"),
            ],
        ),
        ("BEGIN; COMMIT AND NO CHAIN; BEGIN; ROLLBACK WORK AND NO CHAIN", []),
        ("BEGIN; SAVEPOINT s; ROLLBACK TO s", [(1, 1, "this transaction is never committed or rolled back")]),
        ("BEGIN; SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; SELECT 1; COMMIT", []),
        (
            "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; BEGIN; COMMIT; SET transaction_deferrable = on",
            [
                (1, 1, "SET TRANSACTION outside of a transaction"),
                (1, 62, "SET TRANSACTION outside of a transaction"),
            ],
        ),
    ],
)
def test_a_no_transaction_script_ends_what_it_begins(script: str, expected: list[tuple[int, int, str]]) -> None:
    """A BEGIN that nothing ends, or a SET TRANSACTION without one, is found in a no-transaction script."""
    assert accepted(script)
    assert messages(script, transactional=False) == expected


@pytest.mark.parametrize(
    ("script", "label", "instead"),
    [
        ("COMMIT AND CHAIN", "COMMIT AND CHAIN", "COMMIT"),
        ("end /**/ work and chain", "END AND CHAIN", "END"),
        ("ROLLBACK TRANSACTION AND CHAIN", "ROLLBACK AND CHAIN", "ROLLBACK"),
        ("ABORT AND CHAIN", "ABORT AND CHAIN", "ABORT"),
    ],
)
def test_no_script_may_chain_its_transactions(script: str, label: str, instead: str) -> None:
    """A transaction that no BEGIN shows is found in every script, and how to write it is told."""
    assert accepted(script)
    (inside,) = problems(script, transactional=True)
    assert inside.message == f"{label} in a migration that runs in one transaction"
    (outside,) = problems(f"BEGIN; {script}; COMMIT", transactional=False)
    assert outside.message == f"{label} begins a transaction of which ampd cannot record that it is done"
    assert (outside.line, outside.column) == (1, 8)
    assert outside.hint == f"write {instead}; BEGIN; in its place"


TOO_LATE = "SET TRANSACTION must come before any query, and ampd's own come before it"
READ_ONLY = "a READ ONLY transaction, in which the migration cannot be recorded"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", TOO_LATE),
        ("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED, DEFERRABLE", TOO_LATE),
        ("SET TRANSACTION SNAPSHOT '00000003-0000001B-1'", TOO_LATE),
        ("SET LOCAL transaction_isolation = 'serializable'", TOO_LATE),
        ("SET transaction_deferrable TO off", TOO_LATE),
        ("SET TRANSACTION READ ONLY", READ_ONLY),
        ("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY, DEFERRABLE", READ_ONLY),
        ("SET LOCAL transaction_read_only = 'on'", READ_ONLY),
    ],
)
def test_a_transactional_script_may_not_set_the_mode_of_its_transaction(script: str, expected: str) -> None:
    """What the transaction of a migration cannot be made into is found, and what it is anyway is left alone."""
    assert accepted(script)
    assert messages(f"SELECT 1;\n{script};") == [(2, 1, expected)]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("BEGIN READ ONLY; SELECT 1; COMMIT", [(1, 1, READ_ONLY)]),
        ("BEGIN; COMMIT;\nSTART TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY; END", [(2, 1, READ_ONLY)]),
        ("BEGIN; SET TRANSACTION READ ONLY; SELECT 1; COMMIT", [(1, 8, READ_ONLY)]),
        ("BEGIN; SET LOCAL transaction_read_only = true; COMMIT", [(1, 8, READ_ONLY)]),
        ("BEGIN READ WRITE; SET LOCAL transaction_read_only = 'off'; COMMIT", []),
        ("BEGIN READ ONLY; SELECT 1; ROLLBACK; BEGIN; COMMIT", []),
    ],
)
def test_a_no_transaction_script_records_itself_in_what_it_commits(
    script: str, expected: list[tuple[int, int, str]]
) -> None:
    """A READ ONLY transaction that is committed is found in a no-transaction script."""
    assert accepted(script)
    assert messages(script, transactional=False) == expected


COPY = "COPY FROM STDIN waits for data, and a migration has none to send"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('SELECT 1;\nCOPY public.t (a, "b)") FROM stdin;\n1\tit\'s\n\\.\nBEGIN;\n', [(2, 1, COPY)]),
        ("COPY BINARY t FROM STDIN WITH (FORMAT csv)", [(1, 1, COPY)]),
        ('copy U&"t" from stdin', [(1, 1, COPY)]),
        ("COPY U&\"d!0061t\" UESCAPE '!' (a) FROM STDOUT", [(1, 1, COPY)]),
        ('COPY public . U&"t"(a, U&"b") FROM /* it */ STDIN WHERE a IS DISTINCT FROM b', [(1, 1, COPY)]),
        ("COPY public.from FROM STDIN", [(1, 1, COPY)]),
        (
            "\\connect db\nSELECT 1 \\gset x\n;\\",
            [
                (1, 1, "\\connect is a command of psql, not SQL"),
                (2, 10, "\\gset is a command of psql, not SQL"),
                (3, 2, "\\ is a command of psql, not SQL"),
            ],
        ),
        ("SELECT 1;\nSELECT 'a;\n", [(2, 8, "unterminated string")]),
        ("SELECT N'", [(1, 9, "unterminated string")]),
        ("SELECT E'\\';", [(1, 8, "unterminated string")]),
        ('SELECT "a""', [(1, 8, "unterminated quoted identifier")]),
        ("SELECT $a$ $b$", [(1, 8, "unterminated dollar-quoted string")]),
        ("SELECT 1; /* /* */\nCOMMIT;", [(1, 11, "unterminated comment")]),
        (
            "-- migrate:up\nSELECT 1;\n--  Migrate:Down transaction:false\nSELECT 2;\n",
            [(3, 1, "`Migrate:Down` begins the down section of dbmate, and ampd runs files whole")],
        ),
        (
            "SELECT 1 --+goose  DOWN\n",
            [(1, 10, "`+goose DOWN` begins the down section of goose, and ampd runs files whole")],
        ),
        (
            "-- +migrate Down",
            [(1, 1, "`+migrate Down` begins the down section of sql-migrate, and ampd runs files whole")],
        ),
        (
            "SET standard_conforming_strings TO 'off';\nSELECT '',\n  'a\\n';",
            [(1, 1, "standard_conforming_strings is switched off before a backslash")],
        ),
        (
            "SET standard_conforming_strings = on; SET NAMES 'LATIN1';\nSELECT 'é'",
            [(1, 39, "another client_encoding in a file with characters beyond ASCII, which ampd sends as UTF-8")],
        ),
        ("SET client_encoding = 'LATIN1'; SELECT 'e'", []),
        ("SET client_encoding = 'UTF8'; SET NAMES 'Unicode'; SET client_encoding TO DEFAULT; SELECT 'é'", []),
        (
            "SET SESSION standard_conforming_strings = FALSE; SELECT '\\'",
            [(1, 1, "standard_conforming_strings is switched off before a backslash")],
        ),
    ],
)
@pytest.mark.parametrize("transactional", [True, False])
def test_what_no_migration_can_hold(script: str, expected: list[tuple[int, int, str]], transactional: bool) -> None:
    """Data, psql commands, open quotes, down sections and misread strings are found in every script, at their place."""
    assert messages(script, transactional=transactional) == expected


def test_a_problem_says_what_to_do() -> None:
    """Each sort of problem carries a hint with the way out."""
    script = "BEGIN; VACUUM; \\x\n-- migrate:down\n COPY t FROM STDIN;"
    modes = "SET TRANSACTION READ ONLY; SET TRANSACTION DEFERRABLE"
    assert [(each.offset, each.hint) for each in problems(script, transactional=True)] == [
        (0, "remove it: ampd wraps the file itself; or add `-- no-transaction` as the first line"),
        (7, "put it in a file of its own whose first line is `-- no-transaction`"),
        (15, "remove it; only psql itself understands backslash commands"),
        (18, "keep only the up part in the file"),
        (35, "use INSERT, or load the data from a program outside the migrations"),
    ]
    assert [each.hint for each in problems(modes, transactional=True)] == [
        "remove READ ONLY",
        "make `-- no-transaction` the first line, and write BEGIN with the mode, and COMMIT, in the file",
    ]
    assert [each.hint for each in problems(f"{modes}; BEGIN READ ONLY; COMMIT; BEGIN", transactional=False)] == [
        "put it between BEGIN and COMMIT",
        "put it between BEGIN and COMMIT",
        "remove READ ONLY",
        "add COMMIT where it should end",
    ]


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("SELECT 1;\nCREATE INDEX CONCURRENTLY ON t (a, b)", "t_a_b_idx"),
        ('\nCREATE UNIQUE INDEX CONCURRENTLY ON "T" (a)', '"T_a_idx"'),
        ('\nCREATE INDEX CONCURRENTLY ON t ("a""b")', '"t_a""b_idx"'),
        ("\nCREATE INDEX CONCURRENTLY ON ONLY s.t USING gin (a gin_trgm_ops DESC, b) WHERE c > (1)", "t_a_b_idx"),
        ("\nCREATE INDEX CONCURRENTLY ON t (a, lower(b)) INCLUDE (c)", "t_a_lower_idx"),
        ("\nCREATE INDEX CONCURRENTLY ON t USING btree", "t_idx"),
        ("\nCREATE INDEX CONCURRENTLY ON t ((a || b), (c + 1))", "t_idx"),
    ],
)
def test_an_index_without_a_name_is_a_caution(script: str, name: str) -> None:
    """Nobody can tell after an interruption whether it is there; the name that it would get is told."""
    (caution,) = problems(script, transactional=False)
    assert (type(caution), caution.line, caution.column) == (Caution, 2, 1)
    assert caution.message == (
        "CREATE INDEX CONCURRENTLY without a name cannot be resumed where it is interrupted: a person has to look"
    )
    assert caution.hint == f"give it a name, such as {name}"
    assert not [each for each in problems(script, transactional=True) if isinstance(each, Caution)]


@pytest.mark.parametrize(
    "script",
    [
        "CREATE INDEX CONCURRENTLY i ON t (a)",
        "CREATE INDEX CONCURRENTLY IF NOT EXISTS i ON t (a)",
        "CREATE INDEX ON t (a)",
        "DROP INDEX CONCURRENTLY i",
    ],
)
def test_an_index_with_a_name_is_none(script: str) -> None:
    """What has a name, or is undone by the server itself, needs nobody."""
    assert problems(script, transactional=False) == ()
