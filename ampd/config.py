"""Configuration: TOML and environment in, frozen values out. Reads a file and nothing else; never connects."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from stat import S_IROTH, S_IWGRP, S_IWOTH
from typing import Annotated, Any, ClassVar, get_type_hints

import msgspec

from .database_url import DatabaseUrl, way_to_url
from .errors import ConfigError
from .redaction import discreet

PREFIX = "AMP_CONFIG_"
FLAT_URL = "metadata_db_url"
_FLAT_VARIABLE = "AMP_CONFIG_METADATA_DB_URL"


_LONGEST_NAME = 63  # bytes: of a longer one the server drops the rest
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
    lock_timeout_secs: Seconds = 5
    lock_retry_secs: Seconds = 300
    statement_timeout_secs: Seconds = 0


class Migrations(ResolvedLimits, frozen=True, kw_only=True):
    """`[metadata_db.migrations]`: where the files are, as whom and in which order they run, and the time limits.

    All times are in seconds.
    """

    dir: Path | None = None
    role: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    allow_out_of_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.role is not None:
            with self._under("role"):
                _check_name("role", self.role, reserved=self.role in ("none", "public") or self.role.startswith("pg_"))


class Limits(_Checked, frozen=True, kw_only=True):
    """The time limits of one run, in seconds; None stays as configured."""

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
    """`[metadata_db]`: where the database is, and the sizes and lifetimes of services' pools."""

    _at = "metadata_db"

    url: DatabaseUrl | None = None
    auto_migrate: bool = False
    schema: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    pool_size: Annotated[int, msgspec.Meta(ge=1)] = 10
    min_connections: Annotated[int, msgspec.Meta(ge=0)] | None = None
    max_lifetime_secs: Seconds = 1800
    idle_timeout_secs: Seconds = 600
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
                check_schema(self.schema)

    def require_url(self) -> DatabaseUrl:
        """Return the URL.

        Raises:
            ConfigError: there is none; the message names both ways to give one.
        """
        if self.url is None:
            raise ConfigError(
                "no database URL is configured",
                hint="set metadata_db.url in a file given by --config FILE (or AMP_CONFIG), "
                f"or set {PREFIX}METADATA_DB__URL",
            )
        return self.url


def check_schema(schema: str) -> None:
    """Refuse a name that a schema cannot have.

    Raises:
        ConfigError: an empty name, or one that PostgreSQL reserves, or cuts.
        TypeError: not a str.
    """
    if not isinstance(schema, str):
        raise TypeError(f"the name of a schema is a str, not {type(schema).__name__}")
    if not schema:
        raise ConfigError("the schema's name is empty", hint="name the schema, or leave it out for the search path's")
    _check_name("schema", schema, reserved=schema == "$user" or schema.startswith("pg_"))


def _check_name(what: str, name: str, *, reserved: bool) -> None:
    if reserved:
        raise ConfigError(f"the {what} {name} is reserved by PostgreSQL", hint="choose another name")
    if "\0" in name or len(name.encode(errors="replace")) > _LONGEST_NAME:
        raise ConfigError(
            f"the {what}'s name is longer than {_LONGEST_NAME} bytes, or holds a NUL byte", hint="choose another name"
        )


class Config(_Checked, frozen=True):
    """What ampd reads of amp's configuration; the sections of other programs are ignored."""

    _at = "config"

    metadata_db: MetadataDb = MetadataDb()


def load_config(path: str | Path | None = None) -> Config:
    """Return the configuration from a TOML file (default: the one `AMP_CONFIG` names, else none) and the environment.

    Raises:
        ConfigError: names the file or variable, the key path, and what was expected there.
    """
    import warnings

    config, found = read_config(path, os.environ)
    for warning in found:
        warnings.warn(warning, stacklevel=2)
    return config


@discreet
def read_config(
    path: str | Path | None, environ: Mapping[str, str], *, defaults: Mapping[str, Any] | None = None
) -> tuple[Config, tuple[Warning, ...]]:
    """Return the configuration and warnings; the file wins over `defaults` for `[metadata_db]`."""
    path = path or environ.get("AMP_CONFIG") or None
    file = Path(path) if path else None
    document = _read_toml(file) if file else {}
    warnings: list[Warning] = []
    variables: dict[tuple[str, ...], str] = {}

    section = dict(defaults or {}) | _table(document, "metadata_db", "metadata_db", file)
    section["migrations"] = _table(section, "migrations", "metadata_db.migrations", file)
    if value := environ.get(_FLAT_VARIABLE):
        warnings.append(FutureWarning(f"{_FLAT_VARIABLE} is deprecated: set {PREFIX}METADATA_DB__URL"))
        if "url" not in section:
            section["url"], variables["url",] = value, _FLAT_VARIABLE
    if FLAT_URL in document:
        warnings.append(FutureWarning(f"{FLAT_URL} is deprecated: write url = … under [metadata_db]"))
    flat = FLAT_URL in document and "url" not in section
    if flat:
        section["url"] = document[FLAT_URL]
    for variable, keys, value in _overlay(environ):
        table: Any = section
        for key in keys[:-1]:
            table = table.setdefault(key, {})
        table[keys[-1]] = value
        variables[keys] = variable

    metadata_db = _convert(section, file, variables, flat=flat)
    from_file = file is not None and ("url",) not in variables
    if file and from_file and metadata_db.url and metadata_db.url.password and _is_open(file):
        warnings.append(UserWarning(f"{file} holds a password, and others may read or write it: chmod 0600 {file}"))
    directory = metadata_db.migrations.dir
    if directory is not None and file is not None and ("migrations", "dir") not in variables:
        metadata_db = with_directory(metadata_db, file.parent / directory)
    return Config(metadata_db), tuple(warnings)


def _is_open(file: Path) -> bool:
    """Return whether others may read a file or write to it; that a group may read it can be meant so."""
    return bool(file.stat().st_mode & (S_IROTH | S_IWOTH | S_IWGRP))


def with_directory(metadata_db: MetadataDb, directory: Path | None) -> MetadataDb:
    """Return the section with another migrations folder; the same section for None."""
    if directory is None:
        return metadata_db
    migrations = msgspec.structs.replace(metadata_db.migrations, dir=directory)
    return msgspec.structs.replace(metadata_db, migrations=migrations)


def _read_toml(file: Path) -> dict[str, Any]:
    import tomllib

    try:
        content = file.read_bytes()
        return tomllib.loads(content.decode("utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}", file=str(file), hint="fix the line it names") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}: not UTF-8 text (line {line})", file=str(file), hint="save it as UTF-8") from None
    except (RecursionError, ValueError) as error:  # what tomllib lets through: many brackets, and very long numbers
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{file}: not valid TOML: {reason}", file=str(file), hint="fix the file") from None
    except OSError as error:
        raise ConfigError(
            f"{file}: the configuration file cannot be read: {error.strerror or error}",
            file=str(file),
            hint="check the path given by --config FILE or AMP_CONFIG",
        ) from error


def _table(parent: Mapping[str, Any], key: str, path: str, file: Path | None) -> dict[str, Any]:
    table = parent.get(key, {})
    if not isinstance(table, dict):
        problem = f"{file}: {path}: expected a table, got `{type(table).__name__}`"
        raise ConfigError(problem, file=str(file), hint=f"write it as [{path}]")
    return dict(table)


def _overlay(environ: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Yield variable, key path and value for each variable that sets a key of ours."""
    prefix = f"{PREFIX}METADATA_DB__"
    for variable in sorted(environ):
        if variable.startswith(prefix):
            keys = tuple(variable.removeprefix(prefix).lower().split("__"))
            _check_known(keys, variable, None)
            yield variable, keys, _lax(keys, environ[variable])


_TABLES: dict[tuple[str, ...], type[msgspec.Struct]] = {(): MetadataDb, ("migrations",): Migrations}
_SWITCH = {"yes": True, "on": True, "true": True, "1": True, "no": False, "off": False, "false": False, "0": False}


def _lax(keys: tuple[str, ...], value: str) -> object:
    """Return a variable's text as the value TOML would have given: there are only strings in an environment."""
    expected = get_type_hints(_TABLES[keys[:-1]])[keys[-1]]
    if expected is bool:
        return _SWITCH.get(value.lower(), value)
    try:
        return float(value) if expected is float else int(value) if "int" in str(expected) else value
    except ValueError:
        return value


def _check_known(keys: tuple[str, ...], where: str, file: Path | None, *, is_table: bool = False) -> None:
    table = _TABLES.get(keys[:-1])
    known = () if table is None else table.__struct_fields__
    if keys[-1] in known and keys not in _TABLES:
        return
    every = [".".join((*above, field)) for above, struct in _TABLES.items() for field in struct.__struct_fields__]
    raise ConfigError(
        f"{where}: unknown key metadata_db.{'.'.join(keys)}",
        file=str(file) if file else None,
        hint=_nearest(".".join(keys), [name for name in every if is_table or name != "migrations"]),
    )


def _nearest(key: str, known: list[str]) -> str:
    from difflib import get_close_matches

    own, homes = key.rpartition(".")[2], {name.rpartition(".")[2]: name for name in known}
    close = [own] if own in homes else get_close_matches(key, known, n=1, cutoff=0.5)
    close = close or get_close_matches(own, list(homes), n=1)
    if close:
        return f"did you mean metadata_db.{homes.get(close[0], close[0])}?"
    return f"known keys: {', '.join(f'metadata_db.{name}' for name in known)}"


def _convert(
    section: dict[str, Any], file: Path | None, variables: Mapping[tuple[str, ...], str], *, flat: bool
) -> MetadataDb:
    for above, table in (((), section), (("migrations",), section["migrations"])):
        for key, value in table.items():
            if (*above, key) not in _TABLES:
                _check_known((*above, key), str(file), file, is_table=isinstance(value, dict))
    try:
        return MetadataDb(**section | {"migrations": Migrations(**section["migrations"])})
    except ConfigError as error:
        key, _, problem = error.message.partition(": ")
        hint = error.hint
    keys = tuple(key.split(".")[1:])
    # A problem between two keys has no path but names them.
    to_blame = [variable for path, variable in variables.items() if path == keys or (not keys and path[-1] in problem)]
    if flat and keys == ("url",) and not to_blame:
        key = FLAT_URL
    raise ConfigError(
        f"{', '.join(to_blame) or file}: {key}: {problem}",
        hint=hint,
        file=str(file) if file and not to_blame else None,
    )
