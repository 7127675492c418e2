"""A URL as libpq reads it, and what libpq reads from the environment: arguments for the driver."""

from __future__ import annotations

import getpass
import os
import re
import socket
import ssl
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg

from ampd.database_url import ENCODE, DatabaseUrl
from ampd.errors import ConfigError
from ampd.redaction import Hidden, discreet

from .connection import APPLICATION_NAME, KEEPALIVE
from .passwords import password_for

if TYPE_CHECKING:
    from collections.abc import Mapping


def kept_alive_connection(keepalive: Mapping[str, int] | None, user_timeout_ms: int | None) -> type[asyncpg.Connection]:
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
            *("statement_cache_size", "prepared_statement_cache_size", "prepared_statement_name_func"),
            *("prepareThreshold", "pgbouncer", "async_fallback"),
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
    *("application_name", "connect_timeout", "fallback_application_name", "options", "passfile"),
    *("gsslib", "krbsrvname"),
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
def driver_arguments(
    url: DatabaseUrl, default_timeout: float, options: Mapping[str, Any] | None = None
) -> tuple[Hidden[dict[str, Any]], tuple[str, ...]]:
    """Return what to call `asyncpg.connect` with for a libpq URL, and warnings.

    The password that will be used is among the arguments: the one of the caller's own `options` for the driver, which
    take precedence over the URL, or a function that is asked for it.

    Raises:
        ConfigError: a parameter that cannot be honoured, a private key that others may read, or a password file that
            has not the same password for all hosts.
    """
    parameters = dict(url.parameters)
    _check_known(parameters)
    variables = {
        name: variable
        for variable, name in _VARIABLES_OF_LIBPQ.items()
        if os.environ.get(variable) and name not in parameters and not (name == "service" and url.hosts)
    }
    parameters |= {name: os.environ[variable] for name, variable in variables.items()}
    _drop_implied(parameters, variables)
    timeout = _whole_number(parameters, "connect_timeout", variables.get("connect_timeout"))
    keepalive = KEEPALIVE | {
        name: secs for name in KEEPALIVE if (secs := _whole_number(parameters, f"keepalives_{name}") or 0) > 0
    }
    switched_on = _whole_number(parameters, "keepalives") != 0
    user_timeout = _whole_number(parameters, "tcp_user_timeout")
    fallback: str = parameters.pop("fallback_application_name", APPLICATION_NAME)
    parameters.setdefault("application_name", os.environ.get("PGAPPNAME", fallback))
    parameters.setdefault("standard_conforming_strings", "on")
    _resolve_files(parameters)
    _check_variables(parameters)
    _check_user(url)
    warnings = []
    if _uses_tls(url, parameters) and (closed := _closed_home()):
        warnings.append(_without_tls(closed, parameters))
    arguments: dict[str, Any] = {
        "dsn": url.with_parameters(parameters).reveal(),
        "timeout": default_timeout if timeout is None else timeout if timeout > 0 else None,
        "statement_cache_size": 0,
        "connection_class": kept_alive_connection(keepalive if switched_on else None, user_timeout),
    }
    password, warning = password_for(url, options or {})
    if password is not None:
        arguments["password"] = password
    if warning:
        warnings.append(warning)
    return Hidden(arguments), tuple(warnings)


# What libpq reads from the environment and the driver does not, or not as libpq does; the URL takes precedence.
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


def _drop_implied(parameters: dict[str, str], variables: Mapping[str, str]) -> None:
    """Take out what the driver has no parameter for, and does anyway; `variables` names those that gave a parameter.

    Raises:
        ConfigError: what one asks for is another thing than the driver does.
    """
    for name in sorted(_CANNOT_HONOUR & parameters.keys()):
        value = parameters.pop(name)
        if value in _IMPLIED.get(name, ()):
            continue
        implied = _IMPLIED[name][-1] if name in _IMPLIED else None
        if variable := variables.get(name):
            raise ConfigError(
                f"the variable {variable} asks for {value}, which psql honours and ampd cannot",
                hint=f"unset {variable} if you can do without it{f', or use {implied}' if implied else ''}",
            )
        remove = f"remove {name} from the URL if you can do without it{f', or use {name}={implied}' if implied else ''}"
        raise ConfigError(
            f"the database URL asks for {name}={value}, which ampd cannot honour",
            hint=_INSTEAD.get(name, remove).format(name=name, value=value),
        )


def _resolve_files(parameters: dict[str, str]) -> None:
    """Put paths for certificates and key, as the driver takes them: no empty one, and no `system`.

    Raises:
        ConfigError: there is no such file, or others may read the key.
    """
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


def _check_known(parameters: Mapping[str, str]) -> None:
    """Refuse unknown parameters: a misspelled sslmode must not send the password without TLS.

    Raises:
        ConfigError: names it, and the nearest known one; unless it may be a part of a password.
    """
    known = _HONOURED | _CANNOT_HONOUR | _SETTINGS
    for name in sorted(parameters.keys() - known):
        if any("@" in text for each in parameters.items() for text in each):  # what is a name, then, nobody can tell
            raise ConfigError(
                "the database URL has an @ behind the ?, and a parameter that neither libpq nor ampd knows", hint=ENCODE
            )
        from difflib import get_close_matches

        spelt = {each.replace("_", ""): each for each in sorted(known)}
        close = get_close_matches(name.lower().replace("_", ""), list(spelt), n=1, cutoff=0.75)
        raise ConfigError(
            f"the database URL has the parameter {name}, which neither libpq nor ampd knows",
            hint=f"did you mean {spelt[close[0]]}?"
            if close
            else "remove it; or if it is a setting of the server, write it as options=-c%20NAME%3DVALUE",
        )


def _whole_number(parameters: dict[str, str], name: str, variable: str | None = None) -> int | None:
    """Remove a parameter, which may come from a variable, and return its number; None if there is none.

    Raises:
        ConfigError: it is none, or one that cannot be had.
    """
    value = parameters.pop(name, None)
    if value is None:
        return None
    largest = _LARGEST.get(name, _LARGEST_INTEGER)
    try:
        number = int(value)
    except ValueError:
        number = largest + 1
    if not -_LARGEST_INTEGER <= number <= largest:
        said = f"the variable {variable} is {value}" if variable else f"the database URL has {name}={value}"
        raise ConfigError(
            f"{said}, which is not a whole number up to {largest}",
            hint=f"set {variable} to 10, say, or unset it" if variable else f"write {name}=10, say",
        )
    return number


def _check_variables(parameters: Mapping[str, str]) -> None:
    """Refuse what the driver would complain of without its name; it reads PGPORT in any case."""
    ports = os.environ.get("PGPORT") or "5432"
    if not all(re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536 for port in ports.split(",")):
        raise ConfigError(
            f"the variable PGPORT is {ports}, which is not a number from 1 to 65535", hint="correct it, or unset it"
        )
    said, mend = "the database URL has target_session_attrs=", ""
    if (attributes := parameters.get("target_session_attrs")) is None:
        said, mend = "the variable PGTARGETSESSIONATTRS is ", ", or unset it"
        attributes = os.environ.get("PGTARGETSESSIONATTRS", "any")
    if attributes not in _SESSION_ATTRIBUTES:
        raise ConfigError(
            f"{said}{attributes}, which is not one of its values",
            hint=f"use one of {', '.join(_SESSION_ATTRIBUTES)}{mend}",
        )


def _check_user(url: DatabaseUrl) -> None:
    """Refuse a URL without a user where the machine has no name for ours: the driver would fail."""
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
    """Return whether the driver would look for certificates."""
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
    """Switch TLS off where libpq would, which cannot look for certificates either, and return a warning.

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
