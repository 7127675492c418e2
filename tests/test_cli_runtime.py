"""The streams, locales and terminals that the command line meets."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_output import plain, seen
from tests.folders import write
from tests.servers import Ampd, Database

pytestmark = pytest.mark.any_server


def shell(ampd: Ampd, url: str, redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ampd in a shell with the streams redirected."""
    command = f'{sys.executable} -m ampd "$@" {redirection}'
    return subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", command, "ampd", *arguments],
        cwd=ampd.folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "AMP_CONFIG_METADATA_DB__URL": url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


FULL = "error: the output cannot be written: No space left on device\n"
NOSUCH = (
    'unknown command "nosuch". Available commands: migrate, status, baseline, resolve, new, lint, solo\n'
    "hint: `ampd --help` lists the options\n"
)


@pytest.mark.parametrize(
    ("redirection", "arguments", "expected"),
    [
        (">&-", ["status"], (0, "", "")),
        (
            "2>&-",
            ["status"],
            (
                0,
                "DATABASE: no migration applied, 2 pending\n\nstate    version  name    when  took  by\n"
                "pending        1  first\npending        2  second\n\n"
                "next: `ampd migrate --migrations m` applies 2 migrations\n",
                "",
            ),
        ),
        ("2>&-", ["nosuch"], (1, "", "")),
        (">/dev/full", ["status"], (1, "", FULL)),
        (">/dev/full", ["status", "--json"], (1, "", FULL)),
        (">/dev/full", ["--help"], (1, "", FULL)),
        ("2>/dev/full", ["migrate"], (0, "DATABASE: applied 2 migrations in N s, now at version 2\n", "")),
        ("2>&-", ["migrate"], (0, "DATABASE: applied 2 migrations in N s, now at version 2\n", "")),
        ("2>/dev/full", ["nosuch"], (1, "", "")),
        ("| true", ["status"], (1, "", "")),
        ("| true", ["status", "--json"], (1, "", "")),
        ("| true", ["migrate", "--dry-run"], (1, "", "")),
        ("| true", ["nosuch", "--json"], (1, "", f"error: {NOSUCH}")),
        (">/dev/full", ["nosuch", "--json"], (1, "", f"{FULL}error: {NOSUCH}")),
        (">/dev/full 2>/dev/full", ["nosuch", "--json"], (1, "", "")),
    ],
)
@pytest.mark.usefixtures("folder")
def test_streams_that_are_closed_or_full(
    ampd: Ampd, database: Database, redirection: str, arguments: list[str], expected: tuple[int, str, str]
) -> None:
    """A stream that is closed, full or a broken pipe is no traceback, and no reason to stop a migration."""
    here = ["--migrations", "m"] if arguments[0] in ("status", "migrate") else []
    assert seen(shell(ampd, database.url, redirection, *arguments, *here)) == expected


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "1", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "POSIX"},
        {"TERM": "dumb", "NO_COLOR": "1"},
    ],
)
def test_any_locale(ampd: Ampd, database: Database, tmp_path: Path, env: dict[str, str]) -> None:
    """Names beyond the locale are shown as well as it can, the JSON document is UTF-8, and nothing traces back."""
    write(tmp_path / "m", {"1_größe.sql": "SELECT 1;\n", "2_中文.sql": "SELECT 'ß', 1/0;\n"})
    process = ampd("status", "--migrations", "m", url=database.url, env=env)
    assert (process.returncode, process.stderr) == (0, "")
    script = [sys.executable, "-m", "ampd", "migrate", "--dry-run", "--migrations", "m", "--url", database.url]
    printed = subprocess.run(script, cwd=tmp_path, env=os.environ | env, capture_output=True, check=True).stdout
    assert "SELECT 'ß', 1/0;\n" in printed.decode()
    document = ampd("status", "--json", "--migrations", "m", url=database.url, env=env)
    assert [step["name"] for step in json.loads(document.stdout)["migrations"]] == ["größe", "中文"]
    process = ampd("migrate", "--migrations", "m", url=database.url, env=env)
    assert process.returncode == 1
    assert "division by zero" in process.stderr
    assert "Traceback" not in process.stderr
    assert ampd("--help", env=env).returncode == 0


def on_a_terminal(ampd: Ampd, url: str, *arguments: str, term: str = "xterm", stdout: bool = False) -> str:
    """Return what ampd writes to a terminal of 40 columns, on stderr or on stdout."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, True)
    with os.fdopen(theirs, "wb", buffering=0) as terminal:
        subprocess.run(["stty", "cols", "40"], stdin=terminal, check=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "ampd", *arguments],
            cwd=ampd.folder,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": os.pathsep.join(sys.path),
                "TERM": term,
                "AMP_CONFIG_METADATA_DB__URL": url,
            },
            stdin=subprocess.DEVNULL,
            stdout=terminal if stdout else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if stdout else terminal,
        )
    written = b""
    try:
        while piece := os.read(ours, 4096):
            written += piece
    except OSError:  # the last one to hold the other end has gone
        pass
    finally:
        os.close(ours)
    assert process.wait(60) == 0
    return plain(written.decode().replace("\r\n", "\n"))


def test_a_terminal_shows_the_plan_first(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """A run that is soon over prints what stays, and no live display; a dumb terminal gets what a file gets."""
    write(tmp_path / "m", {"1_a.sql": "SELECT 1;\n"})
    text = on_a_terminal(ampd, database.url, "migrate", "--migrations", "m", term="xterm")
    assert re.sub("\n +", " ", text) == "DATABASE: 1 of 1 to apply, from 1 a\n[1/1] 1 a  N ms\n"
    assert text.count("\n") == 3  # broken to fit
    write(tmp_path / "m", {"2_b.sql": "SELECT 1;\n"})
    text = on_a_terminal(ampd, database.url, "migrate", "--migrations", "m", term="dumb")
    assert text == "[1/1] 2 b  N ms\n"
    assert on_a_terminal(ampd, database.url, "migrate", "--migrations", "m", term="xterm") == ""


def test_status_fits_the_terminal(ampd: Ampd, database: Database, tmp_path: Path) -> None:
    """In 40 columns the table leaves out what is least needed, and cuts a long name."""
    write(tmp_path / "m", {"1_first.sql": "SELECT 1;\n"})
    assert ampd("migrate", "--migrations", "m", url=database.url).returncode == 0
    write(tmp_path / "m", {"20260101000000_a_name_that_is_long.sql": "SELECT 1;\n"})
    text = on_a_terminal(ampd, database.url, "status", "--migrations", "m", stdout=True)
    assert text.partition("\n\n")[2] == (
        "state           version  name\napplied               1  first\n"
        "pending  20260101000000  a_name_that_i..\n\nnext: `ampd migrate --migrations m`\n  applies 1 migration\n"
    )
    assert max(map(len, text.splitlines())) <= 40


@pytest.mark.parametrize("in_url", [True, False], ids=["url", "PGPASSWORD"])
def test_a_statement_that_contains_the_password(ampd: Ampd, database: Database, tmp_path: Path, in_url: bool) -> None:
    """With -v each statement is printed without the password that is used, as errors and notices are."""
    folder = write(tmp_path / "files", {"1_a.sql": "COMMENT ON SCHEMA public IS 'of hunter2/x';"})
    url = database.url.replace("@", ":hunter2%2Fx@", 1) if in_url else database.url
    env = {} if in_url else {"PGPASSWORD": "hunter2/x"}
    process = ampd("migrate", "-v", "--migrations", folder, url=url, env=env)
    assert process.returncode == 0
    assert "1/1, line 1: COMMENT ON SCHEMA public IS 'of ***'\n" in process.stderr
