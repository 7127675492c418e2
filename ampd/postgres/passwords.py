"""Passwords: the one that libpq would use, one that a function gives, and those that no text may show."""

from __future__ import annotations

import getpass
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ampd.database_url import DatabaseUrl, forms
from ampd.errors import ConfigError
from ampd.redaction import Hidden, without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import asyncpg


class AskedPassword:
    """A password that a caller's function gives for each connection; afterwards it is known, so as not to be shown."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._ask = ask
        self._secrets = Hidden(set[str]())
        self.raised: Exception | None = None  # by the function

    async def __call__(self) -> Any:
        """Ask for the password, as asyncpg does before each connection."""
        from inspect import isawaitable

        try:
            password = self._ask()
            if isawaitable(password):
                password = await password
        except Exception as error:
            self.raised = error
            raise
        self.secrets.update(forms(password) if isinstance(password, str) else ())
        return password

    @property
    def secrets(self) -> set[str]:
        """Return every form of the passwords that it has been given."""
        return self._secrets.reveal()


def url_redact(url: DatabaseUrl, password: str | AskedPassword | None) -> Callable[[str], str]:
    """Return a function that redacts the passwords of a URL, and the one that is used in its place."""
    if isinstance(password, AskedPassword):
        return lambda text: without_secrets(url.redact(text), password.secrets)
    return url.hiding(password).redact


def password_for(url: DatabaseUrl, options: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Return the password that libpq would use, and a warning on a password file that it would ignore.

    The driver has a reader of its own for that file, which takes no escapes, drops a space at the end, and sends to the
    first of several hosts the password of any.
    """
    if (given := options.get("password")) is not None:
        return given, None
    if url.password is not None or "PGPASSWORD" in os.environ:
        return url.password or os.environ.get("PGPASSWORD"), None
    path = _password_file(options.get("passfile") or url.parameters.get("passfile"))
    try:
        if path is None or not path.is_file():
            return None, None
        if path.stat().st_mode & 0o077:
            return "", f"password file {path} has group or world access and is ignored; chmod 0600 {path}"
        text = path.read_text(errors="surrogateescape")
    except OSError:  # psql, too, ignores one that it cannot reach
        return None, None
    places = _places(url)
    passwords = {_password_in(text, url, options.get("user"), *place) for place in places}
    if len(passwords) > 1:
        raise ConfigError(
            f"the password file {path} has not the same password for all hosts of the database URL",
            hint="ampd cannot give each host its own: name one host, or set PGPASSWORD to a password that all take",
        )
    (password,) = passwords
    return ("" if password is None and len(places) > 1 else password), None


def _password_file(given: str | Path | None) -> Path | None:
    try:
        return Path(given or os.environ.get("PGPASSFILE") or Path.home() / ".pgpass")
    except RuntimeError:  # this user has no home
        return None


def _places(url: DatabaseUrl) -> list[tuple[str, str]]:
    """Return each host and port that may be connected to, as a password file names them."""
    if url.hosts and url.hosts[0][0]:
        places = [(host, str(port or os.environ.get("PGPORT") or 5432)) for host, port in url.hosts]
    else:
        default = str(url.hosts[0][1] or "") if url.hosts else ""
        hosts = (os.environ.get("PGHOST") or "localhost").split(",")
        ports = (default or os.environ.get("PGPORT") or "5432").split(",")
        places = list(zip(hosts, ports * len(hosts) if len(ports) == 1 else ports, strict=False))
    return [("localhost" if host.startswith("/") else host, port) for host, port in places]


def _password_in(text: str, url: DatabaseUrl, user: str | None, host: str, port: str) -> str | None:
    user = user or url.user or os.environ.get("PGUSER") or getpass.getuser()
    database = url.database or os.environ.get("PGDATABASE") or user
    for *known, password in _password_lines(text):
        if all(given in ("*", wanted) for given, wanted in zip(known, (host, port, database, user), strict=True)):
            return password
    return None


def _password_lines(text: str) -> Iterator[list[str]]:
    """Yield host, port, database, user and password of each line of a password file."""
    for line in text.split("\n"):
        if not line.startswith("#") and (fields := re.match(_PASSWORD_LINE, line)):
            yield [re.sub(r"\\(.)", r"\1", field) for field in fields.groups()]


_PASSWORD_LINE = r"((?:\\.|[^:\\])*):" * 4 + r"((?:\\.|[^:\r])*)"


def pool_redact(pool: asyncpg.Pool, url: DatabaseUrl | None = None) -> Callable[[str], str]:
    """Return a function that redacts every possible password of a pool: asyncpg does not tell which one it uses.

    What its connections have used is noted now, since they may be gone by then; all else when there is a text.
    """
    connections = (getattr(holder, "_con", None) for holder in getattr(pool, "_holders", ()))
    in_use = [getattr(getattr(connection, "_params", None), "password", None) for connection in connections]

    @cache
    def secrets() -> set[str]:
        options: dict[str, Any] = getattr(pool, "_connect_kwargs", None) or {}
        found = forms(os.environ.get("PGPASSWORD")) | (url.secrets if url else set())
        with suppress(ConfigError, TypeError):
            for dsn in getattr(pool, "_connect_args", ()):
                found |= DatabaseUrl(dsn).secrets
        for password in (options.get("password"), *in_use):
            found |= forms(password) if isinstance(password, str) else set()
            found |= password.secrets if isinstance(password, AskedPassword) else set()
        with suppress(OSError):
            path = _password_file(options.get("passfile"))
            if path and path.is_file():
                text = path.read_text(errors="surrogateescape")
                found |= {form for *_, password in _password_lines(text) for form in forms(password)}
        return found

    return lambda text: without_secrets(text, secrets())
