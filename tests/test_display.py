"""What others wrote, where it leaves the process: no escape, no line that passes for ours, no CI command."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ampd as library
from ampd.display import fitted, folded, one_line, visible
from ampd.events import Waiting
from ampd.other_sessions import Blocker, Holder
from tests.folders import write
from tests.servers import Ampd, Database

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]

EVIL = "x\x1b]0;owned\x07\x1b[2K\r\napplied 1 migration\n::add-mask::1\n##[add-mask]2\u202e##vso[x]end"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größe 中文 🎉\tx\ny", "größe 中文 🎉\tx\ny"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\rb\x00\x7f\x9b", r"a\rb\x00\x7f\x9b"),
        ("\u202eabc\u2066\u200b\ufeff", r"\u202eabc\u2066\u200b\ufeff"),
        ("a\u2028b", r"a\u2028b"),
        ("##[add-mask]x # [1] #[2]", r"#\x23[add-mask]x # [1] #[2]"),
        ("x ##vso[task.x]1 ##VSO[y] ## vso[ #vso[", r"x #\x23vso[task.x]1 #\x23VSO[y] ## vso[ #vso["),
        ("###[x ##teamcity[y]", r"##\x23[x #\x23teamcity[y]"),
    ],
)
def test_what_is_not_seen_is_made_visible(text: str, shown: str) -> None:
    """Only characters that do something, or nothing that one sees, are written as escapes."""
    assert visible(text) == shown


@given(st.text())
def test_a_name_stays_on_its_line(text: str) -> None:
    """Whatever a name holds, it is one line of at most 200 characters, all of which can be seen."""
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert len(line) <= 200
    assert visible(line) == line


@given(st.text())
def test_each_further_line_is_marked(text: str) -> None:
    """No line of somebody else's begins a line of the output, but for the first, which stands behind our words."""
    assert all(line.startswith("  | ") for line in folded(text).split("\n")[1:])


def test_sessions_are_told_on_one_line() -> None:
    """Names of roles and applications, and statements, are strangers' texts."""
    blocker = Blocker(pid=1, user=EVIL, application=EVIL, client=EVIL, state="idle", since=None, query=EVIL)
    waiting = Waiting(
        waited=1, limit=2, holder=Holder(pid=1, client=EVIL, application=EVIL, query=f"/* ampd 1f {EVIL} */")
    )
    for text in (blocker.describe(), str(waiting)):
        assert len(text.splitlines()) == 1
        assert "\x1b" not in text


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE ROLE bob LOGIN PASSWORD 'geheim'",
        "ALTER ROLE bob password  E'it''s \\'geheim' VALID UNTIL 'x'",
        "alter role bob PASSWORD'gehe",  # the server shows the beginning of a statement
        "ALTER ROLE bob PASSWORD $x$geheim$x$",
        "CREATE USER MAPPING FOR bob SERVER s OPTIONS (user 'u', password 'geheim')",
        "SELECT dblink_connect('host=h password = geheim')",
    ],
)
def test_a_password_in_a_statement_is_not_shown(statement: str) -> None:
    """Neither of a session in the way nor of the lock's holder, in text or in JSON."""
    blocker = Blocker(pid=1, user="u", application="a", client=None, state="idle", since=None, query=statement)
    for session in (blocker, Holder(pid=1, query=statement)):
        for text in (session.describe(), msgspec.json.encode(session).decode(), str(session)):
            assert "gehe" not in text
    assert "***" in blocker.describe()


RAISE = f"DO $$ BEGIN RAISE %s '%%', E'{EVIL.encode('unicode_escape').decode()}'; END $$"
SHOWN = [
    r"x\x1b]0;owned\x07\x1b[2K",
    "  | applied 1 migration",
    "  | ::add-mask::1",
    r"  | #\x23[add-mask]2\u202e#\x23vso[x]end",
]


async def test_a_server_warning_forges_no_line(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """What a migration, or a stranger's function in it, makes the server say is shown as that."""
    write(tmp_path / "m", {"1_a.sql": RAISE % "WARNING"})
    process = ampd("migrate", "--migrations", "m", url=database.url)
    assert process.stderr.splitlines()[:4] == [f"warning: {SHOWN[0]}", *SHOWN[1:]]


async def test_an_error_forges_no_line(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """Neither does an error of the server, in text or in JSON."""
    write(tmp_path / "m", {"1_a.sql": RAISE % "EXCEPTION"})
    process = ampd("migrate", "--json", "--migrations", "m", url=database.url)
    said = [f"error: m/1_a.sql:1: {SHOWN[0]}", *SHOWN[1:-1], f"{SHOWN[-1]} (SQLSTATE P0001)"]
    assert process.stderr.splitlines()[:4] == said
    assert "##" not in process.stdout
    assert msgspec.json.decode(process.stdout)["error"]["message"].splitlines() == [said[0][7:], *said[1:]]


async def test_a_name_in_the_history_forges_no_line(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """A row's name, which whoever may write to the history has chosen, is one cell of a table and part of one line."""
    write(tmp_path / "m", {"1_a.sql": "SELECT 1;", "2_b.sql": "SELECT 2;"})
    await library.migrate(database.url, migrations=library.read_migrations(tmp_path / "m"))
    await database.fetch("UPDATE ampd_schema_migrations SET name = $1 WHERE version = 2", EVIL)
    (tmp_path / "m" / "2_b.sql").unlink()
    (tmp_path / "m" / "3_c.sql").write_text("SELECT 3;")
    for command in ("status", "migrate"):
        process = ampd(command, "--migrations", "m", url=database.url)
        lines = (process.stdout + process.stderr).splitlines()
        assert any(r"2 x\x1b]0;owned\x07\x1b[2K" in line for line in lines)
        assert not any(line.startswith(("applied 1 migration", "::", "##[")) for line in lines)
    document = ampd("status", "--json", "--migrations", "m", url=database.url).stdout
    assert "##" not in document
    assert msgspec.json.decode(document)["migrations"][1]["name"] == EVIL


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("short", ["short"]),
        ("hint: wait for it and run again", ["hint: wait for it", "  and run again"]),
        (
            "look, then run `ampd resolve 30 --applied` or not",
            ["look, then run", "  `ampd resolve 30 --applied`", "  or not"],
        ),
        (
            "one\n  file:    m/1_a.sql, SHA-256 0123456789abcdef01",
            ["one", "  file:", "    m/1_a.sql,", "    SHA-256", "    0123456789abcdef01"],
        ),
        ("12 | UPDATE t SET a_column = 1\n   |            ^", ["12 | UPDATE t SET a…", "   |            ^"]),
        ("12 | UPDATE t SET a = 1\n   |                   ^", ["12 | UPDATE t SET a = 1", "   |                   ^"]),
    ],
    ids=["fits", "words", "command", "long word", "excerpt", "mark beyond"],
)
def test_lines_that_fit_a_terminal(text: str, lines: list[str]) -> None:
    """Lines break between words, never within a command, and what follows is indented; an excerpt is cut."""
    assert fitted(text, 20).splitlines() == lines
