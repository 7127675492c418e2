"""A migration as a value: file names, checksums, leading directives."""

import hashlib
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ampd.migration import (
    AppliedMigration,
    DirectiveError,
    Directives,
    Migration,
    checksum,
    directives,
    parse_file_name,
)
from tests.repetition import examples


@pytest.mark.parametrize(
    ("file_name", "parsed"),
    [
        ("1_a.sql", (1, "a")),
        ("0_init.sql", (0, "init")),
        ("0001_create_jobs.sql", (1, "create_jobs")),
        ("20260102030405_create_jobs.sql", (20260102030405, "create_jobs")),
        ("999999999999999999_a.sql", (999999999999999999, "a")),
        ("000000000000000007_a.sql", (7, "a")),
        ("1_a.up.sql", (1, "a")),
        ("1_a.b.sql", (1, "a.b")),
        ("1_a.up.up.sql", (1, "a.up")),
        ("1_.up.sql", (1, ".up")),
        ("1_a.sql.sql", (1, "a.sql")),
        ("1__a.sql", (1, "_a")),
        ("1_2_a.sql", (1, "2_a")),
        ("1_a b.sql", (1, "a b")),
        ("1_größe-1.sql", (1, "größe-1")),
        ("1_a\nb.sql", (1, "a\nb")),
        ("1000000000000000000_a.sql", None),
        ("0000000000000000001_a.sql", None),
        ("_a.sql", None),
        ("a.sql", None),
        ("1.sql", None),
        ("1_sql", None),
        ("1_.sql", None),
        ("1-a.sql", None),
        ("V1__a.sql", None),
        ("-1_a.sql", None),
        ("+1_a.sql", None),
        ("1.5_a.sql", None),
        (" 1_a.sql", None),
        ("1_a.sql ", None),
        ("1_a.sql\n", None),
        ("1_a.sql.bak", None),
        ("1_a.SQL", None),
        ("1_a", None),
        ("\u0661_a.sql", None),
        ("²_a.sql", None),
        ("", None),
    ],
)
def test_file_names(file_name: str, parsed: tuple[int, str] | None) -> None:
    """A name is 1 to 18 ASCII digits, an underscore, a name, and .sql or .up.sql; anything else is none."""
    assert parse_file_name(file_name) == parsed


def test_the_label_is_version_and_name() -> None:
    """People hear of a migration by its version and name."""
    assert Migration(42, "create_jobs", "42_create_jobs.sql", "", b"").label == "42 create_jobs"


@pytest.mark.parametrize(("ran_for", "duration_ms"), [(1.2345, 1234), (0.0004, 0), (0.0, 0), (None, None)])
def test_how_long_it_ran(ran_for: float | None, duration_ms: int | None) -> None:
    """The duration is in whole milliseconds, and None while unfinished."""
    started = datetime(2026, 1, 2, tzinfo=UTC)
    finished = None if ran_for is None else started + timedelta(seconds=ran_for)
    assert AppliedMigration(1, "a", b"", started, finished, 1, "amp", "1").duration_ms == duration_ms


LINES = st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"").replace(b"\r", b"")), max_size=6)


@given(LINES)
@example([b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_mark_do_not_count(lines: list[bytes]) -> None:
    """A file with LF and its twins with CRLF, with a BOM, and with both have one checksum: the SHA-256 of the first."""
    plain, windows = b"\n".join(lines).removeprefix(b"\xef\xbb\xbf"), b"\r\n".join(lines).removeprefix(b"\xef\xbb\xbf")
    if plain.startswith(b"\xef\xbb\xbf"):
        plain, windows = b"-" + plain, b"-" + windows
    twins = (plain, windows, b"\xef\xbb\xbf" + plain, b"\xef\xbb\xbf" + windows)
    assert {checksum(twin) for twin in twins} == {hashlib.sha256(plain).digest()}


@given(st.binary(max_size=40), st.binary(max_size=40))
@example(b"a\r", b"a\n")
@example(b"a\rb", b"a\nb")
@example(b"a\xef\xbb\xbf", b"a")
@example(b"a\n", b"a")
@example(b"a\r\r\n", b"a\r\n")
def test_everything_else_counts(one: bytes, other: bytes) -> None:
    """Two files have one checksum only if they differ in nothing but CRLF and a leading BOM."""
    normal = [content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n") for content in (one, other)]
    assert (checksum(one) == checksum(other)) is (normal[0] == normal[1])


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="NOT TESTED, no sha256sum here")
def test_the_checksum_is_what_sha256sum_prints(tmp_path: Path) -> None:
    """For a file with LF the checksum is the one that sha256sum shows."""
    file = tmp_path / "1_a.sql"
    file.write_bytes("CREATE TABLE größe (id int);\n-- end, no line feed".encode())
    printed = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout
    assert printed.split()[0] == checksum(file.read_bytes()).hex()


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        ("", Directives()),
        ("SELECT 1;", Directives()),
        ("-- a comment\nSELECT 1;", Directives()),
        ("-- no-transaction\nVACUUM;", Directives(no_transaction=True)),
        ("--no-transaction", Directives(no_transaction=True)),
        ("  --\tno-transaction  \nVACUUM;", Directives(no_transaction=True)),
        ("-- no-transaction\r\nVACUUM;\r\n", Directives(no_transaction=True)),
        ("-- no-transaction: CONCURRENTLY needs it\nVACUUM;", Directives(no_transaction=True)),
        ("-- no-transaction, for CONCURRENTLY\nVACUUM;", Directives(no_transaction=True)),
        ("\n\n-- about\n/* and\nmore */ -- no-transaction\nVACUUM;", Directives(no_transaction=True)),
        ("SELECT 1;\n-- no-transaction", Directives()),
        ("SELECT 1; -- no-transaction", Directives()),
        (";\n-- no-transaction", Directives()),
        ("/*\n-- no-transaction\n*/\nSELECT 1;", Directives()),
        ("/* -- no-transaction\nSELECT 1;", Directives()),
        ("-- no-transactions\nSELECT 1;", Directives()),
        ("-- no-transaction-like\nSELECT 1;", Directives()),
        ("-- NO-TRANSACTION\nSELECT 1;", Directives()),
        ("-- not no-transaction\nSELECT 1;", Directives()),
        ("-- lock-timeout: 2s\nSELECT 1;", Directives(lock_timeout=2.0)),
        ("-- lock-timeout 2s", Directives(lock_timeout=2.0)),
        ("--lock-timeout:2", Directives(lock_timeout=2.0)),
        ("-- lock-timeout: 0", Directives(lock_timeout=0.0)),
        ("-- lock-timeout: 500ms", Directives(lock_timeout=0.5)),
        ("-- lock-timeout: 1.5 S ", Directives(lock_timeout=1.5)),
        ("-- lock-timeout: 1s\n-- lock-timeout: 2s", Directives(lock_timeout=2.0)),
        ("-- statement-timeout: 10min\r\nSELECT 1;", Directives(statement_timeout=600.0)),
        ("-- statement-timeout: 2h", Directives(statement_timeout=7200.0)),
        ("-- statement-timeout: 2147483s", Directives(statement_timeout=2147483.0)),
        (
            "-- statement-timeout: 1h\n-- no-transaction\n\n-- lock-timeout: 1s\nSELECT 1; -- lock-timeout: 2s",
            Directives(no_transaction=True, lock_timeout=1.0, statement_timeout=3600.0),
        ),
        ("SELECT 1;\n-- lock-timeout: soon", Directives()),
    ],
)
def test_leading_directives(sql: str, found: Directives) -> None:
    """Directives are read from the comment lines before the first statement, and from nowhere else."""
    assert directives(sql) == found


@pytest.mark.parametrize(
    ("sql", "message", "line", "offset"),
    [
        (
            "-- lock-timeout: soon",
            "`-- lock-timeout:` needs a duration such as 500ms, 2s or 10min, not 'soon'",
            1,
            0,
        ),
        ("-- lock-timeout:\nSELECT 1;", "`-- lock-timeout:` needs a duration such as 500ms, 2s or 10min, not ''", 1, 0),
        (
            "-- about\n\n  -- statement-timeout: 5 days\nSELECT 1;",
            "`-- statement-timeout:` needs a duration such as 500ms, 2s or 10min, not '5 days'",
            3,
            12,
        ),
        ("-- lock-timeout: -1s", "`-- lock-timeout:` needs a duration such as 500ms, 2s or 10min, not '-1s'", 1, 0),
        ("-- lock-timeout: 1m", "`-- lock-timeout:` needs a duration such as 500ms, 2s or 10min, not '1m'", 1, 0),
        ("-- lock-timeout: ٢s", "`-- lock-timeout:` needs a duration such as 500ms, 2s or 10min, not '٢s'", 1, 0),
        ("-- lock-timeout: 1000h", "`-- lock-timeout:` needs at most 596h, not '1000h'", 1, 0),
        (
            "-- lock-timeout: " + "9" * 400,
            f"`-- lock-timeout:` needs at most 596h, not '{'9' * 400}'",
            1,
            0,
        ),
    ],
)
def test_bad_directives(sql: str, message: str, line: int, offset: int) -> None:
    """A duration that cannot be read, or that the server could not count, is an error with its place."""
    with pytest.raises(DirectiveError) as error:
        directives(sql)
    assert (str(error.value), error.value.line, error.value.offset) == (message, line, offset)


@given(st.text(st.sampled_from("-/*\n\r ;anotrsci:lkmeu0159hSE'$\t"), max_size=60))
@examples(100)
@example("-- no-transaction")
def test_reading_directives_never_crashes(text: str) -> None:
    """Whatever a file begins with, its directives are read or refused, the same with either line end."""

    def read(sql: str) -> object:
        try:
            return directives(sql)
        except DirectiveError as error:
            return str(error), error.line

    unix = text.replace("\r", "")
    assert read(unix) == read(unix.replace("\n", "\r\n"))
