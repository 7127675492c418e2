"""What is told while a migration runs: a line every few seconds, or two live ones on a terminal."""

import io
import re
from collections.abc import Callable
from time import monotonic, sleep

import msgspec
import pytest

from ampd.cli import progress
from ampd.cli.live import LiveDisplay
from ampd.cli.progress import Progress
from ampd.events import (
    Applied,
    Blocked,
    LockRetry,
    Planned,
    Progressed,
    Retrying,
    ServerMessage,
    Starting,
    StatementStarted,
    Waiting,
    Warned,
)
from ampd.other_sessions import Blocker, Holder
from ampd.report import PendingMigration
from ampd.statement_progress import StatementProgress
from tests.scenes import GENEROUS

PLANNED = Planned(database="h:1/d", applied=0, pending=(PendingMigration(1, "a"),), ahead=(), total=1)
STARTING = Starting(version=1, name="index", number=1, total=2, statements=3)
STATEMENT = StatementStarted(version=1, name="index", migration=1, total=2, number=2, statements=3, line=9)
SCANNING = StatementProgress("building index: scanning table", 43)
PROGRESSED = Progressed(version=1, name="index", number=1, total=2, progress=SCANNING)
APPLIED = Applied(version=1, name="index", number=1, total=2, duration_ms=192_400)
BLOCKER = Blocker(9, "amp", "psql", None, "idle in transaction", None, None)


class Stream(io.StringIO):
    """A stream in memory, which may be a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        """Return whether it is one."""
        return self._terminal


def until(found: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = monotonic() + GENEROUS
    while not found():
        assert monotonic() < deadline
        sleep(0.005)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SILENCE_SECS", 0.02)
    monkeypatch.setattr(progress, "_REFRESH_SECS", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")


def plain(text: str) -> list[str]:
    """Return the different lines of a text, without durations."""
    lines = re.sub(r"\d+ ms|\d\.\d s", "N ms", text).splitlines()
    return list(dict.fromkeys(lines))


def test_a_log_is_told_now_and_then_that_something_runs() -> None:
    """Piped, there is a line every few seconds while a migration runs, with the statement, and none afterwards."""
    stream = Stream(terminal=False)
    tell = Progress(stream)
    for event in (PLANNED, STARTING):
        tell(event)
    until(lambda: "running" in stream.getvalue())
    tell(STATEMENT)
    until(lambda: "statement" in stream.getvalue())
    tell(PROGRESSED)
    until(lambda: "43 %" in stream.getvalue())
    tell(STATEMENT)
    told = len(stream.getvalue())
    until(lambda: stream.getvalue().endswith("statement 2/3\n") and len(stream.getvalue()) > told)
    tell(APPLIED)
    text = stream.getvalue()
    sleep(0.05)
    assert stream.getvalue() == text
    tell.clear()
    assert plain(text) == [
        "[1/2] 1 index: running for N ms",
        "[1/2] 1 index: running for N ms, statement 2/3",
        "[1/2] 1 index: running for N ms, statement 2/3, building index: scanning table 43 %",
        "[1/2] 1 index  3 min 12 s",
    ]


def test_whoever_waits_runs_nothing() -> None:
    """While another runner has the lock its migration is not told as running here; short retries are not told."""
    stream = Stream(terminal=False)
    tell = Progress(stream)
    for event in (
        STARTING,
        LockRetry(version=1, took=0.1, delay=0.5, waited=0.1, limit=300),
        Waiting(waited=3, limit=600, holder=Holder(7, application="ampd")),
    ):
        tell(event)
    assert tell.idle
    sleep(0.05)
    tell.clear()
    assert stream.getvalue() == "waiting for the migration lock (3 s so far), held by pid 7, application ampd\n"


RUN = (
    Retrying(reason="connection refused", waited=2, limit=30),
    PLANNED,
    Waiting(waited=3, limit=600, holder=Holder(7, application="ampd 1 1/2", progress=SCANNING)),
    STARTING,
    STATEMENT,
    ServerMessage(severity="NOTICE", message="half way"),
    Blocked(version=1, waited=2, limit=300, blockers=(BLOCKER,), queued=2),
    LockRetry(version=1, took=1, delay=5.2, waited=2, limit=300, queued=2),
    PROGRESSED,
    msgspec.structs.replace(APPLIED, retries=1, longest_attempt_secs=1.04, most_queued=2),
    Warned(message="odd"),
)
TOLD = """\
connection refused; trying for 28 s more
waiting for the migration lock (3 s so far), held by pid 7, application ampd, migration 1 (1 of 2), \
building index: scanning table 43 %
blocked for 2 s (limit 300 s) by:
  pid 9: user amp, application psql, idle in transaction
  2 more wait behind this migration
lock not available: rolled back, trying again in 5.2 s
[1/2] 1 index  3 min 12 s, at attempt 2 to lock its tables; 2 sessions waited behind it for 1.0 s at most
warning: odd
"""
SHOWN = TOLD.replace("blocked", "[1/2] 1 index: statement 2/3, line 9: \nnotice: half way\nblocked", 1)
SHOWN = SHOWN.replace("waiting", "h:1/d: 1 of 1 to apply, from 1 a\nwaiting", 1)


@pytest.mark.parametrize(("verbose", "text"), [(False, TOLD), (True, SHOWN)], ids=["plain", "verbose"])
def test_a_run_as_a_log_has_it(monkeypatch: pytest.MonkeyPatch, verbose: bool, text: str) -> None:
    """Piped, a run that meets everything is these lines; -v adds the plan, the statements and the notices."""
    monkeypatch.setattr(progress, "_SILENCE_SECS", GENEROUS)
    stream = Stream(terminal=False)
    tell = Progress(stream, verbose=verbose)
    for event in RUN:
        tell(event)
    tell.clear()
    assert stream.getvalue() == text


def test_quiet_starts_no_display() -> None:
    """With -q nothing is written, whatever happens."""
    for terminal in (False, True):
        stream = Stream(terminal)
        tell = Progress(stream, quiet=True)
        for event in (PLANNED, STARTING, STATEMENT, ServerMessage(severity="NOTICE", message="x"), APPLIED):
            tell(event)
        sleep(0.03)
        tell.clear()
        assert stream.getvalue() == ""


def test_a_terminal_is_left_with_the_lines_that_stay() -> None:
    """What is live is drawn below the lines that stay, and erased in the end; a name with an escape does no harm."""
    stream = Stream(terminal=True)
    tell = Progress(stream)
    tell(PLANNED)
    tell(Starting(version=1, name="in\x1b[2Jdex", number=1, total=2, statements=3))
    until(lambda: "1 in" in stream.getvalue())
    tell(PROGRESSED)
    until(lambda: "scanning table 43 %" in stream.getvalue())
    tell(ServerMessage(severity="WARNING", message="half way [bold]x"))
    tell(APPLIED)
    tell.clear()
    text = stream.getvalue()
    assert "\x1b[2Jdex" not in text
    left = re.sub(r"\x1b\[\?25[lh]", "", text)
    lines = [line for line in re.split(r"\x1b\[2K|\x1b\[1A|\r|\n", left) if line]
    stay = [line for line in lines if not re.match(r"[━╸╺ ]+ 0/2 |1 in|building", line)]
    assert stay == ["h:1/d: 1 of 1 to apply, from 1 a", "warning: half way [bold]x", "[1/2] 1 index  3 min 12 s"]
    assert text.endswith("\x1b[?25h") or text.rstrip().endswith("\x1b[2K")


class Ascii(Stream):
    """A terminal of a locale that is not UTF-8."""

    encoding = "ascii"


def test_a_terminal_shows_who_has_the_lock_for_how_long() -> None:
    """While another runner has it there is one live line, which says so, and no others; then the migration's."""
    stream = Ascii(terminal=True)
    tell = Progress(stream)
    tell(Waiting(waited=3, limit=600, holder=Holder(7, application="ampd")))
    tell(Waiting(waited=60, limit=600, holder=Holder(8, application="am\x1b[2Jpd")))
    until(lambda: "pid 8" in stream.getvalue())
    assert tell.idle
    tell(STARTING)
    until(lambda: "1 index" in stream.getvalue())
    tell(APPLIED)
    tell.clear()
    assert "\x1b[2Jpd" not in stream.getvalue()
    left = re.sub(r"\x1b\[\?25[lh]", "", stream.getvalue())
    lines = [line.rstrip() for line in re.split(r"\x1b\[2K|\x1b\[1A|\r|\n", left) if line.strip()]
    assert any(re.match(r"[-\\|/] waiting for the migration lock \(6\d s$", line) for line in lines)
    assert not [line for line in lines if line.startswith("waiting")]
    assert "[1/2] 1 index  3 min 12 s" in lines


@pytest.mark.parametrize(
    ("stream", "bar"), [(Stream(terminal=True), "━━━━"), (Ascii(terminal=True), "----")], ids=["utf-8", "ascii"]
)
def test_the_live_lines_fit_forty_columns(stream: Stream, bar: str) -> None:
    """Bar, number, time and statement are one line, and the migration's name is cut to another."""
    display = LiveDisplay(stream)
    display.show(
        1,
        2,
        "15.7 s, statement 2/3",
        "1 a_name_that_is_longer_than_the_terminal_is",
        "building index: loading tuples in tree 43 %",
    )
    drawn = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", stream.getvalue()).strip()
    display.stop()
    assert "\x1b[3" not in stream.getvalue()  # a colour
    top, name, *phase = drawn.split("\n")
    assert re.sub(r"[━╸╺ -]{4}", bar, top, count=1).rstrip() == f"{bar} 1/2 15.7 s, statement 2/3"
    assert name == "1 a_name_that_is_longer_than_the_termina"
    assert phase == ["building index: loading tuples in tree ", "43 %"]


def test_a_stream_that_fails_stops_nothing() -> None:
    """A terminal that has gone, or is closed, is no reason for an error."""

    class Gone(Stream):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    for stream in (Gone(terminal=True), Gone(terminal=False)):
        tell = Progress(stream)
        for event in (PLANNED, STARTING, STATEMENT, APPLIED):
            tell(event)
        sleep(0.05)
        tell.clear()
