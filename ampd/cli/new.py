"""`ampd new`: makes the next migration file."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ampd.errors import ConfigError
from ampd.migration import parse_file_name

from .app import AS_CONFIGURED, FolderOption, WhereGiven, configure
from .runtime import print_result

if TYPE_CHECKING:
    from collections.abc import Iterator

TEMPLATE = """\
-- Runs in one transaction, together with its row in the history. Directives change that; each is a comment line of its
-- own before the first statement:
--   "-- no-transaction"            statement by statement: for CREATE INDEX CONCURRENTLY, VACUUM and their like
--   "-- lock-timeout: 2s"          how long one attempt waits for a table lock
--   "-- statement-timeout: 10min"  how long one statement may run

"""
_LONGEST = 255  # bytes of a file's name


def new(name: str, /, *, migrations: FolderOption = None, where: WhereGiven = AS_CONFIGURED) -> int:
    """Create the next migration file, and print its path.

    Its version is the time of now in UTC; where the files are numbered, one above the highest. Connects to nothing.

    Example: `ampd new create_accounts --migrations db/migrations`

    Example: `ampd new "index accounts by email" --migrations -`

    Parameters
    ----------
    name:
        What the migration does; spaces become underscores, and capitals small.
    """
    folder = configure(where, migrations, url_needed=False).migrations.dir
    if folder is None:
        raise ConfigError(
            "no folder for the new migration",
            hint="give it with --migrations DIR (- for the working folder), or set metadata_db.migrations.dir",
        )
    print_result(str(create(folder, checked_name(name))))
    return 0


def checked_name(name: str) -> str:
    """Return a name as it is in the file's name.

    Raises:
        ConfigError: no file name that ampd reads can contain it.
    """
    slug = re.sub(r"\s+", "_", name.strip()).lower()
    problem = None
    if not slug.strip("_"):
        problem = "is empty"
    elif "/" in slug:
        problem = "contains a /"
    elif not slug.isprintable():  # surrogates, of bytes that are no UTF-8, included
        problem = "contains a character that cannot be printed"
    elif ending := re.search(r"\.(sql|up|down)$", slug):
        problem = f"ends in {ending[0]}: give it without the ending of its file"
    elif len(slug.encode()) > _LONGEST - len("20260101000000_.sql"):
        problem = "is too long for the name of a file"
    if problem:
        raise ConfigError(f"the name of the migration {problem}", hint="say what it does: ampd new create_accounts")
    return slug


def create(folder: Path, name: str) -> Path:
    """Create the next file in a folder, which is made if missing, and return its path; no file is ever replaced.

    Raises:
        ConfigError: it cannot be written.
    """
    folder = Path() if folder == Path("-") else folder
    try:
        folder.mkdir(exist_ok=True)
        with _alone_in(folder):
            path = folder / f"{_next_version(os.listdir(folder))}_{name}.sql"
            with path.open("x", encoding="utf-8") as file:
                file.write(TEMPLATE)
    except OSError as error:
        raise ConfigError(
            f"no migration can be created in {folder}: {error.strerror or error}",
            hint="check the path, and who may write to it",
        ) from error
    return path


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one `new` at a time choose a version, where the file system has locks."""
    import fcntl

    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _next_version(file_names: list[str]) -> str:
    """Return the version after those of the files: a time stamp where they have such, or there are none yet."""
    versions = [name.partition("_")[0] for name in file_names if parse_file_name(name) and not name.startswith(".")]
    highest = max(versions, key=int, default="")
    now = f"{datetime.now(UTC):%Y%m%d%H%M%S}"
    if not highest or (len(highest) == len(now) and now > highest):
        return now
    following = f"{int(highest) + 1:0{len(highest)}}"
    if len(following) > 18:
        raise ConfigError(f"there is no version above {highest}, which has 18 digits", hint="give the file a version")
    return following
