"""Errors of the driver and the server as errors of ampd: class, hint, and whether to retry."""

from __future__ import annotations

import os
import re
import socket
import ssl
from typing import TYPE_CHECKING, Any

import asyncpg
import msgspec

from ampd import sqlstates
from ampd.database_url import DatabaseUrl
from ampd.display import folded, one_line
from ampd.errors import (
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
from ampd.redaction import without_frames

from .permissions import grant_hint
from .quoting import identifier
from .server_error import sqlstate_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from .server_error import ServerError


def malformed_error(error: object) -> ConnectionFailed:
    """Return the error for an answer that no PostgreSQL server gives."""
    return ConnectionFailed(
        f"the server's answer cannot be understood ({type(error).__name__ if isinstance(error, Exception) else error})",
        hint="is this a PostgreSQL server, and nothing in between that changes what it says?",
    )


# What the driver raises when it cannot go on with a connection: a time-out is an OSError, and text that is no UTF-8 may
# come where a script has set another client_encoding.
BROKEN = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError, UnicodeDecodeError)

# They end the session, and it is the file that sets them.
SESSION_LIMITS = (sqlstates.IDLE_IN_TRANSACTION_SESSION_TIMEOUT, sqlstates.TRANSACTION_TIMEOUT)

# What the server says when it ends a connection.
LOST = (
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)


RUN_AGAIN = "run the command again: what was committed stays, nothing is applied twice"
DRIVER = "asyncpg"  # whose frames hold the password


class _Meaning(msgspec.Struct, frozen=True):
    """How a failed attempt to connect is reported: for which errors, with which words in them, and as what.

    Message and hint are templates. Worth retrying is what can pass by itself: a server that is not there
    yet, is starting, is full, or is being replaced.
    """

    errors: tuple[type[BaseException], ...]
    words: str  # a regular expression
    kind: type[AmpdError]
    message: str
    hint: str
    worth_retrying: bool = False
    without_password: bool = False  # fits only where none was given: the server says the same as of a wrong one


_REFUSED = (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidPasswordError)
_PARAMETER = (asyncpg.UndefinedObjectError, asyncpg.CantChangeRuntimeParamError, asyncpg.InvalidParameterValueError)
# A pooler speaks in protocol violations; a server that shuts down or crashes, in these two classes.
_STOPPED = (asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError)
_CONFIGURATION = (asyncpg.ClientConfigurationError, ValueError)
_DRIVER_ERRORS = (asyncpg.InterfaceError, asyncpg.InternalClientError)

_SAID, _UNREACHABLE = "{where}: {text}", "{where} cannot be reached: {reason}"
_CHECK_HOST = "check host and port, and that the server runs and listens there"
_CHECK_USER = "check user and password of the URL"
_CHECK_TLS = "check sslmode, sslrootcert, sslcert and sslkey of the URL against what the server offers"
_MAKE_ROOM = "close idle connections, or raise max_connections (or the role's or database's CONNECTION LIMIT)"
_HBA = "ask the server's administrator for a pg_hba.conf entry for this role, database and address"
_USE_TLS = f"add sslmode=require to the URL if the server insists on TLS; or {_HBA}"
_FAILOVER = "is a failover under way? check target_session_attrs and the list of hosts in the URL"
_NO_HOST = "{where}: no host of the URL is what target_session_attrs asks for"
_MORE_TIME = "check host, port and firewall; or give it more time with connect_timeout in the URL"
_STARTING = "wait until the server has started"
_NO_ROOM = "{where} takes no more connections: {text}"
_HUNG_UP = "{where} cannot be reached: the server closed the connection"
_CREATE_DATABASE = "create it (CREATE DATABASE {database}), or correct the name in the URL"
_GRANT_CONNECT = "GRANT CONNECT ON DATABASE {database} TO {role}"
_CREATE_ROLE = "CREATE ROLE {name} LOGIN, or correct the user of the URL"
_ALTER_ROLE = "ALTER ROLE {name} LOGIN, or correct the user of the URL"
_SET_PASSWORD = f"{_CHECK_USER}; with psql: ALTER ROLE {{name}} PASSWORD '...'"
_GIVE_PASSWORD = (
    "no password was given: write it into the URL (user:password@host), set PGPASSWORD, or use a password file "
    "(PGPASSFILE, by default ~/.pgpass)"
)
_REMOVE = "remove {parameter} from the URL{settings}"
_ADD_TO_POOLER = "add it to the pooler's configuration, or correct the URL"
_OTHER_WAY = "the server asks for a way to authenticate that asyncpg lacks"
_OPEN_POOL = "pass a pool that has been opened, and is closed after the run"

# The first that fits is taken.
_MEANINGS = tuple(
    _Meaning(*row)
    for row in (
        ((asyncpg.CannotConnectNowError,), "", ConnectionFailed, "{where} is not ready: {text}", _STARTING, True),
        ((asyncpg.TooManyConnectionsError,), "", ConnectionFailed, _NO_ROOM, _MAKE_ROOM, True),
        ((asyncpg.ConnectionDoesNotExistError,), "", ConnectionFailed, _HUNG_UP, _CHECK_HOST, True),
        ((asyncpg.InvalidCatalogNameError,), "", DatabaseMissing, _SAID, _CREATE_DATABASE),
        ((asyncpg.InsufficientPrivilegeError,), "", PermissionDenied, _SAID, _GRANT_CONNECT),
        (_REFUSED, "no encryption|SSL off", AuthenticationFailed, _SAID, _USE_TLS),
        (_REFUSED, "no pg_hba.conf entry", AuthenticationFailed, _SAID, _HBA),
        (_REFUSED, '^role ".*" does not exist$', AuthenticationFailed, _SAID, _CREATE_ROLE),
        (_REFUSED, '^role ".*" is not permitted to log in$', AuthenticationFailed, _SAID, _ALTER_ROLE),
        ((asyncpg.InvalidPasswordError,), "", AuthenticationFailed, _SAID, _GIVE_PASSWORD, False, True),
        ((asyncpg.InvalidPasswordError,), 'user ".*"', AuthenticationFailed, _SAID, _SET_PASSWORD),
        (_REFUSED, "", AuthenticationFailed, _SAID, _CHECK_USER),
        (_PARAMETER, "", ConfigError, _SAID, _REMOVE),
        (_STOPPED, 'no such database|database ".*" does not exist', DatabaseMissing, _SAID, _ADD_TO_POOLER),
        (_STOPPED, "startup parameter", ConfigError, _SAID, _REMOVE),
        (_STOPPED, "password|SASL auth", AuthenticationFailed, _SAID, _GIVE_PASSWORD, False, True),
        (_STOPPED, "auth|no such user", AuthenticationFailed, _SAID, _CHECK_USER),
        (_STOPPED, "", ConnectionFailed, _SAID, "is the server shutting down or being replaced?", True),
        ((asyncpg.PostgresError,), "", ConnectionFailed, _SAID, "see the server's log"),
        ((asyncpg.TargetServerAttributeNotMatched,), "", ReadOnlyServer, _NO_HOST, _FAILOVER, True),
        ((ssl.SSLError,), "", TlsFailed, "{where}: TLS failed: {text}", _CHECK_TLS),
        ((Exception,), "SSL", TlsFailed, "{where}: TLS failed: {text}", _CHECK_TLS),
        (_CONFIGURATION, "", ConfigError, _SAID, "correct the database URL{variables}"),
        ((asyncpg.InterfaceError,), "^pool is", ConfigError, "the {text}", _OPEN_POOL),
        (_DRIVER_ERRORS, "", AuthenticationFailed, _SAID, _OTHER_WAY),
        ((TimeoutError,), "", NoAnswer, "{where}: no answer in time", _MORE_TIME, True),
        ((PermissionError,), "", ConnectionFailed, "{where}: {strerror}", "check the permissions of {files}"),
        ((OSError,), "", ConnectionFailed, _UNREACHABLE, _CHECK_HOST, True),
    )
)


def connection_error(
    error: Exception, url: DatabaseUrl | None, redact: Callable[[str], str], *, password_given: bool = True
) -> tuple[AmpdError, bool]:
    """Return the error for a failed attempt to connect, and whether another attempt is worth making.

    Its cause is the driver's error, unless that shows a password.
    """
    said = redact(str(getattr(error, "message", None) or error).strip() or type(error).__name__)
    failure: AmpdError = malformed_error(error)
    worth_retrying = False
    for meaning in _MEANINGS:
        if meaning.without_password and password_given:
            continue
        if isinstance(error, meaning.errors) and re.search(meaning.words, said, re.DOTALL):
            facts = _facts(error, said, url)
            message, hint = meaning.message.format_map(facts), meaning.hint.format_map(facts)
            failure = meaning.kind(message, hint=hint, sqlstate=sqlstate_of(error))
            worth_retrying = meaning.worth_retrying
            break
    if redact(str(error)) == str(error) and not isinstance(failure, ConfigError):
        failure.__cause__ = without_frames(error, DRIVER)
    return failure, worth_retrying


_VARIABLES = ("PGHOST", "PGPORT", "PGSSLMODE", "PGSSLNEGOTIATION", "PGSSLROOTCERT", "PGSSLMINPROTOCOLVERSION")
_SETTINGS = ("PGOPTIONS", "PGTZ", "PGDATESTYLE", "PGGEQO")


def _facts(error: BaseException, said: str, url: DatabaseUrl | None) -> dict[str, str]:
    """Return the values for the templates of `_Meaning`."""
    user = (url.user if url else None) or os.environ.get("PGUSER")
    after_colon = said.rpartition(":")[2].strip()
    name, parameter = (re.search(each, said, re.DOTALL) for each in ('"(.*)"', '"(.*?)"'))
    variables, settings = (
        ", ".join(name for name in names if os.environ.get(name)) for names in (_VARIABLES, _SETTINGS)
    )
    by_socket = url is None or not url.hosts or any(host.startswith("/") for host, _ in url.hosts)
    return {
        "where": url.label if url else "the pool's server",
        "text": folded(said),
        "reason": _reason(error),
        "strerror": str(getattr(error, "strerror", "")),
        "role": identifier(user) if user else "the role",
        "database": identifier(url.database_or_default) if url else "the database",
        "name": one_line(identifier(name[1] if name else after_colon)),
        "parameter": one_line(parameter[1] if parameter else after_colon),
        "variables": f", or what it leaves to {variables}" if variables else "",
        "settings": f", or correct {settings}" if settings else "",
        "files": "the socket folder" if by_socket else "the files that sslrootcert, sslcert, sslkey and sslcrl name",
    }


# Poolers' words.
_FULL = ("max_client_conn", "no more connections allowed", "query_wait_timeout", "max clients reached")


def is_full(failure: AmpdError) -> bool:
    """Return whether an attempt to connect has failed because others have all connections."""
    return failure.sqlstate == sqlstates.TOO_MANY_CONNECTIONS or any(word in failure.message.lower() for word in _FULL)


_REASONS = {
    "refused": "connection refused",
    "unreachable": "network unreachable",
    "No such file": "no such socket",
    "connection_lost": "the server closed the connection",
}


def _reason(error: BaseException) -> str:
    """Return the operating system's words, without the list of addresses that asyncio puts around them."""
    if isinstance(error, socket.gaierror):
        return f"the host name is not known ({error.strerror})"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    text = str(error)
    return next((reason for words, reason in _REASONS.items() if words in text), text or type(error).__name__)


def reason_lost(error: BaseException) -> str:
    """Return why a connection was lost, without the driver's words for its own states."""
    text = str(error)
    if isinstance(error, asyncpg.InternalClientError) or "another operation" in text:
        return "the driver cannot tell any more what the server is doing"
    if isinstance(error, asyncpg.ConnectionDoesNotExistError):  # the driver's own, in the middle of operation
        return ""
    return text


def lost_error(reason: str, redact: Callable[[str], str], sqlstate: str | None = None) -> ConnectionFailed:
    """Return the error for an established connection that was lost."""
    text = folded(redact(reason)) or "closed by the server"
    return ConnectionFailed(f"the connection to the server was lost: {text}", hint=RUN_AGAIN, sqlstate=sqlstate)


ABOUT_THE_CONNECTION = (  # classes of SQLSTATE
    sqlstates.CONNECTION_EXCEPTION,
    sqlstates.INSUFFICIENT_RESOURCES,
    sqlstates.OPERATOR_INTERVENTION,
    sqlstates.SYSTEM_ERROR,
)


def translated_error(error: ServerError) -> AmpdError:
    """Return the error of ampd for an error of the server outside of a migration's statements."""
    if lacking := plpgsql_error(error):
        return lacking
    facts: dict[str, Any] = {"sqlstate": error.sqlstate, "detail": error.detail}
    match error.sqlstate:
        case sqlstates.INSUFFICIENT_PRIVILEGE:
            return PermissionDenied(error.message, hint=grant_hint(error), **facts)
        case sqlstates.READ_ONLY_SQL_TRANSACTION:
            return read_only_error(error.message, **facts)
        case sqlstates.LOCK_NOT_AVAILABLE | sqlstates.DEADLOCK_DETECTED:
            hint = "wait for its transaction, or end it (pg_locks shows the session), and run again"
            return LockTimeout(f"another session has locked the history table: {error.message}", hint=hint, **facts)
    return ConnectionFailed(error.message, hint=error.hint or "see the server's log", **facts)


def plpgsql_error(error: ServerError) -> AmpdError | None:
    """Return the error for a database without a usable plpgsql, which ampd needs; None for any other error."""
    if "plpgsql" not in error.message:
        return None
    needs = "ampd needs the language plpgsql, which"
    if error.sqlstate == sqlstates.UNDEFINED_OBJECT:
        hint = "CREATE EXTENSION plpgsql, as the database's owner"
        return ConfigError(f"{needs} this database lacks", hint=hint, sqlstate=error.sqlstate)
    if error.sqlstate == sqlstates.INSUFFICIENT_PRIVILEGE:
        role = identifier(error.role) if error.role else "the role"
        hint = f"as a superuser: GRANT USAGE ON LANGUAGE plpgsql TO {role}"
        return PermissionDenied(f"{needs} this role may not use", hint=hint, sqlstate=error.sqlstate)
    return None


def read_only_error(message: str, **facts: Any) -> ReadOnlyServer:
    """Return the error for a server that takes no writes."""
    return ReadOnlyServer(
        message,
        hint="connect to the primary (with several hosts in the URL: target_session_attrs=read-write), "
        "or lift default_transaction_read_only",
        **facts,
    )
