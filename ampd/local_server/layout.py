"""Which database of a cluster is the metadata database, and who its superuser is.

A cluster that this package has made has a database `amp` of the superuser `postgres`. In one that amp's own `ampd solo`
has made the superuser has the name of the user who ran that, and the tables are in the database `postgres`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec

from ampd.errors import AuthenticationFailed, ConfigError, DatabaseMissing

from .folders import ELSEWHERE, user_name

_ANSWER_SECS = 10.0


class Layout(msgspec.Struct, frozen=True):
    """A database and the superuser whose it is."""

    database: str
    superuser: str


OURS = Layout("amp", "postgres")


def amps(data_dir: Path) -> Layout:
    """Return the layout of a cluster that amp's own `ampd solo` has made."""
    return Layout("postgres", user_name(data_dir.stat().st_uid))


async def find_layout(data_dir: Path, url_of: Callable[[Layout], str]) -> Layout:
    """Return the layout of a running cluster that was there before.

    Raises:
        ConfigError: it is neither ours nor amp's.
    """
    from ampd.postgres.database import Database
    from ampd.redaction import Hidden

    reasons = []
    for layout in (OURS, amps(data_dir)):
        try:
            async with Database(Hidden(url_of(layout))).second_session(_ANSWER_SECS):
                return layout
        except (AuthenticationFailed, DatabaseMissing) as error:
            reasons.append(error.message.rpartition(": ")[2])
    raise ConfigError(
        f"the cluster in {data_dir} is neither ampd's nor amp's: {', and '.join(dict.fromkeys(reasons))}",
        hint=ELSEWHERE,
    )


def ampd_above(pid: int) -> int | None:
    """Return the process `ampd` that runs a server as its child; None if another program, or none any more, does."""
    parent = _process(pid)[1]
    return parent if parent and _process(parent)[0] == "ampd" else None


def _process(pid: int) -> tuple[str, int]:
    """Return the name of a process, and the number of its parent; nothing of one that cannot be found."""
    try:
        fields = dict(line.split(":\t", 1) for line in _status(pid).splitlines() if ":\t" in line)
        return os.path.basename(fields["Name"]), int(fields["PPid"])
    except (OSError, KeyError, ValueError):
        return "", 0


def _status(pid: int) -> str:
    if Path("/proc/self/status").exists():
        return Path(f"/proc/{pid}/status").read_text(errors="replace")
    command = ["ps", "-o", "ppid=,comm=", "-p", str(pid)]
    parent, _, name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().partition(" ")
    return f"PPid:\t{parent}\nName:\t{name.strip()}"
