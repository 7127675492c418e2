"""The units of a no-transaction file, and what it has set for its session at a place."""

import pytest

from ampd.sql.kinds import Kind
from ampd.sql.slices import at_once
from ampd.sql.splitter import split
from ampd.sql.units import finding_in_force, units

PLAIN, AGAIN = Kind.TRANSACTIONAL, Kind.IDEMPOTENT


@pytest.mark.parametrize(
    ("script", "first", "expected"),
    [
        ("SELECT 1; VACUUM; SELECT 2", 0, [(0, 1, PLAIN), (1, 1, AGAIN), (2, 1, PLAIN)]),
        ("SELECT 1; VACUUM; SELECT 2", 2, [(2, 1, PLAIN)]),
        ("SELECT 1; VACUUM", 2, []),
        ("BEGIN; SELECT 1; COMMIT; SELECT 2", 0, [(0, 3, Kind.COMMIT), (3, 1, PLAIN)]),
        ("BEGIN; SAVEPOINT a; ROLLBACK TO a; END", 0, [(0, 4, Kind.COMMIT)]),
        ("START TRANSACTION; SELECT 1; ABORT; VACUUM", 0, [(0, 3, Kind.ROLLBACK), (3, 1, AGAIN)]),
        (
            "BEGIN; PREPARE TRANSACTION 'p'; COMMIT PREPARED 'p'",
            0,
            [(0, 2, Kind.NOT_RESUMABLE), (2, 1, Kind.NOT_RESUMABLE)],
        ),
        ("BEGIN; COMMIT", 0, [(0, 2, Kind.COMMIT)]),
    ],
)  # fmt: skip
def test_units(script: str, first: int, expected: list[tuple[int, int, Kind]]) -> None:
    """From BEGIN to whatever ends the transaction is one unit, and any other statement is one by itself."""
    found = [(unit.first, len(unit.statements), unit.kind) for unit in units(split(script), first, [])]
    assert found == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("SELECT 1; VACUUM", []),
        ("SET work_mem = '1MB'; SET search_path = a", ["SET work_mem = '1MB'", "SET search_path = a"]),
        ("SET work_mem = '1MB'; SET Work_Mem = '2MB'", ["SET Work_Mem = '2MB'"]),
        ("SET work_mem = '1MB'; RESET work_mem", []),
        ("SET work_mem = '1MB'; SET ROLE a; RESET ALL", ["SET ROLE a"]),
        ("SET ROLE a; RESET ROLE", []),
        ("SET search_path = a; SET search_path TO DEFAULT", []),
        ("BEGIN; SET work_mem = '1MB'; COMMIT", ["SET work_mem = '1MB'"]),
        ("BEGIN; SET work_mem = '1MB'; ROLLBACK", []),
        ("SET LOCAL work_mem = '1MB'; BEGIN; SET TRANSACTION READ WRITE; COMMIT", []),
        ("SELECT set_config('a.b', 'c', false)", ["SELECT set_config('a.b', 'c', false)"]),
        ("SELECT set_config('a.b', now()::text, false); SELECT reset_config()", []),
        ("LOAD 'auto_explain'", ["LOAD 'auto_explain'"]),
        ("SELECT set_config('work_mem', '1MB', false); RESET work_mem", []),
        (
            "SET work_mem = '1MB'; SELECT set_config('Work_Mem', '2MB', false); SET a.b = c",
            ["SELECT set_config('Work_Mem', '2MB', false)", "SET a.b = c"],
        ),
        ("SET ROLE a; SET work_mem = '1MB'; DISCARD ALL", []),
        ("BEGIN; SET a.b = c; SAVEPOINT s; SET d.e = f; ROLLBACK TO S; COMMIT", ["SET a.b = c"]),
        ("BEGIN; SET a.b = c; SAVEPOINT s; SET d.e = f; RELEASE s; COMMIT", ["SET a.b = c", "SET d.e = f"]),
    ],
)
def test_what_is_in_force(script: str, expected: list[str]) -> None:
    """What is set again is what a session would have: neither what was rolled back, nor what was set anew or reset."""
    assert [statement.text for _, statement in at_once(finding_in_force(split(script)))] == expected
