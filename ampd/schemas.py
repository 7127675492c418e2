"""Many schemas of one database, one for each tenant: the same migrations in all of them, so many at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import msgspec

from .config import Limits
from .display import one_line
from .emitter import check_callback
from .errors import AmpdError, ConfigError, ConnectionFailed
from .events import Event, OnEvent, ignore
from .migration import Migration
from .migrator import apply_pending
from .postgres.connection import ANSWER_SECS, Pool, check_event_loop
from .postgres.pool import migration_pool
from .redaction import Hidden
from .report import Report, Result, count
from .run import Run, Source


class SchemasReport(msgspec.Struct, frozen=True):
    """What became of each schema, in the order in which they were given.

    Attributes:
        reports: of the schemas whose runs have succeeded.
        errors: that have ended the runs of the others; `report` of each says how far it had come.
    """

    reports: Mapping[str, Report]
    errors: Mapping[str, AmpdError]

    def text(self) -> str:
        """Return a line of figures, and one for each error."""
        results = [report.result for report in self.reports.values()]
        figures = {
            "migrated": results.count(Result.MIGRATED),
            "up to date": results.count(Result.UP_TO_DATE),
            "ahead of this build": results.count(Result.AHEAD),
            "failed": len(self.errors),
        }
        told = ", ".join(f"{number} {what}" for what, number in figures.items() if number)
        lines = [f"{count(len(results) + len(self.errors), 'schema')}{f': {told}' if told else ''}"]
        return "\n".join((*lines, *(f"{one_line(name)}: {error.message}" for name, error in self.errors.items())))


async def migrate_schemas(
    database: Source,
    schemas: Iterable[str],
    *,
    concurrency: int = 8,
    migrations: Iterable[Migration] | None = None,
    table: str | None = None,
    target: int | None = None,
    limits: Limits | None = None,
    on_event: OnEvent = ignore,
) -> SchemasReport:
    """Bring many schemas of a database to the current schema, as `migrate` does for one; those missing are created.

    An error of one schema ends its run, and no other: look at `errors` of what is returned. A cancellation, and what
    `on_event` raises, end all of them.

    Args:
        database: as for `migrate`. With a URL or a configuration the runs share one pool, made for the call, of two
            connections for each run at a time, opened when they are needed; in a caller's pool they queue.
        schemas: their names, in the order in which they are begun; each once.
        concurrency: how many are migrated at a time.
        migrations: as for `migrate`; read, split and checked once.
        table: what the history is called in each of them.
        target: stop after this version.
        limits: as for `migrate`, for each schema.
        on_event: called with the events of all runs as they come, each of which knows its `schema`; the last one of
            each is `Finished`, or `Stopped` after a cancellation.

    Raises:
        AmpdError: no connection can be made, or what is the same for all of them is wrong: a folder, a URL, a limit.
        TypeError: an argument is of the wrong type.
    """
    source = Hidden(database)
    del database
    check_event_loop()
    names = _names(schemas)
    _check_concurrency(concurrency)
    check_callback(on_event)
    raised: list[Exception] = []
    tasks = anyio.create_task_group()

    def tell(event: Event) -> Any:
        if raised:
            return None
        try:
            return on_event(event)
        except Exception as error:
            raised.append(error)
            tasks.cancel_scope.cancel()
            raise

    first = await Run.of(source, migrations, table=table, target=target, limits=limits, on_event=tell)
    outcomes: dict[str, Report | AmpdError] = {}
    waiting, unreachable = iter(names), False
    if not names:
        return SchemasReport({}, {})

    async def migrate_one_after_the_other() -> None:
        nonlocal unreachable
        for name in waiting:
            try:
                outcomes[name] = await apply_pending(first.for_schema(name, _limits(limits, unreachable), pool))
                unreachable = False
            except AmpdError as error:
                outcomes[name] = error
                unreachable = isinstance(error, ConnectionFailed)
            except Exception as error:
                raised.append(error)
                tasks.cancel_scope.cancel()

    async with first.emit, _shared_pool(first, 2 * concurrency, limits) as pool, tasks:
        for _ in range(min(concurrency, len(names))):
            tasks.start_soon(migrate_one_after_the_other)
    if raised:
        raise raised[0]
    ordered = {name: outcomes[name] for name in names}
    return SchemasReport(
        {name: outcome for name, outcome in ordered.items() if isinstance(outcome, Report)},
        {name: outcome for name, outcome in ordered.items() if isinstance(outcome, AmpdError)},
    )


def _limits(limits: Limits | None, unreachable: bool) -> Limits | None:
    """Return the limits of a run: if the server could not be reached just now, hundreds are not to wait for it."""
    return msgspec.structs.replace(limits or Limits(), connect_wait_secs=0.0) if unreachable else limits


@asynccontextmanager
async def _shared_pool(run: Run, size: int, limits: Limits | None) -> AsyncIterator[Pool | None]:
    """Yield a pool for runs by URL, or None for those in a caller's own, once a connection could be made.

    Raises:
        AmpdError: no connection can be made.
    """
    async with AsyncExitStack() as stack:
        pool: Pool | None = None
        if (url := run.database.url) is not None:
            pool, warnings = migration_pool(url, size)
            await stack.enter_async_context(pool)
            run.warn(warnings)
        first = run.for_schema(run.schema, limits, pool)
        async with first.emit, first.database.sessions(1, lambda session: session.check_answers(ANSWER_SECS)):
            pass
        yield pool


def _names(schemas: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the schemas, each once.

    Raises:
        TypeError: they are no names, or one single name.
    """
    names = None if isinstance(schemas, str) else tuple(dict.fromkeys(schemas))
    for each in (schemas,) if names is None else names:
        if names is None or not isinstance(each, str):
            raise TypeError(f"schemas= takes the names of schemas, a list of str, not {type(each).__name__}")
    return names or ()


def _check_concurrency(concurrency: int) -> None:
    if not isinstance(concurrency, int) or isinstance(concurrency, bool):
        raise TypeError(f"concurrency= takes an int, not {type(concurrency).__name__}")
    if concurrency < 1:
        raise ConfigError(f"concurrency is at least 1, not {concurrency}")
