"""The connection: the only module that imports asyncpg. Whole messages of the simple protocol in, ampd's errors out.

Nothing here prepares a statement or leaves a snapshot behind: every message is one round trip, goes through any pooler,
and what a query answers comes back on the one channel that such a message has, an INFO with a secret mark on it.
"""

from __future__ import annotations

import asyncio
import getpass
import inspect
import os
import random
import re
import socket
import ssl
import stat
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import anyio
import asyncpg
import msgspec

from .config import DatabaseUrl, MetadataDb, way_to_url
from .display import folded
from .errors import (
    AmpdError,
    AuthenticationFailed,
    ConfigError,
    ConnectionFailed,
    DatabaseMissing,
    LockTimeout,
    NoAnswer,
    PermissionDenied,
    ReadOnlyServer,
    TlsFailed,
)
from .events import OnEvent, Retrying, ServerMessage, WaitingForConnection, Warned, ignore
from .hiding import Hidden, discreet, without_frames
from .patience import QUIET_SECS, Patience

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

T = TypeVar("T")
Pool: TypeAlias = asyncpg.Pool

APPLICATION_NAME = "ampd"
CONNECT_TIMEOUT_SECS = 10.0
ANSWER_SECS = 15.0  # for a question that takes milliseconds
GOODBYE_SECS = 0.7  # for a rollback or a farewell while being cancelled; after that the socket is just closed
_UNLIMITED_SECS = 315_360_000.0  # with no timeout at all the driver takes a pool's command_timeout
RUN_AGAIN = "run the command again: what was committed stays, nothing is applied twice"
# A dead peer is noticed within IDLE + INTERVAL x COUNT seconds on either side.
KEEPALIVE = {"idle": 5, "interval": 2, "count": 3}


def patience() -> float:
    """Return how many seconds a rollback or a farewell may take: few while the task is being cancelled."""
    task = asyncio.current_task()
    return GOODBYE_SECS if task is not None and task.cancelling() else ANSWER_SECS


def literal(value: str | None) -> str:
    """Return an SQL string literal, exact whatever `standard_conforming_strings` says."""
    if value is None:
        return "NULL"
    quoted = value.replace("'", "''")
    return "E'" + quoted.replace("\\", "\\\\") + "'" if "\\" in quoted else f"'{quoted}'"


def identifier(name: str) -> str:
    """Return a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def do_block(body: str) -> str:
    """Return a DO statement around a PL/pgSQL body, in a dollar quote that the body does not contain."""
    tag = "$ampd$"
    while tag in body:
        tag = f"$ampd_{token_hex(4)}$"
    return f"DO {tag}{body}{tag}"


def check_event_loop() -> None:
    """Refuse to be run by anything but asyncio; trio can be a guest of an asyncio loop, and has no task of it then.

    Raises:
        ConfigError: this is not a task of asyncio's.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    if task is None:
        raise ConfigError(
            "ampd runs on asyncio, as asyncpg does, and this is another event loop",
            hint="use asyncio.run(...) or anyio.run(..., backend='asyncio'); from trio, a thread of its own: "
            "await trio.to_thread.run_sync(asyncio.run, ampd.migrate(...))",
        )


class ServerError(Exception):
    """What the server said of a message that it refused; `position` counts from 1 in the whole message."""

    def __init__(self, error: Any, redact: Callable[[str], str], role: str | None) -> None:
        self.role = role
        self.redact = redact
        self.message = folded(redact(error.message or str(error)))
        super().__init__(self.message)
        self.sqlstate: str = error.sqlstate
        self.detail = folded(redact(error.detail)) if error.detail else None
        self.hint = folded(redact(error.hint)) if error.hint else None
        self.position = int(error.position) if (error.position or "").isdecimal() else None
        self.context: str = error.context or ""


class Session:
    """One connection at a time, spoken to in whole messages."""

    def __init__(
        self,
        connection: Any,
        connect: Callable[[], Awaitable[Any]],
        redact: Callable[[str], str],
        role: str | None,
        *,
        lent: bool,
    ) -> None:
        self._connect = connect
        self._lent = lent
        self.pooled = False  # whether a pooler stands before the server; known once a backend has told its process id
        self._redact = redact
        self.role = role
        self._mark = token_hex(8)
        self._on_note: Callable[[str], None] | None = None
        self._on_event: OnEvent = ignore
        self._speech = anyio.CancelScope()  # around the message that is being answered
        self._raised: Exception | None = None  # by whom its notices were told to
        self._speaking = anyio.Lock()  # one message at a time: a guard is spoken to by two tasks
        self.busy = False
        self.given_back = False
        self.connections = 0  # how many it has had so far
        self._take(connection)

    def _take(self, connection: Any) -> None:
        self.connection = connection
        self.connections += 1
        self.server_pid = int(connection.get_server_pid())  # a pooler tells one that is no backend's
        # Error positions count bytes in a database whose encoding is SQL_ASCII.
        self.counts_bytes = str(getattr(connection.get_settings(), "server_encoding", "")) == "SQL_ASCII"
        self._given_up: str | None = None
        self.has_answered = False  # to any message since its greeting
        self._unanswered = False  # cancelled: only the next answer tells where the transaction stands
        self.backend_pid: int | None = None  # of the running transaction: behind a pooler not that of the connection
        connection.add_log_listener(self._hear)

    async def reopen(self) -> bool:
        """Open another connection if this one is gone, and return whether it was; nothing of its session is left.

        Raises:
            AmpdError: none is to be had.
        """
        if not self.is_closed():
            return False
        _terminate(self.connection)  # a pool then has room for another
        self._take(await self._connect())
        return True

    @property
    def shared(self) -> bool:
        """Tell whether others, before us and after us, use the same session of the server."""
        return self._lent or self.pooled

    async def run(
        self, message: str, *, on_note: Callable[[str], None] | None = None, on_event: OnEvent = ignore
    ) -> None:
        """Send one message of any number of statements and wait for its end.

        Raises:
            ServerError: for `translate()` or a better-informed caller to turn into an AmpdError.
            ConnectionFailed: the connection was lost.
            Exception: whatever `on_note` or `on_event` has raised; the message is cancelled.
        """
        async with self._speaking:
            self._on_note, self._on_event = on_note, on_event
            self.busy = self._unanswered = True
            self._raised = None
            try:
                with anyio.CancelScope() as self._speech:
                    await self.connection.execute(message, timeout=_UNLIMITED_SECS)
                    self._unanswered, self.has_answered = False, True
            except (*_BROKEN, *_LOST) as error:
                _terminate(self.connection)
                if isinstance(error, UnicodeDecodeError):
                    raise ConnectionFailed(
                        "the connection was given up: the server's answer is not UTF-8",
                        hint="remove SET client_encoding from the file, and run again",
                    ) from error
                said = error.__cause__ if isinstance(error.__cause__, asyncpg.PostgresError) else error
                sqlstate = getattr(said, "sqlstate", None)
                if sqlstate in _LIMITS_OF_SESSIONS and not self._given_up:
                    raise ServerError(said, self._redact, self.role) from error
                raise lost(self._given_up or _reason_lost(said), self._redact, sqlstate) from error
            except asyncpg.PostgresError as error:
                self._unanswered, self.has_answered = False, True
                tells = self._redact(str(error)) != str(error)  # a traceback would show the driver's own words as well
                raise ServerError(error, self._redact, self.role) from (None if tells else error)
            except Exception as error:  # what the driver falls over in an answer that no PostgreSQL gives
                _terminate(self.connection)
                raise malformed(error) from error
            finally:
                self._on_event = ignore
                if not self._unanswered:  # else notes that are on their way still tell how far it came
                    self._on_note = None
                self.busy = False
        if self._raised is not None:
            raise self._raised

    def note(self, expression: str) -> str:
        """Return a PL/pgSQL statement that sends the value of an SQL expression to `on_note`."""
        return f"RAISE INFO '{self._mark} %', {expression};"

    def note_pid(self) -> str:
        """Return a PL/pgSQL statement that sends `pid` and the backend's process id to `on_note`."""
        return self.note("pg_catalog.concat('pid ', pg_catalog.pg_backend_pid())")

    def marker(self, text: str) -> str:
        """Return the shortest SQL statement that sends a constant (of plain characters) to `on_note`."""
        return f"DO 'BEGIN RAISE INFO ''{self._mark} {text}''; END'"

    def give_up(self, reason: str) -> None:
        """Close the connection under a `run` that would wait for ever; it raises ConnectionFailed for this reason."""
        self._given_up = reason
        _terminate(self.connection)

    async def ask(self, message: str, kind: type[T], *, timeout: float = ANSWER_SECS) -> T:
        """Send a message that notes one JSON document and return that document; timeout in seconds.

        Raises:
            AmpdError: what `translate()` makes of a refusal; NoAnswer after the timeout.
        """
        answers: list[str] = []
        try:
            with anyio.fail_after(timeout):
                await self.run(message, on_note=answers.append)
        except TimeoutError as error:
            _terminate(self.connection)
            raise NoAnswer(f"the server has not answered for {timeout:g} s", hint=RUN_AGAIN) from error
        except ServerError as error:
            await self.recover()
            raise translate(error) from error
        try:
            return msgspec.json.decode(answers[-1], type=kind)
        except msgspec.ValidationError:
            raise
        except (IndexError, msgspec.DecodeError, RecursionError) as error:
            _terminate(self.connection)
            raise malformed(error) from error

    async def greet(self, timeout: float) -> None:
        """Make sure that a server stands behind the connection.

        Raises:
            NoAnswer: none has answered within `timeout` seconds.
        """
        await self.ask(do_block(f"BEGIN {self.note('pg_catalog.pg_backend_pid()')} END"), int, timeout=timeout)

    async def recover(self, resets: str = "") -> bool:
        """End a failed transaction, even while being cancelled; False if the connection is gone, for `reopen`.

        `resets` take back what no rollback does, on the same server connection if there is a pooler.
        """
        if self.is_closed():
            return False
        if not self._unanswered and not self.connection.is_in_transaction():
            return True
        try:
            with anyio.CancelScope(shield=True), anyio.fail_after(patience()):
                await self.connection.execute(f"ROLLBACK; {resets}", timeout=_UNLIMITED_SECS)
                self._unanswered = False
        except (*_BROKEN, asyncpg.PostgresError):
            _terminate(self.connection)
            return False
        except BaseException:  # cancelled again, from outside of anyio
            _terminate(self.connection)
            raise
        return True

    def is_closed(self) -> bool:
        """Tell whether the connection is known to be gone."""
        try:
            return bool(self.connection.is_closed())
        except asyncpg.InterfaceError:  # its pool knew first, and has taken it back
            return True

    def hush(self) -> None:
        """Stop hearing notices: a pool wants its connections back as they were."""
        if not self.is_closed():
            self.connection.remove_log_listener(self._hear)

    def _hear(self, _: object, message: Any) -> None:
        text: str = message.message or ""
        try:
            if message.severity_en == "INFO" and text.startswith(self._mark):
                if len(text) > _LARGEST_NOTE:
                    raise malformed(f"a note of {len(text)} characters")
                if self._on_note:
                    self._on_note(text[len(self._mark) + 1 :])
            else:
                severity = message.severity_en or message.severity or "NOTICE"
                self._on_event(ServerMessage(severity=severity, message=folded(self._redact(text))))
        except Exception as error:  # the driver calls from the event loop, which would do no more than log it
            self._raised = self._raised or error
            self._speech.cancel()


def malformed(error: object) -> ConnectionFailed:
    """Return the error for an answer that no PostgreSQL server gives."""
    return ConnectionFailed(
        f"the server's answer cannot be understood ({type(error).__name__ if isinstance(error, Exception) else error})",
        hint="is this a PostgreSQL server, and nothing in between that changes what it says?",
    )


_LARGEST_NOTE = 64 * 2**20  # characters of what the server notes: a history of the largest size fits in


def _terminate(connection: Any) -> None:
    """Close a connection at once; one that its pool has taken back is closed already, and no longer answers to us."""
    with suppress(asyncpg.InterfaceError):
        connection.terminate()


# What the driver raises when it cannot go on with a connection: a time-out is an OSError, and text that is no UTF-8 may
# come where a script has set another client_encoding.
_BROKEN = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError, UnicodeDecodeError)

# idle_in_transaction_session_timeout and transaction_timeout: they end the session, and it is the file that sets them.
_LIMITS_OF_SESSIONS = ("25P03", "25P04")

# What the server says when it ends a connection.
_LOST = (
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)


class NotNow(Exception):
    """Others have the connections that a run needs; nothing was begun. `failure` is what to raise if it stays so."""

    def __init__(self, failure: AmpdError) -> None:
        super().__init__(failure.message)
        self.failure = failure


class _PoolInUse(NotNow):
    """Every connection of the pool is lent."""


class _HungUp(NotNow):
    """The server has let us in and closed the connection, which is no better than letting nobody in."""


class Scarcity:
    """The patience of one run with those who have the connections that it needs."""

    def __init__(self, limit: float, on_event: OnEvent) -> None:
        self._patience = Patience(limit, longest_pause=_LONGEST_PAUSE)
        self._on_event = on_event
        self.begin()
        self.had()

    def had(self) -> None:
        """Begin to count anew: the run has the connections that it needs."""
        self._patience.renew()
        self.at_once = _AT_ONCE_SECS  # how long to hold one connection while waiting for a word on another
        self.reason: str | None = None

    @property
    def left(self) -> float:
        """Return for how many more seconds to wait."""
        return max(0, self._patience.limit - self._patience.waited)

    def begin(self) -> None:
        """Begin an attempt."""
        self._attempted = monotonic()

    def tell(self) -> None:
        """Say what is waited for, if it takes long."""
        if self.reason is not None and self._patience.is_worth_a_word():
            waited, limit = self._patience.waited, self._patience.limit
            self._on_event(WaitingForConnection(reason=self.reason, waited=waited, limit=limit))

    async def pause(self, failure: AmpdError) -> None:
        """Wait, with no connection in hand, for those who have them.

        Raises:
            AmpdError: the failure, when there was time enough.
        """
        self.check(failure)
        self.tell()
        self.at_once = min(self.at_once * 2, _AT_ONCE_LONGEST_SECS)
        # Whoever stands in a pooler's queue, with one connection in hand perhaps, keeps others from having two.
        stood = min(monotonic() - self._attempted, _LONGEST_PAUSE) * random.uniform(0.5, 1.5)
        await anyio.sleep(min(max(stood, self._patience.next_pause()), self.left))

    def check(self, failure: AmpdError) -> None:
        """Take note of what is waited for.

        Raises:
            AmpdError: the failure, when there was time enough.
        """
        self.reason = failure.message
        if not self.left:
            raise self.over(failure)

    def over(self, failure: AmpdError) -> AmpdError:
        """Return the error that says how long was waited."""
        if waited := round(self._patience.waited):
            failure.message = f"{failure.message}, for {waited} s"
            failure.args = (failure.message,)
        return failure


_LONGEST_PAUSE = 3.0
_AT_ONCE_SECS, _AT_ONCE_LONGEST_SECS = 1.0, 4.0


class _Line:
    """The runs of this process that want connections of one pool: they stand in line, and each takes all it needs."""

    def __init__(self) -> None:
        self.head = asyncio.Lock()
        self.runs = 0
        self.served = 0  # how many of them have their connections


_LINES: dict[int, _Line] = {}  # by the pool's id, while there are runs: a pool cannot be referred to weakly


@discreet
def _source(hidden: Hidden[Any]) -> DatabaseUrl | Pool:
    """Return where a caller has said that the database is.

    Raises:
        ConfigError: a URL that is none.
        TypeError: something else.
    """
    source = hidden.reveal()
    if isinstance(source, MetadataDb):
        return source.require_url()
    if isinstance(source, DatabaseUrl | asyncpg.Pool):
        return source
    if isinstance(source, str):
        return DatabaseUrl(source)
    raise TypeError(
        "the database is a PostgreSQL URL, an asyncpg.Pool or the metadata_db section of a configuration, "
        f"not {type(source).__name__}{way_to_url(source)}"
    )


class Database:
    """Where sessions come from: a URL, or a pool that belongs to somebody else."""

    def __init__(
        self,
        hidden_source: Hidden[Any],
        *,
        connect_wait_secs: float = 0,
        turn_wait_secs: float = 0,
        on_event: OnEvent = ignore,
    ) -> None:
        source = _source(hidden_source)
        if isinstance(source, DatabaseUrl):
            self._url: DatabaseUrl | None = source
            self._pool: asyncpg.Pool | None = None
            self.label: str | None = source.label
            self._role = source.user or os.environ.get("PGUSER")
            self.redact: Callable[[str], str] = source.redact
        else:
            self._url, self._pool, self.label, self._role, self.redact = None, source, None, None, str
        self._connect_wait_secs = connect_wait_secs
        # Of a pool that the service itself uses up, as before of a server.
        self._service_wait_secs = connect_wait_secs + CONNECT_TIMEOUT_SECS
        least = connect_wait_secs if self._pool is None else self._service_wait_secs
        self.scarcity = Scarcity(max(turn_wait_secs, least), on_event)
        self._remarked = False
        self._on_event = on_event

    @property
    def pool_size(self) -> int | None:
        """Return how many sessions there can be at once; None for no limit."""
        return self._pool.get_max_size() if self._pool is not None else None

    def owns_pid(self, pid: int) -> bool:
        """Tell whether a backend belongs to the embedding process's own pool."""
        # asyncpg offers no public way to the connections that a pool has lent out.
        holders = getattr(self._pool, "_holders", ())
        connections = (getattr(holder, "_con", None) for holder in holders)
        return any(c is not None and not c.is_closed() and c.get_server_pid() == pid for c in connections)

    @asynccontextmanager
    async def sessions(
        self, count: int, look: Callable[[Session], Awaitable[T]]
    ) -> AsyncIterator[tuple[list[Session], T]]:
        """Lend sessions, and what a first `look` on one of them has found; whoever waits for them has none.

        On the way out they are closed, or given back to the pool, within two seconds if cancelled.

        Raises:
            AmpdError: they are not to be had, or what `look` raises.
        """
        with self._line() as line:
            self.scarcity.reason = None
            taking = asyncio.ensure_future(self._take(line, count, look))
            try:
                while not taking.done():
                    await asyncio.wait([taking], timeout=QUIET_SECS)
                    self.scarcity.tell()
            except BaseException:
                await self._leave(taking)
                raise
            sessions, found = taking.result()
            if count == 1:  # of two, a pooler may have but one server connection for both
                self.scarcity.had()
            if line is not None:
                line.served += 1
            try:
                yield sessions, found
            finally:
                if line is not None:
                    line.served -= 1
                for session in reversed(sessions):
                    await self.give_back(session)

    @asynccontextmanager
    async def second_session(self, timeout: float) -> AsyncIterator[Session]:
        """Lend one more session if it is to be had at once, within `timeout` seconds, for a short time.

        Raises:
            AmpdError: it is not.
        """
        try:
            session = await self._open(0, timeout)
        except NotNow as busy:
            raise busy.failure from busy
        try:
            yield session
        finally:
            await self.give_back(session)

    @contextmanager
    def _line(self) -> Iterator[_Line | None]:
        if self._pool is None:
            yield None
            return
        if getattr(self._pool, "_loop", None) not in (None, asyncio.get_running_loop()):  # there is no public way
            raise ConfigError("the pool belongs to another event loop", hint="open the pool in the loop that migrates")
        line = _LINES.setdefault(id(self._pool), _Line())
        line.runs += 1
        try:
            yield line
        finally:
            line.runs -= 1
            if not line.runs:
                del _LINES[id(self._pool)]

    async def _take(
        self, line: _Line | None, count: int, look: Callable[[Session], Awaitable[T]]
    ) -> tuple[list[Session], T]:
        """Wait for sessions with none in hand, and for a pool's behind those who came before."""
        if line is None:
            return await self._take_in_time(None, count, look)
        failure = self._in_use(count, by_runs=True)
        if line.head.locked():
            self.scarcity.reason = failure.message
        try:
            with anyio.fail_after(self.scarcity.left):
                await line.head.acquire()
        except TimeoutError:
            raise self.scarcity.over(failure) from None
        try:
            return await self._take_in_time(line, count, look)
        finally:
            line.head.release()

    async def _take_in_time(
        self, line: _Line | None, count: int, look: Callable[[Session], Awaitable[T]]
    ) -> tuple[list[Session], T]:
        by_service = monotonic()  # since when it is no other run that uses the pool up
        hung_up = Patience(self._connect_wait_secs, longest_pause=_LONGEST_DELAY_SECS)
        while True:
            try:
                return await self._take_at_once(count, look)
            except _PoolInUse as busy:
                by_runs = line is not None and line.served > 0
                failure: AmpdError = self._in_use(count, by_runs=by_runs)
                if by_runs:
                    by_service = monotonic()
                elif monotonic() - by_service >= self._service_wait_secs:
                    raise self.scarcity.over(failure) from busy
                self.scarcity.check(failure)
            except _HungUp as gone:
                if hung_up.waited >= hung_up.limit:
                    raise gone.failure from gone
                if hung_up.is_worth_a_word():
                    self._on_event(Retrying(reason=str(gone), waited=hung_up.waited, limit=hung_up.limit))
                await anyio.sleep(hung_up.next_pause())
            except NotNow as busy:
                failure = busy.failure
                if count > 1 and is_full(failure):
                    failure.hint = f"{failure.hint}; a no-transaction migration needs two at a time"
                await self.scarcity.pause(failure)

    async def _take_at_once(self, count: int, look: Callable[[Session], Awaitable[T]]) -> tuple[list[Session], T]:
        taken: list[Session] = []
        not_free = None if self._pool is None else self._in_use(count, by_runs=True).message
        self.scarcity.begin()
        try:
            self.scarcity.reason = not_free
            taken.append(await self._open(self._connect_wait_secs, CONNECT_TIMEOUT_SECS))
            self.scarcity.reason = _UNANSWERED
            found = await self._answered(taken[0], look(taken[0]))
            while len(taken) < count:
                self.scarcity.reason = not_free
                taken.append(await self._open(self._connect_wait_secs, CONNECT_TIMEOUT_SECS))
                self.scarcity.reason = _UNANSWERED
                await self._answered(taken[-1], taken[-1].greet(self.scarcity.at_once))
            self.scarcity.reason = None
        except BaseException:
            for session in reversed(taken):
                await self.give_back(session)
            raise
        return taken, found

    async def _answered(self, session: Session, look: Awaitable[T]) -> T:
        """Return what is answered on a new session; a pooler accepts clients and lets them wait for their server.

        Raises:
            NotNow: nothing is; or the server has hung up at once.
        """
        try:
            return await look
        except NoAnswer as error:
            hint = "is the server down? A pooler needs a free server connection, and two for a no-transaction migration"
            raise NotNow(NoAnswer(_UNANSWERED, hint=f"{hint}: raise its pool size, or run again later")) from error
        except ConnectionFailed as error:
            if session.has_answered or not session.is_closed():
                raise
            raise _HungUp(error) from error

    async def _leave(self, taking: asyncio.Future[tuple[list[Session], Any]]) -> None:
        """Give up taking sessions, and give back what was taken."""
        taking.add_done_callback(_terminate_all)  # should we be cancelled once more
        with anyio.CancelScope(shield=True):
            while not taking.done():
                taking.cancel()
                await asyncio.wait([taking], timeout=GOODBYE_SECS)

    def _in_use(self, count: int, *, by_runs: bool) -> ConnectionFailed:
        assert self._pool is not None
        size = self._pool.get_max_size()
        what = (
            f"none of the pool's {size} connections is free" if size > 1 else "the pool's only connection is not free"
        )
        if count > 1:
            what = f"two of the pool's {size} connections are needed and not free"
        if by_runs:
            hint = "make the pool larger, migrate fewer schemas at a time, or raise turn_wait_secs"
        else:
            hint = "make the pool larger, or migrate before the service takes connections from it"
        return ConnectionFailed(what, hint=hint)

    async def _open(self, wait: float, timeout: float) -> Session:
        connection = await self._connection(wait, timeout)
        return Session(connection, self._another, self.redact, self._role, lent=self._pool is not None)

    async def _connection(self, wait: float, timeout: float) -> Any:
        """Return a connection that stands: connect, or take one from the pool; try again for `wait` seconds.

        Raises:
            NotNow: others have all that there may be.
            AmpdError: it is not to be had.
        """
        attempt = self._attempts(timeout)
        # The driver falls over answers that no PostgreSQL gives; of a pool it may also be the service's own callback.
        refusals = (Exception,) if self._pool is None else (OSError, asyncpg.PostgresError, asyncpg.InterfaceError)
        begun = told = monotonic()
        delay = 0.05
        while True:
            try:
                connection = await attempt()
                if not connection.is_closed():
                    return connection
                _terminate(connection)  # a pool then has room for another
                raise ConnectionResetError("connection_lost right after the greeting")
            except refusals as error:
                failure, worth_retrying = self._meaning(error)
            waited = monotonic() - begun
            if not worth_retrying or waited + delay > wait:
                raise failure
            if monotonic() - told > 3 or told == begun:
                told = monotonic()
                self._on_event(Retrying(reason=str(failure.args[0]), waited=waited, limit=wait))
            await anyio.sleep(delay)
            delay = min(delay * 1.6, _LONGEST_DELAY_SECS)

    def _attempts(self, timeout: float) -> Callable[[], Awaitable[Any]]:
        """Return how to make an attempt, `timeout` seconds long.

        Raises:
            ConfigError: none is worth making.
        """
        if (pool := self._pool) is not None:
            return lambda: _acquired(pool, timeout)
        assert self._url is not None
        arguments, remarks = driver_arguments(self._url, timeout)
        if not self._remarked:
            self._remarked = True
            for remark in remarks:
                self._on_event(Warned(message=remark))
        return lambda: _connect(arguments)

    def _meaning(self, error: Exception) -> tuple[Exception, bool]:
        """Return what a failed attempt is raised as, and whether it is worth another one."""
        if isinstance(error, TimeoutError) and self._is_used_up():
            return _PoolInUse(ConnectionFailed("no connection of the pool is free")), False
        failure, worth_retrying = _failure_of(error, self._url)
        return (NotNow(failure), False) if is_full(failure) else (failure, worth_retrying)

    def _is_used_up(self) -> bool:
        pool = self._pool
        return pool is not None and not pool.get_idle_size() and pool.get_size() >= pool.get_max_size()

    async def _another(self) -> Any:
        """Return a connection in place of one that is gone, whose server may not have noticed yet.

        Raises:
            AmpdError: none is to be had.
        """
        patience = Patience(self._service_wait_secs, longest_pause=1)
        while True:
            try:
                return await self._connection(self._connect_wait_secs, CONNECT_TIMEOUT_SECS)
            except NotNow as busy:
                if patience.waited >= patience.limit:
                    raise busy.failure from busy
            await anyio.sleep(patience.next_pause())

    async def give_back(self, session: Session) -> None:
        """Close a session, or give it back to its pool, within a second; once is enough."""
        if not session.given_back:
            session.given_back = True
            session.hush()
            await self._farewell(session)

    async def _farewell(self, session: Session) -> None:
        connection, secs, released = session.connection, patience(), False
        try:
            if self._pool is None:  # the server needs no more than to be told
                with anyio.CancelScope(shield=True), anyio.move_on_after(GOODBYE_SECS):
                    await connection.close()
                return
            with anyio.CancelScope(shield=True):
                if await session.recover():  # a pool wants no open transaction back
                    # The schema has changed under the pool's cached plans and types.
                    await connection.reload_schema_state()
                    released = True  # or closed: the driver sees to that by itself, whoever is cancelled
                    await self._pool.release(connection, timeout=secs)
        except (*_BROKEN, asyncpg.PostgresError):
            pass
        finally:
            if not released:  # a pool waits for ever for a connection that is neither released nor closed
                _terminate(connection)


_LONGEST_DELAY_SECS = 2.0
_UNANSWERED = "the server, or a pooler before it, has let us in and does not answer"


def _terminate_all(taking: asyncio.Future[tuple[list[Session], Any]]) -> None:
    if not taking.cancelled() and taking.exception() is None:
        for session in taking.result()[0]:
            session.give_up("the run was cancelled")


_DRIVER = "asyncpg"  # whose frames hold the password


async def _acquired(pool: Pool, timeout: float) -> Any:
    try:
        return await pool.acquire(timeout=timeout)
    except BaseException as error:  # a cancellation too
        without_frames(error, _DRIVER)
        raise


async def _connect(arguments: Hidden[dict[str, Any]]) -> asyncpg.Connection:
    """Connect; cancelled, let the attempt come to its end: asyncpg leaves an error behind that nobody retrieves."""
    attempt = asyncio.ensure_future(asyncpg.connect(**arguments.reveal()))
    try:
        return await asyncio.shield(attempt)
    except asyncio.CancelledError:
        attempt.add_done_callback(_discard)
        with anyio.CancelScope(shield=True), anyio.move_on_after(GOODBYE_SECS):
            await asyncio.wait([attempt])
        attempt.cancel()
        raise


def _discard(attempt: asyncio.Future[Any]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().terminate()


def _kept_alive(keepalive: Mapping[str, int] | None, user_timeout_ms: int | None) -> type[asyncpg.Connection]:
    """Return a connection class whose sockets notice a dead server within seconds."""

    class KeptAlive(asyncpg.Connection):  # type: ignore[misc]
        def __init__(self, protocol: Any, transport: Any, *rest: Any) -> None:
            super().__init__(protocol, transport, *rest)
            sock = transport.get_extra_info("socket")
            if sock is None or sock.family == socket.AF_UNIX:
                return
            if keepalive:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, option in (("idle", "TCP_KEEPIDLE"), ("interval", "TCP_KEEPINTVL"), ("count", "TCP_KEEPCNT")):
                    if hasattr(socket, option):  # not every platform has all three
                        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), keepalive[name])
            if user_timeout_ms and user_timeout_ms > 0 and hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)

    return KeptAlive


# What libpq takes in a URL and asyncpg would send to the server as a setting, to be refused there.
_IMPLIED = {
    "gssencmode": ("disable", "prefer", "allow"),
    "channel_binding": ("disable", "prefer"),
    "sslcertmode": ("allow",),
    "sslcompression": ("0",),
    "sslsni": ("0", "1"),
    "load_balance_hosts": ("disable",),
    "client_encoding": ("auto", "utf8", "utf-8", "UTF8", "UTF-8"),
    "gssdelegation": ("0",),
    "min_protocol_version": ("3.0",),
    "max_protocol_version": ("3.0",),
}
_SESSION_ATTRIBUTES = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
_INSTEAD = {
    "ssl": "use sslmode=require for a connection that must be encrypted, or another sslmode",
    "requiressl": "use sslmode=require for a connection that must be encrypted, or another sslmode",
    "service": "write what the service stands for into the URL",
    # Of Prisma, of SQLAlchemy's dialects, and of JDBC.
    **dict.fromkeys(
        ("schema", "currentSchema"),
        "set metadata_db.schema (or AMP_CONFIG_METADATA_DB__SCHEMA) to {value}, and remove {name} from the URL",
    ),
    **dict.fromkeys(
        ("connection_limit", "pool_timeout", "socket_timeout"),
        "remove {name} from the URL: the pool of a service is configured under [metadata_db], as pool_size",
    ),
    **dict.fromkeys(
        (
            "pgbouncer",
            "statement_cache_size",
            "prepared_statement_cache_size",
            "prepared_statement_name_func",
            "prepareThreshold",
            "async_fallback",
        ),
        "remove {name} from the URL: ampd prepares no statements, and works behind a pooler as it is",
    ),
    "sslaccept": "use sslmode=verify-full in place of strict, or sslmode=require",
    "sslidentity": "use sslcert and sslkey",
}
_CANNOT_HONOUR = {
    *_IMPLIED,
    *_INSTEAD,
    *("require_auth", "requirepeer", "sslcrldir", "hostaddr", "replication", "servicefile", "sslkeylogfile"),
    *("scram_client_key", "scram_server_key"),
    *("oauth_issuer", "oauth_client_id", "oauth_client_secret", "oauth_scope"),
}
_HONOURED = {
    *(
        "application_name",
        "connect_timeout",
        "fallback_application_name",
        "gsslib",
        "krbsrvname",
        "options",
        "passfile",
    ),
    *("keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval", "tcp_user_timeout"),
    *("sslcert", "sslcrl", "sslkey", "sslmode", "sslnegotiation", "sslpassword", "sslrootcert"),
    *("ssl_max_protocol_version", "ssl_min_protocol_version", "target_session_attrs"),
}
_SETTINGS = {  # of the server's, which libpq takes in `options` alone, and the driver in the URL as well
    *("DateStyle", "IntervalStyle", "TimeZone", "datestyle", "intervalstyle", "timezone", "search_path", "role"),
    *("default_transaction_isolation", "default_transaction_read_only", "default_tablespace", "temp_tablespaces"),
    *("idle_in_transaction_session_timeout", "idle_session_timeout", "lock_timeout", "statement_timeout"),
    *("transaction_timeout", "lc_messages", "jit", "work_mem", "maintenance_work_mem", "row_security"),
    *("standard_conforming_strings", "client_min_messages", "extra_float_digits", "log_statement"),
}
# What the kernel takes; of milliseconds and of seconds to connect, what libpq does.
_LARGEST = {"keepalives_idle": 32767, "keepalives_interval": 32767, "keepalives_count": 127}
_LARGEST_INTEGER = 2_147_483_647


@discreet
def driver_arguments(url: DatabaseUrl, default_timeout: float) -> tuple[Hidden[dict[str, Any]], tuple[str, ...]]:
    """Return what to call `asyncpg.connect` with for a libpq URL, and remarks for the person.

    Raises:
        ConfigError: a parameter that cannot be honoured, or a private key that others may read.
    """
    parameters = dict(url.parameters)
    _check_known(parameters)
    variables = {
        name: variable
        for variable, name in _VARIABLES_OF_LIBPQ.items()
        if os.environ.get(variable) and name not in parameters and not (name == "service" and url.hosts)
    }
    parameters |= {name: os.environ[variable] for name, variable in variables.items()}
    for name in sorted(_CANNOT_HONOUR & parameters.keys()):
        value = parameters.pop(name)
        if value in _IMPLIED.get(name, ()):
            continue
        if variable := variables.get(name):
            instead = f", or use {_IMPLIED[name][-1]}" if name in _IMPLIED else ""
            raise ConfigError(
                f"the variable {variable} asks for {value}, which psql honours and ampd cannot",
                hint=f"unset {variable} if you can do without it{instead}",
            )
        raise ConfigError(
            f"the database URL asks for {name}={value}, which ampd cannot honour",
            hint=_INSTEAD.get(name, "").format(name=name, value=value)
            or f"remove {name} from the URL if you can do without it"
            + (f", or use {name}={_IMPLIED[name][-1]}" if name in _IMPLIED else ""),
        )
    timeout = _whole_number(parameters, "connect_timeout")
    keepalive = KEEPALIVE | {
        name: secs for name in KEEPALIVE if (secs := _whole_number(parameters, f"keepalives_{name}") or 0) > 0
    }
    switched_on = _whole_number(parameters, "keepalives") != 0
    user_timeout = _whole_number(parameters, "tcp_user_timeout")
    fallback: str = parameters.pop("fallback_application_name", APPLICATION_NAME)
    parameters.setdefault("application_name", os.environ.get("PGAPPNAME", fallback))
    parameters.setdefault("standard_conforming_strings", "on")
    if parameters.get("sslrootcert") == "system":
        parameters["sslrootcert"] = ssl.get_default_verify_paths().cafile or "system"
        parameters.setdefault("sslmode", "verify-full")
    for name in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
        if not parameters.get(name):  # to libpq an empty one is none
            parameters.pop(name, None)
        elif not os.path.isfile(parameters[name]):
            raise ConfigError(
                f"the file {parameters[name]} that {name} of the database URL names does not exist",
                hint=f"correct {name}, or remove it from the URL",
            )
    _check_key(parameters.get("sslkey"))
    _check_variables(parameters)
    _check_user(url)
    attributes = parameters.get("target_session_attrs", "any")
    if attributes not in _SESSION_ATTRIBUTES:
        raise ConfigError(
            f"the database URL has target_session_attrs={attributes}, which is not one of its values",
            hint=f"use one of {', '.join(_SESSION_ATTRIBUTES)}",
        )

    remarks = []
    if _uses_tls(url, parameters) and (closed := _closed_home()):
        remarks.append(_without_tls(closed, parameters))
    arguments: dict[str, Any] = {
        "dsn": url.with_parameters(parameters).reveal(),
        "timeout": default_timeout if timeout is None else timeout if timeout > 0 else None,
        "statement_cache_size": 0,
        "connection_class": _kept_alive(keepalive if switched_on else None, user_timeout),
    }
    password, remark = _from_password_file(url)
    if password is not None:
        arguments["password"] = password
    if remark:
        remarks.append(remark)
    return Hidden(arguments), tuple(remarks)


# What libpq reads from the environment and the driver does not, or not as libpq does; the URL goes before it.
_VARIABLES_OF_LIBPQ = {
    "PGCHANNELBINDING": "channel_binding",
    "PGCLIENTENCODING": "client_encoding",
    "PGCONNECT_TIMEOUT": "connect_timeout",
    "PGDATESTYLE": "datestyle",
    "PGGEQO": "geqo",
    "PGGSSDELEGATION": "gssdelegation",
    "PGGSSENCMODE": "gssencmode",
    "PGHOSTADDR": "hostaddr",
    "PGLOADBALANCEHOSTS": "load_balance_hosts",
    "PGMAXPROTOCOLVERSION": "max_protocol_version",
    "PGMINPROTOCOLVERSION": "min_protocol_version",
    "PGOPTIONS": "options",
    "PGREQUIREAUTH": "require_auth",
    "PGREQUIREPEER": "requirepeer",
    "PGREQUIRESSL": "requiressl",
    "PGSERVICE": "service",
    "PGSSLCERTMODE": "sslcertmode",
    "PGSSLCOMPRESSION": "sslcompression",
    "PGSSLCRLDIR": "sslcrldir",
    "PGSSLSNI": "sslsni",
    "PGTZ": "timezone",
}


def _check_known(parameters: Mapping[str, str]) -> None:
    """Refuse what is no parameter at all, before a password is sent by the rules of one that was misspelled.

    Raises:
        ConfigError: names it, and the nearest that there is.
    """
    known = _HONOURED | _CANNOT_HONOUR | _SETTINGS
    for name in sorted(parameters.keys() - known):
        from difflib import get_close_matches

        spelt = {each.replace("_", ""): each for each in sorted(known)}
        close = get_close_matches(name.lower().replace("_", ""), list(spelt), n=1, cutoff=0.75)
        raise ConfigError(
            f"the database URL has the parameter {name}, which neither libpq nor ampd knows",
            hint=f"did you mean {spelt[close[0]]}?"
            if close
            else "remove it; or if it is a setting of the server, write it as options=-c%20NAME%3DVALUE",
        )


def _whole_number(parameters: dict[str, str], name: str) -> int | None:
    value = parameters.pop(name, None)
    if value is None:
        return None
    largest = _LARGEST.get(name, _LARGEST_INTEGER)
    try:
        number = int(value)
    except ValueError:
        number = largest + 1
    if not -_LARGEST_INTEGER <= number <= largest:
        raise ConfigError(
            f"the database URL has {name}={value}, which is not a whole number up to {largest}",
            hint=f"write {name}=10, say",
        )
    return number


def _check_variables(parameters: Mapping[str, str]) -> None:
    """Refuse a PG* variable that the driver would complain of without its name; it reads PGPORT in any case."""
    ports = os.environ.get("PGPORT") or "5432"
    if not all(re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536 for port in ports.split(",")):
        raise ConfigError(
            f"the variable PGPORT is {ports}, which is not a number from 1 to 65535", hint="correct it, or unset it"
        )
    attributes = os.environ.get("PGTARGETSESSIONATTRS", "any")
    if "target_session_attrs" not in parameters and attributes not in _SESSION_ATTRIBUTES:
        raise ConfigError(
            f"the variable PGTARGETSESSIONATTRS is {attributes}, which is not one of its values",
            hint=f"use one of {', '.join(_SESSION_ATTRIBUTES)}, or unset it",
        )


def _check_user(url: DatabaseUrl) -> None:
    """Refuse to guess a user where there is none: the driver would fall over it."""
    if url.user or os.environ.get("PGUSER"):
        return
    try:
        getpass.getuser()
    except (KeyError, OSError):  # which of them depends on Python's version
        raise ConfigError(
            f"the database URL has no user, and user id {os.getuid()} of this machine has no name",
            hint="write the URL as postgresql://user:***@host:5432/database, or set PGUSER",
        ) from None


def _uses_tls(url: DatabaseUrl, parameters: Mapping[str, str]) -> bool:
    """Tell whether the driver would look for certificates."""
    mode = parameters.get("sslmode") or os.environ.get("PGSSLMODE")
    hosts = [host for host, _ in url.hosts] or os.environ.get("PGHOST", "").split(",")
    return mode != "disable" if mode else not all(host.startswith("/") for host in hosts)


def _closed_home() -> Path | None:
    """Return the folder of certificates in HOME if this user may not even look for it."""
    try:
        (folder := Path.home() / ".postgresql").stat()
    except PermissionError:
        return folder
    except (OSError, RuntimeError):  # there is none, or no home at all, and the driver goes on
        pass
    return None


def _without_tls(closed: Path, parameters: dict[str, str]) -> str:
    """Go on without TLS where libpq does, which has no way to look for certificates either, and say so.

    Raises:
        ConfigError: the connection must be encrypted.
    """
    mode = parameters.get("sslmode") or os.environ.get("PGSSLMODE", "prefer")
    problem, remedy = f"this user may not look for certificates in {closed}", "set HOME to a folder that it may enter"
    if mode not in ("prefer", "allow"):
        raise ConfigError(f"{problem}, as sslmode={mode} makes it", hint=f"{remedy}, or use sslmode=disable")
    parameters["sslmode"] = "disable"
    return f"{problem}, so the connection goes without TLS; {remedy}"


def _check_key(path: str | None) -> None:
    """Refuse a private key that others may read, by libpq's rule: 0600, or 0640 when root owns it."""
    if path is None or not os.path.isfile(path):
        return
    status = os.stat(path)
    if stat.S_IMODE(status.st_mode) & (0o037 if status.st_uid == 0 else 0o077):
        raise ConfigError(
            f"private key file {path} has group or world access",
            hint=f"chmod 0600 {path} (0640 or less if root owns it)",
        )


def _from_password_file(url: DatabaseUrl) -> tuple[str | None, str | None]:
    """Return the password that libpq would find in its file, and a remark on a file that it would ignore.

    The driver has a reader of its own, which takes no escapes and drops a space at the end.
    """
    if url.password is not None or "PGPASSWORD" in os.environ:
        return None, None
    try:
        path = Path(url.parameters.get("passfile") or os.environ.get("PGPASSFILE") or Path.home() / ".pgpass")
        if not path.is_file():
            return None, None
        if path.stat().st_mode & 0o077:
            return "", f"password file {path} has group or world access and is ignored; chmod 0600 {path}"
        return _password_in(path.read_text(errors="surrogateescape"), url), None
    except (OSError, RuntimeError):  # out of reach, or this user has no home: to psql too it is none
        return None, None


def _password_in(text: str, url: DatabaseUrl) -> str | None:
    user = url.user or os.environ.get("PGUSER") or getpass.getuser()
    database = url.database or os.environ.get("PGDATABASE") or user
    lines = [re.match(_PASSWORD_LINE, line) for line in text.split("\n") if not line.startswith("#")]
    for name, port in url.hosts or (("", None),):
        host = name or os.environ.get("PGHOST") or "localhost"
        place = ("localhost" if host.startswith("/") else host, str(port or os.environ.get("PGPORT") or 5432))
        for line in filter(None, lines):
            *known, password = (re.sub(r"\\(.)", r"\1", field) for field in line.groups())
            if all(given in ("*", wanted) for given, wanted in zip(known, (*place, database, user), strict=True)):
                return password
    return None


_PASSWORD_LINE = r"((?:\\.|[^:\\])*):" * 4 + r"((?:\\.|[^:\r])*)"


_VARIABLES = ("PGHOST", "PGPORT", "PGSSLMODE", "PGSSLNEGOTIATION", "PGSSLROOTCERT", "PGSSLMINPROTOCOLVERSION")
_HBA_HINT = "ask the server's administrator for a pg_hba.conf entry for this role, database and address"


def _failure_of(error: Exception, url: DatabaseUrl | None) -> tuple[AmpdError, bool]:
    """Return what `connection_failure` does, the error as its cause unless that shows a password."""
    failure, worth_retrying = connection_failure(error, url)
    tells = url is not None and url.redact(str(error)) != str(error)
    if not tells and not isinstance(failure, ConfigError):
        failure.__cause__ = without_frames(error, _DRIVER)
    return failure, worth_retrying


def connection_failure(error: BaseException, url: DatabaseUrl | None) -> tuple[AmpdError, bool]:
    """Return what a failed attempt to connect means, and whether it is worth another attempt.

    Worth it is whatever can pass by itself: a server that is not there yet, is starting, is full, or is being replaced.
    """
    where = url.label if url else "the pool's server"
    redact: Callable[[str], str] = url.redact if url else str
    user = (url.user if url else None) or os.environ.get("PGUSER")
    role = identifier(user) if user else "the role"
    database = identifier(url.database_or_default) if url else "the database"
    text = redact(str(getattr(error, "message", None) or error).strip() or type(error).__name__)
    sqlstate = getattr(error, "sqlstate", None)
    named = text.rpartition('"')[0].rpartition('"')[2] if '"' in text else text.rpartition(":")[2].strip()

    if isinstance(error, asyncpg.PostgresError):
        match error:
            case asyncpg.CannotConnectNowError():
                return _failed(f"{where} is not ready: {text}", "wait until the server has started", sqlstate), True
            case asyncpg.TooManyConnectionsError():
                hint = "close idle connections, or raise max_connections (or the role's or database's CONNECTION LIMIT)"
                return _failed(f"{where} takes no more connections: {text}", hint, sqlstate), True
            case asyncpg.ConnectionDoesNotExistError():  # the driver's own
                return _unreachable(where, "the server closed the connection"), True
            case asyncpg.InvalidCatalogNameError():
                hint = f"create it (CREATE DATABASE {database}), or correct the name in the URL"
                return DatabaseMissing(f"{where}: {text}", hint=hint, sqlstate=sqlstate), False
            case asyncpg.InsufficientPrivilegeError():
                hint = f"GRANT CONNECT ON DATABASE {database} TO {role}"
                return PermissionDenied(f"{where}: {text}", hint=hint, sqlstate=sqlstate), False
            case asyncpg.InvalidAuthorizationSpecificationError() | asyncpg.InvalidPasswordError():
                if "no encryption" in text or "SSL off" in text:
                    hint = "add sslmode=require to the URL if the server insists on TLS; or " + _HBA_HINT
                elif "no pg_hba.conf entry" in text:
                    hint = _HBA_HINT
                else:
                    hint = "check user and password of the URL"
                    if which := re.fullmatch(
                        'role "(.+)" (does not exist|is not permitted to log in)', text, re.DOTALL
                    ):
                        verb = "CREATE" if which[2] == "does not exist" else "ALTER"
                        hint = f"{verb} ROLE {identifier(which[1])} LOGIN, or correct the user of the URL"
                    elif user and isinstance(error, asyncpg.InvalidPasswordError):
                        hint += f"; with psql: ALTER ROLE {identifier(named)} PASSWORD '...'"
                return AuthenticationFailed(f"{where}: {text}", hint=hint, sqlstate=sqlstate), False
            case (
                asyncpg.UndefinedObjectError()
                | asyncpg.CantChangeRuntimeParamError()
                | asyncpg.InvalidParameterValueError()
            ):
                return ConfigError(f"{where}: {text}", hint=f"remove {named} from the URL", sqlstate=sqlstate), False
            case asyncpg.PostgresConnectionError() | asyncpg.OperatorInterventionError():
                # A pooler speaks in protocol violations; a server that shuts down or crashes, in these two classes.
                if "no such database" in text or ('database "' in text and "does not exist" in text):
                    return DatabaseMissing(
                        f"{where}: {text}", hint="add it to the pooler's configuration, or correct the URL"
                    ), False
                if "startup parameter" in text:
                    return ConfigError(
                        f"{where}: {text}", hint=f"remove {named} from the URL", sqlstate=sqlstate
                    ), False
                if "auth" in text or "no such user" in text:
                    return AuthenticationFailed(
                        f"{where}: {text}", hint="check user and password of the URL", sqlstate=sqlstate
                    ), False
                return _failed(f"{where}: {text}", "is the server shutting down or being replaced?", sqlstate), True
            case _:
                return _failed(f"{where}: {text}", "see the server's log", sqlstate), False
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        hint = "is a failover under way? check target_session_attrs and the list of hosts in the URL"
        return ReadOnlyServer(f"{where}: no host of the URL is what target_session_attrs asks for", hint=hint), True
    if isinstance(error, ssl.SSLError) or "SSL" in text:
        hint = "check sslmode, sslrootcert, sslcert and sslkey of the URL against what the server offers"
        return TlsFailed(f"{where}: TLS failed: {text}", hint=hint), False
    if isinstance(error, asyncpg.ClientConfigurationError | ValueError):
        variables = [name for name in _VARIABLES if os.environ.get(name)]
        hint = "correct the database URL" + (f", or what it leaves to {', '.join(variables)}" if variables else "")
        return ConfigError(f"{where}: {text}", hint=hint), False
    if isinstance(error, asyncpg.InterfaceError) and text.startswith("pool is"):  # closed, closing, not initialized …
        return ConfigError(f"the {text}", hint="lend a pool that has been opened, and is closed after the run"), False
    if isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError):
        return AuthenticationFailed(
            f"{where}: {text}", hint="the server asks for a way to authenticate that asyncpg lacks"
        ), False
    if isinstance(error, TimeoutError):
        hint = "check host, port and firewall; or give it more time with connect_timeout in the URL"
        return NoAnswer(f"{where}: no answer in time", hint=hint), True
    if isinstance(error, PermissionError):
        socket_host = url is None or not url.hosts or any(host.startswith("/") for host, _ in url.hosts)
        what = "the socket folder" if socket_host else "the files that sslrootcert, sslcert, sslkey and sslcrl name"
        return _failed(f"{where}: {error.strerror}", f"check the permissions of {what}", None), False
    if not isinstance(error, OSError):
        return malformed(error), False
    return _unreachable(where, _reason(error)), True


def _unreachable(where: str, reason: str) -> ConnectionFailed:
    hint = "check host and port, and that the server runs and listens there"
    return ConnectionFailed(f"{where} cannot be reached: {reason}", hint=hint)


_FULL = (
    "max_client_conn",
    "no more connections allowed",
    "query_wait_timeout",
    "max clients reached",
)  # poolers' words


def is_full(failure: AmpdError) -> bool:
    """Return whether an attempt to connect has failed because others have all the connections that there may be."""
    return failure.sqlstate == "53300" or any(word in failure.message.lower() for word in _FULL)


def _failed(message: str, hint: str, sqlstate: str | None) -> ConnectionFailed:
    return ConnectionFailed(message, hint=hint, sqlstate=sqlstate)


def _reason(error: BaseException) -> str:
    """Return the operating system's words, without the list of addresses that asyncio puts around them."""
    if isinstance(error, socket.gaierror):
        return f"the host name is not known ({error.strerror})"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    text = str(error)
    known = next((code for code in ("refused", "unreachable", "No such file", "connection_lost") if code in text), None)
    return {
        "refused": "connection refused",
        "unreachable": "network unreachable",
        "No such file": "no such socket",
        "connection_lost": "the server closed the connection",
    }.get(known or "", text or type(error).__name__)


def _reason_lost(error: BaseException) -> str:
    """Return why a connection cannot be used any more, without the driver's words for its own states."""
    text = str(error)
    if isinstance(error, asyncpg.InternalClientError) or "another operation" in text:
        return "the driver cannot tell any more what the server is doing"
    if isinstance(error, asyncpg.ConnectionDoesNotExistError):  # the driver's own, in the middle of operation
        return ""
    return text


def lost(reason: str, redact: Callable[[str], str], sqlstate: str | None = None) -> ConnectionFailed:
    """Return what it means that an established connection broke."""
    text = redact(reason) or "closed by the server"
    return ConnectionFailed(f"the connection to the server was lost: {text}", hint=RUN_AGAIN, sqlstate=sqlstate)


ABOUT_THE_CONNECTION = ("08", "53", "57", "58")  # classes of SQLSTATE: lost, out of resources, intervention, system


def translate(error: ServerError) -> AmpdError:
    """Return what an error of the server means outside of a migration's own statements."""
    facts: dict[str, Any] = {"sqlstate": error.sqlstate, "detail": error.detail}
    if lacking := plpgsql_error(error):
        return lacking
    match error.sqlstate:
        case "42501":
            return PermissionDenied(error.message, hint=grant_hint(error), **facts)
        case "25006":
            return read_only(error.message, **facts)
        case "55P03" | "40P01":
            hint = "wait for its transaction, or end it (pg_locks shows the session), and run again"
            return LockTimeout(f"another session has locked the history table: {error.message}", hint=hint, **facts)
    return ConnectionFailed(error.message, hint=error.hint or "see the server's log", **facts)


def plpgsql_error(error: ServerError) -> AmpdError | None:
    """Return the error for a database in which ampd's own blocks cannot run; None if that is not what was refused."""
    needs, name = "ampd needs the language plpgsql, which", "plpgsql"
    if name in error.message and error.sqlstate == "42704":
        hint = "CREATE EXTENSION plpgsql, as the database's owner"
        return ConfigError(f"{needs} this database lacks", hint=hint, sqlstate=error.sqlstate)
    if name in error.message and error.sqlstate == "42501":
        role = identifier(error.role) if error.role else "the role"
        hint = f"as a superuser: GRANT USAGE ON LANGUAGE plpgsql TO {role}"
        return PermissionDenied(f"{needs} this role may not use", hint=hint, sqlstate=error.sqlstate)
    return None


def read_only(message: str, **facts: Any) -> ReadOnlyServer:
    """Return the error for a server that takes no writes."""
    return ReadOnlyServer(
        message,
        hint="connect to the primary (with several hosts in the URL: target_session_attrs=read-write), "
        "or lift default_transaction_read_only",
        **facts,
    )


# What aclcheck_error() of the server calls each kind, what GRANT calls it, and what a migration wants with it.
_RELATIONS = ("table", "relation", "view", "materialized view", "foreign table")
_ROUTINES = ("function", "procedure", "aggregate", "routine")
_TYPES = ("type", "domain")
_GRANTS = {
    **dict.fromkeys(_RELATIONS, ("TABLE", "SELECT, INSERT, UPDATE, DELETE")),
    "sequence": ("SEQUENCE", "USAGE, SELECT, UPDATE"),
    "schema": ("SCHEMA", "USAGE, CREATE"),
    "database": ("DATABASE", "CREATE"),
    **dict.fromkeys(_ROUTINES, ("ROUTINE", "EXECUTE")),
    **dict.fromkeys(_TYPES, ("TYPE", "USAGE")),
    "language": ("LANGUAGE", "USAGE"),
    "foreign server": ("FOREIGN SERVER", "USAGE"),
    "foreign-data wrapper": ("FOREIGN DATA WRAPPER", "USAGE"),
    "tablespace": ("TABLESPACE", "CREATE"),
    "large object": ("LARGE OBJECT", "SELECT, UPDATE"),
}
_ALTERED = {"FOREIGN SERVER": "SERVER"}


def grant_hint(error: ServerError, words: tuple[str, ...] = (), statement: str = "") -> str:
    """Return the GRANT that would lift a "permission denied", read off the server's own words.

    `words` are the first ones of the statement: the server names a table, but neither its schema nor what was wanted.
    """
    role = identifier(error.role) if error.role else "the role"
    kinds = "|".join(_GRANTS)
    refused = re.fullmatch(f"(permission denied for|must be owner of) ({kinds}) (.+)", error.message, re.DOTALL)
    if not refused:
        return f"grant {role} the privilege that the message names, or migrate as a role that has it"
    what, kind, name = refused.groups()
    (word, privileges), where = _GRANTS[kind], ""
    if kind in _ROUTINES:  # without arguments, and with the schema where the statement gave it
        name = ".".join(map(identifier, name.split(".")))
    elif kind in (*_RELATIONS, "sequence"):
        schema = _schema_of(name, f"{statement}\n{error.context}")
        name = f"{schema}.{identifier(name)}" if schema else identifier(name)
        where = "" if schema else " (in its schema)"
    elif kind not in (*_TYPES, "large object"):  # of types the server itself quotes the name
        name = identifier(name)
    if what == "must be owner of":
        return (
            f"as a superuser{where}: ALTER {_ALTERED.get(word, word)} {name} OWNER TO {role}; or migrate as the owner"
        )
    if kind in _RELATIONS:
        privileges = _on_table(words) or privileges
    return f"as its owner{where}: GRANT {privileges} ON {word} {name} TO {role}"


def _schema_of(name: str, text: str) -> str | None:
    """Return the schema that SQL gives a table, quoted where the SQL quotes it; None where it does not always do so."""
    spelt = rf"{re.escape(identifier(name))}|\b{re.escape(name)}(?![\w$])"
    found = re.findall(rf'(?:("(?:[^"]|"")+"|\b[^\W\d][\w$]*)\s*\.\s*)?(?:{spelt})', text)
    return found[0] if len(set(found)) == 1 and found[0] else None


def _on_table(words: tuple[str, ...]) -> str | None:
    """Return the privileges on another's table that a statement needs, where those are none of the usual ones."""
    match words:
        case ("TRUNCATE", *_):
            return "TRUNCATE"
        case ("CREATE", *rest) if "TRIGGER" in rest[:4]:
            return "TRIGGER"
        case ("CREATE" | "ALTER", *rest) if "TABLE" in rest[:3]:
            return "SELECT, REFERENCES"
    return None


# What would open the pool on another database than the one that is migrated.
_ANOTHER_DATABASE = ("dsn", "host", "port", "database", "service", "servicefile")


@discreet
def unopened_pool(metadata_db: MetadataDb, hidden_options: Hidden[dict[str, Any]]) -> Pool:
    """Return a pool with the sizes and lifetimes of the configuration, to be `connected`; the options go to asyncpg.

    Raises:
        ConfigError: the URL or an option cannot be used; nothing was connected to.
    """
    options = hidden_options.reveal()
    _check_options(options)
    url = metadata_db.require_url()
    arguments = driver_arguments(url, CONNECT_TIMEOUT_SECS)[0].reveal()
    if options.keys() & {"user", "passfile"}:
        arguments.pop("password", None)  # which was that of somebody else: the driver looks for this one's
    arguments["max_inactive_connection_lifetime"] = metadata_db.idle_timeout_secs
    arguments |= options
    if metadata_db.schema is not None:
        path = {"search_path": f'{identifier(metadata_db.schema)}, "$user", public'}
        arguments["server_settings"] = path | (arguments.get("server_settings") or {})
    try:
        largest = arguments.setdefault("max_size", metadata_db.pool_size)
        smallest = arguments.setdefault("min_size", min(metadata_db.min_connections or 0, largest))
        if smallest > largest:
            raise ConfigError(
                f"min_size={smallest} is above the size of the pool, {largest}",
                hint="give open_pool max_size as well, or raise metadata_db.pool_size",
            )
        return asyncpg.create_pool(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the options of open_pool are not what asyncpg takes: {error}", hint=_OPTIONS) from None


_OPTIONS = "they are those of asyncpg.create_pool; what metadata_db holds is set there"


def _check_options(options: Mapping[str, Any]) -> None:
    for name in options:
        if name in _ANOTHER_DATABASE:
            raise ConfigError(
                f"open_pool takes no {name}=: its pool is on the database that it has migrated",
                hint="say in metadata_db.url which database that is",
            )
    signatures = map(inspect.signature, (asyncpg.create_pool, asyncpg.connect))
    known = {name for signature in signatures for name in signature.parameters} - {"connect_kwargs"}
    unknown = sorted(options.keys() - known)
    if unknown and "connect" not in options:  # a function of the caller's may take others
        raise ConfigError(f"open_pool knows no option {', '.join(f'{name}=' for name in unknown)}", hint=_OPTIONS)
    if options.get("loop") not in (None, asyncio.get_running_loop()):
        raise ConfigError("loop= is another event loop", hint="leave it out: the pool belongs to the running one")


async def connected(pool: Pool, url: DatabaseUrl) -> Pool:
    """Return a pool with its first connections.

    Raises:
        AmpdError: they are not to be had.
    """
    try:
        return await pool
    except (OSError, *_REFUSED, *_LOST) as error:
        failure: Exception = _failure_of(error, url)[0]
    except Exception as error:  # of a callback that the options hold, say
        failure = without_frames(error, _DRIVER)
    pool.terminate()  # what it has got
    raise failure


_REFUSED = (
    asyncpg.TooManyConnectionsError,
    asyncpg.TargetServerAttributeNotMatched,
    asyncpg.InvalidAuthorizationSpecificationError,  # `options` may hold another user, password or database
    asyncpg.InvalidCatalogNameError,
)
