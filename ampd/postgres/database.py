"""Where sessions come from: a URL, or a caller's pool or connection; and waiting for them."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import asyncpg

from ampd.backoff import QUIET_SECS, Backoff
from ampd.config import Config, MetadataDb
from ampd.database_url import DatabaseUrl, way_to_url
from ampd.errors import AmpdError, ConfigError, ConnectionFailed, NoAnswer
from ampd.events import OnEvent, Retrying, Warned, ignore
from ampd.redaction import Hidden, discreet, without_frames

from .connection import CLOSE_TIMEOUT_SECS, CONNECT_TIMEOUT_SECS, Session, close_timeout, connect, terminate
from .connection_wait import ConnectionsBusy, ConnectionWait, HungUp, PoolInUse, PoolQueue, queue_of
from .failures import BROKEN, DRIVER, connection_error, is_full
from .libpq import driver_arguments
from .passed_connection import PassedConnection
from .passwords import AskedPassword, pool_redact, url_redact

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from .connection import Pool


_Look: TypeAlias = "Callable[[Session], Awaitable[object]]"


@discreet
def _source(hidden: Hidden[Any]) -> DatabaseUrl | Pool | PassedConnection:
    """Return the URL or pool that a caller has given; a connection as a pool of one.

    Raises:
        ConfigError: the URL is malformed, or missing in the configuration.
        TypeError: it is of another type.
    """
    source = hidden.reveal()
    if isinstance(source, MetadataDb):
        return source.require_migrations_url()
    if isinstance(source, DatabaseUrl | asyncpg.Pool):
        return source
    if isinstance(source, str):
        return DatabaseUrl(source)
    if isinstance(source, asyncpg.Connection):
        return PassedConnection.of(source)
    raise TypeError(
        "the database is a PostgreSQL URL, an asyncpg.Pool, an asyncpg.Connection or the metadata_db section of a "
        f"configuration, not {type(source).__name__}"
        + ("; give its metadata_db" if isinstance(source, Config) else way_to_url(source))
    )


class Database:
    """Opens sessions, by a URL or from a caller's pool or connection."""

    def __init__(
        self,
        hidden_source: Hidden[Any],
        *,
        connect_wait_secs: float = 0,
        advisory_lock_wait_secs: float = 0,
        on_event: OnEvent = ignore,
        pool: Pool | None = None,
    ) -> None:
        """Keep where sessions come from; those of a URL can be taken from a `pool` on the same database."""
        source = _source(hidden_source)
        if isinstance(source, DatabaseUrl):
            self._url: DatabaseUrl | None = source
            self._pool: asyncpg.Pool | PassedConnection | None = pool
            self.label: str | None = source.label
            self._role = source.user or os.environ.get("PGUSER")
        else:
            self._url, self._pool, self.label, self._role = None, source, None, None
        self.password: Hidden[Any] | None = None  # in place of the URL's own: a text, or an AskedPassword
        # After the first attempt to connect it knows the password, wherever that comes from.
        self.redact: Callable[[str], str] = source.redact if isinstance(source, DatabaseUrl) else str
        self._password_given = True  # as far as is known
        self._connect_wait_secs = connect_wait_secs
        # How long to wait for a pool that is used up by the service itself.
        self._service_wait_secs = connect_wait_secs + CONNECT_TIMEOUT_SECS
        least = connect_wait_secs if self._pool is None else self._service_wait_secs
        self.connection_wait: ConnectionWait = ConnectionWait(max(advisory_lock_wait_secs, least), on_event)
        self._warned = False
        self._on_event = on_event

    @property
    def url(self) -> DatabaseUrl | None:
        """Return the URL; None for a caller's own pool or connection."""
        return self._url

    @property
    def is_one_connection(self) -> bool:
        """Return whether the caller has passed a connection of its own, which is all there is."""
        return isinstance(self._pool, PassedConnection)

    @property
    def passed(self) -> str:
        """Return what the caller has passed in place of a URL, for messages."""
        return "the connection" if self.is_one_connection else "the pool"

    @property
    def pool_size(self) -> int | None:
        """Return how many sessions there can be at once; None for no limit."""
        return self._pool.get_max_size() if self._pool is not None else None

    def owns_pid(self, pid: int) -> bool:
        """Return whether a backend belongs to the embedding process's own pool."""
        # asyncpg offers no public way to the connections of a pool that are in use.
        holders = getattr(self._pool, "_holders", ())
        connections = (getattr(holder, "_con", None) for holder in holders)
        return any(c is not None and not c.is_closed() and c.get_server_pid() == pid for c in connections)

    @asynccontextmanager
    async def sessions(self, count: int, look: _Look) -> AsyncIterator[list[Session]]:
        """Yield sessions, once `look` has had an answer on the first; while waiting for them the run holds none.

        On the way out they are released; while being cancelled that takes a second or so for each.

        Raises:
            AmpdError: there were none in time, or what `look` raises.
        """
        with self._queue() as queue:
            self.connection_wait.reason = None
            taking = asyncio.ensure_future(self._take(queue, count, look))
            try:
                while not taking.done():
                    await asyncio.wait([taking], timeout=QUIET_SECS)
                    self.connection_wait.report()
            except BaseException:
                await self._stop_taking(taking)
                raise
            sessions = taking.result()
            if count == 1:  # of two, a pooler may have but one server connection for both
                self.connection_wait.acquired()
            if queue is not None:
                queue.served += 1
            try:
                yield sessions
            finally:
                if queue is not None:
                    queue.served -= 1
                for session in reversed(sessions):
                    await self.release(session)

    @asynccontextmanager
    async def second_session(self, timeout: float) -> AsyncIterator[Session]:
        """Yield one more session, for a short time, if one can be opened within `timeout` seconds.

        Raises:
            AmpdError: none can.
        """
        try:
            session = await self._open(0, timeout)
        except ConnectionsBusy as busy:
            raise busy.failure from busy
        try:
            yield session
        finally:
            await self.release(session)

    @contextmanager
    def _queue(self) -> Iterator[PoolQueue | None]:
        """Yield the queue for connections of the pool, in which the run stands from now on; None without a pool."""
        if self._pool is None:
            yield None
            return
        if getattr(self._pool, "_loop", None) not in (None, asyncio.get_running_loop()):  # there is no public way
            what = self.passed
            raise ConfigError(f"{what} belongs to another event loop", hint=f"open {what} in the loop that migrates")
        with queue_of(self._pool) as queue:
            yield queue

    async def _take(self, queue: PoolQueue | None, count: int, look: _Look) -> list[Session]:
        """Wait for sessions without holding any, and for a pool's behind those who came before."""
        if queue is None:
            return await self._take_in_time(None, count, look)
        if queue.head.locked():
            self.connection_wait.reason = self._in_use(count)
        try:
            with anyio.fail_after(self.connection_wait.left):
                await queue.head.acquire()
        except TimeoutError:
            raise self.connection_wait.timeout_error(self._in_use_error(count, by_runs=True)) from None
        try:
            return await self._take_in_time(queue, count, look)
        finally:
            queue.head.release()

    async def _take_in_time(self, queue: PoolQueue | None, count: int, look: _Look) -> list[Session]:
        """Take sessions, again and again until others have left that many.

        Raises:
            AmpdError: there were none in time, or what `look` raises.
        """
        by_service = monotonic()  # since when it is no other run that uses the pool up
        hung_up = Backoff(self._connect_wait_secs, longest_pause=_LONGEST_PAUSE_SECS)
        while True:
            try:
                return await self._take_at_once(count, look)
            except PoolInUse as busy:
                by_runs = queue is not None and queue.served > 0
                failure: AmpdError = self._in_use_error(count, by_runs=by_runs)
                if by_runs:
                    by_service = monotonic()
                elif monotonic() - by_service >= self._service_wait_secs:
                    raise self.connection_wait.timeout_error(failure) from busy
                self.connection_wait.check(failure)
            except HungUp as gone:
                if hung_up.waited >= hung_up.limit:
                    raise gone.failure from gone
                if hung_up.should_report():
                    self._on_event(Retrying(reason=str(gone), waited=hung_up.waited, limit=hung_up.limit))
                await anyio.sleep(hung_up.next_pause())
            except ConnectionsBusy as busy:
                failure = busy.failure
                if count > 1 and is_full(failure):
                    failure.hint = f"{failure.hint}; a no-transaction migration needs two at a time"
                await self.connection_wait.pause(failure)

    async def _take_at_once(self, count: int, look: _Look) -> list[Session]:
        """Take sessions, each of which has answered, or none.

        Raises:
            ConnectionsBusy: others have the connections.
            AmpdError: no connection could be made, or what `look` raises.
        """
        taken: list[Session] = []
        not_free = None if self._pool is None else self._in_use(count)
        self.connection_wait.begin()
        try:
            while len(taken) < count:
                self.connection_wait.reason = not_free
                taken.append(session := await self._open(self._connect_wait_secs, CONNECT_TIMEOUT_SECS))
                self.connection_wait.reason = _UNANSWERED
                question = session.check_answers(self.connection_wait.at_once) if len(taken) > 1 else look(session)
                await self._check_answer(session, question)
            self.connection_wait.reason = None
        except BaseException:
            for session in reversed(taken):
                await self.release(session)
            raise
        return taken

    async def _check_answer(self, session: Session, question: Awaitable[object]) -> None:
        """Wait for the answer to a question; a pooler accepts clients before it has a server connection for them.

        Raises:
            ConnectionsBusy: there is no answer, or the server has closed the connection at once.
        """
        try:
            await question
        except NoAnswer as error:
            hint = "is the server down? A pooler needs a free server connection, and two for a no-transaction migration"
            raise ConnectionsBusy(
                NoAnswer(_UNANSWERED, hint=f"{hint}: raise its pool size, or run again later")
            ) from error
        except ConnectionFailed as error:
            if session.has_answered or not session.is_closed():
                raise
            raise HungUp(error) from error

    async def _stop_taking(self, taking: asyncio.Future[list[Session]]) -> None:
        """Stop taking sessions, and release those that were taken."""
        taking.add_done_callback(_terminate_all)  # in case we are cancelled again
        with anyio.CancelScope(shield=True):
            while not taking.done():
                taking.cancel()
                await asyncio.wait([taking], timeout=CLOSE_TIMEOUT_SECS)

    def _in_use(self, count: int) -> str:
        """Return what is not free of the pool, or of the connection that was passed."""
        if self.is_one_connection:
            return "another run uses the connection that was passed"
        if count > 1:
            return f"two of the pool's {self.pool_size} connections are needed and not free"
        if self.pool_size == 1:
            return "the pool's only connection is not free"
        return f"none of the pool's {self.pool_size} connections is free"

    def _in_use_error(self, count: int, *, by_runs: bool) -> ConnectionFailed:
        if self.is_one_connection:
            hint = "await one run after the other, or pass a pool"
        elif by_runs:
            hint = "make the pool larger, migrate fewer schemas at a time, or raise advisory_lock_wait_secs"
        else:
            hint = "make the pool larger, or migrate before the service takes connections from it"
        return ConnectionFailed(self._in_use(count), hint=hint)

    async def _open(self, wait: float, timeout: float) -> Session:
        connection = await self._connection(wait, timeout)
        return Session(connection, self._replacement, self.redact, self._role, from_pool=self._pool is not None)

    async def _connection(self, wait: float, timeout: float) -> Any:
        """Return an open connection, new or from the pool; retry for `wait` seconds.

        Raises:
            ConnectionsBusy: others have all connections.
            AmpdError: the last attempt failed.
        """
        attempt = self._attempts(timeout)
        # The driver fails in any way on answers that no PostgreSQL gives; with a pool, so may a callback of its owner.
        refusals = (Exception,) if self._pool is None else (OSError, asyncpg.PostgresError, asyncpg.InterfaceError)
        backoff = Backoff(wait, longest_pause=_LONGEST_PAUSE_SECS, quiet_secs=0)
        backoff.begin()
        while True:
            try:
                connection = await attempt()
                if not connection.is_closed():
                    return connection
                terminate(connection)  # a pool then has room for another
                raise ConnectionResetError("connection_lost right after the greeting")
            except refusals as error:
                asked = self.password.reveal() if self.password else None
                if isinstance(asked, AskedPassword) and asked.raised is error:
                    raise
                failure, worth_retrying = self._failure(error)
            if not worth_retrying or backoff.waited >= wait:
                raise failure
            if backoff.should_report():
                self._on_event(Retrying(reason=str(failure.args[0]), waited=backoff.waited, limit=wait))
            await anyio.sleep(backoff.next_pause())

    def _attempts(self, timeout: float) -> Callable[[], Awaitable[Any]]:
        """Return a function that makes an attempt of at most `timeout` seconds.

        Raises:
            ConfigError: the URL cannot be used.
        """
        if self._pool is not None:
            return partial(self._acquire, self._pool, timeout)
        assert self._url is not None
        given = self.password
        options = None if given is None else {"password": given.reveal()}
        arguments, warnings = driver_arguments(self._url, timeout, options)
        del options
        self.redact = url_redact(self._url, arguments.reveal().get("password"))
        self._password_given = bool(arguments.reveal().get("password"))
        if not self._warned:
            self._warned = True
            for warning in warnings:
                self._on_event(Warned(message=warning))
        return lambda: connect(arguments)

    async def _acquire(self, pool: Pool | PassedConnection, timeout: float) -> Any:
        """Return a connection of the pool; from then on the password that the pool has is hidden as well."""
        try:
            return await pool.acquire(timeout=timeout)
        except BaseException as error:  # a cancellation too
            without_frames(error, DRIVER)
            raise
        finally:
            self.redact = pool_redact(pool, self._url)

    def _failure(self, error: Exception) -> tuple[Exception, bool]:
        """Return the exception for a failed attempt, and whether another attempt is worth making."""
        pool = self._pool
        used_up = pool is not None and not pool.get_idle_size() and pool.get_size() >= pool.get_max_size()
        if isinstance(error, TimeoutError) and used_up:
            return PoolInUse(ConnectionFailed("no connection of the pool is free")), False
        failure, worth_retrying = connection_error(error, self._url, self.redact, password_given=self._password_given)
        return (ConnectionsBusy(failure), False) if is_full(failure) else (failure, worth_retrying)

    async def _replacement(self) -> Any:
        """Return a connection in place of one that is gone, which the server may still count.

        Raises:
            AmpdError: there was none in time.
        """
        backoff = Backoff(self._service_wait_secs, longest_pause=1)
        while True:
            try:
                return await self._connection(self._connect_wait_secs, CONNECT_TIMEOUT_SECS)
            except ConnectionsBusy as busy:
                if backoff.waited >= backoff.limit:
                    raise busy.failure from busy
            await anyio.sleep(backoff.next_pause())

    async def release(self, session: Session) -> None:
        """Close a session, or release it to its pool; a second call does nothing.

        One that cannot be rolled back within `close_timeout` seconds is terminated.
        """
        if not session.released:
            session.released = True
            session.ignore_messages()
            await self._close(session)

    async def _close(self, session: Session) -> None:
        """Close a session of our own; give one of the pool back as it was, or terminate it."""
        connection, secs, released = session.connection, close_timeout(), False
        try:
            if self._pool is None:
                if not session.is_closed() and not session.is_idle():  # a request to cancel may be on its way
                    with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_TIMEOUT_SECS):
                        await connection.close()
                return  # to send Terminate is enough: the server's goodbye would cost a round trip
            with anyio.CancelScope(shield=True):
                if await session.recover():  # a pool wants no open transaction back
                    # The schema has changed under the pool's cached plans and types.
                    await connection.reload_schema_state()
                    released = True  # or closed: the driver sees to that by itself, whoever is cancelled
                    await self._pool.release(connection, timeout=secs)
        except (*BROKEN, asyncpg.PostgresError):
            pass
        finally:
            if not released:  # a pool waits for ever for a connection that is neither released nor closed
                terminate(connection)
                if isinstance(self._pool, PassedConnection):
                    await self._pool.release(connection, timeout=secs)


_LONGEST_PAUSE_SECS = 2.0
_UNANSWERED = "the server, or a pooler before it, has let us in and does not answer"


def _terminate_all(taking: asyncio.Future[list[Session]]) -> None:
    if not taking.cancelled() and taking.exception() is None:
        for session in taking.result():
            session.give_up("the run was cancelled")
