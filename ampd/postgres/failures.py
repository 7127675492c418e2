"""What the driver and the server say, as errors of ampd: class, hint, and whether to try again."""

from __future__ import annotations

import os
import re
import socket
import ssl
from typing import TYPE_CHECKING, Any

import asyncpg

from ampd.database_url import DatabaseUrl
from ampd.display import folded
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

# idle_in_transaction_session_timeout and transaction_timeout: they end the session, and it is the file that sets them.
SESSION_LIMITS = ("25P03", "25P04")

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


_VARIABLES = ("PGHOST", "PGPORT", "PGSSLMODE", "PGSSLNEGOTIATION", "PGSSLROOTCERT", "PGSSLMINPROTOCOLVERSION")
_HBA_HINT = "ask the server's administrator for a pg_hba.conf entry for this role, database and address"


def connection_error_of(
    error: Exception, url: DatabaseUrl | None, redact: Callable[[str], str]
) -> tuple[AmpdError, bool]:
    """Return what `connection_error` does, the error as its cause unless that shows a password."""
    failure, worth_retrying = connection_error(error, url, redact)
    if redact(str(error)) == str(error) and not isinstance(failure, ConfigError):
        failure.__cause__ = without_frames(error, DRIVER)
    return failure, worth_retrying


def connection_error(
    error: BaseException, url: DatabaseUrl | None, redact: Callable[[str], str]
) -> tuple[AmpdError, bool]:
    """Return what a failed attempt to connect means, and whether it is worth another attempt.

    Worth it is whatever can pass by itself: a server that is not there yet, is starting, is full, or is being replaced.
    """
    where = url.label if url else "the pool's server"
    user = (url.user if url else None) or os.environ.get("PGUSER")
    role = identifier(user) if user else "the role"
    database = identifier(url.database_or_default) if url else "the database"
    text = folded(redact(str(getattr(error, "message", None) or error).strip() or type(error).__name__))
    sqlstate = sqlstate_of(error)
    named = text.rpartition('"')[0].rpartition('"')[2] if '"' in text else text.rpartition(":")[2].strip()

    if isinstance(error, asyncpg.PostgresError):
        match error:
            case asyncpg.CannotConnectNowError():
                return _failed(f"{where} is not ready: {text}", "wait until the server has started", sqlstate), True
            case asyncpg.TooManyConnectionsError():
                hint = "close idle connections, or raise max_connections (or the role's or database's CONNECTION LIMIT)"
                return _failed(f"{where} takes no more connections: {text}", hint, sqlstate), True
            case asyncpg.ConnectionDoesNotExistError():  # the driver's own
                return _unreachable_error(where, "the server closed the connection"), True
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
        return malformed_error(error), False
    return _unreachable_error(where, _reason(error)), True


def _unreachable_error(where: str, reason: str) -> ConnectionFailed:
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


def reason_lost(error: BaseException) -> str:
    """Return why a connection cannot be used any more, without the driver's words for its own states."""
    text = str(error)
    if isinstance(error, asyncpg.InternalClientError) or "another operation" in text:
        return "the driver cannot tell any more what the server is doing"
    if isinstance(error, asyncpg.ConnectionDoesNotExistError):  # the driver's own, in the middle of operation
        return ""
    return text


def lost_error(reason: str, redact: Callable[[str], str], sqlstate: str | None = None) -> ConnectionFailed:
    """Return what it means that an established connection broke."""
    text = folded(redact(reason)) or "closed by the server"
    return ConnectionFailed(f"the connection to the server was lost: {text}", hint=RUN_AGAIN, sqlstate=sqlstate)


ABOUT_THE_CONNECTION = ("08", "53", "57", "58")  # classes of SQLSTATE: lost, out of resources, intervention, system


def translated_error(error: ServerError) -> AmpdError:
    """Return what an error of the server means outside of a migration's own statements."""
    facts: dict[str, Any] = {"sqlstate": error.sqlstate, "detail": error.detail}
    if lacking := plpgsql_error(error):
        return lacking
    match error.sqlstate:
        case "42501":
            return PermissionDenied(error.message, hint=grant_hint(error), **facts)
        case "25006":
            return read_only_error(error.message, **facts)
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


def read_only_error(message: str, **facts: Any) -> ReadOnlyServer:
    """Return the error for a server that takes no writes."""
    return ReadOnlyServer(
        message,
        hint="connect to the primary (with several hosts in the URL: target_session_attrs=read-write), "
        "or lift default_transaction_read_only",
        **facts,
    )
