"""The pool of a service, with its options checked."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

import asyncpg

from ampd.config import MetadataDb
from ampd.database_url import DatabaseUrl
from ampd.errors import ConfigError
from ampd.redaction import Hidden, discreet, without_frames

from .connection import CONNECT_TIMEOUT_SECS
from .failures import DRIVER, LOST, connection_error
from .libpq import driver_arguments
from .passwords import AskedPassword, pool_redact
from .quoting import identifier

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .connection import Pool


# Options that would open the pool on another database than the one that is migrated.
_ANOTHER_DATABASE = ("dsn", "host", "port", "database", "service", "servicefile")


class _ServicePool(asyncpg.Pool):  # type: ignore[misc] # the driver ships no types
    """A pool that fails fast rather than queues: one that is used up is no faster for those who wait for long."""

    acquire_timeout_secs = 0.0  # for no limit
    password_given = True

    async def _acquire(self, timeout: float | None) -> Any:
        secs = self.acquire_timeout_secs if timeout is None else 0
        if not secs:
            return await super()._acquire(timeout)
        try:
            async with asyncio.timeout(secs) as deadline:
                return await super()._acquire(None)
        except TimeoutError:
            if not deadline.expired():
                raise
            size = self.get_max_size()
            problem = f"none of the pool's {size} connections was free within {secs:g} s"
            raise TimeoutError(f"{problem} (metadata_db.acquire_timeout_secs)") from None


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(asyncpg.create_pool).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}


@discreet
def unopened_pool(metadata_db: MetadataDb, hidden_options: Hidden[dict[str, Any]]) -> Pool:
    """Return a pool with the sizes and lifetimes of the configuration, to be `connected`; the options go to asyncpg.

    Raises:
        ConfigError: the URL or an option cannot be used; nothing was connected to.
    """
    options = hidden_options.reveal()
    _check_options(options)
    url = metadata_db.require_url()
    arguments = driver_arguments(url, CONNECT_TIMEOUT_SECS, options)[0].reveal()
    arguments["max_inactive_connection_lifetime"] = metadata_db.idle_timeout_secs
    arguments |= options
    if metadata_db.schema is not None:
        arguments["server_settings"] = search_path(metadata_db.schema) | (arguments.get("server_settings") or {})
    try:
        largest = arguments.setdefault("max_size", metadata_db.pool_size)
        smallest = arguments.setdefault("min_size", min(metadata_db.min_connections or 0, largest))
        if smallest > largest:
            raise ConfigError(
                f"min_size={smallest} is above the size of the pool, {largest}",
                hint="give open_pool max_size as well, or raise metadata_db.pool_size",
            )
        arguments = _DEFAULTS | arguments
        pool = _ServicePool(arguments.pop("dsn", None), **arguments)
        pool.acquire_timeout_secs = metadata_db.acquire_timeout_secs
        pool.password_given = bool(arguments.get("password"))
        return pool
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the options of open_pool are not what asyncpg takes: {error}", hint=_OPTIONS) from None


def search_path(schema: str) -> dict[str, str]:
    """Return the setting by which queries look into a schema first."""
    return {"search_path": f'{identifier(schema)}, "$user", public'}


@discreet
def shared_password(metadata_db: MetadataDb, hidden_options: Hidden[dict[str, Any]]) -> Hidden[Any] | None:
    """Return the password among the options of a pool, where migrations log in as the pool does; None without one.

    A function that is asked for it is replaced, in the options as well, by an `AskedPassword`.
    """
    options = hidden_options.reveal()
    if callable(ask := options.get("password")):
        options["password"] = AskedPassword(ask)
    ours = metadata_db.migrations.url is None and options.get("user") is None
    return Hidden(options["password"]) if ours and options.get("password") is not None else None


@discreet
def migration_pool(url: DatabaseUrl, size: int) -> tuple[Pool, tuple[str, ...]]:
    """Return an unopened pool of at most so many connections, each made when it is needed, and warnings of the URL.

    Raises:
        ConfigError: the URL cannot be used.
    """
    arguments, warnings = driver_arguments(url, CONNECT_TIMEOUT_SECS)
    return asyncpg.create_pool(**arguments.reveal(), min_size=0, max_size=size), warnings


_OPTIONS = "they are those of asyncpg.create_pool; what metadata_db holds is set there"


_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def _check_options(options: Mapping[str, Any]) -> None:
    """Check that asyncpg takes the options, and that they lead to the database of the configuration.

    Raises:
        ConfigError: names the one that is wrong.
    """
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
    if isinstance(ssl := options.get("ssl"), str) and ssl not in _SSL_MODES:
        raise ConfigError(
            f"open_pool has ssl={ssl!r}, which is not one of its values", hint=f"use {', '.join(_SSL_MODES)}"
        )
    if options.get("loop") not in (None, asyncio.get_running_loop()):
        raise ConfigError("loop= is another event loop", hint="leave it out: the pool belongs to the running one")


async def connected(pool: Pool, url: DatabaseUrl) -> Pool:
    """Return a pool with its first connections.

    Raises:
        AmpdError: they could not be made.
    """
    try:
        return await pool
    except Exception as error:
        if _is_refusal(error):
            redact = pool_redact(pool, url)
            failure: Exception = connection_error(error, url, redact, password_given=pool.password_given)[0]
            if isinstance(failure, ConfigError):
                failure.hint = f"{failure.hint}; or correct the option of open_pool that it comes from"
        else:
            failure = without_frames(error, DRIVER)
    pool.terminate()  # with the connections that it has
    raise failure


def _is_refusal(error: Exception) -> bool:
    """Return whether an error is of connecting, and not of a callback in the options."""
    kinds = (OSError, asyncpg.ClientConfigurationError, asyncpg.TargetServerAttributeNotMatched, *LOST)
    return isinstance(error, kinds) or getattr(error, "severity_en", None) == "FATAL"
