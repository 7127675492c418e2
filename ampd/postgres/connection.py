"""A session: whole messages of the simple protocol in, the server's notes and errors out."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from secrets import token_hex
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import anyio
import asyncpg
import msgspec

from ampd.display import folded, one_line
from ampd.errors import ConfigError, ConnectionFailed, NoAnswer
from ampd.events import OnEvent, ServerMessage, ignore

from .failures import (
    BROKEN,
    LOST,
    RUN_AGAIN,
    SESSION_LIMITS,
    lost_error,
    malformed_error,
    reason_lost,
    translated_error,
)
from .quoting import do_block
from .server_error import ServerError, sqlstate_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ampd.redaction import Hidden


T = TypeVar("T")
Pool: TypeAlias = asyncpg.Pool
Connection: TypeAlias = asyncpg.Connection  # or what a pool gives for one: asyncpg makes that an instance of it

APPLICATION_NAME = "ampd"
CONNECT_TIMEOUT_SECS = 10.0
ANSWER_SECS = 15.0  # for a question that takes milliseconds
CLOSE_TIMEOUT_SECS = 0.7  # for a rollback, or for closing, while being cancelled; after that the socket is just closed
_UNLIMITED_SECS = 315_360_000.0  # with no timeout at all the driver takes a pool's command_timeout
# A dead peer is noticed within IDLE + INTERVAL x COUNT seconds on either side.
KEEPALIVE = {"idle": 5, "interval": 2, "count": 3}


def close_timeout() -> float:
    """Return how many seconds a rollback, or closing, may take: less than one while the task is being cancelled."""
    task = asyncio.current_task()
    return CLOSE_TIMEOUT_SECS if task is not None and task.cancelling() else ANSWER_SECS


def check_event_loop() -> None:
    """Refuse any event loop but asyncio's; trio as a guest of one has no asyncio task.

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


class Session:
    """One connection at a time, over which whole messages are sent."""

    def __init__(
        self,
        connection: Any,
        connect: Callable[[], Awaitable[Any]],
        redact: Callable[[str], str],
        role: str | None,
        *,
        from_pool: bool,
    ) -> None:
        self._connect = connect
        self._from_pool = from_pool
        self.pooled = False  # whether a pooler stands before the server; known once a backend has sent its process id
        self._redact = redact
        self.role = role  # whom errors name: the login, once the history was read the role that has read it
        self.nonce: str = token_hex(8)
        self._on_note: Callable[[str], None] | None = None
        self._on_event: OnEvent = ignore
        self._answering = anyio.CancelScope()  # around the message that is being answered
        self._raised: Exception | None = None  # by a callback
        self._sending = anyio.Lock()  # one message at a time: two tasks use a guard
        self.busy: bool = False
        self.released = False
        self.connections: int = 0  # how many it has had so far
        self._take(connection)

    def _take(self, connection: Any) -> None:
        self.connection = connection
        self.connections += 1
        self.server_pid: int = int(connection.get_server_pid())  # a pooler tells one that is no backend's
        # Error positions count bytes in a database whose encoding is SQL_ASCII.
        self.counts_bytes: bool = str(getattr(connection.get_settings(), "server_encoding", "")) == "SQL_ASCII"
        self._given_up: str | None = None
        self.has_answered: bool = False  # to any message since its greeting
        self._unanswered = False  # cancelled: only the next answer tells where the transaction stands
        self.backend_pid: int | None = None  # of the running transaction: behind a pooler not `server_pid`
        connection.add_log_listener(self._on_message)

    async def reopen(self) -> bool:
        """Open another connection if this one is gone, and return whether it was; its session is lost.

        Raises:
            AmpdError: no connection could be made.
        """
        if not self.is_closed():
            return False
        terminate(self.connection)  # a pool then has room for another
        self._take(await self._connect())
        return True

    @property
    def shared(self) -> bool:
        """Return whether others, before us and after us, use the same session of the server."""
        return self._from_pool or self.pooled

    @property
    def saved_as(self) -> str:
        """Return the name of the prepared statement that holds what others had set; empty if nobody shares it."""
        return f"{self.prefix}_found" if self.shared else ""

    @property
    def prefix(self) -> str:
        """Return what the names of the statements that we prepare in it begin with."""
        return f"{APPLICATION_NAME}_{self.nonce}"

    async def run(
        self, message: str, *, on_note: Callable[[str], None] | None = None, on_event: OnEvent = ignore
    ) -> None:
        """Send one message of any number of statements and wait for its end.

        Raises:
            ServerError: the message was refused; `translated_error` makes an AmpdError of it.
            ConnectionFailed: the connection was lost.
            Exception: whatever `on_note` or `on_event` has raised; the message is cancelled.
        """
        async with self._sending:
            self._on_note, self._on_event = on_note, on_event
            self.busy = self._unanswered = True
            self._raised = None
            try:
                with anyio.CancelScope() as self._answering:
                    if self._encoding() != "UTF8":  # which is what the driver sends
                        await self.connection.execute("SET client_encoding = 'UTF8'", timeout=_UNLIMITED_SECS)
                    await self.connection.execute(message, timeout=_UNLIMITED_SECS)
                    self._unanswered, self.has_answered = False, True
            except (*BROKEN, *LOST) as error:
                if not self.has_answered and _is_in_use(error):  # by whoever has passed it: nothing was sent
                    self._unanswered = False
                    raise ConfigError(
                        "the connection that was passed is in use by another task",
                        hint="let nothing else use it during the call; or pass a pool, or the URL",
                    ) from error
                terminate(self.connection)
                if isinstance(error, UnicodeDecodeError):
                    raise ConnectionFailed(
                        "the connection was given up: the server's answer is not UTF-8",
                        hint="remove SET client_encoding from the file, and run again",
                    ) from error
                said = error.__cause__ if isinstance(error.__cause__, asyncpg.PostgresError) else error
                sqlstate = sqlstate_of(said)
                if sqlstate in SESSION_LIMITS and not self._given_up:
                    raise ServerError(said, self._redact, self.role) from error
                raise lost_error(self._given_up or reason_lost(said), self._redact, sqlstate) from error
            except asyncpg.PostgresError as error:
                self._unanswered, self.has_answered = False, True
                tells = self._redact(str(error)) != str(error)  # a traceback would show the driver's own words as well
                raise ServerError(error, self._redact, self.role) from (None if tells else error)
            except Exception as error:  # the driver fails in other ways on an answer that no PostgreSQL gives
                terminate(self.connection)
                raise malformed_error(error) from error
            finally:
                self._on_event = ignore
                if not self._unanswered:  # else notes that are on their way still tell how far it came
                    self._on_note = None
                self.busy = False
        if self._raised is not None:
            raise self._raised

    def _encoding(self) -> str:
        """Return the client_encoding, as the server has last reported it; not everything before a server does."""
        reported = str(getattr(self.connection.get_settings(), "client_encoding", "UTF8"))
        return "UTF8" if reported == "'utf-8'" else reported  # as PgBouncer repeats what the driver has asked for

    def note_sql(self, expression: str) -> str:
        """Return a PL/pgSQL statement that sends the value of an SQL expression to `on_note`."""
        return f"RAISE INFO '{self.nonce} %', {expression};"

    def note_text_sql(self, text: str) -> str:
        """Return a PL/pgSQL statement that sends a constant (of plain characters) to `on_note`."""
        return f"RAISE INFO '{self.nonce} {text}';"

    def note_pid_sql(self) -> str:
        """Return a PL/pgSQL statement that sends `pid` and the backend's process id to `on_note`."""
        return self.note_sql("pg_catalog.concat('pid ', pg_catalog.pg_backend_pid())")

    def marker_sql(self, text: str) -> str:
        """Return the shortest SQL statement that sends a constant (of plain characters) to `on_note`."""
        return f"DO 'BEGIN RAISE INFO ''{self.nonce} {text}''; END'"

    def give_up(self, reason: str) -> None:
        """Close the connection under a `run` that would wait for ever; it raises ConnectionFailed for this reason."""
        self._given_up = reason
        terminate(self.connection)

    async def ask(self, message: str, kind: type[T], *, timeout: float = ANSWER_SECS) -> T:
        """Send a message that notes one JSON document and return that document; timeout in seconds.

        Raises:
            AmpdError: what `translated_error` makes of a refusal; NoAnswer after the timeout.
        """
        answers: list[str] = []
        try:
            with anyio.fail_after(timeout):
                await self.run(message, on_note=answers.append)
        except TimeoutError as error:
            terminate(self.connection)
            raise NoAnswer(f"the server has not answered for {timeout:g} s", hint=RUN_AGAIN) from error
        except ServerError as error:
            await self.recover()
            raise translated_error(error) from error
        try:
            return msgspec.json.decode(answers[-1], type=kind)
        except (IndexError, ValueError, RecursionError) as error:
            terminate(self.connection)
            raise malformed_error(error) from error

    async def check_answers(self, timeout: float) -> None:
        """Check that a server answers on the connection.

        Raises:
            NoAnswer: none has answered within `timeout` seconds.
        """
        await self.ask(do_block(f"BEGIN {self.note_sql('pg_catalog.pg_backend_pid()')} END"), int, timeout=timeout)

    async def recover(self, resets: str = "", *, timeout: float | None = None) -> bool:
        """End a failed transaction, even while being cancelled; False if the connection is gone, for `reopen`.

        It is closed if that takes longer than `timeout` seconds, or else than `close_timeout`. `resets` take back what
        no rollback does, on the same server connection if there is a pooler.
        """
        if self.is_closed():
            return False
        idle = self.is_idle()
        if idle and not (resets and self.has_answered):
            return True
        try:
            with anyio.CancelScope(shield=True), anyio.fail_after(timeout or close_timeout()):
                await self.connection.execute(resets if idle else f"ROLLBACK; {resets}", timeout=_UNLIMITED_SECS)
                self._unanswered = False
        except (*BROKEN, asyncpg.PostgresError):
            terminate(self.connection)
            return False
        except BaseException:  # cancelled again, from outside of anyio
            terminate(self.connection)
            raise
        return True

    def is_idle(self) -> bool:
        """Return whether every message is answered, and no transaction of ours is open."""
        # A transaction of before our first message is not ours.
        return not self._unanswered and not (self.has_answered and self.connection.is_in_transaction())

    def is_closed(self) -> bool:
        """Return whether the connection is known to be gone."""
        return is_closed(self.connection)

    def ignore_messages(self) -> None:
        """Remove the listener for notices, before the connection goes back to its pool."""
        if not self.is_closed():
            self.connection.remove_log_listener(self._on_message)

    def _on_message(self, _: object, message: Any) -> None:
        text: str = message.message or ""
        try:
            if message.severity_en == "INFO" and text.startswith(self.nonce):
                if len(text) > _LARGEST_NOTE:
                    raise malformed_error(f"a note of {len(text)} characters")
                if self._on_note:
                    self._on_note(text[len(self.nonce) + 1 :])
            else:
                severity = message.severity_en or message.severity or "NOTICE"
                self._on_event(ServerMessage(severity=one_line(severity), message=folded(self._redact(text))))
        except Exception as error:  # the driver calls from the event loop, which would do no more than log it
            self._raised = self._raised or error
            self._answering.cancel()


_LARGEST_NOTE = 64 * 2**20  # characters of what the server notes: a history of the largest size fits in


def _is_in_use(error: BaseException) -> bool:
    return isinstance(error, asyncpg.InterfaceError) and "another operation is in progress" in str(error)


def is_closed(connection: Any) -> bool:
    """Return whether a connection is closed, or its pool has taken it back."""
    try:
        return bool(connection.is_closed())
    except asyncpg.InterfaceError:
        return True


def terminate(connection: Any) -> None:
    """Close a connection at once; one that its pool has taken back is closed already."""
    with suppress(asyncpg.InterfaceError):
        connection.terminate()


async def connect(arguments: Hidden[dict[str, Any]]) -> asyncpg.Connection:
    """Connect; when cancelled, wait for the attempt: else asyncpg leaves an error that nobody retrieves."""
    attempt = asyncio.ensure_future(asyncpg.connect(**arguments.reveal()))
    try:
        return await asyncio.shield(attempt)
    except asyncio.CancelledError:
        attempt.add_done_callback(_discard)
        with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_TIMEOUT_SECS):
            await asyncio.wait([attempt])
        attempt.cancel()
        raise


def _discard(attempt: asyncio.Future[Any]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().terminate()
