"""Configuration: TOML and environment in, frozen values out. Reads a file and nothing else; never connects."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints
from urllib.parse import parse_qsl, quote, unquote

import msgspec

from .errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PREFIX = "AMP_CONFIG_"
FLAT_URL = "metadata_db_url"

_HIDDEN = "***"
_SECRET_PARAMETERS = frozenset({"password", "sslpassword"})


class DatabaseUrl:
    """A PostgreSQL URL that cannot print its password: `str()` and `repr()` show `***` in its place.

    Takes what libpq takes: `postgresql://user:pass@host:5432/db?sslmode=…`, `postgres://…`, several hosts separated by
    commas, and `postgresql:///db?host=/socket/dir`.

    Raises:
        ConfigError: not such a URL. The message never repeats it, for it may hold a password.
    """

    __slots__ = ("database", "hosts", "parameters", "password", "user")

    def __init__(self, url: str) -> None:
        scheme, separator, rest = url.strip().partition("://")
        if not separator or scheme not in ("postgresql", "postgres"):
            raise ConfigError(
                "the database URL does not begin with postgresql:// or postgres://",
                hint="write it as postgresql://user:password@host:5432/database",
            )
        rest, _, query = rest.partition("?")
        authority, _, path = rest.partition("/")
        credentials, _, hostspec = authority.rpartition("@")
        user, _, password = credentials.partition(":")
        self.parameters = dict(parse_qsl(query, keep_blank_values=True))
        self.user = self.parameters.pop("user", None) or unquote(user) or None
        self.password = self.parameters.pop("password", None) or unquote(password) or None
        self.database = self.parameters.pop("dbname", None) or unquote(path) or None
        hosts = self.parameters.pop("host", None)
        ports = self.parameters.pop("port", None)
        self.hosts = tuple(_hosts(hosts if hosts is not None else hostspec, ports))

    def __str__(self) -> str:
        return self._render(lambda _: _HIDDEN)

    def __repr__(self) -> str:
        return f"DatabaseUrl({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DatabaseUrl) and self.reveal() == other.reveal()

    def __hash__(self) -> int:
        return hash(self.reveal())

    def reveal(self) -> str:
        """Return the URL with its password, normalised: the one way to get at it, for the driver alone."""
        return self._render(lambda secret: quote(secret, safe=""))

    def with_parameters(self, parameters: Mapping[str, str]) -> DatabaseUrl:
        """Return the same URL with other query parameters."""
        url = DatabaseUrl(self.reveal())
        url.parameters = dict(parameters)
        return url

    def _render(self, show: Callable[[str], str]) -> str:
        user = quote(self.user, safe="") if self.user else ""
        password = f":{show(self.password)}" if self.password else ""
        parameters = dict(self.parameters)
        hosts = ""
        if any(host.startswith("/") for host, _ in self.hosts):
            parameters["host"] = ",".join(host for host, _ in self.hosts)
            if any(port for _, port in self.hosts):
                parameters["port"] = ",".join(str(port or "") for _, port in self.hosts)
        else:
            hosts = ",".join(
                (f"[{host}]" if ":" in host else quote(host, safe="")) + (f":{port}" if port else "")
                for host, port in self.hosts
            )
        query = "&".join(
            f"{quote(key)}={show(value) if key in _SECRET_PARAMETERS else quote(value)}"
            for key, value in parameters.items()
        )
        return (
            f"postgresql://{user}{password}{'@' if user or password else ''}{hosts}"
            f"/{quote(self.database or '', safe='')}{'?' if query else ''}{query}"
        )

    @property
    def label(self) -> str:
        """Return `host:port/database`, as reports and errors show it."""
        hosts = self.hosts or ((os.environ.get("PGHOST", "localhost"), None),)
        default_port = os.environ.get("PGPORT", "5432")
        shown = ",".join(f"{f'[{host}]' if ':' in host else host}:{port or default_port}" for host, port in hosts)
        return f"{shown}/{self.database or os.environ.get('PGDATABASE') or self.user or ''}"

    def redact(self, text: str) -> str:
        """Return `text` with every form of the URL's secrets replaced."""
        secrets = [self.password, *(value for key, value in self.parameters.items() if key in _SECRET_PARAMETERS)]
        for secret in secrets:
            for form in {secret, quote(secret, safe=""), quote(secret)} if secret else ():
                text = text.replace(form, _HIDDEN)
        return text


def _hosts(hostspec: str, ports: str | None) -> Iterator[tuple[str, int | None]]:
    shared = (ports or "").split(",")
    for index, spec in enumerate(hostspec.split(",") if hostspec else ()):
        if spec.startswith("["):
            host, _, port = spec[1:].partition("]")
            port = port.removeprefix(":")
        elif spec.startswith("/"):
            host, port = spec, ""
        else:
            host, _, port = spec.partition(":")
        port = port or shared[min(index, len(shared) - 1)]
        if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ConfigError(
                "the port in the database URL is not a number from 1 to 65535",
                hint="if the password holds any of : / ? # @ %, write those percent-encoded (%3A %2F %3F %23 %40 %25)",
            )
        yield unquote(host), int(port) if port else None


Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Migrations(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[metadata_db.migrations]`: where the files are, and how patient a run is; all times in seconds."""

    dir: Path | None = None
    connect_wait_secs: Seconds = 30
    turn_wait_secs: Seconds = 600
    lock_timeout_secs: Seconds = 5
    lock_retry_secs: Seconds = 300
    statement_timeout_secs: Seconds = 0
    allow_out_of_order: bool = False


class MetadataDb(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[metadata_db]`: where the database is, and the pool that services hold to it."""

    url: DatabaseUrl | None = None
    auto_migrate: bool = False
    schema: Annotated[str, msgspec.Meta(min_length=1, max_length=63)] | None = None
    pool_size: Annotated[int, msgspec.Meta(ge=1)] = 10
    min_connections: Annotated[int, msgspec.Meta(ge=0)] | None = None
    max_lifetime_secs: Seconds = 1800
    idle_timeout_secs: Seconds = 600
    migrations: Migrations = Migrations()

    def __post_init__(self) -> None:
        if self.min_connections is None:
            msgspec.structs.force_setattr(self, "min_connections", -(-self.pool_size // 4))
        elif self.min_connections > self.pool_size:
            raise ValueError(f"min_connections ({self.min_connections}) is above pool_size ({self.pool_size})")

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


class Config(msgspec.Struct, frozen=True):
    """What ampd reads of amp's configuration; the sections of other programs are not looked at."""

    metadata_db: MetadataDb = MetadataDb()


def load_config(path: str | Path | None = None) -> Config:
    """Return the configuration from a TOML file (default: the one `AMP_CONFIG` names, else none) and the environment.

    Raises:
        ConfigError: names the file or variable, the key path, and what was expected there.
    """
    import warnings

    config, remarks = read_config(path, os.environ)
    for remark in remarks:
        warnings.warn(remark, FutureWarning, stacklevel=2)
    return config


def read_config(
    path: str | Path | None, environ: Mapping[str, str], *, defaults: Mapping[str, Any] | None = None
) -> tuple[Config, tuple[str, ...]]:
    """Return the configuration and remarks on it; `defaults` for `[metadata_db]` stand below the file."""
    path = path or environ.get("AMP_CONFIG") or None
    file = Path(path) if path else None
    document = _read_toml(file) if file else {}
    remarks: list[str] = []

    section = document.get("metadata_db", {})
    if not isinstance(section, dict):
        raise ConfigError(f"{file}: metadata_db is not a table", file=str(file), hint="write it as [metadata_db]")
    if isinstance(section.get("migrations", {}), dict):
        section = section | {"migrations": dict(section.get("migrations", {}))}
    section = dict(defaults or {}) | section
    sources: dict[tuple[str, ...], str] = {}

    flat = environ.get(PREFIX + FLAT_URL.upper()) or document.get(FLAT_URL)
    if flat is not None:
        remarks.append(f"{FLAT_URL} is deprecated: write url = … under [metadata_db]")
        section.setdefault("url", flat)
    for variable, keys, value in _overlay(environ):
        table: Any = section
        for key in keys[:-1]:
            table = table.setdefault(key, {})
        table[keys[-1]] = value
        sources[keys] = variable

    metadata_db = _convert(section, file, sources)
    directory = metadata_db.migrations.dir
    if directory is not None and file is not None and ("migrations", "dir") not in sources:
        metadata_db = with_directory(metadata_db, file.parent / directory)
    return Config(metadata_db), tuple(remarks)


def with_directory(metadata_db: MetadataDb, directory: Path | None) -> MetadataDb:
    """Return the section with another migrations folder; the same section for None."""
    if directory is None:
        return metadata_db
    migrations = msgspec.structs.replace(metadata_db.migrations, dir=directory)
    return msgspec.structs.replace(metadata_db, migrations=migrations)


def _read_toml(file: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(file.read_bytes().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}", file=str(file), hint="mend the line it names") from None
    except OSError as error:
        raise ConfigError(
            f"{file}: the configuration file cannot be read: {error.strerror or error}",
            file=str(file),
            hint="check the path given by --config FILE or AMP_CONFIG",
        ) from error


def _overlay(environ: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Yield variable, key path and value for each variable that sets a key of ours."""
    prefix = f"{PREFIX}METADATA_DB__"
    for variable in sorted(environ):
        if variable.startswith(prefix):
            keys = tuple(variable.removeprefix(prefix).lower().split("__"))
            _check_known(keys, variable)
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


def _check_known(keys: tuple[str, ...], where: str) -> None:
    table = _TABLES.get(keys[:-1])
    known = () if table is None else table.__struct_fields__
    if keys[-1] in known and keys not in _TABLES:
        return
    every = [".".join((*above, field)) for above, struct in _TABLES.items() for field in struct.__struct_fields__]
    raise ConfigError(
        f"{where}: unknown key metadata_db.{'.'.join(keys)}",
        hint=_nearest(".".join(keys), [name for name in every if name != "migrations"]),
    )


def _nearest(key: str, known: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(key, known, n=1, cutoff=0.5)
    last = {name.rpartition(".")[2]: name for name in known}
    close = close or [last[name] for name in get_close_matches(key.rpartition(".")[2], list(last), n=1)]
    if close:
        return f"did you mean metadata_db.{close[0]}?"
    return f"known keys: {', '.join(f'metadata_db.{name}' for name in known)}"


def _convert(section: dict[str, Any], file: Path | None, sources: Mapping[tuple[str, ...], str]) -> MetadataDb:
    for above, table in (((), section), (("migrations",), section.get("migrations", {}))):
        for key in table if isinstance(table, dict) else ():
            if (*above, key) not in _TABLES:
                _check_known((*above, key), str(file))
    try:
        return msgspec.convert(section, MetadataDb, dec_hook=_decode)
    except msgspec.ValidationError as error:
        # msgspec ends its messages with the path of the key: "Expected `int`, got `str` - at `$.pool_size`".
        expected, _, path = str(error).partition(" - at `$")
        keys = tuple(path.rstrip("`").split(".")[1:])
        where = sources.get(keys) or str(file)
        key = ".".join(("metadata_db", *keys))
        raise ConfigError(
            f"{where}: {key}: {expected[:1].lower()}{expected[1:]}",
            file=str(file) if file and keys not in sources else None,
            hint=f"see the configuration section of the README for {key}",
        ) from None


def _decode(kind: type, value: object) -> object:
    if not isinstance(value, str):
        raise ValueError(f"expected `str`, got `{type(value).__name__}`")
    try:
        return kind(value)
    except ConfigError as error:
        raise ValueError(f"{error.message}; {error.hint}") from None
