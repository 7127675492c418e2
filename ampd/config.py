"""The configuration as frozen, checked values; made by hand, or by `config_sources` from a file and the environment."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec

from .database_url import DatabaseUrl, way_to_url
from .errors import ConfigError
from .redaction import discreet

PREFIX = "AMP_CONFIG_"

_LONGEST_NAME = 63  # bytes: of a longer one the server drops the rest
_LARGEST_FILE = 2**20  # bytes
# The server counts its timeouts in milliseconds, in 32 bits.
Seconds = Annotated[float, msgspec.Meta(ge=0, le=2_147_483)]


_fields = cache(msgspec.structs.fields)


def _decode(kind: type, value: object) -> object:
    if isinstance(value, kind):
        return value
    if not isinstance(value, str):
        raise ValueError(f"expected `str`, got `{type(value).__name__}`{way_to_url(value)}")
    if kind is Path and not value:  # which would be the working folder
        raise ValueError("expected `str` of length >= 1")
    return kind(value)


class _Checked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Values that are checked as those of a configuration file, also if made in Python.

    Raises:
        ConfigError: one is not; the message begins with its key path.
    """

    _at: ClassVar[str]  # the key path of the whole

    @discreet
    def __post_init__(self) -> None:
        for field in _fields(type(self)):
            value = getattr(self, field.name)
            # Until it is checked no frame of a subclass shows it: a URL contains a password.
            msgspec.structs.force_setattr(self, field.name, None)
            try:
                value = msgspec.convert(value, field.type, dec_hook=_decode)
            except ConfigError as error:
                inner = error.message.startswith("metadata_db")  # of a key of an inner table
                path = "" if inner else f"{self._at}.{field.name}: "
                raise ConfigError(f"{path}{error.message}", hint=error.hint) from None
            except msgspec.ValidationError as error:
                raise _wrong_error(f"{self._at}.{field.name}", str(error)) from None
            msgspec.structs.force_setattr(self, field.name, value)

    @contextmanager
    def _under(self, key: str) -> Iterator[None]:
        """Put the path of a key before the message of an error with its value."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(f"{self._at}.{key}: {error.message}", hint=error.hint) from None


def _wrong_error(path: str, problem: str) -> ConfigError:
    """Return the error for a value that is not what its key takes, in msgspec's words.

    They end with the rest of the path: "Expected `int`, got `str` - at `$.pool_size`".
    """
    problem, _, rest = problem.replace("`object`", "a table").replace(" | null`", "`").partition(" - at `$")
    path += rest.rstrip("`")
    hint = f"see the configuration section of the README for {path}"
    return ConfigError(f"{path}: {problem[:1].lower()}{problem[1:]}", hint=hint)


class ResolvedLimits(_Checked, frozen=True, kw_only=True):
    """The time limits of a run, in seconds."""

    _at = "metadata_db.migrations"

    connect_wait_secs: Seconds = 30
    advisory_lock_wait_secs: Seconds = 600
    lock_timeout_secs: Seconds = 1
    lock_retry_secs: Seconds = 300
    statement_timeout_secs: Seconds = 0


HISTORY_TABLE = "ampd_schema_migrations"  # unless configured otherwise


class Migrations(ResolvedLimits, frozen=True, kw_only=True):
    """`[metadata_db.migrations]`: where the files are, as whom and in which order they run, and the time limits.

    All times are in seconds. With a `url`, which leads past a pooler, say, migrations run there.
    """

    dir: Path | None = None
    url: DatabaseUrl | None = None
    role: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    table: Annotated[str, msgspec.Meta(min_length=1)] = HISTORY_TABLE
    allow_out_of_order: bool = False
    lint_allow: tuple[Annotated[str, msgspec.Meta(pattern="^[a-z-]+:[^/:]+$")], ...] = ()  # each RULE:FILE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.role is not None:
            with self._under("role"):
                _check_name("role", self.role, reserved=self.role in ("none", "public") or self.role.startswith("pg_"))
        if self.table != HISTORY_TABLE:
            with self._under("table"):
                _check_name("table", self.table, reserved=self.table.startswith("pg_"))


class Limits(_Checked, frozen=True, kw_only=True):
    """The time limits of one run, in seconds; None stays as configured.

    Attributes:
        connect_wait_secs: how long to try while the server is starting or unreachable.
        advisory_lock_wait_secs: how long to wait for another runner, or for a connection that others have.
        lock_timeout_secs: one attempt's wait for a table lock; 0 for no limit.
        lock_retry_secs: how long to repeat attempts that end in a lock timeout.
        statement_timeout_secs: how long one statement may run; 0 for no limit.
    """

    _at = "limits"

    connect_wait_secs: Seconds | None = None
    advisory_lock_wait_secs: Seconds | None = None
    lock_timeout_secs: Seconds | None = None
    lock_retry_secs: Seconds | None = None
    statement_timeout_secs: Seconds | None = None


def resolved_limits(configured: Migrations, limits: Limits | None) -> ResolvedLimits:
    """Return the time limits of a run: those given, else as configured.

    Raises:
        TypeError: the limits are of another type, such as Migrations, which has folder and policy as well.
    """
    if isinstance(limits, Migrations):
        untouched = Migrations()
        given = {name: value for name in _LIMITS if (value := getattr(limits, name)) != getattr(untouched, name)}
        write = ", ".join(f"{name}={value:g}" for name, value in given.items())
        raise TypeError(
            f"limits= takes an ampd.Limits, not Migrations: write limits=ampd.Limits({write}); "
            "dir and allow_out_of_order belong to the configuration: ampd.MetadataDb(migrations=ampd.Migrations(...))"
        )
    if not isinstance(limits, Limits | None):
        raise TypeError(f"limits= takes an ampd.Limits, not {type(limits).__name__}")
    wanted = {name: getattr(limits, name, None) for name in _LIMITS}
    return ResolvedLimits(
        **{name: getattr(configured, name) if secs is None else secs for name, secs in wanted.items()}
    )


_LIMITS = Limits.__struct_fields__


class MetadataDb(_Checked, frozen=True, kw_only=True):
    """`[metadata_db]`: where the database is, and the sizes and lifetimes of services' pools.

    Without a `url` it is read from the file `url_file`.
    """

    _at = "metadata_db"

    url: DatabaseUrl | None = None
    url_file: Path | None = None
    auto_migrate: bool = False
    schema: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    pool_size: Annotated[int, msgspec.Meta(ge=1)] = 10
    min_connections: Annotated[int, msgspec.Meta(ge=0)] | None = None
    max_lifetime_secs: Seconds = 1800
    idle_timeout_secs: Seconds = 600
    acquire_timeout_secs: Seconds = 5
    migrations: Migrations = Migrations()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_connections is None:
            msgspec.structs.force_setattr(self, "min_connections", -(-self.pool_size // 4))
        elif self.min_connections > self.pool_size:
            problem = f"min_connections ({self.min_connections}) is above pool_size ({self.pool_size})"
            raise _wrong_error(self._at, problem)
        if self.schema is not None:
            with self._under("schema"):
                check_name("schema", self.schema)
        if self.url is None and self.url_file is not None:
            with self._under("url_file"):
                msgspec.structs.force_setattr(self, "url", _url_in(self.url_file))

    def require_url(self) -> DatabaseUrl:
        """Return the URL of services.

        Raises:
            ConfigError: there is none; the message names every way to give one.
        """
        if self.url is None:
            alone = "metadata_db.migrations.url is for migrations alone, and where it comes from no URL is given: "
            copied = f'; DATABASE_URL is set: {PREFIX}METADATA_DB__URL="$DATABASE_URL" takes it'
            theirs = copied if os.environ.get("DATABASE_URL") else ""
            raise ConfigError(
                "no database URL is configured",
                hint=f"{alone if self.migrations.url else ''}give --url URL, or set {PREFIX}METADATA_DB__URL, or "
                f"metadata_db.url in a file given by --config FILE (or AMP_CONFIG){theirs}",
            )
        return self.url

    def require_migrations_url(self) -> DatabaseUrl:
        """Return the URL of migrations: their own, or else that of services.

        Raises:
            ConfigError: there is neither.
        """
        return self.migrations.url or self.require_url()


@discreet
def _url_in(file: Path) -> DatabaseUrl:
    """Return the URL that a file contains; no error shows what that is."""
    try:
        text = read_small(file).decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text", hint="the file contains the URL and nothing else") from None
    except (OSError, ValueError) as error:  # of a path with a NUL byte
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{file} cannot be read: {reason}", hint="check the path, and who may read it") from None
    if not text:
        raise ConfigError(f"{file} is empty", hint="the file contains the URL and nothing else")
    try:
        return DatabaseUrl(text)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error.message}", hint=error.hint) from None


def read_small(file: Path) -> bytes:
    """Return what a file, or a pipe, contains.

    Raises:
        OSError: it cannot be read, or is no configuration by its size: a device, perhaps, that never ends.
    """
    with file.open("rb") as opened:
        content = opened.read(_LARGEST_FILE + 1)
    if len(content) > _LARGEST_FILE:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return content


def check_name(what: str, name: str) -> None:
    """Refuse a name that a schema, or the history table, cannot have; `what` is "schema" or "table".

    Raises:
        ConfigError: an empty name, or one that PostgreSQL reserves, or cuts.
        TypeError: not a str.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a {what} is a str, not {type(name).__name__}")
    if not name:
        raise ConfigError(f"the {what}'s name is empty", hint=f"name the {what}, or leave it out for the default")
    _check_name(what, name, reserved=name in ("$user", "information_schema") or name.startswith("pg_"))


def _check_name(what: str, name: str, *, reserved: bool) -> None:
    if reserved:
        raise ConfigError(f"the {what} {name} is reserved by PostgreSQL", hint="choose another name")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"the {what}'s name cannot be encoded in UTF-8", hint="choose another name") from None
    if "\0" in name or size > _LONGEST_NAME:
        raise ConfigError(
            f"the {what}'s name is longer than {_LONGEST_NAME} bytes, or holds a NUL byte", hint="choose another name"
        )


class Config(_Checked, frozen=True):
    """What ampd reads of amp's configuration; the sections of other programs are ignored."""

    _at = "config"

    metadata_db: MetadataDb = MetadataDb()
