"""Events as spans of OpenTelemetry: one for a run, one for each migration, ended whichever way."""

import sys
from collections.abc import Sequence
from typing import Any

import anyio
import pytest
from msgspec.structs import replace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode, Tracer

import ampd
from ampd.cli.runtime import new_progress, with_spans
from ampd.other_sessions import Blocker, Holder
from tests.scenes import scripts
from tests.servers import Database

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]

REPORT = ampd.Report("h:1/d", "s", None, (), ())
STARTING = ampd.Starting(version=2, name="jobs", number=1, total=3, statements=4, database="h:1/d", schema="s")


class Traced:
    """A tracer, and the spans that have ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: Tracer = provider.get_tracer("test")

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        """Return the spans, in the order in which they have begun."""
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def statuses(self) -> list[tuple[str, StatusCode, str | None]]:
        """Return name, status and description of each span."""
        return [(span.name, span.status.status_code, span.status.description) for span in self.spans]


@pytest.fixture
def traced() -> Traced:
    """A tracer of the test's own."""
    return Traced()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    """Return the attributes of a span."""
    return dict(span.attributes or {})


def place(database: Database, schema: str = "public") -> dict[str, Any]:
    """Return what the conventions say of a database."""
    return {
        "db.system.name": "postgresql",
        "db.operation.name": "migrate",
        "db.namespace": f"{database.name}|{schema}",
        "server.address": database.server.host,
        "server.port": database.server.port,
    }


@pytest.mark.any_server
async def test_a_run_and_its_migrations(database: Database, traced: Traced) -> None:
    """The span of a run is in the one that it was called in, and contains one for each migration."""
    files = scripts("SELECT 1; SELECT 2", "-- no-transaction\nVACUUM")
    with traced.tracer.start_as_current_span("lifespan") as outer:
        await ampd.migrate(database.url, migrations=files, on_event=ampd.trace_events(traced.tracer))
    _, run, first, second = traced.spans
    assert [each.name for each in (run, first, second)] == ["ampd migrate", "migration 1 step", "migration 2 step"]
    assert run.parent is not None
    assert run.context is not None
    assert run.parent.span_id == outer.get_span_context().span_id
    assert {each.parent and each.parent.span_id for each in (first, second)} == {run.context.span_id}
    assert attributes(run) == place(database) | {"ampd.run.result": "migrated", "ampd.run.applied": 2}
    facts = {
        "ampd.migration.version": 1,
        "ampd.migration.name": "step",
        "ampd.migration.transactional": True,
        "ampd.migration.statements": 2,
    }
    assert attributes(first) == place(database) | facts
    facts = {
        "ampd.migration.version": 2,
        "ampd.migration.name": "step",
        "ampd.migration.transactional": False,
        "ampd.migration.statements": 1,
    }
    assert attributes(second) == place(database) | facts
    assert {span.status.status_code for span in traced.spans} == {StatusCode.UNSET}


async def test_a_run_with_nothing_to_do(database: Database, traced: Traced) -> None:
    """It is a span all the same; and a callback can be used again, for a pool as well."""
    trace = ampd.trace_events(traced.tracer)
    await ampd.migrate(database.url, migrations=scripts("SELECT 1"), on_event=trace)
    async with ampd.open_pool(
        ampd.MetadataDb(url=ampd.DatabaseUrl(database.url)), migrations=scripts("SELECT 1")
    ) as pool:
        await ampd.migrate(pool, migrations=scripts("SELECT 1"), on_event=trace)
    *_, last = traced.spans
    assert len(traced.spans) == 3
    assert attributes(last) == place(database) | {"ampd.run.result": "up_to_date", "ampd.run.applied": 0}


async def test_a_failure(database: Database, traced: Traced) -> None:
    """It is the status of both spans, with SQLSTATE and place in the file, and without any text of a statement."""
    files = scripts("SELECT 1", "SELECT 'geheim';\nINSERT INTO nowhere VALUES ('geheim')")
    with pytest.raises(ampd.MigrationFailed) as error:
        await ampd.migrate(database.url, migrations=files, on_event=ampd.trace_events(traced.tracer))
    failed = {
        "error.type": "42P01",
        "ampd.error.code": "migration_failed",
        "db.response.status_code": "42P01",
        "code.file.path": "2_step.sql",
        "code.line.number": 2,
    }
    message = '2_step.sql:2: relation "nowhere" does not exist (SQLSTATE 42P01)'
    assert error.value.message == message
    assert traced.statuses() == [
        ("ampd migrate", StatusCode.ERROR, message),
        ("migration 1 step", StatusCode.UNSET, None),
        ("migration 2 step", StatusCode.ERROR, message),
    ]
    assert (
        attributes(traced.spans[0]) == place(database) | {"ampd.run.result": "failed", "ampd.run.applied": 1} | failed
    )
    assert attributes(traced.spans[2]).items() >= failed.items()
    assert "geheim" not in "".join(span.to_json() for span in traced.spans)


async def test_a_run_that_is_cancelled(database: Database, traced: Traced) -> None:
    """Both spans end, and say so."""
    begun, trace = anyio.Event(), ampd.trace_events(traced.tracer)

    def both(event: ampd.Event) -> None:
        trace(event)
        if isinstance(event, ampd.StatementStarted):
            begun.set()

    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            await ampd.migrate(database.url, migrations=scripts("SELECT pg_sleep(60)"), on_event=both)

        tasks.start_soon(run)
        await begun.wait()
        tasks.cancel_scope.cancel()
    run_span, migration = traced.spans
    assert [each.status.status_code for each in (run_span, migration)] == [StatusCode.ERROR, StatusCode.ERROR]
    assert run_span.status.description == "nothing was applied; 1 step was stopped, rolled back"
    assert attributes(run_span).items() >= {"ampd.run.result": "stopped", "error.type": "stopped"}.items()
    assert attributes(migration)["error.type"] == "MigrationInterrupted"


RAISED = (StatusCode.ERROR, "on_event raised LookupError")


@pytest.mark.parametrize(
    ("when", "statuses"),
    [
        (ampd.Planned, [("ampd migrate", *RAISED)]),
        (ampd.StatementStarted, [("ampd migrate", *RAISED), ("migration 1 step", *RAISED)]),
        (ampd.Applied, [("ampd migrate", *RAISED), ("migration 1 step", StatusCode.UNSET, None)]),
        (ampd.Finished, [("ampd migrate", StatusCode.UNSET, None), ("migration 1 step", StatusCode.UNSET, None)]),
    ],
)
async def test_a_function_around_it_that_raises(
    database: Database, traced: Traced, when: type[ampd.Event], statuses: list[tuple[str, StatusCode, str | None]]
) -> None:
    """It ends the run, of which no event tells: the spans end all the same, and are not taken for the next run's."""
    trace = ampd.trace_events(traced.tracer)

    def both(event: ampd.Event) -> None:
        trace(event)
        if isinstance(event, when):
            raise LookupError("geheim")

    with pytest.raises(LookupError):
        await ampd.migrate(database.url, migrations=scripts("SELECT 1"), on_event=both)
    assert traced.statuses() == statuses
    await ampd.migrate(database.url, migrations=(), on_event=trace)
    assert traced.statuses() == [*statuses, ("ampd migrate", StatusCode.UNSET, None)]


async def test_a_run_that_never_connects(traced: Traced) -> None:
    """A server that is not there is a span with an error; what is refused before that is none."""
    trace = ampd.trace_events(traced.tracer)
    with pytest.raises(ampd.InvalidMigration):
        await ampd.migrate(
            "postgresql://127.0.0.1:1/d", migrations=scripts("SELECT 1", "SELECT 2")[:1] * 2, on_event=trace
        )
    assert traced.spans == []
    limits = ampd.Limits(connect_wait_secs=0)
    with pytest.raises(ampd.ConnectionFailed):
        await ampd.migrate("postgresql://127.0.0.1:1/d", migrations=scripts("SELECT 1"), limits=limits, on_event=trace)
    (span,) = traced.spans
    assert (span.name, span.status.status_code) == ("ampd migrate", StatusCode.ERROR)
    expected = {"db.namespace": "d", "server.address": "127.0.0.1", "server.port": 1, "error.type": "ConnectionFailed"}
    assert attributes(span).items() >= expected.items()


async def test_runs_at_the_same_time_share_a_callback(database: Database, traced: Traced) -> None:
    """What belongs to whose run is told by the schema."""
    schemas = [f"tenant_{number}" for number in range(6)]
    trace = ampd.trace_events(traced.tracer)
    await ampd.migrate_schemas(database.url, schemas, migrations=scripts("SELECT 1"), on_event=trace)
    runs = {span.context.span_id: span for span in traced.spans if span.parent is None and span.context}
    assert sorted(str(attributes(span)["db.namespace"]) for span in runs.values()) == sorted(
        f"{database.name}|{schema}" for schema in schemas
    )
    within = [span for span in traced.spans if span.parent is not None]
    assert len(within) == len(schemas)
    for span in within:
        assert span.parent is not None
        assert attributes(span)["db.namespace"] == attributes(runs[span.parent.span_id])["db.namespace"]


async def test_a_function_that_raises_ends_the_spans_of_all_runs(database: Database, traced: Traced) -> None:
    """Those of the runs that are stopped with its own, of which the function is told nothing more, too."""
    trace, traced_schemas = ampd.trace_events(traced.tracer), set[str | None]()

    def both(event: ampd.Event) -> None:
        trace(event)
        traced_schemas.add(event.schema)
        if isinstance(event, ampd.Starting) and len(traced_schemas) > 1:
            raise LookupError

    with pytest.raises(LookupError):
        await ampd.migrate_schemas(
            database.url, [f"tenant_{number}" for number in range(4)], migrations=scripts("SELECT 1"), on_event=both
        )
    runs = [attributes(span)["ampd.run.result"] for span in traced.spans if span.parent is None]
    assert len(runs) == len(traced_schemas)
    assert "stopped" in runs


@pytest.mark.parametrize("when", ["on_start", "on_end"])
async def test_a_failing_processor_ends_no_run(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, traced: Traced, when: str
) -> None:
    """What the service's own part of OpenTelemetry raises is logged, and the run goes on."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of the processor")

    monkeypatch.setattr(SimpleSpanProcessor, when, fail)
    trace = ampd.trace_events(traced.tracer)
    report = await ampd.migrate(database.url, migrations=scripts("SELECT 1", "SELECT 2"), on_event=trace)
    assert len(report.applied) == 2
    assert "ZeroDivisionError: of the processor" in caplog.text
    assert "a span could not be made of Finished" in caplog.text or when == "on_start"


def test_waiting_is_an_event_of_the_span(traced: Traced) -> None:
    """With its numbers, and not with what a blocker's session runs; a wait before the plan is part of the run."""
    trace = ampd.trace_events(traced.tracer)
    blocker = Blocker(7, "amp", None, None, "active", None, "SELECT 'geheim'")
    waiting = ampd.Waiting(waited=3, limit=9, holder=Holder(7, "amp", None, None, None, query="geheim"))
    for event in (
        waiting,
        ampd.Planned(applied=0, pending=(), ahead=(), total=1),
        STARTING,
        ampd.Blocked(version=2, waited=1.5, limit=9, blockers=(blocker,), queued=4),
        ampd.LockRetry(version=2, took=1, delay=5, waited=1, limit=9, queued=4),
        ampd.Applied(version=2, name="jobs", number=1, total=3, duration_ms=5, retries=1),
        ampd.Finished(report=replace(REPORT, applied=(ampd.AppliedNow(2, "jobs", 5),))),
    ):
        trace(replace(event, database="h:1/d", schema="s"))
    run, migration = traced.spans
    assert [(event.name, dict(event.attributes or {})) for event in (*run.events, *migration.events)] == [
        ("Waiting", {"ampd.waited": 3, "ampd.limit": 9}),
        ("Blocked", {"ampd.waited": 1.5, "ampd.limit": 9, "ampd.queued": 4}),
        (
            "LockRetry",
            {"ampd.took": 1, "ampd.delay": 5, "ampd.waited": 1, "ampd.limit": 9, "ampd.queued": 4},
        ),
    ]
    assert attributes(migration)["ampd.migration.retries"] == 1
    assert (run.end_time or 0) - (run.start_time or 0) >= 3e9


@pytest.mark.parametrize(
    ("database", "facts"),
    [
        ("[::1]:5432/d", {"db.namespace": "d|s", "server.address": "::1", "server.port": 5432}),
        ("/run/pg:5432/d", {"db.namespace": "d|s", "server.address": "/run/pg", "server.port": 5432}),
        ("a:1,b:2/d", {"db.namespace": "d|s"}),
        ("the pool's database", {"db.namespace": "s"}),
    ],
)
def test_the_address(traced: Traced, database: str, facts: dict[str, Any]) -> None:
    """It is named as far as it is a single one."""
    ampd.trace_events(traced.tracer)(ampd.Finished(report=REPORT, database=database, schema="s"))
    found = attributes(traced.spans[0])
    assert {name: value for name, value in found.items() if name.startswith(("db.namespace", "server"))} == facts


def test_what_is_no_tracer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused at once; and without the package the error says how to install it."""
    with pytest.raises(TypeError) as refused:
        ampd.trace_events("ampd")  # type: ignore[arg-type]
    assert str(refused.value) == "trace_events takes a Tracer of OpenTelemetry, not str"
    assert callable(ampd.trace_events())  # the global provider's, which makes no spans unless the service has set it up
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ampd.ConfigError) as error:
        ampd.trace_events()
    assert str(error.value) == (
        "opentelemetry-api, which trace_events makes spans with, is not installed\n"
        "hint: pip install 'ampd-migrate[otel]'"
    )


def test_the_command_makes_spans_where_opentelemetry_is_set_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], traced: Traced
) -> None:
    """As its own launcher does; elsewhere the command loads nothing of it."""
    progress = new_progress()
    monkeypatch.setattr("opentelemetry.trace.get_tracer", lambda *_: traced.tracer)
    both = with_spans(progress)
    both(ampd.Warned(message="so"))
    both(ampd.Finished(report=REPORT))
    assert (capsys.readouterr().err, [span.name for span in traced.spans]) == ("warning: so\n", ["ampd migrate"])
    monkeypatch.delitem(sys.modules, "opentelemetry.sdk.trace")
    assert with_spans(progress) is progress
