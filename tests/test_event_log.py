"""Events in a service's log: levels, texts, fields; and nothing of logging configured."""

import json
import logging
from typing import Any, get_args

import pytest
from msgspec.structs import replace

import ampd
from tests.scenes import scripts
from tests.servers import Database

pytestmark = pytest.mark.one_version

REPORT = ampd.Report("h:1/d", "s", 1, (ampd.AppliedNow(1, "users", 12),), (ampd.PendingMigration(2, "jobs"),))
STARTING = ampd.Starting(version=2, name="jobs", number=1, total=3, statements=4, database="h:1/d", schema="s")
BLOCKER = ampd.Blocker(7, "amp", None, None, "active", None, None)
ERROR = ampd.MigrationFailed("it failed", version=2, sqlstate="42703")
RUNNING: dict[str, Any] = {"version": 2, "name": "jobs", "number": 1, "total": 3, "duration_ms": 5}


def server(severity: str) -> ampd.ServerMessage:
    """Return what the server has said with this severity."""
    return ampd.ServerMessage(severity=severity, message="so")


LEVELS: list[tuple[ampd.Event, int]] = [
    (ampd.Planned(applied=1, pending=REPORT.pending, ahead=(), total=2), logging.INFO),
    (STARTING, logging.INFO),
    (
        ampd.StatementStarted(version=2, name="jobs", migration=1, total=3, number=2, statements=4, line=9),
        logging.DEBUG,
    ),
    (
        ampd.Progressed(version=2, name="jobs", number=1, total=3, progress=ampd.StatementProgress("COPY FROM", 9)),
        logging.INFO,
    ),
    (ampd.Applied(**RUNNING), logging.INFO),
    (ampd.Failed(**RUNNING, error=ERROR), logging.ERROR),
    (ampd.Finished(report=REPORT), logging.INFO),
    (ampd.Finished(report=REPORT, error=ERROR), logging.ERROR),
    (ampd.Stopped(report=REPORT, confirmed=True, running=STARTING), logging.INFO),
    (ampd.Waiting(waited=3, limit=9, holder=ampd.Holder(7, "amp", None, None, None)), logging.INFO),
    (ampd.Blocked(version=2, waited=1, limit=9, blockers=(BLOCKER,), queued=1), logging.INFO),
    (ampd.LockRetry(version=2, took=1, delay=5, waited=1, limit=9), logging.INFO),
    (ampd.Retrying(reason="refused", waited=1, limit=9), logging.INFO),
    (ampd.WaitingForConnection(reason="none is free", waited=1, limit=9), logging.INFO),
    (ampd.Warned(message="odd"), logging.WARNING),
    (server("NOTICE"), logging.INFO),
    (server("LOG"), logging.INFO),
    (server("INFO"), logging.INFO),
    (server("DEBUG1"), logging.DEBUG),
    (server("WARNING"), logging.WARNING),
    (server("ERROR"), logging.ERROR),
]


@pytest.mark.parametrize(
    ("event", "level"),
    LEVELS,
    ids=lambda value: type(value).__name__ if isinstance(value, ampd.Event) else logging.getLevelName(value),
)
def test_an_event_in_the_log(event: ampd.Event, level: int, caplog: pytest.LogCaptureFixture) -> None:
    """Each event has its level, its own text, and its fields in values that any formatter can write as JSON."""
    caplog.set_level(logging.DEBUG, "ampd")
    ampd.log_events()(event)
    (record,) = caplog.records
    assert (record.name, record.levelno, record.getMessage()) == ("ampd", level, str(event))
    fields = {name.removeprefix("ampd_"): value for name, value in vars(record).items() if name.startswith("ampd_")}
    assert set(fields) == {"event", *event.__struct_fields__}
    assert fields["event"] == type(event).__name__
    assert json.loads(json.dumps(fields)) == fields
    for name in ("version", "name", "message", "database", "schema"):
        assert fields.get(name) == getattr(event, name, None)


def test_every_event_has_its_line() -> None:
    """The table above has one of each kind."""
    assert {type(event) for event, _ in LEVELS} == set(get_args(ampd.Event))


def test_an_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """It is what the JSON document shows of it."""
    ampd.log_events()(ampd.Failed(**RUNNING, error=ERROR))
    assert vars(caplog.records[0])["ampd_error"] == ERROR.fields()


def test_a_password_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Nor is what would move a terminal's cursor; in the fields as little as in the text."""
    url, odd = "postgresql://u:hunter2@h/d", "\x1b[2J"
    blocker = replace(BLOCKER, query=f"dblink '{url}'")
    log = ampd.log_events()
    caplog.set_level(logging.INFO, "ampd")
    log(ampd.Warned(message=f"{url} {odd}"))
    log(ampd.Blocked(version=1, waited=1, limit=9, blockers=(blocker,), queued=0))
    for record in caplog.records:
        assert not [secret for secret in ("hunter2", "\x1b") if secret in f"{vars(record)}"]


def test_only_what_is_enabled_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The logger given decides, and a percent sign in a text is none of logging's."""
    logger = logging.getLogger("test.events")
    caplog.set_level(logging.WARNING, "test.events")
    log = ampd.log_events(logger)
    log(STARTING)
    log(ampd.Warned(message="100 %s"))
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("test.events", "warning: 100 %s"),
    ]


def test_records_of_a_services_own(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a service gives all of its records gets in no event's way: it would end the run."""
    before = logging.getLogRecordFactory()

    def record(*arguments: Any, **options: Any) -> logging.LogRecord:
        made = before(*arguments, **options)
        made.version = made.database = made.schema = made.event = "a service's"
        return made

    monkeypatch.setattr(logging, "_logRecordFactory", record)
    caplog.set_level(logging.INFO, "ampd")
    ampd.log_events()(STARTING)
    assert (vars(caplog.records[0])["version"], vars(caplog.records[0])["ampd_version"]) == ("a service's", 2)


@pytest.mark.parametrize("given", ["ampd", logging, print])
def test_what_is_no_logger(given: Any) -> None:
    """It is refused at once, not at the first event."""
    with pytest.raises(TypeError) as error:
        ampd.log_events(given)
    assert str(error.value) == f"log_events takes a logging.Logger, not {type(given).__name__}"


def test_logging_is_left_alone() -> None:
    """Neither a handler nor a level is set."""
    logger = logging.getLogger("test.fresh")
    before = (logger.level, list(logger.handlers), logger.propagate, list(logging.root.handlers), logging.root.level)
    ampd.log_events(logger)(STARTING)
    after = (logger.level, list(logger.handlers), logger.propagate, list(logging.root.handlers), logging.root.level)
    assert after == before


@pytest.mark.anyio
@pytest.mark.any_server
async def test_a_run_in_the_log(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """The whole of a run, notices included, is in the log as the command line would print it."""
    caplog.set_level(logging.DEBUG, "ampd")
    heard: list[ampd.Event] = []
    log = ampd.log_events()

    def both(event: ampd.Event) -> None:
        heard.append(event)
        log(event)

    notice = "DO $$BEGIN RAISE WARNING 'look'; END$$"
    with pytest.raises(ampd.MigrationFailed):
        await ampd.migrate(database.url, migrations=scripts(notice, "SELECT 1/0"), on_event=both)
    ours = [record for record in caplog.records if record.name == "ampd"]
    assert [record.getMessage() for record in ours] == [str(event) for event in heard]
    assert [each.levelname for each in ours if each.levelno >= logging.WARNING] == ["WARNING", "ERROR", "ERROR"]
    assert {vars(record)["ampd_database"] for record in ours} == {heard[0].database}
