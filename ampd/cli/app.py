"""What the commands have in common: the application, their options, and the configuration that these lead to."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from ampd.errors import AmpdError
from ampd.version import VERSION

from .messages import remember_options
from .runtime import tell

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cyclopts import Token

    from ampd.config import MetadataDb


HOME = "https://github.com/edgeandnode/ampd-migrate"

app: App = App(
    name="ampd",
    version=VERSION,
    help="""Migrate amp's PostgreSQL metadata database, or with `--migrations DIR` any other.

    The database is the one of `--url`, else of AMP_CONFIG_METADATA_DB__URL, else of `metadata_db.url` in the
    configuration file.

    Exit codes: 0 success, 1 error, 130 and 143 after SIGINT and SIGTERM with the running migration rolled back.""",
    help_epilogue=f"`ampd COMMAND --help` has examples.\n\nSee {HOME}#readme",
    help_format="markdown",
    result_action="return_value",
)
app.meta.version = VERSION

Flag = Annotated[bool, Parameter(negative=(), show_default=False)]


def _version(_: object, tokens: Sequence[Token]) -> int:
    """Read a version as file names have it: cyclopts would take 1.5 for 2, and 0x10 for 16."""
    text = tokens[0].value
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ValueError(f'"{text}" is not a version, which is 1 to 18 digits')
    return int(text)


def read_path(_: object, tokens: Sequence[Token]) -> Path:
    """Read a path; an empty one, from a variable that is not set, say, would be the working folder."""
    if not tokens[0].value:
        raise ValueError("an empty path")
    return Path(tokens[0].value)


Version = Annotated[int, Parameter(converter=_version)]
MigrationsOption = Annotated[
    Path | None,
    Parameter(
        converter=read_path, help="Folder of migration files [default: as configured, else those packaged with ampd]."
    ),
]
FolderOption = Annotated[
    Path | None,
    Parameter(
        converter=read_path,
        allow_leading_hyphen=True,
        help="Folder of migration files, - for the working folder [default: as configured].",
    ),
]
JsonOption = Annotated[Flag, Parameter(help="Print one JSON document on stdout, and nothing else there.")]

ConfigOption = Annotated[
    Path | None,
    Parameter(converter=read_path, help="Configuration file, TOML; before or after the command [env: AMP_CONFIG]."),
]
UrlOption = Annotated[
    str | None,
    Parameter(help="URL of the database, in place of the configured one; before or after the command."),
]


@dataclass(frozen=True)
class Where:
    """What the command line says of the configuration and the database."""

    config: ConfigOption = None
    url: UrlOption = None


WhereGiven = Annotated[Where, Parameter(name="*", show=False)]  # help shows it once, for all commands
AS_CONFIGURED: Where = Where()


def configure(
    where: Where,
    migrations: Path | None,
    *,
    defaults: dict[str, object] | None = None,
    url_needed: bool = True,
    quiet: bool = False,
) -> MetadataDb:
    """Return the configuration of a command, and print its warnings unless it is to be quiet.

    Raises:
        ConfigError: it cannot be used, or has no URL though one is needed.
    """
    from ampd.config_sources import read_config, with_directory

    remember(where, migrations)
    found, warnings = read_config(where.config, os.environ, url=where.url, defaults=defaults)
    metadata_db = found.metadata_db
    for warning in () if quiet else warnings:
        tell(f"warning: {warning}")
    if url_needed:
        metadata_db.require_migrations_url()
    if where.url is not None and not quiet and metadata_db.url and metadata_db.url.password:
        tell(
            "warning: the password in --url is shown to whoever lists the processes of this machine: put it into "
            "AMP_CONFIG_METADATA_DB__URL, metadata_db.url_file or a password file (PGPASSFILE)"
        )
    return with_directory(metadata_db, migrations)


def remember(where: Where, migrations: Path | None) -> None:
    """Remember the options of the command line for the commands in messages."""
    remember_options(_options(where, migrations))


def _options(where: Where, migrations: Path | None) -> Iterator[str]:
    """Yield the options that lead to the same database and files, but for a password, quoted for a shell."""
    from shlex import quote

    if where.config is not None:
        yield f"--config {quote(str(where.config))}"
    if where.url is not None:
        from ampd.database_url import DatabaseUrl

        with suppress(AmpdError):
            yield f"--url {quote(DatabaseUrl(where.url).without_password())}"
    if migrations is not None:
        yield f"--migrations {quote(str(migrations))}"
