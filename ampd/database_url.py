"""A URL of PostgreSQL's that cannot print its password."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from urllib.parse import quote, unquote

from .errors import ConfigError
from .redaction import Hidden, discreet, without_secrets

_HIDDEN = "***"
ENCODE = "if the password holds any of : / ? # @ % &, write those percent-encoded (%3A %2F %3F %23 %40 %25 %26)"

# What templates, shells, Kubernetes and consoles put where a value belongs; a URL has none of it, but percent-encoded.
_PLACEHOLDERS = {
    "${…}": r"\$\{[^}]*\}",
    "{{…}}": r"\{\{.*?\}\}",
    "$(…)": r"\$\([A-Z_][A-Z0-9_]*\)",
    "<…>": r"<[A-Za-z][\w -]*>",
    "[YOUR-…]": r"\[YOUR[-_ ][^]]*\]",
}
_DRIVERS = ("asyncpg", "psycopg", "psycopg_async", "psycopg2", "psycopg2cffi", "pg8000", "aiopg")


def way_to_url(value: object) -> str:
    """Return what to give in place of an object of SQLAlchemy's, as the end of a message; empty for any other value."""
    for name, url in (("url", value), ("engine.url", getattr(value, "url", None))):
        if callable(getattr(url, "render_as_string", None)):
            return f"; give {name}.render_as_string(hide_password=False)"
    return ""


class DatabaseUrl:
    """A PostgreSQL URL that cannot print its password: `str()` and `repr()` show `***` in its place.

    Takes what libpq takes: `postgresql://user:pass@host:5432/db?sslmode=…`, `postgres://…`, several hosts separated by
    commas, and `postgresql:///db?host=/socket/dir`. As in libpq a parameter wins over what stands before the `?`, and
    `+` is a plus sign. An empty host is the default one. The drivers that SQLAlchemy puts behind the scheme
    (`postgresql+asyncpg://`) are ignored.

    Raises:
        ConfigError: not such a URL. The message never repeats it, for it may contain a password.
        TypeError: not a str.
    """

    __slots__ = ("_hidden", "database", "hosts", "user")

    @discreet
    def __init__(self, url: str) -> None:
        if not isinstance(url, str):
            raise TypeError(f"a database URL is a str, not {type(url).__name__}{way_to_url(url)}")
        _check_filled_in(url)
        example = "write it as postgresql://user:***@host:5432/database, with the password for ***"
        if not url.strip():
            raise ConfigError(
                "the database URL is empty", hint=f"check that the variable that it comes from is set; {example}"
            )
        if len(url.strip().splitlines()) > 1:
            raise ConfigError(
                "the database URL has several lines",
                hint="give the URL alone; a line break in a password is written %0A",
            )
        scheme, separator, rest = url.strip().partition("://")
        dialect, plus, driver = scheme.partition("+")
        if not separator or dialect not in ("postgresql", "postgres") or (plus and driver not in _DRIVERS):
            jdbc = "remove jdbc: from its beginning, and put what follows the ? in libpq's words; or "
            raise ConfigError(
                "the database URL does not begin with postgresql:// or postgres://",
                hint=(jdbc if scheme.startswith("jdbc:") else "") + example,
            )
        rest, _, query = rest.partition("?")
        authority, _, path = rest.partition("/")
        if "@" in path:
            raise ConfigError("the database URL has an @ after the host", hint=ENCODE)
        credentials, _, hostspec = authority.rpartition("@")
        user, _, password = credentials.partition(":")
        given = _parameters(query)
        parameters = {key: _decoded(value) for key, value in given}
        self.user: str | None = parameters.pop("user", None) or _decoded(user) or None
        effective = parameters.pop("password", None) or _decoded(password) or None
        self.database: str | None = parameters.pop("dbname", None) or _decoded(path) or None
        names, ports = zip(*(_located(spec) for spec in hostspec.split(",")), strict=True)
        named = [(name, "") for name in names]
        if "port" in parameters:
            ports = tuple(parameters.pop("port").split(","))
        if "host" in parameters:  # alone: the ports stay, as a server of the same machine is told by its port
            named = [_named(spec) for spec in parameters.pop("host").split(",")]
        self.hosts: tuple[tuple[str, int | None], ...] = _hosts(named, ports if any(ports) else ("",))
        if _HIDDEN in (password, *(value for key, value in given if _is_secret(key))):
            raise ConfigError(
                f"the password of the database URL is {_HIDDEN}, which stands for one that was hidden",
                hint="give the URL that it was made from: of an SQLAlchemy engine "
                "engine.url.render_as_string(hide_password=False), of an ampd.DatabaseUrl reveal(); "
                "a password that is no more than that is written %2A%2A%2A",
            )
        written = {password, *(value for key, value in given if _is_secret(key))} - {""}
        secrets = written | {form for secret in written for form in forms(_decoded(secret))}
        self._hidden = Hidden((effective, parameters, secrets))

    @property
    def password(self) -> str | None:
        """Return the password, if the URL has one."""
        return self._hidden.reveal()[0]

    @property
    def parameters(self) -> dict[str, str]:
        """Return the query parameters, without those that are attributes."""
        return dict(self._hidden.reveal()[1])

    def __str__(self) -> str:
        return self._render(lambda _: _HIDDEN)

    def __repr__(self) -> str:
        return f"DatabaseUrl({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DatabaseUrl) and self.reveal() == other.reveal()

    def __hash__(self) -> int:
        return hash(self.reveal())

    def __reduce__(self) -> tuple[type[DatabaseUrl], tuple[str]]:
        return DatabaseUrl, (self.reveal(),)

    def reveal(self) -> str:
        """Return the URL with its password, normalised: the one way to get at it, for the driver alone."""
        return self._render(_quoted)

    def without_password(self) -> str:
        """Return the URL without its password and those of its parameters."""
        return self._render(None)

    def with_parameters(self, parameters: Mapping[str, str]) -> DatabaseUrl:
        """Return the same URL with other query parameters."""
        url = DatabaseUrl(self.reveal())
        url._hidden = Hidden((self.password, dict(parameters), self._hidden.reveal()[2]))
        return url

    def _render(self, show: Callable[[str], str] | None) -> str:
        credentials = _quoted(self.user or "") + (f":{show(self.password)}" if self.password and show else "")
        parameters = dict(self.parameters)
        hosts = ""
        # What neither the driver nor Python's URL parser takes before the `/` goes behind the `?`.
        if any(host.startswith("/") or not host or (":" in host and len(self.hosts) > 1) for host, _ in self.hosts):
            if names := ",".join(_bracketed(host) for host, _ in self.hosts):
                parameters["host"] = names
            if any(port for _, port in self.hosts):
                parameters["port"] = ",".join(str(port) for _, port in self.hosts)
        else:
            hosts = ",".join(
                quote(_bracketed(host), safe="[:]") + (f":{port}" if port else "") for host, port in self.hosts
            )
        query = "&".join(
            f"{quote(key)}={show(value) if show and _is_secret(key) else quote(value)}"
            for key, value in parameters.items()
            if show or not _is_secret(key)
        )
        return (
            f"postgresql://{credentials}{'@' if credentials else ''}{hosts}"
            f"{f'/{_quoted(self.database)}' if self.database else ''}{'?' if query else ''}{query}"
        )

    @property
    def label(self) -> str:
        """Return `host:port/database`, as reports and errors show it."""
        names = (os.environ.get("PGHOST") or "localhost").split(",")
        hosts = [(name, port) for host, port in self.hosts or (("", None),) for name in ([host] if host else names)]
        ports = (os.environ.get("PGPORT") or "5432").split(",")
        if len(ports) != len(hosts):
            ports = ports[:1] * len(hosts)
        shown = ",".join(
            f"{_bracketed(host)}:{port or default}" for (host, port), default in zip(hosts, ports, strict=True)
        )
        return f"{shown}/{self.database_or_default}"

    @property
    def database_or_default(self) -> str:
        """Return the database's name, where the URL has none the one that the PG* variables or the user imply."""
        return self.database or os.environ.get("PGDATABASE") or self.user or os.environ.get("PGUSER", "")

    def redact(self, text: str) -> str:
        """Return `text` with every form of the URL's secrets replaced; a very short one only as a word of its own."""
        return without_secrets(text, self._hidden.reveal()[2])

    @property
    def secrets(self) -> set[str]:
        """Return what `redact` replaces, in every form."""
        return set(self._hidden.reveal()[2])

    def hiding(self, password: str | None) -> DatabaseUrl:
        """Return the same URL, whose `redact` replaces another password as well."""
        url = self.with_parameters(self.parameters)
        url._hidden = Hidden((self.password, self.parameters, self._hidden.reveal()[2] | forms(password)))
        return url


def _check_filled_in(url: str) -> None:
    """Refuse a URL out of a template, whose host could not be found in any time; the error shows nothing of it."""
    for form, pattern in _PLACEHOLDERS.items():
        if re.search(pattern, url, re.IGNORECASE if "YOUR" in form else 0):
            raise ConfigError(
                f"the database URL contains a placeholder, {form}, and not what belongs in its place",
                hint="put the value there; where a password really contains that, write it percent-encoded",
            )


def forms(password: str | None) -> set[str]:
    """Return the forms in which a password may show: as it is, and as a URL has it."""
    return {password, _quoted(password)} if password else set()


def _parameters(query: str) -> list[tuple[str, str]]:
    """Return key and value of each parameter, the values still percent-encoded."""
    parts = [part.partition("=") for part in query.split("&") if part]
    if not all(separator for _, separator, _ in parts):
        raise ConfigError("the database URL has a parameter without a value after the ?", hint=ENCODE)
    given = [(_decoded(key), value) for key, _, value in parts]
    return [
        ("sslmode", "require") if each == ("ssl", "true") else each for each in given
    ]  # libpq's one courtesy to JDBC


def _is_secret(key: str) -> bool:
    return "passw" in key.lower()


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _decoded(text: str) -> str:
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeDecodeError:
        decoded = None
    if decoded is None or "\0" in decoded:
        raise ConfigError("the database URL holds a NUL byte, or bytes that are not UTF-8", hint=ENCODE)
    return decoded


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("/") else host


def _named(spec: str) -> tuple[str, str]:
    """Return host and port of one host that a parameter gives, where an IPv6 address may stand without brackets."""
    return (spec, "") if spec.startswith("/") or (spec.count(":") > 1 and spec[0] != "[") else _located(spec)


def _located(spec: str) -> tuple[str, str]:
    """Return host and port of one host that stands before the path."""
    if spec.startswith("["):
        host, bracket, port = spec[1:].partition("]")
        if not bracket or port[:1] not in ("", ":"):
            raise ConfigError("the database URL has an IPv6 address without its closing bracket", hint=ENCODE)
        return _decoded(host), port[1:]
    host, _, port = spec.partition(":")
    return _decoded(host), port


def _hosts(specs: list[tuple[str, str]], ports: tuple[str, ...]) -> tuple[tuple[str, int | None], ...]:
    if len(ports) not in (1, len(specs)):
        raise ConfigError(f"the database URL gives {len(ports)} ports for {len(specs)} hosts", hint="give each its own")
    shared = ports * len(specs) if len(ports) == 1 else ports
    hosts = tuple((host, _port(port or default)) for (host, port), default in zip(specs, shared, strict=True))
    if len(hosts) > 1 and any(not host for host, _ in hosts):
        raise ConfigError("the database URL has a list of hosts with an empty place in it", hint="name each of them")
    if any(port for _, port in hosts):
        return tuple((host, port or 5432) for host, port in hosts)
    return () if hosts == (("", None),) else hosts


def _port(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise ConfigError("the port in the database URL is not a number from 1 to 65535", hint=ENCODE)
    return int(text)
